"""The stand-in homeserver of the sandbox, with what the demonstration also asks of a real one."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import aiohttp

from sfu_delegate.demo.matrix import Account, ClientServer
from sfu_delegate.sandbox.homeserver import HomeserverModel
from sfu_delegate.sandbox.server import SandboxHomeserver

REQUEST_TIMEOUT = 10.0


class StandIn:
    """Has the methods of `synapse.Synapse`. `settings` are those of `HomeserverModel`."""

    title = "the stand-in homeserver"

    def __init__(self, *, server_name: str = "hs.test", **settings: Any) -> None:
        self.server_name = server_name
        self.model = HomeserverModel(server_name, **settings)
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opening:
            server = await opening.enter_async_context(SandboxHomeserver(self.model))
            self.url = server.url
            session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT), cookie_jar=aiohttp.DummyCookieJar())
            self.client = ClientServer(self.url, await opening.enter_async_context(session))
            self._server = server
            self._open = opening.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._open.aclose()

    async def register(self, name: str) -> Account:
        """A new user with one device."""
        token = str(await self._server.call("register", name))
        return Account(f"@{name}:{self.server_name}", "SANDBOX", token)

    async def call_room(self, members: Sequence[Account]) -> str:
        """A room for a call. The stand-in lets everybody in."""
        return f"!call-of-{len(members)}:{self.server_name}"
