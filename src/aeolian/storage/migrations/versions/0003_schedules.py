"""Functions that run by themselves, with the moments of their next runs.

Apps that were deployed by an earlier version get theirs at their next deployment.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    if sa.inspect(op.get_bind()).has_table("schedules"):
        return
    op.create_table(
        "schedules",
        sa.Column("function_id", sa.String, primary_key=True),
        sa.Column("app_id", sa.String, nullable=False, index=True),
        sa.Column("schedule", sa.LargeBinary, nullable=False),
        sa.Column("anchor_at", sa.Float, nullable=False),
        sa.Column("next_at", sa.Float, nullable=False),
    )
