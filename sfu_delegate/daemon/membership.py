"""Who is not in the Matrix room any more is removed from the call (`membership.enforce`).

An access token cannot be revoked. So everybody to whom one was given is remembered until no token of it is good any more, and the homeserver is asked
whether the user is in the room: when it joins the call, and in between at a slow interval. What it does not answer, or not properly, is no reason to
remove anybody; its no has to be given twice.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from math import inf
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

LEASE: Final = 120.0  # seconds that a check may take
# Seconds that the tokens are good which LiveKit gives to those who are in a room, for coming back; and a check may come so much later than planned.
RENEWED: Final = 600.0 + LEEWAY + LEASE
AT_A_TIME: Final = 16  # questions to one homeserver
PLACE_WITHIN: Final = 3.0  # seconds until one of its places has to be free: where it hangs, the others' users do not wait for it
ROUNDS: Final = 8  # that are under way at the same time
BATCH: Final = 64  # that are claimed for one
CONFIRMED_AFTER: Final = 2.0  # seconds between a homeserver's no and the question whether that is so
AGAIN: Final = 10.0  # seconds until it is tried again, where something did not answer
TOGETHER: Final = 1.0  # seconds: what is due within that is checked in one round, if nobody waits for it
LONGEST_PAUSE: Final = 30.0  # seconds
KEPT_WITHIN: Final = 5.0  # seconds until somebody who is given a token is told that it cannot be kept
JOINED_MOST: Final = 10_000  # that wait to be checked; those beyond are checked at the interval
NEW_MOST: Final = 10_000  # that wait to be kept
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
        self._rounds: set[asyncio.Task[None]] = set()
        self._places: dict[str, asyncio.Semaphore] = {}  # by homeserver
        self._watched_at = -inf  # webhooks of those who join are heard since before: those that came while nobody listened are lost
        self._reconsider = False
        self._seldom = Seldom()

    # ── who is given a token ──

    async def given(self, sfu: str, room: str, identity: str, homeserver: str, user: str, room_id: str) -> None:
        """See `api.services.Admissions`."""
        terms = self._terms()
        if not terms.enforce:
            return
        if len(self._new) >= NEW_MOST:
            raise Unavailable("The database does not keep up.", RETRY_AFTER)
        now = self._clock()
        admission = Admission(sfu, room, identity, homeserver, user, room_id, now + PARTICIPANT_TTL + RENEWED, now + terms.interval)
        kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._new.append((admission, kept))
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep())
        try:
            async with asyncio.timeout(KEPT_WITHIN):
                await kept
        except TimeoutError:
            raise Unavailable("The database does not answer.", RETRY_AFTER) from None

    async def _keep(self) -> None:
        """One transaction for all that come while the last one is under way."""
        while self._new:
            batch, self._new = self._new, []
            admissions = list({admission[:3]: admission for admission, _ in reversed(batch)}.values())
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
        self._reconsider = True
        self._nudged.set()

    # ── whether they belong there ──

    async def run(self) -> None:
        """Check those that are due, until it is cancelled."""
        try:
            while True:
                pause = await self._begin_round()
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._nudged.wait()
        finally:
            rounds = list(self._rounds)
            for task in rounds:
                task.cancel()
            await asyncio.gather(*rounds, return_exceptions=True)

    async def _begin_round(self) -> float:
        """Begin to check those that are due now; seconds until the next ones are."""
        self._nudged.clear()
        if not self._terms().enforce:
            self._joined.clear()
            self._watched_at = -inf
            return LONGEST_PAUSE
        if len(self._rounds) >= ROUNDS:  # the end of each is a nudge
            return LONGEST_PAUSE
        now = self._clock()
        try:
            away = now - self._watched_at > max(LEASE, 2 * LONGEST_PAUSE)
            all_until = now + RENEWED if away else now if self._reconsider else None
            claimed = await self._claimed(now, all_until)
            self._watched_at = now
            if not claimed:
                at = await self._in_store(lambda store: store.next_admission())
                if self._rounds:  # when theirs are due again is seen when they have ended
                    return TOGETHER
                longest = min(LONGEST_PAUSE, self._terms().interval)  # so that nobody who is given a token meanwhile is due before
                return longest if at is None else min(max(TOGETHER, at - self._clock()), longest)
        except StoreUnavailable:
            return AGAIN  # the engine tells of it
        except Exception as error:  # a defect of ours must not stop the daemon
            self._failed(error)
            return AGAIN
        task = asyncio.create_task(self._round(claimed))
        self._rounds.add(task)
        task.add_done_callback(self._round_ended)
        return 0.0 if len(claimed) >= BATCH // 2 else TOGETHER

    def _round_ended(self, task: asyncio.Task[None]) -> None:
        if len(self._rounds) >= ROUNDS:
            self._nudged.set()
        self._rounds.discard(task)

    async def _claimed(self, now: float, all_until: float | None) -> list[Admission]:
        """Those who have joined first, but not only these. They have been given a newer token by the SFU. With `all_until` everybody is due, and
        good until then at least.
        """
        joined = list(self._joined)[: BATCH // 2]

        def claim(store: Store) -> list[Admission]:
            if all_until is not None:
                store.ask_admissions(now, all_until)
            here = store.admissions_of(joined, now + RENEWED, now + LEASE) if joined else []
            return here + store.admissions_due(now + TOGETHER, BATCH - len(here), now + LEASE)

        self._reconsider = False
        try:
            found: list[Admission] = await self._in_store(claim)
        except BaseException:
            self._reconsider = self._reconsider or all_until is not None
            raise
        for participant in joined:
            self._joined.pop(participant, None)
        if self._joined:
            self._nudged.set()
        return found

    async def _round(self, claimed: Sequence[Admission]) -> None:
        rooms = _Rooms(self._listed)
        try:
            checked = await asyncio.gather(*(self._checked(admission, rooms) for admission in claimed))
        finally:
            rooms.stop()
        over = [admission for admission, settled in zip(claimed, checked, strict=True) if settled is None]
        going_on = [settled for settled in checked if settled is not None]
        try:
            await self._in_store(lambda store: store.settle_admissions(going_on, over))
        except StoreUnavailable:
            pass  # they come again when their lease is over
        except Exception as error:
            self._failed(error)

    async def _checked(self, admission: Admission, rooms: "_Rooms") -> Admission | None:
        """When to check again, and until when; None: no token of it is good any more."""
        terms = self._terms()
        soon = min(AGAIN, terms.interval) * (0.75 + self._random.random() / 2)
        wait = terms.interval * (0.9 + self._random.random() / 5)
        removed = False
        try:
            removed = await self._check(admission)
        except CannotTell as cannot:  # it is looked after for as long as it can come back: perhaps somebody mends that
            self._tell(admission, str(cannot))
        except (CannotAsk, DiscoveryFailed, TimeoutError) as error:
            self._tell(admission, str(error) or "it does not answer in time")
            wait = soon
        except SfuUnavailable as error:
            self._tell(admission, error.sentence, of_sfu=True)
            wait = soon
        except Exception as error:  # a defect of ours must not hold up the others
            self._failed(error)
            wait = soon
        now = self._clock()
        try:
            until = now + RENEWED if removed else await self._good_until(admission, now, wait, rooms)
        except Exception as error:  # nobody could look whether it is in the call
            if isinstance(error, SfuUnavailable):
                self._tell(admission, error.sentence, of_sfu=True)
            else:
                self._failed(error)
            until = now + wait + RENEWED
        until = max(until, admission.until)
        return None if now >= until else admission._replace(due=now + wait, until=until)

    async def _good_until(self, admission: Admission, now: float, wait: float, rooms: "_Rooms") -> float:
        """Until when a token of it may be good: whoever is in the call after its own has expired has newer ones from the SFU, of which the last may
        come just before the next check. Raises SfuUnavailable.
        """
        if now + wait < admission.until - RENEWED:
            return admission.until
        connected = admission.identity in await rooms.of(admission.sfu, admission.room)
        return now + wait + RENEWED if connected else admission.until

    async def _check(self, admission: Admission) -> bool:
        """See whether the user is in the Matrix room, and if not, remove it from the call; was it there?

        Raises CannotAsk, DiscoveryFailed, TimeoutError, SfuUnavailable.
        """
        if await self._is_there(admission):
            return False
        await asyncio.sleep(CONFIRMED_AFTER)
        return not await self._is_there(admission) and await self._remove(admission)

    async def _is_there(self, admission: Admission) -> bool:
        """Is the user in the Matrix room? Raises CannotAsk, DiscoveryFailed, TimeoutError."""
        timeout = self._terms().timeout
        result = "unavailable"
        try:
            async with self._place(admission.homeserver), asyncio.timeout(timeout):
                homeserver = await self._homeservers.resolve(admission.homeserver)
                joined = await self._service.is_joined(homeserver, admission.user, admission.room_id, timeout)
            result = "joined" if joined else "not_joined"
        except CannotTell:
            result = "cannot_tell"
            raise
        finally:
            self._observer.membership(admission.homeserver, result)
        return joined

    @asynccontextmanager
    async def _place(self, homeserver: str) -> AsyncIterator[None]:
        """One of the homeserver's. Raises CannotAsk where none becomes free."""
        places = self._places.get(homeserver)
        if places is None:
            places = self._places[homeserver] = asyncio.Semaphore(AT_A_TIME)
        try:
            async with asyncio.timeout(PLACE_WITHIN):
                await places.acquire()
        except TimeoutError:
            raise CannotAsk("it takes too long to answer others") from None
        try:
            yield
        finally:
            places.release()

    async def _remove(self, admission: Admission) -> bool:
        """Was it there? Raises SfuUnavailable."""
        terms = self._terms()  # of now
        sfu = terms.sfus.get(admission.sfu) if terms.enforce else None
        if sfu is None or not await self._room_service.remove(sfu.address, admission.room, admission.identity, sfu.timeout):
            return False
        self._observer.removed(admission.sfu)
        log.info(
            "participant_removed",
            sfu=admission.sfu,
            room=admission.room,
            identity=admission.identity,
            homeserver=admission.homeserver,
            reason="its user is not in the Matrix room",
        )
        return True

    async def _listed(self, sfu: str, room: str) -> frozenset[str]:
        there = self._terms().sfus.get(sfu)
        if there is None:
            return frozenset()
        return frozenset(listed.identity for listed in await self._room_service.look(there.address, room, there.timeout))

    def _failed(self, error: Exception) -> None:
        if times := self._seldom.times("failed"):
            log.error("membership_check_failed", error=type(error).__name__, at=frames(error), times=times)

    def _tell(self, admission: Admission, problem: str, *, of_sfu: bool = False) -> None:
        if times := self._seldom.times(f"{of_sfu} {admission.sfu} {admission.homeserver}"):
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

    def stop(self) -> None:
        """Nobody waits for them any more."""
        for look in self._looks.values():
            look.cancel()
            look.add_done_callback(_no_matter)


def _no_matter(look: asyncio.Task[frozenset[str]]) -> None:
    if not look.cancelled():
        look.exception()  # asked for, so that asyncio does not complain
