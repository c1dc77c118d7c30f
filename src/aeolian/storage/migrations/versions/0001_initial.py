"""The first schema: every table as `storage/*.py` declares it."""

from alembic import op

from aeolian.storage.tables import metadata

revision = "0001"
down_revision = None


def upgrade() -> None:
    metadata.create_all(op.get_bind(), checkfirst=False)
