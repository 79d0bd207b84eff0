"""Runs all checks at the same time, each within its own time, and all of them within one."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, ParamSpec, TypeVar

from sfu_delegate.doctor.findings import CannotLook, Check, Finding, Result, problem, warning
from sfu_delegate.doctor.words import spoken

WITHIN: Final = 45.0  # seconds for everything

Tell = Callable[[Sequence[Check]], object]
"""Is told which checks are still under way."""

T = TypeVar("T")
P = ParamSpec("P")


class Shared(Generic[T]):
    """What several checks need, and is looked at once. Whoever gives up does not stop it for the others.

    Nobody may be left waiting for it at the end: see `end`.
    """

    def __init__(self, look: Callable[[], Awaitable[T]]) -> None:
        self._look = look
        self._task: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        """What was seen; raises what the look raises, for each who asks."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._begin())
        return await asyncio.shield(self._task)

    async def _begin(self) -> T:
        return await self._look()

    async def end(self) -> T | None:
        """Stop the look, where nobody waits for it any more. What was seen, if it was looked at, and to the end."""
        if self._task is None:
            return None
        self._task.cancel()
        [seen] = await asyncio.gather(self._task, return_exceptions=True)
        return None if isinstance(seen, BaseException) else seen


async def in_thread(work: Callable[P, T], *args: P.args, **given: P.kwargs) -> T:
    """What `work` returns, or raises. If it hangs, as on a disk that is gone, the program ends all the same: Python would wait for asyncio's own
    threads.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = work(*args, **given)
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # nobody waits any more, and the loop is closed
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="doctor in_thread", daemon=True).start()
    return await future


async def run_all(checks: Sequence[Check], tell: Tell = lambda _: None, within: float = WITHIN) -> list[Result]:
    """The results, in the order of the checks."""
    left = list(checks)
    deadline = asyncio.get_running_loop().time() + within

    async def one(check: Check) -> Result:
        result = await _run(check, deadline)
        left.remove(check)
        tell(left)
        return result

    tell(left)
    return list(await asyncio.gather(*map(one, checks)))


async def _run(check: Check, deadline: float) -> Result:
    began = time.monotonic()
    finding = await _looked(check, deadline)
    return Result(check.id, check.subject, finding, time.monotonic() - began)


async def _looked(check: Check, deadline: float) -> Finding:
    try:
        async with asyncio.timeout_at(min(deadline, asyncio.get_running_loop().time() + check.within)):
            return await check.look()
    except CannotLook as cannot:
        return cannot.finding
    except TimeoutError:
        return problem(f"there was no answer within {spoken(check.within)}", "look at what it asks, and at the network between; then run this again")
    except Exception as error:  # one that fails must not take the others with it
        # Not its text: it may hold what must not be shown.
        return warning(f"the check itself failed ({type(error).__name__})", "please report this as a defect, with the version")
