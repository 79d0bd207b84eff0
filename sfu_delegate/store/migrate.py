"""Brings a database to the schema of this version, at the start of the daemon. A database of a newer version is refused, not touched."""

import sqlite3
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event, inspect, text
from sqlalchemy.dialects import sqlite as dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool
from sqlalchemy.schema import CreateIndex, CreateTable

from sfu_delegate.store.base import DatabaseTooNew
from sfu_delegate.store.schema import metadata

VERSION_TABLE = "schema_version"


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
        _upgrade(connection, path)
    except DBAPIError as error:
        if isinstance(error.orig, sqlite3.Error):
            raise error.orig from None
        raise


def _upgrade(connection: sqlite3.Connection, path: Path) -> None:
    config = alembic_config()
    script = ScriptDirectory.from_config(config)
    engine = _engine(connection)
    with engine.connect() as bound:
        revision = None
        if inspect(bound).has_table(VERSION_TABLE):
            revision = bound.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608
        if revision is not None and revision not in {known.revision for known in script.walk_revisions()}:
            raise DatabaseTooNew(
                f"The database {path} has schema version {revision}, which this version of sfu-delegate does not know: it was written by a newer "
                "one. Start that version again, or restore the backup made before the upgrade."
            )
        bound.rollback()
        if revision != script.get_current_head():
            config.attributes["connection"] = bound
            command.upgrade(config, "head")
            bound.commit()


def create_all(connection: sqlite3.Connection) -> None:
    """The schema of this version in an empty database in memory, without going through the migrations."""
    for table in metadata.sorted_tables:
        connection.execute(str(CreateTable(table).compile(dialect=dialect.dialect())))
        for index in table.indexes:
            connection.execute(str(CreateIndex(index).compile(dialect=dialect.dialect())))
