"""One soak from beginning to end: start everything, let people live and things fail, let everybody leave, wait until all has ended, and report."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
from sfu_delegate.demo.daemon import DaemonProcess, DelegateApi
from sfu_delegate.demo.sfu import KEY, SECRET
from sfu_delegate.sandbox.homeserver import HomeserverModel
from sfu_delegate.sandbox.server import SandboxHomeserver, SandboxSfu
from sfu_delegate.sandbox.sfu import SfuModel

from tests.e2e.daemon_process import config_for
from tests.soak import faults
from tests.soak.disturbances import Disturbances
from tests.soak.faults import seeded
from tests.soak.people import Person, World
from tests.soak.report import Json, Seen, report
from tests.soak.settings import ENDING_WITHIN, HOMESERVERS, Settings, daemon_config
from tests.soak.truth import Harm, Truth
from tests.soak.watch import Log, Memory, Sample, memory_of, metrics_of, read_database, unfinished

LOOK_EVERY = 0.25  # seconds
MEMORY_EVERY = 5.0
TELL_EVERY = 30.0
MOST_TOLD = 20  # excused harms while it runs; all are in the report
QUIET_FROM = 2 / 3  # of the time: from here on the daemon is frozen now and then, and not killed, so that its memory's course shows
SETTLE = 2.0  # seconds after the last end, for answers under way
CLIENT_TIMEOUT = 15.0


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
            for kind in HOMESERVERS:
                homeserver = SandboxHomeserver(HomeserverModel(kind.name, limit=kind.limit, seed=self._settings.seed + len(self._homeservers)))
                self._homeservers[kind.name] = await open_now.enter_async_context(homeserver)
            urls = [(name, homeserver.url) for name, homeserver in self._homeservers.items()]
            self._daemon = DaemonProcess(config_for(self._sfu.url, urls, **daemon_config()), self._directory)
            model.urls = [self._daemon.webhook_url]
            models = [homeserver.model for homeserver in self._homeservers.values()]
            self._keeper = faults.Keeper(self._daemon, self._disturbances, models, time.time)
            self._log = Log(self._daemon, self._directory / "daemon.log")
            await self._keeper.start()
            open_now.push_async_callback(self._end_daemon)
            http = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=CLIENT_TIMEOUT), connector=aiohttp.TCPConnector(limit=200), cookie_jar=aiohttp.DummyCookieJar()
            )
            self._api = DelegateApi(self._daemon.public_url, await open_now.enter_async_context(http))
            open_now.push_async_callback(self._end_tasks)
            return await self._play()

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
        killing = self._begin("daemon", self._keeper.disturb(seeded(settings.seed, "daemon"), settings.kill_every))

        await self._wait(settings.seconds * QUIET_FROM)
        await self._end([killing])
        freezing = self._begin("daemon", self._keeper.freeze_only(seeded(settings.seed, "frozen"), settings.kill_every))
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
                if unfinished(await self._metrics()) == 0:
                    break
            await asyncio.sleep(pause)
        await asyncio.sleep(SETTLE)

    async def _metrics(self) -> dict[Sample, float]:
        try:
            return await metrics_of(self._daemon)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Failed(f"the daemon's metrics cannot be read: {type(error).__name__}") from error

    async def _conclude(self, left_at: float) -> Json:
        seconds_to_end = time.time() - left_at
        metrics = await self._metrics()
        await self._ask_for_stories()
        exit_code = await self._daemon.stop()
        self._log.read()
        self._truth.look()
        ends = {(name, id): event.end.value for name, server in self._homeservers.items() for id, event in server.model.events.items()}
        database = await asyncio.to_thread(read_database, self._directory / "delegate.db", ends)
        for harm in self._harms:
            harm.story["log"] = await asyncio.to_thread(self._log.of, harm.membership.delegation, harm.membership.identity)
        return report(
            Seen(
                settings=self._settings,
                begun=self._begun,
                seconds=time.time() - self._begun,
                seconds_to_end=seconds_to_end,
                exit_code=exit_code,
                world=self._world,
                truth=self._truth,
                disturbances=self._disturbances,
                keeper=self._keeper,
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
            pid = self._daemon.pid
            found = memory_of(pid)
            if found is not None and time.time() - self._keeper.born_at >= MEMORY_EVERY:  # not while it starts
                at = time.time() - self._begun
                self._memory.append(Memory(round(at, 1), pid, round(found[0], 1), found[1], len(self._truth.open)))
            await asyncio.sleep(MEMORY_EVERY)

    def _tell(self) -> None:
        truth, last = self._truth, self._memory[-1] if self._memory else None
        memory = "" if last is None else f", {last.rss_mb:.0f} MB, {last.files} files"
        did = ", ".join(f"{what} {times}" for what, times in self._keeper.did.items())
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

    async def _end_daemon(self) -> None:
        self._daemon.send_signal(signal.SIGCONT)
        await self._daemon.stop()
