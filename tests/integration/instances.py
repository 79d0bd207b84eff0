"""Several instances of the daemon as processes, one PostgreSQL, a balancer before them, and people who come and go; what is true is known here.

Everything but the daemon and PostgreSQL is in this process: SFU, homeserver, balancer. So whoever may take long (PostgreSQL's programs) is called in
a thread.
"""

import asyncio
import json
import math
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, LiteralString, NamedTuple, Self

import aiohttp
from cryptography.fernet import Fernet
from prometheus_client.parser import text_string_to_metric_families
from sfu_delegate.demo.daemon import DaemonProcess, DelegateApi
from sfu_delegate.sandbox import tokens
from sfu_delegate.sandbox.homeserver import DelayedEvent, End, HomeserverModel
from sfu_delegate.sandbox.server import HOST, SandboxHomeserver, SandboxSfu
from sfu_delegate.sandbox.sfu import SfuModel

from tests.integration.daemon import GENEROUS, MATRIX_ROOM, MEMBER, QUICK, SERVER, SFU_KEY, SFU_SECRET, merged, until
from tests.postgresql import Server

NAMES = ("one", "two", "three", "four")
LEASE = 5.0  # seconds
REQUEST_TIMEOUT = 3.0
ENCRYPTION_KEY = Fernet.generate_key().decode()
SAID = ("delegation", "event", "what", "detail", "action", "consequence")  # of what the log says of a delegation
CLIENT = "client"  # who ended an event, in the homeserver's log

SHORT: Mapping[str, Any] = {
    "actions": {"lease": f"{LEASE:g}s"},
    "timeouts": {"connect": "1s", "request": f"{REQUEST_TIMEOUT:g}s", "shutdown": "3s"},
    # Somebody who is back, and of whom nothing was heard yet, needs some time to join.
    "departures": {"CLIENT_INITIATED": {"look_after": "500ms"}, "MISSING": {"look_after": "5s"}},
    "log": {"level": "debug", "format": "json"},
}
"""As `daemon.QUICK`, and the lease is half of what it is by default."""


# ── the balancer ──


class Delivered(NamedTuple):
    """A webhook, and the instance that it was given to."""

    instance: str
    event: str
    identity: str
    status: int | None  # None: no answer came, and the SFU's connection was cut


class Balancer:
    """One address for all instances: each request goes to one of them, by chance. Made for clients that repeat what got no answer.

    Who refuses a connection, breaks it, or does not answer in time is left out for a moment; where `check` runs, until it is alive again. When all
    are left out, all are asked. `only` is the name of the one that gets everything.
    """

    LEFT_OUT = 0.5  # seconds
    CHECK_EVERY = 1.0
    CHECK_WITHIN = 2.0

    def __init__(self, random: Random, told: Callable[[str, bytes, int | None], None] = lambda *_: None) -> None:
        self.ports: dict[str, int] = {}  # by instance
        self.only: str | None = None
        self.patience = 3.0  # seconds for an answer
        self.answers: Counter[tuple[str, int | None]] = Counter()  # by instance and status
        self._random = random
        self._told = told
        self._out_until: dict[str, float] = {}
        self._asking: dict[str, set[asyncio.Task[bytes]]] = {}
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, HOST, 0)
        self.url = f"http://{HOST}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (request := await _message(client)) and (answer := await self._ask(request)):
                back.write(answer)
                await back.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or all is over
        finally:
            self._connections.discard(task)
            back.transport.abort()

    def _choose(self) -> str:
        if self.only is not None:
            return self.only
        now = time.monotonic()
        names = [name for name in self.ports if self._out_until.get(name, 0.0) <= now]
        return self._random.choice(names or [*self.ports])

    async def _ask(self, request: bytes) -> bytes:
        """The answer of one instance; b"": there was none."""
        name = self._choose()
        asking = asyncio.create_task(_exchange(self.ports[name], request))
        under_way = self._asking.setdefault(name, set())
        under_way.add(asking)
        try:
            await asyncio.wait({asking}, timeout=self.patience)
        finally:
            under_way.discard(asking)
            asking.cancel()
        answer = asking.result() if asking.done() and not asking.cancelled() else b""
        status = _status(answer)
        if status is None:
            self._out_until[name] = max(self._out_until.get(name, 0.0), time.monotonic() + self.LEFT_OUT)
        self.answers[name, status] += 1
        self._told(name, request, status)
        return answer

    async def check(self, name: str, port: int) -> None:
        """Ask an instance again and again, at its admin listener, whether it is alive, until cancelled. Who does not answer gets no requests, and
        those that it has got are given up."""
        request = b"GET /health/live HTTP/1.1\r\nHost: balancer\r\n\r\n"
        while True:
            answer = b""
            with suppress(TimeoutError):
                async with asyncio.timeout(self.CHECK_WITHIN):
                    answer = await _exchange(port, request)
            self._out_until[name] = 0.0 if _status(answer) == 200 else math.inf
            if not answer:
                for asking in self._asking.get(name, ()):
                    asking.cancel()
            await asyncio.sleep(self.CHECK_EVERY)


async def _exchange(port: int, request: bytes) -> bytes:
    """A request on a connection of its own, and the answer; b"" when there is none."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            writer.write(request)
            return await _message(reader)
        finally:
            writer.transport.abort()
    except (OSError, asyncio.IncompleteReadError):
        return b""


def _status(answer: bytes) -> int | None:
    return int(answer.split(b" ", 2)[1]) if answer else None


async def _message(reader: asyncio.StreamReader) -> bytes:
    """A request or an answer with its body; b"" when the connection has ended before it. Raises IncompleteReadError and OSError."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return b""
    assert b"chunked" not in head, head
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return head + (await reader.readexactly(int(length[1])) if length else b"")


# ── the instances ──


class Instance(DaemonProcess):
    """One of them."""

    def __init__(self, name: str, config: Mapping[str, Any], directory: Path) -> None:
        super().__init__(config, directory)
        self.name = name
        self.port = int(self.config["listen"]["port"])

    def pause(self) -> None:
        """SIGSTOP: as when its machine stands still. Its connections stay."""
        self.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        """SIGCONT."""
        self.send_signal(signal.SIGCONT)

    def told(self, what: str) -> list[dict[str, Any]]:
        """The lines of its log about delegations that say this."""
        return [line for line in self.entries("delegation") if line["what"] == what]


@dataclass(eq=False)
class Stay:
    """One delayed event of one person, from its scheduling on, and what is true of it. Times are Unix seconds."""

    identity: str
    room: str
    event: DelayedEvent
    token: str = field(repr=False)
    delegation: str = ""  # its id; "" as long as no instance has acknowledged it
    management_token: str = field(default="", repr=False)
    verified: bool = False
    left_at: float | None = None
    replaced_at: float | None = None  # a newer delegation of the same person was confirmed

    @property
    def there(self) -> bool:
        """Is the person in the call, or on the way into it?"""
        return self.left_at is None

    def __str__(self) -> str:
        times = {"scheduled": self.event.scheduled_at, "left": self.left_at, "replaced": self.replaced_at, "ended": self.event.ended_at}
        shown = " ".join(f"{what} {at % 1000:.2f}" for what, at in times.items() if at is not None)
        return f"{self.identity} in {self.room}, {self.delegation or 'not delegated'}: {shown}, {self.event.end.value or 'pending'}"


class Cluster:
    """Instances, their database, what is around them, and what tests do with them. Made by `open_cluster`."""

    def __init__(
        self,
        directory: Path,
        server: Server,
        url: str,
        sfu: SandboxSfu,
        homeserver: SandboxHomeserver,
        balancer: Balancer,
        changes: Mapping[str, Any],
        apart: Mapping[str, Mapping[str, Any]],
    ):
        self.server = server
        self.url = url  # of the database
        self.sfu = sfu
        self.homeserver = homeserver
        self.balancer = balancer
        self.delivered: list[Delivered] = []
        self.instances: list[Instance] = []
        self.http: aiohttp.ClientSession
        self.api: DelegateApi
        self.secrets = {SFU_SECRET, ENCRYPTION_KEY}
        self._directory = directory
        self._changes = changes
        self._apart = apart

    # ── their lives ──

    def add(self, name: str) -> Instance:
        """One more of them, which is not started."""
        own = {
            "database": self.url,
            "postgresql": {"instance": name},
            "encryption": {"keys": [ENCRYPTION_KEY]},
            "sfus": {"main": {"url": self.sfu.url.replace("http", "ws"), "keys": {SFU_KEY: SFU_SECRET}, "request_timeout": "2s"}},
            "homeservers": [{"name": SERVER, "url": self.homeserver.url}],
        }
        instance = Instance(name, merged(QUICK, SHORT, own, self._changes, self._apart.get(name, {})), self._directory / name)
        self.instances.append(instance)
        self.balancer.ports[name] = instance.port
        return instance

    async def start(self) -> None:
        """Start all, at once."""
        async with asyncio.TaskGroup() as starting:
            for instance in self.instances:
                starting.create_task(instance.start())

    async def stop(self) -> None:
        """End all, whatever state they are in; those that run by SIGTERM."""
        for instance in self.instances:
            with suppress(RuntimeError):  # it was never started
                instance.go_on()
        stopped = await asyncio.gather(*(self._stop(instance) for instance in self.instances))
        assert not any(stopped), f"exit codes after SIGTERM: {stopped}"

    async def _stop(self, instance: Instance) -> int:
        try:
            return await instance.stop() if instance.returncode is None else 0
        except RuntimeError:
            return 0

    def deliver(self, instance: str, request: bytes, status: int | None) -> None:
        """Note to whom the balancer gave a webhook."""
        head, _, body = request.partition(b"\r\n\r\n")
        if head.startswith(b"POST /webhooks"):
            told = json.loads(body)
            self.delivered.append(Delivered(instance, told["event"], told.get("participant", {}).get("identity", ""), status))

    # ── what operators see ──

    async def admin(self, instance: Instance, path: str) -> tuple[int, str]:
        """One request to an instance's admin listener."""
        async with self.http.get(instance.admin_url + path) as response:
            return response.status, await response.text()

    async def ready(self, instance: Instance) -> bool:
        """Does it take requests?"""
        try:
            async with asyncio.timeout(5):
                return (await self.admin(instance, "/health/ready"))[0] == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def all_ready(self) -> float:
        """Wait until all are, and return the seconds that it took."""
        began = time.monotonic()

        async def so() -> bool:
            return all(await asyncio.gather(*map(self.ready, self.instances)))

        await until(so, "all instances are ready")
        return time.monotonic() - began

    async def count(self, instance: Instance, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        _, exposition = await self.admin(instance, "/metrics")
        return sum(
            sample.value
            for family in text_string_to_metric_families(exposition)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The lines of all logs with this event."""
        return [line for instance in self.instances for line in instance.entries(event)]

    def keep_logs(self) -> None:
        """For whoever wants to know what happened."""
        for instance in self.instances:
            if instance.log_lines:
                (instance.directory / "log").write_text("\n".join(instance.log_lines) + "\n")

    def check_logs(self) -> None:
        """Nothing broke, and nothing secret was told."""
        self.secrets |= {event.delay_id for event in self.homeserver.model.events.values()}
        for instance in self.instances:
            wrong = [line for line in instance.entries() if line["level"] in ("critical", "error") and line["event"] != "database_failed"]
            wrong += [{"traceback": line} for line in instance.log_lines if not line.startswith("{")]
            assert not wrong, f"the log of {instance.name}: {wrong[:3]}"
            text = "\n".join(instance.log_lines)
            told = [secret[:6] for secret in self.secrets if secret in text]
            assert not told, f"the log of {instance.name} tells secrets that begin with {told}"
        assert "deadlock detected" not in self.server.log

    def query(self, statement: LiteralString) -> list[Any]:
        """What is found in the database."""
        return self.server.query(self.url, statement)

    # ── one person ──

    async def schedule(self, identity: str, room: str, delay: float = 60.0) -> Stay:
        """Somebody schedules a leave event; the room is there."""
        await self.sfu.call("create_room", room)
        user = f"@{identity.partition(':')[0]}:{SERVER}"
        delay_id = await self.homeserver.call("schedule", user, MATRIX_ROOM, MEMBER, f"_{identity}", round(delay * 1000), {})
        token = tokens.join_token(SFU_KEY, SFU_SECRET, time.time(), room, identity)
        self.secrets |= {delay_id, token, token.rpartition(".")[2]}
        return Stay(identity, room, self.homeserver.model.events[delay_id], token)

    async def delegate(self, stay: Stay) -> int:
        """One try to hand the event over; the status, 0 for no answer."""
        try:
            status, body = await self.api.delegate(stay.token, SERVER, stay.event.delay_id, round(stay.event.delay * 1000))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return 0
        if status in (200, 201):
            stay.delegation, stay.verified = body["id"], body["verified"]
            stay.management_token = body.get("management_token", stay.management_token)
            self.secrets.add(stay.management_token)
        return status

    async def join(self, stay: Stay) -> None:
        """It connects, and is ACTIVE at once."""
        await self.sfu.call("join", stay.room, stay.identity, active_after=0)

    async def in_call(self, identity: str, room: str = "call", delay: float = 60.0) -> Stay:
        """Somebody delegates and joins, and the instances know both."""
        stay = await self.schedule(identity, room, delay)
        assert await self.delegate(stay) == 201
        assert stay.verified
        await self.join(stay)
        await self.present(stay, "connected")
        return stay

    async def leave(self, stay: Stay, reason: str = "CLIENT_INITIATED") -> None:
        """It disconnects for good."""
        stay.left_at = time.time()
        await self.sfu.call("leave", stay.room, stay.identity, reason=reason)

    async def present(self, stay: Stay, presence: str) -> None:
        """Wait until the instances have the person in this presence."""

        async def so() -> bool:
            try:
                status, shown = await self.api.show(stay.delegation, stay.management_token)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
                return False
            return status == 200 and shown["participant"]["presence"] == presence

        await until(so, f"{stay.identity} is {presence}")

    async def ended(self, stay: Stay, how: End = End.SENT) -> None:
        """Wait until its delayed event has ended at the homeserver, in just this way."""
        await until(lambda: stay.event.end is not End.PENDING, f"the event of {stay.identity} ends")
        assert stay.event.end is how, stay

    def asked(self, action: str, status: int | None = None) -> int:
        """How often the homeserver was asked for this, and answered so; 0: it gave no answer."""
        return sum(times for (kind, answer), times in self.homeserver.model.answers.items() if kind == action and status in (None, answer))


# ── people ──


def harms_of(stays: Sequence[Stay]) -> list[tuple[Stay, str]]:
    """What became of events and must not have: somebody was dropped, or nobody saw to the end of an event."""
    harms: list[tuple[Stay, str]] = []
    for stay in stays:
        event, at = stay.event, stay.event.ended_at
        if at is None or event.ended_by == CLIENT:
            continue
        if stay.left_at is None or at < stay.left_at:
            harms.append((stay, f"{event.end.value} while connected"))
        elif event.end is End.RAN_OUT:
            harms.append((stay, "nobody sent it"))
        elif stay.replaced_at is not None and event.end is End.SENT and at > stay.replaced_at + LEASE + 1:
            harms.append((stay, f"sent {at - stay.replaced_at:.1f} s after the person had come back"))
        elif event.end is End.CANCELLED and not any(_is_newer(other, stay) for other in stays):
            harms.append((stay, "cancelled, and nothing took its place"))
    return harms


def _is_newer(stay: Stay, other: Stay) -> bool:
    return stay.identity == other.identity and stay.event.scheduled_at > other.event.scheduled_at


class Crowd:
    """Dozens of people who come, delegate, reconnect, leave and come back, and what is true of each of their events.

    Some come and go; some stay, with events that need restarts. A client that is not answered asks again, as all clients do.
    """

    STAYING_DELAY = 20.0  # seconds: restarts from 4 on
    AWAY = (2.2, 3.0)  # seconds. Webhooks say in whole seconds when they were made: who is back sooner may be taken for somebody who just left

    def __init__(self, cluster: Cluster, *, coming: int = 20, staying: int = 6, rooms: int = 6, seed: int = 1) -> None:
        self.stays: list[Stay] = []
        self.answers: Counter[int] = Counter()  # to delegations, by status
        self._cluster = cluster
        self._coming = coming
        self._staying = staying
        self._rooms = rooms
        self._random = Random(seed)
        self._ending = asyncio.Event()
        self._lives: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[Self]:
        """They come and go for as long as the block lasts. Then all leave, and everything has to have ended in time."""
        self._lives = [asyncio.create_task(self._come_and_go(number)) for number in range(self._coming)]
        self._lives += [asyncio.create_task(self._stay(number)) for number in range(self._staying)]
        try:
            await self.going_on(self._coming)
            yield self
            await self.going_on(self._coming // 2)  # they live on after whatever it was
            self._ending.set()
            async with asyncio.timeout(GENEROUS):
                await asyncio.gather(*self._lives)
        finally:
            for life in self._lives:
                life.cancel()
            await asyncio.gather(*self._lives, return_exceptions=True)
        await self.all_ended()
        self.check()

    async def going_on(self, more: int) -> None:
        """Wait until so many more have delegated."""
        before = self._delegated()
        await until(lambda: self._must_live() and self._delegated() >= before + more, f"{more} more delegate")

    async def all_ended(self) -> None:
        """Wait until the events of all who left have ended, and the instances know it."""
        accepted = [stay for stay in self.stays if stay.delegation and not stay.there]

        def left_over() -> list[str]:
            return [str(stay) for stay in accepted if stay.event.end is End.PENDING]

        try:
            await until(lambda: not left_over(), "every event of somebody who left ends")
        except AssertionError as error:
            self.check()
            raise AssertionError(f"{error}: {left_over()[:5]}") from None
        await until(
            lambda: not self._cluster.query("SELECT 1 FROM delayed_event WHERE state <> 'done' LIMIT 1"), "the instances know that all is over"
        )

    def check(self) -> None:
        """Nobody was dropped, and nobody's event was left to run out."""
        harms = [*harms_of(self.stays), *self._misbeliefs()]
        assert not harms, f"{len(harms)} harms:\n" + "\n".join(f"{what}: {stay}\n{self._story(stay)}" for stay, what in harms[:5])

    def _story(self, stay: Stay) -> str:
        """What the instances have said of everything that the person delegated, and when."""
        mine = {other.delegation for other in self.stays if other.identity == stay.identity}
        lines = [(line, instance.name) for instance in self._cluster.instances for line in instance.entries("") if line.get("delegation") in mine]
        lines.sort(key=lambda line: str(line[0]["time"]))
        return "\n".join(f"    {line['time'][17:23]} {name} {' '.join(str(line[key]) for key in line if key in SAID)}" for line, name in lines)

    def _misbeliefs(self) -> list[tuple[Stay, str]]:
        """What the instances say of events that have ended, and is not so.

        A row has another delegation than anybody knows where a request was read that its client had given up: by an instance that had stood still.
        """
        rows = {
            delay_id: says for delay_id, *says in self._cluster.query("SELECT delay_id, delegation, outcome FROM delayed_event WHERE state = 'done'")
        }
        true = {End.SENT: {"sent", "replaced"}, End.CANCELLED: {"replaced"}}
        wrong = []
        for stay in self.stays:
            if not stay.delegation or stay.event.ended_by == CLIENT:
                continue
            delegation, outcome = rows.get(stay.event.delay_id, (stay.delegation, "nothing"))
            if delegation == stay.delegation and outcome not in true.get(stay.event.end, {"sent"}):
                wrong.append((stay, f"the database says {outcome!r}"))
        return wrong

    def _delegated(self) -> int:
        return sum(bool(stay.delegation) for stay in self.stays)

    def _must_live(self) -> bool:
        for life in self._lives:
            if life.done():
                life.result()
        return True

    # ── one of them ──

    async def _come_and_go(self, number: int) -> None:
        random, visits, last = self._random, 0, None
        await asyncio.sleep(random.uniform(0, 1))
        while not self._ending.is_set():
            visits += 1
            again = last is not None and last.delegation and random.random() < 0.5
            identity = last.identity if last is not None and again else f"guest{number}:{visits}"
            room = last.room if last is not None and again else f"room{random.randrange(self._rooms)}"
            stay = await self._come(identity, room, 60.0)
            if last is not None and again and stay.verified:
                last.replaced_at = time.time()
            for _ in range(random.randrange(3)):
                await self._pause(random.uniform(0.1, 1.0))
                self._reconnect(stay)
            await self._pause(random.uniform(0.1, 1.5))
            await self._leave(stay)
            last = stay
            await self._pause(random.uniform(*self.AWAY))

    async def _stay(self, number: int) -> None:
        stay = await self._come(f"resident{number}:0", f"room{number % self._rooms}", self.STAYING_DELAY)
        while not self._ending.is_set():
            await self._pause(self._random.uniform(1.0, 3.0))
            if self._random.random() < 0.3:
                self._reconnect(stay)
        await self._leave(stay)

    async def _come(self, identity: str, room: str, delay: float) -> Stay:
        stay = await self._cluster.schedule(identity, room, delay)
        self.stays.append(stay)
        early = self._random.random() < 0.5
        if early:
            await self._cluster.join(stay)
        while not stay.verified:
            status = await self._cluster.delegate(stay)
            self.answers[status] += 1
            assert status in (0, 200, 201, 503), f"a delegation was answered with {status}: {stay}\n{self._story(stay)}"
            if not stay.verified:
                await asyncio.sleep(self._random.uniform(0.2, 0.6))
                if stay.event.end is End.PENDING:
                    self._cluster.homeserver.model.manage(stay.event.delay_id, "restart", time.time(), CLIENT)  # it is the client's own until then
        if not early:
            await self._cluster.join(stay)
        return stay

    def _reconnect(self, stay: Stay) -> None:
        """A goodbye and a new session, or a new session that takes over; in no time, so that no look can fall between."""
        model, now = self._cluster.sfu.model, time.time()
        if self._random.random() < 0.5:
            model.leave(stay.room, stay.identity, now)
        model.join(stay.room, stay.identity, now, active_after=0)
        self._cluster.sfu.nudge()

    async def _leave(self, stay: Stay) -> None:
        await self._cluster.leave(stay, self._random.choice(["CLIENT_INITIATED", "PARTICIPANT_REMOVED"]))

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), seconds)


@asynccontextmanager
async def open_cluster(
    directory: Path,
    server: Server,
    *,
    url: str | None = None,
    count: int = 3,
    homeserver: HomeserverModel | None = None,
    apart: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    **changes: Any,
) -> AsyncIterator[Cluster]:
    """So many instances, all started, on the database at `url`, or an empty one of `server`; `changes` are laid over their configuration.

    `apart`: by instance, what is changed for it alone.
    """
    url = url or server.create_database()
    balancer = Balancer(Random(1), lambda *what: cluster.deliver(*what))
    async with AsyncExitStack() as opened:
        sfu = await opened.enter_async_context(SandboxSfu(SfuModel({SFU_KEY: SFU_SECRET}, seed=1)))
        model = homeserver or HomeserverModel(SERVER, seed=1, limit=None)
        cluster = Cluster(directory, server, url, sfu, await opened.enter_async_context(SandboxHomeserver(model)), balancer, changes, apart)
        await opened.enter_async_context(balancer)
        sfu.model.urls = [f"{balancer.url}/webhooks/livekit"]
        cluster.http = await opened.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=GENEROUS)))
        cluster.api = DelegateApi(balancer.url, cluster.http)
        for name in NAMES[:count]:
            cluster.add(name)
        try:
            await cluster.start()
            yield cluster
        finally:
            await cluster.stop()
            cluster.keep_logs()
        cluster.check_logs()
