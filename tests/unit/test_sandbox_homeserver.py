"""The stand-in homeserver: delayed events that really run out, measured answers, the rate limit, and every fault, on a virtual clock."""

import json
from typing import Any
from urllib.parse import quote

import pytest
from sfu_delegate.sandbox.answer import Answer, Fate, json_answer, text_answer
from sfu_delegate.sandbox.homeserver import (
    ACTIONS,
    FED_PROXY,
    MSC4502,
    OPENID_VALIDITY,
    STABLE,
    UNSTABLE,
    USERINFO,
    V3,
    End,
    Errand,
    FedCall,
    HomeserverModel,
    MatrixError,
    NewState,
    RateLimit,
    is_proxied,
)

START = 1_800_000_000.0
ROOM = "!room:hs.test"
TYPE = "org.matrix.msc3401.call.member"
ALICE = "@alice:hs.test"
BOB = "@bob:elsewhere.test"
CLIENT_PATH = "/_matrix/client/unstable/org.matrix.msc4195/rtc/livekit/get_token"
FED_PATH = "/_matrix/federation/v1/rtc/livekit/get_token"
LEFT: dict[str, Any] = {"left": True}


def homeserver(**options: Any) -> HomeserverModel:
    return HomeserverModel(**{"limit": None, **options})


def scheduled(model: HomeserverModel, delay_ms: int = 20_000, at: float = START, user: str = ALICE, state_key: str | None = "alice") -> str:
    return model.schedule(user, ROOM, TYPE, state_key, delay_ms, LEFT, at)


def act(model: HomeserverModel, delay_id: str, action: str, now: float, **more: Any) -> Answer:
    return model.request("POST", f"{UNSTABLE}delayed_events/{delay_id}/{action}", now, body=b"{}", **more)


def errcode(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json()["errcode"]


def test_an_event_runs_out_at_its_deadline() -> None:
    """Nobody restarts it: it fires at its deadline, whenever the clock is looked at, and is then in the room's state."""
    model = homeserver()
    delay_id = scheduled(model)
    assert delay_id.startswith("syd_")
    assert len(delay_id) == 24
    assert model.next_event() == START + 20
    model.tick(START + 19.9)
    assert model.events[delay_id].end is End.PENDING
    model.tick(START + 100)
    event = model.events[delay_id]
    assert (event.end, event.ended_at, event.ended_by) == (End.RAN_OUT, START + 20, "timer")
    state = model.state[ROOM][TYPE, "alice"]
    assert (state.content, state.sender, state.at, state.delay_id) == (LEFT, ALICE, START + 20, delay_id)
    assert model.next_event() is None


def test_a_restart_begins_the_countdown_anew() -> None:
    """After a restart the full original delay runs again, and the log has the times of restarts."""
    model = homeserver()
    delay_id = scheduled(model)
    for at in (15.0, 30.0):
        assert act(model, delay_id, "restart", START + at).status == 200
    assert model.next_event() == START + 50
    model.tick(START + 49)
    assert model.events[delay_id].end is End.PENDING
    assert model.events[delay_id].restarted_at == [START + 15, START + 30]


def test_a_restart_that_comes_too_late_finds_nothing() -> None:
    """An event that ran out before the request came is 404, though nobody called `tick` in between."""
    model = homeserver()
    delay_id = scheduled(model)
    assert errcode(act(model, delay_id, "restart", START + 20)) == (404, "M_NOT_FOUND")
    assert model.events[delay_id].end is End.RAN_OUT


def test_events_fire_in_the_order_of_their_deadlines() -> None:
    """Many events, some restarted: each fires at its own time, in order."""
    model = homeserver()
    ids = [scheduled(model, 1000 * delay, state_key=str(delay)) for delay in (30, 10, 20)]
    act(model, ids[1], "restart", START + 5)
    times = []
    while (at := model.next_event()) is not None:
        times.append(at - START)
        model.tick(at)
    assert times == [15, 20, 30]


def test_send_and_cancel_end_it() -> None:
    """`send` puts the event into the room at once, `cancel` never; the log says when and by whom."""
    model = homeserver()
    sent, cancelled = scheduled(model), scheduled(model, state_key="bob")
    assert act(model, sent, "send", START + 1, ip="10.0.0.1").json() == {}
    assert act(model, cancelled, "cancel", START + 2).status == 200
    assert (model.events[sent].end, model.events[sent].ended_at, model.events[sent].ended_by) == (End.SENT, START + 1, "10.0.0.1")
    assert model.events[cancelled].end is End.CANCELLED
    assert set(model.state[ROOM]) == {(TYPE, "alice")}
    assert model.next_event() is None


@pytest.mark.parametrize("ended", ["send", "cancel", "runs out"])
@pytest.mark.parametrize("action", ACTIONS)
def test_synapse_forgets_finished_events(ended: str, action: str) -> None:
    """Whatever ended it, every action on it is `404 M_NOT_FOUND`."""
    model = homeserver()
    delay_id = scheduled(model)
    if ended != "runs out":
        act(model, delay_id, ended, START + 1)
    assert errcode(act(model, delay_id, action, START + 30)) == (404, "M_NOT_FOUND")


@pytest.mark.parametrize(
    ("ended", "action", "status"),
    [
        ("send", "send", 200),
        ("send", "restart", 409),
        ("send", "cancel", 409),
        ("runs out", "send", 200),
        ("runs out", "restart", 409),
        ("cancel", "cancel", 200),
        ("cancel", "send", 409),
        ("cancel", "restart", 409),
    ],
)
def test_the_proposal_remembers_finished_events(ended: str, action: str, status: int) -> None:
    """As the proposal has it: the same end again is 200, another one `409 M_UNKNOWN`, an unknown event 404."""
    model = homeserver(mode="proposal")
    delay_id = scheduled(model)
    if ended != "runs out":
        act(model, delay_id, ended, START + 1)
    answer = act(model, delay_id, action, START + 30)
    assert answer.status == status
    if status == 409:
        assert answer.json()["errcode"] == "M_UNKNOWN"
    assert errcode(act(model, "syd_unknown", action, START)) == (404, "M_NOT_FOUND")


@pytest.mark.parametrize(("mode", "end", "again"), [("synapse", End.DROPPED, 404), ("proposal", End.PENDING, 403)])
def test_an_event_that_may_not_be_sent(mode: str, end: End, again: int) -> None:
    """`403 M_FORBIDDEN`; Synapse drops the event all the same, the proposal keeps it scheduled."""
    model = homeserver(mode=mode)
    delay_id = scheduled(model)
    model.faults.forbid_send = True
    assert errcode(act(model, delay_id, "send", START + 1)) == (403, "M_FORBIDDEN")
    assert model.events[delay_id].end is end
    assert act(model, delay_id, "send", START + 2).status == again
    assert model.state == {}


def forms(model: HomeserverModel, delay_id: str, now: float, token: str | None) -> set[str]:
    """Which of the four forms of the management API work."""
    found = set()
    for generation, path in (("A", f"{STABLE}delayed_events/{delay_id}"), ("B", f"{UNSTABLE}delayed_events/{delay_id}")):
        answer = model.request("POST", path, now, token=token, body=b'{"action": "restart"}')
        found |= {generation} if answer.status == 200 else set()
        if answer.status != 200:
            assert errcode(answer) == (404, "M_UNRECOGNIZED")
    for generation, path in (("C", f"{UNSTABLE}delayed_events/{delay_id}/restart"), ("D", f"{STABLE}delayed_events/{delay_id}/restart")):
        answer = model.request("POST", path, now, token=token, body=b"{}")
        found |= {generation} if answer.status == 200 else set()
    return found


@pytest.mark.parametrize("generations", ["A", "B", "C", "D", "BC", "CD", "ABCD", ""])
def test_each_generation_has_its_form_and_no_other(generations: str) -> None:
    """Exactly the chosen forms work, others are `404 M_UNRECOGNIZED`, and `versions` tells which path to try."""
    model = homeserver(generations="ABCD")
    delay_id = scheduled(model)
    token = model.register("alice")
    model.generations = generations
    assert forms(model, delay_id, START + 1, token) == set(generations)
    features = model.request("GET", "/_matrix/client/versions", START).json()["unstable_features"]
    assert features["org.matrix.msc4140"] == bool(set(generations) & set("ABC"))
    assert features["org.matrix.msc4140.stable"] == bool(set(generations) & set("AD"))


def test_some_servers_say_405() -> None:
    """The status of what is not recognized can be 405."""
    model = homeserver(generations="B")
    model.unrecognized_status = 405
    assert errcode(act(model, scheduled(model), "restart", START)) == (405, "M_UNRECOGNIZED")


@pytest.mark.parametrize("generation", ["A", "B"])
def test_the_older_forms_can_need_a_token(generation: str) -> None:
    """Without a token: `401 M_MISSING_TOKEN`; with the owner's, or a scoped one for this event: 200; with a scoped one for another event: 403."""
    model = homeserver(generations=generation)
    model.b_needs_token = True
    delay_id = scheduled(model)
    path = f"{STABLE if generation == 'A' else UNSTABLE}delayed_events/{delay_id}"

    def restart(token: str | None) -> Answer:
        return model.request("POST", path, START + 1, token=token, body=b'{"action":"restart"}')

    assert errcode(restart(None)) == (401, "M_MISSING_TOKEN")
    assert errcode(restart("stranger")) == (401, "M_UNKNOWN_TOKEN")
    assert restart(model.register("alice")).status == 200
    assert restart(model.scoped_token(ALICE, delay_id)).status == 200
    assert errcode(restart(model.scoped_token(ALICE, "syd_other"))) == (403, "M_FORBIDDEN")


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"{", (400, "M_NOT_JSON")), (b"[]", (400, "M_BAD_JSON")), (b"{}", (400, "M_MISSING_PARAM")), (b'{"action":"burn"}', (400, "M_INVALID_PARAM"))],
)
def test_a_bad_body_is_refused(body: bytes, expected: tuple[int, str]) -> None:
    """No JSON, no object, no action, no known action: 400."""
    model = homeserver()
    assert errcode(model.request("POST", f"{UNSTABLE}delayed_events/{scheduled(model)}", START, body=body)) == expected


def test_whoami_tells_full_tokens_from_scoped_ones() -> None:
    """A user's token and an `as_token` with `user_id` are somebody; a scoped, an unknown and a missing token are nobody."""
    model = homeserver()

    def whoami(token: str | None, **query: str) -> Answer:
        return model.request("GET", "/_matrix/client/v3/account/whoami", START, token=token, query=query)

    assert whoami(model.register("alice")).json()["user_id"] == ALICE
    assert whoami(model.application_service(), user_id="@bob:hs.test").json()["user_id"] == "@bob:hs.test"
    assert errcode(whoami(model.scoped_token(ALICE, "syd_x"))) == (401, "M_UNKNOWN_TOKEN")
    assert errcode(whoami("unknown")) == (401, "M_UNKNOWN_TOKEN")
    assert errcode(whoami(None)) == (401, "M_MISSING_TOKEN")


def test_burst_and_rate_are_those_of_synapse() -> None:
    """Five at once, then one a second; refused ones do not fill the bucket, are held back half a second, and say how long to wait."""
    model = homeserver(limit=RateLimit(1, 5))
    delay_id = scheduled(model, 3_600_000)
    assert [act(model, delay_id, "restart", START).status for _ in range(8)] == [200] * 5 + [429] * 3
    refused = act(model, delay_id, "restart", START + 0.25)
    assert errcode(refused) == (429, "M_LIMIT_EXCEEDED")
    assert (refused.headers["Retry-After"], refused.json()["retry_after_ms"], refused.delay) == ("1", 750, 0.5)
    assert [act(model, delay_id, "restart", START + at).status for at in (1.0, 1.5, 2.0, 3.0, 3.9)] == [200, 429, 200, 200, 429]


def test_a_busy_loop_gets_exactly_the_rate() -> None:
    """Asked every 10 ms for a minute, 5 + 60 are allowed."""
    model = homeserver(limit=RateLimit(1, 5))
    delay_id = scheduled(model, 3_600_000)
    allowed = sum(act(model, delay_id, "restart", START + step / 100).status == 200 for step in range(6001))
    assert allowed == 65


def test_a_bucket_belongs_to_an_address_or_a_user() -> None:
    """Without a token the address is charged, with one the user; each has its own bucket."""
    model = homeserver(limit=RateLimit(1, 1))
    delay_id = scheduled(model)
    alice, bob = model.register("alice"), model.register("bob")
    same_user = model.scoped_token(ALICE, delay_id)
    callers: list[dict[str, Any]] = [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}, {"token": alice}, {"token": bob}]
    for caller in callers:
        assert act(model, delay_id, "restart", START, **caller).status == 200
    for caller in [*callers, {"token": same_user, "ip": "10.0.0.9"}]:
        assert act(model, delay_id, "restart", START, **caller).status == 429


def test_application_services_can_be_exempt() -> None:
    """With `rate_limited: false` nobody is limited; with `rate_limited: true` the asserted user is."""
    model = homeserver(limit=RateLimit(1, 1))
    delay_id = scheduled(model)
    free, limited = model.application_service(), model.application_service(rate_limited=True)
    assert [act(model, delay_id, "restart", START, token=free, query={"user_id": ALICE}).status for _ in range(8)] == [200] * 8
    assert [act(model, delay_id, "restart", START, token=limited, query={"user_id": ALICE}).status for _ in range(2)] == [200, 429]


def test_the_limit_can_be_lifted_and_tightened_while_running() -> None:
    """A new limit holds from the next request on."""
    model = homeserver(limit=RateLimit(1, 5))
    delay_id = scheduled(model, 3_600_000)
    assert [act(model, delay_id, "restart", START).status for _ in range(6)][-1] == 429
    model.limit = None
    assert act(model, delay_id, "restart", START).status == 200
    model.limit = RateLimit(0.1, 1)
    assert [act(model, delay_id, "restart", START + at).status for at in (60.0, 65.0, 70.0)] == [200, 429, 200]


@pytest.mark.parametrize(("header", "in_body"), [("0", 0), ("3600", 3_600_000), ("-5", -5000), ("soon", "later"), ("", "")])
def test_retry_after_can_be_nonsense(header: str, in_body: Any) -> None:
    """The header and the field of a 429 can be set to anything, or left out."""
    model = homeserver(limit=RateLimit(1, 1))
    delay_id = scheduled(model)
    model.faults.retry_after, model.faults.retry_after_ms = header, in_body
    act(model, delay_id, "restart", START)
    answer = act(model, delay_id, "restart", START)
    assert answer.headers.get("Retry-After", "") == header
    assert answer.json().get("retry_after_ms", "") == in_body


def test_a_client_schedules_by_http() -> None:
    """`PUT …/state/…?org.matrix.msc4140.delay=` answers a delay_id; names are percent-decoded; without the delay the state is set at once."""
    model = homeserver()
    token = model.register("alice")
    path = "/_matrix/client/v3/rooms/%21room%3Ahs.test/state/org.matrix.msc3401.call.member/_%40alice%2F1"
    set_at_once = model.request("PUT", path, START, token=token, body=b'{"in": "call"}')
    assert set_at_once.json()["event_id"].startswith("$")
    delay_id = model.request("PUT", path, START, token=token, query={"org.matrix.msc4140.delay": "20000"}, body=b"{}").json()["delay_id"]
    assert model.request("GET", path, START + 19, token=token).json() == {"in": "call"}
    assert model.request("GET", path, START + 20, token=token).json() == {}
    (event,) = model.request("GET", "/_matrix/client/v3/rooms/%21room%3Ahs.test/state", START + 20, token=token).json()
    assert (event["state_key"], event["sender"], event["origin_server_ts"]) == ("_@alice/1", ALICE, round((START + 20) * 1000))
    assert model.events[delay_id].room == ROOM


def test_a_message_can_be_delayed_too() -> None:
    """`PUT …/send/…` with a delay puts the event into the timeline when it runs out."""
    model = homeserver()
    path = f"/_matrix/client/v3/rooms/{ROOM}/send/m.room.message/1"
    model.request("PUT", path, START, token=model.register("alice"), query={"org.matrix.msc4140.delay": "1000"}, body=b'{"body":"bye"}')
    model.tick(START + 2)
    assert model.timeline[ROOM] == [(START + 1, ALICE, "m.room.message", {"body": "bye"})]


@pytest.mark.parametrize(
    ("delay", "expected"),
    [("86400001", "ORG.MATRIX.MSC4140_DELAY_TOO_LARGE"), ("-1", "M_INVALID_PARAM"), ("soon", "M_INVALID_PARAM")],
)
def test_impossible_delays_are_refused(delay: str, expected: str) -> None:
    """Over the maximum, negative, or no number: 400."""
    model = homeserver()
    path = f"/_matrix/client/v3/rooms/{ROOM}/state/{TYPE}/alice"
    answer = model.request("PUT", path, START, token=model.register("alice"), query={"org.matrix.msc4140.delay": delay}, body=b"{}")
    assert errcode(answer) == (400, expected)
    assert model.events == {}


def test_a_user_may_have_so_many() -> None:
    """One more than `max_scheduled` is refused; an ended one makes room."""
    model = homeserver(max_scheduled=2)
    first, _ = scheduled(model), scheduled(model)
    with pytest.raises(MatrixError):
        scheduled(model)
    act(model, first, "cancel", START)
    scheduled(model)


def test_newer_state_cancels_the_delayed_events_of_others_only() -> None:
    """A user's own newer state event leaves that user's older delayed leave alone; another user's cancels it."""
    model = homeserver()
    delay_id = scheduled(model)
    model.put_state(ALICE, ROOM, TYPE, "alice", {}, START + 1)
    assert model.events[delay_id].end is End.PENDING
    model.put_state("@bob:hs.test", ROOM, TYPE, "alice", {}, START + 2)
    assert model.events[delay_id].end is End.CANCELLED


def test_the_owner_reads_delayed_events() -> None:
    """One event has the measured fields, the list the older names as well; others, and no token, get nothing."""
    model = homeserver()
    delay_id = scheduled(model)
    act(model, delay_id, "restart", START + 5)
    alice, bob = model.register("alice"), model.register("bob")
    one = model.request("GET", f"{UNSTABLE}delayed_events/{delay_id}", START + 6, token=alice).json()
    expected = {
        "delay_id": delay_id,
        "room_id": ROOM,
        "type": TYPE,
        "state_key": "alice",
        "delay_ms": 20_000,
        "delayed_since_ts": round((START + 5) * 1000),
        "content": LEFT,
    }
    assert one == expected
    listed = model.request("GET", f"{UNSTABLE}delayed_events", START + 6, token=alice).json()["delayed_events"]
    assert listed == [expected | {"delay": 20_000, "running_since": round((START + 5) * 1000)}]
    service = model.application_service()
    assert model.request("GET", f"{UNSTABLE}delayed_events/{delay_id}", START + 6, token=service, query={"user_id": ALICE}).json() == expected
    assert errcode(model.request("GET", f"{UNSTABLE}delayed_events/{delay_id}", START + 6, token=bob)) == (404, "M_NOT_FOUND")
    assert errcode(model.request("GET", f"{UNSTABLE}delayed_events/{delay_id}", START + 6)) == (401, "M_MISSING_TOKEN")


def test_discovery_and_capabilities() -> None:
    """`.well-known` names the base URL; capabilities have the limits, if there are delayed events at all."""
    model = homeserver(base_url="https://matrix.hs.test")
    assert model.request("GET", "/.well-known/matrix/client", START).json() == {"m.homeserver": {"base_url": "https://matrix.hs.test"}}
    capabilities = model.request("GET", "/_matrix/client/v3/capabilities", START, token=model.register("alice")).json()["capabilities"]
    assert capabilities["org.matrix.msc4140.delayed_events"] == {"max_delay_ms": 86_400_000, "max_scheduled": 100}
    assert errcode(model.request("GET", "/_matrix/client/v3/sync", START)) == (404, "M_UNRECOGNIZED")


@pytest.mark.parametrize(
    ("fault", "fate", "status"),
    [
        ({"down": True}, Fate.REFUSE, 0),
        ({"hang": True}, Fate.HANG, 0),
        ({"close": True}, Fate.CLOSE, 0),
        ({"status": 502}, Fate.ANSWER, 502),
        ({"html": 403}, Fate.ANSWER, 403),
        ({"garbage": True}, Fate.ANSWER, 200),
        ({"redirect": "http://elsewhere/"}, Fate.ANSWER, 302),
    ],
)
def test_faults_that_keep_a_request_from_being_carried_out(fault: dict[str, Any], fate: Fate, status: int) -> None:
    """Nothing is sent, and the fault is what comes back; afterwards all is as before."""
    model = homeserver()
    delay_id = scheduled(model)
    for name, value in fault.items():
        setattr(model.faults, name, value)
    answer = act(model, delay_id, "send", START + 1)
    assert (answer.fate, answer.status) == (fate, status)
    assert model.events[delay_id].end is End.PENDING
    if "garbage" in fault or "html" in fault:
        with pytest.raises(ValueError, match=r"."):
            json.loads(answer.body)
    for name, value in fault.items():
        setattr(model.faults, name, type(value)() if isinstance(value, bool) else None)
    assert act(model, delay_id, "send", START + 2).status == 200


@pytest.mark.parametrize(("fault", "fate"), [("done_but_not_told", Fate.CLOSE), ("done_and_hangs", Fate.HANG)])
def test_done_but_not_told(fault: str, fate: Fate) -> None:
    """The event is sent although the answer is lost; asked again, Synapse says 404."""
    model = homeserver()
    delay_id = scheduled(model)
    setattr(model.faults, fault, True)
    assert act(model, delay_id, "send", START + 1).fate is fate
    assert model.events[delay_id].end is End.SENT
    setattr(model.faults, fault, False)
    assert act(model, delay_id, "send", START + 2).status == 404


def test_faults_can_be_limited_to_kinds_and_to_chance() -> None:
    """`only` spares other kinds of request, and `probability` some of them."""
    model = homeserver()
    delay_id = scheduled(model, 3_600_000)
    model.faults.status, model.faults.only = 500, frozenset({"restart"})
    assert act(model, delay_id, "restart", START).status == 500
    assert model.request("POST", f"{UNSTABLE}delayed_events/{delay_id}", START, body=b'{"action":"restart"}').status == 500
    assert model.request("GET", "/_matrix/client/versions", START).status == 200
    model.faults.probability = 0.5
    statuses = [act(model, delay_id, "restart", START).status for _ in range(200)]
    assert 60 < statuses.count(500) < 140


def test_latency_by_kind_of_request() -> None:
    """Each kind can have its own latency, in seconds, and comes late without changing what is true."""
    model = homeserver()
    delay_id = scheduled(model)
    model.faults.latency = {"send": 0.035, "*": 0.002}
    assert act(model, delay_id, "restart", START).delay == 0.002
    assert act(model, delay_id, "send", START).delay == 0.035
    assert model.events[delay_id].ended_at == START


def test_secrets_are_not_in_the_representation() -> None:
    """A delayed event can be printed without giving its delay_id away."""
    model = homeserver()
    delay_id = scheduled(model)
    assert delay_id not in repr(model.events[delay_id])


def whose(model: HomeserverModel, token: str, now: float = START) -> Answer:
    return model.request("GET", USERINFO, now, query={"access_token": token})


def request_openid(model: HomeserverModel, user: str, *, token: str | None, body: bytes = b"{}") -> Answer:
    return model.request("POST", f"{V3}user/{user}/openid/request_token", START, token=token, body=body)


def test_an_openid_token_names_its_owner_until_it_expires() -> None:
    """As Synapse answers: a new token for each request, good for an hour, and whoever has it may ask whose it is."""
    model = homeserver()
    access = model.register("alice")
    given = [request_openid(model, user, token=access).json() for user in (ALICE, "%40alice%3Ahs.test")]
    for body in given:
        assert body == {"access_token": body["access_token"], "token_type": "Bearer", "matrix_server_name": "hs.test", "expires_in": 3600}
        assert whose(model, body["access_token"]).json() == {"sub": ALICE}
        assert whose(model, body["access_token"], START + OPENID_VALIDITY).status == 200
        assert errcode(whose(model, body["access_token"], START + OPENID_VALIDITY + 0.1)) == (401, "M_UNKNOWN_TOKEN")
    assert given[0]["access_token"] != given[1]["access_token"]


def test_openid_tokens_are_for_oneself_only() -> None:
    """Nobody gets one for somebody else or without logging in, and what is no JSON is refused."""
    model = homeserver()
    access = model.register("alice")
    assert errcode(request_openid(model, "@bob:hs.test", token=access)) == (403, "M_FORBIDDEN")
    assert errcode(request_openid(model, ALICE, token=None)) == (401, "M_MISSING_TOKEN")
    assert errcode(request_openid(model, ALICE, token="another")) == (401, "M_UNKNOWN_TOKEN")
    assert errcode(request_openid(model, ALICE, token=access, body=b"{")) == (400, "M_NOT_JSON")


def test_an_openid_token_is_no_access_token_and_the_other_way_round() -> None:
    """It vouches for a user and opens nothing; an access token is unknown where OpenID tokens are asked about."""
    model = homeserver()
    access = model.register("alice")
    openid = model.openid_token(ALICE, START)["access_token"]
    assert model.request("GET", f"{V3}account/whoami", START, token=openid).status == 401
    assert errcode(whose(model, access)) == (401, "M_UNKNOWN_TOKEN")
    assert errcode(model.request("GET", USERINFO, START)) == (401, "M_MISSING_TOKEN")


def test_a_lying_server_vouches_for_anybody() -> None:
    """With `openid_sub` every token is said to be that user's, also one that was never issued."""
    model = homeserver()
    token = model.openid_token(ALICE, START)["access_token"]
    model.openid_sub = "@carol:elsewhere.test"
    assert whose(model, token).json() == whose(model, "made up").json() == {"sub": "@carol:elsewhere.test"}


def test_openid_requests_are_counted_and_fail_by_themselves() -> None:
    """Two kinds of their own: a fault can hit the check alone, and nothing else."""
    model = homeserver()
    access = model.register("alice")
    model.faults.status = 502
    model.faults.only = frozenset({"openid_userinfo"})
    token = request_openid(model, ALICE, token=access).json()["access_token"]
    assert whose(model, token).status == 502
    model.faults.status = None
    assert whose(model, token).status == 200
    assert model.answers == {("openid_token", 200): 1, ("openid_userinfo", 502): 1, ("openid_userinfo", 200): 1}


def test_every_state_event_is_seen_when_it_becomes_current() -> None:
    """Whoever put it there: a user, a management request, or a countdown, each with its own time."""
    seen: list[NewState] = []
    model = homeserver(on_state=seen.append)
    model.put_state(ALICE, ROOM, TYPE, "alice", {"in": True}, START)
    sent, ran_out = scheduled(model), scheduled(model)
    act(model, sent, "send", START + 1)
    model.tick(START + 60)
    assert [(new.room, new.type, new.state_key) for new in seen] == [(ROOM, TYPE, "alice")] * 3
    assert [(new.event.at - START, new.event.content, new.event.delay_id) for new in seen] == [
        (0, {"in": True}, ""),
        (1, LEFT, sent),
        (20, LEFT, ran_out),
    ]


def test_an_application_service_speaks_for_users_in_its_namespace_only() -> None:
    """As Synapse: for itself and for this server's users in its namespace, wherever it asserts one; it has no device. Everybody else is 403."""
    model = homeserver()
    delay_id = scheduled(model)
    event = f"{UNSTABLE}delayed_events/{delay_id}"

    def ask(method: str, path: str, token: str, user: str) -> Answer:
        return model.request(method, path, START, token=token, query={"user_id": user}, body=b"{}")

    whoami = f"{V3}account/whoami"
    anybody, few = model.application_service(), model.application_service(users=r"@(alice|carol):.*")
    assert ask("GET", whoami, anybody, ALICE).json() == {"user_id": ALICE, "is_guest": False}
    sender = model.request("GET", whoami, START, token=few).json()
    assert sender == {"user_id": "@sandbox-service:hs.test", "is_guest": False}
    assert ask("GET", whoami, few, sender["user_id"]).json() == sender
    assert "device_id" in model.request("GET", whoami, START, token=model.register("alice")).json()
    for token, user in ((anybody, BOB), (anybody, ""), (few, "@bob:hs.test"), (few, "@carol:elsewhere.test")):
        for method, path in (("GET", whoami), ("GET", event), ("GET", f"{UNSTABLE}delayed_events"), ("POST", f"{event}/restart")):
            assert errcode(ask(method, path, token, user)) == (403, "M_FORBIDDEN")
    assert "masquerade" in ask("GET", whoami, few, "@bob:hs.test").json()["error"]
    assert "not registered" in ask("GET", whoami, few, "@carol:elsewhere.test").json()["error"]
    assert model.events[delay_id].restarted_at == []
    assert ask("POST", f"{event}/restart", few, ALICE).status == 200


def asked_who_is_joined(model: HomeserverModel, token: str | None, room: str = ROOM, method: str = "GET", **query: str) -> Answer:
    return model.request(method, f"{MSC4502}rooms/{quote(room, safe='')}/is_joined", START, token=token, query=query)


def test_a_room_knows_who_is_joined() -> None:
    """Whoever joined and has not left, of any server; as state events that everybody sees; nobody where it was never said."""
    seen: list[NewState] = []
    model = homeserver(on_state=seen.append)
    assert not model.is_joined(ALICE, ROOM)
    for user in (ALICE, BOB):
        model.join(user, ROOM, START)
    model.leave(BOB, ROOM, START + 1)
    assert (model.is_joined(ALICE, ROOM), model.is_joined(BOB, ROOM), model.is_joined(ALICE, "!other:hs.test")) == (True, False, False)
    assert [(new.type, new.state_key, new.event.content["membership"], new.event.at - START) for new in seen] == [
        ("m.room.member", ALICE, "join", 0),
        ("m.room.member", BOB, "join", 0),
        ("m.room.member", BOB, "leave", 1),
    ]
    ban = model.request(
        "PUT", f"{V3}rooms/{ROOM}/state/m.room.member/{ALICE}", START + 2, token=model.register("admin"), body=b'{"membership": "ban"}'
    )
    assert ban.status == 200
    assert not model.is_joined(ALICE, ROOM)


def test_an_application_service_asks_who_is_joined() -> None:
    """A user by `mxid`, anybody of a server by `server_name`; both are told of the room as it is, also of one that nobody knows."""
    model = homeserver()
    service = model.application_service()
    model.join(ALICE, ROOM, START)
    model.join(BOB, ROOM, START)
    model.leave(ALICE, ROOM, START)

    def joined(room: str = ROOM, **query: str) -> bool:
        answer = asked_who_is_joined(model, service, room, **query)
        assert answer.status == 200
        assert set(answer.json()) == {"joined"}
        return bool(answer.json()["joined"])

    assert [joined(mxid=user) for user in (ALICE, BOB, "@carol:hs.test")] == [False, True, False]
    assert [joined(server_name=server) for server in ("hs.test", "elsewhere.test", "[::1]:8448")] == [False, True, False]
    assert not joined("!" + "A" * 43, mxid=BOB)
    assert joined(mxid=BOB, user_id="@carol:hs.test")
    assert model.answers == {("is_joined", 200): 8}


def test_who_may_not_ask_who_is_joined() -> None:
    """No token, an unknown one, a user's, one without the scope, one for a stranger to the namespace; and nobody where the server has it not."""
    model = homeserver()
    service = model.application_service()
    assert errcode(asked_who_is_joined(model, None, mxid=ALICE)) == (401, "M_MISSING_TOKEN")
    assert errcode(asked_who_is_joined(model, "unknown", mxid=ALICE)) == (401, "M_UNKNOWN_TOKEN")
    assert errcode(asked_who_is_joined(model, model.register("alice"), mxid=ALICE)) == (403, "M_FORBIDDEN")
    assert errcode(asked_who_is_joined(model, model.application_service(scopes=False), mxid=ALICE)) == (403, "M_FORBIDDEN")
    assert errcode(asked_who_is_joined(model, service, mxid=ALICE, user_id=BOB)) == (403, "M_FORBIDDEN")
    assert errcode(asked_who_is_joined(model, service, method="POST", mxid=ALICE)) == (405, "M_UNRECOGNIZED")
    model.msc4502 = False
    assert errcode(asked_who_is_joined(model, service, mxid=ALICE)) == (404, "M_UNRECOGNIZED")


@pytest.mark.parametrize(
    ("room", "query", "expected"),
    [
        (ROOM, {}, "M_MISSING_PARAM"),
        (ROOM, {"mxid": ALICE, "server_name": "hs.test"}, "M_MISSING_PARAM"),
        (ROOM, {"mxid": "alice"}, "M_INVALID_PARAM"),
        (ROOM, {"mxid": ""}, "M_INVALID_PARAM"),
        (ROOM, {"mxid": "@alice:hs_test"}, "M_INVALID_PARAM"),
        (ROOM, {"server_name": "hs test"}, "M_INVALID_PARAM"),
        (ROOM, {"server_name": "hs.test:"}, "M_INVALID_PARAM"),
        ("room", {"mxid": ALICE}, "M_INVALID_PARAM"),
        ("!short", {"mxid": ALICE}, "M_INVALID_PARAM"),
        ("#room:hs.test", {}, "M_INVALID_PARAM"),
    ],
)
def test_impossible_questions_about_membership(room: str, query: dict[str, str], expected: str) -> None:
    """Not exactly one of the two parameters, or something that is no ID, is 400; the room is looked at first."""
    model = homeserver()
    assert errcode(asked_who_is_joined(model, model.application_service(), room, **query)) == (400, expected)


def test_who_is_not_joined_may_not_send() -> None:
    """Where membership was said, state, messages and delayed events of others are 403; the events are dropped as Synapse does. Elsewhere all may."""
    model = homeserver()
    token = model.register("alice")
    model.join(ALICE, ROOM, START)
    sent, ran_out, kept = (scheduled(model, 20_000, state_key=key) for key in "abc")
    assert act(model, sent, "send", START).status == 200
    model.leave(ALICE, ROOM, START + 1)
    for path in (f"state/{TYPE}/alice", "send/m.room.message/1"):
        answer = model.request("PUT", f"{V3}rooms/{ROOM}/{path}", START + 2, token=token, body=b"{}")
        assert errcode(answer) == (403, "M_FORBIDDEN")
        assert model.request("PUT", f"{V3}rooms/!other:hs.test/{path}", START + 2, token=token, body=b"{}").status == 200
    later = scheduled(model, at=START + 2, state_key="d")
    assert errcode(act(model, later, "send", START + 3)) == (403, "M_FORBIDDEN")
    assert act(model, kept, "restart", START + 10).status == 200
    model.tick(START + 20)
    assert [model.events[delay_id].end for delay_id in (sent, ran_out, kept, later)] == [End.SENT, End.DROPPED, End.PENDING, End.DROPPED]
    model.join(ALICE, ROOM, START + 25)
    model.tick(START + 30)
    assert model.events[kept].end is End.RAN_OUT
    assert {state_key for type_, state_key in model.state[ROOM] if type_ == TYPE} == {"a", "c"}
    assert ROOM not in model.timeline


def fed_proxy(
    model: HomeserverModel, token: str | None, changes: dict[str, Any] | None = None, *, method: str = "POST", raw: bytes | None = None
) -> Answer:
    content = {"destination": "elsewhere.test", "method": "POST", "path": FED_PATH, "body": {"room": 1}} | (changes or {})
    return model.request(method, FED_PROXY, START, token=token, body=json.dumps(content).encode() if raw is None else raw)


def test_another_server_is_asked_for_an_application_service() -> None:
    """Its status and JSON come back as 200, a success of whatever kind as 200 and a missing body as an empty one, and the call is on record."""
    asked: list[tuple[str, Any]] = []
    answers: list[tuple[int, Any]] = [(201, {"jwt": "x"}), (403, {"errcode": "M_FORBIDDEN"}), (502, None)]
    model = homeserver()
    service = model.application_service()

    def elsewhere(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked.append((path, body))
        return answers[len(asked) - 1]

    model.remotes["elsewhere.test"] = elsewhere
    told = [fed_proxy(model, service), fed_proxy(model, service, {"query": {"a": "b"}}), fed_proxy(model, service)]
    assert [answer.status for answer in told] == [200] * 3
    assert [answer.json() for answer in told] == [
        {"status": 200, "content": {"jwt": "x"}},
        {"status": 403, "content": {"errcode": "M_FORBIDDEN"}},
        {"status": 502, "content": None},
    ]
    assert asked == [(FED_PATH, {"room": 1})] * 3
    assert model.fed_calls[1] == FedCall(START, "elsewhere.test", "POST", FED_PATH, {"a": "b"}, {"room": 1})
    answers.append((200, {}))
    assert fed_proxy(model, service, {"method": "GET", "body": None}).status == 200
    assert asked[-1] == (FED_PATH, {})
    assert model.fed_calls[-1].body is None
    assert model.answers == {("fed_proxy", 200): 4}


def test_who_may_not_have_other_servers_asked() -> None:
    """Users, also with the right body, strangers, and nobody where the server has it not; nothing is on record."""
    model = homeserver()
    model.remotes["elsewhere.test"] = lambda path, body: (200, {})
    service = model.application_service()
    assert errcode(fed_proxy(model, None)) == (401, "M_MISSING_TOKEN")
    assert errcode(fed_proxy(model, "unknown")) == (401, "M_UNKNOWN_TOKEN")
    assert errcode(fed_proxy(model, model.register("alice"))) == (403, "M_FORBIDDEN")
    assert errcode(fed_proxy(model, service, method="GET")) == (405, "M_UNRECOGNIZED")
    model.msc4512 = False
    assert errcode(fed_proxy(model, service)) == (404, "M_UNRECOGNIZED")
    assert errcode(fed_proxy(model, service, method="GET")) == (404, "M_UNRECOGNIZED")
    assert model.fed_calls == []


NOT_ALLOWED = (403, "IO.ELEMENT.MSC4512.M_FEDPROXY_PATH_NOT_ALLOWED")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"destination": ""}, (400, "M_MISSING_PARAM")),
        ({"destination": 1}, (400, "M_MISSING_PARAM")),
        ({"method": "PATCH"}, (400, "M_INVALID_PARAM")),
        ({"path": ""}, (400, "M_MISSING_PARAM")),
        ({"body": []}, (400, "M_INVALID_PARAM")),
        ({"method": "GET"}, (400, "M_INVALID_PARAM")),
        ({"query": []}, (400, "M_INVALID_PARAM")),
        ({"query": {"a": 1}}, (400, "M_INVALID_PARAM")),
        ({"path": "/_matrix/federation/v1/version"}, NOT_ALLOWED),
        ({"path": "/_matrix/client/v1/rtc/livekit/get_token"}, NOT_ALLOWED),
        ({"path": "/_matrix/federation/v1/rtc/livekitten"}, NOT_ALLOWED),
        ({"path": FED_PATH + "/../../../version"}, NOT_ALLOWED),
        ({"path": FED_PATH + "/%2e%2E/x"}, NOT_ALLOWED),
        ({"path": FED_PATH + "?a=b"}, NOT_ALLOWED),
        ({"path": FED_PATH + "#a"}, NOT_ALLOWED),
        ({"path": FED_PATH + "?a=b", "destination": "hs.test"}, NOT_ALLOWED),
        ({"destination": "hs.test"}, (403, "IO.ELEMENT.MSC4512.M_FEDPROXY_DESTINATION_DENIED")),
        ({"destination": "nowhere.test"}, (502, "IO.ELEMENT.MSC4512.M_FEDPROXY_CONNECTION_FAILED")),
    ],
)
def test_what_other_servers_may_not_be_asked(changes: dict[str, Any], expected: tuple[int, str]) -> None:
    """Each check has its own error, and the server that could answer hears nothing."""
    model = homeserver()
    asked: list[str] = []

    def elsewhere(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked.append(path)
        return 200, {}

    model.remotes["elsewhere.test"] = model.remotes["hs.test"] = elsewhere
    assert errcode(fed_proxy(model, model.application_service(), changes)) == expected
    assert asked == []


def test_a_success_without_json_is_no_answer() -> None:
    """As Synapse: 502, as if the server could not be reached; an error without JSON has no content. A body that is no object is 400."""
    model = homeserver()
    service = model.application_service()
    model.remotes["elsewhere.test"] = lambda path, body: (200, None)
    assert errcode(fed_proxy(model, service)) == (502, "IO.ELEMENT.MSC4512.M_FEDPROXY_CONNECTION_FAILED")
    assert errcode(fed_proxy(model, service, raw=b"{")) == (400, "M_NOT_JSON")
    assert errcode(fed_proxy(model, service, raw=b"[]")) == (400, "M_BAD_JSON")
    content = {"destination": "elsewhere.test", "method": "POST", "path": FED_PATH}
    for answer, expected in (
        (text_answer(200, "{}"), 502),
        (text_answer(500, "broken"), {"status": 500, "content": None}),
        (json_answer(302, {}), {"status": 302, "content": {}}),
        (None, 502),
    ):
        errand = model.receive("POST", FED_PROXY, START, token=service, body=json.dumps(content).encode())
        assert isinstance(errand, Errand)
        told = model.relay(errand, answer)
        assert (told.json() if told.status == 200 else told.status) == expected


def proxied(model: HomeserverModel, path: str = CLIENT_PATH, method: str = "POST", body: bytes = b"{}", **more: Any) -> Answer | Errand:
    return model.receive(method, path, START, body=body, **more)


def asker(told: Answer | Errand) -> dict[str, str]:
    assert isinstance(told, Errand)
    return dict(told.asker)


def refusal(told: Answer | Errand) -> tuple[int, str]:
    assert isinstance(told, Answer)
    return errcode(told)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (CLIENT_PATH, True),
        (FED_PATH, True),
        ("/_matrix/client/v1/rtc/livekit", True),
        ("/_matrix/federation/unstable/x/rtc/livekit/a/b%2Fc", True),
        ("/_matrix/client/rtc/livekit/get_token", False),
        ("/_matrix/client/unstable/rtc/livekit/get_token", False),
        ("/_matrix/client/v1/rtc/livekitten", False),
        ("/_matrix/client/v1/rtc/transports", False),
        ("/x/_matrix/client/v1/rtc/livekit", False),
    ],
)
def test_which_requests_an_application_service_answers(path: str, expected: bool) -> None:
    """Those below `rtc/livekit` of a version, or of an unstable prefix, in both APIs, and no other."""
    assert is_proxied(path) is expected
    model = homeserver()
    model.request("GET", path, START)
    assert model.answers == {("proxied" if expected else "other", 404): 1}


def test_the_homeserver_says_who_asks() -> None:
    """The user of the token, or whom an application service speaks for; by federation the server."""
    model = homeserver()
    service = model.application_service()
    assert asker(proxied(model, token=model.register("alice"))) == {"X-Matrix-User-Identifier": ALICE}
    assert asker(proxied(model, token=service)) == {"X-Matrix-User-Identifier": "@sandbox-service:hs.test"}
    assert asker(proxied(model, token=service, query={"user_id": ALICE})) == {"X-Matrix-User-Identifier": ALICE}
    assert asker(proxied(model, FED_PATH, origin="elsewhere.test")) == {"X-Matrix-Origin": "elsewhere.test"}
    assert asker(proxied(model, FED_PATH, "GET", b"", origin="elsewhere.test")) == {"X-Matrix-Origin": "elsewhere.test"}
    assert model.answers == {}


def test_who_is_not_let_through_to_the_application_service() -> None:
    """As Synapse: wrong tokens, asserting a stranger, dots in the path, another method, a federation request without origin or JSON, the switch."""
    model = homeserver()
    token = model.register("alice")
    assert refusal(proxied(model)) == (401, "M_MISSING_TOKEN")
    assert refusal(proxied(model, origin="elsewhere.test")) == (401, "M_MISSING_TOKEN")
    assert refusal(proxied(model, token="unknown")) == (401, "M_UNKNOWN_TOKEN")
    assert refusal(proxied(model, token=model.scoped_token(ALICE, "syd_x"))) == (401, "M_UNKNOWN_TOKEN")
    assert refusal(proxied(model, token=model.application_service(), query={"user_id": BOB})) == (403, "M_FORBIDDEN")
    assert refusal(proxied(model, CLIENT_PATH + "/%2e%2e/x", token=token)) == (400, "M_INVALID_PARAM")
    assert refusal(proxied(model, method="PATCH", token=token)) == (405, "M_UNRECOGNIZED")
    assert refusal(proxied(model, FED_PATH, token=token)) == (401, "M_UNAUTHORIZED")
    assert refusal(proxied(model, FED_PATH, body=b"", origin="elsewhere.test")) == (400, "M_NOT_JSON")
    model.msc4512 = False
    assert refusal(proxied(model, token=token)) == (404, "M_UNRECOGNIZED")
    assert sum(model.answers.values()) == 10
    assert {kind for kind, _ in model.answers} == {"proxied"}


def test_the_answer_of_an_application_service_is_passed_on() -> None:
    """As it is, with any status; 500 `M_UNKNOWN` where nobody answers."""
    model = homeserver()
    errand = proxied(model, token=model.register("alice"))
    assert isinstance(errand, Errand)
    answer = text_answer(418, "no JSON")
    assert model.relay(errand, answer) == answer
    assert errcode(model.relay(errand, None)) == (500, "M_UNKNOWN")
    assert model.answers == {("proxied", 418): 1, ("proxied", 500): 1}


def test_faults_of_what_others_answer() -> None:
    """Each new kind fails and is late by itself: before anybody is asked, or after, so that the answer is lost."""
    model = homeserver()
    token, service = model.register("alice"), model.application_service()
    model.remotes["elsewhere.test"] = lambda path, body: (200, {})
    model.faults.status, model.faults.only = 503, frozenset({"fed_proxy", "is_joined"})
    assert (fed_proxy(model, service).status, asked_who_is_joined(model, service, mxid=ALICE).status) == (503, 503)
    assert model.fed_calls == []
    assert asker(proxied(model, token=token))
    model.faults.only = frozenset({"proxied"})
    assert (fed_proxy(model, service).status, asked_who_is_joined(model, service, mxid=ALICE).status) == (200, 200)
    assert refusal(proxied(model, token=token)) == (503, "M_UNKNOWN")
    model.faults.status, model.faults.done_but_not_told, model.faults.latency = None, True, {"proxied": 0.25}
    errand = proxied(model, token=token)
    assert isinstance(errand, Errand)
    told = model.relay(errand, json_answer(200, {}))
    assert (told.fate, told.delay) == (Fate.CLOSE, 0.25)
    assert model.answers["proxied", 0] == 1


def test_a_wrong_method_tells_an_endpoint_that_is_there() -> None:
    """As Synapse has it: 405 where there is an endpoint for another method, 404 where there is none."""
    model = homeserver()
    paths = [f"{UNSTABLE}delayed_events/x/{action}" for action in ("restart", "send", "cancel", "forget")]
    assert [model.request("GET", path, START).status for path in [*paths, f"{STABLE}delayed_events/x/send"]] == [405, 405, 405, 404, 404]
