"""Group commit of calls: what happens while a transaction is being committed shares the next one.

::

    request --> batch (in memory) --> one transaction --> requests answered, outputs visible
                  ^ everything that comes meanwhile waits in the next batch
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from aeolian.domain.errors import AeolianError, OutOfSpace, Unavailable
from aeolian.storage.calls import CallWrites
from aeolian.storage.database import Database

log = logging.getLogger(__name__)

RETRY_S = 0.5


class _Batch:
    def __init__(self) -> None:
        self.writes = CallWrites()
        self.requests: list[tuple[asyncio.Future, Callable[[], None] | None]] = []
        """Who waits for an acknowledgement, and what takes the request back when it cannot be stored."""
        self.after: list[Callable[[], None]] = []


class CallJournal:
    def __init__(self, database: Database):
        self._database = database
        self._batch: _Batch | None = None
        """What the next transaction will hold."""
        self._in_flight: _Batch | None = None
        self._flushing: asyncio.Task | None = None

    @property
    def writes(self) -> CallWrites:
        """Put changes in here; they are committed soon, those of one event-loop step together."""
        return self._current().writes

    def after_commit(self, fn: Callable[[], None]) -> None:
        """Call `fn` when what was written so far is durable: at once, if it is. Calls keep their order."""
        if self._batch is None and self._in_flight is None:
            fn()
        else:
            self._current().after.append(fn)

    async def committed(self, undo: Callable[[], None] | None) -> None:
        """Until what was written so far is durable. When it cannot be (the disk is full): `undo()`, then raise.

        Without `undo`: what cannot be taken back waits until it can be stored.
        """
        future = asyncio.get_running_loop().create_future()
        self._current().requests.append((future, undo))
        await future

    async def flush(self) -> None:
        """Until what was written so far is durable, or cannot be now (the disk is full).

        What comes meanwhile does not prolong it.
        """
        batch = self._batch or self._in_flight
        if batch is not None:
            future = asyncio.get_running_loop().create_future()
            batch.requests.append((future, _take_nothing_back))
            with contextlib.suppress(AeolianError):
                await future

    async def close(self, timeout_s: float) -> None:
        """Commit what is left. Where that cannot be done in time, it was not acknowledged either."""
        if self._flushing is not None and not self._flushing.done():
            await asyncio.wait({self._flushing}, timeout=timeout_s)
            self._flushing.cancel()

    def _current(self) -> _Batch:
        if self._batch is None:
            self._batch = _Batch()
            if self._flushing is None or self._flushing.done():
                self._flushing = asyncio.get_running_loop().create_task(self._flush(), name="call-journal")
        return self._batch

    async def _flush(self) -> None:
        while (batch := self._batch) is not None:
            self._batch, self._in_flight = None, batch
            try:
                await self._database.write(batch.writes.apply)
            except Exception as error:
                await self._failed(batch, error)
                continue
            self._in_flight = None
            for fn in batch.after:
                try:
                    fn()
                except Exception:
                    log.exception("a committed change could not be made visible")
            for future, _ in batch.requests:
                if not future.done():
                    future.set_result(None)

    async def _failed(self, batch: _Batch, error: Exception) -> None:
        """Refuse what clients asked for; keep what containers have done, and try to store it again."""
        if not isinstance(error, AeolianError):
            log.exception("calls could not be stored", exc_info=error)
            error = Unavailable("the call could not be stored; see the server's log")
        elif isinstance(error, OutOfSpace):
            log.error("calls could not be stored: %s", error)
        self._in_flight = None
        for future, undo in batch.requests:
            if undo is None:
                continue
            try:
                undo()
            except Exception:
                log.exception("a refused call could not be taken back")
            if not future.done():
                future.set_exception(error)
        batch.requests = [request for request in batch.requests if request[1] is None]
        writes = batch.writes
        writes.take_back_new()
        writes.dropped_outputs |= writes.outputs.keys()  # in case a part of it was stored after all
        if not (writes.has_changes or batch.after or batch.requests):
            await asyncio.sleep(0)
            return
        later, self._batch = self._batch, batch
        if later is not None:
            _merge(batch, later)
        await asyncio.sleep(RETRY_S)


def _take_nothing_back() -> None:
    return None


def _merge(batch: _Batch, later: _Batch) -> None:
    one, other = batch.writes, later.writes
    one.calls += other.calls
    one.together_with += other.together_with
    one.expiries |= other.expiries
    one.cancelled += other.cancelled
    one.blobs += other.blobs
    for key in other.outputs:
        one.inputs.pop(key, None)
        one.updated_inputs.pop(key, None)
    for key in other.dropped_outputs:
        if one.outputs.pop(key, None) is None:
            one.dropped_outputs.add(key)
    one.outputs |= other.outputs
    one.dropped_inputs |= other.dropped_inputs
    one.inputs |= other.inputs
    one.updated_inputs |= other.updated_inputs
    one.replies |= other.replies
    batch.after += later.after
    batch.requests += later.requests
