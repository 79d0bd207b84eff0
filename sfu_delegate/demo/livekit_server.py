"""A real livekit-server on loopback, where there is one on PATH, and real participants, each a process of its own."""

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import yaml

from livekit import api
from sfu_delegate.demo.processes import HOST, Child, free_ports, until
from sfu_delegate.demo.sfu import KEY, SECRET

TITLE = "livekit-server"
STARTS_WITHIN = 30.0  # seconds
CONNECTS_WITHIN = 30.0


def binary() -> str | None:
    """Where livekit-server is, if it and LiveKit's SDK for participants are installed."""
    found = shutil.which("livekit-server")
    return found if found is not None and importlib.util.find_spec("livekit.rtc") is not None else None


class LiveKitSfu:
    """One call on a real livekit-server. Raises Died or NeverHappened where something does not start."""

    title = TITLE

    def __init__(self, path: str, room: str, webhook_urls: Sequence[str], directory: Path) -> None:
        self._path = path
        self._room = room
        self._webhook_urls = list(webhook_urls)
        self._directory = directory
        self._clients: dict[str, Child] = {}
        self._count = 0
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        port, tcp_port, udp_port = free_ports(3)
        self.url = f"ws://{HOST}:{port}"
        config: dict[str, Any] = {
            "port": port,
            "bind_addresses": [HOST],
            "rtc": {"tcp_port": tcp_port, "udp_port": udp_port, "use_external_ip": False, "node_ip": HOST, "enable_loopback_candidate": True},
            "keys": {KEY: SECRET},
            "webhook": {"api_key": KEY, "urls": self._webhook_urls},
            "room": {"auto_create": True},
            "logging": {"level": "warn"},
        }
        file = self._directory / "livekit.yaml"
        file.touch(mode=0o600)
        file.write_text(yaml.safe_dump(config))
        async with AsyncExitStack() as opening:
            log = self._directory / "livekit.log"
            server = await Child.start("livekit-server", [self._path, "--config", str(file)], directory=self._directory, output=log)
            # Its first SIGTERM only drains, and there is nobody to wait for.
            opening.push_async_callback(server.kill)
            opening.push_async_callback(self._stop_clients)
            http = await opening.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)))
            await until(lambda: _answers(server, http, f"http://{HOST}:{port}"), STARTS_WITHIN, "an answer of livekit-server")
            self._api = await opening.enter_async_context(api.LiveKitAPI(self.url, KEY, SECRET))
            self._open = opening.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._open.aclose()

    async def join(self, identity: str, token: str) -> None:
        """See `CallSfu`."""
        self._count += 1
        output = self._directory / f"participant-{self._count}.log"
        command = [sys.executable, "-m", "sfu_delegate.demo.participant", self.url]
        client = await Child.start(identity, command, directory=self._directory, output=output, commanded=True)
        before = self._clients.get(identity)
        self._clients[identity] = client
        client.tell(token)

        async def connected() -> bool:
            client.must_run()
            return "connected" in client.tail().splitlines()

        await until(connected, CONNECTS_WITHIN, f"{identity} is connected to livekit-server")
        if before is not None:
            await before.stop()

    async def talk(self, identity: str) -> None:
        """See `CallSfu`: the participants do it by themselves."""

    async def leave(self, identity: str) -> None:
        """See `CallSfu`."""
        self._clients[identity].tell("goodbye")

    async def reconnect(self, identity: str, token: str) -> None:
        """See `CallSfu`."""
        await self.join(identity, token)

    async def crash(self, identity: str) -> None:
        """See `CallSfu`."""
        await self._clients[identity].kill()

    async def remove(self, identity: str) -> None:
        """See `CallSfu`."""
        await self._api.room.remove_participant(api.RoomParticipantIdentity(room=self._room, identity=identity))

    async def close_tab(self, identity: str) -> None:
        """See `CallSfu`: for the SFU, a tab that is closed without a network is a crash."""
        await self._clients[identity].kill()

    async def _stop_clients(self) -> None:
        for client in self._clients.values():
            await client.kill()


async def _answers(server: Child, http: aiohttp.ClientSession, url: str) -> bool:
    server.must_run()
    try:
        async with http.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
