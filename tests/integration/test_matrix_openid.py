"""From a server name and an OpenID token to a user ID, over real TLS; and servers that lie."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import web
from sfu_delegate.matrix.federation import Federation, Terms
from sfu_delegate.matrix.openid import OpenId, OpenIdRefused, OpenIdUnavailable

from tests.integration.certificates import Certificates
from tests.integration.federation_stand_in import Ports, Records, Server, trusting_anybody, way_out
from tests.integration.matrix_stand_in import Clock

TOKEN = "secret+token/=&"
PATIENCE = 30.0


class Homeserver:
    """Answers at `.well-known` and at the federation API as a homeserver does."""

    def __init__(self) -> None:
        self.delegates_to = "fed.stand.in"
        self.tokens = {TOKEN: "@alice:hs.stand.in"}
        self.hold: asyncio.Event | None = None
        self.server = Server(self._answer)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/.well-known/matrix/server":
            return web.json_response({"m.server": self.delegates_to})
        if request.path != "/_matrix/federation/v1/openid/userinfo":
            return web.json_response({"errcode": "M_UNRECOGNIZED", "error": ""}, status=404)
        if self.hold is not None:
            await self.hold.wait()
        user = self.tokens.get(request.query["access_token"])
        if user is None:
            return web.json_response({"errcode": "M_UNKNOWN_TOKEN", "error": "Access Token unknown or expired"}, status=401)
        return web.Response(body=json.dumps({"sub": user}).encode())


class World:
    """A homeserver hs.stand.in, whose federation API is at fed.stand.in:8448."""

    def __init__(self, folder: Path) -> None:
        self.certificates = Certificates(folder)
        self.homeserver = Homeserver()
        self.names = Ports({"hs.stand.in": ["127.0.0.1"], "fed.stand.in": ["127.0.0.1"]}, {})
        self.terms = Terms(ssl=self.certificates.trusting)
        self.openid: OpenId

    async def open(self, stack: AsyncExitStack) -> None:
        server = self.homeserver.server
        await stack.enter_async_context(server.listening(self.certificates.server("hs.stand.in", "fed.stand.in")))
        self.names.ports = {("hs.stand.in", 443): server.port, ("fed.stand.in", 8448): server.port}
        egress = await stack.enter_async_context(way_out(self.names, lambda info: info[4][1] == server.port))
        federation = Federation(lambda _name: self.terms, egress, Clock(), srv=Records())
        stack.push_async_callback(federation.aclose)
        self.openid = OpenId(federation, Clock())
        stack.push_async_callback(self.openid.aclose)

    async def user(self, name: str = "hs.stand.in", token: str = TOKEN) -> str:
        return await self.openid.user(name, token, PATIENCE)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        made = World(tmp_path)
        await made.open(stack)
        yield made


async def test_the_owner(world: World) -> None:
    """A token is shown to the homeserver that the name leads to, quoted so that it arrives whole, and once only."""
    assert await world.user() == "@alice:hs.stand.in"
    assert await world.user("HS.stand.in") == "@alice:hs.stand.in"
    asked = world.homeserver.server.asked
    assert [host for host, _ in asked] == ["hs.stand.in", "fed.stand.in"]
    assert asked[1][1].endswith("?access_token=secret%2Btoken%2F%3D%26")


async def test_many_at_once(world: World) -> None:
    """A whole call that joins with one token asks once."""
    world.homeserver.hold = asyncio.Event()
    asking = [asyncio.create_task(world.user()) for _ in range(50)]
    async with asyncio.timeout(PATIENCE):
        while len(world.homeserver.server.asked) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    world.homeserver.hold.set()
    assert set(await asyncio.gather(*asking)) == {"@alice:hs.stand.in"}
    assert len(world.homeserver.server.asked) == 2


async def test_an_unknown_token(world: World) -> None:
    """A token that the homeserver does not know proves nothing."""
    with pytest.raises(OpenIdRefused, match="M_UNKNOWN_TOKEN"):
        await world.user(token="another")


@pytest.mark.parametrize("user", ["@alice:victim.example", "@alice:fed.stand.in", "@alice:hs.stand.in:8448", "@alice:hs.stand.in.evil.example"])
async def test_a_lying_server(world: World, user: str) -> None:
    """A server that vouches for a user of another one is not believed, nor one that vouches under the name that it delegates to."""
    world.homeserver.tokens[TOKEN] = user
    with pytest.raises(OpenIdRefused, match="another server"):
        await world.user()


async def test_a_server_that_points_at_another(world: World) -> None:
    """Whose token it is depends on the name that was asked: a delegation to somebody else's server gains nothing."""
    world.names.addresses["evil.stand.in"] = ["127.0.0.1"]
    world.names.ports["evil.stand.in", 443] = world.homeserver.server.port
    world.terms = Terms(ssl=trusting_anybody())
    with pytest.raises(OpenIdRefused, match="another server"):
        await world.user("evil.stand.in")


async def test_a_wrong_certificate(world: World) -> None:
    """A server without the right certificate is not shown the token."""
    world.homeserver.delegates_to = "other.stand.in"
    world.names.addresses["other.stand.in"] = ["127.0.0.1"]
    world.names.ports["other.stand.in", 8448] = world.homeserver.server.port
    with pytest.raises(OpenIdUnavailable, match="certificate"):
        await world.user()
    assert [path for _, path in world.homeserver.server.asked] == ["/.well-known/matrix/server"]


@pytest.mark.parametrize("inside", ["127.0.0.1", "[::1]", "169.254.169.254:80", "inside.stand.in"])
async def test_not_inside(world: World, inside: str) -> None:
    """A homeserver that delegates into the daemon's own network is not asked, and the error says why."""
    world.names.addresses["inside.stand.in"] = ["10.0.0.1"]
    world.homeserver.delegates_to = inside
    with pytest.raises(OpenIdUnavailable, match=r"must not be reached|may be reached"):
        await world.user()


async def test_a_server_that_cannot_be_found(world: World) -> None:
    """A name that leads nowhere is trouble, not a refusal."""
    with pytest.raises(OpenIdUnavailable, match=r"nowhere\.stand\.in could not be asked about an OpenID token: the host name cannot be resolved"):
        await world.user("nowhere.stand.in")


async def test_a_server_that_does_not_answer(world: World) -> None:
    """Nor is one that does not answer in time; when it answers again, all is well."""
    world.homeserver.hold = asyncio.Event()
    with pytest.raises(OpenIdUnavailable, match="in time"):
        await world.openid.user("hs.stand.in", TOKEN, 1.0)
    world.homeserver.hold.set()
    assert await world.user() == "@alice:hs.stand.in"


async def test_no_secrets_in_logs(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """At the finest log level, and with asyncio's debug mode, nothing of a token is logged by this side."""
    asyncio.get_running_loop().set_debug(True)
    for name in ("asyncio", "aiohttp", "aiohttp.client", "sfu_delegate"):
        caplog.set_level(logging.DEBUG, name)
    await world.user()
    with pytest.raises(OpenIdRefused):
        await world.user(token="another-secret")
    world.homeserver.hold = asyncio.Event()
    with pytest.raises(OpenIdUnavailable):
        await world.openid.user("hs.stand.in", "third-secret", 0.5)
    world.homeserver.hold.set()
    ours = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith(("aiohttp.access", "aiohttp.server")))
    assert "secret" not in ours
