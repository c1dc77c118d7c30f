"""Inputs of Functions by the time at which they were made: lists of them, and how many there were."""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from aeolian.storage.calls import calls, inputs, outputs


def finished_between(
    connection: Connection, function_ids: Sequence[str], since: float, until: float, limit: int, *, newest: bool
) -> list[Row]:
    """Call id, index, status, task id and times of the oldest (or newest) ones that are finished."""
    columns = [column for column in outputs.c if column.name not in ("item", "seq")]
    return _between(connection, outputs, columns, function_ids, since, until, limit, newest)


def unfinished_between(
    connection: Connection, function_ids: Sequence[str], since: float, until: float, limit: int, *, newest: bool
) -> list[Row]:
    """Call id, index and time of those that are not."""
    columns = [inputs.c.call_id, inputs.c.idx, inputs.c.created_at]
    return _between(connection, inputs, columns, function_ids, since, until, limit, newest)


def count_inputs(
    connection: Connection, function_ids: Sequence[str], since: float, until: float, bucket_s: float
) -> list[tuple[float, int]]:
    """(start of the bucket, number of inputs made in it); buckets without inputs are left out."""
    found: dict[int, int] = {}
    for table in (outputs, inputs):
        bucket = sa.cast(sa.func.floor((table.c.created_at - since) / bucket_s), sa.Integer)
        query = (
            sa.select(bucket, sa.func.count())
            .select_from(table.join(calls, calls.c.call_id == table.c.call_id))
            .where(calls.c.function_id.in_(function_ids), table.c.created_at >= since, table.c.created_at < until)
            .group_by(bucket)
        )
        for number, count in connection.execute(query):
            found[number] = found.get(number, 0) + count
    return [(since + number * bucket_s, found[number]) for number in sorted(found)]


def _between(
    connection: Connection,
    table: sa.Table,
    columns: list[sa.Column],
    function_ids: Sequence[str],
    since: float,
    until: float,
    limit: int,
    newest: bool,
) -> list[Row]:
    order = [table.c.created_at, table.c.call_id, table.c.idx]
    query = (
        sa.select(*columns)
        .select_from(table.join(calls, calls.c.call_id == table.c.call_id))
        .where(calls.c.function_id.in_(function_ids), table.c.created_at >= since, table.c.created_at < until)
        .order_by(*(column.desc() for column in order) if newest else order)
        .limit(limit)
    )
    return list(connection.execute(query))
