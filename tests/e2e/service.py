"""A call whose homeservers have the daemon as their application service: real Synapses, registered by what `sfu-delegate appservice` wrote."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from sfu_delegate.demo.matrix import Account
from sfu_delegate.demo.processes import HOST as LOOPBACK
from sfu_delegate.demo.processes import free_ports
from sfu_delegate.demo.synapse import Federation, Synapse

from tests.e2e.call import Call, running_call
from tests.e2e.daemon_process import config_for
from tests.e2e.federation import HOST
from tests.e2e.matrixrtc import SLOT, Json, RtcClient
from tests.integration.certificates import Certificates

STABLE = "/_matrix/client/v1/rtc/livekit"
UNSTABLE = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit"
GET_TOKEN, DELEGATE = "/get_token", "/delegate_delayed_leave"
ON = {"msc4512_enabled": True, "msc4502_enabled": True}


def register(directory: Path, name: str, url: str, port: int) -> Path:
    """What an operator does: the command, for a configuration that names the file. Returns the file."""
    registration = directory / f"{name.replace(':', '_')}.yaml"
    config = config_for("ws://127.0.0.1:7880", [(name, url)], listen={"host": LOOPBACK, "port": port})
    config["homeservers"][0]["registration_file"] = str(registration)
    file = directory / "to-register.yaml"
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "sfu_delegate.cli", "appservice", "--config", str(file), "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert (said["action"], said["file"]) == ("written", str(registration))
    return registration


@dataclass(slots=True)
class ServedCall:
    """What a test plays with. `others` are further homeservers of the same daemon; `far` is one with another daemon, and another SFU."""

    call: Call
    synapse: Synapse
    url: str  # of the SFU
    others: list[Synapse] = field(default_factory=list)
    far: "ServedCall | None" = None

    async def post(
        self, path: str, account: Account | None, body: Json, *, at: Synapse | None = None, headers: Mapping[str, str] = {}
    ) -> tuple[int, Json]:
        """A request of this user to its homeserver: HTTP status and decoded answer."""
        given = {} if account is None else {"Authorization": f"Bearer {account.access_token}"}
        async with self.call.http.post((at or self.synapse).url + path, json=body, headers={**given, **headers}) as response:
            return response.status, await response.json()

    def body(self, client: RtcClient, *, with_device: bool = False, delayed: bool = False, room_id: str | None = None) -> Json:
        """What a client sends, in the proposal's shape, or in that of deployed clients `with_device`."""
        member: Json = {"member_id": client.member_id}
        if with_device:
            member = {"member": {"id": client.member_id, "claimed_device_id": client.account.device_id}}
        delay: Json = {}
        if delayed:
            # A client may say anything of its delay.
            delay = {"delay_id": client.delay_id} | ({"delay_timeout": 77} if with_device else {})
        return {"url": self.url, "room_id": room_id or self.call.room_id, "slot_id": SLOT, **member, **delay}

    async def token(self, client: RtcClient, prefix: str = UNSTABLE, *, with_device: bool = False) -> None:
        """The client gets its LiveKit token through its homeserver."""
        status, answer = await self.post(prefix + GET_TOKEN, client.account, self.body(client, with_device=with_device))
        assert (status, sorted(answer)) == (200, ["jwt"]), answer
        client.token = answer["jwt"]

    async def delegate(self, client: RtcClient, prefix: str = UNSTABLE, *, with_device: bool = False) -> None:
        """The client delegates its present leave event through its homeserver."""
        answered = await self.post(prefix + DELEGATE, client.account, self.body(client, with_device=with_device, delayed=True))
        assert answered == (200, {})

    async def live(self, presence: str = "") -> float:
        """How many delayed events the daemon keeps alive."""
        return await self.call.metric("sfu_delegate_delegated_events", 'state="live"', presence and f'presence="{presence}"')

    async def until_connected(self, people: int = 1) -> None:
        """Wait until the daemon knows that so many people with a leave event are in calls."""

        async def look() -> bool:
            return await self.live("connected") == people

        await self.call.until(look, f"the daemon sees {people} connected")


@asynccontextmanager
async def federation_of(directory: Path, authority: Certificates) -> AsyncIterator[ServedCall]:
    """Three homeservers that know each other: two with the same daemon, and one with a daemon and an SFU of its own."""
    ports = free_ports(3)
    names = [f"{HOST}:{port}" for port in ports]
    async with (
        served(directory / "near", authority, ports=ports[:2], known=names) as here,
        served(directory / "far", authority, ports=ports[2:], known=names) as far,
    ):
        here.far = far
        yield here


@asynccontextmanager
async def served(
    directory: Path,
    authority: Certificates,
    *,
    ports: Sequence[int] = (),
    known: Sequence[str] = (),
    features: Mapping[str, Any] = ON,
    synapses_settings: Mapping[str, Any] = {},
    **sections: Any,
) -> AsyncIterator[ServedCall]:
    """Synapses at these ports, registered with one daemon, and an SFU. `sections` go over the daemon's configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    ports = ports or free_ports(1)
    [listen] = free_ports(1)
    names = [f"{HOST}:{port}" for port in ports]
    federated = {"federation_domain_whitelist": [*names, *known], "federation_custom_ca_list": [str(authority.ca_file)], "ip_range_blacklist": []}
    async with AsyncExitStack() as stack:
        synapses, entries = [], []
        for name, port in zip(names, ports, strict=True):
            registration = register(directory, name, "http://127.0.0.1:8008", listen)
            settings = {"app_service_config_files": [str(registration)], "experimental_features": dict(features), **federated}
            settings |= synapses_settings
            federation = Federation(HOST, port, authority.file(HOST))
            synapse = Synapse(directory / f"synapse-{port}", server_name=name, settings=settings, federation=federation)
            synapses.append(await stack.enter_async_context(synapse))
            trusted = {"federation_url": federation.url, "ca_file": str(authority.ca_file)}
            entries.append({"name": name, "url": synapse.url, "registration_file": str(registration), **trusted})
        given = {"listen": {"host": LOOPBACK, "port": listen}, "homeservers": entries, **sections}
        call = await stack.enter_async_context(running_call(synapses[0], directory / "daemon", **given))
        yield ServedCall(call, synapses[0], call.daemon.config["sfus"]["test"]["url"], synapses[1:])


async def answers(http: aiohttp.ClientSession, url: str, body: Json, headers: Mapping[str, str]) -> tuple[int, str]:
    """HTTP status and errcode of a request that goes to the daemon itself."""
    async with http.post(url, json=body, headers=headers) as response:
        return response.status, (await response.json()).get("errcode", "")
