"""Looking at the database, while a daemon works with it: read-only, and what is written to find out the speed is nobody else's.

A second connection that writes can damage an SQLite database, so there is none: its directory gets a file without a name, which is gone at once.
"""

import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from alembic.script import ScriptDirectory

from sfu_delegate.config import Config
from sfu_delegate.delegation.model import State
from sfu_delegate.doctor.findings import CannotLook
from sfu_delegate.doctor.verdicts.database import Inside, Keys, Speed
from sfu_delegate.sealing import KeyFileRefused, Sealer, load_or_create
from sfu_delegate.store import migrate, schema

TRIES: Final = 20  # of a write
FOR: Final = 2.0  # seconds at the most
PAGE: Final = 4096  # bytes
READS_FOR: Final = 5.0  # seconds until a query is given up


def schema_versions() -> tuple[str, Collection[str]]:
    """That of this program, and all that it knows."""
    script = ScriptDirectory.from_config(migrate.alembic_config())
    return script.get_current_head() or "", [migration.revision for migration in script.walk_revisions()]


def _timed(write: Callable[[], object]) -> tuple[float, float, int]:
    taken: list[float] = []
    until = time.monotonic() + FOR
    while len(taken) < TRIES and (len(taken) < 3 or time.monotonic() < until):
        began = time.perf_counter()
        write()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken), max(taken), len(taken)


# ── SQLite ──


def sqlite_speed(path: Path) -> Speed:
    """How long a write takes to be on the disk of the database. Raises CannotLook where there is no directory for it."""
    directory = path.parent
    try:
        owner = directory.stat().st_uid
    except FileNotFoundError:
        remedy = "create it, writable for the daemon's user; systemd makes /var/lib/sfu-delegate when it starts the daemon"
        raise CannotLook(f"there is no directory {directory}", remedy) from None
    except OSError as error:
        raise CannotLook(f"{directory} cannot be looked at: {error.strerror}", "run this as root, or as the daemon's user") from None
    page = os.urandom(PAGE)
    how = f"a write of {PAGE} bytes to its directory, with fdatasync,"
    if path.exists() and not os.access(path, os.W_OK):
        return _not_written(how, f"the file {path} cannot be written by the user of this command", path)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:  # without a name where the file system has that, and else removed at once

            def write() -> None:
                file.seek(0)
                file.write(page)
                file.flush()
                os.fdatasync(file.fileno())

            # What root may do, the daemon's user may not: there it would be the owner.
            note = "" if os.geteuid() == owner else "done as another user than its owner"
            return Speed(*_timed(write), how, note)
    except OSError as error:
        return _not_written(how, f"the directory {directory} cannot be written to: {(error.strerror or 'an error').lower()}", path)


def _not_written(how: str, trouble: str, path: Path) -> Speed:
    remedy = (
        f"let the daemon's user write to {path.parent} and {path.name}, on a file system that is neither read-only nor full; run this as that user"
    )
    return Speed(0.0, 0.0, 0, how, trouble=trouble, remedy=remedy)


def sqlite_space(path: Path) -> tuple[float, float, float]:
    """Bytes that the database takes, with its log; that are free on its disk; and that this has. Raises CannotLook."""
    try:
        size = sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}-wal")) if file.exists())
        disk = os.statvfs(path.parent)
    except OSError as error:
        raise CannotLook(f"{path.parent} cannot be looked at: {(error.strerror or 'an error').lower()}") from None
    return size, disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize


def sqlite_inside(path: Path) -> Inside:
    """What is in the file. Raises CannotLook."""
    try:
        if not path.exists() or not path.stat().st_size:
            return Inside(there=False)
        log = path.with_name(f"{path.name}-wal")
        # Where there is no log, nobody has it open: nothing need be locked, and no file be made beside it.
        options = "mode=ro" if log.exists() and log.stat().st_size else "mode=ro&immutable=1"
        connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?{options}", uri=True, timeout=1.0)
    except (OSError, sqlite3.Error) as error:
        raise CannotLook(f"the database {path} cannot be read: {_words(error)}", "run this as root, or as the daemon's user") from None
    give_up = time.monotonic() + READS_FOR
    connection.set_progress_handler(lambda: int(time.monotonic() > give_up), 100_000)
    try:

        def ask(statement: str, *parameters: object) -> list[Any]:
            return connection.execute(statement, parameters).fetchall()

        tables = {name for (name,) in ask("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return _inside(ask, tables, "?")
    except sqlite3.Error as error:
        raise CannotLook(f"the database {path} cannot be read: {_words(error)}", "run this as root, or as the daemon's user") from None
    finally:
        connection.close()


def _words(error: Exception) -> str:
    return (error.strerror or "an error").lower() if isinstance(error, OSError) else " ".join(str(error).split())


def _inside(ask: Callable[..., list[Any]], tables: Collection[str], mark: str, **more: Any) -> Inside:
    if migrate.VERSION_TABLE not in tables:
        return Inside(there=False, **more)
    [(revision,)] = ask(f"SELECT version_num FROM {migrate.VERSION_TABLE}") or [(None,)]  # noqa: S608
    meta = dict(ask(f"SELECT key, value FROM meta WHERE key IN ({mark}, {mark})", migrate.OLDEST_KEY, schema.KEYS_MARK)) if "meta" in tables else {}  # noqa: S608
    by_homeserver: dict[str, int] = {}
    tokens = 0
    if "delayed_event" in tables:
        counted = f"SELECT homeserver, count(*), count(token) FROM delayed_event WHERE state <> {mark} GROUP BY homeserver"  # noqa: S608
        for homeserver, events, sealed in ask(counted, State.DONE.value):
            by_homeserver[homeserver] = events
            tokens += sealed
    oldest, keys = meta.get(migrate.OLDEST_KEY), meta.get(schema.KEYS_MARK)
    return Inside(True, revision=revision, oldest=oldest, keys=keys, tokens=tokens, open_events=by_homeserver, **more)


def is_locked(path: Path) -> bool:
    """Does a daemon hold the database? Seen in the kernel's list, since trying the lock could keep a daemon from starting."""
    try:
        status = os.stat(f"{path}.lock")
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except (OSError, ValueError):
        return False
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(fields[1] == "FLOCK" and fields[5] == file for line in locks.splitlines() if len(fields := line.split()) > 5)


# ── PostgreSQL ──


class Postgresql:
    """A PostgreSQL database, asked over a connection for each question."""

    def __init__(self, config: Config) -> None:
        self._url = config.database
        self._password = config.postgresql.password.get_secret_value() if config.postgresql.password else None
        self._timeout = min(5, max(2, round(config.postgresql.connect_timeout)))

    def _connect(self) -> Any:
        """Raises CannotLook."""
        import psycopg
        from psycopg.conninfo import conninfo_to_dict

        from sfu_delegate.store.postgresql import OLDEST_SERVER, sentence

        settings: dict[str, Any] = {"application_name": "sfu-delegate doctor", "target_session_attrs": "read-write"}
        settings = {key: value for key, value in settings.items() if key not in conninfo_to_dict(self._url)}
        if self._password is not None:
            settings["password"] = self._password
        try:
            connection = psycopg.connect(self._url, autocommit=True, connect_timeout=self._timeout, client_encoding="utf-8", **settings)
            connection.execute(f"SET statement_timeout = '{READS_FOR:g}s'; SET lock_timeout = '1s'")
        except psycopg.Error as error:
            said, _, remedy = sentence("", error).replace("The database  failed: ", "").partition(". ")
            raise CannotLook(said, remedy) from None
        if connection.info.server_version < OLDEST_SERVER * 10_000:
            version = connection.info.server_version // 10_000
            connection.close()
            raise CannotLook(f"it is PostgreSQL {version}", f"at least {OLDEST_SERVER} is needed")
        return connection

    def speed(self) -> Speed:
        """How long the server takes to commit something small: a message in its log, which nobody reads."""
        import psycopg

        how = "a commit"
        try:
            with self._connect() as connection:

                def write() -> None:
                    connection.execute("SELECT pg_logical_emit_message(true, 'sfu-delegate doctor', '')")

                return Speed(*_timed(write), how)
        except CannotLook as cannot:
            return Speed(0.0, 0.0, 0, how, trouble=f"it cannot be reached: {cannot.finding.evidence}", remedy=cannot.finding.remedy)
        except psycopg.Error as error:
            why = error.diag.message_primary or type(error).__name__
            remedy = "name the primary in `database`, and let its disk have space"
            return Speed(0.0, 0.0, 0, how, trouble=f"it cannot be written to: {why}", remedy=remedy)

    def inside(self) -> Inside:
        """What is in it. Raises CannotLook."""
        import psycopg

        try:
            with self._connect() as connection:

                def ask(statement: str, *parameters: object) -> list[Any]:
                    return connection.execute(statement, parameters or None).fetchall()  # type: ignore[no-any-return]

                tables = {name for (name,) in ask("SELECT tablename FROM pg_tables WHERE schemaname = ANY (current_schemas(false))")}
                [(size, in_use, most)] = ask(
                    "SELECT pg_database_size(current_database()), (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),"
                    " current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
                )
                alive, written = 0, True
                if "instance" in tables:
                    [(alive,)] = ask("SELECT count(*) FROM instance WHERE alive_at > extract(epoch FROM clock_timestamp()) - 10")
                if "delayed_event" in tables:
                    [(written,)] = ask("SELECT has_table_privilege('delayed_event', 'INSERT') AND has_table_privilege('delayed_event', 'UPDATE')")
                version = connection.info.server_version
                said = f"{version // 10_000}.{version % 10_000}"
                more = {"server": said, "others": alive, "size": float(size), "connections": in_use, "most_connections": most, "written": written}
                return _inside(ask, tables, "%s", **more)
        except psycopg.Error as error:
            raise CannotLook(error.diag.message_primary or type(error).__name__) from None


# ── the keys ──


def keys(config: Config) -> Keys:
    """The encryption keys, without making any."""
    given = config.encryption_keys()
    if given:
        place = str(config.encryption.keys_file) if config.encryption.keys_file is not None else "`encryption.keys`"
        return Keys(place, Sealer(given).fingerprints)
    place = str(config.key_file)
    try:
        if not config.key_file.exists():
            return Keys(place)
        return Keys(place, Sealer(load_or_create(config.key_file)).fingerprints)
    except KeyFileRefused as refused:
        said, _, remedy = str(refused).partition(": ")
        return Keys(place, trouble=said, remedy=remedy or "check it, and who may read it")
    except OSError as error:
        raise CannotLook(
            f"{place} cannot be looked at: {(error.strerror or 'an error').lower()}", "run this as root, or as the daemon's user"
        ) from None
