"""A model of a LiveKit server 1.13 as seen from outside: rooms, participants, their sessions, the webhooks it sends, and what RoomService
answers.

No I/O and no clock: `now` (Unix seconds) is an argument of whatever needs it, and randomness comes from a seed, so that a run can be
repeated exactly. Whoever drives the model calls `tick(now)`, makes the requests that `due(now)` hands out, tells `answered(...)`, and
comes back at `next_event()`. Forms, orders and timings are those of recorded servers; `livekit-1.13.3` in the tests' fixtures holds them.
"""

import heapq
import json
import math
import random
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from .answer import Answer, Fate, Impossible, json_answer, no_answer, text_answer
from .tokens import TokenRefused, read_token, sign
from .webhooks import DEPTH, MAX_AGE, Webhook, WebhookQueue

Json = dict[str, Any]

TAKEOVER = (0.020, 0.090)  # seconds from signalling to ACTIVE; recorded between `left DUPLICATE_IDENTITY` and `joined`
SILENCE = (19.0, 20.9)  # seconds until a vanished client is noticed
JOIN_TIMEOUT = 60.0  # seconds until a client that never sent media is given up
COUNT_INTERVAL = 5.0  # seconds between the moments at which `num_participants` is brought up to date
DRAIN_INTERVAL = 5.0  # seconds between the looks of a draining server whether everybody is gone
EXIT_AFTER = 0.075  # seconds from the second SIGTERM to the exit
NO_SERVER_AFTER = 3.0  # seconds until a node gives up waiting for the node that is gone

_CODECS = (
    "audio/PCMU",
    "audio/PCMA",
    "audio/opus",
    "audio/red",
    "video/VP8",
    "video/H264",
    "video/VP9",
    "video/AV1",
    "video/H265",
    "video/rtx",
)
_ALPHABET = string.ascii_letters + "23456789"
_INT64 = frozenset({"creation_time", "creation_time_ms", "joined_at", "joined_at_ms", "unix_micro"})
_ENUM_DEFAULTS = {"state": "JOINING", "disconnect_reason": "UNKNOWN_REASON", "kind": "STANDARD", "type": "AUDIO", "encryption": "NONE"}


class State(StrEnum):
    """LiveKit's ParticipantInfo.State."""

    JOINING = "JOINING"
    JOINED = "JOINED"
    ACTIVE = "ACTIVE"
    DISCONNECTED = "DISCONNECTED"


class _Wake(StrEnum):
    """Why a session has a timer."""

    ACTIVATE = "activate"
    SILENT = "silent"
    NEVER_JOINED = "never_joined"


@dataclass(slots=True)
class Session:
    """One connection of a participant, by `sid`. A participant has one at a time on one node."""

    sid: str
    identity: str
    name: str
    joined_at: float
    state: State
    bare: bool  # a websocket without an SDK behind it: no client protocol, no capabilities
    version: int = 1
    tracks: dict[str, Json] = field(default_factory=dict)
    was_publisher: bool = False
    vanished: bool = False
    unlisted: bool = False  # connected, but missing from the lists
    wake_at: float | None = None
    wake: _Wake | None = None


@dataclass(slots=True)
class Room:
    """A room, as one node holds it and (with Redis) as the lists tell of it."""

    sid: str
    name: str
    empty_timeout: int
    departure_timeout: int
    created_at: float
    turn_password: str
    sessions: dict[str, Session] = field(default_factory=dict)  # by identity
    ghosts: dict[str, Session] = field(default_factory=dict)  # listed, though nobody is there
    stranded: list[Session] = field(default_factory=list)  # on a frozen node
    up: bool = True  # a node holds it; False after a node went away that shared its rooms through Redis
    ever_joined: bool = False
    closes_at: float | None = None
    counted: int = 0  # which interval the counts below are of
    num_participants: int = 0
    num_publishers: int = 0
    form: Json = field(default_factory=dict)  # what every webhook says of it, without the counts


class Joined(NamedTuple):
    """Who was let in by a token."""

    room: str
    identity: str
    sid: str


class JoinRefused(Exception):
    """A client was not let in."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Delivery(NamedTuple):
    """One HTTP request of a webhook that is to be made now."""

    ticket: int  # for `answered`
    url: str
    room: str
    event: str
    id: str
    number: int  # 1 for the first attempt
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class SfuFaults:
    """What is wrong with RoomService. All may be changed while running."""

    down: bool = False  # nobody listens
    hang: bool = False  # no answer ever
    error: int | None = None  # this HTTP status for every call
    empty_lists: bool = False  # false absence: nobody is listed, nobody is found
    ghosts: bool = False  # who leaves stays listed as ACTIVE
    slow: float = 0.0  # seconds by which every answer is held back


@dataclass(slots=True)
class DeliveryFaults:
    """What happens to webhooks on their way: probabilities, each for itself, and times in seconds."""

    drop: float = 0.0
    delay: float = 0.0
    delay_up_to: float = 10.0
    duplicate: float = 0.0
    reorder: float = 0.0  # takes another way, and is overtaken by later ones
    reorder_up_to: float = 10.0


class SfuModel:
    """The server. `on_webhook` sees every event in the moment it is made, before any fault of the delivery."""

    def __init__(
        self,
        keys: Mapping[str, str] | None = None,
        urls: Sequence[str] = (),
        *,
        seed: int = 0,
        auto_create: bool = False,
        on_webhook: Callable[[Json], None] | None = None,
        queue_depth: int = DEPTH,
        queue_max_age: float = MAX_AGE,
    ) -> None:
        self.keys = dict(keys or {"devkey": "a-secret-that-is-at-least-32-bytes-long"})
        self.webhook_key = next(iter(self.keys))  # which key signs the webhooks
        self.urls = list(urls)
        self.auto_create = auto_create
        self.on_webhook = on_webhook
        self.rooms: dict[str, Room] = {}
        self.running = True
        self.faults = SfuFaults()
        self.delivery_faults = DeliveryFaults()
        self.lost: Counter[str] = Counter()  # webhooks that were dropped, by reason
        self.calls: Counter[str] = Counter()  # RoomService calls by method
        self._queue_depth = queue_depth
        self._queue_max_age = queue_max_age
        self._random = random.Random(seed)
        self._timers: list[tuple[float, int, str, str]] = []  # (at, tie-break, room, identity or "" for the room itself)
        self._queues: dict[tuple[str, str, int], WebhookQueue] = {}
        self._ready: list[tuple[float, int, tuple[str, str, int]]] = []
        self._in_flight: dict[int, tuple[tuple[str, str, int], WebhookQueue]] = {}
        self._count = 0
        self._exits_at: float | None = None
        self._drains_at: float | None = None

    def create_room(self, name: str, now: float, empty_timeout: int = 300, departure_timeout: int = 20) -> str:
        """Create a room, timeouts in seconds; the same sid again, and the old timeouts, where it exists. Returns its sid."""
        self._must_run()
        room = self.rooms.get(name)
        if room is None:
            # LiveKit treats 0 as "not given".
            room = Room(self._id("RM_"), name, empty_timeout or 300, departure_timeout or 20, now, self._text(44))
            self.rooms[name] = room
            self._emit(now, "room_started", room)
            self._plan_closing(room, now)
        elif not room.up:
            self._bring_up(room, now)
        return room.sid

    def begin_join(self, room: str, identity: str, now: float, *, bare: bool = False, name: str = "", state: State = State.JOINED) -> str:
        """A client connects its signalling: a new session, JOINED and not yet ACTIVE, takes the identity over. Returns its sid.

        The session that the identity had ends with DUPLICATE_IDENTITY. Without `activate`, it is given up after 60 s.
        """
        self._must_run()
        if room not in self.rooms and self.auto_create:
            self.create_room(room, now)
        held = self._room(room)
        if not held.up:
            self._bring_up(held, now)
        self._count_up(held, now)
        session = Session(self._id("PA_"), identity, name or identity, now, state, bare)
        held.ever_joined = True
        held.closes_at = None
        held.ghosts.pop(identity, None)
        if identity in held.sessions:
            self._close(held, held.sessions[identity], "DUPLICATE_IDENTITY", now, replaced=True)
        held.sessions[identity] = session
        self._wake(held, session, now + JOIN_TIMEOUT, _Wake.NEVER_JOINED)
        return session.sid

    def activate(self, room: str, identity: str, now: float) -> None:
        """Media is connected: ACTIVE, and `participant_joined`."""
        held, session = self._find(room, identity)
        if session.state is State.ACTIVE:
            raise Impossible("already active")
        self._count_up(held, now)
        session.state = State.ACTIVE
        session.version += 1
        session.wake_at = session.wake = None
        self._emit(now, "participant_joined", held, session)

    def join(self, room: str, identity: str, now: float, *, active_after: float | None = None, name: str = "") -> str:
        """A client connects; ACTIVE after `active_after` seconds (some 20–90 ms by default, at once for 0). Returns the new sid."""
        sid = self.begin_join(room, identity, now, name=name)
        delay = self._random.uniform(*TAKEOVER) if active_after is None else active_after
        if delay <= 0:
            self.activate(room, identity, now)
        else:
            held, session = self._find(room, identity)
            self._wake(held, session, now + delay, _Wake.ACTIVATE)
        return sid

    def join_with_token(self, token: str, now: float) -> Joined:
        """A client connects with an access token. Raises JoinRefused where LiveKit would not let it in."""
        self._must_run()
        try:
            claims = read_token(token, self.keys, now)
        except TokenRefused as error:
            raise JoinRefused(401, str(error)) from error
        video, identity = claims.get("video") or {}, claims.get("sub") or ""
        room = video.get("room") or ""
        if not video.get("roomJoin") or not room or not identity:
            raise JoinRefused(401, "permissions denied")
        if room not in self.rooms and not self.auto_create:
            raise JoinRefused(404, "requested room does not exist")
        return Joined(room, identity, self.join(room, identity, now, name=claims.get("name") or ""))

    def leave(self, room: str, identity: str, now: float, reason: str = "CLIENT_INITIATED") -> None:
        """The session ends with this reason: `participant_left`, or `participant_connection_aborted` if it never was ACTIVE."""
        held, session = self._find(room, identity)
        self._close(held, session, reason, now)

    def abort(self, room: str, identity: str, now: float, reason: str = "SIGNAL_CLOSE") -> None:
        """A client that never became ACTIVE hangs up: `participant_connection_aborted`."""
        held, session = self._find(room, identity)
        if session.state is State.ACTIVE:
            raise Impossible("it is active")
        self._close(held, session, reason, now)

    def hang(self, room: str, identity: str, now: float) -> str:
        """A client opens the signalling and never sends media: `JOIN_FAILURE` after 60 s. Returns its sid."""
        return self.begin_join(room, identity, now, bare=True)

    def vanish(self, room: str, identity: str, now: float) -> None:
        """The client is gone without a word: ACTIVE until it is noticed after some 20 s, then `left CONNECTION_TIMEOUT`."""
        held, session = self._find(room, identity)
        session.vanished = True
        if session.state is State.ACTIVE:
            self._wake(held, session, now + self._random.uniform(*SILENCE), _Wake.SILENT)
        else:
            self._wake(held, session, session.joined_at + JOIN_TIMEOUT, _Wake.NEVER_JOINED)

    def resume(self, room: str, identity: str, now: float) -> bool:  # noqa: ARG002 - like its siblings
        """A vanished client is back in time and goes on in the same session, without any webhook. False: too late, it must join anew."""
        held = self.rooms.get(room)
        session = held.sessions.get(identity) if held else None
        if session is None or not session.vanished:
            return False
        session.vanished = False
        if session.state is State.ACTIVE:
            session.wake_at = session.wake = None
        return True

    def remove(self, room: str, identity: str, now: float) -> None:
        """RemoveParticipant: `PARTICIPANT_REMOVED`."""
        self.leave(room, identity, now, "PARTICIPANT_REMOVED")

    def delete_room(self, room: str, now: float) -> None:
        """DeleteRoom: everybody leaves with `ROOM_DELETED`, then `room_finished`."""
        held = self._room(room)
        for session in list(held.sessions.values()):
            self._close(held, session, "ROOM_DELETED", now)
        self._finish(held, now)

    def publish_track(self, room: str, identity: str, now: float, name: str = "mic") -> str:
        """An audio track: `track_published`. A participant that was missing from the lists is back in them. Returns the track's sid."""
        held, session = self._find(room, identity)
        if session.state is not State.ACTIVE:
            raise Impossible("not active")
        self._count_up(held, now)
        track = self._track(name, now)
        session.tracks[track["sid"]] = track
        session.was_publisher = True
        session.version += 2
        session.unlisted = False
        self._emit(now, "track_published", held, session, track)
        return str(track["sid"])

    def unpublish_track(self, room: str, identity: str, now: float, sid: str = "") -> None:
        """`track_unpublished`, of the only track or the given one."""
        held, session = self._find(room, identity)
        track = session.tracks.get(sid or next(iter(session.tracks), ""))
        if track is None:
            raise Impossible("no such track")
        self._count_up(held, now)
        del session.tracks[track["sid"]]
        session.version += 1
        self._emit(now, "track_unpublished", held, session, track)

    def kill(self, now: float, *, redis: bool = False) -> None:
        """The node dies: no webhook for anybody, and those that wait are lost. `start` brings it back.

        Without Redis all rooms are forgotten. With it the rooms are remembered, their participants are listed as ghosts, and
        `room_started` comes a second time with the same room sid when somebody connects.
        """
        self._exit()
        if not redis:
            self.rooms.clear()
            return
        for room in self.rooms.values():
            self._count_up(room, now)
            room.ghosts |= room.sessions
            room.sessions.clear()
            room.up, room.closes_at = False, None

    def start(self, now: float) -> None:  # noqa: ARG002 - like its siblings
        """A node is up again, after `kill` or a shutdown."""
        self.running = True

    def shutdown(self, now: float) -> None:
        """First SIGTERM: everything goes on, also new joins. It exits when it finds itself empty, which it looks at every 5 s."""
        self._must_run()
        self._drains_at = now + DRAIN_INTERVAL

    def shutdown_forced(self, now: float, told: int | None = None) -> int:
        """Second SIGTERM: `left SERVER_SHUTDOWN` of `told` participants (by default of one in four of five cases, else of all), then the
        exit.

        Returns how many were told. Events that are not delivered within 75 ms are lost.
        """
        self._must_run()
        everybody = [(room, session) for room in self.rooms.values() for session in room.sessions.values()]
        self._random.shuffle(everybody)
        if told is None:
            told = 1 if self._random.random() < 0.8 else len(everybody)
        told = min(told, len(everybody))
        for room, session in everybody[:told]:
            self._close(room, session, "SERVER_SHUTDOWN", now)
        if told == len(everybody):
            for room in list(self.rooms.values()):
                self._finish(room, now)
        self.rooms.clear()
        self._exits_at = now + EXIT_AFTER
        return told

    def freeze_node(self, room: str, now: float) -> None:
        """The node that holds the room stops, the others go on (Redis): its participants stay listed, and come back through another node
        by `join`.
        """
        held = self._room(room)
        self._count_up(held, now)
        for session in held.sessions.values():
            session.wake_at = session.wake = None
        held.stranded += held.sessions.values()
        held.ghosts |= held.sessions
        held.sessions.clear()
        held.up, held.closes_at = False, None

    def thaw_node(self, room: str, now: float) -> None:
        """The frozen node goes on: some 20 s later `left CONNECTION_TIMEOUT` of its *old* sids, which also takes living ones of the same
        identity out of the lists, and after the departure timeout `room_finished`, though people are in the call.
        """
        held = self._room(room)
        for session in held.stranded:
            session.wake_at = now + self._random.uniform(*SILENCE)
            session.wake = _Wake.SILENT
            self._push(session.wake_at, held.name, session.identity)

    def next_event(self) -> float | None:
        """When the model wants to be woken; None when nothing will happen by itself."""
        while self._timers and not self._valid(self._timers[0]):
            heapq.heappop(self._timers)
        while self._ready and not self._ready_valid(self._ready[0]):
            heapq.heappop(self._ready)
        times = [heap[0][0] for heap in (self._timers, self._ready) if heap]
        times += [at for at in (self._exits_at, self._drains_at) if at is not None]
        return min(times, default=None)

    def tick(self, now: float) -> None:
        """Let everything happen that is due by now, each at its own time."""
        while True:
            timer = self._timers[0] if self._timers and self._timers[0][0] <= now else None
            at = timer[0] if timer else now
            if self._exits_at is not None and self._exits_at <= at:
                self._exit()
                self.rooms.clear()
            elif self._drains_at is not None and self._drains_at <= at:
                self._drain(self._drains_at)
            elif timer:
                heapq.heappop(self._timers)
                if self._valid(timer):
                    self._fire(timer[2], timer[3], timer[0])
            else:
                return

    def due(self, now: float) -> list[Delivery]:
        """The webhook requests to be made now. Each must be told of by `answered`; nothing else of its room is sent until then."""
        self.tick(now)
        deliveries = []
        while self._ready and self._ready[0][0] <= now:
            entry = heapq.heappop(self._ready)
            if not self._ready_valid(entry):
                continue
            queue = self._queues[entry[2]]
            attempt = queue.next_attempt(now)
            if attempt is None:
                continue
            self._count += 1
            self._in_flight[self._count] = (entry[2], queue)
            webhook = attempt.webhook
            headers = {
                "User-Agent": "Go-http-client/1.1",
                "Authorization": webhook.authorization,
                "Content-Type": "application/webhook+json",
                "Accept-Encoding": "gzip",
            }
            deliveries.append(Delivery(self._count, webhook.url, webhook.room, webhook.event, webhook.id, attempt.number, headers, webhook.body))
        return deliveries

    def answered(self, ticket: int, status: int | None, now: float, retry_after: float | None = None) -> None:
        """What came back: an HTTP status, or None for a transport error. `retry_after` in seconds. Of a node that died meanwhile: nothing
        happens.
        """
        key, queue = self._in_flight.pop(ticket, (None, None))
        if key is None or queue is None:
            return
        queue.answered(status, now, retry_after)
        if len(queue) == 0:
            self._queues.pop(key, None)
        else:
            self._ready_push(key, queue)

    def backlog(self) -> int:
        """How many webhooks wait or are being sent."""
        return sum(len(queue) for queue in self._queues.values())

    def room_service(self, method: str, request: Mapping[str, Any] | None, token: str | None, now: float) -> Answer:
        """One Twirp call, with snake_case JSON both ways. `request` is None where the body could not be decoded; `token` without
        `Bearer`.
        """
        grants: Mapping[str, Any] | TokenRefused = {}
        if token is not None:
            try:
                grants = read_token(token, self.keys, now).get("video") or {}
            except TokenRefused as error:
                grants = error
        return self._asked(method, request, grants, now)

    def look(self, room: str, now: float) -> Answer:
        """ListParticipants without the token, faults included, for whoever drives the model without HTTP."""
        return self._asked("ListParticipants", {"room": room}, {"roomAdmin": True, "room": room}, now)

    def _asked(self, method: str, request: Mapping[str, Any] | None, grants: Mapping[str, Any] | TokenRefused, now: float) -> Answer:
        self.tick(now)
        if not self.running or self.faults.down:
            return no_answer(Fate.REFUSE)
        self.calls[method] += 1
        if self.faults.hang:
            return no_answer(Fate.HANG)
        answer = text_answer(401, grants.answer) if isinstance(grants, TokenRefused) else self._handle(method, request, grants, now)
        return answer._replace(headers={**answer.headers, "Vary": "Origin"}, delay=answer.delay + self.faults.slow)

    def _handle(self, method: str, request: Mapping[str, Any] | None, grants: Mapping[str, Any], now: float) -> Answer:
        if self.faults.error is not None:
            return _twirp_error(self.faults.error, "internal", "internal error")
        handler = {
            "CreateRoom": self._create_room,
            "DeleteRoom": self._delete_room,
            "GetParticipant": self._get_participant,
            "ListParticipants": self._list_participants,
            "ListRooms": self._list_rooms,
            "RemoveParticipant": self._remove_participant,
        }.get(method)
        if handler is None:
            path = f"/twirp/livekit.RoomService/{method}"
            return bad_route(f'no handler for path "{path}"', f"POST {path}")
        if request is None:
            return _MALFORMED
        return handler(request, grants, now)

    def _create_room(self, request: Mapping[str, Any], grants: Mapping[str, Any], now: float) -> Answer:
        if not grants.get("roomCreate"):
            return _DENIED
        name = str(request.get("name", ""))
        try:
            timeouts = int(request.get("empty_timeout", 0)), int(request.get("departure_timeout", 0))
        except (TypeError, ValueError):
            return _MALFORMED
        self.create_room(name, now, *timeouts)
        return json_answer(200, self._room_info(self.rooms[name], now))

    def _delete_room(self, request: Mapping[str, Any], grants: Mapping[str, Any], now: float) -> Answer:
        if not grants.get("roomCreate"):
            return _DENIED
        name = str(request.get("room", ""))
        if name not in self.rooms:
            return _NO_ROOM
        self.delete_room(name, now)
        return json_answer(200, {})

    def _list_rooms(self, request: Mapping[str, Any], grants: Mapping[str, Any], now: float) -> Answer:
        if not grants.get("roomList"):
            return _DENIED
        names = request.get("names") or list(self.rooms)
        return json_answer(200, {"rooms": [self._room_info(self.rooms[name], now) for name in names if name in self.rooms]})

    def _list_participants(self, request: Mapping[str, Any], grants: Mapping[str, Any], now: float) -> Answer:  # noqa: ARG002 - a handler
        if not _is_admin(request, grants):
            return _DENIED
        room = self.rooms.get(str(request.get("room")))
        listed = [] if room is None or self.faults.empty_lists else [_participant_info(session) for session in _listed(room)]
        return json_answer(200, {"participants": listed})

    def _get_participant(self, request: Mapping[str, Any], grants: Mapping[str, Any], now: float) -> Answer:  # noqa: ARG002 - a handler
        if not _is_admin(request, grants):
            return _DENIED
        room = self.rooms.get(str(request.get("room")))
        if room is not None and not self.faults.empty_lists:
            for session in _listed(room):
                if session.identity == request.get("identity"):
                    return json_answer(200, _participant_info(session))
        return _NO_PARTICIPANT

    def _remove_participant(self, request: Mapping[str, Any], grants: Mapping[str, Any], now: float) -> Answer:
        if not _is_admin(request, grants):
            return _DENIED
        room = self.rooms.get(str(request.get("room")))
        identity = str(request.get("identity", ""))
        if room is not None and identity in room.sessions:
            self.remove(room.name, identity, now)
            return json_answer(200, {})
        if room is not None and identity in room.ghosts:
            return _twirp_error(503, "unavailable", "twirp error unknown: no response from servers")._replace(delay=NO_SERVER_AFTER)
        return _NO_PARTICIPANT

    def _must_run(self) -> None:
        if not self.running:
            raise Impossible("the SFU is not running")

    def _room(self, name: str) -> Room:
        self._must_run()
        if name not in self.rooms:
            raise Impossible(f"no such room: {name}. Rooms are made by create_room, or by themselves with --auto-create")
        return self.rooms[name]

    def _find(self, room: str, identity: str) -> tuple[Room, Session]:
        held = self._room(room)
        if identity not in held.sessions:
            raise Impossible("no such participant")
        return held, held.sessions[identity]

    def _text(self, length: int) -> str:
        return "".join(self._random.choices(_ALPHABET, k=length))

    def _id(self, prefix: str) -> str:
        return prefix + self._text(12)

    def _bring_up(self, room: Room, now: float) -> None:
        room.up = True
        self._emit(now, "room_started", room)
        self._plan_closing(room, now)

    def _close(self, room: Room, session: Session, reason: str, now: float, *, replaced: bool = False) -> None:
        self._count_up(room, now)
        was_active = session.state is State.ACTIVE
        for track in session.tracks.values():
            self._emit(now, "track_unpublished", room, session, track)
        if self.faults.ghosts and was_active and not replaced:
            room.ghosts[session.identity] = session
        session.wake_at = session.wake = None
        del room.sessions[session.identity]
        self._emit_end(room, session, reason, now)
        if not room.sessions and not replaced:
            self._plan_closing(room, now)

    def _emit_end(self, room: Room, session: Session, reason: str, now: float) -> None:
        event = "participant_left" if session.state is State.ACTIVE else "participant_connection_aborted"
        info = _participant_info(session)
        info |= {"state": State.DISCONNECTED, "version": session.version + 1, "disconnect_reason": reason, "tracks": []}
        info["is_publisher"] = session.was_publisher
        self._emit(now, event, room, info=info)

    def _plan_closing(self, room: Room, now: float) -> None:
        """LiveKit compares whole seconds, once a second: recorded 19.3 and 20.2 s for a timeout of 20."""
        timeout = room.departure_timeout if room.ever_joined else room.empty_timeout
        earliest = math.floor(now) + timeout
        room.closes_at = room.created_at + max(0, math.ceil(earliest - room.created_at))
        self._push(room.closes_at, room.name, "")

    def _finish(self, room: Room, now: float) -> None:
        self._count_up(room, now)
        del self.rooms[room.name]
        self._emit(now, "room_finished", room)

    def _exit(self) -> None:
        self.running = False
        self._queues.clear()
        self._ready.clear()
        self._in_flight.clear()
        self._exits_at = self._drains_at = None

    def _drain(self, now: float) -> None:
        if any(room.sessions for room in self.rooms.values()):
            self._drains_at = now + DRAIN_INTERVAL
            return
        self._drains_at = None
        for room in list(self.rooms.values()):
            self._finish(room, now)
        self._exits_at = now + EXIT_AFTER

    def _push(self, at: float, room: str, identity: str) -> None:
        self._count += 1
        heapq.heappush(self._timers, (at, self._count, room, identity))

    def _wake(self, room: Room, session: Session, at: float, why: _Wake) -> None:
        session.wake_at, session.wake = at, why
        self._push(at, room.name, session.identity)

    def _timed(self, room: Room, identity: str, at: float) -> Session | None:
        """The session, living or stranded, that is to be woken at exactly this time. Timers are not deleted when plans change: they just
        match nothing.
        """
        for session in (room.sessions.get(identity), *room.stranded):
            if session is not None and session.identity == identity and session.wake_at == at:
                return session
        return None

    def _valid(self, timer: tuple[float, int, str, str]) -> bool:
        at, _, name, identity = timer
        room = self.rooms.get(name)
        if room is None or not self.running:
            return False
        if identity:
            return self._timed(room, identity, at) is not None
        return room.closes_at == at

    def _fire(self, name: str, identity: str, at: float) -> None:
        room = self.rooms[name]
        if not identity:
            self._close_time(room, at)
            return
        session = self._timed(room, identity, at)
        if session is None:
            return
        if session in room.stranded:
            self._thawed(room, session, at)
        elif session.wake is _Wake.ACTIVATE:
            self.activate(name, identity, at)
        elif session.wake is _Wake.SILENT:
            self._close(room, session, "CONNECTION_TIMEOUT", at)
        else:
            self._close(room, session, "JOIN_FAILURE", at)

    def _close_time(self, room: Room, at: float) -> None:
        room.closes_at = None
        if room.sessions:
            # A thawed node finishes its own, empty instance of the room, while people are in the other one.
            self._count_up(room, at)
            self._emit(at, "room_finished", room)
        else:
            self._finish(room, at)

    def _thawed(self, room: Room, session: Session, at: float) -> None:
        room.stranded.remove(session)
        room.ghosts.pop(session.identity, None)
        self._emit_end(room, session, "CONNECTION_TIMEOUT", at)
        living = room.sessions.get(session.identity)
        if living is not None:
            living.unlisted = True
        if not room.stranded:
            self._plan_closing(room, at)

    def _count_up(self, room: Room, now: float) -> None:
        """Bring the counts up to date if their time has come. Called before every change, so that they show what was so at the last full
        interval.
        """
        interval = math.floor((now - room.created_at) / COUNT_INTERVAL)
        if interval > room.counted:
            room.counted = interval
            room.num_participants = len(room.sessions)
            room.num_publishers = sum(1 for session in room.sessions.values() if session.tracks)

    def _emit(
        self, now: float, event: str, room: Room, session: Session | None = None, track: Json | None = None, *, info: Json | None = None
    ) -> None:
        about: Json = {"event": event}
        if track is not None and session is not None:
            about["room"] = {"sid": room.sid, "name": room.name}
            about["participant"] = {"sid": session.sid, "identity": session.identity}
            about["track"] = webhook_form(track)
        else:
            about["room"] = self._room_form(room, now)
            if session is not None or info is not None:
                about["participant"] = webhook_form(info or _participant_info(session))
        about |= {"id": self._id("EV_"), "createdAt": str(int(now))}
        if self.on_webhook is not None:
            self.on_webhook(about)
        for url in self.urls:
            self._queue(url, room.name, about, now)

    def _queue(self, url: str, room: str, about: Json, now: float) -> None:
        faults = self.delivery_faults
        if self._chance(faults.drop):
            self.lost["fault"] += 1
            return
        body = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
        authorization = sign(body, self.webhook_key, self.keys[self.webhook_key], now)
        lane, ready_at = 0, now
        if self._chance(faults.reorder):
            self._count += 1
            lane = self._count
            ready_at = now + self._random.uniform(0, faults.reorder_up_to)
        elif self._chance(faults.delay):
            ready_at = now + self._random.uniform(0, faults.delay_up_to)
        webhook = Webhook(url, room, about["event"], about["id"], body, authorization, now, ready_at)
        for _ in range(2 if self._chance(faults.duplicate) else 1):
            key = (room, url, lane)
            queue = self._queues.get(key)
            if queue is None:
                queue = self._queues[key] = WebhookQueue(self._lose, depth=self._queue_depth, max_age=self._queue_max_age)
            queue.put(webhook, now)
            self._ready_push(key, queue)

    def _chance(self, probability: float) -> bool:
        return probability > 0 and self._random.random() < probability

    def _lose(self, webhook: Webhook, why: str) -> None:  # noqa: ARG002 - the reason is what is counted
        self.lost[why] += 1

    def _ready_push(self, key: tuple[str, str, int], queue: WebhookQueue) -> None:
        if queue.next_at is not None:
            self._count += 1
            heapq.heappush(self._ready, (queue.next_at, self._count, key))

    def _ready_valid(self, entry: tuple[float, int, tuple[str, str, int]]) -> bool:
        queue = self._queues.get(entry[2])
        return queue is not None and queue.next_at == entry[0]

    def _room_info(self, room: Room, now: float) -> Json:
        self._count_up(room, now)
        return {
            "sid": room.sid,
            "name": room.name,
            "empty_timeout": room.empty_timeout,
            "departure_timeout": room.departure_timeout,
            "max_participants": 0,
            "creation_time": str(int(room.created_at)),
            "creation_time_ms": str(int(room.created_at * 1000)),
            "turn_password": room.turn_password,
            "enabled_codecs": [{"mime": mime, "fmtp_line": ""} for mime in _CODECS],
            "metadata": "",
            "num_participants": room.num_participants,
            "num_publishers": room.num_publishers,
            "active_recording": False,
            "version": None,
        }

    def _room_form(self, room: Room, now: float) -> Json:
        """Every webhook carries its room, so what never changes is made once. The counts come last in LiveKit's order, too."""
        if not room.form:
            room.form = {k: v for k, v in webhook_form(self._room_info(room, now)).items() if not k.startswith("num")}
        self._count_up(room, now)
        counts = {"numParticipants": room.num_participants, "numPublishers": room.num_publishers}
        return room.form | {name: count for name, count in counts.items() if count}

    def _track(self, name: str, now: float) -> Json:
        return {
            "sid": self._id("TR_AM"),
            "type": "AUDIO",
            "name": name,
            "muted": False,
            "width": 0,
            "height": 0,
            "simulcast": False,
            "disable_dtx": False,
            "source": "MICROPHONE",
            "layers": [],
            "mime_type": "audio/red",
            "mid": "7",
            "codecs": [
                {
                    "mime_type": "audio/red",
                    "mid": "7",
                    "cid": self._text(32),
                    "layers": [],
                    "video_layer_mode": "ONE_SPATIAL_LAYER_PER_STREAM",
                    "sdp_cid": "",
                }
            ],
            "stereo": False,
            "disable_red": False,
            "encryption": "NONE",
            "stream": "camera",
            "version": {"unix_micro": str(int(now * 1_000_000)), "ticks": 0},
            "audio_features": [],
            "backup_codec_policy": "SIMULCAST",
            "packet_trailer_features": [],
        }


def _participant_info(session: Session | None) -> Json:
    if session is None:
        return {}
    return {
        "sid": session.sid,
        "identity": session.identity,
        "state": session.state.value,
        "tracks": list(session.tracks.values()),
        "metadata": "",
        "joined_at": str(int(session.joined_at)),
        "joined_at_ms": str(int(session.joined_at * 1000)),
        "name": session.name,
        "version": session.version,
        "permission": {
            "can_subscribe": True,
            "can_publish": True,
            "can_publish_data": True,
            "can_publish_sources": [],
            "hidden": False,
            "recorder": False,
            "can_update_metadata": False,
            "agent": False,
            "can_subscribe_metrics": False,
            "can_manage_agent_session": False,
        },
        "region": "",
        "is_publisher": bool(session.tracks),
        "kind": "STANDARD",
        "attributes": {},
        "disconnect_reason": "UNKNOWN_REASON",
        "kind_details": [],
        "data_tracks": [],
        "client_protocol": 0 if session.bare else 2,
        "capabilities": [] if session.bare else ["CAP_PACKET_TRAILER", "CAP_COMPRESSION_DEFLATE_RAW"],
    }


def _listed(room: Room) -> Iterator[Session]:
    for session in room.sessions.values():
        if not session.unlisted:
            yield session
    for identity, ghost in room.ghosts.items():
        if identity not in room.sessions:
            yield ghost


def _is_admin(request: Mapping[str, Any], grants: Mapping[str, Any]) -> bool:
    return bool(grants.get("roomAdmin") and grants.get("room") and grants["room"] == request.get("room"))


def _twirp_error(status: int, code: str, message: str) -> Answer:
    return json_answer(status, {"code": code, "msg": message})


def bad_route(message: str, route: str) -> Answer:
    """Twirp's answer where no method is reached: 404 too, but not `not_found`."""
    return json_answer(404, {"code": "bad_route", "msg": message, "meta": {"twirp_invalid_route": route}})


_MALFORMED = _twirp_error(400, "malformed", "the json request could not be decoded")
_DENIED = _twirp_error(401, "unauthenticated", "permissions denied")
_NO_ROOM = _twirp_error(404, "not_found", "twirp error unknown: requested room does not exist")
_NO_PARTICIPANT = _twirp_error(404, "not_found", "twirp error unknown: participant does not exist")


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


def _is_default(name: str, value: Any) -> bool:
    if value is None or value is False or value in ("", [], {}):
        return True
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 0
    return bool((name in _INT64 and value == "0") or _ENUM_DEFAULTS.get(name) == value)


def webhook_form(message: Json) -> Json:
    """RoomService's dialect (snake_case, defaults written out) turned into the webhooks' (camelCase, defaults left out)."""
    form: Json = {}
    for name, value in message.items():
        if _is_default(name, value):
            continue
        if isinstance(value, dict):
            value = webhook_form(value)  # noqa: PLW2901 - the same thing in the other dialect
        elif isinstance(value, list):
            value = [webhook_form(item) if isinstance(item, dict) else item for item in value]  # noqa: PLW2901
        form[_camel(name)] = value.value if isinstance(value, StrEnum) else value
    return form
