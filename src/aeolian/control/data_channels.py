"""Streams of a call: the chunks that a generator yields (out), and the body of a web request (in).

Chunks are numbered from 1, durable before they are acknowledged, and can be read again from any number while the
call exists. A retried generator sends its first chunks again: the first ones stay. A generator that is too far ahead
of its reader waits, and one whose reader has been gone for long is cancelled.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from enum import IntEnum

from aeolian.control.call_state import Call
from aeolian.control.calls import Calls
from aeolian.control.web_exchange import Exchange
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unavailable
from aeolian.storage import calls as storage
from aeolian.storage.database import Database

HOLD_S = 55.0
"""How long an idle stream is held open; the client opens it again at once."""
MAX_RECENT_BYTES = 8 << 20
MAX_AHEAD_BYTES = 16 << 20
"""How far a sender may be ahead of the reader."""
CHUNK_BYTES = 100
"""What a chunk costs beside its content."""
ABANDONED_S = 300.0
"""A client opens the stream again at once: after so long without it, nobody will come."""
DELIVERY_S = 10.0
COMING_S = 1.0
"""How long a reader may take to come."""
ARRIVAL_S = 0.03
"""What was written to one stream of a connection may be received after what was written later to another."""
MAX_CHUNKS = 1024
KEEP_S = 60.0
PAGE = 64
MAX_PAGE_BYTES = 4 << 20


class Direction(IntEnum):
    IN = 0
    OUT = 1


class _Channel:
    def __init__(self, call: Call, now: float) -> None:
        self.call = call
        self.recent: deque[tuple[int, bytes]] = deque()
        self.num_bytes = 0
        """Of `recent`."""
        self.last_index = 0
        self.num_followers = 0
        self.followed_at = now
        """When somebody followed it last."""
        self.unread: deque[tuple[int, int]] = deque()
        """(last index, bytes) of what nobody has been given yet, as far as it was sent in this life of the server."""
        self.unread_bytes = 0
        self._waiters: set[asyncio.Future] = set()

    def put(self, index: int, chunk: bytes) -> None:
        if self.recent and index != self.recent[-1][0] + 1:
            self.recent.clear()  # what is kept has no gaps; readers find the rest in the database
            self.num_bytes = 0
        self.recent.append((index, chunk))
        self.num_bytes += len(chunk)
        self.last_index = max(self.last_index, index)
        while len(self.recent) > 1 and self.num_bytes > MAX_RECENT_BYTES:
            self.num_bytes -= len(self.recent.popleft()[1])

    def sent(self, chunks: Sequence[tuple[int, bytes]]) -> None:
        num_bytes = sum(CHUNK_BYTES + len(chunk) for _, chunk in chunks)
        self.unread.append((chunks[-1][0], num_bytes))
        self.unread_bytes += num_bytes
        self.wake()

    def read_up_to(self, index: int) -> None:
        had_room, had_unread = self.has_room, bool(self.unread)
        while self.unread and self.unread[0][0] <= index:
            self.unread_bytes -= self.unread.popleft()[1]
        if (self.has_room and not had_room) or (had_unread and not self.unread):
            self.wake()

    @property
    def has_room(self) -> bool:
        return self.unread_bytes <= MAX_AHEAD_BYTES

    def wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(True)
        self._waiters.clear()

    async def changed(self, timeout_s: float | None) -> bool:
        """False: nothing did within the time."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        self._waiters.add(waiter)
        timer = loop.call_later(timeout_s, _give_up, waiter) if timeout_s is not None else None
        try:
            return await waiter
        finally:
            if timer is not None:
                timer.cancel()
            self._waiters.discard(waiter)


class DataChannels:
    def __init__(self, database: Database, clock: Clock, calls: Calls):
        self._database = database
        self._clock = clock
        self._calls = calls
        self._channels: dict[tuple[str, Direction], _Channel] = {}
        calls.open_inputs.when_finished.append(self._call_finished)

    def exchange_of(self, call_id: str, caller: Caller) -> Exchange | None:
        """Where the stream of a web request goes, which nothing stores; None: the call is no web request.

        Raises FailedPrecondition when the caller does not run it.
        """
        call = self._calls.living(call_id)
        if call is None or call.exchange is None or call.workspace != caller.workspace:
            return None
        _check_runs(call, caller)
        return call.exchange

    async def put(
        self,
        call_id: str,
        direction: Direction,
        caller: Caller,
        chunks: Sequence[tuple[int, bytes]],
        blob_ids: Sequence[str] = (),
    ) -> None:
        """Store chunks: (index from 1, serialized DataChunk), and the blobs that carry some of them. Only a container that runs the call may send them out.

        Raises FailedPrecondition when the call is over for that container.
        """
        call = await self._calls.open(call_id, caller)
        if direction is Direction.OUT and not caller.is_container:
            raise PermissionDenied("only the container that runs a call may send its stream")
        if len(chunks) > MAX_CHUNKS or any(index < 1 for index, _ in chunks):
            raise InvalidArgument(f"up to {MAX_CHUNKS} chunks at a time, numbered from 1")
        channel = self._channel(call, direction)
        while True:
            if direction is Direction.OUT:
                _check_runs(call, caller)
            elif call.num_inputs and not call.inputs:
                raise FailedPrecondition(f"call {call_id} is finished: nothing reads its stream any more")
            if direction is Direction.OUT and self._is_abandoned(channel):
                await self._calls.cancel(call_id, caller, terminate=False, reason="nobody reads what it yields")
            elif channel.has_room:
                break
            else:
                await channel.changed(ABANDONED_S)
        fresh = [(index, chunk) for index, chunk in chunks if index > channel.last_index]
        rows = [
            {"call_id": call_id, "direction": int(direction), "idx": index, "chunk": chunk} for index, chunk in fresh
        ]
        if rows:
            blobs = [{"call_id": call_id, "blob_id": blob_id} for blob_id in blob_ids]
            await self._database.write(lambda c: storage.put_chunks(c, rows, blobs))
            for index, chunk in fresh:
                if index > channel.last_index:
                    channel.put(index, chunk)
            channel.sent(fresh)

    async def follow(
        self, call_id: str, direction: Direction, caller: Caller, last_index: int
    ) -> AsyncIterator[tuple[int, bytes]]:
        """Chunks after `last_index`, as they come; ends after a while without any."""
        call = await self._calls.open(call_id, caller)
        if direction is Direction.IN and caller.is_container:
            _check_runs(call, caller)
        channel = self._channel(call, direction)
        channel.num_followers += 1
        index = last_index
        try:
            while True:
                page = await self._after(call_id, direction, channel, index)
                for index, chunk in page:
                    yield index, chunk
                    channel.read_up_to(index)
                if not page and channel.last_index <= index and not await channel.changed(HOLD_S):
                    return
        finally:
            channel.read_up_to(index)
            channel.num_followers -= 1
            channel.followed_at = self._clock.monotonic()
            if not call.inputs:
                self._call_finished(call)

    async def delivered(self, call_id: str) -> None:
        """Until the reader of what a call yields has been given all of it, for a moment at most.

        The SDK raises a generator's exception as soon as it hears of it, whatever it has still to receive.
        """
        channel = self._channels.get((call_id, Direction.OUT))
        if channel is None:
            return
        began_at = self._clock.monotonic()
        while channel.unread:
            limit_s = DELIVERY_S if channel.num_followers else COMING_S
            if (left_s := began_at + limit_s - self._clock.monotonic()) <= 0:
                return
            await channel.changed(left_s)
        await asyncio.sleep(ARRIVAL_S)

    async def _after(
        self, call_id: str, direction: Direction, channel: _Channel, index: int
    ) -> list[tuple[int, bytes]]:
        recent = channel.recent
        if recent and recent[0][0] <= index + 1:
            return [pair for pair in recent if pair[0] > index][:PAGE]
        rows = await self._database.read(
            lambda c: storage.chunks_after(c, call_id, int(direction), index, PAGE, MAX_PAGE_BYTES)
        )
        if rows:
            channel.last_index = max(channel.last_index, rows[-1].idx)
        return [(row.idx, row.chunk) for row in rows]

    def _channel(self, call: Call, direction: Direction) -> _Channel:
        return self._channels.setdefault((call.call_id, direction), _Channel(call, self._clock.monotonic()))

    def _is_abandoned(self, channel: _Channel) -> bool:
        waited_s = self._clock.monotonic() - channel.followed_at
        return not channel.num_followers and bool(channel.call.inputs) and waited_s >= ABANDONED_S

    def _call_finished(self, call: Call) -> None:
        for direction in Direction:
            key = (call.call_id, direction)
            if (channel := self._channels.get(key)) is not None:
                channel.wake()
                asyncio.get_running_loop().call_later(KEEP_S, self._forget, key)

    def _forget(self, key: tuple[str, Direction]) -> None:
        """Readers that come later, and the last of those that are here, find everything in the database."""
        channel = self._channels.get(key)
        if channel is not None and not channel.num_followers and not channel.call.inputs:
            del self._channels[key]


def _check_runs(call: Call, caller: Caller) -> None:
    """Whether this container runs an input of the call."""
    if any(item.task_id == caller.task_id for item in call.inputs.values()):
        return
    if any(not item.task_id and not item.is_queued for item in call.inputs.values()):
        raise Unavailable(f"who runs call {call.call_id} is not known yet: the server has just started")
    raise FailedPrecondition(f"container {caller.task_id} does not run call {call.call_id} any more")


def _give_up(waiter: asyncio.Future) -> None:
    if not waiter.done():
        waiter.set_result(False)
