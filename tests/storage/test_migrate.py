import contextlib
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from aeolian.domain.errors import FailedPrecondition, InvalidArgument, Unavailable
from aeolian.storage import migrate
from aeolian.storage.database import make_engine
from aeolian.storage.tables import metadata


@pytest.fixture
def url(database_url):
    return database_url


def test_the_migrated_schema_is_what_the_tables_declare(url):
    migrate.upgrade(url)
    engine = make_engine(migrate.normalized(url))
    with engine.connect() as connection:
        assert migrate.current_revision(connection) == migrate.head_revision()
        assert sa.inspect(connection).has_table("apps")
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_upgrading_a_current_database_changes_nothing(url):
    migrate.upgrade(url)
    migrate.upgrade(url)


def test_a_database_of_the_first_version_gets_what_came_later(url):
    migrate.upgrade(url)
    engine = make_engine(migrate.normalized(url))
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE call_blobs"))
        connection.execute(sa.text("DROP INDEX outputs_in_order"))
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0001'"))
    migrate.upgrade(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_a_database_of_a_newer_version_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    migrate.upgrade(url)
    engine = make_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(FailedPrecondition, match=r"schema 9999.*newer version"):
        migrate.upgrade(url)


@pytest.mark.parametrize("url", ["nonsense", "mysql://x/y"])
def test_what_is_no_usable_url_is_refused(url):
    with pytest.raises(InvalidArgument):
        migrate.upgrade(url)


def test_an_unreachable_database_says_so_without_its_password(tmp_path):
    with pytest.raises(Unavailable, match="cannot be used"):
        migrate.upgrade(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}")
    assert "secret" not in migrate.shown("postgresql://user:secret@host/db")


def test_a_revision_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    create_all = metadata.create_all

    def create_then_fail(*args, **options):
        create_all(*args, **options)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(metadata, "create_all", create_then_fail)
    with pytest.raises(RuntimeError):
        migrate.upgrade(url)
    engine = make_engine(url)
    with engine.connect() as connection:
        assert "apps" not in sa.inspect(connection).get_table_names()
    engine.dispose()
    monkeypatch.undo()
    migrate.upgrade(url)


def test_a_database_that_an_earlier_version_has_left_is_brought_up_to_date_with_all_its_rows(tmp_path):
    for script in sorted((Path(__file__).parent / "earlier").glob("*.sql")):
        path = tmp_path / f"{script.stem}.db"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.executescript(script.read_text())
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            before = {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone() for name in tables}
        migrate.upgrade(f"sqlite:///{path}")
        engine = make_engine(f"sqlite:///{path}")
        with engine.connect() as connection:
            assert migrate.current_revision(connection) == migrate.head_revision()
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []
            for name, count in before.items():
                assert tuple(connection.execute(sa.text(f"SELECT count(*) FROM {name}")).one()) == count
        engine.dispose()
