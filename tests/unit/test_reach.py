"""Can an SFU be asked: the breaker, when it counts as lost, and which webhooks are late."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfu_delegate.delegation.policy import LOST_AFTER, Policy
from sfu_delegate.delegation.reach import LAG_OVER, Reach

from tests.rows import NOW, POLICY, SFU


def looked(reach: Reach, now: float, *, answered: bool, took: float = 0.1) -> bool:
    """One look, sent and answered (or not)."""
    reach.began(POLICY)
    return reach.ended(now, now + took, POLICY, answered=answered)


def broken(now: float = NOW) -> Reach:
    """An SFU that has just failed so often that the breaker is open."""
    reach = Reach(4)
    for _ in range(POLICY.breaker_after):
        looked(reach, now, answered=False)
    return reach


# ── the breaker ──


def test_a_small_number_of_looks_at_a_time() -> None:
    """As many as are configured; an answer makes a place."""
    reach = Reach(2)
    assert reach.free(NOW, POLICY) == 2
    reach.began(POLICY)
    reach.began(POLICY)
    assert reach.free(NOW, POLICY) == 0
    reach.ended(NOW, NOW, POLICY, answered=True)
    assert reach.free(NOW, POLICY) == 1
    reach.most = 0  # configured anew
    assert reach.free(NOW, POLICY) == 0


def test_after_some_failures_in_a_row_one_probe_at_a_time_is_made() -> None:
    """The first at once, the others with a pause before each; another one while it is under way would only wait for the same time-out."""
    reach = Reach(4)
    for n in range(POLICY.breaker_after):
        assert not reach.open(POLICY)
        assert reach.free(NOW + n, POLICY) == 4
        looked(reach, NOW + n, answered=False)
    assert reach.open(POLICY)
    now = NOW + POLICY.breaker_after - 1 + 0.1
    for n in range(5):
        if n:
            assert reach.free(now + POLICY.look_again - 0.01, POLICY) == 0
            now += POLICY.look_again
        assert reach.free(now, POLICY) == 1
        reach.began(POLICY)
        assert reach.free(now + 100.0, POLICY) == 0
        reach.ended(now, now + 3.0, POLICY, answered=False)
        now += 3.0


def test_failures_that_are_not_in_a_row_do_not_open_it() -> None:
    """One answer, and it counts from the beginning."""
    reach = Reach(4)
    for _ in range(10):
        for _ in range(POLICY.breaker_after - 1):
            looked(reach, NOW, answered=False)
        looked(reach, NOW, answered=True)
    assert not reach.open(POLICY)


def test_other_looks_fail_at_once_only_when_the_first_probe_has_failed_too() -> None:
    """Those that opened it may have hung in an outage that is over."""
    reach = broken()
    shut = [reach.shut]
    for n, answered in enumerate((False, False, True)):
        looked(reach, NOW + 1 + 10 * n, answered=answered)
        shut.append(reach.shut)
    assert shut == [False, True, True, False]


def test_a_webhook_after_a_failed_probe_is_a_reason_to_probe_again() -> None:
    """Not every one at once; and what comes due meanwhile waits for that look instead of failing by the last one."""
    reach = broken()
    looked(reach, NOW + 1, answered=False, took=1.0)
    reach.heard(NOW + 1.9 + POLICY.look_gap, POLICY)
    assert (reach.shut, reach.free(NOW + 3, POLICY)) == (True, 0)
    reach.heard(NOW + 2 + POLICY.look_gap, POLICY)
    assert (reach.shut, reach.free(NOW + 3, POLICY)) == (False, 1)
    looked(reach, NOW + 3, answered=False)
    assert (reach.shut, reach.free(NOW + 4, POLICY)) == (True, 0)


def test_failures_of_looks_older_than_an_answer_say_nothing() -> None:
    """All places hung; one is freed by its time-out, and the next look is answered. The other time-outs that follow open nothing."""
    reach = Reach(4)
    for _ in range(4):
        reach.began(POLICY)
    reach.ended(NOW, NOW + 5.0, POLICY, answered=False)
    looked(reach, NOW + 5.0, answered=True)
    for n in range(1, 4):
        reach.ended(NOW + n, NOW + n + 5.0, POLICY, answered=False)
    assert (reach.failures, reach.failing_since, reach.in_flight) == (0, None, 0)
    assert reach.outdated(NOW + 4.9)
    assert not reach.outdated(NOW + 5.0)


def test_looks_that_hang_hold_up_no_probe() -> None:
    """The probe does not wait for looks that were sent before, and their end is not its end."""
    reach = Reach(4)
    for _ in range(4):
        reach.began(POLICY)
    for _ in range(3):
        reach.ended(NOW, NOW + 5.0, POLICY, answered=False)
    assert reach.free(NOW + 5.0, POLICY) == 1
    reach.began(POLICY)
    assert reach.free(NOW + 5.0, POLICY) == 0
    reach.ended(NOW + 0.1, NOW + 5.1, POLICY, answered=False)
    assert (reach.free(NOW + 5.1, POLICY), reach.shut) == (0, False)
    reach.ended(NOW + 5.0, NOW + 10.0, POLICY, answered=False)
    assert (reach.free(NOW + 10.0 + POLICY.look_again, POLICY), reach.shut) == (1, True)


def test_a_probe_that_is_answered_closes_it() -> None:
    """All places are free again, and whoever is told can ask for everything that happened meanwhile; once."""
    reach = broken()
    assert looked(reach, NOW + 10, answered=True)
    assert (reach.open(POLICY), reach.free(NOW + 10, POLICY), reach.failing_since) == (False, 4, None)
    assert not looked(reach, NOW + 11, answered=True)


def test_a_single_failure_is_a_reason_to_look_again_too() -> None:
    """The next answer says that it can be asked again."""
    reach = Reach(4)
    assert not looked(reach, NOW, answered=False)
    assert looked(reach, NOW + 5, answered=True)


def test_answers_that_come_together_after_a_failure() -> None:
    """Looks that were on their way when it broke: places are counted right whatever they bring."""
    reach = Reach(4)
    for _ in range(4):
        reach.began(POLICY)
    for answered in (False, True, False, False):
        reach.ended(NOW, NOW + 5, POLICY, answered=answered)
    assert (reach.in_flight, reach.failures, reach.open(POLICY)) == (0, 2, False)
    reach.ended(NOW, NOW + 5, POLICY, answered=True)
    assert reach.in_flight == 0


# ── lost ──


def test_an_sfu_that_is_silent_for_long_is_lost() -> None:
    """Counted from the first look that failed, until one is answered."""
    reach = broken(NOW)
    assert not reach.lost(SFU, NOW + LOST_AFTER - 0.1, POLICY)
    assert reach.lost(SFU, NOW + LOST_AFTER, POLICY)
    looked(reach, NOW + LOST_AFTER, answered=True)
    assert not reach.lost(SFU, NOW + 10 * LOST_AFTER, POLICY)


def test_a_webhook_shows_that_it_is_alive() -> None:
    """Looks may fail for another reason: its API is not reachable, or the key is wrong."""
    reach = broken(NOW)
    reach.heard_at = NOW + 500.0
    assert not reach.lost(SFU, NOW + 500.0 + LOST_AFTER - 0.1, POLICY)
    assert reach.lost(SFU, NOW + 500.0 + LOST_AFTER, POLICY)


def test_who_was_not_asked_is_not_lost() -> None:
    """Neither without any look, nor right after a start with what an earlier process had seen: first it is asked a few times."""
    assert not Reach(4).lost(SFU, NOW, POLICY)
    recalled = Reach(4, failing_since=NOW - 7 * 86400.0)
    assert not recalled.lost(SFU, NOW, POLICY)
    for _ in range(POLICY.breaker_after):
        looked(recalled, NOW, answered=False)
    assert recalled.lost(SFU, NOW, POLICY)


def test_each_sfu_has_a_time_of_its_own() -> None:
    """As it is configured; others have the default."""
    policy = Policy(lost_after={SFU: 30.0})
    assert broken(NOW).lost(SFU, NOW + 30.0, policy)
    assert not broken(NOW).lost("other", NOW + 30.0, policy)
    assert replace(policy, lost_after={}).lost(SFU) == LOST_AFTER


# ── late webhooks ──


@pytest.mark.parametrize("apart", [0.0, 3600.0, -3600.0, -1e9])
def test_late_is_what_comes_much_later_than_others(apart: float) -> None:
    """However far apart the two clocks are."""
    reach = Reach(4)
    for n in range(10):
        assert not reach.is_late(NOW + n + apart, NOW + n + 0.3, 5.0)
    assert not reach.is_late(NOW + apart, NOW + 5.0, 5.0)
    assert reach.is_late(NOW + apart, NOW + 5.4, 5.0)
    assert not reach.is_late(NOW + 20 + apart, NOW + 20.3, 5.0)


def test_the_first_webhook_is_not_known_to_be_late() -> None:
    """There is nothing to measure it by; one that came faster shows it for those that follow."""
    reach = Reach(4)
    assert not reach.is_late(NOW, NOW + 60.0, 5.0)
    assert not reach.is_late(NOW + 61.0, NOW + 61.0, 5.0)
    assert reach.is_late(NOW, NOW + 62.0, 5.0)


def test_a_webhook_that_does_not_say_when_it_was_made_is_not_late() -> None:
    """And says nothing of the clocks."""
    reach = Reach(4)
    assert not reach.is_late(0.0, NOW, 5.0)
    assert reach.lag is None


def test_a_clock_that_was_set_is_learned_anew() -> None:
    """The SFU's went back by a minute: for a while all webhooks seem late, and then none does."""
    reach = Reach(4)
    assert not reach.is_late(NOW, NOW, 5.0)
    assert reach.is_late(NOW + 1.0 - 60.0, NOW + 1.0, 5.0)
    for n in range(1, 30):
        late = reach.is_late(NOW + n * LAG_OVER / 10 - 60.0, NOW + n * LAG_OVER / 10, 5.0)
    assert not late
    assert reach.is_late(NOW + 3 * LAG_OVER - 70.0, NOW + 3 * LAG_OVER, 5.0)


@given(st.lists(st.tuples(st.floats(0, LAG_OVER - 40.0), st.floats(0, 30)), min_size=1, max_size=30), st.floats(-1e6, 8e4))
def test_what_took_no_longer_than_allowed_is_never_late(webhooks: list[tuple[float, float]], apart: float) -> None:
    """Whatever the delays and the clocks: only what took more than 5 s longer than the fastest so far."""
    reach, fastest = Reach(4), float("inf")
    for made, took in sorted(webhooks, key=lambda webhook: webhook[0] + webhook[1]):
        late = reach.is_late(NOW + made + apart, NOW + made + took, 5.0)
        fastest = min(fastest, took)
        if took - fastest < 5.0 - 1e-3:
            assert not late
        elif took - fastest > 5.0 + 1e-3:
            assert late


def test_a_failing_room_does_not_have_all_rooms_looked_at_again_and_again() -> None:
    """One that fails now and then is a reason to ask everywhere once in an interval; an SFU that could not be asked at all is one each time."""
    reach = Reach(4)

    def look(at: float, *, answered: bool) -> bool:
        reach.began(POLICY)
        return reach.ended(at, at, POLICY, answered=answered)

    asked = []
    for n in range(120):
        look(NOW + n, answered=False)
        asked.append(look(NOW + n + 0.5, answered=True))
    assert sum(asked) == 2
    for n in range(POLICY.breaker_after):
        look(NOW + 120.0 + n, answered=False)
    assert look(NOW + 125.0, answered=True)


def test_an_sfu_that_refuses_to_answer_is_not_lost() -> None:
    """It does not know our key, say: nobody is let run for that, since its webhooks tell who is there."""
    reach = Reach(4)
    for at in range(0, 3000, 60):
        reach.began(POLICY)
        reach.ended(NOW + at, NOW + at, POLICY, answered=False, reached=True)
        assert not reach.lost("main", NOW + at, POLICY)
    assert reach.open(POLICY)


def test_a_webhook_of_years_to_come_says_nothing_of_the_clocks() -> None:
    """Else all others would seem late."""
    reach = Reach(4)
    assert not reach.is_late(NOW + 1e9, NOW, 5.0)
    assert not reach.is_late(NOW, NOW, 5.0)
