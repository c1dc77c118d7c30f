"""Log lines of Apps: one row a batch of lines, numbered per app without a gap.

A batch holds the lines `first_seq … last_seq` of one container (or image build), compressed. A row with no
lines (`is_end`) marks that a container will write no more.
"""

import zlib

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.domain.link import LogLine
from aeolian.domain.logs import LogBatch
from aeolian.storage.database import metadata

log_batches = sa.Table(
    "log_batches",
    metadata,
    sa.Column("app_id", sa.String, primary_key=True),
    sa.Column("first_seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    sa.Column("task_id", sa.String, nullable=False),
    sa.Column("function_id", sa.String, nullable=False),
    sa.Column("root_function_id", sa.String, nullable=False),
    sa.Column("image_id", sa.String, nullable=False),
    sa.Column("is_end", sa.Boolean, nullable=False),
    sa.Column("first_at", sa.Float, nullable=False),
    sa.Column("last_at", sa.Float, nullable=False),
    sa.Column("lines", sa.LargeBinary, nullable=False),
    sa.Index("log_batches_by_time", "app_id", "last_at"),
)

log_marks = sa.Table(
    "log_marks",
    metadata,
    sa.Column("source", sa.String, primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
)
"""How far each source (one life of a worker) is stored: a repeated delivery is recognised by it."""

COMPRESSION_LEVEL = 1
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[LogLine, ...]).decode


def insert_batches(connection: Connection, batches: list[LogBatch], marks: dict[str, int]) -> None:
    if batches:
        connection.execute(log_batches.insert(), [_row(batch) for batch in batches])
    for source, seq in marks.items():
        updated = connection.execute(log_marks.update().where(log_marks.c.source == source).values(seq=seq))
        if updated.rowcount == 0:
            connection.execute(log_marks.insert(), {"source": source, "seq": seq})


def last_seqs(connection: Connection, app_ids: list[str]) -> dict[str, int]:
    """The number of the last stored line of each app; apps without lines are left out."""
    found = {}
    for app_id in app_ids:
        query = (
            sa.select(log_batches.c.last_seq)
            .where(log_batches.c.app_id == app_id)
            .order_by(log_batches.c.first_seq.desc())
            .limit(1)
        )
        if (seq := connection.execute(query).scalar()) is not None:
            found[app_id] = seq
    return found


def get_marks(connection: Connection, sources: list[str]) -> dict[str, int]:
    query = sa.select(log_marks).where(log_marks.c.source.in_(sources))
    return {row.source: row.seq for row in connection.execute(query)}


def batches_after(connection: Connection, app_id: str, seq: int, limit: int) -> list[LogBatch]:
    """The next `limit` batches that end after line `seq`, in order."""
    query = (
        sa.select(log_batches)
        .where(log_batches.c.app_id == app_id, log_batches.c.first_seq > _batch_start(connection, app_id, seq))
        .order_by(log_batches.c.first_seq)
        .limit(limit)
    )
    return [_batch(row) for row in connection.execute(query)]


def _batch_start(connection: Connection, app_id: str, seq: int) -> int:
    """Exclusive lower bound of `first_seq` for batches that end after `seq` (the one that holds seq + 1 included)."""
    query = (
        sa.select(log_batches.c.first_seq, log_batches.c.last_seq)
        .where(log_batches.c.app_id == app_id, log_batches.c.first_seq <= seq)
        .order_by(log_batches.c.first_seq.desc())
        .limit(1)
    )
    row = connection.execute(query).first()
    if row is None:
        return -1
    return row.first_seq - 1 if row.last_seq > seq else row.first_seq


def batches_between(
    connection: Connection, app_id: str, since: float, until: float, before_seq: int | None, limit: int
) -> list[LogBatch]:
    """Up to `limit` batches with lines in [since, until), the latest first; with `before_seq`, only earlier ones."""
    query = sa.select(log_batches).where(
        log_batches.c.app_id == app_id,
        log_batches.c.last_at >= since,
        log_batches.c.first_at < until,
        sa.not_(log_batches.c.is_end),
    )
    if before_seq is not None:
        query = query.where(log_batches.c.first_seq < before_seq)
    return [_batch(row) for row in connection.execute(query.order_by(log_batches.c.first_seq.desc()).limit(limit))]


def has_end(connection: Connection, app_id: str, task_id: str) -> bool:
    """Whether that container is marked as ended."""
    query = sa.select(log_batches.c.first_seq).where(
        log_batches.c.app_id == app_id, log_batches.c.is_end, log_batches.c.task_id == task_id
    )
    return connection.execute(query.limit(1)).first() is not None


def app_ids(connection: Connection) -> list[str]:
    """Apps that have log lines."""
    return list(connection.execute(sa.select(log_batches.c.app_id).distinct()).scalars())


def older(app_id: str, before: float, keep_last: bool) -> sa.ColumnElement[bool]:
    """The batches of an App that end before then; with `keep_last`, all but the one that its numbers go on from."""
    found = sa.and_(log_batches.c.app_id == app_id, log_batches.c.last_at < before)
    if not keep_last:
        return found
    other = log_batches.alias()
    last = sa.select(sa.func.max(other.c.first_seq)).where(other.c.app_id == app_id).scalar_subquery()
    return sa.and_(found, log_batches.c.first_seq < last)


def count_older(connection: Connection, app_id: str, before: float, keep_last: bool) -> tuple[int, int]:
    """How many of them there are, and how many bytes they have."""
    what = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(sa.func.length(log_batches.c.lines)), 0))
    num, num_bytes = connection.execute(what.where(older(app_id, before, keep_last))).one()
    return num, num_bytes


def delete_older(connection: Connection, app_id: str, before: float, keep_last: bool, limit: int) -> int:
    """Delete up to `limit` of them; return how many."""
    which = sa.select(log_batches.c.first_seq).where(older(app_id, before, keep_last))
    seqs = list(connection.execute(which.order_by(log_batches.c.first_seq).limit(limit)).scalars())
    if seqs:
        mine = sa.and_(log_batches.c.app_id == app_id, log_batches.c.first_seq.in_(seqs))
        connection.execute(log_batches.delete().where(mine))
    return len(seqs)


def _row(batch: LogBatch) -> dict:
    times = [line.at for line in batch.lines] or [batch.at]
    return {
        "app_id": batch.app_id,
        "first_seq": batch.first_seq,
        "last_seq": batch.last_seq,
        "task_id": batch.task_id,
        "function_id": batch.function_id,
        "root_function_id": batch.root_function_id,
        "image_id": batch.image_id,
        "is_end": batch.is_end,
        "first_at": min(times),
        "last_at": max(times),
        "lines": zlib.compress(_encode(batch.lines), COMPRESSION_LEVEL),
    }


def _batch(row: sa.Row) -> LogBatch:
    return LogBatch(
        app_id=row.app_id,
        first_seq=row.first_seq,
        last_seq=row.last_seq,
        task_id=row.task_id,
        function_id=row.function_id,
        root_function_id=row.root_function_id,
        image_id=row.image_id,
        lines=_decode(zlib.decompress(row.lines)),
        is_end=bool(row.is_end),
        at=row.last_at,
    )
