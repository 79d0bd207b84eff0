"""The daemon as a process of its own, as an operator runs it, and what a client says to it."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from sfu_delegate.demo.processes import HOST, Child, free_ports, until

READY_WITHIN = 60.0  # seconds
REQUEST_TIMEOUT = 15.0

Json = dict[str, Any]


class DaemonProcess:
    """`sfu-delegate serve` with `config`, in `directory`, where its database is, too. Listeners and log are set where the configuration is silent.

    `log_lines` are the lines of its JSON log; `on_entry` gets each of them, decoded, as it comes.
    """

    def __init__(self, config: Mapping[str, Any], directory: Path, *, on_entry: Callable[[Json], None] | None = None) -> None:
        public, admin = free_ports(2)
        self.directory = directory
        self.config: Json = {
            "listen": {"host": HOST, "port": public},
            "admin": {"host": HOST, "port": admin},
            "database": f"sqlite:///{directory}/delegate.db",
            "log": {"level": "info", "format": "json"},
            **config,
        }
        self.public_url = _url(self.config["listen"])
        self.admin_url = _url(self.config["admin"])
        self.webhook_url = f"{self.public_url}/webhooks/livekit"
        self.log_lines: list[str] = []
        self._on_entry = on_entry
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._running().pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._running().returncode

    async def start(self) -> None:
        """Start it, and wait until it is ready. Raises Died or NeverHappened."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / "sfu-delegate.yaml"
        file.touch(mode=0o600)
        file.write_text(yaml.safe_dump(self.config))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SFU_DELEGATE_")}
        command = [sys.executable, "-m", "sfu_delegate.cli", "serve", "--config", str(file)]
        self._child = await Child.start("sfu-delegate", command, directory=self.directory, on_line=self._read, environment=environment)
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT)) as http:
                await until(lambda: self._ready(http), READY_WITHIN, "the daemon is ready")
        except BaseException:
            await self._child.kill()
            raise

    async def stop(self) -> int:
        """SIGTERM, and SIGKILL if that takes too long; its exit code."""
        return await self._running().stop()

    async def kill(self) -> None:
        """SIGKILL, now."""
        await self._running().kill()

    async def restart(self) -> None:
        """Start it again, on the same database and ports; stop it first where it runs."""
        await self.stop()
        await self.start()

    def send_signal(self, number: int) -> None:
        """Send it a signal, by its process id."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def entries(self, event: str = "") -> list[Json]:
        """What it has logged, or only the lines with this event."""
        return [entry for line in self.log_lines if (entry := _decoded(line)) is not None and event in ("", entry.get("event"))]

    def _running(self) -> Child:
        if self._child is None:
            raise RuntimeError("it was not started")
        return self._child

    async def _ready(self, http: aiohttp.ClientSession) -> bool:
        self._running().must_run()
        try:
            async with http.get(f"{self.admin_url}/health/ready") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    def _read(self, line: str) -> None:
        self.log_lines.append(line)
        entry = _decoded(line)
        if entry is not None and self._on_entry is not None:
            self._on_entry(entry)


class DelegateApi:
    """The delegation API as a client uses it. Each call returns the HTTP status and the decoded body."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self._url = f"{url}/v1/delegations"
        self._http = http

    async def delegate(
        self, access_token: str, homeserver: str, delay_id: str, delay_ms: int, *, on_disconnect: str = "send", token: str | None = None
    ) -> tuple[int, Json]:
        """Hand over one delayed event; `access_token` is the participant's LiveKit access token."""
        event = {"delay_id": delay_id, "delay_ms": delay_ms, "on_disconnect": on_disconnect}
        body = {"homeserver": homeserver, "delayed_events": [event]} | ({} if token is None else {"token": token})
        return await self._call("POST", self._url, access_token, body)

    async def show(self, delegation: str, token: str) -> tuple[int, Json]:
        """What is known of a delegation, by its management token or the participant's access token."""
        return await self._call("GET", f"{self._url}/{delegation}", token)

    async def withdraw(self, delegation: str, token: str) -> tuple[int, Json]:
        """Take it back."""
        return await self._call("DELETE", f"{self._url}/{delegation}", token)

    async def _call(self, method: str, url: str, token: str, body: Json | None = None) -> tuple[int, Json]:
        async with self._http.request(method, url, json=body, headers={"Authorization": f"Bearer {token}"}) as response:
            return response.status, await response.json(content_type=None)


async def metric(http: aiohttp.ClientSession, admin_url: str, name: str, *containing: str) -> float:
    """The sum of a metric's samples, or only of those whose labels contain all these texts, such as `outcome="sent"`."""
    async with http.get(f"{admin_url}/metrics") as response:
        lines = (await response.text()).splitlines()
    samples = [line for line in lines if line.startswith((f"{name} ", f"{name}{{")) and all(text in line for text in containing)]
    return sum(float(line.rpartition(" ")[2]) for line in samples)


def _url(listener: Mapping[str, Any]) -> str:
    return f"http://{listener['host']}:{listener['port']}"


def _decoded(line: str) -> Json | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
