"""A batch of inputs, one transaction, replies and claims: the engine on each of the databases, with a clock made of numbers."""

import itertools
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pytest
from sfu_delegate.delegation.lifecycle import action
from sfu_delegate.delegation.model import (
    Accept,
    Action,
    Answered,
    Carried,
    DelayedEvent,
    Due,
    Find,
    Input,
    Lane,
    Listed,
    Looked,
    Missed,
    OnEnd,
    Outcome,
    Presence,
    Refuse,
    Room,
    RoomChanged,
    RoomNews,
    Seen,
    State,
    Task,
    Verdict,
    Withdraw,
)
from sfu_delegate.delegation.policy import DEPARTURES, MISSING, Unasked
from sfu_delegate.delegation.replies import Accepted, Found, Reply, TooMany, Touched, Withdrawn
from sfu_delegate.delegation.urgency import FIRST_WIDTH, UNKNOWN_WIDTH, Limit
from sfu_delegate.engine import BUSY_ELSEWHERE, TOGETHER, Engine, Limits, Step
from sfu_delegate.store.base import KnownHomeserver, Store, StoreUnavailable, Transaction
from sfu_delegate.store.postgresql import PostgresStore
from sfu_delegate.store.sqlite import SqliteStore

from tests import postgresql, stores
from tests.rows import (
    ALICE,
    DELAY,
    HOMESERVER,
    NOW,
    POLICY,
    ROOM,
    SFU,
    aborted,
    accept,
    assert_consistent,
    ended,
    joined,
    left,
    listed,
    live,
    row,
)


@pytest.fixture(params=stores.KINDS, autouse=True)
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which database it is."""
    with stores.chosen(request.param):
        yield request.param


class Even(Random):
    """Jitter that is always in the middle."""

    def random(self) -> float:
        return 0.5


def engine_on(store: Store, *, most: int = 16, limits: Limits | None = None, random: Random | None = None) -> Engine:
    return Engine(store, POLICY, limits or Limits(), random or Random(0), in_flight=lambda _: most)


def fresh(**options: Any) -> Engine:
    return engine_on(stores.another(), **options)


def holding(*rows: DelayedEvent, **options: Any) -> Engine:
    """An engine whose database has these rows, and their rooms, in which nothing is suspicious."""
    store = stores.another()

    def insert(tx: Transaction) -> None:
        for there in rows:
            tx.insert(there._replace(id=tx.new_id()))

    store.atomically(insert)
    store.recover(NOW, POLICY, clock_unsure=False)
    names = dict.fromkeys((there.sfu, there.room) for there in rows if there.state is not State.DONE)
    quiet = Room("", "", "", "", 0.0, False, 0.0, 0.0, None, NOW + 0.75 * POLICY.interval, True, 0, 0, False)
    stores.save_rooms(store, [quiet._replace(sfu=sfu, name=name) for sfu, name in names])
    return engine_on(store, **options)


def stored(engine: Engine) -> list[DelayedEvent]:
    """All rows, as the database has them."""
    return stores.stored(engine.store)


def only(engine: Engine) -> DelayedEvent:
    (there,) = stored(engine)
    return there


def reply_to(task: Task, verdict: Verdict = Verdict.DONE, *, sent_at: float = NOW, retry_after: float | None = None) -> Answered:
    return Answered(task.homeserver, task.event, task.claim, task.action, sent_at, verdict, retry_after)


def look_at(task: Task, *participants: Listed, sent_at: float) -> Looked:
    return Looked(task.sfu, task.room, task.claim, sent_at, participants)


def actions(step: Step) -> list[Action]:
    return [task.action for task in step.tasks if task.action is not Action.LOOK]


def looks(step: Step) -> list[Task]:
    return [task for task in step.tasks if task.action is Action.LOOK]


def delegate(engine: Engine, *delegations: str, now: float = NOW, room: str = ROOM) -> None:
    """Participants with verified delegations, each called as its delegation is."""
    step = engine.step([accept(name, identity=name, room=room) for name in delegations], now)
    while actions(step):
        step = engine.step([reply_to(task, sent_at=now) for task in step.tasks if task.action is Action.RESTART], now)


# ── batches ──


def test_a_delegation_and_a_joined_of_one_batch_meet() -> None:
    """The webhook finds the row that the same batch made."""
    engine = fresh()
    step = engine.step([accept("D1"), joined()], NOW)
    assert [type(reply) for reply in step.replies] == [Accepted, Touched]
    assert step.replies[1] == Touched(1)
    assert only(engine).presence is Presence.CONNECTED
    assert actions(step) == [Action.RESTART]


def test_a_joined_before_its_delegation_is_found_by_a_look() -> None:
    """The webhook is about nobody; the look a second after the delegation finds who is connected."""
    engine = fresh()
    step = engine.step([joined(), accept("D1")], NOW)
    assert step.replies[0] == Touched(0)
    assert only(engine).presence is Presence.EXPECTED
    step = engine.step([reply_to(step.tasks[0])], NOW)
    assert step.wake == NOW + 1.0
    (look,) = looks(engine.step((), NOW + 1.0))
    engine.step([look_at(look, listed(), sent_at=NOW + 1.0)], NOW + 1.1)
    assert only(engine).presence is Presence.CONNECTED


def test_a_whole_call_in_one_batch() -> None:
    """Delegated, joined, removed: the batch ends with the goodbye claimed."""
    step = fresh().step([accept("D1"), joined(), left("S1", "PARTICIPANT_REMOVED")], NOW)
    assert actions(step) == [Action.SEND]
    assert step.tasks[0].urgent_since == NOW


def test_replies_come_in_the_order_of_the_inputs() -> None:
    """One for each, also for those about nobody."""
    engine = fresh()
    inputs: list[Input] = [
        joined(identity="nobody"),
        accept("D1"),
        Find("D1"),
        accept("D2", "delay-of-D1"),
        Withdraw("D1"),
        Find("none"),
        Due(99),
        RoomChanged(SFU, "elsewhere", RoomNews.STARTED),
    ]
    replies = engine.step(inputs, NOW).replies
    kinds = [Touched, Accepted, Found, Accepted, Withdrawn, Found, Touched, Touched]
    assert [type(reply) for reply in replies] == kinds
    again = replies[3]
    assert isinstance(again, Accepted)
    assert (again.delegation, again.created) == ("D1", False)


def test_exactly_the_same_events_again_change_nothing() -> None:
    """The participant gets the delegation that it has, in whatever order it names them."""
    engine = fresh()
    engine.step([accept("D1", "a", "b")], NOW)
    before = stored(engine)
    step = engine.step([accept("D2", "b", "a")], NOW + 5)
    assert isinstance(step.replies[0], Accepted)
    assert (step.replies[0].delegation, step.replies[0].created) == ("D1", False)
    assert stored(engine) == before


@pytest.mark.parametrize("first", ["plain", "hashed"])
def test_an_event_that_was_delegated_in_the_other_form_is_replaced(first: str) -> None:
    """Whichever came first: once the newer one is verified, the older one is cancelled, or it would fire into the newer membership."""
    forms = [accept("D1", identity="plain"), accept("D2", identity="hashed", alias="plain")]
    if first == "hashed":
        forms = [accept("D1", identity="hashed", alias="plain"), accept("D2", identity="plain")]
    engine = fresh()
    for form in forms:
        step = engine.step([form, joined(identity="plain")], NOW)
        (task,) = [task for task in step.tasks if task.action is Action.RESTART]
        step = engine.step([reply_to(task)], NOW)
    assert actions(step) == [Action.CANCEL]


def test_an_event_that_is_handed_over_in_the_other_form_is_found_by_the_rest_of_its_batch() -> None:
    """A client delegates it anew, and its `joined` comes at the same instant."""
    engine = fresh()
    engine.step([accept("D1", "X", identity="plain")], NOW)
    step = engine.step([aborted("S0", identity="hashed"), accept("D2", "X", identity="hashed", alias="plain"), joined(identity="hashed")], NOW + 1)
    assert step.replies[-1] == Touched(1)
    assert (only(engine).identity, only(engine).alias, only(engine).presence) == ("hashed", "plain", Presence.CONNECTED)


def test_an_event_belongs_to_one_membership() -> None:
    """Handed over once more for another member id, it is not ended by the departure of the first."""
    engine = fresh()
    engine.step([accept("D1", "X", identity="member 1", alias="plain"), joined(identity="member 1")], NOW)
    engine.step([accept("D2", "X", identity="member 2", alias="plain"), joined("S2", identity="member 2")], NOW + 1)
    engine.step([left("S1", "PARTICIPANT_REMOVED", identity="member 1")], NOW + 2)
    assert (only(engine).identity, only(engine).presence, only(engine).state) == ("member 2", Presence.CONNECTED, State.LIVE)


def test_another_member_of_the_same_device_is_another_participant() -> None:
    """Their identities have only the plain form in common, which neither of them needs to be: each membership ends when its own session does."""
    engine = fresh()
    engine.step([accept("D1", identity="member 1", alias="plain"), joined(identity="member 1")], NOW)
    engine.step([left("S1", "PARTICIPANT_REMOVED", identity="member 1"), accept("D2", identity="member 2", alias="plain")], NOW)
    assert {there.delegation: (there.presence, there.state) for there in stored(engine)} == {
        "D1": (Presence.GONE, State.ENDING),
        "D2": (Presence.EXPECTED, State.LIVE),
    }


def test_the_other_form_of_the_identity_is_the_same_participant() -> None:
    """Webhooks and new delegations find it by either."""
    engine = fresh()
    engine.step([accept("D1", alias="hashed"), joined(identity="hashed")], NOW)
    assert only(engine).presence is Presence.CONNECTED
    step = engine.step([accept("D2", identity="hashed", alias=ALICE)], NOW)
    assert isinstance(step.replies[0], Accepted)
    assert step.replies[0].rows[0].presence is Presence.CONNECTED


# What one client may be known by: through its homeserver, by the deployed endpoints, and by the legacy one.
MEMBER, DEPLOYED, PLAIN = "hash of user, member", "hash of user, device, member", "user:device"
WAYS: dict[str, dict[str, Any]] = {
    "through the homeserver": {"identity": MEMBER},
    "through the homeserver, with the device": {"identity": MEMBER, "alias": PLAIN, "twin": DEPLOYED},
    "by the deployed endpoint": {"identity": DEPLOYED, "alias": PLAIN, "twin": MEMBER},
    "by the legacy endpoint": {"identity": PLAIN},
}
USER = "@alice:hs.test"


def handed_over(way: str, delegation: str, *delay_ids: str, running_since: float | None = None) -> Accept:
    """One membership, by one of the ways in which a client hands its event over."""
    return replace(accept(delegation, *delay_ids, **WAYS[way], running_since=running_since), user=USER)


@pytest.mark.parametrize("same", [True, False], ids=["the same event", "a new event"])
@pytest.mark.parametrize(("before", "after"), [(one, other) for one in WAYS for other in WAYS if one != other])
def test_a_client_that_changes_over_keeps_one_delegation(before: str, after: str, same: bool) -> None:
    """Whichever way it came by first: one event is kept alive, and it is known to be connected under the identity that it joined with."""
    neither_tells = {before, after} == {"through the homeserver", "by the legacy endpoint"}
    if neither_tells and not same:
        pytest.skip("nothing tells that these two are one")
    engine = fresh()
    under = WAYS[before]["identity"]
    step = engine.step([handed_over(before, "D1", "X"), joined(identity=under)], NOW)
    engine.step([reply_to(task) for task in step.tasks if task.action is Action.RESTART], NOW)
    step = engine.step([handed_over(after, "D2", "X" if same else "Y")], NOW + 60.0)
    step = engine.step([reply_to(task, sent_at=NOW + 60.0) for task in step.tasks if task.action is Action.RESTART], NOW + 60.0)
    open_ones = [there for there in stored(engine) if there.state is State.LIVE]
    assert [(there.delay_id, there.presence) for there in open_ones] == [("X" if same else "Y", Presence.CONNECTED)]
    assert [task.delay_id for task in step.tasks if task.action is Action.CANCEL] == ([] if same else ["X"])
    engine.step([left("S1", "PARTICIPANT_REMOVED", identity=under)], NOW + 61.0)
    assert [there.state for there in stored(engine) if there.id == open_ones[0].id] == [State.ENDING]
    assert_counts(engine)


@pytest.mark.parametrize("form", [MEMBER, DEPLOYED, PLAIN])
def test_a_participant_is_found_under_each_of_its_identities(form: str) -> None:
    """By webhooks and by looks."""
    engine = fresh()
    engine.step([handed_over("by the deployed endpoint", "D1", "X"), joined(identity=form)], NOW)
    assert only(engine).presence is Presence.CONNECTED
    engine = fresh()
    step = engine.step([handed_over("by the deployed endpoint", "D1", "X")], NOW)
    step = engine.step([], NOW + POLICY.first_looks[0])
    [look] = [task for task in step.tasks if task.action is Action.LOOK]
    engine.step([Looked(SFU, look.room, look.claim, NOW + 1.0, (listed(identity=form),))], NOW + 1.0)
    assert only(engine).presence is Presence.CONNECTED


def test_two_devices_of_one_user_are_two_participants() -> None:
    """An event of the same user is no reason to take another one's place, unless it is that very event."""
    engine = fresh()
    other = replace(accept("D1", "X", identity="another member", alias="another device"), user=USER)
    step = engine.step([other, joined(identity="another member")], NOW)
    engine.step([reply_to(task) for task in step.tasks], NOW)
    step = engine.step([handed_over("through the homeserver", "D2", "Y", running_since=NOW)], NOW + 1.0)
    assert [task.action for task in step.tasks if task.action is not Action.LOOK] == []
    assert {there.delegation: there.presence for there in stored(engine)} == {"D1": Presence.CONNECTED, "D2": Presence.EXPECTED}


def test_what_a_homeserver_says_of_somebody_elses_user_takes_nothing_over() -> None:
    """The same user id, as another homeserver's delegation has it, is another user."""
    engine = fresh()
    engine.step([handed_over("through the homeserver", "D1", "X", running_since=NOW), joined(identity=MEMBER)], NOW)
    engine.step([replace(accept("D2", "X", identity="elsewhere", homeserver="other.test"), user=USER)], NOW + 1.0)
    assert {(there.delegation, there.identity, there.homeserver) for there in stored(engine)} == {
        ("D1", MEMBER, "hs.test"),
        ("D2", "elsewhere", "other.test"),
    }


def test_what_the_homeserver_has_shown_is_not_restarted_before_its_time() -> None:
    """It is confirmed at once, counts for no doubt, and takes the place of what was delegated before; the restart is planned by its true age."""
    engine = fresh(limits=Limits(max_per_user=1))
    step = engine.step([handed_over("through the homeserver", "D1", "X", running_since=NOW - 600.0), joined(identity=MEMBER)], NOW)
    assert [task.action for task in step.tasks if task.action is not Action.LOOK] == []
    row = only(engine)
    assert (row.verified_at, row.running_since, row.harm) == (NOW, NOW - 600.0, NOW - 600.0 + DELAY)
    assert row.due is not None
    assert row.due <= NOW - 600.0 + DELAY * POLICY.restart_at
    step = engine.step([handed_over("through the homeserver", "D2", "Y", running_since=NOW)], NOW + 1.0)
    assert isinstance(step.replies[0], Accepted)
    assert [(task.action, task.delay_id) for task in step.tasks if task.action is not Action.LOOK] == [(Action.CANCEL, "X")]


def test_what_was_shown_before_something_newer_was_delegated_takes_nothing_over() -> None:
    """The client may have ended it, and delegated another one, while the homeserver's answer was on its way: a restart tells."""
    engine = fresh()
    engine.step([handed_over("through the homeserver", "D2", "newer", running_since=NOW), joined(identity=MEMBER)], NOW)
    late = replace(accept("D1", "older", **WAYS["through the homeserver"], running_since=NOW - 60.0, shown_at=NOW - 1.0), user=USER)
    step = engine.step([late], NOW + 1.0)
    assert [(task.action, task.delay_id) for task in step.tasks if task.action is not Action.LOOK] == [(Action.RESTART, "older")]
    engine.step([reply_to(task, Verdict.NOT_FOUND) for task in step.tasks if task.action is Action.RESTART], NOW + 2.0)
    assert [(there.delay_id, there.state) for there in stored(engine) if there.state is not State.DONE] == [("newer", State.LIVE)]
    assert_counts(engine)


def test_an_older_event_that_is_delegated_again_late_does_not_end_a_newer_one() -> None:
    """That it was there is older than the newer delegation. Nothing was shown of since when it runs; a restart tells whether it is there."""
    engine = fresh()
    step = engine.step([replace(accept("D1", "older", **WAYS["through the homeserver"], shown_at=NOW), user=USER), joined(identity=MEMBER)], NOW)
    engine.step([reply_to(task) for task in step.tasks if task.action is Action.RESTART], NOW)
    newer = replace(accept("D2", "newer", **WAYS["through the homeserver"], shown_at=NOW + 10.0), user=USER)
    late = replace(accept("D3", "older", **WAYS["through the homeserver"], shown_at=NOW + 9.0), user=USER)
    tasks = [*engine.step([newer], NOW + 11.0).tasks, *engine.step([late], NOW + 12.0).tasks]
    assert [(task.action, task.delay_id) for task in tasks if task.action is not Action.LOOK] == [
        (Action.RESTART, "newer"),
        (Action.RESTART, "older"),
    ]
    gone = {"newer": Verdict.DONE, "older": Verdict.NOT_FOUND}
    engine.step([reply_to(task, gone[task.delay_id], sent_at=NOW + 12.0) for task in tasks if task.action is Action.RESTART], NOW + 12.5)
    assert [(there.delay_id, there.state) for there in stored(engine) if there.state is not State.DONE] == [("newer", State.LIVE)]
    assert_counts(engine)


def test_a_goodbye_that_may_have_got_through_is_found_out_by_a_restart() -> None:
    """Whatever the homeserver has shown before: the event may have been sent since."""
    engine = holding(row(delegation="D1", delay_id="X", end_tried=True))
    step = engine.step([accept("D2", "X", running_since=NOW - 1.0)], NOW)
    assert (only(engine).verified_at, only(engine).delegation) == (None, "D2")
    assert step.tasks == [] or step.tasks[0].action is Action.RESTART


@pytest.mark.parametrize("before", [[aborted("S9")], []], ids=["asked before", "not asked before"])
def test_an_event_that_is_taken_up_again_is_found_by_the_rest_of_its_batch(before: list[Input]) -> None:
    """Withdrawn earlier; a batch takes it up again, and hears that its participant joined, whatever it had heard before that."""
    engine = holding(row(state=State.DONE, delay_id="again"))
    step = engine.step([*before, accept("D2", "again"), joined("S2", 2000)], NOW)
    assert step.replies[-1] == Touched(1)
    assert only(engine).presence is Presence.CONNECTED


def test_other_rooms_and_sfus_are_not_touched() -> None:
    """The same identity elsewhere is somebody else."""
    engine = fresh()
    engine.step([accept("D1"), joined(room="other"), joined()._replace(sfu="second")], NOW)
    assert only(engine).presence is Presence.EXPECTED


# ── inputs that raise ──


def test_a_limit_is_answered_alone() -> None:
    """The others of the batch are kept."""
    engine = fresh(limits=Limits(max_per_participant=1))
    step = engine.step([accept("D1"), accept("D2", "another"), joined()], NOW)
    error = step.replies[1]
    assert isinstance(error, TooMany)
    assert (error.limit, error.value) == ("delegations.max_per_participant", 1)
    assert [there.delegation for there in stored(engine)] == ["D1"]
    assert only(engine).presence is Presence.CONNECTED


@pytest.mark.parametrize(
    "strange",
    [
        accept("D-bad", "delay\ud800"),
        accept("D-bad", "delay", identity="alice\udfff"),
        accept("D-bad\ud800", "delay"),
        joined("S\ud800"),
        joined(identity="bob\ud800"),
        Find("\ud800"),
        Withdraw("\ud800"),
        RoomChanged(SFU, ROOM, RoomNews.STARTED, "RM\ud800"),
        Due(2**70),
        accept("D-bad", "delay", delay=float("nan")),
    ],
    ids=str,
)
def test_what_the_database_cannot_take_is_answered_alone(strange: Input) -> None:
    """Text that is no Unicode, numbers out of range: the others commit, and the replies keep their places."""
    engine = fresh()
    engine.step([accept("D1")], NOW)
    step = engine.step([joined(), strange, accept("D2", identity="bob"), Find("D1")], NOW)
    assert isinstance(step.replies[1], Exception)
    assert not isinstance(step.replies[1], StoreUnavailable)
    assert [type(reply) for i, reply in enumerate(step.replies) if i != 1] == [Touched, Accepted, Found]
    assert [(there.delegation, there.presence) for there in stored(engine)] == [("D1", Presence.CONNECTED), ("D2", Presence.EXPECTED)]
    assert_counts(engine)


def test_a_strange_input_alone_does_not_stop_the_timers() -> None:
    """What is due is claimed all the same."""
    engine = holding(row(due=NOW))
    step = engine.step([joined("S\ud800")], NOW)
    assert isinstance(step.replies[0], Exception)
    assert actions(step) == [Action.RESTART]


def test_the_most_of_a_homeserver_counts_what_is_not_finished() -> None:
    """Withdrawn ones make room."""
    engine = fresh(limits=Limits(max_per_homeserver=2))
    engine.step([accept("D1", identity="a")], NOW)
    engine.step([accept("D2", identity="b")], NOW)
    assert isinstance(engine.step([accept("D3", identity="c")], NOW).replies[0], TooMany)
    assert isinstance(engine.step([accept("D3", identity="c", homeserver="other.test")], NOW).replies[0], Accepted)
    engine.step([Withdraw("D1")], NOW)
    assert isinstance(engine.step([accept("D4", identity="d")], NOW).replies[0], Accepted)


def test_the_most_of_a_homeserver_holds_within_a_batch() -> None:
    """Many at once do not get past it."""
    engine = fresh(limits=Limits(max_per_homeserver=2))
    step = engine.step([accept(f"D{n}", identity=f"p{n}") for n in range(5)], NOW)
    assert [type(reply) for reply in step.replies] == [Accepted, Accepted, TooMany, TooMany, TooMany]


MADE_UP = [replace(accept(f"D{n}", identity=f"p{n}"), user="@mallory:hs.test") for n in range(8)]
HONEST = replace(accept("DA", identity="a"), user="@alice:hs.test")


def test_made_up_events_do_not_use_up_what_a_homeserver_allows() -> None:
    """Somebody with made-up delay_ids gets so many asked for, and one a minute from then on; others are not concerned."""
    engine = fresh(limits=Limits(max_per_user=3))
    step = engine.step([*MADE_UP[:4], HONEST], NOW)
    assert [type(reply) for reply in step.replies] == [Accepted] * 3 + [TooMany, Accepted]
    tasks = {task.delegation: task for task in step.tasks}
    step = engine.step([reply_to(tasks[f"D{n}"], Verdict.NOT_FOUND) for n in range(3)], NOW + 1)
    assert {change.new.outcome for change in step.changes} == {Outcome.UNKNOWN}
    assert isinstance(engine.step([MADE_UP[4]], NOW + 50).replies[0], TooMany)
    step = engine.step(MADE_UP[4:7], NOW + 61)
    assert [type(reply) for reply in step.replies] == [Accepted, TooMany, TooMany]
    assert_counts(engine)


def test_what_the_homeserver_confirms_makes_room_for_more() -> None:
    """Who delegates real events, as a bot with many calls, may go on."""
    engine = fresh(limits=Limits(max_per_user=2))
    for first in (0, 2, 4, 6):
        step = engine.step(MADE_UP[first : first + 2], NOW + first)
        assert [type(reply) for reply in step.replies] == [Accepted] * 2
        engine.step([reply_to(task, sent_at=NOW + first) for task in step.tasks], NOW + first + 1)


def test_participants_without_a_user_share_what_they_may() -> None:
    """Identities are easily made; those of another homeserver are not concerned, and neither is a client's token."""
    engine = fresh(limits=Limits(max_per_user=1, max_unnamed=3))
    unnamed = [accept(f"D{n}", identity=f"p{n}") for n in range(5)]
    others = [accept("DO", identity="o", homeserver="other.test"), replace(unnamed[4], token=b"sealed"), HONEST]
    step = engine.step([*unnamed[:4], *others], NOW)
    assert [type(reply) for reply in step.replies] == [Accepted] * 3 + [TooMany] + [Accepted] * 3


def test_the_most_of_a_user_can_be_changed_while_running() -> None:
    """And what waits already counts."""
    engine = fresh(limits=Limits(max_per_user=3))
    engine.step(MADE_UP[:3], NOW)
    engine.reconfigure(POLICY, Limits(max_per_user=4))
    assert [type(reply) for reply in engine.step(MADE_UP[3:5], NOW).replies] == [Accepted, TooMany]


# ── claims ──


def test_no_more_are_claimed_than_places_are_free() -> None:
    """A few at first, more after success; none while those are under way."""
    engine = holding(*[row(identity=f"p{n}", due=NOW) for n in range(20)])
    first = engine.step((), NOW)
    assert len(first.tasks) == FIRST_WIDTH
    assert engine.step((), NOW).tasks == []
    one = engine.step([reply_to(first.tasks[0])], NOW)
    assert len(one.tasks) == 1
    rest = engine.step([reply_to(task) for task in [*first.tasks[1:], *one.tasks]], NOW)
    assert len(rest.tasks) == UNKNOWN_WIDTH


def test_a_limited_homeserver_is_left_alone_until_the_time_it_named() -> None:
    """The longest of what those were told that were on their way together; then departures go on one at a time."""
    engine = holding(*[row(Presence.GONE, identity=f"p{n}") for n in range(8)])
    first = engine.step((), NOW)
    assert len(first.tasks) == 4
    assert engine.step([reply_to(first.tasks[0], Verdict.LIMITED, retry_after=7.0)], NOW).tasks == []
    step = engine.step([reply_to(task, Verdict.LIMITED, retry_after=1.0) for task in first.tasks[1:]], NOW)
    now = NOW
    while not step.tasks:
        assert step.wake is not None
        now = max(now + 0.001, step.wake)
        step = engine.step((), now)
    assert NOW + 7.0 <= now <= NOW + 9.0
    assert len(step.tasks) == 1


def test_restarts_that_have_time_leave_a_limited_homeserver_to_departures() -> None:
    """They wait until the bucket is full; a departure does not wait for them."""
    engine = holding(*[row(identity=f"p{n}", due=NOW) for n in range(8)])
    tasks = engine.step((), NOW).tasks
    engine.step([reply_to(task, Verdict.LIMITED, retry_after=1.0) for task in tasks], NOW + 0.5)
    assert engine.step((), NOW + 1.4).tasks == []
    assert actions(engine.step([left("S1", "ROOM_DELETED", identity="p5")], NOW + 1.5)) == [Action.SEND]
    now = NOW + 1.5
    while not (step := engine.step((), now)).tasks:
        assert now < NOW + 20.0
        assert step.wake is not None
        now = max(now + 0.001, step.wake)
    assert actions(step) == [Action.RESTART]


def test_homeservers_do_not_wait_for_each_other() -> None:
    """Each has places of its own."""
    engine = holding(*[row(identity=f"p{n}", room=name, homeserver=name, due=NOW) for n in range(6) for name in ("a.test", "b.test")])
    step = engine.step((), NOW)
    assert Counter(task.homeserver for task in step.tasks) == {"a.test": 4, "b.test": 4}


def test_departures_are_claimed_before_restarts() -> None:
    """From the backlog, too."""
    rows = [row(identity=f"r{n}", due=NOW - 5) for n in range(6)] + [row(Presence.GONE, identity=f"g{n}", harm=NOW - n, due=NOW) for n in range(3)]
    step = holding(*rows).step((), NOW)
    assert actions(step) == [Action.SEND] * 3 + [Action.RESTART]
    assert [task.event for task in step.tasks[:3]] == [9, 8, 7]


def test_an_endangered_restart_is_claimed_first() -> None:
    """A person dropped is worse than a ghost that stays a moment longer."""
    rows = [row(Presence.GONE, identity=f"g{n}") for n in range(6)]
    endangered = row(identity="r", running_since=NOW - DELAY + 5, due=NOW - 100)
    step = holding(*rows, endangered).step((), NOW)
    assert actions(step) == [Action.RESTART] + [Action.SEND] * 3


def test_restarts_past_their_deadline_do_not_hide_an_endangered_one() -> None:
    """Many fresh delegations, of unknown countdowns, wait; one that can still make it goes before them."""
    rows = [row(identity=f"r{n}", running_since=NOW - DELAY - 1 - n, due=NOW - 1) for n in range(20)]
    endangered = row(identity="r", running_since=NOW - DELAY + 5, due=NOW - 100)
    engine = holding(*rows, endangered)
    assert engine.step((), NOW).tasks[0].event == 21


def test_a_departure_that_arrives_alone_is_on_its_way_after_one_step() -> None:
    """It does not wait for another."""
    engine = holding(row())
    step = engine.step([left("S1", "PARTICIPANT_REMOVED")], NOW)
    assert actions(step) == [Action.SEND]
    assert step.tasks[0].lease_ends == NOW + POLICY.lease


def test_a_backlog_is_drained_most_urgent_first() -> None:
    """Departures by their age, then restarts by their deadlines, whatever the order of arrival."""
    random = Random(5)
    rows = [row(Presence.GONE, identity=f"g{n}", harm=NOW - 20 - random.random()) for n in range(30)]
    rows += [row(identity=f"r{n}", running_since=NOW - 1000 * random.random(), due=NOW - random.random()) for n in range(30)]
    random.shuffle(rows)
    engine = holding(*rows)
    order, step = [], engine.step((), NOW)
    while step.tasks:
        order += [task.event for task in step.tasks]
        step = engine.step([reply_to(task) for task in step.tasks], NOW)
    by_id = dict(enumerate(rows, 1))
    harms = [(by_id[n].lane, by_id[n].harm) for n in order]
    assert len(order) == 60
    assert harms == sorted(harms, key=lambda lane_harm: (lane_harm[0] or 0, lane_harm[1] or 0.0))


def test_a_lease_that_ran_out_is_claimed_anew_and_the_old_answer_is_ignored() -> None:
    """Only the newest claim can end anything."""
    engine = holding(row(Presence.GONE))
    (first,) = engine.step((), NOW).tasks
    assert engine.step((), NOW + 14.9).tasks == []
    (second,) = engine.step((), NOW + 15.0).tasks
    assert (second.event, second.claim) == (first.event, first.claim + 1)
    engine.step([reply_to(first)], NOW + 15.1)
    assert only(engine).state is State.ENDING
    engine.step([reply_to(second, Verdict.NOT_FOUND)], NOW + 15.2)
    assert only(engine).outcome is Outcome.SENT


def test_an_answer_that_is_given_twice_counts_once() -> None:
    """For the row and for the places."""
    engine = holding(*[row(identity=f"p{n}", due=NOW) for n in range(30)])
    first = engine.step((), NOW)
    again = [reply_to(first.tasks[0])] * 5
    assert len(engine.step(again, NOW).tasks) == 1
    assert stored(engine)[first.tasks[0].event - 1].restarts == 2


def test_a_restart_under_way_does_not_hold_up_the_goodbye() -> None:
    """Send is claimed in the same step as the departure, and the answer of the restart is ignored."""
    engine = holding(row(due=NOW))
    (restart,) = engine.step((), NOW).tasks
    step = engine.step([left("S1", "ROOM_DELETED")], NOW + 0.1)
    assert actions(step) == [Action.SEND]
    engine.step([reply_to(restart)], NOW + 0.2)
    assert only(engine).claimed
    engine.step([reply_to(step.tasks[0])], NOW + 0.3)
    assert only(engine).outcome is Outcome.SENT


# ── replaced delegations ──


def test_a_replaced_delegation_is_cancelled_once_the_new_one_is_verified() -> None:
    """Not before: the new one may turn out to be wrong."""
    engine = holding(row(delegation="D1", delay_id="old"))
    step = engine.step([accept("D2", "new")], NOW)
    assert actions(step) == [Action.RESTART]
    assert stored(engine)[0].state is State.LIVE
    step = engine.step([reply_to(step.tasks[0])], NOW)
    assert actions(step) == [Action.CANCEL]
    assert step.tasks[0].delay_id == "old"
    engine.step([reply_to(step.tasks[0])], NOW)
    assert [(there.state, there.outcome) for there in stored(engine)] == [(State.DONE, Outcome.REPLACED), (State.LIVE, Outcome.OPEN)]


def test_a_new_delegation_that_the_homeserver_does_not_know_replaces_nothing() -> None:
    """The old one goes on."""
    engine = holding(row(delegation="D1", delay_id="old"))
    step = engine.step([accept("D2", "new")], NOW)
    engine.step([reply_to(step.tasks[0], Verdict.NOT_FOUND)], NOW)
    assert [there.state for there in stored(engine)] == [State.LIVE, State.DONE]


def test_all_events_of_the_new_delegation_have_to_be_verified() -> None:
    """One of two is not enough."""
    engine = holding(row(delegation="D1", delay_id="old"))
    step = engine.step([accept("D2", "new-1", "new-2")], NOW)
    step2 = engine.step([reply_to(step.tasks[0])], NOW)
    assert Action.CANCEL not in actions(step2)
    step3 = engine.step([reply_to(step.tasks[1])], NOW)
    assert actions(step3) == [Action.CANCEL]


def test_events_that_are_in_the_new_delegation_too_are_carried_over() -> None:
    """They go on under it, and only the others are cancelled."""
    engine = holding(row(delegation="D1", delay_id="kept"), row(delegation="D1", delay_id="dropped"))
    step = engine.step([accept("D2", "kept")], NOW)
    assert isinstance(step.replies[0], Accepted)
    assert step.replies[0].created
    assert [(carried.event, carried.delegation) for carried in step.replies[0].carried] == [(1, "D1")]
    assert actions(step) == [Action.CANCEL]
    assert step.tasks[0].delay_id == "dropped"
    assert stored(engine)[0].delegation == "D2"


def test_a_refused_delegation_gives_back_what_it_carried() -> None:
    """And the rest of it is forgotten."""
    engine = holding(row(delegation="D1", delay_id="kept"))
    step = engine.step([accept("D2", "kept", "wrong")], NOW)
    assert isinstance(step.replies[0], Accepted)
    engine.step([Refuse("D2", step.replies[0].carried)], NOW)
    assert [(there.delegation, there.state) for there in stored(engine)] == [("D1", State.LIVE), ("D2", State.DONE)]


def test_a_refused_delegation_gives_back_the_delay_of_what_was_superseded_meanwhile() -> None:
    """Its cancel is planned by the countdown that the homeserver was told of, not by the refused one's."""
    engine = holding(row(delegation="D1", delay_id="kept", delay=DELAY))
    step = engine.step([accept("D2", "kept", "wrong", delay=DELAY / 2)], NOW)
    assert isinstance(step.replies[0], Accepted)
    step = engine.step([accept("D3", "newer"), *[reply_to(task) for task in step.tasks if task.delay_id == "kept"]], NOW + 1.0)
    engine.step([reply_to(task) for task in step.tasks if task.delay_id == "newer"], NOW + 2.0)
    before = next(there for there in stored(engine) if there.delay_id == "kept")
    assert (before.state, before.delegation) == (State.SUPERSEDED, "D2")
    engine.step([Refuse("D2", (Carried(before.id, "D1", ALICE, None, None, None, DELAY, OnEnd.SEND, None, NOW, None),))], NOW + 3.0)
    after = next(there for there in stored(engine) if there.delay_id == "kept")
    assert (after.state, after.delegation, after.delay, after.harm) == (State.SUPERSEDED, "D1", DELAY, after.deadline)


def test_nothing_of_a_refused_delegation_remains() -> None:
    """Also what it asked for at the end is forgotten."""
    engine = holding(row(delegation="D1", delay_id="kept"))
    step = engine.step([accept("D2", "kept", "wrong", on_end=OnEnd.CANCEL)], NOW)
    assert isinstance(step.replies[0], Accepted)
    engine.step([Refuse("D2", step.replies[0].carried)], NOW)
    assert stored(engine)[0].on_end is OnEnd.SEND


SEVERAL = {
    "one of before that was unknown": (
        [accept("D1", "X", identity="h1", alias="plain")],
        [accept("D2", "X", identity="h2", alias="plain"), accept("D3", "X", identity="h1", alias="plain")],
    ),
    "two that did not know of each other": (
        [],
        [accept("D1", "X", identity="h1"), accept("D2", "X", identity="plain"), accept("D3", "X", identity="h1", alias="plain")],
    ),
    "one that is superseded": (
        [],
        [
            accept("D0", "X", identity="h1"),
            accept("D1", "Y", identity="h1"),
            accept("D2", "X", identity="plain"),
            accept("D3", "X", identity="h1", alias="plain"),
        ],
    ),
}


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("name", SEVERAL)
def test_an_event_under_several_identities_becomes_one(name: str, at_once: bool) -> None:
    """Whatever has become of the others, the last delegation is taken, and no other row is responsible for the event."""
    unknown, accepts = SEVERAL[name]
    engine = fresh()
    step = engine.step(unknown, NOW)
    engine.step([reply_to(task, Verdict.NOT_FOUND) for task in step.tasks], NOW)
    replies = []
    for batch in [accepts] if at_once else [[given] for given in accepts]:
        step = engine.step(batch, NOW + 1)
        replies += step.replies
        engine.step([reply_to(task, sent_at=NOW + 1) for task in step.tasks if task.delay_id == "Y"], NOW + 1)
    assert [type(reply) for reply in replies] == [Accepted] * len(accepts)
    open_ones = [there for there in stored(engine) if there.delay_id == "X" and there.state is not State.DONE]
    assert [(there.delegation, there.identity, there.alias) for there in open_ones] == [("D3", "h1", "plain")]
    assert_counts(engine)


def test_a_refused_delegation_does_not_give_back_what_was_delegated_anew_there() -> None:
    """While it waited for the homeserver, the event was handed over under the old identity again."""
    engine = fresh()
    engine.step([accept("D1", "kept", identity="h1", alias="plain")], NOW)
    step = engine.step([accept("D2", "kept", "wrong", identity="h2", alias="plain")], NOW + 1)
    assert isinstance(step.replies[0], Accepted)
    engine.step([accept("D3", "kept", identity="h1")], NOW + 2)
    reply = engine.step([Refuse("D2", step.replies[0].carried)], NOW + 3).replies[0]
    assert not isinstance(reply, Exception)
    assert [(there.delegation, there.identity) for there in stored(engine) if there.state is not State.DONE] == [("D3", "h1")]
    assert_counts(engine)


def test_a_refused_delegation_gives_back_both_forms_of_the_identity() -> None:
    """Whoever is connected under the other form is still known after it."""
    engine = fresh()
    engine.step([accept("D1", "kept", identity="plain", alias="hashed")], NOW)
    step = engine.step([accept("D2", "kept", "wrong", identity="hashed")], NOW + 1)
    assert isinstance(step.replies[0], Accepted)
    engine.step([Refuse("D2", step.replies[0].carried), joined(identity="plain")], NOW + 2)
    kept = stored(engine)[0]
    assert (kept.delegation, kept.identity, kept.alias, kept.presence) == ("D1", "plain", "hashed", Presence.CONNECTED)


def test_a_new_delegation_of_somebody_connected_is_connected() -> None:
    """No joined will come."""
    engine = holding(row(delegation="D1"))
    engine.step([accept("D2", "new")], NOW)
    assert [there.presence for there in stored(engine)] == [Presence.CONNECTED] * 2


def test_a_new_delegation_of_somebody_away_ends_nothing() -> None:
    """A page reload: left, delegated anew, joined two seconds later."""
    engine = holding(row(delegation="D1", delay_id="old"))
    engine.step([left("S1")], NOW)
    step = engine.step([accept("D2", "new")], NOW + 1.9)
    assert {there.presence for there in stored(engine)} == {Presence.EXPECTED}
    restart = next(task for task in step.tasks if task.action is Action.RESTART)
    step = engine.step([reply_to(restart)], NOW + 2.0)
    for task in looks(step):
        engine.step([look_at(task, sent_at=NOW + 2.0)], NOW + 2.1)
    engine.step([joined("S2", 2000)], NOW + 4.0)
    assert [(there.state, there.presence) for there in stored(engine)] == [
        (State.SUPERSEDED, Presence.CONNECTED),
        (State.LIVE, Presence.CONNECTED),
    ]


def test_a_delegation_after_a_withdrawal_is_not_born_gone() -> None:
    """Of two delegations the newer is withdrawn, the older waits to be cancelled, its participant left: a third one expects somebody."""
    engine = holding(row(Presence.GONE, State.DONE, delay_id="withdrawn"), row(Presence.GONE, State.SUPERSEDED, delegation="D2", delay_id="old"))
    engine.step([accept("D3", "new")], NOW)
    assert stored(engine)[2].presence is Presence.EXPECTED


# ── looks ──


def test_one_look_serves_a_whole_room() -> None:
    """Twenty participants who are looked for are one request, then one more at a time."""
    engine = fresh()
    delegate(engine, *[f"p{n}" for n in range(20)])
    step = engine.step((), NOW + 1.0)
    assert len(looks(step)) == 1
    assert looks(engine.step((), NOW + 1.5)) == []
    present = [listed(f"S{n}", identity=f"p{n}") for n in range(20)]
    engine.step([look_at(looks(step)[0], *present, sent_at=NOW + 1.0)], NOW + 1.6)
    assert {there.presence for there in stored(engine)} == {Presence.CONNECTED}


@stores.only_sqlite
def test_the_rooms_of_a_batch_of_looks_are_read_together() -> None:
    """One statement for all of them."""
    engine = holding(*[row(identity=f"p{n}", room=f"r{n}") for n in range(4)])
    assert isinstance(engine.store, SqliteStore)
    engine.step([Missed()], NOW)
    claimed = looks(engine.step((), NOW))
    assert len(claimed) == 4
    statements: list[str] = []
    engine.store._connection.set_trace_callback(statements.append)
    step = engine.step([look_at(look, listed(identity=f"p{look.room[1:]}"), sent_at=NOW) for look in claimed], NOW + 0.1)
    engine.store._connection.set_trace_callback(None)
    assert step.replies == [Touched(1)] * 4
    reading = [statement for statement in statements if "SELECT" in statement and "room.room_sid" in statement and "room.due <=" not in statement]
    assert len(reading) == 1


def test_a_room_is_looked_at_when_the_first_of_its_participants_asks_for_it() -> None:
    """A departure that is checked after 2 s is not held up by one that is checked after 30 s."""
    engine = holding(row(identity="a"), row(identity="b"))
    engine.step([left("S1", "SERVER_SHUTDOWN", identity="a")], NOW)
    assert engine.step([left("S1", identity="b")], NOW + 1.0).wake == NOW + 3.0
    assert looks(engine.step((), NOW + 2.9)) == []
    (look,) = looks(engine.step((), NOW + 3.0))
    engine.step([look_at(look, sent_at=NOW + 3.0)], NOW + 3.1)
    assert [there.presence for there in stored(engine)] == [Presence.AWAY, Presence.GONE]


def test_looks_at_one_room_keep_a_distance() -> None:
    """One second, however many ask for it."""
    engine = holding(row(identity="a"), row(identity="b"))
    engine.step([left("S1", identity="a")], NOW)
    (look,) = looks(engine.step((), NOW + 2.0))
    engine.step([look_at(look, listed(identity="b"), sent_at=NOW + 2.0)], NOW + 2.1)
    engine.step([left("S1", "DUPLICATE_IDENTITY", identity="b"), aborted("S2", "CLIENT_INITIATED", identity="b")], NOW + 0.5)
    assert looks(engine.step((), NOW + 2.9)) == []
    assert len(looks(engine.step((), NOW + 3.0))) == 1


def test_looks_that_fail_come_less_and_less_often() -> None:
    """5, 10, 20, 40, 60 s, with a little jitter, and the routine looks between; and nobody is given up who has not said goodbye."""
    engine = fresh()
    delegate(engine, "p")
    times: list[float] = []
    now: float | None = NOW + 1.0
    while now is not None and len(times) < 8:
        step = engine.step((), now)
        for look in looks(step):
            times.append(now)
            step = engine.step([Looked(SFU, ROOM, look.claim, now, None, "timeout")], now)
        now = step.wake
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(0.75 * wait <= pause <= wait for pause, wait in zip(pauses[:3], (5, 10, 20), strict=True)), pauses
    assert max(pauses) <= 60.0
    assert sum(pauses[3:]) / len(pauses[3:]) >= 20.0, pauses
    assert only(engine).presence is Presence.EXPECTED


def test_an_answer_to_an_old_look_is_ignored() -> None:
    """Its lease ran out, and another look is under way."""
    engine = holding(row())
    engine.step([left("S1")], NOW)
    (first,) = looks(engine.step((), NOW + 2.0))
    (second,) = looks(engine.step((), NOW + 17.0))
    assert engine.step([look_at(first, sent_at=NOW + 2.0)], NOW + 17.1).replies == [Touched(0)]
    assert only(engine).presence is Presence.AWAY
    engine.step([look_at(second, sent_at=NOW + 17.0)], NOW + 17.2)
    assert only(engine).presence is Presence.GONE


def test_a_room_is_forgotten_when_nothing_is_left_in_it() -> None:
    """The next look finds nobody to look for."""
    engine = fresh()
    delegate(engine, "p")
    (look,) = looks(engine.step((), NOW + 1.0))
    engine.step([Withdraw("p")], NOW + 1.1)
    engine.step([look_at(look, sent_at=NOW + 1.0)], NOW + 1.2)
    assert engine.store.census().rooms == {}
    assert stores.room_of(engine.store, ROOM) is None


def test_in_doubt_an_empty_list_proves_nothing() -> None:
    """The room came up a second time with the same sid; or it finished while somebody was connected, on an SFU that has shown to have several
    nodes: one of them had been away."""
    twice = [RoomChanged(SFU, room, RoomNews.STARTED, "RM1", id) for room in (ROOM, "elsewhere") for id in ("EV1", "EV2")]
    for evidence in (twice[:2], [*twice[2:], RoomChanged(SFU, ROOM, RoomNews.FINISHED, "RM1")]):
        engine = holding(row(identity="a"), row(identity="b"), row(identity="c", room="elsewhere"))
        engine.step([left("S1", identity="b")], NOW)
        at, step = NOW + 0.5, engine.step(evidence, NOW + 0.5)
        while stored(engine)[1].presence is not Presence.GONE:
            assert at < NOW + 4.0
            step = engine.step([look_at(look, sent_at=at) for look in looks(step) if look.room == ROOM], at + 0.5)
            at += 0.5
        assert [there.presence for there in stored(engine)[:2]] == [Presence.CONNECTED, Presence.GONE]


def test_a_room_that_finished_on_an_sfu_of_one_node_is_over() -> None:
    """Whoever is connected goes missing in the next look, which comes at once, and is gone in the one that confirms it."""
    engine = holding(row())
    step = engine.step([RoomChanged(SFU, ROOM, RoomNews.FINISHED, "RM1")], NOW)
    now = NOW
    while only(engine).presence is not Presence.GONE:
        assert now < NOW + 20.0
        inputs: list[Input] = [look_at(look, sent_at=now) for look in looks(step)]
        step = engine.step(inputs, now)
        assert step.wake is not None
        now = now if looks(step) else step.wake
    assert only(engine).reason == MISSING


def test_a_new_room_sid_ends_the_doubt() -> None:
    """It is another room."""
    engine = holding(row(identity="a"), row(identity="b"))
    engine.step([left("S1", identity="b")], NOW)
    engine.step([RoomChanged(SFU, ROOM, RoomNews.STARTED, sid) for sid in ("RM1", "RM1", "RM2")], NOW + 0.5)
    (look,) = looks(engine.step((), NOW + 2.0))
    engine.step([look_at(look, sent_at=NOW + 2.0)], NOW + 2.1)
    assert stored(engine)[0].presence is Presence.AWAY


def test_a_late_end_of_an_old_session_is_a_reason_to_doubt() -> None:
    """A node had been away: lists are wrong for long, and who joined has not left."""
    engine = holding(row(sessions=(live("S1"), live("S2", 2000))), row(identity="b"))
    engine.step([left("S1", identity="b")], NOW)
    engine.step([left("S1", "CONNECTION_TIMEOUT")], NOW)
    (look,) = looks(engine.step((), NOW + 2.0))
    engine.step([look_at(look, sent_at=NOW + 2.0)], NOW + 2.1)
    assert stored(engine)[0].presence is Presence.CONNECTED


# ── time ──


def test_the_wake_is_the_earliest_due() -> None:
    """Of restarts, looks, timers and leases."""
    engine = holding(row(identity="a", due=NOW + 50), row(identity="b", due=NOW + 40, homeserver="other.test"))
    assert engine.step((), NOW).wake == NOW + 40
    assert engine.step([left("S1", identity="a")], NOW + 1).wake == NOW + 3
    assert fresh().step((), NOW).wake is None
    assert holding(row(due=NOW + 2000)).step((), NOW).wake == NOW + 0.75 * POLICY.interval  # the routine look


def test_the_history_is_as_new_as_the_state() -> None:
    """Also for who asks in the very step that changed it."""
    engine = fresh()
    engine.step([accept("D1")], NOW)
    _, found = engine.step([Withdraw("D1"), Find("D1")], NOW + 1.0).replies
    assert isinstance(found, Found)
    assert found.rows[0].state is State.DONE
    assert [note.what for note in found.history] == ["delegated", "withdrawn"]
    assert engine.step([Find("D1")], NOW + 2.0).replies == [found]


def test_restarts_that_are_due_within_a_moment_are_claimed_together() -> None:
    """One transaction serves them. A look is made when it is due."""
    engine = holding(*[row(identity=f"p{n}", due=NOW + 40 + 0.01 * n) for n in range(1, 5)])
    wake = engine.step((), NOW).wake
    assert wake == NOW + 40 + TOGETHER
    assert len(engine.step((), wake).tasks) == 4
    assert holding(row(due=NOW + 2000)).step([left("S1")], NOW + 0.1).wake == NOW + 2.1


def test_answers_are_wanted_at_once_where_a_departure_waits_for_a_place() -> None:
    """Restarts do not need it, and neither does a departure once it is claimed."""
    engine = holding(*[row(identity=f"p{n}", due=NOW, harm=NOW + 1000) for n in range(20)])
    step = engine.step((), NOW)
    assert not step.hurry
    hurried = engine.step([left("S1", "ROOM_DELETED", identity="p19")], NOW)
    assert hurried.hurry
    assert engine.step((), NOW).hurry
    after = engine.step([reply_to(task) for task in step.tasks], NOW + 0.1)
    assert Action.SEND in actions(after)
    assert not after.hurry


def test_answers_want_company_where_restarts_wait_for_a_place() -> None:
    """So many as free half of the homeserver's places; none is asked for as long as nothing is due, and once nothing waits any more."""
    engine = holding(*[row(identity=f"p{n}", due=NOW + 1.0) for n in range(FIRST_WIDTH + 1)])
    assert engine.step((), NOW).company == 0
    step = engine.step((), NOW + 1.0)
    assert (len(step.tasks), step.company) == (FIRST_WIDTH, FIRST_WIDTH // 2)
    assert engine.step([Find("none")], NOW + 1.0).company == FIRST_WIDTH // 2
    after = engine.step([reply_to(task, sent_at=NOW + 1.0) for task in step.tasks], NOW + 1.1)
    assert (len(after.tasks), after.company) == (1, 0)


def test_answers_of_a_homeserver_with_one_place_want_no_company() -> None:
    """One of them frees it."""
    engine = holding(row(identity="a", due=NOW), row(identity="b", due=NOW), most=1)
    step = engine.step((), NOW)
    assert (len(step.tasks), step.company) == (1, 1)


def test_of_several_homeservers_the_one_with_the_fewest_places_says_how_much_company_answers_want() -> None:
    """Of those where something waits: another one's places are as they are."""
    most = {"none.test": 1, "two.test": 2, "four.test": 4}
    waiting = [row(identity=f"{n} at {name}", homeserver=name, due=NOW) for name in ("two.test", "four.test") for n in range(5)]
    store = holding(*waiting, row(homeserver="none.test", due=NOW)).store
    engine = Engine(store, POLICY, Limits(), Random(0), in_flight=lambda name: most[name])
    step = engine.step((), NOW)
    assert Counter(task.homeserver for task in step.tasks) == {"none.test": 1, "two.test": 2, "four.test": 4}
    assert step.company == 1
    at_two = [task for task in step.tasks if task.homeserver == "two.test"]
    while at_two:
        step = engine.step([reply_to(task) for task in at_two], NOW + 0.1)
        at_two = [task for task in step.tasks if task.homeserver == "two.test"]
    assert step.company == 2


def test_nothing_is_done_before_the_wake_and_something_at_it() -> None:
    """Stepping exactly at the time that a step asks for always makes progress, through whole calls and their pruning."""
    for seed in range(5):
        random = Random(seed)
        engine = fresh(random=Random(seed), most=2)
        engine.step([accept(f"D{n}", identity=f"p{n}", room=f"r{n % 2}", delay=random.choice([30.0, 100.0])) for n in range(8)], NOW)
        now, step = NOW, engine.step([joined(identity=f"p{n}", room=f"r{n % 2}") for n in range(0, 8, 2)], NOW)
        waiting = list(step.tasks) + engine.step((), NOW).tasks
        idle, last = 0, NOW
        for count in range(600):
            inputs = answers(random, waiting, now)
            if count == 200:
                inputs += [left("S1", identity=f"p{n}", room=f"r{n % 2}") for n in range(8)]
            before, step = step, engine.step(inputs, now)
            waiting = list(step.tasks)
            idle = 0 if step.tasks or step.changes or now > last + 0.9 else idle + 1
            last = now
            assert idle < 3, f"busy loop at {now}: {before} {step}"
            if step.wake is None:
                break
            assert step.wake >= now or waiting
            now = max(now + 0.001, step.wake) if not waiting else now  # a step takes some time


def answers(random: Random, tasks: Iterable[Task], now: float) -> list[Input]:
    """What might become of claimed actions: mostly success, sometimes each of the failures."""
    inputs: list[Input] = []
    for task in tasks:
        if task.action is Action.LOOK:
            inputs.append(Looked(SFU, task.room, task.claim, now, random.choice([(), (), None])))
        else:
            verdict = random.choice([Verdict.DONE] * 5 + list(Verdict))
            inputs.append(reply_to(task, verdict, sent_at=now, retry_after=random.choice([None, 2.0]) if verdict is Verdict.LIMITED else None))
    return inputs


def test_what_is_finished_is_pruned_after_its_time() -> None:
    """With its history and its room."""
    engine = holding(row(delegation="D1"))
    engine.step([left("S1", "ROOM_DELETED"), Withdraw("D1")], NOW)
    (look,) = looks(engine.step((), NOW + POLICY.keep - 2))  # the room's routine look; it finds nobody to look for
    assert engine.step([look_at(look, sent_at=NOW + POLICY.keep - 2)], NOW + POLICY.keep - 1).wake == NOW + POLICY.keep
    assert len(stored(engine)) == 1
    wake = engine.step((), NOW + POLICY.keep).wake
    assert wake is None or engine.step((), wake).wake is None
    assert stored(engine) == []
    assert engine.step([Find("D1")], NOW + POLICY.keep).replies == [Found((), ())]
    assert engine.store.atomically(lambda tx: tx.history([1])) == []
    assert engine.store.census().rooms == {}


def test_nothing_is_remembered_of_homeservers_whose_events_are_all_pruned() -> None:
    """With patterns there may be any number of them: neither a due time nor a zero."""
    engine = fresh()
    now, names = NOW, [f"h{n}.test" for n in range(3)]
    step = engine.step([accept(f"D{n}", room=f"r{n}", homeserver=name) for n, name in enumerate(names)], now)
    engine.step([reply_to(task, sent_at=now) for task in step.tasks], now + 0.1)
    engine.step([Withdraw(f"D{n}") for n in range(len(names))], now + 0.2)
    assert set(engine._due) == set(names)
    assert_exact(engine)
    wake = engine.step((), now + 1.0).wake
    while wake is not None:
        step = engine.step((), wake)
        assert_exact(engine)
        wake = engine.step([look_at(look, sent_at=wake) for look in looks(step)], wake).wake if step.tasks else step.wake
    assert stored(engine) == []
    forgetting(engine)
    assert engine._due == {}
    assert dict(engine.states) == {}
    assert (dict(engine._open), engine._load) == ({}, {})
    assert (engine._paces, engine._was_exempt) == ({}, {})


def test_an_event_that_moves_to_another_homeserver_is_counted_there_only() -> None:
    """Superseded, its cancel under way, and then delegated anew for the other one."""
    engine = fresh()
    for name, delay_id in (("A", "first"), ("B", "second")):
        step = engine.step([accept(name, delay_id, homeserver="a.test")], NOW)
        step = engine.step([reply_to(task) for task in step.tasks], NOW + 0.1)
    assert actions(step) == [Action.CANCEL]
    engine.step([accept("C", "first", homeserver="b.test")], NOW + 0.2)
    assert [(there.homeserver, there.state) for there in stored(engine)] == [("b.test", State.LIVE), ("a.test", State.LIVE)]
    assert_exact(engine)
    engine.step([Withdraw("B")], NOW + 0.3)
    forgetting(engine)
    assert dict(engine._open) == {"b.test": 1}
    assert engine._load == pytest.approx({"b.test": 1 / DELAY})
    engine.step([Withdraw("A"), Withdraw("C")], NOW + 0.4)
    forgetting(engine)
    assert (dict(engine._open), engine._load) == ({}, {})


def test_an_event_that_vanished_and_moves_to_another_homeserver_is_counted_there_only() -> None:
    """It was not known at the first one any more."""
    engine = fresh()
    step = engine.step([accept("A", "moving", homeserver="a.test")], NOW)
    engine.step([reply_to(task) for task in step.tasks], NOW + 0.1)
    step = engine.step((), NOW + DELAY * 0.9)
    engine.step([reply_to(task, Verdict.NOT_FOUND, sent_at=NOW + DELAY * 0.9) for task in step.tasks if task.event], NOW + DELAY * 0.9)
    assert only(engine).state is State.VANISHED
    engine.step([accept("B", "moving", homeserver="b.test")], NOW + DELAY * 0.9 + 0.1)
    assert only(engine).homeserver == "b.test"
    assert_exact(engine)
    engine.step([Withdraw("B")], NOW + DELAY * 0.9 + 0.2)
    forgetting(engine)
    assert (dict(engine._open), engine._load) == ({}, {})


def assert_exact(engine: Engine) -> None:
    """What the engine counts is what an engine would count that begins with this database, and nothing else: no zeros."""
    census = engine.store.census()
    assert dict(engine.states) == census.states
    opened = Counter(there.homeserver for there in stored(engine) if there.state is not State.DONE)
    assert +engine._open == opened
    assert {name: load for name, load in engine._load.items() if engine._open[name]} == pytest.approx(census.load)
    forgetting(engine)
    assert dict(engine._open) == dict(opened)
    assert engine._load == pytest.approx(census.load)


def forgetting(engine: Engine) -> None:
    """Where others may have something open at a homeserver, the count that is made now and then tells when it can be forgotten."""
    if engine.store.shared:
        engine.recount(engine.store.census())


def test_the_history_tells_what_happened() -> None:
    """In order, with reasons and answers, and in the reply to whoever asks."""
    engine = fresh()
    step = engine.step([accept("D1"), joined()], NOW)
    engine.step([reply_to(step.tasks[0])], NOW + 1)
    step = engine.step([left("S1", "PARTICIPANT_REMOVED")], NOW + 2)
    engine.step([reply_to(step.tasks[0], Verdict.REFUSED)._replace(detail="403 M_FORBIDDEN")], NOW + 3)
    (found,) = engine.step([Find("D1")], NOW + 4).replies
    assert isinstance(found, Found)
    assert [(note.at - NOW, note.what, note.detail) for note in found.history] == [
        (0.0, "delegated", "D1"),
        (0.0, "connected", ""),
        (1.0, "verified", ""),
        (2.0, "gone", "PARTICIPANT_REMOVED"),
        (2.0, "ending", ""),
        (3.0, "rejected", "403 M_FORBIDDEN"),
    ]


def test_new_rules_hold_from_the_next_step_on() -> None:
    """reconfigure() changes policy, limits and the numbers of requests in flight."""
    engine = fresh()
    engine.reconfigure(replace(POLICY, lease=99.0), Limits(max_per_participant=0))
    assert isinstance(engine.step([accept("D1")], NOW).replies[0], TooMany)


def test_the_backlog_is_told_by_homeserver_and_lane() -> None:
    """How many rows are due, and since when the first of them."""
    engine = holding(row(identity="a", due=NOW - 30), row(identity="b", due=NOW - 3), row(identity="c"), row(Presence.GONE, identity="d"))
    assert engine.backlog(NOW) == {(HOMESERVER, Lane.RESTART): (2, NOW - 30), (HOMESERVER, Lane.END): (1, NOW)}
    assert engine.backlog(NOW - 40) == {}


def test_a_departure_waits_until_its_event_is_ended() -> None:
    """Also while it is under way, and when it is to be tried again later: then nothing is due, and somebody waits all the same."""
    engine = holding(
        row(Presence.GONE, identity="a", ended_at=NOW - 30.0, harm=NOW - 30.0, due=NOW + 20.0),
        row(Presence.GONE, identity="b", ended_at=NOW - 3.0, harm=NOW - 3.0),
        row(identity="c", due=NOW - 99.0),
    )
    assert engine.waiting_since() == {HOMESERVER: NOW - 30.0}
    assert holding(row(identity="c", due=NOW - 99.0)).waiting_since() == {}


def test_an_engine_that_stops_claims_nothing_more() -> None:
    """What is under way is still counted and taken in."""
    engine = holding(row(identity="a", due=NOW), row(identity="b"))
    (task,) = engine.step((), NOW).tasks
    assert engine.in_flight == 1
    engine.stopping = True
    assert engine.step([left("S1", "ROOM_DELETED", identity="b")], NOW).tasks == []
    assert engine.step([reply_to(task)], NOW).tasks == []
    assert engine.in_flight == 0
    assert [there.state for there in stored(engine)] == [State.LIVE, State.ENDING]


# ── a store that fails ──


class FullDisk:
    """A connection to SQLite whose next COMMIT fails."""

    says = "disk is full"

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection
        self.armed = False

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        if self.armed and sql == "COMMIT":
            self.armed = False
            raise sqlite3.OperationalError("database or disk is full")
        return self._connection.execute(sql, *parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class CutConnection:
    """A PostgreSQL that ends the connection when the next step has done its work, and is about to write and to commit it."""

    says = "goes on by itself when the database is back"

    def __init__(self, store: PostgresStore):
        self._atomically = store.atomically
        self._url = store._url
        self.armed = False

    def atomically(self, work: Callable[[Transaction], Any], **more: Any) -> Any:
        def until_cut(tx: Transaction) -> Any:
            result = work(tx)
            if self.armed:
                self.armed = False
                assert postgresql.shared().terminate_backends(self._url)
            return result

        return self._atomically(until_cut, **more)


def failing(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> FullDisk | CutConnection:
    """What makes the next commit fail when it is armed."""
    store = engine.store
    if isinstance(store, SqliteStore):
        full = FullDisk(store._connection)
        monkeypatch.setattr(store, "_connection", full)
        return full
    assert isinstance(store, PostgresStore)
    cut = CutConnection(store)
    monkeypatch.setattr(store, "atomically", cut.atomically)
    return cut


def test_a_commit_that_fails_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step raises, and the same inputs again come to what they would have come to at first."""
    engine, twin = fresh(random=Even()), fresh(random=Even())
    connection = failing(monkeypatch, engine)
    script: list[list[Input]] = [
        [accept("D1"), accept("D2", identity="bob")],
        [joined(), joined(identity="bob")],
        [left("S1", "ROOM_DELETED")],
        [Withdraw("D2"), accept("D3", identity="bob")],
    ]
    for n, inputs in enumerate(script):
        before = stored(engine)
        connection.armed = True
        with pytest.raises(StoreUnavailable, match=connection.says):
            engine.step(inputs, NOW + n)
        assert stored(engine) == before
        assert_counts(engine)
        if twin.store.shared:  # the numbers that the failed step has taken are used up
            for _ in (event for given in inputs if isinstance(given, Accept) for event in given.events):
                twin.store.atomically(lambda tx: tx.new_id())
        mine, other = engine.step(inputs, NOW + n), twin.step(inputs, NOW + n)
        assert (mine.replies, mine.tasks, mine.wake, mine.notes) == (other.replies, other.tasks, other.wake, other.notes)
        assert stored(engine) == stored(twin)


def test_an_answer_frees_its_place_once_though_it_could_not_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It came back, whatever the database says; handed in again it counts for the row only."""
    engine = holding(*[row(identity=f"p{n}", due=NOW) for n in range(30)])
    connection = failing(monkeypatch, engine)
    first = engine.step((), NOW)
    came_back = [reply_to(task, Verdict.UNCERTAIN) for task in first.tasks]
    connection.armed = True
    with pytest.raises(StoreUnavailable):
        engine.step(came_back, NOW)
    again = engine.step(came_back, NOW)
    assert [reply for reply in again.replies if reply != Touched(1)] == []
    assert engine._pace(HOMESERVER).in_flight == len(again.tasks)
    wake = engine.step((), NOW + 1.0).wake
    assert wake is not None
    assert wake <= NOW + 15.0


def test_what_could_not_be_claimed_is_claimed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed step has no request under way."""
    engine = holding(row(due=NOW))
    connection = failing(monkeypatch, engine)
    connection.armed = True
    with pytest.raises(StoreUnavailable):
        engine.step((), NOW)
    assert actions(engine.step((), NOW)) == [Action.RESTART]


# ── anything ──


def assert_counts(engine: Engine) -> None:
    """The engine's counts equal a recount, and it sleeps past nothing that the database has planned; for long, where others may be about to do it."""
    census = engine.store.census()
    patience = BUSY_ELSEWHERE if engine.store.shared else 0.0
    assert +engine.states == Counter(census.states)
    for homeserver, due in census.schedule.items():
        assert engine._due[homeserver] <= due + patience
    for sfu, due in census.rooms.items():
        assert engine._rooms_due[sfu] <= due + patience


class Anything:
    """A random course of things: whatever clients, SFU and homeserver may do, sensible or not."""

    def __init__(self, seed: int):
        self.random = Random(seed)
        self.now = NOW
        self.waiting: list[Task] = []
        self.answered: list[Input] = []
        self.count = 0

    def input(self) -> Input:
        random = self.random
        identity, room = random.choice("abcd"), random.choice(["r1", "r2"])
        sid = random.choice(["S1", "S2", "S3", ""])
        delegation = f"D{random.randrange(max(1, self.count))}"
        match random.randrange(12):
            case 0 | 1:
                self.count += 1
                ids = random.sample([f"delay-{identity}-{n}" for n in range(4)], random.randint(1, 3))
                delay = random.choice([30.0, 100.0, 3600.0])
                alias = f"{identity}-hashed" if identity in "ab" else None
                made = accept(f"D{self.count}", *ids, identity=identity, room=room, homeserver=f"{identity > 'b'}.test", delay=delay, alias=alias)
                return self.another_way(made)
            case 2 | 3 | 4:
                return joined(sid, random.choice([0, 1000, 2000]), identity=random.choice([identity, f"{identity}-hashed"]), room=room)
            case 5 | 6:
                reason = random.choice(["CLIENT_INITIATED", "ROOM_DELETED", "DUPLICATE_IDENTITY", "CONNECTION_TIMEOUT", "SERVER_SHUTDOWN"])
                what: Callable[..., Seen] = random.choice([left, left, aborted])
                return what(sid, reason, random.choice([0, 1000, 2000]), identity=identity, room=room)
            case 7:
                return RoomChanged(SFU, room, random.choice(list(RoomNews)), random.choice(["RM1", "RM2", ""]))
            case 8:
                choices: list[Input] = [Withdraw(delegation), Find(delegation), Refuse(delegation), joined("\ud800", identity=identity)]
                return random.choice(choices)
            case 9:
                return Due(random.randint(1, 20))
            case _:
                return random.choice(self.answered) if self.answered else Find("none")

    def another_way(self, made: Accept) -> Accept:
        """The same by another endpoint, perhaps."""
        plain = made.identity
        since = self.random.choice([None, self.now, self.now - 20.0])
        made = replace(made, user=f"@{plain}:{made.homeserver}", events=tuple(event._replace(running_since=since) for event in made.events))
        forms = (f"{plain}-member", f"{plain}-hashed")
        match self.random.randrange(4):
            case 0:
                return replace(made, identity=forms[0], alias=None)
            case 1:
                return replace(made, identity=forms[0], alias=plain, twin=forms[1])
            case 2:
                return replace(made, identity=forms[1], alias=plain, twin=forms[0])
            case _:
                return made

    def inputs(self) -> list[Input]:
        given: list[Input] = [self.input() for _ in range(self.random.choice([0, 0, 1, 2, 5]))]
        for task in list(self.waiting):
            if self.random.random() < 0.7:
                self.waiting.remove(task)
                given += self.answer(task)
        self.random.shuffle(given)
        return given

    def answer(self, task: Task) -> Sequence[Input]:
        if task.action is Action.LOOK:
            shown = tuple(listed(f"S{self.random.randint(1, 3)}", self.random.choice(["ACTIVE", "JOINED"]), identity=who) for who in "abcd")
            what = self.random.choice([None, (), shown[: self.random.randint(0, 4)]])
            self.answered = [*self.answered[-20:], Looked(SFU, task.room, task.claim, self.now, what)]
        else:
            verdict = self.random.choice([Verdict.DONE] * 6 + list(Verdict))
            self.answered = [*self.answered[-20:], reply_to(task, verdict, sent_at=self.now)]
        return self.answered[-1:]

    def pass_time(self, wake: float | None) -> None:
        ahead = self.random.choice([0.0, 0.01, 0.5, 3.0, 20.0, -1.0])
        self.now = max(self.now, wake) if ahead < 0 and wake is not None else self.now + max(0.0, ahead)
        if self.random.random() < 0.01:
            self.now += POLICY.keep


@stores.seeds(*range(6), on_postgresql=1)
def test_whatever_happens_counts_schedule_and_rows_agree(seed: int) -> None:
    """500 steps of anything: every reply fits its input, every row is consistent, nobody connected is ended, the counts are right."""
    course = Anything(seed)
    engine = fresh(random=Random(seed), most=8)
    for _ in range(500):
        inputs = course.inputs()
        step = engine.step(inputs, course.now)
        assert len(step.replies) == len(inputs)
        for given_input, reply in zip(inputs, step.replies, strict=True):
            assert fits(given_input, reply), (given_input, reply)
        for change in step.changes:
            if change.old is not None and change.old.state is State.DONE and change.new.state is not State.DONE:
                assert not isinstance(change.given, (Seen, Looked, Answered, Due))
        by_id = {there.id: there for there in stored(engine)}
        for task in step.tasks:
            if task.action is Action.LOOK:
                continue
            there = by_id[task.event]
            assert (there.claimed, there.claim, action(there), there.lane is Lane.TIMER) == (True, task.claim, task.action, False)
            assert task.action is not Action.SEND or there.presence is Presence.GONE
        for there in by_id.values():
            assert_consistent(there)
        assert_counts(engine)
        course.waiting += step.tasks
        course.pass_time(step.wake)


@stores.seeds(0, 2, on_postgresql=1)
def test_the_rows_of_one_participant_agree(seed: int) -> None:
    """They get the same inputs, whichever of them are in a batch together."""
    course = Anything(seed)
    engine = fresh(random=Random(seed), most=8)
    for _ in range(500):
        step = engine.step(course.inputs(), course.now)
        assert_agree(stored(engine))
        course.waiting += step.tasks
        course.pass_time(step.wake)


def fits(given_input: Input, reply: Reply | Exception) -> bool:
    if isinstance(reply, Exception):
        return isinstance(reply, TooMany) or (isinstance(reply, UnicodeEncodeError) and isinstance(given_input, Seen))
    kinds: dict[type, type] = {Find: Found, Withdraw: Withdrawn, Refuse: Withdrawn}
    expected = kinds.get(type(given_input), Accepted if type(given_input).__name__ == "Accept" else Touched)
    return isinstance(reply, expected)


def assert_agree(rows: Iterable[DelayedEvent]) -> None:
    """The rows of one participant, known by the same identities, that are in force say the same of where it is."""
    said: dict[tuple[str, str, frozenset[str]], set[Presence]] = {}
    for there in rows:
        if there.state not in (State.DONE, State.SUPERSEDED):
            said.setdefault((there.sfu, there.room, frozenset(there.forms)), set()).add(there.presence)
    assert all(len(presences) == 1 for presences in said.values()), said


def test_a_room_start_that_is_told_twice_is_no_reason_to_doubt() -> None:
    """LiveKit repeats a webhook that was not answered: the same id is the same news."""
    engine = holding(row())
    engine.step([left("S9", "DUPLICATE_IDENTITY")], NOW)  # the room is known once somebody is to be looked for
    engine.step([accept("D2", "other", identity="bob")], NOW)
    engine.step([RoomChanged(SFU, ROOM, RoomNews.STARTED, "RM1", "EV1")] * 2, NOW + 0.5)
    room = stores.room_of(engine.store, ROOM)
    assert room is not None
    assert room.doubt_until == 0.0
    engine.step([RoomChanged(SFU, ROOM, RoomNews.STARTED, "RM1", "EV2")], NOW + 0.6)
    room = stores.room_of(engine.store, ROOM)
    assert room is not None
    assert room.doubt_until > NOW


def test_a_verified_delegation_can_always_be_replaced() -> None:
    """The limit is about delegations that their homeserver has not confirmed, not about the one that is in force."""
    engine = fresh(limits=Limits(max_per_participant=1))
    (task,) = [task for task in engine.step([accept("D1", "first")], NOW).tasks if task.action is Action.RESTART]
    engine.step([reply_to(task)], NOW + 0.1)
    assert isinstance(engine.step([accept("D2", "second")], NOW + 0.2).replies[0], Accepted)


# ── what must not come back ──


def test_a_refused_delegation_of_several_events_leaves_the_old_one_alone() -> None:
    """One of two was unknown: the other one, though verified, does not make the delegation a whole, and the old event is not cancelled."""
    engine = holding(row(delegation="D1", delay_id="old"))
    step = engine.step([accept("D2", "unknown", "good")], NOW)
    unknown, good = sorted((task for task in step.tasks if task.action is Action.RESTART), key=lambda task: task.event)
    engine.step([reply_to(unknown, Verdict.NOT_FOUND)], NOW + 0.1)
    step = engine.step([reply_to(good)], NOW + 0.2)
    assert Action.CANCEL not in actions(step)
    assert stored(engine)[0].state is State.LIVE


def test_going_back_to_the_earlier_event_is_a_new_delegation() -> None:
    """a, then b, then a again while b is not verified: a is what holds, and b is what is cancelled."""
    engine = holding(row(delegation="D1", delay_id="a"))
    engine.step([accept("D2", "b")], NOW)
    step = engine.step([accept("D3", "a")], NOW + 0.1)
    assert isinstance(step.replies[0], Accepted)
    assert step.replies[0].created
    assert [(there.delay_id, there.state) for there in stored(engine)] == [("a", State.LIVE), ("b", State.SUPERSEDED)]


def test_a_long_retry_after_does_not_silence_a_homeserver() -> None:
    """Whatever it says, it is asked again within a minute or so: deadlines go on."""
    engine = holding(*[row(identity=f"p{n}", due=NOW) for n in range(8)])
    tasks = engine.step((), NOW).tasks
    step = engine.step([reply_to(task, Verdict.LIMITED, retry_after=3600.0) for task in tasks], NOW)
    assert step.wake is not None
    assert step.wake <= NOW + POLICY.retry_most * 1.1


def test_a_limit_of_one_user_is_not_everybodys() -> None:
    """A request with a user's own token is charged to that user's limit."""
    engine = holding(*[row(identity=f"p{n}", due=NOW) for n in range(8)])
    (first, *_) = engine.step((), NOW).tasks
    step = engine.step([reply_to(first, Verdict.LIMITED, retry_after=30.0)._replace(alone=True)], NOW)
    assert len(step.tasks) == 1
    assert step.tasks[0].event != first.event


def test_a_departure_is_looked_at_in_time_although_looks_fail() -> None:
    """Somebody else in the room cannot be found, and the tries become rare; who hangs up does not wait for that."""
    engine = holding(row(identity="a"))
    engine.step([accept("D2", "x", identity="b")], NOW)
    now, step = NOW, engine.step((), NOW)
    for _ in range(6):  # until tries are a minute apart
        assert step.wake is not None
        now = step.wake
        step = engine.step([reply_to(task) for task in step.tasks if task.action is not Action.LOOK], now)
        for task in looks(step):
            step = engine.step([Looked(SFU, ROOM, task.claim, now, None)], now)
    engine.step([left("S1", identity="a")], now)
    step = engine.step((), now + 2.0)
    for task in looks(step):
        step = engine.step([Looked(SFU, ROOM, task.claim, now + 2.0, None)], now + 2.0)
    assert next(there for there in stored(engine) if there.identity == "a").presence is Presence.GONE


def test_a_database_that_fails_between_two_of_a_split_batch_loses_no_claim() -> None:
    """A text that cannot be written makes the batch go one by one; what the first ones claimed is still handed out."""
    engine = fresh()
    atomically, calls = engine.store.atomically, 0

    def failing(work: Any, **_: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StoreUnavailable("full")
        return atomically(work)

    engine.store.atomically = failing  # type: ignore[method-assign]
    step = engine.step([accept("D1"), accept("D-bad", "delay\ud800", identity="bob")], NOW)
    assert isinstance(step.replies[0], Accepted)
    assert isinstance(step.replies[1], StoreUnavailable)
    assert [task.delegation for task in step.tasks] == ["D1"]


def test_a_defect_that_is_met_between_two_of_a_split_batch_loses_no_claim() -> None:
    """A text that cannot be written, and timers that fail after it: the exception is that input's reply, and what others claimed is handed out."""
    engine = fresh()
    atomically, calls = engine.store.atomically, 0

    def failing(work: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # all together, the first one, the bad one, and then nothing but the timers
            raise KeyError("a defect")
        return atomically(work, **more)

    engine.store.atomically = failing  # type: ignore[method-assign]
    bad = accept("D-bad", "delay\ud800", identity="bob")
    step = engine.step([accept("D1"), bad, accept("D2", identity="carol")], NOW)
    assert [type(reply) for reply in step.replies] == [Accepted, KeyError, Accepted]
    assert [task.delegation for task in step.tasks] == ["D1", "D2"]
    engine.store.atomically = atomically  # type: ignore[method-assign]
    assert_counts(engine)


# ── rooms are looked at although nobody asks for it ──


def room_of(engine: Engine, name: str = ROOM) -> Room:
    room = stores.room_of(engine.store, name)
    assert room is not None
    return room


def run_for(
    engine: Engine, seconds: float, begin: float, see: Callable[[str, float], tuple[Listed, ...] | None], first: Sequence[Input] = ()
) -> list[tuple[float, str]]:
    """Let time pass, with a homeserver that does everything and an SFU that is seen by `see`; returns when which room was looked at."""
    looked_at: list[tuple[float, str]] = []
    now, step = begin, engine.step(first, begin)
    while True:
        inputs: list[Input] = []
        for task in step.tasks:
            if task.action is Action.LOOK:
                looked_at.append((now, task.room))
                inputs.append(Looked(SFU, task.room, task.claim, now, see(task.room, now)))
            else:
                inputs.append(reply_to(task, sent_at=now))
        if not inputs:
            if step.wake is None or step.wake > begin + seconds:
                return looked_at
            now = max(now + 0.001, step.wake)
        step = engine.step(inputs, now)


def all_there(*identities: str) -> Callable[[str, float], tuple[Listed, ...]]:
    return lambda *_: tuple(listed("S1", identity=identity) for identity in identities)


def test_every_room_with_somebody_in_it_is_looked_at_once_in_an_interval() -> None:
    """Spread over it, at the same time of each."""
    rooms = [f"r{n}" for n in range(40)]
    engine = holding(*[row(identity="p", room=name, presence_since=NOW) for name in rooms])
    looked_at = run_for(engine, 4 * POLICY.interval, NOW, all_there("p"))
    for name in rooms:
        times = [at for at, room in looked_at if room == name]
        assert 3 <= len(times) <= 5
        assert all(later - earlier == pytest.approx(POLICY.interval, abs=0.1) for earlier, later in itertools.pairwise(times[1:]))
    last = [at for at, _ in looked_at if at >= NOW + 3 * POLICY.interval]
    halves = Counter(at < NOW + 3.5 * POLICY.interval for at in last)
    assert min(halves.values()) >= len(rooms) / 5
    assert max(Counter(round(at) for at in last).values()) <= 6


def test_a_room_where_nothing_changes_is_looked_at_less_often() -> None:
    """But never less often than every `interval_most`; somebody new makes it usual again."""
    engine = holding(row(identity="p", presence_since=NOW))
    times = [at for at, _ in run_for(engine, 3600.0, NOW, all_there("p"))]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[1:5] == pytest.approx([POLICY.interval] * 4, abs=0.1)
    assert pauses[-1] == pytest.approx(POLICY.interval_most, abs=0.1)
    assert max(pauses) <= 1.5 * POLICY.interval_most
    engine.step([accept("D2", "x", identity="q"), joined("S1", identity="q")], NOW + 3600.0)
    again = [at for at, _ in run_for(engine, 400.0, NOW + 3600.0, all_there("p", "q"))]
    assert max(later - earlier for earlier, later in itertools.pairwise(again[1:])) <= POLICY.interval + 0.1


def test_a_room_where_nobody_is_any_more_is_not_looked_at() -> None:
    """Whoever is being said goodbye is not looked for."""
    engine = holding(row(Presence.GONE, due=NOW + 10**5), row(Presence.GONE, identity="q", due=NOW + 10**5))
    assert len(run_for(engine, 2000.0, NOW, all_there())) == 1  # the one that had been planned


def test_somebody_whose_left_was_lost_is_found_by_a_routine_look() -> None:
    """Missing in it, and in the one that confirms it: gone within two intervals."""
    engine = holding(row(identity="p"), row(identity="q"))
    run_for(engine, 2 * POLICY.interval, NOW, all_there("q"))
    assert [(there.identity, there.outcome) for there in stored(engine)] == [("p", Outcome.SENT), ("q", Outcome.OPEN)]


@pytest.mark.parametrize("reason", sorted(reason for reason, rule in DEPARTURES.items() if rule.unasked is Unasked.CONNECTED))
def test_an_sfu_that_fails_once_a_minute_keeps_no_ghosts(reason: str) -> None:
    """Looks that fail come less and less often; but the first one that is answered, once the time has come, is the verdict."""
    engine = holding(
        row(Presence.AWAY, reason=reason, presence_since=NOW - 300.0, look_at=NOW, sessions=(ended("S1"),)), row(identity="q", presence_since=NOW)
    )
    see = all_there("q")
    run_for(engine, 85.0, NOW, lambda room, at: None if at < NOW + 50.0 else see(room, at))
    assert [(there.identity, there.outcome) for there in stored(engine)] == [(ALICE, Outcome.SENT), ("q", Outcome.OPEN)]


def test_looks_that_fail_become_rare() -> None:
    """Somebody who is missing, and counts as connected while nobody can be asked: for an hour, and the SFU's answer is the verdict."""
    engine = holding(row(Presence.AWAY, reason=MISSING, look_at=NOW + 10.0, sessions=(ended("S1"),)))
    assert 50 <= len(run_for(engine, 3600.0, NOW, lambda *_: None)) <= 140
    run_for(engine, 60.0 + POLICY.departure(MISSING).look_after, NOW + 3600.0, all_there())
    assert [there.outcome for there in stored(engine)] == [Outcome.SENT]


def test_urgent_looks_go_before_routine_ones() -> None:
    """However many rooms have their routine look due: whoever is departing is looked for in the first free place."""
    engine = holding(*[row(identity="p", room=f"r{n}") for n in range(50)])
    engine.step([left("S1", identity="p", room="r7"), left("S1", identity="p", room="r33")], NOW + 44.0)
    step = engine.step((), NOW + 46.0)  # all routine looks are due since 1 s
    assert {task.room for task in looks(step)} >= {"r7", "r33"}


@pytest.mark.parametrize("sfu", [SFU, None])
def test_after_webhooks_may_have_been_missed_all_rooms_are_looked_at(sfu: str | None) -> None:
    """Soon, a few at a time, and those of other SFUs only if all were missed."""
    engine = holding(*[row(identity="p", room=f"r{n}") for n in range(9)], row(identity="p", room="elsewhere", sfu="second"))
    step = engine.step([Missed(sfu)], NOW)
    rooms: list[tuple[str, str]] = []
    for _ in range(10):
        rooms += [(task.sfu, task.room) for task in looks(step)]
        found = [Looked(task.sfu, task.room, task.claim, NOW + 0.1, all_there("p")("", 0.0)) for task in looks(step)]
        step = engine.step(found, NOW + 0.1)
    assert sorted(rooms) == sorted([*[(SFU, f"r{n}") for n in range(9)], *([] if sfu else [("second", "elsewhere")])])


def test_a_look_that_was_under_way_when_webhooks_were_missed_does_not_count() -> None:
    """It may have been sent before what was missed happened."""
    engine = holding(row())
    engine.step([left("S9", "DUPLICATE_IDENTITY", 2000)], NOW)
    (look,) = looks(engine.step((), NOW + 46.0))
    engine.step([Missed(SFU)], NOW + 46.1)
    step = engine.step([look_at(look, listed(), sent_at=NOW + 46.0)], NOW + 46.2)
    assert step.wake is not None
    assert step.wake <= NOW + 46.0 + POLICY.look_gap
    assert len(looks(engine.step((), NOW + 46.0 + POLICY.look_gap))) == 1


# ── an SFU that cannot be asked ──


def test_when_an_sfu_can_be_asked_again_all_its_rooms_are_looked_at() -> None:
    """What happened meanwhile is found out within seconds: two of three left without a word."""
    engine = holding(*[row(identity="p", room=f"r{n}") for n in range(3)])
    run_for(engine, 120.0, NOW, lambda *_: None)
    assert engine._reach(SFU).open(POLICY)
    looked_at = run_for(engine, 60.0, NOW + 120.0, lambda name, _: all_there("p")("", 0) if name == "r1" else (listed(identity="somebody else"),))
    assert {room for _, room in looked_at} == {"r0", "r1", "r2"}
    assert [there.outcome for there in stored(engine)] == [Outcome.SENT, Outcome.OPEN, Outcome.SENT]


@stores.slow_on_postgresql
def test_one_look_at_a_time_tries_an_sfu_that_keeps_failing() -> None:
    """Of a hundred rooms; and nobody is given up who has not said goodbye."""
    engine = holding(*[row(identity="p", room=f"r{n}") for n in range(100)])
    looked_at = run_for(engine, 600.0, NOW, lambda *_: None)
    assert 20 <= len(looked_at) <= 600 / POLICY.look_again + 10
    assert {there.presence for there in stored(engine)} == {Presence.CONNECTED}


def given_up(engine: Engine) -> tuple[Task, float]:
    """No look has been answered for 100 s: the next probe, and when it is sent."""
    run_for(engine, 100.0, NOW, lambda *_: None)
    now = NOW + 101.0
    while not (probes := looks(engine.step((), now))):
        now += 0.1
        assert now < NOW + 130.0
    (probe,) = probes
    return probe, now


@stores.slow_on_postgresql
def test_departures_are_not_held_up_by_an_sfu_that_keeps_failing() -> None:
    """Whoever hangs up is gone after 2 s by the rule for that case, however many do so, while the probe is under way."""
    engine = holding(*[row(identity="p", room=f"r{n}") for n in range(200)])
    probe, now = given_up(engine)
    engine.step([left("S1", identity="p", room=f"r{n}") for n in range(200)], now)
    ends = now + 2.0 + POLICY.look_again + 0.1
    now += 2.0
    for _ in range(50):
        wake = engine.step((), now).wake  # nothing comes in that would set off another step
        if wake is None or wake > ends:
            break
        now = max(now + 0.001, wake)
    # Webhooks came after the last probe had failed, so this one decides; at once, for all of them.
    assert {there.presence for there in stored(engine)} == {Presence.AWAY}
    engine.step([Looked(SFU, probe.room, probe.claim, now, None)], now)
    for _ in range(10):
        engine.step((), now)
    assert sum(there.presence is not Presence.GONE for there in stored(engine)) <= 1  # the next probe's
    engine.step((), now + POLICY.look_again + 0.1)
    assert {there.presence for there in stored(engine)} == {Presence.GONE}


def test_a_webhook_of_an_sfu_that_kept_failing_is_news() -> None:
    """It is back, and tells that somebody said goodbye; the failures of before do not make that a departure before it was asked."""
    engine = holding(*[row(identity="p", room=f"r{n}") for n in range(20)])
    probe, now = given_up(engine)
    now += 2.0
    engine.step([Looked(SFU, probe.room, probe.claim, now - 2.0, None)], now)
    see = all_there("p")
    goodbye = left("S1", identity="p", room="r7")
    run_for(engine, 4.0, now + 1.5, lambda room, at: (listed("S2", identity="p"),) if room == "r7" else see(room, at), [goodbye])
    assert {there.presence for there in stored(engine)} == {Presence.CONNECTED}


def hung(engine: Engine) -> tuple[list[Task], float]:
    """Four people have said goodbye, each in a room of their own, and the looks at these rooms are under way."""
    step = engine.step([left("S1", identity="p", room=f"r{n}") for n in range(4)], NOW)
    now = NOW + 2.0
    tasks = looks(step) + looks(engine.step((), now))
    assert [task.room for task in tasks] == ["r0", "r1", "r2", "r3"]
    return tasks, now


def test_looks_that_hung_in_an_outage_that_is_over_send_nobody_away() -> None:
    """They end one after another, by their time-outs, while others are answered: those who reconnected are asked about again, not given up."""
    engine = holding(*[row(identity="p", room=f"r{n}") for n in range(5)])
    engine._looks_in_flight = lambda _: 4
    tasks, now = hung(engine)
    engine.step([left("S1", identity="p", room="r4")], now)
    now += 5.0
    done: list[Task] = []
    for task in tasks:
        step = engine.step([Looked(SFU, task.room, task.claim, NOW + 2.0, None)], now)
        while found := looks(step):
            done += step.tasks
            step = engine.step([look_at(look, listed("S2", identity="p"), sent_at=now) for look in found], now + 0.01)
            now += 0.02
        done += step.tasks
    # The first failure was news, since nobody had been answered meanwhile: a goodbye is believed where nobody can be asked.
    assert [task.room for task in done if task.action is Action.SEND] == ["r0"]
    assert {there.presence for there in stored(engine) if there.room != "r0"} == {Presence.CONNECTED}


def test_a_departure_waits_for_the_first_probe_of_an_sfu_that_hung() -> None:
    """All looks of an outage time out together; the next one shows that the SFU is there, and who only reconnected stays."""
    engine = holding(*[row(identity="p", room=f"r{n}") for n in range(6)])
    engine._looks_in_flight = lambda _: 4
    tasks, now = hung(engine)
    engine.step([left("S1", identity="p", room=name) for name in ("r4", "r5")], now + 2.9)
    step = engine.step([Looked(SFU, task.room, task.claim, now, None) for task in tasks], now + 5.0)
    (probe,) = looks(step)
    assert probe.room in {"r4", "r5"}
    step = engine.step([look_at(probe, listed("S2", identity="p"), sent_at=now + 5.0)], now + 5.01)
    engine.step([look_at(task, listed("S2", identity="p"), sent_at=now + 5.01) for task in looks(step)], now + 5.02)
    by_room = {there.room: there.presence for there in stored(engine)}
    assert (by_room["r4"], by_room["r5"]) == (Presence.CONNECTED, Presence.CONNECTED)


def test_an_outage_when_somebodys_time_is_over_is_waited_for() -> None:
    """The SFU fails just when a room that vanished would be given up: its people get 30 s more from when it is back."""
    engine = holding(row())
    run_for(engine, 165.0, NOW, lambda _, at: None if NOW + 134.0 <= at < NOW + 142.0 else ())
    assert only(engine).presence is Presence.AWAY
    run_for(engine, 30.0, NOW + 165.0, lambda *_: ())
    assert only(engine).outcome is Outcome.SENT


def test_a_room_that_nobody_asked_for_in_an_outage_is_waited_for_too() -> None:
    """Somebody's newer session was not told of, the SFU is restarted, and only other rooms are looked at meanwhile: all have to come back to it."""
    engine = holding(row(identity="p", room="r1"), row(identity="q", room="r2"), row(identity="s", room="r2"))
    engine.step([left("S1", "DUPLICATE_IDENTITY", identity="p", room="r1"), left("S1", identity="q", room="r2")], NOW)
    there = all_there("s")("", 0)
    run_for(engine, 25.0, NOW, lambda name, at: None if NOW + 1.0 <= at < NOW + 14.0 else there if name == "r2" else ())
    assert {there.identity: there.presence for there in stored(engine)} == {"p": Presence.AWAY, "q": Presence.GONE, "s": Presence.CONNECTED}
    run_for(engine, 15.0, NOW + 25.0, lambda name, _: there if name == "r2" else ())
    assert {there.identity: there.presence for there in stored(engine)} == {"p": Presence.GONE, "q": Presence.GONE, "s": Presence.CONNECTED}


def test_an_sfu_that_is_gone_for_good_keeps_nobody_alive() -> None:
    """After ten minutes of silence nothing is restarted any more, nothing is sent either, and in the end nothing remains open."""
    engine = holding(row(delay=60.0, running_since=NOW), row(identity="q", delay=3600.0, running_since=NOW))
    run_for(engine, 1200.0, NOW, lambda *_: None)
    short, long = stored(engine)
    assert (short.state, long.state) == (State.ADRIFT, State.LIVE)
    assert short.running_since >= NOW + 45.0 + 600.0 - 60.0
    run_for(engine, 4 * 3600.0, NOW + 1200.0, lambda *_: None)
    assert [(there.state, there.outcome) for there in stored(engine)] == [(State.DONE, Outcome.RAN_OUT)] * 2


def test_who_was_let_run_is_looked_after_again_when_the_sfu_is_back() -> None:
    """Connected still: restarted at once, since its time has come."""
    engine = holding(row(delay=60.0, running_since=NOW))
    run_for(engine, 700.0, NOW, lambda *_: None)
    assert only(engine).state is State.ADRIFT
    run_for(engine, POLICY.interval_most, NOW + 700.0, all_there(ALICE))
    assert only(engine).state is State.LIVE
    assert only(engine).running_since >= NOW + 700.0


# ── rooms that come up, finish, and are told of late ──


def started(room_sid: str, id: str, created_at: float = 0.0) -> RoomChanged:
    return RoomChanged(SFU, ROOM, RoomNews.STARTED, room_sid, id, created_at)


def test_a_second_start_ends_older_sessions_and_no_others() -> None:
    """One joined a minute before the room, one after it, and of one it is not known when."""
    sessions = [(live("S1", int((NOW - 60) * 1000)),), (live("S1", int((NOW + 1) * 1000)),), (live("S1", 0),)]
    engine = holding(*[row(identity=f"p{n}", sessions=known) for n, known in enumerate(sessions)])
    engine.step([started("RM1", "EV1", NOW - 100.0), started("RM1", "EV2", NOW)], NOW + 2)
    assert [there.presence for there in stored(engine)] == [Presence.AWAY, Presence.CONNECTED, Presence.CONNECTED]
    assert room_of(engine).doubt_until > NOW


def test_an_older_start_that_is_told_after_a_newer_one_is_nothing() -> None:
    """Nor is one that is told twice."""
    engine = holding(row(sessions=(live("S1", int((NOW + 1) * 1000)),)))
    engine.step([started("RM2", "EV2", NOW)], NOW + 2)
    before = room_of(engine)[:7]  # all but when to look
    engine.step([started("RM1", "EV1", NOW - 60.0), started("RM2", "EV2", NOW)], NOW + 3)
    assert room_of(engine)[:7] == before
    assert only(engine).presence is Presence.CONNECTED


def test_a_start_that_comes_after_the_joined_of_its_room_is_no_second_one() -> None:
    """Webhooks overtake each other. The instance before it had another sid, and its own start."""
    engine = holding(row(sessions=()))
    engine.step([started("RM1", "EV1", NOW), RoomChanged(SFU, ROOM, RoomNews.FINISHED, "RM1", "EV2", NOW + 10)], NOW + 10)
    engine.step([joined("S5", int((NOW + 20) * 1000))._replace(room_sid="RM2", created_at=NOW + 20)], NOW + 20)
    engine.step([started("RM2", "EV3", NOW + 19)], NOW + 20.5)
    assert room_of(engine).doubt_until == 0.0
    assert engine._reach(SFU).several_nodes_at is None
    assert only(engine).presence is Presence.CONNECTED


@pytest.mark.parametrize("apart", [-4.0, 4.0, 3600.0, -3600.0])
def test_sessions_of_a_room_are_not_older_than_it_by_another_clock(apart: float) -> None:
    """The node's clock is not ours: both times are its own. The room's is in whole seconds."""
    engine = holding(row(Presence.EXPECTED))
    engine.step([joined("S1", int((NOW + apart + 0.3) * 1000))._replace(created_at=NOW + apart)], NOW + 0.4)
    engine.step([started("RM1", "EV1", float(int(NOW + apart)))], NOW + 0.5)
    assert only(engine).presence is Presence.CONNECTED


def test_the_end_of_another_instance_of_the_room_is_nothing() -> None:
    """Told late, when the next one is there."""
    engine = holding(row())
    engine.step([started("RM2", "EV2", NOW)], NOW)
    before = room_of(engine)
    engine.step([RoomChanged(SFU, ROOM, RoomNews.FINISHED, "RM1", "EV9", NOW)], NOW + 1)
    assert room_of(engine) == before


def test_a_webhook_that_comes_much_later_than_others_is_a_reason_to_look() -> None:
    """However far apart the clocks are; one that is in time is none."""
    for apart in (0.0, 5000.0):
        engine = holding(row())
        engine.step([joined("S1")._replace(created_at=NOW + apart)], NOW)
        assert looks(engine.step((), NOW + 3.0)) == []
        step = engine.step([joined("S1")._replace(created_at=NOW + apart)], NOW + 10.0)
        assert len(looks(step)) + len(looks(engine.step((), NOW + 10.0 + POLICY.settled))) == 1


def test_a_removal_that_is_told_late_is_looked_at_and_not_believed() -> None:
    """They may have come back since, and the joined of that be lost."""
    engine = holding(row(), row(identity="bob"))
    engine.step([joined("S1", identity="bob")._replace(created_at=NOW)], NOW)
    step = engine.step([left("S1", "PARTICIPANT_REMOVED")._replace(created_at=NOW)], NOW + 30.0)
    assert actions(step) == []
    at = NOW + 30.0
    while looks(step) or only_alice(engine).presence is Presence.AWAY:
        assert at < NOW + 40.0
        step = engine.step(
            [look_at(look, listed("S2", joined_at_ms=2000), listed("S1", identity="bob"), sent_at=at) for look in looks(step)], at + 0.5
        )
        at += 0.5
    assert only_alice(engine).presence is Presence.CONNECTED


def only_alice(engine: Engine) -> DelayedEvent:
    return next(there for there in stored(engine) if there.identity == ALICE)


# ── what a homeserver can bear ──


def limited_engine(rate: float, **options: Any) -> Engine:
    """An engine that has learned that its homeserver allows so many actions a second."""
    store = stores.another()
    store.atomically(lambda tx: tx.save_homeserver(KnownHomeserver(HOMESERVER, Limit.SOME, rate, 5.0)))
    return engine_on(store, **options)


def test_what_was_learned_of_a_homeserver_is_known_after_a_start() -> None:
    """Its limit and its rate, from the first step on; what the SFU has shown, too."""
    engine = holding(*[row(identity=f"p{n}", due=NOW) for n in range(9)])
    tasks = engine.step((), NOW).tasks
    engine.step([reply_to(task, Verdict.LIMITED, retry_after=4.0) for task in tasks], NOW)
    engine.step([started("RM1", "EV1"), started("RM1", "EV2")], NOW)
    again = engine_on(engine.store)
    again.step((), NOW)
    assert again._pace(HOMESERVER).limit is Limit.SOME
    assert again._pace(HOMESERVER).rate == engine._pace(HOMESERVER).rate < 1.0
    assert again._reach(SFU).several_nodes_at == NOW


def test_a_homeserver_that_the_configuration_speaks_of_is_not_learned() -> None:
    """What it says holds; nothing is written down, and it takes all that is due at once."""
    store = stores.another()
    store.atomically(lambda tx: tx.save_homeserver(KnownHomeserver(HOMESERVER, Limit.SOME, 0.1, 5.0)))
    engine = Engine(store, POLICY, Limits(), Random(0), limited=lambda _: False)
    engine.step([accept(f"D{n}", identity=f"p{n}") for n in range(4)], NOW)
    assert engine.rates()[HOMESERVER][0] is Limit.NONE


def test_more_restarts_than_a_homeserver_allows_are_refused() -> None:
    """With an error that says so; long delays are taken on, and so are short ones where there is no limit."""
    engine = limited_engine(1.0)
    step = engine.step([accept(f"D{n}", identity=f"p{n}", delay=10.0) for n in range(12)], NOW)
    taken = [isinstance(reply, Accepted) for reply in step.replies]
    assert taken == sorted(taken, reverse=True)
    assert 8 <= sum(taken) <= 10
    assert isinstance(step.replies[-1], TooMany)
    assert "longer" in str(step.replies[-1]) or "delay" in str(step.replies[-1])
    assert isinstance(engine.step([accept("D-long", identity="x", delay=3600.0)], NOW).replies[0], Accepted)
    assert isinstance(engine.step([accept("D-else", identity="x", delay=10.0, homeserver="other.test")], NOW).replies[0], Accepted)
    engine.step([Withdraw("D0"), Withdraw("D1")], NOW)
    assert isinstance(engine.step([accept("D-new", identity="y", delay=10.0)], NOW).replies[0], Accepted)


def test_what_it_has_to_bear_is_counted_anew_after_a_start() -> None:
    """From the database."""
    engine = limited_engine(1.0)
    engine.step([accept(f"D{n}", identity=f"p{n}", delay=10.0) for n in range(10)], NOW)
    again = engine_on(engine.store)
    assert isinstance(again.step([accept("D-more", identity="x", delay=10.0)], NOW).replies[0], TooMany)


def test_restarts_that_will_be_late_are_forecast() -> None:
    """30 deadlines within a few seconds at 1 action a second: some will miss theirs by many seconds; none, when all is well."""
    store = holding(*[row(identity=f"p{n}", delay=60.0, running_since=NOW - 50.0, due=NOW, delay_id=f"d{n}") for n in range(30)]).store
    store.atomically(lambda tx: tx.save_homeserver(KnownHomeserver(HOMESERVER, Limit.SOME, 1.0, 5.0)))
    engine = engine_on(store)
    engine.step((), NOW)
    engine.step((), NOW + 0.5)
    assert 10.0 <= engine.forecast(NOW + 0.5)[HOMESERVER] <= 30.0
    well = limited_engine(1.0)
    delegate(well, "p")
    well.step((), NOW + 5)
    assert well.forecast(NOW + 5)[HOMESERVER] == 0.0


def test_an_overdue_restart_is_forecast_as_late_as_it_is() -> None:
    """Also at a homeserver without a limit, that does not answer."""
    engine = holding(row(delay=60.0, running_since=NOW - 100.0, due=NOW - 50.0))
    engine.step((), NOW)
    engine.step((), NOW + 1)
    assert engine.forecast(NOW + 20.0)[HOMESERVER] >= 40.0


@stores.slow_on_postgresql
def test_thirty_short_delays_are_restarted_in_time_at_one_action_a_second() -> None:
    """All of them joined in the same second. Planned ahead, none is late, and nothing is refused: half an hour of it."""
    engine = limited_engine(1.0)
    engine.step([accept(f"D{n}", identity=f"p{n}", delay=60.0) for n in range(30)], NOW)
    engine.step([joined("S1", identity=f"p{n}") for n in range(30)], NOW)
    run_for(engine, 1800.0, NOW, all_there(*[f"p{n}" for n in range(30)]))
    assert {there.state for there in stored(engine)} == {State.LIVE}
    assert all(there.running_since > NOW + 1700.0 for there in stored(engine))


def _insert(there: DelayedEvent, tx: Transaction) -> None:
    tx.insert(there)


def test_the_forecast_goes_back_to_zero_when_the_harm_is_done() -> None:
    """What is overdue is told for as long as it is; then all is well again, though nobody has delegated anything since."""
    store = stores.another()
    overdue = row(running_since=NOW - 100.0, delay=60.0, delay_id="overdue")._replace(id=1, due=NOW)
    well = row(running_since=NOW, delay_id="well", identity="bob")._replace(id=2)
    for there in (overdue, well):
        store.atomically(partial(_insert, there))
    engine = Engine(store, POLICY, Limits(), Random(0), limited=lambda _: True)
    (task,) = (task for task in engine.step((), NOW).tasks if task.action is Action.RESTART)
    assert engine.forecast(NOW)[HOMESERVER] > 0
    engine.step([Answered(HOMESERVER, task.event, task.claim, task.action, NOW, Verdict.NOT_FOUND)], NOW)
    engine.step((), NOW + 2.0)
    assert engine.forecast(NOW + 2.0)[HOMESERVER] == 0.0
