"""What one input costs the engine, by batch size and by the number of delayed events in the database.

    python -m benchmarks.engine                 1,000, 100,000 and 1,000,000 rows; some minutes
    python -m benchmarks.engine --rows 1000     quick

Inputs are webhooks of participants scattered over all rooms, and the answers to restarts: each changes a row. The database is a real file with
`synchronous=FULL`. Beside each figure stands the bare commit of one changed row, measured in the same run on the same disk.
"""

import argparse
import json
import os
import platform
import sqlite3
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from time import perf_counter, process_time
from typing import NamedTuple

from sfu_delegate.delegation import lifecycle
from sfu_delegate.delegation.model import (
    Accept,
    Answered,
    DelayedEvent,
    Input,
    NewEvent,
    OnEnd,
    Presence,
    Room,
    Seen,
    Session,
    Sighting,
    Verdict,
)
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.engine import Engine, Limits
from sfu_delegate.store.base import Transaction
from sfu_delegate.store.sqlite import SqliteStore

IN_A_ROOM = 10
DELAY = 3600.0
NOW = 1_800_000_000.0


class Result(NamedTuple):
    """One line of the table, all times in microseconds for one input."""

    rows: int
    batch: int
    kind: str
    cpu: float
    wall: float
    commit: float  # a bare commit, divided by the batch size


def place(number: int) -> tuple[str, str]:
    """Room and identity of a participant."""
    return f"room-{number // IN_A_ROOM:08d}-{hash(number // IN_A_ROOM) & 0xFFFFFFFF:08x}", f"@user{number}:example.org:DEVICE"


def connected(id: int, policy: Policy, now: float, random: Random) -> DelayedEvent:
    """A delayed event in the middle of its life."""
    room, identity = place(id)
    event = NewEvent(f"syd_{random.getrandbits(96):024x}", DELAY, OnEnd.SEND)
    accept = Accept(f"dlg_{random.getrandbits(128):032x}", "main", room, identity, "example.org", (event,))
    row = lifecycle.delegate(None, id, accept, event, None, now, now, policy, 0.0)
    since = now - random.random() * DELAY / 2
    return row._replace(
        presence=Presence.CONNECTED,
        presence_since=since,
        look_at=None,
        verified_at=since,
        running_since=since,
        restarts=1,
        sessions=(Session(f"PA_{id}", 1, True, since),),
        due=since + DELAY * 0.75,
        harm=since + DELAY,
    )


def fill(store: SqliteStore, count: int, policy: Policy, random: Random) -> None:
    """Put `count` connected participants into an empty database."""

    def work(numbers: range, tx: Transaction) -> None:
        for _ in numbers:
            tx.insert(connected(tx.new_id(), policy, NOW, random))
        for number in range(numbers.start // IN_A_ROOM, numbers.stop // IN_A_ROOM):
            tx.save_room(Room("main", place(number * IN_A_ROOM)[0], "RM_x", "", NOW, False, 0.0, 0.0, None, NOW + 1e6, True, 0, 0, False))

    for start in range(0, count, 10_000):
        numbers = range(start, min(count, start + 10_000))
        store.atomically(lambda tx, numbers=numbers: work(numbers, tx))  # type: ignore[misc]
        if store.is_log_large:
            store.checkpoint()


def webhooks(chosen: Sequence[int], turn: int) -> Iterator[Input]:
    """Each participant leaves, or comes back with a new session, by turns: every webhook changes its row."""
    for id in chosen:
        room, identity = place(id)
        sid = f"PA_{id}" if turn < 2 else f"PA_{id}_{turn // 2}"
        if turn % 2 == 0:
            yield Seen("main", room, identity, Sighting.LEFT, sid, turn + 1, "CLIENT_INITIATED")
        else:
            yield Seen("main", room, identity, Sighting.JOINED, f"PA_{id}_{turn // 2 + 1}", turn + 1)


def bare_commit(directory: str) -> float:
    """Seconds for a commit of one changed row, by the same driver with the same settings."""
    connection = sqlite3.connect(os.path.join(directory, "bare.db"), isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=0"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v FLOAT)")
    connection.execute("INSERT INTO t VALUES (1, 0)")
    took = []
    for number in range(300):
        begun = perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE t SET v = ? WHERE id = 1", (float(number),))
        connection.execute("COMMIT")
        took.append(perf_counter() - begun)
    connection.close()
    return statistics.median(took)


def measure(rows: int, batches: Sequence[int], inputs: int, directory: str) -> Iterator[Result]:
    """All lines for one size of the database."""
    random = Random(7)
    policy = Policy()
    store = SqliteStore(os.path.join(directory, f"{rows}.db"))
    fill(store, rows, policy, random)
    store.idle()
    begun = perf_counter()
    engine = Engine(store, policy, Limits(max_per_homeserver=10_000_000), random)
    print(f"# {rows:,} rows: the engine is ready after {perf_counter() - begun:.2f} s", file=sys.stderr)
    commit = bare_commit(directory)
    turn = 0
    for batch in batches:
        # Few batches of the smallest size would be mostly noise of the disk.
        chosen = random.sample(range(1, rows + 1), min(rows // 2, max(inputs, batch * 8)))
        for kind in ("left", "joined"):
            cpu, wall = [], []
            for _ in range(1):
                pending = list(webhooks(chosen, 0 if kind == "left" else 1))
                for start in range(0, len(pending), batch):
                    part = pending[start : start + batch]
                    c, w = process_time(), perf_counter()
                    step = engine.step(part, NOW + turn * 1e-3)
                    cpu.append((process_time() - c) / len(part))
                    wall.append((perf_counter() - w) / len(part))
                    turn += 1
                    broken = [reply for reply in step.replies if isinstance(reply, Exception)]
                    if broken or len(step.changes) != len(part):
                        raise SystemExit(f"{kind}: {len(step.changes)} of {len(part)} inputs changed something; {broken[:1]}")
            yield Result(rows, batch, kind, statistics.mean(cpu) * 1e6, statistics.median(wall) * 1e6, commit / batch * 1e6)
        yield restarts(store, engine, rows, batch, chosen, commit)
        # Back to the sessions that the next round ends.
        store.atomically(lambda tx: _reset(tx, chosen))  # noqa: B023
        store.idle()
    store.close()


def restarts(store: SqliteStore, engine: Engine, rows: int, batch: int, chosen: Sequence[int], commit: float) -> Result:
    """The answers to restarts that are under way."""

    def claim_all(tx: Transaction) -> list[DelayedEvent]:
        claimed = []
        for id in chosen:
            row = tx.get(id)
            assert row is not None
            taken = lifecycle.claim(row, NOW, engine.policy)
            tx.update(row, taken)
            claimed.append(taken)
        return claimed

    claimed = store.atomically(claim_all)
    answers = [Answered("example.org", row.id, row.claim, lifecycle.action(row), NOW, Verdict.DONE) for row in claimed]
    cpu, wall = [], []
    for start in range(0, len(answers), batch):
        part = answers[start : start + batch]
        c, w = process_time(), perf_counter()
        step = engine.step(part, NOW + 1)
        cpu.append((process_time() - c) / len(part))
        wall.append((perf_counter() - w) / len(part))
        if len(step.changes) != len(part):
            raise SystemExit(f"restart: {len(step.changes)} of {len(part)} answers changed something")
    return Result(rows, batch, "restart", statistics.mean(cpu) * 1e6, statistics.median(wall) * 1e6, commit / batch * 1e6)


def _reset(tx: Transaction, chosen: Sequence[int]) -> None:
    for id in chosen:
        row = tx.get(id)
        assert row is not None
        tx.update(row, row._replace(sessions=(Session(f"PA_{id}", 1, True, NOW),), presence=Presence.CONNECTED, look_at=None))


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 1_000_000], help="rows in the database (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128], help="inputs in one transaction (default: %(default)s)")
    parser.add_argument("--inputs", type=int, default=2_000, help="inputs for each line of the table")
    parser.add_argument("--directory", default=".", help="where to put the databases: on the disk that is to be measured (default: here)")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}")
    print(f"{'rows':>10} {'batch':>6} {'input':>8} {'CPU µs':>8} {'wall µs':>8} {'bare commit µs':>15} {'wall / commit':>14}")
    results = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            for result in measure(rows, options.batches, options.inputs, directory):
                results.append(result)
                print(
                    f"{result.rows:>10,} {result.batch:>6} {result.kind:>8} {result.cpu:>8.1f} {result.wall:>8.1f} {result.commit:>15.1f} "
                    f"{result.wall / result.commit:>14.2f}",
                    flush=True,
                )
    if options.json:
        Path(options.json).write_text(json.dumps([result._asdict() for result in results], indent=2))


if __name__ == "__main__":
    main()
