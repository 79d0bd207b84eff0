"""Server discovery, step by step, against a stand-in for the web and the DNS; and how requests to one homeserver wait."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from ssl import PROTOCOL_TLS_CLIENT, SSLContext

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfu_delegate.matrix import federation as federation_module
from sfu_delegate.matrix.discovery import LOOKUP_TIMEOUT, MIN_LIFE, STALE_LIFE, DiscoveryFailed, HomeserverRule, Homeservers, life_of
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.federation import (
    AVOIDED,
    DELEGATION_LIFE,
    DOWN_LIFE,
    MAX_DELEGATION_LIFE,
    MAX_DOWN_LIFE,
    MAX_KEPT,
    MAX_SRV_LIFE,
    MAX_TARGETS,
    MAX_WAITING,
    MIN_SRV_LIFE,
    NONE_LIFE,
    OF_A_STRANGER,
    STRANGERS,
    Federation,
    SrvFailed,
    SrvRecord,
    SrvRecords,
    Terms,
    in_order,
)
from sfu_delegate.matrix.http import HttpAnswer, HttpFailed
from sfu_delegate.matrix.names import ServerName, server_of

from tests.get_only import GetOnly

SECRET = "token-that-nobody-may-see"
PATH = f"/_matrix/federation/v1/openid/userinfo?access_token={SECRET}"
FED, OLD = "_matrix-fed._tcp.", "_matrix._tcp."
REFUSED = HttpFailed(True, "no connection: connection refused")
CUT = HttpFailed(False, "the connection was closed before the answer")


class Clock:
    """Stands until it is told to go on."""

    def __init__(self) -> None:
        self.at = 1_700_000_000.0

    def __call__(self) -> float:
        return self.at


class Web(GetOnly):
    """Stands for the HTTP client: answers `.well-known` by URL and everything else by authority."""

    def __init__(self) -> None:
        self.answers: dict[str, HttpAnswer | HttpFailed] = {}
        self.asked: list[str] = []  # URLs of `.well-known` and of redirects
        self.requests: list[tuple[str, str | None, str | None]] = []  # authority, Host header, name in the certificate
        self.contexts: list[SSLContext | None] = []
        self.deadlines: list[float] = []
        self.hold: asyncio.Event | None = None  # lookups wait for it
        self.hold_requests: asyncio.Event | None = None
        self.busy = 0
        self.busiest = 0

    async def get(
        self, url: str, headers: Mapping[str, str], deadline: float, *, ssl: SSLContext | None = None, server_hostname: str | None = None
    ) -> HttpAnswer:
        self.contexts.append(ssl)
        self.deadlines.append(deadline)
        if not url.endswith(PATH):
            self.asked.append(url)
            assert server_hostname is None
            if self.hold is not None:
                await self.hold.wait()
            answer = self.answers.get(url, HttpAnswer(404, {}, b""))
        else:
            authority = url.removeprefix("https://").removesuffix(PATH)
            self.requests.append((authority, headers.get("Host"), server_hostname))
            self.busy += 1
            self.busiest = max(self.busy, self.busiest)
            try:
                if self.hold_requests is not None:
                    await self.hold_requests.wait()
            finally:
                self.busy -= 1
            answer = self.answers.get(authority, HttpAnswer(200, {}, authority.encode()))
        if isinstance(answer, HttpFailed):
            raise answer
        return answer


class Dns:
    """Stands for the DNS; None: it does not answer."""

    def __init__(self) -> None:
        self.names: dict[str, SrvRecords | None] = {}
        self.asked: list[str] = []

    async def __call__(self, name: str) -> SrvRecords:
        self.asked.append(name)
        found = self.names.get(name, SrvRecords((), NONE_LIFE))
        if found is None:
            raise SrvFailed("as asked")
        return found


class World:
    """A federation on stand-ins."""

    def __init__(self, terms: Terms | None = None, *, stale_patience: float = 30.0) -> None:
        self.web, self.configured, self.dns, self.clock = Web(), Web(), Dns(), Clock()
        self.terms = terms or Terms()
        self.told: list[str] = []
        self.federation = Federation(
            self._terms,
            Egress(self.configured, self.web),
            self.clock,
            srv=self.dns,
            stale_patience=stale_patience,
            random=lambda: 0.0,
        )

    def _terms(self, name: str) -> Terms:
        self.told.append(name)
        return self.terms

    def delegates(self, name: str, to: object, cache_control: str | None = None) -> None:
        headers = {} if cache_control is None else {"cache-control": cache_control}
        self.web.answers[where(name)] = HttpAnswer(200, headers, json.dumps({"m.server": to}).encode())

    def srv(self, name: str, *targets: str, life: float = 3600.0) -> None:
        """The first target has the best priority."""
        records = []
        for priority, target in enumerate(targets):
            host, _, port = target.partition(":")
            records.append(SrvRecord(priority, 0, int(port or 0), host))
        self.dns.names[name] = SrvRecords(tuple(records), life)

    async def get(self, name: str = "example.org", patience: float = 30.0, who: str = "") -> str:
        """The authority that answered."""
        answer = await self.federation.get(name, PATH, asyncio.get_running_loop().time() + patience, who)
        return answer.body.decode()

    async def request(self, name: str = "example.org") -> tuple[str, str | None, str | None]:
        await self.get(name)
        return self.web.requests[-1]

    async def failure(self, name: str = "example.org", patience: float = 30.0) -> HttpFailed:
        with pytest.raises(HttpFailed) as raised:
            await self.get(name, patience)
        return raised.value


def where(host: str) -> str:
    return f"https://{host}/.well-known/matrix/server"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.federation.aclose()


# ── the steps of the specification ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "authority", "host"),
    [
        ("192.0.2.7", "192.0.2.7:8448", "192.0.2.7"),
        ("192.0.2.7:443", "192.0.2.7:443", "192.0.2.7:443"),
        ("[2001:DB8::7]", "[2001:db8::7]:8448", "[2001:db8::7]"),
        ("[2001:db8::7]:443", "[2001:db8::7]:443", "[2001:db8::7]:443"),
        ("Example.org:8443", "example.org:8443", "example.org:8443"),
    ],
)
async def test_nothing_is_looked_up(world: World, name: str, authority: str, host: str) -> None:
    """Steps 1 and 2: IP literals and names with a port are asked as they are; the certificate is for the literal or the name."""
    assert await world.request(name) == (authority, host, None)
    assert (world.web.asked, world.dns.asked) == ([], [])


@pytest.mark.parametrize(
    ("delegated", "request_"),
    [
        ("192.0.2.7", ("192.0.2.7:8448", "192.0.2.7", None)),
        ("192.0.2.7:443", ("192.0.2.7:443", "192.0.2.7:443", None)),
        ("[2001:db8::7]", ("[2001:db8::7]:8448", "[2001:db8::7]", None)),
        ("[2001:db8::7]:443", ("[2001:db8::7]:443", "[2001:db8::7]:443", None)),
        ("Matrix.example.com:443", ("matrix.example.com:443", "matrix.example.com:443", None)),
    ],
)
async def test_delegation_to_an_address(world: World, delegated: str, request_: tuple[str, str, None]) -> None:
    """Steps 3.1 and 3.2: a delegated literal, or name with a port, is asked under its own name, without any SRV lookup."""
    world.delegates("example.org", delegated)
    assert await world.request() == request_
    assert (world.web.asked, world.dns.asked) == ([where("example.org")], [])


async def test_delegation_to_a_bare_name(world: World) -> None:
    """Steps 3.3 to 3.5: the SRV records of the delegated name, then its port 8448; a second `.well-known` is not asked."""
    world.delegates("example.org", "matrix.example.com")
    world.delegates("matrix.example.com", "elsewhere.example:1")
    assert await world.request() == ("matrix.example.com:8448", "matrix.example.com", None)
    assert world.web.asked == [where("example.org")]
    assert world.dns.asked == [f"{FED}matrix.example.com", f"{OLD}matrix.example.com"]


async def test_delegation_and_srv(world: World) -> None:
    """The certificate is for the delegated name, not for the SRV record's target."""
    world.delegates("example.org", "matrix.example.com")
    world.srv(f"{FED}matrix.example.com", "node.example.net:443")
    assert await world.request() == ("node.example.net:443", "matrix.example.com", "matrix.example.com")
    assert world.dns.asked == [f"{FED}matrix.example.com"]


@pytest.mark.parametrize("service", [FED, OLD])
async def test_srv_without_delegation(world: World, service: str) -> None:
    """Steps 4 and 5: SRV records of the name itself, of the service's new or old name; Host and certificate are the name's."""
    world.srv(f"{service}example.org", "node.example.net:443")
    assert await world.request() == ("node.example.net:443", "example.org", "example.org")


async def test_the_newer_service_goes_first(world: World) -> None:
    """Records of the deprecated service are not asked for where the new one has any."""
    world.srv(f"{FED}example.org", "new.example.net:443")
    world.srv(f"{OLD}example.org", "old.example.net:443")
    assert await world.get() == "new.example.net:443"


async def test_neither_delegation_nor_srv(world: World) -> None:
    """Step 6: port 8448 of the name."""
    assert await world.request("EXAMPLE.org") == ("example.org:8448", "example.org", None)
    assert world.told == ["example.org"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"m.server": null}',
        b'{"m.server": 5}',
        b'{"m.server": ["a.example"]}',
        b'{"m.server": ""}',
        b'{"m.server": "https://a.example"}',
        b'{"m.server": "a.example/x"}',
        b'{"m.server": "a.example:0"}',
        b'{"m.server": "a.example:99999"}',
        b'{"m.server": "user@a.example"}',
        b'{"m.server": "a.example:443@b"}',
        b'{"m.server": "a\\r\\nX: y"}',
        b'{"m.server": "127.1"}',
        b'{"m.server": "0x7f000001"}',
        b'{"m.server": "2130706433:443"}',
        b'{"m.server": "010.0.0.1"}',
        b'{"m.server": "[::1%25lo]"}',
        b'{"m.server": "a..example"}',
    ],
)
async def test_invalid_delegations(world: World, body: bytes) -> None:
    """An answer that is none counts as no delegation: the name itself is asked, as the specification has it."""
    world.web.answers[where("example.org")] = HttpAnswer(200, {}, body)
    assert await world.get() == "example.org:8448"


async def test_too_long_a_delegation(world: World) -> None:
    """A body that was not read to its end is no delegation."""
    world.web.answers[where("example.org")] = HttpAnswer(200, {}, b'{"m.server": "a.example:1"}', whole=False)
    assert await world.get() == "example.org:8448"


@pytest.mark.parametrize(
    "name", ["", "a b", "user@a", "a/b", "a?b", "a#b", "a:0", "127.1", "0x7f.1", "0", "1.2.3.256", "a..b", ".a", "..", "a" * 64 + ".org", "a_b"]
)
async def test_names_that_lead_nowhere(world: World, name: str) -> None:
    """What is no server name, or no name of the DNS though the system's resolver could read an address in it, is not looked for."""
    with pytest.raises(DiscoveryFailed, match="server name is "):
        await world.get(name)
    assert (world.web.asked, world.web.requests, world.dns.asked) == ([], [], [])


# ── redirects ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_redirects_are_followed(world: World) -> None:
    """A few of them, relative ones too."""
    world.web.answers[where("example.org")] = HttpAnswer(301, {"location": "https://www.example.org/a"}, b"")
    world.web.answers["https://www.example.org/a"] = HttpAnswer(307, {"location": "/b?c"}, b"")
    world.web.answers["https://www.example.org/b?c"] = HttpAnswer(200, {}, b'{"m.server": "hs.example:1"}')
    assert await world.get() == "hs.example:1"


@pytest.mark.parametrize("location", ["/.well-known/matrix/server", "http://example.org/a", "ftp://a", "", "https://u:p@a/", "//[::1"])
async def test_redirects_that_are_not_followed(world: World, location: str) -> None:
    """Loops end, and what is not https is not asked: there is no delegation."""
    world.web.answers[where("example.org")] = HttpAnswer(302, {"location": location}, b"")
    assert await world.get() == "example.org:8448"
    assert set(world.web.asked) == {where("example.org")}
    assert len(world.web.asked) <= 6


async def test_a_lookup_has_an_end(world: World) -> None:
    """However long the caller would wait, `.well-known` with all redirects has some seconds."""
    begun = asyncio.get_running_loop().time()
    await world.get(patience=1000.0)
    assert world.web.deadlines[0] <= asyncio.get_running_loop().time() + LOOKUP_TIMEOUT
    assert world.web.deadlines[1] >= begun + 1000.0


# ── SRV ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_no_service(world: World) -> None:
    """A record with the target "." says that there is no server: nothing else is tried (RFC 2782)."""
    world.srv(f"{FED}example.org", ".:443", ".:0")
    world.srv(f"{OLD}example.org", "old.example.net:443")
    with pytest.raises(DiscoveryFailed, match=r"SRV records of example\.org"):
        await world.get()
    assert world.web.requests == []


@pytest.mark.parametrize("target", [".", "..", "127.1", "x:1", "a/b", "a b", "user@a", "\\032", "a\\.b", "ä.example", "x:1@y"])
async def test_targets_that_are_no_hosts(world: World, target: str) -> None:
    """A record whose target is no host name never becomes part of a URL; the others are used."""
    records = (SrvRecord(0, 0, 443, target), SrvRecord(0, 0, 0, "port.example"), SrvRecord(1, 0, 443, "_good.example"))
    world.dns.names[f"{FED}example.org"] = SrvRecords(records, 3600.0)
    assert await world.get() == "_good.example:443"


@pytest.mark.parametrize("failed", [REFUSED, CUT])
async def test_the_next_target(world: World, failed: HttpFailed) -> None:
    """A target that does not answer is followed by the next one; for a while it comes last, then it is tried again."""
    world.srv(f"{FED}example.org", "a.example:1", "b.example:2", life=86_400.0)
    world.web.answers["a.example:1"] = failed
    assert await world.get() == "b.example:2"
    assert [authority for authority, _, _ in world.web.requests] == ["a.example:1", "b.example:2"]
    assert await world.get() == "b.example:2"
    assert len(world.web.requests) == 3
    del world.web.answers["a.example:1"]
    world.clock.at += AVOIDED
    assert await world.get() == "a.example:1"


async def test_an_error_is_an_answer(world: World) -> None:
    """A target that answers with an error has answered: the next one is not asked."""
    world.srv(f"{FED}example.org", "a.example:1", "b.example:2")
    world.web.answers["a.example:1"] = HttpAnswer(502, {}, b"bad gateway")
    assert await world.get() == "bad gateway"


@pytest.mark.parametrize(("second", "sent"), [(REFUSED, True), (CUT, False)])
async def test_no_target_answers(world: World, second: HttpFailed, sent: bool) -> None:
    """The failure is that of the last one; it was certainly not sent only if that holds for all. It tells no URL."""
    world.srv(f"{FED}example.org", "a.example:1", "b.example:2")
    world.web.answers |= {"a.example:1": REFUSED, "b.example:2": second}
    failed = await world.failure()
    assert (failed.certainly_not_sent, failed.reason) == (sent, second.reason)
    assert SECRET not in repr(failed)


async def test_many_targets(world: World) -> None:
    """Not all of a thousand targets are tried for one request."""
    targets = [f"n{n}.example:443" for n in range(1000)]
    world.srv(f"{FED}example.org", *targets)
    world.web.answers |= dict.fromkeys(targets, REFUSED)
    await world.failure()
    assert [authority for authority, _, _ in world.web.requests] == targets[:MAX_TARGETS]


def test_order_of_records() -> None:
    """By priority; within one, a record goes first as often as its share of the weights says."""
    heavy, light, none, late = SrvRecord(1, 90, 1, "h"), SrvRecord(1, 9, 1, "l"), SrvRecord(1, 0, 1, "n"), SrvRecord(2, 1000, 1, "later")
    firsts = {heavy: 0, light: 0, none: 0}
    for n in range(1000):
        order = in_order([late, heavy, light, none], lambda n=n: n / 1000)  # type: ignore[misc]
        assert order[3] is late
        assert set(order) == {heavy, light, none, late}
        firsts[order[0]] += 1
    assert firsts == {heavy: 900, light: 90, none: 10}


@given(st.lists(st.builds(SrvRecord, st.integers(0, 65535), st.integers(0, 65535), st.integers(0, 65535), st.text())), st.floats(0, 0.999999))
def test_no_record_is_lost(records: list[SrvRecord], chance: float) -> None:
    """Whatever the records and the chance: each comes once, and none before one of a better priority."""
    order = in_order(records, lambda: chance)
    assert sorted(order, key=repr) == sorted(records, key=repr)
    assert [r.priority for r in order] == sorted(r.priority for r in records)


# ── the operator's word ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("url", ["http://127.0.0.1:8008/base", "http://127.0.0.1:8008/base/"])
async def test_a_configured_url(url: str) -> None:
    """It replaces discovery, may lead anywhere, and is used with its path."""
    context = SSLContext(PROTOCOL_TLS_CLIENT)
    world = World(Terms(url=url, ssl=context))
    world.configured.answers["http://127.0.0.1:8008/base"] = HttpAnswer(200, {}, b"here")
    assert await world.get("a.example:1") == "here"
    assert await world.get("[::1]") == "here"
    assert world.configured.contexts == [context, context]
    assert (world.web.asked, world.web.requests, world.dns.asked) == ([], [], [])


async def test_which_way() -> None:
    """What is discovered goes by the guarded way, unless the operator allows private addresses; always with the operator's TLS context."""
    context = SSLContext(PROTOCOL_TLS_CLIENT)
    guarded, free = World(Terms(ssl=context)), World(Terms(ssl=context, allow_private=True))
    assert await guarded.get() == await free.get() == "example.org:8448"
    assert (guarded.web.contexts, guarded.configured.contexts) == ([context, context], [])
    assert (free.web.contexts, free.configured.contexts) == ([], [context, context])


async def test_other_terms_are_another_lookup(world: World) -> None:
    """What was found without checking certificates, or with private addresses allowed, is not believed once that is over."""
    world.terms = Terms(ssl=SSLContext(PROTOCOL_TLS_CLIENT))
    world.delegates("example.org", "evil.example:1")
    assert await world.get() == "evil.example:1"
    world.delegates("example.org", "good.example:1")
    world.terms = Terms()
    assert await world.get() == "good.example:1"


def test_terms_of_a_rule() -> None:
    """A rule's federation_url is checked like its url, and its TLS context stays one object."""
    rule = HomeserverRule("a.org", federation_url="http://localhost:8448/x")
    homeservers = Homeservers([rule], Egress(Web(), Web()), Clock())
    assert homeservers.rule_for("A.org") is rule
    assert homeservers.ssl_for(rule) is None
    with pytest.raises(ValueError, match=r"a\.org: the federation_url has credentials"):
        HomeserverRule("a.org", federation_url="https://user:secret@a")


@pytest.mark.parametrize(
    ("pattern", "anybodys"),
    [
        ("example.org", False),
        ("*.example.org", False),
        ("*.example.org:8448", False),
        ("a*.example.org", False),
        ("*", True),
        ("*.org", True),
        ("*example.org", True),
        ("*:8448", True),
        ("matrix.*", True),
    ],
)
async def test_whose_a_pattern_is(pattern: str, anybodys: bool) -> None:
    """Names that anybody may have are looked for by the way of strangers, so that what hangs there holds up nobody who is named."""
    ways = {True: Web(), False: Web()}
    homeservers = Homeservers([HomeserverRule(pattern)], Egress(Web(), ways[False], ways[True]), Clock())
    name = pattern.replace("*", "x")
    for way in ways.values():
        way.answers[f"https://{name}/.well-known/matrix/client"] = HttpAnswer(200, {}, b'{"m.homeserver": {"base_url": "https://there.example"}}')
    assert (await homeservers.resolve(name)).stranger is anybodys
    assert [len(ways[anybodys].asked), len(ways[not anybodys].asked)] == [1, 0]


# ── remembering ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cache_control", "life"),
    [
        (None, DELEGATION_LIFE),
        ("public", DELEGATION_LIFE),
        ("max-age=7200", 7200.0),
        ("max-age=0", MIN_LIFE),
        ("max-age=99999999", MAX_DELEGATION_LIFE),
        ("no-store", MIN_LIFE),
        ("max-age=7200, no-cache", MIN_LIFE),
    ],
)
async def test_how_long_a_delegation_is_kept(world: World, cache_control: str | None, life: float) -> None:
    """As long as Cache-Control says, within bounds; a day where it says nothing."""
    world.delegates("example.org", "one.example:1", cache_control)
    await world.get()
    world.delegates("example.org", "two.example:2", cache_control)
    world.clock.at += life - 1
    assert await world.get() == "one.example:1"
    world.clock.at += 1
    assert await world.get() == "two.example:2"
    assert len(world.web.asked) == 2


@given(st.text())
def test_any_cache_control(text: str) -> None:
    """Whatever the header says, the time is within the bounds."""
    assert MIN_LIFE <= life_of(text, default=DELEGATION_LIFE, most=MAX_DELEGATION_LIFE) <= MAX_DELEGATION_LIFE


@pytest.mark.parametrize("answer", [HttpAnswer(404, {}, b""), HttpAnswer(200, {}, b"<html>"), HttpAnswer(302, {"location": "http://a"}, b"")])
async def test_no_delegation_is_kept_for_an_hour(world: World, answer: HttpAnswer) -> None:
    """A definite "there is none" is not asked for again for an hour, and replaces what was there before."""
    world.delegates("example.org", "old.example:1")
    await world.get()
    world.web.answers[where("example.org")] = answer
    world.clock.at += DELEGATION_LIFE
    assert await world.get() == "example.org:8448"
    asked = len(world.web.asked)
    world.clock.at += NONE_LIFE - 1
    await world.get()
    assert len(world.web.asked) == asked
    world.clock.at += 1
    await world.get()
    assert len(world.web.asked) == asked + 1


@pytest.mark.parametrize("answer", [REFUSED, CUT, HttpAnswer(503, {}, b""), HttpAnswer(429, {}, b""), HttpAnswer(408, {}, b"")])
async def test_a_failure_that_may_pass(world: World, answer: HttpAnswer | HttpFailed) -> None:
    """The name itself is asked meanwhile; looking again begins after seconds, and becomes rarer while it goes on."""
    world.web.answers[where("example.org")] = answer
    assert await world.get() == "example.org:8448"
    life = DOWN_LIFE
    for count in range(2, 10):
        world.clock.at += life - 1
        await world.get()
        assert len(world.web.asked) == count - 1
        world.clock.at += 1
        await world.get()
        assert len(world.web.asked) == count
        life = min(life * 2, MAX_DOWN_LIFE)
    world.delegates("example.org", "hs.example:1")
    world.clock.at += life
    assert await world.get() == "hs.example:1"


async def test_stale_is_better_than_a_guess(world: World) -> None:
    """While `.well-known` fails, the delegation that it told is used for a day beyond its time."""
    world.delegates("example.org", "hs.example:1")
    await world.get()
    world.web.answers[where("example.org")] = HttpAnswer(500, {}, b"")
    world.clock.at += DELEGATION_LIFE
    assert await world.get() == "hs.example:1"
    assert await world.get() == "hs.example:1"
    assert len(world.web.asked) == 2
    world.clock.at += STALE_LIFE - 1
    assert await world.get() == "hs.example:1"
    world.clock.at += MAX_DOWN_LIFE
    assert await world.get() == "example.org:8448"


async def test_nobody_waits_long_with_an_old_result_at_hand() -> None:
    """A lookup that hangs holds nobody up for long where there is an old result; it goes on, and its result is used."""
    world = World(stale_patience=0.01)
    world.delegates("example.org", "one.example:1")
    await world.get()
    world.clock.at += DELEGATION_LIFE
    world.web.hold = asyncio.Event()
    world.delegates("example.org", "two.example:2")
    assert await world.get() == "one.example:1"
    world.web.hold.set()
    while await world.get() != "two.example:2":  # noqa: ASYNC110 - the lookup goes on unseen
        await asyncio.sleep(0)
    assert len(world.web.asked) == 2
    await world.federation.aclose()


async def test_one_lookup_at_a_time(world: World) -> None:
    """Many who want the same server cause one lookup, and one who gives up does not spoil it for the others."""
    world.web.hold = asyncio.Event()
    world.delegates("example.org", "hs.example:1")
    waiting = [asyncio.create_task(world.get(name)) for name in ("example.org", "Example.org") * 10]
    while not world.web.asked:  # noqa: ASYNC110
        await asyncio.sleep(0)
    waiting[0].cancel()
    world.web.hold.set()
    assert set(await asyncio.gather(*waiting[1:])) == {"hs.example:1"}
    assert world.web.asked == [where("example.org")]


async def test_a_lookup_longer_than_the_request(world: World) -> None:
    """Whoever runs out of time is told so; the lookup goes on for those who come later."""
    world.web.hold = asyncio.Event()
    world.delegates("example.org", "hs.example:1")
    failed = await world.failure(patience=0.01)
    assert failed.certainly_not_sent
    world.web.hold.set()
    assert await world.get() == "hs.example:1"
    assert len(world.web.asked) == 1


@pytest.mark.parametrize(("life", "kept"), [(0.0, MIN_SRV_LIFE), (300.0, 300.0), (1e9, MAX_SRV_LIFE)])
async def test_how_long_records_are_kept(world: World, life: float, kept: float) -> None:
    """SRV records are kept for their time to live, within bounds; the delegation is not asked for again with them."""
    world.delegates("example.org", "hs.example", "max-age=172800")
    world.srv(f"{FED}hs.example", "one.example:1", life=life)
    await world.get()
    world.srv(f"{FED}hs.example", "two.example:2", life=life)
    world.clock.at += kept - 1
    assert await world.get() == "one.example:1"
    world.clock.at += 1
    assert await world.get() == "two.example:2"
    assert len(world.web.asked) == 1


async def test_a_dns_that_does_not_answer(world: World) -> None:
    """It counts as "no record" for seconds only, and not at all where records are known."""
    world.dns.names[f"{FED}example.org"] = None
    assert await world.get() == "example.org:8448"
    world.srv(f"{FED}example.org", "node.example:1")
    world.clock.at += DOWN_LIFE
    assert await world.get() == "node.example:1"
    world.dns.names[f"{FED}example.org"] = None
    world.clock.at += 3600.0
    assert await world.get() == "node.example:1"


async def test_a_dns_that_answers_for_one_service_only(world: World) -> None:
    """The deprecated service's records are used while the new one's cannot be asked for, and for no longer."""
    world.dns.names[f"{FED}example.org"] = None
    world.srv(f"{OLD}example.org", "old.example:1", life=86_400.0)
    assert await world.get() == "old.example:1"
    world.srv(f"{FED}example.org", "new.example:2")
    world.clock.at += DOWN_LIFE
    assert await world.get() == "new.example:2"


@pytest.mark.parametrize("moved", ["delegation", "srv"])
async def test_a_server_that_moved(world: World, moved: str) -> None:
    """When nothing can be connected to, what is remembered is looked up again before its time, though not at once each time."""

    def point_to(target: str) -> None:
        if moved == "srv":
            world.srv(f"{FED}example.org", target)
        else:
            world.delegates("example.org", target)

    point_to("one.example:1")
    await world.get()
    point_to("two.example:2")
    world.web.answers["one.example:1"] = REFUSED
    await world.failure()
    await world.failure()
    assert len(world.web.asked) == 1
    world.clock.at += DOWN_LIFE
    assert await world.get() == "two.example:2"


async def test_a_server_that_breaks_off(world: World) -> None:
    """One that was connected to is where it should be: nothing is looked up again."""
    world.delegates("example.org", "one.example:1")
    world.web.answers["one.example:1"] = CUT
    await world.failure()
    world.clock.at += DOWN_LIFE
    await world.failure()
    assert len(world.web.asked) == 1


async def test_memory_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many names are remembered, and the oldest go first."""
    assert MAX_KEPT <= 10_000
    monkeypatch.setattr(federation_module, "MAX_KEPT", 50)
    for n in range(51):
        await world.get(f"{n}.example")
    await world.get("50.example")
    assert len(world.web.asked) == 51
    await world.get("0.example")
    assert len(world.web.asked) == 52
    assert len(world.dns.asked) == 2 * 52


# ── many requests ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_requests_in_flight_are_bounded() -> None:
    """A homeserver gets so many requests at a time; another one does not wait for it."""
    world = World(Terms(in_flight=3))
    world.web.hold_requests = asyncio.Event()
    waiting = [asyncio.create_task(world.get("slow.example:1")) for _ in range(20)]
    while world.web.busy < 3:  # noqa: ASYNC110
        await asyncio.sleep(0)
    other = asyncio.create_task(world.get("other.example:1"))
    while len(world.web.requests) < 4:  # noqa: ASYNC110
        await asyncio.sleep(0)
    world.web.hold_requests.set()
    await asyncio.gather(*waiting, other)
    assert world.web.busiest == 4
    assert len(world.web.requests) == 21


async def test_a_slow_server_does_not_pile_up_requests() -> None:
    """Beyond those in flight only so many wait; the next one fails at once, and is told why. Later there is room again."""
    world = World(Terms(in_flight=2))
    world.web.hold_requests = asyncio.Event()
    waiting = [asyncio.create_task(world.get("slow.example:1")) for _ in range(2 + MAX_WAITING)]
    while world.web.busy < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    failed = await world.failure("slow.example:1")
    assert failed.certainly_not_sent
    assert "too many requests" in failed.reason
    world.web.hold_requests.set()
    await asyncio.gather(*waiting)
    assert await world.get("slow.example:1") == "slow.example:1"


async def test_places_are_given_in_turn() -> None:
    """Somebody who asks a server for heaps delays somebody else by one turn, and is the one who is turned away."""
    world = World(Terms(in_flight=2))
    world.web.hold_requests = asyncio.Event()
    heaps = [asyncio.create_task(world.get("slow.example:1", who="greedy")) for _ in range(2 + MAX_WAITING)]
    while world.web.busy < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    modest = asyncio.create_task(world.get("slow.example:1", who="modest"))
    await asyncio.sleep(0)
    world.web.hold_requests.set()
    assert await modest == "slow.example:1"
    assert sum(isinstance(end, HttpFailed) for end in await asyncio.gather(*heaps, return_exceptions=True)) == 1


async def test_all_strangers_share_some_places() -> None:
    """However many names somebody thinks of; whoever asks for one of them has the next turn, and servers that are known do not wait."""
    world = World(Terms(stranger=True))
    world.web.hold_requests = asyncio.Event()
    heaps = [asyncio.create_task(world.get(f"s{n}.example:1", who="greedy")) for n in range(3 * STRANGERS)]
    while world.web.busy < STRANGERS:  # noqa: ASYNC110
        await asyncio.sleep(0)
    modest = asyncio.create_task(world.get("new.example:1", who="modest"))
    await asyncio.sleep(0)
    assert world.web.busy == STRANGERS
    world.terms = Terms()
    known = asyncio.create_task(world.get("known.example:1", who="greedy"))
    while world.web.busy <= STRANGERS:  # noqa: ASYNC110
        await asyncio.sleep(0)
    world.web.hold_requests.set()
    assert await known == "known.example:1"
    await modest
    await asyncio.gather(*heaps)
    assert [authority for authority, *_ in world.web.requests].index("new.example:1") <= STRANGERS + 2


async def test_a_stranger_that_hangs_keeps_no_places_of_others() -> None:
    """However many different people wait for it: they wait in its own line."""
    world = World(Terms(stranger=True, in_flight=OF_A_STRANGER))
    world.web.hold_requests = asyncio.Event()
    crowd = [asyncio.create_task(world.get("hangs.example:1", who=f"client {n}")) for n in range(2 * STRANGERS)]
    while world.web.busy < OF_A_STRANGER:  # noqa: ASYNC110
        await asyncio.sleep(0)
    another = asyncio.create_task(world.get("another.example:1", who="one more"))
    while len(world.web.requests) <= OF_A_STRANGER:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert world.web.requests[-1][0] == "another.example:1"
    world.web.hold_requests.set()
    assert await another == "another.example:1"
    await asyncio.gather(*crowd)


async def test_a_place_among_strangers_comes_in_time_or_not_at_all() -> None:
    """Whoever has waited for half of its time gives up: with little left it would only set off a lookup for nobody."""
    world = World(Terms(stranger=True))
    world.web.hold_requests = asyncio.Event()
    crowd = [asyncio.create_task(world.get(f"s{n}.example:1")) for n in range(STRANGERS)]
    while world.web.busy < STRANGERS:  # noqa: ASYNC110
        await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 4.0
    with pytest.raises(HttpFailed, match="in time"):
        await world.federation.get("late.example:1", PATH, deadline)
    assert loop.time() < deadline
    world.web.hold_requests.set()
    await asyncio.gather(*crowd)


async def test_those_who_hang_in_a_lookup_count(world: World) -> None:
    """Requests that wait for a lookup are among those that wait."""
    world.web.hold = asyncio.Event()
    waiting = [asyncio.create_task(world.get()) for _ in range(world.terms.in_flight + MAX_WAITING)]
    while not world.web.asked:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert "too many requests" in (await world.failure()).reason
    world.web.hold.set()
    await asyncio.gather(*waiting)


async def test_those_who_give_up_leave_the_line() -> None:
    """A request whose time is over while it waits fails, and takes no place."""
    world = World(Terms(in_flight=1))
    world.web.hold_requests = asyncio.Event()
    first = asyncio.create_task(world.get("slow.example:1"))
    while not world.web.busy:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert (await world.failure("slow.example:1", patience=0.01)).certainly_not_sent
    world.web.hold_requests.set()
    await first
    assert await world.get("slow.example:1") == "slow.example:1"
    assert len(world.web.requests) == 2


@given(st.one_of(st.text(), st.from_regex(r"\A[a-z0-9.:\[\]-]{1,30}\Z")), st.text())
async def test_any_name(name: str, delegated: str) -> None:
    """No name and no delegation make it fail in any other way than it says, or put anything else than host and port into a URL."""
    world = World()
    world.delegates(name, delegated)
    try:
        authority = await world.get(name)
    except DiscoveryFailed:
        assert world.web.requests == []
    else:
        assert ServerName.parse(authority).port


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("user_id", "server"),
    [
        ("@alice:example.org", "example.org"),
        ("@alice:Example.org:8448", "Example.org:8448"),
        ("@a:[::1]:80", "[::1]:80"),
        ("@Älice Ω/=+!@#:example.org", "example.org"),
        ("@" + "a" * 242 + ":example.org", "example.org"),
        ("@" + "ä" * 121 + ":example.org", "example.org"),
    ],
)
def test_user_ids(user_id: str, server: str) -> None:
    """User IDs, those with historical localparts too, have their server's name after the first colon."""
    assert server_of(user_id) == server


@pytest.mark.parametrize(
    "user_id",
    [
        None,
        5,
        ["@a:b"],
        "",
        "@",
        "alice:example.org",
        "@alice",
        "@alice:",
        "@:example.org",
        "@a:b c",
        "@a:b:c",
        "@a:b:99999",
        "@a\x00:example.org",
        "@a\n:example.org",
        "@a\x7f:example.org",
        "@a\x85:example.org",
        "@a\ud800:example.org",
        "@a:example.org\n",
        " @a:example.org",
        "@" + "a" * 243 + ":example.org",
        "@" + "ä" * 122 + ":example.org",
        "!room:example.org",
    ],
)
def test_no_user_ids(user_id: object) -> None:
    """What is no text of that form, has control characters or half characters, or over 255 bytes, is no user ID."""
    assert server_of(user_id) is None
