"""The daemon's clock: Unix seconds that a step of the system clock cannot move.

Deadlines are stored as wall-clock time. Within a process time advances by CLOCK_BOOTTIME from the start, which goes on while the machine
sleeps and which nobody can set. A restart on the same boot finds out by the mark whether the system clock was set in between.

Instances that share a database follow its clock (`follow`): what one of them has written, the others compare with their own time.
"""

import time

SET_IF_BEYOND = 5.0  # seconds; time synchronisation that only slews stays far below


class Clock:
    """Call it for Unix seconds."""

    def __init__(self) -> None:
        # When this machine booted, by the system clock as it is set now.
        self._booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    def __call__(self) -> float:
        return self._booted + time.clock_gettime(time.CLOCK_BOOTTIME)

    @staticmethod
    def elapsed() -> float:
        """Seconds since this machine booted."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def follow(self, theirs: float, asked_at: float, answered_at: float) -> float:
        """Agree with a clock that said `theirs` at some time between the two, which are `elapsed`'s: moved is only what is surely wrong.

        Returns the seconds by which it was moved.
        """
        earliest, latest = theirs - answered_at, theirs - asked_at
        moved = max(earliest - self._booted, 0.0) or min(latest - self._booted, 0.0)
        self._booted += moved
        return moved

    def behind(self) -> float:
        """Seconds by which the system clock is ahead of this one: it was set since the start, or differs from the database's."""
        return time.time() - self()

    @property
    def mark(self) -> str:
        """To be kept beside the times of this clock."""
        return f"{self._booted:.3f}"

    def agrees_with(self, mark: str | None) -> bool:
        """Can times kept with this mark be compared with this clock's? Not after another boot, nor after the system clock was set."""
        if mark is None:
            return True
        try:
            return abs(float(mark) - self._booted) <= SET_IF_BEYOND
        except ValueError:
            return False
