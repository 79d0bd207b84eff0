"""A database is copied as it is, or not at all: between both kinds, whatever is in it, and whatever happens meanwhile. No secret is told."""

import itertools
import json
import math
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any, LiteralString

import psycopg
import pytest
from alembic import command
from psycopg import sql
from sfu_delegate.cli import app
from sfu_delegate.daemon.clock import Clock as RealClock
from sfu_delegate.delegation.model import Action, Answered, DelayedEvent, State, Task, Verdict
from sfu_delegate.delegation.replies import Accepted, Touched
from sfu_delegate.engine import Engine, Limits
from sfu_delegate.store import copying, schema
from sfu_delegate.store.base import Store
from sfu_delegate.store.copying import CannotCopy, Place, Postgresql, Report, Sqlite
from sfu_delegate.store.migrate import alembic_config
from sfu_delegate.store.postgresql import PostgresStore
from sfu_delegate.store.rows import FIELDS, values_of
from sfu_delegate.store.sqlite import SqliteStore
from sqlalchemy import create_engine
from typer.testing import CliRunner, Result

from tests import postgresql
from tests.rows import ALICE, NOW, POLICY, accept, joined, left, row
from tests.stores import insert, stored

ROOT = Path(__file__).parents[2]
DELAY_ID = "syd_SecretDelayId"
TOKEN = b"gAAAA-secret-token"
SECRETS = (DELAY_ID, TOKEN.decode(), "hunter2")
COPIED = ("delayed_event", "room", "homeserver", "sfu", "history", "admission", "pace")
DIRECTIONS = [("sqlite", "postgresql"), ("postgresql", "sqlite"), ("postgresql", "postgresql"), ("sqlite", "sqlite")]


class Clock:
    """A clock that agrees with the marks that it is told to."""

    def __init__(self, mark: str = "here", now: float | None = None) -> None:
        self.mark = mark
        self._now = now

    def __call__(self) -> float:
        return time.time() if self._now is None else self._now

    def agrees_with(self, mark: str | None) -> bool:
        return mark in (None, self.mark)


# ── places ──


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Makes places for databases, of which there is nothing yet: a file that is not there, or a database without tables."""
    server, urls, numbers = postgresql.shared(), list[str](), itertools.count()

    def new(kind: str) -> str:
        if kind == "sqlite":
            return f"sqlite:///{tmp_path}/{next(numbers)}.db"
        urls.append(server.create_database())
        return urls[-1]

    yield new
    for url in urls:
        server.drop_database(url)


def path_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def place_of(url: str) -> Place:
    return Sqlite(path_of(url)) if url.startswith("sqlite") else Postgresql(url)


def copy(source: str, target: str, *, dry_run: bool = False, clock: Clock | None = None, tell: copying.Tell = lambda *_: None) -> Report:
    return copying.copy(place_of(source), place_of(target), clock or Clock(), dry_run=dry_run, tell=tell)


def refused(source: str, target: str, **options: Any) -> str:
    """Why it was not copied; no secret is in it."""
    with pytest.raises(CannotCopy) as caught:
        copy(source, target, **options)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]
    return str(caught.value)


def opened(url: str) -> SqliteStore | PostgresStore:
    return SqliteStore(path_of(url)) if url.startswith("sqlite") else PostgresStore(url)


def migrate(url: str) -> None:
    opened(url).close()


def query(url: str, statement: LiteralString) -> list[Any]:
    if not url.startswith("sqlite"):
        return postgresql.shared().query(url, statement)
    with closing(sqlite3.connect(path_of(url), isolation_level=None)) as database:
        return database.execute(statement).fetchall()


def run(url: str, statement: LiteralString, *parameters: Any) -> None:
    """Change something, as the owner of the database."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(path_of(url), isolation_level=None)) as database:
            database.execute(statement, parameters)
    else:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(sql.SQL(statement), parameters or None)


def put(url: str, table: str, rows: list[tuple[Any, ...]]) -> None:
    """Write rows, past the program."""
    columns = ", ".join(f'"{column.name}"' for column in schema.metadata.tables[table].columns)
    marks = ", ".join(["?" if url.startswith("sqlite") else "%s"] * len(rows[0]))
    statement = f"INSERT INTO {table} ({columns}) VALUES ({marks})"
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(path_of(url))) as database:
            database.executemany(statement, rows)
            database.commit()
    else:
        with psycopg.connect(url) as connection:
            connection.cursor().executemany(statement, rows)


def contents(url: str) -> dict[str, list[str]]:
    """All rows of all tables that are copied, with their types; `repr` tells floats apart bit for bit."""
    return {table: sorted(map(repr, query(url, f"SELECT * FROM {table}"))) for table in COPIED}


# ── what is in them ──


def events(count: int, **changes: Any) -> list[DelayedEvent]:
    """Rows of as many participants, ten in a room."""
    return [
        row(id=n, delegation=f"D{n}", room=f"room{n // 10}", identity=f"{ALICE}{n}", delay_id=f"{DELAY_ID}{n}")._replace(**changes)
        for n in range(1, count + 1)
    ]


def fill(url: str, rows: list[DelayedEvent]) -> None:
    """Rows with two lines of history each, one of them twice, and their rooms; and something learned."""
    store = opened(url)
    for first in range(0, len(rows), 1000):  # a transaction in which nothing happens for some seconds is ended, and machines are slow
        insert(store, rows[first : first + 1000])
    store.close()
    notes = [(there.id, NOW + at, what, "") for there in rows for at, what in ((0.1, "delegated"), (0.2, "verified"), (0.2, "verified"))]
    put(url, "history", notes)
    rooms = sorted({(there.sfu, there.room) for there in rows})
    put(url, "room", [(*key, "RM1", "EV1", NOW, 0, 0.0, NOW - 1, None, NOW + 60, 1, 0, 3, 0) for key in rooms])
    put(url, "homeserver", [("hs.test", "some", 1.25, 5.0)])
    put(url, "sfu", [("main", None, NOW, NOW - 1.5, None)])
    put(url, "pace", [("hs.test", "", '{"limit": "some"}', 0.0)])


def filled(make: Callable[[str], str], kind: str, rows: list[DelayedEvent] | None = None) -> str:
    url = make(kind)
    migrate(url)
    fill(url, events(3, token=TOKEN) if rows is None else rows)
    return url


NUMBERS = [0.0, 0.1 + 0.2, 5e-324, sys.float_info.min, sys.float_info.max, math.nextafter(1.0, 2.0), math.inf, -math.inf, -1e-9, 1764427000.123456789]
TEXTS = ["", " ", "x\ty\r\n\\N\\.", "'\";--", "é e\u0301 \u202eabc\u202c", "👩‍👩‍👧 \U0010ffff \ufffe", "\x01\x7f\x80\xff", "NULL", "x" * 300_000]
BYTES = [b"", bytes(range(256)), b"\x00" * 1000]


def peculiar() -> dict[str, list[tuple[Any, ...]]]:
    """Rows with everything in them that their columns can have, by table."""
    made: dict[str, list[tuple[Any, ...]]] = {}
    for table in COPIED:
        rows = []
        for n in range(40):
            values: list[Any] = []
            for at, column in enumerate(schema.metadata.tables[table].columns):
                unique = column.name in ("id", "delay_id", "delegation") or column.primary_key
                value: Any
                kind = copying._types_of(column)
                if column.name in ("id", "event"):
                    value = (1 << 62) - 3 * n if n % 2 else n + 1
                elif unique:
                    value = f"{n} {TEXTS[(n + at) % len(TEXTS)][:1000]}"
                elif kind[0] is float:
                    value = NUMBERS[(n + at) % len(NUMBERS)]
                elif kind[0] is int:
                    value = [0, 1, -1, (1 << 31) - 1, -(1 << 31)][(n + at) % 5]
                elif kind[0] is bytes:
                    value = BYTES[n % len(BYTES)]
                else:
                    value = TEXTS[(n + at) % len(TEXTS)][: 1000 if column.index or (table == "delayed_event" and column.name != "sessions") else None]
                values.append(None if column.nullable and n % 3 == 0 else value)
            rows.append(tuple(values))
        made[table] = rows
    return made


# ── the copy ──


@pytest.mark.parametrize(("source", "target"), DIRECTIONS)
def test_everything_is_copied_exactly(make: Callable[[str], str], source: str, target: str) -> None:
    """Every table and every column, whatever is in it: NULLs, texts of all scripts, bytes, the largest and the smallest numbers."""
    ours, theirs = make(source), make(target)
    migrate(ours)
    for table, rows in peculiar().items():
        put(ours, table, [there if table != "pace" else (there[0], "", *there[2:]) for there in rows])
    before = contents(ours)
    assert [len(rows) for rows in before.values()] == [40] * len(COPIED)
    report = copy(ours, theirs)
    after = contents(theirs)
    assert after == contents(ours)
    assert dict(report.rows) == {table: len(rows) for table, rows in after.items()}
    # SQLite may lack rooms, which the daemon adds at its start, and PostgreSQL must not.
    assert set(before["room"]) <= set(after["room"])
    assert {**after, "room": []} == {**before, "room": []}


@pytest.mark.parametrize(("source", "target"), [DIRECTIONS[0], pytest.param(*DIRECTIONS[1], marks=pytest.mark.slow)])
def test_many_rows_are_copied_in_parts(make: Callable[[str], str], source: str, target: str) -> None:
    """Of 20,000 delegations nothing is missing, and what was done is told from 0 to the end of each table."""
    count = 20_000
    rows = [there._replace(state=State.DONE, token=None) if there.id % 4 == 0 else there for there in events(count, token=TOKEN)]
    ours, theirs = filled(make, source, rows), make(target)
    told: dict[str, list[tuple[int, int]]] = {}
    report = copy(ours, theirs, tell=lambda what, done, total: told.setdefault(what, []).append((done, total)))
    assert contents(theirs) == contents(ours)
    assert report.rows == {
        "delayed_event": count,
        "room": count // 10 + 1,
        "homeserver": 1,
        "sfu": 1,
        "history": 3 * count,
        "admission": 0,
        "pace": 1,
    }
    assert (report.open, report.tokens) == (count * 3 // 4, count * 3 // 4)
    for what in ("copying", "comparing"):
        for table, rows_there in report.rows.items():
            steps = told[f"{what} {table}"]
            assert (steps[0], steps[-1]) == ((0, rows_there), (rows_there, rows_there))
    assert len(told["copying delayed_event"]) == 1 + count // copying.BATCH


@pytest.mark.parametrize("source", ["sqlite", "postgresql"])
@pytest.mark.parametrize("target", ["sqlite", "postgresql"])
def test_which_keys_it_was_written_with_goes_along(make: Callable[[str], str], source: str, target: str) -> None:
    """A daemon that starts with others says so; where it is not known, it is not known there either."""
    ours, theirs, empty = filled(make, source), make(target), make(target)
    copy(ours, empty)
    run(ours, "INSERT INTO meta (key, value) VALUES ('encryption_keys', 'ab01')")
    copy(ours, theirs)
    marks = [query(url, "SELECT value FROM meta WHERE key = 'encryption_keys'") for url in (empty, theirs)]
    assert marks == [[], [("ab01",)]]


def test_there_and_back_again(make: Callable[[str], str]) -> None:
    """From SQLite to PostgreSQL, to another one, and back: the same."""
    first = filled(make, "sqlite")
    urls = [first, make("postgresql"), make("postgresql"), make("sqlite")]
    for source, target in itertools.pairwise(urls):
        copy(source, target)
    assert contents(urls[-1]) == contents(first)


def test_an_empty_database_can_be_copied(make: Callable[[str], str]) -> None:
    """Nothing is something, too, once it has tables."""
    ours, theirs = make("sqlite"), make("postgresql")
    migrate(ours)
    assert sum(copy(ours, theirs).rows.values()) == 0
    assert postgresql.shared().tables(theirs)


@pytest.mark.parametrize("target", ["sqlite", "postgresql"])
def test_what_the_target_had_learned_is_replaced(make: Callable[[str], str], target: str) -> None:
    """A target without delegations may have rooms, homeservers and history: nobody misses them."""
    ours, theirs = filled(make, "sqlite"), make(target)
    migrate(theirs)
    put(theirs, "homeserver", [("other.test", "none", 1.0, 1.0), ("hs.test", "none", 1.0, 1.0)])
    put(theirs, "room", [("main", "old", "", "", 0.0, 0, 0.0, 0.0, None, None, 1, 0, 0, 0)])
    put(theirs, "history", [(1, NOW, "delegated", "of another life")])
    copy(ours, theirs)
    assert contents(theirs) == contents(ours)


def test_a_file_that_is_made_can_be_read_by_nobody_else(make: Callable[[str], str]) -> None:
    """Mode 0600, as the daemon makes it; and its log is gone, so that it can be moved."""
    ours, theirs = filled(make, "postgresql"), make("sqlite")
    copy(ours, theirs)
    path = path_of(theirs)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_uid == path.parent.stat().st_uid
    assert sorted(there.name for there in path.parent.glob(f"{path.name}*")) == [path.name, f"{path.name}.lock"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_makes_belongs_to_the_daemon(make: Callable[[str], str], tmp_path: Path) -> None:
    """The owner of the directory is the daemon's user, who has to open it."""
    directory = tmp_path / "var"
    directory.mkdir()
    os.chown(directory, 12345, 54321)
    target = directory / "delegate.db"
    copy(filled(make, "postgresql"), f"sqlite:///{target}")
    for path in (target, Path(f"{target}.lock")):
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)


def test_addresses_that_sqlite_has_none_of_are_left_out(make: Callable[[str], str]) -> None:
    """What instances behind other addresses have learned of a homeserver's limit is not taken for one's own; and that is told."""
    ours, theirs = filled(make, "postgresql"), make("sqlite")
    put(ours, "pace", [("hs.test", "192.0.2.1", '{"limit": "none"}', NOW)])
    report = copy(ours, theirs)
    assert contents(theirs)["pace"] == [repr(("hs.test", "", '{"limit": "some"}', 0.0))]
    assert "other addresses (1 row" in report.notes[0]


# ── what works on the copy ──


@pytest.mark.parametrize(("source", "target"), DIRECTIONS)
def test_an_engine_goes_on_with_the_copy(make: Callable[[str], str], source: str, target: str) -> None:
    """A departure is sent and a new delegation is taken, under an id that nobody has."""
    ours, theirs = make(source), make(target)
    store = opened(ours)
    engine = engine_on(store)
    restart = next(task for task in engine.step([accept("D1"), joined()], NOW).tasks if task.action is Action.RESTART)
    engine.step([done(restart, NOW + 0.1)], NOW + 0.2)
    store.close()
    copy(ours, theirs)
    ((largest,),) = query(theirs, "SELECT max(id) FROM delayed_event")

    store = opened(theirs)
    try:
        engine = engine_on(store)
        assert sum(engine.states.values()) == 1
        step = engine.step([accept("D2", identity="bob"), left("S1", "PARTICIPANT_REMOVED")], NOW + 10)
        assert [type(reply) for reply in step.replies] == [Accepted, Touched]
        there = {known.identity: known for known in stored(store)}
        assert there["bob"].id > largest
        send = next(task for task in step.tasks if task.action is Action.SEND)
        assert send.event == there[ALICE].id
        engine.step([done(send, NOW + 10.1)], NOW + 10.2)
        assert {known.identity: known.state for known in stored(store)} == {ALICE: State.DONE, "bob": State.LIVE}
        assert {"delegated", "connected", "verified", "sent"} <= {note.what for note in store.reading(lambda tx: tx.history([send.event]))}
    finally:
        store.close()


def engine_on(store: Store) -> Engine:
    return Engine(store, POLICY, Limits(), Random(0))


def done(task: Task, sent_at: float) -> Answered:
    return Answered(task.homeserver, task.event, task.claim, task.action, sent_at, Verdict.DONE)


def test_ids_go_on_behind_the_largest_one(make: Callable[[str], str]) -> None:
    """Those of the history count as well; and a sequence that is ahead already stays there."""
    for history, ahead, begin in ((5, 0, 1001), (2000, 0, 2001), (5, 9000, 9100)):
        ours, theirs = filled(make, "sqlite", events(3)), make("postgresql")
        run(ours, "UPDATE delayed_event SET id = 1000 WHERE id = 3")
        put(ours, "history", [(history, NOW, "delegated", "")])
        if ahead:
            migrate(theirs)
            run(theirs, "SELECT setval('delayed_event_id', 9000)")
        copy(ours, theirs)
        assert query(theirs, "SELECT nextval('delayed_event_id'), nextval('delayed_event_id')") == [(begin, begin + schema.ID_BLOCK)]


def test_a_database_of_the_first_version_is_upgraded_and_gets_its_rooms(make: Callable[[str], str]) -> None:
    """On PostgreSQL a delegation without a room would never be found."""
    ours, theirs = make("sqlite"), make("postgresql")
    database = create_engine(f"sqlite:///{path_of(ours)}")
    try:
        with database.begin() as connection:
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "0001")
    finally:
        database.dispose()
    with closing(sqlite3.connect(path_of(ours))) as plain:
        known = FIELDS[: FIELDS.index("twin")]
        names = ", ".join(f'"{name}"' for name in known)
        rows = [values_of(there)[: len(known)] for there in events(12)]
        plain.executemany(f"INSERT INTO delayed_event ({names}) VALUES ({', '.join('?' * len(known))})", rows)
        plain.commit()
    tried = copy(ours, theirs, dry_run=True)
    assert "schema version 0001: it will be upgraded" in tried.notes[0]
    assert query(ours, "SELECT version_num FROM schema_version") == [("0001",)]
    assert copy(ours, theirs).rows["room"] == 2
    assert query(theirs, "SELECT name FROM room ORDER BY name") == [("room0",), ("room1",)]


# ── clocks ──


def test_the_daemon_is_told_whose_clock_the_times_are_of(make: Callable[[str], str]) -> None:
    """A file gets the mark of this machine's clock, so that the next start knows whether it can go by the times."""
    ours, theirs = filled(make, "postgresql"), make("sqlite")
    assert copy(ours, theirs).notes == ()
    assert query(theirs, "SELECT value FROM meta WHERE key = 'clock'") == [("here",)]


@pytest.mark.parametrize("why", ["the mark is another's", "the clocks differ"])
def test_times_of_another_clock_are_not_believed_on_postgresql(make: Callable[[str], str], why: str) -> None:
    """After a reboot, or with clocks that differ, all countdowns are unknown, and due, as after a start of the daemon; and that is told."""
    ours, theirs = filled(make, "sqlite", events(2, due=NOW + 500)), make("postgresql")
    run(ours, "INSERT INTO meta (key, value) VALUES ('clock', 'elsewhere')")
    clock = Clock() if why == "the mark is another's" else Clock("elsewhere", NOW)
    report = copy(ours, theirs, clock=clock)
    assert "all countdowns count as unknown" in report.notes[0]
    ((latest, now),) = query(theirs, "SELECT max(due), extract(epoch FROM now())::float8 FROM delayed_event")
    assert abs(latest - now) < 60


@pytest.mark.parametrize("source", ["sqlite", "postgresql"])
def test_times_of_another_clock_are_not_believed_on_sqlite(make: Callable[[str], str], source: str) -> None:
    """The file gets a mark that no clock agrees with."""
    ours, theirs = filled(make, source), make("sqlite")
    if source == "sqlite":
        run(ours, "INSERT INTO meta (key, value) VALUES ('clock', 'elsewhere')")
    else:
        put(ours, "instance", [("one", "0.1", "", 0.0, NOW * 10_000, "")])  # alive in the future, so the clock was set back
    assert "all countdowns count as unknown" in copy(ours, theirs).notes[0]
    ((mark,),) = query(theirs, "SELECT value FROM meta WHERE key = 'clock'")
    assert not RealClock().agrees_with(mark)
    assert contents(theirs) == contents(ours)


# ── refused ──


def test_a_source_that_is_in_use_is_refused(make: Callable[[str], str]) -> None:
    """A daemon is at work with the file: nothing is made at the target."""
    ours, theirs = filled(make, "sqlite"), make("postgresql")
    with closing(SqliteStore(path_of(ours))):
        assert "is in use by another process" in refused(ours, theirs)
    assert postgresql.shared().tables(theirs) == []


@pytest.mark.parametrize("alive", ["source", "target"])
def test_a_database_whose_instances_are_alive_is_refused(make: Callable[[str], str], alive: str) -> None:
    """The instances are named; one that was not heard of for 10 s is gone."""
    ours, theirs = filled(make, "postgresql"), make("postgresql")
    migrate(theirs)
    place = ours if alive == "source" else theirs
    age = "INSERT INTO instance SELECT 'one', '0.1', '', 0, extract(epoch FROM clock_timestamp()) - %s, ''"
    run(place, age, 3)
    said = refused(ours, theirs)
    assert "is in use" in said
    assert "one (3 s ago)" in said
    assert "Stop every daemon" in said
    assert query(theirs, "SELECT count(*) FROM delayed_event") == [(0,)]
    tried = copy(ours, theirs, dry_run=True)  # which is what it is for
    assert "one (3 s ago)" in tried.notes[0]
    run(place, "UPDATE instance SET alive_at = alive_at - 8")
    copy(ours, theirs)
    assert contents(theirs) == contents(ours)


def test_an_instance_that_starts_meanwhile_waits(make: Callable[[str], str]) -> None:
    """Neither the source nor the target can be changed while the copy is made."""
    ours, theirs = filled(make, "postgresql"), make("postgresql")
    locked = []

    def interfere(what: str, done: int, total: int) -> None:
        if what != "comparing room" or done:
            return
        for url, lock in ((ours, "ROW EXCLUSIVE"), (theirs, "ACCESS SHARE")):
            with psycopg.connect(url) as other, pytest.raises(psycopg.errors.LockNotAvailable):
                other.execute(f"LOCK TABLE instance IN {lock} MODE NOWAIT")
            locked.append(url)

    copy(ours, theirs, tell=interfere)
    assert locked == [ours, theirs]


@pytest.mark.parametrize("what", ["an instance at the source", "an instance at the target", "a delegation at the target"])
def test_what_happens_between_the_look_and_the_locks_is_seen(make: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A daemon that starts just then, or has just been there."""
    ours, theirs = filled(make, "postgresql"), make("postgresql")
    opened_both = copying._PostgresSide.open

    def meanwhile(side: Any) -> None:
        opened_both(side)
        if f" {postgresql.name_in(theirs)} at {postgresql.HOST}" in side.name:
            if what.startswith("a delegation"):
                fill(theirs, events(1))
            else:
                place = ours if what.endswith("source") else theirs
                run(place, "INSERT INTO instance SELECT 'one', '0.1', '', 0, extract(epoch FROM clock_timestamp()), ''")

    monkeypatch.setattr(copying._PostgresSide, "open", meanwhile)
    said = refused(ours, theirs)
    assert ("has 1 delayed events already" if what.startswith("a delegation") else "one (0 s ago)") in said


def test_somebody_at_work_is_waited_for_and_then_told(make: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that holds a table, of whatever program."""
    monkeypatch.setattr(copying, "LOCKED_WITHIN", 0.2)
    ours, theirs = filled(make, "postgresql"), make("postgresql")
    with psycopg.connect(ours) as other:
        other.execute("UPDATE room SET claim = 1")
        assert "Somebody is at work in it" in refused(ours, theirs)


@pytest.mark.parametrize("target", ["sqlite", "postgresql"])
def test_a_target_with_delegations_is_refused(make: Callable[[str], str], target: str) -> None:
    """And keeps them, to the last byte."""
    ours, theirs = filled(make, "sqlite"), filled(make, target, events(2))
    before = contents(theirs)
    assert "has 2 delayed events already" in refused(ours, theirs)
    assert "has 2 delayed events already" in refused(ours, theirs, dry_run=True)
    assert contents(theirs) == before


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_source_and_target_must_be_two(make: Callable[[str], str], kind: str) -> None:
    """By whatever names."""
    ours = filled(make, kind)
    if kind == "postgresql":
        same = f"{ours}?application_name=x"
    else:
        link = path_of(ours).with_name("link.db")
        link.symlink_to(path_of(ours))
        same = f"sqlite:///{link}"
    assert "are the same" in refused(ours, same)


def test_a_source_that_is_not_there_is_not_made(make: Callable[[str], str], tmp_path: Path) -> None:
    """A slip in the path must not lead to an empty database."""
    ours, theirs = make("sqlite"), make("postgresql")
    assert "does not exist" in refused(ours, theirs)
    assert not list(tmp_path.iterdir())
    assert postgresql.shared().tables(theirs) == []
    assert "has no tables of sfu-delegate" in refused(make("postgresql"), theirs)
    assert "is no file" in refused(f"sqlite:///{tmp_path}", theirs)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_another_programs_database_is_refused(make: Callable[[str], str], kind: str) -> None:
    """As the source and as the target."""
    ours, theirs = filled(make, "sqlite"), make(kind)
    run(theirs, "CREATE TABLE room (number integer)")
    assert "another program" in refused(ours, theirs)
    assert "another program" in refused(theirs, make("postgresql"))


def test_all_that_is_wrong_is_told_at_once(make: Callable[[str], str], tmp_path: Path) -> None:
    """The source is not there, and the target's directory neither."""
    with pytest.raises(CannotCopy) as caught:
        copy(make("sqlite"), f"sqlite:///{tmp_path}/nowhere/delegate.db")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_newer_schema_is_refused(make: Callable[[str], str], side: str, kind: str) -> None:
    """Also one that this version could work with: it would not know what else there is to copy."""
    ours, theirs = filled(make, kind if side == "source" else "sqlite"), make(kind if side == "target" else "sqlite")
    migrate(theirs)
    run(ours if side == "source" else theirs, "UPDATE schema_version SET version_num = '9999'")
    assert "schema version 9999, which this version of sfu-delegate does not know" in refused(ours, theirs)


def test_a_target_without_all_characters_is_refused(make: Callable[[str], str]) -> None:
    """Another encoding than UTF-8."""
    server = postgresql.shared()
    server.execute("CREATE DATABASE latin OWNER delegate ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        assert "is encoded in LATIN1" in refused(filled(make, "sqlite"), server.url("latin"), dry_run=True)
    finally:
        server.drop_database(server.url("latin"))


def test_a_standby_is_refused(make: Callable[[str], str]) -> None:
    """As either of the two: it can be read only."""
    with postgresql.Server() as server, server.standby(synchronous=False) as follower:
        url = server.create_database()
        migrate(url)
        standby = follower.url(postgresql.name_in(url))
        deadline = time.monotonic() + postgresql.WITHIN
        while not follower.execute("SELECT 1 FROM pg_database WHERE datname = %s", postgresql.name_in(url)) and time.monotonic() < deadline:
            time.sleep(0.02)
        # By itself it is looked for where it can be written.
        assert "session is read-only" in refused(standby, make("sqlite"))
        said = refused(f"{standby}?target_session_attrs=any", f"{standby}?target_session_attrs=any&application_name=x")
        assert said.count("is on a standby") == 2


def test_a_target_in_which_no_tables_may_be_made_is_refused(make: Callable[[str], str]) -> None:
    """Before the daemon is stopped: a dry run tells."""
    server, theirs = postgresql.shared(), make("postgresql")
    server.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC", database=postgresql.name_in(theirs))
    server.execute("ALTER SCHEMA public OWNER TO postgres", database=postgresql.name_in(theirs))
    assert "may not make tables" in refused(filled(make, "sqlite"), theirs, dry_run=True)


# ── what cannot be copied ──


def test_rows_that_postgresql_cannot_have_are_named(make: Callable[[str], str]) -> None:
    """By their ids and columns, all of them; not by what is in them."""
    ours, theirs = filled(make, "sqlite", events(5000, token=TOKEN)), make("postgresql")
    nul = "UPDATE delayed_event SET delay_id = 'a' || char(0) || delay_id, identity = identity || char(0) WHERE id IN (7, 4999)"
    run(ours, nul)
    run(ours, "UPDATE delayed_event SET token = 'syd_SecretDelayId' WHERE id = 8")
    run(ours, "UPDATE delayed_event SET claim = 2147483648 WHERE id = 9")
    run(ours, "UPDATE history SET detail = char(0) WHERE event = 7 AND what = 'delegated'")
    for dry_run in (True, False):
        said = refused(ours, theirs, dry_run=dry_run)
        for part in (
            "delayed_event, id 7: identity, delay_id;",
            "id 8: token;",
            "id 9: claim;",
            "id 4999: identity, delay_id;",
            "history, event 7, at 1000000.1, what",
        ):
            assert part in said
    assert query(theirs, "SELECT count(*) FROM delayed_event") == [(0,)]
    run(ours, "UPDATE delayed_event SET identity = identity || char(0)")
    assert "and 4981 more" in refused(ours, theirs, dry_run=True)


def test_a_nul_goes_from_file_to_file(make: Callable[[str], str]) -> None:
    """SQLite can have it."""
    ours, theirs = filled(make, "sqlite"), make("sqlite")
    run(ours, "UPDATE delayed_event SET identity = identity || char(0) WHERE id = 2")
    copy(ours, theirs)
    assert contents(theirs) == contents(ours)


def test_what_is_no_text_is_told_without_it(make: Callable[[str], str]) -> None:
    """The driver quotes what it cannot decode."""
    ours = filled(make, "sqlite")
    run(ours, "UPDATE delayed_event SET delay_id = CAST(CAST(delay_id AS BLOB) || x'ff' AS TEXT) WHERE id = 2")
    for target in ("postgresql", "sqlite"):
        assert "something in the column delay_id is no text" in refused(ours, make(target))


def test_not_a_number_is_found_where_sqlite_cannot_have_it(make: Callable[[str], str]) -> None:
    """It would become NULL."""
    ours, theirs = filled(make, "postgresql"), make("sqlite")
    run(ours, "UPDATE delayed_event SET ended_at = 'NaN' WHERE id = 2")
    assert "in the table delayed_event, in the row with id 2, ended_at (nan in the source, None in the copy)" in refused(ours, theirs)
    copied = make("postgresql")
    copy(ours, copied)
    assert contents(copied) == contents(ours)
    run(ours, "UPDATE delayed_event SET delay = 'NaN' WHERE id = 2")
    assert "constraint failed: delayed_event.delay" in refused(ours, theirs)


def trigger(url: str, table: str, body: LiteralString, when: LiteralString = "BEFORE INSERT") -> None:
    """What tampers with each row that comes in."""
    run(url, "CREATE FUNCTION tamper() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN " + body + " END $$")
    run(url, f"CREATE TRIGGER tamper {when} ON {table} FOR EACH ROW EXECUTE FUNCTION tamper()")


@pytest.mark.parametrize(
    ("table", "body", "said"),
    [
        ("delayed_event", "IF NEW.id = 2 THEN NEW.due := NEW.due + 2e-10; END IF; RETURN NEW;", "delayed_event, in the row with id 2, due ("),
        ("delayed_event", "IF NEW.id = 2 THEN NEW.state := 'dome'; END IF; RETURN NEW;", "2, state ('live' in the source, 'dome' in the copy)"),
        ("delayed_event", "IF NEW.id = 3 THEN NEW.token := '\\x00'; NEW.alias := ''; END IF; RETURN NEW;", "the row with id 3, alias, token."),
        ("delayed_event", "NEW.delay_id := NEW.delay_id || '.'; RETURN NEW;", "in the row with id 1, delay_id."),
        ("delayed_event", "IF NEW.id = 2 THEN RETURN NULL; END IF; RETURN NEW;", "there is a row with id 3 where there is one with id 2"),
        ("delayed_event", "IF NEW.id = 3 THEN RETURN NULL; END IF; RETURN NEW;", "delayed_event the row with id 3 is missing"),
        ("room", "NEW.room_sid := 'RM2'; RETURN NEW;", 'room, in the row with sfu "main", name "room0", room_sid.'),
        ("history", "IF NEW.event = 3 AND NEW.what = 'verified' THEN RETURN NULL; END IF; RETURN NEW;", "history the row with event 3, at"),
        ("pace", "NEW.state := ''; RETURN NEW;", 'pace, in the row with homeserver "hs.test", address "", state.'),
    ],
)
def test_a_difference_is_found_and_nothing_is_kept(make: Callable[[str], str], table: str, body: LiteralString, said: str) -> None:
    """Whatever comes between: the row and the column are named, and the values only if they are harmless."""
    ours, theirs = filled(make, "sqlite"), make("postgresql")
    migrate(theirs)
    put(theirs, "homeserver", [("old.test", "some", 1.0, 1.0)])
    before = contents(theirs), query(theirs, "SELECT last_value, is_called FROM delayed_event_id")
    trigger(theirs, table, body)
    reason = refused(ours, theirs)
    assert "The copy differs from the source: " in reason
    assert said in reason
    assert "It was not kept" in reason
    assert (contents(theirs), query(theirs, "SELECT last_value, is_called FROM delayed_event_id")) == before


@pytest.mark.parametrize(
    ("event", "said"),
    [(1, "there is a row with event 1, at 0.0,"), (9, 'event 9, at 0.0, what "delegated", detail "" is there'), (0, "event 0, at 0.0")],
)
def test_a_row_too_many_is_found(make: Callable[[str], str], event: int, said: str) -> None:
    """In the middle, and at the end."""
    ours, theirs = filled(make, "sqlite"), make("postgresql")
    if event == 0:
        run(ours, "DELETE FROM history")  # what is too much comes after all there is
    migrate(theirs)
    trigger(theirs, "sfu", f"INSERT INTO history VALUES ({event}, 0, 'delegated', ''); RETURN NULL;", "AFTER INSERT")
    assert said in refused(ours, theirs)


def test_a_difference_is_found_in_a_file(make: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept of it, either."""
    ours, theirs = filled(make, "postgresql"), make("sqlite")
    write = copying._SqliteSide.write

    def tampered(side: Any, copied: Any, batches: Any) -> None:
        write(side, copied, batches)
        side._run("UPDATE delayed_event SET token = x'00' WHERE id = 2")

    monkeypatch.setattr(copying._SqliteSide, "write", tampered)
    assert "delayed_event, in the row with id 2, token." in refused(ours, theirs)
    assert query(theirs, "SELECT count(*) FROM delayed_event") == [(0,)]


# ── interrupted ──

_TO_BE_KILLED = """
import signal, sys
from tests.unit.test_copy_database import copy

def tell(what, done, total):
    if what == sys.argv[3] and done:
        print("there", flush=True)
        signal.pause()

copy(sys.argv[1], sys.argv[2], tell=tell)
"""


@pytest.mark.parametrize("where", ["copying delayed_event", "copying history", "comparing history"])
@pytest.mark.parametrize("target", ["sqlite", "postgresql"])
def test_a_kill_leaves_the_target_as_it_was(make: Callable[[str], str], target: str, where: str) -> None:
    """SIGKILL in the middle: all is as before, and the next try succeeds."""
    ours, theirs = filled(make, "sqlite", events(3000, token=TOKEN)), make(target)
    migrate(theirs)
    put(theirs, "homeserver", [("old.test", "some", 1.0, 1.0)])
    put(theirs, "history", [(1, NOW, "delegated", "of another life")])
    before = contents(theirs)
    command = [sys.executable, "-c", _TO_BE_KILLED, ours, theirs, where]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        if target == "postgresql":
            sequence = "SELECT last_value FROM delayed_event_id"
        process.send_signal(signal.SIGKILL)
    assert contents(theirs) == before
    if target == "postgresql":
        assert query(theirs, sequence) == [(1,)]
    copy(ours, theirs)
    assert contents(theirs) == contents(ours)


def test_a_connection_that_is_lost_leaves_the_target_as_it_was(make: Callable[[str], str]) -> None:
    """Of either side, at any time; and what to do is told."""
    ours, theirs = filled(make, "postgresql"), make("postgresql")
    migrate(theirs)
    before = contents(theirs)
    for url in (ours, theirs):
        for when in ("copying room", "copying pace", "comparing delayed_event", "comparing pace"):

            def cut(what: str, done: int, total: int, when: str = when, url: str = url) -> None:
                if what == when and not done:
                    postgresql.shared().terminate_backends(url)

            said = refused(ours, theirs, tell=cut)
            assert "failed: terminating connection due to administrator command. Copy again when that is mended. The target is as it was." in said
            assert contents(theirs) == before
    copy(ours, theirs)


def test_a_commit_that_is_lost_may_have_been_made(make: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """That is said, and how to find out."""
    ours, theirs = filled(make, "sqlite"), make("postgresql")
    finish = copying._PostgresSide.finish

    def lost(side: Any, *of_rows: Any, sure: bool) -> None:
        finish(side, *of_rows, sure=sure)
        monkeypatch.setattr(
            side._connection, "commit", lambda: postgresql.shared().terminate_backends(theirs) and side._connection.execute("SELECT 1")
        )

    monkeypatch.setattr(copying._PostgresSide, "finish", lost)
    assert "whether the copy was kept is not known. Copy again" in refused(ours, theirs)


def test_an_interrupt_leaves_the_target_as_it_was(make: Callable[[str], str]) -> None:
    """Ctrl-C, by somebody who would rather not wait."""
    ours, theirs = filled(make, "sqlite"), make("sqlite")
    migrate(theirs)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "comparing room":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(ours, theirs, tell=interrupt)
    assert sum(map(len, contents(theirs).values())) == 0
    copy(ours, theirs)


def test_a_full_disk_leaves_the_target_as_it_was(make: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And that it is full is told, with what to do."""
    ours, theirs = filled(make, "postgresql", events(2000)), make("sqlite")
    migrate(theirs)
    begin = copying._SqliteSide.begin_writing

    def on_a_small_disk(side: Any) -> None:
        begin(side)
        side._run("PRAGMA max_page_count=60")

    monkeypatch.setattr(copying._SqliteSide, "begin_writing", on_a_small_disk)
    assert "The disk is full: free some space, and copy again. The target is as it was." in refused(ours, theirs)
    assert query(theirs, "SELECT count(*) FROM delayed_event") == [(0,)]


# ── the command ──


def command_line(*arguments: str, environ: dict[str, str] | None = None) -> Result:
    result = CliRunner().invoke(app, ["copy-database", *arguments], env={"PGPASSWORD": None, "PGPASSFILE": "/nonexistent", **(environ or {})})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert not [secret for secret in SECRETS if secret in result.output]
    return result


def test_the_command_copies_and_says_what_to_do_now(make: Callable[[str], str]) -> None:
    """What was copied, how long it took, and above all what becomes of the encryption key."""
    ours, theirs = filled(make, "sqlite"), make("postgresql")
    key = Path(f"{path_of(ours)}.key")
    key.write_text("hunter2\n")
    result = command_line(ours, theirs)
    assert result.exit_code == 0
    assert "delayed_event           3  (3 open, 3 with a client's token)" in result.stdout
    assert "Copied, and each row compared, in " in result.stdout
    assert (
        f"1. THE ENCRYPTION KEY is in {key}, unless `encryption` is configured: put its content into a file for all instances, and name"
        in result.stdout
    )
    assert "management tokens are void, and 3 tokens in the database cannot be opened" in result.stdout
    assert f"2. Set `database: {theirs}` in the configuration" in result.stdout
    assert contents(theirs) == contents(ours)
    back = command_line(theirs, make("sqlite"))
    assert "1. THE ENCRYPTION KEYS stay as they are configured" in back.stdout
    beside = command_line(ours, f"sqlite:///{path_of(ours).parent}/beside.db")
    assert f"copy it to {path_of(ours).parent}/beside.db.key, with mode 0600" in beside.stdout


def test_a_dry_run_changes_nothing(make: Callable[[str], str], tmp_path: Path) -> None:
    """Whatever the two are; and a daemon may be at work."""
    ours, theirs = filled(make, "sqlite"), make("postgresql")
    with closing(SqliteStore(path_of(ours))):
        result = command_line("--dry-run", ours, theirs)
    assert result.exit_code == 0
    assert "It can be copied" in result.stdout
    assert f"note: The SQLite database {path_of(ours)} is in use by another process. Stop every daemon" in result.stderr
    assert "has no tables yet: they will be made" in result.stderr
    assert postgresql.shared().tables(theirs) == []
    there = sorted(tmp_path.iterdir())
    assert command_line("--dry-run", ours, make("sqlite")).exit_code == 0
    assert [path for path in sorted(tmp_path.iterdir()) if path.suffix in (".db", ".lock")] == [
        path for path in there if path.suffix in (".db", ".lock")
    ]


def test_json_is_for_programs(make: Callable[[str], str]) -> None:
    """The same as data, on standard output alone."""
    ours, theirs = filled(make, "sqlite"), make("postgresql")
    tried = json.loads(command_line("--json", "--dry-run", ours, theirs).stdout)
    assert (tried["ok"], tried["dry_run"], tried["rows"]["history"], tried["next"]) == (True, True, 9, [])
    assert len(tried["notes"]) == 1
    said = json.loads(command_line("--json", ours, theirs).stdout)
    assert (said["ok"], said["dry_run"], said["open"], said["with_token"], len(said["next"])) == (True, False, 3, 3, 4)
    result = command_line("--json", ours, theirs)
    refusal = json.loads(result.stdout)
    assert (result.exit_code, refusal["ok"], len(refusal["problems"])) == (1, False, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mysql://x/y", "sqlite:///b.db"], "problem: FROM = mysql://(hidden): is not a database URL that begins with sqlite:/// or postgresql://"),
        (
            ["sqlite:///a.db", "postgresql://u:hunter2@h/d"],
            "problem: TO = postgresql://(hidden): carries a password; take it out, and put it into --to-p",
        ),
        (["postgresql://u@h/d?password=hunter2", "sqlite:///:memory:"], "--from-password-file\nproblem: TO = sqlite:///:memory:: names no file"),
        (["sqlite:///a.db"], "Missing argument 'TO'"),
        (["sqlite:///a.db", "sqlite:///b.db", "--to-password-file", "x"], "is given, and TO is SQLite, which has no password; remove it"),
        (["sqlite:///a.db", "postgresql://u@h/d", "--to-password-file", "/nonexistent/p"], "the password's file cannot be read: No such file"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], said: str) -> None:
    """And with words that help; a password that was typed is not repeated."""
    result = command_line(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_what_is_refused_exits_with_1(make: Callable[[str], str]) -> None:
    """A line for each problem, on standard error."""
    result = command_line(make("sqlite"), make("postgresql"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[0].startswith("problem: The SQLite database ")
    assert result.stderr.splitlines()[-1] == "copy-database: it was not copied"


def test_passwords_come_from_files_or_as_libpq_has_them(make: Callable[[str], str], tmp_path: Path) -> None:
    """From `--…-password-file`, PGPASSWORD or a password file of libpq's; a wrong one is told with all ways to give a right one."""
    file, pgpass = tmp_path / "password", tmp_path / "pgpass"
    file.write_text("hunter2\n")
    ours = filled(make, "sqlite")
    with postgresql.Server(password="hunter2") as server:
        pgpass.write_text(f"*:{server.port}:*:*:hunter2\n")
        pgpass.chmod(0o600)
        ways: list[tuple[list[str], dict[str, str]]] = [
            (["--to-password-file", str(file)], {}),
            ([], {"PGPASSWORD": "hunter2"}),
            ([], {"PGPASSFILE": str(pgpass)}),
        ]
        for options, environ in ways:
            assert command_line(*options, ours, server.create_database(), environ=environ).exit_code == 0
        theirs = server.create_database()
        for environ in ({}, {"PGPASSWORD": "wrong"}):
            result = command_line(ours, theirs, environ=environ)
            assert result.exit_code == 1
            assert "password" in result.stderr
            assert "Check the user in TO, and the password: --to-password-file FILE, PGPASSWORD, or ~/.pgpass." in result.stderr
    for content, said in (("", "is empty"), ("hunter2\nhunter2", "has a line break in it")):
        file.write_text(content)
        assert said in command_line("--to-password-file", str(file), ours, theirs).stderr


def test_a_server_that_is_not_there_is_told() -> None:
    """With its host, and what to do."""
    result = command_line("postgresql://delegate@127.0.0.1:1/none", "sqlite:///nowhere.db")
    assert result.exit_code == 1
    assert "The PostgreSQL database none at 127.0.0.1 (port 1) failed: " in result.stderr
    assert "Copy again when that is mended" in result.stderr


def test_on_a_terminal_it_is_seen_how_far_it_is(make: Callable[[str], str]) -> None:
    """Bars on standard error; what is for the eye only is not in the output."""
    ours, theirs = filled(make, "sqlite"), make("sqlite")
    leader, follower = os.openpty()
    command = [sys.executable, "-m", "sfu_delegate.cli", "copy-database", ours, theirs]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with (
        subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=follower) as process,
        open(leader, "rb", buffering=0) as terminal,
    ):
        os.close(follower)
        shown = b""
        with suppress(OSError):  # its other end is closed
            while part := terminal.read(65536):
                shown += part
        assert process.stdout is not None
        assert process.stdout.read().startswith(b"From the SQLite database")
    assert process.returncode == 0
    assert b"comparing history" in shown
    assert b"9/9" in shown
