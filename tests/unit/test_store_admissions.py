"""To whom access tokens were given, as both databases keep it: who is to be checked, by whom, and when all of that is over."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sfu_delegate.store.base import Admission, Store

from tests import stores
from tests.rows import HOMESERVER, NOW, ROOM, SFU
from tests.stores import opened, select

LEASE = NOW + 120.0
UNTIL = NOW + 4260.0


@pytest.fixture(params=stores.KINDS)
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which database it is."""
    with stores.chosen(request.param):
        yield str(request.param)


@pytest.fixture
def store(database: str) -> Store:
    """An empty one."""
    return stores.another()


def admission(identity: str = "alice", **changes: Any) -> Admission:
    return Admission(SFU, ROOM, identity, HOMESERVER, f"@{identity}:{HOMESERVER}", "!call:hs.test", UNTIL, NOW + 300.0)._replace(**changes)


def kept(store: Store) -> list[Admission]:
    """All that there is, in the order of their names."""
    columns = 'sfu, room, identity, homeserver, "user", room_id, until, due'
    return [Admission(*values) for values in select(store, f"SELECT {columns} FROM admission ORDER BY sfu, room, identity")]


def due(store: Store, now: float = NOW, limit: int = 64, lease_ends: float = LEASE) -> list[str]:
    """The identities of those that are due, which counts as their claim."""
    return sorted(one.identity for one in store.admissions_due(now, limit, lease_ends))


# ── they are given tokens ──


def test_what_was_admitted_is_there(store: Store) -> None:
    """To the letter, whatever is in the names, and each participant for itself: the same identity elsewhere is somebody else."""
    given = [
        admission(),
        admission(room="elsewhere"),
        admission(sfu="other"),
        admission("émile'; DROP TABLE admission; --", user="@émile:hs.test", room_id="!" + "x" * 43),
    ]
    store.admit(given)
    assert kept(store) == sorted(given)


def test_to_admit_nobody_changes_nothing(store: Store) -> None:
    """And does not fail."""
    store.admit([])
    assert kept(store) == []


@pytest.mark.parametrize(("until", "then"), [(UNTIL + 600.0, UNTIL + 600.0), (UNTIL - 600.0, UNTIL)])
@pytest.mark.parametrize(("next_due", "due_then"), [(NOW + 10.0, NOW + 10.0), (NOW + 900.0, NOW + 300.0)])
def test_another_token_makes_it_good_no_shorter_and_checked_no_later(
    store: Store, until: float, then: float, next_due: float, due_then: float
) -> None:
    """`until` only grows, `due` only gets earlier, each by itself, in whatever order the tokens come to be kept."""
    store.admit([admission()])
    store.admit([admission(until=until, due=next_due)])
    assert kept(store) == [admission(until=then, due=due_then)]


def test_another_token_does_not_change_who_is_asked_about_whom(store: Store) -> None:
    """The first word counts: another homeserver has no say on whom the first one vouched for."""
    store.admit([admission()])
    store.admit([admission(homeserver="new.test", user="@alice:new.test", room_id="!new:hs.test")])
    assert kept(store) == [admission()]


def test_many_are_admitted_at_once(store: Store) -> None:
    """Some of them known already, in any order, and nobody else is touched."""
    known = [admission(f"p{n:04}") for n in range(0, 1000, 3)]
    store.admit([*known, admission("q")])
    again = [admission(f"p{n:04}", until=UNTIL + n, due=NOW + 300.0 + n) for n in range(1000)]
    Random(1).shuffle(again)
    store.admit(again)
    old = set(known)
    expected = [one._replace(due=NOW + 300.0) if one._replace(until=UNTIL, due=NOW + 300.0) in old else one for one in sorted(again)]
    assert kept(store) == [*expected, admission("q")]


def test_they_stay_when_the_database_is_closed(database: str, tmp_path: Path) -> None:
    """The token is given as soon as `admit` returns, so nothing may wait to be written."""
    with stores.place(database, tmp_path) as place:
        with opened(place) as store:
            store.admit([admission()])
        with opened(place) as store:
            assert kept(store) == [admission()]
            assert store.next_admission() == NOW + 300.0


@pytest.mark.parametrize("field", ["sfu", "room", "identity", "homeserver", "user", "room_id"])
def test_a_name_with_nul_keeps_nobody_else_from_being_kept(store: Store, database: str, field: str) -> None:
    """PostgreSQL has no such texts, and nobody has such a name, so there is nobody to be watched."""
    changes: dict[str, Any] = {field: "a\0b"}
    strange = admission("bob")._replace(**changes)
    store.admit([admission("carol"), strange, admission()])
    expected = [admission(), admission("carol")]
    assert kept(store) == sorted([*expected, strange] if database == "sqlite" else expected)
    store.admit([strange])  # alone
    assert len(kept(store)) == (3 if database == "sqlite" else 2)


# ── they are checked ──


def test_those_that_are_due_are_claimed_and_told_once(store: Store) -> None:
    """With all that is known of them, only those whose time has come, and nobody again until the lease ends, or before it is settled."""
    store.admit([admission("a", due=NOW), admission("b", due=NOW - 5.0), admission("c", due=NOW + 0.1)])
    told = store.admissions_due(NOW, 64, LEASE)
    assert {one._replace(due=0.0) for one in told} == {admission(name, due=0.0) for name in "ab"}
    assert due(store) == []
    assert [(one.identity, one.due) for one in kept(store)] == [("a", LEASE), ("b", LEASE), ("c", NOW + 0.1)]
    assert due(store, NOW + 0.1, lease_ends=LEASE + 1.0) == ["c"]
    assert due(store, LEASE - 0.1) == []
    assert due(store, LEASE, lease_ends=LEASE + 120.0) == ["a", "b"]


def test_those_that_wait_longest_come_first(store: Store) -> None:
    """Not more than asked for; the others are due still."""
    order = list(range(20))
    Random(2).shuffle(order)
    store.admit([admission(f"p{n:02}", due=NOW - n) for n in order])
    assert due(store, limit=3) == ["p17", "p18", "p19"]
    assert due(store, limit=3) == ["p14", "p15", "p16"]
    assert due(store, limit=64) == [f"p{n:02}" for n in range(14)]
    assert due(store) == []


def test_those_who_have_joined_are_told_whenever_they_are_due(store: Store) -> None:
    """That claims them, too; nobody else is claimed, and of those who are not known nothing is made."""
    names = [f"p{n:03}" for n in range(200)]
    store.admit([*(admission(name) for name in names), admission("p000", room="elsewhere"), admission("p000", sfu="other")])
    asked = [(SFU, ROOM, name) for name in names[::2]] + [(SFU, ROOM, "mallory"), (SFU, "elsewhere", "p001"), (SFU, ROOM, "nul\0")]
    told = store.admissions_of(asked, 0.0, LEASE)
    assert sorted(one._replace(due=0.0) for one in told) == [admission(name, due=0.0) for name in names[::2]]
    assert {one[:3] for one in kept(store) if one.due == LEASE} == {(SFU, ROOM, name) for name in names[::2]}
    assert len(kept(store)) == 202
    assert due(store) == []


def test_of_nobody_nobody_is_told(store: Store) -> None:
    """Neither where nobody is asked for, nor where nobody is known."""
    store.admit([admission()])
    for asked in ([], [(SFU, ROOM, "mallory")], [(SFU, ROOM, "nul\0")]):
        assert store.admissions_of(asked, 0.0, LEASE) == []
    assert kept(store) == [admission()]


def test_one_that_is_claimed_is_told_nevertheless(store: Store) -> None:
    """It has joined again while it is being checked, and whoever checks may have asked before."""
    store.admit([admission(due=NOW)])
    assert due(store) == ["alice"]
    assert [one.identity for one in store.admissions_of([(SFU, ROOM, "alice")], 0.0, LEASE + 5.0)] == ["alice"]
    assert kept(store)[0].due == LEASE + 5.0


def test_those_who_have_joined_are_good_for_longer_at_once(store: Store) -> None:
    """And not for shorter. Whoever found before that one is over does not have it forgotten."""
    store.admit([admission("a"), admission("b"), admission("c")])
    over = store.admissions_due(NOW + 1e9, 64, LEASE)
    told = store.admissions_of([(SFU, ROOM, "a")], UNTIL + 5.0, LEASE) + store.admissions_of([(SFU, ROOM, "b")], UNTIL - 5.0, LEASE)
    assert [(one.identity, one.until) for one in told] == [("a", UNTIL + 5.0), ("b", UNTIL)]
    assert [one.until for one in kept(store)] == [UNTIL + 5.0, UNTIL, UNTIL]
    store.settle_admissions([], over)
    assert [one.identity for one in kept(store)] == ["a"]


@pytest.mark.parametrize("stores_at_once", [2, 5])
@stores.only_sqlite
def test_sqlite_has_one_process_only(database: str, stores_at_once: int) -> None:
    """So that there is nobody to share with: several claims after one another are the same as those of several instances."""
    store = stores.another()
    store.admit([admission(f"p{n}", due=NOW) for n in range(40)])
    told = [name for _ in range(stores_at_once) for name in due(store, limit=10)]
    assert len(told) == len(set(told)) == min(40, 10 * stores_at_once)


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_of_several_instances_at_once_none_is_told_what_another_one_was(database: str) -> None:
    """However they get in each other's way, all are told to somebody, and each to one of them."""
    several, many = 4, 600
    with stores.place(database) as place, opened(place) as first:
        first.admit([admission(f"p{n:03}", due=NOW - n) for n in range(many)])
        began = threading.Barrier(several)

        def work(_: int) -> list[str]:
            with opened(place) as store:
                began.wait(30.0)
                told: list[str] = []
                while claimed := due(store, limit=7):
                    told += claimed
                return told

        with ThreadPoolExecutor(several) as threads:
            told = [name for names in threads.map(work, range(several)) for name in names]
        assert sorted(told) == [f"p{n:03}" for n in range(many)]


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_whoever_is_locked_is_not_waited_for(database: str) -> None:
    """Another instance is at work with it: those behind it are told meanwhile."""
    with stores.place(database) as place, opened(place) as store, opened(place) as other:
        store.admit([admission("a", due=NOW - 2.0), admission("b", due=NOW - 1.0)])

        def claims_both(tx: Any) -> list[str]:
            tx.run("UPDATE admission SET due = due WHERE identity = %s RETURNING 1", ("a",))
            return due(other)

        assert store.atomically(claims_both) == ["b"]
        assert due(other) == ["a"]


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_tokens_that_are_given_at_several_instances_at_once_are_all_kept(database: str) -> None:
    """To the same participants, in any order: nobody waits for somebody who waits, and the longest and the earliest count."""
    several, many = 4, 50
    with stores.place(database) as place, opened(place) as first:
        began = threading.Barrier(several)

        def work(number: int) -> None:
            with opened(place) as store:
                began.wait(30.0)
                for turn in range(10):
                    given = [admission(f"p{n:02}", until=UNTIL + turn, due=NOW + 300.0 - number) for n in range(many)]
                    Random(number * 100 + turn).shuffle(given)
                    store.admit(given)
                    store.settle_admissions(given[:5], [])

        with ThreadPoolExecutor(several) as threads:
            list(threads.map(work, range(several)))
        assert [(one.identity, one.until) for one in kept(first)] == [(f"p{n:02}", UNTIL + 9.0) for n in range(many)]


# ── it is kept what came of it ──


def test_what_was_checked_is_due_when_it_was_told_and_is_good_no_shorter(store: Store) -> None:
    """`due` may be later or earlier than before; nobody else is touched, and whoever has been forgotten meanwhile does not come back."""
    store.admit([admission("a"), admission("b"), admission("c"), admission("d")])
    checked = [
        admission("a", due=NOW + 900.0, until=UNTIL - 50.0),
        admission("b", due=NOW + 5.0, until=UNTIL + 50.0),
        admission("gone", due=NOW),
        admission("c", room="elsewhere", due=NOW),
    ]
    store.settle_admissions(checked, [])
    assert kept(store) == [
        admission("a", due=NOW + 900.0),
        admission("b", due=NOW + 5.0, until=UNTIL + 50.0),
        admission("c"),
        admission("d"),
    ]


def test_what_is_over_is_forgotten(store: Store) -> None:
    """And nothing else; to forget it twice does no harm."""
    store.admit([admission("a"), admission("b"), admission(room="elsewhere"), admission("a", sfu="other")])
    for _ in range(2):
        store.settle_admissions([], [admission("a"), admission("nobody")])
        assert {one[:3] for one in kept(store)} == {(SFU, ROOM, "b"), (SFU, "elsewhere", "alice"), ("other", ROOM, "a")}


def test_what_was_given_another_token_meanwhile_is_not_over(store: Store) -> None:
    """The one that checked it knew of the older token only. Another `until` than it knew that is no later does not count."""
    store.admit([admission(), admission("bob")])
    over = store.admissions_of([(SFU, ROOM, name) for name in ("alice", "bob")], 0.0, LEASE)
    assert len(over) == 2
    store.admit([admission(until=UNTIL + 1.0, due=NOW + 600.0), admission("bob", until=UNTIL - 1.0)])
    store.settle_admissions([], over)
    assert [(one.identity, one.until) for one in kept(store)] == [("alice", UNTIL + 1.0)]


def test_a_token_that_is_given_while_it_is_checked_keeps_its_time(store: Store) -> None:
    """What the check knew is older: its `until` is not put in the place of the newer one."""
    store.admit([admission(due=NOW)])
    (claimed,) = store.admissions_due(NOW, 64, LEASE)
    store.admit([admission(until=UNTIL + 3000.0, due=NOW + 300.0)])
    store.settle_admissions([claimed._replace(due=NOW + 250.0)], [])
    assert kept(store) == [admission(until=UNTIL + 3000.0, due=NOW + 250.0)]


def test_many_are_settled_at_once(store: Store) -> None:
    """Some checked and some over."""
    store.admit([admission(f"p{n:03}", due=NOW) for n in range(300)])
    claimed = sorted(store.admissions_due(NOW, 300, LEASE))
    Random(3).shuffle(claimed)
    over = [one for one in claimed if int(one.identity[1:]) % 3 == 0]
    checked = [one._replace(due=NOW + int(one.identity[1:])) for one in claimed if one not in over]
    store.settle_admissions(checked, over)
    assert [(one.identity, one.due) for one in kept(store)] == [(f"p{n:03}", NOW + n) for n in range(300) if n % 3]


def test_to_settle_nothing_changes_nothing(store: Store) -> None:
    """And does not fail."""
    store.admit([admission()])
    store.settle_admissions([], [])
    assert kept(store) == [admission()]


# ── when ──


def test_when_the_next_one_is_to_be_checked(store: Store) -> None:
    """The earliest of all, claimed ones by the end of their lease; None where there is nobody."""
    assert store.next_admission() is None
    store.admit([admission("a", due=NOW + 7.0), admission("b", due=NOW + 5.0), admission("c", due=NOW + 6.0)])
    assert store.next_admission() == NOW + 5.0
    assert due(store, NOW + 6.0) == ["b", "c"]
    assert store.next_admission() == NOW + 7.0
    assert due(store, NOW + 7.0) == ["a"]
    assert store.next_admission() == LEASE
    store.settle_admissions([], kept(store))
    assert store.next_admission() is None


def test_all_are_asked_for(store: Store) -> None:
    """Also those that somebody claimed who is no more; those that have waited already keep their turn, and nothing else changes."""
    store.admit([admission("a", due=NOW - 50.0), admission("b", due=NOW - 40.0), admission("c"), admission("d", due=NOW + 10**6)])
    assert due(store, limit=1) == ["a"]
    long = admission("e", until=NOW + 10**6)
    store.admit([long])
    good_until = admission().until + 1.0
    store.ask_admissions(NOW + 1.0, good_until)
    times = zip("abcd", (NOW + 1.0, NOW - 40.0, NOW + 1.0, NOW + 1.0), strict=True)
    assert kept(store) == [*(admission(name, due=at, until=good_until) for name, at in times), long._replace(due=NOW + 1.0)]
    assert due(store, NOW + 1.0) == ["a", "b", "c", "d", "e"]


def test_to_ask_for_all_where_there_is_nobody(store: Store) -> None:
    """Changes nothing, and does not fail."""
    store.ask_admissions(NOW, NOW)
    assert store.next_admission() is None
