import asyncio
import socket

import pytest

from aeolian.worker.networks import resolvers
from aeolian.worker.networks.resolvers import Known, Resolvers, find, text_of


@pytest.fixture
def files(tmp_path):
    def write(usual: str, upstream: str | None = None) -> Known:
        (tmp_path / "usual").write_text(usual)
        if upstream is not None:
            (tmp_path / "upstream").write_text(upstream)
        return find(tmp_path / "usual", tmp_path / "upstream")

    return write


def test_resolvers_that_can_be_reached_are_kept_with_everything_else(files):
    text = text_of(files("search lab\nnameserver 192.0.2.53\nnameserver ::1\noptions ndots:2\n"), "10.0.0.1")
    assert text == "search lab\noptions ndots:2\nnameserver 192.0.2.53\n"


def test_behind_systemd_resolved_those_are_taken_that_it_asks_itself(files):
    assert files("nameserver 127.0.0.53\n", "nameserver 192.0.2.1\n").reachable == ("192.0.2.1",)


def test_one_on_the_loopback_alone_is_relayed(files):
    known = files("nameserver 127.0.0.1\n")
    assert not known.reachable and text_of(known, "10.0.0.1") == "nameserver 10.0.0.1\n"


def test_without_a_resolver_file_nothing_is_known(tmp_path):
    assert find(tmp_path / "none", tmp_path / "none") == Known((), "")


async def test_the_relay_passes_questions_and_answers_by_udp_and_tcp(monkeypatch):
    class Resolver(asyncio.DatagramProtocol):
        def connection_made(self, transport):
            self.transport = transport

        def datagram_received(self, data, address):
            self.transport.sendto(b"answer to " + data, address)

    async def answer(reader, writer):
        size = int.from_bytes(await reader.readexactly(2))
        said = b"answer to " + await reader.readexactly(size)
        writer.write(len(said).to_bytes(2) + said)
        writer.close()

    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(answer, "127.0.0.2", 0)
    port = server.sockets[0].getsockname()[1]
    transport, _ = await loop.create_datagram_endpoint(Resolver, ("127.0.0.2", port))
    monkeypatch.setattr(resolvers, "DNS_PORT", port)
    relay = await Resolvers.open(Known(("127.0.0.2",), ""), "127.0.0.1", port)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(("127.0.0.1", port))
            await loop.sock_sendall(sock, b"name")
            assert await asyncio.wait_for(loop.sock_recv(sock, 100), 5) == b"answer to name"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x00\x04name")
        assert (await asyncio.wait_for(reader.read(), 5))[2:] == b"answer to name"
        writer.close()
    finally:
        await relay.close()
        transport.close()
        server.close()
