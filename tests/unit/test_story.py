"""What happened, in sentences: each line of the history has one, and they say what is so."""

from itertools import product

import pytest
from sfu_delegate.delegation.lifecycle import BY_OPERATOR, RESTARTED
from sfu_delegate.delegation.model import Action, Note, OnEnd, Outcome, Presence, State
from sfu_delegate.delegation.policy import DEPARTURES, ENDED_BY_OPERATOR, OWN_REASONS
from sfu_delegate.observe.story import REASONS, Span, Tone, briefly, course, now_so, span, tell, why

from tests.rows import DELAY, NOW, POLICY, row

WORDS = [
    "delegated",
    "verified",
    RESTARTED,
    *Presence,
    *(state for state in State if state is not State.DONE),
    *(outcome for outcome in Outcome if outcome),
    *(f"{action}_failed" for action in Action if action is not Action.LOOK),
]


@pytest.mark.parametrize("what", WORDS)
def test_each_line_of_the_history_is_a_sentence(what: str) -> None:
    """It begins with a capital, ends with a full stop, and is not just the word."""
    (line,) = tell([row()], [Note(1, NOW, str(what), "429 M_LIMIT_EXCEEDED" if what.endswith("_failed") else "")])
    assert line.sentence[0].isupper()
    assert line.sentence.endswith(".")
    assert len(line.sentence) > 12
    assert line.at == NOW


def test_what_a_later_version_tells_is_shown_as_it_is() -> None:
    """A word that is not known is better than none."""
    (line,) = tell([row()], [Note(1, NOW, "teleported", "to Mars")])
    assert (line.sentence, line.tone) == ("teleported (to Mars)", Tone.PLAIN)


def test_lines_of_one_step_are_in_the_order_in_which_things_happen() -> None:
    """They have one time; the departure comes before what is made of it. What belongs to no event is left out."""
    notes = [Note(1, NOW, word, "") for word in ("sent", "ending", "gone", "verified", "delegated")]
    assert [line.what for line in tell([row()], [*notes, Note(7, NOW, "gone", "")])] == ["delegated", "gone", "verified", "ending", "sent"]


def test_a_second_delegation_is_told_as_such() -> None:
    """The same event handed over once more."""
    first, second = tell([row()], [Note(1, NOW, "delegated", "D1"), Note(1, NOW + 5, "delegated", "D2")])
    assert "over again" in second.sentence
    assert "again" not in first.sentence


def test_what_the_homeserver_said_is_told_where_it_matters() -> None:
    """Of a refusal, and of an attempt that failed; what harms is bad."""
    told = tell([row()], [Note(1, NOW, "send_failed", "503"), Note(1, NOW + 1, "rejected", "403 M_FORBIDDEN"), Note(1, NOW + 2, "lost", "404")])
    assert [("503" in told[0].sentence, told[0].tone), ("403 M_FORBIDDEN" in told[1].sentence, told[1].tone)] == [
        (True, Tone.NOTICE),
        (True, Tone.BAD),
    ]
    assert told[2].tone is Tone.BAD


@pytest.mark.parametrize("presence", Presence)
def test_only_who_is_gone_has_departed_before_its_time_ran_out(presence: Presence) -> None:
    """An event that was let run, or replaced, has run out while its participant was there, as far as is known: then that is bad."""
    there = row(presence=presence, state=State.DONE, outcome=Outcome.RAN_OUT, finished_at=NOW)
    (line,) = tell([there], [Note(1, NOW, "ran_out", "")])
    assert now_so(there, NOW) == (line.sentence, line.tone)
    assert ("after the departure" in line.sentence, line.tone is Tone.BAD) == ((True, False) if presence is Presence.GONE else (False, True))


def test_a_cancellation_that_was_refused_is_told_as_such() -> None:
    """The older event was not cancelled then, though a newer one has taken its place."""
    cancelled, refused = tell([row()], [Note(1, NOW, "replaced", "200"), Note(1, NOW + 1, "replaced", "403 M_FORBIDDEN")])
    assert "It answered" not in cancelled.sentence
    assert "It answered: 403 M_FORBIDDEN." in refused.sentence


def test_every_reason_is_explained() -> None:
    """Each that the rules know by name, ours and LiveKit's; one of the future by its name."""
    assert (set(DEPARTURES) | OWN_REASONS) - {"OTHER"} <= set(REASONS)
    assert why("CLIENT_INITIATED").endswith("(CLIENT_INITIATED)")
    assert why("ABDUCTED") == "ABDUCTED"
    assert why("") == "no reason was given"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-3.0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (495.0, "8 min 15 s"),
        (3600.0, "1 h"),
        (3660.0, "1 h 1 min"),
        (3600.0 * 24, "1 d"),
        (3600.0 * 50, "2 d 2 h"),
    ],
)
def test_times_are_told_in_two_units(seconds: float, said: str) -> None:
    """What is smaller does not matter then."""
    assert span(seconds) == said


@pytest.mark.parametrize(("presence", "state", "verified", "attempts"), list(product(Presence, State, (True, False), (0, 3))))
def test_how_it_is_now_can_be_said_of_every_state(presence: Presence, state: State, verified: bool, attempts: int) -> None:
    """Whole sentences, without a time of day, a secret or a word of Python's."""
    there = row(presence, state, attempts=attempts)._replace(
        verified_at=NOW - 60.0 if verified else None, outcome=Outcome.SENT if state is State.DONE else Outcome.OPEN
    )
    sentence, tone = now_so(there, NOW)
    assert sentence.endswith(".")
    assert "None" not in sentence
    assert there.delay_id not in sentence
    assert "inf" not in sentence
    assert tone in Tone


def test_what_the_operator_had_done_is_told_as_such() -> None:
    """Released by the operator, or taken back by the client: the line says which. Of one that was ended nobody believes that it went by itself."""
    done = row(Presence.CONNECTED, State.DONE, outcome=Outcome.WITHDRAWN, end_tried=False)
    by_operator, by_client = tell([done], [Note(1, NOW, "withdrawn", BY_OPERATOR), Note(1, NOW + 1, "withdrawn", "")])
    assert by_operator.sentence.startswith("The operator had it released: the daemon forgot it")
    assert by_client.sentence.startswith("It was taken back: the daemon forgot it")
    assert now_so(done, NOW)[0].startswith("It was taken back by its client, or released by the operator:")
    ended = row(Presence.GONE, State.DONE, outcome=Outcome.SENT, reason=ENDED_BY_OPERATOR)
    sentence, tone = now_so(ended, NOW)
    assert "The operator had it ended; at the SFU nothing was changed." in sentence
    assert tone is Tone.NOTICE


def test_somebody_in_the_call_is_as_it_should_be() -> None:
    """For how long, and how far the next restart and the end are away."""
    there = row(running_since=NOW - 600.0)
    assert now_so(there, NOW) == (
        f"In the call for 1 min. Restarted 10 min ago, again in {span(DELAY * POLICY.restart_at - 600.0)} at the latest; it would run out in 50 min.",
        Tone.GOOD,
    )


def test_what_is_late_is_bad() -> None:
    """A goodbye that has waited for long, and a countdown that is over."""
    gone = row(Presence.GONE)
    assert now_so(gone, NOW)[1] is Tone.PLAIN
    assert now_so(gone, NOW + 60.0)[1] is Tone.BAD
    over = row(running_since=NOW - DELAY - 60.0)
    assert now_so(over, NOW)[1] is Tone.BAD
    assert "its time is over, unless the client has restarted it" in now_so(over, NOW)[0]


def test_a_list_tells_more_where_more_is_to_be_told() -> None:
    """As long as all is well, whether the participant is in the call; nothing of what is over; all of what is not as it should be."""
    assert briefly(row(), NOW) == "In the call for 1 min."
    assert briefly(row(state=State.DONE), NOW) == ""
    for unwell in (row(attempts=2), row(Presence.AWAY), row(state=State.DONE, outcome=Outcome.LOST)):
        assert briefly(unwell, NOW) == now_so(unwell, NOW)[0]


def test_one_that_is_to_be_cancelled_is_told_so() -> None:
    """Not every end is a goodbye."""
    assert "cancellation waits" in now_so(row(Presence.GONE, on_end=OnEnd.CANCEL), NOW)[0]


def test_the_course_of_a_call() -> None:
    """From the delegation on, without gaps; open where it goes on."""
    there = row(accepted_at=NOW)
    notes = [
        Note(1, NOW, "delegated", "D1"),
        Note(1, NOW + 5, "connected", ""),
        Note(1, NOW + 50, "away", "CONNECTION_TIMEOUT"),
        Note(1, NOW + 55, "connected", ""),
    ]
    assert course(there, notes) == [
        Span(Presence.EXPECTED, "", NOW, NOW + 5),
        Span(Presence.CONNECTED, "", NOW + 5, NOW + 50),
        Span(Presence.AWAY, "CONNECTION_TIMEOUT", NOW + 50, NOW + 55),
        Span(Presence.CONNECTED, "", NOW + 55, None),
    ]


def test_who_was_connected_already_has_been_so_from_the_beginning() -> None:
    """A delegation that inherits its participant's presence has no line of it."""
    assert course(row(accepted_at=NOW), [Note(1, NOW, "delegated", "D1")]) == [Span(Presence.CONNECTED, "", NOW, None)]
