"""What the test of the systemd unit does in a booted Debian, by the Python of that: results as JSON, in the order of things.

It imports nothing but the standard library, and is not a test itself.
"""

import json
import os
import signal
import subprocess
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNIT = "sfu-delegate.service"
CONFIG = Path("/etc/sfu-delegate/sfu-delegate.yaml")
WATCHDOG = Path("/run/systemd/system/sfu-delegate.service.d/watchdog.conf")


def run(*command: str) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def show(*names: str) -> dict[str, str]:
    said = run("systemctl", "show", UNIT, *(f"--property={name}" for name in names))[1]
    return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)


def health(path: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:8081{path}", timeout=10) as answer:
            return {"status": answer.status, "body": json.loads(answer.read())}
    except urllib.error.HTTPError as error:
        return {"status": error.code}
    except OSError as error:
        return {"error": str(error)}


def until(condition: Callable[[], object], within: float = 90.0) -> bool:
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def stat(path: str) -> str:
    return run("stat", "--format=%U:%G %a", path)[1].strip()


def process(pid: str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {name: status[name] for name in ("Uid", "CapBnd", "CapEff", "NoNewPrivs", "Seccomp")}


def main(result: dict[str, Any]) -> None:
    # Ordered after the unit and nothing else: what answers now answered when it was ready.
    result["ready"] = health("/health/ready")
    result["started"] = show("ActiveState", "Type", "StatusText", "User", "DynamicUser", "NRestarts", "WatchdogUSec", "MainPID")
    pid = result["started"]["MainPID"]
    result["process"] = process(pid)
    result["places"] = {path: stat(path) for path in ("/etc/sfu-delegate", "/var/lib/private/sfu-delegate", "/run/sfu-delegate", f"/proc/{pid}")}
    result["security"] = run("systemd-analyze", "security", UNIT)[1].strip().splitlines()[-1]
    result["verify"] = run("systemd-analyze", "verify", f"/etc/systemd/system/{UNIT}")
    result["socket"] = run("/opt/sfu-delegate/bin/sfu-delegate", "healthcheck", "--ready")

    CONFIG.write_text(Path("/with-credentials.yaml").read_text())
    result["bad reload"] = run("systemctl", "reload", UNIT)  # nobody has given it any
    result["after it"] = show("ActiveState", "MainPID")
    result["by the manual"] = run("sh", "-e", "/by-the-manual.sh")
    result["with credentials"] = health("/health/ready")
    result["credentials"] = sorted(os.listdir(f"/run/credentials/{UNIT}"))
    result["by hand, without"] = run("/opt/sfu-delegate/bin/sfu-delegate", "check-config")

    result["before reloads"] = show("ActiveState", "MainPID")
    good = CONFIG.read_text()
    result["reload"] = run("systemctl", "reload", UNIT)
    CONFIG.write_text("sfus: [")
    result["worse reload"] = run("systemctl", "reload", UNIT)
    result["after reloads"] = show("ActiveState", "MainPID")
    CONFIG.write_text(good)

    WATCHDOG.parent.mkdir(parents=True)
    WATCHDOG.write_text("[Service]\nWatchdogSec=3\n")
    run("systemctl", "daemon-reload")
    result["restart"] = run("systemctl", "restart", UNIT)
    time.sleep(7)  # twice as long as the watchdog waits
    result["alive"] = show("ActiveState", "NRestarts", "WatchdogUSec", "MainPID")
    os.kill(int(result["alive"]["MainPID"]), signal.SIGSTOP)
    until(lambda: show("NRestarts")["NRestarts"] == "1" and show("ActiveState")["ActiveState"] == "active")
    result["restarted"] = show("ActiveState", "NRestarts")
    result["ready again"] = health("/health/ready")
    result["stop"] = run("systemctl", "stop", UNIT)
    result["stopped"] = show("ActiveState", "Result", "ExecMainStatus")
    result["journal"] = run("journalctl", "--unit", UNIT, "--output", "cat", "--no-pager")[1].splitlines()


if __name__ == "__main__":
    result: dict[str, Any] = {}
    try:
        main(result)
    except Exception:
        result["failed"] = traceback.format_exc()
    Path("/result.json").write_text(json.dumps(result, indent=1))
    subprocess.run(("systemctl", "poweroff", "--force"), check=False)
