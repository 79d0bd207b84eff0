"""The machine: which core does what, what a process has used of it, and how it is described in a report.

A description must never tell whose machine it is: no host name, no user name, no path.
"""

import gc
import os
import platform
import sqlite3
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

DRIVER_BOUND = 0.9  # of its core: above, the daemon may be faster than a figure says
NOISY = 0.2  # cores that others used: above, a figure may be worse than it is on a quiet machine
_TICKS = os.sysconf("SC_CLK_TCK")
_PACKAGES = ("aiohttp", "uvloop", "httptools", "SQLAlchemy", "pydantic")


class Cores(NamedTuple):
    """Which core the daemon gets, and which one the driver; None: the kernel chooses, since there is only one."""

    daemon: int | None
    driver: int | None


def cores() -> Cores:
    """The first two of the cores that this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(allowed[0], allowed[1]) if len(allowed) > 1 else Cores(None, None)


def pin(core: int | None) -> None:
    """Keep this process on one core."""
    if core is not None:
        os.sched_setaffinity(0, {core})


# ── what was used ──


def cpu_of(pid: int) -> float:
    """Seconds of processor time, user and system, that the threads of a process have used so far."""
    used = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            used += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_bytes().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread that has ended meanwhile
    return used / 1e9


def rss_of(pid: int) -> int:
    """Bytes of a process that are in memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {pid} has ended")


class _Machine(NamedTuple):
    busy: float  # seconds of all cores together
    stolen: float  # … that another guest of the same host had


def _machine() -> _Machine:
    """From /proc/stat, in steps of 10 ms for each core."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, stolen = (int(value) / _TICKS for value in file.readline().split()[1:9])
    return _Machine(user + nice + system + irq + softirq, stolen)


@dataclass(slots=True)
class Span:
    """What was used in a measured span. Times are seconds, shares are cores."""

    wall: float = 0.0
    daemon_cpu: float = 0.0
    driver_share: float = 0.0
    other_share: float = 0.0  # other processes, and other guests of the same host
    stolen_share: float = 0.0  # … of that, the guests

    @property
    def driver_bound(self) -> bool:
        """Was the driver the bottleneck?"""
        return self.driver_share > DRIVER_BOUND

    @property
    def noisy(self) -> bool:
        """Did others work meanwhile?"""
        return self.other_share > NOISY


class Meter:
    """What a process has used since the meter was made. None: one that is yet to be started."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self._machine = _machine()
        self._driver = process_time()
        self._daemon = 0.0 if pid is None else cpu_of(pid)
        self._begun = perf_counter()

    def read(self, pid: int | None = None) -> Span:
        """The span until now. `pid`: of the process that has been started."""
        wall = perf_counter() - self._begun
        process = self._pid if pid is None else pid
        daemon = 0.0 if process is None else cpu_of(process) - self._daemon
        driver, machine = process_time() - self._driver, _machine()
        stolen = machine.stolen - self._machine.stolen
        others = max(0.0, machine.busy - self._machine.busy - daemon - driver)
        return Span(wall, daemon, driver / wall, (others + stolen) / wall, stolen / wall)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection of this process meanwhile."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


# ── how it is described ──


def describe(database: Path, which: Cores) -> dict[str, Any]:
    """The machine, for a report. `database`: the directory that databases are in."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "pinned": which.daemon is not None,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sqlite": sqlite3.sqlite_version,
        "openssl": ssl.OPENSSL_VERSION,
        "packages": {name: _version(name) for name in _PACKAGES},
        "file_system": file_system(database),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def commit(repository: Path) -> str:
    """Which version is measured; empty where that is not known."""
    try:
        told = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=repository, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def file_system(directory: Path) -> str:
    """The type of the file system that a directory is on, such as ext4."""
    place, best, kind = os.path.realpath(directory), -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, about = line.partition(" - ")
        point = mount.split()[4].replace("\\040", " ")
        if os.path.commonpath((place, point)) == point and len(point) >= best:
            best, kind = len(point), about.split()[0]
    return kind
