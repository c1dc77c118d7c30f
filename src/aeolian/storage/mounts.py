"""Tables and queries of Mounts. A mount's files are kept as MessagePack; their content lives in the ContentStore."""

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.domain.containers import MountFile
from aeolian.storage.database import metadata

mounts = sa.Table(
    "mounts",
    metadata,
    sa.Column("mount_id", sa.String, primary_key=True),
    sa.Column("checksum", sa.String, nullable=False),
    sa.Column("files", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)

mount_names = sa.Table(
    "mount_names",
    metadata,
    sa.Column("environment_id", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("mount_id", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[MountFile, ...]).decode


class MountRow(msgspec.Struct, frozen=True):
    mount_id: str
    checksum: str
    files: tuple[MountFile, ...]


def insert_mount(connection: Connection, mount: MountRow, now: float) -> None:
    """Nothing happens when it is there: a mount never changes."""
    if connection.execute(sa.select(mounts.c.mount_id).where(mounts.c.mount_id == mount.mount_id)).first() is None:
        connection.execute(
            mounts.insert(),
            {
                "mount_id": mount.mount_id,
                "checksum": mount.checksum,
                "files": _encode(mount.files),
                "created_at": now,
            },
        )


def get_mount(connection: Connection, mount_id: str) -> MountRow | None:
    row = connection.execute(sa.select(mounts).where(mounts.c.mount_id == mount_id)).first()
    return None if row is None else MountRow(row.mount_id, row.checksum, _decode(row.files))


def referenced_contents(connection: Connection) -> set[str]:
    """The SHA-256s, hexadecimal, of all files of all mounts."""
    rows = connection.execution_options(yield_per=100).execute(sa.select(mounts.c.files))
    return {file.sha256_hex for (files,) in rows for file in _decode(files)}


def get_named(connection: Connection, environment_id: str, name: str) -> str | None:
    """The id of the mount deployed under that name."""
    query = sa.select(mount_names.c.mount_id).where(
        mount_names.c.environment_id == environment_id, mount_names.c.name == name
    )
    return connection.execute(query).scalar()


def put_name(connection: Connection, environment_id: str, name: str, mount_id: str, now: float) -> None:
    """Deploy a mount under a name, in the place of the one that had it."""
    key = sa.and_(mount_names.c.environment_id == environment_id, mount_names.c.name == name)
    values = {"mount_id": mount_id, "created_at": now}
    if connection.execute(mount_names.update().where(key).values(values)).rowcount == 0:
        connection.execute(mount_names.insert(), {"environment_id": environment_id, "name": name, **values})
