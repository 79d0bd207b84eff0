"""The one shape of errors: Matrix's `{"errcode", "error"}`, complete sentences that name the field, the problem and the remedy.

An error must never repeat a token, a delay_id or anything else out of a body or a header: clients log what they are told.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from pydantic_core import PydanticSerializationError, to_json
from structlog.stdlib import BoundLogger

from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.delegation.replies import TooMany
from sfu_delegate.observe.logs import frames

STOPPING_RETRY_AFTER: Final = 10.0  # seconds; a restart takes about that long
LIMIT_RETRY_AFTER: Final = 30.0  # seconds until a participant's older delegations are verified, or a homeserver's others may have ended
JSON: Final = {"Content-Type": "application/json"}
NO_STORE: Final = {"Cache-Control": "no-store"}
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

    def form(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Body and headers: `retry_after_ms`, and `Retry-After` in whole seconds, where it makes sense to try again."""
        body: dict[str, Any] = {"errcode": self.errcode, "error": self.error, **self.extra}
        headers = {**NO_STORE, **self.headers}
        if self.retry_after is not None:
            body["retry_after_ms"] = math.ceil(self.retry_after * 1000)
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        return body, headers

    def response(self) -> web.Response:
        """As it goes to the client."""
        body, headers = self.form()
        return json_response(body, status=self.status, headers=headers)


def json_bytes(body: dict[str, Any]) -> bytes:
    """A body."""
    try:
        return to_json(body)
    except PydanticSerializationError:  # half of a character, which a client's JSON may hold
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(body: dict[str, Any], *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON answer. Nothing of ours may be kept by a cache: bodies hold management tokens, and states change."""
    return web.Response(body=json_bytes(body), status=status, headers={**JSON, **NO_STORE, **(headers or {})})


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
            sentence = "Nothing can be stored at the moment. Try again later: if it was stored after all, nothing is done twice."
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


def form_of(error: Exception) -> tuple[int, str, str]:
    """Status, errcode and sentence of what a client sees; the errcode of a defect of ours is empty.

    For those who go on: a frame that holds its own exception would hold the body of the request, too, until a garbage collection.
    """
    expected = of_exception(error)
    return (500, "", "") if expected is None else (expected.status, expected.errcode, expected.error)


def logged(log: BoundLogger, error: Exception, method: str, path: str) -> MatrixError:
    """What nobody expected is logged by its type and place: its text might hold a secret."""
    log.error("request_failed", method=method, path=path, error=type(error).__name__, at=frames(error))
    return MatrixError(500, "M_UNKNOWN", "Something went wrong here that should not have. It is in the daemon's log.")


Form = Callable[[web.Request, MatrixError], web.Response]
"""How an error is answered."""


def _response(request: web.Request, error: Exception, form: Form) -> web.Response | None:
    """In a frame of its own: one that goes on, and holds its own exception, would hold the body of the request, too."""
    expected = of_exception(error)
    return None if expected is None else form(request, expected)


def one_error_shape(log: BoundLogger, form: Form = lambda _, error: error.response()) -> Middleware:
    """Every failed request is answered in the one shape; `form`: or in another one, where that is asked for."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:
            if (response := _response(request, error, form)) is not None:
                return response
            resource = request.match_info.route.resource
            return form(request, logged(log, error, request.method, "?" if resource is None else resource.canonical))

    return middleware
