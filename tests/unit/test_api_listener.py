"""The public listener: what it reads by itself everybody else reads in the same way, and nobody can tell who has read a request.

The daemon runs in uvloop, whose transports are not asyncio's: what goes over a socket is tried in both loops.
"""

import asyncio
import email.utils
import functools
import inspect
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import httptools
import pytest
import structlog
import uvloop
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from aiohttp.test_utils import TestClient, get_port_socket
from aiohttp.web_protocol import MAX_MSG_QUEUE_SIZE, RequestPayloadError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sfu_delegate.api import body as body_module
from sfu_delegate.api import listener as module
from sfu_delegate.api.errors import MatrixError
from sfu_delegate.api.listener import (
    IDLE_MOST,
    MAX_HEAD,
    MAX_HEADERS,
    READ_AHEAD,
    AtOnce,
    Listener,
    Soon,
    Usual,
    _Connection,
    _Request,
    _Unusual,
    read_usual,
)
from sfu_delegate.api.plain import Answer, Asked, Asker, Told, refusal
from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.delegation.model import Input
from sfu_delegate.delegation.replies import TooMany
from sfu_delegate.livekit.keys import SfuKey
from sfu_delegate.matrix.openid import OpenIdUnavailable
from structlog.testing import capture_logs

from tests import engine_port, recordings
from tests.engine_port import KEY, NOW, SERVER, Bench, ListenerServer, serving, until
from tests.webhook_requests import PATH, signature

GENEROUS = 20.0  # seconds until a test gives up
GET_TOKEN, DELEGATE = "/get_token", "/delegate_delayed_leave"
LINE = f"POST {PATH} HTTP/1.1".encode()
LIMIT = 1000


@pytest.fixture(autouse=True)
def by_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is usual is read by the listener, unless a test says otherwise."""
    monkeypatch.setattr(engine_port, "BY_LISTENER", True)


def on_each_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Have a test run in asyncio's own loop, and in the daemon's."""

    async def in_time(**given: Any) -> None:
        async with asyncio.timeout(GENEROUS):
            await test(**given)

    @functools.wraps(test)
    def run(*, new_loop: Callable[[], asyncio.AbstractEventLoop], **given: Any) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(in_time(**given))

    parameters = [*inspect.signature(test).parameters.values(), inspect.Parameter("new_loop", inspect.Parameter.KEYWORD_ONLY)]
    cast("Any", run).__signature__ = inspect.Signature(parameters)
    each: Callable[[Callable[..., None]], Callable[..., None]] = pytest.mark.parametrize(
        "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
    )
    return each(run)


# ── requests and answers as bytes ──


def post(path: str, body: bytes, *lines: str) -> bytes:
    """A usual request, with further header lines."""
    head = [f"POST {path} HTTP/1.1", "Host: sfu-delegate.example", *lines, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(head).encode() + body


def webhook(event: Any, key: SfuKey = KEY, *, at: float = NOW, path: str = PATH) -> bytes:
    """A webhook; `event` is its body, or what becomes its JSON."""
    body = event if isinstance(event, bytes) else json.dumps(event).encode()
    return post(path, body, f"Authorization: {signature(key, body, at)}", "Content-Type: application/webhook+json")


IGNORED = webhook({"event": "track_published"})
LEFT_BODY = json.dumps({"event": "participant_left", "room": {"name": "room", "sid": "RM_1"}, "participant": {"identity": "alice"}}).encode()
LEFT = webhook(LEFT_BODY)
REFUSED = post(PATH, b"{}", "Authorization: garbage")
MALFORMED = webhook(b"[]")
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: sfu-delegate.example\r\n\r\n"


class Got(NamedTuple):
    """An answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def by_aiohttp(self) -> bool:
        """Did aiohttp answer? It says so."""
        return "Server" in self.headers

    @property
    def comparable(self) -> tuple[int, dict[str, str], bytes]:
        """Without what may differ by who answered, and when."""
        return self.status, {name: value for name, value in self.headers.items() if name not in ("Server", "Date")}, self.body


def head_of(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers, each of which is there once."""
    first, *lines = head.decode("ascii").split("\r\n")
    assert first.startswith(("HTTP/1.1 ", "HTTP/1.0 "))
    headers = {name: value for name, _, value in (line.partition(": ") for line in lines)}
    assert len({name.lower() for name in headers}) == len(lines)
    return int(first.split(" ")[1]), headers


def answers(data: bytes) -> list[Got]:
    """All answers in what came, of which nothing may be left."""
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        status, headers = head_of(head)
        length = int(headers["Content-Length"])
        assert len(rest) >= length
        found.append(Got(status, headers, rest[:length]))
        data = rest[length:]
    return found


def cut(whole: bytes, places: list[int]) -> list[bytes]:
    """The pieces between the places (modulo the length)."""
    at = sorted({place % (len(whole) + 1) for place in places} | {0, len(whole)})
    return [whole[begin:end] for begin, end in pairwise(at)]


# ── what is read ──


def no_handler(_: Asked, __: Told) -> None:
    raise AssertionError("nothing is to be answered here")


ANY: Usual = AtOnce(no_handler, lambda: LIMIT)
PATHS: dict[bytes, Usual] = {LINE: ANY, b"POST /sfu_webhook HTTP/1.1": ANY, b"POST /livekit/jwt/get_token HTTP/1.1": ANY}


def read(data: bytes) -> _Request | None:
    """The request, or None as long as more of it is to come."""
    found = read_usual(data, PATHS)
    if isinstance(found, int):
        assert found > len(data)
        return None
    return found


def test_what_is_read() -> None:
    """The headers that matter, whatever their case and the blanks around them, and the body to the letter."""
    raw = (
        LINE + b"\r\nhost: a\r\nX-FORWARDED-FOR:192.0.2.1,\t192.0.2.2 \t\r\nAUTHORIZATION: \t a b\tc \r\nx-other:\r\nCookie: d=e; f\r\n"
        b"origin: https://a.example\r\ncontent-length:\t 005 \r\nConnection: Keep-Alive\r\nx-forwarded-for: \r\n\r\n\x00\r\n\r\nsurplus"
    )
    request = read(raw)
    assert request == _Request(LINE, ANY, "a b\tc", "https://a.example", ("192.0.2.1,\t192.0.2.2", ""), b"\x00\r\n\r\n", len(raw) - 7)


def test_what_is_not_there() -> None:
    """A header that is missing is None, and one without a value is empty."""
    bare = read(post(PATH, b""))
    assert bare is not None
    assert (bare.authorization, bare.origin, bare.forwarded, bare.body) == (None, None, (), b"")
    empty = read(post(PATH, b"", "Authorization:", "Origin: "))
    assert empty is not None
    assert (empty.authorization, empty.origin) == ("", "")


def test_each_path_has_its_own_handler() -> None:
    """By the whole request line."""
    other: Usual = AtOnce(no_handler, lambda: 2)
    paths: dict[bytes, Usual] = {LINE: ANY, LINE.replace(b"livekit", b"livekit2"): other}
    for path, usual in ((PATH, ANY), (PATH + "2", other)):
        request = read_usual(post(path, b"{}"), paths)
        assert isinstance(request, _Request)
        assert request.usual is usual


def test_the_limit_is_asked_anew() -> None:
    """A body of that many bytes is read, a larger one is not; a reload counts at once."""
    most = [10]
    paths: dict[bytes, Usual] = {LINE: AtOnce(no_handler, lambda: most[0])}
    assert isinstance(read_usual(post(PATH, b"x" * 10), paths), _Request)
    with pytest.raises(_Unusual):
        read_usual(post(PATH, b"x" * 11), paths)
    most[0] = 11
    assert read_usual(post(PATH, b"x" * 11), paths) is not None


def test_a_body_that_is_too_large_is_known_by_its_head() -> None:
    """It is not waited for."""
    raw = post(PATH, b"x" * (LIMIT + 1))
    with pytest.raises(_Unusual):
        read(raw[: -LIMIT - 1])


@pytest.mark.parametrize("begin", [b"", b"P", b"POST /", b"POST /s", LINE, LINE + b"\r", LINE + b"\r\n", LINE + b"\r\nX", LINE + b"\r\nX: y\r\n\r"])
def test_what_may_become_usual(begin: bytes) -> None:
    """It is waited for as long as nothing speaks against it."""
    assert read(begin) is None


@pytest.mark.parametrize("begin", [b"G", b"p", b" ", b"\n", b"\r\n", b"POST /x", b"POST /sfu_webhook?", LINE + b" ", LINE + b"\n", LINE[:-1] + b"0"])
def test_what_cannot_become_usual(begin: bytes) -> None:
    """It is aiohttp's with the first byte that is different."""
    with pytest.raises(_Unusual):
        read(begin)


@pytest.mark.parametrize("size", [MAX_HEAD - 200, MAX_HEAD + 200])
def test_the_size_of_a_head(size: int) -> None:
    """A large head is not read, whether it is whole or not."""
    lines = b"".join(b"X%d: %b\r\n" % (number, b"y" * 1000) for number in range(MAX_HEAD // 1007 - 2))
    begin = LINE + b"\r\nHost: a\r\nContent-Length: 0\r\n" + lines
    begin += b"X: " + b"y" * (size - len(begin) - 3)
    if size < MAX_HEAD:
        assert read(begin) is None
        assert read(begin + b"\r\n\r\n") is not None
        return
    for raw in (begin, begin + b"\r\n\r\n"):
        with pytest.raises(_Unusual):
            read(raw)


REQUEST_LINES = [
    *(b"", b"GET %b HTTP/1.1", b"post %b HTTP/1.1", b"POST %b HTTP/1.0", b"POST %b HTTP/1.2", b"POST %b HTTP/2.0", b"POST %b http/1.1", b"POST %b"),
    *(b"POST  %b HTTP/1.1", b"POST\t%b HTTP/1.1", b"POST %b  HTTP/1.1", b"POST %b HTTP/1.1 ", b" POST %b HTTP/1.1", b"\r\nPOST %b HTTP/1.1"),
    *(b"\nPOST %b HTTP/1.1", b"POST %b?a=b HTTP/1.1", b"POST %b? HTTP/1.1", b"POST %b# HTTP/1.1", b"POST %b/ HTTP/1.1", b"POST /%b HTTP/1.1"),
    *(b"POST /.%b HTTP/1.1", b"POST http://sfu-delegate.example%b HTTP/1.1", b"POST %b\x00 HTTP/1.1", b"POST %b\xff HTTP/1.1"),
    *(b"POST %b%%20 HTTP/1.1", b"OPTIONS * HTTP/1.1", b"CONNECT sfu-delegate.example:443 HTTP/1.1"),
]

LINES = [
    *(b"Transfer-Encoding: chunked", b"transfer-encoding: identity", b"TRANSFER-ENCODING: Chunked", b"Transfer-Encoding:"),
    *(b"Transfer-Encoding : chunked", b" Transfer-Encoding: chunked", b"X: y\nTransfer-Encoding: chunked", b"X: y\rTransfer-Encoding: chunked"),
    *(b"X: y\r\n Transfer-Encoding: chunked", b"Content-Length: 3", b"CONTENT-LENGTH: 12", b"Content-Length:", b"Content-Length : 12"),
    *(b"Content-Length\t: 12", b"Expect: 100-continue", b"expect: 100-Continue", b"Upgrade: websocket", b"Upgrade: h2c", b"HTTP2-Settings: AAA"),
    *(b"Connection: close", b"connection: Close", b"Connection: upgrade", b"Connection: keep-alive, close", b"Connection: content-length"),
    *(b"Connection:", b"Proxy-Connection: keep-alive", b"Proxy-Connection: close", b"Keep-Alive: timeout=5", b"TE: trailers"),
    *(b"Trailer: Content-Length", b"Content-Encoding: gzip", b"Content-Encoding: identity", b"no colon", b": no name", b" : blank", b"\tX: y"),
    *(b" X: y", b"X : y", b"X\x00: y", b"X: \x00", b"X: \x0b", b"X: \x7f", b"X: \x1b[0m", b"X: \xc3\xa4", b"X: \x80", b"X: \xff\xfe"),
    *(b"\xc3\xa4: y", b"X(y): z", b'"X": y', b"X\\: y", b"X/y: z", b"X: y\n", b"X: y\r", b"\n", b"\r"),
]

LENGTHS = [
    *(b"+12", b"-12", b"-0", b"0x12", b"1e1", b"12.0", b"1_2", b"12,", b"12, 12", b"12,12", b"12;", b"1 2", b"12 12", b"", b" ", b"a", b"\x0b12"),
    *("\u0661\u0662".encode(), "\uff11\uff12".encode(), b"\xb2", b"1234567890", b"0000000012", b"18446744073709551628", b"12\x00", b'"12"'),
]


@pytest.mark.parametrize("line", REQUEST_LINES, ids=repr)
def test_unusual_request_lines(line: bytes) -> None:
    """Another method, target or version is aiohttp's, however little differs."""
    line = line.replace(b"%b", PATH.encode()).replace(b"%%", b"%")
    with pytest.raises(_Unusual):
        read(line + b"\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")


@pytest.mark.parametrize("at", [0, 1, 2], ids=["first", "between", "last"])
@pytest.mark.parametrize("line", LINES, ids=repr)
def test_unusual_headers(line: bytes, at: int) -> None:
    """What says how the request is to be read, or can be read in two ways, is aiohttp's, wherever it stands."""
    lines = [b"Host: a", b"Content-Length: 12"]
    lines.insert(at, line)
    with pytest.raises(_Unusual):
        read(b"\r\n".join([LINE, *lines, b"", b'{"a": "bcd"}']))


@pytest.mark.parametrize("length", LENGTHS, ids=repr)
def test_unusual_lengths(length: bytes) -> None:
    """A length is a few ASCII digits and nothing else."""
    with pytest.raises(_Unusual):
        read(LINE + b"\r\nHost: a\r\nContent-Length: " + length + b'\r\n\r\n{"a": "bcd"}')


@pytest.mark.parametrize("name", ["Content-Length: 12", "Authorization: a", "Origin: https://a.example"])
def test_what_may_be_there_once(name: str) -> None:
    """Two of them are aiohttp's, the same or not."""
    with pytest.raises(_Unusual):
        read(post(PATH, b'{"a": "bcd"}', name, name.upper()))


@pytest.mark.parametrize("name", [b"Accept", b"Cookie", b"Via", b"Authorization", b"Host"])
def test_a_header_twice(name: bytes) -> None:
    """Only of X-Forwarded-For may there be several here; whether others may be there twice is for aiohttp to say."""
    with pytest.raises(_Unusual):
        read(LINE + b"\r\nHost: a\r\nContent-Length: 0\r\n" + (name + b": a\r\n") * 2 + b"\r\n")


@pytest.mark.parametrize("count", [MAX_HEADERS, MAX_HEADERS + 1])
def test_the_number_of_headers(count: int) -> None:
    """Many are aiohttp's, whether they are whole or not."""
    lines = [b"Host: a\r\n", b"Content-Length: 0\r\n", *(b"X%d:\r\n" % number for number in range(count - 2))]
    for end in (b"", b"\r\n"):
        raw = LINE + b"\r\n" + b"".join(lines) + end
        if count > MAX_HEADERS:
            with pytest.raises(_Unusual):
                read(raw)
        else:
            assert (read(raw) is not None) is bool(end)


def test_without_a_length() -> None:
    """A request that does not say where it ends is aiohttp's, and so is one without any header."""
    for raw in (LINE + b"\r\nHost: a\r\n\r\n", LINE + b"\r\n\r\n"):
        with pytest.raises(_Unusual):
            read(raw)


TOKENS = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0189!#$%&'*+-.^_`|~", min_size=1, max_size=8).map("X".__add__)
VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=12)
BLANKS = st.text(" \t", max_size=3)
OTHERS = st.sampled_from(["Accept: */*", "Accept-Encoding: gzip", "Connection: keep-alive", "Cookie: a=b", "Via: 1.1 proxy", "Sec-Fetch-Mode: cors"])
SINGLE = st.sampled_from(["User-Agent: Go-http-client/1.1", "Content-Type: application/json", "Max-Forwards: 5", "ETag: a"])
CUTS = st.lists(st.integers(0, 5000), max_size=12)


class Valid(NamedTuple):
    """A usual request, and what is to be read of it."""

    raw: bytes
    request: _Request


@st.composite
def usual_requests(draw: st.DrawFn) -> Valid:
    """Everything that may differ between usual requests."""
    cases: list[Callable[[str], str]] = [str.lower, str.upper, str.title, str]
    case = draw(st.sampled_from(cases))

    def blank() -> str:
        return draw(BLANKS)

    body = draw(st.binary(max_size=60))
    authorization, origin = draw(st.none() | VALUES), draw(st.none() | VALUES)
    forwarded = draw(st.lists(VALUES, max_size=3))
    named = st.lists(st.tuples(TOKENS, VALUES), max_size=3, unique_by=lambda header: header[0].lower())  # a header twice is not usual
    lines = [f"{name}:{value}" for name, value in draw(named)]
    lines += draw(st.lists(OTHERS, max_size=3, unique=True)) + draw(st.lists(SINGLE, max_size=3, unique=True))
    lines += [f"{case('Host')}:{blank()}a.example{blank()}", f"{case('Content-Length')}:{blank()}{'0' * draw(st.integers(0, 3))}{len(body)}{blank()}"]
    for name, value in (("Authorization", authorization), ("Origin", origin)):
        lines += [] if value is None else [f"{case(name)}:{blank()}{value}{blank()}"]
    lines = draw(st.permutations(lines))
    places = sorted(draw(st.lists(st.integers(0, len(lines)), min_size=len(forwarded), max_size=len(forwarded))))
    for number, (place, value) in enumerate(zip(places, forwarded, strict=True)):
        lines.insert(place + number, f"{case('X-Forwarded-For')}:{blank()}{value}{blank()}")
    line = draw(st.sampled_from(sorted(PATHS)))
    raw = line + b"\r\n" + "".join(line + "\r\n" for line in lines).encode() + b"\r\n" + body

    def stripped(value: str | None) -> str | None:
        return None if value is None else value.strip(" \t")

    hosts = tuple(value.strip(" \t") for value in forwarded)
    return Valid(raw, _Request(line, ANY, stripped(authorization), stripped(origin), hosts, body, len(raw)))


@given(usual_requests(), st.binary(max_size=20))
def test_any_cut(valid: Valid, behind: bytes) -> None:
    """A usual request is waited for until it is whole, wherever it is cut; then it is the same one, and ends where it ends."""
    for at in range(len(valid.raw)):
        assert read(valid.raw[:at]) is None
    assert read(valid.raw) == valid.request
    assert read(valid.raw + behind) == valid.request
    for at in range(valid.raw.find(b"\r\n\r\n") + 4, len(valid.raw)):
        assert read_usual(valid.raw[:at], PATHS) == len(valid.raw)


# ── and what others read of it ──


class Reading(NamedTuple):
    """What somebody reads of a request."""

    method: str
    path: str
    authorization: str | None
    origin: str | None
    forwarded: tuple[str, ...]
    body: bytes


NEXT = b"POST /next HTTP/1.1\r\nHost: next\r\nAuthorization: next\r\nContent-Length: 4\r\n\r\nnext"
READ_NEXT = Reading("POST", "/next", "next", None, (), b"next")

Reader = Callable[[bytes, asyncio.AbstractEventLoop], list[Reading]]
"""All whole requests in some bytes, read by somebody else."""


def aiohttp_reader(parser_class: type[HttpRequestParser]) -> Reader:
    def reader(data: bytes, loop: asyncio.AbstractEventLoop) -> list[Reading]:
        parser = parser_class(  # as aiohttp's server makes it
            BaseProtocol(loop),
            loop,
            2**18,
            max_line_size=8190,
            max_field_size=8190,
            max_headers=128,
            payload_exception=RequestPayloadError,
            auto_decompress=True,
            max_msg_queue_size=MAX_MSG_QUEUE_SIZE,
        )
        messages, upgraded, _ = parser.feed_data(data)
        assert not upgraded
        found = []
        for message, payload in messages:
            assert not message.should_close
            assert (message.chunked, message.compression) == (False, None)
            if payload.is_eof():
                one: Callable[[str], str | None] = message.headers.get
                forwarded = tuple(message.headers.getall("X-Forwarded-For", ()))
                found.append(Reading(message.method, message.path, one("Authorization"), one("Origin"), forwarded, payload.read_nowait()))
        return found

    return reader


def by_httptools(data: bytes, _: asyncio.AbstractEventLoop) -> list[Reading]:
    found: list[Reading] = []

    class Events:
        def on_message_begin(self) -> None:
            self.path, self.body = b"", b""
            self.headers: list[tuple[bytes, str]] = []

        def on_url(self, url: bytes) -> None:
            self.path += url

        def on_header(self, name: bytes, value: bytes) -> None:
            self.headers.append((name.lower(), value.decode().strip(" \t")))

        def on_body(self, body: bytes) -> None:
            self.body += body

        def on_message_complete(self) -> None:
            def all_of(name: bytes) -> tuple[str, ...]:
                return tuple(value for other, value in self.headers if other == name)

            one = {name: (*all_of(name), None)[0] for name in (b"authorization", b"origin")}
            assert parser.should_keep_alive()
            method, path = parser.get_method().decode(), self.path.decode()
            found.append(Reading(method, path, one[b"authorization"], one[b"origin"], all_of(b"x-forwarded-for"), self.body))

    parser = httptools.HttpRequestParser(Events())
    parser.feed_data(data)
    return found


READERS: dict[str, Reader] = {
    "aiohttp": aiohttp_reader(HttpRequestParser),
    "aiohttp in Python": aiohttp_reader(HttpRequestParserPy),
    "httptools": by_httptools,
}


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that does not run: aiohttp's parsers want one."""
    idle = asyncio.new_event_loop()
    yield idle
    idle.close()


def agreed(data: bytes, loop: asyncio.AbstractEventLoop) -> bool:
    """Is it read here? Then all others must read the same of it, and see its end in the same place."""
    try:
        request = read(data)
    except _Unusual:
        return False
    if request is None:
        return False
    whole = data[: request.end]
    path = whole.split(b" ", 2)[1].decode()
    here = Reading("POST", path, request.authorization, request.origin, request.forwarded, request.body)
    for name, reader in READERS.items():
        assert reader(whole[:-1], loop) == [], name
        assert reader(whole + NEXT, loop) == [here, READ_NEXT], name
    return True


def test_there_are_two_parsers_of_aiohttps() -> None:
    """The one in C is there, and is the one that the server uses."""
    assert HttpRequestParser is not HttpRequestParserPy
    assert HttpRequestParser.__module__ == "aiohttp._http_parser"


@given(usual_requests())
def test_others_read_the_same(loop: asyncio.AbstractEventLoop, valid: Valid) -> None:
    """A usual request is the same one to everybody."""
    assert agreed(valid.raw, loop)


SNIPPETS = st.sampled_from(
    [
        *(b"\n", b"\r", b"\r\n", b"\r\n\r\n", b"\n\n", b"\r\n ", b"\r\n\t", b"\n ", b"\r\r\n", b" ", b"\t", b"\x00", b"\x0b", b"\x0c", b"\x7f"),
        *(b"\x80", b"\xa0", b"\xff", b"\xc3\xa4", b"\xe2\x80\xa8", b":", b": ", b" :", b",", b", ", b";", b"0", b"1", b"9", b"+", b"-", b"_", b'"'),
        *(b"x", b"X", b"?", b"#", b"%20", b"%0d%0a", b"HTTP/1.1", b"POST ", b"http://a", b"close", b"chunked", b"Content-Length: 3\r\n"),
    ]
)
Change = Callable[[bytes], bytes]


def at_place(place: int, change: Callable[[bytes, bytes], bytes]) -> Change:
    """What changes the bytes before and after a place in the head, or shortly behind it."""

    def changed(raw: bytes) -> bytes:
        at = place % (raw.index(b"\r\n\r\n") + 8) if b"\r\n\r\n" in raw else 0
        return change(raw[:at], raw[at:])

    return changed


def at_line(place: int, change: Callable[[list[bytes], int], list[bytes]]) -> Change:
    """What changes the lines of the head."""

    def changed(raw: bytes) -> bytes:
        head, blank, rest = raw.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        return b"\r\n".join(change(lines, place % len(lines))) + blank + rest

    return changed


PLACES = st.integers(0, 5000)
CHANGES: st.SearchStrategy[Change] = st.one_of(
    st.builds(lambda at, new: at_place(at, lambda before, after: before + new + after), PLACES, SNIPPETS | st.binary(min_size=1, max_size=3)),
    st.builds(lambda at, new: at_place(at, lambda before, after: before + new + after[len(new) :]), PLACES, SNIPPETS),
    st.builds(lambda at, count: at_place(at, lambda before, after: before + after[count:]), PLACES, st.integers(1, 6)),
    st.builds(lambda at, count: at_place(at, lambda before, after: before + after[:count] + after), PLACES, st.integers(1, 30)),
    st.builds(lambda at, new: at_line(at, lambda lines, at: [*lines[: at + 1], new, *lines[at + 1 :]]), PLACES, st.sampled_from(LINES)),
    st.builds(
        lambda at, name, value: at_line(at, lambda lines, at: [*lines[: at + 1], f"{name}:{value}".encode(), *lines[at + 1 :]]),
        PLACES,
        TOKENS,
        VALUES,
    ),
    st.builds(lambda at: at_line(at, lambda lines, at: [*lines[: at + 1], *lines[at:]]), PLACES),
    st.builds(lambda at: at_line(at, lambda lines, at: [*lines[:at], *lines[at + 1 :]]), PLACES),
    st.builds(lambda at, lines: at_line(at, lambda old, at: old[:1] + old[at:] + old[1:at]), PLACES, st.none()),
    st.builds(lambda length: lambda raw: re.sub(rb"(?i)(content-length:)[^\r]*", lambda match: match[1] + length, raw), st.sampled_from(LENGTHS)),
    st.builds(lambda line: lambda raw: line.replace(b"%b", PATH.encode()) + raw[raw.find(b"\r\n") :], st.sampled_from(REQUEST_LINES)),
)
WITH_ALL = post(PATH, b'{"a": "bcd"}', "Authorization: abc.def", "X-Forwarded-For: 192.0.2.7", "Origin: null", "Connection: keep-alive")


@settings(max_examples=1500)
@given(usual_requests().map(lambda valid: valid.raw), st.lists(CHANGES, min_size=1, max_size=3), st.booleans())
def test_changed_requests(loop: asyncio.AbstractEventLoop, raw: bytes, changes: list[Change], simple: bool) -> None:
    """Whatever is changed in a request: if it is read here at all, everybody reads the same of it, and sees its end in the same place."""
    raw = WITH_ALL if simple else raw
    for change in changes:
        raw = change(raw)
    agreed(raw, loop)


ODD_BYTES = [*range(0x31), *b"9:;<=>?@AZ[\\]^_`az{|}~", 0x7F, 0x80, 0x85, 0xA0, 0xB2, 0xC3, 0xE2, 0xFF]


def test_each_byte_changed(loop: asyncio.AbstractEventLoop) -> None:
    """The same with each byte of the head left out, doubled, replaced by an odd one, or with an odd one before it."""
    read_here = total = 0
    for at in range(WITH_ALL.index(b"\r\n\r\n") + 5):
        before, byte, after = WITH_ALL[:at], WITH_ALL[at : at + 1], WITH_ALL[at + 1 :]
        changed = {before + after, before + byte + byte + after}
        changed |= {before + bytes([odd]) + after for odd in ODD_BYTES} | {before + bytes([odd]) + byte + after for odd in ODD_BYTES}
        read_here += sum(agreed(raw, loop) for raw in changed)
        total += len(changed)
    assert total > read_here > 1000


REFUSED_BY_AIOHTTP = {
    "no Host": LINE + b"\r\nContent-Length: 2\r\n\r\n{}",
    "two Hosts": post(PATH, b"{}", "Host: b.example"),
    "two Content-Types": post(PATH, b"{}", "Content-Type: a/b", "content-type: a/b"),
    "two User-Agents": post(PATH, b"{}", "User-Agent: a", "User-Agent: b"),
    "two ETags": post(PATH, b"{}", "ETag: a", "ETag: b"),
    "two Servers": post(PATH, b"{}", "Server: a", "Server: b"),
    "two Content-Locations": post(PATH, b"{}", "Content-Location: /a", "Content-Location: /b"),
    "two Content-Ranges": post(PATH, b"{}", "Content-Range: a", "Content-Range: b"),
    "two Max-Forwards": post(PATH, b"{}", "Max-Forwards: 1", "Max-Forwards: 2"),
    "an old WebSocket": post(PATH, b"{}", "Sec-WebSocket-Key1: a"),
    "too many headers": post(PATH, b"{}", *["X: y"] * 127),
    "too long a line": post(PATH, b"{}", "X: " + "y" * 8200),
}


@pytest.mark.parametrize("raw", REFUSED_BY_AIOHTTP.values(), ids=REFUSED_BY_AIOHTTP.keys())
def test_what_aiohttp_would_refuse(loop: asyncio.AbstractEventLoop, raw: bytes) -> None:
    """A request that is none to aiohttp is none here: it is aiohttp's to refuse."""
    with pytest.raises(Exception, match="400"):
        READERS["aiohttp"](raw, loop)
    with pytest.raises(_Unusual):
        read(raw)


# ── a connection, fed by hand ──


async def echo(request: web.Request) -> web.Response:
    """What aiohttp does with everything here."""
    return web.Response(body=await request.read())


def echo_at_once(asked: Asked, told: Told) -> None:
    told(Answer(200, {}, asked.body))


@dataclass
class Waiting:
    """A handler that answers when a test does."""

    asked: list[Asked] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    cancelled: int = 0

    def take(self, asked: Asked, told: Told) -> None:
        self.asked.append(asked)
        self.told.append(told)

    async def answer(self, asked: Asked) -> Answer:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.take(asked, answer.set_result)
        try:
            return await answer
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def give(self, body: bytes = b"{}") -> None:
        """Answer the request that has waited for longest."""
        self.told.pop(0)(Answer(200, {}, body))


@asynccontextmanager
async def listening(
    usual: Mapping[str, Usual], handler: Callable[[web.Request], Awaitable[web.StreamResponse]] = echo, *, closed_within: float = GENEROUS
) -> AsyncIterator[Listener]:
    """A listener with these handlers, and aiohttp for everything."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    listener = Listener(app, usual, structlog.stdlib.get_logger("test"), closed_within=closed_within)
    await listener.start(get_port_socket("127.0.0.1", 0, socket.AF_INET))
    try:
        yield listener
    finally:
        await listener.close()


class Wire(asyncio.Transport):
    """A transport to nowhere. The client takes what is written at once, or, if it is slow, when a test says so."""

    HIGH_WATER = 64 * 1024

    def __init__(self, listener: Listener, peer: tuple[Any, ...] | None = ("192.0.2.1", 40000), *, slow: bool = False) -> None:
        self.options: list[tuple[Any, ...]] = []
        connection = SimpleNamespace(family=None, setsockopt=lambda *option: self.options.append(option))
        super().__init__({"peername": peer, "socket": connection})
        self.written = bytearray()
        self.slow = slow
        self.untaken = 0  # bytes that are written and not taken
        self.reading = True
        self.closing = False
        self.lost = False
        self._full = False
        self._protocol: asyncio.BaseProtocol = _Connection(listener)
        self._protocol.connection_made(self)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def feed(self, *pieces: bytes) -> None:
        """The client sends."""
        for piece in pieces:
            assert self.reading
            cast("asyncio.Protocol", self._protocol).data_received(piece)

    def take(self) -> None:
        """A slow client takes all there is."""
        self.untaken = 0
        if self._full:
            self._full = False
            self._protocol.resume_writing()
        if self.closing:
            self.lose()

    def lose(self) -> None:
        """The connection ends, whoever ended it."""
        self.closing, self.reading = True, False
        if not self.lost:
            self.lost = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    @property
    def connection(self) -> _Connection:
        """While it is the listener's."""
        assert isinstance(self._protocol, _Connection)
        return self._protocol

    def handed_over(self) -> bool:
        return not isinstance(self._protocol, _Connection)

    @property
    def bodies(self) -> list[bytes]:
        """Of all answers so far."""
        return [got.body for got in answers(bytes(self.written))]

    # as the connection sees it

    def write(self, data: Any) -> None:
        assert not self.closing
        self.written += data
        if self.slow:
            self.untaken += len(data)
            if self.untaken > self.HIGH_WATER and not self._full:
                self._full = True
                self._protocol.pause_writing()

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_reading(self) -> bool:
        return self.reading

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing, self.reading = True, False
        if not self.untaken:
            self.lose()

    def abort(self) -> None:
        self.lose()


async def settle() -> None:
    """Let everything run that is ready."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_a_handler_is_told() -> None:
    """Where a request comes from, by the connection and by the proxies, and what it says."""
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: LIMIT)}) as listener:
        for peer in (("192.0.2.1", 40000), ("2001:db8::1", 40000, 0, 0), None):
            Wire(listener, peer).feed(post(PATH, b"{}", "X-Forwarded-For: a, b", "Authorization: c", "X-Forwarded-For: d", "Origin: e"))
            waiting.give()
        assert waiting.asked == [Asked(Asker(peer, ("a, b", "d")), "c", "e", b"{}") for peer in ("192.0.2.1", "2001:db8::1", "")]


async def test_dead_clients_are_found_out() -> None:
    """By TCP's keep-alive."""
    async with listening({}) as listener:
        assert Wire(listener).options == [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]


class Step(NamedTuple):
    """One request of a series, and what is to be answered."""

    raw: bytes
    body: bytes
    usual: bool


@st.composite
def series(draw: st.DrawFn) -> list[Step]:
    """Requests to handlers of all kinds, and some that are aiohttp's; each with a body of its own."""
    steps = []
    for number, kind in enumerate(draw(st.lists(st.sampled_from(["at-once", "soon", "later", "chunked", "elsewhere", "expects"]), max_size=6))):
        body = b"%d %b" % (number, draw(st.binary(max_size=20)))
        raw = post("/" + kind, body)
        if kind == "chunked":
            raw = b"POST /at-once HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        steps.append(Step(raw, body, kind in ("at-once", "soon", "later")))
    return steps


async def answered_bodies(steps: list[Step], places: list[int], hasty: bool) -> tuple[list[bytes], bool]:
    async def echo_soon(asked: Asked) -> Answer:
        for _ in range(3):
            await asyncio.sleep(0)
        return Answer(200, {}, asked.body)

    def echo_later(asked: Asked, told: Told) -> None:
        asyncio.get_running_loop().call_soon(told, Answer(200, {}, asked.body))

    usual: dict[str, Usual] = {
        "/at-once": AtOnce(echo_at_once, lambda: LIMIT),
        "/soon": Soon(echo_soon, lambda: LIMIT),
        "/later": AtOnce(echo_later, lambda: LIMIT),
    }
    async with asyncio.timeout(GENEROUS), listening(usual) as listener:
        wire = Wire(listener)
        for piece in cut(b"".join(step.raw for step in steps), places):
            wire.feed(piece)
            if not hasty:
                await asyncio.sleep(0)
        await until(lambda: bytes(wire.written).count(b"HTTP/1.1 ") == len(steps))
        await settle()
        return wire.bodies, wire.handed_over()


@given(series(), CUTS, st.booleans())
@example([Step(post("/soon", b"0"), b"0", True), Step(HEALTH, b"", False), Step(post("/at-once", b"2"), b"2", True)], [], True)
def test_answers_come_in_order(steps: list[Step], places: list[int], hasty: bool) -> None:
    """However a series of requests is cut, and whoever answers each of them: the answers are theirs, in their order."""
    bodies, handed_over = asyncio.run(answered_bodies(steps, places, hasty))
    assert bodies == [step.body for step in steps]
    assert handed_over == (not all(step.usual for step in steps))


async def test_one_after_the_other() -> None:
    """What comes behind a request that waits is not begun before that one is answered."""
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        wire.feed(post(PATH, b"1") + post(PATH, b"2") + post(PATH, b"3")[:-1], b"3")
        for number in range(1, 4):
            assert len(waiting.asked) == number
            assert len(wire.bodies) == number - 1
            waiting.give(b"%d" % number)
        assert wire.bodies == [b"1", b"2", b"3"]


async def test_what_comes_behind_is_aiohttps_after_the_answer() -> None:
    """Another request behind one that waits is handed over once that one is answered, and everything behind it too."""
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        wire.feed(post(PATH, b"1") + post("/else", b"2") + post(PATH, b"3"))
        await settle()
        assert not wire.written
        assert not wire.handed_over()
        waiting.give(b"1")
        await until(lambda: len(wire.bodies) == 3)
        assert wire.bodies == [b"1", b"2", b"3"]
        assert len(waiting.asked) == 1
        assert [got.by_aiohttp for got in answers(bytes(wire.written))] == [False, True, True]


async def test_many_at_once() -> None:
    """Thousands of requests that came in one piece are answered without one call within the other."""
    count = 5000
    async with listening({PATH: AtOnce(echo_at_once, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        wire.feed(b"".join(post(PATH, b"%d" % number) for number in range(count)))
        assert wire.bodies == [b"%d" % number for number in range(count)]


async def test_a_client_that_does_not_take_its_answers() -> None:
    """Nothing more is answered, and soon nothing more is read, until it takes them; then everything is answered."""
    count, piece = 5000, 16 * 1024
    bench = Bench()
    async with serving(bench) as client:
        wire = Wire(listener_of(client), slow=True)
        left = REFUSED * count
        most_held = most_written = rounds = 0
        while (left or wire.untaken) and rounds < count:
            while left and wire.is_reading():
                wire.feed(left[:piece])
                left = left[piece:]
                most_held = max(most_held, len(wire.connection._data))
            most_written = max(most_written, wire.untaken)
            if left:
                assert not wire.is_reading()
                assert wire.connection._held
            rounds += 1
            wire.take()
        assert most_held <= READ_AHEAD + piece
        assert most_written <= Wire.HIGH_WATER + 1000
        assert rounds > 10
        assert [got.status for got in answers(bytes(wire.written))] == [401] * count
        assert wire.is_reading()
        assert len(bench.told.webhooks) == count


async def test_a_client_that_does_not_wait_for_its_answer() -> None:
    """What it sends meanwhile is read up to a bound, and answered in the end."""
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: LIMIT), "/echo": AtOnce(echo_at_once, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        wire.feed(post(PATH, b""))
        sent = 0
        while wire.is_reading():
            wire.feed(post("/echo", b"%d" % sent))
            sent += 1
        assert READ_AHEAD < len(wire.connection._data) < READ_AHEAD + 1000
        waiting.give(b"first")
        assert wire.bodies == [b"first", *(b"%d" % number for number in range(sent))]
        assert wire.is_reading()
        wire.feed(post("/echo", b"last"))
        assert wire.bodies[-1] == b"last"


async def test_too_much_ahead_and_still_waiting() -> None:
    """It goes on not being read while there is still too much of it, and is read again when there is not."""
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        one = post(PATH, b"x" * LIMIT)
        wire.feed(one, one * (READ_AHEAD // len(one) + 5))
        count = READ_AHEAD // len(one) + 6
        assert not wire.is_reading()
        while not wire.is_reading():
            assert len(wire.connection._data) > READ_AHEAD
            waiting.give()
        assert 0 < len(wire.connection._data) <= READ_AHEAD
        while waiting.told:
            waiting.give()
        assert len(wire.bodies) == count


async def test_a_large_request_behind_one_that_waits() -> None:
    """When the first is answered, the rest of the second is read, however much of it there is already."""
    large = 4 * READ_AHEAD
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: LIMIT), "/echo": AtOnce(echo_at_once, lambda: large)}) as listener:
        wire = Wire(listener)
        second = post("/echo", b"x" * large)
        wire.feed(post(PATH, b""), second[: 2 * READ_AHEAD])
        assert not wire.is_reading()
        waiting.give(b"first")
        assert wire.is_reading()
        wire.feed(second[2 * READ_AHEAD :])
        assert wire.bodies == [b"first", b"x" * large]


async def test_too_much_ahead_that_is_aiohttps() -> None:
    """What is handed over is read again, too."""
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        second = post("/else", b"x" * 2 * READ_AHEAD)
        wire.feed(post(PATH, b""), second[:-1])
        assert not wire.is_reading()
        waiting.give(b"first")
        assert wire.is_reading()
        wire.feed(second[-1:])
        await until(lambda: len(wire.bodies) == 2)
        assert wire.bodies[1] == b"x" * 2 * READ_AHEAD


async def test_a_request_that_comes_in_many_pieces() -> None:
    """Byte by byte it is the same one, and so is the next."""
    async with listening({PATH: AtOnce(echo_at_once, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        for body in (b"1", b"2"):
            for byte in post(PATH, body):
                wire.feed(bytes([byte]))
        assert wire.bodies == [b"1", b"2"]
        assert not wire.handed_over()


@pytest.mark.parametrize("first", [1, 300, 20_000])
async def test_a_long_body_that_comes_in_small_pieces(first: int) -> None:
    """Each byte is added to what there is, in the same place: to copy all of it for each would take the longer the longer it is."""
    body = bytes(range(256)) * 100
    raw = post(PATH, body)
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: len(body))}) as listener:
        wire = Wire(listener)
        wire.feed(raw[:first])
        at = max(first, 1000)  # the head has come, and some of the body
        wire.feed(*(raw[n : n + 1] for n in range(first, at)), raw[at : at + 1])
        place = wire.connection._data
        assert type(place) is bytearray
        for n in range(at + 1, len(raw) - 1):
            wire.feed(raw[n : n + 1])
            assert wire.connection._data is place
        assert not waiting.asked
        wire.feed(raw[-1:] + raw)
        waiting.give(b"first")
        waiting.give(b"second")
        whole = Wire(listener)
        whole.feed(raw)
        waiting.give(b"first")
        assert waiting.asked == [Asked(Asker("192.0.2.1", ()), None, None, body)] * 3
        assert {type(asked.body) for asked in waiting.asked} == {bytes}
        assert (wire.bodies, whole.bodies) == ([b"first", b"second"], [b"first"])
        assert not wire.handed_over()


async def test_what_comes_in_small_pieces_while_another_is_answered() -> None:
    """It is added in the same place, too, and read when its turn comes."""
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        wire.feed(post(PATH, b"1"))
        raw = post(PATH, b"2" * LIMIT)
        wire.feed(raw[:1], raw[1:2])
        place = wire.connection._data
        for n in range(2, len(raw)):
            wire.feed(raw[n : n + 1])
            assert wire.connection._data is place
        waiting.give(b"first")
        waiting.give(b"second")
        assert [asked.body for asked in waiting.asked] == [b"1", b"2" * LIMIT]
        assert wire.bodies == [b"first", b"second"]


@pytest.mark.parametrize("at", [1, len(LINE) + 10, -1])
async def test_what_does_not_come_is_aiohttps(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that has begun as usual and does not come is handed over, with what there is of it; aiohttp gets the rest."""
    monkeypatch.setattr(module, "THE_REST_WITHIN", 0.0)
    async with listening({PATH: AtOnce(echo_at_once, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        raw = post(PATH, b"late")
        wire.feed(post(PATH, b"first") + raw[:at])
        assert not wire.handed_over()
        await until(wire.handed_over)
        wire.feed(raw[at:])
        await until(lambda: len(wire.bodies) == 2)
        assert wire.bodies == [b"first", b"late"]


async def test_each_request_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for one that came in the end is not taken from the next."""
    monkeypatch.setattr(module, "THE_REST_WITHIN", 0.0)
    async with listening({PATH: AtOnce(echo_at_once, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        raw = post(PATH, b"1")
        wire.feed(raw[:-1], raw[-1:])
        await settle()
        assert not wire.handed_over()
        assert wire.bodies == [b"1"]


async def test_what_waits_for_its_answer_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time counts from when a request could be read, not while another one is being answered."""
    monkeypatch.setattr(module, "THE_REST_WITHIN", 0.0)
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        raw = post(PATH, b"2")
        wire.feed(post(PATH, b"1"), raw[:-1])
        await settle()
        waiting.give(b"1")
        wire.feed(raw[-1:])
        waiting.give(b"2")
        assert wire.bodies == [b"1", b"2"]
        assert not wire.handed_over()


async def test_a_client_that_hangs_up_in_the_middle() -> None:
    """Of half a request nothing is left, and nothing waits for the rest."""
    async with listening({PATH: AtOnce(echo_at_once, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        wire.feed(post(PATH, b"1")[:-1])
        patience = wire.connection._patience
        assert patience is not None
        wire.lose()
        await settle()
        assert patience.cancelled()
        assert not listener._connections


@pytest.mark.parametrize("kind", ["at once", "soon"])
async def test_a_client_that_hangs_up_while_it_waits(kind: str) -> None:
    """What it asked is done all the same; nothing is written, nothing behind it is begun, and nothing raises."""
    waiting = Waiting()
    usual: Usual = AtOnce(waiting.take, lambda: LIMIT) if kind == "at once" else Soon(waiting.answer, lambda: LIMIT)
    async with listening({PATH: usual}) as listener:
        wire = Wire(listener)
        wire.feed(post(PATH, b"1") + post(PATH, b"2"))
        await settle()
        wire.lose()
        await settle()
        assert not listener._connections
        assert (len(waiting.told), waiting.cancelled) == (1, 0)
        waiting.give()
        await settle()
        assert (len(waiting.asked), waiting.cancelled) == (1, 0)
        assert not wire.written


async def test_an_answer_after_the_end_has_begun() -> None:
    """Nothing is written to a connection that is being closed, though it is not yet lost."""
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        wire.feed(post(PATH, b"1"))
        wire.lose()
        waiting.give()
        await settle()
        assert not wire.written


async def test_a_handler_that_raises_at_once() -> None:
    """500 in the one shape, logged once without the text, and the connection goes on."""
    waiting = Waiting()

    def raises(asked: Asked, told: Told) -> None:
        if asked.body == b"answers first":
            told(Answer(200, {}, b"answered"))
        raise RuntimeError("verysecret")

    with capture_logs() as logs:
        async with listening({"/raises": AtOnce(raises, lambda: LIMIT), PATH: AtOnce(waiting.take, lambda: LIMIT)}) as listener:
            wire = Wire(listener)
            wire.feed(post("/raises", b"") + post("/raises", b"answers first") + post(PATH, b""))
            waiting.give(b"goes on")
    failed, *others = answers(bytes(wire.written))
    assert failed.status == 500
    assert json.loads(failed.body)["errcode"] == "M_UNKNOWN"
    assert failed.headers["Cache-Control"] == "no-store"
    assert [(got.status, got.body) for got in others] == [(200, b"answered"), (200, b"goes on")]
    assert [line["event"] for line in logs] == ["request_failed"] * 2
    assert "verysecret" not in repr(logs) + repr(failed)


async def test_dates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer has its own second's date, as HTTP writes it."""
    bench = Bench()
    async with serving(bench) as client:
        wire = Wire(listener_of(client))
        for now, date in ((1_760_000_000.2, "Thu, 09 Oct 2025 08:53:20 GMT"), (1_760_000_000.9, "Thu, 09 Oct 2025 08:53:20 GMT")):
            monkeypatch.setattr(time, "time", lambda now=now: now)
            wire.written.clear()
            wire.feed(IGNORED, REFUSED)
            assert [got.headers["Date"] for got in answers(bytes(wire.written))] == [date] * 2
        monkeypatch.setattr(time, "time", lambda: 1_762_000_001.0)
        wire.written.clear()
        wire.feed(IGNORED, REFUSED)
        assert [got.headers["Date"] for got in answers(bytes(wire.written))] == ["Sat, 01 Nov 2025 12:26:41 GMT"] * 2


async def test_lengths_are_in_bytes() -> None:
    """Not in characters."""
    body = "ä😀".encode()
    async with listening({PATH: AtOnce(lambda _, told: cast("None", told(Answer(200, {"X": "y"}, body))), lambda: LIMIT)}) as listener:
        wire = Wire(listener)
        wire.feed(post(PATH, b""))
        head, _, rest = bytes(wire.written).partition(b"\r\n\r\n")
        assert rest == body
        status, headers = head_of(head)
        assert (status, headers.pop("Date").count(" ")) == (200, 5)
        assert headers == {"X": "y", "Content-Length": "6"}


# ── on a socket: who answers, and what ──


def listener_of(client: "TestClient[Any, Any]") -> Listener:
    """The listener behind a test's client."""
    server: Any = client.server
    assert isinstance(server, ListenerServer)
    assert server.listener is not None
    return server.listener


class Client:
    """A client that sends bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, *data: bytes) -> None:
        self._writer.writelines(data)

    async def answer(self) -> Got:
        """The next answer."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        status, headers = head_of(head[:-4])
        return Got(status, headers, await self._reader.readexactly(int(headers.get("Content-Length", 0))))

    async def ask(self, data: bytes) -> Got:
        """The answer to a request."""
        self.send(data)
        return await self.answer()

    async def rest(self) -> bytes:
        """What comes until the other side closes."""
        return await self._reader.read()

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Client]:
    """A connection to a port."""
    client = Client(*await asyncio.open_connection("127.0.0.1", port))
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def connected_to(bench: Bench) -> AsyncIterator[Client]:
    """A connection to the application."""
    async with serving(bench) as client, connected(client.port or 0) as raw:
        yield raw


def chunked(path: str, body: bytes, *lines: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: a", *lines, "Transfer-Encoding: chunked", "", ""]
    return "\r\n".join(head).encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


@on_each_loop
async def test_usual_webhooks() -> None:
    """One after the other, and several at once, are read here, and answered in order."""
    bench = Bench()
    async with connected_to(bench) as raw:
        for request, status in ((IGNORED, 200), (LEFT, 200), (REFUSED, 401), (MALFORMED, 400), (IGNORED, 200)):
            got = await raw.ask(request)
            assert (got.status, got.by_aiohttp) == (status, False)
        raw.send(LEFT + REFUSED + IGNORED, MALFORMED + LEFT)
        assert [(await raw.answer()).status for _ in range(5)] == [200, 401, 200, 400, 200]
        assert [result for _, _, result in bench.told.webhooks[5:]] == ["stored", "malformed_token", "ignored", "malformed", "stored"]


SIGNED = f"Authorization: {signature(KEY, LEFT_BODY, NOW)}"
LEFT_WITHOUT_LINE = LEFT.partition(b"\r\n")[2]
TOO_LARGE = b" " * 2001
ELSEWHERE: dict[str, tuple[bytes, int]] = {
    "another path": (HEALTH, 200),
    "an unknown path": (post("/nowhere", b"{}"), 404),
    "another method": (b"GET /webhooks/livekit HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    "preflight": (b"OPTIONS /get_token HTTP/1.1\r\nHost: a\r\nOrigin: https://a.example\r\nAccess-Control-Request-Method: POST\r\n\r\n", 200),
    "query": (LEFT.replace(b"livekit HTTP", b"livekit?a=b HTTP"), 200),
    "chunked": (chunked(PATH, LEFT_BODY, SIGNED), 200),
    "absolute": (LEFT.replace(b"/webhooks", b"http://a.example/webhooks"), 200),
    "HTTP/1.0, kept": (LEFT.replace(b"HTTP/1.1", b"HTTP/1.0", 1).replace(b"\r\nHost", b"\r\nConnection: keep-alive\r\nHost", 1), 200),
    "two signatures": (post(PATH, LEFT_BODY, SIGNED, SIGNED), 200),
    "too large": (webhook(TOO_LARGE), 413),
    "an encoding": (post(PATH, b"{}", "Content-Encoding: identity"), 401),
    "Keep-Alive": (post(PATH, LEFT_BODY, SIGNED, "Keep-Alive: timeout=5"), 200),
}


@on_each_loop
@pytest.mark.parametrize(("request_bytes", "status"), ELSEWHERE.values(), ids=ELSEWHERE.keys())
async def test_another_request_between_webhooks(request_bytes: bytes, status: int) -> None:
    """It is aiohttp's, and the connection with it; all are answered right, whether the client waits for each answer or not."""
    bench = Bench()
    bench.configure(max_webhook_body=2000)
    for waits in (True, False):
        async with serving(bench) as client, connected(client.port or 0) as raw:
            requests = (IGNORED, LEFT, request_bytes, LEFT, REFUSED, IGNORED)
            if waits:
                found = [await raw.ask(request) for request in requests]
            else:
                raw.send(b"".join(requests))
                found = [await raw.answer() for _ in requests]
            assert [got.status for got in found] == [200, 200, status, 200, 401, 200]
            assert [got.by_aiohttp for got in found] == [False, False, True, True, True, True]
            assert listener_of(client)._connections == set()
            bench = Bench()
            bench.configure(max_webhook_body=2000)
    bench.port.close()


@on_each_loop
async def test_a_client_that_expects_to_be_told_to_go_on() -> None:
    """It is told, and then gets its answer."""
    async with connected_to(Bench()) as raw:
        assert (await raw.ask(IGNORED)).status == 200
        head, _, body = post(PATH, LEFT_BODY, SIGNED, "Expect: 100-continue").partition(b"\r\n\r\n")
        assert (await raw.ask(head + b"\r\n\r\n")).status == 100
        assert (await raw.ask(body)).status == 200
        assert (await raw.ask(IGNORED)).status == 200


@on_each_loop
@pytest.mark.parametrize("kind", ["HTTP/1.0", "Connection: close"])
async def test_a_client_that_wants_the_connection_closed(kind: str) -> None:
    """It gets its answer, and then the connection is closed."""
    async with connected_to(Bench()) as raw:
        assert (await raw.ask(IGNORED)).status == 200
        if kind == "HTTP/1.0":
            raw.send(LEFT.replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            assert (await raw.rest()).startswith(b"HTTP/1.0 200 OK\r\n")
            return
        got = await raw.ask(post(PATH, LEFT_BODY, SIGNED, "Connection: close"))
        assert (got.status, got.headers["Connection"]) == (200, "close")
        assert await raw.rest() == b""


@on_each_loop
async def test_what_is_no_http() -> None:
    """400 from aiohttp, and the connection is closed."""
    async with connected_to(Bench()) as raw:
        assert (await raw.ask(IGNORED)).status == 200
        got = await raw.ask(b"\x16\x03\x01\x00\xa5\x01\x00\x00\r\n\r\n")
        assert got.status == 400
        assert await raw.rest() == b""


@on_each_loop
@pytest.mark.parametrize("at", [1, 30, len(LINE) + 1, LEFT.index(b"\r\n\r\n") + 2, LEFT.index(b"\r\n\r\n") + 4, len(LEFT) - 1])
async def test_a_request_in_two_pieces(at: int) -> None:
    """The second piece comes when the first has been received, wherever it is cut."""
    bench = Bench()
    async with serving(bench) as client, connected(client.port or 0) as raw:
        listener = listener_of(client)
        await until(lambda: listener._connections)
        [connection] = listener._connections
        for _ in range(2):
            raw.send(LEFT[:at])
            await until(lambda: len(connection._data) == at)
            got = await raw.ask(LEFT[at:])
            assert (got.status, got.body, got.by_aiohttp) == (200, b"{}", False)
        assert len(bench.port.given) == 2


@on_each_loop
async def test_a_body_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """408 from aiohttp in the end, in the one shape, and nothing more is taken from that connection."""
    monkeypatch.setattr(module, "THE_REST_WITHIN", 0.01)
    monkeypatch.setattr(body_module, "BODY_TIMEOUT", 0.01)
    bench = Bench()
    for request in (LEFT, post(GET_TOKEN, b"{}")):
        async with serving(bench) as client, connected(client.port or 0) as raw:
            assert (await raw.ask(IGNORED)).status == 200
            got = await raw.ask(request[:-1])
            assert (got.status, got.headers["Connection"], json.loads(got.body)["errcode"]) == (408, "close", "M_UNKNOWN")
            assert not bench.port.given
        bench = Bench()
    bench.port.close()


@on_each_loop
async def test_a_body_that_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then aiohttp answers it, and what comes after it."""
    monkeypatch.setattr(module, "THE_REST_WITHIN", 0.01)
    async with serving(Bench()) as client, connected(client.port or 0) as raw:
        raw.send(IGNORED + LEFT[:-10])
        assert not (await raw.answer()).by_aiohttp
        await until(lambda: not listener_of(client)._connections)
        assert (await raw.ask(LEFT[-10:])).status == 200
        got = await raw.ask(IGNORED)
        assert (got.status, got.by_aiohttp) == (200, True)


@on_each_loop
async def test_a_large_webhook() -> None:
    """It is read here up to the limit, in however many pieces it comes."""
    bench = Bench()
    event = json.dumps({"event": "track_published", "padding": "x" * 900_000})
    async with connected_to(bench) as raw:
        for _ in range(2):
            got = await raw.ask(webhook(event.encode()))
            assert (got.status, got.by_aiohttp) == (200, False)


@on_each_loop
async def test_a_flood_that_nobody_reads_the_answers_of() -> None:
    """It stops being read, and when the client reads at last it gets every answer."""
    count = 30_000
    async with serving(Bench()) as client, connected(client.port or 0) as raw:
        listener = listener_of(client)
        await until(lambda: listener._connections)
        [connection] = listener._connections
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, len(connection._data))
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        raw.send(REFUSED * count)
        await until(lambda: connection._held)
        statuses = [(await raw.answer()).status for _ in range(count)]
        watching.cancel()
        assert statuses == [401] * count
        assert most < READ_AHEAD + 2 * 256 * 1024
        assert (await raw.ask(IGNORED)).status == 200


@on_each_loop
async def test_a_user_who_hangs_up_while_the_homeserver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delegation is taken all the same, and nothing is logged as our failure."""
    bench = rtc_bench()
    vouched = asyncio.Event()
    user = bench.vouchers.user

    async def slowly(*given: Any) -> str:
        await vouched.wait()
        return await user(*given)

    monkeypatch.setattr(bench.vouchers, "user", slowly)
    with capture_logs() as logs:
        async with serving(bench) as client:
            listener = listener_of(client)
            async with connected(client.port or 0) as raw:
                raw.send(post(DELEGATE, rtc_body(delay=True)))
                await until(lambda: any(not connection.idle for connection in listener._connections))
            await until(lambda: not listener._connections)
            vouched.set()
            await until(bench.accepted)
            await until(lambda: bench.told.matrixrtc)
            assert bench.told.matrixrtc == [("delegate_delayed_leave", 200, True)]
    assert not logs


# ── the same, whoever reads ──


async def one_way(bench: Bench, requests: list[bytes], listener: bool, monkeypatch: pytest.MonkeyPatch) -> list[Got]:
    """What is answered on one connection, one after the other."""
    with monkeypatch.context() as patch:
        patch.setattr(engine_port, "BY_LISTENER", listener)
        async with connected_to(bench) as raw:
            return [await raw.ask(request) for request in requests]


async def same_both_ways(make: Callable[[], Bench], requests: list[bytes], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Got], Bench]:
    """The answers, which are the same both ways, with all that has been told to others."""
    by_aiohttp, by_listener = make(), make()
    theirs = await one_way(by_aiohttp, requests, False, monkeypatch)
    ours = await one_way(by_listener, requests, True, monkeypatch)
    assert [got.comparable for got in ours] == [got.comparable for got in theirs]
    for got in (*ours, *theirs):
        assert re.fullmatch(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", got.headers["Date"])
        assert email.utils.parsedate_to_datetime(got.headers["Date"]).tzinfo is not None
    assert by_listener.told.webhooks == by_aiohttp.told.webhooks
    assert by_listener.told.matrixrtc == by_aiohttp.told.matrixrtc
    assert by_listener.vouchers.asked == by_aiohttp.vouchers.asked
    return ours, by_listener


@pytest.mark.parametrize("name", recordings.names())
async def test_recorded_webhooks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a real LiveKit server sent is read here, and answered as aiohttp alone would; what is changed in it is refused in the same way."""
    recording = recordings.load(name)

    def raw_of(sent: recordings.RecordedWebhook, body: bytes) -> bytes:
        lines = [f"POST {PATH} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.headers.items()), "", ""]
        return "\r\n".join(lines).encode() + body

    async def answered(listener: bool) -> tuple[list[Got], Bench]:
        bench = Bench()
        bench.keys.replace([SfuKey("main", recording.api_key, recording.api_secret)])
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(engine_port, "BY_LISTENER", listener)
            async with connected_to(bench) as raw:
                for sent in recording.webhooks:
                    bench.port.at = recording.at(sent)
                    found.append(await raw.ask(raw_of(sent, sent.body)))
                    found.append(await raw.ask(raw_of(sent, sent.body[:-1] + b" ")))
        return found, bench

    (ours, our_bench), (theirs, their_bench) = await answered(True), await answered(False)
    assert [got.status for got in ours] == [200, 401] * len(recording.webhooks)
    assert [got.comparable for got in ours] == [got.comparable for got in theirs]
    assert not any(got.by_aiohttp for got in ours)
    assert all(got.by_aiohttp for got in theirs)
    assert our_bench.told.webhooks == their_bench.told.webhooks
    assert our_bench.port.given == their_bench.port.given


WRONG = SfuKey("main", KEY.key, "not-the-secret-of-forty-characters-00000")
STRANGER = SfuKey("main", "APIstranger", "not-the-secret-of-forty-characters-00000")


def failing_with(error: Exception) -> Callable[[], Bench]:
    """A bench where nothing can be kept."""

    def make() -> Bench:
        bench = Bench()
        bench.port.error = error
        return bench

    return make


def small() -> Bench:
    """A bench where webhooks must be small."""
    bench = Bench()
    bench.configure(max_webhook_body=2000)
    return bench


WEBHOOKS: dict[str, tuple[Callable[[], Bench], bytes, int]] = {
    "stored": (Bench, LEFT, 200),
    "ignored": (Bench, IGNORED, 200),
    "where deployed": (Bench, webhook(LEFT_BODY, path="/sfu_webhook"), 200),
    "unsigned": (Bench, post(PATH, LEFT_BODY), 401),
    "empty signature": (Bench, post(PATH, LEFT_BODY, "Authorization:"), 401),
    "garbage": (Bench, REFUSED, 401),
    "wrong secret": (Bench, webhook(LEFT_BODY, WRONG), 401),
    "unknown key": (Bench, webhook(LEFT_BODY, STRANGER), 401),
    "another body": (Bench, post(PATH, LEFT_BODY + b" ", SIGNED), 401),
    "expired": (Bench, webhook(LEFT_BODY, at=NOW - 3600), 401),
    "not yet valid": (Bench, webhook(LEFT_BODY, at=NOW + 3600), 401),
    "malformed": (Bench, MALFORMED, 400),
    "empty": (Bench, webhook(b""), 400),
    "too large": (small, webhook(TOO_LARGE), 413),
    "overloaded": (failing_with(Overloaded("Too much to do.", 1.5)), LEFT, 503),
    "unavailable": (failing_with(Unavailable("The database /var/lib/x failed.", 1.5)), LEFT, 503),
    "failed": (failing_with(RuntimeError("verysecret")), LEFT, 500),
}


@pytest.mark.parametrize(("make", "request_bytes", "status"), WEBHOOKS.values(), ids=WEBHOOKS.keys())
async def test_webhooks_both_ways(make: Callable[[], Bench], request_bytes: bytes, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status, headers and body are the same, and so is what the metrics are told."""
    with capture_logs():
        found, _ = await same_both_ways(make, [request_bytes, IGNORED], monkeypatch)
    assert [got.status for got in found] == [status, 200]
    assert found[0].by_aiohttp == (status == 413)


ALICE, EVE = "@alice:example.org", "@eve:elsewhere.org"


def rtc_bench(**given: Any) -> Bench:
    """Alice's homeserver is served, Eve's is not."""
    bench = Bench(**given)
    bench.vouchers.users.update({"alice": ALICE, "eve": EVE})
    return bench


def rtc_body(token: str = "alice", user: str = ALICE, server: str = SERVER, *, delay: bool = False) -> bytes:
    """What a client asks an endpoint."""
    body: dict[str, Any] = {
        "room_id": "!room:example.org",
        "slot_id": "slot",
        "openid_token": {"access_token": token, "token_type": "Bearer", "matrix_server_name": server, "expires_in": 3600},
        "member": {"id": "member", "claimed_user_id": user, "claimed_device_id": "DEVICE"},
    }
    if delay:
        body |= {"delay_id": "delay-id", "delay_timeout": 3_600_000, "delay_cs_api_url": "https://matrix.example.org"}
    return json.dumps(body).encode()


def rtc_after(change: Callable[[Bench], object]) -> Callable[[], Bench]:
    """A bench on which something is different."""

    def make() -> Bench:
        bench = rtc_bench()
        change(bench)
        return bench

    return make


def raising(error: Exception) -> Callable[[], Bench]:
    """A bench with a homeserver that is in trouble."""
    return rtc_after(lambda bench: bench.vouchers.users.update({"alice": error}))


def stopping(bench: Bench) -> None:
    bench.stopping = True


def full(bench: Bench) -> None:
    bench.port.error = TooMany("max_events", 3, "This participant has too many.")


RTC: dict[str, tuple[Callable[[], Bench], bytes, int]] = {
    "token": (rtc_bench, post(GET_TOKEN, rtc_body()), 200),
    "token with a delay": (rtc_bench, post(GET_TOKEN, rtc_body(delay=True)), 200),
    "delegation": (rtc_bench, post(DELEGATE, rtc_body(delay=True)), 200),
    "probe": (rtc_bench, post(GET_TOKEN, b""), 400),
    "no JSON": (rtc_bench, post("/sfu/get", b"{"), 400),
    "unknown token": (rtc_bench, post(GET_TOKEN, rtc_body("mallory")), 401),
    "somebody else's": (rtc_bench, post(GET_TOKEN, rtc_body("eve")), 401),
    "not served": (rtc_bench, post(DELEGATE, rtc_body("eve", EVE, "elsewhere.org", delay=True)), 403),
    "too large": (rtc_after(lambda bench: bench.configure(max_body=10)), post(GET_TOKEN, rtc_body()), 413),
    "too many": (rtc_after(full), post(DELEGATE, rtc_body(delay=True)), 429),
    "too many on the way": (rtc_after(full), post(GET_TOKEN, rtc_body(delay=True)), 400),
    "stopping": (rtc_after(stopping), post(DELEGATE, rtc_body(delay=True)), 503),
    "homeserver away": (raising(OpenIdUnavailable("no answer from 10.0.0.1")), post(GET_TOKEN, rtc_body()), 503),
    "failed": (raising(RuntimeError("verysecret")), post(GET_TOKEN, rtc_body()), 500),
}
PAGE = "https://call.example.org"
ORIGINS: dict[str, tuple[tuple[str, ...], str | None, str | None]] = {  # what is allowed, who asks, what is told
    "any, from a page": (("*",), PAGE, "*"),
    "any, from no page": (("*",), None, "*"),
    "one, and it is": (("https://a.example", PAGE), PAGE, PAGE),
    "one, and it is not": (("https://a.example",), PAGE, None),
    "one, and from no page": ((PAGE,), None, None),
    "one, and empty": ((PAGE,), "", None),
    "nobody": ((), PAGE, None),
}


@pytest.mark.parametrize(("allowed", "origin", "told"), ORIGINS.values(), ids=ORIGINS.keys())
@pytest.mark.parametrize(("make", "request_bytes", "status"), RTC.values(), ids=RTC.keys())
async def test_matrixrtc_both_ways(
    make: Callable[[], Bench],
    request_bytes: bytes,
    status: int,
    allowed: tuple[str, ...],
    origin: str | None,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Status, headers and body are the same for every page; a page can read errors, too."""
    if origin is not None:
        request_bytes = request_bytes.replace(b"\r\nHost", f"\r\nOrigin: {origin}\r\nHost".encode(), 1)

    def configured() -> Bench:
        bench = make()
        bench.configure(cors_origins=allowed)
        return bench

    with capture_logs():
        [got], _ = await same_both_ways(configured, [request_bytes], monkeypatch)
    assert got.status == status
    assert got.by_aiohttp == (status == 413)
    assert got.headers["Content-Type"] == "application/json"
    assert got.headers["Cache-Control"] == "no-store"
    assert ("Retry-After" in got.headers) == (status in (429, 503))
    assert got.headers.get("Access-Control-Allow-Origin") == told
    assert got.headers.get("Vary") == (None if allowed == ("*",) else "Origin")


async def test_too_many_requests_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """By address, which the proxies tell: 429 with the time to wait. (Its milliseconds are not the same for long.)"""
    statuses = {}
    for listener in (False, True):
        bench = rtc_bench()
        bench.configure(client_rate=0.001, client_burst=1, trusted_proxies=())
        found = await one_way(bench, [post(GET_TOKEN, rtc_body())] * 2, listener, monkeypatch)
        assert json.loads(found[1].body)["errcode"] == "M_LIMIT_EXCEEDED"
        assert found[1].headers.keys() >= {"Retry-After", "Access-Control-Allow-Origin"}
        statuses[listener] = [got.status for got in found]
    assert statuses == {False: [200, 429], True: [200, 429]}


@pytest.mark.parametrize("listener", [False, True], ids=["aiohttp", "listener"])
async def test_a_handler_that_raises(listener: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 in the one shape, logged once without the text, and the connection goes on."""
    bench = rtc_bench()
    bench.vouchers.users["alice"] = RuntimeError("verysecret")

    def raises(_: Input, __: object) -> None:
        raise RuntimeError("verysecret")

    monkeypatch.setattr(bench.port, "hand", raises)
    for request in (LEFT, post(GET_TOKEN, rtc_body())):
        with capture_logs() as logs:
            failed, after = await one_way(bench, [request, IGNORED], listener, monkeypatch)
        assert (failed.status, after.status) == (500, 200)
        assert json.loads(failed.body)["errcode"] == "M_UNKNOWN"
        assert (failed.headers["Content-Type"], failed.headers["Cache-Control"]) == ("application/json", "no-store")
        assert [line["event"] for line in logs] == ["request_failed"]
        assert "verysecret" not in repr(logs) + repr(failed)


# ── the end ──


async def test_idle_connections_are_swept() -> None:
    """After a long silence, and not before; what waits for its answer is not idle, and its silence begins with the answer."""
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: LIMIT)}) as listener:
        fresh, old, waits = Wire(listener), Wire(listener), Wire(listener)
        waits.feed(post(PATH, b""))
        old.connection.silent_since -= IDLE_MOST + 1
        fresh.connection.silent_since -= IDLE_MOST - 1
        waits.connection.silent_since -= IDLE_MOST + 1
        listener._sweep()
        assert [wire.closing for wire in (fresh, old, waits)] == [False, True, False]
        waiting.give()
        listener._sweep()
        assert not waits.closing
        await settle()
        assert len(listener._connections) == 2


@on_each_loop
async def test_the_sweep_comes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again: it closes a connection that has said nothing at all, and one that has been answered."""
    monkeypatch.setattr(module, "SWEEP_EVERY", 0.001)
    async with serving(Bench()) as client, connected(client.port or 0) as raw:
        assert (await raw.ask(IGNORED)).status == 200
        async with connected(client.port or 0) as silent:
            listener = listener_of(client)
            await until(lambda: len(listener._connections) == 2)
            sweeper = listener._sweeper
            await until(lambda: listener._sweeper is not sweeper)
            monkeypatch.setattr(module, "IDLE_MOST", 0.0)
            assert await raw.rest() == await silent.rest() == b""


def port_of(listener: Listener) -> int:
    assert listener._server is not None
    return int(listener._server.sockets[0].getsockname()[1])


@on_each_loop
@pytest.mark.parametrize("kind", ["at once", "soon"])
async def test_closing(kind: str) -> None:
    """What is idle is closed at once; what waits gets its answer first; nothing new is taken, be it a connection or a request."""
    waiting = Waiting()
    usual: Usual = AtOnce(waiting.take, lambda: LIMIT) if kind == "at once" else Soon(waiting.answer, lambda: LIMIT)
    async with listening({PATH: usual, "/echo": AtOnce(echo_at_once, lambda: LIMIT)}) as listener:
        port = port_of(listener)
        async with connected(port) as idle, connected(port) as silent, connected(port) as half, connected(port) as waits:
            assert (await idle.ask(post("/echo", b""))).status == 200
            half.send(post(PATH, b"1")[:-1])
            waits.send(post(PATH, b"1") + post("/echo", b"2"))
            await until(lambda: waiting.told)
            await until(lambda: sum(bool(connection._data) for connection in listener._connections) == 2)
            closing = asyncio.create_task(listener.close())
            assert await idle.rest() == await silent.rest() == await half.rest() == b""
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
            assert not closing.done()
            waiting.give(b"answered")
            assert [got.body for got in answers(await waits.rest())] == [b"answered"]
            await closing
            assert len(waiting.asked) == 1


@on_each_loop
async def test_what_is_not_answered_in_time_is_cut() -> None:
    """Its connection is closed without an answer, and its task is cancelled; an answer that comes later is nobody's."""
    soon, at_once = Waiting(), Waiting()
    usual: dict[str, Usual] = {"/soon": Soon(soon.answer, lambda: LIMIT), PATH: AtOnce(at_once.take, lambda: LIMIT)}
    async with listening(usual, closed_within=0.01) as listener, connected(port_of(listener)) as first, connected(port_of(listener)) as second:
        first.send(post("/soon", b""))
        second.send(post(PATH, b""))
        await until(lambda: soon.told and at_once.told)
        await listener.close()
        assert await first.rest() == await second.rest() == b""
        await until(lambda: soon.cancelled)
        await until(lambda: not listener._connections)
        at_once.give()


async def test_closing_does_not_wait_for_a_client_that_reads_nothing() -> None:
    """Not for longer than for others."""
    async with listening({PATH: AtOnce(echo_at_once, lambda: LIMIT)}, closed_within=0.01) as listener:
        wire = Wire(listener, slow=True)
        wire.feed(post(PATH, b"x" * LIMIT) * 100)
        assert wire.untaken
        await listener.close()
        assert wire.lost


@on_each_loop
async def test_closing_what_aiohttp_has() -> None:
    """Connections that were handed over are closed, too, and a request that is being answered gets its answer first."""
    asked, answer = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        if request.path == "/slow":
            asked.set()
            await answer.wait()
        return web.Response(text="by aiohttp")

    usual = {PATH: AtOnce(echo_at_once, lambda: LIMIT)}
    async with listening(usual, handler) as listener, connected(port_of(listener)) as idle, connected(port_of(listener)) as waits:
        assert (await idle.ask(HEALTH)).body == b"by aiohttp"
        waits.send(post(PATH, b"1") + post("/slow", b""))
        assert (await waits.answer()).body == b"1"
        await asked.wait()
        closing = asyncio.create_task(listener.close())
        assert await idle.rest() == b""
        assert not closing.done()
        answer.set()
        assert [got.body for got in answers(await waits.rest())] == [b"by aiohttp"]
        await closing


async def test_a_connection_that_comes_while_closing() -> None:
    """One that was accepted just before, and begins just after, is closed, too: nobody has to wait for it."""
    waiting = Waiting()
    async with listening({PATH: AtOnce(waiting.take, lambda: LIMIT)}, closed_within=0.1) as listener:
        wire = Wire(listener)
        wire.feed(post(PATH, b""))
        closing = asyncio.create_task(listener.close())
        await settle()
        late = Wire(listener)
        waiting.give()
        await settle()
        closed = late.closing
        await closing
        assert closed


@on_each_loop
async def test_closing_twice_and_without_connections() -> None:
    """There is nothing to wait for."""
    async with listening({}) as listener:
        await listener.close()
        await listener.close()


def test_the_one_error_shape_is_the_same() -> None:
    """An error's own headers and fields get into both kinds of answers."""
    error = MatrixError(429, "M_LIMIT_EXCEEDED", "Too many.", retry_after=1.2, headers={"X": "y"}, extra=1)
    answer, response = refusal(error), error.response()
    assert (answer.status, answer.body) == (response.status, response.body)
    assert {name: response.headers[name] for name in answer.headers} == answer.headers
