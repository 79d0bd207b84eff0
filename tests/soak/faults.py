"""What goes wrong: with webhooks, the SFU, one of the homeservers, the daemon's process or processes, and the database that they share. Each fault is
written down for as long as it lasts.

One thing at a time goes wrong with each of them, with some time in between: the daemon promises to keep an event "as long as the homeserver can be
reached often enough".
"""

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from random import Random

from sfu_delegate.demo.daemon import DaemonProcess
from sfu_delegate.demo.processes import Died
from sfu_delegate.sandbox.homeserver import HomeserverFaults
from sfu_delegate.sandbox.server import SandboxHomeserver, SandboxSfu
from sfu_delegate.sandbox.sfu import DeliveryFaults, SfuFaults

from tests.postgresql import Server
from tests.soak.disturbances import DATABASE, HARNESS, SFU, SLOW_SFU, WEBHOOKS, Disturbances
from tests.soak.people import Person, World
from tests.soak.settings import BACK_WITHIN, REQUEST_TIMEOUT, SFU_TIMEOUT

LAG = 1.0  # seconds by which this process may oversleep without a word
LAG_LOOK = 0.25
START_AGAIN = 1.0
CONNECTED_AGAIN = 1.0  # seconds after the database is back until all instances are


async def webhooks_go_astray(sfu: SandboxSfu, log: Disturbances, random: Random) -> None:
    """Dropped, delayed, repeated, overtaken; and now and then a quiet time."""
    try:
        while True:
            await asyncio.sleep(random.uniform(10.0, 30.0))
            sfu.model.delivery_faults = random.choice(
                [
                    DeliveryFaults(drop=0.2),
                    DeliveryFaults(drop=1.0),
                    DeliveryFaults(delay=0.3, delay_up_to=8.0),
                    DeliveryFaults(duplicate=0.5, reorder=0.3),
                    DeliveryFaults(drop=0.1, delay=0.1, delay_up_to=5.0, duplicate=0.2, reorder=0.2, reorder_up_to=5.0),
                ]
            )
            with log.disturbed(WEBHOOKS, "astray", tail=10.0):
                await asyncio.sleep(random.uniform(5.0, 20.0))
                sfu.model.delivery_faults = DeliveryFaults()
    finally:
        sfu.model.delivery_faults = DeliveryFaults()


async def sfu_fails(sfu: SandboxSfu, people: Sequence[Person], log: Disturbances, random: Random) -> None:
    """RoomService down, hanging, failing, slow; and the server itself killed or told twice to stop, so that all clients have to come back."""
    returns: set[asyncio.Task[None]] = set()
    try:
        while True:
            await asyncio.sleep(random.uniform(15.0, 45.0))
            what = random.choice(["down", "hang", "error", "slow", "killed", "stopped"])
            if what in ("killed", "stopped"):
                with log.disturbed(SFU, what, tail=BACK_WITHIN):
                    await sfu.call("kill" if what == "killed" else "shutdown_forced")
                    await asyncio.sleep(random.uniform(0.5, 4.0))
                    await sfu.call("start")
                returns = {asyncio.create_task(person.come_back()) for person in people if person.is_there}
                await asyncio.gather(*returns)
                continue
            with log.disturbed(SLOW_SFU if what == "slow" else SFU, what, tail=SFU_TIMEOUT):
                faults = {
                    "down": SfuFaults(down=True),
                    "hang": SfuFaults(hang=True),
                    "error": SfuFaults(error=random.choice([500, 503])),
                    "slow": SfuFaults(slow=random.uniform(0.2, 2.0)),
                }
                sfu.model.faults = faults[what]
                await sfu.settle()
                await asyncio.sleep(random.uniform(2.0, 12.0))
                sfu.model.faults = SfuFaults()
                await sfu.settle()
    finally:
        for task in returns:
            task.cancel()
        await asyncio.gather(*returns, return_exceptions=True)
        sfu.model.faults = SfuFaults()
        sfu.model.running = True
        await sfu.settle()


async def homeserver_fails(homeserver: SandboxHomeserver, log: Disturbances, random: Random) -> None:
    """Everything that a homeserver and the proxy before it can do, for some seconds at a time."""
    name = homeserver.model.server_name
    try:
        while True:
            await asyncio.sleep(random.uniform(15.0, 40.0))
            part = random.choice([1.0, 1.0, 0.5])
            what, faults = random.choice(
                [
                    ("down", HomeserverFaults(down=True)),
                    ("hang", HomeserverFaults(hang=True, probability=part)),
                    ("close", HomeserverFaults(close=True, probability=part)),
                    ("500", HomeserverFaults(status=500, probability=part)),
                    ("502 with HTML", HomeserverFaults(html=502, probability=part)),
                    ("403 with HTML", HomeserverFaults(html=403, probability=part)),
                    ("garbage", HomeserverFaults(garbage=True, probability=part)),
                    ("redirect", HomeserverFaults(redirect="https://elsewhere.invalid/", probability=part)),
                    ("done, not told", HomeserverFaults(done_but_not_told=True, probability=part)),
                    ("done, hangs", HomeserverFaults(done_and_hangs=True, probability=part)),
                    ("slow", HomeserverFaults(latency={"*": random.uniform(1.0, 8.0)}, probability=part)),
                ]
            )
            with log.disturbed(name, what, tail=REQUEST_TIMEOUT):
                homeserver.model.faults = faults
                await homeserver.settle()
                await asyncio.sleep(random.uniform(1.0, 8.0))
                homeserver.model.faults = HomeserverFaults()
                await homeserver.settle()
    finally:
        homeserver.model.faults = HomeserverFaults()
        await homeserver.settle()


async def database_fails(server: Server, url: str, log: Disturbances, random: Random) -> None:
    """Connections are cut; it is restarted, in order and in disorder; it is away for a while; it hangs."""

    async def cut() -> None:
        await asyncio.to_thread(server.terminate_backends, url)

    async def restart() -> None:
        await asyncio.to_thread(server.restart, random.choice(("fast", "immediate")))

    async def be_away() -> None:
        await asyncio.to_thread(server.stop, random.choice(("fast", "immediate")))
        await asyncio.sleep(random.uniform(0.5, 6.0))
        await asyncio.to_thread(server.start)

    async def hang() -> None:
        with server.hung():
            await asyncio.sleep(random.uniform(0.5, 8.0))

    while True:
        await asyncio.sleep(random.uniform(10.0, 40.0))
        what, act = random.choice([("connections cut", cut), ("restarted", restart), ("away", be_away), ("hung", hang)])
        with log.disturbed(DATABASE, what, tail=CONNECTED_AGAIN):
            await to_the_end(act())


async def to_the_end(act: Awaitable[None]) -> None:
    """However it is cancelled: what is down for ever would be our own doing."""
    doing = asyncio.ensure_future(act)
    try:
        await asyncio.shield(doing)
    except asyncio.CancelledError:
        await doing
        raise


class Keeper:
    """Keeps one process of the daemon, and does to it what operators, kernels and power supplies do. Knows when each life of it began.

    `target` is what is written down as disturbed, `asked` what each homeserver has answered to this process.
    """

    def __init__(
        self,
        daemon: DaemonProcess,
        target: str,
        log: Disturbances,
        asked: Mapping[str, Counter[tuple[str, int]]],
        clock: Callable[[], float],
        longest: float = 6.0,
    ) -> None:
        self.daemon = daemon
        self.did: Counter[str] = Counter()
        self.born_at = 0.0
        self._before: dict[str, Counter[tuple[str, int]]] = {}
        self._target = target
        self._log = log
        self._asked = asked
        self._clock = clock
        self._longest = longest  # seconds for which it is frozen at the most

    async def start(self) -> None:
        """A new life. Whoever finds no database ends, and is started again, as by a supervisor. Raises what `DaemonProcess.start` raises."""
        while True:
            self._before = {name: answers.copy() for name, answers in self._asked.items()}
            self.born_at = self._clock()
            try:
                await self.daemon.start()
            except Died:
                if not self._log.during((DATABASE,), self.born_at, self._clock()):
                    raise
                self.did["started in vain"] += 1
                await asyncio.sleep(START_AGAIN)
            else:
                self.did["started"] += 1
                return

    def answers(self, homeserver: str) -> Counter[tuple[str, int]]:
        """What a homeserver has answered to this life."""
        return self._asked[homeserver] - self._before[homeserver]

    async def disturb(self, random: Random) -> None:
        """Kill, stop or freeze it. It runs when this has ended, however it is cancelled."""
        await to_the_end(random.choices([self._kill, self._stop, self.freeze], [0.55, 0.2, 0.25])[0](random))

    async def _kill(self, random: Random) -> None:
        self.did["killed"] += 1
        with self._log.disturbed(self._target, "killed"):
            await self.daemon.kill()
            await asyncio.sleep(random.choice([0.0, random.uniform(0.0, 4.0)]))
            await self.start()

    async def _stop(self, random: Random) -> None:
        self.did["stopped"] += 1
        with self._log.disturbed(self._target, "stopped"):
            await self.daemon.stop()
            await asyncio.sleep(random.uniform(0.0, 2.0))
            await self.start()

    async def freeze(self, random: Random) -> None:
        """It stands still, and goes on in the same life: what its memory does over a longer time can be seen."""
        self.did["frozen"] += 1
        with self._log.disturbed(self._target, "frozen"):
            self.daemon.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(random.uniform(1.0, self._longest))
            finally:
                self.daemon.send_signal(signal.SIGCONT)


async def processes_fail(keepers: Sequence[Keeper], random: Random, every: float) -> None:
    """One of them is disturbed, about `every` seconds, until cancelled."""
    while True:
        await asyncio.sleep(random.uniform(0.4, 1.6) * every)
        await random.choice(keepers).disturb(random)


async def processes_freeze(keepers: Sequence[Keeper], random: Random, every: float) -> None:
    """The same without ending a life."""
    while True:
        await asyncio.sleep(random.uniform(0.4, 1.6) * every)
        await random.choice(keepers).freeze(random)


async def calls_end(world: World, people: Sequence[Person], random: Random) -> None:
    """Now and then a whole call ends at once: everybody goes, or the room is deleted."""
    while True:
        await asyncio.sleep(random.uniform(20.0, 60.0))
        room = random.choice(world.rooms())
        members = [person for person in people if person.room == room and person.is_there]
        world.did["a call ended"] += 1
        for person in members:
            person.called_away.set()


async def watch_lag(log: Disturbances, clock: Callable[[], float]) -> None:
    """This process plays homeservers and SFU: when it is not scheduled, they hang, and that is nobody's fault but the machine's."""
    while True:
        before = clock()
        await asyncio.sleep(LAG_LOOK)
        late = clock() - before - LAG_LOOK
        if late > LAG:
            log.add(HARNESS, "lag", before, clock())


def seeded(seed: int, what: str) -> Random:
    """A random source of its own for each part, so that one part's choices do not shift another's."""
    return Random(f"{seed}:{what}")
