"""The tables, as SQLAlchemy Core sees them. Alembic's migrations create them; a test holds the two together.

There is one schedule index. A second one cost 30 µs an update at a million rows, and `harm` is in it because sorting 100,000 due rows by it took
130 ms without and 8 ms with.

Both databases have the same tables and columns. On PostgreSQL texts are compared by their bytes, as SQLite does, and ids have 64 bits.
"""

from typing import Any

from sqlalchemy import BigInteger, Column, Float, Index, Integer, LargeBinary, MetaData, Sequence, Table, text
from sqlalchemy import String as AnyString
from sqlalchemy import Text as AnyText

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

ID_BLOCK = 100
"""Ids that an instance takes from the sequence at a time."""

event_ids = Sequence("delayed_event_id", metadata=metadata, increment=ID_BLOCK)

String = AnyString().with_variant(AnyString(collation="C"), "postgresql")
Text = AnyText().with_variant(AnyText(collation="C"), "postgresql")
Id = BigInteger().with_variant(Integer(), "sqlite")

# Most updates of these rows move them in an index, so that PostgreSQL writes a new version of the row each time: see docs/scaling.md.
_HOT = {"fillfactor": 80, "autovacuum_vacuum_scale_factor": 0.02}
STORAGE: dict[str, dict[str, float]] = {"delayed_event": _HOT, "room": _HOT}
"""PostgreSQL's storage parameters, by table."""


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


delayed_event = Table(
    "delayed_event",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=False),
    Column("delegation", String, nullable=False),
    Column("sfu", String, nullable=False),
    Column("room", String, nullable=False),
    Column("identity", String, nullable=False),
    Column("alias", String),
    Column("homeserver", String, nullable=False),
    Column("user", String),
    Column("delay_id", String, nullable=False),
    Column("delay", Float, nullable=False),
    Column("on_end", String, nullable=False),
    Column("token", LargeBinary),
    Column("accepted_at", Float, nullable=False),
    Column("verified_at", Float),
    Column("presence", String, nullable=False),
    Column("presence_since", Float, nullable=False),
    Column("sessions", Text, nullable=False),
    Column("reason", String, nullable=False),
    Column("attempt_at", Float, nullable=False),
    Column("look_at", Float),
    Column("state", String, nullable=False),
    Column("running_since", Float, nullable=False),
    Column("restarts", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("end_tried", Integer, nullable=False),
    Column("outcome", String, nullable=False),
    Column("ended_at", Float),
    Column("finished_at", Float),
    Column("lane", Integer),
    Column("due", Float),
    Column("harm", Float),
    Column("claim", Integer, nullable=False),
    Column("claimed", Integer, nullable=False),
    Column("twin", String),
    Index("uq_delayed_event_participant", "sfu", "room", "identity", "delay_id", unique=True),
    Index("ix_delayed_event_alias", "sfu", "room", "alias", **_where("alias IS NOT NULL")),
    Index("ix_delayed_event_twin", "sfu", "room", "twin", **_where("twin IS NOT NULL")),
    Index("ix_delayed_event_user", "sfu", "room", "user", **_where('"user" IS NOT NULL')),
    Index("ix_delayed_event_schedule", "homeserver", "lane", "due", "harm", **_where("due IS NOT NULL")),
    Index("ix_delayed_event_delegation", "delegation"),
)

room = Table(
    "room",
    metadata,
    Column("sfu", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("room_sid", String, nullable=False),
    Column("started_by", String, nullable=False),
    Column("instance_at", Float, nullable=False),
    Column("finished", Integer, nullable=False),
    Column("doubt_until", Float, nullable=False),
    Column("looked_at", Float, nullable=False),
    Column("asked", Float),
    Column("due", Float),
    Column("routine", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("claim", Integer, nullable=False),
    Column("claimed", Integer, nullable=False),
    Index("ix_room_schedule", "sfu", "routine", "due", **_where("due IS NOT NULL")),
    sqlite_with_rowid=False,
)

homeserver = Table(
    "homeserver",
    metadata,
    Column("name", String, primary_key=True),
    Column("rate_limit", String, nullable=False),
    Column("rate", Float, nullable=False),
    Column("burst", Float, nullable=False),
    sqlite_with_rowid=False,
)

sfu = Table(
    "sfu",
    metadata,
    Column("name", String, primary_key=True),
    Column("failing_since", Float),
    Column("several_nodes_at", Float),
    Column("heard_at", Float),
    Column("answered_at", Float),
    sqlite_with_rowid=False,
)

history = Table(
    "history",
    metadata,
    Column("event", Id, nullable=False),
    Column("at", Float, nullable=False),
    Column("what", String, nullable=False),
    Column("detail", String, nullable=False),
    Index("ix_history_event", "event"),
)

# What instances that share a database tell each other; empty where there is but one.
instance = Table(
    "instance",
    metadata,
    Column("name", String, primary_key=True),
    Column("version", String, nullable=False),
    Column("address", String, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("alive_at", Float, nullable=False),
    Column("word", Text, nullable=False),
    sqlite_with_rowid=False,
)

pace = Table(
    "pace",
    metadata,
    Column("homeserver", String, primary_key=True),
    Column("address", String, primary_key=True),
    Column("state", Text, nullable=False),
    Column("changed_at", Float, nullable=False),
    sqlite_with_rowid=False,
)

# To whom access tokens were given that may still be good; empty where membership of Matrix rooms is not enforced.
admission = Table(
    "admission",
    metadata,
    Column("sfu", String, primary_key=True),
    Column("room", String, primary_key=True),
    Column("identity", String, primary_key=True),
    Column("homeserver", String, nullable=False),
    Column("user", String, nullable=False),
    Column("room_id", String, nullable=False),
    Column("until", Float, nullable=False),
    Column("due", Float, nullable=False),
    Index("ix_admission_due", "due"),
    sqlite_with_rowid=False,
)

meta = Table("meta", metadata, Column("key", String, primary_key=True), Column("value", String, nullable=False), sqlite_with_rowid=False)

KEYS_MARK = "encryption_keys"
"""The key in `meta` under which is told which encryption key was last in use."""
