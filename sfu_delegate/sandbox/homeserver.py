"""A model of a Matrix homeserver: delayed events (MSC4140) that really run out, OpenID tokens, what it does for an application service (MSC4502,
MSC4512), its answers, its rate limit, and what can go wrong.

No I/O and no clock: `now` (Unix seconds) is an argument, randomness comes from a seed. `request` takes a whole HTTP request and returns the answer;
`receive` takes one that somebody else has to answer, and `relay` what that one said. The other methods are for whoever drives the model. Call
`tick(now)` at `next_event()`, or later: events fire with the time of their own deadline.
Answers are those measured with Synapse 1.163 (`mode` "synapse") or those of the proposal's text ("proposal").
"""

import heapq
import json
import math
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple
from urllib.parse import unquote

from .answer import Answer, Fate, Impossible, json_answer, no_answer, text_answer

Json = dict[str, Any]

UNSTABLE = "/_matrix/client/unstable/org.matrix.msc4140/"
STABLE = "/_matrix/client/v1/"
V3 = "/_matrix/client/v3/"
USERINFO = "/_matrix/federation/v1/openid/userinfo"
MSC4502 = "/_matrix/client/unstable/io.element.msc4502/"
FED_PROXY = "/_matrix/client/unstable/io.element.msc4512/appservice/fed_proxy"
MEMBER = "m.room.member"
METHODS = ("GET", "PUT", "POST", "DELETE")  # that pass through a proxy of MSC4512
ACTIONS = ("restart", "send", "cancel")
HELD_BACK = 0.5  # seconds by which Synapse holds back a 429
OPENID_VALIDITY = 3600  # seconds that an OpenID token of Synapse's is good for

_LETTERS = string.ascii_letters
_SERVER = r"(?:[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*|\[[0-9A-Fa-f:.]+\])(?::\d+)?"
_SERVER_NAME = re.compile(_SERVER)
_USER_ID = re.compile(f"@[^:]*:{_SERVER}")
_ROOM_ID = re.compile(f"!(?:[^:]*:{_SERVER}|[0-9A-Za-z_-]{{43}})")
_IS_JOINED = re.compile(re.escape(MSC4502) + "rooms/([^/]*)/is_joined")
_PROXIED = re.compile(r"/_matrix/(client|federation)/(?:unstable/[^/]+|v[^/]+)/rtc/livekit(?:/.*)?")
_KINDS = {
    "/_matrix/client/versions": "versions",
    "/.well-known/matrix/client": "well_known",
    V3 + "account/whoami": "whoami",
    V3 + "capabilities": "capabilities",
    USERINFO: "openid_userinfo",
    FED_PROXY: "fed_proxy",
}


class Mode(StrEnum):
    """Whose answers are given about an event that is over."""

    SYNAPSE = "synapse"  # it is forgotten: 404
    PROPOSAL = "proposal"  # idempotent: 200, or 409 for what contradicts its end


class End(StrEnum):
    """How a delayed event ended. PENDING as long as it has not."""

    PENDING = ""
    SENT = "sent"  # by a management request
    RAN_OUT = "ran_out"  # its countdown ended
    CANCELLED = "cancelled"  # by a management request, or by another user's newer state event
    DROPPED = "dropped"  # it was to be sent, and was not allowed to


@dataclass(slots=True)
class DelayedEvent:
    """One delayed event, and the log of what happened to it."""

    delay_id: str = field(repr=False)
    user: str
    room: str
    type: str
    state_key: str | None
    content: Json
    delay: float  # seconds
    scheduled_at: float
    since: float  # the countdown began, or began anew
    restarted_at: list[float] = field(default_factory=list)
    end: End = End.PENDING
    ended_at: float | None = None
    ended_by: str = ""  # who asked: an IP address, a user, or "timer"

    @property
    def deadline(self) -> float:
        """When it fires by itself."""
        return self.since + self.delay


class StateEvent(NamedTuple):
    """A room's current state for one (type, state_key)."""

    content: Json
    sender: str
    at: float
    delay_id: str = ""  # of the delayed event that it came from


class NewState(NamedTuple):
    """A state event in the moment in which it becomes a room's current state."""

    room: str
    type: str
    state_key: str
    event: StateEvent


class RateLimit(NamedTuple):
    """Synapse's `rc_delayed_event_mgmt`. Its defaults are 1 a second and a burst of 5."""

    per_second: float = 1.0
    burst: float = 5.0


class _Bucket(NamedTuple):
    level: float
    at: float


class Token(NamedTuple):
    """What a bearer token may do."""

    user: str
    delay_ids: frozenset[str] | None = None  # a scoped token: manages these delayed events and nothing else


class Service(NamedTuple):
    """What an `as_token` may do: its application service's registration."""

    users: re.Pattern[str]  # its namespace; as with Synapse, a match of the beginning is enough
    scopes: bool  # it may ask who is joined
    rate_limited: bool


class FedCall(NamedTuple):
    """What an application service had another server asked: a request to `fed_proxy` that was allowed."""

    at: float
    destination: str
    method: str
    path: str
    query: dict[str, str]
    body: Json | None


class Errand(NamedTuple):
    """A request that the homeserver has allowed, and that somebody else has to answer."""

    kind: str
    hit: bool  # by the faults
    asker: Mapping[str, str] = {}  # for the application service: the header that says who asks
    call: FedCall | None = None  # for another server; None: for the application service behind the proxy


@dataclass(slots=True)
class HomeserverFaults:
    """What is wrong. All may be changed while running; `probability` and `only` hold for all but `forbid_send`, `owner_limited` and the form of
    `Retry-After`.

    A slow request is carried out when it arrives, and answered late.
    """

    down: bool = False  # nobody listens; countdowns go on
    hang: bool = False  # not carried out, no answer ever
    close: bool = False  # not carried out, the connection is closed
    done_but_not_told: bool = False  # carried out, then the connection is closed
    done_and_hangs: bool = False  # carried out, no answer ever
    status: int | None = None  # this status with a Matrix error
    html: int | None = None  # this status with a proxy's HTML page
    garbage: bool = False  # 200, and a body that is no JSON
    redirect: str | None = None  # 302 to this URL
    latency: dict[str, float] = field(default_factory=dict)  # seconds by kind of request; "*" for all others
    forbid_send: bool = False  # 403 M_FORBIDDEN on send; what runs out is dropped
    owner_limited: bool = False  # 429 on send, by the limit that the event's owner has for messages; as with Synapse the event is dropped
    retry_after: str | None = None  # the header of a 429 in place of the true one; "" leaves it out
    retry_after_ms: Any = None  # the same for the body; "" leaves it out
    probability: float = 1.0  # of each request to be hit
    only: frozenset[str] | None = None
    """Kinds of request: an action, "versions", "whoami", "well_known", "capabilities", "read", "room", "openid_token" (a client asks for one),
    "openid_userinfo" (somebody asks whose it is), "is_joined", "fed_proxy", "proxied" (what an application service answers)."""


class MatrixError(Exception):
    """An error answer of the client-server API."""

    def __init__(self, status: int, errcode: str, error: str, **more: Any) -> None:
        super().__init__(f"{status} {errcode}: {error}")
        self.status = status
        self.errcode = errcode
        self.error = error
        self.more = more

    def answer(self) -> Answer:
        """As an HTTP answer."""
        return json_answer(self.status, {"errcode": self.errcode, "error": self.error, **self.more})


_UNRECOGNIZED = MatrixError(404, "M_UNRECOGNIZED", "Unrecognized request")
_GONE = MatrixError(404, "M_NOT_FOUND", "Delayed event not found")
_MISSING_TOKEN = MatrixError(401, "M_MISSING_TOKEN", "Missing access token")
_NO_SUCH_METHOD = MatrixError(405, "M_UNRECOGNIZED", "Unrecognized request")
_FAILED = MatrixError(500, "M_UNKNOWN", "Internal server error")


class HomeserverModel:
    """The homeserver.

    `generations` says which forms of the management API it has: any of `A` (the original text), `B` (unstable, action in the body), `C`
    (unstable, action in the path), `D` (stable). Synapse 1.163 has B and C. `limit` None means that nobody is limited. Both, and `mode`, may
    be changed while running. `on_state` sees every state event in the moment in which it becomes current, whoever sent it.

    Who is joined is said by `join` and `leave`, or by `m.room.member` events. Where it was never said, everybody may send, and nobody is joined.
    A delayed event may be scheduled by anybody, as with Synapse: whether it may be sent is asked when it is to be.
    `remotes` are the other servers, for `fed_proxy`: each is called with the path and the body ({} for none), and returns its status and its
    JSON (None for what is not JSON). `fed_calls` has all that was allowed.
    """

    # Of the class, since reading an object's attributes takes longer when there are more than 29 (CPython 3.11).
    b_needs_token = False  # as some servers with generation B have it
    unrecognized_status = 404  # 405 for servers that know the path and not the method
    unstable_features: Json | None = None  # what `versions` claims, where it is not to match `generations`
    openid_sub: str | None = None  # a server that lies: every OpenID token, also one that it never issued, is this user's

    def __init__(
        self,
        server_name: str = "hs.test",
        *,
        seed: int = 0,
        generations: str = "BC",
        mode: Mode | str = Mode.SYNAPSE,
        limit: RateLimit | None = RateLimit(),  # noqa: B008 - immutable
        max_delay_ms: int = 24 * 3_600_000,
        max_scheduled: int = 100,
        base_url: str = "",
        msc4502: bool = True,
        msc4512: bool = True,
        on_state: Callable[[NewState], None] | None = None,
    ) -> None:
        self.server_name = server_name
        self.generations = generations
        self.mode = Mode(mode)
        self.limit = limit
        self.max_delay_ms = max_delay_ms
        self.max_scheduled = max_scheduled
        self.base_url = base_url
        self.msc4502 = msc4502  # an application service may ask who is joined
        self.msc4512 = msc4512  # it is asked by clients and other servers, and may ask other servers
        self.on_state = on_state
        self.faults = HomeserverFaults()
        self.events: dict[str, DelayedEvent] = {}  # by delay_id, the finished ones too: the log
        self.state: dict[str, dict[tuple[str, str], StateEvent]] = {}  # by room
        self.timeline: dict[str, list[tuple[float, str, str, Json]]] = {}  # by room: (at, sender, type, content) of events that are no state
        self.answers: Counter[tuple[str, int]] = Counter()  # by kind of request and status; 0: no answer
        self.remotes: dict[str, Callable[[str, Json], tuple[int, Json | None]]] = {}  # by server name
        self.fed_calls: list[FedCall] = []
        self._joined: dict[str, set[str]] = {}  # by room, where membership was ever said
        self._pending: dict[str, dict[str, DelayedEvent]] = {}  # by user and delay_id
        self._pending_state: dict[tuple[str, str, str | None], dict[str, DelayedEvent]] = {}  # by what it would set, and delay_id
        self._tokens: dict[str, Token] = {}
        self._openid: dict[str, tuple[str, float]] = {}  # by OpenID token: its user, and until when it is good
        self._services: dict[str, Service] = {}  # by as_token
        self._buckets: dict[str, _Bucket] = {}
        self._random = random.Random(seed)
        self._timers: list[tuple[float, str]] = []

    def register(self, name: str) -> str:
        """A user (`@name:server` or just the name) gets a new access token."""
        user = name if name.startswith("@") else f"@{name}:{self.server_name}"
        return self._token("syt_", Token(user))

    def scoped_token(self, user: str, *delay_ids: str) -> str:
        """A token that manages these delayed events and is good for nothing else."""
        return self._token("scoped_", Token(user, frozenset(delay_ids)))

    def application_service(self, *, rate_limited: bool = False, scopes: bool = True, users: str | None = None, token: str | None = None) -> str:
        """An `as_token`, which acts by `?user_id=` for any user of this server in its namespace: a new one, or `token`, that of a registration.

        `users` is the namespace's regular expression, by default that of this server's users. `scopes`: the service has the scope of MSC4502.
        """
        token = token or "as_" + self._letters(32)
        namespace = re.compile(f"@.*:{re.escape(self.server_name)}" if users is None else users)
        self._services[token] = Service(namespace, scopes, rate_limited)
        return token

    def openid_token(self, user: str, now: float) -> Json:
        """A new OpenID token of this user: what `POST …/openid/request_token` answers. It vouches for the user and opens nothing here."""
        token = self._letters(24)
        self._openid[token] = (user, now + OPENID_VALIDITY)
        return {"access_token": token, "token_type": "Bearer", "matrix_server_name": self.server_name, "expires_in": OPENID_VALIDITY}

    def user_of(self, token: str) -> str:
        """Whose access token this is. Raises Impossible."""
        if token not in self._tokens:
            raise Impossible("no such token")
        return self._tokens[token].user

    def join(self, user: str, room: str, now: float) -> None:
        """This user, of whatever server, joins. From now on only who is joined may send to this room."""
        self.put_state(user, room, MEMBER, user, {"membership": "join"}, now)

    def leave(self, user: str, room: str, now: float) -> None:
        """This user leaves, or is removed: what a ban does, too. Delayed events stay, and are not allowed to be sent."""
        self.put_state(user, room, MEMBER, user, {"membership": "leave"}, now)

    def is_joined(self, user: str, room: str) -> bool:
        """Whether this user is joined; nobody is where membership was never said."""
        return user in self._joined.get(room, ())

    def put_state(self, user: str, room: str, type_: str, state_key: str, content: Json, now: float) -> None:
        """A state event by this user. As with Synapse it cancels pending delayed events of *other* users for the same state, not the user's own.

        Raises MatrixError for a user who is not joined; who may change memberships is not looked at.
        """
        self.tick(now)
        if type_ != MEMBER:
            self._check_joined(user, room)
        for event in list(self._pending_state.get((room, type_, state_key), {}).values()):
            if event.user != user:
                self._end(event, End.CANCELLED, now, user)
        self._set_state(room, type_, state_key, StateEvent(content, user, now))

    def schedule(self, user: str, room: str, type_: str, state_key: str | None, delay_ms: int, content: Json, now: float) -> str:
        """Schedule a delayed event, a state event if it has a state key. Returns its delay_id. Raises MatrixError."""
        self.tick(now)
        if not self.generations:
            raise MatrixError(403, "M_FORBIDDEN", "Sending delayed events has been disallowed")
        if delay_ms < 0:
            raise MatrixError(400, "M_INVALID_PARAM", "The delay must not be negative")
        if delay_ms > self.max_delay_ms:
            text = f"The requested delay ({delay_ms}ms) exceeds the allowed maximum ({self.max_delay_ms}ms)"
            raise MatrixError(400, "ORG.MATRIX.MSC4140_DELAY_TOO_LARGE", text)
        if len(self._pending.get(user, ())) >= self.max_scheduled:
            raise MatrixError(429, "M_LIMIT_EXCEEDED", "Too many delayed events", retry_after_ms=1000)
        event = DelayedEvent("syd_" + self._letters(20), user, room, type_, state_key, content, delay_ms / 1000, now, now)
        self.events[event.delay_id] = event
        self._pending.setdefault(user, {})[event.delay_id] = event
        self._pending_state.setdefault((room, type_, state_key), {})[event.delay_id] = event
        heapq.heappush(self._timers, (event.deadline, event.delay_id))
        return event.delay_id

    def manage(self, delay_id: str, action: str, now: float, by: str = "") -> None:
        """Restart, send or cancel. `by` goes into the log. Raises MatrixError for what is not 200."""
        self.tick(now)
        event = self.events.get(delay_id)
        if event is None or (event.end is not End.PENDING and self.mode is Mode.SYNAPSE):
            raise _GONE
        if event.end is not End.PENDING:
            wanted = {"send": (End.SENT, End.RAN_OUT), "cancel": (End.CANCELLED,)}.get(action, ())
            if event.end in wanted:
                return
            raise MatrixError(409, "M_UNKNOWN", "The delayed event has already been ended")
        if action == "restart":
            event.since = now
            event.restarted_at.append(now)
        elif action == "cancel":
            self._end(event, End.CANCELLED, now, by)
        elif self.faults.forbid_send or (event.room in self._joined and self._has_left(event)):
            if self.mode is Mode.SYNAPSE:
                self._end(event, End.DROPPED, now, by)
            self._check_joined(event.user, event.room)
            raise MatrixError(403, "M_FORBIDDEN", "You don't have permission to post that to the room.")
        elif self.faults.owner_limited:
            self._end(event, End.DROPPED, now, by)
            raise MatrixError(429, "M_LIMIT_EXCEEDED", "Too Many Requests", held=5.0)
        else:
            self._deliver(event, End.SENT, now, by)

    def next_event(self) -> float | None:
        """When the next delayed event runs out; None when nothing is pending."""
        while self._timers:
            at, delay_id = self._timers[0]
            event = self.events[delay_id]
            if event.end is End.PENDING and event.deadline == at:
                return at
            heapq.heappop(self._timers)
            if event.end is End.PENDING:
                heapq.heappush(self._timers, (event.deadline, delay_id))
        return None

    def tick(self, now: float) -> None:
        """Fire what has run out by now, in order, each at its deadline."""
        while (at := self.next_event()) is not None and at <= now:
            event = self.events[heapq.heappop(self._timers)[1]]
            if self.faults.forbid_send or (event.room in self._joined and self._has_left(event)):
                self._end(event, End.DROPPED, at, "timer")
            else:
                self._deliver(event, End.RAN_OUT, at, "timer")

    def request(
        self,
        method: str,
        path: str,
        now: float,
        *,
        query: Mapping[str, str] | None = None,
        token: str | None = None,
        body: bytes = b"",
        ip: str = "127.0.0.1",
    ) -> Answer:
        """One HTTP request. `path` as it came, still percent-encoded; `token` without `Bearer`."""
        self.tick(now)
        kind = _kind(method, path, body)
        hit = self._hit(kind)
        answer = self._unheard(hit) or self._heard(hit, method, path, query or {}, token, body, ip, now)
        return self._given(kind, hit, answer)

    def receive(
        self,
        method: str,
        path: str,
        now: float,
        *,
        query: Mapping[str, str] | None = None,
        token: str | None = None,
        body: bytes = b"",
        origin: str | None = None,
    ) -> Answer | Errand:
        """One HTTP request that somebody else has to answer, if the homeserver allows it: `is_proxied(path)`, or `FED_PROXY`.

        An errand is the caller's to run, and to bring to `relay`. `origin` is the server that asks, of a request to the federation API.
        """
        self.tick(now)
        kind = _kind(method, path, body)
        hit = self._hit(kind)
        answer = self._unheard(hit)
        if answer is None:
            try:
                return self._errand(kind, hit, method, path, query or {}, token, body, origin, now)
            except MatrixError as error:
                answer = error.answer()
        return self._given(kind, hit, answer)

    def relay(self, errand: Errand, answer: Answer | None) -> Answer:
        """What the homeserver answers after an errand. `answer` is that of whoever was asked; None: could not be reached, or said nothing in time."""
        told = _answer_of_server(answer) if errand.call is not None else answer or _FAILED.answer()
        return self._given(errand.kind, errand.hit, self._on_its_way(errand.hit, told))

    def _hit(self, kind: str) -> bool:
        faults = self.faults
        return (faults.only is None or kind in faults.only) and (faults.probability >= 1 or self._random.random() < faults.probability)

    def _given(self, kind: str, hit: bool, answer: Answer) -> Answer:
        if hit:
            latency = self.faults.latency
            answer = answer._replace(delay=answer.delay + latency.get(kind, latency.get("*", 0.0)))
        self.answers[kind, answer.status] += 1
        return answer

    def _on_its_way(self, hit: bool, answer: Answer) -> Answer:
        """The answer to what was carried out, unless a fault takes it."""
        if hit and (self.faults.done_but_not_told or self.faults.done_and_hangs):
            return no_answer(Fate.CLOSE if self.faults.done_but_not_told else Fate.HANG, answer.delay)
        return answer

    def _unheard(self, hit: bool) -> Answer | None:
        """The answer of a fault that keeps the request from being carried out."""
        faults = self.faults
        if not hit:
            return None
        if faults.down:
            return no_answer(Fate.REFUSE)
        if faults.hang:
            return no_answer(Fate.HANG)
        if faults.close:
            return no_answer(Fate.CLOSE)
        if faults.redirect is not None:
            return Answer(302, {"Location": faults.redirect}, b"")
        if faults.html is not None:
            return text_answer(faults.html, f"<html><head><title>{faults.html}</title></head><body>proxy</body></html>", "text/html")
        if faults.garbage:
            return Answer(200, {"Content-Type": "application/json"}, b'{"\xff\x00 this is not')
        if faults.status is not None:
            return MatrixError(faults.status, "M_UNKNOWN", "Internal server error").answer()
        return None

    def _heard(self, hit: bool, method: str, path: str, query: Mapping[str, str], token: str | None, body: bytes, ip: str, now: float) -> Answer:
        try:
            answer = self._route(method, path, query, token, body, ip, now)
        except MatrixError as error:
            answer = self._limited(error) if "held" in error.more else error.answer()
        return self._on_its_way(hit, answer)

    def _limited(self, error: MatrixError) -> Answer:
        seconds = float(error.more["held"])
        header: str | None = str(math.ceil(seconds))
        told: Any = math.floor(seconds * 1000)
        if self.faults.retry_after is not None:
            header = self.faults.retry_after or None
        if self.faults.retry_after_ms is not None:
            told = self.faults.retry_after_ms
        content = {"errcode": error.errcode, "error": error.error} | ({} if told == "" else {"retry_after_ms": told})
        return json_answer(429, content, {"Retry-After": header} if header else None, HELD_BACK)

    def _route(self, method: str, path: str, query: Mapping[str, str], token: str | None, body: bytes, ip: str, now: float) -> Answer:
        match method, path:
            case "GET", "/_matrix/client/versions":
                return json_answer(200, self._versions())
            case "GET", "/.well-known/matrix/client":
                return json_answer(200, {"m.homeserver": {"base_url": self.base_url}})
            case "GET", "/_matrix/client/v3/account/whoami":
                device = {} if token in self._services else {"device_id": "SANDBOX"}
                return json_answer(200, {"user_id": self._user(token, query), "is_guest": False, **device})
            case "GET", "/_matrix/client/v3/capabilities":
                self._user(token, query)
                limits = {"max_delay_ms": self.max_delay_ms, "max_scheduled": self.max_scheduled}
                return json_answer(200, {"capabilities": {"org.matrix.msc4140.delayed_events": limits} if self.generations else {}})
        if (method, path) == ("GET", USERINFO):
            return json_answer(200, {"sub": self._vouched_for(query.get("access_token"), now)})
        if method == "POST" and (user := _openid_user(path)) is not None:
            return self._issue_openid(user, query, token, body, now)
        if path.startswith(V3 + "rooms/"):
            return self._room_request(method, [unquote(part) for part in path[len(V3 + "rooms/") :].split("/")], query, token, body, now)
        for prefix in (UNSTABLE, STABLE):
            if path == prefix + "delayed_events" or path.startswith(prefix + "delayed_events/"):
                parts = [unquote(part) for part in path[len(prefix) :].split("/")][1:]
                if method == "GET" and len(parts) < 2:
                    return self._read(prefix, parts, query, token, now)
                return self._management(prefix, method, parts, query, token, body, ip, now)
        if self.msc4502 and (found := _IS_JOINED.fullmatch(path)) is not None:
            return self._membership(method, unquote(found[1]), query, token)
        if path == FED_PROXY:
            call = self._fed_call(method, query, token, body, now)
            remote = self.remotes.get(call.destination)
            return _answer_of_server(None if remote is None else json_answer(*remote(call.path, call.body or {})))
        raise self._no_such_endpoint()

    def _errand(
        self, kind: str, hit: bool, method: str, path: str, query: Mapping[str, str], token: str | None, body: bytes, origin: str | None, now: float
    ) -> Errand:
        if path == FED_PROXY:
            return Errand(kind, hit, call=self._fed_call(method, query, token, body, now))
        found = _PROXIED.fullmatch(path)
        if found is None or not self.msc4512:
            raise self._no_such_endpoint()
        if method not in METHODS:
            raise _NO_SUCH_METHOD
        if found[1] == "client":
            asker = {"X-Matrix-User-Identifier": self._user(token, query)}
        else:
            asker = {"X-Matrix-Origin": _checked_origin(method, body, origin)}
        if _has_dots(path):
            raise MatrixError(400, "M_INVALID_PARAM", "Request path is not allowed")
        return Errand(kind, hit, asker)

    def _membership(self, method: str, room: str, query: Mapping[str, str], token: str | None) -> Answer:
        """MSC4502: whether a user, or anybody of a server, is joined."""
        if method != "GET":
            raise _NO_SUCH_METHOD
        self._user(token, query)
        service = self._services.get(token) if token is not None else None
        if service is None or not service.scopes:
            raise MatrixError(403, "M_FORBIDDEN", "Missing Scopes.QUERY_ROOM_MEMBERSHIP scope")
        if _ROOM_ID.fullmatch(room) is None:
            raise MatrixError(400, "M_INVALID_PARAM", "Invalid room ID")
        match query.get("mxid"), query.get("server_name"):
            case str(user), None:
                if _USER_ID.fullmatch(user) is None:
                    raise MatrixError(400, "M_INVALID_PARAM", f"Invalid MXID: {user}")
                return json_answer(200, {"joined": self.is_joined(user, room)})
            case None, str(server):
                if _SERVER_NAME.fullmatch(server) is None:
                    raise MatrixError(400, "M_INVALID_PARAM", f"Invalid server name: {server}")
                return json_answer(200, {"joined": any(user.split(":", 1)[1] == server for user in self._joined.get(room, ()))})
        raise MatrixError(400, "M_MISSING_PARAM", "Exactly one of 'mxid' or 'server_name' query parameters must be given")

    def _fed_call(self, method: str, query: Mapping[str, str], token: str | None, body: bytes, now: float) -> FedCall:
        """MSC4512: what an application service wants another server to be asked, if it may."""
        if not self.msc4512:
            raise self._no_such_endpoint()
        if method != "POST":
            raise _NO_SUCH_METHOD
        self._user(token, query)
        if token not in self._services:
            raise MatrixError(403, "M_FORBIDDEN", "Only application services can use this endpoint")
        call = _read_fed_call(_json_body(body), now)
        if call.destination == self.server_name:
            raise _fed_proxy_error(403, "DESTINATION_DENIED", "Cannot target this homeserver itself")
        self.fed_calls.append(call)
        return call

    def _no_such_endpoint(self) -> MatrixError:
        return MatrixError(self.unrecognized_status, _UNRECOGNIZED.errcode, _UNRECOGNIZED.error)

    def _versions(self) -> Json:
        features = self.unstable_features
        if features is None:
            unstable, stable = set("ABC") & set(self.generations), set("AD") & set(self.generations)
            features = {"org.matrix.msc4140": bool(unstable), "org.matrix.msc4140.stable": bool(stable)}
        return {"versions": ["v1.1", "v1.5", "v1.11", "v1.12"], "unstable_features": features}

    def _management(
        self, prefix: str, method: str, parts: list[str], query: Mapping[str, str], token: str | None, body: bytes, ip: str, now: float
    ) -> Answer:
        in_body, in_path = ("A", "D") if prefix == STABLE else ("B", "C")
        generation = {1: in_body, 2: in_path}.get(len(parts), "")
        if not generation or generation not in self.generations or (generation == in_path and parts[1] not in ACTIONS):
            raise self._no_such_endpoint()
        if method != "POST":
            raise _NO_SUCH_METHOD
        if generation == in_body:
            if token is None and (generation == "A" or self.b_needs_token):
                raise _MISSING_TOKEN
            action = _json_body(body).get("action")
            if action is None:
                raise MatrixError(400, "M_MISSING_PARAM", "'action' is missing")
            if action not in ACTIONS:
                raise MatrixError(400, "M_INVALID_PARAM", "'action' is not one of 'cancel', 'restart', 'send'")
        else:
            action = parts[1]
        actor = self._charge(token, query, ip, now)
        scope = self._tokens[token].delay_ids if token in self._tokens else None
        if scope is not None and parts[0] not in scope:
            raise MatrixError(403, "M_FORBIDDEN", "The token does not allow this")
        event = self.events.get(parts[0])
        if generation == "A" and scope is None and event is not None and event.user != actor:
            raise _GONE
        self.manage(parts[0], str(action), now, actor)
        return json_answer(200, {})

    def _read(self, prefix: str, parts: list[str], query: Mapping[str, str], token: str | None, now: float) -> Answer:
        if len(parts) > 1 or not (set("AD") if prefix == STABLE else set("ABC")) & set(self.generations):
            raise self._no_such_endpoint()
        user = self._user(token, query)
        self._charge(token, query, "", now)
        mine = self._pending.get(user, {})
        if not parts:
            return json_answer(200, {"delayed_events": [_form(event, both_spellings=True) for event in mine.values()]})
        if parts[0] not in mine:
            raise _GONE
        return json_answer(200, _form(mine[parts[0]]))

    def _issue_openid(self, user: str, query: Mapping[str, str], token: str | None, body: bytes, now: float) -> Answer:
        if user != self._user(token, query):
            raise MatrixError(403, "M_FORBIDDEN", "Cannot request tokens for other users.")
        _json_body(body)
        return json_answer(200, self.openid_token(user, now))

    def _vouched_for(self, token: str | None, now: float) -> str:
        """Whose OpenID token it is, or is said to be."""
        if token is None:
            raise MatrixError(401, "M_MISSING_TOKEN", "Access Token required")
        if self.openid_sub is not None:
            return self.openid_sub
        user, until = self._openid.get(token, ("", 0.0))
        if now > until:
            raise MatrixError(401, "M_UNKNOWN_TOKEN", "Access Token unknown or expired")
        return user

    def _room_request(self, method: str, parts: list[str], query: Mapping[str, str], token: str | None, body: bytes, now: float) -> Answer:
        user = self._user(token, query)
        match method, parts:
            case "GET", [room, "state"]:
                return json_answer(200, [_state_form(*key, event) for key, event in self.state.get(room, {}).items()])
            case "GET", [room, "state", type_, *rest] if len(rest) <= 1:
                found = self.state.get(room, {}).get((type_, rest[0] if rest else ""))
                if found is None:
                    raise MatrixError(404, "M_NOT_FOUND", "Event not found.")
                return json_answer(200, found.content)
            case "PUT", [room, "state", type_, *rest] if len(rest) <= 1:
                return self._put(user, room, type_, rest[0] if rest else "", query, body, now)
            case "PUT", [room, "send", type_, _]:
                return self._put(user, room, type_, None, query, body, now)
        raise self._no_such_endpoint()

    def _put(self, user: str, room: str, type_: str, state_key: str | None, query: Mapping[str, str], body: bytes, now: float) -> Answer:
        content = _json_body(body)
        delay = query.get("org.matrix.msc4140.delay")
        if delay is not None:
            try:
                delay_ms = int(delay)
            except ValueError as error:
                raise MatrixError(400, "M_INVALID_PARAM", "Query parameter 'org.matrix.msc4140.delay' must be an integer") from error
            return json_answer(200, {"delay_id": self.schedule(user, room, type_, state_key, delay_ms, content, now)})
        if state_key is None:
            self._check_joined(user, room)
            self.timeline.setdefault(room, []).append((now, user, type_, content))
        else:
            self.put_state(user, room, type_, state_key, content, now)
        return json_answer(200, {"event_id": "$" + self._letters(43)})

    def _user(self, token: str | None, query: Mapping[str, str]) -> str:
        """Who asks. A scoped token is nobody here."""
        if token is None:
            raise _MISSING_TOKEN
        service = self._services.get(token)
        if service is not None:
            return self._asserted(service, query)
        known = self._tokens.get(token)
        if known is None or known.delay_ids is not None:
            raise MatrixError(401, "M_UNKNOWN_TOKEN", "Invalid access token passed.", soft_logout=False)
        return known.user

    def _asserted(self, service: Service, query: Mapping[str, str]) -> str:
        """For whom an application service asks: itself, or a user of this server in its namespace."""
        user = query.get("user_id")
        if user is not None and service.users.match(user) is not None:
            if user.endswith(f":{self.server_name}"):
                return user
            raise MatrixError(403, "M_FORBIDDEN", f"Application service has not registered this user ({user})")
        sender = f"@sandbox-service:{self.server_name}"
        if user is not None and user != sender:
            raise MatrixError(403, "M_FORBIDDEN", f"Application service cannot masquerade as this user ({user}).")
        return sender

    def _charge(self, token: str | None, query: Mapping[str, str], ip: str, now: float) -> str:
        """Take one action from the bucket of the user, or without a token of the address; returns which. Refused ones do not fill it."""
        scoped = self._tokens.get(token) if token is not None else None
        key = ip if token is None else scoped.user if scoped is not None else self._user(token, query)
        service = self._services.get(token) if token is not None else None
        if self.limit is None or (service is not None and not service.rate_limited):
            return key
        level, at = self._buckets.get(key, _Bucket(0.0, now))
        level = max(0.0, level - max(0.0, now - at) * self.limit.per_second)
        over = level + 1 - self.limit.burst
        if over > 1e-9:
            self._buckets[key] = _Bucket(level, now)
            wait = over / self.limit.per_second if self.limit.per_second > 0 else 3600.0
            raise MatrixError(429, "M_LIMIT_EXCEEDED", "Too Many Requests", held=wait)
        self._buckets[key] = _Bucket(level + 1, now)
        return key

    def _letters(self, length: int) -> str:
        return "".join(self._random.choices(_LETTERS, k=length))

    def _token(self, prefix: str, what: Token) -> str:
        token = prefix + self._letters(24)
        self._tokens[token] = what
        return token

    def _end(self, event: DelayedEvent, end: End, at: float, by: str) -> None:
        event.end, event.ended_at, event.ended_by = end, at, by
        del self._pending[event.user][event.delay_id]
        del self._pending_state[event.room, event.type, event.state_key][event.delay_id]

    def _deliver(self, event: DelayedEvent, end: End, at: float, by: str) -> None:
        self._end(event, end, at, by)
        if event.state_key is None:
            self.timeline.setdefault(event.room, []).append((at, event.user, event.type, event.content))
        else:
            self._set_state(event.room, event.type, event.state_key, StateEvent(event.content, event.user, at, event.delay_id))

    def _has_left(self, event: DelayedEvent) -> bool:
        """Whether its user may not send it, in a room where membership was said."""
        return event.type != MEMBER and event.user not in self._joined[event.room]

    def _check_joined(self, user: str, room: str) -> None:
        """Raises MatrixError for who may not send to this room."""
        joined = self._joined.get(room)
        if joined is not None and user not in joined:
            raise MatrixError(403, "M_FORBIDDEN", f"User {user} not in room {room}")

    def _set_state(self, room: str, type_: str, state_key: str, event: StateEvent) -> None:
        self.state.setdefault(room, {})[type_, state_key] = event
        if type_ == MEMBER:
            joined = self._joined.setdefault(room, set())
            if event.content.get("membership") == "join":
                joined.add(state_key)
            else:
                joined.discard(state_key)
        if self.on_state is not None:
            self.on_state(NewState(room, type_, state_key, event))


def _openid_user(path: str) -> str | None:
    """For whom a request with this path asks for an OpenID token; None for another path."""
    match path.removeprefix(V3).split("/"):
        case ["user", user, "openid", "request_token"]:
            return unquote(user)
    return None


def is_proxied(path: str) -> bool:
    """Whether requests with this path are for an application service (MSC4512), in the client-server or the federation API."""
    return _PROXIED.fullmatch(path) is not None


def _has_dots(path: str) -> bool:
    """Whether the path has a segment `.` or `..`, percent-encoded or not."""
    return not {".", ".."}.isdisjoint(unquote(path).split("/"))


def _checked_origin(method: str, body: bytes, origin: str | None) -> str:
    """The server that asks; the body of a request to the federation API has to be JSON first, for it is signed."""
    if method in ("PUT", "POST"):
        try:
            json.loads(body)
        except ValueError as error:
            raise MatrixError(400, "M_NOT_JSON", "Content not JSON.") from error
    if origin is None:
        raise MatrixError(401, "M_UNAUTHORIZED", "Missing Authorization headers")
    return origin


def _fed_proxy_error(status: int, what: str, error: str) -> MatrixError:
    return MatrixError(status, f"IO.ELEMENT.MSC4512.M_FEDPROXY_{what}", error)


def _read_fed_call(content: Json, now: float) -> FedCall:
    """The body of a request to `fed_proxy`, checked in Synapse's order. Raises MatrixError."""
    destination, method, path, body, query = (content.get(name) for name in ("destination", "method", "path", "body", "query"))
    if not isinstance(destination, str) or not destination:
        raise MatrixError(400, "M_MISSING_PARAM", "Missing or invalid destination")
    if method not in METHODS:
        raise MatrixError(400, "M_INVALID_PARAM", f"method must be one of {METHODS}")
    if not isinstance(path, str) or not path:
        raise MatrixError(400, "M_MISSING_PARAM", "Missing or invalid path")
    if body is not None and not isinstance(body, dict):
        raise MatrixError(400, "M_INVALID_PARAM", "body must be an object")
    if body is not None and method in ("GET", "DELETE"):
        raise MatrixError(400, "M_INVALID_PARAM", f"'body' is not supported for {method}")
    if query is not None and not isinstance(query, dict):
        raise MatrixError(400, "M_INVALID_PARAM", "query must be an object")
    if query is not None and not all(isinstance(value, str) for value in query.values()):
        raise MatrixError(400, "M_INVALID_PARAM", "'query' values must be strings")
    if _has_dots(path):
        raise _fed_proxy_error(403, "PATH_NOT_ALLOWED", "Path must not contain '.' or '..' segments")
    if "?" in path or "#" in path:
        raise _fed_proxy_error(403, "PATH_NOT_ALLOWED", "Path must not contain a query string or fragment")
    found = _PROXIED.fullmatch(path)
    if found is None or found[1] != "federation":
        raise _fed_proxy_error(403, "PATH_NOT_ALLOWED", "Path must be under /_matrix/federation/<version>/rtc/livekit")
    return FedCall(now, destination, method, path, query or {}, body)


def _answer_of_server(answer: Answer | None) -> Answer:
    """What `fed_proxy` tells of another server's answer: every success is 200, and one that is not JSON is as good as none."""
    content = None
    if answer is not None:
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.status >= 300:
            return json_answer(200, {"status": answer.status, "content": content})
    if answer is None or content is None or not answer.headers.get("Content-Type", "").startswith("application/json"):
        return _fed_proxy_error(502, "CONNECTION_FAILED", "Failed to send request: the server gave no answer, or none in JSON").answer()
    return json_answer(200, {"status": 200, "content": content})


def _kind(method: str, path: str, body: bytes) -> str:
    """What a request is, for faults, latencies and counts."""
    if path in _KINDS:
        return _KINDS[path]
    if _openid_user(path) is not None:
        return "openid_token"
    if path.startswith(V3 + "rooms/"):
        return "room"
    if "/delayed_events" not in path:
        return "is_joined" if _IS_JOINED.fullmatch(path) is not None else "proxied" if is_proxied(path) else "other"
    if method == "GET":
        return "read"
    last = path.rsplit("/", 1)[-1]
    if last in ACTIONS:
        return last
    try:
        return str(_json_body(body).get("action"))
    except MatrixError:
        return "other"


def _json_body(body: bytes) -> Json:
    try:
        content = json.loads(body)
    except ValueError as error:
        raise MatrixError(400, "M_NOT_JSON", "Content not JSON.") from error
    if not isinstance(content, dict):
        raise MatrixError(400, "M_BAD_JSON", "Content must be a JSON object.")
    return content


def _form(event: DelayedEvent, *, both_spellings: bool = False) -> Json:
    """As Synapse 1.163 answers: the list has the proposal's older names as well."""
    delay_ms, since = round(event.delay * 1000), round(event.since * 1000)
    form: Json = {"delay_id": event.delay_id, "room_id": event.room, "type": event.type}
    if event.state_key is not None:
        form["state_key"] = event.state_key
    form |= {"delay_ms": delay_ms, "delayed_since_ts": since, "content": event.content}
    return form | {"delay": delay_ms, "running_since": since} if both_spellings else form


def _state_form(type_: str, state_key: str, event: StateEvent) -> Json:
    return {
        "type": type_,
        "state_key": state_key,
        "sender": event.sender,
        "content": event.content,
        "origin_server_ts": round(event.at * 1000),
    }
