"""What the server holds in memory of a call that is unfinished or was asked for lately.

Outputs are in the database before they get here; the latest are kept at hand, older ones are read from there.
"""

import asyncio
from collections import deque
from typing import NamedTuple

from aeolian.control.web_exchange import Exchange
from aeolian.domain.calls import CallType, InputKey, Invocation, Status

UNKNOWN, OPEN, FINISHED = 0, 1, 2
MAX_RECENT_OUTPUTS = 2000
MAX_RECENT_BYTES = 8 << 20
"""Outputs kept at hand per call."""


class Output(NamedTuple):
    seq: int
    idx: int
    retry_count: int
    status: Status
    item: bytes
    """A serialized FunctionGetOutputsItem."""


class Input:
    """An unfinished input."""

    __slots__ = (
        "call",
        "crashes",
        "created_at",
        "due_at",
        "finished",
        "idx",
        "is_queued",
        "losses",
        "num_bytes",
        "payload",
        "retry_count",
        "started_at",
        "task_id",
    )

    def __init__(self, call: "Call", idx: int, payload: bytes | None, created_at: float):
        self.call = call
        self.idx = idx
        self.payload = payload
        """A serialized FunctionInput; None: read it from the database."""
        self.num_bytes = len(payload) if payload is not None else 0
        self.created_at = created_at
        self.due_at = 0.0
        self.retry_count = 0
        self.losses = 0
        """How often a container was lost with it."""
        self.crashes = 0
        """How often a container ended by itself with it."""
        self.task_id = ""
        """The container that works on it; "" while it is queued."""
        self.started_at = 0.0
        self.is_queued = False
        self.finished = False

    @property
    def key(self) -> InputKey:
        return InputKey(self.call.call_id, self.idx)

    @property
    def input_id(self) -> str:
        return f"in-{self.call.call_id[3:]}:{self.idx}"


class Call:
    __slots__ = (
        "__weakref__",
        "_recent_bytes",
        "app_id",
        "call_id",
        "call_type",
        "created_at",
        "exchange",
        "expires_at",
        "function_id",
        "inputs",
        "invocation",
        "is_cancelled",
        "is_dropped",
        "last_seq",
        "marks",
        "num_changes",
        "num_finished",
        "num_inputs",
        "parent",
        "published_seq",
        "recent",
        "used_at",
        "waiters",
        "workspace",
    )

    def __init__(
        self,
        call_id: str,
        *,
        function_id: str,
        app_id: str,
        workspace: str,
        call_type: CallType,
        invocation: Invocation,
        parent: InputKey | None,
        created_at: float,
    ):
        self.call_id = call_id
        self.function_id = function_id
        self.app_id = app_id
        self.workspace = workspace
        self.call_type = call_type
        self.invocation = invocation
        self.parent = parent
        self.created_at = created_at
        self.expires_at: float | None = None
        self.exchange: Exchange | None = None
        """Of a web request, whose call is never stored: its messages and its end go there."""
        self.is_cancelled = False
        self.is_dropped = False
        self.inputs: dict[int, Input] = {}
        """Unfinished inputs by index."""
        self.marks = bytearray()
        """By index: UNKNOWN, OPEN or FINISHED."""
        self.num_inputs = 0
        self.num_finished = 0
        self.last_seq = 0
        self.published_seq = 0
        """Outputs up to this one are committed, and may be shown."""
        self.recent: deque[Output] = deque()
        """The latest published outputs, in order of `seq`, without a gap up to the last published one."""
        self._recent_bytes = 0
        self.waiters: set[asyncio.Future] = set()
        self.num_changes = 0
        """How often waiters were woken: what is read meanwhile may have missed a change."""
        self.used_at = 0.0
        """When somebody asked for it last, on the monotonic clock."""

    @property
    def num_unfinished(self) -> int:
        return self.num_inputs - self.num_finished

    def mark_of(self, idx: int) -> int:
        return self.marks[idx] if idx < len(self.marks) else UNKNOWN

    def mark(self, idx: int, mark: int) -> None:
        if idx >= len(self.marks):
            self.marks.extend(bytes(max(idx + 1 - len(self.marks), len(self.marks) // 4)))
        before = self.marks[idx]
        self.marks[idx] = mark
        if before == UNKNOWN:
            self.num_inputs += 1
        self.num_finished += (mark == FINISHED) - (before == FINISHED)

    def unmark(self, idx: int) -> None:
        """Forget an input that never became durable."""
        if self.mark_of(idx) == OPEN:
            self.marks[idx] = UNKNOWN
            self.num_inputs -= 1

    def finished_before(self, idx: int, seq: int) -> None:
        """An output that is in the database."""
        self.mark(idx, FINISHED)
        self.last_seq = self.published_seq = max(self.last_seq, seq)

    def skip_seqs(self, count: int) -> None:
        """The next output has a number that is higher by more than this."""
        self.last_seq = self.published_seq = self.last_seq + count

    def publish(self, output: Output) -> None:
        """A committed output becomes visible."""
        self.published_seq = output.seq
        self.recent.append(output)
        self._recent_bytes += len(output.item)
        while len(self.recent) > 1 and (len(self.recent) > MAX_RECENT_OUTPUTS or self._recent_bytes > MAX_RECENT_BYTES):
            self._recent_bytes -= len(self.recent.popleft().item)
        self.wake()

    def forget_outputs_up_to(self, seq: int) -> None:
        """The client has these."""
        while self.recent and self.recent[0].seq <= seq:
            self._recent_bytes -= len(self.recent.popleft().item)

    def hide_output(self, idx: int) -> None:
        """The input is tried again: its old output is none any more."""
        if any(output.idx == idx for output in self.recent):
            kept = [output for output in self.recent if output.idx != idx]
            self.recent = deque(kept)
            self._recent_bytes = sum(len(output.item) for output in kept)

    def wake(self) -> None:
        self.num_changes += 1
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)
        self.waiters.clear()

    async def changed(self, since: int, timeout_s: float) -> bool:
        """Wait for the next output or change after number `since`. False: the time ran out."""
        if self.num_changes != since:
            return True
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self.waiters.add(waiter)
        timer = loop.call_later(timeout_s, _give_up, waiter)
        try:
            return await waiter is None
        finally:
            timer.cancel()
            self.waiters.discard(waiter)


def _give_up(waiter: asyncio.Future) -> None:
    if not waiter.done():
        waiter.set_result(False)


def call_of(row) -> Call:
    """From its row in the database."""
    call = Call(
        row.call_id,
        function_id=row.function_id,
        app_id=row.app_id,
        workspace=row.workspace,
        call_type=CallType(row.call_type),
        invocation=Invocation(row.invocation),
        parent=InputKey(row.parent_call_id, row.parent_idx) if row.parent_call_id else None,
        created_at=row.created_at,
    )
    call.expires_at = row.expires_at
    call.is_cancelled = row.is_cancelled
    return call


def row_of(call: Call) -> dict:
    return {
        "call_id": call.call_id,
        "function_id": call.function_id,
        "app_id": call.app_id,
        "workspace": call.workspace,
        "call_type": int(call.call_type),
        "invocation": int(call.invocation),
        "parent_call_id": call.parent.call_id if call.parent else "",
        "parent_idx": call.parent.idx if call.parent else 0,
        "created_at": call.created_at,
        "expires_at": None,
        "is_cancelled": False,
    }


def input_row(item: Input, payload: bytes) -> dict:
    return {
        "call_id": item.call.call_id,
        "idx": item.idx,
        "payload": payload,
        "retry_count": item.retry_count,
        "created_at": item.created_at,
        "due_at": item.due_at,
    }
