"""`python -m benchmarks`: what the whole daemon costs, against its goals and against the least that its parts cost.

    python -m benchmarks                          everything three times: about an hour
    python -m benchmarks --only noise join        these
    python -m benchmarks --quick                  small numbers, under a minute: to try the benchmarks themselves

The report is written after every run of a scenario, so that what was measured is kept when it is interrupted.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import localtime, strftime
from typing import Any

import uvloop
from sfu_delegate.demo.processes import Died
from tests.integration.certificates import Certificates

from benchmarks import machine, report
from benchmarks.figures import Run
from benchmarks.plots import PLOTS, draw
from benchmarks.process import REPOSITORY
from benchmarks.scenarios import LONG, QUICK, Bench, Scenario, Sizes, all_of
from benchmarks.wire import WireFailed
from benchmarks.world import Failed

OUT = Path("build/benchmarks")
OUT_QUICK = Path("build/benchmarks-quick")
WRITTEN = ("report.json", "report.md", *PLOTS)
NAMES = tuple(dict.fromkeys(name.partition(".")[0] for name in all_of(Sizes())))


def arguments() -> argparse.ArgumentParser:
    """What can be chosen."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"only these scenarios: {', '.join(NAMES)}")
    parser.add_argument("--runs", type=int, help="how often each is run (default: 3; with --quick: 1)")
    parser.add_argument("--quick", action="store_true", help=f"small numbers; without {', '.join(LONG)} unless --only names them")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"where report.json, report.md and the plots go (default: {OUT}; with --quick: {OUT_QUICK})"
    )
    parser.add_argument("--database", type=Path, metavar="DIR", help="where databases lie: on the disk that is measured (default: as --out)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier report.json")
    return parser


def chosen(options: argparse.Namespace, sizes: Sizes) -> dict[str, Scenario]:
    """The scenarios to run, by name."""
    names = options.only or [name for name in NAMES if not (options.quick and name in LONG)]
    return {name: scenario for name, scenario in all_of(sizes).items() if name.partition(".")[0] in names}


class Course:
    """All runs of all scenarios, round by round, so that the runs of one are spread over the whole time."""

    def __init__(self, options: argparse.Namespace, then: Mapping[str, Any] | None) -> None:
        sizes = QUICK if options.quick else Sizes()
        self._out: Path = (options.out or (OUT_QUICK if options.quick else OUT)).resolve()
        self._database: Path = (options.database or self._out).resolve()
        self._rounds: int = options.runs or (1 if options.quick else 3)
        self._then = then
        self._sizes = sizes
        self._scenarios = chosen(options, sizes)
        self._options = {"runs": self._rounds, "quick": options.quick, "scenarios": " ".join(options.only or ["all"])}
        self.runs: dict[str, list[Run]] = {name: [] for name in self._scenarios}
        self.failures: dict[str, str] = {}
        self._machine: dict[str, Any] = {}

    def prepare(self) -> None:
        """Make the directories, and put what an earlier run has written into one of its own. Raises OSError."""
        for directory in (self._out, self._database):
            directory.mkdir(parents=True, exist_ok=True)
        earlier = self._out / "report.json"
        if earlier.exists():
            kept = self._out / f"earlier-{strftime('%Y%m%d-%H%M%S', localtime(earlier.stat().st_mtime))}"
            kept.mkdir(exist_ok=True)
            for name in WRITTEN:
                if (self._out / name).exists():
                    (self._out / name).replace(kept / name)
            print(f"the earlier report is in {kept}")

    async def run(self) -> None:
        """Run, and write the report."""
        cores = machine.cores()
        self._machine = {"measured": machine.commit(REPOSITORY)} | machine.describe(self._database, cores)
        machine.pin(cores.driver)
        with tempfile.TemporaryDirectory(dir=self._out) as place, tempfile.TemporaryDirectory(dir=self._database) as database:
            bench = Bench(self._sizes, cores, Path(place), Path(database), Certificates(Path(place)))
            for turn in range(self._rounds):
                for name, scenario in self._scenarios.items():
                    await self._one(bench, name, scenario, turn)
                    self.write()

    async def _one(self, bench: Bench, name: str, scenario: Scenario, turn: int) -> None:
        try:
            run = await scenario(bench)
        except (Failed, WireFailed) as error:
            self._fail(name, str(error), str(error))
        except Died as error:
            self._fail(name, str(error).partition(";")[0], str(error))  # the rest is a log, which has paths
        else:
            self.runs[name].append(run)
            print(f"{turn + 1}/{self._rounds} {report.line(name, run)}", flush=True)

    def _fail(self, name: str, told: str, shown: str) -> None:
        self.failures[name] = report.without_paths(told)
        print(f"FAILED {name}: {shown}", file=sys.stderr, flush=True)

    def write(self) -> dict[str, Any]:
        """Write what there is so far."""
        document = report.document(self._machine, self._options, self.runs, self.failures)
        (self._out / "report.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        plots = draw(self.runs, self._out)
        (self._out / "report.md").write_text(report.markdown(document, plots, self._then))
        return document

    def tell(self) -> None:
        """The tables, for the terminal."""
        print(f"\n{report.goals_table(report.verdicts(self.runs))}\n\n{report.figures_table(report.all_summaries(self.runs))}")
        if self._then is not None:
            print(f"\n{report.differences_table(report.differences(self.runs, report.runs_of(self._then)))}")
        print(f"\nwritten: {self._out / 'report.md'}, {self._out / 'report.json'}")


async def _run(course: Course) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await course.run()


def earlier_report(path: Path) -> dict[str, Any]:
    """An earlier report.json, read before anything takes an hour. Raises ValueError with a sentence."""
    try:
        then: dict[str, Any] = json.loads(path.read_text())
        report.runs_of(then)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no report.json of format {report.FORMAT}") from None
    return then


def main(given: Sequence[str] | None = None) -> int:
    """The command; its exit code is 1 where a scenario failed."""
    parser = arguments()
    options = parser.parse_args(given)
    if options.runs is not None and options.runs < 1:
        parser.error("--runs: at least 1")
    try:
        then = None if options.compare is None else earlier_report(options.compare)
    except ValueError as error:
        parser.error(f"--compare: {error}")
    course = Course(options, then)
    try:
        course.prepare()
    except OSError as error:
        parser.error(f"nothing can be written to {error.filename}: {error.strerror}")
    interrupted = False
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(course))
    except (KeyboardInterrupt, asyncio.CancelledError):
        interrupted = True
        print("interrupted", file=sys.stderr)
    if any(course.runs.values()):
        course.tell()
    return 130 if interrupted else 1 if course.failures else 0


if __name__ == "__main__":
    sys.exit(main())
