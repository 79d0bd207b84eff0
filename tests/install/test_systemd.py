"""The unit is one that systemd takes, that gives the daemon little to do harm with, and that really starts, reloads, watches and stops it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.install import debian

UNIT = debian.ROOT / "systemd" / "sfu-delegate.service"
PROGRAM = "/opt/sfu-delegate/bin/sfu-delegate"
LOW = 2.0  # systemd calls it "OK" below 5; what is left over is the network that the daemon is for

SECRET = "a-secret-of-livekit-that-nobody-else-may-see"
CONFIG = """\
database: sqlite:////var/lib/sfu-delegate/sfu-delegate.db
sfus:
  main:
    url: ws://127.0.0.1:7880
    key_file: ${CREDENTIALS_DIRECTORY}/sfu-delegate.livekit-keys
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
    """As the README says, with the secrets in systemd's own place."""
    debian.checkout(root / "src")
    for command in (
        "python3 -m venv /opt/sfu-delegate",
        "/opt/sfu-delegate/bin/pip install --quiet --require-hashes -r /src/requirements/run.txt",
        "/opt/sfu-delegate/bin/pip install --quiet --no-deps --no-build-isolation /src",
        "useradd --system --user-group --no-create-home --shell /usr/sbin/nologin sfu-delegate",
        "install -d -o root -g sfu-delegate -m 0750 /etc/sfu-delegate",
        "install -o root -g sfu-delegate -m 0640 /dev/null /etc/sfu-delegate/sfu-delegate.yaml",
        "install -d -m 0700 /etc/credstore",
        "install -m 0600 /dev/null /etc/credstore/sfu-delegate.livekit-keys",
    ):
        debian.within(root, *command.split())
    (root / "etc/sfu-delegate/sfu-delegate.yaml").write_text(CONFIG)
    (root / "etc/credstore/sfu-delegate.livekit-keys").write_text(f"APIexample: {SECRET}\n")
    shutil.copyfile(UNIT, root / "etc/systemd/system" / UNIT.name)


@pytest.mark.slow
def test_it_is_ready_when_systemd_says_so(booted: dict[str, Any]) -> None:
    """What is ordered after the unit finds both the listener and the database; no credential but the one that there is was loaded."""
    assert (booted["ready"]["status"], booted["ready"]["body"]["database"]) == (200, "ok")
    started = booted["started"]
    assert (started["ActiveState"], started["Type"], started["NRestarts"]) == ("active", "notify", "0")
    assert started["WatchdogUSec"] == "1min"
    assert "delayed events" in started["StatusText"]
    assert booted["credentials"] == ["sfu-delegate.livekit-keys"]


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
def test_a_reload_fails_visibly_for_a_bad_file(booted: dict[str, Any]) -> None:
    """`systemctl reload` says so, and the daemon goes on as before."""
    assert booted["reload"] == [0, ""]
    assert booted["bad reload"][0] != 0
    assert booted["after reloads"] == {"ActiveState": "active", "MainPID": booted["started"]["MainPID"]}
    assert sum('"config_reloaded"' in line for line in booted["journal"]) == 1


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


@pytest.mark.slow
def test_the_configuration_can_be_checked_by_hand(booted: dict[str, Any]) -> None:
    """As root, with the directory that systemd reads; without it, the problem says how."""
    code, said = booted["by hand"]
    assert code == 0, said
    code, said = booted["by hand, without"]
    assert code == 1
    assert "CREDENTIALS_DIRECTORY is not set" in said
    assert "CREDENTIALS_DIRECTORY=/etc/credstore sfu-delegate" in said
