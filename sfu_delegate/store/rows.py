"""Rows of the tables to the model's tuples and back."""

from collections.abc import Sequence
from typing import Any

from sfu_delegate.delegation.model import DelayedEvent, Lane, OnEnd, Outcome, Presence, Room, Session, State

_FIELDS = DelayedEvent._fields
_PRESENCE = {p.value: p for p in Presence}
_STATE = {s.value: s for s in State}
_OUTCOME = {o.value: o for o in Outcome}
_ON_END = {o.value: o for o in OnEnd}
_LANE: dict[int | None, Lane | None] = {None: None, **{lane.value: lane for lane in Lane}}
_AT = {name: _FIELDS.index(name) for name in ("on_end", "presence", "sessions", "state", "outcome", "lane", "end_tried", "claimed")}
_ON_END_AT, _PRESENCE_AT, _SESSIONS_AT = _AT["on_end"], _AT["presence"], _AT["sessions"]
_STATE_AT, _OUTCOME_AT, _LANE_AT, _END_TRIED_AT, _CLAIMED_AT = _AT["state"], _AT["outcome"], _AT["lane"], _AT["end_tried"], _AT["claimed"]


def sessions_text(sessions: Sequence[Session]) -> str:
    """Sessions as stored: `sid/joined_at_ms/live/heard_at` (live: 1, or 0 for a tombstone; heard_at in seconds), separated by spaces.

    A sid has no white space (see `livekit.webhook`).
    """
    return " ".join([f"{s.sid}/{s.joined_at_ms}/{'1' if s.live else '0'}/{s.heard_at:.3f}" for s in sessions])


def sessions_of(text: str) -> tuple[Session, ...]:
    """The inverse of `sessions_text`."""
    if not text:
        return ()
    sessions = []
    for part in text.split(" "):
        sid, joined_at_ms, live, heard_at = part.rsplit("/", 3)
        sessions.append(Session(sid, int(joined_at_ms), live == "1", float(heard_at)))
    return tuple(sessions)


def delayed_event_of(values: Sequence[Any]) -> DelayedEvent:
    """A row of the table as the model has it."""
    row = list(values)
    row[_ON_END_AT] = _ON_END[row[_ON_END_AT]]
    row[_PRESENCE_AT] = _PRESENCE[row[_PRESENCE_AT]]
    row[_SESSIONS_AT] = sessions_of(row[_SESSIONS_AT])
    row[_STATE_AT] = _STATE[row[_STATE_AT]]
    row[_OUTCOME_AT] = _OUTCOME[row[_OUTCOME_AT]]
    row[_LANE_AT] = _LANE[row[_LANE_AT]]
    row[_END_TRIED_AT] = bool(row[_END_TRIED_AT])
    row[_CLAIMED_AT] = bool(row[_CLAIMED_AT])
    return DelayedEvent._make(row)


def values_of(row: DelayedEvent) -> list[Any]:
    """The model's row as the table has it, in the order of the columns."""
    values: list[Any] = list(row)
    values[_SESSIONS_AT] = sessions_text(row.sessions)
    return values


def changed(old: DelayedEvent, new: DelayedEvent) -> tuple[int, ...]:
    """The positions of the columns that differ. A column that is not named in an UPDATE costs no index maintenance."""
    return tuple([i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a is not b and a != b])


def room_of(values: Sequence[Any]) -> Room:
    """A row of the room table as the model has it."""
    room = Room._make(values)
    return room._replace(claimed=bool(room.claimed), finished=bool(room.finished), routine=bool(room.routine))


FIELDS = _FIELDS
SESSIONS_AT = _SESSIONS_AT
