"""The whole way, from a client's delay_id to the leave event in a real room: a real Synapse, the daemon as a process, the sandbox's SFU."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from sfu_delegate.demo.matrix import Account
from sfu_delegate.demo.synapse import Synapse

from tests.e2e.call import ROOM, Call, Client, running_call

pytestmark = [pytest.mark.synapse, pytest.mark.asyncio(loop_scope="session")]

SHORT_MS = 5_000
LIMITED = ("sfu_delegate_actions_total", 'outcome="limited"')
DELEGATED = "sfu_delegate_delegated_events"


@pytest_asyncio.fixture(loop_scope="session")
async def call(synapse: Synapse, tmp_path: Path) -> AsyncIterator[Call]:
    """A daemon and an SFU of this test's own."""
    async with running_call(synapse, tmp_path / "daemon") as running:
        yield running


async def users(synapse: Synapse, count: int) -> list[Account]:
    """New users, whom no other test knows."""
    return [await synapse.register(f"user-{uuid.uuid4().hex[:8]}") for _ in range(count)]


async def test_restarted_while_connected_and_sent_when_gone(call: Call, synapse: Synapse) -> None:
    """A delegated event is restarted while its participant is connected, and sent when it left; nobody else is touched."""
    anna, ben = await users(synapse, 2)
    await call.open(anna, ben)
    stays, leaves = await call.join(anna), await call.join(ben, SHORT_MS)
    announced = await call.member(stays)
    begun = await call.running_since(leaves)
    assert begun is not None

    async def restarted() -> bool:
        since = await call.running_since(leaves)
        assert since is not None, "it ran out"
        return since > begun

    await call.until(restarted, "Synapse shows that the event was restarted")
    assert (await call.member(leaves)).in_call
    await call.leave(leaves)
    assert (await call.has_left(leaves)).content == {}
    assert await call.ended(leaves) == "sent"
    assert await call.member(stays) == announced
    assert await call.running_since(stays) is not None
    assert await call.metric("sfu_delegate_events_lost_while_connected_total") == 0


async def test_a_new_delay_id_replaces_the_old_one(call: Call, synapse: Synapse) -> None:
    """A client that scheduled anew and delegates that: the old event is cancelled at Synapse, and the new one is sent when it left."""
    [anna] = await users(synapse, 1)
    await call.open(anna)
    client = await call.join(anna)
    announced = await call.member(client)
    old, old_delegation = client.delay_id, client.delegation
    new = await call.schedule(client)
    status, answer = await call.delegate(client)
    assert (status, answer["id"] != old_delegation) == (201, True)

    async def only_the_new_one() -> bool:
        scheduled = await synapse.client.delayed_events(anna)
        assert new in scheduled
        return old not in scheduled

    await call.until(only_the_new_one, "the old event is cancelled")
    assert await call.member(client) == announced, "the old leave event was sent"
    await call.leave(client)
    assert (await call.has_left(client)).content == {}
    assert await call.ended(client) == "sent"


async def test_delegating_the_same_again_changes_nothing(call: Call, synapse: Synapse) -> None:
    """The same delay_id again is the same delegation, also while its participant is connected."""
    [anna] = await users(synapse, 1)
    await call.open(anna)
    client = await call.join(anna)
    first = client.delegation
    status, answer = await call.delegate(client)
    assert (status, answer["id"], answer["participant"]["presence"]) == (200, first, "connected")


async def test_an_unknown_delay_id_is_not_delegated(call: Call, synapse: Synapse) -> None:
    """A delay_id that Synapse does not know gives 404, and no delegation."""
    [anna] = await users(synapse, 1)
    await call.open(anna)
    client = call.client(anna)
    client.delay_id = "syd_neverwasnever"
    status, answer = await call.delegate(client)
    assert (status, answer["errcode"]) == (404, "M_NOT_FOUND")
    assert await call.metric(DELEGATED) - await call.metric(DELEGATED, 'state="done"') == 0


async def test_a_full_access_token_is_refused(call: Call, synapse: Synapse) -> None:
    """Whoever gives its own access token as the scoped one is told so; the token is nowhere, and the event is not touched."""
    [anna] = await users(synapse, 1)
    await call.open(anna)
    client = call.client(anna)
    await call.schedule(client)
    scheduled = await call.running_since(client)
    status, answer = await call.delegate(client, token=anna.access_token)
    assert (status, answer["errcode"]) == (400, "M_INVALID_PARAM")
    assert "full access token" in answer["error"]
    assert anna.access_token not in answer["error"]
    assert await call.metric(DELEGATED) == 0
    assert await call.running_since(client) == scheduled
    await call.daemon.stop()
    kept = b"".join(path.read_bytes() for path in call.daemon.directory.iterdir() if path.is_file())
    assert anna.access_token.encode() not in kept
    assert anna.access_token not in "\n".join(call.daemon.log_lines)


async def test_a_client_that_said_goodbye_itself_is_the_normal_case(call: Call, synapse: Synapse) -> None:
    """A client that sends its own leave event and then leaves: already ended, and not an error."""
    [anna] = await users(synapse, 1)
    await call.open(anna)
    client = await call.join(anna)
    await synapse.client.manage(client.delay_id, "send")
    await call.leave(client)
    assert await call.ended(client) == "already_ended"
    assert not (await call.member(client)).in_call
    assert [line for line in call.daemon.entries() if line["level"] in ("error", "critical")] == []


async def test_a_killed_daemon_sends_when_it_is_back(call: Call, synapse: Synapse) -> None:
    """A daemon that is killed after it acknowledged a departure sends the leave event when it runs again."""
    [anna] = await users(synapse, 1)
    await call.open(anna)
    client = await call.join(anna)
    # By the default configuration it looks 2 s after such a departure, so there is time to kill it.
    await call.leave(client)

    async def acknowledged() -> bool:
        return any(line["what"] == "away" for line in call.daemon.entries("delegation"))

    await call.until(acknowledged, "the departure is durable")
    await call.daemon.kill()
    assert (await call.member(client)).in_call
    await call.daemon.start()
    assert (await call.has_left(client)).content == {}
    assert await call.ended(client) == "sent"


async def test_many_departures_under_synapses_default_rate_limit(call: Call, synapse: Synapse) -> None:
    """More people than Synapse's burst leave at once: all leave events arrive, and the daemon waits as it is told."""
    accounts = await users(synapse, 7)
    await call.open(*accounts)
    clients: list[Client] = [await call.join(account) for account in accounts]
    limited_before = await call.metric(*LIMITED)
    await call.sfu.call("delete_room", ROOM)
    for client in clients:
        await call.has_left(client)
    assert {await call.ended(client) for client in clients} == {"sent"}
    refused = await call.metric(*LIMITED) - limited_before
    # It waits after each refusal; whoever did not would be refused many times for each event.
    assert 0 < refused <= 2 * len(clients)
    assert await call.metric("sfu_delegate_events_lost_while_connected_total") == 0
