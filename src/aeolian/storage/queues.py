"""Items of Queues, numbered in the order of arrival; and until when each partition is kept."""

from collections.abc import Sequence

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


def sizes(connection: Connection) -> dict[tuple[str, bytes], int]:
    """How many items each partition has."""
    query = sa.select(queue_items.c.queue_id, queue_items.c.partition, sa.func.count()).group_by(
        queue_items.c.queue_id, queue_items.c.partition
    )
    return {(queue_id, partition): count for queue_id, partition, count in connection.execute(query)}


def expiries(connection: Connection) -> dict[tuple[str, bytes], float]:
    return {(row.queue_id, row.partition): row.expires_at for row in connection.execute(sa.select(queue_partitions))}


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


def clear(connection: Connection, queue_id: str, partition: bytes | None = None) -> None:
    """One partition, or all of them."""
    for table in (queue_items, queue_partitions):
        here = table.c.queue_id == queue_id
        if partition is not None:
            here = here & (table.c.partition == partition)
        connection.execute(table.delete().where(here))
