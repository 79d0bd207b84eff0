"""PostgreSQL with many delegations, filled by COPY: the people and rooms of `rows`, which the SFU lists by the same rule."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, cast

import psycopg
from psycopg import sql
from sfu_delegate.delegation.model import DelayedEvent, Presence, Room
from sfu_delegate.store.base import Transaction
from sfu_delegate.store.rows import FIELDS, values_of, values_of_room
from sfu_delegate.store.schema import ID_BLOCK

from benchmarks.rows import IN_A_TRANSACTION, Filling
from benchmarks.scaling_server import Database


class _Rows:
    """Takes what is written in place of a transaction, as far as `Filling` needs one."""

    def __init__(self) -> None:
        self.events: list[DelayedEvent] = []
        self.rooms: list[Room] = []
        self._id = 0

    def new_id(self) -> int:
        self._id += 1
        return self._id

    def insert(self, row: DelayedEvent) -> None:
        self.events.append(row)

    def save_room(self, room: Room) -> None:
        self.rooms.append(room)


@dataclass
class PostgresFilling(Filling):
    """A `Filling` for PostgreSQL. `homeservers`: whose the rows are, by turns, if there are several."""

    homeservers: int = 1

    def fill_database(self, database: Database) -> None:
        """Write them to a database without rows, and leave it as it is after a while: vacuumed, with statistics, and on the disk."""
        random, rows = Random(7), _Rows()
        with psycopg.connect(database.url, autocommit=True) as connection:
            for start in range(0, self.count, IN_A_TRANSACTION):
                self._write(cast("Transaction", rows), range(start, min(self.count, start + IN_A_TRANSACTION)), random)
                events = [self._as_made(row) for row in rows.events]
                _copy(connection, "delayed_event", FIELDS, map(values_of, events))
                _copy(connection, "room", Room._fields, map(values_of_room, rows.rooms))
                notes = ((row.id, row.accepted_at + after, what, "") for row in events for after, what in enumerate(_story(row)))
                _copy(connection, "history", ("event", "at", "what", "detail"), notes)
                rows.events.clear()
                rows.rooms.clear()
            connection.execute("SELECT setval('delayed_event_id', %s)", (-(-self.count // ID_BLOCK) * ID_BLOCK + 1,))
        database.vacuum()
        database.analyze()
        database.checkpoint()

    def _as_made(self, row: DelayedEvent) -> DelayedEvent:
        """Ids of delegations begin with the time, as the daemon makes them."""
        delegation = f"dlg_{round(row.accepted_at * 1000) + row.id:012x}{row.delegation[-20:]}"
        if self.homeservers == 1:
            return row._replace(delegation=delegation)
        return row._replace(delegation=delegation, homeserver=f"homeserver{row.id % self.homeservers:06d}.example.org")


def _story(row: DelayedEvent) -> Sequence[str]:
    """The lines of its history."""
    return ("delegated", "verified", "connected") if row.presence is Presence.CONNECTED else ("delegated", "verified")


def _copy(connection: psycopg.Connection[Any], table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns)))
    with connection.cursor().copy(statement) as copy:
        for row in rows:
            copy.write_row(row)
