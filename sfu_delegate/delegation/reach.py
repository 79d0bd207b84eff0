"""Can an SFU be asked? How many looks it gets at a time, and when it counts as lost. No I/O, no clock."""

from dataclasses import dataclass
from math import inf

from sfu_delegate.delegation.policy import Policy

NONSENSE = 86400.0
"""Seconds by which no SFU's clock is ahead of ours."""

LAG_OVER = 300.0
"""Seconds over which the least lag of webhooks is looked for, and as long again in which it is remembered."""

GIVEN_BACK_FOR = 30.0
"""Seconds in which another instance shows that it can ask an SFU, if there is one that can: a room that is given back is looked at at once."""

OTHERS_COUNT = 240.0
"""Seconds for which another instance's answered look shows that the SFU can be asked: longer than the pauses between two looks at a quiet room."""


@dataclass(slots=True)
class Reach:
    """One SFU.

    When `breaker_after` looks in a row have failed, the SFU is asked with one look at a time, with a pause between them. All other looks count as
    failed at once, when one that was sent after that has failed as well: departures have rules of their own for an SFU that cannot be asked, and
    nobody's waits for time-outs. Not before, since time-outs are old news: the looks that hung may be those of an outage that is over. And not when a
    webhook came after that: it may be back, and the next look tells.
    """

    most: int
    in_flight: int = 0
    failures: int = 0  # in a row
    failing_since: float | None = None  # when the first of them was sent
    heard_at: float = 0.0  # the last webhook
    probe_at: float = 0.0
    probing: bool = False  # one of the looks that are made while it is open is on its way
    shut: bool = False  # one of those has failed: all other looks count as failed at once
    failed_since: float = 0.0  # when the first look of the latest outage that is over was sent
    answered_at: float = -inf  # when the latest of the looks that were answered had been sent
    opened_at: float = -inf
    lag: float | None = None  # seconds by which webhooks arrive after they were made, as its clock and ours go: the least of the last minutes
    _lag_before: float | None = None  # … of the minutes before
    _lag_since: float = 0.0
    recovered_at: float = 0.0  # when its latest outage was over
    several_nodes_at: float | None = None  # when it last showed that it has several nodes, or a memory that outlives them

    vote_again_at: float = 0.0  # when it is tried again, though others can ask it
    others_may: bool = False  # other instances of the daemon are there for which it does not fail, as far as they say
    given_back_at: float | None = None  # since when rooms are given back to them, and none has been answered
    others_at: float = -inf  # when the latest of the looks was sent that another instance of the daemon made, and that were answered

    def dropped(self) -> None:
        """A look was not made after all."""
        self.in_flight = max(0, self.in_flight - 1)
        self.probing = False

    def clock_moved(self, by: float) -> None:
        """All times are later by so many seconds."""
        for name in ("probe_at", "heard_at", "opened_at", "answered_at", "others_at", "vote_again_at", "failed_since", "recovered_at"):
            setattr(self, name, getattr(self, name) + by)
        if self.failing_since is not None:
            self.failing_since += by
        self.given_back_at = None
        self.lag = self._lag_before = None  # of webhooks: that is learned again

    def overheard(self, heard_at: float, answered_at: float, several_nodes_at: float | None) -> None:
        """What any of the instances has heard of it."""
        self.heard_at = max(self.heard_at, heard_at)
        self.others_at = max(self.others_at, answered_at)
        if self.given_back_at is not None and answered_at > self.given_back_at:
            self.given_back_at = None
        if several_nodes_at is not None:
            self.several_nodes_at = max(several_nodes_at, self.several_nodes_at or 0.0)

    def outvoted(self, now: float) -> bool:
        """Can others ask it, or might they, though we cannot? Then they are to look at its rooms, and our failures say nothing of anybody."""
        if self.failing_since is None:
            return False
        if self.others_at > self.failing_since and now < self.others_at + OTHERS_COUNT:
            return True
        return self.others_may and (self.given_back_at is None or now < self.given_back_at + GIVEN_BACK_FOR)

    def gave_back(self, now: float) -> None:
        """A look of ours has failed, and concludes nothing: others are to make it."""
        if self.given_back_at is None:
            self.given_back_at = now

    def open(self, policy: Policy) -> bool:
        """Has it failed so often that most looks are not even tried?"""
        return self.failures >= policy.breaker_after

    def free(self, now: float, policy: Policy) -> int:
        """How many more looks may be sent now. Where others can ask it, one now and then, to see whether we can."""
        if self.outvoted(now):
            return 1 if not self.in_flight and now >= self.vote_again_at else 0
        if self.open(policy):
            return 1 if not self.probing and now >= self.probe_at else 0
        return max(0, self.most - self.in_flight)

    def began(self, policy: Policy) -> None:
        """A look is on its way."""
        self.in_flight += 1
        self.probing = self.open(policy)

    def heard(self, now: float, policy: Policy) -> None:
        """A webhook came. The outage may be over since the last probe: what comes due waits for another one, which may be made at once."""
        self.heard_at = now
        failed_at = self.probe_at - policy.look_again
        if self.shut and now >= failed_at + policy.look_gap:
            self.shut, self.probe_at = False, now

    def outdated(self, sent_at: float) -> bool:
        """Does the failure of a look that was sent then say nothing of the SFU, since a later one was answered?"""
        return sent_at < self.answered_at

    def ended(self, sent_at: float, now: float, policy: Policy, *, answered: bool, reached: bool = False) -> bool:
        """A look came back; True when the SFU had failed and can be asked again, so that all its rooms should be looked at. That is not more than
        once in an interval, unless it had failed again and again: where only some rooms fail, it would never end. `reached`: it refused to answer.
        """
        self.in_flight = max(0, self.in_flight - 1)
        sent_at = min(sent_at, now)  # the clock may have been set back since
        was_open = self.open(policy)
        probe = was_open and sent_at >= self.opened_at
        if probe:
            self.probing = False
        if answered:
            failing_since = self.failing_since
            self.failures, self.failing_since, self.probing, self.shut, self.given_back_at = 0, None, False, False, None
            self.answered_at = max(self.answered_at, sent_at)
            if failing_since is None or not (was_open or now >= self.recovered_at + policy.interval):
                return False
            self.failed_since, self.recovered_at = failing_since, now
            return True
        if reached:
            self.heard_at = max(self.heard_at, now)  # it is there, though it does not know our key, say
        if self.outdated(sent_at):
            return False
        self.failures += 1
        self.vote_again_at = now + policy.look_again
        if self.failing_since is None:
            self.failing_since = sent_at
        if probe:
            self.shut = True
            self.probe_at = now + policy.look_again
        elif not was_open:
            self.opened_at = self.probe_at = now
        return False

    def lost(self, sfu: str, now: float, policy: Policy) -> bool:
        """Has it neither answered nor sent a webhook for so long that it counts as lost? Not before it was asked a few times, also after a start."""
        if not self.open(policy) or self.failing_since is None or self.outvoted(now):
            return False
        return now >= max(self.failing_since, self.heard_at, self.others_at) + policy.lost(sfu)

    def is_late(self, created_at: float, now: float, after: float) -> bool:
        """Did a webhook, made at `created_at` by the SFU's clock, take much longer than others? The two clocks may differ by any amount."""
        if not created_at or created_at > now + NONSENSE:
            return False
        lag = now - created_at
        if not 0 <= now - self._lag_since < LAG_OVER:  # clocks drift, and are set
            self._lag_before, self.lag, self._lag_since = self.lag, None, now
        self.lag = lag if self.lag is None else min(lag, self.lag)
        if self._lag_before is not None:
            return lag > min(self.lag, self._lag_before) + after
        return lag > self.lag + after

    def made_at(self, created_at: float, now: float) -> float:
        """When a webhook was made, by our clock: it cannot have been made later than it arrived. 0 when unknown."""
        return min(now, created_at + self.lag) if created_at and self.lag is not None else 0.0
