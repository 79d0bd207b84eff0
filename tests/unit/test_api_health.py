"""The operator's questions."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry, Counter
from sfu_delegate.api import health
from sfu_delegate.api.app import Phase, Readiness, admin_app

from tests.engine_port import admin_services


@asynccontextmanager
async def administered(readiness: Readiness, registry: CollectorRegistry | None = None) -> AsyncIterator["TestClient[Any, Any]"]:
    async def ask(within: float) -> Readiness:
        assert within == health.READY_TIMEOUT  # whoever asks is not kept waiting
        return readiness

    async with TestClient(TestServer(admin_app(admin_services(ask, registry)))) as client:
        yield client


RUNNING = Readiness(Phase.RUNNING, homeservers={"example.org": ""}, sfus={"main": ""})


async def test_a_running_daemon_lives_and_is_ready() -> None:
    """200 for both questions."""
    async with administered(RUNNING) as client:
        live = await client.get("/health/live")
        assert (live.status, await live.json()) == (200, {"status": "ok"})
        ready = await client.get("/health/ready")
        assert ready.status == 200
        assert await ready.json() == {
            "status": "ok",
            "phase": "running",
            "database": "ok",
            "homeservers": {"example.org": "ok"},
            "sfus": {"main": "ok"},
            "application_services": {},
        }


@pytest.mark.parametrize(
    "readiness",
    [Readiness(Phase.STARTING), Readiness(Phase.STOPPING), Readiness(Phase.RUNNING, database="The disk is full.")],
)
async def test_a_daemon_that_can_take_nothing_is_not_ready(readiness: Readiness) -> None:
    """503, with the reason; it lives nevertheless."""
    async with administered(readiness) as client:
        response = await client.get("/health/ready")
        body = await response.json()
        assert (response.status, body["status"], body["phase"]) == (503, "unavailable", readiness.phase.value)
        assert body["database"] == (readiness.database or "ok")
        assert (await client.get("/health/live")).status == 200


@pytest.mark.parametrize(
    "readiness",
    [
        Readiness(Phase.RUNNING, homeservers={"example.org": "no answer"}, sfus={"main": ""}),
        Readiness(Phase.RUNNING, homeservers={"example.org": ""}, sfus={"main": "no answer"}),
    ],
)
async def test_others_that_are_down_do_not_take_the_daemon_out_of_service(readiness: Readiness) -> None:
    """A homeserver or an SFU without an answer: 200, and the detail says it."""
    async with administered(readiness) as client:
        response = await client.get("/health/ready")
        body = await response.json()
        assert (response.status, body["status"]) == (200, "degraded")
        assert "no answer" in (*body["homeservers"].values(), *body["sfus"].values())


async def test_metrics() -> None:
    """In the format that the asker understands."""
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc()
    async with administered(RUNNING, registry) as client:
        response = await client.get("/metrics")
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        assert "things_total 1.0" in await response.text()
        response = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert response.headers["Content-Type"].startswith("application/openmetrics-text")
        assert (await response.text()).endswith("# EOF\n")


async def test_head_is_answered_and_errors_have_the_one_shape() -> None:
    """For probes that send HEAD; and unknown paths get a Matrix error."""
    async with administered(RUNNING) as client:
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert (await client.head(path)).status == 200
        response = await client.get("/v1/delegations")
        assert (response.status, (await response.json())["errcode"]) == (404, "M_UNRECOGNIZED")
        assert (await client.post("/metrics")).status == 405
