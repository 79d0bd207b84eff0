"""Alembic's entry point: runs the migrations on the connection that `store.migrate` hands over."""

from alembic import context

from sfu_delegate.store.migrate import VERSION_TABLE
from sfu_delegate.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transaction_per_migration=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
