"""The doctor between the sandboxes: what it finds in each defect that can be made here, before the first start and beside a running daemon."""

import asyncio
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography.fernet import Fernet
from sfu_delegate.config import from_mapping
from sfu_delegate.demo.processes import free_ports
from sfu_delegate.doctor import as_data, examine
from sfu_delegate.doctor.findings import Finding, Report, Verdict
from sfu_delegate.doctor.looks import sfu as sfu_looks
from sfu_delegate.doctor.looks.database import sqlite_inside
from sfu_delegate.doctor.showing import lines
from sfu_delegate.doctor.verdicts.homeserver import WellKnown, judge_well_known
from sfu_delegate.matrix import http
from sfu_delegate.sandbox.homeserver import HomeserverModel, RateLimit
from sfu_delegate.sandbox.server import SandboxHomeserver, SandboxSfu
from sfu_delegate.sandbox.sfu import SfuModel
from sfu_delegate.store.sqlite import SqliteStore

from tests import postgresql
from tests.integration.daemon import SERVER, SFU_KEY, SFU_SECRET, Site, merged, open_site
from tests.snippets import given
from tests.stores import migrated

HS_TOKEN = "hs-token-that-nobody-else-may-see-0123456789"
OK, WARNING, PROBLEM, SKIPPED = Verdict.OK, Verdict.WARNING, Verdict.PROBLEM, Verdict.SKIPPED


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not come here at once does not come at all, and no name is looked up: that may take its time, and lead anywhere."""
    monkeypatch.setattr(sfu_looks, "AWAITED_FOR", 1.5)

    def nowhere(*_: object) -> list[tuple[int, int, str]]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(http, "_addresses", nowhere)


@dataclass
class Bench:
    """An SFU and a homeserver, and the configuration of a daemon that does not run."""

    sfu: SandboxSfu
    homeserver: SandboxHomeserver
    directory: Path
    listen: int
    admin: int
    as_token: str
    secrets: set[str] = field(default_factory=lambda: {SFU_SECRET, HS_TOKEN})

    @property
    def database(self) -> Path:
        """Its file."""
        return self.directory / "delegate.db"

    def mapping(self, *changes: Mapping[str, Any], of_homeserver: Mapping[str, Any] = {}) -> dict[str, Any]:
        """The configuration as a file would have it."""
        own = {
            "listen": {"port": self.listen},
            "admin": {"port": self.admin},
            "database": f"sqlite:///{self.database}",
            "sfus": {"main": {"url": self.sfu.url.replace("http", "ws"), "keys": {SFU_KEY: SFU_SECRET}}},
            "homeservers": [{"name": SERVER, "url": self.homeserver.url, "federation_url": self.homeserver.url, **of_homeserver}],
        }
        return merged(own, *changes)

    @property
    def service(self) -> dict[str, str]:
        """What an entry of `homeservers` says of the application service."""
        return {"as_token": self.as_token, "hs_token": HS_TOKEN}

    async def examined(self, *changes: Mapping[str, Any], of_homeserver: Mapping[str, Any] = {}) -> Report:
        """What the doctor says; nothing secret is in it, and on the SFU nothing is left."""
        report = await examine(from_mapping(self.mapping(*changes, of_homeserver=of_homeserver)), self.directory / "sfu-delegate.yaml")
        check_secrets(report, self.secrets | {self.as_token})
        assert self.sfu.model.rooms == {}
        return report


def check_secrets(report: Report, secrets: set[str]) -> None:
    """Nothing that must stay secret is in what people or programs are shown."""
    shown = json.dumps(as_data(report)) + "\n".join(lines(report))
    assert not [secret[:6] for secret in secrets if secret in shown]


def of(report: Report, id: str, subject: str = "") -> Finding:
    """What came of one check."""
    [found] = [result.finding for result in report.results if (result.id, result.subject) == (id, subject)]
    return found


def says(finding: Finding, verdict: Verdict, *words: str) -> None:
    """It has this verdict, and these words in its evidence or remedy."""
    assert finding.verdict is verdict, finding
    for word in words:
        assert word in f"{finding.evidence} → {finding.remedy}", finding


def verdicts(report: Report, verdict: Verdict) -> set[str]:
    """The checks that have it."""
    return {result.id for result in report.results if result.finding.verdict is verdict}


@asynccontextmanager
async def benched(directory: Path, homeserver: HomeserverModel | None = None, clock: Callable[[], float] = time.time) -> AsyncIterator[Bench]:
    model = homeserver or HomeserverModel(SERVER, limit=None)  # a refusal takes half a second
    async with SandboxSfu(SfuModel({SFU_KEY: SFU_SECRET}), clock=clock) as sfu, SandboxHomeserver(model) as server:
        listen, admin = free_ports(2)
        sfu.model.urls = [f"http://127.0.0.1:{listen}/webhooks/livekit"]
        as_token = await server.call("application_service")
        await server.call("set_proxy", f"http://127.0.0.1:{listen}", HS_TOKEN)
        yield Bench(sfu, server, directory, listen, admin, as_token)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with benched(tmp_path) as made:
        yield made


# ── before the first start ──


async def test_before_the_first_start(bench: Bench) -> None:
    """All is well with an application service; what only a running daemon can show is skipped, and nothing is left behind."""
    report = await bench.examined(of_homeserver=bench.service)
    assert (verdicts(report, PROBLEM), verdicts(report, WARNING), verdicts(report, SKIPPED)) == (set(), {"homeserver.well_known"}, {"daemon"})
    assert report.exit_code == 0
    says(of(report, "sfu.webhooks", "main"), OK, f"came to 127.0.0.1:{bench.listen} (where this command listened)")
    says(of(report, "homeserver.rate_limit", SERVER), OK, "8 of 8 requests at once were granted (measured, as the application service)")
    says(of(report, "homeserver.largest_delay", SERVER), OK, "1d is the longest", "100 at a time")
    says(of(report, "homeserver.application_service", SERVER), OK, "token, membership and federation work", "none runs")
    says(of(report, "database.version"), OK, "first start")
    assert list(bench.directory.iterdir()) == []
    assert not bench.homeserver.model.events


async def test_the_limit_is_measured_and_what_it_means(bench: Bench) -> None:
    """Without an application service: in minutes until a call of 500 is cleared."""
    bench.homeserver.model.limit = RateLimit()
    report = await bench.examined()
    says(of(report, "homeserver.rate_limit", SERVER), WARNING, "takes 8 min 15 s to clear (1 action a second, burst 5; measured)", "appservice")
    says(of(report, "homeserver.application_service", SERVER), SKIPPED, "there is none")
    says(of(report, "homeserver.largest_delay", SERVER), SKIPPED)


async def test_a_limited_application_service(bench: Bench) -> None:
    """A registration without `rate_limited: false` lifts nothing."""
    bench.homeserver.model.limit = RateLimit()
    as_token = await bench.homeserver.call("application_service", rate_limited=True)
    report = await bench.examined(of_homeserver={"as_token": as_token})
    says(of(report, "homeserver.rate_limit", SERVER), WARNING, "8 min 15 s", "rate_limited: false")


async def test_delegations_that_wait_are_not_disturbed(bench: Bench) -> None:
    """Where events wait for the daemon to start, their rate is not used up for a measurement."""
    SqliteStore(bench.database).close()
    database = sqlite3.connect(bench.database)
    columns = [row[1:4] for row in database.execute("PRAGMA table_info(delayed_event)")]
    values = {name: 1 if kind in ("FLOAT", "INTEGER") else "x" for name, kind, needed in columns if needed}
    values |= {"id": 1, "homeserver": SERVER, "state": "live"}
    quoted = ", ".join(f'"{name}"' for name in values)
    database.execute(f"INSERT INTO delayed_event ({quoted}) VALUES ({', '.join('?' * len(values))})", list(values.values()))
    database.commit()
    database.close()
    report = await bench.examined(of_homeserver=bench.service)
    says(of(report, "homeserver.rate_limit", SERVER), SKIPPED, "there are 1 delegated events")
    assert not bench.homeserver.model.answers["restart", 404]


def shape(line: str) -> str:
    """A line of the report without what differs from machine to machine."""
    line = re.sub(r"(?:https?://|sqlite:///*|/)[^\s,;()]+", "PLACE", line)
    return re.sub(r"[\d.]+ (?:ms|s|B|kB|MB|GB|TB)\b|127\.0\.0\.1:\d+|\bv1\.\d+", "NUMBER", line)


async def test_the_manual_shows_what_is_said(tmp_path: Path) -> None:
    """The report in docs/operating.md is that of a first look: no webhooks yet, and no application service."""
    shown = given("docs/operating.md", "problem  sfu.webhooks main").splitlines()
    model = HomeserverModel("example.org")
    async with SandboxSfu(SfuModel({"APIexample": SFU_SECRET})) as sfu, SandboxHomeserver(model) as server:
        listen, admin = free_ports(2)
        bench = Bench(sfu, server, tmp_path, listen, admin, "")
        settings = bench.mapping({"sfus": {"main": {"api_key": "APIexample"}}})
        settings["sfus"]["main"]["keys"] = {"APIexample": SFU_SECRET}
        settings["homeservers"][0]["name"] = "example.org"
        report = await examine(from_mapping(settings), tmp_path / "sfu-delegate.yaml")
    is_of_the_name = re.compile(r"(?s)\n[a-z]+ +homeserver\.well_known.*?(?=\n/)")  # nobody's machine here has that name
    said = is_of_the_name.sub("", "\n".join(lines(report)))
    told = is_of_the_name.search("\n".join(shown))
    assert told is not None
    none_named = judge_well_known(WellKnown(), daemon=False, standalone=True)
    assert none_named.evidence in told[0]
    assert none_named.remedy in told[0]
    assert [shape(line) for line in said.splitlines()] == [shape(line) for line in is_of_the_name.sub("", "\n".join(shown)).splitlines()]


# ── defects of the SFU ──


async def test_a_wrong_secret_of_the_sfu(bench: Bench) -> None:
    """It is the key, and whether webhooks come cannot be seen."""
    report = await bench.examined({"sfus": {"main": {"keys": {SFU_KEY: "another-secret-of-the-sfu-0123456789abcdef"}}}})
    says(of(report, "sfu.answers", "main"), PROBLEM, "does not take our token", "to the letter")
    says(of(report, "sfu.webhooks", "main"), SKIPPED, "no room could be made")
    assert report.exit_code == 1


async def test_a_second_key_that_the_sfu_does_not_know(bench: Bench) -> None:
    """The daemon works, and what that key has signed will be refused."""
    report = await bench.examined({"sfus": {"main": {"keys": {"APIother": "another-secret-of-the-sfu-0123456789abcdef"}}}})
    says(of(report, "sfu.answers", "main"), WARNING, f"takes key {SFU_KEY}, but not APIother")


async def test_an_sfu_that_is_down(bench: Bench) -> None:
    """Nobody is there, and nothing else can be said of it."""
    bench.sfu.model.faults.down = True
    await bench.sfu.settle()
    report = await bench.examined()
    says(of(report, "sfu.answers", "main"), PROBLEM, "could not be connected to", "sfus.*.url")
    says(of(report, "sfu.clock", "main"), SKIPPED)
    says(of(report, "sfu.webhooks", "main"), SKIPPED)


async def test_webhooks_to_a_wrong_port(bench: Bench) -> None:
    """They never come, and LiveKit's configuration is spelt out."""
    [nobody] = free_ports(1)
    bench.sfu.model.urls = [f"http://127.0.0.1:{nobody}/webhooks/livekit"]
    report = await bench.examined()
    says(
        of(report, "sfu.webhooks", "main"),
        PROBLEM,
        "neither room_started nor room_finished",
        f"api_key: {SFU_KEY}",
        f":{bench.listen}/webhooks/livekit",
    )


async def test_webhooks_to_a_wrong_path(bench: Bench) -> None:
    """They come, where the daemon hears none."""
    bench.sfu.model.urls = [f"http://127.0.0.1:{bench.listen}/hook"]
    says(of(await bench.examined(), "sfu.webhooks", "main"), PROBLEM, "they come to the path '/hook'")


@pytest.mark.parametrize(("keys", "said"), [({}, "unknown_key"), ({"APIhook": "another-secret-0123456789-0123456789-abc"}, "bad_signature")])
async def test_webhooks_with_a_wrong_key(bench: Bench, keys: dict[str, str], said: str) -> None:
    """They come, and are refused: the key is another one, or its secret is."""
    bench.secrets |= {"a-secret-for-webhooks-that-nobody-else-knows", *keys.values()}
    bench.sfu.model.keys["APIhook"] = "a-secret-for-webhooks-that-nobody-else-knows"
    bench.sfu.model.webhook_key = "APIhook"
    report = await bench.examined({"sfus": {"main": {"keys": keys, "api_key": SFU_KEY}}})
    says(of(report, "sfu.webhooks", "main"), PROBLEM, "refused (401)", f"2 webhooks ({said})")


async def test_webhooks_that_come_late(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come, after more than a repetition."""
    monkeypatch.setattr(sfu_looks, "AWAITED_FOR", 20.0)
    monkeypatch.setattr("sfu_delegate.doctor.verdicts.sfu.LATE", 0.2)
    bench.sfu.model.delivery_faults.delay = 1.0
    bench.sfu.model.delivery_faults.delay_up_to = 2.0
    says(of(await bench.examined(), "sfu.webhooks", "main"), WARNING, "late: after")


async def test_clocks_that_differ(tmp_path: Path) -> None:
    """The SFU's is wrong by five minutes: told of it, and of the webhooks that are refused for it."""
    async with benched(tmp_path, clock=lambda: time.time() + 300) as bench:
        report = await bench.examined()
    says(of(report, "sfu.clock", "main"), PROBLEM, "ahead of ours", "timedatectl")
    says(of(report, "sfu.webhooks", "main"), PROBLEM, "not_yet_valid", "clocks differ")
    says(of(report, "clock"), WARNING, "differs from that of SFU main, and agrees with that of homeserver hs.test")


async def test_a_port_that_somebody_else_has(bench: Bench) -> None:
    """It is said who cannot be who, and nothing is done at that port."""
    asked = []

    async def answer(request: web.BaseRequest) -> web.Response:
        asked.append(request.path)
        return web.Response(status=404)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", bench.listen).start()
    try:
        bench.sfu.model.urls = []
        report = await bench.examined()
    finally:
        await runner.cleanup()
    says(of(report, "public"), PROBLEM, f"another program holds 127.0.0.1:{bench.listen}", "it answers 404 to /healthz")
    says(of(report, "sfu.webhooks", "main"), SKIPPED, "another program holds")
    assert asked == ["/healthz"]


# ── defects of the homeserver ──


async def test_a_homeserver_that_is_down(bench: Bench) -> None:
    """One problem, and its federation; everything else about it is skipped."""
    bench.homeserver.model.faults.down = True
    await bench.homeserver.settle()
    report = await bench.examined(of_homeserver=bench.service)
    says(of(report, "homeserver.reachable", SERVER), PROBLEM, "it cannot be reached: no connection")
    for what in ("clock", "delayed_events", "largest_delay", "rate_limit", "application_service"):
        says(of(report, f"homeserver.{what}", SERVER), SKIPPED)
    says(of(report, "homeserver.federation", SERVER), PROBLEM, "no connection")


async def test_a_homeserver_that_hangs(bench: Bench) -> None:
    """It is given up in time, and the others are looked at."""
    bench.homeserver.model.faults.hang = True
    report = await bench.examined({"timeouts": {"connect": "500ms", "request": "1s"}})
    says(of(report, "homeserver.reachable", SERVER), PROBLEM)
    says(of(report, "sfu.webhooks", "main"), OK)
    assert report.seconds < 45


@pytest.mark.parametrize(("generations", "best"), [("D", "D"), ("BC", "C"), ("B", "B"), ("A", "A")])
async def test_the_generation_of_the_api(tmp_path: Path, generations: str, best: str) -> None:
    """Each is known, also those that the announcement does not tell apart."""
    async with benched(tmp_path, HomeserverModel(SERVER, generations=generations)) as bench:
        report = await bench.examined(of_homeserver=bench.service)
    says(of(report, "homeserver.delayed_events", SERVER), OK, f"generation {best} ", "restart, send and cancel are served")


async def test_endpoints_that_are_announced_and_not_there(tmp_path: Path) -> None:
    """A proxy that passes on what is old only, say."""
    model = HomeserverModel(SERVER, generations="")
    model.unstable_features = {"org.matrix.msc4140": True}
    async with benched(tmp_path, model) as bench:
        report = await bench.examined()
    says(of(report, "homeserver.delayed_events", SERVER), PROBLEM, "restart is not there", "reverse proxy")


async def test_delayed_events_that_are_off(tmp_path: Path) -> None:
    """Told, with Synapse's key; and no limit is measured."""
    async with benched(tmp_path, HomeserverModel(SERVER, generations="")) as bench:
        report = await bench.examined(of_homeserver=bench.service)
    says(of(report, "homeserver.delayed_events", SERVER), PROBLEM, "off", "max_event_delay_duration")
    says(of(report, "homeserver.rate_limit", SERVER), SKIPPED, "off")


@pytest.mark.parametrize(("delay_ms", "verdict"), [(600_000, WARNING), (10_000, PROBLEM)])
async def test_a_small_largest_delay(tmp_path: Path, delay_ms: int, verdict: Verdict) -> None:
    """Less than what clients are told to schedule, and less than what the daemon takes."""
    async with benched(tmp_path, HomeserverModel(SERVER, max_delay_ms=delay_ms)) as bench:
        report = await bench.examined(of_homeserver=bench.service)
    says(of(report, "homeserver.largest_delay", SERVER), verdict, "max_event_delay_duration: 24h")


async def test_a_wrong_as_token(bench: Bench) -> None:
    """The homeserver does not know it."""
    report = await bench.examined(of_homeserver=bench.service | {"as_token": "as-token-that-nobody-knows-0123456789abc"})
    says(of(report, "homeserver.application_service", SERVER), PROBLEM, "does not know the as_token", "app_service_config_files")


async def test_without_the_features_of_an_application_service(tmp_path: Path) -> None:
    """Both are named."""
    async with benched(tmp_path, HomeserverModel(SERVER, msc4502=False, msc4512=False)) as bench:
        report = await bench.examined(of_homeserver=bench.service)
    says(of(report, "homeserver.application_service", SERVER), PROBLEM, "msc4502_enabled", "msc4512_enabled")


async def test_federation_that_is_broken(bench: Bench) -> None:
    """A proxy that answers in the homeserver's place."""
    bench.homeserver.model.faults.html, bench.homeserver.model.faults.only = 502, frozenset({"openid_userinfo"})
    says(of(await bench.examined(), "homeserver.federation", SERVER), PROBLEM, "it answers 502", "/get_token")


async def test_a_homeserver_that_vouches_for_anything(bench: Bench) -> None:
    """Whatever that is."""
    bench.homeserver.model.openid_sub = f"@alice:{SERVER}"
    says(of(await bench.examined(), "homeserver.federation", SERVER), PROBLEM, "made up")


async def test_a_pattern_is_no_homeserver(bench: Bench) -> None:
    """It is skipped."""
    report = await bench.examined({"homeservers": [{"name": "*.example.org"}]})
    says(of(report, "homeserver.reachable", "*.example.org"), SKIPPED, "pattern")


# ── defects of the database ──


async def test_a_database_whose_directory_is_not_there(bench: Bench) -> None:
    """As before systemd's first start."""
    report = await bench.examined({"database": f"sqlite:///{bench.directory}/none/delegate.db"})
    says(of(report, "database.write"), SKIPPED, "there is no directory", "systemd")
    says(of(report, "config"), WARNING, "there is no directory")


async def test_a_database_that_cannot_be_written(bench: Bench) -> None:
    """A file system on which nobody makes files, whoever he is."""
    says(of(await bench.examined({"database": "sqlite:////sys/delegate.db"}), "database.write"), PROBLEM, "cannot be written to")


@contextmanager
def small_disk(at: Path, options: str) -> Iterator[None]:
    at.mkdir(exist_ok=True)
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(at)], check=False, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


async def test_a_full_disk(bench: Bench) -> None:
    """There is no space for a page."""
    place = bench.directory / "full"
    with small_disk(place, "size=64k"):
        (place / "filler").write_bytes(b"x" * 64 * 1024)
        report = await bench.examined({"database": f"sqlite:///{place}/delegate.db"})
    says(of(report, "database.write"), PROBLEM, "no space left")
    says(of(report, "database.space"), PROBLEM, "0 B of")


async def test_a_read_only_disk(bench: Bench) -> None:
    """Even root writes nothing there."""
    place = bench.directory / "fixed"
    with small_disk(place, "ro,size=64k"):
        report = await bench.examined({"database": f"sqlite:///{place}/delegate.db"})
    says(of(report, "database.write"), PROBLEM, "read-only file system")


async def test_a_database_of_a_newer_version_and_another_key(bench: Bench) -> None:
    """The daemon would not start with the one, and not be able to read with the other."""
    SqliteStore(bench.database).close()
    database = sqlite3.connect(bench.database)
    database.execute("UPDATE schema_version SET version_num = '9999'")
    database.execute("UPDATE meta SET value = '9999' WHERE key = 'oldest_schema'")
    database.execute("INSERT INTO meta (key, value) VALUES ('encryption_keys', 'of another key') ON CONFLICT DO NOTHING")
    database.execute("UPDATE meta SET value = 'of another key' WHERE key NOT IN ('oldest_schema')")
    database.commit()
    database.close()
    before = bench.database.read_bytes()
    key = Fernet.generate_key().decode()
    bench.secrets.add(key)
    report = await bench.examined({"encryption": {"keys": [key]}})
    says(of(report, "database.version"), PROBLEM, "9999", "newer")
    assert bench.database.read_bytes() == before
    assert {path.name for path in bench.directory.iterdir()} <= {"delegate.db", "delegate.db.lock"}


def test_what_a_killed_daemon_left_is_read(tmp_path: Path) -> None:
    """The log beside the database counts, and neither of the two is changed."""
    store = SqliteStore(tmp_path / "delegate.db")
    store.save_keys_mark("a fingerprint")
    left = tmp_path / "left"
    left.mkdir()
    for name in ("delegate.db", "delegate.db-wal"):
        shutil.copy(tmp_path / name, left)
    store.close()
    before = {path.name: path.read_bytes() for path in left.iterdir()}
    assert sqlite_inside(left / "delegate.db").keys == "a fingerprint"
    assert {name: (left / name).read_bytes() for name in before} == before


async def test_an_encryption_key_that_is_lost(tmp_path: Path) -> None:
    """The database was written with a key that is not there any more: the daemon would make a new one."""
    async with open_site(tmp_path) as site:
        await site.stop()
        key = site.file.with_name(f"{site.file.name}.key")
        config = from_mapping(merged(site.mapping(), {"admin": {"port": free_ports(1)[0]}}))
        says(of(await examine(config, tmp_path / "x.yaml"), "keys"), OK, "with which the database was written")
        key.chmod(0o644)
        says(of(await examine(config, tmp_path / "x.yaml"), "keys"), PROBLEM, "open to others")
        key.unlink()
        says(of(await examine(config, tmp_path / "x.yaml"), "keys"), PROBLEM, "though the database was written with one", "backup")
        key.write_text(Fernet.generate_key().decode())
        key.chmod(0o600)
        says(of(await examine(config, tmp_path / "x.yaml"), "keys"), PROBLEM, "last written with another one")
        key.unlink()


async def test_secrets_that_everybody_may_read(bench: Bench) -> None:
    """They are named, with what to do."""
    token = bench.directory / "as-token"
    token.write_text(bench.as_token)
    token.chmod(0o644)
    report = await bench.examined(of_homeserver={"as_token_file": str(token)})
    says(of(report, "files"), WARNING, f"{token}: every user of this machine may read it", f"chmod o= {token}")
    says(of(report, "config"), OK)


# ── PostgreSQL ──


async def test_a_postgresql(bench: Bench) -> None:
    """Its speed, version, size and connections, without and with the tables; the password is nowhere."""
    key = Fernet.generate_key().decode()
    bench.secrets.add(key)
    for filler in (None, migrated):
        with postgresql.shared().database(filler) as url:
            report = await bench.examined({"database": url, "encryption": {"keys": [key]}})
            says(of(report, "database.write"), OK, "a commit takes")
            says(of(report, "database.version"), OK, "PostgreSQL", "first start" if filler is None else "that of this program")
            says(of(report, "database.space"), OK, "MB")
            says(of(report, "database.connections"), OK, "each instance needs 3")
            says(of(report, "homeserver.rate_limit", SERVER), OK, "measured")
            assert postgresql.shared().query(url, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sfu-delegate doctor'") == [(0,)]


async def test_a_postgresql_that_is_not_there(bench: Bench) -> None:
    """Told once; what needs it is skipped, and nothing is measured that delegations in it may need."""
    [nobody] = free_ports(1)
    url = f"postgresql://delegate@127.0.0.1:{nobody}/none"
    report = await bench.examined({"database": url, "encryption": {"keys": [Fernet.generate_key().decode()]}})
    says(of(report, "database.write"), PROBLEM, "cannot be reached")
    says(of(report, "database.version"), SKIPPED)
    says(of(report, "homeserver.rate_limit", SERVER), SKIPPED, "the database cannot be read")


# ── beside a running daemon ──


@asynccontextmanager
async def attended(
    directory: Path, *, service: bool = True, homeserver: HomeserverModel | None = None
) -> AsyncIterator[tuple[Site, Callable[[], Any]]]:
    """A running daemon, and how the doctor sees it."""
    [admin] = free_ports(1)
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(open_site(directory, started=False, homeserver=homeserver, admin={"port": admin}))
        if service:
            as_token = await site.homeserver.call("application_service")
            site.of_homeserver |= {"as_token": as_token, "hs_token": HS_TOKEN}
            site.secrets |= {as_token, HS_TOKEN}
            await site.homeserver.call("set_proxy", f"http://127.0.0.1:{site.port}", HS_TOKEN)
        await site.start()

        async def examined() -> Report:
            report = await examine(site.config(), directory / "sfu-delegate.yaml")
            check_secrets(report, site.secrets)
            assert not [name for name in site.sfu.model.rooms if name.startswith("sfu-delegate-doctor-")]
            return report

        yield site, examined


async def test_beside_a_running_daemon(tmp_path: Path) -> None:
    """All is well, the way back through the homeserver included; it is the daemon that has heard the webhooks, and it is not disturbed."""
    async with attended(tmp_path) as (site, examined):
        alice = await site.participant("alice")
        given = await site.in_call(alice)
        asked = site.homeserver.model.answers["restart", 404]
        report = await examined()
        # Its times are short, of which the configuration's check warns.
        assert (verdicts(report, PROBLEM), verdicts(report, WARNING) - {"config"}, verdicts(report, SKIPPED)) == (
            set(),
            {"homeserver.well_known"},
            set(),
        )
        says(of(report, "daemon"), OK, "is ready")
        says(of(report, "sfu.webhooks", "main"), OK, "came to the daemon")
        says(of(report, "homeserver.application_service", SERVER), OK, "token, membership, federation and proxy work")
        says(of(report, "homeserver.rate_limit", SERVER), OK, "has met no limit")
        says(of(report, "database.version"), OK, "that of this program")
        assert site.homeserver.model.answers["restart", 404] == asked
        assert (await site.show(given))["participant"]["presence"] == "connected"
        assert [line for line in site.lines() if line["level"] in ("error", "warning")] == []


async def test_what_the_daemon_has_learned_of_a_limit(tmp_path: Path) -> None:
    """It is asked instead of the homeserver."""
    async with attended(tmp_path, service=False, homeserver=HomeserverModel(SERVER)) as (site, examined):
        says(of(await examined(), "homeserver.rate_limit", SERVER), SKIPPED, "has not met a limit yet")
        people = [await site.participant(f"user-{n}") for n in range(7)]
        await asyncio.gather(*(site.delegate(one) for one in people))
        assert site.homeserver.model.answers["restart", 429]
        asked = sum(site.homeserver.model.answers.values())
        report = await examined()
        says(of(report, "homeserver.rate_limit", SERVER), WARNING, "as the daemon has learned", "a call of 500 that ends at once takes")
        assert sum(site.homeserver.model.answers.values()) - asked < 20


async def test_webhooks_that_the_daemon_refuses(tmp_path: Path) -> None:
    """That none came, and that some were refused meanwhile, is seen in its metrics."""
    async with attended(tmp_path) as (site, examined):
        site.sfu.model.keys["APIother"] = "another-secret-of-the-sfu-0123456789abcdef"
        site.sfu.model.webhook_key = "APIother"
        says(of(await examined(), "sfu.webhooks", "main"), PROBLEM, "none was accepted", "2 webhooks (unknown_key)")
        site.sfu.model.urls = []
        says(of(await examined(), "sfu.webhooks", "main"), PROBLEM, "neither room_started nor room_finished came")


async def test_a_daemon_that_cannot_be_asked(tmp_path: Path) -> None:
    """One runs, by the lock of its database and its public listener; so nothing is measured, and nobody listens in its place."""
    async with attended(tmp_path, service=False) as (site, _):
        config = from_mapping(merged(site.mapping(), {"admin": {"port": free_ports(1)[0]}}))
        report = await examine(config, tmp_path / "sfu-delegate.yaml")
        says(of(report, "daemon"), PROBLEM, f"somebody holds {site.file}.lock", "a sfu-delegate answers at the public listener")
        says(of(report, "public"), OK)
        says(of(report, "sfu.webhooks", "main"), SKIPPED, "cannot be asked")
        says(of(report, "homeserver.rate_limit", SERVER), SKIPPED, "use up what it may need")


async def test_a_daemon_whose_token_is_not_known(tmp_path: Path) -> None:
    """It tells nothing of webhooks then, and that is said."""
    async with attended(tmp_path, service=False) as (site, _):
        token = "an-admin-token-of-thirty-two-characters"
        site.changes = merged(site.changes, {"admin": {"token": token}})
        await site.stop()
        await site.start()
        report = await examine(from_mapping(merged(site.mapping(), {"admin": {"token": "x" * 32}})), tmp_path / "sfu-delegate.yaml")
        says(of(report, "sfu.webhooks", "main"), SKIPPED, "admin token")
        site.secrets.add(token)
        says(of(await examine(site.config(), tmp_path / "sfu-delegate.yaml"), "sfu.webhooks", "main"), OK)
