"""What the homeserver may do to a daemon: be slow, be away, limit it, answer nonsense; and the tokens that clients and operators give for it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sfu_delegate.sandbox.homeserver import End, HomeserverFaults, HomeserverModel, RateLimit

from tests import stores
from tests.integration.daemon import GENEROUS, SERVER, Participant, Site, open_site, until

pytestmark = pytest.mark.usefixtures("database")

IMPATIENT: dict[str, Any] = {"delegations": {"verify_timeout": "200ms"}}


async def verified(site: Site, given: dict[str, Any]) -> None:
    """Wait until the homeserver has confirmed the delegation."""

    async def so() -> bool:
        return bool((await site.show(given))["verified"])

    await until(so, "the delegation is verified")


async def mended(site: Site) -> None:
    """The homeserver works again."""
    site.homeserver.model.faults = HomeserverFaults()
    await site.homeserver.settle()


async def test_a_slow_homeserver_does_not_keep_the_client_waiting(tmp_path: Path) -> None:
    """201 with `verified: false` after the configured time; the restart stays due, and the delegation is verified later."""
    async with open_site(tmp_path, **IMPATIENT) as site:
        site.homeserver.model.faults.latency = {"restart": 0.6}
        alice = await site.participant()
        answer = await site.delegate(alice)
        assert answer.status == 201
        assert answer.body["verified"] is False
        await verified(site, answer.body)
        assert len(site.event(alice).restarted_at) == 1


async def test_a_homeserver_that_turns_out_not_to_know_the_event_later(tmp_path: Path) -> None:
    """When the 404 comes after the client's answer, the delegation ends as `unknown`, and nobody is bothered any more."""
    async with open_site(tmp_path, **IMPATIENT) as site:
        site.homeserver.model.faults.latency = {"restart": 0.6}
        alice = await site.participant()
        await site.homeserver.call("manage", alice.delay_id, "cancel")
        answer = await site.delegate(alice)
        assert answer.status == 201
        assert await site.outcomes(answer.body) == ["unknown"]


@pytest.mark.parametrize("fault", [{"down": True}, {"status": 502}, {"html": 503}, {"close": True}, {"garbage": True}])
async def test_a_homeserver_that_is_away_is_waited_for(tmp_path: Path, fault: dict[str, Any]) -> None:
    """Delegated while it is away: taken, and verified when it is back. Departed while it is away: sent when it is back."""
    async with open_site(tmp_path, **IMPATIENT) as site:
        alice = await site.participant()
        await site.homeserver.call("faults", **fault)
        answer = await site.delegate(alice)
        assert answer.status == 201
        assert answer.body["verified"] is False
        await mended(site)
        await verified(site, answer.body)
        await site.join(alice)
        await site.present(answer.body, "connected")
        await site.homeserver.call("faults", **fault)
        await site.leave(alice)
        await site.present(answer.body, "gone")

        async def failed() -> bool:
            return any(line["what"] == "send_failed" for line in (await site.show(answer.body))["history"])

        await until(failed, "a send that failed")
        assert site.event(alice).end is End.PENDING
        await mended(site)
        await site.ended(alice)
        assert await site.outcomes(answer.body) == ["sent"]


async def test_a_send_whose_answer_was_lost_counts_as_sent(tmp_path: Path) -> None:
    """The homeserver sent it and the connection broke: the 404 to the second try is read as our own doing."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        site.homeserver.model.faults.done_but_not_told = True
        await site.leave(alice)
        await site.ended(alice)
        site.homeserver.model.faults.done_but_not_told = False
        assert await site.outcomes(given) == ["sent"]


async def test_a_refused_send_is_final(tmp_path: Path) -> None:
    """403 M_FORBIDDEN: the event may not be sent, and trying again would not help."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        site.homeserver.model.faults.forbid_send = True
        await site.leave(alice)
        assert await site.outcomes(given) == ["rejected"]


async def test_an_event_that_ran_out_after_the_departure(tmp_path: Path) -> None:
    """The homeserver cannot be reached until the delay is over: the event fired by itself, and the daemon says so."""
    async with open_site(tmp_path) as site:
        alice = await site.participant(delay_ms=2000)
        given = await site.in_call(alice)
        await site.homeserver.call("faults", down=True)
        await site.leave(alice)
        await site.ended(alice, End.RAN_OUT)
        await mended(site)
        assert await site.outcomes(given) == ["ran_out"]
        assert await site.count("sfu_delegate_events_lost_while_connected_total") == 0


@pytest.mark.parametrize("generations", ["B", "C", "D"])
async def test_each_generation_of_the_api_without_a_token(tmp_path: Path, generations: str) -> None:
    """The daemon finds out which form of the management API the homeserver has."""
    async with open_site(tmp_path, homeserver=HomeserverModel(SERVER, seed=1, limit=None, generations=generations)) as site:
        alice = await site.participant()
        await site.in_call(alice)
        await site.leave(alice)
        await site.ended(alice)


# ── rate limits ──


@pytest.fixture
def impatient_429(monkeypatch: pytest.MonkeyPatch) -> None:
    """Synapse holds a 429 back for half a second; here it comes sooner, since nothing depends on it but the time that a test takes."""
    monkeypatch.setattr("sfu_delegate.sandbox.homeserver.HELD_BACK", 0.02)


def limit(site: Site, per_second: float, burst: float) -> None:
    """The homeserver limits from now on, and wants to be asked again soon."""
    model = site.homeserver.model
    model.limit = RateLimit(per_second, burst)
    model.faults.retry_after, model.faults.retry_after_ms = "0.2", ""


async def refused(site: Site, action: str) -> None:
    """Wait until the homeserver refuses such an action once more."""
    answers = site.homeserver.model.answers
    before = answers[action, 429]
    await until(lambda: answers[action, 429] > before, f"a {action} that is refused")


async def removed(site: Site, people: dict[Participant, dict[str, Any]]) -> None:
    """They are removed from the call, and the daemon knows it."""
    for who in people:
        await site.leave(who, "PARTICIPANT_REMOVED")
    for given in people.values():
        await site.present(given, "gone")


@stores.slow_on_postgresql
@pytest.mark.usefixtures("impatient_429")
async def test_all_are_sent_in_the_end_under_a_rate_limit(tmp_path: Path) -> None:
    """A homeserver that allows little: everything is done nevertheless, after as many 429s as it takes."""
    async with open_site(tmp_path, **IMPATIENT) as site:
        limit(site, 10.0, 2.0)
        people = [await site.participant(f"p{n}") for n in range(8)]
        answers = await asyncio.gather(*(site.delegate(who) for who in people))
        assert {answer.status for answer in answers} == {201}
        for who, answer in zip(people, answers, strict=True):
            await verified(site, answer.body)
            await site.join(who)
        for who in people:
            await site.leave(who)
        for who in people:
            await site.ended(who)
        assert site.homeserver.model.answers["restart", 429] > 0
        assert site.homeserver.model.answers["send", 429] > 0
        for answer in answers:
            assert await site.outcomes(answer.body) == ["sent"]


@pytest.mark.usefixtures("impatient_429")
async def test_departures_come_before_restarts(tmp_path: Path) -> None:
    """Where the homeserver lets through only a few, a person who left is told of before those who stay are restarted, which can wait."""
    async with open_site(tmp_path, restart={"at": 0.01, "spread": 0}) as site:
        stay = [await site.participant(f"stays{n}", delay_ms=60_000) for n in range(4)]
        leave = [await site.participant(f"leaves{n}", delay_ms=60_000) for n in range(4)]
        for who in stay:
            await site.in_call(who)
        leaving = {who: await site.in_call(who) for who in leave}
        limit(site, 0.001, 0.5)
        await refused(site, "restart")
        await removed(site, leaving)
        await refused(site, "send")
        counted = {who: len(site.event(who).restarted_at) for who in stay}
        limit(site, 5.0, 1.0)
        ended = [(await site.ended(who)).ended_at for who in leave]
        site.homeserver.model.limit = None
        for who in stay:
            await site.restarted(who, counted[who] + 1)
        assert min(site.event(who).restarted_at[counted[who]] for who in stay) >= max(at for at in ended if at is not None)


@stores.slow_on_postgresql
@pytest.mark.usefixtures("impatient_429")
async def test_who_is_about_to_run_out_comes_before_departures(tmp_path: Path) -> None:
    """A restart that is about to miss its deadline goes first: a person dropped is worse than a ghost that stays a moment longer."""
    async with open_site(tmp_path, restart={"at": 0.05, "spread": 0}) as site:
        alice = await site.participant(delay_ms=9000)
        await site.in_call(alice)
        leave = [await site.participant(f"leaves{n}", delay_ms=60_000) for n in range(3)]
        leaving = {who: await site.in_call(who) for who in leave}
        limit(site, 0.001, 0.5)
        await refused(site, "restart")
        await removed(site, leaving)
        await refused(site, "restart")
        counted = len(site.event(alice).restarted_at)
        limit(site, 5.0, 1.0)
        ended = [(await site.ended(who)).ended_at for who in leave]
        assert site.event(alice).end is End.PENDING
        assert len(site.event(alice).restarted_at) > counted
        assert site.event(alice).restarted_at[counted] <= min(at for at in ended if at is not None)


@pytest.mark.usefixtures("impatient_429")
async def test_a_crowd_that_delegates_drops_nobody_from_the_call(tmp_path: Path) -> None:
    """Under a rate limit, the first restarts of many new delegations must not keep back the one that somebody in the call needs."""
    async with open_site(tmp_path, restart={"at": 0.2, "spread": 0}, **IMPATIENT) as site:
        alice = await site.participant(delay_ms=6000)
        await site.in_call(alice)
        limit(site, 2.0, 1.0)
        crowd = [await site.participant(f"p{n}", f"other{n}", delay_ms=600_000) for n in range(30)]
        await asyncio.gather(*(site.delegate(who) for who in crowd))
        event = site.event(alice)
        await until(lambda: len(event.restarted_at) > 1 or event.end is not End.PENDING, "a restart, or the end")
        assert event.end is End.PENDING
        assert any(not site.event(who).restarted_at for who in crowd)


async def test_the_configured_number_of_requests_is_never_exceeded(tmp_path: Path) -> None:
    """`homeservers[].in_flight` bounds how many requests are open at one homeserver."""
    changes = {"homeservers": [{"name": SERVER, "url": "", "in_flight": 3}]}
    model = HomeserverModel(SERVER, seed=1, limit=None)
    most = open_now = 0
    request = model.request

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal most, open_now
        open_now += 1
        most = max(most, open_now)
        answer = request(*args, **kwargs)
        asyncio.get_running_loop().call_later(answer.delay, closed)
        return answer

    def closed() -> None:
        nonlocal open_now
        open_now -= 1

    async with open_site(tmp_path, started=False, homeserver=model) as site:
        changes["homeservers"][0]["url"] = site.homeserver.url
        site.changes = changes
        await site.start()
        people = [await site.participant(f"p{n}") for n in range(20)]
        model.faults.latency = {"restart": 0.05}
        model.request = counted  # type: ignore[method-assign]
        answers = await asyncio.gather(*(site.delegate(who) for who in people))
        assert {answer.status for answer in answers} == {201}
        assert most == 3


# ── tokens ──


async def test_a_full_access_token_is_refused_and_nothing_is_stored(tmp_path: Path) -> None:
    """400 with an explanation; neither the token nor the delayed event is in the database."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        token = site.homeserver.model.register("@alice:hs.test")
        site.secrets.add(token)
        answer = await site.delegate(alice, token=token)
        assert (answer.status, answer.body["errcode"]) == (400, "M_INVALID_PARAM")
        assert "full access token" in answer.body["error"]
        assert token.encode() not in site.stored()
        assert alice.delay_id.encode() not in site.stored()
        assert await site.count("sfu_delegate_delegated_events") == 0
        assert not site.event(alice).restarted_at


async def test_a_scoped_token_is_stored_encrypted_and_used(tmp_path: Path) -> None:
    """Its homeserver sees it with each request, and the files of the database hold no trace of it in the clear."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        token = site.homeserver.model.scoped_token("@alice:hs.test", alice.delay_id)
        site.secrets.add(token)
        given = await site.delegated(alice, token=token)
        await site.join(alice)
        await site.present(given, "connected")
        assert alice.delay_id.encode() in site.stored()  # it is the right file
        assert token.encode() not in site.stored()
        await site.stop()
        assert token.encode() not in site.stored()
        await site.start()
        await site.leave(alice)
        assert (await site.ended(alice)).ended_by == "@alice:hs.test"


async def test_a_token_that_cannot_be_tried_is_not_stored(tmp_path: Path) -> None:
    """The homeserver cannot be asked what the token allows: 503, try again, and nothing was stored."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        token = site.homeserver.model.scoped_token("@alice:hs.test", alice.delay_id)
        site.secrets.add(token)
        site.homeserver.model.faults.status = 502
        answer = await site.delegate(alice, token=token)
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert alice.delay_id.encode() not in site.stored()


async def test_a_scoped_token_for_another_event_is_refused(tmp_path: Path) -> None:
    """The homeserver says 403: the client hears it at once, and nothing is delegated."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        token = site.homeserver.model.scoped_token("@alice:hs.test", "another")
        site.secrets.add(token)
        answer = await site.delegate(alice, token=token)
        assert (answer.status, answer.body["homeserver_errcode"]) == (400, "M_FORBIDDEN")
        assert await site.count("sfu_delegate_delegated_events", state="live") == 0


@pytest.mark.parametrize(
    ("identity", "seen_as"), [("@alice:hs.test:DEVICE", "@alice:hs.test"), ("M3VnsLXrkbxIDINXO64u8PZ", "@sandbox-service:hs.test")]
)
async def test_the_application_service_is_not_limited(tmp_path: Path, identity: str, seen_as: str) -> None:
    """With an `as_token` the daemon speaks for the user where the identity tells who that is, and no rate limit applies."""
    async with open_site(tmp_path, started=False, homeserver=HomeserverModel(SERVER, seed=1, limit=RateLimit(0.001, 1.0))) as site:
        as_token = site.homeserver.model.application_service()
        site.secrets.add(as_token)
        site.changes = {"homeservers": [{"name": SERVER, "url": site.homeserver.url, "as_token": as_token}]}
        await site.start()
        alice = await site.participant(identity, user="@alice:hs.test")
        more = [await site.participant(f"p{n}") for n in range(5)]
        for who in (alice, *more):
            await site.in_call(who)
        await site.leave(alice)
        assert (await site.ended(alice)).ended_by == seen_as
        assert not [status for _, status in site.homeserver.model.answers if status == 429]


async def test_a_homeserver_that_is_not_configured_is_not_served(tmp_path: Path) -> None:
    """403, and nobody is asked anything: a client never chooses where requests go."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        answer = await site.delegate(alice, homeserver="elsewhere.example")
        assert (answer.status, answer.body["errcode"]) == (403, "M_FORBIDDEN")
        assert not [kind for kind, _ in site.homeserver.model.answers if kind != "versions"]  # that is asked at the start


async def test_a_hanging_homeserver_does_not_hold_up_the_others(tmp_path: Path) -> None:
    """One homeserver never answers; the delegations of another one are verified meanwhile."""
    async with open_site(tmp_path, started=False) as site:
        hanging = await _deaf()
        site.changes = {
            "delegations": {"verify_timeout": "100ms"},
            "timeouts": {"request": f"{GENEROUS}s", "shutdown": "0s"},
            "actions": {"lease": "60s"},
            "homeservers": [
                {"name": SERVER, "url": site.homeserver.url},
                {"name": "deaf.test", "url": f"http://127.0.0.1:{hanging.sockets[0].getsockname()[1]}"},
            ],
        }
        async with hanging:
            await site.start()
            for n in range(6):
                answer = await site.delegate(await site.participant(f"p{n}"), homeserver="deaf.test")
                assert answer.status == 201
                assert answer.body["verified"] is False
            alice = await site.participant()
            answer = await site.delegate(alice)
            await verified(site, answer.body)
            await site.stop()


async def _deaf() -> asyncio.Server:
    """A server that takes connections and never says a word."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)
