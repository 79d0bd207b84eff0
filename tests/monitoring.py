"""What Prometheus and Grafana are given by config/: the alerts, the dashboard, and the queries in both."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import yaml

CONFIG = Path(__file__).parents[1] / "config"
PROMETHEUS = CONFIG / "prometheus.yml"
ALERTS = CONFIG / "alerts.yml"
DASHBOARD = CONFIG / "grafana-dashboard.json"
SITE = "https://sfu-delegate.example/docs/"
"""Where the links of both begin, until an operator says otherwise."""

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool (Debian: prometheus)")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no prometheus")

VARIABLES = {
    "$__rate_interval": "1m",
    "$__range": "1h",
    "$job": ".*",
    "$instance": ".*",
    "$homeserver": ".*",
    "$sfu": ".*",
}
"""What Grafana puts into the queries."""


class Query(NamedTuple):
    """A query, and where it stands."""

    where: str
    expr: str
    instant: bool


def rules() -> list[dict[str, Any]]:
    """The alerts, in their order."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    """As it is imported."""
    return cast("dict[str, Any]", json.loads(DASHBOARD.read_text()))


def panels() -> list[dict[str, Any]]:
    """All but the rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> Iterator[Query]:
    """All that the dashboard asks, with its variables replaced."""
    for panel in panels():
        for target in panel["targets"]:
            yield Query(panel["title"], replaced(target["expr"]), target["instant"])
    for annotation in dashboard()["annotations"]["list"]:
        if "expr" in annotation:
            yield Query(annotation["name"], replaced(annotation["expr"]), instant=False)


def lookups() -> Iterator[tuple[str, str, str]]:
    """What the dashboard's variables look up: (variable, selector, label)."""
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert found is not None, variable["name"]
            yield variable["name"], replaced(found[1]), found[2]


def replaced(expr: str) -> str:
    for variable, value in VARIABLES.items():
        expr = re.sub(re.escape(variable) + r"\b", value, expr)
    assert "$" not in expr, expr
    return expr


class Selector(NamedTuple):
    """A metric as it is named in a query, with its conditions."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]  # label, operator, value


_SELECTOR = re.compile(r"\b((?:sfu_delegate|process|livekit)_\w+|ALERTS|up)\b(?:\{([^}]*)\})?")


def selectors(expr: str) -> list[Selector]:
    """The metrics in a query, where strings hold no braces."""
    found = []
    for name, conditions in _SELECTOR.findall(expr.replace('"sfu-delegate"', '"-"')):
        matchers = re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', conditions)
        found.append(Selector(name, tuple(matchers)))
    assert found, expr
    return found


def grouping(expr: str) -> set[str]:
    """The labels that a query groups or joins by."""
    return {label.strip() for labels in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expr) for label in labels.split(",") if label.strip()}
