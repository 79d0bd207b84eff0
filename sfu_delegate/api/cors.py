"""Browsers' access to what clients use (CORS): `/v1/*` and the MatrixRTC endpoints.

The headers are on every answer there, errors included: without them a page learns nothing but "network error". Credentials (cookies) are never
allowed, and nothing here depends on them.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

_PREFIX: Final = "/v1/"


@dataclass(frozen=True, slots=True)
class _Preflight:
    """How `OPTIONS` is answered."""

    status: int
    headers: Mapping[str, str]


_API: Final = _Preflight(
    204,
    {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST, DELETE, OPTIONS",
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "Authorization, Content-Type",
        hdrs.ACCESS_CONTROL_MAX_AGE: "3600",
    },
)
# As deployed: clients depend on it.
_MATRIXRTC: Final = _Preflight(
    200,
    {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: "POST",
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "Accept, Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token",
    },
)


def cors(origins: Callable[[], Sequence[str]], matrixrtc: Container[str] = ()) -> Middleware:
    """Adds the headers, and answers preflight requests. `origins` is asked for every request: "*", or a list of them; `matrixrtc` are the paths of
    those endpoints.

    Belongs around everything that makes errors into answers.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        preflight = _MATRIXRTC if request.path in matrixrtc else _API if request.path.startswith(_PREFIX) else None
        if preflight is None:
            return await handler(request)
        if request.method == hdrs.METH_OPTIONS:
            # An unknown path, too: the request that follows gets an error that the page can read.
            response: web.StreamResponse = web.Response(status=preflight.status, headers=preflight.headers)
        else:
            response = await handler(request)
        allows = access(request.headers.get(hdrs.ORIGIN), origins())
        if hdrs.ACCESS_CONTROL_ALLOW_ORIGIN not in allows:
            for name in preflight.headers:
                response.headers.pop(name, None)
        response.headers.extend(allows)
        return response

    return middleware


def access(origin: str | None, allowed: Sequence[str]) -> dict[str, str]:
    """The headers that let a page of this origin read an answer, or that tell that another one may be allowed to."""
    if "*" in allowed:
        return {hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: "*", hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: "Retry-After"}
    if origin is None or origin not in allowed:
        return {hdrs.VARY: hdrs.ORIGIN}
    return {hdrs.VARY: hdrs.ORIGIN, hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin, hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: "Retry-After"}
