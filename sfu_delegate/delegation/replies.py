"""What is answered to an input, once it is durable."""

from dataclasses import dataclass

from sfu_delegate.delegation.model import Carried, DelayedEvent, Note


class TooMany(Exception):
    """A limit of the configuration would be exceeded. `limit` is its key, `value` its value."""

    def __init__(self, limit: str, value: int, sentence: str):
        super().__init__(sentence)
        self.limit = limit
        self.value = value


@dataclass(frozen=True, slots=True)
class Accepted:
    """The reply to an Accept. `created` is False when the participant had delegated exactly these events before."""

    delegation: str
    created: bool
    rows: tuple[DelayedEvent, ...]
    carried: tuple[Carried, ...] = ()  # events that another delegation had


@dataclass(frozen=True, slots=True)
class Found:
    """The reply to a Find, empty when there is no such delegation."""

    rows: tuple[DelayedEvent, ...]
    history: tuple[Note, ...]


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The reply to a Withdraw or an End: its rows as they are by then; empty when there is no such delegation."""

    rows: tuple[DelayedEvent, ...]


@dataclass(frozen=True, slots=True)
class Touched:
    """The reply to everything else: how many rows it was about."""

    rows: int


Reply = Accepted | Found | Withdrawn | Touched
