"""The numbers and choices that the rules work with. Nearly all of them are configuration; the defaults here are the ones documented."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

MISSING = "MISSING"  # a look did not show a participant whose departure nobody announced
ROOM_MISSING = "ROOM_MISSING"  # a look showed an empty room, and nobody's departure had been announced: an SFU that restarted knows nobody
ROOM_RESTARTED = "ROOM_RESTARTED"  # the room came up anew after the participant had joined: its session belongs to a room that is gone
SFU_LOST = "SFU_LOST"  # nobody can tell whether the participant is there, so its events are let run
NEVER_JOINED = "NEVER_JOINED"  # delegated, and not in the call when the join timeout was over
OTHER = "OTHER"  # every reason that the table does not name
LOST_AFTER = 600.0  # seconds; the default of `Policy.lost`
STABLE_INTERVALS = 10  # a room is looked at less and less often with every so many intervals in which nothing changed
ENDED_BY_OPERATOR = "ENDED_BY_OPERATOR"  # no word of the SFU: the operator had the delegation ended
OWN_REASONS = frozenset({ENDED_BY_OPERATOR, MISSING, ROOM_MISSING, ROOM_RESTARTED, SFU_LOST, NEVER_JOINED, OTHER})


class Unasked(StrEnum):
    """What a departure means as long as the SFU cannot be asked whether the participant is back."""

    GONE = "gone"  # it is over
    AFTER = "after"  # it is over when `unasked_after` has passed since the departure
    CONNECTED = "connected"  # it counts as connected


@dataclass(frozen=True, slots=True)
class Departure:
    """How a departure with one reason is checked."""

    look_after: float  # seconds until the SFU is asked; 0: believed at once, without a look
    unasked: Unasked
    unasked_after: float = 60.0  # seconds; only for Unasked.AFTER


_REMOVED = Departure(0.0, Unasked.GONE)
_BROKEN = Departure(5.0, Unasked.AFTER, 60.0)

DEPARTURES: Mapping[str, Departure] = MappingProxyType(
    {
        "PARTICIPANT_REMOVED": _REMOVED,
        "ROOM_DELETED": _REMOVED,
        "ROOM_CLOSED": _REMOVED,
        "USER_REJECTED": _REMOVED,
        "USER_UNAVAILABLE": _REMOVED,
        # Browsers that reconnect in full send this too, and join anew.
        "CLIENT_INITIATED": Departure(2.0, Unasked.GONE),
        # The SFU waited for 20 s before it said so.
        "CONNECTION_TIMEOUT": _BROKEN,
        "SIGNAL_CLOSE": _BROKEN,
        "STATE_MISMATCH": _BROKEN,
        "MEDIA_FAILURE": _BROKEN,
        "JOIN_FAILURE": _BROKEN,
        # Clients look for another node.
        "SERVER_SHUTDOWN": Departure(30.0, Unasked.CONNECTED),
        # A takeover: the join of the newer session follows, or its abort.
        "DUPLICATE_IDENTITY": Departure(15.0, Unasked.CONNECTED),
        "MIGRATION": Departure(15.0, Unasked.CONNECTED),
        MISSING: Departure(10.0, Unasked.CONNECTED),
        ROOM_MISSING: Departure(90.0, Unasked.CONNECTED),
        # Browsers try to reconnect for about a minute.
        ROOM_RESTARTED: Departure(90.0, Unasked.CONNECTED),
        OTHER: _BROKEN,
    }
)


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything that the rules take from the configuration, and a few numbers that nobody needs to change. All durations in seconds."""

    departures: Mapping[str, Departure] = field(default_factory=lambda: DEPARTURES)
    join_timeout: float = 120.0  # from the delegation, or the last sign of a connection attempt, until an absent participant is given up
    # After the delegation: somebody who is connected already is found by these.
    first_looks: tuple[float, ...] = (1.0, 3.0, 8.0, 20.0, 45.0)
    unseen_departure: float = 10.0  # the least wait for a look when a participant leaves that was never seen under this delegation
    joining_limit: float = 60.0  # how long somebody who is AWAY may be seen joining before that counts as absent
    look_again: float = 5.0  # between looks that could not decide; doubled with each look that failed
    look_again_most: float = 60.0
    look_gap: float = 1.0  # between two looks at one room
    interval: float = 60.0  # between two looks at a room where nothing is suspicious
    interval_most: float = 180.0  # the same, where nothing has changed for long
    late_after: float = 5.0  # a webhook that arrives this much later than its fellows, measured from when it was made, is a reason to look
    lost_after: Mapping[str, float] = field(default_factory=dict)  # by SFU: silence after which its delegations are let run; see `lost`
    breaker_after: int = 3  # looks at an SFU that failed in a row, until it is asked one at a time
    adrift_keep: float = 3600.0  # how long an event that was let run is kept after it must have fired
    settled: float = 2.0  # a look concludes only about what had been so for this long when it was sent
    doubt: float = 3600.0  # how long absences prove nothing after a node of a distributed SFU was away
    instance_margin: float = 5.0  # a session that joined this much before its room came up belongs to another instance of the room
    doubt_after: float = 5.0  # an old session that ends this long after the newer one joined shows that a node was away
    restart_at: float = 0.75  # of the delay: the latest normal time of a restart
    restart_spread: float = 0.10  # of the delay: restarts come up to this much earlier, so that the members of a call do not come at once
    first_spread: float = 0.55  # … of the first one after the delegation: a call's members delegate together, and are not to be restarted together
    retry_first: float = 1.0  # after a failed action; doubled with each further failure, with jitter
    retry_most: float = 60.0
    vanished_wait: float = 30.0  # after a 404 on a restart, until it counts as lost if the participant is still connected
    lease: float = 15.0  # a claimed action is somebody else's when its answer has not come by then; longer than any request may take
    keep: float = 7 * 86400.0  # finished delegations and their history

    def departure(self, reason: str) -> Departure:
        """How a departure with this reason is checked; reasons of the future are treated as OTHER."""
        return self.departures.get(reason) or self.departures.get(OTHER) or DEPARTURES[OTHER]

    def lost(self, sfu: str) -> float:
        """How long an SFU may be silent until nothing can be said about its participants any more, in seconds."""
        return self.lost_after.get(sfu, LOST_AFTER)

    def look_interval(self, stable: float) -> float:
        """Seconds between two routine looks at a room in which nothing has changed for `stable` seconds."""
        longest = max(1, int(self.interval_most / self.interval))
        return self.interval * min(longest, 1 + int(max(0.0, stable) / (STABLE_INTERVALS * self.interval)))
