"""`python -m tests.soak --minutes 60`: exit code 0 if nobody was dropped and nobody was forgotten, 1 if somebody was, 2 if it could not be played.

A seed gives the same choices again, but not the same run: processes and sockets have a time of their own.
"""

import argparse
import asyncio
import json
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import uvloop
from sfu_delegate.demo.processes import Died, NeverHappened

from tests.soak.report import Json, as_text
from tests.soak.run import Failed, Soak
from tests.soak.settings import Settings

INTERRUPTED = 130


def main() -> int:
    """Play it, print the report, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="The real daemon, and everything that can go wrong.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long people come and go (default: %(default)g); then all leave")
    parser.add_argument("--seed", type=int, default=None, help="repeat the choices of another run (default: a new one)")
    parser.add_argument("--people", type=int, default=2000, help="how many come and go (default: %(default)s)")
    parser.add_argument("--instances", type=int, default=0, metavar="N", help="several daemons that share a PostgreSQL (default: one, with SQLite)")
    parser.add_argument("--report", type=Path, default=None, metavar="FILE.json", help="write the report there, too")
    given = parser.parse_args()
    if given.minutes <= 0 or given.people < 3 or given.instances < 0:
        parser.error("it takes some time, and at least 3 people")
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    settings = Settings(given.minutes, seed, given.people, instances=given.instances)
    print(f"seed {seed}", file=sys.stderr, flush=True)
    directory = Path(tempfile.mkdtemp(prefix="sfu-delegate-soak-"))
    keep = True
    try:
        found = uvloop.run(_interruptible(settings, directory))
        if given.report is not None:
            given.report.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(as_text(found))
        keep = bool(found["failures"])
        return 1 if found["failures"] else 0
    except asyncio.CancelledError:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (Failed, Died, NeverHappened) as error:
        print(f"the soak could not go on: {error}", file=sys.stderr)
        return 2
    finally:
        if keep:
            print(f"the daemon's log and database are kept in {directory}", file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)


async def _interruptible(settings: Settings, directory: Path) -> Json:
    """Ctrl-C and SIGTERM end it in order: the daemon is stopped, whatever state it is in."""
    playing = asyncio.ensure_future(Soak(settings, directory).run())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, playing.cancel)
    return await playing


if __name__ == "__main__":
    sys.exit(main())
