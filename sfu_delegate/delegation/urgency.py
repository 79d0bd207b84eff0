"""What to do next at one homeserver, when, and how many at a time: the only place that knows about rates. No I/O, no clock.

Synapse allows a delegate without an application service 1 action a second, with a burst of 5 (`rc_delayed_event_mgmt`: a leaky bucket; a refusal
costs nothing, and is held back for half a second). Departures cannot be planned, restarts can:

- No restart may miss its deadline that could still make it; a person dropped is worse than a ghost that stays a moment longer. When the next
  action would make a restart late, restarts go first, the one with the earliest deadline first. Those whose deadline has passed drag nobody down.
- Else departures go first, the oldest first, and with them events whose countdown nobody knows.
- All other restarts take only what a full bucket would lose, so that the burst is there for departures. Where many deadlines come together, some
  are restarted before they are due, so that the others can be in time.
"""

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from math import inf
from typing import NamedTuple

from sfu_delegate.delegation.model import DelayedEvent, Lane

ASSUMED_RATE = 1.0
"""Actions a second of a homeserver whose limit is not known: Synapse's default."""

ASSUMED_BURST = 5.0
"""Actions that it allows at once: Synapse's default."""

UNKNOWN_COUNTDOWN = 0.75
"""The part of its delay that is assumed to be left when an event is handed over. It is restarted at once, and then the countdown is known; but where
not everything can be done at once, that is how long it may have to wait. Clients delegate right after they have scheduled the event."""

ENDANGERED = 10.0
"""Seconds before its deadline from which a restart goes before departures, at a homeserver that does not limit us."""

MARGIN = 3.0
"""Seconds by which a planned restart is early, so that one that fails can be made again; a twentieth of the delay where that is less."""

HEADROOM = 0.8
"""The part of the rate that restarts are planned to fit into. The rest is for departures, and for what goes wrong."""

FEASIBLE = 0.97
"""The part of the rate that is counted on where it matters whether a restart can still make it."""

EARLIEST = 0.3
"""The part of its delay that must have passed before an event is restarted, however crowded the time of its deadline is."""

JITTER = 0.05
"""Seconds after which the bucket must have held an action: requests do not travel equally fast."""

LONGEST_BLOCK = 15.0
"""Seconds to leave a homeserver alone at the most, whatever it asks for: one request in that time harms nobody, and limits are lifted."""

LONGEST_DOUBT = 4.0
"""The same for one that says nothing useful, or that refuses again after the time that it had named."""

LAST_TRY_AFTER = 1.0
"""Seconds between tries of a restart that cannot wait until the homeserver may be asked again."""

ROUNDING = 1e-6
"""Actions. Unix times have no room for more."""

FIRST_WIDTH = 4  # requests at a time until a homeserver has shown what it takes
UNKNOWN_WIDTH = 6  # … and at the most, as long as it might refuse them: so many refusals may come at once
FREE_WIDTH = 12  # … where there has been no limit so far, which may change, and so many more than its burst may be refused at once
FREE_PROVED = 200  # so many actions granted since the last refusal, and as many may be under way as the operator allows
LIMITED_WIDTH = 4  # a refusal is held back for half a second
FREE_BEYOND = 32.0  # so many actions more than the assumed limit allows, and none refused: there is no such limit
PROBE_AFTER = 8  # successes without a refusal, with work waiting, until it is tried whether more is allowed
PROBED_FOR = 5.0  # seconds for which one whose answer has not come keeps other instances from making another one
PROBE_WITHIN = 10.0  # … or more than half of them in so many seconds, where they come slowly
FREE_SURPRISES = 24  # so many actions in a row that the estimate would not have allowed, and none refused: the limit is gone
TRUSTED_REFUSALS = 2  # in a row, until what the homeserver says of the time to wait is not believed any more
MEASURED_OVER = 30.0  # seconds, at the most, over which the rate is measured
MEASURED_LEAST = 3.0
DOWN_AFTER = 4  # failures in a row until only one request at a time tries whether it works again
DOWN_FIRST = 0.5  # seconds until then, at the least
DOWN_PART = 8  # … and a part of the time that it has been failing: that it is back is noticed when it was away for an eighth more
DOWN_MOST = 10.0  # … and at the most
FAILS_AFTER = 2  # failures in a row, those on their way together counted as one, until a homeserver counts as out of reach …
SLOW_FAILURE = 2.0  # … or one that took so many seconds


class Limit(StrEnum):
    """What is known about a homeserver's rate limit."""

    UNKNOWN = "unknown"
    NONE = "none"
    SOME = "some"


@dataclass(slots=True)
class _Down:
    """Failures of one kind of action. Synapse's workers serve restarts while its main process, which alone sends, is down."""

    failures: int = 0  # in a row; those that were on their way together count as one
    since: float = -inf  # when the first of them was sent
    failed_at: float = -inf
    until: float = 0.0  # nothing is tried before; 0 unless it keeps failing

    @property
    def keeps_failing(self) -> bool:
        return self.failures >= DOWN_AFTER


@dataclass(slots=True)
class Pace:
    """How fast one homeserver takes requests, as far as it has shown.

    `rate` (a second) and `burst` describe its bucket as a token bucket; `tokens` is the estimate of what is in there, brought into line with each
    refusal, which says when the next action is allowed.
    """

    most: int
    limit: Limit = Limit.UNKNOWN
    exempt: bool = False  # the operator says that there is no limit
    rate: float = ASSUMED_RATE
    burst: float = ASSUMED_BURST
    width: int = FIRST_WIDTH
    in_flight: int = 0
    blocked_until: float = 0.0
    _tokens: float = ASSUMED_BURST
    _tokens_at: float = 0.0
    _widening: int = 0  # successes since the width changed
    _successes: int = 0  # since the last refusal
    _streak: int = 0  # refusals in a row, of requests that were sent after the answer to the one before
    _refused_at: float = 0.0
    _total: int = 0  # successes
    # Since the bucket was full: when it held one action, and `_total` then.
    _marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=8))
    _begun: deque[float] = field(default_factory=lambda: deque(maxlen=8))  # when the last requests were sent that the estimate allowed
    _probing: bool = False  # a request is on its way that the estimate would not have allowed
    _probed_at: float = 0.0  # when the last of those was sent by any instance of the daemon, if nothing came back
    _surprises: int = 0  # of those, in a row, how many were granted
    _last_try_at: float = 0.0
    _early: bool = False  # the next request goes before the time that the homeserver named, which was too far away to be waited for
    _down: dict[bool, _Down] = field(default_factory=lambda: {True: _Down(), False: _Down()})  # by: is it an ending?
    failing_since: float | None = None  # when the first of the failures in a row was sent, of whatever kind
    fails: bool = False  # it seems to be out of reach
    answered_at: float = -inf  # when the latest of the requests was sent that were answered, be it with a refusal
    _failures: int = 0
    _failed_at: float = -inf

    # ── how much, and when ──

    @property
    def _slack(self) -> float:
        return min(JITTER * self.rate, 0.25)

    def tokens(self, now: float) -> float:
        """Actions that the bucket should hold now."""
        return min(self.burst + self._slack, self._tokens + max(0.0, now - self._tokens_at) * self.rate)

    def places(self, now: float) -> int:
        """How many requests may be on their way in addition, whatever the rate."""
        return 0 if now < self.blocked_until else max(0, min(self.width, self.most) - self.in_flight)

    def half(self) -> int:
        """Half of the requests that may be on their way together, and at least one."""
        return max(1, min(self.width, self.most) // 2)

    def last_try(self, now: float) -> bool:
        """May a restart be tried that will have missed its deadline when the homeserver may be asked again? Limits are lifted, too."""
        return self._last_try_at <= now < self.closed_until and self.in_flight == 0

    @property
    def closed_until(self) -> float:
        """Until when restarts have to wait, because the homeserver asked for it or because they fail."""
        return max(self.blocked_until, self._down[False].until)

    def places_for(self, now: float, *, ending: bool) -> int:
        """The same for one kind of action: where this kind has been failing, one at a time, with pauses."""
        down = self._down[ending]
        if not down.keeps_failing:
            return self.places(now)
        return min(1, self.places(now)) if now >= down.until else 0

    def urgent(self, now: float) -> int:
        """How many actions that cannot wait may be begun now."""
        places = self.places(now)
        if self.limit is not Limit.SOME or not places:
            return places
        allowed = int(self.tokens(now) - self._slack + ROUNDING)
        if allowed < 1 and self._may_probe(now) and now >= self._probe_at(now):
            return 1
        return min(places, max(0, allowed))

    def planned(self, now: float) -> int:
        """How many actions that can wait may be begun now: only what would run over, where the rate is limited."""
        places = self.places(now)
        if self.limit is not Limit.SOME or not places:
            return places
        return 1 if self.tokens(now) >= self.burst - ROUNDING else 0

    def next_urgent(self, now: float) -> float:
        """When `urgent` allows something, if no answer comes before; infinite while all places are taken."""
        if self.in_flight >= min(self.width, self.most):
            return inf
        at = max(now, self.blocked_until)
        if self.limit is Limit.SOME:
            regular = self._holds(1.0 + self._slack, now)
            at = max(at, min(regular, self._probe_at(now)) if self._may_probe(now) else regular)
        return at

    def next_planned(self, now: float) -> float:
        """When `planned` allows something."""
        if self.in_flight >= min(self.width, self.most):
            return inf
        at = max(now, self.blocked_until)
        if self.limit is Limit.SOME:
            at = max(at, self._holds(self.burst, now))
        return at

    def next_restart(self, now: float) -> float:
        """When a restart could be begun, apart from requests that are on their way."""
        at = max(now, self.closed_until)
        return max(at, self._holds(1.0 + self._slack, now)) if self.limit is Limit.SOME else at

    def next_for(self, wait: "Wait", now: float) -> float:
        """When something that waits may be begun, if no answer comes before."""
        if wait.endangered and now < self.closed_until:
            return max(now, self._last_try_at) if self.in_flight == 0 else inf
        return max(self.next_urgent(now) if wait.urgent else self.next_planned(now), self._down[wait.ending].until)

    def _holds(self, actions: float, now: float) -> float:
        """When the bucket should hold so many actions; in the past if it does."""
        return now + (actions - self.tokens(now)) / self.rate

    def _may_probe(self, now: float) -> bool:
        if self._probing or self.in_flight or now < self._probed_at + PROBED_FOR:
            return False
        slow = self._successes > PROBE_AFTER / 2 and now >= self._refused_at + PROBE_WITHIN
        return self._surprises > 0 or self._successes >= PROBE_AFTER or slow

    def _probe_at(self, now: float) -> float:
        """When a probe tells most: with half an action in the bucket, and at once where the last probe was granted."""
        return now if self._surprises else self._holds(0.5, now)

    # ── what happens ──

    def began(self, now: float, *, alone: bool = False) -> None:
        """A request is on its way. `alone`: with a client's token, which has a limit of its own."""
        self.in_flight += 1
        if not alone:
            self.take(now)

    def take(self, now: float) -> None:
        """An action is taken from the bucket."""
        tokens = self.tokens(now)
        if tokens >= self.burst:
            self._marks.clear()
        if self.limit is Limit.SOME and (tokens < 1.0 or self._early):
            self._probing, self._probed_at = True, now
            self._early = False
        else:
            self._tokens, self._tokens_at = tokens - 1.0, now
            self._begun.append(now)

    def ended(self, sent_at: float, now: float, *, ending: bool, answered: bool, alone: bool = False) -> None:
        """A request came back; `answered`: with a definite answer, and not with a refusal because of the rate. All times in seconds."""
        self.in_flight = max(0, self.in_flight - 1)
        if sent_at > now:  # noqa: PLR1730 — this is called for each action
            sent_at = now  # the clock was set back since
        down = self._down[ending]
        if not answered:
            if self._probing:
                self._probing, self._probed_at = False, 0.0
            self._failed(sent_at, now)
            if not down.failures:
                down.since = sent_at
            if sent_at >= down.failed_at:
                down.failures, down.failed_at = down.failures + 1, now
            if down.keeps_failing:
                self._last_try_at = now + LAST_TRY_AFTER
                down.until = now + min(DOWN_MOST, max(DOWN_FIRST, (now - down.since) / DOWN_PART))
            return
        if down.keeps_failing:
            self.width, self._widening = 1, 0  # what has gathered meanwhile must not come at once
        down.failures, down.until = 0, 0.0
        if self.failing_since is not None:
            self._reached()
        if sent_at > self.answered_at:  # noqa: PLR1730 — as above
            self.answered_at = sent_at
        if not alone:
            self._granted(sent_at, now)
        self._widen()

    def _failed(self, sent_at: float, now: float) -> None:
        if self.failing_since is None:
            self.failing_since = sent_at
        if sent_at >= self._failed_at:
            self._failures, self._failed_at = self._failures + 1, now
        self.fails = self.fails or self._failures >= FAILS_AFTER or now - sent_at >= SLOW_FAILURE

    def _reached(self) -> None:
        self.failing_since, self.fails, self._failures = None, False, 0

    def _granted(self, sent_at: float, now: float) -> None:
        self._successes += 1
        self._total += 1
        if sent_at >= self._refused_at:
            if self._streak > TRUSTED_REFUSALS:
                self._surprises += 1  # it did not keep to its word, but something has changed now
            self._streak = 0
        if self._probing:
            self._probing, self._probed_at = False, 0.0
            self._surprises += 1
            self._tokens, self._tokens_at = max(0.0, self.tokens(now) - 1.0), now
            self.burst = max(self.burst, min(self.burst + 1.0, ASSUMED_BURST))
        if self._surprises >= FREE_SURPRISES or (self.limit is Limit.UNKNOWN and self._tokens < -FREE_BEYOND):
            self.limit, self._surprises = Limit.NONE, 0
            self._marks.clear()

    def _widen(self) -> None:
        free = self.most if self.exempt or self._successes >= FREE_PROVED else FREE_WIDTH
        most = min(self.most, {Limit.NONE: free, Limit.UNKNOWN: UNKNOWN_WIDTH, Limit.SOME: LIMITED_WIDTH}[self.limit])
        self._widening += 1
        if self.width < most and self._widening >= self.width:
            self._widening, self.width = 0, min(most, self.width * 2)

    def refused(self, sent_at: float, retry_after: float | None, now: float) -> None:
        """The homeserver refused a request that was sent at `sent_at`, because there were too many; `retry_after` in seconds, from then on."""
        self.in_flight = max(0, self.in_flight - 1)
        sent_at = min(sent_at, now)
        self._reached()
        self.answered_at = max(self.answered_at, sent_at)
        wait = retry_after if retry_after is not None and retry_after > 0 else None
        news = sent_at >= self._refused_at  # not one of several that were on their way together
        if news:
            self._streak = 1 if self._probing else self._streak + 1
        first = self.limit is not Limit.SOME
        if first:
            self._learn(wait, now)
        allowed_at = sent_at + wait if wait is not None else now + 1 / self.rate
        if news and not first and wait is not None and wait <= LONGEST_BLOCK:
            self._measure(allowed_at)
        if self._streak > TRUSTED_REFUSALS:
            self.rate = max(self.rate / 2, min(self.rate, 1 / LONGEST_DOUBT))  # waited as long as it said, and refused again and again
        self._early = allowed_at > now + LONGEST_BLOCK
        allowed_at = min(allowed_at, now + LONGEST_BLOCK)
        later = sum(begun > sent_at for begun in self._begun)  # what was sent after this one has taken its part, if it was not refused as well
        self._tokens, self._tokens_at = min(self.burst, 1.0 - self.rate * (allowed_at - now)) - (0 if first else later), now
        if self._streak > 1 or wait is None:
            allowed_at = max(allowed_at, now + min(DOWN_FIRST * 2.0 ** min(self._streak - 1, 10), LONGEST_DOUBT))
        self.blocked_until = max(self.blocked_until, allowed_at)
        self._last_try_at = now + LAST_TRY_AFTER
        if news:
            self._successes = 0
        if self._probing:
            self._probing, self._probed_at = False, 0.0
        self._refused_at, self._surprises = now, 0

    def _learn(self, wait: float | None, now: float) -> None:
        """A first refusal: a limit there is, and Synapse's default is assumed until more is known."""
        spent = ASSUMED_BURST - self.tokens(now) if self.limit is Limit.UNKNOWN else ASSUMED_BURST
        self.limit = Limit.SOME
        self.rate = ASSUMED_RATE if wait is None else 1 / min(max(wait, 1 / ASSUMED_RATE), LONGEST_BLOCK)
        self.burst = min(ASSUMED_BURST, max(1.0, round(spent)))
        self.width, self._widening = min(self.width, LIMITED_WIDTH), 0
        self._marks.clear()

    def _measure(self, allowed_at: float) -> None:
        """Between two refusals, with the bucket never full, exactly as many actions were granted as tokens came: each refusal tells when the
        bucket holds one. The longer the time between them, the less it matters how long requests travel."""
        # After surprises what was long ago is of another limit.
        over = MEASURED_LEAST if self._surprises > 1 else MEASURED_OVER
        while len(self._marks) > 1 and self._marks[1][0] <= allowed_at - over:
            self._marks.popleft()
        if self._marks:
            since, total = self._marks[0]
            granted, seconds = self._total - total, allowed_at - since
            if granted and seconds >= MEASURED_LEAST:
                measured = min(max(granted / seconds, self.rate / 4), self.rate * 4)
                # What was not made use of makes the measured rate too low, never too high.
                upwards = self._probing or self._surprises > 0
                self.rate = max(max(measured, self.rate) if upwards else min(measured, self.rate), 1 / LONGEST_BLOCK)
        self._marks.append((allowed_at, self._total))

    def recall(self, limit: Limit, rate: float, burst: float, now: float) -> None:
        """What was known before the daemon was started anew. How full the bucket is, is not."""
        self.limit, self.rate, self.burst = limit, max(rate, 1 / LONGEST_BLOCK), max(1.0, burst)
        self._tokens, self._tokens_at = min(self.burst, 1.0 + self._slack), now

    def shared(self) -> str:
        """What all who ask the homeserver from one address have in common, as text: the bucket, and what is known of it. How many requests are under
        way, and whether they fail, is everybody's own."""
        return json.dumps(
            {
                **{"limit": self.limit.value, "rate": self.rate, "burst": self.burst, "tokens": self._tokens, "tokens_at": self._tokens_at},
                **{"blocked_until": self.blocked_until, "refused_at": self._refused_at, "streak": self._streak, "surprises": self._surprises},
                **{"successes": self._successes, "total": self._total, "marks": list(self._marks), "begun": list(self._begun)},
                "probed_at": self._probed_at,
            }
        )

    def adopt(self, text: str, now: float) -> None:
        """Take over what `shared` gave, perhaps from another process; nothing, where the operator says that there is no limit, or where it cannot be
        read: another version may say it in another way."""
        if self.exempt:
            return
        was = self.limit
        try:
            known = json.loads(text)
            limit, rate, burst = Limit(known["limit"]), float(known["rate"]), float(known["burst"])
            bucket = float(known["tokens"]), float(known["tokens_at"]), float(known["blocked_until"])
            refusals = float(known["refused_at"]), int(known["streak"]), int(known["surprises"])
            counts = int(known["successes"]), int(known["total"])
            marks = [(float(at), int(total)) for at, total in known["marks"]]
            begun = [float(at) for at in known["begun"]]
            probed_at = float(known["probed_at"])
        except (ValueError, TypeError, KeyError):
            return
        self.limit, self.rate, self.burst = limit, max(rate, 1 / LONGEST_BLOCK), max(1.0, burst)
        self._tokens, self._tokens_at, self.blocked_until = bucket
        self._refused_at, self._streak, self._surprises = refusals
        self._successes, self._total = counts
        self._probed_at = probed_at
        self._marks, self._begun = deque(marks, maxlen=self._marks.maxlen), deque(begun, maxlen=self._begun.maxlen)
        self._not_later_than(now)
        if self.limit is Limit.SOME and was is not Limit.SOME:
            self.width, self._widening = min(self.width, LIMITED_WIDTH), 0

    def _not_later_than(self, now: float) -> None:
        """Times of a clock that was set back since are of no use: a bucket would not fill until it is as late again."""
        if self._tokens_at > now or self._refused_at > now or self.blocked_until > now + LONGEST_BLOCK:
            self._tokens_at, self._refused_at = min(self._tokens_at, now), min(self._refused_at, now)
            self.blocked_until = min(self.blocked_until, now + LONGEST_BLOCK)
            self._probed_at = 0.0
            self._marks.clear()
            self._begun.clear()

    def clock_moved(self, now: float) -> None:
        """The clock was set, and `now` is what it says: whatever waited for a time is tried."""
        self._not_later_than(now)
        self.blocked_until = min(self.blocked_until, now)
        self._last_try_at = min(self._last_try_at, now)
        self._down = {True: _Down(), False: _Down()}
        self._reached()
        self.answered_at = self._failed_at = -inf

    def reset(self, limit: Limit) -> None:
        """The configuration says something else now: what was learned is of the past."""
        self.limit, self.rate, self.burst, self.blocked_until = limit, ASSUMED_RATE, ASSUMED_BURST, 0.0
        self.exempt = limit is Limit.NONE
        if not self.exempt:
            self.width, self._widening = min(self.width, FIRST_WIDTH), 0
        self._tokens, self._streak, self._successes, self._surprises = ASSUMED_BURST, 0, 0, 0
        self._marks.clear()


# ── planning ──


def latest(assumed: float, delay: float) -> float:
    """The latest possible deadline of an event whose countdown is not known, by the one that was assumed when it was delegated."""
    return assumed + (1 - UNKNOWN_COUNTDOWN) * delay


class Countdown(NamedTuple):
    """A restart that is to come, for planning."""

    harm: float  # its deadline
    delay: float  # seconds
    event: int
    known: bool  # False: the countdown is only assumed

    @property
    def latest(self) -> float:
        """The latest possible deadline of one that is only assumed."""
        return latest(self.harm, self.delay)


@dataclass(frozen=True, slots=True)
class Plan:
    """When restarts have to begin so that all of them make it, planned backwards from their deadlines."""

    must: float  # from then on restarts go first, or one will be late
    early: float  # from then on restarts that are not due yet take what nobody else needs
    lateness: float  # seconds by which the most endangered one will miss its deadline at this rate; 0: all is well
    soonest: tuple[int, ...]  # the events with the earliest deadlines, that may be restarted already
    made_at: float
    size: int

    def holds_until(self) -> float:
        """When it is time to plan anew: what is made once in a while must not cost more than it is worth."""
        return self.made_at + 1.0 + self.size / 2000


NOTHING_PLANNED = Plan(inf, inf, 0.0, (), -inf, 0)

SOONEST = 64


def plan(countdowns: Iterable[Countdown], rate: float, begin: float, now: float) -> Plan:
    """Plan restarts at `rate` a second; `begin` is the earliest time for the first of them.

    Those whose deadline has passed are not planned for: nothing can be done for them in time.
    """
    must = early = inf
    lateness = 0.0
    soonest: list[int] = []
    waiting = 0
    planned = sorted((c.harm if c.known or c.harm > now else c.latest, c) for c in countdowns)
    for deadline, c in planned:
        if deadline <= now:
            if c.known:
                lateness = max(lateness, now - deadline)
            continue
        start = deadline - min(MARGIN, c.delay / 20)
        must = min(must, start - waiting / (rate * FEASIBLE))
        early = min(early, start - waiting / (rate * HEADROOM))
        lateness = max(lateness, begin + waiting / rate - (c.harm if c.known else c.latest))
        waiting += 1
        if len(soonest) < SOONEST and may_be_restarted(deadline, c.delay, now):
            soonest.append(c.event)
    return Plan(must, early, lateness, tuple(soonest), now, len(planned))


def may_be_restarted(deadline: float, delay: float, now: float) -> bool:
    """Has enough of its delay passed for an event to be restarted before it is due?"""
    return deadline - (1 - EARLIEST) * delay <= now


# ── choosing ──


class Wait(NamedTuple):
    """What kind of action has to wait."""

    urgent: bool
    ending: bool
    endangered: bool = False  # a restart that will be too late when the homeserver may be asked again


class Choice(NamedTuple):
    """What is to be done, most urgent first, and what kinds of actions have to wait for a place or for the rate."""

    rows: list[DelayedEvent]
    waiting: frozenset[Wait]


class _Rank(IntEnum):
    """What comes before what; within a rank, what comes to harm first."""

    NOW = 0  # restarts, where the next one must not wait or one of them will be late
    NOT_YET_TOO_LATE = 1  # an unknown countdown, whose first restart should have been made by now
    SOON = 2  # departures, and unknown countdowns
    LATER = 3  # all other restarts
    TOO_LATE = 4  # those whose deadline has passed, if nobody else has restarted them


def choose(candidates: Sequence[DelayedEvent], pace: Pace, plan: Plan, now: float) -> Choice:
    """The most urgent of the candidates, as many as the homeserver takes now."""
    limited = pace.limit is Limit.SOME
    must = limited and now >= plan.must - 1 / pace.rate

    def rank(row: DelayedEvent) -> tuple[_Rank, float]:
        harm = row.harm if row.harm is not None else now
        if row.lane is Lane.END:
            return (_Rank.SOON, harm)
        if harm > now and (must if limited else harm <= now + ENDANGERED):
            return (_Rank.NOW, harm)
        if row.verified_at is None:
            over = latest(harm, row.delay)
            if must and harm <= now < over:
                return (_Rank.NOW, over)
            return (_Rank.SOON, harm) if harm > now else (_Rank.NOT_YET_TOO_LATE, harm)
        return (_Rank.LATER, harm) if harm > now else (_Rank.TOO_LATE, harm)

    ranked = sorted(((rank(row), row) for row in candidates), key=lambda pair: pair[0])
    places = {ending: pace.places_for(now, ending=ending) for ending in (True, False)}
    urgent = pace.urgent(now)
    planned = pace.planned(now)
    left = pace.places(now)
    if pace.last_try(now):
        urgent = left = places[False] = 1
    blocked = now < pace.blocked_until
    chosen: list[DelayedEvent] = []
    waiting: set[Wait] = set()
    for (order, _), row in ranked:
        ending = row.lane is Lane.END
        alone = row.token is not None
        endangered = row.lane is Lane.RESTART and row.harm is not None and now < row.harm <= pace.closed_until + MARGIN
        pressing = alone or endangered or order <= _Rank.SOON
        allowed = left if alone else urgent if pressing else planned
        if min(allowed, left, places[ending]) < 1 or (blocked and not endangered):
            waiting.add(Wait(pressing, ending, endangered))
            continue
        chosen.append(row)
        left -= 1
        places[ending] -= 1
        if not alone:
            urgent -= 1
            planned -= 1
    return Choice(chosen, frozenset(waiting))
