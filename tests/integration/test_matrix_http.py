"""The HTTP client against servers that behave and servers that do not."""

import asyncio
import socket
import ssl
import traceback
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.abc import ResolveResult
from sfu_delegate.matrix.http import MAX_BODY, HttpFailed
from sfu_delegate.matrix.keep_alive import KeepAliveClient

from tests.integration.daemon import until
from tests.integration.matrix_stand_in import Names, closed_port, make_authority, raw_server, read_request, served

SECRET = "delay-id-that-nobody-may-see"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture
async def client() -> AsyncIterator[KeepAliveClient]:
    http = KeepAliveClient()
    yield http
    await http.aclose()


def soon(seconds: float = 30.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def post(client: KeepAliveClient, base_url: str, *, repeatable: bool = False, deadline: float | None = None) -> bytes:
    answer = await client.post(f"{base_url}/{SECRET}", {"Authorization": f"Bearer {SECRET}"}, b"{}", deadline or soon(), repeatable=repeatable)
    return answer.body


async def failure(client: KeepAliveClient, base_url: str, *, repeatable: bool = False, deadline: float | None = None) -> HttpFailed:
    with pytest.raises(HttpFailed) as raised:
        await post(client, base_url, repeatable=repeatable, deadline=deadline)
    return raised.value


async def test_answer(client: KeepAliveClient) -> None:
    """An answer comes with its status, its headers by lower-case name, and its body."""

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        assert await request.read() == b"{}"
        assert request.headers["Accept-Encoding"] == "identity"
        response = web.Response(status=418, body=b"tea", headers={"X-One": "1"})
        response.headers.add("X-One", "2")
        return response

    async with served(handler) as url:
        answer = await client.post(url, {}, b"{}", soon())
    assert (answer.status, answer.headers["x-one"], answer.body, answer.whole) == (418, "1, 2", b"tea", True)


async def test_the_url_is_used_to_the_letter(client: KeepAliveClient) -> None:
    """Quoting is neither added nor taken away."""
    seen: list[str] = []

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request.raw_path)
        return web.Response()

    async with served(handler) as url:
        await client.get(f"{url}/a%2Fb%252e%20%C3%A4?user_id=%40a%3Ab", {}, soon())
    assert seen == ["/a%2Fb%252e%20%C3%A4?user_id=%40a%3Ab"]


async def test_connections_are_kept(client: KeepAliveClient) -> None:
    """Requests one after another use one connection."""
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await read_request(reader):
            writer.write(OK)

    async with raw_server(talk) as url:
        for _ in range(3):
            await post(client, url)
        assert connections == 1
        await client.aclose()


async def test_redirects_are_not_followed(client: KeepAliveClient) -> None:
    """A redirect is an answer; where it leads to is not asked."""
    paths: list[str] = []

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        paths.append(request.path)
        return web.Response(status=307, headers={"Location": "/elsewhere"})

    async with served(handler) as url:
        answer = await client.post(f"{url}/here", {}, b"{}", soon())
    assert (answer.status, paths) == (307, ["/here"])


async def test_cookies_are_not_kept(client: KeepAliveClient) -> None:
    """A cookie that a server sets does not come back."""
    cookies: list[str | None] = []

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        cookies.append(request.headers.get("Cookie"))
        return web.Response(headers={"Set-Cookie": "a=b"})

    async with served(handler) as url:
        await post(client, url)
        await post(client, url)
    assert cookies == [None, None]


async def test_huge_body(client: KeepAliveClient) -> None:
    """An endless answer is read up to the cap, and marked as not whole."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
            await writer.drain()

    async with raw_server(talk) as url:
        answer = await client.get(url, {}, soon())
    assert (len(answer.body), answer.whole) == (MAX_BODY, False)


async def test_body_at_the_cap(client: KeepAliveClient) -> None:
    """An answer of exactly the cap is whole."""

    async def handler(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=b"x" * MAX_BODY)

    async with served(handler) as url:
        answer = await client.get(url, {}, soon())
    assert (len(answer.body), answer.whole) == (MAX_BODY, True)


async def test_nobody_listens(client: KeepAliveClient) -> None:
    """A refused connection: certainly not sent."""
    failed = await failure(client, f"http://127.0.0.1:{closed_port()}")
    assert failed.certainly_not_sent
    assert "refused" in failed.reason


async def test_unknown_name() -> None:
    """A name without an address: certainly not sent."""
    client = KeepAliveClient(resolver=Names({}))
    failed = await failure(client, "http://nowhere.stand.in")
    assert failed.certainly_not_sent
    assert failed.reason == "the host name cannot be resolved"
    await client.aclose()


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example", "-.", "127.1", "0x7f000001"])
async def test_odd_names(client: KeepAliveClient, host: str) -> None:
    """Names that the Matrix grammar allows and DNS does not fail like any other (the numeric ones find nobody at that port)."""
    failed = await failure(client, f"http://{host}:{closed_port()}")
    assert failed.certainly_not_sent


async def test_untrusted_certificate(tmp_path: Path, client: KeepAliveClient) -> None:
    """A certificate of an unknown authority is refused before anything is sent; with its CA file it is accepted."""
    authority = make_authority(tmp_path)
    asked = 0

    async def handler(_request: web.BaseRequest) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        return web.Response(body=b"{}")

    async with served(handler, authority.server) as url:
        failed = await failure(client, url)
        assert failed.certainly_not_sent
        assert "certificate" in failed.reason
        assert asked == 0
        trusting = ssl.create_default_context(cafile=authority.ca_file)
        assert (await client.get(url, {}, soon(), ssl=trusting)).body == b"{}"


async def test_wrong_host_name(tmp_path: Path) -> None:
    """A certificate for another name is refused."""
    authority = make_authority(tmp_path)
    client = KeepAliveClient(resolver=Names({"other.example": ["127.0.0.1"]}))

    async def handler(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response()

    async with served(handler, authority.server) as url:
        trusting = ssl.create_default_context(cafile=authority.ca_file)
        with pytest.raises(HttpFailed, match="certificate") as raised:
            await client.get(url.replace("localhost", "other.example"), {}, soon(), ssl=trusting)
    assert raised.value.certainly_not_sent
    await client.aclose()


async def test_no_tls_at_all(client: KeepAliveClient) -> None:
    """A server that does not speak TLS: certainly not sent."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with raw_server(talk) as url:
        failed = await failure(client, url.replace("http:", "https:"))
    assert failed.certainly_not_sent


async def test_connecting_takes_too_long() -> None:
    """No connection within the connect timeout: certainly not sent."""

    async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()  # never answers the TLS handshake

    client = KeepAliveClient(connect_timeout=0.05)
    async with raw_server(talk) as url:
        failed = await failure(client, url.replace("http:", "https:"))
        await client.aclose()
    assert failed.certainly_not_sent
    assert failed.reason == "no connection within 0.05 s"


async def test_deadline_while_connecting() -> None:
    """The deadline holds for connecting too, and then nothing was sent."""

    async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    client = KeepAliveClient(connect_timeout=60)
    async with raw_server(talk) as url:
        failed = await failure(client, url.replace("http:", "https:"), deadline=soon(0.05))
        await client.aclose()
    assert failed.certainly_not_sent


async def test_no_answer(client: KeepAliveClient) -> None:
    """The server reads the request and says nothing until the deadline: perhaps done."""

    async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await reader.read()

    async with raw_server(talk) as url:
        failed = await failure(client, url, deadline=soon(0.1))
    assert not failed.certainly_not_sent
    assert failed.reason == "no answer in time"


async def test_dripping_answer(client: KeepAliveClient) -> None:
    """A body that comes byte by byte does not outlive the deadline."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not reader.at_eof():
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with raw_server(talk) as url:
        failed = await failure(client, url, deadline=soon(0.1))
        assert not failed.certainly_not_sent
        await client.aclose()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x00\x01\x02 garbage\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 banana\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
    ids=["nothing", "half a head", "half a body", "bad chunk", "garbage", "ssh", "bad status", "bad length", "huge header"],
)
@pytest.mark.parametrize("repeatable", [False, True])
async def test_broken_answers(client: KeepAliveClient, answer: bytes, repeatable: bool) -> None:
    """Whatever goes wrong after the request was sent: perhaps done, and asked once only."""
    asked = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += bool(await read_request(reader))
        writer.write(answer)

    async with raw_server(talk) as url:
        failed = await failure(client, url, repeatable=repeatable)
    assert not failed.certainly_not_sent
    assert asked == 1


async def test_closes_after_accept(client: KeepAliveClient) -> None:
    """A server that closes the connection without reading: what it took in cannot be known."""

    async def talk(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        return

    async with raw_server(talk) as url:
        failed = await failure(client, url)
    assert not failed.certainly_not_sent


async def one_answer_per_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Answers the first request of a connection as if it were to be kept, and closes it at the second."""
    first = await read_request(reader)
    writer.write(OK)
    return first + await read_request(reader)


@pytest.mark.parametrize(("repeatable", "connections"), [(True, 2), (False, 1)])
async def test_stale_connection(client: KeepAliveClient, repeatable: bool, connections: int) -> None:
    """A kept connection that is closed without an answer: repeated on a new one if that does no harm, else perhaps done."""
    made = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal made
        made += 1
        await one_answer_per_connection(reader, writer)

    async with raw_server(talk) as url:
        await post(client, url)
        if repeatable:
            assert await post(client, url, repeatable=True) == b"{}"
        else:
            assert not (await failure(client, url)).certainly_not_sent
        assert made == connections
        await client.aclose()


async def test_failed_repetition(client: KeepAliveClient) -> None:
    """When the repetition finds nobody, the first try may still have arrived."""
    server: asyncio.Server

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        await read_request(reader)
        server.close()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await post(client, url)
    failed = await failure(client, url, repeatable=True)
    assert not failed.certainly_not_sent
    assert "refused" in failed.reason


async def test_errors_hold_no_secrets(client: KeepAliveClient) -> None:
    """Neither the error nor anything that hangs on it shows the URL or a header."""
    failed = await failure(client, f"http://127.0.0.1:{closed_port()}")
    assert failed.__context__ is None
    assert failed.__cause__ is None
    text = "".join(traceback.format_exception(failed))
    assert f"Bearer {SECRET}" not in text
    assert f"/{SECRET}" not in repr(failed) + str(failed.args)


async def test_closed_client(client: KeepAliveClient) -> None:
    """After the end nothing is sent any more."""
    await client.aclose()
    failed = await failure(client, "http://127.0.0.1:9")
    assert failed.certainly_not_sent


async def test_bad_url(client: KeepAliveClient) -> None:
    """What is no URL is not sent anywhere."""
    for url in ("http://a:b:c/", "nothing", "ftp://a/"):
        with pytest.raises(HttpFailed) as raised:
            await client.get(url, {}, soon())
        assert raised.value.certainly_not_sent


async def test_each_of_many_gets_its_own_answer(client: KeepAliveClient) -> None:
    """However many share a few connections, and whoever is given up meanwhile."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await read_request(reader):
            path = request.split(b" ")[1]
            await asyncio.sleep(0.001 * (len(path) % 3))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(path), path))

    async def ask(number: int) -> None:
        path = f"/{'x' * (number % 7)}{number}"
        asking = asyncio.ensure_future(client.get(f"{url}{path}", {}, soon()))
        if number % 5 == 0:
            await asyncio.sleep(0.002)
            asking.cancel()
        answers = await asyncio.gather(asking, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError) or answers[0].body == path.encode()  # type: ignore[union-attr]

    async def one_after_another(first: int) -> None:
        for number in range(first, first + 20):
            await ask(number)

    async with raw_server(talk) as url, asyncio.timeout(60):
        await asyncio.gather(*(one_after_another(100 * n) for n in range(10)))


@pytest.mark.parametrize("headers", [{"A": "b\r\nC: d"}, {"A": "b\nC: d"}, {"A\r\nB": "c"}, {"A": "\0"}, {"A B": "c"}, {"A": "ü"}])
async def test_headers_cannot_be_smuggled_in(client: KeepAliveClient, headers: dict[str, str]) -> None:
    """Nothing is sent, and nobody is connected to."""
    with pytest.raises(HttpFailed) as raised:
        await client.get("http://127.0.0.1:1/", headers, soon())
    assert raised.value.certainly_not_sent
    assert "header" in raised.value.reason


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each request with its target, in pieces, so that the answers of several connections are under way at once."""
    while request := await read_request(reader):
        target = request.split(b" ", 2)[1]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(target))
        await asyncio.sleep(0)
        writer.write(b"\r\n" + target[:3])
        await asyncio.sleep(0)
        writer.write(target[3:])


async def test_everybody_gets_their_own_answer(client: KeepAliveClient) -> None:
    """Many requests by few at a time use as many connections, and each gets the answer to itself; some are given up in between."""
    connections = 0
    given_up = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await echo(reader, writer)

    async def ask_many(who: int) -> None:
        nonlocal given_up
        for number in range(60):
            path = f"/{who}/{number}"
            asking = asyncio.create_task(client.get(url + path, {}, soon()))
            if number % 7 == who % 7:
                for _ in range(number % 11):
                    await asyncio.sleep(0)
                given_up += asking.cancel()
            try:
                assert (await asking).body.decode() == path
            except asyncio.CancelledError:
                assert number % 7 == who % 7

    async with raw_server(talk) as url:
        await asyncio.gather(*(ask_many(who) for who in range(8)))
        assert connections <= 8 + given_up
        await client.aclose()


@pytest.mark.parametrize("cancelled", [True, False])
async def test_late_answers_reach_nobody(client: KeepAliveClient, cancelled: bool) -> None:
    """The answer to a request that was cancelled, or had no time left, is not given to the next one."""
    arrived, late = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await read_request(reader):
            if b"/slow" in request:
                arrived.set()
                await late.wait()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")
            else:
                writer.write(OK)

    async with raw_server(talk) as url:
        assert (await client.get(url, {}, soon())).body == b"{}"  # so that the slow one has a kept connection
        asking = asyncio.create_task(client.get(f"{url}/slow", {}, soon(30 if cancelled else 0.1)))
        await arrived.wait()
        if cancelled:
            asking.cancel()
        with pytest.raises(asyncio.CancelledError if cancelled else HttpFailed):
            await asking
        late.set()
        for _ in range(5):
            assert (await client.get(url, {}, soon())).body == b"{}"
        await client.aclose()


async def test_no_time_left(client: KeepAliveClient) -> None:
    """A request whose deadline has passed is not sent, not even by a kept connection."""
    asked = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while await read_request(reader):
            asked += 1
            writer.write(OK)

    async with raw_server(talk) as url:
        await post(client, url)
        assert (await failure(client, url, deadline=soon(-1))).certainly_not_sent
        await post(client, url)
        assert asked == 2
        await client.aclose()


async def until_none_is_open(client: KeepAliveClient) -> None:
    await until(lambda: not client._all, "all connections are closed")


@pytest.mark.parametrize("parting", [b"", b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 4\r\n\r\nlate", b"x", b"\r\n"])
async def test_idle_connection_that_ends(client: KeepAliveClient, parting: bytes) -> None:
    """A kept connection that the server closes, or says something on, is not used for the next request, not even one that is not repeatable."""
    connections = 0
    part = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await read_request(reader)
        writer.write(OK)
        await part.wait()
        writer.write(parting)
        if parting:
            await reader.read()

    async with raw_server(talk) as url:
        await post(client, url)
        part.set()
        await until_none_is_open(client)
        assert await post(client, url) == b"{}"
        assert connections == 2
        await client.aclose()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=1\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
    ],
    ids=["hint", "close", "HTTP/1.0", "two answers"],
)
async def test_connections_that_are_not_kept(client: KeepAliveClient, answer: bytes) -> None:
    """After such an answer the client closes the connection, and the next request has a new one."""
    ended = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal ended
        while await read_request(reader):
            writer.write(answer)
        ended += 1

    async with raw_server(talk) as url:
        for _ in range(3):
            assert await post(client, url) == b"{}"
        await until(lambda: ended == 3, "the client has closed all three")


@pytest.mark.parametrize("name", ["X", "Host", "Authorization"])
@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nX-Evil: 1", "a\rb", "a\x00b", "\u00e4", "\u560a"])
async def test_header_injection(client: KeepAliveClient, name: str, value: str) -> None:
    """A header with characters that would end it is refused before there is a connection."""
    with pytest.raises(HttpFailed) as raised:
        await client.get(f"http://127.0.0.1:{closed_port()}", {name: value}, soon())
    assert raised.value.certainly_not_sent
    assert raised.value.reason == "a header has characters that it cannot have"


@pytest.mark.parametrize("target", ["/a b", "/a\r\nX-Evil: 1", "/a HTTP/1.1\r\n\r\nGET /b", "/\u00e4", "/\x00", "/\t", "?a b", "/\x7f"])
async def test_request_target_injection(client: KeepAliveClient, target: str) -> None:
    """A URL with characters that would end the request target is refused before there is a connection."""
    with pytest.raises(HttpFailed) as raised:
        await client.get(f"http://127.0.0.1:{closed_port()}{target}", {}, soon())
    assert raised.value.certainly_not_sent
    assert raised.value.reason == "the URL is not valid"


@pytest.mark.parametrize("host", [".stand.in", "a..stand.in", "a" * 64 + ".stand.in", "."])
async def test_names_that_tls_cannot_ask_for(host: str) -> None:
    """A name that no certificate can be for is refused without a connection, whatever DNS says of it."""
    names = Names({host: ["127.0.0.1"]})
    client = KeepAliveClient(resolver=names)
    failed = await failure(client, f"https://{host}:{closed_port()}")
    assert (failed.certainly_not_sent, failed.reason) == (True, "the host name is not valid")
    assert names.asked == []
    await client.aclose()


async def test_verified_for_whom(tmp_path: Path) -> None:
    """A kept TLS connection is used for the same name and authorities only, and once it is there, no handshake is made again."""
    authority = make_authority(tmp_path)
    connections = 0

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal connections
        connections += not hasattr(request.transport, "seen")
        request.transport.seen = True  # type: ignore[union-attr]
        return web.Response(body=b"{}")

    client = KeepAliveClient()
    trusting, other = (ssl.create_default_context(cafile=authority.ca_file) for _ in range(2))
    async with served(handler, authority.server) as url:
        for _ in range(2):
            await client.get(url, {}, soon(), ssl=trusting)
        assert connections == 1
        await client.get(url, {}, soon(), ssl=trusting, server_hostname="a.stand.in")
        await client.get(url, {}, soon(), ssl=other)
        assert connections == 3
        for context, name in ((trusting, "other.example"), (None, None)):
            with pytest.raises(HttpFailed, match="certificate") as raised:
                await client.get(url, {}, soon(), ssl=context, server_hostname=name)
            assert raised.value.certainly_not_sent
        await client.aclose()


async def test_closed_while_waiting(client: KeepAliveClient) -> None:
    """A request that is waiting for its answer when the client is closed fails, and is not repeated."""
    asked: list[bytes] = []
    arrived = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await read_request(reader):
            asked.append(request)
            if len(asked) == 1:
                writer.write(OK)
            else:
                arrived.set()

    async with raw_server(talk) as url:
        await post(client, url)
        asking = asyncio.create_task(post(client, url, repeatable=True))
        await arrived.wait()
        await client.aclose()
        with pytest.raises(HttpFailed) as raised:
            await asking
    assert not raised.value.certainly_not_sent
    assert (len(asked), client._all) == (2, set())


async def test_closed_while_asking_for_a_name() -> None:
    """A request that is waiting for DNS when the client is closed fails like any other; the task that made it is not cancelled."""
    asked = asyncio.Event()

    class Slow(Names):
        async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
            asked.set()
            await asyncio.Event().wait()
            raise AssertionError

    client = KeepAliveClient(resolver=Slow({}))
    asking = asyncio.create_task(failure(client, "http://slow.stand.in"))
    await asked.wait()
    await client.aclose()
    failed = await asking
    assert (failed.certainly_not_sent, failed.reason) == (True, "the daemon is stopping")


async def test_names_are_asked_once() -> None:
    """Requests to one name at the same time share a lookup, and those soon after need none."""

    async def handler(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(headers={"Connection": "close"})

    names = Names({"a.stand.in": ["127.0.0.1"]})
    client = KeepAliveClient(resolver=names)
    async with served(handler) as url:
        url = url.replace("127.0.0.1", "a.stand.in")
        await asyncio.gather(*(client.get(url, {}, soon()) for _ in range(5)))
        await client.get(url, {}, soon())
    await client.aclose()
    assert names.asked == ["a.stand.in"]


async def test_nothing_is_left_over(client: KeepAliveClient) -> None:
    """Servers that close connections as soon as they are there leave nothing behind in the client."""

    async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with raw_server(talk) as url:
        failures = await asyncio.gather(*(failure(client, url) for _ in range(20)))
        assert not any(failed.certainly_not_sent for failed in failures)
        await until_none_is_open(client)
        assert (client._idle, client._idle_count) == ({}, 0)
