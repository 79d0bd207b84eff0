"""One soak from beginning to end: start everything, let people live and things fail, let everybody leave, wait until all has ended, and report."""

import asyncio
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
from sfu_delegate.demo.daemon import DaemonProcess, DelegateApi
from sfu_delegate.demo.sfu import KEY, SECRET
from sfu_delegate.sandbox.server import SandboxHomeserver, SandboxSfu
from sfu_delegate.sandbox.sfu import SfuModel

from tests.e2e.daemon_process import config_for
from tests.integration.instances import Balancer
from tests.postgresql import Server
from tests.soak import faults
from tests.soak.disturbances import DAEMON, DATABASE, HARNESS, INSTANCE, Disturbances
from tests.soak.faults import seeded
from tests.soak.people import Person, World
from tests.soak.report import Json, Seen, report
from tests.soak.settings import ENDING_WITHIN, HOMESERVERS, Settings, daemon_config, instance_configs
from tests.soak.truth import Harm, Truth
from tests.soak.watch import (
    AskedHomeserver,
    Kept,
    Log,
    Memory,
    PostgresqlDatabase,
    Sample,
    SqliteFile,
    memory_of,
    metrics_of,
    read_database,
    unfinished,
    url_for,
)

LOOK_EVERY = 0.25  # seconds
MEMORY_EVERY = 5.0
TELL_EVERY = 30.0
MOST_TOLD = 20  # excused harms while it runs; all are in the report
QUIET_FROM = 2 / 3  # of the time: from here on the daemon is frozen now and then, and not killed, so that its memory's course shows
SETTLE = 2.0  # seconds after the last end, for answers under way
CLIENT_TIMEOUT = 15.0
COUNTED_WITHIN = 60.0  # seconds, until instances have counted anew what others have changed
TOLD_WITHIN = 15.0  # seconds after its cause, until an error has been written to the log and read there
FROZEN_MOST_ALONE = 6.0  # seconds
FROZEN_MOST = 16.0  # … of one of several: longer than a lease
ALONE = "daemon"  # the name of the one that has no others


class Failed(Exception):
    """The soak itself could not go on: the daemon did not start, say, or one of our own tasks ended with an error."""


class Soak:
    """One run. `directory` gets the daemon's configuration, database and log."""

    def __init__(self, settings: Settings, directory: Path, *, talkative: bool = True) -> None:
        self._settings = settings
        self._directory = directory
        self._talkative = talkative
        self._begun = time.time()
        self._disturbances = Disturbances(time.time)
        self._truth = Truth(time.time, self._disturbances, self._on_harm)
        self._harms: list[Harm] = []
        self._asked = 0
        self._memory: list[Memory] = []
        self._tasks: dict[asyncio.Task[Any], str] = {}

    async def run(self) -> Json:
        """The report. Raises Failed, and CancelledError when it is interrupted; whatever happens, nothing that it started is left running."""
        async with AsyncExitStack() as open_now:
            model = SfuModel({KEY: SECRET}, auto_create=True, seed=self._settings.seed)
            self._sfu = await open_now.enter_async_context(SandboxSfu(model))
            self._homeservers: dict[str, SandboxHomeserver] = {}
            models = [AskedHomeserver(kind.name, limit=kind.limit, seed=self._settings.seed + n) for n, kind in enumerate(HOMESERVERS)]
            for asked in models:
                self._homeservers[asked.server_name] = await open_now.enter_async_context(SandboxHomeserver(asked))
            await self._open_daemons(open_now)
            self._log = Log(self._daemons, self._directory / "daemon.log", self._is_expected)
            self._keepers = {}
            for name, daemon in self._daemons.items():
                of = {asked.server_name: asked.asked[name] for asked in models}
                several = len(self._daemons) > 1
                target, longest = (INSTANCE, FROZEN_MOST) if several else (DAEMON, FROZEN_MOST_ALONE)
                self._keepers[name] = faults.Keeper(daemon, target, self._disturbances, of, time.time, longest)
            open_now.push_async_callback(self._end_daemons)
            await asyncio.gather(*(keeper.start() for keeper in self._keepers.values()))
            http = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=CLIENT_TIMEOUT), connector=aiohttp.TCPConnector(limit=200), cookie_jar=aiohttp.DummyCookieJar()
            )
            self._api = DelegateApi(self._url, await open_now.enter_async_context(http))
            open_now.push_async_callback(self._end_tasks)
            return await self._play()

    async def _open_daemons(self, open_now: AsyncExitStack) -> None:
        """One daemon on SQLite; or the instances, with their database, and a balancer before them."""
        directory = self._directory
        if not self._settings.instances:
            self._daemons = {ALONE: DaemonProcess(self._config_for(ALONE, {}), directory)}
            self._kept: Kept = SqliteFile(directory / "delegate.db")
            self._url = self._daemons[ALONE].public_url
        else:
            server = await asyncio.to_thread(open_now.enter_context, Server())
            database = self._kept = PostgresqlDatabase(server, server.create_database())
            names = tuple(f"instance-{number + 1}" for number in range(self._settings.instances))
            open_now.callback(database.save, directory)
            own = instance_configs(names, database.url)
            self._daemons = {name: DaemonProcess(self._config_for(name, own[name]), directory / name) for name in names}
            self._balancer = await open_now.enter_async_context(Balancer(seeded(self._settings.seed, "balancer")))
            self._balancer.patience = CLIENT_TIMEOUT
            self._balancer.ports = {name: daemon.config["listen"]["port"] for name, daemon in self._daemons.items()}
            self._url = self._balancer.url
        self._sfu.model.urls = [f"{self._url}/webhooks/livekit"]

    def _config_for(self, process: str, own: Mapping[str, Any]) -> dict[str, Any]:
        urls = [(name, url_for(homeserver.url, process)) for name, homeserver in self._homeservers.items()]
        return config_for(self._sfu.url, urls, **daemon_config(), **own)

    def _is_expected(self, entry: Json) -> bool:
        """An error that we have caused: the database was away, or it cut off an instance that stood still in the middle of a transaction."""
        now = time.time()
        causes = {"database_failed": (DATABASE, INSTANCE, HARNESS), "cannot_start": (DATABASE,)}.get(entry["event"], ())
        return bool(self._disturbances.during(causes, now - TOLD_WITHIN, now))

    # ── the play ──

    async def _play(self) -> Json:
        settings = self._settings
        self._world = World(settings, time.time, self._sfu, self._homeservers, self._api, self._truth)
        people = [Person(self._world, number, home, seeded(settings.seed, f"person {number}")) for number, home in enumerate(settings.homes())]
        self._begin("watch", self._watch())
        self._begin("memory", self._remember())
        self._begin("lag", faults.watch_lag(self._disturbances, time.time))
        lives = [self._begin("person", person.live()) for person in people]
        disturbing = [
            self._begin("webhooks", faults.webhooks_go_astray(self._sfu, self._disturbances, seeded(settings.seed, "webhooks"))),
            self._begin("sfu", faults.sfu_fails(self._sfu, people, self._disturbances, seeded(settings.seed, "sfu"))),
            self._begin("calls", faults.calls_end(self._world, people, seeded(settings.seed, "calls"))),
        ]
        for kind in HOMESERVERS:
            if kind.fails:
                job = faults.homeserver_fails(self._homeservers[kind.name], self._disturbances, seeded(settings.seed, kind.name))
                disturbing.append(self._begin(kind.name, job))
        if isinstance(self._kept, PostgresqlDatabase):
            job = faults.database_fails(self._kept.server, self._kept.url, self._disturbances, seeded(settings.seed, "database"))
            disturbing.append(self._begin("database", job))
            for name, daemon in self._daemons.items():
                self._begin("balancer", self._balancer.check(name, daemon.config["admin"]["port"]))
        keepers = [*self._keepers.values()]
        killing = self._begin("daemon", faults.processes_fail(keepers, seeded(settings.seed, "daemon"), settings.kill_every))

        await self._wait(settings.seconds * QUIET_FROM)
        await self._end([killing])
        freezing = self._begin("daemon", faults.processes_freeze(keepers, seeded(settings.seed, "frozen"), settings.kill_every))
        await self._wait(settings.seconds * (1 - QUIET_FROM))
        self._say("faults off, everybody leaves")
        await self._end([*disturbing, freezing])
        self._world.ending.set()
        for person in people:
            person.called_away.set()
        left_at = time.time()
        await self._until_ended(lives, left_at)
        return await self._conclude(left_at)

    async def _until_ended(self, lives: list[asyncio.Task[None]], left_at: float) -> None:
        """Until everybody has left, every event has ended, and the daemon knows; or until the time for that is over."""
        pause = LOOK_EVERY
        while time.time() - left_at < ENDING_WITHIN:
            self._must_go_on()
            if all(life.done() for life in lives) and not self._truth.open:
                pause = SETTLE  # who hung up with all webhooks lost is found by a look only
                if await self._all_is_known():
                    break
            await asyncio.sleep(pause)
        await asyncio.sleep(SETTLE)

    async def _all_is_known(self) -> bool:
        """Does the daemon know that everything has ended?"""
        if isinstance(self._kept, PostgresqlDatabase):
            return not self._kept.rows("SELECT 1 FROM delayed_event WHERE state <> 'done' LIMIT 1")
        return not any(map(unfinished, (await self._metrics()).values()))

    async def _metrics(self) -> dict[str, dict[Sample, float]]:
        try:
            return {name: await metrics_of(daemon) for name, daemon in self._daemons.items()}
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Failed(f"the daemon's metrics cannot be read: {type(error).__name__}") from error

    async def _counted(self) -> dict[str, dict[Sample, float]]:
        """The metrics at the end. Instances count now and then only what all of them have done."""
        until = time.time() + (COUNTED_WITHIN if len(self._daemons) > 1 else 0.0)
        while True:
            metrics = await self._metrics()
            if time.time() >= until or not any(map(unfinished, metrics.values())):
                return metrics
            await asyncio.sleep(1.0)

    async def _conclude(self, left_at: float) -> Json:
        seconds_to_end = time.time() - left_at
        metrics = await self._counted()
        await self._ask_for_stories()
        exit_codes = [await daemon.stop() for daemon in self._daemons.values()]
        self._log.read()
        self._truth.look()
        ends = {(name, id): event.end.value for name, server in self._homeservers.items() for id, event in server.model.events.items()}
        database = await asyncio.to_thread(read_database, self._kept, ends)
        for harm in self._harms:
            harm.story["log"] = await asyncio.to_thread(self._log.of, harm.membership.delegation, harm.membership.identity)
        return report(
            Seen(
                settings=self._settings,
                begun=self._begun,
                seconds=time.time() - self._begun,
                seconds_to_end=seconds_to_end,
                exit_codes=exit_codes,
                world=self._world,
                truth=self._truth,
                disturbances=self._disturbances,
                keepers=self._keepers,
                log=self._log,
                memory=self._memory,
                metrics=metrics,
                database=database,
            )
        )

    # ── watching ──

    async def _watch(self) -> None:
        told_at = time.time()
        while True:
            self._truth.look()
            self._log.read()
            await self._ask_for_stories()
            if time.time() - told_at >= TELL_EVERY:
                told_at = time.time()
                self._tell()
            await asyncio.sleep(LOOK_EVERY)

    def _on_harm(self, harm: Harm) -> None:
        self._harms.append(harm)
        excused = harm in self._truth.excused
        if not excused or len(self._truth.excused) <= MOST_TOLD:
            self._say(f"{harm.why}: {harm.membership.identity} in {harm.membership.room}, {harm.membership.delegation}")

    async def _ask_for_stories(self) -> None:
        """Ask the daemon about each harm while it knows most."""
        while self._asked < len(self._harms):
            harm = self._harms[self._asked]
            self._asked += 1
            try:
                status, told = await self._api.show(harm.membership.delegation, harm.membership.management_token)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                status, told = 0, {"error": type(error).__name__}
            harm.story["shown"] = {"status": status, **told}
            if harm not in self._truth.excused:  # whoever interrupts it wants to know, too
                self._say(json.dumps({**harm.membership.described(), **harm.story}, ensure_ascii=False))

    async def _remember(self) -> None:
        while True:
            for keeper in self._keepers.values():
                pid = keeper.daemon.pid
                found = memory_of(pid)
                if found is not None and time.time() - keeper.born_at >= MEMORY_EVERY:  # not while it starts
                    at = time.time() - self._begun
                    self._memory.append(Memory(round(at, 1), pid, round(found[0], 1), found[1], len(self._truth.open)))
            await asyncio.sleep(MEMORY_EVERY)

    def _tell(self) -> None:
        truth, last = self._truth, self._memory[-1] if self._memory else None
        memory = "" if last is None else f", {last.rss_mb:.0f} MB, {last.files} files"
        done = sum((keeper.did for keeper in self._keepers.values()), Counter[str]())
        did = ", ".join(f"{what} {times}" for what, times in done.items())
        self._say(
            f"{truth.memberships} memberships, {len(truth.open)} open, {len(truth.lost)} lost, {len(truth.ghosts)} ghosts, "
            f"{len(truth.excused)} excused{memory}; daemon {did}"
        )

    def _say(self, text: str) -> None:
        if self._talkative:
            print(f"{time.time() - self._begun:7.0f} s  {text}", file=sys.stderr, flush=True)

    # ── our own tasks ──

    def _begin(self, name: str, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(job)
        self._tasks[task] = name
        return task

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        self._must_go_on()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            self._tasks.pop(task, None)
            if not task.cancelled() and task.exception() is not None:
                raise Failed(f"a task of the soak ended: {task.exception()!r}") from task.exception()

    async def _wait(self, seconds: float) -> None:
        until = time.time() + seconds
        while (left := until - time.time()) > 0:
            self._must_go_on()
            await asyncio.sleep(min(1.0, left))

    def _must_go_on(self) -> None:
        for task, name in self._tasks.items():
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise Failed(f"{name} ended: {task.exception()!r}") from task.exception()

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _end_daemons(self) -> None:
        for daemon in self._daemons.values():
            with suppress(RuntimeError):  # it was not started
                daemon.send_signal(signal.SIGCONT)
                await daemon.stop()
