"""The real store in memory, which can be made to refuse; alone, or shared by several instances of the daemon as PostgreSQL would be.

Each step of an engine is one transaction, and they come one after another, so that what is left of sharing is what happens between two steps. What
PostgreSQL adds to that is done here as well: ids in blocks, transactions that begin anew, commits of which nobody hears, and what instances tell each
other apart from any transaction.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar, TypeVar

from sfu_delegate.delegation.model import DelayedEvent, State
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.store import schema
from sfu_delegate.store.base import Heard, Instance, KnownSfu, News, StoreUnavailable, Transaction
from sfu_delegate.store.census import StoreCensus
from sfu_delegate.store.postgresql import DEAD_AFTER
from sfu_delegate.store.rows import delayed_event_of
from sfu_delegate.store.sqlite import SqliteStore, SqliteTransaction
from sfu_delegate.store.statements import all_events
from sqlalchemy import func, select

T = TypeVar("T")

BLOCK = 10_000  # ids that a process takes at a time: no history has so many
ANEW = 0.05  # of all transactions begin anew once, as where another instance was in the way


class Store(SqliteStore):
    """The real store in memory, which can be made to refuse."""

    refuses = False  # what is to be written: a full disk
    _spare: ClassVar[list["Store"]] = []  # emptied: to make the tables anew takes longer than a short history

    def __init__(self) -> None:
        super().__init__(":memory:")

    @classmethod
    def empty(cls) -> "Store":
        """One without a row."""
        return Store._spare.pop() if Store._spare else Store()

    def put_back(self) -> None:
        """Nobody needs it any more."""
        for table in schema.metadata.sorted_tables:
            self._connection.execute(f"DELETE FROM {table.name}")
        self.last_id, self.refuses = 0, False
        Store._spare.append(self)

    @property
    def works(self) -> bool:
        """Does it take transactions?"""
        return not self.refuses

    def atomically(self, work: Callable[[Transaction], T], *, about_to_wait: Callable[[], object] | None = None) -> T:
        if not self.refuses:
            return super().atomically(work)

        def fail(tx: Transaction) -> T:
            work(tx)
            raise StoreUnavailable("the disk is full")

        return super().atomically(fail)

    # ── for those who look in, whatever it refuses ──

    def rows(self) -> list[DelayedEvent]:
        """All rows there are."""
        return [delayed_event_of(values) for values in self.execute(all_events().order_by(schema.delayed_event.c.id))]

    def unfinished(self) -> int:
        """How many rows something is still to be done with."""
        c = schema.delayed_event.c
        statement = select(func.count()).select_from(schema.delayed_event).where(c.state != State.DONE.value, c.state != State.ADRIFT.value)
        return int(self.execute(statement).fetchone()[0])

    @property
    def changes(self) -> int:
        """A number that grows with every change."""
        return self._connection.total_changes


@dataclass
class Board:
    """A database that several instances share: `database` has its tables, and the rest is what they tell each other apart from transactions."""

    database: Store
    paces: dict[tuple[str, str], str] = field(default_factory=dict)  # by homeserver, and by the address that it counts requests by
    heard: dict[str, Heard] = field(default_factory=dict)  # by SFU
    alive: dict[str, Instance] = field(default_factory=dict)  # by name
    blocks: int = 0  # of ids that were given out
    offset: float = 0.0  # of its clock, which all instances follow, against the true time
    counted: tuple[int, News] | None = None  # what was last asked for, and `Store.changes` then


class _Anew(Exception):
    """The transaction begins anew."""


class SharedTransaction(SqliteTransaction):
    """Where PostgreSQL's differs."""

    def save_sfu(self, known: KnownSfu) -> None:
        found = self._connection.execute("SELECT several_nodes_at FROM sfu WHERE name = ?", (known.name,)).fetchone()
        known_at = [at for at in (known.several_nodes_at, found[0] if found else None) if at is not None]
        super().save_sfu(known._replace(several_nodes_at=max(known_at, default=None)))


class SharedStore(Store):
    """One instance's way to the database that all share. It can be made to refuse, or be cut, alone."""

    shared = True
    begin_anew = (_Anew,)

    def __init__(self, board: Board, name: str, address: str, seed: str, upset: Callable[[], None]) -> None:
        # Not another database: another connection to it, which takes its turn.
        vars(self).update(vars(board.database))
        self.board = board
        self.name = name
        self.address = address
        self.cut = False  # it cannot be reached, neither to write nor to read
        self.untold = 0  # so many of the next commits are kept, and this instance does not hear of it …
        self._upset = upset  # … which others are told
        self._random = Random(seed)
        self._started_at: float | None = None

    def connect(self) -> None:
        """A new process begins."""
        self._reach()
        self._started_at = None
        self.board.blocks += 1
        self.last_id = self.board.blocks * BLOCK

    @property
    def works(self) -> bool:
        return not (self.refuses or self.cut)

    def _reach(self, *, to_write: bool = False) -> None:
        if self.cut:
            raise StoreUnavailable("the server cannot be reached")
        if to_write and self.refuses:
            raise StoreUnavailable("the disk is full")

    def atomically(self, work: Callable[[Transaction], T], *, about_to_wait: Callable[[], object] | None = None) -> T:
        self._reach()
        if self._random.random() < ANEW:
            self._in_vain(work)
        before = self.changes
        result = super().atomically(lambda _: work(SharedTransaction(self._connection, self)))
        if self.untold and self.changes > before:
            self.untold -= 1
            self._upset()
            raise StoreUnavailable("the connection was lost")
        return result

    def _in_vain(self, work: Callable[[Transaction], object]) -> None:
        """Another instance was in the way: nothing of it was kept, but what the engine keeps in memory, and what it told others meanwhile."""

        def begin_anew(_: Transaction) -> None:
            work(SharedTransaction(self._connection, self))
            raise _Anew

        with suppress(_Anew):
            super().atomically(begin_anew)

    def reading(self, work: Callable[[Transaction], T]) -> T:
        self._reach()
        return super().reading(work)

    def census(self) -> StoreCensus:
        self._reach()
        return super().census()

    # ── what instances tell each other ──

    def news(self, now: float, word: str = "") -> News:
        self._reach(to_write=True)
        board = self.board
        self._started_at = now if self._started_at is None else self._started_at
        board.alive[self.name] = Instance(self.name, "simulated", self._started_at, now, word)
        if board.counted is None or board.counted[0] != self.changes:
            board.counted = (self.changes, self._found())
        found = board.counted[1]
        paces = {homeserver: state for (homeserver, address), state in board.paces.items() if address == self.address}
        others = [one for name, one in sorted(board.alive.items()) if name != self.name and abs(now - one.alive_at) < DEAD_AFTER]
        return found._replace(paces=paces, heard=list(board.heard.values()), instances=others)

    def _found(self) -> News:
        run = self._connection.execute
        schedule = dict(run("SELECT homeserver, min(due) FROM delayed_event WHERE due IS NOT NULL GROUP BY homeserver"))
        rooms = dict(run("SELECT sfu, min(due) FROM room WHERE due IS NOT NULL GROUP BY sfu"))
        sfus = [KnownSfu(*values) for values in run("SELECT name, failing_since, several_nodes_at FROM sfu")]
        return News(schedule, rooms, {}, sfus, [], [])

    def exchange_pace(self, homeserver: str, change: Callable[[str | None], str | None]) -> None:
        self._reach(to_write=True)
        new = change(self.board.paces.get((homeserver, self.address)))
        if new is not None:
            self.board.paces[homeserver, self.address] = new

    def newest_sign_of_life(self) -> float | None:
        """When any instance was last alive, by the database's clock."""
        return max((one.alive_at for one in self.board.alive.values()), default=None)

    def times_are_unknown(self, now: float, policy: Policy) -> None:
        super().times_are_unknown(now, policy)
        for sfu, heard in self.board.heard.items():
            self.board.heard[sfu] = Heard(sfu, min(heard.heard_at, now), min(heard.answered_at, now))

    def heard_of(self, heard: Sequence[Heard]) -> None:
        self._reach(to_write=True)
        for one in heard:
            known = self.board.heard.get(one.name, Heard(one.name, 0.0, 0.0))
            self.board.heard[one.name] = Heard(one.name, max(known.heard_at, one.heard_at), max(known.answered_at, one.answered_at))

    def farewell(self) -> None:
        """This instance is no more."""
        self._reach(to_write=True)
        self.board.alive.pop(self.name, None)
