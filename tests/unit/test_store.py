"""The embedded database on a file: schema, locks, recovery, queries, failures, and what a kill leaves behind."""

import itertools
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
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
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sfu_delegate.delegation.model import Action, DelayedEvent, Find, Lane, Looked, Note, OnEnd, Outcome, Presence, Room, Session, State, Verdict
from sfu_delegate.delegation.replies import Found
from sfu_delegate.delegation.urgency import Limit
from sfu_delegate.engine import Engine, Limits
from sfu_delegate.store import sqlite
from sfu_delegate.store.base import DatabaseInUse, DatabaseTooNew, KnownHomeserver, KnownSfu, StoreUnavailable, Transaction
from sfu_delegate.store.migrate import alembic_config
from sfu_delegate.store.rows import FIELDS, changed, values_of
from sfu_delegate.store.schema import metadata
from sfu_delegate.store.sqlite import SqliteStore
from sqlalchemy import create_engine

from tests.rows import DELAY, HOMESERVER, NOW, POLICY, ROOM, SFU, accept, answered, claimed, joined, listed, row

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


def test_a_second_start_finds_everything_as_it_was(tmp_path: Path) -> None:
    """Rows, rooms, history, the clock's mark, and the numbers of new rows."""
    path = tmp_path / "delegate.db"
    room = Room(SFU, ROOM, "RM1", "EV1", 1.0, True, 2.0, 3.0, 4.0, NOW, True, 4, 5, False)
    with opened(path) as store:
        rows = insert(store, row(), row(Presence.GONE))
        store.atomically(lambda tx: tx.save_room(room))
        store.atomically(lambda tx: tx.note([Note(2, NOW, "gone", "why")]))
        store.save_clock_mark("one")
        store.save_clock_mark("two")
        census = store.census()
    with opened(path) as store:
        assert stored(store) == rows
        assert store.atomically(lambda tx: (tx.room(SFU, ROOM), tx.history([1, 2]))) == (room, [Note(2, NOW, "gone", "why")])
        assert store.clock_mark() == "two"
        assert store.census() == census
        assert store.atomically(lambda tx: tx.new_id()) == 3


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
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(DatabaseTooNew, match=r"9999.*newer") as error:
            SqliteStore(path)
        assert str(path) in str(error.value)
    assert path.read_bytes() == before
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT version_num FROM schema_version").fetchone() == ("9999",)


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


def test_when_the_clock_was_set_every_countdown_is_unknown() -> None:
    """All live events are restarted soon, whether the clock went forward or back, and no time lies in the future."""
    for now in (NOW - 10**6, NOW + 10**6):
        with opened() as store:
            insert(store, row(), row(due=NOW + 50), row(Presence.AWAY), row(Presence.GONE), row(Presence.EXPECTED, State.SUPERSEDED))
            store.recover(now, POLICY, clock_unsure=True)
            for there in stored(store):
                assert there.due == now
                assert there.running_since <= now
                assert there.presence_since <= now
                assert there.harm is not None
                assert there.harm <= now + there.delay / 2
                assert there.look_at is None or there.look_at <= now


def test_when_the_clock_was_set_a_vanished_event_is_still_waited_for() -> None:
    """A 404 on a restart is nearly always a client that just hung up: it is not called lost without the wait."""
    with opened() as store:
        insert(store, row(state=State.VANISHED))
        store.recover(NOW + 1, POLICY, clock_unsure=True)
        engine_on(store).step((), NOW + 1)
        assert stored(store)[0].state is State.VANISHED


def test_what_is_finished_is_kept_no_longer_when_the_clock_was_set() -> None:
    """It is pruned at its time, or at the most its keeping time from now."""
    with opened() as store:
        insert(store, row(state=State.DONE, finished_at=NOW, due=NOW + POLICY.keep))
        store.recover(NOW - 10**6, POLICY, clock_unsure=True)
        (there,) = stored(store)
        assert there.due == NOW - 10**6 + POLICY.keep
        assert there.state is State.DONE


def test_after_a_start_everything_that_was_under_way_is_claimed_again(tmp_path: Path) -> None:
    """The engine on a reopened database takes up what its predecessor left."""
    path = tmp_path / "delegate.db"
    with opened(path) as store:
        first = engine_on(store).step([accept("D1"), joined()], NOW).tasks
        assert len(first) == 1
    with opened(path) as store:
        assert store.recover(NOW + 2, POLICY, clock_unsure=False) == 1
        again = [task for task in engine_on(store).step((), NOW + 2).tasks if task.action is not Action.LOOK]
        assert [(task.event, task.action) for task in again] == [(task.event, task.action) for task in first]
        assert again[0].claim == first[0].claim + 1


# ── round trips ──

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
TIME = st.floats(0, 2e10) | st.integers(0, 2 * 10**10).map(float)
MAYBE_TIME = st.none() | TIME
COUNT = st.integers(0, 2**62)
SESSIONS = st.lists(
    st.builds(
        Session,
        st.text(st.characters(codec="utf-8", exclude_characters=" "), max_size=8),
        st.integers(0, 2**62),
        st.booleans(),
        st.integers(0, 2 * 10**12).map(lambda ms: ms / 1000),
    ),
    max_size=4,
).map(tuple)

ROWS = st.builds(
    DelayedEvent,
    id=st.just(1),
    delegation=TEXT,
    sfu=TEXT,
    room=TEXT,
    identity=TEXT,
    alias=st.none() | TEXT,
    homeserver=TEXT,
    user=st.none() | TEXT,
    delay_id=TEXT,
    delay=TIME,
    on_end=st.sampled_from(OnEnd),
    token=st.none() | st.binary(max_size=9),
    accepted_at=TIME,
    verified_at=MAYBE_TIME,
    presence=st.sampled_from(Presence),
    presence_since=TIME,
    sessions=SESSIONS,
    reason=TEXT,
    attempt_at=TIME,
    look_at=MAYBE_TIME,
    state=st.sampled_from(State),
    running_since=TIME,
    restarts=COUNT,
    attempts=COUNT,
    end_tried=st.booleans(),
    outcome=st.sampled_from(Outcome),
    ended_at=MAYBE_TIME,
    finished_at=MAYBE_TIME,
    lane=st.none() | st.sampled_from(Lane),
    due=MAYBE_TIME,
    harm=MAYBE_TIME,
    claim=COUNT,
    claimed=st.booleans(),
)

ROOMS = st.builds(
    Room,
    sfu=TEXT,
    name=TEXT,
    room_sid=TEXT,
    started_by=TEXT,
    instance_at=TIME,
    finished=st.booleans(),
    doubt_until=TIME,
    looked_at=TIME,
    asked=MAYBE_TIME,
    due=MAYBE_TIME,
    routine=st.booleans(),
    failures=COUNT,
    claim=COUNT,
    claimed=st.booleans(),
)


@settings(max_examples=150)
@given(ROWS, ROWS)
def test_every_field_survives_insert_and_update(first: DelayedEvent, second: DelayedEvent) -> None:
    """What comes out is what went in, with the very types; and only what differs is written."""
    with opened() as store:
        store.atomically(lambda tx: tx.insert(first))
        assert stored(store) == [first]
        store.atomically(lambda tx: tx.update(first, second))
        (found,) = stored(store)
        assert found == second
        assert [type(value) for value in found] == [type(value) for value in second]
        assert {FIELDS[i] for i in changed(first, second)} == {name for name in FIELDS if getattr(first, name) != getattr(second, name)}


@settings(max_examples=50)
@given(
    ROOMS,
    ROOMS,
)
def test_every_field_of_a_room_survives(first: Room, second: Room) -> None:
    """Added, and replaced."""
    second = second._replace(sfu=first.sfu, name=first.name)
    with opened() as store:
        store.atomically(lambda tx: tx.save_room(first))
        assert store.atomically(lambda tx: tx.room(first.sfu, first.name)) == first
        store.atomically(lambda tx: tx.save_room(second))
        assert store.atomically(lambda tx: tx.room(first.sfu, first.name)) == second
        store.atomically(lambda tx: tx.delete_room(first.sfu, first.name))
        assert store.atomically(lambda tx: tx.room(first.sfu, first.name)) is None


# ── queries ──


def test_a_participant_is_found_by_either_identity() -> None:
    """Each row once, in the order of the ids; finished ones only when they are asked for."""
    with opened() as store:
        insert(store, row(identity="a", alias="b"), row(identity="b", alias="a"), row(identity="a", alias="a"), row(state=State.DONE, identity="a"))
        insert_more = row(identity="c")._replace(id=9, delay_id="delay-9")
        store.atomically(lambda tx: tx.insert(insert_more))

        def ids(identity: str, *, finished: bool) -> list[int]:
            rows = store.atomically(lambda tx: tx.of_participants([(SFU, ROOM, identity)], finished=finished))
            return [there.id for there in rows]

        assert ids("a", finished=False) == [1, 2, 3]
        assert ids("a", finished=True) == [1, 2, 3, 4]
        assert ids("b", finished=True) == [1, 2]
        assert ids("nobody", finished=True) == []


@pytest.mark.parametrize("others", [0, 1, 2, 3, sqlite.MANY, sqlite.MANY + 1])
def test_many_are_found_at_once(others: int) -> None:
    """However many are asked for: each row once, and each room that is there."""
    with opened() as store:
        insert(store, row(identity="a", alias="b"), row(identity="b"), row(identity="a", room="elsewhere"))
        there = Room(SFU, ROOM, "RM1", "EV1", NOW, True, 0.0, NOW, None, NOW + 60.0, False, 0, 3, True)
        store.atomically(lambda tx: tx.save_room(there))
        wanted = [(SFU, ROOM, "a"), (SFU, ROOM, "b"), (SFU, "elsewhere", "a"), *((SFU, ROOM, f"other{n}") for n in range(others))]
        assert [found.id for found in store.atomically(lambda tx: tx.of_participants(wanted, finished=False))] == [1, 2, 3]
        rooms = [(SFU, "elsewhere"), (SFU, ROOM), *((SFU, f"other{n}") for n in range(others))]
        assert store.atomically(lambda tx: tx.rooms(rooms)) == [there]
        assert [found.id for found in store.atomically(lambda tx: tx.get_all([3, 1, *range(10, 10 + others)]))] == [1, 3]


def test_what_is_due_comes_most_urgent_first_and_not_more_than_asked_for() -> None:
    """Of one homeserver and one lane."""
    with opened() as store:
        rows = [row(Presence.GONE, harm=NOW - n, due=NOW - 1) for n in (3, 1, 5, 2, 4)]
        insert(store, *rows, row(Presence.GONE, harm=NOW - 9, due=NOW + 1), row(Presence.GONE, homeserver="other.test"), row(due=NOW))
        found = store.atomically(lambda tx: tx.todo(HOMESERVER, Lane.END, 3, NOW))
        assert {there.id for there in found} == {3, 5, 1}
        assert store.atomically(lambda tx: tx.next_due(HOMESERVER)) == NOW - 1
        assert store.atomically(lambda tx: tx.next_due("nobody.test")) is None


def test_what_has_come_to_harm_is_told_from_what_has_not() -> None:
    """So that neither hides the other."""
    with opened() as store:
        insert(store, *(row(harm=harm, due=NOW - 1) for harm in (NOW + 1, NOW - 2, NOW + 3, NOW, None)))
        in_time = store.atomically(lambda tx: tx.todo(HOMESERVER, Lane.RESTART, 5, NOW, harmed=False))
        late = store.atomically(lambda tx: tx.todo(HOMESERVER, Lane.RESTART, 5, NOW, harmed=True))
        assert [{there.id for there in found} for found in (in_time, late)] == [{1, 3}, {2, 4, 5}]


def test_deleting_a_row_deletes_its_history() -> None:
    """And nobody else's."""
    with opened() as store:
        insert(store, row(), row())
        store.atomically(lambda tx: tx.note([Note(1, NOW, "a", ""), Note(2, NOW, "b", "")]))
        store.atomically(lambda tx: tx.delete(1))
        assert store.atomically(lambda tx: tx.history([1, 2])) == [Note(2, NOW, "b", "")]


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


def test_work_that_raises_is_undone(tmp_path: Path) -> None:
    """The error comes through as it is, and the numbers of new rows are not used up."""
    with opened(tmp_path / "delegate.db") as store:

        def work(tx: Any) -> None:
            tx.insert(row(id=tx.new_id()))
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            store.atomically(work)
        assert stored(store) == []
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


# ── rooms, and what is learned ──


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


def test_urgent_rooms_are_due_before_routine_ones() -> None:
    """However long those have been due; and not more than asked for."""
    with opened() as store:
        save(store, *[plain_room(f"r{n}", due=NOW - 100 - n) for n in range(5)], *[plain_room(f"u{n}", due=NOW - n, routine=False) for n in range(3)])
        save(store, plain_room("later", due=NOW + 1, routine=False))
        found = store.atomically(lambda tx: [room.name for room in tx.rooms_due(SFU, 5, NOW)])
        assert found == ["u2", "u1", "u0", "r4", "r3"]
        assert store.atomically(lambda tx: tx.rooms_due("other", 5, NOW)) == []
        assert store.atomically(lambda tx: tx.next_room_due(SFU)) == NOW - 104
        assert store.atomically(lambda tx: tx.next_room_due("other")) is None


@pytest.mark.parametrize("sfu", [SFU, None])
def test_asking_for_all_rooms_takes_nothing_from_those_that_are_waited_for(sfu: str | None) -> None:
    """All come now, those that somebody waits for still before the others; one that is under way is remembered to be too old."""
    with opened() as store:
        save(store, plain_room("routine", due=NOW + 50), plain_room("none"), plain_room("urgent", due=NOW + 2, routine=False))
        save(store, plain_room("claimed", due=NOW + 15, claimed=True), plain_room("overdue", due=NOW - 50), plain_room("x", sfu="other"))
        store.atomically(lambda tx: tx.ask_rooms(sfu, NOW))
        after = {room.name: (room.due, room.routine, room.claimed, room.asked) for room in rooms(store).values()}
        assert after == {
            "routine": (NOW, True, False, NOW),
            "none": (NOW, True, False, NOW),
            "urgent": (NOW, False, False, NOW),
            "claimed": (NOW + 15, True, True, NOW),
            "overdue": (NOW - 50, True, False, NOW),
        }
        other = store.atomically(lambda tx: tx.room("other", "x"))
        assert other is not None
        assert other.asked == (None if sfu else NOW)


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


def test_when_the_clock_was_set_an_event_that_was_let_run_is_still_kept() -> None:
    """Its participant may be there: it has not run out before its time, counted anew."""
    for back in (-(10**6), 10**6):
        with opened() as store:
            insert(store, row(state=State.ADRIFT))
            store.recover(NOW + back, POLICY, clock_unsure=True)
            engine = engine_on(store)
            engine.step((), NOW + back)
            (there,) = stored(store)
            assert there.state is State.ADRIFT
            assert there.harm == NOW + back + there.delay + POLICY.adrift_keep


@pytest.mark.parametrize("back", [60.0, 900.0, 3600.0, 10**6])
def test_when_the_clock_went_back_rooms_are_looked_at_as_ever(back: float) -> None:
    """Sessions that were heard of in the future neither stop the looks nor make them one after another."""
    now = NOW - 60.0 - back
    with opened() as store:
        insert(store, row())
        store.recover(now, POLICY, clock_unsure=True)
        engine = engine_on(store)
        looked_at = 0
        for _ in range(20):
            step = engine.step((), now)
            looks = [Looked(SFU, ROOM, task.claim, now, (listed(),)) for task in step.tasks if task.action is Action.LOOK]
            looked_at += len(looks)
            answers = [answered(row(id=task.event, claim=task.claim), task.action, Verdict.DONE, sent_at=now) for task in step.tasks if task.event]
            step = engine.step([*looks, *answers], now)
            assert not any(isinstance(reply, Exception) for reply in step.replies)
            assert step.wake is not None
            now = max(now + 0.001, step.wake)
            if now > NOW - 60.0 - back + 5 * POLICY.interval:
                break
        assert 2 <= looked_at <= 7


def test_what_was_learned_is_kept() -> None:
    """Of homeservers and SFUs; the last word counts."""
    with opened() as store:
        homeservers = [KnownHomeserver("a.test", Limit.SOME, 2.5, 7.0), KnownHomeserver("b.test", Limit.NONE, 1.0, 5.0)]
        sfus = [KnownSfu("main", NOW, None), KnownSfu("other", None, NOW)]
        for known in (KnownHomeserver("a.test", Limit.UNKNOWN, 1.0, 5.0), *homeservers):
            store.atomically(lambda tx, known=known: tx.save_homeserver(known))  # type: ignore[misc]
        for sfu in (KnownSfu("main", None, None), *sfus):
            store.atomically(lambda tx, sfu=sfu: tx.save_sfu(sfu))  # type: ignore[misc]
        census = store.census()
        assert sorted(census.homeservers) == homeservers
        assert sorted(census.sfus) == sfus


def test_the_load_of_a_homeserver_is_what_its_open_events_need() -> None:
    """Restarts a second at the least: the sum of 1/delay."""
    with opened() as store:
        insert(store, row(delay=10.0), row(delay=4.0), row(delay=1.0, state=State.DONE), row(delay=2.0, homeserver="other.test"))
        assert store.census().load == pytest.approx({HOMESERVER: 0.35, "other.test": 0.5})


GROUPS = st.tuples(st.sampled_from(["a.test", "b.test", "c.test"]), st.sampled_from(State), st.sampled_from(Presence))


@st.composite
def populations(draw: st.DrawFn) -> list[DelayedEvent]:
    """Rows with ids that may be far apart; most of them, or few, are in one group, and some are of any."""
    several = draw(st.lists(GROUPS, min_size=1, max_size=6))
    groups = draw(st.lists(st.sampled_from(several), max_size=40)) + [several[0]] * draw(st.sampled_from([0, 1, 300]))
    gap = draw(st.sampled_from([1, 2, 7, 1000, 10**9]))
    random = Random(draw(st.integers(0, 2**32)))
    random.shuffle(groups)
    rows, id = [], 0
    for homeserver, state, presence in groups:
        id += random.randint(1, gap)
        more: dict[str, Any] = {"delay": random.choice([1.0, 30.0, 3600.0, 1e6]), "token": random.choice([None, None, b"sealed"])}
        more |= {"due": random.choice([None, NOW - 50.0, NOW, NOW + random.random()]), "lane": random.choice(list(Lane))}
        rows.append(row(presence, state, homeserver=homeserver, id=id, delay_id=f"delay-{id}", **more))
    return rows


@settings(max_examples=60, deadline=None)
@given(populations())
@example([])
@example([row(id=10**12)])
@example([row(presence, id=n, delay_id=f"{n}", delay=n * 10.0, token=None if n % 2 else b"sealed") for n, presence in enumerate([*Presence] * 2, 1)])
@example([row(id=1, delay_id="near"), row(state=State.DONE, id=10**9, delay_id="far")])
@example([row(id=1, delay_id="near"), row(homeserver="other.test", id=2 * 10**9 + 1, delay_id="far")])
def test_the_census_is_what_counting_row_by_row_comes_to(rows: list[DelayedEvent]) -> None:
    """Whichever group most rows are in, if any, and wherever there are gaps between the ids."""

    def work(tx: Transaction) -> None:
        for there in rows:
            tx.insert(there)

    with opened() as store:
        store.atomically(work)
        store.last_id = max((there.id for there in rows), default=0)  # as a start finds it
        census = store.census()
        load: dict[str, float] = {}
        schedule: dict[str, float] = {}
        for there in rows:
            if there.state is not State.DONE and there.token is None:
                load[there.homeserver] = load.get(there.homeserver, 0.0) + 1 / there.delay
            if there.due is not None:
                schedule[there.homeserver] = min(there.due, schedule.get(there.homeserver, there.due))
        assert census.states == Counter((there.homeserver, there.state.value, there.presence.value) for there in rows)
        assert census.load == pytest.approx(load)
        assert census.schedule == schedule


def test_countdowns_are_the_restarts_that_are_to_come() -> None:
    """Of one homeserver, by their deadlines, and whether those are known; departures, and what is let run, are not among them."""
    with opened() as store:
        insert(
            store,
            row(running_since=NOW - 10),
            row(running_since=NOW - 30, verified_at=None),
            row(Presence.GONE),
            row(state=State.ADRIFT),
            row(homeserver="other.test"),
            row(state=State.SUPERSEDED, running_since=NOW - 20),
        )
        found = store.atomically(lambda tx: list(tx.countdowns(HOMESERVER)))
        known = [(countdown.event, countdown.known) for countdown in found]
        assert known == [(2, False), (6, True), (1, True)]
        assert [countdown.harm for countdown in found] == sorted(countdown.harm for countdown in found)


def test_the_most_overdue_restart_is_found() -> None:
    """Its deadline, of those that are due and known."""
    with opened() as store:
        insert(
            store,
            row(running_since=NOW - DELAY - 9, due=NOW - 5),
            row(running_since=NOW - DELAY - 50, due=NOW - 5, verified_at=None),
            row(running_since=NOW - DELAY - 90, due=NOW + 5),
        )
        assert store.overdue(HOMESERVER, NOW) == NOW - 9
        assert store.overdue("other.test", NOW) is None


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
        marks = ", ".join("?" * len(FIELDS))
        plain.executemany(f"INSERT INTO delayed_event ({', '.join(FIELDS)}) VALUES ({marks})", [values_of(there) for there in rows])
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


@pytest.mark.parametrize("killed_at", range(8))
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
        for name in ("drop_index", "rename_table", "create_table", "execute", "drop_table", "create_index"):
            made = getattr(op, name)
            patch.setattr(op, name, partial(cut_off, made))
        with pytest.raises(KeyboardInterrupt):
            SqliteStore(path)
    with opened(path) as store:
        assert stored(store) == [before]
        assert set(rooms(store)) == {"known"}


def test_what_a_client_s_token_restarts_does_not_count_for_our_rate() -> None:
    """It has a limit of its own."""
    with opened() as store:
        insert(store, row(delay_id="ours")._replace(id=1), row(delay_id="theirs", token=b"sealed")._replace(id=2))
        assert [c.event for c in store.atomically(lambda tx: list(tx.countdowns(HOMESERVER)))] == [1]
        assert store.census().load == {HOMESERVER: 1 / DELAY}
