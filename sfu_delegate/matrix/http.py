"""HTTP towards homeservers, as narrow as the callers need it: one request, one whole answer, or one kind of failure.

Two verbs, no redirects, no cookies, no proxies from the environment, no streaming. The interface (`Http`) is this narrow because the four
management requests are all that is asked often: a client on httptools, which costs a quarter of the processor time of aiohttp's, can take
its place without any caller noticing.

What it must never do: repeat a request that is not safe to repeat, send anything elsewhere than it was told, or put a URL, a header or a
body into an error, for they hold tokens and delay_ids.
"""

import asyncio
import errno
import os
import socket
import ssl as tls
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from sfu_delegate import __version__

MAX_BODY: Final = 64 * 1024  # bytes of an answer that are read; Matrix errors and `/versions` have a few hundred
CONNECT_TIMEOUT: Final = 5.0  # seconds for DNS, TCP and TLS together

AddressInfo = tuple[int, int, int, str, tuple[Any, ...]]
SocketFactory = Callable[[Any], socket.socket]


class NotAllowed(OSError):
    """Raised by a socket factory for an address that must not be reached. Its text, which never names the address, becomes the reason."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EACCES, why)
        self.why = why


class HttpFailed(Exception):
    """There was no answer, or no whole one.

    `certainly_not_sent`: not one byte of the request left, because there was no connection. Otherwise it may have been carried out.
    `reason`: a few words for people, without URL, tokens or delay_ids.
    """

    def __init__(self, certainly_not_sent: bool, reason: str) -> None:
        super().__init__(reason)
        self.certainly_not_sent = certainly_not_sent
        self.reason = reason


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer, of whatever status."""

    status: int
    headers: Mapping[str, str] = field(repr=False)  # by lower-case name; repeated ones are joined with commas
    body: bytes = field(repr=False)
    whole: bool = True  # False: the body was longer than MAX_BODY, and only its beginning is here


class Http(Protocol):
    """What the rest of the package knows of HTTP.

    `url` is used to the letter: whoever makes it quotes it. `deadline` is in the time of the event loop (`loop.time()`) and covers
    everything from DNS to the last byte of the answer. `ssl` replaces the system's certificate authorities. Redirects are answers like any
    other. All raise HttpFailed.
    """

    async def get(
        self,
        url: str,
        headers: Mapping[str, str],
        deadline: float,
        *,
        ssl: tls.SSLContext | None = None,
        server_hostname: str | None = None,
    ) -> HttpAnswer:
        """GET. `server_hostname`: whom the certificate must be for, where that is not the URL's host."""

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
        """POST.

        `repeatable`: doing it twice does no harm, so that it is repeated at once, on a new connection, when a pooled one turns out to
        be closed.
        """

    async def aclose(self) -> None:
        """Close all connections."""


@dataclass(slots=True)
class _Progress:
    """How far one request got."""

    connected: bool = False  # from here on, bytes of it may have left
    pooled: bool = False  # the connection had been used before: the server may have closed it meanwhile


class AiohttpClient:
    """`Http` on aiohttp, with pooled keep-alive connections. To be made inside a running event loop.

    The number of connections is not bounded here: the callers bound their requests in flight, and a bound in common would let one slow
    homeserver hold up all others.
    """

    def __init__(
        self,
        *,
        connect_timeout: float = CONNECT_TIMEOUT,
        socket_factory: SocketFactory | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._connect_timeout = connect_timeout
        self._resolver = resolver or ThreadsResolver()
        self._pooled = self._session(socket_factory, fresh=False)
        # The second try of a repeatable request: a pool could hand out one more closed connection.
        self._fresh = self._session(socket_factory, fresh=True)

    def _session(self, socket_factory: SocketFactory | None, *, fresh: bool) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(_connected)
        trace.on_connection_reuseconn.append(_reused)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=fresh, resolver=self._resolver, socket_factory=socket_factory),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout),
            # Compressed answers are not asked for and not unpacked: a small one could unpack to a huge one.
            headers={"User-Agent": f"sfu-delegate/{__version__}", "Accept": "application/json", "Accept-Encoding": "identity"},
            auto_decompress=False,
            trust_env=False,
            trace_configs=[trace],
        )

    async def get(
        self,
        url: str,
        headers: Mapping[str, str],
        deadline: float,
        *,
        ssl: tls.SSLContext | None = None,
        server_hostname: str | None = None,
    ) -> HttpAnswer:
        """GET, repeated once by aiohttp when a pooled connection turns out to be closed.

        A connection is used again only for the same `server_hostname` and the same `ssl` object.
        """
        return await self._request(
            self._pooled, "GET", url, headers=headers, deadline=deadline, ssl=ssl, server_hostname=server_hostname, progress=_Progress()
        )

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
        """POST, repeated once on a new connection if it is repeatable and its pooled connection was closed before an answer came."""
        progress = _Progress()
        try:
            return await self._request(self._pooled, "POST", url, headers=headers, body=body, deadline=deadline, ssl=ssl, progress=progress)
        except _Disconnected:
            if not (repeatable and progress.pooled):
                raise
        progress = _Progress(connected=True)  # whatever becomes of this one, the first may have arrived
        return await self._request(self._fresh, "POST", url, headers=headers, body=body, deadline=deadline, ssl=ssl, progress=progress)

    async def aclose(self) -> None:
        """Close all connections; requests in flight fail."""
        await self._pooled.close()
        await self._fresh.close()
        await self._resolver.close()

    async def _request(
        self,
        session: aiohttp.ClientSession,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        deadline: float,
        ssl: tls.SSLContext | None,
        server_hostname: str | None = None,
        progress: _Progress,
    ) -> HttpAnswer:
        try:
            target = URL(url, encoded=True)
            valid = target.scheme in {"https", "http"} and target.port and target.raw_host  # a bad port raises only when it is asked for
        except ValueError:
            valid = None
        if not valid:
            raise HttpFailed(True, "the URL is not valid")
        if session.closed:
            raise HttpFailed(True, "the daemon is stopping")
        began = False
        try:
            async with (
                asyncio.timeout_at(deadline),
                session.request(
                    method,
                    target,
                    headers=headers,
                    data=body,
                    ssl=ssl or True,
                    server_hostname=server_hostname,
                    allow_redirects=False,
                    trace_request_ctx=progress,
                ) as response,
            ):
                began = True
                content, whole = await _read(response)
                return HttpAnswer(response.status, _plain(response), content, whole)
        except (aiohttp.ClientError, OSError, RuntimeError, UnicodeError) as error:
            reason = self._reason(error)
            closed = not began and isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)
        # Raised outside the handler: aiohttp's errors carry the URL, and would hang on ours as its context.
        raise (_Disconnected if closed and progress.connected else HttpFailed)(not progress.connected, reason)

    def _reason(self, error: Exception) -> str:
        match error:
            case aiohttp.ClientConnectorCertificateError():
                why = getattr(error.certificate_error, "verify_message", "")
                return f"the TLS certificate is not accepted: {why}" if why else "the TLS certificate is not accepted"
            case aiohttp.ClientSSLError():
                return "the TLS handshake failed"
            case aiohttp.ClientConnectorDNSError():
                return "the host name cannot be resolved"
            case aiohttp.ClientConnectorError():
                if isinstance(error.os_error, NotAllowed):
                    return error.os_error.why
                if error.os_error.errno == errno.EACCES:
                    return "none of its addresses may be reached"
                return f"no connection: {_system_words(error.os_error)}"
            case aiohttp.ConnectionTimeoutError():
                return f"no connection within {self._connect_timeout:g} s"
            case TimeoutError():
                return "no answer in time"
            case aiohttp.InvalidURL():
                return "the URL is not valid"
            case aiohttp.ServerDisconnectedError():
                return "the connection was closed before the answer"
            case aiohttp.ClientPayloadError():
                return "the answer broke off"
            case aiohttp.ClientResponseError():
                return "the answer is not HTTP"
            case OSError():
                return f"the connection broke: {_system_words(error)}"
            case UnicodeError():
                return "the host name is not valid"
            case _:
                return "the connection failed"


class _Disconnected(HttpFailed):
    """The server closed the connection before any answer."""


async def _connected(_session: aiohttp.ClientSession, context: Any, _params: aiohttp.TraceConnectionCreateEndParams) -> None:
    context.trace_request_ctx.connected = True


async def _reused(_session: aiohttp.ClientSession, context: Any, _params: aiohttp.TraceConnectionReuseconnParams) -> None:
    context.trace_request_ctx.connected = True
    context.trace_request_ctx.pooled = True


async def _read(response: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    parts: list[bytes] = []
    size = 0
    while part := await response.content.readany():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY:
            response.close()  # the rest is not wanted, so the connection cannot be used again
            return b"".join(parts)[:MAX_BODY], False
    return b"".join(parts), True


def _plain(response: aiohttp.ClientResponse) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in response.headers.items():
        key = name.lower()
        headers[key] = f"{headers[key]}, {value}" if key in headers else value
    return headers


def _system_words(error: OSError) -> str:
    if error.errno is None:
        return "an error of the network"
    return os.strerror(error.errno).lower()


class ThreadsResolver(AbstractResolver):
    """The system's resolver in a few threads of its own.

    In the event loop's common threads, names with a slow DNS, which anybody can have, would hold up the names of others and everything else
    done there.
    """

    def __init__(self, threads: int = 8) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="dns")

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """All addresses of the name. Raises OSError."""
        found = await asyncio.get_running_loop().run_in_executor(self._threads, _addresses, host, port, family)
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=protocol, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV)
            for kind, protocol, address in found
        ]

    async def close(self) -> None:
        """Let the threads end; lookups that are under way are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _addresses(host: str, port: int, family: int) -> list[tuple[int, int, str]]:
    # As bytes: for text, getaddrinfo applies IDNA, and raises UnicodeError for names that the grammar of server names allows.
    name = host.encode("ascii", "replace")
    found = socket.getaddrinfo(name, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    addresses = []
    for kind, _, protocol, _, address in found:
        text = str(address[0])
        scope = address[3] if kind == socket.AF_INET6 and len(address) == 4 else 0
        addresses.append((int(kind), protocol, f"{text}%{scope}" if scope and "%" not in text else text))
    return addresses
