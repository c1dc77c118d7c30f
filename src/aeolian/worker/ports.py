"""The way into a container's ports: one Unix socket of the worker, on which it is said where a connection is to lead.

::

    server --{"task_id": …, "port": …}\n--> worker --> container
           <--- "ok\n", "refused, …\n" (nothing listens there) or "no, because…\n" ---

After "ok" the connection is the container's. The socket lies in a folder that is closed to others, with mode 0600:
who can open it is the server.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from aeolian.domain.errors import Unavailable
from aeolian.worker.networks.networks import LOOPBACK, Networks
from aeolian.worker.splice import BACKLOG, End

log = logging.getLogger(__name__)

MAX_QUESTION_BYTES = 1024
CONNECT_TIMEOUT_S = 5.0
ACCEPTED = b"ok\n"
FIRST_PROBE_S, SLOWEST_PROBE_S = 0.005, 0.1


class Destination(msgspec.Struct, frozen=True):
    """A TCP port of a container."""

    task_id: str
    port: int


_decode = msgspec.json.Decoder(Destination).decode


class ContainerPorts:
    """`networks`: those of containers, where they have any; `is_running`: whether there is such a container."""

    def __init__(self, path: Path, networks: Networks | None, is_running: Callable[[str], bool]):
        self._path = path
        self._networks = networks
        self._is_running = is_running
        self._server: asyncio.AbstractServer | None = None
        self._passing: Counter[str] = Counter()
        """Connections into each container."""
        self._drained: dict[str, asyncio.Event] = {}
        self._ends: set[End] = set()
        self._tasks: set[asyncio.Task] = set()

    async def open(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            sock.bind(str(self._path))
        finally:
            os.umask(mask)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Asking(self), sock=sock, backlog=BACKLOG)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in list(self._ends):
            end.abort()

    async def connect(self, task_id: str, port: int) -> socket.socket:
        """Raises OSError: nothing listens there (yet), or there is no such container."""
        if not self._is_running(task_id):
            raise OSError(errno.EHOSTUNREACH, f"there is no running container {task_id}")
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            sock = await self._networks.connect(task_id, port) if self._networks is not None else None
            if sock is None:
                sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    await asyncio.get_running_loop().sock_connect(sock, (LOOPBACK, port))
                except BaseException:
                    sock.close()
                    raise
        return sock

    async def until_accepting(self, task_id: str, port: int) -> None:
        """Probes: nothing announces that a port is listened on. Its caller sets the limit of time."""
        pause_s = FIRST_PROBE_S
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                (await self.connect(task_id, port)).close()
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, SLOWEST_PROBE_S)

    async def until_drained(self, task_id: str) -> None:
        """Until no connection leads into the container."""
        if self._passing[task_id]:
            await self._drained.setdefault(task_id, asyncio.Event()).wait()

    # ---- connections ------------------------------------------------------------------------------------

    def asked(self, asking: "_Asking", question: bytes) -> None:
        task = asyncio.ensure_future(self._answer(asking, question))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, asking: "_Asking", question: bytes) -> None:
        try:
            where = _decode(question)
            sock = await self.connect(where.task_id, where.port)
        except (OSError, TimeoutError, msgspec.MsgspecError) as error:
            is_refused = isinstance(error, ConnectionRefusedError)
            answer = f"{'refused' if is_refused else 'no'}, {error or 'it did not answer'}\n"
            asking.transport.write(answer.encode())
            asking.transport.close()
            return
        loop = asyncio.get_running_loop()
        self._passing[where.task_id] += 1
        try:
            await loop.create_connection(lambda: _Into(asking, self, where.task_id), sock=sock)
        except OSError:
            sock.close()
            self.left(where.task_id)
            asking.abort()

    def joined(self, *ends: End) -> None:
        self._ends.update(ends)

    def left(self, task_id: str, *ends: End) -> None:
        self._ends.difference_update(ends)
        self._passing[task_id] -= 1
        if not self._passing[task_id]:
            del self._passing[task_id]
            if (event := self._drained.pop(task_id, None)) is not None:
                event.set()


class _Asking(End):
    """The server's end."""

    def __init__(self, ports: ContainerPorts):
        self._ports = ports
        self._question = b""
        self._has_asked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's are no asyncio.Transport

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.transport.write(data)
            return
        self._question += data
        if b"\n" in self._question and not self._has_asked:
            self._has_asked = True
            self._ports.asked(self, self._question.partition(b"\n")[0])
        elif len(self._question) > MAX_QUESTION_BYTES:
            self.abort()


class _Into(End):
    """The container's end."""

    def __init__(self, asking: _Asking, ports: ContainerPorts, task_id: str):
        self.other = asking
        self._asking = asking
        self._ports = ports
        self._task_id = task_id

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's are no asyncio.Transport
        if self._asking.is_lost:
            transport.abort()
            return
        self._ports.joined(self, self._asking)
        self._asking.other = self
        self._asking.transport.write(ACCEPTED)

    def connection_lost(self, error: Exception | None) -> None:
        self._ports.left(self._task_id, self, self._asking)
        super().connection_lost(error)


class PortRefused(Unavailable):
    """The container is there, and nothing listens on that port."""


async def open_port(path: Path, task_id: str, port: int) -> socket.socket:
    """The other side: a connected socket into a container. Raises Unavailable with the worker's reason, or
    PortRefused."""
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        async with asyncio.timeout(2 * CONNECT_TIMEOUT_S):
            await loop.sock_connect(sock, str(path))
            await loop.sock_sendall(sock, msgspec.json.encode(Destination(task_id, port)) + b"\n")
            said = b""
            while not said.endswith(b"\n"):
                # Not a byte more than the answer: what follows is the container's.
                part = await loop.sock_recv(sock, len(ACCEPTED) if not said else 1)
                if not part:
                    break
                said += part
        if said != ACCEPTED:
            kind = PortRefused if said.startswith(b"refused") else Unavailable
            raise kind(f"port {port} of {task_id} cannot be reached: {said.decode('utf-8', 'replace').strip()}")
    except (OSError, TimeoutError) as error:
        sock.close()
        raise Unavailable(
            f"port {port} of {task_id} cannot be reached: {error or 'its worker does not answer'}"
        ) from error
    except BaseException:
        sock.close()
        raise
    return sock
