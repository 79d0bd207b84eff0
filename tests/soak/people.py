"""The people: each comes, delegates, stays, reconnects, reloads and goes, again and again, as a well-behaved client does (docs/clients.md).

They reach the daemon by HTTP and the SFU by the sandbox's operations. Their own requests to the homeserver are made on the model, so that they do not
count among the daemon's.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp
from sfu_delegate.demo.daemon import DelegateApi
from sfu_delegate.demo.sfu import KEY, SECRET
from sfu_delegate.sandbox.answer import Impossible
from sfu_delegate.sandbox.homeserver import MatrixError
from sfu_delegate.sandbox.server import SandboxHomeserver, SandboxSfu
from sfu_delegate.sandbox.sfu import Session, State
from sfu_delegate.sandbox.tokens import join_token

from tests.soak.settings import BACK_WITHIN, JOIN_TIMEOUT, HomeserverKind, Settings
from tests.soak.truth import CLIENT, Membership, Truth

MEMBER = "org.matrix.msc3401.call.member"
CONNECTED_WITHIN = 10.0  # seconds
NOTICED_WITHIN = 30.0  # seconds; the SFU takes 21 at the most


@dataclass(slots=True)
class World:
    """What all people share."""

    settings: Settings
    clock: Callable[[], float]
    sfu: SandboxSfu
    homeservers: dict[str, SandboxHomeserver]
    api: DelegateApi
    truth: Truth
    ending: asyncio.Event = field(default_factory=asyncio.Event)  # everybody leaves, and nobody comes any more
    answers: Counter[str] = field(default_factory=Counter)  # to `POST /v1/delegations`, by status; "none" for no answer
    did: Counter[str] = field(default_factory=Counter)  # what people did
    restarts: int = 0  # by the clients themselves
    last_answer_at: float = 0.0

    def rooms(self) -> list[str]:
        """The rooms that people meet in."""
        return [f"call-{number}" for number in range(self.settings.rooms)]


class Person:
    """One person, on one device, in one call at a time."""

    def __init__(self, world: World, number: int, home: HomeserverKind, random: Random) -> None:
        self._world = world
        self._home = home
        self._homeserver = world.homeservers[home.name]
        self._user = f"@person-{number}:{home.name}"
        self._random = random
        self._visits = 0
        self._identity = f"{self._user}:DEVICE"
        self._changing = asyncio.Lock()  # one thing at a time with the SFU
        self._care: asyncio.Task[None] | None = None
        self.room = ""
        self.membership: Membership | None = None
        self.called_away = asyncio.Event()

    async def live(self) -> None:
        """Come and go until all is over."""
        await self._pause(self._random.uniform(0, self._world.settings.ramp))
        try:
            while not self._world.ending.is_set():
                await self._visit()
                if not self._world.ending.is_set():
                    self.called_away.clear()
                await self._pause(self._random.uniform(1.0, 20.0))
        finally:
            self._stop_caring()

    @property
    def is_there(self) -> bool:
        """Whether the person is in a call, or believes to be."""
        return self.membership is not None and self.membership.comes and self.membership.left_at is None

    async def come_back(self) -> None:
        """The SFU was away and is back: connect anew, as the client's own retries would."""
        await asyncio.sleep(self._random.uniform(0.0, BACK_WITHIN))
        async with self._changing:
            if self.is_there and self._session() is None:
                await self._join()

    # ── one visit ──

    async def _visit(self) -> None:
        random = self._random
        self._visits += 1
        self.room = random.choice(self._world.rooms())
        if random.random() < 0.5:  # a new member id; else the device's old one
            self._identity = f"{self._user}:DEVICE:{self._visits}"
        membership = self.membership = self._schedule()
        if random.random() < 0.02:
            await self._never_come(membership)
            return
        match random.randrange(3):
            case 0:
                await self._delegate(membership)
                await self._join_alone()
            case 1:
                await self._join_alone()
                await self._delegate(membership)
            case _:
                await asyncio.gather(self._delegate(membership), self._join_alone())
        until = self._world.clock() + random.expovariate(1 / self._world.settings.stay)
        while not self._leaving() and (left := until - self._world.clock()) > 0:
            wait = random.expovariate(1 / 45.0)
            await self._pause(min(wait, left))
            if wait < left and not self._leaving():
                await self._something()
        await self._go()

    async def _never_come(self, membership: Membership) -> None:
        """Delegate, and be in the wrong building: the daemon gives up after the join timeout."""
        self._world.did["never came"] += 1
        membership.comes = False
        await self._delegate(membership)
        self._stop_caring()
        membership.left_at = self._world.clock()
        membership.departed_at = membership.left_at + JOIN_TIMEOUT
        if membership.accepted_at is None:
            self._manage(membership, "cancel")

    async def _something(self) -> None:
        what = self._random.choices(
            [self._take_over, self._reconnect, self._gap, self._reload, self._withdraw, self._read], [0.3, 0.25, 0.25, 0.1, 0.02, 0.08]
        )[0]
        self._world.did[what.__name__.strip("_").replace("_", " ")] += 1
        await what()

    async def _take_over(self) -> None:
        """The client opens a new session while the old one still stands: DUPLICATE_IDENTITY."""
        async with self._changing:
            await self._join()

    async def _reconnect(self) -> None:
        """A browser's full reconnect: goodbye, and a new session within about a second. Twice in a row, sometimes."""
        for _ in range(self._random.choice([1, 1, 1, 2])):
            async with self._changing:
                if self.membership is not None:
                    self.membership.goodbyes.append(self._world.clock())
                await self._sfu("leave", self.room, self._identity)
                await asyncio.sleep(self._random.uniform(0.05, 1.2))
                await self._join()

    async def _gap(self) -> None:
        """The network is away for some seconds, and the SFU does not notice."""
        async with self._changing:
            if not await self._sfu("vanish", self.room, self._identity):
                return
            if self.membership is not None:
                self.membership.gaps.append(self._world.clock())
            await self._pause(self._random.uniform(2.0, 15.0))
            if not await self._sfu("resume", self.room, self._identity):
                await self._join()

    async def _reload(self) -> None:
        """The page is loaded anew: goodbye, a new event, a new delegation, a new session. The old page's own requests get lost."""
        old = self.membership
        async with self._changing:
            await self._sfu("leave", self.room, self._identity)
            if old is not None:
                old.left_at = old.departed_at = self._world.clock()
        self._stop_caring()
        if old is not None and (old.accepted_at is None or old.withdrawn_at is not None):
            self._manage(old, "cancel")
        await asyncio.sleep(self._random.uniform(0.3, 4.0))
        new = self.membership = self._schedule()
        if old is not None and old.departed_at is not None:
            new.goodbyes.append(old.departed_at)  # it may be heard of, and checked, under the new delegation
        await asyncio.gather(self._delegate(new), self._join_alone())
        if old is not None and new.confirmed_at is not None:
            old.replaced_at = new.confirmed_at

    async def _withdraw(self) -> None:
        """Go on without the daemon."""
        membership = self.membership
        if membership is None or not membership.delegation or membership.withdrawn_at is not None:
            return
        self._manage(membership, "restart")
        self._take_care(membership)
        try:
            status, _ = await self._world.api.withdraw(membership.delegation, membership.management_token)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            status = 200  # perhaps it was withdrawn: the client has to act as if it was
        if status == 200:
            membership.withdrawn_at = self._world.clock()
        else:
            self._stop_caring()

    async def _read(self) -> None:
        """Ask what the daemon knows."""
        membership = self.membership
        if membership is not None and membership.delegation:
            try:
                status, _ = await self._world.api.show(membership.delegation, membership.management_token)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
                return
            self._world.did[f"read: {status}"] += 1

    async def _go(self) -> None:
        membership = self.membership
        if membership is None:
            return
        how = self._random.choices(["hang up", "close the tab", "vanish", "be removed"], [0.4, 0.3, 0.2, 0.1])[0]
        if self._world.ending.is_set() and how == "vanish":
            how = "close the tab"
        self._world.did[how] += 1
        async with self._changing:
            self._stop_caring()
            membership.left_at = self._world.clock()
            # What the daemon never acknowledged, or gave back, is the client's own to end.
            own = membership.accepted_at is None or membership.withdrawn_at is not None
            if own or (how == "hang up" and self._random.random() < 0.85):
                self._manage(membership, "send")
            if how == "vanish":
                await self._sfu("vanish", self.room, self._identity)
                await self._noticed()
            elif how == "be removed":
                await self._sfu("remove", self.room, self._identity)
            else:
                await self._sfu("leave", self.room, self._identity)
            membership.departed_at = self._world.clock()
            self.membership = None

    async def _noticed(self) -> None:
        until = self._world.clock() + NOTICED_WITHIN
        while self._session() is not None and self._world.clock() < until:  # noqa: ASYNC110 - the model has no event for it
            await asyncio.sleep(0.2)

    # ── the SFU ──

    async def _join_alone(self) -> None:
        async with self._changing:
            await self._join()

    async def _join(self) -> None:
        """Connect, as often as it takes while the SFU is away."""
        while True:
            token = join_token(KEY, SECRET, self._world.clock(), self.room, self._identity)
            if await self._sfu("join_with_token", token) and await self._connected():
                return
            await asyncio.sleep(self._random.uniform(0.5, 3.0))

    async def _connected(self) -> bool:
        """Whether media comes up: a client does nothing else before. False where the SFU went away meanwhile."""
        until = self._world.clock() + CONNECTED_WITHIN
        while (session := self._session()) is not None and self._world.clock() < until:
            if session.state is State.ACTIVE:
                return True
            await asyncio.sleep(0.02)
        return False

    async def _sfu(self, operation: str, *args: Any) -> Any:
        """An operation of the SFU; None or False where it was not possible, as while the SFU is away."""
        try:
            result = await self._world.sfu.call(operation, *args)
        except Impossible:
            return None
        return True if result is None else result

    def _session(self) -> Session | None:
        room = self._world.sfu.model.rooms.get(self.room)
        return None if room is None else room.sessions.get(self._identity)

    # ── the homeserver, and the delegation ──

    def _schedule(self) -> Membership:
        delay = self._random.choice(self._home.delays)
        now = self._world.clock()
        content = {"left": True}
        room = f"!{self.room}:{self._home.name}"
        delay_id = self._homeserver.model.schedule(self._user, room, MEMBER, self._identity, int(delay * 1000), content, now)
        self._homeserver.nudge()
        membership = Membership(self._home.name, self.room, self._identity, self._homeserver.model.events[delay_id])
        self._world.truth.add(membership)
        self._take_care(membership)
        return membership

    def _manage(self, membership: Membership, action: str) -> None:
        """A request of the client's own; that the event has ended already is no news."""
        try:
            self._homeserver.model.manage(membership.event.delay_id, action, self._world.clock(), CLIENT)
        except MatrixError:
            return
        self._homeserver.nudge()
        if action == "restart":
            self._world.restarts += 1

    def _take_care(self, membership: Membership) -> None:
        """As without a delegate: restart it oneself."""
        self._stop_caring()
        self._care = asyncio.create_task(self._care_for(membership))

    async def _care_for(self, membership: Membership) -> None:
        while True:
            await asyncio.sleep(membership.event.delay / 4)
            self._manage(membership, "restart")

    def _stop_caring(self) -> None:
        if self._care is not None:
            self._care.cancel()
            self._care = None

    async def _delegate(self, membership: Membership) -> None:
        """Hand the event over, until the daemon has confirmed it, refuses it, or the call is over."""
        world = self._world
        while True:
            token = join_token(KEY, SECRET, world.clock(), membership.room, membership.identity)
            delay_ms = round(membership.event.delay * 1000)
            try:
                status, body = await world.api.delegate(token, membership.homeserver, membership.event.delay_id, delay_ms)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
                status, body = 0, {}
            now = world.last_answer_at = world.clock()
            world.answers[str(status or "none")] += 1
            if status in (200, 201):
                membership.accepted_at = membership.accepted_at or now
                membership.delegation = body["id"]
                membership.management_token = body.get("management_token", membership.management_token)
                if body["verified"]:
                    membership.confirmed_at = now
                    self._stop_caring()
                    return
                world.answers["unverified"] += 1
            elif status not in (0, 429, 503):
                return  # refused: the client goes on without
            if self._leaving():
                return
            await self._pause(self._random.uniform(1.0, 4.0))

    def _leaving(self) -> bool:
        return self._world.ending.is_set() or self.called_away.is_set()

    async def _pause(self, seconds: float) -> None:
        """Wait, unless it is time to go."""
        try:
            async with asyncio.timeout(seconds):
                await self.called_away.wait()
        except TimeoutError:
            return
