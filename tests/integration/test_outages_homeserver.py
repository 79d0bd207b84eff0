"""A homeserver, or what stands in front of it, in every kind of trouble: waited for, named, back without a stampede; the others never notice."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import pytest
from sfu_delegate.sandbox.homeserver import DelayedEvent, End, HomeserverModel
from sfu_delegate.sandbox.server import SandboxHomeserver

from tests import stores
from tests.integration.certificates import Certificates
from tests.integration.daemon import MATRIX_ROOM, MEMBER, SERVER, Participant, Site, found, merged, open_site, until
from tests.integration.matrix_stand_in import Conversation, read_request

pytestmark = pytest.mark.usefixtures("database")

OTHER = "other.test"
SECRET_PLACE = "http://127.0.0.1:9/elsewhere"

# Only what really hangs is given up: a machine that stands still for a second must not look like a homeserver in trouble.
QUICKER: dict[str, Any] = {
    "delegations": {"verify_timeout": "1s"},
    "timeouts": {"connect": "10s", "request": "10s", "shutdown": "1s"},
    "actions": {"retry_first": "20ms", "retry_most": "200ms", "lease": "15s"},
}


# ── what stands in front of it ──


@dataclass
class Front:
    """A reverse proxy with an address of its own that stays the same. Everything goes through to `upstream`, unless it is in trouble."""

    upstream: int
    context: ssl.SSLContext | None = None
    port: int = 0
    tries: int = 0  # connections that met trouble
    _trouble: Conversation | None = None
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        """For the configuration; `localhost` is what the certificates are for."""
        return f"http://127.0.0.1:{self.port}" if self.context is None else f"https://localhost:{self.port}"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, ssl=self.context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Nobody listens any more, and all connections are cut."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            self._cut()
            await server.wait_closed()

    async def trouble(self, talk: Conversation | None) -> None:
        """From now on this is said to everybody; None: all is well. Connections that are open are cut."""
        self._trouble = talk
        self._cut()

    async def present(self, context: ssl.SSLContext | None) -> None:
        """Another certificate; None: no TLS at all."""
        await self.close()
        self.context = context
        await self.open()

    def _cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self._trouble is not None:
                self.tries += 1
                await self._trouble(reader, writer)
            else:
                await self._pass_on(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, before = await asyncio.open_connection("127.0.0.1", self.upstream)
        self._writers.add(before)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(reader, before))
                both.create_task(_copy(behind, writer))
        except* OSError:
            pass
        finally:
            self._writers.discard(before)
            before.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while part := await source.read(65536):
        target.write(part)
        await target.drain()
    target.close()


def says(status: int, body: bytes | Any = b"", *headers: str, kind: str = "application/json") -> Conversation:
    """A whole answer to one request, whatever it was; then the connection is closed. What is not bytes is sent as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = (f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(content)}", "Connection: close", *headers)
    return writes("\r\n".join(lines).encode() + b"\r\n\r\n" + content)


def html(status: int, *headers: str) -> Conversation:
    """A proxy's page."""
    return says(status, b"<html><body><h1>nginx</h1></body></html>", *headers, kind="text/html")


def writes(answer: bytes) -> Conversation:
    """These bytes after one request; then the connection is closed."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)
        await writer.drain()

    return talk


async def closes(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes the connection and closes it, before it has heard anything."""
    writer.close()


async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hears the request and breaks the connection."""
    await read_request(reader)
    writer.transport.abort()


async def hangs(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    """Hears the request and says nothing."""
    await reader.read()
    await reader.read()


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Never comes to the end of its answer."""
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{")
    while not writer.is_closing():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


@dataclass
class Both:
    """A daemon with two homeservers, of which one stands behind a front."""

    site: Site
    front: Front
    other: HomeserverModel
    other_server: SandboxHomeserver

    async def delegate_elsewhere(self, identity: str) -> tuple[DelayedEvent, dict[str, Any]]:
        """Somebody of the other homeserver delegates, and is in the call."""
        site = self.site
        who = await site.participant(identity)
        delay_id = await self.other_server.call("schedule", f"@{identity}:{OTHER}", MATRIX_ROOM, MEMBER, f"_{identity}", 40_000, {})
        site.secrets.add(delay_id)
        body = {"homeserver": OTHER, "delayed_events": [{"delay_id": delay_id, "delay_ms": 40_000}]}
        answer = await site.ask("POST", "/v1/delegations", token=who.token, json=body)
        assert answer.status == 201, answer.text
        await site.join(who)
        await site.present(answer.body, "connected")
        return self.other.events[delay_id], answer.body

    async def failures(self, action: str) -> float:
        """How many requests of this kind failed, by the metrics."""
        site = self.site
        outcomes = ("failed", "uncertain")
        return sum([await site.count("sfu_delegate_actions_total", homeserver=SERVER, action=action, outcome=one) for one in outcomes])

    async def troubled(self) -> bool:
        """Has a restart failed?"""
        return await self.failures("restart") > 0

    async def condition(self) -> tuple[str, str]:
        """What readiness tells: of all, and of the homeserver behind the front."""
        ready = await self.site.admin("/health/ready")
        assert ready.status == 200  # taking the daemon out of service would help nobody
        return ready.body["status"], ready.body["homeservers"][SERVER]


@asynccontextmanager
async def open_both(
    tmp_path: Path, *, context: ssl.SSLContext | None = None, changes: Mapping[str, Any] | None = None, started: bool = True, **homeserver: Any
) -> AsyncIterator[Both]:
    """`changes` are laid over the configuration, `homeserver` is more of it about the one behind the front."""
    other = HomeserverModel(OTHER, seed=2, limit=None)
    async with open_site(tmp_path, started=False) as site, SandboxHomeserver(other) as other_server:
        upstream = int(site.homeserver.url.rpartition(":")[2])
        async with Front(upstream, context) as front:
            named = [{"name": SERVER, "url": front.url, **homeserver}, {"name": OTHER, "url": other_server.url}]
            site.changes = merged(QUICKER, {"homeservers": named}, changes or {})
            if started:
                await site.start()
            yield Both(site, front, other, other_server)
            if site.running:
                await site.stop()


async def verified(site: Site, given: dict[str, Any]) -> None:
    """Wait until the homeserver has confirmed the delegation."""

    async def so() -> bool:
        return bool((await site.show(given))["verified"])

    await found(so, "the delegation is verified", within=10.0)


# ── every kind of trouble ──


async def everything_as_it_should_be(both: Both, begin: Callable[[], Any], end: Callable[[], Any], words: str) -> None:
    """The trouble comes and goes: nothing is dropped, each change is told once, and the other homeserver's people never notice."""
    site = both.site
    alice, bob = await site.participant(), await site.participant("bob")
    given, stays = await site.in_call(alice), await site.in_call(bob)
    elsewhere, _ = await both.delegate_elsewhere("carol")
    assert (await both.condition())[1] == "ok"
    failed = await both.failures("send")
    await begin()
    await site.leave(alice, "PARTICIPANT_REMOVED")
    new = await site.delegate(await site.participant("dave"))
    assert (new.status, new.body["verified"]) == (201, False)

    async def tried() -> bool:
        return await both.failures("send") - failed >= 3

    await until(tried, "it is tried again and again")
    await site.sfu.call("leave", "call", "carol", reason="PARTICIPANT_REMOVED")
    await until(lambda: elsewhere.end is End.SENT, "the event at the other homeserver is sent")
    assert site.event(alice).end is End.PENDING
    state, problem = await both.condition()
    assert state == "degraded"
    assert words in problem
    assert len(site.lines("homeserver_failed")) == 1
    assert words in site.lines("homeserver_failed")[0]["problem"]
    await end()
    await site.ended(alice)
    assert await site.outcomes(given) == ["sent"]
    assert site.homeserver.model.answers["send", 404] == 0
    await verified(site, new.body)
    assert await both.condition() == ("ok", "ok")
    assert [len(site.lines(event)) for event in ("homeserver_failed", "homeserver_works_again")] == [1, 1]
    assert (await site.show(stays))["state"] == "live"
    assert site.event(bob).end is End.PENDING
    assert await site.count("sfu_delegate_events_lost_while_connected_total") == 0


NESTED = b'{"a":' * 100_000

TROUBLE: dict[str, tuple[Conversation, str]] = {
    "500": (says(500, {"errcode": "M_UNKNOWN", "error": "Internal server error"}), "500"),
    "502 of a proxy": (html(502), "502"),
    "503 with a wait": (html(503, "Retry-After: 0"), "503"),
    "520": (says(520), "520"),
    "999": (says(999, {}), "not HTTP"),
    "HTML with 200": (html(200), "proxy"),
    "HTML with 403": (html(403), "proxy"),
    "HTML with 404": (html(404), "proxy"),
    "login with 401": (html(401, 'WWW-Authenticate: Basic realm="x"'), "proxy"),
    "garbage": (says(200, b'{"\xff\x00 this is not'), "proxy"),
    "nothing": (says(200), "proxy"),
    "204": (says(204), "proxy"),
    "a list": (says(200, [{}]), "proxy"),
    "a number": (says(200, 200), "proxy"),
    "a text": (says(200, "ok"), "proxy"),
    "null": (says(200, None), "proxy"),
    "deeply nested": (says(200, NESTED), "proxy"),
    "an error with 200": (says(200, {"errcode": "M_NOT_FOUND"}), "proxy"),
    "404 without errcode": (says(404, {"error": "no route"}), "proxy"),
    "404 with a list as errcode": (says(404, {"errcode": ["M_NOT_FOUND"]}), "proxy"),
    "404 as a list": (says(404, ["M_NOT_FOUND"]), "proxy"),
    "more than is read": (says(200, b"{}" + b" " * 1_000_000), "proxy"),
    "moved": (says(301, b"", f"Location: {SECRET_PLACE}"), "redirect"),
    "moved, same method": (says(308, b"", f"Location: {SECRET_PLACE}"), "redirect"),
    "moved nowhere": (says(302), "redirect"),
    "closes": (closes, "clos"),
    "resets": (resets, "connection"),
    "half an answer": (writes(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{"), "broke off"),
    "half a head": (writes(b"HTTP/1.1 200 OK\r\nContent-"), ""),
    "not HTTP": (writes(b"220 mail.example ESMTP\r\n"), "not HTTP"),
    "hangs": (hangs, "no answer in time"),
    "drips": (drips, "no answer in time"),
}


IMPATIENT: dict[str, Any] = {"timeouts": {"connect": "1500ms", "request": "1500ms"}}
HANGING = ("half a head", "hangs", "drips")


def sampled(kinds: Iterable[str], *telling: str) -> list[Any]:
    """The kinds as parameters, of which those that tell most run always, and the others with `--run-slow`."""
    return [kind if kind in telling else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


TELLING = ("502 of a proxy", "HTML with 404", "an error with 200", "more than is read", "moved", "resets", "half an answer", "hangs")


@stores.slow_on_postgresql
@pytest.mark.parametrize("kind", sampled(TROUBLE, *TELLING))
async def test_trouble_comes_and_goes(tmp_path: Path, kind: str) -> None:
    """Whatever is answered in the homeserver's place: only a Matrix error of the homeserver itself is final."""
    talk, words = TROUBLE[kind]
    async with open_both(tmp_path, changes=IMPATIENT if kind in HANGING else {}) as both:
        await everything_as_it_should_be(both, lambda: both.front.trouble(talk), lambda: both.front.trouble(None), words)
        assert both.front.tries >= 3


async def test_nobody_listens_for_a_while(tmp_path: Path) -> None:
    """The homeserver is stopped and started."""
    async with open_both(tmp_path) as both:
        await everything_as_it_should_be(both, both.front.close, both.front.open, "no connection")


AT_THE_START: dict[str, Conversation] = {
    **{kind: TROUBLE[kind][0] for kind in ("500", "502 of a proxy", "HTML with 200", "a list", "404 without errcode", "closes", "moved", "hangs")},
    "an object": says(200, {"status": "maintenance"}),
    "versions as a number": says(200, {"versions": 17}),
    "features as a list": says(200, {"versions": ["v1.1"], "unstable_features": ["org.matrix.msc4140"]}),
}


@stores.slow_on_postgresql
@pytest.mark.parametrize("kind", sampled(AT_THE_START, "HTML with 200", "404 without errcode", "hangs", "an object", "features as a list"))
async def test_trouble_from_the_start(tmp_path: Path, kind: str) -> None:
    """The daemon starts first, and cannot ask what the homeserver can do: what is delegated meanwhile is verified soon after the trouble is over."""
    async with open_both(tmp_path, started=False, changes=IMPATIENT if kind in HANGING else {}) as both:
        site = both.site
        await both.front.trouble(AT_THE_START[kind])
        await site.start()
        await until(lambda: site.lines("homeserver_failed"), "it is noticed")
        answer = await site.delegate(await site.participant(delay_ms=20_000))
        assert (answer.status, answer.body["verified"]) == (201, False)
        assert (await both.condition())[0] == "degraded"
        await both.front.trouble(None)
        await verified(site, answer.body)
        assert await both.condition() == ("ok", "ok")


async def test_an_endpoint_that_is_missing_for_a_moment(tmp_path: Path) -> None:
    """A worker that is not up yet, a proxy's rule that is being changed: 404 M_UNRECOGNIZED for a moment makes no event run out."""
    async with open_both(tmp_path) as both:
        site, model = both.site, both.site.homeserver.model
        alice = await site.participant(delay_ms=3000)
        given = await site.in_call(alice)
        model.generations, model.unstable_features = "", {"org.matrix.msc4140": True}
        await until(lambda: site.lines("homeserver_failed"), "it is noticed")
        model.generations = "BC"
        restarted = len(site.event(alice).restarted_at)
        await until(lambda: len(site.event(alice).restarted_at) >= restarted + 2 or site.event(alice).end is not End.PENDING, "what becomes of it")
        assert site.event(alice).end is End.PENDING
        assert (await site.show(given))["state"] == "live"


@pytest.mark.parametrize("content", [{"status": "maintenance"}, pytest.param({"ok": True, "errors": []}, marks=pytest.mark.slow)])
async def test_an_answer_of_another_server_is_not_a_success(tmp_path: Path, content: Any) -> None:
    """`200` with an object that is not the homeserver's `{}`: neither a send nor a restart is believed in, or a ghost would stay and a person go."""
    async with open_both(tmp_path) as both:
        site = both.site
        alice, bob = await site.participant(), await site.participant("bob", delay_ms=3000)
        given, stays = await site.in_call(alice), await site.in_call(bob)
        restarted = len(site.event(bob).restarted_at)
        await both.front.trouble(says(200, content))
        await site.leave(alice, "PARTICIPANT_REMOVED")
        await until(lambda: both.front.tries >= 2, "both are tried")
        await both.front.trouble(None)
        await until(lambda: len(site.event(bob).restarted_at) > restarted or site.event(bob).end is not End.PENDING, "what becomes of who stays")
        assert site.event(bob).end is End.PENDING
        assert await site.outcomes(given) == ["sent"]
        assert site.event(alice).end is End.SENT
        assert (await site.show(stays))["state"] == "live"


async def test_a_connected_participant_outlives_answers_that_come_too_late(tmp_path: Path) -> None:
    """Each restart is carried out and answered after the daemon's patience is over: the event lives on, and the countdown is believed to be short."""
    patience = {"connect": "500ms", "request": "500ms"}
    async with open_both(tmp_path, changes={"restart": {"at": 0.4, "spread": 0.05}, "timeouts": patience}) as both:
        site = both.site
        alice = await site.participant(delay_ms=3000)
        given = await site.in_call(alice)
        site.homeserver.model.faults.latency = {"restart": 1.0}
        await site.restarted(alice, len(site.event(alice).restarted_at) + 2)
        assert await both.failures("restart") > 0
        assert "in time" in (await both.condition())[1]
        site.homeserver.model.faults.latency = {}
        failed = await both.failures("restart")
        await site.restarted(alice, len(site.event(alice).restarted_at) + 2)
        assert await both.failures("restart") <= failed + 2  # those that were under way
        assert (await site.show(given))["delayed_events"][0]["outcome"] is None
        assert len(site.lines("homeserver_failed")) == 1


# ── how it is tried again ──

QUICKER_DOWN = (0.1, 0.8)  # seconds: the first pause between tries at a homeserver that is down, and the longest


@pytest.fixture
def quicker_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter pauses, since nothing depends on them but the time that a test takes."""
    monkeypatch.setattr("sfu_delegate.delegation.urgency.DOWN_FIRST", QUICKER_DOWN[0])
    monkeypatch.setattr("sfu_delegate.delegation.urgency.DOWN_MOST", QUICKER_DOWN[1])
    monkeypatch.setattr("sfu_delegate.delegation.urgency.DOWN_PART", 1)  # each pause is as long as it has been failing


@pytest.mark.usefixtures("quicker_down")
async def test_an_outage_is_not_hammered_and_nobody_is_forgotten(tmp_path: Path) -> None:
    """The tries become seldom, however many wait; all are sent when the homeserver is back."""
    async with open_both(tmp_path) as both:
        site, model = both.site, both.site.homeserver.model
        people = [await site.participant(f"p{n}") for n in range(24)]
        given = [await site.in_call(who) for who in people]
        tried: list[float] = []
        request = model.request

        def watched(method: str, path: str, now: float, **more: Any) -> Any:
            if path.endswith("/send"):
                tried.append(now)
            return request(method, path, now, **more)

        model.request = watched  # type: ignore[method-assign]
        model.faults.status = 503
        for who in people:
            await site.leave(who, "PARTICIPANT_REMOVED")
        for one in given:
            await site.present(one, "gone")
        # A busy machine makes a pause only longer.
        await until(lambda: any(after - before >= 2 * QUICKER_DOWN[0] for before, after in pairwise(tried)), "the pauses between two tries grow")
        assert len(tried) <= 24 + 6  # one after another, not everybody's
        model.faults.status = None
        for who, one in zip(people, given, strict=True):
            await site.ended(who)
            assert await site.outcomes(one) == ["sent"]


@pytest.mark.parametrize("limited", [None, False])
async def test_a_moment_of_trouble_drops_nobody(tmp_path: Path, limited: bool | None) -> None:
    """All restarts that are on their way fail at the same time, as when a proxy is reloaded, and a moment later all is well: nobody runs out."""
    changes = {"restart": {"at": 0.75, "spread": 0.01}, "delegations": {"verify_timeout": "20s"}}
    async with open_both(tmp_path, changes=changes, rate_limited=limited) as both:
        site, model = both.site, both.site.homeserver.model
        people = [await site.participant(f"p{n}", delay_ms=6000) for n in range(16)]
        given = await asyncio.gather(*(site.in_call(who) for who in people))
        model.faults.status, model.faults.latency = 502, {"restart": 0.3}  # so that all are on their way when the first one fails
        await until(both.troubled, "a restart fails")
        model.faults.status, model.faults.latency = None, {}
        counted = {who: len(site.event(who).restarted_at) for who in people}

        def decided(who: Participant) -> bool:
            event = site.event(who)
            return len(event.restarted_at) > counted[who] or event.end is not End.PENDING

        await until(lambda: all(map(decided, people)), "what becomes of them")
        assert {site.event(who).end for who in people} == {End.PENDING}
        assert {(await site.show(one))["state"] for one in given} == {"live"}


@pytest.mark.usefixtures("quicker_down")
async def test_recovery_is_no_stampede(tmp_path: Path) -> None:
    """Many have left while the homeserver was away: when it is back, no more requests at a time than at any other time, and none twice."""
    async with open_both(tmp_path, changes={"delegations": {"verify_timeout": "20s"}}, in_flight=6) as both:
        site, model = both.site, both.site.homeserver.model
        people = [await site.participant(f"p{n}", f"call{n % 9}") for n in range(60)]
        given = await asyncio.gather(*(site.in_call(who) for who in people))
        elsewhere, _ = await both.delegate_elsewhere("carol")
        open_now = most = 0
        request = model.request

        def counted(*args: Any, **more: Any) -> Any:
            nonlocal open_now, most
            answer = request(*args, **more)
            open_now += 1
            most = max(most, open_now)
            asyncio.get_running_loop().call_later(answer.delay, closed)
            return answer

        def closed() -> None:
            nonlocal open_now
            open_now -= 1

        await both.front.close()
        for who in people:
            await site.leave(who, "PARTICIPANT_REMOVED")
        for one in given:
            await site.present(one, "gone")

        async def tried() -> bool:
            return await both.failures("send") >= 8

        await until(tried, "it is tried again and again")
        model.faults.latency = {"*": 0.03}
        model.request = counted  # type: ignore[method-assign]
        await both.front.open()
        await until(lambda: model.answers["send", 200] >= 10, "it begins to recover")
        await site.sfu.call("leave", "call", "carol", reason="PARTICIPANT_REMOVED")
        await until(lambda: elsewhere.end is End.SENT, "the event at the other homeserver is sent")
        for who in people:
            await site.ended(who)
        for one in given:
            assert await site.outcomes(one) == ["sent"]
        assert 1 < most <= 6
        assert model.answers["send", 200] == len(people)
        assert model.answers["send", 404] == 0
        assert [len(site.lines(event)) for event in ("homeserver_failed", "homeserver_works_again")] == [1, 1]


@stores.slow_on_postgresql
async def test_a_homeserver_that_fails_now_and_then_does_not_fill_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second request fails, in no order: that is one condition, told now and then, and not two lines for each pair of requests. In the end
    the log says how it is."""
    monkeypatch.setattr("sfu_delegate.daemon.actions.LASTED", 0.5)
    async with open_both(tmp_path, changes={"restart": {"at": 0.1, "spread": 0.05}, "delegations": {"verify_timeout": "20s"}}) as both:
        site, model = both.site, both.site.homeserver.model
        people = [await site.participant(f"p{n}", delay_ms=5000) for n in range(20)]
        for who in people:
            await site.in_call(who)
        model.faults.status, model.faults.probability = 502, 0.5
        await until(lambda: model.answers["restart", 502] >= 60, "enough requests fail")

        def told() -> list[str]:
            return [line["event"] for line in site.lines() if line["event"] in ("homeserver_failed", "homeserver_works_again")]

        assert 0 < len(told()) <= 0.1 * model.answers["restart", 502]
        model.faults.probability = 1.0
        await until(lambda: told()[-1] == "homeserver_failed", "the log says that it is down")
        model.faults.status = None
        await until(lambda: told()[-1] == "homeserver_works_again", "the log says that it is back")
        assert {site.event(who).end for who in people} == {End.PENDING}


# ── certificates ──


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("expired", "certificate has expired"),
        pytest.param("another name", "certificate is not accepted", marks=pytest.mark.slow),
        pytest.param("self-signed", "self-signed certificate", marks=pytest.mark.slow),
        pytest.param("another authority", "unable to get local issuer certificate", marks=pytest.mark.slow),
        ("no TLS", "TLS"),
    ],
)
async def test_a_certificate_that_is_not_accepted(tmp_path: Path, kind: str, words: str) -> None:
    """Waited for like every other trouble, and said in words that tell the operator what to renew."""
    good, here = Certificates(tmp_path), ("localhost", "127.0.0.1")
    context = good.server(*here)
    match kind:
        case "expired":
            bad: ssl.SSLContext | None = good.server(*here, days=-1)
        case "another name":
            bad = good.server("elsewhere.test")
        case "self-signed":
            bad = good.server(*here, self_signed=True)
        case "another authority":
            (tmp_path / "another").mkdir()
            bad = Certificates(tmp_path / "another").server(*here)
        case _:
            bad = None
    async with open_both(tmp_path, context=context, ca_file=str(good.ca_file)) as both:
        await everything_as_it_should_be(both, lambda: both.front.present(bad), lambda: both.front.present(context), words)
