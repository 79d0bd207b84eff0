"""Where the processor time of the daemon goes, by what it does: `python -m benchmarks.where [noise accept join many_rooms steady]`.

The daemon runs in the same scenarios as in `python -m benchmarks`, with a clock at the entry and exit of some of its functions. The clock is that of
the thread (CLOCK_THREAD_CPUTIME_ID), what an inner function takes is not its caller's, and what no function takes is the thread's own line; so the
lines add up to what the process used. The clocks take time themselves: the shares are what to read, and the microseconds are shares of what the
scenario takes without them, measured in the same run.

Samples of a profiler would be easier, and wrong: threads that wait for the interpreter, or for the disk, look busy to it.
"""

import argparse
import asyncio
import inspect
import json
import socket
import sys
import tempfile
import threading
import types
from collections import defaultdict
from collections.abc import Callable, Coroutine, Generator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import clock_gettime_ns, pthread_getcpuclockid, thread_time_ns
from typing import Any

import uvloop
from sfu_delegate.demo.processes import free_ports
from tests.integration.certificates import Certificates

from benchmarks import machine, wire
from benchmarks.machine import Meter, Span
from benchmarks.process import REPOSITORY
from benchmarks.report import machine_table
from benchmarks.scenarios import QUICK, Bench, Sizes, all_of

FIGURES = {name: f"{name}.cpu" for name in ("noise", "accept", "join", "many_rooms", "one_room", "steady")}
LOOP, ENGINE = "event loop", "engine"

PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "HTTP as a server": (LOOP, ("api.listener:_Connection.data_received", "api.listener:_Connection._answer")),
    "webhooks: verified and decoded": (LOOP, ("livekit.webhook:verify", "livekit.webhook:decode", "livekit.webhook:to_input")),
    "webhooks: the rest": (LOOP, ("api.webhooks:Webhooks.take", "api.webhooks:Webhooks._kept")),
    "delegations: body, user, limits": (
        LOOP,
        ("api.matrixrtc:MatrixRtc._answer", "daemon.serve:_Users.user", "matrix.openid:OpenId._ask", "matrix.federation:Federation.get"),
    ),
    "inbox": (LOOP, ("daemon.inbox:Inbox.hand", "daemon.inbox:Inbox.hand_in", "daemon.inbox:Inbox._step", "daemon.inbox:Inbox._take")),
    "actions": (LOOP, ("daemon.actions:Actions.carry_out", "daemon.actions:Actions._manage", "daemon.actions:Actions._look")),
    "HTTP as a client": (
        LOOP,
        (
            "matrix.management:ManagementClient.act",
            "matrix.keep_alive:KeepAliveClient.get",
            "matrix.keep_alive:KeepAliveClient.post",
            "matrix.keep_alive:_Connection.data_received",
        ),
    ),
    "metrics": (LOOP, ("daemon.serve:_Observer.step", "observe.metrics:Metrics.on_webhook", "observe.metrics:Metrics.action")),
    "log": (LOOP, ("daemon.serve:logs.lines",)),
    "rules, and what they need": (ENGINE, ("engine:Engine.step",)),
    "rows: to and from": (
        ENGINE,
        tuple(f"store.sqlite:SqliteTransaction.{name}" for name in ("of_participants", "get_all", "rooms", "todo", "update", "insert", "note")),
    ),
}
"""Functions by what they do, and the thread that calls them. What they call counts for them, unless it is in here itself."""

REST = {LOOP: "event loop: tasks, timers, sockets", ENGINE: "engine's thread: hand-over"}
STATEMENTS, COMMITS = "SQLite: statements", "SQLite: commits"


class Account:
    """What one thread has used, by part: nanoseconds."""

    def __init__(self) -> None:
        self.used: dict[str, int] = defaultdict(int)
        self.clock: int | None = None
        self._stack: list[str] = []
        self._since = 0

    def enter(self, part: str) -> None:
        """From here on, time is this part's."""
        now = thread_time_ns()
        if self._stack:
            self.used[self._stack[-1]] += now - self._since
        elif self.clock is None:
            self.clock = pthread_getcpuclockid(threading.get_ident())
        self._stack.append(part)
        self._since = thread_time_ns()

    def leave(self) -> None:
        """From here on, it is the caller's again."""
        self.used[self._stack.pop()] += thread_time_ns() - self._since
        self._since = thread_time_ns()

    def total(self) -> int:
        """All that the thread has used."""
        return 0 if self.clock is None else clock_gettime_ns(self.clock)


ACCOUNTS = {LOOP: Account(), ENGINE: Account()}


def clocked(account: Account, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with clocks."""

    def called(*args: Any, **kwargs: Any) -> Any:
        account.enter(part)
        try:
            return function(*args, **kwargs)
        finally:
            account.leave()

    async def awaited(*args: Any, **kwargs: Any) -> Any:
        return await _driven(account, part, function(*args, **kwargs))

    return awaited if inspect.iscoroutinefunction(function) else called


@types.coroutine
def _driven(account: Account, part: str, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Runs a coroutine, and counts what it uses between two waits."""
    step: Callable[[], Any] = partial(coroutine.send, None)
    while True:
        account.enter(part)
        try:
            waited = step()
        except StopIteration as end:
            return end.value
        finally:
            account.leave()
        try:
            step = partial(coroutine.send, (yield waited))
        except BaseException as error:
            step = partial(coroutine.throw, error)


class _Connection:
    """The database's connection, with clocks."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.executemany = clocked(ACCOUNTS[ENGINE], STATEMENTS, connection.executemany)
        self._statement = clocked(ACCOUNTS[ENGINE], STATEMENTS, connection.execute)
        self._commit = clocked(ACCOUNTS[ENGINE], COMMITS, connection.execute)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *more: Any) -> Any:
        """See sqlite3."""
        return (self._commit if sql == "COMMIT" else self._statement)(sql, *more)


def instrument() -> None:
    """Put the clocks in."""
    import importlib

    from sfu_delegate.store.sqlite import SqliteStore

    for part, (thread, names) in PARTS.items():
        for name in names:
            module, _, path = name.partition(":")
            owner: Any = importlib.import_module(f"sfu_delegate.{module}")
            *within, last = path.split(".")
            for attribute in within:
                owner = getattr(owner, attribute)
            setattr(owner, last, clocked(ACCOUNTS[thread], part, getattr(owner, last)))
    prepare: Callable[[SqliteStore, bool], None] = SqliteStore._prepare

    def prepared(self: SqliteStore, memory: bool) -> None:
        prepare(self, memory)
        self._connection = _Connection(self._connection)  # type: ignore[assignment]

    SqliteStore._prepare = prepared  # type: ignore[method-assign]


def report(port: int) -> None:
    """Tell whoever connects what has been used so far."""
    with socket.create_server((wire.HOST, port)) as server:
        while True:
            connection, _ = server.accept()
            with connection:
                told = {thread: {"": account.total(), **account.used} for thread, account in ACCOUNTS.items()}
                connection.sendall(json.dumps(told).encode())


def serve(arguments: list[str]) -> None:
    """The daemon, with clocks."""
    from sfu_delegate.cli import main as cli

    if not arguments or not arguments[0].isdecimal():
        raise SystemExit("this is for the benchmark itself: python -m benchmarks.where serve PORT …")
    port, *rest = arguments
    instrument()
    threading.Thread(target=report, args=(int(port),), daemon=True).start()
    sys.argv = ["sfu-delegate", *rest]
    cli()


# ── the other side ──


class Accounting(Meter):
    """Reads the clocks, too: at its beginning, and when it is read for the first time."""

    port = 0
    used: dict[str, dict[str, int]] | None = None

    def __init__(self, pid: int | None) -> None:
        self._before = _asked(self.port)
        type(self).used = None
        super().__init__(pid)

    def read(self, pid: int | None = None) -> Span:
        """See Meter."""
        span = super().read(pid)
        if type(self).used is None:
            now = _asked(self.port)
            type(self).used = {
                thread: {part: used - self._before[thread].get(part, 0) for part, used in parts.items()} for thread, parts in now.items()
            }
        return span


def _asked(port: int) -> dict[str, dict[str, int]]:
    with socket.create_connection((wire.HOST, port)) as connection:
        told: dict[str, dict[str, int]] = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
        return told


def shares(used: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Parts of what both threads have used."""
    found: dict[str, float] = {}
    for thread, parts in used.items():
        inner = sum(value for part, value in parts.items() if part)
        found |= {part: value for part, value in parts.items() if part} | {REST[thread]: max(0, parts[""] - inner)}
    total = sum(found.values())
    return {part: value / total for part, value in found.items()}


async def account(name: str, bench: Bench) -> tuple[float, float, dict[str, float]]:
    """What the scenario takes, the bare handler beside it, and the shares of the parts. Raises world.Failed."""
    plain = await all_of(bench.sizes)[name](bench)
    # Those of the other side are free now, and not when the daemon asks for them.
    Accounting.port = next(port for port in free_ports(4) if port not in (bench.ports.federation, bench.ports.client, bench.ports.sfu))
    command = (sys.executable, "-m", "benchmarks.where", "serve", str(Accounting.port))
    await all_of(bench.sizes)[name](replace(bench, command=command, meter=Accounting))
    assert Accounting.used is not None
    return plain.values[FIGURES[name]], plain.limits["handler"], shares(Accounting.used)


def table(found: Mapping[str, tuple[float, float, Mapping[str, float]]]) -> str:
    """Markdown: a line for each part, a column for each scenario; microseconds."""
    lines = [f"| µs | {' | '.join(found)} |", f"|---|{'---:|' * len(found)}"]
    for part in (*PARTS, STATEMENTS, COMMITS, *REST.values()):
        values = [f"{cpu * parts.get(part, 0):.1f}" for cpu, _, parts in found.values()]
        if any(float(value) for value in values):
            lines.append(f"| {part} | {' | '.join(values)} |")
    lines.append(f"| **together** | {' | '.join(f'**{cpu:.0f}**' for cpu, _, _ in found.values())} |")
    lines.append(f"| a bare aiohttp handler beside it | {' | '.join(f'{handler:.0f}' for _, handler, _ in found.values())} |")
    return "\n".join(lines)


async def _run(names: list[str], sizes: Sizes) -> None:
    cores = machine.cores()
    machine.pin(cores.driver)
    directory = REPOSITORY / "build"
    directory.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as place:
        bench = Bench(sizes, cores, Path(place), Path(place), Certificates(Path(place)))
        found = {}
        for name in names:
            found[name] = await account(name, bench)
    print(machine_table({"measured": machine.commit(REPOSITORY)} | machine.describe(directory, cores)), end="\n\n")
    print(table(found))


def main() -> None:
    """The command."""
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.where", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("noise", "accept", "join", "many_rooms", "steady")
    parser.add_argument("names", nargs="*", metavar="NAME", default=names, help=f"these scenarios (default: {' '.join(names)}; one_room)")
    parser.add_argument("--quick", action="store_true", help="small numbers")
    options = parser.parse_args()
    if unknown := set(options.names) - FIGURES.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(list(options.names), QUICK if options.quick else Sizes()))


if __name__ == "__main__":
    main()
