"""The daemon's clock: Unix seconds that a step of the system clock cannot move.

Deadlines are stored as wall-clock time. Within a process time advances by CLOCK_BOOTTIME from the start, which goes on while the machine
sleeps and which nobody can set. A restart on the same boot finds out by the mark whether the system clock was set in between.
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
