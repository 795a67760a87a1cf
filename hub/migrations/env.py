"""How Alembic reaches the database: `Ledger` hands it an open connection."""

from alembic import context

from millpond.hub.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
