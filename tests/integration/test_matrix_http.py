"""The HTTP client against servers that behave and servers that do not."""

import asyncio
import ssl
import traceback
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from sfu_delegate.matrix.http import MAX_BODY, AiohttpClient, HttpFailed

from tests.integration.matrix_stand_in import Names, closed_port, make_authority, raw_server, read_request, served

SECRET = "delay-id-that-nobody-may-see"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture
async def client() -> AsyncIterator[AiohttpClient]:
    http = AiohttpClient()
    yield http
    await http.aclose()


def soon(seconds: float = 30.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def post(client: AiohttpClient, base_url: str, *, repeatable: bool = False, deadline: float | None = None) -> bytes:
    answer = await client.post(f"{base_url}/{SECRET}", {"Authorization": f"Bearer {SECRET}"}, b"{}", deadline or soon(), repeatable=repeatable)
    return answer.body


async def failure(client: AiohttpClient, base_url: str, *, repeatable: bool = False, deadline: float | None = None) -> HttpFailed:
    with pytest.raises(HttpFailed) as raised:
        await post(client, base_url, repeatable=repeatable, deadline=deadline)
    return raised.value


async def test_answer(client: AiohttpClient) -> None:
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


async def test_the_url_is_used_to_the_letter(client: AiohttpClient) -> None:
    """Quoting is neither added nor taken away."""
    seen: list[str] = []

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request.raw_path)
        return web.Response()

    async with served(handler) as url:
        await client.get(f"{url}/a%2Fb%252e%20%C3%A4?user_id=%40a%3Ab", {}, soon())
    assert seen == ["/a%2Fb%252e%20%C3%A4?user_id=%40a%3Ab"]


async def test_connections_are_kept(client: AiohttpClient) -> None:
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


async def test_redirects_are_not_followed(client: AiohttpClient) -> None:
    """A redirect is an answer; where it leads to is not asked."""
    paths: list[str] = []

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        paths.append(request.path)
        return web.Response(status=307, headers={"Location": "/elsewhere"})

    async with served(handler) as url:
        answer = await client.post(f"{url}/here", {}, b"{}", soon())
    assert (answer.status, paths) == (307, ["/here"])


async def test_cookies_are_not_kept(client: AiohttpClient) -> None:
    """A cookie that a server sets does not come back."""
    cookies: list[str | None] = []

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        cookies.append(request.headers.get("Cookie"))
        return web.Response(headers={"Set-Cookie": "a=b"})

    async with served(handler) as url:
        await post(client, url)
        await post(client, url)
    assert cookies == [None, None]


async def test_huge_body(client: AiohttpClient) -> None:
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


async def test_body_at_the_cap(client: AiohttpClient) -> None:
    """An answer of exactly the cap is whole."""

    async def handler(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=b"x" * MAX_BODY)

    async with served(handler) as url:
        answer = await client.get(url, {}, soon())
    assert (len(answer.body), answer.whole) == (MAX_BODY, True)


async def test_nobody_listens(client: AiohttpClient) -> None:
    """A refused connection: certainly not sent."""
    failed = await failure(client, f"http://127.0.0.1:{closed_port()}")
    assert failed.certainly_not_sent
    assert "refused" in failed.reason


async def test_unknown_name() -> None:
    """A name without an address: certainly not sent."""
    client = AiohttpClient(resolver=Names({}))
    failed = await failure(client, "http://nowhere.stand.in")
    assert failed.certainly_not_sent
    assert failed.reason == "the host name cannot be resolved"
    await client.aclose()


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example", "-.", "127.1", "0x7f000001"])
async def test_odd_names(client: AiohttpClient, host: str) -> None:
    """Names that the Matrix grammar allows and DNS does not fail like any other (the numeric ones find nobody at that port)."""
    failed = await failure(client, f"http://{host}:{closed_port()}")
    assert failed.certainly_not_sent


async def test_untrusted_certificate(tmp_path: Path, client: AiohttpClient) -> None:
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
    client = AiohttpClient(resolver=Names({"other.example": ["127.0.0.1"]}))

    async def handler(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response()

    async with served(handler, authority.server) as url:
        trusting = ssl.create_default_context(cafile=authority.ca_file)
        with pytest.raises(HttpFailed, match="certificate") as raised:
            await client.get(url.replace("localhost", "other.example"), {}, soon(), ssl=trusting)
    assert raised.value.certainly_not_sent
    await client.aclose()


async def test_no_tls_at_all(client: AiohttpClient) -> None:
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

    client = AiohttpClient(connect_timeout=0.05)
    async with raw_server(talk) as url:
        failed = await failure(client, url.replace("http:", "https:"))
        await client.aclose()
    assert failed.certainly_not_sent
    assert failed.reason == "no connection within 0.05 s"


async def test_deadline_while_connecting() -> None:
    """The deadline holds for connecting too, and then nothing was sent."""

    async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    client = AiohttpClient(connect_timeout=60)
    async with raw_server(talk) as url:
        failed = await failure(client, url.replace("http:", "https:"), deadline=soon(0.05))
        await client.aclose()
    assert failed.certainly_not_sent


async def test_no_answer(client: AiohttpClient) -> None:
    """The server reads the request and says nothing until the deadline: perhaps done."""

    async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await reader.read()

    async with raw_server(talk) as url:
        failed = await failure(client, url, deadline=soon(0.1))
    assert not failed.certainly_not_sent
    assert failed.reason == "no answer in time"


async def test_dripping_answer(client: AiohttpClient) -> None:
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
async def test_broken_answers(client: AiohttpClient, answer: bytes, repeatable: bool) -> None:
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


async def test_closes_after_accept(client: AiohttpClient) -> None:
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
async def test_stale_connection(client: AiohttpClient, repeatable: bool, connections: int) -> None:
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


async def test_failed_repetition(client: AiohttpClient) -> None:
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


async def test_errors_hold_no_secrets(client: AiohttpClient) -> None:
    """Neither the error nor anything that hangs on it shows the URL or a header."""
    failed = await failure(client, f"http://127.0.0.1:{closed_port()}")
    assert failed.__context__ is None
    assert failed.__cause__ is None
    text = "".join(traceback.format_exception(failed))
    assert f"Bearer {SECRET}" not in text
    assert f"/{SECRET}" not in repr(failed) + str(failed.args)


async def test_closed_client(client: AiohttpClient) -> None:
    """After the end nothing is sent any more."""
    await client.aclose()
    failed = await failure(client, "http://127.0.0.1:9")
    assert failed.certainly_not_sent


async def test_bad_url(client: AiohttpClient) -> None:
    """What is no URL is not sent anywhere."""
    for url in ("http://a:b:c/", "nothing", "ftp://a/"):
        with pytest.raises(HttpFailed) as raised:
            await client.get(url, {}, soon())
        assert raised.value.certainly_not_sent
