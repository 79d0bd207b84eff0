"""A machine as the documentation's commands need it: folders of its own for /etc, /opt, /usr/local and /var, stand-ins and the real daemon.

The commands are run by a real shell, with the real `sfu-delegate`, `curl`, `sqlite3` and the rest. Only what would change the machine that the tests
run on is a stand-in: users and owners, systemd and its journal, and, unless it is asked for, what is downloaded. Hosts and ports of the examples are
replaced by those that there are. Everything is on loopback, and ends with the block.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from sfu_delegate.demo.processes import free_ports

from tests import postgresql
from tests.snippets import ROOT

KEY, SECRET = "APIexample", "put-the-secret-of-this-key-here-"
ALICE = "@alice:example.org"
WITHIN = 60.0  # seconds until something that takes a moment is given up

_STAND_INS = {
    # Who makes users and gives files away is root, of a real machine.
    "useradd": 'case "$*" in *--system*" sfu-delegate") echo sfu-delegate >> "$R/users";; *) exit 2;; esac',
    "chown": 'for last; do :; done; test -e "$last"',
    "chgrp": 'for last; do :; done; test -e "$last"',
    "install": """
kept=()
while [ $# -gt 0 ]; do case "$1" in -o|-g) shift 2;; *) kept+=("$1"); shift;; esac; done
exec /usr/bin/install "${kept[@]}" """,
    "runuser": """
[ "$1" = -u ] && user=$2 && [ "$3" = -- ] && shift 3 || exit 2
if [ "$user" = postgres ]; then PATH="$PG_PROGRAMS:$PATH"; export PATH PGHOST PGPORT PGUSER=postgres; fi
exec "$@" """,
    # The unit's own command, as systemd would start and stop it.
    "systemctl": """
unit="$R/etc/systemd/system/sfu-delegate.service"
start() {
    test -f "$unit" || exit 5
    mkdir -p -m 700 "$R/var/lib/sfu-delegate"
    command=$(sed -n 's/^ExecStart=//p' "$unit" | sed "s|/opt/|$R/opt/|g; s|/etc/|$R/etc/|g")
    (cd "$R/var/lib/sfu-delegate" && exec setsid $command >> "$R/journal" 2>&1 < /dev/null) &
    echo $! > "$R/pid"
}
stop() {
    pid=$(cat "$R/pid" 2> /dev/null) || return 0
    kill -TERM "$pid" 2> /dev/null
    while kill -0 "$pid" 2> /dev/null; do sleep 0.05; done
    rm -f "$R/pid"
}
case "$*" in
    daemon-reload) test -f "$unit";;
    "enable --now sfu-delegate"|"start sfu-delegate") start;;
    "stop sfu-delegate") stop;;
    "restart sfu-delegate") stop; start;;
    *) exit 2;;
esac""",
    "journalctl": '[ "$1 $2" = "-u sfu-delegate" ] && cat "$R/journal"',
}
_PYTHON = """
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"
    for name in python pip sfu-delegate; do cp "$R/standing/$name" "$3/bin/$name"; done
else exec "$PYTHON" "$@"; fi"""
_INSTALLED = {
    "python": 'exec "$PYTHON" "$@"',
    # What it would install is in the tests' own environment.
    "pip": 'case "$*" in *" -r "*) test -s "${@: -1}";; *" .") test -f pyproject.toml;; *) exit 2;; esac',
    "sfu-delegate": 'exec "$PYTHON" -m sfu_delegate.cli "$@"',
}


def needs(*programs: str) -> None:
    """Skip the test where one of these is not installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


class Machine:
    """The machine. `really_installed`: packages come from where pip gets them, into a virtual environment of their own."""

    def __init__(self, directory: Path, *, really_installed: bool = False, database: postgresql.Server | None = None) -> None:
        self.root = directory
        self.checkout = directory / "checkout"
        self._really = really_installed
        self._postgresql = database
        self._sandbox: subprocess.Popen[str] | None = None
        self.public, self.admin = free_ports(2)
        self.at: dict[str, str] = {}  # addresses of the sandbox
        self.environment: dict[str, str] = {}
        self.printed = ""  # by the quickstart

    def __enter__(self) -> Self:
        for folder in ("bin", "standing", "checkout", "etc/systemd/system", "etc/matrix-synapse", "opt", "usr/local/bin", "var/lib", "var/backups"):
            (self.root / folder).mkdir(parents=True)
        for name in ("requirements", "systemd", "config", "sfu_delegate", "docs"):
            shutil.copytree(ROOT / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.checkout)
        for name, text in _STAND_INS.items():
            self._script(f"bin/{name}", text)
        if not self._really:
            self._script("bin/python3", _PYTHON)
        for name, text in _INSTALLED.items():
            self._script(f"standing/{name}", text)
        command = [sys.executable, "-m", "sfu_delegate.sandbox", "--key", KEY, "--secret", SECRET, "--server-name", "example.org", "--rate", "0"]
        command += ["--webhook", f"http://127.0.0.1:{self.public}/webhooks/livekit"]
        self._sandbox = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._sandbox.stdout is not None
        self.at = json.loads(self._sandbox.stdout.readline())
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SFU_DELEGATE_")}
        self.environment = {
            **inherited,
            "PATH": f"{self.root / 'bin'}:{self.root / 'usr/local/bin'}:{os.environ['PATH']}",
            "R": str(self.root),
            "PYTHON": sys.executable,
            "PYTHONPATH": "" if self._really else str(ROOT),
            "SFU_DELEGATE_CONFIG": str(self.root / "etc/sfu-delegate/sfu-delegate.yaml"),
            "SFU_DELEGATE_LISTEN__PORT": str(self.public),
            "SFU_DELEGATE_ADMIN__PORT": str(self.admin),
            "SFU_DELEGATE_ADMIN__SOCKET": str(self.root / "admin.sock"),
            # So that what takes two minutes in the examples does not in the tests.
            "SFU_DELEGATE_PRESENCE__JOIN_TIMEOUT": "5s",
        }
        if self._postgresql is not None:
            server = {"PGHOST": str(self._postgresql.directory), "PGPORT": str(self._postgresql.port)}
            self.environment |= {**server, "PG_PROGRAMS": str(postgresql.programs())}
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._sandbox is not None:
            self._sandbox.terminate()
            self._sandbox.communicate()

    def _script(self, path: str, text: str) -> None:
        script = self.root / path
        script.write_text(f"#!/bin/bash\n{text}\n")
        script.chmod(0o755)

    # ── what the examples say, for this machine ──

    def here(self, text: str) -> str:
        """The text with this machine's folders, hosts and ports."""
        public, admin, homeserver = f"http://127.0.0.1:{self.public}", f"http://127.0.0.1:{self.admin}", self.at["homeserver"]
        sfu = self.at["sfu"].replace("http", "ws")
        for old, new in (
            ("https://sfu.example.org/livekit/jwt", public),
            ("https://matrix.example.org/livekit/jwt", public),
            ("https://matrix.example.org:8448", homeserver),
            ("https://matrix.example.org", homeserver),
            ("https://sfu.example.org", public),
            ("wss://sfu.example.org", sfu),
            ("http://127.0.0.1:8080", public),
            ("http://127.0.0.1:8081", admin),
            ("http://10.0.0.11:8081", admin),
            (
                "db.example.org/sfu_delegate?sslmode=verify-full&sslrootcert=/etc/sfu-delegate/postgresql-ca.pem",
                f"{self._database()}?sslmode=disable",
            ),
            ("/opt/sfu-delegate", f"{self.root}/opt/sfu-delegate"),
            ("/etc/", f"{self.root}/etc/"),
            ("/usr/local/", f"{self.root}/usr/local/"),
            ("/var/", f"{self.root}/var/"),
        ):
            text = text.replace(old, new)
        return text

    def _database(self) -> str:
        return f"{postgresql.HOST}:{self._postgresql.port}/sfu_delegate" if self._postgresql is not None else "db.example.org/sfu_delegate"

    def file(self, path: str) -> Path:
        """A file by the path that it has in the examples."""
        return Path(self.here(path))

    def run(self, snippet: str, *, ends_with: int = 0, told: str = "", **variables: str) -> str:
        """Run a block in bash, until the first command of it that fails; what it prints, errors included."""
        done = subprocess.run(
            ["bash", "-e", "-c", self.here(snippet)],
            cwd=self.checkout,
            env=self.environment | variables,
            input=told,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == ends_with, f"{snippet}\nended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def configure(self, snippet: str, **homeserver: Any) -> None:
        """Write the daemon's configuration from a block; `homeserver` is what its entry needs here in addition."""
        config = yaml.safe_load(self.here(snippet))
        config["homeservers"][0] |= {"federation_url": self.at["homeserver"], **homeserver}
        self.file("/etc/sfu-delegate/sfu-delegate.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    # ── what is around it ──

    def sandbox(self, server: str, operation: str, *args: Any, **arguments: Any) -> Any:
        """Drive the stand-in SFU or homeserver."""
        body = json.dumps({**arguments, **({"args": args} if args else {})}).encode()
        request = urllib.request.Request(f"{self.at[f'{server}_control']}/sandbox/{operation}", data=body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["result"]

    def get(self, path: str) -> str:
        """What the admin listener answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}{path}") as answer:
            text: str = answer.read().decode()
            return text

    def journal(self) -> list[Mapping[str, Any]]:
        """The daemon's log."""
        path = self.root / "journal"
        return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")] if path.exists() else []

    def until(self, what: str, condition: Callable[[], object]) -> Any:
        """Wait until there is something, and return it."""
        deadline = time.monotonic() + WITHIN
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{what}: not within {WITHIN:g} seconds\n{(self.root / 'journal').read_text()[-3000:]}"
            time.sleep(0.05)
        return value

    def until_told(self, what: str, of: str = "") -> Mapping[str, Any]:
        """Wait until the log has this event, or this word of a delegation, and return the line."""

        def found() -> Mapping[str, Any] | None:
            lines = (line for line in self.journal() if what in (line["event"], line.get("what")))
            return next((line for line in lines if of in (line.get("delegation", ""), "")), None)

        line: Mapping[str, Any] = self.until(f"the log tells {what}", found)
        return line

    def kill(self) -> None:
        """End the daemon, if it runs."""
        pid = self.root / "pid"
        if pid.exists():
            with suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGKILL)
            pid.unlink()
