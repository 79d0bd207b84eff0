"""Delegation through the homeserver: real Synapses that pass requests on (MSC4512) and tell who is in a room (MSC4502), with their default limit in
force, the daemon as a process, and the sandbox's SFU.
"""

import asyncio
import json
import uuid
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio
import yaml
from sfu_delegate.config import from_mapping
from sfu_delegate.demo.matrix import CALL_MEMBER, V3, Account
from sfu_delegate.demo.matrix import UNSTABLE as DELAYED
from sfu_delegate.demo.synapse import Synapse
from sfu_delegate.doctor import Verdict, examine
from sfu_delegate.sandbox.sfu import JoinRefused

from tests.e2e.call import running_call
from tests.e2e.matrixrtc import DELEGATE as STANDALONE_DELEGATE
from tests.e2e.matrixrtc import GET_TOKEN as STANDALONE_GET_TOKEN
from tests.e2e.matrixrtc import SFU_GET, Json, RtcClient, ask, user_with_openid
from tests.e2e.service import DELEGATE, GET_TOKEN, STABLE, UNSTABLE, ServedCall, answers, federation_of, served
from tests.integration.certificates import Certificates

pytestmark = [pytest.mark.synapse, pytest.mark.asyncio(loop_scope="session")]

HOUR_MS = 3_600_000
SHORT_MS = 4_000
ENDED = "sfu_delegate_delegated_events_ended_total"
LIMITED = ("sfu_delegate_actions_total", 'outcome="limited"')
EVENTS = "sfu_delegate_delegated_events"
RESTARTS = ("sfu_delegate_actions_total", 'action="restart"')
LOST = "sfu_delegate_events_lost_while_connected_total"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def here(authority: Certificates, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServedCall]:
    """Two homeservers with one daemon, and one of another daemon, for all tests that do not need another configuration."""
    async with federation_of(tmp_path_factory.mktemp("service"), authority) as running:
        yield running


async def user(synapse: Synapse) -> Account:
    """A new user, whom no other test knows."""
    return await synapse.register(f"as-{uuid.uuid4().hex[:8]}")


async def client_of(here: ServedCall, account: Account | None = None, *, delay_ms: int = HOUR_MS, openid: bool = False) -> RtcClient:
    """A client of a user in a room of its own, with a leave event, which has said that it is in the call."""
    account = account or await user(here.synapse)
    client = await user_with_openid(here.call, account, delay_ms) if openid else RtcClient(account, "", delay_ms)
    await here.call.open(account)
    await here.call.schedule(client)
    await here.synapse.client.announce(account, here.call.room_id)
    return client


async def in_the_call(here: ServedCall, client: RtcClient) -> Any:
    """It joins the SFU with its token, as LiveKit checks it."""
    return await here.call.sfu.call("join_with_token", client.token)


async def left(here: ServedCall, client: RtcClient) -> None:
    """The SFU has lost it, and its leave event is in the room."""
    await leave(here, client)
    assert (await here.call.has_left(client)).content == {}


async def comes_and_goes(here: ServedCall, client: RtcClient) -> None:
    """Of somebody who has delegated: nothing is left of it."""
    await here.token(client)
    await in_the_call(here, client)
    await here.until_connected()
    await left(here, client)


async def leave(here: ServedCall, client: RtcClient) -> None:
    room, identity = joined_as(client.token)
    await here.call.sfu.call("leave", room, identity)


def claims(token: str) -> Json:
    """What a LiveKit token says."""
    payload = token.split(".")[1]
    found: Json = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return found


def joined_as(token: str) -> tuple[str, str]:
    """Room and identity that a LiveKit token is for."""
    found = claims(token)
    return found["video"]["room"], found["sub"]


async def nothing_is_open(here: ServedCall) -> None:
    """Whatever the tests before have left."""

    async def look() -> bool:
        return await here.call.metric(EVENTS) == await here.call.metric(EVENTS, 'state="done"')

    await here.call.until(look, "no delegation is open")


# ── the whole way ──


@pytest.mark.parametrize("with_device", [False, True], ids=["proposal's shape", "deployed shape"])
@pytest.mark.parametrize("prefix", [STABLE, UNSTABLE], ids=["stable", "unstable"])
async def test_from_the_access_token_to_the_leave_event(here: ServedCall, prefix: str, with_device: bool) -> None:
    """Nothing but requests to the homeserver, with the user's own access token: and the leave event is in the room once the SFU has lost it."""
    await nothing_is_open(here)
    client = await client_of(here)
    restarts, sent = await here.call.metric(*RESTARTS), await here.call.metric(ENDED, 'outcome="sent"')
    scheduled = await here.call.running_since(client)
    await here.token(client, prefix, with_device=with_device)
    assert claims(client.token)["video"]["canPublish"] is True
    await in_the_call(here, client)
    await here.delegate(client, prefix, with_device=with_device)
    await here.until_connected()
    # The homeserver has told all there is to know of the event: it need not be restarted before its time.
    assert (await here.call.metric(*RESTARTS) - restarts, await here.call.running_since(client)) == (0, scheduled)
    assert (await here.call.member(client)).in_call
    await left(here, client)
    await nothing_is_open(here)

    async def counted() -> bool:
        return await here.call.metric(ENDED, 'outcome="sent"') - sent == 1

    await here.call.until(counted, "it is counted as sent")
    assert await here.call.metric(LOST) == 0


async def test_restarted_by_its_true_delay(here: ServedCall) -> None:
    """The delay comes from the homeserver, whatever the client says, and the event is restarted in time for as long as somebody is connected."""
    await nothing_is_open(here)
    client = await client_of(here, delay_ms=SHORT_MS)
    await here.token(client)
    await in_the_call(here, client)
    await here.delegate(client, with_device=True)  # which says 77 ms
    begun = await here.call.running_since(client)
    assert begun is not None

    async def restarted_twice() -> bool:
        since = await here.call.running_since(client)
        assert since is not None, "it ran out"
        return since > begun + SHORT_MS / 1000

    await here.call.until(restarted_twice, "the event lives on")
    assert (await here.call.member(client)).in_call
    await left(here, client)
    assert await here.call.metric(LOST) == 0


async def test_the_limit_is_in_force_and_not_felt(here: ServedCall) -> None:
    """Synapse's own default limit refuses others at this address, and nothing of the daemon's, when a call of many ends at once."""
    await nothing_is_open(here)
    people = [await client_of(here)]
    room = here.call.room_id
    for _ in range(24):
        account = await user(here.synapse)
        await here.synapse.client.join(account, room)
        people.append(RtcClient(account, "", HOUR_MS))
        await here.call.schedule(people[-1])
        await here.synapse.client.announce(account, room)
    for client in people:
        await here.token(client)
        await in_the_call(here, client)
        await here.delegate(client)
    await here.until_connected(len(people))
    limited, sent = await here.call.metric(*LIMITED), await here.call.metric(ENDED, 'outcome="sent"')

    async def without_a_token() -> int:
        url = f"{here.synapse.url}{DELAYED}/delayed_events/syd_nobodys/restart"
        async with here.call.http.post(url, json={}) as response:
            return response.status

    # Synapse counts by address, and this address is the daemon's as well.
    assert 429 in await asyncio.gather(*(without_a_token() for _ in range(12)))
    await asyncio.gather(*(leave(here, client) for client in people))

    async def all_sent() -> bool:
        return await here.call.metric(ENDED, 'outcome="sent"') - sent == len(people)

    await here.call.until(all_sent, "everybody's leave event was sent")
    members = await here.synapse.client.members(people[0].account, room)
    assert {members[client.account.member_key].in_call for client in people} == {False}
    assert await here.call.metric(*LIMITED) == limited
    assert await here.call.metric("sfu_delegate_homeserver_rate_limit") == 0


async def test_the_application_service_is_seen_to_work(here: ServedCall) -> None:
    """At the start, the daemon has found that everything is set up, by going the whole way through each homeserver."""

    async def told() -> bool:
        return len(here.call.daemon.entries("application_service_works")) >= 2

    await here.call.until(told, "the daemon says that it works")
    works = await here.call.metric("sfu_delegate_application_service_works")
    assert (works, here.call.daemon.entries("application_service_failed")) == (8, [])


async def test_the_doctor_says_so_too(here: ServedCall) -> None:
    """Beside the running daemon, the whole way is gone once more; the webhooks of a room of nobody come to it, and no limit was met."""
    daemon = here.call.daemon
    report = await examine(from_mapping(daemon.config), daemon.directory / "sfu-delegate.yaml")
    found = {(result.id, result.subject): result.finding for result in report.results}
    assert [title for title, finding in found.items() if finding.verdict is Verdict.PROBLEM] == []
    for synapse in (here.synapse, *here.others):
        service, limit = (found[f"homeserver.{what}", synapse.server_name] for what in ("application_service", "rate_limit"))
        assert (service.verdict, service.evidence) == (Verdict.OK, "token, membership, federation and proxy work")
        assert limit.verdict is Verdict.OK
    assert "came to the daemon" in found["sfu.webhooks", "test"].evidence


# ── refused ──


async def test_what_is_not_theirs_is_refused(here: ServedCall) -> None:
    """Other people's events, other rooms, other types, events that are no more, other SFUs, rooms that they are not in: by the facts' errors."""
    await nothing_is_open(here)
    mine = await client_of(here)
    room = here.call.room_id
    theirs = await client_of(here)
    synapse = here.synapse

    async def message(delay_ms: int = HOUR_MS) -> str:
        path = f"{V3}/rooms/{quote(room, safe='')}/send/m.room.message/{uuid.uuid4().hex}"
        query = {"org.matrix.msc4140.delay": str(delay_ms)}
        body = {"msgtype": "m.text", "body": "not a leave event"}
        return str((await synapse.client.call("PUT", path, mine.account, body, query))["delay_id"])

    def body(**changes: Any) -> Json:
        return here.body(mine, delayed=True, room_id=room) | changes

    ended = await synapse.client.schedule_leave(mine.account, room, HOUR_MS)
    await synapse.client.manage(ended, "cancel")
    brief = await synapse.client.schedule_leave(mine.account, room, 1000)
    refused = {
        "somebody else's event": body(delay_id=theirs.delay_id),
        "somebody else's event in their room": body(delay_id=theirs.delay_id, room_id=here.call.room_id),
        "another room": body(room_id=here.call.room_id),
        "a room that is none": body(room_id="!nowhere:elsewhere.test"),
        "another type": body(delay_id=await message()),
        "one that never was": body(delay_id="syd_never"),
        "one that was cancelled": body(delay_id=ended),
        "one with too short a delay": body(delay_id=brief),
        "another SFU": body(url="wss://sfu.elsewhere.test"),
    }
    for prefix in (STABLE, UNSTABLE):
        found = {what: await here.post(prefix + DELEGATE, mine.account, asked) for what, asked in refused.items()}
        assert {what: (status, answer["errcode"]) for what, (status, answer) in found.items()} == dict.fromkeys(refused, (400, "M_INVALID_PARAM"))
    told = {found[what][1]["error"] for what in list(refused)[:7]}
    assert len(told) == 1, "errors tell what exists"
    asked = here.body(theirs, room_id=room)
    status, answer = await here.post(UNSTABLE + GET_TOKEN, theirs.account, asked)
    assert (status, answer["errcode"]) == (403, "M_FORBIDDEN")
    status, answer = await here.post(UNSTABLE + GET_TOKEN, theirs.account, asked | {"room_id": "!nowhere:elsewhere.test"})
    assert (status, answer["errcode"]) == (403, "M_FORBIDDEN")
    status, answer = await here.post(UNSTABLE + GET_TOKEN, mine.account, here.body(mine, room_id=room) | {"url": "wss://sfu.elsewhere.test"})
    assert (status, answer["errcode"]) == (400, "M_INVALID_PARAM")
    assert await here.live() == 0
    # And it was not for the requests as such.
    here.call.room_id = room
    await here.delegate(mine)
    await comes_and_goes(here, mine)


async def test_nobody_can_say_that_it_is_somebody_else(here: ServedCall) -> None:
    """The header that names the user counts with the homeserver's token only, and Synapse does not pass on one that a client sends."""
    mine, theirs = await user(here.synapse), await client_of(here)
    as_them = {"X-Matrix-User-Identifier": theirs.account.user_id}
    status, answer = await here.post(UNSTABLE + DELEGATE, mine, here.body(theirs, delayed=True), headers=as_them)
    assert (status, answer["errcode"]) == (400, "M_INVALID_PARAM")
    status, answer = await here.post(UNSTABLE + GET_TOKEN, mine, here.body(theirs), headers=as_them)
    assert (status, answer["errcode"]) == (403, "M_FORBIDDEN")
    url, body, http = here.call.daemon.public_url + UNSTABLE + DELEGATE, here.body(theirs, delayed=True), here.call.http
    tokens = [yaml.safe_load(Path(entry["registration_file"]).read_text()) for entry in here.call.daemon.config["homeservers"]]
    assert await answers(http, url, body, as_them) == (401, "M_MISSING_TOKEN")
    for token in (theirs.account.access_token, tokens[0]["as_token"], tokens[0]["hs_token"][:-1]):
        assert await answers(http, url, body, as_them | {"Authorization": f"Bearer {token}"}) == (401, "M_UNKNOWN_TOKEN")
    proved = {"Authorization": f"Bearer {tokens[0]['hs_token']}"}
    assert await answers(http, url, body, proved) == (401, "M_UNAUTHORIZED")
    # The other homeserver vouches for its own users only.
    assert await answers(http, url, body, as_them | {"Authorization": f"Bearer {tokens[1]['hs_token']}"}) == (403, "M_FORBIDDEN")
    assert await here.post(UNSTABLE + DELEGATE, None, body) == (401, {"errcode": "M_MISSING_TOKEN", "error": "Missing access token"})
    assert await answers(http, url, body, proved | as_them) == (200, "")
    log = "\n".join(here.call.daemon.log_lines)
    assert [secret for token in tokens for secret in (token["as_token"], token["hs_token"]) if secret in log] == []
    assert theirs.delay_id not in log
    await comes_and_goes(here, theirs)


# ── another homeserver's SFU ──


async def test_a_token_for_another_homeservers_sfu_comes_by_federation(here: ServedCall) -> None:
    """A user of one homeserver in a room of the other's: its own homeserver asks the other one, and the token is to listen with."""
    assert here.far is not None
    elsewhere = here.far.synapse
    await client_of(here)
    guest = await elsewhere.register(f"guest-{uuid.uuid4().hex[:8]}")
    body = {"url": here.url, "room_id": here.call.room_id, "slot_id": "m.call#ROOM", "member_id": "M", "server_name": here.synapse.server_name}
    status, answer = await here.post(UNSTABLE + GET_TOKEN, guest, body, at=elsewhere)
    assert (status, answer["errcode"]) == (403, "M_FORBIDDEN")
    path = f"{V3}/join/{quote(here.call.room_id, safe='')}"
    await elsewhere.client.call("POST", path, guest, {}, {"server_name": here.synapse.server_name})
    for prefix in (STABLE, UNSTABLE):
        status, answer = await here.post(prefix + GET_TOKEN, guest, body, at=elsewhere)
        assert (status, sorted(answer)) == (200, ["jwt"]), answer
    video = claims(answer["jwt"])["video"]
    assert (video["canPublish"], video["canSubscribe"], video["roomJoin"], video["roomCreate"]) == (False, True, True, False)
    joined = await here.call.sfu.call("join_with_token", answer["jwt"])
    assert (joined.room, joined.identity) == joined_as(answer["jwt"])
    status, answer = await here.post(UNSTABLE + GET_TOKEN, guest, body | {"url": "wss://sfu.elsewhere.test"}, at=elsewhere)
    assert (status, answer["errcode"]) == (400, "M_INVALID_PARAM")
    status, answer = await here.post(UNSTABLE + GET_TOKEN, guest, body | {"server_name": "localhost:1"}, at=elsewhere)
    assert (status, answer["errcode"]) == (502, "M_UNKNOWN")
    federated = ("sfu_delegate_matrixrtc_requests_total", 'endpoint="federation_get_token"', 'status="200"')
    assert (await here.call.metric(*federated), await here.far.call.metric(*federated)) == (2, 0)


async def test_homeservers_of_the_same_daemon_need_no_federation(here: ServedCall) -> None:
    """Its SFU is theirs: a user of the one gets a token for it under the name of the other, with which it may speak, from its own homeserver."""
    [other] = here.others
    await client_of(here)
    guest = await other.register(f"guest-{uuid.uuid4().hex[:8]}")
    path = f"{V3}/join/{quote(here.call.room_id, safe='')}"
    await other.client.call("POST", path, guest, {}, {"server_name": here.synapse.server_name})
    federated = ("sfu_delegate_matrixrtc_requests_total", 'endpoint="federation_get_token"')
    before = await here.call.metric(*federated)
    body = {"url": here.url, "room_id": here.call.room_id, "slot_id": "m.call#ROOM", "member_id": "M", "server_name": here.synapse.server_name}
    status, answer = await here.post(UNSTABLE + GET_TOKEN, guest, body, at=other)
    assert (status, claims(answer["jwt"])["video"]["canPublish"]) == (200, True)
    assert await here.call.metric(*federated) == before
    # And nobody but its own homeserver has a word on it.
    token = yaml.safe_load(Path(here.call.daemon.config["homeservers"][0]["registration_file"]).read_text())["hs_token"]
    headers = {"Authorization": f"Bearer {token}", "X-Matrix-Origin": other.server_name}
    url = f"{here.call.daemon.public_url}/_matrix/federation/v1/rtc/livekit/get_token"
    assert await answers(here.call.http, url, {**body, "user_id": guest.user_id}, headers) == (403, "M_FORBIDDEN")


# ── both ways side by side ──


@pytest.mark.parametrize("new_event", [False, True], ids=["the same event", "a new event"])
@pytest.mark.parametrize("with_device", [False, True], ids=["proposal's shape", "deployed shape"])
@pytest.mark.parametrize("before", [STANDALONE_GET_TOKEN, SFU_GET])
async def test_a_client_that_changes_over_keeps_one_delegation(here: ServedCall, before: str, with_device: bool, new_event: bool) -> None:
    """In the middle of a call, from the standalone endpoints to the homeserver's: what it had delegated is not forgotten, and not done twice."""
    await nothing_is_open(here)
    client = await client_of(here, openid=True)
    status, answer = await ask(here.call, before, client)
    assert status == 200, answer
    await in_the_call(here, client)
    status, answer = await ask(here.call, before, client, delayed=True)
    assert status == 200, answer
    await here.until_connected()
    old = client.delay_id
    if new_event:
        await here.call.schedule(client)
    await here.delegate(client, with_device=with_device)
    await one_event_is_left(here, client, old)
    await here.until_connected()
    assert (await here.call.member(client)).in_call
    await left(here, client)
    await nothing_is_open(here)
    assert await here.call.metric(LOST) == 0


@pytest.mark.parametrize("new_event", [False, True], ids=["the same event", "a new event"])
@pytest.mark.parametrize("after", [STANDALONE_GET_TOKEN, STANDALONE_DELEGATE])
async def test_and_back(here: ServedCall, after: str, new_event: bool) -> None:
    """The same the other way round, as when the homeserver does not pass requests on any more."""
    await nothing_is_open(here)
    client = await client_of(here, openid=True)
    await here.token(client)
    await in_the_call(here, client)
    await here.delegate(client)
    await here.until_connected()
    old, token = client.delay_id, client.token
    if new_event:
        await here.call.schedule(client)
    status, answer = await ask(here.call, after, client, delayed=True)
    assert status == 200, answer
    client.token = token  # it stays connected with the one that it has
    await one_event_is_left(here, client, old)
    await here.until_connected()
    assert (await here.call.member(client)).in_call
    await left(here, client)
    await nothing_is_open(here)
    assert await here.call.metric(LOST) == 0


async def one_event_is_left(here: ServedCall, client: RtcClient, old: str) -> None:
    """One is kept alive, and of the one before nothing is left at the homeserver."""

    async def look() -> bool:
        scheduled = await here.synapse.client.delayed_events(client.account)
        assert client.delay_id in scheduled
        return await here.live() == 1 and (old == client.delay_id or old not in scheduled)

    await here.call.until(look, "one delegation is left")


# ── homeservers that cannot ──


async def test_a_homeserver_without_the_features_gets_a_clear_word(authority: Certificates, tmp_path: Path) -> None:
    """It is told at the start what is missing, and how to switch it on; the standalone endpoints work, without the limit."""
    async with served(tmp_path, authority, features={}) as here:

        async def told() -> bool:
            return len(here.call.daemon.entries("application_service_failed")) >= 2

        await here.call.until(told, "the daemon says what is missing")
        said = {line["part"]: line["problem"] + line["remedy"] for line in here.call.daemon.entries("application_service_failed")}
        assert sorted(said) == ["federation", "membership"]
        assert "msc4512_enabled" in said["federation"]
        assert "msc4502_enabled" in said["membership"]
        assert here.call.daemon.entries("application_service_works") == []
        client = await client_of(here, openid=True)
        status, answer = await here.post(UNSTABLE + DELEGATE, client.account, here.body(client, delayed=True))
        assert (status, answer["errcode"]) == (404, "M_UNRECOGNIZED")  # by which clients know that they have to use the others
        status, answer = await ask(here.call, STANDALONE_GET_TOKEN, client, delayed=True)
        assert status == 200, answer
        await in_the_call(here, client)
        await here.until_connected()
        await left(here, client)
        assert await here.call.metric(*LIMITED) == 0


async def test_a_token_that_synapse_does_not_know(synapse: Synapse, authority: Certificates, tmp_path: Path) -> None:
    """A registration that Synapse was not given: the daemon says so."""
    entry = {"name": synapse.server_name, "url": synapse.url, "as_token": "a" * 40, "hs_token": "b" * 40, "ca_file": str(authority.ca_file)}
    async with running_call(synapse, tmp_path / "daemon", homeservers=[entry]) as call:

        async def told() -> list[Json] | None:
            return call.daemon.entries("application_service_failed") or None

        [line] = await call.until(told, "the daemon says that it is not registered")
        assert (line["part"], line["homeserver"]) == ("token", synapse.server_name)
        assert "app_service_config_files" in line["remedy"]


# ── who has sent many messages ──


async def test_the_owners_own_limit_does_not_keep_anybody_in_the_call(authority: Certificates, tmp_path: Path) -> None:
    """Synapse counts the leave event for its owner's `rc_message`, and forgets an event that it refuses so: it is put in its owner's name then."""
    async with served(tmp_path, authority, synapses_settings={"rc_message": {"per_second": 0.01, "burst_count": 12}}) as here:
        client = await client_of(here)
        await here.token(client)
        await in_the_call(here, client)
        await here.delegate(client)
        await here.until_connected()
        path = f"{V3}/rooms/{quote(here.call.room_id, safe='')}/send/m.room.message/"
        statuses = set()
        for number in range(14):
            body = {"msgtype": "m.text", "body": str(number)}
            url, headers = f"{here.synapse.url}{path}{number}", {"Authorization": f"Bearer {client.account.access_token}"}
            async with here.call.http.put(url, json=body, headers=headers) as response:
                statuses.add(response.status)
        assert 429 in statuses
        await left(here, client)
        await nothing_is_open(here)

        async def counted() -> bool:  # a moment after the engine knows of it
            return await here.call.metric(ENDED, 'outcome="sent"') == 1

        await here.call.until(counted, "it was sent")
        assert await here.call.metric(*LIMITED) == 0


# ── who is not in the room any more ──


async def test_who_leaves_the_room_is_removed_from_the_call(authority: Certificates, tmp_path: Path) -> None:
    """Kicked from the Matrix room: removed from the call, again when it comes back with its old token, and also after a restart."""
    async with served(tmp_path, authority, membership={"enforce": True, "interval": "10s"}) as here:
        host = await client_of(here)
        guest = RtcClient(await user(here.synapse), "", HOUR_MS)
        await here.synapse.client.join(guest.account, here.call.room_id)
        await here.token(host)
        await here.token(guest)
        await in_the_call(here, host)
        await in_the_call(here, guest)
        room, identity = joined_as(guest.token)
        stays = joined_as(host.token)[1]

        async def present() -> set[str]:
            rooms = await here.call.sfu.call("rooms")
            return set(rooms.get(room, ()))

        async def removed() -> bool:
            return await present() == {stays}

        async def told() -> bool:
            return len(here.call.daemon.entries("participant_removed")) == 3

        assert await present() == {stays, identity}
        path = f"{V3}/rooms/{quote(here.call.room_id, safe='')}/kick"
        await here.synapse.client.call("POST", path, host.account, {"user_id": guest.account.user_id})
        await here.call.until(removed, "it is removed")
        await in_the_call(here, guest)
        await here.call.until(removed, "it is removed again")
        await here.call.daemon.stop()
        await in_the_call(here, guest)
        assert await present() == {stays, identity}
        await here.call.daemon.start()
        await here.call.until(removed, "it is removed after the restart")
        # Its line, and its count, come when the SFU's answer has.
        await here.call.until(told, "all three are told")
        assert await here.call.metric("sfu_delegate_participants_removed_total") == 1  # since the restart
        with pytest.raises(JoinRefused):
            await here.call.sfu.call("join_with_token", guest.token[:-2])
        assert guest.account.user_id not in "\n".join(here.call.daemon.log_lines)
        assert CALL_MEMBER not in "\n".join(here.call.daemon.log_lines)
