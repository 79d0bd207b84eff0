"""How a soak is played: everything that is a number. What differs from the daemon's defaults is in `daemon_config`, and in the report."""

from dataclasses import dataclass
from typing import Any

from cryptography.fernet import Fernet
from sfu_delegate.sandbox.homeserver import RateLimit

JOIN_TIMEOUT = 60.0  # seconds; scaled down from 2 min, so that those who never come are given up within a short soak
MIN_DELAY = 30.0

# What the daemon may need to find somebody gone whose every webhook was lost: its periodic look (60 s, and up to twice that in a room that is
# stable), the second look at a whole room that vanished (90 s), and some time to act.
GHOST_AFTER = 240.0  # seconds without any disturbance but lost webhooks
FAIR_CHANCE = 5.0  # seconds in which daemon and homeserver work, near the deadline, suffice for a restart
REQUEST_TIMEOUT = 10.0  # the daemon's, for a homeserver: how long a hung request holds its place
SFU_TIMEOUT = 5.0  # the daemon's, for a look
BACK_WITHIN = 7.0  # seconds after the SFU is up again until the last client has tried: the longest pause between two tries
HASTY = 3.2  # seconds between two goodbyes: a look comes 2 s after the first, and the second takes somebody away for 1.2 s
GAP = 1.2  # seconds for which a goodbye takes somebody away who reconnects, at the most
MISSING_LOOKS = 10.0 + GAP  # seconds over which two looks that find somebody missing, of whom nothing was heard, count as a departure
STALE_AFTER = 15.0  # seconds after a newer delegation was confirmed until the older event must not be sent any more
ENDING_WITHIN = 300.0  # seconds from the last departure until everything has to have ended


@dataclass(frozen=True, slots=True)
class HomeserverKind:
    """One of the homeservers: its limit, the delays (seconds) of its users' events, and its share of the people."""

    name: str
    limit: RateLimit | None
    delays: tuple[float, ...]
    share: float  # of all people
    most: int  # people
    fails: bool  # whether it is hit by faults of its own


# Where it fails, delays are long enough for an outage; 60 s leave 15 s from the latest normal restart to the deadline. Events of an hour do not run
# out by themselves: they show who is forgotten.
HOMESERVERS = (
    HomeserverKind("steady.test", None, (60.0, 60.0, 60.0, 60.0, 60.0, 120.0, 120.0, 600.0, 3600.0), 0.8, 1 << 20, False),
    HomeserverKind("limited.test", RateLimit(), (120.0, 180.0, 300.0, 3600.0), 0.1, 16, False),
    HomeserverKind("failing.test", None, (120.0, 120.0, 300.0, 3600.0), 0.2, 1 << 20, True),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """One soak."""

    minutes: float
    seed: int
    people: int = 2000
    stay: float = 150.0  # mean seconds in a call
    instances: int = 0  # that share a PostgreSQL; 0: one daemon, with SQLite

    @property
    def seconds(self) -> float:
        """How long people come and go, and things go wrong."""
        return self.minutes * 60

    @property
    def kill_every(self) -> float:
        """Mean seconds between two things that happen to the daemon's process, or to one of the instances."""
        return min(60.0, self.seconds / 5) / max(1, self.instances)

    @property
    def rooms(self) -> int:
        """About 12 people to a room, some of them on their way."""
        return max(2, self.people // 12)

    @property
    def ramp(self) -> float:
        """Seconds over which the first of them come."""
        return min(self.seconds / 4, max(5.0, self.people / 50))

    def homes(self) -> list[HomeserverKind]:
        """Each person's homeserver."""
        small = [(kind, max(1, min(kind.most, round(self.people * kind.share)))) for kind in HOMESERVERS[1:]]
        homes = [kind for kind, count in small for _ in range(count)]
        return homes + [HOMESERVERS[0]] * max(0, self.people - len(homes))

    def scaled(self) -> dict[str, str]:
        """What is not as in a real installation, for the report."""
        return {
            "delays": "60 s to 1 h, most of them 60 s or 120 s, where clients should use 1 h: so that many restarts happen",
            "delegations.min_delay": f"{MIN_DELAY:g}s",
            "presence.join_timeout": f"{JOIN_TIMEOUT:g}s in place of 2m",
        }


def daemon_config() -> dict[str, Any]:
    """The sections of the daemon's configuration that are not at their defaults."""
    return {"delegations": {"min_delay": f"{MIN_DELAY:g}s"}, "presence": {"join_timeout": f"{JOIN_TIMEOUT:g}s"}}


def instance_configs(names: tuple[str, ...], database: str) -> dict[str, dict[str, Any]]:
    """The sections by which instances share a database, and are told apart."""
    keys = [Fernet.generate_key().decode()]
    return {name: {"database": database, "postgresql": {"instance": name}, "encryption": {"keys": keys}} for name in names}
