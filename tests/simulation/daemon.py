"""One instance of the daemon: what `serve.py`, `inbox.py` and `actions.py` do, on the world's clock."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import TYPE_CHECKING

from sfu_delegate.daemon.actions import LEASE_MARGIN, answered
from sfu_delegate.daemon.clock import SET_IF_BEYOND
from sfu_delegate.daemon.inbox import LONGEST_SLEEP, STOOD_STILL
from sfu_delegate.daemon.sharing import COUNT_EVERY, REFRESH_EVERY
from sfu_delegate.delegation import model
from sfu_delegate.delegation.model import Action, Answered, Input, Listed, Looked, Task, Verdict
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.replies import Reply, TooMany
from sfu_delegate.engine import Engine, Limits, Step
from sfu_delegate.matrix.answers import Answer, read_reply, understand
from sfu_delegate.matrix.http import HttpAnswer
from sfu_delegate.sandbox.answer import Answer as HttpResponse
from sfu_delegate.sandbox.answer import Fate, no_answer
from sfu_delegate.store.base import StoreUnavailable

from tests.simulation.store import SharedStore, Store
from tests.simulation.watching import Spans

if TYPE_CHECKING:
    from tests.simulation.world import World

SFU = "main"
REQUEST_TIMEOUT = 10.0  # seconds for a request to a homeserver, as `timeouts.request` has it
LOOK_TIMEOUT = 5.0
STORE_PAUSE = 0.5  # seconds before the next try when the database does not work, as the inbox has it
AGREE = 0.004  # seconds by which the clocks of instances, which are the database's, differ from it at the most
STOPPED_WITHIN = 10.0  # seconds that a stop waits for requests which are on their way


class Cut(StrEnum):
    """How somebody is out of reach for one instance."""

    REFUSED = "refused"  # at once
    SILENT = "silent"  # nothing gets there, and nothing comes back
    DEAF = "deaf"  # everything gets there, and nothing comes back


HANGING = (Cut.SILENT, Cut.DEAF)
"""Requests are not answered, which takes the time that they have."""


@dataclass(slots=True)
class _Waiting:
    """An input, and who waits for its reply; nobody, for the result of an action."""

    given: Input
    then: Callable[[Reply | Exception], None] | None


@dataclass(slots=True)
class _InFlight:
    """A task that is being carried out, and when (true time) it was claimed."""

    task: Task
    claimed_at: float


class Daemon:
    """One instance. Where it has the store for itself, it is the only one."""

    def __init__(self, world: "World", policy: Policy, limits: Limits, in_flight: int, store: Store) -> None:
        self.world = world
        self.policy = policy
        self.limits = limits
        self.width = in_flight
        self.store = store
        self.name = store.name if isinstance(store, SharedStore) else "i0"
        self.address = store.address if isinstance(store, SharedStore) else "delegate"
        self.engine: Engine
        self.up = Spans(world.now, holds=False)  # runs, is not stopped, and its database works
        self.running = False
        self.paused = False
        self.stopping = False
        self.homeserver_cut: Cut | None = None
        self.sfu_cut: Cut | None = None
        self.life = 0
        self.offset = 0.0  # of its clock against the true time
        self.steps = 0
        self.outstanding: dict[int, _InFlight] = {}
        self._unsure = False  # its clock was moved, and what is stored is not yet brought into line
        self._apart = 0.0  # … against the database's, which it follows
        self._set_offset = 0.0  # of the system clock: taken over at the next start
        self._mark: float | None = None  # the offset at the start before
        self._waiting: list[_Waiting] = []
        self._busy = False
        self._wake: float | None = None
        self._refresh_at: float | None = None  # where others share the store
        self._recount_at = 0.0
        self._crash_after_commit: float | None = None
        self._pause_after_commit: float | None = None
        self._pause_before: frozenset[Action] = frozenset()
        self._paused_at = 0.0
        self._held_up: list[Callable[[], None]] = []  # what would have happened in it since it was stopped
        self._begun: tuple[float, list[_Waiting]] | None = None  # a step that had its time, and its inputs, when it was stopped
        self._missed = False
        self._count = 0

    @property
    def shared(self) -> bool:
        """Are there others?"""
        return isinstance(self.store, SharedStore)

    @property
    def acting(self) -> bool:
        """Is it up, and can reach everybody?"""
        return bool(self.up) and self.homeserver_cut is None and self.sfu_cut is None

    def clock(self) -> float:
        """The daemon's own time."""
        return self.world.now + self.offset

    # ── start, stop, trouble ──

    def start(self) -> None:
        """A new process on what the last one left. Tried again while the database does not work, as a service manager would."""
        if self.running:
            return
        unsure = self._mark is not None and abs(self._set_offset - self._mark) > SET_IF_BEYOND
        self.offset = self._set_offset
        try:
            if isinstance(self.store, SharedStore):
                self._join(self.store)
            elif self.life:
                self.store.recover(self.clock(), self.policy, clock_unsure=unsure)
        except StoreUnavailable:
            self.world.after(2.0, self.start)
            return
        self._mark = self.offset
        random = Random(self.world.random.getrandbits(64))
        self.engine = Engine(self.store, self.policy, self.limits, random, in_flight=lambda _: self.width, looks_in_flight=lambda _: 4)
        self.running, self.stopping = True, False
        self.life += 1
        self._wake = self.world.now
        self.note_up()
        self.world.watch.started(self)

    def _join(self, store: SharedStore) -> None:
        """Nothing is taken up from others: what they do not finish is free when their leases end. Raises StoreUnavailable."""
        if not store.works:
            raise StoreUnavailable("it takes no transaction")
        store.connect()
        self._unsure = False
        self._apart = self.world.luck.uniform(-AGREE, AGREE)
        self.offset = store.board.offset + self._apart
        seen = store.newest_sign_of_life()
        if seen is not None and seen > self.clock() + SET_IF_BEYOND:
            store.times_are_unknown(self.clock(), self.policy)
        self._refresh_at, self._recount_at = self.world.now, self.world.now + COUNT_EVERY

    def crash(self) -> None:
        """`kill -9` now: what waits, and what the step that is under way has committed but not yet told anybody, is gone."""
        if not self.running:
            return
        self.running = self.paused = self.stopping = False
        waiting, self._waiting = self._waiting, []
        if self._begun is not None:
            waiting = [*self._begun[1], *waiting]
        self.outstanding.clear()
        self._held_up.clear()
        self._begun, self._refresh_at = None, None
        self._busy, self._wake, self._crash_after_commit, self._pause_after_commit, self._missed = False, None, None, None, False
        self.note_up()
        self.world.watch.stopped(self)
        for one in waiting:
            if one.then is not None:
                one.then(ConnectionResetError())

    def crash_after_commit(self, down: float | None) -> None:
        """`kill -9` right after the next commit that claims or answers something, before anything of it leaves; up again `down` seconds later.
        None: not any more."""
        self._crash_after_commit = down if self.running else None

    def stop(self, then: Callable[[], None]) -> None:
        """SIGTERM: it takes nothing more, and ends when what is under way has come back, or after some seconds. `then`: when it has ended."""
        if not self.running or self.stopping:
            return
        self.engine.stopping = self.stopping = True
        self.note_up()
        life, until = self.life, self.world.now + STOPPED_WITHIN

        def look() -> None:
            if life != self.life or not self.running:
                return
            if self.paused or ((self.outstanding or self._waiting or self._busy) and self.world.now < until):
                self.world.after(0.1, look)
                return
            if isinstance(self.store, SharedStore):
                with suppress(StoreUnavailable):
                    self.store.farewell()
            self.crash()
            then()

        look()

    def pause(self, *, in_step: bool = False) -> None:
        """SIGSTOP: nothing happens in it until `resume`. `in_step`: a step had begun, and has read the clock but nothing else."""
        if not self.running or self.paused:
            return
        self.paused, self._paused_at = True, self.world.now
        if in_step and not self._busy and self._begun is None:
            self._begun = (self.clock(), self._waiting)
            self._waiting = []
        self.note_up()

    def pause_after_commit(self, seconds: float | None, before: Iterable[Action] = Action) -> None:
        """The same right after the next commit that claims one of these actions, before anything of it leaves. None: not any more."""
        self._pause_after_commit = seconds if self.running else None
        self._pause_before = frozenset(before)

    def resume(self) -> None:
        """SIGCONT."""
        if not self.paused:
            return
        self.paused = False
        held_up, self._held_up = self._held_up, []
        for do in held_up:
            do()
        if self.world.now - self._paused_at > LONGEST_SLEEP + STOOD_STILL:
            self._waiting.append(_Waiting(model.Missed(), None))
        self.note_up()

    def _in_process(self, do: Callable[[], None]) -> Callable[[], None]:
        """To be done by the process that runs now: later, if it is stopped then, and not at all if it is dead."""
        life = self.life

        def when_it_runs() -> None:
            if life != self.life or not self.running:
                return
            if self.paused:
                self._held_up.append(do)
            else:
                do()

        return when_it_runs

    def set_system_clock(self, offset: float) -> None:
        """The system clock is set; a running daemon does not notice, the next one does."""
        self._set_offset = offset

    def break_store(self, broken: bool) -> None:
        """The database refuses all transactions, or works again."""
        self.store.refuses = broken
        self.note_up()

    def cut_store(self, cut: bool) -> None:
        """The database cannot be reached, or can again."""
        if isinstance(self.store, SharedStore):
            self.store.cut = cut
            self.note_up()

    def cut_homeserver(self, how: Cut | None) -> None:
        """Homeservers are out of its reach, and of nobody else's; or are not any more."""
        if self.homeserver_cut in HANGING:
            self.world.note_upset()  # what is on its way still will not be answered
        self.homeserver_cut = how
        self.note_up()

    def cut_sfu(self, how: Cut | None) -> None:
        """The same for the SFU's API; its webhooks arrive."""
        if self.sfu_cut in HANGING:
            self.world.note_upset()
        self.sfu_cut = how
        self.note_up()

    def lose_commits(self, number: int) -> None:
        """So many of its next commits are kept, and it does not hear of them."""
        if isinstance(self.store, SharedStore):
            self.store.untold = number

    def be_well(self) -> None:
        """All of its trouble is over; but one that does not run is not started."""
        if self.stopping:
            self.crash()
        if isinstance(self.store, SharedStore):
            self.store.cut, self.store.untold = False, 0
        self.store.refuses = False
        self.cut_homeserver(None)
        self.cut_sfu(None)
        self.note_up()
        self.crash_after_commit(None)
        self.pause_after_commit(None)
        self.resume()

    def note_up(self) -> None:
        """Its condition may have changed."""
        self.up.set(self.world.now, self.running and self.store.works and not (self.paused or self.stopping))
        self.world.note_daemons()

    # ── the inbox ──

    def put(self, given: Input, then: Callable[[Reply | Exception], None]) -> None:
        """Hand in an input from outside. `then` gets the reply, StoreUnavailable, or an OSError where nobody listens or the process dies."""
        if not self.running:
            then(ConnectionRefusedError())
            return
        self._waiting.append(_Waiting(given, then))

    def hand_in(self, given: Input) -> None:
        """The result of an action: handed in until it can be kept."""
        self._waiting.append(_Waiting(given, None))

    def next_event(self) -> float | None:
        """When the next step is due, in true time."""
        if not self.running or self._busy or self.paused:
            return None
        if self._waiting or self._begun is not None:
            return self.world.now
        if self.stopping:
            return None
        if self._refresh_at is None:
            return self._wake
        return self._refresh_at if self._wake is None else min(self._wake, self._refresh_at)

    def step(self) -> None:
        """One transaction with everything that waits."""
        if self._begun is not None:
            (now, batch), self._begun = self._begun, None
        else:
            if self._refresh_at is not None and self._refresh_at <= self.world.now and not self.stopping:
                self._refresh()
                if not self._waiting and (self._wake is None or self._wake > self.world.now):
                    return
            now, (batch, self._waiting) = self.clock(), (self._waiting, [])
        self._wake = None
        self.steps += 1
        at = self.world.now
        try:
            step = self.engine.step([one.given for one in batch], now)
        except StoreUnavailable as error:
            self._refuse(batch, error)
            return
        self._free(batch)
        self._busy = True
        self.world.after(self.world.commit_time(), self._in_process(lambda: self._leave(batch, step, at)))

    def _refresh(self) -> None:
        """What others have done; now and then, how much there is of everything."""
        self._refresh_at = self.world.now + REFRESH_EVERY * self.world.luck.uniform(0.95, 1.05)
        try:
            self._follow()
            if self.world.now >= self._recount_at:
                self._recount_at = self.world.now + COUNT_EVERY
                self.engine.recount(self.store.census())
            wake = self.engine.refresh(self.clock())
        except StoreUnavailable:
            return
        self._wake = None if wake is None else max(self.world.now, wake - self.offset)

    def _follow(self) -> None:
        """Keep to the database's clock. Raises StoreUnavailable."""
        assert isinstance(self.store, SharedStore)
        if not self.store.works:
            raise StoreUnavailable("the clock cannot be read")
        before, self.offset = self.offset, self.store.board.offset + self._apart
        if abs(self.offset - before) > SET_IF_BEYOND:
            self.engine.clock_moved(self.offset - before, self.clock())
            self._unsure = True
        if self._unsure:
            self.store.times_are_unknown(self.clock(), self.policy)
            self._unsure = False

    def _refuse(self, batch: list[_Waiting], error: StoreUnavailable) -> None:
        self._free(batch)
        self._waiting = [one for one in batch if one.then is None] + self._waiting
        self._busy = True
        with suppress(StoreUnavailable):
            for task in self.engine.keep_alive(self.clock()):
                self._carry_out(task)

        def again() -> None:
            self._busy, self._wake = False, self.world.now

        self.world.after(STORE_PAUSE, self._in_process(again))
        for one in batch:
            if one.then is not None:
                self._missed = self._missed or not isinstance(one.given, model.Accept | model.Withdraw)
                one.then(error)

    def _free(self, batch: list[_Waiting]) -> None:
        """The engine has heard these results, whether or not they could be kept."""
        for one in batch:
            if isinstance(one.given, Answered | Looked):
                self.outstanding = {n: flying for n, flying in self.outstanding.items() if not _is_result(flying.task, one.given)}

    def _leave(self, batch: list[_Waiting], step: Step, at: float) -> None:
        """The commit is done: answers and tasks leave."""
        if self._crash_after_commit is not None and (step.tasks or any(one.then for one in batch)):
            self.world.after(self._crash_after_commit, self.start)
            self.crash()
            for one in batch:
                if one.then is not None:
                    one.then(ConnectionResetError())
            return
        if self._pause_after_commit is not None and any(task.action in self._pause_before for task in step.tasks):
            self.world.after(self._pause_after_commit, self._resumes())
            self._pause_after_commit = None
            self.pause()
            self._held_up.append(lambda: self._leave(batch, step, at))
            return
        self._busy = False
        self._wake = None if step.wake is None else max(self.world.now, step.wake - self.offset)
        for task in step.tasks:
            self._carry_out(task)
        for one, reply in zip(batch, step.replies, strict=True):
            self._tell(one, reply, at)
        if self._missed:
            self._missed = False
            self._waiting.append(_Waiting(model.Missed(SFU), None))
        self.world.watch.stepped(self, step, len(batch))

    def _resumes(self) -> Callable[[], None]:
        life = self.life
        return lambda: self.resume() if life == self.life else None

    def _tell(self, one: _Waiting, reply: Reply | Exception, at: float) -> None:
        if isinstance(reply, Exception) and not isinstance(reply, StoreUnavailable | TooMany):
            raise reply  # a defect of the engine, with its own traceback
        if isinstance(reply, Exception):
            if one.then is None:
                self._waiting.append(one)
            else:
                one.then(reply)
            return
        if one.then is not None:
            self.world.watch.kept(one.given, reply, at)
            one.then(reply)

    # ── actions ──

    def _carry_out(self, task: Task) -> None:
        self._count += 1
        number, life, sent_at = self._count, self.life, self.clock()
        # One that was stopped in between has decided long ago.
        claimed_at = task.lease_ends - self.policy.lease - self.offset if self.shared else self.world.now
        self.outstanding[number] = _InFlight(task, claimed_at)
        if self._is_over(task):
            why = "its lease had ended before it was begun"
            if task.action is Action.LOOK:
                self.hand_in(Looked(task.sfu, task.room, task.claim, sent_at, None, why, made=False))
            else:
                self.hand_in(answered(task, Answer(Verdict.FAILED, None, "", None, why), sent_at))
            return
        self.world.after(self.world.latency(), lambda: self._arrive(number, life, task, sent_at))

    def _is_over(self, task: Task) -> bool:
        """Has this instance been stopped since it claimed the task, so that somebody else has it by now?"""
        return task.lease_ends - self.clock() <= (0.0 if task.action is Action.LOOK else LEASE_MARGIN)

    def _arrive(self, number: int, life: int, task: Task, sent_at: float) -> None:
        """The request is at the other end. What had been sent by a process that is dead arrives all the same."""
        claimed_at = self.world.now
        if number in self.outstanding and life == self.life:
            claimed_at = self.outstanding[number].claimed_at
        if task.action is Action.LOOK:
            asked_at = self.world.now
            response = self._reached(self.sfu_cut, lambda: self.world.sfu.look(task.room, self.world.now))
            timeout, participants = LOOK_TIMEOUT, _participants(response)
            answer = None
        else:
            if self.shared and self.clock() > task.lease_ends:
                claimed_at = self.world.now  # nothing that came after the claim is an excuse any more
            asked_at = claimed_at
            timeout = min(REQUEST_TIMEOUT, task.lease_ends - sent_at - LEASE_MARGIN)
            response = self._reached(self.homeserver_cut, lambda: self.world.manage(task, claimed_at, self.address))
            participants, answer = None, _understood(response, self.clock())
        elapsed = self.clock() - sent_at
        left = max(0.0, timeout - elapsed)
        back = response.delay + self.world.latency()
        if response.fate is Fate.HANG or back > left:
            back, participants = left, None
            answer = Answer(Verdict.UNCERTAIN, None, "", None, "no answer in time") if answer is not None else None

        def come_back() -> None:
            if answer is None:
                self.world.watch.looked(task.room, asked_at, participants)
                self.hand_in(Looked(task.sfu, task.room, task.claim, sent_at, participants, "" if participants is not None else "no answer"))
                return
            self.world.watch.answered(task.homeserver, answer.verdict)
            self.hand_in(answered(task, answer, sent_at))

        if life == self.life:
            self.world.after(back, self._in_process(come_back))

    @staticmethod
    def _reached(how: Cut | None, do: Callable[[], HttpResponse]) -> HttpResponse:
        match how:
            case None:
                return do()
            case Cut.REFUSED:
                return no_answer(Fate.REFUSE)
            case Cut.SILENT:
                return no_answer(Fate.HANG)
            case Cut.DEAF:
                do()
                return no_answer(Fate.HANG)


def _is_result(task: Task, given: Answered | Looked) -> bool:
    if isinstance(given, Looked):
        return task.action is Action.LOOK and (task.room, task.claim) == (given.room, given.claim)
    return task.action is not Action.LOOK and (task.homeserver, task.event, task.claim) == (given.homeserver, given.event, given.claim)


def _understood(response: HttpResponse, now: float) -> Answer:
    match response.fate:
        case Fate.REFUSE:
            return Answer(Verdict.FAILED, None, "", None, "connection refused")
        case Fate.CLOSE | Fate.HANG:
            return Answer(Verdict.UNCERTAIN, None, "", None, "the connection was closed")
        case _:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return understand(read_reply(HttpAnswer(response.status, headers, response.body), now), own_token=False)


def _participants(response: HttpResponse) -> tuple[Listed, ...] | None:
    if response.fate is not Fate.ANSWER or response.status != 200:
        return None
    with suppress(ValueError):
        listed = response.json()["participants"]
        return tuple(Listed(p["identity"], p["sid"], p["state"], int(p["joined_at_ms"])) for p in listed)
    return None
