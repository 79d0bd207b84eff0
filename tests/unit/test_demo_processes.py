"""Child processes: what they write is kept, and they end when they are told to."""

import asyncio
import signal
import socket
import sys
from pathlib import Path

import pytest
from sfu_delegate.demo.processes import HOST, Child, Died, NeverHappened, free_ports, until

SPEAKS_AND_WAITS = "import sys, time; sys.stderr.write('ready\\n'); sys.stderr.flush(); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SPEAKS_AND_WAITS


async def started(program: str, directory: Path) -> Child:
    """A child that has said that it is ready."""
    ready = asyncio.Event()
    child = await Child.start("child", [sys.executable, "-c", program], directory=directory, on_line=lambda _: ready.set())
    async with asyncio.timeout(30):
        await ready.wait()
    return child


async def test_a_child_stops_at_sigterm(tmp_path: Path) -> None:
    """It is told, ends by that signal, and its last words are kept."""
    child = await started(SPEAKS_AND_WAITS, tmp_path)
    assert child.returncode is None
    assert await child.stop() == -signal.SIGTERM
    assert child.tail() == "ready"


async def test_a_stubborn_child_is_killed(tmp_path: Path) -> None:
    """Whoever ignores SIGTERM gets SIGKILL."""
    child = await started(STUBBORN, tmp_path)
    assert await child.stop(kill_after=0.05) == -signal.SIGKILL


async def test_stopping_twice_is_fine(tmp_path: Path) -> None:
    """A child that has ended already is only waited for."""
    child = await started(SPEAKS_AND_WAITS, tmp_path)
    await child.kill()
    assert await child.stop() == -signal.SIGKILL
    await child.kill()


async def test_a_child_that_ended_tells_why(tmp_path: Path) -> None:
    """`must_run` raises with the last lines."""
    child = await Child.start("child", [sys.executable, "-c", "raise SystemExit('no such luck')"], directory=tmp_path)
    assert await child.wait() == 1
    with pytest.raises(Died, match=r"child ended with 1.*\n.*no such luck"):
        child.must_run()


async def test_what_a_child_writes_can_go_into_a_file(tmp_path: Path) -> None:
    """Standard output and error, and `tail` reads from there."""
    output = tmp_path / "child.log"
    child = await Child.start("child", [sys.executable, "-c", "print('one'); print('two')"], directory=tmp_path, output=output)
    assert await child.wait() == 0
    assert child.tail(1) == "two"


async def test_a_commanded_child_hears(tmp_path: Path) -> None:
    """`tell` writes to its standard input."""
    child = await Child.start("child", [sys.executable, "-c", "import sys; sys.exit(int(sys.stdin.readline()))"], directory=tmp_path, commanded=True)
    child.tell("7")
    assert await child.wait() == 7


async def test_until_gives_the_first_good_result() -> None:
    """None and False are looked past; what does not come in time is named."""
    results = iter([None, False, "here"])

    async def look() -> str | bool | None:
        return next(results)

    async def never() -> None:
        return None

    assert await until(look, 30.0, "a result") == "here"
    with pytest.raises(NeverHappened, match=r"not within 0 s: a miracle"):
        await until(never, 0.0, "a miracle")


def test_free_ports_are_free_and_different() -> None:
    """They can be bound, and no two are the same."""
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        socket.create_server((HOST, port)).close()
