"""What an application service asks its homeserver, to the letter, and what it makes of answers, also of those that no homeserver gives."""

import asyncio
import json
import ssl as tls
from collections.abc import Awaitable, Callable, Mapping
from email.utils import formatdate
from math import floor
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfu_delegate.matrix.discovery import Homeserver
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.http import HttpAnswer, HttpFailed
from sfu_delegate.matrix.service import (
    LONG_DELAY,
    LONGEST_DELAY,
    ApplicationService,
    CannotAsk,
    CannotBe,
    CannotTell,
    Federated,
    Findings,
    Part,
    Shown,
    running_since,
)

Json = dict[str, Any]

NOW = 1_760_000_000.0
BASE = "https://matrix.example.org/prefix"
AS_TOKEN = "verysecret-as-token"
DELAY_ID = "verysecret-delay-id"
ALICE = "@alice:example.org"
ROOM = "!room:example.org"
STATE_KEY = "_@alice:example.org_DEVICE_m.call"
HOME = Homeserver("example.org", BASE, AS_TOKEN)
UNSTABLE = f"{BASE}/_matrix/client/unstable/org.matrix.msc4140/delayed_events/"
STABLE = f"{BASE}/_matrix/client/v1/delayed_events/"
FED_PROXY = f"{BASE}/_matrix/client/unstable/io.element.msc4512/appservice/fed_proxy"
FED_PROXY_STABLE = f"{BASE}/_matrix/client/v1/appservice/fed_proxy"
FED_UNSTABLE = "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token"
FED_STABLE = "/_matrix/federation/v1/rtc/livekit/get_token"
EVENT: Json = {"delay_id": DELAY_ID, "room_id": ROOM, "type": "m.rtc.member", "state_key": STATE_KEY, "content": {"a": "verysecret"}}
SYNAPSES: Json = EVENT | {"delay_ms": 3_600_000, "delayed_since_ts": (NOW - 60) * 1000}
PROPOSALS: Json = EVENT | {"delay": 3_600_000, "running_since": (NOW - 60) * 1000}


class Asked(NamedTuple):
    """A request, as it was made."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes
    deadline: float
    ssl: tls.SSLContext | None


class ScriptedHttp:
    """Gives its answers one after another, and keeps what it was asked."""

    def __init__(self, *answers: HttpAnswer | HttpFailed) -> None:
        self.answers = list(answers)
        self.asked: list[Asked] = []

    async def get(
        self, url: str, headers: Mapping[str, str], deadline: float, *, ssl: tls.SSLContext | None = None, server_hostname: str | None = None
    ) -> HttpAnswer:
        return self._next(Asked("GET", url, headers, b"", deadline, ssl))

    async def post(
        self, url: str, headers: Mapping[str, str], body: bytes, deadline: float, *, ssl: tls.SSLContext | None = None, repeatable: bool = False
    ) -> HttpAnswer:
        assert not repeatable
        return self._next(Asked("POST", url, headers, body, deadline, ssl))

    async def put(self, url: str, headers: Mapping[str, str], body: bytes, deadline: float, *, ssl: tls.SSLContext | None = None) -> HttpAnswer:
        raise AssertionError("nothing is put")

    async def aclose(self) -> None:
        pass

    def _next(self, asked: Asked) -> HttpAnswer:
        self.asked.append(asked)
        answer = self.answers.pop(0)
        if isinstance(answer, HttpFailed):
            raise answer
        return answer

    @property
    def urls(self) -> list[str]:
        return [asked.url for asked in self.asked]


def answered(status: int, body: Json | bytes, *, date: float | None = NOW, whole: bool = True) -> HttpAnswer:
    """An answer, with a `Date` unless that is None."""
    headers = {} if date is None else {"date": formatdate(date, usegmt=True)}
    return HttpAnswer(status, headers, body if isinstance(body, bytes) else json.dumps(body).encode(), whole)


def refusal(status: int, errcode: str) -> HttpAnswer:
    """A Matrix error, whose text repeats what it should not."""
    return answered(status, {"errcode": errcode, "error": f"no {DELAY_ID} for {AS_TOKEN}"})


UNRECOGNIZED = refusal(404, "M_UNRECOGNIZED")
OTHER_METHOD = answered(405, b"")


def service_of(*answers: HttpAnswer | HttpFailed) -> tuple[ApplicationService, ScriptedHttp]:
    """An application service, and the way to the homeserver that the operator has configured."""
    http = ScriptedHttp(*answers)
    return ApplicationService(Egress(http, ScriptedHttp()), lambda: NOW), http


def asks_event(service: ApplicationService, homeserver: Homeserver = HOME) -> Awaitable[object]:
    return service.delayed_event(homeserver, ALICE, DELAY_ID, 5.0)


def asks_membership(service: ApplicationService, homeserver: Homeserver = HOME) -> Awaitable[object]:
    return service.is_joined(homeserver, ALICE, ROOM, 5.0)


def asks_far(service: ApplicationService, homeserver: Homeserver = HOME) -> Awaitable[object]:
    return service.federated(homeserver, "far.example", "get_token", {"user_id": ALICE}, 5.0)


def asks_defects(service: ApplicationService, homeserver: Homeserver = HOME) -> Awaitable[object]:
    return service.check(homeserver, 5.0, passes_on=True)


Question = Callable[..., Awaitable[object]]
questions = pytest.mark.parametrize("ask", [asks_event, asks_membership, asks_far, asks_defects])
about_one_thing = pytest.mark.parametrize("ask", [asks_event, asks_membership, asks_far])


async def unanswered(asked: Awaitable[object]) -> CannotAsk:
    """The error, in which nothing is secret, nor in any that it came from."""
    with pytest.raises(CannotAsk) as raised:
        await asked
    error: BaseException | None = raised.value
    while error is not None:
        assert "verysecret" not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__
    return raised.value


# ── all questions ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


NO_ANSWERS: list[Any] = [
    pytest.param(answered(200, b""), id="nothing"),
    pytest.param(answered(200, b"<html>verysecret</html>"), id="a page"),
    pytest.param(answered(200, b"[]"), id="a list"),
    pytest.param(answered(200, {}), id="an empty object"),
    pytest.param(answered(200, {"status": "maintenance"}), id="something else"),
    pytest.param(answered(200, {"errcode": "M_NOT_FOUND"}), id="an error that succeeds"),
    pytest.param(answered(200, SYNAPSES | {"joined": True, "status": 200}, whole=False), id="too long"),
    pytest.param(answered(204, b""), id="204"),
    pytest.param(answered(302, b""), id="a redirect"),
    pytest.param(answered(400, b"<html>"), id="400 of a proxy"),
    pytest.param(answered(404, b"<html>Not Found</html>"), id="404 of a proxy"),
    pytest.param(refusal(404, "M_UNKNOWN"), id="another 404"),
    pytest.param(refusal(429, "M_LIMIT_EXCEEDED"), id="429"),
    pytest.param(refusal(500, "M_UNKNOWN"), id="500"),
    pytest.param(refusal(500, "M_UNRECOGNIZED"), id="500 that looks like another version"),
    pytest.param(answered(502, b"<html>Bad Gateway</html>"), id="502"),
    pytest.param(answered(503, b""), id="503"),
    pytest.param(answered(504, b""), id="504"),
]


@about_one_thing
@pytest.mark.parametrize("answer", NO_ANSWERS)
async def test_what_no_homeserver_answers(ask: Question, answer: HttpAnswer) -> None:
    """It cannot be asked at the moment: that is neither a yes, nor a no, nor a defect of its configuration. It is asked once."""
    service, http = service_of(answer)
    assert not isinstance(await unanswered(ask(service)), CannotTell)
    assert len(http.asked) == 1


@questions
async def test_a_homeserver_that_is_not_reached(ask: Question) -> None:
    """The reason is told."""
    service, _ = service_of(HttpFailed(True, "no connection: connection refused"))
    error = await unanswered(ask(service))
    assert str(error) == "no connection: connection refused"
    assert not isinstance(error, CannotTell)


@about_one_thing
@pytest.mark.parametrize(("status", "errcode"), [(401, "M_UNKNOWN_TOKEN"), (401, "M_MISSING_TOKEN"), (403, "M_FORBIDDEN")])
async def test_a_token_that_is_not_accepted(ask: Question, status: int, errcode: str) -> None:
    """That is nothing that goes away by itself."""
    service, _ = service_of(refusal(status, errcode))
    assert isinstance(await unanswered(ask(service)), CannotTell)


@pytest.mark.parametrize("ask", [asks_event, asks_far])
@pytest.mark.parametrize("status", [401, 403])
async def test_a_proxys_no(ask: Question, status: int) -> None:
    """It says nothing of the token."""
    service, _ = service_of(answered(status, b"<html>Blocked</html>"))
    assert not isinstance(await unanswered(ask(service)), CannotTell)


@pytest.mark.parametrize("ask", [asks_event, asks_membership, asks_far])
async def test_a_token_that_is_not_configured_any_more(ask: Question) -> None:
    """Nothing is asked without one."""
    service, http = service_of()
    error = await unanswered(ask(service, Homeserver("example.org", BASE)))
    assert isinstance(error, CannotTell)
    assert "as_token" in str(error)
    assert http.asked == []


@about_one_thing
async def test_the_way_to_a_homeserver(ask: Question) -> None:
    """By the way out for where it was found, trusting whom its rule says, with its token, and within the time."""
    ways = [ScriptedHttp(answered(500, b"")) for _ in range(3)]
    service = ApplicationService(Egress(*ways), lambda: NOW)
    context = tls.create_default_context()
    for way, homeserver in zip(
        ways,
        [
            Homeserver("example.org", BASE, AS_TOKEN, context),
            Homeserver("example.org", BASE, AS_TOKEN, context, discovered=True),
            Homeserver("example.org", BASE, AS_TOKEN, context, discovered=True, stranger=True),
        ],
        strict=True,
    ):
        begun = asyncio.get_running_loop().time()
        await unanswered(ask(service, homeserver))
        (asked,) = way.asked
        assert asked.headers["Authorization"] == f"Bearer {AS_TOKEN}"
        assert asked.ssl is context
        assert begun + 5.0 <= asked.deadline <= asyncio.get_running_loop().time() + 5.0


@pytest.mark.parametrize("ask", [asks_event, asks_far])
async def test_all_versions_share_the_time(ask: Question) -> None:
    """To have been answered "no such endpoint" gives no more of it."""
    service, http = service_of(UNRECOGNIZED, OTHER_METHOD)
    await unanswered(ask(service))
    assert http.asked[0].deadline == http.asked[1].deadline


# ── delayed events ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("content", [SYNAPSES, PROPOSALS, PROPOSALS | SYNAPSES], ids=["Synapse", "the proposal", "both"])
async def test_a_delayed_event(content: Json) -> None:
    """Where it is to go and its delay, by Synapse's names or the proposal's, and since when it may be running: `Date` leaves a second open."""
    service, http = service_of(answered(200, content))
    assert await service.delayed_event(HOME, "@a/b:example.org", "syd_a/b+c", 5.0) == Shown(ROOM, "m.rtc.member", STATE_KEY, 3600.0, NOW - 61.0, NOW)
    (asked,) = http.asked
    assert (asked.method, asked.url) == ("GET", f"{UNSTABLE}syd_a%2Fb%2Bc?user_id=%40a%2Fb%3Aexample.org")


@pytest.mark.parametrize("lacks", [UNRECOGNIZED, refusal(400, "M_UNRECOGNIZED"), OTHER_METHOD])
async def test_a_homeserver_that_has_the_stable_endpoint_only(lacks: HttpAnswer) -> None:
    """It is asked there, when the unstable one turns out not to be there."""
    service, http = service_of(lacks, answered(200, PROPOSALS))
    assert await asks_event(service) == Shown(ROOM, "m.rtc.member", STATE_KEY, 3600.0, NOW - 61.0, NOW)
    assert [urlsplit(url).path for url in http.urls] == [urlsplit(prefix + DELAY_ID).path for prefix in (UNSTABLE, STABLE)]
    service, _ = service_of(lacks, refusal(404, "M_NOT_FOUND"))
    assert await asks_event(service) is None


async def test_a_homeserver_that_does_not_show_events() -> None:
    """Neither endpoint: that is not the same as "no such event"."""
    service, http = service_of(UNRECOGNIZED, UNRECOGNIZED)
    error = await unanswered(asks_event(service))
    assert isinstance(error, CannotTell)
    assert "too old" in str(error)
    assert len(http.asked) == 2


async def test_an_event_that_is_not_there() -> None:
    """404 M_NOT_FOUND means so, and nobody else is asked."""
    service, http = service_of(refusal(404, "M_NOT_FOUND"))
    assert await asks_event(service) is None
    assert len(http.asked) == 1


@pytest.mark.parametrize(
    "spoilt",
    [
        {"room_id": None},
        {"room_id": 7},
        {"type": None},
        {"type": ["m.rtc.member"]},
        {"delay_ms": None},
        {"delay_ms": "3600000"},
        {"delay_ms": True},
        {"delay_ms": -1},
        {"delay_ms": float("nan")},
        {"delay_ms": float("inf")},
        {"delay_ms": 10**400},
        {"delay_ms": (LONGEST_DELAY + 1) * 1000},
        {"delayed_since_ts": None},
        {"delayed_since_ts": "1"},
        {"delayed_since_ts": False},
        {"delayed_since_ts": float("nan")},
        {"delayed_since_ts": float("-inf")},
        {"delayed_since_ts": -(10**400)},
    ],
    ids=lambda spoilt: str(spoilt)[:40],
)
async def test_an_event_with_impossible_fields(spoilt: Json) -> None:
    """It is no answer, and not half of one."""
    service, _ = service_of(answered(200, SYNAPSES | spoilt))
    assert "proxy" in str(await unanswered(asks_event(service)))


@pytest.mark.parametrize("missing", ["room_id", "type", "delay_ms", "delayed_since_ts"])
async def test_an_event_without_a_field(missing: str) -> None:
    """It is no answer: nothing that counts is ever assumed."""
    service, _ = service_of(answered(200, {name: value for name, value in SYNAPSES.items() if name != missing}))
    await unanswered(asks_event(service))


@pytest.mark.parametrize("content", [SYNAPSES | {"state_key": 7}, {name: value for name, value in SYNAPSES.items() if name != "state_key"}])
async def test_an_event_that_is_no_state(content: Json) -> None:
    """It has no state key."""
    service, _ = service_of(answered(200, content))
    assert await asks_event(service) == Shown(ROOM, "m.rtc.member", None, 3600.0, NOW - 61.0, NOW)


async def test_an_event_without_a_date() -> None:
    """It is shown, but when its countdown began is not known."""
    service, _ = service_of(answered(200, SYNAPSES, date=None))
    assert await asks_event(service) == Shown(ROOM, "m.rtc.member", STATE_KEY, 3600.0, None, NOW)


async def test_a_countdown_is_timed_from_before_the_question() -> None:
    """However long the answer takes: the age is taken from when it came, and counted back from when it was asked for."""
    times = iter([NOW - 20.0, NOW, NOW])
    http = ScriptedHttp(answered(200, SYNAPSES, date=NOW - 10.0))
    service = ApplicationService(Egress(http, ScriptedHttp()), lambda: next(times))
    shown = await service.delayed_event(HOME, ALICE, DELAY_ID, 30.0)
    assert shown is not None
    assert shown.running_since == NOW - 20.0 - 60.0


ODD_IDS = st.one_of(st.text(), st.text("./\\%2eEfF?#;&=+ \n\r\0äé\ud800"))


@given(delay_id=ODD_IDS, user=st.text("@a:/?#&=%.+ é", min_size=1))
def test_any_delay_id_stays_in_its_place(delay_id: str, user: str) -> None:
    """Whatever a client calls a delay_id fills one segment of the path and comes back the same when unquoted; or nobody is asked."""
    service, http = service_of(refusal(404, "M_NOT_FOUND"))
    assert asyncio.run(service.delayed_event(HOME, user, delay_id, 5.0)) is None
    for asked in http.asked:
        assert asked.url.isascii()
        assert asked.url.isprintable()
        path, _, query = asked.url.partition("?")
        segment = path.removeprefix(UNSTABLE)
        assert unquote(segment, errors="strict") == delay_id
        assert not set(segment) & set("/?#\\ ;&")
        assert unquote(query, errors="strict") == f"user_id={user}"
        assert not set(query.removeprefix("user_id=")) & set("&=#+;? ")


@pytest.mark.parametrize("delay_id", ["", ".", "..", "../x", "a/../../b", "a\\..\\b", "%2e%2e", "%2e%2e%2fadmin", "..%2F..%2Fadmin", "a/.", "\ud800"])
async def test_delay_ids_that_would_lead_elsewhere(delay_id: str) -> None:
    """No homeserver gives such: there is no such event, and nobody is asked."""
    service, http = service_of()
    assert await service.delayed_event(HOME, ALICE, delay_id, 5.0) is None
    assert http.asked == []


# ── when a countdown began ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

DAY = 86_400.0


def _rounded_down(seconds: float) -> float:
    """To milliseconds, as homeservers keep times."""
    return floor(seconds * 1000) / 1000


@given(
    offset=st.one_of(st.floats(-DAY, DAY), st.floats(-2.0, 2.0), st.just(0.0)),
    age=st.floats(0.0, DAY),
    delay=st.floats(1.0, 2 * DAY),
    there=st.floats(0.0, 30.0),
    back=st.floats(0.0, 30.0),
    sent_at=st.floats(NOW, NOW + 10.0),
    restarted=st.booleans(),
)
def test_a_countdown_never_began_later_than_it_is_said_to(
    offset: float, age: float, delay: float, there: float, back: float, sent_at: float, restarted: bool
) -> None:
    """However wrong the homeserver's clock is: it cannot make us late. Nor is the countdown said to be much older than it is.

    The `Date` is the homeserver's own, in whole seconds; the event may be restarted while our question is under way.
    """
    looked_at = sent_at + there
    answered_at = looked_at + back
    began = looked_at - min(age, there) if restarted else sent_at - age
    since = _rounded_down(began + offset)
    date = formatdate(floor(looked_at + offset), usegmt=True)
    found = running_since(since, delay, date, sent_at, answered_at)
    # Older by what the way took, by the second of `Date`, and by how far the homeserver's clock is behind ours.
    oldest = min(began, sent_at) - (answered_at - sent_at) - 1.0 - max(0.0, -offset) - 0.01
    contradicted = since >= answered_at + 1.0
    if found is None:
        assert oldest <= sent_at - delay or contradicted or delay < LONG_DELAY
    else:
        assert not contradicted
        assert delay >= LONG_DELAY
        assert oldest <= found <= began + 1e-5  # of the floats
        assert found > sent_at - delay


@pytest.mark.parametrize(
    ("since", "date", "expected"),
    [
        (NOW - 100, NOW, NOW - 101),  # both clocks agree
        (NOW - 100 + 50, NOW + 50, NOW - 101),  # the homeserver's is ahead
        (NOW - 100 + 7200, NOW + 7200, None),  # … so far that it began in our future
        (NOW - 100 + 7200, NOW, None),  # … and the Date is a proxy's: nothing can be told
        (NOW - 100 - 1000, NOW - 1000, NOW - 1100),  # the homeserver's is behind: it may be that our own is ahead
        (NOW + 5, NOW, None),  # of the future
        (NOW + 0.9, NOW, NOW - 0.1),  # of this second
        (NOW - 3600, NOW, None),  # it would have run out
        (NOW - 3598.5, NOW, NOW - 3599.5),
        (NOW - 100, NOW + 3600, None),
        (0.0, NOW, None),
    ],
)
def test_when_a_countdown_began(since: float, date: float, expected: float | None) -> None:
    """Of the homeserver's clock and ours, that counts by which it is older; None where it would have run out, though it is there."""
    assert running_since(since, 3600.0, formatdate(date, usegmt=True), NOW, NOW) == expected


@pytest.mark.parametrize(
    "date", [None, "", "soon", "1760000000", "2025-10-09T08:53:20Z", "Thu, 99 Oct 2025 08:53:20 GMT", "Thu, 09 Oct 99999 08:53:20 GMT", "\ud800"]
)
def test_without_a_date_nothing_is_known(date: str | None) -> None:
    """Without the homeserver's own time, its times are worth nothing."""
    assert running_since(NOW - 100, 3600.0, date, NOW, NOW) is None


# ── membership ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("joined", [True, False])
async def test_who_is_in_a_room(joined: bool) -> None:
    """As the homeserver says, asked by quoted names and in nobody's name."""
    service, http = service_of(answered(200, {"joined": joined}))
    assert await service.is_joined(HOME, "@eve+1:elsewhere.org", "!a/b?c:example.org", 5.0) is joined
    (asked,) = http.asked
    path = "/_matrix/client/unstable/io.element.msc4502/rooms/%21a%2Fb%3Fc%3Aexample.org/is_joined"
    assert (asked.method, asked.url) == ("GET", f"{BASE}{path}?mxid=%40eve%2B1%3Aelsewhere.org")


async def test_nobody_is_in_a_room_that_cannot_be() -> None:
    """400 M_INVALID_PARAM is the homeserver's word for a room or a user that is none; whoever is in a call is not removed for that."""
    service, _ = service_of(refusal(400, "M_INVALID_PARAM"))
    assert isinstance(await unanswered(asks_membership(service)), CannotBe)


@pytest.mark.parametrize("joined", ["true", 1, 0, None, [], {}])
async def test_a_membership_is_yes_or_no(joined: Any) -> None:
    """Anything else is no answer."""
    service, _ = service_of(answered(200, {"joined": joined}))
    assert not isinstance(await unanswered(asks_membership(service)), CannotTell)


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (UNRECOGNIZED, "msc4502_enabled: true"),
        (OTHER_METHOD, "msc4502_enabled: true"),
        (refusal(403, "M_FORBIDDEN"), "urn:matrix:client:io.element.msc4502:rooms:is_joined"),
    ],
)
async def test_a_homeserver_that_does_not_tell_who_is_in_a_room(answer: HttpAnswer, remedy: str) -> None:
    """What its operator has to change is told."""
    service, http = service_of(answer)
    error = await unanswered(asks_membership(service))
    assert isinstance(error, CannotTell)
    assert remedy in str(error)
    assert len(http.asked) == 1


# ── other homeservers ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

JWT: Json = {"jwt": "verysecret-jwt"}


def far(status: int, content: object) -> HttpAnswer:
    """What the own homeserver says that the other one has answered."""
    return answered(200, {"status": status, "content": content})


def _fed_paths(http: ScriptedHttp) -> list[str]:
    return [json.loads(asked.body)["path"] for asked in http.asked]


async def test_another_homeserver() -> None:
    """It is asked by the own one; a secret that it gives is in no repr."""
    service, http = service_of(far(200, JWT))
    answer = await service.federated(HOME, "far.example:8448", "get_token", {"user_id": ALICE, "room_id": "!ä:x"}, 5.0)
    assert answer == Federated(200, "", JWT)
    assert "verysecret" not in repr(answer)
    (asked,) = http.asked
    assert (asked.method, asked.url, asked.headers["Content-Type"]) == ("POST", FED_PROXY, "application/json")
    body = {"user_id": ALICE, "room_id": "!ä:x"}
    assert json.loads(asked.body) == {"destination": "far.example:8448", "method": "POST", "path": FED_UNSTABLE, "body": body}


async def test_another_homeserver_that_has_the_stable_endpoint_only() -> None:
    """It is asked there, when it does not know the unstable one."""
    service, http = service_of(far(404, {"errcode": "M_UNRECOGNIZED", "error": ""}), far(200, JWT))
    assert await asks_far(service) == Federated(200, "", JWT)
    assert _fed_paths(http) == [FED_UNSTABLE, FED_STABLE]


async def test_another_homeserver_that_has_neither() -> None:
    """Its last word is told."""
    lacks: Json = {"errcode": "M_UNRECOGNIZED", "error": ""}
    service, http = service_of(far(404, lacks), far(404, lacks))
    assert await asks_far(service) == Federated(404, "M_UNRECOGNIZED", lacks)
    assert len(http.asked) == 2


@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (403, {"errcode": "M_FORBIDDEN"}, Federated(403, "M_FORBIDDEN", {"errcode": "M_FORBIDDEN"})),
        (400, {"errcode": "M_INVALID_PARAM"}, Federated(400, "M_INVALID_PARAM", {"errcode": "M_INVALID_PARAM"})),
        (503, None, Federated(503, "", None)),
        (200, [1], Federated(200, "", None)),
        (200, "text", Federated(200, "", None)),
        (500, {"errcode": 7}, Federated(500, "", {"errcode": 7})),
    ],
)
async def test_what_another_homeserver_answers(status: int, content: object, expected: Federated) -> None:
    """It is told as it is, after one question; what is no object is nothing."""
    service, http = service_of(far(status, content))
    assert await asks_far(service) == expected
    assert len(http.asked) == 1


@pytest.mark.parametrize(
    ("status", "what"), [(403, "DESTINATION_DENIED"), (403, "PATH_NOT_ALLOWED"), (502, "CONNECTION_FAILED"), (502, "RESPONSE_TOO_LARGE")]
)
async def test_another_homeserver_that_is_not_asked(status: int, what: str) -> None:
    """The own one says so, by an error of its own: that is no trouble with the own one."""
    errcode = f"IO.ELEMENT.MSC4512.M_FEDPROXY_{what}"
    service, http = service_of(refusal(status, errcode))
    assert await asks_far(service) == Federated(status, errcode, None)
    assert len(http.asked) == 1


@pytest.mark.parametrize("status", ["200", None, True, 200.5, []])
async def test_an_answer_of_another_homeserver_without_a_status(status: Any) -> None:
    """It is no answer."""
    service, _ = service_of(answered(200, {"status": status, "content": JWT}))
    assert not isinstance(await unanswered(asks_far(service)), CannotTell)


async def test_a_homeserver_that_has_the_stable_proxy_only() -> None:
    """It is asked there for each of the other's endpoints."""
    service, http = service_of(UNRECOGNIZED, far(404, {"errcode": "M_UNRECOGNIZED"}), UNRECOGNIZED, far(200, JWT))
    assert await asks_far(service) == Federated(200, "", JWT)
    assert http.urls == [FED_PROXY, FED_PROXY_STABLE] * 2
    assert _fed_paths(http) == [FED_UNSTABLE, FED_UNSTABLE, FED_STABLE, FED_STABLE]


@pytest.mark.parametrize("lacks", [UNRECOGNIZED, OTHER_METHOD])
async def test_a_homeserver_that_does_not_ask_others(lacks: HttpAnswer) -> None:
    """What its operator has to change is told."""
    service, http = service_of(lacks, lacks)
    error = await unanswered(asks_far(service))
    assert isinstance(error, CannotTell)
    assert "msc4512_enabled: true" in str(error)
    assert http.urls == [FED_PROXY, FED_PROXY_STABLE]


# ── does it all work? ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

WHOAMI = answered(200, {"user_id": "@nobody:example.org"})
NOT_REGISTERED = answered(403, {"errcode": "M_FORBIDDEN", "error": "Application service has not registered this user (@nobody:example.org)"})
MASQUERADE = answered(403, {"errcode": "M_FORBIDDEN", "error": "Application service cannot masquerade as this user (@nobody:example.org)."})
NOBODY = answered(200, {"joined": False})
MISSING = refusal(400, "M_MISSING_PARAM")
NO_JSON = refusal(400, "M_NOT_JSON")


async def found(*answers: HttpAnswer | HttpFailed, passes_on: bool = True) -> tuple[Findings, ScriptedHttp]:
    """What does not work, in words without secrets."""
    service, http = service_of(*answers)
    findings = await service.check(HOME, 5.0, passes_on=passes_on)
    assert "verysecret" not in repr(findings)
    assert {defect.part for defect in findings.defects} <= findings.tried
    assert http.answers == []
    return findings, http


@pytest.mark.parametrize("whoami", [WHOAMI, NOT_REGISTERED])
async def test_all_is_well(whoami: HttpAnswer) -> None:
    """Nothing is found, by questions that change nothing, each of them asked in the name of nobody that there is."""
    findings, http = await found(whoami, NOBODY, MISSING, NO_JSON)
    assert findings == Findings(frozenset(Part), ())
    assert [(asked.method, asked.url.removeprefix(BASE), asked.body) for asked in http.asked] == [
        ("GET", "/_matrix/client/v3/account/whoami?user_id=%40nobody%3Aexample.org", b""),
        (
            "GET",
            "/_matrix/client/unstable/io.element.msc4502/rooms/%21nowhere%3Aexample.org/is_joined?mxid=%40nobody%3Aexample.org",
            b"",
        ),
        ("POST", FED_PROXY.removeprefix(BASE), b"{}"),
        ("POST", "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/delegate_delayed_leave", b""),
    ]
    assert all(asked.headers["Authorization"] == f"Bearer {AS_TOKEN}" for asked in http.asked)


@pytest.mark.parametrize("whoami", [WHOAMI, NOT_REGISTERED])
async def test_a_homeserver_that_is_not_to_pass_requests_on(whoami: HttpAnswer) -> None:
    """Only its token is tried."""
    findings, http = await found(whoami, passes_on=False)
    assert (findings, len(http.asked)) == (Findings(frozenset({Part.TOKEN}), ()), 1)


@pytest.mark.parametrize("passes_on", [True, False])
async def test_a_token_that_the_homeserver_does_not_know(passes_on: bool) -> None:
    """That is all that is said: nothing else can work."""
    findings, _ = await found(refusal(401, "M_UNKNOWN_TOKEN"), passes_on=passes_on)
    assert findings.tried == {Part.TOKEN}
    (defect,) = findings.defects
    assert (defect.part, defect.problem) == (Part.TOKEN, "it does not know the as_token")
    assert "app_service_config_files" in defect.remedy


async def test_a_namespace_that_does_not_match() -> None:
    """It is said, and the rest is tried all the same."""
    findings, _ = await found(MASQUERADE, passes_on=False)
    (defect,) = findings.defects
    assert defect.part is Part.TOKEN
    assert "namespaces.users" in defect.remedy
    findings, _ = await found(MASQUERADE, UNRECOGNIZED, UNRECOGNIZED, UNRECOGNIZED)
    assert [one.part for one in findings.defects] == [Part.TOKEN, Part.MEMBERSHIP, Part.FEDERATION]


@pytest.mark.parametrize(
    ("answer", "hint"), [(UNRECOGNIZED, "msc4502_enabled"), (refusal(403, "M_FORBIDDEN"), "io.element.msc4502.scopes"), (OTHER_METHOD, "msc4502")]
)
async def test_a_membership_that_is_not_told(answer: HttpAnswer, hint: str) -> None:
    """It is said with what has to be changed, and the rest is tried all the same."""
    findings, _ = await found(WHOAMI, answer, MISSING, NO_JSON)
    assert findings.tried == set(Part)
    (defect,) = findings.defects
    assert defect.part is Part.MEMBERSHIP
    assert hint in defect.problem


async def test_requests_that_are_not_passed_on() -> None:
    """Without the proposal, under either name, nothing can come back either: that is not tried."""
    findings, http = await found(WHOAMI, NOBODY, UNRECOGNIZED, OTHER_METHOD)
    assert findings.tried == {Part.TOKEN, Part.MEMBERSHIP, Part.FEDERATION}
    (defect,) = findings.defects
    assert defect.part is Part.FEDERATION
    assert "msc4512_enabled: true" in defect.remedy
    assert len(http.asked) == 4
    findings, http = await found(WHOAMI, NOBODY, UNRECOGNIZED, MISSING, UNRECOGNIZED, NO_JSON)
    assert (findings.tried, findings.defects) == (frozenset(Part), ())
    assert len(http.asked) == 6


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (UNRECOGNIZED, "it does not pass clients' requests on"),
        (OTHER_METHOD, "it does not pass clients' requests on"),
        (refusal(401, "M_UNKNOWN_TOKEN"), "it passes clients' requests on with an hs_token that is not the configured one"),
        (refusal(500, "M_UNKNOWN"), "it cannot reach this service to pass clients' requests on"),
        (answered(502, b"<html>"), "it cannot reach this service to pass clients' requests on"),
        (answered(404, b"<html>"), "what it passes on is answered 404"),
        (answered(200, {}), "what it passes on is answered 200"),
        (answered(400, b"Bad Request"), "what it passes on is answered 400"),
        (refusal(400, "M_BAD_JSON"), "what it passes on is answered 400 M_BAD_JSON"),
        (refusal(401, "M_MISSING_TOKEN"), "what it passes on is answered 401 M_MISSING_TOKEN"),
        (refusal(403, "M_FORBIDDEN"), "what it passes on is answered 403 M_FORBIDDEN"),
        (HttpFailed(False, "no answer in time"), "it does not answer what it is to pass on to this service: no answer in time"),
    ],
)
async def test_requests_that_do_not_come_here(answer: HttpAnswer | HttpFailed, problem: str) -> None:
    """What is seen is said, and what to look at."""
    both = [answer] * 2 if answer in (UNRECOGNIZED, OTHER_METHOD) else [answer]
    findings, _ = await found(WHOAMI, NOBODY, MISSING, *both)
    assert findings.tried == set(Part)
    (defect,) = findings.defects
    assert (defect.part, defect.problem) == (Part.PROXY, problem)
    assert "registration" in defect.remedy


@pytest.mark.parametrize("answer", [answered(500, b""), answered(404, b""), UNRECOGNIZED, refusal(429, "M_LIMIT_EXCEEDED"), answered(302, b"")])
async def test_a_homeserver_that_does_not_answer_is_not_badly_set_up(answer: HttpAnswer) -> None:
    """What is wrong with it is told elsewhere, and nothing is found."""
    service, http = service_of(answer)
    assert not isinstance(await unanswered(asks_defects(service)), CannotTell)
    assert len(http.asked) == 1


@pytest.mark.parametrize("answer", [answered(200, b"<html>"), answered(502, b""), HttpFailed(False, "no answer in time")])
async def test_a_homeserver_that_fails_in_between(answer: HttpAnswer | HttpFailed) -> None:
    """Then nothing is known of it."""
    service, _ = service_of(WHOAMI, answer)
    await unanswered(asks_defects(service))


async def test_a_proxys_answer_tells_nothing_of_the_token() -> None:
    """Neither that it works, nor that it does not."""
    for answer in (answered(200, b"<html>"), answered(200, {}), answered(401, b"Unauthorized"), answered(403, b"<html>")):
        service, _ = service_of(answer)
        assert not isinstance(await unanswered(service.check(HOME, 5.0, passes_on=False)), CannotTell)


async def test_a_token_that_is_refused_otherwise_is_a_defect() -> None:
    """The homeserver has answered, so somebody has to hear of it."""
    service, _ = service_of(refusal(403, "M_USER_DEACTIVATED"))
    findings = await service.check(HOME, 5.0, passes_on=True)
    assert (findings.tried, [one.part for one in findings.defects]) == (frozenset({Part.TOKEN}), [Part.TOKEN])


@pytest.mark.parametrize("room_id", ["..", "x/../y", "!a/..", "%2e%2e", "\ud800"])
async def test_a_room_id_that_would_leave_its_place_in_the_path(room_id: str) -> None:
    """There is no such room, and nobody is asked."""
    service, http = service_of()
    assert isinstance(await unanswered(service.is_joined(HOME, ALICE, room_id, 5.0)), CannotBe)
    assert http.asked == []
