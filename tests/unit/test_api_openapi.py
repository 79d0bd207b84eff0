"""`docs/openapi.yaml` is well-formed, complete, and true where a test without requests can tell."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from sfu_delegate import config
from sfu_delegate.api import matrixrtc_body
from sfu_delegate.api.app import Phase, Public, Readiness, Settings, admin_app
from sfu_delegate.api.form import Form
from sfu_delegate.api.matrixrtc import PATHS
from sfu_delegate.api.pages import PATHS as PAGES
from sfu_delegate.api.services import Services
from sfu_delegate.delegation.model import OnEnd, Outcome, Presence, State
from sfu_delegate.livekit import names

from tests.engine_port import Bench, admin_services

DESCRIPTION: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "docs" / "openapi.yaml").read_text(encoding="utf-8"))
SCHEMAS = DESCRIPTION["components"]["schemas"]


def test_it_is_openapi() -> None:
    """By the official schema of OpenAPI 3.1."""
    validate(DESCRIPTION)


def routes(app: web.Application) -> set[tuple[str, str]]:
    return {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None}


def test_every_path_is_described_and_every_described_path_is_there() -> None:
    """No more and no less than the two applications have, but for the pages: they are for people, and no program is promised anything of them."""

    async def ready(_: float) -> Readiness:
        return Readiness(Phase.RUNNING)

    services: Services = Bench().services
    there = routes(Public(services).app) | routes(admin_app(admin_services(ready)))
    there = {(method, path) for method, path in there if path not in PAGES}
    described = {
        (method.upper(), path) for path, item in DESCRIPTION["paths"].items() for method in item if method in ("get", "post", "put", "delete", "head")
    }
    assert there == described


def test_the_matrixrtc_endpoints_are_the_same_under_each_path_prefix() -> None:
    """What a client finds at its `livekit_service_url` is there for each SFU; of the other paths, only `/sfu_webhook` and `/healthz` are."""
    services: Services = Bench(paths={"": "main", "/livekit/jwt": "other"}).services
    prefixed = {path.removeprefix("/livekit/jwt") for _, path in routes(Public(services).app) if path.startswith("/livekit/jwt/")}
    assert prefixed == {*PATHS.values(), "/sfu_webhook", "/healthz"}
    for path in prefixed:
        urls = [server["url"] for server in DESCRIPTION["paths"][path]["servers"]]
        assert urls == ["https://sfu.example.org", "https://sfu.example.org/{prefix}"]


def test_every_matrixrtc_endpoint_has_its_preflight() -> None:
    """Pages ask with OPTIONS before they post."""
    for path in PATHS.values():
        assert {"post", "options"} < set(DESCRIPTION["paths"][path])
    assert DESCRIPTION["paths"]["/get_token"]["options"]["responses"] == DESCRIPTION["paths"]["/delegate_delayed_leave"]["options"]["responses"]


def media() -> Iterator[tuple[str, Any, Any]]:
    """Every schema with each of its examples, by where they are."""

    def walk(node: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(node, dict):
            if "schema" in node and "examples" in node:
                for name, example in node["examples"].items():
                    yield f"{where}/{name}", node["schema"], resolved(example)["value"]
            for key, value in node.items():
                yield from walk(value, f"{where}/{key}")
        elif isinstance(node, list):
            for item in node:
                yield from walk(item, where)

    yield from walk(DESCRIPTION["paths"], "")
    yield from walk(DESCRIPTION["components"]["responses"], "")


def resolved(node: Any) -> Any:
    while "$ref" in node:
        target: Any = DESCRIPTION
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target
    return node


EXAMPLES = list(media())


@pytest.mark.parametrize(("where", "schema", "example"), EXAMPLES, ids=[where for where, _, _ in EXAMPLES])
def test_the_examples_are_valid(where: str, schema: Any, example: Any) -> None:
    """Each example is what its schema asks for."""
    OAS31Validator({**schema, "components": DESCRIPTION["components"]}).validate(example)


def test_every_answer_with_a_body_has_an_example() -> None:
    """Client developers read examples first."""
    for path, item in DESCRIPTION["paths"].items():
        for method, operation in item.items():
            for status, response in operation.get("responses", {}).items() if isinstance(operation, dict) else ():
                contents = resolved(response).get("content", {})
                assert not contents or any(content.get("examples") for content in contents.values()), (path, method, status)


def test_the_words_are_those_of_the_rules() -> None:
    """States, outcomes and presences are complete."""
    event = SCHEMAS["DelayedEvent"]["properties"]
    assert set(event["state"]["enum"]) == {state.value for state in State}
    assert set(event["outcome"]["enum"]) == {outcome.value or None for outcome in Outcome}
    assert set(event["on_disconnect"]["enum"]) == {end.value for end in OnEnd}
    assert set(SCHEMAS["Participant"]["properties"]["presence"]["enum"]) == {presence.value for presence in Presence}


def test_the_limits_are_the_configurations_defaults() -> None:
    """What the description says of ranges, what the API has as defaults, and the configuration agree."""
    settings, delegations, limits = Settings(), config.Delegations(), config.Limits()
    assert settings == Settings(
        max_body=limits.body,
        max_webhook_body=limits.webhook_body,
        min_delay=delegations.min_delay,
        max_delay=delegations.max_delay,
        max_events=delegations.max_events,
        verify_timeout=delegations.verify_timeout,
        allow_scoped_tokens=delegations.allow_scoped_tokens,
        request_timeout=config.Timeouts().request,
        restart_at=config.Restart().at,
        cors_origins=config.Cors().origins,
        other_homeservers=config.MatrixRtc().other_homeservers,
    )
    delay = SCHEMAS["DelayedEventRequest"]["properties"]["delay_ms"]
    assert (delay["minimum"], delay["maximum"]) == (settings.min_delay * 1000, settings.max_delay * 1000)
    assert SCHEMAS["DelegationRequest"]["properties"]["delayed_events"]["maxItems"] == settings.max_events
    timeout = SCHEMAS["DelayTimeout"]
    assert (timeout["minimum"], timeout["maximum"]) == (settings.min_delay * 1000, settings.max_delay * 1000)


def test_the_forms_are_those_of_the_program() -> None:
    """Bodies of the MatrixRTC endpoints: which fields there are, which of them are required, and how long they may be."""
    forms: dict[str, type[Form]] = {
        "GetTokenRequest": matrixrtc_body.GetTokenBody,
        "SfuGetRequest": matrixrtc_body.SfuGetBody,
        "DelegateDelayedLeaveRequest": matrixrtc_body.DelegateBody,
        "OpenIdToken": matrixrtc_body.OpenIdBody,
        "Member": matrixrtc_body.MemberBody,
    }
    for name, form in forms.items():
        fields = form.model_fields
        assert set(SCHEMAS[name]["properties"]) == set(fields), name
        assert set(SCHEMAS[name]["required"]) == {key for key, field in fields.items() if field.is_required()}, name
    assert SCHEMAS["OpenIdToken"]["properties"]["access_token"]["maxLength"] == matrixrtc_body.MAX_TOKEN
    assert SCHEMAS["DeviceId"]["maxLength"] == matrixrtc_body.MAX_NAME
    assert SCHEMAS["Member"]["properties"]["id"]["maxLength"] == matrixrtc_body.MAX_MEMBER_ID


def test_the_test_vectors_for_clients_are_true() -> None:
    """Names that docs/clients.md gives as examples are those that the program derives."""
    text = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
    vectors = re.findall(r"(?m)^\| `(\[.+?\])`.*? \| `([\w+/]{43})` \|$", text)
    assert len(vectors) == 4
    for parts, name in vectors:
        assert names.derived(*json.loads(parts)) == name


def test_it_names_no_place_of_ours() -> None:
    """Only hosts that nobody owns."""
    text = (Path(__file__).parents[2] / "docs" / "openapi.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://([^/\s\"]+)", text)) == {"sfu.example.org", "matrix.example.org", "127.0.0.1:8081"}
