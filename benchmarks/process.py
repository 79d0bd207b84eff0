"""Processes on a core of their own, which never outlive this one: the daemon, and the bare programs that it is compared with."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfu_delegate.demo.processes import Child

from benchmarks import wire
from benchmarks.machine import Meter, Span
from benchmarks.world import Failed

REPOSITORY = Path(__file__).resolve().parent.parent
READY_WITHIN = 120.0  # seconds; a million rows take some
COMMAND = (sys.executable, "-m", "sfu_delegate.cli")
ASK_EVERY = 0.002  # seconds between two looks whether it is there
# Goes to its core, tells when it becomes the command, and does.
_PINNED = """
import os, sys, time
if sys.argv[1]:
    os.sched_setaffinity(0, {int(sys.argv[1])})
with open(sys.argv[2], "w") as file:
    file.write(repr(time.monotonic()))
os.execvp(sys.argv[3], sys.argv[3:])
"""


async def start(name: str, command: Sequence[str], directory: Path, core: int | None) -> tuple[Child, Path]:
    """A pinned process that writes to a file in `directory`; also the file in which it tells when it began."""
    began = directory / f"{name}.began"
    began.unlink(missing_ok=True)
    pinned = [sys.executable, "-ISc", _PINNED, "" if core is None else str(core), str(began), *command]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SFU_DELEGATE_")}
    child = await Child.start(name, pinned, directory=REPOSITORY, output=directory / f"{name}.log", environment=environment)
    return child, began


async def answers(child: Child, port: int, target: str) -> None:
    """Wait until the process answers 200. Raises Failed, and demo.processes.Died."""
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline:
        child.must_run()
        try:
            status, _ = await wire.get(port, target)
        except OSError:
            status = 0
        if status == 200:
            return
        await asyncio.sleep(ASK_EVERY)
    raise Failed(f"{child.name} was not ready within {READY_WITHIN:g} s")


class Daemon:
    """`sfu-delegate serve` as a process."""

    def __init__(self, child: Child, port: int, admin: int, took: float, starting: Span) -> None:
        self._child = child
        self.port = port
        self.took = took
        self.starting = starting
        self._admin = admin

    @classmethod
    async def start(cls, config: Mapping[str, Any], directory: Path, core: int | None, command: Sequence[str] = COMMAND) -> "Daemon":
        """Start it; `took`: seconds from its exec until it answered, `starting` what was used meanwhile. Raises Failed, and demo.processes.Died."""
        file = directory / "sfu-delegate.yaml"
        file.touch(mode=0o600)
        file.write_text(json.dumps(config))  # JSON is YAML
        meter = Meter(None)
        child, began = await start("sfu-delegate", [*command, "serve", "--config", str(file)], directory, core)
        admin = config["admin"]["port"]
        try:
            await answers(child, admin, "/health/live")
            took, starting = time.monotonic() - float(began.read_text()), meter.read(child.pid)
            await answers(child, admin, "/health/ready")
        except BaseException:
            await child.kill()
            raise
        return cls(child, config["listen"]["port"], admin, took, starting)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def must_run(self) -> None:
        """Raises demo.processes.Died when it does not run any more."""
        self._child.must_run()

    async def metrics(self) -> "Metrics":
        """What it tells Prometheus."""
        status, text = await wire.get(self._admin, "/metrics")
        if status != 200:
            raise Failed(f"/metrics was answered {status}")
        return Metrics(text)

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if that takes too long."""
        await self._child.stop()


class Metrics:
    """One answer of /metrics."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()

    def sum(self, name: str, *containing: str) -> float:
        """The sum of a metric's samples, or only of those whose labels contain all these texts."""
        samples = [line for line in self._lines if line.startswith((f"{name} ", f"{name}{{")) and all(text in line for text in containing)]
        return sum(float(line.rpartition(" ")[2]) for line in samples)

    @property
    def commits(self) -> float:
        """Transactions so far."""
        return self.sum("sfu_delegate_batch_inputs_count")

    @property
    def connected(self) -> float:
        """Delayed events whose participant is connected."""
        return self.sum("sfu_delegate_delegated_events", 'presence="connected"', 'state="live"')
