"""`POST /webhooks/livekit`: the SFU tells who came and who left.

LiveKit sends the webhooks of a room one after another, drops what waits for 30 s, and takes every 4xx for delivered (LiveKit 1.13): so the answer
must come at once, but never before what it acknowledges is durable; and a webhook that cannot be kept now must be answered with 503.
Nothing of a body or a token may be logged or repeated.
"""

from contextlib import suppress
from time import perf_counter
from typing import Final

from aiohttp import web

from sfu_delegate.api.body import read_body
from sfu_delegate.api.errors import MatrixError
from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.api.services import Services
from sfu_delegate.delegation.model import Missed
from sfu_delegate.livekit import webhook
from sfu_delegate.livekit.webhook import WebhookRefused
from sfu_delegate.observe.logs import Seldom

PATH: Final = "/webhooks/livekit"
PATH_DEPLOYED: Final = "/sfu_webhook"
"""Where deployed configurations of LiveKit send them to."""

UNKNOWN: Final = "unknown"
"""The label of an SFU or an event that no valid signature vouches for."""

STORED: Final = "stored"
IGNORED: Final = "ignored"
TOO_LARGE: Final = "too_large"
UNREADABLE: Final = "unreadable"
OVERLOADED: Final = "overloaded"
UNAVAILABLE: Final = "unavailable"
FAILED: Final = "failed"

_JSON: Final = {"Content-Type": "application/json"}

RESULTS: Final = (STORED, IGNORED, TOO_LARGE, UNREADABLE, OVERLOADED, UNAVAILABLE, FAILED, *(reason.value for reason in webhook.Refusal))
"""What `on_webhook` may be told as the result."""


_OUT_OF_TIME = frozenset({webhook.Refusal.EXPIRED, webhook.Refusal.NOT_YET_VALID})
"""Genuine, so perhaps our clock is wrong: LiveKit takes the 401 for delivered, and what the webhook told has to be found out by looks."""


class Webhooks:
    """Receives webhooks."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._refused = Seldom()

    async def receive(self, request: web.Request) -> web.Response:
        """Verify, decode, hand in, and answer `200 {}` once it is durable; at once where it does not matter."""
        began = perf_counter()
        services = self._services
        told = services.hooks.on_webhook
        try:
            body = await read_body(request, services.settings().max_webhook_body)
        except MatrixError as error:
            told(UNKNOWN, UNKNOWN, TOO_LARGE if error.status == 413 else UNREADABLE)
            raise
        sfu = UNKNOWN
        try:
            sfu = webhook.verify(request.headers.get("Authorization"), body, services.keys, services.clock()).sfu
            decoded = webhook.decode(body)
        except WebhookRefused as refused:
            told(sfu, UNKNOWN, refused.reason.value)
            if times := self._refused.times(refused.reason.value):
                services.log.warning("webhook_refused", reason=refused.reason.value, sfu=sfu, times=times)
                if refused.reason in _OUT_OF_TIME:
                    with suppress(Overloaded, Unavailable):
                        await services.port.put(Missed())
            if refused.unauthorized:
                raise MatrixError(401, "M_UNAUTHORIZED", refused.sentence) from None
            raise MatrixError(400, "M_BAD_JSON", refused.sentence) from None
        event = webhook.label(decoded.event)
        given = webhook.to_input(sfu, decoded)
        if given is None:
            told(sfu, event, IGNORED)
            return _ok()
        result = FAILED
        try:
            await services.port.put(given)
            result = STORED
        except Overloaded:
            result = OVERLOADED
            raise _try_again() from None
        except Unavailable:
            result = UNAVAILABLE
            raise _try_again() from None
        finally:
            told(sfu, event, result)
        services.hooks.on_acknowledged(perf_counter() - began)
        return _ok()


def _try_again() -> MatrixError:
    """Without a `Retry-After`: LiveKit 1.13 tries five times, and obeys it. By itself it waits longer, for 15 s in all."""
    return MatrixError(503, "M_UNKNOWN", "Nothing can be stored at the moment. Try again later.")


def _ok() -> web.Response:
    return web.Response(body=b"{}", headers=_JSON)
