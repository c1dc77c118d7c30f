"""Client tokens, by the hash of their secret."""

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.storage.database import metadata

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("token_id", sa.String, primary_key=True),
    sa.Column("secret_hash", sa.LargeBinary, nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("workspace", sa.String, nullable=False),
    sa.Column("is_disabled", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("last_used_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
)
"""`expires_at` 0: never."""


class Token(msgspec.Struct, frozen=True):
    token_id: str
    secret_hash: bytes
    name: str
    workspace: str
    is_disabled: bool
    created_at: float
    last_used_at: float = 0.0
    expires_at: float = 0.0


def insert(connection: Connection, token: Token) -> None:
    connection.execute(tokens.insert(), msgspec.structs.asdict(token))


def get(connection: Connection, token_id: str) -> Token | None:
    row = connection.execute(sa.select(tokens).where(tokens.c.token_id == token_id)).first()
    return Token(**row._mapping) if row is not None else None


def all_tokens(connection: Connection) -> list[Token]:
    return [Token(**row._mapping) for row in connection.execute(sa.select(tokens).order_by(tokens.c.created_at))]


def update(connection: Connection, token_id: str, **values) -> bool:
    changed = connection.execute(tokens.update().where(tokens.c.token_id == token_id).values(**values))
    return changed.rowcount > 0


def delete(connection: Connection, token_id: str) -> bool:
    return connection.execute(tokens.delete().where(tokens.c.token_id == token_id)).rowcount > 0
