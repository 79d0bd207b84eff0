"""Who is in the demonstration's call, what they do when, and what must have come of it. No I/O, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

HOUR_MS = 3_600_000
SHORT_MS = 30_000
LENGTH = 50.0  # seconds from the first join to the end
JOIN_EVERY = 0.7  # seconds; Synapse's default rate limit lets a delegate do one thing a second, after a burst of five
GRACE = 20.0  # seconds after the end in which departures may still be settled
LATEST = 15.0  # seconds from the SFU's word to the leave event, beyond which something is wrong
CLOCKS = 0.1  # seconds by which two observers of one moment may differ
RESTART_AT = 0.75  # of the delay: the daemon's default
RESTART_SLACK = 4.0  # seconds from joining to the first restart, and what a busy machine may take


class Act(StrEnum):
    """What somebody does, besides joining."""

    LEAVE = "leave"
    RECONNECT = "reconnect"
    CRASH = "crash"
    REMOVED = "removed"
    CLOSE_TAB = "close_tab"


IN_WORDS = {
    Act.LEAVE: "hangs up by the button",
    Act.RECONNECT: "reconnects in full: a new session takes the old one's place",
    Act.CRASH: "crashes: no goodbye to anybody",
    Act.REMOVED: "is removed by a moderator",
    Act.CLOSE_TAB: "closes the tab while the network is away",
}


class Person(NamedTuple):
    """One participant. `at` in seconds after the first join."""

    name: str
    how: str  # how it ends for this one, for the summary
    act: Act | None = None
    at: float = 0.0
    delay_ms: int = HOUR_MS

    @property
    def leaves(self) -> bool:
        """Is it gone in the end?"""
        return self.act not in (None, Act.RECONNECT)


CAST = (
    Person("anna", "stays all the time, with a delay of 30 s", delay_ms=SHORT_MS),
    Person("david", "crashed", Act.CRASH, 5.0),
    Person("ben", "hung up", Act.LEAVE, 13.0),
    Person("carla", "reconnected in full, and stays", Act.RECONNECT, 17.0),
    Person("emma", "removed by a moderator", Act.REMOVED, 21.0),
    Person("farid", "closed the tab in a network blip", Act.CLOSE_TAB, 9.0),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one person, as three witnesses tell: the SFU, the daemon, and the room. Times in Unix seconds."""

    person: Person
    came: bool  # was it told to join before the end?
    acted: bool  # did its act take place before the end?
    joined_at: float | None  # as the SFU tells
    left_at: float | None  # as the SFU tells
    reason: str
    leave_at: float | None  # of the leave event in the room, by the homeserver's clock
    in_call: bool  # does the room show it in the call at the end?
    announced_once: bool  # is the membership in the room the very event that it announced itself with?
    restarts: int  # the daemon's count; the first one checks that the event is there
    verified: bool
    ended: str  # the daemon's word for how the delayed event ended
    scheduled: bool  # is its delayed event still scheduled at the homeserver?

    @property
    def delay(self) -> float | None:
        """Seconds from the SFU's word of the departure to the leave event in the room."""
        return None if self.left_at is None or self.leave_at is None else self.leave_at - self.left_at

    def restarts_due(self, now: float) -> int:
        """How many restarts, after the first one, must have been made by now."""
        if self.joined_at is None:
            return 0
        return max(0, int((now - self.joined_at - RESTART_SLACK) / (RESTART_AT * self.person.delay_ms / 1000)))


def times(number: int) -> str:
    """How often, in words."""
    return "once" if number == 1 else f"{number} times"


def missing(outcomes: Sequence[Outcome], now: float, *, complete: bool, lost: float) -> list[str]:
    """Everything that is not as it must be, in sentences; empty when all is well.

    `complete`: the whole story was played. `lost`: the daemon's own count of events that were lost while their participant was connected.
    """
    wrong = [sentence for outcome in outcomes for sentence in _missing(outcome, now, complete)]
    if lost:
        wrong.append(f"the daemon counts {lost:g} events that were lost while their participant was connected")
    return wrong


def _missing(one: Outcome, now: float, complete: bool) -> list[str]:
    name = one.person.name
    if not one.came and not complete:
        return []
    if one.joined_at is None:
        return [f"{name}: the SFU has never told that {name} joined"]
    wrong = []
    if not one.verified:
        wrong.append(f"{name}: the daemon could not restart the delayed event even once")
    if one.person.leaves and one.left_at is not None:
        return wrong + _departure(one)
    if one.person.leaves and complete:
        wrong.append(f"{name}: the SFU has never told that {name} left")
    return wrong + _staying(one, now)


def _departure(one: Outcome) -> list[str]:
    name = one.person.name
    if one.leave_at is None or one.delay is None:
        return [f"{name}: left the SFU ({one.reason}), and the leave event is not in the room"]
    if one.delay < -CLOCKS:
        return [f"{name}: the leave event came {-one.delay:.1f} s before the departure"]
    if one.delay > LATEST:
        return [f"{name}: the leave event came {one.delay:.1f} s after the departure, later than {LATEST:g} s"]
    return [] if one.ended == "sent" else [f"{name}: the daemon did not send the leave event ({one.ended or 'still open'})"]


def _staying(one: Outcome, now: float) -> list[str]:
    name, wrong = one.person.name, []
    if not one.in_call:
        wrong.append(f"{name}: is in the call, and the room does not show it")
    elif not one.announced_once:
        wrong.append(f"{name}: is in the call, but its membership was lost in between")
    if not one.scheduled:
        wrong.append(f"{name}: its delayed event is not scheduled any more")
    due = one.restarts_due(now)
    if one.restarts - 1 < due:
        wrong.append(f"{name}: was restarted {times(max(0, one.restarts - 1))}, and should have been {times(due)}")
    return wrong
