"""What becomes of calls under a homeserver's rate limit: the hard cases of the tests with many more seeds and moments, on a virtual clock.

    python -m benchmarks.rate_limit               some minutes
    python -m benchmarks.rate_limit --seeds 5     quick

The homeserver is the sandbox's with Synapse's default: a leaky bucket of 1 action a second and a burst of 5, refusals held back for half a second.
The moment of the departures is swept over two periods of a restart; over one where 60 take exactly what the limit allows. Everything but the run time
is deterministic by the seeds.

`dropped` must be 0: connected participants whose event ended. `used` is the part of the permitted actions that were made use of, from the departures
to the last send. Where not all goodbyes fit in, some of the events of those who left fire by themselves (`fired`).
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from time import process_time
from typing import NamedTuple

from sfu_delegate.delegation.urgency import Limit
from sfu_delegate.sandbox.homeserver import RateLimit
from tests.simulation.rates import HOUR, SYNAPSE, Call, Case, Result, play

SWEPT = 130.0  # seconds after the last join in which the departures lie
ONE_PERIOD = 48.0  # the same, where what everybody needs is exactly what is allowed: a burst holds that for one period of a restart
LIMITS = (SYNAPSE, RateLimit(1.0, 1.0), RateLimit(0.25, 3.0), RateLimit(5.0, 10.0), RateLimit(0.5, 20.0))
FIVE_HUNDRED = 20  # seeds of the small cases for one of these


class Line(NamedTuple):
    """One line of the table: all histories of one case."""

    case: str
    histories: int
    dropped: int  # in all of them
    fired: float  # the median
    last: float  # seconds from the departures to the last send: the median …
    last_most: float  # … and the worst
    ratio: float  # refusals for each success, from the departures on
    ratio_most: float
    used: float
    used_least: float
    forecast_most: float  # seconds


class Swept(NamedTuple):
    """A case, and how often and over which time its moment is swept."""

    name: str
    case: Case
    seeds: int
    until: float = SWEPT


def cases(seeds: int) -> Iterator[Swept]:
    """All cases, most with so many seeds."""
    for within, joined in ((1.0, "in 1 s"), (60.0, "in 60 s")):
        for known in (True, False):
            how = f"joined {joined}, limit {'known' if known else 'unknown'}"
            for restart in (None, 5.0, 40.0):
                started = "" if restart is None else f", restart {restart:.0f} s before"
                yield Swept(f"30 + 30, {how}{started}", Case(30, 60.0, 30, HOUR, within, 0.0, known, restart), seeds)
            yield Swept(f"60 / 30, {how}", Case(30, 60.0, 30, 60.0, within, 0.0, known, watch=190.0), seeds, ONE_PERIOD)
            yield Swept(f"58 / 28, {how}", Case(30, 60.0, 28, 60.0, within, 0.0, known, watch=190.0), seeds)
    for known in (True, False):
        name = f"500 / 500, joined in 1 s, limit {'known' if known else 'unknown'}"
        yield Swept(name, Case(500, HOUR, 500, HOUR, 1.0, 0.0, known, watch=520.0), max(1, seeds // FIVE_HUNDRED))


def measure(swept: Swept) -> Line:
    """All histories of one case."""
    results: list[Result] = []
    for seed in range(swept.seeds):
        moment = (seed + Random(seed).random()) * swept.until / swept.seeds
        results.append(play(replace(swept.case, leave_at=moment), seed))
    last, ratio, used = ([getattr(result, what) for result in results] for what in ("last", "ratio", "used"))
    return Line(
        swept.name,
        swept.seeds,
        sum(result.dropped for result in results),
        statistics.median(result.fired for result in results),
        statistics.median(last),
        max(last),
        statistics.median(ratio),
        max(ratio),
        statistics.median(used),
        min(used),
        max(result.forecast for result in results),
    )


# ── what is learned, and how soon ──


def crowd(call: Call, stay: int) -> None:
    """Always something to do: 300 who leave, and some with short delays who stay."""
    for i in range(stay):
        call.join(10.0 * i / stay, 60.0, f"s{i}")
    for i in range(300):
        call.join(10.0 * i / 300, 24 * HOUR, f"g{i}")
        call.leave(40.0, f"g{i}")


def first_contact(limit: RateLimit, seed: int) -> float:
    """Refusals until an unknown limit is known: those of the requests that were on their way together."""
    call = Call(seed, limit=limit)
    for i in range(200):
        call.join(i / 200, HOUR, f"p{i}")
    call.run_until(60.0)
    first = next(request.at for request in call.requests if request.status == 429)
    call.close()
    return call.refusals(end=first + 2.0)


def lifted(seed: int) -> float:
    """Seconds until it is noticed that there is no limit any more."""
    call = Call(seed, known=True)
    crowd(call, 20)
    at = 100.0 + Random(seed).random() * 10
    call.at(at, lambda: setattr(call.homeserver, "limit", None))
    end = at
    while call.limit_known()[0] is not Limit.NONE and end < at + 120:
        end += 0.5
        call.run_until(end)
    call.close()
    return end - at


def tightened(seed: int) -> float:
    """Refusals in the 30 seconds after the limit was halved."""
    call = Call(seed, known=True)
    crowd(call, 8)
    at = 100.0 + Random(seed).random() * 10
    call.at(at, lambda: setattr(call.homeserver, "limit", RateLimit(0.5, 3.0)))
    call.run_until(at + 30)
    call.close()
    return call.refusals(at, at + 30)


def exempted(seed: int) -> float:
    """Seconds until all that waits is done, after an application service was configured."""
    call = Call(seed, known=True)
    crowd(call, 20)
    at = 100.0 + Random(seed).random() * 10
    call.at(at, lambda: call.reconfigure(exempt=True))
    end = at
    while (end == at or call.ends().pending) and end < at + 120:
        end += 0.5
        call.run_until(end)
    call.close()
    return end - at


def learning() -> Iterator[tuple[str, Callable[[int], float]]]:
    """What is measured about learning, each by its seed."""
    for limit in LIMITS:
        name = f"first contact with {limit.per_second:g}/s, burst {limit.burst:g}: refusals"
        yield name, lambda seed, limit=limit: first_contact(limit, seed)  # type: ignore[misc]
    yield "limit lifted: noticed after, s", lifted
    yield "limit halved: refusals in 30 s", tightened
    yield "exempted: all done after, s", exempted


def show(line: Line) -> str:
    """A line of the table for people."""
    return (
        f"{line.case:<60} {line.histories:>5} {line.dropped:>7} {line.fired:>5.0f} {line.last:>7.1f} {line.last_most:>6.1f} "
        f"{line.ratio:>7.2f} {line.ratio_most:>6.2f} {line.used:>7.0%} {line.used_least:>6.0%} {line.forecast_most:>8.1f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=60, help="histories of each case; a twentieth of that for those of a thousand people")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    options = parser.parse_args(arguments)
    begun = process_time()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    head = f"{'case':<60} {'runs':>5} {'dropped':>7} {'fired':>5} {'last, s':>7} {'worst':>6}"
    print(f"{head} {'refused':>7} {'worst':>6} {'used':>7} {'worst':>6} {'forecast':>8}")
    lines = []
    for swept in cases(options.seeds):
        lines.append(measure(swept))
        print(show(lines[-1]), flush=True)
    print(f"\n{'':<60} {'runs':>5} {'median':>7} {'worst':>6}")
    learned = {}
    few = max(3, options.seeds // 6)
    for name, once in learning():
        values = learned[name] = [once(seed) for seed in range(few)]
        print(f"{name:<60} {few:>5} {statistics.median(values):>7.1f} {max(values):>6.1f}", flush=True)
    print(f"\n{process_time() - begun:.0f} s on one core")
    if options.json:
        Path(options.json).write_text(json.dumps({"departures": [line._asdict() for line in lines], "learning": learned}, indent=2))


if __name__ == "__main__":
    main()
