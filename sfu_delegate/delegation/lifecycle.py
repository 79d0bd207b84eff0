"""The life of a delegated event, as two tables and the few rules that no table holds.

Theory of operation
-------------------
Two machines share one row. The first (`PRESENCE`) is about the participant: is it in the call? Its inputs are signs (`presence.py` boils webhooks and
looks down to them). The second (`EVENTS`) is about one delayed event: what is to be done with it at the homeserver, and what became of it. The
first drives the second at exactly two points: the participant is found to be GONE, and it is found to be back.

Two mistakes are possible, and they are not equal. Ending the event of somebody who is in the call drops a person from it; ending it late shows a
ghost for a while. So a departure is a claim to be checked, an absence has to be seen twice, and whatever cannot be known counts as connected.

Two rules keep this honest:

1. Everything that changes a delayed event's state is in this file. The engine stores what comes out, and does what the row says.
2. What is to be done next is data in the row (`lane`, `due`, `harm`, `claim`). There is no list of commands beside it that could disagree.

Countdowns are kept conservatively. `running_since` is the time *before* the last successful restart request was sent; the client may restart as
well, so the true deadline may be later than `deadline`, never earlier. Restarts are therefore tried even after ours has passed.
"""

from collections.abc import Iterator
from enum import StrEnum

from sfu_delegate.delegation import presence as looking
from sfu_delegate.delegation.model import (
    Accept,
    Action,
    Answered,
    DelayedEvent,
    Due,
    End,
    Lane,
    Looked,
    NewEvent,
    Note,
    OnEnd,
    Outcome,
    Presence,
    RoomChanged,
    Seen,
    Session,
    SfuFound,
    SfuLost,
    State,
    Verdict,
    Withdraw,
)
from sfu_delegate.delegation.policy import ENDED_BY_OPERATOR, SFU_LOST, Policy
from sfu_delegate.delegation.presence import Finding, Sign
from sfu_delegate.delegation.urgency import UNKNOWN_COUNTDOWN

ADRIFT_CHECK = 60.0
"""Seconds between two looks at whether the SFU of an event that was let run has been heard of again."""

PAST_DEADLINE = 5.0
"""Seconds, at the most, between tries of a restart whose deadline has passed as far as we know, for another delay."""

RESTARTS_TOLD = 600.0
"""Seconds of delay from which on each restart is told in the history: some ten lines an hour at the most."""

RESTARTED = "restarted"
"""What the history says of a restart, at the time when its request was sent."""

BY_OPERATOR = "by the operator"
"""What the history says beside the outcome of a delegation that its client has not withdrawn by itself."""

VANISHED_WAITS = 10
"""How often an event that the homeserver no longer knows waits for a look at the SFU, before the worst is assumed."""

# ── is the participant there? ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

PRESENCE: dict[tuple[Presence, Sign], Presence] = {
    (Presence.EXPECTED, Sign.DELEGATED): Presence.EXPECTED,
    (Presence.EXPECTED, Sign.ARRIVED): Presence.CONNECTED,
    (Presence.EXPECTED, Sign.CONNECTING): Presence.EXPECTED,  # the join timeout begins anew
    (Presence.EXPECTED, Sign.DEPARTED): Presence.AWAY,
    (Presence.EXPECTED, Sign.REMOVED): Presence.GONE,
    (Presence.EXPECTED, Sign.ABSENT): Presence.EXPECTED,
    (Presence.EXPECTED, Sign.GIVEN_UP): Presence.GONE,
    (Presence.EXPECTED, Sign.UNASKED): Presence.EXPECTED,
    (Presence.CONNECTED, Sign.DELEGATED): Presence.CONNECTED,
    (Presence.CONNECTED, Sign.ARRIVED): Presence.CONNECTED,
    (Presence.CONNECTED, Sign.DEPARTED): Presence.AWAY,
    (Presence.CONNECTED, Sign.REMOVED): Presence.GONE,
    (Presence.CONNECTED, Sign.ABSENT): Presence.AWAY,  # "missing": a second look confirms it
    (Presence.CONNECTED, Sign.UNASKED): Presence.CONNECTED,
    (Presence.CONNECTED, Sign.CONTRADICTED): Presence.CONNECTED,
    (Presence.CONNECTED, Sign.BETWEEN): Presence.EXPECTED,
    (Presence.AWAY, Sign.DELEGATED): Presence.EXPECTED,  # who delegates is about to come back
    (Presence.AWAY, Sign.ARRIVED): Presence.CONNECTED,
    (Presence.AWAY, Sign.CONNECTING): Presence.AWAY,
    (Presence.AWAY, Sign.DEPARTED): Presence.AWAY,
    (Presence.AWAY, Sign.REMOVED): Presence.GONE,
    (Presence.AWAY, Sign.GIVEN_UP): Presence.GONE,
    (Presence.AWAY, Sign.UNASKED): Presence.AWAY,
    (Presence.AWAY, Sign.CONTRADICTED): Presence.AWAY,
    (Presence.AWAY, Sign.BETWEEN): Presence.EXPECTED,
    (Presence.GONE, Sign.BETWEEN): Presence.GONE,  # looks that were made after it delegated had not found it
    (Presence.GONE, Sign.DELEGATED): Presence.EXPECTED,
    (Presence.GONE, Sign.ARRIVED): Presence.CONNECTED,
    (Presence.GONE, Sign.DEPARTED): Presence.GONE,
    (Presence.GONE, Sign.REMOVED): Presence.GONE,
    (Presence.GONE, Sign.UNASKED): Presence.GONE,
}
"""From (presence, sign) to presence. `Sign.NOTHING` never gets here; every pair that is missing cannot come out of `presence.py`, and raises."""


# ── what becomes of the delayed event? ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Happening(StrEnum):
    """What the delayed event's table reacts to."""

    GONE = "gone"  # its participant was found to be gone
    BACK = "back"  # its participant, who had been given up, is there again
    RESTARTED = "restarted"  # the homeserver restarted it
    ENDED = "ended"  # the homeserver sent or cancelled it for us
    NOT_THERE = "not_there"  # the homeserver does not know it, or says that it has ended
    REFUSED = "refused"  # the homeserver gave a final error
    NOT_DONE = "not_done"  # the request did not get through, perhaps or certainly: it is made again
    SUPERSEDED = "superseded"  # a newer delegation of the same participant was verified
    WITHDRAWN = "withdrawn"  # the client takes it back
    DELEGATED = "delegated"  # the client hands it over (again)
    TIME_UP = "time_up"  # the time that the row had asked for has come
    LET_RUN = "let_run"  # nobody can tell any more whether its participant is there
    TOLD = "told"  # something can be said about its participant again


EVENTS: dict[tuple[State, Happening], State] = {
    (State.LIVE, Happening.GONE): State.ENDING,
    (State.LIVE, Happening.BACK): State.LIVE,
    (State.LIVE, Happening.RESTARTED): State.LIVE,
    (State.LIVE, Happening.ENDED): State.DONE,  # an ending was under way when its participant came back
    (State.LIVE, Happening.NOT_THERE): State.VANISHED,
    (State.LIVE, Happening.REFUSED): State.DONE,
    (State.LIVE, Happening.NOT_DONE): State.LIVE,
    (State.LIVE, Happening.SUPERSEDED): State.SUPERSEDED,
    (State.LIVE, Happening.WITHDRAWN): State.DONE,
    (State.LIVE, Happening.DELEGATED): State.LIVE,
    (State.LIVE, Happening.LET_RUN): State.ADRIFT,
    (State.ENDING, Happening.GONE): State.ENDING,
    (State.ENDING, Happening.BACK): State.LIVE,
    (State.ENDING, Happening.ENDED): State.DONE,
    (State.ENDING, Happening.NOT_THERE): State.DONE,
    (State.ENDING, Happening.REFUSED): State.DONE,
    (State.ENDING, Happening.NOT_DONE): State.ENDING,
    (State.ENDING, Happening.SUPERSEDED): State.SUPERSEDED,
    (State.ENDING, Happening.WITHDRAWN): State.DONE,
    (State.ENDING, Happening.DELEGATED): State.LIVE,
    (State.ENDING, Happening.TIME_UP): State.DONE,
    (State.SUPERSEDED, Happening.GONE): State.SUPERSEDED,
    (State.SUPERSEDED, Happening.BACK): State.SUPERSEDED,
    (State.SUPERSEDED, Happening.ENDED): State.DONE,
    (State.SUPERSEDED, Happening.NOT_THERE): State.DONE,
    (State.SUPERSEDED, Happening.REFUSED): State.DONE,
    (State.SUPERSEDED, Happening.NOT_DONE): State.SUPERSEDED,
    (State.SUPERSEDED, Happening.SUPERSEDED): State.SUPERSEDED,
    (State.SUPERSEDED, Happening.WITHDRAWN): State.DONE,
    (State.SUPERSEDED, Happening.DELEGATED): State.LIVE,
    (State.SUPERSEDED, Happening.TIME_UP): State.DONE,
    (State.VANISHED, Happening.GONE): State.DONE,
    (State.VANISHED, Happening.SUPERSEDED): State.DONE,
    (State.VANISHED, Happening.WITHDRAWN): State.DONE,
    (State.VANISHED, Happening.DELEGATED): State.LIVE,
    (State.VANISHED, Happening.TIME_UP): State.DONE,
    (State.ADRIFT, Happening.GONE): State.ENDING,
    (State.ADRIFT, Happening.TOLD): State.LIVE,
    (State.ADRIFT, Happening.SUPERSEDED): State.SUPERSEDED,
    (State.ADRIFT, Happening.WITHDRAWN): State.DONE,
    (State.ADRIFT, Happening.DELEGATED): State.LIVE,
    (State.ADRIFT, Happening.LET_RUN): State.ADRIFT,
    (State.ADRIFT, Happening.TIME_UP): State.DONE,
    (State.DONE, Happening.DELEGATED): State.LIVE,
}
"""From (state, happening) to state. A pair that is missing changes nothing (`TIME_UP` of a LIVE event, anything but `DELEGATED` of a DONE one)."""


# ── the rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


LEAST_LEASE = 1.0
"""Seconds for which a restart is left to whoever has claimed it, however little time is left."""

Given = Seen | RoomChanged | SfuLost | SfuFound | Looked | Answered | Withdraw | End | Due | Accept
"""What one row is told of."""


def advance(row: DelayedEvent, given: Given, now: float, policy: Policy, random: float) -> DelayedEvent:
    """The row after `given`, or the same object when nothing changes. `random` is in [0, 1), for jitter.

    An `Accept` here is one of the same participant: it tells that somebody is about to connect.
    """
    if row.state is State.DONE:
        return row
    match given:
        case Seen():
            finding = looking.of_webhook(row, given, now, policy)
            return _apply(row if finding.sign is Sign.NOTHING else _told(row, now, policy, random), finding, now, policy, random)
        case RoomChanged():
            return _apply(row, looking.of_room(row, given, now, policy), now, policy, random)
        case Looked():
            if row.state is State.LIVE and looking.is_as_known(row, given):
                return row
            finding = looking.of_look(row, given, now, policy)
            if finding.sign is Sign.NOTHING and row.state is State.VANISHED and row.presence is Presence.CONNECTED and row.look_at is not None:
                return row._replace(look_at=max(row.look_at, now + policy.look_again))  # too early to tell, or in doubt
            if given.participants is not None and finding.sign is not Sign.CONTRADICTED:
                row = _told(row, now, policy, random)
            return _apply(row, finding, now, policy, random)
        case SfuLost():
            new = _happen(row, Happening.LET_RUN, now, policy, random)
            present = row.presence in (Presence.CONNECTED, Presence.EXPECTED)
            return new._replace(reason=SFU_LOST) if new is not row and present else new
        case SfuFound():
            return _told(row, now, policy, random) if row.reason == SFU_LOST else row
        case Accept():
            return _apply(row, Finding(Sign.DELEGATED, _sessions_after(row)), now, policy, random)
        case Answered():
            return _answered(row, given, now, policy, random)
        case Withdraw():
            return _happen(row, Happening.WITHDRAWN, now, policy, random)
        case End():
            # A list that still shows its sessions does not bring it back; a session that comes later does.
            ended = tuple(session._replace(live=False) for session in row.sessions)
            return _apply(row, Finding(Sign.REMOVED, ended, ENDED_BY_OPERATOR), now, policy, random)
        case Due():
            return _time_up(row, now, policy, random)


def supersede(row: DelayedEvent, now: float, policy: Policy, random: float) -> DelayedEvent:
    """A newer delegation of the same participant was verified: cancel this one at the homeserver.

    Left alone, the old leave event would fire within its delay and remove the new membership (measured with Synapse 1.163: a newer state event
    does not cancel the delayed one).
    """
    return _happen(row, Happening.SUPERSEDED, now, policy, random)


def delegate(
    row: DelayedEvent | None,
    id: int,
    accept: Accept,
    event: NewEvent,
    like: DelayedEvent | None,
    now: float,
    accepted_at: float,
    policy: Policy,
    random: float,
    *,
    doubtful: bool = False,
) -> DelayedEvent:
    """The row of an event that is handed over: a new one, or `row` (the same `delay_id` of the same participant) taken up again.

    `like` is a row of the same participant whose presence it inherits: no `joined` will come for somebody who is in the call already.
    `accepted_at` is later than that of any other row of the participant, and else `now`. `random` is in [0, 1), for jitter.
    `doubtful`: that the event was there is older than what its client has done since.
    """
    if row is not None and row.state is State.LIVE:
        return _delegated_again(row, accept, event, now, accepted_at, policy, random, doubtful=doubtful)
    alias, twin = _other_forms(accept, row, like)
    sessions = _sessions_after(like) if like else ()
    if like is not None and like.state is State.DONE:
        # Nobody told it of the end of those that were live: a look finds those that go on. And none was seen under this delegation.
        sessions = tuple(s._replace(heard_at=0.0) for s in sessions if not s.live)
    connected = like is not None and like.state is not State.DONE and like.presence is Presence.CONNECTED
    present = Presence.CONNECTED if connected else Presence.EXPECTED
    base = DelayedEvent(
        id=id,
        delegation=accept.delegation,
        sfu=accept.sfu,
        room=accept.room,
        identity=accept.identity,
        alias=alias,
        homeserver=accept.homeserver,
        user=accept.user,
        delay_id=event.delay_id,
        delay=event.delay,
        on_end=event.on_end,
        token=accept.token,
        accepted_at=accepted_at,
        verified_at=None,
        presence=present,
        presence_since=like.presence_since if like and connected else now,
        sessions=sessions,
        reason="",
        attempt_at=now,
        look_at=None if connected else _next_look(now, now, policy),
        state=State.LIVE,
        running_since=now - event.delay,  # unknown: it may be about to run out, but nobody schedules an event at the last moment
        restarts=0,
        attempts=0,
        end_tried=False,
        outcome=Outcome.OPEN,
        ended_at=None,
        finished_at=None,
        lane=Lane.RESTART,
        due=now,
        harm=now + event.delay * UNKNOWN_COUNTDOWN,
        claim=row.claim if row else 0,
        claimed=False,
        twin=twin,
    )
    if event.running_since is not None and row is None:
        return _shown(base, event.running_since, now, policy, random)
    if row is not None and row.state in (State.ENDING, State.SUPERSEDED, State.ADRIFT):
        # An ending may have been under way: the restart will tell.
        base = base._replace(end_tried=_tried(row))
        if _ending_under_way(row):
            base = base._replace(claimed=True, lane=Lane.END, due=row.due)  # a restart must not overtake it
    return base


def _sessions_after(row: DelayedEvent) -> tuple[Session, ...]:
    """The sessions of a row for a delegation that follows it. What the operator has ended goes on at the SFU, and a look finds it there."""
    return () if row.presence is Presence.GONE and row.reason == ENDED_BY_OPERATOR else row.sessions


def _shown(row: DelayedEvent, running_since: float, now: float, policy: Policy, random: float) -> DelayedEvent:
    """The row of an event that its homeserver has just shown: it need not be restarted to find out whether it is there."""
    running_since = max(row.running_since, min(running_since, now))
    due = _next_restart(running_since, row.delay, now, policy, random, first=row.verified_at is None)
    return row._replace(running_since=running_since, verified_at=row.verified_at or now, due=due, harm=running_since + row.delay)


def _other_forms(accept: Accept, *before: DelayedEvent | None) -> tuple[str | None, str | None]:
    """Alias and twin of what is handed over. Whoever names one form only may be in the call under those by which it was known `before`."""
    if accept.alias is not None:
        return accept.alias, accept.twin
    forms = dict.fromkeys(form for row in before if row is not None for form in row.forms)
    known = [form for form in forms if form not in (accept.identity, accept.twin)]
    alias = known.pop(0) if known else None
    return alias, accept.twin or (known.pop(0) if known else None)


def _delegated_again(
    row: DelayedEvent, accept: Accept, event: NewEvent, now: float, accepted_at: float, policy: Policy, random: float, *, doubtful: bool
) -> DelayedEvent:
    """A live event that another delegation had. It takes over what is asked for now; a restart shows whether that is right."""
    same = (row.delay, row.on_end) == (event.delay, event.on_end) and not doubtful
    sure = same and not _tried(row)  # else a goodbye may have got through, and only a restart tells
    # Delegated in another form of the identity: from now on it is waited for in all of them.
    alias, twin = _other_forms(accept, row)
    row = row._replace(
        delegation=accept.delegation,
        identity=accept.identity,
        alias=alias,
        twin=twin,
        user=accept.user or row.user,
        accepted_at=accepted_at,
        delay=event.delay,
        on_end=event.on_end,
        token=accept.token or row.token,
        verified_at=row.verified_at if sure else None,
        harm=row.running_since + event.delay,
    )
    if event.running_since is not None and not _tried(row) and not row.claimed:
        return _shown(row, event.running_since, now, policy, random)
    return row if same or row.claimed else row._replace(due=now)


def claim(row: DelayedEvent, now: float, policy: Policy, *, shared: bool = False) -> DelayedEvent:
    """The row while its action is being carried out. A lease that ran out means that nobody knows what became of the action.

    Where instances share the database (`shared`), a restart is somebody else's early enough for another try: if the one that has claimed it dies, a
    lease may be longer than the time that is left. A restart too many harms nobody.
    """
    lane = Lane.RESTART if row.state is State.LIVE else row.lane
    lease = policy.lease
    if shared and lane is Lane.RESTART and row.harm is not None and row.harm > now:
        lease = min(lease, max(LEAST_LEASE, (row.harm - now) / 2))
    return row._replace(claim=row.claim + 1, claimed=True, lane=lane, due=now + lease, end_tried=_tried(row))


def _ending_under_way(row: DelayedEvent) -> bool:
    """Is the answer to a `send` or `cancel` awaited? A LIVE event whose participant came back meanwhile stays in lane END until then."""
    return row.claimed and (row.lane is Lane.END or row.state is State.SUPERSEDED)


def _tried(row: DelayedEvent) -> bool:
    """May an ending get through, or have got through, whatever is done from now on?"""
    return row.end_tried or _ending_under_way(row)


def action(row: DelayedEvent) -> Action:
    """What is to be done with a row in lane END or RESTART."""
    if row.state is State.SUPERSEDED:
        return Action.CANCEL
    if row.state is State.ENDING:
        return Action.CANCEL if row.on_end is OnEnd.CANCEL else Action.SEND
    return Action.RESTART


def _told(row: DelayedEvent, now: float, policy: Policy, random: float) -> DelayedEvent:
    """Something can be said about the participant again: an event that was let run is looked after once more."""
    return _happen(row, Happening.TOLD, now, policy, random) if row.state is State.ADRIFT else row


# ── presence ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _next_look(since: float, now: float, policy: Policy) -> float:
    """When somebody who is EXPECTED is looked for next: soon after the delegation, then less and less often, last when the join timeout is over."""
    return next((since + wait for wait in policy.first_looks if since + wait > now), max(since + policy.join_timeout, now + policy.look_again))


_ATTEMPTS = frozenset({Sign.CONNECTING, Sign.DELEGATED, Sign.BETWEEN})
"""Signs that somebody is connecting, or about to: the join timeout begins anew."""


def _apply(row: DelayedEvent, finding: Finding, now: float, policy: Policy, random: float) -> DelayedEvent:
    sign, sessions = finding.sign, finding.sessions
    if sign is Sign.NOTHING:
        return row if sessions == row.sessions else row._replace(sessions=sessions)
    old, new = row.presence, PRESENCE[row.presence, sign]
    given_row = row
    row = row._replace(
        presence=new,
        presence_since=row.presence_since if new is old else now,
        sessions=sessions,
        reason=_reason(row, new, finding),
        attempt_at=now if sign in _ATTEMPTS else row.attempt_at,
        look_at=_look_at(row, new, finding, now, policy),
        ended_at=_ended_at(row, old, new, now),
    )
    if sign is Sign.CONTRADICTED:
        row = _happen(row, Happening.LET_RUN, now, policy, random)
    if row == given_row:
        return given_row
    if new is Presence.GONE and old is not Presence.GONE:
        return _happen(row, Happening.GONE, now, policy, random)
    if old is Presence.GONE and new is not Presence.GONE:
        return _happen(row, Happening.BACK, now, policy, random)
    return row


def _reason(row: DelayedEvent, new: Presence, finding: Finding) -> str:
    if new in (Presence.CONNECTED, Presence.EXPECTED):
        return ""
    return (finding.reason or row.reason) if finding.sign in (Sign.DEPARTED, Sign.REMOVED, Sign.ABSENT, Sign.GIVEN_UP) else row.reason


def _look_at(row: DelayedEvent, new: Presence, finding: Finding, now: float, policy: Policy) -> float | None:
    match new:
        case Presence.EXPECTED:
            if finding.sign is Sign.CONNECTING:
                return now + policy.look_again
            since = now if finding.sign in _ATTEMPTS else row.attempt_at
            return _next_look(since, now, policy)
        case Presence.AWAY:
            if finding.sign is Sign.CONTRADICTED:
                return None  # routine looks go on
            if finding.sign in (Sign.DEPARTED, Sign.ABSENT):
                return now + finding.look_after
            if finding.sign is Sign.UNASKED and row.look_at is not None:
                return row.look_at  # the first answer is to count; see `look_due`
            return max(_undecided(row, now, policy), row.look_at or 0.0)
        case Presence.CONNECTED if finding.sign is Sign.UNASKED:
            return row.look_at
        case _:
            return None


def look_due(row: DelayedEvent, sent_at: float, now: float, policy: Policy, pause: float | None = None) -> float | None:
    """When the SFU is to be asked about the participant after a look that was sent at `sent_at`; None: by no look of its own.

    Where the look's time had come and it could not decide, `look_at` stays what it was, so that whoever asks next has a verdict: moved on with each
    look that fails, it would never come where the SFU fails once a minute. `pause`: seconds until the room is asked again, after a failure.
    """
    if row.presence is not Presence.AWAY or row.look_at is None or row.look_at > sent_at:
        return row.look_at
    return _undecided(row, now, policy, pause)


def _undecided(row: DelayedEvent, now: float, policy: Policy, pause: float | None = None) -> float:
    """The time of the next look after one that could not decide: after `pause`, or less and less often, and in time for what is decided then."""
    if pause is None:
        pause = min(max(policy.look_again, (now - row.presence_since) / 4), policy.look_again_most)
    decisions = [row.presence_since + limit for limit in (policy.departure(row.reason).unasked_after, policy.joining_limit)]
    return min([now + pause, *(at for at in decisions if at > now)])


def _ended_at(row: DelayedEvent, old: Presence, new: Presence, now: float) -> float | None:
    if new is not Presence.GONE:
        return None
    if old is Presence.GONE:
        return row.ended_at
    return row.presence_since if old is Presence.AWAY else now


# ── the delayed event ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _happen(row: DelayedEvent, what: Happening, now: float, policy: Policy, random: float) -> DelayedEvent:
    old = row.state
    new = EVENTS.get((old, what), old)
    match old, new:
        case _, State.DONE if what is Happening.WITHDRAWN:
            return _done(row._replace(end_tried=_tried(row)), Outcome.WITHDRAWN, now, policy)
        case _, State.DONE if what is Happening.TIME_UP:
            return _done(row, Outcome.RAN_OUT, now, policy)
        case State.VANISHED, State.DONE:
            return _done(row, Outcome.ALREADY_ENDED, now, policy)
        case State.LIVE, State.ADRIFT:
            over = max(now, row.deadline) + policy.adrift_keep
            return row._replace(
                state=new, lane=Lane.TIMER, due=min(now + ADRIFT_CHECK, over), harm=over, attempts=0, end_tried=_tried(row), claimed=False
            )
        case State.ADRIFT, State.LIVE:
            row = row._replace(state=new, reason="" if row.reason == SFU_LOST else row.reason)
            return _restart_at(row, now if row.end_tried else None, now, policy, random)
        case ((State.LIVE | State.ADRIFT), State.ENDING):
            # A restart that is under way must not hold up the goodbye: its claim is void.
            return row._replace(state=new, lane=Lane.END, due=now, harm=row.ended_at, attempts=0, end_tried=_tried(row), claimed=False)
        case State.ENDING, State.LIVE:
            if row.claimed:
                # The ending is under way and cannot be called back. Its answer, or the end of its lease, says how to go on.
                return row._replace(state=new, harm=row.deadline, attempts=0)
            return _restart_at(row._replace(state=new, attempts=0), now if row.end_tried else None, now, policy, random)
        case ((State.LIVE | State.ENDING | State.ADRIFT), State.SUPERSEDED):
            return row._replace(state=new, lane=Lane.RESTART, due=now, harm=row.deadline, attempts=0, end_tried=_tried(row), claimed=False)
        case _:
            return row


def _restart_at(row: DelayedEvent, at: float | None, now: float, policy: Policy, random: float) -> DelayedEvent:
    """The row with its next restart planned: at `at`, or at the normal time."""
    if at is None:
        at = _next_restart(row.running_since, row.delay, now, policy, random, first=False)
    return row._replace(lane=Lane.RESTART, due=at, harm=row.deadline, claimed=False)


def _next_restart(running_since: float, delay: float, now: float, policy: Policy, random: float, *, first: bool) -> float:
    """The normal time of the next restart: not later than `restart_at` of the delay.

    `first`: it has just been confirmed. The next restart comes at any time up to the normal one, so that those who delegated together are spread
    from then on: a limit that nobody knows of shows itself while there is time to heed it.
    """
    spread = min(policy.restart_at, max(policy.first_spread, policy.restart_spread)) if first else policy.restart_spread
    return max(now, running_since + delay * (policy.restart_at - spread * random))


def _done(row: DelayedEvent, outcome: Outcome, now: float, policy: Policy) -> DelayedEvent:
    return row._replace(
        state=State.DONE,
        outcome=outcome,
        finished_at=now,
        look_at=None,
        token=None,
        lane=Lane.TIMER,
        due=now + policy.keep,
        harm=None,
        claimed=False,
    )


def _again(row: DelayedEvent, answer: Answered, now: float, policy: Policy, random: float) -> DelayedEvent:
    """The row after an action that did not get through. What has a time limit ends when that has passed."""
    unsure = answer.verdict is Verdict.UNCERTAIN and answer.action is not Action.RESTART
    row = row._replace(claimed=False, end_tried=row.end_tried or unsure)
    if row.state in (State.ENDING, State.SUPERSEDED) and now >= _surely_over(row):
        return _done(row, Outcome.RAN_OUT, now, policy)
    if answer.verdict is Verdict.LIMITED and not answer.alone:
        return row._replace(due=now)  # whose turn it is when the homeserver lets us again is a matter of urgency
    wait = min(policy.retry_first * 2.0 ** min(row.attempts, 16), policy.retry_most)
    if row.state is State.ENDING and row.ended_at is not None:
        # In an outage some row is the one that is tried again and again; it must not come last for that when the homeserver is back.
        wait = min(wait, max(policy.retry_first, (now - row.ended_at) / 8))
    wait *= 0.5 + random / 2
    if answer.retry_after is not None:
        wait = max(wait, min(answer.retry_after, policy.retry_most))
    latest = row.deadline if row.verified_at is not None else row.accepted_at + row.delay
    perhaps = answer.verdict is Verdict.UNCERTAIN and answer.action is Action.RESTART  # did the countdown begin anew?
    if row.state is State.LIVE and (perhaps or now < latest + row.delay):
        # The deadline must not pass while nobody tries; and when it has, a clock that was set, or a client, may have moved it.
        wait = min(wait, max(policy.retry_first, (latest - now) / 8 if latest > now else PAST_DEADLINE))
    return row._replace(attempts=row.attempts + 1, due=now + wait)


def _surely_over(row: DelayedEvent) -> float:
    """When an event that is to be ended must have fired by itself: nobody restarts it after its participant is gone."""
    return max(row.running_since, row.ended_at or row.accepted_at) + row.delay


def _answered(row: DelayedEvent, answer: Answered, now: float, policy: Policy, random: float) -> DelayedEvent:
    if not row.claimed or answer.claim != row.claim:
        return _late_answer(row, answer, now, policy, random)
    restarting = answer.action is Action.RESTART
    if restarting is not (row.state is State.LIVE and row.lane is Lane.RESTART):
        return row  # not what was claimed
    match answer.verdict:
        case Verdict.DONE if restarting:
            running_since = max(row.running_since, answer.sent_at)
            return row._replace(
                running_since=running_since,
                restarts=row.restarts + 1,
                verified_at=row.verified_at or now,
                attempts=0,
                end_tried=False,
                lane=Lane.RESTART,
                due=_next_restart(running_since, row.delay, now, policy, random, first=row.verified_at is None),
                harm=running_since + row.delay,
                claimed=False,
            )
        case Verdict.DONE:
            return _done(row, _ended_by_us(row, answer.action), now, policy)
        case Verdict.NOT_FOUND | Verdict.CONFLICT:
            return _not_there(row, answer, now, policy)
        case Verdict.REFUSED:
            return _done(row, Outcome.REPLACED if row.state is State.SUPERSEDED else Outcome.REJECTED, now, policy)
        case _:
            if not restarting and row.state is State.LIVE:
                # Back in the call while the ending was under way: a restart tells whether it got through.
                unsure = answer.verdict is Verdict.UNCERTAIN
                return row._replace(claimed=False, lane=Lane.RESTART, due=now, end_tried=row.end_tried or unsure)
            return _again(row, answer, now, policy, random)


def _late_answer(row: DelayedEvent, answer: Answered, now: float, policy: Policy, random: float) -> DelayedEvent:
    """An answer to what is not claimed any more, or never was. It cannot end anything, but that a countdown began anew is a fact."""
    restarted = answer.action is Action.RESTART and answer.verdict is Verdict.DONE
    if not restarted or row.state is not State.LIVE or row.lane is not Lane.RESTART or answer.sent_at <= row.running_since:
        return row
    row = row._replace(running_since=answer.sent_at, restarts=row.restarts + 1, verified_at=row.verified_at or now)
    return row._replace(harm=row.deadline) if row.claimed or row.end_tried else _restart_at(row, None, now, policy, random)


def _ended_by_us(row: DelayedEvent, done: Action) -> Outcome:
    if row.state is State.SUPERSEDED:
        return Outcome.REPLACED
    return Outcome.CANCELLED if done is Action.CANCEL else Outcome.SENT


def _not_there(row: DelayedEvent, answer: Answered, now: float, policy: Policy) -> DelayedEvent:
    """404 or 409: it has ended, and only our own history can tell how."""
    if row.state is State.SUPERSEDED:
        return _done(row, Outcome.REPLACED, now, policy)
    if row.end_tried:
        # An earlier attempt of ours, whose answer was lost, had got through.
        return _done(row, Outcome.CANCELLED if row.on_end is OnEnd.CANCEL else Outcome.SENT, now, policy)
    if answer.action is not Action.RESTART:
        ran_out = row.verified_at is not None and answer.sent_at >= row.deadline
        return _done(row, Outcome.RAN_OUT if ran_out else Outcome.ALREADY_ENDED, now, policy)
    if row.verified_at is None:
        return _done(row, Outcome.UNKNOWN, now, policy)
    # Nearly always a client that just hung up, or that scheduled a new event and is about to delegate it: a look tells whether it is there.
    look_at = now if row.presence is Presence.CONNECTED else row.look_at
    due = now + policy.vanished_wait
    return row._replace(state=State.VANISHED, lane=Lane.TIMER, due=due, harm=None, attempts=0, claimed=False, look_at=look_at)


def _time_up(row: DelayedEvent, now: float, policy: Policy, random: float) -> DelayedEvent:
    if row.state not in (State.VANISHED, State.ADRIFT) or row.due is None or now < row.due:
        return row
    if row.state is State.ADRIFT:
        over = now if row.harm is None else row.harm
        return _happen(row, Happening.TIME_UP, now, policy, random) if now >= over else row._replace(due=min(now + ADRIFT_CHECK, over))
    if row.look_at is not None and row.presence in (Presence.CONNECTED, Presence.AWAY) and row.attempts < VANISHED_WAITS:
        return row._replace(due=now + policy.vanished_wait * (1 + random), attempts=row.attempts + 1)  # a look is about to decide
    if row.presence is Presence.CONNECTED:
        return _done(row, Outcome.LOST, now, policy)
    return _done(row, Outcome.ALREADY_ENDED, now, policy)


# ── the history ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def story(old: DelayedEvent | None, new: DelayedEvent, given: object, now: float) -> Iterator[Note]:
    """What the history says of one change. Restarts are counted in the row; those of events with a short delay leave no line each."""
    if old is None or (old.state is State.DONE and new.state is not State.DONE) or old.delegation != new.delegation:
        yield Note(new.id, now, "delegated", new.delegation)
    if old is None:
        if new.presence is not Presence.EXPECTED:  # inherited
            yield Note(new.id, now, new.presence.value, new.reason)
        if new.verified_at is not None:
            yield Note(new.id, now, "verified", "")
        return
    if type(given) is Answered and given.answered_at is not None:
        now = min(now, given.answered_at)  # what it tells may be kept a moment later
    if new.presence is not old.presence or (new.presence is Presence.AWAY and new.reason != old.reason):
        yield Note(new.id, now, new.presence.value, new.reason)
    if new.verified_at is not None and old.verified_at is None:
        yield Note(new.id, now, "verified", "")
    if new.restarts > old.restarts and old.verified_at is not None and new.delay >= RESTARTS_TOLD:
        yield Note(new.id, max(new.running_since, new.accepted_at), RESTARTED, "")
    if new.state is old.state:
        if new.attempts == 1 and old.attempts == 0 and isinstance(given, Answered):
            yield Note(new.id, now, f"{given.action.value}_failed", given.detail)
        return
    detail = given.detail if isinstance(given, Answered) else ""
    if new.state is State.DONE:
        released = isinstance(given, Withdraw) and given.by_operator
        yield Note(new.id, now, new.outcome.value, BY_OPERATOR if released else detail)
    else:
        yield Note(new.id, now, new.state.value, detail)
