"""PostgreSQL, for several instances that share one database.

Nothing is held in memory between two steps: whatever a step changes, it has read and locked before, in READ COMMITTED. No two transactions wait for
each other, since all take their locks in one order:

1. those who may make rooms: advisory locks for their names, sorted;
2. the rooms of all inputs, sorted. Whatever happens in a room happens to one transaction after the other, so that none misses a row that another
   one adds;
3. the delayed events in these rooms. They can be held only by those who are at 4, and these wait for nobody;
4. what is claimed, whosever it is: SKIP LOCKED, or NOWAIT and then all over again, with the room that was missing at 2.

What instances tell each other (`news`, `exchange_pace`, …) goes over a second connection, in short transactions of one row, which are not waited
for until they are on the disk: after a crash it is learned again.

An instance that is stopped in the middle of a transaction, or whose machine is gone, holds its locks for IDLE_IN_TRANSACTION at the most.
"""

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from itertools import chain
from operator import itemgetter
from random import Random
from typing import Any, TypeVar

import psycopg
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import create_engine
from sqlalchemy.dialects.postgresql import psycopg as dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool, QueuePool
from sqlalchemy.sql import ClauseElement

from sfu_delegate import __version__
from sfu_delegate.delegation.lifecycle import ADRIFT_CHECK
from sfu_delegate.delegation.model import DelayedEvent, Lane, Note, Room, State
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.urgency import Countdown, Limit
from sfu_delegate.store import migrate, schema, statements
from sfu_delegate.store.base import (
    ADMITTED_FOR,
    GOES_ON,
    Admission,
    Heard,
    Instance,
    KnownHomeserver,
    KnownSfu,
    News,
    Participant,
    RoomKey,
    StoreUnavailable,
    Transaction,
    ValueRefused,
)
from sfu_delegate.store.census import StoreCensus
from sfu_delegate.store.reading import Reader
from sfu_delegate.store.rows import FIELDS, Columns, changed, delayed_event_of, room_of, values_of, values_of_room
from sfu_delegate.store.statements import text_of

T = TypeVar("T")

TRIES = 12  # of a transaction that has to begin anew
PAUSE = 0.02  # seconds at the most, until one that conflicted with another begins anew
UNSEEN = 10.0  # seconds for which a change may not be seen after the time that it is stamped with
AWAY = 1.0  # seconds at the most between two tries to connect
HINTS = 20_000  # rows of a backlog that are known to come next
HINTS_HOLD = 1.0  # seconds, or five times as long as it took to find them
BACKLOG_TAKES = 0.01  # seconds to look through a backlog, from which on it is worth it
CHUNK = 1000  # rows that are changed in one transaction by what changes all of them
DEAD_AFTER = 10.0  # seconds without a sign of life
NEWS_LATE = 4.0  # seconds between two times of asking, after which it may be that nobody could show one
COUNTING_HANGS_AFTER = 120.0
PACES_KEPT = 30 * 86_400.0  # seconds that what was learned of a homeserver's limit is kept without being used
FORGOTTEN_AFTER = 86_400.0  # … and an instance is not listed any more
# Seconds. They bound what one instance can do to the others, and what the server can do to all, and are below the shortest lease.
IDLE_IN_TRANSACTION = 3
LOCK_TIMEOUT = 4
STATEMENT_TIMEOUT = 30
HANGS_AFTER = 6.0  # … a transaction, for whatever reason: a server that is stopped, or that waits for a standby in the COMMIT, says nothing
OLDEST_SERVER = 13  # … of PostgreSQL; Synapse asks for no less
CONNECTIONS = 3  # for steps, for what instances tell each other, and for counting
UPGRADE_LOCK = 0x5F_DE1E_6A7E  # the advisory lock that is held while the schema is upgraded

_DIALECT: Any = dialect.dialect(paramstyle="format")  # type: ignore[no-untyped-call]
_event = schema.delayed_event
_room = schema.room
_quoted = _DIALECT.identifier_preparer.quote
_first = itemgetter(0)

# What is wrong with a value, not with the database.
_OF_ONE_INPUT = (psycopg.DataError, psycopg.IntegrityError, psycopg.NotSupportedError, errors.ProgramLimitExceeded)
# The transaction can simply be made again.
_AGAIN = (errors.SerializationFailure, errors.DeadlockDetected, errors.UniqueViolation)


class _Passed(Exception):
    """What went wrong is not the second connection's matter."""

    def __init__(self, error: Exception):
        super().__init__(type(error).__name__)
        self.error = error


class Again(Exception):
    """The transaction has to begin anew, with these rooms locked from the beginning."""

    def __init__(self, rooms: Collection[RoomKey]):
        super().__init__(f"{len(rooms)} more rooms")
        self.rooms = rooms


def _sql(statement: ClauseElement, *names: str) -> str:
    return text_of(statement, _DIALECT, *names)


def _columns(table: Any, alias: str) -> str:
    return ", ".join(f"{alias}.{_quoted(column.name)}" for column in table.columns)


def _arrays(columns: Sequence[Any]) -> str:
    """The parameters of an `unnest` of some columns: an array for each."""
    return ", ".join(f"%s::{column.type.compile(_DIALECT).partition(' ')[0]}[]" for column in columns)


def _transposed(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


_EVENT = f"SELECT {_columns(_event, 'e')} FROM delayed_event e"
_ROOM = f"SELECT {_columns(_room, 'r')} FROM room r"
_LOCKED = "ORDER BY e.id FOR NO KEY UPDATE OF e"
_MAY_MAKE = "SELECT pg_advisory_xact_lock(k) FROM unnest(%s::bigint[]) k"
_WANTED_ROOMS = "JOIN unnest(%s::text[], %s::text[]) w(sfu, name) ON r.sfu = w.sfu AND r.name = w.name"
_LOCK_ROOMS = f"{_ROOM} {_WANTED_ROOMS} ORDER BY r.sfu, r.name FOR NO KEY UPDATE OF r"
_FREE_ROOMS = f"SELECT r.sfu, r.name FROM room r {_WANTED_ROOMS} FOR NO KEY UPDATE OF r SKIP LOCKED"
_THERE = f"SELECT r.sfu, r.name FROM room r {_WANTED_ROOMS}"
_FREE_ROOM = f"{_ROOM} WHERE r.sfu = %s AND r.name = %s FOR NO KEY UPDATE NOWAIT"
_ROOMS_OF = "SELECT DISTINCT sfu, room FROM delayed_event WHERE id = ANY(%s::bigint[])"
_ROOMS_OF_DELEGATIONS = "SELECT DISTINCT sfu, room FROM delayed_event WHERE delegation = ANY(%s::text[])"
_OF_PARTICIPANTS = (
    f"{_EVENT} WHERE e.id IN ("
    "SELECT a.id FROM unnest(%s::text[], %s::text[], %s::text[]) w(sfu, room, identity) "
    "JOIN delayed_event a ON a.sfu = w.sfu AND a.room = w.room AND a.identity = w.identity AND a.state <> %s "
    "UNION ALL SELECT a.id FROM unnest(%s::text[], %s::text[], %s::text[]) w(sfu, room, identity) "
    "JOIN delayed_event a ON a.sfu = w.sfu AND a.room = w.room AND a.alias = w.identity AND a.state <> %s "
    "UNION ALL SELECT a.id FROM unnest(%s::text[], %s::text[], %s::text[]) w(sfu, room, identity) "
    "JOIN delayed_event a ON a.sfu = w.sfu AND a.room = w.room AND a.twin = w.identity AND a.state <> %s"
    f") {_LOCKED}"
)
_GET_ALL = f"{_EVENT} WHERE e.id = ANY(%s::bigint[]) {_LOCKED}"
_GET_FREE = f"{_EVENT} WHERE e.id = %s FOR NO KEY UPDATE SKIP LOCKED"
_OF_ROOM = f"{_EVENT} WHERE e.sfu = %s AND e.room = %s AND e.state <> %s {_LOCKED}"
_OF_USER = f"{_EVENT} WHERE e.sfu = %s AND e.room = %s AND e.state <> %s AND e.{_quoted('user')} = %s {_LOCKED}"
_OF_DELEGATION = f"{_EVENT} WHERE e.delegation = %s {_LOCKED}"
_NOWAIT = " NOWAIT"
_PEEK = f"{_EVENT} WHERE e.delegation = ANY(%s::text[]) ORDER BY e.id"


def _todo(*more: Any) -> str:
    """The conditions twice: a row that somebody has just claimed is seen as it was, and looked at again once it is locked."""
    ids = _sql(statements.due_ids(*more), *("abcc" if more else "abc"), "d")
    again = "AND e.lane = %s AND e.due <= %s"
    return f"{_EVENT} JOIN ({ids}) w ON e.id = w.id {again} ORDER BY e.harm LIMIT %s FOR NO KEY UPDATE OF e SKIP LOCKED"


_TODO, _TODO_IN_TIME, _TODO_HARMED = _todo(), _todo(statements.IN_TIME), _todo(statements.HARMED)
_DUE_IDS, _DUE_IDS_IN_TIME, _DUE_IDS_HARMED = (
    _sql(statements.due_ids(*more), *("abcc" if more else "abc"), "d") for more in ((), (statements.IN_TIME,), (statements.HARMED,))
)
_OF_HINTS = f"{_EVENT} WHERE e.id = ANY(%s::bigint[]) AND e.homeserver = %s AND e.lane = %s AND e.due <= %s"
_OF_HINTS_END = " ORDER BY e.harm LIMIT %s FOR NO KEY UPDATE OF e SKIP LOCKED"
_SOON = _sql(statements.SOON, "a", "b")
_NEXT_DUE = _sql(statements.NEXT_DUE, *("a" for _ in Lane))
_ROOMS_DUE = f"{_ROOM} WHERE r.sfu = %s AND r.routine = %s AND r.due <= %s ORDER BY r.due LIMIT %s FOR NO KEY UPDATE OF r SKIP LOCKED"
_NEXT_ROOM_DUE = _sql(statements.NEXT_ROOM_DUE, "a", "b")
_COUNTDOWNS = _sql(statements.COUNTDOWNS, "a", "b")
_OVERDUE = _sql(statements.OVERDUE, "a", "b", "c")
_WAITING_SINCE = _sql(statements.WAITING_SINCE, "a", "b")
_BACKLOG = _sql(statements.BACKLOG, "a", "b", "c")
_HISTORY = _sql(statements.HISTORY, "a")
_COUNT = (
    "SELECT homeserver, state, presence, count(*), coalesce(sum(1.0 / delay) FILTER (WHERE state <> %s AND token IS NULL), 0)::float8 "
    "FROM delayed_event GROUP BY homeserver, state, presence"
)
_INSERT = f"INSERT INTO delayed_event ({', '.join(map(_quoted, FIELDS))}) SELECT * FROM unnest({_arrays(list(_event.columns))})"
_DELETE = "DELETE FROM delayed_event WHERE id = ANY(%s::bigint[])"
_DELETE_HISTORY = "DELETE FROM history WHERE event = ANY(%s::bigint[])"
_NOTE = f"INSERT INTO history (event, at, what, detail) SELECT * FROM unnest({_arrays(list(schema.history.columns))})"
_ROOM_REST = [column.name for column in _room.columns if not column.primary_key]
_NEW_ROOMS = (
    f"INSERT INTO room ({', '.join(Room._fields)}) SELECT * FROM unnest({_arrays(list(_room.columns))}) "
    f"ON CONFLICT (sfu, name) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _ROOM_REST)}"
)
_SAVE_ROOMS = (
    f"UPDATE room r SET {', '.join(f'{name} = w.{name}' for name in _ROOM_REST)} "
    f"FROM unnest({_arrays(list(_room.columns))}) w({', '.join(Room._fields)}) WHERE r.sfu = w.sfu AND r.name = w.name"
)
_DELETE_ROOMS = "DELETE FROM room r USING unnest(%s::text[], %s::text[]) w(sfu, name) WHERE r.sfu = w.sfu AND r.name = w.name"

# From one name to the next in an index, instead of reading all of it.
_SCHEDULE = """
WITH RECURSIVE n(homeserver) AS (
  (SELECT homeserver FROM delayed_event WHERE due IS NOT NULL ORDER BY homeserver LIMIT 1)
  UNION ALL
  SELECT (SELECT e.homeserver FROM delayed_event e WHERE e.due IS NOT NULL AND e.homeserver > n.homeserver ORDER BY e.homeserver LIMIT 1)
  FROM n WHERE n.homeserver IS NOT NULL
)
SELECT n.homeserver, (SELECT min(d) FROM (VALUES
  ((SELECT min(due) FROM delayed_event e WHERE e.homeserver = n.homeserver AND e.lane = 0 AND e.due IS NOT NULL)),
  ((SELECT min(due) FROM delayed_event e WHERE e.homeserver = n.homeserver AND e.lane = 1 AND e.due IS NOT NULL)),
  ((SELECT min(due) FROM delayed_event e WHERE e.homeserver = n.homeserver AND e.lane = 2 AND e.due IS NOT NULL))
) v(d)) FROM n WHERE n.homeserver IS NOT NULL
"""
_ROOM_SCHEDULE = """
WITH RECURSIVE n(sfu) AS (
  (SELECT sfu FROM room WHERE due IS NOT NULL ORDER BY sfu LIMIT 1)
  UNION ALL
  SELECT (SELECT r.sfu FROM room r WHERE r.due IS NOT NULL AND r.sfu > n.sfu ORDER BY r.sfu LIMIT 1) FROM n WHERE n.sfu IS NOT NULL
)
SELECT n.sfu, least((SELECT min(due) FROM room r WHERE r.sfu = n.sfu AND r.routine = 0 AND r.due IS NOT NULL),
                    (SELECT min(due) FROM room r WHERE r.sfu = n.sfu AND r.routine = 1 AND r.due IS NOT NULL))
FROM n WHERE n.sfu IS NOT NULL
"""
_ALIVE = (
    "INSERT INTO instance (name, version, address, started_at, alive_at, word) VALUES (%s, %s, %s, %s, %s, %s) "
    "ON CONFLICT (name) DO UPDATE SET version = excluded.version, address = excluded.address, started_at = excluded.started_at, "
    "alive_at = excluded.alive_at, word = excluded.word"
)
_OUR_NAME = "SELECT started_at FROM instance WHERE name = %s"
_FORGET_INSTANCES = "DELETE FROM instance WHERE alive_at < %s"
_OTHERS = "SELECT name, version, started_at, alive_at, word FROM instance WHERE name <> %s AND alive_at > %s AND alive_at < %s ORDER BY name"
_HEARD = (
    "INSERT INTO sfu AS s (name, heard_at, answered_at) VALUES (%s, %s, %s) ON CONFLICT (name) DO UPDATE SET "
    "heard_at = greatest(s.heard_at, excluded.heard_at), answered_at = greatest(s.answered_at, excluded.answered_at)"
)
_SAVE_SFU = (
    "INSERT INTO sfu AS s (name, failing_since, several_nodes_at) VALUES (%s, %s, %s) ON CONFLICT (name) DO UPDATE SET "
    "failing_since = excluded.failing_since, several_nodes_at = greatest(s.several_nodes_at, excluded.several_nodes_at)"
)
_SAVE_HOMESERVER = (
    "INSERT INTO homeserver (name, rate_limit, rate, burst) VALUES (%s, %s, %s, %s) ON CONFLICT (name) DO UPDATE SET "
    "rate_limit = excluded.rate_limit, rate = excluded.rate, burst = excluded.burst"
)
_HOMESERVERS = "SELECT name, rate_limit, rate, burst FROM homeserver"
_SFUS = "SELECT name, failing_since, several_nodes_at, coalesce(heard_at, 0), coalesce(answered_at, 0) FROM sfu"
_PACES = "SELECT homeserver, state, changed_at FROM pace WHERE address = %s AND changed_at >= %s"
_NEW_PACE = "INSERT INTO pace (homeserver, address, state, changed_at) VALUES (%s, %s, '', 0) ON CONFLICT DO NOTHING"
_PACE = "SELECT state FROM pace WHERE homeserver = %s AND address = %s FOR UPDATE"
_SAVE_PACE = "UPDATE pace SET state = %s, changed_at = extract(epoch FROM clock_timestamp()) WHERE homeserver = %s AND address = %s"
_UNVERIFIED = "SELECT id FROM delayed_event WHERE id = ANY(%s::bigint[]) AND verified_at IS NULL AND state <> %s"
_ASK_ROOMS = (
    "UPDATE room r SET asked = %s, routine = CASE WHEN r.due IS NULL THEN 1 ELSE r.routine END, "
    "due = CASE WHEN r.claimed = 0 AND (r.due IS NULL OR r.due > %s) THEN %s ELSE r.due END "
    "FROM (SELECT sfu, name FROM room WHERE (sfu, name) > (%s, %s) AND (%s::text IS NULL OR sfu = %s) "
    "ORDER BY sfu, name LIMIT %s FOR NO KEY UPDATE) w WHERE r.sfu = w.sfu AND r.name = w.name RETURNING r.sfu, r.name"
)
_FORGET_TIMES = (
    "UPDATE delayed_event e SET "
    "due = CASE WHEN e.state = %(done)s THEN least(e.due, %(now)s + (e.due - e.finished_at)) WHEN e.state = %(vanished)s THEN %(vanished_at)s "
    "WHEN e.state = %(adrift)s THEN %(adrift_at)s ELSE %(now)s END, "
    "harm = CASE WHEN e.state = %(adrift)s THEN %(now)s + e.delay + %(adrift_keep)s "
    "WHEN e.state = %(done)s OR e.harm IS NULL THEN e.harm WHEN e.state = %(live)s AND e.harm < %(now)s THEN %(now)s + e.delay / 2 "
    "ELSE least(e.harm, %(now)s + e.delay / 2) END, "
    "running_since = CASE WHEN e.state = %(done)s THEN least(e.running_since, %(now)s) "
    "ELSE greatest(least(e.running_since, %(now)s), %(now)s - e.delay) END, presence_since = least(e.presence_since, %(now)s), "
    "attempt_at = least(e.attempt_at, %(now)s), accepted_at = least(e.accepted_at, %(now)s), "
    "look_at = CASE WHEN e.look_at > %(now)s THEN %(now)s ELSE e.look_at END, "
    "ended_at = CASE WHEN e.ended_at > %(now)s THEN %(now)s ELSE e.ended_at END "
    "FROM (SELECT id FROM delayed_event WHERE id > %(after)s AND due IS NOT NULL ORDER BY id LIMIT %(most)s FOR NO KEY UPDATE) w "
    "WHERE e.id = w.id RETURNING e.id"
)
_FORGET_ROOM_TIMES = (
    "UPDATE room r SET due = CASE WHEN r.due IS NULL THEN NULL ELSE %s END, looked_at = least(r.looked_at, %s), asked = NULL, "
    "doubt_until = least(r.doubt_until, %s) "
    "FROM (SELECT sfu, name FROM room WHERE (sfu, name) > (%s, %s) ORDER BY sfu, name LIMIT %s FOR NO KEY UPDATE) w "
    "WHERE r.sfu = w.sfu AND r.name = w.name RETURNING r.sfu, r.name"
)
_ASK_ADMISSIONS = "UPDATE admission SET due = least(due, %s), until = greatest(until, %s) RETURNING 1"
_FORGET_ADMISSION_TIMES = "UPDATE admission SET due = least(due, %s), until = %s RETURNING 1"
_FORGET_SFU_TIMES = "UPDATE sfu SET heard_at = least(heard_at, %(now)s), answered_at = least(answered_at, %(now)s)"
_WRITTEN = "INSERT INTO meta (key, value) VALUES ('written', '') ON CONFLICT (key) DO UPDATE SET value = '' RETURNING 1"
_SAVE_MARK = "INSERT INTO meta (key, value) VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value RETURNING 1"
_ADMISSION_COLUMNS = ", ".join(_quoted(name) for name in Admission._fields)
_ADMIT = (
    f"INSERT INTO admission AS a ({_ADMISSION_COLUMNS}) SELECT * FROM unnest({_arrays(list(schema.admission.columns))}) "
    "ON CONFLICT (sfu, room, identity) DO UPDATE SET until = greatest(a.until, excluded.until), due = least(a.due, excluded.due) RETURNING 1"
)
_ADMISSIONS_DUE = (
    "UPDATE admission a SET due = %s FROM (SELECT sfu, room, identity, due FROM admission WHERE due <= %s ORDER BY due LIMIT %s "
    "FOR NO KEY UPDATE SKIP LOCKED) w WHERE (a.sfu, a.room, a.identity) = (w.sfu, w.room, w.identity) "
    f"RETURNING {_columns(schema.admission, 'a')}"
)
_ADMISSIONS_OF = (
    "UPDATE admission a SET due = %s, until = greatest(a.until, %s) "
    "FROM (SELECT a.sfu, a.room, a.identity FROM unnest(%s::text[], %s::text[], %s::text[]) w(sfu, room, identity) "
    "JOIN admission a ON (a.sfu, a.room, a.identity) = (w.sfu, w.room, w.identity) ORDER BY a.sfu, a.room, a.identity FOR NO KEY UPDATE OF a) w "
    f"WHERE (a.sfu, a.room, a.identity) = (w.sfu, w.room, w.identity) RETURNING {_columns(schema.admission, 'a')}"
)
_CHECKED_ADMISSIONS = (
    "UPDATE admission a SET due = w.due, until = greatest(a.until, w.until) "
    "FROM unnest(%s::text[], %s::text[], %s::text[], %s::float8[], %s::float8[]) w(sfu, room, identity, until, due) "
    "WHERE (a.sfu, a.room, a.identity) = (w.sfu, w.room, w.identity) RETURNING 1"
)
_OVER_ADMISSIONS = (
    "DELETE FROM admission a USING unnest(%s::text[], %s::text[], %s::text[], %s::float8[]) w(sfu, room, identity, until) "
    "WHERE (a.sfu, a.room, a.identity) = (w.sfu, w.room, w.identity) AND a.until <= w.until RETURNING 1"
)
_FORGET_PACES = "DELETE FROM pace WHERE changed_at < %s"


class PostgresTransaction:
    """See `base.Transaction`."""

    def __init__(self, connection: psycopg.Connection[Any], store: "PostgresStore", more: Collection[RoomKey]):
        self._connection = connection
        self._cursor = connection.cursor(binary=True)
        self._store = store
        self._more = more
        self._locked: set[RoomKey] = set()
        self._there: set[RoomKey] = set()  # rooms that the database has
        self._waits = True
        self._deleted: list[int] = []
        self._new: list[DelayedEvent] = []
        self._updates: dict[tuple[int, ...], list[DelayedEvent]] = {}
        self._rooms: list[Room] = []
        self._rooms_deleted: list[RoomKey] = []
        self._notes: list[Note] = []

    # ── locks ──

    def lock_rooms(self, keys: Collection[RoomKey], made: Collection[RoomKey]) -> list[Room]:
        keys = _storable({*keys, *self._more})
        made = _storable(made)
        if made:
            self._fetch(_MAY_MAKE, (sorted({_lock_key(key) for key in made}),))
        if not keys:
            return []
        rooms = [room_of(values) for values in self._fetch(_LOCK_ROOMS, _transposed(keys))]
        self._locked.update(keys)
        self._there.update((room.sfu, room.name) for room in rooms)
        for sfu, name in _storable(self._more):  # perhaps it was one of its events that somebody had
            self._fetch(_OF_ROOM, (sfu, name, State.DONE.value))
        return rooms

    def rooms_of(self, events: Collection[int], delegations: Collection[str]) -> list[RoomKey]:
        found = set(self._fetch(_ROOMS_OF, (list(events),))) if events else set()
        if delegations:
            found |= set(self._fetch(_ROOMS_OF_DELEGATIONS, ([name for name in delegations if "\0" not in name],)))
        return sorted(found)

    def no_more_waiting(self) -> None:
        self._waits = False

    def free_rooms(self, keys: Collection[RoomKey]) -> set[RoomKey]:
        free = {key for key in keys if key in self._locked}
        wanted = _storable({key for key in keys if key not in self._locked})
        if wanted:
            parameters = _transposed(wanted)
            locked = set(self._fetch(_FREE_ROOMS, parameters))
            there = locked if len(locked) == len(wanted) else set(self._fetch(_THERE, parameters))
            self._locked |= locked
            self._there |= locked
            free |= locked | (set(wanted) - there)
        return free

    def _need(self, rooms: Collection[RoomKey]) -> None:
        """What is read to be changed is in a room that is locked."""
        if missing := {room for room in rooms if room not in self._locked}:
            raise Again(missing)

    # ── queries ──

    def _fetch(self, sql: str, parameters: Any) -> list[Any]:
        return self._cursor.execute(sql, parameters).fetchall()

    def run(self, sql: str, parameters: Any) -> list[Any]:
        """Run a statement that is not of the protocol, and return its rows."""
        return self._fetch(sql, parameters)

    def _events(self, sql: str, parameters: Sequence[Any]) -> list[DelayedEvent]:
        return [delayed_event_of(values) for values in self._fetch(sql, parameters)]

    def of_participants(self, participants: Collection[Participant], *, finished: bool) -> list[DelayedEvent]:
        wanted = [key for key in _storable(participants) if finished or key[:2] in self._there]
        if not wanted:
            return []
        self._need({key[:2] for key in wanted})
        parameters = [*_transposed(wanted), "" if finished else State.DONE.value]
        rows = self._events(_OF_PARTICIPANTS, [*parameters, *parameters, *parameters])
        return rows if finished else [row for row in rows if row.state is not State.DONE]

    def rooms(self, keys: Collection[RoomKey]) -> list[Room]:
        return [room for key in keys if (room := self.room(*key)) is not None]

    def get_all(self, events: Collection[int]) -> list[DelayedEvent]:
        rows = self._events(_GET_ALL, (list(events),))
        self._need({(row.sfu, row.room) for row in rows})
        return rows

    def of_room(self, sfu: str, room: str) -> list[DelayedEvent]:
        key = (sfu, room)
        if not _storable([key]):
            return []
        self._need([key])
        if self._waits:
            return self._events(_OF_ROOM, (sfu, room, State.DONE.value))
        with self._without_waiting(key):
            return self._events(_OF_ROOM + _NOWAIT, (sfu, room, State.DONE.value))

    def of_user(self, sfu: str, room: str, user: str) -> list[DelayedEvent]:
        key = (sfu, room)
        if not _storable([key]) or "\0" in user:
            return []
        self._need([key])
        return self._events(_OF_USER, (sfu, room, State.DONE.value, user))

    def of_delegation(self, delegation: str) -> list[DelayedEvent]:
        if "\0" in delegation:
            return []
        rows = self._events(_OF_DELEGATION, (delegation,))
        self._need({(row.sfu, row.room) for row in rows})
        return rows

    def get(self, event: int) -> DelayedEvent | None:
        rows = self.get_all([event]) if self._waits else self._events(_GET_FREE, (event,))
        return rows[0] if rows else None

    def todo(self, homeserver: str, lane: Lane, limit: int, now: float, *, harmed: bool | None = None) -> list[DelayedEvent]:
        key = (homeserver, lane, harmed)
        rows = self._hinted(key, limit, now)
        if rows:
            return rows
        # Others may be about to take the first of them.
        found = [homeserver, lane.value, now, *([] if harmed is None else [now])]
        begun = time.monotonic()
        rows = self._events(_TODO if harmed is None else _TODO_HARMED if harmed else _TODO_IN_TIME, [*found, 4 * limit + 64, lane.value, now, limit])
        if len(rows) >= limit and time.monotonic() - begun > BACKLOG_TAKES:
            sql = _DUE_IDS if harmed is None else _DUE_IDS_HARMED if harmed else _DUE_IDS_IN_TIME
            taken = {row.id for row in rows}
            ids = [id for (id,) in self._fetch(sql, [*found, HINTS]) if id not in taken]
            self._store.hints[key] = (now + max(HINTS_HOLD, 5 * (time.monotonic() - begun)), ids[::-1])
        return rows

    def _hinted(self, key: tuple[str, Lane, bool | None], limit: int, now: float) -> list[DelayedEvent]:
        """Of a large backlog, those that come next, as they were found lately: to look for the most urgent ones all of it has to be read."""
        until, ids = self._store.hints.get(key, (-math.inf, []))
        if not ids or now > until:
            self._store.hints.pop(key, None)
            return []
        homeserver, lane, harmed = key
        some = [ids.pop() for _ in range(min(len(ids), limit + 16))]
        harm = "" if harmed is None else " AND (e.harm <= %s OR e.harm IS NULL)" if harmed else " AND e.harm > %s"
        parameters = [some, homeserver, lane.value, now, *([] if harmed is None else [now]), limit]
        rows = self._events(_OF_HINTS + harm + _OF_HINTS_END, parameters)
        taken = {row.id for row in rows}
        ids.extend(id for id in reversed(some) if id not in taken and len(rows) >= limit)
        return rows

    def soon(self, homeserver: str, limit: int) -> list[DelayedEvent]:
        return self._events(_SOON, (homeserver, limit))

    def next_due(self, homeserver: str) -> float | None:
        self.flush()
        found = self._fetch(_NEXT_DUE, (homeserver,) * len(Lane))
        return min((due for (due,) in found if due is not None), default=None)

    def countdowns(self, homeserver: str) -> Iterator[Countdown]:
        for harm, delay, event, known in self._fetch(_COUNTDOWNS, (homeserver, Lane.RESTART.value)):
            yield Countdown(harm, delay, event, known)

    def room(self, sfu: str, name: str) -> Room | None:
        key = (sfu, name)
        if not _storable([key]):
            return None
        if self._waits:
            self._need([key])
            found = self._fetch(_FREE_ROOM.removesuffix(" NOWAIT"), key) if key in self._there else []
        else:
            with self._without_waiting(key):
                found = self._fetch(_FREE_ROOM, key)
            self._locked.add(key)
        if not found:
            return None
        self._there.add(key)
        return room_of(found[0])

    def rooms_due(self, sfu: str, limit: int, now: float) -> list[Room]:
        found = self._fetch(_ROOMS_DUE, (sfu, 0, now, limit))
        if len(found) < limit:
            found += self._fetch(_ROOMS_DUE, (sfu, 1, now, limit - len(found)))
        rooms = [room_of(values) for values in found]
        self._locked.update((room.sfu, room.name) for room in rooms)
        self._there.update((room.sfu, room.name) for room in rooms)
        return rooms

    def next_room_due(self, sfu: str) -> float | None:
        self.flush()
        found = [self._fetch(_NEXT_ROOM_DUE, (sfu, routine))[0][0] for routine in (0, 1)]
        return min((due for due in found if due is not None), default=None)

    def history(self, events: Sequence[int]) -> list[Note]:
        found = [Note(*values) for event in events for values in self._fetch(_HISTORY, (event,))]
        return sorted(found, key=lambda note: note.at)

    @contextmanager
    def _without_waiting(self, room: RoomKey) -> Iterator[None]:
        try:
            yield
        except errors.LockNotAvailable:
            raise Again([room]) from None

    # ── changes, which are sent all at once ──

    def new_id(self) -> int:
        return self._store.new_id(self._cursor)

    def insert(self, row: DelayedEvent) -> None:
        if math.isnan(row.delay):
            raise ValueRefused("a delay that is no number")  # SQLite takes it for nothing, and refuses that
        self._new.append(row)

    def update(self, old: DelayedEvent, new: DelayedEvent) -> None:
        columns = changed(old, new)
        if columns:
            self._updates.setdefault(columns, []).append(new)

    def delete(self, event: int) -> None:
        self._deleted.append(event)

    def save_room(self, room: Room) -> None:
        self._rooms.append(room)

    def delete_room(self, sfu: str, name: str) -> None:
        self._rooms_deleted.append((sfu, name))

    def note(self, notes: Sequence[Note]) -> None:
        self._notes += notes

    def flush(self) -> None:
        """Send what was changed so far."""
        batch: list[tuple[str, Any]] = []
        if self._deleted:
            batch += [(_DELETE_HISTORY, (self._deleted,)), (_DELETE, (self._deleted,))]
        if self._new:
            batch.append((_INSERT, _transposed([values_of(row) for row in self._new])))
        for columns, rows in self._updates.items():
            sql, parameters = _update_of(columns)
            batch.append((sql, _transposed([parameters.values(row) for row in rows])))
        there = [values_of_room(room) for room in self._rooms if (room.sfu, room.name) in self._there]
        if there:
            batch.append((_SAVE_ROOMS, _transposed(there)))
        new = [values_of_room(room) for room in self._rooms if (room.sfu, room.name) not in self._there]
        if new:
            batch.append((_NEW_ROOMS, _transposed(new)))
        if self._rooms_deleted:
            batch.append((_DELETE_ROOMS, _transposed(self._rooms_deleted)))
        if self._notes:
            batch.append((_NOTE, _transposed(self._notes)))
        self._deleted, self._new, self._updates, self._rooms, self._rooms_deleted, self._notes = [], [], {}, [], [], []
        # Not as a pipeline: a process that is stopped in the middle of one counts as busy, and would keep its locks beyond IDLE_IN_TRANSACTION.
        for sql, parameters in batch:
            self._cursor.execute(sql, parameters)

    # ── what does not belong to the transaction ──

    def save_homeserver(self, known: KnownHomeserver) -> None:
        self._store.save_homeserver(known)

    def save_sfu(self, known: KnownSfu) -> None:
        self._store.save_sfu(known)

    def ask_rooms(self, sfu: str | None, now: float) -> None:  # noqa: ARG002
        raise TypeError("with other locks held, that could wait for itself: see PostgresStore.ask_rooms")


class _Everything(set[Any]):
    """Whether it is there is found out by asking."""

    def __contains__(self, _: object) -> bool:
        return True


class ReadingTransaction(PostgresTransaction):
    """One that changes nothing, and locks nothing: also on a server that allows neither."""

    def __init__(self, connection: psycopg.Connection[Any], store: "PostgresStore", more: Collection[RoomKey]):
        super().__init__(connection, store, more)
        self._there = _Everything()

    def _fetch(self, sql: str, parameters: Any) -> list[Any]:
        return super()._fetch(sql.partition(" FOR NO KEY UPDATE")[0], parameters)

    def _need(self, rooms: Collection[RoomKey]) -> None:
        pass


_update_texts: dict[tuple[int, ...], tuple[str, Columns]] = {}


def _update_of(columns: tuple[int, ...]) -> tuple[str, Columns]:
    """The UPDATE of just these columns of any number of rows, and its parameters: an array for each column, and the ids."""
    found = _update_texts.get(columns)
    if found is None:
        names = [FIELDS[i] for i in columns]
        sets = ", ".join(f"{_quoted(name)} = w.{_quoted(name)}" for name in names)
        listed = ", ".join(_quoted(name) for name in (*names, "id"))
        arrays = _arrays([_event.columns[name] for name in (*names, "id")])
        sql = f"UPDATE delayed_event e SET {sets} FROM unnest({arrays}) w({listed}) WHERE e.id = w.id"
        found = _update_texts[columns] = (sql, Columns(columns))
    return found


def _storable(keys: Collection[T]) -> list[T]:
    """Without those that no row can have, since PostgreSQL has no NUL characters; in order."""
    return sorted(key for key in keys if not any("\0" in part for part in key))  # type: ignore[attr-defined, type-var]


def _run(sql: str, parameters: Any, tx: Transaction) -> list[Any]:
    """A transaction of one statement."""
    assert isinstance(tx, PostgresTransaction)  # noqa: S101 — for the type checker
    return tx.run(sql, parameters)


def _lock_key(key: RoomKey) -> int:
    """A number for a name."""
    digest = blake2b("\0".join(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


class _Watch:
    """Cuts the connection of a transaction that takes longer than `limit` seconds.

    The server has time-outs of its own, but not for everything, and none when it is stopped itself; and the driver waits for it without end.
    """

    def __init__(self, limit: Callable[[], float]) -> None:
        self._limit = limit
        self._busy: list[tuple[float, psycopg.Connection[Any]]] = []  # transactions under way: one, or another one within it
        self._depths: list[int] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._depths.append(len(self._busy))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            del self._busy[self._depths.pop() :]

    def over(self, connection: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
        """From here on to the end of the block, it may take so long."""
        with self._lock:
            self._busy.append((time.monotonic(), connection))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="database watch", daemon=True)
            self._thread.start()
        return connection

    def _run(self) -> None:
        while not self._closed.wait(self._limit() / 12):
            with self._lock:
                for since, connection in self._busy:
                    if time.monotonic() > since + self._limit():
                        _cut(connection)

    def close(self) -> None:
        """There is nothing to be watched any more."""
        self._closed.set()


def _cut(connection: psycopg.Connection[Any]) -> None:
    """Whoever waits for it gets an error. Nothing else may be done to it from another thread."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as its:
        its.shutdown(socket.SHUT_RDWR)


class PostgresStore:
    """The database at `url`. `instance` is the name of this process among those that share it, `address` what homeservers count its requests by.

    It is used by one thread at a time. Raises DatabaseTooNew, and StoreUnavailable when it cannot be opened; later it connects again by itself.
    """

    begin_anew: tuple[type[Exception], ...] = (Again, psycopg.Error)
    shared = True
    is_log_large = False

    def __init__(self, url: str, *, password: str | None = None, instance: str = "", address: str = "", connect_timeout: float = 3.0):
        self.name = _shown(url)
        self._url = url
        self._password = password
        self._instance = instance or "(unnamed)"
        self._address = address
        self._connect_timeout = math.ceil(connect_timeout)
        self._random = Random()  # noqa: S311 — for pauses
        self._watch = _Watch(lambda: HANGS_AFTER)
        self._counting = _Watch(lambda: COUNTING_HANGS_AFTER)
        self._pool: QueuePool = QueuePool(self._connected_anew, pool_size=CONNECTIONS, max_overflow=0, reset_on_return=None)
        self._main: Any = None
        self._side: Any = None
        self._ids: Iterator[int] = iter(())
        self.hints: dict[tuple[str, Lane, bool | None], tuple[float, list[int]]] = {}  # until when, and the most urgent last; see `todo`
        self._away: psycopg.Error | None = None  # the last connection that could not be made …
        self._lost: tuple[str, str] | None = None  # the host and port of the connection that was lost last
        self._away_until = 0.0  # … and until when no other is tried
        self._started_at = 0.0
        self._news_at: float | None = None  # when they were last asked for
        self._grace = (-math.inf, math.inf)  # until when signs of life count that are older, and how old they may be
        self._paces_at = 0.0  # up to then it is known what was learned of homeservers
        self._upgrade()

    # ── connections ──

    def _connect(self, target_session_attrs: str = "read-write") -> psycopg.Connection[Any]:
        given = conninfo_to_dict(self._url)
        settings: dict[str, Any] = {
            "target_session_attrs": target_session_attrs,  # after a failover, not the server that was the primary
            "application_name": f"sfu-delegate {self._instance}"[:63],
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 8000,
        }
        settings = {key: value for key, value in settings.items() if key not in given}
        if target_session_attrs == "any":  # whatever the URL says
            settings["target_session_attrs"] = target_session_attrs
        settings |= self._hosts(given)
        if self._password is not None:
            settings["password"] = self._password
        connection = psycopg.connect(
            self._url, autocommit=True, prepare_threshold=0, connect_timeout=self._connect_timeout, client_encoding="utf-8", **settings
        )
        if connection.info.server_version < OLDEST_SERVER * 10_000:
            version = connection.info.server_version // 10_000
            connection.close()
            raise StoreUnavailable(f"The database {self.name} is PostgreSQL {version}: at least {OLDEST_SERVER} is needed.")
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            connection.close()
            raise StoreUnavailable(
                f"The database {self.name} is encoded in {encoding}, which lacks characters of names. Make it anew: "
                "`createdb --encoding=UTF8 --template=template0`."
            )
        connection.prepared_max = 500
        connection.execute(
            f"SET idle_in_transaction_session_timeout = '{IDLE_IN_TRANSACTION}s'; SET lock_timeout = '{LOCK_TIMEOUT}s'; "
            f"SET statement_timeout = '{STATEMENT_TIMEOUT}s'; SET default_transaction_isolation = 'read committed'; "
            # All that is asked for has an index; statistics that are not yet there must not lead to anything else.
            "SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET plan_cache_mode = force_generic_plan; "
            "SET jit = off; SET max_parallel_workers_per_gather = 0",
            prepare=False,
        )
        (kept,) = connection.execute("SHOW synchronous_commit").fetchone() or ("on",)
        if kept in ("off", "local"):  # whatever is acknowledged has to survive
            connection.execute("SET synchronous_commit = on")
        return connection

    def _connected_anew(self) -> Any:
        """Where nobody answers, each try takes as long as it may: it is not made for everybody who asks."""
        begun = time.monotonic()
        if self._away is not None and begun < self._away_until:
            raise self._away
        try:
            connection = self._connect()
        except psycopg.Error as error:
            self._away, self._away_until = error, time.monotonic() + min(AWAY, time.monotonic() - begun)
            raise
        self._away = None
        return connection

    def _hosts(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Several hosts of a URL in another order: the one of which a connection has just been lost comes last, since it may not answer at all."""
        hosts, ports = str(given.get("host", "")).split(","), str(given.get("port", "")).split(",")
        if len(hosts) < 2 or "hostaddr" in given:
            return {}
        pairs = list(zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=False))
        pairs.sort(key=lambda pair: (pair[0], pair[1] or "5432") == self._lost)
        return {"host": ",".join(host for host, _ in pairs), "port": ",".join(port for _, port in pairs)}

    def _lose(self) -> None:
        """A connection is broken, and so is the other one, most likely: each would take its time to notice."""
        for bound in (self._main, self._side):
            if bound is not None and bound.driver_connection is not None:
                with suppress(psycopg.Error):
                    self._lost = (bound.driver_connection.info.host, str(bound.driver_connection.info.port))
        self._drop_main()
        self._drop_side()
        # The one for counting, which waits in the pool, would be the next that is taken.
        self._pool.dispose()
        self._pool = self._pool.recreate()

    def _connected(self) -> psycopg.Connection[Any]:
        """The connection for steps."""
        if self._main is None or self._main.driver_connection is None or self._main.driver_connection.closed:
            self._drop_main()
            self._main = self._pool.connect()
        return self._main.driver_connection  # type: ignore[no-any-return]

    def _beside(self) -> psycopg.Connection[Any]:
        """The connection for what instances tell each other."""
        if self._side is None or self._side.driver_connection is None or self._side.driver_connection.closed:
            self._drop_side()
            self._side = self._pool.connect()
            self._side.driver_connection.execute("SET synchronous_commit = off")
        return self._side.driver_connection  # type: ignore[no-any-return]

    def _drop_main(self) -> None:
        if self._main is not None:
            main, self._main = self._main, None
            with suppress(Exception):
                main.invalidate()
            main.close()

    def _drop_side(self) -> None:
        if self._side is not None:
            side, self._side = self._side, None
            with suppress(Exception):
                side.invalidate()
            side.close()

    def _upgrade(self) -> None:
        """Bring the schema to this version; one instance at a time."""
        engine = create_engine("postgresql+psycopg://", creator=self._connect_to_upgrade, poolclass=NullPool)
        try:
            with engine.connect() as bound:
                bound.exec_driver_sql(f"SELECT pg_advisory_lock({UPGRADE_LOCK})")
                bound.commit()
                migrate.upgrade_bound(bound, f"The database {self.name}")
        except psycopg.Error as error:
            raise self.failed(error) from None
        except DBAPIError as error:
            if isinstance(error.orig, psycopg.Error):
                raise self.failed(error.orig) from None
            raise
        finally:
            engine.dispose()

    def _connect_to_upgrade(self) -> psycopg.Connection[Any]:
        connection = self._connect()
        # Others may be upgrading, or at work: a change of a table waits for transactions that are open, and holds up those that come after it.
        connection.execute(
            "SET statement_timeout = 0; SET lock_timeout = '60s'; SET idle_in_transaction_session_timeout = 0; RESET enable_seqscan", prepare=False
        )
        connection.autocommit = False
        return connection

    def failed(self, error: psycopg.Error) -> StoreUnavailable:
        """What an error of the driver means, for the operator."""
        return StoreUnavailable(sentence(self.name, error))

    # ── the work ──

    def atomically(self, work: Callable[[Transaction], T], *, about_to_wait: Callable[[], object] | None = None) -> T:
        if about_to_wait is not None:
            about_to_wait()  # from the beginning: nearly all of it is waiting for the server
        rooms: set[RoomKey] = set()
        trouble: Exception | None = None
        for _ in range(TRIES):
            try:
                with self._watch:
                    connection = self._begun()
                    tx = PostgresTransaction(connection, self, rooms)
                    result = work(tx)
                    tx.flush()
                    connection.execute("COMMIT")
            except Again as again:
                rooms |= set(again.rooms)
                self._roll_back()
                trouble = again
            except _AGAIN as error:
                self._roll_back()
                time.sleep(self._random.uniform(0, PAUSE))
                trouble = error
            except StoreUnavailable:
                self._roll_back()
                raise
            except _OF_ONE_INPUT as error:
                self._roll_back()
                raise ValueRefused(type(error).__name__) from None  # its text has the value in it
            except psycopg.Error as error:
                # Whether it was kept is not known if that was the COMMIT: all inputs can be repeated, and what was claimed is claimed again.
                self._give_up(error)
                raise self.failed(error) from None
            except BaseException:
                self._roll_back()
                raise
            else:
                return result
        if isinstance(trouble, errors.UniqueViolation):
            raise ValueRefused("UniqueViolation") from None
        raise StoreUnavailable(f"The database {self.name} is contended: a transaction could not be made in {TRIES} tries.") from None

    def _give_up(self, error: psycopg.Error) -> None:
        """A transaction failed for a reason that is the server's, or the way to it."""
        bound = self._main
        closed = bound is None or bound.driver_connection is None or bound.driver_connection.closed
        if closed or isinstance(error, errors.ReadOnlySqlTransaction):  # a primary that has become a standby is no use any more
            self._lose()
        else:
            self._roll_back()

    def _begun(self) -> psycopg.Connection[Any]:
        """A connection with a transaction that has begun; a fresh one, where the server has closed the old one meanwhile."""
        if self._main is not None:
            with suppress(psycopg.Error):
                connection = self._watch.over(self._connected())
                connection.execute("BEGIN")
                return connection
            self._lose()
        connection = self._watch.over(self._connected())
        connection.execute("BEGIN")
        return connection

    def _begun_beside(self) -> psycopg.Connection[Any]:
        if self._side is not None:
            with suppress(psycopg.Error):
                connection = self._watch.over(self._beside())
                connection.execute("BEGIN")
                return connection
            self._drop_side()
        connection = self._watch.over(self._beside())
        connection.execute("BEGIN")
        return connection

    def _roll_back(self) -> None:
        if self._main is None:
            return
        try:
            self._main.driver_connection.execute("ROLLBACK")
        except (psycopg.Error, AttributeError):
            self._drop_main()

    def reading(self, work: Callable[[Transaction], T]) -> T:
        """On a standby, if there is no other server."""
        connection: psycopg.Connection[Any] | None = None
        try:
            connection = self._connect(target_session_attrs="any")
            with self._watch:
                self._watch.over(connection).execute("BEGIN READ ONLY")
                return work(ReadingTransaction(connection, self, ()))
        except psycopg.Error as error:
            raise self.failed(error) from None
        finally:
            if connection is not None:
                connection.close()

    def reader(self) -> Reader:
        def connect() -> psycopg.Connection[Any]:
            connection = self._connect(target_session_attrs="any")
            connection.execute(
                "SET default_transaction_read_only = on; RESET enable_seqscan; RESET enable_hashjoin; RESET enable_mergejoin; RESET plan_cache_mode",
                prepare=False,
            )
            connection.autocommit = False
            return connection

        return Reader("postgresql+psycopg", connect, self.failed)

    def new_id(self, cursor: psycopg.Cursor[Any]) -> int:
        """A fresh id, from a block that is this instance's."""
        while True:
            for id in self._ids:
                return id
            ((begin,),) = cursor.execute("SELECT nextval('delayed_event_id')").fetchall()
            self._ids = iter(range(begin, begin + schema.ID_BLOCK))

    def census(self) -> StoreCensus:
        """May be called in another thread than everything else."""
        census = StoreCensus()
        try:
            bound = self._pool.connect()
            try:
                connection: psycopg.Connection[Any] = bound.driver_connection  # type: ignore[assignment]
                with self._counting, self._counting.over(connection).transaction(), connection.cursor(binary=True) as cursor:
                    connection.execute(
                        "SET LOCAL enable_seqscan = on; SET LOCAL enable_hashjoin = on; SET LOCAL statement_timeout = '300s'", prepare=False
                    )
                    census.schedule = {name: due for name, due in cursor.execute(_SCHEDULE).fetchall() if due is not None}
                    census.rooms = {name: due for name, due in cursor.execute(_ROOM_SCHEDULE).fetchall() if due is not None}
                    census.homeservers = [
                        KnownHomeserver(name, Limit(limit), rate, burst) for name, limit, rate, burst in cursor.execute(_HOMESERVERS)
                    ]
                    census.sfus = [KnownSfu(*values[:3]) for values in cursor.execute(_SFUS)]
                    for homeserver, state, presence, count, load in cursor.execute(_COUNT, (State.DONE.value,)):
                        census.states[homeserver, state, presence] = count
                        if load:
                            census.load[homeserver] = census.load.get(homeserver, 0.0) + load
            except BaseException:
                bound.invalidate()
                raise
            finally:
                bound.close()
        except psycopg.Error as error:
            raise self.failed(error) from None
        return census

    def recover(self, now: float, policy: Policy, *, clock_unsure: bool) -> int:
        """What dead instances had claimed is claimed again when their leases end; whether anybody listened before, `news` tells."""
        if clock_unsure:
            self.times_are_unknown(now, policy)
        return 0

    # ── what instances tell each other ──

    @contextmanager
    def _telling(self) -> Iterator[psycopg.Cursor[Any]]:
        """One transaction on the second connection."""
        try:
            try:
                with self._watch:
                    connection = self._begun_beside()
                    with connection.cursor(binary=True) as cursor:
                        yield cursor
                    connection.execute("COMMIT")
            except psycopg.Error:
                self._lose()
                raise
            except BaseException:
                with suppress(psycopg.Error):
                    if self._side is not None:
                        self._side.driver_connection.execute("ROLLBACK")
                raise
        except psycopg.Error as error:
            raise self.failed(error) from None
        except _Passed as passed:
            raise passed.error from None

    def news(self, now: float, word: str = "") -> News:
        begun, self._started_at = self._news_at is not None, self._started_at or now
        asked: tuple[tuple[str, Sequence[Any]], ...] = (
            (_OUR_NAME, (self._instance,)),
            (_ALIVE, (self._instance, __version__, self._address, self._started_at, now, word)),
            (_FORGET_INSTANCES, (now - FORGOTTEN_AFTER,)),
            (_FORGET_PACES, (now - PACES_KEPT,)),
            (_SCHEDULE, ()),
            (_ROOM_SCHEDULE, ()),
            (_PACES, (self._address, self._paces_at - UNSEEN)),
            (_SFUS, ()),
            (_OTHERS, (self._instance, self._alive_since(now), now + DEAD_AFTER)),  # or else the clock was set back since
        )
        with self._telling() as cursor:
            connection = cursor.connection
            cursors = [connection.cursor(binary=True) for _ in asked]
            with connection.pipeline():  # one way there and back, however far away the server is
                for one, (sql, parameters) in zip(cursors, asked, strict=True):
                    one.execute(sql, parameters)
            ours, schedule, rooms, paces, sfus, others = (one.fetchall() for one in (cursors[0], *cursors[4:]))
        self._news_at = now
        self._paces_at = max([self._paces_at, *(changed_at for _, _, changed_at in paces)])
        return News(
            schedule={name: due for name, due in schedule if due is not None},
            rooms={name: due for name, due in rooms if due is not None},
            paces={homeserver: state for homeserver, state, _ in paces},
            sfus=[KnownSfu(*values[:3]) for values in sfus],
            heard=[Heard(values[0], *values[3:]) for values in sfus],
            instances=[Instance(*values) for values in others],
            namesake=begun and bool(ours) and ours[0][0] != self._started_at,
        )

    def _alive_since(self, now: float) -> float:
        """Whoever has shown a sign of life since then is alive: in the last seconds, or before a time in which the database was not to be reached."""
        if self._news_at is not None and now > self._news_at + NEWS_LATE:
            self._grace = (now + DEAD_AFTER, self._news_at - DEAD_AFTER)
        until, since = self._grace
        return min(since, now - DEAD_AFTER) if now < until else now - DEAD_AFTER

    def exchange_pace(self, homeserver: str, change: Callable[[str | None], str | None]) -> None:
        with self._telling() as cursor:
            found = cursor.execute(_PACE, (homeserver, self._address)).fetchone()
            if found is None:
                cursor.execute(_NEW_PACE, (homeserver, self._address))
                found = cursor.execute(_PACE, (homeserver, self._address)).fetchone()
            try:
                new = change(found[0] or None if found is not None else None)
            except Exception as error:  # perhaps of the other connection, with which steps are made
                raise _Passed(error) from None
            if new is not None:
                cursor.execute(_SAVE_PACE, (new, homeserver, self._address))

    def heard_of(self, heard: Sequence[Heard]) -> None:
        with self._telling() as cursor:
            for one in sorted(heard):
                cursor.execute(_HEARD, one)

    def save_homeserver(self, known: KnownHomeserver) -> None:
        """See `base.Transaction`."""
        with self._telling() as cursor:
            cursor.execute(_SAVE_HOMESERVER, (known.name, known.limit.value, known.rate, known.burst))

    def save_sfu(self, known: KnownSfu) -> None:
        """See `base.Transaction`."""
        with self._telling() as cursor:
            cursor.execute(_SAVE_SFU, known)

    def unverified(self, events: Collection[int]) -> set[int]:
        with self._telling() as cursor:
            return {id for (id,) in cursor.execute(_UNVERIFIED, (list(events), State.DONE.value)).fetchall()}

    def peek(self, delegations: Sequence[str]) -> list[DelayedEvent]:
        with self._telling() as cursor:
            return [delayed_event_of(values) for values in cursor.execute(_PEEK, (list(delegations),)).fetchall()]

    def ask_rooms(self, sfu: str | None, now: float) -> None:
        last: RoomKey = ("", "")
        while True:
            found = self.atomically(partial(_run, _ASK_ROOMS, (now, now, now, *last, sfu, sfu, CHUNK)))
            if len(found) < CHUNK:
                return
            last = max(found)

    def times_are_unknown(self, now: float, policy: Policy) -> None:
        values = {
            **{"now": now, "done": State.DONE.value, "vanished": State.VANISHED.value, "adrift": State.ADRIFT.value, "live": State.LIVE.value},
            **{"most": CHUNK, "vanished_at": now + policy.vanished_wait, "adrift_at": now + ADRIFT_CHECK, "adrift_keep": policy.adrift_keep},
        }
        last = 0
        while True:
            found = self.atomically(partial(_run, _FORGET_TIMES, values | {"after": last}))
            last = max(chain.from_iterable(found), default=last)
            if len(found) < CHUNK:
                break
        room: RoomKey = ("", "")
        while True:
            rooms = self.atomically(partial(_run, _FORGET_ROOM_TIMES, (now, now, now + policy.doubt, *room, CHUNK)))
            room = max(rooms, default=room)
            if len(rooms) < CHUNK:
                break
        self.atomically(partial(_run, _FORGET_ADMISSION_TIMES, (now, now + ADMITTED_FOR)))
        with self._telling() as cursor:
            cursor.execute(_FORGET_SFU_TIMES, {"now": now})
            cursor.execute("DELETE FROM instance WHERE alive_at > %s", (now + DEAD_AFTER,))  # who is alive says so again

    def time(self) -> float:
        """Unix seconds by the clock of the database, now. Raises StoreUnavailable."""
        with self._telling() as cursor:
            ((seconds,),) = cursor.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchall()
        return float(seconds)

    def newest_sign_of_life(self) -> float | None:
        """When any instance was last alive, by the database's clock."""
        with self._telling() as cursor:
            ((at,),) = cursor.execute("SELECT max(alive_at) FROM instance").fetchall()
        return None if at is None else float(at)

    def farewell(self) -> None:
        """This instance is no more."""
        with self._telling() as cursor:
            cursor.execute("DELETE FROM instance WHERE name = %s AND started_at = %s", (self._instance, self._started_at))

    def listed(self, names: Collection[str]) -> set[str]:
        """Those of the instances that have not said farewell. Raises StoreUnavailable."""
        with self._telling() as cursor:
            return {name for (name,) in cursor.execute("SELECT name FROM instance WHERE name = ANY(%s::text[])", (list(names),)).fetchall()}

    # ── to whom access tokens were given ──

    def admit(self, admissions: Sequence[Admission]) -> None:
        storable = sorted(
            one for one in admissions if not any("\0" in name for name in one[:6])
        )  # in order, so that nobody waits for somebody who waits
        if storable:
            self.atomically(partial(_run, _ADMIT, _transposed(storable)))

    def admissions_due(self, now: float, limit: int, lease_ends: float) -> list[Admission]:
        return [Admission(*values) for values in self.atomically(partial(_run, _ADMISSIONS_DUE, (lease_ends, now, limit)))]

    def admissions_of(self, participants: Collection[Participant], until: float, lease_ends: float) -> list[Admission]:
        storable = _storable(participants)
        if not storable:
            return []
        return [Admission(*values) for values in self.atomically(partial(_run, _ADMISSIONS_OF, (lease_ends, until, *_transposed(storable))))]

    def settle_admissions(self, checked: Sequence[Admission], over: Sequence[Admission]) -> None:
        if checked:
            self.atomically(partial(_run, _CHECKED_ADMISSIONS, _transposed([(*one[:3], one.until, one.due) for one in sorted(checked)])))
        if over:
            self.atomically(partial(_run, _OVER_ADMISSIONS, _transposed([(*one[:3], one.until) for one in sorted(over)])))

    def next_admission(self) -> float | None:
        with self._telling() as cursor:
            ((due,),) = cursor.execute("SELECT min(due) FROM admission").fetchall()
        return None if due is None else float(due)

    def ask_admissions(self, now: float, until: float) -> None:
        self.atomically(partial(_run, _ASK_ADMISSIONS, (now, until)))

    # ── the rest ──

    def backlog(self, homeserver: str, now: float) -> dict[Lane, tuple[int, float]]:
        with self._telling() as cursor:
            found = [(lane, *cursor.execute(_BACKLOG, (homeserver, lane.value, now)).fetchall()[0]) for lane in Lane]
        return {lane: (count, oldest) for lane, count, oldest in found if count}

    def overdue(self, homeserver: str, now: float) -> float | None:
        with self._telling() as cursor:
            ((harm,),) = cursor.execute(_OVERDUE, (homeserver, Lane.RESTART.value, now)).fetchall()
        return None if harm is None else float(harm)

    def waiting_since(self, homeserver: str) -> float | None:
        with self._telling() as cursor:
            ((harm,),) = cursor.execute(_WAITING_SINCE, (homeserver, Lane.END.value)).fetchall()
        return None if harm is None else float(harm)

    def disk(self) -> None:
        """It is the server's."""

    def clock_mark(self) -> str | None:
        """There is none: the database's clock is everybody's."""
        return None

    def save_clock_mark(self, mark: str) -> None:
        """Only see whether the database takes a write: `mark` says nothing to other machines."""
        del mark
        self.atomically(partial(_run, _WRITTEN, ()))

    def keys_mark(self) -> str | None:
        """See `base.Store`."""
        with self._telling() as cursor:
            found = cursor.execute("SELECT value FROM meta WHERE key = %s", (schema.KEYS_MARK,)).fetchone()
        return None if found is None else str(found[0])

    def save_keys_mark(self, mark: str) -> None:
        """See `base.Store`."""
        self.atomically(partial(_run, _SAVE_MARK, (schema.KEYS_MARK, mark)))

    def checkpoint(self) -> None:
        """PostgreSQL does its own housekeeping."""

    def idle(self) -> None:
        """See `checkpoint`."""

    def close(self) -> None:
        with suppress(StoreUnavailable):
            if self._side is not None:
                self.farewell()
        for bound in (self._main, self._side):
            if bound is not None:
                bound.close()
        self._main = self._side = None
        self._pool.dispose()
        self._watch.close()
        self._counting.close()


def _shown(url: str) -> str:
    """Which database it is, for people."""
    parts = conninfo_to_dict(url)
    port = f" (port {parts['port']})" if parts.get("port") else ""
    return f"{parts.get('dbname', '')} at {parts.get('host') or parts.get('hostaddr') or 'the local socket'}{port}"


def sentence(name: str, error: psycopg.Error) -> str:
    """The problem and its remedy, in one line and without values."""
    problem = (error.diag.message_primary or " ".join(str(error).split())).rstrip(".?! ")
    remedy = next((remedy for words, remedy in _REMEDIES if any(word in problem for word in words)), GOES_ON)
    if isinstance(error, errors.InsufficientPrivilege):
        remedy = "Make the user the owner of the database, or grant it CREATE on the schema public and all on its tables."
    elif isinstance(error, errors.DiskFull):
        remedy = "The disk of the database is full: free some space; it goes on by itself."
    return f"The database {name} failed: {problem}. {remedy}"


# What fails when a connection is made has no class of its own in the driver.
_REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("no pg_hba.conf entry",), "Allow this user and this address in the server's pg_hba.conf."),
    (("password",), "Check the user in `database`, and `postgresql.password_file`."),
    (("certificate", "does not match host name"), "Check `sslrootcert` in `database`, and the name by which the server is reached."),
    (("does not support SSL",), "Give the server a certificate and `ssl = on`, or set `sslmode` in `database` for a network that is yours alone."),
    (("read-only",), "It is a standby: name the primary as well, separated by a comma; it goes on by itself when one of them takes changes."),
    (("connection slots", "too many"), f"Each instance needs {CONNECTIONS} connections: raise max_connections."),
    (("prepared statement",), "Connect to the server itself, or to PgBouncer with pool_mode = session."),
    (("role",), "Check the user in `database`; `createuser` makes one."),
    (("does not exist",), "Check the key `database`; `createdb` makes a database."),
)
