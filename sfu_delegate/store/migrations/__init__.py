"""Alembic migrations, oldest first. They only ever add: a database is never taken back to an older version."""
