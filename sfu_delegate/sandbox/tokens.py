"""LiveKit's tokens with the standard library alone: signed webhooks and access tokens (JWT, HS256).

For the sandbox only: what production code verifies with lives elsewhere, so that a mistake here cannot hide one there.
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

WEBHOOK_VALIDITY = 300  # seconds, LiveKit 1.13


class TokenRefused(Exception):
    """A token that is not valid. `answer` is LiveKit's text, which may quote the token and must not be logged; the exception's own text does not."""

    def __init__(self, reason: str, token: str | None = None) -> None:
        super().__init__(reason)
        self.answer = reason if token is None else f"invalid token: {token}, error: {reason}"


def _encode(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def _decode(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def make_token(claims: Mapping[str, Any], secret: str) -> str:
    """A JWT over the claims, HS256."""
    head = _encode(b'{"alg":"HS256","typ":"JWT"}')
    payload = _encode(json.dumps(claims, separators=(",", ":"), ensure_ascii=False).encode())
    return f"{head}.{payload}.{_encode(hmac.digest(secret.encode(), f'{head}.{payload}'.encode(), 'sha256'))}"


def sign(body: bytes, key: str, secret: str, now: float) -> str:
    """The `Authorization` of a webhook in LiveKit's form: the bare JWT with the body's SHA-256, valid for five minutes."""
    at = int(now)
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    return make_token({"iss": key, "exp": at + WEBHOOK_VALIDITY, "nbf": at, "iat": at, "sha256": digest}, secret)


def access_token(
    key: str, secret: str, now: float, video: Mapping[str, Any], *, identity: str = "", name: str = "", valid_for: float = 3600.0
) -> str:
    """An access token with LiveKit's video grants in camelCase, for example `{"roomJoin": True, "room": "x"}`. `valid_for` in seconds."""
    claims: dict[str, Any] = {"name": name} if name else {}
    claims |= {"video": dict(video), "sub": identity, "iss": key, "nbf": int(now), "exp": int(now + valid_for)}
    return make_token(claims, secret)


def join_token(key: str, secret: str, now: float, room: str, identity: str, *, valid_for: float = 3600.0) -> str:
    """What a client joins a room with."""
    grants = {"roomJoin": True, "room": room, "canPublish": True, "canSubscribe": True, "canPublishData": True}
    return access_token(key, secret, now, grants, identity=identity, name=identity, valid_for=valid_for)


def read_token(token: str, keys: Mapping[str, str], now: float) -> dict[str, Any]:
    """The claims of a valid token. Raises TokenRefused, with the very text of LiveKit 1.13."""
    try:
        head, payload, signature = token.split(".")
        header, claims = json.loads(_decode(head)), json.loads(_decode(payload))
        issuer = claims["iss"]
        given = _decode(signature)
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise TokenRefused("invalid authorization token") from error
    times = (claims.get("exp", 0), claims.get("nbf", 0))
    if (
        not isinstance(header, dict)
        or header.get("alg") != "HS256"
        or not isinstance(issuer, str)
        or not all(isinstance(at, int | float) for at in times)
    ):
        raise TokenRefused("invalid authorization token")
    if issuer not in keys:
        raise TokenRefused(f"invalid API key: {issuer}")
    expected = hmac.digest(keys[issuer].encode(), f"{head}.{payload}".encode(), "sha256")
    if not hmac.compare_digest(given, expected):
        raise TokenRefused("token signature is invalid: signature is invalid", token)
    if times[0] <= now:
        raise TokenRefused("token has invalid claims: token is expired", token)
    if times[1] > now + 1:
        raise TokenRefused("token has invalid claims: token is not valid yet", token)
    return dict(claims)
