"""The sandboxes over HTTP: real clients can talk to them, and every fault is one of the socket."""

import asyncio
import gzip
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from livekit.protocol import models
from sfu_delegate.sandbox.homeserver import FED_PROXY, MSC4502, End, HomeserverModel, RateLimit
from sfu_delegate.sandbox.server import SandboxHomeserver, SandboxSfu, seconds
from sfu_delegate.sandbox.sfu import SfuModel
from sfu_delegate.sandbox.tokens import access_token, join_token
from yarl import URL

from livekit import api
from tests import recordings

KEY, SECRET = "devkey", "a-secret-that-is-at-least-32-bytes-long"
UNSTABLE = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events"
CLIENT_PATH = "/_matrix/client/unstable/org.matrix.msc4195/rtc/livekit/get_token"
FED_PATH = "/_matrix/federation/v1/rtc/livekit/get_token"
HS_TOKEN = "an-hs-token"

Answering = Callable[[int], Awaitable[web.StreamResponse]]


class Receiver:
    """Takes webhooks, and answers as it is told."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], str]] = []
        self.arrived = asyncio.Condition()
        self.answer: Answering = self.ok
        self.url = ""

    async def ok(self, number: int) -> web.StreamResponse:
        return web.Response()

    async def take(self, request: web.Request) -> web.StreamResponse:
        body = await request.text()
        async with self.arrived:
            self.requests.append((dict(request.headers), body))
            self.arrived.notify_all()
        return await self.answer(len(self.requests))

    async def until(self, count: int) -> list[dict[str, Any]]:
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.requests) >= count)
        return [json.loads(body) for _, body in self.requests]


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/webhooks/livekit", receiver.take)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/webhooks/livekit"
    try:
        yield receiver
    finally:
        await runner.cleanup()


class Service:
    """An application service: keeps what it is asked, and answers as it is told."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []  # method, path and query, headers, body
        self.answer: Callable[[], web.StreamResponse] = lambda: web.json_response({"jwt": "x"})
        self.url = ""

    async def take(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.raw_path, dict(request.headers), await request.read()))
        return self.answer()


@asynccontextmanager
async def serving() -> AsyncIterator[Service]:
    service = Service()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", service.take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    service.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield service
    finally:
        await runner.cleanup()


async def eventually(true: Callable[[], bool]) -> None:
    """Wait for the effect; a test that waits in vain is ended by the runner."""
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - the models have no events to wait for
            await asyncio.sleep(0.005)


def sfu_model(*urls: str) -> SfuModel:
    return SfuModel({KEY: SECRET}, urls)


async def test_livekits_own_client_is_understood() -> None:
    """livekit-api creates, lists, gets, removes and deletes, in protobuf."""
    async with SandboxSfu(sfu_model()) as sfu, api.LiveKitAPI(sfu.url, KEY, SECRET) as client:
        created = await client.room.create_room(api.CreateRoomRequest(name="room", empty_timeout=60, departure_timeout=5))
        assert (created.name, created.empty_timeout, created.departure_timeout) == ("room", 60, 5)
        assert created.sid == sfu.model.rooms["room"].sid
        sid = await sfu.call("join", "room", "alice", active_after=0)
        await sfu.call("publish_track", "room", "alice")
        await sfu.call("hang", "room", "bob")
        listed = await client.room.list_participants(api.ListParticipantsRequest(room="room"))
        assert [(p.identity, api.ParticipantInfo.State.Name(p.state)) for p in listed.participants] == [("alice", "ACTIVE"), ("bob", "JOINED")]
        assert listed.participants[0].sid == sid
        assert abs(listed.participants[0].joined_at_ms / 1000 - time.time()) < 60
        assert listed.participants[0].tracks[0].mime_type == "audio/red"
        found = await client.room.get_participant(api.RoomParticipantIdentity(room="room", identity="alice"))
        assert found.sid == sid
        assert [room.name for room in (await client.room.list_rooms(api.ListRoomsRequest(names=["room", "nowhere"]))).rooms] == ["room"]
        await client.room.remove_participant(api.RoomParticipantIdentity(room="room", identity="alice"))
        with pytest.raises(api.TwirpError) as missing:
            await client.room.get_participant(api.RoomParticipantIdentity(room="room", identity="alice"))
        assert (missing.value.status, missing.value.code) == (404, "not_found")
        await client.room.delete_room(api.DeleteRoomRequest(room="room"))
        assert (await client.room.list_participants(api.ListParticipantsRequest(room="room"))).participants == []


async def test_a_wrong_secret_is_refused_in_plain_text() -> None:
    """livekit-api with another secret gets 401, which is no Twirp error."""
    async with SandboxSfu(sfu_model()) as sfu, api.LiveKitAPI(sfu.url, KEY, "another-secret-of-at-least-32-bytes") as client:
        with pytest.raises(api.TwirpError) as refused:
            await client.room.list_participants(api.ListParticipantsRequest(room="room"))
        assert refused.value.status == 401


async def test_json_over_http_is_as_recorded() -> None:
    """Raw requests in JSON, also with garbage bodies, wrong paths, methods and content types, get Twirp's answers."""
    async with SandboxSfu(sfu_model()) as sfu, aiohttp.ClientSession(sfu.url) as http:
        token = access_token(KEY, SECRET, time.time(), {"roomAdmin": True, "room": "room"})
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        path = "/twirp/livekit.RoomService/ListParticipants"
        async with http.post(path, data=b'{"room": "room"}', headers=headers) as response:
            recorded = next(raw for raw in recordings.room_service_answers() if raw.case == "nonexistent room")
            assert (response.status, await response.read()) == (200, recorded.body)
            assert set(recorded.headers) <= set(response.headers)
        async with http.post(path, data=b"{not json", headers=headers) as response:
            assert (response.status, (await response.json())["code"]) == (400, "malformed")
        async with http.post(path, data=b"\xff\xff", headers=headers | {"Content-Type": "application/protobuf"}) as response:
            assert (response.status, (await response.json())["code"]) == (400, "malformed")
        async with http.get(path, headers=headers) as response:
            assert (response.status, (await response.json())["code"]) == (404, "bad_route")
        async with http.post("/twirp/livekit.RoomService/Nothing", data=b"{}", headers=headers) as response:
            assert (response.status, (await response.json())["code"]) == (404, "bad_route")
        async with http.post(path, data=b"{}", headers=headers | {"Content-Type": "text/plain"}) as response:
            assert (response.status, (await response.json())["code"]) == (404, "bad_route")


async def test_livekits_own_receiver_accepts_the_webhooks() -> None:
    """Each webhook passes livekit-api's verification, in order, with the recorded headers."""
    async with receiving() as receiver, SandboxSfu(sfu_model(receiver.url)) as sfu:
        await sfu.call("create_room", "room")
        sid = await sfu.call("join", "room", "alice")
        await receiver.until(2)
        await sfu.call("leave", "room", "alice")
        await receiver.until(3)
    verifier = api.WebhookReceiver(api.TokenVerifier(KEY, SECRET))
    events = [verifier.receive(body, headers["Authorization"]) for headers, body in receiver.requests]
    assert [event.event for event in events] == ["room_started", "participant_joined", "participant_left"]
    assert events[-1].participant.sid == sid
    assert models.DisconnectReason.Name(events[-1].participant.disconnect_reason) == "CLIENT_INITIATED"
    recorded = recordings.load("join_leave").webhooks[0].headers
    for headers, _ in receiver.requests:
        assert set(headers) == set(recorded)
        assert (headers["User-Agent"], headers["Content-Type"]) == (recorded["User-Agent"], recorded["Content-Type"])


async def test_webhooks_are_tried_again() -> None:
    """A 503 with `Retry-After: 0` is tried again at once, under the same id and signature, and the next event follows."""
    async with receiving() as receiver, SandboxSfu(sfu_model(receiver.url)) as sfu:

        async def first_fails(number: int) -> web.StreamResponse:
            return web.Response(status=503, headers={"Retry-After": "0"}) if number == 1 else web.Response()

        receiver.answer = first_fails
        await sfu.call("create_room", "room")
        await sfu.call("join", "room", "alice", active_after=0)
        events = await receiver.until(3)
    assert [event["event"] for event in events] == ["room_started", "room_started", "participant_joined"]
    assert events[0] == events[1]
    assert receiver.requests[0][0]["Authorization"] == receiver.requests[1][0]["Authorization"]


async def test_a_hung_receiver_holds_up_one_room_and_no_exit() -> None:
    """One request per room hangs, others wait; another room goes on; leaving the sandbox ends all tasks."""
    async with receiving() as receiver:

        async def hang_for_one(number: int) -> web.StreamResponse:
            if json.loads(receiver.requests[number - 1][1])["room"]["name"] == "one":
                await asyncio.Event().wait()
            return web.Response()

        receiver.answer = hang_for_one
        before = asyncio.all_tasks()
        async with SandboxSfu(sfu_model(receiver.url)) as sfu:
            for room in ("one", "two"):
                await sfu.call("create_room", room)
                for name in ("alice", "bob"):
                    await sfu.call("join", room, name, active_after=0)
            await eventually(lambda: len(receiver.requests) == 4)
            await eventually(lambda: sfu.deliveries == 1)
            assert sfu.model.backlog() == 3
        await eventually(lambda: asyncio.all_tasks() <= before)


async def test_timers_of_the_model_run_in_real_time() -> None:
    """A participant that connects becomes ACTIVE by itself, and a delayed event runs out by itself."""
    async with SandboxSfu(sfu_model()) as sfu, SandboxHomeserver() as homeserver:
        await sfu.call("create_room", "room")
        await sfu.call("join", "room", "alice")
        delay_id = await homeserver.call("schedule", "@alice:hs.test", "!room:hs.test", "m.type", "", 50, {})
        await eventually(lambda: sfu.model.rooms["room"].sessions["alice"].state == "ACTIVE")
        await eventually(lambda: homeserver.model.events[delay_id].end is End.RAN_OUT)


async def test_an_injected_clock_drives_both() -> None:
    """With a clock of one's own, nothing happens before it says so and one nudges."""
    now = 1_800_000_000.0
    async with SandboxHomeserver(clock=lambda: now) as homeserver:
        delay_id = await homeserver.call("schedule", "@alice:hs.test", "!room:hs.test", "m.type", "", 3_600_000, {})
        now += 3599
        await homeserver.settle()
        assert homeserver.model.events[delay_id].end is End.PENDING
        now += 1
        homeserver.nudge()
        await eventually(lambda: homeserver.model.events[delay_id].end is End.RAN_OUT)


async def test_a_dead_sfu_refuses_connections_until_it_is_back() -> None:
    """After a kill the port is closed; after the start the same port answers again, and the rooms are forgotten."""
    async with SandboxSfu(sfu_model()) as sfu:
        await sfu.call("create_room", "room")
        url = sfu.url
        token = access_token(KEY, SECRET, time.time(), {"roomList": True})
        headers = {"Authorization": f"Bearer {token}"}

        async def rooms() -> Any:
            async with (
                aiohttp.ClientSession() as http,
                http.post(f"{url}/twirp/livekit.RoomService/ListRooms", json={}, headers=headers) as response,
            ):
                return (await response.json())["rooms"]

        assert len(await rooms()) == 1
        await sfu.call("kill")
        with pytest.raises(aiohttp.ClientConnectorError):
            await rooms()
        await sfu.call("start")
        assert await rooms() == []
        await sfu.call("faults", down=True)
        with pytest.raises(aiohttp.ClientConnectorError):
            await rooms()
        await sfu.call("faults", down=False, error=500)
        with pytest.raises(KeyError):
            await rooms()


async def test_another_process_can_drive_the_sfu() -> None:
    """The control listener does operations, reads state, sets faults, and refuses what makes no sense."""
    async with receiving() as receiver, SandboxSfu(sfu_model()) as sfu, aiohttp.ClientSession(sfu.control_url) as http:

        async def post(operation: str, **arguments: Any) -> tuple[int, Any]:
            async with http.post(f"/sandbox/{operation}", json=arguments) as response:
                return response.status, (await response.json()).get("result")

        assert await post("urls", urls=[receiver.url]) == (200, None)
        assert (await post("create_room", name="room"))[0] == 200
        _, (room, identity, sid) = await post("join_with_token", token=join_token(KEY, SECRET, time.time(), "room", "alice"))
        assert (room, identity) == ("room", "alice")
        await eventually(lambda: sfu.model.rooms["room"].sessions["alice"].state == "ACTIVE")
        assert await post("rooms") == (200, {"room": {"alice": {"sid": sid, "state": "ACTIVE"}}})
        assert (await post("vanish", room="room", identity="alice"))[0] == 200
        assert (await post("faults", empty_lists=True))[0] == 200
        assert sfu.model.faults.empty_lists
        assert (await post("delivery_faults", drop=1))[0] == 200
        assert (await post("leave", room="room", identity="alice"))[0] == 200
        assert await post("lost") == (200, {"fault": 1})
        assert (await post("leave", room="room", identity="alice"))[0] == 409
        assert (await post("leave", who="alice"))[0] == 400
        assert (await post("faults", nonsense=1))[0] == 400
        assert (await post("_finish", room="room"))[0] == 400
        assert (await post("join_with_token", token="garbage"))[0] == 409
        async with http.post("/sandbox/join", data=b"{") as response:
            assert response.status == 400
        assert [event["event"] for event in await receiver.until(2)] == ["room_started", "participant_joined"]


async def test_what_is_wrong_with_an_operation_is_said_in_a_sentence() -> None:
    """A room that is not there, arguments that do not fit, and an unknown fault are answered with what to do, and without names of the program."""
    async with SandboxSfu(sfu_model()) as sfu, aiohttp.ClientSession(sfu.control_url) as http:

        async def error(operation: str, **arguments: Any) -> str:
            async with http.post(f"/sandbox/{operation}", json=arguments) as response:
                return str((await response.json())["error"])

        assert "create_room" in await error("join", room="call", identity="alice")
        assert await error("create_room", room="call") == (
            "create_room: missing a required argument: 'name'. It takes name, empty_timeout (optional), departure_timeout (optional)."
        )
        assert (await error("urls")).startswith("urls takes")
        assert (await error("faults", nonsense=1)).startswith("faults: there is no 'nonsense'; there are: ")


async def test_a_delayed_event_over_http() -> None:
    """Schedule, restart, read, send and find the event in the room, as a client and a delegate do it; percent-encoded names arrive decoded."""
    async with SandboxHomeserver() as homeserver, aiohttp.ClientSession() as http:
        token = homeserver.model.register("alice")
        owner = {"Authorization": f"Bearer {token}"}
        async with http.get(f"{homeserver.url}/.well-known/matrix/client") as response:
            base = (await response.json())["m.homeserver"]["base_url"]
        async with http.get(f"{base}/_matrix/client/versions") as response:
            assert (await response.json())["unstable_features"]["org.matrix.msc4140"]
        put = URL(f"{base}/_matrix/client/v3/rooms/!r%3Ahs.test/state/m.type/_%40alice%2F1", encoded=True)
        async with http.put(put.with_query({"org.matrix.msc4140.delay": "60000"}), json={"left": 1}, headers=owner) as response:
            delay_id = (await response.json())["delay_id"]
        async with http.post(f"{base}{UNSTABLE}/{delay_id}/restart", json={}) as response:
            assert (response.status, await response.json()) == (200, {})
        async with http.get(f"{base}{UNSTABLE}/{delay_id}", headers=owner) as response:
            assert (await response.json())["state_key"] == "_@alice/1"
        async with http.post(f"{base}{UNSTABLE}/{delay_id}", json={"action": "send"}) as response:
            assert response.status == 200
        async with http.get(put, headers=owner) as response:
            assert await response.json() == {"left": 1}


async def test_an_openid_token_over_http() -> None:
    """A client asks for one, and whoever it shows it to learns its name; a user ID arrives decoded."""
    async with SandboxHomeserver() as homeserver, aiohttp.ClientSession(homeserver.url) as http:
        owner = {"Authorization": f"Bearer {homeserver.model.register('alice')}"}
        asked = URL(f"{homeserver.url}/_matrix/client/v3/user/%40alice%3Ahs.test/openid/request_token", encoded=True)
        async with http.post(asked, json={}, headers=owner) as response:
            openid = await response.json()
        for token, expected in ((openid["access_token"], (200, {"sub": "@alice:hs.test"})), ("another", (401, None))):
            async with http.get("/_matrix/federation/v1/openid/userinfo", params={"access_token": token}) as response:
                body = await response.json()
                assert (response.status, body if response.status == 200 else None) == expected


async def test_the_rate_limit_over_http() -> None:
    """The address is limited; a refused call has `Retry-After` and was held back."""
    clock = 1_800_000_000.0
    model = HomeserverModel(limit=RateLimit(1, 1))
    async with SandboxHomeserver(model, clock=lambda: clock) as homeserver, aiohttp.ClientSession(homeserver.url) as http:
        delay_id = await homeserver.call("schedule", "@alice:hs.test", "!r:hs.test", "m.type", "", 60_000, {})
        statuses = []
        for _ in range(2):
            async with http.post(f"{UNSTABLE}/{delay_id}/restart", json={}) as response:
                statuses.append((response.status, response.headers.get("Retry-After")))
        assert statuses == [(200, None), (429, "1")]


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ({"close": True}, aiohttp.ServerDisconnectedError),
        ({"done_but_not_told": True}, aiohttp.ServerDisconnectedError),
        ({"hang": True}, TimeoutError),
        ({"done_and_hangs": True}, TimeoutError),
        ({"latency": {"*": 60.0}}, TimeoutError),
        ({"down": True}, aiohttp.ClientConnectorError),
        ({"redirect": "http://127.0.0.1:1/"}, aiohttp.ClientConnectorError),
        ({"garbage": True}, ValueError),
        ({"html": 502}, aiohttp.ContentTypeError),
    ],
)
async def test_faults_are_those_of_sockets(faults: dict[str, Any], error: type[Exception]) -> None:
    """Each fault looks to an HTTP client as it would in the field, no handler is left behind, and all is well when it is lifted."""
    async with SandboxHomeserver(HomeserverModel(limit=None)) as homeserver:
        delay_id = await homeserver.call("schedule", "@alice:hs.test", "!r:hs.test", "m.type", "", 60_000, {})
        await homeserver.call("faults", **faults)
        timeout = aiohttp.ClientTimeout(total=0.2)

        async def restart() -> Any:
            async with (
                aiohttp.ClientSession(timeout=timeout) as http,
                http.post(f"{homeserver.url}{UNSTABLE}/{delay_id}/restart", json={}) as response,
            ):
                return await response.json()

        with pytest.raises(error):
            await restart()
        done = bool(homeserver.model.events[delay_id].restarted_at)
        assert done == any(name in faults for name in ("done_but_not_told", "done_and_hangs", "latency"))
        cleared: dict[str, Any] = {name: {} if name == "latency" else False if value is True else None for name, value in faults.items()}
        await homeserver.call("faults", **cleared)
        timeout = aiohttp.ClientTimeout(total=10)
        assert await restart() == {}


async def test_another_process_can_drive_the_homeserver() -> None:
    """Users, tokens, settings, faults, the log and the rooms' state by the control listener."""
    async with SandboxHomeserver() as homeserver, aiohttp.ClientSession(homeserver.control_url) as http:

        async def post(operation: str, **arguments: Any) -> tuple[int, Any]:
            async with http.post(f"/sandbox/{operation}", json=arguments) as response:
                return response.status, (await response.json()).get("result")

        _, token = await post("register", name="alice")
        assert homeserver.model.user_of(token) == "@alice:hs.test"
        event = {"user": "@alice:hs.test", "room": "!r:hs.test", "type_": "m.type", "state_key": "a", "delay_ms": 60_000, "content": {}}
        _, delay_id = await post("schedule", **event)
        assert (await post("manage", delay_id=delay_id, action="send"))[0] == 200
        assert (await post("manage", delay_id=delay_id, action="send"))[0] == 409
        _, log = await post("log")
        assert [(entry["end"], entry["user"]) for entry in log] == [("sent", "@alice:hs.test")]
        _, state = await post("state")
        assert [(entry["type"], entry["state_key"]) for entry in state] == [("m.type", "a")]
        settings = {"generations": "D", "mode": "proposal", "limit": {"per_second": 2, "burst": 3}}
        assert (await post("set", **settings))[0] == 200
        assert (homeserver.model.generations, homeserver.model.mode, homeserver.model.limit) == ("D", "proposal", RateLimit(2, 3))
        assert (await post("faults", status=500, only=["restart"]))[0] == 200
        assert homeserver.model.faults.only == frozenset({"restart"})
        _, openid = await post("openid_token", user="@alice:hs.test")
        assert openid["matrix_server_name"] == "hs.test"
        assert (await post("set", openid_sub="@carol:hs.test"))[0] == 200
        assert homeserver.model.openid_sub == "@carol:hs.test"
        assert (await post("set", seed=1))[0] == 400
        assert (await post("set", mode="unheard of"))[0] == 400
        assert await post("answers") == (200, [])


async def test_an_application_service_answers_for_the_homeserver() -> None:
    """It gets the same method, path, query, body and type, its own token instead of the user's, and who asks; its answer arrives as it is."""
    async with serving() as service, SandboxHomeserver() as homeserver, aiohttp.ClientSession() as http:
        packed = web.Response(status=418, body=gzip.compress(b"tea"), headers={"Content-Encoding": "gzip", "Content-Type": "text/x-tea"})
        packed.headers.add("X-Pot", "one")
        packed.headers.add("X-Pot", "two")
        packed.headers.add("X-Kept-Off", "1")
        packed.headers["Connection"] = "close, X-Kept-Off"
        service.answer = lambda: packed
        await homeserver.call("set_proxy", url=service.url + "/", hs_token=HS_TOKEN)
        token = homeserver.model.register("alice")
        asked = URL(f"{homeserver.url}{CLIENT_PATH}/a%2Fb%20c?x=%2F1&y=&Access_Token=secret", encoded=True)
        headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": "text/plain",
            "Accept-Language": "la",
            "X-Matrix-User-Identifier": "@mallory:hs.test",
        }
        async with http.put(asked, data=b"not JSON", headers=headers) as response:
            assert (response.status, await response.read()) == (418, b"tea")
            assert (response.content_type, response.headers.getall("X-Pot")) == ("text/x-tea", ["one", "two"])
            assert "X-Kept-Off" not in response.headers
        ((method, path, arrived, body),) = service.asked
        assert (method, path, body) == ("PUT", f"{CLIENT_PATH}/a%2Fb%20c?x=%2F1&y=", b"not JSON")
        for name in ("Host", "Content-Length"):
            del arrived[name]
        expected = {"Authorization": f"Bearer {HS_TOKEN}", "X-Matrix-User-Identifier": "@alice:hs.test", "Content-Type": "text/plain"}
        assert arrived == expected | {"Accept": "*/*", "Accept-Language": "la"}
        assert homeserver.model.answers == {("proxied", 418): 1}


async def test_who_is_not_let_through_to_the_application_service() -> None:
    """Whoever has no good token, and everybody where nothing is set up, never gets there; where nobody answers it is 500."""
    async with serving() as service, SandboxHomeserver() as homeserver, aiohttp.ClientSession(homeserver.url) as http:
        as_token = await homeserver.call("application_service")

        async def ask(token: str | None, **params: str) -> tuple[int, str | None]:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            async with http.post(CLIENT_PATH, json={}, headers=headers, params=params) as response:
                return response.status, (await response.json()).get("errcode")

        assert await ask(as_token) == (404, "M_UNRECOGNIZED")
        await homeserver.call("set_proxy", service.url, HS_TOKEN)
        assert await ask(None) == (401, "M_MISSING_TOKEN")
        assert await ask("unknown") == (401, "M_UNKNOWN_TOKEN")
        assert await ask(as_token, user_id="@alice:elsewhere.test") == (403, "M_FORBIDDEN")
        await homeserver.call("set", msc4512=False)
        assert await ask(as_token) == (404, "M_UNRECOGNIZED")
        await homeserver.call("set", msc4512=True)
        assert service.asked == []
        assert await ask(as_token, user_id="@alice:hs.test") == (200, None)
        assert service.asked[0][2]["X-Matrix-User-Identifier"] == "@alice:hs.test"
        await homeserver.call("faults", status=502, only=["proxied"])
        assert await ask(as_token) == (502, "M_UNKNOWN")
        await homeserver.call("faults", status=None)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        await homeserver.call("set_proxy", nobody, HS_TOKEN)
        assert await ask(as_token) == (500, "M_UNKNOWN")
        await homeserver.call("set_proxy", None)
        assert await ask(as_token) == (404, "M_UNRECOGNIZED")
        assert len(service.asked) == 1


async def test_one_homeserver_asks_another_for_its_application_service() -> None:
    """By `fed_proxy` to the other's service, which learns the asking server's name; a server that is down, and an unknown one, are 502."""
    async with (
        serving() as service,
        SandboxHomeserver() as homeserver,
        SandboxHomeserver(HomeserverModel("elsewhere.test")) as elsewhere,
        aiohttp.ClientSession(homeserver.url) as http,
    ):
        as_token = homeserver.model.application_service()
        await elsewhere.call("set_proxy", service.url, HS_TOKEN)
        await homeserver.call("set_remote", "elsewhere.test", elsewhere.url)

        async def ask(destination: str = "elsewhere.test", token: str = as_token, **more: Any) -> tuple[int, Any]:
            content = {"destination": destination, "method": "POST", "path": FED_PATH, **more}
            async with http.post(FED_PROXY, json=content, headers={"Authorization": f"Bearer {token}"}) as response:
                return response.status, await response.json()

        assert await ask(body={"room": "é"}, query={"a": "b c"}) == (200, {"status": 200, "content": {"jwt": "x"}})
        assert await ask(method="GET") == (200, {"status": 200, "content": {"jwt": "x"}})
        (method, path, headers, body), (get, get_path, get_headers, _) = service.asked
        assert (method, path, json.loads(body)) == ("POST", f"{FED_PATH}?a=b+c", {"room": "é"})
        assert (get, get_path) == ("GET", FED_PATH)
        for arrived in (headers, get_headers):
            assert (arrived["Authorization"], arrived["X-Matrix-Origin"]) == (f"Bearer {HS_TOKEN}", "hs.test")
            assert "X-Matrix-User-Identifier" not in arrived
        assert await ask(body={}) == (200, {"status": 400, "content": {"errcode": "M_NOT_JSON", "error": "Content not JSON."}})
        service.answer = lambda: web.Response(status=503, text="busy")
        assert await ask(body={"a": 1}) == (200, {"status": 503, "content": None})
        service.answer = lambda: web.Response(text="{}")
        failed = "IO.ELEMENT.MSC4512.M_FEDPROXY_CONNECTION_FAILED"
        for destination in ("elsewhere.test", "nowhere.test"):
            status, content = await ask(destination, body={"a": 1})
            assert (status, content["errcode"]) == (502, failed)
        assert (await ask(token=homeserver.model.register("alice"), body={"a": 1}))[0] == 403
        assert len(service.asked) == 4
        await elsewhere.call("faults", down=True)
        status, content = await ask(body={"a": 1})
        assert (status, content["errcode"]) == (502, failed)
        await homeserver.call("set_remote", "elsewhere.test", None)
        homeserver.model.remotes["elsewhere.test"] = lambda path, body: (200, {"asked": path})
        assert await ask(body={"a": 1}) == (200, {"status": 200, "content": {"asked": FED_PATH}})
        assert elsewhere.model.answers == {("proxied", 200): 3, ("proxied", 400): 1, ("proxied", 503): 1}


async def test_a_server_without_a_name_is_not_let_through() -> None:
    """The federation API wants to know who asks; a user's token says nothing there."""
    async with serving() as service, SandboxHomeserver() as homeserver, aiohttp.ClientSession(homeserver.url) as http:
        await homeserver.call("set_proxy", service.url, HS_TOKEN)
        user = {"Authorization": f"Bearer {homeserver.model.register('alice')}"}
        async with http.post(FED_PATH, json={}, headers=user) as response:
            assert (response.status, (await response.json())["errcode"]) == (401, "M_UNAUTHORIZED")
        assert service.asked == []


async def test_who_is_joined_over_http() -> None:
    """An application service asks about a room by its percent-encoded ID; another process says who joins and leaves."""
    async with (
        SandboxHomeserver() as homeserver,
        aiohttp.ClientSession(homeserver.url) as http,
        aiohttp.ClientSession(homeserver.control_url) as control,
    ):

        async def post(operation: str, **arguments: Any) -> tuple[int, Any]:
            async with control.post(f"/sandbox/{operation}", json=arguments) as response:
                return response.status, (await response.json()).get("result")

        alice = {"user": "@alice:hs.test", "room": "!r:hs.test"}
        _, as_token = await post("application_service", scopes=True, users="@.*:hs.test")
        where = URL(f"{homeserver.url}{MSC4502}rooms/%21r%3Ahs.test/is_joined?mxid=%40alice%3Ahs.test", encoded=True)

        async def asked() -> tuple[int, Any]:
            async with http.get(where, headers={"Authorization": f"Bearer {as_token}"}) as response:
                return response.status, await response.json()

        assert await asked() == (200, {"joined": False})
        assert await post("join", **alice) == (200, None)
        assert await asked() == (200, {"joined": True})
        assert await post("is_joined", **alice) == (200, True)
        assert (await post("leave", **alice))[0] == 200
        assert await asked() == (200, {"joined": False})
        assert (await post("put_state", **alice, type_="m.type", state_key="", content={}))[0] == 409
        assert (await post("set", msc4502=False))[0] == 200
        assert (await asked())[0] == 404
        assert (await post("set_proxy", url="http://127.0.0.1:1", hs_token=HS_TOKEN))[0] == 200
        assert homeserver.proxy == ("http://127.0.0.1:1", HS_TOKEN)
        assert (await post("set_proxy", address="http://127.0.0.1:1"))[0] == 400
        assert (await post("set_remote", server_name="a.test", url="http://127.0.0.1:1/"))[0] == 200
        assert homeserver.remotes == {"a.test": "http://127.0.0.1:1"}
        call = {"destination": "a.test", "method": "GET", "path": FED_PATH}
        async with http.post(FED_PROXY, json=call, headers={"Authorization": f"Bearer {as_token}"}) as response:
            assert response.status == 502
        _, (kept,) = await post("fed_calls")
        assert (kept["destination"], kept["path"], kept["body"]) == ("a.test", FED_PATH, None)


async def test_the_command_serves_both_until_interrupted() -> None:
    """`python -m sfu_delegate.sandbox` prints its addresses, works, and ends with status 0 at SIGTERM."""
    async with receiving() as receiver:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sfu_delegate.sandbox", "--webhook", receiver.url, "--auto-create", stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            addresses = json.loads(await process.stdout.readline())
            async with aiohttp.ClientSession() as http:
                async with http.post(f"{addresses['sfu_control']}/sandbox/join", json={"room": "room", "identity": "alice"}) as response:
                    assert response.status == 200
                async with http.get(f"{addresses['homeserver']}/_matrix/client/versions") as response:
                    assert response.status == 200
            assert [event["event"] for event in await receiver.until(2)] == ["room_started", "participant_joined"]
        finally:
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0


def test_retry_after_is_read_in_both_forms() -> None:
    """Seconds, or an HTTP date relative to now; nonsense is ignored."""
    assert seconds("3", 0) == 3
    assert seconds("Thu, 01 Jan 1970 00:01:00 GMT", 50) == 10
    assert seconds("Thu, 01 Jan 1970 00:01:00 GMT", 100) == 0
    assert seconds("soon", 0) is None
    assert seconds(None, 0) is None
