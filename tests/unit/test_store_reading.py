"""What operators read beside the engine, on both databases: the right rows, no secrets, and nothing that holds up a step."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sfu_delegate.api.admin import PAGE_MOST
from sfu_delegate.delegation.model import DelayedEvent, Note, Outcome, Presence, Room, State
from sfu_delegate.observe.logs import short
from sfu_delegate.store import sqlite
from sfu_delegate.store.base import Store, StoreUnavailable
from sfu_delegate.store.reading import NOTES_MOST, Reader, Selection
from sfu_delegate.store.sqlite import SqliteStore

from tests import stores
from tests.rows import HOMESERVER, NOW, ROOM, SFU, row

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture(params=stores.KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty one, that can be read beside the engine."""
    with stores.place(request.param, tmp_path) as at, stores.opened(at) as opened:
        yield opened


@pytest.fixture
def reader(store: Store) -> Reader:
    """Its reader."""
    return store.reader()


def event(id: int, **changes: Any) -> DelayedEvent:
    changes = {"delegation": f"D{id}", "identity": f"p{id}", "delay_id": f"syd_secret_delay_id_{id}", "token": b"a-sealed-token", **changes}
    return row(**changes)._replace(id=id)


def room(name: str = ROOM, sfu: str = SFU) -> Room:
    return Room(sfu, name, "RM1", "", 0.0, False, 0.0, NOW - 9.0, None, NOW + 50.0, True, 0, 3, False)


def keep(store: Store, *rows: DelayedEvent, rooms: tuple[Room, ...] = (), notes: tuple[Note, ...] = ()) -> None:
    with_rooms = {(one.sfu, one.name): one for one in (*(room(row.room, row.sfu) for row in rows), *rooms)}

    def work(tx: Any) -> None:
        tx.lock_rooms(set(with_rooms), set(with_rooms))
        for there in with_rooms.values():
            tx.save_room(there)
        for one in rows:
            tx.insert(one)
        if notes:
            tx.note(notes)

    store.atomically(work)


def test_a_row_is_read_as_it_is_without_its_secrets(store: Store, reader: Reader) -> None:
    """But for the hint of its delay_id that logs show, and its token."""
    there = event(1, user="@alice:hs.test", alias="other")
    keep(store, there)
    (read,) = reader.events(Selection(), 10)
    assert read == there._replace(delay_id=short(there.delay_id), token=None)
    assert reader.delegation("D1") == [read]
    assert reader.event(1) == read


@pytest.mark.parametrize("delay_id", ["x", "xy", "xyz", "x" * 23, "x" * 24, "x" * 25, "é" * 11])
def test_the_hint_is_that_of_the_logs(store: Store, reader: Reader, delay_id: str) -> None:
    """However short the delay_id is."""
    keep(store, event(1, delay_id=delay_id))
    assert reader.events(Selection(), 1)[0].delay_id == short(delay_id)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Selection(), [4, 3, 2, 1]),
        (Selection(rooms=("other",)), [2]),
        (Selection(rooms=(ROOM, "other", "none")), [4, 3, 2, 1]),
        (Selection(sfu="second"), [3]),
        (Selection(sfu="second", rooms=(ROOM,)), [3]),
        (Selection(sfu="second", rooms=("other",)), []),
        (Selection(user="@alice:hs.test"), [4, 1]),
        (Selection(user="p2"), [2]),
        (Selection(user="@alice:hs.tes"), []),
        (Selection(user="%"), []),
        (Selection(homeserver="far.test"), [2]),
        (Selection(homeserver=HOMESERVER, open=True), [4, 1]),
        (Selection(states=("done",)), [3]),
        (Selection(outcomes=("sent", "lost")), [3]),
        (Selection(presences=("away", "expected")), [2]),
        (Selection(open=False), [3]),
        (Selection(accepted_before=NOW - 1000.0), [1]),
        (Selection(accepted_after=NOW - 1000.0), [4, 3, 2]),
        (Selection(finished_after=NOW - 10.0), [4, 2, 1]),
    ],
)
def test_what_is_wanted_is_found(store: Store, reader: Reader, wanted: Selection, found: list[int]) -> None:
    """The newest first; a user also by the legacy identity, which begins with it."""
    keep(
        store,
        event(1, user="@alice:hs.test", accepted_at=NOW - 5000.0),
        event(2, room="other", presence=Presence.AWAY, homeserver="far.test"),
        event(3, sfu="second", state=State.DONE, outcome=Outcome.SENT, finished_at=NOW - 20.0),
        event(4, identity="@alice:hs.test:DEVICE"),
    )
    assert [one.id for one in reader.events(wanted, 10)] == found
    assert [one.id for one in reader.events(wanted, 1)] == found[:1]
    assert [one.id for one in reader.events(wanted, 10, before=3)] == [id for id in found if id < 3]


def test_what_is_not_there_is_not_found(reader: Reader) -> None:
    """In an empty database, and by numbers that no database has."""
    found: list[list[Any]] = [reader.events(Selection(rooms=("x",)), 10), reader.delegation("D1"), reader.rooms(10), reader.in_rooms([])]
    assert found == [[]] * 4
    assert [reader.event(id) for id in (-1, 0, 1, 1 << 63, 1 << 80)] == [None] * 5
    size = reader.size()
    assert (size.events, size.finished, size.rooms, size.oldest_open, size.oldest_ending) == (0, 0, 0, None, None)


def test_the_size_tells_who_has_waited_longest(store: Store, reader: Reader) -> None:
    """How much there is, the oldest open event, and the goodbye that has waited longest."""
    keep(
        store,
        event(1, accepted_at=NOW - 500.0),
        event(2, presence=Presence.GONE, ended_at=NOW - 30.0),
        event(3, presence=Presence.GONE, ended_at=NOW - 60.0),
        event(4, state=State.DONE, accepted_at=NOW - 9000.0),
    )
    size = reader.size()
    assert (size.events, size.finished, size.rooms, size.oldest_open, size.oldest_ending) == (4, 1, 1, NOW - 500.0, NOW - 60.0)


def test_rooms_come_page_by_page_with_those_who_are_in_them(store: Store, reader: Reader) -> None:
    """By SFU and name; a participant with two events is one."""
    keep(
        store, event(1), event(2), event(3, identity="p2"), event(4, presence=Presence.AWAY), event(5, state=State.DONE), event(6, room="b", sfu="z")
    )
    first = reader.rooms(1)
    assert [(one.sfu, one.name) for one in first] == [(SFU, ROOM)]
    assert [(one.sfu, one.name) for one in reader.rooms(9, (SFU, ROOM))] == [("z", "b")]
    assert [one.name for one in reader.rooms(9, sfu="z")] == [one.name for one in reader.rooms(9, named=["b"])] == ["b"]
    counts = {(count.presence, count.state): (count.events, count.participants) for count in reader.in_rooms([(SFU, ROOM)])}
    assert counts == {("connected", "live"): (3, 2), ("away", "live"): (1, 1)}


def test_a_history_that_is_endless_is_read_from_its_end(store: Store, reader: Reader) -> None:
    """The newest lines, oldest first."""
    keep(store, event(1), event(2), notes=tuple(Note(1, NOW + n, "restarted", "") for n in range(NOTES_MOST + 5)))
    notes = reader.history([1, 2])
    assert [note.at for note in (notes[0], notes[-1])] == [NOW + 5, NOW + NOTES_MOST + 4]
    assert len(notes) == NOTES_MOST
    assert [note.at for note in reader.history([1, 2], 2)] == [NOW + NOTES_MOST + 3, NOW + NOTES_MOST + 4]


def test_reading_changes_nothing_and_waits_for_nobody(store: Store, reader: Reader) -> None:
    """In the middle of a step it sees what was there before, and it cannot write."""
    keep(store, event(1))

    def work(tx: Any) -> None:
        tx.lock_rooms({(SFU, ROOM)}, set())
        tx.update(event(1), event(1, restarts=9))
        assert reader.events(Selection(), 1)[0].restarts == event(1).restarts

    store.atomically(work)
    assert reader.events(Selection(), 1)[0].restarts == 9
    with pytest.raises(StoreUnavailable, match=r"read-?only"), reader._reading() as connection:
        connection.exec_driver_sql("DELETE FROM delayed_event")
    assert len(stores.stored(store)) == 1


def test_a_file_with_an_odd_name_can_be_read(tmp_path: Path) -> None:
    """Its name is no part of a URL."""
    store = SqliteStore(tmp_path / "a?b#c%20 d.db")
    try:
        assert store.reader().events(Selection(), 1) == []
    finally:
        store.close()


def test_a_whole_page_of_rooms_can_be_counted(store: Store, reader: Reader) -> None:
    """As many as the daemon gives at a time, of several SFUs."""
    rooms = [(sfu, f"room{number}") for sfu in ("main", "second") for number in range(PAGE_MOST // 2)]
    keep(store, *(event(id, sfu=sfu, room=name) for id, (sfu, name) in enumerate(rooms, 1)))
    page = [(one.sfu, one.name) for one in reader.rooms(PAGE_MOST)]
    assert sorted((count.sfu, count.room) for count in reader.in_rooms(page)) == sorted(page) == sorted(rooms)


def test_damage_that_a_question_meets_does_not_stop_the_daemon(tmp_path: Path) -> None:
    """It is told to whoever asks; what the engine keeps is kept as before."""
    path, damaged = tmp_path / "there.db", tmp_path / "damaged.db"
    damaged.write_bytes(b"no database" * 1000)
    with closing(SqliteStore(path)) as there:
        there.path = str(damaged)
        with pytest.raises(StoreUnavailable, match="no SQLite database"):
            there.reader().size()
        there.path = str(path)
        keep(there, event(1))
        assert there.reader().size().events == 1


def test_a_question_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up when the store is closed, however long it might have taken."""
    monkeypatch.setattr(sqlite, "READS_FOR", 3600.0)
    there = SqliteStore(tmp_path / "there.db")
    reader, begun = there.reader(), threading.Event()

    def ask() -> None:
        with reader._reading() as connection:
            begun.set()
            connection.exec_driver_sql(ENDLESS)

    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask)
        begun.wait()
        there.close()
        with pytest.raises(StoreUnavailable):
            asked.result()


def test_a_question_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as somebody reads, SQLite's log grows."""
    monkeypatch.setattr(sqlite, "READS_FOR", -1.0)
    with closing(SqliteStore(tmp_path / "there.db")) as there:
        reader = there.reader()
        with pytest.raises(StoreUnavailable, match="too much to read"), reader._reading() as connection:
            connection.exec_driver_sql(ENDLESS)
