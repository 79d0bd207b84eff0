"""What the HTTP side needs of the daemon: a place to put inputs, and a way to see what becomes of a fresh delegation."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from sfu_delegate.delegation.model import DelayedEvent, Input
from sfu_delegate.delegation.replies import Reply


class Overloaded(Exception):
    """More inputs wait than may, or the daemon is stopping. `retry_after` in seconds."""

    def __init__(self, sentence: str, retry_after: float):
        super().__init__(sentence)
        self.retry_after = retry_after


class Unavailable(Exception):
    """The database does not work. What was handed in is not kept, or perhaps it is: where the database hung, or was lost in a commit.

    The text is for operators, not for clients. `retry_after` in seconds.
    """

    def __init__(self, sentence: str, retry_after: float):
        super().__init__(sentence)
        self.retry_after = retry_after


Told = Callable[[Reply | Exception], object]
"""Who is told, in the event loop, what became of an input. It must not raise."""


class Watch(Protocol):
    """The delayed events of one delegation, as they change while the watch is open."""

    rows: dict[int, DelayedEvent]

    async def until_decided(self, events: set[int], timeout: float) -> bool:  # noqa: ASYNC109
        """Wait until each of these rows was verified or has ended, or one has ended without; at most `timeout` seconds. True when that came."""


class Port(Protocol):
    """The daemon, as the HTTP side sees it."""

    def hand(self, given: Input, told: Told) -> None:
        """Hand an input in. `told` is called once, perhaps at once: with the reply when it is durable, or with what `put` would raise."""

    async def put(self, given: Input) -> Reply:
        """Hand an input in, and get its reply once it is durable.

        Raises Overloaded (nothing happened) or Unavailable, or what the rules raise for this input (`replies.TooMany`).
        """

    def watch(self, delegation: str) -> AbstractContextManager[Watch]:
        """Watch a delegation, by the id that it is going to have."""

    def now(self) -> float:
        """Unix seconds, by the daemon's clock."""
