"""Asking the SFU who is in a room (RoomService, Twirp over HTTP).

An empty list ends people's calls, so it must come from LiveKit: everything that is not a complete and proper answer is `SfuUnavailable`,
which says nothing about anybody. That is why the two calls are made here and not by livekit-api's client (1.2): that reads *any* answer
with status 200 as protobuf, and as such an empty body, as a proxy may give it, is an empty room; it follows redirects, which turn the
question into a GET of some page; it reads answers without a limit; it retries by itself on LiveKit Cloud; and an error that is JSON but no
object makes it fail by accident. The JSON dialect of Twirp has none of these doubts: an empty room is `{"participants": []}`.

The text of an answer is never quoted: LiveKit's 401 quotes our whole token.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
from pydantic_core import from_json, to_json

from sfu_delegate.delegation.model import Listed
from sfu_delegate.livekit import fields, tokens
from sfu_delegate.livekit.keys import SfuKey

EMPTY_TIMEOUT = 300  # seconds that a room waits for its first participant
DEPARTURE_TIMEOUT = 20  # seconds that a room waits after its last
MAX_ANSWER = 32 * 1024 * 1024  # bytes; a participant is listed in 1 kB or so
_MAX_ERROR = 4096  # bytes
_SCHEMES = {"ws": "http", "wss": "https", "http": "http", "https": "https"}
_STATES = ("JOINING", "JOINED", "ACTIVE", "DISCONNECTED")
_TWIRP_CODES = frozenset(
    {
        "aborted",
        "already_exists",
        "bad_route",
        "canceled",
        "data_loss",
        "deadline_exceeded",
        "failed_precondition",
        "internal",
        "invalid_argument",
        "malformed",
        "not_found",
        "out_of_range",
        "permission_denied",
        "resource_exhausted",
        "unauthenticated",
        "unavailable",
        "unimplemented",
        "unknown",
    }
)


class Trouble(StrEnum):
    """Why an SFU could not be asked; fit for a metric's label."""

    TIMEOUT = "timeout"
    CONNECTION = "connection"  # not reached, or cut off
    TLS = "tls"
    REFUSED = "refused"  # it does not take our token
    ERROR = "error"  # it says that it failed
    ANSWER = "answer"  # not LiveKit's answer: a proxy's, or garbage


class SfuUnavailable(Exception):
    """The SFU could not be asked: nothing is known about anybody. The text is a plain sentence for the log."""

    def __init__(self, sentence: str, trouble: Trouble, code: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.trouble = trouble
        self.code = code  # LiveKit's own, where it has one


@dataclass(frozen=True, slots=True)
class SfuAddress:
    """Where an SFU is asked, and with which of its keys. Raises ValueError for a URL that is not ws(s):// or http(s):// with a host."""

    name: str
    url: str  # as clients get it; a path is kept
    key: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        url = urlsplit(self.url)
        if url.scheme not in _SCHEMES or not url.hostname:
            raise ValueError(f"SFU {self.name!r}: its URL must begin with wss://, ws://, https:// or http://, and name a host")

    @property
    def http_url(self) -> str:
        """The URL for HTTP requests, without a slash at the end: ws(s):// becomes http(s)://."""
        url = urlsplit(self.url)
        return f"{_SCHEMES[url.scheme]}://{url.netloc}{url.path.rstrip('/')}"


class RoomService:
    """The calls of RoomService that a delegate needs. How many go on at once is the caller's to limit.

    Without a session it makes its own at the first call, and `close` (or `async with`) closes that one only. `clock` is the wall clock in
    Unix seconds, for the tokens.
    """

    def __init__(self, session: aiohttp.ClientSession | None = None, clock: Callable[[], float] = time.time) -> None:
        self._session = session
        self._own_session: aiohttp.ClientSession | None = None
        self._clock = clock

    async def look(self, sfu: SfuAddress, room: str, timeout: float) -> tuple[Listed, ...]:  # noqa: ASYNC109  (the whole call, by aiohttp)
        """Everybody whom the SFU lists in this room, of whatever state. Raises SfuUnavailable; `timeout` is for all of it, in seconds.

        A room that does not exist is an empty one: LiveKit answers both alike.
        """
        answer = await self._call(sfu, "ListParticipants", room, {"room": room}, timeout)
        entries = answer.get("participants")
        try:
            if type(entries) is not list:
                raise fields.BadField("it has no list of participants")
            return tuple(_listed(entry) for entry in entries)
        except fields.BadField as error:
            raise SfuUnavailable(f"The SFU's answer is not LiveKit's: {error}.", Trouble.ANSWER) from None

    async def create_room(
        self,
        sfu: SfuAddress,
        room: str,
        timeout: float,  # noqa: ASYNC109
        *,
        empty_timeout: int = EMPTY_TIMEOUT,
        departure_timeout: int = DEPARTURE_TIMEOUT,
    ) -> str:
        """Create the room, unless it exists (then its own timeouts stay), and return its sid. Raises SfuUnavailable.

        `timeout` is for the whole call; all three are seconds.
        """
        request = {"name": room, "empty_timeout": empty_timeout, "departure_timeout": departure_timeout}
        answer = await self._call(sfu, "CreateRoom", room, request, timeout)
        try:
            sid = fields.identifier(answer, "sid")
        except fields.BadField:
            sid = ""
        if not sid or answer.get("name") != room:
            raise SfuUnavailable("The SFU's answer is not LiveKit's: it does not tell the room that was asked for.", Trouble.ANSWER)
        return sid

    async def remove(self, sfu: SfuAddress, room: str, identity: str, timeout: float) -> bool:  # noqa: ASYNC109
        """Remove a participant from a room; False where it is not there. Raises SfuUnavailable."""
        try:
            await self._call(sfu, "RemoveParticipant", room, {"room": room, "identity": identity}, timeout)
        except SfuUnavailable as error:
            if error.code == "not_found":
                return False
            raise
        return True

    async def delete_room(self, sfu: SfuAddress, room: str, timeout: float) -> bool:  # noqa: ASYNC109
        """Delete a room, with everybody in it; False where it is not there. Raises SfuUnavailable."""
        try:
            await self._call(sfu, "DeleteRoom", room, {"room": room}, timeout)
        except SfuUnavailable as error:
            if error.code == "not_found":
                return False
            raise
        return True

    async def close(self) -> None:
        """Close the own session, if there is one. Can be called again."""
        session, self._own_session = self._own_session, None
        if session is not None:
            await session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _call(self, sfu: SfuAddress, method: str, room: str, request: dict[str, Any], timeout: float) -> dict[str, Any]:  # noqa: ASYNC109
        try:
            token = tokens.mint_admin(SfuKey(sfu.name, sfu.key, sfu.secret), room, self._clock())
            async with self._open().post(
                f"{sfu.http_url}/twirp/livekit.RoomService/{method}",
                data=to_json(request),
                headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Accept": "application/json"},
                timeout=aiohttp.ClientTimeout(total=timeout),
                allow_redirects=False,
            ) as response:
                status = response.status
                body = await _read(response, MAX_ANSWER if status == 200 else _MAX_ERROR)
            failure = None
        except TimeoutError:
            failure = SfuUnavailable(f"The SFU did not answer within {timeout:g} s.", Trouble.TIMEOUT)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = _no_connection(error)
        if failure is not None:  # raised out here: aiohttp's error holds our request with its token, and must not travel along as the context
            raise failure
        if status != 200:
            raise _failure(status, body)
        answer = _object(body)
        if answer is None:
            raise SfuUnavailable("Something answered, but not LiveKit: status 200 without a JSON object. Is there a proxy before it?", Trouble.ANSWER)
        return answer

    def _open(self) -> aiohttp.ClientSession:
        if self._session is not None:
            return self._session
        if self._own_session is None:
            self._own_session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        return self._own_session


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes | None:
    """The body, None if it is longer than `limit` bytes."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


def _object(body: bytes | None) -> dict[str, Any] | None:
    if body is None:
        return None
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError:
        return None
    return value if type(value) is dict else None


def _listed(entry: object) -> Listed:
    """One entry; an entry that cannot be read spoils the whole list, since leaving it out would make somebody absent."""
    if type(entry) is not dict:
        raise fields.BadField("something in its list of participants is not an object")
    identity = fields.text(entry, "identity")
    if not identity:
        raise fields.BadField("somebody in its list of participants has no identity")
    return Listed(identity, fields.identifier(entry, "sid"), _state(entry.get("state")), fields.joined_at_ms(entry))


def _state(value: object) -> str:
    if value is None:
        return _STATES[0]  # the enum's default, which protobuf may leave out
    if type(value) is int and 0 <= value < len(_STATES):
        return _STATES[value]
    if type(value) is str and value in _STATES:
        return value
    raise fields.BadField("somebody in its list of participants has a state that is not known")


def _failure(status: int, body: bytes | None) -> SfuUnavailable:
    answer = _object(body) or {}
    code = answer.get("code")
    if type(code) is not str or code not in _TWIRP_CODES:
        code = ""
    if status in {401, 403}:
        return SfuUnavailable(
            f"The SFU does not take our token (HTTP {status}): check its API key and secret, and that the clocks agree.", Trouble.REFUSED
        )
    if not code and status < 500:
        return SfuUnavailable(
            f"Something answered HTTP {status}, and not as LiveKit does: check its URL, and for a proxy before it.",
            Trouble.ANSWER,
        )
    if code == "bad_route":
        return SfuUnavailable(f"LiveKit does not know this call (HTTP {status}, bad_route): check the URL's path.", Trouble.ANSWER)
    return SfuUnavailable(f"The SFU failed with HTTP {status}{f' ({code})' if code else ''}.", Trouble.ERROR, code)


def _no_connection(error: Exception) -> SfuUnavailable:
    match error:
        case aiohttp.ClientConnectorCertificateError():
            return SfuUnavailable("The SFU's TLS certificate is not valid for its address, or not trusted here.", Trouble.TLS)
        case aiohttp.ClientConnectorSSLError():
            return SfuUnavailable("No TLS connection to the SFU could be made: does it speak TLS at this address?", Trouble.TLS)
        case aiohttp.ClientConnectorDNSError():
            return SfuUnavailable("The host name of the SFU's URL was not found.", Trouble.CONNECTION)
        case aiohttp.ClientConnectorError():
            return SfuUnavailable("The SFU could not be connected to: is it running, and is its URL right?", Trouble.CONNECTION)
        case aiohttp.InvalidURL():
            return SfuUnavailable("The SFU's URL cannot be used for a request.", Trouble.CONNECTION)
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError() | ConnectionError():
            return SfuUnavailable("The SFU cut the connection before its answer was complete.", Trouble.CONNECTION)
        case aiohttp.ClientResponseError():
            return SfuUnavailable("Something answered that is not HTTP, or not proper HTTP.", Trouble.ANSWER)
        case _:
            return SfuUnavailable(f"The SFU could not be asked ({type(error).__name__}).", Trouble.CONNECTION)
