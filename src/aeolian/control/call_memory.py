"""Which calls are in memory: the unfinished ones, and those that somebody asked for lately. The rest is in the database.

::

    keep --> in memory --finished, and not asked for in a while--> database only --expired--> gone
                 ^------------------------ asked for again ------------'
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from aeolian.control.call_journal import CallJournal
from aeolian.control.call_state import Call, call_of
from aeolian.domain.clock import Clock
from aeolian.storage import calls as storage
from aeolian.storage.database import Database

log = logging.getLogger(__name__)

KEEP_S = 30.0
SWEEP_S = 5.0
DELETE_S = 60.0
"""How often expired calls are looked for in the database."""
EXPIRY_SYNC_S = 3600.0
EXPIRY_NESTED_S = 24 * 3600.0
EXPIRY_ASYNC_S = 7 * 24 * 3600.0
"""How long finished calls can be asked for."""
MAX_DEPTH = 100
PORTION = 500
MAX_HIDDEN = 1_000_000
"""Outputs that retries have hidden, at most: clients may have seen their numbers, which the database has no more."""
OUTPUTS_PORTION = 5000
"""How much is emptied or deleted in one transaction: others wait for it."""


class CallMemory:
    def __init__(self, database: Database, clock: Clock, journal: CallJournal):
        self._database = database
        self._clock = clock
        self._journal = journal
        self._calls: dict[str, Call] = {}
        self._resting: OrderedDict[str, float] = OrderedDict()
        """Calls in memory without an unfinished input, with the time since when."""
        self._loading: dict[str, asyncio.Task[Call | None]] = {}
        self._sweeper: asyncio.Task | None = None
        self.delete_blob: Callable[[str], Awaitable[None]] | None = None
        """Called with the id of each blob that goes with a call."""

    async def load(self) -> list[Any]:
        """Take up what is unfinished. Returns rows of unfinished inputs; each one's call is in memory."""
        lifetimes_s = {"sync": EXPIRY_SYNC_S, "nested": EXPIRY_NESTED_S, "async": EXPIRY_ASYNC_S}
        now = self._clock.now()
        await self._database.write(lambda c: storage.expire_finished(c, now, lifetimes_s))
        rows = await self._database.read(storage.unfinished_calls)
        inputs = await self._database.read(storage.unfinished_inputs)
        marks = await self._database.read(lambda c: storage.output_marks_of(c, [row.call_id for row in rows]))
        for row in rows:
            self._calls[row.call_id] = call_of(row)
        for mark in marks:
            self._calls[mark.call_id].finished_before(mark.idx, mark.seq)
        for call in self._calls.values():
            call.skip_seqs(MAX_HIDDEN)
        return [row for row in inputs if row.call_id in self._calls]

    def start_sweeping(self) -> None:
        self._sweeper = asyncio.create_task(self._sweep_loop(), name="calls-sweep")

    async def close(self) -> None:
        tasks = [*self._loading.values(), *([self._sweeper] if self._sweeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- what is in memory ------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Call]:
        return iter(list(self._calls.values()))

    def get(self, call_id: str) -> Call | None:
        """If it is in memory: unfinished, or used lately."""
        return self._calls.get(call_id)

    async def find(self, call_id: str) -> Call | None:
        """Also from the database. None: never made, or expired."""
        call = self._calls.get(call_id)
        if call is not None:
            return call
        task = self._loading.get(call_id)
        if task is None:
            task = self._loading[call_id] = asyncio.create_task(self._read(call_id))
            task.add_done_callback(lambda _: self._loading.pop(call_id, None))
        return await asyncio.shield(task)

    def root_of(self, call: Call) -> str:
        """The call that this one comes from in the end, as far as memory reaches back."""
        for _ in range(MAX_DEPTH):
            if call.parent is None:
                break
            above = self._calls.get(call.parent.call_id)
            if above is None:
                return call.parent.call_id
            call = above
        return call.call_id

    def keep(self, call: Call) -> None:
        """A new call."""
        self._calls[call.call_id] = call
        call.used_at = self._clock.monotonic()
        self.rest(call)

    def forget(self, call: Call) -> None:
        """A call that was never stored."""
        self._calls.pop(call.call_id, None)

    def rest(self, call: Call) -> None:
        """It has no unfinished input."""
        self._resting[call.call_id] = self._clock.monotonic()

    def stir(self, call: Call) -> None:
        """It has unfinished inputs."""
        self._resting.pop(call.call_id, None)
        if call.expires_at is not None:
            call.expires_at = None
            self._journal.writes.expiries[call.call_id] = None

    async def _read(self, call_id: str) -> Call | None:
        def read(connection):
            return storage.get_call(connection, call_id), storage.output_marks(connection, call_id)

        await self._journal.flush()
        row, marks = await self._database.read(read)
        if (there := self._calls.get(call_id)) is not None or row is None:
            return there
        call = call_of(row)
        for mark in marks:
            call.finished_before(mark.idx, mark.seq)
        self.keep(call)
        return call

    # ---- leaving it -------------------------------------------------------------------------------------

    async def _sweep_loop(self) -> None:
        deleted_at = self._clock.monotonic()
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                for call in self.leave():
                    await self._empty(call)
                if self._clock.monotonic() - deleted_at >= DELETE_S:
                    deleted_at = self._clock.monotonic()
                    await self._delete_expired()
            except Exception:
                log.exception("finished calls could not be swept")

    def leave(self) -> list[Call]:
        """Finished calls that nobody has asked for lately are left to the database. Returns those that are dropped."""
        now, horizon = self._clock.now(), self._clock.monotonic() - KEEP_S
        busy, dropped = [], []
        while self._resting:
            call_id, since = next(iter(self._resting.items()))
            if since > horizon:
                break
            del self._resting[call_id]
            call = self._calls.get(call_id)
            if call is None or call.inputs:
                continue
            if call.waiters or (call.used_at > horizon and not call.is_dropped):
                busy.append(call)
                continue
            if call.expires_at is None:
                self._journal.writes.expiries[call_id] = now + _lifetime_s(call)
            if call.is_dropped:
                dropped.append(call)
            del self._calls[call_id]
        for call in busy:
            self.rest(call)
        return dropped

    async def _empty(self, call: Call) -> None:
        """What a map has returned is with its caller; that it ran, and how, is still told."""
        await self._journal.flush()
        call_id = call.call_id
        await self._delete_blobs(await self._database.write(lambda c: storage.delete_payloads(c, call_id)))
        for first in range(0, len(call.marks), OUTPUTS_PORTION):
            last = first + OUTPUTS_PORTION - 1
            await self._database.write(partial(storage.empty_outputs, call_id=call_id, first=first, last=last))

    async def _delete_expired(self) -> None:
        now = self._clock.now()
        while True:
            expired = await self._database.read(lambda c: storage.expired_calls(c, now, PORTION))
            expired = [call_id for call_id in expired if call_id not in self._calls]
            if not expired:
                return
            await self._delete_blobs(await self._database.write(partial(storage.delete_calls, call_ids=expired)))
            await asyncio.sleep(0.05)

    async def _delete_blobs(self, blob_ids: list[str]) -> None:
        """Where this is cut short, they are found later as those that nobody refers to."""
        for blob_id in blob_ids:
            if self.delete_blob is not None:
                await self.delete_blob(blob_id)


def _lifetime_s(call: Call) -> float:
    if call.invocation.is_async:
        return EXPIRY_ASYNC_S
    return EXPIRY_NESTED_S if call.parent is not None else EXPIRY_SYNC_S
