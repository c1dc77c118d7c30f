"""A connection over which listening sockets are passed from one process to another, with what is to be done with them.

The server binds the ports of web functions and hands them to the front, which accepts on them. Both keep the socket,
and the one that starts again gets it back from the other: no connection is refused meanwhile.
"""

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable

import msgspec

MAX_READ_BYTES = 64 << 10
MAX_DESCRIPTORS = 64
"""Of one read."""


class OpenPort(msgspec.Struct, frozen=True, tag="open"):
    """Accept on this port. Its socket comes with the message."""

    port: int
    destination: str
    """The Unix socket to which connections are passed on."""
    has_tls: bool
    """End TLS, where there is a certificate."""
    has_preface: bool
    """Tell the destination who connected, and where."""


class ClosePort(msgspec.Struct, frozen=True, tag="close"):
    """Accept no more on this port."""

    port: int


class HeldPort(msgspec.Struct, frozen=True, tag="held"):
    """The front accepts on this port already. Its socket comes with the message."""

    port: int


class AllHeld(msgspec.Struct, frozen=True, tag="all-held"):
    """Every port that the front accepts on has been told."""


Message = OpenPort | ClosePort | HeldPort | AllHeld
_decoder = msgspec.json.Decoder(Message)


class PortLink:
    """One end of a connection, over the connected non-blocking Unix socket `sock`.

    `on_message(message, socket)` gets what comes, with the socket that came with it; `on_lost()` is called once when
    the other end has gone.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_message: Callable[[Message, socket.socket | None], None],
        on_lost: Callable[[], None],
    ):
        self._sock = sock
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._descriptors: deque[int] = deque()
        self._rest = b""
        self._outgoing: deque[tuple[bytes, int | None]] = deque()
        """What could not be sent yet: the bytes, and the descriptor that goes with their first one."""
        self._is_closed = False
        self._loop.add_reader(sock, self._readable)

    def send(self, message: Message, sock: socket.socket | None = None) -> None:
        """Send it now, or as soon as the other end has read what was sent before."""
        if self._is_closed:
            return
        descriptor = os.dup(sock.fileno()) if sock is not None else None
        self._outgoing.append((msgspec.json.encode(message) + b"\n", descriptor))
        if len(self._outgoing) == 1:
            self._flush()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for _, descriptor in self._outgoing:
            if descriptor is not None:
                os.close(descriptor)
        for descriptor in self._descriptors:
            os.close(descriptor)

    def _flush(self) -> None:
        while self._outgoing:
            data, descriptor = self._outgoing[0]
            try:
                count = socket.send_fds(self._sock, [data], [descriptor] if descriptor is not None else [])
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._flush)
                return
            except OSError:
                self._lost()
                return
            if descriptor is not None:
                os.close(descriptor)
            if count < len(data):
                self._outgoing[0] = (data[count:], None)
            else:
                self._outgoing.popleft()
        self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, MAX_READ_BYTES, MAX_DESCRIPTORS)
        except BlockingIOError:
            return
        except OSError:
            self._lost()
            return
        self._descriptors.extend(descriptors)
        if not data:
            self._lost()
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._is_closed:
                return
            self._received(line)

    def _received(self, line: bytes) -> None:
        message = _decoder.decode(line)
        sock = None
        if isinstance(message, OpenPort | HeldPort):
            sock = socket.socket(fileno=self._descriptors.popleft())
            sock.setblocking(False)
        self._on_message(message, sock)

    def _lost(self) -> None:
        self.close()
        self._on_lost()


def listen_for_links(path: str) -> socket.socket:
    """The Unix socket at which the front is reached; listening, so that who connects waits for the front to start."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    os.chmod(path, 0o600)
    sock.listen(16)
    sock.setblocking(False)
    return sock
