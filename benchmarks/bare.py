"""The least that the parts of the daemon's work cost, each as a program of its own: `python -m benchmarks.bare handler|request|commit …`.

- `handler PORT`: an aiohttp handler on uvloop that reads a POST and answers, until it is stopped.
- `request URL COUNT`: requests by the HTTP client that the daemon uses, 16 in flight.
- `commit DIRECTORY COUNT`: durable commits of one changed row with the settings of the daemon's database.

The last two print their costs as JSON, in microseconds. Each imports what it needs, since it is started for every run.
"""

import asyncio
import gc
import json
import os
import sqlite3
import statistics
import sys
import tempfile
from time import perf_counter, process_time

import uvloop

IN_FLIGHT = 16
HOST = "127.0.0.1"


async def handler(port: int) -> None:
    """Serve until SIGTERM."""
    from aiohttp import web

    async def handle(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=b"{}", headers={"Content-Type": "application/json"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, port).start()
    await asyncio.Event().wait()


async def requests(url: str, count: int) -> dict[str, float]:
    """Processor time of a POST and its answer."""
    from sfu_delegate.matrix.keep_alive import KeepAliveClient

    client = KeepAliveClient()
    loop = asyncio.get_running_loop()
    headers = {"Content-Type": "application/json"}

    async def work(each: int) -> None:
        for _ in range(each):
            answer = await client.post(url, headers, b"{}", loop.time() + 10, repeatable=True)
            if answer.status != 200:
                raise SystemExit(f"the homeserver answered {answer.status}")

    await asyncio.gather(*(work(4) for _ in range(IN_FLIGHT)))  # connections, and caches
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # as the daemon has it
    each = max(1, count // IN_FLIGHT)
    begun = process_time()
    await asyncio.gather(*(work(each) for _ in range(IN_FLIGHT)))
    used = process_time() - begun
    await client.aclose()
    return {"cpu": used / (each * IN_FLIGHT) * 1e6}


def commits(directory: str, count: int) -> dict[str, float]:
    """Processor time and duration of a commit."""
    from sfu_delegate.store.sqlite import CHECKPOINT_ABOVE, LOG_MOST, LOG_SIZE

    connection = sqlite3.connect(os.path.join(directory, "bare.db"), isolation_level=None)
    run = connection.execute
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=0", "temp_store=MEMORY", f"journal_size_limit={LOG_MOST}"):
        run(f"PRAGMA {pragma}")
    run("CREATE TABLE row (id INTEGER PRIMARY KEY, at FLOAT)")
    run("INSERT INTO row VALUES (1, 0)")
    run("PRAGMA wal_checkpoint(RESTART)").fetchall()
    # As the daemon does: a log that is long enough from the start is written over, not made longer.
    run("PRAGMA cache_size=10")
    run("BEGIN IMMEDIATE")
    run("CREATE TABLE lengthening (pages BLOB)")
    run("INSERT INTO lengthening VALUES (zeroblob(?))", (LOG_SIZE,))
    run("ROLLBACK")
    run("PRAGMA cache_size=-65536")
    walls: list[float] = []
    used = 0.0
    for number in range(count):
        if number % CHECKPOINT_ABOVE == CHECKPOINT_ABOVE - 1:
            run("PRAGMA wal_checkpoint(RESTART)").fetchall()
        begun, cpu = perf_counter(), process_time()
        run("BEGIN IMMEDIATE")
        run("UPDATE row SET at = ? WHERE id = 1", (float(number),))
        run("COMMIT")
        used += process_time() - cpu
        walls.append(perf_counter() - begun)
    connection.close()
    return {"cpu": used / count * 1e6, "wall": statistics.median(walls) * 1e6, "wall_p99": statistics.quantiles(walls, n=100)[98] * 1e6}


def main() -> None:
    """The command."""
    match sys.argv[1:]:
        case ["handler", port]:
            uvloop.run(handler(int(port)))
        case ["request", url, count]:
            print(json.dumps(uvloop.run(requests(url, int(count)))))
        case ["commit", directory, count]:
            with tempfile.TemporaryDirectory(dir=directory) as place:
                print(json.dumps(commits(place, int(count))))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
