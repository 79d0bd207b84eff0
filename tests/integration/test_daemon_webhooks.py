"""The SFU's webhooks as they really come: repeated, out of order, late, forged, too large, and while the database does not work."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from sfu_delegate.delegation.model import Looked, Missed
from sfu_delegate.sandbox import tokens
from sfu_delegate.sandbox.homeserver import End
from sfu_delegate.sandbox.sfu import DeliveryFaults

from tests.integration.daemon import SFU_KEY, SFU_SECRET, Answer, Participant, Site, broken_database, inputs_seen, open_site, until

pytestmark = pytest.mark.usefixtures("database")


def body(event: str, who: Participant, sid: str = "PA_one", **more: Any) -> bytes:
    """A webhook as LiveKit makes it, or nearly."""
    participant = {"sid": sid, "identity": who.identity, "state": "ACTIVE", "joinedAtMs": str(int(time.time() * 1000)), **more}
    return json.dumps({"event": event, "id": "EV_test", "room": {"sid": "RM_one", "name": who.room}, "participant": participant}).encode()


async def post(site: Site, webhook: bytes, authorization: str | None = None) -> Answer:
    """Send a webhook; genuine, if it is not said otherwise."""
    if authorization is None:
        authorization = tokens.sign(webhook, SFU_KEY, SFU_SECRET, time.time())
    site.secrets.add(authorization)
    return await site.ask("POST", "/webhooks/livekit", data=webhook, headers={"Authorization": authorization})


async def test_any_order_and_any_repetition_come_to_the_same_end(tmp_path: Path) -> None:
    """Webhooks that are doubled, overtaken by others and late end nobody who stays, and keep nobody who left."""
    async with open_site(tmp_path) as site:
        site.sfu.model.delivery_faults = DeliveryFaults(duplicate=0.5, reorder=0.5, reorder_up_to=0.3, delay=0.5, delay_up_to=0.3)
        people = [await site.participant(f"p{n}", f"call{n % 3}") for n in range(12)]
        given = {who: await site.delegated(who) for who in people}
        for _ in range(4):
            for who in people:
                await site.join(who)
        gone, there = people[::2], people[1::2]
        for who in gone:
            await site.leave(who)
        for who in gone:
            await site.ended(who)
        await until(lambda: site.sfu.model.backlog() == 0 and site.sfu.deliveries == 0, "all webhooks are delivered")
        for who in there:
            await site.present(given[who], "connected")
            assert site.event(who).end is End.PENDING
        assert not site.sfu.model.lost


async def test_lost_webhooks_are_made_up_for_by_looks(tmp_path: Path) -> None:
    """Not one webhook arrives: looks find who is there."""
    async with open_site(tmp_path) as site:
        site.sfu.model.delivery_faults.drop = 1.0
        alice = await site.participant()
        given = await site.delegated(alice)
        await site.join(alice)
        await site.present(given, "connected")


async def test_a_replayed_webhook_changes_nothing(tmp_path: Path) -> None:
    """The very same request again, ten times: 200 each, and the participant who came back stays."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.delegated(alice)
        joined, left = body("participant_joined", alice), body("participant_left", alice, disconnectReason="CLIENT_INITIATED")
        await site.sfu.call("join", alice.room, alice.identity, active_after=0)
        for webhook in (joined, left, *[joined, left] * 4):
            assert (await post(site, webhook)).status == 200
        await site.present(given, "connected")
        assert site.event(alice).end is End.PENDING


async def test_a_forged_webhook_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """Signed by another key, with another body's hash, expired, or with a participant's own token: 401, and the engine hears nothing."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        webhook = body("participant_left", alice, disconnectReason="PARTICIPANT_REMOVED")
        now = time.time()
        forged = {
            "bad_signature": tokens.sign(webhook, SFU_KEY, "another-secret-that-is-just-as-long-as-it", now),
            "unknown_key": tokens.sign(webhook, "otherkey", SFU_SECRET, now),
            "wrong_body_hash": tokens.sign(b"{}", SFU_KEY, SFU_SECRET, now),
            "expired": tokens.sign(webhook, SFU_KEY, SFU_SECRET, now - 3600),
            "no_body_hash": alice.token,
            "malformed_token": "not.a.token",
        }
        with inputs_seen(site) as seen:
            for result, authorization in forged.items():
                answer = await post(site, webhook, authorization)
                assert (answer.status, answer.body["errcode"]) == (401, "M_UNAUTHORIZED")
                assert await site.count("sfu_delegate_webhooks_total", result=result) == 1
            answer = await site.ask("POST", "/webhooks/livekit", data=webhook)
            assert answer.status == 401
        # For the one that is genuine, and of another time, the SFU is asked.
        assert {type(one) for one in seen} <= {Missed, Looked}
        assert Missed() in seen
        assert (await site.show(given))["participant"]["presence"] == "connected"


async def test_a_webhook_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """413, whether or not its length is announced."""
    async with open_site(tmp_path, limits={"webhook_body": "16KiB"}) as site:
        alice = await site.participant()
        webhook = body("participant_joined", alice, metadata="x" * 20_000)
        assert (await post(site, webhook)).status == 413

        async def unannounced() -> Any:
            for start in range(0, len(webhook), 4096):
                yield webhook[start : start + 4096]

        signed = {"Authorization": tokens.sign(webhook, SFU_KEY, SFU_SECRET, time.time())}
        async with site.http.post(f"{site.url}/webhooks/livekit", data=unannounced(), headers=signed) as answer:
            assert answer.status == 413
        assert await site.count("sfu_delegate_webhooks_total", result="too_large") == 2


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"null", b'{"event": 1}', b'{"event": "participant_left", "room": []}', b"\xff\xfe"])
async def test_a_genuine_webhook_that_cannot_be_read_is_refused(tmp_path: Path, garbage: bytes) -> None:
    """400 with a Matrix error: never a 500."""
    async with open_site(tmp_path) as site:
        answer = await post(site, garbage)
        assert (answer.status, answer.body["errcode"]) == (400, "M_BAD_JSON")


async def test_a_webhook_that_cannot_be_kept_is_sent_again(tmp_path: Path) -> None:
    """While the database fails the answer is 503; LiveKit tries again by itself, and then it is heard."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        with broken_database(site):
            answer = await post(site, body("participant_joined", alice))
            assert answer.status == 503
            assert "Retry-After" not in answer.headers
            await site.leave(alice, "PARTICIPANT_REMOVED")

            async def refused() -> bool:
                return await site.count("sfu_delegate_webhooks_total", event="participant_left", result="unavailable") > 0

            await until(refused, "a webhook that is refused")
            assert site.event(alice).end is End.PENDING
        await site.ended(alice)
        assert (await site.done(given))["participant"]["reason"] == "PARTICIPANT_REMOVED"
        assert not site.sfu.model.lost


async def test_an_answer_of_the_homeserver_outlives_a_broken_database(tmp_path: Path) -> None:
    """The event is sent, and just then nothing can be written: the answer is kept as soon as that works, and the event is not sent twice."""
    async with open_site(tmp_path) as site:
        model = site.homeserver.model
        alice = await site.participant()
        given = await site.in_call(alice)
        model.faults.latency = {"send": 0.5}
        await site.leave(alice, "PARTICIPANT_REMOVED")
        await until(lambda: model.answers["send", 200] == 1, "the request arrives")
        with broken_database(site):
            await until(lambda: site.lines("database_failed"), "the database is found to be broken")
        assert await site.outcomes(given) == ["sent"]
        assert model.answers["send", 200] == 1
        assert model.answers["send", 404] == 0
        assert len(site.lines("database_failed")) == len(site.lines("database_works_again")) == 1


async def test_what_does_not_matter_does_not_reach_the_engine(tmp_path: Path) -> None:
    """Tracks are the bulk of all webhooks: answered 200, counted, and nothing else happens."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        await site.join(alice)
        await until(lambda: site.sfu.model.backlog() == 0, "the webhooks before are delivered")
        with inputs_seen(site) as seen:
            for _ in range(10):
                await site.sfu.call("publish_track", alice.room, alice.identity)
                await site.sfu.call("unpublish_track", alice.room, alice.identity)
            for event in ("egress_started", "ingress_ended", "an_event_of_the_future"):
                assert (await post(site, body(event, alice))).status == 200
            await until(lambda: site.sfu.model.backlog() == 0, "all webhooks are delivered")
            assert seen == []
        assert await site.count("sfu_delegate_webhooks_total", result="ignored") == 23
        assert await site.count("sfu_delegate_webhooks_total", event="other") == 1


async def test_webhooks_of_rooms_without_delegations_leave_no_trace(tmp_path: Path) -> None:
    """People who delegated nothing come and go: no row is made for them."""
    async with open_site(tmp_path) as site:
        people = [await site.participant(f"nobody{n}", "elsewhere") for n in range(5)]
        for who in people:
            await site.join(who)
        for who in people:
            await site.leave(who)
        await until(lambda: site.sfu.model.backlog() == 0, "all webhooks are delivered")
        assert await site.count("sfu_delegate_webhooks_total", result="stored") == 11
        assert b"elsewhere" not in site.stored()


async def test_webhooks_of_several_sfus_are_told_apart_by_their_key(tmp_path: Path) -> None:
    """The same room and identity on two SFUs are two participants."""
    other_secret = "secret-of-another-sfu-that-nobody-else-may-see"
    async with open_site(tmp_path, sfus={"other": {"url": "ws://127.0.0.1:9", "keys": {"otherkey": other_secret}}}) as site:
        site.secrets.add(other_secret)
        alice = await site.participant()
        given = await site.in_call(alice)
        webhook = body("participant_left", alice, disconnectReason="PARTICIPANT_REMOVED")
        answer = await post(site, webhook, tokens.sign(webhook, "otherkey", other_secret, time.time()))
        assert answer.status == 200
        assert await site.count("sfu_delegate_webhooks_total", sfu="other", result="stored") == 1
        assert (await site.show(given))["participant"]["presence"] == "connected"


async def test_a_hanging_homeserver_does_not_delay_webhooks(tmp_path: Path) -> None:
    """A webhook is answered when it is durable, whatever the homeserver does: LiveKit sends the next one of the room only then."""
    async with open_site(tmp_path, delegations={"verify_timeout": "100ms"}, timeouts={"shutdown": "0s"}) as site:
        site.homeserver.model.faults.hang = True
        people = [await site.participant(f"p{n}") for n in range(5)]
        given = await asyncio.gather(*(site.delegate(who) for who in people))
        for who in people:
            await site.join(who)
        for answer in given:
            assert answer.body["verified"] is False
            await site.present(answer.body, "connected")
        await until(lambda: site.sfu.model.backlog() == 0, "all webhooks are delivered")
