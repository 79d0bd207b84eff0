"""Reading single fields of LiveKit's JSON: one place that knows what protobuf's JSON allows, for webhooks and for answers.

Protobuf writes JSON in two dialects (camelCase in webhooks, snake_case in RoomService's answers), 64-bit integers as text, leaves
defaults out in one of them, and reads `null` as the default. What cannot be read is an error that names the field, never its content.
"""

import re
from typing import Any

from livekit.protocol.models import DisconnectReason

MAX_ID = 256  # characters; LiveKit's own have 15
MAX_INTEGER = 2**53  # milliseconds until the year 287,000; exact in every JSON reader, and fits every database
_DIGITS = len(str(MAX_INTEGER))
_UNFIT_FOR_IDS = re.compile(r"[\s\x00-\x1f\x7f-\x9f]")
_REASONS: dict[int, str] = {number: name for name, number in DisconnectReason.items()}
_NAMES = frozenset(_REASONS.values())
_ENUM_NUMBER = re.compile(r"-?[0-9]{1,10}")


class BadField(ValueError):
    """A field that is not what it must be. The text names the field and says what it must be."""


def message(parent: dict[str, Any], name: str) -> dict[str, Any]:
    """A nested message; an absent one reads as an empty one."""
    value = parent.get(name)
    if type(value) is dict:
        return value
    if value is None:
        return {}
    raise BadField(f"{name} must be an object")


def text(parent: dict[str, Any], name: str) -> str:
    """A text field, "" when absent. Refuses NUL, which PostgreSQL cannot store."""
    value = parent.get(name)
    if type(value) is str:
        if "\0" in value:
            raise BadField(f"{name} must not contain a NUL character")
        return value
    if value is None:
        return ""
    raise BadField(f"{name} must be a string")


def identifier(parent: dict[str, Any], name: str) -> str:
    """A `sid` or an `id`, "" when absent, without whitespace and control characters: they become "_", so that a space can separate ids."""
    value = parent.get(name)
    if type(value) is str:
        if len(value) > MAX_ID:
            raise BadField(f"{name} must not be longer than {MAX_ID} characters")
        # LiveKit's own (PA_…, RM_…, EV_…) look like a name in Python, and this test is ten times faster than the expression
        return value if value.isidentifier() else _UNFIT_FOR_IDS.sub("_", value)
    if value is None:
        return ""
    raise BadField(f"{name} must be a string")


def integer(parent: dict[str, Any], camel: str, snake: str) -> int:
    """A whole number that is not negative, as a number or as text, under either name; 0 when absent."""
    value = parent.get(camel)
    if value is None:
        value = parent.get(snake)
        if value is None:
            return 0
    kind = type(value)
    if kind is str:
        number = int(value) if value.isascii() and value.isdigit() and len(value) <= _DIGITS else -1
    elif kind is int:
        number = value
    elif kind is float and value.is_integer():
        number = int(value)
    else:
        number = -1
    if 0 <= number < MAX_INTEGER:
        return number
    raise BadField(f"{camel} must be a whole number from 0 to 2^53")


def joined_at_ms(participant: dict[str, Any]) -> int:
    """When the session began, by the SFU node's clock in Unix milliseconds; 0 when unknown. Old versions told only the seconds."""
    at_ms = integer(participant, "joinedAtMs", "joined_at_ms")
    if at_ms:
        return at_ms
    at_ms = integer(participant, "joinedAt", "joined_at") * 1000
    if at_ms < MAX_INTEGER:
        return at_ms
    raise BadField("joinedAt must be seconds of Unix time")


def disconnect_reason(participant: dict[str, Any]) -> str:
    """LiveKit's DisconnectReason by name, "" when absent; the decimal number of one that is not known here."""
    value = participant.get("disconnectReason")
    if value is None:
        value = participant.get("disconnect_reason")
        if value is None:
            return ""
    if type(value) is str:
        if value in _NAMES:
            return value
        if not _ENUM_NUMBER.fullmatch(value):
            return identifier({"disconnectReason": value}, "disconnectReason")
        value = int(value)
    if type(value) is not int or not -(2**31) <= value < 2**31:
        raise BadField("disconnectReason must be a name or a number of 32 bits")
    return _REASONS.get(value) or str(value)
