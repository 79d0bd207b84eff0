"""Browsers' access to the API (CORS), for `/v1/*` only.

The headers are on every answer there, errors included: without them a page learns nothing but "network error". Credentials (cookies) are never
allowed, and nothing here depends on them.
"""

from collections.abc import Callable, Sequence
from typing import Final

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

_PREFIX: Final = "/v1/"
_METHODS: Final = "GET, POST, DELETE, OPTIONS"
_PREFLIGHT: Final = {
    hdrs.ACCESS_CONTROL_ALLOW_METHODS: _METHODS,
    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "Authorization, Content-Type",
    hdrs.ACCESS_CONTROL_MAX_AGE: "3600",
}


def cors(origins: Callable[[], Sequence[str]]) -> Middleware:
    """Adds the headers, and answers preflight requests. `origins` is asked for every request: "*", or a list of them.

    Belongs around everything that makes errors into answers.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith(_PREFIX):
            return await handler(request)
        if request.method == hdrs.METH_OPTIONS:
            # An unknown path, too: the request that follows gets an error that the page can read.
            response: web.StreamResponse = web.Response(status=204, headers=_PREFLIGHT)
        else:
            response = await handler(request)
        _add_headers(response, request.headers.get(hdrs.ORIGIN), origins())
        return response

    return middleware


def _add_headers(response: web.StreamResponse, origin: str | None, allowed: Sequence[str]) -> None:
    headers = response.headers
    if "*" in allowed:
        headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*"
    else:
        headers.add(hdrs.VARY, hdrs.ORIGIN)
        if origin is None or origin not in allowed:
            for name in _PREFLIGHT:
                headers.pop(name, None)
            return
        headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
    headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = "Retry-After"
