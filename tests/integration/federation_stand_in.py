"""Stand-ins for the federation: certificates, servers at loopback ports that stand for any port, and a name server."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset
from aiohttp import web
from aiohttp.abc import ResolveResult
from sfu_delegate.matrix.egress import Egress, public_socket
from sfu_delegate.matrix.federation import SrvRecord, SrvRecords
from sfu_delegate.matrix.http import AddressInfo
from sfu_delegate.matrix.keep_alive import KeepAliveClient

from tests.integration.matrix_stand_in import Names


def trusting_anybody() -> ssl.SSLContext:
    """What "verification switched off" is."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Server:
    """One server: what it was asked, by which Host, under which TLS name, on how many connections."""

    def __init__(self, answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> None:
        self._answer = answer
        self.port = 0
        self.asked: list[tuple[str, str]] = []  # Host, path with query
        self.tls_names: list[str | None] = []  # by connection that got as far as a handshake
        self.connections: set[Any] = set()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append((request.headers["Host"], request.raw_path))
        assert request.transport is not None
        self.connections.add(request.transport.get_extra_info("peername"))
        return await self._answer(request)

    def _shaken(self, _object: ssl.SSLObject | ssl.SSLSocket, name: str | None, _context: ssl.SSLContext) -> None:
        self.tls_names.append(name)

    @asynccontextmanager
    async def listening(self, context: ssl.SSLContext, address: str = "127.0.0.1") -> AsyncIterator["Server"]:
        context.sni_callback = self._shaken
        runner = web.ServerRunner(web.Server(self), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, address, 0, ssl_context=context).start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()


class Ports(Names):
    """Names with addresses, at each of which certain ports stand for others: nobody can listen at 443."""

    def __init__(self, addresses: dict[str, list[str]], ports: dict[tuple[str, int], int]) -> None:
        super().__init__(addresses)
        self.ports = ports

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        for result in found:
            result["port"] = self.ports.get((host, port), port)
        return found


class Records:
    """SRV records as told."""

    def __init__(self) -> None:
        self.names: dict[str, SrvRecords] = {}

    def add(self, name: str, target: str, port: int) -> None:
        self.names[f"_matrix-fed._tcp.{name}"] = SrvRecords((SrvRecord(0, 0, port, target),), 3600.0)

    async def __call__(self, name: str) -> SrvRecords:
        return self.names.get(name, SrvRecords((), 3600.0))


@asynccontextmanager
async def way_out(names: Names, public: Callable[[AddressInfo], bool] = lambda _info: True) -> AsyncIterator[Egress]:
    """An egress, for whose discovered way certain addresses stand for public ones; all others are judged as ever."""

    def judge(info: AddressInfo) -> socket.socket:
        return socket.socket(*info[:3]) if public(info) else public_socket(info)

    egress = Egress(configured=KeepAliveClient(resolver=names), discovered=KeepAliveClient(socket_factory=judge, resolver=names))
    try:
        yield egress
    finally:
        await egress.aclose()


class NameServer(asyncio.DatagramProtocol):
    """A name server at a loopback port, with some records as in a zone file."""

    def __init__(self) -> None:
        # By name (of others than SRV records "A name"): "rcode:SERVFAIL", "silence", "garbage", or records, one in a line.
        self.zone: dict[str, str] = {}
        self.asked: list[str] = []
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        assert self._transport is not None
        query = dns.message.from_wire(data)
        name, kind = query.question[0].name.to_text(), dns.rdatatype.to_text(query.question[0].rdtype)
        key = name if kind == "SRV" else f"{kind} {name}"
        self.asked.append(key)
        told = self.zone.get(key, "rcode:NXDOMAIN")
        if told == "silence":
            return
        if told == "garbage":
            self._transport.sendto(data[:2] + b"\x80\x00" + b"\xff" * 20, addr)
            return
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        if told.startswith("rcode:"):
            answer.set_rcode(dns.rcode.from_text(told.removeprefix("rcode:")))
        elif told:
            answer.answer.append(dns.rrset.from_text_list(query.question[0].name, 300, "IN", kind, told.splitlines()))
        self._transport.sendto(answer.to_wire(), addr)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        try:
            yield transport.get_extra_info("sockname")[1]
        finally:
            transport.close()
