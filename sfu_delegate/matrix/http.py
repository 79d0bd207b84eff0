"""HTTP towards homeservers, as narrow as the callers need it: one request, one whole answer, or one kind of failure.

Three verbs, no redirects, no cookies, no proxies from the environment, no streaming. The interface (`Http`) is this narrow because the four
management requests are all that is asked often; `keep_alive` has the client.

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
from typing import Any, Final, NamedTuple, Protocol

from aiohttp.abc import AbstractResolver, ResolveResult

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


class HttpAnswer(NamedTuple):
    """An answer, of whatever status. Its repr has nothing of what somebody else's server said."""

    status: int
    headers: Mapping[str, str]  # by lower-case name; repeated ones are joined with commas
    body: bytes
    whole: bool = True  # False: the body was longer than MAX_BODY, and only its beginning is here

    def __repr__(self) -> str:
        return f"HttpAnswer(status={self.status}, whole={self.whole})"


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

    async def put(self, url: str, headers: Mapping[str, str], body: bytes, deadline: float, *, ssl: tls.SSLContext | None = None) -> HttpAnswer:
        """PUT: doing it twice does no harm, so that it is repeated as a GET is."""

    async def aclose(self) -> None:
        """Close all connections."""


class CannotResolve(OSError):
    """A host name has no address, or nobody can say."""


def failure_words(error: Exception) -> str:
    """Why there is no connection, in words without URL or address."""
    match error:
        case NotAllowed():
            return error.why
        case CannotResolve():
            return "the host name cannot be resolved"
        case tls.SSLCertVerificationError():
            return f"the TLS certificate is not accepted: {error.verify_message}" if error.verify_message else "the TLS certificate is not accepted"
        case tls.SSLError():
            return "the TLS handshake failed"
        case OSError() if error.errno == errno.EACCES:
            return "none of its addresses may be reached"
        case OSError():
            return f"no connection: {os.strerror(error.errno).lower() if error.errno else 'an error of the network'}"
        case UnicodeError():
            return "the host name is not valid"
        case _:
            return "the connection failed"


def address_of(host: str, port: int) -> AddressInfo | None:
    """What a socket needs to connect to an IP address; None where `host` is none. Asks nobody."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV)
    except (OSError, UnicodeError):
        return None
    family, kind, protocol, name, address = found[0]
    return (family, kind, protocol, name, address)


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
