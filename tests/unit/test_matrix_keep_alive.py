"""One connection of the HTTP client, fed by hand: whatever the bytes and however they are cut, a whole answer or a failure, and nothing after it."""

import asyncio
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from sfu_delegate.matrix.http import MAX_BODY, HttpAnswer, HttpFailed
from sfu_delegate.matrix.keep_alive import (
    IDLE_LIFE,
    MAX_HEAD,
    MAX_HEADERS,
    MAX_IDLE_EACH,
    MAX_INFORMATIONAL,
    KeepAliveClient,
    _Connection,
    _Origin,
    _origin,
    _Place,
    _request,
    _split,
)

PLACE = _Place(_Origin(False, "a.example", 80, "a.example"), None, None)
NO_HTTP = "the answer is not HTTP"
OK = b"HTTP/1.1 200 OK\r\n"


class Wire(asyncio.Transport):
    """A transport to nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.closed = False
        self.unsent = 0

    def write(self, data: Any) -> None:
        self.sent.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return self.unsent


@dataclass
class Got:
    """What became of a request."""

    result: HttpAnswer | HttpFailed
    kept: float  # seconds that the connection is kept; 0: closed

    @property
    def answer(self) -> HttpAnswer:
        assert isinstance(self.result, HttpAnswer), self.result
        return self.result

    @property
    def failure(self) -> str:
        """The reason of the failure, after which a connection is never kept and nothing is certain."""
        assert isinstance(self.result, HttpFailed), self.result
        assert self.kept == 0
        assert not self.result.certainly_not_sent
        return self.result.reason


def soon() -> float:
    return asyncio.get_running_loop().time() + 60


def open_connection(client: KeepAliveClient) -> tuple[_Connection, Wire]:
    wire = Wire()
    connection = _Connection(client, PLACE)
    connection.connection_made(wire)
    return connection, wire


async def ask(chunks: list[bytes], lost: Exception | None, unsent: int) -> Got:
    client = KeepAliveClient()
    connection, wire = open_connection(client)
    wire.unsent = unsent
    asking = asyncio.create_task(connection.exchange(b"GET / HTTP/1.1\r\n\r\n", soon()))
    await asyncio.sleep(0)
    for chunk in chunks:
        if not wire.closed:
            connection.data_received(chunk)
    kept = 0.0 if wire.closed else connection.idle_until
    if not kept:
        connection.connection_lost(lost)
    try:
        result: HttpAnswer | HttpFailed = await asking
    except HttpFailed as failed:
        result = failed
    assert (client._take(PLACE) is connection) == bool(kept)
    left = kept - asyncio.get_running_loop().time() if kept else 0.0
    await client.aclose()
    return Got(result, left)


def got(*chunks: bytes, lost: Exception | None = None, unsent: int = 0) -> Got:
    """What a request gets from a server that sends these chunks, and then closes the connection if it has not been kept."""
    return asyncio.run(ask(list(chunks), lost, unsent))


def cut(whole: bytes, places: list[int]) -> list[bytes]:
    """The pieces between the places (modulo the length)."""
    at = sorted({place % (len(whole) + 1) for place in places} | {0, len(whole)})
    return [whole[begin:end] for begin, end in pairwise(at)]


def chunked(body: bytes, places: list[int], trailers: bytes = b"") -> bytes:
    pieces = (piece for piece in cut(body, places) if piece)
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + trailers + b"\r\n"


@dataclass
class Valid:
    """An answer as it comes, what is to be made of it, and whether it says itself where it ends."""

    raw: bytes
    answer: HttpAnswer
    framed: bool


TOKENS = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=8).map("x-".__add__)
VALUES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=12)
CUTS = st.lists(st.integers(0, 5000), max_size=12)


@st.composite
def valid_answers(draw: st.DrawFn) -> Valid:
    status = draw(st.sampled_from([200, 201, 204, 304, 307, 400, 404, 429, 500, 599]))
    headers = draw(st.dictionaries(TOKENS, VALUES, max_size=4))
    body = b"" if status in {204, 304} else draw(st.binary(max_size=400))
    framing = draw(st.sampled_from(["length", "chunks", "close"]))
    raw = b"".join(b"HTTP/1.1 %d Wait\r\nLink: a\r\n\r\n" % code for code in draw(st.lists(st.sampled_from([100, 102, 103]), max_size=3)))
    raw += b"HTTP/1.1 %d %s\r\n" % (status, draw(st.sampled_from([b"", b"OK", b"Not at all"])))
    raw += "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
    if status in {204, 304}:
        return Valid(raw + b"\r\n", HttpAnswer(status, headers, b""), True)
    if framing == "length":
        headers["content-length"] = str(len(body))
        return Valid(raw + b"Content-Length: %d\r\n\r\n" % len(body) + body, HttpAnswer(status, headers, body), True)
    if framing == "chunks":
        headers["transfer-encoding"] = "chunked"
        trailers = draw(st.sampled_from([b"", b"X-Trailer: 1\r\n"]))
        return Valid(raw + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, draw(CUTS), trailers), HttpAnswer(status, headers, body), True)
    return Valid(raw + b"\r\n" + body, HttpAnswer(status, headers, body), False)


@given(valid_answers(), CUTS)
def test_any_split(valid: Valid, places: list[int]) -> None:
    """However a valid answer is cut into pieces, it is the same one; the connection is kept if the answer says where it ends."""
    result = got(*cut(valid.raw, places))
    assert result.answer == valid.answer
    assert bool(result.kept) == valid.framed


@given(valid_answers())
def test_byte_by_byte(valid: Valid) -> None:
    """The same one byte at a time."""
    assert got(*(bytes([byte]) for byte in valid.raw)).answer == valid.answer


@given(valid_answers(), st.integers(1, 5000))
def test_broken_off(valid: Valid, at: int) -> None:
    """An answer that says where it ends, and ends before, is none."""
    assume(valid.framed)
    assert got(valid.raw[: at % len(valid.raw)]).failure


@given(st.binary(max_size=300), CUTS)
@example(b"RFB 003.008\n", [])
@example(b"HTTP/1.1 ", [])
@example(b"HTTP/1.1 200 OK\r\nX\r\n\r\n", [4])
@example(b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n", [])
@example(b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", [])
def test_garbage(garbage: bytes, places: list[int]) -> None:
    """What is no HTTP is a failure, and the connection is closed."""
    assert got(*cut(garbage, places)).failure in {NO_HTTP, "the connection was closed before the answer"}


@given(valid_answers(), st.binary(min_size=1, max_size=20), st.integers(0, 5000), CUTS)
def test_changed_answers(valid: Valid, noise: bytes, at: int, places: list[int]) -> None:
    """With noise put in somewhere it is an answer or a failure, and no error of any other kind."""
    at %= len(valid.raw)
    result = got(*cut(valid.raw[:at] + noise + valid.raw[at:], places))
    assert isinstance(result.result, HttpAnswer) or result.failure


@given(valid_answers(), st.binary(min_size=1, max_size=40), CUTS)
@example(Valid(OK + b"Content-Length: 2\r\n\r\n{}", HttpAnswer(200, {"content-length": "2"}, b"{}"), True), OK + b"Content-Length: 2\r\n\r\n[]", [])
@example(Valid(OK + b"Content-Length: 2\r\n\r\n{}", HttpAnswer(200, {"content-length": "2"}, b"{}"), True), b"H", [])
def test_bytes_behind_the_end(valid: Valid, surplus: bytes, places: list[int]) -> None:
    """Whatever is behind an answer changes nothing about it, and the connection is closed. (Empty lines are allowed before an answer.)"""
    assume(valid.framed and surplus.strip(b"\r\n"))
    pieces = cut(valid.raw, places)
    result = got(*pieces[:-1], pieces[-1] + surplus)
    assert result.answer == valid.answer
    assert result.kept == 0
    assert got(*pieces, surplus).kept == 0


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: \r\n",
        b"Content-Length : 5\r\n",
        b"Content-Length:\r\n 5\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"X: a\rContent-Length: 5\r\n",
        b"X: a\r\n folded\r\nContent-Length: 5\r\n",
        b"X: a\nContent-Length: 5\r\n",
    ],
)
def test_unclear_end(head: bytes) -> None:
    """Where two readers could see the end of the body in different places, there is no answer."""
    assert got(OK + head + b"\r\n0\r\n\r\n").failure == NO_HTTP


@pytest.mark.parametrize(
    "body", [b"2\n{}\r\n0\r\n\r\n", b"2 \r\n{}\r\n0\r\n\r\n", b"2\r\n{}0\r\n\r\n", b"fffffffffffffffff\r\n", b"-2\r\n{}\r\n", b"g\r\n"]
)
def test_bad_chunks(body: bytes) -> None:
    """Chunks that are not written as they must be are no answer."""
    assert got(OK + b"Transfer-Encoding: chunked\r\n\r\n", body).failure == NO_HTTP


@pytest.mark.parametrize("status", [b"099", b"600", b"999", b"99", b"2000", b"-20", b"abc", b""])
def test_bad_status(status: bytes) -> None:
    """A status outside of those that there are is no answer."""
    assert got(b"HTTP/1.1 " + status + b" OK\r\nContent-Length: 0\r\n\r\n").failure == NO_HTTP


@pytest.mark.parametrize("more", [b"", b"Upgrade: h2c\r\nConnection: upgrade\r\n"])
@pytest.mark.parametrize("then", [b"", b"abc", OK + b"Content-Length: 0\r\n\r\n"])
def test_upgrade(more: bytes, then: bytes) -> None:
    """Nobody asked for another protocol."""
    assert got(b"HTTP/1.1 101 Switching Protocols\r\n" + more + b"\r\n" + then).failure == NO_HTTP


@pytest.mark.parametrize(("count", "refused"), [(MAX_INFORMATIONAL, False), (MAX_INFORMATIONAL + 1, True)])
def test_informational_answers(count: int, refused: bool) -> None:
    """Answers of the 100s are skipped, with their headers, but not without end."""
    result = got(b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\nContent-Length: 5\r\n\r\n" * count, OK + b"Content-Length: 2\r\n\r\n{}")
    if refused:
        assert result.failure == NO_HTTP
    else:
        assert result.answer == HttpAnswer(200, {"content-length": "2"}, b"{}")


def test_informational_answer_only() -> None:
    """An answer of the 100s is not the answer."""
    assert got(b"HTTP/1.1 100 Continue\r\n\r\n").failure == "the connection was closed before the answer"


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_without_body(status: bytes) -> None:
    """These have no body, whatever they say about its length; what seems to be one is surplus."""
    head = b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\n"
    assert (got(head).answer.body, got(head).kept > 0) == (b"", True)
    assert (got(head + b"{}").answer.body, got(head + b"{}").kept) == (b"", 0)


@pytest.mark.parametrize("size", [1000, 200_000])
def test_too_large_a_head(size: int) -> None:
    """A head has a bound, in one piece or many, finished or not."""
    lines = b"".join(b"x%d: %b\r\n" % (number, b"y" * 10_000) for number in range(MAX_HEAD // 10_000 + 1))
    raw = OK + lines + b"Content-Length: 0\r\n\r\n"
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
    assert got(*pieces).failure == NO_HTTP
    assert got(OK + b"X: ", *[b"y" * size] * (MAX_HEAD // size + 1)).failure == NO_HTTP


def test_large_informational_heads() -> None:
    """The bound holds for each of the heads, so that the answers before the real one do no harm to it."""
    early = b"HTTP/1.1 103 Early Hints\r\nLink: %b\r\n\r\n" % (b"y" * 30_000)
    assert got(early, early, early, OK + b"Content-Length: 2\r\n\r\n{}").answer.body == b"{}"


@pytest.mark.parametrize(("count", "refused"), [(MAX_HEADERS - 1, False), (MAX_HEADERS, True)])
def test_too_many_headers(count: int, refused: bool) -> None:
    """The number of headers has a bound, in which Content-Length is one."""
    result = got(OK + b"X: y\r\n" * count + b"Content-Length: 2\r\n\r\n{}")
    assert (result.failure == NO_HTTP) if refused else (result.answer.body == b"{}")


@pytest.mark.parametrize("extra", [0, 1, 5000])
@pytest.mark.parametrize("framing", ["length", "chunks", "close"])
def test_large_bodies(framing: str, extra: int) -> None:
    """A body of MAX_BODY is whole; of a longer one there is the beginning, and the connection is closed."""
    body = bytes(range(256)) * (MAX_BODY // 256) + b"z" * extra
    raw = {
        "length": OK + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        "chunks": OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, list(range(0, len(body), 4096)), b"X: y\r\n"),
        "close": OK + b"\r\n" + body,
    }[framing]
    for pieces in ([raw], cut(raw, list(range(0, len(raw), 1000)))):
        result = got(*pieces)
        assert result.answer.body == body[:MAX_BODY]
        assert result.answer.whole == (extra == 0)
        assert bool(result.kept) == (extra == 0 and framing != "close")


def test_smallest_chunks() -> None:
    """A whole body in chunks of one byte is an answer like any other."""
    assert got(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * MAX_BODY, b"0\r\n\r\n").answer.body == b"x" * MAX_BODY


@pytest.mark.parametrize("begin", [b"0\r\nX: ", b"1;", b"1;a="], ids=["trailer", "extension", "value of an extension"])
def test_endless_without_body(begin: bytes) -> None:
    """What is neither head nor body has a bound too."""
    assert got(OK + b"Transfer-Encoding: chunked\r\n\r\n", begin, *[b"y" * 65_536] * 32).failure == NO_HTTP


def test_too_many_trailers() -> None:
    """Trailers are counted with the headers."""
    assert got(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * MAX_HEADERS + b"\r\n").failure == NO_HTTP


def test_trailers_are_not_headers() -> None:
    """What comes behind the body does not change what was said before it."""
    raw = OK + b"Retry-After: 1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"{}", [], b"Retry-After: 2\r\nKeep-Alive: timeout=3\r\n")
    result = got(raw)
    assert result.answer == HttpAnswer(200, {"retry-after": "1", "transfer-encoding": "chunked"}, b"{}")
    assert result.kept > 3


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n", False),
        (b"HTTP/1.1 200 OK\r\nConnection: keep-alive, Close\r\n", False),
        (b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nConnection: close\r\n", False),
        (b"HTTP/1.0 200 OK\r\n", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n", True),
    ],
)
def test_who_is_kept(head: bytes, kept: bool) -> None:
    """HTTP/1.1 unless it says no, HTTP/1.0 only if it says so."""
    result = got(head + b"Content-Length: 2\r\n\r\n{}")
    assert (result.answer.body, bool(result.kept)) == (b"{}", kept)


@pytest.mark.parametrize(
    ("hint", "least", "most"),
    [
        (b"timeout=5", 3.5, 4),
        (b"max=100, timeout=5", 3.5, 4),
        (b"TIMEOUT = 5", 3.5, 4),
        (b"timeout=1000", 14, IDLE_LIFE),
        (b"timeout=1", 0, 0),
        (b"timeout=0", 0, 0),
        (b"notimeout=5", 14, IDLE_LIFE),
        (b"timeout=-5", 14, IDLE_LIFE),
        (b"", 14, IDLE_LIFE),
    ],
)
def test_keep_alive_hint(hint: bytes, least: float, most: float) -> None:
    """A connection is kept for less than the server says, and never for longer than without its hint."""
    assert least <= got(OK + b"Keep-Alive: " + hint + b"\r\nContent-Length: 2\r\n\r\n{}").kept <= most


def test_body_until_the_close() -> None:
    """A body without a length ends with the connection, unless that was reset."""
    assert got(OK + b"\r\n", b"one ", b"two").answer == HttpAnswer(200, {}, b"one two")
    assert got(OK + b"\r\n", b"one ", lost=ConnectionResetError()).failure == "the answer broke off"


def test_answer_before_the_request_is_written() -> None:
    """An answer to half a request is one, but what is still to be written must not be followed by another."""
    result = got(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n", unsent=10)
    assert (result.answer.status, result.kept) == (413, 0)


async def test_unasked_bytes() -> None:
    """A connection on which something comes while it is idle is not used, even before the loop has told of its end."""
    client = KeepAliveClient()
    connection, wire = open_connection(client)
    client.idle(connection, 10)
    connection.data_received(OK)
    assert wire.closed
    assert client._take(PLACE) is None
    await client.aclose()


async def test_a_late_timer_is_not_the_next_ones() -> None:
    """The deadline of a request that was answered at the last moment does no harm to the next one on its connection."""
    client = KeepAliveClient()
    connection, wire = open_connection(client)
    first = asyncio.create_task(connection.exchange(b"1", soon()))
    await asyncio.sleep(0)
    asked = connection._answer
    assert asked is not None
    connection.data_received(OK + b"Content-Length: 1\r\n\r\n1")
    taken = client._take(PLACE)
    assert taken is connection
    second = taken.exchange(b"2", soon())
    cast("Any", second).send(None)  # begins at once, before the first one goes on
    connection._out_of_time(asked)
    assert not wire.closed
    connection.data_received(OK + b"Content-Length: 1\r\n\r\n2")
    with pytest.raises(StopIteration) as ended:
        cast("Any", second).send(None)
    assert (ended.value.value.body, (await first).body) == (b"2", b"1")
    await client.aclose()


async def test_cancelled_when_answered() -> None:
    """A waiter that is cancelled when its answer is there already has no say about the connection any more."""
    client = KeepAliveClient()
    connection, wire = open_connection(client)
    asking = asyncio.create_task(connection.exchange(b"1", soon()))
    await asyncio.sleep(0)
    connection.data_received(OK + b"Content-Length: 1\r\n\r\n1")
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not wire.closed
    assert client._take(PLACE) is connection
    await client.aclose()


async def test_cancelled_while_waiting() -> None:
    """A waiter that is cancelled closes its connection."""
    client = KeepAliveClient()
    connection, wire = open_connection(client)
    asking = asyncio.create_task(connection.exchange(b"1", soon()))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert wire.closed
    connection.data_received(OK + b"Content-Length: 1\r\n\r\n1")
    assert client._take(PLACE) is None
    await client.aclose()


async def test_idle_connections_are_bounded() -> None:
    """No place has more than its share of the idle connections; the last one in is the first one out."""
    client = KeepAliveClient()
    all_of_them = [open_connection(client) for _ in range(MAX_IDLE_EACH + 1)]
    for connection, _ in all_of_them:
        client.idle(connection, 10)
    assert [wire.closed for _, wire in all_of_them] == [False] * MAX_IDLE_EACH + [True]
    assert client._take(PLACE) is all_of_them[-2][0]
    await client.aclose()


async def test_old_connections_are_not_used() -> None:
    """A connection that has been idle for too long is closed, and one beside it that has not is taken."""
    client = KeepAliveClient()
    (young, _), (old, wire) = open_connection(client), open_connection(client)
    client.idle(young, 10)
    client.idle(old, 1)
    old.idle_until -= 2
    assert client._take(PLACE) is young
    assert wire.closed
    assert client._take(PLACE) is None
    await client.aclose()


async def test_sweep() -> None:
    """Connections that have been idle for too long are closed without being asked for, and then nothing is left over."""
    client = KeepAliveClient()
    connection, wire = open_connection(client)
    client.idle(connection, 1)
    client._sweep()
    assert not wire.is_closing()
    connection.idle_until -= 2
    client._sweep()
    assert wire.is_closing()
    assert (client._idle, client._idle_count, client._all, client._sweeper) == ({}, 0, set(), None)
    await client.aclose()


@pytest.mark.parametrize(
    ("url", "host_header", "target"),
    [
        ("http://a.example", "a.example", "/"),
        ("http://a.example:80/x", "a.example", "/x"),
        ("https://a.example:8448/x?y=%20#z", "a.example:8448", "/x?y=%20"),
        ("https://a.example?y", "a.example", "/?y"),
        ("http://[::1]:8008/", "[::1]:8008", "/"),
        ("http://127.0.0.1/a//b/../c%2f", "127.0.0.1", "/a//b/../c%2f"),
    ],
)
def test_urls(url: str, host_header: str, target: str) -> None:
    """Host header and request target are those of the URL, to the letter."""
    origin, found = _split(url)
    assert (origin.host_header, found) == (host_header, target)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://",
        "http:///x",
        "http://a.example/a b",
        "http://a.example/\r\nX: y",
        "http://a.example/\x00",
        "http://a.example/\u00e4",
        "http://a.example\r\nX: y/",
        "http://a b/",
        "http://user:pass@a.example/",
        "http://a.example@b.example/",
        "http://a.example:0/",
        "http://a.example:99999/",
        "http://a.example:x/",
        "http://\u00e4.example/",
        "ftp://a.example/",
        "/x?u=http://a.example/",
        "a.example/x",
    ],
)
def test_bad_urls(url: str) -> None:
    """What is not an http(s) URL in the form that it is sent is not sent."""
    with pytest.raises(HttpFailed) as raised:
        _split(url)
    assert raised.value.certainly_not_sent


@given(st.text(), st.text())
def test_urls_inject_nothing(authority: str, rest: str) -> None:
    """No URL makes more lines of a request than there are, or other ones."""
    try:
        origin, target = _split(f"http://{authority}/{rest}")
    except HttpFailed:
        return
    lines = _request("GET", origin, target, {}, None).split(b"\r\n")
    assert [line.partition(b":")[0] for line in lines[1:]] == [b"Host", b"User-Agent", b"Accept", b"Accept-Encoding", b"", b""]
    assert lines[0].split(b" ") == [b"GET", target.encode(), b"HTTP/1.1"]
    assert b"\n" not in b"".join(lines)


@given(st.text(min_size=1), st.text())
@example("X", "a\r\nY: b")
@example("X", "a\n")
@example("X", "\x00")
@example("X: a\r\nY", "b")
@example("X ", "b")
def test_headers_inject_nothing(name: str, value: str) -> None:
    """A header is one line, or refused before anything is sent."""
    origin = _origin("http://a.example")
    assert origin is not None
    refused = None
    try:
        request = _request("POST", origin, "/", {name: value}, b"{}")
    except HttpFailed as failed:
        refused = failed
    if refused is not None:
        assert refused.certainly_not_sent
        return
    lines = request.split(b"\r\n")
    assert f"{name}: {value}".encode() in lines
    assert len(lines) == 8 + (name != "Host")
    assert b"\n" not in b"".join(lines)
