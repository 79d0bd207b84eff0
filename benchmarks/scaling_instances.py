"""Several instances as processes on one PostgreSQL, and what is asked of them by webhooks; the homeserver, the SFU and the load are in this process.

The kernel distributes all of them over the cores. Throughput is what comes out when there is always something to do; what each part used tells
what other machines would do.
"""

import asyncio
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time, time
from typing import Any

from cryptography.fernet import Fernet
from sfu_delegate.demo.processes import free_ports
from sfu_delegate.sandbox.homeserver import End
from tests.integration.certificates import Certificates
from tests.postgresql import Server

from benchmarks import machine, wire
from benchmarks.figures import percentile
from benchmarks.machine import Meter
from benchmarks.process import Daemon
from benchmarks.rows import CYCLE, IN_A_ROOM, PRESENCE
from benchmarks.scaling_rows import PostgresFilling
from benchmarks.scaling_server import Database, new_database
from benchmarks.scenarios import BELIEVED
from benchmarks.wire import HOST, Flow
from benchmarks.world import Failed, Person, Ports, Webhooks, World, all_answered, configuration

CONNECTIONS = 96  # over which webhooks come, however many instances there are
ARRIVES_WITHIN = 120.0  # seconds
AHEAD = 4.0  # seconds from a change of the database on until it matters: all instances have learned of it by then
QUIET = 1.0  # seconds without a request, after which everything is done
SETTLES = 1.2  # seconds, after which PostgreSQL tells what a connection has done
TRACKS = 10  # that each of those publishes whose webhooks are no news
CALM = 600.0
DELAY = 3600.0
BOUND = 0.9  # of a core, or of all: above, there was hardly anything left
_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: *(\d+)")


@dataclass(frozen=True, slots=True)
class InstanceSizes:
    """How much of everything."""

    counts: tuple[int, ...] = (1, 2, 3)
    people: int = 24_000  # half of them leave by room, half by turns
    delegating: int = 6000
    restarting: int = 20_000
    delay: float = 60.0  # of those: a restart may be a quarter of it late
    seconds: float = 15.0


@dataclass(frozen=True, slots=True)
class Load:
    """What so many instances did. Processor time is µs for each, shares are cores."""

    instances: int
    count: int
    seconds: float
    daemons: float
    backends: float
    rest: float
    driver: float
    wal: float
    full_pages: float
    fsyncs: float
    inputs: float  # in a transaction
    shares: dict[str, float]  # cores, by who used them
    answered_ms: tuple[float, float]  # from a webhook to its answer: median, 99th percentile
    done_ms: tuple[float, float]  # … to the homeserver
    limit: str  # what there was not enough of

    @property
    def per_second(self) -> float:
        """The throughput."""
        return self.count / self.seconds


@dataclass(slots=True)
class Site:
    """What all runs share."""

    server: Server
    certificates: Certificates
    directory: Path
    sizes: InstanceSizes
    ports: Ports = field(default_factory=lambda: Ports(*free_ports(3)))
    key: str = field(default_factory=lambda: Fernet.generate_key().decode())


class Fleet:
    """The instances, their database, and the world around them."""

    def __init__(self, world: World, database: Database) -> None:
        self.world = world
        self.database = database
        self.people: list[Person] = []  # whose events the database has, in the order of their ids
        self.daemons: list[Daemon] = []
        self.admins: list[int] = []  # their ports for metrics and health

    @property
    def port(self) -> int:
        """Of one of them."""
        return self.daemons[0].port

    async def measured(self, work: Callable[[], Awaitable[tuple[int, Sequence[float], Sequence[float]]]], at: float = 0.0) -> Load:
        """What `work` takes: it returns how often what was done, and the milliseconds to answers and effects. `at`: when it is to begin."""
        await self._settled()
        inputs = await self._inputs()
        await asyncio.sleep(at - self.world.now())
        with machine.undisturbed():
            before, meter = self.database.used(), Meter(None)
            daemons, driver, began = [machine.cpu_of(daemon.pid) for daemon in self.daemons], process_time(), perf_counter()
            count, answered, done = await work()
            seconds, driver = perf_counter() - began, process_time() - driver
            used = [machine.cpu_of(daemon.pid) - then for daemon, then in zip(self.daemons, daemons, strict=True)]
            span, postgresql = meter.read(), self.database.used().since(before)
        batches, together = [then - now for now, then in zip(inputs, await self._inputs(), strict=True)]
        await self._settled()
        later = self.database.used().since(before)
        shares = {"daemons": sum(used) / seconds, "PostgreSQL": postgresql.cpu / seconds, "driver": driver / seconds}
        shares["others"] = max(0.0, span.driver_share + span.other_share - sum(shares.values()))
        micros = 1e6 / count
        return Load(
            len(self.daemons),
            count,
            seconds,
            sum(used) * micros,
            postgresql.backends * micros,
            postgresql.rest * micros,
            driver * micros,
            postgresql.wal / count,
            later.full_pages / count,
            later.fsyncs / count,
            together / batches if batches else 0.0,
            shares,
            _quantiles(answered),
            _quantiles(done),
            _limit(shares, [one / seconds for one in used]),
        )

    async def _settled(self) -> None:
        """Each connection for steps has made a transaction, so that PostgreSQL has heard of what it did before."""
        await asyncio.sleep(SETTLES)
        for port in self.admins:
            await wire.get(port, "/health/ready")

    async def _inputs(self) -> tuple[float, float]:
        """Transactions so far, and inputs in them."""
        found = [await daemon.metrics() for daemon in self.daemons]
        return sum(one.commits for one in found), sum(one.sum("sfu_delegate_batch_inputs_sum") for one in found)

    async def connected(self) -> float:
        """How many are connected, by the database: each instance counts now and then only."""
        return float(self.database.ask("SELECT count(*) FROM delayed_event WHERE presence = 'connected' AND state = 'live'")[0][0])

    # ── what happens ──

    async def delegate(self, people: Sequence[Person], delay: float) -> Load:
        """People delegate, each with an OpenID token that the homeserver is asked about over TLS, and are answered when their event was restarted."""
        requests = [self.world.delegation(person, delay, self.port) for person in people]

        async def work() -> tuple[int, Sequence[float], Sequence[float]]:
            flow = Flow(requests, self.world.now, lambda number: self.world.begin_countdown(people[number]))
            lanes = [range(len(requests))[start::CONNECTIONS] for start in range(CONNECTIONS)]
            each = CONNECTIONS // len(self.daemons)
            parts = [map(iter, lanes[start :: len(self.daemons)]) for start in range(len(self.daemons))]
            await asyncio.gather(*(wire.send(flow, daemon.port, part, each) for daemon, part in zip(self.daemons, parts, strict=True)))
            return len(people), _milliseconds(all_answered(flow, "delegations")), ()

        load = await self.measured(work)
        await self.world.until(
            lambda: self.world.restarted(people) == len(people), ARRIVES_WITHIN, f"the events of {len(people)} people are restarted"
        )
        return load

    async def ignore(self, count: int) -> Load:
        """Webhooks that are no news, of people who have not delegated."""
        strangers = self.world.populate(count // TRACKS, IN_A_ROOM)
        self.world.joined(strangers, self.port)
        tracks = self.world.tracks(strangers, TRACKS, self.port)

        async def work() -> tuple[int, Sequence[float], Sequence[float]]:
            return len(tracks.requests), _milliseconds(await self._by_room(tracks)), ()

        return await self.measured(work)

    async def join(self, people: Sequence[Person]) -> Load:
        """Everybody joins, by room."""
        joined = self.world.joined(people, self.port)
        before = await self.connected()

        async def work() -> tuple[int, Sequence[float], Sequence[float]]:
            flow = await self._by_room(joined, lambda number: self.world.appear(joined.people[number]))
            return len(people), _milliseconds(flow), ()

        load = await self.measured(work)
        if (seen := await self.connected() - before) != len(people):
            raise Failed(f"{len(people)} joined, and {seen:g} count as connected")
        return load

    async def look(self, rooms: int) -> Load:
        """Routine looks at all rooms, as they become due at once."""

        async def work() -> tuple[int, Sequence[float], Sequence[float]]:
            before = self.world.looks
            self.database.ask("UPDATE room SET due = extract(epoch FROM clock_timestamp()), routine = 1")
            await self.world.until(lambda: self.world.looks - before >= rooms, ARRIVES_WITHIN, f"{rooms} rooms are looked at")
            return rooms, (), ()

        return await self.measured(work)

    async def leave(self, people: Sequence[Person], *, by_turns: bool) -> Load:
        """Everybody leaves; up to the last event's sending. `by_turns`: no two webhooks of a room in succession go to the same instance."""
        left = self.world.left(people, self.port)
        before = self.world.sends

        async def work() -> tuple[int, Sequence[float], Sequence[float]]:
            self.world.vanish(people)
            flow = await (self._by_turns(left) if by_turns else self._by_room(left))
            await self.world.until(lambda: self.world.sends - before >= len(people), ARRIVES_WITHIN, f"the events of {len(people)} people are sent")
            ended = [self.world.homeserver.events[person.delay_id].ended_at or 0.0 for person in left.people]
            return len(people), _milliseconds(flow), [(at - sent) * 1e3 for at, sent in zip(ended, flow.sent_at, strict=True)]

        load = await self.measured(work)
        if self.world.sent(people) != len(people):
            raise Failed(f"{len(people)} people left, and {self.world.sent(people)} of their events were sent")
        return load

    async def restart(self, delay: float, seconds: float) -> Load:
        """The restarts of some seconds, of events that have this delay from now on."""
        begin = self._due_anew(delay, CYCLE * delay)

        async def work() -> tuple[int, Sequence[float], Sequence[float]]:
            before = self.world.restarts
            await asyncio.sleep(seconds)
            return self.world.restarts - before, (), ()

        return await self.measured(work, begin + SETTLES)

    def _due_anew(self, delay: float, within: float) -> float:
        """All restarts become due anew, spread over so many seconds, the first of them when this says; three tenths of the delay are left then."""
        begin, each = self.world.now() + AHEAD, within / len(self.people)
        self.database.ask(
            "UPDATE delayed_event SET delay = %(delay)s, due = %(begin)s + id * %(each)s, "
            "running_since = %(begin)s + id * %(each)s - 0.7 * %(delay)s, harm = %(begin)s + id * %(each)s + 0.3 * %(delay)s",
            **{"begin": begin, "each": each, "delay": delay},
        )
        self.database.vacuum()
        for number, person in enumerate(self.people):
            event = self.world.homeserver.events[person.delay_id]
            event.delay, event.since = delay, begin + (number + 1) * each - 0.7 * delay
        return begin

    async def catch_up(self) -> Load:
        """All restarts become due at once, as when a homeserver was down for long."""
        begin, before = self._due_anew(DELAY, 0.0), self.world.restarts

        async def work() -> tuple[int, Sequence[float], Sequence[float]]:
            count = len(self.people)
            await self.world.until(lambda: self.world.restarts - before >= count, ARRIVES_WITHIN, f"{count} events are restarted")
            return count, (), ()

        return await self.measured(work, begin)

    async def _by_room(self, webhooks: Webhooks, before: Callable[[int], object] | None = None) -> Flow:
        """Each room's webhooks come to the same instance."""
        flow = Flow(webhooks.requests, self.world.now, before)
        lanes: list[list[list[int]]] = [webhooks.lanes[start :: len(self.daemons)] for start in range(len(self.daemons))]
        each = CONNECTIONS // len(self.daemons)
        await asyncio.gather(*(wire.send(flow, daemon.port, _gathered(rooms, each), each) for daemon, rooms in zip(self.daemons, lanes, strict=True)))
        return all_answered(flow, "webhooks")

    async def _by_turns(self, webhooks: Webhooks) -> Flow:
        flow = Flow(webhooks.requests, self.world.now)
        ports = [daemon.port for daemon in self.daemons]
        each = CONNECTIONS // len(ports)
        await asyncio.gather(*(_in_turn(flow, ports, lane) for lane in _gathered(webhooks.lanes, each)))
        return all_answered(flow, "webhooks")


def _gathered(rooms: Sequence[Sequence[int]], lanes: int) -> list[Iterator[int]]:
    """The webhooks of many rooms, one room after another, over few connections."""
    return [iter([number for room in rooms[start::lanes] for number in room]) for start in range(lanes)]


class _Asked(asyncio.Protocol):
    """One connection to one instance, for one request at a time."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[bytes] | None = None
        self._rest = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._rest += data
        end = self._rest.find(b"\r\n\r\n")
        length = None if end < 0 else _LENGTH.search(self._rest, 0, end)
        if length is not None and len(self._rest) >= end + 4 + int(length[1]) and self._answer is not None and not self._answer.done():
            data, self._rest = self._rest, b""
            self._answer.set_result(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(wire.WireFailed(f"the connection was closed before the answer: {exc or 'closed'}"))

    async def ask(self, request: bytes) -> bytes:
        """One request and its answer."""
        assert self.transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._answer


async def _in_turn(flow: Flow, ports: Sequence[int], numbers: Iterator[int]) -> None:
    loop = asyncio.get_running_loop()
    connections = [(await loop.create_connection(_Asked, HOST, port))[1] for port in ports]
    try:
        for turn, number in enumerate(numbers):
            flow.sent_at[number] = flow.clock()
            answer = await connections[turn % len(connections)].ask(flow.requests[number])
            flow.answered_at[number] = flow.clock()
            if answer[9:12] != b"200":
                flow.refuse(answer)
    finally:
        for connection in connections:
            assert connection.transport is not None
            connection.transport.abort()


def _milliseconds(flow: Flow) -> list[float]:
    return [(answered - sent) * 1e3 for sent, answered in zip(flow.sent_at, flow.answered_at, strict=True)]


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    return (percentile(values, 0.5), percentile(values, 0.99)) if values else (0.0, 0.0)


def _limit(shares: Mapping[str, float], daemons: Sequence[float]) -> str:
    """What there was not enough of."""
    cores = os.cpu_count() or 1
    if sum(shares.values()) > BOUND * cores:
        return f"all {cores} cores"
    if min(daemons) > BOUND:
        return "one core for each instance"
    if shares["driver"] > BOUND:
        return "the driver's core"
    return ""


# ── stages ──


def configured(world: World, site: Site, database: Database, name: str, ports: tuple[int, int], more: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of one instance."""
    config = configuration(world, site.directory / "unused", *ports, {"presence": PRESENCE, **more}, True)
    return config | {"database": database.url, "postgresql": {"instance": name}, "encryption": {"keys": [site.key]}}


@asynccontextmanager
async def fleet(site: Site, count: int, filling: PostgresFilling, world: World, database: Database) -> AsyncIterator[Fleet]:
    """So many instances, which have looked at all rooms, as they do after a start when nobody had listened before."""
    on = Fleet(world, database)
    more = {**BELIEVED, "delegations": {"max_per_homeserver": max(100_000, 2 * filling.count)}}
    async with world.serving(), AsyncExitStack() as running:
        for number in range(count):
            directory = site.directory / f"instance{number}"
            directory.mkdir(exist_ok=True)
            public, admin = free_ports(2)
            daemon = await Daemon.start(configured(world, site, database, directory.name, (public, admin), more), directory, None)
            running.push_async_callback(daemon.stop)
            on.daemons.append(daemon)
            on.admins.append(admin)
        yield on
        for daemon in on.daemons:
            daemon.must_run()
        world.must_work()


async def looked_at_all(world: World, filling: PostgresFilling) -> None:
    """The first instance asks for a look at every room."""
    await world.until(lambda: world.looks >= filling.rooms, max(ARRIVES_WITHIN, filling.rooms / 20), f"all {filling.rooms} rooms are looked at")


@dataclass(frozen=True, slots=True)
class Lives:
    """What is left of delegations that are over, and kept for their history."""

    lines: float  # of history, for each
    sizes: dict[str, float]  # bytes for each, by table and index


async def webhooks(site: Site, count: int) -> tuple[dict[str, Load], Lives]:
    """Everybody joins, and leaves again."""
    world, sizes = World(site.ports, site.certificates), site.sizes
    everybody = range(sizes.people)
    filling = PostgresFilling(sizes.people, world.homeserver.server_name, world.now(), DELAY, CALM, frozenset(everybody))
    people = known_to(world, filling, everybody)
    filling.room_sids = {room: world.open(room) for room in dict.fromkeys(person.room for person in people)}
    world.residents = filling.residents
    with new_database(site.server) as database:
        await asyncio.to_thread(filling.fill_database, database)
        async with fleet(site, count, filling, world, database) as on:
            await looked_at_all(world, filling)
            half = sizes.people // (2 * IN_A_ROOM) * IN_A_ROOM
            found = {"joined": await on.join(people), "ignored": await on.ignore(len(people)), "looked": await on.look(filling.rooms)}
            found |= {"left": await on.leave(people[:half], by_turns=False), "left_by_turns": await on.leave(people[half:], by_turns=True)}
            await world.quiet(QUIET, ARRIVES_WITHIN)
            ((lines,),) = database.ask("SELECT count(*) FROM history")
            lives = Lives(lines / len(people), {name: size / len(people) for name, size in database.sizes().items()})
            found["delegated"] = await on.delegate(world.populate(sizes.delegating, IN_A_ROOM), DELAY)
            return found, lives


async def restarts(site: Site, count: int) -> dict[str, Load]:
    """Restarts as they become due; and then all of them at once."""
    world, sizes = World(site.ports, site.certificates), site.sizes
    filling = PostgresFilling(sizes.restarting, world.homeserver.server_name, world.now(), DELAY, CALM)
    people = known_to(world, filling, range(sizes.restarting))
    world.residents = filling.residents
    with new_database(site.server) as database:
        await asyncio.to_thread(filling.fill_database, database)
        async with fleet(site, count, filling, world, database) as on:
            on.people = people
            await looked_at_all(world, filling)
            found = {"late": await on.catch_up(), "restarted": await on.restart(sizes.delay, sizes.seconds)}
            world.homeserver.tick(world.now())
            ends = Counter(event.end.value for event in world.homeserver.events.values() if event.end is not End.PENDING)
            if ends:
                raise Failed(f"events ended though nobody had left: {dict(ends)}")
            return found


def known_to(world: World, filling: PostgresFilling, numbers: Sequence[int]) -> list[Person]:
    """These people, whose events the homeserver knows as the database has them."""
    people, delay_ids = [], {}
    for number in numbers:
        person = filling.person(number)
        world.schedule(person, filling.delay)
        event = world.homeserver.events[person.delay_id]
        event.scheduled_at = event.since = filling.countdown(number)[0]
        delay_ids[number] = person.delay_id
        people.append(person)
    filling.delay_ids = delay_ids
    filling.residents("")  # its rooms are numbered now, not while somebody waits
    return people


# ── many rows ──


@dataclass(frozen=True, slots=True)
class Idle:
    """One instance on many rows, to whom nothing happens."""

    took: float  # seconds from exec until it answered
    cpu: float  # … of processor time of the daemon
    postgresql: float  # … of PostgreSQL
    rss: int  # bytes in memory when it had started …
    rss_later: int  # … and after a while
    daemon: float  # cores, meanwhile
    backends: float
    rest: float
    wal: float  # bytes a second


async def idle(site: Site, database: Database, filling: PostgresFilling, world: World, seconds: float) -> Idle:
    """Start one instance, and let it be. Another one seems to be there, so that no room needs a look."""
    covering = asyncio.create_task(_cover(database))
    before = database.used()
    try:
        async with fleet(site, 1, filling, world, database) as on:
            (daemon,) = on.daemons
            started, rss = database.used().since(before), machine.rss_of(daemon.pid)
            await asyncio.sleep(2.0)
            before, cpu = database.used(), machine.cpu_of(daemon.pid)
            await asyncio.sleep(seconds)
            used, cpu = database.used().since(before), machine.cpu_of(daemon.pid) - cpu
            later = machine.rss_of(daemon.pid)
            if world.looks > 1 or world.restarts:  # one asks whether the SFU can be asked
                raise Failed(f"there were {world.looks} looks and {world.restarts} restarts, and there was to be nothing")
    finally:
        covering.cancel()
    share = 1 / used.at
    return Idle(
        daemon.took, daemon.starting.daemon_cpu, started.cpu, rss, later, cpu * share, used.backends * share, used.rest * share, used.wal * share
    )


async def _cover(database: Database) -> None:
    """Be an instance that is alive."""
    while True:
        database.ask(
            "INSERT INTO instance (name, version, address, started_at, alive_at, word) VALUES ('another', '', '', %s, %s, '') "
            "ON CONFLICT (name) DO UPDATE SET alive_at = excluded.alive_at",
            *(time(), time()),
        )
        await asyncio.sleep(0.5)
