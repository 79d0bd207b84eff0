"""What the page shows in tests: three days at two SFUs, lived by the real engine in a moment, and the same on every run.

On a calm day all homeservers do what they are asked for. In a bad night one has failed for some minutes, and one has lost somebody's event.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry
from sfu_delegate.api.overview import HomeserverState, Overview, Promises, SfuState
from sfu_delegate.api.services import AdminServices, Phase, Probes, Readiness
from sfu_delegate.delegation.model import Accept, Action, Answered, End, Input, Lane, Listed, Looked, NewEvent, OnEnd, Seen, Sighting, Task, Verdict
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.engine import Engine, Limits
from sfu_delegate.livekit.names import identity as identity_of
from sfu_delegate.livekit.names import room_name
from sfu_delegate.observe.logs import get_logger
from sfu_delegate.store.reading import Reader
from sfu_delegate.store.sqlite import SqliteStore

T = TypeVar("T")

NOW = datetime(2026, 3, 12, 21, 47, 30, tzinfo=UTC).timestamp()
STANDUP = "!standup:example.org"
RADIO = "!radio:example.org"
NASTY_ROOM = "<script>alert(1)</script>/\u202egnp.\x07 %2e%2e?a=b&c=d#\u200b"
NASTY_USER = '"><img src=x onerror=alert(1)>\u202e\u2066\x00{{ 7 * 7 }}' + "W" * 300
DELAY_ID = "syd_secret_{}_that_nobody_may_see"
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


@dataclass
class Person:
    """Somebody who delegates."""

    user: str | None
    identity: str
    room: str
    sfu: str
    homeserver: str
    delegation: str


class Course:
    """The engine with a clock of its own, and an SFU and homeservers that answer at once, or a little later."""

    def __init__(self, path: Path, begins: float) -> None:
        self.store = SqliteStore(path)
        self.store._connection.execute("PRAGMA synchronous=OFF")  # nothing of this needs to outlive the test
        # Fewer looks than usual: nobody is missed here, and three days shall take a second.
        self.engine = Engine(self.store, Policy(interval=2 * HOUR, interval_most=2 * HOUR), Limits(), Random(7), in_flight=lambda _: 8)
        self.at = begins
        self.here: dict[tuple[str, str], dict[str, Listed]] = {}
        self.forgotten: set[str] = set()  # delegations of which the homeserver has lost the events
        self.fails_from: dict[str, float] = {}
        self._events: list[tuple[float, int, Callable[[], Input | None]]] = []
        self._numbers = itertools.count()
        self._wake: float | None = None

    def plan(self, at: float, make: Callable[[], Input | None]) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), make))

    def run(self, until: float) -> None:
        """Live until then."""
        while True:
            following = min((at for at in (self._events[0][0] if self._events else None, self._wake) if at is not None), default=until)
            if following > until:
                break
            self.at = max(self.at, following)
            inputs = []
            while self._events and self._events[0][0] <= self.at:
                if (given := heapq.heappop(self._events)[2]()) is not None:
                    inputs.append(given)
            step = self.engine.step(inputs, self.at)
            self._wake = None if step.wake is None else max(step.wake, self.at + 0.01)
            for task in step.tasks:
                self._answer(task)
        self.at = until

    def _answer(self, task: Task) -> None:
        sent = self.at
        if task.action is Action.LOOK:
            here = tuple(self.here.get((task.sfu, task.room), {}).values())
            self.plan(sent + 0.05, lambda: Looked(task.sfu, task.room, task.claim, sent, here))
            return
        verdict, detail = Verdict.DONE, "200"
        if task.delegation in self.forgotten:
            verdict, detail = Verdict.NOT_FOUND, "404 M_NOT_FOUND"
        elif sent >= self.fails_from.get(task.homeserver, NOW + DAY):
            verdict, detail = Verdict.FAILED, "no connection: connection refused"
        self.plan(sent + 0.12, lambda: Answered(task.homeserver, task.event, task.claim, task.action, sent, verdict, detail=detail))

    # ── what people do ──

    def delegate(self, at: float, person: Person, *delays: float, on_end: OnEnd = OnEnd.SEND) -> None:
        events = tuple(NewEvent(DELAY_ID.format(f"{person.delegation}{number}"), delay, on_end) for number, delay in enumerate(delays or (HOUR,)))
        self.plan(at, lambda: Accept(person.delegation, person.sfu, person.room, person.identity, person.homeserver, events, user=person.user))

    def join(self, at: float, person: Person, sid: str = "PA_1") -> None:
        def joined() -> Input:
            self.here.setdefault((person.sfu, person.room), {})[person.identity] = Listed(person.identity, sid, "ACTIVE", int(at * 1000))
            return Seen(person.sfu, person.room, person.identity, Sighting.JOINED, sid, int(at * 1000), created_at=at)

        self.plan(at, joined)

    def leave(self, at: float, person: Person, reason: str = "CLIENT_INITIATED", sid: str = "PA_1", joined: float = 0.0) -> None:
        def left() -> Input:
            self.here.get((person.sfu, person.room), {}).pop(person.identity, None)
            return Seen(person.sfu, person.room, person.identity, Sighting.LEFT, sid, int(joined * 1000), reason, created_at=at)

        self.plan(at, left)

    def in_call(self, at: float, person: Person, *delays: float) -> None:
        self.delegate(at, person, *delays)
        self.join(at + 2.4, person)


def person(name: str, room: str, number: int, sfu: str = "main", homeserver: str = "example.org") -> Person:
    """One whose identity is derived, as clients have it."""
    user = f"@{name}:{homeserver}"
    return Person(user, identity_of(user, f"DEVICE{name}", f"member-{name}"), room, sfu, homeserver, f"d{number:02}-{name}-of-the-scene"[:22])


STANDUP_ROOM, RADIO_ROOM = room_name(STANDUP), room_name(RADIO)
ALICE, BOB, CAROL, DAVE, ERIN, FRANK = (person(name, STANDUP_ROOM, at) for at, name in enumerate(("alice", "bob", "carol", "dave", "erin", "frank")))
GRACE = person("grace", STANDUP_ROOM, 6)  # dropped while connected
HEIDI = person("heidi", STANDUP_ROOM, 7, homeserver="slow.example")  # a ghost: her homeserver fails
RADIO_BOT = person("radio", RADIO_ROOM, 8, sfu="frankfurt")  # for three days
SHORT = person("judy", RADIO_ROOM, 9, sfu="frankfurt")  # a countdown of 30 s
MALLORY = Person(NASTY_USER, "m" + NASTY_USER, NASTY_ROOM, "main", "example.org", "d10-mallory-the-nasty")
OSCAR = person("oscar", STANDUP_ROOM, 11)  # two events in one delegation
PEGGY = person("peggy", STANDUP_ROOM, 12, homeserver="never.example")  # not confirmed


def lived(path: Path, *, bad: bool = False) -> Course:
    """All that has happened until NOW; on a calm day, or in a bad night."""
    course = Course(path, NOW - 3 * DAY)
    for at, somebody in enumerate((ALICE, BOB, CAROL)):
        course.in_call(NOW - 95 * MINUTE + 11 * at, somebody)
    course.in_call(NOW - 40 * MINUTE, DAVE, 8 * MINUTE)
    course.leave(NOW - 2.2, DAVE, "CONNECTION_TIMEOUT")
    course.in_call(NOW - 74 * MINUTE, ERIN, 20 * MINUTE)
    course.leave(NOW - 51 * MINUTE, ERIN, "SIGNAL_CLOSE")
    course.join(NOW - 51 * MINUTE + 3, ERIN, "PA_2")
    course.leave(NOW - 20 * MINUTE, ERIN, sid="PA_2")
    course.in_call(NOW - 45 * MINUTE, OSCAR, 15 * MINUTE, HOUR)
    course.delegate(NOW - 40.0, FRANK)
    course.plan(NOW - 10 * MINUTE, lambda: End(CAROL.delegation))
    if bad:
        _a_bad_night(course)
    else:
        _a_calm_day(course)
    course.run(NOW)
    return course


def _a_calm_day(course: Course) -> None:
    course.in_call(NOW - 3 * DAY + 10, RADIO_BOT)
    course.in_call(NOW - 40 * MINUTE, SHORT, 30.0)
    course.in_call(NOW - 30 * MINUTE, MALLORY)
    for number in range(70):
        one = Person(None, f"guest-{number:02}", f"lobby-{number % 57:02}", "main", "example.org", f"g{number:02}-guest-in-the-lobby")
        course.in_call(NOW - 26 * MINUTE + number, one)
        if number % 10 == 3:
            course.leave(NOW - 15 * MINUTE + number, one)


def _a_bad_night(course: Course) -> None:
    course.fails_from = {"slow.example": NOW - 6 * MINUTE, "never.example": 0.0}
    course.in_call(NOW - 3 * HOUR, GRACE, 20 * MINUTE)
    course.plan(NOW - 2 * HOUR, lambda: course.forgotten.add(GRACE.delegation))
    course.in_call(NOW - 50 * MINUTE, HEIDI, 30 * MINUTE)
    course.leave(NOW - 5 * MINUTE, HEIDI)
    course.delegate(NOW - 55.0, PEGGY)


def overview_of(course: Course) -> Overview:
    """What the daemon would say of itself. The numbers since the start are made up."""
    states: dict[tuple[str, str], int] = {}
    for (_, state, presence), count in course.engine.states.items():
        states[state, presence] = states.get((state, presence), 0) + count
    started = NOW - 3 * DAY - 2 * HOUR
    calm = dict.fromkeys((Lane.END, Lane.RESTART), (0, NOW))
    homeserver = HomeserverState("example.org", "example.org", "", "", 76, "none", 0.0, 0.0, True, 0.0, calm)
    return Overview(
        version="0.1.0",
        instance="",
        instances=1,
        started_at=started,
        now=NOW,
        database="/var/lib/sfu-delegate/sfu-delegate.db",
        keep=7 * DAY,
        promises=Promises(0, {"sent": 1204, "already_ended": 3911, "replaced": 87, "ran_out": 2}, 1204, 1000, 0.214, 1.87, 2.31),
        states=states,
        webhooks={
            ("main", "participant_joined", "stored"): 9412,
            ("main", "participant_left", "stored"): 9377,
            ("main", "track_published", "ignored"): 20114,
        }
        | {
            ("frankfurt", "participant_joined", "stored"): 211,
            ("frankfurt", "participant_left", "stored"): 209,
            ("unknown", "unknown", "unknown_key"): 3,
        },
        actions={("restart", "done"): 14310, ("send", "done"): 1204, ("cancel", "done"): 87, ("send", "not_found"): 12, ("restart", "uncertain"): 4},
        homeservers=(
            homeserver,
            homeserver._replace(name="matrix.example.net", service=None, limit="some", rate=1.2, burst=10.0, exempt=False, events=5),
        ),
        sfus=(
            SfuState("main", "wss://sfu.example.org", "", NOW - 2.2, NOW - 31.0, None, several_nodes=False),
            SfuState("frankfurt", "wss://fra.sfu.example.org", "", NOW - 240.0, NOW - 44.0, None, several_nodes=True),
        ),
    )


def in_trouble(overview: Overview) -> Overview:
    """A bad night: a homeserver that cannot be asked, an SFU that is silent, and somebody who was dropped."""
    slow = overview.homeservers[1]._replace(
        name="slow.example",
        problem="no connection: connection refused.",
        waiting={Lane.END: (1, NOW - 5 * MINUTE), Lane.RESTART: (2, NOW - 40.0)},
        lateness=95.0,
        events=3,
    )
    return replace(
        overview,
        promises=overview.promises._replace(lost_while_connected=1),
        homeservers=(overview.homeservers[0], slow),
        sfus=(overview.sfus[0]._replace(problem="no answer within 5 s.", failing_since=NOW - 80.0), overview.sfus[1]),
        actions={**overview.actions, ("send", "failed"): 41, ("restart", "limited"): 12},
    )


class Inspected:
    """A daemon of which everything is known; see `api.overview.Inspection`."""

    def __init__(self, overview: Overview, reader: Reader) -> None:
        self.now = overview
        self._reader = reader
        self.asked = 0

    def overview(self) -> Overview:
        return self.now

    async def read(self, work: Callable[[Reader], T]) -> T:
        self.asked += 1
        return work(self._reader)


class NoPort:
    """Nothing is changed here."""

    def now(self) -> float:
        """See `api.port.Port`: as in the overview."""
        return NOW

    async def put(self, given: Any) -> Any:
        raise AssertionError("the page only reads")


@contextmanager
def scene(directory: Path, *, bad: bool = False) -> Iterator[tuple[AdminServices, Inspected]]:
    """What the admin listener works with, and how to change what it is told."""
    course = lived(directory / ("bad.db" if bad else "calm.db"), bad=bad)
    try:
        overview = overview_of(course)
        inspected = Inspected(in_trouble(overview) if bad else overview, course.store.reader())
        yield services_of(inspected), inspected
    finally:
        course.store.close()


def services_of(inspected: Any, token: str | None = None) -> AdminServices:
    async def ready(_: float) -> Readiness:
        return Readiness(Phase.RUNNING)

    port: Any = NoPort()
    return AdminServices(ready, CollectorRegistry(), get_logger("page"), inspected, port, Probes(), token)
