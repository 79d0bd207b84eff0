"""The alerts and the dashboard are what they should be: each alert fires and stays quiet, and whatever they name exists."""

import json
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring import (
    ALERTS,
    DASHBOARD,
    PROMETHEUS,
    SITE,
    Selector,
    dashboard,
    grouping,
    lookups,
    needs_promtool,
    panels,
    queries,
    rules,
    selectors,
)

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TESTS = ROOT / "tests" / "prometheus" / "alerts_test.yml"
FOREIGN = {"livekit_webhook_dispatch_total": {"status"}, "up": set[str](), "ALERTS": {"alertname", "alertstate", "service", "severity"}}
"""Metrics that are not the daemon's, and their labels."""
OF_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus adds."""


def promtool(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


def headings(page: str) -> list[str]:
    """The anchors of a page's headings."""
    text = re.sub(r"(?ms)^```.*?^```$", "", (DOCS / page).read_text())
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in re.findall(r"(?m)^#+ (.+)$", text)]
    return [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain]


def leads_somewhere(url: str) -> bool:
    """Is it a page of ours, and a heading in it?"""
    page, _, anchor = url.removeprefix(SITE).partition("#")
    file = page.removesuffix(".html") + ".md"
    return url.startswith(SITE) and page.endswith(".html") and (DOCS / file).exists() and (not anchor or anchor in headings(file))


# ── alerts ──


@needs_promtool
def test_prometheus_takes_its_configuration() -> None:
    """With the alerts that it names."""
    checked = promtool("check", "config", PROMETHEUS)
    assert checked.returncode == 0, checked.stderr + checked.stdout
    assert f"{len(rules())} rules found" in checked.stdout


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_before() -> None:
    """All the cases of tests/prometheus/alerts_test.yml."""
    tested = promtool("test", "rules", TESTS)
    assert tested.returncode == 0, tested.stderr + tested.stdout


def cases() -> list[dict[str, Any]]:
    tests: list[dict[str, Any]] = yaml.safe_load(TESTS.read_text())["tests"]
    return tests


def test_no_alert_is_left_out_of_these_cases() -> None:
    """For each there is a case in which it fires, and that same case has a time at which it does not; and there is a healthy day without any."""
    healthy, *others = cases()
    assert healthy["name"] == "a healthy day"
    for check in healthy["promql_expr_test"]:
        assert (check["expr"], check["exp_samples"]) == ('ALERTS{alertstate="firing"}', [])
    both = set()
    for case in others:
        named = [re.fullmatch(r'ALERTS\{alertname="(\w+)",alertstate="firing"\}', check["expr"]) for check in case["promql_expr_test"]]
        (alert,) = {name[1] if name is not None else "" for name in named}
        if {bool(check["exp_samples"]) for check in case["promql_expr_test"]} == {True, False}:
            both.add(alert)
    assert both == {rule["alert"] for rule in rules()}


def test_on_the_healthy_day_everything_is_seen_that_alerts_are_about() -> None:
    """An alert that has nothing to look at is silent, too, and that would say nothing."""
    there = {re.sub(r"\{.*", "", series["series"]) for series in cases()[0]["input_series"]}
    for rule in rules():
        for selector in selectors(rule["expr"]):
            assert selector.metric in there, rule["alert"]


@pytest.mark.slow
@needs_promtool
def test_what_alerts_say_can_be_read(tmp_path: Path) -> None:
    """Their texts, as they come out of the templates; promtool shows them where it had expected none."""
    expected = []
    for case in cases():
        firing = [check for check in case["promql_expr_test"] if check["exp_samples"]]
        if firing:
            (alert,) = re.findall(r'alertname="(\w+)"', firing[0]["expr"])
            wrong = {"eval_time": firing[0]["eval_time"], "alertname": alert, "exp_alerts": []}
            expected.append({"interval": case["interval"], "input_series": case["input_series"], "alert_rule_test": [wrong]})
    file = tmp_path / "texts.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": expected}))
    said = promtool("test", "rules", file).stderr
    texts = re.findall(r"Annotations:\{(.*)\}", said)
    assert len(texts) == len(expected), said
    for text in texts:
        assert not re.search(r"error expanding|<no value>|\{\{|NaN|%!|\\\"\\\"", text), text


def test_each_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    """A severity that can be routed, two sentences, and a link to its own section in docs/alerts.md; these are in the same order, and no more."""
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["labels"]["service"] == "sfu-delegate"
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert not rule["annotations"]["summary"].endswith(".")
        assert rule["annotations"]["description"].endswith(".")
        assert rule["annotations"]["runbook_url"] == f"{SITE}alerts.html#{rule['alert'].lower()}"
        assert leads_somewhere(rule["annotations"]["runbook_url"])
    assert headings("alerts.md")[1:] == [rule["alert"].lower() for rule in rules()]


def test_each_alert_has_a_runbook() -> None:
    """What it means, how to find out why, what to do."""
    sections = re.split(r"(?m)^## ", (DOCS / "alerts.md").read_text())[1:]
    for section in sections:
        assert re.findall(r"(?m)^\*\*(.+?)\*\*", section) == ["What it means.", "How to find out.", "What to do."], section.partition("\n")[0]


def test_the_promises_come_first() -> None:
    """In the alerts as well as on the dashboard; and whoever is dropped before all."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    assert [group["name"].removeprefix("sfu-delegate-") for group in groups] == ["promises", "daemon", "homeservers", "sfus", "clients"]
    assert rules()[0]["alert"] == "PeopleDropped"
    rows = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert [row.partition(":")[0] for row in rows] == ["The two promises", "Homeservers", "SFUs", "Admission", "Database", "Process"]
    assert panels()[0]["title"] == "Dropped while connected"


# ── names ──


def known() -> dict[str, set[str]]:
    """The daemon's metrics as they are scraped, with their labels, from docs/metrics.md, which is generated."""
    found: dict[str, set[str]] = {}
    for name, kind, labels in re.findall(r"(?m)^\| `(\w+)` \| (counter|gauge|histogram|info) \| ([^|]*) \|", (DOCS / "metrics.md").read_text()):
        own = set(re.findall(r"`(\w+)`", labels))
        if kind == "histogram":
            found |= {f"{name}_bucket": own | {"le"}, f"{name}_sum": own, f"{name}_count": own}
        else:
            found[name] = own | ({"version"} if kind == "info" else set())
    return found


def values() -> dict[str, set[str]]:
    """What labels can be, from the same page; not of those that come from the configuration."""
    text = (DOCS / "metrics.md").read_text()
    found: dict[str, set[str]] = {}
    for label, cell in re.findall(r"(?m)^\| `(\w+)` \| [^|]* \| (.*) \|$", text[text.index("| Label | Of | Values |") :]):
        found.setdefault(label, set()).update(re.findall(r"`(\w+)`", cell))
    for label in ("sfu", "homeserver", "status"):
        del found[label]
    return found


def check(where: str, expr: str) -> None:
    """Every metric exists, with the labels and the values that are asked for."""
    metrics, allowed = known() | FOREIGN, values()
    labels = set(OF_PROMETHEUS)
    for selector in selectors(expr):
        assert selector.metric in metrics, f"{where}: {selector.metric}"
        labels |= metrics[selector.metric]
        for label, operator, value in selector.matchers:
            assert label in metrics[selector.metric] | OF_PROMETHEUS, f"{where}: {selector.metric} has no {label}"
            if label in allowed and selector.metric not in FOREIGN and value != ".*":
                words = set(value.split("|")) if operator in ("=~", "!~") else {value}
                assert words <= allowed[label], f"{where}: {label} is never one of {words - allowed[label]}"
    assert grouping(expr) <= labels, f"{where}: {grouping(expr) - labels}"


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_what_an_alert_names_exists(rule: dict[str, Any]) -> None:
    """Metrics, labels and their values, also in its texts."""
    check(rule["alert"], rule["expr"])
    labels = set().union(*((known() | FOREIGN)[selector.metric] for selector in selectors(rule["expr"]))) | OF_PROMETHEUS
    assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= labels


def test_what_the_dashboard_names_exists() -> None:
    """The same of every query, of the legends, and of what its variables look up."""
    for query in queries():
        check(query.where, query.expr)
    for variable, selector, label in lookups():
        check(variable, selector)
        assert label in known()[selectors(selector)[0].metric] | OF_PROMETHEUS
    for panel in panels():
        for target in panel["targets"]:
            labels = set().union(*((known() | FOREIGN)[selector.metric] for selector in selectors(target["expr"]))) | OF_PROMETHEUS
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels, panel["title"]


def test_a_query_is_read_as_it_is_meant() -> None:
    """So that what the tests above find is all there is."""
    expr = 'sum by (a, le) (rate(sfu_delegate_x_total{b=~"c|d",e!="f"}[5m])) / on (g) up{job="sfu-delegate"} > process_y'
    matchers = (("b", "=~", "c|d"), ("e", "!=", "f"))
    assert selectors(expr) == [Selector("sfu_delegate_x_total", matchers), Selector("up", (("job", "=", "-"),)), Selector("process_y", ())]
    assert grouping(expr) == {"a", "le", "g"}


def test_every_metric_is_on_the_dashboard() -> None:
    """Whatever the daemon tells can be seen, but for what is of no use on a curve."""
    shown = {re.sub(r"_(bucket|sum|count)$", "", selector.metric) for query in queries() for selector in selectors(query.expr)}
    all_of_them = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known()}
    assert all_of_them - shown == {"process_virtual_memory_bytes", "sfu_delegate_federation_tls_verified"}


# ── the dashboard ──


@needs_promtool
def test_every_query_of_the_dashboard_parses(tmp_path: Path) -> None:
    """As Prometheus reads them; a rule is a query that has a name."""
    recorded = [{"record": f"panel:{number}", "expr": query.expr} for number, query in enumerate(queries())]
    file = tmp_path / "dashboard.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    checked = promtool("check", "rules", file)
    assert checked.returncode == 0, checked.stderr
    assert f"{len(recorded)} rules found" in checked.stdout


def test_the_dashboards_file_is_as_grafana_exports_it() -> None:
    """So that a change made in Grafana shows as no more than that change."""
    assert DASHBOARD.read_text() == json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


def test_panels_are_numbered_and_fill_their_rows() -> None:
    """One after another from the upper left, none over another, and no hole to their right."""
    all_panels = dashboard()["panels"]
    assert [panel["id"] for panel in all_panels] == list(range(1, len(all_panels) + 1))
    places = [panel["gridPos"] for panel in all_panels]
    lines: dict[int, list[dict[str, int]]] = {}
    for place in places:
        lines.setdefault(place["y"], []).append(place)
    top = 0
    for y, line in lines.items():
        assert y == top
        assert line[0]["x"] == 0
        assert all(left["x"] + left["w"] == right["x"] for left, right in pairwise(line))
        assert line[-1]["x"] + line[-1]["w"] == 24
        (height,) = {place["h"] for place in line}
        top = y + height


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    """A title of its own, a sentence, a unit, a link that leads somewhere, and queries of the chosen Prometheus."""
    assert [other["title"] for other in panels()].count(panel["title"]) == 1
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in ("short", "s", "reqps", "ops", "percentunit", "bytes")
    (link,) = panel["links"]
    assert leads_somewhere(link["url"]), link["url"]
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["datasource"] == chosen
    assert [target["datasource"] for target in panel["targets"]] == [chosen] * len(panel["targets"])
    assert [target["refId"] for target in panel["targets"]] == list("ABC"[: len(panel["targets"])])


def test_the_dashboard_is_nobodys_yet() -> None:
    """No id of an installation, a fixed uid, its links lead somewhere, and the Prometheus is chosen."""
    made = dashboard()
    assert "id" not in made
    assert made["uid"] == "sfu-delegate"
    assert all(leads_somewhere(link["url"]) for link in made["links"])
    assert [variable["name"] for variable in made["templating"]["list"]] == ["datasource", "job", "instance", "homeserver", "sfu"]
    assert not re.search(r'"uid": "(?!sfu-delegate"|\$\{datasource\}"|-- Grafana --")', DASHBOARD.read_text())


KEPT_BY_GRAFANA_ONLY = re.compile(r"/templating/list/\d/definition|/annotations/list/\d/(expr|step|titleFormat|textFormat|tagKeys|useValueForTime)")
"""What is Prometheus' data source's own, which the types of Grafana itself do not know."""


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """What of ours is not in theirs; what they add are defaults."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [found for key, value in ours.items() for found in differences(value, theirs.get(key, "(nothing)"), f"{path}/{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [found for number, (a, b) in enumerate(zip(ours, theirs, strict=True)) for found in differences(a, b, f"{path}/{number}")]
    return [] if ours == theirs and type(ours) is type(theirs) else [path]


def test_grafanas_types_know_everything_in_the_dashboard() -> None:
    """Read into the types that Grafana publishes and written again, nothing is lost: neither a key that it does not know, nor a panel's options."""
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()

    def again(what: dict[str, Any]) -> Any:
        return json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(what)))

    made = dashboard()
    assert [path for path in differences(made, again(made)) if not KEPT_BY_GRAFANA_ONLY.fullmatch(path)] == []
    made["panels"][1]["options"]["colourMode"] = "background"  # what is misspelt would not be noticed otherwise
    assert "/panels/1/options/colourMode" in differences(made, again(made))
