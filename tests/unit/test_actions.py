"""Whatever happens to an action, its result comes back as an input; and trouble is told once, not for each try."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from sfu_delegate.daemon import actions
from sfu_delegate.daemon.actions import Actions, Means, Sfu
from sfu_delegate.delegation.model import Action, Answered, Listed, Looked, Task, Verdict
from sfu_delegate.livekit.room_service import RoomService, SfuAddress, SfuUnavailable, Trouble
from sfu_delegate.matrix.discovery import DiscoveryFailed, Homeserver, Homeservers, NotServed
from sfu_delegate.matrix.management import Answer, ManagementClient
from sfu_delegate.matrix.service import ApplicationService, CannotAsk, Defect, Findings, Part
from sfu_delegate.sealing import Sealer, new_key

from tests.integration.daemon import captured_log
from tests.unit.test_membership import time_flies

NOW = 1000.0
HOMESERVER = Homeserver("hs.test", "http://127.0.0.1:1")
DONE = Answer(Verdict.DONE, 200, "", None, "200")
SEND = Task(Action.SEND, 7, 3, "main", "room", "hs.test", "D1", "delay-secret", urgent_since=NOW, lease_ends=NOW + 15.0)
LOOK = Task(Action.LOOK, 0, 5, "main", "room", lease_ends=NOW + 15.0)
PEOPLE = (Listed("alice", "S1", "ACTIVE", 1),)


class Bench:
    """Actions with everything that they reach made up: a homeserver, an SFU, and a time that stands still."""

    def __init__(self) -> None:
        self.resolve: Callable[[], Awaitable[Homeserver]] = self._found
        self.act: Callable[..., Awaitable[Answer]] = self._done
        self.list: Callable[[], Awaitable[tuple[Listed, ...]]] = self._people
        self.defects: dict[str, list[Sequence[Defect] | Exception | Callable[[], Any]]] = {}  # by homeserver: one after another, the last for ever
        self.trouble = ""  # of the homeserver, by a check
        self.looked_after: list[str] = []  # homeservers that were checked
        self.untried: set[Part] = set()  # what of it cannot be tried
        self.checked: list[tuple[str, bool]] = []  # homeserver, and whether it passes requests on
        self.asked: list[dict[str, Any]] = []
        self.timeouts: list[float] = []
        self.given: list[Answered | Looked] = []
        self.told: list[tuple[str, str, str]] = []
        self.sealer = Sealer([new_key()])
        address = SfuAddress("main", "ws://127.0.0.1:1", "key", "secret")
        self.reach = Means(
            cast(Homeservers, _Homeservers(self)),
            cast(ManagementClient, _Client(self)),
            cast(ApplicationService, _Service(self)),
            cast(RoomService, _RoomService(self)),
            self.sealer,
            {"main": Sfu(address, 5.0)},
            10.0,
        )
        self.now = NOW
        self.actions = Actions(self.reach, lambda: self.now, self.given.append, self)

    async def _found(self) -> Homeserver:
        return HOMESERVER

    async def _done(self) -> Answer:
        return DONE

    async def _people(self) -> tuple[Listed, ...]:
        return PEOPLE

    def action(self, homeserver: str, action: Action, outcome: str, seconds: float) -> None:
        self.told.append((homeserver, action.value, outcome))

    def look(self, sfu: str, outcome: str, seconds: float) -> None:
        self.told.append((sfu, "look", outcome))

    def service(self, homeserver: str, broken: Container[Part], checked: Iterable[Part]) -> None:
        self.told += [(homeserver, part.value, "broken" if part in broken else "works") for part in checked]

    async def result(self, task: Task) -> Answered | Looked:
        """Carry it out, and return what was handed in: exactly one input."""
        before = len(self.given)
        self.actions.carry_out(task)
        assert await self.actions.finish(20.0) == 0
        assert len(self.given) == before + 1
        return self.given[-1]

    async def act_once(self, answer: Answer) -> None:
        """Get this answer to one request; what is planned for later stays planned."""
        self.act = saying(answer)
        before = len(self.given)
        self.actions.carry_out(SEND._replace(lease_ends=self.actions._clock() + 15.0))
        async with asyncio.timeout(20.0):
            while len(self.given) == before:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0)

    async def answer(self, task: Task = SEND) -> Answered:
        given = await self.result(task)
        assert isinstance(given, Answered)
        assert (given.homeserver, given.event, given.claim, given.action, given.sent_at) == ("hs.test", task.event, task.claim, task.action, self.now)
        return given

    async def looked(self, task: Task = LOOK) -> Looked:
        given = await self.result(task)
        assert isinstance(given, Looked)
        assert (given.room, given.claim, given.sent_at) == ("room", 5, self.now)
        return given


class _Homeservers:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def configured(self, name: str) -> Homeserver | None:
        return None

    async def resolve(self, name: str) -> Homeserver:
        assert name in {"hs.test", "other.test"}
        found = await self.bench.resolve()
        return replace(found, name=name)


class _Client:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    async def check(self, homeserver: Homeserver, timeout: float) -> str:  # noqa: ASYNC109
        return await self.works(homeserver, timeout)

    async def works(self, homeserver: Homeserver, timeout: float) -> str:  # noqa: ASYNC109
        self.bench.looked_after.append(homeserver.name)
        return self.bench.trouble

    async def act(self, homeserver: Homeserver, action: Action, delay_id: str, **more: Any) -> Answer:
        self.bench.asked.append({"homeserver": homeserver, "action": action, "delay_id": delay_id, **more})
        return await self.bench.act()


class _Service:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    async def check(self, homeserver: Homeserver, timeout: float, *, passes_on: bool) -> Findings:  # noqa: ASYNC109
        assert timeout == self.bench.reach.timeout
        self.bench.checked.append((homeserver.name, passes_on))
        script = self.bench.defects.get(homeserver.name, [()])
        found = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(found, Exception):
            raise found
        if callable(found):
            await found()
            raise AssertionError
        tried = (set(Part) if passes_on else {Part.TOKEN}) - self.bench.untried
        return Findings(frozenset(tried), tuple(found))


class _RoomService:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    async def look(self, sfu: SfuAddress, room: str, timeout: float) -> tuple[Listed, ...]:  # noqa: ASYNC109
        self.bench.timeouts.append(timeout)
        return await self.bench.list()


def failing(error: BaseException) -> Callable[[], Any]:
    async def fail() -> Any:
        raise error

    return fail


def saying(answer: Answer) -> Callable[[], Any]:
    async def say() -> Answer:
        return answer

    return say


async def never() -> Any:
    await asyncio.Event().wait()


async def test_a_request_is_made_as_the_task_says() -> None:
    """With the delay_id, the user and the unsealed token; the answer comes back with the claim."""
    bench = Bench()
    task = SEND._replace(user="@alice:hs.test", token=bench.sealer.seal("scoped-token"))
    given = await bench.answer(task)
    assert (given.verdict, given.detail) == (Verdict.DONE, "200")
    (asked,) = bench.asked
    assert asked.pop("timeout") <= 10.0
    assert asked == {
        "homeserver": HOMESERVER,
        "action": Action.SEND,
        "delay_id": "delay-secret",
        "token": "scoped-token",
        "user": "@alice:hs.test",
    }
    assert bench.told == [("hs.test", "send", "done")]


async def test_an_action_ends_before_its_lease_does() -> None:
    """Otherwise somebody else would take it up meanwhile."""
    bench = Bench()
    await bench.answer(SEND._replace(lease_ends=NOW + 4.0))
    assert bench.asked[0]["timeout"] <= 3.0


@pytest.mark.parametrize("verdict", list(Verdict))
async def test_every_verdict_comes_back(verdict: Verdict) -> None:
    """With the time to wait, where the homeserver named one, and with words for people."""
    bench = Bench()
    bench.act = saying(Answer(verdict, 429, "M_X", 2.5, "what it said"))
    given = await bench.answer()
    assert (given.verdict, given.retry_after, given.detail) == (verdict, 2.5, "what it said")
    assert bench.told == [("hs.test", "send", verdict.value)]


@pytest.mark.parametrize("error", [DiscoveryFailed("there is no .well-known"), NotServed("it is not configured")])
async def test_a_homeserver_that_is_not_found_was_certainly_not_asked(error: Exception) -> None:
    """FAILED: nothing was sent anywhere."""
    bench = Bench()
    bench.resolve = failing(error)
    given = await bench.answer()
    assert (given.verdict, given.detail) == (Verdict.FAILED, str(error))
    assert not bench.asked


async def test_a_discovery_that_takes_too_long_was_no_request_either() -> None:
    """FAILED, within the time of the action."""
    bench = Bench()
    bench.reach.timeout = 0.01
    bench.resolve = never
    assert (await bench.answer()).verdict is Verdict.FAILED
    assert not bench.asked


async def test_a_token_that_cannot_be_unsealed_is_not_used() -> None:
    """Its key was removed: FAILED, and the sentence does not hold the token."""
    bench = Bench()
    sealed = Sealer([new_key()]).seal("scoped-token")
    given = await bench.answer(SEND._replace(token=sealed))
    assert given.verdict is Verdict.FAILED
    assert "key" in given.detail
    assert "scoped-token" not in given.detail
    assert not bench.asked


@pytest.mark.parametrize("error", [RuntimeError("holds delay-secret"), ValueError("holds delay-secret"), OSError(5, "holds delay-secret")])
async def test_a_defect_is_uncertain_and_tells_nothing(error: Exception) -> None:
    """Perhaps it was done: the rules find out. The text of an unexpected exception is not passed on."""
    bench = Bench()
    bench.act = failing(error)
    given = await bench.answer()
    assert given.verdict is Verdict.UNCERTAIN
    assert "delay-secret" not in given.detail
    assert type(error).__name__ in given.detail


# ── looks ──


@pytest.mark.parametrize("answer", [DONE, RuntimeError("a defect")], ids=["answered", "failed"])
async def test_when_an_answer_came_comes_back_too(answer: Answer | Exception) -> None:
    """It may be kept much later, and the request may have taken long."""
    bench = Bench()

    async def act() -> Answer:
        bench.now += 3.0
        if isinstance(answer, Exception):
            raise answer
        return answer

    bench.act = act
    given = await bench.result(SEND)
    assert isinstance(given, Answered)
    assert (given.sent_at, given.answered_at) == (NOW, NOW + 3.0)


@pytest.mark.parametrize("of_owner", [True, False])
async def test_the_owners_own_limit_concerns_nobody_else(of_owner: bool) -> None:
    """Else one who has sent many messages would slow everybody's restarts."""
    bench = Bench()
    bench.act = saying(Answer(Verdict.LIMITED, 429, "M_LIMIT_EXCEEDED", 5.0, "429", of_owner=of_owner))
    given = await bench.result(SEND)
    assert isinstance(given, Answered)
    assert given.alone is of_owner


async def test_a_look_comes_back_with_the_list() -> None:
    """And with the time of the SFU's own configuration."""
    bench = Bench()
    given = await bench.looked()
    assert (given.sfu, given.participants, given.error) == ("main", PEOPLE, "")
    assert bench.timeouts == [5.0]
    assert bench.told == [("main", "look", "done")]


@pytest.mark.parametrize("error", [SfuUnavailable("It does not answer.", Trouble.TIMEOUT), RuntimeError("a defect"), OSError(5, "input/output")])
async def test_a_look_that_fails_says_nothing_about_anybody(error: Exception) -> None:
    """`participants` is None, never an empty list."""
    bench = Bench()
    bench.list = failing(error)
    given = await bench.looked()
    assert given.participants is None
    assert given.error
    assert bench.told == [("main", "look", "failed")]


async def test_an_empty_room_is_an_answer() -> None:
    """Nobody there is something else than nobody asked."""
    bench = Bench()

    async def nobody() -> tuple[Listed, ...]:
        return ()

    bench.list = nobody
    assert (await bench.looked()).participants == ()


async def test_an_sfu_that_is_not_configured_any_more_cannot_be_asked() -> None:
    """After a reload its rooms may still be in the database."""
    bench = Bench()
    bench.reach.sfus = {}
    given = await bench.looked()
    assert given.participants is None
    assert "not configured" in given.error


# ── conditions ──


async def test_trouble_is_told_once_for_each_change() -> None:
    """A homeserver that is down for an hour is two lines, not thousands; and it does not mix with another one."""
    bench = Bench()
    with captured_log("info") as log:
        for answer in (DONE, *[Answer(Verdict.FAILED, None, "", None, "refused")] * 5, *[DONE] * 3):
            bench.act = saying(answer)
            await bench.answer()
    told = [(line["event"], line["homeserver"]) for line in map(json.loads, log.getvalue().splitlines())]
    assert told == [("homeserver_failed", "hs.test"), ("homeserver_works_again", "hs.test")]
    assert not any(bench.actions.conditions.values())


async def test_the_present_trouble_is_known() -> None:
    """For `/health/ready`: the latest words, by kind and name."""
    bench = Bench()
    bench.act = saying(Answer(Verdict.UNCERTAIN, 502, "", None, "502"))
    bench.list = failing(SfuUnavailable("It does not answer.", Trouble.TIMEOUT))
    await bench.answer()
    await bench.looked()
    bench.act = saying(Answer(Verdict.UNCERTAIN, 504, "", None, "504"))
    await bench.answer()
    assert bench.actions.conditions == {("homeserver", "hs.test"): "504", ("sfu", "main"): "It does not answer."}


@pytest.mark.parametrize("verdict", [Verdict.NOT_FOUND, Verdict.CONFLICT, Verdict.REFUSED, Verdict.LIMITED])
async def test_an_answer_is_no_trouble(verdict: Verdict) -> None:
    """A homeserver that says no works."""
    bench = Bench()
    bench.act = saying(Answer(verdict, 404, "M_NOT_FOUND", None, "404"))
    await bench.answer()
    assert not any(bench.actions.conditions.values())


async def test_another_cause_is_told_after_a_while() -> None:
    """The last warning names what is wrong now, and two causes that take turns are not a line for each try."""
    bench = Bench()
    with captured_log("info") as log:
        for detail, seconds in (("refused", 0.0), ("502", 1.0), ("refused", 1.0), ("502", 60.0)):
            bench.now += seconds
            bench.act = saying(Answer(Verdict.FAILED, None, "", None, detail))
            await bench.answer(SEND._replace(lease_ends=bench.now + 15.0))
    told = [line["problem"] for line in map(json.loads, log.getvalue().splitlines())]
    assert told == ["refused", "502"]


def turned(log: io.StringIO) -> list[str]:
    """The events in the log."""
    return [json.loads(line)["event"] for line in log.getvalue().splitlines()]


async def test_what_comes_and_goes_is_told_when_it_has_lasted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trouble and its end at once; what follows soon only when it stays so, and in the end the log says how it is."""
    monkeypatch.setattr(actions, "LASTED", 0.01)
    bench = Bench()
    bad = Answer(Verdict.FAILED, None, "", None, "refused")
    pair = ["homeserver_failed", "homeserver_works_again"]
    with captured_log("info") as log:
        for answer in (bad, DONE) * 50:
            await bench.act_once(answer)
        assert turned(log) == pair
        await bench.act_once(bad)
        async with asyncio.timeout(20.0):
            while len(turned(log)) == len(pair):  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.005)
        assert turned(log) == [*pair, "homeserver_failed"]
        bench.now += actions.RECENTLY
        await bench.act_once(DONE)
        assert turned(log) == pair * 2


# ── the end ──


async def test_at_the_end_what_is_in_flight_is_finished() -> None:
    """`finish` waits, and nothing has to be abandoned."""
    bench = Bench()
    go = asyncio.Event()

    async def slow() -> Answer:
        await go.wait()
        return DONE

    bench.act = slow
    bench.actions.carry_out(SEND)
    finishing = asyncio.create_task(bench.actions.finish(20.0))
    await asyncio.sleep(0)
    go.set()
    assert await finishing == 0
    assert len(bench.given) == 1


async def test_at_the_end_what_takes_too_long_is_abandoned() -> None:
    """No result is made up for it: its lease, or the next start, takes it up again."""
    bench = Bench()
    bench.act = never
    bench.list = never
    bench.actions.carry_out(SEND)
    bench.actions.carry_out(LOOK)
    assert await bench.actions.finish(0.01) == 2
    assert bench.given == []
    assert await bench.actions.finish(0.01) == 0


# ── application services ──

BY_TOKEN = Defect(Part.TOKEN, "it does not know the as_token", "register it there")
BY_MEMBERSHIP = Defect(Part.MEMBERSHIP, "it does not tell who is in a room", "enable MSC4502")
BY_PROXY = Defect(Part.PROXY, "it cannot reach this service", "check proxy_url")
SERVICE = ("application_service", "hs.test")


def said(log: io.StringIO) -> list[dict[str, Any]]:
    """The log but for the time, and for what every line of it has."""
    return [{key: value for key, value in json.loads(line).items() if key not in {"time", "logger", "level"}} for line in log.getvalue().splitlines()]


async def checking(bench: Bench, seconds: float, homeservers: Mapping[str, bool] | None = None) -> None:
    """So much time of checks passes, which takes none; without the homeservers those that were begun go on."""
    if homeservers is not None:
        bench.actions.check_services(homeservers)
    await asyncio.sleep(seconds)


@pytest.mark.parametrize(("passes_on", "parts"), [(True, list(Part)), (False, [Part.TOKEN])])
async def test_an_application_service_that_works_is_told_once(passes_on: bool, parts: list[Part]) -> None:
    """One line says so, and it is known for `/health/ready` and for the metrics: of what the homeserver is to do, and of nothing else. A registration
    may get lost there, so it is tried again now and then.
    """
    bench = Bench()
    with time_flies(), captured_log() as log:
        await checking(bench, 2 * actions.CHECK_SERVICE_ALWAYS + 1.0, {"hs.test": passes_on})
        assert bench.checked == [("hs.test", passes_on)] * 3
        assert said(log) == [{"event": "application_service_works", "homeserver": "hs.test", "passes_on": passes_on}]
    assert bench.actions.conditions == {SERVICE: ""}
    assert sorted(bench.told) == sorted(("hs.test", part.value, "works") for part in parts * 3)


async def test_a_registration_that_gets_lost_is_noticed() -> None:
    """Though all was well before."""
    bench = Bench()
    bench.defects["hs.test"] = [[], [BY_TOKEN]]
    with time_flies(), captured_log() as log:
        await checking(bench, actions.CHECK_SERVICE_ALWAYS + 1.0, {"hs.test": True})
        assert [line["event"] for line in said(log)] == ["application_service_works", "application_service_failed"]
    assert bench.actions.conditions == {SERVICE: BY_TOKEN.problem}


async def test_of_what_could_not_be_tried_nothing_is_told() -> None:
    """Whether the way back works, say, where the homeserver passes nothing on."""
    bench = Bench()
    bench.untried = {Part.PROXY}
    bench.defects["hs.test"] = [[BY_MEMBERSHIP]]
    with time_flies(), captured_log():
        await checking(bench, 1.0, {"hs.test": True})
    assert sorted(bench.told) == [("hs.test", "federation", "works"), ("hs.test", "membership", "broken"), ("hs.test", "token", "works")]


async def test_what_an_application_service_lacks_is_told_with_the_remedy() -> None:
    """A line for each part, once however often it is checked; as long as anything is wrong it is, in two minutes each."""
    bench = Bench()
    both = [BY_MEMBERSHIP, BY_PROXY]
    bench.defects["hs.test"] = [both, list(both), list(both), [BY_PROXY], [BY_PROXY], []]
    with time_flies(), captured_log() as log:
        await checking(bench, 1.0, {"hs.test": True})
        failed = [
            {"event": "application_service_failed", "homeserver": "hs.test", "part": one.part.value, "problem": one.problem, "remedy": one.remedy}
            for one in both
        ]
        assert said(log) == failed
        assert bench.actions.conditions == {SERVICE: "it does not tell who is in a room; it cannot reach this service"}
        assert {part: how for _, part, how in bench.told} == {
            "token": "works",
            "membership": "broken",
            "federation": "works",
            "proxy": "broken",
        }
        await checking(bench, 2 * actions.CHECK_SERVICE_AGAIN)
        assert len(bench.checked) == 3
        assert said(log) == failed
        await checking(bench, 2 * actions.CHECK_SERVICE_AGAIN)
        assert len(bench.checked) == 5
        assert said(log) == [*failed, failed[1]]
        assert bench.actions.conditions == {SERVICE: "it cannot reach this service"}
        bench.told.clear()
        await checking(bench, actions.CHECK_SERVICE_AGAIN)
        assert len(bench.checked) == 6
        assert said(log)[3:] == [{"event": "application_service_works", "homeserver": "hs.test", "passes_on": True}]
        assert bench.actions.conditions == {SERVICE: ""}
        assert {how for _, _, how in bench.told} == {"works"}


@pytest.mark.parametrize(
    ("trouble", "pause"),
    [
        (CannotAsk("it answers 502"), actions.CHECK_SERVICE_SOON),
        (never, actions.CHECK_SERVICE_SOON + 30.0),
    ],
    ids=["cannot ask", "hangs"],
)
async def test_a_homeserver_that_does_not_answer_is_asked_again_silently(trouble: Any, pause: float) -> None:
    """That it does not is told elsewhere. What was known of its application service stays."""
    bench = Bench()
    bench.defects["hs.test"] = [trouble, trouble, [BY_TOKEN], trouble, []]
    with time_flies(), captured_log() as log:
        await checking(bench, 2 * pause - 1.0, {"hs.test": True})
        assert (len(bench.checked), said(log), bench.actions.conditions, bench.told) == (2, [], {}, [])
        await checking(bench, 2.0)
        assert [line["event"] for line in said(log)] == ["application_service_failed"]
        await checking(bench, actions.CHECK_SERVICE_AGAIN)
        assert len(bench.checked) == 4
        assert bench.actions.conditions == {SERVICE: BY_TOKEN.problem}
        await checking(bench, pause)
        assert [line["event"] for line in said(log)] == ["application_service_failed", "application_service_works"]


async def test_a_homeserver_that_is_not_found_is_looked_for_again_silently() -> None:
    """Until it is."""
    bench = Bench()
    bench.resolve = failing(DiscoveryFailed("there is no .well-known"))
    with time_flies(), captured_log() as log:
        await checking(bench, 5 * actions.CHECK_SERVICE_SOON, {"hs.test": True})
        assert (bench.checked, said(log), bench.actions.conditions) == ([], [], {})
        bench.resolve = bench._found
        await checking(bench, actions.CHECK_SERVICE_SOON)
        assert [line["event"] for line in said(log)] == ["application_service_works"]


async def test_a_defect_of_ours_does_not_end_the_checks() -> None:
    """It is told without its text, and tried again."""
    bench = Bench()
    bench.defects["hs.test"] = [RuntimeError("holds as-secret"), []]
    with time_flies(), captured_log() as log:
        await checking(bench, 2 * actions.CHECK_SERVICE_AGAIN, {"hs.test": True})
        assert [line["event"] for line in said(log)] == ["check_failed", "application_service_works"]
        assert said(log)[0]["error"] == "RuntimeError"
        assert "as-secret" not in log.getvalue()


async def test_homeservers_are_checked_each_for_itself() -> None:
    """One that hangs does not keep the other one's from being told, nor are their troubles mixed."""
    bench = Bench()
    bench.defects = {"hs.test": [never], "other.test": [[BY_PROXY]]}
    with time_flies(), captured_log() as log:
        await checking(bench, 1.0, {"hs.test": True, "other.test": True})
        assert [(line["event"], line["homeserver"]) for line in said(log)] == [("application_service_failed", "other.test")]
        assert bench.actions.conditions == {("application_service", "other.test"): BY_PROXY.problem}


async def test_a_reload_checks_anew_and_tells_what_there_is() -> None:
    """Also what had worked and was not checked any more, and what is known already; the checks from before do not go on beside."""
    bench = Bench()
    bench.defects["hs.test"] = [[], [], [BY_TOKEN]]
    with time_flies(), captured_log() as log:
        for _ in range(2):
            await checking(bench, 1.0, {"hs.test": True})
        assert [line["event"] for line in said(log)] == ["application_service_works"] * 2
        for _ in range(2):
            await checking(bench, 1.0, {"hs.test": True})
            assert bench.actions.conditions == {SERVICE: BY_TOKEN.problem}
        told = [*["application_service_works"] * 2, *["application_service_failed"] * 2]
        assert [line["event"] for line in said(log)] == told
        bench.checked.clear()
        await checking(bench, 5 * actions.CHECK_SERVICE_AGAIN + 1.0)
        assert len(bench.checked) == 5
        assert len(said(log)) == len(told)


async def test_an_application_service_that_is_configured_no_more_is_forgotten() -> None:
    """It is not checked any more, and not in trouble; others are."""
    bench = Bench()
    bench.defects = {"hs.test": [[BY_TOKEN]], "other.test": [[BY_PROXY]]}
    with time_flies(), captured_log() as log:
        await checking(bench, 1.0, {"hs.test": True, "other.test": True})
        await checking(bench, 1.0, {"other.test": True})
        assert bench.actions.conditions == {("application_service", "other.test"): BY_PROXY.problem}
        bench.checked.clear()
        await checking(bench, 3600.0)
        assert {name for name, _ in bench.checked} == {"other.test"}
        assert [line["homeserver"] for line in said(log)] == ["hs.test", "other.test", "other.test"]


async def test_at_the_end_nothing_is_checked_any_more() -> None:
    """And nobody waits for a homeserver that hangs."""
    bench = Bench()
    bench.defects = {"hs.test": [[BY_TOKEN]], "other.test": [never]}
    with time_flies():
        await checking(bench, 1.0, {"hs.test": True, "other.test": True})
        assert await bench.actions.finish(20.0) == 0
        bench.checked.clear()
        await checking(bench, 3600.0)
        assert bench.checked == []


@contextmanager
def in_time(bench: Bench) -> Iterator[None]:
    """Time flies, and the daemon's clock goes with it."""
    loop = asyncio.get_running_loop()
    with time_flies():
        began = loop.time()
        bench.actions._clock = lambda: NOW + loop.time() - began
        yield


async def test_who_was_in_trouble_and_is_not_asked_any_more_is_checked_again() -> None:
    """A homeserver and an SFU that came back while there was nothing to do there: it is noticed; and who works is left alone."""
    bench = Bench()
    bench.trouble = "no connection"
    bench.list = failing(SfuUnavailable("no connection", Trouble.CONNECTION))
    with captured_log() as log, in_time(bench):
        bench.actions.check(["hs.test"], ["main"])
        await asyncio.sleep(3600.0)
        assert bench.actions.conditions == {("homeserver", "hs.test"): "no connection", ("sfu", "main"): "no connection"}
        asked = len(bench.looked_after)
        assert 20 < asked <= 60
        bench.trouble = ""
        bench.list = bench._people
        await asyncio.sleep(actions.CHECK_AFTER + 2 * actions.CHECK_EVERY)
        assert bench.actions.conditions == {("homeserver", "hs.test"): "", ("sfu", "main"): ""}
        asked = len(bench.looked_after)
        await asyncio.sleep(3600.0)
        assert len(bench.looked_after) == asked
        assert await bench.actions.finish(20.0) == 0
        assert [line["event"] for line in map(json.loads, log.getvalue().splitlines())] == [
            *("homeserver_failed", "sfu_failed"),
            *("homeserver_works_again", "sfu_works_again"),
        ]


async def test_the_trouble_of_one_that_is_not_configured_by_name_is_forgotten() -> None:
    """A homeserver of a pattern, whose users are gone: its trouble would degrade the status for ever. Who is still asked stays in trouble."""
    bench = Bench()
    failed = Answer(Verdict.FAILED, 502, "", None, "502")
    with captured_log() as log, in_time(bench):
        bench.actions.check([], [])
        for _ in range(5):
            await bench.act_once(failed)
            await asyncio.sleep(actions.FORGOTTEN_AFTER - 1.0)
        assert bench.actions.conditions == {("homeserver", "hs.test"): "502"}
        await asyncio.sleep(2 * actions.CHECK_EVERY)
        assert bench.actions.conditions == {}
        assert bench.looked_after == []
        await bench.act_once(failed)
        assert bench.actions.conditions == {("homeserver", "hs.test"): "502"}
        await bench.actions.finish(20.0)
    lines = [json.loads(line)["event"] for line in log.getvalue().splitlines()]
    assert lines.count("homeserver_failed") == 2


async def test_who_is_asked_anyway_or_is_configured_no_more_is_not_checked_again() -> None:
    """What real requests say counts, and /versions may work where they do not."""
    bench = Bench()
    failed = Answer(Verdict.FAILED, 502, "", None, "502")
    with in_time(bench):
        bench.actions.check(["hs.test"], [])
        await asyncio.sleep(1.0)
        for _ in range(30):
            await bench.act_once(failed)
            await asyncio.sleep(actions.CHECK_AFTER - 1.0)
        assert bench.looked_after == ["hs.test"]
        assert bench.actions.conditions["homeserver", "hs.test"] == "502"
        bench.actions.check([], [])
        await asyncio.sleep(3600.0)
        assert bench.looked_after == ["hs.test"]
        await bench.actions.finish(20.0)
