"""What to do next at one homeserver: the action whose waiting does most harm, and how many at a time. No I/O, no clock."""

from collections.abc import Iterable
from dataclasses import dataclass

from sfu_delegate.delegation.model import DelayedEvent, Lane

ENDANGERED = 10.0
"""Seconds before its deadline from which a restart goes before departures: a person dropped is worse than a ghost that stays a moment longer."""


def choose(candidates: Iterable[DelayedEvent], free: int, now: float) -> list[DelayedEvent]:
    """The `free` most urgent of the candidates, most urgent first: restarts that are about to miss their deadline, then departures (oldest
    first), then the other restarts (by deadline)."""
    if free <= 0:
        return []

    def rank(row: DelayedEvent) -> tuple[int, float]:
        harm = row.harm if row.harm is not None else now
        if row.lane is Lane.END:
            return (1, harm)
        return (0 if now < harm <= now + ENDANGERED else 2, harm)

    return sorted(candidates, key=rank)[:free]


@dataclass(slots=True)
class Pace:
    """How many requests one homeserver gets at a time.

    It starts low, doubles with success up to `most`, and drops to one when the homeserver says that it has had enough (429); nothing at all is
    sent until the time that it named has passed, and it takes more successes from then on until more are sent at a time.
    """

    most: int
    width: int = 4
    in_flight: int = 0
    succeeded: int = 0
    caution: int = 1  # how many times `width` successes it takes to double it
    blocked_until: float = 0.0

    def free(self, now: float) -> int:
        """How many more requests may be sent now."""
        return 0 if now < self.blocked_until else max(0, min(self.width, self.most) - self.in_flight)

    def began(self) -> None:
        """A request is on its way."""
        self.in_flight += 1

    def ended(self, *, answered: bool) -> None:
        """A request came back; `answered`: with a definite answer."""
        self.in_flight = max(0, self.in_flight - 1)
        if answered and self.width < self.most:
            self.succeeded += 1
            if self.succeeded >= self.width * self.caution:
                self.succeeded, self.width = 0, min(self.most, self.width * 2)

    def limited(self, retry_after: float, now: float) -> None:
        """The homeserver refused a request because there were too many; `retry_after` in seconds."""
        self.succeeded, self.width, self.caution = 0, 1, 16
        self.blocked_until = max(self.blocked_until, now + retry_after)
