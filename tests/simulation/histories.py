"""Histories: what people and misfortune do, as a list of timed operations, made from a seed.

A history is plain data, so that it can be printed as Python code, and shrunk by leaving operations out: whatever begins in an operation ends by
itself after the operation's `value` seconds, and an operation that makes no sense (anymore) does nothing.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

from sfu_delegate.delegation.model import Action
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.sandbox.answer import Impossible
from sfu_delegate.sandbox.homeserver import RateLimit

from tests.simulation.daemon import Cut, Daemon
from tests.simulation.invariants import Judge
from tests.simulation.people import Person
from tests.simulation.world import START, Setting, World

QUIET = 150.0  # seconds between the end of all trouble and the moment in which everybody leaves
AFTERWARDS = 9_000.0  # seconds until everything must be over: more than the hour for which absences may be doubted, and the longest delay
SYNAPSE = RateLimit()
HOMESERVER = "hs.test"
NAMES = ("i0", "i1", "i2")  # of instances
LEASE = 10.0  # seconds, where there are several instances: as short as requests allow, so that others take over soon


class Op(NamedTuple):
    """At `at` seconds: `do`, to `who` (a person, a room, or an instance), with `value` (mostly seconds that it lasts).

    What is done to the daemon is done to all instances where `who` is a room.
    """

    at: float
    do: str
    who: str = ""
    value: float = 0.0


class Someone(NamedTuple):
    """A person, and the delay of their delayed events in seconds. `restarts`: the client goes on restarting them itself. `through`: it delegates
    through its homeserver, mostly.
    """

    name: str
    room: str
    delay: float
    restarts: bool = False
    through: bool = False


@dataclass(frozen=True)
class History:
    """`seed` is the world's; `quiet_at`: from then on (seconds) nothing is wrong any more; `limited`: with Synapse's rate limit; `instances`: of the
    daemon, on one store."""

    seed: int
    people: tuple[Someone, ...]
    ops: tuple[Op, ...]
    quiet_at: float
    limited: bool = False
    instances: int = 1

    def code(self, name: str = "found") -> str:
        """As Python code, for a regression test."""
        lines = [f"{name.upper()} = History(", f"    seed={self.seed},", "    people=("]
        lines += [f"        {someone!r}," for someone in self.people]
        lines += ["    ),", "    ops=("]
        lines += [f"        Op({op.at!r}, {op.do!r}, {op.who!r}, {op.value!r})," for op in self.ops]
        lines += ["    ),", f"    quiet_at={self.quiet_at!r},", f"    limited={self.limited!r},", f"    instances={self.instances!r},", ")"]
        return "\n".join(lines)


class Profile(NamedTuple):
    """What kind of trouble there is: weights of the operations, and how much of everything."""

    people: Mapping[str, float]
    faults: Mapping[str, float]
    limited: float = 0.0  # the probability of a rate limit
    most_people: int = 5
    together: float = 0.0  # the probability that they come in the same moment, and that many leave in the same moment
    instances: tuple[int, ...] = (1,)  # of the daemon: one of these numbers
    through: float = 0.0  # the probability of each person to delegate through the homeserver


MOVES = MappingProxyType(
    {
        "leave": 4.0,
        "goodbye": 3.0,
        "vanish": 4.0,
        "doze": 3.0,
        "reconnect": 4.0,
        "rejoin": 3.0,
        "reload": 3.0,
        "hang": 1.0,
        "remove": 1.0,
        "withdraw": 0.5,
        "publish": 1.0,
    }
)
WEBHOOKS = MappingProxyType(
    {"lose webhooks": 3.0, "lose all webhooks": 1.0, "delay webhooks": 2.0, "reorder webhooks": 2.0, "repeat webhooks": 1.0, "mangle webhooks": 2.0}
)
SFU_FAULTS = MappingProxyType({"sfu down": 2.0, "sfu hangs": 1.0, "sfu error": 1.0, "sfu slow": 1.0})
SFU_LIES = MappingProxyType({"sfu empty": 1.0, "sfu ghosts": 1.0})
SFU_GOES = MappingProxyType({"kill sfu": 2.0, "kill sfu redis": 1.0, "shut sfu down": 1.0, "freeze node": 1.0})
MATRIX = MappingProxyType(
    {
        "homeserver down": 3.0,
        "homeserver hangs": 2.0,
        "homeserver error": 2.0,
        "homeserver html": 1.0,
        "homeserver garbage": 1.0,
        "homeserver does not tell": 2.0,
        "homeserver slow": 1.0,
        "homeserver flaps": 2.0,
    }
)
PROCESS = MappingProxyType({"crash": 4.0, "crash after commit": 4.0, "store": 3.0, "clock": 1.5})
LIMITS = MappingProxyType({"limit": 2.0, "no limit": 1.0})
# What happens to instances of the daemon: to one of them, mostly.
INSTANCES = MappingProxyType(
    {
        "crash": 4.0,
        "crash after commit": 3.0,
        "restart": 3.0,
        "pause": 3.0,
        "pause in step": 2.0,
        "pause after commit": 2.0,
        "pause before ending": 3.0,
        "store": 2.0,
        "no database": 2.0,
        "commit not told": 2.0,
        "no homeserver": 1.5,
        "homeserver silent": 1.0,
        "homeserver deaf": 1.0,
        "no sfu": 2.0,
        "sfu silent": 1.0,
    }
)

PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "calm": Profile(MOVES, {}),
        "webhooks": Profile(MOVES, WEBHOOKS),
        "sfu": Profile(MOVES, {**SFU_FAULTS, **WEBHOOKS}),
        "lies": Profile(MOVES, {**SFU_LIES, **SFU_FAULTS}),
        "nodes": Profile(MOVES, {**SFU_GOES, **WEBHOOKS}),
        "homeserver": Profile(MOVES, MATRIX),
        "process": Profile(MOVES, PROCESS),
        "limit": Profile(MOVES, {**LIMITS, "crash": 1.0}, limited=1.0, most_people=10),
        "crowd": Profile(MOVES, {"limit": 1.0, "crash": 1.0, "homeserver error": 1.0}, limited=1.0, most_people=24, together=0.8),
        "everything": Profile(MOVES, {**WEBHOOKS, **SFU_FAULTS, **SFU_LIES, **SFU_GOES, **MATRIX, **PROCESS, **LIMITS}, limited=0.3),
        "operator": Profile({**MOVES, "operator ends": 6.0}, {**WEBHOOKS, **SFU_FAULTS, **MATRIX, "crash": 2.0}),
        "service": Profile(MOVES, {**MATRIX, **PROCESS, **WEBHOOKS}, through=0.8),
        "instances_service": Profile(MOVES, {**INSTANCES, **MATRIX}, instances=(2, 2, 3), through=0.8),
        "instances": Profile(MOVES, INSTANCES, instances=(2, 2, 3)),
        "instances_sfu": Profile(MOVES, {"no sfu": 4.0, "sfu silent": 3.0, "pause": 1.0, **WEBHOOKS}, instances=(2, 2, 3)),
        "instances_limited": Profile(MOVES, {**INSTANCES, **LIMITS}, limited=1.0, most_people=12, together=0.4, instances=(2, 2, 3)),
        "instances_everything": Profile(
            MOVES,
            {**WEBHOOKS, **SFU_FAULTS, **SFU_LIES, **SFU_GOES, **MATRIX, **LIMITS, **{what: 2 * weight for what, weight in INSTANCES.items()}},
            limited=0.3,
            instances=(2, 2, 3),
        ),
    }
)

ALONE = 0.8  # the probability that what happens to instances happens to one of them, and not to all
MANY = 8  # people from which on each has less to do
DELAYS = (60.0, 120.0, 300.0, 600.0, 3600.0)


def make(seed: int, profile: str = "everything") -> History:
    """A history of 2 to 10 minutes, and what comes after."""
    chosen = PROFILES[profile]
    random = Random(f"{profile} {seed}")
    quiet_at = random.uniform(120.0, 600.0)
    rooms = ["red", "blue"][: random.choice((1, 1, 2))]
    people = tuple(
        Someone(f"p{number}", random.choice(rooms), random.choices(DELAYS, (3.0, 2.0, 2.0, 2.0, 1.0))[0], random.random() < 0.1)
        for number in range(random.randint(1, chosen.most_people))
    )
    if chosen.through:
        way = Random(f"{profile} {seed} way")
        people = tuple(someone._replace(through=way.random() < chosen.through) for someone in people)
    ops = []
    for someone in people:
        ops.append(
            Op(_at(random, 0.0, quiet_at / 3), random.choices(("come", "come late", "come never"), (6.0, 2.0, 0.5))[0], someone.name, _wait(random))
        )
        if random.random() < 0.15:  # hardly there, and off again
            at = round(ops[-1].at + random.uniform(0.05, 6.0), 3)
            ops.append(Op(at, random.choice(("leave", "goodbye", "reload", "reconnect", "vanish")), someone.name, _wait(random)))
        for _ in range(random.choice((0, 1, 1, 2, 3)) if len(people) < MANY else random.choice((0, 0, 0, 1))):
            move = random.choices([*chosen.people], [*chosen.people.values()])[0]
            ops.append(Op(_at(random, ops[-1].at if random.random() < 0.5 else 0.0, quiet_at), move, someone.name, _wait(random)))
            if random.random() < 0.3:
                ops.append(Op(_at(random, ops[-1].at, quiet_at), "come", someone.name, _wait(random)))
    if random.random() < chosen.together:
        leave_at = _at(random, quiet_at / 3, quiet_at)
        for someone in random.sample(people, random.randint(1, len(people))):
            ops.append(Op(_at(random, leave_at, leave_at + 1.0), random.choice(("leave", "leave", "vanish")), someone.name))
    instances = 1 if len(chosen.instances) == 1 else random.choice(chosen.instances)
    if chosen.faults:
        for _ in range(random.choice((1, 1, 2, 3, 5))):
            what = random.choices([*chosen.faults], [*chosen.faults.values()])[0]
            # Where something has just happened is where misfortune is interesting.
            near = random.choice(ops).at if random.random() < 0.5 else random.uniform(0.0, quiet_at)
            at = min(quiet_at, max(0.0, round(near + random.uniform(-5.0, 5.0), 3)))
            one = instances > 1 and what in INSTANCES and random.random() < ALONE
            ops.append(Op(at, what, f"i{random.randrange(instances)}" if one else random.choice(rooms), _lasts(random, what)))
    return History(seed, people, tuple(sorted(ops)), round(quiet_at, 3), random.random() < chosen.limited, instances)


def _at(random: Random, start: float, end: float) -> float:
    return round(random.uniform(start, max(start, end)), 3)


def _wait(random: Random) -> float:
    """A gap between two things that a client does: mostly short."""
    return round(random.choice((0.0, 0.2, 1.0, 3.0, 8.0, 15.0, 25.0, 40.0, 90.0)) * random.uniform(0.8, 1.2), 3)


def _lasts(random: Random, what: str) -> float:
    if what == "clock":
        return random.choice((-86400.0, -7200.0, -300.0, -30.0, 30.0, 300.0, 7200.0, 86400.0))
    if what in {"limit", "no limit"}:
        return random.choice((0.5, 1.0, 2.0, 10.0))
    return round(random.choice((1.0, 5.0, 12.0, 20.0, 40.0, 90.0, 250.0)) * random.uniform(0.8, 1.2), 3)


# ── playing ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

HOMESERVER_FAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "homeserver down": {"down": True},
        "homeserver hangs": {"hang": True},
        "homeserver error": {"status": 502},
        "homeserver html": {"html": 403},
        "homeserver garbage": {"garbage": True},
        "homeserver does not tell": {"done_but_not_told": True},
        "homeserver slow": {"latency": {"*": 8.0}},
        "homeserver flaps": {"close": True, "probability": 0.5},
    }
)
SFU_ANSWERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sfu down": {"down": True},
        "sfu hangs": {"hang": True},
        "sfu error": {"error": 500},
        "sfu slow": {"slow": 7.0},
        "sfu empty": {"empty_lists": True},
        "sfu ghosts": {"ghosts": True},
    }
)
CUTS: Mapping[str, Cut] = MappingProxyType(
    {
        "no homeserver": Cut.REFUSED,
        "homeserver silent": Cut.SILENT,
        "homeserver deaf": Cut.DEAF,
        "no sfu": Cut.REFUSED,
        "sfu silent": Cut.SILENT,
    }
)
DELIVERIES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "lose webhooks": {"drop": 0.7},
        "lose all webhooks": {"drop": 1.0},
        "delay webhooks": {"delay": 0.7, "delay_up_to": 25.0},
        "reorder webhooks": {"reorder": 0.6, "reorder_up_to": 25.0},
        "repeat webhooks": {"duplicate": 0.8},
        "mangle webhooks": {"drop": 0.3, "delay": 0.3, "duplicate": 0.3, "reorder": 0.3},
    }
)


class Play:
    """One history being played."""

    def __init__(self, history: History, policy: Policy | None = None, log: list[tuple[float, str]] | None = None) -> None:
        self.history = history
        self.judge = Judge()
        limit = SYNAPSE if history.limited else None
        self.judge.world = self.world = World.__new__(World)
        policy = policy or (Policy() if history.instances == 1 else Policy(lease=LEASE))
        self.world.__init__(history.seed, Setting({HOMESERVER: limit}, policy, instances=history.instances), self.judge)  # type: ignore[misc]
        self.world.log = log
        self.judge.limits.append((self.world.now, limit))
        self._turns: Counter[str] = Counter()  # by kind of fault: which one is in force
        for someone in history.people:
            self.world.person(someone.name, someone.room, delay=someone.delay, restarts=someone.restarts, through=someone.through)

    def run(self) -> Judge:
        """Play it to its end. Raises Violation, or whatever else goes wrong."""
        world = self.world
        try:
            for op in self.history.ops:
                if op.at <= self.history.quiet_at:
                    world.run_until(START + op.at)
                    self._do(op)
            world.run_until(START + self.history.quiet_at)
            self._calm_down()
            world.run(QUIET)
            self.judge.quiet()
            self._everybody_leaves()
            world.run_until(world.now + AFTERWARDS, self._over)
            self.judge.close()
        finally:
            world.close()
        return self.judge

    def _over(self) -> bool:
        pending = any(event.ended_at is None for person in self.world.people.values() for event in person.events)
        if pending or self.world.several:
            return not pending and not self.world.store.unfinished()
        engine = self.world.daemon.engine
        return not any(count for (_, state, _), count in engine.states.items() if state not in ("done", "adrift"))

    def _calm_down(self) -> None:
        world = self.world
        world.fault_homeserver(HOMESERVER)
        world.fault_sfu()
        world.fault_deliveries()
        for daemon in world.daemons:
            daemon.be_well()
        if not world.sfu.running:
            world.start_sfu()
        for daemon in world.daemons:
            daemon.start()
        self._turns.clear()

    def _everybody_leaves(self) -> None:
        world = self.world
        for number, person in enumerate(world.people.values()):
            if person.asleep:
                person.give_up()
            elif number % 2:
                person.vanish()
                person.wants = False
            else:
                person.leave()
        # Rooms that nobody entered since their node died would be listed with their ghosts for ever.
        for number, (name, room) in enumerate(world.sfu.rooms.items()):
            if not room.up:
                visitor = Person(world, f"visitor{number}", name, HOMESERVER, 60.0)
                world.after(5.0, visitor.join)
                world.after(10.0, visitor.leave)

    def _for(self, kind: str, seconds: float, end: Callable[[], None]) -> None:
        """A fault of this kind ends after a while, unless another one of the kind has taken its place."""
        self._turns[kind] += 1
        turn = self._turns[kind]

        def over() -> None:
            if self._turns[kind] == turn:
                end()

        self.world.after(seconds, over)

    def _do(self, op: Op) -> None:
        world = self.world
        world.note(f"── {op.do} {op.who} {op.value:g}")
        if op.do in HOMESERVER_FAULTS:
            world.fault_homeserver(HOMESERVER, **HOMESERVER_FAULTS[op.do])
            self._for("homeserver", op.value, lambda: world.fault_homeserver(HOMESERVER))
        elif op.do in SFU_ANSWERS:
            world.fault_sfu(**SFU_ANSWERS[op.do])
            self._for("sfu", op.value, world.fault_sfu)
        elif op.do in DELIVERIES:
            world.fault_deliveries(**DELIVERIES[op.do])
            self._for("deliveries", op.value, world.fault_deliveries)
        elif op.who in world.people:
            self._move(world.people[op.who], op)
        else:
            self._misfortune(op)

    def _misfortune(self, op: Op) -> None:
        world = self.world
        match op.do:
            case "kill sfu" | "kill sfu redis":
                world.kill_sfu(redis=op.do.endswith("redis"))
                self._for("sfu process", op.value, world.start_sfu)
            case "shut sfu down":
                world.shut_sfu_down()
                self._for("sfu process", max(1.0, op.value), world.start_sfu)
            case "freeze node":
                world.freeze_node(op.who)
                self._for("node", op.value, lambda: world.thaw_node(op.who))
            case "limit":
                self._limit(RateLimit(op.value, 5.0))
            case "no limit":
                self._limit(None)
            case "clock" if world.several:
                world.board.offset += op.value
            case _:
                for daemon in world.daemons:
                    if op.who == daemon.name or op.who not in NAMES:
                        self._to_instance(daemon, op)

    def _to_instance(self, daemon: Daemon, op: Op) -> None:
        match op.do:
            case "crash":
                daemon.crash()
                self._for(f"daemon {daemon.name}", op.value, daemon.start)
            case "crash after commit":
                daemon.crash_after_commit(op.value)
            case "store":
                daemon.break_store(True)
                self._for(f"store {daemon.name}", op.value, lambda: daemon.break_store(False))
            case "clock":
                daemon.set_system_clock(daemon.offset + op.value)
                daemon.crash()
                self._for(f"daemon {daemon.name}", 2.0, daemon.start)
            case "restart":
                daemon.stop(lambda: self._for(f"daemon {daemon.name}", op.value, daemon.start))
            case "pause" | "pause in step":
                daemon.pause(in_step=op.do == "pause in step")
                self._for(f"pause {daemon.name}", op.value, daemon.resume)
            case "pause after commit":
                daemon.pause_after_commit(op.value)
            case "pause before ending":
                daemon.pause_after_commit(op.value, (Action.SEND, Action.CANCEL))
            case "no database":
                daemon.cut_store(True)
                self._for(f"database {daemon.name}", op.value, lambda: daemon.cut_store(False))
            case "commit not told":
                daemon.lose_commits(1)
            case "no homeserver" | "homeserver silent" | "homeserver deaf":
                daemon.cut_homeserver(CUTS[op.do])
                self._for(f"homeserver {daemon.name}", op.value, lambda: daemon.cut_homeserver(None))
            case "no sfu" | "sfu silent":
                daemon.cut_sfu(CUTS[op.do])
                self._for(f"sfu {daemon.name}", op.value, lambda: daemon.cut_sfu(None))

    def _limit(self, limit: RateLimit | None) -> None:
        self.world.homeservers[HOMESERVER].limit = limit
        self.judge.limits.append((self.world.now, limit))

    def _move(self, person: Person, op: Op) -> None:
        world = self.world
        try:
            self._go(person, op)
        except Impossible as impossible:
            world.note(f"impossible: {impossible}")

    def _go(self, person: Person, op: Op) -> None:
        world = self.world
        match op.do:
            case "come" | "come late" if not person.wants and not person.asleep:
                person.come(delegate_after=op.value if op.do == "come late" else 0.0)
            case "come never" if not person.wants and not person.asleep:
                person.schedule()
                person.delegate()
            case "leave" | "goodbye" if person.wants and not person.asleep:
                person.leave(say_goodbye=op.do == "goodbye")
            case "vanish" if person.wants and not person.asleep:
                person.vanish()
                person.wants = False
            case "doze" if person.wants and not person.asleep:
                person.vanish()
                world.after(op.value, person.wake_up)
            case "reconnect" if person.active:
                person.reconnect()
            case "rejoin" if person.active:
                person.reconnect(gap=op.value)
            case "reload" if person.wants and not person.asleep:
                person.reload(gap=op.value)
            case "hang" if not person.wants and not person.asleep:
                person.schedule()
                person.delegate()
                person.hang()
            case "remove" if person.active and not person.asleep:
                person.be_removed()
            case "withdraw" if person.events:
                person.withdraw()
            case "operator ends" if person.events:
                person.be_ended()
            case "publish" if person.active:
                person.publish()


def play(history: History, policy: Policy | None = None, log: list[tuple[float, str]] | None = None) -> Judge:
    """Play a history. Raises Violation."""
    return Play(history, policy, log).run()
