"""Every failed request gets the one error shape, and no secret gets out through it."""

import asyncio
import gzip
import socket
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from sfu_delegate.api import body as body_module
from sfu_delegate.api.errors import MatrixError, of_exception, one_error_shape, printable
from sfu_delegate.delegation.replies import TooMany
from structlog.testing import capture_logs

from tests.engine_port import Bench, delegation, serving, until


async def test_an_unknown_path() -> None:
    """404 M_UNRECOGNIZED, everywhere."""
    async with serving(Bench()) as client:
        for path in ("/", "/v1", "/v1/", "/v1/delegation", "/v1/delegations/", "/v1/delegations/a/b", "/metrics", "/health/live", "/%ff"):
            response = await client.get(path)
            assert (response.status, (await response.json())["errcode"]) == (404, "M_UNRECOGNIZED")


async def test_a_wrong_method() -> None:
    """405 M_UNRECOGNIZED, with the methods that there are."""
    async with serving(Bench()) as client:
        for method, path, allowed in (
            ("GET", "/v1/delegations", "POST"),
            ("PUT", "/v1/delegations/x", "DELETE, GET"),
            ("HEAD", "/v1/delegations/x", "DELETE, GET"),
            ("GET", "/webhooks/livekit", "POST"),
            ("OPTIONS", "/webhooks/livekit", "POST"),
        ):
            response = await client.request(method, path)
            assert (response.status, response.headers["Allow"]) == (405, allowed)
            if method != "HEAD":
                assert (await response.json())["errcode"] == "M_UNRECOGNIZED"


async def test_too_large_a_body() -> None:
    """413 M_TOO_LARGE, whether the length was announced or not, and however small it was when compressed."""
    bench = Bench()
    bench.configure(max_body=1000)

    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 100

    async with serving(bench) as client:
        for data, headers in (
            (b" " * 1001, {}),
            (chunks(), {}),
            (gzip.compress(b" " * 1_000_000), {"Content-Encoding": "gzip"}),
        ):
            response = await client.post("/v1/delegations", data=data, headers=bench.bearer() | headers)
            assert (response.status, (await response.json())["errcode"]) == (413, "M_TOO_LARGE")
        assert not bench.port.given


async def test_a_body_that_cannot_be_read() -> None:
    """Announced as gzip, and it is not: 400."""
    bench = Bench()
    async with serving(bench) as client:
        response = await client.post("/v1/delegations", data=b"not gzip", headers=bench.bearer() | {"Content-Encoding": "gzip"})
        assert response.status == 400


async def test_a_body_that_breaks_off() -> None:
    """The client is gone in the middle of its body: nothing is stored, and nothing is logged as our failure."""
    bench = Bench()
    with capture_logs() as logs:
        async with serving(bench) as client:
            server = client.server.handler
            connection = socket.create_connection((client.host, client.port))
            connection.sendall(
                f"POST /v1/delegations HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\nAuthorization: Bearer {bench.access_token()}\r\n\r\n{{".encode()
            )
            await until(lambda: server.connections)
            connection.close()
            await until(lambda: not server.connections)
    assert not bench.port.given
    assert not logs


async def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """408, and the connection is closed."""
    monkeypatch.setattr(body_module, "BODY_TIMEOUT", 0.01)
    bench = Bench()

    async def never() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    async with serving(bench) as client:
        response = await client.post("/v1/delegations", data=never(), headers=bench.bearer())
        assert (response.status, response.headers["Connection"]) == (408, "close")
        assert not bench.port.given


@pytest.mark.parametrize(
    ("request_line", "header"),
    [
        (b"GET /v1/delegations/dlg_00000000000000000000000000000000", b"Bearer \xff\xfe"),
        (b"GET /v1/delegations/\xff\xfe", b"Bearer x"),
        (b"POST /v1/delegations", b"Bearer \xed\xa0\x80.\xff.a"),
        (b"POST /v1/delegations?\xff=%ff", b"\xff"),
        (b"POST /webhooks/livekit", b"\xff.\xff.\xff"),
        (b"POST /webhooks/livekit", b"Bearer \xf0\x9f\x92\xa9"),
    ],
)
async def test_bytes_that_are_no_text(request_line: bytes, header: bytes) -> None:
    """Whatever bytes are in the path and the headers: a 4xx."""
    bench = Bench()
    with capture_logs() as logs:
        async with serving(bench) as client:
            reader, writer = await asyncio.open_connection(client.host, client.port)
            writer.write(request_line + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\nAuthorization: " + header + b"\r\n\r\n{}")
            status = (await reader.read()).split()[1]
            writer.close()
            await writer.wait_closed()
    assert status in (b"400", b"401")
    assert not bench.port.given
    assert not [line for line in logs if line["event"] not in ("webhook_refused", "delegation_refused")]


async def test_what_nobody_expected() -> None:
    """500 M_UNKNOWN; logged by type and place, and the exception's text, which may hold a secret, nowhere."""
    bench = Bench()
    bench.port.error = RuntimeError("syd_verysecretverysecret")
    with capture_logs() as logs:
        async with serving(bench) as client:
            response = await client.post("/v1/delegations", json=delegation(), headers=bench.bearer())
            text = await response.text()
    assert (response.status, (await response.json())["errcode"]) == (500, "M_UNKNOWN")
    assert "verysecret" not in text + repr(logs)
    assert [(line["event"], line["error"], line["path"], line["method"]) for line in logs] == [
        ("request_failed", "RuntimeError", "/v1/delegations", "POST")
    ]
    assert any("tests.engine_port" in frame for frame in logs[0]["at"])


async def test_an_unexpected_exception_has_cors_headers_too() -> None:
    """Otherwise a page would see a network error."""
    bench = Bench()
    bench.port.error = RuntimeError()
    with capture_logs():
        async with serving(bench) as client:
            response = await client.post("/v1/delegations", json=delegation(), headers=bench.bearer())
    assert response.headers["Access-Control-Allow-Origin"] == "*"


async def test_other_errors_of_the_http_library() -> None:
    """They have the same shape."""
    app = web.Application(middlewares=[one_error_shape(Bench().services.log)])

    async def refuse(_: web.Request) -> web.Response:
        raise web.HTTPUnsupportedMediaType

    async def large(_: web.Request) -> web.Response:
        raise web.HTTPRequestEntityTooLarge(10, 11)

    app.router.add_get("/a", refuse)
    app.router.add_get("/b", large)
    async with TestClient(TestServer(app)) as client:
        assert await (await client.get("/a")).json() == {"errcode": "M_UNKNOWN", "error": "Unsupported Media Type."}
        assert (await (await client.get("/b")).json())["errcode"] == "M_TOO_LARGE"


def test_when_to_try_again() -> None:
    """Milliseconds in the body, and whole seconds, at least one, in the header."""
    for seconds, header, ms in ((0.2, "1", 200), (1.5, "2", 1500), (30.0, "30", 30_000)):
        response = MatrixError(429, "M_LIMIT_EXCEEDED", "Slowly.", retry_after=seconds).response()
        assert response.headers["Retry-After"] == header
        assert f'"retry_after_ms":{ms}'.encode() in (response.body or b"")  # type: ignore[operator]


def test_a_limit() -> None:
    """429 with the sentence of the rules."""
    error = of_exception(TooMany("delegations.max_per_participant", 4, "Four are the most."))
    assert error is not None
    assert (error.status, error.errcode, error.error) == (429, "M_LIMIT_EXCEEDED", "Four are the most.")


@pytest.mark.parametrize("name", ["", "a b", "\n", "x" * 41, "ä", "\ud800", '"', "<b>", None, "1"])
def test_strange_names_are_not_repeated(name: object) -> None:
    """What a client calls a field is shown only if it is a plain word."""
    assert printable(name) == "?"
