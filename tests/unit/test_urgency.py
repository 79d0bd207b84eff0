"""What is done first at one homeserver, and how many at a time."""

import pytest
from sfu_delegate.delegation.model import DelayedEvent, Lane, Presence, State
from sfu_delegate.delegation.urgency import ENDANGERED, Pace, choose

from tests.rows import NOW, row


def restart(id: int, deadline: float) -> DelayedEvent:
    return row(id=id, lane=Lane.RESTART, harm=deadline, due=NOW)


def ending(id: int, since: float) -> DelayedEvent:
    return row(Presence.GONE, State.ENDING, id=id, harm=since, due=NOW)


def ids(rows: list[DelayedEvent]) -> list[int]:
    return [row.id for row in rows]


def test_departures_go_before_restarts_and_the_oldest_first() -> None:
    """A ghost in the call is worse than a restart that has time."""
    rows = [restart(1, NOW + 500), ending(2, NOW - 1), restart(3, NOW + 100), ending(4, NOW - 9)]
    assert ids(choose(rows, 4, NOW)) == [4, 2, 3, 1]


def test_a_restart_that_is_about_to_miss_its_deadline_goes_first() -> None:
    """A person dropped is worse than a ghost that stays a moment longer."""
    rows = [ending(1, NOW - 900), restart(2, NOW + ENDANGERED), restart(3, NOW + 1)]
    assert ids(choose(rows, 3, NOW)) == [3, 2, 1]


def test_a_restart_with_more_time_is_not_endangered() -> None:
    """Just above the limit, the departure goes first."""
    assert ids(choose([restart(1, NOW + ENDANGERED + 0.1), ending(2, NOW)], 1, NOW)) == [2]


def test_events_past_their_deadline_do_not_drag_others_down() -> None:
    """Who can still make it goes before who cannot."""
    assert ids(choose([restart(1, NOW - 5), restart(2, NOW + 5)], 1, NOW)) == [2]


def test_a_deadline_that_is_now_has_passed() -> None:
    """A deadline at this very moment cannot be met."""
    assert ids(choose([restart(1, NOW), ending(2, NOW)], 1, NOW)) == [2]


@pytest.mark.parametrize("free", [0, -1, -5])
def test_nothing_is_chosen_without_a_free_place(free: int) -> None:
    """No place, no action."""
    assert choose([ending(1, NOW)], free, NOW) == []


def test_no_more_are_chosen_than_places_are_free() -> None:
    """The rest waits in the database."""
    assert len(choose([ending(id, NOW) for id in range(9)], 3, NOW)) == 3


def test_a_pace_starts_low_and_doubles_with_success() -> None:
    """4 at a time, then 8, then 16, and never more than allowed."""
    pace = Pace(10)
    assert pace.free(NOW) == 4
    for _ in range(4):
        pace.began()
    assert pace.free(NOW) == 0
    for _ in range(4):
        pace.ended(answered=True)
    assert pace.free(NOW) == 8
    for _ in range(8):
        pace.began()
        pace.ended(answered=True)
    assert pace.free(NOW) == 10


def test_failures_do_not_widen_a_pace() -> None:
    """Only definite answers show that the homeserver can take more."""
    pace = Pace(16)
    for _ in range(20):
        pace.began()
        pace.ended(answered=False)
    assert pace.free(NOW) == 4


def test_a_pace_that_may_have_one_place_has_one() -> None:
    """The configured limit holds from the start."""
    assert Pace(1).free(NOW) == 1


def test_a_limited_pace_waits_and_goes_on_with_one() -> None:
    """429: nothing is sent until the time that was named, then one at a time, then more again."""
    pace = Pace(16)
    pace.began()
    pace.ended(answered=False)
    pace.limited(7.0, NOW)
    assert pace.free(NOW) == 0
    assert pace.free(NOW + 6.9) == 0
    assert pace.free(NOW + 7.0) == 1
    for _ in range(15):
        pace.began()
        pace.ended(answered=True)
    assert pace.free(NOW + 7.0) == 1
    pace.began()
    pace.ended(answered=True)
    assert pace.free(NOW + 7.0) == 2


def test_the_longer_of_two_waits_holds() -> None:
    """A second 429 with a shorter wait does not shorten the first."""
    pace = Pace(16)
    pace.limited(30.0, NOW)
    pace.limited(1.0, NOW + 1)
    assert pace.free(NOW + 29.0) == 0


def test_an_answer_too_many_does_not_make_places() -> None:
    """What is in flight never gets below zero."""
    pace = Pace(16)
    pace.ended(answered=False)
    assert pace.in_flight == 0
