"""What one input costs: SQL statements and calls, which come out the same on every machine and in every run. No seconds.

The tables below are what was measured. A change that makes something cost more has to change its line, and so says that it does; one that makes it
cost less should, or nobody notices when it is given away again. How long it all takes is what `make bench` is for.
"""

import asyncio
import gc
import json
import os
import re
import selectors
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from types import CodeType, FrameType, SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import sfu_delegate
from prometheus_client import CollectorRegistry
from sfu_delegate.api.app import Public
from sfu_delegate.api.listener import Listener, _Connection
from sfu_delegate.daemon.inbox import Inbox
from sfu_delegate.daemon.serve import _Hooks
from sfu_delegate.delegation.model import (
    Accept,
    Action,
    Answered,
    DelayedEvent,
    Input,
    Listed,
    Looked,
    NewEvent,
    OnEnd,
    Room,
    Seen,
    Session,
    Sighting,
    Verdict,
)
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.replies import Accepted, Reply, Touched
from sfu_delegate.engine import Engine, Limits, Step
from sfu_delegate.matrix import keep_alive
from sfu_delegate.matrix.keep_alive import IDLE_LIFE, KeepAliveClient
from sfu_delegate.observe.metrics import Metrics
from sfu_delegate.store.base import Transaction
from sfu_delegate.store.sqlite import SqliteStore

from tests.engine_port import KEY, SERVER, Bench
from tests.rows import HOMESERVER, SFU, row
from tests.webhook_requests import PATH, signature

# ── what may be spent ──

MARGIN = 1.04
"""By how much more calls there may be than in the tables, for other versions of Python and of libraries. Not statements: those are exact.

Measured with Python 3.11. 3.12 and 3.13 make up to an eighth fewer calls of functions in Python, since comprehensions are none there, and the same
number of calls of built-in ones.
"""

BATCH = 16


class Calls(NamedTuple):
    """For one input."""

    python: float  # of functions in Python; generators count each time that they go on
    builtin: float  # of built-in functions and methods


class Budget(NamedTuple):
    """For a batch of BATCH inputs of one kind, each about another room."""

    statements: int  # of SQL, for all of them together, with BEGIN and COMMIT; one that is run for many rows counts for each
    calls: Calls


ENGINE = {
    "a webhook about nobody who delegated": Budget(3, Calls(11.4, 10.6)),
    "a delegation, with the claim of its first restart": Budget(52, Calls(119.4, 91.4)),
    "a delegation is confirmed": Budget(35, Calls(58.5, 47.6)),
    "joined": Budget(36, Calls(54.6, 42.6)),
    "the claim of a look": Budget(22, Calls(17.7, 12.9)),
    "a look that shows what is known": Budget(35, Calls(100.6, 105.3)),
    "the claim of a restart": Budget(23, Calls(35.6, 28.6)),
    "a restart is answered": Budget(34, Calls(31.8, 32.2)),  # with a line of history for each, as its delay is long
    "left, which a look is to check": Budget(52, Calls(70.4, 62.6)),
    "a look that shows a departure, with the claim of its send": Budget(83, Calls(153.6, 137.1)),
    "left, believed at once, with the claim of its send": Budget(52, Calls(91.3, 76.5)),
    "a send is answered": Budget(34, Calls(37.8, 32.2)),
}

PLANNED = Calls(6.0, 7.0)
"""For each delayed event of a homeserver whose restarts are planned anew: the one cost that grows with the number of rows, and has a limit of its
own (`engine.PLANNED_MOST`). It takes one statement."""

EDGES = {
    "a webhook that does not matter": Calls(56.0, 99.0),
    "a webhook that matters, without the engine": Calls(66.0, 104.0),
    "a delegation, without the engine and the homeserver": Calls(117.0, 117.0),
    "a request to a homeserver": Calls(39.0, 54.0),
}


# ── counting ──

_PACKAGE = str(Path(sfu_delegate.__file__).parent) + os.sep
_CHECKOUT = str(Path(__file__).parents[2]) + os.sep
_FOREIGN = (str(Path(asyncio.__file__).parent) + os.sep, str(Path(__file__).parents[1]) + os.sep, selectors.__file__)


@dataclass
class Count:
    """The calls in this thread within `with`: the package's and all that those bring about, but not what the event loop and tests do on their own."""

    python: Counter[CodeType] = field(default_factory=Counter)
    builtin: Counter[tuple[CodeType, str]] = field(default_factory=Counter)  # by caller and name
    _foreign: dict[CodeType, bool] = field(default_factory=dict)
    _before: tuple[bool, Any] = (True, None)

    def __enter__(self) -> None:
        self._before = gc.isenabled(), sys.getprofile()
        gc.disable()  # a collection may call finalizers, and comes when it likes
        sys.setprofile(self._note)

    def __exit__(self, *_: object) -> None:
        collecting, profile = self._before
        sys.setprofile(profile)
        if collecting:
            gc.enable()

    def _note(self, frame: FrameType, event: str, what: Any) -> None:
        """See sys.setprofile."""
        if event == "c_call":
            if not self._is_foreign(frame.f_code):
                self.builtin[frame.f_code, what.__qualname__] += 1
        elif event == "call":
            caller = None if frame.f_back is None else frame.f_back.f_code
            foreign = self._is_foreign(frame.f_code) or caller is None or self._is_foreign(caller)
            if not foreign or _is_ours(frame.f_code) or (caller is not None and _is_ours(caller)):
                self.python[frame.f_code] += 1

    def _is_foreign(self, code: CodeType) -> bool:
        foreign = self._foreign.get(code)
        if foreign is None:
            foreign = self._foreign[code] = code.co_filename.startswith(_FOREIGN)
        return foreign

    def calls(self, inputs: int) -> Calls:
        """For each of so many inputs."""
        return Calls(self.python.total() / inputs, self.builtin.total() / inputs)


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(_PACKAGE)


def _where(code: CodeType) -> str:
    return f"{code.co_qualname} ({code.co_filename.removeprefix(_CHECKOUT)}:{code.co_firstlineno})"


def most_frequent(count: Count, inputs: int) -> str:
    """The calls that there are most of, for the text of a failure."""
    python = [f"{calls / inputs:8.2f} × {_where(code)}" for code, calls in count.python.most_common(15)]
    builtin = [f"{calls / inputs:8.2f} × {name}, in {_where(code)}" for (code, name), calls in count.builtin.most_common(10)]
    return "\n".join(["of functions in Python:", *python, "of built-in ones:", *builtin])


def check(kind: str, count: Count, inputs: int, budget: Calls) -> None:
    """Fail if that was too much."""
    spent = count.calls(inputs)
    for what, calls, most in (("functions in Python", spent.python, budget.python), ("built-in functions", spent.builtin, budget.builtin)):
        assert calls <= most * MARGIN, (
            f"{kind}: {calls:.2f} calls of {what} for one input, and the table in {__file__} has {most:.2f} (and a margin to {most * MARGIN:.2f}). "
            f"Most frequent, for one input,\n{most_frequent(count, inputs)}"
        )


# ── the engine ──

BEGIN = 1_800_000_000.0
WEEK = 7 * 86400.0
IN_A_ROOM = 10  # people who delegated, in each of the rooms that nothing happens in
COMPANIONS = 3  # … and in the others, beside the one to whom it happens
LIVES = 3  # that a world is made for: in the first one all caches are filled
FEW, MANY = 100, 2000  # rows that nothing happens to


def settled(room: str, identity: str, id: int) -> DelayedEvent:
    """Somebody connected whose event needs nothing for days."""
    since = BEGIN - 60.0
    times: dict[str, Any] = {"running_since": since, "accepted_at": since, "verified_at": since, "presence_since": since, "attempt_at": since}
    session = Session(f"PA_{identity}", 1000, True, since)
    return row(id=id, delegation=f"dlg_{id}", room=room, identity=identity, delay=WEEK, delay_id=f"delay-{id}", sessions=(session,), **times)


def quiet(room: str) -> Room:
    """A room that needs no look for days."""
    return Room(SFU, room, f"RM_{room}", "", BEGIN - 60.0, False, 0.0, 0.0, None, BEGIN + WEEK, True, 0, 0, False)


def filled(path: Path, rows: int) -> SqliteStore:
    """A database with so many rows, and the rooms of LIVES lives."""
    people = [(f"idle-{n // IN_A_ROOM:05}", f"idle-{n}") for n in range(rows)]
    people += [(name, f"companion-{n}") for life in range(LIVES) for name in rooms_of(life) for n in range(COMPANIONS)]
    store = SqliteStore(path / f"{rows}.db")

    def work(tx: Transaction) -> None:
        for name, identity in people:
            tx.insert(settled(name, identity, tx.new_id()))
        for name in dict.fromkeys(name for name, _ in people):
            tx.save_room(quiet(name))

    store.atomically(work)
    return store


def rooms_of(life: int) -> list[str]:
    """Where it happens, one input in each."""
    return [f"call-{life}-{n:02}" for n in range(BATCH)]


class Cost(NamedTuple):
    """What one batch took."""

    statements: list[str]
    calls: Count


class World:
    """An engine on a database, with a homeserver and an SFU."""

    def __init__(self, store: SqliteStore, *, limited: bool | None = False) -> None:
        self.store = store
        # Routine looks are far apart, so that what is measured is what was given. Whose restarts are planned: see PLANNED.
        policy = Policy(interval=WEEK, interval_most=WEEK)
        many: Callable[[str], int] = lambda _: 4 * BATCH  # noqa: E731
        self.engine = Engine(store, policy, Limits(), Random(7), in_flight=many, looks_in_flight=many, limited=lambda _: limited)
        self.costs: dict[str, Cost] = {}

    def step(self, kind: str, inputs: Sequence[Input], now: float) -> Step:
        """One step, and what it costs."""
        cost = Cost([], Count())
        connection = self.store._connection
        connection.set_trace_callback(cost.statements.append)
        try:
            with cost.calls:
                step = self.engine.step(inputs, now)
        finally:
            connection.set_trace_callback(None)
        assert not [reply for reply in step.replies if isinstance(reply, Exception)]
        self.costs[kind] = cost
        return step

    def settle(self, step: Step, now: float) -> None:
        """The homeserver does everything that is asked of it, and what waited for a place."""
        while step.tasks:
            step = self.engine.step(done(step, now), now)

    def refresh(self, now: float) -> None:
        """Have the engine find out when something is due: until it asks, what was due last may be long over."""
        assert not self.engine.step((), now).tasks


def done(step: Step, sent_at: float) -> list[Input]:
    """The homeserver has done what a step claimed."""
    return [Answered(task.homeserver, task.event, task.claim, task.action, sent_at, Verdict.DONE) for task in step.tasks]


def live(world: World, life: int) -> dict[str, Cost]:
    """Somebody in each of BATCH rooms delegates, joins, is looked at, restarted, and leaves: a batch for each; and then somebody is removed."""
    rooms, began = rooms_of(life), BEGIN + life * 10_000.0
    joined_at_ms = int(began * 1000)
    world.costs = {}

    def delegated(who: str) -> list[Input]:
        return [
            Accept(
                *(f"dlg_{room}_{who}", SFU, room, who, HOMESERVER, (NewEvent(f"delay-{room}-{who}", 3600.0, OnEnd.SEND),)),
                *(f"alias-{who}", f"@{who}-{room}:{HOMESERVER}"),
            )
            for room in rooms
        ]

    def told(who: str, what: Sighting, now: float, reason: str = "", lag: float = 0.01) -> list[Input]:
        return [Seen(SFU, room, who, what, f"PA_{who}", joined_at_ms, reason, f"RM_{room}", now - lag) for room in rooms]

    def looked(step: Step, sent_at: float, *there: str) -> list[Input]:
        people = tuple(Listed(f"companion-{n}", f"PA_companion-{n}", "ACTIVE", 1000) for n in range(COMPANIONS))
        people += tuple(Listed(who, f"PA_{who}", "ACTIVE", joined_at_ms) for who in there)
        return [Looked(SFU, task.room, task.claim, sent_at, people) for task in step.tasks]

    def answer_looks(now: float, *there: str) -> None:
        """If there are any, since somebody delegated."""
        world.engine.step(looked(world.engine.step((), now), now, *there), now)

    def step(kind: str, inputs: Sequence[Input], now: float, *, claims: Action | None = None, changes: int = BATCH) -> Step:
        """And nothing else happens; but in a first life a homeserver takes a few requests at a time."""
        step = world.step(kind, inputs, now)
        assert len(step.changes) == changes
        if life > 0:
            assert [task.action for task in step.tasks] == ([] if claims is None else [claims] * BATCH)
        return step

    now = began
    world.refresh(now)
    strangers: list[Input] = [Seen(SFU, f"other-{room}", "nobody", Sighting.JOINED, "PA_1", 1000, "", "RM_1", now - 0.01) for room in rooms]
    step("a webhook about nobody who delegated", strangers, now, changes=0)
    delegating = step("a delegation, with the claim of its first restart", delegated("alice"), now, claims=Action.RESTART)
    now += 0.05
    world.settle(step("a delegation is confirmed", done(delegating, now - 0.05), now, changes=len(delegating.tasks)), now)
    step("joined", told("alice", Sighting.JOINED, now), now)
    answer_looks(began + 1.25, "alice")
    now = began + 10.0
    world.engine.step(told("alice", Sighting.JOINED, now, lag=9.0), now)  # once more: what comes so late is a reason to look
    now += 2.25
    looking = step("the claim of a look", (), now, claims=Action.LOOK, changes=0)
    step("a look that shows what is known", looked(looking, now, "alice"), now + 0.05, changes=0)

    world.refresh(began + 600.0)
    now = began + 3000.0
    restarting = step("the claim of a restart", (), now, claims=Action.RESTART, changes=0)
    now += 0.05
    world.settle(step("a restart is answered", done(restarting, now - 0.05), now, changes=len(restarting.tasks)), now)

    now += 1.0
    step("left, which a look is to check", told("alice", Sighting.LEFT, now, "CLIENT_INITIATED"), now)
    now += 2.5
    looking = world.engine.step((), now)
    departed = step("a look that shows a departure, with the claim of its send", looked(looking, now), now + 0.05, claims=Action.SEND)
    now += 0.1
    world.settle(step("a send is answered", done(departed, now - 0.05), now, changes=len(departed.tasks)), now)

    now += 60.0
    world.settle(world.engine.step([*delegated("bob"), *told("bob", Sighting.JOINED, now)], now), now)
    answer_looks(now + 1.5, "bob")
    now += 60.0
    world.refresh(now)
    removed = told("bob", Sighting.LEFT, now, "PARTICIPANT_REMOVED")
    world.settle(step("left, believed at once, with the claim of its send", removed, now, claims=Action.SEND), now)
    assert world.engine.in_flight == 0
    return world.costs


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Cost]]]:
    """By the number of rows: what each kind of input costs in each life after the first one."""
    found = {}
    for rows in (FEW, MANY):
        store = filled(tmp_path_factory.mktemp("costs"), rows)
        world = World(store)
        found[rows] = [live(world, life) for life in range(LIVES)][1:]
        store.close()
    return found


def form(statement: str) -> str:
    """A statement without its values."""
    return re.sub(r"'[^']*'|\bNULL\b|(?<![\w.])-?\d[\d.e+-]*", "?", statement)


def forms(statements: Sequence[str]) -> Counter[str]:
    return Counter(form(statement) for statement in statements)


@pytest.mark.parametrize("kind", ENGINE)
def test_an_input_costs_no_more_than_it_may(costs: dict[int, list[dict[str, Cost]]], kind: str) -> None:
    """Statements to the letter, and calls."""
    cost, budget = costs[FEW][0][kind], ENGINE[kind]
    found = "\n".join(f"{times:6} × {text[:150]}" for text, times in forms(cost.statements).most_common())
    assert len(cost.statements) == budget.statements, (  # fewer are worth a new line in the table
        f"{kind}: {len(cost.statements)} SQL statements for {BATCH} inputs, and the table in {__file__} has {budget.statements}.\n{found}"
    )
    check(kind, cost.calls, BATCH, budget.calls)


@pytest.mark.parametrize("kind", ENGINE)
def test_an_input_costs_the_same_again(costs: dict[int, list[dict[str, Cost]]], kind: str) -> None:
    """To a call: else something else was counted, and the tables would be about that."""
    first, second = (life[kind] for life in costs[FEW])
    assert forms(first.statements) == forms(second.statements)
    assert first.calls.python == second.calls.python
    assert first.calls.builtin == second.calls.builtin


@pytest.mark.parametrize("kind", ENGINE)
def test_an_input_costs_the_same_however_many_rows_there_are(costs: dict[int, list[dict[str, Cost]]], kind: str) -> None:
    """Of people to whom nothing happens, in other rooms."""
    few, many = costs[FEW][0][kind], costs[MANY][0][kind]
    assert forms(few.statements) == forms(many.statements)
    assert few.calls.python == many.calls.python
    assert few.calls.builtin == many.calls.builtin


class Recorded:
    """A connection, and the statements that it runs."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.statements: dict[str, None] = {}
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        """See sqlite3."""
        self.statements[sql] = None
        return self._connection.execute(sql, parameters)

    def executemany(self, sql: str, parameters: Sequence[Any]) -> sqlite3.Cursor:
        """See sqlite3."""
        self.statements[sql] = None
        return self._connection.executemany(sql, parameters)


KEYS_OF_THE_STEP = re.compile(r"SCAN (wanted_1|CONSTANT ROW|\d+ CONSTANT ROWS)")
"""What may be scanned: what a statement that asks for many rows at once was given."""

NO_QUERIES = {"BEGIN IMMEDIATE", "COMMIT"}


def test_nothing_that_an_input_asks_scans_a_table(tmp_path: Path) -> None:
    """Nor an index from end to end: each statement of all these steps searches, by an index."""
    store = filled(tmp_path, FEW)
    connection = store._connection
    recorded = Recorded(connection)
    world = World(store)
    store._connection = cast("sqlite3.Connection", recorded)
    for life in range(2):
        live(world, life)
    store._connection = connection
    asked = recorded.statements.keys() - NO_QUERIES
    tables = {name: sum(name in sql for sql in asked) for name in ("delayed_event", "room", "history")}
    assert all(tables.values()), tables
    scans = {}
    for sql in asked:
        plan = [detail for *_, detail in connection.execute(f"EXPLAIN QUERY PLAN {sql}", [None] * sql.count("?"))]
        scans[sql] = [step for step in plan if step.startswith("SCAN") and KEYS_OF_THE_STEP.fullmatch(step) is None]
    store.close()
    found = "\n".join(f"{'; '.join(steps)}: {sql}" for sql, steps in scans.items() if steps)
    assert not found, f"A statement that the engine runs for inputs reads a whole table or index:\n{found}"


def test_what_a_plan_costs(tmp_path: Path) -> None:
    """One statement, and for each event no more calls than it may; where nobody knows the homeserver's limit."""
    planned: dict[int, Cost] = {}
    for rows in (FEW, MANY):
        store = filled(tmp_path, rows)
        world = World(store, limited=None)
        world.step("a plan", (), BEGIN)
        planned[rows] = world.costs["a plan"]
        assert sum("ORDER BY delayed_event.harm" in sql and "LIMIT" not in sql for sql in planned[rows].statements) == 1
        store.close()
    few, many = planned[FEW], planned[MANY]
    assert forms(few.statements) == forms(many.statements)
    more = Count(many.calls.python - few.calls.python, many.calls.builtin - few.calls.builtin)
    check("a plan (by event)", more, MANY - FEW, PLANNED)


# ── the edges ──

REQUESTS = 16
WARM = 4  # … before them
PEER = ("192.0.2.1", 40000)
ALICE = "@alice:example.org"


class Wire(asyncio.Transport):
    """A transport to nowhere, that tells a test what is written."""

    def __init__(self, written: Callable[[bytes], object]) -> None:
        super().__init__({"peername": PEER, "socket": SimpleNamespace(setsockopt=lambda *_: None)})
        self._written = written

    def write(self, data: Any) -> None:
        self._written(data)

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        """It is nowhere anyway."""


class Edge:
    """A connection to the public listener, with all that the daemon has behind it as far as the inbox, where an input stays."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.bench.vouchers.users["alice"] = ALICE
        self.bench.configure(client_rate=1e6, client_burst=1000, user_rate=1e6, user_burst=1000)  # there are limits, which nobody meets
        engine = self.bench.port.engine
        metrics = Metrics(lambda name: name, CollectorRegistry())
        observer: Any = None  # nothing is observed, for nothing is stepped
        self.inbox = Inbox(engine, _now, lambda _: None, observer, REQUESTS)
        self.answers: list[bytes] = []
        services = replace(self.bench.services, port=self.inbox, hooks=_Hooks(metrics, engine, _now), clock=_now)
        public = Public(services)
        self.connection = _Connection(Listener(public.app, public.usual, services.log, closed_within=1.0))
        self.connection.connection_made(Wire(self.answers.append))

    def taken(self) -> list[Input]:
        """What is in the inbox."""
        return [given for given, _ in self.inbox._waiting]

    def tell(self, reply: Reply) -> None:
        """Whoever handed in what is in the inbox hears of it."""
        waiting, self.inbox._waiting = self.inbox._waiting, []
        ((_, told),) = waiting
        assert told is not None
        told(reply)

    async def close(self) -> None:
        await self.inbox.close(self.bench.port.close, 20.0)


_now: Callable[[], float] = partial(float, int(BEGIN))


@pytest.fixture
async def edge(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Edge]:
    """In one and the same second: the date of answers is made once in each."""
    monkeypatch.setattr(time, "time", _now)
    edge = Edge()
    yield edge
    await edge.close()


def request(path: str, body: bytes, *lines: str) -> bytes:
    """As LiveKit sends it."""
    head = [f"POST {path} HTTP/1.1", "Host: sfu-delegate.example", "User-Agent: Go-http-client/1.1", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join([*head, "Accept-Encoding: gzip", "", ""]).encode() + body


def webhook(event: str) -> bytes:
    """One about Alice."""
    room = {"sid": "RM_1", "name": "room", "emptyTimeout": 300, "creationTime": "1800000000", "enabledCodecs": [{"mime": "audio/opus"}]}
    alice = {"sid": "PA_1", "identity": "alice", "state": "ACTIVE", "joinedAt": "1800000000", "joinedAtMs": "1800000000123"}
    body = json.dumps({"event": event, "room": room, "participant": alice, "id": "EV_1", "createdAt": "1800000000"}).encode()
    return request(PATH, body, f"Authorization: {signature(KEY, body, BEGIN)}", "Content-Type: application/webhook+json")


def each_counted(one: Callable[[], object]) -> Count:
    """What REQUESTS of them cost, after some more."""
    for _ in range(WARM):
        one()
    count = Count()
    with count:
        for _ in range(REQUESTS):
            one()
    return count


async def test_a_webhook_that_does_not_matter(edge: Edge) -> None:
    """From its bytes to those of the answer."""
    raw = webhook("track_published")
    count = each_counted(lambda: edge.connection.data_received(raw))
    assert [answer[:15] for answer in edge.answers] == [b"HTTP/1.1 200 OK"] * (WARM + REQUESTS)
    assert edge.taken() == []
    kind = "a webhook that does not matter"
    check(kind, count, REQUESTS, EDGES[kind])


async def test_a_webhook_that_matters(edge: Edge) -> None:
    """From its bytes to the inbox, and from there to those of the answer."""
    raw, touched = webhook("participant_left"), Touched(1)

    def one() -> None:
        edge.connection.data_received(raw)
        edge.tell(touched)

    count = each_counted(one)
    assert [answer[:15] for answer in edge.answers] == [b"HTTP/1.1 200 OK"] * (WARM + REQUESTS)
    kind = "a webhook that matters, without the engine"
    check(kind, count, REQUESTS, EDGES[kind])


async def test_a_delegation(edge: Edge) -> None:
    """From its bytes to the inbox, and from there to those of the answer; whose token it is, is known at once."""
    body = {
        "room_id": "!room:example.org",
        "slot_id": "slot",
        "openid_token": {"access_token": "alice", "token_type": "Bearer", "matrix_server_name": SERVER, "expires_in": 3600},
        "member": {"id": "member", "claimed_user_id": ALICE, "claimed_device_id": "DEVICE"},
        "delay_id": "delay-id",
        "delay_timeout": 3_600_000,
        "delay_cs_api_url": "https://matrix.example.org",
    }
    raw = request("/delegate_delayed_leave", json.dumps(body).encode(), "Content-Type: application/json", "Origin: https://call.example.org")
    accepted = Accepted("dlg_1", True, ())

    async def some(requests: int) -> None:
        for _ in range(requests):
            edge.answers.clear()
            edge.connection.data_received(raw)
            while not edge.taken():  # noqa: ASYNC110 — a turn of the loop is what it waits for
                await asyncio.sleep(0)
            assert isinstance(edge.taken()[0], Accept)
            edge.tell(accepted)
            while not edge.answers:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert edge.answers[0].startswith(b"HTTP/1.1 200 OK")

    await some(WARM)
    count = Count()
    with count:
        await some(REQUESTS)
    kind = "a delegation, without the engine and the homeserver"
    check(kind, count, REQUESTS, EDGES[kind])


async def test_a_request_to_a_homeserver() -> None:
    """On a connection that is kept, from the call to the answer."""
    body = b"{}"
    head = (
        "HTTP/1.1 200 OK\r\nServer: Synapse/1.140.0\r\nDate: Sat, 01 Nov 2025 12:26:41 GMT\r\nContent-Type: application/json\r\n"
        f"Cache-Control: no-cache, no-store, must-revalidate\r\nAccess-Control-Allow-Origin: *\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    loop, client = asyncio.get_running_loop(), KeepAliveClient()
    begin = "https://matrix.example.org"
    place = keep_alive._Place(keep_alive._split(begin)[0], None, None)
    connection = keep_alive._Connection(client, place)
    asked: list[bytes] = []

    def peer(data: bytes) -> None:
        asked.append(data)
        loop.call_soon(connection.data_received, head.encode() + body)

    connection.connection_made(Wire(peer))
    client.idle(connection, IDLE_LIFE)
    url = begin + "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/delay-{}/restart"

    async def some(numbers: range) -> None:
        headers = {"Content-Type": "application/json"}
        for number in numbers:
            answer = await client.post(url.format(number), headers, body, loop.time() + 60.0, repeatable=True)
            assert answer.body == body

    await some(range(WARM))
    count = Count()
    with count:
        await some(range(WARM, WARM + REQUESTS))
    assert len(set(asked)) == WARM + REQUESTS
    kind = "a request to a homeserver"
    check(kind, count, REQUESTS, EDGES[kind])
    await client.aclose()
