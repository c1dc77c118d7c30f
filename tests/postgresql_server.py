"""A throwaway PostgreSQL server on a Unix socket, of the programs that Debian's package installs."""

import contextlib
import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def _program(name: str) -> str | None:
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return found[-1] if found else shutil.which(name)


class PostgresqlServer:
    """`with PostgresqlServer() as server:` it runs; inside, it may be stopped and started again."""

    def __init__(self) -> None:
        self._initdb, self._pg_ctl = _program("initdb"), _program("pg_ctl")
        if self._initdb is None or self._pg_ctl is None:
            pytest.skip("PostgreSQL's server programs are not installed (Debian: postgresql)")
        self._account: dict = {}
        self._folder = Path(tempfile.mkdtemp(prefix="aeolian-pg-"))
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)
            self._account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [], "cwd": self._folder}

    @property
    def url(self) -> str:
        """Of an empty database."""
        return f"postgresql://aeolian@/postgres?host={self._folder}"

    def __enter__(self) -> "PostgresqlServer":
        try:
            data = f"{self._folder}/db"
            self._run(
                self._initdb, "-D", data, "-U", "aeolian", "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8"
            )
            self.start()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, *error) -> None:
        try:
            with contextlib.suppress(subprocess.CalledProcessError):  # a test has stopped it
                self.stop()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories={self._folder} -c fsync=off"
        self._run(self._pg_ctl, "-D", f"{self._folder}/db", "-l", f"{self._folder}/log", "-o", options, "-w", "start")

    def stop(self) -> None:
        """At once: those who are connected are cut off."""
        self._run(self._pg_ctl, "-D", f"{self._folder}/db", "-m", "immediate", "-w", "stop")

    def _run(self, *argv: str | None) -> None:
        subprocess.run(
            argv,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **self._account,
        )
