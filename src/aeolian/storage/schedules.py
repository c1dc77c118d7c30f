"""Functions of deployed Apps that run by themselves, each with the moment of its next run."""

from collections.abc import Sequence

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.domain.schedules import Schedule, ScheduledFunction
from aeolian.storage.database import metadata

schedules = sa.Table(
    "schedules",
    metadata,
    sa.Column("function_id", sa.String, primary_key=True),
    sa.Column("app_id", sa.String, nullable=False, index=True),
    sa.Column("schedule", sa.LargeBinary, nullable=False),
    sa.Column("anchor_at", sa.Float, nullable=False),
    sa.Column("next_at", sa.Float, nullable=False),
)
"""`schedule`: msgpack of the domain's Schedule. `next_at` moves on in the transaction that stores a run's call."""

_encode = msgspec.msgpack.Encoder().encode
_decode: msgspec.msgpack.Decoder[Schedule] = msgspec.msgpack.Decoder(Schedule)


def replace(connection: Connection, app_id: str, functions: Sequence[ScheduledFunction]) -> None:
    """These, and no others, are the scheduled Functions of an App."""
    connection.execute(schedules.delete().where(schedules.c.app_id == app_id))
    if functions:
        rows = [msgspec.structs.asdict(function) | {"schedule": _encode(function.schedule)} for function in functions]
        connection.execute(schedules.insert(), rows)


def move_on(connection: Connection, function: ScheduledFunction) -> None:
    """Its next run is another one."""
    changed = schedules.update().where(schedules.c.function_id == function.function_id)
    connection.execute(changed.values(next_at=function.next_at))


def list_all(connection: Connection) -> list[ScheduledFunction]:
    """The one that runs first comes first."""
    rows = connection.execute(sa.select(schedules).order_by(schedules.c.next_at, schedules.c.function_id))
    return [ScheduledFunction(**{**row._mapping, "schedule": _decode.decode(row.schedule)}) for row in rows]
