"""What is taken for the body of a MatrixRTC request, what it means, and what is said of one that is not taken."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sfu_delegate.api.errors import MatrixError
from sfu_delegate.api.form import read
from sfu_delegate.api.matrixrtc_body import (
    MAX_MEMBER_ID,
    MAX_NAME,
    MAX_TOKEN,
    Delay,
    DelegateBody,
    GetTokenBody,
    Identities,
    SfuGetBody,
    Wanted,
    read_delegate,
    read_get_token,
    read_sfu_get,
)
from sfu_delegate.api.services import Settings

Body = dict[str, Any]
Read = Callable[[bytes, Settings], Wanted]

SETTINGS = Settings(min_delay=30.0, max_delay=86_400.0)
ROOM = "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"  # the proposal's vector for this room and slot
TOKEN = "verysecret-openid-token"
DELAY_ID = "verysecret-delay-id"
OPENID: Body = {"access_token": TOKEN, "token_type": "Bearer", "matrix_server_name": "example.com", "expires_in": 3600}
MEMBER: Body = {"id": "memberABC", "claimed_user_id": "@alice:example.com", "claimed_device_id": "DEVICE"}
DELAY: Body = {"delay_id": DELAY_ID, "delay_timeout": 3_600_000}
MINE: Body = {"room_id": "!roomid:example.com", "slot_id": "slot1234", "openid_token": OPENID, "member": MEMBER}
LEGACY: Body = {"room": "!roomid:example.com", "openid_token": OPENID, "device_id": "DEVICE"}

DELEGATE = pytest.param(read_delegate, MINE | DELAY, id="delegate_delayed_leave")
GET_TOKEN = pytest.param(read_get_token, MINE, id="get_token")
GET_TOKEN_DELAY = pytest.param(read_get_token, MINE | DELAY, id="get_token with a delay")
SFU_GET = pytest.param(read_sfu_get, LEGACY, id="sfu/get")
SFU_GET_DELAY = pytest.param(read_sfu_get, LEGACY | DELAY, id="sfu/get with a delay")
NEW = [DELEGATE, GET_TOKEN, GET_TOKEN_DELAY]
ALL = [*NEW, SFU_GET, SFU_GET_DELAY]
WITH_DELAY = [DELEGATE, GET_TOKEN_DELAY, SFU_GET_DELAY]


def changed(body: Body, path: str, value: Any) -> Body:
    """A copy with another value at a dotted path."""
    copy: Body = json.loads(json.dumps(body))
    *outer, last = path.split(".")
    at = copy
    for name in outer:
        at = at[name]
    at[last] = value
    return copy


def without(body: Body, path: str) -> Body:
    """A copy without the field at a dotted path."""
    *outer, last = path.split(".")
    copy = changed(body, path, None)
    at = copy
    for name in outer:
        at = at[name]
    del at[last]
    return copy


def understood(reader: Read, body: Body, settings: Settings = SETTINGS) -> Wanted:
    return reader(json.dumps(body).encode(), settings)


def refused(reader: Read, body: Body | bytes, settings: Settings = SETTINGS) -> MatrixError:
    """The error, which is 400 and holds nothing secret, nor any other exception that does."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(MatrixError) as caught:
        reader(data, settings)
    assert caught.value.status == 400
    assert "verysecret" not in f"{caught.value!r} {caught.value.__context__!r} {caught.value.__cause__!r}"
    return caught.value


def bad(reader: Read, body: Body, settings: Settings = SETTINGS) -> str:
    """The sentence of an M_BAD_JSON."""
    error = refused(reader, body, settings)
    assert error.errcode == "M_BAD_JSON"
    return error.error


# ── what it means ──


@pytest.mark.parametrize(("reader", "body", "delay"), [(read_get_token, MINE, None), (read_delegate, MINE | DELAY, Delay(DELAY_ID, 3600.0))])
def test_the_new_form(reader: Read, body: Body, delay: Delay | None) -> None:
    """Room and slot become LiveKit's room; who asks is claimed, and to be checked."""
    assert understood(reader, body) == Wanted("example.com", TOKEN, "@alice:example.com", "DEVICE", "!roomid:example.com", ROOM, "memberABC", delay)


def test_the_legacy_form() -> None:
    """The slot is the room's call; nobody is claimed, and there is no member."""
    room = "F4oOprKFBq6JHqy2qYpq6UQQmR7hCvxkQQoUrd0+SbI"  # of ["!roomid:example.com","m.call#ROOM"]
    assert understood(read_sfu_get, LEGACY) == Wanted("example.com", TOKEN, None, "DEVICE", "!roomid:example.com", room, None, None)
    assert understood(read_sfu_get, LEGACY | DELAY).delay == Delay(DELAY_ID, 3600.0)


def test_the_identities_of_the_new_form() -> None:
    """The token is for the hashed identity; the same client may be connected under the plain one, or the one that it gets through its homeserver."""
    assert understood(read_get_token, MINE).identities("@alice:example.com") == Identities(
        "lwZwzslDeNc9ntK/hT0YfCSFmepFF2SMMVNMTuwfnl4", "@alice:example.com:DEVICE", "M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs"
    )


def test_the_identity_of_the_legacy_form() -> None:
    """The plain one; which hashed one the same client may have is not known."""
    assert understood(read_sfu_get, LEGACY).identities("@alice:example.com") == Identities("@alice:example.com:DEVICE")


@pytest.mark.parametrize(("reader", "body"), ALL)
def test_server_names_are_read_in_lower_case(reader: Read, body: Body) -> None:
    """They are names of the DNS; everything else is to the letter."""
    assert understood(reader, changed(body, "openid_token.matrix_server_name", "EXAMPLE.com:8448")).server == "example.com:8448"
    assert understood(reader, changed(body, "openid_token.access_token", "aBc")).token == "aBc"


@pytest.mark.parametrize(("reader", "body"), ALL)
def test_what_may_be_left_out_of_an_openid_token(reader: Read, body: Body) -> None:
    """Only the token and its server count."""
    short = without(without(body, "openid_token.token_type"), "openid_token.expires_in")
    assert understood(reader, short) == understood(reader, body)


@pytest.mark.parametrize("value", [3600.0, 0, -1, 10**30])
def test_when_a_token_expires_is_the_homeservers_business(value: float) -> None:
    """Any integer will do."""
    assert understood(read_get_token, changed(MINE, "openid_token.expires_in", value)).token == TOKEN


@pytest.mark.parametrize("value", ["https://evil.org", "", None, 7, True, [], ["https://evil.org"], {}, {"url": {"deep": [1]}}])
@pytest.mark.parametrize(("reader", "body"), ALL)
def test_where_requests_should_go_counts_for_nothing(reader: Read, body: Body, value: Any) -> None:
    """`delay_cs_api_url` may be any JSON, also alone: it is accepted, and ignored."""
    assert understood(reader, body | {"delay_cs_api_url": value}) == understood(reader, body)


@pytest.mark.parametrize(("reader", "body"), [GET_TOKEN, SFU_GET])
def test_nulls_stand_for_no_delay(reader: Read, body: Body) -> None:
    """Both fields null is as good as neither."""
    assert understood(reader, body | {"delay_id": None, "delay_timeout": None}).delay is None


@pytest.mark.parametrize(("reader", "body"), WITH_DELAY)
def test_delays_within_the_limits(reader: Read, body: Body) -> None:
    """From the least to the most that is configured, both included; in milliseconds, which may be written as 30000.0."""
    for delay_timeout, seconds in ((30_000, 30.0), (86_400_000, 86_400.0), (30_000.0, 30.0), (30_001, 30.001)):
        delay = understood(reader, body | {"delay_timeout": delay_timeout}).delay
        assert delay == Delay(DELAY_ID, seconds)


# ── what is refused ──


@pytest.mark.parametrize(("reader", "body"), ALL)
@pytest.mark.parametrize(
    "data", [b"", b" ", b"{", b"x", b"\xff", b'{"a": NaN}', b"[" * 60_000, b'\xef\xbb\xbf{"a": 1}', b"\x00", b"{}{}", b"{'a': 1}"]
)
def test_what_is_no_json(reader: Read, body: Body, data: bytes) -> None:
    """M_NOT_JSON."""
    assert body
    assert refused(reader, data).errcode == "M_NOT_JSON"


@pytest.mark.parametrize(("reader", "body"), ALL)
@pytest.mark.parametrize("garbage", [b"x", b" {}", b"\n]", b",", b"\x00"])
def test_garbage_behind_the_body(reader: Read, body: Body, garbage: bytes) -> None:
    """M_NOT_JSON: somebody else may have read another body. Spaces are fine."""
    data = json.dumps(body).encode()
    assert reader(data + b" \r\n", SETTINGS) == understood(reader, body)
    assert refused(reader, data + garbage).errcode == "M_NOT_JSON"


@pytest.mark.parametrize(("reader", "body"), ALL)
def test_two_fields_of_one_name(reader: Read, body: Body) -> None:
    """M_NOT_JSON at every level: which of them counts is a matter of taste."""
    text = json.dumps(body)
    for twice in ('"matrix_server_name": "evil.org", "matrix_server_name"', '"openid_token": {}, "openid_token"'):
        name = twice.rpartition(", ")[2]
        assert refused(reader, text.replace(name, twice, 1).encode()).errcode == "M_NOT_JSON"


@pytest.mark.parametrize(("reader", "body"), ALL)
@pytest.mark.parametrize("data", [b"[]", b"null", b"7", b'"text"', b"true"])
def test_what_is_json_but_no_object(reader: Read, body: Body, data: bytes) -> None:
    """M_BAD_JSON."""
    assert body
    assert refused(reader, data).errcode == "M_BAD_JSON"


_COMMON = ["openid_token", "openid_token.access_token", "openid_token.matrix_server_name"]
_MEMBER = ["room_id", "slot_id", "member", "member.id", "member.claimed_user_id", "member.claimed_device_id"]
_FIELDS = [
    *[(*case.values, path) for case in NEW for path in [*_COMMON, *_MEMBER]],
    *[(*case.values, path) for case in (SFU_GET, SFU_GET_DELAY) for path in [*_COMMON, "room", "device_id"]],
    *[(*DELEGATE.values, path) for path in DELAY],
]


@pytest.mark.parametrize(("reader", "body", "path"), _FIELDS)
def test_a_required_field_is_missing_or_empty(reader: Read, body: Body, path: str) -> None:
    """M_BAD_JSON, with the path of the field."""
    assert f"{path}: is required." in bad(reader, without(body, path))
    empty: list[Any] = [None, "", [], {}, 7.5, False]
    for value in empty:
        assert path in bad(reader, changed(body, path, value)), value


@pytest.mark.parametrize(("reader", "body"), ALL)
def test_unknown_fields_at_every_level(reader: Read, body: Body) -> None:
    """M_BAD_JSON, with the name, unless the name itself is unfit to be repeated."""
    for outer in ("", "openid_token.", *(["member."] if "member" in body else [])):
        assert f"{outer}more: is not a field that is known here; remove it." in bad(reader, changed(body, f"{outer}more", 1))
    assert "verysecret" not in bad(reader, body | {"verysecret \n": 1})


@pytest.mark.parametrize(("reader", "body"), ALL)
def test_fields_of_the_other_form(reader: Read, body: Body) -> None:
    """The legacy fields are unknown to the new endpoints, and the other way round."""
    other = {"room": "!r:x", "device_id": "D"} if "member" in body else {"room_id": "!r:x", "slot_id": "s"}
    for name, value in other.items():
        assert f"{name}: is not a field that is known here" in bad(reader, body | {name: value})


@pytest.mark.parametrize(("reader", "body"), [GET_TOKEN, SFU_GET])
@pytest.mark.parametrize("name", list(DELAY))
def test_only_one_of_the_delay_fields(reader: Read, body: Body, name: str) -> None:
    """M_BAD_JSON, whether the other is missing or null."""
    for half in ({name: DELAY[name]}, {"delay_id": None, "delay_timeout": None, name: DELAY[name]}):
        sentence = bad(reader, body | half)
        assert "delay_id" in sentence
        assert "delay_timeout" in sentence


@pytest.mark.parametrize(("reader", "body"), WITH_DELAY)
@pytest.mark.parametrize("delay_timeout", [29_999, 86_400_001, 0, -1, -3_600_000, 10**30, 1e300])
def test_delays_beyond_the_limits(reader: Read, body: Body, delay_timeout: float) -> None:
    """M_BAD_JSON, with the limits of this configuration."""
    sentence = bad(reader, body | {"delay_timeout": delay_timeout})
    assert sentence == "delay_timeout: must be from 30000 to 86400000 milliseconds; schedule the event with such a delay."
    assert "from 5000 to" in bad(reader, body | {"delay_timeout": 4999}, replace(SETTINGS, min_delay=5.0))


@pytest.mark.parametrize(("reader", "body"), WITH_DELAY)
@pytest.mark.parametrize("delay_timeout", ["3600000", 3_600_000.5, True, [3_600_000], {}, ""])
def test_a_delay_that_is_no_integer(reader: Read, body: Body, delay_timeout: Any) -> None:
    """M_BAD_JSON."""
    assert "delay_timeout: must be an integer" in bad(reader, body | {"delay_timeout": delay_timeout})


@pytest.mark.parametrize(("reader", "body"), WITH_DELAY)
@pytest.mark.parametrize(
    ("delay_id", "problem"), [("", "must not be empty"), ("x" * 256, "is too long"), ("a\nb", "control characters"), (7, "a string")]
)
def test_a_delay_id_that_is_none(reader: Read, body: Body, delay_id: Any, problem: str) -> None:
    """M_BAD_JSON."""
    sentence = bad(reader, body | {"delay_id": delay_id})
    assert sentence.startswith("delay_id: ")
    assert problem in sentence


@pytest.mark.parametrize("device", ["8448:D", ":", "D:", ":D"])
@pytest.mark.parametrize(("reader", "body"), ALL)
def test_a_colon_in_the_device(reader: Read, body: Body, device: str) -> None:
    """M_BAD_JSON: @a:example.org with the device 8448:D would be @a:example.org:8448 with the device D."""
    path = "member.claimed_device_id" if "member" in body else "device_id"
    assert f"{path}: must not have a colon" in bad(reader, changed(body, path, device))


@pytest.mark.parametrize(("reader", "body"), ALL)
def test_names_are_of_a_size(reader: Read, body: Body) -> None:
    """Matrix's IDs have 255 characters at most, and so may each of them have here; a member id may be made of two of them."""
    paths = [*_MEMBER[:2], *_MEMBER[3:]] if "member" in body else ["room", "device_id"]
    for path in paths:
        most = MAX_MEMBER_ID if path == "member.id" else MAX_NAME
        assert understood(reader, changed(body, path, "x" * most))
        assert f"{path}: is too long; {most} characters are the most." in bad(reader, changed(body, path, "x" * (most + 1)))
    assert understood(reader, changed(body, "openid_token.access_token", "x" * MAX_TOKEN))
    assert "openid_token.access_token: is too long" in bad(reader, changed(body, "openid_token.access_token", "x" * (MAX_TOKEN + 1)))


@pytest.mark.parametrize(("reader", "body"), ALL)
def test_half_of_a_character(reader: Read, body: Body) -> None:
    """M_BAD_JSON wherever it stands: no name can be derived from it, and no database takes it."""
    paths = ["openid_token.access_token", *([*_MEMBER[:2], *_MEMBER[3:]] if "member" in body else ["room", "device_id"])]
    paths += ["delay_id"] if "delay_id" in body else []
    for path in paths:
        assert path in bad(reader, changed(body, path, "a\ud800b"))


@pytest.mark.parametrize(("reader", "body"), ALL)
def test_control_characters(reader: Read, body: Body) -> None:
    """M_BAD_JSON in what is sent on or stored: tokens and devices."""
    for path in ("openid_token.access_token", "member.claimed_device_id" if "member" in body else "device_id"):
        for value in ("a\x00b", "a\r\nb", "\x7f", "\x9f"):
            assert f"{path}: must not have control characters" in bad(reader, changed(body, path, value))


@pytest.mark.parametrize(
    "name", ["https://example.com", "example.com/", "a b", "example.com:0", "example.com:99999", "[::g]", "@a:example.com", "ä.de"]
)
@pytest.mark.parametrize(("reader", "body"), ALL)
def test_a_server_name_that_is_none(reader: Read, body: Body, name: str) -> None:
    """M_BAD_JSON: nobody is asked."""
    assert "openid_token.matrix_server_name: is not a Matrix server name" in bad(reader, changed(body, "openid_token.matrix_server_name", name))


def test_many_problems_at_once() -> None:
    """All of them in one answer, or the first ones of very many."""
    assert bad(read_get_token, {}) == "room_id: is required. slot_id: is required. openid_token: is required. member: is required."
    assert "… and" in bad(read_get_token, {f"field{number}": 1 for number in range(50)})


@pytest.mark.parametrize(("form", "body"), [(GetTokenBody, MINE | DELAY), (DelegateBody, MINE | DELAY), (SfuGetBody, LEGACY | DELAY)])
def test_no_form_shows_a_secret(form: Any, body: Body) -> None:
    """Neither the token, nor the delay_id, nor what a client wrote into the URL, is in a repr."""
    assert "verysecret" not in repr(read(form, body | {"delay_cs_api_url": "https://verysecret"}))


def test_nothing_that_was_understood_shows_a_secret() -> None:
    """A repr of it may end up in a traceback or an assertion."""
    assert "verysecret" not in repr(understood(read_delegate, MINE | DELAY))
