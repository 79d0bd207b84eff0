"""Which checks there are for a configuration, and what they share. All ids are stable: programs go by them."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp

from sfu_delegate.config import Config, warnings
from sfu_delegate.daemon import parts
from sfu_delegate.daemon.actions import Sfu
from sfu_delegate.doctor.findings import CannotLook, Check, Finding, skipped
from sfu_delegate.doctor.looks import database, here
from sfu_delegate.doctor.looks import sfu as sfu_looks
from sfu_delegate.doctor.looks.ear import Ear
from sfu_delegate.doctor.looks.homeserver import HomeserverLook
from sfu_delegate.doctor.running import Shared, in_thread
from sfu_delegate.doctor.verdicts.clock import Offset, judge_clock, judge_own_clock
from sfu_delegate.doctor.verdicts.database import Inside, Speed, judge_connections, judge_keys, judge_space, judge_speed, judge_version
from sfu_delegate.doctor.verdicts.here import Daemon, Seen, judge_config, judge_daemon, judge_files, judge_public
from sfu_delegate.doctor.verdicts.homeserver import (
    Limit,
    Way,
    judge_delayed_events,
    judge_federation,
    judge_largest_delay,
    judge_limit,
    judge_service,
    judge_well_known,
)
from sfu_delegate.doctor.verdicts.sfu import judge_answers, judge_webhooks
from sfu_delegate.livekit.room_service import RoomService
from sfu_delegate.matrix.discovery import Homeservers
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.federation import Federation
from sfu_delegate.matrix.openid import OpenId
from sfu_delegate.matrix.service import ApplicationService
from sfu_delegate.operate.admin import CannotAsk, Refused, listener_of

ASKED_WITHIN: Final = 8.0  # seconds for one request to a homeserver, if timeouts.request is not less
BRIEF: Final = 10.0  # seconds for a check that looks at this machine, or asks once
LONG: Final = 25.0  # … and for one that asks several times, or waits for somebody
WEBHOOKS: Final = 36.0

Look = Callable[[], Awaitable[Finding]]


class Ground:
    """What the checks share: how everybody is asked, and what several of them need to know."""

    def __init__(self, config: Config, path: Path, egress: Egress, http: aiohttp.ClientSession, rooms: RoomService) -> None:
        self.config = config
        self.path = path
        self.egress = egress
        self.rooms = rooms
        self.now = time.time
        self.running = here.Running(listener_of(config.admin))
        self.health = Shared(lambda: here.ours_at(here.public_url(config), http, here.ASKED_WITHIN))
        self.daemon = Shared(lambda: here.daemon(config, self.running, self.health))
        self.postgresql = database.Postgresql(config) if config.is_postgresql else None
        self.inside: Shared[Inside] = Shared(lambda: in_thread(self._inside))
        self.ear = Shared(lambda: Ear(config).open())
        self.sfus = parts.sfus(config)
        self.homeservers = Homeservers(parts.rules(config), egress, self.now)
        tls = parts.federation_tls(config)
        self.federation = Federation(lambda name: parts.federation_terms(config, self.homeservers, tls, name), egress, self.now)
        openid = OpenId(self.federation, self.now, cache=lambda: 0.0)
        service = ApplicationService(egress, self.now)
        timeout = min(config.timeouts.request, ASKED_WITHIN)
        self.looks: dict[str, HomeserverLook] = {}
        for name in parts.named(config):
            if (rule := self.homeservers.rule_for(name)) is not None:
                self.looks[name] = HomeserverLook(name, rule, self.homeservers, egress, service, openid, self.now, timeout)
        self.clocks: dict[str, Shared[Offset | None]] = {}
        for name, sfu in self.sfus.items():
            self.clocks[f"SFU {name}"] = Shared(partial(sfu_looks.clock, sfu, egress, self.now))
        for name, look in self.looks.items():
            self.clocks[f"homeserver {name}"] = Shared(look.clock)

    async def aclose(self) -> None:
        """Stop what is under way, and listen no more."""
        shared: list[Shared[Any]] = [*self.clocks.values(), self.inside, self.daemon, self.health]
        for one in shared:
            await one.end()
        for look in self.looks.values():
            await look.aclose()
        if (ear := await self.ear.end()) is not None:
            await ear.close()
        await self.federation.aclose()
        await self.homeservers.aclose()

    def _inside(self) -> Inside:
        return self.postgresql.inside() if self.postgresql is not None else database.sqlite_inside(self.config.database_path)

    async def state(self) -> Daemon:
        """Does a daemon run?"""
        return (await self.daemon()).daemon

    async def known(self) -> Inside | None:
        """What is in the database, if it can be read."""
        try:
            return await self.inside()
        except CannotLook:
            return None


@asynccontextmanager
async def grounds(config: Config, path: Path) -> AsyncIterator[Ground]:
    """All that is needed, closed in the end. Raises ValueError for a file that changed after the configuration was checked."""
    async with AsyncExitStack() as stack:
        egress = Egress.open(connect_timeout=min(config.timeouts.connect, ASKED_WITHIN))
        stack.push_async_callback(egress.aclose)
        http = await stack.enter_async_context(aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()))
        rooms = await stack.enter_async_context(RoomService())
        ground = Ground(config, path, egress, http, rooms)
        stack.push_async_callback(ground.aclose)
        yield ground


def plan(ground: Ground) -> list[Check]:
    """All checks, in the order in which they are shown."""
    return [*_here(ground), *_database(ground), *_sfus(ground), *_homeservers(ground)]


# ── here ──


def _here(ground: Ground) -> Iterator[Check]:
    config = ground.config

    async def configuration() -> Finding:
        return judge_config((), warnings(config))

    async def files() -> Finding:
        return judge_files(await in_thread(here.secret_files, config, ground.path))

    async def keys() -> Finding:
        return judge_keys(await in_thread(database.keys, config), await ground.known())

    async def daemon() -> Finding:
        return judge_daemon(await ground.daemon())

    async def public() -> Finding:
        if not config.listen.port:
            raise CannotLook("listen.port is 0: it is another one at each start")
        answers, state, bound = await ground.health(), await ground.state(), None
        if answers is None and state is Daemon.NONE:
            try:
                await ground.ear()
            except OSError as error:
                bound = error
        return judge_public(here.public(config, answers, bound), state)

    async def clock() -> Finding:
        clocks = ground.clocks
        offsets = await asyncio.gather(*(shared() for shared in clocks.values()), return_exceptions=True)
        return judge_own_clock({name: None if isinstance(one, BaseException) else one for name, one in zip(clocks, offsets, strict=True)})

    for name, look in (("config", configuration), ("files", files), ("keys", keys), ("daemon", daemon), ("public", public)):
        yield Check(name, "", 2 * BRIEF, look)
    yield Check("clock", "", LONG, clock)


# ── the database ──


def _database(ground: Ground) -> Iterator[Check]:
    config, postgresql = ground.config, ground.postgresql

    async def write() -> Finding:
        speed: Callable[[], Speed] = postgresql.speed if postgresql is not None else partial(database.sqlite_speed, config.database_path)
        return judge_speed(await in_thread(speed))

    async def version() -> Finding:
        return judge_version(await ground.inside(), *await in_thread(database.schema_versions))

    async def space() -> Finding:
        if postgresql is not None:
            return judge_space((await ground.inside()).size, None, 0.0, "")
        size, free, total = await in_thread(database.sqlite_space, config.database_path)
        return judge_space(size, free, total, "the database takes ")

    async def connections() -> Finding:
        from sfu_delegate.store.postgresql import CONNECTIONS

        return judge_connections(await ground.inside(), CONNECTIONS)

    yield Check("database.write", "", 2 * BRIEF, write)
    yield Check("database.version", "", 2 * BRIEF, version)
    yield Check("database.space", "", 2 * BRIEF, space)
    if postgresql is not None:
        yield Check("database.connections", "", 2 * BRIEF, connections)


# ── SFUs ──


def _sfus(ground: Ground) -> Iterator[Check]:
    for name, sfu in ground.sfus.items():
        yield Check("sfu.answers", name, LONG, partial(_sfu_answers, ground, sfu))
        yield Check("sfu.clock", name, BRIEF, partial(_clock, ground, f"SFU {name}", "SFU"))
        yield Check("sfu.webhooks", name, WEBHOOKS, partial(_webhooks, ground, sfu))


async def _sfu_answers(ground: Ground, sfu: Sfu) -> Finding:
    return judge_answers(*await sfu_looks.keys(ground.config, sfu, ground.rooms))


async def _clock(ground: Ground, name: str, kind: str) -> Finding:
    return judge_clock(await ground.clocks[name](), kind)


async def _webhooks(ground: Ground, sfu: Sfu) -> Finding:
    config, seen = ground.config, await ground.daemon()
    wanted = sfu_looks.wanted(config, sfu.address.name)
    ear = None
    if seen.daemon is Daemon.HIDDEN:
        return skipped("a daemon seems to run that cannot be asked whether they come", wanted.remedy)
    if seen.daemon is Daemon.NONE:
        ear = await _ear(ground, seen, wanted.remedy)
    inside = await ground.known() if config.is_postgresql else None
    others = max(0, (inside.others if inside is not None else 0) - (seen.daemon is Daemon.RUNS))
    running = ground.running if seen.daemon is Daemon.RUNS else None
    return judge_webhooks(await sfu_looks.webhooks(sfu, ground.rooms, running=running, ear=ear, now=ground.now, others=others), wanted)


async def _ear(ground: Ground, seen: Seen, remedy: str) -> Ear:
    """Listens in the daemon's place. Raises CannotLook."""
    listen = ground.config.listen
    if not listen.port:
        raise CannotLook("no daemon runs, and listen.port is 0: webhooks can come nowhere", remedy)
    if await ground.health() is not None:
        raise CannotLook(f"no daemon runs that could be asked ({seen.trouble}), and another program holds {listen.host}:{listen.port}", remedy)
    try:
        return await ground.ear()
    except OSError as error:
        why = (error.strerror or "an error").lower()
        raise CannotLook(f"no daemon runs, and {listen.host}:{listen.port} cannot be listened at in its place: {why}", remedy) from None


# ── homeservers ──


def _homeservers(ground: Ground) -> Iterator[Check]:
    for homeserver in ground.config.homeservers:
        if "*" in homeserver.name:
            yield Check("homeserver.reachable", homeserver.name, BRIEF, _pattern)
    for name, look in ground.looks.items():
        checks: Mapping[str, tuple[float, Look]] = {
            "reachable": (LONG, look.reachable),
            "clock": (LONG, partial(_clock, ground, f"homeserver {name}", "homeserver")),
            "delayed_events": (LONG, partial(_delayed_events, look)),
            "largest_delay": (LONG, partial(_largest_delay, ground, look)),
            "rate_limit": (LONG, partial(_limit, ground, look)),
            "application_service": (LONG, partial(_service, ground, look)),
            "federation": (LONG, partial(_federation, ground, look)),
            "well_known": (LONG, partial(_well_known, ground, look)),
        }
        for what, (within, one) in checks.items():
            yield Check(f"homeserver.{what}", name, within, one)


async def _pattern() -> Finding:
    return skipped("it is a pattern, and no homeserver", "to have one of them looked at, give it an entry of its own")


async def _delayed_events(look: HomeserverLook) -> Finding:
    return judge_delayed_events(await look.offered())


async def _largest_delay(ground: Ground, look: HomeserverLook) -> Finding:
    return judge_largest_delay(await look.capability(), ground.config.delegations.min_delay)


async def _limit(ground: Ground, look: HomeserverLook) -> Finding:
    rule = ground.homeservers.rule_for(look.name)
    service = rule is not None and rule.as_token is not None
    if rule is not None and rule.limited is False:
        return judge_limit(Limit(Way.GIVEN, service, False))
    seen = await ground.daemon()
    if seen.daemon is Daemon.RUNS:
        try:
            return judge_limit(await ground.running.limit(look.name, service=service))
        except (CannotAsk, Refused) as cannot:
            raise CannotLook(f"the daemon, which knows, does not tell it: {str(cannot).rstrip('.')}") from None
    await _must_not_disturb(ground, seen, look.name)
    return judge_limit(await look.limit())


async def _must_not_disturb(ground: Ground, seen: Seen, name: str) -> None:
    """Measuring uses up what a daemon may need for a moment. Raises CannotLook where there may be one."""
    if seen.daemon is not Daemon.NONE:
        raise CannotLook("a daemon seems to run, and measuring would use up what it may need")
    inside = await ground.known()
    if inside is None:
        raise CannotLook("the database cannot be read: there may be delegations, for which measuring would use up what they need")
    if inside.others:
        raise CannotLook("other instances are at work, and measuring would use up what they may need", "run this beside one of them")
    if events := inside.open_events.get(name, 0):
        raise CannotLook(
            f"there are {events} delegated events for the daemon to look after when it starts, and measuring would use up what it needs then",
            "start the daemon, and run this again: then it is the daemon that is asked",
        )


async def _service(ground: Ground, look: HomeserverLook) -> Finding:
    return judge_service(await look.service(daemon=await ground.state() is not Daemon.NONE))


async def _federation(ground: Ground, look: HomeserverLook) -> Finding:
    return judge_federation(await look.federation(), needed=ground.config.matrixrtc.enabled)


async def _well_known(ground: Ground, look: HomeserverLook) -> Finding:
    daemon = await ground.state() is not Daemon.NONE
    return judge_well_known(await look.well_known(), daemon=daemon, standalone=ground.config.matrixrtc.enabled)
