"""A database that is full, locked, damaged or hung, on the real file; and what hangs beside it: nothing stalls that does not need it."""

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from sfu_delegate.daemon.serve import CannotStart, Daemon
from sfu_delegate.engine import Step
from sfu_delegate.sandbox.homeserver import End
from sfu_delegate.store.sqlite import SqliteStore

from tests.integration.daemon import GENEROUS, SERVER, Answer, Participant, Site, merged, open_site, until

Work = Callable[[sqlite3.Connection], Any]


async def in_database(site: Site, work: Work) -> Any:
    """Do something with the daemon's own connection, in the thread that has it."""
    store = site.daemon.engine.store
    assert isinstance(store, SqliteStore)
    return await site.daemon.inbox.in_thread(lambda: work(store._connection))


def pragma(statement: str) -> Work:
    """To be run by `in_database`."""
    return lambda connection: connection.execute(f"PRAGMA {statement}").fetchone()


async def readiness(site: Site, status: int, *words: str) -> None:
    """Wait until readiness has this status and says these words about the database."""
    last = ""

    async def so() -> bool:
        nonlocal last
        ready = await site.admin("/health/ready")
        last = f"{ready.status} {ready.body['database']}"
        return ready.status == status and all(word in ready.body["database"] for word in words)

    try:
        await until(so, "readiness")
    except AssertionError as error:
        raise AssertionError(f"readiness stays {last}") from error


async def refused_webhooks(site: Site) -> float:
    """How many webhooks were answered 503 because nothing could be kept."""
    return await site.count("sfu_delegate_webhooks_total", sfu="main", result="unavailable")


async def alive(site: Site) -> None:
    """What needs no database answers."""
    async with asyncio.timeout(20):
        assert (await site.admin("/health/live")).status == 200
        assert await site.count("sfu_delegate_build_info") == 1


async def a_departure_is_refused(site: Site, who: Participant) -> None:
    """It leaves, and the SFU is told to try again."""
    before = await refused_webhooks(site)
    await site.leave(who, "PARTICIPANT_REMOVED")

    async def refused() -> bool:
        return await refused_webhooks(site) > before

    await until(refused, "the webhook is answered 503")


# ── full ──


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB that can really be full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all the space that is left; returns the file that holds it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


async def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    """503 with the reason and the remedy, and nothing half kept; when there is space again it goes on by itself, where it was."""
    async with open_site(small_disk) as site:
        alice, bob = await site.participant(), await site.participant("bob")
        given, other = await site.in_call(alice), await site.in_call(bob)
        await in_database(site, pragma("wal_checkpoint(TRUNCATE)"))  # or there would be space in the log
        ballast = fill(small_disk)
        carol = await site.participant("carol")
        answer = await site.delegate(carol)
        assert (answer.status, answer.body["errcode"]) == (503, "M_UNKNOWN")
        assert int(answer.headers["Retry-After"]) >= 1
        await a_departure_is_refused(site, alice)
        await readiness(site, 503, "full", "free some space")
        await alive(site)
        assert await site.count("sfu_delegate_database_works") == 0
        assert site.event(alice).end is End.PENDING
        ballast.unlink()
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]
        await readiness(site, 200)
        assert await site.count("sfu_delegate_database_works") == 1
        assert (await site.show(other))["participant"]["presence"] == "connected"
        assert (await site.delegate(carol)).status == 201
        assert [len(site.lines(event)) for event in ("database_failed", "database_works_again")] == [1, 1]


async def test_what_was_answered_201_is_there_after_the_disk_was_full(tmp_path: Path) -> None:
    """The file may not grow in the middle of many delegations: each answer is true, before and after."""
    async with open_site(tmp_path, delegations={"verify_timeout": "0s"}) as site:
        pages = (await in_database(site, pragma("page_count")))[0]
        await in_database(site, pragma(f"max_page_count = {pages + 1}"))
        people: list[Participant] = []
        answers: list[Answer] = []
        while [answer.status for answer in answers].count(503) < 3:
            people.append(await site.participant(f"p{len(people)}", f"call{len(people) % 5}"))
            answers.append(await site.delegate(people[-1]))
            assert len(answers) < 90, "it is never full"
        assert answers[0].status == 201
        await in_database(site, pragma(f"max_page_count = {pages + 10_000}"))
        await readiness(site, 200)
        for who, answer in zip(people, answers, strict=True):
            if answer.status == 503:
                answer = await site.delegate(who)
                assert answer.status == 201, answer.text
            shown = await site.show(answer.body)
            assert shown["participant"]["identity"] == who.identity
            assert len(shown["delayed_events"]) == 1
            await site.restarted(who)
        assert await site.count("sfu_delegate_delegated_events", state="live") == len(people)


async def test_what_a_homeserver_did_while_the_disk_was_full_is_not_forgotten(small_disk: Path) -> None:
    """The answer to a send comes when nothing can be kept: it is kept later, and nothing is sent twice."""
    async with open_site(small_disk) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        model = site.homeserver.model
        model.faults.latency = {"send": 1.0}
        await site.leave(alice, "PARTICIPANT_REMOVED")
        await until(lambda: model.answers["send", 200] == 1, "the request arrives")
        await in_database(site, pragma("wal_checkpoint(TRUNCATE)"))
        ballast = fill(small_disk)

        async def answered() -> bool:
            return await site.count("sfu_delegate_actions_total", action="send", outcome="done") == 1

        await until(answered, "the answer comes")
        assert (await site.delegate(await site.participant("bob"))).status == 503
        ballast.unlink()
        assert await site.outcomes(given) == ["sent"]
        assert {kind: count for kind, count in model.answers.items() if kind[0] == "send"} == {("send", 200): 1}


# ── locked ──


async def impatient(site: Site, seconds: float) -> None:
    """The daemon waits only so long for a lock, so that a test is short."""
    await in_database(site, pragma(f"busy_timeout = {round(seconds * 1000)}"))


@contextmanager
def locked(site: Site) -> Iterator[None]:
    """Somebody else writes to the database and does not come to an end."""
    other = sqlite3.connect(site.file, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
    finally:
        other.close()


async def test_a_locked_database(tmp_path: Path) -> None:
    """503 for clients and webhooks, the reason and the remedy in readiness; it goes on by itself when the lock is gone."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        await impatient(site, 0.2)
        with locked(site):
            await alive(site)
            answer = await site.delegate(await site.participant("bob"))
            assert (answer.status, answer.body["errcode"]) == (503, "M_UNKNOWN")
            await a_departure_is_refused(site, alice)
            await readiness(site, 503, "Another process holds it", "goes on by itself")
            await alive(site)
            assert site.event(alice).end is End.PENDING
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]
        await readiness(site, 200)
        assert [len(site.lines(event)) for event in ("database_failed", "database_works_again")] == [1, 1]


async def test_a_connected_participant_outlives_an_outage_of_the_database(tmp_path: Path) -> None:
    """Nothing can be kept for longer than the delay: who is connected is restarted all the same, and then everything goes on."""
    async with open_site(tmp_path, restart={"at": 0.4, "spread": 0.05}) as site:
        alice, bob = await site.participant(delay_ms=3000), await site.participant("bob", delay_ms=60_000)
        given, other = await site.in_call(alice), await site.in_call(bob)
        await impatient(site, 0.1)
        with locked(site):
            await site.restarted(alice, len(site.event(alice).restarted_at) + 3)
            assert (await site.admin("/health/ready")).status == 503
        assert site.event(alice).end is End.PENDING
        await readiness(site, 200)
        await site.restarted(alice, len(site.event(alice).restarted_at) + 2)
        for who, one in ((alice, given), (bob, other)):
            await site.leave(who)
            await site.ended(who)
            assert await site.outcomes(one) == ["sent"]
        assert await site.count("sfu_delegate_events_lost_while_connected_total") == 0


async def test_readiness_knows_why_a_locked_database_does_not_answer_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks has less patience than the database: the reason that is known already is told all the same, and so are the other conditions."""
    monkeypatch.setattr("sfu_delegate.api.health.READY_TIMEOUT", 0.3)
    async with open_site(tmp_path) as site:
        await impatient(site, 2.0)
        with locked(site):
            assert (await site.delegate(await site.participant())).status == 503
            ready = await site.admin("/health/ready")
            assert ready.status == 503
            assert "Another process holds it" in ready.body["database"]
            assert ready.body["homeservers"].keys() == {SERVER}
        await readiness(site, 200)


async def test_a_stop_ends_though_the_database_is_locked(tmp_path: Path) -> None:
    """What a homeserver answered meanwhile cannot be kept; the next start finds what had been acknowledged, and finds out about the rest."""
    async with open_site(tmp_path, timeouts={"shutdown": "500ms"}) as site:
        alice, bob = await site.participant(), await site.participant("bob")
        given, other = await site.in_call(alice), await site.in_call(bob)
        await impatient(site, 0.2)
        model = site.homeserver.model
        model.faults.latency = {"send": 0.3}
        await site.leave(alice, "PARTICIPANT_REMOVED")
        await until(lambda: model.answers["send", 200] == 1, "the request arrives")
        with locked(site):
            async with asyncio.timeout(30):
                await site.stop()
            assert site.lines("not_everything_kept")
        await site.start()
        assert await site.outcomes(given) == ["sent"]
        assert (await site.show(other))["participant"]["presence"] == "connected"


async def test_a_start_with_a_locked_database(tmp_path: Path) -> None:
    """A sentence with the reason, and the next try works."""
    async with open_site(tmp_path) as site:
        given = await site.delegated(await site.participant())
        await site.stop()
        with locked(site), pytest.raises(CannotStart, match="Another process holds it"):
            await Daemon(site.config()).start()
        await site.start()
        assert (await site.show(given))["state"] == "live"


# ── damaged ──


PAGE = 4096  # bytes


def overwrite(path: Path, begin: int, end: int | None = None) -> None:
    """Bytes that mean nothing in place of those of the file."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(b"\xa5" * ((size if end is None else end) - begin))


def overwrite_page_of(path: Path, table: str) -> None:
    """The first page of a table or an index."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as reader:
        (page,) = reader.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    reader.close()
    overwrite(path, (page - 1) * PAGE, page * PAGE)


async def damage(site: Site, how: Callable[[], None]) -> None:
    """Do it while the daemon runs, so that it can see it."""

    def unwritten(connection: sqlite3.Connection) -> None:
        # What is in its memory, or in the log, could not be damaged in the file.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        how()
        connection.execute("PRAGMA shrink_memory").fetchall()

    await in_database(site, unwritten)


async def test_a_database_that_is_damaged_while_it_is_used(tmp_path: Path) -> None:
    """503 with the way to restore, for as long as it takes; with a backup in its place, everybody in it is taken care of again."""
    async with open_site(tmp_path, timeouts={"shutdown": "200ms"}) as site:
        alice, bob = await site.participant(), await site.participant("bob")
        given, other = await site.in_call(alice), await site.in_call(bob)
        backup = tmp_path / "backup.db"
        with sqlite3.connect(f"file:{site.file}?mode=ro", uri=True) as source, sqlite3.connect(backup) as target:
            source.backup(target)
        source.close()
        target.close()
        await damage(site, lambda: overwrite(site.file, PAGE))
        assert (await site.delegate(await site.participant("carol"))).status == 503
        await a_departure_is_refused(site, alice)
        await readiness(site, 503, "damaged", "restore the last backup")
        await alive(site)
        assert site.event(alice).end is End.PENDING
        await site.stop()
        for name in ("", "-wal", "-shm"):
            site.file.with_name(site.file.name + name).unlink(missing_ok=True)
        os.replace(backup, site.file)
        await site.start()
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]
        assert (await site.show(other))["participant"]["presence"] == "connected"
        assert len(site.lines("database_failed")) == 1


@pytest.mark.parametrize("index", [pytest.param("ix_delayed_event_alias", marks=pytest.mark.slow), "ix_delayed_event_delegation"])
async def test_a_database_that_is_damaged_in_part_is_not_taken_for_a_sound_one(tmp_path: Path, index: str) -> None:
    """What does not need the damaged part would still work: one good transaction does not mean that all is well, and is no news each time."""
    async with open_site(tmp_path, timeouts={"shutdown": "200ms"}) as site:
        given = await site.in_call(await site.participant())
        await damage(site, lambda: overwrite_page_of(site.file, index))
        for n in range(2):
            assert (await site.delegate(await site.participant(f"p{n}"))).status == 503
            await site.ask("GET", f"/v1/delegations/{given['id']}", token=given["management_token"])
            ready = await site.admin("/health/ready")
            assert ready.status == 503
            assert "damaged" in ready.body["database"]
        assert len(site.lines("database_failed")) == 1


TABLES = ("schema_version", "meta", "delayed_event", "room", "ix_delayed_event_schedule")


@pytest.mark.parametrize("part", ["head", "first page", "all but the first page", "end", "a text", *TABLES])
async def test_a_start_with_a_damaged_database(tmp_path: Path, part: str) -> None:
    """A sentence with the remedy, no traceback; and no empty database in its place, for whoever wants to rescue something."""
    async with open_site(tmp_path) as site:
        await site.delegated(await site.participant())
        await site.stop()
        match part:
            case "head":
                overwrite(site.file, 0, 16)
            case "first page":
                overwrite(site.file, 100, PAGE)
            case "all but the first page":
                overwrite(site.file, PAGE)
            case "end":
                with site.file.open("r+b") as file:
                    file.truncate(3 * PAGE)
            case "a text":
                site.file.write_text("Delegations are elsewhere.\n" * 400)
            case table:
                overwrite_page_of(site.file, table)
        size = site.file.stat().st_size
        with pytest.raises(CannotStart, match=r"stop the daemon, restore the last backup|check the key `database`"):
            await Daemon(site.config()).start()
        assert site.file.stat().st_size >= size


# ── hung ──


@asynccontextmanager
async def hung_database(site: Site) -> AsyncIterator[None]:
    """The database does not come back from what it is asked, as on a network file system without its server."""
    goes_on = threading.Event()
    reached = threading.Event()

    def wait() -> int:
        reached.set()
        goes_on.wait()
        return 0

    await in_database(site, lambda connection: connection.set_progress_handler(wait, 1))
    try:
        yield
        assert reached.is_set(), "nobody asked it anything"
    finally:
        goes_on.set()
        if site.running:
            await in_database(site, lambda connection: connection.set_progress_handler(None, 0))


async def test_a_hung_database_stalls_nothing_that_does_not_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liveness and metrics answer, readiness says that the database does not; nothing is acknowledged before it is kept."""
    monkeypatch.setattr("sfu_delegate.api.health.READY_TIMEOUT", 0.2)
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        stored = await site.count("sfu_delegate_webhooks_total", result="stored")
        async with hung_database(site):
            await site.leave(alice, "PARTICIPANT_REMOVED")
            await readiness(site, 503, "does not answer")
            for _ in range(3):
                await alive(site)
            assert await site.count("sfu_delegate_webhooks_total", result="stored") == stored
            assert site.event(alice).end is End.PENDING
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]
        await readiness(site, 200)


async def test_a_watchdog_lets_a_daemon_live_whose_database_hangs(tmp_path: Path) -> None:
    """A new process would hang there, too. It is told which of the two it is; nothing is logged as a defect."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        await site.in_call(alice)
        async with hung_database(site):
            await site.leave(alice, "PARTICIPANT_REMOVED")
            await until(lambda: "sfu_delegate.store" in "".join(site.daemon.inbox.where), "a step is in the database")
            assert all(site.daemon.alive(10.0) for _ in range(100))
        await site.ended(alice)
        assert not site.lines("no_progress")


async def test_a_watchdog_ends_a_daemon_whose_engine_is_stuck(tmp_path: Path) -> None:
    """A step that never ends for a reason of our own: no more signs of life, a line in the log that says where it is, and the status says it, too."""
    go_on = threading.Event()
    async with open_site(tmp_path) as site:
        engine = site.daemon.engine
        step = engine.step

        def stuck(*given: Any, **more: Any) -> Step:
            assert go_on.wait(GENEROUS)
            return step(*given, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "step", stuck)
            await until(lambda: any(at.endswith(" stuck") for at in site.daemon.inbox.where), "a step is stuck")
            site.daemon.alive(0.0)  # whatever ended before that
            assert [site.daemon.alive(10.0) for _ in range(4)] == [True, False, False, False]
            assert "NO PROGRESS, in sfu_delegate.daemon.inbox" in site.daemon.status()
            go_on.set()
        await until(lambda: site.daemon.alive(0.0), "a step has ended")
        [line] = site.lines("no_progress")
        assert any(at.endswith(" stuck") for at in line["at"])
        assert "PROGRESS" not in site.daemon.status()


async def test_nobody_waits_for_a_hung_database_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 for clients and webhooks, told once; and the daemon can be stopped, with everything that had been acknowledged."""
    monkeypatch.setattr("sfu_delegate.daemon.inbox.PATIENCE", 0.2)
    monkeypatch.setattr("sfu_delegate.daemon.serve.KEPT_WITHIN", 0.2)
    monkeypatch.setattr("sfu_delegate.daemon.serve.CLOSED_WITHIN", 0.2)
    async with open_site(tmp_path, timeouts={"shutdown": "200ms"}) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        async with hung_database(site):
            answer = await site.delegate(await site.participant("bob"))
            assert (answer.status, answer.body["errcode"]) == (503, "M_UNKNOWN")
            await a_departure_is_refused(site, alice)
            assert len(site.lines("database_failed")) == 1
            async with asyncio.timeout(GENEROUS):
                await site.stop()
            assert site.lines("stopped")[-1]["database_closed"] is False
        await asyncio.to_thread(site.daemon.inbox._thread.join)  # now it can be closed
        await site.start()
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]


HANGING = """
import sys, threading
from pathlib import Path
from sfu_delegate import cli
from sfu_delegate.api import health
from sfu_delegate.daemon import serve
from sfu_delegate.store.sqlite import SqliteStore

works = SqliteStore.atomically

def atomically(store, work, **more):
    if Path(store.path + ".hangs").exists():
        threading.Event().wait()
    return works(store, work, **more)

SqliteStore.atomically = atomically
serve.FORCED_AFTER = 0.5
health.READY_TIMEOUT = 0.2
cli.app()
"""


@pytest.mark.parametrize("when", ["at the start", "later"])
async def test_a_process_ends_though_its_database_hangs_for_ever(tmp_path: Path, when: str) -> None:
    """After SIGTERM nobody needs to kill it; the log says why its exit code is 1."""
    async with open_site(tmp_path, started=False, timeouts={"shutdown": "100ms"}) as site:
        file, hangs = tmp_path / "sfu-delegate.yaml", site.file.with_name(site.file.name + ".hangs")
        file.touch(mode=0o600)
        file.write_text(yaml.safe_dump(merged(site.mapping(), {"log": {"format": "json", "level": "debug"}})))
        if when == "at the start":
            hangs.touch()
        command = (sys.executable, "-c", HANGING, "serve", "--config", str(file))
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        try:
            assert process.stderr is not None
            async with asyncio.timeout(GENEROUS):
                if when == "later":
                    while b'"listening"' not in (line := await process.stderr.readline()):
                        pass
                    hangs.touch()
                    async with site.http.get(f"http://{json.loads(line)['admin']}/health/ready") as ready:
                        assert "does not answer" in (await ready.json())["database"]
                else:
                    await until((tmp_path / f"{site.file.name}-wal").exists, "the database is opened")
                process.terminate()
                _, log = await process.communicate()
            assert process.returncode == 1
            assert b'"stop_forced"' in log
        finally:
            if process.returncode is None:
                process.kill()


@pytest.mark.usefixtures("database")
async def test_a_hung_sfu_stalls_nothing_that_does_not_need_it(tmp_path: Path) -> None:
    """It answers no look: who was removed is told of at once, who stays is restarted, and who delegates is verified."""
    changes: dict[str, Any] = {
        "sfus": {"main": {"request_timeout": "20s"}},
        "actions": {"lease": "40s"},
        "timeouts": {"shutdown": "200ms"},
    }
    async with open_site(tmp_path, **changes) as site:
        alice, bob = await site.participant(), await site.participant("bob", delay_ms=2000)
        given, other = await site.in_call(alice), await site.in_call(bob)
        site.sfu.model.faults.hang = True
        looks = site.sfu.model.calls["ListParticipants"]
        waiting = [await site.delegated(await site.participant(f"p{n}", f"waits{n}")) for n in range(8)]
        await until(lambda: site.sfu.model.calls["ListParticipants"] > looks, "it is asked")
        await site.leave(alice, "PARTICIPANT_REMOVED")
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]
        await site.restarted(bob, len(site.event(bob).restarted_at) + 2)
        assert await site.count("sfu_delegate_looks_total") == await site.count("sfu_delegate_looks_total", outcome="done")
        site.sfu.model.faults.hang = False
        assert (await site.show(other))["participant"]["presence"] == "connected"
        assert {(await site.show(one))["state"] for one in waiting} == {"live"}


@pytest.mark.usefixtures("database")
async def test_a_departure_that_a_look_was_to_check_is_not_forgotten_when_the_sfu_hangs(tmp_path: Path) -> None:
    """`CLIENT_INITIATED`: when the SFU cannot be asked, it is over. The others of its room count as connected."""
    async with open_site(tmp_path, sfus={"main": {"request_timeout": "300ms"}}) as site:
        alice, bob = await site.participant(), await site.participant("bob")
        given, other = await site.in_call(alice), await site.in_call(bob)
        site.sfu.model.faults.hang = True
        await site.leave(alice, "CLIENT_INITIATED")
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]
        assert (await site.show(other))["participant"]["presence"] == "connected"
        assert site.event(bob).end is End.PENDING
        site.sfu.model.faults.hang = False
