"""The stand-in SFU's webhooks have the form of recorded ones, field by field."""

import base64
import json
from collections import defaultdict
from functools import cache
from typing import Any

import pytest
from sfu_delegate.sandbox.sfu import SfuModel
from sfu_delegate.sandbox.tokens import TokenRefused, read_token, sign

from tests import recordings

START = 1_795_409_323.0
RECORDED = [name for name in recordings.names() if recordings.load(name).webhooks]


def shape(value: Any) -> Any:
    """Keys and types, without the values; lists by their first item."""
    if isinstance(value, dict):
        return tuple(sorted((key, shape(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("list", shape(value[0]) if value else None)
    return type(value).__name__


@cache
def recorded_shapes() -> dict[str, set[Any]]:
    shapes = defaultdict(set)
    for name in RECORDED:
        for webhook in recordings.load(name).webhooks:
            shapes[webhook.event["event"]].add(shape(webhook.event))
    return dict(shapes)


def eventful() -> list[dict[str, Any]]:
    """One event of every kind and variant that the model makes."""
    events: list[dict[str, Any]] = []
    model = SfuModel(on_webhook=events.append)
    now = START + 0.433
    model.create_room("room", now)
    for name in ("alice", "bob", "carol"):
        model.join("room", name, now, active_after=0)
    model.hang("room", "dave", now + 7)
    model.abort("room", "dave", now + 7.1)
    model.begin_join("room", "erin", now + 8)
    model.join("room", "erin", now + 8.1, active_after=0)
    model.publish_track("room", "alice", now + 8.5)
    model.leave("room", "alice", now + 9)
    model.vanish("room", "bob", now + 9)
    model.join("room", "carol", now + 11, active_after=0)
    model.tick(now + 40)
    model.remove("room", "carol", now + 41)
    model.delete_room("room", now + 42)
    return events


def test_every_kind_of_event_has_a_recorded_set_of_keys_and_types() -> None:
    """Each event of the model has exactly the keys and types of some recorded event of its kind, and all kinds occur."""
    events = eventful()
    for event in events:
        assert shape(event) in recorded_shapes()[event["event"]], event
    assert {event["event"] for event in events} == set(recorded_shapes())


def test_order_of_fields_is_as_recorded() -> None:
    """The first webhook of each kind lists its fields in the recorded order, on every level."""

    def order(value: Any) -> Any:
        return [(key, order(item)) for key, item in value.items()] if isinstance(value, dict) else None

    orders = {str(order(webhook.event)) for name in RECORDED for webhook in recordings.load(name).webhooks}
    for event in eventful():
        assert str(order(event)) in orders, event


def test_ids_look_like_recorded_ones() -> None:
    """Ids of events, rooms, participants and tracks have LiveKit's prefixes and lengths."""
    lengths = defaultdict(set)
    for name in RECORDED:
        for webhook in recordings.load(name).webhooks:
            event = webhook.event
            for value in (event["id"], event["room"]["sid"], event.get("participant", {}).get("sid"), event.get("track", {}).get("sid")):
                if value:
                    lengths[value[:3]].add(len(value))
    for event in eventful():
        for value in (event["id"], event["room"]["sid"], event.get("participant", {}).get("sid"), event.get("track", {}).get("sid")):
            if value:
                assert len(value) in lengths[value[:3]], value


def test_defaults_are_left_out_whatever_names_clients_choose() -> None:
    """Only true defaults are left out: an identity that looks like one stays."""
    events: list[dict[str, Any]] = []
    model = SfuModel(on_webhook=events.append)
    model.create_room("0", START)
    model.join("0", "NONE", START, active_after=0)
    assert events[-1]["room"]["name"] == "0"
    assert events[-1]["participant"]["identity"] == "NONE"
    assert "numParticipants" not in events[-1]["room"]
    assert "disconnectReason" not in events[-1]["participant"]


@pytest.mark.parametrize("name", RECORDED)
def test_signature_is_byte_for_byte_the_recorded_one(name: str) -> None:
    """Signing a recorded body with the recorded key at the recorded second gives the recorded `Authorization`."""
    recording = recordings.load(name)
    for webhook in recording.webhooks:
        claims = webhook.authorization.split(".")[1]
        at = json.loads(base64.urlsafe_b64decode(claims + "=="))["iat"]
        assert sign(webhook.body, recording.api_key, recording.api_secret, at) == webhook.authorization
        assert read_token(webhook.authorization, {recording.api_key: recording.api_secret}, at)["sha256"]


def test_headers_of_a_request_are_the_recorded_ones() -> None:
    """Apart from Host and Content-Length, which HTTP adds, a request has the recorded headers and values."""
    model = SfuModel(urls=["http://127.0.0.1:1/"])
    model.create_room("room", START)
    (delivery,) = model.due(START)
    recorded = recordings.load("join_leave").webhooks[0].headers
    assert set(delivery.headers) == set(recorded) - {"Host", "Content-Length"}
    for name in ("User-Agent", "Content-Type", "Accept-Encoding"):
        assert delivery.headers[name] == recorded[name]
    assert json.loads(delivery.body)["event"] == "room_started"


def test_signed_by_a_stranger_is_refused() -> None:
    """A token under another secret, or past its five minutes, is refused."""
    token = sign(b"{}", "devkey", "right", START)
    for secret, at in (("wrong", START), ("right", START + 301)):
        with pytest.raises(TokenRefused) as refused:
            read_token(token, {"devkey": secret}, at)
        assert token not in str(refused.value)
