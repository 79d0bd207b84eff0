"""A PostgreSQL for measuring, durable and on loopback, and what it uses: processor time by who used it, WAL, fsyncs, updates and vacuums.

All is read from outside the daemon: from /proc, and by a connection of the superuser, which is not counted.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import perf_counter
from typing import Any, LiteralString

import psycopg
from tests.postgresql import Server, name_in
from tests.stores import migrated

from benchmarks.machine import _TICKS, cpu_of

SETTINGS: Mapping[str, str] = {"shared_buffers": "1GB", "max_wal_size": "4GB"}
"""Beside the defaults: what `docs/scaling.md` recommends for a database of this size."""

TABLES = ("delayed_event", "room", "history")
OURS = "sfu-delegate"  # how the names of the daemon's connections begin

_LIVING = "SELECT pid, application_name FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
_WAL = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8, wal_fpi FROM pg_stat_wal"
_FSYNCS = "SELECT coalesce(sum(fsyncs), 0)::float8 FROM pg_stat_io WHERE object = 'wal'"
_CHECKPOINTS = "SELECT num_done FROM pg_stat_checkpointer"
_TABLES = (
    "SELECT relname, n_tup_ins, n_tup_upd, n_tup_hot_upd, n_tup_del, vacuum_count + autovacuum_count, "
    "total_vacuum_time + total_autovacuum_time FROM pg_stat_user_tables WHERE relname = ANY(%s)"
)
_SIZES = "SELECT relname, pg_relation_size(oid) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'i')"


@dataclass(slots=True)
class Written:
    """What happened to the rows of one table."""

    inserted: float = 0.0
    updated: float = 0.0
    hot: float = 0.0  # … of the updates, those that left all indexes as they are
    deleted: float = 0.0
    vacuums: float = 0.0
    vacuum_ms: float = 0.0


@dataclass(slots=True)
class Used:
    """What PostgreSQL has used so far, or in a span. Times are seconds of processor time."""

    at: float = 0.0
    backends: float = 0.0  # of the daemon's connections
    rest: float = 0.0  # checkpointer, WAL writer, autovacuum, I/O workers, …
    wal: float = 0.0  # bytes
    full_pages: float = 0.0  # of these, pages that were written whole, since they changed for the first time after a checkpoint
    fsyncs: float = 0.0  # of the WAL
    checkpoints: float = 0.0
    tables: dict[str, Written] = field(default_factory=dict)

    @property
    def cpu(self) -> float:
        """All of it."""
        return self.backends + self.rest

    def since(self, before: "Used") -> "Used":
        """The span from `before` to this."""
        tables = {name: _difference(written, before.tables.get(name, Written())) for name, written in self.tables.items()}
        numbers = {name: getattr(self, name) - getattr(before, name) for name in (f.name for f in fields(self)) if name != "tables"}
        return Used(**numbers, tables=tables)


def _difference(now: Written, then: Written) -> Written:
    return Written(*(getattr(now, f.name) - getattr(then, f.name) for f in fields(now)))


class Database:
    """One database of the server, and a connection of the superuser to it."""

    def __init__(self, server: Server, url: str) -> None:
        self.url = url
        self._name = name_in(url)
        self._admin = server.admin(self._name)
        self._postmaster = _postmaster(server)

    def close(self) -> None:
        """Close the connection."""
        self._admin.close()

    def ask(self, statement: LiteralString, *parameters: Any, **named: Any) -> list[Any]:
        """What a statement of the superuser returns; its parameters are in order, or have names."""
        cursor = self._admin.execute(statement, parameters or named or None)
        return cursor.fetchall() if cursor.description else []

    def used(self) -> Used:
        """What has been used so far. Backends tell of fsyncs and rows at the end of a transaction, once a second at the most."""
        at = perf_counter()
        names: dict[int, str] = dict(self.ask(_LIVING))
        me = self._admin.info.backend_pid
        backends = rest = 0.0
        for pid in [self._postmaster, *_children(self._postmaster)]:
            if pid == me:
                continue
            try:
                used = cpu_of(pid)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended meanwhile, and is counted there from now on
            if names.get(pid, "").startswith(OURS):
                backends += used
            else:
                rest += used
        ((wal, full_pages),) = self.ask(_WAL)
        ((fsyncs,),) = self.ask(_FSYNCS)
        ((checkpoints,),) = self.ask(_CHECKPOINTS)
        tables = {name: Written(*map(float, values)) for name, *values in self.ask(_TABLES, list(TABLES))}
        return Used(at, backends, rest + _ended(self._postmaster), wal, float(full_pages), fsyncs, float(checkpoints), tables)

    def checkpoint(self) -> None:
        """Write all that is new to the disk; from now on, each page that changes is written to the WAL as a whole, once."""
        self.ask("CHECKPOINT")

    def vacuum(self, *tables: str) -> float:
        """VACUUM of some tables, or all; the seconds of processor time that it took."""
        return self._took(f"VACUUM (PARALLEL 0) {', '.join(tables)}")

    def analyze(self, *tables: str) -> float:
        """ANALYZE of some tables, or all; the same."""
        return self._took(f"ANALYZE {', '.join(tables)}")

    def _took(self, statement: str) -> float:
        me = self._admin.info.backend_pid
        before = cpu_of(me)
        self.change(statement)
        return cpu_of(me) - before

    def change(self, statement: str) -> None:
        """Run a statement that is put together here."""
        self._admin.execute(statement)

    def sizes(self) -> dict[str, int]:
        """Bytes of each table and index."""
        return dict(self.ask(_SIZES))

    @contextmanager
    def reader(self) -> Iterator[None]:
        """Somebody reads meanwhile in one transaction, as `pg_dump` does: what is deleted has to stay for them."""
        with psycopg.connect(self._admin.info.dsn, autocommit=True) as connection:
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            connection.execute("SELECT 1 FROM delayed_event LIMIT 1")
            yield
            connection.execute("ROLLBACK")


def _postmaster(server: Server) -> int:
    return int((server.directory / "data" / "postmaster.pid").read_text(encoding="ascii").split("\n", 1)[0])


def cpu_of_server(server: Server) -> float:
    """Seconds of processor time of all its processes, those that have ended included."""
    first = _postmaster(server)
    used = _ended(first)
    for pid in [first, *_children(first)]:
        with suppress(FileNotFoundError, ProcessLookupError):
            used += cpu_of(pid)
    return used


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def _ended(pid: int) -> float:
    """Seconds of processor time of the children of a process that have ended."""
    values = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(values[13]) + int(values[14])) / _TICKS


@contextmanager
def new_database(server: Server) -> Iterator[Database]:
    """A database with the tables of this version and no rows, which is removed afterwards."""
    with server.database(migrated) as url:
        database = Database(server, url)
        try:
            yield database
        finally:
            database.close()
