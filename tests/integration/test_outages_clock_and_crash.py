"""The daemon is killed in the worst moments, its clock is set by hours, its homeserver ends an event by itself: nothing acknowledged is lost."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sfu_delegate.api.services import Services
from sfu_delegate.demo.stand_in import StandIn
from sfu_delegate.sandbox.homeserver import DelayedEvent, End, HomeserverFaults

from tests.e2e.call import ROOM, Call, Client, running_call
from tests.integration.daemon import GENEROUS, QUICK, merged, open_site, until
from tests.integration.databases import database_of

pytestmark = pytest.mark.usefixtures("database")

# ── killed, as a process ──

SELDOM: dict[str, Any] = {"first_looks": ["100ms"], "interval": "10h", "interval_most": "10h"}
"""Looks without a reason are hours apart."""


@asynccontextmanager
async def open_call(directory: Path, **changes: Any) -> AsyncIterator[tuple[Call, StandIn]]:
    """A daemon as a process between a stand-in SFU and a stand-in homeserver that limits nobody."""
    sections = merged(QUICK, database_of(directory).settings, changes)
    async with StandIn(limit=None) as homeserver, running_call(homeserver, directory, **sections) as call:
        yield call, homeserver


def event_of(homeserver: StandIn, client: Client) -> DelayedEvent:
    """The client's delayed event, as the homeserver has it."""
    return homeserver.model.events[client.delay_id]


async def until_so(call: Call, condition: Callable[[], object], what: str) -> None:
    """Wait until the condition is true."""

    async def look() -> bool:
        return bool(condition())

    await call.until(look, what)


async def killed_without_a_look_planned(call: Call) -> None:
    """SIGKILL, when no look is planned for the next half hour, so that only the start itself is a reason to look."""

    async def quiet() -> bool:
        ((due,),) = database_of(call.daemon.directory).query("SELECT min(due) FROM room")
        return due is None or due > time.time() + 1800

    await call.until(quiet, "no look is planned")
    await call.daemon.kill()


async def lost(call: Call) -> float:
    """How many events ended while their participant was connected."""
    return await call.metric("sfu_delegate_events_lost_while_connected_total")


@pytest.mark.parametrize("fault", [pytest.param("hang", marks=pytest.mark.slow), "done_and_hangs"])
async def test_killed_while_a_restart_is_under_way(tmp_path: Path, fault: str) -> None:
    """Whether the homeserver has carried it out is unknown: the countdown is believed to be the older one, and the next restart comes in time."""
    async with open_call(tmp_path, restart={"at": 0.15, "spread": 0.01}) as (call, homeserver):
        anna = await homeserver.register("anna")
        await call.open(anna)
        client = await call.join(anna, 10_000)
        event, answers = event_of(homeserver, client), homeserver.model.answers
        homeserver.model.faults = HomeserverFaults(only=frozenset({"restart"}), hang=fault == "hang", done_and_hangs=fault != "hang")
        await until_so(call, lambda: answers["restart", 0] >= 1, "a restart is under way")
        await call.daemon.kill()
        homeserver.model.faults = HomeserverFaults()
        restarted = len(event.restarted_at)
        await call.daemon.start()
        await until_so(call, lambda: len(event.restarted_at) >= restarted + 2, "it is restarted again")
        assert event.end is End.PENDING
        await call.shows(client, lambda shown: shown["participant"]["presence"] == "connected", "connected")
        await call.leave(client)
        assert await call.ended(client) == "sent"
        assert await lost(call) == 0


async def test_killed_while_a_send_is_under_way_that_gets_through(tmp_path: Path) -> None:
    """The homeserver sends it and tells nobody: the next start asks again, is told 404, and knows that it was its own doing."""
    async with open_call(tmp_path) as (call, homeserver):
        anna = await homeserver.register("anna")
        await call.open(anna)
        client = await call.join(anna)
        homeserver.model.faults = HomeserverFaults(only=frozenset({"send"}), done_and_hangs=True)
        await call.leave(client, "PARTICIPANT_REMOVED")
        await until_so(call, lambda: event_of(homeserver, client).end is End.SENT, "the homeserver sends it")
        await call.daemon.kill()
        homeserver.model.faults = HomeserverFaults()
        await call.daemon.start()
        assert await call.ended(client) == "sent"
        assert homeserver.model.answers["send", 404] == 1
        assert homeserver.model.answers["send", 200] == 0


@pytest.mark.slow
async def test_killed_while_a_send_is_under_way_that_is_lost(tmp_path: Path) -> None:
    """The homeserver never heard of it: it is sent after the next start, once."""
    async with open_call(tmp_path) as (call, homeserver):
        anna = await homeserver.register("anna")
        await call.open(anna)
        client = await call.join(anna)
        homeserver.model.faults = HomeserverFaults(only=frozenset({"send"}), hang=True)
        await call.leave(client, "PARTICIPANT_REMOVED")
        await until_so(call, lambda: homeserver.model.answers["send", 0] == 1, "a send is under way")
        await call.daemon.kill()
        homeserver.model.faults = HomeserverFaults()
        await call.daemon.start()
        assert await call.ended(client) == "sent"
        assert event_of(homeserver, client).end is End.SENT
        assert homeserver.model.answers["send", 404] == 0


@pytest.mark.parametrize("answered", [pytest.param(True, marks=pytest.mark.slow), False])
async def test_killed_between_a_delegation_and_its_verification(tmp_path: Path, answered: bool) -> None:
    """An acknowledged delegation is verified after the next start. A client that was not answered asks again, and there is one delegation."""
    async with open_call(tmp_path, delegations={"verify_timeout": "100ms" if answered else "60s"}) as (call, homeserver):
        anna = await homeserver.register("anna")
        await call.open(anna)
        client = call.client(anna)
        await call.schedule(client)
        homeserver.model.faults = HomeserverFaults(only=frozenset({"restart"}), hang=True)
        asking = asyncio.create_task(call.delegate(client))
        await until_so(call, lambda: homeserver.model.answers["restart", 0] >= 1, "the verification is under way")
        if answered:
            status, answer = await asking
            assert (status, answer["verified"]) == (201, False)
        await call.daemon.kill()
        if not answered:
            with pytest.raises(aiohttp.ClientError):
                await asking
        homeserver.model.faults = HomeserverFaults()
        await call.daemon.start()
        if not answered:
            status, _ = await call.delegate(client)
            assert status == 200  # it had been kept already
        await call.shows(client, lambda shown: shown["verified"], "verified")
        await call.sfu.call("join_with_token", client.token)
        await call.shows(client, lambda shown: shown["participant"]["presence"] == "connected", "connected")
        assert await call.metric("sfu_delegate_delegated_events") == 1
        await call.leave(client)
        assert await call.ended(client) == "sent"


async def test_departures_that_nobody_told_of_are_found_by_looking_after_a_start(tmp_path: Path) -> None:
    """Killed, and every webhook of the meantime is lost: the next start looks at all rooms at once. Who is still there stays."""
    async with open_call(tmp_path, presence=SELDOM) as (call, homeserver):
        people = [await homeserver.register(f"user{n}") for n in range(4)]
        await call.open(*people)
        left, *others = [await call.join(one) for one in people]
        room_gone = others.pop()
        await killed_without_a_look_planned(call)
        await call.sfu.call("delivery_faults", drop=1.0)
        await call.leave(left)
        await call.sfu.call("vanish", ROOM, room_gone.identity)
        await call.leave(room_gone, "CONNECTION_TIMEOUT")
        await call.sfu.call("delivery_faults", drop=0.0)
        await call.daemon.start()
        assert await call.ended(left) == "sent"
        assert await call.ended(room_gone) == "sent"
        for one in others:
            await call.shows(one, lambda shown: shown["participant"]["presence"] == "connected", "connected")
            assert event_of(homeserver, one).end is End.PENDING


async def test_somebody_who_is_waited_for_does_not_put_off_the_look_after_a_start(tmp_path: Path) -> None:
    """A room in which a look is planned for the end of a join timeout is looked at after a start like all others."""
    changes: dict[str, Any] = {"presence": {"first_looks": [], "join_timeout": "1h"}, "departures": {"ROOM_MISSING": {"look_after": "300ms"}}}
    async with open_call(tmp_path, **changes) as (call, homeserver):
        anna, never = await homeserver.register("anna"), await homeserver.register("never")
        await call.open(anna, never)
        there, absent = call.client(anna), call.client(never)
        for client in (there, absent):
            await call.schedule(client)
            assert (await call.delegate(client))[0] == 201
        await call.sfu.call("join_with_token", there.token)
        await call.shows(there, lambda shown: shown["participant"]["presence"] == "connected", "connected")
        await call.daemon.kill()
        await call.sfu.call("delivery_faults", drop=1.0)
        await call.leave(there)
        await call.daemon.start()
        assert await call.ended(there) == "sent"
        assert event_of(homeserver, absent).end is End.PENDING


async def test_a_room_that_ended_while_the_daemon_was_down_is_found_by_looking(tmp_path: Path) -> None:
    """Everybody left and the room was closed, and no webhook came through: all events are sent all the same."""
    async with open_call(tmp_path, presence=SELDOM, departures={"ROOM_MISSING": {"look_after": "300ms"}}) as (call, homeserver):
        people = [await homeserver.register(f"user{n}") for n in range(3)]
        await call.open(*people)
        clients = [await call.join(one) for one in people]
        await killed_without_a_look_planned(call)
        await call.sfu.call("delivery_faults", drop=1.0)
        await call.sfu.call("delete_room", ROOM)
        await call.daemon.start()
        for client in clients:
            assert await call.ended(client) == "sent"


def restarted_since(homeserver: StandIn, counted: int) -> bool:
    """Was somebody restarted since that count?"""
    return homeserver.model.answers["restart", 200] > counted


async def test_killed_again_and_again_during_a_call(tmp_path: Path, database: str) -> None:
    """A daemon that is killed soon after each start keeps everybody in the call all the same.

    On PostgreSQL, what each of them had claimed waits for the end of its lease, so delays have to be longer than these.
    """
    delay_ms = 10_000 if database == "sqlite" else 40_000
    async with open_call(tmp_path, restart={"at": 1500 / delay_ms, "spread": 500 / delay_ms}) as (call, homeserver):
        people = [await homeserver.register(f"user{n}") for n in range(6)]
        await call.open(*people)
        clients = [await call.join(one, delay_ms) for one in people]
        for _ in range(2):
            counted = homeserver.model.answers["restart", 200]
            await until_so(call, partial(restarted_since, homeserver, counted), "somebody is restarted")
            await call.daemon.kill()
            await call.daemon.start()
        assert {event_of(homeserver, client).end for client in clients} == {End.PENDING}
        await call.sfu.call("delete_room", ROOM)
        for client in clients:
            assert await call.ended(client) == "sent"
        assert homeserver.model.answers["send", 404] == 0


# ── an event that the homeserver ends by itself ──


async def test_an_event_that_is_gone_while_its_participant_is_connected_is_told_to_whoever_asks(tmp_path: Path) -> None:
    """Retrying cannot help: it is counted, in the history with its reason, in the answer to GET, and in the log."""
    async with open_site(tmp_path) as site:
        alice = await site.participant(delay_ms=2000)
        given = await site.in_call(alice)
        await site.homeserver.call("manage", alice.delay_id, "cancel")
        assert await site.outcomes(given) == ["lost"]
        shown = await site.show(given)
        assert shown["participant"]["presence"] == "connected"
        told = [line["what"] for line in shown["history"]]
        assert told[-2:] == ["vanished", "lost"]
        assert "404" in next(line["detail"] for line in shown["history"] if line["what"] == "vanished")
        assert await site.count("sfu_delegate_events_lost_while_connected_total", homeserver="hs.test") == 1
        assert await site.count("sfu_delegate_delegated_events_ended_total", outcome="lost") == 1
        assert [line["what"] for line in site.lines("delegation")][-2:] == ["vanished", "lost"]
        restarts = site.homeserver.model.answers["restart", 404]
        await site.in_call(await site.participant("bob"))
        assert site.homeserver.model.answers["restart", 404] == restarts == 1


# ── the system clock ──


class SystemClock:
    """The machine's clocks, as the daemon's modules see them: somebody may set the one that can be set."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self) -> None:
        self.step = 0.0

    def time(self) -> float:
        """Unix seconds, as far as the machine knows."""
        return time.time() + self.step

    @staticmethod
    def clock_gettime(which: int) -> float:
        """Nobody can set this one."""
        return time.clock_gettime(which)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> SystemClock:
    """The clock of the machine on which the daemon runs."""
    clock = SystemClock()
    monkeypatch.setattr("sfu_delegate.daemon.clock.time", clock)
    monkeypatch.setattr("sfu_delegate.daemon.serve.Services", partial(Services, clock=clock.time))
    monkeypatch.setattr("sfu_delegate.livekit.room_service.time", clock)
    return clock


STEPS = [-5 * 3600.0, pytest.param(5 * 3600.0, marks=pytest.mark.slow), pytest.param(400 * 86400.0, marks=pytest.mark.slow)]


@pytest.mark.parametrize("step", STEPS)
async def test_the_clock_is_set_while_it_runs(tmp_path: Path, system: SystemClock, step: float) -> None:
    """The SFU is on the same machine: no event runs out, restarts go on as before, and departures are acted upon."""
    # The SFU model takes sessions of the future for unfinished, and tells of an abort when one ends: there is a wait for a new attempt.
    async with open_site(tmp_path, presence={"join_timeout": "1s"}) as site:
        site.sfu._clock = system.time
        alice, bob = await site.participant(delay_ms=2000), await site.participant("bob")
        given, other = await site.in_call(alice), await site.in_call(bob)
        counted = len(site.event(alice).restarted_at)
        system.step = step
        site.sfu.nudge()
        await site.restarted(alice, counted + 3)
        restarts = site.event(alice).restarted_at[counted - 1 :]
        assert min(b - a for a, b in pairwise(restarts)) >= 0.15 * 2.0  # not all at once, either; the first one comes early
        assert site.event(alice).end is site.event(bob).end is End.PENDING
        await site.leave(bob)
        await site.ended(bob)
        assert await site.outcomes(other) == ["sent"]
        assert (await site.show(given))["participant"]["presence"] == "connected"
        assert await site.count("sfu_delegate_events_lost_while_connected_total") == 0


@pytest.mark.parametrize("step", STEPS)
async def test_the_clock_is_set_on_the_daemons_machine_only(tmp_path: Path, system: SystemClock, step: float) -> None:
    """It can neither believe webhooks nor ask the SFU: everybody counts as connected, and it goes on by itself when the clock is right again."""
    async with open_site(tmp_path) as site:
        alice = await site.participant(delay_ms=2000)
        given = await site.in_call(alice)
        system.step = step
        await site.sfu.call("join", alice.room, "somebody-else", active_after=0)
        await until(lambda: site.lines("webhook_refused"), "a webhook is refused")
        await site.restarted(alice, len(site.event(alice).restarted_at) + 2)
        assert (await site.show(given))["participant"]["presence"] == "connected"
        system.step = 0.0
        await site.leave(alice)
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]


@pytest.mark.parametrize("step", STEPS)
async def test_the_clock_is_set_while_the_daemon_is_down(tmp_path: Path, system: SystemClock, step: float, database: str) -> None:
    """No stored time can be trusted: all events are restarted soon after the start, people stay connected, and departures end as always.

    PostgreSQL has a clock of its own, which is the daemon's: nothing is wrong with the stored times.
    """
    async with open_site(tmp_path) as site:
        site.sfu._clock = system.time
        alice, bob, carol = [await site.participant(name, delay_ms=GENEROUS_MS) for name in ("alice", "bob", "carol")]
        given, other, away = [await site.in_call(who) for who in (alice, bob, carol)]
        site.homeserver.model.faults.status = 503
        await site.leave(carol, "PARTICIPANT_REMOVED")
        await site.present(away, "gone")
        await site.stop()
        site.homeserver.model.faults.status = None
        counted = len(site.event(alice).restarted_at)
        system.step = step
        await site.start()
        assert len(site.lines("clock_was_set")) == (1 if database == "sqlite" else 0)
        if database == "sqlite":
            await site.restarted(alice, counted + 1)
        await site.ended(carol)
        assert await site.outcomes(away) == ["sent"]
        assert (await site.show(given))["participant"]["presence"] == "connected"
        await site.leave(bob)
        await site.ended(bob)
        assert await site.outcomes(other) == ["sent"]
        assert site.event(alice).end is End.PENDING
        assert await site.count("sfu_delegate_events_lost_while_connected_total") == 0


GENEROUS_MS = round(GENEROUS * 2000)
