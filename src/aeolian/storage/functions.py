"""Tables and queries of Functions, their definitions, and Classes. Definitions are serialized protobuf."""

from collections.abc import Iterable

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.domain.apps import AppState
from aeolian.storage.apps import apps
from aeolian.storage.database import metadata

functions = sa.Table(
    "functions",
    metadata,
    sa.Column("function_id", sa.String, primary_key=True),
    sa.Column("app_id", sa.String, nullable=False, index=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("handle", sa.LargeBinary, nullable=False),
    sa.Column("draft_definition_id", sa.String, nullable=False),
    sa.Column("base_function_id", sa.String, nullable=False),
    sa.Column("serialized_params", sa.LargeBinary, nullable=False),
    sa.Column("options", sa.LargeBinary, nullable=False),
    sa.Column("pinned_version", sa.Integer, nullable=False),
    sa.Column("autoscaler_override", sa.LargeBinary, nullable=False),
    sa.Column("autoscaler_events", sa.LargeBinary, nullable=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Index("variants_by_base", "base_function_id", "created_at"),
)

function_definitions = sa.Table(
    "function_definitions",
    metadata,
    sa.Column("definition_id", sa.String, primary_key=True),
    sa.Column("function_id", sa.String, nullable=False, index=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
    sa.Column("dependencies", sa.LargeBinary, nullable=False),
    sa.Column("sdk_version", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)

classes = sa.Table(
    "classes",
    metadata,
    sa.Column("class_id", sa.String, primary_key=True),
    sa.Column("app_id", sa.String, nullable=False, index=True),
    sa.Column("created_at", sa.Float, nullable=False),
)


class FunctionRow(msgspec.Struct, frozen=True):
    """A Function, or a variant of one (`base_function_id` set) that `Cls(p=1)` or `with_options` made."""

    function_id: str
    app_id: str
    name: str
    handle: bytes = b""
    """What FunctionPrecreate said of it (a serialized FunctionHandleMetadata), until it has a definition."""
    draft_definition_id: str = ""
    """The newest definition, live or not; "" before FunctionCreate."""
    base_function_id: str = ""
    serialized_params: bytes = b""
    options: bytes = b""
    """Of a variant: a serialized FunctionOptions."""
    pinned_version: int = 0
    """Of a variant: the version of the app whose code it runs; 0 = the live one."""
    autoscaler_override: bytes = b""
    """A serialized AutoscalerSettings with only the overridden fields; gone at the next deployment."""
    autoscaler_events: bytes | None = None
    """Who overrode which of them, and when: the `override_events` of a serialized AutoscalerConfiguration."""
    created_at: float = 0.0


class DefinitionRow(msgspec.Struct, frozen=True):
    """The code and settings of a Function at one time; never changes."""

    definition_id: str
    function_id: str
    content: bytes
    """A serialized FunctionData in which only `ranked_functions` is set."""
    dependencies: bytes
    """A serialized AppLayout whose `objects` describe every id in `object_dependencies`."""
    sdk_version: str
    created_at: float


def insert_function(connection: Connection, row: FunctionRow) -> None:
    connection.execute(functions.insert(), msgspec.structs.asdict(row))


def get_function(connection: Connection, function_id: str) -> FunctionRow | None:
    row = connection.execute(sa.select(functions).where(functions.c.function_id == function_id)).first()
    return None if row is None else FunctionRow(**row._mapping)


def definitions_by_app(connection: Connection) -> Iterable[tuple[str, float, bytes]]:
    """(App, when it was made, content) of every definition, read some at a time."""
    query = sa.select(functions.c.app_id, function_definitions.c.created_at, function_definitions.c.content)
    query = query.join(functions, functions.c.function_id == function_definitions.c.function_id)
    for row in connection.execution_options(yield_per=50).execute(query):
        yield row.app_id, row.created_at, row.content


def names_of(connection: Connection, function_ids: Iterable[str]) -> dict[str, str]:
    """Function id -> name, of those that exist."""
    query = sa.select(functions.c.function_id, functions.c.name)
    rows = connection.execute(query.where(functions.c.function_id.in_(list(function_ids))))
    return {row.function_id: row.name for row in rows}


def list_living_functions(connection: Connection) -> list[FunctionRow]:
    """Functions and variants of all apps that have not ended."""
    query = sa.select(functions).join(apps, apps.c.app_id == functions.c.app_id).where(apps.c.state != AppState.STOPPED)
    return [FunctionRow(**row._mapping) for row in connection.execute(query)]


def set_draft(connection: Connection, function_id: str, definition_id: str) -> None:
    connection.execute(
        functions.update().where(functions.c.function_id == function_id).values(draft_definition_id=definition_id)
    )


def set_autoscaler_override(
    connection: Connection, function_ids: Iterable[str], override: bytes, events: bytes = b""
) -> None:
    for function_id in function_ids:
        connection.execute(
            functions.update()
            .where(functions.c.function_id == function_id)
            .values(autoscaler_override=override, autoscaler_events=events)
        )


def list_variants(
    connection: Connection, base_function_id: str, before: tuple[float, str] | None, limit: int
) -> list[FunctionRow]:
    """Variants of a Function, the newest first, after the cursor (created_at, function_id). Pinned ones are left out."""
    query = sa.select(functions).where(
        functions.c.base_function_id == base_function_id, functions.c.pinned_version == 0
    )
    if before is not None:
        at, function_id = before
        query = query.where(
            sa.or_(
                functions.c.created_at < at,
                sa.and_(functions.c.created_at == at, functions.c.function_id < function_id),
            )
        )
    query = query.order_by(functions.c.created_at.desc(), functions.c.function_id.desc()).limit(limit)
    return [FunctionRow(**row._mapping) for row in connection.execute(query)]


def put_definition(connection: Connection, row: DefinitionRow) -> None:
    """Insert it unless it is there: definitions are content-addressed."""
    query = sa.select(function_definitions.c.definition_id).where(
        function_definitions.c.definition_id == row.definition_id
    )
    if connection.execute(query).first() is None:
        connection.execute(function_definitions.insert(), msgspec.structs.asdict(row))


def get_definition(connection: Connection, definition_id: str) -> DefinitionRow | None:
    query = sa.select(function_definitions).where(function_definitions.c.definition_id == definition_id)
    row = connection.execute(query).first()
    return None if row is None else DefinitionRow(**row._mapping)


def owners_of_definitions(connection: Connection, definition_ids: Iterable[str]) -> dict[str, str]:
    """definition_id -> function_id, for those that exist."""
    found: dict[str, str] = {}
    wanted = sorted(set(definition_ids))
    for start in range(0, len(wanted), 500):
        query = sa.select(function_definitions.c.definition_id, function_definitions.c.function_id).where(
            function_definitions.c.definition_id.in_(wanted[start : start + 500])
        )
        found.update({row.definition_id: row.function_id for row in connection.execute(query)})
    return found


def insert_class(connection: Connection, class_id: str, app_id: str, created_at: float) -> None:
    connection.execute(classes.insert(), {"class_id": class_id, "app_id": app_id, "created_at": created_at})


def app_of_class(connection: Connection, class_id: str) -> str | None:
    return connection.execute(sa.select(classes.c.app_id).where(classes.c.class_id == class_id)).scalar()


def apps_of_classes(connection: Connection, class_ids: Iterable[str]) -> dict[str, str]:
    """class_id -> app_id, for those that exist."""
    found = {class_id: app_of_class(connection, class_id) for class_id in set(class_ids)}
    return {class_id: app_id for class_id, app_id in found.items() if app_id is not None}
