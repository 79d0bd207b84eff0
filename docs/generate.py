"""Writes the tables of docs/configuration.md, docs/metrics.md and docs/alerts.md from the program itself: `.venv/bin/python docs/generate.py`.

What stands between a page's two markers is written anew, and the rest of the page is left as it is. A test fails when a page is stale.
It must never start anything of the daemon: it reads the model of the configuration, and asks an unused registry of metrics what it has.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from annotated_types import Ge, Gt, Le, Lt
from prometheus_client.metrics import MetricWrapperBase
from pydantic import PlainSerializer
from pydantic.fields import FieldInfo
from sfu_delegate.api import service, webhooks
from sfu_delegate.api.matrixrtc import Endpoint
from sfu_delegate.config import Config, DepartureRule, Homeserver, Section, Sfu, format_duration, format_size
from sfu_delegate.delegation.model import Action, Lane, Presence, State, Verdict
from sfu_delegate.delegation.policy import DEPARTURES, Unasked
from sfu_delegate.livekit.webhook import EVENTS
from sfu_delegate.matrix.service import Part
from sfu_delegate.observe.metrics import ENDED, REASONS, Metrics
from sfu_delegate.store.base import Disk

DOCS: Final = Path(__file__).parent
BEGIN: Final = "<!-- begin: written by docs/generate.py -->"
END: Final = "<!-- end: written by docs/generate.py -->"

_REQUIRED: Final = "*required*"
_AS_ABOVE: Final = "as in the table above; for a reason that is not in it, as `OTHER`"
_ITEMS: Final[dict[str, tuple[type[Section], str]]] = {"sfus": (Sfu, "sfus.<name>"), "homeservers": (Homeserver, "homeservers[]")}


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield _row(head)
    yield "|" + "---|" * len(head)
    yield from (_row(row) for row in rows)
    yield ""


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _prose(text: str) -> str:
    """A description as Markdown: outside of its `code`, nothing of it is markup."""
    parts = text.split("`")
    return "`".join(part if number % 2 else part.replace("<", "&lt;").replace("*", "\\*") for number, part in enumerate(parts))


# ── the configuration ──


def configuration() -> str:
    """All keys of the configuration with their defaults, in the order of the example."""
    lines: list[str] = []
    for name, field in Config.model_fields.items():
        text = _prose(field.description or "")
        if name == "departures":
            lines += [f"## {name}", "", text, "", *_departures(), *_keys(DepartureRule, "departures.<REASON>")]
        elif name in _ITEMS:
            section, prefix = _ITEMS[name]
            lines += [f"## {name}", "", text, "", *_keys(section, prefix)]
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            lines += [f"## {name}", "", text, "", *_keys(field.annotation, name)]
        else:
            lines += [f"## {name}", "", text, "", *_table(("Key", "Default"), [(_code(name), _code(_flow(field.default)))])]
    return "\n".join(lines).rstrip("\n")


def _keys(section: type[Section], prefix: str) -> Iterator[str]:
    defaults = section.model_construct().model_dump(mode="json", warnings=False)
    rows = []
    for name, field in section.model_fields.items():
        default = (
            _AS_ABOVE
            if section is DepartureRule
            else _REQUIRED
            if field.is_required()
            else "not set"
            if field.default is None
            else _code(_flow(defaults[name]))
        )
        if not field.is_required() and field.default in ({}, ()):
            default = "none"
        allowed = _allowed(field)
        meaning = f"{_prose(field.description or '')} {f'Allowed: {allowed}.' if allowed else ''}".strip()
        rows.append((_code(f"{prefix}.{name}"), default, meaning))
    yield from _table(("Key", "Default", "Meaning"), rows)


def _allowed(field: FieldInfo) -> str:
    """The limits of a number, in its unit; empty where there are none worth telling."""
    serializers: set[object] = {m.func for m in field.metadata if isinstance(m, PlainSerializer)}

    def shown(bound: Any) -> str:
        if format_duration in serializers:
            return format_duration(float(bound))
        return format_size(int(bound)) if format_size in serializers else f"{bound}"

    least, most = "", ""
    for limit in field.metadata:
        match limit:
            case Ge(ge=bound):
                least = f"at least {shown(bound)}"
            case Gt(gt=bound):
                least = f"more than {shown(bound)}"
            case Le(le=bound):
                most = f"at most {shown(bound)}"
            case Lt(lt=bound):
                most = f"less than {shown(bound)}"
            case _:
                continue
    return ", ".join(words for words in (least, most) if words)


def _departures() -> Iterator[str]:
    rows = []
    for reason, departure in DEPARTURES.items():
        unasked = departure.unasked.value
        if departure.unasked is Unasked.AFTER:
            unasked += f" {format_duration(departure.unasked_after)}"
        rows.append((_code(reason), format_duration(departure.look_after), unasked))
    yield from _table(("Reason", "look_after", "unasked"), rows)


def _flow(value: object) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=100_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


# ── the metrics ──


def metrics() -> str:
    """All metrics, and the values that their labels can have."""
    made = Metrics(lambda homeserver: homeserver)
    made.watch_states(lambda: {("example.org", State.LIVE.value, Presence.CONNECTED.value): 1})
    made.watch_conditions(lambda: {("homeserver", "example.org"): "", ("sfu", "main"): ""})
    made.watch_late(lambda: {"main": 0})
    made.disk(Disk(0, 0))
    labels = {m._name: m._labelnames for m in vars(made).values() if isinstance(m, MetricWrapperBase)}
    rows = []
    for family in made.registry.collect():
        names = labels.get(family.name) or (tuple(family.samples[0].labels) if family.type in ("gauge", "counter") and family.samples else ())
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        rows.append((_code(name), family.type, ", ".join(map(_code, names)), _prose(family.documentation)))
    lines = list(_table(("Metric", "Type", "Labels", "Meaning"), rows))
    lines += ["Values of the labels:", ""]
    lines += _table(
        ("Label", "Of", "Values"),
        (
            (_code("sfu"), "all", "its name in `sfus`; `unknown` for a webhook whose signature proves none"),
            (_code("homeserver"), "all", "the `name` of the entry in `homeservers` that it matches; `(not configured)` where none does"),
            (_code("event"), "webhooks", _words([*sorted(EVENTS), "other", webhooks.UNKNOWN])),
            (_code("result"), "webhooks", _words(webhooks.RESULTS)),
            (_code("endpoint"), "MatrixRTC requests", _words((*Endpoint, *service.Endpoint))),
            (_code("status"), "MatrixRTC requests", "the HTTP status of the answer"),
            (_code("status"), "delegation requests", "the same"),
            (
                _code("delegation"),
                "MatrixRTC requests",
                f"{_words(('yes', 'no'))}. Of a body that could not be read: `no` on the token endpoints, else `yes`; an empty one, a probe: `no`",
            ),
            (_code("result"), "OpenID checks", _words(("ok", "refused", "unavailable"))),
            (_code("result"), "membership checks", _words(("joined", "not_joined", "cannot_tell", "unavailable"))),
            (_code("part"), "application services", _words(Part)),
            (_code("action"), "actions", _words(action.value for action in Action if action is not Action.LOOK)),
            (_code("outcome"), "actions", _words(Verdict)),
            (_code("reason"), "departures", _words(REASONS)),
            (_code("outcome"), "delegated events ended", _words(ENDED)),
            (_code("outcome"), "looks", _words(("done", "failed"))),
            (_code("state"), "delegated events", _words(State)),
            (_code("presence"), "delegated events", _words(Presence)),
            (_code("lane"), "backlog", _words(lane.name.lower() for lane in Lane if lane is not Lane.TIMER)),
            (_code("result"), "config reloads", _words(("done", "refused"))),
        ),
    )
    return "\n".join(lines).rstrip("\n")


def _words(words: Iterable[str]) -> str:
    return ", ".join(_code(str(word)) for word in words)


# ── the alerts ──


def alerts() -> str:
    """All alerts of config/alerts.yml, in its order."""
    groups = yaml.safe_load((DOCS.parent / "config" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    rows = [
        (
            f"[{rule['alert']}](#{rule['alert'].lower()})",
            rule["labels"]["severity"],
            rule.get("for", "at once"),
            _summary(rule["annotations"]["summary"]),
        )
        for group in groups
        for rule in group["rules"]
    ]
    return "\n".join(_table(("Alert", "Severity", "Fires after", "It says"), rows)).rstrip("\n")


def _summary(text: str) -> str:
    """With the names of labels in place of their values."""
    text = re.sub(r"\{\{ with [^}]*\}\}.*?\{\{ end \}\}", "", text)
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"*\1*", text)


# ── the pages ──

PAGES: Final = {"configuration.md": configuration, "metrics.md": metrics, "alerts.md": alerts}


def page(name: str) -> str:
    """A page as it should be: its own text, with the part between the markers written anew. Raises ValueError where they are missing."""
    text = (DOCS / name).read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{name} has lost its markers: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{PAGES[name]()}\n\n{END}{after}"


def main() -> None:
    """Write the pages."""
    for name in PAGES:
        (DOCS / name).write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
