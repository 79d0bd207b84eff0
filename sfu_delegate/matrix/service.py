"""What an application service asks its homeserver: a user's delayed event, whether somebody is in a room, and other homeservers by its federation.

All of it with the `as_token`: events as their owner (identity assertion, `?user_id=`), membership by MSC4502, federation by MSC4512. What a
homeserver does not answer properly is never taken for a no: `CannotAsk`, whose text is for the operator.

No token and no delay_id may be in an error.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from pydantic_core import to_json

from sfu_delegate.matrix.answers import Reply, no_such_endpoint, read_date, read_reply
from sfu_delegate.matrix.discovery import Homeserver
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.http import Http, HttpAnswer, HttpFailed
from sfu_delegate.matrix.management import unspeakable

EVENT_PATHS: Final = ("/_matrix/client/unstable/org.matrix.msc4140/delayed_events/", "/_matrix/client/v1/delayed_events/")
IS_JOINED: Final = "/_matrix/client/unstable/io.element.msc4502/rooms/{}/is_joined"
FED_PROXY_PATHS: Final = ("/_matrix/client/unstable/io.element.msc4512/appservice/fed_proxy", "/_matrix/client/v1/appservice/fed_proxy")
LIVEKIT: Final = "rtc/livekit"
CLIENT_PREFIXES: Final = (f"/_matrix/client/v1/{LIVEKIT}", f"/_matrix/client/unstable/io.element.msc4195/{LIVEKIT}")
FEDERATION_PREFIXES: Final = (f"/_matrix/federation/unstable/io.element.msc4195/{LIVEKIT}", f"/_matrix/federation/v1/{LIVEKIT}")
"""The unstable one first: the proposal is not part of the specification, and whoever has the endpoint has it there."""

LONG_DELAY: Final = 600.0  # seconds: a quarter of that, by which restarts are early, is more than clocks are wrong by
LONGEST_DELAY: Final = 10.0**9  # seconds; what is longer is no delay
_TOO_LARGE: Final = 10**18  # milliseconds
_JSON: Final = {"Content-Type": "application/json"}


class CannotAsk(Exception):
    """The homeserver could not be asked, or did not answer as one. The text is a sentence about "it" for the operator."""


class CannotTell(CannotAsk):
    """It does not offer what is asked for, and will not before somebody changes its configuration."""


class CannotBe(CannotAsk):
    """It says that there can be no such room, or no such user."""


class Shown(NamedTuple):
    """A delayed event as its homeserver has it. Times in seconds."""

    room_id: str
    type: str
    state_key: str | None
    delay: float
    running_since: float | None  # the countdown began no earlier than this, by our clock; None: that is not to be relied on
    asked_at: float  # by our clock, before the request was sent


class Federated(NamedTuple):
    """What another homeserver answered."""

    status: int
    errcode: str
    content: Mapping[str, Any] | None

    def __repr__(self) -> str:
        return f"Federated(status={self.status}, errcode={self.errcode!r})"


class Part(StrEnum):
    """What has to work at the homeserver, for metrics and logs."""

    TOKEN = "token"  # noqa: S105 (it is a word, not a token)
    MEMBERSHIP = "membership"
    FEDERATION = "federation"
    PROXY = "proxy"  # the last one that is tried


@dataclass(frozen=True, slots=True)
class Defect:
    """What does not work, and what to do, for the operator."""

    part: Part
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Findings:
    """What was tried at a homeserver, and what of it does not work."""

    tried: frozenset[Part]
    defects: tuple[Defect, ...]


class ApplicationService:
    """Asks homeservers that have an `as_token`. `now` gives Unix seconds."""

    def __init__(self, egress: Egress, now: Callable[[], float]) -> None:
        self._egress = egress
        self._now = now

    async def delayed_event(self, homeserver: Homeserver, user: str, delay_id: str, timeout: float) -> Shown | None:  # noqa: ASYNC109
        """A delayed event of this user's; None where it has none of that id. Raises CannotAsk."""
        if unspeakable(delay_id, None):
            return None  # no homeserver gives such ids
        deadline = asyncio.get_running_loop().time() + timeout
        query = f"?user_id={quote(user, safe='')}"
        for path in EVENT_PATHS:
            sent_at = self._now()
            answer, reply = await self._get(homeserver, path + quote(delay_id, safe="") + query, deadline)
            if no_such_endpoint(reply):
                continue
            if reply.status == 404 and reply.errcode == "M_NOT_FOUND":
                return None
            if reply.status == 200 and (shown := _shown(reply.content, answer.headers.get("date"), sent_at, self._now())) is not None:
                return shown
            raise _unexpected(reply)
        raise CannotTell("it does not show delayed events one by one: its version is too old for an application service's delegations")

    async def is_joined(self, homeserver: Homeserver, user: str, room_id: str, timeout: float) -> bool:  # noqa: ASYNC109
        """Is the user, whose homeserver may be another one, in the room? A room that the homeserver does not know has nobody in it.

        Raises CannotAsk, and of it CannotBe where the homeserver takes no such name: that is no word on anybody who is in a call.
        """
        if unspeakable(room_id, None):
            raise CannotBe("there can be no such room")
        deadline = asyncio.get_running_loop().time() + timeout
        _, reply = await self._get(homeserver, f"{IS_JOINED.format(quote(room_id, safe=''))}?mxid={quote(user, safe='')}", deadline)
        if reply.status == 200 and reply.content is not None and type(reply.content.get("joined")) is bool:
            return bool(reply.content["joined"])
        if reply.status == 400 and reply.errcode == "M_INVALID_PARAM":
            raise CannotBe("it takes the name of the room, or of the user, for impossible")
        if no_such_endpoint(reply):
            raise CannotTell("it does not tell who is in a room (MSC4502): Synapse needs experimental_features.msc4502_enabled: true, and a restart")
        if reply.status == 403 and reply.errcode:
            raise CannotTell(
                "it does not tell us who is in a room: io.element.msc4502.scopes in the registration must have"
                " urn:matrix:client:io.element.msc4502:rooms:is_joined"
            )
        raise _unexpected(reply)

    async def federated(self, homeserver: Homeserver, destination: str, endpoint: str, body: Mapping[str, Any], timeout: float) -> Federated:  # noqa: ASYNC109
        """POST to an endpoint of MSC4195 at another homeserver, by the federation of ours. Raises CannotAsk."""
        deadline = asyncio.get_running_loop().time() + timeout
        found: Federated | None = None
        for prefix in FEDERATION_PREFIXES:
            found = await self._fed_proxy(
                homeserver, {"destination": destination, "method": "POST", "path": f"{prefix}/{endpoint}", "body": body}, deadline
            )
            if found.errcode != "M_UNRECOGNIZED":
                break
        assert found is not None  # noqa: S101 — there are prefixes
        return found

    async def _fed_proxy(self, homeserver: Homeserver, asked: Mapping[str, Any], deadline: float) -> Federated:
        for path in FED_PROXY_PATHS:
            reply = await self._post(homeserver, path, asked, deadline)
            if no_such_endpoint(reply):
                continue
            if reply.status == 200 and reply.content is not None and type(reply.content.get("status")) is int:
                content = reply.content.get("content")
                content = content if isinstance(content, dict) else None
                errcode = content.get("errcode") if content is not None else None
                return Federated(reply.content["status"], errcode if isinstance(errcode, str) else "", content)
            if reply.status in {403, 502} and "FEDPROXY" in reply.errcode:
                return Federated(reply.status, reply.errcode, None)
            raise _unexpected(reply)
        raise CannotTell("it does not pass requests on to other homeservers (MSC4512): Synapse needs experimental_features.msc4512_enabled: true")

    # ── does it all work? ──

    async def check(self, homeserver: Homeserver, timeout: float, *, passes_on: bool) -> Findings:  # noqa: ASYNC109
        """What works and what does not of all that an application service needs; only of its token, unless the homeserver `passes_on` requests. Asks
        for nothing that changes anything. Raises CannotAsk.
        """
        try:
            return await self._check(homeserver, timeout, passes_on)
        except CannotTell as cannot:
            return _found([Part.TOKEN], Defect(Part.TOKEN, str(cannot), "give the homeserver and the daemon the same registration"))

    async def _check(self, homeserver: Homeserver, timeout: float, passes_on: bool) -> Findings:  # noqa: ASYNC109
        deadline = asyncio.get_running_loop().time() + timeout
        nobody = f"@nobody:{homeserver.name}"
        _, whoami = await self._get(homeserver, f"/_matrix/client/v3/account/whoami?user_id={quote(nobody, safe='')}", deadline)
        if whoami.status == 401 and whoami.errcode:
            remedy = "register it there (app_service_config_files) with the file that `sfu-delegate appservice` writes, and restart it"
            return _found([Part.TOKEN], Defect(Part.TOKEN, "it does not know the as_token", remedy))
        found: list[Defect] = []
        if whoami.status == 403 and "masquerade" in str((whoami.content or {}).get("error", "")).lower():
            remedy = "let namespaces.users in the registration match all users of this homeserver: `sfu-delegate appservice` writes it so"
            found.append(Defect(Part.TOKEN, "it does not let the application service speak for its users", remedy))
        elif not (whoami.status == 403 and whoami.errcode == "M_FORBIDDEN") and not (whoami.status == 200 and "user_id" in (whoami.content or {})):
            raise _unexpected(whoami)  # that there is no such user is to be expected
        if not passes_on:
            return _found([Part.TOKEN], *found)
        try:
            await self.is_joined(homeserver, nobody, f"!nowhere:{homeserver.name}", timeout)
        except CannotTell as cannot:
            remedy = "mend that, and restart it; until then get_token is not answered there, and membership not enforced"
            found.append(Defect(Part.MEMBERSHIP, str(cannot), remedy))
        for path in FED_PROXY_PATHS:
            if not no_such_endpoint(await self._post(homeserver, path, {}, deadline)):
                break
        else:
            remedy = "set experimental_features.msc4512_enabled: true (Synapse 1.163 or later) and restart it; the standalone endpoints go on working"
            return _found([*Part][:-1], *found, Defect(Part.FEDERATION, "it does not pass requests on (MSC4512)", remedy))
        return _found(Part, *found, *await self._defects_of_the_way_back(homeserver, timeout))

    async def _defects_of_the_way_back(self, homeserver: Homeserver, timeout: float) -> Sequence[Defect]:  # noqa: ASYNC109
        """Does what clients send to the homeserver come here? Asked for as Element Call does: an empty body, which we refuse by 400."""
        unreached = "check proxy_url in the registration: the homeserver must reach `listen` there"
        deadline = asyncio.get_running_loop().time() + timeout
        for prefix in CLIENT_PREFIXES[::-1]:
            url = f"{homeserver.base_url}{prefix}/delegate_delayed_leave"
            try:
                answer = await self._way(homeserver).post(url, self._headers(homeserver), b"", deadline, ssl=homeserver.ssl)
            except HttpFailed as failed:  # though it has just answered something else
                return [Defect(Part.PROXY, f"it does not answer what it is to pass on to this service: {failed.reason}", unreached)]
            reply = read_reply(answer, self._now())
            if not no_such_endpoint(reply):
                break
        if reply.status == 400 and reply.errcode == "M_NOT_JSON":
            return []
        proxy = "io.element.msc4512.proxy_prefix and proxy_url"
        if no_such_endpoint(reply):
            remedy = f"let the registration have {proxy}, and let that lead to `listen` here: something else at that URL may answer 404, too"
            return [Defect(Part.PROXY, "it does not pass clients' requests on", remedy)]
        if reply.status == 401 and reply.errcode == "M_UNKNOWN_TOKEN":
            problem = "it passes clients' requests on with an hs_token that is not the configured one"
            return [Defect(Part.PROXY, problem, "give the homeserver and the daemon the same registration, and restart the homeserver")]
        if reply.status >= 500:
            problem = "it cannot reach this service to pass clients' requests on"
            return [Defect(Part.PROXY, problem, unreached)]
        problem = f"what it passes on is answered {reply.status} {reply.errcode}".strip()
        return [Defect(Part.PROXY, problem, "check what is at proxy_url in the registration")]

    # ── requests ──

    def _way(self, homeserver: Homeserver) -> Http:
        return self._egress.way(discovered=homeserver.discovered, stranger=homeserver.stranger)

    def _headers(self, homeserver: Homeserver) -> dict[str, str]:
        if homeserver.as_token is None:
            raise CannotTell("there is no as_token for it in the configuration any more")
        return {**_JSON, "Authorization": f"Bearer {homeserver.as_token}"}

    async def _get(self, homeserver: Homeserver, path: str, deadline: float) -> tuple[HttpAnswer, Reply]:
        try:
            answer = await self._way(homeserver).get(homeserver.base_url + path, self._headers(homeserver), deadline, ssl=homeserver.ssl)
        except HttpFailed as failed:
            raise CannotAsk(failed.reason) from None
        return answer, read_reply(answer, self._now())

    async def _post(self, homeserver: Homeserver, path: str, body: Mapping[str, Any], deadline: float) -> Reply:
        try:
            answer = await self._way(homeserver).post(
                homeserver.base_url + path, self._headers(homeserver), to_json(body), deadline, ssl=homeserver.ssl
            )
        except HttpFailed as failed:
            raise CannotAsk(failed.reason) from None
        return read_reply(answer, self._now())


def _found(tried: Iterable[Part], *defects: Defect) -> Findings:
    return Findings(frozenset(tried), defects)


def _unexpected(reply: Reply) -> CannotAsk:
    if reply.status in {401, 403} and reply.errcode:
        return CannotTell(
            f"it does not accept the application service's token ({reply.status} {reply.errcode}):"
            " check as_token and the namespaces of its registration"
        )
    if reply.status == 200:
        return CannotAsk("its answer is not that of a homeserver: is there a proxy that answers in its place?")
    return CannotAsk(f"it answers {reply.status} {reply.errcode}".rstrip())


def _shown(content: Mapping[str, Any] | None, date: str | None, sent_at: float, answered_at: float) -> Shown | None:
    """The event in an answer, with Synapse's names or the proposal's; None where it is not one."""
    if content is None:
        return None
    room_id, kind, state_key = content.get("room_id"), content.get("type"), content.get("state_key")
    delay_ms, since_ms = content.get("delay_ms", content.get("delay")), content.get("delayed_since_ts", content.get("running_since"))
    if not (isinstance(room_id, str) and isinstance(kind, str) and _is_number(delay_ms) and _is_number(since_ms)):
        return None
    delay = float(delay_ms) / 1000
    if not 0 <= delay <= LONGEST_DELAY:
        return None
    return Shown(
        room_id,
        kind,
        state_key if isinstance(state_key, str) else None,
        delay,
        running_since(float(since_ms) / 1000, delay, date, sent_at, answered_at),
        sent_at,
    )


def running_since(since: float, delay: float, date: str | None, sent_at: float, answered_at: float) -> float | None:
    """No later than when the countdown began, by our clock; None where that cannot be told.

    `since` is by the homeserver's clock, which may be wrong: its `Date`, in whole seconds, tells how old the countdown is. Believed is whichever
    of the two, that and our own clock, makes it older. None: the clocks contradict each other, or the delay is so short that it would matter if a
    clock is a little wrong, such as that of a homeserver behind a proxy that tells the `Date`: a restart costs less than that.
    """
    date_at = read_date(date)
    if date_at is None or since >= date_at + 1.0 or since >= answered_at + 1.0 or delay < LONG_DELAY:
        return None
    age = max(date_at + 1.0 - since, answered_at - since, 0.0)
    began = sent_at - age
    return began if began > sent_at - delay else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_TOO_LARGE < value < _TOO_LARGE  # NaN is not
