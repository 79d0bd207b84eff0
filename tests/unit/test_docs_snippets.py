"""Every block of code in the documentation is run, or loaded by the program that it is for, or says below it that it is not, and is checked here.

The blocks that are run are in `tests/integration/test_docs_commands.py`. A block of a new kind fails here until it is given a check.
"""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import crossplane
import jsonschema
import pytest
import typer
import yaml
from sfu_delegate import config
from sfu_delegate.cli import app
from sfu_delegate.config import registration

from tests.snippets import DOCS, ROOT, SNIPPETS, Snippet, asked_for, is_run, snippets

OURS = "# /etc/sfu-delegate/sfu-delegate.yaml"
LIVEKIT = "# livekit.yaml"
SYNAPSE = "# homeserver.yaml"
REGISTRATION = "# /etc/matrix-synapse/sfu-delegate-registration.yaml"
DASHBOARDS = "# /etc/grafana/provisioning/dashboards/sfu-delegate.yaml"
DATASOURCES = "# /etc/grafana/provisioning/datasources/prometheus.yaml"

RUN = ("sh", "python", "typescript")  # by tests that ask for them, or not at all
PARSED = ("nginx", "caddy", "toml")  # of reverse proxies, which are not run
LOADED = (OURS, SYNAPSE, REGISTRATION)  # by what reads them
FIGURE = re.compile(r"[┌└│─►▼]|^(demo · operate|sfu_delegate/)$", re.MULTILINE)


def first_line(snippet: Snippet) -> str:
    """Of YAML: the name of its file."""
    return snippet.text.partition("\n")[0]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_every_block_is_run_or_loaded_or_says_that_it_is_not(snippet: Snippet) -> None:
    """A block that nobody runs or loads has a note for the reader, *(not run by the tests: …)*, and one that is run has none."""
    match snippet.language:
        case language if language in RUN:
            unless = "where" in snippet.note  # a program is not installed
            assert is_run(snippet) != bool(snippet.note) or (is_run(snippet) and unless)
        case language if language in PARSED:
            assert snippet.note, "say below it: *(not run by the tests: its grammar is checked)*"
        case "yaml":
            assert (first_line(snippet) in LOADED) != bool(snippet.note)
            assert first_line(snippet) in (*LOADED, LIVEKIT, DASHBOARDS, DATASOURCES), "a file that no test loads yet"
        case "json" | "diff" | "text":
            assert not snippet.note or snippet.page.name == "commands.md"
        case _:
            assert FIGURE.search(snippet.text), "no figure: name its language, and have it run or checked"


def test_every_block_that_a_test_asks_for_is_there_once() -> None:
    """What tests run by a piece of its text is one block."""
    for page, contains in asked_for():
        found = [str(snippet) for snippet in SNIPPETS if snippet.of == page and contains in snippet.text]
        assert len(found) == 1, (page, contains, found)
    assert len(asked_for()) > 35


# ── shell ──


def test_shell_is_shell() -> None:
    """Every block of commands can be read by bash."""
    for snippet in snippets("sh"):
        # `…` stands for what the reader puts in.
        done = subprocess.run(["bash", "-n"], input=snippet.text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{snippet}: {done.stderr}"


def invocations(text: str) -> Iterator[list[str]]:
    """The arguments of each `sfu-delegate …` that is at the place of a command."""
    text = re.sub(r"\\\n\s*", " ", text)
    command = r"(?:^|[|&;({]|--\s|\$\()\s*(?:[A-Z_]+=\S+\s+)*(?:/opt/sfu-delegate/bin/)?sfu-delegate[ \t]+([^\n]*)"
    for found in re.finditer(command, text, re.MULTILINE):
        words = shlex.shlex(found[1], posix=True, punctuation_chars="();<>|&")
        words.whitespace_split = True
        words.commenters = "#"
        arguments: list[str] = []
        for word in words:
            if re.fullmatch(r"[();<>|&]+", word):
                break
            arguments.append(word)
        if arguments and arguments[-1].isdigit() and re.search(r"\d>", found[1]):
            arguments.pop()
        yield arguments


@pytest.mark.parametrize("snippet", [snippet for snippet in snippets("sh") if "sfu-delegate" in snippet.text], ids=str)
def test_commands_are_those_of_the_program(snippet: Snippet) -> None:
    """Each `sfu-delegate …` in a block is a command that there is, with options and arguments that it takes."""
    top: Any = typer.main.get_command(app)
    for arguments in invocations(snippet.text):
        if arguments[0].startswith("-"):
            assert arguments in (["--help"], ["-h"])
            continue
        group, name = top, "sfu-delegate"
        while hasattr(group, "resolve_command"):
            name, group, arguments = group.resolve_command(group.make_context(name, [], resilient_parsing=True), arguments)
        if "--help" not in arguments:
            group.make_context(name, arguments)


def test_inline_commands_are_those_of_the_program() -> None:
    """What prose calls `sfu-delegate …` is a command that there is."""
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        for name in re.findall(r"`(?:/opt/sfu-delegate/bin/)?sfu-delegate ([a-z][a-z-]+)", page.read_text()):
            assert name in known, f"{page.name}: sfu-delegate {name}"


# ── configurations ──


def of_file(name: str) -> list[Snippet]:
    """All YAML blocks of a file."""
    found = [snippet for snippet in snippets("yaml") if first_line(snippet) == name]
    assert found, f"no {name} any more"
    return found


# LiveKit refuses keys that it does not know. Of its configuration this is what concerns the daemon.
LIVEKITS = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "keys": {"type": "object", "additionalProperties": {"type": "string", "minLength": 32}, "minProperties": 1},
        "room": {"type": "object", "additionalProperties": False, "properties": {"auto_create": {"type": "boolean"}}},
        "webhook": {
            "type": "object",
            "additionalProperties": False,
            "required": ["api_key", "urls"],
            "properties": {"api_key": {"type": "string"}, "urls": {"type": "array", "items": {"type": "string", "pattern": "^http://"}}},
        },
    },
}


@pytest.mark.parametrize("snippet", of_file(LIVEKIT), ids=str)
def test_livekits_keys_are_livekits(snippet: Snippet) -> None:
    """LiveKit's configuration has keys that LiveKit knows, and webhooks are signed by one of its keys."""
    said = yaml.safe_load(snippet.text)
    jsonschema.validate(said, LIVEKITS)
    if "keys" in said and "webhook" in said:
        assert said["webhook"]["api_key"] in said["keys"]


def synapse(said: Mapping[str, Any]) -> Any:
    """Synapse's own configuration object, with this in it."""
    from signedjson.key import generate_signing_key, get_verify_key
    from synapse.config.homeserver import HomeServerConfig
    from unpaddedbase64 import encode_base64

    key = generate_signing_key("a_test")
    assert get_verify_key(key)
    needed = {"server_name": "example.org", "report_stats": False, "macaroon_secret_key": "x" * 32, "trusted_key_servers": []}
    made = HomeServerConfig()
    made.parse_config_dict({**needed, "signing_key": f"ed25519 a_test {encode_base64(key.encode())}", **said}, "", "")
    return made


@pytest.mark.synapse
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_synapse_understands_what_is_meant(tmp_path: Path) -> None:
    """Synapse's own loader takes each piece of its configuration for what the text beside it says, with the registration that is shown."""
    from sfu_delegate.demo.synapse import installed

    if not installed():
        pytest.skip("needs matrix-synapse")
    from synapse.config.appservice import load_appservices

    [shown] = of_file(REGISTRATION)
    file = tmp_path / "registration.yaml"
    file.write_text(shown.text)
    [service] = load_appservices("example.org", [str(file)])
    assert (service.id, service.is_rate_limited(), service.url) == ("sfu-delegate", False, None)
    assert service.is_interested_in_user("@alice:example.org")
    for snippet in of_file(SYNAPSE):
        said = yaml.safe_load(snippet.text)
        if "app_service_config_files" in said:
            assert said["app_service_config_files"] == [REGISTRATION.removeprefix("# ")]
            said["app_service_config_files"] = [str(file)]
        made = synapse(said)
        assert made.server.max_event_delay_duration.as_secs() == 24 * 3600, snippet
        if "rc_delayed_event_mgmt" in said:
            limit = made.ratelimiting.rc_delayed_event_mgmt
            assert (limit.per_second, limit.burst_count) == tuple(said["rc_delayed_event_mgmt"].values())
        for name, value in said.get("experimental_features", {}).items():
            assert getattr(made.experimental, name) is value, f"{snippet}: {name}"


def test_the_registration_is_one_that_the_command_would_keep() -> None:
    """What the README shows of the registration is what the command makes, and what the daemon finds nothing wrong with but its placeholders."""
    [snippet] = of_file(REGISTRATION)
    shown = registration.parse(snippet.text)
    assert all("placeholder" in problem for problem, _ in registration.judge(shown, "example.org"))
    made = yaml.safe_load(registration.make("example.org", shown.as_token, shown.hs_token, shown.proxy_url))
    assert made == yaml.safe_load(snippet.text)


def listed(key: str, needed: Mapping[str, Any]) -> dict[str, Any]:
    """A schema: the first version of a file of Grafana's provisioning, with one thing under `key`."""
    items = {"type": "object", "additionalProperties": False, "required": list(needed), "properties": dict(needed)}
    properties = {"apiVersion": {"const": 1}, key: {"type": "array", "minItems": 1, "maxItems": 1, "items": items}}
    return {"type": "object", "additionalProperties": False, "required": list(properties), "properties": properties}


TEXT = {"type": "string", "minLength": 1}
PATH = {"type": "object", "additionalProperties": False, "required": ["path"], "properties": {"path": TEXT}}
PROVISIONED = {
    DASHBOARDS: listed("providers", {"name": TEXT, "type": {"const": "file"}, "options": PATH}),
    DATASOURCES: listed(
        "datasources",
        {"name": TEXT, "type": {"const": "prometheus"}, "access": {"const": "proxy"}, "url": TEXT, "isDefault": {"const": True}},
    ),
}


@pytest.mark.parametrize("name", PROVISIONED)
def test_grafanas_keys_are_grafanas(name: str) -> None:
    """What provisions the dashboard and its source has keys that Grafana knows."""
    [snippet] = of_file(name)
    jsonschema.validate(yaml.safe_load(snippet.text), PROVISIONED[name])


@pytest.mark.parametrize("snippet", snippets("diff"), ids=str)
def test_a_change_leads_to_a_configuration(snippet: Snippet) -> None:
    """What a diff makes of the lines around it are keys of the configuration."""
    after = "\n".join(line[1:] for line in snippet.text.splitlines() if not line.startswith("-"))
    said = yaml.safe_load(after)
    for sfu in said.get("sfus", {}).values():
        sfu["keys"] = {"APIexample": "x" * 32}
    config.from_mapping({"homeservers": [{"name": "example.org"}], **said})


# ── reverse proxies ──


def whole(snippet: Snippet) -> str:
    """An nginx configuration around a piece of one."""
    text = snippet.text if re.search(r"(?m)^server \{", snippet.text) else f"server {{\n{snippet.text}}}\n"
    return f"pid nginx.pid;\nevents {{}}\nhttp {{\naccess_log off;\n{text}}}\n"


@pytest.mark.parametrize("snippet", snippets("nginx"), ids=str)
def test_nginx_can_be_read(snippet: Snippet, tmp_path: Path) -> None:
    """Its directives are nginx's, with as many arguments as each takes, where they may stand; and nginx says so, where it is installed."""
    file = tmp_path / "nginx.conf"
    file.write_text(whole(snippet))
    parsed = crossplane.parse(str(file), strict=True)
    assert parsed["errors"] == []
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is not None:
        # It would listen on what is written there only if it were started.
        done = subprocess.run([program, "-t", "-p", str(tmp_path), "-c", str(file), "-e", "stderr"], capture_output=True, text=True, check=False)
        refused = [line for line in done.stderr.splitlines() if "[emerg]" in line and "Permission" not in line and "mkdir()" not in line]
        assert not [line for line in refused if "bind()" not in line and "temp" not in line], done.stderr


def blocks_of_caddy(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Each directive with the names of the blocks that it is in. Raises AssertionError where braces do not match."""
    inside: list[str] = []
    for line in text.splitlines():
        words = line.split("#")[0].split()
        if not words:
            continue
        if words == ["}"]:
            assert inside, "one } too many"
            inside.pop()
            continue
        yield inside.copy(), [word for word in words if word != "{"]
        if words[-1] == "{":
            inside.append(words[0])
    assert not inside, f"{inside} never ends"


@pytest.mark.parametrize("snippet", snippets("caddy"), ids=str)
def test_caddys_file_can_be_read(snippet: Snippet, tmp_path: Path) -> None:
    """Its blocks are closed, its directives known, its matchers defined; and Caddy says so, where it is installed."""
    matchers = {words[0] for _, words in blocks_of_caddy(snippet.text) if words[0].startswith("@")}
    for inside, words in blocks_of_caddy(snippet.text):
        if not inside or words[0].startswith("@"):
            continue
        assert words[0] in ("handle", "handle_path", "reverse_proxy"), words
        used = {word for word in words[1:] if word.startswith("@")}
        assert used <= matchers
        if words[0] == "reverse_proxy":
            assert re.fullmatch(r"127\.0\.0\.1:\d+", words[-1])
    if shutil.which("caddy") is not None:
        file = tmp_path / "Caddyfile"
        file.write_text(snippet.text)
        done = subprocess.run(["caddy", "adapt", "--config", str(file), "--adapter", "caddyfile"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "127.0.0.1:8080" in done.stdout


@pytest.mark.parametrize("snippet", snippets("toml"), ids=str)
def test_traefiks_file_belongs_together(snippet: Snippet) -> None:
    """Each router has a rule, and a service and middlewares that are there; each service has a server."""
    http = tomllib.loads(snippet.text)["http"]
    assert http.keys() <= {"routers", "services", "middlewares"}
    for router in http["routers"].values():
        assert router.keys() <= {"rule", "entryPoints", "service", "middlewares", "tls", "priority"}
        assert re.fullmatch(r"(?:[()\s&|]|\b(?:Host|PathPrefix|Path)\(`[^`]+`\))+", router["rule"])
        assert router["service"] in http["services"]
        assert set(router.get("middlewares", ())) <= set(http.get("middlewares", ()))
    for service in http["services"].values():
        assert [server["url"] for server in service["loadBalancer"]["servers"]]


# ── what is shown ──


def described(name: str) -> dict[str, Any]:
    """A schema of docs/openapi.yaml, with all that it refers to."""
    given = yaml.safe_load((DOCS / "openapi.yaml").read_text())
    return {"$ref": f"#/components/schemas/{name}", "components": given["components"]}


@pytest.mark.parametrize("snippet", [s for s in snippets("json") if s.page.name not in ("api.md",)], ids=str)
def test_json_is_what_it_is_shown_as(snippet: Snippet) -> None:
    """Answers are as docs/openapi.yaml describes them, log lines have what every log line has, and clients are told of an SFU."""
    for said in [json.loads(snippet.text)] if snippet.text.startswith("{\n") else [json.loads(line) for line in snippet.text.splitlines()]:
        match said:
            case {"management_token": _}:
                jsonschema.validate(said, described("NewDelegation"))
            case {"phase": _}:
                jsonschema.validate(said, described("Readiness"))
            case {"event": _}:
                assert {"time", "level", "logger"} <= said.keys()
            case {"org.matrix.msc4143.rtc_foci": [focus]}:
                assert focus["type"] == "livekit"
                assert focus["livekit_service_url"].startswith("https://")
            case _:
                pytest.fail(f"JSON of a kind that is not checked: {said}")


PAGES_MADE = ("api.md", "commands.md")  # by docs/generate.py


@pytest.mark.parametrize("snippet", [s for s in snippets("text") if s.page.name not in PAGES_MADE and not s.text.startswith("^/")], ids=str)
def test_answers_are_held_to_the_program(snippet: Snippet) -> None:
    """What a command is said to print, a test asks for, and compares with what it prints."""
    assert is_run(snippet)


@pytest.mark.parametrize("snippet", [s for s in snippets("text") if s.text.startswith("^/")], ids=str)
def test_rules_for_workers_match_the_endpoints(snippet: Snippet) -> None:
    """The regular expressions for Synapse's workers match the paths that the daemon has, and no others of it."""
    rules = [re.compile(line) for line in snippet.text.splitlines()]
    for path in yaml.safe_load((DOCS / "openapi.yaml").read_text())["paths"]:
        assert any(rule.match(path) for rule in rules) == ("/rtc/livekit/" in path), path
