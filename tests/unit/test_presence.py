"""What webhooks and looks tell about a participant: every kind of knowledge with every kind of news, and any order of it."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sfu_delegate.delegation import presence
from sfu_delegate.delegation.lifecycle import PRESENCE, _apply, advance, look_due
from sfu_delegate.delegation.model import DelayedEvent, Listed, Looked, Presence, Seen, Session, Sighting, State
from sfu_delegate.delegation.policy import DEPARTURES, MISSING, NEVER_JOINED, ROOM_MISSING, ROOM_RESTARTED, Unasked
from sfu_delegate.delegation.presence import KEPT_SESSIONS, Finding, Sign

from tests.rows import ALICE, NOW, POLICY, aborted, ended, joined, left, listed, live, look_failed, looked, row

AT_ONCE = sorted(reason for reason, departure in DEPARTURES.items() if departure.look_after == 0)
CHECKED = sorted(reason for reason, departure in DEPARTURES.items() if departure.look_after > 0)
REASONS = [*DEPARTURES, "", "A_REASON_OF_THE_FUTURE", "17"]

KNOWLEDGE: dict[str, tuple[Session, ...]] = {
    "nothing": (),
    "one live": (live("S1"),),
    "one ended": (ended("S1", 1000),),
    "ended, then live": (ended("S0", 500), live("S1")),
    "live, then ended": (live("S0", 500), ended("S1", 1000)),
    "two live": (live("S0", 500), live("S1")),
    "live without sid": (live("", 0),),
    "ended, and live without sid": (ended("S1", 1000), live("", 0)),
    "live without times": (live("S1", 0),),
}


def rows() -> list[DelayedEvent]:
    """A row for every presence with every kind of knowledge that is possible with it, and some that are hardly so."""
    return [row(p, sessions=sessions) for p, sessions in itertools.product(Presence, KNOWLEDGE.values())]


def news() -> list[Seen | Looked]:
    """Webhooks of known, ended, unknown and empty sids with every reason, and looks that show everything there is."""
    sids = [("S0", 500), ("S1", 1000), ("S1", 0), ("S2", 2000), ("S2", 0), ("", 0), ("OLD", 1)]
    given: list[Seen | Looked] = [joined(sid, at) for sid, at in sids]
    given += [make(sid, reason, at) for make in (left, aborted) for sid, at in sids for reason in REASONS]
    states = ["ACTIVE", "JOINED", "JOINING", "DISCONNECTED"]
    shown: list[tuple[Listed, ...]] = [(), (listed("S9", identity="bob"),), (listed("S0"), listed("S2", "JOINED"))]
    shown += [(listed(sid, state, at),) for sid, at in sids for state in states]
    for sent_at, doubtful in itertools.product((NOW - 500, NOW - 1.0, NOW, NOW + 500), (False, True)):
        given += [looked(*entries, sent_at=sent_at, doubtful=doubtful) for entries in shown]
        given.append(look_failed(sent_at))
    return given


NEWS = news()


def found(before: DelayedEvent, given_news: Seen | Looked) -> Finding:
    if isinstance(given_news, Seen):
        return presence.of_webhook(before, given_news, NOW, POLICY)
    return presence.of_look(before, given_news, NOW, POLICY)


def test_every_state_has_an_answer_to_every_news() -> None:
    """No combination raises, and every sign that comes out is in the table."""
    for before, given_news in itertools.product(rows(), NEWS):
        finding = (
            presence.of_webhook(before, given_news, NOW, POLICY)
            if isinstance(given_news, Seen)
            else presence.of_look(before, given_news, NOW, POLICY)
        )
        assert finding.sign is Sign.NOTHING or (before.presence, finding.sign) in PRESENCE, (before.presence, before.sessions, given_news)


def test_the_table_names_only_presences_and_signs_and_never_nothing() -> None:
    """`Sign.NOTHING` changes nothing, so it has no entry."""
    assert all(sign is not Sign.NOTHING for _, sign in PRESENCE)


def test_every_presence_can_be_left_and_reached() -> None:
    """No state of the table is a trap."""
    for state in Presence:
        assert any(old is state and new is not state for (old, _), new in PRESENCE.items())
        assert any(old is not state and new is state for (old, _), new in PRESENCE.items())


def test_only_conclusive_signs_end_anything() -> None:
    """GONE is reached by an order of the SFU's, or by a conclusive look, and by nothing else."""
    signs = {sign for (old, sign), new in PRESENCE.items() if new is Presence.GONE and old is not Presence.GONE}
    assert signs == {Sign.REMOVED, Sign.GIVEN_UP}


def test_the_presence_that_comes_out_is_the_table_s() -> None:
    """advance() follows the table: the presence afterwards is what it says for the sign."""
    for before, given_news in itertools.product(rows(), NEWS):
        finding = (
            presence.of_webhook(before, given_news, NOW, POLICY)
            if isinstance(given_news, Seen)
            else presence.of_look(before, given_news, NOW, POLICY)
        )
        expected = before.presence if finding.sign is Sign.NOTHING else PRESENCE[before.presence, finding.sign]
        assert advance(before, given_news, NOW, POLICY, 0.5).presence is expected


def test_a_look_that_shows_what_is_known_would_change_nothing() -> None:
    """It is not thought through; if it were, the same would come of it, whatever the row has been through."""
    looks = [given_news for given_news in NEWS if isinstance(given_news, Looked)]
    starts = [row(Presence.CONNECTED, state=state, sessions=sessions) for state in State for sessions in KNOWLEDGE.values()]
    starts += [advance(before, given_news, NOW, POLICY, 0.5) for before in rows() for given_news in NEWS]
    starts += [before._replace(reason="MIGRATION") for before in rows()] + [before._replace(look_at=NOW) for before in rows()]
    known = 0
    for before in dict.fromkeys(starts):
        for look in looks:
            if presence.is_as_known(before, look) and before.state is State.LIVE:
                known += 1
                finding = presence.of_look(before, look, NOW, POLICY)
                assert _apply(before, finding, NOW, POLICY, 0.5) is before
    assert known > 100


def test_a_repeated_webhook_changes_nothing() -> None:
    """The same webhook twice, with a sid, ends where it ended the first time."""
    for before, seen in itertools.product(rows(), [n for n in NEWS if isinstance(n, Seen) and n.sid]):
        once = advance(before, seen, NOW, POLICY, 0.5)
        twice = advance(once, seen, NOW, POLICY, 0.5)
        assert twice.presence is once.presence, (before.presence, before.sessions, seen)
        assert twice.sessions == once.sessions
        assert twice.look_at == once.look_at, (before.presence, before.sessions, seen)


# ── webhooks ──


@pytest.mark.parametrize("before", list(Presence))
def test_a_new_session_is_an_arrival(before: Presence) -> None:
    """Whatever we thought: a session that was never heard of joined."""
    after = advance(row(before), joined("NEW", 9000), NOW, POLICY, 0.5)
    assert after.presence is Presence.CONNECTED
    assert "NEW" in after.live_sids
    assert after.look_at is None


@pytest.mark.parametrize("before", list(Presence))
def test_a_late_joined_of_an_ended_session_is_ignored(before: Presence) -> None:
    """The tombstone stops it."""
    there = row(before, sessions=(*row(before).sessions, ended("OLD", 1)))
    assert advance(there, joined("OLD", 1), NOW, POLICY, 0.5) == there


@pytest.mark.parametrize("reason", CHECKED)
def test_a_departure_is_a_claim_that_a_look_will_check(reason: str) -> None:
    """The last session left: AWAY, and the SFU is asked when the reason says so."""
    after = advance(row(), left("S1", reason), NOW, POLICY, 0.5)
    assert (after.presence, after.reason) == (Presence.AWAY, reason)
    assert after.look_at == NOW + POLICY.departure(reason).look_after


@pytest.mark.parametrize("reason", AT_ONCE)
def test_who_was_removed_is_gone_at_once(reason: str) -> None:
    """No look is needed where the SFU itself ended it."""
    after = advance(row(), left("S1", reason), NOW, POLICY, 0.5)
    assert (after.presence, after.ended_at, after.reason) == (Presence.GONE, NOW, reason)


@pytest.mark.parametrize("reason", ["", "UNKNOWN_REASON", "A_REASON_OF_THE_FUTURE", "17"])
def test_reasons_of_the_future_are_checked_like_a_broken_connection(reason: str) -> None:
    """Nobody knows what they mean, so a look decides after 5 s."""
    after = advance(row(), left("S1", reason), NOW, POLICY, 0.5)
    assert (after.presence, after.look_at) == (Presence.AWAY, NOW + 5.0)


def test_a_takeover_in_the_recorded_order_is_no_departure() -> None:
    """left DUPLICATE_IDENTITY of the old session, then joined of the new one."""
    away = advance(row(), left("S1", "DUPLICATE_IDENTITY"), NOW, POLICY, 0.5)
    assert (away.presence, away.look_at) == (Presence.AWAY, NOW + 15.0)
    assert advance(away, joined("S2", 2000), NOW + 0.03, POLICY, 0.5).presence is Presence.CONNECTED


def test_a_takeover_in_the_other_order_is_no_departure() -> None:
    """joined of the new session, then left of the old one, however late."""
    both = advance(row(), joined("S2", 2000), NOW, POLICY, 0.5)
    for reason in REASONS:
        after = advance(both, left("S1", reason), NOW + 51.0, POLICY, 0.5)
        assert (after.presence, after.live_sids) == (Presence.CONNECTED, frozenset({"S2"}))


def test_a_failed_takeover_is_a_departure() -> None:
    """After left DUPLICATE_IDENTITY, the abort of the session that took over is the last word, and its reason counts."""
    away = advance(row(), left("S1", "DUPLICATE_IDENTITY"), NOW, POLICY, 0.5)
    after = advance(away, aborted("S2", "SIGNAL_CLOSE", 2000), NOW + 1.0, POLICY, 0.5)
    assert (after.presence, after.reason, after.look_at) == (Presence.AWAY, "SIGNAL_CLOSE", NOW + 1.0 + 5.0)


def test_a_failed_attempt_beside_a_live_session_is_nothing() -> None:
    """Whoever is connected stays so when a second connection of theirs is aborted."""
    after = advance(row(), aborted("S2", "DUPLICATE_IDENTITY", 2000), NOW, POLICY, 0.5)
    assert (after.presence, after.look_at) == (Presence.CONNECTED, None)


def test_an_aborted_migration_ends_the_session_that_it_names() -> None:
    """The known exception: aborted is told of a session that had been active."""
    assert advance(row(), aborted("S1", "MIGRATION"), NOW, POLICY, 0.5).presence is Presence.AWAY


def test_an_abort_without_a_sid_is_not_the_session_that_goes_on() -> None:
    """An attempt that failed does not end who is connected."""
    assert advance(row(), aborted("", "SIGNAL_CLOSE", 0), NOW, POLICY, 0.5) == row()


def test_an_attempt_that_fails_begins_the_join_timeout_anew() -> None:
    """Somebody who is expected and tries gets the full time again."""
    before = row(Presence.EXPECTED, attempt_at=NOW - 100.0)
    after = advance(before, aborted("S1", "JOIN_FAILURE"), NOW, POLICY, 0.5)
    assert (after.presence, after.attempt_at) == (Presence.EXPECTED, NOW)
    assert after.look_at == NOW + POLICY.look_again


def test_a_short_first_session_does_not_end_the_delegation() -> None:
    """Clients open a session and drop it before the real one: joined, left 0.1 s later, joined anew."""
    expected = row(Presence.EXPECTED)
    first = advance(advance(expected, joined("S1"), NOW, POLICY, 0.5), left("S1"), NOW + 0.1, POLICY, 0.5)
    assert first.presence is Presence.AWAY
    assert advance(first, joined("S2", 2000), NOW + 0.5, POLICY, 0.5).presence is Presence.CONNECTED


@pytest.mark.parametrize("reason", REASONS)
def test_a_departure_of_somebody_never_seen_gets_more_time(reason: str) -> None:
    """The left of a session that began before the delegation is checked no sooner than 10 s later, whatever its reason."""
    after = advance(row(Presence.EXPECTED), left("S0", reason), NOW, POLICY, 0.5)
    assert after.presence is Presence.AWAY
    assert after.look_at is not None
    assert after.look_at >= NOW + POLICY.unseen_departure


def test_a_participant_without_sids_joins_and_leaves() -> None:
    """Hand-made webhooks may lack the sid and the times: the current session is meant."""
    there = advance(row(Presence.EXPECTED), joined("", 0), NOW, POLICY, 0.5)
    assert there.presence is Presence.CONNECTED
    away = advance(there, left("", "CLIENT_INITIATED", 0), NOW + 5, POLICY, 0.5)
    assert away.presence is Presence.AWAY
    again = advance(away, joined("", 0), NOW + 6, POLICY, 0.5)
    assert again.presence is Presence.CONNECTED


def test_a_left_without_a_sid_ends_the_current_session() -> None:
    """Also where the joined had a sid."""
    after = advance(row(), left("", "CLIENT_INITIATED", 0), NOW, POLICY, 0.5)
    assert (after.presence, after.live_sids) == (Presence.AWAY, frozenset())
    assert advance(after, joined("S1"), NOW, POLICY, 0.5).presence is Presence.AWAY


def test_a_session_without_a_sid_leaves_no_tombstone() -> None:
    """It would stop the next join, which has none either."""
    after = advance(row(sessions=(live("", 0),)), left("", "CLIENT_INITIATED", 0), NOW, POLICY, 0.5)
    assert after.sessions == ()


def test_a_departure_told_twice_does_not_put_off_the_look() -> None:
    """The first telling counts."""
    once = advance(row(), left("S1"), NOW, POLICY, 0.5)
    assert advance(once, left("S1"), NOW + 1.5, POLICY, 0.5) == once


def test_a_session_whose_end_was_lost_does_not_hide_a_later_departure() -> None:
    """S0's left never came; S1 joined after it and left: perhaps nobody is there, and a look will tell."""
    before = row(sessions=(live("S0", 500), live("S1", 1000)))
    assert advance(before, left("S1"), NOW, POLICY, 0.5).presence is Presence.AWAY


def test_a_late_left_of_an_unknown_older_session_is_nothing() -> None:
    """Whoever joined later goes on."""
    after = advance(row(), left("OLD", "CONNECTION_TIMEOUT", 1), NOW, POLICY, 0.5)
    assert (after.presence, after.look_at) == (Presence.CONNECTED, None)


def test_sessions_of_the_past_do_not_pile_up() -> None:
    """A participant who reconnects for days keeps the size of its row, and the newest sessions."""
    there = row()
    for n in range(1, 100):
        there = advance(there, joined(f"R{n}", 1000 + n), NOW + n, POLICY, 0.5)
        there = advance(there, left(f"R{n}", "CLIENT_INITIATED", 1000 + n), NOW + n + 0.5, POLICY, 0.5)
    assert len(there.sessions) <= 2 * KEPT_SESSIONS
    assert "R99" in {s.sid for s in there.sessions}


# ── looks ──


def test_a_look_that_shows_a_new_session_is_an_arrival() -> None:
    """Also when its webhook was lost, and for every presence."""
    for before in Presence:
        after = advance(row(before), looked(listed("S2", "ACTIVE", 2000)), NOW, POLICY, 0.5)
        assert (after.presence, "S2" in after.live_sids) == (Presence.CONNECTED, True)


def test_a_look_counts_by_either_form_of_the_identity() -> None:
    """The client may have got a token for the other one."""
    before = row(Presence.EXPECTED, alias="alice-hashed")
    assert advance(before, looked(listed(identity="alice-hashed")), NOW, POLICY, 0.5).presence is Presence.CONNECTED


def test_a_look_that_shows_an_ended_session_is_neither_presence_nor_absence() -> None:
    """The list is late: look again soon."""
    away = row(Presence.AWAY)
    after = advance(away, looked(listed("S1")), NOW, POLICY, 0.5)
    assert (after.presence, after.look_at) == (Presence.AWAY, NOW + POLICY.look_again)


def test_a_look_that_was_too_early_concludes_nothing() -> None:
    """It was sent before the time that the departure's reason asks for."""
    away = row(Presence.AWAY, look_at=NOW + 1.0)
    assert advance(away, looked(sent_at=NOW), NOW + 1.5, POLICY, 0.5) == away


def test_a_look_at_its_time_that_shows_nobody_is_the_end() -> None:
    """Gone since the departure, not since the look."""
    away = row(Presence.AWAY, look_at=NOW)
    after = advance(away, looked(sent_at=NOW), NOW + 0.2, POLICY, 0.5)
    assert (after.presence, after.ended_at) == (Presence.GONE, away.presence_since)


def test_somebody_joining_is_waited_for_a_minute() -> None:
    """JOINED in a look: stay, but not for ever."""
    away = row(Presence.AWAY, presence_since=NOW - 59.0)
    still = advance(away, looked(listed("S2", "JOINED")), NOW, POLICY, 0.5)
    assert still.presence is Presence.AWAY
    assert still.look_at is not None
    assert still.look_at == NOW + 1.0  # in time for what is decided then
    over = advance(still, looked(listed("S2", "JOINED"), sent_at=still.look_at), still.look_at, POLICY, 0.5)
    assert over.presence is Presence.GONE


def test_somebody_missing_is_looked_for_again() -> None:
    """An absence that nobody announced is confirmed by a second look after 10 s."""
    others = listed("S9", identity="bob")
    missing = advance(row(), looked(others), NOW, POLICY, 0.5)
    assert (missing.presence, missing.reason, missing.look_at) == (Presence.AWAY, MISSING, NOW + 10.0)
    assert advance(missing, looked(others, sent_at=NOW + 9), NOW + 9, POLICY, 0.5).presence is Presence.AWAY
    assert advance(missing, looked(others, sent_at=NOW + 10), NOW + 10, POLICY, 0.5).presence is Presence.GONE


def test_somebody_missing_who_is_back_in_the_list_is_connected() -> None:
    """With the same session, too."""
    missing = advance(row(), looked(listed("S9", identity="bob")), NOW, POLICY, 0.5)
    assert advance(missing, looked(listed("S1"), sent_at=NOW + 10), NOW + 10, POLICY, 0.5).presence is Presence.CONNECTED


def test_a_room_that_vanished_as_a_whole_gets_90_seconds() -> None:
    """An SFU that restarted knows nobody until its clients are back."""
    missing = advance(row(), looked(), NOW, POLICY, 0.5)
    assert (missing.presence, missing.reason, missing.look_at) == (Presence.AWAY, ROOM_MISSING, NOW + 90.0)


def test_a_look_concludes_only_about_what_had_settled() -> None:
    """Who joined within the 2 s before a look was sent is not missing in it."""
    fresh = row(presence_since=NOW - 1.0, sessions=(live("S1", 1000, NOW - 1.0),))
    assert advance(fresh, looked(sent_at=NOW), NOW + 0.1, POLICY, 0.5) == fresh
    assert advance(fresh, looked(sent_at=NOW + 1.0), NOW + 1.1, POLICY, 0.5).presence is Presence.AWAY


def test_a_newer_session_starts_the_settling_anew() -> None:
    """A takeover just before the look was sent is not concluded about either."""
    before = row(sessions=(live("S1"), live("S2", 2000, NOW - 0.5)))
    assert advance(before, looked(sent_at=NOW), NOW + 0.1, POLICY, 0.5) == before


def test_in_doubt_an_absence_proves_nothing() -> None:
    """A node was away, and its lists are wrong for long."""
    assert advance(row(), looked(doubtful=True), NOW, POLICY, 0.5) == row()
    assert advance(row(), looked(listed("S9", identity="bob"), doubtful=True), NOW, POLICY, 0.5) == row()


@pytest.mark.parametrize("reason", [MISSING, ROOM_MISSING])
def test_a_doubt_that_arises_between_two_looks_stops_the_second(reason: str) -> None:
    """A joined without its own left outweighs an absence in doubt, also when the first look was made before."""
    missing = row(Presence.AWAY, sessions=(live("S1"),), reason=reason, look_at=NOW)
    assert advance(missing, looked(sent_at=NOW, doubtful=True), NOW, POLICY, 0.5).presence is not Presence.GONE


def test_somebody_expected_is_given_up_when_the_join_timeout_is_over() -> None:
    """2 minutes after the last sign of an attempt, by a look that does not show them."""
    before = row(Presence.EXPECTED, attempt_at=NOW - 120.0)
    early = advance(before, looked(sent_at=NOW - 0.1), NOW, POLICY, 0.5)
    assert (early.presence, early.look_at) == (Presence.EXPECTED, NOW + POLICY.look_again)
    over = advance(before, looked(sent_at=NOW), NOW, POLICY, 0.5)
    assert (over.presence, over.reason, over.ended_at) == (Presence.GONE, NEVER_JOINED, NOW)


def test_somebody_expected_who_is_joining_gets_the_join_timeout_anew() -> None:
    """JOINED in a look shows that they are trying."""
    before = row(Presence.EXPECTED, attempt_at=NOW - 119.0)
    after = advance(before, looked(listed("S1", "JOINED")), NOW, POLICY, 0.5)
    assert (after.presence, after.attempt_at) == (Presence.EXPECTED, NOW)


def test_somebody_expected_is_looked_for_less_and_less_often() -> None:
    """1, 3, 8, 20, 45 s after the delegation, and when the join timeout is over."""
    there = row(Presence.EXPECTED, attempt_at=NOW, look_at=NOW + 1.0)
    times = []
    while there.presence is Presence.EXPECTED and there.look_at is not None:
        times.append(there.look_at - NOW)
        there = advance(there, looked(sent_at=there.look_at), there.look_at, POLICY, 0.5)
    assert times == [1.0, 3.0, 8.0, 20.0, 45.0, 120.0]
    assert there.presence is Presence.GONE


# ── looks that fail ──


@pytest.mark.parametrize("before", [Presence.EXPECTED, Presence.CONNECTED])
def test_failing_to_ask_says_nothing_about_those_who_have_not_departed(before: Presence) -> None:
    """However long it goes on."""
    there = row(before, attempt_at=NOW - 9000.0)
    assert advance(there, look_failed(), NOW + 9000.0, POLICY, 0.5).presence is before


@pytest.mark.parametrize("reason", [r for r, d in DEPARTURES.items() if d.unasked is Unasked.GONE])
def test_a_goodbye_counts_when_the_sfu_cannot_be_asked(reason: str) -> None:
    """Who said goodbye, or was removed, is gone when its look's time has come."""
    away = row(Presence.AWAY, reason=reason, look_at=NOW)
    assert advance(away, look_failed(NOW), NOW + 1.0, POLICY, 0.5).presence is Presence.GONE


@pytest.mark.parametrize("reason", [r for r, d in DEPARTURES.items() if d.unasked is Unasked.AFTER])
def test_a_broken_connection_counts_after_a_minute_when_the_sfu_cannot_be_asked(reason: str) -> None:
    """60 s since the departure, not sooner."""
    away = row(Presence.AWAY, reason=reason, look_at=NOW, presence_since=NOW - 59.0)
    still = advance(away, look_failed(NOW), NOW, POLICY, 0.5)
    assert still.presence is Presence.AWAY
    again = look_due(still, NOW, NOW, POLICY)
    assert again == NOW + 1.0  # in time for what is decided then
    over = advance(still, look_failed(again), again, POLICY, 0.5)
    assert (over.presence, over.ended_at) == (Presence.GONE, away.presence_since)


@pytest.mark.parametrize("reason", [r for r, d in DEPARTURES.items() if d.unasked is Unasked.CONNECTED])
def test_a_takeover_counts_as_connected_when_the_sfu_cannot_be_asked(reason: str) -> None:
    """However long it goes on."""
    away = row(Presence.AWAY, reason=reason, look_at=NOW, presence_since=NOW - 9000.0)
    assert advance(away, look_failed(NOW), NOW, POLICY, 0.5).presence is Presence.AWAY


@pytest.mark.parametrize("look_at", [NOW - 1.0, None])
def test_who_is_away_is_asked_about_again_after_a_look_that_failed(look_at: float | None) -> None:
    """At the time that it had; somebody of whom lists told nothing had none."""
    away = row(Presence.AWAY, reason=MISSING, presence_since=NOW - 40.0, look_at=look_at)
    still = advance(away, look_failed(NOW), NOW, POLICY, 0.5)
    assert still.look_at == (NOW + 10.0 if look_at is None else look_at)
    assert look_due(still, NOW, NOW, POLICY) == NOW + 10.0
    assert look_due(still, NOW, NOW, POLICY, 5.0) == NOW + (10.0 if look_at is None else 5.0)


def test_a_failed_look_before_its_time_does_not_end_anything() -> None:
    """Somebody else's look at the same room is none about this departure yet."""
    away = row(Presence.AWAY, look_at=NOW + 2.0)
    assert advance(away, look_failed(NOW), NOW + 1.0, POLICY, 0.5).presence is Presence.AWAY


@pytest.mark.parametrize("reason", ["SERVER_SHUTDOWN", "DUPLICATE_IDENTITY"])
def test_a_failed_look_before_its_time_does_not_bring_the_look_forward(reason: str) -> None:
    """The time that the reason asks for is waited for, whoever else in the room is looked for meanwhile."""
    away = advance(row(), left("S1", reason), NOW, POLICY, 0.5)
    after = advance(away, look_failed(NOW + 1.0), NOW + 1.0, POLICY, 0.5)
    assert away.look_at is not None
    assert after.look_at is not None
    assert after.look_at >= away.look_at


@pytest.mark.parametrize("reason", ["SERVER_SHUTDOWN", "DUPLICATE_IDENTITY"])
def test_a_sign_of_a_connection_attempt_does_not_bring_the_look_forward(reason: str) -> None:
    """Somebody who is just coming back does not get less time than somebody of whom nothing is seen."""
    away = advance(row(), left("S1", reason), NOW, POLICY, 0.5)
    after = advance(away, looked(listed("S2", "JOINING", 2000), sent_at=NOW + 1.0), NOW + 1.0, POLICY, 0.5)
    assert away.look_at is not None
    assert after.look_at is not None
    assert after.look_at >= away.look_at


def test_somebody_joining_is_not_given_up_before_the_time_that_the_reason_asks_for() -> None:
    """A room that vanished gets 90 s: whoever is shown as joining after 65 s has less than nobody at all otherwise."""
    missing = row(Presence.AWAY, sessions=(live(),), reason=ROOM_MISSING, presence_since=NOW - 65.0, look_at=NOW + 25.0)
    assert advance(missing, looked(listed("S2", "JOINED", 2000)), NOW, POLICY, 0.5).presence is Presence.AWAY


def test_a_look_from_before_the_departure_does_not_put_off_the_next() -> None:
    """It was sent while the session was still there, and so lists it; its answer came after the left."""
    away = advance(row(), left("S1"), NOW, POLICY, 0.5)
    after = advance(away, looked(listed("S1"), sent_at=NOW - 0.05), NOW + 0.05, POLICY, 0.5)
    assert (after.presence, after.look_at) == (Presence.AWAY, NOW + 2.0)


def test_a_live_session_outweighs_a_look_that_failed() -> None:
    """Missing in one look, and then nobody could be asked: as if connected."""
    missing = row(Presence.AWAY, sessions=(live(),), reason="CLIENT_INITIATED", look_at=NOW, presence_since=NOW - 9000)
    assert advance(missing, look_failed(NOW), NOW, POLICY, 0.5).presence is Presence.AWAY


# ── any order ──

CHECKED_BY_A_LOOK = st.sampled_from([reason for reason in CHECKED if reason.isupper() and reason not in ("MISSING", "ROOM_MISSING", "OTHER")])


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[Seen], bool]:
    """The webhooks of one participant's sessions one after another, in order, and whether the last session is live in the end."""
    webhooks: list[Seen] = []
    count = draw(st.integers(1, 4))
    stays = draw(st.booleans())
    for n in range(count):
        sid, at = f"S{n}", 1000 * (n + 1)
        if draw(st.booleans()) and not (n == count - 1 and stays):
            webhooks.append(Seen("main", "room", ALICE, Sighting.ABORTED, sid, at, draw(CHECKED_BY_A_LOOK)))
            continue
        webhooks.append(Seen("main", "room", ALICE, Sighting.JOINED, sid, at))
        if not (n == count - 1 and stays):
            webhooks.append(Seen("main", "room", ALICE, Sighting.LEFT, sid, at, draw(CHECKED_BY_A_LOOK)))
    return webhooks, stays


def newest(webhooks: list[Seen]) -> Seen:
    return webhooks[-1]


def settle(there: DelayedEvent, now: float, shown: tuple[Listed, ...]) -> DelayedEvent:
    """Look truthfully, whenever the row asks for it, until it asks no more."""
    for _ in range(100):
        if there.look_at is None or there.presence is Presence.GONE:
            return there
        now = max(now, there.look_at) + 0.1
        there = advance(there, looked(*shown, sent_at=now), now, POLICY, 0.5)
    raise AssertionError(f"never settled: {there}")


@settings(max_examples=300)
@given(lives(), st.sampled_from([Presence.EXPECTED, Presence.CONNECTED]), st.data())
def test_any_order_and_repetition_comes_to_the_same_end(life: tuple[list[Seen], bool], start: Presence, data: st.DataObject) -> None:
    """The same webhooks in any order, some of them twice, and then truthful looks: the same presence as in order."""
    webhooks, stays = life
    order = data.draw(st.permutations(webhooks + data.draw(st.lists(st.sampled_from(webhooks), max_size=3))))
    there = row(start, sessions=())
    now = NOW
    for seen in order:
        now += 0.05
        there = advance(there, seen, now, POLICY, 0.5)
    if stays:
        there = settle(there, now, (listed(newest(webhooks).sid, "ACTIVE", newest(webhooks).joined_at_ms),))
        assert there.presence is Presence.CONNECTED
    else:
        assert there.presence is not Presence.CONNECTED or start is Presence.CONNECTED or any(w.what is Sighting.JOINED for w in webhooks)
        # Somebody who was connected, and of whom only aborts are heard, is missing in the next look at the room.
        now += POLICY.settled + 0.1
        there = advance(there, looked(sent_at=now), now, POLICY, 0.5)
        assert settle(there, now, ()).presence is Presence.GONE


@settings(max_examples=300)
@given(lives(), st.sampled_from(list(Presence)), st.data())
@example(([joined("S0"), left("S0"), joined("S1", 2000)], True), Presence.EXPECTED, None)
def test_webhooks_alone_never_end_somebody_whose_newest_session_is_live(
    life: tuple[list[Seen], bool], start: Presence, data: st.DataObject | None
) -> None:
    """Once the newest session's joined was heard, no order of the webhooks takes its participant to GONE."""
    webhooks, stays = life
    if not stays:
        return
    order = webhooks if data is None else data.draw(st.permutations(webhooks * 2))
    there, heard = row(start, sessions=()), False
    for n, seen in enumerate(order):
        there = advance(there, seen, NOW + n * 0.05, POLICY, 0.5)
        heard = heard or seen == newest(webhooks)
        assert not heard or there.presence is Presence.CONNECTED
    assert heard


@settings(max_examples=200)
@given(st.lists(st.sampled_from(NEWS), max_size=30), st.sampled_from(rows()))
def test_a_live_newest_session_is_ended_only_by_its_own_left_or_by_looks(history: list[Seen | Looked], start: DelayedEvent) -> None:
    """Whatever came before, and whatever is heard of other sessions."""
    there = start
    for n, given_news in enumerate(history):
        there = advance(there, given_news, NOW + n, POLICY, 0.5)
    now = NOW + len(history)
    there = advance(there, joined("NEWEST", 10**6), now, POLICY, 0.5)
    for n, other in enumerate(g for g in history if isinstance(g, Seen) and g.sid):
        there = advance(there, other, now + n, POLICY, 0.5)
        assert there.presence is Presence.CONNECTED


def test_a_late_end_of_somebody_elses_session_ends_nobody_who_cannot_be_looked_for() -> None:
    """Delegated while in the call, `joined` not heard; an old session's end comes late, and the SFU cannot be asked: not known is not gone."""
    expected = row(Presence.EXPECTED, sessions=())
    away = advance(expected, left("S0", "CLIENT_INITIATED", 500), NOW, POLICY, 0.5)
    assert away.look_at is not None
    assert advance(away, look_failed(away.look_at), away.look_at, POLICY, 0.5).presence is Presence.AWAY


@pytest.mark.parametrize(
    ("reason", "before", "wait"),
    [
        (ROOM_RESTARTED, 119.0, 30.0),
        (ROOM_RESTARTED, 120.0, 10.0),  # their 90 s, and 30 s, had passed when it failed once more
        ("SERVER_SHUTDOWN", 59.0, 30.0),
        ("SERVER_SHUTDOWN", 60.0, 10.0),
        (MISSING, 39.0, 10.0),
        (MISSING, 1000.0, 10.0),
    ],
)
def test_who_is_missing_gets_more_time_after_an_outage_but_not_after_each_of_many(reason: str, before: float, wait: float) -> None:
    """Nobody can come back before the SFU is; but one that goes on failing now and then must not keep ghosts for as long as it does."""
    away = row(presence=Presence.AWAY, reason=reason, presence_since=NOW - before - 5.0, look_at=NOW - 1.0, sessions=(ended("S1"),))
    after = replace(looked(), failed_since=NOW - 5.0, recovered_at=NOW - 2.0)
    assert presence.of_look(away, after, NOW, POLICY) == Finding(Sign.DEPARTED, away.sessions, reason, wait - 2.0)
    assert presence.of_look(away, replace(after, sent_at=NOW - 2.0 + wait), NOW, POLICY).sign is Sign.GIVEN_UP
    assert presence.of_look(away._replace(presence_since=NOW - 1.0), after, NOW, POLICY).sign is Sign.GIVEN_UP  # it left when the SFU was back
    assert presence.of_look(away._replace(reason="CLIENT_INITIATED"), after, NOW, POLICY).sign is Sign.GIVEN_UP
    assert presence.of_look(away, looked(), NOW, POLICY).sign is Sign.GIVEN_UP
