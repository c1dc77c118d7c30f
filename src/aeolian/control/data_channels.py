"""Streams of a call: the chunks that a generator yields (out), and the body of a web request (in).

Chunks are numbered from 1, durable before they are acknowledged, and can be read again from any number while the
call exists. A retried generator sends its first chunks again: the first ones stay.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from enum import IntEnum

from aeolian.control.call_state import Call
from aeolian.control.calls import Calls
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from aeolian.storage import calls as storage
from aeolian.storage.database import Database

HOLD_S = 55.0
"""How long an idle stream is held open; the client opens it again at once."""
MAX_RECENT_BYTES = 8 << 20
MAX_CHUNKS = 1024
KEEP_S = 60.0
PAGE = 64


class Direction(IntEnum):
    IN = 0
    OUT = 1


class _Channel:
    def __init__(self) -> None:
        self.recent: deque[tuple[int, bytes]] = deque()
        self.num_bytes = 0
        self.last_index = 0
        self.waiters: set[asyncio.Future] = set()

    def put(self, index: int, chunk: bytes) -> None:
        if self.recent and index != self.recent[-1][0] + 1:
            self.recent.clear()  # what is kept has no gaps; readers find the rest in the database
            self.num_bytes = 0
        self.recent.append((index, chunk))
        self.num_bytes += len(chunk)
        self.last_index = max(self.last_index, index)
        while len(self.recent) > 1 and self.num_bytes > MAX_RECENT_BYTES:
            self.num_bytes -= len(self.recent.popleft()[1])

    def wake(self) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(True)
        self.waiters.clear()


class DataChannels:
    def __init__(self, database: Database, clock: Clock, calls: Calls):
        self._database = database
        self._clock = clock
        self._calls = calls
        self._channels: dict[tuple[str, Direction], _Channel] = {}
        calls.when_finished.append(self._call_finished)

    async def put(
        self, call_id: str, direction: Direction, caller: Caller, chunks: Sequence[tuple[int, bytes]]
    ) -> None:
        """Store chunks: (index from 1, serialized DataChunk). Only a container that runs the call may send them out.

        Raises FailedPrecondition when the call is over for that container.
        """
        call = await self._calls.open(call_id, caller)
        if direction is Direction.OUT:
            if not caller.is_container:
                raise PermissionDenied("only the container that runs a call may send its stream")
            if not any(item.task_id == caller.task_id for item in call.inputs.values()):
                raise FailedPrecondition(f"container {caller.task_id} does not run call {call_id} any more")
        if len(chunks) > MAX_CHUNKS or any(index < 1 for index, _ in chunks):
            raise InvalidArgument(f"up to {MAX_CHUNKS} chunks at a time, numbered from 1")
        channel = self._channels.setdefault((call_id, direction), _Channel())
        fresh = [(index, chunk) for index, chunk in chunks if index > channel.last_index]
        rows = [
            {"call_id": call_id, "direction": int(direction), "idx": index, "chunk": chunk} for index, chunk in fresh
        ]
        if rows:
            await self._database.write(lambda c: storage.put_chunks(c, rows))
            for index, chunk in fresh:
                if index > channel.last_index:
                    channel.put(index, chunk)
            channel.wake()

    async def follow(
        self, call_id: str, direction: Direction, caller: Caller, last_index: int
    ) -> AsyncIterator[tuple[int, bytes]]:
        """Chunks after `last_index`, as they come; ends after a while without any."""
        call = await self._calls.open(call_id, caller)
        if direction is Direction.IN and caller.is_container and not _runs(call, caller):
            raise PermissionDenied(f"container {caller.task_id} does not run call {call_id}")
        channel = self._channels.setdefault((call_id, direction), _Channel())
        index = last_index
        while True:
            page = await self._after(call_id, direction, channel, index)
            for index, chunk in page:
                yield index, chunk
            if page:
                continue
            if not await self._changed(channel, index):
                return

    async def _after(self, call_id: str, direction: Direction, channel: _Channel, index: int):
        recent = channel.recent
        if recent and recent[0][0] <= index + 1:
            return [pair for pair in recent if pair[0] > index][:PAGE]
        rows = await self._database.read(lambda c: storage.chunks_after(c, call_id, int(direction), index, PAGE))
        if rows:
            channel.last_index = max(channel.last_index, rows[-1].idx)
        return [(row.idx, row.chunk) for row in rows]

    async def _changed(self, channel: _Channel, index: int) -> bool:
        if channel.last_index > index:
            return True
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        channel.waiters.add(waiter)
        timer = loop.call_later(HOLD_S, lambda: waiter.done() or waiter.set_result(False))
        try:
            return await waiter
        finally:
            timer.cancel()
            channel.waiters.discard(waiter)

    def _call_finished(self, call: Call) -> None:
        for direction in Direction:
            if (call.call_id, direction) in self._channels:
                asyncio.get_running_loop().call_later(KEEP_S, self._forget, (call.call_id, direction))

    def _forget(self, key: tuple[str, Direction]) -> None:
        channel = self._channels.get(key)
        if channel is not None and not channel.waiters:
            del self._channels[key]


def _runs(call: Call, caller: Caller) -> bool:
    return any(item.task_id == caller.task_id for item in call.inputs.values())
