"""Calls own their blobs, and their outputs are found in the order of finishing.

Where both are there already, the database was begun by a version that declares them.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    there = sa.inspect(op.get_bind())
    if not there.has_table("call_blobs"):
        op.create_table(
            "call_blobs",
            sa.Column("call_id", sa.String, nullable=False, index=True),
            sa.Column("blob_id", sa.String, nullable=False),
        )
    if "outputs_in_order" not in {index["name"] for index in there.get_indexes("outputs")}:
        op.create_index("outputs_in_order", "outputs", ["call_id", "seq"])
