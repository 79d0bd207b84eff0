"""The other side: the sandbox's homeserver and SFU with a fast skin, and the people who call, delegate and leave.

What is true is decided by the models. Webhooks are made, and signed, by the model of the SFU before they are sent; what its lists say changes only
when they are, so that no look tells the daemon what a webhook is to tell it.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from time import perf_counter, time
from typing import Any
from urllib.parse import parse_qsl

from sfu_delegate.livekit.names import ROOM_SLOT, identity, room_name
from sfu_delegate.sandbox.answer import Answer, Fate, json_answer
from sfu_delegate.sandbox.homeserver import End, HomeserverModel
from sfu_delegate.sandbox.sfu import SfuModel
from tests.integration.certificates import Certificates

from benchmarks import wire
from benchmarks.wire import HOST, Asked, Flow, Given

SFU = "bench"
KEY = "benchkey"
SECRET = "the-secret-of-the-benchmarks-sfu-key"
PARALLEL = 32  # rooms whose webhooks are sent at once, and connections of clients
WEBHOOKS = "/webhooks/livekit"
DELEGATE = "/delegate_delayed_leave"
LAST_FOR_EVER = 10_000_000  # seconds that an empty room stays
LOOK_EVERY = 0.002  # seconds
_TWIRP = "/twirp/livekit.RoomService/"
_MANAGED = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/"


class Failed(Exception):
    """A scenario did not do what it has to do, so that its figures would mean nothing."""


@dataclass(slots=True)
class Person:
    """One user's device in one call."""

    matrix_room: str
    user: str
    device: str
    member: str
    room: str  # LiveKit's name of the call
    identity: str
    delay_id: str = field(default="", repr=False)


@dataclass(slots=True)
class Webhooks:
    """Webhooks as requests, with whom they are of; `lanes` are their numbers by room."""

    requests: list[bytes]
    people: list[Person]
    lanes: list[list[int]]

    def iterators(self) -> list[Iterator[int]]:
        """The lanes as `wire.send` takes them."""
        return [iter(lane) for lane in self.lanes]

    def shared(self) -> "Webhooks":
        """The same over PARALLEL connections, each for the rooms of some: where rooms are many and small, their connections would cost the most."""
        return Webhooks(self.requests, self.people, [list(chain.from_iterable(self.lanes[start::PARALLEL])) for start in range(PARALLEL)])


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the other side listens."""

    federation: int
    client: int
    sfu: int

    @property
    def server_name(self) -> str:
        """The homeserver's name."""
        return f"{HOST}:{self.federation}"


class World:
    """One homeserver, one SFU, and people. `residents` answers for rooms that are too many to be in the model: who is in a room, or None."""

    def __init__(self, ports: Ports, certificates: Certificates, *, seed: int = 1) -> None:
        self.ports = ports
        self.certificates = certificates
        self.homeserver = HomeserverModel(ports.server_name, seed=seed, limit=None, max_scheduled=1_000_000)
        self.sfu = SfuModel({KEY: SECRET}, seed=seed, queue_depth=10_000_000, queue_max_age=float("inf"))
        self.residents: Callable[[str], list[dict[str, Any]] | None] = lambda _: None
        self.looks = 0
        self.heard_at = 0.0  # when the homeserver was last asked for anything
        self._defect: Exception | None = None  # of this side, met while it answered
        self._began = time() - perf_counter()
        self._people = 0
        self._spare = self.homeserver.schedule(f"@spare:{ports.server_name}", "!spare", "m.call.member", "", 86_400_000, {}, self.now())

    def now(self) -> float:
        """Unix seconds that no step of the system clock moves."""
        return self._began + perf_counter()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Both listen, on loopback only."""
        servers: list[wire.Server] = []
        try:
            tls = self.certificates.server(HOST)
            servers.append(await wire.Server.start(self.guarded(self._ask_homeserver), self.ports.federation, tls))
            servers.append(await wire.Server.start(self.guarded(self._ask_homeserver), self.ports.client))
            servers.append(await wire.Server.start(self.guarded(self._ask_sfu), self.ports.sfu))
            yield
        finally:
            for server in servers:
                await server.close()

    # ── what the daemon asks ──

    def guarded(self, answer: Callable[[Asked], Given]) -> Callable[[Asked], Given]:
        """A defect of this side must not look like one of the daemon."""

        def guarded(asked: Asked) -> Given:
            try:
                return answer(asked)
            except Exception as error:
                self._defect = error
                return Given(500, {}, b"")

        return guarded

    def must_work(self) -> None:
        """Raises whatever went wrong on this side."""
        if self._defect is not None:
            raise self._defect

    async def until(self, holds: Callable[[], bool], within: float, what: str) -> None:
        """Wait until something holds. Raises Failed with `what` after `within` seconds."""
        deadline = perf_counter() + within
        while not holds():
            self.must_work()
            if perf_counter() > deadline:
                raise Failed(f"not within {within:g} s: {what}")
            await asyncio.sleep(LOOK_EVERY)

    def _ask_homeserver(self, asked: Asked) -> Given:
        now = self.heard_at = self.now()
        path, _, query = asked.target.partition("?")
        given = self.homeserver.request(
            asked.method, path, now, query=dict(parse_qsl(query)) if query else None, token=asked.token, body=asked.body, ip=HOST
        )
        return _given(given)

    def _ask_sfu(self, asked: Asked) -> Given:
        method = asked.target.removeprefix(_TWIRP)
        request = json.loads(asked.body or b"{}")
        if method == "ListParticipants":
            self.looks += 1
            there = self.residents(str(request.get("room")))
            if there is not None:
                known = self.sfu.look(str(request["room"]), self.now()).json()["participants"]
                return _given(json_answer(200, {"participants": there + known}))
        return _given(self.sfu.room_service(method, request, asked.token, self.now()))

    @property
    def restart_url(self) -> str:
        """A request that anybody may make: the restart of an event that is nobody's."""
        return f"http://{HOST}:{self.ports.client}{_MANAGED}{self._spare}/restart"

    # ── what has arrived ──

    @property
    def restarts(self) -> int:
        """Restarts that were carried out."""
        return self.homeserver.answers["restart", 200]

    @property
    def sends(self) -> int:
        """Sends that were carried out."""
        return self.homeserver.answers["send", 200]

    async def quiet(self, gap: float, within: float) -> None:
        """Wait until the homeserver was asked nothing for `gap` seconds. Raises Failed."""
        begun = self.now()
        await self.until(lambda: self.now() - max(begun, self.heard_at) >= gap, within, f"nothing is asked of the homeserver for {gap:g} s")

    def restarted(self, people: Sequence[Person]) -> int:
        """How many of their events were restarted."""
        return sum(bool(self.homeserver.events[person.delay_id].restarted_at) for person in people)

    def sent(self, people: Sequence[Person]) -> int:
        """How many of their events were sent by the daemon."""
        self.homeserver.tick(self.now())
        return sum(self.homeserver.events[person.delay_id].end is End.SENT for person in people)

    def pending(self, people: Sequence[Person]) -> int:
        """How many of their events have not ended."""
        self.homeserver.tick(self.now())
        return sum(self.homeserver.events[person.delay_id].end is End.PENDING for person in people)

    # ── people ──

    def populate(self, count: int, per_room: int) -> list[Person]:
        """People who will be in calls of `per_room`. The rooms exist on the SFU, and nobody is in them."""
        people = []
        name = self.homeserver.server_name
        for number in range(self._people, self._people + count):
            matrix_room = f"!room{(number - self._people) // per_room:06d}of{self._people}:{name}"
            user, device, member = f"@user{number:07d}:{name}", f"DEVICE{number:07d}", f"3f2a9c1e-0000-4000-8000-{number:012d}"
            people.append(Person(matrix_room, user, device, member, room_name(matrix_room, ROOM_SLOT), identity(user, device, member)))
        self._people += count
        for room in dict.fromkeys(person.room for person in people):
            self.open(room)
        return people

    def open(self, room: str) -> str:
        """A room that stays though nobody is in it; its sid."""
        return self.sfu.create_room(room, self.now(), LAST_FOR_EVER, LAST_FOR_EVER)

    def schedule(self, person: Person, delay: float) -> None:
        """The client schedules its leave event."""
        content: dict[str, Any] = {}
        key = f"_{person.user}_{person.device}"
        person.delay_id = self.homeserver.schedule(person.user, person.matrix_room, "m.call.member", key, round(delay * 1000), content, self.now())

    def delegation(self, person: Person, delay: float, port: int) -> bytes:
        """The request that delegates its leave event, which is scheduled for it."""
        self.schedule(person, delay)
        token = self.homeserver.openid_token(person.user, self.now())
        body = {
            "room_id": person.matrix_room,
            "slot_id": ROOM_SLOT,
            "openid_token": token,
            "member": {"id": person.member, "claimed_user_id": person.user, "claimed_device_id": person.device},
            "delay_id": person.delay_id,
            "delay_timeout": round(delay * 1000),
            "delay_cs_api_url": f"http://{HOST}:{self.ports.client}",
        }
        headers = {"Content-Type": "application/json", "Accept": "*/*", "User-Agent": "Mozilla/5.0", "Origin": "https://call.example.org"}
        return wire.request("POST", DELEGATE, f"{HOST}:{port}", headers, json.dumps(body, separators=(",", ":")).encode())

    def begin_countdown(self, person: Person) -> None:
        """Its event was scheduled only now."""
        event = self.homeserver.events[person.delay_id]
        event.scheduled_at = event.since = self.now()

    # ── webhooks ──

    def joined(self, people: Sequence[Person], port: int) -> Webhooks:
        """They join. Nobody sees it before `appear`."""
        made = self._webhooks(people, port, self._join)
        for person in people:
            self.sfu.rooms[person.room].sessions[person.identity].unlisted = True
        return made

    def _join(self, person: Person) -> None:
        self.sfu.join(person.room, person.identity, self.now(), active_after=0.0, name=person.user)

    def appear(self, person: Person) -> None:
        """From now on the SFU lists somebody who has joined."""
        self.sfu.rooms[person.room].sessions[person.identity].unlisted = False

    def left(self, people: Sequence[Person], port: int) -> Webhooks:
        """They leave. The SFU lists them until they `vanish`."""
        self.sfu.faults.ghosts = True
        try:
            return self._webhooks(people, port, lambda person: self.sfu.leave(person.room, person.identity, self.now()))
        finally:
            self.sfu.faults.ghosts = False

    def vanish(self, people: Sequence[Person]) -> None:
        """From now on the SFU does not list those who have left."""
        for person in people:
            self.sfu.rooms[person.room].ghosts.pop(person.identity, None)

    def tracks(self, people: Sequence[Person], each: int, port: int) -> Webhooks:
        """Each publishes so many tracks, by turns."""
        return self._webhooks(list(chain.from_iterable([people] * each)), port, self._publish)

    def _publish(self, person: Person) -> None:
        self.sfu.publish_track(person.room, person.identity, self.now())

    def _webhooks(self, people: Sequence[Person], port: int, happens: Callable[[Person], object]) -> Webhooks:
        """The webhooks of what happens to people one after another, signed by the SFU."""
        self.sfu.urls = [f"http://{HOST}:{port}{WEBHOOKS}"]
        try:
            for person in people:
                happens(person)
        finally:
            self.sfu.urls = []
        requests: list[bytes] = []
        whom: list[Person] = []
        lanes: dict[str, list[int]] = {}
        order: dict[str, list[Person]] = {}
        for person in people:
            order.setdefault(person.room, []).append(person)
        turns = {room: iter(there) for room, there in order.items()}
        # A room's webhooks come one after another, each when the one before was answered.
        while deliveries := self.sfu.due(self.now()):
            for delivery in deliveries:
                self.sfu.answered(delivery.ticket, 200, self.now())
                lanes.setdefault(delivery.room, []).append(len(requests))
                requests.append(wire.request("POST", WEBHOOKS, f"{HOST}:{port}", delivery.headers, delivery.body))
                whom.append(next(turns[delivery.room]))
        if len(requests) != len(people):
            raise Failed(f"{len(people)} things happened at the SFU, and it made {len(requests)} webhooks")
        return Webhooks(requests, whom, list(lanes.values()))

    async def deliver(self, webhooks: Webhooks, port: int, before: Callable[[int], object] | None = None) -> Flow:
        """Send webhooks as LiveKit does. Raises Failed for an answer that is not 200."""
        flow = Flow(webhooks.requests, self.now, before)
        await wire.send(flow, port, webhooks.iterators(), PARALLEL)
        return all_answered(flow, "webhooks")


def all_answered(flow: Flow, what: str) -> Flow:
    """The flow, if every answer was 200. Raises Failed."""
    if flow.refused:
        raise Failed(f"{flow.refused} of {len(flow.requests)} {what} were refused: {'; '.join(flow.refusals)}")
    return flow


def configuration(world: World, database: Path, listen: int, admin: int, more: Mapping[str, Any], exempt: bool) -> dict[str, Any]:
    """The daemon's configuration, as `serve-for-delegatebench` makes it, with `more` sections. `exempt`: from the homeserver's rate limit."""
    homeserver: dict[str, Any] = {
        "name": world.ports.server_name,
        "url": f"http://{HOST}:{world.ports.client}",
        "ca_file": str(world.certificates.ca_file),
        "allow_private_addresses": True,
    }
    if exempt:
        homeserver["rate_limited"] = False
    config: dict[str, Any] = {
        "listen": {"host": HOST, "port": listen},
        "admin": {"host": HOST, "port": admin},
        "database": f"sqlite:///{database}",
        "sfus": {SFU: {"url": f"ws://{HOST}:{world.ports.sfu}", "keys": {KEY: SECRET}}},
        "homeservers": [homeserver],
        "delegations": {"min_delay": "5s"},
    }
    for section, values in more.items():
        config[section] = {**config.get(section, {}), **values}
    return config


def _given(answer: Answer) -> Given:
    """A model's answer as the skin takes it. What is to hang is closed: nothing hangs here."""
    return Given(answer.status, answer.headers, answer.body if answer.fate is Fate.ANSWER else None, answer.delay)
