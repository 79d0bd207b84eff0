"""The whole bridge between the event loop and the engine.

While one transaction runs in the engine's thread, inputs gather; the next takes all of them. It must never touch the engine from the loop.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Protocol, TypeVar

from sfu_delegate.api.port import Overloaded, Told, Unavailable
from sfu_delegate.daemon.sharing import WATCH_EVERY, Sharing
from sfu_delegate.daemon.thread import WorkThread
from sfu_delegate.delegation.model import Answered, DelayedEvent, Input, Lane, Looked, Missed, RoomChanged, Seen, Task
from sfu_delegate.delegation.replies import Reply
from sfu_delegate.delegation.urgency import Limit
from sfu_delegate.engine import Engine, Step
from sfu_delegate.observe.logs import frames, get_logger
from sfu_delegate.store.base import Disk, StoreUnavailable

T = TypeVar("T")

Waiting = tuple[Input, Told | None]
"""An input, and who waits for its reply. None: nobody does, and it is handed in again until it can be kept."""

BATCH = 512  # inputs in one transaction at the most, and as many answers of homeservers, so that nobody waits for long
FULL_RETRY_AFTER = 1.0  # seconds
BROKEN_RETRY_AFTER = 2.0
BROKEN_PAUSE = 0.2  # before the next try when the database does not work
PATIENCE = 5.0  # seconds that an answer waits for a database that hangs: LiveKit 1.13 itself waits without limit, and a room's webhooks with it
TICKS = 5  # … in so many parts
IDLE_AFTER = 1.0  # without work, before housekeeping
SURVEY_EVERY = 5.0  # how often the backlog is counted …
SURVEY_PART = 0.02  # … and of all time at the most: a large one takes its time
LONGEST_SLEEP = 5.0
LINGER = 0.25  # seconds that answers of homeservers wait for company: nobody waits for them, and alone each would cost a durable commit
LINGER_CROWDED = 0.02  # … where something waits for the places that they free, unless half of the places are free before
COMPANY = 32  # answers, from which on those that come with a batch are as many as its other inputs …
FEW = 8  # … or so many: whoever's webhook is in that batch waits for them
GIVE_WAY = 0.05  # seconds
STOOD_STILL = 10.0  # a loop that was away for this much longer than it wanted to was stopped, or its machine slept

log = get_logger(__name__)


class Observer(Protocol):
    """Who counts what happens."""

    def step(self, step: Step, inputs: int, seconds: float, now: float) -> None:
        """A transaction was committed, `seconds` after it had begun."""

    def backlog(self, counted: dict[tuple[str, Lane], tuple[int, float]], now: float) -> None:
        """The backlog was counted."""

    def waiting_since(self, departures: Mapping[str, float], now: float) -> None:
        """By homeserver: the earliest departure whose event is not ended yet."""

    def disk(self, disk: Disk | None) -> None:
        """How much room the database takes, and has."""

    def forecast(self, lateness: Mapping[str, float], rates: Mapping[str, tuple[Limit, float]]) -> None:
        """By homeserver: the seconds by which restarts will be late, and what is known about the rate limit."""

    def store(self, *, works: bool) -> None:
        """The database works, or does not."""


class DelegationWatch:
    """See `api.port.Watch`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.rows: dict[int, DelayedEvent] = {}
        self._loop = loop
        self._changed = asyncio.Event()

    def saw(self, row: DelayedEvent) -> None:
        """A row of the delegation changed."""
        self.rows[row.id] = row
        self._changed.set()

    async def until_decided(self, events: set[int], timeout: float) -> bool:  # noqa: ASYNC109
        """See `api.port.Watch`."""
        deadline = self._loop.time() + timeout
        while True:
            rows = [self.rows[id] for id in events if id in self.rows]
            failed = any(row.verified_at is None and row.finished_at is not None for row in rows)
            if failed or sum(row.verified_at is not None for row in rows) == len(events):
                return True
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                return False


class Inbox:
    """Takes inputs from everywhere, hands them to the engine in batches, and its actions to `carry_out`. See `api.port.Port`."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float],
        carry_out: Callable[[Task], None],
        observer: Observer,
        most: int,
        sharing: Sharing | None = None,
    ):
        self.most = most
        self.trouble: str | None = None  # why the database does not work
        self._engine = engine
        self._clock = clock
        self._carry_out = carry_out
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._thread = WorkThread("engine")
        self._waiting: list[Waiting] = []
        self._begun: list[Waiting] = []  # the batch of the present step
        self._pressing = False  # is there something to be taken at once?
        self._answers: list[Answered] = []  # to be kept, for which nobody waits
        self._news_of: list[Answered] = []  # those of them that the engine has not heard of
        self._answers_due = False  # they have waited for long enough
        self._lingering: asyncio.TimerHandle | None = None
        self._hurry = False  # a departure waits for a place at its homeserver, which an answer will free …
        self._company = 0  # … or something else does, which is worth a step when so many answers have come
        self._news = asyncio.Event()
        self._watches: dict[str, list[DelegationWatch]] = {}
        self._stopping = False
        self._flushed = False
        self._surveyed = 0.0
        self._survey_pause = SURVEY_EVERY
        self._missed = False  # webhooks were refused: LiveKit tries again for 15 s at the most
        self._progress = 0  # steps that have come to an end
        self._hung: str | None = None  # what is told to whoever comes while the present step does not end
        self._ran_at: float | None = None  # when the loop was last seen running
        self._stood_still = False  # … and it has not for long
        self._sharing = sharing  # where other instances work with the database

    # ── for those who hand in ──

    def now(self) -> float:
        """See `api.port.Port`."""
        return self._clock()

    async def put(self, given: Input) -> Reply:
        """See `api.port.Port`."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        self.hand(given, lambda reply: _settle(future, reply))
        return await future

    def hand(self, given: Input, told: Told) -> None:
        """See `api.port.Port`. What was refused after PATIENCE seconds may be kept all the same: all inputs can be repeated."""
        refusal: Exception
        if self._stopping:
            refusal = Overloaded("The daemon is stopping.", FULL_RETRY_AFTER)
        elif self._hung is not None:
            self._note_refused(given)
            refusal = Unavailable(self._hung, BROKEN_RETRY_AFTER)
        elif len(self._waiting) >= self.most:
            self._note_refused(given)
            refusal = Overloaded("Too many requests wait for the database.", FULL_RETRY_AFTER)
        else:
            self._waiting.append((given, told))
            self._press()
            return
        _tell(told, refusal)

    def _note_refused(self, given: Input) -> None:
        """LiveKit tries a webhook again for a while only."""
        self._missed = self._missed or isinstance(given, Seen | RoomChanged)

    def hand_in(self, given: Answered | Looked) -> None:
        """What became of an action. Never refused, and handed in again until it can be kept.

        The engine hears of an answer with the next step, and its place at the homeserver is free. That it is kept waits for others, so that
        departures go before; but not where somebody waits for it, or for its place.
        """
        if isinstance(given, Looked):
            self._waiting.append((given, None))
            self._press()
            return
        self._answers.append(given)
        self._news_of.append(given)
        if self._hurry or self._watches or (self._company and len(self._answers) >= self._company):
            self._press_answers()
        elif self._lingering is None:
            self._linger()

    def _press_answers(self) -> None:
        self._answers_due = True
        self._press()

    def _press(self) -> None:
        """What waits is to be taken at once."""
        self._pressing = True
        self._news.set()

    def _linger(self) -> None:
        self._lingering = self._loop.call_later(LINGER_CROWDED if self._company else LINGER, self._press_answers)

    def _stop_lingering(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None

    @contextmanager
    def watch(self, delegation: str) -> Iterator[DelegationWatch]:
        """See `api.port.Port`."""
        watch = DelegationWatch(self._loop)
        watches = self._watches.setdefault(delegation, [])
        watches.append(watch)
        try:
            yield watch
        finally:
            watches.remove(watch)
            if not watches:
                self._watches.pop(delegation, None)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run something in the engine's thread, between two steps."""
        return await self._thread.run(work)

    @property
    def progress(self) -> int:
        """How many steps have come to an end: another one every few seconds, whether or not the database works, as long as it does not hang."""
        return self._progress

    @property
    def where(self) -> list[str]:
        """What the engine's thread is doing just now; see `WorkThread.where`."""
        return self._thread.where

    # ── the loop ──

    async def run(self) -> None:
        """Step until `stop` was called and everything that had been handed in is kept. Who still waits when it is cancelled is refused."""
        beside = [asyncio.create_task(self._watch_steps())]
        if self._sharing is not None:
            beside += [asyncio.create_task(self._watch_others()), asyncio.create_task(self._sharing.counting())]
        try:
            await self._run()
        except asyncio.CancelledError:
            self._refuse([*self._begun, *self._waiting], Unavailable("The daemon is stopping.", FULL_RETRY_AFTER))
            raise
        finally:
            for task in beside:
                task.cancel()

    async def _watch_steps(self) -> None:
        """Nobody waits for a database that hangs without end. It is counted in ticks, since a process that was stopped for a while hangs nowhere."""
        ticks, before = 0, self._progress
        while True:
            await asyncio.sleep(PATIENCE / TICKS)
            self._run_on()  # also while a step, or a refresh, waits for the database
            ticks = ticks + 1 if self._progress == before and (self._begun or self._waiting or self._answers) else 0
            before = self._progress
            if ticks < TICKS:
                continue
            what = "disk, or its file system, hang" if self._sharing is None else "server hang, or wait for a standby"
            self._hung = f"The database does not answer within {PATIENCE:g} seconds. Does its {what}?"
            self._broken(StoreUnavailable(self._hung))
            for batch in (self._begun, self._waiting):
                for at, (given, told) in enumerate(batch):
                    if told is not None and told is not _nobody:
                        self._note_refused(given)
                        batch[at] = (given, _nobody)
                        _tell(told, Unavailable(self._hung, BROKEN_RETRY_AFTER))

    async def _run(self) -> None:
        wake: float | None = self._clock()
        while True:
            if self._sharing is not None and not self._sharing.pause:
                wake = await self._refresh(wake)
            await self._something_to_do(wake)
            if self._stopping and self._flushed and not (self._waiting or self._answers):
                return
            self._notice_gaps()
            self._begun = self._take()
            wake = await self._step(self._begun)
            self._begun = []
            self._progress += 1
            if self.trouble is None:
                self._hung = None

    def _take(self) -> list[Waiting]:
        """The next batch; answers in the order of their rows, which are neighbours then."""
        batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
        taken = 0
        if self._stopping or not batch or self._hurry or self._watches:
            taken = BATCH
        elif self._answers_due or len(self._answers) >= COMPANY:
            taken = max(FEW, len(batch))
        if taken and self._answers:
            answers, self._answers = self._answers[:taken], self._answers[taken:]
            batch += [(given, None) for given in sorted(answers, key=lambda given: given.event)]
        if taken:
            self._stop_lingering()
            if self._answers:
                self._linger()
        self._answers_due = False
        self._pressing = bool(self._waiting)
        return batch

    def _run_on(self) -> None:
        """This thread runs; has it not, for long?"""
        now = self._clock()
        if self._ran_at is not None and now - self._ran_at > LONGEST_SLEEP + STOOD_STILL:
            log.warning("stood_still", consequence="webhooks may be lost: all rooms are looked at")
            self._stood_still = True
        self._ran_at = now

    def _notice_gaps(self) -> None:
        """What came while nobody could take it may be lost: the SFUs are asked."""
        self._run_on()
        stood_still, self._stood_still = self._stood_still, False
        if stood_still or (self._missed and self.trouble is None and len(self._waiting) < self.most):
            self._missed = False
            self._waiting.append((Missed(), None))

    async def _refresh(self, wake: float | None) -> float | None:
        """Take over what other instances have changed."""
        assert self._sharing is not None  # noqa: S101 — for the type checker
        try:
            return await self.in_thread(self._sharing.refresh)
        except StoreUnavailable as error:
            self._broken(error)
        except Exception as error:  # a defect of ours must not stop the daemon
            log.error("refresh_failed", error=type(error).__name__, at=frames(error))
        return wake

    async def _watch_others(self) -> None:
        """Clients that wait for their delegation to be confirmed are told also what other instances have done."""
        assert self._sharing is not None  # noqa: S101
        sharing = self._sharing
        while True:
            await asyncio.sleep(WATCH_EVERY)
            if not self._watches:
                continue
            names = list(self._watches)
            try:
                for row in await self.in_thread(lambda names=names: sharing.rows(names)):  # type: ignore[misc]
                    self._saw(row)
            except StoreUnavailable:
                continue
            except Exception as error:
                log.error("watching_failed", error=type(error).__name__, at=frames(error))

    def _saw(self, row: DelayedEvent) -> None:
        for watch in self._watches.get(row.delegation, ()):
            watch.saw(row)

    async def _something_to_do(self, wake: float | None) -> None:
        if self._pressing or self._stopping:
            if self._stopping and not (self._waiting or self._answers or self._flushed):
                await self._sleep(LONGEST_SLEEP)
            return
        self._news.clear()
        pause = LONGEST_SLEEP if wake is None else min(max(0.0, wake - self._clock()), LONGEST_SLEEP)
        if self._sharing is not None:
            pause = min(pause, self._sharing.pause)
        if pause > IDLE_AFTER:
            if await self._sleep(IDLE_AFTER):
                return
            await self._housekeeping()
            pause -= IDLE_AFTER
        if not self._pressing:
            await self._sleep(pause)

    async def _sleep(self, seconds: float) -> bool:
        """Until there is news, `seconds` at most; was there?"""
        if seconds <= 0:
            return self._news.is_set()
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True

    async def _housekeeping(self) -> None:
        try:
            await self.in_thread(self._engine.store.idle)
            await self._survey()
        except StoreUnavailable as error:
            self._broken(error)

    async def _survey(self) -> None:
        now, begun = self._clock(), perf_counter()
        self._surveyed = now
        self._observer.backlog(await self.in_thread(lambda: self._engine.backlog(now)), now)
        departures, disk = await self.in_thread(lambda: (self._engine.waiting_since(), self._engine.store.disk()))
        self._observer.waiting_since(departures, now)
        self._observer.disk(disk)
        self._observer.forecast(*await self.in_thread(lambda: (self._engine.forecast(now), dict(self._engine.rates()))))
        self._survey_pause = max(SURVEY_EVERY, (perf_counter() - begun) / SURVEY_PART)

    async def _step(self, batch: Sequence[Waiting]) -> float | None:
        begun = perf_counter()
        now = self._clock()
        inputs = [given for given, _ in batch]
        try:
            step = await self._computed(inputs, now)
            self._works()
        except StoreUnavailable as error:
            self._refuse(batch, Unavailable(str(error), BROKEN_RETRY_AFTER))
            self._broken(error)
            await self._keep_alive()
            await asyncio.sleep(BROKEN_PAUSE)
            return self._clock()
        except Exception as error:
            # A defect of ours must not stop the daemon: whoever waits gets it, and what nobody waits for is tried again by its lease.
            log.error("step_failed", inputs=len(inputs), error=type(error).__name__, at=frames(error))
            for _, told in batch:
                if told is not None:
                    _tell(told, error)
            await asyncio.sleep(BROKEN_PAUSE)
            return self._clock()
        self._hurry, self._company = step.hurry, step.company
        if self._company and self._lingering is not None and self._lingering.when() > self._loop.time() + LINGER_CROWDED:
            self._stop_lingering()  # they began to when nobody waited
            self._linger()
        self._deliver(batch, step)
        await asyncio.sleep(0)  # what was begun, and answered, is on its way before anything else is done
        self._observer.step(step, len(inputs), perf_counter() - begun, now)
        try:
            if self._engine.store.is_log_large:
                await self.in_thread(self._engine.store.checkpoint)
            if now - self._surveyed >= self._survey_pause:
                await self._survey()
        except StoreUnavailable as error:
            self._broken(error)
        return step.wake

    async def _computed(self, inputs: Sequence[Input], now: float) -> Step:
        """One step. While the engine computes, this thread stands still, for GIVE_WAY at the most: both would compete for the interpreter, and
        with each statement of the database one would take it from the other. It goes on as soon as the engine waits for the disk.
        """
        computing = threading.Lock()
        computing.acquire()

        def waits() -> None:
            if computing.locked():
                computing.release()

        def work() -> Step:
            try:
                return self._engine.step(inputs, now, answered=answered, about_to_wait=waits)
            finally:
                waits()

        answered, self._news_of = self._news_of, []
        step = self._thread.run(work)
        computing.acquire(timeout=GIVE_WAY)
        return await step

    def _deliver(self, batch: Sequence[Waiting], step: Step) -> None:
        for task in step.tasks:
            self._carry_out(task)
        for (given, told), reply in zip(batch, step.replies, strict=True):
            if told is None:
                if isinstance(reply, Exception):
                    log.error("input_failed", input=type(given).__name__, error=type(reply).__name__)
            elif isinstance(reply, StoreUnavailable):
                _tell(told, Unavailable(str(reply), BROKEN_RETRY_AFTER))
            else:
                _tell(told, reply)
        if self._watches:
            for change in step.changes:
                self._saw(change.new)

    def _refuse(self, batch: Sequence[Waiting], why: Unavailable) -> None:
        again: list[Waiting] = []
        answers: list[Answered] = []
        for given, told in batch:
            if told is not None:
                self._note_refused(given)
                _tell(told, why)
            elif isinstance(given, Answered):
                answers.append(given)
            else:
                again.append((given, None))
        # Behind what has come meanwhile: the engine must hear of every answer, and takes only so many at a time.
        self._waiting = [*self._waiting, *again]
        self._answers = [*self._answers, *_without_repetition(answers)]
        self._answers_due = bool(self._answers)

    async def _keep_alive(self) -> None:
        """Who is connected stays, although nothing can be stored."""
        now = self._clock()
        with suppress(StoreUnavailable):
            for task in await self.in_thread(lambda: self._engine.keep_alive(now)):
                self._carry_out(task)

    def _broken(self, error: StoreUnavailable) -> None:
        if self.trouble is None:
            log.error("database_failed", problem=str(error))
        self.trouble = str(error)
        self._observer.store(works=False)

    def _works(self) -> None:
        if self.trouble is not None:
            log.info("database_works_again")
            self.trouble = None
        self._observer.store(works=True)

    # ── the end ──

    def stop(self) -> None:
        """Take nothing more from outside, and claim nothing more."""
        self._stopping = True
        self._engine.stopping = True
        self._news.set()

    def flush(self) -> None:
        """No more results will be handed in: `run` ends when what waits is kept."""
        self._flushed = True
        self._news.set()

    async def close(self, last: Callable[[], None], within: float) -> bool:
        """Do a last thing in the engine's thread, after the last step, and let it end.

        False if that takes longer than `within` seconds; it is done all the same when the thread comes back, if ever.
        """
        done = self._thread.run(last)
        self._thread.close()
        await asyncio.wait({done}, timeout=within)
        if done.done():
            done.result()
        return done.done()


def _settle(future: asyncio.Future[Reply], reply: Reply | Exception) -> None:
    if future.done():
        return  # whoever asked has hung up
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)


def _tell(told: Told, reply: Reply | Exception) -> None:
    """Whoever waits gets it. What goes wrong with that is theirs: the others wait, too."""
    try:
        told(reply)
    except Exception as error:
        log.error("telling_failed", error=type(error).__name__, at=frames(error))


def _nobody(_: Reply | Exception) -> None:
    """Whoever waited was told something already."""


def _without_repetition(answers: Sequence[Answered]) -> Iterator[Answered]:
    """Of the restarts of one event that nobody had claimed, only the last one matters."""
    last = {given.event: given for given in answers if given.claim < 0}
    for given in answers:
        if given.claim >= 0 or last[given.event] is given:
            yield given
