"""What containers and image builds write: read without loss, batched, and kept until the server has stored it."""

import asyncio
import codecs
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from aeolian.domain.link import LogLine, Logs

FLUSH_S = 0.05
LINE_END = re.compile(r"\n|\r\n|\r(?=[^\n])")
"""A carriage return is one, too: each state of a progress bar is shown by itself."""
LINE_WAIT_S = 0.2
"""How long the beginning of a line is kept back: a prompt or a progress bar has no end to wait for."""
MAX_LINE_BYTES = 256 << 10
MAX_BATCH_BYTES = 256 << 10
MAX_UNACKED_BYTES = 16 << 20
"""Beyond this, containers' output is not read: they wait in their next write."""
MAX_CATCH_UPS = 50
READ_BYTES = 64 << 10
NUM_LAST_LINES = 20
MAX_LAST_LINE = 300
"""Characters of each of them."""


class LogSender:
    """Numbers batches of lines and repeats them until the server acknowledges them."""

    def __init__(self, send: Callable[[Logs], None]):
        self._send = send
        self._unacked: OrderedDict[int, Logs] = OrderedDict()
        self._num_bytes = 0
        self._seq = 0
        self._room = asyncio.Event()
        self._room.set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def has_room(self) -> bool:
        return self._room.is_set()

    async def room(self) -> None:
        """Returns when there is room for more."""
        await self._room.wait()

    def put_now(self, lines: list[LogLine], *, task_id: str = "", image_id: str = "") -> None:
        if not lines:
            return
        self._seq += 1
        batch = Logs(self._seq, task_id, image_id, tuple(lines))
        self._unacked[batch.seq] = batch
        self._num_bytes += _size(batch)
        self._empty.clear()
        if self._num_bytes > MAX_UNACKED_BYTES:
            self._room.clear()
        self._send(batch)

    def acknowledged(self, seq: int) -> None:
        """This batch is stored."""
        if (batch := self._unacked.pop(seq, None)) is not None:
            self._num_bytes -= _size(batch)
        if self._num_bytes <= MAX_UNACKED_BYTES:
            self._room.set()
        if not self._unacked:
            self._empty.set()

    def repeat(self) -> None:
        """After a reconnection."""
        for batch in self._unacked.values():
            self._send(batch)

    async def drained(self) -> None:
        """Until everything is stored."""
        await self._empty.wait()


class _Begun(NamedTuple):
    """A line that has not ended yet."""

    text: str
    at: float
    """When its first part came, by the loop's clock."""
    written_at: float
    input_id: str
    call_id: str


class LogPump:
    """Reads one container's stdout and stderr to their ends, and cuts them into lines.

    The beginning of a line waits a moment for its end: other containers' lines would come in between.
    """

    def __init__(self, sender: LogSender, task_id: str, current_input: Callable[[], tuple[str, str]]):
        """`current_input()`: (input id, call id) that output belongs to, where that is certain."""
        self._sender = sender
        self._task_id = task_id
        self._current_input = current_input
        self._lines: list[LogLine] = []
        self._last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._begun: dict[int, _Begun] = {}
        """By file descriptor."""
        self._num_bytes = 0
        self._num_reads = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    async def run(self, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader) -> None:
        await asyncio.gather(self._read(1, stdout), self._read(2, stderr))
        self.flush()

    async def finish(self, running: asyncio.Task, grace_s: float) -> None:
        """Wait for `run` when the container has ended: not for ever for what somebody outside holds open.

        While there is no room the rest stays in the pipes, for as long as it takes.
        """
        while not running.done():
            num_reads, had_room = self._num_reads, self._sender.has_room
            await asyncio.wait({running}, timeout=grace_s)
            if had_room and self._sender.has_room and self._num_reads == num_reads:
                return

    async def catch_up(self) -> None:
        """Read what the container has written so far, as long as that does not take long."""
        num_quiet = 0
        for _ in range(MAX_CATCH_UPS):
            before = self._num_reads
            await asyncio.sleep(0)  # lets the event loop look at the pipes, then at what they brought
            num_quiet = num_quiet + 1 if self._num_reads == before else 0
            if num_quiet == 3:
                return

    def say(self, text: str) -> None:
        """A line of the platform itself."""
        self._lines.append(LogLine(3, time.time(), text if text.endswith("\n") else text + "\n"))
        self._send()

    @property
    def last_lines(self) -> tuple[str, ...]:
        """What the container wrote last, cut to a size that fits into an error message."""
        return tuple(self._last_lines)

    def flush(self) -> None:
        """Send everything, lines without an end as well."""
        for fd in list(self._begun):
            self._end(fd)
        self._send()

    async def _read(self, fd: int, stream: asyncio.StreamReader) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while data := await stream.read(READ_BYTES):
            self._num_reads += 1
            self._add(fd, decoder.decode(data))
            if self._num_bytes >= MAX_BATCH_BYTES:
                self._send()
            await self._sender.room()
        self._add(fd, decoder.decode(b"", True))
        self._end(fd)

    def _add(self, fd: int, text: str) -> None:
        if not text:
            return
        input_id, call_id = self._current_input()
        now = time.time()
        begun = self._begun.pop(fd, None) or _Begun("", self._loop.time(), now, input_id, call_id)
        start, seen = 0, max(0, len(begun.text) - 1)
        text = begun.text + text
        for match in LINE_END.finditer(text, seen):
            line = text[start : match.end()]
            self._put(LogLine(fd, begun.written_at, line, begun.input_id, begun.call_id))
            begun, start = _Begun("", self._loop.time(), now, input_id, call_id), match.end()
        if start < len(text):
            self._begun[fd] = begun._replace(text=text[start:])
            if len(text) - start > MAX_LINE_BYTES:
                self._end(fd)
        self._tick_later()

    def _put(self, line: LogLine) -> None:
        self._lines.append(line)
        self._num_bytes += len(line.data)
        if text := line.data.rstrip():
            self._last_lines.append(text if len(text) <= MAX_LAST_LINE else text[:MAX_LAST_LINE] + "…")

    def _end(self, fd: int) -> None:
        """What there is of this stream's last line is a line."""
        if (begun := self._begun.pop(fd, None)) is not None:
            self._put(LogLine(fd, begun.written_at, begun.text, begun.input_id, begun.call_id))

    def _tick_later(self) -> None:
        if self._timer is None and (self._lines or self._begun):
            self._timer = self._loop.call_later(FLUSH_S, self._tick)

    def _tick(self) -> None:
        for fd, begun in list(self._begun.items()):
            if self._loop.time() - begun.at >= LINE_WAIT_S:
                self._end(fd)
        self._send()
        self._tick_later()

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines, self._num_bytes = self._lines, [], 0
        self._sender.put_now(lines, task_id=self._task_id)


def _size(batch: Logs) -> int:
    return sum(len(line.data) + 64 for line in batch.lines)
