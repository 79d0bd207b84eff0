"""Who is told what happens, and the conditions that hold or do not over time."""

from typing import TYPE_CHECKING

from sfu_delegate.delegation.model import Input, Listed, Task, Verdict
from sfu_delegate.delegation.replies import Reply
from sfu_delegate.engine import Step
from sfu_delegate.sandbox import homeserver as matrix

if TYPE_CHECKING:
    from tests.simulation.daemon import Daemon


class Violation(AssertionError):
    """The daemon broke one of its promises. `rule` is the short name of the promise."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


class Spans:
    """A condition that holds or does not, over time."""

    def __init__(self, since: float, *, holds: bool) -> None:
        self.changes: list[tuple[float, bool]] = [(since, holds)]

    def set(self, now: float, holds: bool) -> None:
        """From now on it holds, or does not."""
        if self.changes[-1][1] is not holds:
            self.changes.append((now, holds))

    def __bool__(self) -> bool:
        return self.changes[-1][1]

    def times(self, start: float, end: float) -> list[tuple[float, float]]:
        """The parts of [start, end] in which it held."""
        bounds = [*(at for at, _ in self.changes[1:]), end]
        spans = ((max(start, at), min(end, until)) for (at, holds), until in zip(self.changes, bounds, strict=True) if holds)
        return [(a, b) for a, b in spans if a < b]

    def always(self, start: float, end: float) -> bool:
        """Did it hold all the time from start to end?"""
        return sum(b - a for a, b in self.times(start, end)) >= end - start - 1e-6

    def ever(self, start: float, end: float) -> bool:
        """Did it hold at any time in [start, end]?"""
        return any(holds and at <= end for at, holds in self.changes if at >= start) or self.at(start)

    def at(self, when: float) -> bool:
        """Did it hold then?"""
        return next((holds for at, holds in reversed(self.changes) if at <= when), self.changes[0][1])


class Watch:
    """Who is told what happens. Every method may raise Violation."""

    def ended(self, event: matrix.DelayedEvent, task: Task | None, decided_at: float) -> None:
        """A delayed event ended at its homeserver: by a task of the daemon that was claimed at `decided_at` (true time), or otherwise."""

    def kept(self, given: Input, reply: Reply, at: float) -> None:
        """An input from outside was acknowledged, which was applied at `at` (true time)."""

    def stepped(self, daemon: "Daemon", step: Step, inputs: int) -> None:
        """The engine made a step."""

    def answered(self, homeserver: str, verdict: Verdict) -> None:
        """A homeserver's answer reached the daemon, or it became clear that none would."""

    def looked(self, room: str, asked_at: float, listed: tuple[Listed, ...] | None) -> None:
        """The result of a look, asked at `asked_at` (true time), reached the daemon."""

    def stopped(self, daemon: "Daemon") -> None:
        """An instance of the daemon was killed."""

    def started(self, daemon: "Daemon") -> None:
        """An instance of the daemon is up."""
