"""Function calls: their inputs are taken, queued and kept until each has exactly one output.

An input is durable before its call is acknowledged, an output before a client sees it. Dispatching does not wait
for the first: a container may already work while the input is being stored.

    start, put_inputs --> journal --> acknowledged
              \\--> pools (queue) --> a container --> output_received --> journal --> visible to get_outputs
                      ^--- container_lost, retries ---/
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from modal_proto import api_pb2

from aeolian.control.apps import Apps
from aeolian.control.call_journal import CallJournal
from aeolian.control.call_state import FINISHED, OPEN, UNKNOWN, Call, Input, Output
from aeolian.control.functions import Functions
from aeolian.domain.caller import Caller
from aeolian.domain.calls import (
    MAX_CRASHES,
    MAX_LOSSES,
    RETRIED,
    CallType,
    InputKey,
    Invocation,
    Status,
    key_of,
)
from aeolian.domain.clock import Clock
from aeolian.domain.containers import ExitStatus
from aeolian.domain.errors import FailedPrecondition, InvalidArgument, NotFound, PayloadTooLarge, ResourceExhausted
from aeolian.domain.ids import content_id, new_id
from aeolian.storage import calls as storage
from aeolian.storage.database import Database

log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 8 << 20
"""Of one input or output, inline: the SDK sends more than 2 MiB as a blob."""
MAX_IDX = 1 << 24
MAX_QUEUED = 1_000_000
"""Unfinished inputs of one Function."""
PAYLOAD_BUDGET_BYTES = 64 << 20
"""Payloads of queued inputs in memory; those beyond it are read again when their turn comes."""
REPEAT_WINDOW_S = 180.0
"""How long after a start a request may repeat one that the predecessor carried out."""
KEEP_IN_MEMORY_S = 30.0
SWEEP_S = 5.0
EXPIRY_SYNC_S = 3600.0
EXPIRY_NESTED_S = 24 * 3600.0
EXPIRY_ASYNC_S = 7 * 24 * 3600.0
COALESCE_STEP_S = 0.01
COALESCE_MAX_S = 0.1
MAX_OUTPUTS = 1000
MAX_REPLY_BYTES = 16 << 20


class Queue(Protocol):
    """Where inputs wait for containers (`pools.Pools`)."""

    def enqueue(self, inputs: Sequence[Input], *, front: bool = False) -> None: ...

    def remove(self, item: Input) -> None:
        """A queued input is not to be run."""
        ...

    def release(self, item: Input, duration_s: float | None) -> None:
        """An input that a container held is finished; `duration_s`: how long it ran, where that is known."""
        ...

    def cancel_running(self, items: Sequence[Input], *, terminate: bool) -> None: ...

    def num_unfinished(self, function_id: str) -> int: ...


class OutputsPage(NamedTuple):
    outputs: list[Output]
    last_seq: int
    num_unfinished: int


class Calls:
    def __init__(self, database: Database, clock: Clock, apps: Apps, functions: Functions, queue: Queue):
        self.when_idle: Callable[[str], Awaitable[None]] | None = None
        """Called with the id of an app whose last unfinished input is done."""
        self.when_finished: list[Callable[[Call], None]] = []
        """Called with each call whose last input is done."""
        self._database = database
        self._clock = clock
        self._apps = apps
        self._functions = functions
        self._queue = queue
        self._journal = CallJournal(database)
        self._calls: dict[str, Call] = {}
        self._idle: OrderedDict[str, float] = OrderedDict()
        """Finished calls still in memory, with the time since when."""
        self._loading: dict[str, asyncio.Task[Call]] = {}
        self._children: dict[str, set[str]] = {}
        """Unfinished calls by the call that made them."""
        self._unfinished_of_app: dict[str, int] = {}
        self._payload_bytes = 0
        self._opened_at = 0.0
        self._tasks: set[asyncio.Task] = set()
        self._sweeper: asyncio.Task | None = None

    # ---- life of the service ----------------------------------------------------------------------------

    async def load(self) -> list[Input]:
        """Take up what is unfinished. Returns the inputs; whoever knows the containers queues them."""
        self._opened_at = self._clock.monotonic()
        rows = await self._database.read(storage.unfinished_calls)
        inputs = await self._database.read(storage.unfinished_inputs)
        marks = await self._database.read(lambda c: storage.output_marks_of(c, [row.call_id for row in rows]))
        for row in rows:
            self._calls[row.call_id] = _call_of(row)
        for mark in marks:
            call = self._calls[mark.call_id]
            call.mark(mark.idx, FINISHED)
            call.last_seq = max(call.last_seq, mark.seq)
        found = [self._open_input(self._calls[row.call_id], row.idx, None, row) for row in inputs]
        for call in self._calls.values():
            self._track(call)
        return found

    async def start_sweeping(self) -> None:
        self._sweeper = asyncio.create_task(self._sweep_loop(), name="calls-sweep")

    async def close(self) -> None:
        """Commit what is on its way. Those who wait for outputs are woken."""
        tasks = [*self._tasks, *([self._sweeper] if self._sweeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._journal.flush()
        for call in self._calls.values():
            call.wake()

    # ---- taking inputs ----------------------------------------------------------------------------------

    async def start(
        self,
        function_id: str,
        caller: Caller,
        *,
        call_type: CallType,
        invocation: Invocation,
        parent_input_id: str = "",
        inputs: Sequence[tuple[int, bytes]] = (),
    ) -> Call:
        """A new call with its first inputs: (index, serialized FunctionInput). Durable when this returns.

        Raises NotFound and FailedPrecondition for Functions that take no calls, ResourceExhausted for a full queue.
        """
        row = self._functions.check_callable(function_id, caller)
        call_id = self._id_for(caller)
        if (repeated := await self._repeated(call_id)) is not None:
            return repeated
        self._check_inputs(function_id, inputs)
        call = Call(
            call_id,
            function_id=function_id,
            app_id=row.app_id,
            workspace=caller.workspace,
            call_type=call_type,
            invocation=invocation,
            parent=self._parent(parent_input_id),
            created_at=self._clock.now(),
        )
        self._calls[call_id] = call
        self._idle[call_id] = self._clock.monotonic()
        self._journal.writes.calls.append(_row_of(call))
        await self._take(call, inputs)
        return call

    async def put_inputs(self, function_id: str, call_id: str, caller: Caller, inputs: Sequence[tuple[int, bytes]]):
        """More inputs of a map. Those that came before are passed over. Durable when this returns."""
        call = await self.open(call_id, caller)
        if function_id and function_id != call.function_id:
            raise InvalidArgument(f"call {call_id} is not one of Function {function_id}")
        if call.is_cancelled or call.is_dropped:
            raise FailedPrecondition(f"call {call_id} was cancelled: it takes no more inputs")
        self._functions.check_callable(call.function_id, caller)
        fresh = [item for item in inputs if call.mark_of(item[0]) == UNKNOWN]
        self._check_inputs(call.function_id, fresh)
        await self._take(call, fresh)

    async def retry_inputs(
        self, call_id: str, caller: Caller, items: Sequence[tuple[int, bytes, int]]
    ) -> list[tuple[int, int]]:
        """Try finished inputs again: (index, serialized FunctionInput, retry count or 0 for the next one).

        Their outputs are hidden from now on. An input that runs already, or was retried as often, is passed over.
        Returns (index, retry count).
        """
        call = await self.open(call_id, caller)
        if call.is_cancelled or call.is_dropped:
            raise FailedPrecondition(f"call {call_id} was cancelled: it takes no more inputs")
        self._functions.check_callable(call.function_id, caller)
        self._check_inputs(call.function_id, [item[:2] for item in items])
        counts = {idx: n for idx, n in (await self._retry_counts(call, [item[0] for item in items])).items()}
        opened: list[Input] = []
        answers: list[tuple[int, int]] = []
        for idx, payload, wanted in items:
            before = counts.get(idx, 0)
            answers.append((idx, before))
            if call.mark_of(idx) != FINISHED or (wanted and wanted <= before):
                continue
            retry_count = wanted or before + 1
            item = self._open_input(call, idx, payload)
            item.retry_count = retry_count
            call.hide_output(idx)
            self._journal.writes.reopen_input(_input_row(item, payload))
            opened.append(item)
            answers[-1] = (idx, retry_count)
        if opened:
            self._track(call)
            self._queue.enqueue(opened)
            # The old output is gone for everybody now; a failed write leaves it to the next attempt.
            await self._journal.committed(lambda: None)
        return answers

    async def _take(self, call: Call, inputs: Sequence[tuple[int, bytes]]) -> None:
        writes = self._journal.writes
        opened = []
        for idx, payload in inputs:
            if call.mark_of(idx) != UNKNOWN:
                continue
            item = self._open_input(call, idx, payload)
            writes.put_input(_input_row(item, payload), is_new=True)
            opened.append(item)
        if opened:
            self._track(call)
            self._queue.enqueue(opened)

        def undo() -> None:
            for item in opened:
                if not item.finished:
                    self._forget_input(item)
                    call.unmark(item.idx)
            if not call.num_inputs:
                self._calls.pop(call.call_id, None)

        await self._journal.committed(undo)

    def _open_input(self, call: Call, idx: int, payload: bytes | None, row=None) -> Input:
        item = Input(call, idx, payload, row.created_at if row else self._clock.now())
        if row is not None:
            item.retry_count, item.due_at = row.retry_count, row.due_at
        if payload is not None:
            if self._payload_bytes + item.num_bytes > PAYLOAD_BUDGET_BYTES:
                item.payload = None
            else:
                self._payload_bytes += item.num_bytes
        call.mark(idx, OPEN)
        call.inputs[idx] = item
        self._unfinished_of_app[call.app_id] = self._unfinished_of_app.get(call.app_id, 0) + 1
        return item

    async def payloads_of(self, items: Sequence[Input]) -> list[bytes]:
        """What the inputs carry, read again where memory does not hold it."""
        missing = [item for item in items if item.payload is None]
        if missing:
            await self._journal.flush()
            keys = [(item.call.call_id, item.idx) for item in missing]
            found = await self._database.read(lambda c: storage.payloads(c, keys))
            return [item.payload if item.payload is not None else found.get(item.key, b"") for item in items]
        return [item.payload or b"" for item in items]

    # ---- outputs ----------------------------------------------------------------------------------------

    def output_received(self, task_id: str, message: api_pb2.FunctionPutOutputsItem, done: Callable[[], None]) -> None:
        """A container is done with an input. The first output wins; `done` is called when it is durable."""
        try:
            item = self.unfinished_input(message.input_id)
        except NotFound:
            item = None
        if item is None or item.retry_count != message.retry_count:
            self._journal.after_commit(done)  # a repetition, or the output of an abandoned attempt
            return
        if item.task_id != task_id and item.task_id:
            self._queue.cancel_running([item], terminate=False)
        self.finish(item, message.result, message, task_id=task_id)
        self._journal.after_commit(done)

    def finish(
        self,
        item: Input,
        result: api_pb2.GenericResult,
        message: api_pb2.FunctionPutOutputsItem | None = None,
        *,
        task_id: str = "",
    ) -> None:
        """An input has its output, unless it is tried again."""
        if item.finished:
            return
        call, now = item.call, self._clock.now()
        status = Status(result.status) if result.status in _STATUSES else Status.FAILURE
        if status in RETRIED and self._retry_later(item):
            return
        output = api_pb2.FunctionGetOutputsItem(
            idx=item.idx,
            input_id=item.input_id,
            task_id=task_id or item.task_id,
            retry_count=item.retry_count,
            output_created_at=(message.output_created_at if message else 0) or now,
            input_started_at=(message.input_started_at if message else 0) or item.started_at,
            data_format=message.data_format if message else 0,
        )
        output.result.CopyFrom(result)
        raw = output.SerializeToString()
        self._forget_input(item, output.output_created_at - output.input_started_at if message else None)
        call.mark(item.idx, FINISHED)
        call.last_seq += 1
        seq = call.last_seq
        self._journal.writes.finish_input(
            {
                "call_id": call.call_id,
                "idx": item.idx,
                "seq": seq,
                "item": raw,
                "status": int(status),
                "retry_count": item.retry_count,
                "task_id": output.task_id,
                "created_at": item.created_at,
                "started_at": output.input_started_at,
                "finished_at": output.output_created_at,
            }
        )
        self._journal.after_commit(lambda: call.publish(Output(seq, item.idx, item.retry_count, status, raw)))
        if not call.num_unfinished:
            self._finished(call)

    def unfinished_input(self, input_id: str) -> Input | None:
        """Raises NotFound for what cannot be an input's id."""
        key = key_of(input_id)
        call = self._calls.get(key.call_id)
        return call.inputs.get(key.idx) if call is not None else None

    async def get_outputs(
        self,
        call_id: str,
        caller: Caller,
        *,
        timeout_s: float,
        after_seq: int = 0,
        between: tuple[int, int] | None = None,
        max_outputs: int = 0,
        clear: bool = False,
    ) -> OutputsPage:
        """Wait for outputs: those after `after_seq` in the order of finishing, or those of inputs `between`."""
        call = await self.open(call_id, caller)
        limit = min(max_outputs or MAX_OUTPUTS, MAX_OUTPUTS)
        if clear and call.call_type is CallType.MAP and between is None:
            self._drop(call)
            return OutputsPage([], call.last_seq, 0)
        if between is None and after_seq and not call.invocation.is_async:
            call.forget_outputs_up_to(after_seq)
        deadline = self._clock.monotonic() + min(max(0.0, timeout_s), 60.0)
        while True:
            call.used_at = self._clock.monotonic()
            seen = call.num_changes
            outputs = await self._committed(call, after_seq, between, limit)
            left = deadline - self._clock.monotonic()
            if outputs or left <= 0 or not self._may_come(call, between):
                break
            await call.changed(seen, left)
        if outputs and between is None and call.call_type is CallType.MAP:
            outputs = await self._coalesced(call, outputs, after_seq, limit, min(left, COALESCE_MAX_S))
        return OutputsPage(outputs, outputs[-1].seq if outputs else after_seq, call.num_unfinished)

    async def _coalesced(self, call: Call, outputs: list[Output], after_seq: int, limit: int, wait_s: float):
        """More outputs of a map in one answer, while they keep coming: a poll repeats all outstanding tickets."""
        until = self._clock.monotonic() + wait_s
        while len(outputs) < limit and call.num_unfinished and self._clock.monotonic() < until:
            before = len(outputs)
            await asyncio.sleep(COALESCE_STEP_S)
            outputs = await self._committed(call, after_seq, None, limit)
            if len(outputs) == before:
                break
        return outputs

    async def _committed(self, call: Call, after_seq: int, between: tuple[int, int] | None, limit: int) -> list[Output]:
        """From memory where it reaches back far enough, else from the database."""
        first_kept = call.recent[0].seq if call.recent else call.last_seq + 1
        if between is None:
            if after_seq >= first_kept - 1 or not call.last_seq:
                return _limited((output for output in call.recent if output.seq > after_seq), limit)
            rows = await self._database.read(lambda c: storage.outputs_after(c, call.call_id, after_seq, limit))
            return _limited(map(_output_of, rows), limit)
        first, last = between
        found = _limited((output for output in call.recent if first <= output.idx <= last), limit)
        if len(found) > last - first or (first_kept == 1 and call.last_seq == len(call.recent)):
            return sorted(found, key=lambda output: output.idx)
        if all(call.mark_of(idx) != FINISHED for idx in range(first, min(last, len(call.marks) - 1) + 1)):
            return []
        rows = await self._database.read(lambda c: storage.outputs_between(c, call.call_id, first, last, limit))
        return [output for output in _limited(map(_output_of, rows), limit) if call.mark_of(output.idx) == FINISHED]

    def _may_come(self, call: Call, between: tuple[int, int] | None) -> bool:
        """Whether waiting can bring an output that was not there."""
        if call.is_dropped:
            return False
        if between is None:
            return call.num_unfinished > 0 or (call.call_type is CallType.MAP and not call.is_cancelled)
        return call.num_unfinished > 0 or any(
            call.mark_of(idx) == FINISHED for idx in range(between[0], between[1] + 1)
        )

    # ---- ends -------------------------------------------------------------------------------------------

    async def cancel(self, call_id: str, caller: Caller, *, terminate: bool) -> None:
        """End a call: its unfinished inputs are TERMINATED, and what they called and wait for with them."""
        call = await self.open(call_id, caller)
        self._cancel(call, f"call {call_id} was cancelled", terminate=terminate)
        await self._journal.committed(lambda: None)

    def cancel_app(self, app_id: str, reason: str) -> None:
        """End all calls of an app that comes to its end."""
        for call in [call for call in self._calls.values() if call.app_id == app_id and call.inputs]:
            self._cancel(call, reason, terminate=False)

    def cancel_function(self, function_id: str, reason: str) -> None:
        for call in [call for call in self._calls.values() if call.function_id == function_id and call.inputs]:
            self._cancel(call, reason, terminate=False)

    def _cancel(self, call: Call, reason: str, *, terminate: bool) -> None:
        if not call.is_cancelled:
            call.is_cancelled = True
            self._journal.writes.cancelled.append(call.call_id)
        unfinished = list(call.inputs.values())
        self._queue.cancel_running([item for item in unfinished if item.task_id], terminate=terminate)
        result = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_TERMINATED, exception=reason)
        for item in unfinished:
            self.finish(item, result)
        for child_id in list(self._children.get(call.call_id, ())):
            child = self._calls.get(child_id)
            if child is not None and not child.invocation.is_async and child.inputs:
                self._cancel(child, reason, terminate=terminate)
        call.wake()

    def _drop(self, call: Call) -> None:
        """The client is done with it: nobody will ask for its outputs again."""
        if call.is_dropped or call.invocation.is_async:
            return
        if call.inputs:
            self._cancel(call, "the caller stopped waiting", terminate=False)
        call.is_dropped = True
        call.forget_outputs_up_to(call.last_seq)

    def container_lost(self, items: Iterable[Input], exit: ExitStatus | None, explanation: str) -> None:
        """A container ended with these inputs in hand. They go back to the head of the queue, within limits.

        `exit` None, or ended by a signal from outside: not the input's fault.
        """
        again = []
        for item in items:
            if item.finished:
                continue
            item.task_id, item.started_at = "", 0.0
            by_itself = exit is not None and not exit.reason and (exit.exit_code > 0 or exit.oom_killed)
            if by_itself:
                item.crashes += 1
            else:
                item.losses += 1
            if item.crashes >= MAX_CRASHES or item.losses >= MAX_LOSSES:
                self.finish(item, _failure(explanation))
            else:
                again.append(item)
        if again:
            self._queue.enqueue(again, front=True)

    def fail(self, items: Iterable[Input], result: api_pb2.GenericResult, task_id: str = "") -> None:
        """These inputs cannot be run."""
        for item in list(items):
            self.finish(item, result, task_id=task_id)

    def _retry_later(self, item: Input) -> bool:
        """The server retries calls that nobody waits for, by the Function's retry policy."""
        call = item.call
        if not call.invocation.is_async or call.is_cancelled:
            return False
        try:
            settings = self._functions.pool_settings(call.function_id)
        except NotFound:
            return False
        policy = settings.retry_policy
        if policy is None or settings.is_generator or item.retry_count >= policy.max_retries:
            return False
        held = bool(item.task_id)
        if held:
            self._queue.release(item, None)
        else:
            self._queue.remove(item)
        item.task_id, item.started_at, item.losses, item.crashes = "", 0.0, 0, 0
        item.retry_count += 1
        item.due_at = self._clock.now() + policy.delay_s(item.retry_count)
        self._journal.writes.update_input(item.key, item.retry_count, item.due_at)
        self.enqueue_when_due([item])
        return True

    def enqueue_when_due(self, items: Iterable[Input]) -> None:
        """Queue these inputs, each not before its time."""
        now, due = self._clock.now(), []
        for item in items:
            if item.due_at <= now:
                due.append(item)
            else:
                asyncio.get_running_loop().call_later(item.due_at - now, self._enqueue_if_open, item)
        if due:
            self._queue.enqueue(due)

    def _enqueue_if_open(self, item: Input) -> None:
        if not item.finished:
            self._queue.enqueue([item])

    # ---- asking -----------------------------------------------------------------------------------------

    async def open(self, call_id: str, caller: Caller) -> Call:
        """A call of the caller's workspace. Raises NotFound when there is none, or none any more."""
        call = self._calls.get(call_id)
        if call is None:
            call = await self._load_call(call_id)
        if call is None or call.workspace != caller.workspace:
            raise NotFound(f"there is no function call {call_id!r}: it was never made, or its outputs have expired")
        call.used_at = self._clock.monotonic()
        return call

    def living(self, call_id: str) -> Call | None:
        """The call if it is in memory: unfinished, or used lately."""
        return self._calls.get(call_id)

    def is_idle(self, app_id: str) -> bool:
        return not self._unfinished_of_app.get(app_id)

    async def flush(self) -> None:
        await self._journal.flush()

    # ---- inside -----------------------------------------------------------------------------------------

    def _id_for(self, caller: Caller) -> str:
        """The same for each repetition of a request."""
        once = caller.once("FunctionMap")
        return content_id("function_call", once.encode()) if once else new_id("function_call")

    async def _repeated(self, call_id: str) -> Call | None:
        if (call := self._calls.get(call_id)) is not None:
            await self._journal.flush()
            return call
        if self._clock.monotonic() - self._opened_at > REPEAT_WINDOW_S:
            return None
        return await self._load_call(call_id)

    def _check_inputs(self, function_id: str, inputs: Sequence[tuple[int, bytes]]) -> None:
        for idx, payload in inputs:
            if not 0 <= idx < MAX_IDX:
                raise InvalidArgument(f"an input cannot have the index {idx}: a call has up to {MAX_IDX:,} inputs")
            if len(payload) > MAX_PAYLOAD_BYTES:
                raise PayloadTooLarge(
                    f"input {idx} has {len(payload):,} bytes: send more than {MAX_PAYLOAD_BYTES:,} as a blob"
                )
        waiting = self._queue.num_unfinished(function_id)
        if waiting + len(inputs) > MAX_QUEUED:
            raise ResourceExhausted(
                f"Function {function_id} has {waiting:,} unfinished inputs, and {MAX_QUEUED:,} are the limit: try later"
            )

    def _parent(self, input_id: str) -> InputKey | None:
        if not input_id:
            return None
        with contextlib.suppress(NotFound):
            return key_of(input_id)
        return None

    async def _retry_counts(self, call: Call, idxs: Sequence[int]) -> dict[int, int]:
        counts = {output.idx: output.retry_count for output in call.recent}
        counts |= {idx: item.retry_count for idx, item in call.inputs.items()}
        if any(idx not in counts and call.mark_of(idx) == FINISHED for idx in idxs):
            await self._journal.flush()
            rows = await self._database.read(lambda c: storage.output_marks(c, call.call_id))
            counts = {row.idx: row.retry_count for row in rows} | counts
        return counts

    def _forget_input(self, item: Input, duration_s: float | None = None) -> None:
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
        left = self._unfinished_of_app.get(call.app_id, 0) - 1
        if left > 0:
            self._unfinished_of_app[call.app_id] = left
        else:
            self._unfinished_of_app.pop(call.app_id, None)
            if self.when_idle is not None:
                self._behind(self.when_idle(call.app_id))

    def _behind(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # type: ignore[arg-type]
        task.add_done_callback(self._tasks.discard)  # type: ignore[arg-type]

    def _track(self, call: Call) -> None:
        """The call has unfinished inputs."""
        self._idle.pop(call.call_id, None)
        if call.expires_at is not None:
            call.expires_at = None
            self._journal.writes.expiries[call.call_id] = None
        if call.parent is not None:
            self._children.setdefault(call.parent.call_id, set()).add(call.call_id)

    def _finished(self, call: Call) -> None:
        self._idle[call.call_id] = self._clock.monotonic()
        if call.parent is not None and (siblings := self._children.get(call.parent.call_id)) is not None:
            siblings.discard(call.call_id)
            if not siblings:
                del self._children[call.parent.call_id]
        for callback in self.when_finished:
            callback(call)

    async def _load_call(self, call_id: str) -> Call | None:
        task = self._loading.get(call_id)
        if task is None:
            task = self._loading[call_id] = asyncio.create_task(self._read_call(call_id))
            task.add_done_callback(lambda _: self._loading.pop(call_id, None))
        return await asyncio.shield(task)

    async def _read_call(self, call_id: str) -> Call | None:
        def read(connection):
            return storage.get_call(connection, call_id), storage.output_marks(connection, call_id)

        await self._journal.flush()
        row, marks = await self._database.read(read)
        if (there := self._calls.get(call_id)) is not None or row is None:
            return there
        call = _call_of(row)
        for mark in marks:
            call.mark(mark.idx, FINISHED)
            call.last_seq = max(call.last_seq, mark.seq)
        self._calls[call_id] = call
        self._idle[call_id] = self._clock.monotonic()
        return call

    async def _sweep_loop(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                self._leave_memory()
                await self._delete_expired()
            except Exception:
                log.exception("finished calls could not be swept")

    def _leave_memory(self) -> None:
        """Finished calls that nobody has asked for lately are left to the database."""
        now, horizon = self._clock.now(), self._clock.monotonic() - KEEP_IN_MEMORY_S
        busy = []
        while self._idle:
            call_id, since = next(iter(self._idle.items()))
            if since > horizon:
                break
            del self._idle[call_id]
            call = self._calls.get(call_id)
            if call is None or call.inputs:
                continue
            if call.waiters or (call.used_at > horizon and not call.is_dropped):
                busy.append(call_id)
                continue
            if call.expires_at is None:
                self._journal.writes.expiries[call_id] = now + _lifetime_s(call)
            del self._calls[call_id]
        for call_id in busy:
            self._idle[call_id] = self._clock.monotonic()

    async def _delete_expired(self) -> None:
        now = self._clock.now()
        while True:
            expired = await self._database.read(lambda c: storage.expired_calls(c, now, 500))
            expired = [call_id for call_id in expired if call_id not in self._calls]
            if not expired:
                return
            await self._database.write(lambda c, ids=expired: storage.delete_calls(c, ids))
            await asyncio.sleep(0.05)


_STATUSES = frozenset(int(status) for status in Status if status)


def _lifetime_s(call: Call) -> float:
    if call.is_dropped:
        return 0.0
    if call.invocation.is_async:
        return EXPIRY_ASYNC_S
    return EXPIRY_NESTED_S if call.parent is not None else EXPIRY_SYNC_S


def _failure(text: str) -> api_pb2.GenericResult:
    return api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_FAILURE, exception=text)


def _limited(outputs: Iterable[Output], limit: int) -> list[Output]:
    found, num_bytes = [], 0
    for output in outputs:
        num_bytes += len(output.item)
        if found and (len(found) >= limit or num_bytes > MAX_REPLY_BYTES):
            break
        found.append(output)
    return found


def _output_of(row) -> Output:
    return Output(row.seq, row.idx, row.retry_count, Status(row.status), row.item)


def _row_of(call: Call) -> dict:
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


def _input_row(item: Input, payload: bytes) -> dict:
    return {
        "call_id": item.call.call_id,
        "idx": item.idx,
        "payload": payload,
        "retry_count": item.retry_count,
        "created_at": item.created_at,
        "due_at": item.due_at,
    }


def _call_of(row) -> Call:
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
