"""Who leaves the Matrix room leaves its call: a whole daemon as the application service of a homeserver that passes its users' requests on."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sfu_delegate.daemon import membership
from sfu_delegate.livekit import names
from sfu_delegate.sandbox.homeserver import End, HomeserverModel

from tests import stores
from tests.integration.daemon import MATRIX_ROOM, MEMBER, SERVER, Participant, Site, merged, open_site, until

pytestmark = pytest.mark.usefixtures("database")

HS_TOKEN = "hs-token-that-nobody-else-may-see"
GET_TOKEN = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token"
DELAY = 40_000  # milliseconds
ROOM = names.room_name(MATRIX_ROOM)  # LiveKit's
SELDOM: dict[str, Any] = {"membership": {"interval": "1h"}}
"""Whatever happens does not happen because of the interval."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked again is asked again soon. The rules are the same."""
    monkeypatch.setattr(membership, "CONFIRMED_AFTER", 0.2)
    monkeypatch.setattr(membership, "AGAIN", 0.3)


@asynccontextmanager
async def enforcing(directory: Path, **changes: Any) -> AsyncIterator[Site]:
    """A daemon that enforces membership, and is the application service of its homeserver."""
    settings = merged({"membership": {"enforce": True, "interval": "10s"}}, changes)
    async with open_site(directory, started=False, homeserver=HomeserverModel(SERVER, seed=1, limit=None), **settings) as site:
        as_token = site.homeserver.model.application_service()
        site.of_homeserver = {"as_token": as_token, "hs_token": HS_TOKEN}
        site.secrets |= {as_token, HS_TOKEN}
        site.homeserver.set_proxy(site.url, HS_TOKEN)
        await site.start()
        yield site


def user_of(name: str) -> str:
    return f"@{name}:{SERVER}"


async def get_token(site: Site, name: str) -> tuple[int, dict[str, Any]]:
    """A client asks its homeserver for an access token; the answer."""
    access_token = site.homeserver.model.register(name)
    site.secrets.add(access_token)
    body = {"url": site.sfu.url.replace("http", "ws"), "room_id": MATRIX_ROOM, "slot_id": names.ROOM_SLOT, "member_id": f"member-{name}"}
    async with site.http.post(site.homeserver.url + GET_TOKEN, json=body, headers={"Authorization": f"Bearer {access_token}"}) as response:
        return response.status, await response.json()


async def admitted(site: Site, name: str = "alice") -> Participant:
    """Somebody who is in the Matrix room, has scheduled its leave event, and was given an access token."""
    user = user_of(name)
    await site.homeserver.call("join", user, MATRIX_ROOM)
    delay_id = await site.homeserver.call("schedule", user, MATRIX_ROOM, MEMBER, f"_{name}", DELAY, {})
    status, answer = await get_token(site, name)
    assert status == 200, answer
    token = answer["jwt"]
    site.secrets |= {delay_id, token, token.rpartition(".")[2]}
    return Participant(names.member_identity(user, f"member-{name}"), ROOM, delay_id, DELAY, token)


async def connects(site: Site, who: Participant) -> None:
    """It joins the call with its token."""
    joined = await site.sfu.call("join_with_token", who.token)
    assert (joined.room, joined.identity) == (who.room, who.identity)


async def leaves_matrix(site: Site, name: str = "alice") -> None:
    await site.homeserver.call("leave", user_of(name), MATRIX_ROOM)


def is_in_call(site: Site, who: Participant) -> bool:
    room = site.sfu.model.rooms.get(who.room)
    return room is not None and who.identity in room.sessions


async def out(site: Site, who: Participant) -> None:
    """Wait until it is not in the call any more."""
    await until(lambda: not is_in_call(site, who), "it is removed from the call")


async def checked(site: Site, result: str, times: float) -> None:
    """Wait until the homeserver was asked so often whether somebody is in the room, with this result."""

    async def so() -> bool:
        return await site.count("sfu_delegate_membership_checks_total", homeserver=SERVER, result=result) >= times

    await until(so, f"{times:g} checks: {result}")


async def removals(site: Site) -> float:
    return await site.count("sfu_delegate_participants_removed_total", sfu="main")


def check_privacy(site: Site) -> None:
    """Who is in which Matrix room is in no line of the log."""
    log = site.log.getvalue()
    for private in (MATRIX_ROOM, *map(user_of, ("alice", "bob"))):
        assert private not in log


async def test_who_leaves_the_matrix_room_is_removed_from_its_call(tmp_path: Path) -> None:
    """Within the interval. Who stays there stays in the call, and whoever comes back with the old token is removed again."""
    async with enforcing(tmp_path) as site:
        alice, bob = await admitted(site), await admitted(site, "bob")
        await until(lambda: site.lines("application_service_works"), "the application service works")
        for who in (alice, bob):
            await connects(site, who)
        await checked(site, "joined", 2)
        assert is_in_call(site, alice)
        assert is_in_call(site, bob)
        await leaves_matrix(site)
        await out(site, alice)
        (line,) = site.lines("participant_removed")
        assert (line["sfu"], line["room"], line["identity"], line["homeserver"]) == ("main", ROOM, alice.identity, SERVER)
        assert await removals(site) == 1
        await connects(site, alice)
        await out(site, alice)
        assert is_in_call(site, bob)
        await until(lambda: len(site.lines("participant_removed")) == 2, "the second removal is logged")
        assert await removals(site) == 2
        check_privacy(site)


async def test_who_has_left_the_matrix_room_is_removed_whenever_it_joins(tmp_path: Path) -> None:
    """At once, however long the interval is: the webhook says that it has joined."""
    async with enforcing(tmp_path, **SELDOM) as site:
        alice, bob = await admitted(site), await admitted(site, "bob")
        await connects(site, bob)
        await leaves_matrix(site)
        for times in (1, 2, 3):
            await connects(site, alice)
            await out(site, alice)
            await checked(site, "not_joined", 2 * times)
        await site.homeserver.call("join", user_of("alice"), MATRIX_ROOM)
        before = await site.count("sfu_delegate_membership_checks_total", result="joined")
        await connects(site, alice)
        await checked(site, "joined", before + 1)
        assert is_in_call(site, alice)
        assert is_in_call(site, bob)
        assert await removals(site) == 3


async def test_who_leaves_the_matrix_room_while_the_daemon_is_away_is_removed_by_the_next(tmp_path: Path) -> None:
    """It knows to whom tokens were given, and asks of all of them; afterwards the old token is of no use either."""
    async with enforcing(tmp_path, **SELDOM) as site:
        alice, bob = await admitted(site), await admitted(site, "bob")
        for who in (alice, bob):
            await connects(site, who)
        await checked(site, "joined", 2)
        await site.stop()
        await leaves_matrix(site)
        assert is_in_call(site, alice)
        await site.start()
        await out(site, alice)
        await checked(site, "joined", 1)
        await connects(site, alice)
        await out(site, alice)
        assert is_in_call(site, bob)
        check_privacy(site)


async def test_nobody_gets_a_token_who_is_not_in_the_matrix_room(tmp_path: Path) -> None:
    """So that there is nobody to be removed."""
    async with enforcing(tmp_path) as site:
        await site.homeserver.call("join", user_of("bob"), MATRIX_ROOM)
        status, answer = await get_token(site, "alice")
        assert (status, answer["errcode"]) == (403, "M_FORBIDDEN")
        assert site.database.query("SELECT * FROM admission") == []


async def test_a_homeserver_that_cannot_tell_removes_nobody(tmp_path: Path) -> None:
    """MSC4502 was switched off: a warning says so, with what to do. When it is there again, a reload is enough."""
    async with enforcing(tmp_path, **SELDOM) as site:
        alice = await admitted(site)
        await site.homeserver.call("set", msc4502=False)
        await leaves_matrix(site)
        await connects(site, alice)
        await until(lambda: site.lines("membership_not_checked"), "a warning")
        (line,) = site.lines("membership_not_checked")
        assert (line["level"], line["homeserver"], line["sfu"]) == ("warning", SERVER, "main")
        assert "msc4502_enabled" in line["problem"]
        site.daemon.reload()
        await checked(site, "cannot_tell", 2)
        assert is_in_call(site, alice)
        assert await removals(site) == 0
        status, answer = await get_token(site, "alice")
        assert (status, answer["errcode"]) == (503, "M_UNKNOWN")
        await site.homeserver.call("set", msc4502=True)
        site.daemon.reload()
        await out(site, alice)
        check_privacy(site)


@stores.only_sqlite
@pytest.mark.parametrize("fault", [{"down": True}, {"status": 500}, {"html": 502}, {"garbage": True}, {"close": True}])
async def test_a_homeserver_that_fails_removes_nobody(tmp_path: Path, fault: dict[str, Any]) -> None:
    """It is asked again, until it says what is so."""
    async with enforcing(tmp_path, **SELDOM) as site:
        alice = await admitted(site)
        await leaves_matrix(site)
        await site.homeserver.call("faults", **fault)
        await connects(site, alice)
        await checked(site, "unavailable", 3)
        assert is_in_call(site, alice)
        assert await removals(site) == 0
        assert len(site.lines("membership_not_checked")) == 1
        await site.homeserver.call("faults", **{name: None if name in {"status", "html"} else False for name in fault})
        await out(site, alice)


@stores.only_sqlite
async def test_an_sfu_that_fails_is_asked_again(tmp_path: Path) -> None:
    """Until whoever does not belong there is removed."""
    async with enforcing(tmp_path, **SELDOM) as site:
        alice = await admitted(site)
        await leaves_matrix(site)
        await site.sfu.call("faults", error=503)
        await connects(site, alice)
        await checked(site, "not_joined", 4)
        assert is_in_call(site, alice)
        await site.sfu.call("faults", error=None)
        await out(site, alice)
        await until(lambda: site.lines("participant_removed"), "the removal is logged")
        assert await removals(site) == 1


async def test_the_delegation_of_somebody_who_is_removed_ends(tmp_path: Path) -> None:
    """As with anybody who leaves the call; that of somebody who stays goes on."""
    async with enforcing(tmp_path, **SELDOM) as site:
        alice, bob = await admitted(site), await admitted(site, "bob")
        given = {who: await site.delegated(who) for who in (alice, bob)}
        for who in (alice, bob):
            await connects(site, who)
            await site.present(given[who], "connected")
        await leaves_matrix(site)
        site.daemon.reload()
        await out(site, alice)
        await site.ended(alice, End.DROPPED)  # who is not in the room cannot send there
        assert await site.outcomes(given[alice]) == ["rejected"]
        assert (await site.show(given[bob]))["participant"]["presence"] == "connected"
        assert site.event(bob).end is End.PENDING


async def test_it_is_switched_on_by_a_reload(tmp_path: Path) -> None:
    """Nobody is removed before. Of those to whom tokens were given by then nothing is known; of the others it is."""
    off = merged(SELDOM, {"membership": {"enforce": False}})
    async with enforcing(tmp_path, **off) as site:
        alice = await admitted(site)
        await leaves_matrix(site)
        await connects(site, alice)
        assert site.database.query("SELECT * FROM admission") == []
        site.changes = merged(site.changes, {"membership": {"enforce": True}})
        site.daemon.reload()
        bob = await admitted(site, "bob")
        await leaves_matrix(site, "bob")
        await connects(site, bob)
        await out(site, bob)
        assert is_in_call(site, alice)
        site.changes = merged(site.changes, {"membership": {"enforce": False}})
        answers = site.homeserver.model.answers
        asked = answers["is_joined", 200] + 1
        site.daemon.reload()
        await until(lambda: answers["is_joined", 200] == asked, "the reload has asked whether the application service works")
        await connects(site, bob)
        carol = await admitted(site, "carol")
        given = await site.delegated(carol)
        await connects(site, carol)
        await site.present(given, "connected")  # what came before it has come
        assert answers["is_joined", 200] == asked + 1  # for carol's token
        assert is_in_call(site, bob)
