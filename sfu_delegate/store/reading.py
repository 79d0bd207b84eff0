"""What operators ask of the database, beside the engine: over a connection of its own that can only read, for each question anew.

Nobody's call waits for it, so it is written for people who look something up, and not for speed: SQLAlchemy makes the statements, and a filter that
no index serves reads the table. It must never give out a delay_id or a token: of the one it reads the hint that logs show, and of the other nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Integer, and_, case, create_engine, false, func, null, or_, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from sfu_delegate.delegation.model import DelayedEvent, Note, Room, State
from sfu_delegate.store import schema
from sfu_delegate.store.base import StoreUnavailable
from sfu_delegate.store.rows import FIELDS, delayed_event_of, room_of

_event = schema.delayed_event
_room = schema.room
_history = schema.history

_third = func.length(_event.c.delay_id, type_=Integer) // 3
_hint = func.substr(_event.c.delay_id, 1, case((_third < 8, _third), else_=8)).concat("…")  # as `observe.logs.short`
_INSTEAD: dict[str, ColumnElement[Any]] = {"delay_id": _hint.label("delay_id"), "token": null().label("token")}
_SHOWN = [_INSTEAD.get(name, _event.c[name]) for name in FIELDS]

NOTES_MOST = 2000
"""Lines of one delayed event's history that are read: the newest."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which delayed events are wanted; what is None or empty does not matter. Times in Unix seconds."""

    sfu: str | None = None
    rooms: tuple[str, ...] = ()  # LiveKit's names
    user: str | None = None  # the Matrix user, or the identity under which it is in the room
    homeserver: str | None = None
    states: tuple[str, ...] = ()  # of the event
    presences: tuple[str, ...] = ()  # of its participant
    outcomes: tuple[str, ...] = ()
    open: bool | None = None  # True: not finished; False: finished
    accepted_before: float | None = None
    accepted_after: float | None = None
    finished_after: float | None = None  # finished since then, or open


class RoomCount(NamedTuple):
    """Delayed events of one room that are alike."""

    sfu: str
    room: str
    state: str
    presence: str
    events: int
    participants: int


@dataclass(frozen=True, slots=True)
class Size:
    """How much the database holds."""

    events: int
    finished: int
    rooms: int
    oldest_open: float | None  # when the oldest open event was accepted, in Unix seconds
    oldest_ending: float | None  # the departure of the event that has waited longest for its goodbye


class Reader:
    """Reads one store's database. Each method raises StoreUnavailable. May be used by another thread than the store, by one at a time."""

    def __init__(self, dialect: str, connect: Callable[[], Any], failed: Callable[[Any], StoreUnavailable]) -> None:
        self._engine = create_engine(f"{dialect}://", creator=connect, poolclass=NullPool)
        self._failed = failed

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection, connection.begin():
                yield connection
        except DBAPIError as error:
            raise self._failed(error.orig) from None

    def events(self, wanted: Selection, limit: int, before: int | None = None) -> list[DelayedEvent]:
        """The newest of these events, with a hint in place of their delay_id, and no token; `before`: of those with a smaller id only."""
        statement = select(*_SHOWN).where(*self._where(wanted)).order_by(_event.c.id.desc()).limit(limit)
        if before is not None:
            statement = statement.where(_event.c.id < before)
        with self._reading() as connection:
            return [delayed_event_of(tuple(row)) for row in connection.execute(statement)]

    def count(self, wanted: Selection) -> int:
        """How many there are."""
        with self._reading() as connection:
            return int(connection.execute(select(func.count()).select_from(_event).where(*self._where(wanted))).scalar_one())

    def delegation(self, delegation: str) -> list[DelayedEvent]:
        """The events of one delegation."""
        with self._reading() as connection:
            found = connection.execute(select(*_SHOWN).where(_event.c.delegation == delegation).order_by(_event.c.id))
            return [delayed_event_of(tuple(row)) for row in found]

    def event(self, event: int) -> DelayedEvent | None:
        """One event, by the number that logs call `row`."""
        if not 0 < event < 1 << 63:
            return None
        with self._reading() as connection:
            row = connection.execute(select(*_SHOWN).where(_event.c.id == event)).one_or_none()
            return None if row is None else delayed_event_of(tuple(row))

    def history(self, events: Iterable[int], most: int = NOTES_MOST) -> list[Note]:
        """What happened to these events, oldest first; `most`: so many lines of each, the newest."""
        notes: list[Note] = []
        columns = (_history.c.event, _history.c.at, _history.c.what, _history.c.detail)
        with self._reading() as connection:
            for event in events:
                newest = select(*columns).where(_history.c.event == event).order_by(_history.c.at.desc()).limit(min(most, NOTES_MOST))
                notes += reversed([Note(*row) for row in connection.execute(newest)])
        return sorted(notes, key=lambda note: note.at)

    def rooms(self, limit: int, after: tuple[str, str] | None = None, *, sfu: str | None = None, named: Sequence[str] = ()) -> list[Room]:
        """Rooms with delegations, by SFU and name; `after`: those that come after this one; `named`: only these."""
        statement = select(*_room.columns).order_by(_room.c.sfu, _room.c.name).limit(limit)
        if sfu is not None:
            statement = statement.where(_room.c.sfu == sfu)
        if named:
            statement = statement.where(_room.c.name.in_(named))
        if after is not None:
            statement = statement.where(or_(_room.c.sfu > after[0], and_(_room.c.sfu == after[0], _room.c.name > after[1])))
        with self._reading() as connection:
            return [room_of(tuple(row)) for row in connection.execute(statement)]

    def in_rooms(self, rooms: Sequence[tuple[str, str]]) -> list[RoomCount]:
        """Who is in these rooms, by SFU and name: open events only."""
        c = _event.c
        by_sfu: dict[str, list[str]] = {}
        for sfu, name in rooms:
            by_sfu.setdefault(sfu, []).append(name)
        # Not a condition for each room: a thousand of them are too deep for SQLite.
        these = or_(false(), *(and_(c.sfu == sfu, c.room.in_(names)) for sfu, names in by_sfu.items()))
        columns = (c.sfu, c.room, c.state, c.presence)
        statement = select(*columns, func.count(), func.count(c.identity.distinct())).where(these, c.state != State.DONE.value).group_by(*columns)
        with self._reading() as connection:
            return [RoomCount(*row) for row in connection.execute(statement)]

    def size(self) -> Size:
        """How much there is: reads the whole table."""
        c = _event.c
        finished = c.state == State.DONE.value
        with self._reading() as connection:
            events, done, oldest, ending = connection.execute(
                select(
                    func.count(),
                    func.count().filter(finished),
                    func.min(c.accepted_at).filter(~finished),
                    func.min(c.ended_at).filter(c.state == State.ENDING.value),
                )
            ).one()
            rooms = connection.execute(select(func.count()).select_from(_room)).scalar_one()
        return Size(events, done, rooms, oldest, ending)

    def _where(self, wanted: Selection) -> list[ColumnElement[bool]]:
        c = _event.c
        where: list[ColumnElement[bool]] = []
        if wanted.rooms and wanted.sfu is None:
            # The index begins with the SFU: without it, all of it would be read.
            where.append(or_(false(), *(and_(c.sfu == sfu, c.room == room) for sfu in self._sfus() for room in wanted.rooms)))
        elif wanted.rooms:
            where += [c.sfu == wanted.sfu, c.room.in_(wanted.rooms)]
        elif wanted.sfu is not None:
            where.append(c.sfu == wanted.sfu)
        if wanted.user is not None:
            # The legacy identity is `@user:server:DEVICE`.
            devices = func.substr(c.identity, 1, len(wanted.user) + 1) == f"{wanted.user}:"
            where.append(or_(c.user == wanted.user, c.identity == wanted.user, c.alias == wanted.user, c.twin == wanted.user, devices))
        if wanted.homeserver is not None:
            where.append(c.homeserver == wanted.homeserver)
        for column, values in ((c.state, wanted.states), (c.presence, wanted.presences), (c.outcome, wanted.outcomes)):
            if values:
                where.append(column.in_(values))
        if wanted.open is not None:
            where.append((c.state != State.DONE.value) if wanted.open else (c.state == State.DONE.value))
        if wanted.accepted_before is not None:
            where.append(c.accepted_at < wanted.accepted_before)
        if wanted.accepted_after is not None:
            where.append(c.accepted_at >= wanted.accepted_after)
        if wanted.finished_after is not None:
            where.append(or_(c.finished_at.is_(None), c.finished_at >= wanted.finished_after))
        return where

    def _sfus(self) -> list[str]:
        """The SFUs that there are events of: one search in the index for each."""
        with self._reading() as connection:
            found: list[str] = []
            last = ""
            while (following := connection.execute(select(func.min(_event.c.sfu)).where(_event.c.sfu > last)).scalar_one()) is not None:
                found.append(following)
                last = following
            return found
