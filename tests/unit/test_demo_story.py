"""The verdict of the demonstration: what has to be seen, and what is said when it is not."""

from dataclasses import replace

import pytest
from sfu_delegate.demo.story import CAST, LENGTH, SHORT_MS, Act, Outcome, Person, missing

NOW = 1_000_000.0
STAYS = Outcome(
    person=Person("anna", "stays", delay_ms=SHORT_MS),
    came=True,
    acted=False,
    joined_at=NOW - 50,
    left_at=None,
    reason="",
    leave_at=None,
    in_call=True,
    announced_once=True,
    restarts=3,
    verified=True,
    ended="",
    scheduled=True,
)
LEFT = Outcome(
    person=Person("ben", "hung up", Act.LEAVE, 13.0),
    came=True,
    acted=True,
    joined_at=NOW - 50,
    left_at=NOW - 30,
    reason="CLIENT_INITIATED",
    leave_at=NOW - 28,
    in_call=False,
    announced_once=False,
    restarts=1,
    verified=True,
    ended="sent",
    scheduled=False,
)


def said(*outcomes: Outcome, complete: bool = True, lost: float = 0) -> str:
    return "; ".join(missing(outcomes, NOW, complete=complete, lost=lost))


def test_nothing_is_missing_when_all_is_well() -> None:
    """Who left has left, who stayed is there and was restarted: nothing to say."""
    assert said(STAYS, LEFT) == ""


@pytest.mark.parametrize(
    ("outcome", "sentence"),
    [
        (replace(STAYS, joined_at=None), "never told that anna joined"),
        (replace(STAYS, in_call=False), "the room does not show it"),
        (replace(STAYS, announced_once=False), "lost in between"),
        (replace(STAYS, scheduled=False), "not scheduled any more"),
        (replace(STAYS, restarts=2), "was restarted once, and should have been 2 times"),
        (replace(STAYS, restarts=0, verified=False), "could not restart"),
        (replace(LEFT, leave_at=None), "leave event is not in the room"),
        (replace(LEFT, leave_at=NOW - 31), "1.0 s before the departure"),
        (replace(LEFT, leave_at=NOW - 10), "20.0 s after the departure"),
        (replace(LEFT, ended="ran_out"), "did not send the leave event (ran_out)"),
        (replace(LEFT, left_at=None, leave_at=None), "never told that ben left"),
    ],
)
def test_whatever_is_wrong_is_said(outcome: Outcome, sentence: str) -> None:
    """Each thing that must be seen is named when it was not."""
    assert sentence in said(outcome)


def test_a_loss_that_the_daemon_counts_is_a_failure() -> None:
    """The metric that must stay 0 is a witness, too."""
    assert "lost while their participant was connected" in said(STAYS, LEFT, lost=1)


def test_a_story_that_was_cut_short_wants_no_departures_that_did_not_come() -> None:
    """Who had no time to leave is to be in the call, and that is all."""
    early = replace(LEFT, acted=False, left_at=None, reason="", leave_at=None, in_call=True, announced_once=True, ended="", scheduled=True)
    assert said(early, complete=False) == ""
    assert "never told that ben left" in said(early, complete=True)


def test_a_story_that_was_cut_short_wants_nobody_who_did_not_come() -> None:
    """Who had no time to join is not missed; who joined is expected at the SFU."""
    late = replace(STAYS, came=False, joined_at=None, in_call=False, announced_once=False, restarts=0, verified=False, scheduled=False)
    assert said(late, complete=False) == ""
    assert "never told that anna joined" in said(late, complete=True)
    assert "never told that anna joined" in said(replace(late, came=True), complete=False)


def test_the_delay_counts_from_the_word_of_the_sfu() -> None:
    """Seconds from the SFU's word to the leave event; None as long as there is no such event."""
    assert LEFT.delay == 2.0
    assert replace(LEFT, leave_at=None).delay is None


def test_the_cast_has_every_way_to_go_and_some_who_stay() -> None:
    """One for each act, one who does nothing, and every act early enough to be seen through: a crash is noticed after 21 s."""
    assert {person.act for person in CAST} == {None, *Act}
    assert all(person.at + 21 + 10 < LENGTH for person in CAST if person.act is Act.CRASH)
    assert [person.name for person in CAST if not person.leaves] == ["anna", "carla"]
