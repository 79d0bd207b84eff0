"""Whose OpenID token is it: what each answer of a homeserver means, and what is remembered."""

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncIterator, Mapping
from ssl import SSLContext

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfu_delegate.matrix import openid as openid_module
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.federation import Federation, Terms
from sfu_delegate.matrix.http import HttpAnswer, HttpFailed
from sfu_delegate.matrix.openid import MAX_REMEMBERED, REFUSAL_LIFE, OpenId, OpenIdRefused, OpenIdUnavailable

from tests.get_only import GetOnly

TOKEN = "secret+token/=&?#%"
QUOTED = "secret%2Btoken%2F%3D%26%3F%23%25"


class Web(GetOnly):
    """Stands for the HTTP client towards one homeserver: tells what it is told to."""

    def __init__(self) -> None:
        self.answer: HttpAnswer | HttpFailed = sub("@alice:hs.test")
        self.asked: list[str] = []
        self.hold: asyncio.Event | None = None
        self.reached = asyncio.Event()

    async def get(
        self, url: str, headers: Mapping[str, str], deadline: float, *, ssl: SSLContext | None = None, server_hostname: str | None = None
    ) -> HttpAnswer:
        self.asked.append(url)
        self.reached.set()
        answer = self.answer
        if self.hold is not None:
            try:
                async with asyncio.timeout_at(deadline):
                    await self.hold.wait()
            except TimeoutError:
                raise HttpFailed(False, "no answer in time") from None
        if isinstance(answer, HttpFailed):
            raise answer
        return answer


class Asker:
    """OpenId on a stand-in for the web and a clock."""

    def __init__(self) -> None:
        self.web = Web()
        self.at = 1_700_000_000.0
        self.cache = 300.0
        self.federation = Federation(lambda name: Terms(url=f"http://{name}"), Egress(self.web, self.web), lambda: self.at)
        self.openid = OpenId(self.federation, lambda: self.at, cache=lambda: self.cache)

    async def user(self, server: str = "hs.test", token: str = TOKEN, patience: float = 30.0) -> str:
        return await self.openid.user(server, token, patience)

    async def refusal(self, server: str = "hs.test", token: str = TOKEN) -> str:
        with pytest.raises(OpenIdRefused) as raised:
            await self.user(server, token)
        return str(raised.value)

    async def unavailable(self, patience: float = 30.0) -> OpenIdUnavailable:
        with pytest.raises(OpenIdUnavailable) as raised:
            await self.user(patience=patience)
        return raised.value


def sub(user: object) -> HttpAnswer:
    return HttpAnswer(200, {}, json.dumps({"sub": user}).encode())


def error(status: int, errcode: str) -> HttpAnswer:
    return HttpAnswer(status, {}, json.dumps({"errcode": errcode, "error": f"no {TOKEN}"}).encode())


@pytest.fixture
async def asker() -> AsyncIterator[Asker]:
    made = Asker()
    yield made
    await made.openid.aclose()
    await made.federation.aclose()


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_owner(asker: Asker) -> None:
    """The user ID comes to the letter; the token is quoted whole."""
    asker.web.answer = sub("@Alice/ä:hs.test")
    assert await asker.user() == "@Alice/ä:hs.test"
    assert asker.web.asked == [f"http://hs.test/_matrix/federation/v1/openid/userinfo?access_token={QUOTED}"]


@pytest.mark.parametrize(
    ("server", "user"),
    [
        ("hs.test", "@alice:HS.Test"),
        ("HS.test", "@alice:hs.test"),
        ("hs.test:8448", "@alice:hs.test:8448"),
        ("192.0.2.1", "@alice:192.0.2.1"),
        ("[2001:DB8::1]:80", "@alice:[2001:db8::1]:80"),
    ],
)
async def test_the_same_server(asker: Asker, server: str, user: str) -> None:
    """Server names are compared without regard to case."""
    asker.web.answer = sub(user)
    assert await asker.user(server) == user


@pytest.mark.parametrize(
    ("server", "user"),
    [
        ("hs.test", "@alice:other.test"),
        ("hs.test", "@alice:sub.hs.test"),
        ("hs.test", "@alice:hs.test."),
        ("hs.test.", "@alice:hs.test"),
        ("hs.test", "@alice:hs.test:8448"),
        ("hs.test:8448", "@alice:hs.test"),
        ("hs.test:8448", "@alice:hs.test:08448"),
        ("hs.test:08448", "@alice:hs.test:8448"),
        ("[::1]", "@alice:[0::1]"),
    ],
)
async def test_another_server(asker: Asker, server: str, user: str) -> None:
    """A server that vouches for a user of any other name is not believed, however alike the names are."""
    asker.web.answer = sub(user)
    assert "another server" in await asker.refusal(server)


@pytest.mark.parametrize(
    "user", ["", "alice", "@alice", "@:hs.test", "@a\x00:hs.test", "@a\ud800:hs.test", "@" + "a" * 255 + ":hs.test", "@a:b:hs.test"]
)
async def test_no_user_at_all(asker: Asker, user: str) -> None:
    """What is no user ID proves nothing."""
    asker.web.answer = sub(user)
    assert "not a Matrix user ID" in await asker.refusal()


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("errcode", ["M_UNKNOWN_TOKEN", "M_FORBIDDEN", "M_MISSING_TOKEN", "ORG.EXAMPLE.WHATEVER"])
async def test_refusals(asker: Asker, status: int, errcode: str) -> None:
    """A Matrix error with 401 or 403 is the homeserver's own "no"."""
    asker.web.answer = error(status, errcode)
    assert "does not accept the OpenID token" in await asker.refusal()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (HttpFailed(True, "the host name cannot be resolved"), "cannot be resolved"),
        (HttpFailed(False, "no answer in time"), "no answer in time"),
        (HttpAnswer(302, {"location": "https://a/"}, b""), "302"),
        (HttpAnswer(200, {}, b"<html>"), "proxy"),
        (HttpAnswer(200, {}, b""), "proxy"),
        (HttpAnswer(200, {}, b"{}"), "proxy"),
        (HttpAnswer(200, {}, b'["@alice:hs.test"]'), "proxy"),
        (HttpAnswer(200, {}, b'{"sub": "@alice:hs.test"}', whole=False), "proxy"),
        (HttpAnswer(200, {}, b"[" * 60_000), "proxy"),
        (sub(None), "proxy"),
        (sub(["@alice:hs.test"]), "proxy"),
        (HttpAnswer(201, {}, b'{"sub": "@alice:hs.test"}'), "201"),
        (HttpAnswer(401, {}, b"<html>"), "401"),
        (HttpAnswer(403, {}, b"{}"), "403"),
        (error(403, "M_LIMIT_EXCEEDED"), "M_LIMIT_EXCEEDED"),
        (error(403, "M_UNRECOGNIZED"), "M_UNRECOGNIZED"),
        (error(400, "M_UNKNOWN_TOKEN"), "400"),
        (error(404, "M_UNRECOGNIZED"), "404"),
        (error(404, "M_NOT_FOUND"), "404"),
        (error(429, "M_LIMIT_EXCEEDED"), "429"),
        (error(500, "M_UNKNOWN_TOKEN"), "500"),
        (HttpAnswer(502, {}, b"bad gateway"), "502"),
    ],
)
async def test_everything_else_says_nothing(asker: Asker, answer: HttpAnswer | HttpFailed, says: str) -> None:
    """What is not the homeserver's own word on the token is told as trouble, with the reason, and is not remembered."""
    asker.web.answer = answer
    assert says in str(await asker.unavailable())
    assert "hs.test" in str(await asker.unavailable())
    assert len(asker.web.asked) == 2
    asker.web.answer = sub("@alice:hs.test")
    assert await asker.user() == "@alice:hs.test"


@given(
    status=st.integers(200, 599),
    body=st.one_of(
        st.binary(),
        st.recursive(st.none() | st.text() | st.integers(), lambda c: st.dictionaries(st.sampled_from(["sub", "errcode", "error"]), c)).map(
            lambda v: json.dumps(v).encode()
        ),
    ),
)
async def test_any_answer(status: int, body: bytes) -> None:
    """Whatever a homeserver answers, nobody gets in by it without being named as a user of that server."""
    asker = Asker()
    asker.web.answer = HttpAnswer(status, {}, body)
    try:
        user = await asker.user()
    except (OpenIdRefused, OpenIdUnavailable):
        return
    assert status == 200
    assert user.endswith(":hs.test")


async def test_in_time(asker: Asker) -> None:
    """A homeserver that does not answer is given up when the time is over."""
    asker.web.hold = asyncio.Event()
    assert "in time" in str(await asker.unavailable(patience=0.01))


# ── what is not asked ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("server", ["", "a b", "user@hs.test", "hs.test/x", "hs.test?x", "hs.test:0", "127.1", "https://hs.test", "hs.test\r\nX: y"])
async def test_no_server_names(asker: Asker, server: str) -> None:
    """What is no server name is refused without a request."""
    assert "matrix_server_name" in await asker.refusal(server)
    assert asker.web.asked == []


@pytest.mark.parametrize("token", ["", "a\x00", "a\n", "ä", "a" * 4097])
async def test_no_tokens(asker: Asker, token: str) -> None:
    """What cannot be a token is refused without a request."""
    assert "the OpenID token is" in await asker.refusal(token=token)
    assert asker.web.asked == []


async def test_the_longest_token(asker: Asker) -> None:
    """4096 characters are a token."""
    assert await asker.user(token="~" * 4096) == "@alice:hs.test"


# ── remembering ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_success_is_remembered(asker: Asker) -> None:
    """For as long as the configuration says, whatever the server's case."""
    await asker.user()
    asker.web.answer = error(401, "M_UNKNOWN_TOKEN")
    asker.at += asker.cache - 1
    assert await asker.user("HS.TEST") == "@alice:hs.test"
    asker.at += 1
    await asker.refusal()
    assert len(asker.web.asked) == 2


async def test_a_cache_that_is_switched_off(asker: Asker) -> None:
    """With 0 s nothing is remembered, and what was is not believed any more."""
    await asker.user()
    asker.cache = 0.0
    await asker.user()
    await asker.user()
    assert len(asker.web.asked) == 3


async def test_a_refusal_is_remembered_shortly(asker: Asker) -> None:
    """For seconds, and a use does not prolong it."""
    asker.web.answer = error(401, "M_UNKNOWN_TOKEN")
    first = await asker.refusal()
    asker.web.answer = sub("@alice:hs.test")
    asker.at += REFUSAL_LIFE - 1
    assert await asker.refusal() == first
    assert len(asker.web.asked) == 1
    asker.at += 1
    assert await asker.user() == "@alice:hs.test"


async def test_a_clock_that_goes_back(asker: Asker) -> None:
    """What was learned in the future is not believed."""
    await asker.user()
    asker.at -= 1
    await asker.user()
    assert len(asker.web.asked) == 2


async def test_tokens_are_kept_apart(asker: Asker) -> None:
    """One token says nothing of another, and nothing of the same token at another server."""
    await asker.user()
    asker.web.answer = sub("@bob:hs.test")
    assert await asker.user(token="another") == "@bob:hs.test"
    await asker.refusal("other.test")
    assert len(asker.web.asked) == 3


async def test_memory_is_bounded(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many tokens are remembered; those that are used stay."""
    assert MAX_REMEMBERED <= 10_000
    monkeypatch.setattr(openid_module, "MAX_REMEMBERED", 10)
    for n in range(20):
        await asker.user(token="used")
        await asker.user(token=str(n))
    assert len(asker.web.asked) == 21
    await asker.user(token="0")
    assert len(asker.web.asked) == 22


async def test_identical_questions_are_one(asker: Asker) -> None:
    """Asked many times at once, a question is one request; who gives up does not spoil it for the others; other questions go beside it."""
    asker.web.hold = asyncio.Event()
    waiting = [asyncio.create_task(asker.user()) for _ in range(10)]
    other = asyncio.create_task(asker.user(token="another"))
    while len(asker.web.asked) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    waiting[0].cancel()
    asker.web.hold.set()
    assert set(await asyncio.gather(*waiting[1:], other)) == {"@alice:hs.test"}
    assert len(asker.web.asked) == 2


async def test_each_has_its_own_patience(asker: Asker) -> None:
    """Who has less time than the one whose question it is gives up when that is over."""
    asker.web.hold = asyncio.Event()
    patient = asyncio.create_task(asker.user())
    while not asker.web.asked:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await asker.unavailable(patience=0.01)
    asker.web.hold.set()
    assert await patient == "@alice:hs.test"
    assert len(asker.web.asked) == 1


async def test_a_question_that_another_gave_up(asker: Asker) -> None:
    """Who joins a question shortly before its time is over asks anew with the own time, once for all who joined."""
    asker.web.hold = asyncio.Event()
    hasty = asyncio.create_task(asker.user(patience=0.1))
    while not asker.web.asked:  # noqa: ASYNC110
        await asyncio.sleep(0)
    patient = [asyncio.create_task(asker.user()) for _ in range(10)]
    with pytest.raises(OpenIdUnavailable):
        await hasty
    while len(asker.web.asked) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    asker.web.hold.set()
    assert set(await asyncio.gather(*patient)) == {"@alice:hs.test"}
    assert len(asker.web.asked) == 2


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "answer",
    [
        HttpFailed(False, "no answer in time"),
        HttpAnswer(500, {}, b"no such token: " + TOKEN.encode()),
        error(401, "M_UNKNOWN_TOKEN"),
        error(401, "secrettoken"),
        error(404, "secrettoken"),
        sub(f"@{TOKEN}:elsewhere.test"),
        sub(TOKEN),
    ],
)
async def test_the_token_is_not_told(asker: Asker, answer: HttpAnswer | HttpFailed, caplog: pytest.LogCaptureFixture) -> None:
    """Neither errors, nor their causes, nor logs repeat a token, whatever the server says."""
    caplog.set_level(logging.DEBUG)
    asker.web.answer = answer
    token = "secrettoken"
    for asked in (TOKEN, token):
        with pytest.raises((OpenIdRefused, OpenIdUnavailable)) as raised:
            await asker.user(token=asked)
        told = "".join(traceback.format_exception_only(raised.value)) + repr(raised.value) + repr(raised.value.__cause__)
        for secret in (TOKEN, QUOTED, token):
            assert secret not in told
            assert secret not in caplog.text


async def test_the_token_is_not_kept(asker: Asker) -> None:
    """When the question is over, no object of ours holds the token."""
    await asker.user()
    asker.web.asked.clear()
    everything = repr(vars(asker.openid)) + repr(vars(asker.federation)) + repr(asker.openid)
    assert TOKEN not in everything
    assert QUOTED not in everything
    assert "@alice" in everything  # the answer is kept: the test looks where it should


async def test_who_waits_when_the_daemon_stops_is_told(asker: Asker) -> None:
    """Not cut off: the client is answered that nobody could be asked. So is whoever asks from then on."""
    asker.web.hold = asyncio.Event()
    waiting = [asyncio.create_task(asker.unavailable()) for _ in range(3)]
    await asker.web.reached.wait()
    await asker.openid.aclose()
    assert {str(error) for error in [*await asyncio.gather(*waiting), await asker.unavailable()]} == {
        "the homeserver hs.test could not be asked about an OpenID token: the daemon is stopping"
    }
    assert len(asker.web.asked) == 1


async def test_a_waiter_that_is_cancelled_is(asker: Asker) -> None:
    """As when its client has gone."""
    asker.web.hold = asyncio.Event()
    waiting = asyncio.create_task(asker.user())
    await asker.web.reached.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
