"""Hears webhooks where no daemon does: at the daemon's own public listener, for as long as the check takes.

It must acknowledge none but those of the rooms that the check has made: for all others it answers 503, and LiveKit tries again for 15 s.
"""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Self

from aiohttp import web

from sfu_delegate.api.webhooks import PATH, PATH_DEPLOYED
from sfu_delegate.config import Config
from sfu_delegate.daemon import parts
from sfu_delegate.livekit import webhook
from sfu_delegate.livekit.keys import KeyRing


@dataclass(slots=True)
class Room:
    """What came of one room."""

    came: dict[str, tuple[float, str]] = field(default_factory=dict)  # by event: when, in Unix seconds, and the SFU whose key has signed it
    refused: Counter[str] = field(default_factory=Counter)  # by reason
    misdirected: str = ""  # a path to which it came, and where the daemon hears none
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Ear:
    """One listener for all SFUs. `clock` gives Unix seconds."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._clock = clock
        self._keys = KeyRing(parts.keys(config))
        self._paths: Collection[str] = {PATH, *(prefix + PATH_DEPLOYED for prefix in ("", *config.matrixrtc_paths))}
        self._rooms: dict[str, Room] = {}
        self._runner: web.AppRunner | None = None

    async def open(self) -> Self:
        """Listen. Raises OSError where that cannot be."""
        listen = self._config.listen
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind((listen.host, listen.port))
        except OSError:
            sock.close()
            raise
        app = web.Application(client_max_size=self._config.limits.webhook_body)
        app.router.add_route("*", "/{path:.*}", self._hear)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.SockSite(self._runner, sock).start()
        return self

    async def close(self) -> None:
        """Listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()

    def await_room(self, name: str) -> Room:
        """From now on the webhooks of this room are kept."""
        return self._rooms.setdefault(name, Room())

    async def _hear(self, request: web.Request) -> web.Response:
        try:
            body = await request.read()
            named = webhook.decode(body)
        except (webhook.WebhookRefused, web.HTTPException):
            return _not_for_us()
        room = self._rooms.get(named.room)
        if room is None:
            return _not_for_us()
        try:
            if request.path not in self._paths:
                room.misdirected = request.path
                return web.Response(status=404)
            try:
                key = webhook.verify(request.headers.get("Authorization"), body, self._keys, self._clock())
            except webhook.WebhookRefused as refused:
                room.refused[refused.reason.value] += 1
                return web.Response(status=401)
            room.came.setdefault(named.event, (self._clock(), key.sfu))
            return web.Response()
        finally:
            room.news.set()


def _not_for_us() -> web.Response:
    return web.Response(status=503, text="No sfu-delegate runs; its doctor listens here for a moment.\n")
