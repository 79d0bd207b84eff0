"""The whole daemon without sockets, on a virtual clock: the real engine, rules, store and decoders against the sandbox's models.

One heap of events drives everything; nothing sleeps, and nothing reads a clock. `World.now` is the true time. The daemon has a clock of its own
(`Daemon.clock`), as `daemon/clock.py` has it: set at its start, and unmoved while it runs. What the asyncio parts do is done here in the smallest
form that keeps their order of events: one step at a time, everything that waits goes into the next, answers leave after the commit.

    world = World(seed=1)
    alice = world.person("alice", delay=60.0)
    alice.come()                       # schedules her delayed event, joins the SFU, delegates
    world.run(600.0)                   # virtual seconds
    alice.leave()
    world.run(30.0)
    assert alice.events[-1].end is End.SENT
"""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, TypeVar

from sfu_delegate.daemon.actions import answered
from sfu_delegate.daemon.clock import SET_IF_BEYOND
from sfu_delegate.delegation import model
from sfu_delegate.delegation.model import Action, Answered, DelayedEvent, Input, Listed, Looked, Seen, Task, Verdict
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.replies import Reply, TooMany
from sfu_delegate.engine import Engine, Limits, Step
from sfu_delegate.livekit import webhook
from sfu_delegate.matrix.answers import Answer, read_reply, understand
from sfu_delegate.matrix.http import HttpAnswer
from sfu_delegate.matrix.management import Generation
from sfu_delegate.sandbox import homeserver as matrix
from sfu_delegate.sandbox import sfu as livekit
from sfu_delegate.sandbox.answer import Answer as HttpResponse
from sfu_delegate.sandbox.answer import Fate
from sfu_delegate.sandbox.homeserver import End, HomeserverFaults, HomeserverModel, RateLimit
from sfu_delegate.sandbox.sfu import Delivery, SfuFaults, SfuModel
from sfu_delegate.store import schema
from sfu_delegate.store.base import StoreUnavailable, Transaction
from sfu_delegate.store.sqlite import SqliteStore

from tests.simulation.people import Person

T = TypeVar("T")

START = 1_760_000_000.0
SFU = "main"
DAEMON = "delegate"  # its address at the homeservers
REQUEST_TIMEOUT = 10.0  # seconds for a request to a homeserver, as `timeouts.request` has it
LOOK_TIMEOUT = 5.0
LEASE_MARGIN = 1.0
STORE_PAUSE = 0.5  # seconds before the next try when the database does not work, as the inbox has it
STORE_RETRY_AFTER = 2.0  # what a 503 tells LiveKit
STANDSTILL = 20_000  # events in the same instant: something goes round in circles


class Violation(AssertionError):
    """The daemon broke one of its promises. `rule` is the short name of the promise."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


class Spans:
    """A condition that holds or does not, over time."""

    def __init__(self, since: float, *, holds: bool) -> None:
        self.changes: list[tuple[float, bool]] = [(since, holds)]

    def set(self, now: float, holds: bool) -> None:
        """From now on it holds, or does not."""
        if self.changes[-1][1] is not holds:
            self.changes.append((now, holds))

    def __bool__(self) -> bool:
        return self.changes[-1][1]

    def times(self, start: float, end: float) -> list[tuple[float, float]]:
        """The parts of [start, end] in which it held."""
        bounds = [*(at for at, _ in self.changes[1:]), end]
        spans = ((max(start, at), min(end, until)) for (at, holds), until in zip(self.changes, bounds, strict=True) if holds)
        return [(a, b) for a, b in spans if a < b]

    def always(self, start: float, end: float) -> bool:
        """Did it hold all the time from start to end?"""
        return sum(b - a for a, b in self.times(start, end)) >= end - start - 1e-6

    def ever(self, start: float, end: float) -> bool:
        """Did it hold at any time in [start, end]?"""
        return any(holds and at <= end for at, holds in self.changes if at >= start) or self.at(start)

    def at(self, when: float) -> bool:
        """Did it hold then?"""
        return next((holds for at, holds in reversed(self.changes) if at <= when), self.changes[0][1])


class Watch:
    """Who is told what happens. Every method may raise Violation."""

    def ended(self, event: matrix.DelayedEvent, task: Task | None, decided_at: float) -> None:
        """A delayed event ended at its homeserver: by a task of the daemon that was claimed at `decided_at` (true time), or otherwise."""

    def kept(self, given: Input, reply: Reply) -> None:
        """An input from outside was acknowledged."""

    def stepped(self, step: Step, inputs: int) -> None:
        """The engine made a step."""

    def answered(self, homeserver: str, verdict: Verdict) -> None:
        """A homeserver's answer reached the daemon, or it became clear that none would."""

    def looked(self, room: str, asked_at: float, listed: tuple[Listed, ...] | None) -> None:
        """The result of a look, asked at `asked_at` (true time), reached the daemon."""

    def stopped(self) -> None:
        """The daemon was killed."""

    def started(self) -> None:
        """The daemon is up."""


class Homeserver(HomeserverModel):
    """The model, with somebody who is told of every end."""

    told: Callable[[matrix.DelayedEvent], None]

    def _end(self, event: matrix.DelayedEvent, end: End, at: float, by: str) -> None:
        super()._end(event, end, at, by)
        self.told(event)


class Store(SqliteStore):
    """The real store in memory, which can be made to refuse."""

    refuses = False
    _spare: ClassVar[list["Store"]] = []  # emptied: to make the tables anew takes longer than a short history

    def __init__(self) -> None:
        super().__init__(":memory:")

    @classmethod
    def empty(cls) -> "Store":
        """One without a row."""
        return cls._spare.pop() if cls._spare else cls()

    def put_back(self) -> None:
        """Nobody needs it any more."""
        for table in schema.metadata.sorted_tables:
            self._connection.execute(f"DELETE FROM {table.name}")
        self.last_id, self.refuses = 0, False
        self._spare.append(self)

    def atomically(self, work: Callable[[Transaction], T], *, about_to_wait: Callable[[], object] | None = None) -> T:
        if not self.refuses:
            return super().atomically(work)

        def fail(tx: Transaction) -> T:
            work(tx)
            raise StoreUnavailable("the disk is full")

        return super().atomically(fail)


@dataclass(slots=True)
class _Waiting:
    """An input, and who waits for its reply; nobody, for the result of an action."""

    given: Input
    then: Callable[[Reply | Exception], None] | None


@dataclass(slots=True)
class _InFlight:
    """A task that is being carried out, and when (true time) it was claimed."""

    task: Task
    claimed_at: float


class Daemon:
    """What `serve.py`, `inbox.py` and `actions.py` do, on the world's clock."""

    def __init__(self, world: "World", policy: Policy, limits: Limits, in_flight: int) -> None:
        self.world = world
        self.policy = policy
        self.limits = limits
        self.width = in_flight
        self.store = Store.empty()
        self.engine: Engine
        self.up = Spans(world.now, holds=False)  # runs, and its database works
        self.running = False
        self.life = 0
        self.offset = 0.0  # of its clock against the true time
        self.steps = 0
        self.outstanding: dict[int, _InFlight] = {}
        self._set_offset = 0.0  # of the system clock: taken over at the next start
        self._mark: float | None = None  # the offset at the start before
        self._waiting: list[_Waiting] = []
        self._busy = False
        self._wake: float | None = None
        self._crash_after_commit: float | None = None
        self._missed = False
        self._count = 0

    def clock(self) -> float:
        """The daemon's own time."""
        return self.world.now + self.offset

    # ── start, stop, trouble ──

    def start(self) -> None:
        """A new process on what the last one left. Tried again while the database does not work, as a service manager would."""
        if self.running:
            return
        unsure = self._mark is not None and abs(self._set_offset - self._mark) > SET_IF_BEYOND
        self.offset = self._set_offset
        try:
            if self.life:
                self.store.recover(self.clock(), self.policy, clock_unsure=unsure)
        except StoreUnavailable:
            self.world.after(2.0, self.start)
            return
        self._mark = self.offset
        random = Random(self.world.random.getrandbits(64))
        self.engine = Engine(self.store, self.policy, self.limits, random, in_flight=lambda _: self.width, looks_in_flight=lambda _: 4)
        self.running = True
        self.life += 1
        self._wake = self.world.now
        self._note_up()
        self.world.watch.started()

    def crash(self) -> None:
        """`kill -9` now: what waits, and what the step that is under way has committed but not yet told anybody, is gone."""
        if not self.running:
            return
        self.running = False
        waiting, self._waiting = self._waiting, []
        self.outstanding.clear()
        self._busy, self._wake, self._crash_after_commit, self._missed = False, None, None, False
        self._note_up()
        self.world.watch.stopped()
        for one in waiting:
            if one.then is not None:
                one.then(ConnectionResetError())

    def crash_after_commit(self, down: float | None) -> None:
        """`kill -9` right after the next commit that claims or answers something, before anything of it leaves; up again `down` seconds later.
        None: not any more."""
        self._crash_after_commit = down if self.running else None

    def set_system_clock(self, offset: float) -> None:
        """The system clock is set; a running daemon does not notice, the next one does."""
        self._set_offset = offset

    def break_store(self, broken: bool) -> None:
        """The database refuses all transactions, or works again."""
        self.store.refuses = broken
        self._note_up()

    def _note_up(self) -> None:
        self.up.set(self.world.now, self.running and not self.store.refuses)

    # ── the inbox ──

    def put(self, given: Input, then: Callable[[Reply | Exception], None]) -> None:
        """Hand in an input from outside. `then` gets the reply, StoreUnavailable, or an OSError where nobody listens or the process dies."""
        if not self.running:
            then(ConnectionRefusedError())
            return
        self._waiting.append(_Waiting(given, then))

    def hand_in(self, given: Input) -> None:
        """The result of an action: handed in until it can be kept."""
        self._waiting.append(_Waiting(given, None))

    def next_event(self) -> float | None:
        """When the next step is due, in true time."""
        if not self.running or self._busy:
            return None
        if self._waiting:
            return self.world.now
        return self._wake

    def step(self) -> None:
        """One transaction with everything that waits."""
        batch, self._waiting = self._waiting, []
        self._wake = None
        self.steps += 1
        try:
            step = self.engine.step([one.given for one in batch], self.clock())
        except StoreUnavailable as error:
            self._refuse(batch, error)
            return
        self._free(batch)
        self._busy = True
        life = self.life
        self.world.after(self.world.commit_time(), lambda: self._leave(life, batch, step))

    def _refuse(self, batch: list[_Waiting], error: StoreUnavailable) -> None:
        self._free(batch)
        self._waiting = [one for one in batch if one.then is None] + self._waiting
        self._busy = True
        life = self.life
        for task in self.engine.keep_alive(self.clock()):
            self._carry_out(task)

        def again() -> None:
            if life == self.life and self.running:
                self._busy, self._wake = False, self.world.now

        self.world.after(STORE_PAUSE, again)
        for one in batch:
            if one.then is not None:
                self._missed = self._missed or not isinstance(one.given, model.Accept | model.Withdraw)
                one.then(error)

    def _free(self, batch: list[_Waiting]) -> None:
        """The engine has heard these results, whether or not they could be kept."""
        for one in batch:
            if isinstance(one.given, Answered | Looked):
                self.outstanding = {n: flying for n, flying in self.outstanding.items() if not _is_result(flying.task, one.given)}

    def _leave(self, life: int, batch: list[_Waiting], step: Step) -> None:
        """The commit is done: answers and tasks leave."""
        if life != self.life or not self.running:
            return
        if self._crash_after_commit is not None and (step.tasks or any(one.then for one in batch)):
            self.world.after(self._crash_after_commit, self.start)
            self.crash()
            for one in batch:
                if one.then is not None:
                    one.then(ConnectionResetError())
            return
        self._busy = False
        self._wake = None if step.wake is None else max(self.world.now, step.wake - self.offset)
        for task in step.tasks:
            self._carry_out(task)
        for one, reply in zip(batch, step.replies, strict=True):
            self._tell(one, reply)
        if self._missed and hasattr(model, "Missed"):
            self._missed = False
            self._waiting.append(_Waiting(model.Missed(SFU), None))
        self.world.watch.stepped(step, len(batch))

    def _tell(self, one: _Waiting, reply: Reply | Exception) -> None:
        if isinstance(reply, Exception) and not isinstance(reply, StoreUnavailable | TooMany):
            raise reply  # a defect of the engine, with its own traceback
        if isinstance(reply, Exception):
            if one.then is None:
                self._waiting.append(one)
            else:
                one.then(reply)
            return
        if one.then is not None:
            self.world.watch.kept(one.given, reply)
            one.then(reply)

    # ── actions ──

    def _carry_out(self, task: Task) -> None:
        self._count += 1
        number, life, sent_at = self._count, self.life, self.clock()
        self.outstanding[number] = _InFlight(task, self.world.now)
        self.world.after(self.world.latency(), lambda: self._arrive(number, life, task, sent_at))

    def _arrive(self, number: int, life: int, task: Task, sent_at: float) -> None:
        """The request is at the other end. What had been sent by a process that is dead arrives all the same."""
        claimed_at = self.world.now
        if number in self.outstanding and life == self.life:
            claimed_at = self.outstanding[number].claimed_at
        if task.action is Action.LOOK:
            asked_at = self.world.now
            response = self.world.sfu.look(task.room, self.world.now)
            timeout, participants = LOOK_TIMEOUT, _participants(response)
            answer = None
        else:
            asked_at = claimed_at
            timeout = min(REQUEST_TIMEOUT, task.lease_ends - sent_at - LEASE_MARGIN)
            response = self.world.manage(task, claimed_at)
            participants, answer = None, _understood(response, self.clock())
        elapsed = self.clock() - sent_at
        left = max(0.0, timeout - elapsed)
        back = response.delay + self.world.latency()
        if response.fate is Fate.HANG or back > left:
            back, participants = left, None
            answer = Answer(Verdict.UNCERTAIN, None, "", None, "no answer in time") if answer is not None else None

        def come_back() -> None:
            if life != self.life or not self.running:
                return
            if answer is None:
                self.world.watch.looked(task.room, asked_at, participants)
                self.hand_in(Looked(task.sfu, task.room, task.claim, sent_at, participants, "" if participants is not None else "no answer"))
                return
            self.world.watch.answered(task.homeserver, answer.verdict)
            self.hand_in(answered(task, answer, sent_at))

        self.world.after(back, come_back)

    # ── for those who look in ──

    def rows(self) -> list[DelayedEvent]:
        """All rows there are."""
        refuses, self.store.refuses = self.store.refuses, False
        try:
            return self.store.atomically(lambda tx: [row for id in range(1, self.store.last_id + 1) if (row := tx.get(id)) is not None])
        finally:
            self.store.refuses = refuses

    def rows_of(self, room: str, identity: str, *, finished: bool = False) -> list[DelayedEvent]:
        """The rows of one participant."""
        return self.store.reading(lambda tx: tx.of_participants([(SFU, room, identity)], finished=finished))


def _is_result(task: Task, given: Answered | Looked) -> bool:
    if isinstance(given, Looked):
        return task.action is Action.LOOK and (task.room, task.claim) == (given.room, given.claim)
    return task.action is not Action.LOOK and (task.homeserver, task.event, task.claim) == (given.homeserver, given.event, given.claim)


def _understood(response: HttpResponse, now: float) -> Answer:
    match response.fate:
        case Fate.REFUSE:
            return Answer(Verdict.FAILED, None, "", None, "connection refused")
        case Fate.CLOSE | Fate.HANG:
            return Answer(Verdict.UNCERTAIN, None, "", None, "the connection was closed")
        case _:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return understand(read_reply(HttpAnswer(response.status, headers, response.body), now), own_token=False)


def _participants(response: HttpResponse) -> tuple[Listed, ...] | None:
    if response.fate is not Fate.ANSWER or response.status != 200:
        return None
    with suppress(ValueError):
        listed = response.json()["participants"]
        return tuple(Listed(p["identity"], p["sid"], p["state"], int(p["joined_at_ms"])) for p in listed)
    return None


@dataclass(slots=True)
class Network:
    """How long things take, in seconds; drawn evenly from the range."""

    latency: tuple[float, float] = (0.002, 0.03)  # one way
    commit: tuple[float, float] = (0.0005, 0.004)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a world begins with."""

    homeservers: Mapping[str, RateLimit | None] = field(default_factory=lambda: {"hs.test": None})
    policy: Policy = field(default_factory=Policy)
    limits: Limits = field(default_factory=Limits)
    in_flight: int = 16


class World:
    """Everything there is: one SFU, homeservers, the daemon, and people. Deterministic by its seed."""

    def __init__(self, seed: int = 0, setting: Setting | None = None, watch: Watch | None = None) -> None:
        setting = setting or Setting()
        self.now = START
        self.random = Random(seed)
        self.network = Network()
        self.watch = watch or Watch()
        self.people: dict[str, Person] = {}
        self.owner: dict[str, Person] = {}  # by delay_id
        self.sfu = SfuModel(urls=["webhooks"], seed=seed + 1, auto_create=True, on_webhook=self._webhook_made)
        self.homeservers: dict[str, Homeserver] = {}
        self.reachable: dict[str, Spans] = {}  # nothing is wrong with the homeserver
        self.hanging: dict[str, Spans] = {}  # its answers take long, or never come
        for name, limit in setting.homeservers.items():
            homeserver = self.homeservers[name] = Homeserver(name, seed=seed + 2, limit=limit)
            homeserver.told = self._ended
            self.reachable[name] = Spans(self.now, holds=True)
            self.hanging[name] = Spans(self.now, holds=False)
        self.askable = Spans(self.now, holds=True)  # the SFU runs and answers
        self.truthful = Spans(self.now, holds=True)  # what it answers is right
        self.heard: dict[str, float] = {}  # by sid: when the daemon first knew that the session was in the call
        self.said_goodbye: dict[str, tuple[float, str]] = {}  # by sid: when the daemon first heard of its end, and the reason
        self.doubtful_until = 0.0  # a node was away: absences may be doubted until then
        self.log: list[tuple[float, str]] | None = None  # a list here collects what happens, for whoever looks for a cause
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._managing: tuple[Task, float] | None = None
        self._delivering: dict[int, Delivery] = {}
        self.daemon = Daemon(self, setting.policy, setting.limits, setting.in_flight)
        self.daemon.start()

    def close(self) -> None:
        """Let go of the database, for the next world."""
        self.daemon.store.put_back()

    # ── time ──

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Do something later."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + max(0.0, seconds), self._count, do))

    def run(self, seconds: float) -> None:
        """Let so many virtual seconds pass."""
        self.run_until(self.now + seconds)

    def run_until(self, end: float, stop: Callable[[], bool] | None = None) -> None:
        """Let time pass until `end` (true time), or until `stop` says so."""
        still, at_once = -1.0, 0
        while True:
            at = self._next()
            if at > end or (stop is not None and stop()):
                break
            self.now = max(self.now, at)
            at_once = at_once + 1 if self.now == still else 0
            still = self.now
            if at_once > STANDSTILL:
                raise Violation("busy loop", f"the world stands still at {self.now - START:.3f} s")
            self._turn()
        if stop is None or not stop():
            self.now = end

    def _next(self) -> float:
        times = [self.sfu.next_event(), self.daemon.next_event(), *(homeserver.next_event() for homeserver in self.homeservers.values())]
        if self._heap:
            times.append(self._heap[0][0])
        return min((at for at in times if at is not None), default=float("inf"))

    def _turn(self) -> None:
        """Everything of this instant: the models by themselves, what was planned, and one step of the daemon."""
        now = self.now
        for homeserver in self.homeservers.values():
            homeserver.tick(now)
        at = self.sfu.next_event()
        if at is not None and at <= now:
            for delivery in self.sfu.due(now):
                self._deliver(delivery)
        while self._heap and self._heap[0][0] <= now:
            heapq.heappop(self._heap)[2]()
        due = self.daemon.next_event()
        if due is not None and due <= now:
            self.daemon.step()

    def latency(self) -> float:
        """One way through the network, in seconds."""
        return self.random.uniform(*self.network.latency)

    def commit_time(self) -> float:
        """How long a commit takes, in seconds."""
        return self.random.uniform(*self.network.commit)

    def note(self, text: str) -> None:
        """A line for whoever looks for a cause."""
        if self.log is not None:
            self.log.append((self.now - START, text))

    # ── people ──

    def person(self, name: str, room: str = "room", *, delay: float = 60.0, homeserver: str = "", **more: Any) -> Person:
        """Somebody new, who is nowhere yet. `delay` is that of the delayed events, in seconds."""
        person = self.people[name] = Person(self, name, room, homeserver or next(iter(self.homeservers)), delay, **more)
        return person

    # ── faults ──

    def fault_homeserver(self, name: str, **faults: Any) -> None:
        """From now on this is wrong with the homeserver (`HomeserverFaults`), and nothing else. Without faults it is well."""
        self.homeservers[name].faults = HomeserverFaults(**faults)
        self.reachable[name].set(self.now, not faults)
        self.hanging[name].set(self.now, bool(faults.keys() & {"hang", "done_and_hangs", "latency"}))

    def fault_sfu(self, **faults: Any) -> None:
        """From now on this is wrong with RoomService (`SfuFaults`), and nothing else. Without faults it is well."""
        self.sfu.faults = SfuFaults(**faults)
        self._note_sfu()

    def fault_deliveries(self, **faults: Any) -> None:
        """From now on this happens to webhooks on their way (`DeliveryFaults`), and nothing else."""
        self.sfu.delivery_faults = livekit.DeliveryFaults(**faults)

    def kill_sfu(self, *, redis: bool = False) -> None:
        """The SFU's node dies. Everybody in a call looks for it until it is back, for a minute or so."""
        if not self.sfu.running:
            return
        self.sfu.kill(self.now, redis=redis)
        if redis:
            self._doubt()
        self._sfu_went()

    def shut_sfu_down(self) -> None:
        """Second SIGTERM: most are not told."""
        if not self.sfu.running:
            return
        self.sfu.shutdown_forced(self.now)
        self.after(livekit.EXIT_AFTER + 0.01, self._sfu_went)

    def start_sfu(self) -> None:
        """The SFU is back."""
        self.sfu.start(self.now)
        self._note_sfu()

    def freeze_node(self, room: str) -> None:
        """The node that holds the room stops; its people come back through another one."""
        held = self.sfu.rooms.get(room)
        if self.sfu.running and held is not None and held.up:
            self.sfu.freeze_node(room, self.now)
            self._doubt()
            for person in list(self.people.values()):
                if person.room == room:
                    person.cut_off()

    def thaw_node(self, room: str) -> None:
        """It goes on, and cleans up what it believes to be dead."""
        if self.sfu.running and room in self.sfu.rooms:
            self.sfu.thaw_node(room, self.now)
            self._doubt(100.0)  # what it sends while it cleans up

    def _doubt(self, more: float = 0.0) -> None:
        self.doubtful_until = self.now + self.daemon.policy.doubt + more

    def _sfu_went(self) -> None:
        self._note_sfu()
        for person in list(self.people.values()):
            person.cut_off()
        for ticket in list(self._delivering):
            del self._delivering[ticket]

    def _note_sfu(self) -> None:
        faults = self.sfu.faults
        self.askable.set(self.now, self.sfu.running and not (faults.down or faults.hang or faults.error is not None or faults.slow >= LOOK_TIMEOUT))
        self.truthful.set(self.now, not (faults.empty_lists or faults.ghosts))

    # ── webhooks ──

    def _webhook_made(self, about: Mapping[str, Any]) -> None:
        participant = about.get("participant")
        if participant is not None and not about["event"].startswith("track"):
            for person in list(self.people.values()):
                if person.identity == participant["identity"] and person.room == about["room"]["name"]:
                    person.sfu_says(about["event"], participant["sid"], participant.get("disconnectReason", ""))

    def _deliver(self, delivery: Delivery) -> None:
        self._delivering[delivery.ticket] = delivery
        self.after(self.latency(), lambda: self._webhook_arrives(delivery))

    def _webhook_arrives(self, delivery: Delivery) -> None:
        if not self.daemon.running:
            self._webhook_answered(delivery, None)
            return
        decoded = webhook.decode(delivery.body)
        given = webhook.to_input(SFU, decoded)
        if given is None:
            heard = getattr(self.daemon.engine, "heard", None)
            if heard is not None:
                heard(SFU, self.daemon.clock())
            self._webhook_answered(delivery, 200)
            return

        def then(reply: Reply | Exception) -> None:
            if isinstance(reply, StoreUnavailable):
                self._webhook_answered(delivery, 503, STORE_RETRY_AFTER)
            elif isinstance(reply, OSError):
                self._webhook_answered(delivery, None)
            else:
                if isinstance(given, Seen):
                    self.knows(given)
                self._webhook_answered(delivery, 200)

        self.daemon.put(given, then)

    def _webhook_answered(self, delivery: Delivery, status: int | None, retry_after: float | None = None) -> None:
        self.note(f"webhook {delivery.event} of {delivery.room} answered {status}")

        def tell() -> None:
            if self._delivering.pop(delivery.ticket, None) is not None:
                self.sfu.answered(delivery.ticket, status, self.now, retry_after)

        self.after(self.latency(), tell)

    def knows(self, seen: Seen) -> None:
        """The daemon acknowledged what it was told of a session."""
        if seen.what is model.Sighting.JOINED:
            self.heard.setdefault(seen.sid, self.now)
        else:
            self.said_goodbye.setdefault(seen.sid, (self.now, seen.reason))

    # ── homeservers ──

    def manage(self, task: Task, claimed_at: float) -> HttpResponse:
        """A management request arrives at its homeserver."""
        path, body = Generation.C.request(task.delay_id, task.action)
        self._managing = (task, claimed_at)
        try:
            response = self.homeservers[task.homeserver].request("POST", path, self.now, body=body, ip=DAEMON)
        finally:
            self._managing = None
        if self.log is not None:
            self.note(f"{task.action} of {self.name_of(task.delay_id)} → {response.status or response.fate}")
        return response

    def name_of(self, delay_id: str) -> str:
        """A delayed event, for people: whose, and the how manieth of it."""
        person = self.owner.get(delay_id)
        if person is None:
            return "nobody"
        return f"{person.name}#{[event.delay_id for event in person.events].index(delay_id) + 1}"

    def _ended(self, event: matrix.DelayedEvent) -> None:
        task, decided_at = self._managing or (None, self.now)
        if task is not None and task.delay_id != event.delay_id:
            task = None  # it ran out in the moment in which somebody else's request arrived
        if self.log is not None:
            self.note(f"event {self.name_of(event.delay_id)} ended: {event.end}{' by the daemon' if task else ''}")
        self.watch.ended(event, task, decided_at)

    @property
    def answers(self) -> Counter[tuple[str, int]]:
        """What the homeservers answered, by kind of request and status."""
        total: Counter[tuple[str, int]] = Counter()
        for homeserver in self.homeservers.values():
            total.update(homeserver.answers)
        return total
