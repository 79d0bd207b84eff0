"""The webhooks that a real LiveKit server sent, given to the real engine on a virtual clock: in order, late and shuffled, repeated, with losses.

Every identity of a recording is delegated before it begins. Whoever looks at the SFU is told the truth, which follows from what the recording says
of its sessions, except where the recording shows that the SFU itself was wrong: there, what it answered. The homeserver always works.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest
from sfu_delegate.delegation.model import Action, Answered, Input, Listed, Looked, Outcome, Presence, Seen, Sighting, State, Task, Verdict
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.engine import Engine, Limits
from sfu_delegate.livekit import webhook
from sfu_delegate.store.sqlite import SqliteStore

from tests import recordings
from tests.recordings import Recording
from tests.rows import SFU, accept

AFTERWARDS = 400.0  # seconds that a replay goes on after the recording's end: longer than the join timeout
ROUND_TRIP = 0.05  # seconds

Who = tuple[str, str]  # room, identity


@dataclass(frozen=True, slots=True)
class Stay:
    """One session of one participant, in seconds since the recording's start."""

    who: Who
    sid: str
    joined_at_ms: int
    start: float
    end: float  # infinite when it goes on


@dataclass(frozen=True, slots=True)
class Course:
    """A recording as the engine needs it: what was delivered when, and who was there when."""

    inputs: tuple[tuple[float, Input], ...]
    stays: tuple[Stay, ...]
    everybody: frozenset[Who]
    end: float

    def present(self, who: Who, at: float) -> bool:
        return any(stay.who == who and stay.start <= at < stay.end for stay in self.stays)

    def listed(self, room: str, at: float) -> tuple[Listed, ...]:
        return tuple(
            Listed(stay.who[1], stay.sid, "ACTIVE", stay.joined_at_ms) for stay in self.stays if stay.who[0] == room and stay.start <= at < stay.end
        )

    @property
    def staying(self) -> set[Who]:
        return {who for who in self.everybody if self.present(who, self.end)}


SFU_GONE = {"server_killed": 1.4816, "server_killed_redis": 10.8044, "two_nodes_one_killed": 6.1278}
"""When the SFU's process was killed, in seconds: nobody's session outlived that, and no left was sent."""

GHOSTS = {(room, identity) for room in ("room-redis-restart", "room-node-killed-2") for identity in ("alice", "bob")}
"""The left of their first session never came, and the room's second start is a reason to doubt absences: in doubt they count as connected."""

AWAY_FOR_LONG = {("room-frozen", "frozen-30s"), ("room-removed", "alice")}
"""They came back after they had been given up: 10 s after CONNECTION_TIMEOUT, and 3 s after they had been removed."""

NAMES = recordings.names()
NO_LOOK = {"removed"}
"""Somebody who was removed is gone at once, without a look: so here, a left that is delivered only after they are back ends the wrong session."""


def unannounced_end(recording: Recording, who: Who, start: float, joins: Iterable[float]) -> float:
    """When a session ended whose left was not delivered: the client said it, or joined anew, or the SFU was killed; infinite if nothing tells."""
    told = {f"{who[1]} left", f"client {who[1]}: left", "all left", f"client {who[1]}: disconnected", f"send SIGKILL to client {who[1]}"}
    ends = [entry["t_ms"] / 1000 for entry in recording.timeline if entry["action"] in told]
    ends += [*joins, SFU_GONE.get(recording.name, float("inf")), float("inf")]
    return min(float(at) for at in ends if at > start)


def course_of(recording: Recording) -> Course:
    """What was accepted (answered with 200), once each, and the truth about all sessions."""
    inputs: list[tuple[float, Input]] = []
    joins: dict[tuple[Who, str], tuple[float, int]] = {}
    lefts: dict[tuple[Who, str], float] = {}
    everybody: set[Who] = set()
    accepted: set[str] = set()
    for request in recording.webhooks:
        said = webhook.decode(request.body)
        at, who = request.t_ms / 1000, (said.room, said.identity)
        if said.identity:
            everybody.add(who)
        if said.event == "participant_joined":
            joins.setdefault((who, said.sid), (at, said.joined_at_ms))
        elif said.event == "participant_left":
            lefts.setdefault((who, said.sid), at)
        given = webhook.to_input(SFU, said)
        if given is not None and request.answered == 200 and said.id not in accepted:
            accepted.add(said.id)
            inputs.append((at, given))
    stays = []
    for (who, sid), (start, joined_at_ms) in joins.items():
        end = lefts.get((who, sid))
        if end is None:
            end = unannounced_end(recording, who, start, (at for (other, _), (at, _) in joins.items() if other == who))
        stays.append(Stay(who, sid, joined_at_ms, start, end))
    end = max([at for at, _ in inputs] + [float(entry["t_ms"]) / 1000 for entry in recording.timeline])
    return Course(tuple(inputs), tuple(stays), frozenset(everybody), end)


@dataclass
class Replayed:
    """What came of it: the goodbyes that were sent, with their times, and how each delegation ended."""

    sent: list[tuple[Who, float]]
    states: dict[Who, tuple[State, Outcome, Presence]]


def replay(
    course: Course, inputs: Sequence[tuple[float, Input]], seed: int, listed: Callable[[str, float], tuple[Listed, ...] | None] | None = None
) -> Replayed:
    """Run the engine through `inputs` and for a while beyond, stepping when something arrives and when it asks to be woken."""
    store = SqliteStore(":memory:")
    engine = Engine(store, Policy(), Limits(), Random(seed))
    shown = listed or course.listed
    names = {f"{room} {identity}": (room, identity) for room, identity in course.everybody}
    sent: list[tuple[Who, float]] = []
    number = itertools.count()
    coming: list[tuple[float, int, Input]] = [(at, next(number), given) for at, given in inputs]
    coming += [(-1.0, next(number), accept(name, identity=who[1], room=who[0])) for name, who in names.items()]
    heapq.heapify(coming)

    def carry_out(task: Task, at: float) -> Input:
        if task.action is Action.LOOK:
            return Looked(SFU, task.room, task.claim, at, shown(task.room, at))
        if task.action is Action.SEND:
            sent.append((names[task.delegation], at))
        return Answered(task.homeserver, task.event, task.claim, task.action, at, Verdict.DONE)

    now, end = -1.0, max([course.end, *(at for at, _ in inputs)]) + AFTERWARDS
    while True:
        batch = []
        while coming and coming[0][0] <= now:
            batch.append(heapq.heappop(coming)[2])
        step = engine.step(batch, now)
        assert not any(isinstance(reply, Exception) for reply in step.replies)
        for task in step.tasks:
            heapq.heappush(coming, (now + ROUND_TRIP, next(number), carry_out(task, now)))
        ahead = [at for at in (coming[0][0] if coming else None, step.wake) if at is not None]
        if not ahead or min(ahead) > end:
            break
        now = max(now, min(ahead))
    rows = store.atomically(lambda tx: [tx.of_delegation(name)[0] for name in names])
    return Replayed(sent, {(there.room, there.identity): (there.state, there.outcome, there.presence) for there in rows})


def assert_nobody_connected_was_sent(course: Course, replayed: Replayed) -> None:
    assert [(who, at) for who, at in replayed.sent if course.present(who, at)] == []


@pytest.mark.parametrize("name", NAMES)
def test_in_order_whoever_left_is_sent_and_nobody_else(name: str) -> None:
    """At the recorded times: nobody is sent while connected, everybody who left for good is, and who is there in the end is kept alive."""
    course = course_of(recordings.load(name))
    replayed = replay(course, course.inputs, 0)
    assert_nobody_connected_was_sent(course, replayed)
    for who in course.everybody - GHOSTS:
        state, outcome, presence = replayed.states[who]
        if who in course.staying - AWAY_FOR_LONG:
            assert (state, presence) == (State.LIVE, Presence.CONNECTED), who
        else:
            assert outcome is Outcome.SENT, who


@pytest.mark.parametrize("name", ["join_leave", "timing", "two_participants", "rapid_reconnect", "duplicate_identity"])
def test_a_goodbye_comes_within_seconds(name: str) -> None:
    """Who says goodbye is sent 2 s after the last session's left: the time that a reconnecting browser gets."""
    course = course_of(recordings.load(name))
    for who, at in replay(course, course.inputs, 0).sent:
        last = max(stay.end for stay in course.stays if stay.who == who)
        assert 2.0 <= at - last <= 2.0 + 3 * ROUND_TRIP + Policy().look_gap, who


@pytest.mark.parametrize("name", ["room_deleted", "removed"])
def test_who_is_removed_is_sent_at_once(name: str) -> None:
    """Without a look."""
    course = course_of(recordings.load(name))
    replayed = replay(course, course.inputs, 0)
    assert replayed.sent
    for who, at in replayed.sent:
        assert at in {stay.end for stay in course.stays if stay.who == who}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_LOOK])
def test_late_shuffled_and_repeated_webhooks_come_to_the_same_end(name: str, seed: int) -> None:
    """Each webhook arrives up to 3 s late, so in any order, and some arrive again: nobody connected is sent, and who left for good is.

    Where a left is not among the webhooks, it is luck whether somebody else's departure makes the daemon look at that room.
    """
    course, random = course_of(recordings.load(name)), Random(seed)
    inputs = [(at + 3.0 * random.random(), given) for at, given in course.inputs]
    inputs += [(at + 4.0 * random.random(), given) for at, given in inputs if random.random() < 0.3]
    replayed = replay(course, inputs, seed)
    assert_nobody_connected_was_sent(course, replayed)
    told = {(given.identity, given.sid) for _, given in inputs if isinstance(given, Seen) and given.what is not Sighting.JOINED}
    untold = {stay.who for stay in course.stays if (stay.who[1], stay.sid) not in told}
    for who in course.everybody - untold - course.staying:
        assert replayed.states[who][1] is Outcome.SENT, who


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_with_losses_nobody_connected_is_sent(name: str, seed: int) -> None:
    """A third of the webhooks never arrive. Ghosts may stay; nobody who is there is ended."""
    course, random = course_of(recordings.load(name)), Random(100 + seed)
    inputs = [(at, given) for at, given in course.inputs if random.random() < 0.66]
    assert_nobody_connected_was_sent(course, replay(course, inputs, seed))


@pytest.mark.parametrize("name", NAMES)
def test_without_any_webhook_nobody_connected_is_sent(name: str) -> None:
    """The looks after the delegation find who is there; who never comes is given up when the join timeout is over."""
    course = course_of(recordings.load(name))
    assert_nobody_connected_was_sent(course, replay(course, [], 0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_an_sfu_that_cannot_be_asked_ends_nobody_who_comes_back_at_once(name: str, seed: int) -> None:
    """Every look fails. Who is sent had said goodbye, or been away for a minute, or been removed."""
    course = course_of(recordings.load(name))
    replayed = replay(course, course.inputs, seed, listed=unreachable)
    assert_nobody_connected_was_sent(course, replayed)


def unreachable(room: str, at: float) -> None:
    """Nobody can be asked."""


def test_a_list_that_is_wrong_after_a_node_was_away_ends_nobody() -> None:
    """A node of two froze and thawed: the SFU listed nobody for 30 s, and said that the room had finished, while alice was connected.

    A second participant, who comes and goes all the time, makes the daemon look at the room all the time.
    """
    recording = recordings.load("two_nodes_one_frozen")
    course = course_of(recording)
    answers = [(entry["t_ms"] / 1000, entry["answer"]) for entry in recording.timeline if str(entry["action"]).startswith("ListParticipants asked")]

    def answered(room: str, at: float) -> tuple[Listed, ...]:
        before = [answer for asked, answer in answers if asked <= at]
        return tuple(Listed(identity, sid, state, 0) for identity, sid, state in (before[-1] if before else []))

    room = "room-node-frozen-3"
    inputs = list(course.inputs)
    for n in range(12, 98, 3):
        inputs.append((float(n), accept(f"{room} bob-{n}", identity=f"bob-{n}", room=room)))
    names = frozenset((room, f"bob-{n}") for n in range(12, 98, 3))
    replayed = replay(replace(course, everybody=course.everybody | names), inputs, 0, listed=answered)
    alice = (room, "alice")
    assert [at for who, at in replayed.sent if who == alice and at < 99.24] == []
    assert replayed.states[alice][1] is Outcome.SENT
