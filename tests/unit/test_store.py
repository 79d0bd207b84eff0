"""What any store does, on both databases: rows and rooms that go in and come out, queries, failures, and what is counted."""

import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sfu_delegate.delegation.model import Action, DelayedEvent, Lane, Looked, Note, OnEnd, Outcome, Presence, Room, Session, State, Verdict
from sfu_delegate.delegation.urgency import Limit
from sfu_delegate.engine import Engine, Limits
from sfu_delegate.store.base import DatabaseTooNew, KnownHomeserver, KnownSfu, Participant, Store, Transaction, ValueRefused
from sfu_delegate.store.migrate import VERSION_TABLE
from sfu_delegate.store.rows import FIELDS, changed
from sfu_delegate.store.schema import metadata
from sfu_delegate.store.sqlite import MANY, SqliteStore
from sqlalchemy import create_engine

from tests import stores
from tests.rows import DELAY, HOMESERVER, NOW, POLICY, ROOM, SFU, accept, answered, claimed, joined, listed, row
from tests.stores import new_store, opened, room_of, save_rooms, select, stored


@pytest.fixture(params=stores.KINDS, scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    """Which database it is."""
    return str(request.param)


@pytest.fixture
def store(kind: str) -> Iterator[Store]:
    """An empty one."""
    with new_store(kind) as store:
        yield store


@pytest.fixture(scope="module")
def lasting(kind: str) -> Iterator[Store]:
    """One for all examples of all tests, each of which leaves it empty: to open one takes longer than most examples."""
    with new_store(kind) as store:
        yield store


@pytest.fixture
def place(kind: str, tmp_path: Path) -> Iterator[str]:
    """Where one can be opened several times."""
    with stores.place(kind, tmp_path) as place:
        yield place


def insert(store: Store, *rows: DelayedEvent) -> list[DelayedEvent]:
    """Rows with ids of their own."""
    numbered = [there._replace(id=n, delay_id=f"delay-{n}") for n, there in enumerate(rows, 1)]
    stores.insert(store, numbered)
    return numbered


def engine_on(store: Store) -> Engine:
    return Engine(store, POLICY, Limits(), Random(0))


# ── schema ──


def test_the_migrations_make_the_schema_of_this_version(place: str) -> None:
    """Alembic finds nothing to change between the migrated database and the tables of the program."""
    with opened(place):
        pass
    database = create_engine(place.replace("postgresql:", "postgresql+psycopg:") if place.startswith("postgresql:") else f"sqlite:///{place}")
    try:
        with database.connect() as connection:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
            assert compare_metadata(context, metadata) == []
    finally:
        database.dispose()


@pytest.mark.parametrize("oldest", ["0003", "9998", None])
def test_a_newer_database_says_who_can_work_with_it(kind: str, tmp_path: Path, oldest: str | None) -> None:
    """Where it does not say that this version can, it is refused, with a sentence that says what to do. Nothing is touched either way."""
    with stores.fresh_place(kind, tmp_path) as place:
        with opened(place) as store:
            select(store, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
            if oldest is None:
                select(store, "DELETE FROM meta WHERE key = 'oldest_schema'")
            elif oldest == "9998":
                select(store, "UPDATE meta SET value = '9998' WHERE key = 'oldest_schema'")
        if oldest == "0003":
            with opened(place) as store:
                insert(store, row())
                assert len(stored(store)) == 1
        else:
            with pytest.raises(DatabaseTooNew, match=r"9999.*newer"), opened(place):
                pass


def test_a_second_start_finds_everything_as_it_was(place: str) -> None:
    """Rows, rooms, history, what was counted; and the numbers of new rows are new ones."""
    room = Room(SFU, ROOM, "RM1", "EV1", 1.0, True, 2.0, 3.0, 4.0, NOW, True, 4, 5, False)

    def work(tx: Transaction) -> list[DelayedEvent]:
        rows = [there._replace(id=tx.new_id(), delay_id=f"delay-{n}") for n, there in enumerate((row(), row(Presence.GONE)))]
        for there in rows:
            tx.insert(there)
        tx.note([Note(rows[1].id, NOW, "gone", "why")])
        return rows

    with opened(place) as store:
        rows = store.atomically(work)
        save_rooms(store, [room])
        census = store.census()
    with opened(place) as store:
        assert stored(store) == rows
        assert room_of(store, ROOM) == room
        assert store.atomically(lambda tx: tx.history([there.id for there in rows])) == [Note(rows[1].id, NOW, "gone", "why")]
        assert store.census() == census
        assert store.atomically(lambda tx: tx.new_id()) > max(there.id for there in rows)


# ── recovery ──


def test_when_the_clock_was_set_every_countdown_is_unknown(kind: str) -> None:
    """All live events are restarted soon, whether the clock went forward or back, and no time lies in the future."""
    for now in (NOW - 10**6, NOW + 10**6):
        with new_store(kind) as store:
            insert(store, row(), row(due=NOW + 50), row(Presence.AWAY), row(Presence.GONE), row(Presence.EXPECTED, State.SUPERSEDED))
            store.recover(now, POLICY, clock_unsure=True)
            for there in stored(store):
                assert there.due == now
                assert there.running_since <= now
                assert there.presence_since <= now
                assert there.harm is not None
                assert there.harm <= now + there.delay / 2
                assert there.look_at is None or there.look_at <= now


def test_when_the_clock_was_set_a_vanished_event_is_still_waited_for(store: Store) -> None:
    """A 404 on a restart is nearly always a client that just hung up: it is not called lost without the wait."""
    insert(store, row(state=State.VANISHED))
    store.recover(NOW + 1, POLICY, clock_unsure=True)
    engine_on(store).step((), NOW + 1)
    assert stored(store)[0].state is State.VANISHED


def test_what_is_finished_is_kept_no_longer_when_the_clock_was_set(store: Store) -> None:
    """It is pruned at its time, or at the most its keeping time from now."""
    insert(store, row(state=State.DONE, finished_at=NOW, due=NOW + POLICY.keep))
    store.recover(NOW - 10**6, POLICY, clock_unsure=True)
    (there,) = stored(store)
    assert there.due == NOW - 10**6 + POLICY.keep
    assert there.state is State.DONE


def test_after_a_start_everything_that_was_under_way_is_claimed_again(place: str) -> None:
    """The engine on a reopened database takes up what its predecessor left: at once, or where another one may be at it, when the lease is over."""
    with opened(place) as store:
        first = engine_on(store).step([accept("D1"), joined()], NOW).tasks
        assert len(first) == 1
    with opened(place) as store:
        now = NOW + (POLICY.lease if store.shared else 2)
        assert store.recover(NOW + 2, POLICY, clock_unsure=False) == (0 if store.shared else 1)
        again = [task for task in engine_on(store).step((), now).tasks if task.action is not Action.LOOK]
        assert [(task.event, task.action) for task in again] == [(task.event, task.action) for task in first]
        assert again[0].claim == first[0].claim + 1


def test_what_others_have_claimed_is_theirs_where_instances_share_the_database() -> None:
    """A start changes nothing of it: nobody knows that they are gone."""
    with new_store("postgresql") as store:
        rows = insert(store, claimed(row()), claimed(row(Presence.GONE)), row(state=State.SUPERSEDED))
        room = plain_room(due=NOW + 15, claimed=True)
        save_rooms(store, [room])
        assert store.recover(NOW + 1, POLICY, clock_unsure=False) == 0
        assert stored(store) == rows
        assert room_of(store, ROOM) == room


# ── round trips ──

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
TIME = st.floats(0, 2e10) | st.integers(0, 2 * 10**10).map(float)
MAYBE_TIME = st.none() | TIME
COUNT = st.integers(0, 2**31 - 1)
SESSIONS = st.lists(
    st.builds(
        Session,
        st.text(st.characters(codec="utf-8", exclude_characters=" \0"), max_size=8),
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
    twin=st.none() | TEXT,
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
@given(first=ROWS, second=ROWS)
def test_every_field_survives_insert_and_update(lasting: Store, first: DelayedEvent, second: DelayedEvent) -> None:
    """What comes out is what went in, with the very types; and only what differs is written."""
    try:
        lasting.atomically(lambda tx: tx.insert(first))
        assert stored(lasting) == [first]
        lasting.atomically(lambda tx: tx.update(first, second))
        (found,) = stored(lasting)
        assert found == second
        assert [type(value) for value in found] == [type(value) for value in second]
        assert {FIELDS[i] for i in changed(first, second)} == {name for name in FIELDS if getattr(first, name) != getattr(second, name)}
    finally:
        lasting.atomically(lambda tx: tx.delete(first.id))


@settings(max_examples=50)
@given(first=ROOMS, second=ROOMS)
def test_every_field_of_a_room_survives(lasting: Store, first: Room, second: Room) -> None:
    """Added, and replaced."""
    second = second._replace(sfu=first.sfu, name=first.name)
    try:
        for there in (first, second):
            save_rooms(lasting, [there])
            found = room_of(lasting, first.name, first.sfu)
            assert found == there
            assert [type(value) for value in found] == [type(value) for value in there]
    finally:
        lasting.atomically(lambda tx: tx.delete_room(first.sfu, first.name))
    assert room_of(lasting, first.name, first.sfu) is None


NUL = "nobody\0"


def test_a_text_with_a_nul_is_kept_or_refused(store: Store) -> None:
    """Where the database has no such texts, only its own input fails; and nobody is found by one."""
    odd = row(id=1, identity=NUL)
    if isinstance(store, SqliteStore):
        stores.insert(store, [odd])
        assert stored(store) == [odd]
        return
    with pytest.raises(ValueRefused):
        stores.insert(store, [odd])
    assert insert(store, row()) == stored(store)
    save_rooms(store, [plain_room()])

    def work(tx: Transaction) -> None:
        tx.lock_rooms([(SFU, ROOM), (SFU, NUL)], ())
        assert tx.of_participants([(SFU, ROOM, NUL)], finished=False) == tx.of_participants([(SFU, ROOM, NUL)], finished=True) == []
        assert tx.of_room(SFU, NUL) == tx.of_delegation(NUL) == []
        assert tx.room(SFU, NUL) is None
        assert tx.rooms([(SFU, NUL)]) == []
        assert tx.rooms_of([], [NUL]) == []
        assert len(tx.of_participants([(SFU, ROOM, NUL), (SFU, ROOM, "alice")], finished=False)) == 1

    store.atomically(work)


# ── queries ──


def of_participants(store: Store, participants: list[Participant], *, finished: bool) -> list[int]:
    """The ids of those who have one of these identities."""

    def work(tx: Transaction) -> list[int]:
        tx.lock_rooms({participant[:2] for participant in participants}, ())
        return [there.id for there in tx.of_participants(participants, finished=finished)]

    return store.atomically(work)


def test_a_participant_is_found_by_either_identity(store: Store) -> None:
    """Each row once, in the order of the ids; finished ones only when they are asked for."""
    save_rooms(store, [plain_room()])
    insert(store, row(identity="a", alias="b"), row(identity="b", alias="a"), row(identity="a", alias="a"), row(state=State.DONE, identity="a"))
    stores.insert(store, [row(identity="c")._replace(id=9, delay_id="delay-9")])

    def ids(identity: str, *, finished: bool) -> list[int]:
        return of_participants(store, [(SFU, ROOM, identity)], finished=finished)

    assert ids("a", finished=False) == [1, 2, 3]
    assert ids("a", finished=True) == [1, 2, 3, 4]
    assert ids("b", finished=True) == [1, 2]
    assert ids("nobody", finished=True) == []


def test_a_participant_is_found_by_its_third_identity(store: Store) -> None:
    """As by the other two; each row once."""
    save_rooms(store, [plain_room()])
    insert(
        store,
        row(identity="a", alias="b", twin="c"),
        row(identity="c", twin="a"),
        row(identity="d", twin="d"),
        row(identity="e", alias="c", twin="c"),
    )
    assert of_participants(store, [(SFU, ROOM, "c")], finished=False) == [1, 2, 4]
    assert of_participants(store, [(SFU, ROOM, "a"), (SFU, ROOM, "d")], finished=False) == [1, 2, 3]


def test_a_users_events_in_a_room(store: Store) -> None:
    """Whatever their identities are; those that are not finished."""
    save_rooms(store, [plain_room()])
    mine: dict[str, Any] = {"user": "@alice:hs.test"}
    insert(store, row(identity="a", **mine), row(identity="b", **mine), row(identity="c"), row(state=State.DONE, identity="d", **mine))

    def found(tx: Transaction) -> list[int]:
        tx.lock_rooms([(SFU, ROOM), (SFU, "elsewhere")], ())
        assert tx.of_user(SFU, "elsewhere", "@alice:hs.test") == []
        assert tx.of_user(SFU, ROOM, "@bob:hs.test") == []
        return [there.id for there in tx.of_user(SFU, ROOM, "@alice:hs.test")]

    assert store.atomically(found) == [1, 2]


@pytest.mark.parametrize("others", [0, 1, 2, 3, MANY, MANY + 1])
def test_many_are_found_at_once(store: Store, others: int) -> None:
    """However many are asked for: each row once, and each room that is there."""
    insert(store, row(identity="a", alias="b"), row(identity="b"), row(identity="a", room="elsewhere"))
    there = Room(SFU, ROOM, "RM1", "EV1", NOW, True, 0.0, NOW, None, NOW + 60.0, False, 0, 3, True)
    save_rooms(store, [there, plain_room("elsewhere")])
    wanted = [(SFU, ROOM, "a"), (SFU, ROOM, "b"), (SFU, "elsewhere", "a"), *((SFU, ROOM, f"other{n}") for n in range(others))]
    assert of_participants(store, wanted, finished=False) == [1, 2, 3]
    keys = [(SFU, ROOM), *((SFU, f"other{n}") for n in range(others))]

    def rooms(tx: Transaction) -> tuple[list[Room], list[Room]]:
        return tx.lock_rooms(keys, ()), tx.rooms(keys)

    assert store.atomically(rooms) == ([there], [there])

    def events(tx: Transaction) -> list[int]:
        tx.lock_rooms(tx.rooms_of([3, 1], ()), ())
        return [found.id for found in tx.get_all([3, 1, *range(10, 10 + others)])]

    assert store.atomically(events) == [1, 3]


def test_the_rooms_of_rows_are_found(store: Store) -> None:
    """By the rows, and by their delegations; what is not there has none."""
    insert(store, row(room="a"), row(room="b", delegation="D2"), row(room="b", delegation="D2", identity="bob"), row(room="c", delegation="D3"))
    assert store.atomically(lambda tx: tx.rooms_of([1, 17], ["D2", "D17"])) == [(SFU, "a"), (SFU, "b")]
    assert store.atomically(lambda tx: tx.rooms_of([], [])) == []


def test_the_rows_of_a_room_and_of_a_delegation(store: Store) -> None:
    """Of a room those that are open; of a delegation all, in the order of their ids."""
    insert(store, row(delegation="D1"), row(delegation="D2", state=State.DONE), row(delegation="D2", identity="bob"), row(room="elsewhere"))

    def work(tx: Transaction) -> tuple[set[int], list[int]]:
        tx.lock_rooms([(SFU, ROOM)], ())
        return {there.id for there in tx.of_room(SFU, ROOM)}, [there.id for there in tx.of_delegation("D2")]

    assert store.atomically(work) == ({1, 3}, [2, 3])


def test_what_is_due_comes_most_urgent_first_and_not_more_than_asked_for(store: Store) -> None:
    """Of one homeserver and one lane."""
    rows = [row(Presence.GONE, harm=NOW - n, due=NOW - 1) for n in (3, 1, 5, 2, 4)]
    insert(store, *rows, row(Presence.GONE, harm=NOW - 9, due=NOW + 1), row(Presence.GONE, homeserver="other.test"), row(due=NOW))
    found = store.atomically(lambda tx: tx.todo(HOMESERVER, Lane.END, 3, NOW))
    assert {there.id for there in found} == {3, 5, 1}
    assert store.atomically(lambda tx: tx.next_due(HOMESERVER)) == NOW - 1
    assert store.atomically(lambda tx: tx.next_due("nobody.test")) is None


def test_what_has_come_to_harm_is_told_from_what_has_not(store: Store) -> None:
    """So that neither hides the other."""
    insert(store, *(row(harm=harm, due=NOW - 1) for harm in (NOW + 1, NOW - 2, NOW + 3, NOW, None)))
    in_time = store.atomically(lambda tx: tx.todo(HOMESERVER, Lane.RESTART, 5, NOW, harmed=False))
    late = store.atomically(lambda tx: tx.todo(HOMESERVER, Lane.RESTART, 5, NOW, harmed=True))
    assert [{there.id for there in found} for found in (in_time, late)] == [{1, 3}, {2, 4, 5}]


def test_the_earliest_departure_whose_event_is_not_ended(store: Store) -> None:
    """At one homeserver, due or not; restarts and what is finished do not count."""
    insert(
        store,
        row(Presence.GONE, identity="a", ended_at=NOW - 30.0, harm=NOW - 30.0, due=NOW + 20.0),
        row(Presence.GONE, identity="b", ended_at=NOW - 3.0, harm=NOW - 3.0),
        row(Presence.GONE, identity="c", ended_at=NOW - 99.0, harm=NOW - 99.0, homeserver="other.test"),
        row(identity="d", due=NOW - 200.0),
        row(Presence.GONE, identity="e", state=State.DONE, ended_at=NOW - 300.0),
    )
    assert store.waiting_since(HOMESERVER) == NOW - 30.0
    assert store.waiting_since("nobody.test") is None


def test_the_room_that_the_embedded_database_takes_and_has(tmp_path: Path) -> None:
    """Its files together; not of one that is in memory, nor of one whose files are gone."""
    store = SqliteStore(tmp_path / "test.db")
    try:
        disk = store.disk()
        assert disk is not None
        assert disk.used == sum(file.stat().st_size for file in tmp_path.glob("test.db*") if file.suffix != ".lock")
        assert disk.free > 0
        (tmp_path / "test.db").unlink()
        assert store.disk() is None
    finally:
        store.close()
    in_memory = SqliteStore(":memory:")
    assert in_memory.disk() is None
    in_memory.close()


def test_deleting_a_row_deletes_its_history(store: Store) -> None:
    """And nobody else's."""
    insert(store, row(), row())
    store.atomically(lambda tx: tx.note([Note(1, NOW, "a", ""), Note(2, NOW, "b", "")]))
    store.atomically(lambda tx: tx.delete(1))
    assert store.atomically(lambda tx: tx.history([1, 2])) == [Note(2, NOW, "b", "")]


# ── failures ──


def test_work_that_raises_is_undone(store: Store) -> None:
    """The error comes through as it is, and what comes afterwards is kept."""

    def work(tx: Transaction) -> None:
        tx.insert(row(id=tx.new_id()))
        tx.save_room(plain_room())
        tx.note([Note(1, NOW, "a", "")])
        tx.next_due(HOMESERVER)  # which must see what was inserted
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        store.atomically(work)
    assert stored(store) == []
    assert room_of(store, ROOM) is None
    assert select(store, "SELECT * FROM history") == []
    insert(store, row())
    assert len(stored(store)) == 1


def test_a_step_sees_what_it_has_written_itself(store: Store) -> None:
    """When is the next row due, the next room?"""

    def work(tx: Transaction) -> tuple[float | None, float | None]:
        tx.insert(row(id=1, due=NOW + 7.0))
        tx.save_room(plain_room(due=NOW + 8.0))
        return tx.next_due(HOMESERVER), tx.next_room_due(SFU)

    assert store.atomically(work) == (NOW + 7.0, NOW + 8.0)


def test_errors_do_not_quote_what_is_stored(store: Store) -> None:
    """Neither a delay_id nor a token gets into a log with the traceback."""
    first = row(delay_id="very-secret-delay-id", token=b"very-secret-token")
    stores.insert(store, [first])
    with pytest.raises(Exception, match=r"(?i)unique") as caught:
        stores.insert(store, [first._replace(id=2)])
    assert "secret" not in "".join(traceback.format_exception(caught.value))
    assert stored(store) == [first]


# ── rooms, and what is learned ──


def rooms(store: Store) -> dict[str, Room]:
    """All rooms of our SFU, by name."""
    found = [room_of(store, name) for (name,) in select(store, "SELECT name FROM room")]
    return {room.name: room for room in found if room is not None}


def plain_room(name: str = ROOM, **changes: Any) -> Room:
    return Room(SFU, name, "RM1", "EV1", 0.0, False, 0.0, NOW - 30.0, None, None, True, 0, 0, False)._replace(**changes)


def test_urgent_rooms_are_due_before_routine_ones(store: Store) -> None:
    """However long those have been due; and not more than asked for."""
    save_rooms(
        store, [*[plain_room(f"r{n}", due=NOW - 100 - n) for n in range(5)], *[plain_room(f"u{n}", due=NOW - n, routine=False) for n in range(3)]]
    )
    save_rooms(store, [plain_room("later", due=NOW + 1, routine=False)])
    found = store.atomically(lambda tx: [room.name for room in tx.rooms_due(SFU, 5, NOW)])
    assert found == ["u2", "u1", "u0", "r4", "r3"]
    assert store.atomically(lambda tx: tx.rooms_due("other", 5, NOW)) == []
    assert store.atomically(lambda tx: tx.next_room_due(SFU)) == NOW - 104
    assert store.atomically(lambda tx: tx.next_room_due("other")) is None


@pytest.mark.parametrize("sfu", [SFU, None])
def test_asking_for_all_rooms_takes_nothing_from_those_that_are_waited_for(store: Store, sfu: str | None) -> None:
    """All come now, those that somebody waits for still before the others; one that is under way is remembered to be too old."""
    save_rooms(store, [plain_room("routine", due=NOW + 50), plain_room("none"), plain_room("urgent", due=NOW + 2, routine=False)])
    save_rooms(store, [plain_room("claimed", due=NOW + 15, claimed=True), plain_room("overdue", due=NOW - 50), plain_room("x", sfu="other")])
    store.ask_rooms(sfu, NOW)
    after = {room.name: (room.due, room.routine, room.claimed, room.asked) for room in rooms(store).values()}
    assert after == {
        "routine": (NOW, True, False, NOW),
        "none": (NOW, True, False, NOW),
        "urgent": (NOW, False, False, NOW),
        "claimed": (NOW + 15, True, True, NOW),
        "overdue": (NOW - 50, True, False, NOW),
    }
    other = room_of(store, "x", "other")
    assert other is not None
    assert other.asked == (None if sfu else NOW)


def test_when_the_clock_was_set_an_event_that_was_let_run_is_still_kept(kind: str) -> None:
    """Its participant may be there: it has not run out before its time, counted anew."""
    for back in (-(10**6), 10**6):
        with new_store(kind) as store:
            insert(store, row(state=State.ADRIFT))
            store.recover(NOW + back, POLICY, clock_unsure=True)
            engine = engine_on(store)
            engine.step((), NOW + back)
            (there,) = stored(store)
            assert there.state is State.ADRIFT
            assert there.harm == NOW + back + there.delay + POLICY.adrift_keep


@pytest.mark.parametrize("back", [60.0, 900.0, 3600.0, 10**6])
def test_when_the_clock_went_back_rooms_are_looked_at_as_ever(store: Store, back: float) -> None:
    """Sessions that were heard of in the future neither stop the looks nor make them one after another."""
    now = NOW - 60.0 - back
    insert(store, row())
    save_rooms(store, [plain_room(due=NOW + 60.0)])
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


def test_which_keys_were_used_is_kept(store: Store) -> None:
    """The last word counts."""
    assert store.keys_mark() is None
    store.save_keys_mark("ab")
    store.save_keys_mark("cd")
    assert store.keys_mark() == "cd"


def test_what_was_learned_is_kept(store: Store) -> None:
    """Of homeservers and SFUs; the last word counts."""
    homeservers = [KnownHomeserver("a.test", Limit.SOME, 2.5, 7.0), KnownHomeserver("b.test", Limit.NONE, 1.0, 5.0)]
    sfus = [KnownSfu("main", NOW, None), KnownSfu("other", None, NOW)]
    for known in (KnownHomeserver("a.test", Limit.UNKNOWN, 1.0, 5.0), *homeservers):
        store.atomically(lambda tx, known=known: tx.save_homeserver(known))  # type: ignore[misc]
    for sfu in (KnownSfu("main", None, None), *sfus):
        store.atomically(lambda tx, sfu=sfu: tx.save_sfu(sfu))  # type: ignore[misc]
    census = store.census()
    assert sorted(census.homeservers) == homeservers
    assert sorted(census.sfus) == sfus


def test_the_load_of_a_homeserver_is_what_its_open_events_need(store: Store) -> None:
    """Restarts a second at the least: the sum of 1/delay."""
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
@given(rows=populations())
@example(rows=[])
@example(rows=[row(id=10**12)])
@example(
    rows=[row(presence, id=n, delay_id=f"{n}", delay=n * 10.0, token=None if n % 2 else b"sealed") for n, presence in enumerate([*Presence] * 2, 1)]
)
@example(rows=[row(id=1, delay_id="near"), row(state=State.DONE, id=10**9, delay_id="far")])
@example(rows=[row(id=1, delay_id="near"), row(homeserver="other.test", id=2 * 10**9 + 1, delay_id="far")])
def test_the_census_is_what_counting_row_by_row_comes_to(lasting: Store, rows: list[DelayedEvent]) -> None:
    """Whichever group most rows are in, if any, and wherever there are gaps between the ids."""

    def delete(tx: Transaction) -> None:
        for there in rows:
            tx.delete(there.id)

    stores.insert(lasting, rows)
    if isinstance(lasting, SqliteStore):
        lasting.last_id = max((there.id for there in rows), default=0)  # as a start finds it
    try:
        census = lasting.census()
    finally:
        lasting.atomically(delete)
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


def test_countdowns_are_the_restarts_that_are_to_come(store: Store) -> None:
    """Of one homeserver, by their deadlines, and whether those are known; departures, and what is let run, are not among them."""
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


def test_the_most_overdue_restart_is_found(store: Store) -> None:
    """Its deadline, of those that are due and known."""
    insert(
        store,
        row(running_since=NOW - DELAY - 9, due=NOW - 5),
        row(running_since=NOW - DELAY - 50, due=NOW - 5, verified_at=None),
        row(running_since=NOW - DELAY - 90, due=NOW + 5),
    )
    assert store.overdue(HOMESERVER, NOW) == NOW - 9
    assert store.overdue("other.test", NOW) is None


def test_what_a_client_s_token_restarts_does_not_count_for_our_rate(store: Store) -> None:
    """It has a limit of its own."""
    insert(store, row(delay_id="ours")._replace(id=1), row(delay_id="theirs", token=b"sealed")._replace(id=2))
    assert [c.event for c in store.atomically(lambda tx: list(tx.countdowns(HOMESERVER)))] == [1]
    assert store.census().load == {HOMESERVER: 1 / DELAY}
