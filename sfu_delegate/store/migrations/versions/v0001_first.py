"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    if op.get_bind().dialect.name != "sqlite":
        return  # PostgreSQL begins with 0003
    op.create_table(
        "delayed_event",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("delegation", sa.String, nullable=False),
        sa.Column("sfu", sa.String, nullable=False),
        sa.Column("room", sa.String, nullable=False),
        sa.Column("identity", sa.String, nullable=False),
        sa.Column("alias", sa.String),
        sa.Column("homeserver", sa.String, nullable=False),
        sa.Column("user", sa.String),
        sa.Column("delay_id", sa.String, nullable=False),
        sa.Column("delay", sa.Float, nullable=False),
        sa.Column("on_end", sa.String, nullable=False),
        sa.Column("token", sa.LargeBinary),
        sa.Column("accepted_at", sa.Float, nullable=False),
        sa.Column("verified_at", sa.Float),
        sa.Column("presence", sa.String, nullable=False),
        sa.Column("presence_since", sa.Float, nullable=False),
        sa.Column("sessions", sa.Text, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("attempt_at", sa.Float, nullable=False),
        sa.Column("look_at", sa.Float),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("running_since", sa.Float, nullable=False),
        sa.Column("restarts", sa.Integer, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("end_tried", sa.Integer, nullable=False),
        sa.Column("outcome", sa.String, nullable=False),
        sa.Column("ended_at", sa.Float),
        sa.Column("finished_at", sa.Float),
        sa.Column("lane", sa.Integer),
        sa.Column("due", sa.Float),
        sa.Column("harm", sa.Float),
        sa.Column("claim", sa.Integer, nullable=False),
        sa.Column("claimed", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_delayed_event"),
    )
    op.create_table(
        "room",
        sa.Column("sfu", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("room_sid", sa.String, nullable=False),
        sa.Column("started_by", sa.String, nullable=False),
        sa.Column("started_at", sa.Float, nullable=False),
        sa.Column("doubt_until", sa.Float, nullable=False),
        sa.Column("looked_at", sa.Float, nullable=False),
        sa.Column("due", sa.Float),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("claim", sa.Integer, nullable=False),
        sa.Column("claimed", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("sfu", "name", name="pk_room"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "history",
        sa.Column("event", sa.Integer, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("what", sa.String, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
    )
    op.create_table(
        "meta",
        sa.Column("key", sa.String, nullable=False),
        sa.Column("value", sa.String, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_meta"),
        sqlite_with_rowid=False,
    )
    op.create_index("uq_delayed_event_participant", "delayed_event", ["sfu", "room", "identity", "delay_id"], unique=True)
    op.create_index("ix_delayed_event_alias", "delayed_event", ["sfu", "room", "alias"], unique=False, sqlite_where=sa.text("alias IS NOT NULL"))
    op.create_index(
        "ix_delayed_event_schedule",
        "delayed_event",
        ["homeserver", "lane", "due", "harm"],
        unique=False,
        sqlite_where=sa.text("due IS NOT NULL"),
    )
    op.create_index("ix_delayed_event_delegation", "delayed_event", ["delegation"], unique=False)
    op.create_index("ix_room_schedule", "room", ["sfu", "due"], unique=False, sqlite_where=sa.text("due IS NOT NULL"))
    op.create_index("ix_history_event", "history", ["event"], unique=False)
