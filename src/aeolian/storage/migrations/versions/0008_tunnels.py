"""Tunnels of running containers."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    if sa.inspect(op.get_bind()).has_table("tunnels"):
        return
    op.create_table(
        "tunnels",
        sa.Column("task_id", sa.String, primary_key=True),
        sa.Column("port", sa.Integer, primary_key=True),
        sa.Column("tls_port", sa.Integer, nullable=False),
        sa.Column("plain_port", sa.Integer, nullable=False),
    )
