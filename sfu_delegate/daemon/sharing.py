"""What one of several instances on a shared database does beside its steps: it keeps to the database's clock, takes over what the others have
changed, and has everything counted now and then.
"""

import asyncio
import os
import socket
from time import perf_counter
from typing import TYPE_CHECKING

from sfu_delegate.daemon.clock import SET_IF_BEYOND, Clock
from sfu_delegate.delegation.model import DelayedEvent
from sfu_delegate.engine import Engine
from sfu_delegate.observe.logs import frames, get_logger
from sfu_delegate.store.base import Census, StoreUnavailable

if TYPE_CHECKING:  # its driver takes memory that nobody needs who has the embedded database
    from sfu_delegate.store.postgresql import PostgresStore

REFRESH_EVERY = 1.0  # seconds; so much later is what a dead instance had claimed taken over
REFRESH_PART = 0.1  # of all time at the most, where homeservers are many, or the database is far away
COUNT_EVERY = 15.0
COUNT_PART = 0.005  # of all time: a million rows take half a second or so …
COUNT_SELDOM = 300.0  # … but as often as that, however long it takes
WATCH_EVERY = 0.25  # … where a client waits for what another instance may do

log = get_logger(__name__)


def instance_name(given: str, port: int) -> str:
    """The name of this instance: the configured one, or what no other has. A process that takes the place of another one should have the same."""
    if given:
        return given
    return f"{socket.gethostname()}:{port or f'pid {os.getpid()}'}"


def meet(store: "PostgresStore", clock: Clock) -> bool:
    """Set the clock by the database's, at the start. False, if that one was set back: times in the database lie in the future."""
    keep_to(store, clock)
    seen = store.newest_sign_of_life()
    return seen is None or seen <= clock() + SET_IF_BEYOND


def keep_to(store: "PostgresStore", clock: Clock) -> float:
    """Follow the database's clock; the seconds by which ours was moved."""
    asked_at = clock.elapsed()
    theirs = store.time()
    return clock.follow(theirs, asked_at, clock.elapsed())


class Sharing:
    """See above. But for `counting`, everything is to be called in the engine's thread."""

    def __init__(self, engine: Engine, store: "PostgresStore", clock: Clock) -> None:
        self._engine = engine
        self._store = store
        self._clock = clock
        self._next = 0.0  # by `perf_counter`
        self._took = (0.0, 0.0)  # seconds, by the last two counts
        self._counted: Census | None = None
        self._others: set[str] = set()
        self._had_namesake = False
        self._unsure = False  # the clock was set, and what is stored is not yet brought into line

    @property
    def pause(self) -> float:
        """Seconds until the next `refresh`."""
        return max(0.0, self._next - perf_counter())

    def refresh(self) -> float | None:
        """Take over what is new; when the engine wants to step next. Raises StoreUnavailable."""
        begun = perf_counter()
        self._next = begun + REFRESH_EVERY
        moved = keep_to(self._store, self._clock)
        now = self._clock()
        if abs(moved) > SET_IF_BEYOND:
            log.warning("clock_was_set", seconds=round(moved, 1), consequence="all delayed events are restarted soon: their countdowns are not known")
            self._engine.clock_moved(moved, now)
            self._unsure = True
        if self._unsure:  # each instance by itself: until it has noticed, it writes times of the old clock
            self._store.times_are_unknown(now, self._engine.policy)
            self._unsure = False
        counted, self._counted = self._counted, None
        if counted is not None:
            self._engine.recount(counted)
        wake = self._engine.refresh(now)
        self._tell_of_others()
        self._next = max(self._next, begun + (perf_counter() - begun) / REFRESH_PART)
        return wake

    def _tell_of_others(self) -> None:
        others = {other.name for other in self._engine.instances}
        gone = self._others - others
        vanished = self._store.listed(gone) if gone else set()
        for name in sorted(others - self._others):
            log.info("instance_appeared", other=name, instances=len(others) + 1)
        for name in sorted(gone - vanished):
            log.info("instance_stopped", other=name, instances=len(others) + 1)
        for name in sorted(vanished):
            log.warning("instance_disappeared", other=name, instances=len(others) + 1)
        self._others = others
        if self._engine.has_namesake and not self._had_namesake:
            log.error(
                "instance_name_taken",
                consequence="another process has the name of this one: they are counted as one, and neither hears of the other",
                remedy="give each its own `postgresql.instance`",
            )
        self._had_namesake = self._engine.has_namesake

    def rows(self, delegations: list[str]) -> list[DelayedEvent]:
        """The rows of some delegations as they are now."""
        return self._store.peek(delegations)

    def took(self, seconds: float) -> float:
        """Everything was counted in so many seconds; returns the pause until the next time. The lesser of two counts, since one of them may have
        waited for a database that hung."""
        self._took = (self._took[1], seconds)
        return max(COUNT_EVERY, min(COUNT_SELDOM, min(self._took) / COUNT_PART))

    async def counting(self) -> None:
        """Have everything counted again and again, in a thread of its own, until this is cancelled."""
        pause = COUNT_EVERY
        while True:
            await asyncio.sleep(pause)
            begun = perf_counter()
            try:
                self._counted = await asyncio.to_thread(self._store.census)
            except StoreUnavailable:
                continue
            except Exception as error:
                log.error("counting_failed", error=type(error).__name__, at=frames(error))
                continue
            pause = self.took(perf_counter() - begun)
