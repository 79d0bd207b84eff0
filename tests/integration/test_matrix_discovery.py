"""Which homeservers are served, how they are found, and what the way to a discovered one may never lead to."""

import asyncio
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from ssl import SSLContext

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from sfu_delegate.delegation.model import Action, Verdict
from sfu_delegate.matrix.discovery import (
    DEFAULT_LIFE,
    FAILURE_LIFE,
    MAX_CACHED,
    MAX_LIFE,
    MAX_REDIRECTS,
    MIN_LIFE,
    STALE_LIFE,
    DiscoveryFailed,
    Homeserver,
    HomeserverRule,
    Homeservers,
    NotServed,
    life_of,
)
from sfu_delegate.matrix.egress import Egress, public_socket
from sfu_delegate.matrix.http import AddressInfo, HttpAnswer, HttpFailed
from sfu_delegate.matrix.keep_alive import KeepAliveClient
from sfu_delegate.matrix.management import Generation, ManagementClient

from tests.get_only import GetOnly
from tests.integration.matrix_stand_in import Clock, HomeserverStandIn, Names, make_authority, served

EXAMPLE = HomeserverRule("example.org")


class Web(GetOnly):
    """Stands for the HTTP client: answers by URL, and remembers what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, HttpAnswer | HttpFailed] = {}
        self.script: deque[HttpAnswer | HttpFailed] = deque()
        self.asked: list[str] = []
        self.hold: asyncio.Event | None = None
        self.arrived = asyncio.Event()

    async def get(
        self, url: str, headers: Mapping[str, str], deadline: float, *, ssl: SSLContext | None = None, server_hostname: str | None = None
    ) -> HttpAnswer:
        self.asked.append(url)
        self.arrived.set()
        if self.hold is not None:
            await self.hold.wait()
        answer = self.script.popleft() if self.script else self.answers.get(url, HttpAnswer(404, {}, b""))
        if isinstance(answer, HttpFailed):
            raise answer
        return answer


def well_known(base_url: object, cache_control: str | None = None) -> HttpAnswer:
    headers = {} if cache_control is None else {"cache-control": cache_control}
    return HttpAnswer(200, headers, json.dumps({"m.homeserver": {"base_url": base_url}}).encode())


def redirect(location: str, status: int = 302) -> HttpAnswer:
    return HttpAnswer(status, {"location": location}, b"")


WHERE = "https://example.org/.well-known/matrix/client"
DOWN = HttpFailed(True, "no connection: connection refused")


class Finder:
    """Homeservers on a stand-in for the web and a clock."""

    def __init__(self, *rules: HomeserverRule, stale_patience: float = 30.0) -> None:
        self.web, self.configured, self.clock = Web(), Web(), Clock()
        self.homeservers = Homeservers(rules or (EXAMPLE,), Egress(self.configured, self.web), self.clock, stale_patience=stale_patience)

    async def url(self, name: str = "example.org") -> str:
        return (await self.homeservers.resolve(name)).base_url

    async def problem(self, name: str = "example.org") -> str:
        with pytest.raises(DiscoveryFailed) as raised:
            await self.homeservers.resolve(name)
        return str(raised.value)


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_which_rule() -> None:
    """Exact names before patterns, the earlier pattern before the later, whatever the case."""
    everybody, org, exact, again = (
        HomeserverRule("*.a.org"),
        HomeserverRule("*.org"),
        HomeserverRule("X.a.Org"),
        HomeserverRule("x.a.org", url="https://later"),
    )
    found = Finder(everybody, org, exact, again).homeservers
    assert found.rule_for("x.A.org") is exact
    assert found.rule_for("y.a.org") is everybody
    assert found.rule_for("b.org") is org
    assert found.rule_for("a.com") is None
    assert found.rule_for("not a name") is None
    assert found.rule_for("x.a.org/..") is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"pattern": "not a name"}, "neither"),
        ({"pattern": ""}, "neither"),
        ({"pattern": "a.org", "url": "ftp://a"}, "base URL does not begin with https"),
        ({"pattern": "a.org", "url": "https://user:secret@a"}, "has credentials"),
        ({"pattern": "a.org", "as_token": "secret token"}, "as_token"),
        ({"pattern": "a.org", "as_token": ""}, "as_token"),
        ({"pattern": "*", "as_token": "secret"}, "every server whose name matches"),
        ({"pattern": "a.org", "max_in_flight": 0}, "max_in_flight"),
    ],
)
def test_rules_that_make_no_sense(arguments: dict[str, object], says: str) -> None:
    """A rule that cannot be meant is refused with a sentence that holds no secret."""
    with pytest.raises(ValueError, match=says) as raised:
        HomeserverRule(**arguments)  # type: ignore[arg-type]
    assert "secret" not in str(raised.value)


def test_tokens_stay_out_of_reprs() -> None:
    """Neither rules nor homeservers show their token when printed."""
    assert "secret" not in repr(HomeserverRule("a.org", as_token="secret")) + repr(Homeserver("a.org", "https://a", "secret"))


@pytest.mark.parametrize("content", [None, b"", b"not a certificate"])
def test_bad_ca_file(tmp_path: Path, content: bytes | None) -> None:
    """A CA file that is missing or holds no certificates is refused, and the old rules stay in force."""
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    finder = Finder()
    with pytest.raises(ValueError, match=r"^b\.org: the ca_file cannot be used: "):
        finder.homeservers.replace_rules([HomeserverRule("b.org", ca_file=str(path))])
    assert finder.homeservers.rule_for("example.org") is EXAMPLE


async def test_configured_url() -> None:
    """A configured URL is used without asking anybody, http too, and is not restricted."""
    finder = Finder(HomeserverRule("example.org", url="http://127.0.0.1:8008/", as_token="ours"))
    assert await finder.homeservers.resolve("Example.ORG") == Homeserver("example.org", "http://127.0.0.1:8008", "ours", None, discovered=False)
    assert not finder.web.asked
    assert not finder.configured.asked


@pytest.mark.parametrize("name", ["evil.org", "", "a b", "example.org/x", "example.org@evil.org", "https://example.org", "example.org#"])
async def test_not_served(name: str) -> None:
    """For who is not served, and for what is no name, nobody is asked."""
    finder = Finder()
    with pytest.raises(NotServed):
        await finder.homeservers.resolve(name)
    assert not finder.web.asked


# ── looking up ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_found() -> None:
    """The base URL of .well-known is used, without its trailing slash, and marked as discovered."""
    finder = Finder()
    finder.web.answers[WHERE] = well_known("https://matrix.example.org/")
    assert await finder.homeservers.resolve("EXAMPLE.org") == Homeserver("example.org", "https://matrix.example.org", discovered=True)
    assert finder.web.asked == [WHERE]
    assert not finder.configured.asked


@pytest.mark.parametrize("name", ["example.org:8448", "[2606:4700::1]", "[2606:4700::1]:8448", "1.1.1.1"])
async def test_where_it_is_looked_for(name: str) -> None:
    """Ports and IP literals are part of the name."""
    finder = Finder(HomeserverRule("*"))
    finder.web.answers[f"https://{name}/.well-known/matrix/client"] = well_known("https://m.example")
    assert await finder.url(name) == "https://m.example"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (HttpAnswer(404, {}, b""), "answers 404"),
        (HttpAnswer(500, {}, b""), "answers 500"),
        (HttpAnswer(200, {}, b"<html>"), "not a JSON object"),
        (HttpAnswer(200, {}, b"[]"), "not a JSON object"),
        (HttpAnswer(200, {}, b"{}", whole=False), "not a JSON object"),
        (HttpAnswer(200, {}, b"{}"), "base_url in its m.homeserver is not a text"),
        (HttpAnswer(200, {}, b'{"m.homeserver": "x"}'), "is not a text"),
        (HttpAnswer(200, {}, b'{"m.homeserver": {"base_url": ["https://a"]}}'), "is not a text"),
        (well_known("http://matrix.example.org"), "only https is allowed"),
        (well_known("https://user:secret@matrix.example.org"), "has credentials"),
        (well_known("https://matrix.example.org?x"), "has a query"),
        (well_known("javascript:alert(1)"), "does not begin with https"),
        (well_known(""), "is not a text"),
        (DOWN, "connection refused"),
    ],
)
async def test_not_found(answer: HttpAnswer | HttpFailed, says: str) -> None:
    """Whatever is wrong with .well-known is said in a sentence with the remedy; there is no fallback to the bare name."""
    finder = Finder()
    finder.web.answers[WHERE] = answer
    problem = await finder.problem()
    assert says in problem
    assert WHERE in problem
    assert "configure its url" in problem
    assert "secret" not in problem


async def test_http_where_allowed() -> None:
    """A discovered http URL is for those whose rule allows it."""
    finder = Finder(HomeserverRule("example.org", allow_http=True))
    finder.web.answers[WHERE] = well_known("http://matrix.example.org")
    assert await finder.url() == "http://matrix.example.org"


async def test_redirects() -> None:
    """Redirects of .well-known are followed, relative ones too, by the restricted way."""
    finder = Finder()
    finder.web.answers |= {
        WHERE: redirect("https://www.example.org/x?y=1#z", 301),
        "https://www.example.org/x?y=1": redirect("/client", 308),
        "https://www.example.org/client": well_known("https://m.example.org"),
    }
    assert await finder.url() == "https://m.example.org"
    assert not finder.configured.asked


async def test_redirect_loop() -> None:
    """A loop of redirects ends."""
    finder = Finder()
    finder.web.answers[WHERE] = redirect(WHERE)
    assert "redirects more than" in await finder.problem()
    assert len(finder.web.asked) == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    "location",
    [
        "",
        "http://example.org/",
        "ftp://example.org/",
        "https://user:secret@a/",
        "https://a b/",
        "https://a/\x01",
        "https://[::1/",
        "//:0/",
        "https://a/ä",
    ],
)
async def test_bad_redirects(location: str) -> None:
    """A redirect away from https, or to what is no URL, is not followed."""
    finder = Finder()
    finder.web.answers[WHERE] = redirect(location)
    problem = await finder.problem()
    assert "it redirects to a URL that" in problem
    assert "secret" not in problem
    assert finder.web.asked == [WHERE]


# ── remembering ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cache_control", "seconds"),
    [
        (None, DEFAULT_LIFE),
        ("", DEFAULT_LIFE),
        ("public", DEFAULT_LIFE),
        ("max-age=banana", DEFAULT_LIFE),
        ("s-maxage=7", DEFAULT_LIFE),
        ("max-age=7200", 7200.0),
        ('public, Max-Age="7200"', 7200.0),
        ("max-age=0", MIN_LIFE),
        ("max-age=99999999999", MAX_LIFE),
    ],
)
async def test_kept_as_long_as(cache_control: str | None, seconds: float) -> None:
    """A found URL is kept for as long as Cache-Control says, within bounds, and then looked up again."""
    finder = Finder()
    finder.web.answers[WHERE] = well_known("https://one.example", cache_control)
    await finder.url()
    finder.web.answers[WHERE] = well_known("https://two.example", cache_control)
    finder.clock.at += seconds - 1
    assert await finder.url() == "https://one.example"
    finder.clock.at += 1
    assert await finder.url() == "https://two.example"
    assert len(finder.web.asked) == 2


@given(st.text())
def test_any_cache_control(text: str) -> None:
    """Whatever the header says, the time is within the bounds."""
    assert MIN_LIFE <= life_of(text) <= MAX_LIFE


async def test_failures_are_kept_shortly() -> None:
    """A failure is remembered for a minute."""
    finder = Finder()
    await finder.problem()
    finder.web.answers[WHERE] = well_known("https://m.example")
    await finder.problem()
    finder.clock.at += FAILURE_LIFE
    assert await finder.url() == "https://m.example"
    assert len(finder.web.asked) == 2


async def test_stale_is_better_than_nothing() -> None:
    """While looking up again fails, the old URL is used for a day, and the failing lookup repeated once a minute only."""
    finder = Finder()
    finder.web.answers[WHERE] = well_known("https://m.example")
    await finder.url()
    finder.web.answers[WHERE] = DOWN
    finder.clock.at += DEFAULT_LIFE
    assert await finder.url() == "https://m.example"
    assert await finder.url() == "https://m.example"
    assert len(finder.web.asked) == 2
    finder.clock.at += STALE_LIFE - 1
    assert await finder.url() == "https://m.example"
    finder.clock.at += FAILURE_LIFE
    assert "connection refused" in await finder.problem()


async def test_nobody_waits_long_with_a_stale_url_at_hand() -> None:
    """A lookup that hangs does not hold up a departure: the old URL is used, and the lookup goes on."""
    finder = Finder(stale_patience=0.01)
    finder.web.answers[WHERE] = well_known("https://one.example")
    await finder.url()
    finder.clock.at += DEFAULT_LIFE
    finder.web.hold = asyncio.Event()
    finder.web.answers[WHERE] = well_known("https://two.example")
    assert await finder.url() == "https://one.example"
    assert await finder.url() == "https://one.example"
    assert len(finder.web.asked) == 2
    finder.web.hold.set()
    while await finder.url() != "https://two.example":  # noqa: ASYNC110 - the lookup goes on unseen: nobody can be told of its end
        await asyncio.sleep(0)
    assert len(finder.web.asked) == 2
    await finder.homeservers.aclose()


async def test_one_lookup_at_a_time() -> None:
    """Many who ask for one name at once cause one lookup, and one who gives up does not spoil it for the others."""
    finder = Finder()
    finder.web.hold = asyncio.Event()
    finder.web.answers[WHERE] = well_known("https://m.example")
    waiting = [asyncio.create_task(finder.url(name)) for name in ("example.org", "Example.org") * 10]
    await finder.web.arrived.wait()
    waiting[0].cancel()
    finder.web.hold.set()
    assert set(await asyncio.gather(*waiting[1:])) == {"https://m.example"}
    assert finder.web.asked == [WHERE]


async def test_memory_is_bounded() -> None:
    """However many names are asked for, only so many are remembered; the oldest go first."""
    finder = Finder(HomeserverRule("*"))
    for n in range(MAX_CACHED + 1):
        await finder.problem(f"{n}.example")
    count = len(finder.web.asked)
    await finder.problem(f"{MAX_CACHED}.example")
    assert len(finder.web.asked) == count
    await finder.problem("0.example")
    assert len(finder.web.asked) == count + 1


async def test_new_rules() -> None:
    """New rules hold at once; what was found is kept where they would look for it in the same way."""
    finder = Finder(EXAMPLE, HomeserverRule("b.org", allow_http=True))
    finder.web.answers[WHERE] = well_known("https://m.example")
    finder.web.answers["https://b.org/.well-known/matrix/client"] = well_known("http://b.example")
    await finder.url()
    await finder.url("b.org")
    finder.homeservers.replace_rules([HomeserverRule("*.org"), HomeserverRule("c.org", url="https://c")])
    assert await finder.url() == "https://m.example"
    assert finder.web.asked.count(WHERE) == 1
    assert "only https" in await finder.problem("b.org")
    assert await finder.url("c.org") == "https://c"


# ── egress ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def opened(resolver: Names, *, allow_private: bool = False) -> AsyncIterator[Egress]:
    egress = Egress.open(allow_private=allow_private, resolver=resolver)
    try:
        yield egress
    finally:
        await egress.aclose()


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["127.0.0.1", "::1"], ["10.0.0.1", "127.0.0.1", "fe80::1"]])
async def test_a_name_that_leads_inside(tmp_path: Path, addresses: list[str]) -> None:
    """A name whose addresses are not public is not connected to; not one byte arrives."""
    authority = make_authority(tmp_path)
    arrived = 0

    async def handler(_request: web.BaseRequest) -> web.StreamResponse:
        nonlocal arrived
        arrived += 1
        return web.Response()

    async with served(handler, authority.server) as url, opened(Names({"inside.stand.in": addresses})) as egress:
        port = url.rpartition(":")[2]
        rule = HomeserverRule("*", ca_file=authority.ca_file)
        with pytest.raises(DiscoveryFailed, match=r"must not be reached|may be reached"):
            await Homeservers([rule], egress, Clock()).resolve(f"inside.stand.in:{port}")
    assert arrived == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "localhost", "127.1", "2130706433", "0", "169.254.169.254"])
async def test_literals_that_lead_inside(host: str) -> None:
    """Neither do IP literals in any spelling lead inside, nor localhost."""
    egress = Egress.open()
    with pytest.raises(HttpFailed) as raised:
        await egress.discovered.get(f"http://{host}:80/", {}, asyncio.get_running_loop().time() + 30)
    assert raised.value.certainly_not_sent
    assert "refused" not in raised.value.reason
    await egress.aclose()


async def test_configured_urls_lead_anywhere() -> None:
    """The operator's own URL may lead to the next process."""
    stand_in = HomeserverStandIn(Generation.C)
    async with served(stand_in) as url, opened(Names({})) as egress:
        homeserver = await Homeservers([HomeserverRule("hs.test", url=url)], egress, Clock()).resolve("hs.test")
        client = ManagementClient(egress, Clock())
        assert (await client.act(homeserver, Action.RESTART, "id", timeout=30)).verdict is Verdict.DONE


async def test_a_discovered_url_that_leads_inside() -> None:
    """Management requests to a discovered URL are held to the same rule, though .well-known itself was public."""
    stand_in = HomeserverStandIn(Generation.C)
    async with served(stand_in) as url, opened(Names({})) as egress:
        client = ManagementClient(egress, Clock())
        answer = await client.act(Homeserver("hs.test", url, discovered=True), Action.SEND, "id", token="scoped", timeout=30)
    assert answer.verdict is Verdict.FAILED
    assert "loopback" in answer.detail
    assert not stand_in.asked


async def test_an_answer_that_changes() -> None:
    """It is the address of each connection that is judged, not the name: one that was fine before is refused when its answer has changed."""
    judged: list[str] = []

    def judge(info: AddressInfo) -> socket.socket:
        judged.append(info[4][0])
        if info[4][0] == "127.0.0.1":  # stands for a public address
            return socket.socket(*info[:3])
        return public_socket(info)

    async def handler(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(headers={"Connection": "close"})

    async with served(handler) as url:
        for addresses in (["127.0.0.1"], ["127.0.0.2"]):
            # A client for each answer: aiohttp keeps DNS answers for some seconds, which is no protection but would hide the change.
            client = KeepAliveClient(socket_factory=judge, resolver=Names({"rebind.stand.in": addresses}))
            ask = client.get(url.replace("127.0.0.1", "rebind.stand.in"), {}, asyncio.get_running_loop().time() + 30)
            if addresses == ["127.0.0.1"]:
                assert (await ask).status == 200
            else:
                with pytest.raises(HttpFailed, match="loopback"):
                    await ask
            await client.aclose()
    assert judged == ["127.0.0.1", "127.0.0.2"]


async def test_all_of_it_where_private_addresses_are_allowed(tmp_path: Path) -> None:
    """From a server name by .well-known over TLS, with the operator's CA file, to a restarted event."""
    authority = make_authority(tmp_path)
    stand_in = HomeserverStandIn(Generation.D, features={"org.matrix.msc4140.stable": True})
    base_url = ""

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/.well-known/matrix/client":
            return web.json_response({"m.homeserver": {"base_url": base_url}})
        return await stand_in(request)

    names = Names({"hs.stand.in": ["127.0.0.1"], "matrix.stand.in": ["127.0.0.1"]})
    async with served(handler, authority.server) as url, opened(names, allow_private=True) as egress:
        port = url.rpartition(":")[2]
        base_url = f"https://matrix.stand.in:{port}/"
        homeservers = Homeservers([HomeserverRule("*", ca_file=authority.ca_file)], egress, Clock())
        homeserver = await homeservers.resolve(f"hs.stand.in:{port}")
        client = ManagementClient(egress, Clock())
        assert (await client.act(homeserver, Action.RESTART, "id", timeout=30)).verdict is Verdict.DONE
        without_ca = Homeservers([HomeserverRule("*")], egress, Clock())
        with pytest.raises(DiscoveryFailed, match="certificate"):
            await without_ca.resolve(f"hs.stand.in:{port}")
    assert names.asked == ["hs.stand.in", "matrix.stand.in"]
