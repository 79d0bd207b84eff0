"""The main job, from a client's request to the homeserver's room: a whole daemon on loopback."""

import asyncio
from pathlib import Path

import pytest
from sfu_delegate.sandbox.homeserver import End

from tests.integration.daemon import MATRIX_ROOM, MEMBER, open_site, until

pytestmark = pytest.mark.usefixtures("database")


async def test_a_delayed_event_is_kept_alive_and_sent_when_its_participant_leaves(tmp_path: Path) -> None:
    """It is restarted while the participant is connected, well beyond its own delay, and sent after it left."""
    async with open_site(tmp_path) as site:
        alice = await site.participant(delay_ms=2000)
        given = await site.delegated(alice)
        assert given["state"] == "live"
        assert given["restart_interval_ms"] == 1500
        await site.join(alice)
        await site.restarted(alice, times=3)
        assert site.event(alice).end is End.PENDING
        assert (await site.present(given, "connected"))["delayed_events"][0]["restarts"] >= 2
        await site.leave(alice)
        event = await site.ended(alice)
        assert site.homeserver.model.state[MATRIX_ROOM][MEMBER, "_alice"].delay_id == alice.delay_id
        shown = await site.done(given)
        assert shown["delayed_events"][0]["outcome"] == "sent"
        assert [line["what"] for line in shown["history"]] == ["delegated", "verified", "connected", "away", "gone", "ending", "sent"]
        assert event.deadline > event.scheduled_at + event.delay
        assert await site.count("sfu_delegate_events_lost_while_connected_total") == 0


async def test_an_event_can_be_cancelled_at_the_departure_instead(tmp_path: Path) -> None:
    """`on_disconnect: cancel` cancels."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.delegated(alice, on_disconnect="cancel")
        await site.join(alice)
        await site.present(given, "connected")
        await site.leave(alice)
        await site.ended(alice, End.CANCELLED)
        assert await site.outcomes(given) == ["cancelled"]


async def test_all_events_of_a_delegation_are_ended(tmp_path: Path) -> None:
    """A participant may have several delayed events, each with its own delay."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        more = [await site.participant(delay_ms=delay_ms) for delay_ms in (50_000, 60_000)]
        given = await site.delegated(alice, *more)
        await site.join(alice)
        await site.present(given, "connected")
        await site.leave(alice)
        for who in (alice, *more):
            await site.ended(who)
        assert await site.outcomes(given) == ["sent"] * 3


async def test_a_crash_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that vanishes without a word is noticed by the SFU, and its event is sent."""
    monkeypatch.setattr("sfu_delegate.sandbox.sfu.SILENCE", (0.2, 0.3))
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        await site.sfu.call("vanish", alice.room, alice.identity)
        await site.ended(alice)
        assert (await site.done(given))["participant"]["reason"] == "CONNECTION_TIMEOUT"


@pytest.mark.parametrize("reason", ["PARTICIPANT_REMOVED", "ROOM_DELETED"])
async def test_a_removal_needs_no_look(tmp_path: Path, reason: str) -> None:
    """Who was removed is gone, even while the SFU cannot be asked."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        site.sfu.model.faults.error = 500
        await site.leave(alice, reason)
        await site.ended(alice)
        assert (await site.done(given))["participant"]["reason"] == reason


async def test_a_full_reconnect_never_sends(tmp_path: Path) -> None:
    """A second connection of the same identity takes over: DUPLICATE_IDENTITY, then `joined` of another sid. Nothing is sent, however often."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        looks = await site.count("sfu_delegate_looks_total")
        for _ in range(5):
            await site.join(alice)
        await until(lambda: site.sfu.model.backlog() == 0, "all webhooks are delivered")
        # The look after the last takeover would have been the one to end it.
        await site.present(given, "connected")
        bob = await site.participant("bob")
        await site.delegated(bob)  # makes the daemon look at the room

        async def looked() -> bool:
            return await site.count("sfu_delegate_looks_total") > looks

        await until(looked, "a look at the room")
        shown = await site.show(given)
        assert shown["participant"]["presence"] == "connected"
        assert site.event(alice).end is End.PENDING
        assert "ending" not in [line["what"] for line in shown["history"]]


async def test_a_reconnect_that_fails_is_a_departure(tmp_path: Path) -> None:
    """The old session ends with DUPLICATE_IDENTITY, and the new one is aborted: that is the last word, and the event is sent."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        await site.in_call(alice)
        await site.sfu.call("begin_join", alice.room, alice.identity)
        await site.sfu.call("abort", alice.room, alice.identity)
        await site.ended(alice)


async def test_a_browser_that_leaves_and_joins_anew_is_not_gone(tmp_path: Path) -> None:
    """`left CLIENT_INITIATED` and the `joined` of a new session within the time of the look: the same person."""
    async with open_site(tmp_path, departures={"CLIENT_INITIATED": {"look_after": "2s"}}) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        await site.leave(alice)
        await site.present(given, "away")
        await site.join(alice)
        await site.present(given, "connected")
        assert site.event(alice).end is End.PENDING


async def test_who_joined_before_the_delegation_is_found_by_a_look(tmp_path: Path) -> None:
    """No `joined` will come: a look shows the participant ACTIVE, and its departure is noticed."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        await site.join(alice)
        await until(lambda: site.sfu.model.backlog() == 0, "the webhook was delivered before")
        given = await site.delegated(alice)
        await site.present(given, "connected")
        await site.leave(alice)
        await site.ended(alice)


async def test_who_delegates_and_never_comes_is_given_up(tmp_path: Path) -> None:
    """After the join timeout a look decides: the event is sent, so that no ghost waits in the room."""
    async with open_site(tmp_path, presence={"join_timeout": "500ms", "first_looks": ["100ms"]}) as site:
        alice = await site.participant()
        given = await site.delegated(alice)
        await site.ended(alice)
        assert (await site.done(given))["participant"]["reason"] == "NEVER_JOINED"


async def test_a_short_first_session_does_not_end_the_delegation(tmp_path: Path) -> None:
    """Clients open a session that they drop again before the real one: the `left` or abort of it is not the last word."""
    async with open_site(tmp_path, presence={"unseen_departure": "3s"}) as site:
        alice = await site.participant()
        await site.sfu.call("begin_join", alice.room, alice.identity)
        given = await site.delegated(alice)
        await site.sfu.call("abort", alice.room, alice.identity)
        await site.join(alice)
        await site.leave(alice, "CLIENT_INITIATED")
        await site.join(alice)
        await until(lambda: site.sfu.model.backlog() == 0, "all webhooks are delivered")
        await site.present(given, "connected")
        assert site.event(alice).end is End.PENDING


async def test_the_client_that_ends_its_own_event_is_the_normal_case(tmp_path: Path) -> None:
    """A client hangs up and sends its leave event itself: `already_ended`, and nothing that looks like an error."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        await site.homeserver.call("manage", alice.delay_id, "send")
        await site.leave(alice)
        assert await site.outcomes(given) == ["already_ended"]
        assert await site.count("sfu_delegate_events_lost_while_connected_total") == 0
        assert not [line for line in site.lines() if line["level"] in ("warning", "error")]


async def test_an_event_that_vanishes_under_a_connected_participant_is_lost(tmp_path: Path) -> None:
    """The homeserver forgets the event while its participant stays: the outcome that must not happen is counted."""
    async with open_site(tmp_path) as site:
        alice = await site.participant(delay_ms=2000)
        given = await site.in_call(alice)
        await site.homeserver.call("manage", alice.delay_id, "cancel")
        assert await site.outcomes(given) == ["lost"]
        assert await site.count("sfu_delegate_events_lost_while_connected_total", homeserver="hs.test") == 1


# ── replacing and taking back ──


async def test_a_new_delegation_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    """The participant's state is inherited, and the old delayed event is cancelled, so that it cannot remove the new membership."""
    async with open_site(tmp_path) as site:
        before = await site.participant()
        old = await site.in_call(before)
        after = await site.participant()
        new = await site.delegated(after)
        assert new["id"] != old["id"]
        assert new["participant"]["presence"] == "connected"
        await site.ended(before, End.CANCELLED)
        assert await site.outcomes(old) == ["replaced"]
        assert site.event(after).end is End.PENDING
        await site.leave(after)
        await site.ended(after)
        assert await site.outcomes(new) == ["sent"]


async def test_the_old_event_lives_until_the_new_one_is_verified(tmp_path: Path) -> None:
    """While the homeserver cannot confirm the new event, the old one is neither cancelled nor forgotten."""
    async with open_site(tmp_path, delegations={"verify_timeout": "100ms"}) as site:
        before = await site.participant()
        old = await site.in_call(before)
        site.homeserver.model.faults.status = 502
        after = await site.participant()
        answer = await site.delegate(after)
        assert answer.status == 201
        assert answer.body["verified"] is False
        tried = site.homeserver.model.answers["restart", 502]
        await until(lambda: site.homeserver.model.answers["restart", 502] > tried + 1, "further tries to verify it")
        assert site.homeserver.model.answers["cancel", 502] == 0
        assert (await site.show(old))["state"] == "live"
        site.homeserver.model.faults.status = None
        await site.ended(before, End.CANCELLED)
        restarted = site.event(after).restarted_at[0]
        ended = site.event(before).ended_at
        assert ended is not None
        assert restarted <= ended
        assert (await site.show(answer.body))["verified"] is True


async def test_the_same_delay_id_again_changes_nothing(tmp_path: Path) -> None:
    """A repeated request is answered 200 with the same delegation, and the management token works."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        again = await site.delegate(alice)
        assert again.status == 200
        assert again.body["id"] == given["id"]
        assert again.body["management_token"] == given["management_token"]
        assert again.body["participant"]["presence"] == "connected"
        assert site.event(alice).end is End.PENDING


async def test_a_delegation_can_be_taken_back(tmp_path: Path) -> None:
    """After DELETE the event is not touched any more: neither restarted nor sent."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        answer = await site.ask("DELETE", f"/v1/delegations/{given['id']}", token=given["management_token"])
        assert answer.status == 200
        restarts = len(site.event(alice).restarted_at)
        bob = await site.participant("bob")
        watched = await site.in_call(bob)
        await site.leave(alice)
        await site.leave(bob)
        await site.ended(bob)
        await site.done(watched)
        assert site.event(alice).end is End.PENDING
        assert len(site.event(alice).restarted_at) == restarts
        assert await site.outcomes(given) == ["withdrawn"]


async def test_the_participants_own_access_token_manages_too(tmp_path: Path) -> None:
    """Who holds the access token sees and withdraws the delegation; another participant does not find it."""
    async with open_site(tmp_path) as site:
        alice, bob = await site.participant(), await site.participant("bob")
        given = await site.delegated(alice)
        path = f"/v1/delegations/{given['id']}"
        assert (await site.ask("GET", path, token=alice.token)).status == 200
        for method in ("GET", "DELETE"):
            refused = await site.ask(method, path, token=bob.token)
            assert (refused.status, refused.body["errcode"]) == (404, "M_NOT_FOUND")
            assert (await site.ask(method, path, token="wrong")).status == 401
        assert (await site.ask("DELETE", path, token=alice.token)).status == 200
        assert await site.outcomes(given) == ["withdrawn"]


async def test_an_unknown_delayed_event_is_refused_and_nothing_remains(tmp_path: Path) -> None:
    """404 M_NOT_FOUND, no delegation that lives, and a delayed event that the participant had delegated before lives on."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        wrong = "not-a-delayed-event-of-this-homeserver"
        site.secrets.add(wrong)
        body = {"homeserver": "hs.test", "delayed_events": [{"delay_id": wrong, "delay_ms": 40_000}]}
        answer = await site.ask("POST", "/v1/delegations", token=alice.token, json=body)
        assert (answer.status, answer.body["errcode"]) == (404, "M_NOT_FOUND")
        assert "delayed_events[0]" in answer.body["error"]
        assert await site.count("sfu_delegate_delegated_events", state="live") == 1
        shown = await site.show(given)
        assert shown["state"] == "live"
        assert shown["participant"]["presence"] == "connected"
        await site.leave(alice)
        await site.ended(alice)


async def test_one_unknown_event_refuses_the_whole_delegation(tmp_path: Path) -> None:
    """A delegation is taken as a whole: the good event of a refused one is not kept alive either."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        body = {
            "homeserver": "hs.test",
            "delayed_events": [{"delay_id": alice.delay_id, "delay_ms": alice.delay_ms}, {"delay_id": "no-such-event", "delay_ms": 40_000}],
        }
        answer = await site.ask("POST", "/v1/delegations", token=alice.token, json=body)
        assert (answer.status, answer.body["errcode"]) == (404, "M_NOT_FOUND")
        assert "delayed_events[1]" in answer.body["error"]
        assert await site.count("sfu_delegate_delegated_events", state="live") == 0
        assert site.event(alice).end is End.PENDING


async def test_many_participants_at_once(tmp_path: Path) -> None:
    """Fifty people delegate, join and leave in the same moment: each event is sent, none is lost."""
    async with open_site(tmp_path) as site:
        people = [await site.participant(f"p{n}", f"call{n % 5}") for n in range(50)]
        given = await asyncio.gather(*(site.delegated(who) for who in people))
        assert len({one["id"] for one in given}) == 50
        await asyncio.gather(*(site.join(who) for who in people))
        await until(lambda: site.sfu.model.backlog() == 0, "all webhooks are delivered")
        await asyncio.gather(*(site.leave(who) for who in people))
        for who in people:
            await site.ended(who)
        for one in given:
            assert await site.outcomes(one) == ["sent"]
        assert await site.count("sfu_delegate_delegated_events_ended_total", outcome="sent") == 50
