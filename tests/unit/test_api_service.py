"""What homeservers pass on, on the real engine, with homeservers that tell what they know, and SFUs that make rooms, by a script."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict
from sfu_delegate.api import service
from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.api.services import Settings
from sfu_delegate.delegation.model import Accept, NewEvent, OnEnd, Presence, Seen, Sighting, State
from sfu_delegate.delegation.replies import TooMany
from sfu_delegate.livekit import tokens
from sfu_delegate.livekit.room_service import SfuUnavailable, Trouble
from sfu_delegate.matrix.discovery import HomeserverRule
from sfu_delegate.matrix.service import CannotAsk, CannotBe, CannotTell, Federated, Shown
from structlog.testing import capture_logs

from tests import engine_port
from tests.engine_port import HS_TOKEN, NOW, SERVER, SFU_URL, Bench, serving, until
from tests.garbage import left_for_the_collector

Body = dict[str, Any]
Headers = dict[str, str] | CIMultiDict[str]

ALICE, BOB, ZOE, EVE = "@alice:example.org", "@bob:example.org", "@zoe:second.example", "@eve:elsewhere.org"
SECOND = "hs-token-of-second"
DELAY_ID = "verysecret-delay-id"
MATRIX_ROOM = "!roomid:example.com"
ROOM = "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"  # the proposal's vector: that room with the slot slot1234
MEMBER = "q2Q2LBM5QFhJEWwe6h/T3vYfWS27jySJV+VwNlBNy84"  # ["@alice:example.org","memberABC"]
PLAIN = "@alice:example.org:DEVICE"
HASHED = "CizOKvJrpZhNlacC1Yi9219oQD5u8rvD0gWGSO4rUG4"  # ["@alice:example.org","DEVICE","memberABC"]
EVES = "+haCgR+VIia9Q4SsSVULLnMolY6P7omlyIM6XUCVPLU"  # ["@eve:elsewhere.org","memberABC"]
LEAVE = Shown(MATRIX_ROOM, "m.rtc.member", None, 3600.0, NOW - 60.0, NOW)
USER, ORIGIN = "X-Matrix-User-Identifier", "X-Matrix-Origin"

STABLE = "/_matrix/client/v1/rtc/livekit"
UNSTABLE = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit"
FED_STABLE = "/_matrix/federation/v1/rtc/livekit"
FED_UNSTABLE = "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit"
TRANSACTION = "/_matrix/app/v1/transactions/17"


def authorized(**more: str) -> dict[str, str]:
    """What the homeserver example.org adds."""
    return {"Authorization": f"Bearer {HS_TOKEN}", **more}


@dataclass(frozen=True)
class Ask:
    """A kind of request."""

    name: str  # of the endpoint, in metrics
    path: str
    deployed: bool = False  # the member is in the form of deployed clients

    @property
    def federated(self) -> bool:
        return self.name == "federation_get_token"

    @property
    def delegates(self) -> bool:
        return self.name == "homeserver_delegate_delayed_leave"

    @property
    def asker(self) -> str:
        """Who asks, as a rule."""
        return EVE if self.federated else ALICE

    def body(self, user: str | None = None, **more: Any) -> Body:
        """As a client, or another homeserver, sends it."""
        member: Body = {"member": {"id": "memberABC", "claimed_device_id": "DEVICE"}} if self.deployed else {"member_id": "memberABC"}
        place = {"url": SFU_URL, "room_id": MATRIX_ROOM, "slot_id": "slot1234"}
        asker = {"user_id": user or EVE} if self.federated else {}
        return place | member | asker | ({"delay_id": DELAY_ID} if self.delegates else {}) | more

    def headers(self, user: str | None = None) -> dict[str, str]:
        """As example.org passes it on."""
        user = user or self.asker
        return authorized(**({ORIGIN: user.partition(":")[2]} if self.federated else {USER: user}))

    def __str__(self) -> str:
        return self.path + (" as deployed" if self.deployed else "")


def _all_of(name: str, *paths: str) -> list[Ask]:
    return [Ask(name, path, deployed) for path in paths for deployed in (False, True)]


GET_TOKEN = _all_of("homeserver_get_token", f"{STABLE}/get_token", f"{UNSTABLE}/get_token")
DELEGATE = _all_of("homeserver_delegate_delayed_leave", f"{STABLE}/delegate_delayed_leave", f"{UNSTABLE}/delegate_delayed_leave")
FEDERATED = _all_of("federation_get_token", f"{FED_STABLE}/get_token", f"{FED_UNSTABLE}/get_token")
EVERY = [*GET_TOKEN, *DELEGATE, *FEDERATED]
ONE_EACH = [GET_TOKEN[2], DELEGATE[3], FEDERATED[2]]
BY_CLIENTS = ONE_EACH[:2]
FOR_TOKENS = [ONE_EACH[0], ONE_EACH[2]]
TOKEN, DELEGATION, FED_TOKEN = ONE_EACH

asking = pytest.mark.parametrize("ask", EVERY, ids=str)
one_each = pytest.mark.parametrize("ask", ONE_EACH, ids=str)


@pytest.fixture(autouse=True, params=["aiohttp", "listener"])
def read_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for both who read requests."""
    monkeypatch.setattr(engine_port, "BY_LISTENER", request.param == "listener")


def bench_of(**given: Any) -> Bench:
    """Everybody has joined the room, and Alice has scheduled her leave."""
    bench = Bench(**given)
    bench.service.members |= {(user, MATRIX_ROOM) for user in (ALICE, BOB, ZOE, EVE)}
    bench.service.events[ALICE, DELAY_ID] = LEAVE
    return bench


def secrets() -> Iterator[str]:
    yield from ("verysecret", HS_TOKEN, SECOND, "as-token")


async def error_of(response: aiohttp.ClientResponse) -> tuple[int, str]:
    """Status and errcode of an error, whose form is checked on the way, and that nothing in it is secret."""
    text = await response.text()
    body = json.loads(text)
    retry = {"retry_after_ms"} if "Retry-After" in response.headers else set()
    # Clients, who may be passed it, would else take it for the end of their session, and forget all that they have.
    soft = {"soft_logout"} if body["errcode"] == "M_UNKNOWN_TOKEN" else set()
    assert set(body) == {"errcode", "error"} | retry | soft
    assert body.get("soft_logout", True) is True
    assert body["error"].endswith((".", "?"))
    assert response.headers["Content-Type"].partition(";")[0] == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert not [secret for secret in secrets() if secret in text]
    return response.status, body["errcode"]


def said(response: aiohttp.ClientResponse, body: bytes) -> tuple[object, ...]:
    """All of an answer by which it could be told from another."""
    return (response.status, response.reason, tuple((name, value) for name, value in response.headers.items() if name != "Date"), body)


# ── what is given ──


@pytest.mark.parametrize("ask", GET_TOKEN, ids=str)
async def test_a_token_to_join_with(ask: Ask) -> None:
    """200 with a token for the client's own room and identity, for an hour, and nothing else. Membership comes first, then the room."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(), headers=ask.headers())
        text = await response.text()
        assert response.status == 200, text
        assert (response.headers["Content-Type"], response.headers["Cache-Control"]) == ("application/json", "no-store")
        jwt = json.loads(text)["jwt"]
        assert text == f'{{"jwt":"{jwt}"}}'
        key, claims = tokens.verify(jwt, bench.keys, NOW)
        assert key.sfu == "main"
        assert (claims["sub"], claims["nbf"], claims["exp"], claims["matrix_user"]) == (MEMBER, NOW, NOW + 3600, ALICE)
        grants = {"roomJoin": True, "roomCreate": False, "canPublish": True, "canSubscribe": True, "canUpdateOwnMetadata": False}
        assert claims["video"] == grants | {"room": ROOM, "hidden": False, "canPublishData": True}
        assert bench.rooms.created == [("main", ROOM)]
        assert bench.tokens.given_to == [("main", ROOM, MEMBER, SERVER, ALICE, MATRIX_ROOM)]
        assert bench.service.asked == [("joined", SERVER, ALICE, MATRIX_ROOM)]
        assert bench.port.course == ["joined", "room"]
        assert bench.told.matrixrtc == [("homeserver_get_token", 200, False)]


@pytest.mark.parametrize("ask", FEDERATED, ids=str)
async def test_a_token_for_a_user_of_another_homeserver(ask: Ask) -> None:
    """The same, but who has another SFU only listens here. The homeserver that passes it on is asked who is in the room."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(), headers=ask.headers())
        assert response.status == 200, await response.text()
        body = await response.json()
        assert list(body) == ["jwt"]
        _, claims = tokens.verify(body["jwt"], bench.keys, NOW)
        assert (claims["sub"], claims["nbf"], claims["exp"], claims["matrix_user"]) == (EVES, NOW, NOW + 3600, EVE)
        video = claims["video"]
        assert (video["canPublish"], video["canSubscribe"], video["canUpdateOwnMetadata"], video["roomCreate"]) == (False, True, False, False)
        assert (video["roomJoin"], video["room"]) == (True, ROOM)
        assert bench.rooms.created == [("main", ROOM)]
        assert bench.tokens.given_to == [("main", ROOM, EVES, SERVER, EVE, MATRIX_ROOM)]
        assert bench.service.asked == [("joined", SERVER, EVE, MATRIX_ROOM)]
        assert bench.told.matrixrtc == [("federation_get_token", 200, False)]


@pytest.mark.parametrize("ask", DELEGATE, ids=str)
async def test_what_is_delegated(ask: Ask) -> None:
    """200 `{}`: the event as the homeserver has it, for the participant in all forms that are known. No token, and no room is made."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(), headers=ask.headers())
        assert (response.status, await response.text()) == (200, "{}")
        event = NewEvent(DELAY_ID, 3600.0, OnEnd.SEND, NOW - 60.0, NOW)
        alias, twin = (PLAIN, HASHED) if ask.deployed else (None, None)
        accept = Accept("", "main", ROOM, MEMBER, SERVER, (event,), alias=alias, user=ALICE, twin=twin)
        assert [replace(given, delegation="") for given in bench.accepted()] == [accept]
        assert [(row.delay_id, row.delay, row.state, row.running_since) for row in bench.port.rows()] == [(DELAY_ID, 3600.0, State.LIVE, NOW - 60.0)]
        assert bench.port.course == ["event", "Accept"]
        assert bench.service.asked == [("event", SERVER, ALICE)]
        assert bench.tokens.given_to == []
        assert bench.told.matrixrtc == [("homeserver_delegate_delayed_leave", 200, True)]


@pytest.mark.parametrize(
    ("state_key", "device"),
    [
        ("_@alice:example.org_OTHER_m.call", "OTHER"),
        ("@alice:example.org_OTHER", "OTHER"),
        ("@alice:example.org_OTHER_m.call", "OTHER"),
        ("_@alice:example.org_A_B_m.call", "A_B"),
        ("@alice:example.org", None),
        ("_@alice:example.org__m.call", None),
        ("_@bob:example.org_OTHER_m.call", None),
        ("x@alice:example.org_OTHER", None),
        ("_@alice:example.org_84:48_m.call", None),
        ("", None),
        (None, None),
    ],
)
async def test_the_device_of_an_event(state_key: str | None, device: str | None) -> None:
    """Where the request does not tell it, the event may, by its state key: never another user's, and never in place of what the request says."""
    bench = bench_of()
    bench.service.events[ALICE, DELAY_ID] = LEAVE._replace(state_key=state_key)
    short, long = DELEGATE[2:]
    async with serving(bench) as client:
        for ask in (short, long):
            assert (await client.post(ask.path, json=ask.body(), headers=ask.headers())).status == 200
        aliases = [(accept.identity, accept.alias, accept.twin is None) for accept in bench.accepted()]
        alias = None if device is None else f"{ALICE}:{device}"
        assert aliases == [(MEMBER, alias, alias is None), (MEMBER, PLAIN, False)]


@pytest.mark.parametrize("joined", [MEMBER, PLAIN, HASHED])
async def test_a_delegation_waits_for_each_form_of_the_participant(joined: str) -> None:
    """However the client got its token: it is seen as connected, and its event goes on."""
    bench = bench_of()
    async with serving(bench) as client:
        assert (await client.post(DELEGATION.path, json=DELEGATION.body(), headers=DELEGATION.headers())).status == 200
        await bench.port.put(Seen("main", ROOM, joined, Sighting.JOINED, "PA_1"))
        assert [(row.state, row.presence) for row in bench.port.rows()] == [(State.LIVE, Presence.CONNECTED)]


@pytest.mark.parametrize("delay_timeout", [30_000, 3_600_001, -1, "x", None])
async def test_the_delay_is_the_homeservers(delay_timeout: Any) -> None:
    """What the client says of it counts for nothing, nor where it wants requests to go."""
    bench = bench_of()
    bench.service.events[ALICE, DELAY_ID] = LEAVE._replace(delay=45.5, running_since=None)
    body = DELEGATION.body(delay_timeout=delay_timeout, running_since=1, delayed_since_ts=1, delay=1, delay_cs_api_url="https://evil.org")
    async with serving(bench) as client:
        assert (await client.post(DELEGATION.path, json=body, headers=DELEGATION.headers())).status == 200
        assert [(accept.homeserver, accept.events) for accept in bench.accepted()] == [(SERVER, (NewEvent(DELAY_ID, 45.5, OnEnd.SEND, None, NOW),))]


@pytest.mark.parametrize(
    "kind",
    ["m.rtc.member", "org.matrix.msc4143.rtc.member", "m.call.member", "org.matrix.msc3401.call.member", "m.room.encrypted"],
)
async def test_events_by_which_a_member_leaves(kind: str) -> None:
    """By their stable and unstable names, and encrypted."""
    bench = bench_of()
    bench.service.events[ALICE, DELAY_ID] = LEAVE._replace(type=kind)
    async with serving(bench) as client:
        assert (await client.post(DELEGATION.path, json=DELEGATION.body(), headers=DELEGATION.headers())).status == 200


async def test_each_homeserver_is_asked_about_its_own_users() -> None:
    """A second one with its own token: its user, its event, its name in the delegation and with the token."""
    bench = bench_of()
    bench.service.events[ZOE, DELAY_ID] = LEAVE
    headers = {"Authorization": f"Bearer {SECOND}", USER: ZOE}
    async with serving(bench) as client:
        assert (await client.post(DELEGATION.path, json=DELEGATION.body(), headers=headers)).status == 200
        assert (await client.post(TOKEN.path, json=TOKEN.body(), headers=headers)).status == 200
        assert [(accept.homeserver, accept.user) for accept in bench.accepted()] == [("second.example", ZOE)]
        assert [given[3:5] for given in bench.tokens.given_to] == [("second.example", ZOE)]
        assert bench.service.asked == [("event", "second.example", ZOE), ("joined", "second.example", ZOE, MATRIX_ROOM)]


async def test_a_user_counts_to_the_letter() -> None:
    """A server's name may be in mixed case; the identity is derived from what the homeserver wrote."""
    user = "@alice:Example.ORG"
    bench = bench_of()
    bench.service.members.add((user, MATRIX_ROOM))
    async with serving(bench) as client:
        response = await client.post(TOKEN.path, json=TOKEN.body(), headers=TOKEN.headers(user))
        assert response.status == 200
        _, claims = tokens.verify((await response.json())["jwt"], bench.keys, NOW)
        assert claims["matrix_user"] == user
        assert claims["sub"] != MEMBER
        assert [given[3:5] for given in bench.tokens.given_to] == [(SERVER, user)]


@one_each
async def test_a_homeserver_is_not_waited_for_for_ever(ask: Ask) -> None:
    """A question takes no longer than is configured."""
    bench = bench_of(settings=Settings(request_timeout=7.0))
    async with serving(bench) as client:
        assert (await client.post(ask.path, json=ask.body(), headers=ask.headers())).status == 200
        assert bench.service.timeouts == [7.0]


async def test_the_same_event_twice() -> None:
    """A client that delegates again what it has delegated, in the other form of the member, changes nothing."""
    bench = bench_of()
    async with serving(bench) as client:
        for ask in DELEGATE:
            assert (await client.post(ask.path, json=ask.body(), headers=ask.headers())).status == 200
        assert len(bench.port.rows()) == 1


# ── which homeserver is it? ──

UNPROVEN: list[Any] = [
    pytest.param([], "M_MISSING_TOKEN", id="none"),
    pytest.param(["Bearer verysecret-guess"], "M_UNKNOWN_TOKEN", id="wrong"),
    pytest.param([f"Bearer {HS_TOKEN[:-1]}"], "M_UNKNOWN_TOKEN", id="a part of it"),
    pytest.param([f"Bearer {HS_TOKEN}x"], "M_UNKNOWN_TOKEN", id="more than it"),
    pytest.param([f"Bearer {HS_TOKEN.upper()}"], "M_UNKNOWN_TOKEN", id="in capitals"),
    pytest.param(["Bearer as-token-of-example-org"], "M_UNKNOWN_TOKEN", id="the other token of the registration"),
    pytest.param([f"Bearer {HS_TOKEN}"] * 2, "M_UNKNOWN_TOKEN", id="twice"),
    pytest.param([f"Bearer {HS_TOKEN}", "Bearer x"], "M_UNKNOWN_TOKEN", id="two"),
    pytest.param([f"Bearer {HS_TOKEN} x"], "M_UNKNOWN_TOKEN", id="two words"),
    pytest.param([f"Basic {HS_TOKEN}"], "M_UNKNOWN_TOKEN", id="another scheme"),
    pytest.param([HS_TOKEN], "M_UNKNOWN_TOKEN", id="no scheme"),
    pytest.param(["Bearer"], "M_UNKNOWN_TOKEN", id="nothing but the scheme"),
    pytest.param([""], "M_UNKNOWN_TOKEN", id="empty"),
    pytest.param(["Bearer hs-töken"], "M_UNKNOWN_TOKEN", id="no ASCII"),
]


@one_each
@pytest.mark.parametrize(("authorization", "errcode"), UNPROVEN)
async def test_who_does_not_prove_to_be_a_homeserver(ask: Ask, authorization: list[str], errcode: str) -> None:
    """401, whatever user or server is named: nobody is asked, and nothing is made."""
    bench = bench_of()
    headers = CIMultiDict([(USER, ALICE), (ORIGIN, "elsewhere.org"), *(("Authorization", value) for value in authorization)])
    async with serving(bench) as client:
        assert await error_of(await client.post(ask.path, json=ask.body(), headers=headers)) == (401, errcode)
        assert bench.port.course == []
        assert bench.told.matrixrtc == [(ask.name, 401, ask.delegates)]


@one_each
async def test_a_token_in_the_url_proves_nothing(ask: Ask) -> None:
    """It would be in the log of every proxy."""
    async with serving(bench_of()) as client:
        response = await client.post(f"{ask.path}?access_token={HS_TOKEN}", json=ask.body(), headers={USER: ALICE, ORIGIN: "elsewhere.org"})
        assert await error_of(response) == (401, "M_MISSING_TOKEN")


@one_each
async def test_the_scheme_in_any_case(ask: Ask) -> None:
    """`bearer` and spaces are fine, as everywhere in HTTP."""
    async with serving(bench_of()) as client:
        headers = ask.headers() | {"Authorization": f"bEARER   {HS_TOKEN} "}
        assert (await client.post(ask.path, json=ask.body(), headers=headers)).status == 200


async def test_bytes_that_are_no_text() -> None:
    """401, in the token as in the user."""
    head = f"POST {TOKEN.path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n".encode()
    async with serving(bench_of()) as client:
        for more, errcode in (
            (b"Authorization: Bearer \xff\xfe\r\n", b"M_UNKNOWN_TOKEN"),
            (f"Authorization: Bearer {HS_TOKEN}\r\n{USER}: @\xff:example.org\r\n".encode("latin-1"), b"M_UNAUTHORIZED"),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            writer.write(head + more + b"\r\n")
            answer = await reader.read()
            writer.close()
            assert answer.startswith(b"HTTP/1.1 401 ")
            assert errcode in answer


@pytest.mark.parametrize("path", [*(ask.path for ask in ONE_EACH), "/_matrix/app/v1/ping"])
async def test_nobody_is_a_homeserver_here(path: str) -> None:
    """Without any hs_token in the configuration: 404 M_UNRECOGNIZED, for whoever asks, as if there was no such path."""
    bench = bench_of()
    bench.homeservers.replace_rules([HomeserverRule(SERVER, "https://matrix.example.org", as_token="as-token-of-example-org")])
    async with serving(bench) as client:
        for headers in ({}, {"Authorization": "Bearer "}, authorized(), authorized(**{USER: ALICE, ORIGIN: "elsewhere.org"})):
            response = await client.post(path, json=TOKEN.body(), headers=headers)
            assert await error_of(response) == (404, "M_UNRECOGNIZED")
            assert "sfu-delegate appservice" in (await response.json())["error"]
        assert bench.port.course == []


async def test_a_token_that_a_reload_has_replaced() -> None:
    """The old one is unknown at once, and the new one known."""
    bench = bench_of()
    rule = HomeserverRule(SERVER, "https://matrix.example.org", as_token="as-token-of-example-org", hs_token="hs-token-of-tomorrow")
    async with serving(bench) as client:
        assert (await client.post("/_matrix/app/v1/ping", headers=authorized())).status == 200
        bench.homeservers.replace_rules([rule])
        assert (await client.post("/_matrix/app/v1/ping", headers=authorized())).status == 401
        assert (await client.post("/_matrix/app/v1/ping", headers={"Authorization": "Bearer hs-token-of-tomorrow"})).status == 200


# ── who is asking? ──


@pytest.mark.parametrize("ask", BY_CLIENTS, ids=str)
@pytest.mark.parametrize(
    "users",
    [[], [ALICE, ALICE], [ALICE, BOB], [f"{ALICE}, {BOB}"], [""], ["alice"], ["@alice"], ["@alice:"], ["@:example.org"], ["alice:example.org"]],
)
async def test_a_homeserver_that_does_not_say_who_asks(ask: Ask, users: list[str]) -> None:
    """401 M_UNAUTHORIZED: of two headers, nobody knows which is the homeserver's."""
    bench = bench_of()
    headers = CIMultiDict([("Authorization", f"Bearer {HS_TOKEN}"), (ORIGIN, "elsewhere.org"), *((USER, user) for user in users)])
    async with serving(bench) as client:
        assert await error_of(await client.post(ask.path, json=ask.body(), headers=headers)) == (401, "M_UNAUTHORIZED")
        assert bench.port.course == []


@pytest.mark.parametrize("ask", BY_CLIENTS, ids=str)
@pytest.mark.parametrize(
    ("token", "user"),
    [
        (HS_TOKEN, EVE),
        (HS_TOKEN, ZOE),
        (SECOND, ALICE),
        (HS_TOKEN, "@alice:example.org:8448"),
        (HS_TOKEN, "@alice:xexample.org"),
        (HS_TOKEN, "@alice:matrix.example.org"),
        (HS_TOKEN, "@alice:a.example.net"),
    ],
)
async def test_a_homeserver_vouches_for_its_own_users_only(ask: Ask, token: str, user: str) -> None:
    """403, also for a user of another homeserver that is served here."""
    bench = bench_of()
    bench.service.members.add((user, MATRIX_ROOM))
    bench.service.events[user, DELAY_ID] = LEAVE
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(), headers={"Authorization": f"Bearer {token}", USER: user})
        assert await error_of(response) == (403, "M_FORBIDDEN")
        assert bench.port.course == []


@pytest.mark.parametrize("ask", BY_CLIENTS, ids=str)
async def test_a_client_who_claims_to_be_somebody_else(ask: Ask) -> None:
    """401 before anybody is asked; the user's own name is fine."""
    bench = bench_of()
    async with serving(bench) as client:
        for claimed, status in ((BOB, 401), ("@alice:EXAMPLE.org", 401), (ALICE, 200)):
            assert bench.port.course == []
            body = ask.body() | {"member_id": "memberABC", "member": {"id": "memberABC", "claimed_user_id": claimed}}
            response = await client.post(ask.path, json=body, headers=ask.headers())
            assert response.status == status
            assert status == 200 or await error_of(response) == (401, "M_UNAUTHORIZED")


@pytest.mark.parametrize("ask", BY_CLIENTS, ids=str)
async def test_another_homeserver_means_nothing_in_a_clients_request(ask: Ask) -> None:
    """`X-Matrix-Origin` and a `user_id` in the body are ignored: the user is the one in the user's header."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(user_id=EVE), headers=ask.headers() | {ORIGIN: "elsewhere.org"})
        assert response.status == 200
        assert {asked[2] for asked in bench.service.asked} == {ALICE}


async def test_a_user_means_nothing_in_a_request_by_federation() -> None:
    """`X-Matrix-User-Identifier` is ignored: the user is the one in the body, and the other homeserver answers for it."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(FED_TOKEN.path, json=FED_TOKEN.body(), headers=authorized(**{USER: ALICE}))
        assert await error_of(response) == (401, "M_UNAUTHORIZED")
        response = await client.post(FED_TOKEN.path, json=FED_TOKEN.body(ALICE), headers=authorized(**{USER: ALICE, ORIGIN: "elsewhere.org"}))
        assert await error_of(response) == (403, "M_FORBIDDEN")
        assert bench.port.course == []
        response = await client.post(FED_TOKEN.path, json=FED_TOKEN.body(), headers=authorized(**{USER: ALICE, ORIGIN: "elsewhere.org"}))
        _, claims = tokens.verify((await response.json())["jwt"], bench.keys, NOW)
        assert (claims["matrix_user"], claims["video"]["canPublish"]) == (EVE, False)


@pytest.mark.parametrize("origins", [[], [""], ["elsewhere.org", "elsewhere.org"], ["elsewhere.org", "example.org"]])
async def test_a_homeserver_that_does_not_say_for_which_other_one_it_asks(origins: list[str]) -> None:
    """401 M_UNAUTHORIZED."""
    bench = bench_of()
    headers = CIMultiDict([("Authorization", f"Bearer {HS_TOKEN}"), *((ORIGIN, origin) for origin in origins)])
    async with serving(bench) as client:
        assert await error_of(await client.post(FED_TOKEN.path, json=FED_TOKEN.body(), headers=headers)) == (401, "M_UNAUTHORIZED")
        assert bench.port.course == []


@pytest.mark.parametrize(
    ("origin", "user"),
    [
        ("elsewhere.org", ALICE),
        ("elsewhere.org", "@eve:elsewhere.org:8448"),
        ("elsewhere.org:8448", EVE),
        ("example.org", EVE),
        ("elsewhere.org, example.org", EVE),
        ("elsewhere.org", "eve"),
        ("elsewhere.org", "@eve"),
        ("elsewhere.org", "@:elsewhere.org"),
        ("elsewhere.org", "eve:elsewhere.org"),
    ],
)
async def test_another_homeserver_speaks_for_its_own_users_only(origin: str, user: str) -> None:
    """403, and nobody is asked whether that user is in the room."""
    bench = bench_of()
    bench.service.members.add((user, MATRIX_ROOM))
    async with serving(bench) as client:
        response = await client.post(FED_TOKEN.path, json=FED_TOKEN.body(user), headers=authorized(**{ORIGIN: origin}))
        assert await error_of(response) == (403, "M_FORBIDDEN")
        assert bench.port.course == []


@pytest.mark.parametrize(("origin", "user"), [("ELSEWHERE.org", EVE), ("elsewhere.org", "@eve:Elsewhere.ORG")])
async def test_the_name_of_another_homeserver_in_any_case(origin: str, user: str) -> None:
    """It is a name of the DNS."""
    bench = bench_of()
    bench.service.members.add((user, MATRIX_ROOM))
    async with serving(bench) as client:
        response = await client.post(FED_TOKEN.path, json=FED_TOKEN.body(user), headers=authorized(**{ORIGIN: origin}))
        assert response.status == 200


@pytest.mark.parametrize(("user", "status"), [(EVE, 403), ("@dan:a.example.net", 200), ("@dan:example.net", 403)], ids=str)
async def test_others_may_be_kept_out(user: str, status: int) -> None:
    """Where the operator wants the users of homeservers that are served only: 403 for others, and nobody is asked."""
    bench = bench_of(settings=Settings(other_homeservers=False))
    bench.service.members.add((user, MATRIX_ROOM))
    async with serving(bench) as client:
        response = await client.post(FED_TOKEN.path, json=FED_TOKEN.body(user), headers=FED_TOKEN.headers(user))
        assert response.status == status
        assert bench.port.course == ([] if status == 403 else ["joined", "room"])
        bench.configure(other_homeservers=True)
        assert (await client.post(FED_TOKEN.path, json=FED_TOKEN.body(user), headers=FED_TOKEN.headers(user))).status == 200


@pytest.mark.parametrize(("user", "origin"), [(ZOE, "second.example"), (ZOE, "SECOND.example"), (ALICE, "example.org")])
async def test_who_has_this_service_comes_by_itself(user: str, origin: str) -> None:
    """No other homeserver has a word on its users: 403, and nobody is asked."""
    bench = bench_of()
    bench.service.members.add((user, MATRIX_ROOM))
    async with serving(bench) as client:
        response = await client.post(FED_TOKEN.path, json=FED_TOKEN.body(user), headers=authorized(**{ORIGIN: origin}))
        assert await error_of(response) == (403, "M_FORBIDDEN")
        assert (bench.port.course, bench.tokens.given_to) == ([], [])


# ── is it theirs? ──


@pytest.mark.parametrize("ask", [*GET_TOKEN, *FEDERATED], ids=str)
async def test_what_cannot_be_is_nobodys_room(ask: Ask) -> None:
    """Where the homeserver takes the name of the room, or the user, for impossible: as for any room that the user has not joined."""
    bench = bench_of()
    bench.service.trouble = CannotBe("it takes the name of the room for impossible")
    async with serving(bench) as client:
        assert await error_of(await client.post(ask.path, json=ask.body(), headers=ask.headers())) == (403, "M_FORBIDDEN")
        assert bench.tokens.given_to == []


@pytest.mark.parametrize("ask", [*GET_TOKEN, *FEDERATED], ids=str)
async def test_who_has_not_joined(ask: Ask) -> None:
    """403 M_FORBIDDEN, no room and no token."""
    bench = bench_of()
    bench.service.members.remove((ask.asker, MATRIX_ROOM))
    async with serving(bench) as client:
        assert await error_of(await client.post(ask.path, json=ask.body(), headers=ask.headers())) == (403, "M_FORBIDDEN")
        assert bench.port.course == ["joined"]
        assert bench.tokens.given_to == []
        assert bench.told.matrixrtc == [(ask.name, 403, False)]


async def test_whether_a_room_or_a_user_exists_is_not_told() -> None:
    """Not joined, no such room, no such user, a user of another server, a server that is kept out: the same answer byte for byte."""
    bench = bench_of(settings=Settings(other_homeservers=False))
    requests = [
        (TOKEN, TOKEN.body(room_id="!empty:example.org"), TOKEN.headers()),
        (TOKEN, TOKEN.body(room_id="nonsense"), TOKEN.headers()),
        (TOKEN, TOKEN.body(), TOKEN.headers("@nobody:example.org")),
        (FED_TOKEN, FED_TOKEN.body("@nobody:second.example"), FED_TOKEN.headers(ZOE)),
        (FED_TOKEN, FED_TOKEN.body(ALICE), FED_TOKEN.headers(ZOE)),
        (FED_TOKEN, FED_TOKEN.body(EVE), FED_TOKEN.headers(EVE)),
    ]
    answers = set()
    async with serving(bench) as client:
        for ask, body, headers in requests:
            response = await client.post(ask.path, json=body, headers=headers)
            assert await error_of(response) == (403, "M_FORBIDDEN")
            answers.add(said(response, await response.read()))
    assert len(answers) == 1


@pytest.mark.parametrize("url", ["wss://evil.org", SFU_URL.lower(), SFU_URL + "/", "main", "x"])
@pytest.mark.parametrize("ask", FOR_TOKENS, ids=str)
async def test_an_sfu_that_is_none_of_ours(ask: Ask, url: str) -> None:
    """400 M_INVALID_PARAM, but only to those who have joined: which SFUs are here is nobody else's business. The URL counts to the letter."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(url=url), headers=ask.headers())
        assert await error_of(response) == (400, "M_INVALID_PARAM")
        assert url == "x" or url not in await response.text()
        assert bench.port.course == ["joined"]
        bench.service.members.clear()
        assert await error_of(await client.post(ask.path, json=ask.body(url=url), headers=ask.headers())) == (403, "M_FORBIDDEN")
        assert bench.tokens.given_to == []


async def test_a_delegation_at_an_sfu_that_is_none_of_ours() -> None:
    """400 M_INVALID_PARAM, and the homeserver is not asked for the event."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(DELEGATION.path, json=DELEGATION.body(url="wss://evil.org"), headers=DELEGATION.headers())
        assert await error_of(response) == (400, "M_INVALID_PARAM")
        assert (await response.json())["error"].startswith("url: ")
        assert bench.port.course == []


async def test_another_sfu() -> None:
    """Each is known by its own URL, and signs by its own key."""
    bench = bench_of()
    bench.keys.replace([engine_port.KEY, engine_port.OTHER_KEY])
    async with serving(bench) as client:
        response = await client.post(TOKEN.path, json=TOKEN.body(url="ws://10.0.0.7:7880"), headers=TOKEN.headers())
        assert tokens.access((await response.json())["jwt"], bench.keys, NOW).sfu == "other"
        await client.post(DELEGATION.path, json=DELEGATION.body(url="ws://10.0.0.7:7880"), headers=DELEGATION.headers())
        assert [accept.sfu for accept in bench.accepted()] == ["other"]
        assert bench.rooms.created == [("other", ROOM)]
        assert bench.tokens.given_to[0][0] == "other"


async def test_an_event_that_is_not_theirs() -> None:
    """400 M_INVALID_PARAM: unknown, somebody else's, of another room, of another type: the same answer byte for byte, and nothing is handed in."""
    bench = bench_of()
    bench.service.events |= {
        (BOB, "verysecret-bobs"): LEAVE,
        (ALICE, "verysecret-elsewhere"): LEAVE._replace(room_id="!another:example.org"),
        (ALICE, "verysecret-message"): LEAVE._replace(type="m.room.message"),
        (ALICE, "verysecret-membership"): LEAVE._replace(type="m.room.member"),
        (ALICE, "verysecret-nothing"): LEAVE._replace(type=""),
        (ALICE, "verysecret-both"): LEAVE._replace(type="m.room.message", delay=1.0),
    }
    answers = set()
    async with serving(bench) as client:
        for delay_id in ("verysecret-unknown", *(id for _, id in bench.service.events if id != DELAY_ID)):
            response = await client.post(DELEGATION.path, json=DELEGATION.body(delay_id=delay_id), headers=DELEGATION.headers())
            assert await error_of(response) == (400, "M_INVALID_PARAM")
            answers.add(said(response, await response.read()))
        assert len(answers) == 1
        assert bench.port.given == []
        assert bench.told.matrixrtc == [("homeserver_delegate_delayed_leave", 400, True)] * 7


@pytest.mark.parametrize(("delay", "taken"), [(29.999, False), (30.0, True), (86_400.0, True), (86_400.001, False), (0.0, False)])
async def test_delays_within_the_limits(delay: float, taken: bool) -> None:
    """From the least to the most that is configured, both included; else 400 with the limits."""
    bench = bench_of(settings=Settings(min_delay=30.0, max_delay=86_400.0))
    bench.service.events[ALICE, DELAY_ID] = LEAVE._replace(delay=delay)
    async with serving(bench) as client:
        response = await client.post(DELEGATION.path, json=DELEGATION.body(delay_timeout=60_000), headers=DELEGATION.headers())
        assert len(bench.accepted()) == taken
        assert response.status == (200 if taken else 400)
        if not taken:
            assert await error_of(response) == (400, "M_INVALID_PARAM")
            assert "from 30000 to 86400000 milliseconds" in (await response.json())["error"]


# ── what can go wrong then ──


@one_each
@pytest.mark.parametrize("error", [CannotAsk, CannotTell])
async def test_a_homeserver_that_cannot_be_asked(ask: Ask, error: type[CannotAsk]) -> None:
    """503 with a time, and nothing is handed in, made or given; why is for the operator."""
    bench = bench_of()
    bench.service.trouble = error("connection refused at 10.0.0.1")
    with capture_logs() as logs:
        async with serving(bench) as client:
            response = await client.post(ask.path, json=ask.body(), headers=ask.headers())
            assert await error_of(response) == (503, "M_UNKNOWN")
            assert (response.headers["Retry-After"], (await response.json())["retry_after_ms"]) == ("10", 10_000)
            assert "10.0.0.1" not in await response.text()
            assert bench.port.course == ["event" if ask.delegates else "joined"]
            assert bench.tokens.given_to == []
            assert bench.told.matrixrtc == [(ask.name, 503, ask.delegates)]
    told = [line for line in logs if line["event"] == "homeserver_not_asked"]
    assert [(line["homeserver"], line["problem"], line["log_level"]) for line in told] == [(SERVER, "connection refused at 10.0.0.1", "warning")]


@one_each
async def test_a_homeserver_that_cannot_be_found(ask: Ask) -> None:
    """503 with a time, and nothing is done; why is for the operator."""
    bench = bench_of()
    bench.homeservers.replace_rules([HomeserverRule(SERVER, as_token="as-token-of-example-org", hs_token=HS_TOKEN)])
    with capture_logs() as logs:
        async with serving(bench) as client:
            response = await client.post(ask.path, json=ask.body(), headers=ask.headers())
            assert await error_of(response) == (503, "M_UNKNOWN")
            assert response.headers["Retry-After"] == "10"
            assert "10.0.0.1" not in await response.text()
            assert bench.port.course == []
    told = [line for line in logs if line["event"] == "homeserver_not_found"]
    assert [(line["homeserver"], line["log_level"]) for line in told] == [(SERVER, "warning")]
    assert "connection refused" in told[0]["error"]


@one_each
async def test_a_homeserver_that_is_being_looked_for(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """No longer than a question to it may take: then it is as if it was not there."""

    async def hangs(_: str) -> None:
        await asyncio.Event().wait()

    bench = bench_of(settings=Settings(request_timeout=0.01))
    monkeypatch.setattr(bench.homeservers, "resolve", hangs)
    async with serving(bench) as client, asyncio.timeout(30):
        assert await error_of(await client.post(ask.path, json=ask.body(), headers=ask.headers())) == (503, "M_UNKNOWN")
        assert bench.port.course == []


def _refusing(error: Exception) -> Callable[[Bench], None]:
    def spoil(bench: Bench) -> None:
        bench.port.error = error

    return spoil


@pytest.mark.parametrize(
    ("spoil", "error", "retry_after"),
    [
        pytest.param(lambda bench: setattr(bench, "stopping", True), (503, "M_UNKNOWN"), "10", id="stopping"),
        pytest.param(_refusing(TooMany("delegations.max_per_homeserver", 5, "That is too many.")), (429, "M_LIMIT_EXCEEDED"), "30", id="too many"),
        pytest.param(_refusing(Overloaded("Too much to do.", 1.5)), (503, "M_UNKNOWN"), "2", id="overloaded"),
        pytest.param(_refusing(Unavailable("The database /var/lib/x failed.", 2.5)), (503, "M_UNKNOWN"), "3", id="unavailable"),
    ],
)
async def test_a_delegation_that_is_not_taken_now(spoil: Callable[[Bench], None], error: tuple[int, str], retry_after: str) -> None:
    """The status that says why, and when to try again. Nothing of the operator's is told."""
    bench = bench_of()
    spoil(bench)
    async with serving(bench) as client:
        response = await client.post(DELEGATION.path, json=DELEGATION.body(), headers=DELEGATION.headers())
        assert await error_of(response) == error
        assert response.headers["Retry-After"] == retry_after
        assert "/var" not in await response.text()
        assert bench.accepted() == []
        assert bench.told.matrixrtc == [("homeserver_delegate_delayed_leave", error[0], True)]


async def test_a_service_that_stops_asks_nobody_about_delegations() -> None:
    """What it will not take anyhow does nothing; tokens are given to the end."""
    bench = bench_of()
    bench.stopping = True
    async with serving(bench) as client:
        assert (await client.post(DELEGATION.path, json=DELEGATION.body(), headers=DELEGATION.headers())).status == 503
        assert bench.port.course == []
        assert (await client.post(TOKEN.path, json=TOKEN.body(), headers=TOKEN.headers())).status == 200


@pytest.mark.parametrize("where", ["error", "gone"])
@pytest.mark.parametrize("ask", FOR_TOKENS, ids=str)
async def test_a_room_that_cannot_be_made(ask: Ask, where: str) -> None:
    """500 M_UNKNOWN, and no token; why is for the operator."""
    bench = bench_of()
    setattr(bench.rooms, where, SfuUnavailable("The SFU at 10.0.0.7 did not answer.", Trouble.TIMEOUT))
    with capture_logs() as logs:
        async with serving(bench) as client:
            response = await client.post(ask.path, json=ask.body(), headers=ask.headers())
            assert await error_of(response) == (500, "M_UNKNOWN")
            assert "10.0.0.7" not in await response.text()
            assert bench.tokens.given_to == []
            assert bench.told.matrixrtc == [(ask.name, 500, False)]
    told = [line for line in logs if line["event"] == "room_not_created"]
    assert [(line["sfu"], line["problem"]) for line in told] == [("main", "The SFU at 10.0.0.7 did not answer.")]


async def test_a_delegation_needs_no_sfu() -> None:
    """Its participant may be connected already; whether the SFU can be asked is seen later."""
    bench = bench_of()
    bench.rooms.error = SfuUnavailable("It is down.", Trouble.CONNECTION)
    async with serving(bench) as client:
        assert (await client.post(DELEGATION.path, json=DELEGATION.body(), headers=DELEGATION.headers())).status == 200


@pytest.mark.parametrize("ask", FOR_TOKENS, ids=str)
async def test_a_token_that_cannot_be_kept_in_mind(ask: Ask) -> None:
    """503 with a time and no token: nobody would look after whoever has it."""
    bench = bench_of()
    bench.tokens.error = Unavailable("The database /var/lib/x failed.", 2.5)
    async with serving(bench) as client:
        response = await client.post(ask.path, json=ask.body(), headers=ask.headers())
        assert await error_of(response) == (503, "M_UNKNOWN")
        assert response.headers["Retry-After"] == "3"
        assert "/var" not in await response.text()
        assert bench.told.matrixrtc == [(ask.name, 503, False)]


@one_each
async def test_what_nobody_expected(ask: Ask) -> None:
    """500, logged by its type alone, and counted."""
    bench = bench_of()
    bench.port.error = RuntimeError("verysecret")
    bench.tokens.error = RuntimeError("verysecret")
    with capture_logs() as logs:
        async with serving(bench) as client:
            assert await error_of(await client.post(ask.path, json=ask.body(), headers=ask.headers())) == (500, "M_UNKNOWN")
    assert [(line["event"], line["error"], line["path"]) for line in logs] == [("request_failed", "RuntimeError", ask.path)]
    assert "verysecret" not in repr(logs)
    assert bench.told.matrixrtc == [(ask.name, 500, ask.delegates)]


async def test_a_client_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request is counted as one that nobody waited for, where hanging up ends it at all."""
    monkeypatch.setattr(engine_port, "BY_LISTENER", False)
    bench = bench_of()
    begun = asyncio.Event()

    async def hangs(*_: object) -> bool:
        begun.set()
        await asyncio.Event().wait()
        return True

    bench.service.is_joined = hangs  # type: ignore[method-assign, assignment]
    async with serving(bench) as client:
        asking = asyncio.ensure_future(client.post(TOKEN.path, json=TOKEN.body(), headers=TOKEN.headers()))
        await begun.wait()
        asking.cancel()
        async with asyncio.timeout(30):
            await until(lambda: bench.told.matrixrtc)
        assert bench.told.matrixrtc == [("homeserver_get_token", 499, False)]


# ── another homeserver's SFU ──


@pytest.mark.parametrize("server_name", ["example.org", "EXAMPLE.Org", None])
async def test_the_own_homeserver_is_not_asked_by_federation(server_name: str | None) -> None:
    """Its own name, in any case, is as good as none."""
    bench = bench_of()
    async with serving(bench) as client:
        assert (await client.post(TOKEN.path, json=TOKEN.body(server_name=server_name), headers=TOKEN.headers())).status == 200
        assert bench.port.course == ["joined", "room"]


@pytest.mark.parametrize("ask", GET_TOKEN, ids=str)
@pytest.mark.parametrize("server_name", ["far.example:8448", "FAR.example:8448"])
async def test_a_token_for_another_homeservers_sfu(ask: Ask, server_name: str) -> None:
    """It comes from there, by federation of the own homeserver: in the user's name, in the proposal's form, for a URL that only they know."""
    bench = bench_of()
    body = ask.body(server_name=server_name, url="wss://sfu.far.example", more="verysecret")
    async with serving(bench) as client:
        response = await client.post(ask.path, json=body, headers=ask.headers())
        assert (response.status, await response.json()) == (200, {"jwt": "from-afar"})
        assert bench.service.asked == [("joined", SERVER, ALICE, MATRIX_ROOM), ("federated", SERVER, "far.example:8448", "get_token")]
        place = {"url": "wss://sfu.far.example", "room_id": MATRIX_ROOM, "slot_id": "slot1234"}
        assert bench.service.bodies == [place | {"user_id": ALICE, "member_id": "memberABC"}]
        assert bench.rooms.created == []
        assert bench.tokens.given_to == []
        assert bench.service.timeouts == [10.0, 10.0]


async def test_another_homeserver_that_has_this_service_need_not_be_asked() -> None:
    """Its SFUs are ours: the user gets the token that it would get without the name, by the word of its own homeserver."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.post(TOKEN.path, json=TOKEN.body(server_name="SECOND.example"), headers=TOKEN.headers())
        assert response.status == 200
        assert bench.service.asked == [("joined", SERVER, ALICE, MATRIX_ROOM)]
        assert [given[3] for given in bench.tokens.given_to] == [SERVER]


async def test_only_those_who_have_joined_may_have_another_homeserver_asked() -> None:
    """403, and nothing is asked of it."""
    bench = bench_of()
    bench.service.members.clear()
    async with serving(bench) as client:
        response = await client.post(TOKEN.path, json=TOKEN.body(server_name="far.example"), headers=TOKEN.headers())
        assert await error_of(response) == (403, "M_FORBIDDEN")
        assert bench.port.course == ["joined"]


NOT_MEANT: Body = {"errcode": "M_FORBIDDEN", "error": "verysecret", "jwt": "verysecret"}


@pytest.mark.parametrize(
    ("remote", "error"),
    [
        (Federated(403, "M_FORBIDDEN", NOT_MEANT), (403, "M_FORBIDDEN")),
        (Federated(400, "M_INVALID_PARAM", NOT_MEANT), (400, "M_INVALID_PARAM")),
        (Federated(400, "M_BAD_JSON", NOT_MEANT), (502, "M_UNKNOWN")),
        (Federated(403, "M_UNKNOWN", NOT_MEANT), (502, "M_UNKNOWN")),
        (Federated(403, "", None), (502, "M_UNKNOWN")),
        (Federated(403, "IO.ELEMENT.MSC4512.M_FEDPROXY_DESTINATION_DENIED", None), (502, "M_UNKNOWN")),
        (Federated(502, "IO.ELEMENT.MSC4512.M_FEDPROXY_CONNECTION_FAILED", None), (502, "M_UNKNOWN")),
        (Federated(401, "M_UNAUTHORIZED", NOT_MEANT), (502, "M_UNKNOWN")),
        (Federated(404, "M_UNRECOGNIZED", NOT_MEANT), (502, "M_UNKNOWN")),
        (Federated(429, "M_LIMIT_EXCEEDED", NOT_MEANT), (502, "M_UNKNOWN")),
        (Federated(503, "M_UNKNOWN", NOT_MEANT), (502, "M_UNKNOWN")),
        (Federated(200, "", None), (502, "M_UNKNOWN")),
        (Federated(200, "", {}), (502, "M_UNKNOWN")),
        (Federated(200, "", {"jwt": ""}), (502, "M_UNKNOWN")),
        (Federated(200, "", {"jwt": ["verysecret"]}), (502, "M_UNKNOWN")),
        (Federated(201, "", {"jwt": "verysecret"}), (502, "M_UNKNOWN")),
        (Federated(302, "", {"jwt": "verysecret"}), (502, "M_UNKNOWN")),
    ],
    ids=str,
)
async def test_another_homeserver_that_gives_no_token(remote: Federated, error: tuple[int, str]) -> None:
    """Its no is passed on, and everything else is 502. Of its own words, nothing is told or logged."""
    bench = bench_of()
    bench.service.remote = remote
    with capture_logs() as logs:
        async with serving(bench) as client:
            response = await client.post(TOKEN.path, json=TOKEN.body(server_name="far.example"), headers=TOKEN.headers())
            assert await error_of(response) == error
            assert bench.told.matrixrtc == [("homeserver_get_token", error[0], False)]
    assert "verysecret" not in repr(logs)


async def test_what_comes_from_another_homeserver_beside_the_token() -> None:
    """Nothing of it reaches the client."""
    bench = bench_of()
    bench.service.remote = Federated(200, "", {"jwt": "from-afar", "url": "wss://evil.org"})
    async with serving(bench) as client:
        response = await client.post(TOKEN.path, json=TOKEN.body(server_name="far.example"), headers=TOKEN.headers())
        assert await response.json() == {"jwt": "from-afar"}


async def test_federation_that_cannot_be_used() -> None:
    """The own homeserver cannot be asked: 503, and not the other one's fault."""
    bench = bench_of()

    async def fails(*_: object) -> Federated:
        raise CannotTell("no fed_proxy at 10.0.0.1")

    bench.service.federated = fails  # type: ignore[method-assign, assignment]
    async with serving(bench) as client:
        response = await client.post(TOKEN.path, json=TOKEN.body(server_name="far.example"), headers=TOKEN.headers())
        assert await error_of(response) == (503, "M_UNKNOWN")
        assert "10.0.0.1" not in await response.text()


# ── bodies ──


@asking
@pytest.mark.parametrize(
    ("spoil", "errcode"),
    [
        (lambda body: b"", "M_NOT_JSON"),
        (lambda body: body[:-1], "M_NOT_JSON"),
        (lambda body: body + b"verysecret", "M_NOT_JSON"),
        (lambda body: b'{"url": "x", ' + body[1:], "M_NOT_JSON"),
        (lambda body: body.replace(b"memberABC", b"\xff"), "M_NOT_JSON"),
        (lambda body: b"[]", "M_BAD_JSON"),
        (lambda body: body.replace(b"slot_id", b"slot"), "M_BAD_JSON"),
        (lambda body: body.replace(b'"memberABC"', b"7"), "M_BAD_JSON"),
        (lambda body: body[:-1] + b', "member_id": "a", "member": {"id": "b"}}' if b'"member' not in body else b"{}", "M_BAD_JSON"),
    ],
)
async def test_bodies_that_are_none(ask: Ask, spoil: Callable[[bytes], bytes], errcode: str) -> None:
    """400 before anybody is asked anything."""
    bench = bench_of()
    async with serving(bench) as client:
        data = spoil(json.dumps(ask.body()).encode())
        assert await error_of(await client.post(ask.path, data=data, headers=ask.headers())) == (400, errcode)
        assert bench.port.course == []
        assert bench.told.matrixrtc[0][:2] == (ask.name, 400)


@asking
async def test_an_empty_request_is_a_probe(ask: Ask) -> None:
    """By one, Element Call finds out whether the endpoint is there, and we whether requests come here: it is no refusal, and no delegation."""
    bench = bench_of()
    with capture_logs() as logs:
        async with serving(bench) as client:
            assert await error_of(await client.post(ask.path, headers=ask.headers())) == (400, "M_NOT_JSON")
            assert bench.port.course == []
    assert logs == []
    assert bench.told.matrixrtc == [(ask.name, 400, False)]


@one_each
async def test_fields_that_are_wrong(ask: Ask) -> None:
    """400 M_BAD_JSON: two members, a device with a colon, a server that is none, and a delayed event where none is delegated."""
    bodies: list[Body] = [
        ask.body() | {"member_id": "a", "member": {"id": "b"}},
        ask.body() | {"member_id": "a", "member": {"id": "a", "claimed_device_id": "8448:D"}},
        {name: value for name, value in ask.body().items() if name not in {"member", "member_id"}},
    ]
    bodies += [ask.body(delay_id=7)] if ask.delegates else [ask.body(delay_id=DELAY_ID)]
    bodies += [ask.body(server_name="https://verysecret")] if ask is TOKEN else []
    bench = bench_of()
    async with serving(bench) as client:
        for body in bodies:
            assert await error_of(await client.post(ask.path, json=body, headers=ask.headers())) == (400, "M_BAD_JSON"), body
        assert bench.port.course == []


@asking
async def test_fields_that_are_not_known(ask: Ask) -> None:
    """They are ignored."""
    async with serving(bench_of()) as client:
        assert (await client.post(ask.path, json=ask.body(more={"a": 1}), headers=ask.headers())).status == 200


@one_each
async def test_too_large_a_body(ask: Ask) -> None:
    """413, and nobody is asked."""
    bench = bench_of(settings=Settings(max_body=1000))
    async with serving(bench) as client:
        assert await error_of(await client.post(ask.path, data=b" " * 1001, headers=ask.headers())) == (413, "M_TOO_LARGE")
        assert bench.port.course == []


@one_each
async def test_who_asks_comes_before_what(ask: Ask) -> None:
    """Of a stranger's body nothing is read, nor of one in the name of somebody else's user."""
    bench = bench_of(settings=Settings(max_body=1000))
    async with serving(bench) as client:
        assert (await client.post(ask.path, data=b" " * 1001)).status == 401
        if not ask.federated:
            assert (await client.post(ask.path, data=b" " * 1001, headers=ask.headers(EVE))).status == 403


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
@one_each
async def test_other_methods(ask: Ask, method: str) -> None:
    """405 with the one that is known; preflight requests are the homeserver's to answer."""
    bench = bench_of()
    async with serving(bench) as client:
        response = await client.request(method, ask.path, json=ask.body(), headers=ask.headers())
        assert (response.status, response.headers["Allow"]) == (405, "POST")
        assert method == "HEAD" or await error_of(response) == (405, "M_UNRECOGNIZED")
        assert bench.port.course == []


@pytest.mark.parametrize(
    "path", [f"{FED_STABLE}/delegate_delayed_leave", f"{STABLE}/get_token/", f"{STABLE}/sfu/get", "/_matrix/client/v3/rtc/livekit/get_token", STABLE]
)
async def test_other_paths(path: str) -> None:
    """404 M_UNRECOGNIZED: by federation nobody delegates."""
    async with serving(bench_of()) as client:
        response = await client.post(path, json=DELEGATION.body(), headers=DELEGATION.headers() | {ORIGIN: "elsewhere.org"})
        assert await error_of(response) == (404, "M_UNRECOGNIZED")


# ── limits ──


async def test_another_homeserver_is_limited_by_its_name() -> None:
    """It can invent users without end: each of them costs a question."""
    bench = bench_of(settings=Settings(client_rate=0.0001, client_burst=2))
    async with serving(bench) as client:

        async def ask(origin: str, number: int) -> int:
            headers = authorized(**{ORIGIN: origin})
            return (await client.post(FED_TOKEN.path, json=FED_TOKEN.body(f"@eve{number}:{origin.lower()}"), headers=headers)).status

        assert [await ask(origin, number) for number, origin in enumerate(["elsewhere.org", "ELSEWHERE.org", "elsewhere.org"])] == [403, 403, 429]
        assert await ask("third.example", 1) == 403


@pytest.mark.parametrize("ask", BY_CLIENTS, ids=str)
async def test_a_homeservers_address_is_not_limited(ask: Ask) -> None:
    """It asks for all its users; who does not prove to be one is limited by the address, and does not use up what homeservers may."""
    bench = bench_of(settings=Settings(client_rate=0.0001, client_burst=2))
    async with serving(bench) as client:
        for _ in range(5):
            assert (await client.post(ask.path, json=ask.body(), headers=ask.headers())).status == 200
        wrong = {"Authorization": "Bearer verysecret-guess"}
        answers = [await client.post(ask.path, json=ask.body(), headers=headers) for headers in (wrong, {}, wrong, {})]
        assert [await error_of(answer) for answer in answers] == [
            (401, "M_UNKNOWN_TOKEN"),
            (401, "M_MISSING_TOKEN"),
            (429, "M_LIMIT_EXCEEDED"),
            (429, "M_LIMIT_EXCEEDED"),
        ]
        assert "Retry-After" in answers[-1].headers
        assert (await client.post("/_matrix/app/v1/ping")).status == 429
        assert (await client.post(ask.path, json=ask.body(), headers=ask.headers())).status == 200
        assert bench.told.matrixrtc[-2:] == [(ask.name, 429, ask.delegates), (ask.name, 200, ask.delegates)]


@one_each
async def test_guesses_are_limited_where_there_is_no_homeserver(ask: Ask) -> None:
    """So are requests to what is not set up."""
    bench = bench_of(settings=Settings(client_rate=0.0001, client_burst=1))
    bench.homeservers.replace_rules([])
    async with serving(bench) as client:
        assert [(await client.post(ask.path, headers=authorized())).status for _ in range(2)] == [404, 429]


@one_each
async def test_a_user_that_asks_too_often(ask: Ask) -> None:
    """429 with a time, before the homeserver is asked; others are not concerned."""
    bench = bench_of(settings=Settings(user_rate=0.0001, user_burst=1))
    other = "@mallory:elsewhere.org" if ask.federated else BOB
    bench.service.members.add((other, MATRIX_ROOM))
    bench.service.events[other, DELAY_ID] = LEAVE
    async with serving(bench) as client:
        assert (await client.post(ask.path, json=ask.body(), headers=ask.headers())).status == 200
        before = list(bench.port.course)
        response = await client.post(ask.path, json=ask.body(), headers=ask.headers())
        assert await error_of(response) == (429, "M_LIMIT_EXCEEDED")
        assert 9_000_000 < (await response.json())["retry_after_ms"] <= 10_000_000
        assert bench.port.course == before
        assert (await client.post(ask.path, json=ask.body(other), headers=ask.headers(other))).status == 200


async def test_a_user_has_one_limit_for_all_endpoints() -> None:
    """Another endpoint is no way around it."""
    bench = bench_of(settings=Settings(user_rate=0.0001, user_burst=1))
    async with serving(bench) as client:
        assert (await client.post(TOKEN.path, json=TOKEN.body(), headers=TOKEN.headers())).status == 200
        assert (await client.post(DELEGATION.path, json=DELEGATION.body(), headers=DELEGATION.headers())).status == 429


async def test_nobody_can_use_up_the_requests_of_somebody_else() -> None:
    """What is not vouched for does not count as Alice's: without a token, by another homeserver, by federation of another one."""
    bench = bench_of(settings=Settings(user_rate=0.0001, user_burst=1))
    async with serving(bench) as client:
        for _ in range(3):
            assert (await client.post(TOKEN.path, json=TOKEN.body(), headers={USER: ALICE})).status == 401
            assert (await client.post(TOKEN.path, json=TOKEN.body(), headers={"Authorization": f"Bearer {SECOND}", USER: ALICE})).status == 403
            assert (await client.post(FED_TOKEN.path, json=FED_TOKEN.body(ALICE), headers=FED_TOKEN.headers(EVE))).status == 403
        assert (await client.post(TOKEN.path, json=TOKEN.body(), headers=TOKEN.headers())).status == 200


# ── what homeservers tell an application service ──


@pytest.mark.parametrize("data", [b"", b'{"events": []}', b"no JSON", b"x" * 5_000_000], ids=["empty", "none", "no JSON", "large"])
async def test_transactions(data: bytes) -> None:
    """200 `{}` whatever is in it: what is not answered so comes again without end."""
    bench = bench_of(settings=Settings(max_body=1000))
    async with serving(bench) as client:
        response = await client.put(TRANSACTION, data=BytesIO(data), headers=authorized())
        assert (response.status, await response.text()) == (200, "{}")
        again = await client.put(TRANSACTION, data=iterated(data), headers=authorized())
        assert (again.status, await again.text()) == (200, "{}")
        assert bench.port.course == []
        assert bench.told.matrixrtc == []


async def iterated(data: bytes) -> Any:
    """A body in chunks, of which nobody knows how long it is."""
    yield data[:100]
    yield data[100:]


async def test_transactions_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """413: there is a limit to everything."""
    monkeypatch.setattr(service, "MAX_TRANSACTION", 1_000_000)
    async with serving(bench_of()) as client:
        assert (await client.put(TRANSACTION, data=BytesIO(b"x" * 1_000_000), headers=authorized())).status == 200
        response = await client.put(TRANSACTION, data=BytesIO(b"x" * 1_000_001), headers=authorized())
        assert await error_of(response) == (413, "M_TOO_LARGE")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_transactions_in_an_encoding_that_is_broken(encoding: str) -> None:
    """They are thrown away as well as any other."""
    async with serving(bench_of()) as client:
        response = await client.put(TRANSACTION, data=b"no such thing", headers=authorized(**{"Content-Encoding": encoding}))
        assert (response.status, await response.text()) == (200, "{}")


async def test_pings() -> None:
    """200 `{}`: that is all that the homeserver wants to know."""
    async with serving(bench_of()) as client:
        response = await client.post("/_matrix/app/v1/ping", json={"transaction_id": "x"}, headers=authorized())
        assert (response.status, await response.text()) == (200, "{}")


@pytest.mark.parametrize("path", ["/_matrix/app/v1/users/%40alice%3Aexample.org", "/_matrix/app/v1/rooms/%23room%3Aexample.org"])
async def test_no_user_and_no_room_is_ours(path: str) -> None:
    """404 M_NOT_FOUND: none is to be made."""
    async with serving(bench_of()) as client:
        response = await client.get(path, headers=authorized())
        assert await error_of(response) == (404, "M_NOT_FOUND")
        assert "alice" not in await response.text()


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", TRANSACTION), ("POST", "/_matrix/app/v1/ping"), ("GET", "/_matrix/app/v1/users/x"), ("GET", "/_matrix/app/v1/rooms/x")],
)
async def test_they_are_for_homeservers_only(method: str, path: str) -> None:
    """401 without a token, and with a wrong one; 405 for another method."""
    async with serving(bench_of()) as client:
        assert await error_of(await client.request(method, path)) == (401, "M_MISSING_TOKEN")
        assert await error_of(await client.request(method, path, headers={"Authorization": "Bearer x"})) == (401, "M_UNKNOWN_TOKEN")
        assert await error_of(await client.delete(path, headers=authorized())) == (405, "M_UNRECOGNIZED")


# ── logs and memory ──


async def test_no_secret_is_logged() -> None:
    """Whatever becomes of a request: no hs_token, no delay_id, no LiveKit token and no text of a user's is in any line."""
    bench = bench_of()
    jwts = []
    with capture_logs() as logs:
        async with serving(bench) as client:
            for ask in EVERY:
                for headers in (ask.headers(), ask.headers("@verysecret:example.org"), {}, {"Authorization": "Bearer verysecret"}, authorized()):
                    answer = await (await client.post(ask.path, json=ask.body(), headers=headers)).json()
                    jwts.append(answer.get("jwt"))
                for more in ({"url": "verysecret"}, {"delay_id": "verysecret-unknown"}, {"room_id": "verysecret"}, {"slot_id": ["verysecret"]}):
                    await client.post(ask.path, json=ask.body() | more, headers=ask.headers())
                await client.post(ask.path, data=json.dumps(ask.body()) + "verysecret", headers=ask.headers())
                for error in (CannotAsk("it does not answer"), None):
                    bench.service.trouble = error
                    bench.port.error = bench.tokens.error = RuntimeError("verysecret")
                    await client.post(ask.path, json=ask.body(), headers=ask.headers())
                bench.port.error = bench.tokens.error = None
    given = [jwt for jwt in jwts if jwt]
    assert len(given) == len(GET_TOKEN) + len(FEDERATED)
    told = repr(logs)
    assert len(logs) > 10
    assert not [secret for secret in secrets() if secret in told]
    assert not [jwt for jwt in given if jwt in told or jwt.rpartition(".")[2] in told]


async def test_refusals_are_logged_seldom() -> None:
    """Who goes on trying does not fill the log; each kind of refusal of each endpoint has a line, and a wrong token one for the operator."""
    bench = bench_of()
    with capture_logs() as logs:
        async with serving(bench) as client:
            for _ in range(5):
                for ask in (TOKEN, FED_TOKEN):
                    await client.post(ask.path, headers={"Authorization": "Bearer x"})
                    await client.post(ask.path, data="{", headers=ask.headers())
    refusals = [(line["endpoint"], line["status"], line["errcode"]) for line in logs if line["event"] == "matrixrtc_refused"]
    assert sorted(refusals) == [
        ("federation_get_token", 400, "M_NOT_JSON"),
        ("federation_get_token", 401, "M_UNKNOWN_TOKEN"),
        ("homeserver_get_token", 400, "M_NOT_JSON"),
        ("homeserver_get_token", 401, "M_UNKNOWN_TOKEN"),
    ]
    assert [line["log_level"] for line in logs if line["event"] == "hs_token_refused"] == ["warning"]


def _stranger(bench: Bench) -> None:
    bench.service.members.clear()
    bench.service.events.clear()


def _down(bench: Bench) -> None:
    async def fails(*_: object) -> Any:
        raise CannotAsk("no route")

    bench.service.is_joined = bench.service.delayed_event = fails  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("spoil", [_stranger, _down])
@one_each
async def test_a_refused_request_is_forgotten_at_once(ask: Ask, spoil: Callable[[Bench], None]) -> None:
    """Neither its error nor its body waits for a garbage collection: bodies can be large, and many."""
    bench = bench_of()
    spoil(bench)
    async with serving(bench) as client:
        await client.post(ask.path)
        sent = json.dumps(ask.body(needle="needle")).encode()
        with left_for_the_collector("needle") as left:
            response = await client.post(ask.path, data=sent, headers=ask.headers())
            assert response.status >= 400
            await response.read()
            await asyncio.sleep(0)
        assert left == []
