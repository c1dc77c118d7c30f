"""Databases for tests: a file, and a throwaway PostgreSQL server where its programs are installed."""

import uuid
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from postgresql_server import PostgresqlServer

from aeolian.storage import migrate


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """The URL of an empty database on a Unix socket."""
    with PostgresqlServer() as server:
        yield server.url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path) -> Iterator[str]:
    """The URL of a database that holds nothing yet, of each kind that Aeolian can use."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.db'}"
        return
    server = migrate.normalized(request.getfixturevalue("postgresql_url"))
    schema = f"test_{uuid.uuid4().hex}"
    engine = sa.create_engine(server)
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {schema}"))
    try:
        yield sa.make_url(server).update_query_dict({"options": f"-csearch_path={schema}"}).render_as_string(False)
    finally:
        with engine.begin() as connection:
            connection.execute(sa.text(f"DROP SCHEMA {schema} CASCADE"))
        engine.dispose()
