"""What goes wrong: with webhooks, the SFU, one of the homeservers, and the daemon's process. Each fault is written down for as long as it lasts.

One thing at a time goes wrong with each of them, with some time in between: the daemon promises to keep an event "as long as the homeserver can be
reached often enough".
"""

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from sfu_delegate.demo.daemon import DaemonProcess
from sfu_delegate.sandbox.homeserver import HomeserverFaults, HomeserverModel
from sfu_delegate.sandbox.server import SandboxHomeserver, SandboxSfu
from sfu_delegate.sandbox.sfu import DeliveryFaults, SfuFaults

from tests.soak.disturbances import DAEMON, HARNESS, SFU, SLOW_SFU, WEBHOOKS, Disturbances
from tests.soak.people import Person, World
from tests.soak.settings import BACK_WITHIN, REQUEST_TIMEOUT, SFU_TIMEOUT

LAG = 1.0  # seconds by which this process may oversleep without a word
LAG_LOOK = 0.25


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


class Keeper:
    """Keeps the daemon's process, and does to it what operators, kernels and power supplies do. Knows when each life of it began."""

    def __init__(self, daemon: DaemonProcess, log: Disturbances, models: Sequence[HomeserverModel], clock: Callable[[], float]) -> None:
        self.daemon = daemon
        self.did: Counter[str] = Counter()
        self.born_at = 0.0
        self.answers: dict[str, Counter[tuple[str, int]]] = {}  # what each homeserver had answered when this life began
        self._log = log
        self._models = models
        self._clock = clock

    async def start(self) -> None:
        """A new life. Raises what `DaemonProcess.start` raises."""
        self.answers = {model.server_name: model.answers.copy() for model in self._models}
        self.born_at = self._clock()
        await self.daemon.start()
        self.did["started"] += 1

    async def disturb(self, random: Random, every: float) -> None:
        """Kill, stop and freeze it, about `every` seconds, until cancelled. It runs when this has ended."""
        while True:
            await asyncio.sleep(random.uniform(0.4, 1.6) * every)
            act = random.choices([self._kill, self._stop, self._freeze], [0.55, 0.2, 0.25])[0]
            # To the end, however it is cancelled: a daemon that is down for ever would be our own doing.
            doing = asyncio.ensure_future(act(random))
            try:
                await asyncio.shield(doing)
            except asyncio.CancelledError:
                await doing
                raise

    async def freeze_only(self, random: Random, every: float) -> None:
        """The same without ending its life: what its memory does over a longer time can be seen."""
        while True:
            await asyncio.sleep(random.uniform(0.4, 1.6) * every)
            await self._freeze(random)

    async def _kill(self, random: Random) -> None:
        self.did["killed"] += 1
        with self._log.disturbed(DAEMON, "killed"):
            await self.daemon.kill()
            await asyncio.sleep(random.choice([0.0, random.uniform(0.0, 4.0)]))
            await self.start()

    async def _stop(self, random: Random) -> None:
        self.did["stopped"] += 1
        with self._log.disturbed(DAEMON, "stopped"):
            await self.daemon.stop()
            await asyncio.sleep(random.uniform(0.0, 2.0))
            await self.start()

    async def _freeze(self, random: Random) -> None:
        self.did["frozen"] += 1
        with self._log.disturbed(DAEMON, "frozen"):
            self.daemon.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(random.uniform(1.0, 6.0))
            finally:
                self.daemon.send_signal(signal.SIGCONT)


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
