"""The MatrixRTC endpoints on real parts: a real Synapse that issues OpenID tokens and vouches for them over its federation listener, the daemon as
a process, and the sandbox's SFU, or a real livekit-server, for the tokens that are handed out.
"""

import asyncio
import sqlite3
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from sfu_delegate.demo.livekit_server import LiveKitSfu, binary
from sfu_delegate.demo.matrix import Account
from sfu_delegate.demo.processes import HOST as LOOPBACK
from sfu_delegate.demo.processes import Died, free_ports
from sfu_delegate.demo.synapse import Synapse
from sfu_delegate.sandbox.sfu import JoinRefused

from tests.e2e.call import WITHIN, Call, MatrixCall, running_call
from tests.e2e.daemon_process import config_for, running_daemon
from tests.e2e.federation import HOST, USERINFO, Vouching
from tests.e2e.matrixrtc import DELEGATE, GET_TOKEN, SFU_GET, Json, RtcClient, ask, post, user_with_openid
from tests.integration.certificates import Certificates

pytestmark = [pytest.mark.synapse, pytest.mark.asyncio(loop_scope="session")]

ENDPOINTS = (GET_TOKEN, SFU_GET, DELEGATE)
LABELS = {GET_TOKEN: "get_token", SFU_GET: "sfu_get", DELEGATE: "delegate_delayed_leave"}  # in the metrics
ACCEPTED = "sfu_delegate_delegated_events_accepted_total"
ENDED = "sfu_delegate_delegated_events_ended_total"
LOST = "sfu_delegate_events_lost_while_connected_total"
OPENID = "sfu_delegate_openid_checks_total"
NOTICED_WITHIN = 90.0  # seconds: LiveKit needs some 20 to notice that a client is gone


def discovered(synapse: Synapse, authority: Certificates) -> Json:
    """The configuration's sections for homeservers that are found by their names alone, the served Synapse and all others."""
    trusted = {"ca_file": str(authority.ca_file), "allow_private_addresses": True}
    return {"homeservers": [{"name": synapse.server_name, **trusted}], "federation": trusted}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def call(synapse: Synapse, authority: Certificates, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Call]:
    """One daemon for all tests that do not need another configuration."""
    async with running_call(synapse, tmp_path_factory.mktemp("daemon"), **discovered(synapse, authority)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def other(authority: Certificates) -> AsyncIterator[Vouching]:
    """A homeserver that is not served, with a good certificate."""
    async with Vouching().listening(authority.server(HOST)) as running:
        yield running


async def user(synapse: Synapse) -> Account:
    """A new user, whom no other test knows."""
    return await synapse.register(f"rtc-{uuid.uuid4().hex[:8]}")


async def scheduled(call: MatrixCall) -> RtcClient:
    """A new user's client in a room of its own, with an OpenID token and a leave event, which has said that it is in the call."""
    synapse = call.homeserver
    assert isinstance(synapse, Synapse)
    client = await user_with_openid(call, await user(synapse))
    await call.open(client.account)
    await call.schedule(client)
    await synapse.client.announce(client.account, call.room_id)
    return client


def of_other(other: Vouching) -> RtcClient:
    """A client of a user of that homeserver, with an OpenID token of it."""
    name = f"@olga-{uuid.uuid4().hex[:8]}:{other.name}"
    return RtcClient(Account(name, "OTHERDEVICE", ""), "", 60_000, delay_id="syd_of_another_server", openid=other.issue(uuid.uuid4().hex, name))


async def restarted(call: MatrixCall, client: RtcClient, begun: float | None) -> None:
    """Wait until Synapse shows that the client's event was restarted."""
    assert begun is not None

    async def look() -> bool:
        since = await call.running_since(client)
        assert since is not None, "the event is gone"
        return since > begun

    await call.until(look, "Synapse shows that the event was restarted")


async def connected(call: MatrixCall, people: int = 1) -> None:
    """Wait until the daemon knows that so many participants with a leave event are in calls."""

    async def look() -> bool:
        return await call.metric("sfu_delegate_delegated_events", 'state="live"', 'presence="connected"') == people

    await call.until(look, f"the daemon has heard of {people} who joined")


def assert_kept_secret(call: MatrixCall, *secrets: str) -> None:
    """None of these is in the daemon's log."""
    log = "\n".join(call.daemon.log_lines)
    assert [secret for secret in secrets if not secret or secret in log] == []


# ── delegation by each endpoint ──


@pytest.mark.parametrize(("for_token", "for_delegation"), [(GET_TOKEN, GET_TOKEN), (SFU_GET, SFU_GET), (GET_TOKEN, DELEGATE), (SFU_GET, DELEGATE)])
async def test_from_the_openid_token_to_the_leave_event(call: Call, for_token: str, for_delegation: str) -> None:
    """Whichever endpoint gave the LiveKit token, and whichever took the delegation: the leave event is sent when the SFU has lost the client."""
    client = await scheduled(call)
    begun = await call.running_since(client)
    counts = {
        "accepted": (ACCEPTED,),
        "sent": (ENDED, 'outcome="sent"'),
        "delegations": ("sfu_delegate_matrixrtc_requests_total", f'endpoint="{LABELS[for_delegation]}"', 'status="200"', 'delegation="yes"'),
        "refused": (OPENID, 'result="refused"'),
    }
    before = {name: await call.metric(*metric) for name, metric in counts.items()}
    status, answer = await ask(call, for_token, client)
    assert (status, sorted(answer)) == (200, ["jwt", "url"]), answer
    assert answer["url"] == call.daemon.config["sfus"]["test"]["url"]
    # The sandbox's SFU creates no rooms by itself, and checks the token as LiveKit does.
    joined = await call.sfu.call("join_with_token", client.token)
    status, answer = await ask(call, for_delegation, client, delayed=True)
    assert status == 200, answer
    await restarted(call, client, begun)
    await connected(call)
    assert (await call.member(client)).in_call
    await call.sfu.call("leave", joined.room, joined.identity)
    assert (await call.has_left(client)).content == {}

    async def counted() -> bool:
        return {name: await call.metric(*metric) - before[name] for name, metric in counts.items()} == {
            "accepted": 1,
            "sent": 1,
            "delegations": 1,
            "refused": 0,
        }

    await call.until(counted, "the metrics tell of one delegation that was sent")
    assert await call.metric(LOST) == 0
    assert_kept_secret(call, client.openid["access_token"], client.token, client.delay_id)


async def test_a_configured_federation_url_replaces_discovery(synapse: Synapse, authority: Certificates, tmp_path: Path) -> None:
    """Where the operator says where the federation API is, a private address is no obstacle, though discovery may not lead to one."""
    assert synapse.federation is not None
    homeserver = {"name": synapse.server_name, "url": synapse.url, "federation_url": synapse.federation.url, "ca_file": str(authority.ca_file)}
    async with running_call(synapse, tmp_path, homeservers=[homeserver]) as call:
        client = await scheduled(call)
        begun = await call.running_since(client)
        status, answer = await ask(call, GET_TOKEN, client, delayed=True)
        assert status == 200, answer
        await restarted(call, client, begun)
        assert await call.metric(OPENID, 'result="ok"') == 1
        joined = await call.sfu.call("join_with_token", client.token)
        await connected(call)
        await call.sfu.call("remove", joined.room, joined.identity)
        assert (await call.has_left(client)).content == {}


# ── who is refused ──


async def refused(call: MatrixCall, client: RtcClient, endpoint: str, body: Json) -> Json:
    """The answer of an endpoint that does not believe in a user: 401, and nothing was done."""
    before, begun = await call.metric(ACCEPTED), await call.running_since(client)
    status, answer = await post(call, endpoint, body)
    assert (status, answer.get("errcode")) == (401, "M_UNAUTHORIZED"), answer
    assert answer.keys() == {"errcode", "error"}
    assert await call.metric(ACCEPTED) == before
    assert await call.running_since(client) == begun
    assert_kept_secret(call, body["openid_token"]["access_token"], client.delay_id)
    return answer


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_an_unknown_openid_token_proves_nothing(call: Call, endpoint: str) -> None:
    """A token that Synapse has not issued gives neither a LiveKit token nor a delegation."""
    client = await scheduled(call)
    client.openid = {**client.openid, "access_token": uuid.uuid4().hex}
    await refused(call, client, endpoint, client.body(endpoint, call.room_id, delayed=True))


async def test_an_expired_openid_token_proves_nothing(call: Call, synapse: Synapse) -> None:
    """A token whose hour is over at Synapse is refused."""
    client = await scheduled(call)
    with closing(sqlite3.connect(synapse.directory / "homeserver.db", timeout=WITHIN)) as database, database:
        made_old = database.execute("UPDATE open_id_tokens SET ts_valid_until_ms = 1 WHERE token = ?", (client.openid["access_token"],))
        assert made_old.rowcount == 1
    await refused(call, client, GET_TOKEN, client.body(GET_TOKEN, call.room_id, delayed=True))


@pytest.mark.parametrize("endpoint", [GET_TOKEN, DELEGATE])
async def test_another_users_name_is_not_believed(call: Call, synapse: Synapse, endpoint: str) -> None:
    """Whoever claims to be somebody else of the same homeserver is refused, and cannot learn whether there is such a user."""
    client = await scheduled(call)
    somebody = await user(synapse)
    body = client.body(endpoint, call.room_id, delayed=True)
    answers = []
    for claimed in (somebody.user_id, f"@nobody:{synapse.server_name}"):
        body["member"]["claimed_user_id"] = claimed
        answers.append(await refused(call, client, endpoint, body))
    assert answers[0] == answers[1]


async def test_a_token_counts_only_at_the_server_that_issued_it(call: Call, other: Vouching, synapse: Synapse) -> None:
    """A token of one homeserver is nothing at another: neither Synapse's there, nor the other's at Synapse."""
    client = await scheduled(call)
    foreign = of_other(other)
    body = client.body(SFU_GET, call.room_id, delayed=True)
    body["openid_token"] = {**client.openid, "matrix_server_name": other.name}
    await refused(call, client, SFU_GET, body)
    assert other.asked == [f"{USERINFO}?access_token={client.openid['access_token']}"]
    body["openid_token"] = {**foreign.openid, "matrix_server_name": synapse.server_name}
    await refused(call, client, SFU_GET, body)
    assert len(other.asked) == 1


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_a_homeserver_vouches_for_its_own_users_only(call: Call, other: Vouching, endpoint: str) -> None:
    """A homeserver that says that a token belongs to a user of Synapse is not believed, on no endpoint."""
    client = await scheduled(call)
    body = client.body(endpoint, call.room_id, delayed=True)
    body["openid_token"] = other.issue(uuid.uuid4().hex, client.account.user_id)
    await refused(call, client, endpoint, body)
    # Where the claim alone shows it, the token is not even sent there.
    assert len(other.asked) == (1 if endpoint == SFU_GET else 0)


async def test_a_user_of_another_homeserver_only_joins_what_exists(call: Call, other: Vouching) -> None:
    """A user of a homeserver that is not served gets a LiveKit token, with which no room comes into being, and cannot delegate."""
    client = await scheduled(call)
    foreign = of_other(other)
    status, answer = await ask(call, GET_TOKEN, foreign)
    assert status == 200, answer
    with pytest.raises(JoinRefused, match="does not exist"):
        await call.sfu.call("join_with_token", foreign.token)
    before = await call.metric(ACCEPTED)
    for endpoint, expected in ((GET_TOKEN, (400, "M_BAD_JSON")), (SFU_GET, (400, "M_BAD_JSON")), (DELEGATE, (403, "M_FORBIDDEN"))):
        status, answer = await post(call, endpoint, foreign.body(endpoint, call.room_id, delayed=True))
        assert (status, answer["errcode"]) == expected
    assert await call.metric(ACCEPTED) == before
    assert (await ask(call, GET_TOKEN, client))[0] == 200
    theirs = await call.sfu.call("join_with_token", client.token)
    assert (await call.sfu.call("join_with_token", foreign.token)).room == theirs.room


# ── homeservers that cannot be asked ──


async def unavailable(call: MatrixCall, client: RtcClient, reason: str) -> None:
    """The client is told to come again; why, only the log says."""
    for endpoint in ENDPOINTS:
        async with call.http.post(call.daemon.public_url + endpoint, json=client.body(endpoint, "!room:x.test", delayed=True)) as response:
            answer = await response.json()
            assert (response.status, answer["errcode"]) == (503, "M_UNKNOWN")
            assert int(response.headers["Retry-After"]) > 0
            assert reason not in answer["error"]

    async def logged() -> bool:
        return any(reason in entry["error"] for entry in call.daemon.entries("openid_unavailable"))

    await call.until(logged, f"the log says why: {reason}")
    assert_kept_secret(call, client.openid["access_token"], client.delay_id)


async def test_a_certificate_for_another_name_is_not_accepted(call: Call, authority: Certificates) -> None:
    """A homeserver that proves to be another one is not asked: no token is sent to it."""
    async with Vouching().listening(authority.server("elsewhere.test")) as impostor:
        await unavailable(call, of_other(impostor), "the TLS certificate is not accepted")
        assert (impostor.handshakes > 0, impostor.asked) == (True, [])


async def test_a_certificate_of_an_unknown_authority_is_not_accepted(call: Call, tmp_path: Path) -> None:
    """A homeserver with the right name, by the word of nobody who is trusted, is not asked."""
    async with Vouching().listening(Certificates(tmp_path).server(HOST)) as impostor:
        await unavailable(call, of_other(impostor), "the TLS certificate is not accepted")
        assert (impostor.handshakes > 0, impostor.asked) == (True, [])


async def test_discovery_leads_to_no_private_address(synapse: Synapse, authority: Certificates, other: Vouching, tmp_path: Path) -> None:
    """Unless the configuration allows it, nothing on this machine is connected to by a name from outside, the served homeserver's included."""
    file = str(authority.ca_file)
    homeserver = {"name": synapse.server_name, "url": synapse.url, "ca_file": file}
    async with running_call(synapse, tmp_path, homeservers=[homeserver], federation={"ca_file": file}) as call:
        client = await scheduled(call)
        begun = await call.running_since(client)
        await unavailable(call, client, "must not be reached (loopback)")
        await unavailable(call, of_other(other), "must not be reached (loopback)")
        assert other.handshakes == 0
        assert await call.metric(OPENID, 'result="unavailable"') == 2 * len(ENDPOINTS)
        assert await call.metric(ACCEPTED) == 0
        assert await call.running_since(client) == begun


# ── with a real SFU ──


@asynccontextmanager
async def real_call(
    synapse: Synapse, directory: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any
) -> AsyncIterator[tuple[MatrixCall, LiveKitSfu]]:
    """A daemon and a real livekit-server, which knows no room that was not made by the daemon."""
    path = binary()
    if path is None:
        pytest.skip("livekit-server is not on PATH, or LiveKit's SDK is not installed")
    # LiveKit has an environment variable for each key, which goes over its file.
    monkeypatch.setenv("LIVEKIT_ROOM_AUTO_CREATE", "false")
    [port] = free_ports(1)
    listen = {"host": LOOPBACK, "port": port}
    async with AsyncExitStack() as stack:
        sfu = await stack.enter_async_context(LiveKitSfu(path, "", [f"http://{LOOPBACK}:{port}/sfu_webhook"], directory / "livekit"))
        config = config_for(sfu.url, [], listen=listen) | sections
        daemon = await stack.enter_async_context(running_daemon(config, directory / "daemon"))
        http = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WITHIN)))
        yield MatrixCall(synapse, daemon, http), sfu


@pytest.mark.slow
@pytest.mark.livekit
@pytest.mark.parametrize("endpoint", [GET_TOKEN, SFU_GET])
async def test_a_real_participant_that_is_killed_leaves_the_call(
    synapse: Synapse, authority: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """Two SDK participants join a real SFU with tokens from the endpoint; one is killed: its leave event is sent, the other's is not."""
    async with real_call(synapse, tmp_path, monkeypatch, **discovered(synapse, authority)) as (call, sfu):
        clients = [await user_with_openid(call, await user(synapse)) for _ in range(2)]
        await call.open(*(client.account for client in clients))
        for client in clients:
            await call.schedule(client)
            await synapse.client.announce(client.account, call.room_id)
            status, answer = await ask(call, endpoint, client, delayed=True)
            assert (status, answer.get("url")) == (200, sfu.url), answer
        stays, killed = clients
        await asyncio.gather(*(sfu.join(client.identity, client.token) for client in clients))
        await connected(call, 2)
        announced = await call.member(stays)
        await sfu.crash(killed.identity)
        assert (await call.has_left(killed, NOTICED_WITHIN)).content == {}
        assert await call.member(stays) == announced
        assert await call.running_since(stays) is not None

        async def counted() -> bool:
            return await call.metric(ENDED, 'outcome="sent"') == 1

        await call.until(counted, "the metrics tell of one that was sent")
        assert await call.metric(ENDED) == 1
        assert await call.metric(LOST) == 0


@pytest.mark.slow
@pytest.mark.livekit
async def test_a_real_sfu_lets_strangers_only_into_rooms_that_exist(
    synapse: Synapse, authority: Certificates, other: Vouching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user of a homeserver that is not served has a good token, and gets in only after a user of a served one had the room made."""
    async with real_call(synapse, tmp_path, monkeypatch, **discovered(synapse, authority)) as (call, sfu):
        client, stranger = await scheduled(call), of_other(other)
        status, answer = await ask(call, GET_TOKEN, stranger)
        assert status == 200, answer
        with pytest.raises(Died, match="requested room does not exist"):
            await sfu.join(stranger.identity, stranger.token)
        status, answer = await ask(call, GET_TOKEN, client)
        assert status == 200, answer
        await sfu.join(stranger.identity, stranger.token)
