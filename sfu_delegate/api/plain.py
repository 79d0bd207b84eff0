"""Requests and answers apart from what reads and writes HTTP: for handlers that are reached by more than one way."""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from aiohttp import web

from sfu_delegate.api.client import FORWARDED_FOR
from sfu_delegate.api.errors import JSON, NO_STORE, MatrixError, json_bytes


class Asker(NamedTuple):
    """Where a request comes from."""

    peer: str  # the address at the other end of the connection
    forwarded: tuple[str, ...] = ()  # what proxies say of it, header by header

    @classmethod
    def of(cls, request: web.Request) -> "Asker":
        """Of a request that aiohttp has read."""
        return cls(request.remote or "", tuple(request.headers.getall(FORWARDED_FOR, ())))


class Asked(NamedTuple):
    """A request that has come as a whole. Its repr has nothing of what it says."""

    asker: Asker
    authorization: str | None
    origin: str | None  # of the page in a browser
    body: bytes

    def __repr__(self) -> str:
        return f"Asked({len(self.body)} bytes)"


class Answer(NamedTuple):
    """What it is answered. Its repr has nothing of what it says."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def __repr__(self) -> str:
        return f"Answer(status={self.status}, {len(self.body)} bytes)"


DONE: Final = Answer(200, JSON, b"{}")
"""All went well, and there is nothing to tell."""

Told = Callable[[Answer], object]
"""Who is told the answer. It must not raise."""


def success(body: dict[str, Any]) -> Answer:
    """200 with a body that no cache may keep."""
    return Answer(200, {**JSON, **NO_STORE}, json_bytes(body))


def refusal(error: MatrixError) -> Answer:
    """An error as it goes to the client."""
    body, headers = error.form()
    return Answer(error.status, {**JSON, **headers}, json_bytes(body))
