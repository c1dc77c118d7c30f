"""Labels of web functions with their ports, and which Functions answer at them.

Web functions that were deployed by an earlier version get an address at their next deployment.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    there = sa.inspect(op.get_bind())
    if not there.has_table("web_labels"):
        op.create_table(
            "web_labels",
            sa.Column("label", sa.String, primary_key=True),
            sa.Column("port", sa.Integer, nullable=False),
            sa.Column("used_at", sa.Float, nullable=False),
        )
    if not there.has_table("web_claims"):
        op.create_table(
            "web_claims",
            sa.Column("label", sa.String, primary_key=True),
            sa.Column("function_id", sa.String, primary_key=True),
            sa.Column("method_name", sa.String, primary_key=True),
            sa.Column("app_id", sa.String, nullable=False, index=True),
            sa.Column("claimed_at", sa.Float, nullable=False),
        )
