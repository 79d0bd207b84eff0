"""Questions beside the engine: they leave the database alone for a part of the time."""

import pytest
from sfu_delegate.daemon.inspecting import REST_MOST, Rests


def test_between_two_questions_the_database_is_left_alone() -> None:
    """For as long as the one before took, though not for long: only then can SQLite's log begin anew."""
    now, asked = 0.0, []

    def clock() -> float:
        return now

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    rests = Rests(clock, sleep)

    def ask(seconds: float) -> None:
        def question() -> None:
            nonlocal now
            asked.append(now)
            now += seconds

        rests(question)

    for seconds in (0.5, 0.25, 60.0, 0.5):
        ask(seconds)
    assert asked == [0.0, 1.0, 1.5, 61.5 + REST_MOST]
    now += 0.25  # half of the rest that is due has passed by itself
    ask(0.0)
    assert asked[-1] - asked[-2] == 1.0


def test_a_question_that_fails_is_followed_by_a_rest_too() -> None:
    """It has read all the same."""
    now = [0.0]
    slept: list[float] = []
    rests = Rests(lambda: now[0], slept.append)

    def fail() -> None:
        now[0] += 0.5
        raise ValueError("no answer")

    for _ in range(2):
        with pytest.raises(ValueError, match="no answer"):
            rests(fail)
    assert slept == [0.5]
