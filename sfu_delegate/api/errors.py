"""The one shape of errors: Matrix's `{"errcode", "error"}`, complete sentences that name the field, the problem and the remedy.

An error must never repeat a token, a delay_id or anything else out of a body or a header: clients log what they are told.
"""

import json
import math
import re
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from structlog.stdlib import BoundLogger

from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.delegation.replies import TooMany
from sfu_delegate.observe.logs import frames

STOPPING_RETRY_AFTER: Final = 10.0  # seconds; a restart takes about that long
LIMIT_RETRY_AFTER: Final = 30.0  # seconds until a participant's older delegations are verified, or a homeserver's others may have ended
_PLAIN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")


class MatrixError(Exception):
    """An answer that is an error. `retry_after` in seconds; `extra` are further fields of the body."""

    def __init__(
        self, status: int, errcode: str, error: str, *, retry_after: float | None = None, headers: dict[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(f"{status} {errcode}: {error}")
        self.status = status
        self.errcode = errcode
        self.error = error
        self.retry_after = retry_after
        self.headers = headers or {}
        self.extra = extra

    def response(self) -> web.Response:
        """As it goes to the client: `retry_after_ms` in the body, and `Retry-After` in whole seconds, where it makes sense to try again."""
        body: dict[str, Any] = {"errcode": self.errcode, "error": self.error, **self.extra}
        headers = dict(self.headers)
        if self.retry_after is not None:
            body["retry_after_ms"] = math.ceil(self.retry_after * 1000)
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        return json_response(body, status=self.status, headers=headers)


def json_response(body: dict[str, Any], *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON answer. Nothing of ours may be kept by a cache: bodies hold management tokens, and states change."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return web.Response(body=text, status=status, headers={"Cache-Control": "no-store", **(headers or {})}, content_type="application/json")


def printable(name: object) -> str:
    """A name that a client chose, if it is fit to be repeated to it; else "?"."""
    return name if isinstance(name, str) and _PLAIN.fullmatch(name) else "?"


def stopping() -> MatrixError:
    """What a delegation is answered while the daemon stops."""
    sentence = "This service is stopping and takes no new delegations. Try again shortly."
    return MatrixError(503, "M_UNKNOWN", sentence, retry_after=STOPPING_RETRY_AFTER)


def of_exception(error: Exception) -> MatrixError | None:
    """The error that a client sees for one of the expected exceptions; None for an unexpected one."""
    match error:
        case MatrixError():
            return error
        case TooMany():
            return MatrixError(429, "M_LIMIT_EXCEEDED", str(error), retry_after=LIMIT_RETRY_AFTER)
        case Overloaded():
            return MatrixError(503, "M_UNKNOWN", str(error), retry_after=error.retry_after)
        case Unavailable():
            # Its own text is for the operator: it names files.
            sentence = "Nothing can be stored at the moment, so nothing was done. Try again later."
            return MatrixError(503, "M_UNKNOWN", sentence, retry_after=error.retry_after)
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            sentence = f"This path does not know that method: use {allowed}."
            return MatrixError(405, "M_UNRECOGNIZED", sentence, headers={"Allow": allowed})
        case web.HTTPNotFound():
            return MatrixError(404, "M_UNRECOGNIZED", "There is no such path here. The paths are in the API description, docs/openapi.yaml.")
        case web.HTTPRequestEntityTooLarge():
            return MatrixError(413, "M_TOO_LARGE", "The body is too large.")
        case web.HTTPException():
            return MatrixError(error.status, "M_UNKNOWN", f"{error.reason}.")
        case _:
            return None


def one_error_shape(log: BoundLogger) -> Middleware:
    """Every failed request is answered in the one shape. What nobody expected is logged by its type and place: its text might hold a secret."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:
            expected = of_exception(error)
            if expected is not None:
                return expected.response()
            resource = request.match_info.route.resource
            log.error(
                "request_failed",
                method=request.method,
                path=resource.canonical if resource is not None else "?",
                error=type(error).__name__,
                at=frames(error),
            )
            return MatrixError(500, "M_UNKNOWN", "Something went wrong here that should not have. It is in the daemon's log.").response()

    return middleware
