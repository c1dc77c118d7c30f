"""Public ports of the server's own making: bound here, accepted on by the front.

Binding here tells at once whether a port is taken. The front gets the listening socket (`worker/port_link`), and
gives back what it still holds when the server starts again.
"""

import asyncio
import errno
import logging
import socket
from pathlib import Path
from typing import NamedTuple

from aeolian.domain.errors import FailedPrecondition
from aeolian.worker.port_link import AllHeld, ClosePort, HeldPort, Message, OpenPort, PortLink

log = logging.getLogger(__name__)

BACKLOG = 4096
TAKE_BACK_S = 5.0
"""How long a server that starts waits for the front to say what it holds."""
AGAIN_S = 0.1
TAKEN = frozenset({errno.EADDRINUSE, errno.EACCES})


class _Port(NamedTuple):
    sock: socket.socket
    request: OpenPort


class Listeners:
    def __init__(self, host: str, front_socket: Path, destination: Path):
        """`host`: the IPv4 address to bind. `destination`: the Unix socket that connections are passed on to."""
        self._host = host
        self._front_socket = front_socket
        self._destination = destination
        self._ports: dict[int, _Port] = {}
        self._taken_back: dict[int, socket.socket] = {}
        """Sockets that the front held already, and that nobody here has asked for yet."""
        self._link: PortLink | None = None
        self._all_held = asyncio.Event()
        self._again: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Take back what the front holds. Without a front (in tests) everything is only bound."""
        if not self._front_socket.exists():
            return
        self._connect()
        try:
            async with asyncio.timeout(TAKE_BACK_S):
                await self._all_held.wait()
        except TimeoutError:
            log.warning("the front does not answer: ports of web functions that it holds cannot be taken back")

    def stop(self) -> None:
        """The front goes on accepting, and waits for the next server."""
        if self._again is not None:
            self._again.cancel()
        if self._link is not None:
            self._link.close()
        for sock in [*self._taken_back.values(), *(port.sock for port in self._ports.values())]:
            sock.close()

    # ---- ports ------------------------------------------------------------------------------------------

    @property
    def ports(self) -> set[int]:
        return set(self._ports)

    def open(
        self, port: int, *, destination: Path | None = None, has_tls: bool = True, has_preface: bool = True
    ) -> int | None:
        """Listen on `port` (0 = any free one). Returns the port, or None when somebody else has it.

        Raises FailedPrecondition when the address itself cannot be bound.
        """
        if port in self._ports:
            return port
        sock = self._taken_back.pop(port, None) or self._bind(port)
        if sock is None:
            return None
        port = sock.getsockname()[1]
        request = OpenPort(port, str(destination or self._destination), has_tls=has_tls, has_preface=has_preface)
        self._ports[port] = _Port(sock, request)
        if self._link is not None:
            self._link.send(request, sock)
        return port

    def close(self, port: int) -> None:
        """Listen there no more; connections that are established go on."""
        if (found := self._ports.pop(port, None)) is not None:
            found.sock.close()
        if self._link is not None:
            self._link.send(ClosePort(port))

    def close_others(self) -> None:
        """What an earlier server listened on, and nobody has asked for in this one."""
        for port, sock in self._taken_back.items():
            sock.close()
            if self._link is not None:
                self._link.send(ClosePort(port))
        self._taken_back.clear()

    def _bind(self, port: int) -> socket.socket | None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((self._host, port))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            if error.errno in TAKEN:
                return None
            raise FailedPrecondition(f"cannot listen on {self._host}:{port}: {error.strerror}") from error
        sock.setblocking(False)
        return sock

    # ---- the front --------------------------------------------------------------------------------------

    def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(str(self._front_socket))
        except OSError:
            sock.close()
            self._connect_again()
            return
        self._link = PortLink(sock, self._received, self._lost)
        for port in self._ports.values():
            self._link.send(port.request, port.sock)

    def _received(self, message: Message, sock: socket.socket | None) -> None:
        if isinstance(message, AllHeld):
            self._all_held.set()
        elif isinstance(message, HeldPort) and sock is not None:
            if message.port in self._ports or self._all_held.is_set():
                sock.close()
            else:
                self._taken_back[message.port] = sock

    def _lost(self) -> None:
        """The front has died. Its successor gets everything anew."""
        self._link = None
        self._connect_again()

    def _connect_again(self) -> None:
        self._again = asyncio.get_running_loop().call_later(AGAIN_S, self._connect)
