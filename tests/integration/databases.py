"""What the daemons of the tests keep their state in: a file in the directory of the test, or a database of this process's PostgreSQL.

Which of them is chosen by the fixture `database`, which a module asks for. Every test of such a module runs on both, but for those that say
`stores.only_sqlite`, which are about the file itself.
"""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, LiteralString, Protocol

from cryptography.fernet import Fernet
from sfu_delegate.store.sqlite import SqliteStore

from tests import postgresql
from tests.postgresql import Server
from tests.stores import migrated


class Database(Protocol):
    """What the daemons of one directory share."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The part of the configuration that leads to it."""

    @property
    def place(self) -> str:
        """Where it is, which clients need not know."""

    @property
    def secrets(self) -> set[str]:
        """What must be told to nobody."""

    def make(self) -> None:
        """Make its tables, where no daemon has done it."""

    def query(self, statement: LiteralString) -> list[Any]:
        """What somebody else finds in it."""

    def stored(self) -> bytes:
        """Every byte of it, but for an encryption key's."""

    def said(self) -> str:
        """What the database itself has said since the test began, which operators read, too."""


class SqliteDatabase:
    """A file, with others beside it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "delegations.db"
        self.key_file = directory / f"{self.path.name}.key"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"database": f"sqlite:///{self.path}"}

    @property
    def place(self) -> str:
        return str(self.path)

    @property
    def secrets(self) -> set[str]:
        if not self.key_file.exists():
            return set()
        return {line for line in self.key_file.read_text().splitlines() if line and not line.startswith("#")}

    def make(self) -> None:
        SqliteStore(self.path).close()

    def query(self, statement: LiteralString) -> list[Any]:
        with sqlite3.connect(f"file:{self.path}?mode=rw", uri=True) as database:
            rows = database.execute(statement).fetchall()
        database.close()
        return rows

    def stored(self) -> bytes:
        return b"".join(path.read_bytes() for path in sorted(self.path.parent.glob(f"{self.path.name}*")) if path != self.key_file)

    def said(self) -> str:
        return ""


QUICK: Mapping[str, Any] = {"actions": {"lease": "6s"}, "timeouts": {"request": "5s"}}
"""Whoever starts waits for the leases of the one that was killed, since it may be alive: as short as they can be without other timeouts."""


class PostgresqlDatabase:
    """A database of a server, whose tables are made already."""

    KEY = Fernet.generate_key().decode()

    def __init__(self, server: Server) -> None:
        self.server = server
        self.url = server.create_database(migrated)
        self._before = len(server.log)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"database": self.url, "encryption": {"keys": [self.KEY]}, **QUICK}

    @property
    def place(self) -> str:
        return f"{postgresql.HOST}:{self.server.port}"

    @property
    def secrets(self) -> set[str]:
        return {self.KEY}

    def make(self) -> None:
        pass  # see `create_database`

    def query(self, statement: LiteralString) -> list[Any]:
        return self.server.query(self.url, statement)

    def stored(self) -> bytes:
        return self.server.dump(self.url)

    def said(self) -> str:
        return self.server.log[self._before :]


_on_postgresql = False
_made: dict[Path, PostgresqlDatabase] = {}


@contextmanager
def chosen(kind: str) -> Iterator[None]:
    """From now on, `database_of` a directory is of this kind. Those of PostgreSQL are removed afterwards."""
    global _on_postgresql
    _on_postgresql = kind == "postgresql"
    with ExitStack() as dropping:
        try:
            yield
        finally:
            _on_postgresql = False
            for made in _made.values():
                dropping.callback(made.server.drop_database, made.url)
            _made.clear()


def database_of(directory: Path) -> Database:
    """The database of all daemons in a directory: as long as the test goes on, the same."""
    if not _on_postgresql:
        return SqliteDatabase(directory)
    if directory not in _made:
        _made[directory] = PostgresqlDatabase(postgresql.shared())
    return _made[directory]
