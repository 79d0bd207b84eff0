"""The commands of the documentation do what it says that they do: they are run, as they stand there, on a machine of their own.

They follow the reader: first the quickstart, from nothing to a delegate that works, then what clients and operators do with it.
"""

import base64
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import yaml
from livekit.api import AccessToken, VideoGrants
from sfu_delegate.demo.processes import free_ports
from sfu_delegate.livekit.names import room_name

from tests import postgresql
from tests.integration.docs_machine import ALICE, KEY, SECRET, Machine, needs
from tests.snippets import ROOT, given

ROOM = "!abcdefg:example.org"
MEMBER = "org.matrix.msc3401.call.member"


def install(machine: Machine) -> str:
    """Step 1 to 6 of the README, as they are written; what the last one prints."""
    machine.run(given("README.md", "useradd --system"))
    config = given("README.md", "# /etc/sfu-delegate/sfu-delegate.yaml")
    machine.configure(config)
    livekit = yaml.safe_load(machine.here(given("README.md", "# livekit.yaml")))
    # The stand-in was started with the key, and the webhook, of this very block.
    assert livekit["keys"] == {KEY: SECRET}
    assert livekit["webhook"]["urls"] == [f"http://127.0.0.1:{machine.public}/webhooks/livekit"]
    machine.run(given("README.md", "--output /etc/matrix-synapse"))
    registration = machine.file("/etc/matrix-synapse/sfu-delegate-registration.yaml")
    machine.configure(config, registration_file=str(registration))
    said = yaml.safe_load(registration.read_text())
    machine.sandbox("homeserver", "application_service", token=said["as_token"])
    machine.sandbox("homeserver", "set_proxy", said["io.element.msc4512.proxy_url"], said["hs_token"])
    # A reader takes a moment until the line about the journal; here it waits for what it looks for.
    check, journal, metrics = re.split(r"(?m)^(journalctl .*\n)", given("README.md", "systemctl daemon-reload && systemctl enable --now"))
    out = machine.run(check)
    machine.until_told("application_service_works")
    return out + machine.run(journal + metrics)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The machine after the quickstart."""
    needs("bash", "curl", "jq", "sqlite3")
    with Machine(tmp_path_factory.mktemp("machine")) as made:
        made.printed = install(made)
        yield made


class Client:
    """A client of Alice: its access token at the homeserver, and, for a call of its own, one of LiveKit's and a leave event."""

    def __init__(self, machine: Machine, room: str) -> None:
        self.machine = machine
        self.room = room  # LiveKit's
        self.identity = f"{ALICE}:ADEVICE"
        self.matrix_token = machine.sandbox("homeserver", "register", ALICE)
        grants = VideoGrants(room_join=True, room=room)
        self.livekit_token = AccessToken(KEY, SECRET).with_identity(self.identity).with_grants(grants).to_jwt()

    def schedule(self) -> str:
        """A leave event of an hour; its delay_id."""
        delay_id: str = self.machine.sandbox("homeserver", "schedule", ALICE, ROOM, MEMBER, f"_{ALICE}_ADEVICE_m.call_{self.room}", 3_600_000, {})
        return delay_id

    def is_in(self) -> None:
        """It joins the call."""
        self.machine.sandbox("sfu", "create_room", self.room)
        self.machine.sandbox("sfu", "join", self.room, self.identity)

    def leaves(self) -> None:
        """It hangs up."""
        self.machine.sandbox("sfu", "leave", self.room, self.identity)


def answer_in(printed: str) -> dict[str, Any]:
    """The JSON object that curl has printed."""
    found: dict[str, Any] = json.JSONDecoder().raw_decode(printed, printed.index("{"))[0]
    return found


def shape(value: Any) -> Any:
    """What there is, without what it says."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value else type(value).__name__ if value is not None else "null"


# ── the quickstart ──


def test_the_quickstart_ends_with_a_delegate_that_works(machine: Machine) -> None:
    """After the six steps of the README all is well: the homeserver, the SFU and the application service."""
    ready = answer_in(machine.printed[machine.printed.index('{"status"') :])
    assert (ready["status"], ready["database"]) == ("ok", "ok")
    assert ready["application_services"] == {"example.org": "ok"}
    assert "application_service_works" in machine.printed
    assert "sfu_delegate_webhooks_total" in machine.printed


def test_the_doctor_is_asked_as_the_manual_says(machine: Machine) -> None:
    """Beside the daemon of the quickstart: nothing is wrong, but for what nobody's `.well-known` tells here."""
    assert "problem " not in machine.run(given("docs/troubleshooting.md", "sfu-delegate doctor"))
    told = machine.run(given("docs/operating.md", "sfu-delegate doctor --json"))
    assert {line.split()[0] for line in told.splitlines()} <= {"homeserver.well_known", "config", "files"}, told


@pytest.mark.slow
def test_the_quickstart_works_with_packages_that_are_really_installed(tmp_path: Path) -> None:
    """The six steps of the README, from an empty virtual environment."""
    needs("bash", "curl", "jq")
    with Machine(tmp_path, really_installed=True) as machine:
        assert "application_service_works" in install(machine)
        assert machine.file("/opt/sfu-delegate/bin/sfu-delegate").exists()


@pytest.mark.slow
def test_the_unit_is_installed_as_the_manual_says(machine: Machine) -> None:
    """Installing, and upgrading, as docs/operating.md has it."""
    machine.run(given("docs/operating.md", "-m venv /opt/sfu-delegate"))
    shutil.copy(machine.file("/etc/sfu-delegate/sfu-delegate.yaml"), machine.checkout / "sfu-delegate.yaml")
    machine.run("systemctl stop sfu-delegate")
    machine.run(given("docs/operating.md", "-m 0640 sfu-delegate.yaml /etc"))
    machine.until("it is ready", lambda: answers(machine))
    machine.run("systemctl stop sfu-delegate")
    machine.run(given("docs/operating.md", "cp systemd/sfu-delegate.service /etc/systemd/system/ && systemctl daemon-reload"))
    machine.until("it is ready", lambda: answers(machine))


def answers(machine: Machine) -> bool:
    """Whether the daemon is ready, and knows of all that it asked at its start that it works."""
    try:
        return bool(json.loads(machine.get("/health/ready"))["status"] == "ok")
    except OSError:
        return False


# ── clients ──


def test_curl_delegates(machine: Machine) -> None:
    """With the README's curl a leave event is scheduled and delegated; its participant is followed, and at the departure the event is sent."""
    client = Client(machine, "by-curl")
    block = given("README.md", "DELAY_ID=$(curl -sX PUT")
    for name, token in (("MATRIX_TOKEN", client.matrix_token), ("LIVEKIT_TOKEN", client.livekit_token)):
        block = re.sub(rf"{name}=…", f"{name}={token}", block)
    client.is_in()
    delegation = answer_in(machine.run(block))
    assert (delegation["verified"], delegation["participant"]["identity"]) == (True, client.identity)
    machine.until_told("connected", delegation["id"])
    client.leaves()
    machine.until_told("sent", delegation["id"])
    state = machine.sandbox("homeserver", "state")
    assert any(entry["state_key"] == "_@alice:example.org_ADEVICE_m.call" and entry["content"] == {} for entry in state)


@pytest.mark.slow
def test_who_has_the_key_can_try_it_without_a_client(machine: Machine) -> None:
    """With a token of one's own making it says NEVER_JOINED, and the event is sent."""
    made = given("README.md", "from livekit.api import AccessToken")
    token = machine.run(made + 'printf %s "$LIVEKIT_TOKEN"')
    block = given("README.md", "DELAY_ID=$(curl -sX PUT").replace("LIVEKIT_TOKEN=…", f"LIVEKIT_TOKEN={token}")
    delegation = answer_in(machine.run(block.replace("MATRIX_TOKEN=…", f"MATRIX_TOKEN={Client(machine, 'self-test').matrix_token}")))
    assert machine.until_told("gone", delegation["id"])["detail"] == "NEVER_JOINED"
    machine.until_told("sent", delegation["id"])


async def test_python_delegates(machine: Machine) -> None:
    """The README's function returns the delegation; and None where there is no daemon."""
    client, there = Client(machine, "by-python"), dict[str, Any]()
    exec(machine.here(given("README.md", "async def delegate(")), there)
    async with aiohttp.ClientSession() as http:
        delegation = await there["delegate"](http, client.livekit_token, client.schedule(), 3_600_000)
        assert delegation["verified"]
        assert delegation["management_token"]
        assert await there["delegate"](http, client.livekit_token, "syd_unknown", 3_600_000) is None


async def test_ten_lines_delegate(machine: Machine) -> None:
    """The ten lines of docs/clients.md schedule and delegate, and say False of a daemon that does not take it."""
    client = Client(machine, "in-ten-lines")
    there: dict[str, Any] = {"quote": quote, "HOMESERVER": machine.at["homeserver"]}
    exec(machine.here(given("docs/clients.md", "async def announce_leave_and_delegate")), there)
    async with aiohttp.ClientSession() as http:
        state_key = f"_{ALICE}_ADEVICE_m.call_ten"
        assert await there["announce_leave_and_delegate"](http, ROOM, state_key, client.matrix_token, client.livekit_token) is True
        assert await there["announce_leave_and_delegate"](http, ROOM, state_key, client.matrix_token, "another token") is False


def test_typescript_delegates(machine: Machine) -> None:
    """The README's function in TypeScript, without its types, returns the delegation; and nothing for an event that nobody knows."""
    needs("node")
    client = Client(machine, "by-typescript")
    code = re.sub(r"(\w+): (?:string|number)\b", r"\1", machine.here(given("README.md", "async function delegate(")))
    for delay_id, verified in ((client.schedule(), "true"), ("syd_unknown", "undefined")):
        call = f"delegate({client.livekit_token!r}, {delay_id!r}, 3600000).then((it) => console.log(it?.verified))"
        done = subprocess.run(["node", "-e", code + call], capture_output=True, text=True, check=False, timeout=60)
        assert done.stdout.strip() == verified, done.stderr


def test_the_api_answers_as_the_manual_shows(machine: Machine) -> None:
    """The request of docs/clients.md gets an answer of just the fields that are shown there; it can be read, and taken back."""
    client = Client(machine, "shown")
    asked = given("docs/clients.md", "syd_yfwFVYySnPCaLuQIazTm").replace("syd_yfwFVYySnPCaLuQIazTm", client.schedule())
    delegation = answer_in(machine.run(asked, LIVEKIT_TOKEN=client.livekit_token))
    assert shape(delegation) == shape(json.loads(given("docs/clients.md", "restart_interval_ms")))
    both = machine.run(given("docs/clients.md", "# take the event back"), ID=delegation["id"], MANAGEMENT_TOKEN=delegation["management_token"])
    assert answer_in(both)["history"][0]["what"] == "delegated"
    assert both.endswith("{}")
    machine.until_told("withdrawn", delegation["id"])


def test_matrixrtc_clients_get_tokens(machine: Machine) -> None:
    """The requests of docs/clients.md to the standalone endpoints: two tokens, a delegation, and the probe's 400."""
    client, block = Client(machine, "matrixrtc"), given("docs/clients.md", "/livekit/jwt/sfu/get")
    out = machine.run(block, MATRIX_TOKEN=client.matrix_token, DELAY_ID=client.schedule())
    assert [json.loads(f"{{{found}}}")["url"] for found in re.findall(r'\{("url".*?)\}', out)] == [machine.here("wss://sfu.example.org")] * 2, out
    assert "400 Bad Request" in out
    assert "M_NOT_JSON" in out


def test_clients_get_tokens_through_their_homeserver(machine: Machine) -> None:
    """The two requests of docs/clients.md through the homeserver: a token, and a delegation."""
    client, room = Client(machine, "through"), "!roomid:example.org"
    machine.sandbox("homeserver", "join", ALICE, room)
    delay_id = machine.sandbox("homeserver", "schedule", ALICE, room, MEMBER, f"_{ALICE}_ADEVICE_m.call", 3_600_000, {})
    block = given("docs/clients.md", 'curl -sX POST "$LIVEKIT/get_token"').replace('"delay_id": "…"', f'"delay_id": "{delay_id}"')
    out = machine.run(block, MATRIX_TOKEN=client.matrix_token)
    assert list(answer_in(out)) == ["jwt"]
    assert out.endswith("{}")


def test_a_client_is_tried_without_a_homeserver_and_an_sfu(tmp_path: Path) -> None:
    """The three terminals of docs/clients.md: the sandbox, the daemon, and a client whose delegation gets the history that is shown."""
    needs("bash", "curl", "jq")
    ports = dict(zip(("7880", "7881", "8008", "8009", "8080", "8081"), map(str, free_ports(6)), strict=True))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SFU_DELEGATE_")}
    listeners = {"SFU_DELEGATE_LISTEN__PORT": ports["8080"], "SFU_DELEGATE_ADMIN__PORT": ports["8081"]}

    def here(block: str) -> str:
        programs = {"sfu-delegate": f"{sys.executable} -m sfu_delegate.cli", "python": sys.executable}
        block = re.sub(r"\.venv/bin/(sfu-delegate|python)", lambda program: programs[program[1]], block)
        return re.sub("|".join(ports), lambda port: ports[port[0]], re.sub(r"(?m)^sleep \d.*\n", "wait_for_it\n", block))

    def terminal(block: str) -> subprocess.Popen[str]:
        command, environment = ["bash", "-e", "-c", here(block)], {**inherited, **listeners, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)

    # In place of a person's patience: until the daemon has seen that it came, and then that it is over.
    waiting = """
waits=0
wait_for_it() {
    waits=$((waits + 1))
    for _ in $(seq 600); do
        history=$(curl -s "http://127.0.0.1:8080/v1/delegations/$(jq -r .id delegation.json)" -H "Authorization: Bearer $LIVEKIT_TOKEN")
        if [ $waits = 1 ]; then jq -e '.participant.presence == "connected"' <<< "$history" && return
        else jq -e '.state == "done"' <<< "$history" && return; fi > "/dev/null"
        sleep 0.05
    done
    exit 1
}
"""
    opened = list[subprocess.Popen[str]]()
    with (tmp_path / "log").open("w+") as log:
        try:
            opened.append(terminal(given("docs/clients.md", "-m sfu_delegate.sandbox --auto-create")))
            assert opened[0].stdout is not None
            assert json.loads(opened[0].stdout.readline())["sfu"].endswith(ports["7880"])
            opened.append(terminal(given("docs/clients.md", "serve --config try.yaml")))
            ready = f"curl -sf --retry 30 --retry-delay 1 --retry-connrefused http://127.0.0.1:{ports['8081']}/health/ready"
            subprocess.run(["bash", "-c", ready], check=True, capture_output=True, timeout=60)
            client = terminal(waiting + given("docs/clients.md", "sandbox() {"))
            opened.append(client)
            printed, _ = client.communicate(timeout=60)
            log.seek(0)
            assert client.returncode == 0, printed + log.read()
            assert printed.endswith(given("docs/clients.md", "delegated\nverified\nconnected\n")), printed
        finally:
            for each in reversed(opened):
                with suppress(ProcessLookupError):
                    os.killpg(each.pid, signal.SIGTERM)
                each.communicate()


# ── operators ──


def test_what_is_to_be_seen_is_seen(machine: Machine) -> None:
    """The probes of the manuals answer what is written beside them."""
    token = Client(machine, "any").matrix_token
    assert "M_UNKNOWN_TOKEN" in machine.run(given("docs/operating.md", "openid/userinfo?access_token=x"))
    assert "M_NOT_JSON" in machine.run(given("docs/operating.md", "# 400 M_NOT_JSON: it is there. 404: it is not"), MATRIX_TOKEN=token)
    assert "HTTP/1.1 401" in machine.run(given("docs/troubleshooting.md", "/webhooks/livekit    # 401 M_UNAUTHORIZED"))
    probes = machine.run(given("docs/migrate-from-lk-jwt-service.md", "/livekit/jwt/healthz"))
    assert re.findall(r"HTTP/1.1 (\d+)", probes) == ["400", "200"]
    assert '"status":"ok"' in machine.run(given("docs/migrate-from-lk-jwt-service.md", "the database, each homeserver, SFU and application service"))
    registration = yaml.safe_load(machine.file("/etc/matrix-synapse/sfu-delegate-registration.yaml").read_text())
    machine.sandbox("homeserver", "leave", "@alice:example.org", "!left:example.org")
    asked = given("docs/troubleshooting.md", "/is_joined?mxid=")
    assert json.loads(machine.run(asked, ROOM_ID="!left:example.org", AS_TOKEN=registration["as_token"]).splitlines()[-1]) == {"joined": False}


def test_a_delegation_is_found_by_its_person(machine: Machine) -> None:
    """The log and the database tell of a delegation by the user's id."""
    client = Client(machine, "found")
    delegation = answer_in(
        machine.run(
            given("docs/clients.md", "syd_yfwFVYySnPCaLuQIazTm").replace("syd_yfwFVYySnPCaLuQIazTm", client.schedule()),
            LIVEKIT_TOKEN=client.livekit_token,
        )
    )
    by_log = given("docs/troubleshooting.md", "grep -F '@alice:example.org'").replace("dlg_01a22719e1c347403932a1025f3edca1", delegation["id"])
    assert delegation["id"] in machine.run(by_log)
    by_database = machine.run(given("docs/troubleshooting.md", "sqlite3 -readonly -header"))
    assert delegation["id"] in by_database
    shown = json.loads(given("docs/operating.md", '"event":"homeserver_failed"').splitlines()[0])
    logged = machine.until_told("delegated", delegation["id"])
    assert logged.keys() == shown.keys()


def test_a_running_daemon_is_looked_into(machine: Machine) -> None:
    """The manual's questions are answered, with what its examples of answers show; and what can be done to a delegation is done."""
    clients = {room: Client(machine, room) for room in (room_name(ROOM), "another")}
    delegation = {}
    for room, client in clients.items():
        client.is_in()
        posted = given("docs/clients.md", "syd_yfwFVYySnPCaLuQIazTm").replace("syd_yfwFVYySnPCaLuQIazTm", client.schedule())
        delegation[room] = answer_in(machine.run(posted, LIVEKIT_TOKEN=client.livekit_token))["id"]
        machine.until_told("connected", delegation[room])
    status, at_a_time, by_room, rooms, listed, sentences = given("docs/operating.md", "--at 10:42  ").splitlines()
    answer = machine.run(status)
    assert answer.startswith("ok: sfu-delegate ")
    shown = [line for line in given("docs/operating.md", "ok: sfu-delegate 0.1.0").splitlines() if line and line[0] not in " o"]
    assert [line for line in answer.splitlines() if line and line[0] not in " o"][:-1] == shown[:-1]
    told = machine.run(at_a_time.replace("10:42", time.strftime("%H:%M")))
    assert "── the time that you ask about ──" in told
    assert "> " in told
    in_room = machine.run(by_room)
    assert f"@alice:example.org in {room_name(ROOM)} (SFU main)" in in_room
    assert "  Now: In the call for " in in_room
    assert {line.split("\t")[1] for line in machine.run(rooms).splitlines()} >= set(clients)
    ids = [line.split("\t")[0] for line in machine.run(listed).splitlines()]
    assert set(delegation.values()) <= set(ids)
    assert "In the call for " in machine.run(sentences)
    first, second = given("docs/operating.md", "sfu-delegate release dlg_01a22cb581609cc6e6fa41e75020ec6b   ").splitlines()
    ended = machine.run(first.replace("dlg_01a22cb5e0ae447ae38d4df003ea4b3f", delegation["another"]))
    assert "The participant will be shown as gone, though it is in the call now." in ended
    assert f"{delegation['another']}: sent. " in ended
    released = machine.run(second.replace("dlg_01a22cb581609cc6e6fa41e75020ec6b", delegation[room_name(ROOM)]))
    assert f"{delegation[room_name(ROOM)]}: released. " in released


def test_a_backup_can_be_restored(machine: Machine) -> None:
    """What the manual has backed up is what it restores, and the daemon starts with it."""
    machine.run(given("docs/operating.md", "source.backup(target)"))
    saved = machine.file("/var/backups/sfu-delegate/sfu-delegate.db")
    with closing(sqlite3.connect(saved)) as database:
        [[before]] = database.execute("SELECT count(*) FROM delayed_event")
    assert before > 0
    assert machine.file("/var/backups/sfu-delegate/sfu-delegate.db.key").stat().st_mode & 0o077 == 0
    machine.run(given("docs/operating.md", "# of the database that is replaced"))
    machine.until("it is ready", lambda: answers(machine))
    with closing(sqlite3.connect(machine.file("/var/lib/sfu-delegate/sfu-delegate.db"))) as database:
        assert database.execute("SELECT count(*) FROM delayed_event").fetchall() == [(before,)]


def test_configurations_are_checked_as_the_manual_says(machine: Machine) -> None:
    """The commands of docs/configuration.md, and the variables that lay keys over the file."""
    shutil.copy(machine.file("/etc/sfu-delegate/sfu-delegate.yaml"), machine.checkout / "sfu-delegate.yaml")
    plain, strict, shown = given("docs/configuration.md", "--strict   # risky").splitlines()
    assert "it can be used" in machine.run(plain)
    assert "refused, as --strict is on" in machine.run(strict, ends_with=1)
    assert SECRET not in machine.run(shown)
    over = given("docs/configuration.md", "SFU_DELEGATE_LISTEN__TRUSTED_PROXIES").replace("AS_TOKEN=…", "AS_TOKEN=another-token-that-is-long-enough")
    registered = yaml.safe_load((machine.checkout / "sfu-delegate.yaml").read_text())
    del registered["homeservers"][0]["registration_file"]
    (machine.checkout / "over.yaml").write_text(yaml.safe_dump(registered))
    laid = machine.run(f"set -a\n{over}\nsfu-delegate check-config -c over.yaml --show")
    config = yaml.safe_load("\n".join(line for line in laid.splitlines() if not line.startswith(("warning:", str(machine.root), "over.yaml:"))))
    assert config["listen"]["port"] == 8081
    assert config["listen"]["trusted_proxies"] == ["192.0.2.7/32"]
    assert config["cors"]["origins"] == ["https://call.example.org"]


def test_another_services_variables_become_a_configuration(machine: Machine, tmp_path: Path) -> None:
    """The two ways of docs/migrate-from-lk-jwt-service.md: with the secret in the file, and with a key file of its own."""
    config = machine.file("/etc/sfu-delegate/sfu-delegate.yaml")
    before = config.read_text()
    variables = f"LIVEKIT_URL=wss://sfu.example.org\nLIVEKIT_KEY={KEY}\nLIVEKIT_SECRET={SECRET}\nLIVEKIT_FULL_ACCESS_HOMESERVERS=example.org\n"
    (machine.checkout / "lk-jwt-service.env").write_text(variables)
    try:
        machine.run(given("docs/migrate-from-lk-jwt-service.md", "rm imported.yaml"))
        made = yaml.safe_load(config.read_text())
        assert made["homeservers"] == [{"name": "example.org"}]
        [sfu] = made["sfus"].values()
        assert sfu["keys"] == {KEY: SECRET}
    finally:
        config.write_text(before)
    machine.run(given("docs/migrate-from-lk-jwt-service.md", "--key-file /etc/sfu-delegate/livekit-keys.yaml"))
    assert SECRET not in (machine.checkout / "imported.yaml").read_text()


def test_a_key_is_made(machine: Machine) -> None:
    """What docs/security.md prints for a key is 32 bytes, in the form that the configuration takes."""
    key = machine.run(given("docs/security.md", "base64.urlsafe_b64encode(os.urandom(32))")).strip()
    assert len(base64.urlsafe_b64decode(key)) == 32


def test_new_tokens_are_made(machine: Machine) -> None:
    """After the manual's command the registration has other tokens, none of which was printed."""
    file = machine.file("/etc/matrix-synapse/sfu-delegate-registration.yaml")
    text = file.read_text()
    before = yaml.safe_load(text)
    file.chmod(0o600)
    try:
        printed = machine.run(given("docs/operating.md", "sfu-delegate.yaml --new-tokens"))
        after = yaml.safe_load(file.read_text())
        for name in ("as_token", "hs_token"):
            assert after[name] != before[name]
            assert after[name] not in printed
    finally:
        file.write_text(text)


# ── PostgreSQL ──


@pytest.mark.slow
def test_moving_to_postgresql_backing_it_up_and_restoring_it(tmp_path: Path) -> None:
    """The manual's way from SQLite to PostgreSQL: role and database, keys, copying, the configuration; then a dump, and what it brings back."""
    needs("bash", "curl", "jq", "psql")
    with postgresql.Server() as server, Machine(tmp_path, database=server) as machine:
        with (server.directory / "data" / "pg_hba.conf").open("a") as rules:
            rules.write("host sfu_delegate sfu_delegate 127.0.0.1/32 scram-sha-256\n")
        server.execute("SELECT pg_reload_conf()")
        install(machine)
        client = Client(machine, "moves")
        asked = given("docs/clients.md", "syd_yfwFVYySnPCaLuQIazTm").replace("syd_yfwFVYySnPCaLuQIazTm", client.schedule())
        delegation = answer_in(machine.run(asked, LIVEKIT_TOKEN=client.livekit_token))

        machine.run(given("docs/operating.md", "createuser --pwprompt"), told="of-the-role\nof-the-role\n")
        machine.run(given("docs/operating.md", "touch postgresql-password encryption-keys"))
        machine.file("/etc/sfu-delegate/postgresql-password").write_text("of-the-role\n")
        machine.run(given("docs/operating.md", "sfu-delegate.db.key /etc/sfu-delegate/encryption-keys"))
        new = yaml.safe_load(machine.file("/etc/sfu-delegate/sfu-delegate.yaml").read_text())
        shared = yaml.safe_load(machine.here(given("docs/operating.md", "keys_file: /etc/sfu-delegate/encryption-keys")))
        machine.file("/etc/sfu-delegate/new.yaml").write_text(yaml.safe_dump({**new, **shared, "listen": {}, "admin": {}}))
        dry_run, move = given("docs/operating.md", "copy-database --dry-run"), given("docs/operating.md", "mv /etc/sfu-delegate/new.yaml")
        assert "It can be copied" in machine.run(dry_run)
        assert "Copied, and each row compared" in machine.run(dry_run.partition("/opt/")[0] + move)
        machine.until("it is ready", lambda: answers(machine))
        assert "sfu_delegate_instances 1" in machine.run(given("docs/operating.md", "grep '^sfu_delegate_instances'"))
        assert delegation["id"] in machine.run(given("docs/troubleshooting.md", "to_timestamp(accepted_at) AS delegated"))
        assert "1 row" in machine.run(given("docs/troubleshooting.md", "to_timestamp(alive_at) FROM instance"))

        machine.run(given("docs/operating.md", "pg_dump --format=custom"))
        machine.run(given("docs/operating.md", "pg_restore --exit-on-error"))
        machine.until("it is ready", lambda: answers(machine))
        assert delegation["id"] in machine.run(given("docs/troubleshooting.md", "to_timestamp(accepted_at) AS delegated"))
