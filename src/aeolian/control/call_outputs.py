"""Reading outputs: waiting for those of a call, from memory where it reaches back far enough, else from the database."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

from aeolian.control.call_state import FINISHED, Call, Output
from aeolian.domain.calls import CallType, Status
from aeolian.domain.clock import Clock
from aeolian.storage import calls as storage
from aeolian.storage.database import Database

MAX_WAIT_S = 60.0
MAX_OUTPUTS = 1000
MAX_REPLY_BYTES = 16 << 20
COALESCE_STEP_S = 0.01
COALESCE_MAX_S = 0.1


class OutputsPage(NamedTuple):
    outputs: list[Output]
    last_seq: int
    num_unfinished: int


Waiting = Callable[[], contextlib.AbstractContextManager[None]]
"""Entered while somebody waits."""


class CallOutputs:
    def __init__(self, database: Database, clock: Clock):
        self._database = database
        self._clock = clock

    async def after(self, call: Call, seq: int, timeout_s: float, max_outputs: int, waiting: Waiting) -> OutputsPage:
        """Wait for outputs after number `seq` in the order of finishing."""
        limit = min(max_outputs or MAX_OUTPUTS, MAX_OUTPUTS)
        if seq and not call.invocation.is_async:
            call.forget_outputs_up_to(seq)
        is_map = call.call_type is CallType.MAP

        def may_come() -> bool:
            return _is_open(call) or (is_map and not call.is_cancelled)

        outputs, left_s = await self._wait(call, lambda: self._after(call, seq, limit), may_come, timeout_s, waiting)
        if outputs and is_map:
            outputs = await self._coalesced(call, outputs, seq, limit, min(left_s, COALESCE_MAX_S))
        return OutputsPage(outputs, outputs[-1].seq if outputs else seq, _num_to_come(call))

    async def between(
        self, call: Call, first: int, last: int, timeout_s: float, max_outputs: int, waiting: Waiting
    ) -> OutputsPage:
        """Wait for outputs of inputs `first` to `last`, both included: until there is one, in order of the inputs."""
        limit = min(max_outputs or MAX_OUTPUTS, MAX_OUTPUTS)
        outputs, _ = await self._wait(
            call, lambda: self._between(call, first, last, limit), lambda: _is_open(call), timeout_s, waiting
        )
        return OutputsPage(outputs, outputs[-1].seq if outputs else 0, _num_to_come(call))

    async def _wait(self, call: Call, look, may_come: Callable[[], bool], timeout_s: float, waiting: Waiting):
        """(outputs, seconds left)"""
        deadline = self._clock.monotonic() + min(max(0.0, timeout_s), MAX_WAIT_S)
        while True:
            call.used_at = self._clock.monotonic()
            seen = call.num_changes
            outputs = await look()
            left_s = deadline - self._clock.monotonic()
            if outputs or call.is_dropped:
                return outputs, left_s
            is_over = left_s <= 0 or not may_come()
            if is_over and (may_come() or call.num_changes == seen):  # else the last one came while it was looked for
                return outputs, left_s
            with waiting():
                await call.changed(seen, left_s)

    async def _coalesced(self, call: Call, outputs: list[Output], seq: int, limit: int, wait_s: float) -> list[Output]:
        """More outputs of a map in one answer, while they keep coming: a poll repeats all outstanding tickets."""
        until = self._clock.monotonic() + wait_s
        while len(outputs) < limit and call.num_unfinished and self._clock.monotonic() < until:
            before = len(outputs)
            await asyncio.sleep(COALESCE_STEP_S)
            outputs = await self._after(call, seq, limit)
            if len(outputs) == before:
                break
        return outputs

    async def _after(self, call: Call, seq: int, limit: int) -> list[Output]:
        if seq >= call.published_seq:
            return []
        if call.recent and seq >= call.recent[0].seq - 1:
            return _limited((output for output in call.recent if output.seq > seq), limit)
        rows = await self._database.read(lambda c: storage.outputs_after(c, call.call_id, seq, limit, MAX_REPLY_BYTES))
        return _visible(call, map(_output_of, rows))

    async def _between(self, call: Call, first: int, last: int, limit: int) -> list[Output]:
        if not call.published_seq:
            return []  # what is finished is not stored yet, and nobody may see it
        last = min(last, len(call.marks) - 1)
        wanted = {idx for idx in range(first, last + 1) if call.mark_of(idx) == FINISHED}
        found = [output for output in call.recent if output.idx in wanted]
        if len(found) == len(wanted) or (call.recent and call.recent[0].seq == 1):
            return _limited(sorted(found, key=lambda output: output.idx), limit)
        rows = await self._database.read(
            lambda c: storage.outputs_between(c, call.call_id, first, last, limit, MAX_REPLY_BYTES)
        )
        return _visible(call, map(_output_of, rows))


def _is_open(call: Call) -> bool:
    return _num_to_come(call) > 0


def _num_to_come(call: Call) -> int:
    """Inputs that are unfinished, or whose output is on its way to the database.

    A client that hears of none, and gets no output, takes the call for an expired one.
    """
    return call.num_unfinished + call.last_seq - call.published_seq


def _visible(call: Call, outputs: Iterable[Output]) -> list[Output]:
    """The database may be ahead of what was said to be stored, or behind an input that is tried again."""
    return [out for out in outputs if out.seq <= call.published_seq and call.mark_of(out.idx) == FINISHED]


def _limited(outputs: Iterable[Output], limit: int) -> list[Output]:
    found: list[Output] = []
    num_bytes = 0
    for output in outputs:
        num_bytes += len(output.item)
        if found and (len(found) >= limit or num_bytes > MAX_REPLY_BYTES):
            break
        found.append(output)
    return found


def _output_of(row) -> Output:
    return Output(row.seq, row.idx, row.retry_count, Status(row.status), row.item)
