"""Connections to public ports of tunnels: led on to the ports of their containers, whatever is spoken there.

::

    client --> front --(who connected, and where)--> TunnelSocket --> the worker --> the container's port
"""

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path

from aeolian.control.tunnels import Tunnels
from aeolian.domain.errors import Unavailable
from aeolian.gateway.arrival import MARK, MAX_LINE_BYTES
from aeolian.gateway.listeners import Listeners
from aeolian.worker.ports import open_port
from aeolian.worker.splice import BACKLOG, End

log = logging.getLogger(__name__)


class TunnelPorts:
    """Public ports whose connections the front passes on to `path`."""

    def __init__(self, listeners: Listeners, path: Path):
        self._listeners = listeners
        self._path = path

    def open(self, port: int, *, has_tls: bool) -> int | None:
        return self._listeners.open(port, destination=self._path, has_tls=has_tls)

    def close(self, port: int) -> None:
        self._listeners.close(port)


class TunnelSocket:
    """The Unix socket to which the front passes on what comes to tunnels."""

    def __init__(self, path: Path, tunnels: Tunnels, ports_socket: Path):
        self._path = path
        self._tunnels = tunnels
        self._ports_socket = ports_socket
        self._server: asyncio.AbstractServer | None = None
        self._ends: set[End] = set()
        self._tasks: set[asyncio.Task] = set()

    async def start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(self._path))
        os.chmod(self._path, 0o600)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Outer(self), sock=sock, backlog=BACKLOG)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in list(self._ends):
            end.abort()

    def arrived(self, outer: "_Outer", public_port: int) -> None:
        task = asyncio.ensure_future(self._lead_on(outer, public_port))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lead_on(self, outer: "_Outer", public_port: int) -> None:
        tunnel = self._tunnels.at(public_port)
        if tunnel is None:
            outer.abort()
            return
        try:
            sock = await open_port(self._ports_socket, tunnel.task_id, tunnel.port)
        except Unavailable as error:
            log.info("a connection to a tunnel is closed: %s", error.message)
            outer.abort()
            return
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: _Inner(outer, self._ends), sock=sock)


class _Outer(End):
    """The client's end. What it sends before the container is reached is kept."""

    def __init__(self, owner: TunnelSocket):
        self._owner = owner
        self._early = b""
        self._has_arrived = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's are no asyncio.Transport

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.transport.write(data)
            return
        self._early += data
        if self._has_arrived:
            self.transport.pause_reading()
        elif b"\r\n" in self._early:
            line, _, self._early = self._early.partition(b"\r\n")
            try:
                public_port = int(line.removeprefix(MARK).split(b" ")[-1])
            except ValueError:
                self.abort()
                return
            self._has_arrived = True
            self._owner.arrived(self, public_port)
        elif len(self._early) > MAX_LINE_BYTES:
            self.abort()

    def join(self, inner: "_Inner") -> None:
        self.other = inner
        if self._early:
            inner.transport.write(self._early)
            self._early = b""
        self.transport.resume_reading()


class _Inner(End):
    """The container's end."""

    def __init__(self, outer: _Outer, ends: set[End]):
        self.other = outer
        self._outer = outer
        self._ends = ends

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's are no asyncio.Transport
        if self._outer.is_lost:
            transport.abort()
            return
        self._ends.update((self, self._outer))
        self._outer.join(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._ends.difference_update((self, self._outer))
        super().connection_lost(error)
