"""Who is not in the Matrix room any more is removed from the call, and nobody else: not for a homeserver that fails, and not for an SFU that does.

The store is a real one; the homeserver and the SFU do what a script says. Time is the event loop's own, and flies: where everybody waits, it goes to
the next moment for which somebody does.
"""

import asyncio
import gc
import io
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any, cast

import pytest
from sfu_delegate.api.port import Unavailable
from sfu_delegate.daemon import membership
from sfu_delegate.daemon.actions import Sfu
from sfu_delegate.daemon.membership import (
    AGAIN,
    AT_A_TIME,
    BATCH,
    CONFIRMED_AFTER,
    KEPT_WITHIN,
    LEASE,
    LONGEST_PAUSE,
    PLACE_WITHIN,
    RENEWED,
    ROUNDS,
    TOGETHER,
    Membership,
    Terms,
    _Rooms,
)
from sfu_delegate.delegation.model import Listed, Seen, Sighting
from sfu_delegate.livekit.room_service import RoomService, SfuAddress, SfuUnavailable, Trouble
from sfu_delegate.livekit.tokens import LEEWAY, PARTICIPANT_TTL
from sfu_delegate.matrix.discovery import DiscoveryFailed, Homeserver, Homeservers, NotServed
from sfu_delegate.matrix.service import ApplicationService, CannotAsk, CannotTell
from sfu_delegate.observe.logs import Seldom
from sfu_delegate.store.base import Admission, Store, StoreUnavailable
from sfu_delegate.store.sqlite import SqliteStore

from tests.integration.daemon import captured_log
from tests.stores import select

EPOCH = 1_700_000_000.0  # when a test begins
GOOD_FOR = PARTICIPANT_TTL + RENEWED  # seconds
INTERVAL = 300.0
TIMEOUT = 10.0
SFU, ROOM, HOMESERVER, OTHER = "main", "livekit-room", "hs.test", "other.test"
MATRIX_ROOM = "!secret-room:hs.test"
DOWN = SfuUnavailable("The SFU did not answer within 5 s.", Trouble.TIMEOUT)
Word = bool | Exception | Callable[[], Awaitable[bool]]
"""What the homeserver says of a user: in the room or not, or why it does not say it, or that later."""


class Even(Random):
    """Jitter that is always in the middle."""

    def random(self) -> float:
        return 0.5


@contextmanager
def time_flies() -> Iterator[None]:
    """Nobody waits: the running loop's time goes on to whatever is planned next. Where nothing is, the test fails."""
    loop = asyncio.get_running_loop()
    selector = cast(Any, loop)._selector
    look, began = selector.select, loop.time()
    flown = 0.0

    def select_now(timeout: float | None) -> Any:
        nonlocal flown
        ready = look(0)
        if not ready and timeout != 0:
            assert timeout is not None, "everybody waits for somebody else"
            flown += timeout
        return ready

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selector, "select", select_now)
        patch.setattr(loop, "time", lambda: began + flown)
        yield


@pytest.fixture(autouse=True)
async def flying() -> AsyncIterator[None]:
    """No test takes the time that passes in it, and asyncio has nothing to complain of: no failure that nobody asked for, say."""
    complaints: list[Mapping[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
    with time_flies():
        yield
    assert complaints == []


@pytest.fixture(autouse=True)
def log() -> Iterator[io.StringIO]:
    """What is logged, in which there is never who is in which Matrix room, nor a secret."""
    with captured_log() as stream:
        yield stream
    for private in ("@alice", "@bob", MATRIX_ROOM, "secret"):
        assert private not in stream.getvalue()


@pytest.fixture
def leisurely(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again as seldom as what did not: hours are over sooner, and the rules are the same."""
    monkeypatch.setattr(membership, "AGAIN", INTERVAL * 0.9)
    monkeypatch.setattr(membership, "LONGEST_PAUSE", INTERVAL)


def lines(log: io.StringIO, event: str = "") -> list[dict[str, Any]]:
    """The lines of the log but for the times, or those of one event."""
    found = [json.loads(line) for line in log.getvalue().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in found if not event or line["event"] == event]


class _Observer:
    """Counts."""

    def __init__(self) -> None:
        self.results: list[str] = []
        self.removals: list[str] = []

    def membership(self, homeserver: str, result: str) -> None:
        assert homeserver in {HOMESERVER, OTHER}
        self.results.append(result)

    def removed(self, sfu: str) -> None:
        self.removals.append(sfu)


class Stage:
    """A membership with a homeserver and an SFU that follow a script.

    `before`: another one with the same database and clock.
    `said`: by user, what the homeserver says one time after another; its last word it repeats, and of all others it says that they are in the room.
    """

    def __init__(self, before: "Stage | None" = None, random: Random | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._began: float = loop.time() if before is None else before._began
        self.store: Store = SqliteStore(":memory:") if before is None else before.store
        self.said: dict[str, list[Word]] = {}
        self.not_found: Exception | None = None  # why the homeserver is not
        self.connected: dict[str, set[str]] = {}  # by LiveKit's room
        self.sfu_error: Exception | None = None  # of looks and removals
        self.look_errors: dict[str, Exception] = {}  # of looks only, by LiveKit's room
        self.in_look: Callable[[], Awaitable[None]] | None = None
        self.asked: list[tuple[float, str]] = []
        self.removals: list[tuple[float, str]] = []
        self.looks: list[tuple[float, str]] = []
        self.admitted: list[Sequence[Admission]] = []  # what came to the store, one transaction after another
        self.store_calls = 0
        self._calls_now = (0.0, 0)  # at what moment, how many
        self.store_works = asyncio.Event()
        self.store_works.set()
        self.store_error: Exception | None = None
        self.settle_error: Exception | None = None  # only of what has been checked
        self.settled_at: list[float] = []  # when what has been checked came to the store
        self.locked = False  # another instance is just claiming all that is due
        self.at_once: Counter[str] = Counter()  # questions, by homeserver
        self.most_at_once: Counter[str] = Counter()
        self.observer = _Observer()
        self.terms = Terms(True, INTERVAL, TIMEOUT, {SFU: Sfu(SfuAddress(SFU, "ws://127.0.0.1:1", "key", "sfu-secret"), 5.0)})
        self.membership = Membership(
            lambda: self.terms,
            self._in_store,
            cast(Homeservers, self),
            cast(ApplicationService, self),
            cast(RoomService, self),
            lambda: EPOCH + self.since,
            self.observer,
            random or Even(),
        )
        self.membership._seldom = Seldom(clock=loop.time)

    @property
    def since(self) -> float:
        """Seconds since the test began."""
        return asyncio.get_running_loop().time() - self._began

    async def _in_store(self, work: Callable[[Store], Any]) -> Any:
        self.store_calls += 1
        moment, calls = self._calls_now
        self._calls_now = (self.since, calls + 1 if moment == self.since else 1)
        assert self._calls_now[1] < 500, "it spins"  # instead of going on for ever: no time passes
        await asyncio.sleep(0)
        await self.store_works.wait()
        if self.store_error is not None:
            raise self.store_error
        return work(cast(Store, self))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def admit(self, admissions: Sequence[Admission]) -> None:
        """As the store does it, and watched."""
        self.admitted.append(admissions)
        self.store.admit(admissions)

    def settle_admissions(self, checked: Sequence[Admission], over: Sequence[Admission]) -> None:
        """As the store does it, if it can."""
        self.settled_at.append(self.since)
        if self.settle_error is not None:
            raise self.settle_error
        self.store.settle_admissions(checked, over)

    def admissions_due(self, now: float, limit: int, lease_ends: float) -> list[Admission]:
        """As the store does it, which passes over what somebody else has locked."""
        return [] if self.locked else self.store.admissions_due(now, limit, lease_ends)

    # ── the homeserver ──

    async def resolve(self, name: str) -> Homeserver:
        if self.not_found is not None:
            raise self.not_found
        return Homeserver(name, "http://127.0.0.1:1", as_token="as-secret")

    async def is_joined(self, homeserver: Homeserver, user: str, room_id: str, timeout: float) -> bool:  # noqa: ASYNC109
        assert (homeserver.name, room_id, timeout) == (user.partition(":")[2], MATRIX_ROOM, self.terms.timeout)
        self.asked.append((self.since, user))
        said = self.said.get(user, [True])
        word = said.pop(0) if len(said) > 1 else said[0]
        self.at_once[homeserver.name] += 1
        self.most_at_once |= self.at_once
        try:
            await asyncio.sleep(0.001)
            if isinstance(word, Exception):
                raise word
            return word if isinstance(word, bool) else await word()
        finally:
            self.at_once[homeserver.name] -= 1

    # ── the SFU ──

    async def remove(self, sfu: SfuAddress, room: str, identity: str, timeout: float) -> bool:  # noqa: ASYNC109
        assert (sfu.name, timeout) == (SFU, 5.0)
        if self.sfu_error is not None:
            raise self.sfu_error
        self.removals.append((round(self.since, 1), identity))
        there = self.connected.get(room, set())
        if identity not in there:
            return False
        there.remove(identity)
        return True

    async def look(self, sfu: SfuAddress, room: str, timeout: float) -> Sequence[Listed]:  # noqa: ASYNC109
        assert (sfu.name, timeout) == (SFU, 5.0)
        self.looks.append((round(self.since, 1), room))
        await asyncio.sleep(0.001)
        if error := self.sfu_error or self.look_errors.get(room):
            raise error
        if self.in_look is not None:
            await self.in_look()
        return tuple(Listed(identity, "S1", "ACTIVE", 1) for identity in sorted(self.connected.get(room, ())))

    # ── people ──

    async def given(self, *names: str, room: str = ROOM, homeserver: str = HOMESERVER) -> None:
        """These are given access tokens, all at once."""
        users = {name: user_of(name, homeserver) for name in names}
        await asyncio.gather(*(self.membership.given(SFU, room, f"id-{name}", homeserver, user, MATRIX_ROOM) for name, user in users.items()))

    def connects(self, *names: str, room: str = ROOM) -> None:
        """They do, and no webhook comes."""
        self.connected.setdefault(room, set()).update(f"id-{name}" for name in names)

    def joins(self, *names: str, room: str = ROOM) -> None:
        """They connect, and webhooks say so."""
        self.connects(*names, room=room)
        for name in names:
            self.membership.joined(Seen(SFU, room, f"id-{name}", Sighting.JOINED))

    def leaves(self, name: str) -> None:
        """Somebody leaves the call by itself."""
        self.connected[ROOM].remove(f"id-{name}")

    def is_in(self, name: str, room: str = ROOM) -> bool:
        """Is somebody in the call?"""
        return f"id-{name}" in self.connected.get(room, ())

    # ── what there is ──

    def kept(self) -> dict[str, tuple[float, float]]:
        """Who is watched: until when the last token is good, and when it is to be checked, in seconds since the test began."""
        found = select(self.store, "SELECT identity, until, due FROM admission")
        return {identity: (round(until - EPOCH, 1), round(due - EPOCH, 1)) for identity, until, due in found}

    def removed_at(self, name: str) -> list[float]:
        """When the SFU was asked to remove somebody, whether it was there or not."""
        return [at for at, identity in self.removals if identity == f"id-{name}"]

    def asked_at(self, name: str) -> list[float]:
        """When the homeserver was asked about somebody."""
        return [round(at, 1) for at, user in self.asked if user.startswith(f"@{name}:")]


def user_of(name: str, homeserver: str = HOMESERVER) -> str:
    return f"@{name}:{homeserver}"


async def passes(seconds: float) -> None:
    """So much time, which does not take any."""
    await asyncio.sleep(seconds)


async def until(stage: Stage, moment: float) -> None:
    """It is so late, in seconds since the test began."""
    await passes(moment - stage.since)


async def never() -> bool:
    """A homeserver that hangs."""
    await asyncio.Event().wait()
    raise AssertionError


@asynccontextmanager
async def running(stage: Stage) -> AsyncIterator[Stage]:
    """It checks whoever is due; what has been due at the start is checked."""
    task = asyncio.create_task(stage.membership.run())
    await passes(0.01)
    try:
        yield stage
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await passes(3600.0)  # of what goes on nevertheless somebody would hear


@asynccontextmanager
async def in_call(*names: str, **said: Word | list[Word]) -> AsyncIterator[Stage]:
    """These were given tokens, and have joined just now; what the homeserver says of them."""
    stage = Stage()
    stage.said = {user_of(name): list(words) if isinstance(words, list) else [words] for name, words in said.items()}
    async with running(stage):
        await stage.given(*names)
        stage.joins(*names)
        yield stage


# ── who is given a token ──


async def test_nothing_is_kept_where_membership_is_not_enforced() -> None:
    """Nor is the database touched: this is the way of every token."""
    stage = Stage()
    stage.terms.enforce = False
    await stage.given("alice")
    assert stage.store_calls == 0
    assert stage.kept() == {}


async def test_who_is_given_a_token_is_watched_as_long_as_one_can_be_good() -> None:
    """That is its hour, and as long as those are that LiveKit gives in its place: ten minutes, by clocks that may differ, and a check may come late.

    The first one is at the interval.
    """
    assert RENEWED == 600.0 + LEEWAY + LEASE
    stage = Stage()
    await passes(7.0)
    await stage.given("alice")
    ((admission,),) = stage.admitted
    assert admission[:6] == (SFU, ROOM, "id-alice", HOMESERVER, "@alice:hs.test", MATRIX_ROOM)
    assert admission[6:] == pytest.approx((EPOCH + 7.0 + 4380.0, EPOCH + 7.0 + INTERVAL), rel=0.0, abs=0.1)
    assert stage.kept() == {"id-alice": (7.0 + GOOD_FOR, 7.0 + INTERVAL)}


async def test_nobody_gets_a_token_before_it_is_kept_that_they_do() -> None:
    """Also where the database takes long."""
    stage = Stage()
    stage.store_works.clear()
    waiting = asyncio.create_task(stage.given("alice"))
    await passes(KEPT_WITHIN - 0.1)
    assert not waiting.done()
    stage.store_works.set()
    await waiting
    assert set(stage.kept()) == {"id-alice"}


async def test_many_are_kept_in_one_transaction() -> None:
    """All who come while the one before is under way; who comes twice is in it once."""
    stage = Stage()
    stage.store_works.clear()
    waiting = [asyncio.create_task(stage.given("alice"))]
    await passes(1.0)
    waiting += [asyncio.create_task(stage.given(f"p{n}")) for n in range(200)] + [asyncio.create_task(stage.given("p7"))]
    await passes(1.0)
    assert not any(task.done() for task in waiting)
    stage.store_works.set()
    await asyncio.gather(*waiting)
    assert [len(admissions) for admissions in stage.admitted] == [1, 200]
    assert len(stage.kept()) == 201


async def test_a_token_that_cannot_be_kept_is_not_given() -> None:
    """`Unavailable`, to everybody of the transaction, with the time after which to come again; afterwards all is well."""
    stage = Stage()
    stage.store_error = StoreUnavailable("The database failed: disk is full.")
    results = await asyncio.gather(*(stage.given(name) for name in ("alice", "bob", "carol")), return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * 3
    assert all(isinstance(result, Unavailable) and result.retry_after == membership.RETRY_AFTER for result in results)
    assert stage.kept() == {}
    stage.store_error = None
    await stage.given("bob")
    assert set(stage.kept()) == {"id-bob"}


async def test_a_database_that_hangs_is_not_waited_for_for_ever() -> None:
    """`Unavailable`, to each when it has waited so long; those who still wait when the database is back get theirs, and whoever does not is watched
    nevertheless.
    """
    assert KEPT_WITHIN == 5.0
    stage = Stage()
    stage.store_works.clear()

    async def ask(name: str) -> tuple[float, float]:
        with pytest.raises(Unavailable) as unavailable:
            await stage.given(name)
        return round(stage.since, 1), unavailable.value.retry_after or 0.0

    first = asyncio.create_task(ask("alice"))
    await passes(1.0)
    second = asyncio.create_task(ask("bob"))
    await passes(3.0)
    last = asyncio.create_task(stage.given("carol"))
    assert await first == (KEPT_WITHIN, membership.RETRY_AFTER)
    assert await second == (1.0 + KEPT_WITHIN, membership.RETRY_AFTER)
    assert stage.kept() == {}
    assert not last.done()
    stage.store_works.set()
    await last
    assert set(stage.kept()) == {"id-alice", "id-bob", "id-carol"}


async def test_a_defect_gives_no_token_either() -> None:
    """It comes through as it is; afterwards all is well."""
    stage = Stage()
    stage.store_error = KeyError("a defect")
    with pytest.raises(KeyError):
        await stage.given("alice")
    stage.store_error = None
    await stage.given("bob")
    assert set(stage.kept()) == {"id-bob"}


async def test_somebody_who_does_not_wait_for_the_token_keeps_nobody_from_theirs() -> None:
    """Its connection was cut; and it is watched, since nobody knows how far the token got."""
    stage = Stage()
    stage.store_works.clear()
    impatient, patient = asyncio.create_task(stage.given("alice")), asyncio.create_task(stage.given("bob"))
    await passes(1.0)
    impatient.cancel()
    await passes(1.0)
    stage.store_works.set()
    await patient
    assert impatient.cancelled()
    assert set(stage.kept()) == {"id-alice", "id-bob"}


# ── who joins ──


async def test_who_joins_is_checked_at_once() -> None:
    """And not before: the interval is long. Of who is in the Matrix room nothing is told."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice", "bob")
        await passes(100.0)
        assert stage.asked == []
        stage.joins("alice")
        await passes(0.1)
        assert (stage.asked_at("alice"), stage.asked_at("bob")) == ([100.0], [])
        await passes(1.0)
    assert stage.removals == []
    assert stage.observer.results == ["joined"]
    assert stage.is_in("alice")


async def test_who_joins_twice_is_checked_again() -> None:
    """At once, also when the check is under way: what is asked by then may be of the past."""

    async def slowly() -> bool:
        await passes(5.0)
        return True

    async with in_call("alice", alice=[slowly, True]) as stage:
        await passes(3.0)
        stage.joins("alice")
        stage.joins("alice")
        await passes(10.0)
        assert stage.asked_at("alice") == [0.0, 3.0]


async def test_of_who_was_given_no_token_here_nobody_is_asked() -> None:
    """Another service gave it, or it is a recorder's: that is none of ours, and the call goes on."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        stage.joins("stranger")
        await stage.given("stranger", room="elsewhere")
        stage.joins("stranger")
        await passes(200.0)
    assert stage.asked == []
    assert stage.removals == []


async def test_many_who_join_are_all_checked_at_once() -> None:
    """Also behind many others who are none of ours."""
    names = [f"p{n}" for n in range(2 * BATCH + 5)]
    stage = Stage()
    async with running(stage):
        await stage.given(*names)
        stage.joins(*(f"stranger{n}" for n in range(3 * BATCH)))
        stage.joins(*names)
        await passes(5.0)
        assert sorted(user for _, user in stage.asked) == sorted(user_of(name) for name in names)


ANSWERS: Mapping[str, Word] = {
    "yes": True,
    "no": False,
    "no answer": CannotAsk("it answers 502"),
    "hangs": never,
    "cannot tell": CannotTell("it does not tell who is in a room (MSC4502)"),
    "defect": RuntimeError("a defect"),
}


@pytest.mark.parametrize("word", ANSWERS.values(), ids=ANSWERS)
async def test_who_joins_is_watched_as_long_as_the_token_is_good_that_it_gets_by_that(word: Word) -> None:
    """Whatever the homeserver says, and also if it leaves before it can be removed: it comes back with that token, and is checked again."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        await until(stage, GOOD_FOR - 10.0)
        stage.said[user_of("alice")] = [word]
        before = len(stage.asked_at("alice"))
        stage.joins("alice")
        stage.leaves("alice")
        await passes(TIMEOUT + CONFIRMED_AFTER + 1.0)
        assert len(stage.asked_at("alice")) > before
        assert stage.kept()["id-alice"][0] == GOOD_FOR - 10.0 + RENEWED
        await until(stage, GOOD_FOR - 10.0 + 590.0)
        assert stage.observer.removals == []
        stage.said[user_of("alice")] = [False]
        stage.joins("alice")
        await passes(CONFIRMED_AFTER + 0.1)
        assert stage.removed_at("alice")[-1] == GOOD_FOR - 10.0 + 590.0 + CONFIRMED_AFTER
        assert stage.observer.removals == [SFU]


async def test_who_joins_with_a_fresh_token_is_watched_as_long_as_that_is_good() -> None:
    """Not shorter, and the SFU is not looked at for it."""
    async with in_call("alice") as stage:
        await passes(1.0)
        assert stage.kept()["id-alice"] == (GOOD_FOR, INTERVAL)
        assert stage.looks == []


async def test_of_very_many_who_join_the_last_are_checked_at_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits has a bound, and nobody is forgotten."""
    monkeypatch.setattr(membership, "JOINED_MOST", 2)
    async with in_call("alice", "bob", "carol") as stage:
        await passes(INTERVAL + 1.0)
        assert [len(stage.asked_at(name)) for name in ("alice", "bob", "carol")] == [2, 2, 1]
        assert stage.asked_at("carol") == [INTERVAL]


# ── who does not belong there ──


async def test_who_is_not_in_the_matrix_room_is_removed(log: io.StringIO) -> None:
    """When the homeserver has said so twice. That is counted, and logged without who it is in Matrix, or where."""
    async with in_call("alice", "bob", alice=False) as stage:
        await passes(CONFIRMED_AFTER - 0.1)
        assert (stage.asked_at("alice"), stage.removals) == ([0.0], [])
        await passes(0.2)
        assert stage.asked_at("alice") == [0.0, CONFIRMED_AFTER]
        assert stage.removals == [(CONFIRMED_AFTER, "id-alice")]
        assert (stage.is_in("alice"), stage.is_in("bob")) == (False, True)
        assert stage.observer.removals == [SFU]
        assert sorted(stage.observer.results) == ["joined", "not_joined", "not_joined"]
        assert lines(log) == [
            {
                "event": "participant_removed",
                "level": "info",
                "logger": "sfu_delegate.daemon.membership",
                "sfu": SFU,
                "room": ROOM,
                "identity": "id-alice",
                "homeserver": HOMESERVER,
                "reason": "its user is not in the Matrix room",
            }
        ]


async def test_who_comes_back_with_the_old_token_is_removed_again() -> None:
    """Each time that it joins; and when it is in the Matrix room again, it stays."""
    async with in_call("alice", alice=[False, False, False, False, True]) as stage:
        await passes(50.0)
        stage.joins("alice")
        await passes(50.0)
        assert stage.removals == [(2.0, "id-alice"), (52.0, "id-alice")]
        stage.joins("alice")
        await passes(50.0)
        assert len(stage.removals) == 2
        assert stage.is_in("alice")


async def test_a_homeserver_that_takes_back_its_no_removes_nobody() -> None:
    """It has just been restarted, say, or the user has come back."""
    async with in_call("alice", alice=[False, True]) as stage:
        await passes(10.0)
        assert stage.asked_at("alice") == [0.0, CONFIRMED_AFTER]
        assert stage.removals == []
        assert stage.kept()["id-alice"][1] == CONFIRMED_AFTER + INTERVAL


async def test_who_is_not_connected_is_removed_without_a_word(log: io.StringIO) -> None:
    """There is nobody to be removed, which is neither an error nor counted; it is watched on, since its token is good."""
    stage = Stage()
    stage.said[user_of("alice")] = [False]
    async with running(stage):
        await stage.given("alice")
        await passes(INTERVAL + CONFIRMED_AFTER + 1.0)
        assert stage.removals == [(INTERVAL + CONFIRMED_AFTER, "id-alice")]
        assert stage.observer.removals == []
        assert lines(log) == []
        stage.joins("alice")
        await passes(CONFIRMED_AFTER + 1.0)
        assert stage.observer.removals == [SFU]


async def test_between_the_two_questions_nobody_holds_a_place() -> None:
    """So that those who do not belong there are not checked more slowly than others."""
    names = [f"p{n}" for n in range(3 * AT_A_TIME)]
    async with in_call(*names, **dict.fromkeys(names, False)) as stage:
        await passes(0.1)
        assert sorted(user for _, user in stage.asked) == sorted(user_of(name) for name in names)
        await passes(CONFIRMED_AFTER)
        assert len(stage.observer.removals) == len(names)


# ── a homeserver that does not say it ──

UNHELPFUL: Mapping[str, tuple[Word, float, str]] = {
    "cannot ask": (CannotAsk("it answers 502"), AGAIN, "it answers 502"),
    "hangs": (never, TIMEOUT + AGAIN, "it does not answer in time"),
    "cannot tell": (CannotTell("it does not tell who is in a room (MSC4502)"), INTERVAL, "it does not tell who is in a room (MSC4502)"),
}
LATEST = CONFIRMED_AFTER + AGAIN + 2 * TOGETHER
"""Seconds: what is to be done sooner is done at the latest then, if it came up in a round that took more than a moment."""
unhelpful = pytest.mark.parametrize(("word", "again", "problem"), UNHELPFUL.values(), ids=UNHELPFUL)


@unhelpful
async def test_a_homeserver_that_does_not_answer_removes_nobody(log: io.StringIO, word: Word, again: float, problem: str) -> None:
    """It is asked again soon, or at the interval where it will not be able to say it soon; and that is one line, not one for each time."""
    async with in_call("alice", "bob", alice=word, bob=word) as stage:
        await passes(59.0)
        (line,) = lines(log)
        assert line == {
            "event": "membership_not_checked",
            "level": "warning",
            "logger": "sfu_delegate.daemon.membership",
            "homeserver": HOMESERVER,
            "sfu": SFU,
            "problem": problem,
            "times": 1,
        }
        await passes(3 * INTERVAL)
        asked = stage.asked_at("alice")
        pauses = [second - first for first, second in pairwise(asked)]
        assert again - 1.1 <= min(pauses) <= max(pauses) <= max(again + 0.2, LATEST if word is never else 0.0)
        assert stage.removals == []
        assert len(lines(log)) <= 1 + (59 + 3 * INTERVAL) / 60
        assert sum(line["times"] for line in lines(log)[:-1]) < 2 * len(asked)
        assert set(stage.observer.results) == {"cannot_tell" if again == INTERVAL else "unavailable"}


@unhelpful
async def test_a_no_that_is_not_confirmed_removes_nobody(word: Word, again: float, problem: str) -> None:
    """Whatever comes in place of the second one; next time two are needed again."""
    async with in_call("alice", alice=[False, word, False, True]) as stage:
        await passes(max(CONFIRMED_AFTER + again, LATEST) + CONFIRMED_AFTER + 1.0)
        first, second, third, fourth = stage.asked_at("alice")
        assert (first, second, fourth) == pytest.approx((0.0, CONFIRMED_AFTER, third + CONFIRMED_AFTER), abs=0.1)
        assert CONFIRMED_AFTER + again - 1.1 <= third <= max(CONFIRMED_AFTER + again, LATEST) + 0.2
        assert stage.removals == []
        assert stage.is_in("alice")


@pytest.mark.parametrize("error", [DiscoveryFailed("there is no .well-known"), NotServed("it is not configured")])
async def test_a_homeserver_that_is_not_found_removes_nobody(log: io.StringIO, error: Exception) -> None:
    """Nobody is asked, and that is tried again soon; when it is found, all goes on."""
    async with in_call("alice", alice=False) as stage:
        stage.not_found = error
        await passes(3 * AGAIN + 1.0)
        assert stage.asked == []
        assert stage.observer.results == ["unavailable"] * 4
        assert [line["problem"] for line in lines(log, "membership_not_checked")] == [str(error)]
        stage.not_found = None
        await passes(AGAIN + CONFIRMED_AFTER)
        assert len(stage.removals) == 1


async def test_a_homeserver_that_is_back_is_believed() -> None:
    """Its failures before count for nothing."""
    async with in_call("alice", alice=[CannotAsk("it answers 502"), never, CannotAsk("it answers 502"), False]) as stage:
        await passes(100.0)
        assert len(stage.asked_at("alice")) == 5
        assert len(stage.removals) == 1
        assert AGAIN + TIMEOUT + 2 * AGAIN <= stage.removed_at("alice")[0] <= 3 * (AGAIN + TOGETHER) + TIMEOUT + CONFIRMED_AFTER + 0.2


# ── a homeserver that hangs ──


async def test_a_homeserver_that_hangs_does_not_hold_up_another_one(log: io.StringIO) -> None:
    """It has its own places, and none of the others'; its users who get none of them wait, and their rounds do not."""
    hanging, others = [f"p{n}" for n in range(3 * AT_A_TIME)], [f"q{n}" for n in range(AT_A_TIME)]
    stage = Stage()
    stage.said = {user_of(name): [never] for name in hanging}
    async with running(stage):
        await asyncio.gather(stage.given(*hanging), stage.given(*others, homeserver=OTHER))
        stage.joins(*hanging, *others)
        await passes(0.1)
        asked = Counter(user.partition(":")[2] for _, user in stage.asked)
        assert asked == {HOMESERVER: AT_A_TIME, OTHER: AT_A_TIME}
        assert stage.observer.results == ["joined"] * AT_A_TIME
        await passes(PLACE_WITHIN)
        assert Counter(stage.observer.results) == {"joined": AT_A_TIME, "unavailable": 2 * AT_A_TIME}
        await passes(TIMEOUT)
        assert stage.observer.results.count("unavailable") == 3 * AT_A_TIME
        assert stage.most_at_once == {HOMESERVER: AT_A_TIME, OTHER: AT_A_TIME}
        assert {line["homeserver"] for line in lines(log)} == {HOMESERVER}
        assert stage.removals == []


async def test_who_joins_behind_a_thousand_of_a_homeserver_that_hangs_is_checked_soon() -> None:
    """The others wait no longer than until a place may be free."""
    hanging = [f"p{n}" for n in range(1000)]
    stage = Stage()
    stage.said = {user_of(name): [never] for name in hanging}
    async with running(stage):
        await asyncio.gather(stage.given(*hanging), stage.given("early", "late", homeserver=OTHER))
        stage.joins(*hanging, "early")
        await passes(5.0)
        stage.joins("late")
        await passes(15.0)
        rounds = 1 + len(hanging) // (BATCH // 2)  # of which one goes on, as long as it hangs
        assert [len(stage.asked_at(name)) for name in ("early", "late")] == [1, 1]
        for name in ("early", "late"):
            assert stage.asked_at(name)[0] <= PLACE_WITHIN * rounds / (ROUNDS - 1) + 0.1
        assert stage.most_at_once[HOMESERVER] == AT_A_TIME


async def test_those_who_join_leave_room_for_those_who_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many join, and however long their homeserver takes: at most half of those who are claimed together have joined."""
    monkeypatch.setattr(membership, "BATCH", AT_A_TIME)
    monkeypatch.setattr(membership, "ROUNDS", 4)
    joining, due = [f"p{n}" for n in range(16 * AT_A_TIME)], [f"q{n}" for n in range(AT_A_TIME)]
    stage = Stage()
    stage.said = {user_of(name): [never] for name in joining}
    async with running(stage):
        await stage.given(*due, homeserver=OTHER)
        await passes(1.0)
        await stage.given(*joining)
        await until(stage, INTERVAL - 2.0)
        stage.joins(*joining)
        await until(stage, INTERVAL + PLACE_WITHIN)
        assert [stage.asked_at(name) for name in due] == [[INTERVAL - 2.0 + PLACE_WITHIN]] * len(due)  # when the first rounds have ended


async def test_those_who_join_do_not_wait_for_those_who_are_due() -> None:
    """However many are: at most half of those who are claimed together have not joined, if so many have."""
    due, joining = [f"p{n}" for n in range(3 * BATCH * ROUNDS)], [f"q{n}" for n in range(BATCH // 2)]
    stage = Stage()
    stage.said = {user_of(name): [never] for name in due}
    async with running(stage):
        await asyncio.gather(stage.given(*due), stage.given(*joining, homeserver=OTHER))
        await until(stage, INTERVAL + 0.5)
        stage.joins(*joining)
        await passes(PLACE_WITHIN)
        assert [len(stage.asked_at(name)) for name in joining] == [1] * len(joining)


async def test_several_rounds_are_under_way_at_a_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who joins when there are as many as may be is checked as soon as one of them ends."""
    monkeypatch.setattr(membership, "ROUNDS", 2)

    async def slowly() -> bool:
        await passes(5.0)
        return True

    stage = Stage()
    stage.said = {user_of(name): [slowly] for name in ("alice", "bob", "carol", "dave")}
    async with running(stage):
        await stage.given("alice", "bob", "carol", "dave")
        for name in ("alice", "bob", "carol", "dave"):
            stage.joins(name)
            await passes(1.0)
        await passes(30.0)
        asked = [stage.asked_at(name) for name in ("alice", "bob", "carol", "dave")]
        assert asked == [[0.0], [1.0], [5.0], [5.0]]


# ── an SFU that fails ──


async def test_an_sfu_that_cannot_be_asked_is_asked_again_soon(log: io.StringIO) -> None:
    """After the homeserver, which may say something else by then; a line tells what is wrong."""
    async with in_call("alice", alice=False) as stage:
        stage.sfu_error = DOWN
        await passes(CONFIRMED_AFTER + 1.0)
        assert [line["problem"] for line in lines(log)] == [str(DOWN)]
        stage.sfu_error = None
        await passes(LATEST)
        again = stage.asked_at("alice")[2]
        assert CONFIRMED_AFTER + AGAIN - 1.1 <= again <= LATEST
        assert stage.asked_at("alice") == pytest.approx([0.0, CONFIRMED_AFTER, again, again + CONFIRMED_AFTER], abs=0.1)
        assert stage.removed_at("alice") == pytest.approx([again + CONFIRMED_AFTER], abs=0.1)
        assert stage.observer.removals == [SFU]


async def test_at_an_sfu_that_is_not_configured_any_more_nobody_is_removed(log: io.StringIO) -> None:
    """And nothing is wrong; when no token is good any more it is forgotten, since nobody can look who is there."""
    async with in_call("alice", "bob", alice=False) as stage:
        stage.terms.sfus = {}
        await passes(GOOD_FOR + INTERVAL + 10.0)
        assert stage.removals == []
        assert stage.looks == []
        assert stage.kept() == {}
        assert lines(log) == []


async def test_trouble_of_the_sfu_and_of_the_homeserver_are_told_separately(log: io.StringIO) -> None:
    """Each at most once a minute: the one does not hide the other."""
    async with in_call("alice", "bob", alice=CannotAsk("it answers 502"), bob=False) as stage:
        stage.sfu_error = DOWN
        await passes(59.0)
        told = [(line["homeserver"], line["sfu"], line["problem"], line["times"]) for line in lines(log, "membership_not_checked")]
        assert told == [(HOMESERVER, SFU, "it answers 502", 1), (HOMESERVER, SFU, str(DOWN), 1)]
        await passes(60.0)
        assert Counter(line["problem"] for line in lines(log)) == {"it answers 502": 2, str(DOWN): 2}


# ── again and again ──


async def test_everybody_is_checked_at_the_interval() -> None:
    """And whoever leaves the Matrix room in between is removed then."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        stage.connects("alice")
        await passes(2 * INTERVAL + 10.0)
        assert stage.asked_at("alice") == pytest.approx([INTERVAL, 2 * INTERVAL], abs=0.1)
        stage.said[user_of("alice")] = [False]
        await passes(INTERVAL)
        assert stage.removed_at("alice") == pytest.approx([3 * INTERVAL + CONFIRMED_AFTER], abs=0.1)


async def test_the_interval_of_the_present_configuration_counts() -> None:
    """From the next check on."""
    async with in_call("alice") as stage:
        await passes(1.0)
        stage.terms.interval = 20.0
        await passes(INTERVAL + 45.0)
        assert stage.asked_at("alice") == pytest.approx([0.0, INTERVAL, INTERVAL + 20.0, INTERVAL + 40.0], abs=0.1)


async def test_those_who_came_together_are_not_checked_together_for_ever() -> None:
    """Each pause differs by up to a tenth from the interval, and no homeserver gets all questions at once."""
    stage = Stage(random=Random(1))
    names = [f"p{n}" for n in range(50)]
    async with running(stage):
        await stage.given(*names)
        await passes(2.2 * INTERVAL)
    first, second = ([stage.asked_at(name)[turn] for name in names] for turn in (0, 1))
    assert set(first) <= {INTERVAL, INTERVAL + 0.1}
    assert 1.85 * INTERVAL < min(second) < 1.95 * INTERVAL
    assert 2.05 * INTERVAL < max(second) < 2.15 * INTERVAL
    assert len(set(second)) > 20


async def test_of_many_all_are_checked_once_and_a_few_at_a_time(log: io.StringIO) -> None:
    """However many are due: those that get no place soon come again a little later."""

    async def slowly() -> bool:
        await passes(0.3)
        return True

    stage = Stage()
    names = [f"p{n}" for n in range(3 * BATCH + 5)]
    stage.said = {user_of(name): [slowly] for name in names}
    async with running(stage):
        await stage.given(*names)
        await until(stage, INTERVAL + 5.0)
        at_first = len(stage.asked)
        assert PLACE_WITHIN == 3.0
        assert 10 * AT_A_TIME <= at_first <= 11 * AT_A_TIME
        assert all(at <= INTERVAL + PLACE_WITHIN + 0.1 for at, _ in stage.asked)
        assert Counter(stage.observer.results) == {"joined": at_first, "unavailable": len(names) - at_first}
        assert {line["problem"] for line in lines(log)} == {"it takes too long to answer others"}
        await passes(4 * AGAIN)
    assert sorted(user for _, user in stage.asked) == sorted(user_of(name) for name in names)
    assert stage.most_at_once == {HOMESERVER: AT_A_TIME}


async def test_of_two_instances_one_checks_whoever_is_due() -> None:
    """Also while its check takes long: as long as it can, the other one leaves that alone."""

    async def slowly() -> bool:
        await passes(TIMEOUT - 1.0)
        return True

    first = Stage()
    second = Stage(first)
    names = [f"p{n}" for n in range(AT_A_TIME)]
    await first.given(*names)
    async with running(first), running(second):
        for stage in (first, second):
            stage.said = {user_of(name): [slowly] for name in names}
        before = len(first.asked) + len(second.asked)
        await passes(INTERVAL + TIMEOUT + LONGEST_PAUSE)
        assert len(first.asked) + len(second.asked) == before + len(names)


async def test_where_nobody_is_due_the_database_is_left_alone() -> None:
    """There are two questions every half a minute: another instance may have put somebody there."""
    stage = Stage()
    async with running(stage):
        before = stage.store_calls
        await passes(20 * LONGEST_PAUSE)
        assert stage.store_calls - before == 2 * 20


async def test_what_is_due_and_cannot_be_claimed_is_tried_once_a_second() -> None:
    """Another instance is about to claim it, which may take a while, or come to nothing."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        stage.locked = True
        await until(stage, INTERVAL + 0.5)
        before = stage.store_calls
        await passes(20.0)
        assert 2 * 18 <= stage.store_calls - before <= 2 * 20 / TOGETHER + 2
        assert stage.asked == []
        stage.locked = False
        await passes(TOGETHER)
        assert len(stage.asked) == 1


async def test_who_is_due_within_a_second_is_checked_together() -> None:
    """In one round: nobody waits for it."""
    stage = Stage()
    async with running(stage):
        for name, at in (("alice", 15.0), ("bob", 15.4), ("carol", 15.9), ("dave", 16.6)):
            await until(stage, at)
            await stage.given(name)
        await until(stage, INTERVAL + 20.0)
        asked = [stage.asked_at(name) for name in ("alice", "bob", "carol", "dave")]
        assert asked == [[INTERVAL + 15.0]] * 3 + [[INTERVAL + 16.0]]
        assert [round(at, 1) for at in stage.settled_at] == [INTERVAL + 15.0, INTERVAL + 16.0]


async def test_those_who_are_due_one_after_another_make_one_round_a_second() -> None:
    """However many there are: each is two transactions."""
    assert TOGETHER == 1.0
    stage = Stage()
    async with running(stage):
        await passes(1.0)
        names = [f"p{n}" for n in range(600)]
        for name in names:
            await stage.given(name)
            await passes(0.1)
        before = stage.store_calls
        await until(stage, INTERVAL + 65.0)
        assert sorted(user for _, user in stage.asked) == sorted(user_of(name) for name in names)
        assert min(second - first for first, second in pairwise(stage.settled_at)) > TOGETHER - 0.1
        assert 55 <= len(stage.settled_at) <= 62
        pauses = 2 * (INTERVAL / LONGEST_PAUSE + 5)
        assert stage.store_calls - before <= 2 * len(stage.settled_at) + pauses


async def test_who_joins_does_not_wait_for_those_who_are_due_one_after_another() -> None:
    """It is checked at once, whenever in the second that is."""
    stage = Stage()
    async with running(stage):
        for n in range(100):
            await stage.given(f"p{n}")
            await passes(0.1)
        await stage.given("alice")
        for turn, at in enumerate((3.0, 4.2, 5.5, 7.9), 1):
            await until(stage, INTERVAL + at)
            stage.joins("alice")
            await passes(0.09)
            assert stage.asked_at("alice")[turn - 1 :] == [INTERVAL + at]


async def test_many_who_are_due_do_not_wait_for_the_next_second() -> None:
    """Where a round was well filled, the next one begins at once."""
    names = [f"p{n}" for n in range(2 * BATCH + BATCH // 2)]
    stage = Stage()
    async with running(stage):
        await stage.given(*names)
        await passes(INTERVAL + TOGETHER / 2)
        assert sorted(user for _, user in stage.asked) == sorted(user_of(name) for name in names)
        assert max(at for at, _ in stage.asked) < INTERVAL + TOGETHER / 2


# ── when the token is over ──


async def test_who_is_in_the_call_is_watched_beyond_its_token() -> None:
    """LiveKit gives it newer ones, as long as it is there. So it can be removed hours later."""
    async with in_call("alice") as stage:
        await passes(4 * GOOD_FOR)
        assert set(stage.kept()) == {"id-alice"}
        stage.said[user_of("alice")] = [False]
        await passes(INTERVAL + CONFIRMED_AFTER + 1.0)
        assert len(stage.removals) == 1
        assert not stage.is_in("alice")


async def test_who_is_not_in_the_call_is_forgotten_with_its_token() -> None:
    """Not before its last token is over, and then the homeserver is not asked any more."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        await passes(GOOD_FOR - 1.0)
        assert stage.kept()["id-alice"][0] == GOOD_FOR
        await passes(INTERVAL + 1.0)
        assert stage.kept() == {}
        asked = len(stage.asked)
        stage.joins("alice")
        await passes(2 * INTERVAL)
        assert len(stage.asked) == asked


async def test_in_good_time_before_a_token_is_over_the_sfu_is_looked_at() -> None:
    """From the last check before its own expires on: whoever is there is watched until a token is over that the SFU gives it just before the next."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        stage.connects("alice")
        own = GOOD_FOR - RENEWED
        await until(stage, own - INTERVAL - 1.0)
        assert stage.looks == []
        assert stage.kept()["id-alice"][0] == GOOD_FOR
        for turn in range(12):
            at = own + (turn - 1) * INTERVAL
            await until(stage, at + 1.0)
            assert stage.looks[turn:] == [(at, ROOM)]
            assert stage.kept()["id-alice"] == (at + INTERVAL + RENEWED, at + INTERVAL)


async def test_a_longer_interval_has_the_sfu_looked_at_earlier() -> None:
    """What counts is whether there is another check in time."""
    stage = Stage()
    stage.terms.interval = 1000.0
    async with running(stage):
        await stage.given("alice")
        stage.connects("alice")
        await until(stage, 2001.0)
        assert stage.looks == []
        await until(stage, 3001.0)
        assert stage.looks == [(3000.0, ROOM)]
        assert stage.kept()["id-alice"] == (4000.0 + RENEWED, 4000.0)


@pytest.mark.parametrize("turn", [0, 1, 5])
async def test_a_token_that_was_renewed_just_before_its_owner_left_is_outlived(turn: int) -> None:
    """Whoever leaves the call just before a check, and then the Matrix room, cannot come back unseen with what LiveKit gave it last."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        stage.connects("alice")
        left = 3600.0 + turn * INTERVAL - 1.0
        await until(stage, left)
        stage.leaves("alice")
        stage.said[user_of("alice")] = [False]
        await until(stage, left + RENEWED - 1.0)
        assert set(stage.kept()) == {"id-alice"}
        stage.joins("alice")
        await passes(CONFIRMED_AFTER + 1.0)
        assert stage.observer.removals == [SFU]


async def test_who_has_left_the_call_is_forgotten_when_its_last_token_is_over() -> None:
    """At the first check after that, and at none before."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        stage.connects("alice")
        await until(stage, 6100.0)
        stage.leaves("alice")
        over = 6000.0 + INTERVAL + RENEWED
        await until(stage, over - 1.0)
        assert stage.kept()["id-alice"][0] == over
        await until(stage, over + INTERVAL)
        assert stage.kept() == {}


async def test_who_was_removed_when_its_token_was_nearly_over_is_watched_longer() -> None:
    """LiveKit may have given it a new one just before: it comes back with that, and is removed again. If it does not, it is forgotten in the end."""
    stage = Stage()
    stage.said[user_of("alice")] = [False]
    async with running(stage):
        await stage.given("alice")
        at = GOOD_FOR - 10.0
        for times in (1, 2, 3):
            await until(stage, at)
            stage.joins("alice")
            await passes(CONFIRMED_AFTER + 1.0)
            assert stage.observer.removals == [SFU] * times
            assert stage.kept()["id-alice"][0] == pytest.approx(at + CONFIRMED_AFTER + RENEWED, abs=0.1)
            at += 599.0
        over = at - 599.0 + CONFIRMED_AFTER + RENEWED
        await until(stage, over - 1.0)
        assert set(stage.kept()) == {"id-alice"}
        await passes(INTERVAL + 10.0)
        assert stage.kept() == {}


async def test_who_was_not_there_to_be_removed_is_not_watched_longer() -> None:
    """The homeserver says no for ever, and is not asked for ever."""
    stage = Stage()
    stage.said[user_of("alice")] = [False]
    async with running(stage):
        await stage.given("alice")
        await passes(GOOD_FOR - 1.0)
        assert stage.kept()["id-alice"][0] == GOOD_FOR
        await passes(INTERVAL + 10.0)
        assert stage.kept() == {}
        assert len(stage.removals) > 10
        assert stage.observer.removals == []


FAILING: Mapping[str, Word] = {
    **{name: word for name, (word, _, _) in UNHELPFUL.items()},
    "not found": DiscoveryFailed("there is no .well-known"),
    "not configured": NotServed("it is not configured"),
    "defect": RuntimeError("a defect"),
}


@pytest.mark.parametrize("word", FAILING.values(), ids=FAILING)
@pytest.mark.usefixtures("leisurely")
async def test_a_homeserver_that_fails_has_nobody_watched_for_ever(word: Word) -> None:
    """Those who are not in the call are forgotten with their tokens, not before; of those who are nobody is."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice", "bob")
        stage.connects("bob")
        if isinstance(word, DiscoveryFailed):
            stage.not_found = word
        else:
            stage.said = {user_of(name): [word] for name in ("alice", "bob")}
        await passes(GOOD_FOR - 1.0)
        assert set(stage.kept()) == {"id-alice", "id-bob"}
        assert stage.kept()["id-alice"][0] == GOOD_FOR
        await passes(INTERVAL + 10.0)
        assert set(stage.kept()) == {"id-bob"}
        await passes(2 * RENEWED)
        assert set(stage.kept()) == {"id-bob"}
        assert stage.removals == []


@pytest.mark.parametrize("word", [True, False, CannotAsk("it answers 502")], ids=["yes", "no", "no answer"])
@pytest.mark.usefixtures("leisurely")
async def test_while_the_sfu_cannot_be_looked_at_everybody_is_watched(log: io.StringIO, word: Word) -> None:
    """Whatever the homeserver says, for days, and each time for as long as a token is good that the SFU may give just before the next check; that is
    told, once a minute at the most.
    """
    stage = Stage()
    stage.said[user_of("alice")] = [word]
    async with running(stage):
        await stage.given("alice")
        stage.sfu_error = DOWN
        await until(stage, 0.9 * (GOOD_FOR - RENEWED - INTERVAL))
        assert stage.kept()["id-alice"][0] == GOOD_FOR
        for hours in (2, 24, 72):
            await until(stage, hours * 3600.0)
            good_until, due = stage.kept()["id-alice"]
            assert stage.since - 2.0 < due < stage.since + 1.1 * INTERVAL
            assert good_until == pytest.approx(due + RENEWED, abs=0.1)
        problems = [line["problem"] for line in lines(log, "membership_not_checked")]
        assert str(DOWN) in problems
        assert len(problems) <= 2 * 72 * 60
        assert set(problems) == {str(DOWN)} | ({str(word)} if isinstance(word, Exception) else set())


@pytest.mark.parametrize("word", [True, False, CannotAsk("it answers 502")], ids=["yes", "no", "no answer"])
@pytest.mark.usefixtures("leisurely")
async def test_an_sfu_that_is_back_tells_who_is_forgotten(word: Word) -> None:
    """Who is in the call is watched on, and nobody else for longer than a token may be good."""
    async with in_call("alice", "bob", bob=word) as stage:
        stage.leaves("bob")
        stage.sfu_error = DOWN
        await until(stage, 24 * 3600.0)
        assert set(stage.kept()) == {"id-alice", "id-bob"}
        over = stage.kept()["id-bob"][0]
        stage.sfu_error = None
        await until(stage, over - 1.0)
        assert stage.kept()["id-bob"][0] == over
        await passes(INTERVAL + 10.0)
        assert set(stage.kept()) == {"id-alice"}
        assert stage.kept()["id-alice"][0] > stage.since + RENEWED
        assert stage.observer.removals == []


async def test_a_defect_in_a_look_holds_up_nobody_else(log: io.StringIO) -> None:
    """It is told without the text; the others of the round are settled as ever, and whoever was to be looked for is watched on."""
    stage = Stage()
    stage.look_errors["elsewhere"] = RuntimeError("of @alice:hs.test")
    async with running(stage):
        await asyncio.gather(stage.given("alice", "bob", room="elsewhere"), stage.given("carol", "dave"))
        stage.connects("carol")
        turns = 12
        await until(stage, turns * INTERVAL + 1.0)
        assert stage.looks[-2:] == [(turns * INTERVAL, "elsewhere"), (turns * INTERVAL, ROOM)]  # one round
        going_on = ((turns + 1) * INTERVAL + RENEWED, (turns + 1) * INTERVAL)
        assert stage.kept() == dict.fromkeys(("id-alice", "id-bob", "id-carol"), going_on) | {"id-dave": (GOOD_FOR, (turns + 1) * INTERVAL)}
        told = lines(log)
        assert {(line["event"], line["error"]) for line in told} == {("membership_check_failed", "RuntimeError")}
        assert told[0]["at"]
        await until(stage, 2 * GOOD_FOR)
        assert set(stage.kept()) == {"id-alice", "id-bob", "id-carol"}


async def test_who_was_removed_is_watched_until_its_token_is_over() -> None:
    """Then it is forgotten, since it is not in the call."""
    async with in_call("alice", alice=False) as stage:
        await passes(GOOD_FOR - 1.0)
        assert set(stage.kept()) == {"id-alice"}
        await passes(INTERVAL + 10.0)
        assert stage.kept() == {}


async def test_who_is_in_the_call_is_watched_also_where_the_homeserver_cannot_tell() -> None:
    """Beyond its token: perhaps somebody mends that, and then it counts."""
    async with in_call("alice", alice=CannotTell("it does not tell who is in a room (MSC4502)")) as stage:
        await passes(2 * GOOD_FOR)
        assert set(stage.kept()) == {"id-alice"}
        stage.said[user_of("alice")] = [False]
        await passes(1.2 * INTERVAL)
        assert not stage.is_in("alice")


async def test_one_look_tells_of_all_in_a_room() -> None:
    """Those who are there stay watched, those who are not do not; each room is looked at by itself."""
    stage = Stage()
    there, away, elsewhere = [f"p{n}" for n in range(9)], [f"q{n}" for n in range(4)], [f"r{n}" for n in range(3)]
    async with running(stage):
        await asyncio.gather(stage.given(*there, *away), stage.given(*elsewhere, room="elsewhere"))
        stage.connects(*there)
        stage.connects(*elsewhere, room="elsewhere")
        stage.connects(*away, room="elsewhere")
        await passes(GOOD_FOR + INTERVAL)
        times = [3300.0, 3600.0, 3900.0, 4200.0, 4500.0]
        assert sorted(stage.looks) == [(at, room) for at in times for room in ("elsewhere", ROOM)]
        assert set(stage.kept()) == {f"id-{name}" for name in there + elsewhere}


async def test_who_is_given_another_token_is_not_forgotten_with_the_first() -> None:
    """Also when it comes in the very moment in which the first one is found to be over."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        await passes(GOOD_FOR - 1.0)
        stage.in_look = lambda: stage.given("alice")
        before = len(stage.looks)
        await passes(INTERVAL)
        ((looked_at, _),) = stage.looks[before:]
        assert looked_at > GOOD_FOR
        assert stage.kept()["id-alice"][0] == pytest.approx(looked_at + GOOD_FOR, abs=0.2)


# ── the life of the daemon ──


async def test_after_a_restart_all_are_checked() -> None:
    """Also whom the one before was checking. What came while nobody listened is lost, and they may have joined by then."""
    before = Stage()
    before.said[user_of("alice")] = [False]
    async with running(before):
        await before.given("alice", "bob")
        before.joins("alice")
        await passes(1.0)
    assert before.removals == []  # it was stopped between the two questions
    stage = Stage(before)
    stage.connects("alice", "bob")
    stage.said[user_of("alice")] = [False]
    start = round(stage.since, 1)
    async with running(stage):
        await passes(CONFIRMED_AFTER + 1.0)
        assert stage.asked_at("alice") == pytest.approx([start, start + CONFIRMED_AFTER], abs=0.1)
        assert stage.asked_at("bob") == [start]
        assert (stage.is_in("alice"), stage.is_in("bob")) == (False, True)


@pytest.mark.parametrize("word", [True, CannotAsk("it answers 502")], ids=["yes", "no answer"])
async def test_who_left_while_the_daemon_was_away_cannot_come_back_unseen(word: Word) -> None:
    """Its token was over by what is known, but LiveKit has given it newer ones while nobody watched; so all are good for as long as these may be."""
    before = Stage()
    async with running(before):
        await before.given("alice", "bob")
        before.joins("alice")
        await passes(900.0)
    await passes(-1.0)  # `running` was an hour in waiting for what goes on
    stage = Stage(before)
    left = GOOD_FOR - 1.0
    start = stage.since
    assert left + 60.0 < start < left + 590.0
    stage.said[user_of("alice")] = [word]
    async with running(stage):
        await passes(1.0)
        assert stage.asked_at("alice") == stage.asked_at("bob") == [round(start, 1)]
        assert [good_until for good_until, _ in stage.kept().values()] == pytest.approx([start + RENEWED] * 2, abs=0.1)
        await until(stage, left + 590.0)
        stage.said[user_of("alice")] = [False]
        stage.joins("alice")
        await passes(CONFIRMED_AFTER + 0.1)
        assert stage.observer.removals == [SFU]
        await until(stage, start + RENEWED - 1.0)
        assert set(stage.kept()) == {"id-alice", "id-bob"}
        await passes(INTERVAL + 2.0)
        assert set(stage.kept()) == {"id-alice"}  # who has been there since


async def test_a_reload_has_everybody_watched_as_long_as_a_token_may_be_good() -> None:
    """For a while nobody may have watched."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        await until(stage, GOOD_FOR - 2000.0)
        stage.membership.reconsider()
        await passes(0.1)
        assert stage.kept()["id-alice"] == (GOOD_FOR, GOOD_FOR - 2000.0 + INTERVAL)
        stage.terms = replace(stage.terms, enforce=False)
        stage.membership.reconsider()
        await until(stage, GOOD_FOR + 500.0)
        stage.terms = replace(stage.terms, enforce=True)
        stage.membership.reconsider()
        await passes(0.1)
        assert stage.asked_at("alice")[-1] == GOOD_FOR + 500.0
        assert stage.kept()["id-alice"] == (GOOD_FOR + 500.0 + RENEWED, GOOD_FOR + 500.0 + INTERVAL)


async def test_it_can_be_switched_off_and_on() -> None:
    """Off: nobody is checked, whoever joins. On: everybody is, who was given a token that may be good."""
    async with in_call("alice") as stage:
        await passes(1.0)
        stage.terms.enforce = False
        stage.membership.reconsider()
        stage.said[user_of("alice")] = [False]
        stage.joins("alice")
        await passes(2 * INTERVAL)
        stage.joins("alice")
        await stage.given("bob")
        await passes(2 * INTERVAL)
        assert stage.asked_at("alice") == [0.0]
        assert stage.removals == []
        stage.terms.enforce = True
        stage.membership.reconsider()
        await passes(CONFIRMED_AFTER + 1.0)
        assert stage.asked_at("alice")[1:] == pytest.approx([4 * INTERVAL + 1.0, 4 * INTERVAL + 3.0], abs=0.1)
        assert stage.removed_at("alice") == pytest.approx([4 * INTERVAL + 3.0], abs=0.1)
        assert set(stage.kept()) == {"id-alice"}


async def test_who_joined_just_before_it_was_switched_off_is_not_checked() -> None:
    """Nobody is removed by what is not in force any more."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        stage.said[user_of("alice")] = [False]
        stage.joins("alice")
        stage.terms.enforce = False
        await passes(2 * INTERVAL)
        assert stage.asked == []


@pytest.mark.parametrize("change", [{"enforce": False}, {"sfus": {}}], ids=str)
async def test_what_is_switched_off_between_the_two_questions_removes_nobody(change: dict[str, Any]) -> None:
    """What counts is what is in force when somebody is removed."""
    async with in_call("alice", alice=False) as stage:
        await passes(CONFIRMED_AFTER / 2)
        stage.terms = replace(stage.terms, **change)
        stage.membership.reconsider()
        await passes(3 * INTERVAL)
        assert CONFIRMED_AFTER in stage.asked_at("alice")
        assert stage.removals == []
        assert stage.observer.removals == []
        assert stage.is_in("alice")
        assert set(stage.kept()) == {"id-alice"}


async def test_a_new_configuration_has_everybody_checked() -> None:
    """What was wrong with the homeserver may be mended by it."""
    async with in_call("alice", alice=[CannotTell("it does not tell who is in a room (MSC4502)"), False]) as stage:
        await passes(50.0)
        assert stage.asked_at("alice") == [0.0]
        stage.membership.reconsider()
        await passes(CONFIRMED_AFTER + 1.0)
        assert stage.removed_at("alice") == pytest.approx([50.0 + CONFIRMED_AFTER], abs=0.1)


async def test_when_it_is_stopped_so_is_all_that_it_does() -> None:
    """Questions under way, and pauses before the second: nobody is removed afterwards, and no task is left."""
    others = asyncio.all_tasks()
    stage = Stage()
    stage.said = {user_of("alice"): [False], user_of("bob"): [never]}
    task = asyncio.create_task(stage.membership.run())
    await stage.given("alice", "bob", "carol")
    stage.joins("bob", "carol")
    await passes(1.0)
    stage.joins("alice")
    await passes(1.0)
    assert stage.at_once[HOMESERVER] == 1
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert stage.at_once[HOMESERVER] == 0
    assert asyncio.all_tasks() == others
    await passes(3600.0)
    assert stage.removals == []


async def test_whoever_stops_it_waits_until_all_has_ended() -> None:
    """Also what takes a while to end: afterwards nothing uses what is closed then."""
    others = asyncio.all_tasks()
    ended = []

    async def ends_slowly() -> bool:
        try:
            return await never()
        finally:
            await passes(3.0)
            ended.append(round(stage.since, 1))

    stage = Stage()
    stage.said = {user_of("alice"): [ends_slowly]}
    task = asyncio.create_task(stage.membership.run())
    await stage.given("alice")
    stage.joins("alice")
    await passes(1.0)
    task.cancel()
    await asyncio.wait([task])
    assert ended == [4.0]
    assert task.cancelled()
    assert asyncio.all_tasks() == others


@pytest.mark.parametrize("of_look", ["hangs", "has failed", "succeeds"])
async def test_when_it_is_stopped_nobody_hears_of_looks(of_look: str) -> None:
    """None is left behind, and none has failed without somebody who asks."""
    others = asyncio.all_tasks()
    stage = Stage()

    async def in_look() -> None:
        await passes(0.5)
        if of_look == "has failed":
            raise DOWN
        if of_look == "hangs":
            await never()

    task = asyncio.create_task(stage.membership.run())
    await stage.given("alice", "bob")
    await until(stage, GOOD_FOR - 10.0)
    stage.in_look = in_look
    stage.said = {user_of("bob"): [never]}  # so that its round goes on
    before = len(stage.looks)
    stage.joins("alice", "bob")
    await passes(1.0)
    assert len(stage.looks) == before + 1
    assert stage.at_once[HOMESERVER] == 1
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert asyncio.all_tasks() == others
    del task
    gc.collect()  # then asyncio complains of failures that nobody has asked for
    await passes(1.0)


async def test_whoever_waits_for_a_look_no_more_is_no_matter_for_the_others() -> None:
    """They are told; and where nobody waits, nobody hears of its failure."""

    async def look(sfu: str, room: str) -> frozenset[str]:
        await passes(1.0)
        if room == "elsewhere":
            raise DOWN
        return frozenset({"id-alice"})

    rooms = _Rooms(look)
    first, second, alone = (asyncio.create_task(rooms.of(SFU, room)) for room in (ROOM, ROOM, "elsewhere"))
    await passes(0.5)
    first.cancel()
    alone.cancel()
    assert await second == {"id-alice"}
    await passes(1.0)
    assert first.cancelled()
    assert alone.cancelled()
    rooms.stop()
    del rooms, first, second, alone
    gc.collect()
    await passes(1.0)


async def test_a_defect_does_not_end_it(log: io.StringIO) -> None:
    """It is told without the text, which nobody knows, and holds up nobody else; whoever was being checked is checked again soon."""
    async with in_call("alice", "bob", alice=[RuntimeError("of @alice:hs.test in !secret-room:hs.test"), False]) as stage:
        await passes(1.0)
        (line,) = lines(log)
        assert (line["event"], line["error"]) == ("membership_check_failed", "RuntimeError")
        assert line["at"]
        assert stage.removals == []
        assert stage.kept()["id-bob"][1] == INTERVAL
        await passes(AGAIN + CONFIRMED_AFTER)
        assert stage.removed_at("alice") == pytest.approx([AGAIN + CONFIRMED_AFTER], abs=0.1)
        assert stage.asked_at("bob") == [0.0]


async def test_a_defect_of_the_whole_does_not_end_it(log: io.StringIO) -> None:
    """It is told without the text, and tried again."""
    async with in_call("bob") as stage:
        await passes(1.0)
        stage.store_error = RuntimeError("of @alice:hs.test")
        stage.joins("bob")
        await passes(59.0)
        (first,) = lines(log)
        assert (first["event"], first["error"], first["times"]) == ("membership_check_failed", "RuntimeError", 1)
        await passes(60.0)
        _, second = lines(log)
        assert (second["event"], second["error"]) == ("membership_check_failed", "RuntimeError")
        assert 5 <= second["times"] <= 7
        stage.store_error = None
        await passes(INTERVAL)
        assert len(stage.asked_at("bob")) >= 2


async def test_a_database_that_is_away_is_waited_for(log: io.StringIO) -> None:
    """Who joined meanwhile is checked as soon as it is back, and nothing more is told of it here: the engine does."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        stage.store_error = StoreUnavailable("The database failed: disk is full.")
        stage.said[user_of("alice")] = [False]
        stage.joins("alice")
        await passes(3 * AGAIN)
        assert stage.asked == []
        calls = stage.store_calls
        assert calls < 20
        stage.store_error = None
        await passes(AGAIN + CONFIRMED_AFTER + 1.0)
        assert len(stage.removals) == 1
        assert lines(log, "membership_check_failed") == []


@pytest.mark.parametrize("error", [StoreUnavailable("The database failed: disk is full."), RuntimeError("of @alice:hs.test")])
async def test_a_result_that_cannot_be_kept_is_no_loss(log: io.StringIO, error: Exception) -> None:
    """The database went away during the check: whoever was removed is, and it is checked again when the claim has ended. A defect is told."""
    async with in_call("alice", alice=False) as stage:
        await passes(1.0)
        stage.settle_error = error
        await passes(CONFIRMED_AFTER)
        assert len(stage.removals) == 1
        stage.settle_error = None
        assert stage.kept()["id-alice"][1] == LEASE
        assert len(lines(log, "membership_check_failed")) == isinstance(error, RuntimeError)
        stage.connects("alice")
        await passes(LEASE + CONFIRMED_AFTER)
        assert len(stage.removals) == 2


async def test_who_left_while_the_database_was_away_cannot_come_back_unseen() -> None:
    """The SFU has given newer tokens all that time, and nobody could look."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        stage.joins("alice")
        await until(stage, GOOD_FOR + 1000.0)
        stage.store_error = StoreUnavailable("x")
        await passes(GOOD_FOR)
        stage.leaves("alice")
        await passes(5.0)
        stage.store_error = None
        await passes(60.0)
        assert stage.kept()["id-alice"][0] > 2 * GOOD_FOR + 1000.0
        stage.said[user_of("alice")] = [False]
        stage.joins("alice")
        await passes(2 * CONFIRMED_AFTER + 1.0)
        assert len(stage.removals) == 1


async def test_reloads_have_nobody_watched_for_ever() -> None:
    """Everybody is checked after each, and watched for as long as a token can be good."""
    stage = Stage()
    async with running(stage):
        await stage.given("alice")
        for _ in range(round(GOOD_FOR / 500.0) + 2):
            stage.membership.reconsider()
            await passes(500.0)
        assert stage.kept() == {}


# ── what is under way meanwhile ──


async def test_what_did_not_answer_is_tried_again_soon_also_when_a_round_takes_long() -> None:
    """A round that is under way keeps nobody from seeing when its own are due again."""
    async with in_call("alice", alice=[False, CannotAsk("502"), True]) as stage:
        await passes(CONFIRMED_AFTER + AGAIN + 2 * TOGETHER)
        assert len(stage.asked_at("alice")) == 3


async def test_a_short_interval_holds_also_where_a_homeserver_takes_its_time() -> None:
    """And from the first check on."""

    async def slowly() -> bool:
        await passes(1.5)
        return True

    stage = Stage()
    stage.terms.interval = 10.0
    stage.said[user_of("alice")] = [slowly]
    async with running(stage):
        await passes(3.3)
        await stage.given("alice")
        given = 3.3
        await passes(200.0)
        asked = [given, *stage.asked_at("alice")]
        assert max(later - earlier for earlier, later in pairwise(asked)) < 11.0 + 1.5 + 2 * TOGETHER


async def test_who_joins_is_watched_longer_also_when_the_result_cannot_be_kept() -> None:
    """The SFU has given a newer token, whatever comes of the check."""
    async with in_call() as stage:
        await stage.given("alice")
        await until(stage, GOOD_FOR - 10.0)
        stage.settle_error = StoreUnavailable("x")
        stage.joins("alice")
        stage.leaves("alice")
        await passes(5.0)
        stage.settle_error = None
        await passes(550.0)
        assert set(stage.kept()) == {"id-alice"}


async def test_who_joins_while_a_round_has_found_it_over_is_watched() -> None:
    """That round waits for somebody else's answer yet, and the one of the joining is not done when it ends."""

    async def slowly() -> bool:
        await passes(8.0)
        return True

    stage = Stage()
    async with running(stage):
        await stage.given("alice", "bob")
        stage.connects("bob")
        await until(stage, GOOD_FOR - 1.0)
        stage.said[user_of("bob")] = [slowly]
        await until(stage, GOOD_FOR + 4.0)
        assert stage.asked_at("alice")[-1] == stage.asked_at("bob")[-1]
        assert set(stage.kept()) == {"id-alice", "id-bob"}
        stage.said[user_of("alice")] = [slowly]
        stage.joins("alice")
        stage.leaves("alice")
        await passes(20.0)
        assert stage.asked_at("alice")[-1] == GOOD_FOR + 4.0
        assert set(stage.kept()) == {"id-alice", "id-bob"}
