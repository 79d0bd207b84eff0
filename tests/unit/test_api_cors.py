"""Browsers' access: the headers are on every answer under /v1, and nowhere else."""

import pytest

from tests.engine_port import Bench, delegation, serving

PATH = "/v1/delegations"
PAGE = "https://call.example.org"
PREFLIGHT = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.mark.parametrize("path", [PATH, f"{PATH}/dlg_00000000000000000000000000000000", "/v1/unknown"])
async def test_a_preflight_request(path: str) -> None:
    """Answered without authentication, with what a page may send."""
    async with serving(Bench()) as client:
        response = await client.options(path, headers=PREFLIGHT)
        assert response.status == 204
        assert await response.read() == b""
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert response.headers["Access-Control-Allow-Methods"] == "GET, POST, DELETE, OPTIONS"
        assert response.headers["Access-Control-Allow-Headers"] == "Authorization, Content-Type"
        assert response.headers["Access-Control-Max-Age"] == "3600"
        assert "Access-Control-Allow-Credentials" not in response.headers


async def test_every_answer_can_be_read_by_a_page() -> None:
    """201, 401, 404, 405, 413, 503: without the header each of them would look like a network error."""
    bench = Bench()
    async with serving(bench) as client:
        made = await client.post(PATH, json=delegation(), headers=bench.bearer() | {"Origin": PAGE})
        unauthorized = await client.post(PATH, json=delegation(), headers={"Origin": PAGE})
        unknown = await client.get(f"{PATH}/x", headers=bench.bearer() | {"Origin": PAGE})
        nowhere = await client.get("/v1/nowhere", headers={"Origin": PAGE})
        method = await client.put(PATH, headers={"Origin": PAGE})
        large = await client.post(PATH, data=b" " * 100_000, headers=bench.bearer() | {"Origin": PAGE})
        bench.stopping = True
        stopping = await client.post(PATH, json=delegation(), headers=bench.bearer() | {"Origin": PAGE})
        answers = [made, unauthorized, unknown, nowhere, method, large, stopping]
        assert [answer.status for answer in answers] == [201, 401, 404, 404, 405, 413, 503]
        for answer in answers:
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
            assert answer.headers["Access-Control-Expose-Headers"] == "Retry-After"
            assert "Vary" not in answer.headers


async def test_only_the_configured_pages() -> None:
    """With a list of origins, just those, and caches are told that the answer depends on the origin."""
    bench = Bench()
    bench.configure(cors_origins=(PAGE, "https://other.example.org"))
    async with serving(bench) as client:
        for method in ("OPTIONS", "GET"):
            allowed = await client.request(method, PATH, headers=PREFLIGHT)
            assert (allowed.headers["Access-Control-Allow-Origin"], allowed.headers["Vary"]) == (PAGE, "Origin")
            for headers in ({**PREFLIGHT, "Origin": "https://evil.org"}, {**PREFLIGHT, "Origin": "null"}, {}):
                refused = await client.request(method, PATH, headers=headers)
                assert refused.headers["Vary"] == "Origin"
                assert not [name for name in refused.headers if name.startswith("Access-Control-")]


async def test_not_for_webhooks() -> None:
    """No page has any business there."""
    async with serving(Bench()) as client:
        response = await client.post("/webhooks/livekit", headers={"Origin": PAGE})
        assert not [name for name in response.headers if name.startswith("Access-Control-")]
