"""Containers: those that may still run, and the history of those that ended."""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from aeolian.storage.database import metadata

containers = sa.Table(
    "containers",
    metadata,
    sa.Column("task_id", sa.String, primary_key=True),
    sa.Column("app_id", sa.String, nullable=False, index=True),
    sa.Column("function_id", sa.String, nullable=False),
    sa.Column("revision", sa.String, nullable=False),
    sa.Column("environment_name", sa.String, nullable=False),
    sa.Column("worker_id", sa.String, nullable=False),
    sa.Column("image_id", sa.String, nullable=False),
    sa.Column("sdk_version", sa.String, nullable=False),
    sa.Column("resources", sa.LargeBinary, nullable=False),
    sa.Column("enqueued_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("finished_at", sa.Float, nullable=False, index=True),
    sa.Column("exit_code", sa.Integer, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("hooks", sa.LargeBinary, nullable=False),
)
"""`started_at`, `finished_at`: 0 while that is to come. `resources`, `hooks`: msgpack of the domain's structs."""

insert = containers.insert()


def update(connection: Connection, task_id: str, **values) -> None:
    connection.execute(containers.update().where(containers.c.task_id == task_id).values(**values))


def unfinished(connection: Connection) -> list[Row]:
    return list(connection.execute(sa.select(containers).where(containers.c.finished_at == 0)))


def get(connection: Connection, task_id: str) -> Row | None:
    return connection.execute(sa.select(containers).where(containers.c.task_id == task_id)).first()


def delete_finished_before(connection: Connection, at: float) -> None:
    connection.execute(containers.delete().where(containers.c.finished_at > 0, containers.c.finished_at < at))


def finished_since(connection: Connection, function_ids: Sequence[str], at: float, limit: int) -> list[Row]:
    query = sa.select(containers).where(containers.c.function_id.in_(function_ids), containers.c.finished_at > at)
    return list(connection.execute(query.order_by(containers.c.finished_at.desc()).limit(limit)))


def uses_of_images(connection: Connection) -> list[Row]:
    """(image_id, last_at): when a container of each image was there last."""
    last_at = sa.func.max(
        sa.case((containers.c.finished_at > 0, containers.c.finished_at), else_=containers.c.enqueued_at)
    )
    query = sa.select(containers.c.image_id, last_at.label("last_at")).group_by(containers.c.image_id)
    return list(connection.execute(query))


def latest(connection: Connection, limit: int) -> list[Row]:
    """Those asked for last, the latest first, ended or not."""
    return list(connection.execute(sa.select(containers).order_by(containers.c.enqueued_at.desc()).limit(limit)))
