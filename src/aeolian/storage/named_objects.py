"""Secrets, Dicts and Queues as objects: named in an environment, ephemeral, or owned by an App."""

from collections.abc import Sequence

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.storage.database import metadata

named_objects = sa.Table(
    "named_objects",
    metadata,
    sa.Column("object_id", sa.String, primary_key=True),
    sa.Column("noun", sa.String, nullable=False),
    sa.Column("environment_id", sa.String, nullable=False),
    sa.Column("name", sa.String, nullable=True),  # NULL: anonymous; unique names may hold many of them
    sa.Column("kind", sa.String, nullable=False),  # named | ephemeral | owned
    sa.Column("app_id", sa.String, nullable=False),
    sa.Column("workspace", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Index("named_objects_by_name", "noun", "environment_id", "name", unique=True),
    sa.Index("named_objects_by_app", "app_id"),
)


class NamedObject(msgspec.Struct, frozen=True):
    object_id: str
    noun: str
    environment_id: str
    name: str
    """"" for anonymous ones."""
    kind: str
    app_id: str
    workspace: str
    created_at: float


def insert(connection: Connection, item: NamedObject) -> None:
    connection.execute(named_objects.insert(), {**msgspec.structs.asdict(item), "name": item.name or None})


def get(connection: Connection, object_id: str) -> NamedObject | None:
    row = connection.execute(sa.select(named_objects).where(named_objects.c.object_id == object_id)).first()
    return _item(row) if row is not None else None


def get_many(connection: Connection, object_ids: Sequence[str]) -> list[NamedObject]:
    query = sa.select(named_objects).where(named_objects.c.object_id.in_(list(object_ids)))
    return [_item(row) for row in connection.execute(query)]


def find(connection: Connection, noun: str, environment_id: str, name: str) -> NamedObject | None:
    query = sa.select(named_objects).where(
        named_objects.c.noun == noun, named_objects.c.environment_id == environment_id, named_objects.c.name == name
    )
    row = connection.execute(query).first()
    return _item(row) if row is not None else None


def list_named(
    connection: Connection, noun: str, environment_id: str, created_before: float, limit: int
) -> list[NamedObject]:
    """Newest first."""
    query = (
        sa.select(named_objects)
        .where(
            named_objects.c.noun == noun,
            named_objects.c.environment_id == environment_id,
            named_objects.c.name.is_not(None),
            named_objects.c.created_at < created_before,
        )
        .order_by(named_objects.c.created_at.desc())
        .limit(limit)
    )
    return [_item(row) for row in connection.execute(query)]


def newest_created_at(connection: Connection, noun: str) -> float:
    return (
        connection.execute(
            sa.select(sa.func.max(named_objects.c.created_at)).where(named_objects.c.noun == noun)
        ).scalar()
        or 0.0
    )


def ids_where(connection: Connection, noun: str, **values: str) -> list[str]:
    """Of a kind, an app or an environment."""
    query = sa.select(named_objects.c.object_id).where(named_objects.c.noun == noun)
    for name, value in values.items():
        query = query.where(named_objects.c[name] == value)
    return list(connection.execute(query).scalars())


def delete(connection: Connection, object_id: str) -> bool:
    return connection.execute(named_objects.delete().where(named_objects.c.object_id == object_id)).rowcount > 0


def _item(row) -> NamedObject:
    return NamedObject(**{**row._mapping, "name": row.name or ""})
