"""The words of the rules: one row per delayed event, and the inputs that change it.

Rows are NamedTuples (hundreds are made for every batch of webhooks, and a NamedTuple costs a tenth of a frozen dataclass), and so are the inputs and
outputs that come in such numbers; the others are frozen dataclasses. Times are Unix seconds of the daemon's own clock (`daemon/clock.py`), durations
are seconds; what carries another unit says so in its name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple


class Presence(StrEnum):
    """Is the participant in the call?"""

    EXPECTED = "expected"  # delegated, not seen yet
    CONNECTED = "connected"  # at least one live session
    AWAY = "away"  # gone, or only reconnecting: a look at the SFU decides
    GONE = "gone"  # its delayed events are ended


class State(StrEnum):
    """What becomes of one delayed event?"""

    LIVE = "live"  # restarted as long as its participant is not GONE
    ENDING = "ending"  # to be sent or cancelled now, until the homeserver gave a definite answer
    SUPERSEDED = "superseded"  # to be cancelled: a newer delegation of its participant took its place
    VANISHED = "vanished"  # the homeserver no longer knows it, and its participant is not known to have left: wait and see
    ADRIFT = "adrift"  # nobody can tell whether its participant is there: neither restarted nor ended, so the homeserver's timer decides
    DONE = "done"  # ended, with an outcome


class Outcome(StrEnum):
    """How a delayed event ended. OPEN as long as it has not."""

    OPEN = ""
    SENT = "sent"  # by us, at the departure
    CANCELLED = "cancelled"  # by us, at the departure, as the client had asked for
    ALREADY_ENDED = "already_ended"  # the client ended it itself before: the normal end of a call
    RAN_OUT = "ran_out"  # after the departure, before we could end it, or ended by the client at that time: the two cannot be told apart
    LOST = "lost"  # gone at the homeserver while its participant was connected: the one that must not happen
    REJECTED = "rejected"  # the homeserver gave a final error
    REPLACED = "replaced"  # a newer delegation of the same participant took its place; cancelled at the homeserver
    WITHDRAWN = "withdrawn"  # the client took it back
    UNKNOWN = "unknown"  # the homeserver had never heard of it when it was delegated


class OnEnd(StrEnum):
    """What to do with the delayed event when its participant is gone."""

    SEND = "send"
    CANCEL = "cancel"


class Lane(IntEnum):
    """What is to be done next with a row, most urgent first."""

    END = 0
    RESTART = 1
    TIMER = 2  # nothing to do at the homeserver: the row is looked at again at `due`


class Action(StrEnum):
    """The three management requests of MSC4140, and the look at a room of the SFU."""

    SEND = "send"
    CANCEL = "cancel"
    RESTART = "restart"
    LOOK = "look"


class Verdict(StrEnum):
    """What a homeserver's answer to a management request means for us."""

    DONE = "done"
    NOT_FOUND = "not_found"  # 404 M_NOT_FOUND: sent, cancelled, run out, or never there
    CONFLICT = "conflict"  # 409: already sent or cancelled, as the proposal has it
    REFUSED = "refused"  # another final Matrix error, such as 403 M_FORBIDDEN
    LIMITED = "limited"  # 429: not done
    FAILED = "failed"  # certainly not done: could not connect, or asked to come back later
    UNCERTAIN = "uncertain"  # perhaps done: timeout or reset after the request was sent, 5xx, an answer that is no Matrix answer


class Session(NamedTuple):
    """One session (`sid`) of a participant, as far as it is known. An empty `sid` stands for the current one."""

    sid: str
    joined_at_ms: int  # the SFU node's clock; 0 when unknown
    live: bool  # False: a tombstone, so that a late `joined` of an ended session is ignored
    heard_at: float  # when we first heard that it is live, by our clock; 0 for one of which only the end was heard


def _without_secrets(row: Any) -> str:
    """The repr of a NamedTuple without its delay_id and its token."""
    values = (f"{name}={'…' if name in ('delay_id', 'token') and value else repr(value)}" for name, value in zip(row._fields, row, strict=True))
    return f"{type(row).__name__}({', '.join(values)})"


class DelayedEvent(NamedTuple):
    """One delayed event of one participant. A delegation is the rows that share `delegation`.

    The row carries its participant's state too: all rows of a participant get the same inputs, so they agree. Its repr has no secrets.
    """

    id: int
    delegation: str
    sfu: str
    room: str
    identity: str
    alias: str | None  # the form of the identity that only names the device, which the client may have got
    homeserver: str
    user: str | None  # the Matrix user, where it is known
    delay_id: str  # secret: whoever knows it can end the event
    delay: float  # seconds
    on_end: OnEnd
    token: bytes | None  # the scoped token, encrypted
    accepted_at: float
    verified_at: float | None  # the first time that the homeserver restarted it for us
    presence: Presence
    presence_since: float
    sessions: tuple[Session, ...]
    reason: str  # why AWAY or GONE: LiveKit's name, or one of `policy.OWN_REASONS`
    attempt_at: float  # the last sign of a connection attempt
    look_at: float | None  # when the SFU is to be asked about the participant
    state: State
    running_since: float  # the countdown began anew no earlier than this
    restarts: int
    attempts: int  # tries of the current action since it last succeeded
    end_tried: bool  # an attempt to end it may have reached the homeserver
    outcome: Outcome
    ended_at: float | None  # departure: when the participant was found to be gone
    finished_at: float | None
    lane: Lane | None  # None: nothing will ever be done any more
    due: float | None  # the earliest start; while claimed, the end of the lease
    harm: float | None  # lateness hurts from here: the departure, or running_since + delay; of one that was let run: when it is given up
    claim: int  # counts claims; an answer to an older one cannot end anything
    claimed: bool
    twin: str | None = None  # the other form of the identity that names the member as well, see `Accept`

    @property
    def deadline(self) -> float:
        """When the countdown ends at the homeserver, if nobody restarted it but us. A client may have: the true deadline may be later."""
        return self.running_since + self.delay

    @property
    def participant(self) -> tuple[str, str, str]:
        """The key of the participant: (SFU, room, identity)."""
        return (self.sfu, self.room, self.identity)

    @property
    def forms(self) -> tuple[str, ...]:
        """The identities under which the participant may be in the room."""
        return tuple(form for form in (self.identity, self.alias, self.twin) if form is not None)

    @property
    def live_sids(self) -> frozenset[str]:
        """The sessions that joined and have not left."""
        return frozenset(s.sid for s in self.sessions if s.live)

    def __repr__(self) -> str:
        return _without_secrets(self)


_AT = {name: at for at, name in enumerate(DelayedEvent._fields)}


def _replaced(row: DelayedEvent, /, **changes: Any) -> DelayedEvent:
    values: list[Any] = list(row)
    for name, value in changes.items():
        values[_AT[name]] = value
    return tuple.__new__(DelayedEvent, values)


if not TYPE_CHECKING:
    DelayedEvent._replace = _replaced  # takes half as long as the one of every NamedTuple, which asks for each of the fields by its name


class Room(NamedTuple):
    """One room of an SFU with delegations in it: looks are made, and claimed, by room."""

    sfu: str
    name: str
    room_sid: str  # of the latest `room_started` or `joined`; "" when unknown
    started_by: str  # the id of that `room_started`, so that it can be told twice; "" when unknown
    instance_at: float  # the `createdAt` of that webhook, or else when the first known participant joined, by the SFU node's clock; 0 when unknown
    finished: bool  # `room_finished` was heard, and no `room_started` or `joined` since
    doubt_until: float  # until then an absence in a list proves nothing: a node of a distributed SFU was away. 0: never, or another room since
    looked_at: float  # when the last look was sent, 0 when never
    asked: float | None  # when something suspicious was heard: a look sent before that does not answer it
    due: float | None  # when to look next; while claimed, the end of the lease
    routine: bool  # nobody waits for the look that is due: others go first
    failures: int  # looks in a row that failed
    claim: int
    claimed: bool


# ── inputs ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Sighting(StrEnum):
    """What a webhook says of a session."""

    JOINED = "joined"  # participant_joined: it became ACTIVE
    LEFT = "left"  # participant_left: it had been ACTIVE
    ABORTED = "aborted"  # participant_connection_aborted: it never became ACTIVE


class Seen(NamedTuple):
    """A participant webhook. A NamedTuple, since thousands come at once."""

    sfu: str
    room: str
    identity: str
    what: Sighting
    sid: str = ""
    joined_at_ms: int = 0
    reason: str = ""  # LiveKit's DisconnectReason by name; a number as text for one that this version does not name
    room_sid: str = ""
    created_at: float = 0.0  # when the webhook was made, by the SFU node's clock; 0 when unknown
    late: bool = False  # the engine knows that it arrived much later than it was made: it may be of the past
    made_at: float = 0.0  # when it was made, by our clock, as far as the engine can tell; 0 when unknown


class RoomNews(StrEnum):
    """What a webhook says of a room."""

    STARTED = "started"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RoomChanged:
    """A room webhook."""

    sfu: str
    room: str
    what: RoomNews
    room_sid: str = ""
    id: str = ""  # the webhook's
    created_at: float = 0.0  # when the webhook was made, by the SFU node's clock; 0 when unknown


@dataclass(frozen=True, slots=True)
class Missed:
    """Webhooks may have been lost: all rooms of an SFU, or of every SFU, are to be looked at."""

    sfu: str | None = None


@dataclass(frozen=True, slots=True)
class SfuLost:
    """The SFU has neither answered nor sent a webhook for so long that nothing can be said about its participants any more."""

    sfu: str


@dataclass(frozen=True, slots=True)
class SfuFound:
    """The SFU that was lost has been heard of again."""

    sfu: str


class Listed(NamedTuple):
    """One entry of ListParticipants."""

    identity: str
    sid: str
    state: str  # JOINING, JOINED, ACTIVE, DISCONNECTED
    joined_at_ms: int


@dataclass(frozen=True, slots=True)
class Looked:
    """The result of one look at a room. `participants` is None when the SFU could not be asked, which says nothing about anybody."""

    sfu: str
    room: str
    claim: int
    sent_at: float
    participants: tuple[Listed, ...] | None
    error: str = ""
    reached: bool = False  # it did answer, and refused to say anything
    made: bool = True  # False: its lease had ended before it could be sent, and nothing is known
    doubtful: bool = False  # the engine knows of a reason why absences prove nothing
    doubted_until: float = 0.0  # … or knew of one until then
    finished: bool = False  # the room was told to be over
    failed_since: float = 0.0  # when the SFU's latest outage began, as far as looks have shown
    recovered_at: float = 0.0  # … and when it was over; now, if the room could not be looked at before
    # Of these participants: what is made of a look by `dataclasses.replace` has it too.
    _by_identity: dict[str, list[Listed]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self._by_identity:
            for listed in self.participants or ():
                self._by_identity.setdefault(listed.identity, []).append(listed)

    def of(self, row: DelayedEvent) -> Sequence[Listed]:
        """The entries of one participant, by all forms of its identity."""
        listed = self._by_identity.get(row.identity, ())
        if row.alias is None and row.twin is None:
            return listed
        others = [entry for form in {row.alias, row.twin} - {row.identity, None} for entry in self._by_identity.get(form or "", ())]
        return [*listed, *others] if others else listed


class NewEvent(NamedTuple):
    """A delayed event as it is handed over: by a client, or as its homeserver has shown it. Its repr has no secrets."""

    delay_id: str
    delay: float
    on_end: OnEnd
    running_since: float | None = None  # the homeserver's word: the countdown began no earlier than this. None: nobody has asked it
    shown_at: float = 0.0  # when it was asked, before the request was sent

    def __repr__(self) -> str:
        return _without_secrets(self)


@dataclass(frozen=True, slots=True)
class Accept:
    """A client delegates: `delegation` is a fresh id, which is not used where the participant has delegated exactly these events before.

    A client may have got its access token, and with it its identity, by another endpoint than the one by which it delegates. `alias` is the form that
    names the device only, which several memberships may have in common; `twin` names the same member as `identity` does, and nobody else.
    """

    delegation: str
    sfu: str
    room: str
    identity: str
    homeserver: str
    events: tuple[NewEvent, ...]
    alias: str | None = None
    user: str | None = None
    token: bytes | None = None
    twin: str | None = None


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The client takes its delegation back, or the operator releases it: the events are forgotten without touching them."""

    delegation: str
    by_operator: bool = False


class Carried(NamedTuple):
    """An event that a delegation took over from another one, and what it was there. Its repr has no secrets."""

    event: int
    delegation: str
    identity: str
    alias: str | None
    twin: str | None
    user: str | None
    delay: float
    on_end: OnEnd
    token: bytes | None
    accepted_at: float
    verified_at: float | None

    def __repr__(self) -> str:
        return _without_secrets(self)


@dataclass(frozen=True, slots=True)
class End:
    """The operator has a delegation ended now, wherever its participant is: its events are sent, or cancelled, as its client had asked for."""

    delegation: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """A delegation turned out to be wrong while its client still waits for the answer: it ends, and only its history remains.

    `back`: events that it had taken over from another delegation, to which they return as they were.
    """

    delegation: str
    back: tuple[Carried, ...] = ()


@dataclass(frozen=True, slots=True)
class Find:
    """Somebody asks for a delegation. Changes nothing."""

    delegation: str


class Answered(NamedTuple):
    """What became of a claimed action. A NamedTuple like `Seen`."""

    homeserver: str
    event: int
    claim: int
    action: Action
    sent_at: float  # before the request was sent
    verdict: Verdict
    retry_after: float | None = None  # seconds
    alone: bool = False  # LIMITED concerns this event's user only: it was done with the user's token, or is by the user's own limit
    detail: str = ""  # for people: status and errcode; never a token or a delay_id
    answered_at: float | None = None  # when that was known, which may be before it is kept; None: now


@dataclass(frozen=True, slots=True)
class Due:
    """The time that the row itself asked for has come (lane TIMER)."""

    event: int


Input = Accept | Withdraw | End | Refuse | Find | Seen | RoomChanged | Missed | SfuLost | SfuFound | Looked | Answered | Due


# ── outputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Note(NamedTuple):
    """One line of the history of a delayed event."""

    event: int
    at: float
    what: str
    detail: str


class Task(NamedTuple):
    """A claimed action: do it, and answer with its claim. Its repr has no secrets."""

    action: Action
    event: int  # the row; 0 for a look
    claim: int
    sfu: str
    room: str
    homeserver: str = ""
    delegation: str = ""
    delay_id: str = ""
    token: bytes | None = None
    user: str | None = None
    urgent_since: float | None = None  # END: when the participant left
    lease_ends: float = 0.0

    def __repr__(self) -> str:
        return f"Task({self.action!r}, event={self.event}, claim={self.claim}, room={self.room!r}, delegation={self.delegation!r})"
