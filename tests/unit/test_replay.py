"""The webhooks that a real LiveKit server sent, given to the real engine on a virtual clock: in order, late and shuffled, repeated, with losses.

Every identity of a recording is delegated before it begins. Whoever looks at the SFU is told the truth, which follows from what the recording says
of its sessions, except where the recording shows that the SFU itself was wrong: there, what it answered. The homeserver always works.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest
from sfu_delegate.delegation.model import (
    Action,
    Answered,
    DelayedEvent,
    Input,
    Listed,
    Looked,
    Outcome,
    Presence,
    Seen,
    Sighting,
    State,
    Task,
    Verdict,
)
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.engine import Engine, Limits
from sfu_delegate.livekit import webhook
from sfu_delegate.store.base import Transaction

from tests import recordings, stores
from tests.recordings import Recording
from tests.rows import DELAY, SFU, accept

AFTERWARDS = 400.0  # seconds that a replay goes on after the recording's end: longer than the join timeout
ROUND_TRIP = 0.05  # seconds


@pytest.fixture(params=stores.KINDS, autouse=True)
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which database it is."""
    with stores.chosen(request.param):
        yield request.param


Who = tuple[str, str]  # room, identity
Lister = Callable[[str, float], tuple[Listed, ...] | None]
"""What ListParticipants answers for a room at a time; None: nothing."""


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

AWAY_FOR_LONG = {("room-frozen", "frozen-30s"), ("room-removed", "alice")}
"""They came back after they had been given up: 10 s after CONNECTION_TIMEOUT, and 3 s after they had been removed."""

IN_DOUBT = {"two_nodes_one_frozen", "two_nodes_one_killed"}
"""One of two nodes was away for a while."""

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
        if said.joined_at_ms:  # a webhook may be tried for the first time long after that
            began = min(at, said.joined_at_ms / 1000 - recording.started_at)
        if said.identity:
            everybody.add(who)
        if said.event == "participant_joined":
            joins.setdefault((who, said.sid), (began, said.joined_at_ms))
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
    course: Course, inputs: Sequence[tuple[float, Input]], seed: int, listed: Lister | None = None, afterwards: float = AFTERWARDS
) -> Replayed:
    """Run the engine through `inputs` and for a while beyond, stepping when something arrives and when it asks to be woken."""
    store = stores.another()
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

    now, end = -1.0, max([course.end, *(at for at, _ in inputs)]) + afterwards
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

    def results(tx: Transaction) -> list[DelayedEvent]:
        tx.lock_rooms(tx.rooms_of((), names), ())
        return [tx.of_delegation(name)[0] for name in names]

    rows = store.atomically(results)
    return Replayed(sent, {(there.room, there.identity): (there.state, there.outcome, there.presence) for there in rows})


def assert_nobody_connected_was_sent(course: Course, replayed: Replayed) -> None:
    assert [(who, at) for who, at in replayed.sent if course.present(who, at)] == []


def assert_whoever_left_is_sent(course: Course, replayed: Replayed) -> None:
    assert {who: replayed.states[who] for who in course.everybody - course.staying if replayed.states[who][1] is not Outcome.SENT} == {}


@pytest.mark.parametrize("name", NAMES)
def test_in_order_whoever_left_is_sent_and_nobody_else(name: str) -> None:
    """At the recorded times: nobody is sent while connected, everybody who left for good is, and who is there in the end is kept alive."""
    course = course_of(recordings.load(name))
    replayed = replay(course, course.inputs, 0)
    assert_nobody_connected_was_sent(course, replayed)
    for who in course.everybody:
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


@stores.seeds(*range(3), on_postgresql=1)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_LOOK])
def test_late_shuffled_and_repeated_webhooks_come_to_the_same_end(name: str, seed: int) -> None:
    """Each webhook arrives up to 3 s late, so in any order, and some arrive again: nobody connected is sent, and who left for good is, also where
    that was not told."""
    course, random = course_of(recordings.load(name)), Random(seed)
    inputs = [(at + 3.0 * random.random(), given) for at, given in course.inputs]
    inputs += [(at + 4.0 * random.random(), given) for at, given in inputs if random.random() < 0.3]
    replayed = replay(course, inputs, seed)
    assert_nobody_connected_was_sent(course, replayed)
    assert_whoever_left_is_sent(course, replayed)


@stores.seeds(*range(3), on_postgresql=1)
@pytest.mark.parametrize("name", NAMES)
def test_with_losses_nobody_connected_is_sent_and_whoever_left_is(name: str, seed: int) -> None:
    """A third of the webhooks never arrive: routine looks find who left, and nobody who is there is ended.

    Where a node was away, an absence proves nothing for an hour; whoever left without a word is let run then.
    """
    course, random = course_of(recordings.load(name)), Random(100 + seed)
    inputs = [(at, given) for at, given in course.inputs if random.random() < 0.66]
    if name not in IN_DOUBT:
        replayed = replay(course, inputs, seed)
        assert_whoever_left_is_sent(course, replayed)
    else:
        policy = Policy()
        replayed = replay(course, inputs, seed, afterwards=policy.doubt + DELAY + policy.adrift_keep + policy.interval_most)
        outcomes = {replayed.states[who][1] for who in course.everybody - course.staying}
        assert outcomes <= {Outcome.SENT, Outcome.RAN_OUT}
    assert_nobody_connected_was_sent(course, replayed)


@pytest.mark.parametrize("name", NAMES)
def test_without_any_webhook_nobody_connected_is_sent_and_whoever_left_is(name: str) -> None:
    """The looks after the delegation find who is there, routine looks who left; who never comes is given up when the join timeout is over."""
    course = course_of(recordings.load(name))
    replayed = replay(course, [], 0)
    assert_nobody_connected_was_sent(course, replayed)
    assert_whoever_left_is_sent(course, replayed)


@stores.seeds(*range(3), on_postgresql=1)
@pytest.mark.parametrize("name", NAMES)
def test_an_sfu_that_cannot_be_asked_ends_nobody_who_comes_back_at_once(name: str, seed: int) -> None:
    """Every look fails. Who is sent had said goodbye, or been away for a minute, or been removed."""
    course = course_of(recordings.load(name))
    replayed = replay(course, course.inputs, seed, listed=unreachable)
    assert_nobody_connected_was_sent(course, replayed)


def unreachable(room: str, at: float) -> None:
    """Nobody can be asked."""


# ── what the SFU really answered ──


DOWN = {"server_killed": (1.4816, 6.54), "server_killed_redis": (10.8044, 12.87)}
"""When the whole SFU was down, and could not be asked, in seconds."""


def as_recorded(recording: Recording, course: Course) -> Lister:
    """What ListParticipants answered then: the recorded answer before, less who said goodbye since, and with who joined since."""
    entries = [entry for entry in recording.timeline if str(entry["action"]).startswith("ListParticipants")]
    answers = [(entry["t_ms"] / 1000, entry["answer"] if "answer" in entry else entry["body"]["participants"]) for entry in entries]
    lefts = {given.sid: at for at, given in course.inputs if isinstance(given, Seen) and given.what is Sighting.LEFT}
    down = DOWN.get(recording.name, (0.0, 0.0))
    (room,) = {stay.who[0] for stay in course.stays}

    def answered(asked: str, at: float) -> tuple[Listed, ...] | None:
        if down[0] <= at < down[1]:
            return None
        before = [(then, answer) for then, answer in answers if then <= at]
        if not before or asked != room:
            return course.listed(asked, at)
        then, answer = before[-1]
        old = [Listed(identity, sid, state, 0) for identity, sid, state in answer if not then <= lefts.get(sid, -1.0) <= at]
        new = [entry for entry in course.listed(asked, at) for stay in course.stays if stay.sid == entry.sid and stay.start > then]
        return tuple(old + new)

    return answered


def recorded(name: str) -> tuple[Course, Replayed, dict[str, float]]:
    """A recording, what came of it with the SFU answering as it did, and when who was sent."""
    recording = recordings.load(name)
    course = course_of(recording)
    replayed = replay(course, course.inputs, 0, as_recorded(recording, course))
    return course, replayed, {who[1]: at for who, at in replayed.sent}


def test_two_nodes_one_frozen() -> None:
    """A node froze and thawed: the SFU then listed nobody for 30 s, and said that the room had finished, while alice was connected. She ends normally
    when she says goodbye at 99.24 s."""
    _, replayed, sent = recorded("two_nodes_one_frozen")
    assert list(sent) == ["alice"]
    assert 99.24 + 2.0 <= sent["alice"] <= 99.24 + 2.0 + 3 * ROUND_TRIP + Policy().look_gap
    assert set(replayed.states.values()) == {(State.DONE, Outcome.SENT, Presence.GONE)}


def test_two_nodes_one_killed() -> None:
    """bob vanished with his node, and is listed as ACTIVE for ever: he is sent a minute and a half after the room came up on the other node. alice
    came back there; the session that she had on the dead node does not count when the room is deleted."""
    _, _, sent = recorded("two_nodes_one_killed")
    assert set(sent) == {"alice", "bob"}
    assert 39.1 <= sent["alice"] <= 39.2
    assert 11.25 + 90.0 <= sent["bob"] <= 11.25 + 90.0 + 5.0


def test_server_killed() -> None:
    """After the restart the SFU knows nobody, for 6 s and 8 s, until they are back with new sessions: nobody is sent."""
    _, replayed, sent = recorded("server_killed")
    assert sent == {}
    assert set(replayed.states.values()) == {(State.LIVE, Outcome.OPEN, Presence.CONNECTED)}


def test_server_killed_redis() -> None:
    """The SFU came back with its memory: bob, who vanished with it, stays ACTIVE in its lists. He is sent 90 s after the room's second start, at
    16.71 s; alice, who came back, 2 s after her goodbye at 55.83 s, although the left of her first session never came."""
    _, _, sent = recorded("server_killed_redis")
    assert set(sent) == {"alice", "bob"}
    assert 55.83 + 2.0 <= sent["alice"] <= 55.83 + 2.0 + 3 * ROUND_TRIP + Policy().look_gap
    assert 16.71 + 90.0 <= sent["bob"] <= 16.71 + 90.0 + 10.0


def test_server_shutdown_forced() -> None:
    """Of three in a room, one to three SERVER_SHUTDOWN get out before the process ends. Nobody comes back: those who were told of are sent after
    30 s, the others when looks have not shown them for a while."""
    recording = recordings.load("server_shutdown_forced")
    course = course_of(recording)
    replayed = replay(course, course.inputs, 0)
    told = {given.identity: at for at, given in course.inputs if isinstance(given, Seen) and given.what is Sighting.LEFT}
    sent = {who[1]: at for who, at in replayed.sent}
    assert set(sent) == {identity for _, identity in course.everybody}
    for identity, at in told.items():
        assert at + 30.0 <= sent[identity] <= at + 30.0 + 3 * ROUND_TRIP + Policy().look_gap
    assert len(told) < len(sent)
    assert all(sent[identity] <= course.end + 2 * Policy().interval + 90.0 for identity in sent)


def test_a_list_that_is_wrong_after_a_node_was_away_ends_nobody() -> None:
    """A node of two froze and thawed: the SFU listed nobody for 30 s, and said that the room had finished, while alice was connected.

    A second participant, who comes and goes all the time, makes the daemon look at the room all the time.
    """
    recording = recordings.load("two_nodes_one_frozen")
    course = course_of(recording)
    room = "room-node-frozen-3"
    inputs = list(course.inputs)
    for n in range(12, 98, 3):
        inputs.append((float(n), accept(f"{room} bob-{n}", identity=f"bob-{n}", room=room)))
    names = frozenset((room, f"bob-{n}") for n in range(12, 98, 3))
    replayed = replay(replace(course, everybody=course.everybody | names), inputs, 0, as_recorded(recording, course))
    alice = (room, "alice")
    assert [at for who, at in replayed.sent if who == alice and at < 99.24] == []
    assert replayed.states[alice][1] is Outcome.SENT
