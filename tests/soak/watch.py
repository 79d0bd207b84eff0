"""What can be seen of the daemon, or of several instances, from outside: logs, memory and files, metrics, what each asked the homeservers for, and,
when all have stopped, the database."""

import json
import re
import sqlite3
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, LiteralString, NamedTuple, Protocol

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from sfu_delegate.demo.daemon import DaemonProcess
from sfu_delegate.sandbox.answer import Answer
from sfu_delegate.sandbox.homeserver import HomeserverModel, RateLimit

from tests.postgresql import Server, name_in

Json = dict[str, Any]
Sample = tuple[str, tuple[tuple[str, str], ...]]
KEPT_ERRORS = 50
KEPT_EXAMPLES = 5


class AskedHomeserver(HomeserverModel):
    """It knows which process asks, by the first part of the path, which is not the homeserver's: see `url_for`."""

    def __init__(self, server_name: str, *, seed: int, limit: RateLimit | None) -> None:
        super().__init__(server_name, seed=seed, limit=limit)
        self.asked: defaultdict[str, Counter[tuple[str, int]]] = defaultdict(Counter)  # by process: what `answers` are for all

    def request(self, method: str, path: str, now: float, **more: Any) -> Answer:
        """See `HomeserverModel`."""
        _, process, rest = path.split("/", 2)
        before, self.answers = self.answers, Counter()
        answer = super().request(method, f"/{rest}", now, **more)
        self.asked[process] += self.answers
        self.answers += before
        return answer


def url_for(url: str, process: str) -> str:
    """Where a process finds such a homeserver."""
    return f"{url}/{process}"


class Log:
    """The log of the daemon, or of all instances: counted, kept in a file, and not in memory, since an hour of it is long.

    `is_expected` says of a line of level error whether the cause was our doing.
    """

    def __init__(self, daemons: Mapping[str, DaemonProcess], file: Path, is_expected: Callable[[Json], bool] = lambda _: False) -> None:
        self._daemons = daemons
        self._is_expected = is_expected
        self.file = file
        self.levels: Counter[str] = Counter()
        self.events: Counter[str] = Counter()  # by level and event, without info
        self.unexpected = 0  # lines of level error, and what is no JSON: a traceback, say
        self.errors: deque[str] = deque(maxlen=KEPT_ERRORS)  # the last of them

    def read(self) -> None:
        """Take what has come since the last time."""
        for name, daemon in self._daemons.items():
            lines, daemon.log_lines = daemon.log_lines, []
            if lines:
                self._take(name, lines)

    def _take(self, name: str, lines: list[str]) -> None:
        with self.file.open("a") as file:
            file.writelines(f"{name} {line}\n" if len(self._daemons) > 1 else f"{line}\n" for line in lines)
        for line in lines:
            expected = False
            try:
                entry = json.loads(line)
                level, event = entry["level"], entry["event"]
                expected = level == "error" and self._is_expected(entry)
            except (ValueError, KeyError, TypeError):
                level, event = "unreadable", ""
            self.levels[level] += 1
            if level not in ("info", "debug"):
                self.events[f"{level} {event}".strip()] += 1
            if level in ("error", "critical", "unreadable") and not expected:
                self.unexpected += 1
                self.errors.append(f"{name} {line}" if len(self._daemons) > 1 else line)

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
    sound: str  # "ok", or what the database finds wrong with itself


class Kept(Protocol):
    """What the daemon keeps its state in."""

    def rows(self, query: LiteralString) -> list[Any]:
        """What a query finds."""

    def sound(self) -> str:
        """See `Database`."""


class SqliteFile:
    """The file of one daemon."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def rows(self, query: LiteralString) -> list[Any]:
        connection = sqlite3.connect(f"file:{self._file}?mode=ro", uri=True)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()

    def sound(self) -> str:
        return str(self.rows("PRAGMA integrity_check")[0][0])


class PostgresqlDatabase:
    """What instances share."""

    BAD = re.compile(r"deadlock detected|PANIC:|invalid page|could not read block|could not access status of transaction")
    INDEXED: tuple[tuple[LiteralString, LiteralString], ...] = (
        ("delayed_event", "id > 0"),
        ("delayed_event", "homeserver > '' AND due IS NOT NULL"),
        ("delayed_event", "delegation > ''"),
        ("delayed_event", "sfu > ''"),
        ("room", "sfu > ''"),
        ("history", "event > 0"),
    )

    TABLES: tuple[LiteralString, ...] = ("delayed_event", "history", "room", "homeserver", "sfu", "instance", "pace", "meta")

    def __init__(self, server: Server, url: str) -> None:
        self.server = server
        self.url = url

    def save(self, directory: Path) -> None:
        """Its log, and its tables as far as it still works, for whoever wants to know: the server leaves nothing."""
        (directory / "postgresql.log").write_text(self.server.log)
        if not self.server.running:
            return
        with self.server.admin(name_in(self.url)) as connection:
            for table in self.TABLES:
                with connection.cursor().copy(f"COPY {table} TO STDOUT (FORMAT csv, HEADER)") as rows:
                    (directory / f"{table}.csv").write_bytes(b"".join(map(bytes, rows)))

    def rows(self, query: LiteralString) -> list[Any]:
        return self.server.query(self.url, query)

    def sound(self) -> str:
        """Its log tells of nothing bad, and its indexes lead to what the tables hold."""
        wrong = [line for line in self.server.log.splitlines() if self.BAD.search(line)]
        with self.server.admin(name_in(self.url)) as connection:
            for table, condition in self.INDEXED:
                counts = set()
                for way in ("enable_indexscan = on; SET enable_seqscan = off", "enable_indexscan = off; SET enable_seqscan = on"):
                    connection.execute(f"SET {way}; SET enable_bitmapscan = off; SET enable_indexonlyscan = off")
                    counts.add(connection.execute(f"SELECT count(*) FROM {table} WHERE {condition}").fetchone())
                if len(counts) != 1:
                    wrong.append(f"an index of {table} ({condition}) does not agree with it: {counts}")
        return "; ".join(wrong) or "ok"


def read_database(kept: Kept, ends: dict[tuple[str, str], str]) -> Database:
    """Read it. `ends` says by homeserver and delay_id how each event really ended."""
    rows = kept.rows(
        "SELECT delegation, homeserver, room, identity, delay_id, state, presence, outcome, reason, restarts, attempts FROM delayed_event"
    )
    names = ("delegation", "homeserver", "room", "identity", "delay_id", "state", "presence", "outcome", "reason", "restarts", "attempts")
    found: list[Json] = [dict(zip(names, row, strict=True)) for row in rows]
    examples: dict[tuple[str, str], list[str]] = {}
    for row in found:
        true = ends.get((row["homeserver"], row["delay_id"]), "unknown to the homeserver")
        examples.setdefault((row["outcome"], true), []).append(row["delegation"])
    outcomes = Counter({pair: len(of) for pair, of in examples.items()})
    some = {pair: of[-KEPT_EXAMPLES:] for pair, of in examples.items()}
    unfinished = [{name: value for name, value in row.items() if name != "delay_id"} for row in found if row["state"] != "done"]
    return Database(Counter(row["state"] for row in found), unfinished, outcomes, some, kept.sound())


def percentiles(values: Iterable[float]) -> Json:
    """How many, and the 50th, 90th, 99th percentile and the greatest, in seconds."""
    ordered = sorted(values)
    if not ordered:
        return {"n": 0}
    at = {name: round(ordered[min(len(ordered) - 1, int(len(ordered) * part))], 2) for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {"n": len(ordered), **at, "max": round(ordered[-1], 2)}
