"""A real Prometheus scrapes a real daemon, with the configuration, the alerts and the dashboard's queries that operators are given."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from prometheus_client.parser import text_string_to_metric_families
from sfu_delegate.demo.processes import free_ports

from tests.integration.daemon import Site, open_site, until
from tests.monitoring import ALERTS, PROMETHEUS, Query, lookups, needs_prometheus, queries, rules, selectors

UNUSED = {
    "Participants removed from calls",
    "Membership checks",
    "OpenID checks",
    "How long OpenID checks take",
    "MatrixRTC requests by status",
    "Requests to delegate that were refused",
    "Application service, by part",
    "Rate limit in force, and what is used of it",
    "Webhooks that were refused or not stored",
    "Alerts that fire",
    "Alerts",
    "Starts",
}
"""What has nothing to show of a daemon that works, has no application service and is used by /v1/delegations."""


async def a_life(site: Site) -> None:
    """Somebody joins, stays and leaves."""
    alice = await site.participant(delay_ms=3500)
    given = await site.in_call(alice)
    await site.restarted(alice, 2)
    await site.leave(alice)
    await site.done(given)


async def test_every_metric_that_is_asked_for_is_scraped(tmp_path: Path) -> None:
    """By the alerts and by the dashboard; also those that have nothing to tell yet, by their names."""
    async with open_site(tmp_path) as site:
        await a_life(site)

        async def surveyed() -> bool:
            return await site.count("sfu_delegate_database_free_bytes") > 0

        await until(surveyed, "the first look at the disk")
        exposition = (await site.admin("/metrics")).text
        there: set[str] = set()
        for family in text_string_to_metric_families(exposition):
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            there |= {family.name + suffix for suffix in suffixes}
        for expr in [*(rule["expr"] for rule in rules()), *(query.expr for query in queries()), *(selector for _, selector, _ in lookups())]:
            asked = {selector.metric for selector in selectors(expr) if selector.metric.startswith(("sfu_delegate_", "process_"))}
            assert asked <= there, asked - there


class Prometheus:
    """A running one, asked as Grafana does."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url

    async def get(self, path: str, **params: str) -> dict[str, Any]:
        """What it answers; an error of it is an error of the test."""
        async with self._http.get(f"{self._url}{path}", params=params) as response:
            answer: dict[str, Any] = await response.json()
        assert (answer["status"], answer.get("warnings", [])) == ("success", []), (params, answer)
        return answer

    async def ready(self) -> bool:
        with suppress(aiohttp.ClientError):
            async with self._http.get(f"{self._url}/-/ready") as response:
                return response.status == 200
        return False

    async def ask(self, query: Query) -> list[Any]:
        """The series that a panel gets."""
        if query.instant:
            answer = await self.get("/api/v1/query", query=query.expr)
        else:
            now = time.time()
            answer = await self.get("/api/v1/query_range", query=query.expr, start=str(now - 10), end=str(now), step="1")
        found: list[Any] = answer["data"]["result"]
        return found

    async def holds(self, expr: str) -> bool:
        return bool(await self.ask(Query("", expr, instant=True)))

    async def rules(self) -> list[dict[str, Any]]:
        groups = (await self.get("/api/v1/rules"))["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@asynccontextmanager
async def prometheus(tmp_path: Path, target: str) -> AsyncIterator[Prometheus]:
    """With the configuration of config/, in which nothing is changed but the target and the intervals."""
    made = yaml.safe_load(PROMETHEUS.read_text())
    made["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    made["rule_files"] = [str(ALERTS)]
    (job,) = made["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    file, (port,) = tmp_path / "prometheus.yml", free_ports(1)
    file.write_text(yaml.safe_dump(made))
    arguments = [f"--config.file={file}", f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    process = await asyncio.create_subprocess_exec("prometheus", *arguments, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL)
    try:
        async with aiohttp.ClientSession() as http:
            server = Prometheus(http, f"http://127.0.0.1:{port}")
            await until(server.ready, "Prometheus")
            yield server
    finally:
        process.terminate()
        await process.wait()


@needs_prometheus
async def test_a_real_prometheus_gets_answers_to_all_that_is_asked(tmp_path: Path) -> None:
    """Every panel has something to show, every variable something to choose, every alert is evaluated, and none fires."""
    async with open_site(tmp_path) as site, prometheus(tmp_path, f"127.0.0.1:{site.daemon.admin_port}") as server:
        await until(lambda: server.holds('up{job="sfu-delegate"} == 1'), "the first scrape")  # before there is anything to count
        await a_life(site)
        done = "increase(sfu_delegate_disconnect_to_end_seconds_count[1m]) > 0 and on () sfu_delegate_database_free_bytes"
        await until(lambda: server.holds(done), "a departure in Prometheus")

        async def shown() -> bool:  # a series that is new has no rate before its second scrape
            empty = {query.where for query in queries() if not await server.ask(query)}
            print("nothing is shown by", empty - UNUSED)
            return empty <= UNUSED

        await until(shown, "every panel has something to show")
        for variable, selector, label in lookups():
            choices = (await server.get(f"/api/v1/label/{label}/values", **{"match[]": selector}))["data"]
            assert choices, variable

        async def evaluated() -> bool:
            return all(rule["health"] != "unknown" for rule in await server.rules())

        await until(evaluated, "the first evaluation")
        found = await server.rules()
        assert sorted(rule["name"] for rule in found) == sorted(rule["alert"] for rule in rules())
        assert [rule["name"] for rule in found if rule["health"] != "ok"] == []
        assert [rule["name"] for rule in found if rule["state"] == "firing"] == []
