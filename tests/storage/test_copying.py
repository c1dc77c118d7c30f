import pytest
import sqlalchemy as sa

from aeolian.domain.errors import FailedPrecondition
from aeolian.storage import calls, copying, dicts, migrate, tokens
from aeolian.storage.database import make_engine
from aeolian.storage.tables import metadata

CALL = {
    "call_id": "fc-1",
    "function_id": "fu-1",
    "app_id": "ap-1",
    "workspace": "local",
    "call_type": 1,
    "invocation": 3,
    "parent_call_id": "",
    "parent_idx": 0,
    "created_at": 1.5,
    "expires_at": None,
    "is_cancelled": False,
}
INPUTS = [
    {"call_id": "fc-1", "idx": idx, "payload": bytes([idx % 256]), "retry_count": 0, "created_at": 1.0, "due_at": 0.0}
    for idx in range(2500)
]


@pytest.fixture
def filled(database_url):
    migrate.upgrade(database_url)
    engine = make_engine(migrate.normalized(database_url))
    with engine.begin() as connection:
        connection.execute(calls.calls.insert(), CALL)
        connection.execute(calls.inputs.insert(), INPUTS)
    yield engine
    engine.dispose()


def rows_of(engine: sa.Engine, table: sa.Table) -> list[tuple]:
    with engine.connect() as connection:
        return sorted(map(tuple, connection.execute(sa.select(table))), key=repr)


def test_a_copy_in_a_file_holds_every_row_and_nothing_else_lies_beside_it(filled, tmp_path):
    path = tmp_path / "copy" / "aeolian.db"
    path.parent.mkdir()
    copying.copy_to_file(filled, path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]
    copy = make_engine(f"sqlite:///{path}")
    for table in metadata.sorted_tables:
        assert rows_of(copy, table) == rows_of(filled, table)
    copy.dispose()
    migrate.upgrade(f"sqlite:///{path}")


def test_what_is_written_meanwhile_is_not_in_the_copy_and_not_kept_waiting(filled, tmp_path, monkeypatch):
    copy_rows = copying._copy_rows

    def write_first(source, url):
        source.execute(sa.select(calls.calls)).all()  # the snapshot is taken by the first statement
        with filled.begin() as connection:
            connection.execute(calls.inputs.delete())
        copy_rows(source, url)

    monkeypatch.setattr(copying, "_copy_rows", write_first)
    path = tmp_path / "copy.db"
    copying.copy_to_file(filled, path)
    copy = make_engine(f"sqlite:///{path}")
    assert len(rows_of(copy, calls.inputs)) == len(INPUTS)
    copy.dispose()


def test_a_file_fills_an_empty_database_of_either_kind(filled, database_url, postgresql_url, tmp_path):
    path = tmp_path / "copy.db"
    copying.copy_to_file(filled, path)
    with pytest.raises(FailedPrecondition, match="is in use"):
        copying.copy_from_file(path, database_url)
    url = f"{postgresql_url}&options=-csearch_path%3Drestored"
    engine = make_engine(migrate.normalized(postgresql_url))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA restored"))
    try:
        copying.copy_from_file(path, url)
        target = make_engine(migrate.normalized(url))
        for table in (calls.calls, calls.inputs, tokens.tokens, dicts.dict_entries):
            assert rows_of(target, table) == rows_of(filled, table)
        target.dispose()
    finally:
        with engine.begin() as connection:
            connection.execute(sa.text("DROP SCHEMA restored CASCADE"))
        engine.dispose()
