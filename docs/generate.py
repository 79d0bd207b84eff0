"""Writes the reference pages of docs/ from the program itself, and from docs/openapi.yaml and config/alerts.yml: `.venv/bin/python docs/generate.py`.

What stands between a page's two markers is written anew, and the rest of the page is left as it is. A test fails when a page is stale.
It must never start anything of the daemon: it reads the model of the configuration, the command line and the tables of the rules, and asks an unused
registry of metrics what it has.
"""

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import typer
import yaml
from annotated_types import Ge, Gt, Le, Lt
from prometheus_client.metrics import MetricWrapperBase
from pydantic import PlainSerializer
from pydantic.fields import FieldInfo
from sfu_delegate.api import service, webhooks
from sfu_delegate.api.matrixrtc import Endpoint
from sfu_delegate.cli import app
from sfu_delegate.config import Config, DepartureRule, Homeserver, Section, Sfu, format_duration, format_size
from sfu_delegate.delegation import diagram
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


# ── the state machines ──


def lifecycle() -> str:
    """The two tables of the rules, as the picture has them."""
    text = diagram.markdown().strip()
    return re.sub(r"(?m)^#+ ", "### ", text)


# ── the command line ──


def commands() -> str:
    """All commands with their options, in the order of `sfu-delegate --help`."""
    top = typer.main.get_command(app)
    lines: list[str] = []
    for name, command in _commands(top, "sfu-delegate"):
        lines += [f"## {name}", "", *_command(command, name)]
    return "\n".join(lines).rstrip("\n")


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands of a group and of the groups in it, each with its whole name. Hidden ones are left out."""
    context = group.make_context(name, [], resilient_parsing=True)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        if command is None or command.hidden:
            continue
        if hasattr(command, "list_commands"):
            yield from _commands(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


def _command(command: Any, name: str) -> Iterator[str]:
    context = command.make_context(name, [], resilient_parsing=True)
    pieces = " ".join(command.collect_usage_pieces(context))
    yield from ("```text", f"{name} {pieces}".strip(), "```", "")
    for paragraph in re.split(r"\n{2,}", inspect.cleandoc(command.help or "")):
        if paragraph.startswith("\b\n"):
            head, _, code = paragraph.removeprefix("\b\n").partition("\n")
            yield from (_prose(head), "", "```sh", inspect.cleandoc(code), "```", "")
        else:
            yield from (_prose(" ".join(paragraph.split())), "")
    # What `--help` shows of each, which other versions of the library give as well: (spelling, meaning).
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    rows = [(_code(record[0].removesuffix(" <str>")), _remark(record[1])) for record in records if record is not None and "--help" not in record[0]]
    if rows:
        yield from _table(("Option", "Meaning"), rows)


def _remark(text: str) -> str:
    """A meaning, with what stands behind it in brackets (the default, the variable) as a sentence of its own."""
    meaning, bracket, rest = " ".join(text.split()).partition(" [")
    said = [part.strip() for part in rest.removesuffix("]").split(";")] if bracket else []
    more = []
    for part in filter(None, said):
        name, colon, value = part.partition(": ")
        more.append("*Required.*" if part == "required" else f"{name.capitalize()}: {_code(value)}." if colon else f"{part.capitalize()}.")
    return " ".join([_prose(meaning), *more])


# ── the API ──

_METHODS: Final = ("get", "put", "post", "delete", "patch", "head", "options")
_LIMITS: Final = {
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minimum": "at least {}",
    "maximum": "at most {}",
    "minItems": "at least {} of them",
    "maxItems": "at most {} of them",
}
_WIDTH: Final = 150  # of an example in one line


def api() -> str:
    """The whole of docs/openapi.yaml: endpoints, what they take, what they answer, and examples."""
    given = yaml.safe_load((DOCS / "openapi.yaml").read_text(encoding="utf-8"))
    return _Api(given).page()


class _Api:
    """One description in OpenAPI, as a page."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self._of = given["components"]
        self._told: dict[str, str] = {}  # what an operation takes and answers, as JSON: the one that was told of it first

    def page(self) -> str:
        info = self._given["info"]
        lines = [info["description"].strip(), "", *self._contents()]
        for tag in self._given["tags"]:
            lines += [f"## {self._title(tag)}", "", tag["description"].strip(), ""]
            for path, method, operation in self._operations(tag["name"]):
                lines += self._operation(path, method, operation)
        lines += ["## Tokens and signatures", "", *self._schemes()]
        lines += ["## Answers that many endpoints have", ""]
        for name, answer in self._of["responses"].items():
            lines += [f"### {_spaced(name)}", "", answer["description"].strip(), "", *self._answer(answer)]
        lines += ["## Objects", ""]
        for name, schema in self._of["schemas"].items():
            lines += self._object(name, schema)
        return "\n".join(lines).rstrip("\n")

    @staticmethod
    def _title(tag: Mapping[str, Any]) -> str:
        return f"Endpoints: {tag['name']}"

    def _operations(self, tag: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        for path, item in self._given["paths"].items():
            for method in _METHODS:
                if method in item and tag in item[method]["tags"]:
                    shared = {"parameters": item.get("parameters", []), "servers": item.get("servers", [])}
                    yield path, method, {**item[method], **{key: [*value, *item[method].get(key, [])] for key, value in shared.items()}}

    def _contents(self) -> Iterator[str]:
        yield from ("## Overview", "")
        for tag in self._given["tags"]:
            rows = [
                (f"[`{method.upper()} {path}`](#{_slug(f'{method.upper()} {path}')})", _prose(operation["summary"]))
                for path, method, operation in self._operations(tag["name"])
            ]
            yield from _table((f"[{tag['name']}](#{_slug(self._title(tag))})", ""), rows)

    # ── an operation ──

    def _operation(self, path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
        stop = "" if operation["summary"].endswith(("?", ".")) else "."
        yield from (f"### `{method.upper()} {path}`", "", f"{operation['summary']}{stop}", "")
        if operation.get("description"):
            yield from (operation["description"].strip(), "")
        if operation["servers"]:
            yield from ("At:", "")
            yield from (f"- {_code(server['url'])}: {server.get('description', '').strip()}" for server in operation["servers"])
            yield ""
        if operation.get("security"):
            schemes = [_link(_spaced(name), f"#{_slug(_spaced(name))}") for needed in operation["security"] for name in needed]
            yield from (f"Proves who asks: {' or '.join(schemes)}.", "")
        parameters = [self._resolved(parameter) for parameter in operation["parameters"]]
        if parameters:
            rows = [
                (
                    _code(p["name"]),
                    p["in"],
                    _prose(f"{p.get('description', '').strip()} {self._limits(p['schema'])}".strip()),
                    _code(str(p.get("example", ""))),
                )
                for p in parameters
            ]
            yield from _table(("Parameter", "In", "Meaning", "Example"), rows)
        takes_and_gives = json.dumps([operation.get("requestBody"), operation["responses"]], sort_keys=True)
        first = self._told.setdefault(takes_and_gives, f"{method.upper()} {path}")
        if first != f"{method.upper()} {path}":
            same = _link(_code(first), f"#{_slug(first)}")
            yield from (f"Takes and answers the same as {same}." if "requestBody" in operation else f"Answers the same as {same}.", "")
            return
        if "requestBody" in operation:
            for kind, content in operation["requestBody"]["content"].items():
                yield from (f"**Body** ({_code(kind)}): {self._name(content['schema'])}", "")
                yield from self._examples(content)
        yield from self._answers(operation["responses"])

    def _answers(self, responses: Mapping[str, Any]) -> Iterator[str]:
        rows, longer = [], dict[str, str]()
        for status, given in responses.items():
            answer = self._resolved(given)
            if "$ref" in given:
                name = _spaced(given["$ref"].rpartition("/")[2])
                said = f"{_first(answer['description'])} {_link('More', f'#{_slug(name)}')}"
            else:
                said = " ".join(answer["description"].replace("\n- ", "<br>").removeprefix("- ").split())
                lines = "\n".join(self._answer(answer))
                alike = next((other for other, text in longer.items() if text == lines), None) if lines else None
                longer[status] = f"As for {_code(alike)}.\n" if alike else lines
            rows.append((_code(status), self._body(answer), said))
        yield from _table(("Answer", "Body", "Meaning"), rows)
        for status, text in longer.items():
            if text:
                yield from (f"**{status}**", "", text)

    def _body(self, answer: Mapping[str, Any]) -> str:
        contents = answer.get("content", {})
        return "<br>".join(self._name(content["schema"]) if kind.endswith("json") else _code(kind) for kind, content in contents.items()) or "none"

    def _answer(self, answer: Mapping[str, Any]) -> Iterator[str]:
        """Its headers and examples."""
        headers = {name: self._resolved(header) for name, header in answer.get("headers", {}).items()}
        if headers:
            yield from (f"- Header {_code(name)}: {' '.join(header.get('description', '').split())}" for name, header in headers.items())
            yield ""
        for content in answer.get("content", {}).values():
            yield from self._examples(content)

    def _examples(self, content: Mapping[str, Any]) -> Iterator[str]:
        for given in content.get("examples", {}).values():
            example = self._resolved(given)
            if example.get("summary"):
                yield from (f"{example['summary'].rstrip('.')}:", "")
            value = example["value"]
            if isinstance(value, str):
                yield from ("```text", value.rstrip(), "```", "")
            else:
                line = json.dumps(value, ensure_ascii=False)
                yield from ("```json", line if len(line) <= _WIDTH else json.dumps(value, ensure_ascii=False, indent=2), "```", "")

    # ── what is shared ──

    def _schemes(self) -> Iterator[str]:
        for name, scheme in self._of["securitySchemes"].items():
            yield from (f"### {_spaced(name)}", "", scheme["description"].strip(), "")
            form = f"{scheme['name']}: …" if scheme["type"] == "apiKey" else "Authorization: Bearer …"
            yield from (f"Header: {_code(form)}", "")

    def _object(self, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
        yield from (f"### {name}", "")
        said = " ".join(part for part in (schema.get("description", "").strip(), self._limits(schema)) if part)
        if said:
            yield from (said, "")
        rows = self._fields(schema, "")
        if rows:
            yield from _table(("Field", "Type", "", "Meaning"), rows)
        for part in schema.get("allOf", []):
            yield from (f"And: {self._name(part)}.", "")
        for part in schema.get("anyOf", []):
            fields = ", ".join(f"{_code(key)} {self._type(value)}" for key, value in part["properties"].items())
            yield from (f"- {fields}{' (required)' if part.get('required') else ''}",)
        if schema.get("anyOf"):
            yield ""
        if schema.get("additionalProperties") is False and rows:
            yield from ("No other fields.", "")
        if not said and not rows and not schema.get("allOf"):
            yield from (f"{self._type(schema)}.", "")

    def _fields(self, schema: Mapping[str, Any], prefix: str) -> list[tuple[str, str, str, str]]:
        rows = []
        required = schema.get("required", [])
        for key, given in schema.get("properties", {}).items():
            resolved = self._resolved(given)
            # What an object says itself tells more than the object that it refers to.
            said = given.get("description") or ("" if "$ref" in given else resolved.get("description", ""))
            meaning = " ".join(part for part in (" ".join(said.split()), "" if "$ref" in given else self._limits(resolved)) if part)
            rows.append((_code(prefix + key), self._type(given), "required" if key in required else "", meaning))
            rows += self._fields(given, f"{prefix}{key}.") if "properties" in given else []
            items = given.get("items", {})
            rows += self._fields(items, f"{prefix}{key}[].") if "properties" in items else []
        return rows

    def _name(self, schema: Mapping[str, Any]) -> str:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return _link(name, f"#{_slug(name)}")
        return self._type(schema)

    def _type(self, schema: Mapping[str, Any]) -> str:
        if "$ref" in schema:
            return self._name(schema)
        if "const" in schema:
            return _code(json.dumps(schema["const"]))
        if "enum" in schema:
            return ", ".join(_code("null" if value is None else str(value)) for value in schema["enum"])
        if "oneOf" in schema or "anyOf" in schema:
            return " or ".join(self._type(part) for part in schema.get("oneOf", schema.get("anyOf")))
        kinds = schema.get("type", "anything")
        text = " or ".join([kinds] if isinstance(kinds, str) else kinds)
        if "items" in schema:
            text = text.replace("array", f"list of {self._name(schema['items'])}")
        elif isinstance(schema.get("additionalProperties"), Mapping):
            text += f": name to {self._type(schema['additionalProperties'])}"
        return text

    def _limits(self, schema: Mapping[str, Any]) -> str:
        said = [
            "not empty" if (key, schema[key]) == ("minLength", 1) else words.format(schema[key]) for key, words in _LIMITS.items() if key in schema
        ]
        said += [f"as {_code(schema['pattern'])}"] if "pattern" in schema else []
        said += [f"default {_code(json.dumps(schema['default']).strip(chr(34)))}"] if "default" in schema else []
        examples = [_code(str(example)) for example in schema.get("examples", [])]
        said += [f"such as {', '.join(examples)}"] if examples else []
        text = "; ".join(said)
        return f"{text[0].upper()}{text[1:]}." if text else ""

    def _resolved(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a reference leads to, with what stands beside the reference laid over it."""
        if "$ref" not in node:
            return node
        target: Any = self._given
        for word in node["$ref"].removeprefix("#/").split("/"):
            target = target[word]
        beside = {key: value for key, value in node.items() if key != "$ref"}
        return {**self._resolved(target), **beside}


def _spaced(name: str) -> str:
    """`TooManyRequests` as words: "Too many requests"."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower().replace("open id", "OpenID").replace("hs token", "hs_token")
    return words[0].upper() + words[1:] if not words.startswith("hs_") else words


def _first(text: str) -> str:
    """The first sentence."""
    return " ".join(re.split(r"(?<=\.)\s", text.strip().removeprefix("- "), maxsplit=1)[0].split())


def _link(text: str, target: str) -> str:
    return f"[{text}]({target})"


def _slug(heading: str) -> str:
    """The anchor of a heading, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# ── the pages ──

PAGES: Final = {
    "alerts.md": alerts,
    "api.md": api,
    "commands.md": commands,
    "configuration.md": configuration,
    "how-it-works.md": lifecycle,
    "metrics.md": metrics,
}


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
