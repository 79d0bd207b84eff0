"""Several instances on one PostgreSQL: any of them dies, stands still, is restarted, and so does the database. Nobody is dropped or forgotten."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, LiteralString, Self

import pytest
from sfu_delegate.demo.processes import HOST, free_ports
from sfu_delegate.sandbox.homeserver import DelayedEvent, End, HomeserverFaults, HomeserverModel, RateLimit
from sfu_delegate.sandbox.sfu import DeliveryFaults

from tests.integration.daemon import SERVER, until
from tests.integration.instances import LEASE, Cluster, Crowd, Delivered, Instance, Stay, harms_of, open_cluster
from tests.postgresql import Server, name_in, several

OTHERS_WITHIN = 20.0  # seconds until the others have what an instance had locked that stands still; the database cuts it off after a few


@pytest.fixture
def server() -> Iterator[Server]:
    """A PostgreSQL of its own, that may be killed."""
    with Server() as server:
        yield server


async def removed(cluster: Cluster, stay: Stay) -> None:
    """A departure that needs no look: whoever hears of it acts at once."""
    await cluster.leave(stay, "PARTICIPANT_REMOVED")


async def back(cluster: Cluster, stay: Stay) -> None:
    """Somebody who had left is there again, as before."""
    stay.left_at = None
    await cluster.join(stay)


# ── one address for all ──


async def test_who_hears_of_a_departure_ends_the_event_in_the_same_step(tmp_path: Path, server: Server) -> None:
    """All three start at once, on an empty database. Each departure is told to any of them, and that one sends the event; no other does."""
    async with open_cluster(tmp_path, server) as cluster:
        people = [await cluster.in_call(f"guest{n}", f"room{n % 5}") for n in range(15)]
        for stay in people:
            await removed(cluster, stay)
        for stay in people:
            await cluster.ended(stay)
        await until(lambda: len(told("sent", cluster)) == len(people), "it is known that all were sent")
        heard = {one.identity: one.instance for one in cluster.delivered if one.event == "participant_left"}
        assert told("sent", cluster) == told("ending", cluster) == {stay.delegation: heard[stay.identity] for stay in people}
        assert len(set(heard.values())) == 3
        assert (cluster.asked("send"), cluster.asked("send", 200)) == (len(people), len(people))
        late = [stay.event.ended_at - stay.left_at for stay in people if stay.event.ended_at and stay.left_at]
        print(f"seconds from departure to end: {max(late):.3f} at the most")
        for instance in cluster.instances:
            await until(partial(knows_all, cluster, instance), f"{instance.name} knows the others")
            sent = await cluster.count(instance, "sfu_delegate_actions_total", action="send", outcome="done")
            assert sent == Counter(heard.values())[instance.name]


async def knows_all(cluster: Cluster, instance: Instance) -> bool:
    """Does it know how many they are?"""
    return await cluster.count(instance, "sfu_delegate_instances") == len(cluster.instances)


def told(what: str, cluster: Cluster) -> dict[str, str]:
    """By delegation: which instance said so."""
    return {line["delegation"]: instance.name for instance in cluster.instances for line in instance.told(what)}


# ── an instance is cut off ──


async def test_one_that_cannot_reach_the_homeserver_leaves_it_to_the_others(tmp_path: Path, server: Server) -> None:
    """What is delegated to it is confirmed, whoever it hears of is ended, and nobody drops out: the others do it."""
    nowhere = {"homeservers": [{"name": SERVER, "url": f"http://{HOST}:{free_ports(1)[0]}"}]}
    async with open_cluster(tmp_path, server, apart={"one": nowhere}) as cluster:
        one = cluster.instances[0]
        for instance in cluster.instances:
            await until(partial(knows_all, cluster, instance), f"{instance.name} knows the others")
        cluster.balancer.only = one.name
        people = [await cluster.in_call(f"guest{n}", f"room{n % 3}") for n in range(9)]
        for stay in people[:6]:
            await removed(cluster, stay)
        for stay in people[:6]:
            await cluster.ended(stay)
        assert cluster.asked("send", 200) == 6
        assert {one.name} == {delivered.instance for delivered in cluster.delivered}
        assert await cluster.count(one, "sfu_delegate_actions_total", outcome="done") == 0
        late = [stay.event.ended_at - stay.left_at for stay in people[:6] if stay.event.ended_at and stay.left_at]
        print(f"seconds from departure to end: {max(late):.1f} at the most")


async def test_one_that_cannot_ask_the_sfu_leaves_it_to_the_others(tmp_path: Path, server: Server) -> None:
    """That it gets no answer says nothing of somebody who came back, and whose webhooks are lost: they stay, and whoever has left is ended."""
    nowhere = {"sfus": {"main": {"url": f"ws://{HOST}:{free_ports(1)[0]}"}}}
    async with open_cluster(tmp_path, server, apart={"one": nowhere}) as cluster:
        one = cluster.instances[0]
        for instance in cluster.instances:
            await until(partial(knows_all, cluster, instance), f"{instance.name} knows the others")
        cluster.balancer.only = one.name
        leaving, staying = [[await cluster.in_call(f"{who} {n}") for n in range(3)] for who in ("leaving", "staying")]
        for stay in leaving:
            await cluster.leave(stay)
        for stay in staying:
            await cluster.leave(stay)
            await until(partial(heard_of, "participant_left", stay.identity, cluster), "its departure is told")
            cluster.sfu.model.delivery_faults = DeliveryFaults(drop=1.0)
            await back(cluster, stay)
            cluster.sfu.model.delivery_faults = DeliveryFaults()
        for stay in leaving:
            await cluster.ended(stay)
        for stay in staying:
            await cluster.present(stay, "connected")
            assert stay.event.end is End.PENDING
        for stay in staying:
            assert not [one for one in cluster.delivered if (one.event, one.identity) == ("participant_joined", stay.identity)][1:]


def heard_of(event: str, identity: str, cluster: Cluster) -> bool:
    """Has an instance got this webhook?"""
    return any((one.event, one.identity, one.status) == (event, identity, 200) for one in cluster.delivered)


# ── an instance dies ──


async def test_each_instance_is_killed_under_load(tmp_path: Path, server: Server) -> None:
    """One after the other, and started again: the others go on meanwhile, and take over what it had begun."""
    async with open_cluster(tmp_path, server) as cluster, Crowd(cluster).alive() as crowd:
        for instance in cluster.instances:
            await crowd.going_on(4)
            await instance.kill()
            await crowd.going_on(8)
            await instance.start()


async def test_an_instance_dies_right_after_it_has_claimed_a_departure(tmp_path: Path, server: Server) -> None:
    """Its request never reaches the homeserver: another instance sends the event when the lease has ended, once."""
    async with open_cluster(tmp_path, server) as cluster:
        one = cluster.instances[0]
        stay, other = await cluster.in_call("anna"), await cluster.in_call("bert")
        cluster.balancer.only = one.name
        cluster.homeserver.model.faults = HomeserverFaults(only=frozenset({"send"}), hang=True)
        await removed(cluster, stay)
        await until(lambda: cluster.asked("send", 0) == 1, "a send is under way")
        await one.kill()
        cluster.balancer.only = "two"
        cluster.homeserver.model.faults = HomeserverFaults()
        await removed(cluster, other)
        await cluster.ended(other)
        assert stay.event.end is End.PENDING  # the lease goes on
        await cluster.ended(stay)
        assert stay.event.ended_at is not None
        assert stay.left_at is not None
        print(f"taken over {stay.event.ended_at - stay.left_at:.1f} s after the departure, with a lease of {LEASE:g} s")
        assert cluster.asked("send", 200) == 2
        assert cluster.asked("send", 404) == 0
        await until(lambda: len(told("sent", cluster)) == 2, "it is known that both were sent")


@pytest.mark.slow
async def test_an_instance_dies_before_a_departure_is_acknowledged(tmp_path: Path, server: Server) -> None:
    """What it had committed is in the database, and the webhook comes again: the event is sent once, when the lease has ended."""
    async with open_cluster(tmp_path, server) as cluster:
        one, cluster.balancer.patience = cluster.instances[0], 1.0
        stay = await cluster.in_call("anna")
        with Gate(cluster, one, "commits an ending") as gate:
            cluster.balancer.only = one.name
            await removed(cluster, stay)
            await gate.reached()
            one.pause()
            gate.open()
            await until(lambda: claimed(cluster), "the commit is done")
            await one.kill()
        cluster.balancer.only = None
        assert cluster.asked("send") == 0
        await cluster.ended(stay)
        assert cluster.asked("send") == 1
        await until(lambda: len(told("sent", cluster)) == 1, "it is known that it was sent")


@pytest.mark.parametrize("leases", [pytest.param(3, id="as short as the defaults allow"), 6])
@pytest.mark.slow
async def test_an_instance_dies_with_a_restart_under_way(tmp_path: Path, server: Server, leases: int) -> None:
    """The others restart the event before its time is over, however short its delay is. By default that is 30 s at the least, and the lease 10 s."""
    async with open_cluster(tmp_path, server, restart={"at": 0.75, "spread": 0.01}) as cluster:
        one = cluster.instances[0]
        stay = await cluster.in_call("anna", delay=leases * LEASE)
        await until(lambda: len(stay.event.restarted_at) == 2, "it is restarted for the first time, which may be early")
        await until(lambda: not claimed(cluster), "that is kept")
        async with paused(*cluster.instances[1:]):
            cluster.homeserver.model.faults = HomeserverFaults(only=frozenset({"restart"}), hang=True)
            await until(lambda: cluster.asked("restart", 0) == 1, "a restart is under way")
            begun = (time.time() - stay.event.since) / stay.event.delay
            await one.kill()
            cluster.homeserver.model.faults = HomeserverFaults()
        await until(lambda: len(stay.event.restarted_at) > 2 or stay.event.end is not End.PENDING, "it is restarted, or has ended")
        print(f"the restart that died had begun at {begun:.0%} of the delay")
        assert stay.event.end is End.PENDING, stay


# ── an instance stands still ──


class Gate:
    """A place in the database at which one instance waits, with all the locks that it has, until it is opened."""

    KEY = 4711
    PLACES: Mapping[str, LiteralString] = {
        "commits an ending": "CREATE CONSTRAINT TRIGGER gate AFTER UPDATE ON delayed_event DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
        "WHEN (NEW.state = 'ending' AND NEW.claimed = 1) EXECUTE FUNCTION wait_at_gate()",
        "has written an ending": "CREATE TRIGGER gate AFTER UPDATE ON delayed_event FOR EACH ROW "
        "WHEN (NEW.state = 'ending' AND NEW.claimed = 1) EXECUTE FUNCTION wait_at_gate()",
    }

    def __init__(self, cluster: Cluster, instance: Instance, place: str) -> None:
        self._cluster = cluster
        self._instance = instance
        self._place = place
        self._name = f"sfu-delegate {instance.name}"

    def __enter__(self) -> Self:
        self._connection = self._cluster.server.admin(name_in(self._cluster.url))
        self._connection.execute(
            f"CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF current_setting('application_name') = '{self._name}' THEN "
            f"PERFORM pg_advisory_lock_shared({self.KEY}); PERFORM pg_advisory_unlock_shared({self.KEY}); END IF; RETURN NULL; END $$"
        )
        self._connection.execute(self.PLACES[self._place])
        self._connection.execute("SELECT pg_advisory_lock(%s)", (self.KEY,))
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    async def reached(self) -> None:
        """Wait until the instance stands at it."""
        query = "SELECT 1 FROM pg_stat_activity WHERE application_name = %s AND wait_event = 'advisory'"
        await until(lambda: self._connection.execute(query, (self._name,)).fetchall(), f"{self._instance.name} {self._place}")

    def open(self) -> None:
        """Let it go on."""
        self._connection.execute("SELECT pg_advisory_unlock(%s)", (self.KEY,))


@asynccontextmanager
async def paused(*instances: Instance) -> AsyncIterator[None]:
    """They stand still meanwhile."""
    for instance in instances:
        instance.pause()
    try:
        yield
    finally:
        for instance in instances:
            instance.go_on()


def claimed(cluster: Cluster) -> list[Any]:
    """The events of which an answer is awaited."""
    return cluster.query("SELECT id, claim FROM delayed_event WHERE claimed = 1")


@pytest.mark.slow
async def test_stopped_with_a_send_under_way_and_the_person_is_back(tmp_path: Path, server: Server) -> None:
    """The homeserver hangs, the instance stands still for longer than its lease, and the person comes back: another instance restarts the event, and
    what the first one hears at last ends nothing."""
    async with open_cluster(tmp_path, server) as cluster:
        one = cluster.instances[0]
        stay = await cluster.in_call("anna")
        cluster.balancer.only = one.name
        cluster.homeserver.model.faults = HomeserverFaults(only=frozenset({"send"}), hang=True)
        await removed(cluster, stay)
        await until(lambda: cluster.asked("send", 0) == 1, "a send is under way")
        async with paused(one):
            cluster.balancer.only = "two"
            cluster.homeserver.model.faults = HomeserverFaults()
            restarted = len(stay.event.restarted_at)
            await back(cluster, stay)
            await cluster.present(stay, "connected")
            await until(lambda: len(stay.event.restarted_at) > restarted, "another instance restarts it")
            await asyncio.sleep(1.0)
        await cluster.all_ready()

        async def over() -> bool:
            return await cluster.count(one, "sfu_delegate_actions_total", action="send") == 1

        await until(over, "the instance that stood still has given up its request")
        assert (stay.event.end, cluster.asked("send")) == (End.PENDING, 1)
        await cluster.present(stay, "connected")
        cluster.balancer.only = one.name
        await cluster.leave(stay)
        await cluster.ended(stay)
        assert cluster.asked("send", 200) == 1


async def test_stopped_between_a_claim_and_its_request_and_the_person_is_back(tmp_path: Path, server: Server) -> None:
    """It notices that its lease has ended, and asks the homeserver for nothing."""
    async with open_cluster(tmp_path, server) as cluster:
        one, cluster.balancer.patience = cluster.instances[0], 1.0
        stay = await cluster.in_call("anna")
        with Gate(cluster, one, "commits an ending") as gate:
            cluster.balancer.only = one.name
            await removed(cluster, stay)
            await gate.reached()
            async with paused(one):
                gate.open()
                await until(lambda: claimed(cluster), "the commit is done")
                await given_up(cluster, stay, one)
                restarted = len(stay.event.restarted_at)
                await back(cluster, stay)
                await cluster.present(stay, "connected")
                await until(lambda: len(stay.event.restarted_at) > restarted, "another instance restarts it")
                await asyncio.sleep(1.0)
        await until(lambda: one.entries("lease_ended"), "it notices that its lease has ended")
        await cluster.all_ready()
        await cluster.present(stay, "connected")
        assert (stay.event.end, cluster.asked("send")) == (End.PENDING, 0)
        await cluster.leave(stay)
        await cluster.ended(stay)
        assert cluster.asked("send") == 1


async def test_stopped_in_the_middle_of_a_transaction(tmp_path: Path, server: Server) -> None:
    """It has locked a room and its events. After some seconds the database lets the others have them; when it goes on, it begins anew.

    It has to be idle for the database: psycopg's pipelines are not, and after one PostgreSQL does not count the time (a Flush follows the Sync).
    """
    async with open_cluster(tmp_path, server) as cluster:
        one, cluster.balancer.patience = cluster.instances[0], 1.0
        stay, other, elsewhere = [await cluster.in_call(*who) for who in (("anna",), ("bert",), ("carl", "another room"))]
        with Gate(cluster, one, "has written an ending") as gate:
            cluster.balancer.only = one.name
            await removed(cluster, stay)
            await gate.reached()
            async with paused(one):
                gate.open()
                began = time.time()
                cluster.balancer.only = "two"
                await removed(cluster, elsewhere)
                await cluster.ended(elsewhere)
                await given_up(cluster, stay, one)
                await others_have_the_room(cluster, other, began)
                cluster.balancer.only = None
                await asyncio.sleep(LEASE)
        await cluster.ended(stay)
        await cluster.all_ready()
        assert cluster.asked("send", 200) == 3


async def given_up(cluster: Cluster, stay: Stay, instance: Instance) -> None:
    """Wait until the balancer has given up an instance that does not answer the webhook of a departure. The next ones go to another instance."""
    cluster.balancer.only = "two"
    await until(lambda: Delivered(instance.name, "participant_left", stay.identity, None) in cluster.delivered, f"{instance.name} is given up")


async def others_have_the_room(cluster: Cluster, other: Stay, began: float) -> None:
    """Somebody leaves the room that the instance has locked which stands still: within a few seconds another instance sends the event."""
    await removed(cluster, other)
    async with asyncio.timeout(OTHERS_WITHIN):
        await cluster.ended(other)
    assert other.event.ended_at
    print(f"the others waited for {other.event.ended_at - began:.1f} s")


@pytest.mark.slow
async def test_each_instance_stands_still_under_load(tmp_path: Path, server: Server) -> None:
    """For longer than its lease, one after the other. The others go on; what it has claimed is theirs, and what it does afterwards harms nobody."""
    async with open_cluster(tmp_path, server) as cluster, Crowd(cluster).alive() as crowd:
        for instance in cluster.instances:
            async with paused(instance):
                await crowd.going_on(8)
                await asyncio.sleep(LEASE + 0.5)
            await crowd.going_on(8)


# ── the database ──


async def until_refused(cluster: Cluster) -> None:
    """Wait until a webhook was answered 503."""
    before = refused(cluster)
    await until(lambda: refused(cluster) > before, "a webhook is answered 503")


def refused(cluster: Cluster) -> int:
    """How many webhooks were answered 503."""
    return sum(one.status == 503 for one in cluster.delivered)


async def until_none_is_ready(cluster: Cluster) -> None:
    """Wait until all instances say that they cannot work."""

    async def so() -> bool:
        return not any(await asyncio.gather(*map(cluster.ready, cluster.instances)))

    await until(so, "no instance is ready")


@contextmanager
def no_crash(cluster: Cluster) -> Iterator[None]:
    """All instances are the same processes afterwards."""
    before = [instance.pid for instance in cluster.instances]
    yield
    assert [instance.returncode for instance in cluster.instances] == [None] * len(before)
    assert [instance.pid for instance in cluster.instances] == before


async def test_connections_are_cut_and_the_database_is_restarted_under_load(tmp_path: Path, server: Server) -> None:
    """In order, and in disorder. Webhooks and delegations are refused meanwhile, and come again; the instances are back by themselves."""
    async with open_cluster(tmp_path, server) as cluster, Crowd(cluster).alive() as crowd:
        with no_crash(cluster):
            for _ in range(3):
                assert await asyncio.to_thread(server.terminate_backends, cluster.url) > 0
                await crowd.going_on(4)
            modes: tuple[Literal["fast", "immediate"], ...] = ("fast", "immediate")
            for mode in modes:
                await asyncio.to_thread(server.stop, mode)
                await asyncio.gather(until_refused(cluster), until_none_is_ready(cluster))
                await asyncio.to_thread(server.start)
                print(f"ready {await cluster.all_ready():.2f} s after a restart ({mode})")
                await crowd.going_on(8)
        assert cluster.lines("database_works_again")


@pytest.mark.slow
async def test_the_database_hangs_under_load(tmp_path: Path, server: Server) -> None:
    """All its processes stand still, and no connection ends. Nobody waits without end: after some seconds webhooks get 503."""
    async with open_cluster(tmp_path, server) as cluster, Crowd(cluster).alive() as crowd:
        cluster.balancer.patience = 10.0  # an instance takes some seconds to say that its database hangs
        with no_crash(cluster):
            with server.hung():
                await asyncio.gather(until_refused(cluster), until_none_is_ready(cluster))
                await asyncio.sleep(1.0)
            print(f"ready {await cluster.all_ready():.2f} s after the database went on")
            await crowd.going_on(12)


@pytest.mark.slow
async def test_the_database_hangs_for_a_moment_under_load(tmp_path: Path, server: Server) -> None:
    """So short that nobody is refused: everything waits, and goes on."""
    async with open_cluster(tmp_path, server) as cluster, Crowd(cluster).alive() as crowd:
        with no_crash(cluster):
            for _ in range(3):
                with server.hung():
                    await asyncio.sleep(2.0)
                await crowd.going_on(8)
        assert not refused(cluster)


async def test_failover_to_a_standby(tmp_path: Path, server: Server) -> None:
    """The primary is killed. As long as there is a standby only, which can be read, nobody who is connected is dropped, though their events need
    restarts; when it is promoted, everything goes on, with all that was acknowledged."""
    async with AsyncExitStack() as opened:
        standby = await asyncio.to_thread(opened.enter_context, server.standby())
        url = server.create_database()
        both = several(name_in(url), server, standby)
        cluster = await opened.enter_async_context(open_cluster(tmp_path, server, url=both))
        people = [await cluster.in_call(f"resident{n}", f"room{n % 3}", 6.0) for n in range(6)]
        leaving = await cluster.in_call("anna", "room0")
        acknowledged = await cluster.in_call("bert", "room1")
        with no_crash(cluster):
            await asyncio.to_thread(server.kill)
            cluster.server = standby
            await asyncio.gather(until_none_is_ready(cluster), removed(cluster, leaving), until_refused(cluster))
            before = [len(stay.event.restarted_at) for stay in people]
            began = time.time()
            await asyncio.sleep(8.0)
            assert [stay.event.end for stay in people] == [End.PENDING] * len(people)
            restarts = [len(stay.event.restarted_at) - times for stay, times in zip(people, before, strict=True)]
            print(f"{restarts} restarts in {time.time() - began:.0f} s without a database that takes changes")
            assert all(restarts)
            assert leaving.event.end is End.PENDING
            await asyncio.to_thread(standby.promote)
            print(f"ready {await cluster.all_ready():.2f} s after the promotion")
            await cluster.ended(leaving)
            await cluster.present(acknowledged, "connected")
            new = await cluster.in_call("carl", "room2")
            for stay in (acknowledged, new, *people):
                await removed(cluster, stay)
            for stay in (acknowledged, new, *people):
                await cluster.ended(stay)


@pytest.mark.slow
async def test_failover_under_load(tmp_path: Path, server: Server) -> None:
    """The primary is killed, and the standby is promoted soon: nothing that was acknowledged is lost."""
    async with AsyncExitStack() as opened:
        standby = await asyncio.to_thread(opened.enter_context, server.standby())
        url = server.create_database()
        cluster = await opened.enter_async_context(open_cluster(tmp_path, server, url=several(name_in(url), server, standby)))
        async with Crowd(cluster).alive() as crowd:
            with no_crash(cluster):
                await asyncio.to_thread(server.kill)
                cluster.server = standby
                await until_refused(cluster)
                await asyncio.to_thread(standby.promote)
                print(f"ready {await cluster.all_ready():.2f} s after the promotion")
                await crowd.going_on(24)


# ── a rate limit that counts addresses ──


@pytest.mark.slow
async def test_three_keep_within_a_rate_limit_as_well_as_one(tmp_path: Path, server: Server) -> None:
    """Synapse's default, counted by address: all three have the same. It refuses them about as often as it refuses one, and leaves get sent."""
    counts = {1: 0, 3: 0}
    seconds = {1: 0.0, 3: 0.0}

    async def play(count: int) -> None:
        model = HomeserverModel(SERVER, seed=1, limit=RateLimit())
        async with open_cluster(tmp_path / str(count), server, count=count, homeserver=model) as cluster:
            people = [await cluster.schedule(f"guest{number}", f"room{number % 4}", 600.0) for number in range(10)]
            for stay in people:
                await until(partial(delegated, cluster, stay), f"{stay.identity} delegates")
                await cluster.join(stay)
            began = time.monotonic()
            for stay in people:
                await removed(cluster, stay)
            for stay in people:
                await cluster.ended(stay)
            seconds[count] = time.monotonic() - began
            counts[count] = sum(times for (_, status), times in model.answers.items() if status == 429)

    await asyncio.gather(play(1), play(3))
    print(f"429s: {counts}; seconds until all leaves were sent: {seconds}")
    assert counts[3] <= 2 * counts[1] + 5
    assert seconds[3] <= 2 * seconds[1] + 5


async def delegated(cluster: Cluster, stay: Stay) -> bool:
    """One try to delegate."""
    return await cluster.delegate(stay) in (200, 201)


# ── an upgrade ──


@pytest.mark.slow
async def test_a_rolling_restart_under_load(tmp_path: Path, server: Server) -> None:
    """Each instance is stopped (SIGTERM) and started anew, one after the other: nothing is lost, and all end in order."""
    async with open_cluster(tmp_path, server) as cluster, Crowd(cluster).alive() as crowd:
        for instance in cluster.instances:
            await crowd.going_on(6)
            assert await instance.stop() == 0
            await crowd.going_on(6)
            await instance.start()


# ── the tests' own parts ──


@pytest.mark.parametrize(
    ("end", "ended_at", "replaced_at", "harm"),
    [
        (End.SENT, 15.0, None, ""),
        (End.SENT, 5.0, None, "sent while connected"),
        (End.RAN_OUT, 5.0, None, "ran_out while connected"),
        (End.RAN_OUT, 15.0, None, "nobody sent it"),
        (End.CANCELLED, 15.0, None, "cancelled, and nothing took its place"),
        (End.SENT, 12.0, 11.0, ""),
        (End.SENT, 19.0, 11.0, "sent 8.0 s after the person had come back"),
    ],
)
def test_what_counts_as_harm(end: End, ended_at: float, replaced_at: float | None, harm: str) -> None:
    """That the tests above can fail: somebody was in the call from 0 to 10."""
    event = DelayedEvent("syd_x", "@a:hs.test", "!r", "m", "", {}, 60.0, 0.0, 0.0, end=end, ended_at=ended_at, ended_by="127.0.0.1")
    found = harms_of([Stay("a", "call", event, "", "dlg_x", left_at=10.0, replaced_at=replaced_at)])
    assert [what for _, what in found] == [harm] * bool(harm)
