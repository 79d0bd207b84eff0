"""A whole daemon in this process, between a stand-in SFU and a stand-in homeserver, all three on loopback.

The daemon's times are made short by its configuration, so nothing here may say how long something takes: tests wait for effects. Whatever a test
does, at its end nothing secret may stand in the log, in the error answers or in the metrics; that is checked for each of them.
"""

import asyncio
import inspect
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families
from sfu_delegate.config import Config, from_mapping
from sfu_delegate.daemon.serve import Daemon
from sfu_delegate.delegation.model import Input
from sfu_delegate.demo.processes import free_ports
from sfu_delegate.engine import Step
from sfu_delegate.observe import logs
from sfu_delegate.sandbox import tokens
from sfu_delegate.sandbox.homeserver import DelayedEvent, End, HomeserverModel
from sfu_delegate.sandbox.server import SandboxHomeserver, SandboxSfu
from sfu_delegate.sandbox.sfu import SfuModel
from sfu_delegate.store.base import StoreUnavailable

from tests.integration.databases import Database, SqliteDatabase, database_of

T = TypeVar("T")

SERVER = "hs.test"
MATRIX_ROOM = "!call:hs.test"
MEMBER = "org.matrix.msc3401.call.member"
SFU_KEY = "devkey"
SFU_SECRET = "secret-of-the-sfu-that-nobody-else-may-see"
GENEROUS = 30.0  # seconds until a test gives up waiting; nothing should come near

_CHECKED = ("CLIENT_INITIATED", "CONNECTION_TIMEOUT", "SIGNAL_CLOSE", "JOIN_FAILURE", "SERVER_SHUTDOWN", "DUPLICATE_IDENTITY", "MISSING", "OTHER")

QUICK: Mapping[str, Any] = {
    "departures": {reason: {"look_after": "100ms"} for reason in _CHECKED},
    "presence": {
        "join_timeout": "20s",
        "first_looks": ["100ms", "300ms", "1s", "3s"],
        "unseen_departure": "300ms",
        "look_again": "200ms",
        "look_again_most": "1s",
        "look_gap": "50ms",
        "settled": "100ms",
    },
    "actions": {"retry_first": "100ms", "retry_most": "1s", "vanished_wait": "500ms"},
    "delegations": {"min_delay": "2s", "verify_timeout": "10s"},
}
"""What makes the daemon quick. The rules are the same."""


def merged(*mappings: Mapping[str, Any]) -> dict[str, Any]:
    """The mappings laid over each other, the later on top."""
    result: dict[str, Any] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            below = result.get(key)
            result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


async def found(look: Callable[[], Awaitable[T | None]], what: str, within: float = GENEROUS) -> T:
    """Look again and again until there is something, and return it. Fails with `what` after a generous time."""
    deadline = time.monotonic() + within
    while True:
        value = await look()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {within:g} seconds")
        await asyncio.sleep(0.02)


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until the condition, or what it is awaited for, is true."""

    async def look() -> bool:
        value = condition()
        return bool(await value if inspect.isawaitable(value) else value)

    await found(look, what)


@contextmanager
def captured_log(level: str = "debug") -> Iterator[io.StringIO]:
    """The whole log in memory, one JSON object a line; afterwards the process's logging is as it was."""
    root = logging.getLogger()
    before, before_level = list(root.handlers), root.level
    stream = io.StringIO()
    logs.configure(level=level, format="json", stream=stream)
    try:
        yield stream
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(before_level)
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()


@dataclass(frozen=True)
class Participant:
    """Somebody with a scheduled delayed event and the access token that it joins with."""

    identity: str
    room: str
    delay_id: str
    delay_ms: int
    token: str


@dataclass(frozen=True)
class Answer:
    """An HTTP answer of the daemon."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object in it."""
        value: dict[str, Any] = json.loads(self.text)
        return value


@dataclass
class Site:
    """The three of them, and what tests do with them. Made by `open_site`."""

    directory: Path
    sfu: SandboxSfu
    homeserver: SandboxHomeserver
    http: aiohttp.ClientSession
    log: io.StringIO
    changes: Mapping[str, Any]
    of_homeserver: dict[str, Any] = field(default_factory=dict)  # what the configuration says of it besides its URL
    secrets: set[str] = field(default_factory=lambda: {SFU_SECRET})
    said: list[str] = field(default_factory=list)  # every error answer and every exposition of the metrics
    port: int = field(default_factory=lambda: free_ports(1)[0])
    running: bool = False
    daemon: Daemon = field(init=False)
    database: Database = field(init=False)

    def __post_init__(self) -> None:
        self.database = database_of(self.directory)

    # ── the daemon's life ──

    @property
    def file(self) -> Path:
        """The file of its database, in tests that are about SQLite."""
        assert isinstance(self.database, SqliteDatabase)
        return self.database.path

    def mapping(self) -> dict[str, Any]:
        """The configuration as a file would have it."""
        own = {
            "listen": {"port": self.port},
            "admin": {"port": 0},
            **self.database.settings,
            "sfus": {"main": {"url": self.sfu.url.replace("http", "ws"), "keys": {SFU_KEY: SFU_SECRET}}},
            "homeservers": [{"name": SERVER, "url": self.homeserver.url, "federation_url": self.homeserver.url, **self.of_homeserver}],
        }
        return merged(QUICK, own, self.changes)

    def config(self) -> Config:
        """The configuration."""
        return from_mapping(self.mapping())

    async def start(self) -> None:
        """Start the daemon, on the same port and the same database as before."""
        self.daemon = Daemon(self.config(), self.config)
        await self.daemon.start()
        self.running = True
        self.port = self.daemon.public_port
        self.sfu.model.urls = [f"{self.url}/webhooks/livekit"]

    async def stop(self) -> None:
        """As SIGTERM does."""
        self.running = False
        await self.daemon.stop()

    @property
    def url(self) -> str:
        """The public listener."""
        return f"http://127.0.0.1:{self.port}"

    # ── people ──

    async def participant(
        self, identity: str = "alice", room: str = "call", *, delay_ms: int = 40_000, user: str | None = None, server: str = SERVER
    ) -> Participant:
        """Somebody who has scheduled a leave event; the room is there."""
        user = user or f"@{identity}:{server}"
        await self.sfu.call("create_room", room)
        delay_id = await self.homeserver.call("schedule", user, MATRIX_ROOM, MEMBER, f"_{identity}", delay_ms, {})
        token = tokens.join_token(SFU_KEY, SFU_SECRET, time.time(), room, identity)
        self.secrets |= {delay_id, token, token.rpartition(".")[2]}
        return Participant(identity, room, delay_id, delay_ms, token)

    async def join(self, who: Participant) -> str:
        """It connects, and is ACTIVE at once. Returns its sid."""
        return str(await self.sfu.call("join", who.room, who.identity, active_after=0))

    async def leave(self, who: Participant, reason: str = "CLIENT_INITIATED") -> None:
        """It disconnects."""
        await self.sfu.call("leave", who.room, who.identity, reason=reason)

    def event(self, who: Participant) -> DelayedEvent:
        """Its delayed event, as the homeserver has it."""
        return self.homeserver.model.events[who.delay_id]

    async def ended(self, who: Participant, how: End = End.SENT) -> DelayedEvent:
        """Wait until its delayed event has ended at the homeserver, in just this way."""
        event = self.event(who)
        await until(lambda: event.end is not End.PENDING, f"the event of {who.identity} ends")
        assert event.end is how
        return event

    async def restarted(self, who: Participant, times: int = 1) -> None:
        """Wait until its delayed event was restarted that often."""
        await until(lambda: len(self.event(who).restarted_at) >= times, f"the event of {who.identity} is restarted")

    # ── the API ──

    async def ask(self, method: str, path: str, *, token: str | None = None, **given: Any) -> Answer:
        """One request to the public listener."""
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        async with self.http.request(method, self.url + path, headers=headers | given.pop("headers", {}), **given) as response:
            answer = Answer(response.status, dict(response.headers), await response.text())
        if answer.status >= 400:
            self.said.append(answer.text)
        elif token := (json.loads(answer.text) or {}).get("management_token"):
            self.secrets.add(token)
        return answer

    async def delegate(self, who: Participant, *others: Participant, on_disconnect: str | None = None, **more: Any) -> Answer:
        """It delegates its delayed event, and those of `others`."""
        extra = {"on_disconnect": on_disconnect} if on_disconnect else {}
        events = [{"delay_id": one.delay_id, "delay_ms": one.delay_ms, **extra} for one in (who, *others)]
        body = {"homeserver": SERVER, "delayed_events": events, **more}
        return await self.ask("POST", "/v1/delegations", token=who.token, json=body)

    async def delegated(self, who: Participant, *others: Participant, **more: Any) -> dict[str, Any]:
        """It delegates, and that is taken and verified. Returns the answer's body."""
        answer = await self.delegate(who, *others, **more)
        assert answer.status == 201, answer.text
        assert answer.body["verified"] is True
        return answer.body

    async def in_call(self, who: Participant) -> dict[str, Any]:
        """It delegates and joins, and the daemon knows both. Returns the delegation."""
        given = await self.delegated(who)
        await self.join(who)
        await self.present(given, "connected")
        return given

    async def show(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the daemon knows of a delegation."""
        answer = await self.ask("GET", f"/v1/delegations/{given['id']}", token=given["management_token"])
        assert answer.status == 200, answer.text
        return answer.body

    async def present(self, given: Mapping[str, Any], presence: str) -> dict[str, Any]:
        """Wait until the daemon has the participant in this presence."""

        async def so() -> dict[str, Any] | None:
            shown = await self.show(given)
            return shown if shown["participant"]["presence"] == presence else None

        return await found(so, f"the participant is {presence}")

    async def done(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Wait until the daemon has done with a delegation."""

        async def so() -> dict[str, Any] | None:
            shown = await self.show(given)
            return shown if shown["state"] == "done" else None

        return await found(so, "the delegation is done")

    async def outcomes(self, given: Mapping[str, Any]) -> list[str]:
        """How the delayed events of a delegation ended, when all have."""
        return [event["outcome"] for event in (await self.done(given))["delayed_events"]]

    # ── what operators see ──

    async def admin(self, path: str) -> Answer:
        """One request to the admin listener."""
        async with self.http.get(f"http://127.0.0.1:{self.daemon.admin_port}{path}") as response:
            answer = Answer(response.status, dict(response.headers), await response.text())
        if path == "/metrics" or answer.status >= 400:
            self.said.append(answer.text)
        return answer

    async def count(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        exposition = (await self.admin("/metrics")).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(exposition)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def lines(self, event: str = "") -> list[dict[str, Any]]:
        """The lines of the log, or those of one event."""
        lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [line for line in lines if not event or line["event"] == event]

    def stored(self) -> bytes:
        """Every byte of the database, but for the encryption key's."""
        return self.database.stored()

    def check_secrets(self) -> None:
        """Nothing that must stay secret was told to anybody."""
        self.secrets |= self.database.secrets
        for place, text in (("the log", self.log.getvalue()), ("an answer", "\n".join(self.said)), ("the database's log", self.database.said())):
            told = [secret[:6] for secret in self.secrets if secret in text]
            assert not told, f"{place} tells secrets that begin with {told}"


@asynccontextmanager
async def open_site(directory: Path, *, started: bool = True, homeserver: HomeserverModel | None = None, **changes: Any) -> AsyncIterator[Site]:
    """A daemon with its SFU and its homeserver, which limits nobody; `changes` are laid over the configuration."""
    model = homeserver or HomeserverModel(SERVER, seed=1, limit=None)
    with captured_log() as log:
        async with (
            SandboxSfu(SfuModel({SFU_KEY: SFU_SECRET}, seed=1)) as sfu,
            SandboxHomeserver(model) as server,
            aiohttp.ClientSession() as http,
        ):
            site = Site(directory, sfu, server, http, log, changes)
            if started:
                await site.start()
            try:
                yield site
            finally:
                if site.running:
                    await site.stop()
        site.check_secrets()


@contextmanager
def broken_database(site: Site) -> Iterator[None]:
    """Every transaction of the daemon fails, as on a full disk."""
    store = site.daemon.engine.store

    def fail(_: object, **more: object) -> Any:
        raise StoreUnavailable("The database failed: database or disk is full.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "atomically", fail)
        yield


@contextmanager
def inputs_seen(site: Site) -> Iterator[list[Input]]:
    """What the engine is given."""
    engine = site.daemon.engine
    step = engine.step
    seen: list[Input] = []

    def watched(inputs: Sequence[Input], now: float, **more: Any) -> Step:
        seen.extend(inputs)
        return step(inputs, now, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", watched)
        yield seen
