"""The daemon's clock goes on whatever the system clock is set to, and a start finds out whether it was set."""

import time

import pytest
from sfu_delegate.daemon.clock import SET_IF_BEYOND, Clock


class Times:
    """The two clocks of the machine, to be moved by hand."""

    def __init__(self, wall: float, since_boot: float) -> None:
        self.wall = wall
        self.since_boot = since_boot

    def passes(self, seconds: float) -> None:
        """Both go on."""
        self.wall += seconds
        self.since_boot += seconds


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """A machine that booted at 1,700,000,000 and has been up for 1,000 s."""
    times = Times(1_700_001_000.0, 1_000.0)
    monkeypatch.setattr("sfu_delegate.daemon.clock.time.time", lambda: times.wall)
    monkeypatch.setattr("sfu_delegate.daemon.clock.time.clock_gettime", lambda which: {time.CLOCK_BOOTTIME: times.since_boot}[which])
    return times


def test_it_shows_unix_seconds(times: Times) -> None:
    """At first it agrees with the system clock, and then it goes on with it."""
    clock = Clock()
    assert clock() == 1_700_001_000.0
    times.passes(12.5)
    assert clock() == 1_700_001_012.5


@pytest.mark.parametrize("step", [-7200.0, 7200.0, 1e6])
def test_a_step_of_the_system_clock_does_not_move_it(times: Times, step: float) -> None:
    """Somebody sets the clock: no countdown runs out, and none begins anew."""
    clock = Clock()
    times.wall += step
    times.passes(10.0)
    assert clock() == 1_700_001_010.0
    assert clock.behind() == step


def test_it_goes_on_while_the_machine_sleeps(times: Times) -> None:
    """CLOCK_BOOTTIME counts the sleep, so afterwards countdowns that ran out meanwhile are known to have."""
    clock = Clock()
    times.passes(3600.0)
    assert clock() == 1_700_004_600.0


def test_two_starts_on_the_same_boot_agree(times: Times) -> None:
    """A restart of the daemon, however much later, finds its times comparable; so does one after a little slewing."""
    mark = Clock().mark
    times.passes(86_400.0)
    assert Clock().agrees_with(mark)
    times.wall += SET_IF_BEYOND * 0.9
    assert Clock().agrees_with(mark)


@pytest.mark.parametrize("step", [-60.0, -(SET_IF_BEYOND + 1), SET_IF_BEYOND + 1, 3600.0])
def test_a_start_after_the_clock_was_set_disagrees(times: Times, step: float) -> None:
    """Times kept before cannot be compared with those from now on."""
    mark = Clock().mark
    times.passes(100.0)
    times.wall += step
    assert not Clock().agrees_with(mark)


def test_a_start_after_another_boot_disagrees(times: Times) -> None:
    """How long the machine was off, and what its clock did meanwhile, nobody knows."""
    mark = Clock().mark
    times.wall += 600.0
    times.since_boot = 20.0
    assert not Clock().agrees_with(mark)


def test_the_running_clock_agrees_with_its_own_mark_after_a_step(times: Times) -> None:
    """The mark belongs to the clock that made the times, not to what the system clock says later."""
    clock = Clock()
    mark = clock.mark
    times.wall += 5000.0
    assert clock.mark == mark
    assert clock.agrees_with(mark)


def test_without_a_mark_there_is_nothing_to_disagree_with(times: Times) -> None:
    """A fresh database has no times in it."""
    assert Clock().agrees_with(None)


@pytest.mark.parametrize("mark", ["", "yesterday", "nan", "inf"])
def test_a_mark_that_means_nothing_disagrees(times: Times, mark: str) -> None:
    """In doubt all countdowns count as unknown."""
    assert not Clock().agrees_with(mark)


def test_the_real_clock_is_the_wall_clock() -> None:
    """On this machine, without any stand-in."""
    assert abs(Clock()() - time.time()) < 1.0
