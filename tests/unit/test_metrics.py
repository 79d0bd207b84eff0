"""What is counted for each change, under labels of the configuration only."""

from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sfu_delegate.daemon.serve import _Observer
from sfu_delegate.delegation.model import Action, Answered, DelayedEvent, Lane, Outcome, Presence, State, Verdict
from sfu_delegate.delegation.replies import Touched
from sfu_delegate.delegation.urgency import Limit
from sfu_delegate.engine import Change, Step
from sfu_delegate.observe.metrics import ENDED, GOODBYES_KEPT, REASONS, Metrics
from sfu_delegate.store.base import Disk

from tests.rows import NOW, row

PATTERN = "*.test"


@pytest.fixture
def metrics() -> Metrics:
    """Metrics of a daemon whose only homeservers are those under a pattern."""
    return Metrics(lambda homeserver: PATTERN if homeserver.endswith(".test") else "(not configured)")


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """One sample."""
    found: float | None = metrics.registry.get_sample_value(name, labels)
    return found


def ended(metrics: Metrics, outcome: Outcome, **changes: Any) -> None:
    """An event ends so."""
    old = row(**changes)
    metrics.change(old, old._replace(state=State.DONE, outcome=outcome), NOW)


def test_a_delegation_is_counted_once(metrics: Metrics) -> None:
    """When it is new, and when it is taken up again after its end; not at any other change."""
    new = row()
    metrics.change(None, new, NOW)
    metrics.change(new, new._replace(presence=Presence.AWAY), NOW)
    assert value(metrics, "sfu_delegate_delegated_events_accepted_total", homeserver=PATTERN) == 1
    metrics.change(row(state=State.DONE), new, NOW)
    assert value(metrics, "sfu_delegate_delegated_events_accepted_total", homeserver=PATTERN) == 2


@pytest.mark.parametrize("outcome", ENDED)
def test_each_outcome_is_counted(metrics: Metrics, outcome: Outcome) -> None:
    """Under its own name, once, though a finished row may still change."""
    ended(metrics, outcome)
    done = row(state=State.DONE, outcome=outcome)
    metrics.change(done, done._replace(sessions=()), NOW)
    counted: dict[Outcome, float | None] = {
        other: value(metrics, "sfu_delegate_delegated_events_ended_total", homeserver=PATTERN, outcome=other.value) for other in ENDED
    }
    assert {other for other, count in counted.items() if count} == {outcome}
    assert counted[outcome] == 1


@pytest.mark.parametrize(
    ("outcome", "changes", "lost"),
    [
        (Outcome.LOST, {}, 1),
        (Outcome.REJECTED, {}, 1),
        (Outcome.REJECTED, {"presence": Presence.GONE}, 0),
        (Outcome.REJECTED, {"verified_at": None}, 0),  # refused when it was delegated: there was nothing to lose yet
        (Outcome.RAN_OUT, {"presence": Presence.GONE}, 0),
        (Outcome.ALREADY_ENDED, {}, 0),
        (Outcome.SENT, {"presence": Presence.GONE}, 0),
        (Outcome.REPLACED, {}, 0),
        (Outcome.WITHDRAWN, {}, 0),
        (Outcome.UNKNOWN, {"verified_at": None}, 0),
    ],
)
def test_what_must_not_happen_is_counted_by_itself(metrics: Metrics, outcome: Outcome, changes: dict[str, Any], lost: int) -> None:
    """Events that were lost while their participant was connected, and nothing else."""
    ended(metrics, outcome, **changes)
    assert (value(metrics, "sfu_delegate_events_lost_while_connected_total", homeserver=PATTERN) or 0) == lost


@pytest.mark.parametrize("outcome", [Outcome.SENT, Outcome.CANCELLED])
def test_the_time_from_the_departure_to_the_end(metrics: Metrics, outcome: Outcome) -> None:
    """In seconds, for what was ended by us."""
    ended(metrics, outcome, presence=Presence.GONE, ended_at=NOW - 2.0)
    assert value(metrics, "sfu_delegate_disconnect_to_end_seconds_count", homeserver=PATTERN) == 1
    assert value(metrics, "sfu_delegate_disconnect_to_end_seconds_sum", homeserver=PATTERN) == 2.0


def test_an_end_without_a_departure_has_no_such_time(metrics: Metrics) -> None:
    """A client that was faster says nothing about us."""
    ended(metrics, Outcome.ALREADY_ENDED, presence=Presence.GONE, ended_at=NOW - 2.0)
    ended(metrics, Outcome.SENT)
    assert value(metrics, "sfu_delegate_disconnect_to_end_seconds_count", homeserver=PATTERN) is None


@pytest.mark.parametrize(("answered_at", "seconds"), [(NOW + 2.0, 7.0), (None, 37.0)])
def test_the_time_to_the_end_is_over_when_the_answer_comes(metrics: Metrics, answered_at: float | None, seconds: float) -> None:
    """Not when it is kept, for which answers wait for company: that is when the step was, and counts where nothing else is known."""
    old = row(Presence.GONE, ended_at=NOW - 5.0)
    answer = Answered(old.homeserver, old.id, old.claim, Action.SEND, NOW, Verdict.DONE, answered_at=answered_at)
    change = Change(old, old._replace(state=State.DONE, outcome=Outcome.SENT), answer)
    _Observer(metrics).step(Step([Touched(1)], [], None, [change], []), 1, 0.001, NOW + 32.0)
    assert value(metrics, "sfu_delegate_disconnect_to_end_seconds_count", homeserver=PATTERN) == 1
    assert value(metrics, "sfu_delegate_disconnect_to_end_seconds_sum", homeserver=PATTERN) == seconds


def test_the_fraction_of_the_delay_at_a_restart(metrics: Metrics) -> None:
    """Of all restarts but the first, whose countdown began at an unknown time."""
    first = row(verified_at=None, restarts=0, running_since=NOW - 3600.0)
    verified = first._replace(verified_at=NOW, restarts=1, running_since=NOW)
    metrics.change(first, verified, NOW)
    assert value(metrics, "sfu_delegate_restart_delay_fraction_count", homeserver=PATTERN) is None
    metrics.change(verified, verified._replace(restarts=2, running_since=NOW + 0.7 * verified.delay), NOW)
    assert value(metrics, "sfu_delegate_restart_delay_fraction_count", homeserver=PATTERN) == 1
    assert value(metrics, "sfu_delegate_restart_delay_fraction_sum", homeserver=PATTERN) == pytest.approx(0.7)


def test_actions_and_looks_are_counted_and_timed(metrics: Metrics) -> None:
    """By homeserver, action and outcome; by SFU and outcome."""
    metrics.action("one.test", Action.SEND, "done", 0.04)
    metrics.action("two.test", Action.SEND, "done", 0.06)
    metrics.action("elsewhere.example", Action.RESTART, "failed", 1.0)
    metrics.look("main", "failed", 0.5)
    assert value(metrics, "sfu_delegate_actions_total", homeserver=PATTERN, action="send", outcome="done") == 2
    assert value(metrics, "sfu_delegate_action_seconds_sum", homeserver=PATTERN, action="send") == pytest.approx(0.1)
    assert value(metrics, "sfu_delegate_actions_total", homeserver="(not configured)", action="restart", outcome="failed") == 1
    assert value(metrics, "sfu_delegate_looks_total", sfu="main", outcome="failed") == 1
    assert value(metrics, "sfu_delegate_look_seconds_sum", sfu="main") == 0.5


def test_commits_and_the_database(metrics: Metrics) -> None:
    """How long, how many inputs, and whether it works at all."""
    metrics.committed(3, 0.002)
    metrics.committed(0, 0.001)
    metrics.store(works=True)
    assert value(metrics, "sfu_delegate_commit_seconds_count") == 2
    assert value(metrics, "sfu_delegate_batch_inputs_sum") == 3
    assert value(metrics, "sfu_delegate_database_works") == 1
    metrics.store(works=False)
    assert value(metrics, "sfu_delegate_database_works") == 0


def test_the_forecast_of_several_homeservers_under_one_pattern_is_the_worst(metrics: Metrics) -> None:
    """The longest lateness and the slowest rate; without a limit the rate is 0; and it goes back to 0 when all is well."""
    limits = {"one.test": (Limit.SOME, 2.0), "two.test": (Limit.SOME, 0.5), "three.test": (Limit.NONE, 1.0)}
    metrics.forecast({"one.test": 3.0, "two.test": 8.0, "three.test": 0.0}, limits)
    late, rate = "sfu_delegate_restart_forecast_lateness_seconds", "sfu_delegate_homeserver_rate_limit"
    assert value(metrics, late, homeserver=PATTERN) == 8.0
    assert value(metrics, rate, homeserver=PATTERN) == 0.5
    metrics.forecast({"one.test": 0.0, "two.test": 0.0}, {"one.test": (Limit.NONE, 1.0), "two.test": (Limit.UNKNOWN, 1.0)})
    assert value(metrics, late, homeserver=PATTERN) == 0.0
    assert value(metrics, rate, homeserver=PATTERN) == 0.0


def test_the_backlog_of_several_homeservers_under_one_pattern(metrics: Metrics) -> None:
    """Added up, with the oldest of all; timers are no backlog; and what is gone is 0, not forgotten."""
    counted = {("one.test", Lane.END): (2, NOW - 5.0), ("two.test", Lane.END): (3, NOW - 9.0), ("one.test", Lane.TIMER): (100, NOW - 99.0)}
    metrics.backlog(counted, NOW)
    assert value(metrics, "sfu_delegate_backlog_actions", homeserver=PATTERN, lane="end") == 5
    assert value(metrics, "sfu_delegate_backlog_lateness_seconds", homeserver=PATTERN, lane="end") == 9.0
    assert value(metrics, "sfu_delegate_backlog_actions", homeserver=PATTERN, lane="timer") is None
    metrics.backlog({("one.test", Lane.RESTART): (1, NOW + 1.0)}, NOW)
    assert value(metrics, "sfu_delegate_backlog_actions", homeserver=PATTERN, lane="end") == 0
    assert value(metrics, "sfu_delegate_backlog_lateness_seconds", homeserver=PATTERN, lane="end") == 0
    assert value(metrics, "sfu_delegate_backlog_actions", homeserver=PATTERN, lane="restart") == 1
    assert value(metrics, "sfu_delegate_backlog_lateness_seconds", homeserver=PATTERN, lane="restart") == 0


def test_delegated_events_by_state(metrics: Metrics) -> None:
    """Asked for when somebody scrapes, and added up by label."""
    states = {("one.test", "live", "connected"): 2, ("two.test", "live", "connected"): 3, ("one.test", "done", "gone"): 1}
    metrics.watch_states(lambda: states)
    assert value(metrics, "sfu_delegate_delegated_events", homeserver=PATTERN, state="live", presence="connected") == 5
    states["two.test", "live", "connected"] = 0
    assert value(metrics, "sfu_delegate_delegated_events", homeserver=PATTERN, state="live", presence="connected") == 2


def test_a_state_that_nobody_is_in_any_more_goes_on_as_zero(metrics: Metrics) -> None:
    """The engine does not name it any more; a series that ends would go on at its last value for a while."""
    states = {("one.test", "live", "connected"): 2, ("elsewhere.example", "ending", "gone"): 1}
    metrics.watch_states(lambda: states)
    assert value(metrics, "sfu_delegate_delegated_events", homeserver="(not configured)", state="ending", presence="gone") == 1
    states.clear()
    for _ in range(2):
        assert value(metrics, "sfu_delegate_delegated_events", homeserver="(not configured)", state="ending", presence="gone") == 0
        assert value(metrics, "sfu_delegate_delegated_events", homeserver=PATTERN, state="live", presence="connected") == 0
    states["two.test", "live", "connected"] = 3
    assert value(metrics, "sfu_delegate_delegated_events", homeserver=PATTERN, state="live", presence="connected") == 3
    assert value(metrics, "sfu_delegate_delegated_events", homeserver="(not configured)", state="ending", presence="gone") == 0


@pytest.mark.parametrize(
    ("reason", "label"), [("CLIENT_INITIATED", "CLIENT_INITIATED"), ("MISSING", "MISSING"), ("NEVER_JOINED", "NEVER_JOINED"), ("chosen", "OTHER")]
)
def test_a_departure_is_counted_by_its_reason(metrics: Metrics, reason: str, label: str) -> None:
    """Once, when the participant is found to be gone; what LiveKit may call otherwise some day makes no label."""
    away = row(Presence.AWAY, reason=reason, sfu="main")
    gone = away._replace(presence=Presence.GONE, ended_at=NOW)
    metrics.change(away._replace(presence=Presence.CONNECTED), away, NOW)
    metrics.change(away, gone, NOW)
    metrics.change(gone, gone._replace(attempts=1), NOW)
    assert value(metrics, "sfu_delegate_departures_total", sfu="main", reason=label) == 1
    assert len(next(iter(metrics.departures.collect())).samples) == 1


def test_the_departure_that_waits_the_longest(metrics: Metrics) -> None:
    """Of all homeservers under one pattern, until nobody waits any more."""
    name = "sfu_delegate_unsent_departure_seconds"
    metrics.waiting_since({"one.test": NOW - 3.0, "two.test": NOW - 40.0}, NOW)
    assert value(metrics, name, homeserver=PATTERN) == 40.0
    metrics.waiting_since({"one.test": NOW + 5.0}, NOW)  # back while its goodbye is under way: that is no departure
    assert value(metrics, name, homeserver=PATTERN) == 0.0
    metrics.waiting_since({"one.test": NOW - 8.0}, NOW)
    metrics.waiting_since({}, NOW)
    assert value(metrics, name, homeserver=PATTERN) == 0.0


def test_who_could_not_be_worked_with(metrics: Metrics) -> None:
    """How many homeservers under each entry, and each SFU by itself; an application service has a metric of its own."""
    conditions = {
        ("homeserver", "one.test"): "no connection",
        ("homeserver", "two.test"): "",
        ("homeserver", "three.test"): "502",
        ("homeserver", "removed.example"): "",
        ("sfu", "main"): "",
        ("sfu", "other"): "it does not answer",
        ("application_service", "one.test"): "token",
    }
    metrics.watch_conditions(lambda: conditions)
    assert value(metrics, "sfu_delegate_homeservers_failing", homeserver=PATTERN) == 2
    assert value(metrics, "sfu_delegate_homeservers_failing", homeserver="(not configured)") == 0
    assert value(metrics, "sfu_delegate_sfu_works", sfu="main") == 1
    assert value(metrics, "sfu_delegate_sfu_works", sfu="other") == 0
    conditions.clear()
    assert value(metrics, "sfu_delegate_homeservers_failing", homeserver=PATTERN) is None


def test_webhooks_that_came_late(metrics: Metrics) -> None:
    """As the engine has counted them when somebody scrapes."""
    late = {"main": 0}
    metrics.watch_late(lambda: late)
    assert value(metrics, "sfu_delegate_webhooks_late_total", sfu="main") == 0
    late["main"] += 2
    assert value(metrics, "sfu_delegate_webhooks_late_total", sfu="main") == 2


def test_the_disk(metrics: Metrics) -> None:
    """What cannot be looked at leaves what was known, and has no value before."""
    metrics.disk(Disk(4096, 10**9))
    metrics.disk(None)
    assert value(metrics, "sfu_delegate_database_bytes") == 4096
    assert value(metrics, "sfu_delegate_database_free_bytes") == 10**9


def test_no_disk_is_no_full_disk(metrics: Metrics) -> None:
    """With PostgreSQL nothing is known of it, so nothing is shown."""
    metrics.disk(None)
    assert value(metrics, "sfu_delegate_database_free_bytes") is None


def test_webhooks(metrics: Metrics) -> None:
    """By SFU, event and result, and how long those that mattered took."""
    metrics.on_webhook("main", "participant_left", "stored")
    metrics.on_acknowledged(0.003)
    assert value(metrics, "sfu_delegate_webhooks_total", sfu="main", event="participant_left", result="stored") == 1
    assert value(metrics, "sfu_delegate_webhook_acknowledge_seconds_sum") == 0.003


def test_zeros_are_shown_for_what_is_configured(metrics: Metrics) -> None:
    """So that a first bad event is an increase, which an alert can see."""
    metrics.known([PATTERN], ["main"])
    assert value(metrics, "sfu_delegate_events_lost_while_connected_total", homeserver=PATTERN) == 0
    assert value(metrics, "sfu_delegate_looks_total", sfu="main", outcome="failed") == 0
    assert value(metrics, "sfu_delegate_webhooks_total", sfu="unknown", event="unknown", result="bad_signature") == 0
    for reason in REASONS:
        assert value(metrics, "sfu_delegate_departures_total", sfu="main", reason=reason) == 0
    for outcome in ENDED:
        assert value(metrics, "sfu_delegate_delegated_events_ended_total", homeserver=PATTERN, outcome=outcome.value) == 0


def everything(metrics: Metrics) -> DelayedEvent:
    """Every metric gets a sample. Returns the row that it was about."""
    chosen = row(
        homeserver="chosen-by-a-client.test",
        room="chosen-room",
        identity="chosen-identity",
        user="@chosen-user:hs.test",
        delay_id="chosen-delay-id",
        delegation="dlg_chosen",
    )
    metrics.watch_states(lambda: {(chosen.homeserver, "live", "connected"): 1})
    metrics.known([PATTERN])
    metrics.change(None, chosen, NOW)
    metrics.change(chosen, chosen._replace(restarts=9, running_since=NOW), NOW)
    for outcome in ENDED:
        metrics.change(chosen, chosen._replace(state=State.DONE, outcome=outcome, ended_at=NOW), NOW)
    metrics.action(chosen.homeserver, Action.SEND, "done", 0.1)
    metrics.look("main", "done", 0.1)
    metrics.backlog({(chosen.homeserver, Lane.END): (1, NOW)}, NOW)
    metrics.on_webhook("main", "other", "ignored")
    metrics.reloads.labels("done").inc()
    return chosen


def test_no_name_that_a_client_chose_is_exposed(metrics: Metrics) -> None:
    """Not as a label, and not anywhere else."""
    everything(metrics)
    assert "chosen" not in generate_latest(metrics.registry).decode()


def test_the_names_are_what_prometheus_expects(metrics: Metrics) -> None:
    """One prefix, `_total` on counters, the unit on times, a help text on each, and no series of creation times."""
    everything(metrics)
    exposition = generate_latest(metrics.registry).decode()
    for family in text_string_to_metric_families(exposition):
        assert family.name.startswith(("sfu_delegate_", "process_"))  # the latter are called so by everybody
        assert family.documentation.strip()
        for sample in family.samples:
            assert not sample.name.endswith("_created")
            if family.type == "counter":
                assert sample.name.endswith("_total")
            if family.type == "histogram":
                assert family.name.endswith(("_seconds", "_fraction", "_inputs"))


def test_the_forecast_of_a_homeserver_that_has_no_delegations_any_more_is_zero() -> None:
    """Nobody will be late there."""
    metrics = Metrics(lambda homeserver: homeserver)
    metrics.forecast({"a.test": 30.0, "b.test": 0.0}, {})
    assert metrics.registry.get_sample_value("sfu_delegate_restart_forecast_lateness_seconds", {"homeserver": "a.test"}) == 30.0
    metrics.forecast({"b.test": 0.0}, {})
    assert metrics.registry.get_sample_value("sfu_delegate_restart_forecast_lateness_seconds", {"homeserver": "a.test"}) == 0.0


# ── what operators ask for ──


def test_a_counter_is_read_by_its_labels(metrics: Metrics) -> None:
    """As far as it has counted anything."""
    metrics.known(["hs.test"])
    ended(metrics, Outcome.SENT)
    ended(metrics, Outcome.SENT)
    assert metrics.counted(metrics.ended) == {(PATTERN, "sent"): 2}
    assert metrics.counted(metrics.lost) == {}


def test_how_long_goodbyes_took_is_told_to_the_letter(metrics: Metrics) -> None:
    """Over all homeservers: not guessed from buckets, and of the last ones only, so that a bad hour does not stay for ever."""
    assert metrics.goodbyes() is None
    for seconds in (3.0, 1.0, 2.0):
        ended(metrics, Outcome.SENT, presence=Presence.GONE, ended_at=NOW - seconds)
    assert metrics.goodbyes() == (3, 3, 2.0, 3.0, 3.0)
    for _ in range(GOODBYES_KEPT):
        ended(metrics, Outcome.CANCELLED, presence=Presence.GONE, ended_at=NOW - 0.5, homeserver="other.test")
    assert metrics.goodbyes() == (GOODBYES_KEPT + 3, GOODBYES_KEPT, 0.5, 0.5, 0.5)
