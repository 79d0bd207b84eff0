"""The two HTTP applications: what everybody may reach, and what only the operator may."""

import time

from aiohttp import web

from sfu_delegate.api.cors import cors
from sfu_delegate.api.delegations import Delegations
from sfu_delegate.api.errors import one_error_shape
from sfu_delegate.api.health import Health, healthz
from sfu_delegate.api.matrixrtc import MatrixRtc, handlers
from sfu_delegate.api.services import AdminServices, Hooks, Phase, Readiness, Services, Settings
from sfu_delegate.api.throttle import Throttle
from sfu_delegate.api.webhooks import PATH, PATH_DEPLOYED, Webhooks

__all__ = ["AdminServices", "Hooks", "Phase", "Readiness", "Services", "Settings", "admin_app", "public_app"]


def public_app(services: Services) -> web.Application:
    """The delegation API, the MatrixRTC endpoints and the SFU's webhooks. Described in `docs/openapi.yaml`."""
    throttle = Throttle(time.monotonic)
    endpoints = {
        prefix + path: handler for prefix, sfu in services.paths.items() for path, handler in handlers(MatrixRtc(services, sfu, throttle)).items()
    }
    app = web.Application(middlewares=[cors(lambda: services.settings().cors_origins, endpoints), one_error_shape(services.log)])
    delegations = Delegations(services, throttle)
    app.router.add_post("/v1/delegations", delegations.delegate)
    app.router.add_get("/v1/delegations/{id}", delegations.show, allow_head=False)
    app.router.add_delete("/v1/delegations/{id}", delegations.withdraw)
    webhooks = Webhooks(services)
    app.router.add_post(PATH, webhooks.receive)
    for path, handler in endpoints.items():
        app.router.add_post(path, handler)
    for prefix in dict.fromkeys(["", *services.paths]):
        app.router.add_post(prefix + PATH_DEPLOYED, webhooks.receive)
        app.router.add_get(f"{prefix}/healthz", healthz(services.stopping))
    return app


def admin_app(services: AdminServices) -> web.Application:
    """Health and metrics, each for GET and HEAD. There is no authentication: it must not be reachable from outside."""
    app = web.Application(middlewares=[one_error_shape(services.log)])
    health = Health(services)
    app.router.add_get("/health/live", health.live)
    app.router.add_get("/health/ready", health.ready)
    app.router.add_get("/metrics", health.metrics)
    return app
