"""The daemon as a real process, for every test that needs one. It is started, stopped and killed by its process id."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sfu_delegate.demo.daemon import DaemonProcess
from sfu_delegate.demo.sfu import KEY, SECRET

__all__ = ["DaemonProcess", "config_for", "running_daemon"]


@asynccontextmanager
async def running_daemon(config: Mapping[str, Any], directory: Path) -> AsyncIterator[DaemonProcess]:
    """`sfu-delegate serve` with this configuration, ready when the block begins, stopped (SIGTERM, then SIGKILL) when it ends.

    `daemon.public_url`, `daemon.admin_url`, `daemon.webhook_url`, `daemon.log_lines`, `daemon.entries(event)`; `await daemon.kill()`, `stop()`,
    `start()`, `restart()`. Listeners (free ports), database (in `directory`) and log (JSON) are chosen where the configuration is silent.
    """
    daemon = DaemonProcess(config, directory)
    await daemon.start()
    try:
        yield daemon
    finally:
        await daemon.stop()


def config_for(sfu_url: str, homeservers: Sequence[tuple[str, str]], **sections: Any) -> dict[str, Any]:
    """A configuration for one SFU with the sandbox's key, and homeservers by (name, URL). `sections` go over it; delays may be short."""
    return {
        "sfus": {"test": {"url": sfu_url.replace("http://", "ws://"), "keys": {KEY: SECRET}}},
        "homeservers": [{"name": name, "url": url} for name, url in homeservers],
        "delegations": {"min_delay": "2s"},
        **sections,
    }
