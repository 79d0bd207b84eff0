"""The application service: what homeservers pass on of their users' requests (MSC4195 over MSC4512's proxy), and of other homeservers'.

A homeserver proves itself by its `hs_token`, and says in a header who asks. It vouches for its own users, and over federation for who the other
homeserver is; nothing else that a request says is believed. The delayed event is looked at as its owner, and membership of the room is asked for.

Errors must not tell whether a user, a device, a room or an event exists, and no token or delay_id may be repeated or logged.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from typing import Any, Final

from aiohttp import web

from sfu_delegate.api.body import read_body
from sfu_delegate.api.delegations import new_id
from sfu_delegate.api.errors import MatrixError, form_of, json_response, stopping
from sfu_delegate.api.plain import Asker
from sfu_delegate.api.service_body import Asked, read_delegate, read_federated, read_get_token
from sfu_delegate.api.services import Services, Settings
from sfu_delegate.api.throttle import Throttle
from sfu_delegate.delegation.model import Accept, NewEvent, OnEnd
from sfu_delegate.livekit import tokens
from sfu_delegate.livekit.names import device_in
from sfu_delegate.livekit.room_service import SfuUnavailable
from sfu_delegate.matrix.discovery import DiscoveryFailed, Homeserver
from sfu_delegate.matrix.names import server_of
from sfu_delegate.matrix.service import CLIENT_PREFIXES, FEDERATION_PREFIXES, CannotAsk, CannotBe, Federated, Shown
from sfu_delegate.observe.logs import Seldom

USER_HEADER: Final = "X-Matrix-User-Identifier"
ORIGIN_HEADER: Final = "X-Matrix-Origin"
RETRY_AFTER: Final = 10.0  # seconds: a homeserver that could not be asked
CLOSED: Final = 499  # the status, for metrics, where nobody waits for the answer any more
MAX_TRANSACTION: Final = 256 * 1024 * 1024  # bytes that are read and forgotten

MEMBER_EVENTS: Final = frozenset(
    {
        "m.rtc.member",
        "org.matrix.msc4143.rtc.member",
        "m.call.member",
        "org.matrix.msc3401.call.member",
        "m.room.encrypted",  # what a member event is in an encrypted room
    }
)
"""Types of events by which somebody leaves a call. Nothing else is sent for anybody."""


class Endpoint(StrEnum):
    """The endpoints by name, for metrics."""

    GET_TOKEN = "homeserver_get_token"  # noqa: S105  (it is a word, not a token)
    DELEGATE = "homeserver_delegate_delayed_leave"
    FEDERATED = "federation_get_token"


PATHS: Final[Mapping[str, Endpoint]] = {
    **{f"{prefix}/get_token": Endpoint.GET_TOKEN for prefix in CLIENT_PREFIXES},
    **{f"{prefix}/delegate_delayed_leave": Endpoint.DELEGATE for prefix in CLIENT_PREFIXES},
    **{f"{prefix}/get_token": Endpoint.FEDERATED for prefix in FEDERATION_PREFIXES},
}


class ServiceEndpoints:
    """Answers what homeservers pass on, and what they tell application services."""

    def __init__(self, services: Services, throttle: Throttle) -> None:
        self._services = services
        self._throttle = throttle
        self._seldom = Seldom()
        self._answers: Mapping[Endpoint, Callable[[web.Request, str], Awaitable[dict[str, Any]]]] = {
            Endpoint.GET_TOKEN: self._get_token,
            Endpoint.DELEGATE: self._delegate,
            Endpoint.FEDERATED: self._federated,
        }

    async def receive(self, endpoint: Endpoint, request: web.Request) -> web.Response:
        """Answer a request that a homeserver passed on. Raises MatrixError."""
        services = self._services
        status = CLOSED
        probes = not request.can_read_body  # how clients find out whether the endpoint is there, and we whether requests come here
        try:
            answer = await self._answers[endpoint](request, self._homeserver(request))
            status = 200
        except Exception as error:
            status, errcode, _ = form_of(error)
            if errcode and not (probes and status == 400) and (times := self._seldom.times(f"{endpoint} {status} {errcode}")):
                services.log.info("matrixrtc_refused", endpoint=endpoint.value, status=status, errcode=errcode, times=times)
            raise
        finally:
            services.hooks.on_matrixrtc(endpoint.value, status, endpoint is Endpoint.DELEGATE and not probes)
        return json_response(answer)

    # ── what homeservers tell an application service ──

    async def transaction(self, request: web.Request) -> web.Response:
        """Events that are pushed where the registration has a `url`. Nobody needs them, and what is not answered 200 comes again without end."""
        self._homeserver(request)
        size = 0
        with suppress(ConnectionError, web.RequestPayloadError):
            async for chunk in request.content.iter_any():
                size += len(chunk)
                if size > MAX_TRANSACTION:
                    raise MatrixError(413, "M_TOO_LARGE", "The transaction is too large.")
        return json_response({})

    async def ping(self, request: web.Request) -> web.Response:
        """The homeserver wants to know whether it reaches us."""
        self._homeserver(request)
        return json_response({})

    async def nobody(self, request: web.Request) -> web.Response:
        """No user and no alias is ours."""
        self._homeserver(request)
        raise MatrixError(404, "M_NOT_FOUND", "This application service has no users and no rooms.")

    # ── who is asking? ──

    def _homeserver(self, request: web.Request) -> str:
        """The homeserver that has proved itself. Raises MatrixError."""
        services = self._services
        headers = request.headers.getall("Authorization", ())
        name = None
        scheme, _, token = headers[0].strip().partition(" ") if len(headers) == 1 else ("", "", "")
        if scheme.lower() == "bearer" and token:
            name = services.homeservers.vouched_by(token.strip())
        if name is not None:
            return name
        self._throttle.client(Asker.of(request), services.settings())
        if not services.homeservers.has_services:
            sentence = "This service is not an application service of any homeserver: its operator makes it one by `sfu-delegate appservice`."
            raise MatrixError(404, "M_UNRECOGNIZED", sentence)
        if not headers:
            sentence = "The token is missing: this path is for homeservers, which send their hs_token as `Authorization: Bearer <token>`."
            raise MatrixError(401, "M_MISSING_TOKEN", sentence)
        if times := self._seldom.times("hs_token"):
            remedy = "if these are a homeserver's requests, give it and the daemon the same registration"
            services.log.warning("hs_token_refused", remedy=remedy, times=times)
        sentence = "This is no hs_token of a homeserver that is configured here. Are the registration there and the one here the same?"
        # Clients take this errcode, which may be passed on to them, for the word on their own token: let them keep what they have.
        raise MatrixError(401, "M_UNKNOWN_TOKEN", sentence, soft_logout=True)

    def _user(self, request: web.Request, homeserver: str) -> str:
        """The user in whose name the homeserver asks. Raises MatrixError."""
        user = _only(request, USER_HEADER)
        if server_of(user) is None:
            raise MatrixError(
                401, "M_UNAUTHORIZED", f"The homeserver must say who asks, in one header {USER_HEADER}: it passes requests on (MSC4512)."
            )
        if (server_of(user) or "").lower() != homeserver:
            raise MatrixError(403, "M_FORBIDDEN", "The homeserver vouches for users of its own only.")
        self._throttle.user(user, self._services.settings())
        return user

    async def _body(self, request: web.Request) -> bytes:
        return await read_body(request, self._services.settings().max_body)

    # ── the endpoints ──

    async def _get_token(self, request: web.Request, name: str) -> dict[str, Any]:
        user = self._user(request, name)
        asked = read_get_token(await self._body(request))
        _check_claim(asked, user)
        homeserver = await self._resolved(name)
        await self._must_be_joined(homeserver, user, asked.room_id)
        if asked.server is not None and asked.server != name and not self._services.homeservers.has_service(asked.server):
            return await self._remote_token(homeserver, asked, user)
        return await self._token(asked, user, name, can_publish=True)

    async def _federated(self, request: web.Request, name: str) -> dict[str, Any]:
        settings = self._services.settings()
        origin = _only(request, ORIGIN_HEADER)
        if not origin:
            sentence = f"The homeserver must say for which other one it asks, in one header {ORIGIN_HEADER}: it passes requests on (MSC4512)."
            raise MatrixError(401, "M_UNAUTHORIZED", sentence)
        self._throttle.origin(origin.lower(), settings)
        asked = read_federated(await self._body(request))
        user = asked.claimed_user or ""
        homeservers = self._services.homeservers
        allowed = settings.other_homeservers or homeservers.rule_for(origin) is not None
        # One that has this service itself comes by itself: no other one has a word on its users.
        if (server_of(user) or "").lower() != origin.lower() or homeservers.has_service(origin) or not allowed:
            raise _not_for_them()
        self._throttle.user(user, settings)
        await self._must_be_joined(await self._resolved(name), user, asked.room_id)
        return await self._token(asked, user, name, can_publish=False)

    async def _delegate(self, request: web.Request, name: str) -> dict[str, Any]:
        services = self._services
        settings = services.settings()
        user = self._user(request, name)
        asked = read_delegate(await self._body(request))
        assert asked.delay_id is not None  # noqa: S101 — its form requires it
        _check_claim(asked, user)
        sfu = self._sfu(asked.url)
        if services.stopping():
            raise stopping()
        shown = await self._event(await self._resolved(name), asked, asked.delay_id, user, settings)
        # Without a device, the event may tell it: then a participant with a token of the legacy endpoint is known for this one.
        identity, alias, twin = asked.identities(user, device_in(shown.state_key, user))
        event = NewEvent(asked.delay_id, shown.delay, OnEnd.SEND, shown.running_since, shown.asked_at)
        await services.port.put(Accept(new_id(), sfu, asked.room, identity, name, (event,), alias, user, twin=twin))
        return {}

    async def _event(self, homeserver: Homeserver, asked: Asked, delay_id: str, user: str, settings: Settings) -> Shown:
        """The delayed event as the homeserver has it. Raises MatrixError."""
        try:
            shown = await self._services.service.delayed_event(homeserver, user, delay_id, settings.request_timeout)
        except CannotAsk as error:
            raise self._not_asked(homeserver, error) from None
        if shown is None or shown.room_id != asked.room_id or shown.type not in MEMBER_EVENTS:
            sentence = "delay_id: this user has no such delayed event in this room by which a member leaves a call. Schedule one, and delegate that."
            raise MatrixError(400, "M_INVALID_PARAM", sentence)
        if not settings.min_delay <= shown.delay <= settings.max_delay:
            least, most = round(settings.min_delay * 1000), round(settings.max_delay * 1000)
            sentence = f"delay_id: the delay of this event must be from {least} to {most} milliseconds; schedule it with such a delay."
            raise MatrixError(400, "M_INVALID_PARAM", sentence)
        return shown

    # ── tokens ──

    def _sfu(self, url: str) -> str:
        """Which of ours it is. Raises MatrixError."""
        sfu = self._services.rooms.named(url)
        if sfu is None:
            raise MatrixError(400, "M_INVALID_PARAM", "url: is none of the SFUs here. Give the SFU's WebSocket URL as the homeserver announces it.")
        return sfu

    async def _token(self, asked: Asked, user: str, homeserver: str, *, can_publish: bool) -> dict[str, Any]:
        services = self._services
        sfu = self._sfu(asked.url)
        identity = asked.identities(user).identity
        try:
            _, key = services.rooms.access(sfu)
            await services.rooms.create(sfu, asked.room)
        except SfuUnavailable as error:
            if times := self._seldom.times("room"):
                services.log.warning("room_not_created", sfu=sfu, problem=error.sentence, times=times)
            raise MatrixError(500, "M_UNKNOWN", "The room could not be created on the SFU. Try again later.") from None
        await services.admissions.given(sfu, asked.room, identity, homeserver, user, asked.room_id)
        jwt = tokens.mint_member(key, asked.room, identity, services.clock(), user, can_publish=can_publish)
        return {"jwt": jwt}

    async def _remote_token(self, homeserver: Homeserver, asked: Asked, user: str) -> dict[str, Any]:
        """A token for another homeserver's SFU, from there. Raises MatrixError."""
        services = self._services
        assert asked.server is not None  # noqa: S101 — it is another one
        body = {"user_id": user, "url": asked.url, "room_id": asked.room_id, "slot_id": asked.slot_id, "member_id": asked.member}
        try:
            answer = await services.service.federated(homeserver, asked.server, "get_token", body, services.settings().request_timeout)
        except CannotAsk as error:
            raise self._not_asked(homeserver, error) from None
        jwt = answer.content.get("jwt") if answer.status == 200 and answer.content is not None else None
        if isinstance(jwt, str) and jwt:
            return {"jwt": jwt}
        raise _relayed(answer)

    # ── asking the homeserver ──

    async def _resolved(self, name: str) -> Homeserver:
        """Raises MatrixError."""
        services = self._services
        try:
            async with asyncio.timeout(services.settings().request_timeout):
                return await services.homeservers.resolve(name)
        except (DiscoveryFailed, TimeoutError) as error:
            if times := self._seldom.times(f"homeserver {services.label(name)}"):
                services.log.warning("homeserver_not_found", homeserver=name, error=str(error) or "no answer in time", times=times)
            raise _cannot_ask() from None

    async def _must_be_joined(self, homeserver: Homeserver, user: str, room_id: str) -> None:
        """Raises MatrixError."""
        try:
            joined = await self._services.service.is_joined(homeserver, user, room_id, self._services.settings().request_timeout)
        except CannotBe:
            joined = False
        except CannotAsk as error:
            raise self._not_asked(homeserver, error) from None
        if not joined:
            raise _not_for_them()

    def _not_asked(self, homeserver: Homeserver, error: CannotAsk) -> MatrixError:
        # Its text is for the operator: it tells what can be reached from here.
        if times := self._seldom.times(f"service {self._services.label(homeserver.name)}"):
            self._services.log.warning("homeserver_not_asked", homeserver=homeserver.name, problem=str(error), times=times)
        return _cannot_ask()


def _only(request: web.Request, header: str) -> str:
    """The value of a header that is there once; "" otherwise: of two, nobody knows which is the homeserver's."""
    values = request.headers.getall(header, ())
    return values[0].strip() if len(values) == 1 else ""


def _check_claim(asked: Asked, user: str) -> None:
    if asked.claimed_user is not None and asked.claimed_user != user:
        raise MatrixError(401, "M_UNAUTHORIZED", "member.claimed_user_id: is not the user who asks. Leave it out, or give your own.")


def _not_for_them() -> MatrixError:
    """One answer for everything: whether a room exists, or who is in it, is nobody's business."""
    sentence = "You have not joined this room, as far as the homeserver knows, or there is no such room. Join it, and ask again."
    return MatrixError(403, "M_FORBIDDEN", sentence)


def _cannot_ask() -> MatrixError:
    sentence = "The homeserver could not be asked about this, so nothing was done. Try again later."
    return MatrixError(503, "M_UNKNOWN", sentence, retry_after=RETRY_AFTER)


def _relayed(answer: Federated) -> MatrixError:
    """What the other homeserver's refusal is for our client (MSC4195). Its own text is not passed on."""
    match answer.status, answer.errcode:
        case 403, "M_FORBIDDEN":
            return _not_for_them()
        case 400, "M_INVALID_PARAM":
            return MatrixError(400, "M_INVALID_PARAM", "server_name, url: the SFU of this URL is none of that homeserver's.")
        case _:
            return MatrixError(502, "M_UNKNOWN", "The other homeserver gave no token. Try again later.")
