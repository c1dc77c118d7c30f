"""The variables of Secrets, encrypted."""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.storage.database import metadata

secret_values = sa.Table(
    "secret_values",
    metadata,
    sa.Column("secret_id", sa.String, primary_key=True),
    sa.Column("encrypted", sa.LargeBinary, nullable=False),
    sa.Column("last_used_at", sa.Float, nullable=False),
)


def put(connection: Connection, secret_id: str, encrypted: bytes) -> None:
    delete(connection, secret_id)
    connection.execute(secret_values.insert(), {"secret_id": secret_id, "encrypted": encrypted, "last_used_at": 0.0})


def get_many(connection: Connection, secret_ids: Sequence[str]) -> dict[str, tuple[bytes, float]]:
    """By id: (encrypted, when it was used last)."""
    query = sa.select(secret_values).where(secret_values.c.secret_id.in_(list(secret_ids)))
    return {row.secret_id: (row.encrypted, row.last_used_at) for row in connection.execute(query)}


def used(connection: Connection, secret_ids: Sequence[str], at: float) -> None:
    connection.execute(
        secret_values.update().where(secret_values.c.secret_id.in_(list(secret_ids))).values(last_used_at=at)
    )


def delete(connection: Connection, secret_id: str) -> None:
    connection.execute(secret_values.delete().where(secret_values.c.secret_id == secret_id))
