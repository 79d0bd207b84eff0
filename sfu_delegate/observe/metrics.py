"""What Prometheus scrapes. Labels come from the configuration and from our own words only, never from what a client sent."""

from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from math import ceil, inf
from typing import Generic, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from sfu_delegate import __version__
from sfu_delegate.delegation.model import Action, DelayedEvent, Lane, Outcome, Presence, State
from sfu_delegate.delegation.policy import DEPARTURES, ENDED_BY_OPERATOR, NEVER_JOINED, OTHER
from sfu_delegate.delegation.urgency import Limit
from sfu_delegate.livekit.webhook import Refusal
from sfu_delegate.matrix.service import Part
from sfu_delegate.store.base import Disk

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
# Close together where goodbyes are that nothing holds up: 2 s after a hang-up, 5 s after a broken connection.
_DEPARTURES = (0.1, 0.25, 0.5, 1.0, 2.0, 2.25, 2.5, 3.0, 4.0, 5.0, 5.25, 5.5, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
_BATCHES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

ENDED = tuple(outcome for outcome in Outcome if outcome is not Outcome.OPEN)
REASONS = (*DEPARTURES, NEVER_JOINED, ENDED_BY_OPERATOR)
"""Why somebody is gone, as a label: what LiveKit calls otherwise is OTHER."""
_REASONS = frozenset(REASONS)


class _States(Collector):
    """Delayed events by state, counted when somebody asks."""

    def __init__(self, states: Callable[[], Mapping[tuple[str, str, str], int]], label: Callable[[str], str]) -> None:
        self._states = states
        self._label = label
        self._seen: set[tuple[str, str, str]] = set()  # what is none any more goes on as 0

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """See prometheus_client."""
        family = GaugeMetricFamily(
            "sfu_delegate_delegated_events",
            "Delayed events by state, and by presence of their participant.",
            labels=("homeserver", "state", "presence"),
        )
        tally: Tally[tuple[str, str, str]] = Tally(dict.fromkeys(self._seen, 0))
        for (homeserver, state, presence), count in self._states().items():
            tally[self._label(homeserver), state, presence] += count
        for labels, count in sorted(tally.items()):
            family.add_metric(labels, count)
        self._seen.update(tally)
        yield family


class _Conditions(Collector):
    """Whom the daemon could not work with when it last asked, found out when somebody asks us."""

    def __init__(self, conditions: Callable[[], Mapping[tuple[str, str], str]], label: Callable[[str], str]) -> None:
        self._conditions = conditions
        self._label = label

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """See prometheus_client."""
        failing = GaugeMetricFamily(
            "sfu_delegate_homeservers_failing",
            "Homeservers that match this entry and could not be worked with when they were last asked: no answer, a server error, delayed events "
            "switched off. A rate limit is no failure. Who was not asked yet does not count.",
            labels=("homeserver",),
        )
        works = GaugeMetricFamily(
            "sfu_delegate_sfu_works", "1 where the SFU could be asked when it was last tried, else 0; none before that.", labels=("sfu",)
        )
        tally: Tally[str] = Tally()
        for (kind, name), problem in sorted(self._conditions().items()):
            if kind == "homeserver":
                tally[self._label(name)] += bool(problem)
            elif kind == "sfu":
                works.add_metric((name,), not problem)
        for label, count in sorted(tally.items()):
            failing.add_metric((label,), count)
        yield failing
        yield works


class _Late(Collector):
    """Webhooks that came late, which the engine counts anyway."""

    def __init__(self, late: Callable[[], Mapping[str, int]]) -> None:
        self._late = late

    def collect(self) -> Iterable[CounterMetricFamily]:
        """See prometheus_client."""
        family = CounterMetricFamily(
            "sfu_delegate_webhooks_late",
            "Webhooks about delegated participants and their rooms that took longer to come than others of that SFU, by `presence.late_after` or "
            "more: LiveKit's queue is long, or had to repeat. Clocks that differ do not count.",
            labels=("sfu",),
        )
        for sfu, count in sorted(self._late().items()):
            family.add_metric((sfu,), count)
        yield family


M = TypeVar("M", bound=MetricWrapperBase)


class _By(dict[tuple[str, ...], M], Generic[M]):
    """A metric's children by their labels: prometheus_client takes 2 µs and a lock to find one. Labels come from bounded sets."""

    def __init__(self, metric: M) -> None:
        super().__init__()
        self._metric = metric

    def __missing__(self, labels: tuple[str, ...]) -> M:
        child = self[labels] = self._metric.labels(*labels)
        return child


class Goodbyes(NamedTuple):
    """How long goodbyes took, from the word of a departure to that of the homeserver, in seconds. Of the last ones, to the letter."""

    all: int  # since the start
    of: int  # so many of them are told of
    p50: float
    p99: float
    longest: float


GOODBYES_KEPT = 1000


class Metrics:
    """All metrics, in a registry of their own.

    `label` gives the configuration's name for a homeserver: the entry that it matches, since the name itself may be a client's choice.
    """

    def __init__(self, label: Callable[[str], str], registry: CollectorRegistry | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asks for
        self.registry = CollectorRegistry() if registry is None else registry
        self.label = label
        at = self.registry
        Info("sfu_delegate_build", "The running version.", registry=at).info({"version": __version__})
        self.webhooks = Counter("sfu_delegate_webhooks_total", "Webhooks by SFU, event and result.", ("sfu", "event", "result"), registry=at)
        self.acknowledged = Histogram(
            "sfu_delegate_webhook_acknowledge_seconds", "From a webhook's first byte to its answer.", buckets=_FAST, registry=at
        )
        self.matrixrtc = Counter(
            "sfu_delegate_matrixrtc_requests_total",
            "Requests to the MatrixRTC endpoints by HTTP status, and whether a delayed event was to be delegated.",
            ("endpoint", "status", "delegation"),
            registry=at,
        )
        self.openid = Counter(
            "sfu_delegate_openid_checks_total",
            "OpenID tokens by what their homeserver said: ok, refused, or unavailable (it could not be asked).",
            ("homeserver", "result"),
            registry=at,
        )
        self.openid_seconds = Histogram(
            "sfu_delegate_openid_check_seconds", "How long such a check takes, with server discovery where it is needed.", buckets=_FAST, registry=at
        )
        self.memberships = Counter(
            "sfu_delegate_membership_checks_total",
            "Questions to homeservers whether somebody in a call is in the Matrix room, where membership is enforced: joined, not_joined, "
            "cannot_tell (the homeserver does not offer it), or unavailable.",
            ("homeserver", "result"),
            registry=at,
        )
        self.removals = Counter(
            "sfu_delegate_participants_removed_total",
            "Participants that were removed from a call since their user is not in the Matrix room.",
            ("sfu",),
            registry=at,
        )
        self.service_works = Gauge(
            "sfu_delegate_application_service_works",
            "1 where all that the application service needs worked at the homeserver when it was last tried, else 0; what "
            "could not be tried has no value. "
            "token: it is registered and may speak for users; membership: MSC4502; federation: MSC4512; proxy: clients' requests come here.",
            ("homeserver", "part"),
            registry=at,
        )
        self.tls_verified = Gauge(
            "sfu_delegate_federation_tls_verified",
            "1 while the certificates of homeservers are verified. 0: anybody on the network can pose as any user; for test networks only.",
            registry=at,
        )
        self.actions = Counter(
            "sfu_delegate_actions_total",
            "Requests to homeservers by action and outcome. Limited ones were refused by a rate limit.",
            ("homeserver", "action", "outcome"),
            registry=at,
        )
        self.action_seconds = Histogram(
            "sfu_delegate_action_seconds", "How long requests to homeservers take.", ("homeserver", "action"), buckets=_LONG, registry=at
        )
        self.looks = Counter("sfu_delegate_looks_total", "Looks at SFUs, by outcome.", ("sfu", "outcome"), registry=at)
        self.look_seconds = Histogram("sfu_delegate_look_seconds", "How long looks at SFUs take.", ("sfu",), buckets=_FAST, registry=at)
        self.to_end = Histogram(
            "sfu_delegate_disconnect_to_end_seconds",
            "From the word of a departure to the homeserver's word that the delayed event was sent or cancelled.",
            ("homeserver",),
            buckets=_DEPARTURES,
            registry=at,
        )
        self.unsent = Gauge(
            "sfu_delegate_unsent_departure_seconds",
            "How long ago the participant left whose delayed event waits the longest to be sent or cancelled, failed tries included; 0: none waits.",
            ("homeserver",),
            registry=at,
        )
        self.departures = Counter(
            "sfu_delegate_departures_total",
            "Participants found to be gone, one for each of their delayed events, by LiveKit's reason or by ours: MISSING, ROOM_MISSING and "
            "ROOM_RESTARTED are those that no webhook had told.",
            ("sfu", "reason"),
            registry=at,
        )
        self.accepted = Counter("sfu_delegate_delegated_events_accepted_total", "Delayed events handed over.", ("homeserver",), registry=at)
        self.ended = Counter(
            "sfu_delegate_delegated_events_ended_total",
            "How delegations end. already_ended is the normal end of a call: the client was faster.",
            ("homeserver", "outcome"),
            registry=at,
        )
        self.lost = Counter(
            "sfu_delegate_events_lost_while_connected_total",
            "Events that ran out, or were gone at the homeserver, although their participant was connected. Must stay 0.",
            ("homeserver",),
            registry=at,
        )
        self.fraction = Histogram(
            "sfu_delegate_restart_delay_fraction",
            "The part of the delay that had passed at each restart but the first.",
            ("homeserver",),
            buckets=_FRACTIONS,
            registry=at,
        )
        self.waiting = Gauge("sfu_delegate_backlog_actions", "Actions that are due and not begun.", ("homeserver", "lane"), registry=at)
        self.lateness = Gauge(
            "sfu_delegate_backlog_lateness_seconds", "How long the oldest of them has been due.", ("homeserver", "lane"), registry=at
        )
        self.late = Gauge(
            "sfu_delegate_restart_forecast_lateness_seconds",
            "The seconds by which the most endangered restart will miss its deadline at the current rate; 0 when all is well. Alert on it: harm "
            "has not been done yet.",
            ("homeserver",),
            registry=at,
        )
        self.rate = Gauge(
            "sfu_delegate_homeserver_rate_limit",
            "The requests a second that a homeserver allows, as far as it has shown; 0: it does not limit them, or that is not known yet.",
            ("homeserver",),
            registry=at,
        )
        self.commit_seconds = Histogram(
            "sfu_delegate_commit_seconds", "From the begin of a transaction to its durable end.", buckets=_FAST, registry=at
        )
        self.batch_size = Histogram("sfu_delegate_batch_inputs", "Inputs in one transaction.", buckets=_BATCHES, registry=at)
        self.clock_difference = Gauge(
            "sfu_delegate_clock_difference_seconds",
            "By how much the system clock is ahead of the daemon's, which runs on evenly from the start, or follows PostgreSQL's.",
            registry=at,
        )
        self.instances = Gauge("sfu_delegate_instances", "Instances that work with the database, this one included, as far as it knows.", registry=at)
        self.database_works = Gauge("sfu_delegate_database_works", "1 while the database takes transactions, else 0.", registry=at)
        self.delegations = Counter("sfu_delegate_delegation_requests_total", "`POST /v1/delegations` by HTTP status.", ("status",), registry=at)
        self.reloads = Counter("sfu_delegate_config_reloads_total", "SIGHUPs, by result.", ("result",), registry=at)
        self._webhooks, self._actions, self._action_seconds = _By(self.webhooks), _By(self.actions), _By(self.action_seconds)
        self._accepted, self._ended, self._to_end, self._fraction = _By(self.accepted), _By(self.ended), _By(self.to_end), _By(self.fraction)
        self._looks, self._look_seconds, self._openid, self._matrixrtc = (
            _By(self.looks),
            _By(self.look_seconds),
            _By(self.openid),
            _By(self.matrixrtc),
        )
        self._departures, self._delegations = _By(self.departures), _By(self.delegations)
        ProcessCollector(registry=at)
        self._goodbyes = 0
        self._last_goodbyes: deque[float] = deque(maxlen=GOODBYES_KEPT)
        self._backlogs: set[tuple[str, str]] = set()
        self._forecasts: set[str] = set()
        self._unsent: set[str] = set()
        self._disk: tuple[Gauge, Gauge] | None = None

    def watch_states(self, states: Callable[[], Mapping[tuple[str, str, str], int]]) -> None:
        """Where the number of delayed events by (homeserver, state, presence) is to be had."""
        self.registry.register(_States(states, self.label))

    def watch_conditions(self, conditions: Callable[[], Mapping[tuple[str, str], str]]) -> None:
        """Where it is to be had what is wrong with ("homeserver" or "sfu", name), or ""."""
        self.registry.register(_Conditions(conditions, self.label))

    def watch_late(self, late: Callable[[], Mapping[str, int]]) -> None:
        """Where the number of webhooks that came late is to be had, by SFU."""
        self.registry.register(_Late(late))

    def watch_clock(self, difference: Callable[[], float]) -> None:
        """Where the seconds by which the system clock is ahead of ours come from."""
        self.clock_difference.set_function(difference)

    def known(self, homeservers: Iterable[str], sfus: Iterable[str] = ()) -> None:
        """Show zeros for what the configuration names, so that a first bad event is an increase."""
        for refusal in Refusal:
            self.webhooks.labels("unknown", "unknown", refusal.value)
        for result in ("done", "refused"):
            self.reloads.labels(result)
        for sfu in sfus:
            for reason in REASONS:
                self.departures.labels(sfu, reason)
            for outcome in ("done", "failed"):
                self.looks.labels(sfu, outcome)
        for homeserver in homeservers:
            self.lost.labels(homeserver)
            self.accepted.labels(homeserver)
            self.late.labels(homeserver)
            self.rate.labels(homeserver)
            self.unsent.labels(homeserver)
            self.to_end.labels(homeserver)
            self.fraction.labels(homeserver)
            self.actions.labels(homeserver, Action.SEND.value, "limited")
            for lane in ("end", "restart"):
                self.waiting.labels(homeserver, lane)
                self.lateness.labels(homeserver, lane)
            for outcome in ENDED:
                self.ended.labels(homeserver, outcome.value)

    # ── what operators ask for ──

    def counted(self, metric: Counter) -> dict[tuple[str, ...], int]:
        """A counter's values by its labels, as far as there are any."""
        (family,) = metric.collect()
        names = metric._labelnames
        return {tuple(s.labels[name] for name in names): round(s.value) for s in family.samples if s.name.endswith("_total") and s.value}

    def goodbyes(self) -> Goodbyes | None:
        """How long the last goodbyes took; None where there was none."""
        last = sorted(self._last_goodbyes)
        if not last:
            return None
        p50, p99 = (last[max(0, ceil(part * len(last)) - 1)] for part in (0.5, 0.99))
        return Goodbyes(self._goodbyes, len(last), p50, p99, last[-1])

    # ── what is told ──

    def on_webhook(self, sfu: str, event: str, result: str) -> None:
        """A webhook was answered."""
        self._webhooks[sfu, event, result].inc()

    def on_acknowledged(self, seconds: float) -> None:
        """A webhook that mattered was durable, and its answer ready, after `seconds`."""
        self.acknowledged.observe(seconds)

    def on_matrixrtc(self, endpoint: str, status: int, delegates: bool) -> None:
        """A request to a MatrixRTC endpoint was answered."""
        self._matrixrtc[endpoint, str(status), "yes" if delegates else "no"].inc()

    def on_delegation(self, status: int) -> None:
        """`POST /v1/delegations` was answered."""
        self._delegations[str(status),].inc()

    def openid_check(self, homeserver: str, result: str, seconds: float) -> None:
        """An OpenID token was checked, or could not be."""
        self._openid[self.label(homeserver), result].inc()
        self.openid_seconds.observe(seconds)

    def service(self, homeserver: str, broken: Container[Part], checked: Iterable[Part]) -> None:
        """What an application service needs was checked at a homeserver."""
        label, tried = self.label(homeserver), set(checked)
        for part in Part:
            if part in tried:
                self.service_works.labels(label, part.value).set(part not in broken)
            else:
                with suppress(KeyError):
                    self.service_works.remove(label, part.value)

    def membership(self, homeserver: str, result: str) -> None:
        """A homeserver was asked whether somebody is in a room."""
        self.memberships.labels(self.label(homeserver), result).inc()

    def removed(self, sfu: str) -> None:
        """Somebody was removed from a call."""
        self.removals.labels(sfu).inc()

    def change(self, old: DelayedEvent | None, new: DelayedEvent, now: float) -> None:
        """A row changed, durably."""
        homeserver = self.label(new.homeserver)
        if old is None or (old.state is State.DONE and new.state is not State.DONE):
            self._accepted[homeserver,].inc()
            return
        if new.restarts > old.restarts and old.verified_at is not None:
            self._fraction[homeserver,].observe((new.running_since - old.running_since) / new.delay)
        if new.presence is Presence.GONE and old.presence is not Presence.GONE:
            self._departures[new.sfu, new.reason if new.reason in _REASONS else OTHER].inc()
        if new.state is State.DONE and old.state is not State.DONE:
            self._ended[homeserver, new.outcome].inc()
            there = new.verified_at is not None and new.presence is Presence.CONNECTED
            if new.outcome is Outcome.LOST or (there and new.outcome in (Outcome.REJECTED, Outcome.RAN_OUT)):
                self.lost.labels(homeserver).inc()
            if new.outcome in (Outcome.SENT, Outcome.CANCELLED) and new.ended_at is not None:
                seconds = max(0.0, now - new.ended_at)
                self._to_end[homeserver,].observe(seconds)
                self._last_goodbyes.append(seconds)
                self._goodbyes += 1

    def action(self, homeserver: str, action: Action, outcome: str, seconds: float) -> None:
        """A request to a homeserver came to an end."""
        name = self.label(homeserver)
        self._actions[name, action, outcome].inc()
        self._action_seconds[name, action].observe(seconds)

    def look(self, sfu: str, outcome: str, seconds: float) -> None:
        """A look at an SFU came to an end."""
        self._looks[sfu, outcome].inc()
        self._look_seconds[sfu,].observe(seconds)

    def watch_instances(self, count: Callable[[], int]) -> None:
        """Where the number of instances comes from."""
        self.instances.set_function(count)

    def committed(self, inputs: int, seconds: float) -> None:
        """A transaction was committed."""
        self.commit_seconds.observe(seconds)
        self.batch_size.observe(inputs)

    def store(self, *, works: bool) -> None:
        """The database works, or does not."""
        self.database_works.set(1 if works else 0)

    def forecast(self, lateness: Mapping[str, float], rates: Mapping[str, tuple[Limit, float]]) -> None:
        """How late restarts will be, and the rates that are known; of the homeservers behind one label the worst."""
        worst: dict[str, float] = {}
        slowest: dict[str, float] = {}
        for homeserver, seconds in lateness.items():
            label = self.label(homeserver)
            worst[label] = max(seconds, worst.get(label, 0.0))
        for homeserver, (limit, rate) in rates.items():
            label = self.label(homeserver)
            known = rate if limit is Limit.SOME else inf
            slowest[label] = min(known, slowest.get(label, inf))
        for label in self._forecasts - set(worst):
            self.late.labels(label).set(0.0)
        for label, seconds in worst.items():
            self.late.labels(label).set(seconds)
        self._forecasts |= set(worst)
        for label, rate in slowest.items():
            self.rate.labels(label).set(0.0 if rate == inf else rate)

    def waiting_since(self, departures: Mapping[str, float], now: float) -> None:
        """By homeserver: when the participant left whose event has waited the longest to be ended. Who is not in it waits for nothing."""
        first: dict[str, float] = {}
        for homeserver, at in departures.items():
            label = self.label(homeserver)
            first[label] = min(at, first.get(label, inf))
        for label in self._unsent - set(first):
            self.unsent.labels(label).set(0.0)
        for label, at in first.items():
            self.unsent.labels(label).set(max(0.0, now - at))
        self._unsent = set(first)

    def disk(self, disk: Disk | None) -> None:
        """How much room the database takes, and has."""
        if disk is None:
            return
        if self._disk is None:  # not before: without a value they would be 0, and a full disk is something else
            used = Gauge("sfu_delegate_database_bytes", "The size of the database's files. Not with PostgreSQL.", registry=self.registry)
            free = Gauge("sfu_delegate_database_free_bytes", "What is free where the database is. Not with PostgreSQL.", registry=self.registry)
            self._disk = (used, free)
        for gauge, value in zip(self._disk, disk, strict=True):
            gauge.set(value)

    def backlog(self, counted: Mapping[tuple[str, Lane], tuple[int, float]], now: float) -> None:
        """The backlog was counted."""
        tally: dict[tuple[str, str], tuple[int, float]] = {}
        for (homeserver, lane), (count, oldest) in counted.items():
            if lane is not Lane.TIMER:
                key = (self.label(homeserver), lane.name.lower())
                before = tally.get(key, (0, oldest))
                tally[key] = (before[0] + count, min(before[1], oldest))
        for key in self._backlogs - set(tally):
            self.waiting.labels(*key).set(0)
            self.lateness.labels(*key).set(0)
        for key, (count, oldest) in tally.items():
            self.waiting.labels(*key).set(count)
            self.lateness.labels(*key).set(max(0.0, now - oldest))
        self._backlogs |= set(tally)
