"""The SFU of the demonstration: the sandbox's stand-in, behind the acts that a real one can play, too; and the ear that hears its webhooks."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from aiohttp import web

from sfu_delegate.demo.processes import HOST, free_ports
from sfu_delegate.sandbox.server import SandboxSfu
from sfu_delegate.sandbox.sfu import SfuModel

KEY, SECRET = "devkey", "a-secret-that-is-at-least-32-bytes-long"


class Told(NamedTuple):
    """What one webhook told about a participant."""

    at: float  # Unix seconds, when it arrived
    event: str
    identity: str
    reason: str


class CallSfu(Protocol):
    """One call on an SFU. `identity` is of somebody who joined."""

    title: str
    url: str

    async def join(self, identity: str, token: str) -> None:
        """A client connects with its access token."""

    async def talk(self, identity: str) -> None:
        """The client, which is connected, publishes its microphone."""

    async def leave(self, identity: str) -> None:
        """The client says goodbye to the SFU."""

    async def reconnect(self, identity: str, token: str) -> None:
        """The client opens a new session, which takes the old one's place."""

    async def crash(self, identity: str) -> None:
        """The client is gone without a word."""

    async def remove(self, identity: str) -> None:
        """A moderator removes the participant."""

    async def close_tab(self, identity: str) -> None:
        """The tab is closed while the network is away: its goodbye gets lost, its connection breaks."""


class StandInSfu:
    """The sandbox's SFU. Whoever crashes is noticed after some 20 s, as LiveKit does."""

    title = "the stand-in SFU"

    def __init__(self, room: str, webhook_urls: Sequence[str]) -> None:
        self._room = room
        self._sfu = SandboxSfu(SfuModel({KEY: SECRET}, webhook_urls, auto_create=True))

    async def __aenter__(self) -> Self:
        await self._sfu.__aenter__()
        self.url = self._sfu.url.replace("http://", "ws://")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._sfu.__aexit__(kind, error, trace)

    async def join(self, identity: str, token: str) -> None:  # noqa: ARG002 - the token says who it is
        """See `CallSfu`."""
        await self._sfu.call("join_with_token", token)

    async def talk(self, identity: str) -> None:
        """See `CallSfu`."""
        await self._sfu.call("publish_track", self._room, identity)

    async def leave(self, identity: str) -> None:
        """See `CallSfu`."""
        await self._sfu.call("leave", self._room, identity)

    async def reconnect(self, identity: str, token: str) -> None:  # noqa: ARG002 - the token says who it is
        """See `CallSfu`."""
        await self._sfu.call("join_with_token", token)

    async def crash(self, identity: str) -> None:
        """See `CallSfu`."""
        await self._sfu.call("vanish", self._room, identity)

    async def remove(self, identity: str) -> None:
        """See `CallSfu`."""
        await self._sfu.call("remove", self._room, identity)

    async def close_tab(self, identity: str) -> None:
        """See `CallSfu`."""
        await self._sfu.call("leave", self._room, identity, reason="SIGNAL_CLOSE")


class Ear:
    """A second receiver of the SFU's webhooks, so that people see what the daemon hears. It believes everything: it is on loopback and shows only."""

    def __init__(self, on_told: Callable[[Told], None]) -> None:
        self._on_told = on_told
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/", self._hear)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        self._open.push_async_callback(runner.cleanup)
        [port] = free_ports(1)
        await web.TCPSite(runner, HOST, port).start()
        self.url = f"http://{HOST}:{port}/"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._open.aclose()

    async def _hear(self, request: web.Request) -> web.Response:
        at = time.time()
        webhook: dict[str, Any] = json.loads(await request.read())
        participant = webhook.get("participant", {})
        self._on_told(Told(at, webhook.get("event", ""), participant.get("identity", ""), participant.get("disconnectReason", "")))
        return web.Response()
