"""`aeolian up` with something wrong: it says what, with which value, and what to do; and it leaves nothing running."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aeolian.cli.data_lock import DataLock
from aeolian.cli.settings import create_folders

PORTS = ("--grpc-port", "0", "--http-port", "0", "--runtime", "process")


def up(data_dir: Path, *options: str, timeout_s: float = 60) -> str:
    """What it says before it gives up."""
    done = subprocess.run(
        [sys.executable, "-m", "aeolian.cli.main", "up", "--data-dir", str(data_dir), *PORTS, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "COLUMNS": "300"},
    )
    assert done.returncode in (1, 2), done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "--serve-network-without-tls"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid cannot be resolved"),
        (("--host", "::1"), "name an IPv4 address"),
        (("--grpc-port", "70000"), "70000 is not in the range"),
        (("--database", "nonsense"), "'nonsense' is not a database URL"),
        (("--database", "mysql://x/y"), "mysql is no database that Aeolian can use: sqlite or postgresql"),
        (("--tls-certificate", "/nowhere.pem"), "--tls-certificate and --tls-key belong together"),
        (("--tls-certificate", "/nowhere.pem", "--tls-key", "/nowhere.key"), "/nowhere.pem with the key /nowhere.key"),
        (("--runtime", "docker"), "'docker' is not one of"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, message):
    assert message in up(tmp_path / "data", *options)


def test_a_data_directory_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in up(tmp_path / "file")
    assert f"the data directory {tmp_path}/file/data cannot be used: Not a directory" in up(tmp_path / "file/data")
    too_long = up(tmp_path / ("long" * 30))
    assert "too long for the Unix sockets in it" in too_long and "--data-dir" in too_long


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_data_directory_that_may_not_be_written_is_refused(tmp_path):
    (tmp_path / "data").mkdir(mode=0o500)
    assert "cannot be used: Permission denied" in up(tmp_path / "data")


def test_a_port_in_use_is_named_with_its_option(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        said = up(tmp_path / "data", "--http-port", str(port))
    assert f"port {port} on 127.0.0.1 is in use by process {os.getpid()}" in said and "--http-port" in said


def test_a_data_directory_has_one_aeolian(tmp_path):
    create_folders(tmp_path / "data")
    lock = DataLock(tmp_path / "data/run")
    lock.acquire()
    try:
        said = up(tmp_path / "data")
    finally:
        lock.release()
    assert f"already running on {tmp_path}/data (process {os.getpid()})" in said


def test_a_damaged_database_stops_everything_and_stays_as_it_is(tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    damaged = b"this was a database once, but somebody wrote into it " * 100
    (data_dir / "aeolian.db").write_bytes(damaged)
    said = up(data_dir)
    assert "aeolian.db cannot be read: file is not a database" in said and "backup" in said
    assert (data_dir / "aeolian.db").read_bytes() == damaged


def test_a_database_that_is_away_is_named_without_its_password(tmp_path):
    said = up(tmp_path / "data", "--database", "postgresql://me:secret@127.0.0.1:1/mine")
    assert "the database at postgresql://me:***@127.0.0.1:1/mine cannot be used" in said.replace("+psycopg", "")
    assert "secret" not in said
