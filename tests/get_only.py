"""A stand-in for the HTTP client of code that only reads."""

from collections.abc import Mapping
from ssl import SSLContext

from sfu_delegate.matrix.http import HttpAnswer


class GetOnly:
    """All of `Http` but `get`."""

    async def post(
        self, url: str, headers: Mapping[str, str], body: bytes, deadline: float, *, ssl: SSLContext | None = None, repeatable: bool = False
    ) -> HttpAnswer:
        raise AssertionError("nothing is posted")

    async def put(self, url: str, headers: Mapping[str, str], body: bytes, deadline: float, *, ssl: SSLContext | None = None) -> HttpAnswer:
        raise AssertionError("nothing is put")

    async def aclose(self) -> None:
        pass
