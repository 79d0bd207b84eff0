"""Who may ask what at the admin listener.

Health and metrics are for probes and Prometheus, and need nothing; nor do the files of the package that pages are made with. All else shows who is in
which call: over the Unix socket the file system says who may see it, over TCP the token, if there is one. What changes anything needs one of the two.
It must never answer with, or log, what a request had in place of the token.
"""

import ipaddress
import socket
from base64 import b64decode
from hmac import compare_digest
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from sfu_delegate.api.errors import MatrixError

OPEN: Final = frozenset({"/health/live", "/health/ready", "/metrics"})
PACKAGED: Final = "/static/{name}"
"""Files of the package, the same for everybody: without them, the page that says that a token is needed could not be read well."""
_CHANGES_NEED: Final = (
    "Nothing is changed without proof of who asks: use the Unix socket (admin.socket), or set admin.token and send it as `Authorization: Bearer …`."
)


def over_socket(request: web.Request) -> bool:
    """Did the request come by the Unix socket?"""
    sock = None if request.transport is None else request.transport.get_extra_info("socket")
    return sock is not None and sock.family == socket.AF_UNIX


def guarded(token: str | None) -> Middleware:
    """Refuses whoever may not ask. `token`: what `admin.token` says."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN and not _is_packaged(request) and not over_socket(request):
            _check(request, token)
        return await handler(request)

    return middleware


def _is_packaged(request: web.Request) -> bool:
    resource = request.match_info.route.resource
    return resource is not None and resource.canonical == PACKAGED


def _check(request: web.Request, token: str | None) -> None:
    changes = request.method not in ("GET", "HEAD")
    if token is None:
        if changes:
            raise MatrixError(403, "M_FORBIDDEN", _CHANGES_NEED)
        # A page of a stranger in the operator's browser may give its own name the address of this machine (DNS rebinding).
        # Not request.host: where there is none, that asks the DNS for our own name, and holds up everybody meanwhile.
        if not _is_address(request.headers.get("Host", "")):
            sentence = (
                "Without admin.token, this is shown only to those who ask for it by address: use 127.0.0.1, [::1] or localhost in place of a name."
            )
            raise MatrixError(403, "M_FORBIDDEN", sentence)
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "basic" and not changes:  # browsers send it by themselves, whoever has made the page that asks
        given = _password(given)
    elif scheme.lower() != "bearer":
        given = ""
    if not compare_digest(given.strip().encode(errors="surrogateescape"), token.encode()):
        sentence = "The admin token is needed: `Authorization: Bearer …`, or as the password of a browser's dialogue, with any name."
        challenge = {"WWW-Authenticate": "Bearer" if changes else 'Basic realm="sfu-delegate", charset="UTF-8"'}
        raise MatrixError(401, "M_UNKNOWN_TOKEN" if given else "M_MISSING_TOKEN", sentence, headers=challenge)


def _password(given: str) -> str:
    try:
        return b64decode(given.strip(), validate=True).decode().partition(":")[2]
    except ValueError:  # also of UnicodeDecodeError
        return ""


def _is_address(host: str) -> bool:
    """Is a Host header localhost, or an address?"""
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
