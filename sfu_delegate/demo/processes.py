"""Child processes that never outlive us: stopped by their process id, and killed by the kernel when we die.

Each runs in a session of its own, so that Ctrl-C in a terminal reaches only us, and we stop the children in order.
"""

import asyncio
import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

HOST = "127.0.0.1"
KILL_AFTER = 10.0  # seconds that a process has to obey SIGTERM
LOOK_EVERY = 0.05  # seconds between two looks at something that does not tell when it changes
LONGEST_LINE = 1 << 20

# Begins as the child, asks the kernel for SIGKILL when its parent dies (PR_SET_PDEATHSIG, where there is such a thing), and becomes the command.
_TIED = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (AttributeError, OSError):
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class NeverHappened(Exception):
    """Something that was waited for did not come in time."""


class Died(Exception):
    """A child process ended by itself, or did not start. The text ends with the last lines that it wrote."""


async def until(look: Callable[[], Awaitable[T | None]], within: float, what: str) -> T:
    """The first result of `look` that is neither None nor False. Raises NeverHappened, with `what`, after `within` seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within
    while True:
        found = await look()
        if found is not None and found is not False:
            return found
        if loop.time() >= deadline:
            raise NeverHappened(f"not within {within:g} s: {what}")
        await asyncio.sleep(LOOK_EVERY)


# Not from the range of the system, from which an outgoing connection might take the port of a process that is stopped for a moment.
_PORTS = range(15_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now. Bound first, all at the same time, so that no two of them are the same."""
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = secrets.choice(_PORTS)
            with suppress(OSError):
                held.enter_context(socket.create_server((HOST, port)))
                ports.append(port)
        return ports


class Child:
    """One child process. What it writes to its standard error goes line by line to `on_line`, or into the file `output`, and its last lines
    can be had from `tail`.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, output: Path | None, on_line: Callable[[str], None] | None) -> None:
        self.name = name
        self._process = process
        self._output = output
        self._on_line = on_line
        self._last: list[str] = []
        self._reader = asyncio.create_task(self._read()) if process.stderr is not None else None

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        directory: Path,
        output: Path | None = None,
        on_line: Callable[[str], None] | None = None,
        environment: Mapping[str, str] | None = None,
        commanded: bool = False,
    ) -> "Child":
        """Start `command` in `directory`, with `environment` in place of ours. `commanded`: `tell` can write to its standard input."""
        file = None if output is None else output.open("ab")
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-ISc",
                _TIED,
                str(os.getpid()),
                *command,
                cwd=directory,
                env=environment,
                stdin=asyncio.subprocess.PIPE if commanded else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL if file is None else file,
                stderr=asyncio.subprocess.PIPE if file is None else file,
                start_new_session=True,
                limit=LONGEST_LINE,
            )
        finally:
            if file is not None:
                file.close()
        return cls(name, process, output, on_line)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended: None while it runs, the negative number of the signal that ended it."""
        return self._process.returncode

    def tail(self, lines: int = 20) -> str:
        """The last lines that it wrote."""
        if self._output is None:
            return "\n".join(self._last[-lines:])
        return "\n".join(self._output.read_text(errors="replace").splitlines()[-lines:])

    def must_run(self) -> None:
        """Raises Died when it does not run any more."""
        if self.returncode is not None:
            raise Died(f"{self.name} ended with {self.returncode}; its last lines were:\n{self.tail()}")

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        if self._process.stdin is not None:
            self._process.stdin.write(line.encode() + b"\n")

    async def wait(self) -> int:
        """Wait until it has ended and all that it wrote was read; its exit code."""
        code = await self._process.wait()
        if self._reader is not None:
            await self._reader
        return code

    async def kill(self) -> None:
        """SIGKILL, now."""
        if self.returncode is None:
            self._process.kill()
        await self.wait()

    async def stop(self, kill_after: float = KILL_AFTER) -> int:
        """SIGTERM, then after `kill_after` seconds SIGKILL; its exit code."""
        if self.returncode is None:
            self._process.terminate()
        try:
            async with asyncio.timeout(kill_after):
                return await self.wait()
        except TimeoutError:
            await self.kill()
            return await self.wait()

    async def _read(self) -> None:
        assert self._process.stderr is not None  # noqa: S101 - else this task is not made
        async for raw in self._process.stderr:
            line = raw.decode(errors="replace").rstrip("\n")
            self._last = [*self._last[-199:], line]
            if self._on_line is not None:
                self._on_line(line)
