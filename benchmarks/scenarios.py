"""The scenarios: what happens between the daemon and the other side, and what is read from it.

Every scenario has a daemon and a world of its own in each run, counts by what arrives at the homeserver, and raises Failed where something does not
arrive that has to. Departures are believed at once where that is said.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sfu_delegate.delegation.policy import DEPARTURES, Unasked
from sfu_delegate.demo.processes import free_ports
from sfu_delegate.sandbox.homeserver import End
from tests.integration.certificates import Certificates

from benchmarks import limits as limiting
from benchmarks import machine, wire
from benchmarks.figures import STEADY_RATE, Need, Run, percentile, slope
from benchmarks.limits import Limits, Work
from benchmarks.machine import Cores, Meter, Span
from benchmarks.process import COMMAND, Daemon, Metrics
from benchmarks.rows import IN_A_ROOM, PRESENCE, Filling, all_known, scattered
from benchmarks.wire import Flow
from benchmarks.world import PARALLEL, Failed, Person, Ports, Webhooks, World, all_answered, configuration

TEN_MINUTES = 600.0
CROWD = 50  # in a room, where nothing else is said
WARMING_UP = 320  # people
LEAVERS = 20  # who show that the daemon was listening
ARRIVES_WITHIN = 60.0  # seconds
BELIEVED: Mapping[str, Any] = {
    "departures": {reason: {"look_after": "0s"} for reason, rule in DEPARTURES.items() if rule.unasked is not Unasked.CONNECTED}
}
"""The configuration's sections with which departures are believed at once, as in `serve-for-delegatebench`; not takeovers, nor absences."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    noise: int = 20_000
    noise_people: int = 1000  # with delegations, and as many without
    accept: int = 5000
    join: int = 5000
    many_rooms: int = 5000
    one_room: int = 500
    steady: int = 5000
    steady_delay: float = 30.0
    steady_seconds: float = 60.0
    memory: tuple[int, ...] = (2000, 6500, 11_000, 15_500, 20_000)
    rows: tuple[int, ...] = (1000, 100_000, 1_000_000)
    rows_webhooks: int = 2000
    idle: int = 100_000
    idle_seconds: float = 60.0
    idle_settles: float = 60.0  # until looks that began together are spread over their interval
    start: tuple[int, ...] = (0, 100_000, 1_000_000)
    handler_requests: int = 10_000
    quiet: float = 1.0  # seconds without a request to the homeserver, after which nothing is under way any more
    follows: float = 5.0  # seconds after the last delegation was answered: first looks at those who have not joined
    client_requests: int = 5000
    commits: int = 2000


QUICK = Sizes(
    noise=2000,
    noise_people=100,
    accept=400,
    join=400,
    many_rooms=500,
    one_room=100,
    steady=300,
    steady_delay=6.0,
    steady_seconds=6.0,
    memory=(200, 600, 1000),
    rows=(1000, 10_000),
    rows_webhooks=200,
    idle=5000,
    idle_seconds=5.0,
    idle_settles=2.0,
    start=(0, 10_000),
    quiet=0.3,
    follows=1.0,
    handler_requests=600,
    client_requests=600,
    commits=300,
)


@dataclass(slots=True)
class Bench:
    """What all runs share. `directory` is for files that are not measured, `database` is where databases are."""

    sizes: Sizes
    cores: Cores
    directory: Path
    database: Path
    certificates: Certificates
    ports: Ports = field(default_factory=lambda: Ports(*free_ports(3)))
    filled: dict[int, Path] = field(default_factory=dict)
    command: Sequence[str] = COMMAND
    meter: Callable[[int], Meter] = Meter
    beside: Callable[[Work, World, Path, Path, int | None], Awaitable[Limits]] = limiting.measure

    def filled_with(self, filling: Filling) -> Path:
        """A database with these rows, to be copied. Those of one size are all the same."""
        path = self.filled.get(filling.count)
        if path is None:
            path = self.filled[filling.count] = self.database / f"filled-{filling.count}.db"
            filling.fill(path)
        return path


class Stage:
    """A daemon between the two models, and what is read from all of them."""

    def __init__(self, bench: Bench, world: World, daemon: Daemon) -> None:
        self.bench = bench
        self.world = world
        self.daemon = daemon
        self.spans: dict[str, Span] = {}

    @property
    def port(self) -> int:
        """Where the daemon listens."""
        return self.daemon.port

    async def delegate(self, people: Sequence[Person], delay: float, requests: Sequence[bytes] | None = None) -> Flow:
        """Everybody delegates over 32 connections, and every event is restarted once. Raises Failed."""
        flow = await self.ask(people, delay, requests)
        await self.world.until(
            lambda: self.world.restarted(people) == len(people), ARRIVES_WITHIN, f"the events of {len(people)} people are restarted"
        )
        return flow

    async def ask(self, people: Sequence[Person], delay: float, requests: Sequence[bytes] | None = None) -> Flow:
        """The same, up to the last answer."""
        made = [self.world.delegation(person, delay, self.port) for person in people] if requests is None else requests
        flow = Flow(made, self.world.now, lambda number: self.world.begin_countdown(people[number]))
        shared = iter(range(len(made)))
        await wire.send(flow, self.port, [shared] * PARALLEL, PARALLEL)
        return all_answered(flow, "delegations")

    async def join(self, people: Sequence[Person], joined: Webhooks | None = None) -> Flow:
        """Everybody's joining is told. Raises Failed where it has not taken effect."""
        before = (await self.daemon.metrics()).connected
        joined = joined or self.world.joined(people, self.port)
        flow = await self.world.deliver(joined, self.port, self.appearing(joined))
        await self.connected(before + len(people))
        return flow

    def appearing(self, joined: Webhooks) -> Callable[[int], object]:
        """Each appears in the SFU's lists just before the webhook is sent."""
        return lambda number: self.world.appear(joined.people[number])

    async def connected(self, count: float) -> None:
        """Raises Failed unless so many are connected, as the daemon sees it."""
        seen = (await self.daemon.metrics()).connected
        if seen != count:
            raise Failed(f"{count:g} participants should count as connected, and {seen:g} do")

    async def connect(self, people: Sequence[Person], delay: float) -> None:
        """Everybody delegates and joins; then wait until the homeserver is asked nothing any more. Raises Failed."""
        await self.delegate(people, delay)
        await self.join(people)
        await self.world.quiet(self.bench.sizes.quiet, ARRIVES_WITHIN)

    async def leave(self, people: Sequence[Person], left: Webhooks) -> Flow:
        """Everybody leaves at once, and the webhooks tell. Up to the last event's sending. Raises Failed."""
        before = self.world.sends
        self.world.vanish(people)
        flow = await self.world.deliver(left, self.port)
        await self.world.until(
            lambda: self.world.sends - before >= len(people), ARRIVES_WITHIN, f"the events of {len(people)} people who left are sent"
        )
        return flow

    def must_be_sent(self, people: Sequence[Person]) -> None:
        """Raises Failed unless each of their events was sent by the daemon."""
        sent = self.world.sent(people)
        if sent != len(people):
            raise Failed(f"{len(people)} people left, and {sent} of their events were sent")

    def keep(self, name: str, span: Span) -> Span:
        """A span that the run is judged by."""
        self.spans[name] = span
        return span

    def work(self, requests: Sequence[bytes], lanes: Sequence[Sequence[int]]) -> Work:
        """What the bare programs do."""
        sizes = self.bench.sizes
        return Work(requests, lanes, sizes.handler_requests, sizes.client_requests, sizes.commits)

    async def finish(self, work: Work, values: Mapping[str, float], needs: Callable[[Limits], dict[str, Need]], raw: Mapping[str, Any]) -> Run:
        """Stop the daemon, measure the bare things in its place, and make up the run. Raises Failed, and demo.processes.Died."""
        self.world.must_work()
        self.daemon.must_run()
        await self.daemon.stop()
        found = await self.bench.beside(work, self.world, self.bench.directory, self.bench.database, self.bench.cores.daemon)
        spans = {name: _told(span) for name, span in self.spans.items()}
        return Run(dict(values), limiting.as_dict(found), needs(found), spans, dict(raw))


def _told(span: Span) -> dict[str, float | bool]:
    told: dict[str, float | bool] = {name: round(value, 4) for name, value in asdict(span).items()}
    return told | {"driver_bound": span.driver_bound, "noisy": span.noisy}


@asynccontextmanager
async def stage(
    bench: Bench,
    more: Mapping[str, Any] | None = None,
    *,
    world: World | None = None,
    database: Path | None = None,
    exempt: bool = False,
    prepare: Callable[[World], object] = lambda _: None,
) -> AsyncIterator[Stage]:
    """A world that serves and a daemon that is ready, with `more` of a configuration, and with a copy of `database` where one is given."""
    world = world or World(bench.ports, bench.certificates)
    prepare(world)
    path = bench.database / "daemon.db"
    _remove(path)
    if database is not None:
        await asyncio.to_thread(_copy, database, path)
    public, admin = free_ports(2)
    config = configuration(world, path, public, admin, more or {}, exempt)
    async with world.serving():
        daemon = await Daemon.start(config, bench.directory, bench.cores.daemon, bench.command)
        try:
            yield Stage(bench, world, daemon)
        finally:
            await daemon.stop()
            _remove(path)


def _remove(path: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


def _copy(source: Path, target: Path) -> None:
    """Copy a database, and wait until it is on the disk: else that would go on while commits are measured."""
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def _micros(seconds: float, count: int) -> float:
    return seconds / count * 1e6


def _latencies(flow: Flow) -> list[float]:
    """Milliseconds from each request to its answer."""
    return [(answered - sent) * 1e3 for sent, answered in zip(flow.sent_at, flow.answered_at, strict=True)]


def _commits(before: Metrics, after: Metrics, count: int) -> float:
    """Commits for each of `count` things."""
    return (after.commits - before.commits) / count


def _words(handlers: int = 0, requests: int = 0, commits: float = 0.0) -> str:
    parts = [("handler", handlers), ("request", requests)]
    words = [name if times == 1 else f"{times} {name}s" for name, times in parts if times]
    return " + ".join([*words, f"{commits:.3f} commits"] if commits else words)


def _need(limits: Limits, handlers: int = 0, requests: int = 0, commits: float = 0.0) -> Need:
    return Need(_words(handlers, requests, commits), limits.sum(handlers, requests, commits))


# ── the scenarios ──


async def noise(bench: Bench) -> Run:
    """Webhooks that are no news to the daemon, half of them of rooms without delegations."""
    people = bench.sizes.noise_people
    async with stage(bench, BELIEVED) as on:
        known, strangers, leavers = (on.world.populate(count, CROWD) for count in (people, people, LEAVERS))
        await on.connect([*known, *leavers], TEN_MINUTES)
        on.world.joined(strangers, on.port)
        for stranger in strangers:
            on.world.appear(stranger)
        tracks = on.world.tracks([*known, *strangers], max(1, bench.sizes.noise // (2 * people)), on.port)
        before = await on.daemon.metrics()
        with machine.undisturbed():
            meter = bench.meter(on.daemon.pid)
            flow = await on.world.deliver(tracks, on.port)
            span = on.keep("webhooks", meter.read())
        ignored = ("sfu_delegate_webhooks_total", 'event="track_published"', 'result="ignored"')
        counted = (await on.daemon.metrics()).sum(*ignored) - before.sum(*ignored)
        count = len(tracks.requests)
        if counted != count:
            raise Failed(f"{count} webhooks were sent, and the daemon counts {counted:g}")
        if on.world.sends or on.world.pending(known) != len(known):
            raise Failed("an event ended though nobody had left")
        # It must have been listening all the while.
        await on.leave(leavers, on.world.left(leavers, on.port))
        on.must_be_sent(leavers)
        values = {"noise.cpu": _micros(span.daemon_cpu, count)}
        raw = {"webhooks": count, "per_second": count / span.wall, "bytes": len(tracks.requests[0]), "answered_ms": _quantiles(_latencies(flow))}
        return await on.finish(on.work(tracks.requests, tracks.lanes), values, lambda found: {"noise.cpu": _need(found, handlers=1)}, raw)


async def accept(bench: Bench) -> Run:
    """Delegations of people who have not joined yet, each with an OpenID token that the homeserver is asked about over TLS."""
    count = bench.sizes.accept
    async with stage(bench) as on:
        people = on.world.populate(count, CROWD)
        requests = [on.world.delegation(person, TEN_MINUTES, on.port) for person in people]
        before = await on.daemon.metrics()
        with machine.undisturbed():
            meter = bench.meter(on.daemon.pid)
            flow = await on.ask(people, TEN_MINUTES, requests)
            span = on.keep("up to the last answer", meter.read())
            await asyncio.sleep(bench.sizes.follows)
            whole = on.keep("with what follows", meter.read())
        await on.world.until(lambda: on.world.restarted(people) == count, ARRIVES_WITHIN, f"{count} events are restarted")
        checked = on.world.homeserver.answers["openid_userinfo", 200]
        if checked < count:
            raise Failed(f"{count} OpenID tokens were presented, and the homeserver was asked about {checked}")
        if on.world.pending(people) != count:
            raise Failed("an event ended though nobody had left")
        commits = _commits(before, await on.daemon.metrics(), count)
        times = _latencies(flow)
        values = {
            "accept.cpu": _micros(span.daemon_cpu, count),
            "accept.cpu_after": _micros(whole.daemon_cpu, count),
            "accept.per_second": count / span.wall,
            "accept.p50": percentile(times, 0.5),
            "accept.p99": percentile(times, 0.99),
        }

        def needs(found: Limits) -> dict[str, Need]:
            need = _need(found, 1, 2, commits)  # the token's check, and the restart that confirms the event
            return {"accept.cpu": need, "accept.cpu_after": need}

        every = range(count)
        lanes = [every[start::PARALLEL] for start in range(PARALLEL)]
        raw = {"delegations": count, "commits_each": commits, "looks": on.world.looks, "bytes": len(requests[0]), "answered_ms": _quantiles(times)}
        return await on.finish(on.work(requests, lanes), values, needs, raw)


async def join(bench: Bench) -> Run:
    """The webhooks of people who have delegated and now join. Their events were restarted before."""
    count = bench.sizes.join
    async with stage(bench, BELIEVED) as on:
        people = on.world.populate(count, CROWD)
        await on.delegate(people, TEN_MINUTES)
        await asyncio.sleep(bench.sizes.follows)
        joined = on.world.joined(people, on.port)
        before, restarts = await on.daemon.metrics(), on.world.restarts
        with machine.undisturbed():
            meter = bench.meter(on.daemon.pid)
            flow = await on.world.deliver(joined, on.port, on.appearing(joined))
            span = on.keep("up to the last answer", meter.read())
            await asyncio.sleep(1.0)
            whole = on.keep("with what follows", meter.read())
        after = await on.daemon.metrics()
        await on.connected(count)
        commits = _commits(before, after, count)
        # The leaving of those who have joined is believed at once, and those who have not are looked for: so the joins have taken effect.
        leavers = people[::CROWD]
        await on.leave(leavers, on.world.left(leavers, on.port))
        on.must_be_sent(leavers)
        times = _latencies(flow)
        values = {
            "join.cpu": _micros(span.daemon_cpu, count),
            "join.cpu_after": _micros(whole.daemon_cpu, count),
            "join.p50": percentile(times, 0.5),
            "join.p99": percentile(times, 0.99),
        }
        raw = {
            "webhooks": count,
            "commits_each": commits,
            "restarts_meanwhile": on.world.restarts - restarts,
            "looks": on.world.looks,
            "bytes": len(joined.requests[0]),
            "answered_ms": _quantiles(times),
        }

        def needs(found: Limits) -> dict[str, Need]:
            need = _need(found, handlers=1, commits=commits)
            return {"join.cpu": need, "join.cpu_after": need}

        return await on.finish(on.work(joined.requests, joined.lanes), values, needs, raw)


async def many_rooms(bench: Bench) -> Run:
    """Everybody leaves 100 rooms at once. Departures are believed at once."""
    return await _storm(bench, "many_rooms", bench.sizes.many_rooms, max(1, bench.sizes.many_rooms // 100))


async def one_room(bench: Bench) -> Run:
    """Everybody leaves one room. Departures are believed at once."""
    return await _storm(bench, "one_room", bench.sizes.one_room, bench.sizes.one_room)


async def _storm(bench: Bench, name: str, count: int, per_room: int) -> Run:
    async with stage(bench, BELIEVED) as on:
        people = on.world.populate(count, per_room)
        await on.connect(people, TEN_MINUTES)
        left = on.world.left(people, on.port)
        before = await on.daemon.metrics()
        with machine.undisturbed():
            meter, begun = bench.meter(on.daemon.pid), on.world.now()
            flow = await on.leave(people, left)
            span = on.keep("up to the last send", meter.read())
        on.must_be_sent(people)
        commits = _commits(before, await on.daemon.metrics(), count)
        events = [on.world.homeserver.events[person.delay_id] for person in left.people]
        ended = [event.ended_at or 0.0 for event in events]
        times = [(at - sent) * 1e3 for at, sent in zip(ended, flow.sent_at, strict=True)]
        values = {
            f"{name}.p50": percentile(times, 0.5),
            f"{name}.p99": percentile(times, 0.99),
            f"{name}.max": max(times),
            f"{name}.all": max(ended) - begun,
            f"{name}.cpu": _micros(span.daemon_cpu, count),
        }
        raw = {
            "leaves": count,
            "rooms": len(left.lanes),
            "commits_each": commits,
            "answered_ms": _quantiles(_latencies(flow)),
            "webhook_to_send_ms": [round(time, 3) for time in times],
        }

        def needs(found: Limits) -> dict[str, Need]:
            wall = Need("a commit", found.commit_wall / 1e3)
            of_one_room = {f"{name}.{part}": wall for part in ("p50", "p99", "max")} if len(left.lanes) == 1 else {}
            return {f"{name}.cpu": _need(found, 1, 1, commits)} | of_one_room

        return await on.finish(on.work(left.requests, left.lanes), values, needs, raw)


async def steady(bench: Bench) -> Run:
    """Connected people, whose events are restarted again and again."""
    sizes = bench.sizes
    async with stage(bench) as on:
        people = on.world.populate(sizes.steady, CROWD)
        await on.delegate(people, sizes.steady_delay)
        await on.join(people)
        sample = on.world.tracks(people[: min(len(people), 2000)], 1, on.port)
        before, restarts_before = await on.daemon.metrics(), on.world.restarts
        with machine.undisturbed():
            meter, begun = bench.meter(on.daemon.pid), on.world.now()
            await asyncio.sleep(sizes.steady_seconds)
            span, ended = on.keep("restarts", meter.read()), on.world.now()
        count = on.world.restarts - restarts_before
        commits = _commits(before, await on.daemon.metrics(), count)
        on.world.homeserver.tick(on.world.now())
        events = [on.world.homeserver.events[person.delay_id] for person in people]
        expired = sum(event.end is End.RAN_OUT for event in events)
        if expired or any(event.end is not End.PENDING for event in events):
            raise Failed(f"{expired} events ran out though their participants were connected, and {on.world.sends} were sent")
        passed = [(later - earlier) / event.delay for event in events for earlier, later in pairwise(event.restarted_at) if begun <= later <= ended]
        per_second = count / span.wall
        values = {
            "steady.cpu_at_rate": span.daemon_cpu / span.wall * 100 * STEADY_RATE / per_second,
            "steady.cpu_percent": span.daemon_cpu / span.wall * 100,
            "steady.per_second": per_second,
            "steady.cpu": _micros(span.daemon_cpu, count),
            "steady.expired": expired,
            "steady.passed_p50": percentile(passed, 0.5),
            "steady.passed_max": max(passed),
        }
        raw = {"restarts": count, "commits_each": commits, "looks": on.world.looks, "passed": _quantiles(passed, 4)}

        def needs(found: Limits) -> dict[str, Need]:
            least = found.sum(requests=1, commits=commits)
            words = _words(requests=1, commits=commits)
            return {"steady.cpu": Need(words, least), "steady.cpu_at_rate": Need(words, least * STEADY_RATE / 1e4)}

        return await on.finish(on.work(sample.requests, sample.lanes), values, needs, raw)


async def memory(bench: Bench) -> Run:
    """More and more connected people."""
    async with stage(bench) as on:
        points: list[tuple[float, float]] = []
        people: list[Person] = []
        for count in bench.sizes.memory:
            more = on.world.populate(count - len(people), CROWD)
            await on.connect(more, TEN_MINUTES)
            people += more
            await asyncio.sleep(bench.sizes.quiet)
            points.append((len(people), machine.rss_of(on.daemon.pid)))
        if on.world.pending(people) != len(people):
            raise Failed("an event ended though nobody had left")
        each, none = slope(points)
        sample = on.world.tracks(people[:2000], 1, on.port)
        values = {"memory.slope": each, "memory.intercept": none / 2**20}
        return await on.finish(on.work(sample.requests, sample.lanes), values, lambda _: {}, {"delegations_and_bytes": points})


async def rows(bench: Bench, count: int) -> Run:
    """Joins and leaves while the database has `count` rows, of others, and of these very people. Departures are believed at once."""
    some = bench.sizes.rows_webhooks
    world = World(bench.ports, bench.certificates)
    filling = scattered(world, count, some)
    world.residents = filling.residents
    database = await asyncio.to_thread(bench.filled_with, filling)
    values: dict[str, float] = {}
    commits: dict[str, float] = {}
    raw: dict[str, Any] = {"rows": count, "commits_each": commits}
    async with stage(bench, {**BELIEVED, "presence": PRESENCE, **_room_for(count + some)}, world=world, database=database, exempt=True) as on:
        await _looked_at_all(on, filling)
        fresh, first = world.populate(some, IN_A_ROOM), world.populate(WARMING_UP, IN_A_ROOM)
        await on.delegate([*fresh, *first], TEN_MINUTES * 10)
        # Statements of every size are made when they are needed first: not by those who are counted first.
        await world.deliver(joined := world.joined(first, on.port).shared(), on.port, on.appearing(joined))
        await on.leave(first, world.left(first, on.port).shared())
        works: list[Webhooks] = []
        active = [filling.person(number) for number in sorted(filling.expected)]
        for kind, people in (("idle", fresh), ("active", active)):
            await world.quiet(bench.sizes.quiet, ARRIVES_WITHIN)
            joined = world.joined(people, on.port).shared()
            before = await on.daemon.metrics()
            with machine.undisturbed():
                meter = bench.meter(on.daemon.pid)
                await world.deliver(joined, on.port, on.appearing(joined))
                span = on.keep(f"{kind} join", meter.read())
            after = await on.daemon.metrics()
            if after.connected - before.connected != len(people):
                raise Failed(f"{len(people)} joined, and {after.connected - before.connected:g} count as connected")
            values[f"rows.{kind}.join.{count}"] = _micros(span.daemon_cpu, len(people))
            commits[f"{kind}.join"] = _commits(before, after, len(people))
            await world.quiet(bench.sizes.quiet, ARRIVES_WITHIN)
            left = world.left(people, on.port).shared()
            before = await on.daemon.metrics()
            with machine.undisturbed():
                meter = bench.meter(on.daemon.pid)
                await on.leave(people, left)
                span = on.keep(f"{kind} leave", meter.read())
            on.must_be_sent(people)
            values[f"rows.{kind}.leave.{count}"] = _micros(span.daemon_cpu, len(people))
            commits[f"{kind}.leave"] = _commits(before, await on.daemon.metrics(), len(people))
            works.append(left)

        def needs(found: Limits) -> dict[str, Need]:
            kinds = ("idle", "active")
            joins = {f"rows.{kind}.join.{count}": _need(found, handlers=1, commits=commits[f"{kind}.join"]) for kind in kinds}
            return joins | {f"rows.{kind}.leave.{count}": _need(found, 1, 1, commits[f"{kind}.leave"]) for kind in kinds}

        raw |= {"people": len(active), "looks": world.looks}
        return await on.finish(on.work(works[0].requests, works[0].lanes), values, needs, raw)


def _room_for(count: int) -> dict[str, Any]:
    return {"delegations": {"max_per_homeserver": max(100_000, 2 * count)}}


async def _looked_at_all(on: Stage, filling: Filling) -> None:
    """The start asks for a look at every room. Wait until they have been made, and all is quiet."""
    await on.world.until(
        lambda: on.world.looks >= filling.rooms, max(600.0, filling.rooms / 50), f"all {filling.rooms} rooms are looked at after the start"
    )
    await asyncio.sleep(2.0)


async def idle(bench: Bench) -> Run:
    """Very many connected people to whom nothing happens; their restarts go on. Once with looks as rare as can be, once as they are by default."""
    sizes = bench.sizes
    values: dict[str, float] = {}
    raw: dict[str, Any] = {"connected": sizes.idle}
    spans: dict[str, Span] = {}
    last: Run | None = None
    used: dict[str, tuple[float, int]] = {}
    for name, presence in (("rarest_looks", PRESENCE), ("default_looks", {})):
        world = World(bench.ports, bench.certificates)
        filling = all_known(world, sizes.idle)
        world.residents = filling.residents
        path = bench.database / "idle.db"
        _remove(path)
        await asyncio.to_thread(filling.fill, path)
        async with stage(bench, {"presence": presence, **_room_for(sizes.idle)}, world=world, database=path, exempt=True) as on:
            _remove(path)
            await _looked_at_all(on, filling)
            await on.connected(sizes.idle)
            await asyncio.sleep(sizes.idle_settles if name == "default_looks" else 0.0)
            looks, restarts = world.looks, world.restarts
            before = await on.daemon.metrics()
            with machine.undisturbed():
                meter = bench.meter(on.daemon.pid)
                await asyncio.sleep(sizes.idle_seconds)
                span = on.keep(name, meter.read())
            looks, restarts = world.looks - looks, world.restarts - restarts
            commits = (await on.daemon.metrics()).commits - before.commits
            await on.connected(sizes.idle)
            values[f"idle.{name}"] = span.daemon_cpu / span.wall * 100
            raw[name] = {"sfu_calls": looks, "restarts": restarts, "commits": commits, "seconds": round(span.wall, 1)}
            used[name] = (span.daemon_cpu, looks)
            spans |= on.spans
            if name == "default_looks":
                # A look is what the two differ by; the restarts are the same in both.
                values["idle.looks"] = values["idle.default_looks"] - values["idle.rarest_looks"]
                (rare, few), (often, many) = used["rarest_looks"], used["default_looks"]
                if many > few:
                    values["idle.look"] = _micros(max(0.0, often - rare), many - few)
                on.spans = spans
                sample = world.populate(200, CROWD)
                world.joined(sample, on.port)
                tracks = world.tracks(sample, 10, on.port)
                last = await on.finish(on.work(tracks.requests, tracks.lanes), values, lambda _: {}, raw)
    assert last is not None
    return last


async def start(bench: Bench, count: int) -> Run:
    """From exec until the daemon answers, with `count` rows, which are in the page cache."""
    world = World(bench.ports, bench.certificates)
    database = None
    if count:
        filling = scattered(world, count, bench.sizes.rows_webhooks)
        world.residents = filling.residents
        database = await asyncio.to_thread(bench.filled_with, filling)
    async with stage(bench, {"presence": PRESENCE, **_room_for(count)}, world=world, database=database, exempt=True) as on:
        sample = world.populate(200, CROWD)
        world.joined(sample, on.port)
        tracks = world.tracks(sample, 10, on.port)
        on.keep("start", on.daemon.starting)
        values = {f"start.after.{count}": on.daemon.took, f"start.cpu.{count}": on.daemon.starting.daemon_cpu}
        return await on.finish(on.work(tracks.requests, tracks.lanes), values, lambda _: {}, {"rows": count})


def _quantiles(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    parts = {"least": 0.0, "p1": 0.01, "p50": 0.5, "p99": 0.99, "most": 1.0}
    return {name: round(percentile(values, part), digits) for name, part in parts.items()}


Scenario = Callable[[Bench], Awaitable[Run]]


def _of(scenario: Callable[[Bench, int], Awaitable[Run]], count: int) -> Scenario:
    async def run(bench: Bench) -> Run:
        return await scenario(bench, count)

    run.__doc__ = scenario.__doc__
    return run


def all_of(sizes: Sizes) -> dict[str, Scenario]:
    """All scenarios by name, in the order in which they are run. Those of one name but for the number of rows are one for `--only`."""
    single: dict[str, Scenario] = {
        "noise": noise,
        "accept": accept,
        "join": join,
        "many_rooms": many_rooms,
        "one_room": one_room,
        "steady": steady,
        "memory": memory,
        "idle": idle,
    }
    by_rows = {f"rows.{count}": _of(rows, count) for count in sizes.rows} | {f"start.{count}": _of(start, count) for count in sizes.start}
    return single | by_rows


LONG = ("rows", "idle", "start")
"""Scenarios that `--quick` leaves out unless they are asked for."""
