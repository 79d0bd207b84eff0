"""The report's pictures, by matplotlib where it is installed."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import REFERENCE_HANDLER, Run, figure_of, scale, summaries
from benchmarks.report import number, verdicts

PLOTS = ("goals.svg", "storms.svg", "rows.svg", "memory.svg")
WIDTH = 9.0  # inches
STYLE = {"svg.hashsalt": "sfu-delegate", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True}


def draw(runs: Mapping[str, Sequence[Run]], directory: Path) -> list[tuple[str, str]]:
    """Draw all that there are figures for; (title, file name) of each. None without matplotlib."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        return []
    matplotlib.use("svg")
    matplotlib.rcParams.update(STYLE)
    pyplot = importlib.import_module("matplotlib.pyplot")
    drawn = []
    titles = ("Figures, goals and limits", "Leave storms: webhook sent to send arrived", "Cost by number of rows", "Memory by connected delegations")
    for file, title, plot in zip(PLOTS, titles, (_goals, _storms, _rows, _memory), strict=True):
        figure = plot(pyplot, runs)
        if figure is not None:
            figure.savefig(directory / file, metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
            drawn.append((title, file))
    return drawn


def _goals(pyplot: Any, runs: Mapping[str, Sequence[Run]]) -> Any:
    """Bars as parts of the goal, so that all have one axis."""
    found = verdicts(runs)
    if not found:
        return None
    needs = {summary.name: summary.need for of in runs.values() if of for summary in summaries(of)}
    handlers = {summary.name: scale(of) * REFERENCE_HANDLER for of in runs.values() if of for summary in summaries(of)}
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.5 * len(found) + 1.5))
    places = range(len(found))
    axes.barh(places, [one.value / one.goal for one in found], color=["#4878a8" if one.value <= one.goal else "#c0504d" for one in found], height=0.5)
    axes.axvline(1.0, color="black", linewidth=1.2, label="goal, scaled to this machine")
    for place, one in zip(places, found, strict=True):
        need = needs[one.name]
        if one.beyond:
            axes.plot([one.beyond / one.goal] * 2, [place - 0.35, place + 0.35], color="#3c8d40", linewidth=2, label="beyond" if place == 0 else None)
        if need is not None:
            axes.plot([need.least / one.goal], [place], "D", color="black", markersize=5, label="what it needs, bare" if place == 0 else None)
        elif figure_of(one.name).unit == "µs":
            axes.plot([handlers[one.name] / one.goal], [place], "|", color="black", markersize=12, label="bare handler" if place == 0 else None)
        unit = figure_of(one.name).unit
        axes.annotate(f" {number(one.value, 1 if one.value < 1000 else 0)} {unit}", (one.value / one.goal, place), va="center")
    axes.set_yticks(places, [one.name for one in found])
    axes.invert_yaxis()
    axes.set_xlabel("part of the goal")
    axes.margins(x=0.12)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _storms(pyplot: Any, runs: Mapping[str, Sequence[Run]]) -> Any:
    """How many leaves were sent within which time: one line for each run."""
    storms = [(name, runs[name]) for name in ("many_rooms", "one_room") if runs.get(name)]
    if not storms:
        return None
    figure, places = pyplot.subplots(1, len(storms), figsize=(WIDTH, 3.5), squeeze=False)
    for axes, (name, of) in zip(places[0], storms, strict=True):
        for turn, run in enumerate(of):
            times = sorted(run.raw["webhook_to_send_ms"])
            axes.plot(times, [(place + 1) / len(times) for place in range(len(times))], label=f"run {turn + 1}")
        axes.axvline(of[0].limits["commit_wall"] / 1e3, color="black", linestyle=":", label="a bare commit")
        axes.set_title(f"{name}: {of[0].raw['leaves']:,} leaves, {of[0].raw['rooms']} room{'' if of[0].raw['rooms'] == 1 else 's'}")
        axes.set_xlabel("ms from the webhook to the send")
        axes.set_ylabel("part of the leaves")
        axes.legend()
    return figure


def _rows(pyplot: Any, runs: Mapping[str, Sequence[Run]]) -> Any:
    """CPU for each webhook."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, of in runs.items():
        for summary in summaries(of) if name.startswith("rows.") and of else ():
            kind, _, count = summary.name.rpartition(".")
            lines.setdefault(kind, []).append((int(count), summary.median))
    if not lines:
        return None
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.5))
    for kind, points in lines.items():
        points.sort()
        axes.plot([count for count, _ in points], [value for _, value in points], "o-", label=kind.removeprefix("rows."))
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows in the database")
    axes.set_ylabel("CPU µs for each webhook")
    axes.legend()
    return figure


def _memory(pyplot: Any, runs: Mapping[str, Sequence[Run]]) -> Any:
    """RSS at each point, and the line through them."""
    of = runs.get("memory")
    if not of:
        return None
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.5))
    for turn, run in enumerate(of):
        points = run.raw["delegations_and_bytes"]
        each, none = run.values["memory.slope"], run.values["memory.intercept"]
        (dots,) = axes.plot([count for count, _ in points], [value / 2**20 for _, value in points], "o", label=f"run {turn + 1}: {each:.0f} B each")
        ends = [0, points[-1][0]]
        axes.plot(ends, [none + each * count / 2**20 for count in ends], color=dots.get_color(), linewidth=0.8)
    axes.set_ylim(0, 1.15 * max(value for run in of for _, value in run.raw["delegations_and_bytes"]) / 2**20)
    axes.set_xlabel("connected delegations")
    axes.set_ylabel("RSS in MiB")
    axes.legend(loc="lower right")
    return figure
