"""What a client does at its homeserver in a call: the client-server API, as far as the demonstration and the end-to-end tests need it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

import aiohttp

CALL_MEMBER = "org.matrix.msc3401.call.member"
RTC_MEMBER = "org.matrix.msc4143.rtc.member"
UNSTABLE = "/_matrix/client/unstable/org.matrix.msc4140"
V3 = "/_matrix/client/v3"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Account:
    """A user with one device."""

    user_id: str
    device_id: str
    access_token: str = field(repr=False)

    @property
    def member_key(self) -> str:
        """The state key of this device's call membership, as Element Call has it."""
        return f"_{self.user_id}_{self.device_id}_m.call"


class Member(NamedTuple):
    """A call membership as the room's state has it. Empty content: not in the call."""

    key: str
    content: Json
    since: float  # Unix seconds, the homeserver's clock

    @property
    def in_call(self) -> bool:
        """Does the room show this device in the call?"""
        return bool(self.content)


class MatrixError(Exception):
    """The homeserver refused."""

    def __init__(self, status: int, errcode: str, error: str, retry_after_ms: int = 0) -> None:
        super().__init__(f"{status} {errcode}: {error}")
        self.status = status
        self.errcode = errcode
        self.retry_after_ms = retry_after_ms


class ClientServer:
    """One homeserver's client-server API, for any of its users."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self._http = http

    async def call(
        self, method: str, path: str, account: Account | None = None, body: Mapping[str, Any] | None = None, query: Mapping[str, str] | None = None
    ) -> Any:
        """One request; the decoded answer. Raises MatrixError for what is not 200."""
        headers = {} if account is None else {"Authorization": f"Bearer {account.access_token}"}
        async with self._http.request(method, self.url + path, headers=headers, json=body, params=query) as response:
            content = await response.json(content_type=None)
            if response.status != 200:
                about = content if isinstance(content, dict) else {}
                error = MatrixError(response.status, about.get("errcode", ""), about.get("error", ""), about.get("retry_after_ms") or 0)
                raise error
            return content

    async def create_call_room(self, creator: Account, name: str = "Call") -> str:
        """A public room in which everybody may say that they are in a call. Returns its room id."""
        levels = {"events": {CALL_MEMBER: 0, RTC_MEMBER: 0}}
        body = {"preset": "public_chat", "visibility": "private", "name": name, "power_level_content_override": levels}
        return str((await self.call("POST", f"{V3}/createRoom", creator, body))["room_id"])

    async def join(self, account: Account, room: str) -> None:
        """Join a public room."""
        await self.call("POST", f"{V3}/join/{quote(room, safe='')}", account, {})

    async def put_state(self, account: Account, room: str, type_: str, key: str, content: Json) -> None:
        """Send a state event."""
        await self.call("PUT", _state_path(room, type_, key), account, content)

    async def announce(self, account: Account, room: str) -> None:
        """Say that this device is in the call."""
        await self.put_state(account, room, CALL_MEMBER, account.member_key, membership(account))

    async def schedule_leave(self, account: Account, room: str, delay_ms: int) -> str:
        """Schedule the event that says this device has left. Returns its delay_id."""
        query = {"org.matrix.msc4140.delay": str(delay_ms)}
        return str((await self.call("PUT", _state_path(room, CALL_MEMBER, account.member_key), account, {}, query))["delay_id"])

    async def manage(self, delay_id: str, action: str) -> None:
        """Restart, send or cancel a delayed event as a client does, without a token. Waits as told where there is a rate limit."""
        await self._patiently("POST", f"{UNSTABLE}/delayed_events/{quote(delay_id, safe='')}/{action}", None, {})

    async def delayed_events(self, account: Account) -> dict[str, Json]:
        """The user's delayed events that have not ended, by delay_id. Synapse counts this as management: waits as told."""
        listed = (await self._patiently("GET", f"{UNSTABLE}/delayed_events", account))["delayed_events"]
        return {event["delay_id"]: event for event in listed}

    async def _patiently(self, method: str, path: str, account: Account | None, body: Json | None = None) -> Any:
        while True:
            try:
                return await self.call(method, path, account, body)
            except MatrixError as error:
                if error.status != 429:
                    raise
                await asyncio.sleep(max(0.1, error.retry_after_ms / 1000))

    async def members(self, account: Account, room: str) -> dict[str, Member]:
        """Everybody's call membership, by state key, as this user sees the room's state."""
        state = await self.call("GET", f"{V3}/rooms/{quote(room, safe='')}/state", account)
        found = [Member(e["state_key"], e["content"], e["origin_server_ts"] / 1000) for e in state if e["type"] == CALL_MEMBER]
        return {member.key: member for member in found}


def membership(account: Account) -> Json:
    """The content of a call membership."""
    return {
        "application": "m.call",
        "call_id": "",
        "scope": "m.room",
        "device_id": account.device_id,
        "expires": 14_400_000,
        "focus_active": {"type": "livekit", "focus_selection": "oldest_membership"},
        "foci_preferred": [],
    }


def running_since(event: Mapping[str, Any]) -> float:
    """When the countdown of a delayed event began anew, in Unix seconds: two names are in use."""
    return float(event.get("running_since", event.get("delayed_since_ts", 0))) / 1000


def _state_path(room: str, type_: str, key: str) -> str:
    return f"{V3}/rooms/{quote(room, safe='')}/state/{quote(type_, safe='')}/{quote(key, safe='')}"
