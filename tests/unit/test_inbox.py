"""The bridge to the engine: what comes while a step runs is one batch, nothing that was handed in is lost, and nothing stops the loop."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.daemon import inbox as module
from sfu_delegate.daemon.inbox import Inbox
from sfu_delegate.delegation.model import (
    Accept,
    Action,
    Answered,
    DelayedEvent,
    Find,
    Input,
    Lane,
    Looked,
    Missed,
    NewEvent,
    OnEnd,
    State,
    Task,
    Verdict,
)
from sfu_delegate.delegation.replies import Reply, TooMany, Touched
from sfu_delegate.delegation.urgency import Limit
from sfu_delegate.engine import Change, Engine, Step
from sfu_delegate.store.base import Disk, StoreUnavailable

from tests.integration.daemon import captured_log
from tests.rows import joined, row

NOW = 1000.0
GENEROUS = 20.0  # seconds until a test gives up


class FakeStore:
    """Counts the housekeeping."""

    def __init__(self) -> None:
        self.idled = 0
        self.error: Exception | None = None

    def idle(self) -> None:
        self.idled += 1
        if self.error is not None:
            raise self.error

    def disk(self) -> Disk:
        return Disk(1000, 2000)

    is_log_large = False


class FakeEngine:
    """An engine whose steps wait at a gate, and do what a test says."""

    def __init__(self) -> None:
        self.store = FakeStore()
        self.stopping = False
        self.steps: list[list[Input]] = []
        self.heard: list[Answered] = []  # what was told to have come back
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []  # raised by the next steps, one each
        self.reply: Callable[[Input], Reply | Exception] = lambda _: Touched(1)
        self.tasks: list[Task] = []
        self.changes: list[Change] = []
        self.wakes: list[float] = []
        self.hurry = False
        self.company = 0
        self.waits = False  # does it tell that it waits for the disk?
        self.kept_alive = 0
        self.keep_alive_error: Exception | None = None

    def step(self, inputs: Sequence[Input], now: float, *, answered: Sequence[Answered], about_to_wait: Callable[[], object]) -> Step:
        self.steps.append(list(inputs))
        self.heard += answered
        self.threads.add(threading.current_thread().name)
        if self.waits:
            about_to_wait()
        assert self.gate.wait(GENEROUS)
        if self.errors:
            raise self.errors.pop(0)
        tasks, self.tasks = self.tasks, []
        changes, self.changes = self.changes, []
        wake = self.wakes.pop(0) if self.wakes else None
        return Step([self.reply(given) for given in inputs], tasks, wake, changes, [], hurry=self.hurry, company=self.company)

    def backlog(self, now: float) -> dict[tuple[str, Lane], tuple[int, float]]:
        return {("hs.test", Lane.END): (3, now)}

    def waiting_since(self) -> dict[str, float]:
        return {"hs.test": NOW - 9.0}

    def keep_alive(self, now: float) -> list[Task]:
        self.kept_alive += 1
        if self.keep_alive_error is not None:
            raise self.keep_alive_error
        return [Task(Action.RESTART, 5, 1, "main", "room", "hs.test")]

    def forecast(self, now: float) -> dict[str, float]:
        return {"hs.test": 7.0}

    def rates(self) -> dict[str, tuple[Limit, float]]:
        return {"hs.test": (Limit.SOME, 2.0)}

    @property
    def batches(self) -> list[list[Input]]:
        """The steps that had inputs."""
        return [step for step in self.steps if step]


class Watched:
    """What the observer was told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.backlogs: list[int] = []
        self.waiting: list[dict[str, float]] = []
        self.disks: list[Disk | None] = []
        self.forecasts: list[tuple[dict[str, float], dict[str, tuple[Limit, float]]]] = []
        self.works: list[bool] = []

    def step(self, step: Step, inputs: int, seconds: float, now: float) -> None:
        self.steps.append(inputs)

    def backlog(self, counted: dict[tuple[str, Lane], tuple[int, float]], now: float) -> None:
        self.backlogs += [count for count, _ in counted.values()]

    def waiting_since(self, departures: Mapping[str, float], now: float) -> None:
        self.waiting.append(dict(departures))

    def disk(self, disk: Disk | None) -> None:
        self.disks.append(disk)

    def forecast(self, lateness: Mapping[str, float], rates: Mapping[str, tuple[Limit, float]]) -> None:
        self.forecasts.append((dict(lateness), dict(rates)))

    def store(self, *, works: bool) -> None:
        self.works.append(works)


class Bench:
    """An inbox with everything around it made up."""

    def __init__(self, most: int = 100) -> None:
        self.engine = FakeEngine()
        self.watched = Watched()
        self.carried: list[Task] = []
        self.now = NOW
        self.inbox = Inbox(cast(Engine, self.engine), lambda: self.now, self.carried.append, self.watched, most)
        self.loop_task = asyncio.create_task(self.inbox.run())

    async def busy(self, first: Input) -> "asyncio.Task[Reply]":
        """Have the engine work at `first`, until the gate is opened."""
        await until(lambda: bool(self.engine.steps))
        await self.inbox.in_thread(lambda: None)  # the first, empty step is over
        self.engine.gate.clear()
        task = asyncio.create_task(self.inbox.put(first))
        await until(lambda: [first] in self.engine.steps)
        return task


def trouble(it: Bench) -> str | None:
    return it.inbox.trouble


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(GENEROUS):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


@asynccontextmanager
async def bench(most: int = 100) -> AsyncIterator[Bench]:
    made = Bench(most)
    try:
        yield made
    finally:
        made.engine.gate.set()
        made.inbox.stop()
        made.inbox.flush()
        async with asyncio.timeout(GENEROUS):
            await made.loop_task
        assert await made.inbox.close(lambda: None, GENEROUS)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long pauses."""
    monkeypatch.setattr(module, "BROKEN_PAUSE", 0.01)


@pytest.fixture
def nothing_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle inbox makes no step, which would take every answer, and answers wait for company without end."""
    monkeypatch.setattr(module, "LONGEST_SLEEP", 1000.0)
    monkeypatch.setattr(module, "LINGER", 1000.0)


def answered(event: int = 1) -> Answered:
    return Answered("hs.test", event, 1, Action.SEND, NOW, Verdict.DONE)


def telling_failed(log: str) -> list[str]:
    """The types of the errors of whoever could not be told. Their texts are nowhere in the log."""
    assert "hunter2" not in log
    return [line["error"] for line in map(json.loads, log.splitlines()) if line["event"] == "telling_failed"]


# ── batches ──


async def test_an_input_is_answered_with_its_reply() -> None:
    """And the engine works in a thread of its own, always the same."""
    async with bench() as it:
        it.engine.reply = lambda given: Touched(len(cast(Find, given).delegation))
        assert await it.inbox.put(Find("four")) == Touched(4)
        assert await it.inbox.put(Find("seventy")) == Touched(7)
        assert it.engine.threads == {"engine"}
        assert it.inbox.now() == NOW


async def test_what_comes_while_a_step_runs_is_the_next_batch() -> None:
    """One transaction serves all that gathered, in their order."""
    async with bench() as it:
        first = await it.busy(Find("first"))
        others = [asyncio.create_task(it.inbox.put(Find(f"other{n}"))) for n in range(5)]
        await asyncio.sleep(0)
        assert it.engine.batches == [[Find("first")]]
        it.engine.gate.set()
        assert await asyncio.gather(first, *others) == [Touched(1)] * 6
        assert it.engine.batches == [[Find("first")], [Find(f"other{n}") for n in range(5)]]
        await until(lambda: it.watched.steps[-1] == 5)


async def test_answers_wait_for_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for them, and departures do not either; the engine hears at once that their places are free. Some come along when they are many,
    in the order of their rows."""
    monkeypatch.setattr(module, "LINGER", 1000.0)
    monkeypatch.setattr(module, "COMPANY", 4)
    monkeypatch.setattr(module, "FEW", 2)
    async with bench() as it:
        await until(lambda: bool(it.engine.steps))
        for n in (3, 2, 1):
            it.inbox.hand_in(answered(n))
        await it.inbox.in_thread(lambda: None)
        assert it.engine.batches == []
        await it.inbox.put(Find("somebody"))
        assert it.engine.batches == [[Find("somebody")]]
        assert it.engine.heard == [answered(3), answered(2), answered(1)]
        it.inbox.hand_in(answered(4))
        await it.inbox.put(Find("another"))
        assert it.engine.batches[1] == [Find("another"), answered(2), answered(3)]
        assert it.engine.heard == [answered(3), answered(2), answered(1), answered(4)]
        await it.inbox.put(Find("a third"))
        assert it.engine.batches[2] == [Find("a third")]


async def test_a_large_batch_takes_as_many_answers_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they do not become more and more."""
    monkeypatch.setattr(module, "LINGER", 1000.0)
    monkeypatch.setattr(module, "COMPANY", 4)
    monkeypatch.setattr(module, "FEW", 1)
    async with bench() as it:
        first = await it.busy(Find("first"))
        others = [asyncio.create_task(it.inbox.put(Find(f"other{n}"))) for n in range(3)]
        await asyncio.sleep(0)
        for n in range(9):
            it.inbox.hand_in(answered(n))
        it.engine.gate.set()
        await asyncio.gather(first, *others)
        assert it.engine.batches[1] == [*(Find(f"other{n}") for n in range(3)), *(answered(n) for n in range(3))]


async def test_an_answer_without_company_does_not_wait_for_long() -> None:
    """It is taken by itself after a moment."""
    async with bench() as it:
        await until(lambda: bool(it.engine.steps))
        it.inbox.hand_in(answered())
        await until(lambda: it.engine.batches == [[answered()]])


async def test_an_answer_whose_place_is_needed_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is a look, which may be what somebody's departure waits for."""
    monkeypatch.setattr(module, "LINGER", 1000.0)
    async with bench() as it:
        look = Looked("main", "room", 1, NOW, ())
        await until(lambda: bool(it.engine.steps))
        it.inbox.hand_in(look)
        await until(lambda: it.engine.batches == [[look]])
        it.engine.hurry = True
        await it.inbox.put(Find("a departure that waits for a place"))
        it.inbox.hand_in(answered())
        await until(lambda: it.engine.batches[-1] == [answered()])


@pytest.mark.usefixtures("nothing_by_itself")
async def test_as_many_answers_as_free_half_of_the_places_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine says how many these are where something waits for the places; fewer do not make a step."""
    monkeypatch.setattr(module, "LINGER_CROWDED", 1000.0)
    async with bench() as it:
        await until(lambda: bool(it.engine.steps))
        it.engine.company = 2
        await it.inbox.put(Find("a restart that waits for a place"))
        it.inbox.hand_in(answered(1))
        await asyncio.sleep(0)
        await it.inbox.in_thread(lambda: None)
        assert it.engine.batches == [[Find("a restart that waits for a place")]]
        it.inbox.hand_in(answered(2))
        await until(lambda: it.engine.batches[1:] == [[answered(1), answered(2)]])


@pytest.mark.usefixtures("nothing_by_itself")
async def test_an_answer_without_company_does_not_linger_where_something_waits_for_its_place() -> None:
    """It is taken by itself after LINGER_CROWDED."""
    async with bench() as it:
        await until(lambda: bool(it.engine.steps))
        it.engine.company = 2
        await it.inbox.put(Find("a restart that waits for a place"))
        it.inbox.hand_in(answered())
        await until(lambda: it.engine.batches[1:] == [[answered()]])


@pytest.mark.usefixtures("nothing_by_itself")
async def test_answers_that_linger_already_do_so_no_longer_once_something_waits_for_their_places() -> None:
    """They began to when nothing did, and would go on for LINGER."""
    async with bench() as it:
        await until(lambda: bool(it.engine.steps))
        it.inbox.hand_in(answered())
        it.engine.company = 2
        await it.inbox.put(Find("a restart that waits for a place"))
        assert it.engine.batches == [[Find("a restart that waits for a place")]]
        await until(lambda: it.engine.batches[1:] == [[answered()]])


@pytest.mark.usefixtures("nothing_by_itself")
async def test_answers_that_are_left_over_do_not_linger_where_something_waits_for_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """More had come than go into one step; the rest is taken soon after it, by itself."""
    monkeypatch.setattr(module, "FEW", 1)
    monkeypatch.setattr(module, "COMPANY", 2)
    async with bench() as it:
        it.engine.company = 4
        first = await it.busy(Find("first"))
        other = asyncio.create_task(it.inbox.put(Find("other")))
        await asyncio.sleep(0)
        for n in range(3):
            it.inbox.hand_in(answered(n))
        it.engine.gate.set()
        await asyncio.gather(first, other)
        await until(lambda: sum(answered(n) in batch for batch in it.engine.batches for n in range(3)) == 3)


@pytest.mark.usefixtures("nothing_by_itself")
async def test_steps_that_come_all_the_time_do_not_put_answers_off() -> None:
    """Each of them says that something waits, and the time that an answer has waited already goes on to count."""
    async with bench() as it:
        it.engine.company = 2
        await it.inbox.put(Find("first"))
        it.inbox.hand_in(answered())
        async with asyncio.timeout(GENEROUS):
            while not any(answered() in batch for batch in it.engine.batches):
                await it.inbox.put(Find("another"))


async def test_while_the_engine_waits_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not before: while it computes, both would compete for the interpreter. A step that is over without waiting is over."""
    monkeypatch.setattr(module, "GIVE_WAY", 1000.0)
    async with bench() as it:
        await until(lambda: bool(it.engine.steps))
        assert await it.inbox.put(Find("no wait")) == Touched(1)
        it.engine.waits = True
        first = await it.busy(Find("waits"))  # would hang here
        it.engine.gate.set()
        assert await first == Touched(1)
        it.engine.errors.append(RuntimeError("a defect"))
        with pytest.raises(RuntimeError, match="a defect"):
            await it.inbox.put(Find("fails"))


async def test_an_engine_that_computes_for_long_does_not_hold_up_the_loop() -> None:
    """A hung disk may be met in the middle of a step, too."""
    async with bench() as it:
        first = await it.busy(Find("computes"))  # would hang here
        it.engine.gate.set()
        assert await first == Touched(1)


async def test_a_batch_is_not_larger_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody waits for long; the rest is the next one."""
    monkeypatch.setattr(module, "BATCH", 2)
    async with bench() as it:
        first = await it.busy(Find("first"))
        others = [asyncio.create_task(it.inbox.put(Find(f"other{n}"))) for n in range(5)]
        await asyncio.sleep(0)
        it.engine.gate.set()
        await asyncio.gather(first, *others)
        assert [len(batch) for batch in it.engine.batches] == [1, 2, 2, 1]


async def test_the_error_of_one_is_not_the_others() -> None:
    """Each gets its own reply; an error that nobody waits for is a line in the log."""
    async with bench() as it:
        too_many = TooMany("delegations.max_per_participant", 4, "Too many.")
        it.engine.reply = lambda given: Touched(1) if given == Find("good") else too_many
        first = await it.busy(Find("good"))
        good, bad = asyncio.create_task(it.inbox.put(Find("good"))), asyncio.create_task(it.inbox.put(Find("bad")))
        await asyncio.sleep(0)
        it.inbox.hand_in(answered())
        it.engine.gate.set()
        assert (await first, await good) == (Touched(1), Touched(1))
        with pytest.raises(TooMany):
            await bad


async def test_who_hung_up_is_left_alone() -> None:
    """A caller that was cancelled while its input was worked at disturbs nobody."""
    async with bench() as it:
        first = await it.busy(Find("first"))
        second = asyncio.create_task(it.inbox.put(Find("second")))
        await asyncio.sleep(0)
        first.cancel()
        it.engine.gate.set()
        assert await second == Touched(1)


async def test_tasks_are_carried_out() -> None:
    """What the engine claimed is handed over at once."""
    async with bench() as it:
        task = Task(Action.SEND, 1, 1, "main", "room", "hs.test")
        it.engine.tasks = [task]
        await it.inbox.put(Find("first"))
        assert it.carried == [task]


async def test_it_steps_by_itself_when_something_is_due() -> None:
    """At the time that the engine named, without any input."""
    async with bench() as it:
        await until(lambda: len(it.engine.steps) == 1)
        it.engine.wakes = [NOW - 1.0, NOW, NOW + 0.01]
        await it.inbox.put(Find("first"))
        await until(lambda: len(it.engine.steps) >= 4)
        assert it.engine.batches == [[Find("first")]]


# ── limits ──


async def test_a_full_inbox_refuses_the_next() -> None:
    """Overloaded, with a time to come back; what is worked at does not count, and afterwards there is room again."""
    async with bench(most=2) as it:
        first = await it.busy(Find("first"))
        waiting = [asyncio.create_task(it.inbox.put(Find(f"other{n}"))) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await it.inbox.put(Find("one too many"))
        assert refused.value.retry_after > 0
        it.inbox.hand_in(answered())  # never refused
        it.engine.gate.set()
        await asyncio.gather(first, *waiting)
        assert await it.inbox.put(Find("again")) == Touched(1)
        await until(lambda: any(answered() in batch for batch in it.engine.batches))


# ── a database that does not work ──


async def test_a_broken_database_refuses_whoever_waits() -> None:
    """Unavailable, with a time to come back; as soon as it works again, everything goes on."""
    async with bench() as it:
        it.engine.errors = []
        await until(lambda: len(it.engine.steps) == 1)
        it.engine.errors = [StoreUnavailable("The disk is full.")]
        with pytest.raises(Unavailable) as refused:
            await it.inbox.put(Find("first"))
        assert refused.value.retry_after > 0
        assert trouble(it) == "The disk is full."
        assert await it.inbox.put(Find("second")) == Touched(1)
        assert trouble(it) is None
        assert Find("first") not in it.engine.steps[-1]


async def test_results_outlive_a_broken_database() -> None:
    """What became of an action is handed in until it is kept, in the order in which it came."""
    async with bench() as it:
        await until(lambda: len(it.engine.steps) == 1)
        it.engine.errors = [StoreUnavailable("The disk is full.") for _ in range(3)]
        look = Looked("main", "room", 1, NOW, ())
        it.inbox.hand_in(answered(1))
        it.inbox.hand_in(look)
        await until(lambda: not it.engine.errors)
        it.inbox.hand_in(answered(2))
        await until(lambda: any(answered(2) in step for step in it.engine.steps))
        assert all(look in batch for batch in it.engine.batches[:3])
        kept = [given for batch in it.engine.batches[3:] for given in batch]
        assert (kept.count(look), kept.count(answered(1)), kept.count(answered(2))) == (1, 1, 1)
        assert kept.index(answered(1)) < kept.index(answered(2))
        await until(lambda: it.watched.works[-1])
        assert it.watched.works.count(False) == 3


async def test_who_is_connected_is_kept_alive_while_nothing_can_be_stored() -> None:
    """What the engine names then is carried out, at every failed step; where it cannot even read, the loop goes on all the same."""
    async with bench() as it:
        await until(lambda: len(it.engine.steps) == 1)
        assert it.engine.kept_alive == 0
        it.engine.errors = [StoreUnavailable("The disk is full.") for _ in range(2)]
        for n in (1, 2):
            with pytest.raises(Unavailable):
                await it.inbox.put(Find(f"{n}"))
            await until(lambda n=n: len(it.carried) >= n)  # type: ignore[misc]
        assert {task.action for task in it.carried} == {Action.RESTART}
        carried = len(it.carried)
        it.engine.keep_alive_error = StoreUnavailable("The disk is gone.")
        it.engine.errors = [StoreUnavailable("The disk is gone.")]
        with pytest.raises(Unavailable):
            await it.inbox.put(Find("3"))
        assert await it.inbox.put(Find("4")) == Touched(1)
        assert len(it.carried) == carried


async def test_housekeeping_that_fails_does_not_stop_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint on a full disk is trouble, and the next step shows that it is over."""
    monkeypatch.setattr(module, "IDLE_AFTER", 0.01)
    async with bench() as it:
        it.engine.store.error = StoreUnavailable("The disk is full.")
        await until(lambda: it.engine.store.idled > 0)
        await until(lambda: it.inbox.trouble is not None)
        assert await it.inbox.put(Find("first")) == Touched(1)


async def test_the_backlog_is_counted_when_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In idle times, and now and then under load; with it, whether restarts will be late."""
    monkeypatch.setattr(module, "IDLE_AFTER", 0.01)
    async with bench() as it:
        await until(lambda: it.engine.store.idled > 0 and bool(it.watched.backlogs))
        counted = len(it.watched.backlogs)
        it.now += module.SURVEY_EVERY
        await it.inbox.put(Find("first"))
        await until(lambda: len(it.watched.backlogs) > counted)
        assert it.watched.waiting[-1:] == [{"hs.test": NOW - 9.0}]
        assert it.watched.disks[-1:] == [Disk(1000, 2000)]
        await until(lambda: it.watched.forecasts[-1:] == [({"hs.test": 7.0}, {"hs.test": (Limit.SOME, 2.0)})])


# ── webhooks that may be lost ──


def missed(it: Bench) -> int:
    return sum(isinstance(given, Missed) for step in it.engine.steps for given in step)


async def test_when_webhooks_were_refused_the_rooms_are_looked_at() -> None:
    """The database did not take one: LiveKit tries again for a while only. Once, and not before the database works again."""
    async with bench() as it:
        await until(lambda: len(it.engine.steps) == 1)
        it.engine.errors = [StoreUnavailable("The disk is full.") for _ in range(3)]
        for _ in range(2):
            with pytest.raises(Unavailable):
                await it.inbox.put(joined())
            assert missed(it) == 0
        await until(lambda: missed(it) == 1)
        assert not it.engine.errors
        for n in range(3):
            await it.inbox.put(Find(f"{n}"))
        assert missed(it) == 1


async def test_when_the_inbox_was_full_for_webhooks_the_rooms_are_looked_at() -> None:
    """As soon as there is room again."""
    async with bench(most=1) as it:
        first = await it.busy(Find("first"))
        waiting = asyncio.create_task(it.inbox.put(Find("other")))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await it.inbox.put(joined())
        it.engine.gate.set()
        await asyncio.gather(first, waiting)
        await until(lambda: missed(it) == 1)


async def test_other_requests_that_were_refused_are_no_reason_to_look() -> None:
    """Their clients know."""
    async with bench(most=1) as it:
        first = await it.busy(Find("first"))
        waiting = asyncio.create_task(it.inbox.put(Find("other")))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await it.inbox.put(Find("one too many"))
        it.engine.gate.set()
        await asyncio.gather(first, waiting)
        await it.inbox.put(Find("again"))
        assert missed(it) == 0


async def test_a_machine_that_slept_looks_at_the_rooms() -> None:
    """The clock went on, and the loop did not; a little lateness is none."""
    async with bench() as it:
        await it.inbox.put(Find("first"))
        it.now += module.LONGEST_SLEEP + module.STOOD_STILL - 1.0
        await it.inbox.put(Find("second"))
        assert missed(it) == 0
        it.now += module.LONGEST_SLEEP + module.STOOD_STILL + 1.0
        await it.inbox.put(Find("third"))
        await until(lambda: missed(it) == 1)
        await it.inbox.put(Find("fourth"))
        assert missed(it) == 1


async def test_a_database_that_hangs_is_no_machine_that_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    """This thread goes on meanwhile, and time with it."""
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    with captured_log() as log:
        async with bench() as it:
            first = await it.busy(Find("first"))
            for _ in range(10):
                it.now += module.LONGEST_SLEEP
                await asyncio.sleep(0.05)
            it.engine.gate.set()
            with pytest.raises(Unavailable):
                await first
            await until(lambda: it.inbox.trouble is None)
            assert missed(it) == 0
    assert "stood_still" not in log.getvalue()


async def test_while_a_database_hangs_whoever_comes_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a step that failed: until one has been kept."""
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    async with bench() as it:
        first = await it.busy(Find("first"))
        with pytest.raises(Unavailable):
            await first
        it.engine.errors = [StoreUnavailable("cut")] * 1000
        it.engine.gate.set()
        await until(lambda: len(it.engine.errors) < 999)
        with pytest.raises(Unavailable):
            await it.inbox.put(Find("second"))
        assert not any(Find("second") in step for step in it.engine.steps)
        it.engine.errors.clear()
        await until(lambda: it.inbox.trouble is None)
        assert await it.inbox.put(Find("third")) == Touched(1)


# ── defects ──


async def test_a_defect_of_the_engine_does_not_stop_the_loop() -> None:
    """Whoever waits gets the exception, and the next input is worked at."""
    async with bench() as it:
        await until(lambda: len(it.engine.steps) == 1)
        it.engine.errors = [RuntimeError("a defect")]
        with pytest.raises(RuntimeError):
            await it.inbox.put(Find("first"))
        assert await it.inbox.put(Find("second")) == Touched(1)
        assert not it.loop_task.done()


def cannot_be_told(_: object) -> None:
    """A caller that raises when it is told anything."""
    raise KeyError("hunter2")


@pytest.mark.parametrize(
    ("errors", "reply"),
    [([], Touched), ([StoreUnavailable("The disk is full.")], Unavailable), ([RuntimeError("a defect")], RuntimeError)],
    ids=["kept", "refused", "failed"],
)
async def test_a_caller_that_cannot_be_told_is_not_the_others(errors: list[Exception], reply: type) -> None:
    """Whatever its batch came to: the others of it are told, the loop goes on, and the log has a line without the error's text."""
    with captured_log() as log:
        async with bench() as it:
            await until(lambda: bool(it.engine.steps))
            await it.inbox.in_thread(lambda: None)
            it.engine.errors = list(errors)
            told: list[Reply | Exception] = []
            it.inbox.hand(Find("bad"), cannot_be_told)
            it.inbox.hand(Find("good"), told.append)
            await until(lambda: bool(told))
            assert [type(each) for each in told] == [reply]
            assert it.engine.batches == [[Find("bad"), Find("good")]]
            assert await it.inbox.put(Find("next")) == Touched(1)
            assert not it.loop_task.done()
        assert telling_failed(log.getvalue()) == ["KeyError"]


async def test_a_caller_that_cannot_be_told_that_its_input_alone_failed_is_not_the_others() -> None:
    """The database failed for that one."""
    with captured_log() as log:
        async with bench() as it:
            await until(lambda: bool(it.engine.steps))
            it.engine.reply = lambda given: StoreUnavailable("The disk is full.") if given == Find("bad") else Touched(1)
            told: list[Reply | Exception] = []
            it.inbox.hand(Find("bad"), cannot_be_told)
            it.inbox.hand(Find("good"), told.append)
            await until(lambda: bool(told))
            assert told == [Touched(1)]
            assert await it.inbox.put(Find("next")) == Touched(1)
        assert telling_failed(log.getvalue()) == ["KeyError"]


async def test_a_caller_that_cannot_be_told_that_it_is_refused_does_no_harm() -> None:
    """Whoever hands in does not get the exception, be the inbox full or stopping."""
    with captured_log() as log:
        async with bench(most=1) as it:
            first = await it.busy(Find("first"))
            waiting = asyncio.create_task(it.inbox.put(Find("other")))
            await asyncio.sleep(0)
            it.inbox.hand(Find("one too many"), cannot_be_told)
            assert telling_failed(log.getvalue()) == ["KeyError"]
            it.engine.gate.set()
            await asyncio.gather(first, waiting)
            it.inbox.stop()
            it.inbox.hand(Find("too late"), cannot_be_told)
        assert telling_failed(log.getvalue()) == ["KeyError"] * 2


async def test_a_caller_that_cannot_be_told_that_the_database_hangs_is_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those behind it are refused all the same, and when the database works again everything goes on."""
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    with captured_log() as log:
        async with bench() as it:
            first = await it.busy(Find("first"))
            it.inbox.hand(Find("bad"), cannot_be_told)
            behind = asyncio.create_task(it.inbox.put(Find("behind it")))
            for refused in (first, behind):
                with pytest.raises(Unavailable):
                    await asyncio.wait_for(refused, GENEROUS)
            it.engine.gate.set()
            await until(lambda: it.engine.batches[-1] == [Find("bad"), Find("behind it")])
            await until(lambda: it.inbox.trouble is None)
            assert await it.inbox.put(Find("next")) == Touched(1)
        assert telling_failed(log.getvalue()) == ["KeyError"]


# ── watches ──


def change(new: DelayedEvent) -> Change:
    return Change(None, new, Accept(new.delegation, "main", "room", "alice", "hs.test", (NewEvent("d", 60.0, OnEnd.SEND),)))


async def test_a_watch_sees_its_delegation_being_verified() -> None:
    """It waits until each of its events is verified; other delegations are nothing to it."""
    async with bench() as it:
        with it.inbox.watch("D1") as watch:
            waiting = asyncio.create_task(watch.until_decided({1, 2}, GENEROUS))
            for new in (row(id=1, verified_at=None), row(id=2), row(id=3, delegation="D2")):
                it.engine.changes = [change(new)]
                await it.inbox.put(Find("x"))
            assert not waiting.done()
            it.engine.changes = [change(row(id=1))]
            await it.inbox.put(Find("x"))
            assert await waiting is True
            assert set(watch.rows) == {1, 2}


async def test_a_watch_sees_a_refusal_at_once() -> None:
    """One event that ended without having been verified decides for all."""
    async with bench() as it:
        with it.inbox.watch("D1") as watch:
            it.engine.changes = [change(row(id=2, state=State.DONE, verified_at=None, finished_at=NOW))]
            await it.inbox.put(Find("x"))
            assert await watch.until_decided({1, 2}, GENEROUS) is True
            assert watch.rows[2].finished_at == NOW


async def test_a_watch_does_not_wait_for_ever() -> None:
    """Nothing happened in time: False. Nothing waits, and it is false at once."""
    async with bench() as it:
        with it.inbox.watch("D1") as watch:
            assert await watch.until_decided({1}, 0.01) is False
            assert await watch.until_decided({1}, 0.0) is False


async def test_two_may_watch_the_same_delegation() -> None:
    """And the end of one watch is not the end of the other."""
    async with bench() as it:
        with it.inbox.watch("D1") as one:
            with it.inbox.watch("D1") as other:
                pass
            it.engine.changes = [change(row(id=1))]
            await it.inbox.put(Find("x"))
            assert await one.until_decided({1}, GENEROUS) is True
            assert not other.rows
        it.engine.changes = [change(row(id=5))]
        await it.inbox.put(Find("x"))
        assert 5 not in one.rows


# ── the end ──


async def test_a_stopping_inbox_takes_nothing_from_outside_and_every_result() -> None:
    """Requests are refused, results of what was in flight are kept, and the loop ends after the flush."""
    async with bench() as it:
        first = await it.busy(Find("first"))
        accepted = asyncio.create_task(it.inbox.put(Find("second")))
        await asyncio.sleep(0)
        it.inbox.stop()
        assert it.engine.stopping
        with pytest.raises(Overloaded):
            await it.inbox.put(Find("too late"))
        it.engine.gate.set()
        assert (await first, await accepted) == (Touched(1), Touched(1))
        assert not it.loop_task.done()
        it.inbox.hand_in(answered())
        it.inbox.flush()
        async with asyncio.timeout(GENEROUS):
            await it.loop_task
        assert answered() in it.engine.steps[-1]


async def test_an_idle_inbox_stops_at_once() -> None:
    """There is nothing to keep; it does not spin while it waits for the flush, either."""
    async with bench() as it:
        await it.inbox.put(Find("first"))
        it.inbox.stop()
        for _ in range(20):
            await asyncio.sleep(0)
        steps = len(it.engine.steps)
        await asyncio.sleep(0)
        assert len(it.engine.steps) - steps <= 1
        assert not it.loop_task.done()
        it.inbox.flush()
        async with asyncio.timeout(GENEROUS):
            await it.loop_task


async def test_work_in_the_thread_comes_between_two_steps() -> None:
    """Whoever needs the engine or the store waits its turn, and gets the result or the exception."""
    async with bench() as it:
        first = await it.busy(Find("first"))
        name = asyncio.create_task(it.inbox.in_thread(lambda: threading.current_thread().name))
        await asyncio.sleep(0)
        assert not name.done()
        it.engine.gate.set()
        assert await name == "engine"
        await first

        def fail() -> Any:
            raise StoreUnavailable("The disk is full.")

        with pytest.raises(StoreUnavailable):
            await it.inbox.in_thread(fail)


async def test_while_nothing_can_be_kept_the_engine_hears_of_every_answer() -> None:
    """More than go into one batch, and a request that comes behind them is answered at once; all are kept in the end, each once."""
    async with bench(most=4 * module.BATCH) as it:
        await until(lambda: len(it.engine.steps) == 1)
        it.engine.errors = [StoreUnavailable("The disk is full.") for _ in range(6)]
        for n in range(2 * module.BATCH):
            it.inbox.hand_in(answered(n))
        with pytest.raises(Unavailable):
            await it.inbox.put(joined())
        assert len(it.engine.errors) >= 2
        await until(lambda: not it.engine.errors)
        failed = {given.event for step in it.engine.steps[1:7] for given in step if isinstance(given, Answered)}
        assert failed == set(range(2 * module.BATCH))
        kept = [given.event for step in it.engine.steps[7:] for given in step if isinstance(given, Answered)]
        await until(lambda: sum(len(step) for step in it.engine.steps[7:]) > 2 * module.BATCH)
        kept = [given.event for step in it.engine.steps[7:] for given in step if isinstance(given, Answered)]
        assert sorted(kept) == list(range(2 * module.BATCH))


async def test_of_restarts_that_nobody_claimed_the_last_one_is_kept() -> None:
    """A disk may be full for hours, and what waits must not grow with it."""
    async with bench() as it:
        await until(lambda: len(it.engine.steps) == 1)
        it.engine.errors = [StoreUnavailable("The disk is full.") for _ in range(2)]
        for n in range(1, 20):
            it.inbox.hand_in(Answered("hs.test", 1, -n, Action.RESTART, NOW + n, Verdict.DONE))
        await until(lambda: not it.engine.errors)
        await until(lambda: any(isinstance(given, Answered) for step in it.engine.steps[3:] for given in step))
        assert [given.claim for step in it.engine.steps[3:] for given in step if isinstance(given, Answered)] == [-19]
