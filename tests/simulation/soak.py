"""Plays histories for as long as asked, and shows the smallest form of what fails.

python -m tests.simulation.soak --minutes 10 --seed 1000 --jobs 2
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import NamedTuple

from tests.simulation.histories import PROFILES, make, play
from tests.simulation.shrinking import shrink
from tests.simulation.watching import Violation
from tests.simulation.world import START

CHUNK = 50  # histories of one profile that a process plays before it reports
REPORT_EVERY = 30.0  # seconds


class Failure(NamedTuple):
    """What went wrong, and how it can be seen again."""

    profile: str
    seed: int
    text: str


class Played(NamedTuple):
    """A chunk of histories."""

    histories: int
    excused: Counter[str]
    outcomes: Counter[str]
    failures: list[Failure]


def play_chunk(profile: str, first: int, until: float) -> Played:
    """Play CHUNK histories of a profile, from one seed on; fewer, when the time (Unix seconds) is over."""
    excused: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    failures = []
    played = 0
    for seed in range(first, first + CHUNK):
        if time.time() > until:
            break
        played += 1
        try:
            judge = play(make(seed, profile))
        except Violation as violation:
            failures.append(Failure(profile, seed, str(violation)))
        except Exception:
            failures.append(Failure(profile, seed, traceback.format_exc(limit=-4)))
        else:
            excused.update(judge.excused)
            outcomes.update(judge.outcomes)
    return Played(played, excused, outcomes, failures)


def show(failure: Failure, *, small: bool) -> None:
    """Print a failure: how to play it again, and its smallest form as code."""
    print(f"\nFAILED: profile {failure.profile!r}, seed {failure.seed}: {failure.text}", flush=True)
    if not small:
        return
    history = shrink(make(failure.seed, failure.profile))
    log: list[tuple[float, str]] = []
    try:
        play(history, log=log)
    except Exception as error:
        log.append((history.quiet_at, f"{type(error).__name__}: {error}"))
    print("\nthe smallest history that fails like it, for test_regressions.py:\n")
    print(history.code())
    print("\nwhat happens in it:\n")
    for at, text in log[-60:]:
        print(f"{at:10.3f}  {text}")
    print(f"{START:.0f} is second 0", flush=True)


def soak(minutes: float, seed: int, jobs: int, profiles: Sequence[str], most_failures: int) -> int:
    """Play until the time is over, or until so many histories have failed. Returns the number of failures."""
    began = time.time()
    until = began + minutes * 60
    total: Counter[str] = Counter()
    excused: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    failures: list[Failure] = []
    reported = began
    turn = 0
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        running: set[Future[Played]] = set()
        while running or (time.time() < until and len(failures) < most_failures):
            while len(running) < jobs and time.time() < until and len(failures) < most_failures:
                profile = profiles[turn % len(profiles)]
                running.add(pool.submit(play_chunk, profile, seed + turn // len(profiles) * CHUNK, until))
                turn += 1
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for played in (future.result() for future in done):
                total["histories"] += played.histories
                excused.update(played.excused)
                outcomes.update(played.outcomes)
                for failure in played.failures:
                    failures.append(failure)
                    show(failure, small=len(failures) <= most_failures)
            if time.time() - reported >= REPORT_EVERY:
                reported = time.time()
                print(f"{reported - began:6.0f} s  {total['histories']} histories, {len(failures)} failed", flush=True)
    took = max(time.time() - began, 0.001)
    print(f"\n{total['histories']} histories in {took:.0f} s ({total['histories'] / took:.0f} a second), {len(failures)} failed")
    print("how delayed events ended: " + ", ".join(f"{what} {n}" for what, n in outcomes.most_common()))
    print("allowed exceptions: " + (", ".join(f"{what} ({n})" for what, n in excused.most_common()) or "none"))
    return len(failures)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the first seed; the time by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--profile", choices=[*PROFILES], action="append", help="only this kind of trouble; can be repeated")
    parser.add_argument("--failures", type=int, default=1, help="go on until so many histories have failed")
    given = parser.parse_args()
    print(f"first seed: {given.seed}", flush=True)
    return 1 if soak(given.minutes, given.seed, given.jobs, given.profile or [*PROFILES], given.failures) else 0


if __name__ == "__main__":
    sys.exit(main())
