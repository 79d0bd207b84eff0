"""Brings a database to the schema of this version, at the start of the daemon.

Instances of two versions work on one PostgreSQL while it is upgraded: a migration only adds what the version before can do without, and what is no
longer needed goes with the version after (expand, then contract). Each names in OLDEST the oldest schema whose program can work with its result. A
program refuses a database that it is too old for, and touches nothing.
"""

import sqlite3
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.dialects import sqlite as dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool
from sqlalchemy.schema import CreateIndex, CreateTable

from sfu_delegate.store.base import DatabaseTooNew
from sfu_delegate.store.schema import metadata

VERSION_TABLE = "schema_version"
OLDEST_KEY = "oldest_schema"

OLDEST = {"0003": "0003", "0004": "0004"}
"""By schema version, from the first one that several instances can share: the oldest schema version whose program can work with it."""


def alembic_config() -> Config:
    """Alembic's configuration for the migrations in this package."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _engine(connection: sqlite3.Connection) -> Engine:
    engine = create_engine("sqlite://", creator=lambda: connection, poolclass=StaticPool)
    # The connection commits each statement by itself, unless it is told to begin: a migration is kept as a whole, or not at all.
    event.listen(engine, "begin", lambda bound: bound.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def upgrade(connection: sqlite3.Connection, path: Path) -> None:
    """Upgrade the database behind an open connection, which stays open; the caller holds the lock that keeps other processes out.

    Raises DatabaseTooNew, and then nothing was touched; and sqlite3.Error.
    """
    try:
        with _engine(connection).connect() as bound:
            upgrade_bound(bound, f"The database {path}")
    except DBAPIError as error:
        if isinstance(error.orig, sqlite3.Error):
            raise error.orig from None
        raise


def upgrade_bound(bound: Connection, name: str) -> None:
    """Upgrade the database behind a connection of SQLAlchemy. Raises DatabaseTooNew; `name` begins its sentence."""
    config = alembic_config()
    script = ScriptDirectory.from_config(config)
    known = {migration.revision for migration in script.walk_revisions()}
    head = script.get_current_head()
    revision = oldest = None
    tables = inspect(bound).get_table_names()
    if VERSION_TABLE in tables:
        revision = bound.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608
    if "meta" in tables:
        oldest = bound.execute(text("SELECT value FROM meta WHERE key = :key"), {"key": OLDEST_KEY}).scalar()
    bound.rollback()
    if revision is not None and revision not in known:
        if oldest is not None and oldest in known:
            return  # made by a newer version, which says that this one can work with it
        raise DatabaseTooNew(
            f"{name} has schema version {revision}, which this version of sfu-delegate does not know: it was written by a newer "
            "one. Start that version again, or restore the backup made before the upgrade."
        )
    if head is None or revision == head:
        return
    if "meta" in tables:
        _declare(bound, OLDEST[head])  # before anything is changed: from now on it holds
    config.attributes["connection"] = bound
    command.upgrade(config, "head")
    bound.commit()
    _declare(bound, OLDEST[head])


def _declare(bound: Connection, oldest: str) -> None:
    bound.execute(text("DELETE FROM meta WHERE key = :key"), {"key": OLDEST_KEY})
    bound.execute(text("INSERT INTO meta (key, value) VALUES (:key, :value)"), {"key": OLDEST_KEY, "value": oldest})
    bound.commit()


def create_all(connection: sqlite3.Connection) -> None:
    """The schema of this version in an empty database in memory, without going through the migrations."""
    for table in metadata.sorted_tables:
        connection.execute(str(CreateTable(table).compile(dialect=dialect.dialect())))
        for index in table.indexes:
            connection.execute(str(CreateIndex(index).compile(dialect=dialect.dialect())))
