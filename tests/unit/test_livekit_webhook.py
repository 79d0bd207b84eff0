"""Webhooks: genuine or not, and what they say, on recordings of a real server and on whatever else may come."""

import base64
import hashlib
import json
import time
from typing import Any

import pytest
from google.protobuf.json_format import Parse
from hypothesis import given
from hypothesis import strategies as st
from livekit.api import AccessToken, TokenVerifier, VideoGrants, WebhookReceiver
from livekit.protocol.models import DisconnectReason
from livekit.protocol.webhook import WebhookEvent
from sfu_delegate.delegation.model import RoomChanged, RoomNews, Seen, Sighting
from sfu_delegate.livekit import webhook
from sfu_delegate.livekit.keys import KeyRing, SfuKey
from sfu_delegate.livekit.webhook import Refusal, Webhook, WebhookRefused

from tests import recordings

KEY = SfuKey("main", "devkey", "devsecretdevsecretdevsecretdevsecret")
KEYS = KeyRing([KEY, SfuKey("other", "otherkey", "othersecretothersecretothersecret")])
NOW = 1_800_000_000.0
EMPTY = Webhook("", "", 0, "", "", "", "", 0, "")


def token_for(body: bytes, **changes: Any) -> str:
    """A webhook's token as LiveKit makes it, made by livekit-api, valid around the real time."""
    token = AccessToken(KEY.key, KEY.secret)
    claimed = changes.get("sha256", base64.b64encode(hashlib.sha256(body).digest()).decode())
    return (token.with_sha256(claimed) if claimed else token).to_jwt()


def refusal(authorization: str | None, body: bytes, now: float | None = None) -> Refusal:
    with pytest.raises(WebhookRefused) as error:
        webhook.verify(authorization, body, KEYS, time.time() if now is None else now)
    assert error.value.unauthorized
    return error.value.reason


def malformed(body: bytes) -> str:
    with pytest.raises(WebhookRefused) as error:
        webhook.decode(body)
    assert error.value.reason is Refusal.MALFORMED
    assert not error.value.unauthorized
    assert error.value.__context__ is None or type(error.value.__context__).__name__ == "BadField"
    return error.value.sentence


def decoded(**fields: Any) -> Webhook:
    return webhook.decode(json.dumps(fields).encode())


def test_the_recordings_are_there() -> None:
    """All recordings are found and hold what the tests below rely on."""
    assert len(recordings.names()) == 28
    assert sum(len(recordings.load(name).webhooks) for name in recordings.names()) == 607


@pytest.mark.parametrize("name", recordings.names())
def test_recorded_webhooks_are_genuine(name: str) -> None:
    """Every webhook that a real server sent is verified at the time of its arrival, and not an hour later."""
    recording = recordings.load(name)
    keys = KeyRing([SfuKey("main", recording.api_key, recording.api_secret)])
    for recorded in recording.webhooks:
        assert webhook.verify(recorded.authorization, recorded.body, keys, recording.at(recorded)).sfu == "main"
        assert webhook.verify(f"Bearer {recorded.authorization}", recorded.body, keys, recording.at(recorded)).sfu == "main"
        with pytest.raises(WebhookRefused) as error:
            webhook.verify(recorded.authorization, recorded.body, keys, recording.at(recorded) + 3600)
        assert error.value.reason is Refusal.EXPIRED


@pytest.mark.parametrize("name", recordings.names())
def test_recorded_webhooks_read_as_livekits_own_library_reads_them(name: str) -> None:
    """Field by field, we read what the protobuf library reads."""
    for recorded in recordings.load(name).webhooks:
        ours = webhook.decode(recorded.body)
        theirs = Parse(recorded.body, WebhookEvent(), ignore_unknown_fields=True)
        assert (ours.event, ours.id, ours.created_at) == (theirs.event, theirs.id, theirs.created_at)
        assert (ours.room, ours.room_sid) == (theirs.room.name, theirs.room.sid)
        assert (ours.identity, ours.sid) == (theirs.participant.identity, theirs.participant.sid)
        assert ours.joined_at_ms == theirs.participant.joined_at_ms
        if ours.event in {"participant_left", "participant_connection_aborted"}:
            assert ours.reason == DisconnectReason.Name(theirs.participant.disconnect_reason)
        else:
            assert ours.reason == ""


@pytest.mark.parametrize("name", recordings.names())
def test_recorded_webhooks_become_inputs(name: str) -> None:
    """Participant and room webhooks matter, those of tracks do not; and each is one of LiveKit's known events."""
    for recorded in recordings.load(name).webhooks:
        read = webhook.decode(recorded.body)
        given_in = webhook.to_input("main", read)
        assert webhook.label(read.event) == read.event
        assert (given_in is None) == read.event.startswith("track_")
        if isinstance(given_in, Seen):
            participant = recorded.event["participant"]
            assert (given_in.identity, given_in.sid) == (participant["identity"], participant["sid"])
            assert given_in.joined_at_ms == int(participant["joinedAtMs"])
            assert given_in.reason == participant.get("disconnectReason", "")
        elif isinstance(given_in, RoomChanged):
            assert (given_in.room, given_in.room_sid) == (recorded.event["room"]["name"], recorded.event["room"]["sid"])


def test_same_verdict_as_livekits_receiver() -> None:
    """On recorded bodies, signed anew for today, and on changed ones, livekit-api's own receiver comes to the same verdict."""
    receiver = WebhookReceiver(TokenVerifier(KEY.key, KEY.secret))
    for recorded in recordings.load("join_leave").webhooks:
        for signed, sent in ((recorded.body, recorded.body), (recorded.body, recorded.body + b" "), (b"{}", recorded.body)):
            token = token_for(signed)
            try:
                theirs = receiver.receive(sent.decode(), token).event
            except Exception:
                theirs = ""
            try:
                webhook.verify(token, sent, KEYS, time.time())
                ours = webhook.decode(sent).event
            except WebhookRefused:
                ours = ""
            assert ours == theirs
            assert (ours != "") == (signed == sent)


@given(st.data())
def test_any_change_to_the_body_is_noticed(data: st.DataObject) -> None:
    """One byte changed, added or taken away anywhere: refused."""
    recording = recordings.load("join_leave")
    recorded = data.draw(st.sampled_from(recording.webhooks))
    position = data.draw(st.integers(0, len(recorded.body)))
    changed = recorded.body[:position] + data.draw(st.binary(max_size=2)) + recorded.body[position + data.draw(st.integers(0, 2)) :]
    if changed != recorded.body:
        assert refusal(recorded.authorization, changed, recording.at(recorded)) is Refusal.WRONG_BODY_HASH


@given(st.data())
def test_any_change_to_the_token_is_noticed(data: st.DataObject) -> None:
    """One character of the header changed, added or taken away anywhere: refused."""
    recording = recordings.load("join_leave")
    recorded = data.draw(st.sampled_from(recording.webhooks))
    token = recorded.authorization
    position = data.draw(st.integers(0, len(token)))
    changed = token[:position] + data.draw(st.text(max_size=2)) + token[position + data.draw(st.integers(0, 2)) :]
    if changed != token:
        refusal(changed, recorded.body, recording.at(recorded))


def test_a_participants_token_is_not_a_webhooks() -> None:
    """A genuine token of the same key, but without the body's hash, is refused."""
    participant = AccessToken(KEY.key, KEY.secret).with_identity("alice").with_grants(VideoGrants(room_join=True, room="r")).to_jwt()
    assert refusal(participant, b"{}") is Refusal.NO_BODY_HASH
    assert refusal(token_for(b"", sha256=""), b"") is Refusal.NO_BODY_HASH


def test_another_webhooks_token_does_not_fit() -> None:
    """The token of one webhook does not carry another body."""
    assert refusal(token_for(b'{"event":"room_started"}'), b'{"event":"room_finished"}') is Refusal.WRONG_BODY_HASH


@pytest.mark.parametrize("claimed", ["x", "é" * 43, "=", "A" * 43 + "=", hashlib.sha256(b"{}").hexdigest()])
def test_a_hash_that_is_none_is_refused(claimed: str) -> None:
    """Whatever the hash claim is, only the standard base64 of the body's SHA-256 passes."""
    assert refusal(token_for(b"{}", sha256=claimed), b"{}") is Refusal.WRONG_BODY_HASH


@pytest.mark.parametrize(("form", "good"), [("{}", True), ("Bearer {}", True), ("bearer  {} ", True), ("Basic {}", False), (" {}", False)])
def test_the_header_is_the_bare_token(form: str, good: bool) -> None:
    """LiveKit sends the bare token; a `Bearer` before it is tolerated."""
    authorization = form.format(token_for(b"{}"))
    if good:
        assert webhook.verify(authorization, b"{}", KEYS, time.time()) == KEY
    else:
        assert refusal(authorization, b"{}") is Refusal.MALFORMED_TOKEN


def test_the_hash_may_lack_its_padding() -> None:
    """Base64 without padding says the same."""
    claimed = base64.b64encode(hashlib.sha256(b"{}").digest()).decode().rstrip("=")
    assert webhook.verify(token_for(b"", sha256=claimed), b"{}", KEYS, time.time()) == KEY


@pytest.mark.parametrize(
    ("authorization", "reason"),
    [
        (None, Refusal.MISSING),
        ("", Refusal.MISSING),
        ("Bearer ", Refusal.MISSING),
        ("Bearer", Refusal.MALFORMED_TOKEN),
        ("a.b.c", Refusal.MALFORMED_TOKEN),
    ],
)
def test_without_a_token_nothing_happens(authorization: str | None, reason: Refusal) -> None:
    """No token, or something else in its place, is refused."""
    assert refusal(authorization, b"{}") is reason


def test_the_key_that_signed_tells_the_sfu() -> None:
    """Several SFUs send to the same address: the API key tells them apart, and one cannot speak for another."""
    other = KEYS["otherkey"]
    digest = base64.b64encode(hashlib.sha256(b"{}").digest()).decode()
    assert webhook.verify(AccessToken(other.key, other.secret).with_sha256(digest).to_jwt(), b"{}", KEYS, time.time()).sfu == "other"
    assert refusal(AccessToken(KEY.key, other.secret).with_sha256(digest).to_jwt(), b"{}") is Refusal.BAD_SIGNATURE
    assert refusal(AccessToken("nobody", other.secret).with_sha256(digest).to_jwt(), b"{}") is Refusal.UNKNOWN_KEY


@given(st.one_of(st.none(), st.text(), st.binary().map(lambda b: "Bearer " + b.decode("latin1"))), st.binary())
def test_arbitrary_requests_are_refused(authorization: str | None, body: bytes) -> None:
    """Nothing that anybody sends raises anything but a refusal."""
    refusal(authorization, body)


def test_everything_may_be_missing() -> None:
    """Recordings and other senders may lack any field: it is read as unknown."""
    assert webhook.decode(b"{}") == EMPTY
    assert decoded(event=None, id=None, room=None, participant=None, createdAt=None) == EMPTY
    assert decoded(room={}, participant={"joinedAtMs": None, "disconnectReason": None, "future": [{}]}) == EMPTY


def test_both_spellings_and_all_forms_of_numbers_are_read() -> None:
    """Protobuf's JSON may be camelCase or snake_case, with numbers as text or as numbers: all read alike."""
    expected = Webhook("participant_left", "EV_1", 5, "r", "RM_1", "alice", "PA_1", 1_700_000_000_123, "CONNECTION_TIMEOUT")
    for created, joined, reason in (("createdAt", "joinedAtMs", "disconnectReason"), ("created_at", "joined_at_ms", "disconnect_reason")):
        for created_at, joined_at_ms in (("5", "1700000000123"), (5, 1_700_000_000_123), (5.0, 1_700_000_000_123.0)):
            for value in ("CONNECTION_TIMEOUT", 14, "14"):
                participant = {"sid": "PA_1", "identity": "alice", joined: joined_at_ms, reason: value}
                room = {"name": "r", "sid": "RM_1"}
                read = decoded(event="participant_left", id="EV_1", room=room, participant=participant, **{created: created_at})
                assert read == expected
                assert type(read.joined_at_ms) is int


def test_milliseconds_are_preferred_to_seconds() -> None:
    """Sessions are ordered by the finer time; servers that tell only seconds are understood, too."""
    assert decoded(participant={"joinedAt": "1700000000", "joinedAtMs": "1700000000123"}).joined_at_ms == 1_700_000_000_123
    assert decoded(participant={"joinedAt": "1700000000"}).joined_at_ms == 1_700_000_000_000
    assert decoded(participant={"joined_at": 1700000000, "joined_at_ms": 0}).joined_at_ms == 1_700_000_000_000


@pytest.mark.parametrize("number", DisconnectReason.values())
def test_reasons_are_read_by_name_and_by_number(number: int) -> None:
    """Every reason of LiveKit's has the same name, however it was sent."""
    name = DisconnectReason.Name(DisconnectReason.ValueType(number))
    for value in (number, str(number), name):
        assert decoded(event="participant_left", participant={"disconnectReason": value}).reason == name


def test_future_reasons_are_kept() -> None:
    """A reason that this version does not know keeps its name or its number."""
    for value, reason in ((99, "99"), ("99", "99"), (-1, "-1"), ("SOMETHING_NEW", "SOMETHING_NEW"), ("with space\n", "with_space_")):
        assert decoded(event="participant_left", participant={"disconnectReason": value}).reason == reason


def test_an_end_without_a_reason_has_the_default_reason() -> None:
    """Protobuf leaves out the enum's default, so an end without a reason is UNKNOWN_REASON; a beginning has none."""
    for event, reason in (
        ("participant_left", "UNKNOWN_REASON"),
        ("participant_connection_aborted", "UNKNOWN_REASON"),
        ("participant_joined", ""),
        ("room_started", ""),
    ):
        assert decoded(event=event, participant={"identity": "alice"}).reason == reason


def test_ids_cannot_hold_what_separates_them() -> None:
    """Whitespace and control characters in an id become "_"; an id of LiveKit's stays as it is."""
    for sid, read in (("PA_a b", "PA_a_b"), ("\tPA\n\0\x7f\x85\u2028", "_PA_____"), ("PA-1.é", "PA-1.é"), ("PA_1", "PA_1"), (" ", "_")):
        webhook_read = decoded(id=sid, room={"sid": sid}, participant={"sid": sid})
        assert (webhook_read.id, webhook_read.room_sid, webhook_read.sid) == (read, read, read)


def test_ids_have_an_end() -> None:
    """An id of 256 characters is taken, a longer one refuses the webhook."""
    assert decoded(participant={"sid": "P" * 256}).sid == "P" * 256
    for body in ({"id": "P" * 257}, {"room": {"sid": "P" * 257}}, {"participant": {"sid": "P" * 257}}):
        assert "longer than 256" in malformed(json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"event":"\xff"}', "not JSON"),
        (b"event=room_started", "not JSON"),
        (b'{"event":"room_started"', "not JSON"),
        (b"{} {}", "not JSON"),
        (b'{"x":NaN}', "not JSON"),
        (b'{"x":"\\ud800"}', "not JSON"),
        (b'{"x":' + b"[" * 100_000, "not JSON"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
        (b'{"createdAt":' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b'"participant_left"', "not an object"),
        (b'{"event":5}', "event must be a string"),
        (b'{"event":["room_started"]}', "event must be a string"),
        (b'{"id":7}', "id must be a string"),
        (b'{"room":"r"}', "room must be an object"),
        (b'{"room":{"name":{}}}', "name must be a string"),
        (b'{"room":{"name":"a\\u0000b"}}', "NUL"),
        (b'{"participant":[]}', "participant must be an object"),
        (b'{"participant":{"identity":1}}', "identity must be a string"),
        (b'{"participant":{"identity":"a\\u0000b"}}', "NUL"),
        (b'{"participant":{"sid":true}}', "sid must be a string"),
        (b'{"participant":{"joinedAtMs":"soon"}}', "joinedAtMs must be a whole number"),
        (b'{"participant":{"joinedAtMs":""}}', "joinedAtMs must be a whole number"),
        (b'{"participant":{"joinedAtMs":"1_0"}}', "joinedAtMs must be a whole number"),
        ('{"participant":{"joinedAtMs":"٣"}}'.encode(), "joinedAtMs must be a whole number"),
        (b'{"participant":{"joinedAtMs":true}}', "joinedAtMs must be a whole number"),
        (b'{"participant":{"joinedAtMs":1.5}}', "joinedAtMs must be a whole number"),
        (b'{"participant":{"joinedAtMs":1e999}}', "joinedAtMs must be a whole number"),
        (b'{"participant":{"joinedAtMs":-1}}', "joinedAtMs must be a whole number"),
        (b'{"participant":{"joinedAtMs":"9223372036854775807"}}', "joinedAtMs must be a whole number"),
        (b'{"participant":{"joinedAtMs":1' + b"0" * 4000 + b"}}", "joinedAtMs must be a whole number"),
        (b'{"participant":{"joinedAtMs":"' + b"9" * 100_000 + b'"}}', "joinedAtMs must be a whole number"),
        (b'{"participant":{"joinedAt":"9007199254740991"}}', "joinedAt must be seconds"),
        (b'{"createdAt":{}}', "createdAt must be a whole number"),
        (b'{"participant":{"disconnectReason":1.5}}', "disconnectReason must be"),
        (b'{"participant":{"disconnectReason":true}}', "disconnectReason must be"),
        (b'{"participant":{"disconnectReason":4294967296}}', "disconnectReason must be"),
        (b'{"participant":{"disconnectReason":"' + b"R" * 257 + b'"}}', "disconnectReason must not be longer"),
    ],
)
def test_what_cannot_be_read_is_refused(body: bytes, problem: str) -> None:
    """A genuine sender of nonsense is told which field is wrong."""
    assert problem in malformed(body)


def test_no_error_quotes_the_body() -> None:
    """A body carries secrets: neither the sentence nor the exception's context shows a piece of it."""
    secret = b"turnpassword"
    for form in (b"%b", b'{"room":%b', b'{"room":"%b"}', b'{"participant":{"joinedAtMs":"%b"}}', b'["%b"]'):
        body = form % secret
        with pytest.raises(WebhookRefused) as error:
            webhook.decode(body)
        assert secret.decode() not in repr(error.value) + repr(error.value.__context__)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)
NAMES = (
    *("event", "id", "room", "participant", "createdAt", "created_at", "name", "sid", "identity"),
    *("joinedAt", "joined_at", "joinedAtMs", "joined_at_ms", "disconnectReason", "disconnect_reason"),
)
VALUES = st.one_of(JSON, st.sampled_from(sorted(webhook.EVENTS)), st.integers(0, 2**64).map(str))
MESSAGE = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)
WEBHOOK = st.tuples(MESSAGE, MESSAGE, MESSAGE).map(lambda parts: {**parts[0], "room": parts[1], "participant": parts[2]})


def read_or_refused(body: bytes) -> None:
    """What any body must come to: a refusal, or a webhook that the rules and the store can take."""
    try:
        read = webhook.decode(body)
    except WebhookRefused as refused:
        assert refused.reason is Refusal.MALFORMED  # noqa: PT017  (being read is as good)
        return
    for value in (read.event, read.id, read.room, read.room_sid, read.identity, read.sid, read.reason):
        assert type(value) is str
        value.encode()
    for value in (read.id, read.room_sid, read.sid, read.reason):
        assert len(value) <= 256
        assert len(value.split()) <= 1
        assert value == value.strip()
    assert 0 <= read.joined_at_ms < 2**53
    assert 0 <= read.created_at < 2**53
    assert "\0" not in read.room + read.identity
    webhook.to_input("main", read)
    assert webhook.label(read.event) in webhook.EVENTS | {"other"}


@given(st.binary())
def test_arbitrary_bytes_are_read_or_refused(body: bytes) -> None:
    """No body raises anything but a refusal."""
    read_or_refused(body)


@given(st.one_of(JSON, WEBHOOK))
def test_arbitrary_json_is_read_or_refused(value: object) -> None:
    """No JSON does either, with LiveKit's fields or others; and what is read can be stored."""
    read_or_refused(json.dumps(value).encode())
    read_or_refused(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))


@given(st.data())
def test_damaged_webhooks_are_read_or_refused(data: st.DataObject) -> None:
    """A recorded webhook with some bytes changed is read or refused, too."""
    body = bytearray(data.draw(st.sampled_from(recordings.load("removed").webhooks)).body)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(body)))
        body[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    read_or_refused(bytes(body))


LEFT = EMPTY._replace(event="participant_left", room="r", identity="alice", sid="PA_1", joined_at_ms=5, reason="CLIENT_INITIATED")


def test_participant_webhooks_become_sightings() -> None:
    """The three participant webhooks are told to the rules with session, time and reason."""
    for event, what in (
        ("participant_joined", Sighting.JOINED),
        ("participant_left", Sighting.LEFT),
        ("participant_connection_aborted", Sighting.ABORTED),
    ):
        assert webhook.to_input("main", LEFT._replace(event=event)) == Seen("main", "r", "alice", what, "PA_1", 5, "CLIENT_INITIATED")


def test_room_webhooks_become_room_changes() -> None:
    """The beginning and the end of a room are told with its sid."""
    for event, what in (("room_started", RoomNews.STARTED), ("room_finished", RoomNews.FINISHED)):
        assert webhook.to_input("main", EMPTY._replace(event=event, room="r", room_sid="RM_1")) == RoomChanged("main", "r", what, "RM_1")


def test_what_does_not_matter_is_no_input() -> None:
    """Other events, and those that do not say whom they are about, never reach the rules."""
    for read in (
        EMPTY,
        LEFT._replace(event="track_published"),
        LEFT._replace(event="egress_ended"),
        LEFT._replace(event="something_new"),
        LEFT._replace(event="Participant_Left"),
        LEFT._replace(room=""),
        LEFT._replace(identity=""),
        EMPTY._replace(event="room_finished", room_sid="RM_1"),
    ):
        assert webhook.to_input("main", read) is None


def test_labels_do_not_come_from_outside() -> None:
    """A metric's label is one of LiveKit's events or "other", whatever the webhook says."""
    assert webhook.label("participant_left") == "participant_left"
    assert webhook.label("egress_ended") == "egress_ended"
    assert [webhook.label(event) for event in ("", "participant_left ", "x" * 1000)] == ["other"] * 3
