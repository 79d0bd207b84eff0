"""Plays the story with real processes, watches what comes of it, and judges. Whatever happens, nothing that it started remains."""

import asyncio
import base64
import hashlib
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from sfu_delegate.demo import livekit_server
from sfu_delegate.demo.daemon import DaemonProcess, DelegateApi, metric
from sfu_delegate.demo.livekit_server import LiveKitSfu
from sfu_delegate.demo.matrix import Account, Member
from sfu_delegate.demo.processes import Died, NeverHappened, until
from sfu_delegate.demo.screen import Column, Screen
from sfu_delegate.demo.sfu import KEY, SECRET, CallSfu, Ear, StandInSfu, Told
from sfu_delegate.demo.stand_in import StandIn
from sfu_delegate.demo.story import CAST, GRACE, IN_WORDS, JOIN_EVERY, LENGTH, Act, Outcome, Person, missing, times
from sfu_delegate.demo.synapse import Synapse
from sfu_delegate.sandbox.tokens import join_token

LOOK_AT_ROOM_EVERY = 0.4  # seconds
LOOK_AT_DELEGATIONS_EVERY = 1.0
INTERRUPTED = 130  # the exit code
DAEMON_LINES = 30  # of its log, where something went wrong
LOST = "sfu_delegate_events_lost_while_connected_total"
SLOT = "m.call#ROOM"

# The daemon's words in its log, for people. {why}: what the line adds.
_WORDS = {
    "delegated": "takes over {name}'s leave event",
    "verified": "has restarted it once, so it is there",
    "connected": "{name} is connected",
    "away": "{name} is away ({why}): coming back?",
    "gone": "{name} is gone",
    "ending": "sends {name}'s leave event",
    "sent": "has sent {name}'s leave event",
}


@dataclass(slots=True)
class Part:
    """One person of the story, while it is played."""

    person: Person
    account: Account
    token: str = field(repr=False)
    delay_id: str = field(default="", repr=False)
    delegation: str = ""
    management_token: str = field(default="", repr=False)
    shown: dict[str, Any] = field(default_factory=dict)  # the delegation, as the daemon showed it last
    announced_at: float | None = None  # by the homeserver's clock
    member: Member | None = None
    joined_at: float | None = None
    left_at: float | None = None
    reason: str = ""
    came: bool = False
    acted: bool = False
    scheduled: bool = False

    @property
    def identity(self) -> str:
        """On the SFU."""
        return f"{self.account.user_id}:{self.account.device_id}"

    @property
    def event(self) -> dict[str, Any]:
        """Its delayed event, as the daemon showed it last."""
        return dict((self.shown.get("delayed_events") or [{}])[0])

    def outcome(self) -> Outcome:
        """What the witnesses tell of it."""
        in_call = self.member is not None and self.member.in_call
        return Outcome(
            person=self.person,
            came=self.came,
            acted=self.acted,
            joined_at=self.joined_at,
            left_at=self.left_at,
            reason=self.reason,
            leave_at=None if self.member is None or in_call else self.member.since,
            in_call=in_call,
            announced_once=self.member is not None and self.member.since == self.announced_at,
            restarts=int(self.event.get("restarts") or 0),
            verified=bool(self.event.get("verified")),
            ended=str(self.event.get("outcome") or ""),
            scheduled=self.scheduled,
        )


class Show:
    """One performance."""

    def __init__(self, screen: Screen, homeserver: Synapse | StandIn, room_id: str, accounts: dict[str, Account], length: float) -> None:
        self._screen = screen
        self._homeserver = homeserver
        self._room_id = room_id
        self._length = length
        digest = hashlib.sha256(json.dumps([room_id, SLOT], separators=(",", ":"), ensure_ascii=False).encode()).digest()
        self.livekit_room = base64.b64encode(digest).decode().rstrip("=")
        self._parts = {person.name: self._part(person, accounts[person.name]) for person in CAST}
        self._by_identity = {part.identity: part for part in self._parts.values()}
        self._joined: asyncio.Queue[str] = asyncio.Queue()  # identities
        self._names: dict[str, str] = {}  # of delegations
        self._unnamed: list[dict[str, Any]] = []  # log lines of delegations whose answer has not come yet

    def _part(self, person: Person, account: Account) -> Part:
        identity = f"{account.user_id}:{account.device_id}"
        return Part(person, account, join_token(KEY, SECRET, time.time(), self.livekit_room, identity))

    # ── what is heard ──

    def told(self, told: Told) -> None:
        """A webhook came."""
        part = self._by_identity.get(told.identity)
        if part is None:
            if told.event in ("room_started", "room_finished"):
                self._screen.say(Column.SFU, told.event.replace("_", " "))
            return
        name = part.person.name
        match told.event:
            case "participant_joined":
                part.joined_at, part.left_at, part.reason = part.joined_at or told.at, None, ""
                self._screen.say(Column.SFU, f"{name} joined")
                self._joined.put_nowait(part.identity)
            case "participant_left" | "participant_connection_aborted":
                part.left_at, part.reason = told.at, told.reason
                self._screen.say(Column.SFU, f"{name} left: {told.reason}")
            case "track_published":
                self._screen.say(Column.SFU, f"{name} talks")

    def logged(self, entry: dict[str, Any]) -> None:
        """The daemon wrote a line."""
        if entry.get("event") == "delegation":
            self._unnamed.append(entry)
            self._show_log()
        elif entry.get("level") in ("warning", "error", "critical") and entry.get("event") != "config_risk":
            self._screen.say(Column.DAEMON, f"{entry.get('event')}: {entry.get('problem', '')}", style="yellow")

    def _show_log(self) -> None:
        waiting, self._unnamed = self._unnamed, []
        for entry in waiting:
            name = self._names.get(entry.get("delegation", ""))
            if name is None:
                self._unnamed.append(entry)
                continue
            what, why = str(entry.get("what", "")), str(entry.get("detail", ""))
            words = _WORDS.get(what, "{name}: " + what.replace("{", "").replace("}", "") + " {why}")
            self._screen.say(Column.DAEMON, words.format(name=name, why=why).rstrip())

    # ── what is played ──

    async def play(self, sfu: CallSfu, api: DelegateApi, daemon: DaemonProcess, http: aiohttp.ClientSession) -> int:
        """The whole story; 0 when everything is as it must be, else 1."""
        complete = self._length >= LENGTH
        self._screen.begin(self._length)
        async with asyncio.TaskGroup() as watchers:
            watching = [
                watchers.create_task(self._talk(sfu)),
                watchers.create_task(self._watch_room()),
                watchers.create_task(self._watch_delegations(api)),
            ]
            await self._perform(sfu, api)
            await self._settle()
            for task in watching:
                task.cancel()
        await self._look_at_delegations(api)
        await self._look_at_room()
        await self._look_at_schedules()
        lost = await metric(http, daemon.admin_url, LOST)
        outcomes, now = [part.outcome() for part in self._parts.values()], time.time()
        wrong = missing(outcomes, now, complete=complete, lost=lost)
        self._screen.summary(outcomes, now, wrong, lost, complete=complete)
        return 1 if wrong else 0

    async def _perform(self, sfu: CallSfu, api: DelegateApi) -> None:
        """Everything at its time. What would be later than the end is left out."""
        cues: list[tuple[float, Coroutine[Any, Any, None]]] = []
        try:
            for number, part in enumerate(self._parts.values()):
                if number * JOIN_EVERY < self._length:
                    cues.append((number * JOIN_EVERY, self._join(part, sfu, api)))
                if part.person.act is not None and part.person.at < self._length:
                    cues.append((part.person.at, self._act(part, part.person.act, sfu)))
            cues.sort(key=lambda cue: cue[0])
            for at, deed in [*cues]:
                await self._until(at)
                cues.pop(0)
                await deed
        finally:
            for _, deed in cues:
                deed.close()
        await self._until(self._length)

    async def _until(self, at: float) -> None:
        await asyncio.sleep(max(0.0, at - self._screen.elapsed))

    async def _join(self, part: Part, sfu: CallSfu, api: DelegateApi) -> None:
        """As clients do: schedule the leave event, say that one is in the call, connect to the SFU, delegate."""
        client, name, delay_ms = self._homeserver.client, part.person.name, part.person.delay_ms
        self._screen.say(Column.STAGE, f"{name} joins, and delegates a leave event with a delay of {delay_ms / 1000:g} s")
        part.came = True
        part.delay_id = await client.schedule_leave(part.account, self._room_id, delay_ms)
        await client.announce(part.account, self._room_id)
        await sfu.join(part.identity, part.token)
        status, shown = await api.delegate(part.token, self._homeserver.server_name, part.delay_id, delay_ms)
        if status not in (200, 201):
            raise Died(f"the daemon refused {name}'s delegation: {status} {shown.get('error', '')}")
        part.shown, part.delegation, part.management_token = shown, shown["id"], shown["management_token"]
        self._names[part.delegation] = name
        self._show_log()

    async def _talk(self, sfu: CallSfu) -> None:
        """Whoever is connected begins to talk."""
        while True:
            await sfu.talk(await self._joined.get())

    async def _act(self, part: Part, act: Act, sfu: CallSfu) -> None:
        self._screen.say(Column.STAGE, f"{part.person.name} {IN_WORDS[act]}")
        part.acted = True
        match act:
            case Act.LEAVE:
                await sfu.leave(part.identity)
            case Act.RECONNECT:
                await sfu.reconnect(part.identity, part.token)
            case Act.CRASH:
                await sfu.crash(part.identity)
            case Act.REMOVED:
                await sfu.remove(part.identity)
            case Act.CLOSE_TAB:
                await sfu.close_tab(part.identity)

    async def _settle(self) -> None:
        """Wait for the word of those who have just come, and for the leave events of those who are gone already, for a while."""

        async def settled() -> bool:
            return not any(self._is_open(part) for part in self._parts.values())

        with suppress(NeverHappened):  # the verdict will tell
            await until(settled, GRACE, "all leave events")

    def _is_open(self, part: Part) -> bool:
        if part.came and part.joined_at is None:
            return True
        if not part.person.leaves or not part.acted:
            return False
        if part.left_at is None:
            return self._length >= LENGTH
        return part.member is None or part.member.in_call or not part.event.get("outcome")

    # ── what is watched ──

    async def _watch_room(self) -> None:
        while True:
            await self._look_at_room()
            await asyncio.sleep(LOOK_AT_ROOM_EVERY)

    async def _watch_delegations(self, api: DelegateApi) -> None:
        while True:
            await self._look_at_delegations(api)
            await asyncio.sleep(LOOK_AT_DELEGATIONS_EVERY)

    async def _look_at_room(self) -> None:
        onlooker = next(iter(self._parts.values())).account
        members = await self._homeserver.client.members(onlooker, self._room_id)
        rows: dict[str, tuple[bool | None, str]] = {}
        for name, part in self._parts.items():
            part.member = members.get(part.account.member_key)
            if part.member is not None and part.announced_at is None:
                part.announced_at = part.member.since
            rows[name] = (None if part.member is None else part.member.in_call, _word(part))
        self._screen.members(rows)

    async def _look_at_delegations(self, api: DelegateApi) -> None:
        for name, part in self._parts.items():
            if not part.delegation or part.event.get("outcome"):
                continue
            before = int(part.event.get("restarts") or 0)
            status, shown = await api.show(part.delegation, part.management_token)
            if status != 200:
                continue
            part.shown = shown
            restarts = int(part.event.get("restarts") or 0)
            if restarts > max(1, before):
                self._screen.say(Column.DAEMON, f"has restarted {name}'s delayed event, {times(restarts - 1)} by now", style="bold")

    async def _look_at_schedules(self) -> None:
        for part in self._parts.values():
            if part.delay_id:
                part.scheduled = part.delay_id in await self._homeserver.client.delayed_events(part.account)


def _word(part: Part) -> str:
    outcome = part.outcome()
    if part.person.leaves and outcome.delay is not None:
        return f"{max(0.0, outcome.delay):.1f} s after the SFU's word"
    restarts = outcome.restarts - 1
    return f"restarted {times(restarts)}" if restarts > 0 else ""


# ── the stage ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _set_up_and_play(*, synapse: bool, length: float, plain: bool, directory: Path) -> int:
    async with AsyncExitStack() as stage:
        homeserver: Synapse | StandIn = Synapse(directory / "synapse") if synapse else StandIn()
        binary = livekit_server.binary()
        titles = (livekit_server.TITLE if binary else StandInSfu.title, homeserver.title)
        screen = stage.enter_context(Screen(plain=plain, sfu=titles[0], homeserver=titles[1]))
        screen.say(Column.STAGE, f"starts {titles[1]}{' (some seconds)' if synapse else ''}, {titles[0]} and the daemon")
        await stage.enter_async_context(homeserver)
        accounts = {person.name: await homeserver.register(person.name) for person in CAST}
        room_id = await homeserver.call_room(list(accounts.values()))
        show = Show(screen, homeserver, room_id, accounts, length)
        ear = await stage.enter_async_context(Ear(show.told))
        # Each must know where the other is before it starts.
        sfus = {"demo": {"url": "ws://127.0.0.1:1", "keys": {KEY: SECRET}}}
        served = [{"name": homeserver.server_name, "url": homeserver.url}]
        daemon = DaemonProcess({"sfus": sfus, "homeservers": served}, directory / "daemon", on_entry=show.logged)
        hooks = [daemon.webhook_url, ear.url]
        made = LiveKitSfu(binary, show.livekit_room, hooks, directory / "livekit") if binary else StandInSfu(show.livekit_room, hooks)
        sfu: LiveKitSfu | StandInSfu = await stage.enter_async_context(made)
        sfus["demo"]["url"] = sfu.url
        await daemon.start()
        stage.push_async_callback(daemon.stop)
        http = await stage.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)))
        result = await show.play(sfu, DelegateApi(daemon.public_url, http), daemon, http)
        if await daemon.stop() != 0:
            screen.console.print("missing: the daemon did not stop with exit code 0")
            result = 1
        if result != 0:
            screen.console.print("\n".join(["The daemon's last words:", *daemon.log_lines[-DAEMON_LINES:]]), markup=False)
        return result


async def demonstrate(*, synapse: bool, length: float, plain: bool) -> int:
    """The demonstration from begin to end; its exit code. SIGINT, SIGTERM and SIGHUP end it, and everything is cleaned up all the same."""
    directory = Path(tempfile.mkdtemp(prefix="sfu-delegate-demo-"))
    playing = asyncio.create_task(_set_up_and_play(synapse=synapse, length=length, plain=plain, directory=directory))
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        if not interrupted:  # a second Ctrl-C must not stop the cleaning up, which takes some seconds at most
            interrupted = True
            playing.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    try:
        return await playing
    except asyncio.CancelledError:
        Screen(plain=True).console.print("Ended before its end. Everything that was started has been stopped and removed.")
        return INTERRUPTED
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def show(*, synapse: bool, length: float, plain: bool) -> int:
    """`demonstrate`, with plain words for what can go wrong."""
    try:
        return asyncio.run(demonstrate(synapse=synapse, length=length, plain=plain))
    except* (Died, NeverHappened, aiohttp.ClientError, TimeoutError) as errors:
        console = Screen(plain=True).console
        for error in _leaves(errors):
            console.print(f"The demonstration has failed: {error or type(error).__name__}", markup=False)
    return 1


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
