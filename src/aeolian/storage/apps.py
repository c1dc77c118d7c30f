"""Tables and queries of Apps and their versions. Layouts and tags are kept as MessagePack."""

from collections.abc import Iterable

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.domain.apps import App, AppState, AppVersion, DeploymentType, Layout
from aeolian.storage.database import metadata

apps = sa.Table(
    "apps",
    metadata,
    sa.Column("app_id", sa.String, primary_key=True),
    sa.Column("workspace", sa.String, nullable=False),
    sa.Column("environment_id", sa.String, nullable=False),
    sa.Column("environment_name", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("description", sa.String, nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("tags", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("created_by", sa.String, nullable=False),
    sa.Column("deployed_at", sa.Float, nullable=False),
    sa.Column("deployed_by", sa.String, nullable=False),
    sa.Column("stopped_at", sa.Float, nullable=False),
    sa.Column("stopped_by", sa.String, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Index("apps_by_name", "environment_id", "name", "stopped_at"),
    sa.Index("apps_by_state", "state", "stopped_at"),
)

app_versions = sa.Table(
    "app_versions",
    metadata,
    sa.Column("app_id", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("deployment_type", sa.String, nullable=False),
    sa.Column("layout", sa.LargeBinary, nullable=False),
    sa.Column("deployed_at", sa.Float, nullable=False),
    sa.Column("deployed_by", sa.String, nullable=False),
    sa.Column("client_version", sa.String, nullable=False),
    sa.Column("deployment_tag", sa.String, nullable=False),
    sa.Column("commit_info", sa.LargeBinary, nullable=False),
    sa.Column("source_version", sa.Integer, nullable=False),
)

_encode = msgspec.msgpack.Encoder().encode
_decode_tags = msgspec.msgpack.Decoder(dict[str, str]).decode
_decode_layout = msgspec.msgpack.Decoder(Layout).decode


def insert_app(connection: Connection, app: App) -> None:
    connection.execute(apps.insert(), _app_row(app))


def update_app(connection: Connection, app: App) -> None:
    connection.execute(apps.update().where(apps.c.app_id == app.app_id).values(_app_row(app)))


def get_app(connection: Connection, app_id: str) -> App | None:
    row = connection.execute(sa.select(apps).where(apps.c.app_id == app_id)).first()
    return None if row is None else _app(row)


def list_living(connection: Connection) -> list[App]:
    """Every app that has not come to its end (STOPPING included)."""
    return [_app(row) for row in connection.execute(sa.select(apps).where(apps.c.state != AppState.STOPPED))]


def list_stopped(connection: Connection, environment_id: str, since: float, limit: int) -> list[App]:
    """Apps of an environment that stopped since then, the latest first."""
    query = (
        sa.select(apps)
        .where(
            apps.c.state == AppState.STOPPED,
            apps.c.stopped_at >= since,
            apps.c.environment_id == environment_id,
        )
        .order_by(apps.c.stopped_at.desc())
        .limit(limit)
    )
    return [_app(row) for row in connection.execute(query)]


def last_stopped_with_name(connection: Connection, environment_id: str, name: str) -> App | None:
    query = (
        sa.select(apps)
        .where(apps.c.environment_id == environment_id, apps.c.name == name, apps.c.state == AppState.STOPPED)
        .order_by(apps.c.stopped_at.desc())
        .limit(1)
    )
    row = connection.execute(query).first()
    return None if row is None else _app(row)


def insert_version(connection: Connection, version: AppVersion) -> None:
    row = msgspec.structs.asdict(version)
    row["layout"] = _encode(version.layout)
    row["deployment_type"] = version.deployment_type.value
    connection.execute(app_versions.insert(), row)


def get_version(connection: Connection, app_id: str, version: int) -> AppVersion | None:
    query = sa.select(app_versions).where(app_versions.c.app_id == app_id, app_versions.c.version == version)
    row = connection.execute(query).first()
    return None if row is None else _version(row)


def list_versions(connection: Connection, app_id: str) -> list[AppVersion]:
    """The newest first."""
    query = sa.select(app_versions).where(app_versions.c.app_id == app_id).order_by(app_versions.c.version.desc())
    return [_version(row) for row in connection.execute(query)]


def newest_version_number(connection: Connection, app_id: str) -> int:
    """0 when nothing was published."""
    query = sa.select(sa.func.max(app_versions.c.version)).where(app_versions.c.app_id == app_id)
    return connection.execute(query).scalar() or 0


def live_layouts(connection: Connection, app_ids: Iterable[str]) -> dict[str, Layout]:
    """The layout of the live version of each of these apps."""
    layouts: dict[str, Layout] = {}
    query = sa.select(app_versions.c.app_id, app_versions.c.layout).join(
        apps, sa.and_(apps.c.app_id == app_versions.c.app_id, apps.c.version == app_versions.c.version)
    )
    wanted = set(app_ids)
    for row in connection.execute(query.where(apps.c.state != AppState.STOPPED)):
        if row.app_id in wanted:
            layouts[row.app_id] = _decode_layout(row.layout)
    return layouts


def _app_row(app: App) -> dict:
    row = msgspec.structs.asdict(app)
    row["state"] = app.state.value
    row["tags"] = _encode(app.tags)
    return row


def _app(row: sa.Row) -> App:
    values = dict(row._mapping)
    return App(**{**values, "state": AppState(row.state), "tags": _decode_tags(row.tags)})


def _version(row: sa.Row) -> AppVersion:
    values = dict(row._mapping)
    values["layout"] = _decode_layout(row.layout)
    values["deployment_type"] = DeploymentType(row.deployment_type)
    return AppVersion(**values)
