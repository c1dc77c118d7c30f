"""Items of Queues, numbered in the order of arrival; and until when each partition is kept."""

from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.storage.database import metadata

queue_items = sa.Table(
    "queue_items",
    metadata,
    sa.Column("queue_id", sa.String, primary_key=True),
    sa.Column("partition", sa.LargeBinary(64), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("value", sa.LargeBinary, nullable=False),
)

queue_partitions = sa.Table(
    "queue_partitions",
    metadata,
    sa.Column("queue_id", sa.String, primary_key=True),
    sa.Column("partition", sa.LargeBinary(64), primary_key=True),
    sa.Column("expires_at", sa.Float, nullable=False, index=True),
)


def last_seq(connection: Connection) -> int:
    return connection.execute(sa.select(sa.func.max(queue_items.c.seq))).scalar() or 0


class PartitionSize(NamedTuple):
    queue_id: str
    partition: bytes
    num_items: int
    num_bytes: int
    expires_at: float = 0.0


def sizes(connection: Connection) -> list[PartitionSize]:
    """Of all partitions that have items, and until when they are kept (0: not known)."""
    items = sa.select(
        queue_items.c.queue_id,
        queue_items.c.partition,
        sa.func.count().label("num_items"),
        sa.func.sum(sa.func.length(queue_items.c.value)).label("num_bytes"),
    ).group_by(queue_items.c.queue_id, queue_items.c.partition)
    until = {(row.queue_id, row.partition): row.expires_at for row in connection.execute(sa.select(queue_partitions))}
    return [
        PartitionSize(queue_id, partition, num_items, int(num_bytes), until.get((queue_id, partition), 0.0))
        for queue_id, partition, num_items, num_bytes in connection.execute(items)
    ]


def put(
    connection: Connection, queue_id: str, partition: bytes, items: Sequence[tuple[int, bytes]], expires_at: float
) -> None:
    connection.execute(
        queue_items.insert(),
        [{"queue_id": queue_id, "partition": partition, "seq": seq, "value": value} for seq, value in items],
    )
    here = (queue_partitions.c.queue_id == queue_id) & (queue_partitions.c.partition == partition)
    changed = connection.execute(queue_partitions.update().where(here).values(expires_at=expires_at))
    if not changed.rowcount:
        connection.execute(
            queue_partitions.insert(), {"queue_id": queue_id, "partition": partition, "expires_at": expires_at}
        )


def take(connection: Connection, queue_id: str, partition: bytes, count: int) -> list[bytes]:
    """The oldest items, out of the queue."""
    rows = after(connection, queue_id, partition, 0, count)
    if rows:
        connection.execute(
            queue_items.delete().where(
                queue_items.c.queue_id == queue_id,
                queue_items.c.partition == partition,
                queue_items.c.seq <= rows[-1][0],
            )
        )
    return [value for _, value in rows]


def after(connection: Connection, queue_id: str, partition: bytes, seq: int, count: int) -> list[tuple[int, bytes]]:
    query = (
        sa.select(queue_items.c.seq, queue_items.c.value)
        .where(queue_items.c.queue_id == queue_id, queue_items.c.partition == partition, queue_items.c.seq > seq)
        .order_by(queue_items.c.seq)
        .limit(count)
    )
    return [(row.seq, row.value) for row in connection.execute(query)]


def clear(connection: Connection, queue_id: str, partition: bytes | None = None) -> list[PartitionSize]:
    """Of one partition, or of all of them; returns what was in them."""

    def here(table: sa.Table) -> sa.ColumnElement[bool]:
        is_queue = table.c.queue_id == queue_id
        return is_queue if partition is None else is_queue & (table.c.partition == partition)

    query = (
        sa.select(queue_items.c.partition, sa.func.count(), sa.func.sum(sa.func.length(queue_items.c.value)))
        .where(here(queue_items))
        .group_by(queue_items.c.partition)
    )
    cleared = [PartitionSize(queue_id, key, num_items, int(size)) for key, num_items, size in connection.execute(query)]
    for table in (queue_items, queue_partitions):
        connection.execute(table.delete().where(here(table)))
    return cleared


def forget_partitions(connection: Connection, now: float) -> None:
    """Those whose time is over and that have no items."""
    has_items = sa.exists().where(
        queue_items.c.queue_id == queue_partitions.c.queue_id, queue_items.c.partition == queue_partitions.c.partition
    )
    connection.execute(queue_partitions.delete().where(queue_partitions.c.expires_at < now, ~has_items))
