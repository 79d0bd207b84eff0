"""The MatrixRTC endpoints on the real engine, with homeservers that vouch, and SFUs that make rooms, by a script."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Any

import aiohttp
import pytest
from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.api.services import Settings
from sfu_delegate.delegation.model import Accept, NewEvent, OnEnd, Presence, Seen, Sighting, State
from sfu_delegate.delegation.replies import TooMany
from sfu_delegate.livekit import tokens
from sfu_delegate.livekit.room_service import SfuUnavailable, Trouble
from sfu_delegate.livekit.tokens import Access
from sfu_delegate.matrix.openid import OpenIdRefused, OpenIdUnavailable
from structlog.testing import capture_logs

from tests import engine_port
from tests.engine_port import KEY, NOW, OTHER_KEY, SERVER, SFU_URL, Bench, serving
from tests.garbage import left_for_the_collector
from tests.webhook_requests import signature

Body = dict[str, Any]

ALICE, BOB, EVE = "@alice:example.org", "@bob:example.org", "@eve:elsewhere.org"
ALICES, BOBS, EVES = "verysecret-token-of-alice", "verysecret-token-of-bob", "verysecret-token-of-eve"
DELAY_ID = "verysecret-delay-id"
MATRIX_ROOM = "!roomid:example.com"
ROOM = "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"  # the proposal's vector: that room with the slot slot1234
LEGACY_ROOM = "F4oOprKFBq6JHqy2qYpq6UQQmR7hCvxkQQoUrd0+SbI"  # ["!roomid:example.com","m.call#ROOM"]
HASHED = "CizOKvJrpZhNlacC1Yi9219oQD5u8rvD0gWGSO4rUG4"  # ["@alice:example.org","DEVICE","memberABC"]
PLAIN = "@alice:example.org:DEVICE"
TWIN = "q2Q2LBM5QFhJEWwe6h/T3vYfWS27jySJV+VwNlBNy84"  # ["@alice:example.org","memberABC"]
EVENT = NewEvent(DELAY_ID, 3600.0, OnEnd.SEND)
DELAY: Body = {"delay_id": DELAY_ID, "delay_timeout": 3_600_000, "delay_cs_api_url": "https://matrix.example.org"}
PAGE = {"Origin": "https://call.example.org"}

GET_TOKEN, SFU_GET, DELEGATE = "/get_token", "/sfu/get", "/delegate_delayed_leave"
PATHS = (GET_TOKEN, SFU_GET, DELEGATE)
NAMES = {GET_TOKEN: "get_token", SFU_GET: "sfu_get", DELEGATE: "delegate_delayed_leave"}


@dataclass(frozen=True)
class Ask:
    """A kind of request."""

    path: str
    delay: bool

    def body(self, token: str = ALICES, user: str = ALICE, server: str = SERVER, device: str = "DEVICE", **more: Any) -> Body:
        """As a client of that user sends it."""
        openid = {"access_token": token, "token_type": "Bearer", "matrix_server_name": server, "expires_in": 3600}
        delay = DELAY if self.delay else {}
        if self.path == SFU_GET:
            return {"room": MATRIX_ROOM, "openid_token": openid, "device_id": device, **delay, **more}
        member = {"id": "memberABC", "claimed_user_id": user, "claimed_device_id": device}
        return {"room_id": MATRIX_ROOM, "slot_id": "slot1234", "openid_token": openid, "member": member, **delay, **more}

    def __str__(self) -> str:
        return self.path + (" with a delay" if self.delay and self.path != DELEGATE else "")


TOKEN_ONLY = [Ask(GET_TOKEN, False), Ask(SFU_GET, False)]
TOKEN_AND_DELAY = [Ask(GET_TOKEN, True), Ask(SFU_GET, True)]
DELEGATES = Ask(DELEGATE, True)
FOR_TOKENS = [*TOKEN_ONLY, *TOKEN_AND_DELAY]
WITH_DELAY = [*TOKEN_AND_DELAY, DELEGATES]
CLAIMING = [Ask(GET_TOKEN, False), Ask(GET_TOKEN, True), DELEGATES]  # requests that say who they are from
EVERY = [*FOR_TOKENS, DELEGATES]

asking = pytest.mark.parametrize("ask", EVERY, ids=str)


@pytest.fixture(autouse=True, params=["aiohttp", "listener"])
def read_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for both who read requests."""
    monkeypatch.setattr(engine_port, "BY_LISTENER", request.param == "listener")


def bench_of(**given: Any) -> Bench:
    """Alice and Bob are users of a homeserver that is served, Eve is not."""
    bench = Bench(**given)
    bench.vouchers.users.update({ALICES: ALICE, BOBS: BOB, EVES: EVE})
    bench.keys.replace([KEY, OTHER_KEY])
    return bench


async def error_of(response: aiohttp.ClientResponse) -> tuple[int, str]:
    """Status and errcode of an error, whose form is checked on the way: a page can read it, and nothing in it is secret."""
    text = await response.text()
    body = json.loads(text)
    retry = {"retry_after_ms"} if "Retry-After" in response.headers else set()
    assert set(body) == {"errcode", "error"} | retry
    assert body["error"].endswith(".")
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert response.headers["Content-Type"].partition(";")[0] == "application/json"
    assert "verysecret" not in text
    return response.status, body["errcode"]


# ── what is given ──


@pytest.mark.parametrize("ask", FOR_TOKENS, ids=str)
async def test_a_token_to_join_with(ask: Ask) -> None:
    """200 with the SFU's URL to the letter, and a token for the client's own room and identity, for an hour. The room is made first."""
    room, identity = (LEGACY_ROOM, PLAIN) if ask.path == SFU_GET else (ROOM, HASHED)
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body())
        text = await response.text()
        assert response.status == 200
        assert (response.headers["Content-Type"], response.headers["Cache-Control"]) == ("application/json", "no-store")
        body = json.loads(text)
        assert text == f'{{"url":"{SFU_URL}","jwt":"{body["jwt"]}"}}'
        assert tokens.access(body["jwt"], bench.keys, NOW) == Access("main", room, identity, NOW + 3600, ALICE)
        _, claims = tokens.verify(body["jwt"], bench.keys, NOW)
        grants = {"roomJoin": True, "roomCreate": False, "canPublish": True, "canSubscribe": True, "canUpdateOwnMetadata": True}
        assert claims["video"] == grants | {"room": room, "canPublishData": True}
        assert bench.rooms.created == [("main", room)]
        assert bench.port.course == ["openid", "room", *(["Accept"] if ask.delay else [])]
        assert bench.told.matrixrtc == [(NAMES[ask.path], 200, ask.delay)]


async def test_a_delegation_alone() -> None:
    """200 `{}`, no token, and no room is made."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(DELEGATE, json=DELEGATES.body())
        assert (response.status, await response.text()) == (200, "{}")
        assert bench.port.course == ["openid", "Accept"]
        assert bench.told.matrixrtc == [("delegate_delayed_leave", 200, True)]


@pytest.mark.parametrize(
    ("ask", "accept"),
    [
        (Ask(GET_TOKEN, True), Accept("", "main", ROOM, HASHED, SERVER, (EVENT,), alias=PLAIN, user=ALICE, twin=TWIN)),
        (Ask(SFU_GET, True), Accept("", "main", LEGACY_ROOM, PLAIN, SERVER, (EVENT,), alias=None, user=ALICE)),
        (DELEGATES, Accept("", "main", ROOM, HASHED, SERVER, (EVENT,), alias=PLAIN, user=ALICE, twin=TWIN)),
    ],
    ids=str,
)
async def test_what_is_delegated(ask: Ask, accept: Accept) -> None:
    """The event, to be sent at the end; its participant, in both forms where both are known; and the user whom the homeserver vouched for."""
    bench = bench_of()
    async with serving(bench) as client:
        assert (await client.post(ask.path, json=ask.body())).status == 200
        assert [replace(given, delegation="") for given in bench.accepted()] == [accept]
        assert [(row.delay_id, row.delay, row.state) for row in bench.port.rows()] == [(DELAY_ID, 3600.0, State.LIVE)]


@asking
async def test_the_homeserver_is_asked_once(ask: Ask) -> None:
    """About just that token, and no longer than a question to a homeserver may take."""
    bench = bench_of(settings=Settings(request_timeout=7.0))
    async with serving(bench) as client:
        assert (await client.post(ask.path, json=ask.body())).status == 200
        assert bench.vouchers.asked == [(SERVER, ALICES)]
        assert bench.vouchers.timeouts == [7.0]


@asking
async def test_server_names_in_mixed_case(ask: Ask) -> None:
    """The server is found in lower case; the user stays as the homeserver wrote it, since the identity is derived from that."""
    user = "@alice:Example.ORG"
    bench = bench_of()
    bench.vouchers.users[ALICES] = user
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(user=user, server="EXAMPLE.org"))
        assert response.status == 200
        assert bench.vouchers.asked == [(SERVER, ALICES)]
        assert [(accept.homeserver, accept.user) for accept in bench.accepted()] == ([(SERVER, user)] if ask.delay else [])
        if ask.path == SFU_GET:
            assert tokens.access((await response.json())["jwt"], bench.keys, NOW).identity == f"{user}:DEVICE"


@pytest.mark.parametrize("ask", CLAIMING, ids=str)
async def test_a_user_id_counts_to_the_letter(ask: Ask) -> None:
    """Another spelling of the server would be another identity: it is not the token's owner."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(user="@alice:EXAMPLE.org"))
        assert await error_of(response) == (401, "M_UNAUTHORIZED")


@pytest.mark.parametrize("url", ["https://evil.org", 7, None, [], {"a": 1}])
@asking
async def test_a_caller_does_not_choose_where_requests_go(ask: Ask, url: Any) -> None:
    """`delay_cs_api_url` is accepted, whatever it is, and changes nothing."""
    bench = bench_of()
    async with serving(bench) as client:
        assert (await client.post(ask.path, json=ask.body() | {"delay_cs_api_url": url})).status == 200
        assert [accept.homeserver for accept in bench.accepted()] == ([SERVER] if ask.delay else [])
        assert all(accept.events == (EVENT,) for accept in bench.accepted())


async def test_homeservers_by_a_pattern_are_served() -> None:
    """Their users have rooms made for them, and may delegate."""
    bench = bench_of()
    bench.vouchers.users["verysecret-of-dan"] = "@dan:a.example.net"
    ask = Ask(GET_TOKEN, True)
    async with serving(bench) as client:
        response = await client.post(GET_TOKEN, json=ask.body("verysecret-of-dan", "@dan:a.example.net", "a.example.net"))
        assert response.status == 200
        assert bench.port.course == ["openid", "room", "Accept"]


async def test_the_same_event_by_each_endpoint_is_delegated_once() -> None:
    """A client that delegates by `/delegate_delayed_leave` what it has delegated by `/get_token` changes nothing."""
    bench = bench_of()
    async with serving(bench) as client:
        for ask in (Ask(GET_TOKEN, True), DELEGATES, Ask(GET_TOKEN, True)):
            assert (await client.post(ask.path, json=ask.body())).status == 200
        assert len(bench.port.rows()) == 1


@pytest.mark.parametrize("joined", [PLAIN, HASHED])
@pytest.mark.parametrize("first", [SFU_GET, DELEGATE])
async def test_an_event_that_was_delegated_by_both_forms_waits_for_either(first: str, joined: str) -> None:
    """Whichever came first, and under whichever identity the client then joins: it is seen as connected, and its event goes on."""
    bodies = {SFU_GET: Ask(SFU_GET, True).body(), DELEGATE: DELEGATES.body(slot_id="m.call#ROOM")}
    bench = bench_of()
    async with serving(bench) as client:
        for path in (first, SFU_GET if first == DELEGATE else DELEGATE):
            assert (await client.post(path, json=bodies[path])).status == 200
        await bench.port.put(Seen("main", LEGACY_ROOM, joined, Sighting.JOINED, "PA_1"))
        assert [(row.delay_id, row.state, row.presence) for row in bench.port.rows()] == [(DELAY_ID, State.LIVE, Presence.CONNECTED)]


# ── users of homeservers that are not served ──


@pytest.mark.parametrize("ask", TOKEN_ONLY, ids=str)
async def test_others_get_tokens_for_rooms_that_exist(ask: Ask) -> None:
    """200, but no room is made."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(EVES, EVE, "elsewhere.org"))
        assert response.status == 200
        access = tokens.access((await response.json())["jwt"], bench.keys, NOW)
        assert access.room == (LEGACY_ROOM if ask.path == SFU_GET else ROOM)
        assert bench.port.course == ["openid"]


@pytest.mark.parametrize(("ask", "error"), [*[(ask, (400, "M_BAD_JSON")) for ask in TOKEN_AND_DELAY], (DELEGATES, (403, "M_FORBIDDEN"))], ids=str)
async def test_others_cannot_delegate(ask: Ask, error: tuple[int, str]) -> None:
    """403, but 400 on the way to a token: the client asks again without the delay fields, and gets one."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(EVES, EVE, "elsewhere.org"))
        assert await error_of(response) == error
        assert bench.port.course == ["openid"]
        assert bench.told.matrixrtc == [(NAMES[ask.path], error[0], True)]
        if ask.path != DELEGATE:
            assert (await client.post(ask.path, json=Ask(ask.path, False).body(EVES, EVE, "elsewhere.org"))).status == 200


@asking
async def test_others_may_be_kept_out(ask: Ask) -> None:
    """Where the operator wants only its own users: 403, and nobody is asked anything. Own users are not concerned."""
    bench = bench_of(settings=Settings(other_homeservers=False))
    async with serving(bench) as client:
        assert await error_of(await client.post(ask.path, json=ask.body(EVES, EVE, "elsewhere.org"))) == (403, "M_FORBIDDEN")
        assert bench.port.course == []
        assert (await client.post(ask.path, json=ask.body())).status == 200


# ── bodies ──


async def _said(bench: Bench, ask: Ask, data: bytes) -> tuple[int, str]:
    """The error to this body, before which nobody was asked anything."""
    async with serving(bench) as client:
        error = await error_of(await client.post(ask.path, data=data))
        assert bench.port.course == []
        assert bench.told.matrixrtc == [(NAMES[ask.path], error[0], ask.path == DELEGATE and data != b"")]
        return error


@asking
@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: b"",
        lambda body: body[:-1],
        lambda body: body + b"x",
        lambda body: body + b"{}",
        lambda body: b'{"openid_token": 1, ' + body[1:],
        lambda body: body.replace(b'"access_token"', b'"access_token": "x", "access_token"'),
        lambda body: body.replace(b"DEVICE", b"\xff"),
        lambda body: body.replace(b"3600", b"NaN"),
    ],
    ids=["empty", "cut off", "garbage", "two bodies", "a field twice", "a field twice inside", "no UTF-8", "NaN"],
)
async def test_what_is_no_json(ask: Ask, spoil: Callable[[bytes], bytes]) -> None:
    """400 M_NOT_JSON."""
    assert await _said(bench_of(), ask, spoil(json.dumps(ask.body()).encode())) == (400, "M_NOT_JSON")


def _bad_bodies(ask: Ask) -> list[Body]:
    """One for each thing that can be wrong with a field."""
    body = ask.body()
    outer = [name for name in body if name not in {"delay_cs_api_url"}]
    inner = [("openid_token", "access_token"), ("openid_token", "matrix_server_name")]
    if "member" in body:
        inner += [("member", "id"), ("member", "claimed_user_id"), ("member", "claimed_device_id")]
    wrong: list[Body] = [{name: value for name, value in body.items() if name != missing} for missing in outer]
    empty: list[Any] = [None, "", [], False]
    wrong += [body | {name: value} for name in outer for value in empty]
    for name, field in inner:
        rest = {key: value for key, value in body[name].items() if key != field}
        wrong += [body | {name: rest}, *[body | {name: rest | {field: value}} for value in (None, "", 7)]]
        wrong.append(body | {name: body[name] | {"more": 1}})
    wrong += [body | {"more": 1}, body | {"openid_token": body["openid_token"] | {"matrix_server_name": "https://example.org"}}]
    wrong += [ask.body(device="8448:D"), ask.body(device="")]
    half: list[Body] = [{"delay_id": DELAY_ID}, {"delay_timeout": 3_600_000}]
    without_delay = {name: value for name, value in body.items() if name not in DELAY}
    wrong += [without_delay | one for one in half]
    wrong += [body | DELAY | {"delay_timeout": value} for value in (29_999, 604_800_001, 0, -1, 3_600_000.5, "3600000", True)]
    wrong += [body | DELAY | {"delay_id": value} for value in ("", "a\nb", "x" * 256, 7)]
    return wrong


@asking
async def test_a_field_is_wrong(ask: Ask) -> None:
    """400 M_BAD_JSON: missing, empty, null, unknown at any level, only one delay field, a delay beyond the limits, a colon in the device."""
    bench = bench_of()
    async with serving(bench) as client:
        bodies = _bad_bodies(ask)
        for body in bodies:
            assert await error_of(await client.post(ask.path, json=body)) == (400, "M_BAD_JSON"), body
        assert bench.port.course == []
        assert len(bench.told.matrixrtc) == len(bodies)


@asking
async def test_a_colon_in_the_device_is_explained(ask: Ask) -> None:
    """@a:example.org with the device 8448:D would be @a:example.org:8448 with the device D."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(device="8448:D"))
        assert "must not have a colon" in (await response.json())["error"]


@asking
async def test_too_large_a_body(ask: Ask) -> None:
    """413, with the headers that a page needs."""
    bench = bench_of(settings=Settings(max_body=1000))
    async with serving(bench) as client:
        assert await error_of(await client.post(ask.path, data=b" " * 1001)) == (413, "M_TOO_LARGE")
        assert bench.port.course == []


# ── who asks ──


@asking
async def test_an_unknown_token(ask: Ask) -> None:
    """401, and nothing is made or stored."""
    bench = bench_of()
    async with serving(bench) as client:
        assert await error_of(await client.post(ask.path, json=ask.body("verysecret-unknown"))) == (401, "M_UNAUTHORIZED")
        assert bench.port.course == ["openid"]
        assert bench.told.matrixrtc == [(NAMES[ask.path], 401, ask.delay)]


@pytest.mark.parametrize("user", ["@alice:elsewhere.org", "@alice:example.org:8448", "@alice:xample.org", "alice", "@alice", "@alice:"])
@pytest.mark.parametrize("ask", CLAIMING, ids=str)
async def test_a_server_vouches_for_its_own_users_only(ask: Ask, user: str) -> None:
    """A claimed user of another server: 401 without asking anybody."""
    bench = bench_of()
    bench.vouchers.users[ALICES] = user
    async with serving(bench) as client:
        assert await error_of(await client.post(ask.path, json=ask.body(user=user))) == (401, "M_UNAUTHORIZED")
        assert bench.port.course == []


@pytest.mark.parametrize("ask", CLAIMING, ids=str)
async def test_all_that_is_wrong_with_a_token_is_told_alike(ask: Ask) -> None:
    """Unknown, of somebody else, of a user of another server, or for a user who is none: the same answer byte for byte."""
    bench = bench_of()
    bench.vouchers.users["verysecret-lie"] = OpenIdRefused("example.org vouches for a user of another server")
    answers = set()
    async with serving(bench) as client:
        for body in (
            ask.body("verysecret-unknown"),
            ask.body(BOBS),
            ask.body(ALICES, "@nobody:example.org"),
            ask.body(ALICES, "@alice:elsewhere.org"),
            ask.body("verysecret-lie"),
        ):
            response = await client.post(ask.path, json=body)
            headers = tuple((name, value) for name, value in response.headers.items() if name != "Date")
            answers.add((response.status, response.reason, headers, await response.read()))
        assert len(answers) == 1
        assert bench.accepted() == []
        assert bench.rooms.created == []


@pytest.mark.parametrize(("token", "user", "server", "label"), [(ALICES, ALICE, SERVER, SERVER), (EVES, EVE, "elsewhere.org", "(not configured)")])
@asking
async def test_a_homeserver_that_cannot_be_asked(ask: Ask, token: str, user: str, server: str, label: str) -> None:
    """503 with a time; why is for the operator, and a name that anybody can choose is no label."""
    bench = bench_of()
    bench.vouchers.users[token] = OpenIdUnavailable("connection refused at 10.0.0.1")
    with capture_logs() as logs:
        async with serving(bench) as client:
            response = await client.post(ask.path, json=ask.body(token, user, server))
            assert await error_of(response) == (503, "M_UNKNOWN")
            assert (response.headers["Retry-After"], (await response.json())["retry_after_ms"]) == ("10", 10_000)
            assert "10.0.0.1" not in await response.text()
            assert bench.port.course == ["openid"]
    told = [line for line in logs if line["event"] == "openid_unavailable"]
    assert [(line["homeserver"], line["error"], line["log_level"]) for line in told] == [(label, "connection refused at 10.0.0.1", "warning")]


# ── what can go wrong then ──


@pytest.mark.parametrize("ask", WITH_DELAY, ids=str)
async def test_a_homeserver_without_a_client_server_api(ask: Ask) -> None:
    """400 M_BAD_JSON after the OpenID check, before a room is made; a token without a delegation is to be had."""
    bench = bench_of()
    bench.vouchers.users["verysecret-of-una"] = "@una:unreachable.org"
    una = ("verysecret-of-una", "@una:unreachable.org", "unreachable.org")
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(*una))
        assert await error_of(response) == (400, "M_BAD_JSON")
        assert "10.0.0.1" not in await response.text()
        assert bench.port.course == ["openid"]
        if ask.path != DELEGATE:
            assert (await client.post(ask.path, json=Ask(ask.path, False).body(*una))).status == 200
            assert bench.port.course == ["openid", "openid", "room"]


@pytest.mark.parametrize("ask", WITH_DELAY, ids=str)
async def test_a_client_server_api_that_is_being_looked_for(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """No longer than a question to a homeserver may take: then it is as if there was none."""

    async def hangs(_: str) -> None:
        await asyncio.Event().wait()

    bench = bench_of(settings=Settings(request_timeout=0.01))
    monkeypatch.setattr(bench.homeservers, "configured", lambda _: None)
    monkeypatch.setattr(bench.homeservers, "resolve", hangs)
    async with serving(bench) as client:
        assert await error_of(await client.post(ask.path, json=ask.body())) == (400, "M_BAD_JSON")
        assert bench.port.course == ["openid"]


def _stopping(bench: Bench) -> None:
    bench.stopping = True


def _refusing(error: Exception) -> Callable[[Bench], None]:
    def spoil(bench: Bench) -> None:
        bench.port.error = error

    return spoil


TROUBLES = [
    pytest.param(_stopping, (503, "M_UNKNOWN"), "10", id="stopping"),
    pytest.param(_refusing(TooMany("delegations.max_per_homeserver", 5, "That is too many.")), (429, "M_LIMIT_EXCEEDED"), "30", id="too many"),
    pytest.param(_refusing(Overloaded("Too much to do.", 1.5)), (503, "M_UNKNOWN"), "2", id="overloaded"),
    pytest.param(_refusing(Unavailable("The database /var/lib/x failed.", 2.5)), (503, "M_UNKNOWN"), "3", id="unavailable"),
]


@pytest.mark.parametrize(("spoil", "error", "retry_after"), TROUBLES)
async def test_a_delegation_that_is_not_taken_now(spoil: Callable[[Bench], None], error: tuple[int, str], retry_after: str) -> None:
    """On `/delegate_delayed_leave`: the status that says why, and when to try again. Nothing of the operator's is told."""
    bench = bench_of()
    spoil(bench)
    async with serving(bench) as client:
        response = await client.post(DELEGATE, json=DELEGATES.body())
        assert await error_of(response) == error
        assert response.headers["Retry-After"] == retry_after
        assert "/var" not in await response.text()
        assert bench.accepted() == []
        assert bench.told.matrixrtc == [("delegate_delayed_leave", error[0], True)]


@pytest.mark.parametrize(("spoil", "error", "retry_after"), TROUBLES)
@pytest.mark.parametrize("ask", TOKEN_AND_DELAY, ids=str)
async def test_a_delegation_that_is_not_taken_keeps_nobody_out(
    ask: Ask, spoil: Callable[[Bench], None], error: tuple[int, str], retry_after: str
) -> None:
    """On the way to a token: 400 M_BAD_JSON and no token; the client asks again without the delay fields, and gets one."""
    assert error[0] > 400
    assert retry_after
    bench = bench_of()
    spoil(bench)
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body())
        assert await error_of(response) == (400, "M_BAD_JSON")
        sentence = (await response.json())["error"]
        assert "without delay_id and delay_timeout" in sentence
        assert "/var" not in sentence
        assert "Retry-After" not in response.headers
        assert bench.accepted() == []
        assert bench.told.matrixrtc == [(NAMES[ask.path], 400, True)]
        again = await client.post(ask.path, json=Ask(ask.path, False).body())
        assert (again.status, set(await again.json())) == (200, {"url", "jwt"})


@pytest.mark.parametrize("ask", WITH_DELAY, ids=str)
async def test_a_service_that_stops_makes_no_rooms_for_delegations(ask: Ask) -> None:
    """What it will not take anyhow does nothing."""
    bench = bench_of()
    bench.stopping = True
    async with serving(bench) as client:
        await client.post(ask.path, json=ask.body())
        assert bench.port.course == ["openid"]


@pytest.mark.parametrize("where", ["error", "gone"])
@pytest.mark.parametrize("ask", FOR_TOKENS, ids=str)
async def test_a_room_that_cannot_be_made(ask: Ask, where: str) -> None:
    """500 M_UNKNOWN, no token, and nothing is delegated; why is for the operator."""
    bench = bench_of()
    setattr(bench.rooms, where, SfuUnavailable("The SFU at 10.0.0.7 did not answer.", Trouble.TIMEOUT))
    with capture_logs() as logs:
        async with serving(bench) as client:
            response = await client.post(ask.path, json=ask.body())
            assert await error_of(response) == (500, "M_UNKNOWN")
            assert "10.0.0.7" not in await response.text()
            assert bench.port.given == []
            assert bench.told.matrixrtc == [(NAMES[ask.path], 500, ask.delay)]
    told = [line for line in logs if line["event"] == "room_not_created"]
    assert [(line["sfu"], line["problem"]) for line in told] == [("main", "The SFU at 10.0.0.7 did not answer.")]


async def test_a_delegation_alone_needs_no_sfu() -> None:
    """Its participant may be connected already; whether the SFU can be asked is seen later."""
    bench = bench_of()
    bench.rooms.error = SfuUnavailable("It is down.", Trouble.CONNECTION)
    async with serving(bench) as client:
        assert (await client.post(DELEGATE, json=DELEGATES.body())).status == 200


async def test_nothing_is_delegated_for_an_sfu_that_is_not_there_any_more() -> None:
    """A reload took it out of the configuration: nobody could ever say who is connected."""
    bench = bench_of()
    bench.rooms.gone = SfuUnavailable("It is not configured any more.", Trouble.CONNECTION)
    async with serving(bench) as client:
        assert await error_of(await client.post(DELEGATE, json=DELEGATES.body())) == (500, "M_UNKNOWN")
    assert bench.port.given == []


@pytest.mark.parametrize("ask", WITH_DELAY, ids=str)
async def test_what_nobody_expected(ask: Ask) -> None:
    """500 on each endpoint, logged by its type alone, counted."""
    bench = bench_of()
    bench.port.error = RuntimeError("verysecret")
    with capture_logs() as logs:
        async with serving(bench) as client:
            assert await error_of(await client.post(ask.path, json=ask.body())) == (500, "M_UNKNOWN")
    assert [(line["event"], line["error"]) for line in logs] == [("request_failed", "RuntimeError")]
    assert "verysecret" not in repr(logs)
    assert bench.told.matrixrtc == [(NAMES[ask.path], 500, True)]


async def test_no_secret_is_logged() -> None:
    """Whatever becomes of a request: no OpenID token, no delay_id and no LiveKit token is in any line."""
    bench = bench_of()
    bench.vouchers.users |= {"verysecret-down": OpenIdUnavailable("no answer in time"), "verysecret-broken": RuntimeError("verysecret-broken")}
    jwts = []
    with capture_logs() as logs:
        async with serving(bench) as client:
            for ask in EVERY:
                for token in (ALICES, BOBS, "verysecret-unknown", "verysecret-down", "verysecret-broken"):
                    answer = await (await client.post(ask.path, json=ask.body(token))).json()
                    jwts.append(answer.get("jwt"))
                await client.post(ask.path, json=ask.body() | {"verysecret": 1})
                await client.post(ask.path, data=json.dumps(ask.body()) + "verysecret")
                for error in (Overloaded("Too much to do.", 1.0), RuntimeError("verysecret")):
                    bench.port.error = error
                    await client.post(ask.path, json=ask.body())
                bench.port.error = None
    given = [jwt for jwt in jwts if jwt]
    assert len(given) == 6  # Alice's four, and Bob's two where nobody is claimed
    told = repr(logs)
    assert len(logs) > 5
    assert "verysecret" not in told
    assert not [jwt for jwt in given if jwt in told or jwt.rpartition(".")[2] in told]


def always(error: Callable[[], Exception]) -> Callable[..., Any]:
    """What raises a new error at each call, and keeps none."""

    async def fail(*_: object) -> Any:
        raise error()

    return fail


REFUSALS: dict[str, tuple[bytes | None, Callable[[Bench], object]]] = {
    "no JSON": (b'{"needle', lambda _: None),
    "wrong fields": (b'{"room": "needle", "room_id": "needle", "unknown": 1}', lambda _: None),
    "unauthorized": (None, lambda bench: setattr(bench.vouchers, "user", always(lambda: OpenIdRefused("unknown")))),
    "not to be asked": (None, lambda bench: setattr(bench.vouchers, "user", always(lambda: OpenIdUnavailable("no route")))),
    "full": (None, lambda bench: setattr(bench.port, "put", always(lambda: Overloaded("Too many.", 1.0)))),
    "limited": (None, lambda bench: setattr(bench.port, "put", always(lambda: TooMany("delegations.max_per_user", 1, "Too many.")))),
    "stopping": (None, lambda bench: setattr(bench, "stopping", True)),
}


@pytest.mark.parametrize("why", REFUSALS)
@pytest.mark.parametrize("ask", WITH_DELAY, ids=str)
async def test_a_refused_request_is_forgotten_at_once(ask: Ask, why: str) -> None:
    """Neither its error nor its body waits for a garbage collection: bodies can be large, and many."""
    bench = bench_of()
    body, spoil = REFUSALS[why]
    sent = json.dumps(ask.body(device="needle")).encode() if body is None else body
    async with serving(bench) as client:
        spoil(bench)
        await client.post(ask.path)
        with left_for_the_collector("needle") as left:
            response = await client.post(ask.path, data=sent)
            assert response.status >= 400
            await response.read()
            await asyncio.sleep(0)
        assert left == []


async def test_a_refusal_is_logged_seldom() -> None:
    """A client that goes on trying does not fill the log; each kind of refusal has a line."""
    bench = bench_of()
    with capture_logs() as logs:
        async with serving(bench) as client:
            for _ in range(20):
                await client.post(GET_TOKEN, data="{")
            await client.post(SFU_GET, data="{")
    refusals = [(line["event"], line["endpoint"], line["status"], line["errcode"]) for line in logs]
    assert refusals == [("matrixrtc_refused", "get_token", 400, "M_NOT_JSON"), ("matrixrtc_refused", "sfu_get", 400, "M_NOT_JSON")]


@pytest.mark.parametrize("path", [GET_TOKEN, SFU_GET, DELEGATE])
async def test_the_probe_of_clients_is_no_refusal(path: str) -> None:
    """Element Call finds out by an empty POST whether the endpoint is there: that is neither logged nor counted as a delegation."""
    bench = bench_of()
    with capture_logs() as logs:
        async with serving(bench) as client:
            assert await error_of(await client.post(path)) == (400, "M_NOT_JSON")
    assert logs == []
    assert bench.told.matrixrtc == [(NAMES[path], 400, False)]


# ── pages and methods ──


@pytest.mark.parametrize("path", [*PATHS, "/livekit/jwt/get_token", "/livekit/jwt/sfu/get", "/livekit/jwt/delegate_delayed_leave"])
async def test_a_preflight_request(path: str) -> None:
    """200 with what clients depend on, whether a page sends it or somebody else."""
    bench = bench_of(paths={"": "main", "/livekit/jwt": "other"})
    async with serving(bench) as client:
        for headers in ({}, PAGE, PAGE | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}):
            response = await client.options(path, headers=headers)
            assert (response.status, await response.read()) == (200, b"")
            assert response.headers["Access-Control-Allow-Origin"] == "*"
            assert response.headers["Access-Control-Allow-Methods"] == "POST"
            assert response.headers["Access-Control-Allow-Headers"] == "Accept, Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token"
            assert "Access-Control-Allow-Credentials" not in response.headers
        assert bench.told.matrixrtc == []


@asking
async def test_every_answer_can_be_read_by_a_page(ask: Ask) -> None:
    """200, 400, 401, 405, 413, 429, 500: without the header each of them would look like a network error."""
    bench = bench_of(settings=Settings(max_body=2000))
    async with serving(bench) as client:
        answers = [
            await client.post(ask.path, json=ask.body(), headers=PAGE),
            await client.post(ask.path, headers=PAGE),
            await client.post(ask.path, json=ask.body("verysecret-unknown"), headers=PAGE),
            await client.get(ask.path, headers=PAGE),
            await client.post(ask.path, data=b" " * 2001, headers=PAGE),
        ]
        bench.configure(user_rate=0.0001, user_burst=1)
        answers += [await client.post(ask.path, json=ask.body(BOBS, BOB), headers=PAGE) for _ in range(2)][1:]
        bench.vouchers.users[ALICES] = RuntimeError("verysecret")
        answers.append(await client.post(ask.path, json=ask.body(), headers=PAGE))
        assert [answer.status for answer in answers] == [200, 400, 401, 405, 413, 429, 500]
        for answer in answers:
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
            assert answer.headers["Access-Control-Expose-Headers"] == "Retry-After"
            assert "Vary" not in answer.headers


async def test_only_the_configured_pages() -> None:
    """With a list of origins, just those."""
    bench = bench_of(settings=Settings(cors_origins=(PAGE["Origin"],)))
    async with serving(bench) as client:
        for method in ("OPTIONS", "POST"):
            allowed = await client.request(method, GET_TOKEN, headers=PAGE)
            assert (allowed.headers["Access-Control-Allow-Origin"], allowed.headers["Vary"]) == (PAGE["Origin"], "Origin")
            refused = await client.request(method, GET_TOKEN, headers={"Origin": "https://evil.org"})
            assert not [name for name in refused.headers if name.startswith("Access-Control-")]
            assert refused.headers["Vary"] == "Origin"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", PATHS)
async def test_other_methods(path: str, method: str) -> None:
    """405 with the one that is known, and nobody is asked."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.request(method, path, json=DELEGATES.body())
        assert await error_of(response) == (405, "M_UNRECOGNIZED")
        assert response.headers["Allow"] == "POST"
        assert bench.port.course == []


@pytest.mark.parametrize("path", PATHS)
async def test_head_is_another_method(path: str) -> None:
    """405, without a body."""
    async with serving(bench_of()) as client:
        response = await client.head(path)
        assert (response.status, response.headers["Allow"], await response.read()) == (405, "POST", b"")
        assert response.headers["Access-Control-Allow-Origin"] == "*"


async def test_element_calls_probe() -> None:
    """An empty POST is answered at once, with a status that is not 404, and readable for a page: so the service is supported."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(DELEGATE, headers=PAGE)
        assert await error_of(response) == (400, "M_NOT_JSON")
        assert bench.port.course == []


@pytest.mark.parametrize("path", ["/healthz", "/livekit/jwt/healthz"])
async def test_health(path: str) -> None:
    """GET and HEAD: 200, and 503 while it stops, so that a proxy goes elsewhere. No other method."""
    bench = bench_of(paths={"": "main", "/livekit/jwt": "other"})
    async with serving(bench) as client:
        for stopping, status in ((False, 200), (True, 503)):
            bench.stopping = stopping
            assert (await client.get(path)).status == status
            head = await client.head(path)
            assert (head.status, await head.read()) == (status, b"")
        response = await client.post(path)
        assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


# ── prefixes ──


@pytest.mark.parametrize(("prefix", "url", "sfu"), [("", SFU_URL, "main"), ("/livekit/jwt", "ws://10.0.0.7:7880", "other"), ("/a", SFU_URL, "main")])
@asking
async def test_under_a_prefix_is_the_sfu_of_that_prefix(ask: Ask, prefix: str, url: str, sfu: str) -> None:
    """URL, key, room and delegation are that SFU's."""
    bench = bench_of(paths={"": "main", "/livekit/jwt": "other", "/a": "main"})
    async with serving(bench) as client:
        response = await client.post(prefix + ask.path, json=ask.body())
        body = await response.json()
        assert response.status == 200
        assert [accept.sfu for accept in bench.accepted()] == ([sfu] if ask.delay else [])
        if ask.path != DELEGATE:
            assert body["url"] == url
            assert tokens.access(body["jwt"], bench.keys, NOW).sfu == sfu
            assert [room[0] for room in bench.rooms.created] == [sfu]


@pytest.mark.parametrize("path", ["/livekit/get_token", "/livekit/jwt", "/livekit/jwt/", "/livekit/jwtt/get_token", "/x/sfu_webhook", "/get_token/"])
async def test_an_unknown_prefix(path: str) -> None:
    """404, and nobody is asked."""
    bench = bench_of(paths={"": "main", "/livekit/jwt": "other"})
    async with serving(bench) as client:
        response = await client.post(path, json=DELEGATES.body())
        assert (response.status, (await response.json())["errcode"]) == (404, "M_UNRECOGNIZED")
        assert bench.port.course == []


@pytest.mark.parametrize("path", ["/sfu_webhook", "/livekit/jwt/sfu_webhook"])
async def test_webhooks_arrive_where_deployed_sfus_send_them(path: str) -> None:
    """Also under a prefix; whose webhook it is, its signature tells."""
    bench = bench_of(paths={"": "main", "/livekit/jwt": "other"})
    body = json.dumps({"event": "participant_joined", "room": {"name": "room"}, "participant": {"identity": "alice", "sid": "PA_1"}}).encode()
    async with serving(bench) as client:
        response = await client.post(path, data=body, headers={"Authorization": signature(KEY, body, NOW)})
        assert (response.status, await response.json()) == (200, {})
        assert [given.sfu for given in bench.port.given if isinstance(given, Seen)] == ["main"]
        assert (await client.post(path, data=body)).status == 401


@pytest.mark.parametrize("path", PATHS)
async def test_they_can_be_switched_off(path: str) -> None:
    """404 for tokens and delegations; webhooks and health stay."""
    bench = bench_of(paths={})
    async with serving(bench) as client:
        assert (await client.post(path, json=DELEGATES.body())).status == 404
        assert (await client.options(path, headers=PAGE)).status == 404
        assert (await client.get("/healthz")).status == 200
        assert (await client.post("/sfu_webhook")).status == 401


# ── limits ──

SLOW = Settings(client_rate=0.0001, client_burst=2, user_rate=0.0)
BEHIND_A_PROXY = replace(SLOW, trusted_proxies=(ip_network("127.0.0.0/8"),))


async def limited(response: aiohttp.ClientResponse) -> bool:
    """Was it too much? The time to wait is then the whole of ten thousand seconds but for what has passed, told twice alike."""
    if response.status != 429:
        return False
    assert await error_of(response) == (429, "M_LIMIT_EXCEEDED")
    milliseconds = (await response.json())["retry_after_ms"]
    assert 9_000_000 < milliseconds <= 10_000_000
    assert int(response.headers["Retry-After"]) == -(-milliseconds // 1000)
    return True


@asking
async def test_a_client_that_asks_too_often(ask: Ask) -> None:
    """429 with a time, before its body is looked at and before anybody is asked; wrong requests count, too."""
    bench = bench_of(settings=SLOW)
    async with serving(bench) as client:
        assert not await limited(await client.post(ask.path, json=ask.body()))
        assert not await limited(await client.post(ask.path))
        asked = list(bench.port.course)
        assert await limited(await client.post(ask.path, json=ask.body()))
        assert await limited(await client.post(ask.path))
        assert bench.port.course == asked
        assert bench.told.matrixrtc[-1] == (NAMES[ask.path], 429, ask.path == DELEGATE)


async def test_a_client_has_one_limit_for_all_endpoints() -> None:
    """Another endpoint, or another prefix, is no way around it. Webhooks, preflight requests and health do not count."""
    bench = bench_of(settings=SLOW, paths={"": "main", "/livekit/jwt": "other"})
    async with serving(bench) as client:
        for _ in range(5):
            await client.options(GET_TOKEN)
            await client.get("/healthz")
            await client.post("/sfu_webhook")
        assert not await limited(await client.post(GET_TOKEN))
        assert not await limited(await client.post("/livekit/jwt/sfu/get"))
        for path in (*PATHS, "/livekit/jwt/get_token", "/v1/delegations"):
            assert (await client.post(path)).status == 429
        assert (await client.post("/sfu_webhook")).status == 401
        assert (await client.options(GET_TOKEN)).status == 200


async def test_clients_behind_a_trusted_proxy_are_told_apart() -> None:
    """Each has its own limit, by what the proxy says; what a client adds in front of that counts for nothing."""
    bench = bench_of(settings=BEHIND_A_PROXY)
    async with serving(bench) as client:
        for address in ("203.0.113.5", "203.0.113.6", "2001:db8::1"):
            answers = [await client.post(GET_TOKEN, headers={"X-Forwarded-For": f"198.51.100.{n}, {address}"}) for n in range(3)]
            assert [await limited(answer) for answer in answers] == [False, False, True]


async def test_what_a_client_says_of_itself_counts_for_nothing() -> None:
    """X-Forwarded-For from anybody but a trusted proxy is no way around the limit."""
    bench = bench_of(settings=SLOW)
    async with serving(bench) as client:
        answers = [await client.post(GET_TOKEN, headers={"X-Forwarded-For": f"203.0.113.{n}"}) for n in range(3)]
        assert [await limited(answer) for answer in answers] == [False, False, True]


async def test_an_ipv6_network_is_one_client() -> None:
    """Of its 64 bits a subscriber can use all addresses; the neighbours are others."""
    bench = bench_of(settings=BEHIND_A_PROXY)
    async with serving(bench) as client:
        addresses = ["2001:db8:1:2::1", "2001:db8:1:2:ffff::2", "2001:db8:1:2:aaaa:bbbb:cccc:dddd", "2001:db8:1:3::1"]
        answers = [await client.post(GET_TOKEN, headers={"X-Forwarded-For": address}) for address in addresses]
        assert [await limited(answer) for answer in answers] == [False, False, True, False]


@asking
async def test_a_user_that_asks_too_often(ask: Ask) -> None:
    """429, from any address and by any endpoint; nothing is made or stored for it, and others are not concerned."""
    bench = bench_of(settings=Settings(user_rate=0.0001, user_burst=1))
    async with serving(bench) as client:
        assert (await client.post(ask.path, json=ask.body())).status == 200
        before = list(bench.port.course)
        for other in EVERY:
            assert await limited(await client.post(other.path, json=other.body()))
        assert bench.port.course == [*before, *["openid"] * len(EVERY)]
        assert (await client.post(ask.path, json=ask.body(BOBS, BOB))).status == 200


@asking
async def test_nobody_can_use_up_the_requests_of_somebody_else(ask: Ask) -> None:
    """To claim to be Alice, with an unknown token or with one's own, does not count as Alice."""
    bench = bench_of(settings=Settings(user_rate=0.0001, user_burst=1))
    async with serving(bench) as client:
        for _ in range(5):
            assert (await client.post(ask.path, json=ask.body("verysecret-unknown"))).status == 401
            if ask.path != SFU_GET:  # where nobody is claimed
                assert (await client.post(ask.path, json=ask.body(BOBS))).status == 401
                assert (await client.post(ask.path, json=ask.body(EVES, ALICE, "elsewhere.org"))).status == 401
        assert (await client.post(ask.path, json=ask.body())).status == 200
        assert (await client.post(ask.path, json=ask.body(BOBS, BOB))).status == 200


async def test_limits_can_be_changed_while_it_runs() -> None:
    """After a reload the new ones count; 0 is none."""
    bench = bench_of(settings=SLOW)
    async with serving(bench) as client:
        answers = [await client.post(GET_TOKEN) for _ in range(3)]
        assert [await limited(answer) for answer in answers] == [False, False, True]
        bench.configure(client_rate=0.0)
        assert (await client.post(GET_TOKEN)).status == 400
