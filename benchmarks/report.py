"""What comes out: one JSON file with every value of every run, and the tables for people that are made of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.figures import (
    FIGURES,
    GOALS,
    REFERENCE_HANDLER,
    Difference,
    Need,
    Run,
    Speed,
    Summary,
    Verdict,
    difference,
    figure_of,
    scale,
    summaries,
    verdict,
)

FORMAT = 1
NOTES = (
    "The models of the homeserver and the SFU, and the load, are in one process beside the daemon's. All is on loopback.",
    "CPU is what all threads of the daemon used, user and system. It is counted up to the effect: the last request that arrived at the homeserver.",
    "In `noise`, `join`, `many_rooms`, `one_room` and `rows` departures are believed at once, without the look at the SFU that they have by default. "
    "Otherwise the configuration is the default, but for delays from 5 s and private addresses.",
    "In `rows` no routine looks at the SFU are made while webhooks are counted, and the webhooks of all rooms come over 32 connections; in `rows`, "
    "`idle` and `start` the homeserver is known not to limit the daemon.",
    "In `idle` with looks as by default, something has changed in every call of ten lately, so that each is looked at once a minute; where nothing "
    "changes for twenty minutes, that is done every three minutes.",
    "Beside each run, on the same core and right after it: a bare aiohttp handler on uvloop that answers the same requests, a bare request by the "
    "daemon's HTTP client, and a bare durable commit of one changed row with the daemon's settings.",
    f"Goals are those of a machine on which the bare handler takes {REFERENCE_HANDLER:g} µs for a request, over 32 connections, times what it takes "
    "here; memory is not scaled. *goal*: what it should be; *beyond*: what would be better than anything there is; *verdict*: beyond, met, or "
    "missed by so much.",
    "*× bare handler* is the multiple of a bare handler that has the scenario's own connections; *× what it needs* that of the sum of the bare "
    "things that are named.",
)
SMALL = "**Small numbers (`--quick`): this tries the benchmarks. The figures and verdicts mean nothing.**"


def document(
    machine: Mapping[str, Any], options: Mapping[str, Any], runs: Mapping[str, Sequence[Run]], failures: Mapping[str, str]
) -> dict[str, Any]:
    """The report as JSON has it."""
    return {
        "format": FORMAT,
        "machine": dict(machine),
        "options": dict(options),
        "scenarios": {name: [asdict(run) for run in of] for name, of in runs.items()},
        "failures": dict(failures),
    }


def runs_of(report: Mapping[str, Any]) -> dict[str, list[Run]]:
    """The inverse. Raises ValueError for a report of another format."""
    if report.get("format") != FORMAT:
        raise ValueError(f"a report of format {FORMAT} is needed")
    return {name: [_run(run) for run in of] for name, of in report["scenarios"].items()}


def _run(run: Mapping[str, Any]) -> Run:
    needs = {name: Need(**need) for name, need in run["needs"].items()}
    return Run(run["values"], run["limits"], needs, run["spans"], run["raw"])


# ── what is made of it ──


def all_summaries(runs: Mapping[str, Sequence[Run]]) -> list[Summary]:
    """All figures, in the order of their definition."""
    order = {name: place for place, name in enumerate(FIGURES)}
    found = [summary for of in runs.values() if of for summary in summaries(of)]
    return sorted(found, key=lambda summary: _place(summary.name, order))


def _place(name: str, order: Mapping[str, int]) -> tuple[int, int]:
    if name in order:
        return order[name], 0
    kind, _, rows = name.rpartition(".")
    return order[kind], int(rows)


def verdicts(runs: Mapping[str, Sequence[Run]]) -> list[Verdict]:
    """All goals whose figure was measured."""
    found = []
    for of in runs.values():
        if of:
            found += [verdict(summary.name, summary.median, scale(of)) for summary in summaries(of) if summary.name in GOALS]
    return sorted(found, key=lambda judged: list(GOALS).index(judged.name))


def differences(now: Mapping[str, Sequence[Run]], then: Mapping[str, Sequence[Run]]) -> list[Difference]:
    """All figures that both reports have."""
    before = {summary.name: summary for summary in all_summaries(then)}
    return [difference(summary.name, summary.ratios, before[summary.name].ratios) for summary in all_summaries(now) if summary.name in before]


# ── for people ──


def without_paths(text: str) -> str:
    """A text as a report may have it: a path may hold the name of a user."""
    return re.sub(r"(?<![\w/:.])/[\w.~-]+(?:/[^\s'\",;:)]*)?", "…", text)


def number(value: float, digits: int) -> str:
    """A number with so many digits behind the point, or more where it would be none."""
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.2g}"
    return f"{value:,.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers, mostly."""
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join('---' if place == 0 else '---:' for place, _ in enumerate(head))}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def goals_table(found: Sequence[Verdict]) -> str:
    """Goals and what became of them."""
    rows = []
    for judged in found:
        figure = figure_of(judged.name)
        value, goal, beyond = (number(number_, max(figure.digits, 1)) for number_ in (judged.value, judged.goal, judged.beyond))
        rows.append((f"{judged.name}: {figure.title}", f"{value} {figure.unit}", goal, beyond, judged.words))
    return table(("figure", "median", "goal here", "beyond", "verdict"), rows)


def figures_table(found: Sequence[Summary]) -> str:
    """All figures with their spread, and as multiples of what is bare."""
    rows = []
    for summary in found:
        figure = figure_of(summary.name)
        rows.append(
            (
                f"{summary.name}: {figure.title}",
                f"{number(summary.median, figure.digits)} {figure.unit}".rstrip(),
                f"{number(min(summary.values), figure.digits)}–{number(max(summary.values), figure.digits)}",
                "" if summary.handlers is None else f"{summary.handlers:.2f}",
                "" if summary.needs is None or summary.need is None else f"{summary.needs:.2f} × ({summary.need.of})",
                ", ".join(summary.remarks),
            )
        )
    return table(("figure", "median", "min–max", "× bare handler", "× what it needs", "remarks"), rows)


def limits_table(runs: Mapping[str, Sequence[Run]]) -> str:
    """What was measured beside each scenario: medians over its runs."""
    names = ("handler", "handler_wide", "request", "commit", "commit_wall", "commit_wall_p99")
    rows = []
    for name, of in runs.items():
        if of:
            middle = [number(sorted(run.limits[limit] for run in of)[len(of) // 2], 1) for limit in names]
            rows.append((name, *middle, f"{scale(of):.2f}"))
    head = ("beside", "handler CPU µs", "… over 32 connections", "request CPU µs", "commit CPU µs", "commit wall µs, p50", "… p99", "goals ×")
    return table(head, rows)


def differences_table(found: Sequence[Difference]) -> str:
    """Now and then."""
    rows = []
    for one in found:
        more_is_worse = figure_of(one.name).speed is not Speed.MORE
        mark = "" if not one.marked else "worse" if (one.change > 0) is more_is_worse else "better"
        rows.append((one.name, f"{one.now:.4g}", f"{one.then:.4g}", f"{one.change * 100:+.1f} %", mark))
    return table(("figure, as a ratio to the bare handler", "now", "then", "change", "beyond the spread of both"), rows)


def machine_table(machine: Mapping[str, Any]) -> str:
    """The machine."""
    rows = []
    for name, value in machine.items():
        text = ", ".join(f"{key} {version}" for key, version in value.items()) if isinstance(value, Mapping) else str(value)
        rows.append((name.replace("_", " "), text))
    return table(("machine", ""), rows)


def markdown(report: Mapping[str, Any], plots: Sequence[tuple[str, str]], then: Mapping[str, Any] | None = None) -> str:
    """The report for people. `plots` are (title, file), beside it; none: matplotlib was not there."""
    runs = runs_of(report)
    options = ", ".join(f"{name} {value}" for name, value in report["options"].items())
    notes = "\n".join(f"- {note}" for note in (*NOTES, *_conditions(report["machine"])))
    quick = [SMALL] if report["options"].get("quick") else []
    parts = ["# Benchmarks of the whole daemon", *quick, notes, f"Options: {options}.", machine_table(report["machine"])]
    if report["failures"]:
        failed = "\n".join(f"- **{name}**: {why}" for name, why in report["failures"].items())
        parts += ["## What failed", failed]
    parts += ["## Goals", goals_table(verdicts(runs)), "## Figures", figures_table(all_summaries(runs))]
    if any(runs.get("idle", ())):
        parts += ["## What went on while idle", idle_table(runs["idle"])]
    parts += ["## What was measured beside them", limits_table(runs)]
    if then is not None:
        parts += ["## Compared with the earlier report", earlier(report, then), differences_table(differences(runs, runs_of(then)))]
    parts += ["## Plots", "\n\n".join(f"![{title}]({file})" for title, file in plots) if plots else NO_PLOTS]
    return "\n\n".join(parts) + "\n"


def earlier(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    """What is to be known of the earlier report."""
    machine = then["machine"]
    told = [f"Of version {machine.get('measured') or 'unknown'}, on {machine.get('cpu', 'an unknown machine')}."]
    if bool(now["options"].get("quick")) is not bool(then["options"].get("quick")):
        told.append("One of them is of small numbers (`--quick`), so they cannot be compared.")
    if min(report["options"].get("runs", 1) for report in (now, then)) < 2:
        told.append("One run has no spread, so nothing is marked.")
    return " ".join(told)


def _conditions(machine: Mapping[str, Any]) -> list[str]:
    """What is to be known of this machine before anything else."""
    told = ["The daemon has a core of its own, and the rest another one." if machine["pinned"] else "There is one core for all: nothing is pinned."]
    if machine["file_system"] in ("tmpfs", "ramfs"):
        told.append("Databases are in memory: durable commits cost next to nothing here.")
    return told


NO_PLOTS = "There are none: matplotlib is not installed. It comes with the extra `bench`."


def idle_table(of: Sequence[Run]) -> str:
    """Which calls there were while nothing happened."""
    rows = []
    for name in ("rarest_looks", "default_looks"):
        for run in of:
            told = run.raw[name]
            rows.append((name, *(f"{told[key]:g}" for key in ("seconds", "sfu_calls", "restarts", "commits"))))
    return table(("run", "seconds", "SFU calls", "restarts", "commits"), rows)


def line(name: str, run: Run) -> str:
    """One run, as it is told while the others go on."""
    told = [f"{figure.removeprefix(f'{name}.')} {number(value, figure_of(figure).digits)}" for figure, value in run.values.items()]
    marks = sorted({mark for span in run.spans.values() for mark in ("driver_bound", "noisy") if span.get(mark)})
    limits = f"bare: handler {run.limits['handler']:.1f}, request {run.limits['request']:.1f}, commit {run.limits['commit']:.1f} µs"
    return f"{name}: {', '.join(told)} ({limits}){''.join(f' {mark.upper()}' for mark in marks)}"
