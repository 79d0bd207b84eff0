"""The life of a delegated event: every row that can come about with every input, and each rule by its name."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sfu_delegate.delegation import lifecycle
from sfu_delegate.delegation.lifecycle import (
    ADRIFT_CHECK,
    BY_OPERATOR,
    EVENTS,
    LEAST_LEASE,
    RESTARTS_TOLD,
    Happening,
    action,
    advance,
    claim,
    delegate,
    story,
    supersede,
)
from sfu_delegate.delegation.model import (
    Accept,
    Action,
    Answered,
    DelayedEvent,
    Due,
    End,
    Lane,
    Looked,
    NewEvent,
    OnEnd,
    Outcome,
    Presence,
    RoomChanged,
    RoomNews,
    SfuFound,
    SfuLost,
    State,
    Verdict,
    Withdraw,
)
from sfu_delegate.delegation.policy import ENDED_BY_OPERATOR, MISSING, ROOM_MISSING, ROOM_RESTARTED, SFU_LOST, Policy
from sfu_delegate.delegation.urgency import UNKNOWN_COUNTDOWN

from tests.rows import (
    DELAY,
    NOW,
    POLICY,
    POSSIBLE,
    SFU,
    aborted,
    accept,
    answered,
    assert_consistent,
    claimed,
    ended,
    joined,
    left,
    listed,
    live,
    look_failed,
    looked,
    row,
)

Given = lifecycle.Given


def possible_rows() -> Iterator[DelayedEvent]:
    """Every combination of state, presence, claimed, end_tried, verified, on_end that can come about."""
    for state, presences in POSSIBLE.items():
        for presence, end_tried, verified, on_end in itertools.product(presences, (False, True), (None, NOW - 60.0), OnEnd):
            there = row(presence, state, end_tried=end_tried, verified_at=verified, on_end=on_end)
            yield there
            if there.lane in (Lane.END, Lane.RESTART):
                yield claimed(there)
            if state is State.LIVE and presence is not Presence.EXPECTED:
                yield claimed(there, lane=Lane.END)  # it came back while the goodbye was under way
            if presence is Presence.CONNECTED:
                yield there._replace(sessions=(live("S0", 500), live("S1")))
                yield there._replace(sessions=(live("", 0),))
            if presence is Presence.AWAY and state is not State.DONE:
                yield there._replace(sessions=(live("S1"),), reason="MISSING", look_at=NOW + 3)
            if state is State.VANISHED:
                yield there._replace(due=NOW)


def every_input(there: DelayedEvent) -> Iterator[Given]:
    """Every kind of input, of every known and unknown session, reason, verdict, action and claim."""
    sids = [("S1", 1000), ("S0", 500), ("S2", 2000), ("S2", 0), ("", 0)]
    for sid, at in sids:
        yield joined(sid, at)
        for reason in ("CLIENT_INITIATED", "PARTICIPANT_REMOVED", "CONNECTION_TIMEOUT", "DUPLICATE_IDENTITY", "SERVER_SHUTDOWN", "SOMETHING_NEW"):
            yield left(sid, reason, at)
            yield aborted(sid, reason, at)
    for sent_at, doubtful in itertools.product((NOW - 500, NOW - 1, NOW, NOW + 500), (False, True)):
        yield looked(sent_at=sent_at, doubtful=doubtful)
        yield looked(listed("S8", identity="bob"), sent_at=sent_at, doubtful=doubtful)
        for (sid, at), state in itertools.product(sids, ("ACTIVE", "JOINED", "DISCONNECTED")):
            yield looked(listed(sid, state, at), sent_at=sent_at, doubtful=doubtful)
        yield look_failed(sent_at)
    for verdict, act, claim_, sent_at in itertools.product(
        Verdict, (Action.SEND, Action.CANCEL, Action.RESTART), (there.claim, there.claim - 1, there.claim + 1), (NOW - 3000.0, NOW - 0.1)
    ):
        yield answered(there, act, verdict, claim=claim_, sent_at=sent_at)
        if verdict is Verdict.LIMITED:
            yield answered(there, act, verdict, claim=claim_, sent_at=sent_at, retry_after=7.0)
    for what, created_at in itertools.product(RoomNews, (0.0, NOW - 3600.0, NOW)):
        yield RoomChanged(SFU, "room", what, "RM1", "EV1", created_at)
    yield SfuLost(SFU)
    yield replace(looked(sent_at=NOW + 500), doubted_until=NOW)
    yield Withdraw(there.delegation)
    yield End(there.delegation)
    yield Due(there.id)
    yield accept("D2")


def can_come(there: DelayedEvent, given_input: Given) -> bool:
    """A claim is void as soon as the state changes what it was for, so an answer that fits it is about an action of this row."""
    if not isinstance(given_input, Answered) or not there.claimed or given_input.claim != there.claim:
        return True
    if there.state is State.LIVE and there.lane is Lane.END:
        return given_input.action is (Action.CANCEL if there.on_end is OnEnd.CANCEL else Action.SEND)
    return given_input.action is action(there)


ALL = [(before, given_input) for before in possible_rows() for given_input in every_input(before)]
CASES = [(before, given_input) for before, given_input in ALL if can_come(before, given_input)]


def test_nothing_raises() -> None:
    """Whatever is put together, even what cannot come about."""
    for before, given_input in ALL:
        advance(before, given_input, NOW, POLICY, 0.5)


def test_the_starting_rows_are_consistent() -> None:
    """The table of this test is about rows that can come about."""
    for there in possible_rows():
        assert_consistent(there._replace(token=None))


def test_every_row_stays_consistent_with_every_input() -> None:
    """No input raises, and state, presence, lane, due, harm and outcome agree afterwards."""
    for before, given_input in CASES:
        after = advance(before, given_input, NOW, POLICY, 0.5)
        try:
            assert_consistent(after)
        except AssertionError as error:
            raise AssertionError(f"{before}\n+ {given_input}\n= {after}") from error


def test_every_change_of_state_is_in_the_table() -> None:
    """The state afterwards is one that the table allows from the state before."""
    allowed = {old: {old} | {new for (state, _), new in EVENTS.items() if state is old} for old in State}
    for before, given_input in CASES:
        assert advance(before, given_input, NOW, POLICY, 0.5).state in allowed[before.state], (before, given_input)


def test_the_table_is_complete() -> None:
    """Every state is in it, every happening, and DONE is left only by a new delegation."""
    assert {state for state, _ in EVENTS} == set(State)
    assert {happening for _, happening in EVENTS} == set(Happening)
    assert [key for key in EVENTS if key[0] is State.DONE] == [(State.DONE, Happening.DELEGATED)]
    assert all(EVENTS[state, Happening.DELEGATED] is State.LIVE for state in State)
    assert all(EVENTS[state, Happening.WITHDRAWN] is State.DONE for state in State if state is not State.DONE)


ANSWERS = {
    Happening.NOT_THERE: (Verdict.NOT_FOUND, Verdict.CONFLICT),
    Happening.REFUSED: (Verdict.REFUSED,),
    Happening.NOT_DONE: (Verdict.LIMITED, Verdict.FAILED, Verdict.UNCERTAIN),
    Happening.ENDED: (Verdict.DONE,),
}


@pytest.mark.parametrize("state", [State.LIVE, State.ENDING, State.SUPERSEDED])
@pytest.mark.parametrize("what", list(ANSWERS))
def test_answers_lead_where_the_table_says(state: State, what: Happening) -> None:
    """Each verdict on the action of a state, for a verified event of which no ending was tried."""
    for verdict in ANSWERS[what]:
        came_back = what is Happening.ENDED and state is State.LIVE
        there = claimed(row(POSSIBLE[state][0], state), **({"lane": Lane.END} if came_back else {}))
        act = Action.SEND if came_back else action(there)
        assert advance(there, answered(there, act, verdict), NOW, POLICY, 0.5).state is EVENTS[state, what]


@pytest.mark.parametrize("state", list(State))
def test_happenings_lead_where_the_table_says(state: State) -> None:
    """Found to be gone, back, superseded and withdrawn, from every state in which it can happen."""
    for presence in POSSIBLE[state]:
        there = row(presence, state)
        assert advance(there, Withdraw("D1"), NOW, POLICY, 0.5).state is EVENTS.get((state, Happening.WITHDRAWN), state)
        assert supersede(there, NOW, POLICY, 0.5).state is EVENTS.get((state, Happening.SUPERSEDED), state)
        if presence is Presence.GONE:
            assert advance(there, joined("S2", 2000), NOW, POLICY, 0.5).state is EVENTS.get((state, Happening.BACK), state)
        if presence is Presence.AWAY and state is not State.DONE:
            gone = advance(there, looked(), NOW, POLICY, 0.5)
            assert gone.presence is Presence.GONE
            assert gone.state is EVENTS.get((state, Happening.GONE), state)


def test_what_is_done_is_done() -> None:
    """Nothing changes a finished event but a new delegation."""
    for before, given_input in CASES:
        if before.state is State.DONE:
            assert advance(before, given_input, NOW, POLICY, 0.5) is before


def test_an_answer_to_an_old_claim_ends_nothing() -> None:
    """Nor does one to a claim that was never made, or an answer that nobody waits for. Only that a countdown began anew is a fact all the same."""
    for before, given_input in CASES:
        if isinstance(given_input, Answered) and (given_input.claim != before.claim or not before.claimed):
            after = advance(before, given_input, NOW, POLICY, 0.5)
            restarted = before.state is State.LIVE and (given_input.action, given_input.verdict) == (Action.RESTART, Verdict.DONE)
            if not restarted or before.lane is not Lane.RESTART or given_input.sent_at <= before.running_since:
                assert after is before
                continue
            assert after.running_since == given_input.sent_at
            assert (after.state, after.claimed, after.end_tried) == (before.state, before.claimed, before.end_tried)
            assert not (before.claimed or before.end_tried) or after.due == before.due


def test_nothing_is_ended_without_a_departure() -> None:
    """As long as the participant is expected, connected or away, the next action is no ending of a delegation in force."""
    for before, given_input in CASES:
        after = advance(before, given_input, NOW, POLICY, 0.5)
        if after.presence is not Presence.GONE and not before.claimed:
            assert after.lane is not Lane.END
        if after.state is State.LIVE:
            assert action(after) is Action.RESTART


def test_the_countdown_is_never_overestimated() -> None:
    """running_since never goes back, and never beyond the time when the restart request was sent."""
    for before, given_input in CASES:
        after = advance(before, given_input, NOW, POLICY, 0.5)
        assert after.running_since >= before.running_since
        if after.running_since != before.running_since:
            assert isinstance(given_input, Answered)
            assert (given_input.action, given_input.verdict) == (Action.RESTART, Verdict.DONE)
            assert after.running_since <= given_input.sent_at


def test_claims_only_count_up() -> None:
    """No input but a claim changes the claim's number: an old answer can never fit again."""
    for before, given_input in CASES:
        assert advance(before, given_input, NOW, POLICY, 0.5).claim == before.claim


def test_a_delegation_of_somebody_who_is_in_the_call_says_so() -> None:
    """Presence that is inherited is told like presence that was found: without it, the story would begin with nobody."""
    assert [note.what for note in story(None, row(), accept("D2"), NOW)] == ["delegated", "connected", "verified"]
    away = list(story(None, row(Presence.AWAY, verified_at=None), accept("D2"), NOW))
    assert [(note.what, note.detail) for note in away[1:]] == [("away", "CLIENT_INITIATED")]
    assert [note.what for note in story(None, row(Presence.EXPECTED, verified_at=None), accept("D2"), NOW)] == ["delegated"]


def test_what_a_homeserver_said_is_told_at_the_time_when_it_said_it() -> None:
    """Not when it was kept, which may be a moment later; and of who had a delegation released, the history knows."""
    claimed = claim(row(Presence.GONE), NOW, POLICY)
    said = answered(claimed, Action.SEND, Verdict.DONE)._replace(answered_at=NOW + 1.0)
    (line,) = story(claimed, advance(claimed, said, NOW + 1.25, POLICY, 0.5), said, NOW + 1.25)
    assert (line.what, line.at) == ("sent", NOW + 1.0)
    for by_operator, detail in ((True, BY_OPERATOR), (False, "")):
        release = Withdraw("D1", by_operator=by_operator)
        (line,) = story(row(), advance(row(), release, NOW, POLICY, 0.5), release, NOW)
        assert (line.what, line.detail) == ("withdrawn", detail)


def test_every_change_of_state_leaves_a_line_in_the_history() -> None:
    """And a change that is none leaves none."""
    for before, given_input in CASES:
        after = advance(before, given_input, NOW, POLICY, 0.5)
        lines = [note.what for note in story(before, after, given_input, NOW)]
        if after.state is not before.state:
            assert (after.outcome.value if after.state is State.DONE else after.state.value) in lines
        if after is before:
            assert lines == []


# ── restarts ──


def test_a_restart_is_planned_before_three_quarters_of_the_delay() -> None:
    """And not before 65 %: between them, so that a call's members do not come at once."""
    there = claimed(row())
    for random in (0.0, 0.3, 0.99):
        after = advance(there, answered(there, Action.RESTART, Verdict.DONE, sent_at=NOW - 0.1), NOW, POLICY, random)
        assert after.due is not None
        assert 0.65 * DELAY <= after.due - after.running_since <= 0.75 * DELAY
        assert (after.running_since, after.harm, after.restarts) == (NOW - 0.1, NOW - 0.1 + DELAY, 2)


def test_a_slow_answer_does_not_plan_a_restart_in_the_past() -> None:
    """The request took longer than three quarters of a short delay: the next one is due now."""
    there = claimed(row(delay=10.0))
    assert advance(there, answered(there, Action.RESTART, Verdict.DONE, sent_at=NOW - 9), NOW, POLICY, 0.0).due == NOW


def test_the_first_restart_verifies() -> None:
    """The homeserver knows the event; a later one does not change when that was."""
    there = claimed(row(verified_at=None))
    once = advance(there, answered(there, Action.RESTART, Verdict.DONE), NOW, POLICY, 0.5)
    assert once.verified_at == NOW
    again = claimed(once)
    assert advance(again, answered(again, Action.RESTART, Verdict.DONE), NOW + 9, POLICY, 0.5).verified_at == NOW


def next_restart(there: DelayedEvent, random: float, policy: Policy = POLICY) -> float:
    """When the restart comes that follows one that was just made, as a part of the delay."""
    there = claimed(there)
    after = advance(there, answered(there, Action.RESTART, Verdict.DONE), NOW, policy, random)
    assert after.due is not None
    assert (after.lane, after.harm) == (Lane.RESTART, after.deadline)
    return (after.due - after.running_since) / after.delay


def test_the_first_restarts_of_those_who_delegated_together_are_spread() -> None:
    """Between a fifth and three quarters of the delay, evenly; a limit that nobody knew of shows itself while there is time. Later ones: as ever."""
    fresh = row(verified_at=None)
    assert [next_restart(fresh, random) for random in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([0.75, 0.6125, 0.475, 0.3375, 0.2])
    assert [next_restart(row(), random) for random in (0.0, 0.5, 1.0)] == pytest.approx([0.75, 0.7, 0.65])


def test_only_the_first_restart_after_the_check_is_spread() -> None:
    """The one after it comes in time for the delay; and an event that is verified anew, with another delay, is spread anew."""
    there = claimed(row(verified_at=None))
    once = advance(there, answered(there, Action.RESTART, Verdict.DONE), NOW, POLICY, 0.99)
    assert once.verified_at == NOW
    assert next_restart(once, 0.99) == pytest.approx(0.651)
    again = new_row(once, once, accept("D2", "delay-1", delay=60.0))
    assert again.verified_at is None
    assert next_restart(again, 0.99) == pytest.approx(0.2055)


def test_when_a_restart_comes_depends_on_nothing_but_the_event_and_its_random_number() -> None:
    """The same again is the same, and somebody else's with the same number comes at the same part of another delay."""
    fresh, other = row(verified_at=None), row(verified_at=None, id=2, identity="bob", delay=60.0)
    for random in (0.0, 0.3, 0.99):
        assert next_restart(fresh, random) == next_restart(fresh, random)
        assert next_restart(other, random) == pytest.approx(next_restart(fresh, random))


@pytest.mark.parametrize(
    ("restart_at", "restart_spread", "earliest"),
    [(0.75, 0.1, 0.2), (0.75, 0.7, 0.05), (0.4, 0.1, 0.0), (0.9, 0.0, 0.35)],
)
def test_the_spread_heeds_what_is_configured(restart_at: float, restart_spread: float, earliest: float) -> None:
    """Never later than the normal time, never before the countdown began, and never less than all other restarts are spread."""
    policy = replace(POLICY, restart_at=restart_at, restart_spread=restart_spread)
    fresh = row(verified_at=None)
    for random in (0.0, 0.5, 0.9, 1.0):
        assert next_restart(fresh, random, policy) == pytest.approx(restart_at - (restart_at - earliest) * random, abs=1e-4)


def test_a_slow_check_does_not_plan_the_first_restart_in_the_past() -> None:
    """Of a short delay, more had passed than the first restart waits for: it is due now."""
    there = claimed(row(delay=10.0, verified_at=None, running_since=NOW - 9))
    after = advance(there, answered(there, Action.RESTART, Verdict.DONE, sent_at=NOW - 4), NOW, POLICY, 0.99)
    assert (after.running_since, after.due) == (NOW - 4, NOW)


def test_failures_are_retried_with_growing_pauses_and_jitter() -> None:
    """1, 2, 4, … 60 s at most, between half of it and the whole."""
    for random, share in ((0.0, 0.5), (1.0, 1.0)):
        there, pauses = row(), []
        for _ in range(8):
            there = claimed(there)
            there = advance(there, answered(there, Action.RESTART, Verdict.FAILED), NOW, POLICY, random)
            assert there.due is not None
            pauses.append(there.due - NOW)
        assert pauses == [share * wait for wait in (1, 2, 4, 8, 16, 32, 60, 60)]


@pytest.mark.parametrize(("ago", "wait"), [(0.0, 1.0), (16.0, 2.0), (80.0, 10.0), (3000.0, 60.0)])
def test_a_departure_that_was_tried_often_is_tried_again_within_an_eighth_of_its_age(ago: float, wait: float) -> None:
    """It may have been the one that was tried in an outage, and that is over soon."""
    there = claimed(row(Presence.GONE, delay=3600.0, running_since=NOW, ended_at=NOW - ago, attempts=9))
    after = advance(there, answered(there, Action.SEND, Verdict.FAILED), NOW, POLICY, 1.0)
    assert (after.state, after.due) == (State.ENDING, NOW + wait)


def test_retries_go_on_after_our_deadline() -> None:
    """The client may have restarted as well: the true deadline may be later than ours."""
    there = claimed(row(running_since=NOW - 2 * DELAY))
    after = advance(there, answered(there, Action.RESTART, Verdict.FAILED), NOW, POLICY, 0.5)
    assert (after.state, after.lane) == (State.LIVE, Lane.RESTART)


def test_the_time_that_a_server_names_is_waited() -> None:
    """But not for ever."""
    there = claimed(row())
    after = advance(there, answered(there, Action.RESTART, Verdict.FAILED, retry_after=20.0), NOW, POLICY, 0.5)
    assert after.due == NOW + 20.0
    after = advance(there, answered(there, Action.RESTART, Verdict.FAILED, retry_after=86400.0), NOW, POLICY, 0.5)
    assert after.due == NOW + POLICY.retry_most


def test_a_limited_action_is_due_at_once() -> None:
    """Whose turn it is when the homeserver lets us again is a matter of urgency, and no failure of this event."""
    there = claimed(row())
    after = advance(there, answered(there, Action.RESTART, Verdict.LIMITED, retry_after=20.0), NOW, POLICY, 0.5)
    assert (after.due, after.attempts, after.claimed) == (NOW, 0, False)


def test_a_final_error_on_a_restart_ends_it() -> None:
    """M_FORBIDDEN stays M_FORBIDDEN."""
    there = claimed(row())
    assert advance(there, answered(there, Action.RESTART, Verdict.REFUSED), NOW, POLICY, 0.5).outcome is Outcome.REJECTED


# ── 404 on a restart ──


@pytest.mark.parametrize("verdict", [Verdict.NOT_FOUND, Verdict.CONFLICT])
def test_an_event_that_the_homeserver_never_knew_is_unknown(verdict: Verdict) -> None:
    """The client that just delegated it is told so."""
    there = claimed(row(Presence.EXPECTED, verified_at=None))
    assert advance(there, answered(there, Action.RESTART, verdict), NOW, POLICY, 0.5).outcome is Outcome.UNKNOWN


def vanished(presence: Presence = Presence.CONNECTED) -> DelayedEvent:
    there = claimed(row(presence))
    return advance(there, answered(there, Action.RESTART, Verdict.NOT_FOUND), NOW, POLICY, 0.5)


def test_a_404_on_a_restart_is_waited_out() -> None:
    """Nearly always a client that just hung up or scheduled a new event: nothing is concluded for 30 s."""
    there = vanished()
    assert (there.state, there.due) == (State.VANISHED, NOW + 30.0)
    assert advance(there, Due(1), NOW + 29.9, POLICY, 0.5) is there


def test_an_event_is_lost_when_its_participant_is_connected_30_seconds_later() -> None:
    """The one outcome that must not happen. A look that was made since then shows it."""
    there = vanished()
    assert there.look_at == NOW
    assert advance(there, Due(1), NOW + 30.0, POLICY, 0.5).state is State.VANISHED
    seen = advance(there, looked(listed(), sent_at=NOW + POLICY.settled), NOW + POLICY.settled, POLICY, 0.5)
    assert advance(seen, Due(1), NOW + 30.0, POLICY, 0.5).outcome is Outcome.LOST


def test_a_vanished_event_does_not_wait_for_a_look_for_ever() -> None:
    """An SFU that cannot be asked: some minutes later the worst is assumed."""
    there, waits = vanished(), 0
    while there.state is State.VANISHED:
        assert there.due is not None
        there, waits = advance(there, Due(1), there.due, POLICY, 0.5), waits + 1
        assert waits <= 20
    assert there.outcome is Outcome.LOST


def test_a_client_that_ended_its_event_and_then_left_has_ended_it() -> None:
    """404 first, then left and gone: the normal end of a call, not a loss."""
    gone = advance(vanished(), left("S1", "PARTICIPANT_REMOVED"), NOW + 3, POLICY, 0.5)
    assert (gone.state, gone.outcome) == (State.DONE, Outcome.ALREADY_ENDED)
    away = advance(vanished(), left("S1"), NOW + 3, POLICY, 0.5)
    assert advance(away, looked(sent_at=NOW + 5), NOW + 5, POLICY, 0.5).outcome is Outcome.ALREADY_ENDED


def test_a_vanished_event_of_somebody_away_waits_for_the_look() -> None:
    """The look is about to decide whether that was a loss."""
    away = advance(vanished(), left("S1", "SERVER_SHUTDOWN"), NOW + 29, POLICY, 0.5)
    still = advance(away, Due(1), NOW + 30, POLICY, 0.5)
    assert still.state is State.VANISHED
    assert still.due is not None
    assert still.due > NOW + 30
    back = advance(still, joined("S2", 2000), NOW + 31, POLICY, 0.5)
    assert advance(back, Due(1), still.due, POLICY, 0.5).outcome is Outcome.LOST


def test_a_vanished_event_that_a_new_delegation_replaced_was_ended_by_its_client() -> None:
    """It scheduled a new one: nothing was lost."""
    assert supersede(vanished(), NOW + 3, POLICY, 0.5).outcome is Outcome.ALREADY_ENDED


def test_a_vanished_event_of_somebody_never_seen_is_no_loss() -> None:
    """Nobody was connected."""
    assert advance(vanished(Presence.EXPECTED), Due(1), NOW + 30, POLICY, 0.5).outcome is Outcome.ALREADY_ENDED


# ── the goodbye ──


def gone_and_claimed(**changes: object) -> DelayedEvent:
    there = row(**changes)  # type: ignore[arg-type]
    return claim(advance(there, left("S1", "PARTICIPANT_REMOVED"), NOW, POLICY, 0.5), NOW, POLICY)


@pytest.mark.parametrize(("on_end", "act", "outcome"), [(OnEnd.SEND, Action.SEND, Outcome.SENT), (OnEnd.CANCEL, Action.CANCEL, Outcome.CANCELLED)])
def test_a_departure_is_sent_or_cancelled_as_the_client_asked(on_end: OnEnd, act: Action, outcome: Outcome) -> None:
    """At once, and the answer ends it."""
    there = gone_and_claimed(on_end=on_end)
    assert (there.state, there.lane, there.harm, action(there)) == (State.ENDING, Lane.END, NOW, act)
    assert advance(there, answered(there, act, Verdict.DONE), NOW, POLICY, 0.5).outcome is outcome


def test_a_restart_under_way_does_not_hold_up_the_goodbye() -> None:
    """Its claim is void: the send is due at once, and the restart's answer, when it comes, changes nothing."""
    restarting = claimed(row())
    gone = advance(restarting, left("S1", "PARTICIPANT_REMOVED"), NOW, POLICY, 0.5)
    assert (gone.claimed, gone.due, gone.lane) == (False, NOW, Lane.END)
    sending = claim(gone, NOW, POLICY)
    late = answered(restarting, Action.RESTART, Verdict.DONE)
    assert advance(gone, late, NOW, POLICY, 0.5) is gone
    assert advance(sending, late, NOW, POLICY, 0.5) is sending


def test_404_on_the_first_send_is_a_client_that_ended_it_itself() -> None:
    """The normal end of a call."""
    there = gone_and_claimed()
    assert advance(there, answered(there, Action.SEND, Verdict.NOT_FOUND), NOW, POLICY, 0.5).outcome is Outcome.ALREADY_ENDED


def test_404_on_a_send_after_the_deadline_is_ran_out() -> None:
    """It fired by itself, or the client ended it: the two cannot be told apart."""
    there = gone_and_claimed(running_since=NOW - DELAY - 1)
    assert advance(there, answered(there, Action.SEND, Verdict.NOT_FOUND), NOW, POLICY, 0.5).outcome is Outcome.RAN_OUT


@pytest.mark.parametrize("on_end", list(OnEnd))
def test_404_after_an_attempt_that_may_have_got_through_is_ours(on_end: OnEnd) -> None:
    """A timeout, then 404: the first attempt had arrived. Also after the deadline."""
    there = gone_and_claimed(on_end=on_end, running_since=NOW - DELAY - 1)
    unsure = claim(advance(there, answered(there, action(there), Verdict.UNCERTAIN), NOW, POLICY, 0.5), NOW + 1, POLICY)
    after = advance(unsure, answered(unsure, action(unsure), Verdict.NOT_FOUND), NOW + 1, POLICY, 0.5)
    assert after.outcome is (Outcome.SENT if on_end is OnEnd.SEND else Outcome.CANCELLED)


def test_404_after_an_attempt_that_certainly_failed_is_not_ours() -> None:
    """Could not connect, then 404: the client was faster."""
    there = gone_and_claimed()
    again = claim(advance(there, answered(there, Action.SEND, Verdict.FAILED), NOW, POLICY, 0.5), NOW + 1, POLICY)
    assert advance(again, answered(again, Action.SEND, Verdict.NOT_FOUND), NOW + 1, POLICY, 0.5).outcome is Outcome.ALREADY_ENDED


def test_404_after_a_lease_that_ran_out_is_ours() -> None:
    """Nobody knows what became of the first attempt, so it counts as having got through."""
    again = claim(gone_and_claimed(), NOW + 15, POLICY)
    assert again.end_tried
    assert advance(again, answered(again, Action.SEND, Verdict.NOT_FOUND), NOW + 15, POLICY, 0.5).outcome is Outcome.SENT


def test_a_lease_of_a_restart_that_ran_out_is_no_ending() -> None:
    """Only endings end."""
    assert not claim(claimed(row()), NOW + 15, POLICY).end_tried


def test_a_restart_that_failed_ambiguously_is_no_ending() -> None:
    """A restart that timed out has not sent anything."""
    there = claimed(row())
    assert not advance(there, answered(there, Action.RESTART, Verdict.UNCERTAIN), NOW, POLICY, 0.5).end_tried


def test_the_goodbye_is_retried_until_the_event_must_have_fired_by_itself() -> None:
    """The time of departure plus the delay; then nothing is left to do."""
    there = gone_and_claimed()
    before = advance(there, answered(there, Action.SEND, Verdict.FAILED), NOW + DELAY - 1, POLICY, 0.5)
    assert (before.state, before.lane) == (State.ENDING, Lane.END)
    after = advance(there, answered(there, Action.SEND, Verdict.FAILED), NOW + DELAY, POLICY, 0.5)
    assert after.outcome is Outcome.RAN_OUT


def test_an_event_that_may_not_be_sent_is_rejected() -> None:
    """403 M_FORBIDDEN: the user left the room, or has no power there any more."""
    there = gone_and_claimed()
    assert advance(there, answered(there, Action.SEND, Verdict.REFUSED), NOW, POLICY, 0.5).outcome is Outcome.REJECTED


# ── back again ──


def test_who_is_back_before_the_goodbye_was_tried_lives_on() -> None:
    """Nothing has happened at the homeserver."""
    gone = advance(row(), left("S1", "PARTICIPANT_REMOVED"), NOW, POLICY, 0.5)
    back = advance(gone, joined("S2", 2000), NOW + 1, POLICY, 0.5)
    assert (back.state, back.presence, back.lane, back.ended_at) == (State.LIVE, Presence.CONNECTED, Lane.RESTART, None)
    assert back.due is not None
    assert back.due > NOW + 1


def test_who_is_back_after_an_uncertain_goodbye_is_restarted_at_once() -> None:
    """The restart tells whether it got through."""
    there = gone_and_claimed()
    unsure = advance(there, answered(there, Action.SEND, Verdict.UNCERTAIN), NOW, POLICY, 0.5)
    back = advance(unsure, joined("S2", 2000), NOW + 1, POLICY, 0.5)
    assert (back.state, back.due, back.end_tried) == (State.LIVE, NOW + 1, True)
    restarting = claim(back, NOW + 1, POLICY)
    assert advance(restarting, answered(restarting, Action.RESTART, Verdict.NOT_FOUND), NOW + 1, POLICY, 0.5).outcome is Outcome.SENT
    fine = advance(restarting, answered(restarting, Action.RESTART, Verdict.DONE), NOW + 1, POLICY, 0.5)
    assert (fine.state, fine.end_tried) == (State.LIVE, False)


def test_a_goodbye_under_way_when_its_participant_comes_back_cannot_be_called_back() -> None:
    """Its answer is waited for: no second request races it."""
    back = advance(gone_and_claimed(), joined("S2", 2000), NOW + 0.1, POLICY, 0.5)
    assert (back.state, back.claimed, back.due) == (State.LIVE, True, NOW + POLICY.lease)
    assert advance(back, answered(back, Action.SEND, Verdict.DONE), NOW + 0.2, POLICY, 0.5).outcome is Outcome.SENT
    for verdict, tried in ((Verdict.FAILED, False), (Verdict.LIMITED, False), (Verdict.UNCERTAIN, True)):
        after = advance(back, answered(back, Action.SEND, verdict), NOW + 0.2, POLICY, 0.5)
        assert (after.state, after.due, after.claimed, after.end_tried) == (State.LIVE, NOW + 0.2, False, tried)


def test_an_earlier_uncertain_goodbye_is_not_forgotten_when_its_participant_comes_back() -> None:
    """First attempt uncertain, second under way at the return and certainly failed: the first may still have got through."""
    there = gone_and_claimed()
    unsure = claim(advance(there, answered(there, Action.SEND, Verdict.UNCERTAIN), NOW, POLICY, 0.5), NOW + 1, POLICY)
    back = advance(unsure, joined("S2", 2000), NOW + 1, POLICY, 0.5)
    assert advance(back, answered(back, Action.SEND, Verdict.FAILED), NOW + 2, POLICY, 0.5).end_tried


def test_somebody_who_leaves_again_while_the_goodbye_is_under_way_is_said_goodbye() -> None:
    """Gone, back, gone: the second goodbye does not wait for the first one's answer, and 404 then means that the first got through."""
    back = advance(gone_and_claimed(), joined("S2", 2000), NOW + 0.1, POLICY, 0.5)
    gone = claim(advance(back, left("S2", "PARTICIPANT_REMOVED", 2000), NOW + 0.2, POLICY, 0.5), NOW + 0.2, POLICY)
    assert (gone.state, gone.claim) == (State.ENDING, back.claim + 1)
    assert advance(gone, answered(gone, Action.SEND, Verdict.NOT_FOUND), NOW + 0.3, POLICY, 0.5).outcome is Outcome.SENT


# ── delegations that replace another ──


def new_row(like: DelayedEvent | None, before: DelayedEvent | None = None, accepted: Accept | None = None) -> DelayedEvent:
    asked = accepted or accept("D2")
    return delegate(before, before.id if before else 2, asked, asked.events[0], like, NOW, NOW, POLICY, 0.0)


def test_a_fresh_delegation_is_restarted_at_once() -> None:
    """Its countdown is at an unknown point, and may be about to run out: a part of it is assumed to be left."""
    made = new_row(None)
    assert_consistent(made)
    assert (made.presence, made.state, made.lane, made.due, made.harm) == (
        Presence.EXPECTED,
        State.LIVE,
        Lane.RESTART,
        NOW,
        NOW + DELAY * UNKNOWN_COUNTDOWN,
    )
    assert made.look_at == NOW + 1.0
    assert made.verified_at is None


def test_a_new_delegation_inherits_that_its_participant_is_connected() -> None:
    """No joined will come for somebody who is in the call already."""
    made = new_row(row())
    assert_consistent(made)
    assert (made.presence, made.sessions, made.look_at) == (Presence.CONNECTED, row().sessions, None)


@pytest.mark.parametrize("presence", [Presence.EXPECTED, Presence.AWAY, Presence.GONE])
def test_who_delegates_is_about_to_come_back(presence: Presence) -> None:
    """AWAY or GONE with a new delegation is EXPECTED: what goes on does not end, and what was being ended lives on."""
    there = advance(row(presence), accept("D2"), NOW, POLICY, 0.5)
    assert (there.presence, there.state, there.attempt_at) == (Presence.EXPECTED, State.LIVE, NOW)
    assert_consistent(new_row(there))
    early = advance(there, looked(sent_at=NOW + 3), NOW + 3, POLICY, 0.5)
    assert (early.presence, early.state) == (Presence.EXPECTED, State.LIVE)


def test_a_superseded_event_is_cancelled_whoever_comes_and_goes() -> None:
    """Left alone it would remove the new membership; sent, too."""
    for presence in Presence:
        there = supersede(row(presence), NOW, POLICY, 0.5)
        assert (there.state, there.due, action(there)) == (State.SUPERSEDED, NOW, Action.CANCEL)
        for given_input in (left("S1", "PARTICIPANT_REMOVED"), joined("S2", 2000)):
            assert action(advance(there, given_input, NOW, POLICY, 0.5)) is Action.CANCEL


@pytest.mark.parametrize("verdict", [Verdict.DONE, Verdict.NOT_FOUND, Verdict.CONFLICT, Verdict.REFUSED])
def test_every_definite_answer_to_the_cancellation_of_a_superseded_event_is_the_end_of_it(verdict: Verdict) -> None:
    """It was replaced, however it ended."""
    there = claim(supersede(row(), NOW, POLICY, 0.5), NOW, POLICY)
    assert advance(there, answered(there, Action.CANCEL, verdict), NOW, POLICY, 0.5).outcome is Outcome.REPLACED


def test_a_live_event_that_is_handed_over_again_goes_on() -> None:
    """Its countdown, its claims and its verification stay."""
    before = claimed(row())
    asked = accept("D2", "delay-1")
    after = new_row(before, before, asked)
    assert after == before._replace(delegation="D2", accepted_at=NOW)


def test_a_live_event_that_is_handed_over_with_other_words_is_verified_anew() -> None:
    """A corrected delay, or another wish for the end, holds from then on; a restart at once shows whether all is well."""
    before = row()
    after = new_row(before, before, accept("D2", "delay-1", on_end=OnEnd.CANCEL, delay=60.0))
    assert (after.delay, after.on_end, after.verified_at, after.due) == (60.0, OnEnd.CANCEL, None, NOW)
    assert_consistent(after)


def test_an_event_whose_goodbye_may_have_got_through_is_not_verified() -> None:
    """Handed over again while its send is under way, or after one whose answer was lost: only a restart tells whether it is there."""
    back = advance(gone_and_claimed(), joined("S2", 2000), NOW + 0.1, POLICY, 0.5)
    assert new_row(back, back, accept("D2", "delay-1")).verified_at is None
    under_way = claimed(row(state=State.SUPERSEDED))
    after = new_row(under_way, under_way, accept("D2", "delay-1"))
    assert (after.claimed, after.lane, after.due) == (True, Lane.END, under_way.due)  # a restart must not overtake the cancel


@pytest.mark.parametrize("state", [State.ENDING, State.SUPERSEDED, State.VANISHED, State.DONE])
def test_an_event_that_had_been_given_up_can_be_handed_over_again(state: State) -> None:
    """It begins anew under its old number; old answers do not fit."""
    before = row(POSSIBLE[state][0], state)
    after = new_row(None if state is State.DONE else advance(before, accept("D2"), NOW, POLICY, 0.5), before, accept("D2", "delay-1"))
    assert_consistent(after)
    assert (after.id, after.state, after.claim, after.outcome, after.verified_at) == (before.id, State.LIVE, before.claim, Outcome.OPEN, None)


@pytest.mark.parametrize("state", [State.ENDING, State.SUPERSEDED])
def test_an_ending_under_way_when_the_event_is_handed_over_again_is_remembered(state: State) -> None:
    """A 404 on the restart then means that the ending got through, not that the homeserver never knew it."""
    before = claimed(row(POSSIBLE[state][0], state))
    after = new_row(advance(before, accept("D2"), NOW, POLICY, 0.5), before, accept("D2", "delay-1"))
    assert after.end_tried


def test_a_delegation_is_never_born_gone() -> None:
    """Whichever row the presence is inherited from: who delegates is about to connect."""
    for state, presences in POSSIBLE.items():
        for presence in presences:
            assert_consistent(new_row(row(presence, state)))


def test_a_withdrawn_event_is_left_alone() -> None:
    """From every state but DONE, whatever is under way."""
    for before in possible_rows():
        if before.state is not State.DONE:
            after = advance(before, Withdraw("D1"), NOW, POLICY, 0.5)
            assert (after.state, after.outcome) == (State.DONE, Outcome.WITHDRAWN)


def test_a_withdrawn_event_can_be_delegated_again() -> None:
    """As if for the first time."""
    withdrawn = advance(row(), Withdraw("D1"), NOW, POLICY, 0.5)
    after = new_row(withdrawn, withdrawn, accept("D2", "delay-1"))
    assert_consistent(after)
    assert (after.state, after.presence, after.outcome) == (State.LIVE, Presence.EXPECTED, Outcome.OPEN)


@pytest.mark.parametrize(("delay", "restarts"), [(RESTARTS_TOLD, ["restarted", "restarted"]), (RESTARTS_TOLD - 1, [])])
def test_the_history_tells_the_course_of_a_call(delay: float, restarts: list[str]) -> None:
    """Delegated, connected, away, gone, ending, sent; restarts leave a line each where the delay is long, the first one as the confirmation."""
    there = new_row(None)._replace(delay=delay)
    lines = [note.what for note in story(None, there, accept("D2"), NOW)]

    def give(given_input: Given, now: float) -> None:
        nonlocal there
        after = advance(there, given_input, now, POLICY, 0.5)
        lines.extend(note.what for note in story(there, after, given_input, now))
        there = after

    for n in range(3):
        there = claim(there, NOW, POLICY)
        give(answered(there, Action.RESTART, Verdict.DONE), NOW + n)
    give(joined(), NOW + 4)
    give(left(), NOW + 5)
    give(looked(sent_at=NOW + 7), NOW + 7)
    there = claim(there, NOW + 7, POLICY)
    give(answered(there, Action.SEND, Verdict.FAILED), NOW + 8)
    there = claim(there, NOW + 9, POLICY)
    give(answered(there, Action.SEND, Verdict.DONE), NOW + 9)
    assert lines == ["delegated", "verified", *restarts, "connected", "away", "gone", "ending", "send_failed", "sent"]


# ── the operator ──


def test_an_event_that_the_operator_has_ended_is_sent_at_once_wherever_its_participant_is() -> None:
    """Expected, connected or away: its goodbye is due, and as it was the operator it is no departure that a look has to confirm."""
    for presence in (Presence.EXPECTED, Presence.CONNECTED, Presence.AWAY):
        ended = advance(row(presence=presence, sessions=(live("S1"),)), End("D1"), NOW, POLICY, 0.5)
        assert (ended.state, ended.presence, ended.lane, ended.due, ended.look_at) == (State.ENDING, Presence.GONE, Lane.END, NOW, None)
        assert ended.reason == ENDED_BY_OPERATOR


def test_an_event_that_the_operator_has_ended_lives_on_only_for_a_session_that_comes_later() -> None:
    """What a list still shows of the session that was ended does not undo it; who joins anew is in the call."""
    ended = advance(row(sessions=(live("S1"),)), End("D1"), NOW, POLICY, 0.5)
    shown = advance(ended, looked(listed("S1", "ACTIVE"), sent_at=NOW + 60), NOW + 60, POLICY, 0.5)
    assert shown.state is State.ENDING
    again = advance(ended, joined("S2"), NOW + 60, POLICY, 0.5)
    assert (again.state, again.presence) == (State.LIVE, Presence.CONNECTED)


def test_what_has_ended_already_is_not_ended_by_the_operator() -> None:
    """A superseded event goes on being cancelled, and a finished one stays as it is."""
    for state in (State.SUPERSEDED, State.DONE):
        assert advance(row(state=state), End("D1"), NOW, POLICY, 0.5).state is state


def test_what_is_taken_back_while_it_is_being_ended_may_have_been_ended() -> None:
    """The row says so, since nobody will ask any more; otherwise the event is at the homeserver as it was."""
    leaving = row(Presence.GONE, State.ENDING)
    assert advance(claim(leaving, NOW, POLICY), Withdraw("D1"), NOW, POLICY, 0.5).end_tried
    assert not advance(leaving, Withdraw("D1"), NOW, POLICY, 0.5).end_tried


@pytest.mark.parametrize("done", [False, True])
def test_who_delegates_anew_after_the_operator_has_ended_it_is_found_in_the_call(done: bool) -> None:
    """The session has gone on all the time: a look shows it, and its end is a departure like any other."""
    ended = advance(row(sessions=(live("S1"),)), End("D1"), NOW, POLICY, 0.5)
    if done:
        ended = advance(claim(ended, NOW, POLICY), answered(claim(ended, NOW, POLICY), Action.SEND, Verdict.DONE), NOW, POLICY, 0.5)
        assert ended.state is State.DONE
    given_anew = accept()
    before = advance(ended, given_anew, NOW + 5, POLICY, 0.5)
    anew = delegate(None, 2, given_anew, given_anew.events[0], before, NOW + 5, NOW + 5, POLICY, 0.5)
    for there in (anew, *(() if done else (before,))):
        shown = advance(there, looked(listed("S1"), sent_at=NOW + 7), NOW + 7, POLICY, 0.5)
        assert shown.presence is Presence.CONNECTED
        assert advance(shown, left("S1"), NOW + 60, POLICY, 0.5).presence is Presence.AWAY


def test_the_history_has_no_secrets() -> None:
    """No line has a delay_id in it."""
    for before, given_input in CASES[::7]:
        for note in story(before, advance(before, given_input, NOW, POLICY, 0.5), given_input, NOW):
            assert before.delay_id not in f"{note.what} {note.detail}"


# ── any history ──


@settings(max_examples=200)
@given(st.data())
def test_any_history_keeps_the_row_consistent(data: st.DataObject) -> None:
    """Random inputs, claims, supersessions and new delegations one after another, with time passing."""
    there, now = new_row(None), NOW
    for _ in range(data.draw(st.integers(1, 25))):
        now += data.draw(st.sampled_from([0.0, 0.1, 2.0, 16.0, 100.0, 4000.0]))
        what = data.draw(st.integers(0, 9))
        before = there
        if what == 0 and there.lane in (Lane.END, Lane.RESTART):
            there = claim(there, now, POLICY)
        elif what == 1:
            there = supersede(there, now, POLICY, 0.3)
        elif what == 2 and there.state in (State.DONE, State.LIVE):
            there = delegate(there, there.id, accept("D3", there.delay_id), NewEvent(there.delay_id, DELAY, OnEnd.SEND), there, now, now, POLICY, 0.5)
        else:
            shifted = data.draw(st.sampled_from(list(every_input(there)))) if what > 3 else answered(there, action(there), Verdict.DONE, sent_at=now)
            if isinstance(shifted, Looked):
                shifted = looked(*(shifted.participants or ()), sent_at=now) if shifted.participants is not None else look_failed(now)
            if not can_come(there, shifted):
                continue
            there = lifecycle.advance(there, shifted, now, POLICY, data.draw(st.sampled_from([0.0, 0.5, 0.99])))
        assert_consistent(there)
        assert before.state is not State.DONE or there is before or there.state is State.LIVE


def test_retries_heed_the_deadline() -> None:
    """However often it failed, a restart is tried again before an eighth of the time that is left has passed."""
    before = claimed(row(attempts=10, running_since=NOW - DELAY + 40.0))
    after = advance(before, answered(before, Action.RESTART, Verdict.FAILED), NOW, POLICY, 0.99)
    assert after.due is not None
    assert after.due <= NOW + 5.0


def test_sessions_of_a_finished_delegation_are_not_inherited_as_live() -> None:
    """Nobody told the finished row of their end."""
    withdrawn = advance(row(sessions=(live("S1"),)), Withdraw("D1"), NOW, POLICY, 0.5)
    assert not new_row(withdrawn).live_sids


# ── let run ──


def adrift(presence: Presence = Presence.CONNECTED, **changes: Any) -> DelayedEvent:
    return row(presence, State.ADRIFT, **changes)


@pytest.mark.parametrize("presence", POSSIBLE[State.ADRIFT])
def test_when_the_sfu_is_lost_the_event_is_let_run(presence: Presence) -> None:
    """Neither restarted nor ended, until an hour after it must have fired; it is still looked for, and the history says so."""
    before = row(presence)
    after = advance(before, SfuLost(SFU), NOW, POLICY, 0.5)
    assert_consistent(after)
    assert (after.state, after.presence, after.look_at) == (State.ADRIFT, presence, before.look_at)
    assert (after.lane, after.due, after.harm) == (Lane.TIMER, NOW + ADRIFT_CHECK, before.deadline + POLICY.adrift_keep)
    assert [note.what for note in story(before, after, SfuLost(SFU), NOW)] == ["adrift"]
    assert advance(after, SfuLost(SFU), NOW + 60.0, POLICY, 0.5) is after


def test_an_event_whose_deadline_has_passed_is_kept_as_long() -> None:
    """The client may have restarted it: an hour from now, not from then."""
    after = advance(row(running_since=NOW - 2 * DELAY), SfuLost(SFU), NOW, POLICY, 0.5)
    assert after.harm == NOW + POLICY.adrift_keep


@pytest.mark.parametrize("presence", [Presence.CONNECTED, Presence.EXPECTED])
def test_when_a_lost_sfu_is_heard_of_again_its_events_are_kept_alive(presence: Presence) -> None:
    """Whoever has no news of their own, too: a webhook of somebody else shows that it is there."""
    adrift = advance(row(presence), SfuLost(SFU), NOW, POLICY, 0.5)
    assert adrift.reason == SFU_LOST
    after = advance(adrift, SfuFound(SFU), NOW + 60.0, POLICY, 0.5)
    assert_consistent(after)
    assert (after.state, after.presence, after.reason) == (State.LIVE, presence, "")


def test_what_was_let_run_because_the_lists_contradict_each_other_waits_for_better_lists() -> None:
    """That the SFU is there was known."""
    adrift = row(state=State.ADRIFT)
    assert advance(adrift, SfuFound(SFU), NOW, POLICY, 0.5) is adrift


def test_an_event_that_was_let_run_is_looked_after_until_it_is_given_up() -> None:
    """Each minute, and then it has run out."""
    adrift = advance(row(), SfuLost(SFU), NOW, POLICY, 0.5)
    assert adrift.due is not None
    again = advance(adrift, Due(adrift.id), adrift.due, POLICY, 0.5)
    assert (again.state, again.due) == (State.ADRIFT, adrift.due + ADRIFT_CHECK)
    assert again.harm is not None
    over = advance(again._replace(due=again.harm), Due(again.id), again.harm, POLICY, 0.5)
    assert (over.state, over.outcome) == (State.DONE, Outcome.RAN_OUT)


@pytest.mark.parametrize("state", [State.ENDING, State.SUPERSEDED, State.VANISHED, State.DONE])
def test_what_is_not_kept_alive_is_not_let_run(state: State) -> None:
    """A goodbye that is due is said, whatever became of the SFU since."""
    for presence in POSSIBLE[state]:
        before = row(presence, state)
        assert advance(before, SfuLost(SFU), NOW, POLICY, 0.5) is before


def test_what_was_under_way_when_the_event_was_let_run() -> None:
    """The answer to a restart ends nothing; a goodbye that may have got through is remembered."""
    restarting = claimed(row())
    after = advance(restarting, SfuLost(SFU), NOW, POLICY, 0.5)
    assert (after.claimed, after.end_tried) == (False, False)
    for verdict in Verdict:
        assert advance(after, answered(restarting, Action.RESTART, verdict), NOW, POLICY, 0.5) is after
    ending = claimed(row(lane=Lane.END))
    after = advance(ending, SfuLost(SFU), NOW, POLICY, 0.5)
    assert after.end_tried
    told = advance(after, looked(listed()), NOW, POLICY, 0.5)
    assert (told.state, told.due) == (State.LIVE, NOW)


NEWS_OF_SOMEBODY: dict[str, tuple[Presence, Given, Presence]] = {
    "joined anew": (Presence.CONNECTED, joined("S2", 2000), Presence.CONNECTED),
    "joined, expected": (Presence.EXPECTED, joined("S2", 2000), Presence.CONNECTED),
    "joined, away": (Presence.AWAY, joined("S2", 2000), Presence.CONNECTED),
    "left": (Presence.CONNECTED, left(), Presence.AWAY),
    "aborted": (Presence.EXPECTED, aborted(), Presence.EXPECTED),
    "seen in a look": (Presence.CONNECTED, looked(listed()), Presence.CONNECTED),
    "seen in a look, expected": (Presence.EXPECTED, looked(listed()), Presence.CONNECTED),
    "missing in a look": (Presence.CONNECTED, looked(), Presence.AWAY),
    "absent in a look, expected": (Presence.EXPECTED, looked(), Presence.EXPECTED),
    "missing in a look in doubt": (Presence.CONNECTED, looked(doubtful=True), Presence.CONNECTED),
}


@pytest.mark.parametrize("what", list(NEWS_OF_SOMEBODY))
def test_whoever_is_heard_of_again_is_looked_after_again(what: str) -> None:
    """A webhook about the participant, or a look that was answered: restarted at its normal time, or at once where that has passed."""
    presence, news, expected = NEWS_OF_SOMEBODY[what]
    for running_since in (NOW - 60.0, NOW - 0.9 * DELAY):
        after = advance(adrift(presence, running_since=running_since), news, NOW, POLICY, 0.5)
        assert_consistent(after)
        assert (after.state, after.presence) == (State.LIVE, expected)
        assert after.due == max(NOW, running_since + 0.7 * DELAY)


@pytest.mark.parametrize(
    "news",
    [look_failed(), joined("S1"), left("S0", joined_at_ms=500), Due(1), answered(row(), Action.RESTART, Verdict.DONE)],
    ids=["a look that failed", "a joined told twice", "an old session's left", "its time is not up", "an old answer"],
)
def test_news_that_tell_nothing_leave_it_adrift(news: Given) -> None:
    """Only what says something about where the participant is brings it back."""
    before = adrift(sessions=(ended("S0"), live("S1")))
    assert advance(before, news, NOW, POLICY, 0.5).state is State.ADRIFT


@pytest.mark.parametrize("presence", [Presence.CONNECTED, Presence.AWAY])
def test_when_doubt_ends_contradicted_the_event_is_let_run(presence: Presence) -> None:
    """A list that was wrong for an hour does not show somebody whose joined has no left: neither kept alive for ever nor ended."""
    before = row(presence, sessions=(live(heard_at=NOW - 100.0),))
    look = replace(looked(), doubted_until=NOW - 50.0)
    after = advance(before, look, NOW, POLICY, 0.5)
    assert_consistent(after)
    assert (after.state, after.presence) == (State.ADRIFT, presence)
    assert advance(after, replace(look, sent_at=NOW + 60.0), NOW + 60.0, POLICY, 0.5).state is State.ADRIFT
    back = advance(after, looked(listed(), sent_at=NOW + 60.0), NOW + 60.0, POLICY, 0.5)
    assert (back.state, back.presence) == (State.LIVE, Presence.CONNECTED)


def test_a_session_that_began_after_the_doubt_can_go_missing() -> None:
    """Nothing contradicts the list then."""
    before = row(sessions=(live(heard_at=NOW - 40.0),))
    after = advance(before, replace(looked(), doubted_until=NOW - 50.0), NOW, POLICY, 0.5)
    assert (after.state, after.presence) == (State.LIVE, Presence.AWAY)


def test_who_is_found_to_be_gone_after_all_is_said_goodbye() -> None:
    """By order of the SFU at once; of somebody away by a look."""
    removed = advance(adrift(), left("S1", "PARTICIPANT_REMOVED"), NOW, POLICY, 0.5)
    assert (removed.state, removed.due, removed.harm) == (State.ENDING, NOW, NOW)
    away = adrift(Presence.AWAY, running_since=NOW - 2 * DELAY)
    gone = advance(away, looked(sent_at=NOW), NOW, POLICY, 0.5)
    assert (gone.state, gone.due, gone.harm, gone.end_tried) == (State.ENDING, NOW, away.presence_since, False)


@pytest.mark.parametrize(
    ("presence", "then"), [(Presence.CONNECTED, Presence.EXPECTED), (Presence.AWAY, Presence.EXPECTED), (Presence.GONE, Presence.GONE)]
)
def test_a_session_that_ended_before_its_participant_delegated(presence: Presence, then: Presence) -> None:
    """It is about to come back; but whom looks did not find after it had delegated, it is no news of."""
    before = row(presence, accepted_at=NOW - 10.0, sessions=(live(heard_at=NOW - 60.0),))
    after = advance(before, left("S1")._replace(made_at=NOW - 20.0, late=True), NOW, POLICY, 0.5)
    assert after.presence is then
    assert not after.live_sids


def test_a_session_that_began_after_its_participant_delegated_is_left() -> None:
    """Whatever the SFU's clock says."""
    before = row(accepted_at=NOW - 10.0, sessions=(live(heard_at=NOW - 5.0),))
    assert advance(before, left("S1")._replace(made_at=NOW - 20.0), NOW, POLICY, 0.5).presence is Presence.AWAY


def test_a_removal_from_before_the_delegation_is_not_believed_at_once() -> None:
    """It and the `joined` before it were held up, and whoever was removed may be back with another session, and has delegated anew."""
    before = row(accepted_at=NOW - 3.0, sessions=(live(heard_at=NOW - 1.0),))
    held_up = left("S1", "PARTICIPANT_REMOVED")._replace(made_at=NOW - 4.5)
    after = advance(before, held_up, NOW, POLICY, 0.5)
    assert (after.presence, after.state, after.look_at) == (Presence.AWAY, State.LIVE, NOW + POLICY.unseen_departure)
    assert advance(before, held_up._replace(made_at=NOW - 3.5), NOW, POLICY, 0.5).state is State.ENDING  # times are in whole seconds
    assert advance(before, held_up._replace(made_at=0.0), NOW, POLICY, 0.5).state is State.ENDING


@pytest.mark.parametrize(("left_over", "lease"), [(1000.0, POLICY.lease), (8.0, 4.0), (1.0, LEAST_LEASE), (-5.0, POLICY.lease)])
def test_a_restart_is_somebody_elses_while_there_is_time(left_over: float, lease: float) -> None:
    """Among several instances: whoever has claimed it may have died. One alone takes up what it had claimed when it starts."""
    before = row(lane=Lane.RESTART, due=NOW, harm=NOW + left_over)
    assert claim(before, NOW, POLICY, shared=True).due == NOW + lease
    assert claim(before, NOW, POLICY).due == NOW + POLICY.lease


def test_an_ending_is_leased_for_as_long_as_a_request_may_take() -> None:
    """Two of them would be one too many."""
    before = row(Presence.GONE, state=State.ENDING, lane=Lane.END, due=NOW, harm=NOW + 1.0)
    assert claim(before, NOW, POLICY, shared=True).due == NOW + POLICY.lease


def test_an_event_that_nobody_could_tell_of_has_run_out() -> None:
    """Not before an hour after its deadline, whatever the timer says."""
    before = adrift()
    assert before.harm is not None
    assert advance(before, Due(1), NOW, POLICY, 0.5) is before
    assert advance(before, Due(1), before.harm - 1.0, POLICY, 0.5).state is State.ADRIFT
    after = advance(before, Due(1), before.harm, POLICY, 0.5)
    assert_consistent(after)
    assert (after.state, after.outcome) == (State.DONE, Outcome.RAN_OUT)


def test_an_event_that_was_let_run_can_be_superseded_withdrawn_and_delegated_again() -> None:
    """Cancelled like any other; forgotten; restarted at once, with what is known of its participant."""
    assert action(supersede(adrift(), NOW, POLICY, 0.5)) is Action.CANCEL
    assert advance(adrift(), Withdraw("D1"), NOW, POLICY, 0.5).outcome is Outcome.WITHDRAWN
    for presence in POSSIBLE[State.ADRIFT]:
        before = advance(adrift(presence), accept("D2"), NOW, POLICY, 0.5)
        assert before.state is State.ADRIFT  # another event of the same participant: the new one does not tell where it is
        again = new_row(before, before, accept("D2", "delay-1"))
        assert_consistent(again)
        connected = presence is Presence.CONNECTED
        assert (again.state, again.due, again.verified_at, again.presence is Presence.CONNECTED) == (State.LIVE, NOW, None, connected)


# ── a room that comes up anew ──


def started(created_at: float) -> RoomChanged:
    return RoomChanged(SFU, "room", RoomNews.STARTED, "RM1", "EV1", created_at)


@pytest.mark.parametrize(
    ("joined_at", "over"), [(0.0, False), (NOW - 60.0, True), (NOW - 5.1, True), (NOW - 4.9, False), (NOW, False), (NOW + 60.0, False)]
)
def test_a_session_of_an_older_instance_of_the_room_is_over(joined_at: float, over: bool) -> None:
    """It began more than 5 s before the room. One whose beginning is unknown, or is within the error of clocks, is left alone."""
    before = row(sessions=(live("S1", int(joined_at * 1000)),))
    after = advance(before, started(NOW), NOW, POLICY, 0.5)
    if over:
        assert (after.presence, after.reason, after.look_at, after.live_sids) == (Presence.AWAY, ROOM_RESTARTED, NOW + 90.0, frozenset())
        assert advance(after, joined("S1", int(joined_at * 1000)), NOW + 1, POLICY, 0.5) == after  # the ghost in the lists does not count
        assert advance(after, looked(listed("S1"), sent_at=NOW + 30.0), NOW + 30.0, POLICY, 0.5).presence is Presence.AWAY
        assert advance(after, looked(listed("S1"), sent_at=NOW + 90.0), NOW + 90.0, POLICY, 0.5).presence is Presence.GONE
        assert advance(after, joined("S2", int(NOW * 1000)), NOW + 1, POLICY, 0.5).presence is Presence.CONNECTED
    else:
        assert after is before


def test_whoever_has_a_session_in_the_new_instance_stays() -> None:
    """Only the older one is over."""
    before = row(sessions=(live("S1", int((NOW - 60) * 1000)), live("S2", int((NOW + 1) * 1000))))
    after = advance(before, started(NOW), NOW + 2, POLICY, 0.5)
    assert (after.presence, after.live_sids) == (Presence.CONNECTED, frozenset({"S2"}))


def test_a_room_that_finished_makes_a_room_that_went_missing_a_usual_absence() -> None:
    """An empty list may be an SFU that restarted: 90 s. When it says that the room is over, 10 s from when it went missing are enough."""
    before = row(Presence.AWAY, reason=ROOM_MISSING, presence_since=NOW - 2.0, look_at=NOW + 88.0, sessions=(live(),))
    finished = RoomChanged(SFU, "room", RoomNews.FINISHED, "RM1", "EV2", NOW)
    after = advance(before, finished, NOW, POLICY, 0.5)
    assert (after.presence, after.reason, after.look_at) == (Presence.AWAY, MISSING, NOW + 8.0)
    for other in (row(), row(Presence.AWAY), row(Presence.EXPECTED), row(Presence.GONE)):
        assert advance(other, finished, NOW, POLICY, 0.5) is other


@pytest.mark.parametrize("reason", ["PARTICIPANT_REMOVED", "ROOM_DELETED"])
def test_a_removal_that_is_told_late_is_checked(reason: str) -> None:
    """They may be back already, with a session that nobody has told of yet."""
    after = advance(row(), left("S1", reason)._replace(late=True), NOW, POLICY, 0.5)
    assert (after.presence, after.look_at) == (Presence.AWAY, NOW + POLICY.look_gap)
    assert advance(row(), left("S1", reason), NOW, POLICY, 0.5).presence is Presence.GONE
