"""Whose OpenID token is it? Asked of the homeserver that issued it (the server-server specification, "OpenID").

The homeserver that a client names may vouch for its own users only: were it believed about others, any server could be anybody. Tokens are
not kept: what is remembered is remembered by their hash.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Final
from urllib.parse import quote

from sfu_delegate.matrix.answers import Reply, no_such_endpoint, read_reply
from sfu_delegate.matrix.discovery import DiscoveryFailed
from sfu_delegate.matrix.federation import Federation
from sfu_delegate.matrix.http import HttpFailed
from sfu_delegate.matrix.inflight import InFlight
from sfu_delegate.matrix.memory import keep
from sfu_delegate.matrix.names import ServerName, server_of

REFUSAL_LIFE: Final = 10.0  # seconds that a refusal is remembered
MAX_REMEMBERED: Final = 10_000  # tokens

_PATH: Final = "/_matrix/federation/v1/openid/userinfo?access_token="
_TOKEN = re.compile(r"[ -~]{1,4096}")
_ERRCODE = re.compile(r"M_[A-Z_]{1,60}")  # of these alone it is certain that they do not repeat a token
_Key = tuple[str, bytes]  # server name in lower case, SHA-256 of the token


class OpenIdRefused(Exception):
    """The token proves nothing: it is unknown or expired, or its server vouches for no user, or for one of another server."""


class OpenIdUnavailable(Exception):
    """The homeserver could not be found or asked. The text is a sentence for the operator's log, without secrets."""


class _OutOfTime(OpenIdUnavailable):
    """The time of whoever began the question was over; that of others who share it may not be."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a homeserver said of a token, and when."""

    user: str | None
    refusal: str  # why there is no user
    at: float


class OpenId:
    """Checks OpenID tokens. `now` gives Unix seconds, `cache` the seconds that a success is believed without asking again (0: not at all)."""

    def __init__(self, federation: Federation, now: Callable[[], float], *, cache: Callable[[], float] = lambda: 300.0) -> None:
        self._federation = federation
        self._now = now
        self._cache = cache
        self._remembered: OrderedDict[_Key, _Verdict] = OrderedDict()
        self._questions: InFlight[_Verdict] = InFlight()
        self._closed = False

    async def user(self, server_name: str, token: str, timeout: float, who: str = "") -> str:  # noqa: ASYNC109 - the question is shared with others
        """The Matrix user ID of the token's owner, to the letter as the homeserver gave it, within `timeout` seconds.

        `who` asks, see `Federation.get`. Identical questions that are asked at once share one request. Raises OpenIdRefused, OpenIdUnavailable.
        """
        try:
            server = ServerName.parse(server_name)
        except ValueError as error:
            raise OpenIdRefused(f"matrix_server_name {error}") from None
        if not _TOKEN.fullmatch(token):
            raise OpenIdRefused("the OpenID token is empty, too long, or has characters that a token cannot have")
        key = (server_name.lower(), sha256(token.encode()).digest())
        verdict = self._recall(key)
        if verdict is None:
            verdict = await self._share(key, server, token, asyncio.get_running_loop().time() + timeout, who)
        if verdict.user is None:
            raise OpenIdRefused(verdict.refusal)
        return verdict.user

    async def aclose(self) -> None:
        """Stop questions that are under way: who waits for them gets OpenIdUnavailable, as does everybody who asks from now on."""
        self._closed = True
        await self._questions.aclose()

    async def _share(self, key: _Key, server: ServerName, token: str, deadline: float, who: str) -> _Verdict:
        loop = asyncio.get_running_loop()
        try:
            if key not in self._questions and not self._closed:  # the question has the same deadline
                with suppress(_OutOfTime):
                    return await asyncio.shield(self._questions.begin(key, self._ask(key, server, token, deadline, who)))
            async with asyncio.timeout_at(deadline):
                while loop.time() < deadline and not self._closed:
                    with suppress(_OutOfTime):
                        return await self._questions.share(key, lambda: self._ask(key, server, token, deadline, who))
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if not self._closed:
                raise
        if self._closed:
            raise _unavailable(server, "the daemon is stopping")
        raise _unavailable(server, "no answer in time")

    def _recall(self, key: _Key) -> _Verdict | None:
        verdict = self._remembered.get(key)
        if verdict is None:
            return None
        life = REFUSAL_LIFE if verdict.user is None else self._cache()
        if not 0 <= self._now() - verdict.at < life:
            del self._remembered[key]
            return None
        self._remembered.move_to_end(key)
        return verdict

    async def _ask(self, key: _Key, server: ServerName, token: str, deadline: float, who: str) -> _Verdict:
        began = self._now()
        try:
            answer = await self._federation.get(key[0], _PATH + quote(token, safe=""), deadline, who)
        except DiscoveryFailed as failed:
            raise _unavailable(server, str(failed)) from None
        except HttpFailed as failed:
            if asyncio.get_running_loop().time() >= deadline:
                raise _OutOfTime from None
            raise _unavailable(server, failed.reason) from None
        verdict = _judge(read_reply(answer, began), key[0], server, began)
        if verdict.user is None or self._cache() > 0:
            keep(self._remembered, key, verdict, MAX_REMEMBERED)
        return verdict


def _judge(reply: Reply, name: str, server: ServerName, at: float) -> _Verdict:
    """Raises OpenIdUnavailable for what is not the homeserver's own word."""
    if reply.status == 200 and reply.content is not None and isinstance(user := reply.content.get("sub"), str):
        vouched = server_of(user)
        if vouched is None:
            return _Verdict(None, f"{server} vouches for something that is not a Matrix user ID", at)
        if vouched.lower() != name:
            return _Verdict(None, f"{server} vouches for a user of another server", at)
        return _Verdict(user, "", at)
    if reply.status in {401, 403} and reply.errcode and reply.errcode != "M_LIMIT_EXCEEDED" and not no_such_endpoint(reply):
        return _Verdict(None, f"{server} does not accept the OpenID token{_in_brackets(reply.errcode)}", at)
    if reply.status == 200:
        raise _unavailable(server, "its answer is not that of a homeserver: is there a proxy that answers in its place?")
    raise _unavailable(server, f"it answers {reply.status}{_in_brackets(reply.errcode)}")


def _in_brackets(errcode: str) -> str:
    return f" ({errcode})" if _ERRCODE.fullmatch(errcode) else ""


def _unavailable(server: ServerName, why: str) -> OpenIdUnavailable:
    return OpenIdUnavailable(f"the homeserver {server} could not be asked about an OpenID token: {why}")
