"""Looking at the daemon and at this machine: by its admin listener, its public one, and the files with secrets."""

import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from sfu_delegate.config import Config
from sfu_delegate.doctor.looks.database import is_locked
from sfu_delegate.doctor.running import in_thread
from sfu_delegate.doctor.verdicts.here import Daemon, Port, Public, SecretFile, Seen
from sfu_delegate.doctor.verdicts.homeserver import Limit, Way
from sfu_delegate.operate.admin import AdminListener, CannotAsk

ASKED_WITHIN: Final = 6.0  # seconds: /health/ready takes up to 5


class Running:
    """What a daemon says, over its admin listener."""

    def __init__(self, listener: AdminListener) -> None:
        self.listener = listener

    async def ask(self, path: str) -> tuple[int, Any]:
        """HTTP status and what was answered. Raises CannotAsk."""
        answer = await in_thread(self.listener.ask, "GET", path, timeout=ASKED_WITHIN)
        return answer.status, answer.body

    async def metric(self, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        """The samples of a metric with these labels, by the values of all their labels, in the order of their names. Raises CannotAsk."""
        status, text = await self.ask("/metrics")
        if status != 200 or not isinstance(text, str):
            raise CannotAsk(f"The daemon answers {status} to /metrics.")
        found: dict[tuple[str, ...], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    found[tuple(value for _, value in sorted(sample.labels.items()))] = sample.value
        return found

    async def limit(self, homeserver: str, *, service: bool) -> Limit:
        """What it has learned of a homeserver's limit. Raises CannotAsk, Refused."""
        status = await in_thread(self.listener.get, "/status", timeout=ASKED_WITHIN)
        known = next((one for one in status.get("homeservers", ()) if isinstance(one, Mapping) and one.get("name") == homeserver), {})
        match known.get("limit"):
            case "some":
                return Limit(Way.LEARNED, service, True, known.get("rate"), known.get("burst"))
            case "none":
                return Limit(Way.LEARNED, service, False)
            case _:
                return Limit(Way.LEARNED, service, None)


async def daemon(config: Config, running: Running, health: Callable[[], Awaitable[str | None]]) -> Seen:
    """Does a daemon run with this configuration? `health` tells what is at its public listener, as `ours_at` does."""
    place = running.listener.place
    try:
        status, _ = await running.ask("/health/live")
        if status == 200:
            status, ready = await running.ask("/health/ready")
            if isinstance(ready, Mapping) and "phase" in ready:
                return Seen(Daemon.RUNS, place, status=status, ready=ready)
        trouble = f"what answers at {place} is no sfu-delegate (HTTP {status})"
    except CannotAsk as cannot:
        trouble = str(cannot).rstrip(".")
    signs = []
    if not config.is_postgresql and is_locked(config.database_path):
        signs.append(f"somebody holds {config.database_path}.lock")
    if await health() == "":
        signs.append("a sfu-delegate answers at the public listener")
    if signs:
        return Seen(Daemon.HIDDEN, place, trouble, signs)
    return Seen(Daemon.NONE, place, trouble)


def public_url(config: Config) -> str:
    """The public listener, as this machine reaches it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.listen.host, config.listen.host)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{config.listen.port}"


async def ours_at(url: str, http: aiohttp.ClientSession, within: float) -> str | None:
    """Is there a sfu-delegate? "" for yes; None: nobody listens; otherwise what is there instead."""
    try:
        async with http.get(f"{url}/healthz", timeout=aiohttp.ClientTimeout(total=within), allow_redirects=False) as response:
            status, body = response.status, await response.content.read(4096)
    except TimeoutError:
        return "it takes connections, and does not answer"
    except aiohttp.ClientConnectorError:
        return None
    except aiohttp.ClientError:
        return "it does not answer as HTTP"
    return "" if is_ours(status, body) else f"it answers {status} to /healthz"


def is_ours(status: int, body: bytes) -> bool:
    """Is it what a sfu-delegate answers to /healthz?"""
    return (status, body.replace(b" ", b"")) in ((200, b'{"status":"ok"}'), (503, b'{"status":"stopping"}'))


def public(config: Config, answers: str | None, bound: OSError | None) -> Public:
    """What is at the public listener's address: what answers there, or else what came of listening there ourselves."""
    place = f"{config.listen.host}:{config.listen.port}"
    if answers is not None:
        return Public(place, Port.TAKEN if answers else Port.OURS, answers)
    if bound is None:
        return Public(place, Port.FREE)
    if isinstance(bound, PermissionError) or bound.errno not in (98,):
        return Public(place, Port.FORBIDDEN, (bound.strerror or "an error").lower())
    return Public(place, Port.TAKEN)


def _secret_paths(config: Config, path: Path) -> Iterator[Path | None]:
    inline = any(sfu.keys and sfu.key_file is None for sfu in config.sfus.values())
    inline = inline or any(h.as_token and h.as_token_file is None and h.registration_file is None for h in config.homeservers)
    inline = inline or bool(config.encryption.keys and config.encryption.keys_file is None)
    inline = inline or bool(config.admin.token and config.admin.token_file is None)
    yield path if inline or (config.postgresql.password and config.postgresql.password_file is None) else None
    yield from (sfu.key_file for sfu in config.sfus.values())
    for homeserver in config.homeservers:
        yield from (homeserver.as_token_file, homeserver.hs_token_file, homeserver.registration_file)
    yield config.encryption.keys_file
    yield config.postgresql.password_file
    yield config.admin.token_file
    if not config.is_postgresql:
        database = config.database_path
        yield from (database, database.with_name(f"{database.name}-wal"))
        if not config.encryption_keys():
            yield config.key_file


def secret_files(config: Config, path: Path) -> list[SecretFile]:
    """The files with secrets, as far as they are there."""
    found = []
    for file in dict.fromkeys(_secret_paths(config, path)):
        if file is None:
            continue
        try:
            found.append(SecretFile(str(file), os.stat(file).st_mode & 0o777))
        except FileNotFoundError:
            continue
        except OSError:
            found.append(SecretFile(str(file), None))
    return found
