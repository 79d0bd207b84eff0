"""The stand-in SFU delivers webhooks as recorded: tries, pauses, order, and what is lost."""

import json

import pytest
from sfu_delegate.sandbox.sfu import Delivery, SfuModel
from sfu_delegate.sandbox.webhooks import Webhook, WebhookQueue

from tests import recordings

URL = "http://127.0.0.1:1/webhooks/livekit"


def webhook(number: int, at: float = 0.0) -> Webhook:
    return Webhook(URL, "room", "participant_left", f"EV_{number}", b"{}", "", at, at)


def queue_of(lost: list[tuple[str, str]], depth: int = 200) -> WebhookQueue:
    return WebhookQueue(lambda event, why: lost.append((event.id, why)), depth=depth)


def recorded_attempts(name: str) -> dict[str, list[tuple[float, int | None]]]:
    """Per event: when it was tried, and what was answered."""
    attempts: dict[str, list[tuple[float, int | None]]] = {}
    for request in recordings.load(name).webhooks:
        attempts.setdefault(request.event["id"], []).append((request.t_ms / 1000, request.answered))
    return attempts


@pytest.mark.parametrize("name", ["receiver_down_500_3s", "receiver_down_500_45s", "receiver_other_answers"])
def test_retries_come_when_the_recorded_ones_came(name: str) -> None:
    """Given the recorded answers, each event is tried as often and at the same times, within a few milliseconds, as by the real server."""
    for tries in recorded_attempts(name).values():
        queue = queue_of([])
        queue.put(webhook(0, tries[0][0]), tries[0][0])
        made = []
        now: float | None = tries[0][0]
        for _, status in tries:
            assert now is not None
            assert queue.next_attempt(now) is not None
            made.append(now)
            queue.answered(status, now, 3.0 if status in (429, 503) else None)
            now = queue.next_at
        assert now is None
        assert made == pytest.approx([at for at, _ in tries], abs=0.05)


@pytest.mark.parametrize("status", [None, 500, 502, 429, 503])
def test_a_failing_receiver_is_tried_five_times(status: int | None) -> None:
    """Transport errors, 5xx and 429 are tried at 0, 1, 3, 7 and 15 s, then the event is lost and the next one has its turn."""
    lost: list[tuple[str, str]] = []
    queue = queue_of(lost)
    queue.put(webhook(1), 0)
    queue.put(webhook(2), 0)
    times = []
    while not lost:
        at = queue.next_at
        assert at is not None
        attempt = queue.next_attempt(at)
        assert attempt is not None
        assert attempt.webhook.id == "EV_1"
        times.append(at)
        queue.answered(status, at)
    assert times == [0, 1, 3, 7, 15]
    assert lost == [("EV_1", "failed")]
    following = queue.next_attempt(15)
    assert following is not None
    assert following.webhook.id == "EV_2"


@pytest.mark.parametrize("status", [200, 302, 401, 404, 413, 501])
def test_other_answers_count_as_delivered(status: int) -> None:
    """Every 3xx, every 4xx but 429, and 501 are not tried again."""
    lost: list[tuple[str, str]] = []
    queue = queue_of(lost)
    queue.put(webhook(1), 0)
    queue.next_attempt(0)
    queue.answered(status, 0)
    assert (queue.next_at, len(queue), lost) == (None, 0, [])


def test_retry_after_is_obeyed_for_429_and_503_only() -> None:
    """`Retry-After` replaces the pause for 429 and 503, and is ignored for 500."""
    for status, pause in ((429, 3.0), (503, 3.0), (500, 1.0)):
        queue = queue_of([])
        queue.put(webhook(1), 0)
        queue.next_attempt(0)
        queue.answered(status, 10, 3.0)
        assert queue.next_at == 10 + pause


def test_nothing_else_is_sent_while_one_is_under_way() -> None:
    """A hung answer holds up everything of its room, without a time limit."""
    queue = queue_of([])
    queue.put(webhook(1), 0)
    queue.put(webhook(2), 0)
    assert queue.next_attempt(0) is not None
    assert queue.next_at is None
    assert queue.next_attempt(70) is None


def test_slow_answers_lose_by_age_what_the_recording_lost() -> None:
    """60 leave within a third of a second and each answer takes 2 s: 16 are delivered, 44 lost by age, as recorded."""
    lost: list[tuple[str, str]] = []
    queue = queue_of(lost)
    for number in range(60):
        queue.put(webhook(number, number * 0.005), 0)
    delivered, now = 0, 0.0
    while queue.next_attempt(now) is not None:
        delivered += 1
        now += 2.002
        queue.answered(200, now)
    events = [request.event for request in recordings.load("slow_receiver_mass_leave").webhooks]
    left = {event["id"] for event in events if event["event"] == "participant_left" and event["participant"]["identity"].startswith("p")}
    assert delivered == len(left) == 16
    assert lost == [(f"EV_{number}", "age") for number in range(delivered, 60)]


@pytest.mark.parametrize(("depth", "events", "kept"), [(10, 30, 11), (200, 250, 201)])
def test_a_full_queue_loses_the_latest(depth: int, events: int, kept: int) -> None:
    """The one being sent and `depth` waiting ones are kept, recorded as 11 of 30 with a depth of 10, and all later ones are lost."""
    lost: list[tuple[str, str]] = []
    queue = queue_of(lost, depth)
    for number in range(events):
        queue.put(webhook(number), 0)
    assert len(queue) == kept
    assert lost == [(f"EV_{number}", "queue is full") for number in range(kept, events)]


def drive(model: SfuModel, until: float) -> list[tuple[float, Delivery]]:
    """Let time pass with a receiver that answers 200 at once."""
    arrived = []
    while (at := model.next_event()) is not None and at <= until:
        for delivery in model.due(at):
            arrived.append((at, delivery))
            model.answered(delivery.ticket, 200, at)
    model.tick(until)
    return arrived


def busy_model(seed: int = 0) -> SfuModel:
    model = SfuModel(urls=[URL], seed=seed)
    for room in ("one", "two"):
        model.create_room(room, 0)
        for number in range(20):
            model.join(room, f"p{number}", 0, active_after=0)
    return model


def test_rooms_do_not_wait_for_each_other() -> None:
    """While one room's receiver hangs, the other room's events go on."""
    model = busy_model()
    first = model.due(0)
    assert sorted(delivery.room for delivery in first) == ["one", "two"]
    for _ in range(5):
        (delivery,) = (d for d in first if d.room == "two")
        model.answered(delivery.ticket, 200, 0)
        first = model.due(0)
        assert [delivery.room for delivery in first] == ["two"]


def test_every_url_gets_every_event() -> None:
    """Two receivers get the same events under the same ids."""
    model = SfuModel(urls=[URL, URL + "/second"])
    model.create_room("room", 0)
    model.join("room", "alice", 0, active_after=0)
    arrived = drive(model, 1)
    by_url = {url: [d.id for _, d in arrived if d.url == url] for url in model.urls}
    assert by_url[URL] == by_url[URL + "/second"]
    assert len(by_url[URL]) == 2


def test_without_faults_everything_arrives_once_and_in_order() -> None:
    """All events of a room arrive once, in the order in which they were made."""
    arrived = drive(busy_model(), 10)
    assert len(arrived) == 42
    names = [json.loads(d.body).get("participant", {}).get("identity") for _, d in arrived if d.room == "one"]
    assert names == [None, *(f"p{number}" for number in range(20))]


def test_dropped_webhooks_are_counted_and_never_arrive() -> None:
    """With a probability of 1 nothing arrives, and each loss is counted."""
    model = SfuModel(urls=[URL])
    model.delivery_faults.drop = 1
    model.create_room("room", 0)
    assert model.due(100) == []
    assert model.lost == {"fault": 1}


def test_duplicated_webhooks_arrive_twice_under_one_id() -> None:
    """A repeated event has the same id and the same body."""
    model = SfuModel(urls=[URL])
    model.delivery_faults.duplicate = 1
    model.create_room("room", 0)
    arrived = [delivery for _, delivery in drive(model, 1)]
    assert [delivery.id for delivery in arrived] == [arrived[0].id] * 2
    assert arrived[0].body == arrived[1].body


def test_delayed_webhooks_arrive_late_and_in_order() -> None:
    """A delay holds up the room without changing the order."""
    model = SfuModel(urls=[URL])
    model.delivery_faults.delay = 1
    model.create_room("room", 0)
    model.join("room", "alice", 0, active_after=0)
    arrived = drive(model, 60)
    assert [d.event for _, d in arrived] == ["room_started", "participant_joined"]
    assert 0 < arrived[0][0] <= 10


def test_reordered_webhooks_overtake_each_other() -> None:
    """With reordering all events arrive, and not in the order in which they were made."""
    model = SfuModel(urls=[URL])
    model.delivery_faults.reorder = 1
    model.create_room("room", 0)
    made = [model.join("room", f"p{number}", 0, active_after=0) for number in range(10)]
    arrived = [json.loads(d.body).get("participant", {}).get("sid") for _, d in drive(model, 60)]
    assert sorted(filter(None, arrived)) == sorted(made)
    assert list(filter(None, arrived)) != made


def test_a_killed_node_sends_nothing_more() -> None:
    """What waited is lost, and a late answer to what was under way is ignored."""
    model = busy_model()
    first = model.due(0)
    model.kill(0)
    for delivery in first:
        model.answered(delivery.ticket, 500, 1)
    assert (model.due(100), model.backlog(), model.next_event()) == ([], 0, None)
