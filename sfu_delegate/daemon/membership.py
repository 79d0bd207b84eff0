"""Who is not in the Matrix room any more is removed from the call (`membership.enforce`).

An access token cannot be revoked. So everybody to whom one was given is remembered until no token of it is good any more, and the homeserver is asked
whether the user is in the room: when it joins the call, and in between at a slow interval. What it does not answer, or not properly, is no reason to
remove anybody; its no has to be given twice.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Protocol, TypeVar

from sfu_delegate.api.port import Unavailable
from sfu_delegate.daemon.actions import Sfu
from sfu_delegate.delegation.model import Seen
from sfu_delegate.livekit.room_service import RoomService, SfuUnavailable
from sfu_delegate.livekit.tokens import LEEWAY, PARTICIPANT_TTL
from sfu_delegate.matrix.discovery import DiscoveryFailed, Homeservers
from sfu_delegate.matrix.service import ApplicationService, CannotAsk, CannotTell
from sfu_delegate.observe.logs import Seldom, frames, get_logger
from sfu_delegate.store.base import Admission, Participant, Store, StoreUnavailable

RENEWED: Final = 600.0  # seconds that the tokens are good which LiveKit gives to those who are in a room, for coming back
AT_A_TIME: Final = 16  # that are checked
BATCH: Final = 64  # that are claimed together
CONFIRMED_AFTER: Final = 2.0  # seconds between a homeserver's no and the question whether that is so
AGAIN: Final = 10.0  # seconds until it is tried again, where something did not answer
LEASE: Final = 120.0  # seconds that a check may take
LONGEST_PAUSE: Final = 30.0  # seconds
JOINED_MOST: Final = 10_000  # that wait to be checked; those beyond are checked at the interval
RETRY_AFTER: Final = 5.0

log = get_logger(__name__)
T = TypeVar("T")


class Observer(Protocol):
    """Who counts what happens."""

    def membership(self, homeserver: str, result: str) -> None:
        """A homeserver was asked whether somebody is in a room."""

    def removed(self, sfu: str) -> None:
        """Somebody was removed from a call."""


@dataclass(slots=True)
class Terms:
    """What the configuration says, and where the SFUs are. Changes when it is read again."""

    enforce: bool
    interval: float  # seconds
    timeout: float  # seconds for a question to a homeserver
    sfus: Mapping[str, Sfu]


class Membership:
    """Remembers who was given access tokens, and checks them. See `api.services.Admissions`.

    `in_store` runs something with the store, in its thread.
    """

    def __init__(
        self,
        terms: Callable[[], Terms],
        in_store: Callable[[Callable[[Store], Any]], Awaitable[Any]],
        homeservers: Homeservers,
        service: ApplicationService,
        room_service: RoomService,
        clock: Callable[[], float],
        observer: Observer,
        random: Random,
    ) -> None:
        self._terms = terms
        self._in_store = in_store
        self._homeservers = homeservers
        self._service = service
        self._room_service = room_service
        self._clock = clock
        self._observer = observer
        self._random = random
        self._new: list[tuple[Admission, asyncio.Future[None]]] = []
        self._keeping: asyncio.Task[None] | None = None
        self._joined: dict[Participant, None] = {}
        self._nudged = asyncio.Event()
        self._asked_all = False  # since the start: webhooks that came while nobody listened are lost
        self._seldom = Seldom()

    # ── who is given a token ──

    async def given(self, sfu: str, room: str, identity: str, homeserver: str, user: str, room_id: str) -> None:
        """See `api.services.Admissions`."""
        terms = self._terms()
        if not terms.enforce:
            return
        now = self._clock()
        admission = Admission(sfu, room, identity, homeserver, user, room_id, now + PARTICIPANT_TTL + LEEWAY + RENEWED, now + terms.interval)
        kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._new.append((admission, kept))
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep())
        await kept

    async def _keep(self) -> None:
        """One transaction for all that come while the last one is under way."""
        while self._new:
            batch, self._new = self._new, []
            admissions = list({admission[:3]: admission for admission, _ in batch}.values())
            error: Exception | None = None
            try:
                await self._in_store(lambda store, admissions=admissions: store.admit(admissions))  # type: ignore[misc]
            except Exception as raised:
                error = Unavailable(str(raised), RETRY_AFTER) if isinstance(raised, StoreUnavailable) else raised
            for _, kept in batch:
                if kept.done():
                    continue
                if error is None:
                    kept.set_result(None)
                else:
                    kept.set_exception(error)

    def joined(self, seen: Seen) -> None:
        """Somebody has joined a call: perhaps with a token from before."""
        if self._terms().enforce and len(self._joined) < JOINED_MOST:
            self._joined[seen.sfu, seen.room, seen.identity] = None
            self._nudged.set()

    def reconsider(self) -> None:
        """The configuration has changed."""
        self._asked_all = False
        self._nudged.set()

    # ── whether they belong there ──

    async def run(self) -> None:
        """Check those that are due, until it is cancelled."""
        while True:
            try:
                pause = await self._round()
            except StoreUnavailable:
                pause = AGAIN  # the engine tells of it
            except Exception as error:  # a defect of ours must not stop the daemon
                log.error("membership_check_failed", error=type(error).__name__, at=frames(error))
                pause = AGAIN
            try:
                async with asyncio.timeout(pause):
                    await self._nudged.wait()
            except TimeoutError:
                continue

    async def _round(self) -> float:
        """Check those that are due now; seconds until the next ones are."""
        self._nudged.clear()
        if not self._terms().enforce:
            self._joined.clear()
            return LONGEST_PAUSE
        now = self._clock()
        if not self._asked_all:
            await self._in_store(lambda store: store.ask_admissions(now))
            self._asked_all = True
        claimed = await self._claimed(now)
        if not claimed:
            at = await self._in_store(lambda store: store.next_admission())
            return LONGEST_PAUSE if at is None else min(max(0.0, at - self._clock()), LONGEST_PAUSE)
        rooms = _Rooms(self._listed)
        places = asyncio.Semaphore(AT_A_TIME)
        checked = await asyncio.gather(*(self._checked(admission, places, rooms) for admission in claimed))
        over = [admission for admission, settled in zip(claimed, checked, strict=True) if settled is None]
        going_on = [settled for settled in checked if settled is not None]
        await self._in_store(lambda store: store.settle_admissions(going_on, over))
        return 0.0

    async def _claimed(self, now: float) -> list[Admission]:
        joined = list(self._joined)[:BATCH]

        def claim(store: Store) -> list[Admission]:
            here = store.admissions_of(joined, now + LEASE) if joined else []
            return here + store.admissions_due(now, BATCH - len(here), now + LEASE)

        found: list[Admission] = await self._in_store(claim)
        for participant in joined:
            self._joined.pop(participant, None)
        if self._joined:
            self._nudged.set()
        return found

    async def _checked(self, admission: Admission, places: asyncio.Semaphore, rooms: "_Rooms") -> Admission | None:
        """When to check again; None: no token of it is good any more."""
        terms = self._terms()
        soon = min(AGAIN, terms.interval) * (0.75 + self._random.random() / 2)
        try:
            await self._check(admission, places, terms)
        except CannotTell as cannot:  # it is looked after for as long as it can come back: perhaps somebody mends that
            self._tell(admission, str(cannot))
        except (CannotAsk, DiscoveryFailed, SfuUnavailable, TimeoutError) as error:
            self._tell(admission, str(error) or "it does not answer in time")
            return admission._replace(due=self._clock() + soon)
        except Exception as error:  # a defect of ours must not hold up the others
            log.error("membership_check_failed", error=type(error).__name__, at=frames(error))
            return admission._replace(due=self._clock() + soon)
        now = self._clock()
        due = now + terms.interval * (0.9 + self._random.random() / 5)
        if now < admission.until:
            return admission._replace(due=due)
        # Its token is over, and whoever is in the call all the while has newer ones from the SFU.
        try:
            connected = admission.identity in await rooms.of(admission.sfu, admission.room)
        except SfuUnavailable:
            return admission._replace(due=now + soon)
        return admission._replace(due=due, until=due + RENEWED) if connected else None

    async def _check(self, admission: Admission, places: asyncio.Semaphore, terms: Terms) -> None:
        """See whether the user is in the Matrix room, and if not, remove it. Raises CannotAsk, DiscoveryFailed, TimeoutError, SfuUnavailable."""
        async with places:
            if await self._is_there(admission):
                return
        await asyncio.sleep(CONFIRMED_AFTER)
        async with places:
            if not await self._is_there(admission):
                await self._remove(admission, terms)

    async def _is_there(self, admission: Admission) -> bool:
        """Is the user in the Matrix room? Raises CannotAsk, DiscoveryFailed, TimeoutError."""
        timeout = self._terms().timeout
        result = "unavailable"
        try:
            async with asyncio.timeout(timeout):
                homeserver = await self._homeservers.resolve(admission.homeserver)
                joined = await self._service.is_joined(homeserver, admission.user, admission.room_id, timeout)
            result = "joined" if joined else "not_joined"
        except CannotTell:
            result = "cannot_tell"
            raise
        finally:
            self._observer.membership(admission.homeserver, result)
        return joined

    async def _remove(self, admission: Admission, terms: Terms) -> None:
        """Raises SfuUnavailable."""
        sfu = terms.sfus.get(admission.sfu)
        if sfu is None:
            return
        if await self._room_service.remove(sfu.address, admission.room, admission.identity, sfu.timeout):
            self._observer.removed(admission.sfu)
            log.info(
                "participant_removed",
                sfu=admission.sfu,
                room=admission.room,
                identity=admission.identity,
                homeserver=admission.homeserver,
                reason="its user is not in the Matrix room",
            )

    async def _listed(self, sfu: str, room: str) -> frozenset[str]:
        there = self._terms().sfus.get(sfu)
        if there is None:
            return frozenset()
        return frozenset(listed.identity for listed in await self._room_service.look(there.address, room, there.timeout))

    def _tell(self, admission: Admission, problem: str) -> None:
        if times := self._seldom.times(f"{admission.sfu} {admission.homeserver}"):
            log.warning("membership_not_checked", homeserver=admission.homeserver, sfu=admission.sfu, problem=problem, times=times)


class _Rooms:
    """Who is in the rooms that one round asks for, each asked for once."""

    def __init__(self, look: Callable[[str, str], Coroutine[Any, Any, frozenset[str]]]) -> None:
        self._look = look
        self._looks: dict[tuple[str, str], asyncio.Task[frozenset[str]]] = {}

    async def of(self, sfu: str, room: str) -> frozenset[str]:
        """Raises SfuUnavailable."""
        look = self._looks.get((sfu, room))
        if look is None:
            look = self._looks[sfu, room] = asyncio.create_task(self._look(sfu, room))
        return await asyncio.shield(look)
