"""Finding homeservers and asking them over real TLS: whose certificate is accepted, and where discovery must never lead."""

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import dns.asyncresolver
import pytest
from aiohttp import web
from aiohttp.abc import ResolveResult
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.federation import DnsSrv, Federation, SrvFailed, SrvRecord, SrvRecords, Terms
from sfu_delegate.matrix.http import MAX_BODY, AddressInfo, HttpAnswer, HttpFailed
from sfu_delegate.matrix.resolver import DnsResolver

from tests.integration.certificates import Certificates
from tests.integration.federation_stand_in import NameServer, Ports, Records, Server, trusting_anybody, way_out
from tests.integration.matrix_stand_in import Clock

SECRET = "token-that-nobody-may-see"
PATH = f"/ask?access_token={SECRET}"
SOME_IPV6 = pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")


class World:
    """Certificates, names, servers, and a federation that finds them."""

    def __init__(self, folder: Path) -> None:
        self.certificates = Certificates(folder)
        self.names, self.records = Ports({}, {}), Records()
        self.terms = Terms(ssl=self.certificates.trusting)
        self.delegations: dict[str, str] = {}  # by host: what m.server says
        self.redirects: dict[str, str] = {}  # by host: where to
        self.public_ports: set[int] = set()
        self.stack = AsyncExitStack()
        self.egress: Egress
        self.federation: Federation
        self.web: Server

    @asynccontextmanager
    async def open(self) -> AsyncIterator["World"]:
        """With a server for all `.well-known`, which has a certificate for every name in stand.in."""
        async with self.stack:
            self.egress = await self.stack.enter_async_context(way_out(self.names, self.is_public))
            self.federation = Federation(lambda _name: self.terms, self.egress, Clock(), srv=self.records)
            self.stack.push_async_callback(self.federation.aclose)
            self.web = Server(self._well_known)
            await self.stack.enter_async_context(self.web.listening(self.certificates.server("*.stand.in")))
            self.public_ports.add(self.web.port)
            yield self

    def is_public(self, info: AddressInfo) -> bool:
        """Our servers stand for public ones, those at other ports or addresses do not."""
        return bool(info[4][0] == "127.0.0.1" and info[4][1] in self.public_ports)

    async def _well_known(self, request: web.BaseRequest) -> web.StreamResponse:
        host = request.headers["Host"]
        if host in self.redirects:
            return web.Response(status=302, headers={"Location": self.redirects[host]})
        delegated = self.delegations.get(host)
        return web.Response(status=404) if delegated is None else web.json_response({"m.server": delegated})

    def site(self, *hosts: str) -> None:
        """Host names whose port 443 is the server for all `.well-known`."""
        for host in hosts:
            self.names.addresses[host] = ["127.0.0.1"]
            self.names.ports[host, 443] = self.web.port

    async def homeserver(self, context: ssl.SSLContext, *, public: bool = True, address: str = "127.0.0.1") -> Server:
        async def answer(_request: web.BaseRequest) -> web.StreamResponse:
            return web.Response(body=b"homeserver")

        server = await self.stack.enter_async_context(Server(answer).listening(context, address))
        if public:
            self.public_ports.add(server.port)
        return server

    async def get(self, name: str, patience: float = 30.0) -> HttpAnswer:
        return await self.federation.get(name, PATH, asyncio.get_running_loop().time() + patience)

    async def failure(self, name: str, patience: float = 30.0) -> HttpFailed:
        with pytest.raises(HttpFailed) as raised:
            await self.get(name, patience)
        assert SECRET not in repr(raised.value) + repr(raised.value.__cause__) + repr(raised.value.__context__)
        return raised.value


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with World(tmp_path).open() as opened:
        yield opened


# ── whose certificate ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("accepted", [True, False])
async def test_srv(world: World, accepted: bool) -> None:
    """Behind an SRV record the certificate is for the name that was looked up; one for the record's target is refused."""
    world.site("hs.stand.in")
    hs = await world.homeserver(world.certificates.server("hs.stand.in" if accepted else "node.stand.in"))
    world.names.addresses["node.stand.in"] = ["127.0.0.1"]
    world.records.add("hs.stand.in", "node.stand.in", hs.port)
    if accepted:
        assert (await world.get("hs.stand.in")).body == b"homeserver"
        assert hs.asked == [("hs.stand.in", PATH)]
    else:
        failed = await world.failure("hs.stand.in")
        assert failed.certainly_not_sent
        assert "certificate" in failed.reason
        assert hs.asked == []
    assert hs.tls_names == ["hs.stand.in"]


@pytest.mark.parametrize("accepted", [True, False])
async def test_delegated_and_srv(world: World, accepted: bool) -> None:
    """Behind `.well-known` and an SRV record it is for the delegated name; neither that of the server nor of the target will do."""
    world.site("hs.stand.in")
    world.delegations["hs.stand.in"] = "fed.stand.in"
    context = world.certificates.server("fed.stand.in") if accepted else world.certificates.server("hs.stand.in", "node.stand.in")
    hs = await world.homeserver(context)
    world.names.addresses["node.stand.in"] = ["127.0.0.1"]
    world.records.add("fed.stand.in", "node.stand.in", hs.port)
    if accepted:
        await world.get("hs.stand.in")
        assert hs.asked == [("fed.stand.in", PATH)]
    else:
        assert "certificate" in (await world.failure("hs.stand.in")).reason
        assert hs.asked == []
    assert hs.tls_names == ["fed.stand.in"]


@pytest.mark.parametrize("accepted", [True, False])
async def test_delegated_with_a_port(world: World, accepted: bool) -> None:
    """Behind `.well-known` with a port it is for the delegated name; that of the server itself is refused."""
    world.site("hs.stand.in")
    hs = await world.homeserver(world.certificates.server("fed.stand.in" if accepted else "hs.stand.in"))
    world.names.addresses["fed.stand.in"] = ["127.0.0.1"]
    world.delegations["hs.stand.in"] = f"fed.stand.in:{hs.port}"
    if accepted:
        await world.get("hs.stand.in")
        assert hs.asked == [(f"fed.stand.in:{hs.port}", PATH)]
    else:
        assert "certificate" in (await world.failure("hs.stand.in")).reason
        assert hs.asked == []


async def test_the_last_step(world: World) -> None:
    """Without `.well-known` and SRV: port 8448 of the name, with a certificate for it and without a port in Host."""
    world.site("hs.stand.in")
    hs = await world.homeserver(world.certificates.server("hs.stand.in"))
    world.names.ports["hs.stand.in", 8448] = hs.port
    await world.get("HS.stand.in")
    assert (hs.asked, hs.tls_names) == ([("hs.stand.in", PATH)], ["hs.stand.in"])


@pytest.mark.parametrize(("names", "accepted"), [(("127.0.0.1",), True), (("127.0.0.2", "hs.stand.in", "localhost"), False)])
async def test_ip_literals(world: World, names: tuple[str, ...], accepted: bool) -> None:
    """An IP literal needs a certificate for that address, not for any name."""
    hs = await world.homeserver(world.certificates.server(*names))
    if accepted:
        await world.get(f"127.0.0.1:{hs.port}")
        assert hs.asked == [(f"127.0.0.1:{hs.port}", PATH)]
    else:
        assert "certificate" in (await world.failure(f"127.0.0.1:{hs.port}")).reason
        assert hs.asked == []


@SOME_IPV6
async def test_ipv6_literals(world: World) -> None:
    """The same for IPv6."""
    try:
        hs = await world.homeserver(world.certificates.server("::1"), address="::1")
    except OSError:
        pytest.skip("nobody can listen at [::1] here")
    world.terms = Terms(ssl=world.certificates.trusting, allow_private=True)
    await world.get(f"[::1]:{hs.port}")
    assert hs.asked == [(f"[::1]:{hs.port}", PATH)]


async def test_expired(world: World) -> None:
    """An expired certificate is refused, and the reason says so."""
    hs = await world.homeserver(world.certificates.server("127.0.0.1", days=-1))
    assert "expired" in (await world.failure(f"127.0.0.1:{hs.port}")).reason


async def test_the_systems_authorities(world: World) -> None:
    """Without a context of the operator, an authority that the system does not know is not trusted, for `.well-known` neither."""
    hs = await world.homeserver(world.certificates.server("hs.stand.in", "fed.stand.in"))
    world.site("hs.stand.in")
    world.names.addresses["fed.stand.in"] = ["127.0.0.1"]
    world.names.ports["hs.stand.in", 8448] = hs.port
    world.delegations["hs.stand.in"] = f"fed.stand.in:{hs.port}"
    world.terms = Terms()
    assert "certificate" in (await world.failure("hs.stand.in")).reason
    assert world.web.asked == []
    assert hs.tls_names == ["hs.stand.in"]


async def test_verification_switched_off(world: World) -> None:
    """With a context that checks nothing, any certificate will do, for `.well-known` too."""
    hs = await world.homeserver(world.certificates.server("elsewhere.example", days=-1))
    world.site("hs.stand.in")
    world.names.addresses["fed.stand.in"] = ["127.0.0.1"]
    world.delegations["hs.stand.in"] = f"fed.stand.in:{hs.port}"
    world.terms = Terms(ssl=trusting_anybody())
    await world.get("hs.stand.in")
    assert hs.asked == [(f"fed.stand.in:{hs.port}", PATH)]


# ── connections are kept apart ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_connection_for_one_name_is_not_used_for_another(world: World) -> None:
    """Two names behind one target: each has its own connection, and the certificate of one does not open the way for the other."""
    world.site("a.stand.in", "b.stand.in", "c.stand.in")
    world.names.addresses["node.stand.in"] = ["127.0.0.1"]
    hs = await world.homeserver(world.certificates.server("a.stand.in", "b.stand.in"))
    for name in ("a.stand.in", "b.stand.in", "c.stand.in"):
        world.records.add(name, "node.stand.in", hs.port)
    for name in ("a.stand.in", "b.stand.in", "a.stand.in", "b.stand.in"):
        await world.get(name)
    assert "certificate" in (await world.failure("c.stand.in")).reason
    assert [host for host, _ in hs.asked] == ["a.stand.in", "b.stand.in", "a.stand.in", "b.stand.in"]
    assert hs.tls_names == ["a.stand.in", "b.stand.in", "c.stand.in"]
    assert len(hs.connections) == 2


async def test_an_unverified_connection_is_not_used_where_verification_is_on(world: World) -> None:
    """A connection made under one TLS context never serves another one, in either order of trust."""
    hs = await world.homeserver(world.certificates.server("elsewhere.example"))
    name = f"127.0.0.1:{hs.port}"
    lax, strict = Terms(ssl=trusting_anybody()), Terms(ssl=world.certificates.trusting)
    world.terms = lax
    await world.get(name)
    world.terms = strict
    assert "certificate" in (await world.failure(name)).reason
    world.terms = Terms()
    assert "certificate" in (await world.failure(name)).reason
    world.terms = lax
    await world.get(name)
    assert len(hs.connections) == 1
    assert len(hs.asked) == 2


async def test_a_plain_name_and_the_same_host_behind_srv(world: World) -> None:
    """A connection to a host under its own name is not used for another name whose SRV record leads to that host and port."""
    world.site("hs.stand.in")
    hs = await world.homeserver(world.certificates.server("node.stand.in"))
    world.names.addresses["node.stand.in"] = ["127.0.0.1"]
    world.records.add("hs.stand.in", "node.stand.in", hs.port)
    await world.get(f"node.stand.in:{hs.port}")
    assert "certificate" in (await world.failure("hs.stand.in")).reason
    assert [host for host, _ in hs.asked] == [f"node.stand.in:{hs.port}"]


# ── where it must not lead ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


INSIDE = ["127.0.0.1", "[::1]", "169.254.169.254", "10.0.0.1", "192.168.1.1", "[::ffff:127.0.0.1]", "[fe80::1]", "0.0.0.0", "inside.stand.in"]
MUST_NOT = re.compile("must not be reached|none of its addresses may be reached")


async def victim(world: World) -> Server:
    """A server inside, with a certificate that would be accepted under every name."""
    names = ("127.0.0.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "localhost", "*.stand.in")
    server = await world.homeserver(world.certificates.server(*names), public=False)
    world.names.addresses["inside.stand.in"] = ["127.0.0.1"]
    for port in (443, 8448):
        world.names.ports["inside.stand.in", port] = server.port
    return server


@pytest.mark.parametrize("host", [*INSIDE, "localhost"])
async def test_names_that_lead_inside(world: World, host: str) -> None:
    """A client that names such a server, by address or by name, gets nothing asked."""
    inside = await victim(world)
    world.names.addresses["localhost"] = ["127.0.0.1", "::1"]
    for name in (host, f"{host}:{inside.port}"):
        failed = await world.failure(name)
        assert failed.certainly_not_sent
        assert MUST_NOT.search(failed.reason)
    assert (inside.asked, inside.tls_names) == ([], [])


@pytest.mark.parametrize("host", INSIDE)
async def test_delegations_that_lead_inside(world: World, host: str) -> None:
    """A `.well-known` that points inside gets nothing asked there."""
    inside = await victim(world)
    world.site("evil.stand.in")
    for delegated in (host, f"{host}:{inside.port}"):
        world.delegations["evil.stand.in"] = delegated
        federation = Federation(lambda _name: world.terms, world.egress, Clock(), srv=world.records)
        with pytest.raises(HttpFailed) as raised:
            await federation.get("evil.stand.in", PATH, asyncio.get_running_loop().time() + 30)
        assert MUST_NOT.search(raised.value.reason)
        await federation.aclose()
    assert (inside.asked, inside.tls_names) == ([], [])


@pytest.mark.parametrize("target", ["127.0.0.1", "169.254.169.254", "inside.stand.in"])
async def test_srv_records_that_lead_inside(world: World, target: str) -> None:
    """Nor does an SRV record lead inside."""
    inside = await victim(world)
    world.site("evil.stand.in")
    world.records.add("evil.stand.in", target, inside.port)
    assert MUST_NOT.search((await world.failure("evil.stand.in")).reason)
    assert (inside.asked, inside.tls_names) == ([], [])


@pytest.mark.parametrize("host", INSIDE)
async def test_redirects_that_lead_inside(world: World, host: str) -> None:
    """Nor does a redirect of `.well-known`: it counts as none, and the name's own port 8448 is asked."""
    inside = await victim(world)
    world.site("evil.stand.in")
    world.redirects["evil.stand.in"] = f"https://{host}:{inside.port}/secrets"
    hs = await world.homeserver(world.certificates.server("evil.stand.in"))
    world.names.ports["evil.stand.in", 8448] = hs.port
    assert (await world.get("evil.stand.in")).body == b"homeserver"
    assert len(world.web.asked) == 1
    assert (inside.asked, inside.tls_names) == ([], [])


async def test_dns_rebinding(world: World) -> None:
    """A name that was public when its `.well-known` was read, and is not when it is connected to, gets nothing asked."""
    inside = await victim(world)
    world.site("evil.stand.in")
    world.delegations["evil.stand.in"] = f"evil.stand.in:{inside.port}"
    asked: list[int] = []
    honest = world.names.resolve

    async def rebinding(host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        asked.append(port)
        world.names.addresses[host] = ["127.0.0.1" if port == 443 else "127.0.0.2"]
        return await honest(host, port, family)

    world.names.resolve = rebinding  # type: ignore[method-assign]
    assert MUST_NOT.search((await world.failure("evil.stand.in")).reason)
    assert asked == [443, inside.port]
    assert world.web.asked == [("evil.stand.in", "/.well-known/matrix/server")]
    assert (inside.asked, inside.tls_names) == ([], [])


async def test_rebinding_between_two_connections(world: World, tmp_path: Path) -> None:
    """It is the address of each connection that is judged: a name that was asked before is refused once it leads inside."""
    hs = await world.homeserver(world.certificates.server("hs.stand.in"))
    world.names.addresses["hs.stand.in"] = ["127.0.0.1"]
    name = f"hs.stand.in:{hs.port}"
    await world.get(name)
    world.names.addresses["hs.stand.in"] = ["127.0.0.2"]
    # A way out of its own: the first one has a connection, and aiohttp keeps DNS answers for some seconds.
    async with way_out(world.names, world.is_public) as egress:
        federation = Federation(lambda _name: world.terms, egress, Clock(), srv=world.records)
        with pytest.raises(HttpFailed, match="loopback"):
            await federation.get(name, PATH, asyncio.get_running_loop().time() + 30)
    assert len(hs.asked) == 1


async def test_where_private_addresses_are_allowed(world: World) -> None:
    """With the operator's leave the same name is asked."""
    inside = await victim(world)
    world.terms = Terms(ssl=world.certificates.trusting, allow_private=True)
    assert (await world.get(f"inside.stand.in:{inside.port}")).body == b"homeserver"


async def test_a_configured_url(world: World) -> None:
    """The operator's own URL may lead inside, and is used with its path; its host is what the certificate must be for."""
    inside = await victim(world)
    world.terms = Terms(url=f"https://localhost:{inside.port}/base/", ssl=world.certificates.trusting)
    world.names.addresses["localhost"] = ["127.0.0.1"]
    await world.get("hs.stand.in")
    assert inside.asked == [(f"localhost:{inside.port}", f"/base{PATH}")]


# ── servers that misbehave ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def misbehaving(world: World, *chunks: bytes, endless: bytes = b"", pause: float = 0.0) -> AsyncIterator[None]:
    """The whole of slow.stand.in is a server that writes some bytes, and then the same ones for ever."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            for chunk in chunks:
                writer.write(chunk)
            while endless:
                writer.write(endless)
                await writer.drain()
                await asyncio.sleep(pause)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=world.certificates.server("slow.stand.in"))
    port = server.sockets[0].getsockname()[1]
    world.public_ports.add(port)
    world.names.addresses["slow.stand.in"] = ["127.0.0.1"]
    world.names.ports["slow.stand.in", 443] = port
    world.names.ports["slow.stand.in", 8448] = port
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_endless_answers(world: World) -> None:
    """Endless answers are read up to a bound: such a `.well-known` counts as none, such an answer is not whole."""
    async with misbehaving(world, HEAD, b'b\r\n{"m.server"\r\n', endless=b"2000\r\n" + b" " * 0x2000 + b"\r\n"):
        answer = await world.get("slow.stand.in")
    assert (len(answer.body), answer.whole) == (MAX_BODY, False)


@pytest.mark.parametrize("first", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"])
async def test_dripping_answers(world: World, first: bytes) -> None:
    """A server that drips a byte at a time, in its header or its body, is given up when the caller's time is over."""
    async with misbehaving(world, first, endless=b"x", pause=0.01):
        failed = await world.failure("slow.stand.in", patience=0.5)
        assert "time" in failed.reason
        name = "slow.stand.in:8448"
        assert "time" in (await world.failure(name, patience=0.5)).reason


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{",
    ],
)
async def test_answers_that_are_none(world: World, answer: bytes) -> None:
    """What is not HTTP, or breaks off, is a failure and nothing worse."""
    async with misbehaving(world, answer):
        assert not (await world.failure("slow.stand.in")).certainly_not_sent


async def test_loops(world: World) -> None:
    """Redirects in a circle end; then the name's own port is asked."""
    world.site("a.stand.in", "b.stand.in")
    world.redirects["a.stand.in"] = "https://b.stand.in/"
    world.redirects["b.stand.in"] = "https://a.stand.in/"
    hs = await world.homeserver(world.certificates.server("a.stand.in"))
    world.names.ports["a.stand.in", 8448] = hs.port
    await world.get("a.stand.in")
    assert len(world.web.asked) == 6
    assert len(hs.asked) == 1


# ── the DNS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def asking(port: int) -> Callable[[], dns.asyncresolver.Resolver]:
    """What asks the name server at a port."""

    def resolver() -> dns.asyncresolver.Resolver:
        made = dns.asyncresolver.Resolver(configure=False)
        made.nameservers = ["127.0.0.1"]
        made.port = port
        return made

    return resolver


@asynccontextmanager
async def name_server(zone: dict[str, str]) -> AsyncIterator[tuple[NameServer, DnsSrv]]:
    server = NameServer()
    server.zone = zone
    async with server.listening() as port:
        yield server, DnsSrv(asking(port), timeout=0.5)


async def test_addresses_of_strangers() -> None:
    """IPv4 and IPv6, by name servers and without threads: one name that hangs holds up no other."""
    server = NameServer()
    server.zone = {
        "A a.test.": "192.0.2.1\n192.0.2.2",
        "AAAA a.test.": "2001:db8::1",
        "A only.test.": "192.0.2.3",
        "A hangs.test.": "silence",
        "AAAA hangs.test.": "silence",
        "A fails.test.": "rcode:SERVFAIL",
    }
    async with server.listening() as port:
        resolver = DnsResolver(asking(port), timeout=0.5)
        hanging = [asyncio.create_task(resolver.resolve("hangs.test", 443, socket.AF_UNSPEC)) for _ in range(100)]
        await asyncio.sleep(0)
        found = await resolver.resolve("a.test", 443, socket.AF_UNSPEC)
        assert {(entry["host"], entry["port"], entry["family"]) for entry in found} == {
            ("192.0.2.1", 443, socket.AF_INET),
            ("192.0.2.2", 443, socket.AF_INET),
            ("2001:db8::1", 443, socket.AF_INET6),
        }
        assert [entry["host"] for entry in await resolver.resolve("only.test.", 1)] == ["192.0.2.3"]
        assert not any(task.done() for task in hanging)
        for name in ("fails.test", "none.test", "a..test", "x" * 64 + ".test"):
            with pytest.raises(OSError, match="no address"):
                await resolver.resolve(name, 443, socket.AF_UNSPEC)
        assert {type(end) for end in await asyncio.gather(*hanging, return_exceptions=True)} == {OSError}
        await resolver.close()


async def test_srv_records() -> None:
    """Records come with their time to live, and names without the dot at their end."""
    async with name_server({"_matrix-fed._tcp.a.test.": "10 5 443 Node.a.test.\n20 0 8448 _x.a.test.\n0 0 0 ."}) as (server, lookup):
        found = await lookup("_matrix-fed._tcp.a.test")
    assert set(found.records) == {SrvRecord(10, 5, 443, "node.a.test"), SrvRecord(20, 0, 8448, "_x.a.test"), SrvRecord(0, 0, 0, ".")}
    assert found.life == 300.0
    assert server.asked == ["_matrix-fed._tcp.a.test."]


@pytest.mark.parametrize("zone", [{}, {"_matrix._tcp.a.test.": ""}])
async def test_no_srv_records(zone: dict[str, str]) -> None:
    """Neither an unknown name nor one without such records is a failure."""
    async with name_server(zone) as (_, lookup):
        assert (await lookup("_matrix._tcp.a.test")).records == ()


@pytest.mark.parametrize("told", ["rcode:SERVFAIL", "rcode:REFUSED", "rcode:YXDOMAIN", "silence", "garbage"])
async def test_a_dns_that_fails(told: str) -> None:
    """Every other answer, and none, is a failure that says nothing of the records."""
    async with name_server({"_matrix._tcp.a.test.": told}) as (_, lookup):
        with pytest.raises(SrvFailed):
            await lookup("_matrix._tcp.a.test")


@pytest.mark.parametrize("name", ["_matrix._tcp.a..test", "_matrix._tcp." + "a" * 64, "_matrix._tcp." + "a." * 130])
async def test_names_that_the_dns_cannot_have(name: str) -> None:
    """They have no records, and nobody is asked."""
    async with name_server({}) as (server, lookup):
        assert await lookup(name) == SrvRecords((), 3600.0)
    assert server.asked == []


@pytest.mark.parametrize("content", [None, "", "nameserver somewhere\n", "options timeout:x\nnameserver\n", "nameserver \xff\n"])
async def test_no_resolv_conf(tmp_path: Path, content: str | None) -> None:
    """Without a usable resolv.conf there are failures, not crashes."""
    file = tmp_path / "resolv.conf"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(SrvFailed):
        await DnsSrv(lambda: dns.asyncresolver.Resolver(filename=str(file)))("_matrix._tcp.a.test")


async def test_from_the_dns_to_the_answer(world: World) -> None:
    """A server that only an SRV record tells of is found by a real question to a name server, and asked under its own name."""
    world.site("hs.stand.in")
    world.names.addresses["node.stand.in"] = ["127.0.0.1"]
    hs = await world.homeserver(world.certificates.server("hs.stand.in"))
    async with name_server({"_matrix._tcp.hs.stand.in.": f"0 0 {hs.port} node.stand.in."}) as (_, lookup):
        federation = Federation(lambda _name: world.terms, world.egress, Clock(), srv=lookup)
        answer = await federation.get("hs.stand.in", PATH, asyncio.get_running_loop().time() + 30)
        await federation.aclose()
    assert answer.body == b"homeserver"
    assert hs.asked == [("hs.stand.in", PATH)]
