"""What a homeserver's answer means. Pure: an answer goes in, a meaning comes out.

The source is MSC4140's table of answers, and what Synapse 1.163 was measured to do. The rule behind each line: only a Matrix error of the
homeserver itself is final; what a proxy in between may have said (HTML, any 5xx, a bare status) is not.

The server's own `error` texts are never passed on: a server may repeat a delay_id in them.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple

from sfu_delegate.delegation.model import Verdict
from sfu_delegate.matrix.http import HttpAnswer

MIN_RETRY_AFTER: Final = 0.05  # seconds
MAX_RETRY_AFTER: Final = 3600.0

_ERRCODE = re.compile(r"[A-Za-z0-9_.:-]{1,100}")
_SECONDS = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?")


class Answer(NamedTuple):
    """What became of a management request."""

    verdict: Verdict
    status: int | None  # None: there was no answer
    errcode: str  # "" where the answer is no Matrix error
    retry_after: float | None  # seconds to wait at least, as the server asked, without jitter: whoever plans the next try adds it
    detail: str  # for people: status, errcode and a remark; never a token, a delay_id or a URL
    of_owner: bool = False  # LIMITED is, or may be, by the limit that the event's owner has, and says nothing of ours


class Reply(NamedTuple):
    """An HTTP answer, read as Matrix would have it. Its repr has nothing of the body."""

    status: int
    content: Mapping[str, Any] | None  # the body, if it is a JSON object
    errcode: str  # of a Matrix error; "" for everything else
    retry_after: float | None  # seconds

    def __repr__(self) -> str:
        return f"Reply(status={self.status}, errcode={self.errcode!r}, retry_after={self.retry_after})"


DONE: Final = Answer(Verdict.DONE, 200, "", None, "200")


def is_usual(answer: HttpAnswer) -> bool:
    """Is it what homeservers answer to a management request that was carried out, to the letter? Then it means DONE, and need not be read."""
    return answer.status == 200 and answer.body == b"{}"


def read_reply(answer: HttpAnswer, now: float) -> Reply:
    """Read an answer; `now` (Unix seconds) is what a Retry-After with a date is compared with."""
    value: object = None
    if answer.whole:
        with suppress(ValueError, RecursionError):
            value = json.loads(answer.body.decode("utf-8"))
    content = value if isinstance(value, dict) else None
    errcode = content.get("errcode") if content is not None else None
    if not (isinstance(errcode, str) and _ERRCODE.fullmatch(errcode)):
        errcode = ""
    return Reply(
        status=answer.status,
        content=content,
        errcode=errcode,
        retry_after=read_retry_after(answer.headers.get("retry-after"), content, now),
    )


def read_retry_after(header: str | None, content: Mapping[str, Any] | None, now: float) -> float | None:
    """Seconds until a server wants to be asked again: the larger of the `Retry-After` header (seconds or a date) and `retry_after_ms` in
    the body; the latter where the header is the same in whole seconds (Synapse 1.163), since it tells the rate exactly.

    Between MIN_RETRY_AFTER and MAX_RETRY_AFTER; None where neither says anything that can be understood. Without jitter, which the caller
    adds.
    """
    in_header, in_body = _from_header(header, now), _from_body(content)
    if in_header is not None and in_body is not None and 0 <= in_header - in_body <= 1:
        in_header = None
    asked = [s for s in (in_header, in_body) if s is not None]
    return min(max(*asked, MIN_RETRY_AFTER), MAX_RETRY_AFTER) if asked else None


def _from_header(header: str | None, now: float) -> float | None:
    if header is None:
        return None
    header = header.strip()
    if _SECONDS.fullmatch(header):
        return float(header)
    at = read_date(header)
    return None if at is None else at - now


def read_date(header: str | None) -> float | None:
    """A date as HTTP has it, in Unix seconds; None where it is none. Without a zone, it is UTC."""
    try:
        at = parsedate_to_datetime(header or "")
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _from_body(content: Mapping[str, Any] | None) -> float | None:
    ms = content.get("retry_after_ms") if content is not None else None
    if isinstance(ms, bool) or not isinstance(ms, int | float):
        return None
    try:
        seconds = float(ms) / 1000
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) else None


def no_such_endpoint(reply: Reply) -> bool:
    """Does the server not have the endpoint that was asked? Not the same as `404 M_NOT_FOUND`: no such delayed event."""
    return reply.status == 405 or (400 <= reply.status < 500 and reply.errcode == "M_UNRECOGNIZED")


def understand(reply: Reply, *, own_token: bool) -> Answer:
    """The meaning of an answer to restart, send or cancel.

    `own_token`: it was asked with the application service's token, which is the operator's to get right.
    """

    def is_(verdict: Verdict, remark: str = "") -> Answer:
        return Answer(verdict, reply.status, reply.errcode, None if verdict is Verdict.DONE else reply.retry_after, _words(reply, remark))

    status, errcode = reply.status, reply.errcode
    if 200 <= status < 300:
        if reply.content == {}:  # to the letter: `{"status": "maintenance"}` is what a proxy says, and a repetition does no harm
            return is_(Verdict.DONE)
        return is_(Verdict.UNCERTAIN, "the answer is not the homeserver's: is there a proxy that answers in its place?")
    if 300 <= status < 400:
        return is_(Verdict.FAILED, "a redirect, which is not followed: configure the URL that it leads to")
    if status == 429 or (status < 500 and errcode == "M_LIMIT_EXCEEDED"):
        return is_(Verdict.LIMITED)
    if not 400 <= status < 500:
        return is_(Verdict.UNCERTAIN)
    if no_such_endpoint(reply):
        return is_(Verdict.FAILED, "the homeserver does not have this endpoint")
    if not errcode:
        return is_(Verdict.UNCERTAIN, "not a Matrix error: is there a proxy that answers in the homeserver's place?")
    match status:
        case 404 if errcode == "M_NOT_FOUND":
            return is_(Verdict.NOT_FOUND)
        case 409:
            return is_(Verdict.CONFLICT)
        case 401 | 403 if own_token:
            return is_(
                Verdict.FAILED,
                "the homeserver does not accept the application service's token: check as_token and the namespaces of its registration",
            )
        case 400 | 401 | 403 if errcode == "M_RESOURCE_LIMIT_EXCEEDED":
            return is_(Verdict.FAILED, "the homeserver has reached a limit of its own")
        case 400 | 401 | 403:
            return is_(Verdict.REFUSED)
        case _:
            return is_(Verdict.UNCERTAIN)


def _words(reply: Reply, remark: str) -> str:
    what = f"{reply.status} {reply.errcode}".strip()
    return f"{what}: {remark}" if remark else what
