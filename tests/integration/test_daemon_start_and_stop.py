"""Stopping, starting again, being killed, and refusing to start: nothing that was acknowledged is lost."""

import asyncio
import os
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from sfu_delegate.daemon.serve import CannotStart, Daemon
from sfu_delegate.sandbox.homeserver import End, HomeserverModel
from sfu_delegate.sealing import new_key
from sfu_delegate.store.sqlite import SqliteStore

from tests import stores
from tests.integration.daemon import GENEROUS, SERVER, Participant, Site, merged, open_site, until
from tests.integration.databases import SqliteDatabase
from tests.integration.element_call import Call, ElementCall, Mode
from tests.manager import Manager

pytestmark = pytest.mark.usefixtures("database")

# ── in this process ──


async def test_a_stop_finishes_what_is_in_flight_and_takes_nothing_new(tmp_path: Path) -> None:
    """While it stops: 503 with `Retry-After` for clients and webhooks. The send under way is finished, and its outcome kept."""
    async with open_site(tmp_path) as site:
        model = site.homeserver.model
        alice, bob = await site.participant(), await site.participant("bob")
        given, other = await site.in_call(alice), await site.in_call(bob)
        model.faults.latency = {"send": 1.0}
        await site.leave(alice, "PARTICIPANT_REMOVED")
        await until(lambda: model.answers["send", 200] == 1, "the request arrives")
        stopping = asyncio.create_task(site.stop())
        await until(lambda: site.lines("stopping"), "it begins to stop")
        carol = await site.participant("carol")
        for answer in (
            await site.delegate(carol),
            await site.ask("GET", f"/v1/delegations/{given['id']}", token=given["management_token"]),
            await site.ask("DELETE", f"/v1/delegations/{given['id']}", token=given["management_token"]),
        ):
            assert (answer.status, answer.body["errcode"]) == (503, "M_UNKNOWN")
            assert int(answer.headers["Retry-After"]) >= 1
        ready = await site.admin("/health/ready")
        assert (ready.status, ready.body["phase"]) == (503, "stopping")
        await site.leave(bob, "PARTICIPANT_REMOVED")
        assert not stopping.done()
        await stopping
        assert site.lines("stopped")[0]["abandoned"] == 0
        found = dict(site.database.query("SELECT identity, outcome FROM delayed_event"))
        assert found == {"alice": "sent", "bob": ""}
        await site.start()
        assert await site.outcomes(given) == ["sent"]
        await site.ended(bob)  # LiveKit repeats the webhook that was answered 503
        assert await site.outcomes(other) == ["sent"]
        assert model.answers["send", 404] == 0


async def test_a_client_that_waits_during_a_stop_gets_its_answer(tmp_path: Path) -> None:
    """A delegation whose verification is under way is answered 201 before the daemon ends."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        site.homeserver.model.faults.latency = {"restart": 0.5}
        asked = asyncio.create_task(site.delegate(alice))
        await until(lambda: site.homeserver.model.answers["restart", 200] == 1, "the request arrives")
        await site.stop()
        answer = await asked
        assert answer.status == 201
        assert answer.body["verified"] is True
        await site.start()
        assert (await site.show(answer.body))["verified"] is True


async def test_a_stop_does_not_wait_for_ever(tmp_path: Path) -> None:
    """What a homeserver does not answer within `timeouts.shutdown` is abandoned, and taken up at the next start."""
    async with open_site(tmp_path, timeouts={"shutdown": "200ms"}) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        site.homeserver.model.faults.hang = True
        await site.leave(alice, "PARTICIPANT_REMOVED")
        await until(lambda: site.homeserver.model.answers["send", 0] == 1, "the request arrives")
        await site.stop()
        assert site.lines("stopped")[0]["abandoned"] == 1
        site.homeserver.model.faults.hang = False
        await site.start()
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]


async def test_an_abandoned_send_that_got_through_counts_as_sent(tmp_path: Path) -> None:
    """The answer was never heard, and the next start is told 404: it was our own doing."""
    async with open_site(tmp_path, timeouts={"shutdown": "200ms"}) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        site.homeserver.model.faults.done_and_hangs = True
        await site.leave(alice, "PARTICIPANT_REMOVED")
        await site.ended(alice)
        await site.stop()
        site.homeserver.model.faults.done_and_hangs = False
        await site.start()
        assert await site.outcomes(given) == ["sent"]


async def test_a_stop_ends_though_the_database_does_not_work(tmp_path: Path) -> None:
    """What cannot be kept cannot hold up the stop."""
    async with open_site(tmp_path, timeouts={"shutdown": "200ms"}) as site:
        alice = await site.participant()
        await site.in_call(alice)
        model = site.homeserver.model
        model.faults.latency = {"send": 0.3}
        await site.leave(alice, "PARTICIPANT_REMOVED")
        await until(lambda: model.answers["send", 200] == 1, "the request arrives")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(site.daemon.engine.store, "atomically", _full)
            await site.stop()
        assert site.lines("stopped")


async def test_a_slow_client_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """A connection whose request never becomes whole is cut off when the time of the shutdown is over."""
    async with open_site(tmp_path, timeouts={"shutdown": "200ms"}) as site:
        alice = await site.participant()
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        head = f"POST /v1/delegations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {alice.token}\r\nContent-Length: 100\r\n\r\n{{"
        writer.write(head.encode())
        await writer.drain()
        await site.delegated(alice)  # the one before has certainly been read by now
        async with asyncio.timeout(15):
            await site.stop()
        writer.close()
        assert b"200" not in await reader.read()


def _full(_: object) -> Any:
    raise sqlite3.OperationalError("database or disk is full")


async def test_a_start_goes_on_where_the_last_run_ended(tmp_path: Path) -> None:
    """Connected people stay connected, and the countdown goes on: restarted in time, and sent when they leave."""
    async with open_site(tmp_path) as site:
        alice = await site.participant(delay_ms=2000)
        given = await site.in_call(alice)
        await site.stop()
        before = len(site.event(alice).restarted_at)
        await site.start()
        assert (await site.show(given))["participant"]["presence"] == "connected"
        await site.restarted(alice, before + 1)
        await site.leave(alice)
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]


async def test_a_departure_during_the_downtime_is_heard_afterwards(tmp_path: Path) -> None:
    """LiveKit tries again for 15 seconds: a restart of the daemon loses nothing."""
    async with open_site(tmp_path) as site:
        alice, bob = await site.participant(), await site.participant("bob", "other")
        given, other = await site.in_call(alice), await site.in_call(bob)
        await site.stop()
        await site.leave(alice)
        await site.leave(bob)
        await site.join(bob)
        await until(lambda: site.sfu.deliveries == 0 and site.sfu.model.backlog() > 0, "the first try fails")
        await site.start()
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]
        await until(lambda: site.sfu.model.backlog() == 0, "all webhooks are delivered")
        await site.present(other, "connected")
        assert site.event(bob).end is End.PENDING


async def test_the_management_token_outlives_a_restart(tmp_path: Path) -> None:
    """So does the key that it is made from."""
    async with open_site(tmp_path) as site:
        given = await site.delegated(await site.participant())
        await site.stop()
        await site.start()
        assert (await site.show(given))["id"] == given["id"]


async def test_other_keys_than_before_are_told(tmp_path: Path) -> None:
    """Without them tokens of before are good for nothing. A new one in front of the old one is all right."""
    first, second, third = (new_key() for _ in range(3))
    async with open_site(tmp_path) as site:
        told = []
        for keys in ([first], [second, first], [second], [third], [third]):
            await site.stop()
            begin = len(site.log.getvalue())
            site.changes = {"encryption": {"keys": keys}}
            site.secrets |= set(keys)
            await site.start()
            told.append('"encryption_keys_differ"' in site.log.getvalue()[begin:])
        assert told == [True, False, False, True, False]  # the first one, too: it began with one of its own


@stores.only_sqlite
async def test_its_own_key_is_for_the_daemon_s_eyes_only(tmp_path: Path) -> None:
    """It is kept beside the file."""
    async with open_site(tmp_path) as site:
        assert isinstance(site.database, SqliteDatabase)
        assert site.database.key_file.stat().st_mode & 0o077 == 0


# ── reading the configuration again ──


async def test_a_reload_takes_over_what_can_be_changed(tmp_path: Path) -> None:
    """New keys, new homeservers, other limits: from the next request on, without a restart. What needs one is named in the log."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        assert (await site.delegate(await site.participant("bob"), homeserver="second.test")).status == 403
        site.changes = {
            "homeservers": [{"name": SERVER, "url": site.homeserver.url}, {"name": "second.test", "url": site.homeserver.url}],
            "delegations": {"max_delay": "50s"},
            "log": {"level": "warning"},
            "admin": {"port": 1},
        }
        site.daemon.reload()
        assert "admin.port" in site.lines("config_reloaded")[0]["needs_restart"]  # told whatever the level is
        told = len(site.lines("delegation"))
        assert await site.count("sfu_delegate_config_reloads_total", result="done") == 1
        assert (await site.delegate(await site.participant("carol"), homeserver="second.test")).status == 201
        assert (await site.delegate(await site.participant("dave", delay_ms=60_000))).status == 400
        assert (await site.admin("/health/live")).status == 200  # still where it was
        await site.leave(alice)
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]
        assert len(site.lines("delegation")) == told


async def test_a_bad_file_leaves_the_old_configuration_in_force(tmp_path: Path) -> None:
    """Each problem is logged, and everything goes on as before."""
    async with open_site(tmp_path) as site:
        alice = await site.participant()
        given = await site.in_call(alice)
        bad: list[dict[str, Any]] = [{"homeservers": []}, {"no_such_key": 1}, {"sfus": {"main": {"keys": {"devkey": 17}}}}]
        for changes in bad:
            site.changes = changes
            site.daemon.reload()
        assert await site.count("sfu_delegate_config_reloads_total", result="refused") == 3
        assert len(site.lines("config_not_reloaded")) == 3
        assert "homeservers" in site.lines("config_problem")[0]["problem"]
        site.changes = {}
        await site.delegated(await site.participant("bob"))
        await site.leave(alice)
        await site.ended(alice)
        assert await site.outcomes(given) == ["sent"]


async def test_a_key_that_was_removed_is_not_accepted_any_more(tmp_path: Path) -> None:
    """Rotation of the SFU's keys: the old one until the reload, the new one from then on."""
    new_secret = "the-new-secret-of-the-sfu-that-nobody-may-see"
    async with open_site(tmp_path) as site:
        site.secrets.add(new_secret)
        alice = await site.participant()
        await site.delegated(alice)
        site.changes = {"sfus": {"main": {"keys": {"newkey": new_secret}, "api_key": "newkey"}}}
        mapping = site.mapping()
        del mapping["sfus"]["main"]["keys"]["devkey"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Site, "mapping", lambda _: mapping)
            site.daemon.reload()
        answer = await site.delegate(alice)
        assert (answer.status, answer.body["errcode"]) == (401, "M_UNKNOWN_TOKEN")


# ── what keeps it from starting ──


@stores.only_sqlite
async def test_a_database_of_another_process_is_not_opened(tmp_path: Path) -> None:
    """Two daemons on one embedded database would tear it apart: the second one says so, and the first one goes on."""
    async with open_site(tmp_path) as site:
        given = await site.delegated(await site.participant())
        with pytest.raises(CannotStart, match="in use by another process"):
            await Daemon(site.config()).start()
        assert (await site.show(given))["state"] == "live"


async def test_a_failed_start_lets_go_of_the_database(tmp_path: Path) -> None:
    """The port is in use: the sentence names the key to change, and the database can be opened by the next one."""
    async with open_site(tmp_path, started=False) as site:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            site.port = taken.getsockname()[1]
            with pytest.raises(CannotStart, match=r"Cannot listen on 127\.0\.0\.1:\d+.*listen\.port"):
                await Daemon(site.config()).start()
            site.port, site.changes = 0, {"admin": {"port": taken.getsockname()[1]}}
            with pytest.raises(CannotStart, match=r"admin\.port"):
                await Daemon(site.config()).start()
        site.changes = {}
        await site.start()


@stores.only_sqlite
@pytest.mark.parametrize("problem", ["key_file", "directory"])
async def test_what_is_wrong_outside_of_the_file_is_a_sentence_too(tmp_path: Path, problem: str) -> None:
    """No traceback for an operator's mistake."""
    async with open_site(tmp_path, started=False) as site:
        match problem:
            case "key_file":
                site.file.with_name(f"{site.file.name}.key").write_text("not a key")
            case _:
                site.changes = {"database": f"sqlite:///{tmp_path}/not/there.db"}
        with pytest.raises(CannotStart):
            await Daemon(site.config()).start()


# ── as a process ──


class Process:
    """`sfu-delegate serve` as operators run it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.file = site.directory / "sfu-delegate.yaml"
        self.stderr: list[dict[str, Any]] = []
        self.environ: dict[str, str] = {}  # beside what is there
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    def write(self, **changes: Any) -> None:
        """Write the configuration file."""
        self.file.touch(mode=0o600)
        self.file.write_text(yaml.safe_dump(merged(self.site.mapping(), {"log": {"format": "json", "level": "debug"}}, changes)))

    async def begin(self) -> None:
        """Start it; whether it can start is another question."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("SFU_DELEGATE_")}
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sfu_delegate.cli", "serve", "--config", str(self.file)),
            stderr=asyncio.subprocess.PIPE,
            env=environ | self.environ,
        )
        self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            self.site.log.write(line.decode())
            self.stderr.append(yaml.safe_load(line) if line.startswith(b"{") else {"event": "?", "text": line.decode()})

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        already = len(self.lines("listening"))
        await self.begin()
        await until(lambda: len(self.lines("listening")) > already or self.ended, "it listens")
        self.site.port = int(self.lines("listening")[-1]["public"].rpartition(":")[2])
        self.site.sfu.model.urls = [f"{self.site.url}/webhooks/livekit"]

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The lines of its log about one event."""
        return [line for line in self.stderr if line["event"] == event]

    @property
    def ended(self) -> bool:
        """Has it ended?"""
        return self._process is not None and self._process.returncode is not None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def exit_code(self) -> int:
        """Wait for its end."""
        assert self._process is not None
        assert self._reader is not None
        async with asyncio.timeout(GENEROUS):
            code = await self._process.wait()
            await self._reader
        return code

    async def close(self) -> None:
        """End it, if it has not."""
        if self._process is not None and not self.ended:
            self._process.kill()
            await self.exit_code()


@asynccontextmanager
async def open_process(directory: Path, **changes: Any) -> AsyncIterator[tuple[Site, Process]]:
    """A daemon as a process of its own, not yet started."""
    model = HomeserverModel(SERVER, seed=1, limit=None, max_scheduled=10_000)
    async with open_site(directory, started=False, homeserver=model, **changes) as site:
        process = Process(site)
        try:
            yield site, process
        finally:
            await process.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """Who has started the daemon, and listens."""
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.close()


@stores.only_sqlite
async def test_a_service_manager_is_told_how_it_goes(tmp_path: Path, manager: Manager) -> None:
    """Ready when both listeners answer and not before, alive, reloading and ready again, whether the file is good or not, and stopping."""

    def heard(name: str) -> int:
        return sum(name in told for told in manager.hear())

    async with open_process(tmp_path, timeouts={"shutdown": "100s"}) as (site, process):
        process.environ = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "600000"}
        process.write()
        await process.begin()
        await until(lambda: heard("READY") or process.ended, "it is ready")
        assert manager.told[-1] in ({"READY": "1"}, {"WATCHDOG": "1"}) or "STATUS" in manager.told[-1]
        assert {"STATUS", "EXTEND_TIMEOUT_USEC"} <= {name for told in manager.told for name in told}
        listening = process.lines("listening")
        for listener, path in (("public", "/healthz"), ("admin", "/health/live")):
            assert (await site.http.get(f"http://{listening[0][listener]}{path}")).status == 200
        await until(lambda: heard("WATCHDOG") >= 2, "it is alive")
        for text in ("sfus: [", process.file.read_text()):
            process.file.write_text(text)
            before = len(manager.told)
            process.signal(signal.SIGHUP)
            await until(lambda before=before: {"READY": "1"} in manager.hear()[before:], "it has read its configuration")  # type: ignore[misc]
            reload = [told for told in manager.told[before:] if "RELOADING" in told or "READY" in told]
            assert [sorted(told) for told in reload] == [["MONOTONIC_USEC", "RELOADING"], ["READY"]]
        assert (len(process.lines("config_not_reloaded")), len(process.lines("config_reloaded"))) == (1, 1)
        process.signal(signal.SIGTERM)
        assert await process.exit_code() == 0
        [stopping] = [told for told in manager.hear() if "STOPPING" in told]
        assert int(stopping["EXTEND_TIMEOUT_USEC"]) > 100e6


@stores.only_sqlite
async def test_a_service_manager_is_told_why_it_cannot_start(tmp_path: Path, manager: Manager) -> None:
    """The sentence is the one of the log, and it is never ready."""
    async with open_process(tmp_path) as (_, process):
        process.environ = {"NOTIFY_SOCKET": manager.name}
        process.write(database=f"sqlite:///{tmp_path}/not/there.db")
        await process.begin()
        assert await process.exit_code() == 1
        assert manager.hear()[-1] == {"STATUS": f"Cannot start: {process.lines('cannot_start')[0]['problem']}"}
        assert not any("READY" in told for told in manager.told)


async def test_sigterm_ends_it_with_exit_code_0(tmp_path: Path) -> None:
    """With a request under way, which is finished; SIGHUP before that reads the file again, a bad one as well as a good one."""
    async with open_process(tmp_path) as (site, process):
        process.write()
        await process.start()
        alice = await site.participant()
        given = await site.in_call(alice)
        good = process.file.read_text()
        process.file.write_text("sfus: [")
        process.signal(signal.SIGHUP)
        await until(lambda: process.lines("config_not_reloaded"), "the bad file is refused")
        assert (await site.show(given))["state"] == "live"
        process.file.write_text(good)
        process.signal(signal.SIGHUP)
        await until(lambda: process.lines("config_reloaded"), "the good file is read")
        site.homeserver.model.faults.latency = {"send": 0.5}
        await site.leave(alice, "PARTICIPANT_REMOVED")
        await until(lambda: site.homeserver.model.answers["send", 200] == 1, "the request arrives")
        process.signal(signal.SIGTERM)
        assert await process.exit_code() == 0
        assert process.lines("stopped")[0]["abandoned"] == 0
        assert site.database.query("SELECT outcome FROM delayed_event") == [("sent",)]


async def test_sigterm_answers_those_who_wait_for_a_homeserver_s_word(tmp_path: Path) -> None:
    """Their homeserver does not say whose OpenID tokens these are: each gets an error that tells to come again, and no connection is cut."""
    async with open_process(tmp_path, timeouts={"request": "1m"}, actions={"lease": "2m"}) as (site, process):
        process.write()
        await process.start()
        faults = site.homeserver.model.faults
        faults.hang, faults.only = True, frozenset({"openid_userinfo"})
        people = [ElementCall(Call(site), f"p{n}", Mode.MATRIX_2_0) for n in range(72)]
        bodies = []
        for n, member in enumerate(people):
            await member.schedule()
            path = ("/get_token", "/get_token", "/sfu/get", "/delegate_delayed_leave")[n % 4]
            bodies.append((path, await member.body(path, delay=n % 4 != 0)))
        asked = [*bodies, *bodies[:8]]  # the last ones share the question that somebody has asked already
        waiting = [asyncio.create_task(site.ask("POST", path, json=body)) for path, body in asked]
        # So many questions are open at a time; the others wait for their turn. Whoever came before this request has been read, too.
        await until(lambda: site.homeserver.model.answers["openid_userinfo", 0] == 64, "the questions arrive")
        async with site.http.get(f"{site.url}/healthz") as response:
            assert response.status == 200
        assert not any(task.done() for task in waiting)
        process.signal(signal.SIGTERM)
        answers = await asyncio.gather(*waiting)
        assert [(answer.status, answer.body["errcode"]) for answer in answers] == [(503, "M_UNKNOWN")] * len(asked)
        assert all("openid_token" in answer.body["error"] and int(answer.headers["Retry-After"]) >= 1 for answer in answers)
        assert await process.exit_code() == 0
        assert process.lines("stopped")[0]["abandoned"] == 0
        assert site.database.query("SELECT count(*) FROM delayed_event") == [(0,)]


async def test_what_was_acknowledged_outlives_a_sigkill(tmp_path: Path) -> None:
    """Killed in the middle of a load: every delegation that was answered 201 is there, and departures told meanwhile are acted upon."""
    async with open_process(tmp_path, delegations={"max_per_homeserver": 10_000}) as (site, process):
        process.write()
        await process.start()
        people = [await site.participant(f"p{n}", f"call{n % 7}") for n in range(240)]
        acknowledged: dict[Participant, dict[str, Any]] = {}

        async def load(some: list[Participant]) -> None:
            for who in some:
                try:
                    answer = await site.delegate(who)
                    if answer.status == 201:
                        acknowledged[who] = answer.body
                        await site.join(who)
                except aiohttp.ClientError:
                    return

        loads = asyncio.gather(*(load(people[n::16]) for n in range(16)))
        await until(lambda: len(acknowledged) >= 40, "some delegations are taken")
        process.signal(signal.SIGKILL)
        assert await process.exit_code() == -signal.SIGKILL
        await loads
        assert 40 <= len(acknowledged) < 240
        assert len(process.lines("stopped")) == 0
        gone = list(acknowledged)[::2]
        for who in gone:
            await site.leave(who)
        process.write()
        await process.start()
        for who, given in acknowledged.items():
            shown = await site.show(given)
            assert shown["id"] == given["id"]
            assert len(shown["delayed_events"]) == 1
            assert (shown["participant"]["room"], shown["participant"]["identity"]) == (who.room, who.identity)
        for who in gone:
            await site.ended(who)
        there = [who for who in acknowledged if who not in gone]
        for who in there:
            await site.present(acknowledged[who], "connected")
            assert site.event(who).end is End.PENDING
        assert not site.sfu.model.lost
        process.signal(signal.SIGTERM)
        assert await process.exit_code() == 0


async def refused_start(process: Process, sentence: str) -> None:
    """It does not start: exit code 1, a line that says what is wrong and what to do, no traceback."""
    process.write()
    await process.begin()
    assert await process.exit_code() == 1
    told = [line.get("problem", line.get("text", "")) for line in process.stderr]
    assert any(sentence in text for text in told), told
    assert not any("Traceback" in str(line) for line in process.stderr)


@stores.only_sqlite
async def test_a_second_process_is_told_so_in_a_sentence(tmp_path: Path) -> None:
    """An embedded database is for one."""
    async with open_process(tmp_path) as (site, process):
        holder = SqliteStore(site.file)
        await refused_start(process, "in use by another process")
        holder.close()


async def test_a_port_that_is_taken_is_said_in_a_sentence(tmp_path: Path) -> None:
    """After the database was opened."""
    async with open_process(tmp_path) as (site, process):
        with socket.create_server(("127.0.0.1", 0)) as holder:
            site.port = holder.getsockname()[1]
            await refused_start(process, "Cannot listen on")


async def test_a_newer_database_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """And it is not touched."""
    async with open_process(tmp_path) as (site, process):
        site.database.make()
        site.database.query("UPDATE schema_version SET version_num = '9999'")
        site.database.query("UPDATE meta SET value = '9999' WHERE key = 'oldest_schema'")
        await refused_start(process, "a newer one")
        assert site.database.query("SELECT version_num FROM schema_version") == [("9999",)]
