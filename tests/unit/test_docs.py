"""The documentation is true: its snippets can be used, what it names exists, and its links lead somewhere."""

import ast
import base64
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import sqlalchemy
import yaml
from aiohttp import web
from sfu_delegate import config
from sfu_delegate.api.app import AdminServices, Public, Services, admin_app
from sfu_delegate.config import Config
from sfu_delegate.config.registration import make
from sfu_delegate.delegation.model import Outcome, Presence, State
from sfu_delegate.delegation.policy import DEPARTURES
from sfu_delegate.store.schema import metadata

from tests.integration.certificates import Certificates
from tests.snippets import DOCS, PAGES, ROOT, Snippet, snippets

SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "sfu_delegate").rglob("*.py")))
OURS = "# /etc/sfu-delegate/sfu-delegate.yaml"
NOT_OURS = (
    "# livekit.yaml",
    "# homeserver.yaml",
    "# /etc/grafana/provisioning/dashboards/sfu-delegate.yaml",
    "# /etc/grafana/provisioning/datasources/prometheus.yaml",
    "# /etc/matrix-synapse/sfu-delegate-registration.yaml",
)
NEEDED = {"sfus": {"main": {"url": "wss://sfu.example.org", "keys": {"APIexample": "x" * 32}}}, "homeservers": [{"name": "example.org"}]}


def prose(page: Path) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text())


# ── snippets ──


@pytest.mark.parametrize("snippet", snippets("yaml"), ids=str)
def test_yaml_says_whose_it_is_and_ours_can_be_used(snippet: Snippet, tmp_path: Path) -> None:
    """Every YAML snippet begins with the name of its file; those of our configuration are valid."""
    first = snippet.text.splitlines()[0]
    # The files that it names hold what they should.
    key = base64.urlsafe_b64encode(bytes(32)).decode()
    authority = Certificates(tmp_path).ca_file.read_text()
    for name, content in (
        ("postgresql-password", "a-password"),
        ("postgresql-ca.pem", authority),
        ("encryption-keys", key),
        ("sfu-delegate.livekit-keys", f"APIexample: {'x' * 32}"),
        ("sfu-delegate.registration", make("example.org", "a" * 64, "h" * 64, "http://127.0.0.1:8080")),
    ):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o600)
    parsed = yaml.safe_load(re.sub(r"/etc/sfu-delegate/(?=postgresql-|encryption-)", f"{tmp_path}/", snippet.text))
    assert isinstance(parsed, dict)
    if first == OURS:
        config.from_mapping(NEEDED | parsed, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    else:
        assert first in NOT_OURS


def yaml_of(first: str) -> dict[str, Any]:
    """The first such snippet of the README."""
    found = next(s for s in snippets("yaml") if s.page.name == "README.md" and s.page.parent == ROOT and s.text.startswith(first + "\n"))
    return cast("dict[str, Any]", yaml.safe_load(found.text))


def test_the_readmes_snippets_belong_together() -> None:
    """Daemon and LiveKit share their key, the webhook's URL is ours, and what is left to be done is to put in a secret and a directory."""
    ours, livekit = config.from_mapping(yaml_of(OURS)), yaml_of("# livekit.yaml")
    [sfu] = ours.sfus.values()
    assert {key: secret.get_secret_value() for key, secret in sfu.keys.items()} == livekit["keys"]
    assert livekit["webhook"]["api_key"] in livekit["keys"]
    assert livekit["webhook"]["urls"] == [f"http://{ours.listen.host}:{ours.listen.port}/webhooks/livekit"]
    assert {risk.key for risk in config.warnings(ours)} <= {"sfus.main.keys.APIexample", "database"}


def test_the_registration_is_the_one_that_synapse_is_told_of() -> None:
    """Synapse's configuration names the registration's file; it is not rate limited, and nothing is pushed."""
    registration = "/etc/matrix-synapse/sfu-delegate-registration.yaml"
    assert yaml_of("# homeserver.yaml")["app_service_config_files"] == [registration]
    service = yaml_of(f"# {registration}")
    assert (service["rate_limited"], service["url"]) == (False, None)
    [namespace] = service["namespaces"]["users"]
    assert re.fullmatch(namespace["regex"], "@alice:example.org")
    assert not re.fullmatch(namespace["regex"], "@alice:exampleXorg")


@pytest.mark.parametrize("snippet", snippets("python"), ids=str)
def test_python_compiles(snippet: Snippet) -> None:
    """Python snippets are Python."""
    compile(snippet.text, str(snippet), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("snippet", snippets("sh"), ids=str)
def test_python_in_shell_compiles(snippet: Snippet) -> None:
    """What a shell snippet hands to Python is Python."""
    for code in re.findall(r"(?s)<<'EOF'\n(.*?)\nEOF\n|python3? -c '([^']*)'", snippet.text):
        compile(code[0] or code[1], str(snippet), "exec")


def test_queries_can_be_asked() -> None:
    """What a shell snippet asks the database for is in its tables."""
    asked = [query for snippet in snippets("sh") for query in re.findall(r'sqlite3 -readonly [^"]*"([^"]+)"', snippet.text)]
    assert asked
    with sqlalchemy.create_engine("sqlite://").connect() as database:
        metadata.create_all(database)
        for query in asked:
            assert database.execute(sqlalchemy.text(query)).all() == []


@pytest.mark.parametrize("snippet", snippets("json"), ids=str)
def test_json_parses(snippet: Snippet) -> None:
    """JSON snippets are JSON, as a whole or line by line."""
    try:
        json.loads(snippet.text)
    except json.JSONDecodeError:
        for line in snippet.text.splitlines():
            json.loads(line)


def paths_of(app: web.Application) -> set[str]:
    return {route.resource.canonical for route in app.router.routes() if route.resource is not None}


def pattern(path: str) -> str:
    return re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path))


def test_every_path_that_is_called_exists() -> None:
    """What curl and the clients' code ask the daemon for is there, and described in docs/openapi.yaml."""
    services = cast(Services, SimpleNamespace(log=None, settings=lambda: None, paths={"": "main"}, stopping=lambda: False))
    admin = cast(AdminServices, SimpleNamespace(log=None, token=None, operator=None, pages=None))
    served = paths_of(Public(services).app) | paths_of(admin_app(admin))
    described = set(yaml.safe_load((DOCS / "openapi.yaml").read_text())["paths"])
    called = set()
    for snippet in snippets("sh", "python", "typescript", "yaml"):
        for host, path in re.findall(r"https?://(sfu\.example\.org(?:/livekit/jwt)?|127\.0\.0\.1:(?:8080|8081))(/[^\s\"'`?]*)", snippet.text):
            called.add(path)
            for known in (served, described):
                assert any(re.fullmatch(pattern(p), path) for p in known), f"{snippet}: {host}{path}"
    assert {"/v1/delegations", "/v1/delegations/$ID", "/webhooks/livekit", "/health/ready", "/metrics"} <= called


# ── names ──


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", generator().PAGES)
def test_the_tables_are_those_of_the_program(name: str) -> None:
    """After a change of what they are made of: `.venv/bin/python docs/generate.py`."""
    assert (DOCS / name).read_text() == generator().page(name)


def test_every_metric_that_is_named_exists() -> None:
    """Pages name metrics as they are scraped, and no others."""
    known = set(re.findall(r"^\| `(sfu_delegate_\w+)`", (DOCS / "metrics.md").read_text(), re.MULTILINE))
    assert len(known) > 15
    known |= {f"{name}_{suffix}" for name in known for suffix in ("bucket", "sum", "count")}
    for page in PAGES:
        for name in re.findall(r"\bsfu_delegate_[a-z_]+\b", page.read_text()):
            assert name in known, f"{page.name}: {name}"


def test_every_key_that_is_named_exists() -> None:
    """Keys of the configuration that pages name are in the model, by the names that it has."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    known = {f"{name}.{key}" for name, section in sections.items() for key in getattr(section, "model_fields", {})}
    known |= {f"departures.{reason}" for reason in DEPARTURES} | {"departures.<REASON>"}
    known |= {f"sfus.{name}.{key}" for name in ("<name>", "*") for key in config.Sfu.model_fields}
    known |= {f"homeservers[].{key}" for key in config.Homeserver.model_fields}
    heads = "|".join(re.escape(name) for name in sections)
    for page in PAGES:
        for name in re.findall(rf"`((?:{heads})(?:\[\])?\.[\w.<>*]+?)`", page.read_text()):
            if not name.startswith(("config.", "log.py")) and not name.endswith((".py", ".yaml", ".md")):
                known_name = name in known or (name.startswith("departures.") and name.rpartition(".")[0] in known)
                assert known_name, f"{page.name}: {name}"


def rows_of(page: str, heading: str) -> list[str]:
    """The first cells of the table under a heading row, each `word` in them by itself."""
    text = (DOCS / page).read_text()
    table = text[text.index(heading) :].partition("\n\n")[0].splitlines()[2:]
    return [word for row in table for word in re.findall(r"`(\w+)`", row.split("|")[1])]


def test_every_log_line_that_is_explained_exists() -> None:
    """The events in docs/operating.md are those that the program logs, by the names that it gives them."""
    told = rows_of("operating.md", "| `event` | Level |")
    assert len(told) > 20
    generic = [re.sub(r"^(homeserver|sfu)_", "{kind}_", name) for name in told]
    missing = [name for name, other in zip(told, generic, strict=True) if f'"{name}"' not in SOURCE and f'"{other}"' not in SOURCE]
    assert not missing
    logged = set(re.findall(r"log\.(?:info|warning|error|exception)\(\s*\"(\w+)\"", SOURCE.replace("services.log", "log")))
    assert logged - {"delegation"} <= set(told)


def test_every_line_of_the_history_is_explained() -> None:
    """Each state, presence and outcome that a delegation's history can name is in docs/operating.md."""
    told = set(rows_of("operating.md", "| `what` | Meaning |"))
    known = {*State, *Presence, *Outcome, "delegated", "verified", "restart_failed", "send_failed", "cancel_failed"}
    assert told == {str(word) for word in known} - {State.DONE.value, Outcome.OPEN.value}


def test_every_outcome_is_explained_to_clients() -> None:
    """docs/clients.md has all outcomes, and no others."""
    assert set(rows_of("clients.md", "| `outcome` | |")) == {outcome.value for outcome in Outcome if outcome is not Outcome.OPEN}


def test_what_troubleshooting_quotes_is_said() -> None:
    """Sentences that operators are told to look for are those of the program."""
    said = re.sub(r'"\s*f?"', "", SOURCE)
    quoted = re.findall(r"`([A-Za-z]\w* (?:\w+|…) [^`{}=]+)`", (DOCS / "troubleshooting.md").read_text())
    assert len(quoted) >= 6
    for sentence in quoted:
        for part in sentence.split("…"):
            assert part.strip(" .") in said, sentence


def test_every_file_that_is_named_exists() -> None:
    """Paths into the repository lead to something."""
    for page in PAGES:
        for path in re.findall(r"`((?:docs|config|systemd|tests|benchmarks|sfu_delegate|requirements)/[\w./*-]+)`", page.read_text()):
            assert list(ROOT.glob(path)), f"{page.name}: {path}"


def test_every_make_target_that_is_named_exists() -> None:
    """`make …` in a page is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = "\n".join(re.findall(r"`make ([a-z-]+)", page.read_text())) + "\n" + "\n".join(re.findall(r"(?m)^make ([a-z-]+)", page.read_text()))
        assert set(text.split()) <= targets, page.name


# ── links ──


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"(?m)^#{1,6} (.+)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Links within the repository lead to a file, and to a heading in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_the_index_has_every_page() -> None:
    """docs/README.md links to everything in docs/."""
    linked = set(re.findall(r"\]\(([\w.-]+)\)", (DOCS / "README.md").read_text()))
    assert {path.name for path in DOCS.iterdir() if path.suffix in (".md", ".yaml", ".svg")} - {"README.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_project_speaks_of_itself_alone(page: Path) -> None:
    """No path of somebody's machine, nothing that a reader does not have, and nothing left to be filled in."""
    found = re.findall(r"/work/|/root/|/tmp/|shared/|\bTODO\b|\bFIXME\b|\bTBD\b|^@[A-Z]+@$", page.read_text(), re.MULTILINE)
    assert not found


# ── what runs it ──


def test_the_unit_and_the_image_agree_with_the_program() -> None:
    """Both start `serve` with the default configuration file, and the unit reloads by SIGHUP."""
    from sfu_delegate.cli import DEFAULT_CONFIG

    unit, image = (ROOT / "systemd" / "sfu-delegate.service").read_text(), (ROOT / "Dockerfile").read_text()
    assert f"ExecStart=/opt/sfu-delegate/bin/sfu-delegate serve --config {DEFAULT_CONFIG}\n" in unit
    assert 'ExecReload=/bin/sh -c "kill -HUP ${MAINPID}"\n' in unit
    assert f'CMD ["serve", "--config", "{DEFAULT_CONFIG}"]' in image


def test_the_images_environment_is_understood() -> None:
    """The variables that the image sets are keys of the configuration."""
    image = (ROOT / "Dockerfile").read_text()
    environ = dict(re.findall(r"\b(SFU_DELEGATE_[A-Z_]+)=(\S+)", image.partition("\nENV ")[2].partition("\nUSER ")[0]))
    assert len(environ) == 4
    made = config.from_mapping(NEEDED, environ)
    assert str(made.database_path) == "/var/lib/sfu-delegate/sfu-delegate.db"
    assert not [risk for risk in config.warnings(made) if risk.key in environ]


def test_the_image_copies_what_there_is() -> None:
    """What the image is made of exists, and is not left out by .dockerignore."""
    kept = set(re.findall(r"(?m)^!(\S+)", (ROOT / ".dockerignore").read_text()))
    for line in re.findall(r"(?m)^COPY (?!--from)(.+)$", (ROOT / "Dockerfile").read_text()):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
            assert name in kept, name
