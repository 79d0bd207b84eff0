"""What is true: who is in a call, what became of their delayed events at the homeserver, and whether that was harm.

The models know each event's end to the instant; people tell when they come and go. Nothing here asks the daemon what it believes.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sfu_delegate.sandbox.homeserver import DelayedEvent, End

from tests.soak.disturbances import DAEMON, DATABASE, HARNESS, INSTANCE, SFU, SLOW_SFU, WEBHOOKS, Disturbances
from tests.soak.settings import FAIR_CHANCE, GAP, GHOST_AFTER, HASTY, MISSING_LOOKS, STALE_AFTER

CLIENT = "client"  # who ended an event, in the model's log
RESTART_AT = 0.75  # of the delay: the latest normal time of a restart
OURS = (DAEMON, INSTANCE, DATABASE)  # what may have kept the daemon, or a part of it, from its work
UNHEARD = (WEBHOOKS, INSTANCE, DATABASE)  # … webhooks from being heard in time: one that an instance has got which stands still holds up its room's


@dataclass(slots=True, eq=False)
class Membership:
    """One delayed event of one person in one call, from its scheduling to its end. Times are Unix seconds."""

    homeserver: str
    room: str
    identity: str
    event: DelayedEvent
    comes: bool = True  # False for somebody who delegates and never joins
    delegation: str = ""  # its id; "" as long as the daemon has not acknowledged it
    management_token: str = field(default="", repr=False)
    accepted_at: float | None = None
    confirmed_at: float | None = None  # acknowledged as verified: from here on the client leaves it to the daemon
    withdrawn_at: float | None = None
    goodbyes: list[float] = field(default_factory=list)  # to the SFU, each at the begin of a full reconnect, or of the reload that it came from
    gaps: list[float] = field(default_factory=list)  # when its network was away for some seconds, which the SFU does not notice if it goes on
    left_at: float | None = None  # the person is not in the call any more
    departed_at: float | None = None  # … and the SFU has noticed
    replaced_at: float | None = None  # a newer delegation of the same participant was confirmed
    called_ghost: bool = False

    def there_at(self, at: float) -> bool:
        """Whether the person was in the call then, or on the way into it."""
        return self.comes and (self.left_at is None or at < self.left_at)

    def described(self) -> dict[str, Any]:
        """For the report, without what is secret."""
        event = self.event
        return {
            "homeserver": self.homeserver,
            "room": self.room,
            "identity": self.identity,
            "delegation": self.delegation,
            "delay": event.delay,
            "scheduled_at": event.scheduled_at,
            "accepted_at": self.accepted_at,
            "confirmed_at": self.confirmed_at,
            "last_restart_at": event.since,
            "restarts": len(event.restarted_at),
            "goodbyes": self.goodbyes[-3:],
            "gaps": self.gaps[-3:],
            "left_at": self.left_at,
            "departed_at": self.departed_at,
            "replaced_at": self.replaced_at,
            "end": event.end.value,
            "ended_at": event.ended_at,
            "ended_by": event.ended_by,
        }


@dataclass(slots=True)
class Harm:
    """Something that must not happen, or may happen only for the reason that is named."""

    membership: Membership
    why: str
    story: dict[str, Any] = field(default_factory=dict)  # what the daemon said of the delegation, and what was disturbed


class Truth:
    """Watches all memberships. `on_harm` is told of each lost one and each ghost as it is found."""

    def __init__(self, clock: Callable[[], float], disturbances: Disturbances, on_harm: Callable[[Harm], None]) -> None:
        self._clock = clock
        self._disturbances = disturbances
        self._on_harm = on_harm
        self.open: set[Membership] = set()
        self.memberships = 0
        self.endings: Counter[str] = Counter()
        self.lateness: list[tuple[str, bool, float]] = []  # homeserver, whether all was calm, seconds from the departure to the end
        self.lost: list[Harm] = []
        self.excused: list[Harm] = []  # lost, but nobody could have helped it
        self.ghosts: list[Harm] = []
        self.stale: list[Harm] = []  # an old event was sent long after a newer delegation had replaced it

    def add(self, membership: Membership) -> None:
        """A delayed event was scheduled."""
        self.memberships += 1
        self.open.add(membership)

    def look(self) -> None:
        """Judge what has ended since the last look, and who should have been by now."""
        now = self._clock()
        for membership in list(self.open):
            if membership.event.end is not End.PENDING:
                self.open.discard(membership)
                self._judge(membership)
            elif membership.departed_at is not None and now - membership.departed_at > GHOST_AFTER:
                self._late(membership, membership.departed_at, now)

    def _judge(self, membership: Membership) -> None:
        event, at = membership.event, membership.event.ended_at
        assert at is not None
        if event.ended_by == CLIENT:
            self.endings["by_client"] += 1
        elif membership.accepted_at is None:
            self.endings["never_delegated"] += 1
        elif membership.withdrawn_at is not None and at > membership.withdrawn_at and event.end is End.RAN_OUT:
            self.endings["after_withdrawal"] += 1
        elif membership.there_at(at):
            self._harmed(membership, at)
        else:
            self._ended(membership, at)

    def _harmed(self, membership: Membership, at: float) -> None:
        event = membership.event
        if event.end is End.RAN_OUT and membership.confirmed_at is None:
            self.endings["before_confirmation"] += 1  # until then the client's own restarts keep it
            return
        if event.end is End.RAN_OUT:
            # The true condition of the promise: from the latest normal time of a restart to the deadline, was there a chance?
            targets: tuple[str, ...] = (DAEMON, DATABASE, HARNESS, membership.homeserver)
            begin = event.since + RESTART_AT * event.delay
            excuse = "" if max(self._disturbances.calm(targets, begin, at), default=0.0) >= FAIR_CHANCE else "nobody could restart it in time"
        else:
            targets = (SFU, HARNESS)
            goodbyes = [said for said in membership.goodbyes if said < at][-2:]
            begin = goodbyes[0] if goodbyes else at - 60.0
            excuse = self._too_hasty(goodbyes, at)
        harm = Harm(membership, excuse or f"{event.end.value} while connected")
        harm.story["disturbances"] = self._told((*targets, *OURS, WEBHOOKS, SFU, SLOW_SFU), begin - 30.0, at)
        (self.excused if excuse else self.lost).append(harm)
        self.endings["excused" if excuse else "lost"] += 1
        self._on_harm(harm)

    def _too_hasty(self, goodbyes: list[float], at: float) -> str:
        """The exceptions that follow from the design; "" where none holds. `goodbyes` are the last two."""
        if goodbyes and self._disturbances.during((SFU, HARNESS), goodbyes[-1], at):
            # A definite departure is believed when nobody can be asked whether the participant is back.
            return "it had said goodbye to reconnect, and the SFU could not be asked, or let nobody in"
        if len(goodbyes) == 2 and goodbyes[1] - goodbyes[0] < HASTY and self._disturbances.during(UNHEARD, *goodbyes):
            # Nothing was heard between the first goodbye and the look, which came when the participant was away once more.
            return "it had said goodbye twice within the time of a look, and the webhooks in between went astray"
        since = at - MISSING_LOOKS
        if goodbyes and at - goodbyes[-1] < GAP and all(self._disturbances.during(what, since, at) for what in ((SFU,), UNHEARD)):
            # It had not yet come back to a restarted SFU at the first look, the webhooks of its return went astray, and then it said goodbye.
            return "the SFU had thrown it out, its return was not heard of, and the second look came just when it reconnected"
        return ""

    def _ended(self, membership: Membership, at: float) -> None:
        event = membership.event
        self.endings[event.end.value] += 1
        replaced = membership.replaced_at
        if replaced is not None and event.end in (End.SENT, End.RAN_OUT) and at > replaced + STALE_AFTER:
            harm = Harm(membership, f"{event.end.value} {at - replaced:.1f} s after a newer delegation had replaced it")
            harm.story["disturbances"] = self._told((*OURS, HARNESS, SFU, WEBHOOKS, membership.homeserver), replaced, at)
            self.stale.append(harm)
            self._on_harm(harm)
        departed = membership.departed_at if membership.departed_at is not None else membership.left_at
        if departed is None or event.end is End.CANCELLED:
            return
        calm = not self._disturbances.during((*OURS, SFU, SLOW_SFU, WEBHOOKS, HARNESS, membership.homeserver), departed - 1.0, at)
        self.lateness.append((membership.homeserver, calm, max(0.0, at - departed)))

    def _late(self, membership: Membership, departed: float, now: float) -> None:
        if membership.called_ghost or membership.accepted_at is None:
            return
        targets = (DAEMON, DATABASE, SFU, HARNESS, membership.homeserver)
        calm = sum(self._disturbances.calm(targets, departed, now))
        if calm < GHOST_AFTER:
            return
        membership.called_ghost = True
        harm = Harm(membership, f"still pending {now - departed:.0f} s after the departure, {calm:.0f} s of them without any disturbance")
        harm.story["disturbances"] = self._told((*targets, INSTANCE, WEBHOOKS), departed - 30.0, now)
        self.ghosts.append(harm)
        self._on_harm(harm)

    def _told(self, targets: tuple[str, ...], begin: float, end: float) -> list[str]:
        found = self._disturbances.during(set(targets), begin, end)
        return [f"{d.target}: {d.what} from {d.begin:.1f} to {'now' if d.end is None else f'{d.end:.1f}'}" for d in found]
