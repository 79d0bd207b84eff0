"""Rows of the tables to the model's tuples and back."""

from collections.abc import Callable, Sequence
from enum import Enum
from itertools import compress
from operator import is_not, itemgetter
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


_POSITIONS = range(len(_FIELDS))
_ENUMS = (_ON_END_AT, _PRESENCE_AT, _STATE_AT, _OUTCOME_AT, _LANE_AT)
_FLAGS = (_END_TRIED_AT, _CLAIMED_AT)
_ROOM_FLAGS = [Room._fields.index(name) for name in ("finished", "routine", "claimed")]
_new = tuple.__new__  # what NamedTuple's own `_make` calls: thousands are made for every batch


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
        sessions.append(_new(Session, (sid, int(joined_at_ms), live == "1", float(heard_at))))
    return tuple(sessions)


def _plain(value: Enum | None) -> Any:
    return None if value is None else value._value_


_STORED: dict[int, Callable[[Any], Any]] = {**dict.fromkeys(_ENUMS, _plain), **dict.fromkeys(_FLAGS, int), _SESSIONS_AT: sessions_text}


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
    return _new(DelayedEvent, row)


def values_of(row: DelayedEvent) -> list[Any]:
    """The model's row as the table has it, in the order of the columns: plain types, since the driver takes a microsecond to adapt another."""
    values: list[Any] = list(row)
    for at, stored in _STORED.items():
        values[at] = stored(values[at])
    return values


class Columns:
    """Some columns of a row, by their positions, as the table has them."""

    __slots__ = ("_get", "_special")

    def __init__(self, positions: Sequence[int]) -> None:
        self._get = itemgetter(*positions, 0)  # the id as well, which an UPDATE ends with; and there are two at the least, so that it is a tuple
        self._special = [(at, _STORED[position]) for at, position in enumerate(positions) if position in _STORED]

    def values(self, row: DelayedEvent) -> list[Any]:
        """Their values, and the id."""
        values: list[Any] = list(self._get(row))
        for at, stored in self._special:
            values[at] = stored(values[at])
        return values


def values_of_room(room: Room) -> list[Any]:
    """The same for a room."""
    values: list[Any] = list(room)
    for at in _ROOM_FLAGS:
        values[at] = int(values[at])
    return values


def changed(old: DelayedEvent, new: DelayedEvent) -> tuple[int, ...]:
    """The positions of the columns that differ. A column that is not named in an UPDATE costs no index maintenance."""
    return tuple([i for i in compress(_POSITIONS, map(is_not, old, new)) if old[i] != new[i]])


def room_of(values: Sequence[Any]) -> Room:
    """A row of the room table as the model has it."""
    room = list(values)
    for at in _ROOM_FLAGS:
        room[at] = room[at] == 1
    return _new(Room, room)


FIELDS = _FIELDS
