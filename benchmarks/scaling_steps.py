"""The engine on a PostgreSQL with many rows, in this process and on a clock of its own: what a step costs, whatever the other side takes.

The homeserver answers as soon as it is asked. One step is made after another, so each waits for its own commit.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from time import perf_counter, process_time

from sfu_delegate.delegation.model import Accept, Action, Answered, Input, NewEvent, OnEnd, Seen, Sighting, Task, Verdict
from sfu_delegate.delegation.policy import DEPARTURES
from sfu_delegate.engine import TOGETHER, Engine, Limits, Step
from sfu_delegate.livekit.names import plain_identity
from sfu_delegate.store.base import Transaction
from sfu_delegate.store.postgresql import PostgresStore, PostgresTransaction

from benchmarks.figures import percentile
from benchmarks.machine import undisturbed
from benchmarks.rows import POLICY as RARELY
from benchmarks.scaling_rows import PostgresFilling
from benchmarks.scaling_server import Database, Used, Written
from benchmarks.world import SFU, Failed

POLICY = replace(RARELY, departures={reason: replace(rule, look_after=0.0) for reason, rule in DEPARTURES.items()})
"""Departures are believed at once, and looks are as rare as can be."""

LIMITS = Limits(max_per_participant=1000, max_per_user=1000, max_per_homeserver=100_000_000)


@dataclass(frozen=True, slots=True)
class Cost:
    """What something took, each time."""

    count: int  # of inputs, or of restarts
    step_ms: float  # the median step, from its beginning to its end
    step_p99_ms: float
    daemon: float  # µs of processor time of the engine and the driver …
    backends: float  # … of PostgreSQL's backends
    rest: float  # … and of its other processes
    wal: float  # bytes
    full_pages: float
    fsyncs: float
    updates: float  # of rows of delayed events
    hot: float  # … the part of these that left all indexes as they are


def cost_of(count: int, walls: Sequence[float], daemon: float, used: Used) -> Cost:
    """For each of `count`."""
    events = used.tables.get("delayed_event", Written())
    micros = 1e6 / count
    return Cost(
        count,
        statistics.median(walls) * 1e3 if walls else 0.0,
        percentile(walls, 0.99) * 1e3 if walls else 0.0,
        daemon * micros,
        used.backends * micros,
        used.rest * micros,
        used.wal / count,
        used.full_pages / count,
        used.fsyncs / count,
        events.updated / count,
        events.hot / events.updated if events.updated else 0.0,
    )


def flush(tx: Transaction) -> None:
    """Have the connection for steps tell PostgreSQL what it has done: otherwise it does once a second, at the end of a transaction."""
    assert isinstance(tx, PostgresTransaction)
    tx.run("SELECT 1 FROM pg_stat_force_next_flush()", ())


class Clockwork:
    """The engine on a database, and a homeserver that does what it is asked for."""

    def __init__(self, database: Database, now: float, in_flight: int = 32) -> None:
        self.database = database
        self.now = now
        self.in_flight = in_flight
        self.store = PostgresStore(database.url, instance="steps")
        began = perf_counter()
        self.engine = Engine(self.store, POLICY, LIMITS, Random(7), in_flight=lambda _: self.in_flight, limited=lambda _: False)
        self.began_in = perf_counter() - began
        self._under_way: list[Task] = []
        self._walls: list[float] = []
        self._daemon = 0.0

    def allow(self, in_flight: int) -> None:
        """The homeserver takes so many requests at a time from now on."""
        self.in_flight = in_flight
        self.engine.reconfigure(POLICY, LIMITS)

    def close(self) -> None:
        """Close the connections."""
        self.store.close()

    def step(self, inputs: Sequence[Input] = (), *, counts: bool = True) -> Step:
        """One step. `counts`: it is one of those whose duration is told."""
        used, began = process_time(), perf_counter()
        step = self.engine.step(inputs, self.now)
        took = perf_counter() - began
        self._daemon += process_time() - used
        if counts:
            self._walls.append(took)
        for reply in step.replies:
            if isinstance(reply, Exception):
                raise Failed(f"an input failed: {reply!r}")
        self._under_way += step.tasks
        return step

    def spent(self, work: Callable[[], int]) -> Cost:
        """What `work` costs; it returns how many inputs it had."""
        self.store.atomically(flush)
        before = self.database.used()
        self._walls, self._daemon = [], 0.0
        with undisturbed():
            count = work()
        self.store.atomically(flush)
        return cost_of(count, self._walls, self._daemon, self.database.used().since(before))

    def answers(self) -> list[Answered]:
        """The homeserver has done all that it was asked for."""
        tasks, self._under_way = self._under_way, []
        return [Answered(task.homeserver, task.event, task.claim, task.action, self.now, Verdict.DONE) for task in tasks if task.event]

    # ── what happens ──

    def delegated(self, filling: PostgresFilling, numbers: Sequence[int], batch: int) -> int:
        """New people delegate, and their events are restarted for the first time."""
        for part in _parts(numbers, batch):
            people = [filling.person(number) for number in part]
            accepts = [
                Accept(
                    f"dlg_{round(self.now * 1000):012x}{number:020x}",
                    SFU,
                    person.room,
                    person.identity,
                    filling.server,
                    (NewEvent(person.delay_id, filling.delay, OnEnd.SEND),),
                    plain_identity(person.user, person.device),
                    person.user,
                )
                for number, person in zip(part, people, strict=True)
            ]
            self.step(accepts)
            self._until_done(len(part), Action.RESTART)
        return len(numbers)

    def _until_done(self, count: int, action: Action) -> None:
        """Until all is answered that can be asked of the homeserver: at first it gets few requests at a time. At least `count` are `action`."""
        made = 0
        while self._under_way:
            made += sum(task.action is action for task in self._under_way)
            self.now += 0.001
            self.step(self.answers(), counts=False)
        if made < count:
            raise Failed(f"{count} times {action.value} was to be asked for, and it was {made} times")

    def joined(self, filling: PostgresFilling, numbers: Sequence[int], batch: int) -> int:
        """The webhooks of people who join."""
        return self._seen(filling, numbers, batch, Sighting.JOINED)

    def left(self, filling: PostgresFilling, numbers: Sequence[int], batch: int) -> int:
        """The webhooks of people who leave, and the sends of their events."""
        return self._seen(filling, numbers, batch, Sighting.LEFT)

    def _seen(self, filling: PostgresFilling, numbers: Sequence[int], batch: int, what: Sighting) -> int:
        for part in _parts(numbers, batch):
            people = [(number, filling.person(number)) for number in part]
            reason = "CLIENT_INITIATED" if what is Sighting.LEFT else ""
            inputs = [Seen(SFU, person.room, person.identity, what, f"PA_{number}", 1000, reason) for number, person in people]
            self.now += 0.01
            step = self.step(inputs)
            if len(step.changes) != len(part):
                raise Failed(f"{len(part)} webhooks changed {len(step.changes)} rows")
            if what is Sighting.LEFT:
                self._until_done(len(part), Action.SEND)
        return len(numbers)

    def restarts(self, count: int) -> int:
        """So many restarts, as they become due: whenever some are answered, others are begun in the same step."""
        made = 0
        while made < count:
            answers = self.answers()
            tasks = self.step(answers, counts=bool(answers)).tasks
            made += len(answers)
            if not tasks:
                self.now += TOGETHER
        return made


def _parts(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


# ── many rows ──


@dataclass(frozen=True, slots=True)
class StepSizes:
    """How much of everything."""

    alone: int = 300  # people whose webhooks come one by one
    batch: int = 32
    together: int = 3200  # people whose webhooks come `batch` at a time
    restarts_alone: int = 300
    restarts: int = 6400
    backlog: int = 640  # restarts while everything is due
    news: int = 50
    census: int = 3


def scattered_people(count: int, sizes: StepSizes) -> tuple[list[int], list[int]]:
    """Numbers of those who have not joined yet: for one by one, and for batches."""
    step = max(1, count // (sizes.alone + sizes.together))
    every = list(range(0, count, step))[: sizes.alone + sizes.together]
    return every[: sizes.alone], every[sizes.alone :]


def steps(clock: Clockwork, filling: PostgresFilling, sizes: StepSizes) -> dict[str, Cost]:
    """The cost of each kind of input, right after a checkpoint: nearly each page is changed for the first time, and goes into the WAL as a whole."""
    alone, together = scattered_people(filling.count, sizes)
    new = list(range(filling.count, filling.count + sizes.alone + sizes.together))
    found: dict[str, Cost] = {}
    for name, numbers, fresh, batch in (("alone", alone, new[: sizes.alone], 1), ("together", together, new[sizes.alone :], sizes.batch)):
        for kind, happens, whom in (("delegated", clock.delegated, fresh), ("joined", clock.joined, numbers), ("left", clock.left, numbers)):
            clock.database.checkpoint()
            found[f"{kind}.{name}"] = clock.spent(partial(happens, filling, whom, batch))
    clock.now = max(clock.now, filling.at + filling.calm)
    clock.restarts(10 * clock.in_flight)  # those that have become due meanwhile
    for name, count, in_flight in (("alone", sizes.restarts_alone, 1), ("together", sizes.restarts, sizes.batch)):
        clock.allow(in_flight)
        clock.database.checkpoint()
        found[f"restarted.{name}"] = clock.spent(partial(clock.restarts, count))
    return found


def compressed(clock: Clockwork, sizes: StepSizes) -> dict[str, Cost]:
    """Restarts right after a checkpoint, with and without `wal_compression`."""
    found = {}
    for name in ("off", "on"):
        clock.database.change(f"ALTER SYSTEM SET wal_compression = {name}")
        clock.database.change("SELECT pg_reload_conf()")
        clock.restarts(10 * clock.in_flight)  # the backend has taken it over by then
        clock.database.checkpoint()
        found[name] = clock.spent(partial(clock.restarts, sizes.restarts))
    clock.database.change("ALTER SYSTEM RESET wal_compression")
    clock.database.change("SELECT pg_reload_conf()")
    return found


def backlog(clock: Clockwork, filling: PostgresFilling, sizes: StepSizes) -> Cost:
    """Restarts while all rows are due, some of them too late: nothing was restarted for the larger part of the delay. To be done last."""
    clock.now = max(clock.now, filling.at + filling.calm + 0.72 * filling.delay)
    clock.database.checkpoint()
    return clock.spent(lambda: clock.restarts(sizes.backlog))


@dataclass(frozen=True, slots=True)
class Beside:
    """What an instance does beside its steps."""

    news_ms: float  # what others have changed: asked about once a second
    news_daemon: float  # µs of processor time
    news_backends: float
    news_wal: float  # bytes
    census_ms: float
    census: float  # µs of processor time of PostgreSQL, with helpers


def beside(database: Database, now: float, sizes: StepSizes) -> Beside:
    """The cost of the questions that every instance asks again and again."""
    store = PostgresStore(database.url, instance="beside")
    try:
        store.news(now)
        walls, used, before = list[float](), process_time(), database.used()
        for number in range(sizes.news):
            began = perf_counter()
            store.news(now + number)
            walls.append(perf_counter() - began)
        used, after = process_time() - used, database.used().since(before)
        counts, before = list[float](), database.used()
        for _ in range(sizes.census):
            began = perf_counter()
            store.census()
            counts.append(perf_counter() - began)
        counted = database.used().since(before)
    finally:
        store.close()
    each = 1e6 / sizes.news
    census = counted.cpu / sizes.census * 1e6
    return Beside(statistics.median(walls) * 1e3, used * each, after.backends * each, after.wal / sizes.news, statistics.median(counts) * 1e3, census)
