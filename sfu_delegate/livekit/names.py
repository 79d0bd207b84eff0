"""The names that a client and this service derive alike: LiveKit's room of a Matrix call, and the identity of a participant in it (MSC4195).

A derived name is the unpadded base64 (standard alphabet) of the SHA-256 of a list of strings in canonical JSON.
"""

from base64 import b64encode
from functools import lru_cache
from hashlib import sha256
from json import JSONEncoder
from typing import Final

MAX_DEVICE: Final = 255  # characters; Matrix has no limit
ROOM_SLOT: Final = "m.call#ROOM"
"""The slot of a room's one call, which the legacy endpoint `/sfu/get` always means."""


_canonical: Final = JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def derived(*parts: str) -> str:
    """The derived name of a list of strings. Raises UnicodeEncodeError for half of a character (a lone surrogate)."""
    canonical = _canonical(parts).encode()
    return b64encode(sha256(canonical).digest()).decode().rstrip("=")


@lru_cache(maxsize=1000)  # everybody in a call asks for it
def room_name(room_id: str, slot_id: str = ROOM_SLOT) -> str:
    """LiveKit's room of a slot (a call) of a Matrix room."""
    return derived(room_id, slot_id)


def identity(user_id: str, device_id: str, member_id: str) -> str:
    """The identity that clients get from `/get_token`, as deployed."""
    return derived(user_id, device_id, member_id)


def member_identity(user_id: str, member_id: str) -> str:
    """The identity of a member in the proposal's present form: what clients get through their homeserver."""
    return derived(user_id, member_id)


def device_in(state_key: str | None, user_id: str) -> str | None:
    """The device in the state key of a call membership, as deployed clients have it: `_@user:server_DEVICE_m.call`, or `@user:server_DEVICE`."""
    before, _, rest = (state_key or "").partition(f"{user_id}_")
    device = rest.removesuffix("_m.call")
    return device if before in ("", "_") and 0 < len(device) <= MAX_DEVICE and ":" not in device and device.isprintable() else None


def plain_identity(user_id: str, device_id: str) -> str:
    """The identity that clients get from the legacy `/sfu/get`.

    It can be told apart into its two halves only if the device has no colon: `@a:example.org` with device `8448:D` and `@a:example.org:8448` with
    device `D` would be the same participant.
    """
    return f"{user_id}:{device_id}"
