"""What the engine asks of a store, whichever database it is."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from sfu_delegate.delegation.model import DelayedEvent, Lane, Note, Room
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.urgency import Countdown, Limit

if TYPE_CHECKING:
    from sfu_delegate.store.reading import Reader

T = TypeVar("T")


class StoreUnavailable(Exception):
    """The database cannot do it now: full, locked, read-only, broken. Nothing of the transaction was kept. The text is for the operator."""


GOES_ON = "It goes on by itself when the database is back."
"""A StoreUnavailable may end with this. A process that has not begun has nothing to go on with."""


class ValueRefused(Exception):
    """The database does not take a value, and nothing of the transaction was kept. It belongs to one input; the others can be kept without it."""


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


class Heard(NamedTuple):
    """When an SFU was last heard of, by any instance. Times in Unix seconds, 0: never."""

    name: str
    heard_at: float  # a webhook, or an answer of any kind
    answered_at: float  # a look that was answered: when it was sent


class Instance(NamedTuple):
    """One of the processes that share a database."""

    name: str
    version: str
    started_at: float  # Unix seconds
    alive_at: float
    word: str = ""  # what it says of homeservers, see `delegation.others`


class Disk(NamedTuple):
    """How much room a database takes and has, in bytes."""

    used: int
    free: int


class News(NamedTuple):
    """What other instances may have changed since it was last asked for."""

    schedule: dict[str, float]  # by homeserver: when its next row is due
    rooms: dict[str, float]  # by SFU: when the next look is due
    paces: dict[str, str]  # by homeserver: what was learned of its limit, where that has changed
    sfus: list[KnownSfu]
    heard: list[Heard]
    instances: list[Instance]  # the others that are alive
    namesake: bool = False  # another process is at work under the name of this one


ADMITTED_FOR = 4500.0
"""Seconds: no access token is good for longer, nor the last of those by which the SFU renews it."""


class Admission(NamedTuple):
    """Somebody to whom an access token was given that may still be good. Times in Unix seconds."""

    sfu: str
    room: str  # LiveKit's
    identity: str
    homeserver: str  # that is asked whether the user is in the Matrix room
    user: str
    room_id: str  # Matrix's
    until: float  # then no access token of it is good any more
    due: float  # when that is to be asked next


Participant = tuple[str, str, str]
"""SFU, room, identity."""

RoomKey = tuple[str, str]
"""SFU, name."""


class Transaction(Protocol):
    """The queries of one step. Everything is kept, or nothing.

    Where instances share the database, all rows that are read to be changed are locked, and so that nobody waits for somebody who waits: first the
    rooms of all inputs, in order, and then what is in them; after `no_more_waiting`, only what nobody else has. What somebody else has is left out
    by what looks for work (`todo`, `rooms_due`, `free_rooms`, `get`); anything else begins the transaction anew, with the room that was missing.
    """

    def lock_rooms(self, keys: Collection[RoomKey], made: Collection[RoomKey]) -> list[Room]:
        """Lock these rooms, and return them as far as they are there; `made`: those of them that this transaction may make."""

    def rooms_of(self, events: Collection[int], delegations: Collection[str]) -> list[RoomKey]:
        """The rooms of some rows, which never change. Locks nothing."""

    def no_more_waiting(self) -> None:
        """From here on only what nobody else has is locked."""

    def free_rooms(self, keys: Collection[RoomKey]) -> set[RoomKey]:
        """Lock those of the rooms that nobody else has, and return them; also those that are not there."""

    def of_participants(self, participants: Collection[Participant], *, finished: bool) -> list[DelayedEvent]:
        """The rows that have one of these identities in any form, in the order of their ids; `finished`: also those that are."""

    def rooms(self, keys: Collection[tuple[str, str]]) -> list[Room]:
        """The rooms of these SFUs and names, as far as they are there."""

    def get_all(self, events: Collection[int]) -> list[DelayedEvent]:
        """These rows, as far as they are there."""

    def of_room(self, sfu: str, room: str) -> list[DelayedEvent]:
        """All rows of a room that are not finished."""

    def of_user(self, sfu: str, room: str, user: str) -> list[DelayedEvent]:
        """Those of them that are a Matrix user's."""

    def of_delegation(self, delegation: str) -> list[DelayedEvent]:
        """All rows of a delegation."""

    def get(self, event: int) -> DelayedEvent | None:
        """One row."""

    def todo(self, homeserver: str, lane: Lane, limit: int, now: float, *, harmed: bool | None = None) -> list[DelayedEvent]:
        """The most urgent of the rows that are due, in any order; of those only that have come to harm, or have not, if that is given."""

    def soon(self, homeserver: str, limit: int) -> list[DelayedEvent]:
        """Restarts that are due first, or will be, and that nobody has claimed. Only to be looked at: nothing is locked."""

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

    @property
    def name(self) -> str:
        """Which database it is, for people."""

    @property
    def shared(self) -> bool:
        """Do several instances work with it at the same time? Then nothing of it may be kept in memory but as a hint."""

    @property
    def begin_anew(self) -> tuple[type[Exception], ...]:
        """What a transaction raises by which `atomically` begins it anew: it must reach that."""

    def atomically(self, work: Callable[[Transaction], T], *, about_to_wait: Callable[[], object] | None = None) -> T:
        """Run `work` in one transaction, durable when this returns. Raises StoreUnavailable, and then nothing was kept.

        `about_to_wait` is called when it does no more than wait, for a disk or for a server.
        """

    def reading(self, work: Callable[[Transaction], T]) -> T:
        """Run `work`, which only reads. May work where `atomically` does not, as on a full disk. Raises StoreUnavailable."""

    def reader(self) -> "Reader":
        """For what operators ask, beside the engine. Not of a database in memory, which has but one connection."""

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

    def waiting_since(self, homeserver: str) -> float | None:
        """The earliest departure at a homeserver whose event is not ended yet, whether it is due, under way or to be tried again; None: there is
        none."""

    def disk(self) -> Disk | None:
        """None where the database is somebody else's to look after, or its files cannot be looked at."""

    def keys_mark(self) -> str | None:
        """What `save_keys_mark` was given last."""

    def save_keys_mark(self, mark: str) -> None:
        """Keep a mark by which the next start finds out whether it has the encryption keys of this database."""

    def clock_mark(self) -> str | None:
        """What `save_clock_mark` was given last."""

    def save_clock_mark(self, mark: str) -> None:
        """Keep a mark by which the next start finds out whether the clock was set."""

    # What instances that share the database tell each other.

    def news(self, now: float, word: str = "") -> News:
        """What others have changed; and tells them that this instance is alive, and its `word`. Raises StoreUnavailable."""

    def exchange_pace(self, homeserver: str, change: Callable[[str | None], str | None]) -> None:
        """Give `change` what all instances behind the same address know of a homeserver's limit, and keep what it returns; None: nothing changed.
        One of them at a time, and apart from any transaction. Raises StoreUnavailable."""

    def heard_of(self, heard: Sequence[Heard]) -> None:
        """Tell the others when SFUs were heard of. Raises StoreUnavailable."""

    def ask_rooms(self, sfu: str | None, now: float) -> None:
        """As `Transaction.ask_rooms`, in transactions of its own. Raises StoreUnavailable."""

    def unverified(self, events: Collection[int]) -> set[int]:
        """Those of the rows whose homeserver has not confirmed them, and that are not finished. Raises StoreUnavailable."""

    def peek(self, delegations: Sequence[str]) -> list[DelayedEvent]:
        """The rows of some delegations as they are now. Locks nothing. Raises StoreUnavailable."""

    def times_are_unknown(self, now: float, policy: Policy) -> None:
        """The clock of the database was set: all countdowns count as unknown, and no time is later than now. Raises StoreUnavailable."""

    # To whom access tokens were given, where membership of Matrix rooms is enforced.

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Keep that these were given access tokens, each participant once. What is there already is good no shorter than before, is checked no later,
        and by the homeserver that vouched for it first. Raises StoreUnavailable."""

    def admissions_due(self, now: float, limit: int, lease_ends: float) -> list[Admission]:
        """Those that are to be checked, which nobody else is told until `lease_ends`. Raises StoreUnavailable."""

    def admissions_of(self, participants: Collection[Participant], until: float, lease_ends: float) -> list[Admission]:
        """Those of these participants, which are good until then at least, and are to be checked whenever they are due. They are claimed likewise.
        Raises StoreUnavailable."""

    def settle_admissions(self, checked: Sequence[Admission], over: Sequence[Admission]) -> None:
        """Keep when they are to be checked next and until when they are good, which only grows; and forget those that are over, unless they have been
        given another token meanwhile. Raises StoreUnavailable."""

    def next_admission(self) -> float | None:
        """When the next one is to be checked. Raises StoreUnavailable."""

    def ask_admissions(self, now: float, until: float) -> None:
        """Nobody has watched for a while: all of them are to be checked now, and are good until then at least. Raises StoreUnavailable."""

    @property
    def is_log_large(self) -> bool:
        """Is there housekeeping that cannot wait for an idle time? May be asked from any thread while no other works with the store."""

    def checkpoint(self) -> None:
        """Do it. Raises StoreUnavailable."""

    def idle(self) -> None:
        """There is time for housekeeping."""

    def close(self) -> None:
        """Close the database."""
