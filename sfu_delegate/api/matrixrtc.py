"""The standalone endpoints of MatrixRTC (MSC4195 as it is deployed): `/get_token`, `/sfu/get`, `/delegate_delayed_leave`.

Who asks is proved by an OpenID token, which the user's homeserver vouches for. Users of served homeservers have the room made for them and may
delegate; others get tokens for rooms that exist. Errors must not tell whether a user, a device or a room exists, and no token or delay_id may be
repeated or logged.

A delegation that is refused on the way to a token is `400 M_BAD_JSON`, whatever the reason: a client then asks again without it, keeps its event
alive by itself, and gets into the call. Every other error would keep it out.
"""

import asyncio
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Final

from aiohttp import web

from sfu_delegate.api.body import read_body
from sfu_delegate.api.delegations import new_id
from sfu_delegate.api.errors import MatrixError, json_response, of_exception, stopping
from sfu_delegate.api.matrixrtc_body import Delay, Wanted, read_delegate, read_get_token, read_sfu_get
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

    async def get_token(self, request: web.Request) -> web.Response:
        """A LiveKit token, and perhaps a delegation."""
        return await self._answer(request, Endpoint.GET_TOKEN, read_get_token)

    async def sfu_get(self, request: web.Request) -> web.Response:
        """The same in the legacy form."""
        return await self._answer(request, Endpoint.SFU_GET, read_sfu_get)

    async def delegate(self, request: web.Request) -> web.Response:
        """A delegation alone."""
        return await self._answer(request, Endpoint.DELEGATE, read_delegate)

    async def _answer(self, request: web.Request, endpoint: Endpoint, read: Callable[[bytes, Settings], Wanted]) -> web.Response:
        services = self._services
        settings = services.settings()
        status, delegates, probes = CLOSED, endpoint is Endpoint.DELEGATE, False
        try:
            client = self._throttle.client(request, settings)
            body = await read_body(request, settings.max_body)
            probes = not body  # how Element Call finds out whether the endpoint is there
            delegates = delegates and not probes
            wanted = read(body, settings)
            delegates = wanted.delay is not None
            user = await self._user(wanted, client, settings)
            self._throttle.user(user, settings)
            response = await (self._delegated(wanted, user) if endpoint is Endpoint.DELEGATE else self._token(wanted, user))
            status = response.status
        except Exception as error:
            refused = of_exception(error)
            status = 500 if refused is None else refused.status
            if refused is not None and not probes and (times := self._seldom.times(f"{endpoint} {status} {refused.errcode}")):
                services.log.info("matrixrtc_refused", endpoint=endpoint.value, status=status, errcode=refused.errcode, times=times)
            raise
        finally:
            services.hooks.on_matrixrtc(endpoint.value, status, delegates)
        return response

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

    async def _token(self, wanted: Wanted, user: str) -> web.Response:
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
        jwt = tokens.mint_participant(key, wanted.room, wanted.identities(user)[0], services.clock(), user)
        return json_response({"url": url, "jwt": jwt})

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

    async def _delegated(self, wanted: Wanted, user: str) -> web.Response:
        assert wanted.delay is not None  # noqa: S101 — its form requires it
        await self._may_delegate(wanted)
        self._access()  # of an SFU that is not configured any more nobody could ever say who is there
        await self._put(wanted, wanted.delay, user)
        return json_response({})

    async def _may_delegate(self, wanted: Wanted) -> None:
        """Raises MatrixError."""
        services = self._services
        if services.homeservers.rule_for(wanted.server) is None:
            raise MatrixError(403, "M_FORBIDDEN", f"The homeserver {wanted.server} is not served here, so its users cannot delegate.")
        if services.stopping():
            raise stopping()
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
        identity, alias = wanted.identities(user)
        event = NewEvent(delay.id, delay.seconds, OnEnd.SEND)
        await self._services.port.put(Accept(new_id(), self._sfu, wanted.room, identity, wanted.server, (event,), alias, user))


async def _or_without(doing: Awaitable[None]) -> None:
    """Part of a delegation on the way to a token: what refuses it must not keep the client out of the call."""
    try:
        await doing
    except Exception as error:
        refused = of_exception(error)
        if refused is None:
            raise
        sentence = f"{refused.error} Ask again without delay_id and delay_timeout, and restart the delayed event yourself."
        raise MatrixError(400, "M_BAD_JSON", sentence) from None


def _unauthorized() -> MatrixError:
    """One answer for everything that is wrong with a token: whether a user exists is nobody's business."""
    return MatrixError(401, "M_UNAUTHORIZED", "The openid_token is not valid, or not the claimed user's. Ask the homeserver for a new one.")


def handlers(rtc: MatrixRtc) -> dict[str, Callable[[web.Request], Awaitable[web.Response]]]:
    """What answers each path."""
    return {PATHS[Endpoint.GET_TOKEN]: rtc.get_token, PATHS[Endpoint.SFU_GET]: rtc.sfu_get, PATHS[Endpoint.DELEGATE]: rtc.delegate}
