"""What is done first at one homeserver, when, and how many at a time: made-up cases, a plan against brute force, and a Pace at a homeserver's real
leaky bucket on a virtual clock."""

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sfu_delegate.delegation.model import DelayedEvent, Lane, Presence, State
from sfu_delegate.delegation.urgency import (
    ASSUMED_BURST,
    ASSUMED_RATE,
    DOWN_AFTER,
    DOWN_FIRST,
    DOWN_MOST,
    DOWN_PART,
    ENDANGERED,
    FEASIBLE,
    FIRST_WIDTH,
    FREE_PROVED,
    FREE_WIDTH,
    LIMITED_WIDTH,
    LONGEST_BLOCK,
    MARGIN,
    NOTHING_PLANNED,
    SOONEST,
    UNKNOWN_WIDTH,
    Countdown,
    Limit,
    Pace,
    Plan,
    Wait,
    choose,
    plan,
)

from tests.rows import NOW, row

MUST = Plan(NOW, NOW, 0.0, (), NOW, 0)
"""A plan by which the next restart must not wait."""


def restart(id: int, deadline: float, **changes: Any) -> DelayedEvent:
    return row(id=id, lane=Lane.RESTART, harm=deadline, due=NOW, **changes)


def ending(id: int, since: float) -> DelayedEvent:
    return row(Presence.GONE, State.ENDING, id=id, harm=since, due=NOW)


def unlimited(most: int = 16, width: int = 16) -> Pace:
    pace = Pace(most)
    pace.reset(Limit.NONE)
    pace.width = width
    return pace


def limited(tokens: float = ASSUMED_BURST, rate: float = ASSUMED_RATE, burst: float = ASSUMED_BURST) -> Pace:
    """A homeserver whose limit is known, and that has so much left."""
    pace = Pace(16)
    pace.recall(Limit.SOME, rate, burst, NOW)
    pace._tokens = tokens
    return pace


def order(rows: list[DelayedEvent], pace: Pace, given_plan: Plan = NOTHING_PLANNED) -> list[int]:
    return [row.id for row in choose(rows, pace, given_plan, NOW).rows]


# ── choosing, where the rate is not limited ──


def test_departures_go_before_restarts_and_the_oldest_first() -> None:
    """A ghost in the call is worse than a restart that has time."""
    rows = [restart(1, NOW + 500), ending(2, NOW - 1), restart(3, NOW + 100), ending(4, NOW - 9)]
    assert order(rows, unlimited()) == [4, 2, 3, 1]


def test_a_restart_that_is_about_to_miss_its_deadline_goes_first() -> None:
    """A person dropped is worse than a ghost that stays a moment longer."""
    rows = [ending(1, NOW - 900), restart(2, NOW + ENDANGERED), restart(3, NOW + 1)]
    assert order(rows, unlimited()) == [3, 2, 1]


def test_a_restart_with_more_time_is_not_endangered() -> None:
    """Just above the limit, the departure goes first."""
    assert order([restart(1, NOW + ENDANGERED + 0.1), ending(2, NOW)], unlimited(width=1)) == [2]


def test_events_past_their_deadline_do_not_drag_others_down() -> None:
    """Who can still make it goes before who cannot, and a deadline that is now has passed."""
    assert order([restart(1, NOW - 5), restart(2, NOW + 5)], unlimited(width=1)) == [2]
    assert order([restart(1, NOW), ending(2, NOW)], unlimited(width=1)) == [2]


def test_an_event_that_was_just_handed_over_goes_with_the_departures() -> None:
    """Nobody knows its countdown, and a client waits for the answer."""
    rows = [restart(1, NOW + 50), ending(2, NOW - 1), restart(3, NOW + 20, verified_at=None)]
    assert order(rows, unlimited()) == [2, 3, 1]


@pytest.mark.parametrize("taken", [16, 17, 40])
def test_nothing_is_chosen_without_a_free_place(taken: int) -> None:
    """No place, no action; and what waits is said."""
    pace = unlimited()
    pace.in_flight = taken
    choice = choose([ending(1, NOW), restart(2, NOW + 500)], pace, NOTHING_PLANNED, NOW)
    assert choice.rows == []
    assert choice.waiting == {Wait(urgent=True, ending=True), Wait(urgent=False, ending=False)}


def test_no_more_are_chosen_than_places_are_free() -> None:
    """The rest waits in the database."""
    assert order([ending(id, NOW - id) for id in range(9)], unlimited(width=3)) == [8, 7, 6]


# ── choosing, where it is ──


def test_the_burst_is_for_departures_and_restarts_take_what_would_run_over() -> None:
    """Of a full bucket, restarts that have time get one action, departures all of it."""
    restarts = [restart(id, NOW + 500 + id) for id in range(9)]
    assert order(restarts, limited(ASSUMED_BURST)) == [0]
    assert order(restarts, limited(ASSUMED_BURST - 0.5)) == []
    endings = [ending(id, NOW - id) for id in range(100, 109)]
    assert order([*restarts, *endings], limited(3.5)) == [108, 107, 106]


def test_when_a_restart_would_be_late_restarts_go_first() -> None:
    """The one with the earliest deadline first, also before an older departure; those whose deadline has passed do not take part."""
    rows = [ending(1, NOW - 900), restart(2, NOW + 40), restart(3, NOW + 30), restart(4, NOW - 1)]
    assert order(rows, limited(2.5), MUST) == [3, 2]
    assert order(rows, limited(2.5), Plan(NOW + 60, NOW, 0.0, (), NOW, 3)) == [1]


def test_whoever_has_a_token_of_their_own_does_not_wait_for_the_rate() -> None:
    """A user's own limit is another one; only places are shared."""
    mine = [restart(id, NOW + 500, token=b"sealed") for id in (1, 2)]
    assert order([ending(3, NOW), *mine], limited(0.5)) == [1, 2]


def test_what_waits_says_what_for() -> None:
    """So that it is known when to come back: for the rate that departures get, or for a full bucket."""
    choice = choose([ending(1, NOW), restart(2, NOW + 500)], limited(0.5), NOTHING_PLANNED, NOW)
    assert choice.rows == []
    assert choice.waiting == {Wait(urgent=True, ending=True), Wait(urgent=False, ending=False)}
    pace = limited(0.5)
    assert NOW < pace.next_for(Wait(urgent=True, ending=True), NOW) < pace.next_for(Wait(urgent=False, ending=False), NOW) <= NOW + 5


# ── planning ──


def countdowns(*deadlines: float, delay: float = 60.0, known: bool = True) -> list[Countdown]:
    return [Countdown(NOW + deadline, delay, n, known) for n, deadline in enumerate(deadlines, 1)]


def test_a_single_restart_must_begin_shortly_before_its_deadline() -> None:
    """By the margin, in which one that fails can be made again."""
    made = plan(countdowns(40.0), 1.0, NOW, NOW)
    assert (made.must, made.early, made.lateness) == (NOW + 40.0 - min(MARGIN, 60.0 / 20), made.must, 0.0)


def test_many_deadlines_at_once_must_begin_earlier() -> None:
    """30 within a second at 1 a second: half a minute before; and at twice the rate a quarter."""
    slow, fast = (plan(countdowns(*[50.0 + n / 100 for n in range(30)]), rate, NOW, NOW) for rate in (1.0, 2.0))
    assert 15.0 <= slow.must - NOW <= 50.0 - 29.0
    assert fast.must - slow.must == pytest.approx(29 / FEASIBLE / 2, abs=0.5)
    assert slow.early < slow.must


def test_who_cannot_make_it_is_forecast() -> None:
    """10 within 5 s at 1 a second: the last one is late by 4 s; with the way free in 3 s only, by 7."""
    ten = countdowns(*[5.0] * 10)
    assert plan(ten, 1.0, NOW, NOW).lateness == pytest.approx(4.0)
    assert plan(ten, 1.0, NOW + 3, NOW).lateness == pytest.approx(7.0)
    assert plan(countdowns(*[5.0] * 10, known=False), 1.0, NOW, NOW).lateness == 0.0


def test_those_past_their_deadline_are_forecast_and_not_planned_for() -> None:
    """They drag nobody down."""
    made = plan(countdowns(-7.0, -2.0, 40.0), 1.0, NOW, NOW)
    assert (made.lateness, made.must) == (7.0, plan(countdowns(40.0), 1.0, NOW, NOW).must)
    assert plan(countdowns(-7.0, known=False), 1.0, NOW, NOW).lateness == 0.0


def test_nobody_is_restarted_in_the_first_third_of_the_delay() -> None:
    """However crowded: it would cost more than it helps."""
    made = plan(countdowns(30.0, 41.9, 42.1, 55.0), 1.0, NOW, NOW)
    assert made.soonest == (1, 2)
    assert len(plan(countdowns(*[20.0] * 200), 1.0, NOW, NOW).soonest) == SOONEST


def test_nothing_to_restart_is_no_plan() -> None:
    """Never a reason to wake up."""
    made = plan([], 1.0, NOW, NOW)
    assert (made.must, made.early, made.lateness, made.soonest) == (inf, inf, 0.0, ())


DEADLINES = st.lists(st.tuples(st.floats(0.5, 300.0), st.sampled_from([10.0, 60.0, 3600.0])), min_size=1, max_size=40)


def finishes(begin: float, count: int, rate: float) -> list[float]:
    """When the n-th of actions done one after another begins."""
    return [begin + n / rate for n in range(count)]


@settings(max_examples=300)
@given(DEADLINES, st.floats(0.1, 20.0))
def test_whoever_begins_when_the_plan_says_makes_every_deadline(events: list[tuple[float, float]], rate: float) -> None:
    """Earliest deadline first, from `must` on, with the part of the rate that is counted on: everybody's restart begins before its deadline, by the
    margin. And no later begin does that: `must` is not too careful."""
    soon = sorted(Countdown(NOW + deadline, delay, n, True) for n, (deadline, delay) in enumerate(events))
    made = plan(soon, rate, NOW, NOW)
    margins = [min(MARGIN, c.delay / 20) for c in soon]

    def all_make_it(begin: float) -> bool:
        times = finishes(begin, len(soon), rate * FEASIBLE)
        return all(at <= c.harm - margin + 1e-6 for at, c, margin in zip(times, soon, margins, strict=True))

    assert all_make_it(made.must)
    assert not all_make_it(made.must + 0.01)
    assert made.early <= made.must


@settings(max_examples=150)
@given(st.lists(st.tuples(st.floats(0.5, 30.0), st.sampled_from([10.0, 60.0])), min_size=1, max_size=6), st.floats(0.2, 4.0), st.floats(0.0, 5.0))
def test_the_forecast_is_the_best_that_any_order_can_do(events: list[tuple[float, float]], rate: float, wait: float) -> None:
    """Against all orders: the least lateness of the most endangered one."""
    soon = sorted(Countdown(NOW + deadline, delay, n, True) for n, (deadline, delay) in enumerate(events))
    best = min(
        max(0.0, *(at - c.harm for at, c in zip(finishes(NOW + wait, len(soon), rate), tried, strict=True))) for tried in itertools.permutations(soon)
    )
    assert plan(soon, rate, NOW + wait, NOW).lateness == pytest.approx(best, abs=1e-6)


# ── the number of requests at a time ──


def run(pace: Pace, count: int, *, answered: bool = True, is_ending: bool = True, at: float = NOW) -> None:
    """So many requests, one after another."""
    for _ in range(count):
        pace.began(at)
        pace.ended(at, at, ending=is_ending, answered=answered)


def test_a_pace_starts_low_and_doubles_with_success() -> None:
    """4 at a time, then 8 as long as it might refuse them; without a limit up to what is allowed."""
    pace = Pace(10)
    assert pace.places(NOW) == FIRST_WIDTH
    run(pace, 4)
    assert pace.places(NOW) == UNKNOWN_WIDTH
    run(pace, 16)
    assert pace.places(NOW) == UNKNOWN_WIDTH
    pace.reset(Limit.NONE)
    run(pace, 16)
    assert pace.places(NOW) == 10


def test_a_homeserver_that_takes_much_more_than_the_default_has_no_limit() -> None:
    """Not after a few, and soon after that."""
    for count, limit in ((20, Limit.UNKNOWN), (60, Limit.NONE)):
        pace = Pace(16)
        run(pace, count)
        assert pace.limit is limit


def test_a_homeserver_that_has_shown_no_limit_gets_all_that_is_allowed_step_by_step() -> None:
    """It may have one tomorrow, and what is on its way then is refused at once. Where the operator allows less, it is that."""
    pace, narrow = Pace(64), Pace(10)
    for one, most, proved in ((pace, FREE_WIDTH, 64), (narrow, 10, 10)):
        run(one, 60)
        assert one.limit is Limit.NONE
        assert not one.exempt
        run(one, FREE_PROVED - 61)
        assert one.places(NOW) == most
        run(one, FREE_PROVED)
        assert one.places(NOW) == proved
    assert UNKNOWN_WIDTH < FREE_WIDTH


def test_a_homeserver_that_the_operator_exempts_gets_all_that_is_allowed() -> None:
    """Also one that had shown no limit before, and not any more when the exemption is taken back."""
    pace = Pace(64)
    run(pace, FREE_PROVED - 1)
    pace.reset(Limit.NONE)
    assert pace.exempt
    assert pace.places(NOW) == FREE_WIDTH  # what it takes is shown step by step
    run(pace, 100)
    assert pace.places(NOW) == 64
    for limit in (Limit.UNKNOWN, Limit.SOME):
        pace.reset(Limit.NONE)
        pace.reset(limit)
        assert (pace.limit, pace.exempt) == (limit, False)
        assert pace.width == FIRST_WIDTH


def test_what_was_learned_before_a_start_is_no_exemption() -> None:
    """No limit was found then: there may be one now."""
    pace = Pace(64)
    pace.recall(Limit.NONE, ASSUMED_RATE, ASSUMED_BURST, NOW)
    run(pace, FREE_PROVED - 1)
    assert (pace.limit, pace.exempt, pace.places(NOW)) == (Limit.NONE, False, FREE_WIDTH)


def test_an_exemption_that_the_homeserver_does_not_know_of() -> None:
    """It refuses: then there is a limit, whatever the operator says, and requests go as carefully as at any other homeserver."""
    pace = unlimited()
    pace.began(NOW)
    pace.refused(NOW, 3.0, NOW)
    assert pace.limit is Limit.SOME
    assert pace.width == LIMITED_WIDTH
    assert pace.urgent(NOW + 3.2) == 1


def test_failures_do_not_widen_a_pace() -> None:
    """Only definite answers show that the homeserver can take more."""
    pace = Pace(16)
    run(pace, 20, answered=False)
    assert pace.places(NOW) == FIRST_WIDTH


def test_a_pace_that_may_have_one_place_has_one() -> None:
    """The configured limit holds from the start."""
    assert Pace(1).places(NOW) == 1


def test_an_answer_too_many_does_not_make_places() -> None:
    """What is in flight never gets below zero."""
    pace = Pace(16)
    pace.ended(NOW, NOW, ending=True, answered=False)
    pace.refused(NOW, 1.0, NOW)
    assert pace.in_flight == 0


def test_a_kind_of_action_that_keeps_failing_is_tried_one_at_a_time() -> None:
    """With pauses that grow, up to some seconds; the other kind goes on (Synapse's workers restart while its main process, which sends, is down)."""
    pace = unlimited()
    run(pace, DOWN_AFTER - 1, answered=False)
    assert pace.places_for(NOW, ending=True) == 16
    now, pauses = NOW, []
    for _ in range(50):
        run(pace, 1, answered=False, at=now)
        assert pace.places_for(now, ending=True) == 0
        assert pace.places_for(now, ending=False) == 16
        again = pace.next_for(Wait(urgent=True, ending=True), now)
        pauses.append(again - now)
        assert pace.places_for(again, ending=True) == 1
        now = again
    assert pauses == sorted(pauses)
    assert pauses[-1] == DOWN_MOST
    # That it is back is noticed soon: after an eighth of the time that it was away, or half a second.
    tried = [NOW, *itertools.accumulate(pauses, initial=NOW)]
    assert all(pause <= max(DOWN_FIRST, (at - NOW) / DOWN_PART) + 1e-6 for at, pause in zip(tried[1:], pauses, strict=False))


def test_what_has_gathered_while_it_was_down_does_not_come_at_once() -> None:
    """The first success opens one place, then two, then four."""
    pace = unlimited()
    run(pace, DOWN_AFTER, answered=False)
    widths = []
    for n in (1, 1, 2, 4, 8):
        run(pace, n)
        widths.append(pace.places_for(NOW, ending=True))
    assert widths == sorted(widths)
    assert widths[0] <= 2
    assert widths[-1] == 16


def test_a_client_s_own_token_is_not_the_delegate_s_rate() -> None:
    """Requests with it neither take from the bucket nor show how large it is."""
    pace = limited(2.0)
    for _ in range(50):
        pace.began(NOW, alone=True)
        pace.ended(NOW, NOW, ending=False, answered=True, alone=True)
    assert pace.tokens(NOW) == 2.0
    fresh = Pace(16)
    for _ in range(100):
        fresh.began(NOW, alone=True)
        fresh.ended(NOW, NOW, ending=False, answered=True, alone=True)
    assert fresh.limit is Limit.UNKNOWN


def test_what_was_known_before_is_known_after_a_start() -> None:
    """The rate and the burst; but not that the bucket is full."""
    pace = Pace(16)
    pace.recall(Limit.SOME, 2.0, 7.0, NOW)
    assert (pace.limit, pace.rate, pace.burst) == (Limit.SOME, 2.0, 7.0)
    assert pace.urgent(NOW) <= 1
    assert pace.tokens(NOW + 10.0) >= 7.0
    pace.recall(Limit.SOME, 0.0, 0.0, NOW)
    assert pace.rate > 0
    assert pace.burst >= 1.0


def test_a_homeserver_that_the_configuration_exempts_is_not_held_back() -> None:
    """What was learned is of the past."""
    pace = Pace(16)
    pace.began(NOW)
    pace.refused(NOW, 3.0, NOW)
    assert pace.places(NOW) == 0
    pace.reset(Limit.NONE)
    assert (pace.urgent(NOW), pace.planned(NOW)) == (4, 4)


# ── at a homeserver that limits ──


@dataclass
class Homeserver:
    """A leaky bucket as Synapse's: each action fills it by one, it runs out at `rate`, and what does not fit is refused and costs nothing. It says
    when the next one fits (`asks` may change what it says), and holds a refusal back for half a second."""

    rate: float
    burst: float
    asks: Callable[[float], float | None] = lambda seconds: seconds
    level: float = 0.0
    at: float = NOW
    served: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    coming: list[tuple[float, int, float, float | None]] = field(default_factory=list)  # answers on their way: when, number, sent at, wait
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def act(self, now: float) -> float | None:
        """None: done. Else the seconds until the next one fits."""
        self.level = max(0.0, self.level - (now - self.at) * self.rate)
        self.at = now
        if self.level + 1.0 <= self.burst + 1e-9:
            self.level += 1.0
            self.served.append(now)
            return None
        self.refusals.append(now)
        return (self.level + 1.0 - self.burst) / self.rate


def drive(
    pace: Pace, homeserver: Homeserver, seconds: float, begin: float = NOW, *, urgent: bool = True, travel: float = 0.02, work: float = inf
) -> float:
    """Do what can be done, for so long, until `work` actions are done; returns the time at the end. It must never be stepped in vain for long."""
    now, idle, coming = begin, 0, homeserver.coming
    while now < begin + seconds and len(homeserver.served) < work:
        while coming and coming[0][0] <= now:
            _, _, sent_at, wait = heapq.heappop(coming)
            if wait is None:
                pace.ended(sent_at, now, ending=True, answered=True)
            else:
                pace.refused(sent_at, homeserver.asks(wait), now)
        begun = 0
        while (pace.urgent(now) if urgent else pace.planned(now)) > 0:
            pace.began(now)
            wait = homeserver.act(now + travel)
            heapq.heappush(coming, (now + 2 * travel + (0.0 if wait is None else 0.5), next(homeserver.numbers), now, wait))
            begun += 1
        assert pace.in_flight == len(coming)
        ahead = min(coming[0][0] if coming else inf, pace.next_urgent(now) if urgent else pace.next_planned(now))
        assert ahead < inf
        idle = 0 if begun or ahead > now + 1e-3 else idle + 1
        assert idle < 3, f"a busy loop: {now} {pace}"
        now = max(now + (1e-3 if idle else 0.0), ahead)  # a step takes some time
    return now


def test_first_contact_costs_few_refusals() -> None:
    """Whatever the limit is: at most 8 until it is known."""
    for rate, burst in itertools.product((0.1, 0.5, 1.0, 3.0), (1.0, 2.0, 5.0, 20.0)):
        pace, homeserver = Pace(16), Homeserver(rate, burst)
        now = NOW
        while pace.limit is Limit.UNKNOWN and now < NOW + 120:
            now = drive(pace, homeserver, 0.2, now)
        assert pace.limit is Limit.SOME, (rate, burst)
        assert len(homeserver.refusals) <= 8, (rate, burst)


@pytest.mark.parametrize(("rate", "burst"), list(itertools.product((0.2, 1.0, 3.0), (1.0, 5.0, 10.0))))
def test_a_limit_is_made_use_of_and_not_run_into(rate: float, burst: float) -> None:
    """With work waiting all the time: nearly all that Synapse's default allows is done, most of what others do; and at most 1
    refusal for 4 successes once it is known."""
    pace, homeserver = Pace(16), Homeserver(rate, burst)
    now = drive(pace, homeserver, 120.0)
    served, refused = len(homeserver.served), len(homeserver.refusals)
    drive(pace, homeserver, 300.0, now)
    more, refusals = len(homeserver.served) - served, len(homeserver.refusals) - refused
    assert more >= (0.9 if rate <= ASSUMED_RATE else 0.6) * 300.0 * rate
    assert refusals <= more / 4 + 1


def test_planned_work_keeps_the_burst() -> None:
    """After a minute of restarts that could wait, a departure still finds all of the bucket but one."""
    pace, homeserver = limited(), Homeserver(1.0, 5.0)
    now = drive(pace, homeserver, 60.0, urgent=False)
    assert len(homeserver.served) >= 50
    assert homeserver.refusals == []
    assert int(pace.tokens(now)) >= ASSUMED_BURST - 1


def test_a_limit_that_is_lifted_is_noticed_within_seconds() -> None:
    """What waits is drained soon: 500 actions, for which the old limit would take 8 minutes."""
    pace, homeserver = Pace(16), Homeserver(1.0, 5.0)
    now = drive(pace, homeserver, 60.0)
    homeserver.rate = homeserver.burst = 1e9
    done = len(homeserver.served)
    end = drive(pace, homeserver, 600.0, now, work=done + 500)
    assert end - now <= 60.0
    assert pace.limit is Limit.NONE


def test_a_limit_that_is_raised_is_made_use_of() -> None:
    """Tenfold: after two minutes several times of what the old one allowed."""
    pace, homeserver = Pace(16), Homeserver(0.5, 5.0)
    now = drive(pace, homeserver, 60.0)
    homeserver.rate = 5.0
    now = drive(pace, homeserver, 120.0, now)
    done = len(homeserver.served)
    drive(pace, homeserver, 60.0, now)
    assert len(homeserver.served) - done >= 4 * 0.5 * 60


def test_a_limit_that_is_tightened_is_noticed() -> None:
    """To a fifth: not more refusals than successes at first, few later, and what it allows is done."""
    pace, homeserver = Pace(16), Homeserver(5.0, 5.0)
    now = drive(pace, homeserver, 60.0)
    homeserver.rate = 1.0
    refused, done = len(homeserver.refusals), len(homeserver.served)
    now = drive(pace, homeserver, 30.0, now)
    assert len(homeserver.refusals) - refused <= len(homeserver.served) - done
    refused, done = len(homeserver.refusals), len(homeserver.served)
    drive(pace, homeserver, 120.0, now)
    assert len(homeserver.served) - done >= 0.8 * 120
    assert len(homeserver.refusals) - refused <= (len(homeserver.served) - done) / 4


@pytest.mark.parametrize("asked", [0.0, -5.0, None, 0.001, 3600.0, 1e12])
def test_whatever_it_asks_for_there_is_neither_a_busy_loop_nor_giving_up(asked: float | None) -> None:
    """A homeserver that refuses everything is asked now and then, at least four times a minute and hardly more than once a second; and when it takes
    requests again, work goes on within half a minute."""
    pace, homeserver = Pace(16), Homeserver(0.0001, 0.0, asks=lambda _: asked)
    now = drive(pace, homeserver, 60.0)
    assert 4 <= len(homeserver.refusals) <= 60
    times = [at for at in homeserver.refusals if at > NOW + 20.0]
    assert all(later - earlier <= LONGEST_BLOCK + 2.0 for earlier, later in itertools.pairwise(times))
    homeserver.rate, homeserver.burst, homeserver.asks = 1.0, 5.0, lambda seconds: seconds
    now = drive(pace, homeserver, 30.0, now)
    assert homeserver.served
    done = len(homeserver.served)
    drive(pace, homeserver, 120.0, now)
    assert len(homeserver.served) - done >= 8


@settings(max_examples=60)
@given(
    st.floats(0.1, 8.0),
    st.integers(1, 12),
    st.lists(st.tuples(st.floats(0.1, 40.0), st.booleans()), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.02, 0.3]),
)
def test_at_any_limit_and_any_course_of_work(rate: float, burst: int, course: list[tuple[float, bool]], travel: float) -> None:
    """Bursts of work and pauses: never a busy loop, never more on its way than allowed, and refusals stay few."""
    pace, homeserver = Pace(16), Homeserver(rate, float(burst))
    now = NOW
    for seconds, busy in course:
        now = drive(pace, homeserver, seconds, now, travel=travel) if busy else now + seconds
        assert 0 <= pace.in_flight <= 16
        assert pace.rate > 0
        assert pace.burst >= 1
    assert len(homeserver.refusals) <= 12 + len(homeserver.served) / 3


def test_several_refusals_of_requests_that_went_together_are_one() -> None:
    """They say the same, and do not make the limit tighter than it is."""
    pace = limited(5.0)
    for _ in range(4):
        pace.began(NOW)
    for _ in range(4):
        pace.refused(NOW, 2.0, NOW + 0.5)
    assert pace.rate == ASSUMED_RATE
    assert pace.blocked_until <= NOW + 2.5


def test_the_longer_of_two_waits_holds() -> None:
    """A second refusal with a shorter wait does not shorten the first."""
    pace = Pace(16)
    for wait in (10.0, 1.0):
        pace.began(NOW)
        pace.refused(NOW, wait, NOW)
    assert pace.places(NOW + 9.0) == 0


def test_a_restart_that_would_be_too_late_is_tried_in_spite_of_a_block() -> None:
    """One at a time, and no departure with it: limits are lifted, too."""
    pace = limited(1.0)
    pace.began(NOW - 2.0)
    pace.refused(NOW - 2.0, 14.0, NOW - 2.0)
    assert pace.places(NOW) == 0
    soon, late = restart(1, NOW + 5.0), restart(2, NOW + 500.0)
    assert order([ending(3, NOW - 9.0), soon, late], pace) == [1]
    assert order([ending(3, NOW - 9.0), late], pace) == []
