"""The embedded database: one file, one connection, one thread.

Exactly one connection writes and checkpoints: SQLite 3.7.0 to 3.51.2 can corrupt the write-ahead log when two do. A lock file keeps a second
process out. SQLAlchemy Core compiles the few statements once, and the driver runs them (a step of one input: 123 µs against 246 through Core).
"""

import fcntl
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote

from sqlalchemy import (
    Table,
    and_,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import sqlite as dialect
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.sql import ClauseElement, ColumnElement

from sfu_delegate.delegation.lifecycle import ADRIFT_CHECK
from sfu_delegate.delegation.model import DelayedEvent, Lane, Note, Room, State
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.urgency import Countdown, Limit
from sfu_delegate.store import migrate, schema, statements
from sfu_delegate.store.base import (
    ADMITTED_FOR,
    Admission,
    DatabaseInUse,
    Disk,
    Heard,
    KnownHomeserver,
    KnownSfu,
    News,
    Participant,
    RoomKey,
    StoreUnavailable,
    Transaction,
)
from sfu_delegate.store.census import StoreCensus
from sfu_delegate.store.reading import Reader
from sfu_delegate.store.rows import FIELDS, Columns, changed, delayed_event_of, room_of, values_of, values_of_room
from sfu_delegate.store.statements import all_events, compiled, p, text_of
from sfu_delegate.store.statements import wanted as wanted_keys

T = TypeVar("T")

MANY = 256  # keys in one statement, a power of two; older versions of SQLite allow 999 parameters
# Bytes of the write-ahead log that are there from the start on, and used again and again: a commit that makes the file longer takes half as long
# again (on ext4, 360 µs and 240 µs), since the file system has to note its length.
LOG_SIZE = 8 * 1024 * 1024
LOG_NEEDS_FREE = 20 * LOG_SIZE  # … if there is so much space on the disk
LOG_MOST = 64 * 1024 * 1024  # … that stay after it had to be longer, because somebody read for long
CHECKPOINT_ABOVE = 800  # rows written since the last one, under load: a departure writes five, and in a storm 800 make some 7 MB of pages
CHECKPOINT_IDLE_ABOVE = 200
CACHE_SIZE = -8192  # KiB, for SQLite: pages that are kept in memory
READS_FOR = 10.0  # seconds for a question beside the engine: as long as somebody reads, the log grows
PATIENCE = 1.0  # seconds that a lock of another process is waited for; whoever asks is better served by a reason than by waiting

# Bytes of a database that is checked at the start. On two shared cores, 57 MB (100,000 rows) took 0.6 s, and 1.2 s from the disk; 577 MB 2.6 and
# 15 s, and LiveKit 1.13 tries a webhook for 15 s only.
CHECKED_UP_TO = 256 * 1024 * 1024

# Damage does not mend itself, and what does not need the damaged part would still work: the first error holds until the next start.
_DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB")

# What is wrong with a value, not with the database.
_OF_ONE_INPUT = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.NotSupportedError)

_DIALECT = dialect.dialect(paramstyle="qmark")
_event = schema.delayed_event
_room = schema.room
_history = schema.history
_meta = schema.meta
_homeserver = schema.homeserver
_sfu = schema.sfu
_admission = schema.admission
_ADMISSIONS = select(*_admission.columns)


def _sql(statement: ClauseElement, *names: str) -> str:
    """The text of a statement whose parameters stand in the order of `names`."""
    return text_of(statement, _DIALECT, *names)


def _of_participants() -> str:
    """Rows by all forms of their participants' identities.

    One statement for all participants of a step takes half the time of one for each. A SELECT for each form, since an OR makes SQLite scan the
    table.
    """
    wanted = wanted_keys("sfu", "room", "identity")
    where = [_event.c.sfu == wanted.c.sfu, _event.c.room == wanted.c.room, _event.c.state != p("without")]
    by_identity = wanted.join(_event, and_(*where, _event.c.identity == wanted.c.identity))
    by_others = [
        wanted.join(_event, and_(*where, form == wanted.c.identity, _event.c.identity != wanted.c.identity))
        for form in (_event.c.alias, _event.c.twin)
    ]
    all_forms = union_all(*(select(*_event.columns).select_from(by) for by in (by_identity, *by_others)))
    return _sql(all_forms, "sfu", "room", "identity", "without", "without", "without")


def _rooms() -> str:
    wanted = wanted_keys("sfu", "name")
    by_key = wanted.join(_room, and_(_room.c.sfu == wanted.c.sfu, _room.c.name == wanted.c.name))
    return _sql(select(*_room.columns).select_from(by_key), "sfu", "name")


def _is_participant(participant: Participant) -> tuple[ColumnElement[bool], ...]:
    """Is an admission this participant's?"""
    return tuple(column == value for column, value in zip(_admission.primary_key, participant, strict=True))


@lru_cache(maxsize=64)
def _for_many(sql: str, key: str, count: int) -> str:
    """A statement for one key, made one for so many. By its text: SQLAlchemy takes some milliseconds for each."""
    before, one, after = sql.partition(key)
    assert one, sql  # noqa: S101 — it is our own
    assert key not in after, sql  # noqa: S101
    return before + ", ".join([key] * count) + after


@lru_cache(maxsize=1024)
def _update_of(columns: tuple[int, ...]) -> tuple[str, Columns]:
    """The UPDATE of just these columns, by id, and its parameters. As text, too."""
    quoted = _DIALECT.identifier_preparer.quote
    names = ", ".join(f"{quoted(FIELDS[i])}=?" for i in columns)
    return f"UPDATE {_event.name} SET {names} WHERE {_event.name}.id = ?", Columns(columns)  # noqa: S608 — the names are our own


_OF_PARTICIPANTS, _PARTICIPANT_KEY = _of_participants(), "(?, ?, ?)"
_ROOMS, _ROOM_KEY = _rooms(), "(?, ?)"
_GET_ALL, _EVENT_KEY = _sql(all_events().where(_event.c.id.in_([p("a")])), "a"), "?"
_OF_ROOM = _sql(statements.OF_ROOM, "a", "b", "c")
_OF_USER = _sql(statements.OF_USER, "a", "b", "c", "d")
_SOON = _sql(statements.SOON, "a", "b", "param_1")
_OF_DELEGATION = _sql(statements.OF_DELEGATION, "a")
_GET = _sql(all_events().where(_event.c.id == p("a")), "a")


def _todo(names: str, *more: ColumnElement[bool]) -> str:
    # SQLAlchemy writes an OFFSET to every LIMIT: the last parameter.
    return _sql(all_events().where(_event.c.id.in_(statements.due_ids(*more))), *names, "param_1")


_TODO = _todo("abcd")
_TODO_IN_TIME = _todo("abccd", statements.IN_TIME)
_TODO_HARMED = _todo("abccd", statements.HARMED)
_NEXT_DUE = _sql(statements.NEXT_DUE, *("a" for _ in Lane))
_INSERT = _sql(insert(_event), *FIELDS)
_DELETE = _sql(delete(_event).where(_event.c.id == p("a")), "a")
_DELETE_HISTORY = _sql(delete(_history).where(_history.c.event == p("a")), "a")
_NOTE = _sql(insert(_history), "event", "at", "what", "detail")
_HISTORY = _sql(statements.HISTORY, "a")
_ROOM = _sql(statements.ROOM, "a", "b")
_ROOMS_DUE = _sql(statements.ROOMS_DUE, *("a", "b", "c", "d", "param_1"))
_NEXT_ROOM_DUE = _sql(statements.NEXT_ROOM_DUE, "a", "b")
_COUNTDOWNS = _sql(statements.COUNTDOWNS, *("a", "b"))
_OVERDUE = _sql(statements.OVERDUE, *("a", "b", "c"))
_WAITING_SINCE = _sql(statements.WAITING_SINCE, *("a", "b"))
_new_room = upsert(_room)
_SAVE_ROOM = _sql(
    _new_room.on_conflict_do_update(
        index_elements=["sfu", "name"], set_={c.name: _new_room.excluded[c.name] for c in _room.columns if not c.primary_key}
    ),
    *Room._fields,
)
_DELETE_ROOM = _sql(delete(_room).where(_room.c.sfu == p("a"), _room.c.name == p("b")), "a", "b")
_GROUP = statements.GROUP
_COUNTED = statements.counted(func.total)
_SAMPLE = _sql(select(*_GROUP).where(_event.c.id.in_([p("a")])), "a")
_COUNT_OF_GROUP = _sql(select(*_COUNTED).where(statements.IN_GROUP), "s", "delay_1", *"abc")
_COUNT_OF_OTHERS = _sql(select(*_GROUP, *_COUNTED).where(statements.NOT_IN_GROUP).group_by(*_GROUP), "s", "delay_1", *"abc")
_NEXT_HOMESERVER = _sql(select(func.min(_event.c.homeserver)).where(_event.c.due.is_not(None), _event.c.homeserver > p("a")), "a")
_BACKLOG = _sql(statements.BACKLOG, *("a", "b", "c"))
_ROOM_SCHEDULE = _sql(select(_room.c.sfu, func.min(_room.c.due)).where(_room.c.due.is_not(None)).group_by(_room.c.sfu))


class SqliteTransaction:
    """See `base.Transaction`."""

    def __init__(self, connection: sqlite3.Connection, store: "SqliteStore"):
        self._connection = connection
        self._store = store

    # There is but one transaction at a time.

    def lock_rooms(self, keys: Collection[RoomKey], made: Collection[RoomKey]) -> list[Room]:
        del made
        return self.rooms(keys)

    def rooms_of(self, events: Collection[int], delegations: Collection[str]) -> list[RoomKey]:
        rows = [*self.get_all(events), *(row for delegation in delegations for row in self.of_delegation(delegation))]
        return sorted({(row.sfu, row.room) for row in rows})

    def no_more_waiting(self) -> None:
        pass

    def free_rooms(self, keys: Collection[RoomKey]) -> set[RoomKey]:
        return set(keys)

    def _fetch(self, sql: str, parameters: Sequence[Any]) -> list[Any]:
        try:
            return self._connection.execute(sql, parameters).fetchall()
        except _OF_ONE_INPUT:
            raise
        except sqlite3.Error as error:
            raise self._store.failed(error) from error

    def _rows(self, sql: str, parameters: Sequence[Any]) -> list[DelayedEvent]:
        return [delayed_event_of(values) for values in self._fetch(sql, parameters)]

    def of_participants(self, participants: Collection[Participant], *, finished: bool) -> list[DelayedEvent]:
        without = "" if finished else State.DONE.value
        rows: dict[int, DelayedEvent] = {}
        for part in _parts(list(participants)):
            sql = _for_many(_OF_PARTICIPANTS, _PARTICIPANT_KEY, len(part))
            for found in self._fetch(sql, [*chain.from_iterable([key or (None, None, None) for key in part]), without, without, without]):
                if found[0] not in rows:  # by another form of its identity, too
                    rows[found[0]] = delayed_event_of(found)
        return [rows[id] for id in sorted(rows)]

    def rooms(self, keys: Collection[tuple[str, str]]) -> list[Room]:
        found: list[Room] = []
        for part in _parts(list(keys)):
            sql = _for_many(_ROOMS, _ROOM_KEY, len(part))
            found += [room_of(values) for values in self._fetch(sql, [*chain.from_iterable([key or (None, None) for key in part])])]
        return found

    def get_all(self, events: Collection[int]) -> list[DelayedEvent]:
        parts = _parts(list(events))
        return [row for part in parts for row in self._rows(_for_many(_GET_ALL, _EVENT_KEY, len(part)), part)]

    def of_room(self, sfu: str, room: str) -> list[DelayedEvent]:
        return self._rows(_OF_ROOM, (sfu, room, State.DONE.value))

    def of_user(self, sfu: str, room: str, user: str) -> list[DelayedEvent]:
        return self._rows(_OF_USER, (sfu, room, State.DONE.value, user))

    def of_delegation(self, delegation: str) -> list[DelayedEvent]:
        return self._rows(_OF_DELEGATION, (delegation,))

    def get(self, event: int) -> DelayedEvent | None:
        rows = self._rows(_GET, (event,))
        return rows[0] if rows else None

    def todo(self, homeserver: str, lane: Lane, limit: int, now: float, *, harmed: bool | None = None) -> list[DelayedEvent]:
        if harmed is None:
            return self._rows(_TODO, (homeserver, lane.value, now, limit, 0))
        return self._rows(_TODO_HARMED if harmed else _TODO_IN_TIME, (homeserver, lane.value, now, now, limit, 0))

    def soon(self, homeserver: str, limit: int) -> list[DelayedEvent]:
        return self._rows(_SOON, (homeserver, limit, 0))

    def next_due(self, homeserver: str) -> float | None:
        found = self._fetch(_NEXT_DUE, (homeserver,) * len(Lane))
        return min((due for (due,) in found if due is not None), default=None)

    def countdowns(self, homeserver: str) -> Iterator[Countdown]:
        for harm, delay, event, known in self._fetch(_COUNTDOWNS, (homeserver, Lane.RESTART.value)):
            yield Countdown(harm, delay, event, bool(known))

    def new_id(self) -> int:
        self._store.last_id += 1
        return self._store.last_id

    def insert(self, row: DelayedEvent) -> None:
        self._connection.execute(_INSERT, values_of(row))

    def update(self, old: DelayedEvent, new: DelayedEvent) -> None:
        columns = changed(old, new)
        if not columns:
            return
        sql, parameters = _update_of(columns)
        self._connection.execute(sql, parameters.values(new))

    def delete(self, event: int) -> None:
        self._connection.execute(_DELETE_HISTORY, (event,))
        self._connection.execute(_DELETE, (event,))

    def room(self, sfu: str, name: str) -> Room | None:
        found = self._fetch(_ROOM, (sfu, name))
        return room_of(found[0]) if found else None

    def rooms_due(self, sfu: str, limit: int, now: float) -> list[Room]:
        found = self._fetch(_ROOMS_DUE, (sfu, 0, now, limit, 0))
        if len(found) < limit:
            found += self._fetch(_ROOMS_DUE, (sfu, 1, now, limit - len(found), 0))
        return [room_of(values) for values in found]

    def next_room_due(self, sfu: str) -> float | None:
        found = [self._fetch(_NEXT_ROOM_DUE, (sfu, routine))[0][0] for routine in (0, 1)]
        return min((due for due in found if due is not None), default=None)

    def ask_rooms(self, sfu: str | None, now: float) -> None:
        c = _room.c
        where = [] if sfu is None else [c.sfu == sfu]
        self._store.execute(update(_room).where(*where).values(asked=now))
        self._store.execute(update(_room).where(*where, c.due.is_(None)).values(routine=1))
        self._store.execute(update(_room).where(*where, c.claimed == 0, or_(c.due.is_(None), c.due > now)).values(due=now))

    def save_homeserver(self, known: KnownHomeserver) -> None:
        self._upsert(_homeserver, {"name": known.name, "rate_limit": known.limit.value, "rate": known.rate, "burst": known.burst})

    def save_sfu(self, known: KnownSfu) -> None:
        self._upsert(_sfu, known._asdict())

    def _upsert(self, table: Table, values: dict[str, Any]) -> None:
        new = upsert(table).values(values)
        rest = {name: new.excluded[name] for name in values if name != "name"}
        self._store.execute(new.on_conflict_do_update(index_elements=["name"], set_=rest))

    def save_room(self, room: Room) -> None:
        self._connection.execute(_SAVE_ROOM, values_of_room(room))

    def delete_room(self, sfu: str, name: str) -> None:
        self._connection.execute(_DELETE_ROOM, (sfu, name))

    def note(self, notes: Sequence[Note]) -> None:
        self._connection.executemany(_NOTE, notes)

    def history(self, events: Sequence[int]) -> list[Note]:
        found = [Note(*values) for event in events for values in self._fetch(_HISTORY, (event,))]
        return sorted(found, key=lambda note: note.at)


def _parts(keys: Sequence[T]) -> Iterator[list[T | None]]:
    """Keys in parts of few sizes, so that there are few statements, filled up with what no row has."""
    for at in range(0, len(keys), MANY):
        part: list[T | None] = list(keys[at : at + MANY])
        yield part + [None] * ((1 << (len(part) - 1).bit_length()) - len(part))


class SqliteStore:
    """The embedded database in the file `path`, or in memory (`:memory:`). It is used by one thread at a time.

    Raises DatabaseInUse when another process has it open, DatabaseTooNew, and StoreUnavailable when it cannot be opened.
    """

    begin_anew: tuple[type[Exception], ...] = ()
    shared = False  # … but the simulation has several engines work on one, in turn

    def __init__(self, path: str | Path):
        self.path = self.name = str(path)
        self._lock: IO[str] | None = None
        self._file: tuple[int, int] | None = None  # device and inode
        self._damage: str | None = None  # the sentence about it, once it was met
        self._closed = False
        self._checkpointed = 0  # rows that had been written then
        self._tried = 0  # … when somebody who reads was in the way
        self._keeps_log = False  # … at a length of its own, since there is space
        memory = self.path == ":memory:"
        try:
            if not memory:
                self._lock = _locked(Path(self.path))
                self._file = _create(Path(self.path))
            self._connection = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False, cached_statements=512)
            try:
                self._prepare(memory)
            except BaseException:
                self._connection.close()
                raise
        except BaseException:
            self._unlock()
            raise

    def _prepare(self, memory: bool) -> None:
        run = self._connection.execute
        try:
            run("PRAGMA journal_mode=WAL")
            run("PRAGMA synchronous=FULL")
            run("PRAGMA wal_autocheckpoint=0")
            run("PRAGMA temp_store=MEMORY")
            if memory:
                migrate.create_all(self._connection)
            else:
                self._check()
                migrate.upgrade(self._connection, Path(self.path))
                self._lengthen_log()
            run(f"PRAGMA cache_size={CACHE_SIZE}")
            self.last_id: int = run(f"SELECT coalesce(max(id), 0) FROM {_event.name}").fetchone()[0]  # noqa: S608
        except sqlite3.Error as error:
            raise self.failed(error) from error

    def _lengthen_log(self) -> None:
        """Write pages to the log that are taken back: the file keeps its length. Where the disk is nearly full, it is as long as it is."""
        run = self._connection.execute
        run(f"PRAGMA journal_size_limit={LOG_MOST}")
        disk = os.statvfs(self.path)
        if disk.f_bavail * disk.f_frsize < LOG_NEEDS_FREE:
            return
        self._keeps_log = True
        run("PRAGMA cache_size=10")  # more pages are written to the log before the end of a transaction
        with suppress(sqlite3.OperationalError):
            run("BEGIN IMMEDIATE")
            try:
                run("CREATE TABLE lengthening (pages BLOB)")
                run("INSERT INTO lengthening VALUES (zeroblob(?))", (LOG_SIZE,))
            finally:
                if self._connection.in_transaction:
                    run("ROLLBACK")

    def _check(self) -> None:
        """Look for damage while there is somebody to tell: what is in a part that is seldom read would come out in the middle of a call.

        Not in databases above CHECKED_UP_TO, whose check would hold up the start for too long: there damage is told when it is met.
        """
        if os.stat(self.path).st_size > CHECKED_UP_TO:
            return
        (found,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            self._damage = _sentence(self.path, " ".join(str(found).split()), "SQLITE_CORRUPT")
            raise StoreUnavailable(self._damage)

    def failed(self, error: sqlite3.Error) -> StoreUnavailable:
        """What an error of the driver means, for the operator. Damage is remembered."""
        name, unavailable = _name(error), self._not_read(error)
        if name in _DAMAGE:
            self._damage = self._damage or str(unavailable)
        return unavailable

    def _not_read(self, error: sqlite3.Error) -> StoreUnavailable:
        """The same for a question beside the engine, whose work goes on: what was asked about need not be what calls need."""
        return StoreUnavailable(_sentence(self.path, str(error), _name(error)))

    def _still_sound(self) -> None:
        if self._damage is not None:
            raise StoreUnavailable(self._damage)

    # ── the work ──

    def atomically(self, work: Callable[[Transaction], T], *, about_to_wait: Callable[[], object] | None = None) -> T:
        self._still_sound()
        run = self._connection.execute
        last_id = self.last_id
        try:
            run("BEGIN IMMEDIATE")
            try:
                result = work(SqliteTransaction(self._connection, self))
                if about_to_wait is not None:
                    about_to_wait()
                run("COMMIT")
            except BaseException:
                self.last_id = last_id
                if self._connection.in_transaction:
                    run("ROLLBACK")
                raise
        except _OF_ONE_INPUT:
            raise
        except sqlite3.Error as error:
            raise self.failed(error) from error
        return result

    def reading(self, work: Callable[[Transaction], T]) -> T:
        try:
            self._connection.execute("BEGIN")
            try:
                return work(SqliteTransaction(self._connection, self))
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise self.failed(error) from error

    def reader(self) -> Reader:
        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(f"file:{quote(self.path)}?mode=ro", uri=True, timeout=PATIENCE, check_same_thread=False)
            give_up = time.monotonic() + READS_FOR  # there is one for each question
            connection.set_progress_handler(lambda: int(self._closed or time.monotonic() > give_up), 100_000)
            return connection

        return Reader("sqlite", connect, self._not_read)

    def census(self) -> StoreCensus:
        run = self._connection.execute
        try:
            census = StoreCensus(
                schedule=dict(self._schedule()),
                rooms=dict(run(_ROOM_SCHEDULE)),
                homeservers=[
                    KnownHomeserver(name, Limit(limit), rate, burst)
                    for name, limit, rate, burst in self.execute(select(*_homeserver.columns["name", "rate_limit", "rate", "burst"]))
                ],
                sfus=[KnownSfu(*values) for values in self.execute(select(*_sfu.columns["name", "failing_since", "several_nodes_at"]))],
            )
            for homeserver, state, presence, count, load in self._groups():
                census.states[homeserver, state, presence] = count
                if load:
                    census.load[homeserver] = census.load.get(homeserver, 0.0) + load
        except sqlite3.Error as error:
            raise self.failed(error) from error
        return census

    def _schedule(self) -> Iterator[tuple[str, float]]:
        """The next due time of each homeserver: some searches in an index, not a scan."""
        homeserver = ""
        tx = SqliteTransaction(self._connection, self)
        while True:
            (homeserver,) = self._connection.execute(_NEXT_HOMESERVER, (homeserver,)).fetchone()
            if homeserver is None:
                return
            due = tx.next_due(homeserver)
            if due is not None:
                yield homeserver, due

    def _groups(self) -> Iterator[tuple[str, str, str, int, float]]:
        """How many rows there are in each state of a homeserver, and the restarts a second that they need.

        SQLite sorts all rows for a GROUP BY: of a million, that takes three times as long as reading them. So those that are alike in most rows
        are counted without it.
        """
        run = self._connection.execute
        sample = range(self.last_id, 0, -(self.last_id // MANY + 1))
        found = Counter(run(_for_many(_SAMPLE, _EVENT_KEY, len(sample)), sample)) if sample else Counter()
        most = found.most_common(1)[0][0] if found else ("", "", "")
        count, load = run(_COUNT_OF_GROUP, (State.DONE.value, 1.0, *most)).fetchone()
        if count:
            yield (*most, count, load)
        yield from run(_COUNT_OF_OTHERS, (State.DONE.value, 1.0, *most))

    def recover(self, now: float, policy: Policy, *, clock_unsure: bool) -> int:
        def work(tx: Transaction) -> int:
            # Whether an ending that was under way got through is not known: a 404 will tell.
            ending = or_(_event.c.lane == Lane.END.value, _event.c.state == State.SUPERSEDED.value)
            tried = case((ending, 1), else_=_event.c.end_tried)
            count = self.execute(update(_event).where(_event.c.claimed == 1).values(due=now, claimed=0, end_tried=tried)).rowcount
            self._add_rooms()
            self.execute(update(_room).where(_room.c.claimed == 1).values(due=now, claimed=0))
            if clock_unsure:
                self._forget_times(now, policy)
            # Webhooks that came while nobody listened are lost.
            tx.ask_rooms(None, now)
            return count

        return self.atomically(work)

    def _add_rooms(self) -> None:
        """A room for each open delegation: databases of the first version kept rooms only while somebody waited for a look."""
        c = _event.c
        values = {"room_sid": "", "started_by": "", "instance_at": 0, "finished": 0, "doubt_until": 0, "looked_at": 0}
        values |= {"asked": None, "due": None, "routine": 1, "failures": 0, "claim": 0, "claimed": 0}
        # Names come from an index, each once, so that few rows have to be read however many there are.
        names = select(c.sfu, c.room).distinct().subquery("names")
        there = exists().where(_room.c.sfu == names.c.sfu, _room.c.name == names.c.room)
        wanted = exists().where(c.sfu == names.c.sfu, c.room == names.c.room, c.state != State.DONE.value)
        missing = select(*names.c, *(literal(value).label(name) for name, value in values.items())).where(~there, wanted)
        self.execute(insert(_room).from_select(["sfu", "name", *values], missing))

    def _forget_times(self, now: float, policy: Policy) -> None:
        """Stored times may lie in the future, or longer ago than they say: what waits for one is due, and nothing happened later than now.

        A countdown that seems to be over may have just begun: nobody is given up for that.
        """
        c = _event.c
        over = and_(c.state == State.LIVE.value, c.harm < now)
        self.execute(
            update(_event)
            .where(c.state != State.DONE.value)
            .values(
                due=case(
                    (c.state == State.VANISHED.value, now + policy.vanished_wait),
                    (c.state == State.ADRIFT.value, now + ADRIFT_CHECK),
                    else_=now,
                ),
                harm=case(
                    (c.state == State.ADRIFT.value, now + c.delay + policy.adrift_keep),
                    (over, now + c.delay / 2),
                    else_=func.min(c.harm, now + c.delay / 2),
                ),
                running_since=func.max(func.min(c.running_since, now), now - c.delay),
                presence_since=func.min(c.presence_since, now),
                attempt_at=func.min(c.attempt_at, now),
                look_at=func.min(c.look_at, now),
                ended_at=func.min(c.ended_at, now),
                accepted_at=func.min(c.accepted_at, now),
            )
        )
        self.execute(update(_event).where(c.state == State.DONE.value).values(due=func.min(c.due, now + (c.due - c.finished_at))))
        self.execute(update(_admission).values(due=func.min(_admission.c.due, now), until=now + ADMITTED_FOR))
        self.execute(
            update(_room).values(
                due=case((_room.c.due.is_not(None), now), else_=None),
                looked_at=func.min(_room.c.looked_at, now),
                asked=None,
                doubt_until=func.min(_room.c.doubt_until, now + policy.doubt),
            )
        )

    def backlog(self, homeserver: str, now: float) -> dict[Lane, tuple[int, float]]:
        try:
            found = [(lane, *self._connection.execute(_BACKLOG, (homeserver, lane.value, now)).fetchone()) for lane in Lane]
        except sqlite3.Error as error:
            raise self.failed(error) from error
        return {lane: (count, oldest) for lane, count, oldest in found if count}

    def overdue(self, homeserver: str, now: float) -> float | None:
        try:
            harm: float | None = self._connection.execute(_OVERDUE, (homeserver, Lane.RESTART.value, now)).fetchone()[0]
        except sqlite3.Error as error:
            raise self.failed(error) from error
        return harm

    def waiting_since(self, homeserver: str) -> float | None:
        try:
            harm: float | None = self._connection.execute(_WAITING_SINCE, (homeserver, Lane.END.value)).fetchone()[0]
        except sqlite3.Error as error:
            raise self.failed(error) from error
        return harm

    def disk(self) -> Disk | None:
        if self._file is None:
            return None
        try:
            system = os.statvfs(self.path)
            used = sum(os.stat(file).st_size for file in (self.path, f"{self.path}-wal", f"{self.path}-shm"))
        except OSError:
            return None
        return Disk(used, system.f_bavail * system.f_frsize)

    def execute(self, statement: ClauseElement) -> sqlite3.Cursor:
        """Run a statement that is not on a hot path."""
        sql, names, values = compiled(statement, _DIALECT)
        return self._connection.execute(sql, [values[name] for name in names])

    def clock_mark(self) -> str | None:
        return self._mark("clock")

    def save_clock_mark(self, mark: str) -> None:
        if self._file is not None:
            self._still_there()
        self._save_mark("clock", mark)

    def keys_mark(self) -> str | None:
        return self._mark(schema.KEYS_MARK)

    def save_keys_mark(self, mark: str) -> None:
        self._save_mark(schema.KEYS_MARK, mark)

    def _mark(self, key: str) -> str | None:
        try:
            found = self.execute(select(_meta.c.value).where(_meta.c.key == key)).fetchone()
        except sqlite3.Error as error:
            raise self.failed(error) from error
        return None if found is None else str(found[0])

    def _save_mark(self, key: str, mark: str) -> None:
        new = upsert(_meta).values(key=key, value=mark)
        statement = new.on_conflict_do_update(index_elements=["key"], set_={"value": new.excluded.value})
        self.atomically(lambda _: self.execute(statement))

    # ── what instances tell each other ──

    def news(self, now: float, word: str = "") -> News:
        del now, word
        census = self.census()
        paces = {str(name): str(state) for name, state in self.execute(select(*schema.pace.columns["homeserver", "state"]))}
        heard = [
            Heard(name, heard_at or 0.0, answered_at or 0.0)
            for name, heard_at, answered_at in self.execute(select(*_sfu.columns["name", "heard_at", "answered_at"]))
        ]
        return News(census.schedule, census.rooms, paces, census.sfus, heard, [])

    def exchange_pace(self, homeserver: str, change: Callable[[str | None], str | None]) -> None:
        c = schema.pace.c
        found = self.execute(select(c.state).where(c.homeserver == homeserver)).fetchone()
        new = change(None if found is None else found[0])
        if new is not None:
            row = {"homeserver": homeserver, "address": "", "state": new, "changed_at": 0.0}
            statement = upsert(schema.pace).values(row)
            self.execute(statement.on_conflict_do_update(index_elements=["homeserver", "address"], set_={"state": new}))

    def heard_of(self, heard: Sequence[Heard]) -> None:
        for one in heard:
            new = upsert(_sfu).values(one._asdict())
            self.execute(new.on_conflict_do_update(index_elements=["name"], set_={name: new.excluded[name] for name in Heard._fields[1:]}))

    def ask_rooms(self, sfu: str | None, now: float) -> None:
        self.atomically(lambda tx: tx.ask_rooms(sfu, now))

    def unverified(self, events: Collection[int]) -> set[int]:
        rows = self.atomically(lambda tx: tx.get_all(events))
        return {row.id for row in rows if row.verified_at is None and row.state is not State.DONE}

    def peek(self, delegations: Sequence[str]) -> list[DelayedEvent]:
        return self.atomically(lambda tx: [row for delegation in delegations for row in tx.of_delegation(delegation)])

    def times_are_unknown(self, now: float, policy: Policy) -> None:
        self.atomically(lambda _: self._forget_times(now, policy))

    # ── to whom access tokens were given ──

    def admit(self, admissions: Sequence[Admission]) -> None:
        new = upsert(_admission)
        keep = {"until": func.max(_admission.c.until, new.excluded.until), "due": func.min(_admission.c.due, new.excluded.due)}
        sql = _sql(new.on_conflict_do_update(index_elements=["sfu", "room", "identity"], set_=keep), *Admission._fields)
        self.atomically(lambda _: self._connection.executemany(sql, admissions))

    def admissions_due(self, now: float, limit: int, lease_ends: float) -> list[Admission]:
        def claimed(_: Transaction) -> list[Admission]:
            found = [
                Admission(*values) for values in self.execute(_ADMISSIONS.where(_admission.c.due <= now).order_by(_admission.c.due).limit(limit))
            ]
            self._put_off(found, lease_ends)
            return found

        return self.atomically(claimed)

    def admissions_of(self, participants: Collection[Participant], until: float, lease_ends: float) -> list[Admission]:
        def claimed(_: Transaction) -> list[Admission]:
            rows = (self.execute(_ADMISSIONS.where(*_is_participant(participant))) for participant in participants)
            known = (Admission(*values) for each in rows for values in each)
            found = [one._replace(until=max(one.until, until)) for one in known]
            self._put_off(found, lease_ends)
            return found

        return self.atomically(claimed)

    def _put_off(self, admissions: Sequence[Admission], due: float) -> None:
        for one in admissions:
            self.execute(update(_admission).where(*_is_participant(one[:3])).values(due=due, until=one.until))

    def settle_admissions(self, checked: Sequence[Admission], over: Sequence[Admission]) -> None:
        def work(_: Transaction) -> None:
            for one in checked:
                until = func.max(_admission.c.until, one.until)
                self.execute(update(_admission).where(*_is_participant(one[:3])).values(due=one.due, until=until))
            for one in over:
                self.execute(delete(_admission).where(*_is_participant(one[:3]), _admission.c.until <= one.until))

        self.atomically(work)

    def next_admission(self) -> float | None:
        try:
            due: float | None = self.execute(select(func.min(_admission.c.due))).fetchone()[0]
        except sqlite3.Error as error:
            raise self.failed(error) from error
        return due

    def ask_admissions(self, now: float, until: float) -> None:
        self.atomically(
            lambda _: self.execute(update(_admission).values(due=func.min(_admission.c.due, now), until=func.max(_admission.c.until, until)))
        )

    # ── housekeeping ──

    @property
    def is_log_large(self) -> bool:
        return self._connection.total_changes - max(self._checkpointed, self._tried) > CHECKPOINT_ABOVE

    def _still_there(self) -> None:
        """A file that was deleted, or replaced by a backup, goes on taking transactions that nobody will ever find again."""
        try:
            now = os.stat(self.path)
            lost = (now.st_dev, now.st_ino) != self._file
        except OSError:
            lost = True
        if lost:
            raise StoreUnavailable(f"The database {self.path} was deleted or replaced while it was in use. Start the daemon again.")

    def idle(self) -> None:
        if self._file is not None:
            self._still_there()
        if self._connection.total_changes - self._checkpointed > CHECKPOINT_IDLE_ABOVE:
            self.checkpoint()

    def checkpoint(self) -> None:
        self._still_sound()
        self._tried = self._connection.total_changes
        run = self._connection.execute
        try:
            # Somebody who reads, such as a backup, is not waited for: nothing would be stored meanwhile.
            run("PRAGMA busy_timeout=0")
            try:
                # All of it, so that the next commit begins anew at the beginning of the log. Not TRUNCATE: see LOG_SIZE.
                (busy, _, _) = run(f"PRAGMA wal_checkpoint({'RESTART' if self._keeps_log else 'TRUNCATE'})").fetchone()
            finally:
                run(f"PRAGMA busy_timeout={round(PATIENCE * 1000)}")
        except sqlite3.Error as error:
            raise self.failed(error) from error
        if not busy:
            self._checkpointed = self._connection.total_changes

    def close(self) -> None:
        self._closed = True  # whoever reads beside the engine stops: the process would not end before
        try:
            self._connection.close()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _locked(path: Path) -> IO[str]:
    """The lock file beside the database, locked for as long as it is open. The kernel releases it when the process ends, however it ends."""
    try:
        file = open(f"{path}.lock", "a+", encoding="ascii", opener=_for_us_only)  # noqa: SIM115
    except OSError as error:
        raise StoreUnavailable(f"The database {path} cannot be opened: {error.strerror}. Its directory must exist and be writable.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise DatabaseInUse(
            f"The database {path} is in use by another process. Stop that one first, or give this one a database of its own (key `database`)."
        ) from error
    return file


def _create(path: Path) -> tuple[int, int]:
    """Make the file before SQLite does, readable by nobody else: whoever knows a delay_id can end the event. SQLite gives its log the same mode.

    Returns its device and inode.
    """
    try:
        file = _for_us_only(str(path), os.O_RDWR | os.O_CREAT)
        status = os.fstat(file)
        os.close(file)
        return (status.st_dev, status.st_ino)
    except OSError as error:
        raise StoreUnavailable(f"The database {path} cannot be opened: {error.strerror}. It must be a file that can be written.") from error


def _for_us_only(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _name(error: sqlite3.Error) -> str:
    """SQLite's primary result code."""
    return "_".join((getattr(error, "sqlite_errorname", None) or "").split("_")[:2])


def _sentence(path: str, problem: str, name: str) -> str:
    """The problem and its remedy; `name` is SQLite's primary result code."""
    remedy = {
        "SQLITE_INTERRUPT": f"There is too much to read within {READS_FOR:g} s: ask for less.",
        "SQLITE_FULL": "The disk is full: free some space; it goes on by itself.",
        "SQLITE_BUSY": "Another process holds it: let go of it; it goes on by itself.",
        "SQLITE_READONLY": "It is read-only: check the owner and the file system.",
        "SQLITE_CORRUPT": "It is damaged: stop the daemon, restore the last backup or move the file away to start with an empty one.",
        "SQLITE_NOTADB": "It is no SQLite database: check the key `database`.",
        "SQLITE_CANTOPEN": "Its directory must exist and be writable.",
    }.get(name, "")
    return f"The database {path} failed: {problem}. {remedy}".rstrip()
