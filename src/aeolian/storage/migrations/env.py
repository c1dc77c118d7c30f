"""Run by Alembic: revisions run on the connection that `storage.migrate` hands over."""

from alembic import context

from aeolian.storage.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    transaction_per_migration=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
