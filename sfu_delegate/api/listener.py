"""The public listener. Requests that are frequent and come in their usual form are read here, and everything else by aiohttp.

Most requests are webhooks, most of those tell of nothing that matters, and all of them look alike. aiohttp's server takes more time for one than
verifying it, decoding it and keeping what it tells. So `_Connection` reads what LiveKit, browsers and reverse proxies usually send, and hands the
connection over to aiohttp, for good, with the first request that differs from it in anything: a path, a header that says something of how the request
is to be read, a body that is too large or does not come. It has no errors of its own.

What must never happen is that a proxy in front, this, and aiohttp disagree on where a request ends. So nothing is read here that could be read in
two ways.
"""

import asyncio
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Final, NamedTuple, Protocol

from aiohttp import web
from structlog.stdlib import BoundLogger

from sfu_delegate.api.errors import logged
from sfu_delegate.api.plain import DONE, Answer, Asked, Asker, Told, refusal

BACKLOG: Final = 1024
MAX_HEAD: Final = 8000  # bytes; more is aiohttp's, which refuses lines of 8190 …
MAX_HEADERS: Final = 100  # … and more than 128
READ_AHEAD: Final = 64 * 1024  # bytes that are taken from a client that does not wait for its answers
THE_REST_WITHIN: Final = 5.0  # seconds that a request that began as usual may take to come, until aiohttp has it
IDLE_MOST: Final = 3630.0  # seconds that a connection may be silent: longer than reverse proxies keep theirs. As in aiohttp
SWEEP_EVERY: Final = 60.0

# A header line, to the letter: a name, a colon, printable ASCII. No folded lines, no control characters, no lone CR or LF.
_HEADERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~]*\r\n)+")
_UNUSUAL: Final = frozenset(
    {
        b"content-encoding",
        b"expect",
        b"http2-settings",
        b"keep-alive",
        b"proxy-connection",
        b"sec-websocket-key1",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_BLANK: Final = b" \t"


class Usual(Protocol):
    """Answers the usual requests of one path."""

    @property
    def limit(self) -> int:
        """Bytes that a body may have."""

    def serve(self, asked: Asked, told: Told) -> "asyncio.Task[None] | None":
        """Have it answered; the task that does it, if it is one."""


class AtOnce:
    """`take` answers by itself, and does not wait."""

    def __init__(self, take: Callable[[Asked, Told], None], limit: Callable[[], int]) -> None:
        self._take = take
        self._limit = limit

    @property
    def limit(self) -> int:
        """See Usual."""
        return self._limit()

    def serve(self, asked: Asked, told: Told) -> None:
        """See Usual."""
        self._take(asked, told)


class Soon:
    """`answer` waits for something; it does not raise."""

    def __init__(self, answer: Callable[[Asked], Awaitable[Answer]], limit: Callable[[], int]) -> None:
        self._answer = answer
        self._limit = limit

    @property
    def limit(self) -> int:
        """See Usual."""
        return self._limit()

    def serve(self, asked: Asked, told: Told) -> "asyncio.Task[None]":
        """See Usual."""
        return asyncio.create_task(self._tell(asked, told))

    async def _tell(self, asked: Asked, told: Told) -> None:
        told(await self._answer(asked))


class _Unusual(Exception):
    """It is for aiohttp."""


class _Request(NamedTuple):
    """A request as it stands in what was received. Its repr has nothing of what it says."""

    line: bytes
    usual: Usual
    authorization: str | None
    origin: str | None
    forwarded: tuple[str, ...]
    body: bytes
    end: int  # where it ends

    def __repr__(self) -> str:
        return f"_Request({len(self.body)} bytes)"


def read_usual(data: bytes, paths: Mapping[bytes, Usual]) -> "_Request | int":
    """The request that `data` begins with; as long as it is not whole, the number of bytes that it has at the least. Raises _Unusual.

    `paths`: by request line.
    """
    line_end = data.find(b"\r\n")
    head_end = data.find(b"\r\n\r\n", line_end) if line_end >= 0 else -1
    if head_end < 0:
        line = data[:line_end] if line_end >= 0 else data.removesuffix(b"\r")
        begun = line in paths if line_end >= 0 else any(whole.startswith(line) for whole in paths)
        if not begun or len(data) > MAX_HEAD or data.count(b"\n") > MAX_HEADERS + 1:
            raise _Unusual
        return len(data) + 1
    line = data[:line_end]
    usual = paths.get(line)
    if usual is None or head_end > MAX_HEAD or _HEADERS.fullmatch(data, line_end + 2, head_end + 2) is None:
        raise _Unusual
    headers, forwarded = _read_headers(data[line_end + 2 : head_end])
    length = headers.get(b"content-length")
    if b"host" not in headers or length is None or not length.isdigit() or len(length) > 9 or int(length) > usual.limit:
        raise _Unusual
    end = head_end + 4 + int(length)
    if len(data) < end:
        return end
    authorization, origin = headers.get(b"authorization"), headers.get(b"origin")
    return _Request(
        line,
        usual,
        None if authorization is None else authorization.decode("ascii"),
        None if origin is None else origin.decode("ascii"),
        forwarded,
        data[head_end + 4 : end],
        end,
    )


def _read_headers(head: bytes) -> tuple[dict[bytes, bytes], tuple[str, ...]]:
    """Headers by their names in small letters, and what X-Forwarded-For says. Raises _Unusual, also if one of the others is there twice."""
    headers: dict[bytes, bytes] = {}
    forwarded: tuple[str, ...] = ()
    lines = head.split(b"\r\n")
    if len(lines) > MAX_HEADERS:
        raise _Unusual
    for line in lines:
        name, _, value = line.partition(b":")
        name = name.lower()
        value = value.strip(_BLANK)
        if name == b"x-forwarded-for":
            forwarded += (value.decode("ascii"),)
        elif name in headers or name in _UNUSUAL or (name == b"connection" and value.lower() != b"keep-alive"):
            raise _Unusual
        else:
            headers[name] = value
    return headers, forwarded


class _Connection(asyncio.Protocol):
    """One connection, as long as nothing but usual requests comes by it. One after the other is answered."""

    __slots__ = (
        "_answering",
        "_data",
        "_full",
        "_held",
        "_least",
        "_listener",
        "_patience",
        "_peer",
        "_reading",
        "_task",
        "_transport",
        "silent_since",
    )

    def __init__(self, listener: "Listener") -> None:
        self.silent_since = 0.0
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._peer = ""
        self._data: bytes | bytearray = b""  # what has come, and is not taken yet; in one place to which more can be added, if it came in pieces
        self._least = 0  # bytes without which it cannot be
        self._answering = False  # a request waits for its answer
        self._task: asyncio.Task[None] | None = None  # … from this task
        self._full = False  # the client does not take its answers
        self._held = False  # nothing more is taken from it for now
        self._reading = False  # `_read` is under way, and goes on by itself
        self._patience: asyncio.TimerHandle | None = None  # until the rest of a request has to be there

    # ── asyncio ──

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport  # type: ignore[assignment]  # uvloop's are not asyncio's
        self._listener.opened(self)
        if self._listener.closing:
            self.close()
            return
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if peer else ""
        with suppress(OSError):
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """See asyncio.Protocol. What is asked already is done all the same."""
        self._transport = None
        self._stop_waiting()
        self._listener.closed(self)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if not self._data:
            self._data = data
        elif type(self._data) is bytearray:
            self._data += data
        else:
            self._data = bytearray().join((self._data, data))
        if not (self._answering or self._full):
            if len(self._data) >= self._least:
                self._read()
        elif len(self._data) > READ_AHEAD and self._transport is not None and not self._held:
            self._held = True
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._full = True

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._full = False
        if not (self._answering or self._reading):
            self._go_on()

    # ── requests ──

    def _read(self) -> None:
        """Take what has come, as far as it is whole and can be answered."""
        self._reading = True
        while self._data and not (self._answering or self._full) and self._transport is not None:
            if type(self._data) is not bytes:
                self._data = bytes(self._data)
            try:
                request = read_usual(self._data, self._listener.paths)
            except _Unusual:
                self.hand_over()
                break
            if isinstance(request, int):
                self._least = request
                if self._patience is None:
                    self._patience = self._listener.loop.call_later(THE_REST_WITHIN, self.hand_over)
                break
            self._stop_waiting()
            self._data, self._least = self._data[request.end :], 0
            self._answering = True
            self._serve(request)
        self._reading = False

    def _serve(self, request: _Request) -> None:
        asked = Asked(Asker(self._peer, request.forwarded), request.authorization, request.origin, request.body)
        try:
            self._task = request.usual.serve(asked, self._answer)
        except Exception as error:
            method, path, _ = request.line.decode("ascii").split(" ")
            answer = refusal(logged(self._listener.log, error, method, path))
            if self._answering:
                self._answer(answer)

    def _answer(self, answer: Answer) -> None:
        self._answering, self._task = False, None
        self.silent_since = self._listener.loop.time()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(self._listener.done() if answer is DONE else _bytes(answer, self._listener.date()))
        if self._listener.closing:
            transport.close()
        elif not self._reading:
            self._go_on()

    def _go_on(self) -> None:
        if self._data:
            self._read()
        # The rest of a long one has to come as well.
        if self._held and (len(self._data) <= READ_AHEAD or not (self._answering or self._full)):
            self._release()

    def _release(self) -> None:
        self._held = False
        if self._transport is not None:
            self._transport.resume_reading()

    def hand_over(self) -> None:
        """Everything from here on is aiohttp's."""
        self._stop_waiting()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._listener.closing:
            transport.close()
            return
        if self._held:
            self._release()
        self._transport = None
        self._listener.closed(self)
        handler = self._listener.server()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        data, self._data = self._data, b""
        if data:
            handler.data_received(bytes(data))

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    # ── the end ──

    @property
    def idle(self) -> bool:
        """Is nothing to be answered?"""
        return not self._answering

    def close(self) -> None:
        """Close it once its answers have been taken; the second time at once."""
        if self._transport is None:
            return
        if self._transport.is_closing():
            self._transport.abort()
        else:
            self._transport.close()

    def abort(self) -> None:
        """Close it at once."""
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()


class Listener:
    """Serves `app` at a socket, and reads the usual requests of some of its paths by itself."""

    def __init__(self, app: web.Application, usual: Mapping[str, Usual], log: BoundLogger, *, closed_within: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.log = log
        self.paths = {f"POST {path} HTTP/1.1".encode("ascii"): answers for path, answers in usual.items()}
        self.closing = False
        self._closed_within = closed_within
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=closed_within)
        self._connections: set[_Connection] = set()
        self._gone = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._second = 0
        self._date = ""
        self._done = b""

    async def start(self, sock: socket.socket) -> None:
        """Listen at a bound socket."""
        await self._runner.setup()
        self._server = await self.loop.create_server(lambda: _Connection(self), sock=sock, backlog=BACKLOG)
        self._sweeper = self.loop.call_later(SWEEP_EVERY, self._sweep)

    async def close(self) -> None:
        """Accept nothing more, and close: what waits for an answer gets it, if it comes in time."""
        self.closing = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        for connection in [connection for connection in self._connections if connection.idle]:
            connection.close()
        await asyncio.gather(self._drain(), self._runner.cleanup())

    async def _drain(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._closed_within):
                while self._connections:
                    self._gone.clear()
                    await self._gone.wait()
        for connection in list(self._connections):
            connection.abort()

    # ── for connections ──

    @property
    def server(self) -> Callable[[], asyncio.Protocol]:
        """Makes aiohttp's side of a connection."""
        server = self._runner.server
        assert server is not None  # noqa: S101 — there is one from the start on
        return server

    def opened(self, connection: _Connection) -> None:
        """A connection has begun."""
        connection.silent_since = self.loop.time()
        self._connections.add(connection)

    def closed(self, connection: _Connection) -> None:
        """A connection has ended, or is aiohttp's."""
        self._connections.discard(connection)
        self._gone.set()

    def date(self) -> str:
        """The time as HTTP has it. It is made once in a second, and so is the answer that is given most."""
        now = int(time.time())
        if self._second != now:
            self._second, self._date = now, formatdate(now, usegmt=True)
            self._done = _bytes(DONE, self._date)
        return self._date

    def done(self) -> bytes:
        """The answer that is given most."""
        self.date()
        return self._done

    def _sweep(self) -> None:
        before = self.loop.time() - IDLE_MOST
        for connection in [connection for connection in self._connections if connection.idle and connection.silent_since < before]:
            connection.close()
        self._sweeper = self.loop.call_later(SWEEP_EVERY, self._sweep)


def _bytes(answer: Answer, date: str) -> bytes:
    fields = {**answer.headers, "Content-Length": str(len(answer.body)), "Date": date}
    lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    return f"{_status_line(answer.status)}{lines}\r\n".encode("ascii") + answer.body


@lru_cache(maxsize=64)
def _status_line(status: int) -> str:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
