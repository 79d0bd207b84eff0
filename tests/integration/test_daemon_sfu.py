"""The daemon and an SFU whose webhooks get lost, that answers nothing, or that is gone for good."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sfu_delegate.sandbox.homeserver import End

from tests import stores
from tests.integration.daemon import open_site, until

pytestmark = pytest.mark.usefixtures("database")

SOON: dict[str, Any] = {
    "presence": {"interval": "300ms", "interval_most": "300ms", "joining_limit": "500ms"},
    "departures": {"ROOM_MISSING": {"look_after": "200ms"}, "ROOM_RESTARTED": {"look_after": "500ms"}},
}


async def test_a_left_that_was_lost_is_found_by_a_routine_look(tmp_path: Path) -> None:
    """Nobody tells that alice left, and nobody else comes or goes: the room is looked at all the same."""
    async with open_site(tmp_path, **SOON) as site:
        alice, bob = await site.participant(), await site.participant("bob")
        given, other = await site.in_call(alice), await site.in_call(bob)
        site.sfu.model.delivery_faults.drop = 1.0
        await site.leave(alice)
        await site.ended(alice)
        assert (await site.done(given))["delayed_events"][0]["outcome"] == "sent"
        assert (await site.show(other))["participant"]["presence"] == "connected"
        assert site.event(bob).end is End.PENDING


async def test_a_whole_room_that_left_without_a_word_is_found(tmp_path: Path) -> None:
    """An empty list: perhaps the SFU was started anew, so it takes longer to be believed; but it is believed."""
    async with open_site(tmp_path, **SOON) as site:
        people = [await site.participant(f"p{n}") for n in range(3)]
        given = [await site.in_call(who) for who in people]
        site.sfu.model.delivery_faults.drop = 1.0
        for who in people:
            await site.leave(who)
        for who in people:
            await site.ended(who)
        assert {event["outcome"] for one in given for event in (await site.done(one))["delayed_events"]} == {"sent"}


async def test_nobody_is_looked_for_where_nobody_delegated(tmp_path: Path) -> None:
    """Routine looks end with the last delegation of a room."""
    async with open_site(tmp_path, **SOON) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        await site.leave(alice, "PARTICIPANT_REMOVED")
        await site.done(given)
        await until(lambda: not site.daemon.engine.in_flight, "no look is under way")
        calls = site.sfu.model.calls["ListParticipants"]
        await asyncio.sleep(1.0)
        assert site.sfu.model.calls["ListParticipants"] <= calls + 1


async def test_who_did_not_come_back_after_the_room_came_up_anew_is_a_ghost(tmp_path: Path) -> None:
    """A node that remembers its rooms is killed: bob stays listed as ACTIVE for ever, alice comes back with a new session."""
    async with open_site(tmp_path, **SOON) as site:
        alice, bob = await site.participant(), await site.participant("bob")
        there, ghost = await site.in_call(alice), await site.in_call(bob)
        # Long ago, by the SFU's own clock: a room is told apart from its former instance by some seconds.
        for who in (alice, bob):
            await site.daemon.inbox.in_thread(partial(_joined_earlier, site, who.identity))
        await site.sfu.call("kill", redis=True)
        await site.sfu.call("start")
        await site.sfu.call("join", alice.room, alice.identity, active_after=0)
        await site.ended(bob)
        assert (await site.done(ghost))["delayed_events"][0]["outcome"] == "sent"
        await site.present(there, "connected")
        assert site.event(alice).end is End.PENDING


def _joined_earlier(site: Any, identity: str) -> None:
    """The rows say that the session joined a minute ago."""

    def work(tx: Any) -> None:
        tx.lock_rooms([("main", "call")], ())
        for row in tx.of_participants([("main", "call", identity)], finished=False):
            sessions = tuple(session._replace(joined_at_ms=session.joined_at_ms - 60_000) for session in row.sessions)
            tx.update(row, row._replace(sessions=sessions))

    site.daemon.engine.store.atomically(work)


@stores.slow_on_postgresql
async def test_an_sfu_that_is_gone_for_good_keeps_no_ghosts(tmp_path: Path) -> None:
    """Silent for `lost_after`: it is let run, so the homeserver's own timer ends the membership; nothing is sent because of not knowing."""
    changes: dict[str, Any] = {"sfus": {"main": {"lost_after": "1s", "request_timeout": "300ms"}}, "restart": {"at": 0.3, "spread": 0}}
    async with open_site(tmp_path, **SOON, **changes) as site:
        alice = await site.participant(delay_ms=4000)
        given = await site.in_call(alice)
        site.sfu.model.faults.hang = True
        await until(lambda: site.event(alice).end is not End.PENDING, "her event has ended")
        assert site.event(alice).end is End.RAN_OUT
        shown = await site.show(given)
        assert (shown["delayed_events"][0]["state"], shown["participant"]["presence"]) == ("adrift", "connected")
        assert await site.count("sfu_delegate_events_lost_while_connected_total") == 0
        site.sfu.model.faults.hang = False


async def test_when_a_lost_sfu_is_back_its_delegations_are_looked_after_again(tmp_path: Path) -> None:
    """Who is still there is restarted, who left meanwhile is sent."""
    changes: dict[str, Any] = {"sfus": {"main": {"lost_after": "1s", "request_timeout": "300ms"}}, "restart": {"at": 0.1, "spread": 0}}
    async with open_site(tmp_path, **SOON, **changes) as site:
        alice, bob = await site.participant(delay_ms=30_000), await site.participant("bob", delay_ms=30_000)
        there, left = await site.in_call(alice), await site.in_call(bob)
        site.sfu.model.faults.down = True
        for given in (there, left):
            await until(partial(_state, site, given, "adrift"), "it is let run")
        site.sfu.model.delivery_faults.drop = 1.0
        await site.leave(bob)
        times = len(site.event(alice).restarted_at)
        site.sfu.model.faults.down = False
        await site.restarted(alice, times + 1)
        await site.ended(bob)
        assert (await site.show(there))["state"] == "live"
        assert await site.outcomes(left) == ["sent"]


async def _state(site: Any, given: Any, state: str) -> bool:
    return bool((await site.show(given))["delayed_events"][0]["state"] == state)


@stores.slow_on_postgresql
async def test_many_departures_do_not_wait_for_a_hung_sfu_one_after_the_other(tmp_path: Path) -> None:
    """Hang-ups in many rooms while the SFU answers nothing: after a few looks that time out, the others count as failed at once."""
    async with open_site(tmp_path, **SOON, sfus={"main": {"request_timeout": "1s", "in_flight": 2}}) as site:
        people = [await site.participant(f"p{n}", f"room{n}") for n in range(40)]
        given = [await site.in_call(who) for who in people]
        site.sfu.model.faults.hang = True
        looks = site.sfu.model.calls["ListParticipants"]
        for who in people:
            await site.leave(who, "CLIENT_INITIATED")
        for who in people:
            await site.ended(who)
        # One look for each room would have been 40.
        assert site.sfu.model.calls["ListParticipants"] - looks < len(people) / 2
        assert [await site.outcomes(one) for one in given] == [["sent"]] * len(people)
        site.sfu.model.faults.hang = False
