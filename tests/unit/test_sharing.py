"""One of several instances: it follows the database's clock, takes over what others have changed, and does nothing whose lease has ended."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfu_delegate.daemon import sharing
from sfu_delegate.daemon.clock import SET_IF_BEYOND, Clock
from sfu_delegate.daemon.sharing import COUNT_EVERY, COUNT_PART, COUNT_SELDOM, Sharing, instance_name, keep_to, meet
from sfu_delegate.delegation.model import Answered, Looked, Presence, Room, Task, Verdict
from sfu_delegate.delegation.reach import OTHERS_COUNT, Reach
from sfu_delegate.delegation.replies import Touched
from sfu_delegate.engine import DOUBTS_A_TIME, Engine, Limits
from sfu_delegate.store.base import Heard, Instance, StoreUnavailable
from sfu_delegate.store.census import StoreCensus
from sfu_delegate.store.postgresql import PostgresStore
from sfu_delegate.store.sqlite import SqliteStore

from tests.integration.daemon import captured_log
from tests.rows import HOMESERVER, NOW, POLICY, ROOM, SFU, accept, joined, left
from tests.unit.test_actions import LOOK, SEND, Bench

# ── time ──


@given(ours=st.floats(-1e4, 1e4), theirs=st.floats(-1e4, 1e4), asked=st.floats(0, 1e5), way_there=st.floats(0, 3), way_back=st.floats(0, 3))
def test_a_clock_follows_another_one_as_far_as_is_certain(ours: float, theirs: float, asked: float, way_there: float, way_back: float) -> None:
    """Afterwards the two agree but for the time that the answer took; a clock that may be right is not moved."""
    clock = Clock()
    clock._booted = 1e9 + ours
    before = clock._booted
    moved = clock.follow(1e9 + theirs + asked + way_there, asked, asked + way_there + way_back)
    assert abs(clock._booted - (1e9 + theirs)) <= way_there + way_back + 1e-3
    assert clock._booted == before + moved
    if abs(ours - theirs) <= min(way_there, way_back):
        assert abs(moved) < 1e-3


class FakeStore:
    """A database's clock, and what else is asked of it."""

    def __init__(self, ahead: float) -> None:
        self.ahead = ahead
        self.alive: float | None = None
        self.set_at: list[float] = []
        self.broken = False
        self.fails = False
        self.census_taken = 0
        self.there: set[str] = set()

    def listed(self, names: set[str]) -> set[str]:
        return self.there & names

    def time(self) -> float:
        if self.broken:
            raise StoreUnavailable("it is away")
        return Clock()() + self.ahead

    def newest_sign_of_life(self) -> float | None:
        return self.alive

    def times_are_unknown(self, now: float, policy: object) -> None:
        if self.fails:
            self.fails = False
            raise StoreUnavailable("cut")
        self.set_at.append(now)

    def census(self) -> StoreCensus:
        self.census_taken += 1
        return StoreCensus(states={(HOMESERVER, "live", "connected"): 7})

    @property
    def postgres(self) -> PostgresStore:
        return cast(PostgresStore, self)


class FakeEngine:
    policy = POLICY

    def __init__(self) -> None:
        self.refreshed: list[float] = []
        self.counted: list[Any] = []
        self.moved: list[float] = []
        self.instances: list[Instance] = []
        self.has_namesake = False

    def clock_moved(self, by: float, now: float) -> None:
        self.moved.append(by)

    def refresh(self, now: float) -> float:
        self.refreshed.append(now)
        return now + 7

    def recount(self, census: Any) -> None:
        self.counted.append(census)

    @property
    def engine(self) -> Engine:
        return cast(Engine, self)


def test_an_instance_begins_with_the_databases_time() -> None:
    """However wrong its own is; and finds out that times in the database lie in the future."""
    store, clock = FakeStore(5000.0), Clock()
    assert meet(store.postgres, clock)
    assert clock() == pytest.approx(Clock()() + 5000.0, abs=1.0)
    store.alive = clock() - 100
    assert meet(store.postgres, clock)
    store.alive = clock() + SET_IF_BEYOND + 10
    assert not meet(store.postgres, clock)


def test_small_differences_are_followed_quietly_and_a_step_is_told() -> None:
    """And everything that is stored is brought into line, however often that has to be tried."""
    store, engine, clock = FakeStore(0.0), FakeEngine(), Clock()
    ours = Sharing(engine.engine, store.postgres, clock)
    with captured_log() as log:
        ours.refresh()
        store.ahead = 2.0
        ours.refresh()
        assert not store.set_at
        assert clock() == pytest.approx(Clock()() + 2.0, abs=0.5)
        store.ahead, store.fails = 600.0, True
        with pytest.raises(StoreUnavailable):
            ours.refresh()
        assert not store.set_at
        assert ours.refresh() == engine.refreshed[-1] + 7
        assert len(store.set_at) == 1
        ours.refresh()
    assert len(store.set_at) == 1
    assert engine.moved == [pytest.approx(598.0, abs=1.0)]
    assert log.getvalue().count("clock_was_set") == 1
    assert keep_to(store.postgres, clock) == pytest.approx(0.0, abs=0.1)


def test_refreshing_takes_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a second; where it takes long, less often."""
    now = [1000.0]
    monkeypatch.setattr(sharing, "perf_counter", lambda: now[0])
    store, engine = FakeStore(0.0), FakeEngine()
    ours = Sharing(engine.engine, store.postgres, Clock())
    assert ours.pause == 0.0
    ours.refresh()
    assert ours.pause == pytest.approx(sharing.REFRESH_EVERY)
    now[0] += 0.4
    assert ours.pause == pytest.approx(0.6)
    monkeypatch.setattr(engine, "refresh", lambda _: now.__setitem__(0, now[0] + 0.1))
    ours.refresh()
    assert ours.pause == pytest.approx(0.1 / sharing.REFRESH_PART - 0.1)


def test_that_instances_come_and_go_is_told() -> None:
    """By their names, once; who has said farewell is no reason to worry."""
    store, engine = FakeStore(0.0), FakeEngine()
    store.there = {"b"}
    ours = Sharing(engine.engine, store.postgres, Clock())
    with captured_log() as log:
        for names in (["b"], ["b", "c"], ["c"], ["c"], []):
            engine.instances = [Instance(name, "1", NOW, NOW) for name in names]
            ours.refresh()
    told = [(line["level"], line["event"], line["other"], line["instances"]) for line in map(json.loads, log.getvalue().splitlines())]
    assert told == [
        ("info", "instance_appeared", "b", 2),
        ("info", "instance_appeared", "c", 3),
        ("warning", "instance_disappeared", "b", 2),
        ("info", "instance_stopped", "c", 1),
    ]


def test_a_name_that_two_have_is_told() -> None:
    """Once, and again when it has been well in between."""
    store, engine = FakeStore(0.0), FakeEngine()
    ours = Sharing(engine.engine, store.postgres, Clock())
    with captured_log() as log:
        for taken in (False, True, True, False, True):
            engine.has_namesake = taken
            ours.refresh()
    assert log.getvalue().count('"instance_name_taken"') == 2


async def test_everything_is_counted_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """And taken over with the next refresh; a database that is away is waited for."""
    monkeypatch.setattr(sharing, "COUNT_EVERY", 0.0)
    monkeypatch.setattr(sharing, "COUNT_PART", 1.0)
    store, engine = FakeStore(0.0), FakeEngine()
    ours = Sharing(engine.engine, store.postgres, Clock())
    counting = asyncio.create_task(ours.counting())
    async with asyncio.timeout(20):
        while not store.census_taken:  # noqa: ASYNC110
            await asyncio.sleep(0)
        while not engine.counted:
            ours.refresh()
            await asyncio.sleep(0)
    counting.cancel()
    assert engine.counted[0].states


def test_counts_take_a_small_part_of_the_time() -> None:
    """However many rows there are; and one that waited for a database does not keep the numbers wrong for long."""
    ours = Sharing(FakeEngine().engine, FakeStore(0.0).postgres, Clock())
    assert ours.took(0.5) == COUNT_EVERY
    assert ours.took(0.4) == 0.4 / COUNT_PART
    assert ours.took(6.0) == 0.4 / COUNT_PART
    assert ours.took(0.5) == 0.5 / COUNT_PART
    assert (ours.took(60.0), ours.took(60.0)) == (0.5 / COUNT_PART, COUNT_SELDOM)


def test_an_instance_that_takes_the_place_of_another_has_its_name() -> None:
    """Or it would wait for a sign of life of itself."""
    assert instance_name("given", 8080) == "given"
    assert instance_name("", 8080) == instance_name("", 8080)
    assert instance_name("", 8080) != instance_name("", 8081)
    assert "pid" in instance_name("", 0)


# ── leases ──


@pytest.mark.parametrize("late", [14.5, 15.0, 500.0])
async def test_an_action_whose_lease_has_ended_is_not_begun(late: float) -> None:
    """The process stood still between the claim and the request: by now it is another instance's."""
    bench = Bench()
    bench.now = NOW + late
    with captured_log() as log:
        given = await bench.answer(SEND)
    assert given.verdict is Verdict.FAILED
    assert not bench.asked
    assert '"lease_ended"' in log.getvalue()
    assert "delay-secret" not in log.getvalue()


async def test_a_look_whose_lease_has_ended_is_not_made() -> None:
    """It concludes nothing, of the SFU neither."""
    bench = Bench()
    bench.now = NOW + 15.0
    given = await bench.looked(LOOK)
    assert (given.participants, given.made) == (None, False)
    assert not bench.told
    reach = Reach(4)
    reach.began(POLICY)
    reach.dropped()
    assert (reach.in_flight, reach.failures) == (0, 0)


# ── engines on one store ──


@contextmanager
def two_engines() -> Iterator[tuple[Engine, Engine, SqliteStore]]:
    """On one store, each with a memory of its own."""
    store = SqliteStore(":memory:")
    store.shared = True
    try:
        yield Engine(store, POLICY, Limits(), Random(0)), Engine(store, POLICY, Limits(), Random(1)), store
    finally:
        store.close()


def done(task: Task, sent_at: float) -> Answered:
    return Answered(task.homeserver, task.event, task.claim, task.action, sent_at, Verdict.DONE)


def in_call(one: Engine, other: Engine) -> None:
    """Somebody has delegated at one of them, and joined by a webhook to the other."""
    step = one.step([accept()], NOW)
    one.step([done(task, NOW) for task in step.tasks], NOW)
    assert other.step([joined()], NOW + 0.5).replies == [Touched(1)]


def test_nothing_is_taken_from_the_memory_of_an_earlier_step() -> None:
    """While one of them waits for an answer, the other one learns that the participant has left."""
    with two_engines() as (one, other, store):
        (restart,) = one.step([accept()], NOW).tasks
        other.step([joined()], NOW + 0.1)
        other.step([left(reason="PARTICIPANT_REMOVED")], NOW + 0.2)
        one.step([done(restart, NOW)], NOW + 0.3)
        (there,) = store.atomically(lambda tx: tx.of_room(SFU, ROOM))
        assert there.presence is Presence.GONE


def test_what_others_have_planned_is_known_after_a_refresh() -> None:
    """And done when it is due, if they are no more."""
    with two_engines() as (one, other, _):
        in_call(one, other)
        other.refresh(NOW + 1)
        later = NOW + 3000
        assert [task.event for task in other.step([], later).tasks if task.event] == [1]


def test_missed_webhooks_have_all_rooms_looked_at_before_anybody_is_answered() -> None:
    """In a transaction of its own, since it takes the locks of all rooms."""
    from sfu_delegate.delegation.model import Missed

    with two_engines() as (one, other, store):
        in_call(one, other)
        step = other.step([Missed(SFU)], NOW + 100)
        assert step.replies == [Touched(0)]
        room = store.atomically(lambda tx: tx.room(SFU, ROOM))
        assert isinstance(room, Room)
        assert room.asked == NOW + 100
        assert [task.room for task in step.tasks] == [ROOM]


def test_who_cannot_reach_an_sfu_leaves_it_to_those_who_can() -> None:
    """Its failed looks conclude nothing, and the room is looked at by another one."""
    with two_engines() as (one, other, store):
        in_call(one, other)
        now = NOW + 60.0
        one.refresh(now)
        (look,) = [task for task in one.step([], now).tasks if not task.event]
        other._reach(SFU).ended(now + 1, now + 1.1, POLICY, answered=True)
        other.refresh(now + 2)
        one.refresh(now + 2)
        one.step([Looked(SFU, ROOM, look.claim, now, None, "no route to host")], now + 2)
        one.refresh(now + 3)
        room = store.atomically(lambda tx: tx.room(SFU, ROOM))
        assert isinstance(room, Room)
        assert (room.claimed, room.failures) == (False, 0)
        other.refresh(now + 3)
        assert [task.room for task in other.step([], now + 3).tasks] == [ROOM]


def test_others_count_only_while_it_is_news() -> None:
    """And only if they could ask it after we could not."""
    reach = Reach(4)
    reach.overheard(0.0, NOW, None)
    assert not reach.outvoted(NOW)
    reach.began(POLICY)
    reach.ended(NOW + 1, NOW + 2, POLICY, answered=False)
    assert not reach.outvoted(NOW + 2)
    reach.overheard(NOW + 3, NOW + 3, NOW)
    assert reach.outvoted(NOW + 3)
    assert reach.several_nodes_at == NOW
    assert not reach.outvoted(NOW + 3 + OTHERS_COUNT)


def test_an_sfu_is_lost_only_if_nobody_has_heard_of_it() -> None:
    """A webhook that another instance got is a sign of life, too."""
    reach = Reach(4)
    for _ in range(POLICY.breaker_after):
        reach.began(POLICY)
        reach.ended(NOW, NOW, POLICY, answered=False)
    late = NOW + POLICY.lost(SFU) + 1
    assert reach.lost(SFU, late, POLICY)
    reach.overheard(late - 10, 0.0, None)
    assert not reach.lost(SFU, late, POLICY)
    reach.heard_at = 0.0
    assert reach.lost(SFU, late, POLICY)
    reach.overheard(0.0, late - 10, None)  # nor one that others can look at, however quiet it is
    assert not reach.lost(SFU, late, POLICY)


def test_when_an_sfu_was_heard_of_is_told_to_the_others() -> None:
    """Every few seconds, where there is news."""
    with two_engines() as (one, other, store):
        in_call(one, other)
        other.refresh(NOW + 1)
        assert store.news(NOW).heard == [Heard(SFU, NOW + 0.5, 0.0)]


def test_counts_are_those_of_all() -> None:
    """After a census; in between each adds what it does itself."""
    with two_engines() as (one, other, store):
        in_call(one, other)
        assert sum(other.states.values()) == 0 or other.states[HOMESERVER, "live", "connected"] == 1
        one.recount(store.census())
        other.recount(store.census())
        assert one.states == other.states == {(HOMESERVER, "live", "connected"): 1}


def test_what_others_have_confirmed_is_in_doubt_no_more() -> None:
    """A user may delegate again, though the confirmation came to another instance."""
    with two_engines() as (one, other, _):
        limits = Limits(max_per_user=1, max_unnamed=1)
        one.reconfigure(POLICY, limits)
        one.step([accept()], NOW)
        later = NOW + POLICY.lease + 1  # its answer never comes
        other.refresh(later)
        (again,) = [task for task in other.step([], later).tasks if task.event]
        other.step([done(again, later)], later)
        second = accept("D2", identity="bob")
        assert isinstance(one.step([second], later).replies[0], Exception)
        one.refresh(later + 10)
        assert not isinstance(one.step([second], later + 10).replies[0], Exception)
        assert DOUBTS_A_TIME > 1
