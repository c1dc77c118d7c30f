import asyncio
import contextlib
import os
import socket
import stat
from pathlib import Path

import pytest

from aeolian.domain.errors import Unavailable
from aeolian.worker.ports import ContainerPorts, open_port


@pytest.fixture
async def ports(tmp_path: Path):
    """Of a worker whose containers share the host's network; `ta-1` is the only one."""
    made = ContainerPorts(tmp_path / "ports.sock", None, lambda task_id: task_id == "ta-1")
    await made.open()
    yield made
    await made.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
    writer.write(b"<end>")
    writer.close()


@contextlib.asynccontextmanager
async def serving():
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def test_bytes_pass_to_the_port_that_was_asked_for_and_back(ports, tmp_path):
    async with serving() as port:
        sock = await open_port(tmp_path / "ports.sock", "ta-1", port)
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        block = os.urandom(1 << 20)
        writer.write(block)
        writer.write_eof()
        assert await reader.read() == block + b"<end>"
        writer.close()


@pytest.mark.parametrize("task_id", ["ta-1", "ta-2"])
async def test_what_cannot_be_reached_is_said_before_anything_is_sent(ports, tmp_path, task_id):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(Unavailable, match=task_id):
        await open_port(tmp_path / "ports.sock", task_id, port)


async def test_without_a_worker_a_port_is_away(tmp_path):
    with pytest.raises(Unavailable, match="cannot be reached"):
        await open_port(tmp_path / "ports.sock", "ta-1", 80)


@pytest.mark.parametrize("question", [b"nonsense\n", b"{}\n", b"x" * 5000])
async def test_other_questions_are_refused(ports, tmp_path, question):
    reader, writer = await asyncio.open_unix_connection(tmp_path / "ports.sock")
    writer.write(question)
    with contextlib.suppress(ConnectionResetError):
        assert (await asyncio.wait_for(reader.read(), 5))[:3] in (b"no,", b"")
    writer.close()


async def test_only_the_owner_may_open_the_socket(ports, tmp_path):
    assert stat.S_IMODE(os.stat(tmp_path / "ports.sock").st_mode) == 0o600


async def test_a_container_is_drained_when_the_last_connection_into_it_has_ended(ports, tmp_path):
    async with asyncio.timeout(5):
        await ports.until_drained("ta-1")
        async with serving() as port:
            sock = await open_port(tmp_path / "ports.sock", "ta-1", port)
            drained = asyncio.create_task(ports.until_drained("ta-1"))
            await asyncio.sleep(0)
            assert not drained.done()
            sock.close()
            await drained


async def test_a_port_is_waited_for_until_it_accepts(ports):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    waiting = asyncio.create_task(ports.until_accepting("ta-1", port))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    async with await asyncio.start_server(echo, "127.0.0.1", port):
        await asyncio.wait_for(waiting, 5)
