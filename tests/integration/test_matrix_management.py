"""Restart, send and cancel at homeservers of all generations, healthy and not."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sfu_delegate.delegation.model import Action, Verdict
from sfu_delegate.matrix.discovery import Homeserver
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.management import CHOICE_LASTS, OFF_LASTS, Answer, Generation, ManagementClient, Scope, generations_offered

from tests.integration.matrix_stand_in import (
    STABLE,
    UNSTABLE,
    Clock,
    HomeserverStandIn,
    Scripted,
    closed_port,
    matrix_error,
    raw_server,
    read_request,
    served,
)

A, B, C, D = Generation.A, Generation.B, Generation.C, Generation.D
VERSIONS = "/_matrix/client/versions"
WHOAMI = "/_matrix/client/v3/account/whoami"
STABLE_FLAG: dict[str, object] = {"org.matrix.msc4140.stable": True}
BOTH_FLAGS: dict[str, object] = {"org.matrix.msc4140": True, "org.matrix.msc4140.stable": True}
DELAY_ID = "syd_secret"


class Desk:
    """A client and the homeserver that it is to ask."""

    def __init__(self, client: ManagementClient, homeserver: Homeserver, clock: Clock) -> None:
        self.client, self.homeserver, self.clock = client, homeserver, clock

    async def act(
        self, action: Action = Action.RESTART, delay_id: str = DELAY_ID, *, token: str | None = None, user: str | None = None, within: float = 30.0
    ) -> Answer:
        return await self.client.act(self.homeserver, action, delay_id, token=token, user=user, timeout=within)


@asynccontextmanager
async def desk(base_url: str, as_token: str | None = None) -> AsyncIterator[Desk]:
    clock = Clock()
    egress = Egress.open()
    client = ManagementClient(egress, clock)
    try:
        yield Desk(client, Homeserver("hs.test", base_url, as_token), clock)
    finally:
        await client.aclose()
        await egress.aclose()


@asynccontextmanager
async def at(stand_in: HomeserverStandIn, as_token: str | None = None) -> AsyncIterator[Desk]:
    async with served(stand_in) as url, desk(url, as_token) as found:
        yield found


# ── generations ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("action", [Action.RESTART, Action.SEND, Action.CANCEL])
@pytest.mark.parametrize(
    ("generation", "features", "prefix", "in_path"),
    [
        (A, STABLE_FLAG, STABLE, False),
        (B, {"org.matrix.msc4140": True}, UNSTABLE, False),
        (C, {"org.matrix.msc4140": True}, UNSTABLE, True),
        (D, STABLE_FLAG, STABLE, True),
    ],
)
async def test_each_generation(generation: Generation, features: dict[str, object], prefix: str, in_path: bool, action: Action) -> None:
    """Each generation gets the request in its own form, and from the second time on nothing else is asked."""
    stand_in = HomeserverStandIn(generation, features=features)
    async with at(stand_in) as d:
        assert (await d.act(action)).verdict is Verdict.DONE
        first = len(stand_in.asked)
        assert (await d.act(action)).verdict is Verdict.DONE
    assert len(stand_in.asked) == first + 1
    asked = stand_in.asked[-1]
    assert asked.path == prefix + DELAY_ID + (f"/{action.value}" if in_path else "")
    assert json.loads(asked.body) == ({} if in_path else {"action": action.value})
    assert stand_in.paths.count(VERSIONS) == 1


async def test_stable_is_preferred() -> None:
    """A homeserver that announces both forms is asked at the stable place."""
    stand_in = HomeserverStandIn(C, D, features=BOTH_FLAGS)
    async with at(stand_in) as d:
        await d.act()
    assert [a.path for a in stand_in.managed] == [f"{STABLE}{DELAY_ID}/restart"]


async def test_405_is_no_endpoint_too() -> None:
    """405 leads to the next generation as M_UNRECOGNIZED does."""
    stand_in = HomeserverStandIn(B)
    stand_in.lacks_as_405 = True
    async with at(stand_in) as d:
        assert (await d.act()).verdict is Verdict.DONE


@pytest.mark.parametrize(
    ("versions", "offered"),
    [
        ({}, ()),
        ({"unstable_features": None}, ()),
        ({"unstable_features": {"org.matrix.msc4140": "true"}}, ()),
        ({"unstable_features": {"org.matrix.msc4140": False}}, ()),
        ({"unstable_features": {"org.matrix.msc4140": True}}, (C, B, A)),
        ({"unstable_features": STABLE_FLAG}, (D, A)),
        ({"unstable_features": BOTH_FLAGS, "versions": ["v1.17", 5]}, (D, C, B, A)),
        ({"unstable_features": {}, "versions": "v1.17"}, ()),
    ],
)
def test_what_is_announced(versions: dict[str, object], offered: tuple[Generation, ...]) -> None:
    """The flags of /versions decide what is tried, in which order; only `true` counts."""
    assert generations_offered(versions) == offered


@pytest.mark.parametrize(
    ("before", "features_before", "after", "features_after"),
    [
        (B, {"org.matrix.msc4140": True}, C, {"org.matrix.msc4140": True}),
        (C, {"org.matrix.msc4140": True}, D, STABLE_FLAG),
        (D, STABLE_FLAG, C, {"org.matrix.msc4140": True}),
        (A, STABLE_FLAG, D, STABLE_FLAG),
    ],
)
async def test_the_homeserver_changes(
    before: Generation, features_before: dict[str, object], after: Generation, features_after: dict[str, object]
) -> None:
    """After an upgrade (or its undoing) the very next request finds the new form."""
    stand_in = HomeserverStandIn(before, features=features_before)
    async with at(stand_in) as d:
        await d.act()
        stand_in.generations, stand_in.features = {after}, features_after
        assert (await d.act()).verdict is Verdict.DONE
        count = len(stand_in.asked)
        assert (await d.act()).verdict is Verdict.DONE
    assert len(stand_in.asked) == count + 1


async def test_choice_expires() -> None:
    """After an hour the homeserver is asked again what it offers."""
    stand_in = HomeserverStandIn(C)
    async with at(stand_in) as d:
        await d.act()
        d.clock.at += CHOICE_LASTS - 1
        await d.act()
        assert stand_in.paths.count(VERSIONS) == 1
        d.clock.at += 1
        await d.act()
        assert stand_in.paths.count(VERSIONS) == 2


async def test_expired_choice_is_kept_while_it_cannot_be_renewed() -> None:
    """If /versions fails when the choice is old, the old one stays in force."""
    stand_in = HomeserverStandIn(C)
    async with at(stand_in) as d:
        await d.act()
        d.clock.at += CHOICE_LASTS
        stand_in.versions = [Scripted(502, b"<html>")]
        assert (await d.act()).verdict is Verdict.DONE


async def test_one_negotiation_at_a_time() -> None:
    """Many first requests at once ask /versions once."""
    stand_in = HomeserverStandIn(C)
    stand_in.hold = asyncio.Event()
    async with at(stand_in) as d:
        acts = [asyncio.create_task(d.act()) for _ in range(20)]
        await stand_in.arrived.wait()
        stand_in.hold.set()
        assert {(await a).verdict for a in acts} == {Verdict.DONE}
    assert stand_in.paths.count(VERSIONS) == 1


async def test_who_gives_up_leaves_the_negotiation_to_the_others() -> None:
    """The first who asked is cancelled: the others still get their answer."""
    stand_in = HomeserverStandIn(C)
    stand_in.hold = asyncio.Event()
    async with at(stand_in) as d:
        first = asyncio.create_task(d.act())
        await stand_in.arrived.wait()
        second = asyncio.create_task(d.act())
        await asyncio.sleep(0)
        first.cancel()
        stand_in.hold.set()
        assert (await second).verdict is Verdict.DONE
    assert first.cancelled()
    assert stand_in.paths.count(VERSIONS) == 1


async def test_switched_off() -> None:
    """Delayed events off: not done, with a detail that says so; remembered for a while, then asked again."""
    stand_in = HomeserverStandIn(C, features={})
    async with at(stand_in) as d:
        answer = await d.act()
        assert (answer.verdict, answer.status) == (Verdict.FAILED, None)
        assert "switched off" in answer.detail
        assert (await d.act()).verdict is Verdict.FAILED
        assert stand_in.paths == [VERSIONS]
        stand_in.features = {"org.matrix.msc4140": True}
        d.clock.at += OFF_LASTS
        assert (await d.act()).verdict is Verdict.DONE


async def test_announced_but_not_there() -> None:
    """Announced, but no endpoint: not done, said so, and not tried at every request; after a while it is."""
    stand_in = HomeserverStandIn()
    async with at(stand_in) as d:
        answer = await d.act()
        assert answer.verdict is Verdict.FAILED
        assert "reverse proxy" in answer.detail
        count = len(stand_in.asked)
        assert (await d.act()).verdict is Verdict.FAILED
        assert len(stand_in.asked) == count
        stand_in.generations = {C}
        d.clock.at += OFF_LASTS
        assert (await d.act()).verdict is Verdict.DONE


@pytest.mark.parametrize("action", [Action.RESTART, Action.SEND])
async def test_what_has_worked_is_tried_again_at_once(action: Action) -> None:
    """A worker that is starting, a proxy's rule that is being changed: the next request finds what is back, in whatever form, of every action."""
    stand_in = HomeserverStandIn(C)
    async with at(stand_in) as d:
        assert (await d.act(Action.RESTART)).verdict is Verdict.DONE
        for lacking, features in (({D}, {"org.matrix.msc4140": True}), ({C}, {})):
            stand_in.generations, stand_in.features = set(lacking), dict(features)
            for _ in range(3):
                assert (await d.act(action)).verdict is Verdict.FAILED
            stand_in.generations, stand_in.features = {B}, {"org.matrix.msc4140": True}
            assert (await d.act(action)).verdict is Verdict.DONE


async def test_one_action_missing_does_not_harm_the_others() -> None:
    """Where `send` is routed to a process that lacks it, restarts go on."""
    stand_in = HomeserverStandIn(C)
    stand_in.lacks = {"send"}
    async with at(stand_in) as d:
        assert (await d.act(Action.RESTART)).verdict is Verdict.DONE
        assert (await d.act(Action.SEND)).verdict is Verdict.FAILED
        assert (await d.act(Action.RESTART)).verdict is Verdict.DONE


@pytest.mark.parametrize(
    "versions",
    [
        Scripted(500, b"<html>"),
        Scripted(200, b"<html>"),
        matrix_error(404, "M_UNRECOGNIZED"),
        Scripted(302, b""),
        Scripted(200, b"[]"),
        Scripted(200, {"status": "maintenance"}),
        Scripted(200, {"versions": 17}),
        Scripted(200, {"versions": []}),
        Scripted(200, {"versions": [17]}),
        Scripted(200, {"versions": ["v1.1"], "unstable_features": ["org.matrix.msc4140"]}),
    ],
)
async def test_versions_cannot_be_asked(versions: Scripted) -> None:
    """As long as it is not known what a homeserver offers nothing is done, and the next request asks again."""
    stand_in = HomeserverStandIn(C)
    stand_in.versions = [versions]
    async with at(stand_in) as d:
        answer = await d.act()
        assert answer.verdict is Verdict.FAILED
        assert not stand_in.managed
        assert (await d.act()).verdict is Verdict.DONE


async def test_whether_it_works_now() -> None:
    """Whatever is remembered of it: `check` is content with what was known, `works` is not, and neither changes it."""
    stand_in = HomeserverStandIn(C)
    async with at(stand_in) as d:
        assert await d.client.works(d.homeserver, 30.0) == ""
        assert (await d.act()).verdict is Verdict.DONE
        stand_in.versions = [Scripted(502, b"<html>"), Scripted(502, b"<html>"), Scripted(200, {"status": "maintenance"})]
        assert await d.client.check(d.homeserver, 30.0) == ""
        assert "502" in await d.client.works(d.homeserver, 30.0)
        assert "not a homeserver's" in await d.client.works(d.homeserver, 30.0)
        assert (await d.act()).verdict is Verdict.DONE
        stand_in.features = {}
        assert "switched off" in await d.client.works(d.homeserver, 30.0)


async def test_versions_limited() -> None:
    """A proxy that limits /versions is heard."""
    stand_in = HomeserverStandIn(C)
    stand_in.versions = [Scripted(429, b"", {"Retry-After": "9"})]
    async with at(stand_in) as d:
        answer = await d.act()
    assert (answer.verdict, answer.retry_after) == (Verdict.FAILED, 9.0)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("action", "scripted", "verdict"),
    [
        (Action.RESTART, Scripted(200), Verdict.DONE),
        (Action.SEND, Scripted(200), Verdict.DONE),
        (Action.SEND, matrix_error(404, "M_NOT_FOUND"), Verdict.NOT_FOUND),
        (Action.RESTART, matrix_error(404, "M_NOT_FOUND"), Verdict.NOT_FOUND),
        (Action.RESTART, matrix_error(409, "M_UNKNOWN"), Verdict.CONFLICT),
        (Action.SEND, matrix_error(409, "M_UNKNOWN"), Verdict.CONFLICT),
        (Action.SEND, matrix_error(403, "M_FORBIDDEN"), Verdict.REFUSED),
        (Action.RESTART, matrix_error(401, "M_UNKNOWN_TOKEN"), Verdict.REFUSED),
        (Action.RESTART, matrix_error(429, "M_LIMIT_EXCEEDED", {"Retry-After": "1"}, retry_after_ms=1234), Verdict.LIMITED),
        (Action.SEND, Scripted(502, b"<html>Bad Gateway</html>"), Verdict.UNCERTAIN),
        (Action.SEND, Scripted(200, b"<html>Welcome</html>"), Verdict.UNCERTAIN),
        (Action.SEND, Scripted(404, b"<html>Not Found</html>"), Verdict.UNCERTAIN),
        (Action.SEND, Scripted(403, b"<html>Blocked</html>"), Verdict.UNCERTAIN),
        (Action.SEND, Scripted(307, b"", {"Location": "https://elsewhere.example/"}), Verdict.FAILED),
        (Action.SEND, Scripted(200, b"{" + b" " * 70_000 + b"}"), Verdict.UNCERTAIN),
    ],
)
async def test_table_of_answers(action: Action, scripted: Scripted, verdict: Verdict) -> None:
    """Every answer that MSC4140 names or that Synapse was seen to give, and those of proxies; each after one request."""
    stand_in = HomeserverStandIn(C)
    stand_in.script.append(scripted)
    async with at(stand_in) as d:
        answer = await d.act(action)
    assert (answer.verdict, answer.status) == (verdict, scripted.status)
    assert len(stand_in.managed) == 1
    assert DELAY_ID not in repr(answer)


async def test_limited_says_how_long() -> None:
    """Of `Retry-After` and `retry_after_ms` the larger counts."""
    stand_in = HomeserverStandIn(C)
    stand_in.script.append(matrix_error(429, "M_LIMIT_EXCEEDED", {"Retry-After": "1"}, retry_after_ms=1234))
    async with at(stand_in) as d:
        answer = await d.act()
    assert answer == Answer(Verdict.LIMITED, 429, "M_LIMIT_EXCEEDED", 1.234, "429 M_LIMIT_EXCEEDED")


async def test_nobody_listens() -> None:
    """No connection: certainly not done."""
    async with desk(f"http://127.0.0.1:{closed_port()}") as d:
        answer = await d.act()
    assert (answer.verdict, answer.status) == (Verdict.FAILED, None)


async def goes_down(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers /versions, and closes the connection at anything else."""
    while True:
        request = await read_request(reader)
        if VERSIONS.encode() not in request:
            return
        body = b'{"versions": ["v1.1"], "unstable_features": {"org.matrix.msc4140": true}}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


@pytest.mark.parametrize("action", [Action.RESTART, Action.SEND, Action.CANCEL])
async def test_closed_without_an_answer(action: Action) -> None:
    """The connection ends after the request: perhaps done. Only a restart is tried a second time."""
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await goes_down(reader, writer)

    async with raw_server(talk) as url, desk(url) as d:
        answer = await d.act(action)
        assert (answer.verdict, answer.status) == (Verdict.UNCERTAIN, None)
        assert connections == (2 if action is Action.RESTART else 1)


async def test_too_slow() -> None:
    """No answer in time: perhaps done."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await goes_down(reader, writer)
        await reader.read()

    async with raw_server(talk) as url, desk(url) as d:
        answer = await d.act(Action.SEND, within=0.2)
    assert answer.verdict is Verdict.UNCERTAIN
    assert answer.detail == "no answer in time"


async def test_too_slow_to_say_what_it_offers() -> None:
    """The time is over before the action could be sent: certainly not done."""
    stand_in = HomeserverStandIn(C)
    stand_in.hold = asyncio.Event()
    async with at(stand_in) as d:
        assert (await d.act(Action.SEND, within=0.1)).verdict is Verdict.FAILED
        stand_in.hold.set()
    assert not stand_in.managed


async def test_a_look_is_no_management_request() -> None:
    """Asking for what is not a management request is a mistake of the program."""
    async with desk("http://127.0.0.1:1") as d:
        with pytest.raises(ValueError, match="not a management request"):
            await d.act(Action.LOOK)


# ── delay_ids ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    delay_id=st.one_of(st.text(min_size=1), st.text("./\\%2eEfF?#;&=+ \n\r\0äé", min_size=1)),
    generation=st.sampled_from(list(Generation)),
    action=st.sampled_from([Action.SEND, Action.RESTART, Action.CANCEL]),
)
def test_any_delay_id_stays_in_its_place(delay_id: str, generation: Generation, action: Action) -> None:
    """Whatever text a client calls a delay_id, it fills exactly one segment of the path, and comes back the same when unquoted."""
    path, body = generation.request(delay_id, action)
    prefix, in_path = generation.value
    rest = path.removeprefix(prefix).split("/")
    assert len(rest) == (2 if in_path else 1)
    assert unquote(rest[0], errors="strict") == delay_id
    assert rest[0].isascii()
    assert not set(rest[0]) & set("/?#\\ \n\r;&")
    json.loads(body)


@pytest.mark.parametrize("delay_id", ["a/b", "a?b=c#d", "ä ö", "a%2Fb", "...", "a..b", ".hidden", "%", "a\r\nHost: evil", "\0", "a;b", "+"])
async def test_odd_delay_ids_arrive(delay_id: str) -> None:
    """Odd ids arrive at the homeserver as they are."""
    stand_in = HomeserverStandIn(C)
    async with at(stand_in) as d:
        assert (await d.act(delay_id=delay_id)).verdict is Verdict.DONE
    segment = stand_in.managed[0].raw_path.removeprefix(UNSTABLE).removesuffix("/restart")
    assert unquote(segment) == delay_id


@pytest.mark.parametrize("delay_id", ["", ".", "..", "../x", "a/../../b", "a\\..\\b", "%2e%2e", "%2e%2e%2fadmin", "..%2F..%2Fadmin", "a/.", "\ud800"])
async def test_delay_ids_that_would_lead_elsewhere(delay_id: str) -> None:
    """An id that servers or proxies could take for a way to another endpoint is refused without asking anybody."""
    stand_in = HomeserverStandIn(C)
    async with at(stand_in, as_token="as-secret") as d:
        assert (await d.act(Action.SEND, delay_id)).verdict is Verdict.REFUSED
    assert not stand_in.asked


# ── authentication ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("as_token", "token", "user", "authorization", "query"),
    [
        (None, None, None, None, ""),
        (None, None, "@a:hs.test", None, ""),
        (None, "scoped", "@a:hs.test", "Bearer scoped", ""),
        ("ours", "scoped", "@a:hs.test", "Bearer scoped", ""),
        ("ours", None, "@a/b:hs.test", "Bearer ours", "?user_id=%40a%2Fb%3Ahs.test"),
        ("ours", None, None, "Bearer ours", ""),
    ],
)
async def test_authentication(as_token: str | None, token: str | None, user: str | None, authorization: str | None, query: str) -> None:
    """A scoped token, else the application service with the user it speaks for, else nothing; and never a token to /versions."""
    stand_in = HomeserverStandIn(C)
    async with at(stand_in, as_token) as d:
        await d.act(token=token, user=user)
    assert stand_in.asked[0].authorization is None
    assert stand_in.asked[0].raw_path == VERSIONS
    assert stand_in.asked[1].authorization == authorization
    assert stand_in.asked[1].raw_path == f"{UNSTABLE}{DELAY_ID}/restart{query}"


@pytest.mark.parametrize("token", ["", "a b", "a\r\nX: y", "ä", "\0"])
async def test_tokens_that_no_header_can_hold(token: str) -> None:
    """A token with other than printable ASCII is not sent."""
    stand_in = HomeserverStandIn(C)
    async with at(stand_in) as d:
        assert (await d.act(token=token)).verdict is Verdict.REFUSED
        assert await d.client.is_scoped(d.homeserver, token, 5) is Scope.UNKNOWN
    assert not stand_in.asked


@pytest.mark.parametrize(("status", "errcode"), [(401, "M_UNKNOWN_TOKEN"), (401, "M_MISSING_TOKEN"), (403, "M_FORBIDDEN")])
@pytest.mark.parametrize("action", [Action.RESTART, Action.SEND])
async def test_our_own_token_is_refused(status: int, errcode: str, action: Action) -> None:
    """That the application service is not accepted is the operator's to repair: not done, and not final."""
    stand_in = HomeserverStandIn(C)
    stand_in.script.append(matrix_error(status, errcode))
    stand_in.whoami = matrix_error(status, errcode)
    async with at(stand_in, as_token="ours") as d:
        answer = await d.act(action, user="@a:hs.test")
    assert (answer.verdict, answer.status, answer.errcode) == (Verdict.FAILED, status, errcode)
    assert "as_token" in answer.detail
    assert "ours" not in repr(answer)


async def test_the_event_is_refused() -> None:
    """A 403 to `send`, while our token is accepted for that user elsewhere, is about the event: final."""
    stand_in = HomeserverStandIn(C)
    stand_in.script.append(matrix_error(403, "M_FORBIDDEN"))
    stand_in.whoami = Scripted(200, {"user_id": "@a:hs.test"})
    async with at(stand_in, as_token="ours") as d:
        answer = await d.act(Action.SEND, user="@a:hs.test")
    assert (answer.verdict, answer.detail) == (Verdict.REFUSED, "403 M_FORBIDDEN")
    assert stand_in.asked[-1].raw_path == f"{WHOAMI}?user_id=%40a%3Ahs.test"
    assert stand_in.asked[-1].authorization == "Bearer ours"


async def test_a_refused_restart_is_never_final_for_our_own_token() -> None:
    """A restart that our own token may not make is tried again: giving up would end somebody's membership."""
    stand_in = HomeserverStandIn(C)
    stand_in.script.append(matrix_error(403, "M_FORBIDDEN"))
    stand_in.whoami = Scripted(200, {"user_id": "@a:hs.test"})
    async with at(stand_in, as_token="ours") as d:
        assert (await d.act(user="@a:hs.test")).verdict is Verdict.FAILED


# ── is the token scoped? ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("whoami", "scope"),
    [
        (Scripted(200, {"user_id": "@a:hs.test"}), Scope.FULL_ACCESS),
        (Scripted(200, {}), Scope.FULL_ACCESS),
        (matrix_error(401, "M_UNKNOWN_TOKEN"), Scope.SCOPED),
        (matrix_error(403, "M_FORBIDDEN"), Scope.SCOPED),
        (matrix_error(401, "M_MISSING_TOKEN"), Scope.UNKNOWN),
        (matrix_error(401, "M_USER_LOCKED"), Scope.UNKNOWN),
        (matrix_error(403, "M_USER_SUSPENDED"), Scope.UNKNOWN),
        (matrix_error(403, "M_CONSENT_NOT_GIVEN"), Scope.UNKNOWN),
        (matrix_error(403, "M_RESOURCE_LIMIT_EXCEEDED"), Scope.UNKNOWN),
        (matrix_error(404, "M_UNRECOGNIZED"), Scope.UNKNOWN),
        (matrix_error(429, "M_LIMIT_EXCEEDED"), Scope.UNKNOWN),
        (matrix_error(500, "M_UNKNOWN"), Scope.UNKNOWN),
        (Scripted(200, b"<html>"), Scope.UNKNOWN),
        (Scripted(401, b"<html>"), Scope.UNKNOWN),
        (Scripted(403, {}), Scope.UNKNOWN),
        (Scripted(404, b"<html>"), Scope.UNKNOWN),
        (Scripted(302, b""), Scope.UNKNOWN),
        (Scripted(502, b""), Scope.UNKNOWN),
    ],
)
async def test_is_scoped(whoami: Scripted, scope: Scope) -> None:
    """Scoped is only a token that the homeserver itself refuses; what says nothing of the token says nothing."""
    stand_in = HomeserverStandIn(C)
    stand_in.whoami = whoami
    async with at(stand_in, as_token="ours") as d:
        assert await d.client.is_scoped(d.homeserver, "a-token", 30) is scope
    assert [(a.method, a.raw_path, a.authorization) for a in stand_in.asked] == [("GET", WHOAMI, "Bearer a-token")]


async def test_is_scoped_without_an_answer() -> None:
    """Nobody there: unknown."""
    async with desk(f"http://127.0.0.1:{closed_port()}") as d:
        assert await d.client.is_scoped(d.homeserver, "a-token", 30) is Scope.UNKNOWN
