"""What can be seen of the daemon from outside: its log, its memory and files, its metrics, and, when it has stopped, its database."""

import json
import sqlite3
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from sfu_delegate.demo.daemon import DaemonProcess

Json = dict[str, Any]
Sample = tuple[str, tuple[tuple[str, str], ...]]
KEPT_ERRORS = 50
KEPT_EXAMPLES = 5


class Log:
    """The daemon's log: counted, kept in a file, and not in memory, since an hour of it is long."""

    def __init__(self, daemon: DaemonProcess, file: Path) -> None:
        self._daemon = daemon
        self.file = file
        self.levels: Counter[str] = Counter()
        self.events: Counter[str] = Counter()  # by level and event, without info
        self.errors: deque[str] = deque(maxlen=KEPT_ERRORS)  # lines of level error, and what is no JSON: a traceback, say

    def read(self) -> None:
        """Take what has come since the last time."""
        lines, self._daemon.log_lines = self._daemon.log_lines, []
        if not lines:
            return
        with self.file.open("a") as file:
            file.writelines(line + "\n" for line in lines)
        for line in lines:
            try:
                entry = json.loads(line)
                level, event = entry["level"], entry["event"]
            except (ValueError, KeyError, TypeError):
                level, event = "unreadable", ""
            self.levels[level] += 1
            if level not in ("info", "debug"):
                self.events[f"{level} {event}".strip()] += 1
            if level in ("error", "critical", "unreadable"):
                self.errors.append(line)

    def of(self, delegation: str, identity: str) -> list[str]:
        """All lines about a delegation or a participant."""
        self.read()
        with self.file.open() as file:
            return [line.rstrip() for line in file if f'"{delegation}"' in line or f'"{identity}"' in line]


class Memory(NamedTuple):
    """The daemon's process at one time."""

    at: float  # seconds since the soak began
    pid: int  # another one for each life of the daemon
    rss_mb: float
    files: int  # open file descriptors
    people: int  # memberships that have not ended


def memory_of(pid: int) -> tuple[float, int] | None:
    """Resident memory in MB, and open files; None for a process that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None
    resident = next((line for line in status.splitlines() if line.startswith("VmRSS:")), None)
    return None if resident is None else (int(resident.split()[1]) / 1024, files)


async def metrics_of(daemon: DaemonProcess) -> dict[Sample, float]:
    """All samples by name and labels. Raises aiohttp.ClientError and TimeoutError."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10.0)) as http, http.get(f"{daemon.admin_url}/metrics") as response:
        text = await response.text()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: dict[Sample, float], name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    return sum(value for (found, has), value in samples.items() if found == name and labels.items() <= dict(has).items())


def unfinished(samples: dict[Sample, float]) -> float:
    """How many delayed events the daemon believes not to have ended."""
    by_state = {labels: value for (name, labels), value in samples.items() if name == "sfu_delegate_delegated_events"}
    return sum(value for labels, value in by_state.items() if dict(labels)["state"] != "done")


class Database(NamedTuple):
    """What the daemon's database holds, after it has stopped."""

    states: Counter[str]
    unfinished: list[Json]
    outcomes: Counter[tuple[str, str]]  # (what the daemon says, what is true)
    examples: dict[tuple[str, str], list[str]]  # some delegations of each
    sound: str  # SQLite's integrity check


def read_database(file: Path, ends: dict[tuple[str, str], str]) -> Database:
    """Read it. `ends` says by homeserver and delay_id how each event really ended."""
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        rows = connection.execute(
            "SELECT delegation, homeserver, room, identity, delay_id, state, presence, outcome, reason, restarts, attempts FROM delayed_event"
        ).fetchall()
        sound = str(connection.execute("PRAGMA integrity_check").fetchone()[0])
    finally:
        connection.close()
    names = ("delegation", "homeserver", "room", "identity", "delay_id", "state", "presence", "outcome", "reason", "restarts", "attempts")
    found: list[Json] = [dict(zip(names, row, strict=True)) for row in rows]
    examples: dict[tuple[str, str], list[str]] = {}
    for row in found:
        true = ends.get((row["homeserver"], row["delay_id"]), "unknown to the homeserver")
        examples.setdefault((row["outcome"], true), []).append(row["delegation"])
    outcomes = Counter({pair: len(of) for pair, of in examples.items()})
    some = {pair: of[-KEPT_EXAMPLES:] for pair, of in examples.items()}
    unfinished = [{name: value for name, value in row.items() if name != "delay_id"} for row in found if row["state"] != "done"]
    return Database(Counter(row["state"] for row in found), unfinished, outcomes, some, sound)


def percentiles(values: Iterable[float]) -> Json:
    """How many, and the 50th, 90th, 99th percentile and the greatest, in seconds."""
    ordered = sorted(values)
    if not ordered:
        return {"n": 0}
    at = {name: round(ordered[min(len(ordered) - 1, int(len(ordered) * part))], 2) for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {"n": len(ordered), **at, "max": round(ordered[-1], 2)}
