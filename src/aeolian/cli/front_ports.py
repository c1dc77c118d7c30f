"""The front's side of ports that come and go: those of web functions, which the server opens and closes.

See `worker/port_link`. While the server is away the front goes on accepting, and holds the connections.
"""

import asyncio
import logging
import socket
import ssl
from pathlib import Path
from typing import NamedTuple

from aeolian.worker.port_link import AllHeld, ClosePort, HeldPort, Message, OpenPort, PortLink
from aeolian.worker.splice import Splice

log = logging.getLogger(__name__)


class _Port(NamedTuple):
    request: OpenPort
    kept: socket.socket
    """The same socket as the listening one, to give it to a server that starts again."""
    splice: Splice
    server: asyncio.AbstractServer


class FrontPorts:
    """Accepts on what servers ask for, over links from the listening Unix socket `links`."""

    def __init__(self, links: socket.socket, splices: dict[Path, Splice], tls: ssl.SSLContext | None):
        """`splices`: those that are there already, by destination."""
        self._links = links
        self._splices = splices
        self._own: list[Splice] = []
        self._tls = tls
        self._ports: dict[int, _Port] = {}
        self._link: PortLink | None = None
        self._messages: asyncio.Queue[tuple[Message, socket.socket | None]] = asyncio.Queue()
        self._tasks: list[asyncio.Task] = []

    @property
    def ports(self) -> set[int]:
        return set(self._ports)

    async def __aenter__(self) -> "FrontPorts":
        self._tasks = [asyncio.create_task(self._accept_links()), asyncio.create_task(self._follow())]
        return self

    async def __aexit__(self, *error) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._link is not None:
            self._link.close()
        for port in list(self._ports):
            self._close(port)
        for splice in self._own:
            await splice.close()

    async def _accept_links(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._links)
            sock.setblocking(False)
            if self._link is not None:  # one server at a time: the newest one is the one that lives
                self._link.close()
            self._link = PortLink(sock, lambda *message: self._messages.put_nowait(message), lambda: None)
            for port in self._ports.values():
                self._link.send(HeldPort(port.request.port), port.kept)
            self._link.send(AllHeld())

    async def _follow(self) -> None:
        while True:
            message, sock = await self._messages.get()
            try:
                if isinstance(message, OpenPort) and sock is not None:
                    await self._open(message, sock)
                elif isinstance(message, ClosePort):
                    self._close(message.port)
            except OSError as error:
                log.error("cannot accept on a port of a web function: %s", error)

    async def _open(self, request: OpenPort, sock: socket.socket) -> None:
        known = self._ports.get(request.port)
        if known is not None and known.request == request:
            sock.close()
            return
        self._close(request.port)
        destination = Path(request.destination)
        splice = self._splices.get(destination)
        if splice is None:
            splice = self._splices[destination] = Splice(destination)
            self._own.append(splice)
        kept = sock.dup()
        server = await splice.listen(
            sock,
            self._tls if request.has_tls else None,
            has_preface=request.has_preface,
            client_begins=request.has_preface,  # HTTP; of a tunnel nobody knows who begins
        )
        self._ports[request.port] = _Port(request, kept, splice, server)

    def _close(self, number: int) -> None:
        port = self._ports.pop(number, None)
        if port is None:
            return
        port.kept.close()
        port.splice.stop_listening(port.server)
