"""LiveKit's tokens: verifying those of webhooks and participants, and making our own.

A token is a JWT, HS256 under the secret of the API key that its `iss` names. Verification is on the path of every webhook and so is done
with the standard library (livekit-api's `TokenVerifier` takes five times as long); a property test holds it to `TokenVerifier`: it accepts
nothing that `TokenVerifier` refuses. No token, and no piece of one, may appear in an error.
"""

import hmac
import json
from base64 import urlsafe_b64encode
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping
from enum import StrEnum
from math import isfinite
from typing import Any, NamedTuple, TypeGuard

from livekit.api import AccessToken, VideoGrants
from pydantic_core import from_json

from sfu_delegate.livekit.keys import SfuKey

FAR_FUTURE = 2**53  # seconds; an integer may be larger than any float
LEEWAY = 60.0  # seconds by which clocks may differ; livekit-api's and the server's own
MAX_TOKEN = 16_384  # characters: above what a header may have, and nothing that is worth decoding
PARTICIPANT_TTL = 3600.0  # seconds
USER_CLAIM = "matrix_user"  # ours; LiveKit ignores claims that it does not know
_ADMIN_TTL = 600.0  # seconds; a token is made for each call
_HEADER = b"eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9"  # {"alg":"HS256","typ":"JWT"}
_USUAL_HEADERS = frozenset({_HEADER, b"eyJ0eXAiOiJKV1QiLCJhbGciOiJIUzI1NiJ9"})
_FROM_URLSAFE = bytes.maketrans(b"-_+/", b"+/!!")  # "!" is refused by the strict decoder: the standard alphabet is not the JWT's
_TO_URLSAFE = bytes.maketrans(b"+/", b"-_")
_PADDING = (b"", b"", b"==", b"=")


class Refusal(StrEnum):
    """Why a token was refused; fit for a metric's label."""

    MISSING = "missing"
    MALFORMED = "malformed"
    WRONG_ALGORITHM = "wrong_algorithm"
    UNKNOWN_KEY = "unknown_key"
    BAD_SIGNATURE = "bad_signature"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    NOT_AN_ACCESS_TOKEN = "not_an_access_token"  # noqa: S105  (it is a word, not a token)


class TokenRefused(Exception):
    """A token that proves nothing. The text is a plain sentence for whoever sent it."""

    def __init__(self, reason: Refusal, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.sentence = sentence


class Access(NamedTuple):
    """What a participant's access token proves."""

    sfu: str
    room: str
    identity: str
    expires_at: float  # Unix seconds
    user: str | None = None  # the Matrix user to whom `mint_participant` gave it; None where somebody else made it


def verify(token: str, keys: Mapping[str, SfuKey], now: float, leeway: float = LEEWAY) -> tuple[SfuKey, dict[str, Any]]:
    """The key that signed the token, and the token's claims. Raises TokenRefused.

    `now` is the wall clock in Unix seconds, `leeway` the seconds by which `nbf`, `iat` and `exp` may be off.
    """
    if not token:
        raise TokenRefused(Refusal.MISSING, "There is no token.")
    if len(token) > MAX_TOKEN or not token.isascii():
        raise TokenRefused(Refusal.MALFORMED, "The token is not a JWT: it is too long, or has characters that a JWT cannot have.")
    parts = token.encode().split(b".")
    if len(parts) != 3:
        raise TokenRefused(Refusal.MALFORMED, "The token is not a JWT: it must have three parts with a dot between them.")
    header, payload, signature = parts
    if header not in _USUAL_HEADERS:
        _check_header(_decode(header, "header"))
    claims = _decode(payload, "payload")
    issuer = claims.get("iss")
    if type(issuer) is not str:
        raise TokenRefused(Refusal.MALFORMED, "The token does not say which API key signed it: `iss` must be a string.")
    key = keys.get(issuer)
    if key is None:
        raise TokenRefused(Refusal.UNKNOWN_KEY, "The token was signed by an API key (`iss`) that is not one of our SFUs' keys.")
    # comparing the encoded form accepts the one canonical spelling only
    if not hmac.compare_digest(_sign(b"%b.%b" % (header, payload), key), signature):
        raise TokenRefused(Refusal.BAD_SIGNATURE, "The token's signature is not that of its API key: the secret is another one.")
    _check_claims(claims, now, leeway)
    return key, claims


def access(token: str, keys: Mapping[str, SfuKey], now: float) -> Access:
    """What a participant's LiveKit access token proves: whoever holds it is that participant. Raises TokenRefused.

    A webhook's token is none, and neither is an API token without `roomJoin`.
    """
    key, claims = verify(token, keys, now)
    video = claims.get("video")
    if type(video) is not dict:
        raise _not_an_access_token("it has no `video` grants")
    if video.get("roomJoin") is not True:
        raise _not_an_access_token("its `video` grants do not have `roomJoin: true`")
    room, identity = video.get("room"), claims.get("sub")
    if type(room) is not str or not room or "\0" in room:
        raise _not_an_access_token("its `video` grants do not name one `room`")
    if type(identity) is not str or not identity or "\0" in identity:
        raise _not_an_access_token("it does not name the participant's identity in `sub`")
    user = claims.get(USER_CLAIM)
    return Access(key.sfu, room, identity, float(min(claims["exp"], FAR_FUTURE)), user if type(user) is str else None)


def mint(
    key: SfuKey, grants: VideoGrants, now: float, ttl: float, identity: str = "", user: str | None = None, not_before: float | None = None
) -> str:
    """A token with these grants, from `now` (Unix seconds) for `ttl` seconds.

    The claims are livekit-api's; signed here, since its `to_jwt` reads the system's clock, and warns of the short secrets that LiveKit's
    development mode has. There is no `nbf` unless `not_before` is given: a clock that is ahead of the SFU's must not get our questions refused.
    """
    claims = AccessToken(key.key, key.secret).with_grants(grants).claims.asdict()
    claims |= {"iss": key.key, "exp": int(now + ttl)}
    if identity:
        claims["sub"] = identity
    if not_before is not None:
        claims["nbf"] = int(not_before)
    if user is not None:
        claims[USER_CLAIM] = user
    payload = json.dumps(claims, separators=(",", ":"), ensure_ascii=False).encode()
    signed = _HEADER + b"." + urlsafe_b64encode(payload).rstrip(b"=")
    return (signed + b"." + _sign(signed, key)).decode()


def mint_participant(key: SfuKey, room: str, identity: str, now: float, user: str) -> str:
    """What a participant joins a room with, for an hour (MSC4195). It may not create the room: that is done for those who may have it.

    `user` is the Matrix user, for when the token comes back with a delegation: the identity does not tell it.
    """
    grants = VideoGrants(room_join=True, room=room, room_create=False, can_publish=True, can_subscribe=True, can_update_own_metadata=True)
    return mint(key, grants, now, PARTICIPANT_TTL, identity, user)


def mint_member(key: SfuKey, room: str, identity: str, now: float, user: str, *, can_publish: bool) -> str:
    """The same in the proposal's present form: those whose homeserver has another SFU only listen here, and nobody changes its own metadata.

    `nbf`, by which LiveKit may once revoke tokens, is now: it lets clocks differ by a minute.
    """
    grants = VideoGrants(
        room_join=True, room=room, room_create=False, can_publish=can_publish, can_subscribe=True, can_update_own_metadata=False, hidden=False
    )
    return mint(key, grants, now, PARTICIPANT_TTL, identity, user, not_before=now)


def mint_admin(key: SfuKey, room: str, now: float) -> str:
    """A token that may ask about this room and create it: for RoomService."""
    return mint(key, VideoGrants(room_admin=True, room_create=True, room=room), now, _ADMIN_TTL)


def _sign(data: bytes, key: SfuKey) -> bytes:
    return b2a_base64(hmac.digest(key.secret.encode(), data, "sha256"), newline=False).translate(_TO_URLSAFE, b"=")


def _decode(part: bytes, name: str) -> dict[str, Any]:
    try:
        data = a2b_base64(part.translate(_FROM_URLSAFE) + _PADDING[len(part) % 4], strict_mode=True)
        value = from_json(data, allow_inf_nan=False)
    except (Base64Error, ValueError):
        data, value = b"", None
    if type(value) is not dict or b2a_base64(data, newline=False).translate(_TO_URLSAFE, b"=") != part:
        raise TokenRefused(Refusal.MALFORMED, f"The token is not a JWT: its {name} is not a JSON object in base64url without padding.")
    return value


def _check_header(header: dict[str, Any]) -> None:
    if header.get("alg") != "HS256":
        raise TokenRefused(Refusal.WRONG_ALGORITHM, "The token must be signed with HS256.")
    if "crit" in header or header.get("b64", True) is not True or type(header.get("kid", "")) is not str:
        raise TokenRefused(Refusal.MALFORMED, "The token's header has a `crit`, `b64` or `kid` that LiveKit's tokens do not have.")


def _check_claims(claims: dict[str, Any], now: float, leeway: float) -> None:
    expires = claims.get("exp")
    if not _is_number(expires):
        raise TokenRefused(Refusal.MALFORMED, "The token has no expiry: `exp` must be a number, in seconds of Unix time.")
    for name in ("nbf", "iat"):
        since = claims.get(name, 0)
        if not _is_number(since):
            raise TokenRefused(Refusal.MALFORMED, f"The token's `{name}` must be a number, in seconds of Unix time.")
        if int(since) > now + leeway:
            raise TokenRefused(Refusal.NOT_YET_VALID, f"The token is not valid yet (`{name}`): do the clocks agree?")
    if int(expires) <= now - leeway:
        raise TokenRefused(Refusal.EXPIRED, "The token has expired.")
    if claims.get("aud"):
        raise TokenRefused(Refusal.MALFORMED, "The token is meant for somebody else: LiveKit's tokens have no `aud`.")
    if type(claims.get("sub", "")) is not str or type(claims.get("jti", "")) is not str:
        raise TokenRefused(Refusal.MALFORMED, "The token's `sub` and `jti` must be strings.")


def _is_number(value: object) -> TypeGuard[int | float]:
    # to isinstance, a bool is an int; and 1e999 is read as infinity
    return type(value) is int or (type(value) is float and isfinite(value))


def _not_an_access_token(lack: str) -> TokenRefused:
    return TokenRefused(Refusal.NOT_AN_ACCESS_TOKEN, f"This is not the token that a participant joins with: {lack}.")
