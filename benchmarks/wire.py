"""HTTP/1.1 as raw as measuring needs it: the load on one side, a skin for the models on the other. For loopback and our own peers only.

A client with comforts would take more of the driver's core than the daemon takes of its own. So requests are made before the span, and an answer is
looked at no more than it takes to find its status and its end.
"""

import asyncio
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import responses
from typing import NamedTuple

HOST = "127.0.0.1"
BACKLOG = 1024
_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: *(\d+)")
_END = b"\r\n\r\n"
_KEPT_REFUSALS = 5


class WireFailed(Exception):
    """A connection ended, or an answer was not what is understood here."""


def request(method: str, target: str, host: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items()), f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + _END + body


# ── the load ──


@dataclass(slots=True)
class Flow:
    """Requests by their number, and what became of them. Times are those of `clock`, in seconds."""

    requests: Sequence[bytes]
    clock: Callable[[], float]
    before: Callable[[int], object] | None = None  # run just before a request is sent
    sent_at: list[float] = field(init=False)
    answered_at: list[float] = field(init=False)
    refused: int = 0  # answers that are not 200
    refusals: list[str] = field(default_factory=list)  # … the first of them, status and body

    def __post_init__(self) -> None:
        self.sent_at = [0.0] * len(self.requests)
        self.answered_at = [0.0] * len(self.requests)

    def refuse(self, answer: bytes) -> None:
        """An answer that is not 200."""
        self.refused += 1
        if len(self.refusals) < _KEPT_REFUSALS:
            head, _, body = answer.partition(_END)
            self.refusals.append(f"{head[9:12].decode('latin-1')} {body[:200].decode('latin-1')}")


class _Lane(asyncio.Protocol):
    """One connection that sends requests one after another, each when the one before was answered."""

    def __init__(self, flow: Flow, numbers: Iterator[int], done: asyncio.Future[None]) -> None:
        self._flow = flow
        self._numbers = numbers
        self._done = done
        self._number = -1
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport  # type: ignore[assignment]
        self._next()

    def _next(self) -> None:
        transport, flow = self._transport, self._flow
        assert transport is not None
        number = self._number = next(self._numbers, -1)
        if number < 0:
            transport.close()
            return
        if flow.before is not None:
            flow.before(number)
        flow.sent_at[number] = flow.clock()
        transport.write(flow.requests[number])

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._rest:
            data = self._rest + data
        end = data.find(_END)
        length = None if end < 0 else _LENGTH.search(data, 0, end)
        if end < 0 or (length is not None and len(data) < end + 4 + int(length[1])):
            self._rest = data
            return
        self._rest = b""
        if length is None or self._number < 0:
            self._fail(WireFailed(f"an answer that cannot be read: {data[:100]!r}"))
            return
        self._flow.answered_at[self._number] = self._flow.clock()
        if data[9:12] != b"200":
            self._flow.refuse(data)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._number >= 0:
            self._fail(WireFailed(f"the connection was closed before the answer to request {self._number}: {exc or 'closed'}"))
        elif not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: WireFailed) -> None:
        self._number = -1
        if self._transport is not None:
            self._transport.abort()
        if not self._done.done():
            self._done.set_exception(error)


async def send(flow: Flow, port: int, lanes: Iterable[Iterator[int]], parallel: int) -> None:
    """Send the requests whose numbers are in `lanes`: each lane on a connection of its own, one after another, up to `parallel` lanes at once.

    Raises WireFailed.
    """
    loop = asyncio.get_running_loop()
    waiting = iter(lanes)

    async def work() -> None:
        for numbers in waiting:
            done: asyncio.Future[None] = loop.create_future()
            await loop.create_connection(lambda numbers=numbers, done=done: _Lane(flow, numbers, done), HOST, port)  # type: ignore[misc]
            await done

    workers = [asyncio.ensure_future(work()) for _ in range(parallel)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def get(port: int, target: str) -> tuple[int, str]:
    """One GET on a connection of its own: status and body. Raises OSError where nobody listens."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(request("GET", target, f"{HOST}:{port}", {"Connection": "close"}))
        head, _, body = (await reader.read(-1)).partition(_END)
    finally:
        writer.close()
        with suppress(OSError):  # it was reset, and is closed
            await writer.wait_closed()
    if not head:
        raise ConnectionResetError("closed before the answer")
    return int(head[9:12]), body.decode()


# ── the skin ──


class Asked(NamedTuple):
    """A request as it came."""

    method: str
    target: str
    head: bytes
    body: bytes

    @property
    def token(self) -> str | None:
        """The bearer token."""
        at = self.head.find(b"Authorization: Bearer ")
        return None if at < 0 else self.head[at + 22 : self.head.find(b"\r\n", at)].decode("latin-1")


class Given(NamedTuple):
    """What it is answered, after `delay` seconds. `body` None: the connection is closed without an answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes | None
    delay: float = 0.0


def rendered(given: Given) -> bytes:
    """The bytes of an answer."""
    body = given.body or b""
    lines = [f"HTTP/1.1 {given.status} {responses.get(given.status, '')}", *(f"{name}: {value}" for name, value in given.headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}"]).encode() + _END + body


class _Skin(asyncio.Protocol):
    """One connection to a model. A peer sends its next request when the one before was answered."""

    def __init__(self, answer: Callable[[Asked], Given], connections: set[asyncio.Transport]) -> None:
        self._answer = answer
        self._connections = connections
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport  # type: ignore[assignment]
        self._connections.add(transport)  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """See asyncio.Protocol."""
        if self._transport is not None:
            self._connections.discard(self._transport)
        self._transport = None

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._rest:
            data = self._rest + data
        end = data.find(_END)
        length = None if end < 0 else _LENGTH.search(data, 0, end)
        whole = end + 4 + (0 if length is None else int(length[1]))
        if end < 0 or len(data) < whole:
            self._rest = data
            return
        self._rest = data[whole:]
        head = data[: end + 2]
        method, target, _ = head[: head.find(b"\r\n")].decode("latin-1").split(" ", 2)
        given = self._answer(Asked(method, target, head, data[end + 4 : whole]))
        if given.delay > 0:
            asyncio.get_running_loop().call_later(given.delay, self._give, given)
        else:
            self._give(given)

    def _give(self, given: Given) -> None:
        if self._transport is None:
            return
        if given.body is None:
            self._transport.abort()
        else:
            self._transport.write(rendered(given))


class Server:
    """A listener on loopback that answers with a function."""

    def __init__(self, server: asyncio.Server, connections: set[asyncio.Transport]) -> None:
        self._server = server
        self._connections = connections

    @classmethod
    async def start(cls, answer: Callable[[Asked], Given], port: int, tls: ssl.SSLContext | None = None) -> "Server":
        """Listen."""
        connections: set[asyncio.Transport] = set()
        loop = asyncio.get_running_loop()
        return cls(await loop.create_server(lambda: _Skin(answer, connections), HOST, port, backlog=BACKLOG, ssl=tls), connections)

    async def close(self) -> None:
        """Close it, and all its connections."""
        self._server.close()
        for transport in list(self._connections):
            transport.abort()
        await self._server.wait_closed()
        await asyncio.sleep(0)
