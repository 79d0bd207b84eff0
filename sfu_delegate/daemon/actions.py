"""Carries out what the engine claimed: requests to homeservers, and looks at SFUs. Whatever happens, the result comes back as an input."""

import asyncio
from collections.abc import Callable, Container, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from sfu_delegate.delegation.model import Action, Answered, Listed, Looked, Task, Verdict
from sfu_delegate.livekit.room_service import RoomService, SfuAddress, SfuUnavailable, Trouble
from sfu_delegate.matrix.discovery import DiscoveryFailed, Homeservers
from sfu_delegate.matrix.management import Answer, ManagementClient
from sfu_delegate.matrix.service import ApplicationService, CannotAsk, Defect, Findings, Part
from sfu_delegate.observe.logs import frames, get_logger
from sfu_delegate.sealing import CannotUnseal, Sealer

TELL_ANOTHER_CAUSE_AFTER = 60.0  # seconds
TOLD_AT_ONCE = 2  # lines about one homeserver or SFU within RECENTLY: a trouble and its end. Further changes are told when they have lasted
RECENTLY = 60.0  # seconds
LASTED = 5.0  # seconds
CHECKED_ROOM = "sfu-delegate-check"  # there need not be such a room: it is looked at to see whether the SFU answers
CHECK_SERVICE_SOON = 20.0  # seconds until an application service is checked again, where the homeserver did not answer
CHECK_SERVICE_AGAIN = 120.0  # … and where something is wrong with it
CHECK_SERVICE_ALWAYS = 600.0  # … and where all is well: a registration may get lost at the homeserver
CHECK_EVERY = 60.0  # seconds between two looks for somebody in trouble who …
CHECK_AFTER = 120.0  # … was not asked for so long, since there is nothing to do there
FORGOTTEN_AFTER = 900.0  # … or until the trouble is forgotten of one that the configuration does not name: nothing leads there any more
LEASE_MARGIN = 1.0  # seconds between the end of an action's time and the end of its lease

log = get_logger(__name__)


def answered(task: Task, answer: Answer, sent_at: float, answered_at: float | None = None) -> Answered:
    """What the engine hears of an action whose request was sent at `sent_at` (seconds), and answered so at `answered_at`."""
    return Answered(
        homeserver=task.homeserver,
        event=task.event,
        claim=task.claim,
        action=task.action,
        sent_at=sent_at,
        verdict=answer.verdict,
        retry_after=answer.retry_after,
        alone=task.token is not None or answer.of_owner,
        detail=answer.detail,
        answered_at=answered_at,
    )


class Observer(Protocol):
    """Who counts what happens."""

    def action(self, homeserver: str, action: Action, outcome: str, seconds: float) -> None:
        """A request to a homeserver came to an end."""

    def look(self, sfu: str, outcome: str, seconds: float) -> None:
        """A look at an SFU came to an end."""

    def service(self, homeserver: str, broken: Container[Part], checked: Iterable[Part]) -> None:
        """What an application service needs was checked at a homeserver."""


@dataclass(frozen=True, slots=True)
class Sfu:
    """How one SFU is asked. `timeout` in seconds."""

    address: SfuAddress
    timeout: float


@dataclass(slots=True)
class Means:
    """Everything that actions need. `sfus` and `timeout` change when the configuration is read again."""

    homeservers: Homeservers
    client: ManagementClient
    service: ApplicationService
    room_service: RoomService
    sealer: Sealer
    sfus: dict[str, Sfu]
    timeout: float  # seconds for a request to a homeserver


@dataclass(slots=True)
class _Told:
    """What the log was told of a homeserver or an SFU."""

    trouble: str = ""  # by the last line; "": it works, or there was no line yet
    at: tuple[float, ...] = ()  # when the latest lines were written, TOLD_AT_ONCE at the most
    lasting: asyncio.TimerHandle | None = None  # until a change has lasted


class Actions:
    """Each claimed action is one asyncio task, and the engine's paces bound their number."""

    def __init__(self, reach: Means, clock: Callable[[], float], hand_in: Callable[[Answered | Looked], None], observer: Observer):
        self.reach = reach
        self._clock = clock
        self._hand_in = hand_in
        self._observer = observer
        self._tasks: set[asyncio.Task[None]] = set()
        self.conditions: dict[tuple[str, str], str] = {}  # ("homeserver" | "sfu", name) → what is wrong with it, or ""; only who was asked
        self._failed_at: dict[tuple[str, str], float] = {}  # when those in trouble were asked last
        self._told: dict[tuple[str, str], _Told] = {}
        self._named: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())  # homeservers and SFUs, by the configuration
        self._checks_again = False
        self._checks: set[asyncio.Task[None]] = set()
        self._service_checks: dict[str, asyncio.Task[None]] = {}  # by homeserver
        self._defects: dict[str, Sequence[Defect]] = {}  # by homeserver: what was told

    def carry_out(self, task: Task) -> None:
        """Begin with an action."""
        job = asyncio.create_task(self._look(task) if task.action is Action.LOOK else self._manage(task))
        self._tasks.add(job)
        job.add_done_callback(self._tasks.discard)

    async def finish(self, within: float) -> int:
        """Wait for what is in flight, `within` seconds; returns how many had to be abandoned."""
        for check in (*self._checks, *self._service_checks.values()):
            check.cancel()
        pending: set[asyncio.Task[None]] = set(self._tasks)
        if pending:
            _, pending = await asyncio.wait(pending, timeout=within)
        for job in pending:
            job.cancel()
        if pending:
            await asyncio.wait(pending)
        for told in self._told.values():
            if told.lasting is not None:
                told.lasting.cancel()
        return len(pending)

    def check(self, homeservers: Iterable[str], sfus: Iterable[str]) -> None:
        """Ask each of them once, so that whoever set it up sees at once what does not work."""
        self._named = (frozenset(homeservers), frozenset(sfus))
        for check in [*map(self._check_homeserver, self._named[0]), *map(self._check_sfu, self._named[1])]:
            self._begin_check(check)
        if not self._checks_again:
            self._checks_again = True
            self._begin_check(self._check_again())

    def _begin_check(self, check: Coroutine[None, None, None]) -> None:
        job = asyncio.create_task(check)
        self._checks.add(job)
        job.add_done_callback(self._checks.discard)

    async def _check_again(self) -> None:
        """Who was in trouble when it was last asked, and has not been asked since, may work by now: nobody would ever hear of it."""
        while True:
            await asyncio.sleep(CHECK_EVERY)
            homeservers, sfus = self._named
            before = self._clock() - CHECK_AFTER
            for (kind, name), trouble in list(self.conditions.items()):
                if not trouble or self._failed_at.get((kind, name), before) > before:
                    continue
                if kind == "homeserver" and name in homeservers:
                    self._begin_check(self._check_homeserver(name, again=True))
                elif kind == "sfu" and name in sfus:
                    self._begin_check(self._check_sfu(name))
                elif kind in ("homeserver", "sfu") and self._failed_at.get((kind, name), -inf) <= self._clock() - FORGOTTEN_AFTER:
                    self._forget(kind, name)

    def _forget(self, kind: str, name: str) -> None:
        """Nobody knows how it is, and nobody needs to: a status that is degraded for it would be so until the next start."""
        del self.conditions[kind, name]
        self._failed_at.pop((kind, name), None)
        told = self._told.pop((kind, name), None)
        if told is not None and told.lasting is not None:
            told.lasting.cancel()

    def check_services(self, homeservers: Mapping[str, bool]) -> None:
        """See whether the application service is set up well at each of these, now and again and again: what is wrong is mended there, while we run.
        The value tells whether it is to pass requests on as well.
        """
        for name, task in self._service_checks.items():
            task.cancel()
            if name not in homeservers:
                self.conditions.pop(("application_service", name), None)
        self._defects.clear()  # whoever has the configuration read again wants to know
        self._service_checks = {name: asyncio.create_task(self._check_service(name, passes_on)) for name, passes_on in homeservers.items()}

    async def _check_service(self, name: str, passes_on: bool) -> None:
        while True:
            pause = CHECK_SERVICE_AGAIN
            try:
                async with asyncio.timeout(3 * self.reach.timeout):
                    homeserver = await self.reach.homeservers.resolve(name)
                    findings = await self.reach.service.check(homeserver, self.reach.timeout, passes_on=passes_on)
            except (CannotAsk, DiscoveryFailed, TimeoutError):
                pause = CHECK_SERVICE_SOON  # that the homeserver does not answer is told by itself
            except Exception as error:
                log.error("check_failed", homeserver=name, error=type(error).__name__, at=frames(error))
            else:
                self._tell_of_service(name, findings, passes_on)
                if not findings.defects:
                    pause = CHECK_SERVICE_ALWAYS
            await asyncio.sleep(pause)

    def _tell_of_service(self, name: str, findings: Findings, passes_on: bool) -> None:
        defects = findings.defects
        self.conditions["application_service", name] = "; ".join(defect.problem for defect in defects)
        self._observer.service(name, {defect.part for defect in defects}, findings.tried)
        if self._defects.get(name) == defects:
            return
        self._defects[name] = defects
        for defect in defects:
            log.warning("application_service_failed", homeserver=name, part=defect.part.value, problem=defect.problem, remedy=defect.remedy)
        if not defects:
            log.info("application_service_works", homeserver=name, passes_on=passes_on)

    async def _check_homeserver(self, name: str, *, again: bool = False) -> None:
        try:
            async with asyncio.timeout(self.reach.timeout):
                homeserver = await self.reach.homeservers.resolve(name)
                client = self.reach.client
                trouble = await (client.works if again else client.check)(homeserver, self.reach.timeout)
        except DiscoveryFailed as error:
            trouble = str(error)
        except TimeoutError:
            trouble = "it does not answer in time"
        self._condition("homeserver", name, trouble or None)

    async def _check_sfu(self, name: str) -> None:
        participants, trouble, _ = await self._participants(name, CHECKED_ROOM)
        self._condition("sfu", name, None if participants is not None else trouble)

    async def _manage(self, task: Task) -> None:
        sent_at = self._clock()
        if task.lease_ends - sent_at <= LEASE_MARGIN:
            # The process was stopped for a while. What it had claimed is another one's by now, or will be, and perhaps not to be done any more.
            log.warning("lease_ended", delegation=task.delegation, action=task.action.value, consequence="it is not done by this claim")
            self._hand_in(answered(task, Answer(Verdict.FAILED, None, "", None, "its lease had ended before it was begun"), sent_at))
            return
        try:
            answer = await self._request(task, min(self.reach.timeout, task.lease_ends - sent_at - LEASE_MARGIN))
        except Exception as error:
            log.error("action_failed", delegation=task.delegation, action=task.action.value, error=type(error).__name__, at=frames(error))
            answer = Answer(Verdict.UNCERTAIN, None, "", None, f"a defect of the daemon: {type(error).__name__}")
        answered_at = self._clock()
        self._observer.action(task.homeserver, task.action, answer.verdict.value, answered_at - sent_at)
        healthy = answer.verdict not in (Verdict.FAILED, Verdict.UNCERTAIN)
        self._condition("homeserver", task.homeserver, None if healthy else answer.detail)
        if not healthy:
            log.debug("action_not_done", delegation=task.delegation, action=task.action.value, homeserver=task.homeserver, detail=answer.detail)
        self._hand_in(answered(task, answer, sent_at, answered_at))

    async def _request(self, task: Task, timeout: float) -> Answer:  # noqa: ASYNC109
        begun = asyncio.get_running_loop().time()
        try:
            token = None if task.token is None else self.reach.sealer.unseal(task.token)
            homeserver = self.reach.homeservers.configured(task.homeserver)
            if homeserver is None:
                homeserver = await asyncio.wait_for(self.reach.homeservers.resolve(task.homeserver), timeout)
        except CannotUnseal as error:
            return Answer(Verdict.FAILED, None, "", None, str(error))
        except DiscoveryFailed as error:
            return Answer(Verdict.FAILED, None, "", None, str(error))
        except TimeoutError:
            return Answer(Verdict.FAILED, None, "", None, "the discovery of its URL took too long")
        left = max(0.5, timeout - (asyncio.get_running_loop().time() - begun))
        return await self.reach.client.act(homeserver, task.action, task.delay_id, token=token, user=task.user, timeout=left)

    async def _look(self, task: Task) -> None:
        sent_at = self._clock()
        if task.lease_ends <= sent_at:
            self._hand_in(Looked(task.sfu, task.room, task.claim, sent_at, None, "its lease had ended before it was begun", made=False))
            return
        participants, trouble, reached = await self._participants(task.sfu, task.room)
        self._observer.look(task.sfu, "failed" if participants is None else "done", self._clock() - sent_at)
        self._condition("sfu", task.sfu, None if participants is not None else trouble)
        self._hand_in(Looked(task.sfu, task.room, task.claim, sent_at, participants, trouble, reached))

    async def _participants(self, name: str, room: str) -> tuple[tuple[Listed, ...] | None, str, bool]:
        """Who is in the room; or None, why the SFU could not be asked, and whether it is there nevertheless."""
        sfu = self.reach.sfus.get(name)
        if sfu is None:
            return None, "it is not configured any more", False
        try:
            return await self.reach.room_service.look(sfu.address, room, sfu.timeout), "", True
        except SfuUnavailable as error:
            return None, str(error), error.trouble is Trouble.REFUSED
        except Exception as error:
            log.error("look_failed", sfu=name, error=type(error).__name__, at=frames(error))
            return None, f"a defect of the daemon: {type(error).__name__}", False

    def _condition(self, kind: str, name: str, trouble: str | None) -> None:
        """One line for each change of a homeserver's or an SFU's condition, not for each try; another one for another cause, after a while.

        What changes again and again is told now and then only, and in the end as it is.
        """
        key = (kind, name)
        now_so = self.conditions[key] = trouble or ""
        if now_so:
            self._failed_at[key] = self._clock()
        told = self._told.get(key)
        if told is None:
            told = self._told[key] = _Told()
        if bool(now_so) is bool(told.trouble):
            if told.lasting is not None:
                told.lasting.cancel()
                told.lasting = None
            if now_so != told.trouble and self._clock() - told.at[-1] >= TELL_ANOTHER_CAUSE_AFTER:
                self._tell(key)
        elif len(told.at) < TOLD_AT_ONCE or self._clock() - told.at[0] >= RECENTLY:
            self._tell(key)
        elif told.lasting is None:
            told.lasting = asyncio.get_running_loop().call_later(LASTED, self._tell, key)

    def _tell(self, key: tuple[str, str]) -> None:
        kind, name = key
        told = self._told[key]
        if told.lasting is not None:
            told.lasting.cancel()
            told.lasting = None
        told.trouble = self.conditions[key]
        told.at = (*told.at, self._clock())[-TOLD_AT_ONCE:]
        if told.trouble:
            log.warning(f"{kind}_failed", **{kind: name}, problem=told.trouble)
        else:
            log.info(f"{kind}_works_again", **{kind: name})
