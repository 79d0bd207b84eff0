"""The two HTTP applications: what everybody may reach, and what only the operator may."""

from aiohttp import web

from sfu_delegate.api.cors import cors
from sfu_delegate.api.delegations import Delegations
from sfu_delegate.api.errors import one_error_shape
from sfu_delegate.api.health import Health
from sfu_delegate.api.services import AdminServices, Hooks, Phase, Readiness, Services, Settings
from sfu_delegate.api.webhooks import PATH, Webhooks

__all__ = ["AdminServices", "Hooks", "Phase", "Readiness", "Services", "Settings", "admin_app", "public_app"]


def public_app(services: Services) -> web.Application:
    """The delegation API and the SFU's webhooks. Described in `docs/openapi.yaml`."""
    app = web.Application(middlewares=[cors(lambda: services.settings().cors_origins), one_error_shape(services.log)])
    delegations = Delegations(services)
    app.router.add_post("/v1/delegations", delegations.delegate)
    app.router.add_get("/v1/delegations/{id}", delegations.show, allow_head=False)
    app.router.add_delete("/v1/delegations/{id}", delegations.withdraw)
    app.router.add_post(PATH, Webhooks(services).receive)
    return app


def admin_app(services: AdminServices) -> web.Application:
    """Health and metrics, each for GET and HEAD. There is no authentication: it must not be reachable from outside."""
    app = web.Application(middlewares=[one_error_shape(services.log)])
    health = Health(services)
    app.router.add_get("/health/live", health.live)
    app.router.add_get("/health/ready", health.ready)
    app.router.add_get("/metrics", health.metrics)
    return app
