"""The service manager is told what it wants to know, by its own protocol, and never gets in the way."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sfu_delegate.daemon.notify import LONGEST_STATUS, Notifier, Progress
from sfu_delegate.daemon.thread import WorkThread

from tests.engine_port import until
from tests.manager import Manager


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """One at each kind of address."""
    made = Manager(str(tmp_path / "notify") if request.param == "path" else f"@sfu-delegate-test-{os.getpid()}")
    yield made
    made.close()


def test_what_is_told(manager: Manager) -> None:
    """Ready, reloading with its time, and stopping with the time that it may take, in the words of sd_notify(3)."""
    notifier = Notifier({"NOTIFY_SOCKET": manager.name})
    before = time.clock_gettime(time.CLOCK_MONOTONIC)
    notifier.reloading()
    notifier.ready()
    notifier.status("All is well.")
    notifier.stopping(307.5)
    notifier.close()
    reloading, *others = manager.hear()
    assert reloading.pop("RELOADING") == "1"
    assert before <= int(reloading.pop("MONOTONIC_USEC")) / 1e6 + 1e-6 <= time.clock_gettime(time.CLOCK_MONOTONIC) + 1e-6
    assert not reloading
    assert others == [{"READY": "1"}, {"STATUS": "All is well."}, {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "307500000"}]


def test_a_status_is_one_line_and_told_once(manager: Manager) -> None:
    """What it quotes cannot tell the manager anything else, nor be too long for it; the same again is not told."""
    notifier = Notifier({"NOTIFY_SOCKET": manager.name})
    for text in ("no connection\nWATCHDOG=1", "no connection\nWATCHDOG=1", "x" * 10_000, "\udcff"):
        notifier.status(text)
    notifier.close()
    first, second, third = manager.hear()
    assert first == {"STATUS": "no connection WATCHDOG=1"}
    assert len(second["STATUS"]) == LONGEST_STATUS
    assert third == {"STATUS": "?"}


@pytest.mark.parametrize("name", ["", "relative", "vsock:2:1234", "/not/there", "/" + "x" * 300, "@" + "x" * 300])
def test_nobody_who_listens_is_no_trouble(name: str) -> None:
    """No manager, one that is gone, and an address that cannot be one: nothing is told, and nothing raised."""
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000"})
    notifier.status("All is well.")
    notifier.ready()
    notifier.close()


def test_a_manager_that_does_not_read_is_not_waited_for(tmp_path: Path) -> None:
    """When its queue is full, what it is told is lost."""
    deaf = Manager(str(tmp_path / "notify"))
    notifier = Notifier({"NOTIFY_SOCKET": deaf.name})
    for _ in range(10_000):
        notifier.ready()
    notifier.close()
    assert 0 < len(deaf.hear()) < 10_000
    deaf.close()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid() + 1)}, None),
        ({}, None),
        *(({"WATCHDOG_USEC": wrong}, None) for wrong in ("", "0", "-1", "60s", "1.5", "²", "9" * 5000)),
    ],
)
def test_whether_there_is_a_watchdog(environ: dict[str, str], seconds: float | None) -> None:
    """As sd_watchdog_enabled(3) has it: for this process, and not for the one that started it."""
    assert Notifier({"NOTIFY_SOCKET": "/run/systemd/notify", **environ}).watchdog == seconds
    assert Notifier(environ).watchdog is None


async def test_signs_of_life(manager: Manager) -> None:
    """They come as long as it lives, the status with them; who does not live gives none, and the status goes on."""
    notifier = Notifier({"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "30000"})
    lives, statuses = True, iter(range(1_000_000))
    running = asyncio.create_task(notifier.while_running(lambda _: lives, lambda: f"{next(statuses)}"))
    await until(lambda: sum("WATCHDOG" in told for told in manager.hear()) >= 3)
    lives = False
    manager.hear()
    manager.told.clear()
    await until(lambda: sum("STATUS" in told for told in manager.hear()) >= 5)
    running.cancel()
    notifier.close()
    assert not [told for told in manager.told if "WATCHDOG" in told]


async def test_a_status_that_cannot_be_told_is_no_sign_of_death(manager: Manager) -> None:
    """Signs of life go on, and the status says that there is a defect, without what it may hold."""
    notifier = Notifier({"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "30000"})

    def broken() -> str:
        raise KeyError("hunter2")

    running = asyncio.create_task(notifier.while_running(lambda _: True, broken))
    await until(lambda: sum("WATCHDOG" in told for told in manager.hear()) >= 3)
    running.cancel()
    notifier.close()
    assert [told for told in manager.told if "STATUS" in told] == [{"STATUS": "How it is cannot be told: KeyError."}]


async def test_a_long_start(manager: Manager) -> None:
    """The manager is asked for more time as long as it goes on."""
    notifier = Notifier({"NOTIFY_SOCKET": manager.name})
    starting = asyncio.create_task(notifier.while_starting())
    await until(lambda: bool(manager.hear()))
    starting.cancel()
    notifier.close()
    assert int(manager.told[0]["EXTEND_TIMEOUT_USEC"]) > 1e7


# ── progress ──


class Engine:
    """What is seen of it: how many steps have ended, and where its thread is."""

    def __init__(self) -> None:
        self.steps = 0
        self.where = ["threading:1 run", "sfu_delegate.daemon.thread:1 _run", "sfu_delegate.engine:1 step", "sfu_delegate.store.sqlite:1 atomically"]


@pytest.fixture
def engine() -> Engine:
    """One that is in the database."""
    return Engine()


@pytest.fixture
def progress(engine: Engine) -> Progress:
    """Who watches it; a first step was seen."""
    progress = Progress(lambda: engine.steps, lambda: engine.where)
    assert progress(10)
    return progress


def test_steps_that_end_are_progress(engine: Engine, progress: Progress) -> None:
    """However long it goes on, and wherever the thread is when somebody looks."""
    engine.where.pop()
    for _ in range(100):
        engine.steps += 1
        assert progress(10)


def test_a_database_that_hangs_is_no_reason_to_end_it(engine: Engine, progress: Progress) -> None:
    """A new process would hang there, too; the driver and the resolver that the store calls count as the database."""
    for deeper in (["psycopg:1 connect"], ["psycopg:1 connect", "socket:1 getaddrinfo"], []):
        engine.where[4:] = deeper
        assert all(progress(10) for _ in range(100))
    assert progress.stuck_in is None


@pytest.mark.parametrize(
    "where",
    [
        ["sfu_delegate.engine:7 step"],  # a loop without end, or a lock
        ["sfu_delegate.engine:7 step", "sfu_delegate.store.sqlite:1 atomically", "sfu_delegate.engine:9 _step"],  # within a transaction
        ["sfu_delegate.engine:7 step", "re:1 match"],
        ["sfu_delegate.daemon.thread:7 _run", "queue:1 get"],  # it waits for work, and nobody gives it any
        ["sfu_delegate.observe.logs:7 lines", "logging:1 flush"],  # nobody reads the log
    ],
)
def test_a_thread_that_is_stuck_elsewhere(engine: Engine, progress: Progress, where: list[str]) -> None:
    """After a while without the end of a step, and not before; until one ends, whatever is seen meanwhile."""
    in_database, engine.where = engine.where, where
    assert progress(Progress.STUCK_AFTER - 0.1)
    assert not progress(0.1)
    assert progress.stuck_in == [at for at in where if at.startswith("sfu_delegate.")][-1]
    engine.where = in_database
    assert not progress(10)
    engine.steps += 1
    assert progress(10)
    assert progress.stuck_in is None


def test_a_thread_that_has_ended_is_stuck(engine: Engine, progress: Progress) -> None:
    """It does nothing any more."""
    engine.where = []
    assert not progress(Progress.STUCK_AFTER)
    assert progress.stuck_in == "nothing"


async def test_where_a_thread_is() -> None:
    """Its functions are named, innermost last; one that has ended is nowhere."""
    thread = WorkThread("work")

    def here() -> list[str]:
        return thread.where

    seen = await thread.run(here)
    assert [at.partition(":")[0] for at in seen][-3:] == ["sfu_delegate.daemon.thread", __name__, "sfu_delegate.daemon.thread"]
    assert seen[-2].endswith(" here")
    thread.close()
    await asyncio.to_thread(thread.join)
    assert thread.where == []
