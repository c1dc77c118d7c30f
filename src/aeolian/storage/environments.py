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
)


class Environment(msgspec.Struct, frozen=True):
    id: str
    name: str
    web_suffix: str
    image_builder_version: str
    is_default: bool
    created_at: float
    max_containers: int = 0
    """0 = no limit."""


def insert(connection: Connection, environment: Environment) -> None:
    connection.execute(environments.insert(), _row(environment))


def update(connection: Connection, environment: Environment) -> None:
    connection.execute(
        environments.update().where(environments.c.environment_id == environment.id).values(**_row(environment))
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
        )
        for row in rows
    ]


def _row(environment: Environment) -> dict:
    fields = msgspec.structs.asdict(environment)
    return {"environment_id": fields.pop("id"), **fields}
