"""What is taken for the body of a request that a homeserver passes on, what it means, and what is said of one that is not taken."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from sfu_delegate.api.errors import MatrixError
from sfu_delegate.api.form import MAX_DELAY_ID, read
from sfu_delegate.api.matrixrtc_body import MAX_MEMBER_ID, MAX_NAME, Identities
from sfu_delegate.api.service_body import (
    MAX_URL,
    Asked,
    DelegateBody,
    FederatedBody,
    GetTokenBody,
    read_delegate,
    read_federated,
    read_get_token,
)

Body = dict[str, Any]
Read = Callable[[bytes], Asked]

URL = "wss://sfu.example.com"
ALICE = "@alice:example.com"
ROOM = "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"  # the proposal's vector for this room and slot
IDENTITY = "M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs"  # the proposal's vector for Alice and memberABC
DELAY_ID = "verysecret-delay-id"

PLACE: Body = {"url": URL, "room_id": "!roomid:example.com", "slot_id": "slot1234"}
PROPOSED: Body = {"member_id": "memberABC"}
DEPLOYED: Body = {"member": {"id": "memberABC", "claimed_device_id": "DEVICE"}}
USER: Body = {"user_id": ALICE}
DELAY: Body = {"delay_id": DELAY_ID}


def _forms(reader: Read, more: Body, name: str) -> list[Any]:
    return [
        pytest.param(reader, PLACE | PROPOSED | more, id=f"{name}, member_id"),
        pytest.param(reader, PLACE | DEPLOYED | more, id=f"{name}, member"),
    ]


GET_TOKEN = _forms(read_get_token, {}, "get_token")
FEDERATED = _forms(read_federated, USER, "federated")
DELEGATE = _forms(read_delegate, DELAY, "delegate_delayed_leave")
ALL = [*GET_TOKEN, *FEDERATED, *DELEGATE]

everything = pytest.mark.parametrize(("reader", "body"), ALL)


def understood(reader: Read, body: Body) -> Asked:
    return reader(json.dumps(body).encode())


def refused(reader: Read, body: Body | bytes) -> MatrixError:
    """The error, which is 400 and holds nothing secret, nor any other exception that does."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(MatrixError) as caught:
        reader(data)
    assert caught.value.status == 400
    assert "verysecret" not in f"{caught.value!r} {caught.value.__context__!r} {caught.value.__cause__!r}"
    return caught.value


def bad(reader: Read, body: Body) -> str:
    """The sentence of an M_BAD_JSON."""
    error = refused(reader, body)
    assert error.errcode == "M_BAD_JSON"
    return error.error


# ── what it means ──


@pytest.mark.parametrize(
    ("member", "device"),
    [
        (PROPOSED, None),
        (DEPLOYED, "DEVICE"),
        (PROPOSED | DEPLOYED, "DEVICE"),
        ({"member": {"id": "memberABC"}}, None),
        ({"member_id": None, **DEPLOYED}, "DEVICE"),
        ({**PROPOSED, "member": None}, None),
        ({"member": {"id": "memberABC", "claimed_device_id": None, "claimed_user_id": None}}, None),
    ],
)
def test_a_member_in_either_form(member: Body, device: str | None) -> None:
    """`member_id`, `member`, or both alike; null is as good as nothing. The device is known only if it was said."""
    asked = Asked(URL, "!roomid:example.com", "slot1234", "memberABC", device, None)
    assert understood(read_get_token, PLACE | member) == asked
    assert understood(read_delegate, PLACE | member | DELAY) == Asked(
        URL, "!roomid:example.com", "slot1234", "memberABC", device, None, None, DELAY_ID
    )
    assert understood(read_federated, PLACE | member | USER) == Asked(URL, "!roomid:example.com", "slot1234", "memberABC", device, ALICE)


@everything
def test_the_room(reader: Read, body: Body) -> None:
    """Room and slot become LiveKit's room."""
    assert understood(reader, body).room == ROOM


@everything
def test_the_identity(reader: Read, body: Body) -> None:
    """It is the proposal's, of user and member, in whatever form the member came."""
    assert understood(reader, body).identities(ALICE).identity == IDENTITY


def test_the_other_forms_of_the_identity() -> None:
    """With a device, the same client may be connected under what the standalone endpoints give; without one, that cannot be told."""
    hashed = "lwZwzslDeNc9ntK/hT0YfCSFmepFF2SMMVNMTuwfnl4"  # [Alice, DEVICE, memberABC]
    assert understood(read_delegate, PLACE | DEPLOYED | DELAY).identities(ALICE) == Identities(IDENTITY, f"{ALICE}:DEVICE", hashed)
    assert understood(read_delegate, PLACE | PROPOSED | DELAY).identities(ALICE) == Identities(IDENTITY)


def test_a_device_that_is_known_from_elsewhere() -> None:
    """It stands in for one that the request does not tell, and not for one that it does."""
    told = understood(read_delegate, PLACE | DEPLOYED | DELAY)
    assert understood(read_delegate, PLACE | PROPOSED | DELAY).identities(ALICE, "DEVICE") == told.identities(ALICE)
    assert told.identities(ALICE, "OTHER") == told.identities(ALICE)


@pytest.mark.parametrize(("reader", "more"), [(read_get_token, {}), (read_delegate, DELAY)])
def test_who_a_client_claims_to_be(reader: Read, more: Body) -> None:
    """It is told, so that it can be compared with whom the homeserver names."""
    member = DEPLOYED["member"] | {"claimed_user_id": "@bob:example.com"}
    assert understood(reader, PLACE | {"member": member} | more).claimed_user == "@bob:example.com"


def test_the_user_of_another_homeserver() -> None:
    """It is `user_id`, and nothing else may say that it is somebody else."""
    member = DEPLOYED["member"] | {"claimed_user_id": ALICE}
    assert understood(read_federated, PLACE | {"member": member} | USER).claimed_user == ALICE
    with pytest.raises(MatrixError) as caught:
        understood(read_federated, PLACE | {"member": member | {"claimed_user_id": "@bob:example.com"}} | USER)
    assert (caught.value.status, caught.value.errcode) == (400, "M_BAD_JSON")


@pytest.mark.parametrize(("given", "server"), [("Other.EXAMPLE:8448", "other.example:8448"), ("[::1]", "[::1]"), (None, None)])
def test_whose_sfu_it_is(given: str | None, server: str | None) -> None:
    """A server's name in lower case; null is as good as nothing."""
    assert understood(read_get_token, PLACE | PROPOSED | {"server_name": given}).server == server


@pytest.mark.parametrize(("reader", "body"), [*FEDERATED, *DELEGATE])
def test_a_server_name_is_for_tokens_only(reader: Read, body: Body) -> None:
    """Elsewhere it is a field like any other that is not known: ignored."""
    assert understood(reader, body | {"server_name": "other.example"}).server is None


@everything
def test_fields_that_are_not_known(reader: Read, body: Body) -> None:
    """They are ignored at every level: the proposal may get more of them."""
    more = body | {"more": {"verysecret": 1}}
    if "member" in body:
        more |= {"member": body["member"] | {"more": [1]}}
    assert understood(reader, more) == understood(reader, body)


@pytest.mark.parametrize("value", [3_600_000, "an hour", None, -1, {"a": 1}])
@pytest.mark.parametrize(("reader", "body"), DELEGATE)
def test_a_delay_counts_for_nothing(reader: Read, body: Body, value: Any) -> None:
    """What a client says of its event's delay is ignored, whatever it is: the homeserver tells it."""
    assert understood(reader, body | {"delay_timeout": value, "delay_cs_api_url": value}) == understood(reader, body)


# ── what is refused ──


@everything
@pytest.mark.parametrize("data", [b"", b" ", b"{", b"\xff", b'{"a": NaN}', b"[" * 60_000, b"{}{}", b'{"url": "a", "url": "b"}'])
def test_what_is_no_json(reader: Read, body: Body, data: bytes) -> None:
    """M_NOT_JSON, also where two parsers would read different things."""
    assert body
    assert refused(reader, data).errcode == "M_NOT_JSON"


@everything
@pytest.mark.parametrize("data", [b"[]", b"null", b"7", b'"text"'])
def test_what_is_json_but_no_object(reader: Read, body: Body, data: bytes) -> None:
    """M_BAD_JSON."""
    assert body
    assert refused(reader, data).errcode == "M_BAD_JSON"


_FIELDS = [
    *[(*case.values, name) for case in ALL for name in PLACE],
    *[(*case.values, "user_id") for case in FEDERATED],
    *[(*case.values, "delay_id") for case in DELEGATE],
]


@pytest.mark.parametrize(("reader", "body", "name"), _FIELDS)
def test_a_required_field_is_missing_or_empty(reader: Read, body: Body, name: str) -> None:
    """M_BAD_JSON, with the name of the field."""
    assert f"{name}: is required." in bad(reader, {key: value for key, value in body.items() if key != name})
    empty: list[Any] = [None, "", [], {}, 7.5, False]
    for value in empty:
        assert f"{name}: must " in bad(reader, body | {name: value}), value


@everything
def test_no_member_at_all(reader: Read, body: Body) -> None:
    """M_BAD_JSON, which names both forms."""
    nobody = {key: value for key, value in body.items() if key not in {"member", "member_id"}}
    for missing in (nobody, nobody | {"member": None}, nobody | {"member_id": None}):
        sentence = bad(reader, missing)
        assert "must have member_id" in sentence
        assert "claimed_device_id" in sentence


@everything
@pytest.mark.parametrize("member", [{}, [], "memberABC", {"id": ""}, {"id": None}, {"id": 7}, {"id": "a", "claimed_device_id": ""}])
def test_a_member_that_is_none(reader: Read, body: Body, member: Any) -> None:
    """M_BAD_JSON with the path, also where `member_id` would do."""
    assert bad(reader, body | {"member": member}).startswith("member")


@everything
def test_two_members(reader: Read, body: Body) -> None:
    """M_BAD_JSON: which of them is meant, nobody knows."""
    assert "two members" in bad(reader, body | {"member_id": "memberABC", "member": {"id": "another"}})


@everything
@pytest.mark.parametrize("device", ["8448:D", ":", "a\nb", "\x7f", "x" * (MAX_NAME + 1), 7])
def test_a_device_that_is_none(reader: Read, body: Body, device: Any) -> None:
    """M_BAD_JSON: with a colon, @a:example.org with 8448:D would be @a:example.org:8448 with D."""
    assert "member.claimed_device_id: " in bad(reader, body | {"member": {"id": "memberABC", "claimed_device_id": device}})


@pytest.mark.parametrize(("reader", "body"), [*GET_TOKEN, *FEDERATED])
def test_a_token_is_no_delegation(reader: Read, body: Body) -> None:
    """M_BAD_JSON, lest a client believes that its event is taken care of; null is none, and a delay alone is ignored."""
    values: list[Any] = [DELAY_ID, "", 0, False, {}]
    for value in values:
        assert "delegate_delayed_leave" in bad(reader, body | {"delay_id": value})
    assert understood(reader, body | {"delay_id": None, "delay_timeout": 3_600_000}) == understood(reader, body)


@pytest.mark.parametrize(("reader", "body"), DELEGATE)
@pytest.mark.parametrize(
    ("delay_id", "problem"), [("x" * (MAX_DELAY_ID + 1), "is too long"), ("verysecret\n", "control characters"), (7, "a string")]
)
def test_a_delay_id_that_is_none(reader: Read, body: Body, delay_id: Any, problem: str) -> None:
    """M_BAD_JSON."""
    sentence = bad(reader, body | {"delay_id": delay_id})
    assert sentence.startswith("delay_id: ")
    assert problem in sentence


@pytest.mark.parametrize("name", ["https://example.com", "example.com/", "a b", "example.com:0", "[::g]", "@a:example.com", "ä.de", "", 7])
def test_a_server_name_that_is_none(name: Any) -> None:
    """M_BAD_JSON: nobody is asked."""
    assert "server_name: " in bad(read_get_token, PLACE | PROPOSED | {"server_name": name})


@everything
def test_names_are_of_a_size(reader: Read, body: Body) -> None:
    """Matrix's IDs have 255 characters at most; a member id may be made of two of them, and a URL may be longer."""
    most = {"url": MAX_URL, "room_id": MAX_NAME, "slot_id": MAX_NAME, **({"user_id": MAX_NAME} if "user_id" in body else {})}
    for name, size in most.items():
        assert understood(reader, body | {name: "x" * size})
        assert f"{name}: is too long; {size} characters are the most." in bad(reader, body | {name: "x" * (size + 1)})
    rest = {key: value for key, value in body.items() if key not in {"member", "member_id"}}
    for size in (MAX_MEMBER_ID, MAX_MEMBER_ID + 1):
        for member in ({"member_id": "x" * size}, {"member": {"id": "x" * size}}):
            if size > MAX_MEMBER_ID:
                assert "is too long" in bad(reader, rest | member)
            else:
                assert understood(reader, rest | member).member == "x" * size


@everything
def test_half_of_a_character(reader: Read, body: Body) -> None:
    """M_BAD_JSON wherever it stands: no name can be derived from it, and no database takes it."""
    for name in ("url", "room_id", "slot_id", "member_id", *(name for name in ("user_id", "delay_id") if name in body)):
        assert name in bad(reader, body | {name: "a\ud800b"})
    assert "member.id" in bad(reader, body | {"member": {"id": "a\ud800b"}})


@everything
def test_control_characters_in_a_url(reader: Read, body: Body) -> None:
    """M_BAD_JSON: no SFU has such a URL."""
    assert "url: must not have control characters" in bad(reader, body | {"url": "wss://sfu\r\n"})


@pytest.mark.parametrize(
    ("form", "body"), [(GetTokenBody, PLACE | PROPOSED), (FederatedBody, PLACE | PROPOSED | USER), (DelegateBody, PLACE | PROPOSED | DELAY)]
)
def test_no_form_shows_a_secret(form: Any, body: Body) -> None:
    """The delay_id is not in a repr, nor is what was ignored."""
    assert "verysecret" not in repr(read(form, body | {"ignored": "verysecret"}))


def test_nothing_that_was_understood_shows_a_secret() -> None:
    """A repr of it may end up in a traceback or an assertion."""
    asked = understood(read_delegate, PLACE | PROPOSED | DELAY)
    assert asked.delay_id == DELAY_ID
    assert "verysecret" not in repr(asked)
