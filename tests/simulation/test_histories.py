"""Short histories of every kind of trouble: nobody is dropped, and nobody is forgotten. `make soak` plays as many more as there is time for."""

import pytest

from tests.simulation.histories import PROFILES, make, play
from tests.simulation.shrinking import shrink

SEEDS = 200
SAMPLE = 20  # of them are played in each run
CHUNK = 20

CHUNKS = [pytest.param(first, marks=[] if first < SAMPLE else [pytest.mark.slow]) for first in range(0, SEEDS, CHUNK)]


@pytest.mark.parametrize("first", CHUNKS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_history_keeps_the_promises(profile: str, first: int) -> None:
    """No promise is broken; where one is, the smallest history that breaks it is shown as code for a regression test."""
    for seed in range(first, first + CHUNK):
        history = make(seed, profile)
        try:
            play(history)
        except Exception as error:
            pytest.fail(f"profile {profile}, seed {seed}: {type(error).__name__}: {error}\n\n{shrink(history).code()}", pytrace=False)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_history_happens_the_same_way_every_time(profile: str) -> None:
    """Without that, a failing seed would be of no use."""
    courses = []
    for _ in range(2):
        log: list[tuple[float, str]] = []
        judge = play(make(7, profile), log=log)
        courses.append((log, judge.outcomes, judge.excused))
    assert courses[0] == courses[1]
    assert courses[0][0]


def test_the_histories_are_about_something() -> None:
    """Goodbyes by the daemon, by clients and by the homeserver's timer, and allowed exceptions, all happen."""
    outcomes: dict[str, int] = {}
    for profile in PROFILES:
        for seed in range(5):
            for outcome, count in play(make(seed, profile)).outcomes.items():
                outcomes[outcome] = outcomes.get(outcome, 0) + count
    assert {"sent by the daemon", "sent", "cancelled by the daemon", "ran_out"} <= outcomes.keys()
    assert outcomes["sent by the daemon"] > sum(outcomes.values()) / 2
