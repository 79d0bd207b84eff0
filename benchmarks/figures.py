"""What is measured, what it should be, and what is made of the values of several runs. Pure.

The goals are those of a reference machine, on which a bare aiohttp handler took 40 µs for a request. On another machine all that is a matter of
speed is scaled by what the bare handler takes there, measured beside each run.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

REFERENCE_HANDLER = 40.0  # µs
STEADY_RATE = 220.0  # restarts a second, for which the goal of `steady` holds
_MICROSECONDS = {"µs": 1.0, "ms": 1e3}


class Speed(Enum):
    """What a faster machine does to a figure."""

    LESS = "less"
    MORE = "more"
    SAME = "same"


class Figure(NamedTuple):
    """One figure of a scenario."""

    title: str
    unit: str
    digits: int = 0
    speed: Speed = Speed.LESS

    def ratio(self, value: float, handler: float) -> float:
        """A value as a ratio to what the bare handler takes (µs), so that other machines can be compared; itself where speed changes nothing."""
        match self.speed:
            case Speed.LESS:
                return value * _MICROSECONDS.get(self.unit, 1.0) / handler
            case Speed.MORE:
                return value * handler
            case Speed.SAME:
                return value


class Goal(NamedTuple):
    """What a figure should be on the reference machine, at the most, in the figure's unit."""

    goal: float
    beyond: float
    scaled: bool = True


FIGURES: Mapping[str, Figure] = {
    "noise.cpu": Figure("webhook that concerns nobody: CPU", "µs", 1),
    "accept.cpu": Figure("delegation accepted: CPU up to the last answer", "µs", 1),
    "accept.cpu_after": Figure("… with five seconds of looks for people who never join", "µs", 1),
    "accept.per_second": Figure("delegations accepted a second", "1/s", 0, Speed.MORE),
    "accept.p50": Figure("delegation: request to answer, p50", "ms", 2),
    "accept.p99": Figure("… p99", "ms", 2),
    "join.cpu": Figure("joined, without restart: CPU up to the last answer", "µs", 1),
    "join.cpu_after": Figure("joined: CPU with what follows within 1 s", "µs", 1),
    "join.p50": Figure("joined: webhook to answer, p50", "ms", 2),
    "join.p99": Figure("… p99", "ms", 2),
    "many_rooms.p50": Figure("leave, 100 rooms at once: webhook sent to send arrived, p50", "ms", 2),
    "many_rooms.p99": Figure("… p99", "ms", 2),
    "many_rooms.max": Figure("… the longest", "ms", 2),
    "many_rooms.all": Figure("… all sent after", "s", 3),
    "many_rooms.cpu": Figure("… CPU for each leave", "µs", 1),
    "one_room.p50": Figure("leave, one room: webhook sent to send arrived, p50", "ms", 2),
    "one_room.p99": Figure("… p99", "ms", 2),
    "one_room.max": Figure("… the longest", "ms", 2),
    "one_room.all": Figure("… all sent after", "s", 3),
    "one_room.cpu": Figure("… CPU for each leave", "µs", 1),
    "steady.cpu_at_rate": Figure("steady: CPU of a core at 220 restarts/s", "%", 2),
    "steady.cpu_percent": Figure("steady: CPU of a core as measured", "%", 2),
    "steady.per_second": Figure("steady: restarts a second", "1/s", 1, Speed.SAME),
    "steady.cpu": Figure("steady: CPU for each restart", "µs", 1),
    "steady.expired": Figure("steady: events that ran out (must be 0)", "", 0, Speed.SAME),
    "steady.passed_p50": Figure("steady: part of the delay passed at a restart, p50", "", 3, Speed.SAME),
    "steady.passed_max": Figure("… the most", "", 3, Speed.SAME),
    "memory.slope": Figure("memory for each connected delegation", "B", 0, Speed.SAME),
    "memory.intercept": Figure("memory without any", "MiB", 1, Speed.SAME),
    "rows.idle.join": Figure("joined, {rows} other rows: CPU", "µs", 1),
    "rows.idle.leave": Figure("left, {rows} other rows: CPU", "µs", 1),
    "rows.active.join": Figure("joined, scattered over {rows} rows: CPU", "µs", 1),
    "rows.active.leave": Figure("left, scattered over {rows} rows: CPU", "µs", 1),
    "idle.rarest_looks": Figure("100,000 connected, looks at their rarest: CPU of a core", "%", 3),
    "idle.default_looks": Figure("100,000 connected, looks as by default: CPU of a core", "%", 3),
    "idle.looks": Figure("… of that, looks", "%", 3),
    "idle.look": Figure("CPU for each look at a room of ten", "µs", 1),
    "start.after": Figure("exec to the first answer of /health/live with {rows} rows", "s", 3),
    "start.cpu": Figure("… CPU, {rows} rows", "s", 3),
}
"""By name. Those of `rows` and `start` are followed by the number of rows, as in `start.after.1000`."""

GOALS: Mapping[str, Goal] = {
    "noise.cpu": Goal(60, 15),
    "accept.cpu": Goal(300, 150),
    "join.cpu": Goal(120, 75),
    "many_rooms.p50": Goal(6, 3),
    "many_rooms.p99": Goal(15, 6),
    "many_rooms.all": Goal(0.9, 0.35),
    "one_room.p50": Goal(0.8, 0.3),
    "one_room.p99": Goal(2, 0.6),
    "steady.cpu_at_rate": Goal(2.5, 0.9),
    "memory.slope": Goal(1000, 0, scaled=False),
}


def figure_of(name: str) -> Figure:
    """What a name stands for; with the number of rows in its title, where it has one."""
    if name in FIGURES:
        return FIGURES[name]
    kind, _, rows = name.rpartition(".")
    figure = FIGURES[kind]
    return figure._replace(title=figure.title.format(rows=f"{int(rows):,}"))


# ── several runs ──


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which `part` (0 to 1) of the values lie, by the nearest rank. Raises ValueError where there are none."""
    if not values:
        raise ValueError("there is no value")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(part * (len(ordered) - 1))))]


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept of the line through the points, by least squares."""
    fit = statistics.linear_regression([x for x, _ in points], [y for _, y in points])
    return fit.slope, fit.intercept


@dataclass(frozen=True, slots=True)
class Need:
    """What a figure could be at the least: the sum of the bare things that it needs, in the figure's unit."""

    of: str  # in words
    least: float


@dataclass(slots=True)
class Run:
    """One run of a scenario. `raw` is what the figures were made of, for the report's readers."""

    values: dict[str, float]
    limits: dict[str, float] = field(default_factory=dict)
    needs: dict[str, Need] = field(default_factory=dict)
    spans: dict[str, dict[str, float | bool]] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """A figure over all runs."""

    name: str
    values: tuple[float, ...]
    ratios: tuple[float, ...]  # to the bare handler of the same run
    handlers: float | None  # how many times the bare handler; None where that makes no sense
    need: Need | None
    needs: float | None  # how many times what it needs
    remarks: tuple[str, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)


def spread(values: Sequence[float]) -> float:
    """The largest less the smallest, as a part of the median."""
    middle = statistics.median(values)
    return 0.0 if middle == 0 else (max(values) - min(values)) / abs(middle)


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """All figures of a scenario, in the order of their definition."""
    names = dict.fromkeys(name for run in runs for name in run.values)
    return [_summary(name, [run for run in runs if name in run.values]) for name in names]


def _summary(name: str, runs: Sequence[Run]) -> Summary:
    figure = figure_of(name)
    values = [run.values[name] for run in runs]
    ratios = [figure.ratio(run.values[name], run.limits["handler"]) for run in runs]
    times = statistics.median(ratios) if figure.unit in _MICROSECONDS else None
    needed = [(value, run.needs[name]) for value, run in zip(values, runs, strict=True) if name in run.needs]
    need = Need(needed[0][1].of, statistics.median(least.least for _, least in needed)) if needed else None
    needs = statistics.median(value / least.least for value, least in needed) if needed and all(least.least for _, least in needed) else None
    return Summary(name, tuple(values), tuple(ratios), times, need, needs, remarks(runs))


def remarks(runs: Sequence[Run]) -> tuple[str, ...]:
    """What is to be said of figures from these runs: `driver_bound`, `noisy`, with how many of the runs they hold for."""
    found = []
    for mark in ("driver_bound", "noisy"):
        marked = sum(any(span.get(mark) for span in run.spans.values()) for run in runs)
        if marked:
            found.append(mark if len(runs) == 1 else f"{mark} in {marked} of {len(runs)} runs")
    return tuple(found)


# ── goals ──


@dataclass(frozen=True, slots=True)
class Verdict:
    """A figure against its goal, both scaled to this machine."""

    name: str
    value: float
    goal: float
    beyond: float
    words: str  # met, beyond, or missed by x %


def scale(runs: Sequence[Run]) -> float:
    """How much slower than the reference machine this one was, by the bare handler over 32 connections."""
    return statistics.median(run.limits["handler_wide"] for run in runs) / REFERENCE_HANDLER


def verdict(name: str, value: float, times: float) -> Verdict:
    """`times`: by which a goal is scaled, if it is."""
    goal, beyond, scaled = GOALS[name]
    factor = times if scaled else 1.0
    goal, beyond = goal * factor, beyond * factor
    if value <= beyond:
        words = "beyond"
    elif value <= goal:
        words = "met"
    else:
        words = f"missed by {(value / goal - 1) * 100:.0f} %"
    return Verdict(name, value, goal, beyond, words)


# ── an earlier report ──


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure now and then, as ratios to the bare handler, so that machines of another speed can be compared."""

    name: str
    now: float
    then: float
    change: float  # a part of what it was
    marked: bool  # is it more than the spread of either report's runs?


def difference(name: str, now: Sequence[float], then: Sequence[float]) -> Difference:
    """Of the ratios of two reports' runs. A single run has no spread, so that nothing is marked."""
    middle_now, middle_then = statistics.median(now), statistics.median(then)
    change = 0.0 if middle_now == middle_then else float("inf") if middle_then == 0 else middle_now / middle_then - 1
    several = len(now) > 1 and len(then) > 1
    return Difference(name, middle_now, middle_then, change, several and abs(change) > max(spread(now), spread(then)))
