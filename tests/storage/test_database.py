import asyncio
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from postgresql_server import PostgresqlServer
from sqlalchemy.engine import Connection

from aeolian.domain.errors import Unavailable
from aeolian.storage import database as database_module
from aeolian.storage import migrate, tokens
from aeolian.storage.database import Database
from aeolian.storage.tokens import Token


async def test_two_processes_may_write_at_the_same_time(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'aeolian.db'}"
    migrate.upgrade(url)
    server, command = Database(url), Database(url)
    loop = asyncio.get_running_loop()
    started = asyncio.Event()

    def read_then_write(connection: Connection) -> None:
        connection.execute(sa.select(tokens.tokens)).all()
        loop.call_soon_threadsafe(started.set)
        time.sleep(0.1)  # long enough for the other to come between the two
        tokens.insert(connection, token("ak-server"))

    for database in (server, command):
        database.open()
    try:
        slow = asyncio.ensure_future(server.write(read_then_write))
        await started.wait()
        await command.write(lambda c: tokens.insert(c, token("ak-command")))
        await slow
        assert {item.token_id for item in await server.read(tokens.all_tokens)} == {"ak-server", "ak-command"}
    finally:
        await server.close()
        await command.close()


def token(token_id: str) -> Token:
    return Token(token_id, secret_hash=b"", name="", workspace="local", is_disabled=False, created_at=0.0)


async def test_a_read_while_the_database_is_away_waits_a_while_and_then_says_so(tmp_path, monkeypatch):
    pytest.importorskip("psycopg")
    monkeypatch.setattr(database_module, "AWAY_S", 0.3)
    database = Database(f"postgresql+psycopg://nobody@/none?host={tmp_path}")
    with pytest.raises(Unavailable, match="the database is away"):
        await database.read(lambda connection: None)
    await database.close()


async def test_writes_and_reads_wait_for_a_postgresql_that_is_away_for_a_moment():
    with PostgresqlServer() as server:
        migrate.upgrade(server.url)
        database = Database(migrate.normalized(server.url))
        database.open()
        try:
            await database.write(lambda connection: tokens.insert(connection, token("ak-1")))
            server.stop()
            write = asyncio.ensure_future(database.write(lambda connection: tokens.insert(connection, token("ak-2"))))
            read = asyncio.ensure_future(database.read(tokens.all_tokens))
            await asyncio.sleep(0.5)
            assert not write.done() and not read.done()
            await asyncio.to_thread(server.start)
            await write
            assert len(await read) >= 1
            assert len(await database.read(tokens.all_tokens)) == 2
        finally:
            await database.close()
