"""Ports that the server opens and the front accepts on, over the link between them."""

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from aeolian.cli.front_ports import FrontPorts
from aeolian.gateway.listeners import Listeners
from aeolian.worker.port_link import listen_for_links


class Both:
    """A front and a server, each of which can start again."""

    def __init__(self, folder: Path):
        self.front_socket, self.destination = folder / "front.sock", folder / "http.sock"
        self.links = listen_for_links(str(self.front_socket))
        self.stack = contextlib.AsyncExitStack()
        self.front: FrontPorts | None = None
        self.listeners: Listeners | None = None

    async def start_front(self) -> None:
        self.front = FrontPorts(self.links.dup(), {}, None)
        await self.front.__aenter__()

    async def end_front(self) -> None:
        await self.front.__aexit__()
        self.front = None

    async def start_server(self) -> Listeners:
        self.listeners = Listeners("127.0.0.1", self.front_socket, self.destination)
        await self.listeners.start()
        return self.listeners

    def end_server(self) -> None:
        self.listeners.stop()

    async def until_front_has(self, *ports: int) -> None:
        async with asyncio.timeout(5):
            while self.front.ports != set(ports):  # noqa: ASYNC110 - what is waited for happens inside the front
                await asyncio.sleep(0.01)


@pytest.fixture
async def both(tmp_path):
    both = Both(tmp_path)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    server = await asyncio.start_unix_server(serve, both.destination)
    await both.start_front()
    yield both
    if both.front is not None:
        await both.end_front()
    if both.listeners is not None:
        both.end_server()
    both.links.close()
    server.close()


async def first_line(port: int) -> str:
    """What the destination is told first of a new connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello\r\n")
    async with asyncio.timeout(5):
        line = (await reader.readline()).decode()
    writer.close()
    return line


async def test_what_the_server_opens_the_front_passes_on_with_a_preface(both):
    listeners = await both.start_server()
    port = listeners.open(0)
    line = await first_line(port)
    assert line.startswith("PROXY TCP4 127.0.0.1 127.0.0.1 ") and line.endswith(f" {port}\r\n")
    other = listeners.open(0, has_preface=False)
    assert await first_line(other) == "hello\r\n"


async def test_a_port_can_go_elsewhere_than_to_the_gateway(both, tmp_path):
    listeners = await both.start_server()
    port = listeners.open(0, destination=tmp_path / "tunnel.sock", has_preface=False)

    async def serve(reader, writer):
        writer.write(b"tunnel\r\n")
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "tunnel.sock"):
        assert await first_line(port) == "tunnel\r\n"


async def test_a_port_of_another_program_is_told_at_once(both):
    listeners = await both.start_server()
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert listeners.open(other.getsockname()[1]) is None
    assert listeners.ports == set()


async def test_a_closed_port_refuses(both):
    listeners = await both.start_server()
    port = listeners.open(0)
    await both.until_front_has(port)
    listeners.close(port)
    await both.until_front_has()
    with pytest.raises(ConnectionRefusedError):
        await first_line(port)


async def test_connections_wait_for_a_server_that_starts_again_and_takes_its_ports_back(both):
    port = (await both.start_server()).open(0)
    await both.until_front_has(port)
    both.end_server()
    assert (await first_line(port)).startswith("PROXY")  # the front alone holds it
    listeners = await both.start_server()
    assert listeners.open(port) == port
    assert (await first_line(port)).startswith("PROXY")


async def test_what_a_new_server_does_not_ask_for_is_closed(both):
    port = (await both.start_server()).open(0)
    await both.until_front_has(port)
    both.end_server()
    (await both.start_server()).close_others()
    await both.until_front_has()
    with pytest.raises(ConnectionRefusedError):
        await first_line(port)


async def test_connections_wait_for_a_front_that_starts_again(both):
    port = (await both.start_server()).open(0)
    await both.until_front_has(port)
    await both.end_front()
    waiting = asyncio.create_task(first_line(port))  # the server alone holds it
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await both.start_front()
    assert (await waiting).startswith("PROXY")


async def test_many_ports_are_handed_over_at_once(both):
    listeners = await both.start_server()
    ports = {listeners.open(0) for _ in range(300)}
    await both.until_front_has(*ports)
    both.end_server()
    listeners = await both.start_server()
    assert {listeners.open(port) for port in ports} == ports


async def test_without_a_front_ports_are_only_bound(tmp_path):
    listeners = Listeners("127.0.0.1", tmp_path / "front.sock", tmp_path / "http.sock")
    await listeners.start()
    port = listeners.open(0)
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", port))
    listeners.stop()
