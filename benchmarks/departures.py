"""A call that all people leave within two seconds, on a real Synapse with its default limit: until when is everybody's leave event in the room?

    python -m benchmarks.departures                  500 people, with the application service
    python -m benchmarks.departures --without        … and without it: eight minutes more
    python -m benchmarks.departures --rooms 50       … in so many calls, of 10 people each
    python -m benchmarks.departures --alone          … and Synapse alone: this program sends the same events, without a daemon
    python -m benchmarks.departures --people 100

Everybody gets its token and delegates through Synapse, as a client does, and joins the sandbox's SFU. Synapse handles the state events of a room one
after another, and each costs more, the more members there are. For the comparison the daemon's configuration loses its application service just
before the end, so that all else is the same. Synapse, the daemon, the SFU and this program share the machine.
"""

import argparse
import asyncio
import signal
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from sfu_delegate.demo.matrix import Account
from tests.e2e.matrixrtc import RtcClient
from tests.e2e.service import ServedCall, served
from tests.e2e.test_application_service import joined_as
from tests.integration.certificates import Certificates

from benchmarks.machine import Cores, describe
from benchmarks.report import machine_table

HOUR_MS = 3_600_000
AT_ONCE = 8  # clients that are being set up
LEAVE_WITHIN = 2.0  # seconds: LiveKit, and the sandbox with it, drops what more than 200 webhooks of a room wait
SENT = ("sfu_delegate_delegated_events_ended_total", 'outcome="sent"')
LIMITED = ("sfu_delegate_actions_total", 'outcome="limited"')
ACTIONS = ("sfu_delegate_actions_total",)


class Way(StrEnum):
    """Who ends the calls."""

    SERVICE = "the daemon, as an application service"
    LIMITED = "the daemon, without"
    ALONE = "nobody but Synapse"


class Result(NamedTuple):
    """One end of all calls."""

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


async def ended(here: ServedCall, people: int, rooms: int, way: Way) -> Result:
    """Set up calls of so many people, and end them."""
    call, synapse = here.call, here.synapse
    accounts = await _each([f"member-{n}" for n in range(people)], synapse.register)
    groups = [accounts[n::rooms] for n in range(rooms)]
    clients: list[RtcClient] = []
    tokens: list[float] = []
    delegated: list[float] = []
    room_ids: list[str] = []
    for group in groups:
        await call.open(group[0])
        room_ids.append(call.room_id)

        async def ready(account: Account, host: Account = group[0]) -> RtcClient:
            if account is not host:
                await synapse.client.join(account, call.room_id)
            client = RtcClient(account, "", HOUR_MS)
            await call.schedule(client)
            await synapse.client.announce(account, call.room_id)
            return client

        here_too = await _each(group, ready)
        tokens += await _each(here_too, lambda client: _timed(here.token(client)))
        await _each(here_too, lambda client: call.sfu.call("join_with_token", client.token))
        delegated += await _each(here_too, lambda client: _timed(here.delegate(client)))
        clients += here_too
    await here.until_connected(people)
    if way is Way.LIMITED:
        for entry in call.daemon.config["homeservers"]:
            del entry["registration_file"]
        (call.daemon.directory / "sfu-delegate.yaml").write_text(yaml.safe_dump(call.daemon.config))
        call.daemon.send_signal(signal.SIGHUP)
        while not call.daemon.entries("config_reloaded"):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    sent, requests, refused = await call.metric(*SENT), await call.metric(*ACTIONS), await call.metric(*LIMITED)
    places = [joined_as(client.token) for client in clients]
    began = time.perf_counter()
    if way is Way.ALONE:
        as_token = _as_token(here)
        await _each(clients, lambda client: _send(here, client, as_token))
    else:
        for n, (room, identity) in enumerate(places):
            await asyncio.sleep(began + n * LEAVE_WITHIN / people - time.perf_counter())
            await call.sfu.call("leave", room, identity)
        while await call.metric(*SENT) - sent < people:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    seconds = time.perf_counter() - began
    for room_id, group in zip(room_ids, groups, strict=True):
        while (left := sum(not one.in_call for one in (await synapse.client.members(group[0], room_id)).values())) < len(group):
            if time.perf_counter() > began + 3 * seconds + 60.0:
                raise SystemExit(f"only {left} of {len(group)} leave events are in a room")
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


def _as_token(here: ServedCall) -> str:
    return str(yaml.safe_load(Path(here.call.daemon.config["homeservers"][0]["registration_file"]).read_text())["as_token"])


async def _send(here: ServedCall, client: RtcClient, as_token: str) -> None:
    """As the daemon does it, as an application service."""
    url = f"{here.synapse.url}/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{client.delay_id}/send"
    async with here.call.http.post(
        url, params={"user_id": client.account.user_id}, json={}, headers={"Authorization": f"Bearer {as_token}"}
    ) as answer:
        if answer.status != 200:
            raise SystemExit(f"Synapse answers {answer.status}")


async def measured(people: int, rooms: int, way: Way) -> Result:
    """The calls on parts of their own."""
    with tempfile.TemporaryDirectory(prefix="departures-") as directory:
        authority = Certificates(Path(directory))
        async with served(Path(directory) / "parts", authority) as here:
            return await ended(here, people, rooms, way)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=500)
    parser.add_argument("--rooms", type=int, default=1, help="how many calls they are in (default: one)")
    parser.add_argument("--alone", action="store_true", help="also Synapse alone, without a daemon")
    parser.add_argument("--without", action="store_true", help="also without the application service")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(machine_table(describe(Path(directory) / "delegate.db", Cores(None, None)) | {"Synapse": version("matrix-synapse")}))
    print(
        "| events sent by | people | calls | all events sent after | … and in the room's state | requests | refused (429) | get_token | delegation |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    ways = [Way.SERVICE, *([Way.ALONE] if asked.alone else []), *([Way.LIMITED] if asked.without else [])]
    for way in ways:
        found = asyncio.run(measured(asked.people, asked.rooms, way))
        print(
            f"| {way} | {found.people} | {asked.rooms} | {found.seconds:.1f} s | {found.in_room:.1f} s "
            f"| {found.requests:.0f} | {found.refused:.0f} | {found.token_ms:.0f} ms | {found.delegate_ms:.0f} ms |",
            flush=True,
        )


if __name__ == "__main__":
    main()
