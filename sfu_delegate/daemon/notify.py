"""What a service manager such as systemd is told: that the daemon is ready, reloads, stops, lives, and how it is.

The protocol is that of sd_notify(3): one datagram with lines of NAME=value. Without NOTIFY_SOCKET in the environment nobody is told anything. Nothing
here may raise, or wait, because of whoever listens: that the manager does not hear is no reason to stop.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

WATCHDOG_PARTS: Final = 6  # signs of life in the time after which the manager takes us for dead: some may get lost, or come late
STATUS_EVERY: Final = 10.0  # seconds, where there is no watchdog
START_EXTENDED_EVERY: Final = 10.0
START_EXTENDED_BY: Final = 60.0  # seconds until the manager gives a start up that has stopped telling that it goes on
LONGEST_STATUS: Final = 300


class Notifier:
    """Whom `environ` names is told. Not to be used from several threads at once."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._socket: socket.socket | None = None
        self._status = ""
        self.watchdog = None if self._address is None else _watchdog(environ)
        """Seconds within which the manager wants a sign of life; None: it does not want any."""

    @property
    def wanted(self) -> bool:
        """Is anybody to be told?"""
        return self._address is not None

    def _tell(self, *lines: str) -> None:
        if self._address is None:
            return
        with suppress(OSError):
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
                self._socket.setblocking(False)
            self._socket.sendto("\n".join(lines).encode(errors="replace"), self._address)

    def status(self, text: str) -> None:
        """One line about how it is, for `systemctl status`."""
        line = " ".join(text.split())
        line = line if len(line) <= LONGEST_STATUS else line[: LONGEST_STATUS - 1] + "…"
        if line != self._status:
            self._status = line
            self._tell(f"STATUS={line}")

    def ready(self) -> None:
        """The start, or a reload, is over."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """The configuration is being read; `ready` follows."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, within: float) -> None:
        """The end has begun, and takes so many seconds at the most: the manager is to wait for it, whatever its own limit is."""
        self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(within * 1e6)}")

    def close(self) -> None:
        """Nobody is told anything any more."""
        self._address = None
        if self._socket is not None:
            self._socket.close()

    async def while_starting(self) -> None:
        """Until it is cancelled: the start goes on, however long it takes. A database that is large, or hangs, is no reason to start from anew."""
        while self.wanted:
            self._tell(f"EXTEND_TIMEOUT_USEC={int(START_EXTENDED_BY * 1e6)}")
            await asyncio.sleep(START_EXTENDED_EVERY)

    async def while_running(self, alive: Callable[[float], bool], status: Callable[[], str]) -> None:
        """Until it is cancelled: a sign of life as often as it is wanted, unless `alive`, which is told the seconds since the last time, says no.

        `alive` is asked also where nobody is told: what it finds may be worth a line in the log.
        """
        pause = STATUS_EVERY if self.watchdog is None else self.watchdog / WATCHDOG_PARTS
        while True:
            if alive(pause) and self.watchdog is not None:
                self._tell("WATCHDOG=1")
            try:
                self.status(status())
            except Exception as error:  # a defect in telling how it is must not look like one in being
                self.status(f"How it is cannot be told: {type(error).__name__}.")
            await asyncio.sleep(pause)


def _address(name: str) -> str | None:
    """A Unix socket: a path, or with @ a name in the abstract namespace. Others (vsock:…) are those of virtual machines."""
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _watchdog(environ: Mapping[str, str]) -> float | None:
    """See sd_watchdog_enabled(3)."""
    wanted, whose = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if whose and whose != str(os.getpid()):
        return None
    if not (wanted.isascii() and wanted.isdecimal() and len(wanted) < 20):
        return None
    return int(wanted) / 1e6 or None


class Progress:
    """Does the daemon get anywhere? For whoever restarts it if not, so that it must be sure.

    The event loop turns, or nobody would ask. Steps of the engine end every few seconds, if only to find that nothing is to be done, or that the
    database does not work. When none has for STUCK_AFTER, the engine's thread is somewhere. In the database: that hangs, and a new process would hang
    there, too, and not even answer 503, or say why, or go on at once when it is back; so this one lives. Anywhere else: that is a defect of ours,
    which a new process may get over, and what was acknowledged is in the database.
    """

    STUCK_AFTER: Final = 20.0  # seconds

    def __init__(self, steps: Callable[[], int], where: Callable[[], Sequence[str]]) -> None:
        self._steps = steps  # how many have ended
        self._where = where  # what the engine's thread is doing, innermost last
        self._seen = -1
        self._still = 0.0  # seconds without one, as far as they were watched: a process that was stopped meanwhile is not stuck
        self.stuck_in: str | None = None  # where it was, outside of the database, and no step has ended since

    def __call__(self, seconds: float) -> bool:
        """Does it, `seconds` after the last time?"""
        steps = self._steps()
        if steps != self._seen:
            self._seen, self._still, self.stuck_in = steps, 0.0, None
            return True
        self._still += seconds
        if self._still >= self.STUCK_AFTER and self.stuck_in is None:
            # Of the libraries that the store calls, the driver or the resolver, say, the innermost part of ours decides.
            ours = next((at for at in reversed(self._where()) if at.startswith("sfu_delegate.")), "nothing")
            if not ours.startswith("sfu_delegate.store."):
                self.stuck_in = ours
        return self.stuck_in is None
