"""Brings a database to the schema that this version of Aeolian needs (Alembic; revisions in `migrations/versions`).

Revisions are numbered (`0001_initial.py` is revision `0001`) and only ever appended. Each runs in one transaction:
it is done, or it left nothing.
"""

import re
from pathlib import Path

import sqlalchemy as sa

from aeolian.domain.errors import FailedPrecondition, InvalidArgument, OutOfSpace, Unavailable
from aeolian.storage.database import make_engine

MIGRATIONS = Path(__file__).parent / "migrations"
_REVISION_FILE = re.compile(r"(\d{4})_\w+\.py")


def upgrade(url: str) -> None:
    """Create or upgrade the schema of the database at `url`. Nothing happens when it is current.

    Raises InvalidArgument when the URL is none or names an unknown kind, Unavailable when the database cannot be
    reached, OutOfSpace, FailedPrecondition when it is damaged or belongs to a newer version of Aeolian.
    """
    engine = _engine(url)
    try:
        with engine.connect() as connection:
            current = current_revision(connection)
        if current == head_revision():
            return
        if current is not None and current > head_revision():
            raise FailedPrecondition(
                f"the database at {shown(url)} has schema {current}, and this version of Aeolian knows up to "
                f"{head_revision()}: run the newer version, or restore a backup from before the upgrade"
            )
        _run_revisions(engine)
    except sa.exc.OperationalError as error:
        if "full" in str(error.orig):
            raise OutOfSpace(f"the disk of the database at {shown(url)} is full: free some space there") from error
        raise Unavailable(
            f"the database at {shown(url)} cannot be used: {error.orig}. Check that it is there and that you may write"
        ) from error
    except sa.exc.DatabaseError as error:
        raise FailedPrecondition(
            f"the database at {shown(url)} cannot be read: {error.orig}. Restore it from a backup, or move it away to "
            "begin with an empty one"
        ) from error
    finally:
        engine.dispose()


def current_revision(connection: sa.Connection) -> str | None:
    """The revision that the database is at; None when it has no schema yet."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def head_revision() -> str:
    """The newest revision, told by file names: a server that starts again does not load Alembic."""
    names = (_REVISION_FILE.fullmatch(path.name) for path in (MIGRATIONS / "versions").iterdir())
    return max(name.group(1) for name in names if name)


def shown(url: str) -> str:
    """`url` without its password."""
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return "(not a URL)"


def normalized(url: str) -> str:
    """`url` with the driver that Aeolian uses (`postgresql://…` means psycopg). Raises InvalidArgument."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise InvalidArgument(f"{url!r} is not a database URL; write sqlite:////path or postgresql://…") from error
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise InvalidArgument(f"{parsed.drivername} is no database that Aeolian can use: sqlite or postgresql")
    return parsed.render_as_string(hide_password=False)


def _engine(url: str) -> sa.Engine:
    try:
        return make_engine(normalized(url))
    except ModuleNotFoundError as error:
        raise InvalidArgument(
            f"the driver for {shown(url)} is missing ({error.name}): pip install 'aeolian[postgresql]'"
        ) from error


def _run_revisions(engine: sa.Engine) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
