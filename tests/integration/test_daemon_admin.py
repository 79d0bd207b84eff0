"""The operator's API of a running daemon: over the Unix socket and TCP, with and without a token, on both databases."""

import asyncio
import socket
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sfu_delegate.daemon import inspecting
from sfu_delegate.daemon.serve import CannotStart, _bound_to
from sfu_delegate.delegation.model import DelayedEvent, Note
from sfu_delegate.livekit.names import room_name
from sfu_delegate.observe import story
from sfu_delegate.observe.logs import short
from sfu_delegate.operate.admin import AdminListener, CannotAsk, Refused
from sfu_delegate.sandbox.homeserver import End

from tests.integration.daemon import MATRIX_ROOM, SERVER, Site, broken_database, found, open_site

pytestmark = pytest.mark.usefixtures("database")

TOKEN = "the-admin-token-that-nobody-else-may-see"


def listener(site: Site, *, token: str | None = None) -> AdminListener:
    return AdminListener("127.0.0.1", site.daemon.admin_port, token=token)


async def get(at: AdminListener, path: str, **query: str) -> Any:
    return await asyncio.to_thread(at.get, path, query)


async def post(at: AdminListener, path: str) -> Any:
    return await asyncio.to_thread(at.post, path)


def over_socket(path: Path) -> dict[str, Any]:
    return {"admin": {"socket": str(path)}}


# ── questions ──


async def test_the_status_tells_how_the_daemon_is(tmp_path: Path) -> None:
    """Who is connected, what the homeserver and the SFU are like, and how the two promises are kept."""
    async with open_site(tmp_path) as site:
        alice, bob = await site.participant("alice"), await site.participant("bob")
        await site.in_call(alice)
        left = await site.in_call(bob)
        await site.leave(bob)
        await site.done(left)
        status = await get(listener(site), "/status")
    assert (status["status"], status["phase"], status["causes"]) == ("ok", "running", [])
    assert status["events"]["states"]["live"] == status["events"]["live_by_presence"]["connected"] == 1
    promises = status["promises"]
    assert (promises["lost_while_connected"], promises["departures"], promises["ended"]) == (0, 1, {"sent": 1})
    assert 0 < promises["disconnect_to_end_p50_s"] <= promises["disconnect_to_end_p99_s"]
    assert [(server["name"], server["problem"], server["events"]) for server in status["homeservers"]] == [(SERVER, None, 1)]
    assert [(sfu["name"], sfu["webhooks"] >= 4, sfu["problem"]) for sfu in status["sfus"]] == [("main", True, None)]
    database = status["database"]
    assert (database["problem"], database["reading_problem"], database["events"], database["finished"], database["rooms"]) == (None, None, 2, 1, 1)


async def test_delegations_are_found_by_what_is_known_of_them(tmp_path: Path) -> None:
    """By room, user, homeserver, state, presence, outcome and age; the newest first, page by page."""
    async with open_site(tmp_path) as site:
        alice, bob = await site.participant("alice"), await site.participant("bob")
        first, second = await site.in_call(alice), await site.in_call(bob)
        await site.leave(bob)
        await site.done(second)
        at = listener(site)

        async def ids(**query: str) -> list[str]:
            return [event["id"] for event in (await get(at, "/delegations", **query))["events"]]

        both = [second["id"], first["id"]]
        assert await ids() == await ids(room="call") == await ids(homeserver=SERVER, newer_than_s="3600") == both
        assert await ids(open="true") == await ids(presence="connected") == await ids(state="live,ending") == [first["id"]]
        assert await ids(open="false") == await ids(outcome="sent") == [second["id"]]
        assert await ids(room="no-such-room") == await ids(user="@nobody:hs.test") == await ids(older_than_s="3600") == []
        assert await ids(user="alice") == [first["id"]]  # who has no user is known by its identity
        page = await get(at, "/delegations", limit="1")
        assert [event["id"] for event in page["events"]] == both[:1]
        assert await ids(before=str(page["before"])) == both[1:]
        rooms = await get(at, "/rooms")
    assert [(room["sfu"], room["room"], room["participants"]["connected"]) for room in rooms["rooms"]] == [("main", "call", 1)]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"state": "happy"}, "state cannot be happy: it is one of live"),
        ({"rooom": "call"}, "rooom is no parameter here"),
        ({"limit": "0"}, "limit must be from 1 to 1000"),
        ({"older_than_s": "yesterday"}, "older_than_s must be a whole number"),
        ({"open": "maybe"}, "open must be true or false"),
        ({"room": "\x00"}, "room must be a text of 1 to 1000 characters, without NUL"),
    ],
)
async def test_a_question_that_cannot_be_understood_is_refused(tmp_path: Path, query: dict[str, str], said: str) -> None:
    """A filter that is not understood would show too much."""
    async with open_site(tmp_path) as site:
        with pytest.raises(Refused, match=said) as refused:
            await get(listener(site), "/delegations", **query)
        assert (await site.admin("/admin/v1/delegations?room=a&room=b")).status == 400
    assert (refused.value.status, refused.value.errcode) == (400, "M_INVALID_PARAM")


async def test_names_that_clients_chose_can_be_asked_for(tmp_path: Path) -> None:
    """Whatever they have in them: a page of rooms goes on behind the one that has it, too."""
    async with open_site(tmp_path) as site:
        for room in ("a\x1b[2J\u202e", "b"):
            await site.in_call(await site.participant("alice", room))
        at = listener(site)
        first = await get(at, "/rooms", limit="1")
        second = await get(at, "/rooms", limit="1", after_sfu=first["after_sfu"], after=first["after"])
        assert [room["room"] for room in (*first["rooms"], *second["rooms"])] == ["a\x1b[2J\u202e", "b"]
        assert len((await get(at, "/explain", room="a\x1b[2J\u202e"))["participants"]) == 1


async def test_a_status_that_is_not_ok_has_a_cause(tmp_path: Path) -> None:
    """The database, too, is told with what its failure does."""
    async with open_site(tmp_path) as site:
        with broken_database(site):
            status = await get(listener(site), "/status")
    assert status["status"] == "unavailable"
    assert [cause.partition(":")[0] for cause in status["causes"]] == ["The database takes nothing"]


async def test_a_delegation_tells_its_story(tmp_path: Path) -> None:
    """From the delegation to the goodbye, in sentences; found by its id, and by the number that logs have."""
    async with open_site(tmp_path) as site:
        alice = await site.participant("alice")
        given = await site.in_call(alice)
        await site.leave(alice)
        await site.done(given)
        at = listener(site)
        shown = await get(at, f"/delegations/{given['id']}")
        row = shown["events"][0]["row"]
        assert await get(at, f"/delegations/{row}") == shown | {"now_ts": pytest.approx(shown["now_ts"], abs=60_000)}
    assert [line["what"] for line in shown["story"]] == ["delegated", "verified", "connected", "away", "gone", "ending", "sent"]
    assert "hung up" in shown["story"][3]["sentence"]
    assert alice.delay_id not in str(shown)
    assert shown["events"][0]["delay_id_hint"] == short(alice.delay_id)


async def test_a_room_is_explained_by_its_people(tmp_path: Path) -> None:
    """Each participant with what happened to it; a Matrix room id stands for its call's room at the SFU."""
    async with open_site(tmp_path) as site:
        room = room_name(MATRIX_ROOM)
        await site.in_call(await site.participant("alice", room))
        await site.in_call(await site.participant("bob", room))
        at = listener(site)
        explained = await get(at, "/explain", room=MATRIX_ROOM)
        by_name = await get(at, "/explain", room=room)
        assert [person["story"] for person in by_name["participants"]] == [person["story"] for person in explained["participants"]]
        one = await get(at, "/explain", room=MATRIX_ROOM, user="bob")
        nobody = await get(at, "/explain", room="!other:hs.test")
        with pytest.raises(Refused, match="name the room"):
            await get(at, "/explain")
    assert [person["identity"] for person in explained["participants"]] == ["alice", "bob"]
    assert [(where["room"], where["participants"]["connected"]) for where in explained["rooms"]] == [(room, 2)]
    assert all(person["events"][0]["sentence"].startswith("In the call") for person in explained["participants"])
    assert [person["identity"] for person in one["participants"]] == ["bob"]
    assert (nobody["participants"], nobody["complete"]) == ([], True)
    assert nobody["searched"] == ["!other:hs.test", room_name("!other:hs.test")]


async def test_the_status_is_told_while_too_many_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what only the database knows."""
    monkeypatch.setattr(inspecting, "WAITING_MOST", 0)
    async with open_site(tmp_path) as site:
        status = await get(listener(site), "/status")
        with pytest.raises(Refused, match="Too many questions"):
            await get(listener(site), "/rooms")
    assert (status["database"]["events"], status["database"]["reading_problem"]) == (None, "Too many questions wait for the database already.")


async def test_stories_are_put_together_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Webhooks wait for no story, however long it is; and each participant's is made of its own lines."""
    threads, told = [], []
    tell = story.tell

    def watched(rows: Sequence[DelayedEvent], notes: Sequence[Note]) -> list[story.Line]:
        threads.append(threading.current_thread())
        told.append({row.id for row in rows} == {note.event for note in notes})
        return tell(rows, notes)

    monkeypatch.setattr(story, "tell", watched)
    async with open_site(tmp_path) as site:
        given = [await site.in_call(await site.participant(name)) for name in ("alice", "bob")]
        at = listener(site)
        assert len((await get(at, "/explain", room="call"))["participants"]) == 2
        await get(at, f"/delegations/{given[0]['id']}")
    assert threading.main_thread() not in threads
    assert told == [True, True, True]


async def test_a_database_that_hangs_when_it_is_read_does_not_keep_the_operator_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status tells it, with all that it knows without the database; and other questions are told it, too."""
    monkeypatch.setattr(inspecting, "ANSWERED_WITHIN", 0.2)
    released = threading.Event()
    monkeypatch.setattr(inspecting.Inspecting, "_read", lambda *_: released.wait())
    async with open_site(tmp_path) as site:
        try:
            await site.in_call(await site.participant("alice"))
            status = await get(listener(site), "/status")
            for path in ("/delegations", "/rooms", "/delegations/1"):
                with pytest.raises(Refused, match="did not answer the question") as refused:
                    await get(listener(site), path)
                assert refused.value.status == 503
        finally:
            released.set()
    assert (status["status"], status["events"]["states"]["live"]) == ("ok", 1)
    assert (status["database"]["events"], "did not answer" in status["database"]["reading_problem"]) == (None, True)


async def test_the_page_shows_what_the_daemon_does(tmp_path: Path) -> None:
    """Over both ways: who is in the call, and the story of one who was."""
    path = tmp_path / "admin.sock"
    async with open_site(tmp_path, **over_socket(path)) as site:
        alice, bob = await site.participant("alice"), await site.participant("bob")
        await site.in_call(alice)
        given = await site.in_call(bob)
        await site.leave(bob)
        await site.done(given)
        for at in (listener(site), AdminListener(socket=str(path))):
            overview, room, delegation, wrong = [
                (await asyncio.to_thread(at.ask, "GET", where)).body for where in ("/", "/rooms/main/call", f"/delegations/{given['id']}", "/nothing")
            ]
            assert "All is well" in overview
            assert ">alice<" in room
            assert "The homeserver sent the leave event" in delegation
            assert alice.delay_id not in overview + room + delegation
            assert bob.delay_id not in delegation
            assert wrong["errcode"] == "M_UNRECOGNIZED"


# ── changes ──


async def test_the_operator_has_a_delegation_ended(tmp_path: Path) -> None:
    """Its leave event is sent, though its participant is connected; the log says who had it done."""
    path = tmp_path / "admin.sock"
    async with open_site(tmp_path, **over_socket(path)) as site:
        alice = await site.participant("alice")
        given = await site.in_call(alice)
        done = await post(AdminListener(socket=str(path)), f"/delegations/{given['id']}/end")
        await site.ended(alice)
        await site.done(given)
        shown = await get(listener(site), f"/delegations/{given['id']}")
        (line,) = site.lines("operator_ended")
    assert (done["changed"], done["events"][0]["state"]) == (1, "ending")
    assert [line["what"] for line in shown["story"]][-3:] == ["gone", "ending", "sent"]
    assert "the operator had it ended" in shown["story"][-3]["sentence"]
    assert (line["delegation"], line["events"]) == (given["id"], 1)
    assert line["by"].startswith("socket, by user ")


async def test_a_change_that_may_not_have_been_kept_is_logged(tmp_path: Path) -> None:
    """With who wanted it, and what the trouble was: a database that fails may have kept it all the same."""
    path = tmp_path / "admin.sock"
    async with open_site(tmp_path, **over_socket(path)) as site:
        given = await site.in_call(await site.participant("alice"))
        with broken_database(site), pytest.raises(Refused) as refused:
            await post(AdminListener(socket=str(path)), f"/delegations/{given['id']}/end")
        (line,) = site.lines("operator_ended")
    assert refused.value.status == 503
    assert (line["delegation"], "disk is full" in line["problem"], line["by"].startswith("socket")) == (given["id"], True, True)


async def test_the_operator_has_a_delegation_released(tmp_path: Path) -> None:
    """It is forgotten, and its event is still there at the homeserver."""
    path = tmp_path / "admin.sock"
    async with open_site(tmp_path, **over_socket(path)) as site:
        alice = await site.participant("alice")
        given = await site.in_call(alice)
        done = await post(AdminListener(socket=str(path)), f"/delegations/{given['id']}/release")
        assert site.event(alice).end is End.PENDING
        again = await post(AdminListener(socket=str(path)), f"/delegations/{given['id']}/release")
    assert (done["changed"], done["events"][0]["outcome"]) == (1, "withdrawn")
    assert again["changed"] == 0


async def test_there_is_nothing_to_end_where_nobody_delegated(tmp_path: Path) -> None:
    """404, with the reason that it might have; what is no id at all is told so."""
    path = tmp_path / "admin.sock"
    async with open_site(tmp_path, **over_socket(path)) as site:
        at = AdminListener(socket=str(path))
        for id, said in {"dlg_none": "no such delegation", "12345": "no such delegation", "abc": "no id", "%2e%2e": "no id", "'": "no id"}.items():
            with pytest.raises(Refused, match=said) as refused:
                await post(at, f"/delegations/{id}/end")
            assert refused.value.status == 404
        assert not site.lines("operator_ended")


# ── who may ask ──


async def test_over_tcp_without_a_token_questions_are_answered_and_nothing_is_changed(tmp_path: Path) -> None:
    """Whoever reaches loopback can look; to change anything takes the socket, or a token."""
    async with open_site(tmp_path) as site:
        given = await site.in_call(await site.participant("alice"))
        assert (await get(listener(site), "/delegations"))["events"]
        with pytest.raises(Refused, match=r"admin\.socket") as refused:
            await post(listener(site, token="anything"), f"/delegations/{given['id']}/end")
        assert refused.value.status == 403
        assert (await site.show(given))["state"] == "live"


async def test_a_page_of_a_stranger_cannot_read_it_under_a_name_of_its_own(tmp_path: Path) -> None:
    """DNS rebinding: what asks for this machine by a name is refused, where no token says who asks."""
    async with open_site(tmp_path) as site:
        url = f"http://127.0.0.1:{site.daemon.admin_port}"
        for host, status in (("evil.example", 403), ("evil.example:8081", 403), ("localhost:8081", 200), ("[::1]:8081", 200), ("10.0.0.7", 200)):
            async with site.http.get(f"{url}/admin/v1/status", headers={"Host": host}) as response:
                assert (host, response.status) == (host, status)
        async with site.http.get(f"{url}/metrics", headers={"Host": "sfu-delegate:8081"}) as response:
            assert response.status == 200


async def test_a_request_without_a_host_is_refused_without_asking_the_dns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HTTP/1.0 allows: the event loop must not wait for what this machine is called."""
    asked: list[str] = []

    def getfqdn(name: str = "") -> str:
        asked.append(name)
        return "localhost"

    monkeypatch.setattr(socket, "getfqdn", getfqdn)
    async with open_site(tmp_path) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.daemon.admin_port)
        writer.write(b"GET /admin/v1/status HTTP/1.0\r\n\r\n")
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.0 403 ")
    assert not asked


async def test_with_a_token_nothing_but_health_and_metrics_is_told_without_it(tmp_path: Path) -> None:
    """The token as a bearer token, or in a browser as the password; that one, which browsers send unasked, changes nothing."""
    async with open_site(tmp_path, admin={"token": TOKEN}) as site:
        site.secrets.add(TOKEN)
        given = await site.in_call(await site.participant("alice"))
        for token in (None, "wrong", TOKEN[:-1]):
            with pytest.raises(Refused, match="admin token is needed") as refused:
                await get(listener(site, token=token), "/status")
            assert refused.value.status == 401
            with pytest.raises(Refused):
                await post(listener(site, token=token), f"/delegations/{given['id']}/end")
        url = f"http://127.0.0.1:{site.daemon.admin_port}"
        for header in ("Bearer", "Bearer ", "Basic", "Basic =", "Basic " + "A" * 10, "Bearer \udcff", f"Digest {TOKEN}", TOKEN):
            async with site.http.get(f"{url}/admin/v1/status", headers={"Authorization": header}) as response:
                assert (header, response.status) == (header, 401)
        basic = aiohttp.encode_basic_auth("operator", TOKEN)
        async with site.http.get(f"{url}/admin/v1/status", headers={"Authorization": basic}) as response:
            assert response.status == 200
        async with site.http.get(f"{url}/admin/v1/status") as response:
            assert response.headers["WWW-Authenticate"].startswith("Basic ")
        async with site.http.post(f"{url}/admin/v1/delegations/{given['id']}/end", headers={"Authorization": basic}) as response:
            assert response.status == 401
        for path in ("/metrics", "/health/live", "/health/ready"):
            assert (await site.admin(path)).status == 200
        assert (await site.show(given))["state"] == "live"
        assert (await post(listener(site, token=TOKEN), f"/delegations/{given['id']}/end"))["changed"] == 1
        assert site.lines("operator_ended")[0]["by"].startswith("token, from 127.0.0.1")


async def test_the_socket_is_for_the_daemons_user_and_group(tmp_path: Path) -> None:
    """Nobody else may open it; one that a killed daemon left behind is replaced, one in use is not, and at the end it is taken away."""
    path = tmp_path / "admin.sock"
    async with open_site(tmp_path, **over_socket(path), started=False) as site:
        left = socket.socket(socket.AF_UNIX)
        left.bind(str(path))
        left.close()
        await site.start()
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert (await get(AdminListener(socket=str(path)), "/status"))["status"] == "ok"
        with pytest.raises(CannotStart, match="another process does"):
            _bound_to(path)
        await site.stop()
        assert not path.exists()
        await site.start()


async def test_only_the_socket(tmp_path: Path) -> None:
    """With `admin.tcp` off there is no other way."""
    path = tmp_path / "admin.sock"
    async with open_site(tmp_path, admin={"socket": str(path), "tcp": False}) as site:
        assert site.daemon.admin_port == 0
        assert (await asyncio.to_thread(AdminListener(socket=str(path)).ask, "GET", "/health/ready")).status == 200


async def test_a_daemon_that_is_not_there_is_told_with_a_remedy(tmp_path: Path) -> None:
    """No traceback, but where was asked, and what to look at."""
    for at, said in (
        (AdminListener("127.0.0.1", 1), "No daemon listens at http://127.0.0.1:1"),
        (AdminListener(socket=str(tmp_path / "none.sock")), "There is no socket"),
    ):
        with pytest.raises(CannotAsk, match=said):
            await get(at, "/status")


# ── webhooks that somebody waits for ──


async def test_a_webhook_about_a_room_that_was_made_for_it_is_shown(tmp_path: Path) -> None:
    """By its SFU; of other rooms none is kept."""
    async with open_site(tmp_path) as site:
        for room in ("sfu-delegate-doctor-1", "call"):
            await site.sfu.call("create_room", room)
        at = listener(site)

        async def came() -> list[Any]:
            return (await get(at, "/webhooks/sfu-delegate-doctor-1"))["webhooks"]  # type: ignore[no-any-return]

        webhooks = await found(came, "the webhook comes")
        assert [(webhook["sfu"], webhook["event"]) for webhook in webhooks] == [("main", "room_started")]
        assert (await get(at, "/webhooks/call"))["webhooks"] == []
