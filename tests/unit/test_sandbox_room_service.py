"""The stand-in SFU answers RoomService as recorded: status, keys, types, texts."""

import json
from typing import Any

import pytest
from sfu_delegate.sandbox.answer import Fate
from sfu_delegate.sandbox.sfu import SfuModel
from sfu_delegate.sandbox.tokens import access_token

from tests import recordings

NOW = 1_795_410_098.0  # within the validity of the recorded tokens
RAW: list[dict[str, Any]] = json.loads((recordings.DIRECTORY / "room_service_answers.json").read_text(encoding="utf-8"))
SECRET = recordings.load("join_leave").api_secret
ADMIN = access_token("devkey", SECRET, NOW, {"roomAdmin": True, "room": "room-with-two", "roomCreate": True, "roomList": True})


def model_as_recorded(case: str) -> SfuModel:
    """The rooms and participants that were there in this case."""
    model = SfuModel({"devkey": SECRET})
    if case != "create, new room" and "deleted" not in case and case != "the same again at once":
        model.create_room("room-with-two", NOW - 3)
        for name in ("alice", "bob"):
            model.join("room-with-two", name, NOW - 3, active_after=0)
        model.publish_track("room-with-two", "alice", NOW - 2)
        model.hang("room-with-two", "carol-never-completes", NOW - 1)
        model.create_room("room-empty", NOW - 3)
    if "again, 0.5 s" in case or "remov" in case:
        model.remove("room-with-two", "bob", NOW - 1)
    return model


def shape(value: Any) -> Any:
    """Keys and types; a list by the set of its items' shapes."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return sorted({json.dumps(shape(item), sort_keys=True) for item in value})
    return type(value).__name__


def by_identity(body: Any) -> Any:
    """The order of participants is LiveKit's own affair."""
    if isinstance(body, dict) and "participants" in body:
        return {entry["identity"]: shape(entry) | {"state": entry["state"]} for entry in body["participants"]}
    return shape(body)


@pytest.mark.parametrize("raw", RAW, ids=[f"{raw['call']}: {raw['case']}" for raw in RAW])
def test_each_recorded_call_gets_the_recorded_answer(raw: dict[str, Any]) -> None:
    """Asked with the recorded request and token, the model gives the recorded status, content type, keys, types and texts of errors."""
    model = model_as_recorded(raw["case"])
    try:
        request = json.loads(raw["request"]["body"])
    except ValueError:
        request = None
    header = raw["request"]["headers"].get("Authorization")
    token = header.removeprefix("Bearer ") if header else None
    answer = model.room_service(raw["call"], request, token, NOW)
    assert answer.status == raw["status"]
    assert answer.headers["Content-Type"] == raw["headers"]["Content-Type"]
    assert answer.headers["Vary"] == raw["headers"]["Vary"]
    if answer.status != 200:
        assert answer.body.decode() == raw["body"]
        return
    assert by_identity(answer.json()) == by_identity(json.loads(raw["body"]))


def test_creating_a_room_again_changes_nothing() -> None:
    """The same sid, and the first timeouts."""
    model = SfuModel({"devkey": SECRET})
    first = model.room_service("CreateRoom", {"name": "x", "empty_timeout": 300, "departure_timeout": 20}, ADMIN, NOW).json()
    again = model.room_service("CreateRoom", {"name": "x", "empty_timeout": 100, "departure_timeout": 7}, ADMIN, NOW).json()
    assert again == first


@pytest.mark.parametrize("request_", [{"name": "x", "empty_timeout": "soon"}, {"name": "x", "departure_timeout": []}])
def test_a_request_of_wrong_types_is_malformed(request_: dict[str, Any]) -> None:
    """What is no number where one must be gives 400, and no room."""
    model = SfuModel({"devkey": SECRET})
    assert model.room_service("CreateRoom", request_, ADMIN, NOW).status == 400
    assert model.rooms == {}


LIST = ("ListParticipants", {"room": "room-with-two"})


def test_faults_of_the_network() -> None:
    """Down refuses, hang never answers, slow answers late: what the answer would be does not matter, or is unchanged."""
    model = model_as_recorded("")
    model.faults.slow = 2.5
    slow = model.room_service(*LIST, ADMIN, NOW)
    assert (slow.status, slow.delay, len(slow.json()["participants"])) == (200, 2.5, 3)
    model.faults.hang = True
    assert model.room_service(*LIST, ADMIN, NOW).fate is Fate.HANG
    model.faults.down = True
    assert model.room_service(*LIST, ADMIN, NOW).fate is Fate.REFUSE
    model.faults.down = False
    model.kill(NOW)
    assert model.room_service(*LIST, ADMIN, NOW).fate is Fate.REFUSE


def test_an_error_is_a_twirp_error() -> None:
    """The fault answers its status with Twirp's JSON."""
    model = model_as_recorded("")
    model.faults.error = 500
    answer = model.room_service(*LIST, ADMIN, NOW)
    assert (answer.status, answer.json()["code"]) == (500, "internal")


def test_false_absence_hides_everybody() -> None:
    """With empty lists the participant is connected, and neither listed nor found."""
    model = model_as_recorded("")
    model.faults.empty_lists = True
    assert model.room_service(*LIST, ADMIN, NOW).json() == {"participants": []}
    assert model.room_service("GetParticipant", {"room": "room-with-two", "identity": "alice"}, ADMIN, NOW).status == 404
    assert model.rooms["room-with-two"].sessions["alice"].state == "ACTIVE"


def test_a_look_is_list_participants_without_the_token() -> None:
    """Who drives the model directly gets the same answers, faults included."""
    model = model_as_recorded("")
    assert model.look("room-with-two", NOW) == model.room_service(*LIST, ADMIN, NOW)
    model.faults.hang = True
    assert model.look("room-with-two", NOW).fate is Fate.HANG


def test_polled_during_a_takeover_there_is_always_one_entry() -> None:
    """As recorded: the old sid, then the new one as JOINED for 20–140 ms, then ACTIVE; never absent, never twice."""
    model = model_as_recorded("")
    old = model.rooms["room-with-two"].sessions["alice"].sid
    seen = []
    for step in range(20):
        now = NOW + step * 0.02
        if step == 5:
            new = model.join("room-with-two", "alice", now)
        entries = [e for e in model.room_service(*LIST, ADMIN, now).json()["participants"] if e["identity"] == "alice"]
        assert len(entries) == 1
        seen.append((entries[0]["sid"], entries[0]["state"]))
    assert list(dict.fromkeys(seen)) == [(old, "ACTIVE"), (new, "JOINED"), (new, "ACTIVE")]
