"""Aeolian on a PostgreSQL database, which goes away and comes back."""

import sys
import time

import pytest
from faults import client, kill
from postgresql_server import PostgresqlServer
from running import RunningAeolian

SERVICE = """
import modal

app = modal.App("ledger")

@app.function(serialized=True, retries=0)
def enter(number):
    modal.Dict.from_name("ledger", create_if_missing=True)[number] = number * number
    return number
"""
CLIENT = """
import modal, sys, time

enter = modal.Function.from_name("ledger", "enter")
spawned = [enter.spawn(number) for number in range(30)]
print("spawned", flush=True)
for number in range(100, 100 + int(sys.argv[1])):
    assert enter.remote(number) == number
    print("did", number, flush=True)
assert sorted(call.get(timeout=60) for call in spawned) == list(range(30))
ledger = dict(modal.Dict.from_name("ledger").items())
assert all(value == number * number for number, value in ledger.items()), ledger
print("entries:", len(ledger), flush=True)
"""


@pytest.fixture(scope="module")
def postgresql():
    with PostgresqlServer() as server:
        yield server


@pytest.fixture(scope="module")
def aeolian(postgresql, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("pg") / "data"
    options = ("--grpc-port", "0", "--http-port", "0", "--database", postgresql.url)
    running = RunningAeolian(data_dir, "process", *options).start()
    yield running
    running.stop()


def test_nothing_is_lost_when_the_server_is_killed_and_when_the_database_goes_away(aeolian, postgresql, tmp_path):
    aeolian.deploy(SERVICE, tmp_path)
    (tmp_path / "client.py").write_text(CLIENT)
    with client(aeolian, sys.executable, "client.py", "60", cwd=tmp_path) as user:
        user.wait_for("did 110")
        kill(aeolian, "server")
        user.wait_for("did 125")
        postgresql.stop()
        time.sleep(5)
        postgresql.start()
        user.wait_for("did 140")
        assert "entries: 90" in user.end()
    assert not (aeolian.data_dir / "aeolian.db").exists()
