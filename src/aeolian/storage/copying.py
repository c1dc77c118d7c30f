"""A whole database copied, at one moment of it: into a file, and from such a file into an empty database.

The file is SQLite's, whichever kind the database is of, so that what was kept in one kind can go on in the other.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.domain.errors import FailedPrecondition
from aeolian.storage import migrate
from aeolian.storage.database import make_engine
from aeolian.storage.tables import metadata

ROWS = 1000


def copy_to_file(source: sa.Engine, path: Path) -> None:
    """Copy it as it is now; who works with it goes on meanwhile. `path` must not exist. The schema is the newest."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    if source.dialect.name == "sqlite":
        with source.connect() as connection:
            connection.connection.driver_connection.execute("VACUUM INTO ?", (str(path),))
        return
    url = f"sqlite:///{path}"
    migrate.upgrade(url)
    with source.connect().execution_options(isolation_level="REPEATABLE READ") as connection, connection.begin():
        _copy_rows(connection, url)
    _leave_write_ahead_log(url)


def copy_from_file(path: Path, url: str) -> None:
    """Fill the empty database at `url`. Raises FailedPrecondition when it is not empty, and as `migrate.upgrade`."""
    check_empty(url)
    migrate.upgrade(f"sqlite:///{path}")
    migrate.upgrade(url)
    with _engine(f"sqlite:///{path}") as source, source.connect() as connection:
        _copy_rows(connection, url)


def check_empty(url: str) -> None:
    """Raises FailedPrecondition when somebody uses the database at `url`, and as `migrate.upgrade`."""
    with _engine(migrate.normalized(url)) as engine:
        try:
            with engine.connect() as connection:
                revision = migrate.current_revision(connection)
        except sa.exc.OperationalError as error:
            raise FailedPrecondition(f"the database at {migrate.shown(url)} cannot be used: {error.orig}") from error
    if revision is not None:
        raise FailedPrecondition(
            f"the database at {migrate.shown(url)} is in use by an Aeolian: name an empty one with --database"
        )


def _copy_rows(source: Connection, url: str) -> None:
    """Every row of every table, in one transaction. What a new database begins with gives way."""
    with _engine(migrate.normalized(url)) as engine, engine.begin() as target:
        for table in reversed(metadata.sorted_tables):
            target.execute(table.delete())
        for table in metadata.sorted_tables:
            rows = source.execution_options(yield_per=ROWS).execute(sa.select(table))
            for some in rows.mappings().partitions(ROWS):
                target.execute(table.insert(), [dict(row) for row in some])
            _go_on_counting(target, table)


def _go_on_counting(target: Connection, table: sa.Table) -> None:
    """Numbers that PostgreSQL gives out begin after those that were copied."""
    column = table.autoincrement_column
    if target.dialect.name != "postgresql" or column is None:
        return
    sequence = target.execute(sa.select(sa.func.pg_get_serial_sequence(table.name, column.name))).scalar()
    last = target.execute(sa.select(sa.func.max(column))).scalar()
    if sequence and last:
        target.execute(sa.select(sa.func.setval(sequence, last)))


def _leave_write_ahead_log(url: str) -> None:
    """Everything is in the one file."""
    with _engine(url) as engine, engine.connect() as connection:
        connection.connection.driver_connection.execute("PRAGMA journal_mode=DELETE")


@contextlib.contextmanager
def _engine(url: str) -> Iterator[sa.Engine]:
    engine = make_engine(url)
    try:
        yield engine
    finally:
        engine.dispose()
