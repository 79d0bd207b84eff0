"""What the parts of the daemon's work cost at the least, measured beside it: on the same core, right after it, under the same load."""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sfu_delegate.demo.processes import free_ports

from benchmarks import machine, process, wire
from benchmarks.wire import Flow
from benchmarks.world import PARALLEL, Failed, World, all_answered

ROUNDS = 3  # at the least; the median counts


@dataclass(frozen=True, slots=True)
class Limits:
    """Microseconds."""

    handler: float  # a bare handler that answers the scenario's requests, one connection for each of its rooms or clients: processor time
    handler_wide: float  # the same over 32 connections, whatever the scenario has: by this the goals are scaled
    request: float  # a bare request by the daemon's HTTP client, 16 in flight: processor time
    commit: float  # a bare durable commit of one changed row: processor time
    commit_wall: float  # … and how long it takes, the median
    commit_wall_p99: float

    def sum(self, handlers: float = 0.0, requests: float = 0.0, commits: float = 0.0) -> float:
        """What so many of them cost: processor time."""
        return handlers * self.handler + requests * self.request + commits * self.commit


@dataclass(frozen=True, slots=True)
class Work:
    """What the bare handler is asked, and how many of each thing are done at the least."""

    requests: Sequence[bytes]
    lanes: Sequence[Sequence[int]]
    handler_requests: int
    client_requests: int
    commits: int


async def measure(work: Work, world: World, directory: Path, database: Path, core: int | None) -> Limits:
    """Measure all of them. The world must be serving. Raises Failed, and demo.processes.Died."""
    handler, wide = await _handler(work, directory, core)
    request = await _printed("bare-request", ["request", world.restart_url, str(work.client_requests)], directory, core)
    commit = await _printed("bare-commit", ["commit", str(database), str(work.commits)], directory, core)
    return Limits(handler, wide, request["cpu"], commit["cpu"], commit["wall"], commit["wall_p99"])


async def _handler(work: Work, directory: Path, core: int | None) -> tuple[float, float]:
    (port,) = free_ports(1)
    child, _ = await process.start("bare-handler", [sys.executable, "-m", "benchmarks.bare", "handler", str(port)], directory, core)
    try:
        await process.answers(child, port, "/")
        every = range(len(work.requests))
        spread = [every[start::PARALLEL] for start in range(min(PARALLEL, len(every)))]
        await _round(work, [every[:200]], child.pid, port)  # it warms up
        rounds = max(ROUNDS, -(-work.handler_requests // len(every)))
        same = [await _round(work, work.lanes, child.pid, port) for _ in range(rounds)]
        wide = [await _round(work, spread, child.pid, port) for _ in range(rounds)]
    finally:
        await child.stop()
    return statistics.median(same), statistics.median(wide)


async def _round(work: Work, lanes: Sequence[Sequence[int]], pid: int, port: int) -> float:
    flow = Flow(work.requests, lambda: 0.0)
    with machine.undisturbed():
        before = machine.cpu_of(pid)
        await wire.send(flow, port, [iter(lane) for lane in lanes], PARALLEL)
        used = machine.cpu_of(pid) - before
    all_answered(flow, "requests to the bare handler")
    return used / sum(len(lane) for lane in lanes) * 1e6


async def _printed(name: str, arguments: Sequence[str], directory: Path, core: int | None) -> dict[str, float]:
    """What a bare program prints."""
    log = directory / f"{name}.log"
    log.unlink(missing_ok=True)
    child, _ = await process.start(name, [sys.executable, "-m", "benchmarks.bare", *arguments], directory, core)
    try:
        code = await child.wait()
    finally:
        await child.kill()
    if code:
        raise Failed(f"{name} ended with {code}: {child.tail(3)}")
    printed: dict[str, float] = json.loads(log.read_text().splitlines()[-1])
    return printed


def as_dict(limits: Limits) -> dict[str, float]:
    """For a report."""
    return {name: round(value, 2) for name, value in asdict(limits).items()}
