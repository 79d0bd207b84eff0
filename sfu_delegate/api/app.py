"""The two HTTP applications: what everybody may reach, and what only the operator may."""

import time
from collections.abc import Awaitable, Callable
from functools import partial

from aiohttp import web

from sfu_delegate.api.admin import Questions, admin_routes
from sfu_delegate.api.admin_access import guarded
from sfu_delegate.api.cors import cors
from sfu_delegate.api.delegations import Delegations
from sfu_delegate.api.errors import one_error_shape
from sfu_delegate.api.health import Health, healthz
from sfu_delegate.api.listener import AtOnce, Soon, Usual
from sfu_delegate.api.matrixrtc import PATHS, MatrixRtc
from sfu_delegate.api.pages import error_form, page_routes
from sfu_delegate.api.service import PATHS as SERVICE_PATHS
from sfu_delegate.api.service import ServiceEndpoints
from sfu_delegate.api.services import AdminServices, Hooks, Phase, Readiness, Services, Settings
from sfu_delegate.api.throttle import Throttle
from sfu_delegate.api.webhooks import PATH, PATH_DEPLOYED, Webhooks

__all__ = ["AdminServices", "Hooks", "Phase", "Public", "Readiness", "Services", "Settings", "admin_app"]


class Public:
    """What everybody may reach: the delegation API, the MatrixRTC endpoints, the SFU's webhooks, and what is for homeservers that have us as an
    application service. Described in `docs/openapi.yaml`.

    `app` answers everything; `usual` has those that are asked most, for the listener, which answers them with less effort if they come as usual.
    """

    def __init__(self, services: Services) -> None:
        throttle = Throttle(time.monotonic)
        webhooks = Webhooks(services)
        self.usual: dict[str, Usual] = {}
        handlers: dict[str, Callable[[web.Request], Awaitable[web.Response]]] = {}
        for prefix, sfu in services.paths.items():
            rtc = MatrixRtc(services, sfu, throttle)
            for endpoint, path in PATHS.items():
                handlers[prefix + path] = partial(rtc.receive, endpoint)
                self.usual[prefix + path] = Soon(partial(rtc.answer, endpoint), lambda: services.settings().max_body)
        self.app = app = web.Application(middlewares=[cors(lambda: services.settings().cors_origins, dict(handlers)), one_error_shape(services.log)])
        for path in [PATH, *(prefix + PATH_DEPLOYED for prefix in dict.fromkeys(["", *services.paths]))]:
            handlers[path] = webhooks.receive
            self.usual[path] = AtOnce(webhooks.take, lambda: services.settings().max_webhook_body)
        for path, handler in handlers.items():
            app.router.add_post(path, handler)
        homeservers = ServiceEndpoints(services, throttle)
        for path, of_service in SERVICE_PATHS.items():
            app.router.add_post(path, partial(homeservers.receive, of_service))
        app.router.add_put("/_matrix/app/v1/transactions/{id}", homeservers.transaction)
        app.router.add_post("/_matrix/app/v1/ping", homeservers.ping)
        for path in ("/_matrix/app/v1/users/{id}", "/_matrix/app/v1/rooms/{alias}"):
            app.router.add_get(path, homeservers.nobody, allow_head=False)
        delegations = Delegations(services, throttle)
        app.router.add_post("/v1/delegations", delegations.delegate)
        app.router.add_get("/v1/delegations/{id}", delegations.show, allow_head=False)
        app.router.add_delete("/v1/delegations/{id}", delegations.withdraw)
        for prefix in dict.fromkeys(["", *services.paths]):
            app.router.add_get(f"{prefix}/healthz", healthz(services.stopping))


def admin_app(services: AdminServices) -> web.Application:
    """For operators: health and metrics (each for GET and HEAD), and their API and pages, for those whom `admin_access` lets in."""
    errors = one_error_shape(services.log, error_form(lambda: services.inspection.overview().now))
    app = web.Application(middlewares=[errors, guarded(services.token)])
    health = Health(services)
    app.router.add_get("/health/live", health.live)
    app.router.add_get("/health/ready", health.ready)
    app.router.add_get("/metrics", health.metrics)
    questions = Questions(services)
    for method, path, handler in admin_routes(services, questions):
        app.router.add_route(method, path, handler)
    for path, handler in page_routes(services, questions):
        app.router.add_get(path, handler)
    return app
