"""`docs/openapi.yaml` and the application say the same: schemathesis makes requests from the one and holds the answers of the other to it."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from aiohttp import web
from hypothesis import HealthCheck, settings
from prometheus_client import CollectorRegistry
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import ignored_auth
from sfu_delegate.api.app import AdminServices, Phase, Readiness, Settings, admin_app, public_app
from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.delegation.model import Task, Verdict
from sfu_delegate.delegation.replies import TooMany
from sfu_delegate.engine import Limits
from sfu_delegate.matrix.management import Scope
from sfu_delegate.matrix.names import is_server_name
from structlog.testing import capture_logs

from tests.engine_port import KEY, NOW, Bench, agrees, delayed, delegation
from tests.webhook_requests import signature

DESCRIPTION = Path(__file__).parents[2] / "docs" / "openapi.yaml"
IDENTITY = "@alice:example.org:DEVICE"
EXAMPLES = 40
QUICK = settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))

schema = schemathesis.openapi.from_path(DESCRIPTION)
clients = schema.include(tag="delegations")
webhooks = schema.include(tag="webhooks")
operation = schema.include(tag="operation")


def answers(task: Task) -> tuple[Verdict, str] | None:
    """A homeserver that knows most events."""
    if task.delay_id == "syd_refused":
        return Verdict.REFUSED, "403 M_FORBIDDEN"
    return (Verdict.NOT_FOUND, "404 M_NOT_FOUND") if len(task.delay_id) % 8 == 5 else agrees(task)


class Served:
    """An application that is served by a thread of its own: schemathesis waits for its answers."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.runners: list[web.AppRunner] = []

    def serve(self, app: web.Application) -> str:
        """Its base URL."""
        return asyncio.run_coroutine_threadsafe(self._serve(app), self.loop).result()

    async def _serve(self, app: web.Application) -> str:
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.runners.append(runner)
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _stop(self) -> None:
        for runner in self.runners:
            await runner.cleanup()

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    running = Served()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    bench = Bench(answers, limits=Limits(max_per_participant=10_000), settings=Settings(verify_timeout=0.1))
    yield bench
    bench.port.close()


@pytest.fixture(scope="module")
def public(served: Served, bench: Bench) -> str:
    return served.serve(public_app(bench.services))


@pytest.fixture(scope="module")
def admin(served: Served, bench: Bench) -> str:
    async def ready(_: float) -> Readiness:
        return Readiness(Phase.RUNNING, homeservers={"example.org": "no answer"}, sfus={"main": ""})

    return served.serve(admin_app(AdminServices(ready, CollectorRegistry(), bench.services.log)))


def possible(case: Any) -> Any:
    """What the description cannot say: a server name is one, and no delay_id is there twice."""
    body = case.body
    if case.meta is not None and case.meta.generation.mode.is_positive and isinstance(body, dict) and "delayed_events" in body:
        if not is_server_name(body["homeserver"]) or len(body["homeserver"]) % 2:
            body["homeserver"] = "example.org"
        for number, event in enumerate(body["delayed_events"]):
            event["delay_id"] = f"{number}{event['delay_id'][1:]}"
    return case


@clients.parametrize()
@QUICK
def test_the_delegation_api_is_as_described(case: schemathesis.Case[Any], public: str, bench: Bench) -> None:
    """Whatever is sent, by whoever: the statuses, the headers and the bodies are those of the description, and nothing wrong is accepted."""
    possible(case)
    case.call_and_validate(base_url=public, headers=bench.bearer(IDENTITY))


def test_what_was_delegated_can_be_seen_and_withdrawn(public: str, bench: Bench) -> None:
    """Along the links of the description: what one request made, the next ones see and take back."""
    seen: set[tuple[str, int]] = set()

    class Clients(clients.as_state_machine()):  # type: ignore[misc]
        def before_call(self, case: schemathesis.Case[Any]) -> None:
            possible(case)

        def get_call_kwargs(self, case: schemathesis.Case[Any]) -> dict[str, Any]:
            return {"base_url": public, "headers": bench.bearer(IDENTITY)}

        def after_call(self, response: schemathesis.Response, case: schemathesis.Case[Any]) -> None:
            seen.add((case.method, response.status_code))

    Clients.run(settings=settings(QUICK, max_examples=6, stateful_step_count=6))
    assert {("POST", 201), ("GET", 200), ("DELETE", 200)} <= seen


@pytest.mark.parametrize(
    ("status", "body", "state"),
    [
        (400, delegation(delayed("syd_refused")), {}),
        (400, delegation(token="full-access"), {"scope": Scope.FULL_ACCESS}),
        (403, delegation(homeserver="other.org"), {}),
        (413, delegation(delayed("x" * 100_000)), {}),
        (429, delegation(), {"error": TooMany("delegations.max_per_participant", 4, "Four are the most.")}),
        (500, delegation(), {"error": RuntimeError()}),
        (503, delegation(), {"error": Unavailable("The disk is full.", 1.5)}),
        (503, delegation(), {"error": Overloaded("Too much to do.", 1.5)}),
        (503, delegation(), {"stopping": True}),
        (503, delegation(token="unknown"), {"scope": Scope.UNKNOWN}),
        (503, delegation(homeserver="unreachable.org"), {}),
    ],
)
def test_the_rare_answers_are_as_described(status: int, body: dict[str, Any], state: dict[str, Any], served: Served) -> None:
    """What no generated request brings about: the statuses and bodies are in the description, too."""
    bench = Bench(answers)
    bench.port.error = state.get("error")
    bench.stopping = state.get("stopping", False)
    bench.scopes.scope = state.get("scope", Scope.SCOPED)
    base_url = served.serve(public_app(bench.services))
    case = schema["/v1/delegations"]["POST"].Case(body=body, media_type="application/json")
    with capture_logs():
        response = case.call_and_validate(base_url=base_url, headers=bench.bearer(IDENTITY), excluded_checks=[not_a_server_error])
    assert response.status_code == status
    bench.port.close()


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (200, b'{"event": "participant_left", "room": {"name": "room"}, "participant": {"identity": "alice"}}', None),
        (200, b'{"event": "track_published"}', None),
        (400, b'{"event": 7}', None),
        (413, b" " * 2_000_000, None),
        (500, b'{"event": "room_started", "room": {"name": "room"}}', RuntimeError()),
        (503, b'{"event": "room_started", "room": {"name": "room"}}', Unavailable("The disk is full.", 1.5)),
    ],
)
def test_the_answers_to_genuine_webhooks_are_as_described(status: int, body: bytes, error: Exception | None, served: Served) -> None:
    """With LiveKit's signature."""
    bench = Bench()
    bench.port.error = error
    base_url = served.serve(public_app(bench.services))
    case = schema["/webhooks/livekit"]["POST"].Case(media_type="application/webhook+json")
    headers = {"Authorization": signature(KEY, body, NOW), "Content-Type": "application/webhook+json"}
    with capture_logs():
        response = requests.post(base_url + "/webhooks/livekit", data=body, headers=headers, timeout=10)
    case.validate_response(response, excluded_checks=[not_a_server_error, ignored_auth])
    assert response.status_code == status
    bench.port.close()


@webhooks.parametrize()
@QUICK
def test_the_webhooks_are_as_described(case: schemathesis.Case[Any], public: str) -> None:
    """Without LiveKit's signature nothing gets through."""
    case.call_and_validate(base_url=public)


@operation.parametrize()
@QUICK
def test_the_admin_listener_is_as_described(case: schemathesis.Case[Any], admin: str) -> None:
    """Health and metrics."""
    case.call_and_validate(base_url=admin)
