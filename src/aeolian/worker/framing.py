"""Length-prefixed frames over a byte stream: how messages of `domain.link` travel between server and worker.

One frame is a msgpack list of messages; what is sent within one step of the event loop shares a frame. This link
carries two messages for each input, so it is a plain stream: a gRPC stream costs several times the processor time.
"""

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import Any

from aeolian.domain.link import encode

log = logging.getLogger(__name__)

HEADER = struct.Struct(">I")
MAX_FRAME_BYTES = 1 << 30
SPLIT_BYTES = 64 << 20
"""Larger frames are sent as several: all that a worker repeats at once has no bound."""


class FrameLink(asyncio.Protocol):
    """One end of a connection.

    `on_frame(bytes)` is called for each frame that comes in; `on_lost()` once when the connection is over.
    """

    def __init__(self, on_frame: Callable[[bytes], None], on_lost: Callable[[], None]):
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._outgoing: list[Any] = []
        self._loop = asyncio.get_running_loop()

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: Any) -> None:
        """Send soon, in order. Messages to a closed link are dropped."""
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(message)

    def send_frame(self, frame: bytes) -> None:
        if self.is_open:
            assert self._transport is not None
            self._transport.write(HEADER.pack(len(frame)) + frame)

    def close(self) -> None:
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing:
            self._send_all(outgoing)

    def _send_all(self, messages: list[Any]) -> None:
        frame = encode(messages)
        if len(frame) <= SPLIT_BYTES or len(messages) == 1:
            self.send_frame(frame)
            return
        middle = len(messages) // 2
        self._send_all(messages[:middle])
        self._send_all(messages[middle:])

    # ---- asyncio.Protocol -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                log.error("a frame of %d bytes was announced: the connection is closed", length)
                self.abort()
                return
            end = start + HEADER.size + length
            if len(buffer) < end:
                break
            frame = bytes(buffer[start + HEADER.size : end])
            start = end
            try:
                self._on_frame(frame)
            except Exception:
                log.exception("a message between server and worker could not be handled")
        if start:
            del buffer[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._on_lost()
