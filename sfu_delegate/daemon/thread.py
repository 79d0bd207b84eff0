"""The engine's thread: one piece of work after the other, each with its result in the event loop.

The standard library's executor does the same, and takes two to three times as long for the way there and back, which every step goes.
"""

import asyncio
import sys
import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Closed(RuntimeError):
    """Nothing is done any more."""


class WorkThread:
    """A thread that works for the running event loop. The process does not wait for its end."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Have `work` done after everything that came before. The future has what it returns or raises."""
        if self._closed:
            raise Closed("the thread is closed")
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put((work, future))
        return future

    def close(self) -> None:
        """Nothing more will come; what has come is done, as long as the loop is there."""
        self._closed = True
        self._queue.put(None)

    def join(self) -> None:
        """Wait, in another thread, until it has done everything after `close`."""
        self._thread.join()

    @property
    def where(self) -> list[str]:
        """What it is doing just now, innermost last, as `module:line function`; empty if it has ended."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = traceback.walk_stack(frame) if frame is not None else ()
        return [f"{of.f_globals.get('__name__', '?')}:{line} {of.f_code.co_name}" for of, line in stack][::-1]

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, future = item
            try:
                result, error = work(), None
            except BaseException as raised:  # whoever waits gets it, whatever it is
                result, error = None, raised
            try:
                self._loop.call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:  # the loop is closed, and there is nobody left to tell
                return
            del item, work, future, result, error  # nothing is held until the next one comes


def _settle(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if future.done():
        return  # cancelled
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):  # a future takes none
        future.set_exception(RuntimeError("the work raised StopIteration"))
    else:
        future.set_exception(error)
