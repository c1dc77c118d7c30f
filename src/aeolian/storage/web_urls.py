"""Addresses of web functions: which label has which port, and which Functions answer at a label."""

from collections.abc import Iterable

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.storage.database import metadata

web_labels = sa.Table(
    "web_labels",
    metadata,
    sa.Column("label", sa.String, primary_key=True),
    sa.Column("port", sa.Integer, nullable=False),
    sa.Column("used_at", sa.Float, nullable=False),
)
"""`port` 0: it has none. `used_at`: when a Function took it last."""

web_claims = sa.Table(
    "web_claims",
    metadata,
    sa.Column("label", sa.String, primary_key=True),
    sa.Column("function_id", sa.String, primary_key=True),
    sa.Column("method_name", sa.String, primary_key=True),
    sa.Column("app_id", sa.String, nullable=False, index=True),
    sa.Column("claimed_at", sa.Float, nullable=False),
)


class WebLabel(msgspec.Struct, frozen=True):
    label: str
    port: int
    used_at: float


class WebClaim(msgspec.Struct, frozen=True):
    """A Function, or a method of a class, that answers at a label."""

    label: str
    function_id: str
    method_name: str
    app_id: str
    claimed_at: float


def all_labels(connection: Connection) -> list[WebLabel]:
    return [WebLabel(**row._mapping) for row in connection.execute(sa.select(web_labels))]


def all_claims(connection: Connection) -> list[WebClaim]:
    """In the order of claiming."""
    return [
        WebClaim(**row._mapping) for row in connection.execute(sa.select(web_claims).order_by(web_claims.c.claimed_at))
    ]


def put_label(connection: Connection, label: WebLabel) -> None:
    connection.execute(web_labels.delete().where(web_labels.c.label == label.label))
    connection.execute(web_labels.insert(), msgspec.structs.asdict(label))


def put_claims(connection: Connection, claims: Iterable[WebClaim]) -> None:
    """New claims; whoever claims again comes last again."""
    for claim in claims:
        connection.execute(
            web_claims.delete().where(
                web_claims.c.label == claim.label,
                web_claims.c.function_id == claim.function_id,
                web_claims.c.method_name == claim.method_name,
            )
        )
        connection.execute(web_claims.insert(), msgspec.structs.asdict(claim))


def delete_labels(connection: Connection, labels: Iterable[str]) -> None:
    for label in labels:
        connection.execute(web_labels.delete().where(web_labels.c.label == label))


def delete_claims_of(connection: Connection, app_ids: Iterable[str]) -> None:
    for app_id in app_ids:
        connection.execute(web_claims.delete().where(web_claims.c.app_id == app_id))
