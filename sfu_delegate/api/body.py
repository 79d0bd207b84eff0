"""Reading the body of a request: no more than may be, no longer than may be, and JSON without ambiguities.

Nothing of a body is ever repeated in an error.
"""

import asyncio
import json
from typing import Any, Final, NoReturn

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from sfu_delegate.api.errors import MatrixError

BODY_TIMEOUT: Final = 20.0  # seconds; a body is some kilobytes


async def read_body(request: web.Request, limit: int) -> bytes:
    """The body, of `limit` bytes at most. Raises MatrixError: 413, 408 when it does not come, 400 when it cannot be read."""
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    if request.content.is_eof() and request.content.exception() is None:
        return _at_hand(request, limit)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            while len(body) <= limit and (chunk := await request.content.readany()):
                body += chunk
    except TimeoutError:
        sentence = f"The body did not arrive within {BODY_TIMEOUT:.0f} seconds."
        raise MatrixError(408, "M_UNKNOWN", sentence, headers={"Connection": "close"}) from None
    except (ConnectionError, HttpProcessingError, web.RequestPayloadError, aiohttp.ClientPayloadError):
        raise MatrixError(400, "M_NOT_JSON", "The body cannot be read: it is incomplete, or not in the encoding that its headers name.") from None
    if len(body) > limit:
        raise _too_large(limit)
    return bytes(body)


def _at_hand(request: web.Request, limit: int) -> bytes:
    """A body that has come as a whole with its headers, as most do: it needs no deadline."""
    body = request.content.read_nowait(limit + 1)
    if len(body) > limit:
        raise _too_large(limit)
    return body


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises MatrixError.

    Refuses what parsers read differently: two fields of one name, NaN and Infinity, text behind the object, other encodings than UTF-8.
    """
    problem = ""
    value: object = None
    try:
        value = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError:
        problem = "it is not UTF-8"
    except _Ambiguous as error:
        problem = str(error)
    except json.JSONDecodeError as error:
        problem = "it is empty" if not body.strip() else f"it is malformed at line {error.lineno}, column {error.colno}"
    except ValueError:
        problem = "it has a number with too many digits"
    except RecursionError:
        problem = "it is nested too deeply"
    if problem:  # raised out here: the parser's error, which holds the whole body, must not travel along as the context
        raise MatrixError(400, "M_NOT_JSON", f"The body is not JSON: {problem}. Send one JSON object in UTF-8.")
    if not isinstance(value, dict):
        raise MatrixError(400, "M_BAD_JSON", "The body must be a JSON object.")
    return value


class _Ambiguous(Exception):
    """JSON that two parsers may read differently."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _Ambiguous("an object has two fields of the same name")
    return fields


def _no_constant(_: str) -> NoReturn:
    raise _Ambiguous("it has NaN or Infinity, which JSON does not know")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def _too_large(limit: int) -> MatrixError:
    return MatrixError(413, "M_TOO_LARGE", f"The body is too large: {limit} bytes are the most.")
