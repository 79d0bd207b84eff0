"""`python -m benchmarks.scaling`: several instances on one PostgreSQL, and many delegations: the figures of `docs/scaling.md`.

    python -m benchmarks.scaling                              everything: about twenty minutes
    python -m benchmarks.scaling --only instances storage     these parts
    python -m benchmarks.scaling --quick                      small numbers, under a minute: to try the benchmarks themselves
    python -m benchmarks.scaling --fill docs/scaling.md       … and put the tables into that page; with --from, those of an earlier report

PostgreSQL is durable (`fsync`, `synchronous_commit`), on loopback, and started and stopped by this. The report is written after every part.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from time import perf_counter
from typing import Any

import uvloop
from sfu_delegate.demo.processes import Died
from sfu_delegate.store.schema import STORAGE
from tests.integration.certificates import Certificates
from tests.postgresql import Server

from benchmarks import machine, scaling_instances, scaling_report, scaling_steps, scaling_storage
from benchmarks.machine import Cores, Meter
from benchmarks.process import REPOSITORY
from benchmarks.report import without_paths
from benchmarks.scaling_instances import InstanceSizes, Site
from benchmarks.scaling_rows import PostgresFilling
from benchmarks.scaling_server import SETTINGS, cpu_of_server, new_database
from benchmarks.scaling_steps import Clockwork, StepSizes
from benchmarks.scaling_storage import delay_for
from benchmarks.wire import WireFailed
from benchmarks.world import Failed, World

OUT = Path("build/scaling")
OUT_QUICK = Path("build/scaling-quick")
AHEAD = 7200.0  # seconds; until then nothing is due of the rows that a step is measured with
CALM = 240.0  # … on the clock of the steps: webhooks come before the first restart


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    rows: tuple[int, ...] = (100_000, 1_000_000)
    steps: StepSizes = field(default_factory=StepSizes)
    idle_seconds: float = 10.0  # the first census comes after 15 s
    unvacuumed: tuple[int, ...] = (5000, 5000, 10_000, 20_000, 20_000)  # restarts, with the largest number of rows
    reader: tuple[int, ...] = (2000, 4000, 4000)
    homeservers: tuple[int, ...] = (1000, 10_000)
    homeservers_rows: int = 50_000
    instances: InstanceSizes = field(default_factory=InstanceSizes)
    storage_rows: int = 20_000
    storage_cycles: float = 5.0
    storage: tuple[tuple[int, float], ...] = ((100, 0.2), (100, 0.02), (90, 0.02), (80, 0.2), (80, 0.05), (80, 0.02), (70, 0.02), (50, 0.02))
    """Fillfactor and `autovacuum_vacuum_scale_factor`: PostgreSQL's defaults come first."""
    fillfactors: tuple[int, ...] = (100, 90, 80, 70, 50)
    lives: int = 6400


QUICK = Sizes(
    rows=(2000,),
    steps=StepSizes(alone=10, together=64, restarts_alone=5, restarts=64, backlog=64, news=5, census=1),
    idle_seconds=1.0,
    unvacuumed=(64, 64),
    reader=(64,),
    homeservers=(50,),
    homeservers_rows=500,
    instances=InstanceSizes(counts=(2,), people=200, delegating=96, restarting=500, delay=30.0, seconds=3.0),
    storage_rows=1000,
    storage_cycles=0.5,
    storage=((100, 0.2), (80, 0.02)),
    fillfactors=(80,),
    lives=64,
)

NAMES = ("rows", "homeservers", "storage", "instances")
Result = Mapping[str, Any]
Part = Callable[[Site, Sizes], Awaitable[Result]]


async def rows(site: Site, sizes: Sizes, count: int) -> Result:
    """A database with so many rows: a start, what goes on beside steps, and the steps themselves."""
    world = World(site.ports, site.certificates)
    alone, together = scaling_steps.scattered_people(count, sizes.steps)
    expected = frozenset([*alone, *together])
    filling = PostgresFilling(count, world.homeserver.server_name, world.now() + AHEAD, delay_for(count), CALM, expected)
    found: dict[str, Any] = {}
    with new_database(site.server) as database:
        await asyncio.to_thread(filling.fill_database, database)
        found["sizes"] = database.sizes()
        found["idle"] = asdict(await scaling_instances.idle(site, database, filling, world, sizes.idle_seconds))
        found["beside"] = asdict(scaling_steps.beside(database, world.now(), sizes.steps))
        clock = Clockwork(database, filling.at)
        try:
            found["engine_ready"] = clock.began_in
            costs = scaling_steps.steps(clock, filling, sizes.steps)
            if count == max(sizes.rows):
                found["compressed"] = {name: asdict(cost) for name, cost in scaling_steps.compressed(clock, sizes.steps).items()}
                found["unvacuumed"] = asdict(scaling_storage.unvacuumed(clock, sizes.unvacuumed, sizes.reader))
            costs["backlog.together"] = scaling_steps.backlog(clock, filling, sizes.steps)
        finally:
            clock.close()
    return found | {"steps": {name: asdict(cost) for name, cost in costs.items()}}


async def homeservers(site: Site, sizes: Sizes, count: int) -> Result:
    """What is asked about once a second, where users are of so many homeservers."""
    filling = PostgresFilling(sizes.homeservers_rows, "example.org", World(site.ports, site.certificates).now(), 3600.0, 600.0, homeservers=count)
    with new_database(site.server) as database:
        await asyncio.to_thread(filling.fill_database, database)
        return {"rows": filling.count, "beside": asdict(scaling_steps.beside(database, filling.at, sizes.steps))}


async def storage(site: Site, sizes: Sizes) -> Result:
    """The same rows are restarted again and again, with other settings of their table."""
    found = []
    for fillfactor, scale_factor in sizes.storage:
        at = World(site.ports, site.certificates).now()
        filling = PostgresFilling(sizes.storage_rows, "example.org", at, delay_for(sizes.storage_rows), 10.0)
        with new_database(site.server) as database:
            worn = await asyncio.to_thread(scaling_storage.wear, database, filling, fillfactor, scale_factor, sizes.storage_cycles)
        found.append(asdict(worn))
    lives = []
    for fillfactor in sizes.fillfactors:
        with new_database(site.server) as database:
            now = World(site.ports, site.certificates).now()
            lived = await asyncio.to_thread(scaling_storage.lives, database, "example.org", now, fillfactor, sizes.lives)
        lives.append(asdict(lived))
    return {"rows": sizes.storage_rows, "wear": found, "lives": lives}


async def instances(site: Site, sizes: Sizes, count: int) -> Result:  # noqa: ARG001
    """So many instances as processes."""
    loads, lives = await scaling_instances.webhooks(site, count)
    loads |= await scaling_instances.restarts(site, count)
    return {"loads": {name: asdict(load) for name, load in loads.items()}, "lives": asdict(lives)}


def all_of(sizes: Sizes) -> dict[str, Part]:
    """All parts, in the order in which they are run. Those of one name but for a number are one for `--only`."""
    found: dict[str, Part] = {f"rows.{count}": _of(rows, count) for count in sizes.rows}
    found |= {f"homeservers.{count}": _of(homeservers, count) for count in sizes.homeservers}
    found["storage"] = storage
    return found | {f"instances.{count}": _of(instances, count) for count in sizes.instances.counts}


def _of(part: Callable[[Site, Sizes, int], Awaitable[Result]], count: int) -> Part:
    async def run(site: Site, sizes: Sizes) -> Result:
        return await part(site, sizes, count)

    run.__doc__ = part.__doc__
    return run


# ── the command ──


def arguments() -> argparse.ArgumentParser:
    """What can be chosen."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"only these parts: {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="small numbers")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where report.json and report.md go (default: {OUT}; with --quick: {OUT_QUICK})")
    parser.add_argument("--fill", type=Path, metavar="FILE", help="put the tables into this page")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="earlier", help="measure nothing, and take the tables from this report.json")
    return parser


class Course:
    """All parts, one after another."""

    def __init__(self, sizes: Sizes, out: Path, only: Sequence[str] | None = None, *, quick: bool = False) -> None:
        self.out = out.resolve()
        self._sizes = sizes
        self._parts = {name: part for name, part in all_of(sizes).items() if only is None or name.partition(".")[0] in only}
        self.report: dict[str, Any] = {
            "format": scaling_report.FORMAT,
            "machine": {},
            "options": {"quick": quick, "parts": " ".join(only or ["all"])},
            "parts": {},
            "failures": {},
        }

    async def run(self) -> None:
        """Run, and write the report after each part."""
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as place, Server(durable=True, settings=SETTINGS) as server:
            directory = Path(place)
            site = Site(server, Certificates(directory), directory, self._sizes.instances)
            self.report["machine"] = self._described(server)
            print(json.dumps(self.report["machine"], ensure_ascii=False), flush=True)
            for name, part in self._parts.items():
                await self._one(site, name, part)
                self.write()

    def _described(self, server: Server) -> dict[str, Any]:
        described = {"measured": machine.commit(REPOSITORY)} | machine.describe(server.directory, Cores(None, None))
        for name in ("pinned", "sqlite"):
            described.pop(name)
        ((version,),) = server.execute("SHOW server_version")
        storage_ = {f"{table}.{name}": f"{value:g}" for table, settings in STORAGE.items() for name, value in settings.items()}
        return described | {"postgresql": version, "settings": dict(SETTINGS), "storage": storage_}

    async def _one(self, site: Site, name: str, part: Part) -> None:
        began, others = perf_counter(), _Others(site.server)
        try:
            found = dict(await part(site, self._sizes))
        except (Failed, WireFailed, Died) as error:
            self.report["failures"][name] = without_paths(str(error).partition(";")[0])
            print(f"FAILED {name}: {error}", file=sys.stderr, flush=True)
            return
        took, disturbed = perf_counter() - began, others.read()
        found |= {"seconds": round(took, 1), "others": round(disturbed, 2)}
        self.report["parts"][name] = found
        print(f"{name}: {took:.0f} s{f', OTHERS USED {disturbed:.2f} CORES' if disturbed > machine.NOISY else ''}", flush=True)

    def write(self) -> None:
        """Write what there is so far."""
        (self.out / "report.json").write_text(json.dumps(self.report, indent=1, ensure_ascii=False) + "\n")
        (self.out / "report.md").write_text(scaling_report.markdown(self.report))


class _Others:
    """How many cores others use: neither this process, nor PostgreSQL, nor what they have started and ended."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._meter = Meter(None)
        self._ours = self._used()

    def _used(self) -> float:
        """Of PostgreSQL, and of children that have ended; the meter knows this process."""
        children = getrusage(RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime + cpu_of_server(self._server)

    def read(self) -> float:
        """Since this was made. All that was started has ended by now."""
        span = self._meter.read()
        return max(0.0, span.other_share - (self._used() - self._ours) / span.wall)


def main(given: Sequence[str] | None = None) -> int:
    """The command; its exit code is 1 where a part failed."""
    parser = arguments()
    options = parser.parse_args(given)
    if options.earlier is not None:
        report = json.loads(options.earlier.read_text())
        if report.get("format") != scaling_report.FORMAT:
            parser.error(f"--from: a report of format {scaling_report.FORMAT} is needed")
        return _fill(options.fill, report)
    course = Course(QUICK if options.quick else Sizes(), options.out or (OUT_QUICK if options.quick else OUT), options.only, quick=options.quick)
    interrupted = False
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(course))
    except (KeyboardInterrupt, asyncio.CancelledError):
        interrupted = True
        print("interrupted", file=sys.stderr)
    _fill(options.fill, course.report)
    print(f"\nwritten: {course.out / 'report.md'}, {course.out / 'report.json'}")
    return 130 if interrupted else 1 if course.report["failures"] else 0


def _fill(page: Path | None, report: Mapping[str, Any]) -> int:
    if page is None:
        print(scaling_report.markdown(report))
    else:
        page.write_text(scaling_report.filled(page.read_text(), report))
    return 0


async def _run(course: Course) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await course.run()


if __name__ == "__main__":
    sys.exit(main())
