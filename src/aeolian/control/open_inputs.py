"""Unfinished inputs: of which apps they are, which calls their calls made, and what memory holds of their payloads."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from aeolian.control.call_journal import CallJournal
from aeolian.control.call_memory import CallMemory
from aeolian.control.call_state import OPEN, Call, Input
from aeolian.domain.clock import Clock
from aeolian.storage import calls as storage
from aeolian.storage.database import Database

PAYLOAD_BUDGET_BYTES = 64 << 20
"""Payloads of unfinished inputs in memory; those beyond it are read again when their turn comes."""


class Queue(Protocol):
    def remove(self, item: Input) -> None:
        """A queued input is not to be run."""
        ...

    def release(self, item: Input, duration_s: float | None) -> None:
        """An input that a container held is finished; `duration_s`: how long it ran, where that is known."""
        ...


class OpenInputs:
    def __init__(self, database: Database, clock: Clock, journal: CallJournal, memory: CallMemory, queue: Queue):
        self.when_idle: Callable[[str], Awaitable[None]] | None = None
        """Called with the id of an app whose last unfinished input is done."""
        self.when_finished: list[Callable[[Call], None]] = []
        """Called with each call whose last input is done."""
        self._database = database
        self._clock = clock
        self._journal = journal
        self._memory = memory
        self._queue = queue
        self._children: dict[str, set[str]] = {}
        """Unfinished calls by the call that made them."""
        self._num_of_app: dict[str, int] = {}
        self._payload_bytes = 0
        self._tasks: set[asyncio.Task] = set()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- inputs -----------------------------------------------------------------------------------------

    def open(self, call: Call, idx: int, payload: bytes | None, row=None) -> Input:
        """An input to be run. `row`: how it is stored, after a restart."""
        item = Input(call, idx, payload, row.created_at if row else self._clock.now())
        if row is not None:
            item.retry_count, item.due_at = row.retry_count, row.due_at
        if payload is not None:
            if self._payload_bytes + item.num_bytes > PAYLOAD_BUDGET_BYTES and call.exchange is None:
                item.payload = None
            else:
                self._payload_bytes += item.num_bytes
        call.mark(idx, OPEN)
        call.inputs[idx] = item
        self._num_of_app[call.app_id] = self._num_of_app.get(call.app_id, 0) + 1
        return item

    def forget(self, item: Input, duration_s: float | None = None) -> None:
        """Out of the queue or off its container, and out of memory."""
        if item.task_id:
            self._queue.release(item, duration_s)
        else:
            self._queue.remove(item)
        item.finished = True
        if item.payload is not None:
            self._payload_bytes -= item.num_bytes
        item.payload = None
        call = item.call
        call.inputs.pop(item.idx, None)
        left = self._num_of_app.get(call.app_id, 0) - 1
        if left > 0:
            self._num_of_app[call.app_id] = left
            return
        self._num_of_app.pop(call.app_id, None)
        if self.when_idle is not None:
            task = asyncio.ensure_future(self.when_idle(call.app_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def payloads_of(self, items: Sequence[Input]) -> list[bytes]:
        """What the inputs carry, read again where memory does not hold it."""
        missing = [item for item in items if item.payload is None]
        if not missing:
            return [item.payload or b"" for item in items]
        await self._journal.flush()
        keys = [(item.call.call_id, item.idx) for item in missing]
        found = await self._database.read(lambda c: storage.payloads(c, keys))
        return [item.payload if item.payload is not None else found.get(item.key, b"") for item in items]

    def is_idle(self, app_id: str) -> bool:
        return not self._num_of_app.get(app_id)

    # ---- calls ------------------------------------------------------------------------------------------

    def begun(self, call: Call) -> None:
        """The call has unfinished inputs."""
        self._memory.stir(call)
        if call.parent is not None:
            self._children.setdefault(call.parent.call_id, set()).add(call.call_id)

    def done(self, call: Call) -> None:
        """It has none (any more)."""
        self._memory.rest(call)
        if call.parent is not None and (siblings := self._children.get(call.parent.call_id)) is not None:
            siblings.discard(call.call_id)
            if not siblings:
                del self._children[call.parent.call_id]
        for callback in self.when_finished:
            callback(call)

    def awaited_by(self, call: Call, idx: int | None) -> list[Call]:
        """Unfinished calls that this call, or one input of it, has made and waits for."""
        found = []
        for child_id in self._children.get(call.call_id, ()):
            child = self._memory.get(child_id)
            if child is None or child.parent is None or child.invocation.is_async or not child.inputs:
                continue
            if idx is None or child.parent.idx == idx:
                found.append(child)
        return found

    def is_recursive(self, call: Call) -> bool:
        """A Function that calls itself: the deepest calls go first, because all above wait for them."""
        above = self._memory.get(call.parent.call_id) if call.parent is not None else None
        return above is not None and above.function_id == call.function_id and not call.invocation.is_async
