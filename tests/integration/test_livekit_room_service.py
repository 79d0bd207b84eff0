"""Asking an SFU, over real HTTP, where the answers are a real server's, and where they are anything else."""

import asyncio
import datetime
import ipaddress
import json
import socket
import ssl
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from livekit.api import LiveKitAPI, TokenVerifier
from livekit.protocol.room import ListParticipantsRequest
from sfu_delegate.delegation.model import Listed
from sfu_delegate.livekit import room_service
from sfu_delegate.livekit.room_service import RoomService, SfuAddress, SfuUnavailable, Trouble
from sfu_delegate.sandbox.server import SandboxSfu
from sfu_delegate.sandbox.sfu import SfuModel

from tests import recordings

KEY, SECRET = "devkey", "devsecretdevsecretdevsecretdevsecret"
LIST, CREATE = "/twirp/livekit.RoomService/ListParticipants", "/twirp/livekit.RoomService/CreateRoom"
REMOVE = "/twirp/livekit.RoomService/RemoveParticipant"
TIMEOUT = 20.0  # seconds; only where the answer comes at once
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server on loopback that answers everything by `handler`; gives host and port."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    try:
        yield "{}:{}".format(*runner.addresses[0][:2])
    finally:
        await runner.cleanup()


def answering(status: int, body: bytes | str, content_type: str = "application/json", **headers: str) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        content = body if isinstance(body, bytes) else body.encode()
        return web.Response(status=status, body=content, headers={"Content-Type": content_type, **headers})

    return handler


def sfu(address: str, scheme: str = "ws", secret: str = SECRET) -> SfuAddress:
    return SfuAddress("main", f"{scheme}://{address}", KEY, secret)


async def look(handler: Handler, room: str = "room-with-two") -> tuple[Listed, ...]:
    async with serving(handler) as address, RoomService() as service:
        return await service.look(sfu(address), room, TIMEOUT)


async def trouble(handler: Handler) -> SfuUnavailable:
    with pytest.raises(SfuUnavailable) as error:
        await look(handler)
    assert str(error.value) == error.value.sentence
    return error.value


@pytest.mark.parametrize("answer", recordings.room_service_answers(), ids=lambda answer: f"{answer.call}: {answer.case}")
async def test_recorded_answers_are_read_rightly(answer: recordings.RecordedAnswer) -> None:
    """Of all answers that a real server gives, a list is read as what it says, and every other one says nothing about anybody."""
    handler = answering(answer.status, answer.body, answer.headers["Content-Type"])
    if answer.call == "ListParticipants" and answer.status == 200:
        listed = await look(handler)
        expected = json.loads(answer.body)["participants"]
        assert listed == tuple(Listed(p["identity"], p["sid"], p["state"], int(p["joined_at_ms"])) for p in expected)
        return
    failed = await trouble(handler)
    if answer.status == 401:
        assert failed.trouble is Trouble.REFUSED
    # no piece of an answer: LiveKit quotes our token in some
    for word in answer.body.decode().replace('"', " ").split():
        assert len(word) < 20 or word not in failed.sentence


async def test_a_listed_participant_is_read_with_state_and_session() -> None:
    """Somebody who is only connecting is told apart from those who are in the call."""
    answer = next(a for a in recordings.room_service_answers() if a.case.startswith("room with two ACTIVE"))
    listed = {entry.identity: entry for entry in await look(answering(200, answer.body))}
    assert {identity: entry.state for identity, entry in listed.items()} == {"alice": "ACTIVE", "bob": "ACTIVE", "carol-never-completes": "JOINED"}
    assert listed["bob"].sid == "PA_CNmYCwemJEkT"
    assert listed["bob"].joined_at_ms > 1_700_000_000_000


async def test_a_recorded_room_is_created() -> None:
    """Creating a room tells its sid, and the same one again when it exists."""
    answers = [a for a in recordings.room_service_answers() if a.call == "CreateRoom" and a.status == 200 and a.request.find(b"room-with-two") > 0]
    assert len(answers) == 3
    for answer in answers:
        async with serving(answering(200, answer.body)) as address, RoomService() as service:
            assert await service.create_room(sfu(address), "room-with-two", TIMEOUT) == "RM_7KfVkoYmm5Wi"


async def test_the_question_is_livekits() -> None:
    """The calls are POSTs of snake_case JSON with a token for that one room, which livekit-api's verifier takes."""
    seen: list[tuple[str, str, Any, str]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((request.method, request.path, await request.json(), request.headers["Authorization"]))
        assert request.content_type == "application/json"
        return web.json_response({"participants": [], "sid": "RM_1", "name": "Zürich"})

    async with serving(handler) as address, RoomService() as service:
        assert await service.look(sfu(address), "Zürich", TIMEOUT) == ()
        assert await service.create_room(sfu(address), "Zürich", TIMEOUT, empty_timeout=7, departure_timeout=8) == "RM_1"
    assert [call[:3] for call in seen] == [
        ("POST", LIST, {"room": "Zürich"}),
        ("POST", CREATE, {"name": "Zürich", "empty_timeout": 7, "departure_timeout": 8}),
    ]
    for *_, authorization in seen:
        claims = TokenVerifier(KEY, SECRET).verify(authorization.removeprefix("Bearer "))
        assert claims.video is not None
        assert (claims.video.room, claims.video.room_admin, claims.video.room_join) == ("Zürich", True, None)


async def test_tokens_follow_the_given_clock() -> None:
    """The token's expiry comes from the clock that was handed in."""
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers["Authorization"])
        return web.json_response({"participants": []})

    async with serving(handler) as address, RoomService(clock=lambda: time.time() - 10_000) as service:
        await service.look(sfu(address), "r", TIMEOUT)
    with pytest.raises(Exception, match="expired"):
        TokenVerifier(KEY, SECRET).verify(seen[0].removeprefix("Bearer "))


@pytest.mark.parametrize(
    ("url", "http_url"),
    [
        ("ws://127.0.0.1:7880", "http://127.0.0.1:7880"),
        ("wss://sfu.example.com", "https://sfu.example.com"),
        ("WSS://sfu.example.com/", "https://sfu.example.com"),
        ("https://example.com/livekit/sfu/", "https://example.com/livekit/sfu"),
        ("http://[::1]:7880?x=y", "http://[::1]:7880"),
    ],
)
def test_the_url_of_clients_is_the_url_of_calls(url: str, http_url: str) -> None:
    """ws becomes http, wss becomes https, and a path is kept."""
    assert SfuAddress("main", url, KEY, SECRET).http_url == http_url


@pytest.mark.parametrize("url", ["", "sfu.example.com", "ftp://sfu.example.com", "wss://", "wss:///path", "http://["])
def test_other_urls_are_refused(url: str) -> None:
    """An SFU's address must be a URL that can be called."""
    with pytest.raises(ValueError, match="URL"):
        SfuAddress("main", url, KEY, SECRET)


def test_an_address_does_not_show_its_secret() -> None:
    """It can be logged by accident without telling the secret."""
    assert SECRET not in repr(SfuAddress("main", "ws://x", KEY, SECRET))


async def test_a_path_before_the_api_is_kept() -> None:
    """An SFU behind a reverse proxy may live under a path."""
    paths: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        paths.append(request.path)
        return web.json_response({"participants": []})

    async with serving(handler) as address, RoomService() as service:
        await service.look(sfu(f"{address}/livekit/sfu/"), "r", TIMEOUT)
    assert paths == ["/livekit/sfu" + LIST]


async def test_a_given_session_is_used_and_left_open() -> None:
    """Connections are shared with the session's owner, who closes it."""
    async with serving(answering(200, '{"participants":[]}')) as address, aiohttp.ClientSession() as session:
        service = RoomService(session)
        await service.look(sfu(address), "r", TIMEOUT)
        await service.close()
        assert not session.closed
        await service.look(sfu(address), "r", TIMEOUT)


async def test_an_own_session_can_be_closed_twice() -> None:
    """Closing without a call, and closing again, is harmless."""
    service = RoomService()
    await service.close()
    async with serving(answering(200, '{"participants":[]}')) as address:
        await service.look(sfu(address), "r", TIMEOUT)
    await service.close()
    await service.close()


@pytest.mark.parametrize(
    "body",
    [
        "",
        "OK",
        "null",
        "[]",
        "{}",
        '{"participants":null}',
        '{"participants":{}}',
        '{"participants":[null]}',
        '{"participants":["alice"]}',
        '{"participants":[{}]}',
        '{"participants":[{"identity":""}]}',
        '{"participants":[{"identity":5}]}',
        '{"participants":[{"identity":"alice","sid":5}]}',
        '{"participants":[{"identity":"alice","sid":"' + "P" * 257 + '"}]}',
        '{"participants":[{"identity":"alice","state":"AWAKE"}]}',
        '{"participants":[{"identity":"alice","state":4}]}',
        '{"participants":[{"identity":"alice","joined_at_ms":"soon"}]}',
        '{"participants":[{"identity":"alice","sid":"PA_1","state":"ACTIVE"},{"sid":"PA_2"}]}',
        '{"participants":[{"identity":"alice"}',
        '{"participants":[NaN]}',
        '{"participants":' + "[" * 100_000,
        b"\xff\xfe",
        b"\x0a\x07\x0a\x05PA_12",
        "<!DOCTYPE html><html><body>Please log in</body></html>",
    ],
)
async def test_nobody_is_absent_in_an_answer_that_is_not_livekits(body: str | bytes) -> None:
    """Status 200 with anything but a complete list, an empty body included, says nothing about anybody."""
    assert (await trouble(answering(200, body))).trouble is Trouble.ANSWER


@settings(deadline=None)  # each example starts a server
@given(st.one_of(st.binary(), st.text().map(str.encode)))
def test_arbitrary_answers_never_make_anybody_absent(body: bytes) -> None:
    """No garbage with status 200 is an empty room."""

    async def ask() -> None:
        await trouble(answering(200, body))

    asyncio.run(ask())


async def test_why_livekit_apis_client_is_not_used() -> None:
    """livekit-api takes an empty answer for an empty room. When this fails, its client can be looked at again."""
    async with serving(answering(200, b"")) as address, LiveKitAPI(f"http://{address}", KEY, SECRET) as client:
        answer = await client.room.list_participants(ListParticipantsRequest(room="r"))
    assert list(answer.participants) == []


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (401, "invalid token: aaa.bbb.ccc", Trouble.REFUSED, "API key and secret"),
        (401, '{"code":"unauthenticated","msg":"permissions denied"}', Trouble.REFUSED, "API key and secret"),
        (403, "", Trouble.REFUSED, "API key and secret"),
        (404, '{"code":"bad_route","msg":"x"}', Trouble.ANSWER, "bad_route"),
        (404, '{"code":"not_found","msg":"x"}', Trouble.ERROR, "404 (not_found)"),
        (404, "<html>not found</html>", Trouble.ANSWER, "proxy"),
        (204, "", Trouble.ANSWER, "proxy"),
        (400, '{"code":"malformed"}', Trouble.ERROR, "400 (malformed)"),
        (400, '{"code":"<script>"}', Trouble.ANSWER, "HTTP 400"),
        (429, "slow down", Trouble.ANSWER, "HTTP 429"),
        (500, '{"code":"internal","msg":"x"}', Trouble.ERROR, "500 (internal)"),
        (500, '["code"]', Trouble.ERROR, "HTTP 500."),
        (500, '{"code":["internal"]}', Trouble.ERROR, "HTTP 500."),
        (502, "<html>Bad Gateway</html>", Trouble.ERROR, "HTTP 502."),
        (503, '{"code":"unavailable","msg":"x"}', Trouble.ERROR, "503 (unavailable)"),
        (503, "x" * 1_000_000, Trouble.ERROR, "HTTP 503."),
    ],
)
async def test_failures_are_explained(status: int, body: str, kind: Trouble, words: str) -> None:
    """Each failure has its kind and a sentence that says what to look at, without a word of the answer."""
    failed = await trouble(answering(status, body))
    assert failed.trouble is kind
    assert words in failed.sentence
    assert "aaa.bbb" not in failed.sentence
    assert "<" not in failed.sentence


async def test_redirects_are_not_followed() -> None:
    """A redirect leads to some page, and would take our token there."""
    paths: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        paths.append(request.path)
        if request.path == LIST:
            return web.Response(status=302, headers={"Location": "/login"})
        return web.json_response({"participants": []})

    assert (await trouble(handler)).trouble is Trouble.ANSWER
    assert paths == [LIST]


async def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is read than a large room can need."""
    monkeypatch.setattr(room_service, "MAX_ANSWER", 1000)
    assert (await trouble(answering(200, '{"participants":[]}' + " " * 1000))).trouble is Trouble.ANSWER
    assert await look(answering(200, '{"participants":[]}' + " " * 900)) == ()


@pytest.mark.parametrize("body", ["{}", '{"sid":"RM_1"}', '{"sid":"RM_1","name":"another"}', '{"sid":5,"name":"r"}', '{"name":"r"}'])
async def test_a_room_counts_as_created_only_when_the_answer_says_so(body: str) -> None:
    """Creating is believed when the answer has the room's name and sid."""
    async with serving(answering(200, body)) as address, RoomService() as service:
        with pytest.raises(SfuUnavailable):
            await service.create_room(sfu(address), "r", TIMEOUT)


async def test_an_sfu_that_hangs_is_given_up() -> None:
    """When no answer comes within the timeout, nothing is known."""
    released = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        await released.wait()
        return web.Response()

    async with serving(handler) as address, RoomService() as service:
        with pytest.raises(SfuUnavailable, match=r"within 0.05 s") as error:
            await service.look(sfu(address), "r", 0.05)
        released.set()
    assert error.value.trouble is Trouble.TIMEOUT


async def test_an_answer_that_stops_halfway_is_given_up() -> None:
    """The timeout is for the whole answer, also where its beginning looks good."""
    released = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"participants":[')
        await released.wait()
        return response

    async with serving(handler) as address, RoomService() as service:
        with pytest.raises(SfuUnavailable) as error:
            await service.look(sfu(address), "r", 0.05)
        released.set()
    assert error.value.trouble is Trouble.TIMEOUT


@asynccontextmanager
async def raw(answer: bytes) -> AsyncIterator[str]:
    """A server that reads a request, answers these bytes, and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b'"room-with-two"}')
        writer.write(answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield "{}:{}".format(*server.sockets[0].getsockname())


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", Trouble.CONNECTION),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"participants":[]}', Trouble.CONNECTION),
        (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n13\r\n{"participants":[]}\r\n', Trouble.CONNECTION),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 19\r\nContent-Encoding: gzip\r\n\r\n{"participants":[]}', Trouble.CONNECTION),
        (b"SSH-2.0-OpenSSH_9.6\r\n", Trouble.ANSWER),
        (b"\x15\x03\x01\x00\x02\x02\x16", Trouble.ANSWER),
    ],
)
async def test_a_connection_that_breaks_says_nothing(answer: bytes, kind: Trouble) -> None:
    """An answer that was cut off, even one that could be read so far, or something that is not HTTP, counts as none."""
    async with raw(answer) as address, RoomService() as service:
        with pytest.raises(SfuUnavailable) as error:
            await service.look(sfu(address), "room-with-two", TIMEOUT)
    assert error.value.trouble is kind
    assert error.value.__context__ is None, "aiohttp's error holds our token"


async def test_an_sfu_that_is_down_is_unavailable() -> None:
    """Nobody listens there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with RoomService() as service:
            with pytest.raises(SfuUnavailable) as error:
                await service.look(sfu("{}:{}".format(*taken.getsockname())), "r", TIMEOUT)
    assert error.value.trouble is Trouble.CONNECTION


@pytest.mark.parametrize("host", ["sfu.invalid", "sfu..invalid", "x" * 300, "127.0.0.1:99999999", "user:password@127.0.0.1:1"])
async def test_an_address_that_cannot_be_used_is_unavailable(host: str) -> None:
    """Names that do not exist, and URLs that cannot be called, are failures like any other, and a password in one is not told."""
    async with RoomService() as service:
        with pytest.raises(SfuUnavailable) as error:
            await service.look(sfu(host), "r", TIMEOUT)
    assert error.value.trouble is Trouble.CONNECTION
    assert "password" not in error.value.sentence


@pytest.fixture(scope="module")
def self_signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for 127.0.0.1 that nobody trusts, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "self-signed.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


async def test_a_certificate_that_is_not_trusted_is_refused(self_signed: Path) -> None:
    """Our token goes to the real SFU only; the same certificate is taken from a session that trusts it."""
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(self_signed)
    async with serving(answering(200, '{"participants":[]}'), served) as address:
        async with RoomService() as service:
            with pytest.raises(SfuUnavailable, match="certificate") as error:
                await service.look(sfu(address, "wss"), "r", TIMEOUT)
        assert error.value.trouble is Trouble.TLS
        trusting = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=self_signed))
        async with aiohttp.ClientSession(connector=trusting) as session:
            assert await RoomService(session).look(sfu(address, "wss"), "r", TIMEOUT) == ()


async def test_tls_to_a_server_without_it_is_unavailable() -> None:
    """wss:// to a plain server fails as such."""
    async with serving(answering(200, '{"participants":[]}')) as address, RoomService() as service:
        with pytest.raises(SfuUnavailable) as error:
            await service.look(sfu(address, "wss"), "r", TIMEOUT)
    assert error.value.trouble is Trouble.TLS


async def test_being_cancelled_is_not_a_failure_of_the_sfu() -> None:
    """A look that is given up by us is cancelled, not unavailable."""
    arrived, released = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        arrived.set()
        await released.wait()
        return web.Response()

    async with serving(handler) as address, RoomService() as service:
        task = asyncio.create_task(service.look(sfu(address), "r", TIMEOUT))
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        released.set()


# ── removing somebody ──


async def removal(handler: Handler) -> bool:
    async with serving(handler) as address, RoomService() as service:
        return await service.remove(sfu(address), "room-with-two", "bob", TIMEOUT)


async def test_a_participant_is_removed() -> None:
    """From that room only, and nobody else; who is not there, or is no more, is no error, and neither is a room that is not there."""
    async with SandboxSfu(SfuModel({KEY: SECRET})) as server, RoomService() as service:
        address = sfu(server.url.removeprefix("http://"))
        for room in ("call", "elsewhere"):
            await server.call("create_room", room)
            for identity in ("alice", "bob"):
                await server.call("join", room, identity, active_after=0)
        assert await service.remove(address, "call", "alice", TIMEOUT) is True
        assert {name: set(room.sessions) for name, room in server.model.rooms.items()} == {"call": {"bob"}, "elsewhere": {"alice", "bob"}}
        assert await service.remove(address, "call", "alice", TIMEOUT) is False
        assert await service.remove(address, "call", "nobody", TIMEOUT) is False
        assert await service.remove(address, "nowhere", "bob", TIMEOUT) is False
        assert {name: set(room.sessions) for name, room in server.model.rooms.items()} == {"call": {"bob"}, "elsewhere": {"alice", "bob"}}


async def test_a_removal_is_asked_for_as_livekit_has_it() -> None:
    """One POST, of the identity to the letter, with a token for that one room that may do no more than it must."""
    seen: list[tuple[str, str, Any, str]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((request.method, request.path, await request.json(), request.headers["Authorization"]))
        return web.json_response({})

    async with serving(handler) as address, RoomService() as service:
        assert await service.remove(sfu(address), "Zürich", "@é/a b:example.org:D", TIMEOUT)
    ((method, path, asked, authorization),) = seen
    assert (method, path, asked) == ("POST", REMOVE, {"room": "Zürich", "identity": "@é/a b:example.org:D"})
    claims = TokenVerifier(KEY, SECRET).verify(authorization.removeprefix("Bearer "))
    assert claims.video is not None
    assert (claims.video.room, claims.video.room_admin, claims.video.room_join) == ("Zürich", True, None)


REMOVALS = [answer for answer in recordings.room_service_answers() if answer.call == "RemoveParticipant"]


@pytest.mark.parametrize("answer", REMOVALS, ids=lambda answer: answer.case)
async def test_recorded_answers_to_a_removal_are_read_rightly(answer: recordings.RecordedAnswer) -> None:
    """Removed, not there, or nothing is known."""
    handler = answering(answer.status, answer.body, answer.headers["Content-Type"])
    if answer.status in {200, 404}:
        assert await removal(handler) is (answer.status == 200)
    else:
        with pytest.raises(SfuUnavailable):
            await removal(handler)


def test_there_are_recorded_removals() -> None:
    """Of somebody who was there, and of somebody who was not."""
    assert {200, 404} <= {answer.status for answer in REMOVALS}


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, "", Trouble.ANSWER),
        (200, "<html>Please log in</html>", Trouble.ANSWER),
        (200, "[]", Trouble.ANSWER),
        (204, "", Trouble.ANSWER),
        (302, "", Trouble.ANSWER),
        (401, "invalid token: aaa.bbb.ccc", Trouble.REFUSED),
        (403, '{"code":"not_found"}', Trouble.REFUSED),
        (404, "<html>not found</html>", Trouble.ANSWER),
        (404, '{"code":"bad_route","msg":"x"}', Trouble.ANSWER),
        (404, '{"code":["not_found"]}', Trouble.ANSWER),
        (500, '{"code":"internal","msg":"not_found"}', Trouble.ERROR),
        (503, '{"code":"unavailable","msg":"x"}', Trouble.ERROR),
        (503, "not_found", Trouble.ERROR),
    ],
)
async def test_nothing_else_counts_as_removed_or_as_not_there(status: int, body: str, kind: Trouble) -> None:
    """Somebody is in the call still, so it has to be tried again; and no word of the answer is told, least of all our token."""
    with pytest.raises(SfuUnavailable) as error:
        await removal(answering(status, body))
    assert error.value.trouble is kind
    assert "aaa.bbb" not in str(error.value)


@pytest.mark.parametrize("fault", [{"down": True}, {"error": 500}, {"hang": True}])
async def test_an_sfu_that_fails_has_removed_nobody(fault: dict[str, Any]) -> None:
    """Not listening, failing, or silent; the error holds neither the token nor the secret."""
    async with SandboxSfu(SfuModel({KEY: SECRET})) as server, RoomService() as service:
        await server.call("create_room", "call")
        await server.call("join", "call", "alice", active_after=0)
        address = sfu(server.url.removeprefix("http://"))
        await server.call("faults", **fault)
        with pytest.raises(SfuUnavailable) as error:
            await service.remove(address, "call", "alice", 0.2)
        await server.call("faults", down=False, error=None, hang=False)
        assert set(server.model.rooms["call"].sessions) == {"alice"}
    told = "".join(traceback.format_exception(error.value))
    assert "eyJ" not in told
    assert SECRET not in told


async def test_with_a_wrong_secret_nobody_is_removed() -> None:
    """The sentence says what to look at, and does not hold the token, which LiveKit quotes."""
    async with SandboxSfu(SfuModel({KEY: SECRET})) as server, RoomService() as service:
        await server.call("create_room", "call")
        await server.call("join", "call", "alice", active_after=0)
        with pytest.raises(SfuUnavailable, match="API key and secret") as error:
            await service.remove(sfu(server.url.removeprefix("http://"), secret=SECRET[::-1]), "call", "alice", TIMEOUT)
        assert set(server.model.rooms["call"].sessions) == {"alice"}
    assert "eyJ" not in "".join(traceback.format_exception(error.value))


# ── deleting rooms ──


async def test_a_room_is_deleted() -> None:
    """The room is gone; of one that is not there that is said."""
    model = SfuModel({KEY: SECRET})
    async with SandboxSfu(model) as server, RoomService() as service:
        address = SfuAddress("main", server.url, KEY, SECRET)
        await service.create_room(address, "one", TIMEOUT)
        assert await service.delete_room(address, "one", TIMEOUT)
        assert model.rooms == {}
        assert not await service.delete_room(address, "one", TIMEOUT)


async def test_a_room_is_not_deleted_with_a_wrong_secret() -> None:
    """Nothing is deleted, and nobody takes that for a room that was not there."""
    model = SfuModel({KEY: SECRET})
    async with SandboxSfu(model) as server, RoomService() as service:
        await server.call("create_room", "one")
        with pytest.raises(SfuUnavailable) as raised:
            await service.delete_room(SfuAddress("main", server.url, KEY, "another" * 8), "one", TIMEOUT)
        assert raised.value.trouble is Trouble.REFUSED
        assert list(model.rooms) == ["one"]
