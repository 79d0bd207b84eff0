"""How a daemon is, as its operator asks for it: what the status, and the page, are made of. Numbers since the start are this instance's own."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from sfu_delegate.delegation.model import Lane
from sfu_delegate.store.reading import Reader

T = TypeVar("T")


class HomeserverState(NamedTuple):
    """What is known of one homeserver. Times in seconds."""

    name: str
    entry: str  # of the configuration
    problem: str | None  # "" where it answers; None: it has not been asked
    service: str | None  # what is wrong with its application service, "" where it works, None where there is none, or it was not tried
    events: int  # open ones
    limit: str  # unknown, none, some
    rate: float  # actions a second; only where the limit is `some`
    burst: float
    exempt: bool  # by configuration, or by its application service
    lateness: float  # by which the most endangered restart will miss its deadline
    waiting: Mapping[Lane, tuple[int, float]]  # how many actions are due, and since when the first of them


class SfuState(NamedTuple):
    """What is known of one SFU. Times in Unix seconds; 0: never, since the start."""

    name: str
    url: str
    problem: str | None  # "" where it answers; None: it has not been asked
    heard_at: float  # the last webhook
    answered_at: float  # the last look that was answered had been sent then
    failing_since: float | None
    several_nodes: bool


class Promises(NamedTuple):
    """The two promises, since the start of this instance."""

    lost_while_connected: int
    ended: Mapping[str, int]  # by outcome
    departures: int  # goodbyes of ours that got through
    told: int  # … of which the times below are: the last ones
    p50: float | None  # seconds from the word of a departure until then; None: there was none
    p99: float | None
    longest: float | None


@dataclass(frozen=True, slots=True)
class Overview:
    """All of it. Times in Unix seconds by the daemon's clock."""

    version: str
    instance: str  # "" where there is but one
    instances: int
    started_at: float
    now: float
    database: str  # which one it is
    keep: float  # seconds for which finished delegations are kept
    promises: Promises
    states: Mapping[tuple[str, str], int]  # delayed events by (state, presence)
    webhooks: Mapping[tuple[str, str, str], int]  # since the start, by SFU, event, result
    actions: Mapping[tuple[str, str], int]  # since the start, by action and outcome
    homeservers: tuple[HomeserverState, ...] = field(default=())
    sfus: tuple[SfuState, ...] = field(default=())


class Inspection(Protocol):
    """What the operator's questions are answered from."""

    def overview(self) -> Overview:
        """How the daemon is now."""

    def read(self, work: Callable[[Reader], T]) -> Awaitable[T]:
        """Ask the database, beside the engine. Raises Unavailable."""
