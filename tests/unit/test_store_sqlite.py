"""The embedded database on a file: schema, locks, recovery, indexes, failures, and what a kill leaves behind. See `test_store` for the rest."""

import itertools
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from alembic import command, op
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sfu_delegate.delegation.model import DelayedEvent, Find, Lane, Presence, Room, State
from sfu_delegate.delegation.replies import Found
from sfu_delegate.engine import Engine, Limits
from sfu_delegate.store import sqlite
from sfu_delegate.store.base import DatabaseInUse, DatabaseTooNew, StoreUnavailable, Transaction
from sfu_delegate.store.migrate import alembic_config
from sfu_delegate.store.rows import FIELDS, changed, values_of
from sfu_delegate.store.schema import metadata
from sfu_delegate.store.sqlite import SqliteStore
from sqlalchemy import create_engine

from tests.rows import NOW, POLICY, ROOM, SFU, accept, claimed, row

ROOT = Path(__file__).parents[2]


@contextmanager
def opened(path: Path | str = ":memory:") -> Iterator[SqliteStore]:
    store = SqliteStore(path)
    try:
        yield store
    finally:
        store.close()


def insert(store: SqliteStore, *rows: DelayedEvent) -> list[DelayedEvent]:
    """Rows with ids of their own."""
    numbered = [there._replace(id=n, delay_id=f"delay-{n}") for n, there in enumerate(rows, 1)]

    def work(tx: Transaction) -> None:
        for there in numbered:
            tx.insert(there)

    store.atomically(work)
    return numbered


def stored(store: SqliteStore) -> list[DelayedEvent]:
    ids = [id for (id,) in store._connection.execute("SELECT id FROM delayed_event ORDER BY id")]
    return store.atomically(lambda tx: [there for id in ids if (there := tx.get(id)) is not None])


def rooms(store: SqliteStore) -> dict[str, Room]:
    """All rooms, by name."""
    names = [name for (name,) in store._connection.execute("SELECT name FROM room")]
    found = store.atomically(lambda tx: [tx.room(SFU, name) for name in names])
    return {room.name: room for room in found if room is not None}


def plain_room(name: str = ROOM, **changes: Any) -> Room:
    return Room(SFU, name, "RM1", "EV1", 0.0, False, 0.0, NOW - 30.0, None, None, True, 0, 0, False)._replace(**changes)


def save(store: SqliteStore, *saved: Room) -> None:
    for room in saved:
        store.atomically(lambda tx, room=room: tx.save_room(room))  # type: ignore[misc]


def engine_on(store: SqliteStore) -> Engine:
    return Engine(store, POLICY, Limits(), Random(0))


# ── schema ──


def test_the_migrations_make_the_schema_of_this_version(tmp_path: Path) -> None:
    """Alembic finds nothing to change between the migrated database and the tables of the program."""
    path = tmp_path / "delegate.db"
    with opened(path):
        pass
    database = create_engine(f"sqlite:///{path}")
    try:
        with database.connect() as connection:
            context = MigrationContext.configure(connection, opts={"version_table": "schema_version", "compare_type": True})
            assert compare_metadata(context, metadata) == []
    finally:
        database.dispose()


def test_the_schema_in_memory_is_the_migrated_one(tmp_path: Path) -> None:
    """Tables, columns, keys and indexes, to the letter of SQLite's own description, conditions of indexes included."""

    def schema(store: SqliteStore) -> dict[str, Any]:
        run = store._connection.execute
        tables = [name for (name,) in run("SELECT name FROM sqlite_master WHERE type = 'table'") if name != "schema_version"]
        found: dict[str, Any] = {
            name: (run(f"PRAGMA table_info({name})").fetchall(), run(f"PRAGMA table_list({name})").fetchall()) for name in tables
        }
        for name, text in run("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name <> 'schema_version'"):
            found[name] = " ".join(text.split())
        return found

    with opened(tmp_path / "delegate.db") as migrated, opened() as in_memory:
        assert schema(migrated) == schema(in_memory)


def test_durable_settings_are_in_force(tmp_path: Path) -> None:
    """Write-ahead log, synced at every commit, and checkpointed by this connection alone."""
    with opened(tmp_path / "delegate.db") as store:
        values = [store._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "wal_autocheckpoint")]
        assert values == ["wal", 2, 0]


def test_a_database_of_a_newer_version_is_refused_and_not_touched(tmp_path: Path) -> None:
    """The error says what to do, and the file is the same to the byte."""
    path = tmp_path / "delegate.db"
    with opened(path) as store:
        insert(store, row())
        store._connection.execute("UPDATE schema_version SET version_num = '9999'")
        store._connection.execute("UPDATE meta SET value = '9999' WHERE key = 'oldest_schema'")
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(DatabaseTooNew, match=r"9999.*newer") as error:
            SqliteStore(path)
        assert str(path) in str(error.value)
    assert path.read_bytes() == before
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT version_num FROM schema_version").fetchone() == ("9999",)


def test_the_mark_of_the_clock_is_kept(tmp_path: Path) -> None:
    """The last one."""
    with opened(tmp_path / "delegate.db") as store:
        assert store.clock_mark() is None
        store.save_clock_mark("one")
        store.save_clock_mark("two")
    with opened(tmp_path / "delegate.db") as store:
        assert store.clock_mark() == "two"


# ── who may open it ──

OPENER = """
import sys
from sfu_delegate.store.base import DatabaseInUse
from sfu_delegate.store.sqlite import SqliteStore
try:
    SqliteStore(sys.argv[1]).close()
except DatabaseInUse as error:
    print(error)
    sys.exit(3)
"""


def run_opener(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", OPENER, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """As long as the first has it open, and no longer."""
    path = tmp_path / "delegate.db"
    with opened(path):
        second = run_opener(path)
        assert second.returncode == 3, second.stderr
        assert "in use by another process" in second.stdout
        with pytest.raises(DatabaseInUse):
            SqliteStore(path)
    assert run_opener(path).returncode == 0


def test_a_failed_open_lets_go_of_the_lock(tmp_path: Path) -> None:
    """The next attempt fails for its own reason."""
    path = tmp_path / "delegate.db"
    path.write_text("this is no database, but some text that is long enough to look like something" * 20)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="no SQLite database"):
            SqliteStore(path)


def overwrite_index(path: Path, index: str) -> None:
    """Bytes that mean nothing in place of its first page."""
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (index,)).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xa5" * size)


def test_damage_is_found_at_the_start_in_whatever_part(tmp_path: Path) -> None:
    """With the remedy; also where no statement of the start would meet it."""
    path = tmp_path / "delegate.db"
    with opened(path) as store:
        insert(store, row())
    overwrite_index(path, "ix_delayed_event_delegation")
    with pytest.raises(StoreUnavailable, match="restore the last backup"):
        SqliteStore(path)


def test_damage_holds_until_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a database too large for a check at the start: once it was met, nothing is written any more, also not where all is well."""
    path = tmp_path / "delegate.db"
    with opened(path) as store:
        (made,) = insert(store, row())
        store.save_clock_mark("before")
    overwrite_index(path, "ix_delayed_event_delegation")
    monkeypatch.setattr(sqlite, "CHECKED_UP_TO", 0)
    with opened(path) as store:
        store.save_clock_mark("after")
        with pytest.raises(StoreUnavailable, match="damaged") as met:
            store.atomically(lambda tx: tx.insert(made._replace(id=2, delay_id="delay-2")))
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="damaged") as held:
                store.save_clock_mark("never")
            assert str(held.value) == str(met.value)
        assert store.clock_mark() == "after"
        assert store.reading(lambda tx: tx.get(made.id)) == made  # so that who is connected can be kept


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """With the remedy."""
    with pytest.raises(StoreUnavailable, match="must exist and be writable") as error:
        SqliteStore(tmp_path / "nowhere" / "delegate.db")
    assert "nowhere" in str(error.value)


# ── recovery ──


def test_what_a_dead_process_had_claimed_is_due_at_once() -> None:
    """Restarts are simply due; of endings nobody knows whether they got through; rooms are looked at anew."""
    with opened() as store:
        rows = insert(
            store,
            claimed(row()),
            claimed(row(Presence.GONE)),
            claimed(row(state=State.SUPERSEDED)),
            row(due=NOW + 50),
            row(state=State.VANISHED),
            claimed(row(end_tried=True)),
        )
        claimed_room = Room(SFU, ROOM, "", "", 0.0, False, 0.0, NOW, None, NOW + 15, False, 0, 3, True)
        store.atomically(lambda tx: tx.save_room(claimed_room))
        assert store.recover(NOW + 1, POLICY, clock_unsure=False) == 4
        after = stored(store)
        assert [(there.due, there.claimed, there.end_tried) for there in after[:3]] == [
            (NOW + 1, False, False),
            (NOW + 1, False, True),
            (NOW + 1, False, True),
        ]
        assert after[3:5] == rows[3:5]
        assert (after[5].claimed, after[5].end_tried) == (False, True)
        assert [there.claim for there in after] == [there.claim for there in rows]
        assert store.atomically(lambda tx: tx.room(SFU, ROOM)) == claimed_room._replace(due=NOW + 1, claimed=False, asked=NOW + 1)
        assert store.recover(NOW + 1, POLICY, clock_unsure=False) == 0


def test_every_room_with_an_open_delegation_is_looked_at_after_a_start() -> None:
    """What came while nobody listened is lost. Rooms of which there was no record are made; those where all is over are not."""
    with opened() as store:
        insert(store, row(room="known"), row(room="unknown"), row(room="unknown", identity="b"), row(state=State.DONE, room="over"))
        save(store, plain_room("known", due=NOW + 40, doubt_until=NOW + 99))
        store.recover(NOW + 1, POLICY, clock_unsure=False)
        found = rooms(store)
        assert set(found) == {"known", "unknown"}
        assert {(room.due, room.asked, room.claimed) for room in found.values()} == {(NOW + 1, NOW + 1, False)}
        assert (found["known"].doubt_until, found["known"].room_sid) == (NOW + 99, "RM1")
        assert store.census().rooms == {SFU: NOW + 1}
        store.recover(NOW + 2, POLICY, clock_unsure=False)
        assert set(rooms(store)) == {"known", "unknown"}


def test_a_room_that_is_missing_is_made_for_open_delegations_only() -> None:
    """Each one once, on its own SFU: the same name on another one is another room, and what is finished beside it does not count."""
    with opened() as store:
        insert(
            store,
            *(row(room="mixed"), row(state=State.DONE, room="mixed", identity="b"), row(room="mixed", identity="c")),
            *(row(state=state, room=f"{state.value} alone") for state in State if state is not State.ENDING),
            *(row(Presence.GONE, room="ending alone"), row(room="elsewhere", sfu="other"), row(state=State.DONE, room="elsewhere")),
            row(room="known"),
        )
        save(store, plain_room("known", room_sid="RM_known"), plain_room("mixed", sfu="other"))
        store.recover(NOW + 1, POLICY, clock_unsure=False)
        found = {tuple(key) for key in store._connection.execute("SELECT sfu, name FROM room")}
        open_ones = {(SFU, f"{state.value} alone") for state in State if state is not State.DONE}
        assert found == {(SFU, "mixed"), (SFU, "known"), ("other", "elsewhere"), ("other", "mixed")} | open_ones
        assert store.atomically(lambda tx: tx.room(SFU, "mixed")) == plain_room("mixed", room_sid="", started_by="", looked_at=0.0)._replace(
            due=NOW + 1, asked=NOW + 1
        )
        known = store.atomically(lambda tx: tx.room(SFU, "known"))
        assert known is not None
        assert known.room_sid == "RM_known"


def test_of_endings_that_were_under_way_nobody_knows_whether_they_got_through() -> None:
    """And of no others: what was not claimed was not sent, and a restart ends nothing."""
    with opened() as store:
        endings = [row(Presence.GONE), row(state=State.SUPERSEDED), row(lane=Lane.END)]
        insert(store, *(claimed(there) for there in endings), *endings, claimed(row()), row(), claimed(row(Presence.AWAY)))
        insert_tried = row(Presence.GONE, end_tried=True, id=10, delay_id="delay-10")
        store.atomically(lambda tx: tx.insert(insert_tried))
        assert store.recover(NOW + 1, POLICY, clock_unsure=False) == 5
        assert [there.end_tried for there in stored(store)] == [True] * 3 + [False] * 6 + [True]
        assert not any(there.claimed for there in stored(store))


# ── indexes ──


HOT = {
    "_OF_ROOM": "uq_delayed_event_participant (sfu=? AND room=?)",
    "_OF_DELEGATION": "ix_delayed_event_delegation (delegation=?)",
    "_GET": "INTEGER PRIMARY KEY (rowid=?)",
    "_TODO": "ix_delayed_event_schedule (homeserver=? AND lane=? AND due<?)",
    "_TODO_IN_TIME": "ix_delayed_event_schedule (homeserver=? AND lane=? AND due<?)",
    "_TODO_HARMED": "ix_delayed_event_schedule (homeserver=? AND lane=? AND due<?)",
    "_NEXT_DUE": "ix_delayed_event_schedule (homeserver=? AND lane=? AND due>?)",
    "_DELETE": "INTEGER PRIMARY KEY (rowid=?)",
    "_DELETE_HISTORY": "ix_history_event (event=?)",
    "_HISTORY": "ix_history_event (event=?)",
    "_ROOM": "PRIMARY KEY (sfu=? AND name=?)",
    "_ROOMS_DUE": "ix_room_schedule (sfu=? AND routine=? AND due<?)",
    "_NEXT_ROOM_DUE": "ix_room_schedule (sfu=? AND routine=? AND due>?)",
    "_COUNTDOWNS": "ix_delayed_event_schedule (homeserver=? AND lane=? AND due>?)",
    "_OVERDUE": "ix_delayed_event_schedule (homeserver=? AND lane=? AND due<?)",
    "_DELETE_ROOM": "PRIMARY KEY (sfu=? AND name=?)",
}


def plan(store: SqliteStore, sql: str) -> list[str]:
    parameters = [None] * sql.count("?")
    return [detail for *_, detail in store._connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]


@pytest.mark.parametrize("name", list(HOT))
def test_every_hot_statement_uses_its_index(name: str) -> None:
    """And none scans a table, however many rows there are."""
    with opened() as store:
        steps = plan(store, getattr(sqlite, name))
        assert any(HOT[name] in step for step in steps), steps
        assert not any(step.startswith("SCAN") for step in steps), steps


@pytest.mark.parametrize("count", [1, 2, 16, sqlite.MANY])
def test_many_are_found_by_indexes(count: int) -> None:
    """Participants by both forms, and rooms; only the keys are scanned."""
    with opened() as store:
        participants = plan(store, sqlite._for_many(sqlite._OF_PARTICIPANTS, sqlite._PARTICIPANT_KEY, count))
        rooms = plan(store, sqlite._for_many(sqlite._ROOMS, sqlite._ROOM_KEY, count))
        for index, steps in (
            ("uq_delayed_event_participant (sfu=? AND room=? AND identity=?)", participants),
            ("ix_delayed_event_alias (sfu=? AND room=? AND alias=?)", participants),
            ("PRIMARY KEY (sfu=? AND name=?)", rooms),
        ):
            assert any(index in step for step in steps), steps
            assert {step for step in steps if step.startswith("SCAN")} <= {"SCAN wanted_1", "SCAN CONSTANT ROW", f"SCAN {count} CONSTANT ROWS"}
        assert any("INTEGER PRIMARY KEY (rowid=?)" in step for step in plan(store, sqlite._for_many(sqlite._GET_ALL, sqlite._EVENT_KEY, count)))


def test_updates_find_their_row_by_its_id() -> None:
    """Whatever columns they write."""
    with opened() as store:
        for columns in ((1,), (FIELDS.index("due"), FIELDS.index("claim")), tuple(range(1, len(FIELDS)))):
            assert all("INTEGER PRIMARY KEY (rowid=?)" in step for step in plan(store, sqlite._update_of(columns)[0]))


def test_an_update_names_only_what_differs() -> None:
    """A column that is not named costs no index maintenance."""
    sql, _ = sqlite._update_of(changed(row(), row()._replace(attempts=3)))
    assert sql == "UPDATE delayed_event SET attempts=? WHERE delayed_event.id = ?"


# ── failures ──


def test_a_full_disk_keeps_nothing_and_goes_on_when_there_is_space(tmp_path: Path) -> None:
    """Nothing of the step is kept, the error has the remedy, and no restart is needed."""
    with opened(tmp_path / "delegate.db") as store:
        engine = engine_on(store)
        engine.step([accept("D0", identity="p0")], NOW)
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        many = [accept(f"D{n}", identity=f"p{n}") for n in range(1, 200)]
        with pytest.raises(StoreUnavailable, match="disk is full: free some space"):
            engine.step(many, NOW)
        assert len(stored(store)) == 1
        store._connection.execute(f"PRAGMA max_page_count = {pages * 100}")
        assert not any(isinstance(reply, Exception) for reply in engine.step(many, NOW).replies)
        assert len(stored(store)) == 200


def test_a_read_only_database_is_said_to_be_so(tmp_path: Path) -> None:
    """With the remedy; and it goes on when it may be written again."""
    with opened(tmp_path / "delegate.db") as store:
        engine = engine_on(store)
        store._connection.execute("PRAGMA query_only = 1")
        with pytest.raises(StoreUnavailable, match="check the owner and the file system"):
            engine.step([accept("D1")], NOW)
        store._connection.execute("PRAGMA query_only = 0")
        engine.step([accept("D1")], NOW)
        assert len(stored(store)) == 1


def test_numbers_of_new_rows_are_not_used_up_by_work_that_raises(tmp_path: Path) -> None:
    """They are counted in memory."""
    with opened(tmp_path / "delegate.db") as store:

        def work(tx: Any) -> None:
            tx.insert(row(id=tx.new_id()))
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            store.atomically(work)
        assert store.atomically(lambda tx: tx.new_id()) == 1


def test_errors_do_not_quote_what_is_stored(tmp_path: Path) -> None:
    """Neither a delay_id nor a token gets into the text for the operator."""
    with opened(tmp_path / "delegate.db") as store:
        secret = row(delay_id="very-secret-delay-id", token=b"very-secret-token")
        store._connection.execute("PRAGMA query_only = 1")
        with pytest.raises(StoreUnavailable) as error:
            store.atomically(lambda tx: tx.insert(secret))
        assert "secret" not in f"{error.value!r} {error.value.__cause__!r}"


def log_of(path: Path) -> os.stat_result:
    return os.stat(f"{path}-wal")


def checkpointed(store: SqliteStore) -> bool:
    """Has everything in the log been carried over? Asking does it, so it is asked for by what happens to the log's first bytes."""
    return store._connection.total_changes == store._checkpointed


def under_load(store: SqliteStore) -> bool:
    """Is there something to be done that cannot wait?"""
    return store.is_log_large


def test_the_write_ahead_log_is_begun_anew_when_there_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By idle() when some rows have been written, and under load only when many have."""
    with opened(tmp_path / "delegate.db") as store:
        insert(store, *[row(identity=f"p{n}") for n in range(500)])
        monkeypatch.setattr(sqlite, "CHECKPOINT_IDLE_ABOVE", 1000)
        store.idle()
        assert not under_load(store)
        assert not checkpointed(store)
        monkeypatch.setattr(sqlite, "CHECKPOINT_IDLE_ABOVE", 499)
        store.idle()
        assert checkpointed(store)
        monkeypatch.setattr(sqlite, "CHECKPOINT_ABOVE", 10)
        for n in range(11):
            store.atomically(lambda tx, n=n: tx.insert(row(identity=f"q{n}")._replace(id=501 + n)))  # type: ignore[misc]
        assert under_load(store)
        store.checkpoint()
        assert not under_load(store)
        assert checkpointed(store)
        # From there on, what is written takes the place of what was there.
        before = (tmp_path / "delegate.db-wal").read_bytes()
        store.atomically(lambda tx: tx.insert(row(identity="later")._replace(id=600)))
        after = (tmp_path / "delegate.db-wal").read_bytes()
        assert len(after) == len(before)
        assert after[:32] != before[:32]
        assert len(stored(store)) == 512


def test_the_write_ahead_log_has_its_length_from_the_start_on(tmp_path: Path) -> None:
    """A file that grows with each commit makes commits slow. Nothing of what was written for that is left in the database."""
    path = tmp_path / "delegate.db"
    with opened(path) as store:
        length = log_of(path).st_size
        assert length >= sqlite.LOG_SIZE
        insert(store, *[row(identity=f"p{n}") for n in range(100)])
        assert log_of(path).st_size == length
        tables = {name for (name,) in store._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert "lengthening" not in tables
        assert store._connection.execute("PRAGMA freelist_count").fetchone() == (0,)
        assert store._connection.execute("PRAGMA cache_size").fetchone() == (sqlite.CACHE_SIZE,)
    with opened(path) as store:
        assert len(stored(store)) == 100


def test_a_disk_without_room_for_the_log_s_length_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as long as it is. Nor does it take the last of the space."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sqlite.LOG_SIZE // 4, before[1]))
    try:
        with opened(tmp_path / "delegate.db") as store:
            insert(store, row())
            assert log_of(tmp_path / "delegate.db").st_size <= sqlite.LOG_SIZE // 4
            assert len(stored(store)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(sqlite, "LOG_NEEDS_FREE", 1 << 60)
    with opened(tmp_path / "other.db") as store:
        insert(store, row())
        assert log_of(tmp_path / "other.db").st_size < sqlite.LOG_SIZE // 4


def pragmas(store: SqliteStore, work: Callable[[], object]) -> list[str]:
    """What is asked of the database itself while that is done, in order."""
    statements: list[str] = []
    store._connection.set_trace_callback(statements.append)
    try:
        work()
    finally:
        store._connection.set_trace_callback(None)
    return [statement.removeprefix("PRAGMA ") for statement in statements if statement.startswith("PRAGMA ")]


PATIENT = f"busy_timeout={round(sqlite.PATIENCE * 1000)}"


def test_a_checkpoint_waits_for_nobody_who_reads(tmp_path: Path) -> None:
    """Nothing would be stored meanwhile. As long as somebody does, such as a backup, it counts as not done, and is tried again."""
    path = tmp_path / "delegate.db"
    with opened(path) as store:
        insert(store, *[row(identity=f"p{n}") for n in range(500)])
        with closing(sqlite3.connect(path)) as backup:
            backup.execute("BEGIN")
            assert backup.execute("SELECT count(*) FROM delayed_event").fetchone() == (500,)
            for _ in range(2):
                assert pragmas(store, store.idle) == ["busy_timeout=0", "wal_checkpoint(RESTART)", PATIENT]
                assert store._connection.execute("PRAGMA busy_timeout").fetchone() == (sqlite.PATIENCE * 1000,)
                assert not checkpointed(store)
            store.atomically(lambda tx: tx.insert(row(identity="later")._replace(id=600)))
        assert pragmas(store, store.idle) == ["busy_timeout=0", "wal_checkpoint(RESTART)", PATIENT]
        assert checkpointed(store)
        assert pragmas(store, store.idle) == []


class _Interrupted:
    """A connection with which no checkpoint can be made."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        if "wal_checkpoint" in sql:
            raise sqlite3.OperationalError("disk I/O error")
        return self._connection.execute(sql, *parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def test_a_checkpoint_that_fails_leaves_the_patience_with_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be stored afterwards waits for another process's lock as before."""
    with opened(tmp_path / "delegate.db") as store:
        insert(store, *[row(identity=f"p{n}") for n in range(500)])
        with monkeypatch.context() as patch:
            patch.setattr(store, "_connection", _Interrupted(store._connection))
            with pytest.raises(StoreUnavailable):
                store.idle()
        assert store._connection.execute("PRAGMA busy_timeout").fetchone() == (sqlite.PATIENCE * 1000,)
        assert not checkpointed(store)


def test_where_the_disk_is_nearly_full_a_checkpoint_gives_the_log_s_space_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: others need it more. And a log that had to be long is cut in any case."""
    monkeypatch.setattr(sqlite, "LOG_NEEDS_FREE", 1 << 60)
    path = tmp_path / "delegate.db"
    with opened(path) as store:
        insert(store, *[row(identity=f"p{n}") for n in range(500)])
        assert log_of(path).st_size > 0
        assert "wal_checkpoint(TRUNCATE)" in pragmas(store, store.idle)
        assert log_of(path).st_size == 0
        assert checkpointed(store)
        assert store._connection.execute("PRAGMA journal_size_limit").fetchone() == (sqlite.LOG_MOST,)
        assert len(stored(store)) == 500


def test_a_log_that_had_to_be_longer_is_cut(tmp_path: Path) -> None:
    """To LOG_MOST, wherever there is space for its usual length."""
    with opened(tmp_path / "delegate.db") as store:
        assert store._connection.execute("PRAGMA journal_size_limit").fetchone() == (sqlite.LOG_MOST,)


# ── a kill ──

WORKER = """
import sys
from random import Random
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.engine import Engine, Limits
from sfu_delegate.store.sqlite import SqliteStore
from tests.rows import NOW, accept, joined, left
store = SqliteStore(sys.argv[1])
store.recover(NOW, Policy(), clock_unsure=False)
engine = Engine(store, Policy(), Limits(), Random(0))
prefix, n = sys.argv[2], 0
while True:
    names = [f"{prefix}-{n}-{i}" for i in range(3)]
    inputs = [accept(name, identity=name, room=f"r{n}") for name in names]
    inputs += [joined(identity=name, room=f"r{n}") for name in names]
    inputs += [left("S1", "ROOM_DELETED", identity=names[0], room=f"r{n}")]
    engine.step(inputs, NOW + n)
    print(*names, flush=True)
    n += 1
"""


def kill_one(path: Path, prefix: str, acknowledgements: int) -> list[str]:
    """Run the worker until it has acknowledged so many steps, kill it, and return every delegation that it acknowledged."""
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(path), prefix], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    try:
        lines = [worker.stdout.readline() for _ in range(acknowledgements)]
        os.kill(worker.pid, signal.SIGKILL)
        rest = worker.stdout.read()
        lines += [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    finally:
        worker.kill()
        worker.wait(60)
        worker.stdout.close()
    assert all(lines)
    return [name for line in lines for name in line.split()]


def assert_kept(path: Path, names: list[str]) -> None:
    """Everything acknowledged is there, with what was heard of it, and the database is whole."""
    with opened(path) as store:
        engine = engine_on(store)
        for name, reply in zip(names, engine.step([Find(name) for name in names], NOW).replies, strict=True):
            assert isinstance(reply, Found)
            (there,) = reply.rows
            assert there.presence is (Presence.GONE if name.endswith("-0") else Presence.CONNECTED)
            assert "delegated" in {note.what for note in reply.history}
        assert store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def kill_rounds(path: Path, rounds: int, seed: int) -> None:
    random = Random(seed)
    names: list[str] = []
    for n in range(rounds):
        names += kill_one(path, f"run{n}", random.randint(3, 40))
        assert_kept(path, names)


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    """Three times killed in the middle of its work, on one database."""
    kill_rounds(tmp_path / "delegate.db", 3, 1)


@pytest.mark.slow
def test_what_was_acknowledged_survives_many_kills(tmp_path: Path) -> None:
    """Thirty times."""
    kill_rounds(tmp_path / "delegate.db", 30, 2)


# ── from one version to the next ──


def make_first_version(path: Path, rows: Sequence[DelayedEvent]) -> None:
    """A database as the first version left it, with these rows, and one room that somebody waits to be looked at."""
    database = create_engine(f"sqlite:///{path}")
    try:
        with database.begin() as connection:
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "0001")
    finally:
        database.dispose()
    with closing(sqlite3.connect(path)) as plain:
        known = FIELDS[: FIELDS.index("twin")]
        marks = ", ".join("?" * len(known))
        plain.executemany(f"INSERT INTO delayed_event ({', '.join(known)}) VALUES ({marks})", [values_of(there)[: len(known)] for there in rows])
        plain.execute(
            "INSERT INTO room (sfu, name, room_sid, started_by, started_at, doubt_until, looked_at, due, failures, claim, claimed) "
            "VALUES ('main', 'known', 'RM1', 'EV1', 5.0, 7.0, 8.0, 9.0, 2, 3, 1)"
        )
        plain.commit()


def test_a_filled_database_of_the_first_version_keeps_its_rooms(tmp_path: Path) -> None:
    """Doubt, sids, claims and due times go over; every open delegation has a room after the start; nothing of its events is lost."""
    path = tmp_path / "delegate.db"
    made = [row(room="known"), row(Presence.AWAY, room="unknown"), row(state=State.DONE, room="over")]
    before = [there._replace(id=n, delay_id=f"delay-{n}") for n, there in enumerate(made, 1)]
    make_first_version(path, before)
    with opened(path) as store:
        assert stored(store) == before
        kept = Room(SFU, "known", "RM1", "EV1", 0.0, False, 7.0, 8.0, None, 9.0, False, 2, 3, True)
        assert rooms(store) == {"known": kept}
        store.recover(NOW, POLICY, clock_unsure=False)
        assert set(rooms(store)) == {"known", "unknown"}
        assert rooms(store)["known"] == kept._replace(due=NOW, claimed=False, asked=NOW)
        assert len(engine_on(store).step((), NOW).tasks) == 2
        assert store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("killed_at", range(16))
def test_a_migration_that_is_cut_off_is_made_again_as_a_whole(tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its last step was: nothing of it is kept, and the next start makes all of it."""
    path = tmp_path / "delegate.db"
    before = row(room="known")._replace(id=1)
    make_first_version(path, [before])
    steps = itertools.count()

    def cut_off(made: Callable[..., object], *args: object, **more: object) -> object:
        if next(steps) == killed_at:
            raise KeyboardInterrupt
        return made(*args, **more)

    with monkeypatch.context() as patch:
        for name in ("drop_index", "rename_table", "create_table", "execute", "drop_table", "create_index", "add_column"):
            made = getattr(op, name)
            patch.setattr(op, name, partial(cut_off, made))
        with pytest.raises(KeyboardInterrupt):
            SqliteStore(path)
    with opened(path) as store:
        assert stored(store) == [before]
        assert set(rooms(store)) == {"known"}
