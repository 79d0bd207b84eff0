"""A client of a running daemon's admin listener, over its Unix socket or TCP: one request at a time, and plain sentences when it cannot be asked.

It waits for its answers, so it is not for the daemon itself. It must never show the token.
"""

import http.client
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from sfu_delegate.config.loading import load_admin
from sfu_delegate.config.model import Admin

PREFIX: Final = "/admin/v1"
"""Where the operator's API is, below the admin listener."""

_MOST: Final = 64 * 1024 * 1024  # bytes of an answer


class CannotAsk(Exception):
    """The daemon could not be asked, or what answers is none; the text is a sentence for the operator, with the remedy."""


class Refused(Exception):
    """The daemon has refused it: its errcode, and its sentence."""

    def __init__(self, status: int, errcode: str, sentence: str):
        super().__init__(sentence)
        self.status = status
        self.errcode = errcode


@dataclass(frozen=True, slots=True)
class Answer:
    """What the daemon answered. `body`: JSON where it was that, else text."""

    status: int
    body: Any


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._path)
        except OSError:
            self.sock.close()
            raise


@dataclass(frozen=True, slots=True)
class AdminListener:
    """Where a daemon's admin listener is: `socket`, else `host` and `port`."""

    host: str = "127.0.0.1"
    port: int = 8081
    socket: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def place(self) -> str:
        """For people."""
        return f"unix:{self.socket}" if self.socket else f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def ask(self, method: str, path: str, query: Mapping[str, str] | None = None, body: object = None, *, timeout: float = 30.0) -> Answer:
        """One request to any path; whatever it answers. Raises CannotAsk."""
        connection = _UnixConnection(self.socket, timeout) if self.socket else http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        target = f"{path}?{urlencode(query)}" if query else path
        headers = {"Accept": "application/json, text/plain"}
        if self.token:
            if not _is_token(self.token):  # the daemon refuses it, too; and http.client would show it in its complaint
                raise CannotAsk("The admin token must be one line of printable ASCII characters: check admin.token_file, or admin.token.")
            headers["Authorization"] = f"Bearer {self.token}"
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, target, content, headers)
            response = connection.getresponse()
            text = response.read(_MOST)
        except TimeoutError:
            raise CannotAsk(f"The daemon at {self.place} did not answer within {timeout:g} s. Is it stopped, or its machine overloaded?") from None
        except ConnectionRefusedError:
            raise CannotAsk(f"No daemon listens at {self.place}. Is it running (systemctl status sfu-delegate), with this configuration?") from None
        except FileNotFoundError:
            raise CannotAsk(f"There is no socket {self.socket}. Is the daemon running, with this configuration?") from None
        except PermissionError:
            raise CannotAsk(f"You may not open {self.socket}: run this as root, or as a member of the daemon's group.") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise CannotAsk(f"The daemon at {self.place} cannot be asked: {reason}.") from None
        finally:
            connection.close()
        if response.headers.get_content_type() != "application/json":
            return Answer(response.status, text.decode(errors="replace"))
        try:
            return Answer(response.status, json.loads(text))
        except ValueError:
            raise CannotAsk(f"What answers at {self.place} is no sfu-delegate: its JSON cannot be read.") from None

    def get(self, path: str, query: Mapping[str, str] | None = None, *, timeout: float = 30.0) -> Any:
        """What the operator's API answers to a question. Raises CannotAsk, or Refused."""
        return self._body(self.ask("GET", PREFIX + path, query, timeout=timeout))

    def post(self, path: str, body: object = None, *, timeout: float = 30.0) -> Any:
        """Have something changed. Raises CannotAsk, or Refused."""
        return self._body(self.ask("POST", PREFIX + path, body={} if body is None else body, timeout=timeout))

    def _body(self, answer: Answer) -> Any:
        if answer.status == 200 and isinstance(answer.body, dict):
            return answer.body
        if isinstance(answer.body, dict) and isinstance(answer.body.get("errcode"), str):
            raise Refused(answer.status, answer.body["errcode"], str(answer.body.get("error", "")))
        raise CannotAsk(f"What answers at {self.place} is no sfu-delegate with this API: it answered {answer.status}.")


def part(name: str) -> str:
    """A name as a part of a path."""
    return quote(name, safe="")


def listener_of(admin: Admin) -> AdminListener:
    """Where the section `admin` of a configuration says that the daemon listens: the socket, where there is one."""
    token = admin.token.get_secret_value() if admin.token else None
    if admin.socket is not None and (not admin.tcp or os.access(admin.socket, os.W_OK)):
        return AdminListener(socket=str(admin.socket), token=token)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(admin.host, admin.host)  # noqa: S104
    return AdminListener(host, admin.port, token=token)


def listener_at(url: str, token_file: Path | None = None) -> AdminListener:
    """Where a URL says: `http://127.0.0.1:8081`, or `unix:/run/sfu-delegate/admin.sock`. Raises CannotAsk."""
    token = None if token_file is None else _token_in(token_file)
    try:
        if url.startswith("unix:"):
            path = url.removeprefix("unix:").removeprefix("//")
            if not path:
                raise ValueError
            return AdminListener(socket=path, token=token)
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.username:
            raise ValueError
        return AdminListener(parts.hostname, 8081 if parts.port is None else parts.port, token=token)
    except ValueError:
        raise CannotAsk("The admin listener is named as http://HOST:PORT or unix:/PATH: such as http://127.0.0.1:8081.") from None


def _is_token(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable()


def _token_in(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CannotAsk(f"The token's file {path} cannot be read: {reason}.") from None
    if not _is_token(token):
        raise CannotAsk(f"The token's file {path} must hold the token, in one line of printable ASCII characters, and nothing else.")
    return token


def find(config: Path, environ: Mapping[str, str], *, may_be_missing: bool = False, token_file: Path | None = None) -> AdminListener:
    """The admin listener of the daemon that has this configuration file. Raises ConfigInvalid, CannotAsk.

    `may_be_missing`: where there is no such file, the daemon's defaults count. `token_file`: in place of the token that the configuration names.
    """
    at = listener_of(Admin() if may_be_missing and is_missing(config) else load_admin(config, environ))
    return at if token_file is None else replace(at, token=_token_in(token_file))


def is_missing(path: Path) -> bool:
    """Certainly: one that may not be looked at is not."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
