"""Element Call as the daemon meets it: nobody who is in the call is removed from it, whoever leaves is, and no event of the past fires later.

Each test ends with what `open_call` promises for all of them: at no moment was the membership of somebody in the call removed, no event ran out,
and none was lost.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from sfu_delegate.sandbox.homeserver import End

from tests import stores
from tests.integration.daemon import merged, until
from tests.integration.element_call import PATIENT, ROOM, Call, ElementCall, Mode, hashed, open_call

pytestmark = pytest.mark.usefixtures("database")

# The database does not see the mode: on PostgreSQL, one of them is enough for every day.
both_modes = pytest.mark.parametrize(
    ("database", "mode"),
    [
        pytest.param(kind, mode, marks=[pytest.mark.slow] if kind == "postgresql" and mode is not Mode.COMPATIBILITY else [])
        for kind in stores.KINDS
        for mode in Mode
    ],
    indirect=["database"],
)


@asynccontextmanager
async def alone_in_call(tmp_path: Path, mode: Mode, **changes: Any) -> AsyncIterator[tuple[Call, ElementCall]]:
    """A call in which Alice is, as her client would join it, and nobody else."""
    async with open_call(tmp_path, **changes) as call:
        alice = call.member("alice", mode)
        await alice.join()
        await call.steady()
        yield call, alice


async def hang_up(call: Call) -> None:
    """Everybody who is there says goodbye, and nothing is left to be done."""
    for member in [member for member in call.members if member.here]:
        await member.say_goodbye()
    await call.site.sfu.call("delete_room", ROOM)  # their departures need no look, for which the test would wait
    await gone(call)


async def gone(call: Call) -> None:
    """Nobody is a member any more, no event is left that could fire, and the daemon has done with all of them."""
    for member in call.members:
        assert not member.here
        await until(lambda member=member: not member.announced, f"{member.name} is no member any more")  # type: ignore[misc]
        await member.only_current_left()

    async def done() -> bool:
        return all(
            [await call.site.count("sfu_delegate_delegated_events", state=state) == 0 for state in ("live", "ending", "superseded", "vanished")]
        )

    await until(done, "the daemon has done with them")


# ── joining ──


@both_modes
async def test_a_call_from_beginning_to_end(tmp_path: Path, mode: Mode) -> None:
    """Token twice, probe, leave event, SFU, announcement and delegation in parallel; then the user hangs up."""
    async with open_call(tmp_path) as call:
        alice, bob = call.member("alice", mode), call.member("bob", mode)
        for member in (alice, bob):
            await member.join()
            assert member.delegated
            assert member.identity == (f"@{member.name}:hs.test:PHONE" if mode is Mode.COMPATIBILITY else member.hashed_identity)
        await call.steady()
        assert alice.event.restarted_at
        assert call.site.homeserver.model.answers["openid_userinfo", 200] == 6  # three tokens each, and each is asked about once
        await alice.disconnect()
        await alice.ended(End.SENT)
        assert not alice.announced
        assert bob.announced
        await hang_up(call)


@both_modes
@pytest.mark.parametrize("webhook", ["first", "last", "lost"])
async def test_delegation_and_join_in_either_order(tmp_path: Path, mode: Mode, webhook: str) -> None:
    """The `joined` comes before the delegation or after it, or never: the daemon knows that the user is in the call, and when it leaves."""
    async with open_call(tmp_path) as call:
        alice = call.member("alice", mode)
        await alice.prepare()
        if webhook == "first":
            await alice.connect()
            await call.delivered()
            await asyncio.gather(alice.delegate(), alice.announce())
        else:
            async with call.kept_back() as kept:
                await alice.connect()
                await asyncio.gather(alice.delegate(), alice.announce())
            assert [about["event"] for about in kept] == ["participant_joined"]
            if webhook == "last":
                await call.deliver(kept[0])
        await call.steady()
        await alice.close_tab()
        await alice.ended(End.SENT)
        await gone(call)


@both_modes
@pytest.mark.parametrize("active", [True, False], ids=["active", "aborted"])
@pytest.mark.parametrize("delegated", ["before", "after"])
async def test_the_short_first_session(tmp_path: Path, mode: Mode, active: bool, delegated: str) -> None:
    """Joining a running call, it opens a session that it drops again at once, before the delegation or after it: that is no departure."""
    async with open_call(tmp_path, **PATIENT) as call:
        bob = call.member("bob", mode)
        await bob.join()
        alice = call.member("alice", mode)
        await alice.prepare()
        if delegated == "before":
            await asyncio.gather(alice.announce(), alice.delegate())
        await alice.glance(active=active)
        await call.delivered()
        if delegated == "after":
            await asyncio.gather(alice.announce(), alice.delegate())
        assert alice.event.end is End.PENDING
        await alice.connect()
        await call.steady()
        await hang_up(call)


async def test_a_first_session_that_nobody_told_of_the_end_of(tmp_path: Path) -> None:
    """Its `joined` comes, its `left` is lost, and the real session follows under the same identity: one participant, who is there."""
    async with open_call(tmp_path, **PATIENT) as call:
        alice = call.member("alice", Mode.MATRIX_2_0)
        await alice.prepare()
        async with call.kept_back() as kept:
            await alice.glance()
        assert [about["event"] for about in kept] == ["participant_joined", "participant_left"]
        await call.deliver(kept[0])
        await asyncio.gather(alice.announce(), alice.delegate())
        await alice.connect()
        await call.steady()
        await hang_up(call)


@pytest.mark.parametrize("first", ["joined", "left"])
async def test_two_webhooks_of_the_first_session_after_the_delegation(tmp_path: Path, first: str) -> None:
    """They were on their way, in either order, when the client delegated and had left already; then the real session comes."""
    async with open_call(tmp_path, **PATIENT) as call:
        alice = call.member("alice", Mode.MATRIX_2_0)
        await alice.prepare()
        async with call.kept_back() as kept:
            await alice.glance()
            await asyncio.gather(alice.announce(), alice.delegate())
        for about in kept if first == "joined" else reversed(kept):
            await call.deliver(about)
        await alice.connect()
        await call.steady()
        await hang_up(call)


# ── the identity's two forms ──


@pytest.mark.parametrize("seen", ["webhook", "look"])
@pytest.mark.parametrize("path", ["/delegate_delayed_leave", "/get_token"])
async def test_a_plain_token_and_a_delegation_in_the_newer_form(tmp_path: Path, path: str, seen: str) -> None:
    """It is connected under the plain identity and delegates under the hashed one: seen by webhook or by look, it is the one that is waited for."""
    async with open_call(tmp_path) as call:
        alice = call.member()
        await alice.prepare()
        async with call.kept_back() as kept:
            await alice.connect()
            answer = await alice.ask(path, await alice.body(path, delay=True))
            assert answer.status == 200, answer.text
            await alice.announce()
        assert alice.identity == alice.plain_identity
        if seen == "webhook":
            await call.deliver(kept[0])
        await call.steady()
        await alice.close_tab()
        await alice.ended(End.SENT)
        await gone(call)


@both_modes
async def test_a_delegation_without_a_token(tmp_path: Path, mode: Mode) -> None:
    """`/delegate_delayed_leave` alone, by a client connected under either form of its identity."""
    async with open_call(tmp_path) as call:
        alice = call.member("alice", mode)
        await alice.prepare()
        answer = await alice.ask("/delegate_delayed_leave", await alice.body("/delegate_delayed_leave", delay=True))
        assert (answer.status, answer.body) == (200, {})
        await asyncio.gather(alice.announce(), alice.connect())
        await call.steady()
        await alice.disconnect()
        await alice.ended(End.SENT)
        await gone(call)


@pytest.mark.parametrize("first", ["/sfu/get", "/delegate_delayed_leave"])
async def test_a_newer_delegation_in_the_other_form(tmp_path: Path, first: str) -> None:
    """The same participant delegates a new event, in the other form: the old one is cancelled, not restarted for ever."""
    second = "/delegate_delayed_leave" if first == "/sfu/get" else "/sfu/get"
    async with open_call(tmp_path) as call:
        alice = call.member()
        await alice.prepare()
        assert (await alice.ask(first, await alice.body(first, delay=True))).status == 200
        await asyncio.gather(alice.announce(), alice.connect())
        await call.believed("connected", 1)
        await alice.schedule()
        assert (await alice.ask(second, await alice.body(second, delay=True))).status == 200
        await alice.ended(End.CANCELLED, alice.delay_ids[0])
        await call.steady()
        await hang_up(call)


# ── leaving without a word ──


@both_modes
async def test_closing_the_tab(tmp_path: Path, mode: Mode) -> None:
    """Its requests to the homeserver are lost: the delegate is the only one to say goodbye."""
    async with open_call(tmp_path) as call:
        alice, bob = call.member("alice", mode), call.member("bob", mode)
        await asyncio.gather(alice.join(), bob.join())
        await call.steady()
        await alice.close_tab()
        await alice.ended(End.SENT)
        assert not alice.announced
        await call.steady()
        assert await call.outcomes() == {"sent": 1}
        await hang_up(call)


@both_modes
async def test_a_reload_cancels_the_old_event(tmp_path: Path, mode: Mode) -> None:
    """Back with a new session and a new event for the same state key: the old event is neither sent into the new membership nor left alone."""
    async with alone_in_call(tmp_path, mode, **PATIENT) as (call, alice):
        for _ in range(2):
            await alice.close_tab()
            await call.delivered()
            await alice.join()
            await alice.ended(End.CANCELLED, alice.delay_ids[-2])
        await call.steady()
        assert await call.outcomes() == {"replaced": 2}
        await hang_up(call)


@both_modes
async def test_a_reload_that_takes_long(tmp_path: Path, mode: Mode) -> None:
    """The goodbye is said before the page is there again, and nothing of it touches the new membership."""
    async with alone_in_call(tmp_path, mode) as (call, alice):
        await alice.close_tab()
        await alice.ended(End.SENT)
        await alice.join()
        await call.steady()
        assert await call.outcomes() == {"sent": 1}
        await hang_up(call)


@stores.slow_on_postgresql
@pytest.mark.parametrize("how", ["closed", "killed"])
async def test_back_with_a_membership_of_its_own(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another member id it is another participant and another membership: what the new one does keeps the old one's goodbye from nothing."""
    monkeypatch.setattr("sfu_delegate.sandbox.sfu.SILENCE", (1.0, 1.1))
    changes = merged(PATIENT, {"departures": {"CLIENT_INITIATED": {"look_after": "1s"}}, "presence": {"join_timeout": "1h"}})
    async with open_call(tmp_path, **changes) as call:
        old, new = (call.member("alice", Mode.MATRIX_2_0, member=member) for member in ("first", "second"))
        await old.join()
        await call.steady()
        await (old.close_tab() if how == "closed" else old.crash())
        await call.delivered()
        await new.join()
        await old.ended(End.SENT)
        await call.steady()
        await new.close_tab()
        await new.ended(End.SENT)
        await gone(call)


@both_modes
async def test_a_browser_that_is_killed(tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SFU notices after a while, and the goodbye is said."""
    monkeypatch.setattr("sfu_delegate.sandbox.sfu.SILENCE", (0.2, 0.3))
    async with alone_in_call(tmp_path, mode) as (call, alice):
        await alice.crash()
        await alice.ended(End.SENT)
        await gone(call)
        assert await call.outcomes() == {"sent": 1}


@both_modes
@pytest.mark.parametrize("reason", ["DUPLICATE_IDENTITY", "CONNECTION_TIMEOUT"])
@pytest.mark.parametrize("told", ["at once", "late"])
async def test_killed_and_back_at_once(tmp_path: Path, mode: Mode, reason: str, told: str) -> None:
    """A new session and a new delegation, while the SFU still holds the old session, whose end comes later: it is that of the old one alone."""
    async with alone_in_call(tmp_path, mode, **PATIENT) as (call, alice):
        await alice.crash()
        async with call.kept_back() as kept:
            await alice.join()
        left, joined = kept
        assert (left["participant"]["disconnectReason"], joined["event"]) == ("DUPLICATE_IDENTITY", "participant_joined")
        left["participant"]["disconnectReason"] = reason  # that of a node which learns of the new session too late
        for about in (left, joined) if told == "at once" else (joined,):
            await call.deliver(about)
        await alice.ended(End.CANCELLED, alice.delay_ids[0])
        await call.steady()
        if told == "late":
            await call.deliver(left)
            await call.steady()
        assert await call.outcomes() == {"replaced": 1}
        await hang_up(call)


# ── reconnects ──


@both_modes
@pytest.mark.parametrize("first", ["left", "joined"])
async def test_full_reconnects_with_a_takeover(tmp_path: Path, mode: Mode, first: str) -> None:
    """The new session takes the identity over; `left DUPLICATE_IDENTITY` and `joined` come in either order, again and again."""
    async with alone_in_call(tmp_path, mode, **PATIENT) as (call, alice):
        for _ in range(3):
            async with call.kept_back() as kept:
                await alice.take_over()
            left, joined = kept
            assert left["participant"]["disconnectReason"] == "DUPLICATE_IDENTITY"
            for about in (left, joined) if first == "left" else (joined, left):
                await call.deliver(about)
        await call.steady()
        assert alice.event.end is End.PENDING
        await hang_up(call)


@both_modes
async def test_full_reconnects_that_leave_first(tmp_path: Path, mode: Mode) -> None:
    """`left CLIENT_INITIATED`, and `joined` anew within the time of the look: the same person."""
    async with alone_in_call(tmp_path, mode, **PATIENT) as (call, alice):
        for _ in range(3):
            await alice.reconnect()
        await call.steady()
        assert alice.event.end is End.PENDING
        await hang_up(call)


@both_modes
@pytest.mark.parametrize("lost", ["participant_left", "participant_joined", "both"])
async def test_full_reconnects_with_lost_webhooks(tmp_path: Path, mode: Mode, lost: str) -> None:
    """Looks find what was not told: who is in the call stays in it, and its departure is noticed all the same."""
    async with alone_in_call(tmp_path, mode) as (call, alice):
        async with call.kept_back() as kept:
            await alice.take_over()
        for about in kept:
            if lost not in ("both", about["event"]):
                await call.deliver(about)
        await call.steady()
        await alice.close_tab()
        await alice.ended(End.SENT)
        await gone(call)


# ── goodbyes ──


@both_modes
async def test_hanging_up_with_the_sfu_first(tmp_path: Path, mode: Mode) -> None:
    """The delegate is faster; the client finds its event gone and puts an empty leave itself: `sent`, and nothing to worry about."""
    async with alone_in_call(tmp_path, mode) as (call, alice):
        await alice.disconnect()
        await alice.ended(End.SENT)
        assert await alice.say_goodbye() == 404
        await gone(call)
        assert await call.outcomes() == {"sent": 1}
        assert call.trouble() == []


@both_modes
@pytest.mark.parametrize("action", ["send", "cancel"])
async def test_hanging_up_with_the_event_first(tmp_path: Path, mode: Mode, action: str) -> None:
    """The client ends its event itself, by `send`, or by `cancel` and a leave of its own: `already_ended`, and nothing to worry about."""
    async with alone_in_call(tmp_path, mode) as (call, alice):
        assert await alice.say_goodbye(action) == 200
        await alice.disconnect()
        await gone(call)
        assert alice.event.end is (End.SENT if action == "send" else End.CANCELLED)
        assert await call.outcomes() == {"already_ended": 1}
        assert call.trouble() == []


@both_modes
async def test_hanging_up_and_joining_again(tmp_path: Path, mode: Mode) -> None:
    """The user hangs up and is back before the delegate has looked: nothing of the first call touches the second."""
    async with open_call(tmp_path, **PATIENT) as call:
        alice = call.member("alice", mode)
        for _ in range(3):
            await alice.join()
            await call.steady()
            await alice.say_goodbye()
            await alice.disconnect()
            await call.delivered()
        await alice.join()
        await call.steady()
        assert call.trouble() == []
        await hang_up(call)


# ── during the call ──


@both_modes
async def test_restarts_of_both_sides(tmp_path: Path, mode: Mode) -> None:
    """The client goes on restarting its event; the daemon neither minds nor counts on it."""
    async with open_call(tmp_path) as call:
        alice = call.member("alice", mode)
        await alice.join()
        for _ in range(5):
            await alice.restart()
        await call.steady()
        assert len(alice.delay_ids) == 1
        await hang_up(call)


@both_modes
async def test_an_event_that_is_gone_is_scheduled_anew(tmp_path: Path, mode: Mode) -> None:
    """Its own restart finds nothing: it schedules, announces and delegates anew, and the daemon keeps the new one alive."""
    async with alone_in_call(tmp_path, mode) as (call, alice):
        assert (await alice.manage("cancel")).status == 200
        await alice.restart()
        assert len(alice.delay_ids) == 2
        await call.steady()
        assert alice.event.restarted_at
        await alice.close_tab()
        await alice.ended(End.SENT)
        await gone(call)


# ── what the service refuses ──


@both_modes
async def test_without_the_delay_fields_after_a_refusal(tmp_path: Path, mode: Mode) -> None:
    """`400 M_BAD_JSON` for the delegation: the client gets into the call all the same, and the daemon has nothing to do with its event."""
    async with open_call(tmp_path, delegations={"max_delay": "30m"}) as call:
        alice = call.member("alice", mode)
        await alice.join()
        assert not alice.delegated
        await call.looked(0)
        assert await call.site.count("sfu_delegate_delegated_events_accepted_total") == 0
        await alice.say_goodbye()
        await alice.disconnect()
        await gone(call)


@asynccontextmanager
async def front_without(path: str, call: Call) -> AsyncIterator[str]:
    """A reverse proxy that does not know one of the paths."""

    async def forward(request: web.Request) -> web.Response:
        cors = {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Headers": "Content-Type"}
        if request.path == path:
            return web.Response(status=404 if request.method == "POST" else 200, headers=cors)
        async with call.site.http.request(request.method, call.site.url + request.path, data=await request.read(), headers=request.headers) as given:
            return web.Response(status=given.status, headers=cors, body=await given.read(), content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_the_legacy_endpoint_where_the_newer_one_is_missing(tmp_path: Path) -> None:
    """`404` on `/get_token`: the client takes `/sfu/get` for everything, is connected under the plain identity, and is waited for under it."""
    async with open_call(tmp_path) as call, front_without("/get_token", call) as front:
        alice = call.member("alice", Mode.MATRIX_2_0, service=front)
        await alice.join()
        assert alice.identity == alice.plain_identity
        await call.steady()
        await alice.close_tab()
        await alice.ended(End.SENT)
        await gone(call)


async def test_a_service_that_takes_no_delegations(tmp_path: Path) -> None:
    """The probe is a 404: that is all the client wants to know of `/delegate_delayed_leave`."""
    async with open_call(tmp_path) as call, front_without("/delegate_delayed_leave", call) as front:
        assert not await call.member(service=front).probe()
        assert await call.member("bob").probe()


async def test_the_names_of_the_proposal() -> None:
    """The model's names are those of the proposal's test vectors, so that it cannot agree with the daemon on a mistake."""
    assert hashed("!roomid:example.com", "slot1234") == "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"
    assert hashed("@alice:example.com", "memberABC") == "M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs"
