"""What is PostgreSQL's own: locks among instances, lost connections, what instances tell each other, versions, and what operators read of it."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from string import ascii_letters
from typing import Any, TypeVar

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sfu_delegate.delegation.model import Answered, Find, Lane, Presence, Seen, State, Task, Verdict
from sfu_delegate.delegation.replies import Accepted, Found, Touched
from sfu_delegate.delegation.urgency import Limit, Pace
from sfu_delegate.engine import Engine, Limits, Step
from sfu_delegate.store import migrate
from sfu_delegate.store.base import DatabaseTooNew, Heard, KnownSfu, StoreUnavailable, Transaction, ValueRefused
from sfu_delegate.store.postgresql import DEAD_AFTER, PostgresStore
from sfu_delegate.store.schema import ID_BLOCK, STORAGE, metadata
from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from tests import postgresql, stores
from tests.postgresql import Server
from tests.rows import ALICE, HOMESERVER, NOW, POLICY, ROOM, SFU, accept, joined, left, row
from tests.stores import room_of, save_rooms, stored

T = TypeVar("T")
WITHIN = 30.0  # seconds until a test gives up waiting


@pytest.fixture
def url() -> Iterator[str]:
    with postgresql.shared().database(stores.migrated) as made:
        yield made


@contextmanager
def instances(url: str, *names: str) -> Iterator[list[PostgresStore]]:
    opened = [PostgresStore(url, instance=name) for name in names]
    try:
        yield opened
    finally:
        for store in opened:
            store.close()


def engine_on(store: PostgresStore, seed: int = 0) -> Engine:
    return Engine(store, POLICY, Limits(), Random(seed))


def answer(task: Task, sent_at: float, verdict: Verdict = Verdict.DONE, **more: Any) -> Answered:
    return Answered(task.homeserver, task.event, task.claim, task.action, sent_at, verdict, **more)


def delegated(engine: Engine, now: float, **given: Any) -> Step:
    """A delegation that its homeserver has confirmed."""
    step = engine.step([accept(**given)], now)
    assert isinstance(step.replies[0], Accepted), step.replies
    return engine.step([answer(task, now) for task in step.tasks], now)


def in_thread(work: Callable[[], T]) -> Callable[[], T]:
    """Begin with some work in a thread; what is returned waits for its end."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def end() -> T:
        thread.join(WITHIN)
        assert not thread.is_alive(), "it hangs"
        if errors:
            raise errors[0]
        return results[0]

    return end


# ── schema ──


def test_the_migrations_make_the_schema_of_this_version(url: str) -> None:
    """Alembic finds nothing to change, and the storage parameters are those of the program."""
    with psycopg.connect(url) as connection:
        engine = create_engine("postgresql+psycopg://", creator=lambda: connection, poolclass=StaticPool)
        with engine.connect() as bound:
            context = MigrationContext.configure(bound, opts={"compare_type": True, "version_table": migrate.VERSION_TABLE})
            assert compare_metadata(context, metadata) == []
        for table, wanted in STORAGE.items():
            ((options,),) = connection.execute("SELECT reloptions FROM pg_class WHERE relname = %s", (table,)).fetchall()
            assert {name: float(value) for name, value in (option.split("=") for option in options)} == wanted
        ((step,),) = connection.execute("SELECT increment_by FROM pg_sequences WHERE sequencename = 'delayed_event_id'").fetchall()
        assert step == ID_BLOCK


def test_texts_are_compared_by_their_bytes(url: str) -> None:
    """As SQLite does, and whatever the database's locale: names are keys, not words."""
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT table_name, column_name, collation_name FROM information_schema.columns "
            "WHERE table_schema = 'public' AND table_name <> 'schema_version' AND data_type IN ('text', 'character varying')"
        ).fetchall()
        assert found
        assert {collation for _, _, collation in found} == {"C"}


def test_instances_that_start_at_once_upgrade_once() -> None:
    """On an empty database: one makes the tables, the others find them."""
    with postgresql.shared().database() as empty:
        ends = [in_thread(lambda n=n: PostgresStore(empty, instance=str(n))) for n in range(4)]  # type: ignore[misc]
        opened = [end() for end in ends]
        try:
            assert [room_of(store, "nobody's") for store in opened] == [None] * 4
        finally:
            for store in opened:
                store.close()


def test_a_database_of_a_newer_version_is_refused_unless_it_says_otherwise(url: str) -> None:
    """During a rolling upgrade the version before goes on, and may be started anew; a later version, which contracts, says so first."""
    server = postgresql.shared()
    server.execute("UPDATE schema_version SET version_num = '9998'", database=postgresql.name_in(url))
    with instances(url, "old") as (store,):
        delegated(engine_on(store), NOW)
    server.execute("UPDATE meta SET value = '9997' WHERE key = 'oldest_schema'", database=postgresql.name_in(url))
    with pytest.raises(DatabaseTooNew, match=r"9998.*newer"):
        PostgresStore(url)


def test_each_migration_says_which_versions_can_work_with_its_result() -> None:
    """From the first one that several instances can share."""
    revisions = {found.revision for found in ScriptDirectory.from_config(migrate.alembic_config()).walk_revisions()}
    assert migrate.OLDEST.keys() == {revision for revision in revisions if revision >= "0003"}
    assert set(migrate.OLDEST.values()) <= revisions


# ── one after the other ──


def test_what_one_instance_accepts_the_other_ends(url: str) -> None:
    """Nothing of it is in the memory of the one that sends."""
    with instances(url, "a", "b") as (a, b):
        one, other = engine_on(a), engine_on(b, 1)
        delegated(one, NOW)
        other.step([joined()], NOW + 1)
        one.step([left(reason="PARTICIPANT_REMOVED")], NOW + 2)
        (there,) = stored(a)
        assert (there.presence, there.state) == (Presence.GONE, State.ENDING)
        assert there.claimed  # in the same step


def test_an_answer_to_a_claim_that_another_instance_has_taken_over_ends_nothing(url: str) -> None:
    """The lease ended, the other one restarted the event; what the first one says then is of the past."""
    with instances(url, "a", "b") as (a, b):
        one, other = engine_on(a), engine_on(b, 1)
        (first,) = one.step([accept()], NOW).tasks
        now = NOW + POLICY.lease + 1
        other.refresh(now)
        (second,) = [task for task in other.step([], now).tasks if task.event]
        assert second.claim == first.claim + 1
        one.step([answer(first, NOW, Verdict.NOT_FOUND)], now + 1)
        (there,) = stored(a)
        assert there.state is State.LIVE
        assert there.claimed
        other.step([answer(second, now)], now + 1)
        assert stored(a)[0].verified_at is not None


def test_rows_that_others_are_about_to_claim_are_not_waited_for(url: str) -> None:
    """Of two instances that look for work at the same time, each gets what the other has not, and neither asks again at once."""
    with instances(url, "a", "b") as (a, b):
        stores.insert(a, [row(state=State.LIVE)._replace(id=n, delay_id=f"d{n}", identity=f"p{n}", lane=Lane.RESTART, due=NOW) for n in range(1, 21)])
        holding, done = threading.Event(), threading.Event()

        def hold(tx: Transaction) -> list[int]:
            tx.no_more_waiting()
            found = [there.id for there in tx.todo(HOMESERVER, Lane.RESTART, 12, NOW)]
            holding.set()
            assert done.wait(WITHIN)
            return found

        end = in_thread(lambda: a.atomically(hold))
        assert holding.wait(WITHIN)
        other = Engine(b, POLICY, Limits(), Random(1), limited=lambda _: False)
        step = other.step([], NOW)
        done.set()
        first, second = set(end()), {task.event for task in step.tasks}
        assert len(first) == 12
        assert len(second) == 4  # as many as are tried at first
        assert not first & second


def test_nothing_to_take_is_no_reason_to_ask_again_at_once(url: str) -> None:
    """Everything that is due is locked by another instance: the engine comes back a moment later, and does not go round in circles."""
    with instances(url, "a", "b") as (a, b):
        stores.insert(a, [row(state=State.LIVE)._replace(lane=Lane.RESTART, due=NOW)])
        holding, done = threading.Event(), threading.Event()

        def hold(tx: Transaction) -> None:
            tx.no_more_waiting()
            assert tx.todo(HOMESERVER, Lane.RESTART, 12, NOW)
            holding.set()
            assert done.wait(WITHIN)

        end = in_thread(lambda: a.atomically(hold))
        assert holding.wait(WITHIN)
        step = engine_on(b).step([], NOW)
        done.set()
        end()
        assert not step.tasks
        assert step.wake is not None
        assert step.wake > NOW


def test_a_room_is_one_instances_at_a_time(url: str) -> None:
    """A departure that comes while another instance adds a delegation of the same participant is told to both of its events."""
    with instances(url, "a", "b") as (a, b):
        one, other = engine_on(a), engine_on(b, 1)
        delegated(one, NOW)
        one.step([joined()], NOW + 1)
        holding, done = threading.Event(), threading.Event()
        plain = a.atomically

        def slowly(work: Callable[[Transaction], T], **more: Any) -> T:
            def and_wait(tx: Transaction) -> T:
                result = work(tx)
                holding.set()
                assert done.wait(WITHIN)
                return result

            return plain(and_wait, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(a, "atomically", slowly)
            accepting = in_thread(lambda: one.step([accept("D2")], NOW + 2))
            assert holding.wait(WITHIN)
            leaving = in_thread(lambda: other.step([left(reason="PARTICIPANT_REMOVED")], NOW + 2))
            done.set()
            accepting()
            assert leaving().replies == [Touched(2)]
        assert {there.presence for there in stored(a)} == {Presence.GONE}


def test_a_transaction_that_needs_another_room_begins_anew(url: str) -> None:
    """What was not known at its beginning is locked in order the second time."""
    with instances(url, "a") as (store,):
        stores.insert(store, [row(room="far")._replace(id=7)])
        save_rooms(store, [make_room("far"), make_room("near")])
        tries = []

        def work(tx: Transaction) -> list[int]:
            tries.append(1)
            tx.lock_rooms([(SFU, "near")], ())
            return [there.id for there in tx.of_room(SFU, "far")]

        assert store.atomically(work) == [7]
        assert len(tries) == 2


def make_room(name: str) -> Any:
    from sfu_delegate.delegation.model import Room

    return Room(SFU, name, "", "", 0.0, False, 0.0, 0.0, None, None, True, 0, 0, False)


def test_three_at_once_on_the_same_rooms_never_deadlock(url: str) -> None:
    """Webhooks of the same people, in any order, and claims of all that is due: PostgreSQL has to break up nothing."""
    people, steps = 24, 60
    with instances(url, "a", "b", "c") as opened:
        engines = [Engine(store, POLICY, Limits(), Random(n), limited=lambda _: False) for n, store in enumerate(opened)]
        for n in range(people):
            delegated(engines[0], NOW, delegation=f"D{n}", identity=f"p{n}", room=f"r{n % 6}")

        def live(engine: Engine, random: Random) -> int:
            count = 0
            waiting: list[Task] = []
            for at in range(steps):
                now = NOW + 10 + at * 400.0  # so that restarts, looks and leases are due all the time
                picked = [random.randrange(people) for _ in range(8)]
                inputs: list[Any] = [joined(f"S{n}", identity=f"p{n}", room=f"r{n % 6}") for n in picked]
                inputs += [answer(task, now) for task in waiting if task.event]
                engine.refresh(now)
                step = engine.step(inputs, now)
                assert not [reply for reply in step.replies if isinstance(reply, Exception)]
                waiting = step.tasks
                count += len(step.tasks)
            return count

        ends = [in_thread(lambda e=engine, n=n: live(e, Random(n))) for n, engine in enumerate(engines)]  # type: ignore[misc]
        counts = [end() for end in ends]
        assert all(counts), counts
    found = postgresql.shared().query(url, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    assert found == [(0,)]


def test_new_rooms_are_made_by_one_at_a_time(url: str) -> None:
    """The same delegation sent to two instances at once, as a client does that was not answered in time: one of them makes it."""
    with instances(url, "a", "b") as opened:
        engines = [engine_on(store, n) for n, store in enumerate(opened)]
        for n in range(10):
            given = accept(f"D{n}", room=f"new{n}")
            ends = [in_thread(lambda e=engine, g=given: e.step([g], NOW)) for engine in engines]  # type: ignore[misc]
            replies = [reply for end in ends for reply in end().replies]
            assert Counter(isinstance(reply, Accepted) and reply.created for reply in replies) == {True: 1, False: 1}, replies


def test_ids_are_never_given_twice(url: str) -> None:
    """Each instance has blocks of its own, also after a rollback."""
    with instances(url, "a", "b") as opened:
        found: list[int] = []

        def take(tx: Transaction) -> None:
            found.extend(tx.new_id() for _ in range(ID_BLOCK // 2 + 7))

        for _ in range(4):
            for store in opened:
                store.atomically(take)
        assert len(set(found)) == len(found)


def test_conflicts_are_tried_again(url: str) -> None:
    """A serialization failure, as a failover or another isolation level may bring, concerns nobody."""
    with instances(url, "a") as (store,):
        tries = []

        def work(tx: Transaction) -> str:
            tries.append(1)
            if len(tries) < 4:
                raise psycopg.errors.SerializationFailure("could not serialize access")
            return "done"

        assert store.atomically(work) == "done"
        assert len(tries) == 4


def test_conflicts_without_end_are_the_databases_trouble(url: str) -> None:
    """… and not somebody's loop without end."""
    with instances(url, "a") as (store,):

        def work(tx: Transaction) -> None:
            raise psycopg.errors.DeadlockDetected("deadlock detected")

        with pytest.raises(StoreUnavailable, match="contended"):
            store.atomically(work)


# ── values ──


def test_nul_characters_find_nothing_and_spoil_nothing(url: str) -> None:
    """PostgreSQL cannot store them: whoever has one in its name has delegated nothing; whoever delegates with one is refused alone."""
    with instances(url, "a") as (store,):
        engine = engine_on(store)
        odd: list[Any] = [
            joined(identity="a\0b"),
            joined(room="r\0m"),
            Find("D\0"),
            accept("bad", "d\0", identity="mallory"),
            accept("good"),
        ]
        replies = engine.step(odd, NOW).replies
        assert replies[:2] == [Touched(0), Touched(0)]
        assert isinstance(replies[2], Found)
        assert isinstance(replies[3], ValueRefused)
        assert isinstance(replies[4], Accepted)
        assert [there.delegation for there in stored(store)] == ["good"]


def test_a_name_that_no_index_takes_is_refused_alone(url: str) -> None:
    """PostgreSQL's indexes take some 2.7 kB (compressed): that is a matter of this input, not of the database."""
    noise = "".join(Random(1).choices(ascii_letters, k=9000))
    with instances(url, "a") as (store,):
        engine = engine_on(store)
        replies = engine.step([accept("first"), accept("bad", noise, identity="mallory"), accept("good", "other", identity="bob")], NOW).replies
        assert isinstance(replies[1], ValueRefused)
        assert [there.delegation for there in stored(store)] == ["first", "good"]


# ── the database goes and comes ──


def test_a_cut_connection_costs_one_try_at_the_most(url: str) -> None:
    """While nothing was under way, nobody notices; in the middle of a transaction its inputs are refused, and the next ones are not."""
    server = postgresql.shared()
    with instances(url, "a") as (store,):
        engine = engine_on(store)
        delegated(engine, NOW)
        store.news(NOW)
        assert server.terminate_backends(url)
        assert engine.step([joined()], NOW + 1).replies == [Touched(1)]
        assert store.news(NOW).schedule

        def cut(tx: Transaction) -> None:
            server.terminate_backends(url)
            tx.lock_rooms([(SFU, ROOM)], ())

        with pytest.raises(StoreUnavailable, match=r"by itself"):
            store.atomically(cut)
        assert engine.step([joined()], NOW + 2).replies == [Touched(1)]

        def cut_beside(_: object) -> str:
            server.terminate_backends(url)
            return "new"

        with pytest.raises(StoreUnavailable):
            store.exchange_pace(HOMESERVER, cut_beside)
        assert store.news(NOW).paces == {}


def test_a_server_that_does_not_answer_is_not_asked_by_everybody(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A try takes as long as `postgresql.connect_timeout`; in the second after it, nobody else waits for another one."""
    with instances(url, "a") as (store,):
        delegated(engine_on(store), NOW)
        tries, now = [], [100.0]

        def hang() -> None:
            tries.append(now[0])
            now[0] += 3.0
            raise psycopg.OperationalError("connection timeout expired")

        with monkeypatch.context() as patch:
            patch.setattr(store, "_connect", hang)
            patch.setattr(time, "monotonic", lambda: now[0])
            postgresql.shared().terminate_backends(url)
            for _ in range(20):
                with pytest.raises(StoreUnavailable):
                    store.news(NOW)
                now[0] += 0.1
        assert len(tries) == 2
        now[0] += 10
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        assert store.news(NOW).schedule


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped, and its machine still takes whatever is sent to it: neither the driver nor the system would ever notice."""
    monkeypatch.setattr("sfu_delegate.store.postgresql.HANGS_AFTER", 1.0)
    with Server() as server:
        store = PostgresStore(server.create_database(), connect_timeout=2.0)
        try:
            engine = engine_on(store)
            delegated(engine, NOW)
            with server.hung(), pytest.raises(StoreUnavailable):
                engine.step([joined()], NOW + 1)
            with server.hung(), pytest.raises(StoreUnavailable):
                store.news(NOW)
            end = in_thread(lambda: kept(engine))
            assert end() == [Touched(1)]
        finally:
            store.close()


def kept(engine: Engine) -> list[Any]:
    """The replies of a step that is tried until the database is back."""
    while True:
        try:
            return list(engine.step([joined()], NOW + 2).replies)
        except StoreUnavailable:
            time.sleep(0.1)


def test_a_commit_that_waits_for_a_standby_is_given_up_and_restarts_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is acknowledged, and nobody connected is dropped: what is due can be read."""
    monkeypatch.setattr("sfu_delegate.store.postgresql.HANGS_AFTER", 1.0)
    with Server() as server:
        store = PostgresStore(server.create_database())
        try:
            engine = engine_on(store)
            delegated(engine, NOW)
            engine.step([joined()], NOW + 1)
            server.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
            server.execute("SELECT pg_reload_conf()")
            until_synchronous(server)
            late = NOW + 3500
            with pytest.raises(StoreUnavailable):
                engine.step([left()], late)
            engine._due[HOMESERVER] = NOW
            assert [task.event for task in engine.keep_alive(late)] == [1]
            server.execute("ALTER SYSTEM RESET synchronous_standby_names")
            server.execute("SELECT pg_reload_conf()")
            assert in_thread(lambda: kept(engine))() == [Touched(1)]
        finally:
            store.close()


def until_synchronous(server: Server) -> None:
    """A reload takes its time to reach the server's processes."""
    deadline = time.monotonic() + WITHIN
    while server.execute("SHOW synchronous_standby_names") != [("nobody",)]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)


def test_a_lost_host_is_tried_last(url: str) -> None:
    """One that does not answer would cost `postgresql.connect_timeout` each time."""
    with instances(url, "a") as (store,):
        given = {"host": "a,b,c", "port": "1,2,3"}
        assert store._hosts(given) == given
        store._lost = ("a", "1")
        assert store._hosts(given) == {"host": "b,c,a", "port": "2,3,1"}
        store._lost = ("b", "5432")
        assert store._hosts({"host": "a,b"}) == {"host": "a,b", "port": ","}
        assert store._hosts({"host": "a,b", "port": "5432"}) == {"host": "a,b", "port": "5432,5432"}
        assert store._hosts({"host": "a"}) == {}


def test_a_database_that_lacks_characters_is_refused() -> None:
    """What could not be stored would be refused one by one, in the middle of calls."""
    server = postgresql.shared()
    server.execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    with pytest.raises(StoreUnavailable, match=r"LATIN1.*UTF8"):
        PostgresStore(server.url("latin"))
    server.drop_database(server.url("latin"))


def test_a_server_that_is_away_is_told_in_words_and_found_again() -> None:
    """No exception of the driver gets out, and no password."""
    with Server(password="a-password-that-nobody-sees") as server:
        made = server.create_database()
        with pytest.raises(StoreUnavailable, match=r"password") as refused:
            PostgresStore(made, password="another-password")
        assert "another-password" not in str(refused.value)
        store = PostgresStore(made, password="a-password-that-nobody-sees")
        try:
            engine = engine_on(store)
            delegated(engine, NOW)
            server.stop("immediate")
            for _ in range(3):
                with pytest.raises(StoreUnavailable) as away:
                    engine.step([joined()], NOW + 1)
                assert "a-password-that-nobody-sees" not in str(away.value)
            with pytest.raises(StoreUnavailable):
                store.reading(lambda tx: tx.next_due(HOMESERVER))
            server.start()
            assert engine.step([joined()], NOW + 2).replies == [Touched(1)]
        finally:
            store.close()


def test_without_the_right_the_operator_is_told_which() -> None:
    """A user that may connect, but not make tables."""
    with Server() as server:
        server.execute("CREATE ROLE stranger LOGIN")
        made = server.create_database()
        server.execute("CREATE DATABASE missing_rights")
        with pytest.raises(StoreUnavailable, match=r"CREATE on the schema|owner"):
            PostgresStore(made.rpartition("/")[0] + "/missing_rights")
        with pytest.raises(StoreUnavailable, match=r"createdb"):
            PostgresStore(made.rpartition("/")[0] + "/nowhere")


def test_a_standby_takes_nothing_but_can_be_read() -> None:
    """After the primary is gone, and before another takes its place: what is due is found, so that nobody connected is dropped."""
    with Server() as primary:
        made = primary.create_database()
        with primary.standby(synchronous=True) as standby:
            both = postgresql.several(postgresql.name_in(made), primary, standby)
            store = PostgresStore(both)
            try:
                engine = engine_on(store)
                delegated(engine, NOW)
                engine.step([joined()], NOW + 1)
                primary.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
                primary.kill()
                with pytest.raises(StoreUnavailable):
                    engine.step([joined()], NOW + 2)
                later = NOW + 3500
                engine._due[HOMESERVER] = NOW  # as `refresh` had told
                assert [task.event for task in engine.keep_alive(later)] == [stored_id(standby, made)]
                standby.promote()
                assert engine.step([joined()], NOW + 3).replies == [Touched(1)]
            finally:
                store.close()


def stored_id(server: Server, url: str) -> int:
    ((id,),) = server.query(url, "SELECT id FROM delayed_event")
    return int(id)


# ── what instances tell each other ──


def test_instances_see_each_other_while_they_live(url: str) -> None:
    """By the signs of life in the last seconds; whoever stops in order is gone at once."""
    with instances(url, "a", "b") as (a, b):
        assert a.news(NOW).instances == []
        assert [other.name for other in b.news(NOW + 1).instances] == ["a"]
        assert [other.name for other in a.news(NOW + 2).instances] == ["b"]
        for second in range(3, 12):
            seen = [other.name for other in a.news(NOW + second).instances]
            assert seen == (["b"] if second < 1 + DEAD_AFTER else [])
        b.news(NOW + 20)
        assert a.listed(["b", "c"]) == {"b"}
        b.close()
        assert a.news(NOW + 20).instances == []
        assert a.listed(["b", "c"]) == set()


def test_an_outage_of_the_database_is_nobodys_death(url: str) -> None:
    """While it was away nobody could show a sign of life; then all have some seconds to do so."""
    with instances(url, "a", "b") as (a, b):
        a.news(NOW)
        b.news(NOW + 0.5)
        for second in range(60, 72):
            seen = [other.name for other in a.news(NOW + second).instances]
            assert seen == (["b"] if second < 60 + DEAD_AFTER else [])


def test_a_name_that_two_processes_have_is_noticed(url: str) -> None:
    """By both; one that has taken the place of another one is all right, and takes nothing with it that is the new one's."""
    with instances(url, "a", "a") as (one, other):
        assert not one.news(NOW).namesake
        assert not other.news(NOW + 1).namesake
        assert one.news(NOW + 2).namesake
        assert other.news(NOW + 2).namesake
        assert not other.news(NOW + 3).namesake
        one.farewell()
        assert one.listed(["a"]) == {"a"}


def test_what_is_said_of_homeservers_is_heard_by_the_others(url: str) -> None:
    """As it was said last."""
    with instances(url, "a", "b") as (a, b):
        a.news(NOW, "something")
        assert [other.word for other in b.news(NOW + 1).instances] == ["something"]
        a.news(NOW + 2)
        assert [other.word for other in b.news(NOW + 2).instances] == [""]


def test_the_schedule_is_what_is_due(url: str) -> None:
    """By homeserver, by SFU; however many there are, by steps in an index."""
    with instances(url, "a") as (store,):
        rows = [
            row(state=State.LIVE)._replace(id=n, delay_id=f"d{n}", homeserver=f"hs{n % 3}", lane=Lane(n % 3), due=NOW + n if n % 5 else None)
            for n in range(1, 31)
        ]
        stores.insert(store, rows)
        save_rooms(store, [make_room(f"r{n}")._replace(sfu=f"sfu{n % 2}", due=NOW + n, routine=n > 4) for n in range(1, 9)])
        news = store.news(NOW)
        assert news.schedule == {f"hs{k}": min(r.due for r in rows if r.homeserver == f"hs{k}" and r.due is not None) for k in range(3)}
        assert news.rooms == {"sfu0": NOW + 2, "sfu1": NOW + 1}
        census = store.census()
        assert census.schedule == news.schedule
        assert sum(census.states.values()) == 30


def test_the_bucket_of_a_homeserver_is_looked_into_by_one_at_a_time(url: str) -> None:
    """Each adds one; nothing is lost, though they all try at once."""
    with instances(url, "a", "b", "c") as opened:

        def add(store: PostgresStore) -> None:
            for _ in range(25):
                store.exchange_pace(HOMESERVER, lambda known: json.dumps(json.loads(known or "0") + 1))

        for end in [in_thread(lambda s=store: add(s)) for store in opened]:  # type: ignore[misc]
            end()
        assert opened[0].news(NOW).paces == {HOMESERVER: "75"}


def test_instances_with_addresses_of_their_own_have_buckets_of_their_own(url: str) -> None:
    """Where a homeserver counts requests by address."""
    a, b = (PostgresStore(url, instance=name, address=name) for name in "ab")
    try:
        a.exchange_pace(HOMESERVER, lambda _: "a's")
        b.exchange_pace(HOMESERVER, lambda known: "b's" if known is None else "wrong")
        assert (a.news(NOW).paces, b.news(NOW).paces) == ({HOMESERVER: "a's"}, {HOMESERVER: "b's"})
    finally:
        a.close()
        b.close()


def ended_under_a_limit(url: str, count: int, seconds: int) -> tuple[int, int]:
    """So many instances end the events of forty people at a homeserver with Synapse's default; how many it allowed, and how many it refused."""
    stores_ = [PostgresStore(url, instance=str(n)) for n in range(count)]
    engines = [Engine(store, POLICY, Limits(), Random(n)) for n, store in enumerate(stores_)]
    gone = row(state=State.ENDING, presence=Presence.GONE)
    rows = [gone._replace(id=n, delay_id=f"d{n}", identity=f"p{n}", lane=Lane.END, due=NOW, ended_at=NOW) for n in range(1, 41)]
    stores.insert(stores_[0], rows)
    tokens, tokens_at, allowed, refused = 5.0, NOW, 0, 0
    flying: dict[int, list[Answered]] = {n: [] for n in range(count)}
    for tick in range(seconds * 10):
        now = NOW + tick / 10
        for n, engine in enumerate(engines):
            if tick % 10 == n:
                engine.refresh(now)
            step = engine.step(flying[n], now)
            flying[n] = []
            for task in step.tasks:
                if not task.event:
                    continue
                tokens, tokens_at = min(5.0, tokens + now - tokens_at), now
                if tokens >= 1:
                    tokens, allowed = tokens - 1, allowed + 1
                    flying[n].append(answer(task, now))
                else:
                    refused += 1
                    flying[n].append(answer(task, now, Verdict.LIMITED, retry_after=1 - tokens))
    for store in stores_:
        store.close()
    return allowed, refused


def test_three_instances_keep_to_one_limit() -> None:
    """What one of them learns of a rate limit, the others know; together they make use of it, and are not refused much more often than one is."""
    counts = {}
    for count in (1, 3):
        with postgresql.shared().database(stores.migrated) as made:
            counts[count] = ended_under_a_limit(made, count, 25)
    (alone, refused_alone), (together, refused_together) = counts[1], counts[3]
    assert alone >= 25
    assert together >= 25
    assert refused_together <= refused_alone + 3 * 6 + 5, counts  # each may have six on their way before the first refusal


def test_a_limit_that_one_has_met_is_known_to_the_other(url: str) -> None:
    """After its next look at what is new."""
    with instances(url, "a", "b") as (a, b):
        one, other = engine_on(a), engine_on(b, 1)
        (task,) = one.step([accept()], NOW).tasks
        one.step([answer(task, NOW, Verdict.LIMITED, retry_after=3.0)], NOW + 0.5)
        other.refresh(NOW + 1)
        other.step([accept("D2", identity="bob")], NOW + 1)
        assert one.rates()[HOMESERVER][0] is Limit.SOME
        assert other.rates()[HOMESERVER][0] is Limit.SOME
        assert other._pace(HOMESERVER).blocked_until == one._pace(HOMESERVER).blocked_until


def test_what_is_shared_of_a_pace_is_all_that_it_plans_with() -> None:
    """Told and taken over, it allows the same at the same times."""
    random = Random(3)
    pace = Pace(16)
    now = NOW
    for _ in range(300):
        now += random.random()
        if random.random() < 0.5 and pace.urgent(now):
            pace.began(now)
            if random.random() < 0.2:
                pace.refused(now, random.choice([None, 0.5, 2.0]), now + 0.1)
            else:
                pace.ended(now, now + 0.1, ending=True, answered=True)
        copy = Pace(16)
        copy.adopt(pace.shared(), now + 100)
        copy.width, copy.in_flight, copy._probing = pace.width, pace.in_flight, pace._probing
        copy._down, copy._last_try_at, copy._early = pace._down, pace._last_try_at, pace._early
        copy._widening, copy.answered_at = pace._widening, pace.answered_at
        assert copy == pace


def test_when_sfus_were_heard_of_the_latest_counts(url: str) -> None:
    """Whoever says it, and whatever was learned of them before."""
    with instances(url, "a", "b") as (a, b):
        a.save_sfu(KnownSfu(SFU, NOW, NOW + 1))
        a.heard_of([Heard(SFU, NOW + 5, NOW + 2)])
        b.heard_of([Heard(SFU, NOW + 4, NOW + 3)])
        b.save_sfu(KnownSfu(SFU, None, None))
        news = a.news(NOW)
        assert news.heard == [Heard(SFU, NOW + 5, NOW + 3)]
        assert news.sfus == [KnownSfu(SFU, None, NOW + 1)]


def test_rooms_are_asked_for_however_many_there_are(url: str) -> None:
    """In transactions of some; those that are being looked at are only marked."""
    with instances(url, "a") as (store,):
        save_rooms(store, [make_room(f"r{n:05}")._replace(sfu=f"sfu{n % 2}", due=NOW + 500 if n % 3 else None) for n in range(2500)])
        busy = make_room("busy")._replace(sfu="sfu0", claimed=True, due=NOW + 9)
        save_rooms(store, [busy])
        store.ask_rooms("sfu0", NOW)
        found = postgresql.shared().query(url, "SELECT sfu, due, asked, count(*) FROM room WHERE name <> 'busy' GROUP BY 1, 2, 3 ORDER BY 1, 2")
        assert found[0] == ("sfu0", NOW, NOW, 1250)
        assert {one[:3] for one in found[1:]} == {("sfu1", NOW + 500, None), ("sfu1", None, None)}
        assert room_of(store, "busy", "sfu0") == busy._replace(asked=NOW)


def test_after_nobody_listened_all_rooms_are_looked_at(url: str) -> None:
    """By the first instance; not by one that comes to others, which have heard everything."""
    with instances(url, "a", "b") as (a, b):
        save_rooms(a, [make_room("r")._replace(due=NOW + 500)])
        one, other = engine_on(a), engine_on(b, 1)
        assert one.refresh(NOW) == NOW
        one.step([], NOW)
        assert postgresql.shared().query(url, "SELECT asked FROM room") == [(NOW,)]
        other.refresh(NOW + 1)
        one.refresh(NOW + 2)
        other.refresh(NOW + 2)
        other.refresh(NOW + 10)
        other.step([], NOW + 10)
        assert postgresql.shared().query(url, "SELECT asked FROM room") == [(NOW,)]


def test_after_the_clock_was_set_no_time_is_later_than_now(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All events are due; each instance sees to it, since one that has not noticed yet writes times of the old clock."""
    monkeypatch.setattr("sfu_delegate.store.postgresql.CHUNK", 3)
    with instances(url, "a", "b") as (a, b):
        there = row(state=State.LIVE)._replace(running_since=NOW + 5000, lane=Lane.RESTART, due=NOW + 9000)
        stores.insert(a, [there._replace(id=n, delay_id=f"d{n}") for n in range(1, 8)])
        save_rooms(a, [make_room(f"r{n}")._replace(due=NOW + 500, looked_at=NOW + 50) for n in range(7)])
        a.heard_of([Heard(SFU, NOW + 70, NOW + 70)])
        for store in (a, b):
            store.times_are_unknown(NOW, POLICY)
            assert [(found.due, found.running_since <= NOW) for found in stored(a)] == [(NOW, True)] * 7
            assert postgresql.shared().query(url, "SELECT DISTINCT due, looked_at FROM room") == [(NOW, NOW)]
            assert a.news(NOW).heard == [Heard(SFU, NOW, NOW)]


def test_a_bucket_of_a_clock_that_was_set_back_fills_all_the_same() -> None:
    """Or nothing would be done for as long as it was set back."""
    pace = Pace(16)
    pace.recall(Limit.SOME, 1.0, 5.0, NOW + 3600)
    pace.began(NOW + 3600)
    pace.refused(NOW + 3600, 2.0, NOW + 3600)
    told = pace.shared()
    copy = Pace(16)
    copy.adopt(told, NOW)
    pace.clock_moved(NOW)
    for one in (copy, pace):
        assert one.urgent(NOW + 20) >= 1, one


@pytest.mark.parametrize("told", ["", "{}", "[]", '{"limit": "of the future"}', "null", '{"limit": "some", "rate": null}'])
def test_what_another_version_tells_of_a_limit_harms_nobody(told: str) -> None:
    """What cannot be read is left alone."""
    pace, before = Pace(16), Pace(16)
    pace.adopt(told, NOW)
    assert pace == before


def test_of_a_large_backlog_the_order_is_looked_for_now_and_then(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And everything is taken once, most urgent first; what another instance has taken meanwhile is left out."""
    monkeypatch.setattr("sfu_delegate.store.postgresql.BACKLOG_TAKES", -1.0)
    with instances(url, "a", "b") as (a, b):
        there = row(state=State.LIVE)._replace(lane=Lane.RESTART, due=NOW)
        stores.insert(a, [there._replace(id=n, delay_id=f"d{n}", harm=NOW + 10 + n % 97) for n in range(1, 401)])
        taken: list[float] = []

        def take(tx: Transaction, most: int) -> int:
            tx.no_more_waiting()
            found = sorted(tx.todo(HOMESERVER, Lane.RESTART, most, NOW + 1, harmed=False), key=lambda found: found.harm or 0.0)
            for one in found:
                tx.update(one, one._replace(due=NOW + 500))
            taken.extend(one.harm or 0.0 for one in found)
            return len(found)

        assert a.atomically(lambda tx: take(tx, 50)) == 50
        assert sum(len(ids) for _, ids in a.hints.values()) == 350
        assert b.atomically(lambda tx: take(tx, 100)) == 100
        while a.atomically(lambda tx: take(tx, 50)):
            pass
        assert len(taken) == 400
        assert taken == sorted(taken)


def test_what_somebody_has_is_waited_for_the_second_time(url: str) -> None:
    """A row that is being claimed elsewhere, in a room that turns out to be needed: not a dozen tries within milliseconds."""
    with instances(url, "a", "b") as (a, b):
        stores.insert(a, [row(state=State.LIVE)._replace(lane=Lane.RESTART, due=NOW)])
        save_rooms(a, [make_room(ROOM)])
        holding, done, tries = threading.Event(), threading.Event(), []

        def hold(tx: Transaction) -> None:
            tx.no_more_waiting()
            assert tx.todo(HOMESERVER, Lane.RESTART, 12, NOW)
            holding.set()
            assert done.wait(WITHIN)

        def look(tx: Transaction) -> int:
            tries.append(1)
            tx.lock_rooms((), ())
            tx.no_more_waiting()
            assert tx.room(SFU, ROOM)
            return len(tx.of_room(SFU, ROOM))

        end = in_thread(lambda: a.atomically(hold))
        assert holding.wait(WITHIN)
        looking = in_thread(lambda: b.atomically(look))
        time.sleep(0.5)
        done.set()
        end()
        assert looking() == 1
        assert len(tries) == 2


def test_delegations_are_peeked_at_without_a_lock(url: str) -> None:
    """For a client that waits: also while another instance works on them."""
    with instances(url, "a", "b") as (a, b):
        delegated(engine_on(a), NOW)
        found: list[Any] = []

        def hold(tx: Transaction) -> None:
            tx.lock_rooms([(SFU, ROOM)], ())
            assert tx.of_room(SFU, ROOM)
            found.extend(b.peek(["D1"]))

        a.atomically(hold)
        assert [there.identity for there in found] == [ALICE]


def test_every_statement_uses_an_index(url: str, tmp_path: Path) -> None:
    """At a step of every kind: with a million rows, what reads the table takes a second."""
    del tmp_path
    server = postgresql.shared()
    with instances(url, "a") as (store,):
        engine = engine_on(store)
        for n in range(30):
            delegated(engine, NOW, delegation=f"D{n}", identity=f"p{n}", room=f"r{n % 4}")
        seen: list[Any] = [joined(f"S{n}", identity=f"p{n}", room=f"r{n % 4}") for n in range(30)]
        engine.step(seen, NOW + 1)
        store._lose()
        before = scans(server, url)
        for at in range(40):
            now = NOW + 2 + at * 500
            engine.refresh(now)
            leaves: list[Seen] = [left(f"S{at}", identity=f"p{at}", room=f"r{at % 4}")] if at < 20 else []
            step = engine.step([*leaves, Find(f"D{at}")], now)
            engine.step([answer(task, now) for task in step.tasks if task.event], now + 1)
        store._lose()
        assert scans(server, url) == before


def scans(server: Server, url: str) -> dict[str, int]:
    """How often each of the large tables was read as a whole, so far. The server counts what a connection did at its end, or later."""
    deadline = time.monotonic() + WITHIN
    while server.execute("SELECT 1 FROM pg_stat_activity WHERE datname = %s", postgresql.name_in(url)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname IN ('delayed_event', 'room', 'history') ORDER BY 1"
        ).fetchall()
    return {str(name): int(count) for name, count in found}
