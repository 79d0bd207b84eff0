"""The stand-in SFU does what recorded LiveKit servers did, on a virtual clock."""

import json
from typing import Any

import pytest
from sfu_delegate.sandbox.answer import Impossible
from sfu_delegate.sandbox.sfu import JoinRefused, SfuModel
from sfu_delegate.sandbox.tokens import access_token, join_token

from tests import recordings

START = 1_795_409_323.4
KEY, SECRET = "devkey", "a-secret-that-is-at-least-32-bytes-long"

Line = tuple[str, str, str]


class Watched:
    """A model and the webhooks that it made, each with the time at which it was made."""

    def __init__(self, seed: int = 0) -> None:
        self.events: list[tuple[float, dict[str, Any]]] = []
        self.now = START
        self.model = SfuModel({KEY: SECRET}, seed=seed, on_webhook=lambda event: self.events.append((self.now, event)))
        self.model.create_room("room", self.now)

    def wait(self, seconds: float) -> None:
        """Let time pass, with every event at its own time."""
        until = self.now + seconds
        while (at := self.model.next_event()) is not None and at <= until:
            self.now = max(self.now, at)
            self.model.tick(self.now)
        self.now = until

    def lines(self) -> list[Line]:
        return [line(event) for _, event in self.events]

    def at(self, number: int) -> float:
        return self.events[number][0]

    def listed(self, room: str = "room") -> dict[str, tuple[str, str]]:
        token = access_token(KEY, SECRET, self.now, {"roomAdmin": True, "room": room})
        answer = self.model.room_service("ListParticipants", {"room": room}, token, self.now)
        return {entry["identity"]: (entry["sid"], entry["state"]) for entry in answer.json()["participants"]}

    def found(self, identity: str) -> int:
        token = access_token(KEY, SECRET, self.now, {"roomAdmin": True, "room": "room"})
        return self.model.room_service("GetParticipant", {"room": "room", "identity": identity}, token, self.now).status


def line(event: dict[str, Any]) -> Line:
    participant = event.get("participant", {})
    return event["event"], participant.get("identity", ""), participant.get("disconnectReason", "")


def recorded_lines(name: str) -> list[Line]:
    return [line(webhook.event) for webhook in recordings.load(name).webhooks]


def test_join_and_leave_is_the_recorded_sequence() -> None:
    """Join, publish, leave: the recorded events with the recorded reasons, and `room_finished` after the departure timeout."""
    watched = Watched()
    watched.model.join("room", "alice", watched.now)
    watched.wait(1)
    watched.model.publish_track("room", "alice", watched.now)
    watched.wait(1)
    watched.model.leave("room", "alice", watched.now)
    watched.wait(60)
    assert watched.lines() == recorded_lines("join_leave")
    assert 19 <= watched.at(-1) - watched.at(-2) <= 21


def test_two_participants_are_the_recorded_sequence() -> None:
    """The room finishes after the last one left, not before."""
    names = [name for _, name, _ in recorded_lines("two_participants")][1:3]
    watched = Watched()
    for name in names:
        watched.model.join("room", name, watched.now)
        watched.wait(1)
    for name in names:
        watched.model.leave("room", name, watched.now)
        watched.wait(2)
    watched.wait(60)
    assert watched.lines() == recorded_lines("two_participants")


def test_removed_and_deleted_have_the_recorded_reasons() -> None:
    """RemoveParticipant and DeleteRoom end sessions with their own reasons; the removed one may come back at once."""
    watched = Watched()
    for name in ("alice", "bob"):
        watched.model.join("room", name, watched.now, active_after=0)
    watched.model.remove("room", "alice", watched.now)
    watched.model.join("room", "alice", watched.now, active_after=0)
    assert watched.lines() == recorded_lines("removed")

    deleted = Watched()
    for name in ("alice", "bob"):
        deleted.model.join("room", name, deleted.now, active_after=0)
    deleted.model.delete_room("room", deleted.now)
    assert deleted.lines() == recorded_lines("room_deleted")


def test_who_never_sends_media_is_aborted_as_recorded() -> None:
    """Hanging up gives `SIGNAL_CLOSE`, a leave request `CLIENT_INITIATED`, and hanging `JOIN_FAILURE` after 60 s, JOINED until then."""
    watched = Watched()
    for name in ("closes-at-once", "closes-after-2s", "half-open"):
        watched.model.hang("room", name, watched.now)
        watched.model.abort("room", name, watched.now)
    watched.model.hang("room", "says-leave", watched.now)
    watched.model.leave("room", "says-leave", watched.now)
    for name in ("hangs", "hangs-pinging"):
        watched.model.hang("room", name, watched.now)
    assert {state for _, state in watched.listed().values()} == {"JOINED"}
    began = watched.now
    watched.wait(70)
    assert watched.lines() == recorded_lines("aborted")
    assert watched.at(-1) - began == pytest.approx(60)


def test_a_takeover_is_left_and_then_joined() -> None:
    """A second connection ends the first with `DUPLICATE_IDENTITY`, 20–90 ms before it is ACTIVE itself; the identity is never absent."""
    watched = Watched()
    old = watched.model.join("room", "alice", watched.now, active_after=0)
    watched.wait(1)
    new = watched.model.join("room", "alice", watched.now)
    assert watched.listed() == {"alice": (new, "JOINED")}
    watched.wait(1)
    assert watched.listed() == {"alice": (new, "ACTIVE")}
    left, joined = watched.events[-2:]
    assert (line(left[1]), left[1]["participant"]["sid"]) == (("participant_left", "alice", "DUPLICATE_IDENTITY"), old)
    assert (line(joined[1]), joined[1]["participant"]["sid"]) == (("participant_joined", "alice", ""), new)
    assert 0.02 <= joined[0] - left[0] <= 0.09


def test_a_takeover_that_fails_ends_with_an_abort_of_the_new_session() -> None:
    """When the new connection closes before it is ACTIVE, its abort is the last word, and the identity is gone."""
    watched = Watched()
    watched.model.join("room", "alice", watched.now, active_after=0)
    new = watched.model.hang("room", "alice", watched.now)
    watched.model.abort("room", "alice", watched.now)
    assert watched.lines()[-2:] == [
        ("participant_left", "alice", "DUPLICATE_IDENTITY"),
        ("participant_connection_aborted", "alice", "SIGNAL_CLOSE"),
    ]
    assert watched.events[-1][1]["participant"]["sid"] == new
    assert watched.listed() == {}


def test_a_vanished_client_is_listed_until_it_is_noticed() -> None:
    """`CONNECTION_TIMEOUT` comes some 20 s after the client vanished; until then it is ACTIVE."""
    watched = Watched()
    watched.model.join("room", "alice", watched.now, active_after=0)
    gone = watched.now
    watched.model.vanish("room", "alice", gone)
    watched.wait(18.9)
    assert watched.listed()["alice"][1] == "ACTIVE"
    watched.wait(3)
    assert watched.lines()[-1] == ("participant_left", "alice", "CONNECTION_TIMEOUT")
    assert 19.0 <= watched.at(-1) - gone <= 20.9


def test_a_frozen_client_that_is_back_in_time_goes_on() -> None:
    """Back after 17 s: the same session and no webhook at all; back later: it must join anew."""
    watched = Watched()
    watched.model.join("room", "alice", watched.now, active_after=0)
    watched.model.vanish("room", "alice", watched.now)
    watched.wait(17)
    assert watched.model.resume("room", "alice", watched.now)
    watched.wait(60)
    assert watched.lines()[-1][0] == "participant_joined"
    watched.model.vanish("room", "alice", watched.now)
    watched.wait(21)
    assert not watched.model.resume("room", "alice", watched.now)


def test_an_empty_room_finishes_after_its_own_timeout() -> None:
    """A room that nobody ever joined finishes after the empty timeout; one that is joined in time does not."""
    watched = Watched()
    watched.wait(298)
    assert watched.lines() == [("room_started", "", "")]
    watched.wait(4)
    assert watched.lines()[-1] == ("room_finished", "", "")
    assert watched.model.rooms == {}
    joined = Watched()
    joined.model.join("room", "alice", joined.now)
    joined.wait(1000)
    assert "room" in joined.model.rooms


def test_a_killed_server_forgets_everything() -> None:
    """Without Redis: no webhook, an empty list after the start, and another room sid when the room is created again."""
    watched = Watched()
    watched.model.join("room", "alice", watched.now, active_after=0)
    watched.model.kill(watched.now)
    with pytest.raises(Impossible):
        watched.model.join("room", "alice", watched.now)
    watched.wait(5)
    watched.model.start(watched.now)
    assert (watched.listed(), watched.found("alice")) == ({}, 404)
    watched.model.create_room("room", watched.now)
    watched.model.join("room", "alice", watched.now, active_after=0)
    recorded = [event for event, _, _ in recorded_lines("server_killed")]
    assert [event for event, _, _ in watched.lines()] == [recorded[0], recorded[1], recorded[3], recorded[4]]
    sids = [event["room"]["sid"] for _, event in watched.events]
    assert sids[0] != sids[-1]


def test_a_killed_server_with_redis_leaves_ghosts() -> None:
    """With Redis: both stay listed, `room_started` comes again with the same sid at the first join, the ghost stays until the room finishes."""
    watched = Watched()
    watched.model.join("room", "alice", watched.now, active_after=0)
    bob = watched.model.join("room", "bob", watched.now, active_after=0)
    watched.model.kill(watched.now, redis=True)
    watched.wait(2)
    watched.model.start(watched.now)
    assert set(watched.listed()) == {"alice", "bob"}
    watched.wait(4)
    alice = watched.model.join("room", "alice", watched.now, active_after=0)
    watched.wait(45)
    assert watched.listed() == {"alice": (alice, "ACTIVE"), "bob": (bob, "ACTIVE")}
    watched.model.leave("room", "alice", watched.now)
    watched.wait(25)
    assert (watched.listed(), watched.found("bob")) == ({}, 404)
    assert watched.lines() == recorded_lines("server_killed_redis")
    assert len({event["room"]["sid"] for _, event in watched.events}) == 1


def test_a_ghost_cannot_be_removed_but_its_room_can_be_deleted() -> None:
    """RemoveParticipant of a ghost is `unavailable` after 3 s; DeleteRoom clears it."""
    watched = Watched()
    watched.model.join("room", "bob", watched.now, active_after=0)
    watched.model.kill(watched.now, redis=True)
    watched.model.start(watched.now)
    watched.model.join("room", "alice", watched.now, active_after=0)
    token = access_token(KEY, SECRET, watched.now, {"roomAdmin": True, "roomCreate": True, "room": "room"})
    answer = watched.model.room_service("RemoveParticipant", {"room": "room", "identity": "bob"}, token, watched.now)
    assert (answer.status, answer.json()["code"], answer.delay) == (503, "unavailable", 3.0)
    assert watched.model.room_service("DeleteRoom", {"room": "room"}, token, watched.now).status == 200
    assert watched.listed() == {}
    assert watched.lines()[-2:] == [("participant_left", "alice", "ROOM_DELETED"), ("room_finished", "", "")]


def test_a_thawed_node_takes_a_living_participant_out_of_the_list() -> None:
    """As recorded with two nodes: late `left` of the old sid, an empty list, `room_finished` although she is in the call, until she publishes."""
    watched = Watched()
    old = watched.model.join("room", "alice", watched.now, active_after=0)
    watched.wait(2)
    watched.model.freeze_node("room", watched.now)
    assert watched.listed() == {"alice": (old, "ACTIVE")}
    watched.wait(5.4)
    new = watched.model.join("room", "alice", watched.now, active_after=0)
    watched.wait(30)
    assert watched.listed() == {"alice": (new, "ACTIVE")}
    watched.model.thaw_node("room", watched.now)
    watched.wait(25)
    assert watched.events[-1][1]["participant"]["sid"] == old
    assert (watched.listed(), watched.found("alice")) == ({}, 404)
    watched.wait(20)
    assert watched.lines()[-1] == ("room_finished", "", "")
    watched.model.publish_track("room", "alice", watched.now)
    assert watched.listed() == {"alice": (new, "ACTIVE")}
    watched.wait(3)
    watched.model.leave("room", "alice", watched.now)
    recorded = [webhook.event for webhook in recordings.load("two_nodes_one_frozen").webhooks]
    same_room = [line(event) for event in recorded if event["room"]["sid"] == recorded[-1]["room"]["sid"]]
    assert watched.lines() == same_room


def test_a_forced_shutdown_tells_of_few() -> None:
    """Two SIGTERMs: mostly one of three departures is told, sometimes all and the room's end; then the server is gone."""
    told = set()
    for seed in range(20):
        watched = Watched(seed)
        for name in ("alice", "bob", "carol"):
            watched.model.join("room", name, watched.now, active_after=0)
        told.add(watched.model.shutdown_forced(watched.now))
        watched.wait(0.1)
        ends = watched.lines()[4:]
        assert {reason for event, _, reason in ends if event == "participant_left"} == {"SERVER_SHUTDOWN"}
        assert [event for event, _, _ in ends].count("room_finished") == (len(ends) == 4)
        assert not watched.model.running
    assert told == {1, 3}


def test_a_draining_server_goes_on_until_it_is_empty() -> None:
    """One SIGTERM: nothing happens, newcomers are let in, and it exits some seconds after the last one left."""
    watched = Watched()
    watched.model.join("room", "alice", watched.now, active_after=0)
    watched.model.shutdown(watched.now)
    watched.wait(20)
    watched.model.join("room", "carol", watched.now, active_after=0)
    for name in ("alice", "carol"):
        watched.model.leave("room", name, watched.now)
    watched.wait(6)
    assert watched.lines()[-1] == ("room_finished", "", "")
    assert not watched.model.running


def test_counts_are_late() -> None:
    """`numParticipants` shows what was so some seconds ago."""
    watched = Watched()
    watched.model.join("room", "alice", watched.now, active_after=0)
    assert "numParticipants" not in watched.events[-1][1]["room"]
    watched.wait(6)
    watched.model.leave("room", "alice", watched.now)
    assert watched.events[-1][1]["room"]["numParticipants"] == 1


def test_the_fault_ghosts_keeps_the_departed_listed() -> None:
    """With this fault who leaves is still listed as ACTIVE, under the old sid."""
    watched = Watched()
    sid = watched.model.join("room", "alice", watched.now, active_after=0)
    watched.model.faults.ghosts = True
    watched.model.leave("room", "alice", watched.now)
    assert watched.lines()[-1] == ("participant_left", "alice", "CLIENT_INITIATED")
    assert watched.listed() == {"alice": (sid, "ACTIVE")}


def test_a_token_lets_in_whom_it_names() -> None:
    """A join token proves room and identity; the new session's sid comes back."""
    watched = Watched()
    joined = watched.model.join_with_token(join_token(KEY, SECRET, watched.now, "room", "alice"), watched.now)
    assert (joined.room, joined.identity) == ("room", "alice")
    watched.wait(1)
    assert watched.listed() == {"alice": (joined.sid, "ACTIVE")}


@pytest.mark.parametrize(
    ("token", "status"),
    [
        ("garbage", 401),
        (join_token(KEY, "another secret", START, "room", "alice"), 401),
        (join_token(KEY, SECRET, START - 7200, "room", "alice"), 401),
        (join_token("nokey", SECRET, START, "room", "alice"), 401),
        (access_token(KEY, SECRET, START, {"roomAdmin": True, "room": "room"}, identity="alice"), 401),
        (join_token(KEY, SECRET, START, "nowhere", "alice"), 404),
    ],
)
def test_other_tokens_let_nobody_in(token: str, status: int) -> None:
    """Unreadable, wrongly signed, expired, of a stranger, without the grant, for a room that is not there: refused, and no session."""
    watched = Watched()
    with pytest.raises(JoinRefused) as refused:
        watched.model.join_with_token(token, watched.now)
    assert refused.value.status == status
    assert watched.listed() == {}


def test_the_same_seed_gives_the_same_run() -> None:
    """Two runs with one seed are equal to the byte, another seed gives other ids."""

    def run(seed: int) -> str:
        watched = Watched(seed)
        for name in ("alice", "bob"):
            watched.model.join("room", name, watched.now)
        watched.model.vanish("room", "alice", watched.now)
        watched.wait(120)
        return json.dumps(watched.events)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_what_makes_no_sense_is_refused_and_changes_nothing() -> None:
    """Operations on rooms and participants that are not there raise, and send no webhook."""
    watched = Watched()
    for attempt in (
        lambda: watched.model.leave("room", "nobody", watched.now),
        lambda: watched.model.join("nowhere", "alice", watched.now),
        lambda: watched.model.delete_room("nowhere", watched.now),
        lambda: watched.model.publish_track("room", "nobody", watched.now),
    ):
        with pytest.raises(Impossible):
            attempt()
    assert watched.lines() == [("room_started", "", "")]
