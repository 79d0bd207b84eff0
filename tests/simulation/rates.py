"""One homeserver that limits its delegate, the real engine on a virtual clock, and many people who leave at once: what becomes of whom, and when.

Smaller than `world.py`: no webhooks that get lost and no SFU that is asked in vain, so that some hundred calls of hundreds of people take seconds.
All times are seconds since the start of a `Call`.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from math import floor
from random import Random
from typing import NamedTuple

from sfu_delegate.daemon.actions import answered
from sfu_delegate.daemon.sharing import REFRESH_EVERY
from sfu_delegate.delegation.model import Accept, Action, Input, Listed, Looked, NewEvent, OnEnd, Seen, Sighting, Task, Verdict
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.replies import Reply, TooMany
from sfu_delegate.delegation.urgency import Limit
from sfu_delegate.engine import Engine, Limits
from sfu_delegate.matrix.answers import Answer, read_reply, understand
from sfu_delegate.matrix.http import HttpAnswer
from sfu_delegate.matrix.management import Generation
from sfu_delegate.sandbox.homeserver import End, HomeserverModel, RateLimit
from sfu_delegate.store.base import KnownHomeserver

from tests.simulation.store import Board, SharedStore, Store

SFU = "main"
ROOM = "room"
HOMESERVER = "hs.test"
START = 1_800_000_000.0
ADDRESS = "delegate"
SYNAPSE = RateLimit(1.0, 5.0)
HOUR = 3600.0
SEND_TAKES = (0.03, 0.04)  # seconds, measured with Synapse 1.163
RESTART_TAKES = (0.002, 0.004)
ONE_WAY = (0.001, 0.02)
COMMIT = (0.0005, 0.004)
STANDSTILL = 5_000  # steps in the same instant: something goes round in circles


@dataclass(slots=True)
class Person:
    """One participant and its delayed event."""

    name: str
    delay: float
    delay_id: str = ""
    joined_at: float | None = None
    left_at: float | None = None
    refused: TooMany | None = None  # the delegation was


class Request(NamedTuple):
    """One management request as the homeserver saw it."""

    at: float  # when it arrived
    action: Action
    status: int


class Forecast(NamedTuple):
    """What the metric said."""

    at: float
    lateness: float


@dataclass(slots=True)
class Ends:
    """How many there were of each."""

    dropped: list[Person] = field(default_factory=list)  # ran out, or was sent, while its participant was connected
    sent: list[float] = field(default_factory=list)  # after the departure
    fired: list[Person] = field(default_factory=list)  # by itself, after the departure
    pending: list[Person] = field(default_factory=list)  # of those who left
    turned_away: list[Person] = field(default_factory=list)  # their delegation was not accepted
    dropped_at: list[float] = field(default_factory=list)


class Instance:
    """One instance of the daemon: its engine, and what waits for it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.engine: Engine
        self.inbox: list[Input] = []
        self.busy = False
        self.wake: float | None = None
        self.refresh_at: float | None = None  # where there are others
        self.life = 0

    def next_step(self, now: float) -> float | None:
        """When it has something to do."""
        if self.busy:
            return None
        if self.inbox:
            return now
        times = [at for at in (self.wake, self.refresh_at) if at is not None]
        return max(now, min(times)) if times else None


class Call:
    """A homeserver, the engine, and everybody's comings and goings. Deterministic by its seed.

    `known`: the daemon has learned the homeserver's limit before. `exempt`: the configuration names an application service. `instances` of the daemon
    are behind one address, so that the homeserver limits them together; each input goes to one of them.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        limit: RateLimit | None = SYNAPSE,
        known: bool = False,
        exempt: bool = False,
        policy: Policy | None = None,
        instances: int = 1,
    ):
        self.now = START
        self.random = Random(seed)
        self.policy = policy or Policy()
        self.homeserver = HomeserverModel(HOMESERVER, seed=seed, limit=limit)
        self.service = self.homeserver.application_service()
        self.exempt = exempt
        self.people: dict[str, Person] = {}
        self.requests: list[Request] = []
        self.forecasts: list[Forecast] = []
        self.steps = 0
        self._by_delay_id: dict[str, Person] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.store = Store.empty()
        if known and limit is not None:
            self.store.atomically(lambda tx: tx.save_homeserver(KnownHomeserver(HOMESERVER, Limit.SOME, *limit)))
        board = Board(self.store)
        stores = [self.store] if instances == 1 else [SharedStore(board, f"i{n}", ADDRESS, f"{seed} {n}", lambda: None) for n in range(instances)]
        self.instances = [Instance(store) for store in stores]
        for instance in self.instances:
            self._start(instance)

    @property
    def engine(self) -> Engine:
        """The only one; the first, where there are several."""
        return self.instances[0].engine

    def _put(self, given: Input) -> None:
        instance = self.instances[0] if len(self.instances) == 1 else self.random.choice(self.instances)
        instance.inbox.append(given)

    def close(self) -> None:
        """Let go of the database, for the next one."""
        self.store.put_back()

    # ── time ──

    @property
    def clock(self) -> float:
        """Seconds since the start."""
        return self.now - START

    def at(self, when: float, do: Callable[[], None]) -> None:
        """Do something then."""
        self._count += 1
        heapq.heappush(self._heap, (START + when, self._count, do))

    def _after(self, seconds: float, do: Callable[[], None]) -> None:
        self.at(self.clock + seconds, do)

    def run_until(self, end: float, *, sample: float | None = None) -> None:
        """Let time pass. `sample`: how often the forecast is written down."""
        if sample is not None:
            self._sample(sample, end)
        still = 0
        while True:
            steps = [(at, number) for number, instance in enumerate(self.instances) if (at := instance.next_step(self.now)) is not None]
            times = [at for at, _ in steps] + ([self._heap[0][0]] if self._heap else [])
            at = min(times, default=START + end + 1)
            if at > START + end:
                break
            still = still + 1 if at <= self.now else 0
            assert still < STANDSTILL, f"busy loop at {self.clock:.3f} s"
            self.now = max(self.now, at)
            if self._heap and self._heap[0][0] <= self.now:
                heapq.heappop(self._heap)[2]()
            elif steps:
                self._step(self.instances[min(steps)[1]])
        self.now = START + end
        self.homeserver.tick(self.now)

    def _sample(self, every: float, end: float) -> None:
        def look() -> None:
            self.forecasts.append(Forecast(self.clock, self.engine.forecast(self.now).get(HOMESERVER, 0.0)))
            if self.clock + every <= end:
                self._after(every, look)

        self._after(0.0, look)

    # ── people ──

    def join(self, when: float, delay: float, name: str) -> None:
        """Schedule a delayed event, join and delegate, in a fraction of a second."""
        person = self.people[name] = Person(name, delay)

        def schedule() -> None:
            user = f"@{name}:{HOMESERVER}"
            person.delay_id = self.homeserver.schedule(user, ROOM, "m.call.member", f"_{user}", round(delay * 1000), {}, self.now)
            self._by_delay_id[person.delay_id] = person
            self._after(self.random.uniform(0.05, 0.3), connect)

        def connect() -> None:
            person.joined_at = self.clock
            self._put(Accept(f"dlg_{name}", SFU, ROOM, name, HOMESERVER, (NewEvent(person.delay_id, delay, OnEnd.SEND),)))
            self._put(Seen(SFU, ROOM, name, Sighting.JOINED, f"PA_{name}", round(self.now * 1000)))

        self.at(when, schedule)

    def leave(self, when: float, name: str) -> None:
        """Be removed by the SFU: a departure that is believed without a look."""

        def go() -> None:
            person = self.people[name]
            if person.joined_at is None or person.left_at is not None:
                return
            person.left_at = self.clock
            self._put(Seen(SFU, ROOM, name, Sighting.LEFT, f"PA_{name}", round(START * 1000), "PARTICIPANT_REMOVED"))

        self.at(when, go)

    def restart_daemon(self, when: float, down: float) -> None:
        """`kill -9`, and up again so many seconds later; one of them, where there are several. Nobody may leave meanwhile: who did would have to be
        found by a look."""
        instance = self.instances[0]

        def kill() -> None:
            instance.life += 1
            instance.busy = True

        def start() -> None:
            if len(self.instances) == 1:
                self.store.recover(self.now, self.policy, clock_unsure=False)
            self._start(instance)

        self.at(when, kill)
        self.at(when + down, start)

    def limit_known(self) -> tuple[Limit, float]:
        """What the engine believes: the kind of limit, and the actions a second."""
        return self.engine.rates().get(HOMESERVER, (Limit.UNKNOWN, 0.0))

    def reconfigure(self, *, exempt: bool) -> None:
        """The configuration names an application service that is exempt from limits, or no more."""
        self.exempt = exempt
        for instance in self.instances:
            instance.engine.reconfigure(self.policy, Limits())

    # ── the daemon ──

    def _start(self, instance: Instance) -> None:
        limits, random = Limits(), Random(self.random.getrandbits(32))
        if isinstance(instance.store, SharedStore):
            instance.store.connect()
            instance.refresh_at = self.now
        instance.engine = Engine(instance.store, self.policy, limits, random, limited=lambda _: False if self.exempt else None)
        instance.life += 1
        instance.busy, instance.wake = False, self.now

    def _step(self, instance: Instance) -> None:
        if instance.refresh_at is not None and instance.refresh_at <= self.now:
            instance.refresh_at = self.now + REFRESH_EVERY
            instance.wake = instance.engine.refresh(self.now)
            if not instance.inbox and (instance.wake is None or instance.wake > self.now):
                return
        batch, instance.inbox = instance.inbox, []
        self.steps += 1
        step = instance.engine.step(batch, self.now)
        instance.busy, instance.wake = True, None
        life = instance.life

        def committed() -> None:
            if life != instance.life:
                return
            instance.busy = False
            instance.wake = None if step.wake is None else max(self.now, step.wake)
            for given, reply in zip(batch, step.replies, strict=True):
                self._replied(given, reply)
            for task in step.tasks:
                self._carry_out(task, instance)

        self._after(self.random.uniform(*COMMIT), committed)

    def _replied(self, given: Input, reply: Reply | Exception) -> None:
        if isinstance(reply, TooMany) and isinstance(given, Accept):
            self.people[given.identity].refused = reply
        elif isinstance(reply, Exception):
            raise reply

    def _carry_out(self, task: Task, instance: Instance) -> None:
        sent_at, life = self.now, instance.life

        def tell(given: Input) -> None:
            if life == instance.life:
                instance.inbox.append(given)

        def arrive() -> None:
            if task.action is Action.LOOK:
                looked = Looked(SFU, task.room, task.claim, sent_at, self._listed())
                self._after(self.random.uniform(*ONE_WAY), lambda: tell(looked))
                return
            answer, takes = self._manage(task)
            result = answered(task, answer, sent_at)
            self._after(takes + self.random.uniform(*ONE_WAY), lambda: tell(result))

        self._after(self.random.uniform(*ONE_WAY), arrive)

    def _listed(self) -> tuple[Listed, ...]:
        there = (p for p in self.people.values() if p.joined_at is not None and p.left_at is None)
        return tuple(Listed(p.name, f"PA_{p.name}", "ACTIVE", round((START + (p.joined_at or 0.0)) * 1000)) for p in there)

    def _manage(self, task: Task) -> tuple[Answer, float]:
        """The homeserver's answer, and after how many seconds it comes."""
        path, body = Generation.C.request(task.delay_id, task.action)
        event = self.homeserver.events[task.delay_id]
        token, query = (self.service, {"user_id": event.user}) if self.exempt else (None, None)
        response = self.homeserver.request("POST", path, self.now, body=body, ip=ADDRESS, token=token, query=query)
        self.requests.append(Request(self.clock, task.action, response.status))
        headers = {name.lower(): value for name, value in response.headers.items()}
        answer = understand(read_reply(HttpAnswer(response.status, headers, response.body), self.now), own_token=self.exempt)
        takes = 0.0 if answer.verdict is Verdict.LIMITED else self.random.uniform(*(RESTART_TAKES if task.action is Action.RESTART else SEND_TAKES))
        return answer, response.delay + takes

    # ── what came of it ──

    def ends(self) -> Ends:
        """How everybody's event ended."""
        ends = Ends()
        for event in self.homeserver.events.values():
            person = self._by_delay_id[event.delay_id]
            ended_at = None if event.ended_at is None else event.ended_at - START
            if person.refused is not None:
                ends.turned_away.append(person)
            elif ended_at is None:
                if person.left_at is not None:
                    ends.pending.append(person)
            elif person.left_at is None or ended_at < person.left_at:
                ends.dropped.append(person)
                ends.dropped_at.append(ended_at)
            elif event.end is End.SENT:
                ends.sent.append(ended_at - person.left_at)
            else:
                ends.fired.append(person)
        return ends

    def refusals(self, start: float = 0.0, end: float = float("inf")) -> int:
        """How many requests were refused in that time."""
        return sum(request.status == 429 for request in self.requests if start <= request.at <= end)

    def successes(self, start: float = 0.0, end: float = float("inf")) -> int:
        """How many actions the homeserver allowed in that time."""
        return sum(request.status != 429 for request in self.requests if start <= request.at <= end)

    def used(self, start: float, end: float, limit: RateLimit = SYNAPSE) -> float:
        """The part that was made use of, of the actions that the homeserver would have allowed between two moments."""
        level, at = 0.0, 0.0
        for request in self.requests:
            if request.at >= start:
                break
            if request.status != 429:
                level, at = max(0.0, level - (request.at - at) * limit.per_second) + 1, request.at
        free = limit.burst - max(0.0, level - (start - at) * limit.per_second)
        allowed = floor(free + (end - start) * limit.per_second + 1e-9)
        return self.successes(start, end) / allowed if allowed > 0 else 1.0


# ── the cases ──


class Result(NamedTuple):
    """What became of a departure of many at once."""

    dropped: int  # connected participants whose event ended
    turned_away: int  # whose delegation was refused
    sent: int
    fired: int  # of those who left, by themselves
    last: float  # seconds from the departures to the last send
    refusals: int  # from the departures until the last send
    successes: int
    refusals_in_all: int
    successes_in_all: int
    used: float  # of what was permitted from the departures until the last send
    forecast: float  # the most that was ever forecast, in seconds

    @property
    def ratio(self) -> float:
        """Refusals for each success, from the departures on."""
        return self.refusals / max(1, self.successes)


@dataclass(frozen=True, slots=True)
class Case:
    """Some stay and some leave at once."""

    stay: int
    stay_delay: float
    go: int
    go_delay: float
    within: float  # seconds in which all of them join
    leave_at: float  # seconds after the last one joined
    known: bool = False
    restart: float | None = None  # seconds before the departures at which the daemon is started anew
    watch: float = 130.0  # seconds that are watched after the departures
    instances: int = 1


def play(case: Case, seed: int) -> Result:
    """One history."""
    call = Call(seed, known=case.known, instances=case.instances)
    try:
        return _play(call, case)
    finally:
        call.close()


def _play(call: Call, case: Case) -> Result:
    stay = [f"s{i}" for i in range(case.stay)]
    go = [f"g{i}" for i in range(case.go)]
    everybody = [(name, case.stay_delay) for name in stay] + [(name, case.go_delay) for name in go]
    call.random.shuffle(everybody)
    for i, (name, delay) in enumerate(everybody):
        call.join(case.within * i / len(everybody), delay, name)
    leave_at = case.within + 0.5 + case.leave_at
    if case.restart is not None:
        call.restart_daemon(max(0.0, leave_at - case.restart), min(2.0, case.restart / 2))
    for name in go:
        call.leave(leave_at, name)
    call.run_until(leave_at + case.watch, sample=1.0)
    return _judge(call, leave_at)


def _judge(call: Call, leave_at: float) -> Result:
    ends = call.ends()
    last = max(ends.sent, default=0.0)
    until = leave_at + last
    return Result(
        dropped=len(ends.dropped),
        turned_away=len(ends.turned_away),
        sent=len(ends.sent),
        fired=len(ends.fired),
        last=last,
        refusals=call.refusals(leave_at, until),
        successes=call.successes(leave_at, until),
        refusals_in_all=call.refusals(),
        successes_in_all=call.successes(),
        used=call.used(leave_at, until),
        forecast=max((f.lateness for f in call.forecasts), default=0.0),
    )
