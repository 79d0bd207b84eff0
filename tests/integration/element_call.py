"""A model of Element Call 0.26 in a browser, as the service beside the SFU sees it: what it asks, in which order, and how it leaves.

It works against a `Site` with requests that a browser would let through (CORS is checked), in both of its modes. A step does what the client does
and returns; the pauses between the steps, and their order where the client's own is up to chance, are the test's.

Everybody's membership is watched: a `Call` sees each state event in the moment in which the homeserver has it, and knows who is in the call then.
"""

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sfu_delegate.sandbox import tokens
from sfu_delegate.sandbox.homeserver import UNSTABLE, V3, DelayedEvent, End, NewState
from sfu_delegate.sandbox.sfu import State

from tests.integration.daemon import MATRIX_ROOM, MEMBER, SERVER, SFU_KEY, SFU_SECRET, Answer, Site, merged, open_site, until

Json = dict[str, Any]

SLOT = "m.call#ROOM"
DELAY_MS = 3_600_000  # of its leave event, where the service takes delegations
ORIGIN = "https://call.example.org"
PROBED = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/delegate_delayed_leave"

PATIENT: Mapping[str, Any] = {
    "departures": {reason: {"look_after": "5s"} for reason in ("CLIENT_INITIATED", "CONNECTION_TIMEOUT", "DUPLICATE_IDENTITY")},
    "presence": {"unseen_departure": "5s"},
}
"""For those who come back in time: however noisy the machine, they are faster than the look at their departure."""


class Mode(StrEnum):
    """Which of its two ways the client goes."""

    COMPATIBILITY = "compatibility"  # the default: `/sfu/get`, and the plain identity
    MATRIX_2_0 = "matrix_2_0"  # `/get_token`, and the hashed one


class Blocked(Exception):
    """The browser does not let the page read the answer, or does not even send the request: its CORS headers are missing."""


def hashed(*parts: str) -> str:
    """The derived name of a list of strings."""
    text = json.dumps(parts, separators=(",", ":"), ensure_ascii=False)
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


ROOM = hashed(MATRIX_ROOM, SLOT)
"""LiveKit's name of the room in which everybody here meets."""


@dataclass
class Call:
    """Those who meet in one room, and what became of their memberships. Made by `open_call`."""

    site: Site
    members: list["ElementCall"] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # what removed the membership of somebody who was in the call
    webhooks: list[Json] = field(default_factory=list)  # as the SFU made them, also those that are kept back

    def member(self, name: str = "alice", mode: Mode = Mode.COMPATIBILITY, **more: Any) -> "ElementCall":
        """Somebody opens the page."""
        member = ElementCall(self, name, mode, **more)
        self.members.append(member)
        return member

    def on_state(self, new: NewState) -> None:
        """A state event became the room's current one."""
        if new.type != MEMBER or new.event.content:
            return
        for member in self.members:
            if member.state_key == new.state_key and member.here:
                by = self.site.homeserver.model.events[new.event.delay_id].ended_by if new.event.delay_id else new.event.sender
                self.dropped.append(f"{member.name} by {by}")

    # ── the SFU's webhooks ──

    @asynccontextmanager
    async def kept_back(self) -> AsyncIterator[list[Json]]:
        """The SFU's webhooks from now on do not go out: they gather in the list, and are lost unless they are handed to `deliver`.

        Those that were made before are delivered first.
        """
        await self.delivered()
        faults = self.site.sfu.model.delivery_faults
        faults.drop = 1.0
        before = len(self.webhooks)
        kept: list[Json] = []
        try:
            yield kept
        finally:
            faults.drop = 0.0
            kept += self.webhooks[before:]

    async def deliver(self, webhook: Json) -> None:
        """One webhook arrives, and is answered."""
        body = json.dumps(webhook, separators=(",", ":")).encode()
        authorization = tokens.sign(body, SFU_KEY, SFU_SECRET, time.time())
        headers = {"Authorization": authorization, "Content-Type": "application/webhook+json"}
        async with self.site.http.post(f"{self.site.url}/sfu_webhook", data=body, headers=headers) as response:
            assert response.status == 200, await response.text()

    async def delivered(self) -> None:
        """Wait until no webhook is under way."""
        await until(lambda: not self.site.sfu.model.backlog() and not self.site.sfu.deliveries, "all webhooks are delivered")

    # ── what is true, and what the daemon believes ──

    async def looked(self, times: int = 2) -> None:
        """Wait for so many more looks at the room, after all webhooks that are under way."""
        await self.delivered()
        seen = await self.site.count("sfu_delegate_looks_total")

        async def so() -> bool:
            return await self.site.count("sfu_delegate_looks_total") >= seen + times

        await until(so, "looks at the room")

    async def believed(self, presence: str, count: int, state: str = "live") -> None:
        """Wait until the daemon has so many delayed events in this state whose participant is in this presence, and none in another."""

        async def so() -> bool:
            assert not self.dropped
            every = await self.site.count("sfu_delegate_delegated_events", state=state)
            return every == count == await self.site.count("sfu_delegate_delegated_events", state=state, presence=presence)

        await until(so, f"{count} events whose participant is {presence}")

    async def outcomes(self) -> dict[str, int]:
        """How delegations have ended, by outcome."""
        names = ("sent", "cancelled", "already_ended", "ran_out", "lost", "rejected", "replaced", "withdrawn", "unknown")
        counts = {name: int(await self.site.count("sfu_delegate_delegated_events_ended_total", outcome=name)) for name in names}
        return {name: count for name, count in counts.items() if count}

    async def steady(self) -> None:
        """Whoever is in the call stays in it: the daemon knows it, looks confirm it, and no delayed event of the past is left."""
        here = [member for member in self.members if member.here]
        await self.believed("connected", len(here))
        await self.looked()
        await self.believed("connected", len(here))
        for member in self.members:
            await member.only_current_left()
            assert member.announced == member.here, f"the membership of {member.name}"

    def trouble(self) -> list[str]:
        """The lines of the log that an operator would worry about."""
        return [line["event"] for line in self.site.lines() if line["level"] not in ("debug", "info")]


@asynccontextmanager
async def open_call(directory: Path, **changes: Any) -> AsyncIterator[Call]:
    """A site whose SFU sends its webhooks to `/sfu_webhook`, and the call in it. At the end nobody may have been dropped from it."""
    often = {"presence": {"interval": "200ms", "interval_most": "200ms"}}
    async with open_site(directory, **merged(often, changes)) as site:
        call = Call(site)
        site.sfu.model.urls = [f"{site.url}/sfu_webhook"]
        site.sfu.model.on_webhook = call.webhooks.append
        site.homeserver.model.on_state = call.on_state
        yield call
        assert not call.dropped
        assert await site.count("sfu_delegate_events_lost_while_connected_total") == 0
        assert all(event.end is not End.RAN_OUT for event in site.homeserver.model.events.values())


class ElementCall:
    """One user's page. `service` is the `livekit_service_url`; `member` the id of the membership, which the client keeps over a reload."""

    def __init__(self, call: Call, name: str, mode: Mode, *, service: str = "", device: str = "PHONE", member: str = "") -> None:
        self.call = call
        self.site = call.site
        self.name = name
        self.mode = mode
        self.service = service or call.site.url
        self.user = f"@{name}:{SERVER}"
        self.device = device
        self.member = member or f"{self.user}:{device}"
        self.access_token = call.site.homeserver.model.register(self.user)
        call.site.secrets.add(self.access_token)
        self.supported = False  # the service takes delegations
        self.here = False  # the user is in the call and means to be: from the announcement to the goodbye
        self.identity = ""  # under which it is connected, or was last
        self.sid = ""
        self.jwt = ""  # it joins with
        self.delay_ids: list[str] = []  # of all its leave events; the last one is the current one
        self.delegated = False  # the current one
        self._preflown: set[str] = set()

    # ── names ──

    @property
    def state_key(self) -> str:
        """Of its membership. In the newer mode another member id is another membership."""
        return f"_{self.user}_{self.device}_m.call" if self.mode is Mode.COMPATIBILITY else f"_{self.member}"

    @property
    def plain_identity(self) -> str:
        """The legacy form."""
        return f"{self.user}:{self.device}"

    @property
    def hashed_identity(self) -> str:
        """The newer form."""
        return hashed(self.user, self.device, self.member)

    # ── requests ──

    async def matrix(self, method: str, path: str, body: Json, **query: str) -> Answer:
        """One request to the homeserver."""
        url, headers = self.site.homeserver.url + path, {"Authorization": f"Bearer {self.access_token}"}
        async with self.site.http.request(method, url, json=body, headers=headers, params=query) as response:
            return Answer(response.status, dict(response.headers), await response.text())

    async def ask(self, path: str, body: Json | None) -> Answer:
        """One request to the service, as a page of another origin makes it; no body at all for None. Raises Blocked."""
        url, origin = self.service + path, {"Origin": ORIGIN}
        if body is not None and path not in self._preflown:
            wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
            async with self.site.http.options(url, headers=origin | wish) as response:
                allowed = {name.strip().lower() for name in response.headers.get("Access-Control-Allow-Headers", "").split(",")}
                if not response.ok or response.headers.get("Access-Control-Allow-Origin") not in ("*", ORIGIN) or "content-type" not in allowed:
                    raise Blocked
            self._preflown.add(path)
        async with self.site.http.post(url, json=body, headers=origin) as response:
            answer = Answer(response.status, dict(response.headers), await response.text())
        if answer.status >= 400:
            self.site.said.append(answer.text)
        if answer.headers.get("Access-Control-Allow-Origin") not in ("*", ORIGIN):
            raise Blocked
        return answer

    async def openid(self) -> Json:
        """A fresh OpenID token."""
        answer = await self.matrix("POST", f"{V3}user/{quote(self.user)}/openid/request_token", {})
        assert answer.status == 200, answer.text
        self.site.secrets.add(answer.body["access_token"])
        return answer.body

    async def probe(self) -> bool:
        """Does the service take delegations? Anything but 404 is a yes; what the browser blocks is a no."""
        if (await self.matrix("POST", PROBED, {})).status != 404:
            return True
        try:
            answers = [await self.ask("/delegate_delayed_leave", None) for _ in range(2)]
        except Blocked:
            return False
        return all(answer.status != 404 for answer in answers)

    async def body(self, path: str, *, delay: bool = False) -> Json:
        """What it sends to an endpoint, with its current leave event or without."""
        form: Json = {"openid_token": await self.openid()}
        if path == "/sfu/get":
            form |= {"room": MATRIX_ROOM, "device_id": self.device}
        else:
            member = {"id": self.member, "claimed_user_id": self.user, "claimed_device_id": self.device}
            form |= {"room_id": MATRIX_ROOM, "slot_id": SLOT, "member": member}
        if delay:
            form |= {"delay_id": self.delay_ids[-1], "delay_timeout": DELAY_MS, "delay_cs_api_url": self.site.homeserver.url}
        return form

    async def token(self, *, delay: bool = False, hashed_form: bool | None = None) -> str:
        """A token for the SFU, delegating its leave event if `delay`; `hashed_form` in place of the mode's own.

        `404` on the newer endpoint makes it use the legacy one, `400 M_BAD_JSON` makes it ask without the delay fields.
        """
        newer = self.mode is Mode.MATRIX_2_0 if hashed_form is None else hashed_form
        path = "/get_token" if newer else "/sfu/get"
        answer = await self.ask(path, await self.body(path, delay=delay))
        if newer and answer.status == 404:
            return await self.token(delay=delay, hashed_form=False)
        if delay and answer.status == 400 and answer.body["errcode"] == "M_BAD_JSON":
            return await self.token(hashed_form=newer)
        assert answer.status == 200, answer.text
        assert set(answer.body) == {"url", "jwt"}
        assert answer.body["url"] == self.site.sfu.url.replace("http", "ws")
        jwt = str(answer.body["jwt"])
        self.site.secrets |= {jwt, jwt.rpartition(".")[2]}
        claims = tokens.read_token(jwt, {SFU_KEY: SFU_SECRET}, time.time())
        assert claims["sub"] == (self.hashed_identity if newer else self.plain_identity)
        assert claims["video"]["room"] == ROOM
        self.delegated = self.delegated or delay
        return jwt

    # ── joining ──

    async def prepare(self) -> None:
        """Before it connects: two tokens with two OpenID tokens, the probe, and the leave event."""
        self.jwt = [await self.token() for _ in range(2)][-1]
        self.supported = await self.probe()
        assert self.supported
        await self.schedule()

    async def schedule(self) -> None:
        """A new leave event, which is the current one from now on."""
        path = f"{V3}rooms/{quote(MATRIX_ROOM)}/state/{MEMBER}/{quote(self.state_key, safe='')}"
        answer = await self.matrix("PUT", path, {}, **{"org.matrix.msc4140.delay": str(DELAY_MS)})
        assert answer.status == 200, answer.text
        self.delay_ids.append(answer.body["delay_id"])
        self.site.secrets.add(self.delay_ids[-1])
        self.delegated = False

    async def connect(self, jwt: str = "") -> None:
        """Join the SFU, and wait until media flow."""
        joined = await self.site.sfu.call("join_with_token", jwt or self.jwt)
        assert joined.room == ROOM
        self.identity, self.sid = joined.identity, joined.sid
        sessions = self.site.sfu.model.rooms[ROOM].sessions
        await until(lambda: sessions[self.identity].state is State.ACTIVE, f"{self.name} is in the call")

    async def announce(self) -> None:
        """The membership."""
        self.here = True
        await self._put_membership({"application": "m.call", "call_id": "", "device_id": self.device, "focus_active": {"type": "livekit"}})

    async def delegate(self) -> None:
        """Another token, this time with the leave event."""
        await self.token(delay=True)

    async def join(self) -> None:
        """All of it: connect, then announce and delegate in parallel."""
        await self.prepare()
        await self.connect()
        await asyncio.gather(self.announce(), self.delegate())

    async def glance(self, *, active: bool = True) -> None:
        """The first session of somebody who joins a running call, dropped again at once, if not `active` even before media flow.

        In compatibility mode it is under the hashed identity, which nobody delegates; else under that of the session that follows.
        """
        jwt = await self.token(hashed_form=True)
        identity = self.hashed_identity
        if active:
            await self.connect(jwt)
        else:
            await self.site.sfu.call("begin_join", ROOM, identity)
        await self.site.sfu.call("leave", ROOM, identity, reason="CLIENT_INITIATED")

    # ── during the call ──

    async def restart(self) -> None:
        """It goes on restarting its event; if that is gone, it schedules a new one, announces itself and delegates again."""
        answer = await self.manage("restart")
        if answer.status == 404:
            await self.schedule()
            await asyncio.gather(self.announce(), self.delegate())

    async def manage(self, action: str) -> Answer:
        """Something is done with the current leave event."""
        return await self.matrix("POST", f"{UNSTABLE}delayed_events/{self.delay_ids[-1]}/{action}", {})

    async def reconnect(self) -> None:
        """A full reconnect in which the old session is left first."""
        await self.site.sfu.call("leave", ROOM, self.identity, reason="CLIENT_INITIATED")
        await self.connect()

    async def take_over(self) -> None:
        """A full reconnect in which the new session takes the identity from the old one, which ends with DUPLICATE_IDENTITY."""
        await self.connect()

    # ── leaving ──

    async def disconnect(self) -> None:
        """From the SFU, when the user hangs up."""
        self.here = False
        await self.site.sfu.call("leave", ROOM, self.identity, reason="CLIENT_INITIATED")

    async def say_goodbye(self, action: str = "send") -> int:
        """End the leave event, and say it oneself where that was not possible, or was no `send`. Returns the homeserver's status."""
        self.here = False
        answer = await self.manage(action)
        if action != "send" or answer.status == 404:
            await self._put_membership({})
        return answer.status

    async def close_tab(self) -> None:
        """The SFU hears of it; the requests to the homeserver are lost."""
        await self.disconnect()

    async def crash(self) -> None:
        """The browser is killed: nobody hears of it until the SFU gives the session up."""
        self.here = False
        await self.site.sfu.call("vanish", ROOM, self.identity)

    # ── what became of it ──

    @property
    def event(self) -> DelayedEvent:
        """Its current leave event, as the homeserver has it."""
        return self.site.homeserver.model.events[self.delay_ids[-1]]

    @property
    def announced(self) -> bool:
        """Is it a member, for everybody in the room?"""
        held = self.site.homeserver.model.state.get(MATRIX_ROOM, {}).get((MEMBER, self.state_key))
        return held is not None and bool(held.content)

    async def ended(self, how: End, delay_id: str = "") -> None:
        """Wait until its current leave event, or an older one, has ended, in just this way."""
        event = self.site.homeserver.model.events[delay_id or self.delay_ids[-1]]
        await until(lambda: event.end is not End.PENDING, f"the event of {self.name} ends")
        assert event.end is how

    async def only_current_left(self) -> None:
        """Wait until no older leave event can fire any more; the current one can if the user is in the call, and only then."""
        events = self.site.homeserver.model.events
        current = self.delay_ids[-1:] if self.here else []
        await until(lambda: [id for id in self.delay_ids if events[id].end is End.PENDING] == current, f"the old events of {self.name} end")

    async def _put_membership(self, content: Json) -> None:
        path = f"{V3}rooms/{quote(MATRIX_ROOM)}/state/{MEMBER}/{quote(self.state_key, safe='')}"
        answer = await self.matrix("PUT", path, content)
        assert answer.status == 200, answer.text
