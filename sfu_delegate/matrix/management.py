"""Restart, send and cancel delayed events (MSC4140) at homeservers of every generation of that API.

Each call makes one attempt and says what is known of its result. When to try again is for the rules to decide; the only requests repeated
here are those that were certainly not carried out (the homeserver does not have the endpoint), and a restart whose pooled connection had
been closed.

What it must never do: send a token or a delay_id elsewhere than to its homeserver, or let one appear in an answer's detail.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

from pydantic_core import to_json

from sfu_delegate.delegation.model import Action, Verdict
from sfu_delegate.matrix.answers import DONE, Answer, Reply, is_usual, no_such_endpoint, read_reply, understand
from sfu_delegate.matrix.discovery import Homeserver
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.http import HttpFailed
from sfu_delegate.matrix.inflight import InFlight
from sfu_delegate.matrix.memory import keep

__all__ = ["Answer", "Generation", "ManagementClient", "Scope", "generations_offered"]

CHOICE_LASTS: Final = 3600.0  # seconds that a homeserver's generation is remembered
DELAYED_EVENTS_OFF: Final = "the homeserver has delayed events switched off (Synapse: set max_event_delay_duration)"
OFF_LASTS: Final = 10.0  # seconds that it is remembered that a homeserver has delayed events off, or lacks the endpoint that it announces
MAX_REMEMBERED: Final = 10_000  # homeservers; or events that were refused
MAX_REFUSED: Final = 4096  # bytes of one of these; what is larger is put at once, or never
LOOK_WITHIN: Final = 2.0  # seconds for a look at an event that is to be sent, and for a last try to put it
LEAST_WAIT: Final = 0.5  # seconds until an event is put again, where its owner's limit has refused it

# Versions of the specification that contain MSC4140: none is known. Once one does, it and all later ones belong here.
SPEC_VERSIONS_WITH_DELAYED_EVENTS: Final[frozenset[str]] = frozenset()

_UNSTABLE: Final = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/"
_STABLE: Final = "/_matrix/client/v1/delayed_events/"
_JSON: Final = {"Content-Type": "application/json"}
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")  # ids that need no quoting, as Synapse's
_TOKEN = re.compile(r"[!-~]+")
_DOT_SEGMENT = re.compile(r"(?:^|[/\\])\.{1,2}(?:$|[/\\])")
_ACTIONS: Final = {Action.RESTART: "restart", Action.SEND: "send", Action.CANCEL: "cancel"}
# Errors by which a homeserver says that it knows the token, or has not seen it: they do not show that it is none of a user.
_SAYS_NOTHING_OF_THE_TOKEN: Final = frozenset(
    {"M_MISSING_TOKEN", "M_USER_LOCKED", "M_USER_SUSPENDED", "M_USER_DEACTIVATED", "M_CONSENT_NOT_GIVEN", "M_RESOURCE_LIMIT_EXCEEDED"}
)


class Generation(Enum):
    """The four forms of the management API: where it is, and whether the action is in the path or in the body."""

    A = (_STABLE, False)  # the original text
    B = (_UNSTABLE, False)
    C = (_UNSTABLE, True)
    D = (_STABLE, True)

    def request(self, delay_id: str, action: Action) -> tuple[str, bytes]:
        """Path and body."""
        prefix, in_path = self._value_  # `value` takes longer than all the rest of this
        path = prefix + (delay_id if _PLAIN.fullmatch(delay_id) else quote(delay_id, safe=""))
        verb = _ACTIONS[action]
        return (f"{path}/{verb}", b"{}") if in_path else (path, b'{"action":"%s"}' % verb.encode())


class Scope(StrEnum):
    """What a token can do."""

    SCOPED = "scoped"  # not a user's access token
    FULL_ACCESS = "full_access"  # a user's access token: it can do everything
    UNKNOWN = "unknown"  # the homeserver could not be asked


@dataclass(slots=True)
class _Known:
    """What is remembered of a homeserver."""

    offered: tuple[Generation, ...]  # to be tried in this order; none: delayed events are off
    expires: float
    proved: dict[Action, Generation] = field(default_factory=dict)  # by an answer that only this endpoint gives
    lacking: dict[Action, float] = field(default_factory=dict)  # none of the offered is there; until when that is believed
    worked: bool = False  # a request of ours has proved once that delayed events can be managed there

    def proves(self, action: Action, generation: Generation) -> None:
        """An answer that only this endpoint gives."""
        self.proved[action] = generation
        self.worked = True


class _Event(NamedTuple):
    """A state event that is to be sent, as its homeserver has it."""

    room_id: str
    type: str
    state_key: str
    content: bytes

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return sum(map(len, self))

    def __repr__(self) -> str:
        return "_Event()"


class _Look(NamedTuple):
    """What a homeserver shows of an event."""

    there: bool | None  # None: it does not say
    event: _Event | None = None
    limited: bool = False  # by the limit that holds for us


class _NotNegotiated(Exception):
    """The homeserver could not be asked what it offers."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.detail)
        self.answer = answer


class _Request(NamedTuple):
    """One management request, before its generation is chosen."""

    homeserver: Homeserver
    action: Action
    delay_id: str
    headers: Mapping[str, str]
    query: str
    own_token: bool
    deadline: float

    def __repr__(self) -> str:
        return f"_Request({self.action!r})"


class ManagementClient:
    """The management requests, for all homeservers. `now` gives Unix seconds."""

    def __init__(self, egress: Egress, now: Callable[[], float]) -> None:
        self._egress = egress
        self._now = now
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._negotiations: InFlight[_Known] = InFlight()
        # By homeserver and delay_id: what a homeserver has refused to send for now, and perhaps forgotten.
        self._refused: OrderedDict[tuple[str, str], _Event] = OrderedDict()

    async def act(
        self,
        homeserver: Homeserver,
        action: Action,
        delay_id: str,
        *,
        token: str | None = None,
        user: str | None = None,
        timeout: float,  # noqa: ASYNC109 - one time for several requests, some of them shared with others whose time is another
    ) -> Answer:
        """Restart, send or cancel a delayed event, within `timeout` seconds for everything, choosing the generation included.

        Authenticated by the scoped token; else as the application service, asserting `user` where it is known; else not at all, since from
        the third generation on the delay_id alone is enough. Never raises for anything that a homeserver or a network does.
        """
        if action not in _ACTIONS:
            raise ValueError(f"{action} is not a management request")
        if (token is not None or not _PLAIN.fullmatch(delay_id)) and (problem := unspeakable(delay_id, token)):
            return Answer(Verdict.REFUSED, None, "", None, problem)
        own_token = token is None and homeserver.as_token is not None
        credential = token if token is not None else homeserver.as_token
        request = _Request(
            homeserver=homeserver,
            action=action,
            delay_id=delay_id,
            headers=_JSON if credential is None else {**_JSON, **_bearer(credential)},
            query=_as_user(user) if own_token else "",
            own_token=own_token,
            deadline=asyncio.get_running_loop().time() + timeout,
        )
        try:
            if own_token and user is not None and action is Action.SEND:
                answer = await self._send_in_its_owners_name(request)
            else:
                answer = await self._negotiated(request)
        except _NotNegotiated as unknown:
            return unknown.answer
        if action is Action.RESTART and answer.verdict is Verdict.DONE:
            self._refused.pop((homeserver.base_url, delay_id), None)
        if own_token and user is None and action is Action.SEND and answer.verdict is Verdict.LIMITED:
            answer = answer._replace(of_owner=True)
        if own_token and answer.status == 403 and answer.verdict is Verdict.FAILED and action is not Action.RESTART:
            return await self._why_forbidden(request, answer)
        return answer

    async def _send_in_its_owners_name(self, request: _Request) -> Answer:
        """Send an event whose owner we may speak for.

        Our own limit does not hold then, but its owner's does (Synapse: rc_message), whoever sends the event; and Synapse 1.163 forgets an event that
        it has refused so. Somebody who has just sent many messages would stay in the call for ever: so the event is looked at before, and if it is
        forgotten, it is put as the state event that it was to become. Raises _NotNegotiated.
        """
        key = (request.homeserver.base_url, request.delay_id)
        look = await self._look_at(request)
        if look.there:
            self._refused.pop(key, None)
        elif look.there is False and key in self._refused:
            return await self._put(request, key, self._refused[key])
        answer = await self._negotiated(request)
        if answer.verdict is not Verdict.LIMITED:
            return answer
        event = look.event
        if look.there is not None:
            look = await self._look_at(request)
        if look.there or look.limited:
            return answer  # by our own limit
        if event is not None and event.size <= MAX_REFUSED:
            keep(self._refused, key, event, MAX_REMEMBERED)
        if look.there is None:
            return answer._replace(of_owner=True)
        if event is None:
            lost = "429: the homeserver has refused to send it by its owner's limit (Synapse: rc_message), and forgotten it; nobody else can send it"
            return Answer(Verdict.NOT_FOUND, answer.status, answer.errcode, None, lost)
        return await self._put(request, key, event)

    async def _look_at(self, request: _Request) -> _Look:
        """Does the homeserver know the event, and what is it? Only of state events that is told: nothing else can be put again by anybody."""
        path = _UNSTABLE + quote(request.delay_id, safe="") + request.query
        now = asyncio.get_running_loop().time()
        try:
            # Where it hangs, there has to be time left for what matters.
            reply = await self._get(request.homeserver, path, request.headers, now + min(LOOK_WITHIN, (request.deadline - now) / 4))
        except HttpFailed:
            return _Look(None)
        if reply.status == 404 and reply.errcode == "M_NOT_FOUND":
            return _Look(False)
        if reply.status != 200 or reply.content is None:
            return _Look(None, limited=reply.status == 429)
        room_id, kind, key, content = (reply.content.get(name) for name in ("room_id", "type", "state_key", "content"))
        if not (isinstance(room_id, str) and isinstance(kind, str) and isinstance(key, str) and isinstance(content, dict)):
            return _Look(True)
        return _Look(True, _Event(room_id, kind, key, to_json(content)))

    async def _put(self, request: _Request, key: tuple[str, str], event: _Event) -> Answer:
        """Put the event into its room, as its owner, as soon as the owner's limit lets it."""
        homeserver = request.homeserver
        path = "/".join(quote(part, safe="") for part in (event.room_id, "state", event.type, event.state_key))
        way = self._egress.way(discovered=homeserver.discovered, stranger=homeserver.stranger)
        loop = asyncio.get_running_loop()
        while True:
            try:
                url = f"{homeserver.base_url}/_matrix/client/v3/rooms/{path}{request.query}"
                reply = read_reply(await way.put(url, request.headers, event.content, request.deadline, ssl=homeserver.ssl), self._now())
            except (HttpFailed, UnicodeEncodeError) as error:
                return Answer(Verdict.FAILED, None, "", None, error.reason if isinstance(error, HttpFailed) else "it is not valid Unicode")
            if reply.status == 200 and reply.content is not None and isinstance(reply.content.get("event_id"), str):
                self._refused.pop(key, None)
                return DONE._replace(
                    detail="200: put as its owner, since the homeserver had refused to send it by its owner's limit, and forgotten it"
                )
            meant = understand(reply, own_token=True)
            if meant.verdict is not Verdict.LIMITED:
                return meant if meant.verdict is Verdict.REFUSED else meant._replace(verdict=Verdict.FAILED)
            wait = max(meant.retry_after or 0.0, LEAST_WAIT)
            if loop.time() + wait >= request.deadline - LOOK_WITHIN:
                return meant._replace(of_owner=True)
            await asyncio.sleep(wait)

    async def check(self, homeserver: Homeserver, timeout: float) -> str:  # noqa: ASYNC109 - as in `act`
        """Can the homeserver be reached, and does it have delayed events? "" or a sentence for the operator. Costs one request at the most."""
        try:
            known = await self._negotiate(homeserver, asyncio.get_running_loop().time() + timeout, None)
        except _NotNegotiated as unknown:
            return unknown.answer.detail
        return "" if known.offered else DELAYED_EVENTS_OFF

    async def works(self, homeserver: Homeserver, timeout: float) -> str:  # noqa: ASYNC109 - as in `act`
        """The same as `check`, but what is remembered neither counts nor changes: does it answer now?"""
        try:
            reply = await self._get(homeserver, "/_matrix/client/versions", {}, asyncio.get_running_loop().time() + timeout)
        except HttpFailed as error:
            return error.reason
        if reply.status != 200 or reply.content is None or not _are_versions(reply.content):
            return f"its answer to /versions is not a homeserver's: {reply.status} {reply.errcode}".strip()
        return "" if generations_offered(reply.content) else DELAYED_EVENTS_OFF

    async def is_scoped(self, homeserver: Homeserver, token: str, timeout: float) -> Scope:  # noqa: ASYNC109 - as in `act`
        """Is the token of a client really a scoped one?

        It is tried once on `whoami`, which a user's access token can do and a scoped one cannot.
        """
        if not _TOKEN.fullmatch(token):
            return Scope.UNKNOWN
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            reply = await self._get(homeserver, "/_matrix/client/v3/account/whoami", _bearer(token), deadline)
        except HttpFailed:
            return Scope.UNKNOWN
        if reply.status == 200 and reply.content is not None:
            return Scope.FULL_ACCESS
        if reply.status in {401, 403} and reply.errcode and reply.errcode not in _SAYS_NOTHING_OF_THE_TOKEN:
            return Scope.SCOPED
        return Scope.UNKNOWN

    async def aclose(self) -> None:
        """Stop what is under way. The connections belong to the egress."""
        await self._negotiations.aclose()

    async def _negotiated(self, request: _Request) -> Answer:
        """Make the request in the form that the homeserver understands; when it no longer does, choose anew and try once more."""
        used: _Known | None = None
        fresh = False
        while True:
            known = self._remembered(request.homeserver.base_url, instead_of=used)
            if known is None:
                known, fresh = await self._what_it_offers(request, instead_of=used), True
            if not known.offered:
                return Answer(
                    Verdict.FAILED,
                    None,
                    "",
                    None,
                    DELAYED_EVENTS_OFF,
                )
            if not known.lacking or known.lacking.get(request.action, 0.0) <= self._now():
                answer = await self._try(request, known)
                if answer is not None:
                    return answer
                if not fresh and used is None:
                    used = known
                    continue
                if known.worked:
                    # A worker that is starting, a proxy's rule that is being changed: whoever plans the next try waits long enough.
                    known.expires = self._now()
                else:
                    known.lacking[request.action] = self._now() + OFF_LASTS
            return Answer(
                Verdict.FAILED,
                None,
                "",
                None,
                f"the homeserver announces delayed events, but no form of the endpoint for {_ACTIONS[request.action]} is there:"
                " check which paths its reverse proxy passes on, and to which process",
            )

    async def _try(self, request: _Request, known: _Known) -> Answer | None:
        """Try what is offered, best first, or what has proved to work.

        None: the homeserver has none of these endpoints, so nothing was done.
        """
        proved = known.proved.get(request.action)
        homeserver, action = request.homeserver, request.action
        way = self._egress.way(discovered=homeserver.discovered, stranger=homeserver.stranger)
        for generation in known.offered if proved is None else (proved,):
            path, body = generation.request(request.delay_id, action)
            try:
                answer = await way.post(
                    homeserver.base_url + path + request.query,
                    request.headers,
                    body,
                    request.deadline,
                    ssl=homeserver.ssl,
                    # A second restart does what the first did. A second send would be answered 404 if the first arrived, and hide that it did.
                    repeatable=action is Action.RESTART,
                )
            except HttpFailed as failed:
                return Answer(Verdict.FAILED if failed.certainly_not_sent else Verdict.UNCERTAIN, None, "", None, failed.reason)
            if is_usual(answer):
                if proved is None:
                    known.proves(action, generation)
                return DONE
            reply = read_reply(answer, self._now())
            if not no_such_endpoint(reply):
                meant = understand(reply, own_token=request.own_token)
                if meant.verdict is Verdict.DONE or reply.errcode:
                    known.proves(action, generation)
                return meant
        return None

    async def _get(self, homeserver: Homeserver, path: str, headers: Mapping[str, str], deadline: float) -> Reply:
        http = self._egress.way(discovered=homeserver.discovered, stranger=homeserver.stranger)
        answer = await http.get(homeserver.base_url + path, headers, deadline, ssl=homeserver.ssl)
        return read_reply(answer, self._now())

    async def _why_forbidden(self, request: _Request, answer: Answer) -> Answer:
        """A 403 to our own token has two readings: the operator's mistake, or the event itself may not be sent (power level, its user left
        the room).

        If the same token may speak for the same user elsewhere, it is the event.
        """
        try:
            reply = await self._get(
                request.homeserver,
                "/_matrix/client/v3/account/whoami" + request.query,
                {"Authorization": request.headers["Authorization"]},
                request.deadline,
            )
        except HttpFailed:
            return answer
        if reply.status == 200 and reply.content is not None and "user_id" in reply.content:
            return Answer(Verdict.REFUSED, answer.status, answer.errcode, answer.retry_after, f"403 {answer.errcode}")
        return answer

    def _remembered(self, base_url: str, *, instead_of: _Known | None) -> _Known | None:
        """What is known of a homeserver, unless it is `instead_of` or too old."""
        known = self._known.get(base_url)
        if known is None or known is instead_of or self._now() >= known.expires:
            return None
        self._known.move_to_end(base_url)
        return known

    async def _what_it_offers(self, request: _Request, *, instead_of: _Known | None) -> _Known:
        """Ask. Raises _NotNegotiated."""
        try:
            async with asyncio.timeout_at(request.deadline):
                share = self._negotiations.share
                return await share(request.homeserver.base_url, lambda: self._negotiate(request.homeserver, request.deadline, instead_of))
        except TimeoutError:
            raise _NotNegotiated(_not_negotiated("no answer in time")) from None

    async def _negotiate(self, homeserver: Homeserver, deadline: float, instead_of: _Known | None) -> _Known:
        """Ask `/versions`, which needs no authentication, and remember the result. Raises _NotNegotiated.

        When only the time of the remembered choice was over, and the homeserver cannot be asked, it stays in force a little longer.
        """
        base_url = homeserver.base_url
        try:
            reply = await self._get(homeserver, "/_matrix/client/versions", {}, deadline)
            if reply.status != 200 or reply.content is None:
                raise _NotNegotiated(_not_negotiated(f"{reply.status} {reply.errcode}".strip(), reply))
            if not _are_versions(reply.content):
                raise _NotNegotiated(_not_negotiated("the answer is not the homeserver's: is there a proxy that answers in its place?", reply))
            offered = generations_offered(reply.content)
        except (HttpFailed, _NotNegotiated) as error:
            old = self._known.get(base_url)
            if old is not None and old is not instead_of and old.offered:
                old.expires = self._now() + OFF_LASTS
                return old
            unknown = error if isinstance(error, _NotNegotiated) else _NotNegotiated(_not_negotiated(error.reason))
            raise unknown from None
        before = self._known.get(base_url)
        worked = before is not None and before.worked
        lasts = CHOICE_LASTS if offered else 0.0 if worked else OFF_LASTS
        known = _Known(offered, self._now() + lasts, worked=worked)
        keep(self._known, base_url, known, MAX_REMEMBERED)
        return known


def _are_versions(content: Mapping[str, Any]) -> bool:
    """Is it what a homeserver answers to `/versions`, and not just some object? The client-server API requires the list of versions."""
    versions, features = content.get("versions"), content.get("unstable_features")
    if not isinstance(versions, list) or not versions or not all(isinstance(version, str) for version in versions):
        return False
    return features is None or isinstance(features, dict)


def generations_offered(versions: Mapping[str, Any]) -> tuple[Generation, ...]:
    """The generations that the answer of `/versions` allows, the best first; none where delayed events are off.

    The announcement does not tell the older form (action in the body) from the newer one at the same place, so the older follows as a
    fallback.
    """
    features = versions.get("unstable_features")
    flags = features if isinstance(features, dict) else {}
    spec = versions.get("versions")
    contained = isinstance(spec, list) and any(isinstance(v, str) and v in SPEC_VERSIONS_WITH_DELAYED_EVENTS for v in spec)
    offered: tuple[Generation, ...] = ()
    if contained or flags.get("org.matrix.msc4140.stable") is True:
        offered += (Generation.D,)
    if flags.get("org.matrix.msc4140") is True:
        offered += (Generation.C, Generation.B)
    return (*offered, Generation.A) if offered else ()


def _not_negotiated(why: str, reply: Reply | None = None) -> Answer:
    return Answer(
        verdict=Verdict.FAILED,
        status=reply.status if reply else None,
        errcode=reply.errcode if reply else "",
        retry_after=reply.retry_after if reply else None,
        detail=f"the homeserver could not be asked for its versions: {why}",
    )


def unspeakable(delay_id: str, token: str | None) -> str:
    """Why no request can be made of these; "" if one can.

    A delay_id is whatever a client claims. Quoting keeps it within its place in the path, except that `.` and `..` are resolved by servers
    and proxies even when quoted, some only after they have decoded `%2F`; no homeserver gives such ids.
    """
    if not delay_id or _DOT_SEGMENT.search(delay_id) or _DOT_SEGMENT.search(unquote(delay_id)):
        return "such a delay_id cannot be part of a URL"
    try:
        delay_id.encode()
    except UnicodeEncodeError:
        return "the delay_id is not valid Unicode"
    if token is not None and not _TOKEN.fullmatch(token):
        return "the token has characters that a header cannot have"
    return ""


def _bearer(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _as_user(user: str | None) -> str:
    return "" if user is None else f"?user_id={quote(user, safe='', errors='replace')}"
