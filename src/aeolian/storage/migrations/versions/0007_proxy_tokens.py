"""Proxy tokens, for web functions that are not open to everybody."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    if sa.inspect(op.get_bind()).has_table("proxy_tokens"):
        return
    op.create_table(
        "proxy_tokens",
        sa.Column("token_id", sa.String, primary_key=True),
        sa.Column("secret_hash", sa.LargeBinary, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("workspace", sa.String, nullable=False),
        sa.Column("is_scoped", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("created_by", sa.String, nullable=False),
    )
    op.create_table(
        "proxy_token_environments",
        sa.Column("token_id", sa.String, primary_key=True),
        sa.Column("environment_id", sa.String, primary_key=True),
    )
