"""`modal volume …` as users type it.

AEOLIAN_TEST_PYTHONS may name further interpreters (separated by colons) with other versions of the client.
"""

import asyncio
import filecmp
import json
import os
import sys

import pytest
from storage_server import storage_server

PYTHONS = [sys.executable, *filter(None, os.environ.get("AEOLIAN_TEST_PYTHONS", "").split(":"))]


@pytest.fixture
async def server(tmp_path, monkeypatch):
    async with storage_server(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture(params=PYTHONS)
def cli(server, request, tmp_path):
    environment = {
        **os.environ,
        "MODAL_SERVER_URL": server.grpc_url,
        "MODAL_TOKEN_ID": "ak-test",
        "MODAL_TOKEN_SECRET": "as-test",
        "MODAL_CONFIG_PATH": str(tmp_path / "none.toml"),
        "COLUMNS": "200",
        "NO_COLOR": "1",
    }

    async def run(*args: str, ok: bool = True) -> str:
        process = await asyncio.create_subprocess_exec(
            request.param, "-m", "modal", "volume", *args,
            env=environment, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await asyncio.wait_for(process.communicate(), 60)
        text = output.decode()
        assert (process.returncode == 0) == ok, text
        return text

    return run


@pytest.mark.parametrize("version", [pytest.param("1", marks=pytest.mark.slow), "2"])
async def test_a_volume_lives_its_whole_life_by_the_cli(cli, tmp_path, version):
    local = tmp_path / "local"
    (local / "sub").mkdir(parents=True)
    (local / "a.txt").write_text("hello")
    (local / "sub/big.bin").write_bytes(os.urandom(9 << 20) + bytes(4 << 20))
    (local / "sub/empty").touch()
    (local / "sub/run.sh").write_text("#!/bin/sh")
    (local / "sub/run.sh").chmod(0o755)
    await cli("create", "data", "--version", version)
    assert "data" in await cli("list")
    await cli("put", "data", str(local), "/in")
    await cli("put", "data", str(local / "a.txt"), "b.txt")
    listed = json.loads(await cli("ls", "data", "in/sub", "--json"))
    assert sorted(entry.get("Filename", entry.get("filename")) for entry in listed) == [
        "in/sub/big.bin",
        "in/sub/empty",
        "in/sub/run.sh",
    ]
    assert "exists" in await cli("put", "data", str(local / "a.txt"), "b.txt", ok=False)
    await cli("put", "data", str(local / "a.txt"), "b.txt", "--force")
    assert "hello" in await cli("get", "data", "b.txt", "-")
    (tmp_path / "out").mkdir()
    await cli("get", "data", "in", str(tmp_path / "out"))
    compared = filecmp.dircmp(local, tmp_path / "out/in")
    assert not (compared.left_only or compared.right_only or compared.diff_files)
    assert filecmp.cmp(local / "sub/big.bin", tmp_path / "out/in/sub/big.bin", shallow=False)
    await cli("cp", "data", "b.txt", "in")
    if version == "2":
        await cli("cp", "data", "-r", "in", "copy")
        assert "copy/sub" in await cli("ls", "data", "copy")
    assert "in/b.txt" in await cli("ls", "data", "in")
    assert "recursive" in await cli("rm", "data", "in", ok=False)
    await cli("rm", "data", "in", "-r")
    assert "in/" not in await cli("ls", "data")
    assert "../x" in await cli("get", "data", "../x", "-", ok=False)
    await cli("rename", "data", "renamed", "--yes")
    assert "renamed" in await cli("list")
    await cli("delete", "renamed", "--yes")
    assert "renamed" not in await cli("list")
    assert "renamed" in await cli("ls", "renamed", ok=False)


async def test_a_volume_that_is_not_there_is_named(cli):
    assert "'nope' not found in environment 'main'" in " ".join((await cli("ls", "nope", ok=False)).split())
