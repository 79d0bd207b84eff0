"""One call, end to end: the sandbox's SFU, the daemon as a process, and a homeserver with its users; what each of them says can be waited for."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from sfu_delegate.demo.daemon import DelegateApi, metric
from sfu_delegate.demo.matrix import Account, Member, running_since
from sfu_delegate.demo.processes import until
from sfu_delegate.demo.sfu import KEY, SECRET
from sfu_delegate.demo.stand_in import StandIn
from sfu_delegate.demo.synapse import Synapse
from sfu_delegate.sandbox.server import SandboxSfu
from sfu_delegate.sandbox.sfu import SfuModel
from sfu_delegate.sandbox.tokens import join_token

from tests.e2e.daemon_process import DaemonProcess, config_for, running_daemon

ROOM = "call"
HOUR_MS = 3_600_000
WITHIN = 30.0  # seconds: the deadline of everything that is waited for


@dataclass(slots=True)
class Client:
    """One participant as its client sees it."""

    account: Account
    token: str = field(repr=False)  # LiveKit's access token
    delay_ms: int
    delay_id: str = field(default="", repr=False)
    delegation: str = ""
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """On the SFU."""
        return f"{self.account.user_id}:{self.account.device_id}"


class MatrixCall:
    """One call as the homeserver and the daemon know it, whatever the SFU is."""

    def __init__(self, homeserver: Synapse | StandIn, daemon: DaemonProcess, http: aiohttp.ClientSession) -> None:
        self.homeserver = homeserver
        self.daemon = daemon
        self.http = http
        self.room_id = ""

    async def open(self, *accounts: Account) -> None:
        """A room for the call, with everybody in it."""
        self.room_id = await self.homeserver.call_room(accounts)

    async def schedule(self, client: Client) -> str:
        """The client schedules its leave event anew."""
        client.delay_id = await self.homeserver.client.schedule_leave(client.account, self.room_id, client.delay_ms)
        return client.delay_id

    async def until(self, look: Callable[[], Awaitable[Any]], what: str, within: float = WITHIN) -> Any:
        """The first good result of `look`, or NeverHappened."""
        return await until(look, within, what)

    async def member(self, client: Client) -> Member:
        """The client's call membership in the room now."""
        members = await self.homeserver.client.members(client.account, self.room_id)
        return members[client.account.member_key]

    async def has_left(self, client: Client, within: float = WITHIN) -> Member:
        """The client's leave event, as soon as it is in the room."""

        async def look() -> Member | None:
            member = await self.member(client)
            return None if member.in_call else member

        return await until(look, within, f"the leave event of {client.account.user_id} is in the room")

    async def running_since(self, client: Client) -> float | None:
        """When the countdown of the client's delayed event began, as the homeserver tells; None when it knows no such event."""
        event = (await self.homeserver.client.delayed_events(client.account)).get(client.delay_id)
        return None if event is None else running_since(event)

    async def metric(self, name: str, *containing: str) -> float:
        """The sum of a metric's samples, or only of those whose labels contain all these texts, such as `outcome="sent"`."""
        return await metric(self.http, self.daemon.admin_url, name, *containing)


class Call(MatrixCall):
    """What a test plays with, where the SFU is the sandbox's."""

    def __init__(self, homeserver: Synapse | StandIn, sfu: SandboxSfu, daemon: DaemonProcess, http: aiohttp.ClientSession) -> None:
        super().__init__(homeserver, daemon, http)
        self.sfu = sfu
        self.api = DelegateApi(daemon.public_url, http)

    # ── what clients do ──

    async def open(self, *accounts: Account) -> None:
        """A room for the call, with everybody in it, in Matrix and on the SFU."""
        await super().open(*accounts)
        await self.sfu.call("create_room", ROOM)

    def client(self, account: Account, delay_ms: int = HOUR_MS) -> Client:
        """A client that has an access token and has done nothing yet."""
        identity = f"{account.user_id}:{account.device_id}"
        return Client(account, join_token(KEY, SECRET, time.time(), ROOM, identity), delay_ms)

    async def delegate(self, client: Client, *, token: str | None = None) -> tuple[int, dict[str, Any]]:
        """The client delegates its present leave event."""
        status, answer = await self.api.delegate(client.token, self.homeserver.server_name, client.delay_id, client.delay_ms, token=token)
        if status in (200, 201):
            client.delegation, client.answer = answer["id"], answer
        return status, answer

    async def join(self, account: Account, delay_ms: int = HOUR_MS, *, token: str | None = None) -> Client:
        """All that a client does to be in the call, and the daemon has taken over its leave event and sees it connected."""
        client = self.client(account, delay_ms)
        await self.schedule(client)
        await self.homeserver.client.announce(account, self.room_id)
        await self.sfu.call("join_with_token", client.token)
        status, answer = await self.delegate(client, token=token)
        assert status == 201, answer
        await self.shows(client, lambda shown: shown["verified"] and shown["participant"]["presence"] == "connected", "connected and verified")
        return client

    async def leave(self, client: Client, reason: str = "CLIENT_INITIATED") -> None:
        """The SFU lets the client go."""
        await self.sfu.call("leave", ROOM, client.identity, reason=reason)

    # ── what is waited for ──

    async def shows(self, client: Client, good: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The client's delegation, as soon as the daemon shows it like this."""

        async def look() -> dict[str, Any] | None:
            status, shown = await self.api.show(client.delegation, client.token)
            assert status == 200, shown
            return shown if good(shown) else None

        shown: dict[str, Any] = await until(look, WITHIN, f"the daemon shows the delegation as {what}")
        return shown

    async def ended(self, client: Client) -> str:
        """How the client's delayed event ended, as soon as it has."""
        shown = await self.shows(client, lambda shown: shown["delayed_events"][0]["outcome"] is not None, "ended")
        return str(shown["delayed_events"][0]["outcome"])


@asynccontextmanager
async def running_call(homeserver: Synapse | StandIn, directory: Path, **sections: Any) -> AsyncIterator[Call]:
    """A daemon that knows this homeserver and an SFU of its own. `sections` of the configuration go over the usual ones."""
    async with SandboxSfu(SfuModel({KEY: SECRET})) as sfu, aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WITHIN)) as http:
        config = config_for(sfu.url, [(homeserver.server_name, homeserver.url)]) | sections
        async with running_daemon(config, directory) as daemon:
            await sfu.call("urls", urls=[daemon.webhook_url])
            yield Call(homeserver, sfu, daemon, http)
