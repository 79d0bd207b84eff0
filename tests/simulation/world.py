"""The whole daemon without sockets, on a virtual clock: the real engine, rules, store and decoders against the sandbox's models.

One heap of events drives everything; nothing sleeps, and nothing reads a clock. `World.now` is the true time. The daemon has a clock of its own
(`Daemon.clock`), as `daemon/clock.py` has it: set at its start, and unmoved while it runs. What the asyncio parts do is done here in the smallest
form that keeps their order of events: one step at a time, everything that waits goes into the next, answers leave after the commit.

There may be several instances of the daemon on one store (`Setting.instances`, and `store.py`): each has its own engine, and misfortune of its own.

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
from dataclasses import dataclass, field
from random import Random
from typing import Any

from sfu_delegate.daemon.sharing import REFRESH_EVERY
from sfu_delegate.delegation import model
from sfu_delegate.delegation.model import DelayedEvent, Input, Seen, Task
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.replies import Reply
from sfu_delegate.engine import Limits
from sfu_delegate.livekit import webhook
from sfu_delegate.matrix.management import Generation
from sfu_delegate.sandbox import homeserver as matrix
from sfu_delegate.sandbox import sfu as livekit
from sfu_delegate.sandbox.answer import Answer as HttpResponse
from sfu_delegate.sandbox.homeserver import End, HomeserverFaults, HomeserverModel, RateLimit
from sfu_delegate.sandbox.sfu import Delivery, SfuFaults, SfuModel
from sfu_delegate.store.base import StoreUnavailable

from tests.simulation.daemon import AGREE, LOOK_TIMEOUT, SFU, Daemon
from tests.simulation.front import PATIENCE, Front
from tests.simulation.people import Person
from tests.simulation.store import Board, SharedStore, Store
from tests.simulation.watching import Spans, Violation, Watch

START = 1_760_000_000.0
DAEMON = "delegate"  # its address at the homeservers
STORE_RETRY_AFTER = 2.0  # what a 503 tells LiveKit
STANDSTILL = 20_000  # events in the same instant: something goes round in circles


class Homeserver(HomeserverModel):
    """The model, with somebody who is told of every end."""

    told: Callable[[matrix.DelayedEvent], None]

    def _end(self, event: matrix.DelayedEvent, end: End, at: float, by: str) -> None:
        super()._end(event, end, at, by)
        self.told(event)


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
    instances: int = 1  # of the daemon, on one store


class World:
    """Everything there is: one SFU, homeservers, the daemon's instances, and people. Deterministic by its seed."""

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
        self.policy = setting.policy
        self.luck = Random(f"luck {seed}")  # of what there is only with several instances: a single one's history is what it was without them
        self.store = Store.empty()
        self.daemons: list[Daemon] = []
        self.up = Spans(self.now, holds=False)  # somebody takes what comes
        self.managing = Spans(self.now, holds=False)  # … and reaches the homeservers
        self.looking = Spans(self.now, holds=False)  # … and reaches the SFU
        self.unanimous = Spans(self.now, holds=True)  # nobody who is up tries in vain what others can do
        self.upsets: list[float] = []  # when some of what was claimed may have been left to the end of its lease
        self._were_acting: set[str] = set()
        self.front = Front(self, seed)
        self.board = Board(self.store)
        for number in range(setting.instances):
            store = self.store if setting.instances == 1 else SharedStore(self.board, f"i{number}", DAEMON, f"{seed} {number}", self.note_upset)
            self.daemons.append(Daemon(self, setting.policy, setting.limits, setting.in_flight, store))
        for daemon in self.daemons:
            daemon.start()

    def close(self) -> None:
        """Let go of the database, for the next world."""
        self.store.put_back()

    # ── the daemon ──

    @property
    def daemon(self) -> Daemon:
        """The only one; the first, where there are several."""
        return self.daemons[0]

    @property
    def several(self) -> bool:
        """Are there several?"""
        return len(self.daemons) > 1

    @property
    def offset(self) -> float:
        """By how much the clock of what is stored differs from the true time, in seconds. That of several is the database's."""
        return self.board.offset if self.several else self.daemon.offset

    @property
    def agreed(self) -> bool:
        """Have all instances followed the database's clock?"""
        return all(abs(daemon.offset - self.offset) < 2 * AGREE for daemon in self.daemons if daemon.running)

    @property
    def takeover(self) -> float:
        """Seconds until what an instance had claimed is somebody else's: the lease ends, and others ask the database what is due once a second."""
        return self.policy.lease + 1.05 * REFRESH_EVERY + 2 * AGREE

    def note_daemons(self) -> None:
        """The condition of one of them may have changed."""
        acting = {daemon.name for daemon in self.daemons if daemon.acting}
        if self._were_acting - acting:
            self.note_upset()
        self._were_acting = acting
        self.up.set(self.now, any(daemon.up for daemon in self.daemons))
        self.managing.set(self.now, any(daemon.up and daemon.homeserver_cut is None for daemon in self.daemons))
        self.looking.set(self.now, any(daemon.up and daemon.sfu_cut is None for daemon in self.daemons))
        self.unanimous.set(self.now, not any(daemon.up and not daemon.acting for daemon in self.daemons))

    def note_upset(self) -> None:
        """What somebody has claimed may not be done by them."""
        self.upsets.append(self.now)

    def put(self, given: Input, then: Callable[[Reply | Exception], None]) -> None:
        """A client's request. `then` gets the reply, or an exception, see `Daemon.put`."""
        self.front.put(given, then)

    def rows(self) -> list[DelayedEvent]:
        """All rows there are."""
        return self.store.rows()

    def rows_of(self, room: str, identity: str, *, finished: bool = False) -> list[DelayedEvent]:
        """The rows of one participant."""
        return self.store.reading(lambda tx: tx.of_participants([(SFU, room, identity)], finished=finished))

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
        times = [self.sfu.next_event(), *(daemon.next_event() for daemon in self.daemons)]
        times += [homeserver.next_event() for homeserver in self.homeservers.values()]
        if self._heap:
            times.append(self._heap[0][0])
        return min((at for at in times if at is not None), default=float("inf"))

    def _turn(self) -> None:
        """Everything of this instant: the models by themselves, what was planned, and one step of each instance."""
        now = self.now
        for homeserver in self.homeservers.values():
            homeserver.tick(now)
        at = self.sfu.next_event()
        if at is not None and at <= now:
            for delivery in self.sfu.due(now):
                self._deliver(delivery)
        while self._heap and self._heap[0][0] <= now:
            heapq.heappop(self._heap)[2]()
        for daemon in self.daemons:
            due = daemon.next_event()
            if due is not None and due <= now:
                daemon.step()

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
        self.doubtful_until = self.now + self.policy.doubt + more

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
        daemon = self.front.chosen(SFU)
        if daemon is None:
            self._webhook_answered(delivery, None)
            return
        decoded = webhook.decode(delivery.body)
        given = webhook.to_input(SFU, decoded)
        if given is None:
            if daemon.paused:
                self.after(PATIENCE, lambda: self._webhook_answered(delivery, None))
                return
            daemon.engine.heard(SFU, daemon.clock())
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

        self.front.put_to(daemon, given, then)

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

    def manage(self, task: Task, claimed_at: float, address: str = DAEMON) -> HttpResponse:
        """A management request arrives at its homeserver."""
        path, body = Generation.C.request(task.delay_id, task.action)
        self._managing = (task, claimed_at)
        try:
            response = self.homeservers[task.homeserver].request("POST", path, self.now, body=body, ip=address)
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
