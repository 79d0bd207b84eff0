"""One piece of work at a time for each key, shared by everybody who asks for it meanwhile.

A waiter that gives up never stops the work for the others.
"""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

V = TypeVar("V")


class InFlight(Generic[V]):
    """The work that is under way, by key."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[V]] = {}

    async def share(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """The result of the work that is under way for the key, or of `work()`, which is begun if there is none.

        Raises what the work raises.
        """
        return await asyncio.shield(self._tasks.get(key) or self.begin(key, work()))

    def __contains__(self, key: Hashable) -> bool:
        """Is work under way for the key?"""
        return key in self._tasks

    def begin(self, key: Hashable, work: Coroutine[Any, Any, V]) -> asyncio.Task[V]:
        """Begin with the work for a key for which none is under way. To be shielded: others may come to wait for it."""
        task = self._tasks[key] = asyncio.create_task(work)
        task.add_done_callback(lambda done: self._ended(key, done))
        return task

    async def aclose(self) -> None:
        """Stop everything that is under way. Whoever still waits is cancelled."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, key: Hashable, task: asyncio.Task[V]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # asked for, so that asyncio does not complain where every waiter has given up
