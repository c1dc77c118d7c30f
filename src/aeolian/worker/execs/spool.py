"""Output of a command, by byte offset: readers resume where they were, and the disk holds a bounded part of it.

::

    0 ........ start ................. read ................. end
      dropped        kept for resuming      not read yet: at most `max_unread_bytes`, then the command waits

Kept in files without names, so nothing is left of them when the worker dies.
"""

import asyncio
import os
import tempfile
from collections import deque
from pathlib import Path
from typing import NamedTuple

from aeolian.domain.errors import NotFound

MAX_UNREAD_BYTES = 64 << 20
KEPT_BYTES = 16 << 20
"""Behind the furthest reader: more than what can be on its way to a client when its connection breaks."""
SEGMENT_BYTES = 4 << 20


class _Segment(NamedTuple):
    start: int
    descriptor: int


class Spool:
    def __init__(
        self,
        folder: Path,
        *,
        max_unread_bytes: int = MAX_UNREAD_BYTES,
        kept_bytes: int = KEPT_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
    ):
        self._folder = folder
        self._max_unread_bytes = max_unread_bytes
        self._kept_bytes = kept_bytes
        self._segment_bytes = segment_bytes
        self._segments: deque[_Segment] = deque()
        self._read_to = 0
        self._changed = asyncio.Event()
        self.start = self.end = 0
        """The part that is kept."""
        self.is_over = False
        self.is_read = asyncio.Event()
        """Set when a reader has asked for what follows the last byte: all before it is on its way."""
        self.has_room = asyncio.Event()
        """Set while more can be written."""
        self.has_room.set()

    def write(self, data: bytes) -> None:
        """Append. Raises OSError when the disk is full."""
        while data:
            if not self._segments or self.end - self._segments[-1].start >= self._segment_bytes:
                self._segments.append(_Segment(self.end, _nameless_file(self._folder)))
            segment = self._segments[-1]
            at = self.end - segment.start
            written = os.pwrite(segment.descriptor, data[: self._segment_bytes - at], at)
            self.end += written
            data = data[written:]
        self._trim()
        self._wake()

    def finish(self) -> None:
        """Nothing more comes."""
        self.is_over = True
        self._wake()

    async def read(self, offset: int, max_bytes: int, wait_s: float) -> bytes:
        """What follows `offset`; b"" when nothing does within `wait_s`, or ever. Raises NotFound for what is dropped."""
        self._read_to = max(self._read_to, min(offset, self.end))
        self._trim()
        self._note_end(offset)
        if offset >= self.end and not self.is_over and wait_s > 0:
            try:
                async with asyncio.timeout(wait_s):
                    while offset >= self.end and not self.is_over:
                        await self._changed.wait()
            except TimeoutError:
                return b""
            self._note_end(offset)
        if offset < self.start:
            raise NotFound(
                f"output before byte {self.start:,} is not kept any more (byte {offset:,} was asked for): "
                "read it while the command runs"
            )
        for segment in self._segments:
            size = min(segment.start + self._segment_bytes, self.end) - segment.start
            if offset < segment.start + size:
                return os.pread(
                    segment.descriptor, min(max_bytes, segment.start + size - offset), offset - segment.start
                )
        return b""

    def close(self) -> None:
        self.finish()
        while self._segments:
            os.close(self._segments.popleft().descriptor)
        self.start = self.end

    def _note_end(self, offset: int) -> None:
        if self.is_over and offset >= self.end:
            self.is_read.set()

    def _trim(self) -> None:
        while len(self._segments) > 1 and self._segments[1].start <= self._read_to - self._kept_bytes:
            os.close(self._segments.popleft().descriptor)
            self.start = self._segments[0].start
        if self.end - self._read_to < self._max_unread_bytes:
            self.has_room.set()
        else:
            self.has_room.clear()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _nameless_file(folder: Path) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())
