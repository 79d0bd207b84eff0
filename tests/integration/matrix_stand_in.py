"""Stand-ins for homeservers: one that speaks any generation of the management API, one that misbehaves below HTTP, and certificates for both."""

import asyncio
import datetime
import ipaddress
import json
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sfu_delegate.matrix.management import Generation

STABLE = "/_matrix/client/v1/delayed_events/"
UNSTABLE = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/"


class Clock:
    """A clock that stands until it is told to go on."""

    def __init__(self, at: float = 1_700_000_000.0) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


@dataclass
class Asked:
    """A request, as it arrived."""

    method: str
    raw_path: str  # quoted, with the query
    authorization: str | None
    body: bytes

    @property
    def path(self) -> str:
        return self.raw_path.partition("?")[0]


@dataclass
class Scripted:
    """An answer to be given to a management request or to `whoami`."""

    status: int = 200
    body: bytes | dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> web.Response:
        if isinstance(self.body, bytes):
            return web.Response(status=self.status, body=self.body, headers=self.headers, content_type="text/html")
        return web.Response(status=self.status, body=json.dumps(self.body).encode(), headers=self.headers, content_type="application/json")


def matrix_error(status: int, errcode: str, headers: dict[str, str] | None = None, **more: object) -> Scripted:
    """A Matrix error."""
    return Scripted(status, {"errcode": errcode, "error": "as asked", **more}, headers or {})


class HomeserverStandIn:
    """Has the endpoints of some generations, announces what it is told to, and answers by a script; `200 {}` when that is empty."""

    def __init__(self, *generations: Generation, features: dict[str, object] | None = None) -> None:
        self.generations: set[Generation] = set(generations)
        self.features: dict[str, object] = {"org.matrix.msc4140": True} if features is None else features
        self.versions: list[Scripted] = []  # answers to /versions before the honest one
        self.script: deque[Scripted] = deque()
        self.whoami = matrix_error(401, "M_UNKNOWN_TOKEN")
        self.lacks_as_405 = False
        self.lacks: set[str] = set()  # actions that are not there in any generation
        self.asked: list[Asked] = []
        self.hold: asyncio.Event | None = None  # /versions waits for it
        self.arrived = asyncio.Event()  # the first request is there

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        self.asked.append(Asked(request.method, request.raw_path, request.headers.get("Authorization"), body))
        self.arrived.set()
        path = request.raw_path.partition("?")[0]
        if path == "/_matrix/client/versions":
            if self.hold is not None:
                await self.hold.wait()
            if self.versions:
                return self.versions.pop(0).response()
            return Scripted(200, {"versions": ["v1.1", "v1.17"], "unstable_features": self.features}).response()
        if path == "/_matrix/client/v3/account/whoami":
            return self.whoami.response()
        found = self._generation(request.method, path, body)
        if found is None or found[0] not in self.generations or found[1] in self.lacks:
            return matrix_error(405 if self.lacks_as_405 else 404, "M_UNRECOGNIZED").response()
        return (self.script.popleft() if self.script else Scripted()).response()

    @staticmethod
    def _generation(method: str, path: str, body: bytes) -> tuple[Generation, str] | None:
        for prefix, in_body, in_path in ((STABLE, Generation.A, Generation.D), (UNSTABLE, Generation.B, Generation.C)):
            if method == "POST" and path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                if len(parts) == 1:
                    return in_body, str(json.loads(body)["action"])
                if len(parts) == 2:
                    return in_path, parts[1]
        return None

    @property
    def paths(self) -> list[str]:
        return [a.path for a in self.asked]

    @property
    def managed(self) -> list[Asked]:
        return [a for a in self.asked if "delayed_events" in a.path]


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(handler: Handler, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """The base URL at which the handler answers."""
    runner = web.ServerRunner(web.Server(handler), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        port = runner.addresses[0][1]
        yield f"https://localhost:{port}" if context else f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_server(talk: Conversation) -> AsyncIterator[str]:
    """The base URL of a server that does with each connection what `talk` does, and then closes it."""
    writers: list[asyncio.StreamWriter] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await talk(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await server.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One HTTP request with its body; b"" when the client has gone."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return head + await reader.readexactly(length)


def closed_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Names(AbstractResolver):
    """A resolver that knows what it is told."""

    def __init__(self, addresses: dict[str, list[str]]) -> None:
        self.addresses = addresses
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        self.asked.append(host)
        if host not in self.addresses:
            raise OSError(None, "no such name")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self.addresses[host]
        ]

    async def close(self) -> None:
        pass


@dataclass
class Authority:
    """A certificate authority, and a server certificate by it for localhost."""

    ca_file: str
    server: ssl.SSLContext


def make_authority(folder: Path) -> Authority:
    """Make one, with its files in the folder."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stand-in authority")])

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    ca = (
        builder(ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.DNSName("*.stand.in"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    server = (
        builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    ca_file, server_file = folder / "ca.pem", folder / "server.pem"
    ca_file.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    server_file.write_bytes(
        server.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_file)
    return Authority(str(ca_file), context)
