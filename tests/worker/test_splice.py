import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from aeolian.worker.splice import Splice


@pytest.fixture
async def splice(tmp_path: Path):
    splice = Splice(tmp_path / "s.sock", hold_s=5)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    splice.port = sock.getsockname()[1]
    await splice.listen(sock)
    yield splice
    await splice.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write(b"<end>")
    writer.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(2):
        while not condition():  # noqa: ASYNC110 - what is waited for happens inside the module under test
            await asyncio.sleep(0.01)


async def connect(splice: Splice):
    return await asyncio.open_connection("127.0.0.1", splice.port)


async def test_bytes_pass_both_ways_and_an_end_of_stream_is_passed_on(splice):
    async with await asyncio.start_unix_server(echo, splice.destination):
        reader, writer = await connect(splice)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.write_eof()
        assert await reader.read() == b"<end>"
        writer.close()
        await writer.wait_closed()
    assert splice.num_held == 0


async def test_much_data_flows_with_little_kept_in_memory(splice):
    async with await asyncio.start_unix_server(echo, splice.destination):
        reader, writer = await connect(splice)
        block = bytes(range(256)) * 4096
        received = 0

        async def send() -> None:
            for _ in range(32):
                writer.write(block)
                await writer.drain()
            writer.write_eof()

        async def receive() -> None:
            nonlocal received
            while data := await reader.read(1 << 20):
                received += len(data)

        await asyncio.gather(send(), receive())
        assert received == 32 * len(block) + len(b"<end>")
        writer.close()


async def test_connections_made_while_the_server_is_away_are_answered_when_it_returns(splice):
    reader, writer = await connect(splice)
    writer.write(b"early" * 100_000)  # more than is held: the rest waits in the kernel
    await asyncio.sleep(0.1)
    assert splice.num_held == 1
    async with await asyncio.start_unix_server(echo, splice.destination):
        async with asyncio.timeout(2):
            assert await reader.readexactly(500_000) == b"early" * 100_000
        writer.close()


async def test_a_stale_socket_of_a_dead_server_counts_as_away(splice):
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(splice.destination))
    dead.close()
    reader, writer = await connect(splice)
    writer.write(b"x")
    await asyncio.sleep(0.05)
    assert splice.num_held == 1
    splice.destination.unlink()
    async with await asyncio.start_unix_server(echo, splice.destination):
        async with asyncio.timeout(2):
            assert await reader.readexactly(1) == b"x"
        writer.close()


async def test_a_client_that_gives_up_is_no_longer_held(splice):
    _reader, writer = await connect(splice)
    await asyncio.sleep(0.05)
    writer.close()
    await until(lambda: not splice.num_held)


async def test_the_hold_has_a_deadline_and_a_bound(tmp_path):
    splice = Splice(tmp_path / "s.sock", hold_s=0.2, max_held=1)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    splice.port = sock.getsockname()[1]
    await splice.listen(sock)
    first, first_writer = await connect(splice)
    await asyncio.sleep(0.05)
    second, second_writer = await connect(splice)
    async with asyncio.timeout(2):
        with pytest.raises((ConnectionError, EOFError)):
            await second.readexactly(1)
        with pytest.raises((ConnectionError, EOFError)):
            await first.readexactly(1)
    first_writer.close()
    second_writer.close()
    await splice.close()


async def test_a_dead_server_closes_its_connections(splice):
    writers = []

    async def serve(_reader, writer):
        writers.append(writer)

    async with await asyncio.start_unix_server(serve, splice.destination):
        reader, writer = await connect(splice)
        await until(lambda: writers)
        writers[0].transport.abort()
        async with asyncio.timeout(2):
            assert await reader.read() == b""
        writer.close()
    await until(lambda: not splice.num_passing)


async def test_where_the_client_begins_one_that_says_nothing_is_not_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr("aeolian.worker.splice.SILENT_S", 0.3)
    splice = Splice(tmp_path / "s.sock", hold_s=5)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    splice.port = sock.getsockname()[1]
    await splice.listen(sock, client_begins=True)
    async with await asyncio.start_unix_server(echo, splice.destination):
        silent, _ = await connect(splice)
        reader, writer = await connect(splice)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert splice.num_passing == 1
        assert await silent.read() == b""  # after its time
        writer.write_eof()
        assert await reader.read() == b"<end>"
        writer.close()
    await splice.close()
