"""What webhooks and looks tell about one participant.

Rules that no table holds:

- A participant has *sessions* (`sid`). A session that ended leaves a tombstone, so that a late or repeated `joined` of it changes nothing:
  any order and any repetition of the same webhooks comes to the same result.
- SFU nodes have clocks of their own. `joinedAt` of two sessions is compared only to find out whether a look is worth making, never to conclude
  anything. As long as a session that joined has not left, in doubt it is the current one, and only a look may say otherwise.
- A look concludes only about what had been so for a while when it was sent, and failing to look says nothing about anybody.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from sfu_delegate.delegation.model import DelayedEvent, Listed, Looked, Presence, RoomChanged, RoomNews, Seen, Session, Sighting
from sfu_delegate.delegation.policy import MISSING, NEVER_JOINED, ROOM_MISSING, ROOM_RESTARTED, Departure, Policy, Unasked

ROUNDED = 1.0  # seconds; webhooks say in whole ones when they were made
KEPT_SESSIONS = 8  # of each kind; a participant who reconnects for days must not make its row grow


SHUT_DOWN = "SERVER_SHUTDOWN"


class Sign(StrEnum):
    """What the presence table reacts to."""

    DELEGATED = "delegated"  # a client handed over events for this participant
    ARRIVED = "arrived"  # it is in the call: a new session, or shown as ACTIVE
    CONNECTING = "connecting"  # a connection attempt was seen
    DEPARTED = "departed"  # its last session ended, perhaps: a look will tell
    REMOVED = "removed"  # its last session ended for a reason that needs no look
    ABSENT = "absent"  # a look does not show it, and it is too early to conclude from that
    GIVEN_UP = "given_up"  # a look does not show it, and that is conclusive; or nobody could be asked for so long that it has to be
    UNASKED = "unasked"  # the SFU could not be asked
    BETWEEN = "between"  # its last session had ended before it delegated: it is about to come back
    CONTRADICTED = "contradicted"  # a look does not show it, a `joined` without its `left` says otherwise, and time did not tell
    NOTHING = "nothing"


class Finding(NamedTuple):
    """What an input means for one participant."""

    sign: Sign
    sessions: tuple[Session, ...]
    reason: str = ""
    look_after: float = 0.0  # for DEPARTED and ABSENT


def _kept(sessions: Sequence[Session]) -> tuple[Session, ...]:
    if len(sessions) <= KEPT_SESSIONS:
        return tuple(sessions)
    live = [s for s in sessions if s.live][-KEPT_SESSIONS:]
    ended = [s for s in sessions if not s.live][-KEPT_SESSIONS:]
    return tuple(s for s in sessions if s in live or s in ended)


def of_webhook(row: DelayedEvent, seen: Seen, now: float, policy: Policy) -> Finding:
    """What one participant webhook means, given what is known of the participant's sessions."""
    known = next((s for s in row.sessions if s.sid == seen.sid), None)
    if seen.what is Sighting.JOINED:
        return _joined(row, seen, known, now)
    if known is not None and not known.live:
        return Finding(Sign.NOTHING, row.sessions)
    return _ended(row, seen, known, policy)


def _joined(row: DelayedEvent, seen: Seen, known: Session | None, now: float) -> Finding:
    if known is None:
        sessions = _kept((*row.sessions, Session(seen.sid, seen.joined_at_ms, True, now)))
        return Finding(Sign.ARRIVED, sessions)
    if not known.live:
        return Finding(Sign.NOTHING, row.sessions)
    # A session without a sid may be another one each time; one with a sid is told twice.
    news = row.presence is Presence.EXPECTED or (not seen.sid and row.presence is not Presence.CONNECTED)
    return Finding(Sign.ARRIVED if news else Sign.NOTHING, row.sessions)


def _ended(row: DelayedEvent, seen: Seen, known: Session | None, policy: Policy) -> Finding:
    was_live = [s for s in row.sessions if s.live and (s.sid == seen.sid or not seen.sid)]
    if seen.what is Sighting.ABORTED and not seen.sid:
        was_live = []  # an attempt that failed is not the session that goes on
    remaining = [s for s in row.sessions if s.live and s not in was_live]
    ended = Session(seen.sid, seen.joined_at_ms or (known.joined_at_ms if known else 0), False, 0.0)
    sessions = [s._replace(live=False) if s in was_live else s for s in row.sessions]
    # Where sessions have no sid there is nothing that a tombstone could stop, and it would stop the next join.
    sessions = [s for s in sessions if s.sid or s.live]
    if seen.sid and known is None:
        sessions.append(ended)
    kept = _kept(sessions)

    if seen.what is Sighting.ABORTED and not was_live:
        # It never became active. While we wait whether somebody comes back, that attempt was it: the abort is the last word. While somebody
        # is expected, it shows that they are trying.
        if row.presence is Presence.AWAY and not remaining:
            return Finding(Sign.DEPARTED, kept, seen.reason, policy.departure(seen.reason).look_after)
        return Finding(Sign.CONNECTING if row.presence is Presence.EXPECTED else Sign.NOTHING, kept)
    look_after = policy.departure(seen.reason).look_after
    if remaining:
        if row.presence is Presence.CONNECTED and all(_looks_older(r, ended, row.sessions, bool(was_live)) for r in remaining):
            return Finding(Sign.DEPARTED, kept, seen.reason, look_after)
        return Finding(Sign.NOTHING, kept)
    if row.presence in (Presence.AWAY, Presence.GONE) and not was_live and (not seen.sid or _older_than_another(ended, row.sessions)):
        return Finding(Sign.NOTHING, kept)  # told twice; or of an older session, and the reason of the newest one holds
    if row.presence is Presence.EXPECTED:
        # Clients open a first short session, or are about to come back: whoever was never seen gets more time.
        return Finding(Sign.DEPARTED, kept, seen.reason, max(look_after, policy.unseen_departure))
    began = max((s.heard_at for s in was_live), default=row.accepted_at)
    if began < row.accepted_at and seen.made_at and seen.made_at + ROUNDED < row.accepted_at:
        return Finding(Sign.BETWEEN, kept)
    if was_live and look_after <= 0:
        if seen.made_at and seen.made_at + ROUNDED < row.accepted_at:  # both it and their `joined` were held up, and they have delegated anew since
            return Finding(Sign.DEPARTED, kept, seen.reason, policy.unseen_departure)
        if seen.late:  # they may be back already, with a session that nobody has told of yet
            return Finding(Sign.DEPARTED, kept, seen.reason, policy.look_gap)
        return Finding(Sign.REMOVED, kept, seen.reason)
    return Finding(Sign.DEPARTED, kept, seen.reason, look_after)


def _looks_older(session: Session, ended: Session, order: Sequence[Session], ended_was_live: bool) -> bool:
    """May `session` be one whose own end was never told, although `ended` came after it?"""
    if not session.sid:
        return True
    if session.joined_at_ms and ended.joined_at_ms:
        return session.joined_at_ms < ended.joined_at_ms
    if not ended_was_live:
        return False  # nothing is known of the ended one: a late word about somebody long gone
    sids = [s.sid for s in order]
    return sids.index(session.sid) < sids.index(ended.sid)


def _older_than_another(ended: Session, sessions: Sequence[Session]) -> bool:
    return bool(ended.joined_at_ms) and any(not s.live and s.joined_at_ms > ended.joined_at_ms for s in sessions)


def of_room(row: DelayedEvent, news: RoomChanged, now: float, policy: Policy) -> Finding:
    """What a room webhook means for this participant.

    A room that comes up (again) is another instance of it: sessions that had joined long before are gone with the old one, whatever a list says
    (recorded with LiveKit 1.13 and Redis: whoever vanished with a node that was killed stayed ACTIVE for as long as the room lived). Both times
    come from SFU nodes; the newer instance's are one node's, so a session of that instance can never seem older than the room.
    """
    if news.what is RoomNews.FINISHED:
        if row.presence is Presence.AWAY and row.reason == ROOM_MISSING:
            wait = max(policy.look_gap, row.presence_since + policy.departure(MISSING).look_after - now)
            return Finding(Sign.DEPARTED, row.sessions, MISSING, wait)
        return Finding(Sign.NOTHING, row.sessions)
    over = [s for s in row.sessions if s.live and s.joined_at_ms and s.joined_at_ms / 1000 + policy.instance_margin < news.created_at]
    if not over:
        return Finding(Sign.NOTHING, row.sessions)
    sessions = _kept([s._replace(live=False) if s in over else s for s in row.sessions if s.sid or s not in over])
    if any(s.live for s in sessions) or row.presence not in (Presence.CONNECTED, Presence.AWAY):
        return Finding(Sign.NOTHING, sessions)
    return Finding(Sign.DEPARTED, sessions, ROOM_RESTARTED, policy.departure(ROOM_RESTARTED).look_after)


def of_look(row: DelayedEvent, look: Looked, now: float, policy: Policy) -> Finding:
    """What one look at the room means for this participant."""
    if look.participants is None:
        return _unasked(row, now, policy)
    listed = look.of(row)
    ended = {s.sid for s in row.sessions if not s.live}
    active = [p for p in listed if p.state == "ACTIVE" and (not p.sid or p.sid not in ended)]
    if active:
        return Finding(Sign.ARRIVED, _with_listed(row.sessions, active, now))
    # An ACTIVE entry of a session that has left is the SFU's list being late: like somebody who is connecting, it is no absence yet.
    connecting = [p for p in listed if p.state in ("JOINING", "JOINED", "ACTIVE")]
    match row.presence:
        case Presence.EXPECTED:
            if connecting:
                return Finding(Sign.CONNECTING, row.sessions)
            over = look.sent_at >= row.attempt_at + policy.join_timeout
            return Finding(Sign.GIVEN_UP if over else Sign.ABSENT, row.sessions, NEVER_JOINED)
        case Presence.CONNECTED:
            if connecting or look.doubtful or look.sent_at < _news_at(row, now) + policy.settled:
                return Finding(Sign.NOTHING, row.sessions)
            if _contradicted(row, look):
                return Finding(Sign.CONTRADICTED, row.sessions)
            reason = MISSING if look.participants or look.finished else ROOM_MISSING
            return Finding(Sign.ABSENT, row.sessions, reason, policy.departure(reason).look_after)
        case Presence.AWAY:
            if look.sent_at < row.presence_since:
                return Finding(Sign.NOTHING, row.sessions)  # it was made before the departure
            time_has_come = row.look_at is None or look.sent_at >= row.look_at
            if connecting:
                over = time_has_come and now >= row.presence_since + policy.joining_limit
                return Finding(Sign.GIVEN_UP if over else Sign.CONNECTING, row.sessions, row.reason)
            departure = policy.departure(row.reason)
            back_by = look.recovered_at + _time_to_come_back(row, look, departure, policy)
            if row.presence_since < look.recovered_at and look.sent_at < back_by and not (look.doubtful and row.live_sids):
                return Finding(Sign.DEPARTED, row.sessions, row.reason, max(back_by, row.look_at or now) - now)
            if not time_has_come:
                return Finding(Sign.NOTHING, row.sessions)
            if look.doubtful and row.live_sids:
                return Finding(Sign.UNASKED, row.sessions, row.reason)
            if _contradicted(row, look):
                return Finding(Sign.CONTRADICTED, row.sessions, row.reason)
            return Finding(Sign.GIVEN_UP, row.sessions, row.reason)
        case _:
            return Finding(Sign.NOTHING, row.sessions)


def is_as_known(row: DelayedEvent, look: Looked) -> bool:
    """Does a look show just what is known of somebody who is connected? Most looks show that of everybody, and then `of_look` need not be asked."""
    if row.presence is not Presence.CONNECTED or row.reason or row.look_at is not None or row.ended_at is not None:
        return False
    listed = look.of(row)
    if len(listed) != 1 or listed[0].state != "ACTIVE" or len(row.sessions) > KEPT_SESSIONS:
        return False
    sid = listed[0].sid
    return any(s.live and s.sid == sid for s in row.sessions)


def _time_to_come_back(row: DelayedEvent, look: Looked, departure: Departure, policy: Policy) -> float:
    """Seconds from the end of the SFU's latest outage until an absence is believed, for reasons that count as connected during an outage.

    Nobody can come back before the SFU is: it gets as long as one that was shut down. Where they had had all of their time before it failed, it is
    one more outage of many, and they must not be waited for as long as it goes on failing now and then.
    """
    if departure.unasked is not Unasked.CONNECTED:
        return 0.0
    shut_down = policy.departure(SHUT_DOWN).look_after
    had_their_time = look.failed_since - row.presence_since >= departure.look_after + shut_down
    return min(departure.look_after, policy.departure(MISSING).look_after if had_their_time else shut_down)


def _contradicted(row: DelayedEvent, look: Looked) -> bool:
    """Did somebody's session begin when the SFU's lists were in doubt, or before? Lists stay wrong then, in either direction."""
    return any(s.live and s.heard_at <= look.doubted_until for s in row.sessions)


def _news_at(row: DelayedEvent, now: float) -> float:
    # What was heard in the future was heard before the clock was set back.
    return max([row.presence_since, *(s.heard_at for s in row.sessions if s.live and s.heard_at <= now)])


def _with_listed(sessions: Sequence[Session], active: Sequence[Listed], now: float) -> tuple[Session, ...]:
    known = {s.sid for s in sessions}
    return _kept((*sessions, *(Session(p.sid, p.joined_at_ms, True, now) for p in active if p.sid not in known)))


def _unasked(row: DelayedEvent, now: float, policy: Policy) -> Finding:
    """The SFU could not be asked: what the departure's reason says for that case, and nothing at all for those who have not departed."""
    if row.presence is Presence.AWAY and not row.live_sids and row.look_at is not None and now >= row.look_at:
        departure = policy.departure(row.reason)
        waited = now - row.presence_since
        # Somebody whose joining was never heard of may be there with a session that nobody told of: what was heard to end is another one.
        seen = any(not s.live and s.heard_at for s in row.sessions)
        at_once = departure.unasked is Unasked.GONE and seen
        if at_once or (departure.unasked is not Unasked.CONNECTED and waited >= departure.unasked_after):
            return Finding(Sign.GIVEN_UP, row.sessions, row.reason)
    return Finding(Sign.UNASKED, row.sessions, row.reason)
