"""The names that a client and this service derive alike, held to the proposal's vectors and to the definition, written out."""

from base64 import b64decode
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfu_delegate.livekit import names

USER, DEVICE, MEMBER = "@alice:example.com", "DEVICE", "memberABC"


def by_hand(canonical: str) -> str:
    """The unpadded base64 of the SHA-256 of a text, by other means than the code's."""
    bits = "".join(f"{byte:08b}" for byte in sha256(canonical.encode()).digest())
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return "".join(alphabet[int(bits[at : at + 6].ljust(6, "0"), 2)] for at in range(0, len(bits), 6))


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("!roomid:example.com", "slot1234"), "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"),
        ((USER, MEMBER), "M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs"),
    ],
)
def test_the_published_vectors(parts: tuple[str, ...], name: str) -> None:
    """MSC4195 gives one for a room and one for an identity."""
    assert names.derived(*parts) == name


def test_the_room_of_a_slot() -> None:
    """LiveKit's room is derived from room and slot."""
    assert names.room_name("!roomid:example.com", "slot1234") == "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"


def test_the_legacy_endpoint_has_one_slot() -> None:
    """A client of `/sfu/get` and one of `/get_token` with the slot of the room's call meet in the same room."""
    assert names.room_name("!r:example.com") == names.room_name("!r:example.com", "m.call#ROOM") == by_hand('["!r:example.com","m.call#ROOM"]')


def test_the_identity_has_three_parts_as_deployed() -> None:
    """User, device and member, in that order."""
    assert names.identity(USER, DEVICE, MEMBER) == by_hand('["@alice:example.com","DEVICE","memberABC"]')


def test_the_plain_identity_is_not_hashed() -> None:
    """What the legacy endpoint gives out."""
    assert names.plain_identity(USER, DEVICE) == "@alice:example.com:DEVICE"


def test_canonical_json_is_utf_8_and_compact() -> None:
    """Nothing beyond ASCII is escaped; quotes, backslashes and control characters are, in the shortest way."""
    assert names.derived("!ü€😀:x", 'a"b\\c\n\t\x01/') == by_hand('["!ü€😀:x","a\\"b\\\\c\\n\\t\\u0001/"]')


def test_half_of_a_character_has_no_name() -> None:
    """A lone surrogate cannot be encoded, so two parties cannot agree on anything."""
    with pytest.raises(UnicodeEncodeError):
        names.derived("!\ud800:x")


@given(st.lists(st.text(), min_size=1, max_size=3), st.lists(st.text(), min_size=1, max_size=3))
def test_names_are_those_of_the_whole_list(one: list[str], other: list[str]) -> None:
    """43 characters of the standard alphabet without padding, and no two lists share one, wherever their commas and quotes are."""
    name = names.derived(*one)
    assert len(name) == 43
    assert len(b64decode(name + "=", validate=True)) == 32
    assert (name == names.derived(*other)) == (one == other)
