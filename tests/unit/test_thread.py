"""The engine's thread: one piece of work after the other, each with its result where it is waited for, and nothing that goes wrong stops it."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import pytest
import uvloop
from sfu_delegate.daemon.thread import Closed, WorkThread

from tests.engine_port import until

GENEROUS = 20.0  # seconds until a test gives up


@pytest.fixture
async def thread() -> AsyncIterator[WorkThread]:
    """A thread that has ended when the test has, and has left nothing to the loop that went wrong there."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    working = WorkThread("work")
    yield working
    working.close()
    await asyncio.wait_for(asyncio.to_thread(working.join), GENEROUS)
    assert not complaints


@pytest.fixture(autouse=True)
def nothing_unhandled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """No thread ends with an exception."""
    unhandled: list[object] = []
    monkeypatch.setattr(threading, "excepthook", unhandled.append)
    yield unhandled
    assert not unhandled


@contextmanager
def gate(thread: WorkThread) -> Iterator["asyncio.Future[bool]"]:
    """Work that goes on until the block has ended, and has begun when the block begins."""
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> bool:
        begun.set()
        return go_on.wait(GENEROUS)

    future = thread.run(wait)
    try:
        assert begun.wait(GENEROUS)
        yield future
    finally:
        go_on.set()


async def test_results(thread: WorkThread) -> None:
    """What work returns is what whoever waits for it gets, whatever it is."""
    assert await thread.run(lambda: 1) == 1
    assert await thread.run(lambda: "") == ""
    error = ValueError("as a result")
    assert await thread.run(lambda: error) is error


async def test_work_is_done_in_one_other_thread(thread: WorkThread) -> None:
    """By its name, and always the same one; the process does not wait for its end."""
    [first, second] = [await thread.run(threading.current_thread) for _ in range(2)]
    assert first is second is not threading.current_thread()
    assert (first.name, first.daemon) == ("work", True)


async def test_order(thread: WorkThread) -> None:
    """Work is done as it came, one piece after the other, and told in that order."""
    done: list[int] = []
    told: list[int] = []
    running = 0

    def work(number: int) -> int:
        nonlocal running
        running += 1
        assert running == 1
        done.append(number)
        running -= 1
        return number

    futures = []
    with gate(thread):
        for number in range(1000):
            future = thread.run(lambda number=number: work(number))  # type: ignore[misc]
            future.add_done_callback(lambda future: told.append(future.result()))
            futures.append(future)
        assert not done
    assert await asyncio.gather(*futures) == done == list(range(1000))
    await until(lambda: len(told) == 1000)
    assert told == done


async def test_the_loop_goes_on_meanwhile(thread: WorkThread) -> None:
    """Work that takes its time holds up only what comes behind it in the thread."""
    with gate(thread) as waiting:
        behind = thread.run(lambda: "behind")
        assert await asyncio.to_thread(lambda: "elsewhere") == "elsewhere"
        assert not waiting.done()
        assert not behind.done()
    assert await waiting
    assert await behind == "behind"


class Odd(BaseException):
    """No error of a program."""


@pytest.mark.parametrize("error", [ValueError("no"), Odd(), SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
async def test_errors(thread: WorkThread, error: BaseException) -> None:
    """What work raises is what whoever waits for it gets, and the next piece is done all the same."""

    def fails() -> None:
        raise error

    failing, next_one = thread.run(fails), thread.run(lambda: "done")
    await asyncio.wait({failing}, timeout=GENEROUS)
    assert failing.done()
    assert failing.exception() is error
    assert await next_one == "done"


async def test_an_error_that_a_future_does_not_take(thread: WorkThread) -> None:
    """A StopIteration cannot be set as a future's exception: whoever waits must hear of a failure all the same, and not wait for ever."""
    asyncio.get_running_loop().set_exception_handler(lambda _, __: None)
    failing = thread.run(lambda: next(iter(())))
    assert await thread.run(lambda: "done") == "done"
    assert failing.done()
    assert failing.exception() is not None


async def test_a_cancellation_that_work_raises(thread: WorkThread) -> None:
    """It is the waiter's, as any other error is."""

    def fails() -> None:
        raise asyncio.CancelledError

    failing = thread.run(fails)
    with pytest.raises(asyncio.CancelledError):
        await failing
    assert await thread.run(lambda: "done") == "done"


async def test_a_waiter_that_is_cancelled(thread: WorkThread) -> None:
    """Its work is done, begun or not, and others are not disturbed, whether the work returns or raises."""
    done: list[str] = []

    def works(name: str) -> str:
        done.append(name)
        return name

    def fails() -> str:
        done.append("fails")
        raise ValueError("nobody is told")

    with gate(thread) as begun:
        waiting = [thread.run(lambda: works("works")), thread.run(fails)]
        last = thread.run(lambda: works("last"))
        assert begun.cancel()
        assert all(future.cancel() for future in waiting)
    assert await last == "last"
    assert done == ["works", "fails", "last"]
    assert begun.cancelled()
    assert all(future.cancelled() for future in waiting)


async def test_closing() -> None:
    """What has come is done, and told; then the thread ends."""
    thread = WorkThread("work")
    worker = await thread.run(threading.current_thread)
    with gate(thread):
        futures = [thread.run(lambda number=number: number) for number in range(100)]  # type: ignore[misc]
        thread.close()
        assert worker.is_alive()
    await asyncio.to_thread(thread.join)
    assert not worker.is_alive()
    assert await asyncio.gather(*futures) == list(range(100))


async def test_work_after_the_end() -> None:
    """It raises at once, before and after the thread has ended, and is never done."""
    thread = WorkThread("work")
    done: list[int] = []
    with gate(thread):
        thread.close()
        with pytest.raises(Closed):
            thread.run(lambda: done.append(1))
    thread.close()
    await asyncio.to_thread(thread.join)
    with pytest.raises(Closed):
        thread.run(lambda: done.append(2))
    assert not done


class Thing:
    """What can be watched."""


async def test_nothing_is_held(thread: WorkThread) -> None:
    """A result, and the work that made it, are gone when nobody has them any more, though nothing comes behind them."""

    class Work:
        def __call__(self) -> Thing:
            return Thing()

    work = Work()
    watched: list[weakref.ref[object]] = [weakref.ref(work)]
    future = thread.run(work)
    watched.append(weakref.ref(await future))
    watched.append(weakref.ref(future))
    del work, future
    async with asyncio.timeout(GENEROUS):
        await until(lambda: not any(one() for one in watched))


class Failure(Exception):
    """An error that holds something."""

    def __init__(self, thing: Thing) -> None:
        super().__init__("failed")
        self.thing = thing


async def test_no_error_is_held(thread: WorkThread) -> None:
    """An error, and what it holds, neither."""
    watched: list[weakref.ref[object]] = []

    def fails() -> None:
        thing = Thing()
        watched.append(weakref.ref(thing))
        raise Failure(thing)

    future = thread.run(fails)
    await asyncio.wait({future})
    assert isinstance(future.exception(), Failure)
    del future
    async with asyncio.timeout(GENEROUS):
        await until(lambda: gc.collect() >= 0 and watched[0]() is None)


async def test_the_result_of_a_cancelled_one_is_not_held(thread: WorkThread) -> None:
    """Nobody wants it."""
    watched: list[weakref.ref[object]] = []

    def makes() -> Thing:
        thing = Thing()
        watched.append(weakref.ref(thing))
        return thing

    with gate(thread):
        thread.run(makes).cancel()
    async with asyncio.timeout(GENEROUS):
        await until(lambda: watched and watched[0]() is None)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_loop_that_is_closed_before_the_result_comes(new_loop: Callable[[], asyncio.AbstractEventLoop], fails: bool) -> None:
    """There is nobody left to tell: the thread ends, and nothing is raised anywhere."""
    go_on = threading.Event()
    loop = new_loop()

    async def begin() -> tuple[WorkThread, threading.Thread]:
        thread = WorkThread("work")
        worker = await thread.run(threading.current_thread)

        def wait() -> None:
            go_on.wait(GENEROUS)
            if fails:
                raise ValueError("nobody is told")

        thread.run(wait)
        return thread, worker

    thread, worker = loop.run_until_complete(begin())
    loop.close()
    assert worker.is_alive()
    go_on.set()
    thread.close()
    worker.join(GENEROUS)
    assert not worker.is_alive()


def test_each_loop() -> None:
    """Results come in the loop that the thread was made in, also in the daemon's."""

    async def results() -> list[int]:
        thread = WorkThread("work")
        loops = []
        future = thread.run(lambda: 1)
        future.add_done_callback(lambda _: loops.append(asyncio.get_running_loop()))
        found = [await future, await thread.run(lambda: 2)]
        assert loops == [asyncio.get_running_loop()]
        thread.close()
        await asyncio.to_thread(thread.join)
        return found

    for new_loop in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            assert runner.run(results()) == [1, 2]
