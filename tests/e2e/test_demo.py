"""`sfu-delegate demo` as people start it."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from sfu_delegate.demo import livekit_server
from sfu_delegate.demo.processes import until
from sfu_delegate.demo.sfu import StandInSfu

ENOUGH = 32  # seconds of the story: everybody's act, the first restart, and the end of both crashes, which an SFU notices after 21 s at the most

LEFT = ("david", "ben", "emma", "farid")
STAYED = ("anna", "carla")


async def start(temporary: Path, *options: str) -> asyncio.subprocess.Process:
    """The demonstration as a process, with a directory for temporary files of its own."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "sfu_delegate.cli", "demo", "--plain", *options),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(temporary)},
    )


def assert_shows_it_all(output: str, verdict: str = "Everything is as it must be") -> None:
    """The summary has everybody's end, and the lines before it say how it came."""
    rows = {cells[1]: cells for line in output.splitlines() if line.startswith("│") and (cells := [cell.strip() for cell in line.split("│")])}
    for name in LEFT:
        assert rows[name][4] == "yes", output  # the leave event is in the room
        assert rows[name][6] == "no", output  # not a member any more
        assert f"{name} has left the call" in output
    for name in STAYED:
        assert rows[name][6] == "yes", output
        assert f"{name} has left the call" not in output
    # Where a client is a process, a tab that is closed without a network is a crash; the stand-in tells of a broken connection at once.
    real = livekit_server.binary() is not None
    assert f"{livekit_server.TITLE if real else StandInSfu.title} and the daemon" in output.splitlines()[0], output
    closed_tab = "CONNECTION_TIMEOUT" if real else "SIGNAL_CLOSE"
    reasons = {"david": "CONNECTION_TIMEOUT", "ben": "CLIENT_INITIATED", "emma": "PARTICIPANT_REMOVED", "farid": closed_tab}
    assert {name: rows[name][3] for name in LEFT} == reasons, output
    assert int(rows["anna"][7].split()[0]) >= 1  # restarts
    assert output.splitlines()[-1].startswith(verdict), output


async def test_the_demonstration_shows_the_main_job(tmp_path: Path) -> None:
    """With the stand-in homeserver: everybody's end is in the summary, the exit code is 0, and nothing is left behind."""
    demo = await start(tmp_path, "--no-synapse", "--seconds", str(ENOUGH))
    output, _ = await demo.communicate()
    assert demo.returncode == 0, output.decode()
    assert_shows_it_all(output.decode(), f"Ended early after {ENOUGH} s. Everything so far is as it must be.")
    assert left_behind(tmp_path) == []


async def test_a_run_that_is_cut_short_is_no_failure(tmp_path: Path) -> None:
    """Of the people some have not even joined: it says so, without a dump of the log, and with exit code 0."""
    demo = await start(tmp_path, "--no-synapse", "--seconds", "1")
    output, _ = await demo.communicate()
    assert demo.returncode == 0, output.decode()
    assert "has not joined before the end" in output.decode()
    assert output.decode().splitlines()[-1] == "Ended early after 1 s. Everything so far is as it must be."


@pytest.mark.slow
@pytest.mark.synapse
async def test_the_demonstration_with_a_real_synapse(tmp_path: Path) -> None:
    """The same on a real Synapse, in full."""
    demo = await start(tmp_path)
    output, _ = await demo.communicate()
    assert demo.returncode == 0, output.decode()
    assert_shows_it_all(output.decode())
    assert left_behind(tmp_path) == []


async def test_ctrl_c_cleans_up_everything(tmp_path: Path) -> None:
    """Interrupted in the middle, it stops what it had started, removes its directory, and says so by its exit code."""
    demo = await start(tmp_path, "--no-synapse")
    assert demo.stdout is not None
    lines: list[str] = []
    while not any("is in the call" in line for line in lines):
        lines.append((await demo.stdout.readline()).decode())
        assert lines[-1], "".join(lines)
    children = children_of(demo.pid)
    assert children, "the daemon runs as a process of its own"
    demo.send_signal(signal.SIGINT)
    rest, _ = await demo.communicate()
    assert demo.returncode == 130, rest.decode()
    assert "stopped and removed" in rest.decode()
    assert [pid for pid in children if runs(pid)] == []
    assert left_behind(tmp_path) == []


@pytest.mark.slow
async def test_its_processes_die_with_it(tmp_path: Path) -> None:
    """Where it is killed and can clean up nothing, the kernel ends the daemon all the same."""
    demo = await start(tmp_path, "--no-synapse")
    assert demo.stdout is not None
    while "is in the call" not in (line := (await demo.stdout.readline()).decode()):
        assert line, "it ended early"
    children = children_of(demo.pid)
    demo.kill()
    await demo.communicate()

    async def all_gone() -> bool:
        return not any(runs(pid) for pid in children)

    assert children
    await until(all_gone, 10.0, "the daemon is gone")


def left_behind(directory: Path) -> list[Path]:
    """What is still in the directory."""
    return list(directory.iterdir())


def children_of(parent: int) -> list[int]:
    """The processes that this one has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:  # it has ended in between
            continue
        if int(text.rpartition(")")[2].split()[1]) == parent:
            found.append(int(status.parent.name))
    return found


def runs(pid: int) -> bool:
    """Is there such a process, and is it more than a memory?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
