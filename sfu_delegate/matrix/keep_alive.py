"""`Http` on kept connections: HTTP/1.1, one request at a time on each, parsed by httptools (the parser of Node.js).

It takes a third of the processor time of aiohttp's client, which was the largest cost of a departure, and does what `Http` says and nothing
else: no redirects, cookies, compression, proxies or upgrades.

What it must never do: give the answer to one request to another. So a connection on which anything went other than expected (an answer that
came too late, or before it was asked for, bytes behind its end, a deadline, a cancellation) is closed and not used again.
"""

import asyncio
import re
import socket
import ssl as tls
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from time import monotonic
from typing import Final, NamedTuple

import aiohappyeyeballs
from aiohttp.abc import AbstractResolver
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from yarl import URL

from sfu_delegate import __version__
from sfu_delegate.matrix.http import (
    CONNECT_TIMEOUT,
    MAX_BODY,
    AddressInfo,
    CannotResolve,
    HttpAnswer,
    HttpFailed,
    SocketFactory,
    ThreadsResolver,
    address_of,
    failure_words,
)
from sfu_delegate.matrix.inflight import InFlight
from sfu_delegate.matrix.memory import keep

MAX_HEAD: Final = 64 * 1024  # bytes of status line and headers
MAX_HEADERS: Final = 200
MAX_INFORMATIONAL: Final = 8  # answers of the 100s before the real one
MAX_ANSWER: Final = 16 * MAX_BODY  # bytes of all that comes: a body of MAX_BODY in the smallest of chunks has six times that
IDLE_LIFE: Final = 15.0  # seconds that a connection is kept without being used
SWEEP_EVERY: Final = 5.0
MAX_IDLE: Final = 512  # connections, in all
MAX_IDLE_EACH: Final = 256  # connections to one place
ADDRESSES_LAST: Final = 10.0  # seconds that the addresses of a name are remembered
MAX_NAMES: Final = 1000
NEXT_ADDRESS_AFTER: Final = 0.25  # seconds until the next address is tried beside one that does not answer (RFC 8305)

_ALWAYS: Final = f"User-Agent: sfu-delegate/{__version__}\r\nAccept: application/json\r\nAccept-Encoding: identity\r\n"
_TARGET = re.compile(r"[/?][!-~]*|")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t -~]*")
_KEPT_FOR = re.compile(r"(?:^|[\s,])timeout\s*=\s*([0-9]{1,6})", re.IGNORECASE)
_NO_HTTP = "the answer is not HTTP"


class _Origin(NamedTuple):
    """Where a URL leads to."""

    tls: bool
    host: str  # as the resolver takes it: without brackets
    port: int
    host_header: str


class _Place(NamedTuple):
    """Connections to the same place can take each other's requests."""

    origin: _Origin
    ssl: tls.SSLContext | None
    server_hostname: str | None


@lru_cache(maxsize=1024)
def _origin(prefix: str) -> _Origin | None:
    """The origin of `scheme://authority`; None where it is not one."""
    try:
        url = URL(prefix, encoded=True)
        if url.scheme not in {"https", "http"} or not url.port or not url.raw_host or url.user is not None or url.password is not None:
            return None
    except ValueError:
        return None
    host = url.raw_host
    if not host.isascii() or not host.isprintable() or " " in host:
        return None
    header = f"[{host}]" if ":" in host else host
    return _Origin(url.scheme == "https", host, url.port, header if url.is_default_port() else f"{header}:{url.port}")


def _split(url: str) -> tuple[_Origin, str]:
    """Origin and request target, both to the letter. Raises HttpFailed."""
    begin = url.find("://") + 3
    end = url.find("/", begin) if begin > 2 else 0
    rest = url[end:] if end >= 0 else ""
    prefix = url[:end] if end >= 0 else url
    if "?" in prefix or "#" in prefix or "#" in rest:
        end = min((at for at in (url.find(mark, begin) for mark in "/?#") if at >= 0), default=len(url)) if begin > 2 else 0
        prefix, rest = url[:end], url[end:].partition("#")[0]
    origin = _origin(prefix)
    if origin is None or _TARGET.fullmatch(rest) is None:
        raise HttpFailed(True, "the URL is not valid")
    return origin, rest if rest.startswith("/") else f"/{rest}"


@lru_cache(maxsize=1024)
def _header_lines(host: str, headers: tuple[tuple[str, str], ...]) -> str:
    """The lines of all headers but one; a `Host` among the headers is of whom the server has by another name than its address. Raises HttpFailed."""
    lines = [_ALWAYS] if any(name == "Host" for name, _ in headers) else [f"Host: {host}\r\n{_ALWAYS}"]
    for name, value in headers:
        if _HEADER_NAME.fullmatch(name) is None or _HEADER_VALUE.fullmatch(value) is None:
            raise HttpFailed(True, "a header has characters that it cannot have")
        lines.append(f"{name}: {value}\r\n")
    return "".join(lines)


def _request(method: str, origin: _Origin, target: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
    """The bytes of a request. Raises HttpFailed."""
    head = f"{method} {target} HTTP/1.1\r\n{_header_lines(origin.host_header, tuple(headers.items()))}"
    if body is None:
        return f"{head}\r\n".encode("ascii")
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode("ascii") + body


def _tls_name(host: str) -> str:
    """Whom the certificate must be for. Raises UnicodeError for what TLS cannot ask for, of which the loops make a lot of noise, or a leak."""
    name = host.rstrip(".")
    if not name or name.startswith("."):
        raise UnicodeError
    name.encode("idna")
    return name


class _Closed(HttpFailed):
    """The connection was closed before any byte of the answer."""


class _Connection(asyncio.Protocol):
    """One connection. Idle while `_answer` is None."""

    def __init__(self, client: "KeepAliveClient", place: _Place) -> None:
        self.place = place
        self.idle_until = 0.0
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._answer: asyncio.Future[HttpAnswer] | None = None
        self._begin()

    def _begin(self) -> None:
        """Nothing of an answer has come yet."""
        self._status = 0
        self._headers: dict[str, str] = {}
        self._fields = 0
        self._head = 0  # bytes that came before the end of the headers was seen
        self._parts: list[bytes] = []
        self._size = 0  # bytes of the headers, and then of the body (trailers are not counted here, but in _came)
        self._informational = 0
        self._in_body = False
        self._complete = False
        self._reusable = False
        self._surplus = False  # something came behind its end
        self._came = 0  # bytes in all
        self._problem = ""

    async def exchange(self, request: bytes, deadline: float) -> HttpAnswer:
        """One request and its answer. Raises HttpFailed, and _Closed. The connection is kept if it can be used again, else closed."""
        loop = self._client.loop
        transport = self._transport
        if transport is None or transport.is_closing():
            raise _Closed(False, "the connection was closed before the answer")
        if monotonic() >= deadline:  # the loop's own time stands still while the process does
            self.abort()
            raise HttpFailed(True, "no answer in time")
        self._begin()
        answer: asyncio.Future[HttpAnswer] = loop.create_future()
        self._answer = answer
        timer = loop.call_at(deadline, self._out_of_time, answer)
        try:
            transport.write(request)
            return await answer
        finally:
            timer.cancel()
            if self._answer is answer:  # cancelled; when all is well, it may be under way with the next request already
                self._answer = None
                self.abort()

    @property
    def is_open(self) -> bool:
        """Whether a request can be written; one that is closing stays among the idle ones until the loop has told so."""
        return self._transport is not None and not self._transport.is_closing()

    def _out_of_time(self, answer: asyncio.Future[HttpAnswer]) -> None:
        if self._answer is answer:  # its own came at the last moment otherwise, and this may be the next one's
            self._fail(HttpFailed(False, "no answer in time"))

    def _fail(self, error: HttpFailed) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(error)
            answer.exception()  # asked for, so that asyncio does not complain where the waiter is cancelled before it sees it
        self.abort()

    def abort(self) -> None:
        """Close at once; whoever waits is not told."""
        if self._transport is not None:
            self._transport.abort()
        self._parser = None  # the two hold each other

    # ── asyncio ──

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")  # noqa: S101 — uvloop's are not asyncio's
        self._transport = transport  # type: ignore[assignment]
        self._client.made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._transport = self._parser = None
        self._client.gone(self)
        if self._answer is None:
            return
        if self._in_body and not self._is_framed() and exc is None:
            self._finish(reusable=False)  # its end is the end of the connection
        elif self._came:
            self._fail(HttpFailed(False, "the answer broke off" if self._in_body else "the connection was closed before the answer"))
        else:
            self._fail(_Closed(False, "the connection was closed before the answer"))

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._answer is None or self._parser is None:
            self.abort()  # nobody asked
            return
        self._came += len(data)
        if not self._in_body:
            self._head += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            if self._complete:
                self._surplus = True
            else:
                self._problem = self._problem or _NO_HTTP
        if self._problem:
            self._fail(HttpFailed(False, self._problem))
        elif self._in_body and self._size > MAX_BODY:
            self._finish(reusable=False)
        elif self._complete:
            self._finish(reusable=self._reusable)
        elif (not self._in_body and self._head > MAX_HEAD) or self._came > MAX_ANSWER:
            self._fail(HttpFailed(False, _NO_HTTP))

    def eof_received(self) -> bool:
        """See asyncio.Protocol."""
        return False

    # ── httptools ──

    def on_message_begin(self) -> None:
        """See httptools."""
        self._surplus = self._complete

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools."""
        if self._complete:
            return
        self._fields += 1
        if self._fields > MAX_HEADERS:
            self._problem = _NO_HTTP
        if self._in_body or self._problem:
            return  # a trailer is not a header
        self._size += len(name) + len(value)
        if self._size > MAX_HEAD:
            self._problem = _NO_HTTP
            return
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        """See httptools."""
        if self._complete or self._parser is None:
            return
        self._status = self._parser.get_status_code()
        length, coding = self._headers.get("content-length"), self._headers.get("transfer-encoding")
        framed_twice = (coding is not None and (length is not None or coding.lower() != "chunked")) or (length is not None and "," in length)
        self._size = 0
        if self._status == 101 or not 100 <= self._status <= 599 or framed_twice:
            self._problem = _NO_HTTP
        self._in_body = self._status >= 200

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        if not self._complete and self._size <= MAX_BODY:
            self._parts.append(body)
            self._size += len(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        if self._complete:
            return
        if self._status < 200:
            self._informational += 1
            if self._informational > MAX_INFORMATIONAL:
                self._problem = _NO_HTTP
            self._headers, self._fields, self._head, self._size = {}, 0, 0, 0
            return
        self._complete = True
        self._reusable = self._parser is not None and self._parser.should_keep_alive()

    # ── the end of an answer ──

    def _is_framed(self) -> bool:
        """Does the answer itself say where it ends?"""
        return "content-length" in self._headers or "transfer-encoding" in self._headers

    def _finish(self, *, reusable: bool) -> None:
        answer, self._answer = self._answer, None
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        whole = self._size <= MAX_BODY
        if answer is not None and not answer.done():
            answer.set_result(HttpAnswer(self._status, self._headers, body if whole else body[:MAX_BODY], whole))
        transport = self._transport
        if not reusable or self._surplus or transport is None or transport.is_closing() or transport.get_write_buffer_size():
            self.abort()
            return
        self._client.idle(self, self._life())

    def _life(self) -> float:
        hint = self._headers.get("keep-alive")
        if hint is None:
            return IDLE_LIFE
        found = _KEPT_FOR.search(hint)
        return IDLE_LIFE if found is None else min(IDLE_LIFE, max(0.0, float(found[1]) - 1.0))


class _Addresses(NamedTuple):
    """What a resolver said."""

    infos: list[AddressInfo]
    expires: float


class KeepAliveClient:
    """See `http.Http`. To be made inside a running event loop.

    The number of connections is not bounded here: the callers bound their requests in flight, and a bound in common would let one slow
    homeserver hold up all others. What is bounded is what is kept while it is not used.
    """

    def __init__(
        self,
        *,
        connect_timeout: float = CONNECT_TIMEOUT,
        socket_factory: SocketFactory | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._connect_timeout = connect_timeout
        self._socket_factory = socket_factory
        self._resolver = resolver or ThreadsResolver()
        self._idle: dict[_Place, list[_Connection]] = {}  # the last one to become idle is used first
        self._idle_count = 0
        self._all: set[_Connection] = set()
        self._addresses: OrderedDict[tuple[str, int], _Addresses] = OrderedDict()
        self._lookups: InFlight[list[AddressInfo]] = InFlight()
        self._default: tls.SSLContext | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    # ── Http ──

    async def get(
        self,
        url: str,
        headers: Mapping[str, str],
        deadline: float,
        *,
        ssl: tls.SSLContext | None = None,
        server_hostname: str | None = None,
    ) -> HttpAnswer:
        """GET, repeated once on a new connection when a kept one turns out to be closed."""
        return await self._ask("GET", url, headers, None, deadline, ssl, server_hostname, repeatable=True)

    async def post(
        self,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        deadline: float,
        *,
        ssl: tls.SSLContext | None = None,
        repeatable: bool = False,
    ) -> HttpAnswer:
        """POST, repeated once on a new connection if it is repeatable and its kept connection was closed before an answer came."""
        return await self._ask("POST", url, headers, body, deadline, ssl, None, repeatable=repeatable)

    async def put(self, url: str, headers: Mapping[str, str], body: bytes, deadline: float, *, ssl: tls.SSLContext | None = None) -> HttpAnswer:
        """PUT, repeated once on a new connection when a kept one turns out to be closed."""
        return await self._ask("PUT", url, headers, body, deadline, ssl, None, repeatable=True)

    async def aclose(self) -> None:
        """Close all connections; requests in flight fail."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._lookups.aclose()
        for connection in list(self._all):
            connection.abort()
        if self._all:
            await asyncio.sleep(0)  # their ends are told in the next turn of the loop
        await self._resolver.close()

    async def _ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        deadline: float,
        ssl: tls.SSLContext | None,
        server_hostname: str | None,
        *,
        repeatable: bool,
    ) -> HttpAnswer:
        origin, target = _split(url)
        request = _request(method, origin, target, headers, body)
        if self._closed:
            raise HttpFailed(True, "the daemon is stopping")
        if self.loop.time() >= deadline:
            raise HttpFailed(True, "no answer in time")
        place = _Place(origin, ssl, server_hostname)
        kept = self._take(place)
        if kept is not None:
            try:
                return await kept.exchange(request, deadline)
            except _Closed:
                if not repeatable or self._closed:
                    raise
        # Whatever becomes of this one, the first may have arrived.
        connection = await self._connect(place, deadline, first=kept is None)
        return await connection.exchange(request, deadline)

    # ── the connections that are kept ──

    def _take(self, place: _Place) -> _Connection | None:
        connections = self._idle.get(place)
        if connections is None:
            return None
        now, taken = self.loop.time(), None
        while connections and taken is None:
            connection = connections.pop()
            self._idle_count -= 1
            if connection.is_open and now < connection.idle_until:
                taken = connection
            else:
                connection.abort()
        if not connections:
            del self._idle[place]
        return taken

    def idle(self, connection: _Connection, life: float) -> None:
        """A connection can be used again, within `life` seconds."""
        others = self._idle.get(connection.place, [])
        if self._closed or self._idle_count >= MAX_IDLE or len(others) >= MAX_IDLE_EACH or life <= 0:
            connection.abort()
            return
        connection.idle_until = self.loop.time() + life
        others.append(connection)
        self._idle[connection.place] = others
        self._idle_count += 1
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(SWEEP_EVERY, self._sweep)

    def made(self, connection: _Connection) -> None:
        """A connection has begun."""
        self._all.add(connection)

    def gone(self, connection: _Connection) -> None:
        """A connection has ended, or must not be used again."""
        self._all.discard(connection)
        connections = self._idle.get(connection.place)
        if connections is not None and connection in connections:
            connections.remove(connection)
            self._idle_count -= 1
            if not connections:
                del self._idle[connection.place]

    def _sweep(self) -> None:
        now = self.loop.time()
        for connection in [connection for connections in self._idle.values() for connection in connections if now >= connection.idle_until]:
            self.gone(connection)
            connection.abort()
        self._sweeper = self.loop.call_later(SWEEP_EVERY, self._sweep) if self._idle else None

    # ── a new connection ──

    async def _connect(self, place: _Place, deadline: float, *, first: bool) -> _Connection:
        """Raises HttpFailed: nothing has been sent by this connection; and at all, if it is the `first` one."""
        patience = self.loop.time() + self._connect_timeout
        try:
            async with asyncio.timeout_at(min(deadline, patience)):
                connection = await self._connected(place)
            if not self._closed:
                return connection
            connection.abort()
            why = "the daemon is stopping"
        except TimeoutError:
            why = f"no connection within {self._connect_timeout:g} s" if patience <= deadline else "no answer in time"
        except (OSError, RuntimeError, ValueError) as error:  # a ValueError is about the name that TLS was to ask for
            why = failure_words(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or task is None or task.cancelling():
                raise
            why = "the daemon is stopping"  # it was the lookup that was cancelled
        # Raised outside the handler: the system's errors carry addresses, and would hang on ours as its context.
        raise HttpFailed(first, why)

    async def _connected(self, place: _Place) -> _Connection:
        origin = place.origin
        context = place.ssl or self._system_trust() if origin.tls else None
        name = _tls_name(place.server_hostname or origin.host) if origin.tls else None
        infos = await self._lookup(origin)
        sock = await aiohappyeyeballs.start_connection(
            infos, happy_eyeballs_delay=NEXT_ADDRESS_AFTER, loop=self.loop, socket_factory=self._socket_factory
        )
        owned = True

        def protocol() -> _Connection:
            nonlocal owned
            owned = False  # a transport has it from here on, and closes it; done by us, its number could be another one's by then
            return _Connection(self, place)

        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, connection = await self.loop.create_connection(
                protocol,
                sock=sock,
                ssl=context,
                server_hostname=name,
            )
        finally:
            if owned:
                sock.close()
        return connection

    def _system_trust(self) -> tls.SSLContext:
        if self._default is None:
            self._default = tls.create_default_context()
            self._default.set_alpn_protocols(["http/1.1"])
        return self._default

    async def _lookup(self, origin: _Origin) -> list[AddressInfo]:
        """The addresses of a name. Raises OSError."""
        known = self._addresses.get((origin.host, origin.port))
        if known is not None and self.loop.time() < known.expires:
            return known.infos
        return await self._lookups.share((origin.host, origin.port), lambda: self._resolve(origin))

    async def _resolve(self, origin: _Origin) -> list[AddressInfo]:
        if literal := address_of(origin.host, origin.port):
            return [literal]
        try:
            found = await self._resolver.resolve(origin.host, origin.port, family=socket.AF_UNSPEC)
        except OSError as error:
            raise CannotResolve from error
        infos = [info for result in found if (info := address_of(result["host"], result["port"])) is not None]
        if not infos:
            raise CannotResolve
        keep(self._addresses, (origin.host, origin.port), _Addresses(infos, self.loop.time() + ADDRESSES_LAST), MAX_NAMES)
        return infos
