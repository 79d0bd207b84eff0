"""Under a homeserver's rate limit nobody who is connected is dropped, whoever leaves whenever, and no permitted action is left unused.

The homeserver is the sandbox's with Synapse's default, a leaky bucket of 1 action a second and a burst of 5, unless a test says otherwise.
`python -m benchmarks.rate_limit` runs the same cases with more seeds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sfu_delegate.delegation.urgency import FREE_PROVED, FREE_WIDTH, Limit
from sfu_delegate.sandbox.homeserver import HomeserverFaults, RateLimit

from tests.simulation.rates import HOMESERVER, HOUR, SYNAPSE, Call, Case, Result, play

RESTARTS = (None, 5.0, 40.0)  # seconds before the departures at which the daemon is started anew
JOINED = (1.0, 60.0)  # seconds in which everybody joins


@contextmanager
def calling(seed: int = 0, **how: Any) -> Iterator[Call]:
    call = Call(seed, **how)
    try:
        yield call
    finally:
        call.close()


def join(call: Call, count: int, delay: float, *, within: float = 1.0, start: float = 0.0, prefix: str = "p") -> list[str]:
    names = [f"{prefix}{i}" for i in range(count)]
    for i, name in enumerate(names):
        call.join(start + within * i / count, delay, name)
    return names


def moments(count: int, until: float, offset: float) -> list[float]:
    """So many moments spread over [0, until): two periods of a restart."""
    return [(i + offset) * until / count for i in range(count)]


def over(case: Case, result: Result) -> str:
    return f"{case}: {result}"


# ── the hard cases ──


@pytest.mark.parametrize("restart", RESTARTS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("within", JOINED)
def test_thirty_leave_and_thirty_stay(within: float, known: bool, restart: float | None) -> None:
    """Nobody who stays is dropped, and everybody who left is gone from the call after 65 s, whenever it was."""
    offset = (JOINED.index(within) * 6 + known * 3 + RESTARTS.index(restart)) / 12
    for seed, leave_at in enumerate(moments(4, 131.0, offset)):
        case = Case(30, 60.0, 30, HOUR, within, leave_at, known, restart)
        result = play(case, seed)
        assert result.dropped == 0, over(case, result)
        assert result.sent == 30, over(case, result)
        assert result.last <= 65.0, over(case, result)
        assert result.refusals <= result.successes / 4, over(case, result)
        assert result.refusals_in_all <= max(8, result.successes_in_all / 4), over(case, result)
        assert result.forecast == 0.0, over(case, result)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("within", JOINED)
@pytest.mark.parametrize(("go", "until"), [(30, 48.0), (28, 131.0)])
def test_sixty_with_short_delays_of_whom_thirty_leave(go: int, until: float, within: float, known: bool) -> None:
    """All that the homeserver allows goes into those who stay; the goodbyes that do not fit in are late, or the events fire by themselves.

    The restarts of 60 take exactly what the limit allows. Nobody can keep that up for long, a burst holds it for a period; 58 can be kept for ever.
    """
    for seed, leave_at in enumerate(moments(3, until, 0.5 * known)):
        case = Case(30, 60.0, go, 60.0, within, leave_at, known, watch=150.0)
        result = play(case, seed)
        assert result.dropped == 0, over(case, result)
        assert result.turned_away <= (2 if go == 30 else 0), over(case, result)
        assert result.sent + result.fired >= go - result.turned_away, over(case, result)
        assert result.refusals <= result.successes / 4, over(case, result)


@pytest.mark.parametrize(
    ("within", "leave_at", "known"),
    [
        (1.0, 0.0, False),
        pytest.param(1.0, 30.0, True, marks=pytest.mark.slow),
        pytest.param(600.0, 60.0, True, marks=pytest.mark.slow),
        pytest.param(1.0, 1500.0, False, marks=pytest.mark.slow),
    ],
)
def test_five_hundred_leave_and_five_hundred_stay(within: float, leave_at: float, known: bool) -> None:
    """Nobody's event runs out, and what the homeserver allows is made use of as long as somebody waits."""
    case = Case(500, HOUR, 500, HOUR, within, leave_at, known, watch=520.0)
    result = play(case, 1)
    assert result.dropped == 0, over(case, result)
    assert (result.sent, result.fired) == (500, 0), over(case, result)
    assert result.used >= 0.99, over(case, result)
    assert result.refusals <= result.successes / 4, over(case, result)
    assert result.forecast == 0.0, over(case, result)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("within", JOINED)
@pytest.mark.parametrize("instances", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_instances_are_one_to_the_homeserver(instances: int, within: float, known: bool) -> None:
    """Behind one address they are as quick as one, nobody is dropped, and together they are refused no more often."""
    for seed, leave_at in enumerate(moments(3, 131.0, (instances + known) / 5)):
        case = Case(30, 60.0, 30, HOUR, within, leave_at, known, instances=instances)
        result = play(case, seed)
        assert result.dropped == 0, over(case, result)
        assert result.sent == 30, over(case, result)
        assert result.last <= 65.0, over(case, result)
        assert result.refusals <= result.successes / 4, over(case, result)
        # While the limit is not known, each may have some requests under way that are refused.
        assert result.refusals_in_all <= max(8 * (1 if known else instances), result.successes_in_all / 4), over(case, result)
        assert result.forecast == 0.0, over(case, result)


@pytest.mark.slow
def test_several_instances_leave_no_permitted_action_unused() -> None:
    """However long the backlog is."""
    case = Case(500, HOUR, 500, HOUR, 1.0, 0.0, False, watch=520.0, instances=3)
    result = play(case, 1)
    assert (result.dropped, result.sent, result.fired) == (0, 500, 0), over(case, result)
    assert result.used >= 0.99, over(case, result)
    assert result.refusals <= result.successes / 4, over(case, result)


@pytest.mark.parametrize("leave_at", [5.0, 10.0, 20.0, 30.0, 40.0, 50.0])
def test_a_limit_that_comes_into_force_when_everybody_has_joined(leave_at: float) -> None:
    """Of 60 who joined at once, and whose checks nobody refused, 30 leave: nobody who stays is dropped, and few requests are refused.

    The homeserver has shown no limit until then. The first restarts of those who joined together are not due together: those that come early show the
    limit while there is time for the others.
    """
    for seed in range(4):
        with calling(seed, limit=None) as call:
            names = join(call, 60, 60.0, within=1.5)
            call.at(2.0, lambda call=call: setattr(call.homeserver, "limit", SYNAPSE))  # type: ignore[misc]
            for name in names[::2]:
                call.leave(2.0 + leave_at, name)
            call.run_until(2.0 + leave_at + 140.0)
            ends = call.ends()
            told = f"leave at {leave_at:g} s, seed {seed}: {len(ends.dropped)} dropped, {len(ends.sent)} sent, {call.refusals()} refusals"
            assert call.successes(end=2.0) == 60, told  # all checks came before the limit
            assert not ends.dropped, told
            assert not ends.turned_away, told
            assert len(ends.sent) + len(ends.fired) == 30, told
            assert len(ends.sent) >= 8, told  # the restarts of those who stay take most of the limit
            assert call.refusals() <= 20, told
            assert call.limit_known()[0] is Limit.SOME, told


# ── what is learned, and when ──


@pytest.mark.parametrize("limit", [SYNAPSE, RateLimit(1.0, 1.0), RateLimit(0.25, 3.0), RateLimit(5.0, 10.0), RateLimit(0.5, 20.0)])
def test_first_contact(limit: RateLimit) -> None:
    """A limit that nobody knew costs 8 refusals at the most. After that it is kept to, and nearly all of it is used."""
    with calling(3, limit=limit) as call:
        join(call, 200, HOUR)
        call.run_until(240.0)
        first = next(request.at for request in call.requests if request.status == 429)
        assert call.refusals(end=first + 2.0) <= 8
        assert call.refusals() <= 8 + call.successes() / 4
        assert call.refusals(60.0) <= call.successes(60.0) / 4
        assert call.used(60.0, min(240.0, 190 / limit.per_second), limit) >= 0.8
        kind, rate = call.limit_known()
        assert kind is Limit.SOME
        assert rate == pytest.approx(limit.per_second, rel=0.25)


def test_a_homeserver_without_a_limit_is_not_held_up() -> None:
    """Some hundred departures at once are done in seconds where nothing is refused."""
    with calling(limit=None) as call:
        names = join(call, 300, HOUR)
        for name in names:
            call.leave(60.0, name)
        call.run_until(90.0)
        assert len(call.ends().sent) == 300
        assert max(call.ends().sent) < 10.0
        assert call.limit_known()[0] is Limit.NONE


def crowd(call: Call, leave_at: float = 40.0) -> None:
    """There is always something to do: 400 who left, and 20 with short delays who stay."""
    join(call, 20, 60.0, within=10.0, prefix="s")
    for name in join(call, 400, 24 * HOUR, within=10.0, prefix="g"):
        call.leave(leave_at, name)


def test_a_limit_that_is_lifted_is_noticed() -> None:
    """Within seconds much more is done than the old limit allowed."""
    with calling(4, known=True) as call:
        crowd(call)
        call.at(100.0, lambda: setattr(call.homeserver, "limit", None))
        call.run_until(115.0)
        assert call.limit_known()[0] is Limit.NONE
        call.run_until(130.0)
        assert not call.ends().pending
        assert not call.ends().dropped


def test_a_limit_that_is_widened_is_noticed() -> None:
    """It is measured anew, up as well."""
    with calling(5, known=True) as call:
        crowd(call)
        call.at(100.0, lambda: setattr(call.homeserver, "limit", RateLimit(4.0, 10.0)))
        call.run_until(155.0)
        assert call.successes(100.0, 115.0) >= 1.5 * 15
        assert call.successes(130.0, 155.0) >= 0.8 * 25 * 4
        assert call.refusals(100.0) <= call.successes(100.0) / 4
        assert not call.ends().dropped


@pytest.mark.parametrize("before", [SYNAPSE, None])
def test_a_limit_that_is_tightened_is_noticed(before: RateLimit | None) -> None:
    """It is kept to after few refusals, and who is endangered goes first."""
    tight = RateLimit(0.5, 3.0)
    with calling(6, limit=before, known=before is not None) as call:
        join(call, 8, 60.0, within=10.0, prefix="s")
        for i, name in enumerate(join(call, 200, 24 * HOUR, within=10.0, prefix="g")):
            call.leave(60.0 + i * 0.25, name)
        call.at(80.0, lambda: setattr(call.homeserver, "limit", tight))
        call.run_until(260.0)
        assert call.refusals(80.0, 110.0) <= 8 + call.successes(80.0, 110.0) / 4
        assert call.refusals(110.0) <= call.successes(110.0) / 4
        assert call.used(120.0, 180.0, tight) >= 0.9
        assert not call.ends().dropped


def test_an_exemption_that_is_configured_while_running_is_made_use_of() -> None:
    """From the next step on; and when it is taken back, the limit is found out anew."""
    with calling(7, known=True) as call:
        crowd(call)
        call.at(100.0, lambda: call.reconfigure(exempt=True))
        call.run_until(100.0)
        waiting = len(call.ends().pending)
        assert waiting > 250
        call.run_until(115.0)
        assert not call.ends().pending
        call.at(120.0, lambda: call.reconfigure(exempt=False))
        for name in join(call, 50, HOUR, start=130.0, prefix="late"):
            call.leave(160.0, name)
        call.run_until(240.0)
        assert call.refusals(120.0) <= max(8, call.successes(120.0) / 4)
        assert not call.ends().pending
        assert not call.ends().dropped


def most_at_a_time(call: Call, start: float, end: float) -> list[int]:
    """A list that has, once that time is over, the number of requests that were under way at each of many moments of it."""
    seen: list[int] = []
    for n in range(int((end - start) * 200)):
        call.at(start + n / 200, lambda: seen.append(call.engine._pace(HOMESERVER).in_flight))
    return seen


def test_who_has_shown_no_limit_gets_all_that_may_be_in_flight_step_by_step() -> None:
    """It may have one tomorrow; one that the configuration names as exempt has none."""
    with calling(15, limit=None) as call:
        names = join(call, 120, HOUR)
        for i, name in enumerate(names):
            call.leave(60.0 + 40.0 * (i % 2), name)
        learned, exempt = most_at_a_time(call, 60.0, 70.0), most_at_a_time(call, 100.0, 110.0)
        call.run_until(60.0)
        assert call.limit_known()[0] is Limit.NONE
        call.at(90.0, lambda: call.reconfigure(exempt=True))
        call.run_until(120.0)
        assert len(call.ends().sent) == 120
        assert (max(learned), max(exempt)) == (FREE_WIDTH, 16)


def test_a_homeserver_that_has_granted_hundreds_gets_all_that_may_be_in_flight() -> None:
    """Then it is not slower than one that the configuration names."""
    with calling(15, limit=None) as call:
        for name in join(call, FREE_PROVED + 100, HOUR):
            call.leave(60.0, name)
        proved = most_at_a_time(call, 60.0, 70.0)
        call.run_until(120.0)
        assert len(call.ends().sent) == FREE_PROVED + 100
        assert max(proved) == 16


def test_where_many_deadlines_come_together_restarts_are_made_before_they_are_due() -> None:
    """An exemption ends after a round of restarts that were all made within seconds: at their normal time the next round would not fit."""
    with calling(14, exempt=True) as call:
        join(call, 40, 60.0)
        call.at(60.0, lambda: call.reconfigure(exempt=False))
        call.run_until(300.0)
        assert not call.ends().dropped
        assert call.refusals() <= max(8, call.successes(60.0) / 4)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("0", 0),
        ("3600", 3_600_000),
        ("-5", -5000),
        ("soon", "soon"),
        ("", ""),
        ("Thu, 01 Jan 1970 00:00:00 GMT", ""),
        (None, None),
    ],
)
def test_a_retry_after_that_says_nothing_true(header: str | None, body: Any) -> None:
    """Neither a busy loop nor giving up; and when the limit goes, that is noticed soon."""
    with calling(8) as call:
        call.homeserver.faults = HomeserverFaults(retry_after=header, retry_after_ms=body)
        join(call, 15, 60.0, within=10.0, prefix="s")
        for name in join(call, 300, 24 * HOUR, within=10.0, prefix="g"):
            call.leave(40.0, name)
        call.run_until(240.0, sample=1.0)
        assert not call.ends().dropped
        assert len(call.requests) <= 240 * 2.5
        assert call.steps <= 240 * 15
        assert call.used(60.0, 240.0) >= 0.25
        call.homeserver.limit = None
        call.run_until(270.0)
        assert call.limit_known()[0] is Limit.NONE
        assert not call.ends().pending


# ── what does not fit, and whether that is told in time ──


def test_what_does_not_fit_is_not_accepted() -> None:
    """Of 80 with 60 s as many are accepted as the rate allows, and none of those is dropped in ten minutes. Long delays are always accepted."""
    with calling(9, known=True) as call:
        join(call, 80, 60.0, within=120.0)
        join(call, 20, HOUR, start=130.0, prefix="long")
        call.run_until(720.0)
        ends = call.ends()
        assert 50 <= 80 - len(ends.turned_away) <= 60
        assert all(person.delay == 60.0 for person in ends.turned_away)
        assert all(person.refused is not None and person.refused.limit == "homeservers.as_token" for person in ends.turned_away)
        assert not ends.dropped


def overloaded(call: Call) -> None:
    """50 with 60 s at a homeserver that allows 1 action a second, and after two minutes 0.6."""
    join(call, 50, 60.0, within=60.0)
    call.at(120.0, lambda: setattr(call.homeserver, "limit", RateLimit(0.6, 3.0)))


def test_an_overload_is_forecast_before_it_does_harm() -> None:
    """It cannot end well any more, and that is said before the first is dropped."""
    with calling(10, known=True) as call:
        overloaded(call)
        call.run_until(300.0, sample=0.5)
        ends = call.ends()
        assert ends.dropped, "the overload was none: the test shows nothing"
        assert not ends.turned_away
        told_at = next(forecast.at for forecast in call.forecasts if forecast.lateness > 0)
        assert 120.0 < told_at <= min(ends.dropped_at) - 5.0


def test_an_overload_drags_down_as_few_as_possible() -> None:
    """Those who cannot be kept do not take the actions of those who can: nearly as many are kept as the rate allows, which is 36."""
    with calling(11, known=True) as call:
        overloaded(call)
        call.run_until(500.0)
        assert 28 <= 50 - len(call.ends().dropped) <= 38


def test_nothing_starves() -> None:
    """At nine tenths of the rate, departures one after another are all done, and nobody is dropped over them."""
    with calling(12, known=True) as call:
        join(call, 54, 60.0, within=60.0)
        for i, name in enumerate(join(call, 10, HOUR, within=60.0, prefix="g")):
            call.leave(200.0 + 20.0 * i, name)
        call.run_until(500.0, sample=1.0)
        ends = call.ends()
        assert not ends.dropped
        assert not ends.turned_away
        assert len(ends.sent) == 10
        assert max(ends.sent) <= 120.0
        assert max(forecast.lateness for forecast in call.forecasts) == 0.0


def test_a_clean_state_costs_nothing() -> None:
    """With half of the rate in use there are no refusals, and the engine is not woken more often than it has something to do."""
    with calling(13, known=True) as call:
        join(call, 30, 60.0, within=60.0)
        call.run_until(120.0)
        steps, requests = call.steps, len(call.requests)
        call.run_until(420.0, sample=1.0)
        assert call.refusals(120.0) == 0
        assert not call.ends().dropped
        assert call.steps - steps <= 10 * (len(call.requests) - requests)
        assert max(forecast.lateness for forecast in call.forecasts) == 0.0
