"""Copies all that a database holds to another one, of either kind, and compares the two row by row before the copy is kept.

Nobody else works with either of them meanwhile: SQLite's lock files are held, and PostgreSQL's tables are locked. The source is read in one snapshot.
The target is written in one transaction: whatever happens, it has all of the copy, or what it had before.

Nothing that is told about a row may be a delay_id or a token.
"""

import fcntl
import json
import os
import re
import sqlite3
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Protocol

import psycopg
from alembic.script import ScriptDirectory
from psycopg import IsolationLevel, errors
from sqlalchemy import BigInteger, Column, Float, Integer, LargeBinary, Select, Table, func, insert, select
from sqlalchemy.dialects.postgresql import psycopg as postgresql_dialect
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.dialects.sqlite import insert as upsert

from sfu_delegate.delegation.model import State
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.store import schema
from sfu_delegate.store.base import DatabaseInUse, DatabaseTooNew, StoreUnavailable
from sfu_delegate.store.migrate import VERSION_TABLE, alembic_config
from sfu_delegate.store.postgresql import DEAD_AFTER, PostgresStore
from sfu_delegate.store.sqlite import SqliteStore
from sfu_delegate.store.statements import compiled

BATCH = 2000  # rows that are in memory at a time, of each side
NAMED = 20  # rows that are named of those that PostgreSQL cannot have; the others are counted
CLOCKS_DIFFER = 5.0  # seconds; as between two starts of a daemon, see `daemon.clock`
LOCKED_WITHIN = 10.0  # seconds that PostgreSQL's locks are waited for
CACHE_SIZE = -262_144  # KiB of SQLite's pages in memory while it is written; with its usual 8 MiB a million rows took 40 % more processor time
UNSURE = "unknown"  # a mark that no clock agrees with
BEFORE_ALL = "The target is as it was."
_HAS_TRANSACTION_TIMEOUT = 170_000  # the version of PostgreSQL
_MOST_INTEGER = 1 << 31  # PostgreSQL's `integer`

Row = tuple[Any, ...]
Tell = Callable[[str, int, int], object]
"""What is being done, and how many of how many rows are."""


class CannotCopy(Exception):
    """It cannot be done, and nothing of it was kept. Each of the problems is a sentence or two for the operator, with the remedy."""

    def __init__(self, *problems: str):
        super().__init__(" ".join(problems))
        self.problems = problems


class Clock(Protocol):
    """The clock of this machine, as the daemon has it: see `daemon.clock`."""

    def __call__(self) -> float: ...

    @property
    def mark(self) -> str:
        """What is kept beside the times of this clock."""

    def agrees_with(self, mark: str | None) -> bool:
        """Can times kept with this mark be compared with this clock's?"""


@dataclass(frozen=True, slots=True)
class Sqlite:
    """A SQLite database, which need not be there if it is the target."""

    path: Path


@dataclass(frozen=True, slots=True)
class Postgresql:
    """A PostgreSQL database. Without a password, libpq finds one (PGPASSWORD, ~/.pgpass) or does without."""

    url: str
    password: str | None = field(default=None, repr=False)
    remedy: str = "Check the user in the URL, and the password."  # for when the password is wrong


Place = Sqlite | Postgresql


@dataclass(frozen=True, slots=True)
class Report:
    """What was copied, or could be."""

    source: str
    target: str
    rows: Mapping[str, int]  # by table
    open: int  # delayed events that have not ended
    tokens: int  # … those that have a client's token, which only the same encryption keys open
    seconds: float
    notes: tuple[str, ...]  # what is worth knowing


# ── what is copied ──


class _Copied:
    """A table, the columns that its rows are told apart by, and what both databases are asked."""

    def __init__(self, table: Table, *key: str, only: Any = None) -> None:
        self.table = table
        self.name = table.name
        self.columns: list[Column[Any]] = list(table.columns)
        self.names = [column.name for column in self.columns]
        self.key = [self.names.index(name) for name in key]
        rows = select(*self.columns).order_by(*(table.columns[name] for name in key))
        self._rows: Select[Any] = rows if only is None else rows.where(only)
        self._count = select(func.count()).select_from(table)
        self._count = self._count if only is None else self._count.where(only)
        # Of each column: what Python makes of it, and PostgreSQL's type.
        self.types = [_types_of(column) for column in self.columns]

    def rows(self, dialect: Any) -> str:
        """The query for all rows in the order of the key, in which both databases have them: texts by their bytes."""
        return _text(self._rows, dialect)

    def count(self, dialect: Any) -> str:
        """The query for their number."""
        return _text(self._count, dialect)

    def key_of(self, row: Row) -> str:
        """Which row it is, for people. No key has anything secret in it."""
        return ", ".join(f"{self.names[at]} {json.dumps(row[at])}" for at in self.key)


def _types_of(column: Column[Any]) -> tuple[type, str]:
    if isinstance(column.type, BigInteger):
        return int, "int8"
    if isinstance(column.type, Integer):
        return int, "int4"
    if isinstance(column.type, Float):
        return float, "float8"
    if isinstance(column.type, LargeBinary):
        return bytes, "bytea"
    return str, "text"


_SQLITE: Final[Any] = sqlite_dialect(paramstyle="qmark")
_POSTGRESQL: Final[Any] = postgresql_dialect.dialect(paramstyle="format")  # type: ignore[no-untyped-call]


def _text(statement: Any, dialect: Any) -> str:
    return " ".join(str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True})).split())


_event = schema.delayed_event
_EVENTS = _Copied(_event, "id")
# A line of the history has no key: compared is which lines an event has, and how often.
_HISTORY = _Copied(schema.history, "event", "at", "what", "detail")
_PACE = _Copied(schema.pace, "homeserver", "address")
# What is learned of homeservers' limits, by the addresses that they see: on SQLite there is but one.
_PACE_OF_ONE = _Copied(schema.pace, "homeserver", "address", only=schema.pace.c.address == "")


def _copied(*, one_address: bool) -> list[_Copied]:
    """All tables, but those that say something about the database itself: `instance`, and `meta` with its clock and the versions of its schema.

    Of `meta`, which keys it was written with goes along."""
    learned = [_Copied(schema.room, "sfu", "name"), _Copied(schema.homeserver, "name"), _Copied(schema.sfu, "name")]
    admissions = _Copied(schema.admission, "sfu", "room", "identity")
    return [_EVENTS, *learned, _HISTORY, admissions, _PACE_OF_ONE if one_address else _PACE]


_KEYS_MARK: Final = f"SELECT value FROM meta WHERE key = '{schema.KEYS_MARK}'"  # noqa: S608
_TABLES: Final = [table.name for table in schema.metadata.sorted_tables]
_STATE, _TOKEN, _ID = (_EVENTS.names.index(name) for name in ("state", "token", "id"))


# ── both sides ──


@dataclass(slots=True)
class _Found:
    """What a look has shown, which changes nothing."""

    identity: tuple[Any, ...] = ()  # which database it is
    there: bool = True
    revision: str | None = None  # of the schema; None: it has no tables
    counts: dict[str, int] = field(default_factory=dict)  # of rows, by table
    in_use: str = ""  # by whom, in a sentence
    problems: list[str] = field(default_factory=list)


class _Side(Protocol):
    name: str  # for people

    def look(self, *, target: bool) -> _Found:
        """See what is there. From now on `rows` reads it, until it is opened."""

    def open(self) -> None:
        """Upgrade the schema, and let nobody else in."""

    def begin_reading(self) -> None: ...

    def begin_writing(self) -> None:
        """Begin the transaction, and empty what is to be copied: none of it belongs to a delayed event."""

    def count(self, copied: _Copied) -> int: ...

    def rows(self, copied: _Copied) -> Iterator[list[Row]]:
        """All rows in their order, up to BATCH at a time, and fewer only at the end."""

    def write(self, copied: _Copied, batches: Iterable[list[Row]]) -> None: ...

    def keys_mark(self) -> str | None:
        """Which encryption keys it was written with, see `Store.keys_mark`."""

    def finish(self, last_id: int, keys_mark: str | None, *, sure: bool) -> None:
        """What is written beside the rows. `sure`: their times can be compared with those of the target's clock."""

    def commit(self) -> None: ...

    def settle(self, *, sure: bool) -> None:
        """What is to be done once the copy is kept. Raises StoreUnavailable."""

    def time(self) -> float:
        """Unix seconds, by the clock that its times are of."""

    def sure(self) -> bool:
        """Are its times those of its clock?"""

    def close(self) -> None: ...


class _SqliteSide:
    def __init__(self, place: Sqlite, clock: Clock) -> None:
        self.name = f"the SQLite database {place.path}"
        self._path = place.path
        self._clock = clock
        self._store: SqliteStore | None = None
        self._connection: sqlite3.Connection | None = None

    def look(self, *, target: bool) -> _Found:
        found = _Found()
        try:
            status = self._path.stat()
        except FileNotFoundError:
            found.there, found.identity = False, (str(self._path.resolve()),)
            directory = self._path.absolute().parent
            if target and not (directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)):
                found.problems.append(f"The database {self._path} cannot be made: its directory must exist and be writable.")
            return found
        except OSError as error:
            found.problems.append(f"The database {self._path} cannot be opened: {error.strerror}. Check the path, and who may read it.")
            return found
        found.identity = (status.st_dev, status.st_ino)
        if not stat.S_ISREG(status.st_mode):
            found.problems.append(f"The database {self._path} is no file. Name a file; it need not be there yet if it is the target.")
            return found
        if _is_locked(self._path):
            found.in_use = f"{_capital(self.name)} is in use by another process."
        with self._explained():
            self._connection = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0, isolation_level=None)
            self._connection.execute("BEGIN")
            names = {str(name) for (name,) in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if VERSION_TABLE in names:
                found.revision = _first(self._connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone())  # noqa: S608
            elif names:
                found.problems.append(f"{_capital(self.name)} is not one of sfu-delegate's: it has tables of another program. Check the path.")
            found.counts = {copied.name: self.count(copied) for copied in _copied(one_address=False) if copied.name in names}
        return found

    def open(self) -> None:
        self._close_connection()
        new = not self._path.exists()
        self._store = SqliteStore(self._path)
        self._connection = self._store._connection
        if new:
            self._give_away()

    def _give_away(self) -> None:
        """What root has made belongs to whom the directory belongs to: the daemon, which must be able to open it."""
        if os.geteuid() != 0:
            return
        owner = self._path.absolute().parent.stat()
        for suffix in ("", "-wal", "-shm", ".lock"):
            with suppress(FileNotFoundError):
                os.chown(f"{self._path}{suffix}", owner.st_uid, owner.st_gid)

    def begin_reading(self) -> None:
        store = self._store
        assert store is not None  # noqa: S101 — for the type checker
        store.atomically(lambda _: store._add_rooms())  # the daemon does it at its start, but not where it comes to PostgreSQL
        self._run("BEGIN")

    def begin_writing(self) -> None:
        self._run(f"PRAGMA cache_size={CACHE_SIZE}")
        self._run("BEGIN IMMEDIATE")
        _refuse_if_there_are(self.count(_EVENTS), self.name)
        for copied in _copied(one_address=False):
            self._run(_text(copied.table.delete(), _SQLITE))

    def count(self, copied: _Copied) -> int:
        with self._explained():
            return int(_first(self._run(copied.count(_SQLITE)).fetchone()))

    def rows(self, copied: _Copied) -> Iterator[list[Row]]:
        with self._explained():
            cursor = self._run(copied.rows(_SQLITE))
            while batch := cursor.fetchmany(BATCH):
                yield batch

    def write(self, copied: _Copied, batches: Iterable[list[Row]]) -> None:
        statement, _, _ = compiled(insert(copied.table), _SQLITE)
        with self._explained():
            for batch in batches:
                assert self._connection is not None  # noqa: S101
                self._connection.executemany(statement, batch)

    def keys_mark(self) -> str | None:
        found = self._run(_KEYS_MARK).fetchone()
        return None if found is None else str(found[0])

    def finish(self, last_id: int, keys_mark: str | None, *, sure: bool) -> None:
        del last_id  # the next id follows the largest one that is there
        assert self._store is not None  # noqa: S101
        marks = {"clock": self._clock.mark if sure else UNSURE} | ({} if keys_mark is None else {schema.KEYS_MARK: keys_mark})
        for key, value in marks.items():
            new = upsert(schema.meta).values(key=key, value=value)
            with self._explained():
                self._store.execute(new.on_conflict_do_update(index_elements=["key"], set_={"value": new.excluded.value}))

    def commit(self) -> None:
        self._run("COMMIT")

    def settle(self, *, sure: bool) -> None:
        del sure  # the mark tells the daemon
        assert self._store is not None  # noqa: S101
        self._store.checkpoint()

    def time(self) -> float:
        return self._clock()

    def sure(self) -> bool:
        return self._clock.agrees_with(None if self._store is None else self._store.clock_mark())

    def _run(self, statement: str) -> sqlite3.Cursor:
        assert self._connection is not None  # noqa: S101
        with self._explained():
            return self._connection.execute(statement)

    def close(self) -> None:
        if self._store is not None:
            if self._store._connection.in_transaction:
                with suppress(sqlite3.Error):
                    self._store._connection.execute("ROLLBACK")
            self._store.close()
            self._store = self._connection = None
        self._close_connection()

    def _close_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise CannotCopy(f"{_capital(self.name)} failed: {_sqlite_sentence(error)} {BEFORE_ALL}") from None


def _sqlite_sentence(error: sqlite3.Error) -> str:
    """What is wrong, and what to do, without values."""
    said = str(error)
    if undecodable := re.match(r"Could not decode to UTF-8 column '(\w+)'", said):  # the rest is what is in it
        return f"something in the column {undecodable[1]} is no text. Find it, and mend or delete the row."
    if isinstance(error, sqlite3.IntegrityError | sqlite3.DataError | sqlite3.InterfaceError | sqlite3.ProgrammingError):
        return f"it does not take a value ({said if 'constraint' in said else type(error).__name__})."
    name = "_".join((getattr(error, "sqlite_errorname", None) or "").split("_")[:2])
    remedy = {
        "SQLITE_FULL": "The disk is full: free some space, and copy again.",
        "SQLITE_BUSY": "Another process holds it: let go of it, and copy again.",
        "SQLITE_READONLY": "It is read-only: check the owner and the file system.",
        "SQLITE_CORRUPT": "It is damaged: restore the last backup.",
        "SQLITE_NOTADB": "It is no SQLite database: check the path.",
        "SQLITE_CANTOPEN": "Its directory must exist and be writable.",
    }.get(name, "Copy again when that is mended.")
    return f"{said}. {remedy}"


def _is_locked(path: Path) -> bool:
    """Does a process have the lock of this database? Not told where the lock file cannot be read."""
    try:
        with open(f"{path}.lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class _Upgraded(PostgresStore):
    """The store, whose schema is upgraded when that is asked for, and not before the database has been looked at."""

    def _upgrade(self) -> None:
        pass

    def upgrade(self) -> None:
        super()._upgrade()


class _PostgresSide:
    def __init__(self, place: Postgresql) -> None:
        self._store = _Upgraded(place.url, password=place.password, instance="copy-database")
        self._remedy = place.remedy
        self.name = f"the PostgreSQL database {self._store.name}"
        self._connection: psycopg.Connection[Any] | None = None

    def _connect(self) -> psycopg.Connection[Any]:
        self._close_connection()
        self._connection = self._store._connect_to_upgrade()  # nothing of it is interrupted
        self._connection.execute(f"SET lock_timeout = '{LOCKED_WITHIN}s'")
        if self._connection.info.server_version >= _HAS_TRANSACTION_TIMEOUT:
            self._connection.execute("SET transaction_timeout = 0")
        self._connection.commit()
        return self._connection

    def look(self, *, target: bool) -> _Found:
        found = _Found()
        with self._explained():
            connection = self._connect()
            connection.isolation_level, connection.read_only = IsolationLevel.REPEATABLE_READ, True
            found.identity = self._one("SELECT oid::bigint, pg_postmaster_start_time()::text FROM pg_database WHERE datname = current_database()")
            if self._one("SELECT pg_is_in_recovery()")[0]:
                found.problems.append(f"{_capital(self.name)} is on a standby, which cannot be locked or written. Name the primary.")
            names = self._tables()
            if VERSION_TABLE in names:
                (found.revision,) = self._one(f"SELECT (SELECT version_num FROM {VERSION_TABLE})")  # noqa: S608
            elif names:
                listed = ", ".join(sorted(names))
                found.problems.append(f"{_capital(self.name)} has tables of another program ({listed}). Make a database of its own: `createdb`.")
            elif target and not self._one("SELECT coalesce(has_schema_privilege(current_schema(), 'CREATE'), false)")[0]:
                remedy = "Make the user the owner of the database, or grant it CREATE on the schema public."
                found.problems.append(f"In {self.name} the user may not make tables. {remedy}")
            found.counts = {copied.name: self.count(copied) for copied in _copied(one_address=False) if copied.name in names}
            if "instance" in names:
                found.in_use = self._alive()
        return found

    def _tables(self) -> set[str]:
        statement = "SELECT relname FROM pg_class WHERE relname = ANY(%s) AND relkind IN ('r', 'p') AND pg_table_is_visible(oid)"
        return {name for (name,) in self._run(statement, ([*_TABLES, VERSION_TABLE],)).fetchall()}

    def _alive(self) -> str:
        """Which instances are alive, in a sentence. One whose sign of life is of the future is none: the clock was set back, and it says no more."""
        now = "extract(epoch FROM clock_timestamp())::float8"
        statement = f"SELECT name, {now} - alive_at FROM instance WHERE abs({now} - alive_at) < %s ORDER BY name"  # noqa: S608
        alive = [f"{name} ({max(0.0, ago):.0f} s ago)" for name, ago in self._run(statement, (DEAD_AFTER,)).fetchall()]
        return f"{_capital(self.name)} is in use: of these instances something was heard: {', '.join(alive)}." if alive else ""

    def open(self) -> None:
        self._close_connection()
        self._store.upgrade()
        with self._explained():
            self._connect()

    def begin_reading(self) -> None:
        assert self._connection is not None  # noqa: S101
        self._connection.isolation_level = IsolationLevel.REPEATABLE_READ  # its snapshot is taken once the locks are there
        self._lock("SHARE")

    def begin_writing(self) -> None:
        self._lock("ACCESS EXCLUSIVE")
        _refuse_if_there_are(self.count(_EVENTS), self.name)
        self._run(f"TRUNCATE {', '.join(copied.name for copied in _copied(one_address=False))}")

    def _lock(self, mode: str) -> None:
        self._run(f"LOCK TABLE {', '.join(_TABLES)} IN {mode} MODE")
        if alive := self._alive():
            raise CannotCopy(f"{alive} {STOP_FIRST}")

    def count(self, copied: _Copied) -> int:
        return int(self._one(copied.count(_POSTGRESQL))[0])

    def rows(self, copied: _Copied) -> Iterator[list[Row]]:
        assert self._connection is not None  # noqa: S101
        with self._explained(), self._connection.cursor(name="rows") as cursor:
            cursor.execute(copied.rows(_POSTGRESQL), binary=True)
            while batch := cursor.fetchmany(BATCH):
                yield batch

    def write(self, copied: _Copied, batches: Iterable[list[Row]]) -> None:
        assert self._connection is not None  # noqa: S101
        names = ", ".join(map(_POSTGRESQL.identifier_preparer.quote, copied.names))
        # Rows that are frozen at once need not be written again later; TRUNCATE allows it.
        statement = f"COPY {copied.name} ({names}) FROM STDIN (FORMAT binary, FREEZE)"
        with self._explained(), self._connection.cursor() as cursor, cursor.copy(statement) as copy:
            copy.set_types([kind for _, kind in copied.types])
            for batch in batches:
                for row in batch:
                    copy.write_row(row)

    def keys_mark(self) -> str | None:
        found = self._run(_KEYS_MARK).fetchone()
        return None if found is None else str(found[0])

    def finish(self, last_id: int, keys_mark: str | None, *, sure: bool) -> None:
        del sure  # see `settle`
        if keys_mark is not None:
            new = "INSERT INTO meta (key, value) VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
            self._run(new, (schema.KEYS_MARK, keys_mark))
        last, called = self._one(f"SELECT last_value, is_called FROM {schema.event_ids.name}")  # noqa: S608
        begin = max(last_id + 1, last + schema.ID_BLOCK if called else last)
        # Not setval, of which nothing is taken back when the transaction is.
        self._run(f"ALTER SEQUENCE {schema.event_ids.name} RESTART WITH {begin:d}")
        # Or the first plans would be made without knowing how much there is.
        self._run(f"ANALYZE {', '.join(copied.name for copied in _copied(one_address=False))}")

    def commit(self) -> None:
        assert self._connection is not None  # noqa: S101
        try:
            self._connection.commit()
        except psycopg.OperationalError as error:
            raise CannotCopy(
                f"{_capital(self.name)} was lost at the very end ({_problem(error)}), so whether the copy was kept is not known. Copy again: if that "
                "is refused because the target has delayed events, it was, and is complete."
            ) from None
        self._close_connection()

    def settle(self, *, sure: bool) -> None:
        if not sure:
            self._store.times_are_unknown(self._store.time(), Policy())

    def time(self) -> float:
        return float(self._one("SELECT extract(epoch FROM clock_timestamp())::float8")[0])

    def sure(self) -> bool:
        """Not if somebody was alive in the future."""
        (newest,) = self._one("SELECT max(alive_at) FROM instance")
        return newest is None or newest <= self.time() + CLOCKS_DIFFER

    def _run(self, statement: str, parameters: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        assert self._connection is not None  # noqa: S101
        with self._explained():
            return self._connection.execute(statement, parameters or None)

    def _one(self, statement: str) -> Row:
        return tuple(self._run(statement).fetchone() or ())

    def close(self) -> None:
        self._close_connection()
        self._store.close()

    def _close_connection(self) -> None:
        """What was not committed is taken back."""
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
            self._connection = None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            raise CannotCopy(f"{_capital(self.name)} failed: {_problem(error)}. {self._remedy_of(error)} {BEFORE_ALL}") from None

    def _remedy_of(self, error: psycopg.Error) -> str:
        problem = str(error)
        if isinstance(error, errors.InsufficientPrivilege):
            return "Make the user the owner of the database, or grant it CREATE on the schema public; what tables there are must be its own."
        if isinstance(error, errors.InvalidPassword | errors.InvalidAuthorizationSpecification) or "password" in problem:
            return self._remedy
        if isinstance(error, errors.InvalidCatalogName) or "does not exist" in problem:
            return "Check the URL; `createdb` makes a database."
        if isinstance(error, errors.DiskFull):
            return "The disk of the database is full: free some space, and copy again."
        if isinstance(error, errors.ReadOnlySqlTransaction) or "read-only" in problem or "not accepting" in problem:
            return "A standby will not do: name the primary."
        if isinstance(error, errors.LockNotAvailable):
            return "Somebody is at work in it: stop what is, and copy again."
        return "Copy again when that is mended."


def _problem(error: psycopg.Error) -> str:
    """What PostgreSQL said, without values, in one line and without a stop at the end."""
    if isinstance(error, psycopg.DataError) and error.diag.message_primary is None:
        return f"it does not take a value ({type(error).__name__})"  # the driver's own words, which quote it
    return (error.diag.message_primary or " ".join(str(error).split())).rstrip(".")


# ── the work ──

STOP_FIRST: Final = "Stop every daemon that works with it first; one that was killed counts as alive for 10 s."


def copy(source: Place, target: Place, clock: Clock, *, dry_run: bool = False, tell: Tell = lambda *_: None) -> Report:
    """Copy everything from one database to the other, and compare them. `clock` is this machine's. Raises CannotCopy: then nothing was kept.

    With `dry_run`, only look whether it can be done, which changes nothing, and disturbs no daemon that is at work.
    """
    begun = perf_counter()
    with ExitStack() as closing:
        ours, theirs = _side(source, clock), _side(target, clock)
        closing.callback(ours.close)
        closing.callback(theirs.close)
        try:
            found = ours.look(target=False), theirs.look(target=True)
            problems, to_stop = _problems(ours, theirs, *found)
            if problems or (to_stop and not dry_run):
                raise CannotCopy(*problems, *(f"{sentence} {STOP_FIRST}" for sentence in to_stop))
            tables = _copied(one_address=isinstance(target, Sqlite))
            check = _Checked() if isinstance(source, Sqlite) and isinstance(target, Postgresql) else None
            if dry_run:
                return _tried(ours, theirs, found, tables, check, begun, tell)
            theirs.open()
            ours.open()
            return _copy(ours, theirs, tables, check, begun, tell)
        except (StoreUnavailable, DatabaseInUse, DatabaseTooNew) as error:
            raise CannotCopy(str(error)) from None


def _side(place: Place, clock: Clock) -> _Side:
    return _SqliteSide(place, clock) if isinstance(place, Sqlite) else _PostgresSide(place)


def _problems(ours: _Side, theirs: _Side, source: _Found, target: _Found) -> tuple[list[str], list[str]]:
    """Why it cannot be done, and who is to be stopped before."""
    problems = [*source.problems, *target.problems]
    if not problems and source.identity == target.identity:
        problems.append(f"Source and target are the same: {ours.name}.")
        return problems, []
    known, _ = _revisions()
    for side, found in ((ours, source), (theirs, target)):
        if found.revision is not None and found.revision not in known:
            problems.append(
                f"{_capital(side.name)} has schema version {found.revision}, which this version of sfu-delegate does not know: it was written by a "
                "newer one. Copy with that version."
            )
    if source.revision is None and not source.problems:
        what = "has no tables of sfu-delegate" if source.there else "does not exist"
        problems.append(f"{_capital(ours.name)} {what}. Check what is to be copied.")
    if count := target.counts.get(_EVENTS.name):
        problems.append(_not_empty(theirs.name, count))
    return problems, [found.in_use for found in (source, target) if found.in_use]


@cache
def _revisions() -> tuple[frozenset[str], str]:
    """The schema versions that this program knows, and its own."""
    script = ScriptDirectory.from_config(alembic_config())
    return frozenset(migration.revision for migration in script.walk_revisions()), str(script.get_current_head())


def _not_empty(name: str, count: int) -> str:
    return (
        f"{_capital(name)} has {count} delayed events already, finished ones included. Name an empty database; or, if nothing in this one is needed "
        "any more, remove it and make it anew."
    )


def _refuse_if_there_are(count: int, name: str) -> None:
    if count:
        raise CannotCopy(_not_empty(name, count))


def _copy(ours: _Side, theirs: _Side, tables: Sequence[_Copied], check: "_Checked | None", begun: float, tell: Tell) -> Report:
    ours.begin_reading()
    theirs.begin_writing()
    sure = ours.sure() and abs(ours.time() - theirs.time()) <= CLOCKS_DIFFER
    counts = {copied.name: ours.count(copied) for copied in tables}
    seen = _Seen()
    for copied in tables:
        batches: Iterable[list[Row]] = _told(ours.rows(copied), f"copying {copied.name}", counts[copied.name], tell)
        if check is not None:
            batches = check.passing(copied, batches)
        theirs.write(copied, seen.passing(copied, batches))
    if check is not None:
        check.conclude()
    theirs.finish(seen.last_id, ours.keys_mark(), sure=sure)
    for copied in tables:
        ours_again = _told(ours.rows(copied), f"comparing {copied.name}", counts[copied.name], tell)
        if difference := _difference(copied, ours_again, theirs.rows(copied)):
            raise CannotCopy(
                f"The copy differs from the source: {difference}. It was not kept. {BEFORE_ALL} Copy again; if it happens again, report it."
            )
    left_out = ours.count(_PACE) - counts[_PACE.name]
    theirs.commit()
    notes = [] if sure else [UNSURE_NOTE]
    try:
        theirs.settle(sure=sure)
    except StoreUnavailable as error:
        notes = [f"The copy was kept, and is complete; but not everything could be done after that: {error}"]
    if left_out:
        notes.append(
            f"What was learned of homeservers' rate limits behind other addresses ({left_out} rows of pace) was left out, and is learned again."
        )
    return Report(ours.name, theirs.name, counts, seen.open, seen.tokens, perf_counter() - begun, tuple(notes))


UNSURE_NOTE: Final = (
    "The clock that the source's times were kept by was set since, or is not the target's: all countdowns count as unknown, and the daemon restarts "
    "all delayed events soon."
)


def _tried(
    ours: _Side,
    theirs: _Side,
    found: tuple[_Found, _Found],
    tables: Sequence[_Copied],
    check: "_Checked | None",
    begun: float,
    tell: Tell,
) -> Report:
    source, target = found
    _, head = _revisions()
    notes = [f"{sentence} {STOP_FIRST}" for sentence in (source.in_use, target.in_use) if sentence]
    for side, found_there in ((ours, source), (theirs, target)):
        if found_there.revision not in (None, head):
            unseen = "; until then its rows cannot be looked at" if side is ours else ""
            notes.append(f"{_capital(side.name)} has schema version {found_there.revision}: it will be upgraded to {head} first{unseen}.")
    if target.revision is None:
        notes.append(f"{_capital(theirs.name)} has no tables yet: they will be made.")
    counts = {copied.name: source.counts.get(copied.name, 0) for copied in tables}
    seen = _Seen()
    if source.revision == head:
        for copied in tables:
            if copied is not _EVENTS and check is None:
                continue
            batches: Iterable[list[Row]] = _told(ours.rows(copied), f"checking {copied.name}", counts[copied.name], tell)
            if check is not None:
                batches = check.passing(copied, batches)
            for _ in seen.passing(copied, batches):
                pass
        if check is not None:
            check.conclude()
    return Report(ours.name, theirs.name, counts, seen.open, seen.tokens, perf_counter() - begun, tuple(notes))


def _told(batches: Iterable[list[Row]], what: str, total: int, tell: Tell) -> Iterator[list[Row]]:
    done = 0
    tell(what, 0, total)
    for batch in batches:
        yield batch
        done += len(batch)
        tell(what, done, total)


class _Seen:
    """What passes by on the way to the target."""

    def __init__(self) -> None:
        self.open = self.tokens = self.last_id = 0

    def passing(self, copied: _Copied, batches: Iterable[list[Row]]) -> Iterator[list[Row]]:
        """The same batches."""
        for batch in batches:
            if copied is _EVENTS:
                self.open += sum(row[_STATE] != State.DONE.value for row in batch)
                self.tokens += sum(row[_TOKEN] is not None for row in batch)
                self.last_id = max(self.last_id, batch[-1][_ID])
            elif copied is _HISTORY:
                self.last_id = max(self.last_id, batch[-1][0])
            yield batch


class _Checked:
    """Finds what SQLite can have and PostgreSQL cannot, so that it is told of all such rows, and of none of their values."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._count = 0

    def passing(self, copied: _Copied, batches: Iterable[list[Row]]) -> Iterator[list[Row]]:
        """The batches, up to the first one with something wrong; from then on the rest is only looked at."""
        for batch in batches:
            suspicious = [at for at, column in enumerate(zip(*batch, strict=True)) if not _fits(column, *copied.types[at])]
            for row in batch if suspicious else ():
                wrong = [copied.names[at] for at in suspicious if not _fits((row[at],), *copied.types[at])]
                if wrong:
                    self._count += 1
                    if self._count <= NAMED:
                        self._found.append(f"{copied.name}, {copied.key_of(row)}: {', '.join(wrong)}")
            if not self._count:
                yield batch

    def conclude(self) -> None:
        """Raises CannotCopy if there was anything."""
        if not self._count:
            return
        more = f"; and {self._count - NAMED} more" if self._count > NAMED else ""
        raise CannotCopy(
            f"PostgreSQL cannot have what is in these rows of the source (a NUL character in a text, mostly): {'; '.join(self._found)}{more}. "
            f"Delete these rows while no daemon is at work, and copy again. {BEFORE_ALL}"
        )


def _fits(values: Sequence[Any], kind: type, name: str) -> bool:
    """Can PostgreSQL have these values of one column? Whether they may be NULL it finds out by itself."""
    kinds = set(map(type, values))
    if not kinds <= {kind, type(None)}:
        return False
    if kind is str:
        return "\0" not in "".join(filter(None, values))
    if name != "int4":
        return True
    numbers = [value for value in values if value is not None]
    return not numbers or -_MOST_INTEGER <= min(numbers) <= max(numbers) < _MOST_INTEGER


# ── comparing ──

_HARMLESS: Final = frozenset(("delayed_event", name) for name in ("on_end", "presence", "reason", "state", "outcome"))
"""Columns of texts whose values are told: words of our own, or LiveKit's. Numbers are told as well."""


def _difference(copied: _Copied, ours: Iterable[list[Row]], theirs: Iterable[list[Row]]) -> str:
    """The first difference between two sequences of rows, each in the order of the key; "" if there is none."""
    others = iter(theirs)
    for batch in ours:
        other = next(others, [])
        if batch != other:  # the two are cut at the same places
            for row, copy in zip(batch, other, strict=False):
                if found := _different(copied, row, copy):
                    return found
            if len(batch) > len(other):
                return f"in the table {copied.name} the row with {copied.key_of(batch[len(other)])} is missing"
            if len(other) > len(batch):
                return f"in the table {copied.name} the row with {copied.key_of(other[len(batch)])} is there once too often"
    if surplus := next(others, []):
        return f"in the table {copied.name} the row with {copied.key_of(surplus[0])} is there once too often"
    return ""


def _different(copied: _Copied, row: Row, copy: Row) -> str:
    differing = [at for at, (value, other) in enumerate(zip(row, copy, strict=True)) if not _same(value, other)]
    if not differing:
        return ""
    if any(at in copied.key for at in differing):
        key, other = copied.key_of(row), copied.key_of(copy)
        return f"in the table {copied.name} there is a row with {other} where there is one with {key} in the source"
    told = [copied.names[at] + _values(copied, at, row, copy) for at in differing]
    return f"in the table {copied.name}, in the row with {copied.key_of(row)}, {', '.join(told)}"


def _values(copied: _Copied, at: int, row: Row, copy: Row) -> str:
    kind, _ = copied.types[at]
    if kind in (int, float) or (copied.name, copied.names[at]) in _HARMLESS:
        return (
            f" ({row[at]!r} in the source, {copy[at]!r} in the copy)"
            if all(type(value) in (kind, type(None)) for value in (row[at], copy[at]))
            else ""
        )
    return ""


def _same(value: Any, other: Any) -> bool:
    """Bit for bit; but a negative zero is a zero, since SQLite has no other."""
    if type(value) is float and type(other) is float and value != value:  # noqa: PLR0124 — not a number
        return struct.pack("d", value) == struct.pack("d", other)
    return type(value) is type(other) and bool(value == other)


def _first(row: Sequence[Any] | None) -> Any:
    return None if row is None else row[0]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
