"""What the HTTP side is given by whoever starts it. Holds no logic, and keeps nothing between requests."""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, NamedTuple, Protocol

from prometheus_client import CollectorRegistry
from structlog.stdlib import BoundLogger

from sfu_delegate.api.client import Network
from sfu_delegate.api.overview import Inspection
from sfu_delegate.api.port import Port
from sfu_delegate.delegation.model import Seen
from sfu_delegate.livekit.keys import SfuKey
from sfu_delegate.matrix.discovery import Homeserver, Homeservers
from sfu_delegate.matrix.management import Scope
from sfu_delegate.matrix.service import Federated, Shown
from sfu_delegate.sealing import Sealer


@dataclass(frozen=True, slots=True)
class Settings:
    """The part of the configuration that the HTTP side needs; durations in seconds, sizes in bytes."""

    max_body: int = 64 * 1024
    max_webhook_body: int = 1024 * 1024
    min_delay: float = 30.0
    max_delay: float = 7 * 86400.0
    max_events: int = 8  # in one delegation
    verify_timeout: float = 2.0  # how long a client waits for its homeserver's answer; nothing else ever waits for one
    allow_scoped_tokens: bool = True
    request_timeout: float = 10.0  # for a question to a homeserver
    restart_at: float = 0.75  # of the delay: the latest normal time of a restart
    cors_origins: tuple[str, ...] = ("*",)
    other_homeservers: bool = True  # do users of homeservers that are not served get tokens for rooms that exist?
    trusted_proxies: tuple[Network, ...] = ()
    client_rate: float = 0.0  # requests a second from one address; 0: no limit
    client_burst: int = 1
    user_rate: float = 0.0  # the same of one user
    user_burst: int = 1


class Hooks(Protocol):
    """How the metrics hear of webhooks. All labels come from the configuration or from fixed lists."""

    def on_webhook(self, sfu: str, event: str, result: str) -> None:
        """A webhook was answered. `sfu` and `event` are "unknown" where its signature did not prove them."""

    def on_acknowledged(self, seconds: float) -> None:
        """From the arrival of a webhook that mattered until it was durable and its answer ready."""

    def on_matrixrtc(self, endpoint: str, status: int, delegates: bool) -> None:
        """A request to a MatrixRTC endpoint was answered; `delegates`: it had a delayed event with it."""

    def on_delegation(self, status: int) -> None:
        """`POST /v1/delegations` was answered."""


class UserCheck(Protocol):
    """Finds out whose an OpenID token is."""

    async def user(self, server_name: str, token: str, timeout: float, who: str) -> str:  # noqa: ASYNC109
        """The Matrix user ID. `who` asks, by address: where places are short, each gets one in turn. Raises OpenIdRefused, OpenIdUnavailable."""


class Rooms(Protocol):
    """The SFUs, for those who want to join."""

    async def create(self, sfu: str, room: str) -> None:
        """Make the room, unless it is there. Raises SfuUnavailable."""

    def named(self, url: str) -> str | None:
        """Which SFU clients connect to by this URL."""

    def access(self, sfu: str) -> tuple[str, SfuKey]:
        """The URL that clients connect to, to the letter, and the key that signs their tokens. Raises SfuUnavailable: it is not configured."""


class ServiceClient(Protocol):
    """What an application service asks its homeserver: see `matrix.service`. All raise CannotAsk."""

    async def delayed_event(self, homeserver: Homeserver, user: str, delay_id: str, timeout: float) -> Shown | None:  # noqa: ASYNC109
        """A delayed event of this user's; None where it has none of that id."""

    async def is_joined(self, homeserver: Homeserver, user: str, room_id: str, timeout: float) -> bool:  # noqa: ASYNC109
        """Is the user in the room?"""

    async def federated(
        self,
        homeserver: Homeserver,
        destination: str,
        endpoint: str,
        body: Mapping[str, Any],
        timeout: float,  # noqa: ASYNC109
    ) -> Federated:
        """What another homeserver answers at one of MSC4195's endpoints."""


class Admissions(Protocol):
    """Whoever looks after those that were given access tokens."""

    async def given(self, sfu: str, room: str, identity: str, homeserver: str, user: str, room_id: str) -> None:
        """A token is about to be given; `homeserver` can be asked whether the user is in the Matrix room. Kept when this returns, if that is
        configured. Raises Unavailable.
        """

    def joined(self, seen: Seen) -> None:
        """A webhook says that somebody has joined."""


class TokenCheck(Protocol):
    """Finds out what a client's token can do."""

    async def is_scoped(self, homeserver: Homeserver, token: str, timeout: float) -> Scope:  # noqa: ASYNC109
        """Is it really a scoped token?"""


class Probe(NamedTuple):
    """A webhook about a room that was made to see whether it comes. `at` in Unix seconds."""

    at: float
    sfu: str
    event: str


class Probes:
    """Webhooks about rooms that `sfu-delegate doctor` makes: the last ones, in memory. Only what an SFU has signed gets here."""

    MOST: Final = 32  # rooms

    def __init__(self) -> None:
        self._by_room: dict[str, list[Probe]] = {}

    def heard(self, room: str, probe: Probe) -> None:
        """One came."""
        told = self._by_room.setdefault(room, [])
        if len(told) < self.MOST:
            told.append(probe)
        while len(self._by_room) > self.MOST:
            del self._by_room[next(iter(self._by_room))]

    def of(self, room: str) -> list[Probe]:
        """What came about a room."""
        return list(self._by_room.get(room, ()))


PROBE_ROOMS: Final = "sfu-delegate-doctor-"
"""What the names of such rooms begin with."""


@dataclass(frozen=True, slots=True)
class Services:
    """What the public listener works with. `settings` and `stopping` are asked anew for every request."""

    port: Port
    keys: Mapping[str, SfuKey]
    homeservers: Homeservers
    management: TokenCheck
    openid: UserCheck
    service: ServiceClient
    admissions: Admissions
    rooms: Rooms
    paths: Mapping[str, str]  # prefix of the MatrixRTC endpoints → SFU; empty: there are none
    label: Callable[[str], str]  # what to call a homeserver where its name, which a client chose, does not belong
    sealer: Sealer
    settings: Callable[[], Settings]
    hooks: Hooks
    log: BoundLogger
    probes: Probes = field(default_factory=Probes)
    stopping: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.time  # the wall clock, in Unix seconds, by which tokens expire


class Phase(StrEnum):
    """Where the daemon is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Readiness:
    """What `/health/ready` tells. Problems are plain sentences for the operator; "" where all is well."""

    phase: Phase
    database: str = ""
    homeservers: Mapping[str, str | None] = field(default_factory=dict)  # by name; None: not asked yet
    sfus: Mapping[str, str | None] = field(default_factory=dict)  # by name; None: not asked yet
    application_services: Mapping[str, str | None] = field(default_factory=dict)  # by homeserver; None: not asked yet


@dataclass(frozen=True, slots=True)
class AdminServices:
    """What the admin listener works with."""

    readiness: Callable[[float], Awaitable[Readiness]]  # answers within so many seconds, whatever hangs
    registry: CollectorRegistry
    log: BoundLogger
    inspection: Inspection
    port: Port
    probes: Probes
    token: str | None = field(default=None, repr=False)  # `admin.token`
