"""The database of a data directory, for commands that look into it or change it beside a running server."""

from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa

from aeolian.cli.settings import Settings
from aeolian.domain.errors import FailedPrecondition, Unavailable
from aeolian.storage import migrate
from aeolian.storage.database import Database


def open_database(settings: Settings, *, read_only: bool = False) -> Database:
    """The caller closes it. Raises FailedPrecondition when it is not there yet or of another version of Aeolian,
    Unavailable when it cannot be reached."""
    url = sa.make_url(migrate.normalized(settings.database))
    if url.get_backend_name() == "sqlite":
        if not url.database or not Path(url.database).exists():
            raise FailedPrecondition(
                f"there is no database at {url.database} yet: `aeolian up --data-dir {settings.data_dir}` makes it"
            )
        if read_only:
            url = url.set(database=f"file:{quote(url.database)}", query={"mode": "ro", "uri": "true"})
    database = Database(url.render_as_string(hide_password=False))
    try:
        with database.engine.connect() as connection:
            revision = migrate.current_revision(connection)
    except sa.exc.OperationalError as error:
        raise Unavailable(f"the database at {migrate.shown(settings.database)} cannot be read: {error.orig}") from error
    if revision != migrate.head_revision():
        raise FailedPrecondition(
            f"the database at {migrate.shown(settings.database)} has schema {revision or 'none'}, and this version of "
            f"Aeolian needs {migrate.head_revision()}: start it once with `aeolian up`, or use the version that made it"
        )
    return database
