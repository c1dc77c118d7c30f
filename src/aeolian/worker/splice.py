"""Passes the bytes of connections on to one destination, and keeps connections waiting while it is away.

The front uses it between the public ports and the server's sockets, a worker between a container's loopback and
the gateway. It knows nothing of what the bytes mean.

::

    client --TCP--> [ _Client | _Server ] --Unix socket--> destination

Each end owns its transport and writes what the other end receives; a slow reader pauses the other end's reading,
an end of stream is passed on, and when one end is lost the other is closed.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

AWAY = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN, errno.ECONNRESET})
"""What connecting to a server's socket says while the server is down, starting, or has a full backlog."""
FIRST_PROBE_S = 0.005
SLOWEST_PROBE_S = 0.1
HOLD_S = 120.0
SILENT_S = 60.0
MAX_HELD = 8192
MAX_HELD_BYTES = 64 << 10
BACKLOG = 4096


class Splice:
    """Passes connections of any number of listening sockets on to the Unix socket `destination`.

    While nothing accepts there, new connections are held: for `hold_s` seconds at most, and `max_held` of them at
    most; beyond either they are closed. Established connections to a server that died are closed with it.
    """

    def __init__(self, destination: Path, *, hold_s: float = HOLD_S, max_held: int = MAX_HELD):
        self.destination = destination
        self._hold_s = hold_s
        self._max_held = max_held
        self._servers: list[asyncio.AbstractServer] = []
        self._connecting: dict[asyncio.Task, _Client] = {}
        self._ends: set[End] = set()
        self._return: asyncio.Task | None = None

    def __repr__(self) -> str:
        return f"<Splice to {self.destination}: {self.num_passing} passing, {self.num_held} held>"

    @property
    def num_held(self) -> int:
        """Connections that wait for the destination."""
        return len(self._connecting)

    @property
    def num_passing(self) -> int:
        return len(self._ends) // 2

    async def listen(
        self,
        sock: socket.socket,
        tls: ssl.SSLContext | None = None,
        *,
        has_preface: bool = False,
        client_begins: bool = False,
    ) -> asyncio.AbstractServer:
        """Accept on `sock` (bound; listening or not) until what is returned is closed. The socket belongs to it.

        With a preface the destination is told first who connected, and where: the line of version 1 of the PROXY
        protocol. Where the client begins the conversation, as in HTTP, one that says nothing is not connected further, and
        closed after `SILENT_S`.
        """
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: _Client(self._accept, has_preface, client_begins), sock=sock, backlog=BACKLOG, ssl=tls
        )
        self._servers.append(server)
        return server

    def stop_listening(self, server: asyncio.AbstractServer) -> None:
        """Accept no more there; established connections go on."""
        server.close()
        self._servers.remove(server)

    async def close(self) -> None:
        """Accept no more and close every connection."""
        for server in self._servers:
            server.close()
        connecting, self._connecting = self._connecting, {}
        for task, client in connecting.items():
            task.cancel()
            client.abort()
        if self._return is not None:
            self._return.cancel()
            connecting[self._return] = None  # type: ignore[assignment]
        for end in list(self._ends):
            end.abort()
        await asyncio.gather(*connecting, return_exceptions=True)

    def _accept(self, client: "_Client") -> None:
        if len(self._connecting) >= self._max_held:
            log.warning("%s is away and %d connections wait for it: refusing one more", self.destination, self.num_held)
            client.abort()
            return
        task = asyncio.ensure_future(self._connect(client))
        self._connecting[task] = client
        task.add_done_callback(lambda task: self._connecting.pop(task, None))

    async def _connect(self, client: "_Client") -> None:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._hold_s
        while not client.is_lost:
            try:
                await loop.create_unix_connection(lambda: _Server(client, self._ends), str(self.destination))
                return
            except OSError as error:
                if error.errno not in AWAY:
                    log.error("connecting to %s failed: %s", self.destination, error)
                    client.abort()
                    return
            try:
                async with asyncio.timeout_at(give_up_at):
                    await client.until_lost(self._until_it_returns())
            except TimeoutError:
                log.warning("%s did not come back within %g s: closing a connection", self.destination, self._hold_s)
                client.abort()
                return

    def _until_it_returns(self) -> asyncio.Task:
        """One probe on behalf of everybody who waits: nothing announces that a Unix socket is accepting."""
        if self._return is None or self._return.done():
            self._return = asyncio.ensure_future(self._probe())
        return self._return

    async def _probe(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = FIRST_PROBE_S
        while self._connecting:
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, SLOWEST_PROBE_S)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.setblocking(False)
                with contextlib.suppress(OSError):
                    await loop.sock_connect(sock, str(self.destination))
                    return


def preface_of(transport: asyncio.BaseTransport) -> bytes:
    """`PROXY TCP4 <client> <address> <its port> <our port>`, of an accepted connection."""
    client, here = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    return f"PROXY TCP4 {client[0]} {here[0]} {client[1]} {here[1]}\r\n".encode()


class End(asyncio.Protocol):
    """One end of a passed connection."""

    transport: asyncio.Transport
    other: "End | None" = None
    is_lost = False
    has_ended = False

    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)  # type: ignore[union-attr]

    def pause_writing(self) -> None:
        if self.other is not None and not self.other.transport.is_closing():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def eof_received(self) -> bool:
        self.has_ended = True
        other = self.other
        if other is None or other.has_ended or other.is_lost or not other.transport.can_write_eof():
            return False  # closes this end, and with it the other
        other.transport.write_eof()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        if self.other is not None and not self.other.is_lost:
            self.other.transport.close()

    def abort(self) -> None:
        if not self.is_lost:
            self.transport.abort()


class _Client(End):
    """The accepted end. What arrives before the destination is reached is kept."""

    def __init__(self, accept: Callable[["_Client"], None], has_preface: bool = False, client_begins: bool = False):
        self._accept = accept
        self._has_preface = has_preface
        self._silence: asyncio.TimerHandle | None = None
        """Ends it, until the client has said something."""
        self._client_begins = client_begins
        self._early: list[bytes] = []
        self._early_bytes = 0
        self._lost: asyncio.Future | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's are no asyncio.Transport
        if self._client_begins:
            self._silence = asyncio.get_running_loop().call_later(SILENT_S, transport.abort)  # type: ignore[attr-defined]
        else:
            self._accept(self)

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.transport.write(data)
            return
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
            self._accept(self)
        self._early.append(data)
        self._early_bytes += len(data)
        if self._early_bytes > MAX_HELD_BYTES:
            self.transport.pause_reading()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._silence is not None:
            self._silence.cancel()
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)

    def join(self, server: "_Server") -> None:
        """The destination is reached: hand over what was kept."""
        self.other = server
        if self._has_preface:
            server.transport.write(preface_of(self.transport))
        for data in self._early:
            server.transport.write(data)
        if self._early_bytes > MAX_HELD_BYTES:
            self.transport.resume_reading()
        self._early = []

    async def until_lost(self, task: asyncio.Task) -> None:
        """Wait for `task` (which others wait for too), but not longer than the client does."""
        self._lost = asyncio.get_running_loop().create_future()
        await asyncio.wait([task, self._lost], return_when=asyncio.FIRST_COMPLETED)


class _Server(End):
    """The end at the destination."""

    def __init__(self, client: _Client, ends: set[End]):
        self.other = client
        self._client = client
        self._ends = ends

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's are no asyncio.Transport
        if self._client.is_lost:
            transport.abort()
            return
        self._ends.update((self, self._client))
        self._client.join(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._ends.difference_update((self, self._client))
        super().connection_lost(error)
