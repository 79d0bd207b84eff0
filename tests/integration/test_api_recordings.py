"""Recorded webhooks of a real LiveKit against delegations made by the API, both over HTTP."""

from collections.abc import Sequence
from typing import Any

import pytest
from sfu_delegate.delegation.model import Action
from sfu_delegate.livekit import webhook
from sfu_delegate.livekit.keys import SfuKey

from tests import recordings
from tests.engine_port import Bench, delayed, delegation, serving
from tests.recordings import RecordedWebhook, Recording
from tests.webhook_requests import PATH


async def replay(client: Any, bench: Bench, recording: Recording, webhooks: Sequence[RecordedWebhook]) -> None:
    """Send the very bytes that LiveKit sent; the clock is that of the recording."""
    for hook in webhooks:
        bench.port.at = max(bench.port.at, recording.at(hook))
        response = await client.post(PATH, data=hook.body, headers={"Authorization": hook.authorization})
        assert (response.status, await response.json()) == (200, {})


def start(recording: Recording) -> Bench:
    bench = Bench()
    bench.port.at = recording.started_at
    bench.keys.replace([SfuKey("main", recording.api_key, recording.api_secret)])
    return bench


def token(bench: Bench, room: str, identity: str) -> dict[str, str]:
    key = next(iter(bench.keys.values()))
    return {"Authorization": f"Bearer {bench.access_token(identity, room, key=key)}"}


@pytest.mark.parametrize("name", recordings.names())
async def test_every_recorded_webhook_is_accepted(name: str) -> None:
    """Every one is genuine and understood; once more, all of them change nothing."""
    recording = recordings.load(name)
    bench = start(recording)
    async with serving(bench) as client:
        await replay(client, bench, recording, recording.webhooks)
        first = len(bench.port.given)
        await replay(client, bench, recording, recording.webhooks)
        assert {result for _, _, result in bench.told.webhooks} <= {"stored", "ignored"}
        assert {event for _, event, _ in bench.told.webhooks} <= webhook.EVENTS
        assert len(bench.port.given) == 2 * first
        assert not bench.port.rows()


@pytest.mark.parametrize("repeat", [1, 2])
async def test_a_recorded_call_ends_with_the_event_sent(repeat: int) -> None:
    """Delegated, joined, left, as recorded, each webhook once or twice: at the departure the event is sent, once."""
    recording = recordings.load("join_leave")
    bench = start(recording)
    left = next(hook for hook in recording.webhooks if hook.event["event"] == "participant_left")
    room, identity = left.event["room"]["name"], left.event["participant"]["identity"]
    async with serving(bench) as client:
        response = await client.post("/v1/delegations", json=delegation(delayed()), headers=token(bench, room, identity))
        made = await response.json()
        assert response.status == 201
        await replay(client, bench, recording, [hook for hook in recording.webhooks for _ in range(repeat)])
        bench.port.at += 10.0
        await replay(client, bench, recording, recording.webhooks[:1])  # the clock went on: the look that confirms the departure is due
        await bench.port.settled()
        body = await (await client.get(f"/v1/delegations/{made['id']}", headers=token(bench, room, identity))).json()
        assert body["delayed_events"][0]["outcome"] == "sent"
        assert body["participant"]["reason"] == left.event["participant"]["disconnectReason"]
        assert [task.action for task in bench.port.tasks].count(Action.SEND) == 1
