"""The audit trail: who did what, on which object, and whether it was allowed. Entries are only appended."""

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.storage.database import metadata

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Float, nullable=False, index=True),
    sa.Column("who", sa.String, nullable=False),
    sa.Column("caller_id", sa.String, nullable=False, index=True),
    sa.Column("action", sa.String, nullable=False),
    sa.Column("environment", sa.String, nullable=False),
    sa.Column("target", sa.String, nullable=False),
    sa.Column("result", sa.String, nullable=False),
)


class AuditEntry(msgspec.Struct, frozen=True):
    at: float
    who: str
    """Name of the token, id of the container, or `local` for a command on the server's machine."""
    caller_id: str
    """Id of the token or the container."""
    action: str
    """The RPC, or the command."""
    environment: str
    target: str
    """Ids and names of what it was about, never a value."""
    result: str
    """`done`, or the kind of the error."""


def append(connection: Connection, entry: AuditEntry) -> None:
    connection.execute(audit.insert(), msgspec.structs.asdict(entry))


def entries(connection: Connection, *, since: float, caller_id: str, limit: int) -> list[AuditEntry]:
    """The newest `limit` of them, the oldest first. `caller_id` "": of everybody."""
    query = sa.select(audit).where(audit.c.at >= since).order_by(audit.c.number.desc()).limit(limit)
    if caller_id:
        query = query.where((audit.c.caller_id == caller_id) | (audit.c.who == caller_id))
    rows = [dict(row._mapping) for row in connection.execute(query)]
    for row in rows:
        del row["number"]
    return [AuditEntry(**row) for row in reversed(rows)]


def delete_before(connection: Connection, at: float) -> int:
    return connection.execute(audit.delete().where(audit.c.at < at)).rowcount
