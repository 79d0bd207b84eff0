"""Whatever comes in: clear 4xx, never a 500, nothing stored, and no secret in the answer."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sfu_delegate.api.app import Public
from structlog.testing import capture_logs
from yarl import URL

from tests.engine_port import KEY, NOW, Bench, delayed, delegation
from tests.webhook_requests import PATH, signature

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SECRET = "syd_averysecretdelayid"

visible = st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_categories=["Cc"])
any_text = st.characters(exclude_categories=())
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=True),
    st.text(any_text),
    st.sampled_from(["", "\0", "\ud800", SECRET, "example.org", 2**63, -1, 1e308, "a" * 300]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(any_text, max_size=8), inner),
    max_leaves=8,
)


@st.composite
def spoiled(draw: st.DrawFn, whole: Any) -> Any:
    """A valid document with one part of it replaced, removed or added."""
    document = json.loads(json.dumps(whole))
    part = document
    while isinstance(part, dict | list) and part and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if not isinstance(part[key], dict | list) or not part[key]:
            break
        part = part[key]
    if isinstance(part, list):
        part[draw(st.integers(0, len(part) - 1))] = draw(values)
    else:
        key = draw(st.sampled_from(sorted(part)) | st.text(max_size=8))
        if draw(st.booleans()):
            part.pop(key, None)
        else:
            part[key] = draw(values)
    return document


def encoded(document: Any) -> bytes:
    return json.dumps(document).encode()


class Loop:
    """A client of one application, for tests that are no coroutines: hypothesis calls them many times."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.loop = asyncio.new_event_loop()
        self.client: TestClient[Any, Any] = self.run(self._start)

    async def _start(self) -> "TestClient[Any, Any]":
        client: TestClient[Any, Any] = TestClient(TestServer(Public(self.bench.services).app))
        await client.start_server()
        return client

    def run(self, what: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
        return self.loop.run_until_complete(what(*args))

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        async def send() -> tuple[int, str]:
            async with self.client.post(path, data=body, headers=headers) as response:
                return response.status, await response.text()

        with capture_logs() as logs:
            status, text = self.run(send)
        assert not [line for line in logs if line["event"] not in ("webhook_refused", "delegation_refused")]
        return status, text

    def stop(self) -> None:
        self.run(self.client.close)
        self.run(self.bench.port.settled)
        self.bench.port.close()
        self.loop.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    running = Loop()
    yield running
    running.stop()


def check_error(status: int, text: str) -> None:
    assert 400 <= status < 500
    body = json.loads(text)
    assert body["errcode"].startswith("M_")
    assert body["error"].endswith(".")
    assert SECRET not in text


@given(body=st.binary(max_size=200) | values.map(encoded))
@QUICK
def test_arbitrary_bodies_are_no_delegations(loop: Loop, body: bytes) -> None:
    """Any bytes and any JSON: an error, and no row."""
    check_error(*loop.post("/v1/delegations", body, loop.bench.bearer()))
    assert not loop.bench.port.given


@given(body=spoiled(delegation(delayed(SECRET), delayed("syd_b", 60_000, on_disconnect="cancel"))))
@QUICK
def test_spoiled_delegations_store_nothing(loop: Loop, body: Any) -> None:
    """One thing is wrong in a good body: an error and no row, or it was still good, and then there are exactly its events."""
    rows = len(loop.bench.port.rows())
    status, text = loop.post("/v1/delegations", encoded(body), loop.bench.bearer())
    if status in (200, 201):
        known = {row.delay_id for row in loop.bench.port.rows()}
        assert known >= {event["delay_id"] for event in body["delayed_events"]}
    else:
        check_error(status, text)
        assert len(loop.bench.port.rows()) == rows


@given(token=st.text(visible, max_size=60), scheme=st.sampled_from(["", "Bearer ", "bearer  ", "Basic "]))
@QUICK
def test_arbitrary_tokens_open_nothing(loop: Loop, token: str, scheme: str) -> None:
    """401, whatever is in the header."""
    status, text = loop.post("/v1/delegations", encoded(delegation(delayed(SECRET))), {"Authorization": scheme + token})
    assert status == 401
    check_error(status, text)
    assert not loop.bench.port.given


@given(id=st.text(min_size=1, max_size=40))
@QUICK
def test_arbitrary_ids_are_not_found(loop: Loop, id: str) -> None:
    """404 for every path of that form, and for those that the path then has another form of."""

    async def get() -> tuple[int, str]:
        url = URL("/v1/delegations") / id.encode("utf-8", "replace").decode() if id not in (".", "..") and "/" not in id else URL("/v1/delegations/x")
        async with loop.client.get(url, headers=loop.bench.bearer()) as response:
            return response.status, await response.text()

    status, text = loop.run(get)
    assert status == 404
    check_error(status, text)


@given(body=st.binary(max_size=200) | values.map(encoded))
@QUICK
def test_arbitrary_signed_webhooks_are_harmless(loop: Loop, body: bytes) -> None:
    """Properly signed by our SFU, and any bytes or JSON: 400, or 200 without effect."""
    status, text = loop.post(PATH, body, {"Authorization": signature(KEY, body, NOW)})
    if status == 200:
        assert isinstance(json.loads(body), dict)
    else:
        assert status == 400
        check_error(status, text)
    assert not loop.bench.port.rows()


LEFT = {
    "event": "participant_left",
    "id": "EV_1",
    "createdAt": "1760000000",
    "room": {"sid": "RM_1", "name": "room", "turnPassword": SECRET},
    "participant": {"sid": "PA_1", "identity": "alice", "joinedAtMs": "1760000000000", "disconnectReason": "CLIENT_INITIATED"},
}


@given(event=spoiled(LEFT))
@QUICK
def test_spoiled_webhooks_are_harmless(loop: Loop, event: Any) -> None:
    """One thing is wrong in a genuine webhook: taken, forgotten, or refused with 400; never a failure here, and never a row."""
    body = encoded(event)
    status, text = loop.post(PATH, body, {"Authorization": signature(KEY, body, NOW)})
    assert status in (200, 400)
    if status == 400:
        check_error(status, text)
    assert not loop.bench.port.rows()


@given(body=st.binary(max_size=200), header=st.text(visible, max_size=100))
@QUICK
def test_arbitrary_signatures_are_refused(loop: Loop, body: bytes, header: str) -> None:
    """401, and the database is not touched."""
    status, text = loop.post(PATH, body, {"Authorization": header})
    assert status == 401
    check_error(status, text)
    assert not loop.bench.port.given
