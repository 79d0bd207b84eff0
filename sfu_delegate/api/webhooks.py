"""`POST /webhooks/livekit`: the SFU tells who came and who left.

LiveKit sends the webhooks of a room one after another, drops what waits for 30 s, and takes every 4xx for delivered (LiveKit 1.13): so the answer
must come at once, but never before what it acknowledges is durable; and a webhook that cannot be kept now must be answered with 503.
Nothing of a body or a token may be logged or repeated.
"""

import asyncio
from time import perf_counter
from typing import Final

from aiohttp import web

from sfu_delegate.api.body import read_body
from sfu_delegate.api.errors import MatrixError, logged
from sfu_delegate.api.plain import DONE, Answer, Asked, Asker, Told, refusal
from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.api.services import PROBE_ROOMS, Probe, Services
from sfu_delegate.delegation.model import Missed, Seen, Sighting
from sfu_delegate.delegation.replies import Reply
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


RESULTS: Final = (STORED, IGNORED, TOO_LARGE, UNREADABLE, OVERLOADED, UNAVAILABLE, FAILED, *(reason.value for reason in webhook.Refusal))
"""What `on_webhook` may be told as the result."""


_OUT_OF_TIME = frozenset({webhook.Refusal.EXPIRED, webhook.Refusal.NOT_YET_VALID})
"""Genuine, so perhaps our clock is wrong: LiveKit takes the 401 for delivered, and what the webhook told has to be found out by looks."""


class Webhooks:
    """Receives webhooks, whoever reads HTTP."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._refused = Seldom()

    async def receive(self, request: web.Request) -> web.Response:
        """Answer a request: `200 {}` once what it tells is durable. Raises MatrixError."""
        try:
            body = await read_body(request, self._services.settings().max_webhook_body)
        except MatrixError as error:
            self._services.hooks.on_webhook(UNKNOWN, UNKNOWN, TOO_LARGE if error.status == 413 else UNREADABLE)
            raise
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        asked = Asked(Asker.of(request), request.headers.get("Authorization"), None, body)
        self.take(asked, lambda given: None if answer.done() else answer.set_result(given))
        given = await answer
        return web.Response(status=given.status, headers=given.headers, body=given.body)

    def take(self, asked: Asked, answer: Told) -> None:
        """Verify, decode, hand in, and have it answered once it is durable; at once where it does not matter."""
        began = perf_counter()
        services = self._services
        sfu = UNKNOWN
        try:
            sfu = webhook.verify(asked.authorization, asked.body, services.keys, services.clock()).sfu
            decoded = webhook.decode(asked.body)
        except WebhookRefused as refused:
            self._refuse(refused, sfu, answer)
            return
        event = webhook.label(decoded.event)
        if decoded.room.startswith(PROBE_ROOMS):
            services.probes.heard(decoded.room, Probe(services.clock(), sfu, event))
        given = webhook.to_input(sfu, decoded)
        if given is None:
            services.hooks.on_webhook(sfu, event, IGNORED)
            answer(DONE)
        else:
            if type(given) is Seen and given.what is Sighting.JOINED:
                services.admissions.joined(given)
            services.port.hand(given, lambda reply: self._kept(reply, sfu, event, began, answer))

    def _kept(self, reply: Reply | Exception, sfu: str, event: str, began: float, answer: Told) -> None:
        """It is durable, or is not."""
        hooks = self._services.hooks
        if not isinstance(reply, Exception):
            hooks.on_webhook(sfu, event, STORED)
            hooks.on_acknowledged(perf_counter() - began)
            answer(DONE)
        elif isinstance(reply, Overloaded | Unavailable):
            hooks.on_webhook(sfu, event, OVERLOADED if isinstance(reply, Overloaded) else UNAVAILABLE)
            answer(refusal(_try_again()))
        else:
            hooks.on_webhook(sfu, event, FAILED)
            answer(refusal(logged(self._services.log, reply, "POST", PATH)))

    def _refuse(self, refused: WebhookRefused, sfu: str, answer: Told) -> None:
        services = self._services
        services.hooks.on_webhook(sfu, UNKNOWN, refused.reason.value)
        error = refusal(MatrixError(*((401, "M_UNAUTHORIZED") if refused.unauthorized else (400, "M_BAD_JSON")), refused.sentence))
        if times := self._refused.times(refused.reason.value):
            services.log.warning("webhook_refused", reason=refused.reason.value, sfu=sfu, times=times)
            if refused.reason in _OUT_OF_TIME:
                services.port.hand(Missed(), lambda _: answer(error))
                return
        answer(error)


def _try_again() -> MatrixError:
    """Without a `Retry-After`: LiveKit 1.13 tries five times, and obeys it. By itself it waits longer, for 15 s in all."""
    return MatrixError(503, "M_UNKNOWN", "Nothing can be stored at the moment. Try again later.")
