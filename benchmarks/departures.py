"""A call that ends at once, on a real Synapse with its default limit: how long until everybody's leave event is in the room.

    python -m benchmarks.departures                  500 people, with the application service
    python -m benchmarks.departures --without        … and without it: eight minutes more
    python -m benchmarks.departures --people 100

Everybody gets its token and delegates through Synapse, as a client does, and joins the sandbox's SFU, in one Matrix room: Synapse handles the state
events of a room one after another. For the comparison the daemon's configuration loses its application service just before the end, so that all else
is the same. Synapse, the daemon, the SFU and this program share the machine.
"""

import argparse
import asyncio
import signal
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tests.e2e.matrixrtc import RtcClient
from tests.e2e.service import ServedCall, served
from tests.e2e.test_application_service import joined_as
from tests.integration.certificates import Certificates

from benchmarks.machine import Cores, describe
from benchmarks.report import machine_table

HOUR_MS = 3_600_000
AT_ONCE = 8  # clients that are being set up
SENT = ("sfu_delegate_delegated_events_ended_total", 'outcome="sent"')
LIMITED = ("sfu_delegate_actions_total", 'outcome="limited"')
ACTIONS = ("sfu_delegate_actions_total",)


class Result(NamedTuple):
    """One end of a call."""

    people: int
    token_ms: float  # the median of a `get_token` through Synapse
    delegate_ms: float  # … and of a delegation
    seconds: float  # from the first departure until Synapse has said of the last leave event that it was sent
    in_room: float  # … and until the room shows all of them
    requests: float  # to Synapse for that
    refused: float


async def _each(things: Sequence[Any], do: Callable[[Any], Awaitable[Any]], at_once: int = AT_ONCE) -> list[Any]:
    places = asyncio.Semaphore(at_once)

    async def one(thing: Any) -> Any:
        async with places:
            return await do(thing)

    return await asyncio.gather(*(one(thing) for thing in things))


async def _timed(doing: Awaitable[Any]) -> float:
    began = time.perf_counter()
    await doing
    return (time.perf_counter() - began) * 1000


async def ended(here: ServedCall, people: int, *, without: bool) -> Result:
    """Set up a call of so many, and end it."""
    call, synapse = here.call, here.synapse
    accounts = await _each([f"member-{n}" for n in range(people)], synapse.register)
    await call.open(accounts[0])

    async def ready(account: Any) -> RtcClient:
        if account is not accounts[0]:
            await synapse.client.join(account, call.room_id)
        client = RtcClient(account, "", HOUR_MS)
        await call.schedule(client)
        await synapse.client.announce(account, call.room_id)
        return client

    clients = await _each(accounts, ready)
    tokens = await _each(clients, lambda client: _timed(here.token(client)))
    await _each(clients, lambda client: call.sfu.call("join_with_token", client.token))
    delegated = await _each(clients, lambda client: _timed(here.delegate(client)))
    await here.until_connected(people)
    if without:
        for entry in call.daemon.config["homeservers"]:
            del entry["registration_file"]
        (call.daemon.directory / "sfu-delegate.yaml").write_text(yaml.safe_dump(call.daemon.config))
        call.daemon.send_signal(signal.SIGHUP)
        while not call.daemon.entries("config_reloaded"):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    sent, requests, refused = await call.metric(*SENT), await call.metric(*ACTIONS), await call.metric(*LIMITED)
    places = [joined_as(client.token) for client in clients]
    began = time.perf_counter()
    await asyncio.gather(*(call.sfu.call("leave", room, identity) for room, identity in places))
    while await call.metric(*SENT) - sent < people:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    seconds = time.perf_counter() - began
    while (left := sum(not member.in_call for member in (await synapse.client.members(accounts[0], call.room_id)).values())) < people:
        if time.perf_counter() > began + 3 * seconds + 60.0:
            raise SystemExit(f"only {left} of {people} leave events are in the room")
        await asyncio.sleep(0.1)
    return Result(
        people,
        statistics.median(tokens),
        statistics.median(delegated),
        seconds,
        time.perf_counter() - began,
        await call.metric(*ACTIONS) - requests,
        await call.metric(*LIMITED) - refused,
    )


async def measured(people: int, *, without: bool) -> Result:
    """One call on parts of its own."""
    with tempfile.TemporaryDirectory(prefix="departures-") as directory:
        authority = Certificates(Path(directory))
        async with served(Path(directory) / "parts", authority) as here:
            return await ended(here, people, without=without)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=500)
    parser.add_argument("--without", action="store_true", help="also without the application service")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(machine_table(describe(Path(directory) / "delegate.db", Cores(None, None)) | {"Synapse": version("matrix-synapse")}))
    print("| application service | people | all events sent after | … and in the room's state | requests | refused (429) | get_token | delegation |")
    print("|---|---|---|---|---|---|---|---|")
    for without in (False, True) if asked.without else (False,):
        found = asyncio.run(measured(asked.people, without=without))
        print(
            f"| {'no' if without else 'yes'} | {found.people} | {found.seconds:.1f} s | {found.in_room:.1f} s "
            f"| {found.requests:.0f} | {found.refused:.0f} | {found.token_ms:.0f} ms | {found.delegate_ms:.0f} ms |",
            flush=True,
        )


if __name__ == "__main__":
    main()
