"""Who overrode the autoscaler settings of a Function, and when. Nothing is known of overrides that are there already."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    known = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("functions")}
    if "autoscaler_events" not in known:
        op.add_column("functions", sa.Column("autoscaler_events", sa.LargeBinary, nullable=True))
