"""Both stores, for tests that hold on each of them: SQLite in memory or in a file, and PostgreSQL on the server of this process.

Nothing here locks more than it must, so tests say `lock_rooms` where the engine would: on PostgreSQL whoever reads rows to change them has locked
their rooms before, and SQLite takes no notice of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, LiteralString

import pytest
from sfu_delegate.delegation.model import DelayedEvent, Room
from sfu_delegate.store.base import Store, Transaction
from sfu_delegate.store.migrate import VERSION_TABLE
from sfu_delegate.store.postgresql import PostgresStore
from sfu_delegate.store.sqlite import SqliteStore

from tests import postgresql
from tests.rows import SFU

KINDS = ("sqlite", "postgresql")

# For tests that use a fixture `database`, which has all kinds as parameters.
only_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
slow_on_postgresql = pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True)


def seeds(*values: int, on_postgresql: int) -> pytest.MarkDecorator:
    """These values of `seed`. On PostgreSQL, where a long course takes some ten times as long, only so many of them are not slow."""
    params = [
        pytest.param(kind, seed, marks=[pytest.mark.slow] if kind == "postgresql" and number >= on_postgresql else [])
        for kind in KINDS
        for number, seed in enumerate(values)
    ]
    return pytest.mark.parametrize(("database", "seed"), params, indirect=["database"])


def migrated(url: str) -> None:
    """Make the tables of this version in an empty database of PostgreSQL."""
    PostgresStore(url).close()


_spare: list[str] = []  # emptied: that takes a tenth of the time that a new one takes


@contextmanager
def place(kind: str, directory: Path | None = None) -> Iterator[str]:
    """Where an empty store is: the URL of a database of PostgreSQL; of SQLite a file in the directory, or memory without one."""
    if kind == "sqlite":
        yield ":memory:" if directory is None else str(directory / "delegate.db")
        return
    server = postgresql.shared()
    url = _spare.pop() if _spare else server.create_database(migrated)
    yield url
    # Not of a test that has failed: what it left may be locked.
    server.empty(url, but=VERSION_TABLE)
    _spare.append(url)


@contextmanager
def fresh_place(kind: str, directory: Path) -> Iterator[str]:
    """The same in a database that nobody uses afterwards, in a file."""
    if kind == "sqlite":
        yield str(directory / "delegate.db")
        return
    with postgresql.shared().database(migrated) as url:
        yield url


@contextmanager
def opened(at: str) -> Iterator[Store]:
    """The store at a place."""
    store: Store = PostgresStore(at) if at.startswith("postgresql:") else SqliteStore(at)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def new_store(kind: str) -> Iterator[Store]:
    """An empty store, which is gone afterwards."""
    with place(kind) as at, opened(at) as store:
        yield store


_kind = ""
_opened = ExitStack()


@contextmanager
def chosen(kind: str) -> Iterator[None]:
    """From now on `another` is of this kind; afterwards all of them are gone."""
    global _kind, _opened
    with ExitStack() as _opened:
        _kind = kind
        yield


def another() -> Store:
    """An empty store of the chosen kind, which stays as long as the choice."""
    return _opened.enter_context(new_store(_kind))


def select(store: Store, statement: LiteralString) -> list[Any]:
    """What is in the tables, whatever the store says; or change it behind its back."""
    if isinstance(store, SqliteStore):
        return store._connection.execute(statement).fetchall()
    assert isinstance(store, PostgresStore)
    return postgresql.shared().query(store._url, statement)


def stored(store: Store) -> list[DelayedEvent]:
    """All rows, in the order of their ids, by the store's own reading."""
    found = select(store, "SELECT id, sfu, room FROM delayed_event")

    def work(tx: Transaction) -> list[DelayedEvent]:
        tx.lock_rooms({(sfu, room) for _, sfu, room in found}, ())
        return sorted(tx.get_all([id for id, _, _ in found]))

    return store.atomically(work) if found else []


def room_of(store: Store, name: str, sfu: str = SFU) -> Room | None:
    """One room, by the store's own reading."""

    def work(tx: Transaction) -> Room | None:
        tx.lock_rooms([(sfu, name)], ())
        return tx.room(sfu, name)

    return store.atomically(work)


def insert(store: Store, rows: Sequence[DelayedEvent]) -> None:
    """Add rows, in one transaction."""

    def work(tx: Transaction) -> None:
        for row in rows:
            tx.insert(row)

    store.atomically(work)


def save_rooms(store: Store, rooms: Sequence[Room]) -> None:
    """Add or replace rooms, in one transaction."""

    def work(tx: Transaction) -> None:
        tx.lock_rooms([(room.sfu, room.name) for room in rooms], [(room.sfu, room.name) for room in rooms])
        for room in rooms:
            tx.save_room(room)

    store.atomically(work)
