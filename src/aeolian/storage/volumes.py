"""Tables and queries of Volumes. An entry that is gone stays as a tombstone of the version that removed it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection

from aeolian.domain.volumes import EntryKind, VolumeEntry
from aeolian.storage.database import metadata

# Ranges of paths need an order by code point.
PathType = sa.String().with_variant(postgresql.VARCHAR(collation="C"), "postgresql")

volumes = sa.Table(
    "volumes",
    metadata,
    sa.Column("volume_id", sa.String, primary_key=True),
    sa.Column("environment_id", sa.String, nullable=False),
    sa.Column("name", sa.String, nullable=True),  # NULL: anonymous; unique names may hold many of them
    sa.Column("fs_version", sa.Integer, nullable=False),
    sa.Column("kind", sa.String, nullable=False),  # named | ephemeral | owned
    sa.Column("app_id", sa.String, nullable=False),
    sa.Column("options", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("created_by", sa.String, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Index("volumes_by_name", "environment_id", "name", unique=True),
    sa.Index("volumes_by_app", "app_id"),
)

volume_entries = sa.Table(
    "volume_entries",
    metadata,
    sa.Column("volume_id", sa.String, primary_key=True),
    sa.Column("path", PathType, primary_key=True),
    sa.Column("parent", PathType, nullable=False),
    sa.Column("kind", sa.SmallInteger, nullable=False),
    sa.Column("mode", sa.Integer, nullable=False),
    sa.Column("mtime_ns", sa.BigInteger, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("content", sa.String, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Index("volume_entries_by_parent", "volume_id", "parent", "path"),
    sa.Index("volume_entries_by_version", "volume_id", "version"),
    sa.Index("volume_entries_by_content", "content"),
)

dropped_contents = sa.Table(
    "dropped_contents",
    metadata,
    sa.Column("content", sa.String, primary_key=True),
    sa.Column("volume_id", sa.String, nullable=False),
)
"""What an entry named and names no more. Others may still name it; if none does, it is collected."""

IN_BATCH = 400

_encode = msgspec.msgpack.Encoder().encode
_decode_options = msgspec.msgpack.Decoder(dict[str, str]).decode


class Volume(msgspec.Struct, frozen=True):
    """A volume's own row. `version` counts its commits."""

    volume_id: str
    environment_id: str
    name: str
    """"" for an anonymous one."""
    fs_version: int
    kind: str
    app_id: str
    options: dict[str, str]
    created_at: float
    created_by: str
    version: int = 0


_columns = (
    volume_entries.c.path,
    volume_entries.c.kind,
    volume_entries.c.mode,
    volume_entries.c.mtime_ns,
    volume_entries.c.size_bytes,
    volume_entries.c.content,
)


def insert_volume(connection: Connection, volume: Volume) -> None:
    row = msgspec.structs.asdict(volume) | {"name": volume.name or None, "options": _encode(volume.options)}
    connection.execute(volumes.insert(), row)


def get_volume(connection: Connection, volume_id: str) -> Volume | None:
    row = connection.execute(sa.select(volumes).where(volumes.c.volume_id == volume_id)).first()
    return None if row is None else _volume(row)


def find_volume(connection: Connection, environment_id: str, name: str) -> Volume | None:
    query = sa.select(volumes).where(volumes.c.environment_id == environment_id, volumes.c.name == name)
    row = connection.execute(query).first()
    return None if row is None else _volume(row)


def list_volumes(connection: Connection, environment_id: str, created_before: float, limit: int) -> list[Volume]:
    """Named volumes, the newest first."""
    query = (
        sa.select(volumes)
        .where(
            volumes.c.environment_id == environment_id,
            volumes.c.name.is_not(None),
            volumes.c.created_at < created_before,
        )
        .order_by(volumes.c.created_at.desc())
        .limit(limit)
    )
    return [_volume(row) for row in connection.execute(query)]


def count(connection: Connection) -> int:
    return connection.execute(sa.select(sa.func.count()).select_from(volumes)).scalar_one()


def newest_created_at(connection: Connection) -> float:
    return connection.execute(sa.select(sa.func.max(volumes.c.created_at))).scalar() or 0.0


def ids_of_kind(connection: Connection, kind: str) -> list[str]:
    return list(connection.execute(sa.select(volumes.c.volume_id).where(volumes.c.kind == kind)).scalars())


def ids_owned_by(connection: Connection, app_id: str) -> list[str]:
    query = sa.select(volumes.c.volume_id).where(volumes.c.app_id == app_id, volumes.c.kind == "owned")
    return list(connection.execute(query).scalars())


def ids_in(connection: Connection, environment_id: str) -> list[str]:
    return list(
        connection.execute(sa.select(volumes.c.volume_id).where(volumes.c.environment_id == environment_id)).scalars()
    )


def rename_volume(connection: Connection, volume_id: str, name: str) -> None:
    connection.execute(volumes.update().where(volumes.c.volume_id == volume_id).values(name=name))


def set_version(connection: Connection, volume_id: str, version: int) -> None:
    connection.execute(volumes.update().where(volumes.c.volume_id == volume_id).values(version=version))


def delete_volume(connection: Connection, volume_id: str) -> bool:
    """Delete it with all entries; return whether it was there."""
    _drop_contents(connection, volume_entries.c.volume_id == volume_id)
    connection.execute(volume_entries.delete().where(volume_entries.c.volume_id == volume_id))
    return connection.execute(volumes.delete().where(volumes.c.volume_id == volume_id)).rowcount > 0


# ---- entries ----------------------------------------------------------------------------------------------


def get_entry(connection: Connection, volume_id: str, path: str) -> VolumeEntry | None:
    """The living entry at a path."""
    query = sa.select(*_columns).where(
        volume_entries.c.volume_id == volume_id,
        volume_entries.c.path == path,
        volume_entries.c.kind != EntryKind.GONE,
    )
    row = connection.execute(query).first()
    return None if row is None else VolumeEntry(*row)


def get_entries(connection: Connection, volume_id: str, paths: Iterable[str]) -> dict[str, VolumeEntry]:
    """The living entries among these paths."""
    found: dict[str, VolumeEntry] = {}
    wanted = list(dict.fromkeys(paths))
    for start in range(0, len(wanted), IN_BATCH):
        query = sa.select(*_columns).where(
            volume_entries.c.volume_id == volume_id,
            volume_entries.c.path.in_(wanted[start : start + IN_BATCH]),
            volume_entries.c.kind != EntryKind.GONE,
        )
        found.update((row.path, VolumeEntry(*row)) for row in connection.execute(query))
    return found


def list_children(connection: Connection, volume_id: str, folder: str, after: str, limit: int) -> list[VolumeEntry]:
    """What is directly in `folder` ("" = root), by path, after path `after`."""
    query = sa.select(*_columns).where(
        volume_entries.c.volume_id == volume_id,
        volume_entries.c.parent == folder,
        volume_entries.c.path > after,
        volume_entries.c.kind != EntryKind.GONE,
    )
    return [VolumeEntry(*row) for row in connection.execute(query.order_by(volume_entries.c.path).limit(limit))]


def list_below(
    connection: Connection, volume_id: str, folder: str, after: str = "", limit: int | None = None
) -> list[VolumeEntry]:
    """Everything below `folder` ("" = root), by path, after path `after`."""
    query = sa.select(*_columns).where(
        volume_entries.c.volume_id == volume_id,
        _below(folder),
        volume_entries.c.path > after,
        volume_entries.c.kind != EntryKind.GONE,
    )
    return [VolumeEntry(*row) for row in connection.execute(query.order_by(volume_entries.c.path).limit(limit))]


def list_changed(connection: Connection, volume_id: str, since: int, after: str, limit: int) -> list[VolumeEntry]:
    """Entries that a version after `since` changed, tombstones included unless `since` is 0; by path."""
    query = sa.select(*_columns).where(
        volume_entries.c.volume_id == volume_id, volume_entries.c.version > since, volume_entries.c.path > after
    )
    if since == 0:
        query = query.where(volume_entries.c.kind != EntryKind.GONE)
    return [VolumeEntry(*row) for row in connection.execute(query.order_by(volume_entries.c.path).limit(limit))]


def put_entries(connection: Connection, volume_id: str, entries: Sequence[VolumeEntry], version: int) -> None:
    """Set these entries (or tombstones); paths must differ."""
    if not entries:
        return
    for start in range(0, len(entries), IN_BATCH):
        paths = [entry.path for entry in entries[start : start + IN_BATCH]]
        _drop_contents(connection, (volume_entries.c.volume_id == volume_id) & volume_entries.c.path.in_(paths))
    connection.execute(
        volume_entries.delete().where(
            volume_entries.c.volume_id == sa.bindparam("key_id"), volume_entries.c.path == sa.bindparam("key_path")
        ),
        [{"key_id": volume_id, "key_path": entry.path} for entry in entries],
    )
    rows = [
        msgspec.structs.asdict(entry)
        | {"volume_id": volume_id, "parent": entry.path.rpartition("/")[0], "version": version}
        for entry in entries
    ]
    connection.execute(volume_entries.insert(), rows)


def remove_below(
    connection: Connection, volume_id: str, folder: str, version: int, seen: tuple[int, Sequence[int]] | None = None
) -> int:
    """Turn everything below `folder` into tombstones; return how many.

    `seen` = (base version, own versions): only entries that a reader of these versions has seen.
    """
    which = (volume_entries.c.volume_id == volume_id) & _below(folder) & (volume_entries.c.kind != EntryKind.GONE)
    if seen is not None:
        base, own = seen
        own = [number for number in own if number > base]
        which &= (
            sa.or_(volume_entries.c.version <= base, volume_entries.c.version.in_(own)) if own
            else volume_entries.c.version <= base
        )  # fmt: skip
    _drop_contents(connection, which)
    statement = volume_entries.update().where(which)
    values = {"kind": EntryKind.GONE, "content": "", "size_bytes": 0, "version": version}
    return connection.execute(statement.values(values)).rowcount


# ---- contents ---------------------------------------------------------------------------------------------


def _drop_contents(connection: Connection, which: sa.ColumnElement[bool]) -> None:
    """Remember what these entries name: they are about to go, or to name something else."""
    is_known = sa.exists().where(dropped_contents.c.content == volume_entries.c.content)
    query = (
        sa.select(volume_entries.c.content, volume_entries.c.volume_id)
        .where(which, volume_entries.c.kind == EntryKind.FILE, ~is_known)
        .distinct()
    )
    connection.execute(dropped_contents.insert().from_select(["content", "volume_id"], query))


class Dropped(NamedTuple):
    content: str
    volume_id: str


def list_dropped(connection: Connection, after: str, limit: int) -> list[Dropped]:
    """By content, after content `after`."""
    query = (
        sa.select(dropped_contents.c.content, dropped_contents.c.volume_id)
        .where(dropped_contents.c.content > after)
        .order_by(dropped_contents.c.content)
        .limit(limit)
    )
    return [Dropped(content, volume_id) for content, volume_id in connection.execute(query)]


def named_contents(connection: Connection, contents: Sequence[str]) -> set[str]:
    """Those of these contents that any volume names."""
    found: set[str] = set()
    for start in range(0, len(contents), IN_BATCH):
        query = sa.select(volume_entries.c.content).where(
            volume_entries.c.content.in_(contents[start : start + IN_BATCH]), volume_entries.c.kind == EntryKind.FILE
        )
        found.update(connection.execute(query.distinct()).scalars())
    return found


def forget_dropped(connection: Connection, contents: Sequence[str]) -> None:
    for start in range(0, len(contents), IN_BATCH):
        batch = contents[start : start + IN_BATCH]
        connection.execute(dropped_contents.delete().where(dropped_contents.c.content.in_(batch)))


def existing_ids(connection: Connection, volume_ids: Iterable[str]) -> set[str]:
    """Those of these volumes that there are."""
    query = sa.select(volumes.c.volume_id).where(volumes.c.volume_id.in_(list(volume_ids)))
    return set(connection.execute(query).scalars())


def referenced_contents(connection: Connection) -> set[str]:
    """Content ids that any volume names."""
    query = sa.select(volume_entries.c.content).where(volume_entries.c.kind == EntryKind.FILE).distinct()
    return set(connection.execute(query).scalars())


def _below(folder: str) -> sa.ColumnElement[bool]:
    if not folder:
        return sa.true()
    # "0" follows "/" in the order of code points.
    return sa.and_(volume_entries.c.path > folder + "/", volume_entries.c.path < folder + "0")


def _volume(row: sa.Row) -> Volume:
    values = dict(row._mapping)
    return Volume(**values | {"name": row.name or "", "options": _decode_options(row.options)})
