"""A real Synapse on loopback: one process, SQLite, in a directory of its own. It reaches nobody, and nobody but this machine reaches it."""

import base64
import hashlib
import hmac
import importlib.metadata
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import yaml

from sfu_delegate.demo.matrix import Account, ClientServer
from sfu_delegate.demo.processes import HOST, Child, Died, NeverHappened, free_ports, until

STARTS_WITHIN = 120.0  # seconds; some 6 on an idle machine
REQUEST_TIMEOUT = 30.0

_PLENTY = {"per_second": 1000, "burst_count": 1000}


def installed() -> bool:
    """Can this Python run Synapse?"""
    try:
        importlib.metadata.version("matrix-synapse")  # by this name: there are other packages that are imported as `synapse`
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Federation:
    """A listener with TLS for the federation API, at which the client-server API is served, too, as `.well-known/matrix/client` says then."""

    host: str  # on loopback, and what the certificate is for
    port: int
    certificate: Path  # PEM: the chain and its private key

    @property
    def url(self) -> str:
        """Of both APIs."""
        return f"https://{self.host}:{self.port}"


class Synapse:
    """::

        async with Synapse(directory) as synapse:
            anna = await synapse.register("anna")
            room = await synapse.client.create_call_room(anna)

    `settings` go over its configuration, key by key. Only its rate limit of delayed events' management is the default one: delegates have to live
    with that. `federation`: others can ask it whose an OpenID token is; without, it has no federation API. Raises Died when it does not start.
    """

    title = "Synapse"

    def __init__(
        self, directory: Path, *, server_name: str = "hs.test", settings: Mapping[str, Any] | None = None, federation: Federation | None = None
    ) -> None:
        self.directory = directory
        self.server_name = server_name
        self.federation = federation
        self.log = directory / "synapse.log"
        self._settings = dict(settings or {})
        self._shared_secret = secrets.token_urlsafe(24)
        self._child: Child | None = None

    async def __aenter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        [port] = free_ports(1)
        self.url = f"http://{HOST}:{port}"
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT), cookie_jar=aiohttp.DummyCookieJar())
        self.client = ClientServer(self.url, self._http)
        try:
            command = [sys.executable, "-m", "synapse.app.homeserver", "--config-path", str(self._configure(port))]
            self._child = await Child.start("Synapse", command, directory=self.directory, output=self.log)
            await self._answering()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    async def stop(self) -> None:
        """SIGTERM, then after a while SIGKILL."""
        if self._child is not None:
            await self._child.stop()
        await self._http.close()

    async def register(self, name: str) -> Account:
        """A new user with one device. Raises MatrixError, when the name is taken for one."""
        path = "/_synapse/admin/v1/register"
        nonce = (await self.client.call("GET", path))["nonce"]
        password = secrets.token_urlsafe(16)
        mac = hmac.new(self._shared_secret.encode(), "\0".join((nonce, name, password, "notadmin")).encode(), hashlib.sha1).hexdigest()
        body = {"nonce": nonce, "username": name, "password": password, "admin": False, "mac": mac}
        made = await self.client.call("POST", path, None, body)
        return Account(made["user_id"], made["device_id"], made["access_token"])

    async def call_room(self, members: Sequence[Account]) -> str:
        """A room for a call in which all of them are. Returns its room id."""
        room = await self.client.create_call_room(members[0])
        for member in members[1:]:
            await self.client.join(member, room)
        return room

    def tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        return "" if self._child is None else self._child.tail(lines)

    async def _answering(self) -> None:
        child = self._child
        assert child is not None  # noqa: S101 - started just before

        async def answers() -> bool | None:
            child.must_run()
            try:
                await self.client.call("GET", "/_matrix/client/versions")
            except aiohttp.ClientError:
                return None
            return True

        try:
            await until(answers, STARTS_WITHIN, "an answer of Synapse")
        except NeverHappened as error:
            raise Died(f"Synapse does not answer: {error}; its last lines were:\n{child.tail()}") from error

    def _configure(self, port: int) -> Path:
        directory = self.directory
        key = directory / "signing.key"
        key.write_text(f"ed25519 a_demo {base64.b64encode(secrets.token_bytes(32)).decode().rstrip('=')}\n")
        logging = {
            "version": 1,
            "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
            "handlers": {"here": {"class": "logging.StreamHandler", "formatter": "line"}},
            "root": {"level": "WARNING", "handlers": ["here"]},
            "disable_existing_loggers": False,
        }
        log_config = directory / "log.yaml"
        log_config.write_text(yaml.safe_dump(logging))
        config: dict[str, Any] = {
            "server_name": self.server_name,
            "public_baseurl": self.url,
            "report_stats": False,
            "listeners": [
                {"port": port, "type": "http", "tls": False, "bind_addresses": [HOST], "resources": [{"names": ["client"], "compress": False}]}
            ],
            "database": {"name": "sqlite3", "args": {"database": str(directory / "homeserver.db")}},
            "log_config": str(log_config),
            "media_store_path": str(directory / "media"),
            "signing_key_path": str(key),
            "registration_shared_secret": self._shared_secret,
            "macaroon_secret_key": secrets.token_urlsafe(24),
            "form_secret": secrets.token_urlsafe(24),
            "trusted_key_servers": [],
            "suppress_key_server_warning": True,
            "federation_domain_whitelist": [],
            "url_preview_enabled": False,
            "presence": {"enabled": False},
            "bcrypt_rounds": 4,
            "max_event_delay_duration": "24h",
            "rc_message": _PLENTY,
            "rc_registration": _PLENTY,
            "rc_login": {"address": _PLENTY, "account": _PLENTY, "failed_attempts": _PLENTY},
            "rc_joins": {"local": _PLENTY, "remote": _PLENTY},
            "rc_joins_per_room": _PLENTY,
            "rc_room_creation": _PLENTY,
        }
        if self.federation is not None:
            certificate = str(self.federation.certificate)
            config |= {"public_baseurl": self.federation.url, "tls_certificate_path": certificate, "tls_private_key_path": certificate}
            resources = [{"names": ["client", "federation"], "compress": False}]
            config["listeners"].append({"port": self.federation.port, "type": "http", "tls": True, "bind_addresses": [HOST], "resources": resources})
        file = directory / "homeserver.yaml"
        file.touch(mode=0o600)
        file.write_text(yaml.safe_dump(config | self._settings))
        return file
