"""What the engine asks of a store, whichever database it is."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from sfu_delegate.delegation.model import DelayedEvent, Lane, Note, Room
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.urgency import Countdown, Limit

T = TypeVar("T")


class StoreUnavailable(Exception):
    """The database cannot do it now: full, locked, read-only, broken. Nothing of the transaction was kept. The text is for the operator."""


class DatabaseTooNew(Exception):
    """The database was written by a newer version of the program."""


class DatabaseInUse(Exception):
    """Another process has the embedded database open."""


class KnownHomeserver(NamedTuple):
    """What was learned about one homeserver."""

    name: str
    limit: Limit
    rate: float  # actions a second
    burst: float  # actions


class KnownSfu(NamedTuple):
    """What was learned about one SFU. Times in Unix seconds."""

    name: str
    failing_since: float | None
    several_nodes_at: float | None


Participant = tuple[str, str, str]
"""SFU, room, identity."""


class Transaction(Protocol):
    """The queries of one step. Everything is kept, or nothing."""

    def of_participants(self, participants: Collection[Participant], *, finished: bool) -> list[DelayedEvent]:
        """The rows that have one of these identities as either form, in the order of their ids; `finished`: also those that are."""

    def rooms(self, keys: Collection[tuple[str, str]]) -> list[Room]:
        """The rooms of these SFUs and names, as far as they are there."""

    def get_all(self, events: Collection[int]) -> list[DelayedEvent]:
        """These rows, as far as they are there."""

    def of_room(self, sfu: str, room: str) -> list[DelayedEvent]:
        """All rows of a room that are not finished."""

    def of_delegation(self, delegation: str) -> list[DelayedEvent]:
        """All rows of a delegation."""

    def get(self, event: int) -> DelayedEvent | None:
        """One row."""

    def todo(self, homeserver: str, lane: Lane, limit: int, now: float, *, harmed: bool | None = None) -> list[DelayedEvent]:
        """The most urgent of the rows that are due, in any order; of those only that have come to harm, or have not, if that is given."""

    def next_due(self, homeserver: str) -> float | None:
        """When the next row of this homeserver is due."""

    def countdowns(self, homeserver: str) -> Iterable[Countdown]:
        """All restarts that are to come at a homeserver, by deadline; without those made with a client's token, which has a limit of its own."""

    def new_id(self) -> int:
        """A fresh id for a row."""

    def insert(self, row: DelayedEvent) -> None:
        """Add a row."""

    def update(self, old: DelayedEvent, new: DelayedEvent) -> None:
        """Write what differs."""

    def delete(self, event: int) -> None:
        """Remove a row and its history."""

    def room(self, sfu: str, name: str) -> Room | None:
        """One room."""

    def rooms_due(self, sfu: str, limit: int, now: float) -> list[Room]:
        """Rooms that are to be looked at: first those that somebody waits for, and then the longest overdue first."""

    def next_room_due(self, sfu: str) -> float | None:
        """When the next room of this SFU is to be looked at."""

    def save_room(self, room: Room) -> None:
        """Add or replace a room."""

    def delete_room(self, sfu: str, name: str) -> None:
        """Forget a room."""

    def ask_rooms(self, sfu: str | None, now: float) -> None:
        """All rooms of an SFU, or of every SFU, are to be looked at now, those that somebody waits for first."""

    def save_homeserver(self, known: KnownHomeserver) -> None:
        """Add or replace what is known about a homeserver."""

    def save_sfu(self, known: KnownSfu) -> None:
        """Add or replace what is known about an SFU."""

    def note(self, notes: Sequence[Note]) -> None:
        """Add lines to the history."""

    def history(self, events: Sequence[int]) -> list[Note]:
        """The history of some rows, oldest first."""


class Census(Protocol):
    """What a store counts once, at the start."""

    states: dict[tuple[str, str, str], int]
    schedule: dict[str, float]
    rooms: dict[str, float]
    load: dict[str, float]
    homeservers: list[KnownHomeserver]
    sfus: list[KnownSfu]


class Store(Protocol):
    """A database with the schema of this version."""

    def atomically(self, work: Callable[[Transaction], T], *, about_to_wait: Callable[[], object] | None = None) -> T:
        """Run `work` in one transaction, durable when this returns. Raises StoreUnavailable, and then nothing was kept.

        `about_to_wait` is called when it does no more than wait, for a disk or for a server.
        """

    def reading(self, work: Callable[[Transaction], T]) -> T:
        """Run `work`, which only reads. May work where `atomically` does not, as on a full disk. Raises StoreUnavailable."""

    def census(self) -> Census:
        """Counts by (homeserver, state, presence), the next due time by homeserver, the next look by SFU, by homeserver the restarts a second
        that its open events need at the least (the sum of 1/delay, without those with a client's token), and what was learned."""

    def recover(self, now: float, policy: Policy, *, clock_unsure: bool) -> int:
        """At the start: what was claimed by a process that is gone is due at once, and all rooms are to be looked at; the number of such rows.
        With `clock_unsure` all countdowns count as unknown, and are due too."""

    def backlog(self, homeserver: str, now: float) -> dict[Lane, tuple[int, float]]:
        """By lane: how many rows of a homeserver are due, and since when the first of them."""

    def overdue(self, homeserver: str, now: float) -> float | None:
        """The earliest deadline of the restarts that are due at a homeserver and not made, of events that it has confirmed; None: there is none."""

    def clock_mark(self) -> str | None:
        """What `save_clock_mark` was given last."""

    def save_clock_mark(self, mark: str) -> None:
        """Keep a mark by which the next start finds out whether the clock was set."""

    @property
    def is_log_large(self) -> bool:
        """Is there housekeeping that cannot wait for an idle time? May be asked from any thread while no other works with the store."""

    def checkpoint(self) -> None:
        """Do it. Raises StoreUnavailable."""

    def idle(self) -> None:
        """There is time for housekeeping."""

    def close(self) -> None:
        """Close the database."""
