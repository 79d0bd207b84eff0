"""Databases with many delegations, filled directly: to accept a million over HTTP would take a quarter of an hour.

Everybody's names are made from a number, so that nobody needs to remember a million of them: the SFU lists people by the same rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from sfu_delegate.delegation.model import Accept, DelayedEvent, NewEvent, OnEnd, Presence, Room, Session
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.engine import Engine, Limits
from sfu_delegate.livekit.names import ROOM_SLOT, derived, identity, plain_identity
from sfu_delegate.store.base import Transaction
from sfu_delegate.store.sqlite import SqliteStore

from benchmarks.world import LAST_FOR_EVER, SFU, Person, World

IN_A_ROOM = 10
IN_A_TRANSACTION = 10_000
SIX_HOURS = 6 * 3600.0
DAY = 86400.0
CHANGED_WITHIN = 240.0  # seconds; rooms in which something has changed lately are looked at every `presence.interval`
NEVER = 10 * 86400.0  # seconds; longer than any scenario
PRESENCE = {"interval": NEVER, "interval_most": NEVER, "first_looks": [NEVER], "join_timeout": NEVER}
"""The configuration's section for looks that are as rare as can be: each room once after the start, and then not again."""
POLICY = Policy(first_looks=(NEVER,), join_timeout=NEVER)
CYCLE = POLICY.restart_at - POLICY.restart_spread / 2  # of the delay, from one restart to the next, on the average


@dataclass
class Filling:
    """`count` delegations of `server`'s users, as they were at the time `at`: all connected, but those in `expected`, who have not joined yet.

    Their restarts are due at any time from `calm` seconds later on, as many in each second. `delay_ids` are those that the homeserver knows;
    others are made up.
    """

    count: int
    server: str
    at: float
    delay: float
    calm: float
    expected: frozenset[int] = frozenset()
    delay_ids: Mapping[int, str] = field(default_factory=dict)
    room_sids: Mapping[str, str] = field(default_factory=dict)

    def matrix_room(self, number: int) -> str:
        """The Matrix room of a room's number."""
        return f"!filled{number:06d}:{self.server}"

    def person(self, number: int) -> Person:
        """Who has this number."""
        matrix_room = self.matrix_room(number // IN_A_ROOM)
        user, device, member = f"@filled{number:07d}:{self.server}", f"FILLED{number:07d}", f"77d4e6a0-0000-4000-8000-{number:012d}"
        room = derived(matrix_room, ROOM_SLOT)
        return Person(matrix_room, user, device, member, room, identity(user, device, member), self.delay_ids.get(number, f"syd_filled{number:010d}"))

    def countdown(self, number: int) -> tuple[float, float]:
        """Since when its countdown has been going on, and when its restart is due."""
        random = Random(number)
        due = self.at + self.calm + random.random() * CYCLE * self.delay
        since = due - self.delay * (POLICY.restart_at - POLICY.restart_spread * random.random())
        return min(self.at, since), due

    def fill(self, path: Path) -> None:
        """Write them to a new database."""
        store = SqliteStore(path)
        random = Random(7)
        for start in range(0, self.count, IN_A_TRANSACTION):
            numbers = range(start, min(self.count, start + IN_A_TRANSACTION))
            store.atomically(lambda tx, numbers=numbers: self._write(tx, numbers, random))  # type: ignore[misc]
            if store.is_log_large:
                store.checkpoint()
        store.idle()
        store.close()

    def _write(self, tx: Transaction, numbers: range, random: Random) -> None:
        for number in numbers:
            tx.insert(self._row(tx.new_id(), number, random))
        for number in range(numbers.start // IN_A_ROOM, -(-numbers.stop // IN_A_ROOM)):
            name = derived(self.matrix_room(number), ROOM_SLOT)
            sid = self.room_sids.get(name, f"RM_filled{number:06d}")
            due = self.at + LAST_FOR_EVER  # the start asks for a look at every room
            tx.save_room(Room(SFU, name, sid, "", self.at, False, 0.0, 0.0, None, due, True, 0, 0, False))

    def _row(self, id: int, number: int, random: Random) -> DelayedEvent:
        person = self.person(number)
        since, due = self.countdown(number)
        row = self._accepted._replace(
            id=id,
            delegation=f"dlg_{random.getrandbits(128):032x}",
            room=person.room,
            identity=person.identity,
            alias=plain_identity(person.user, person.device),
            user=person.user,
            delay_id=person.delay_id,
            verified_at=since,
            running_since=since,
            restarts=1,
            due=due,
            harm=since + self.delay,
            claimed=False,
        )
        if number in self.expected:
            return row
        joined = self.at - CHANGED_WITHIN * random.random()
        session = Session(f"PA_filled{number:07d}", round(joined * 1000), True, joined)
        return row._replace(presence=Presence.CONNECTED, presence_since=joined, look_at=None, sessions=(session,))

    @cached_property
    def _accepted(self) -> DelayedEvent:
        """The row of a delegation that the engine has just accepted."""
        store = SqliteStore(":memory:")
        event = NewEvent("syd_", self.delay, OnEnd.SEND)
        accept = Accept("dlg_", SFU, "room", "identity", self.server, (event,))
        Engine(store, POLICY, Limits(), Random(7)).step([accept], self.at)
        row = store.reading(lambda tx: tx.of_delegation("dlg_"))[0]
        store.close()
        return row

    # ── the SFU's side ──

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {derived(self.matrix_room(number), ROOM_SLOT): number for number in range(-(-self.count // IN_A_ROOM))}

    @property
    def rooms(self) -> int:
        """How many rooms there are."""
        return -(-self.count // IN_A_ROOM)

    def residents(self, room: str) -> list[dict[str, Any]] | None:
        """Whom the SFU lists in a room, but for those who are expected; None for a room that is none of these."""
        number = self._numbers.get(room)
        if number is None:
            return None
        there = range(number * IN_A_ROOM, min(self.count, (number + 1) * IN_A_ROOM))
        return [self._listed(other) for other in there if other not in self.expected]

    def _listed(self, number: int) -> dict[str, Any]:
        person = self.person(number)
        joined = str(int(self.at))
        return {
            "sid": f"PA_filled{number:07d}",
            "identity": person.identity,
            "state": "ACTIVE",
            "tracks": [],
            "metadata": "",
            "joined_at": joined,
            "joined_at_ms": f"{joined}000",
            "name": person.user,
            "version": 2,
            "permission": {"can_subscribe": True, "can_publish": True, "can_publish_data": True, "can_publish_sources": []},
            "region": "",
            "is_publisher": True,
            "kind": "STANDARD",
            "attributes": {},
            "disconnect_reason": "UNKNOWN_REASON",
        }


def scattered(world: World, count: int, some: int) -> Filling:
    """`count` rows, and of `some` of them, scattered over all, the homeserver knows the event, and the participant is expected.

    The same numbers make the same names, so that a database that was filled for one world fits all others with the same seed and ports.
    """
    step = max(1, count // some)
    expected = frozenset(list(range(0, count, step))[:some])
    filling = Filling(count, world.homeserver.server_name, world.now(), delay=DAY, calm=DAY / 4, expected=expected)
    delay_ids, room_sids = {}, {}
    for number in sorted(filling.expected):
        person = filling.person(number)
        world.schedule(person, filling.delay)
        delay_ids[number] = person.delay_id
        if person.room not in room_sids:
            room_sids[person.room] = world.open(person.room)
    filling.delay_ids, filling.room_sids = delay_ids, room_sids
    filling.residents("")  # its rooms are numbered now, not while somebody waits
    return filling


def all_known(world: World, count: int) -> Filling:
    """`count` rows whose participants are all connected, and whose events the homeserver knows."""
    filling = Filling(count, world.homeserver.server_name, world.now(), delay=SIX_HOURS, calm=0.0)
    delay_ids = {}
    for number in range(count):
        person = filling.person(number)
        world.schedule(person, filling.delay)
        event = world.homeserver.events[person.delay_id]
        event.scheduled_at = event.since = filling.countdown(number)[0]
        delay_ids[number] = person.delay_id
    filling.delay_ids = delay_ids
    filling.residents("")
    return filling
