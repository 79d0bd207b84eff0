"""The unit is one that systemd takes, that gives the daemon little to do harm with, and that really starts, reloads, watches and stops it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sfu_delegate.config.registration import make

from tests.install import debian
from tests.snippets import given, snippets

UNIT = debian.ROOT / "systemd" / "sfu-delegate.service"
PROGRAM = "/opt/sfu-delegate/bin/sfu-delegate"
LOW = 2.0  # systemd calls it "OK" below 5; what is left over is the network that the daemon is for

SECRET = "a-secret-of-livekit-that-nobody-else-may-see"
CONFIG = f"""\
database: sqlite:////var/lib/sfu-delegate/sfu-delegate.db
admin: {{socket: /run/sfu-delegate/admin.sock}}
sfus:
  main:
    url: ws://127.0.0.1:7880
    keys: {{APIexample: {SECRET}}}
homeservers:
  - name: example.org
    url: http://127.0.0.1:8008
"""
SCENARIO = """\
[Unit]
After=sfu-delegate.service
[Service]
Type=oneshot
TimeoutStartSec=300
ExecStart=/usr/bin/python3 /scenario.py
[Install]
WantedBy=multi-user.target
"""


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    return subprocess.run(("systemd-analyze", *arguments), capture_output=True, text=True, timeout=60, check=False)


def exposure(text: str) -> float:
    found = re.search(r"Overall exposure level for sfu-delegate.service: ([\d.]+)", text)
    assert found, text
    return float(found[1])


def test_systemd_has_nothing_to_complain_of(tmp_path: Path) -> None:
    """`systemd-analyze verify` is silent about the unit; the program is another one here, since ours is not installed."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(PROGRAM, "/bin/true"))
    done = analyze("verify", str(unit))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_exposure_is_low_and_the_manual_says_how_low() -> None:
    """`systemd-analyze security` rates it, and docs/operating.md has the same number."""
    level = exposure(analyze("security", "--offline=true", str(UNIT)).stdout)
    assert level < LOW
    told = re.findall(r"`systemd-analyze security`[^|]*?(\d\.\d)", (debian.ROOT / "docs" / "operating.md").read_text())
    assert told == [f"{level}"]


def test_the_credentials_of_the_unit_are_those_of_the_manual() -> None:
    """Each is named in the manual, and begins with the name of the daemon, since all services share the place where systemd looks."""
    names = re.findall(r"(?m)^LoadCredential=(\S+)$", UNIT.read_text())
    manual = (debian.ROOT / "docs" / "operating.md").read_text()
    assert len(names) == 5
    for name in names:
        assert name.startswith("sfu-delegate.")
        assert f"`{name}`" in manual


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of it in a Debian that was booted with the unit: see scenario.py."""
    debian.needed("systemd-nspawn", "debootstrap")
    root = tmp_path_factory.mktemp("systemd") / "delegate"
    root.mkdir()
    debian.debian(root)
    debian.within(root, "apt-get", "update", "-q")
    debian.within(
        root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-yq", "--no-install-recommends", "systemd", "systemd-sysv", "dbus"
    )
    install(root)
    (root / "scenario.py").write_text((Path(__file__).parent / "scenario.py").read_text())
    (root / "etc/systemd/system/scenario.service").write_text(SCENARIO)
    debian.within(root, "systemctl", "enable", "sfu-delegate.service", "scenario.service")
    subprocess.run(
        ("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--console=pipe", "--boot", f"--directory={root}"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=10 * debian.MINUTES,
        check=False,
    )
    result = root / "result.json"
    if not result.exists():
        pytest.skip("systemd-nspawn cannot boot here")
    found: dict[str, Any] = json.loads(result.read_text())
    assert "failed" not in found, found
    return found


def install(root: Path) -> None:
    """As the README says, without credentials at first."""
    debian.checkout(root / "src")
    for command in (
        "python3 -m venv /opt/sfu-delegate",
        "/opt/sfu-delegate/bin/pip install --quiet --require-hashes -r /src/requirements/run.txt",
        "/opt/sfu-delegate/bin/pip install --quiet --no-deps --no-build-isolation /src",
        "useradd --system --user-group --no-create-home --shell /usr/sbin/nologin sfu-delegate",
        "install -d -o root -g sfu-delegate -m 0750 /etc/sfu-delegate",
        "install -o root -g sfu-delegate -m 0640 /dev/null /etc/sfu-delegate/sfu-delegate.yaml",
        "install -d -m 0700 /etc/matrix-synapse",
        "install -m 0600 /dev/null /etc/matrix-synapse/sfu-delegate-registration.yaml",
    ):
        debian.within(root, *command.split())
    (root / "etc/sfu-delegate/sfu-delegate.yaml").write_text(CONFIG)
    registration = make("example.org", f"{SECRET}-as", f"{SECRET}-hs", "http://127.0.0.1:8080")
    (root / "etc/matrix-synapse/sfu-delegate-registration.yaml").write_text(registration)
    # What the manual says of credentials, for the time after the boot.
    (root / "livekit-keys.yaml").write_text(f"APIexample: {SECRET}\n")
    (root / "by-the-manual.sh").write_text(given("docs/operating.md", "install -d -o root -g root -m 0700 /etc/credstore"))
    [snippet] = [one.text for one in snippets("yaml") if "${CREDENTIALS_DIRECTORY}/sfu-delegate.registration" in one.text]
    (root / "with-credentials.yaml").write_text(CONFIG.partition("sfus:")[0] + snippet)
    shutil.copyfile(UNIT, root / "etc/systemd/system" / UNIT.name)


@pytest.mark.slow
def test_it_is_ready_when_systemd_says_so(booted: dict[str, Any]) -> None:
    """What is ordered after the unit finds both the listener and the database, and the socket; that there are no credentials is no trouble."""
    assert (booted["ready"]["status"], booted["ready"]["body"]["database"]) == (200, "ok")
    started = booted["started"]
    assert (started["ActiveState"], started["Type"], started["NRestarts"]) == ("active", "notify", "0")
    assert started["WatchdogUSec"] == "1min"
    assert "delayed events" in started["StatusText"]
    assert booted["socket"][0] == 0, booted["socket"]


@pytest.mark.slow
def test_it_can_do_little_harm(booted: dict[str, Any]) -> None:
    """No root, no capabilities, no new privileges, fewer system calls, and places that nobody else can enter."""
    process = booted["process"]
    assert "0" not in process["Uid"].split()
    assert (int(process["CapBnd"], 16), int(process["CapEff"], 16), process["NoNewPrivs"], process["Seccomp"]) == (0, 0, "1", "2")
    assert exposure(booted["security"]) < LOW
    assert booted["verify"] == [0, ""]
    assert booted["places"]["/etc/sfu-delegate"] == "root:sfu-delegate 750"
    assert booted["places"]["/var/lib/private/sfu-delegate"] == "sfu-delegate:sfu-delegate 700"
    assert booted["places"]["/run/sfu-delegate"] == "sfu-delegate:sfu-delegate 750"


@pytest.mark.slow
def test_secrets_are_credentials(booted: dict[str, Any]) -> None:
    """By the commands of the manual, with the files of root alone; those of the five that are there are loaded."""
    code, said = booted["by the manual"]
    assert code == 0, said
    assert "it can be used" in said or said.endswith(": good\n")
    assert booted["with credentials"]["status"] == 200
    assert booted["credentials"] == ["sfu-delegate.livekit-keys", "sfu-delegate.registration"]
    code, said = booted["by hand, without"]
    assert code == 1
    assert "CREDENTIALS_DIRECTORY is not set" in said
    assert "CREDENTIALS_DIRECTORY=/etc/credstore sfu-delegate" in said


@pytest.mark.slow
def test_a_reload_fails_visibly_for_a_bad_file(booted: dict[str, Any]) -> None:
    """`systemctl reload` says so, and the daemon goes on as before; a good file is read, with the credentials of the start."""
    assert booted["bad reload"][0] != 0
    assert booted["after it"] == {"ActiveState": "active", "MainPID": booted["started"]["MainPID"]}
    assert booted["reload"] == [0, ""]
    assert booted["worse reload"][0] != 0
    assert booted["after reloads"] == booted["before reloads"]
    assert sum('"config_reloaded"' in line for line in booted["journal"]) == 1
    assert not any('"config_not_reloaded"' in line for line in booted["journal"])


@pytest.mark.slow
def test_the_watchdog_restarts_what_stands_still_and_nothing_else(booted: dict[str, Any]) -> None:
    """With a watchdog of 3 s: a daemon with nothing to do lives on; one that was stopped is started again, and works."""
    assert booted["restart"] == [0, ""]
    assert (booted["alive"]["ActiveState"], booted["alive"]["NRestarts"]) == ("active", "0")
    assert booted["restarted"] == {"ActiveState": "active", "NRestarts": "1"}
    assert booted["ready again"]["status"] == 200
    assert any("Watchdog timeout" in line for line in booted["journal"])
    assert any("Fatal Python error: Aborted" in line for line in booted["journal"])  # and then where each thread was


@pytest.mark.slow
def test_a_stop_is_a_success(booted: dict[str, Any]) -> None:
    """Exit code 0, and no secret was told on the way."""
    assert booted["stop"] == [0, ""]
    assert booted["stopped"] == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    assert not any(SECRET in line for line in booted["journal"])
