"""`POST /webhooks/livekit`: verified, decoded, kept, answered; each with what the metrics are told."""

import json

import jwt
import pytest
from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.api.webhooks import PATH, RESULTS
from sfu_delegate.delegation.model import Input, Missed, RoomChanged, RoomNews, Seen, Sighting
from sfu_delegate.livekit.keys import SfuKey
from structlog.testing import capture_logs

from tests import engine_port
from tests.engine_port import KEY, NOW, Bench, serving
from tests.webhook_requests import send, signature

ROOM = {"sid": "RM_1", "name": "room", "turnPassword": "verysecret"}
ALICE = {"sid": "PA_1", "identity": "alice", "joinedAtMs": "1760000000000", "disconnectReason": "CLIENT_INITIATED"}


@pytest.fixture(autouse=True, params=["aiohttp", "listener"])
def read_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for both who read requests."""
    monkeypatch.setattr(engine_port, "BY_LISTENER", request.param == "listener")


@pytest.mark.parametrize(
    ("event", "given"),
    [
        ("participant_left", Seen("main", "room", "alice", Sighting.LEFT, "PA_1", 1_760_000_000_000, "CLIENT_INITIATED", "RM_1", 1.76e9)),
        ("participant_joined", Seen("main", "room", "alice", Sighting.JOINED, "PA_1", 1_760_000_000_000, "CLIENT_INITIATED", "RM_1", 1.76e9)),
        (
            "participant_connection_aborted",
            Seen("main", "room", "alice", Sighting.ABORTED, "PA_1", 1_760_000_000_000, "CLIENT_INITIATED", "RM_1", 1.76e9),
        ),
        ("room_started", RoomChanged("main", "room", RoomNews.STARTED, "RM_1", "EV_1", 1.76e9)),
        ("room_finished", RoomChanged("main", "room", RoomNews.FINISHED, "RM_1", "EV_1", 1.76e9)),
    ],
)
async def test_what_matters_is_handed_in(event: str, given: Input) -> None:
    """200 `{}` after it was kept, and the time that it took is told."""
    bench = Bench()
    async with serving(bench) as client:
        response = await send(client, KEY, {"event": event, "id": "EV_1", "createdAt": "1760000000", "room": ROOM, "participant": ALICE}, NOW)
        assert (response.status, await response.json()) == (200, {})
        assert bench.port.given == [given]
        assert bench.told.webhooks == [("main", event, "stored")]
        assert len(bench.told.acknowledged) == 1
        assert bench.told.acknowledged[0] > 0


@pytest.mark.parametrize(
    ("event", "label"),
    [
        ({"event": "track_published", "room": ROOM, "participant": ALICE}, "track_published"),
        ({"event": "egress_ended"}, "egress_ended"),
        ({"event": "of_the_future", "room": ROOM}, "other"),
        ({"event": "participant_left", "room": {}, "participant": ALICE}, "participant_left"),
        ({}, "other"),
    ],
)
async def test_what_does_not_matter_is_answered_at_once(event: dict[str, object], label: str) -> None:
    """200 without touching the database; a label never comes from outside."""
    bench = Bench()
    async with serving(bench) as client:
        response = await send(client, KEY, event, NOW)
        assert (response.status, await response.json()) == (200, {})
        assert not bench.port.given
        assert bench.told.webhooks == [("main", label, "ignored")]
        assert not bench.told.acknowledged


BODY = json.dumps({"event": "participant_left", "room": ROOM, "participant": ALICE}).encode()
WRONG = SfuKey("main", KEY.key, "not-the-secret-of-forty-characters-00000")
STRANGER = SfuKey("main", "APIstranger", "not-the-secret-of-forty-characters-00000")


@pytest.mark.parametrize(
    ("header", "result"),
    [
        (None, "missing"),
        ("garbage", "malformed_token"),
        (signature(WRONG, BODY, NOW), "bad_signature"),
        (signature(STRANGER, BODY, NOW), "unknown_key"),
        (signature(KEY, BODY, NOW - 3600), "expired"),
        (signature(KEY, BODY, NOW + 3600), "not_yet_valid"),
        (signature(KEY, BODY + b" ", NOW), "wrong_body_hash"),
        (jwt.encode({"iss": KEY.key, "exp": NOW + 300}, KEY.secret, "HS256"), "no_body_hash"),
        (Bench().access_token(), "no_body_hash"),
    ],
)
async def test_what_our_sfu_did_not_sign(header: str | None, result: str) -> None:
    """401, counted, and nothing of it is handed in; a participant's own token signs no webhook. One that is genuine, but not of this time, shows
    that a clock is wrong: what it told is found out by looks."""
    bench = Bench()
    with capture_logs() as logs:
        async with serving(bench) as client:
            response = await client.post(PATH, data=BODY, headers={} if header is None else {"Authorization": header})
            body = await response.json()
    assert (response.status, body["errcode"]) == (401, "M_UNAUTHORIZED")
    assert header is None or header not in body["error"]
    assert bench.port.given == ([Missed()] if result in ("expired", "not_yet_valid") else [])
    assert bench.told.webhooks == [("unknown", "unknown", result)]
    assert all(line["event"] == "webhook_refused" for line in logs)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"event": 7}', b'{"event": "participant_left", "participant": "alice"}', b'{"event": "\xff"}', b"[" * 100_000],
)
async def test_what_our_sfu_signed_and_is_no_webhook(body: bytes) -> None:
    """400, counted for that SFU; LiveKit does not repeat it."""
    bench = Bench()
    async with serving(bench) as client:
        response = await send(client, KEY, body, NOW)
        assert (response.status, (await response.json())["errcode"]) == (400, "M_BAD_JSON")
        assert not bench.port.given
        assert bench.told.webhooks == [("main", "unknown", "malformed")]


async def test_too_large_a_webhook() -> None:
    """413, before anything is verified."""
    bench = Bench()
    bench.configure(max_webhook_body=1000)
    async with serving(bench) as client:
        response = await send(client, KEY, b" " * 1001, NOW)
        assert (response.status, (await response.json())["errcode"]) == (413, "M_TOO_LARGE")
        assert bench.told.webhooks == [("unknown", "unknown", "too_large")]


async def test_a_webhook_that_cannot_be_read() -> None:
    """Not in the encoding that it names: 400."""
    bench = Bench()
    async with serving(bench) as client:
        headers = {"Authorization": signature(KEY, BODY, NOW), "Content-Encoding": "gzip"}
        response = await client.post(PATH, data=BODY, headers=headers)
        assert response.status == 400
        assert bench.told.webhooks == [("unknown", "unknown", "unreadable")]


@pytest.mark.parametrize(
    ("error", "result"),
    [(Overloaded("Too much to do.", 1.5), "overloaded"), (Unavailable("The database /var/lib/x failed.", 1.5), "unavailable")],
)
async def test_what_cannot_be_kept_now(error: Exception, result: str) -> None:
    """503 without Retry-After: LiveKit repeats it by itself, for longer than it would if it was told how soon. What does not matter: 200."""
    bench = Bench()
    bench.port.error = error
    async with serving(bench) as client:
        response = await send(client, KEY, BODY, NOW)
        assert response.status == 503
        assert "Retry-After" not in response.headers
        assert "/var" not in await response.text()
        assert (await send(client, KEY, {"event": "track_published"}, NOW)).status == 200
        assert bench.told.webhooks == [("main", "participant_left", result), ("main", "track_published", "ignored")]
        assert not bench.told.acknowledged


async def test_what_goes_wrong_here_is_repeated_by_the_sfu() -> None:
    """500, counted, and logged without anything of the body."""
    bench = Bench()
    bench.port.error = RuntimeError("verysecret")
    with capture_logs() as logs:
        async with serving(bench) as client:
            assert (await send(client, KEY, BODY, NOW)).status == 500
    assert bench.told.webhooks == [("main", "participant_left", "failed")]
    assert "verysecret" not in repr(logs)


async def test_several_sfus_with_several_keys() -> None:
    """The key that signed tells which SFU it is; keys that are replaced count at once."""
    bench = Bench()
    other = SfuKey("other", "APIother", "the-others-secret-of-forty-characters-00")
    second = SfuKey("main", "APIsecond", "the-second-secret-of-forty-characters-00")
    bench.keys.replace([KEY, second, other])
    async with serving(bench) as client:
        for key in (KEY, second, other):
            assert (await send(client, key, BODY, NOW)).status == 200
        assert [sfu for sfu, _, _ in bench.told.webhooks] == ["main", "main", "other"]
        bench.keys.replace([other])
        assert (await send(client, KEY, BODY, NOW)).status == 401


async def test_a_repeated_webhook_changes_nothing() -> None:
    """The same request again within its five minutes: 200, and the rules see nothing new in it."""
    bench = Bench()
    async with serving(bench) as client:
        for _ in range(2):
            assert (await send(client, KEY, BODY, NOW)).status == 200
        assert not bench.port.rows()


def test_all_results_are_known() -> None:
    """Metrics can be made for each of them beforehand."""
    assert len(set(RESULTS)) == len(RESULTS) == 17
