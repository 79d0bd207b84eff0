"""`docs/openapi.yaml` and the application say the same: schemathesis makes requests from the one and holds the answers of the other to it."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests
import schemathesis
from aiohttp import web
from hypothesis import HealthCheck, settings
from prometheus_client import CollectorRegistry
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import ignored_auth
from sfu_delegate.api.app import Phase, Public, Readiness, Settings, admin_app
from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.api.services import AdminServices, Probe, Probes
from sfu_delegate.delegation.model import Task, Verdict
from sfu_delegate.delegation.replies import TooMany
from sfu_delegate.engine import Limits
from sfu_delegate.livekit.room_service import SfuUnavailable, Trouble
from sfu_delegate.matrix.management import Scope
from sfu_delegate.matrix.names import is_server_name
from sfu_delegate.matrix.openid import OpenIdUnavailable
from structlog.testing import capture_logs

from tests.engine_port import KEY, NOW, Bench, Inspected, admin_services, agrees, delayed, delegation
from tests.webhook_requests import signature

DESCRIPTION = Path(__file__).parents[2] / "docs" / "openapi.yaml"
IDENTITY = "@alice:example.org:DEVICE"
ALICE = "@alice:example.org"  # of a homeserver that is served
EVE = "@eve:other.org"  # of another one
USERS: dict[str, str | Exception] = {"alices": ALICE, "eves": EVE, "nobody-answers": OpenIdUnavailable("no answer in time")}
EXAMPLES = 40
QUICK = settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))

schema = schemathesis.openapi.from_path(DESCRIPTION)
clients = schema.include(tag="delegations")
matrixrtc = schema.include(tag="matrixrtc")
webhooks = schema.include(tag="webhooks")
operation = schema.include(tag="operation")
operators = schema.include(tag="operators")


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

    def close(self, bench: Bench) -> None:
        """What the bench still does comes to its end; then its database is closed."""
        asyncio.run_coroutine_threadsafe(bench.port.settled(), self.loop).result()
        bench.port.close()

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
def bench(served: Served) -> Iterator[Bench]:
    bench = Bench(answers, limits=Limits(max_per_participant=10_000), settings=Settings(verify_timeout=0.1))
    bench.vouchers.users.update(USERS)
    yield bench
    served.close(bench)


@pytest.fixture(scope="module")
def public(served: Served, bench: Bench) -> str:
    return served.serve(Public(bench.services).app)


@pytest.fixture(scope="module")
def admin(served: Served, bench: Bench) -> str:
    async def ready(_: float) -> Readiness:
        return Readiness(Phase.RUNNING, homeservers={"example.org": "no answer"}, sfus={"main": ""})

    return served.serve(admin_app(admin_services(ready)))


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


def vouched(case: Any) -> Any:
    """What the description cannot say: server names are some, and tokens are somebody's. Two thirds of the valid bodies come from users who exist."""
    body = case.body
    if case.meta is None or not case.meta.generation.mode.is_positive or not isinstance(body, dict):
        return case
    openid = body["openid_token"]
    user, token = [(ALICE, "alices"), (EVE, "eves"), ("", "")][len(openid["access_token"]) % 3]
    if user:
        openid |= {"access_token": token, "matrix_server_name": user.partition(":")[2]}
        if "member" in body:
            body["member"]["claimed_user_id"] = user
    elif not is_server_name(openid["matrix_server_name"]):
        openid["matrix_server_name"] = "example.org"
    if user == EVE and body.get("delay_id") is not None and case.path != "/delegate_delayed_leave":
        # She cannot delegate, and to say so with 400 is meant to look like a mistake of hers.
        openid |= {"access_token": "alices", "matrix_server_name": "example.org"}
        if "member" in body:
            body["member"]["claimed_user_id"] = ALICE
    return case


@matrixrtc.parametrize()
@QUICK
def test_the_matrixrtc_endpoints_are_as_described(case: schemathesis.Case[Any], public: str) -> None:
    """Whatever is sent, by users of served homeservers, of others, and by nobody: the answers are those of the description."""
    vouched(case)
    case.call_and_validate(base_url=public)


def get_token(user: str = ALICE, token: str = "alices", **more: Any) -> dict[str, Any]:
    """The body of `POST /get_token`."""
    return {
        "room_id": "!room:example.org",
        "slot_id": "m.call#ROOM",
        "openid_token": {"access_token": token, "matrix_server_name": user.partition(":")[2], "token_type": "Bearer", "expires_in": 3600},
        "member": {"id": "member", "claimed_user_id": user, "claimed_device_id": "DEVICE"},
        **more,
    }


def sfu_get(token: str = "alices", server: str = "example.org", **more: Any) -> dict[str, Any]:
    """The body of `POST /sfu/get`."""
    return {
        "room": "!room:example.org",
        "openid_token": {"access_token": token, "matrix_server_name": server},
        "device_id": "DEVICE",
        **more,
    }


DELAY: dict[str, Any] = {"delay_id": "syd_abcdefghijklmnopqrst", "delay_timeout": 3_600_000, "delay_cs_api_url": "https://matrix.example.org"}
FULL = TooMany("delegations.max_per_participant", 4, "Four are the most.")


@pytest.mark.parametrize(
    ("path", "status", "body", "state"),
    [
        ("/get_token", 200, get_token(), {}),
        ("/get_token", 200, get_token(**DELAY), {}),
        ("/get_token", 200, get_token(delay_id=None, delay_timeout=None), {}),
        ("/get_token", 200, get_token(EVE, "eves"), {}),
        ("/get_token", 400, get_token(EVE, "eves", **DELAY), {}),
        ("/get_token", 400, get_token(delay_id="syd_abcdefghijklmnopqrst"), {}),
        ("/get_token", 400, get_token(**{**DELAY, "delay_timeout": 18_000}), {}),
        ("/get_token", 400, get_token(**DELAY), {"stopping": True}),
        ("/get_token", 400, get_token(**DELAY), {"error": FULL}),
        ("/get_token", 400, get_token(**DELAY), {"error": Unavailable("The disk is full.", 1.5)}),
        ("/get_token", 401, get_token(token="unknown"), {}),
        ("/get_token", 401, get_token(EVE, "alices"), {}),
        ("/get_token", 403, get_token(EVE, "eves"), {"settings": {"other_homeservers": False}}),
        ("/get_token", 413, get_token(room_id="x" * 100_000), {}),
        ("/get_token", 429, get_token(), {"settings": {"client_rate": 0.001}, "before": 1}),
        ("/get_token", 429, get_token(), {"settings": {"user_rate": 0.001}, "before": 1}),
        ("/get_token", 500, get_token(), {"room": SfuUnavailable("It does not answer.", Trouble.TIMEOUT)}),
        ("/get_token", 500, get_token(), {"room": RuntimeError()}),
        ("/get_token", 503, get_token(token="nobody-answers"), {}),
        ("/sfu/get", 200, sfu_get(), {}),
        ("/sfu/get", 200, sfu_get(**DELAY), {}),
        ("/sfu/get", 200, sfu_get("eves", "other.org"), {}),
        ("/sfu/get", 400, sfu_get("eves", "other.org", **DELAY), {}),
        ("/sfu/get", 401, sfu_get("unknown"), {}),
        ("/sfu/get", 429, sfu_get(), {"settings": {"user_rate": 0.001}, "before": 1}),
        ("/sfu/get", 500, sfu_get(), {"room": SfuUnavailable("It does not answer.", Trouble.TIMEOUT)}),
        ("/sfu/get", 503, sfu_get("nobody-answers"), {}),
        ("/delegate_delayed_leave", 200, get_token(**DELAY), {}),
        ("/delegate_delayed_leave", 400, get_token(), {}),
        ("/delegate_delayed_leave", 400, get_token(delay_id=None, delay_timeout=None), {}),
        ("/delegate_delayed_leave", 400, get_token("@a:unreachable.org", "as", **DELAY), {}),
        ("/delegate_delayed_leave", 401, get_token(token="unknown", **DELAY), {}),
        ("/delegate_delayed_leave", 403, get_token(EVE, "eves", **DELAY), {}),
        ("/delegate_delayed_leave", 429, get_token(**DELAY), {"settings": {"client_rate": 0.001}, "before": 1}),
        ("/delegate_delayed_leave", 429, get_token(**DELAY), {"error": FULL}),
        ("/delegate_delayed_leave", 500, get_token(**DELAY), {"error": RuntimeError()}),
        ("/delegate_delayed_leave", 503, get_token(token="nobody-answers", **DELAY), {}),
        ("/delegate_delayed_leave", 503, get_token(**DELAY), {"stopping": True}),
        ("/delegate_delayed_leave", 503, get_token(**DELAY), {"error": Overloaded("Too much to do.", 1.5)}),
    ],
)
def test_answers_to_matrixrtc_clients_are_as_described(path: str, status: int, body: dict[str, Any], state: dict[str, Any], served: Served) -> None:
    """Each way in which a request of a real client can end has its status and its body in the description."""
    bench = Bench(answers, settings=Settings(**state.get("settings", {})))
    bench.vouchers.users |= {**USERS, "as": "@a:unreachable.org"}
    bench.port.error = state.get("error")
    bench.rooms.error = state.get("room")
    bench.stopping = state.get("stopping", False)
    base_url = served.serve(Public(bench.services).app)
    case = schema[path]["POST"].Case(body=body, media_type="application/json")
    with capture_logs():
        for _ in range(state.get("before", 0)):
            assert case.call(base_url=base_url).status_code == 200
        response = case.call_and_validate(base_url=base_url, excluded_checks=[not_a_server_error])
    assert response.status_code == status
    if status == 400:
        assert response.json()["errcode"] == "M_BAD_JSON"
    served.close(bench)


def test_an_empty_probe_is_answered_as_described(public: str) -> None:
    """The question by which Element Call finds out whether it may delegate: anything but 404, which a page may read."""
    response = requests.post(f"{public}/delegate_delayed_leave", headers={"Origin": "https://call.example.org"}, timeout=10)
    case = schema["/delegate_delayed_leave"]["POST"].Case(media_type="application/json")
    case.validate_response(response)
    assert (response.status_code, response.json()["errcode"]) == (400, "M_NOT_JSON")
    assert response.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("path", ["/get_token", "/sfu/get", "/delegate_delayed_leave"])
def test_the_preflight_has_the_headers_that_are_described(path: str, public: str) -> None:
    """By default all of them are there; the description cannot demand it, since the operator may narrow the origins."""
    case = schema[path]["OPTIONS"].Case()
    response = case.call_and_validate(base_url=public)
    described = schema.raw_schema["paths"][path]["options"]["responses"]["200"]["headers"]
    assert response.status_code == 200
    assert set(described) <= {name.title() for name in response.headers}


def test_a_service_that_stops_says_so(served: Served) -> None:
    """A proxy that asks `/healthz` sends clients elsewhere in time."""
    bench = Bench()
    bench.stopping = True
    response = (
        schema["/healthz"]["GET"].Case().call_and_validate(base_url=served.serve(Public(bench.services).app), excluded_checks=[not_a_server_error])
    )
    assert response.status_code == 503
    served.close(bench)


def test_the_delegation_api_is_limited_by_client(served: Served) -> None:
    """One address cannot keep the service busy: 429, as described."""
    bench = Bench(answers, settings=Settings(client_rate=0.001))
    base_url = served.serve(Public(bench.services).app)
    case = schema["/v1/delegations"]["POST"].Case(body=delegation(), media_type="application/json")
    # A check of schemathesis asks without a token, which is one more request of this address.
    statuses = [
        case.call_and_validate(base_url=base_url, headers=bench.bearer(IDENTITY), excluded_checks=[ignored_auth]).status_code for _ in range(2)
    ]
    assert statuses == [201, 429]
    served.close(bench)


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
    base_url = served.serve(Public(bench.services).app)
    case = schema["/v1/delegations"]["POST"].Case(body=body, media_type="application/json")
    with capture_logs():
        response = case.call_and_validate(base_url=base_url, headers=bench.bearer(IDENTITY), excluded_checks=[not_a_server_error])
    assert response.status_code == status
    served.close(bench)


@pytest.mark.parametrize("path", ["/webhooks/livekit", "/sfu_webhook"])
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
def test_the_answers_to_genuine_webhooks_are_as_described(path: str, status: int, body: bytes, error: Exception | None, served: Served) -> None:
    """With LiveKit's signature, by either name of the path."""
    bench = Bench()
    bench.port.error = error
    base_url = served.serve(Public(bench.services).app)
    case = schema[path]["POST"].Case(media_type="application/webhook+json")
    headers = {"Authorization": signature(KEY, body, NOW), "Content-Type": "application/webhook+json"}
    with capture_logs():
        response = requests.post(base_url + path, data=body, headers=headers, timeout=10)
    case.validate_response(response, excluded_checks=[not_a_server_error, ignored_auth])
    assert response.status_code == status
    served.close(bench)


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


ADMIN_TOKEN = "the-admin-token"
BEARER = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
PROBE_ROOM = "sfu-delegate-doctor-1"


class Administered:
    """A daemon with delegations, and its admin listeners, one with a token and one without."""

    def __init__(self, served: Served, directory: Path) -> None:
        self.bench = Bench(answers, database=str(directory / "delegations.db"))
        self.inspected = Inspected(self.bench.port)
        probes = Probes()
        probes.heard(PROBE_ROOM, Probe(NOW, "main", "room_started"))
        base_url = served.serve(Public(self.bench.services).app)
        self.ids = [
            requests.post(
                f"{base_url}/v1/delegations",
                json=delegation(delayed(f"syd_number_{number:020}"), delayed(f"syd_second_{number:020}")),
                headers=self.bench.bearer(f"@user{number}:example.org:DEVICE"),
                timeout=10,
            ).json()["id"]
            for number in range(4)
        ]

        def listener(token: str | None) -> str:
            services = AdminServices(ready, CollectorRegistry(), self.bench.services.log, self.inspected, self.bench.port, probes, token)
            return served.serve(admin_app(services))

        async def ready(_: float) -> Readiness:
            return Readiness(Phase.RUNNING, homeservers={"example.org": ""}, sfus={"main": "no answer"})

        self.guarded, self.open = listener(ADMIN_TOKEN), listener(None)


@pytest.fixture(scope="module")
def administered(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Administered]:
    made = Administered(served, tmp_path_factory.mktemp("administered"))
    yield made
    served.close(made.bench)


def wanted(case: Any, ids: list[str]) -> Any:
    """What the description cannot say: explanations are of a room or a user. Most of the ids are those of delegations, or of their rows."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return case
    if case.path.endswith("/explain") and not {"room", "user"} & set(case.query or {}):
        case.query = {**(case.query or {}), "user": "@user1:example.org"}
    if "id" in (case.path_parameters or {}):
        given = case.path_parameters["id"]
        case.path_parameters["id"] = given if len(given) % 4 == 0 else ids[len(given) % 3] if given.startswith("dlg") else str(1 + len(given) % 6)
    return case


@operators.parametrize()
@QUICK
def test_the_operators_api_is_as_described(case: schemathesis.Case[Any], administered: Administered) -> None:
    """Whatever is asked, with the token: statuses, headers and bodies are those of the description, and what is not understood is refused."""
    wanted(case, administered.ids)
    with capture_logs():
        case.call_and_validate(base_url=administered.guarded, headers=BEARER)


@pytest.mark.parametrize("operation_id", ["adminStatus", "adminDelegations", "adminDelegation", "adminRooms", "adminExplain", "adminWebhooks"])
@pytest.mark.parametrize("who", ["token", "password", "nobody", "stranger", "unguarded", "by name"])
def test_questions_are_answered_as_described_to_whoever_may_ask(operation_id: str, who: str, administered: Administered) -> None:
    """With something to tell in each answer; and to those who may not, as described too."""
    operation = schema.find_operation_by_id(operation_id)
    ids: dict[str, str] = {"adminDelegation": {"id": administered.ids[3]}, "adminWebhooks": {"room": PROBE_ROOM}}.get(operation_id, {})
    queries: dict[str, dict[str, Any]] = {"adminDelegations": {"limit": 1}, "adminRooms": {"limit": 1}, "adminExplain": {"room": "room"}}
    query = queries.get(operation_id, {})
    case = operation.Case(path_parameters=ids, query=query)
    base_url = administered.open if who in ("unguarded", "by name") else administered.guarded
    headers = {
        "token": BEARER,
        "password": {"Authorization": aiohttp.encode_basic_auth("operator", ADMIN_TOKEN)},
        "stranger": {"Authorization": "Bearer wrong"},
        "by name": {"Host": "evil.example"},
    }.get(who, {})
    response = case.call_and_validate(base_url=base_url, headers=headers, excluded_checks=[ignored_auth])
    assert response.status_code == {"nobody": 401, "stranger": 401, "by name": 403}.get(who, 200)
    if response.status_code == 200:
        kept = {
            "adminDelegations": "events",
            "adminRooms": "rooms",
            "adminExplain": "participants",
            "adminWebhooks": "webhooks",
            "adminStatus": "causes",
        }
        assert response.json()[kept.get(operation_id, "story")]


@pytest.mark.parametrize("operation_id", ["adminEnd", "adminRelease"])
@pytest.mark.parametrize(
    ("id", "guarded", "headers", "status"), [(0, True, BEARER, 200), (1, True, {}, 401), (1, False, {}, 403), (None, True, BEARER, 404)]
)
def test_changes_are_answered_as_described(
    operation_id: str, id: int | None, guarded: bool, headers: dict[str, str], status: int, administered: Administered
) -> None:
    """To whoever proves that it may, and to others."""
    case = schema.find_operation_by_id(operation_id).Case(path_parameters={"id": "999999" if id is None else administered.ids[id]})
    base_url = administered.guarded if guarded else administered.open
    with capture_logs():
        response = case.call_and_validate(base_url=base_url, headers=headers, excluded_checks=[ignored_auth])
    assert response.status_code == status


@pytest.mark.parametrize("operation_id", ["adminDelegations", "adminDelegation", "adminRooms", "adminExplain", "adminEnd"])
def test_a_database_that_cannot_be_asked_is_told_as_described(operation_id: str, administered: Administered, monkeypatch: pytest.MonkeyPatch) -> None:
    """503, with when to try again."""
    monkeypatch.setattr(administered.inspected, "error", Unavailable("The disk is broken.", 2.0))
    ids = {"id": "1"} if operation_id in ("adminDelegation", "adminEnd") else {}
    case = schema.find_operation_by_id(operation_id).Case(path_parameters=ids, query={"room": "room"} if operation_id == "adminExplain" else {})
    response = case.call_and_validate(base_url=administered.guarded, headers=BEARER, excluded_checks=[not_a_server_error, ignored_auth])
    assert response.status_code == 503
    assert "The disk is broken." in response.json()["error"]
