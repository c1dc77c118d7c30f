"""Environments: the namespaces of named objects."""

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.storage.database import metadata

environments = sa.Table(
    "environments",
    metadata,
    sa.Column("environment_id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("web_suffix", sa.String, nullable=False),
    sa.Column("image_builder_version", sa.String, nullable=False),
    sa.Column("is_default", sa.Boolean, nullable=False),
    sa.Column("max_containers", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("max_milli_cpu", sa.Integer, nullable=False, server_default="0"),
    sa.Column("max_memory_mb", sa.Integer, nullable=False, server_default="0"),
    sa.Column("max_gpus", sa.Integer, nullable=False, server_default="0"),
    sa.Column("is_restricted", sa.Boolean, nullable=False, server_default=sa.false()),
)


class Environment(msgspec.Struct, frozen=True):
    id: str
    name: str
    web_suffix: str
    image_builder_version: str
    is_default: bool
    created_at: float
    max_containers: int = 0
    """0 = no limit, as for the other three: sums over its containers of what they reserve."""
    max_milli_cpu: int = 0
    max_memory_mb: int = 0
    max_gpus: int = 0
    is_restricted: bool = False
    """Its containers reach no other environment: not everybody who may deploy into it may do so elsewhere."""


def insert(connection: Connection, environment: Environment) -> None:
    connection.execute(environments.insert(), _row(environment))


def update(connection: Connection, environment_id: str, values: dict[str, str | int]) -> None:
    if values:
        connection.execute(
            environments.update().where(environments.c.environment_id == environment_id).values(**values)
        )


def restrict(connection: Connection, environment_id: str) -> None:
    """Its containers stay inside from now on."""
    connection.execute(
        environments.update().where(environments.c.environment_id == environment_id).values(is_restricted=True)
    )


def delete(connection: Connection, environment_id: str) -> None:
    connection.execute(environments.delete().where(environments.c.environment_id == environment_id))


def all_environments(connection: Connection) -> list[Environment]:
    rows = connection.execute(sa.select(environments).order_by(environments.c.created_at))
    return [
        Environment(
            id=row.environment_id,
            name=row.name,
            web_suffix=row.web_suffix,
            image_builder_version=row.image_builder_version,
            is_default=row.is_default,
            created_at=row.created_at,
            max_containers=row.max_containers,
            max_milli_cpu=row.max_milli_cpu,
            max_memory_mb=row.max_memory_mb,
            max_gpus=row.max_gpus,
            is_restricted=row.is_restricted,
        )
        for row in rows
    ]


def _row(environment: Environment) -> dict:
    fields = msgspec.structs.asdict(environment)
    return {"environment_id": fields.pop("id"), **fields}
