"""What several instances share; and the first schema on PostgreSQL, where there was none before."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ID_BLOCK = 100


def upgrade() -> None:
    """Add tables and columns; on PostgreSQL make all of them."""
    if op.get_bind().dialect.name == "postgresql":
        _postgresql()
        return
    op.add_column("sfu", sa.Column("heard_at", sa.Float))
    op.add_column("sfu", sa.Column("answered_at", sa.Float))
    op.create_table(
        "instance",
        sa.Column("name", sa.String, nullable=False),
        sa.Column("version", sa.String, nullable=False),
        sa.Column("address", sa.String, nullable=False),
        sa.Column("started_at", sa.Float, nullable=False),
        sa.Column("alive_at", sa.Float, nullable=False),
        sa.Column("word", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_instance"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "pace",
        sa.Column("homeserver", sa.String, nullable=False),
        sa.Column("address", sa.String, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("changed_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("homeserver", "address", name="pk_pace"),
        sqlite_with_rowid=False,
    )


def _postgresql() -> None:
    op.execute(sa.schema.CreateSequence(sa.Sequence("delayed_event_id", increment=ID_BLOCK)))
    text = sa.String(collation="C")
    long_text = sa.Text(collation="C")
    op.create_table(
        "delayed_event",
        sa.Column("id", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("delegation", text, nullable=False),
        sa.Column("sfu", text, nullable=False),
        sa.Column("room", text, nullable=False),
        sa.Column("identity", text, nullable=False),
        sa.Column("alias", text),
        sa.Column("homeserver", text, nullable=False),
        sa.Column("user", text),
        sa.Column("delay_id", text, nullable=False),
        sa.Column("delay", sa.Float, nullable=False),
        sa.Column("on_end", text, nullable=False),
        sa.Column("token", sa.LargeBinary),
        sa.Column("accepted_at", sa.Float, nullable=False),
        sa.Column("verified_at", sa.Float),
        sa.Column("presence", text, nullable=False),
        sa.Column("presence_since", sa.Float, nullable=False),
        sa.Column("sessions", long_text, nullable=False),
        sa.Column("reason", text, nullable=False),
        sa.Column("attempt_at", sa.Float, nullable=False),
        sa.Column("look_at", sa.Float),
        sa.Column("state", text, nullable=False),
        sa.Column("running_since", sa.Float, nullable=False),
        sa.Column("restarts", sa.Integer, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("end_tried", sa.Integer, nullable=False),
        sa.Column("outcome", text, nullable=False),
        sa.Column("ended_at", sa.Float),
        sa.Column("finished_at", sa.Float),
        sa.Column("lane", sa.Integer),
        sa.Column("due", sa.Float),
        sa.Column("harm", sa.Float),
        sa.Column("claim", sa.Integer, nullable=False),
        sa.Column("claimed", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_delayed_event"),
    )
    op.create_index("uq_delayed_event_participant", "delayed_event", ["sfu", "room", "identity", "delay_id"], unique=True)
    op.create_index("ix_delayed_event_alias", "delayed_event", ["sfu", "room", "alias"], postgresql_where=sa.text("alias IS NOT NULL"))
    op.create_index("ix_delayed_event_schedule", "delayed_event", ["homeserver", "lane", "due", "harm"], postgresql_where=sa.text("due IS NOT NULL"))
    op.create_index("ix_delayed_event_delegation", "delayed_event", ["delegation"])
    op.create_table(
        "room",
        sa.Column("sfu", text, nullable=False),
        sa.Column("name", text, nullable=False),
        sa.Column("room_sid", text, nullable=False),
        sa.Column("started_by", text, nullable=False),
        sa.Column("instance_at", sa.Float, nullable=False),
        sa.Column("finished", sa.Integer, nullable=False),
        sa.Column("doubt_until", sa.Float, nullable=False),
        sa.Column("looked_at", sa.Float, nullable=False),
        sa.Column("asked", sa.Float),
        sa.Column("due", sa.Float),
        sa.Column("routine", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("claim", sa.Integer, nullable=False),
        sa.Column("claimed", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("sfu", "name", name="pk_room"),
    )
    op.create_index("ix_room_schedule", "room", ["sfu", "routine", "due"], postgresql_where=sa.text("due IS NOT NULL"))
    op.create_table(
        "history",
        sa.Column("event", sa.BigInteger, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("what", text, nullable=False),
        sa.Column("detail", text, nullable=False),
    )
    op.create_index("ix_history_event", "history", ["event"])
    op.create_table(
        "homeserver",
        sa.Column("name", text, nullable=False),
        sa.Column("rate_limit", text, nullable=False),
        sa.Column("rate", sa.Float, nullable=False),
        sa.Column("burst", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_homeserver"),
    )
    op.create_table(
        "sfu",
        sa.Column("name", text, nullable=False),
        sa.Column("failing_since", sa.Float),
        sa.Column("several_nodes_at", sa.Float),
        sa.Column("heard_at", sa.Float),
        sa.Column("answered_at", sa.Float),
        sa.PrimaryKeyConstraint("name", name="pk_sfu"),
    )
    op.create_table(
        "instance",
        sa.Column("name", text, nullable=False),
        sa.Column("version", text, nullable=False),
        sa.Column("address", text, nullable=False),
        sa.Column("started_at", sa.Float, nullable=False),
        sa.Column("alive_at", sa.Float, nullable=False),
        sa.Column("word", long_text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_instance"),
    )
    op.create_table(
        "pace",
        sa.Column("homeserver", text, nullable=False),
        sa.Column("address", text, nullable=False),
        sa.Column("state", long_text, nullable=False),
        sa.Column("changed_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("homeserver", "address", name="pk_pace"),
    )
    op.create_table(
        "meta",
        sa.Column("key", text, nullable=False),
        sa.Column("value", text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_meta"),
    )
    # Most updates of these rows move them in an index, so that each leaves a dead version behind: see docs/scaling.md.
    for table in ("delayed_event", "room"):
        op.execute(f"ALTER TABLE {table} SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02)")
