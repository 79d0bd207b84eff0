"""A homeserver that fails for one instance only: the others do what is due there, and it finds out when it can reach it again."""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfu_delegate.delegation.model import Action, Answered, DelayedEvent, Input, Looked, Presence, State, Task, Verdict
from sfu_delegate.delegation.others import (
    LEFT,
    LEFT_TO_THE_ABLE,
    NAMED_MOST,
    NOTHING_SAID,
    PROBE_EVERY,
    RESTARTED_EVERY,
    WORDS_COUNT,
    Word,
    left_for,
    told,
    understood,
)
from sfu_delegate.delegation.reach import GIVEN_BACK_FOR, OTHERS_COUNT, Reach
from sfu_delegate.delegation.urgency import SLOW_FAILURE, Pace
from sfu_delegate.engine import TOGETHER, Engine, Limits
from sfu_delegate.store.base import StoreUnavailable

from tests.rows import HOMESERVER, NOW, POLICY, ROOM, SFU, accept, joined, left
from tests.simulation.store import Board, SharedStore, Store

# ── what is said ──


@given(
    st.sets(st.text(max_size=20), max_size=5),
    st.dictionaries(st.text(max_size=20), st.floats(0, 1e10), max_size=5),
    st.sets(st.text()),
    st.booleans(),
)
def test_what_is_said_is_understood(failing: set[str], answered: dict[str, float], sfus: set[str], busy: bool) -> None:
    """Whatever homeservers are called."""
    assert understood(told(failing, answered, sfus, busy=busy)) == Word(frozenset(failing), answered, frozenset(sfus), busy)


def test_nothing_to_say_takes_no_room() -> None:
    """And whoever has too much to say is no help at all."""
    assert told((), {}, ()) == ""
    many = [f"hs{n}.test" for n in range(2 * NAMED_MOST)]
    word = understood(told(many, dict.fromkeys(many, 1.0), ()))
    assert len(word.failing) == NAMED_MOST
    assert not word.able("hs.test")
    assert not word.asks("main")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"failing": []}',
        '{"failing": 1, "answered": {}, "sfus": [], "busy": false}',
        '{"failing": [], "answered": {"a": "b"}, "sfus": [], "busy": false}',
    ],
)
def test_another_versions_words_are_nothing(text: str) -> None:
    """They must not keep anything from being done."""
    assert understood(text) == NOTHING_SAID


def test_for_how_long_something_is_left() -> None:
    """Not at all if nobody is there for whom the homeserver does not fail; longer, if somebody has shown that it can be done."""
    failing, silent, able = Word(frozenset({"hs"}), {}), NOTHING_SAID, Word(frozenset(), {"hs": NOW + 1})
    assert left_for("hs", NOW, []) == 0.0
    assert left_for("hs", NOW, [failing, failing]) == 0.0
    assert left_for("hs", NOW, [failing, silent]) == LEFT
    assert left_for("hs", NOW, [silent, able]) == LEFT_TO_THE_ABLE
    assert left_for("hs", NOW + 2, [able]) == LEFT  # that was before
    assert left_for("hs", NOW, [Word(frozenset({"hs"}), {"hs": NOW + 1})]) == 0.0
    assert left_for("hs", NOW, [able._replace(busy=True)]) == 0.0


# ── what fails ──


def test_a_homeserver_fails_after_two_failures_or_a_long_one() -> None:
    """One that is soon over happens; those that were on their way together are one."""
    pace = Pace(16)
    for _ in range(3):
        pace.began(NOW)
    for _ in range(3):
        pace.ended(NOW, NOW + 0.1, ending=False, answered=False)
    assert not pace.fails
    pace.began(NOW + 1)
    pace.ended(NOW + 1, NOW + 1.1, ending=True, answered=False)
    assert (pace.fails, pace.failing_since) == (True, NOW)
    pace.began(NOW + 2)
    pace.ended(NOW + 2, NOW + 2.1, ending=True, answered=True)
    assert (pace.fails, pace.failing_since, pace.answered_at) == (False, None, NOW + 2)
    pace.began(NOW + 3)
    pace.ended(NOW + 3, NOW + 3 + SLOW_FAILURE, ending=True, answered=False)
    assert pace.fails


def test_a_refusal_is_an_answer() -> None:
    """It can be reached."""
    pace = Pace(16)
    for n in range(2):
        pace.began(NOW + n)
        pace.ended(NOW + n, NOW + n + 0.1, ending=False, answered=False)
    assert pace.fails
    pace.began(NOW + 2)
    pace.refused(NOW + 2, 0.5, NOW + 2.1)
    assert (pace.fails, pace.answered_at) == (False, NOW + 2)


def test_after_the_clock_was_set_nothing_is_known() -> None:
    """Times of another clock say nothing of when somebody else was answered."""
    pace = Pace(16)
    pace.ended(NOW, NOW, ending=False, answered=True)
    pace.ended(NOW, NOW + 10, ending=False, answered=False)
    pace.clock_moved(NOW - 5000)
    assert (pace.fails, pace.failing_since) == (False, None)
    assert pace.answered_at < 0


# ── two instances ──


class Two:
    """Two instances, and what happens to their requests."""

    def __init__(self) -> None:
        self.database = Store.empty()
        board = Board(self.database)
        self.stores = [SharedStore(board, f"i{n}", "delegate", f"{n}", lambda: None) for n in range(2)]
        for store in self.stores:
            store.connect()
        self.one, self.other = (Engine(store, POLICY, Limits(), Random(n)) for n, store in enumerate(self.stores))
        self.now = NOW

    def refresh(self) -> None:
        """Twice: what one says, the other one answers."""
        for _ in range(2):
            for engine in (self.one, self.other):
                engine.refresh(self.now)

    def step(self, engine: Engine, *inputs: Input, fails: bool = False) -> list[Task]:
        """One step, and all that it claimed at the homeserver is answered in another one, or fails."""
        tasks = [task for task in engine.step(inputs, self.now).tasks if task.event]
        if tasks:
            engine.step([answer(task, self.now, Verdict.FAILED if fails else Verdict.DONE) for task in tasks], self.now)
        return tasks

    def row(self) -> DelayedEvent:
        """The only one."""
        (row,) = self.database.rows()
        return row

    def until_due(self) -> None:
        """Time passes until something is due there, and as long as it may wait for what is due in the same moment."""
        due = self.row().due
        assert due is not None
        self.now = due + TOGETHER
        self.refresh()

    def wait(self, seconds: float) -> None:
        """Time passes, and the instances hear of each other."""
        for _ in range(4):
            self.now += seconds / 4
            self.refresh()

    def fail(self, engine: Engine) -> None:
        """The homeserver fails for an instance, which tells the others."""
        for _ in range(2):
            self.until_due()
            assert self.step(engine, fails=True)
        assert engine._paces[HOMESERVER].fails
        self.refresh()

    def cut_off(self) -> None:
        """Somebody is in the call, and the homeserver fails for the first instance."""
        self.step(self.one, accept())
        self.step(self.other, joined())
        self.fail(self.one)


def answer(task: Task, sent_at: float, verdict: Verdict) -> Answered:
    return Answered(task.homeserver, task.event, task.claim, task.action, sent_at, verdict)


@pytest.fixture
def two() -> Iterator[Two]:
    made = Two()
    yield made
    made.database.put_back()


def test_what_fails_for_one_is_claimed_by_the_other(two: Two) -> None:
    """It tries itself, in nobody's way; what it hears is a fact, whoever has claimed what."""
    two.cut_off()
    two.until_due()
    before = two.row()
    (tried,) = two.step(two.one, fails=True)
    assert (tried.action, tried.claim < 0) == (Action.RESTART, True)
    assert two.row() == before
    assert two.step(two.one) == []  # not again at once
    (claimed,) = two.step(two.other)
    assert claimed.claim == before.claim + 1
    assert two.row().running_since == two.now


def test_what_is_tried_without_a_claim_may_get_through(two: Two) -> None:
    """Then it is as if it had been claimed, and the homeserver fails no more."""
    two.cut_off()
    two.until_due()
    assert two.step(two.one, fails=True)
    assert two.one._cut_off.keys() == {HOMESERVER}
    two.now += RESTARTED_EVERY
    two.refresh()
    assert two.step(two.one)
    assert two.one._cut_off == {}
    assert (two.row().running_since, two.row().claimed) == (two.now, False)
    assert not two.one._held
    assert two.step(two.other) == []


def test_a_departure_is_left_to_the_other_and_not_for_ever(two: Two) -> None:
    """However it comes that the other one does nothing."""
    two.cut_off()
    two.now += 1.0
    assert two.step(two.one, left(reason="PARTICIPANT_REMOVED")) == []
    row = two.row()
    assert (row.presence, row.state, row.due) == (Presence.GONE, State.ENDING, two.now)
    since, tasks = two.now, list[Task]()
    for _ in range(20):
        two.refresh()
        wake = two.one._wake(two.now)
        assert wake is not None
        two.now = max(two.now, wake)
        if tasks := two.step(two.one):
            break
    assert [task.action for task in tasks] == [Action.SEND]
    assert LEFT <= two.now - since <= LEFT + 1.5


def test_one_that_has_been_answered_since_gets_more_time(two: Two) -> None:
    """It is known to be able."""
    two.cut_off()
    assert two.one._cut_off[HOMESERVER].left == LEFT
    two.until_due()
    assert two.step(two.other)
    two.refresh()
    assert two.one._cut_off[HOMESERVER].left == LEFT_TO_THE_ABLE


def test_where_it_fails_for_all_endings_are_left_to_nobody(two: Two) -> None:
    """And restarts are tried by each."""
    two.cut_off()
    two.fail(two.other)
    assert {cut_off.left for engine in (two.one, two.other) for cut_off in engine._cut_off.values()} == {0.0}
    two.until_due()
    two.now += RESTARTED_EVERY
    assert [[task.claim < 0 for task in two.step(engine, fails=True)] for engine in (two.one, two.other)] == [[True], [True]]
    (send,) = two.step(two.one, left(reason="PARTICIPANT_REMOVED"))
    assert (send.action, send.claim > 0) == (Action.SEND, True)


def test_one_that_is_alone_claims_everything(two: Two) -> None:
    """Nobody else is alive."""
    two.cut_off()
    two.now += 20.0
    two.one.refresh(two.now)
    assert two.one.instances == []
    (restart,) = two.step(two.one)
    assert (restart.action, restart.claim > 0) == (Action.RESTART, True)


def test_words_count_only_while_others_are_heard(two: Two) -> None:
    """One that cannot ask what others say is alone."""
    two.cut_off()
    two.until_due()
    two.now += WORDS_COUNT
    (restart,) = two.step(two.one)
    assert restart.claim > 0
    assert two.one._cut_off == {}


@pytest.mark.parametrize("busy", ["it stops", "its steps fail"])
def test_nothing_is_left_to_one_that_does_nothing(two: Two, busy: str) -> None:
    """It says so."""
    two.cut_off()
    if busy == "it stops":
        two.other.stopping = True
    else:
        two.stores[1].cut = True
        with pytest.raises(StoreUnavailable):
            two.other.step([], two.now)
        two.stores[1].cut = False
    two.refresh()
    assert two.one._cut_off[HOMESERVER].left == 0.0
    if busy == "its steps fail":
        two.other.step([], two.now)
        two.refresh()
        assert two.one._cut_off[HOMESERVER].left == LEFT


def test_it_is_tried_now_and_then_though_nothing_is_due(two: Two) -> None:
    """Or an instance that is well again would not know it for long; an event is restarted that is not due yet."""
    two.cut_off()
    two.until_due()
    assert two.step(two.other)
    two.wait(PROBE_EVERY)
    due = two.row().due
    assert due is not None
    assert due > two.now + 60.0
    (probe,) = two.step(two.one, fails=True)
    assert probe.claim < 0
    assert two.step(two.one) == []
    two.wait(PROBE_EVERY)
    assert two.step(two.one)
    assert two.one._cut_off == {}
    assert two.row().running_since == two.now


def test_what_has_just_been_delegated_is_tried_at_once(two: Two) -> None:
    """Whoever waits for the homeserver's word has it as soon as it can be had."""
    two.cut_off()
    two.until_due()
    assert two.step(two.other)
    (tried,) = two.step(two.one, accept("D2", identity="bob"))
    assert tried.claim < 0
    (row,) = [row for row in two.database.rows() if row.identity == "bob"]
    assert (row.verified_at, row.restarts) == (two.now, 1)


def test_a_homeserver_that_fails_keeps_nobody_busy(two: Two) -> None:
    """With something due all the time, and with nothing."""
    two.cut_off()
    two.until_due()
    for _ in range(2):
        end, steps = two.now + 8.0, 0
        while (wake := two.one._wake(two.now)) is not None and wake < end and steps < 100:
            two.now = max(two.now, wake)
            two.step(two.one, fails=True)
            steps += 1
        assert steps < 20
        two.step(two.other)
        two.refresh()


def look_fails(two: Two, engine: Engine) -> bool:
    """The engine looks at the room, if it does, and gets no answer."""
    looks = [task for task in engine.step([], two.now).tasks if task.action is Action.LOOK]
    engine.step([Looked(SFU, ROOM, look.claim, two.now, None, "no route to host") for look in looks], two.now)
    return bool(looks)


def test_a_look_that_fails_for_one_concludes_nothing(two: Two) -> None:
    """While another one is there for whom the SFU does not fail, though it has not asked it lately. If it fails for both, that counts."""
    two.step(two.one, accept())
    two.step(two.other, joined())
    two.now += 0.5
    two.step(two.one, left(reason="CLIENT_INITIATED"))
    two.now += 10.0
    two.refresh()
    assert look_fails(two, two.one)
    assert (two.row().presence, two.row().state) == (Presence.AWAY, State.LIVE)
    two.refresh()
    assert not look_fails(two, two.one)  # not again at once
    assert look_fails(two, two.other)
    assert (two.row().presence, two.row().state) == (Presence.GONE, State.ENDING)


def test_a_room_is_not_given_back_for_ever(two: Two) -> None:
    """To one that is alive, and does nothing."""
    two.step(two.one, accept())
    two.step(two.other, joined())
    two.now += 0.5
    two.step(two.one, left(reason="CLIENT_INITIATED"))
    since = two.now
    while two.row().state is State.LIVE:
        two.now += 1.0
        two.refresh()
        look_fails(two, two.one)
        assert two.now < since + 100.0
    assert GIVEN_BACK_FOR <= two.now - since <= GIVEN_BACK_FOR + 10.0


def test_while_another_one_is_answered_rooms_are_given_back_again_and_again() -> None:
    """The time begins anew."""
    reach = Reach(4)
    reach.began(POLICY)
    reach.ended(NOW, NOW, POLICY, answered=False)
    reach.others_may = True
    assert reach.outvoted(NOW)
    reach.gave_back(NOW)
    assert not reach.outvoted(NOW + GIVEN_BACK_FOR)
    reach.overheard(0.0, NOW - 1, None)  # that was before
    assert not reach.outvoted(NOW + GIVEN_BACK_FOR)
    reach.overheard(0.0, NOW + 1, None)
    assert reach.outvoted(NOW + GIVEN_BACK_FOR)
    assert reach.outvoted(NOW + OTHERS_COUNT)
    assert reach.outvoted(NOW + 10 * OTHERS_COUNT)


def test_an_answer_from_before_the_clock_was_set_back_is_no_news_of_the_future() -> None:
    """Or nothing that fails after it would count."""
    reach, pace = Reach(4), Pace(16)
    reach.ended(NOW + 7200, NOW, POLICY, answered=True)
    pace.ended(NOW + 7200, NOW, ending=False, answered=True)
    assert (reach.answered_at, pace.answered_at) == (NOW, NOW)
    reach.ended(NOW + 1, NOW + 1, POLICY, answered=False)
    assert reach.failing_since == NOW + 1


def test_an_sfu_is_not_lost_that_others_might_reach(two: Two) -> None:
    """However long it has failed for one, which would let everything run."""
    two.step(two.one, accept())
    two.step(two.other, joined())
    reach = two.one._reach(SFU)
    for _ in range(POLICY.breaker_after):
        reach.began(POLICY)
        reach.ended(two.now, two.now, POLICY, answered=False)
    two.now += 10 * POLICY.lost(SFU)
    assert reach.lost(SFU, two.now, POLICY)
    two.refresh()
    assert not reach.lost(SFU, two.now, POLICY)
    assert two.other.instances[0].word == told((), {}, {SFU})
