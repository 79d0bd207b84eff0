"""A daemon without a daemon: the real engine on a database in memory, stepped at once, with a homeserver and an SFU that answer by a script."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import structlog
from aiohttp import web
from aiohttp.test_utils import BaseTestServer, TestClient, TestServer, get_port_socket
from livekit.api import VideoGrants
from prometheus_client import CollectorRegistry
from sfu_delegate.api import port as api_port
from sfu_delegate.api.app import AdminServices, Public, Readiness, Services, Settings
from sfu_delegate.api.listener import Listener
from sfu_delegate.api.overview import HomeserverState, Overview, Promises, SfuState
from sfu_delegate.api.port import Unavailable
from sfu_delegate.api.services import Probes
from sfu_delegate.delegation.model import Accept, Action, Answered, DelayedEvent, Input, Lane, Listed, Looked, Note, Seen, Task, Verdict
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.replies import Reply
from sfu_delegate.engine import Change, Engine, Limits
from sfu_delegate.livekit import tokens
from sfu_delegate.livekit.keys import KeyRing, SfuKey
from sfu_delegate.matrix.discovery import Homeserver, HomeserverRule, Homeservers
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.http import HttpFailed
from sfu_delegate.matrix.management import Scope
from sfu_delegate.matrix.openid import OpenIdRefused
from sfu_delegate.matrix.service import CannotAsk, Federated, Shown
from sfu_delegate.sealing import Sealer, new_key
from sfu_delegate.store.sqlite import SqliteStore
from yarl import URL

NOW = 1_760_000_000.0
KEY = SfuKey("main", "APIkey", "a-secret-of-forty-characters-or-so-000000")
OTHER_KEY = SfuKey("other", "APIother", "the-others-secret-of-forty-characters-00")
SERVER = "example.org"
HS_TOKEN = "hs-token-of-example-org"
SFU_URL = "wss://SFU.example.org:443/rtc-proxy"  # odd, so that it shows whether it is told to the letter

_SFUS = {"main": (SFU_URL, KEY), "other": ("ws://10.0.0.7:7880", OTHER_KEY)}

Script = Callable[[Task], tuple[Verdict, str] | None]
"""What the homeserver says to an action: a verdict and a detail, or None for no answer at all."""


def agrees(_: Task) -> tuple[Verdict, str] | None:
    """A homeserver that does everything."""
    return Verdict.DONE, "200"


def silent(_: Task) -> tuple[Verdict, str] | None:
    """A homeserver that never answers."""
    return None


def only_restarts(verdict: Verdict, detail: str, *delay_ids: str) -> Script:
    """A homeserver that answers so to restarts of these events, and does everything else."""

    def script(task: Task) -> tuple[Verdict, str] | None:
        return (verdict, detail) if task.action is Action.RESTART and task.delay_id in delay_ids else agrees(task)

    return script


class EngineWatch:
    """See `port.Watch`."""

    def __init__(self, delegation: str) -> None:
        self.delegation = delegation
        self.rows: dict[int, DelayedEvent] = {}
        self.changed = asyncio.Condition()

    def tell(self, change: Change) -> None:
        if change.new.delegation == self.delegation or change.new.id in self.rows:
            self.rows[change.new.id] = change.new

    async def until_decided(self, events: set[int], timeout: float) -> bool:  # noqa: ASYNC109
        def decided() -> bool:
            known = [self.rows[event] for event in events if event in self.rows]
            ended = any(row.finished_at is not None and row.verified_at is None for row in known)
            return ended or (len(known) == len(events) and all(row.verified_at or row.finished_at for row in known))

        try:
            async with asyncio.timeout(timeout), self.changed:
                return await self.changed.wait_for(decided)
        except TimeoutError:
            return False


class EnginePort:
    """See `port.Port`. The actions that an input sets off are carried out right after its reply, with the clock standing still."""

    def __init__(self, script: Script = agrees, now: float = NOW, limits: Limits = Limits(), database: str = ":memory:") -> None:  # noqa: B008
        self.script = script
        self.at = now
        self.store = SqliteStore(database)
        self.engine = Engine(self.store, Policy(), limits, Random(1))
        self.listed: tuple[Listed, ...] = ()
        self.error: Exception | None = None  # what `put` raises instead of doing anything
        self.given: list[Input] = []
        self.course: list[str] = []  # who was asked for something, in order: this port by the kind of the input, others by their names
        self.tasks: list[Task] = []
        self._watches: list[EngineWatch] = []
        self._background: set[asyncio.Task[None]] = set()

    def now(self) -> float:
        return self.at

    async def put(self, given: Input) -> Reply:
        replies: list[Reply | Exception] = []
        self.hand(given, replies.append)
        await self._tell()
        if isinstance(replies[0], Exception):
            raise replies[0]
        return replies[0]

    def hand(self, given: Input, told: api_port.Told) -> None:
        if self.error is not None:
            told(self.error)
            return
        self.given.append(given)
        self.course.append(type(given).__name__)
        reply, tasks = self._step([given])
        if tasks:
            task = asyncio.get_running_loop().create_task(self._act(tasks))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
        told(reply[0])

    @contextmanager
    def watch(self, delegation: str) -> Iterator[EngineWatch]:
        watch = EngineWatch(delegation)
        self._watches.append(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)

    @property
    def watched(self) -> int:
        """How many watches are open."""
        return len(self._watches)

    async def settled(self) -> None:
        """Everything that was set off has been done."""
        while self._background:
            await asyncio.gather(*self._background)

    def rows(self) -> list[DelayedEvent]:
        """All rows there are, by id."""
        return self.store.atomically(lambda tx: [row for id in range(1, self.store.last_id + 1) if (row := tx.get(id)) is not None])

    def history(self) -> list[Note]:
        """The whole history."""
        ids = [row.id for row in self.rows()]
        return self.store.atomically(lambda tx: tx.history(ids))

    def close(self) -> None:
        self.store.close()

    def _step(self, inputs: list[Input]) -> tuple[list[Reply | Exception], list[Task]]:
        step = self.engine.step(inputs, self.at)
        self.tasks += step.tasks
        for change in step.changes:
            for watch in self._watches:
                watch.tell(change)
        return step.replies, step.tasks

    async def _act(self, tasks: list[Task]) -> None:
        while tasks:
            answers = [answer for task in tasks if (answer := self._answer(task)) is not None]
            _, tasks = self._step(answers) if answers else ([], [])
            await self._tell()

    async def _tell(self) -> None:
        for watch in list(self._watches):
            async with watch.changed:
                watch.changed.notify_all()

    def _answer(self, task: Task) -> Input | None:
        if task.action is Action.LOOK:
            return Looked(task.sfu, task.room, task.claim, self.at, self.listed)
        said = self.script(task)
        if said is None:
            return None
        return Answered(task.homeserver, task.event, task.claim, task.action, self.at, said[0], detail=said[1])


class NoNetwork:
    """An HTTP client that reaches nobody."""

    async def get(self, *_: object, **__: object) -> Any:
        raise HttpFailed(True, "connection refused at 10.0.0.1")

    post = put = get

    async def aclose(self) -> None:
        pass


@dataclass
class Scopes:
    """What is found out about tokens."""

    scope: Scope = Scope.SCOPED
    asked: list[str] = field(default_factory=list)

    async def is_scoped(self, homeserver: Homeserver, token: str, timeout: float) -> Scope:  # noqa: ASYNC109
        self.asked.append(token)
        return self.scope


@dataclass
class Vouchers:
    """Homeservers that vouch for users: token → user, or the exception that comes instead. Any server vouches; see `api.services.UserCheck`."""

    course: list[str]
    users: dict[str, str | Exception] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)  # server name and token
    timeouts: list[float] = field(default_factory=list)

    async def user(self, server_name: str, token: str, timeout: float, who: str) -> str:  # noqa: ASYNC109
        self.course.append("openid")
        self.asked.append((server_name, token))
        self.timeouts.append(timeout)
        user = self.users.get(token, OpenIdRefused("the homeserver does not know the token"))
        if isinstance(user, Exception):
            raise user
        return user


@dataclass
class SfuRooms:
    """The SFUs; see `api.services.Rooms`."""

    course: list[str]
    error: Exception | None = None  # what `create` raises
    gone: Exception | None = None  # what `access` raises
    created: list[tuple[str, str]] = field(default_factory=list)  # SFU and room

    async def create(self, sfu: str, room: str) -> None:
        self.course.append("room")
        if self.error is not None:
            raise self.error
        self.created.append((sfu, room))

    def named(self, url: str) -> str | None:
        return next((name for name, (its, _) in _SFUS.items() if its == url), None)

    def access(self, sfu: str) -> tuple[str, SfuKey]:
        if self.gone is not None:
            raise self.gone
        return _SFUS[sfu]


@dataclass
class AsService:
    """What homeservers tell their application service; see `api.services.ServiceClient`."""

    course: list[str]
    events: dict[tuple[str, str], Shown] = field(default_factory=dict)  # by user and delay_id
    members: set[tuple[str, str]] = field(default_factory=set)  # user and room
    remote: Federated = Federated(200, "", {"jwt": "from-afar"})  # noqa: RUF009 - immutable
    trouble: CannotAsk | None = None
    asked: list[tuple[str, ...]] = field(default_factory=list)
    bodies: list[Mapping[str, Any]] = field(default_factory=list)
    timeouts: list[float] = field(default_factory=list)

    async def delayed_event(self, homeserver: Homeserver, user: str, delay_id: str, timeout: float) -> Shown | None:  # noqa: ASYNC109
        self._ask(timeout, "event", homeserver.name, user)
        return self.events.get((user, delay_id))

    async def is_joined(self, homeserver: Homeserver, user: str, room_id: str, timeout: float) -> bool:  # noqa: ASYNC109
        self._ask(timeout, "joined", homeserver.name, user, room_id)
        return (user, room_id) in self.members

    async def federated(
        self,
        homeserver: Homeserver,
        destination: str,
        endpoint: str,
        body: Mapping[str, Any],
        timeout: float,  # noqa: ASYNC109
    ) -> Federated:
        self._ask(timeout, "federated", homeserver.name, destination, endpoint)
        self.bodies.append(body)
        return self.remote

    def _ask(self, timeout: float, *what: str) -> None:
        self.course.append(what[0])
        self.asked.append(what)
        self.timeouts.append(timeout)
        if self.trouble is not None:
            raise self.trouble


@dataclass
class Tokens:
    """Who was given one; see `api.services.Admissions`."""

    given_to: list[tuple[str, ...]] = field(default_factory=list)
    arrived: list[Seen] = field(default_factory=list)
    error: Exception | None = None

    async def given(self, sfu: str, room: str, identity: str, homeserver: str, user: str, room_id: str) -> None:
        if self.error is not None:
            raise self.error
        self.given_to.append((sfu, room, identity, homeserver, user, room_id))

    def joined(self, seen: Seen) -> None:
        self.arrived.append(seen)


@dataclass
class Told:
    """What the hooks were told."""

    webhooks: list[tuple[str, str, str]] = field(default_factory=list)
    acknowledged: list[float] = field(default_factory=list)
    matrixrtc: list[tuple[str, int, bool]] = field(default_factory=list)
    delegations: list[int] = field(default_factory=list)

    def on_webhook(self, sfu: str, event: str, result: str) -> None:
        self.webhooks.append((sfu, event, result))

    def on_acknowledged(self, seconds: float) -> None:
        self.acknowledged.append(seconds)

    def on_matrixrtc(self, endpoint: str, status: int, delegates: bool) -> None:
        self.matrixrtc.append((endpoint, status, delegates))

    def on_delegation(self, status: int) -> None:
        self.delegations.append(status)


class Bench:
    """The public application on the real engine, and handles on everything around it."""

    def __init__(
        self,
        script: Script = agrees,
        *,
        limits: Limits = Limits(),  # noqa: B008
        settings: Settings = Settings(),  # noqa: B008
        paths: Mapping[str, str] | None = None,
        database: str = ":memory:",
        **given: Any,
    ) -> None:
        self.port = EnginePort(script, limits=limits, database=database)
        self.settings = settings
        self.stopping = False
        self.scopes = Scopes()
        self.vouchers = Vouchers(self.port.course)
        self.rooms = SfuRooms(self.port.course)
        self.service = AsService(self.port.course)
        self.tokens = Tokens()
        self.told = Told()
        self.keys = KeyRing([KEY])
        self.sealer = Sealer([new_key()])
        network = NoNetwork()
        rules = [
            HomeserverRule(SERVER, "https://matrix.example.org", as_token="as-token-of-example-org", hs_token=HS_TOKEN),
            HomeserverRule("second.example", "https://matrix.second.example", as_token="as-token-of-second", hs_token="hs-token-of-second"),
            HomeserverRule("*.example.net", "https://many.example.net"),
            HomeserverRule("unreachable.org"),
        ]
        self.homeservers = Homeservers(rules, Egress(network, network), lambda: self.port.at)
        self.services = Services(
            port=self.port,
            keys=self.keys,
            homeservers=self.homeservers,
            management=self.scopes,
            openid=self.vouchers,
            rooms=self.rooms,
            service=self.service,
            admissions=self.tokens,
            paths={"": "main"} if paths is None else paths,
            label=self._label,
            sealer=self.sealer,
            settings=lambda: self.settings,
            hooks=self.told,
            log=structlog.stdlib.get_logger("test"),
            stopping=lambda: self.stopping,
            clock=self.port.now,
            **given,
        )

    def _label(self, homeserver: str) -> str:
        rule = self.homeservers.rule_for(homeserver)
        return "(not configured)" if rule is None else rule.pattern

    def configure(self, **settings: Any) -> None:
        """As a reload would."""
        self.settings = replace(self.settings, **settings)

    def access_token(
        self, identity: str = "alice", room: str = "room", *, key: SfuKey = KEY, ttl: float = 3600.0, join: bool = True, user: str | None = None
    ) -> str:
        """The token that a participant joins with."""
        return tokens.mint(key, VideoGrants(room_join=join, room=room), self.port.at, ttl, identity, user)

    def bearer(self, identity: str = "alice", room: str = "room") -> dict[str, str]:
        """The header with it."""
        return {"Authorization": f"Bearer {self.access_token(identity, room)}"}

    def accepted(self) -> list[Accept]:
        """What clients delegated, as it was handed in."""
        return [given for given in self.port.given if isinstance(given, Accept)]


async def until(condition: Callable[[], object]) -> None:
    """Wait for an effect."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


BY_LISTENER = False
"""Is what is usual read by the listener, as in the daemon? Else aiohttp reads everything."""


class ListenerServer(BaseTestServer):
    """The daemon's public listener, for aiohttp's test client."""

    def __init__(self, services: Services) -> None:
        super().__init__()
        self._services = services
        self.listener: Listener | None = None

    async def _make_runner(self, **_: Any) -> web.BaseRunner:
        raise NotImplementedError  # the listener has its own

    @property
    def started(self) -> bool:
        return self.listener is not None

    async def start_server(self, loop: asyncio.AbstractEventLoop | None = None, **_: Any) -> None:
        if self.listener is None:
            public = Public(self._services)
            sock = get_port_socket("127.0.0.1", 0, socket.AF_INET)
            self.listener = Listener(public.app, public.usual, self._services.log, closed_within=1.0)
            await self.listener.start(sock)
            self.port, self.scheme = sock.getsockname()[1], "http"
            self._root = URL(f"http://127.0.0.1:{self.port}")

    async def close(self) -> None:
        if self.listener is not None and not self._closed:
            self._closed = True
            await self.listener.close()


@asynccontextmanager
async def serving(bench: Bench) -> AsyncIterator["TestClient[Any, Any]"]:
    """A client of the application, which listens on loopback. Handlers of aiohttp's are cancelled when their client hangs up."""
    server = ListenerServer(bench.services) if BY_LISTENER else TestServer(Public(bench.services).app)
    client: TestClient[Any, Any] = TestClient(server)
    async with client:
        try:
            yield client
        finally:
            await bench.port.settled()
            bench.port.close()


def delayed(delay_id: str = "syd_abcdefghijklmnopqrst", delay_ms: Any = 3_600_000, **more: Any) -> dict[str, Any]:
    """A delayed event as a client hands it over."""
    return {"delay_id": delay_id, "delay_ms": delay_ms, **more}


def delegation(*events: dict[str, Any], homeserver: str = SERVER, **more: Any) -> dict[str, Any]:
    """The body of `POST /v1/delegations`."""
    return {"homeserver": homeserver, "delayed_events": list(events or (delayed(),)), **more}


class Uninspected:
    """A daemon of which nothing is known, with a database that cannot be read beside the engine."""

    def overview(self) -> Overview:
        """See `api.overview.Inspection`."""
        return Overview("0", "", 1, NOW, NOW, "in memory", 60.0, Promises(0, {}, 0, 0, None, None, None), {}, {}, {})

    async def read(self, work: Callable[[Any], Any]) -> Any:
        """See `api.overview.Inspection`."""
        raise Unavailable("It is in memory.", 1.0)


class Inspected:
    """A daemon whose database, a file, is read beside the engine; its homeserver is limited, and its SFU does not answer."""

    def __init__(self, port: EnginePort) -> None:
        self._reader = port.store.reader()
        self.error: Unavailable | None = None  # what `read` raises

    def overview(self) -> Overview:
        """See `api.overview.Inspection`."""
        waiting = {Lane.END: (3, NOW - 60.0)}
        server = HomeserverState(SERVER, SERVER, "", None, 3, "some", 1.0, 5.0, exempt=False, lateness=2.5, waiting=waiting)
        sfu = SfuState("main", SFU_URL, "no answer", NOW - 5.0, NOW - 90.0, NOW - 60.0, several_nodes=False)
        promises = Promises(1, {"sent": 2, "lost": 1}, 2, 2, 0.25, 1.5, 1.5)
        states = {("live", "connected"): 2, ("ending", "gone"): 1}
        webhooks, actions = {("main", "participant_left", "stored"): 2}, {("send", "done"): 2, ("restart", "limited"): 1}
        return Overview("1.0.0", "a", 2, NOW - 60, NOW, "in a file", 60.0, promises, states, webhooks, actions, (server,), (sfu,))

    async def read(self, work: Callable[[Any], Any]) -> Any:
        """See `api.overview.Inspection`."""
        if self.error is not None:
            raise self.error
        return work(self._reader)


def admin_services(
    readiness: Callable[[float], Awaitable[Readiness]], registry: CollectorRegistry | None = None, token: str | None = None
) -> AdminServices:
    """What the admin listener of such a daemon works with."""
    bench = Bench()
    return AdminServices(readiness, registry or CollectorRegistry(), bench.services.log, Uninspected(), bench.services.port, Probes(), token)
