"""An application service at the sandbox's homeservers: what they show, whom they know to be in a room, whom they ask, and what they pass on."""

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from sfu_delegate.livekit import tokens
from sfu_delegate.matrix.discovery import Homeserver, HomeserverRule
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.service import ApplicationService, CannotAsk, CannotBe, CannotTell, Defect, Federated, Part, Shown
from sfu_delegate.sandbox.homeserver import HomeserverModel
from sfu_delegate.sandbox.server import SandboxHomeserver

from tests.engine_port import HS_TOKEN, SFU_URL, Bench, serving
from tests.integration.matrix_stand_in import closed_port, served

Json = dict[str, Any]

SERVER = "example.org"
ALICE, BOB, EVE = "@alice:example.org", "@bob:example.org", "@eve:elsewhere.org"
ROOM = "!roomid:example.com"
CALL_ROOM = "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"  # the proposal's vector: that room with the slot slot1234
STATE_KEY = "_@alice:example.org_DEVICE_m.call"
FED_UNSTABLE = "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token"
FED_STABLE = "/_matrix/federation/v1/rtc/livekit/get_token"
CLIENT = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit"


class Desk:
    """A sandbox's homeserver, and an application service that asks it."""

    def __init__(self, sandbox: SandboxHomeserver, service: ApplicationService, as_token: str) -> None:
        self.sandbox, self.service, self.as_token = sandbox, service, as_token
        self.model = sandbox.model
        self.homeserver = Homeserver(SERVER, sandbox.url, as_token)
        self.within = 30.0  # seconds for a question

    async def schedule(self, user: str = ALICE, delay_ms: int = 3_600_000) -> str:
        """A user's leave; its delay_id."""
        return str(await self.sandbox.call("schedule", user, ROOM, "m.rtc.member", STATE_KEY, delay_ms, {}))

    async def event(self, delay_id: str, user: str = ALICE) -> Shown | None:
        return await self.service.delayed_event(self.homeserver, user, delay_id, self.within)

    async def joined(self, user: str = ALICE, room: str = ROOM) -> bool:
        return await self.service.is_joined(self.homeserver, user, room, self.within)

    async def far(self, destination: str = "far.example") -> Federated:
        return await self.service.federated(self.homeserver, destination, "get_token", {"user_id": ALICE}, self.within)

    async def defects(self, *, passes_on: bool = True) -> list[Defect]:
        """What does not work, in words without secrets."""
        findings = await self.service.check(self.homeserver, self.within, passes_on=passes_on)
        assert self.as_token not in repr(findings)
        return list(findings.defects)


@asynccontextmanager
async def desk(model: HomeserverModel | None = None, **registration: Any) -> AsyncIterator[Desk]:
    """`registration`: the arguments of the sandbox's `application_service`."""
    async with SandboxHomeserver(model or HomeserverModel(SERVER)) as sandbox:
        as_token = await sandbox.call("application_service", **registration)
        egress = Egress.open()
        try:
            yield Desk(sandbox, ApplicationService(egress, time.time), as_token)
        finally:
            await egress.aclose()


@asynccontextmanager
async def passing_on() -> AsyncIterator[Desk]:
    """… whose homeserver passes requests on to the API, which is set up for that."""
    async with desk() as d, serving(Bench()) as api:
        await d.sandbox.call("set_proxy", str(api.make_url("")), HS_TOKEN)
        yield d


async def unanswered(asked: Awaitable[object], *secrets: str) -> CannotAsk:
    """The error, in which none of the secrets is, nor in any that it came from."""
    with pytest.raises(CannotAsk) as raised:
        await asked
    error: BaseException | None = raised.value
    while error is not None:
        assert not [secret for secret in secrets if secret in f"{error} {error!r}"]
        error = error.__cause__ or error.__context__
    return raised.value


# ── delayed events ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("generations", ["BC", "ABCD", "AD"])
async def test_a_users_own_event(generations: str) -> None:
    """It is shown with its room, type, state key and delay, by endpoints of every age."""
    async with desk(HomeserverModel(SERVER, generations=generations)) as d:
        before = time.time()
        shown = await d.event(await d.schedule(delay_ms=3_700_000))
        assert shown is not None
        assert shown[:4] == (ROOM, "m.rtc.member", STATE_KEY, 3700.0)
        # Whole seconds of `Date`, and what the requests took.
        assert shown.running_since is not None
        assert before - (time.time() - before) - 1.01 <= shown.running_since <= time.time()


async def test_a_countdown_that_began_anew() -> None:
    """After a restart it is as young as that; before, it is as old as it is."""
    start = time.time()
    now = [start - 1800.0]
    async with SandboxHomeserver(HomeserverModel(SERVER), clock=lambda: now[0]) as sandbox:
        egress = Egress.open()
        d = Desk(sandbox, ApplicationService(egress, time.time), await sandbox.call("application_service"))
        delay_id = await d.schedule()
        now[0] = start
        old = await d.event(delay_id)
        await sandbox.call("manage", delay_id, "restart")
        new = await d.event(delay_id)
        await egress.aclose()
    assert old is not None
    assert new is not None
    assert old.running_since is not None
    assert new.running_since is not None
    slack = 2 * (time.time() - start) + 1.01
    assert start - 1800.0 - slack <= old.running_since <= start - 1800.0 + 0.001  # times are in milliseconds there
    assert start - slack <= new.running_since <= start + 0.001


async def test_events_of_others() -> None:
    """Somebody else's is not there, nor is one that never was, or that has been sent."""
    async with desk() as d:
        delay_id = await d.schedule()
        assert await d.event(delay_id, BOB) is None
        assert await d.event("syd_unknown") is None
        await d.sandbox.call("manage", delay_id, "send")
        assert await d.event(delay_id) is None


async def test_reading_events_is_not_limited() -> None:
    """Many users' questions come by one token."""
    async with desk() as d:
        delay_id = await d.schedule()
        for _ in range(20):
            assert await d.event(delay_id) is not None


async def test_delayed_events_are_switched_off() -> None:
    """Neither endpoint is there, whether that is said by 404 or by 405."""
    async with desk(HomeserverModel(SERVER, generations="")) as d:
        for status in (404, 405):
            await d.sandbox.call("set", unrecognized_status=status)
            assert isinstance(await unanswered(d.event("syd_secret"), "syd_secret", d.as_token), CannotTell)


async def test_users_outside_the_namespace() -> None:
    """Nothing is said of their events: neither that they are there, nor that they are not."""
    async with desk(users="@bot.*:example.org") as d:
        delay_id = await d.schedule()
        assert isinstance(await unanswered(d.event(delay_id), delay_id, d.as_token), CannotTell)


# ── membership ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_who_is_in_a_room() -> None:
    """As long as they are, and of whatever homeserver. In a room that is not known, or that cannot be, is nobody."""
    async with desk() as d:
        for user in (ALICE, EVE):
            await d.sandbox.call("join", user, ROOM)
            assert await d.joined(user)
        assert not await d.joined(BOB)
        assert not await d.joined(room="!unknown:example.org")
        assert isinstance(await unanswered(d.joined(room="no room"), d.as_token), CannotBe)
        assert isinstance(await unanswered(d.joined(user="nobody"), d.as_token), CannotBe)
        await d.sandbox.call("leave", ALICE, ROOM)
        assert not await d.joined()


@pytest.mark.parametrize("room", ["!a/b:example.org", "!a?b#c:example.org", "!a%2Fb:example.org", "!ä ö:example.org", "!a&mxid=@bob:example.org"])
async def test_odd_rooms_arrive(room: str) -> None:
    """Odd names arrive at the homeserver as they are."""
    async with desk() as d:
        await d.sandbox.call("join", ALICE, room)
        assert await d.joined(room=room)
        assert not await d.joined(BOB, room)


@pytest.mark.parametrize(("settings", "scopes"), [({"msc4502": False}, True), ({}, False), ({"msc4502": False, "unrecognized_status": 405}, True)])
async def test_a_homeserver_that_does_not_tell(settings: Json, scopes: bool) -> None:
    """That is no no."""
    async with desk(scopes=scopes) as d:
        await d.sandbox.call("set", **settings)
        assert isinstance(await unanswered(d.joined(), d.as_token), CannotTell)


# ── other homeservers ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", [FED_UNSTABLE, FED_STABLE])
async def test_another_homeserver(path: str) -> None:
    """It is asked where it has the endpoint."""

    def answer(asked: str, body: Json) -> tuple[int, Json]:
        return (200, {"jwt": "x", **body}) if asked == path else (404, {"errcode": "M_UNRECOGNIZED", "error": ""})

    async with desk() as d:
        d.model.remotes["far.example"] = answer
        assert await d.far() == Federated(200, "", {"jwt": "x", "user_id": ALICE})
        assert [call.path for call in d.model.fed_calls][-1] == path


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((403, {"errcode": "M_FORBIDDEN", "error": "no"}), Federated(403, "M_FORBIDDEN", {"errcode": "M_FORBIDDEN", "error": "no"})),
        ((500, None), Federated(500, "", None)),
        ((404, {"errcode": "M_UNRECOGNIZED"}), Federated(404, "M_UNRECOGNIZED", {"errcode": "M_UNRECOGNIZED"})),
    ],
)
async def test_what_another_homeserver_answers(answer: tuple[int, Json | None], expected: Federated) -> None:
    """It is told as it is."""
    async with desk() as d:
        d.model.remotes["far.example"] = lambda path, body: answer
        assert await d.far() == expected


@pytest.mark.parametrize(("destination", "status", "what"), [("nowhere.example", 502, "CONNECTION_FAILED"), (SERVER, 403, "DESTINATION_DENIED")])
async def test_another_homeserver_that_is_not_asked(destination: str, status: int, what: str) -> None:
    """One that nobody reaches, and the own one: its words for that are told."""
    async with desk() as d:
        assert await d.far(destination) == Federated(status, f"IO.ELEMENT.MSC4512.M_FEDPROXY_{what}", None)


async def test_a_homeserver_that_asks_no_others() -> None:
    """What has to be changed is told."""
    async with desk() as d:
        await d.sandbox.call("set", msc4512=False)
        error = await unanswered(d.far(), d.as_token)
    assert isinstance(error, CannotTell)
    assert "msc4512_enabled" in str(error)


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

QUESTIONS: dict[str, Callable[[Desk], Awaitable[object]]] = {
    "read": lambda d: d.event("syd_secret"),
    "is_joined": lambda d: d.joined(),
    "fed_proxy": lambda d: d.far(),
    "whoami": lambda d: d.defects(),
}


@pytest.mark.parametrize("kind", QUESTIONS)
@pytest.mark.parametrize(
    "faults",
    [
        {"down": True},
        {"close": True},
        {"done_but_not_told": True},
        {"status": 500},
        {"status": 429},
        {"html": 502},
        {"html": 404},
        {"garbage": True},
        {"redirect": "http://127.0.0.1:1/"},
    ],
    ids=str,
)
async def test_a_homeserver_that_fails(kind: str, faults: Json) -> None:
    """It cannot be asked: neither a no, nor a defect of its configuration; and nothing secret is in what is said of it."""
    async with desk() as d:
        d.model.remotes["far.example"] = lambda path, body: (200, {})
        await d.sandbox.call("faults", **faults)
        error = await unanswered(QUESTIONS[kind](d), "syd_secret", d.as_token, d.sandbox.url)
    assert not isinstance(error, CannotTell)
    assert str(error)


@pytest.mark.parametrize("kind", QUESTIONS)
async def test_a_homeserver_that_hangs(kind: str) -> None:
    """It is waited for no longer than it may take."""
    async with desk() as d:
        d.within = 0.1
        await d.sandbox.call("faults", hang=True)
        error = await unanswered(QUESTIONS[kind](d), "syd_secret", d.as_token)
    assert str(error) == "no answer in time"
    assert not isinstance(error, CannotTell)


@pytest.mark.parametrize("kind", ["read", "is_joined", "fed_proxy"])
async def test_a_token_that_the_homeserver_does_not_know(kind: str) -> None:
    """That does not go away by itself."""
    async with desk() as d:
        d.homeserver = replace(d.homeserver, as_token="as_unknown")
        assert isinstance(await unanswered(QUESTIONS[kind](d), "as_unknown", "syd_secret"), CannotTell)


# ── does it all work? ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_all_is_well() -> None:
    """With the API at the other end of the way back."""
    async with passing_on() as d:
        assert await d.defects() == []


async def test_nothing_is_changed_by_looking() -> None:
    """No other homeserver is asked, nobody's event is touched, and the limit of requests is not used up."""
    async with passing_on() as d:
        delay_id = await d.schedule()
        for _ in range(10):
            await d.defects()
        assert d.model.fed_calls == []
        assert d.model.events[delay_id].restarted_at == []
        assert d.model.state == {}


async def test_a_wrong_as_token() -> None:
    """It is the one thing that is said."""
    async with passing_on() as d:
        d.homeserver = replace(d.homeserver, as_token="as_unknown")
        assert [defect.part for defect in await d.defects()] == [Part.TOKEN]


@pytest.mark.parametrize("passes_on", [True, False])
async def test_a_namespace_that_does_not_match(passes_on: bool) -> None:
    """It is said, whether requests are passed on or not."""
    async with desk(users="@bot.*:example.org") as d, serving(Bench()) as api:
        await d.sandbox.call("set_proxy", str(api.make_url("")), HS_TOKEN)
        (defect,) = await d.defects(passes_on=passes_on)
        assert (defect.part, "namespaces.users" in defect.remedy) == (Part.TOKEN, True)


@pytest.mark.parametrize(
    ("settings", "part", "hint"),
    [
        ({"msc4502": False}, Part.MEMBERSHIP, "msc4502_enabled"),
        ({"msc4512": False}, Part.FEDERATION, "msc4512_enabled"),
        ({"msc4512": False, "unrecognized_status": 405}, Part.FEDERATION, "msc4512_enabled"),
    ],
)
async def test_a_feature_that_is_off(settings: Json, part: Part, hint: str) -> None:
    """It is named."""
    async with passing_on() as d:
        await d.sandbox.call("set", **settings)
        (defect,) = await d.defects()
        assert defect.part is part
        assert hint in defect.problem + defect.remedy
        assert await d.defects(passes_on=False) == []


async def test_a_scope_that_is_missing() -> None:
    """It is named."""
    async with desk(scopes=False) as d, serving(Bench()) as api:
        await d.sandbox.call("set_proxy", str(api.make_url("")), HS_TOKEN)
        (defect,) = await d.defects()
        assert defect.part is Part.MEMBERSHIP
        assert "io.element.msc4502.scopes" in defect.problem


@pytest.mark.parametrize(("url", "problem"), [(None, "does not pass clients' requests on"), ("nobody", "cannot reach this service")])
async def test_a_proxy_that_leads_nowhere(url: str | None, problem: str) -> None:
    """No proxy at all, or an address at which nobody is."""
    async with desk() as d:
        await d.sandbox.call("set_proxy", url and f"http://127.0.0.1:{closed_port()}", HS_TOKEN)
        (defect,) = await d.defects()
        assert defect.part is Part.PROXY
        assert problem in defect.problem


async def test_an_hs_token_that_is_another_one() -> None:
    """The API does not know it, and that is seen from here."""
    async with passing_on() as d:
        assert d.sandbox.proxy is not None
        await d.sandbox.call("set_proxy", d.sandbox.proxy.url, "hs-token-of-yesterday")
        (defect,) = await d.defects()
        assert defect.part is Part.PROXY
        assert "hs_token" in defect.problem
        assert "yesterday" not in repr(defect)


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"{}"), (404, b"404 page not found"), (400, b"Bad Request"), (403, b'{"errcode": "M_FORBIDDEN"}')]
)
async def test_a_proxy_that_reaches_somebody_else(status: int, body: bytes) -> None:
    """Only our own refusal of an empty body is ours."""

    async def somebody(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status, body=body)

    async with desk() as d, served(somebody) as url:
        await d.sandbox.call("set_proxy", url, HS_TOKEN)
        (defect,) = await d.defects()
        assert defect.part is Part.PROXY
        assert str(status) in defect.problem


# ── from a client to the engine ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class World:
    """Two homeservers; example.org has the API as its application service, and elsewhere.org asks it by federation."""

    def __init__(self, home: SandboxHomeserver, elsewhere: SandboxHomeserver, bench: Bench) -> None:
        self.home, self.elsewhere, self.bench = home, elsewhere, bench
        self.alice = home.model.register("alice")

    async def post(self, endpoint: str, token: str | None = None, **more: Any) -> tuple[int, Json]:
        """As a client of example.org does it, by default Alice's."""
        body = {"url": SFU_URL, "room_id": ROOM, "slot_id": "slot1234", "member_id": "memberABC", **more}
        headers = {"Authorization": f"Bearer {token or self.alice}"}
        async with aiohttp.ClientSession() as http, http.post(f"{self.home.url}{CLIENT}/{endpoint}", json=body, headers=headers) as response:
            return response.status, await response.json()


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        home = await stack.enter_async_context(SandboxHomeserver(HomeserverModel(SERVER)))
        elsewhere = await stack.enter_async_context(SandboxHomeserver(HomeserverModel("elsewhere.org")))
        egress = Egress.open()
        stack.push_async_callback(egress.aclose)
        bench = Bench()
        bench.port.at = time.time()
        as_token = await home.call("application_service")
        bench.homeservers.replace_rules([HomeserverRule(SERVER, home.url, as_token=as_token, hs_token=HS_TOKEN)])
        bench.services = replace(bench.services, service=ApplicationService(egress, time.time))
        api = await stack.enter_async_context(serving(bench))
        await home.call("set_proxy", str(api.make_url("")), HS_TOKEN)
        await elsewhere.call("set_remote", SERVER, home.url)
        await home.call("set_remote", "elsewhere.org", elsewhere.url)
        yield World(home, elsewhere, bench)


async def test_a_client_delegates_through_its_homeserver() -> None:
    """The event that it scheduled there is taken over, with the delay and the age that it really has; another user's is not."""
    async with world() as w:
        delay_id = await w.home.call("schedule", ALICE, ROOM, "m.rtc.member", STATE_KEY, 3_700_000, {})
        assert await w.post("delegate_delayed_leave", w.home.model.register("bob"), delay_id=delay_id) == await w.post(
            "delegate_delayed_leave", delay_id="syd_unknown"
        )
        assert w.bench.accepted() == []
        assert await w.post("delegate_delayed_leave", delay_id=delay_id, delay_timeout=3_600_000) == (200, {})
        (accept,) = w.bench.accepted()
        assert (accept.homeserver, accept.room, accept.user, accept.alias) == (SERVER, CALL_ROOM, ALICE, f"{ALICE}:DEVICE")
        (event,) = accept.events
        assert (event.delay_id, event.delay) == (delay_id, 3700.0)
        assert event.running_since is not None
        assert event.running_since <= w.home.model.events[delay_id].since + 0.001


async def test_a_client_gets_a_token_through_its_homeserver() -> None:
    """As long as it is in the room."""
    async with world() as w:
        assert (await w.post("get_token"))[1]["errcode"] == "M_FORBIDDEN"
        await w.home.call("join", ALICE, ROOM)
        status, answer = await w.post("get_token")
        assert status == 200
        assert tokens.access(answer["jwt"], w.bench.keys, w.bench.port.at).room == CALL_ROOM
        await w.home.call("leave", ALICE, ROOM)
        assert (await w.post("get_token"))[0] == 403


async def test_a_client_gets_a_token_by_federation() -> None:
    """A user of another homeserver asks ours by its own; both have to see the user in the room."""
    async with world() as w:
        as_token = w.elsewhere.model.application_service()
        egress = Egress.open()
        service = ApplicationService(egress, time.time)
        body = {"url": SFU_URL, "room_id": ROOM, "slot_id": "slot1234", "member_id": "memberABC", "user_id": EVE}
        asked = Homeserver("elsewhere.org", w.elsewhere.url, as_token)
        try:
            answer = await service.federated(asked, SERVER, "get_token", body, 30.0)
            assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN")
            await w.home.call("join", EVE, ROOM)
            answer = await service.federated(asked, SERVER, "get_token", body, 30.0)
            assert answer.content is not None
            _, claims = tokens.verify(answer.content["jwt"], w.bench.keys, w.bench.port.at)
            assert (claims["matrix_user"], claims["video"]["canPublish"]) == (EVE, False)
            answer = await service.federated(asked, SERVER, "get_token", body | {"user_id": ALICE}, 30.0)
            assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN")
        finally:
            await egress.aclose()


async def test_a_client_gets_a_token_of_another_homeservers_sfu() -> None:
    """By federation, from whatever answers there."""
    asked: list[tuple[str, Json]] = []

    async def service(request: web.BaseRequest) -> web.StreamResponse:
        asked.append((request.headers["X-Matrix-Origin"], json.loads(await request.read())))
        return web.json_response({"jwt": "from-afar"})

    async with world() as w, served(service) as url:
        await w.elsewhere.call("set_proxy", url, "hs-token-of-elsewhere")
        await w.home.call("join", ALICE, ROOM)
        assert await w.post("get_token", server_name="elsewhere.org", url="wss://sfu.elsewhere.org") == (200, {"jwt": "from-afar"})
        place = {"url": "wss://sfu.elsewhere.org", "room_id": ROOM, "slot_id": "slot1234", "member_id": "memberABC"}
        assert asked == [(SERVER, place | {"user_id": ALICE})]
        await w.elsewhere.call("faults", down=True)
        assert (await w.post("get_token", server_name="elsewhere.org"))[0] == 502
