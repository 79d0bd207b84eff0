"""Rooms that are looked at regularly, and what is learned about homeservers and SFUs."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

KEPT = "sfu, name, room_sid, started_by, doubt_until, looked_at, due, failures, claim, claimed"


def upgrade() -> None:
    """Make the room table anew, since SQLite cannot drop a column everywhere, and add two tables."""
    if op.get_bind().dialect.name != "sqlite":
        return  # PostgreSQL begins with 0003
    op.drop_index("ix_room_schedule", "room")
    op.rename_table("room", "room_0001")
    op.create_table(
        "room",
        sa.Column("sfu", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("room_sid", sa.String, nullable=False),
        sa.Column("started_by", sa.String, nullable=False),
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
        sqlite_with_rowid=False,
    )
    op.execute(f"INSERT INTO room ({KEPT}, instance_at, finished, routine) SELECT {KEPT}, 0, 0, 0 FROM room_0001")  # noqa: S608 - a constant
    op.drop_table("room_0001")
    op.create_index("ix_room_schedule", "room", ["sfu", "routine", "due"], unique=False, sqlite_where=sa.text("due IS NOT NULL"))
    op.create_table(
        "homeserver",
        sa.Column("name", sa.String, nullable=False),
        sa.Column("rate_limit", sa.String, nullable=False),
        sa.Column("rate", sa.Float, nullable=False),
        sa.Column("burst", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_homeserver"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "sfu",
        sa.Column("name", sa.String, nullable=False),
        sa.Column("failing_since", sa.Float),
        sa.Column("several_nodes_at", sa.Float),
        sa.PrimaryKeyConstraint("name", name="pk_sfu"),
        sqlite_with_rowid=False,
    )
