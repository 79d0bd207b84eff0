"""Start and stop of the daemon, and what connects its parts."""

import asyncio
import faulthandler
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, cast

import uvloop
from aiohttp import web

from sfu_delegate import __version__
from sfu_delegate.api.app import AdminServices, Phase, Public, Readiness, Services, Settings, admin_app
from sfu_delegate.api.listener import BACKLOG, Listener
from sfu_delegate.api.webhooks import IGNORED
from sfu_delegate.config import Config, ConfigInvalid, load, reloaded, warnings
from sfu_delegate.config import reloadable_changes as changes_of
from sfu_delegate.daemon import parts
from sfu_delegate.daemon.actions import Actions, Means, Sfu
from sfu_delegate.daemon.clock import Clock
from sfu_delegate.daemon.inbox import Inbox
from sfu_delegate.daemon.inspecting import Inspecting, Survey
from sfu_delegate.daemon.membership import Membership
from sfu_delegate.daemon.membership import Terms as MembershipTerms
from sfu_delegate.daemon.notify import Notifier, Progress
from sfu_delegate.daemon.sharing import Sharing, instance_name, meet
from sfu_delegate.delegation.lifecycle import RESTARTED
from sfu_delegate.delegation.model import Answered, DelayedEvent, Lane, Note, Presence, State, Task
from sfu_delegate.delegation.urgency import Limit
from sfu_delegate.engine import Engine, Limits, Step
from sfu_delegate.livekit.keys import KeyRing, SfuKey
from sfu_delegate.livekit.room_service import RoomService, SfuUnavailable, Trouble
from sfu_delegate.matrix.discovery import Homeservers
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.federation import Federation, Terms
from sfu_delegate.matrix.management import ManagementClient
from sfu_delegate.matrix.openid import OpenId, OpenIdRefused
from sfu_delegate.matrix.service import ApplicationService
from sfu_delegate.observe import logs
from sfu_delegate.observe.logs import frames
from sfu_delegate.observe.metrics import Metrics
from sfu_delegate.sealing import KeyFileRefused, Sealer, load_or_create
from sfu_delegate.store.base import GOES_ON, DatabaseInUse, DatabaseTooNew, Disk, Store, StoreUnavailable
from sfu_delegate.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from sfu_delegate.store.postgresql import PostgresStore

KEPT_WITHIN = 2.0  # seconds for what waits to be kept, beyond `timeouts.shutdown`
SWITCH_INTERVAL = 0.0001  # seconds that a thread may keep the interpreter from another one
# Nearly nothing here is in cycles, and with Python's default of 700 new objects looking for them took a tenth of all processor time.
GC_THRESHOLD = (20_000, 20, 50)
CLOSED_WITHIN = 1.0  # seconds for each of the listeners, and for the database
ROOMS_AT_A_TIME = 32  # that are made on one SFU
UNNAMED = 10  # times what one user may delegate without a word of the homeserver: all together whose user is not known
FORCED_AFTER = 6.0  # seconds beyond `timeouts.shutdown`, when the process ends whatever hangs
RELOADED_WITHIN = 5.0  # seconds that a reload waits for the engine to take it over
MOST_TROUBLES = 3  # that the status line names

log = logs.get_logger(__name__)


class CannotStart(Exception):
    """The daemon cannot start; the text is a sentence for the operator, with the remedy."""


class _Observer:
    """Tells the metrics and the log what happened."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.survey = Survey()
        self._late: set[str] = set()  # homeservers where restarts will be late

    def step(self, step: Step, inputs: int, seconds: float, now: float) -> None:
        """See `inbox.Observer`."""
        self._metrics.committed(inputs, seconds)
        rows = {}
        for change in step.changes:
            at = change.given.answered_at if type(change.given) is Answered else None  # not when it was kept
            self._metrics.change(change.old, change.new, now if at is None else at)
            rows[change.new.id] = change.new
        if step.notes:
            told = [_line(rows[note.event], note) for note in step.notes if note.event in rows and note.what != RESTARTED]
            logs.lines(__name__, "delegation", told, ours=_OUR_WORDS)

    def backlog(self, counted: dict[tuple[str, Lane], tuple[int, float]], now: float) -> None:
        """See `inbox.Observer`."""
        self.survey.backlog = counted
        self._metrics.backlog(counted, now)

    def waiting_since(self, departures: Mapping[str, float], now: float) -> None:
        """See `inbox.Observer`."""
        self._metrics.waiting_since(departures, now)

    def disk(self, disk: Disk | None) -> None:
        """See `inbox.Observer`."""
        self._metrics.disk(disk)

    def forecast(self, lateness: Mapping[str, float], rates: Mapping[str, tuple[Limit, float]]) -> None:
        """See `inbox.Observer`."""
        self.survey.lateness = lateness
        self._metrics.forecast(lateness, rates)
        over = {homeserver: 0.0 for homeserver in self._late if homeserver not in lateness}
        for homeserver, seconds in {**lateness, **over}.items():
            if (seconds > 0) is (homeserver in self._late):
                continue
            if seconds > 0:
                self._late.add(homeserver)
                limit, rate = rates[homeserver]
                log.warning("restarts_will_be_late", homeserver=homeserver, seconds=round(seconds, 1), limit=limit.value, rate=round(rate, 2))
            else:
                self._late.discard(homeserver)
                log.info("restarts_in_time_again", homeserver=homeserver)

    def store(self, *, works: bool) -> None:
        """See `inbox.Observer`."""
        self._metrics.store(works=works)


_OUR_WORDS = frozenset({"delegation", "what", "row"})


def _line(row: DelayedEvent, note: Note) -> dict[str, str | int]:
    line: dict[str, str | int] = {"delegation": row.delegation, "what": note.what, "row": row.id, "homeserver": row.homeserver}
    if note.what == "delegated":
        line |= {"sfu": row.sfu, "room": row.room, "identity": row.identity}  # the way from a person to a delegation
    else:
        line["detail"] = note.detail
    return line


class _Hooks:
    """Tells the metrics of webhooks, and the engine that the SFU is alive. See `api.services.Hooks`."""

    def __init__(self, metrics: Metrics, engine: Engine, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._engine = engine
        self._clock = clock
        self.on_acknowledged = metrics.on_acknowledged
        self.on_matrixrtc = metrics.on_matrixrtc
        self.on_delegation = metrics.on_delegation

    def on_webhook(self, sfu: str, event: str, result: str) -> None:
        """A webhook was answered."""
        self._metrics.on_webhook(sfu, event, result)
        if result == IGNORED:  # all others that are genuine are inputs
            self._engine.heard(sfu, self._clock())


class _Users:
    """Whose an OpenID token is; tells the metrics."""

    def __init__(self, openid: OpenId, metrics: Metrics) -> None:
        self._openid = openid
        self._metrics = metrics

    async def user(self, server_name: str, token: str, timeout: float, who: str) -> str:  # noqa: ASYNC109
        """See `api.services.UserCheck`."""
        began, result = perf_counter(), "unavailable"
        try:
            user = await self._openid.user(server_name, token, timeout, who)
            result = "ok"
        except OpenIdRefused:
            result = "refused"
            raise
        finally:
            self._metrics.openid_check(server_name, result, perf_counter() - began)
        return user


class _Rooms:
    """The SFUs, for those who want to join. A bounded number of rooms is made at a time, so that an SFU that hangs gets no pile of requests."""

    def __init__(self, room_service: RoomService, sfus: Callable[[], Mapping[str, Sfu]]) -> None:
        self._room_service = room_service
        self._sfus = sfus
        self._places: dict[str, asyncio.Semaphore] = {}

    async def create(self, sfu: str, room: str) -> None:
        """See `api.services.Rooms`."""
        there = self._find(sfu)
        places = self._places.setdefault(sfu, asyncio.Semaphore(ROOMS_AT_A_TIME))
        try:
            async with asyncio.timeout(there.timeout), places:
                await self._room_service.create_room(there.address, room, there.timeout)
        except TimeoutError:
            raise SfuUnavailable(f"The SFU did not answer within {there.timeout:g} s.", Trouble.TIMEOUT) from None

    def named(self, url: str) -> str | None:
        """See `api.services.Rooms`. A slash at the end makes no other URL, and neither do capitals in its host."""
        wanted = _plain_url(url)
        return next((name for name, sfu in self._sfus().items() if _plain_url(sfu.address.url) == wanted), None)

    def access(self, sfu: str) -> tuple[str, SfuKey]:
        """See `api.services.Rooms`."""
        address = self._find(sfu).address
        return address.url, SfuKey(sfu, address.key, address.secret)

    def _find(self, sfu: str) -> Sfu:
        there = self._sfus().get(sfu)
        if there is None:
            raise SfuUnavailable("It is not configured any more.", Trouble.CONNECTION)
        return there


def _plain_url(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme.lower()}{separator}{host.lower()}{slash}{path}".rstrip("/")


class Daemon:
    """One running daemon. `reread` gives the configuration anew, for SIGHUP."""

    def __init__(self, config: Config, reread: Callable[[], Config] | None = None) -> None:
        self.config = config
        self._reread = reread
        self._settings = _settings(config)
        self._public: Listener | None = None
        self._admin: web.AppRunner | None = None
        self._phase = Phase.STARTING
        self._probe: asyncio.Future[None] | None = None
        self._reconfiguring: asyncio.Future[None] | None = None
        self._progress = Progress(lambda: self.inbox.progress, lambda: self.inbox.where)
        self._socket: _UnixSocket | None = None
        self.public_port = 0
        self.admin_port = 0

    async def start(self) -> None:
        """Open the database, bind the listeners, and go. Raises CannotStart."""
        config = self.config
        try:
            keys = config.encryption_keys() or load_or_create(config.key_file)
            self._sealer = Sealer(keys)
            self._store = await asyncio.to_thread(_opened, config)
        except (DatabaseInUse, DatabaseTooNew, StoreUnavailable, KeyFileRefused) as error:
            raise CannotStart(_of_start(error)) from error
        self._egress = Egress.open(connect_timeout=config.timeouts.connect)
        try:
            await self._wire(config)
        except (StoreUnavailable, ValueError) as error:  # ValueError: a file that changed after it was checked, say
            await self._unwire()
            raise CannotStart(_of_start(error)) from error
        except BaseException:
            await self._unwire()
            raise
        try:
            await self._listen(config)
        except BaseException:
            await self.stop()
            raise

    async def _unwire(self) -> None:
        await self._egress.aclose()
        self._store.close()

    async def _wire(self, config: Config) -> None:
        clock = self.clock = Clock()
        shared = cast("PostgresStore", self._store) if self._store.shared else None
        if shared is not None:
            agrees = await asyncio.to_thread(meet, shared, clock)
        else:
            agrees = clock.agrees_with(await asyncio.to_thread(self._store.clock_mark))
        if not agrees:
            log.warning("clock_was_set", consequence="all delayed events are restarted soon, since their countdowns are not known")
        recovered = await asyncio.to_thread(self._store.recover, clock(), config.policy(), clock_unsure=not agrees)
        await asyncio.to_thread(self._store.save_clock_mark, clock.mark)
        await self._compare_keys()

        self.homeservers = Homeservers(parts.rules(config), self._egress, clock)
        self.client = ManagementClient(self._egress, clock)
        self._room_service = RoomService()
        self._tls = parts.federation_tls(config)
        self._federation = Federation(self._terms, self._egress, clock)
        self._service = ApplicationService(self._egress, clock)
        self._openid = OpenId(self._federation, clock, cache=lambda: self.config.matrixrtc.openid_cache)
        self.metrics = Metrics(self._label)
        self.metrics.tls_verified.set(1 if config.federation.verify_tls else 0)
        self.metrics.known((homeserver.name for homeserver in config.homeservers), config.sfus)
        self.metrics.watch_clock(clock.behind)
        self.keys = KeyRing(parts.keys(config))
        random = Random()  # noqa: S311 — for jitter
        self.engine = await asyncio.to_thread(
            Engine,
            self._store,
            config.policy(),
            _limits(config),
            random,
            in_flight=self._in_flight,
            looks_in_flight=self._looks_in_flight,
            limited=self._limited,
        )
        self.metrics.watch_states(lambda: dict(self.engine.states))  # a copy at once: the engine goes on in its thread
        self.metrics.watch_late(lambda: dict.fromkeys(self.config.sfus, 0) | dict(self.engine.late))
        reach = Means(self.homeservers, self.client, self._service, self._room_service, self._sealer, parts.sfus(config), config.timeouts.request)
        sharing = None if shared is None else Sharing(self.engine, shared, clock)
        self.metrics.watch_instances(lambda: 1 + len(self.engine.instances))
        observer = _Observer(self.metrics)
        self.inbox = Inbox(self.engine, clock, self._carry_out, observer, config.limits.inbox, sharing)
        self.actions = Actions(reach, clock, self.inbox.hand_in, self.metrics)
        self.metrics.watch_conditions(self._conditions)
        store = self._store
        self.inspecting = Inspecting(
            lambda: self.config,
            self.engine,
            store,
            self.metrics,
            observer.survey,
            self.actions.conditions,
            clock,
            instance=_name(config) if store.shared else "",
            label=self._label,
            limited=self._limited,
        )
        self._membership = Membership(
            self._membership_terms,
            lambda work: self.inbox.in_thread(lambda: work(store)),
            self.homeservers,
            self._service,
            self._room_service,
            clock,
            self.metrics,
            random,
        )
        self.loop_task = asyncio.create_task(self.inbox.run())
        self._membership_task = asyncio.create_task(self._membership.run())
        log.info("started", version=__version__, database=self._store.name, delegated=sum(self.engine.states.values()), taken_up=recovered)

    async def _compare_keys(self) -> None:
        """Can this process open what was last sealed in the database?"""
        known = await asyncio.to_thread(self._store.keys_mark)
        ours = self._sealer.fingerprints
        if known is not None and known not in ours:
            log.error(
                "encryption_keys_differ",
                consequence="management tokens, and clients' tokens, that were made with the key that was last in use are good for nothing here",
                remedy="give `encryption` the keys that this database was written with; of several instances all need the same",
            )
        if known != ours[0]:
            await asyncio.to_thread(self._store.save_keys_mark, ours[0])

    async def _listen(self, config: Config) -> None:
        services = Services(
            port=self.inbox,
            keys=self.keys,
            homeservers=self.homeservers,
            management=self.client,
            openid=_Users(self._openid, self.metrics),
            service=self._service,
            admissions=self._membership,
            rooms=_Rooms(self._room_service, lambda: self.actions.reach.sfus),
            paths=config.matrixrtc_paths,
            label=self._label,
            sealer=self._sealer,
            settings=lambda: self._settings,
            hooks=_Hooks(self.metrics, self.engine, self.clock),
            log=log,
            stopping=lambda: self._phase is Phase.STOPPING,
        )
        admin = AdminServices(
            readiness=self._readiness,
            registry=self.metrics.registry,
            log=log,
            inspection=self.inspecting,
            port=self.inbox,
            probes=services.probes,
            token=config.admin.token.get_secret_value() if config.admin.token else None,
        )
        public = Public(services)
        sock = _bound(config.listen.host, config.listen.port, "listen")
        self._public = Listener(public.app, public.usual, log, closed_within=CLOSED_WITHIN)
        await self._public.start(sock)
        self.public_port = int(sock.getsockname()[1])
        self._admin = web.AppRunner(admin_app(admin), access_log=None, handle_signals=False, shutdown_timeout=CLOSED_WITHIN)
        await self._admin.setup()
        places = []
        if config.admin.tcp:
            sock = _bound(config.admin.host, config.admin.port, "admin")
            await web.SockSite(self._admin, sock, backlog=BACKLOG).start()
            self.admin_port = int(sock.getsockname()[1])
            places.append(f"{config.admin.host}:{self.admin_port}")
        if config.admin.socket is not None:
            self._socket = _bound_to(config.admin.socket)
            await web.SockSite(self._admin, self._socket.sock, backlog=BACKLOG).start()
            places.append(str(config.admin.socket))
        self._phase = Phase.RUNNING
        self.actions.check(parts.named(config), config.sfus)
        self.actions.check_services(parts.services(config))
        log.info("listening", public=f"{config.listen.host}:{self.public_port}", admin=", ".join(places))

    # ── while it runs ──

    def _carry_out(self, task: Task) -> None:
        self.actions.carry_out(task)

    async def _readiness(self, within: float) -> Readiness:
        """Whether the database really takes a write now, and who is in trouble; what is known of it where it does not answer in time."""
        trouble = self.inbox.trouble or ""  # one more write may work where a transaction does not
        try:
            async with asyncio.timeout(within):
                await asyncio.shield(self._probed())
        except StoreUnavailable as error:
            trouble = str(error)
        except TimeoutError:
            trouble = self.inbox.trouble or f"it does not answer within {within:g} seconds"
        conditions = self.actions.conditions
        homeservers = {name: conditions.get(("homeserver", name)) for name in parts.named(self.config)}
        # Of those that match a pattern, the ones in trouble: there may be many.
        homeservers |= {name: problem for (kind, name), problem in conditions.items() if kind == "homeserver" and problem}
        sfus = {name: conditions.get(("sfu", name)) for name in self.config.sfus}
        services = {name: conditions.get(("application_service", name)) for name in parts.services(self.config)}
        return Readiness(self._phase, trouble, homeservers, sfus, services)

    def _conditions(self) -> dict[tuple[str, str], str]:
        """Of SFUs that are configured, and of all homeservers: those that are not have a label of their own."""
        return {key: problem for key, problem in self.actions.conditions.items() if key[0] != "sfu" or key[1] in self.config.sfus}

    def _probed(self) -> "asyncio.Future[None]":
        """One write, under way for all who ask: those who have given up would otherwise leave theirs in the way of steps."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.ensure_future(self.inbox.in_thread(lambda: self._store.save_clock_mark(self.clock.mark)))
            self._probe.add_done_callback(lambda probe: probe.cancelled() or probe.exception())
        return self._probe

    def alive(self, seconds: float) -> bool:
        """Does the work go on, `seconds` after the last time that this was asked? See `Progress`."""
        if self._phase is not Phase.RUNNING:
            return True  # how long the end may take is seen to by `_end_by_force`
        before = self._progress.stuck_in
        alive = self._progress(seconds)
        if self._progress.stuck_in is not None and before is None:
            log.critical("no_progress", at=self.inbox.where, consequence="a watchdog, as systemd has, ends the process, to be started again")
        return alive

    def status(self) -> str:
        """How it is, in a line."""
        if self._phase is not Phase.RUNNING:
            return f"{self._phase.value.capitalize()}."
        states = dict(self.engine.states)  # a copy at once: the engine goes on in its thread
        events = {key: count for key, count in states.items() if key[1] != State.DONE}
        connected = sum(count for (_, _, presence), count in events.items() if presence == Presence.CONNECTED)
        said = f"{sum(events.values())} delayed events, {connected} of connected participants."
        if self._progress.stuck_in is not None:
            said = f"NO PROGRESS, in {self._progress.stuck_in}. {said}"
        if self.inbox.trouble is not None:
            said = f"DATABASE: {self.inbox.trouble} {said}"
        kinds = {"homeserver": "homeserver", "sfu": "SFU", "application_service": "application service at"}
        troubles = [f"{kinds[kind]} {name}: {problem}" for (kind, name), problem in self.actions.conditions.items() if problem]
        if more := troubles[MOST_TROUBLES:]:
            troubles[MOST_TROUBLES:] = [f"and {len(more)} more"]
        return f"{said} Trouble: {'; '.join(troubles)}." if troubles else said

    def _membership_terms(self) -> MembershipTerms:
        config = self.config
        return MembershipTerms(config.membership.enforce, config.membership.interval, config.timeouts.request, self.actions.reach.sfus)

    def _label(self, homeserver: str) -> str:
        rule = self.homeservers.rule_for(homeserver)
        return "(not configured)" if rule is None else rule.pattern

    def _terms(self, homeserver: str) -> Terms:
        """How a homeserver's federation API is reached."""
        return parts.federation_terms(self.config, self.homeservers, self._tls, homeserver)

    def _in_flight(self, homeserver: str) -> int:
        rule = self.homeservers.rule_for(homeserver)
        return 1 if rule is None else rule.max_in_flight

    def _limited(self, homeserver: str) -> bool | None:
        rule = self.homeservers.rule_for(homeserver)
        if rule is None or rule.limited is not None:
            return None if rule is None else rule.limited
        return False if rule.as_token else None

    def _looks_in_flight(self, sfu: str) -> int:
        return self.config.sfus[sfu].in_flight if sfu in self.config.sfus else 1

    def reload(self) -> None:
        """Take over what can be changed while running; a bad file leaves everything as it was."""
        try:
            if self._reread is None:
                return
            new = self._reread()
            _, needs_restart = changes_of(self.config, new)
            rules, keys, tls = parts.rules(new), parts.keys(new), parts.federation_tls(new)
            self.homeservers.replace_rules(rules)
            self.keys.replace(keys)
        except ConfigInvalid as error:
            for problem in error.problems:
                log.error("config_problem", problem=str(problem))
            log.error("config_not_reloaded", consequence="the configuration that was read before stays in force")
            self.metrics.reloads.labels("refused").inc()
            return
        except ValueError as error:
            log.error("config_not_reloaded", problem=str(error), consequence="the configuration that was read before stays in force")
            self.metrics.reloads.labels("refused").inc()
            return
        self.config = reloaded(self.config, new)
        self._settings = _settings(self.config)
        self._tls = tls
        self.metrics.tls_verified.set(1 if self.config.federation.verify_tls else 0)
        self.actions.reach.sfus = parts.sfus(self.config)
        self.actions.reach.timeout = self.config.timeouts.request
        self.inbox.most = self.config.limits.inbox
        self.metrics.known((homeserver.name for homeserver in self.config.homeservers), self.config.sfus)
        policy, limits = self.config.policy(), _limits(self.config)
        self._reconfiguring = asyncio.ensure_future(self.inbox.in_thread(lambda: self.engine.reconfigure(policy, limits)))
        self._membership.reconsider()
        self.actions.check(parts.named(self.config), self.config.sfus)
        self.actions.check_services(parts.services(self.config))
        self.metrics.reloads.labels("done").inc()
        logs.set_level("info")  # so that this line is seen whatever the level was, and will be
        log.info("config_reloaded", needs_restart=needs_restart)
        logs.set_level(self.config.log.level)

    async def reloaded(self) -> None:
        """Wait until the engine has taken over what `reload` has read; not for long, since a database that hangs holds it up."""
        if self._reconfiguring is not None:
            await asyncio.wait({self._reconfiguring}, timeout=RELOADED_WITHIN)

    async def stop(self) -> None:
        """Accept nothing more, finish what is in flight within `timeouts.shutdown`, and close the database: a few seconds more at the most.

        A database that hangs is left as it is: what was acknowledged is in it.
        """
        within = self.config.timeouts.shutdown
        until = asyncio.get_running_loop().time() + within
        self._phase = Phase.STOPPING
        log.info("stopping", in_flight=self.engine.in_flight)
        self.inbox.stop()
        self._membership_task.cancel()
        await asyncio.wait({self._membership_task})
        abandoned = await self.actions.finish(within)
        self.inbox.flush()
        left = max(0.0, until - asyncio.get_running_loop().time())
        done, _ = await asyncio.wait({self.loop_task}, timeout=left + KEPT_WITHIN)
        if not done:
            log.warning("not_everything_kept", reason=self.inbox.trouble or "the database takes too long")
            self.loop_task.cancel()
            await asyncio.wait({self.loop_task})
        await self._openid.aclose()  # whoever waits for a homeserver's word is answered before the listener closes
        if self._public is not None:
            await self._public.close()
        if self._admin is not None:
            await self._admin.cleanup()
        if self._socket is not None:
            self._socket.remove()
        self.inspecting.close()
        await self._federation.aclose()
        await self.homeservers.aclose()
        await self.client.aclose()
        await self._egress.aclose()
        await self._room_service.close()
        closed = await self.inbox.close(self._store.close, CLOSED_WITHIN)
        log.info("stopped", abandoned=abandoned, database_closed=closed)


def _bound(host: str, port: int, key: str) -> socket.socket:
    """A socket at the address that the configuration gives under `key`. Raises CannotStart."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise CannotStart(
            f"Cannot listen on {host}:{port}: {error.strerror}. Another program may use it; change `{key}.host` or `{key}.port`."
        ) from error
    return sock


class _UnixSocket(NamedTuple):
    """A Unix socket that we listen on."""

    sock: socket.socket
    path: Path
    inode: int

    def remove(self) -> None:
        """Take it away, unless another process has put its own there meanwhile."""
        with suppress(OSError):
            if self.path.stat().st_ino == self.inode:
                self.path.unlink()


def _bound_to(path: Path) -> _UnixSocket:
    """A Unix socket for the daemon's user and group; one that a process has left behind is replaced. Raises CannotStart."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            if _answers(path):
                raise CannotStart(f"Cannot listen on {path}: another process does. Stop that one first, or change `admin.socket`.")
            path.unlink()
        before = os.umask(0o117)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        return _UnixSocket(sock, path, path.stat().st_ino)
    except OSError as error:
        sock.close()
        raise CannotStart(
            f"Cannot listen on {path}: {error.strerror}. Its directory must exist and be writable for the daemon, and nothing else may be there; "
            "or change `admin.socket`."
        ) from error
    except CannotStart:
        sock.close()
        raise


def _answers(path: Path) -> bool:
    """Does somebody listen there?"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except OSError as error:
            return isinstance(error, TimeoutError | PermissionError | BlockingIOError)
        return True


# ── from the configuration to what each part takes ──


def _of_start(error: Exception) -> str:
    """What went wrong, for somebody whose daemon does not start."""
    return str(error).removesuffix(GOES_ON).rstrip()


def _name(config: Config) -> str:
    return instance_name(config.postgresql.instance, config.listen.port)


def _opened(config: Config) -> Store:
    if not config.is_postgresql:
        return SqliteStore(config.database_path)
    from sfu_delegate.store.postgresql import PostgresStore

    given = config.postgresql
    return PostgresStore(
        config.database,
        password=given.password.get_secret_value() if given.password else None,
        instance=_name(config),
        address=given.address,
        connect_timeout=given.connect_timeout,
    )


def _limits(config: Config) -> Limits:
    allowed = config.delegations
    return Limits(allowed.max_per_participant, allowed.max_per_user, UNNAMED * allowed.max_per_user, allowed.max_per_homeserver)


def _settings(config: Config) -> Settings:
    return Settings(
        max_body=config.limits.body,
        max_webhook_body=config.limits.webhook_body,
        min_delay=config.delegations.min_delay,
        max_delay=config.delegations.max_delay,
        max_events=config.delegations.max_events,
        verify_timeout=config.delegations.verify_timeout,
        allow_scoped_tokens=config.delegations.allow_scoped_tokens,
        request_timeout=config.timeouts.request,
        restart_at=config.restart.at,
        cors_origins=config.cors.origins,
        other_homeservers=config.matrixrtc.other_homeservers,
        trusted_proxies=config.listen.trusted_proxies,
        client_rate=config.limits.client_rate,
        client_burst=config.limits.client_burst,
        user_rate=config.limits.user_rate,
        user_burst=config.limits.user_burst,
    )


# ── the process ──


async def _serve(config: Config, path: Path) -> int:
    manager = Notifier(os.environ)
    try:
        return await _run(Daemon(config, lambda: load(path, os.environ)), manager)
    finally:
        manager.close()


async def _run(daemon: Daemon, manager: Notifier) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    reloading: set[asyncio.Task[None]] = set()

    def stop_soon() -> None:
        if not stop.is_set():
            stop.set()
            within = daemon.config.timeouts.shutdown + FORCED_AFTER
            manager.stopping(within + 2.0)  # for the force itself, which takes a second
            _end_by_force(within)

    def reload() -> None:
        manager.reloading()
        daemon.reload()
        task = asyncio.create_task(reload_is_over())
        reloading.add(task)
        task.add_done_callback(reloading.discard)

    async def reload_is_over() -> None:
        await daemon.reloaded()
        manager.ready()
        manager.status(daemon.status())

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop_soon)
    manager.status("Starting: opening the database.")
    starting = asyncio.create_task(manager.while_starting())
    try:
        await daemon.start()
    except CannotStart as error:
        log.error("cannot_start", problem=str(error))
        manager.status(f"Cannot start: {error}")
        return 1
    finally:
        starting.cancel()
    loop.add_signal_handler(signal.SIGHUP, reload)
    manager.ready()
    telling = asyncio.create_task(manager.while_running(daemon.alive, daemon.status))
    gc.freeze()  # what there is by now stays until the end
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({stopped, daemon.loop_task}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    broken = daemon.loop_task.done()
    if broken:
        why = daemon.loop_task.exception()
        at = frames(why) if why else []
        log.critical("engine_ended", error=type(why).__name__, at=at, consequence="the process ends, to be started again")
    stop_soon()
    await daemon.stop()
    telling.cancel()
    return 1 if broken else 0


def _end_by_force(after: float) -> None:
    """End the process in so many seconds, unless it has ended by then.

    A thread that hangs in the database, or in the resolver, cannot be stopped, and Python waits for all threads. Nothing is lost that a kill
    would not lose, which is nothing that was acknowledged.
    """

    def tell() -> None:
        log.critical("stop_forced", reason="something hangs, most likely the database", consequence="the process ends as if it was killed")

    def end() -> None:
        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        telling.join(1.0)  # the log may be what hangs
        os._exit(1)

    timer = threading.Timer(after, end)
    timer.daemon = True
    timer.start()


def run(config: Config, path: Path) -> int:
    """Serve until SIGTERM or SIGINT; the process's exit code."""
    logs.configure(level=config.log.level, format=config.log.format, instance=_name(config) if config.is_postgresql else "")
    with suppress(AttributeError, OSError, RuntimeError, ValueError):  # where standard error is no file
        faulthandler.enable()  # a watchdog ends the process by SIGABRT: then it tells where each thread is, without any values
    for risk in warnings(config):
        log.warning("config_risk", key=risk.key, problem=risk.problem, remedy=risk.remedy)
    # The engine's thread gives the interpreter away with every statement, and would wait 5 ms to get it back while there are requests.
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.set_threshold(*GC_THRESHOLD)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, path))
