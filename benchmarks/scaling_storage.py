"""What many changes of the same rows do to tables and indexes: restarts again and again, with other settings of the table, and until a vacuum comes.

Autovacuum comes by the minute, and restarts are made here faster than they ever are; so it is switched off, and a vacuum is made when as many rows
are dead as make autovacuum come.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from time import perf_counter

from sfu_delegate.delegation import lifecycle
from sfu_delegate.delegation.model import Answered, DelayedEvent, Lane, Verdict
from sfu_delegate.store.base import Transaction
from sfu_delegate.store.postgresql import PostgresStore
from sfu_delegate.store.schema import STORAGE

from benchmarks.rows import CYCLE
from benchmarks.scaling_rows import PostgresFilling
from benchmarks.scaling_server import Database, Written
from benchmarks.scaling_steps import POLICY, Clockwork, flush

RESTARTS_A_SECOND = 400.0
THRESHOLD = 50  # dead rows, beside a part of all: `autovacuum_vacuum_threshold`
TABLE = "delayed_event"
BATCH = 64  # restarts in one transaction …
WEBHOOKS = 16  # … and webhooks that change something which is in no index


def delay_for(count: int) -> float:
    """The delay with which so many rows need RESTARTS_A_SECOND; ten minutes at the least."""
    return max(600.0, count / RESTARTS_A_SECOND / CYCLE)


@dataclass(frozen=True, slots=True)
class Wear:
    """What became of the table after many restarts of every row."""

    fillfactor: int
    scale_factor: float  # a vacuum comes when this part of all rows is dead
    restarts: int
    heap_before: float  # bytes a row …
    heap: float  # … and afterwards
    indexes_before: float
    indexes: float
    hot: float  # the part of webhooks' updates that left all indexes as they are
    wal: float  # bytes a restart
    wal_vacuum: float  # … of these, by vacuums
    backend: float  # µs of processor time a restart
    vacuum: float  # … and by vacuums
    vacuums: int
    slowest_ms: float  # the 99th percentile of asking for what is due


def wear(database: Database, filling: PostgresFilling, fillfactor: int, scale_factor: float, cycles: float) -> Wear:
    """Restart every row so many times. The database is empty at the beginning."""
    database.change(f"ALTER TABLE {TABLE} SET (fillfactor = {fillfactor}, autovacuum_enabled = off)")
    filling.fill_database(database)
    before = database.sizes()
    store, random = PostgresStore(database.url, instance="storage"), Random(7)
    now, count = filling.at + filling.calm, filling.count
    pause = BATCH / (count / (CYCLE * filling.delay))
    restarts = vacuums = webhooks = 0
    dead, vacuum_cpu, vacuum_wal, asked = 0.0, 0.0, 0.0, list[float]()
    began = database.used()
    try:
        while restarts < cycles * count:
            now += pause
            claimed = _claim(store, filling.server, now, asked)
            _answer(store, claimed, now, random)
            _webhooks(store, [random.randrange(1, count + 1) for _ in range(WEBHOOKS)], now)
            restarts += len(claimed)
            webhooks += WEBHOOKS
            dead += 2 * len(claimed)  # those of webhooks are removed as the page is looked at
            if dead >= THRESHOLD + scale_factor * count:
                wal = database.used().wal
                vacuum_cpu += database.vacuum(TABLE)
                vacuum_wal += database.used().wal - wal
                vacuums, dead = vacuums + 1, 0.0
        store.atomically(flush)
        used, after = database.used().since(began), database.sizes()
    finally:
        store.close()
    changed = used.tables[TABLE]
    indexes_before, indexes = (sum(size for name, size in sizes.items() if name in _INDEXES) for sizes in (before, after))
    return Wear(
        fillfactor,
        scale_factor,
        restarts,
        before[TABLE] / count,
        after[TABLE] / count,
        indexes_before / count,
        indexes / count,
        changed.hot / webhooks,
        used.wal / restarts,
        vacuum_wal / restarts,
        used.backends / restarts * 1e6,
        vacuum_cpu / restarts * 1e6,
        vacuums,
        sorted(asked)[int(len(asked) * 0.99)] * 1e3,
    )


_INDEXES = ("pk_delayed_event", "uq_delayed_event_participant", "ix_delayed_event_alias", "ix_delayed_event_schedule", "ix_delayed_event_delegation")


def _claim(store: PostgresStore, homeserver: str, now: float, asked: list[float]) -> list[DelayedEvent]:
    """As the engine does: what is due is claimed, and when the next will be is asked."""

    def work(tx: Transaction) -> list[DelayedEvent]:
        began = perf_counter()
        rows = tx.todo(homeserver, Lane.RESTART, BATCH, now, harmed=False)
        asked.append(perf_counter() - began)
        claimed = [lifecycle.claim(row, now, POLICY) for row in rows]
        for old, new in zip(rows, claimed, strict=True):
            tx.update(old, new)
        tx.next_due(homeserver)
        return claimed

    return store.atomically(work)


def _answer(store: PostgresStore, claimed: Sequence[DelayedEvent], now: float, random: Random) -> None:
    def work(tx: Transaction) -> None:
        tx.lock_rooms({(row.sfu, row.room) for row in claimed}, ())
        for row in tx.get_all([row.id for row in claimed]):
            answer = Answered(row.homeserver, row.id, row.claim, lifecycle.action(row), now, Verdict.DONE)
            tx.update(row, lifecycle.advance(row, answer, now, POLICY, random.random()))

    if claimed:
        store.atomically(work)


def _webhooks(store: PostgresStore, events: Sequence[int], now: float) -> None:
    """Somebody connected has a new session."""
    rooms = store.atomically(lambda tx: tx.rooms_of(events, ()))

    def work(tx: Transaction) -> None:
        tx.lock_rooms(rooms, ())
        for row in tx.get_all(events):
            tx.update(row, row._replace(sessions=tuple(session._replace(heard_at=now) for session in row.sessions), presence_since=now))

    store.atomically(work)


# ── whole lives ──

PEOPLE_A_TIME = 320
STAYS = 3  # … of whom so many groups are connected when the next one comes


@dataclass(frozen=True, slots=True)
class Life:
    """What delegations need from beginning to end, where a call's members come and go together, and their rows are neighbours."""

    fillfactor: int
    joined_hot: float  # the part of joins' updates that left all indexes as they are
    heap: float  # bytes a row
    indexes: float
    wal: float  # bytes a life
    backend: float  # µs of processor time a life


def lives(database: Database, server: str, now: float, fillfactor: int, people: int) -> Life:
    """So many people delegate, join and leave, as groups. The database is empty at the beginning."""
    database.change(f"ALTER TABLE {TABLE} SET (fillfactor = {fillfactor}, autovacuum_enabled = off)")
    filling = PostgresFilling(0, server, now, 3600.0, 10.0)
    clock, joined, dead = Clockwork(database, now), Written(), 0.0
    groups = [range(start, min(people, start + PEOPLE_A_TIME)) for start in range(0, people, PEOPLE_A_TIME)]
    try:
        began = database.used()
        for number, group in enumerate(groups):
            clock.delegated(filling, group, clock.in_flight)
            clock.store.atomically(flush)
            before = database.used()
            clock.joined(filling, group, clock.in_flight)
            clock.store.atomically(flush)
            told = database.used().since(before).tables[TABLE]
            joined = Written(updated=joined.updated + told.updated, hot=joined.hot + told.hot)
            if number >= STAYS:
                clock.left(filling, groups[number - STAYS], clock.in_flight)
            dead += 5 * len(group)
            if dead >= THRESHOLD + STORAGE[TABLE]["autovacuum_vacuum_scale_factor"] * (number + 1) * PEOPLE_A_TIME:
                database.vacuum(TABLE)
                dead = 0.0
        clock.store.atomically(flush)
        used, sizes = database.used().since(began), database.sizes()
    finally:
        clock.close()
    indexes = sum(size for name, size in sizes.items() if name in _INDEXES)
    return Life(fillfactor, joined.hot / joined.updated, sizes[TABLE] / people, indexes / people, used.wal / people, used.backends / people * 1e6)


# ── many rows, and no vacuum ──


@dataclass(frozen=True, slots=True)
class Dead:
    """What a step costs while so many rows are dead."""

    dead: int
    step_ms: float
    daemon: float  # µs of processor time a restart
    backends: float
    wal: float  # bytes a restart


@dataclass(frozen=True, slots=True)
class Vacuum:
    """What one vacuum took."""

    dead: int
    seconds: float  # of processor time
    wal: float  # bytes
    analyze: float  # seconds of processor time of an ANALYZE after it


@dataclass(frozen=True, slots=True)
class Unvacuumed:
    """Steps as dead rows become more, the vacuums after that, and the same while somebody reads in one transaction."""

    steps: list[Dead]
    vacuums: list[Vacuum]
    reader: list[Dead]


def unvacuumed(clock: Clockwork, parts: Sequence[int], reader_parts: Sequence[int]) -> Unvacuumed:
    """Restarts, with a vacuum after the first part and after the last one; `parts`: how many each."""
    database, found = clock.database, Unvacuumed([], [], [])
    database.change(f"ALTER TABLE {TABLE} SET (autovacuum_enabled = off)")
    try:
        clock.restarts(10 * clock.in_flight)
        database.vacuum(TABLE)
        dead = 0
        for number, count in enumerate(parts):
            dead += 2 * count
            found.steps.append(_dead(clock, dead, count))
            if number in (0, len(parts) - 1):
                wal = database.used().wal
                seconds = database.vacuum(TABLE)
                wal = database.used().wal - wal
                found.vacuums.append(Vacuum(dead, seconds, wal, database.analyze(TABLE)))
                dead = 0
        with database.reader():
            for count in reader_parts:
                dead += 2 * count
                found.reader.append(_dead(clock, dead, count))
        database.vacuum(TABLE)
    finally:
        database.change(f"ALTER TABLE {TABLE} RESET (autovacuum_enabled)")
    return found


def _dead(clock: Clockwork, dead: int, count: int) -> Dead:
    cost = clock.spent(lambda: clock.restarts(count))
    return Dead(dead, cost.step_ms, cost.daemon, cost.backends, cost.wal)
