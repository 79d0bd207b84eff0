"""What was wrong, with whom, and when: so that each harm can be held against what the daemon could have done about it.

Targets are "daemon", "instance" (one of several, which excuses nothing: there are others), "database", "sfu", "slow sfu" (it answers late, but in
time), "webhooks", "harness" (this process was not scheduled: for the daemon as if everybody hung), and homeservers by name.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

DAEMON, INSTANCE, DATABASE, SFU, SLOW_SFU, WEBHOOKS, HARNESS = "daemon", "instance", "database", "sfu", "slow sfu", "webhooks", "harness"


@dataclass(slots=True, eq=False)
class Disturbance:
    """One thing that was wrong with one target. `tail`: seconds after its end for which it still has an effect, such as a hung request's timeout."""

    target: str
    what: str
    begin: float
    end: float | None = None  # None while it lasts
    tail: float = 0.0


class Disturbances:
    """The log of them. Times are Unix seconds of `clock`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_target: dict[str, list[Disturbance]] = {}

    @contextmanager
    def disturbed(self, target: str, what: str, tail: float = 0.0) -> Iterator[None]:
        """For as long as the block lasts, this is wrong with the target."""
        disturbance = Disturbance(target, what, self._clock(), tail=tail)
        self._by_target.setdefault(target, []).append(disturbance)
        try:
            yield
        finally:
            disturbance.end = self._clock()

    def add(self, target: str, what: str, begin: float, end: float) -> None:
        """Something that was found out afterwards."""
        self._by_target.setdefault(target, []).append(Disturbance(target, what, begin, end))

    def during(self, targets: Collection[str], begin: float, end: float) -> list[Disturbance]:
        """What had an effect on one of the targets between two times."""
        found = [d for target in targets for d in self._by_target.get(target, ()) if d.begin < end and self._until(d) > begin]
        return sorted(found, key=lambda d: d.begin)

    def calm(self, targets: Collection[str], begin: float, end: float) -> list[float]:
        """The lengths (seconds) of the stretches between two times in which nothing was wrong with any of the targets."""
        stretches, at = [], begin
        for disturbance in self.during(targets, begin, end):
            if disturbance.begin > at:
                stretches.append(disturbance.begin - at)
            at = max(at, self._until(disturbance))
        if end > at:
            stretches.append(end - at)
        return stretches

    def counts(self) -> dict[str, dict[str, int]]:
        """How often what was wrong with whom."""
        return {target: dict(Counter(d.what for d in found)) for target, found in sorted(self._by_target.items())}

    def _until(self, disturbance: Disturbance) -> float:
        return float("inf") if disturbance.end is None else disturbance.end + disturbance.tail
