"""The SFU's webhooks: is it genuine, what does it say, and does it matter?

This is the hottest path of the daemon: it works on the received bytes, and reads only the fields that the rules need. The body carries the
room's `turnPassword`: it must never be kept, logged or quoted in an error.

What comes in may be strange (other versions, other senders with the key, replays): every field may be missing, and what cannot be read is
refused as a whole, by `WebhookRefused` and no other exception.
"""

import hmac
from binascii import b2a_base64
from collections.abc import Mapping
from enum import StrEnum
from hashlib import sha256
from typing import NamedTuple

from pydantic_core import from_json

from sfu_delegate.delegation.model import RoomChanged, RoomNews, Seen, Sighting
from sfu_delegate.livekit import fields, tokens
from sfu_delegate.livekit.keys import SfuKey

_PARTICIPANT_EVENTS = {
    "participant_joined": Sighting.JOINED,
    "participant_left": Sighting.LEFT,
    "participant_connection_aborted": Sighting.ABORTED,
}
_ROOM_EVENTS = {"room_started": RoomNews.STARTED, "room_finished": RoomNews.FINISHED}
_OTHER_EVENTS = (
    "track_published",
    "track_unpublished",
    "egress_started",
    "egress_updated",
    "egress_ended",
    "ingress_started",
    "ingress_ended",
)
EVENTS = frozenset((*_PARTICIPANT_EVENTS, *_ROOM_EVENTS, *_OTHER_EVENTS))
"""The events of LiveKit 1.13, by name."""

_DEPARTURES = frozenset({"participant_left", "participant_connection_aborted"})


class Refusal(StrEnum):
    """Why a webhook was refused; fit for a metric's label. Everything but MALFORMED is about the `Authorization` header."""

    MISSING = "missing"
    MALFORMED_TOKEN = "malformed_token"  # noqa: S105
    WRONG_ALGORITHM = "wrong_algorithm"
    UNKNOWN_KEY = "unknown_key"
    BAD_SIGNATURE = "bad_signature"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    NO_BODY_HASH = "no_body_hash"  # a genuine token, but not a webhook's: a participant's, say
    WRONG_BODY_HASH = "wrong_body_hash"  # a genuine webhook's token, but of another webhook
    MALFORMED = "malformed"  # genuine, and not a webhook


_REFUSALS = {
    tokens.Refusal.MISSING: Refusal.MISSING,
    tokens.Refusal.MALFORMED: Refusal.MALFORMED_TOKEN,
    tokens.Refusal.WRONG_ALGORITHM: Refusal.WRONG_ALGORITHM,
    tokens.Refusal.UNKNOWN_KEY: Refusal.UNKNOWN_KEY,
    tokens.Refusal.BAD_SIGNATURE: Refusal.BAD_SIGNATURE,
    tokens.Refusal.EXPIRED: Refusal.EXPIRED,
    tokens.Refusal.NOT_YET_VALID: Refusal.NOT_YET_VALID,
}


class WebhookRefused(Exception):
    """Not a webhook of our SFUs, or not one that can be read. The text is a plain sentence for whoever sent it."""

    def __init__(self, reason: Refusal, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.sentence = sentence

    @property
    def unauthorized(self) -> bool:
        """Answer 401: nobody proved to be our SFU. False: 400."""
        return self.reason is not Refusal.MALFORMED


class Webhook(NamedTuple):
    """What the rules need of a webhook. Absent text is "", an absent number 0."""

    event: str
    id: str  # EV_…
    created_at: int  # Unix seconds
    room: str
    room_sid: str  # RM_…
    identity: str
    sid: str  # PA_…
    joined_at_ms: int  # Unix milliseconds by the SFU node's clock
    reason: str  # DisconnectReason by name, or as a number where this version knows no name


def verify(authorization: str | None, body: bytes, keys: Mapping[str, SfuKey], now: float) -> SfuKey:
    """The key that signed this webhook; `now` is the wall clock in Unix seconds. Raises WebhookRefused.

    The header is the bare JWT, and its `sha256` claim the standard base64 of the body's SHA-256 (LiveKit 1.13). The claim is required: a
    participant's access token is signed by the same key. A repetition within the token's 5 minutes is not noticed here: the rules make
    it harmless.
    """
    if not authorization:
        raise WebhookRefused(Refusal.MISSING, "There is no Authorization header.")
    token = authorization
    if token[:7].lower() == "bearer ":
        token = token[7:].strip()
    try:
        key, claims = tokens.verify(token, keys, now)
    except tokens.TokenRefused as refused:
        raise WebhookRefused(_REFUSALS[refused.reason], refused.sentence) from None
    claimed = claims.get("sha256")
    if type(claimed) is not str or not claimed:
        raise WebhookRefused(Refusal.NO_BODY_HASH, "The token is not a webhook's: it has no `sha256` of the body.")
    actual = b2a_base64(sha256(body).digest(), newline=False)
    # 32 bytes are 43 characters and one of padding, which some encoders leave out
    if not hmac.compare_digest(actual[:-1], claimed.encode().removesuffix(b"=")):
        raise WebhookRefused(Refusal.WRONG_BODY_HASH, "The body is not the one that was signed: its SHA-256 is another.")
    return key


def decode(body: bytes) -> Webhook:
    """What a webhook says. Raises WebhookRefused (MALFORMED) and nothing else; never quotes the body.

    Both spellings of protobuf's JSON are read. An end without a reason is UNKNOWN_REASON: that is the enum's default, which protobuf
    leaves out.
    """
    problem = ""
    try:
        event = from_json(body, allow_inf_nan=False, cache_strings="keys")
        if type(event) is dict:
            name = fields.text(event, "event")
            room = fields.message(event, "room")
            participant = fields.message(event, "participant")
            reason = fields.disconnect_reason(participant)
            return Webhook(
                name,
                fields.identifier(event, "id"),
                fields.integer(event, "createdAt", "created_at"),
                fields.text(room, "name"),
                fields.identifier(room, "sid"),
                fields.text(participant, "identity"),
                fields.identifier(participant, "sid"),
                fields.joined_at_ms(participant),
                reason or ("UNKNOWN_REASON" if name in _DEPARTURES else ""),
            )
        problem = "it is not an object"
    except fields.BadField as error:
        problem = str(error)
    except ValueError:
        problem = "it is not JSON"
    # raised out here: the parser's error, which may quote the body, must not travel along as the context
    raise WebhookRefused(Refusal.MALFORMED, f"The body is not a webhook: {problem}.")


def to_input(sfu: str, webhook: Webhook) -> Seen | RoomChanged | None:
    """The rules' input; None for a webhook that does not matter, as most do not, or that does not say whom it is about."""
    what = _PARTICIPANT_EVENTS.get(webhook.event)
    if what is not None:
        if webhook.room and webhook.identity:
            return Seen(
                *(sfu, webhook.room, webhook.identity, what, webhook.sid, webhook.joined_at_ms, webhook.reason),
                room_sid=webhook.room_sid,
                created_at=float(webhook.created_at),
            )
        return None
    news = _ROOM_EVENTS.get(webhook.event)
    if news is not None and webhook.room:
        return RoomChanged(sfu, webhook.room, news, webhook.room_sid, webhook.id, float(webhook.created_at))
    return None


def label(event: str) -> str:
    """The event as a metric's label: its name, or "other" for what LiveKit does not send. Labels must not come from outside."""
    return event if event in EVENTS else "other"
