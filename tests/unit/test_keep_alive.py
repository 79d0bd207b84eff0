"""While the database takes no transaction, restarts go on: nobody who is connected is dropped because a disk is full."""

from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import TypeVar

import pytest
from sfu_delegate.delegation.model import Action, Answered, Looked, Task, Verdict
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.engine import Engine, Limits
from sfu_delegate.store.base import StoreUnavailable, Transaction
from sfu_delegate.store.sqlite import SqliteStore

from tests.rows import HOMESERVER, NOW, ROOM, SFU, accept, joined

T = TypeVar("T")
DELAY = 60.0


class FullDisk(SqliteStore):
    """A store that can be read, and not written."""

    full = False

    def atomically(self, work: Callable[[Transaction], T], *, about_to_wait: Callable[[], object] | None = None) -> T:
        """See SqliteStore."""
        if self.full:
            raise StoreUnavailable("the disk is full")
        return super().atomically(work)


def answer(task: Task, sent_at: float, verdict: Verdict = Verdict.DONE) -> Answered:
    return Answered(HOMESERVER, task.event, task.claim, task.action, sent_at, verdict)


@pytest.fixture
def engine() -> Engine:
    """Alice is in the call, her event was restarted at NOW, and then the disk is full."""
    store = FullDisk(":memory:")
    engine = Engine(store, Policy(first_spread=0.0), Limits(), Random(0))
    (task,) = (t for t in engine.step([accept(delay=DELAY), joined()], NOW).tasks if t.action is Action.RESTART)
    engine.step([answer(task, NOW)], NOW)
    store.full = True
    return engine


def test_what_is_due_is_restarted_and_nothing_else(engine: Engine) -> None:
    """Not before its time, and not twice at a time."""
    assert engine.keep_alive(NOW + 30.0) == []
    (task,) = engine.keep_alive(NOW + 45.0)
    assert task.action is Action.RESTART
    assert engine.keep_alive(NOW + 46.0) == []


def test_it_is_restarted_again_and_again_for_as_long_as_it_takes(engine: Engine) -> None:
    """What cannot be written down is remembered until it can."""
    at, sent, given = NOW, [NOW], []
    while at < NOW + 600.0:
        at += 0.5
        given += [answer(task, at) for task in engine.keep_alive(at)]
        sent += [one.sent_at for one in given if one.sent_at == at]
        with pytest.raises(StoreUnavailable):
            engine.step(given, at)  # handed in again and again, as the inbox does
    gaps = [later - earlier for earlier, later in pairwise(sent)]
    assert max(gaps) < DELAY
    assert min(gaps) > DELAY / 2
    assert engine.in_flight == 0


def test_the_database_is_told_when_it_works_again(engine: Engine) -> None:
    """The answer counts although nothing was claimed: that a countdown began anew is a fact."""
    (task,) = engine.keep_alive(NOW + 50.0)
    assert isinstance(engine.store, FullDisk)
    engine.store.full = False
    engine.step([answer(task, NOW + 50.0)], NOW + 70.0)
    row = engine.store.atomically(lambda tx: tx.get(task.event))
    assert row is not None
    assert (row.running_since, row.restarts) == (NOW + 50.0, 2)
    assert row.due is not None
    assert NOW + 50.0 + DELAY / 2 < row.due < NOW + 50.0 + DELAY


@pytest.mark.parametrize("verdict", [Verdict.NOT_FOUND, Verdict.REFUSED, Verdict.FAILED, Verdict.UNCERTAIN])
def test_an_answer_that_was_not_claimed_ends_nothing(engine: Engine, verdict: Verdict) -> None:
    """A claimed restart will find out."""
    (task,) = engine.keep_alive(NOW + 50.0)
    assert isinstance(engine.store, FullDisk)
    engine.store.full = False
    before = engine.store.atomically(lambda tx: tx.get(task.event))
    engine.step([answer(task, NOW + 50.0, verdict)], NOW + 20.0)
    assert engine.store.atomically(lambda tx: tx.get(task.event)) == before


def test_one_that_fails_is_tried_again_soon(engine: Engine) -> None:
    """Once a second or so."""
    (task,) = engine.keep_alive(NOW + 45.0)
    with pytest.raises(StoreUnavailable):
        engine.step([answer(task, NOW + 45.0, Verdict.FAILED)], NOW + 45.1)
    assert engine.keep_alive(NOW + 45.2) == []
    assert len(engine.keep_alive(NOW + 47.0)) == 1


def test_nobody_of_a_lost_sfu_is_kept_alive(engine: Engine) -> None:
    """Ghosts would never end."""
    for n in range(4):
        with pytest.raises(StoreUnavailable):
            engine.step([Looked(SFU, ROOM, n, NOW, None)], NOW)
    reach = engine._reach(SFU)
    reach.failures, reach.failing_since, reach.heard_at = 5, NOW - 1000.0, NOW - 1000.0
    assert engine.keep_alive(NOW + 50.0) == []
