"""Client tokens, by the hash of their secret, and the roles that they have in environments."""

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.domain.roles import Role
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
    sa.Column("is_limited", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("service_user_id", sa.String, nullable=False, server_default=""),
    sa.Column("created_by", sa.String, nullable=False, server_default=""),
)
"""`expires_at` 0: never. `is_limited`: it has its roles and nothing else; the others manage everything."""

token_roles = sa.Table(
    "token_roles",
    metadata,
    sa.Column("token_id", sa.String, primary_key=True),
    sa.Column("environment_id", sa.String, primary_key=True),
    sa.Column("role", sa.SmallInteger, nullable=False),
)


class Token(msgspec.Struct, frozen=True):
    token_id: str
    secret_hash: bytes
    name: str
    workspace: str
    is_disabled: bool
    created_at: float
    last_used_at: float = 0.0
    expires_at: float = 0.0
    is_limited: bool = False
    service_user_id: str = ""
    """`su-…` of the service user whose token this is; "" for a person's."""
    created_by: str = ""
    """Name of the token that made it; "" for one that was made on the server's machine."""
    roles: dict[str, Role] = {}
    """Of a limited one, by environment id."""

    def role_in(self, environment_id: str) -> Role:
        return self.roles.get(environment_id, Role.NO_ACCESS) if self.is_limited else Role.MANAGER


def insert(connection: Connection, token: Token) -> None:
    row = msgspec.structs.asdict(token)
    roles = row.pop("roles")
    connection.execute(tokens.insert(), row)
    for environment_id, role in roles.items():
        set_role(connection, token.token_id, environment_id, role)


def get(connection: Connection, token_id: str) -> Token | None:
    return next(iter(_where(connection, tokens.c.token_id == token_id)), None)


def all_tokens(connection: Connection) -> list[Token]:
    return _where(connection, sa.true())


def update(connection: Connection, token_id: str, **values) -> bool:
    changed = connection.execute(tokens.update().where(tokens.c.token_id == token_id).values(**values))
    return changed.rowcount > 0


def set_role(connection: Connection, token_id: str, environment_id: str, role: Role | None) -> None:
    """None: as if none had ever been given."""
    mine = (token_roles.c.token_id == token_id) & (token_roles.c.environment_id == environment_id)
    connection.execute(token_roles.delete().where(mine))
    if role is not None:
        row = {"token_id": token_id, "environment_id": environment_id, "role": int(role)}
        connection.execute(token_roles.insert(), row)


def forget_environment(connection: Connection, environment_id: str) -> None:
    connection.execute(token_roles.delete().where(token_roles.c.environment_id == environment_id))


def delete(connection: Connection, token_id: str) -> bool:
    connection.execute(token_roles.delete().where(token_roles.c.token_id == token_id))
    return connection.execute(tokens.delete().where(tokens.c.token_id == token_id)).rowcount > 0


def _where(connection: Connection, condition: sa.ColumnElement[bool]) -> list[Token]:
    rows = connection.execute(sa.select(tokens).where(condition).order_by(tokens.c.created_at)).all()
    limited = [row.token_id for row in rows if row.is_limited]
    roles: dict[str, dict[str, Role]] = {token_id: {} for token_id in limited}
    if limited:
        for row in connection.execute(sa.select(token_roles).where(token_roles.c.token_id.in_(limited))):
            roles[row.token_id][row.environment_id] = Role(row.role)
    return [Token(**row._mapping, roles=roles.get(row.token_id, {})) for row in rows]
