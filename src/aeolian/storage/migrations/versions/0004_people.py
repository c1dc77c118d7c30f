"""Roles of tokens, limits of environments, and the audit trail.

Tokens that were there already have no role setting: they manage everything, as before.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

NEW_COLUMNS = {
    "tokens": (("is_limited", sa.Boolean), ("service_user_id", sa.String), ("created_by", sa.String)),
    "environments": (
        ("max_milli_cpu", sa.Integer),
        ("max_memory_mb", sa.Integer),
        ("max_gpus", sa.Integer),
        ("is_restricted", sa.Boolean),
    ),
}
DEFAULTS = {sa.Boolean: sa.false(), sa.String: "", sa.Integer: "0"}


def upgrade() -> None:
    there = sa.inspect(op.get_bind())
    for table, columns in NEW_COLUMNS.items():
        known = {column["name"] for column in there.get_columns(table)}
        for name, kind in columns:
            if name not in known:
                op.add_column(table, sa.Column(name, kind, nullable=False, server_default=DEFAULTS[kind]))
    if not there.has_table("token_roles"):
        op.create_table(
            "token_roles",
            sa.Column("token_id", sa.String, primary_key=True),
            sa.Column("environment_id", sa.String, primary_key=True),
            sa.Column("role", sa.SmallInteger, nullable=False),
        )
    if not there.has_table("audit"):
        op.create_table(
            "audit",
            sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
            sa.Column("at", sa.Float, nullable=False, index=True),
            sa.Column("who", sa.String, nullable=False),
            sa.Column("caller_id", sa.String, nullable=False, index=True),
            sa.Column("action", sa.String, nullable=False),
            sa.Column("environment", sa.String, nullable=False),
            sa.Column("target", sa.String, nullable=False),
            sa.Column("result", sa.String, nullable=False),
        )
