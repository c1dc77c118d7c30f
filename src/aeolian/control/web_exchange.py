"""One web request on its way through a container: its messages to the app, and the app's answers.

Nothing of it is stored: whoever waits for the answer holds an open connection, which ends with the server. Both
directions hold little, so that a slow reader slows the sender down::

    gateway --tell--> [kept messages] --follow--> container      FunctionCallGetDataIn
    gateway <--answers-- [waiting chunks] <--put-- container     FunctionCallPutDataOut
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from modal_proto import api_pb2

from aeolian.domain.calls import Status
from aeolian.domain.errors import FailedPrecondition

MAX_AHEAD_BYTES = 1 << 20
"""How much of a request's body may wait for the container."""
MAX_WAITING_BYTES = 2 << 20
"""How much of an answer may wait for the client."""
KEPT_BYTES = 256 << 10
"""How much of what a container has been given is kept for another one, if that one is lost."""
HOLD_S = 55.0
"""How long an idle stream is held open; the container opens it again at once."""


class Exchange:
    def __init__(self) -> None:
        self.status = Status.PENDING
        """How the app ended."""
        self._kept: deque[tuple[int, bytes]] = deque()
        self._first_kept = 1
        self._last_told = 0
        self._given = 0
        """Number of the last message that a container has been given."""
        self._ahead_bytes = self._given_bytes = 0
        self._waiting: deque[api_pb2.DataChunk] = deque()
        self._waiting_bytes = 0
        self._last_put = 0
        self._is_answered = False
        self._is_deserted = False
        self._changed: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        return f"<Exchange: told {self._last_told}, given {self._given}, put {self._last_put}, {self.status.name}>"

    @property
    def is_over(self) -> bool:
        """Whether the app has ended."""
        return self.status is not Status.PENDING

    # ---- the gateway's side -----------------------------------------------------------------------------

    async def tell(self, message: api_pb2.Asgi) -> None:
        """Say something to the app. Waits while it has much unread; returns at once when nobody reads any more."""
        while self._ahead_bytes > MAX_AHEAD_BYTES and not self.is_over:
            await self._change(None)
        self._tell(message)

    def leave(self, message: api_pb2.Asgi) -> None:
        """The client has gone, or has its answer: tell the app, and drop what else it says."""
        if self._is_deserted:
            return
        self._is_deserted = True
        self._waiting.clear()
        self._waiting_bytes = 0
        self._tell(message)

    async def answers(self) -> AsyncIterator[api_pb2.DataChunk]:
        """What the app says, until it ends: `status` then tells how."""
        while True:
            while self._waiting:
                self._is_answered = True
                chunk = self._waiting.popleft()
                self._waiting_bytes -= len(chunk.data)
                self._wake()
                yield chunk
            if self.is_over:
                return
            await self._change(None)

    # ---- the container's side ---------------------------------------------------------------------------

    async def follow(self, last_index: int) -> AsyncIterator[tuple[int, bytes]]:
        """Messages after number `last_index`, as they come: (number, serialized DataChunk)."""
        index = last_index
        while not self.is_over:
            if index + 1 < self._first_kept:
                raise FailedPrecondition(f"message {index + 1} to the web function is gone: it was received before")
            found = next(((number, data) for number, data in self._kept if number > index), None)
            if found is None:
                if not await self._change(HOLD_S):
                    return
                continue
            index, data = found
            yield index, data
            self._was_given(index)

    async def put(self, chunks: Sequence[api_pb2.DataChunk]) -> None:
        """The app says something. Waits while the client has much unread."""
        while self._waiting_bytes > MAX_WAITING_BYTES and not self._is_deserted and not self.is_over:
            await self._change(None)
        for chunk in chunks:
            if chunk.index <= self._last_put:
                continue  # a repetition
            self._last_put = chunk.index
            if not self._is_deserted and not self.is_over:
                self._waiting.append(chunk)
                self._waiting_bytes += len(chunk.data)
        self._wake()

    def begin_again(self) -> bool:
        """Its container was lost. Whether another one can take the request as if nothing had been."""
        if self._is_answered or self._is_deserted or self._first_kept > 1:
            return False
        self._waiting.clear()
        self._waiting_bytes = self._last_put = 0
        self._ahead_bytes = sum(len(data) for _, data in self._kept)
        self._given = self._given_bytes = 0
        return True

    def end(self, status: Status) -> None:
        """The app has ended."""
        if not self.is_over:
            self.status = status
            self._kept.clear()
            self._wake()

    # ---- inside -----------------------------------------------------------------------------------------

    def _tell(self, message: api_pb2.Asgi) -> None:
        if self.is_over:
            return
        self._last_told += 1
        chunk = api_pb2.DataChunk(
            data_format=api_pb2.DATA_FORMAT_ASGI, data=message.SerializeToString(), index=self._last_told
        ).SerializeToString()
        self._kept.append((self._last_told, chunk))
        self._ahead_bytes += len(chunk)
        self._wake()

    def _was_given(self, index: int) -> None:
        for number, data in self._kept:
            if self._given < number <= index:
                self._given = number
                self._ahead_bytes -= len(data)
                self._given_bytes += len(data)
        while self._kept and self._given_bytes > KEPT_BYTES and self._kept[0][0] <= self._given:
            number, data = self._kept.popleft()
            self._first_kept = number + 1
            self._given_bytes -= len(data)
        self._wake()

    def _wake(self) -> None:
        for waiter in self._changed:
            if not waiter.done():
                waiter.set_result(None)
        self._changed.clear()

    async def _change(self, timeout_s: float | None) -> bool:
        """Until something has changed. False: nothing did within the time."""
        waiter = asyncio.get_running_loop().create_future()
        self._changed.add(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
            return True
        except TimeoutError:
            return False
        finally:
            self._changed.discard(waiter)
