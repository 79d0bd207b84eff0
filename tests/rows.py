"""Rows and inputs for tests of the rules: one participant, one homeserver, and a time that is easy to read."""

from math import inf
from typing import Any

from sfu_delegate.delegation.lifecycle import ADRIFT_CHECK
from sfu_delegate.delegation.model import (
    Accept,
    Action,
    Answered,
    DelayedEvent,
    Lane,
    Listed,
    Looked,
    NewEvent,
    OnEnd,
    Outcome,
    Presence,
    Seen,
    Session,
    Sighting,
    State,
    Verdict,
)
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.urgency import UNKNOWN_COUNTDOWN

SFU = "main"
ROOM = "room"
ALICE = "alice"
HOMESERVER = "hs.test"
NOW = 1_000_000.0
DELAY = 3600.0
POLICY = Policy()


def live(sid: str = "S1", joined_at_ms: int = 1000, heard_at: float = NOW - 60.0) -> Session:
    """A session that joined and has not left."""
    return Session(sid, joined_at_ms, True, heard_at)


def ended(sid: str = "S0", joined_at_ms: int = 500, heard_at: float = NOW - 120.0) -> Session:
    """The tombstone of a session."""
    return Session(sid, joined_at_ms, False, heard_at)


def row(presence: Presence = Presence.CONNECTED, state: State | None = None, **changes: Any) -> DelayedEvent:
    """A row that could have come about; what is not named follows from the presence and the state. Verified 60 s ago, of an hour's delay."""
    if state is None:
        state = State.ENDING if presence is Presence.GONE else State.LIVE
    running_since = changes.get("running_since", NOW - 60.0)
    delay = changes.get("delay", DELAY)
    gone_at = NOW - 5.0 if presence is Presence.GONE else None
    lane, due, harm = {
        State.LIVE: (Lane.RESTART, running_since + delay * POLICY.restart_at, running_since + delay),
        State.ENDING: (Lane.END, NOW, gone_at),
        State.SUPERSEDED: (Lane.RESTART, NOW, running_since + delay),
        State.VANISHED: (Lane.TIMER, NOW + POLICY.vanished_wait, None),
        State.ADRIFT: (Lane.TIMER, NOW + ADRIFT_CHECK, running_since + delay + POLICY.adrift_keep),
        State.DONE: (Lane.TIMER, NOW + POLICY.keep, None),
    }[state]
    sessions = {
        Presence.EXPECTED: (),
        Presence.CONNECTED: (live(),),
        Presence.AWAY: (ended("S1", 1000),),
        Presence.GONE: (ended("S1", 1000),),
    }[presence]
    since = {Presence.EXPECTED: NOW - 10.0, Presence.AWAY: NOW - 4.0, Presence.GONE: NOW - 5.0}.get(presence, NOW - 60.0)
    made = DelayedEvent(
        id=1,
        delegation="D1",
        sfu=SFU,
        room=ROOM,
        identity=ALICE,
        alias=None,
        homeserver=HOMESERVER,
        user=None,
        delay_id="delay-1",
        delay=delay,
        on_end=OnEnd.SEND,
        token=None,
        accepted_at=NOW - 60.0,
        verified_at=NOW - 60.0,
        presence=presence,
        presence_since=since,
        sessions=sessions,
        reason="CLIENT_INITIATED" if presence in (Presence.AWAY, Presence.GONE) else "",
        attempt_at=NOW - 10.0,
        look_at=NOW if presence in (Presence.EXPECTED, Presence.AWAY) and state is not State.DONE else None,
        state=state,
        running_since=running_since,
        restarts=1,
        attempts=0,
        end_tried=False,
        outcome=Outcome.SENT if state is State.DONE else Outcome.OPEN,
        ended_at=gone_at,
        finished_at=NOW - 1.0 if state is State.DONE else None,
        lane=lane,
        due=due,
        harm=harm,
        claim=7,
        claimed=False,
    )
    return made._replace(**changes)


def claimed(row: DelayedEvent, **changes: Any) -> DelayedEvent:
    """The row while its action is under way."""
    return row._replace(claimed=True, due=NOW + POLICY.lease, **changes)


def joined(sid: str = "S1", joined_at_ms: int = 1000, *, identity: str = ALICE, room: str = ROOM) -> Seen:
    return Seen(SFU, room, identity, Sighting.JOINED, sid, joined_at_ms)


def left(sid: str = "S1", reason: str = "CLIENT_INITIATED", joined_at_ms: int = 1000, *, identity: str = ALICE, room: str = ROOM) -> Seen:
    return Seen(SFU, room, identity, Sighting.LEFT, sid, joined_at_ms, reason)


def aborted(sid: str = "S1", reason: str = "SIGNAL_CLOSE", joined_at_ms: int = 1000, *, identity: str = ALICE, room: str = ROOM) -> Seen:
    return Seen(SFU, room, identity, Sighting.ABORTED, sid, joined_at_ms, reason)


def listed(sid: str = "S1", state: str = "ACTIVE", joined_at_ms: int = 1000, *, identity: str = ALICE) -> Listed:
    return Listed(identity, sid, state, joined_at_ms)


def looked(*participants: Listed, sent_at: float = NOW, claim: int = 1, room: str = ROOM, doubtful: bool = False) -> Looked:
    """A look that was answered."""
    return Looked(SFU, room, claim, sent_at, participants, doubtful=doubtful)


def look_failed(sent_at: float = NOW, claim: int = 1, room: str = ROOM) -> Looked:
    """A look that was not."""
    return Looked(SFU, room, claim, sent_at, None, "timeout")


def answered(
    row: DelayedEvent, action: Action, verdict: Verdict, *, sent_at: float = NOW - 0.1, claim: int | None = None, retry_after: float | None = None
) -> Answered:
    return Answered(row.homeserver, row.id, row.claim if claim is None else claim, action, sent_at, verdict, retry_after)


def accept(
    delegation: str = "D1",
    *delay_ids: str,
    identity: str = ALICE,
    room: str = ROOM,
    homeserver: str = HOMESERVER,
    delay: float = DELAY,
    on_end: OnEnd = OnEnd.SEND,
    alias: str | None = None,
    twin: str | None = None,
    running_since: float | None = None,
    shown_at: float | None = None,
) -> Accept:
    shown = shown_at if shown_at is not None else 0.0 if running_since is None else inf
    events = tuple(NewEvent(delay_id, delay, on_end, running_since, shown) for delay_id in delay_ids or (f"delay-of-{delegation}",))
    return Accept(delegation, SFU, room, identity, homeserver, events, alias, twin=twin)


POSSIBLE = {
    State.LIVE: (Presence.EXPECTED, Presence.CONNECTED, Presence.AWAY),
    State.ENDING: (Presence.GONE,),
    State.SUPERSEDED: tuple(Presence),
    State.VANISHED: (Presence.EXPECTED, Presence.CONNECTED, Presence.AWAY),
    State.ADRIFT: (Presence.EXPECTED, Presence.CONNECTED, Presence.AWAY),
    State.DONE: tuple(Presence),
}
"""A LIVE, VANISHED or ADRIFT event's participant is not gone; an ENDING one's is."""


def assert_consistent(there: DelayedEvent) -> None:
    """What holds for every row at any time."""
    assert there.presence in POSSIBLE[there.state]
    assert (there.outcome is Outcome.OPEN) is (there.state is not State.DONE)
    assert (there.finished_at is None) is (there.state is not State.DONE)
    assert there.due is not None
    lane = {State.LIVE: Lane.RESTART, State.SUPERSEDED: Lane.RESTART, State.ENDING: Lane.END}
    if there.state is State.LIVE and there.claimed:
        assert there.lane in (Lane.RESTART, Lane.END)  # END: a goodbye was under way when its participant came back
    else:
        assert there.lane is lane.get(there.state, Lane.TIMER)
    if there.state is State.ENDING:
        assert there.harm == there.ended_at
    elif there.state is State.LIVE and there.verified_at is None:
        # Its countdown is not known: a part of it is assumed to be left.
        assert there.harm is not None
        assert there.harm <= max(there.deadline, there.accepted_at + there.delay * UNKNOWN_COUNTDOWN)
    elif there.state in (State.LIVE, State.SUPERSEDED):
        assert there.harm == there.deadline
    else:
        assert (there.harm is not None) is (there.state is State.ADRIFT)
        assert not there.claimed
    if there.state is State.DONE:
        assert (there.token, there.look_at) == (None, None)
    else:
        wanted = there.presence in (Presence.EXPECTED, Presence.AWAY)
        # Where lists contradict webhooks, time does not tell, and routine looks are enough. Of somebody whose event vanished a look is wanted.
        contradicted = there.presence is Presence.AWAY and there.state is not State.LIVE and there.look_at is None
        assert (there.look_at is not None) is wanted or contradicted or there.state is State.VANISHED
        assert (there.ended_at is not None) is (there.presence is Presence.GONE)
    assert there.attempts >= 0
