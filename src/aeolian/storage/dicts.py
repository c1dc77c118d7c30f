"""Entries of Dicts, by the hash of their key."""

import hashlib
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.storage.database import metadata

dict_entries = sa.Table(
    "dict_entries",
    metadata,
    sa.Column("dict_id", sa.String, primary_key=True),
    sa.Column("digest", sa.LargeBinary(20), primary_key=True),
    sa.Column("key", sa.LargeBinary, nullable=False),
    sa.Column("value", sa.LargeBinary, nullable=False),
)


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()[:20]


def get(connection: Connection, dict_id: str, key: bytes) -> bytes | None:
    query = sa.select(dict_entries.c.value).where(
        dict_entries.c.dict_id == dict_id, dict_entries.c.digest == digest_of(key)
    )
    return connection.execute(query).scalar()


def has(connection: Connection, dict_id: str, key: bytes) -> bool:
    query = sa.select(sa.literal(1)).where(dict_entries.c.dict_id == dict_id, dict_entries.c.digest == digest_of(key))
    return connection.execute(query).first() is not None


def put(connection: Connection, dict_id: str, entries: Sequence[tuple[bytes, bytes]]) -> None:
    rows = {digest_of(key): (key, value) for key, value in entries}
    if not rows:
        return
    _drop_digests(connection, dict_id, list(rows))
    connection.execute(
        dict_entries.insert(),
        [{"dict_id": dict_id, "digest": digest, "key": key, "value": value} for digest, (key, value) in rows.items()],
    )


def pop(connection: Connection, dict_id: str, key: bytes) -> bytes | None:
    value = get(connection, dict_id, key)
    if value is not None:
        _drop_digests(connection, dict_id, [digest_of(key)])
    return value


def count(connection: Connection, dict_id: str, limit: int) -> int:
    some = sa.select(dict_entries.c.digest).where(dict_entries.c.dict_id == dict_id).limit(limit).subquery()
    return connection.execute(sa.select(sa.func.count()).select_from(some)).scalar() or 0


def page_of_keys(connection: Connection, dict_id: str, after: bytes, limit: int) -> list[tuple[bytes, bytes, int]]:
    """(digest, key, the value's size in bytes) in order of digests."""
    query = (
        sa.select(dict_entries.c.digest, dict_entries.c.key, sa.func.length(dict_entries.c.value).label("size"))
        .where(dict_entries.c.dict_id == dict_id, dict_entries.c.digest > after)
        .order_by(dict_entries.c.digest)
        .limit(limit)
    )
    return [(row.digest, row.key, row.size) for row in connection.execute(query)]


def range_of_entries(connection: Connection, dict_id: str, first: bytes, last: bytes) -> list[tuple[bytes, bytes]]:
    """(key, value) of the digests from `first` to `last`."""
    query = (
        sa.select(dict_entries.c.key, dict_entries.c.value)
        .where(dict_entries.c.dict_id == dict_id, dict_entries.c.digest.between(first, last))
        .order_by(dict_entries.c.digest)
    )
    return [(row.key, row.value) for row in connection.execute(query)]


def clear(connection: Connection, dict_id: str) -> None:
    connection.execute(dict_entries.delete().where(dict_entries.c.dict_id == dict_id))


def _drop_digests(connection: Connection, dict_id: str, digests: Sequence[bytes]) -> None:
    for start in range(0, len(digests), 400):
        connection.execute(
            dict_entries.delete().where(
                dict_entries.c.dict_id == dict_id, dict_entries.c.digest.in_(digests[start : start + 400])
            )
        )
