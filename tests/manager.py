"""A service manager's socket, as systemd has it, for tests of what it is told."""

import socket
from contextlib import suppress


class Manager:
    """Hears what is told to a path, or with @ to a name in the abstract namespace."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self.told: list[dict[str, str]] = []

    def hear(self) -> list[dict[str, str]]:
        """All that was told until now."""
        with suppress(BlockingIOError):
            while True:
                self.told.append(dict(line.split("=", 1) for line in self._socket.recv(4096).decode().split("\n")))
        return self.told

    def close(self) -> None:
        """It is gone."""
        self._socket.close()
