"""The standalone endpoints of MatrixRTC (MSC4195 as it is deployed): `/get_token`, `/sfu/get`, `/delegate_delayed_leave`.

Who asks is proved by an OpenID token, which the user's homeserver vouches for. Users of served homeservers have the room made for them and may
delegate; others get tokens for rooms that exist. Errors must not tell whether a user, a device or a room exists, and no token or delay_id may be
repeated or logged.

A delegation that is refused on the way to a token is `400 M_BAD_JSON`, whatever the reason: a client then asks again without it, keeps its event
alive by itself, and gets into the call. Every other error would keep it out.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from enum import StrEnum
from typing import Any, Final

from aiohttp import web

from sfu_delegate.api.body import read_body
from sfu_delegate.api.cors import access
from sfu_delegate.api.delegations import new_id
from sfu_delegate.api.errors import MatrixError, form_of, json_response, logged, of_exception, stopping
from sfu_delegate.api.matrixrtc_body import Delay, Wanted, read_delegate, read_get_token, read_sfu_get
from sfu_delegate.api.plain import Answer, Asked, Asker, refusal, success
from sfu_delegate.api.services import Services, Settings
from sfu_delegate.api.throttle import Throttle
from sfu_delegate.delegation.model import Accept, NewEvent, OnEnd
from sfu_delegate.livekit import tokens
from sfu_delegate.livekit.keys import SfuKey
from sfu_delegate.livekit.room_service import SfuUnavailable
from sfu_delegate.matrix.discovery import DiscoveryFailed
from sfu_delegate.matrix.openid import OpenIdRefused, OpenIdUnavailable
from sfu_delegate.observe.logs import Seldom

RETRY_AFTER: Final = 10.0  # seconds: a homeserver that could not be asked
CLOSED: Final = 499  # the status, for metrics, where nobody waits for the answer any more


class Endpoint(StrEnum):
    """The endpoints by name, for metrics."""

    GET_TOKEN = "get_token"  # noqa: S105  (it is a word, not a token)
    SFU_GET = "sfu_get"
    DELEGATE = "delegate_delayed_leave"


PATHS: Final = {Endpoint.GET_TOKEN: "/get_token", Endpoint.SFU_GET: "/sfu/get", Endpoint.DELEGATE: "/delegate_delayed_leave"}


class MatrixRtc:
    """Answers the endpoints for one SFU."""

    def __init__(self, services: Services, sfu: str, throttle: Throttle) -> None:
        self._services = services
        self._sfu = sfu
        self._throttle = throttle
        self._seldom = Seldom()

    async def receive(self, endpoint: Endpoint, request: web.Request) -> web.Response:
        """Answer a request that aiohttp reads. Raises MatrixError."""
        return json_response(await self._answer(endpoint, Asker.of(request), read_body(request, self._services.settings().max_body)))

    async def answer(self, endpoint: Endpoint, asked: Asked) -> Answer:
        """Answer a request that has come as a whole, with what pages in browsers need."""
        services = self._services

        async def at_hand() -> bytes:
            return asked.body

        try:
            answer = success(await self._answer(endpoint, asked.asker, at_hand()))
        except Exception as error:
            answer = refusal(of_exception(error) or logged(services.log, error, "POST", PATHS[endpoint]))
        return answer._replace(headers={**answer.headers, **access(asked.origin, services.settings().cors_origins)})

    async def _answer(self, endpoint: Endpoint, asker: Asker, reading: Coroutine[Any, Any, bytes]) -> dict[str, Any]:
        services = self._services
        settings = services.settings()
        status, delegates, probes = CLOSED, endpoint is Endpoint.DELEGATE, False
        try:
            client = self._throttle.client(asker, settings)
            body = await reading
            probes = not body  # how Element Call finds out whether the endpoint is there
            delegates = delegates and not probes
            wanted = _READ[endpoint](body, settings)
            delegates = wanted.delay is not None
            user = await self._user(wanted, client, settings)
            self._throttle.user(user, settings)
            answer = await (self._delegated(wanted, user) if endpoint is Endpoint.DELEGATE else self._token(wanted, user))
            status = 200
        except Exception as error:
            status, errcode, _ = form_of(error)
            if errcode and not probes and (times := self._seldom.times(f"{endpoint} {status} {errcode}")):
                services.log.info("matrixrtc_refused", endpoint=endpoint.value, status=status, errcode=errcode, times=times)
            raise
        finally:
            reading.close()  # where it was not asked for
            services.hooks.on_matrixrtc(endpoint.value, status, delegates)
        return answer

    # ── who is asking? ──

    async def _user(self, wanted: Wanted, client: str, settings: Settings) -> str:
        """The user, as the homeserver that was asked vouches for it. Raises MatrixError."""
        services = self._services
        if services.homeservers.rule_for(wanted.server) is None and not settings.other_homeservers:
            raise MatrixError(403, "M_FORBIDDEN", f"The homeserver {wanted.server} is not served here.")
        if wanted.user is not None and wanted.user.partition(":")[2].lower() != wanted.server:
            raise _unauthorized()  # a server vouches for its own users only
        try:
            user = await services.openid.user(wanted.server, wanted.token, settings.request_timeout, client)
        except OpenIdRefused:
            raise _unauthorized() from None
        except OpenIdUnavailable as error:
            # Its text is for the operator: it tells what can be reached from here.
            label = services.label(wanted.server)
            if times := self._seldom.times(f"openid {label}"):
                services.log.warning("openid_unavailable", homeserver=label, error=str(error), times=times)
            sentence = "The homeserver could not be asked about the openid_token, so nothing was done. Try again later."
            raise MatrixError(503, "M_UNKNOWN", sentence, retry_after=RETRY_AFTER) from None
        if wanted.user is not None and wanted.user != user:
            raise _unauthorized()
        return user

    # ── what is given ──

    async def _token(self, wanted: Wanted, user: str) -> dict[str, Any]:
        services = self._services
        if wanted.delay is not None:
            await _or_without(self._may_delegate(wanted))
        url, key = self._access()
        if services.homeservers.rule_for(wanted.server) is not None:
            try:
                await services.rooms.create(self._sfu, wanted.room)
            except SfuUnavailable as error:
                raise self._no_room(error) from None
        if wanted.delay is not None:
            await _or_without(self._put(wanted, wanted.delay, user))
        identity = wanted.identities(user).identity
        rule = services.homeservers.rule_for(wanted.server)
        if rule is not None and rule.as_token is not None:
            await services.admissions.given(self._sfu, wanted.room, identity, wanted.server, user, wanted.room_id)
        jwt = tokens.mint_participant(key, wanted.room, identity, services.clock(), user)
        return {"url": url, "jwt": jwt}

    def _access(self) -> tuple[str, SfuKey]:
        """The SFU's URL and key. Raises MatrixError."""
        try:
            return self._services.rooms.access(self._sfu)
        except SfuUnavailable as error:
            raise self._no_room(error) from None

    def _no_room(self, error: SfuUnavailable) -> MatrixError:
        if times := self._seldom.times("room"):
            self._services.log.warning("room_not_created", sfu=self._sfu, problem=error.sentence, times=times)
        return MatrixError(500, "M_UNKNOWN", "The room could not be created on the SFU. Try again later.")

    async def _delegated(self, wanted: Wanted, user: str) -> dict[str, Any]:
        assert wanted.delay is not None  # noqa: S101 — its form requires it
        await self._may_delegate(wanted)
        self._access()  # of an SFU that is not configured any more nobody could ever say who is there
        await self._put(wanted, wanted.delay, user)
        return {}

    async def _may_delegate(self, wanted: Wanted) -> None:
        """Raises MatrixError."""
        services = self._services
        if services.homeservers.rule_for(wanted.server) is None:
            raise MatrixError(403, "M_FORBIDDEN", f"The homeserver {wanted.server} is not served here, so its users cannot delegate.")
        if services.stopping():
            raise stopping()
        if services.homeservers.configured(wanted.server) is not None:
            return
        try:
            async with asyncio.timeout(services.settings().request_timeout):
                await services.homeservers.resolve(wanted.server)
        except (DiscoveryFailed, TimeoutError) as error:
            if times := self._seldom.times(f"homeserver {services.label(wanted.server)}"):
                why = str(error) or "no answer in time"
                services.log.warning("homeserver_not_found", homeserver=wanted.server, error=why, times=times)
            sentence = f"The client-server API of {wanted.server} cannot be found, so its delayed events cannot be managed."
            raise MatrixError(400, "M_BAD_JSON", sentence) from None

    async def _put(self, wanted: Wanted, delay: Delay, user: str) -> None:
        """Hand the delegation in; it is durable when this returns."""
        identity, alias, twin = wanted.identities(user)
        event = NewEvent(delay.id, delay.seconds, OnEnd.SEND)
        await self._services.port.put(Accept(new_id(), self._sfu, wanted.room, identity, wanted.server, (event,), alias, user, twin=twin))


async def _or_without(doing: Awaitable[None]) -> None:
    """Part of a delegation on the way to a token: what refuses it must not keep the client out of the call."""
    try:
        await doing
    except Exception as error:
        _, errcode, refused = form_of(error)
        if not errcode:
            raise
        sentence = f"{refused} Ask again without delay_id and delay_timeout, and restart the delayed event yourself."
        raise MatrixError(400, "M_BAD_JSON", sentence) from None


def _unauthorized() -> MatrixError:
    """One answer for everything that is wrong with a token: whether a user exists is nobody's business."""
    return MatrixError(401, "M_UNAUTHORIZED", "The openid_token is not valid, or not the claimed user's. Ask the homeserver for a new one.")


_READ: Final[Mapping[Endpoint, Callable[[bytes, Settings], Wanted]]] = {
    Endpoint.GET_TOKEN: read_get_token,
    Endpoint.SFU_GET: read_sfu_get,
    Endpoint.DELEGATE: read_delegate,
}
