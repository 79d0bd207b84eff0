"""The third form of a participant's identity, a user's events in a room, and to whom access tokens were given."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column, indexes and a table."""
    postgresql = op.get_bind().dialect.name == "postgresql"
    text = sa.String(collation="C") if postgresql else sa.String()
    op.add_column("delayed_event", sa.Column("twin", text))
    there = sa.text("twin IS NOT NULL")
    op.create_index("ix_delayed_event_twin", "delayed_event", ["sfu", "room", "twin"], sqlite_where=there, postgresql_where=there)
    known = sa.text('"user" IS NOT NULL')
    op.create_index("ix_delayed_event_user", "delayed_event", ["sfu", "room", "user"], sqlite_where=known, postgresql_where=known)
    op.create_table(
        "admission",
        sa.Column("sfu", text, nullable=False),
        sa.Column("room", text, nullable=False),
        sa.Column("identity", text, nullable=False),
        sa.Column("homeserver", text, nullable=False),
        sa.Column("user", text, nullable=False),
        sa.Column("room_id", text, nullable=False),
        sa.Column("until", sa.Float, nullable=False),
        sa.Column("due", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("sfu", "room", "identity", name="pk_admission"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_admission_due", "admission", ["due"])
