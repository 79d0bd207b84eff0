"""Health and metrics, on the admin listener.

`/health/live`: the process answers. `/health/ready`: it can take delegations and webhooks, which needs the database; a homeserver or an SFU that
is down shows in the detail only, since taking the daemon out of service would help nobody.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web
from prometheus_client.exposition import choose_encoder

from sfu_delegate.api.errors import json_response
from sfu_delegate.api.services import AdminServices, Phase, Readiness

READY_TIMEOUT: Final = 5.0  # seconds; whoever asks gives up soon, too
_OK: Final = "ok"


def healthz(stopping: Callable[[], bool]) -> Callable[[web.Request], Awaitable[web.Response]]:
    """`/healthz` on the public listener, for proxies: the process answers, and takes requests. For more there is the admin listener."""

    async def answer(_: web.Request) -> web.Response:
        return json_response({"status": "stopping"}, status=503) if stopping() else json_response({"status": _OK})

    return answer


class Health:
    """Answers the operator's questions."""

    def __init__(self, services: AdminServices) -> None:
        self._services = services

    async def live(self, _: web.Request) -> web.Response:
        """The process lives."""
        return json_response({"status": _OK})

    async def ready(self, _: web.Request) -> web.Response:
        """200 when delegations and webhooks can be taken, else 503; with the detail."""
        readiness = await self._services.readiness(READY_TIMEOUT)
        return json_response(detail_of(readiness), status=200 if is_ready(readiness) else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        """All metrics, as Prometheus reads them."""
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._services.registry), headers={"Content-Type": content_type})


def is_ready(readiness: Readiness) -> bool:
    """Can delegations and webhooks be taken?"""
    return readiness.phase is Phase.RUNNING and not readiness.database


def detail_of(readiness: Readiness) -> dict[str, Any]:
    """What is told of it."""
    down = any(any(conditions.values()) for conditions in (readiness.homeservers, readiness.sfus, readiness.application_services))
    return {
        "status": "unavailable" if not is_ready(readiness) else "degraded" if down else _OK,
        "phase": readiness.phase.value,
        "database": readiness.database or _OK,
        "homeservers": {name: _condition(problem) for name, problem in readiness.homeservers.items()},
        "sfus": {name: _condition(problem) for name, problem in readiness.sfus.items()},
        "application_services": {name: _condition(problem) for name, problem in readiness.application_services.items()},
    }


def _condition(problem: str | None) -> str:
    return "not asked yet" if problem is None else problem or _OK
