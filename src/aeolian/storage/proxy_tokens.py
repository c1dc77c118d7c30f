"""Proxy tokens, by the hash of their secret, and the environments that those with a scope are for."""

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.storage.database import metadata

proxy_tokens = sa.Table(
    "proxy_tokens",
    metadata,
    sa.Column("token_id", sa.String, primary_key=True),
    sa.Column("secret_hash", sa.LargeBinary, nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("workspace", sa.String, nullable=False),
    sa.Column("is_scoped", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("created_by", sa.String, nullable=False),
)

proxy_token_environments = sa.Table(
    "proxy_token_environments",
    metadata,
    sa.Column("token_id", sa.String, primary_key=True),
    sa.Column("environment_id", sa.String, primary_key=True),
)


class ProxyToken(msgspec.Struct, frozen=True):
    """`is_scoped`: it is for `environment_ids` only, else for all."""

    token_id: str
    secret_hash: bytes
    name: str
    workspace: str
    is_scoped: bool
    created_at: float
    created_by: str
    environment_ids: frozenset[str] = frozenset()

    def is_for(self, environment_id: str) -> bool:
        return not self.is_scoped or environment_id in self.environment_ids


def list_all(connection: Connection) -> list[ProxyToken]:
    """In the order of their making."""
    places: dict[str, set[str]] = {}
    for row in connection.execute(sa.select(proxy_token_environments)):
        places.setdefault(row.token_id, set()).add(row.environment_id)
    rows = connection.execute(sa.select(proxy_tokens).order_by(proxy_tokens.c.created_at))
    return [ProxyToken(**row._mapping, environment_ids=frozenset(places.get(row.token_id, ()))) for row in rows]


def put(connection: Connection, token: ProxyToken) -> None:
    """Store it as it is now."""
    delete(connection, token.token_id)
    values = msgspec.structs.asdict(token)
    places = values.pop("environment_ids")
    connection.execute(proxy_tokens.insert(), values)
    for environment_id in places:
        connection.execute(
            proxy_token_environments.insert(), {"token_id": token.token_id, "environment_id": environment_id}
        )


def delete(connection: Connection, token_id: str) -> None:
    for table in (proxy_tokens, proxy_token_environments):
        connection.execute(table.delete().where(table.c.token_id == token_id))
