"""How containers with a network of their own resolve names: by the host's resolvers.

Those that listen on the host's loopback are out of a container's reach. Where systemd-resolved is one of them it says
which ones it asks itself; what is asked of any other is relayed, from the host's end of the bridge.
"""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from pathlib import Path
from typing import NamedTuple

from aeolian.worker.networks.bridge import DNS_PORT

log = logging.getLogger(__name__)

RESOLVER_FILE = Path("/etc/resolv.conf")
UPSTREAM_FILE = Path("/run/systemd/resolve/resolv.conf")
ANSWER_TIMEOUT_S = 10.0
MAX_QUESTIONS = 1000
MAX_MESSAGE_BYTES = 65_535


class Known(NamedTuple):
    """`servers` of a resolver file, and its text."""

    servers: tuple[str, ...]
    text: str

    @property
    def reachable(self) -> tuple[str, ...]:
        """Containers have IPv4 only, and a loopback of their own."""
        return tuple(server for server in self.servers if _is_reachable(server))


def find(file: Path = RESOLVER_FILE, upstream: Path = UPSTREAM_FILE) -> Known:
    """What containers are to use, or, with nothing `reachable`, what is to be relayed."""
    known = _read(file)
    if not known.reachable and (behind := _read(upstream)).reachable:
        return behind
    return known


def text_of(known: Known, relay: str) -> str:
    """The resolver file of containers; `relay`: who answers where none of the host's can be reached."""
    others = [line for line in known.text.splitlines() if line.split()[:1] != ["nameserver"]]
    servers = [f"nameserver {server}" for server in known.reachable or (relay,)]
    return "\n".join([*others, *servers]) + "\n"


def _read(file: Path) -> Known:
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return Known((), "")
    words = [line.split() for line in text.splitlines()]
    return Known(tuple(parts[1] for parts in words if parts[:1] == ["nameserver"] and len(parts) > 1), text)


def _is_reachable(server: str) -> bool:
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(server)
        return address.version == 4 and not address.is_loopback
    return False


class Resolvers:
    """`text`: the resolver file of containers. Relays while it is open, if that is needed."""

    def __init__(self, text: str):
        self.text = text
        self._relay: asyncio.DatagramTransport | None = None
        self._server: asyncio.Server | None = None

    @classmethod
    async def open(cls, known: Known, gateway: str, port: int = DNS_PORT) -> "Resolvers":
        """`port`: where the relay listens at `gateway`."""
        self = cls(text_of(known, gateway))
        if known.reachable or not known.servers:
            return self
        loop = asyncio.get_running_loop()
        target = known.servers[0]
        try:
            self._relay, _ = await loop.create_datagram_endpoint(lambda: _Relay(target), (gateway, port))
            self._server = await asyncio.start_server(_passing_to(target), gateway, port)
        except OSError as error:
            log.warning("containers cannot resolve names: the host's resolver %s cannot be relayed: %s", target, error)
        return self

    async def close(self) -> None:
        if self._relay is not None:
            self._relay.close()
        if self._server is not None:
            self._server.close()


class _Relay(asyncio.DatagramProtocol):
    """Each question goes on from a socket of its own, whose answer goes back."""

    def __init__(self, target: str):
        self._target = target
        self._questions: set[asyncio.Task] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple) -> None:
        if len(self._questions) < MAX_QUESTIONS:
            task = asyncio.ensure_future(self._ask(data, address))
            self._questions.add(task)
            task.add_done_callback(self._questions.discard)

    def connection_lost(self, error: Exception | None) -> None:
        for task in self._questions:
            task.cancel()

    async def _ask(self, data: bytes, address: tuple) -> None:
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in self._target else socket.AF_INET
        with contextlib.suppress(OSError, TimeoutError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                sock.connect((self._target, DNS_PORT))
                await loop.sock_sendall(sock, data)
                answer = await loop.sock_recv(sock, MAX_MESSAGE_BYTES)
            self._transport.sendto(answer, address)


def _passing_to(target: str):
    """Long answers come by TCP: one question a connection is enough."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                asked, answering = await asyncio.open_connection(target, DNS_PORT)
                try:
                    await _pass_one(reader, answering)
                    await _pass_one(asked, writer)
                finally:
                    answering.close()
        writer.close()

    return relay


async def _pass_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    size = await reader.readexactly(2)
    writer.write(size + await reader.readexactly(int.from_bytes(size)))
    await writer.drain()
