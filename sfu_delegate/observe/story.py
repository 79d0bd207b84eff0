"""What happened to a delayed event, in sentences: for operators who want to know why.

It tells what the history and the row say, and nothing that they do not. No sentence has a time of day in it, which is for whoever shows it in a time
zone; and none a delay_id or a token.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

from sfu_delegate.delegation.lifecycle import BY_OPERATOR, RESTARTED
from sfu_delegate.delegation.model import DelayedEvent, Note, OnEnd, Outcome, Presence, State
from sfu_delegate.delegation.policy import ENDED_BY_OPERATOR, MISSING, NEVER_JOINED, ROOM_MISSING, ROOM_RESTARTED, SFU_LOST


class Tone(StrEnum):
    """Is it as it should be?"""

    PLAIN = "plain"
    GOOD = "good"
    NOTICE = "notice"  # worth a look: something was repeated, or waited for
    BAD = "bad"  # somebody was dropped, or may be; or a goodbye did not get through


class Line(NamedTuple):
    """One thing that happened. `at` in Unix seconds."""

    at: float
    event: int  # the row
    what: str
    detail: str
    sentence: str
    tone: Tone


class Span(NamedTuple):
    """How the participant was for a time. In Unix seconds; `until` is None where it still is so."""

    presence: Presence
    reason: str
    since: float
    until: float | None


REASONS: Final = {
    "CLIENT_INITIATED": "the client hung up, or its tab was closed or reloaded",
    "DUPLICATE_IDENTITY": "a newer session of the same participant took over",
    "SERVER_SHUTDOWN": "the SFU shut down",
    "PARTICIPANT_REMOVED": "it was removed from the call",
    "ROOM_DELETED": "the room was deleted",
    "ROOM_CLOSED": "the room was closed",
    "STATE_MISMATCH": "client and SFU disagreed about the session, and the client has to begin anew",
    "JOIN_FAILURE": "it could not join",
    "MIGRATION": "it was moved to another node of the SFU",
    "SIGNAL_CLOSE": "its connection to the SFU was closed",
    "USER_UNAVAILABLE": "the user was not available",
    "USER_REJECTED": "the user rejected the call",
    "CONNECTION_TIMEOUT": "the SFU heard nothing of it any more: a crash, or a network that is gone",
    "MEDIA_FAILURE": "its media connection failed",
    MISSING: "the SFU does not list it, though it never said that it left",
    ROOM_MISSING: "the SFU lists nobody in the room, though it never said that they left",
    ROOM_RESTARTED: "the SFU made the room anew, and the participant has not joined it again",
    NEVER_JOINED: "it did not join in time",
    SFU_LOST: "the SFU neither answers nor sends webhooks",
    ENDED_BY_OPERATOR: "the operator had it ended",
}
"""What LiveKit's reasons, and the daemon's own, mean."""


def why(reason: str) -> str:
    """A reason for people, with its name."""
    if not reason:
        return "no reason was given"
    words = REASONS.get(reason)
    return f"{words} ({reason})" if words else reason


def span(seconds: float) -> str:
    """A time for people, in two units at the most: "8 min 15 s"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    for unit, name, smaller, part in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit} {name} {rest} {part}" if rest else f"{whole // unit} {name}"
    raise AssertionError(whole)


_TAKEN_BACK: Final = "It was taken back by its client, or released by the operator"  # which, the history tells
_ENDINGS: Final = {
    Outcome.SENT: ("The homeserver sent the leave event: the participant is no longer shown in the call.", Tone.GOOD),
    Outcome.CANCELLED: ("The homeserver cancelled the delayed event, as its client had asked for.", Tone.GOOD),
    Outcome.ALREADY_ENDED: ("The client had ended it itself before: the normal end of a call.", Tone.GOOD),
    Outcome.RAN_OUT: ("Its time ran out after the departure, or the client ended it then: the homeserver does not tell which.", Tone.NOTICE),
    Outcome.LOST: (
        "The homeserver does not know it any more, though the participant is still connected: the participant has been dropped from the call.",
        Tone.BAD,
    ),
    Outcome.REJECTED: ("The homeserver refuses to manage it.", Tone.BAD),
    Outcome.REPLACED: ("A newer delegation of the same participant took its place: it was cancelled, or had ended already.", Tone.GOOD),
    Outcome.WITHDRAWN: (f"{_TAKEN_BACK}: the daemon forgot it, and left it at the homeserver as it was.", Tone.NOTICE),
    Outcome.UNKNOWN: ("The homeserver did not know it when it was first asked: it had ended by then, or there never was such an event.", Tone.BAD),
}
_RAN_OUT_THERE: Final = (
    "Its time ran out before it could be restarted or cancelled, or the client ended it then: if the homeserver sent the leave event, the "
    "participant is no longer shown in the call.",
    Tone.BAD,
)
_WITHDRAWN_LATE: Final = (
    f"{_TAKEN_BACK} when its end was under way already, which may have got through: the daemon forgot it, and does not ask.",
    Tone.NOTICE,
)


def _ending(outcome: Outcome, row: DelayedEvent) -> tuple[str, Tone]:
    if outcome is Outcome.RAN_OUT and row.presence is not Presence.GONE:  # it was let run, or a newer delegation had taken its place
        return _RAN_OUT_THERE
    if outcome is Outcome.WITHDRAWN and row.end_tried:
        return _WITHDRAWN_LATE
    if outcome is Outcome.SENT and row.reason == ENDED_BY_OPERATOR:
        return f"{_ENDINGS[outcome][0]} The operator had it ended; at the SFU nothing was changed.", Tone.NOTICE
    return _ENDINGS[outcome]


def _sentence(note: Note, row: DelayedEvent, *, first: bool) -> tuple[str, Tone]:
    what, detail = note.what, note.detail
    match what:
        case "delegated":
            again = "" if first else " again"
            end = "sent" if row.on_end is OnEnd.SEND else "cancelled"
            return f"The client handed its leave event over{again}: delay {span(row.delay)}, to be {end} when the participant is gone.", Tone.PLAIN
        case "verified":
            return f"The homeserver {row.homeserver} knows the event: from now on it is kept alive.", Tone.GOOD
        case _ if what == RESTARTED:
            return "Restarted: its countdown began anew.", Tone.PLAIN
        case Presence.EXPECTED:
            return "Expected to join.", Tone.PLAIN
        case Presence.CONNECTED:
            return "Connected: the SFU has the participant in the call.", Tone.GOOD
        case Presence.AWAY:
            return f"Away, perhaps only to reconnect: {why(detail)}. The SFU is asked before that is believed.", Tone.NOTICE
        case Presence.GONE:
            return f"Gone: {why(detail)}.", Tone.PLAIN
        case State.ENDING:
            return f"Its leave event is to be {'sent' if row.on_end is OnEnd.SEND else 'cancelled'} now.", Tone.PLAIN
        case State.LIVE:
            return "It is kept alive again.", Tone.GOOD
        case State.SUPERSEDED:
            return (
                "A newer delegation of the same participant takes its place: it is to be cancelled, so that it does not end the new one.",
                Tone.PLAIN,
            )
        case State.VANISHED:
            return (
                f"The homeserver does not know it any more{_because(detail)}. Most likely the client has just hung up: the SFU will tell.",
                Tone.NOTICE,
            )
        case State.ADRIFT:
            return "Let run: nobody can tell whether the participant is there, so it is neither restarted nor ended.", Tone.NOTICE
        case _ if what.endswith("_failed"):
            return f"The first try to {what.removesuffix('_failed')} it failed{_because(detail)}. It is tried again.", Tone.NOTICE
        case _:
            try:
                sentence, tone = _ending(Outcome(what), row)
            except (ValueError, KeyError):
                return f"{what}{_because(detail)}", Tone.PLAIN
            if what == Outcome.WITHDRAWN:
                sentence = sentence.replace(_TAKEN_BACK, "The operator had it released" if detail == BY_OPERATOR else "It was taken back")
            refused = what == Outcome.REPLACED and detail[:1] == "4"  # then it may be there still, or have fired
            if detail and (refused or Outcome(what) in (Outcome.REJECTED, Outcome.LOST, Outcome.UNKNOWN)):
                sentence = f"{sentence} It answered: {detail}."
            return sentence, tone


def _because(detail: str) -> str:
    return f" ({detail})" if detail else ""


def tell(rows: Sequence[DelayedEvent], notes: Sequence[Note]) -> list[Line]:
    """The story of some delayed events, oldest first."""
    by_id = {row.id: row for row in rows}
    seen: set[int] = set()
    lines = []
    for note in sorted(notes, key=_in_order):
        row = by_id.get(note.event)
        if row is None:
            continue
        sentence, tone = _sentence(note, row, first=note.event not in seen)
        seen.add(note.event)
        lines.append(Line(note.at, note.event, note.what, note.detail, sentence, tone))
    return lines


def _in_order(note: Note) -> tuple[float, int]:
    """What one step has told has one time, and an order of its own: see `lifecycle.story`."""
    order = 0 if note.what == "delegated" else 1 if note.what in _PRESENCES else 2 if note.what == "verified" else 3 if note.what == RESTARTED else 4
    return note.at, 5 if note.what in _OUTCOMES else order


def course(row: DelayedEvent, notes: Sequence[Note]) -> list[Span]:
    """How the participant was from the delegation on, as far as the history tells."""
    spans: list[Span] = []
    presence, reason, since = Presence.EXPECTED, "", row.accepted_at
    changes = [note for note in sorted(notes, key=_in_order) if note.event == row.id and note.what in _PRESENCES]
    for note in changes:
        if note.at > since:
            spans.append(Span(presence, reason, since, note.at))
        presence, reason, since = Presence(note.what), note.detail, max(note.at, since)
    if not changes:  # it was connected when it was handed over
        presence, reason = row.presence, row.reason
    spans.append(Span(presence, reason, since, row.finished_at))
    return spans


_PRESENCES: Final = frozenset(presence.value for presence in Presence)
_OUTCOMES: Final = frozenset(outcome.value for outcome in Outcome)


def now_so(row: DelayedEvent, now: float) -> tuple[str, Tone]:
    """How it is with a delayed event, in a sentence or two. `now` in Unix seconds."""
    if row.state is State.DONE:
        return _ending(row.outcome, row)
    return " ".join(_parts(row, now)), _tone(row, now)


def briefly(row: DelayedEvent, now: float) -> str:
    """How it is, for a list: as long as all is as it should be, whether the participant is in the call; else as `now_so` has it."""
    sentence, tone = now_so(row, now)
    if tone in (Tone.NOTICE, Tone.BAD):
        return sentence
    return "" if row.state is State.DONE else next(_parts(row, now))


def _tone(row: DelayedEvent, now: float) -> Tone:
    late = row.state is not State.ADRIFT and row.harm is not None and row.verified_at is not None and row.harm < now - LATE
    if late and row.state in (State.LIVE, State.ENDING):
        return Tone.BAD
    if row.state in (State.VANISHED, State.ADRIFT) or row.attempts > 0 or row.presence is Presence.AWAY or row.verified_at is None:
        return Tone.NOTICE
    return Tone.GOOD if row.presence is Presence.CONNECTED else Tone.PLAIN


LATE: Final = 15.0
"""Seconds after a departure from which a goodbye that has not got through is late; and after a deadline, a restart."""


def _parts(row: DelayedEvent, now: float) -> Iterator[str]:
    for_so_long = f"for {span(now - row.presence_since)}"
    match row.presence:
        case Presence.CONNECTED:
            yield f"In the call {for_so_long}."
        case Presence.EXPECTED:
            yield f"Not seen in the call yet, {for_so_long}; it is given up when it does not join in time."
        case Presence.AWAY:
            look = (
                "" if row.look_at is None else f"; the SFU is asked in {span(row.look_at - now)}" if row.look_at > now else "; the SFU is being asked"
            )
            yield f"Away {for_so_long}: {why(row.reason)}{look}."
        case Presence.GONE:
            yield f"Gone {for_so_long}: {why(row.reason)}."
    tries = f" after {row.attempts} failed {'try' if row.attempts == 1 else 'tries'}" if row.attempts else ""
    goodbye = "goodbye" if row.on_end is OnEnd.SEND else "cancellation"
    match row.state:
        case State.LIVE if row.verified_at is None:
            yield f"The homeserver has not confirmed the delayed event yet{tries}."
        case State.LIVE:
            running = f"Restarted {span(now - row.running_since)} ago"
            if row.deadline <= now:
                yield f"{running}{tries}: its time is over, unless the client has restarted it."
            else:
                again = "" if row.due is None or row.claimed else f", again in {span(row.due - now)} at the latest"
                yield f"{running}{again}{tries}; it would run out in {span(row.deadline - now)}."
        case State.ENDING:
            yield f"Its {goodbye} {'is on its way' if row.claimed else 'waits to be made'}{tries}."
        case State.SUPERSEDED:
            yield f"A newer delegation took its place, and its cancellation {'is on its way' if row.claimed else 'waits to be made'}{tries}."
        case State.VANISHED:
            yield "The homeserver does not know it any more; the SFU will tell whether the client has just hung up."
        case State.ADRIFT:
            yield "It is let run: nobody can tell whether the participant is there, and the homeserver's timer decides."
        case State.DONE:
            pass
