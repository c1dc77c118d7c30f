"""Tunnels: which public port leads to which port of which container."""

from collections.abc import Iterable

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.storage.database import metadata

tunnels = sa.Table(
    "tunnels",
    metadata,
    sa.Column("task_id", sa.String, primary_key=True),
    sa.Column("port", sa.Integer, primary_key=True),
    sa.Column("tls_port", sa.Integer, nullable=False),
    sa.Column("plain_port", sa.Integer, nullable=False),
)


class Tunnel(msgspec.Struct, frozen=True):
    """`tls_port`, `plain_port`: public ports that lead to `port`; `plain_port` 0: it has none."""

    task_id: str
    port: int
    tls_port: int
    plain_port: int = 0


def all_tunnels(connection: Connection) -> list[Tunnel]:
    return [Tunnel(**row._mapping) for row in connection.execute(sa.select(tunnels))]


def put(connection: Connection, tunnel: Tunnel) -> None:
    connection.execute(tunnels.insert(), msgspec.structs.asdict(tunnel))


def delete(connection: Connection, gone: Iterable[Tunnel]) -> None:
    for tunnel in gone:
        connection.execute(tunnels.delete().where(tunnels.c.task_id == tunnel.task_id, tunnels.c.port == tunnel.port))
