"""The tables, as SQLAlchemy Core sees them. Alembic's migrations create them; a test holds the two together.

There is one schedule index. A second one cost 30 µs an update at a million rows, and `harm` is in it because sorting 100,000 due rows by it took
130 ms without and 8 ms with.
"""

from sqlalchemy import Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text, text

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

delayed_event = Table(
    "delayed_event",
    metadata,
    Column("id", Integer, primary_key=True),
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
    Index("uq_delayed_event_participant", "sfu", "room", "identity", "delay_id", unique=True),
    Index("ix_delayed_event_alias", "sfu", "room", "alias", sqlite_where=text("alias IS NOT NULL")),
    Index("ix_delayed_event_schedule", "homeserver", "lane", "due", "harm", sqlite_where=text("due IS NOT NULL")),
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
    Index("ix_room_schedule", "sfu", "routine", "due", sqlite_where=text("due IS NOT NULL")),
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
    sqlite_with_rowid=False,
)

history = Table(
    "history",
    metadata,
    Column("event", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("what", String, nullable=False),
    Column("detail", String, nullable=False),
    Index("ix_history_event", "event"),
)

meta = Table("meta", metadata, Column("key", String, primary_key=True), Column("value", String, nullable=False), sqlite_with_rowid=False)
