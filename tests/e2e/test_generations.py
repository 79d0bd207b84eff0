"""The four generations of the management API, from a client's delegation to the leave event: the daemon as a process, the sandbox's homeserver."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from sfu_delegate.demo.daemon import DelegateApi
from sfu_delegate.demo.matrix import CALL_MEMBER
from sfu_delegate.demo.processes import until
from sfu_delegate.demo.sfu import KEY, SECRET
from sfu_delegate.demo.stand_in import StandIn
from sfu_delegate.sandbox.homeserver import DelayedEvent, End
from sfu_delegate.sandbox.server import SandboxSfu
from sfu_delegate.sandbox.sfu import SfuModel
from sfu_delegate.sandbox.tokens import join_token

from tests.e2e.daemon_process import config_for, running_daemon

pytestmark = pytest.mark.asyncio(loop_scope="module")

GENERATIONS = "ABCD"
DELAY_MS = 5_000
WITHIN = 20.0


@dataclass(frozen=True, slots=True)
class Delegated:
    """One participant, alone in a room on the SFU, and what its delegation was answered."""

    homeserver: StandIn
    livekit_room: str
    event: DelayedEvent
    status: int
    answer: dict[str, Any]

    async def until_ended(self) -> End:
        """How the event has ended at the homeserver, as soon as it has."""

        async def ended() -> End | None:
            return self.event.end if self.event.end is not End.PENDING else None

        return await until(ended, WITHIN, "the delayed event has ended")

    @property
    def membership(self) -> dict[str, Any]:
        """The content of its membership in the room."""
        assert self.event.state_key is not None
        return self.homeserver.model.state[self.event.room][CALL_MEMBER, self.event.state_key].content


@dataclass(frozen=True, slots=True)
class World:
    """One daemon, one SFU, a homeserver of each generation, and on each of them somebody who is in a call."""

    sfu: SandboxSfu
    api: DelegateApi
    delegated: dict[str, Delegated]


async def delegate(sfu: SandboxSfu, api: DelegateApi, homeserver: StandIn, *, on_disconnect: str = "send") -> Delegated:
    """A new user joins a call and delegates."""
    name = f"{on_disconnect}s"
    user = await homeserver.register(name)
    room = await homeserver.call_room([user])
    delay_id = await homeserver.client.schedule_leave(user, room, DELAY_MS)
    await homeserver.client.announce(user, room)
    # In the original text, only a token opens the management endpoint, and a scoped one is what a client gives away.
    scoped = homeserver.model.scoped_token(user.user_id, delay_id) if homeserver.model.generations == "A" else None
    livekit_room = f"{homeserver.server_name}-{on_disconnect}"
    token = join_token(KEY, SECRET, time.time(), livekit_room, name)
    await sfu.call("join_with_token", token)
    status, answer = await api.delegate(token, homeserver.server_name, delay_id, DELAY_MS, on_disconnect=on_disconnect, token=scoped)
    return Delegated(homeserver, livekit_room, homeserver.model.events[delay_id], status, answer)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Started once, and all calls begin at the same time: only the homeservers differ."""
    async with AsyncExitStack() as stack:
        sfu = await stack.enter_async_context(SandboxSfu(SfuModel({KEY: SECRET}, auto_create=True)))
        homeservers = {
            generation: await stack.enter_async_context(StandIn(server_name=f"{generation.lower()}.test", generations=generation))
            for generation in GENERATIONS
        }
        config = config_for(sfu.url, [(homeserver.server_name, homeserver.url) for homeserver in homeservers.values()])
        daemon = await stack.enter_async_context(running_daemon(config, tmp_path_factory.mktemp("daemon")))
        await sfu.call("urls", urls=[daemon.webhook_url])
        http = await stack.enter_async_context(aiohttp.ClientSession())
        api = DelegateApi(daemon.public_url, http)
        delegated = await asyncio.gather(*(delegate(sfu, api, homeserver) for homeserver in homeservers.values()))
        yield World(sfu, api, dict(zip(homeservers, delegated, strict=True)))


@pytest.mark.parametrize("generation", GENERATIONS)
async def test_restart_and_send_arrive_in_every_generation(world: World, generation: str) -> None:
    """The delayed event is restarted during the call, and sent when its participant was removed."""
    one = world.delegated[generation]
    assert (one.status, one.answer.get("verified")) == (201, True), one.answer

    async def restarted() -> bool:
        return len(one.event.restarted_at) >= 2

    await until(restarted, WITHIN, "the event was restarted once more than to check it")
    assert one.event.end is End.PENDING
    await world.sfu.call("remove", one.livekit_room, "sends")
    assert await one.until_ended() is End.SENT
    assert one.membership == {}


async def test_an_event_to_be_cancelled_is_cancelled(world: World) -> None:
    """A client that asked for `cancel` gets that at its disconnect, and its membership stays."""
    one = await delegate(world.sfu, world.api, world.delegated["C"].homeserver, on_disconnect="cancel")
    assert one.status == 201, one.answer

    async def connected() -> bool:
        _, shown = await world.api.show(one.answer["id"], one.answer["management_token"])
        return bool(shown["participant"]["presence"] == "connected")

    await until(connected, WITHIN, "the daemon has heard of the join")
    await world.sfu.call("remove", one.livekit_room, "cancels")
    assert await one.until_ended() is End.CANCELLED
    assert one.membership != {}
