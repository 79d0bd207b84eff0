"""Does the daemon that has this configuration answer? For containers' health checks and other probes, which give up soon and want one line.

It asks the admin listener, of which only the section `admin` of the configuration has to be readable, and needs no token.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from sfu_delegate.operate.admin import CannotAsk, find

LIVE_WITHIN: Final = 4.0  # seconds: a container's check is given up after five
READY_WITHIN: Final = 8.0  # the daemon itself waits for five seconds for its database


def check(config: Path, environ: Mapping[str, str], *, ready: bool = False) -> tuple[bool, str]:
    """Whether it lives, or with `ready` whether it can take delegations and webhooks, and a line about it. Raises ConfigInvalid."""
    listener = replace(find(config, environ), token=None)
    try:
        answer = listener.ask("GET", "/health/ready" if ready else "/health/live", timeout=READY_WITHIN if ready else LIVE_WITHIN)
    except CannotAsk as error:
        return False, str(error)
    said = answer.body if isinstance(answer.body, dict) else {}
    status = said.get("status")
    if status not in ("ok", "degraded", "unavailable"):
        return False, f"What answers at {listener.place} is no sfu-delegate: it answered {answer.status}."
    if not ready:
        return answer.status == 200, f"It lives, at {listener.place}."
    if answer.status == 200:
        down = [
            f"{kind} {name}: {problem}"
            for kind, key in (("homeserver", "homeservers"), ("SFU", "sfus"), ("application service at", "application_services"))
            for name, problem in _conditions(said.get(key))
            if problem not in ("ok", "not asked yet")
        ]
        return True, "It is ready" + (f", with trouble elsewhere: {'; '.join(down)}." if down else ".")
    if said.get("phase") != "running":
        return False, f"It is not ready: {said.get('phase')}."
    return False, f"It is not ready: its database has trouble: {said.get('database')}"


def _conditions(said: object) -> list[tuple[str, str]]:
    return [(str(name), str(problem)) for name, problem in said.items()] if isinstance(said, dict) else []
