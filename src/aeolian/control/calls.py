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
import signal
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from modal_proto import api_pb2

from aeolian.control.apps import Apps
from aeolian.control.call_journal import CallJournal
from aeolian.control.call_memory import CallMemory
from aeolian.control.call_outputs import CallOutputs, OutputsPage
from aeolian.control.call_state import FINISHED, UNKNOWN, Call, Input, Output, input_row, row_of
from aeolian.control.functions import Functions
from aeolian.control.input_retries import InputRetries
from aeolian.control.open_inputs import OpenInputs
from aeolian.control.web_exchange import Exchange
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
from aeolian.domain.telemetry import FinishedInput
from aeolian.storage import calls as storage
from aeolian.storage.database import Database, kept_reply

log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 8 << 20
"""Of one input or output, inline: the SDK sends more than 2 MiB as a blob."""
MAX_IDX = 1 << 24
MAX_QUEUED = 1_000_000
"""Unfinished inputs of one Function."""
REPEAT_WINDOW_S = 180.0
"""How long after a start a request may repeat one that the predecessor carried out."""
SLICE = 500
"""How many inputs are ended at a stretch."""
CLOSE_S = 5.0


class Queue(Protocol):
    """Where inputs wait for containers (`pools.Pools`)."""

    def enqueue(self, inputs: Sequence[Input], *, front: bool = False) -> None: ...

    def remove(self, item: Input) -> None: ...

    def release(self, item: Input, duration_s: float | None) -> None: ...

    def cancel_running(self, items: Sequence[Input], *, terminate: bool) -> None: ...

    def waiting(self, function_id: str, task_id: str) -> contextlib.AbstractContextManager[None]:
        """Meanwhile this container waits for the output of another input."""
        ...

    def num_unfinished(self, function_id: str) -> int: ...


class Calls:
    def __init__(self, database: Database, clock: Clock, apps: Apps, functions: Functions, queue: Queue):
        self._database = database
        self._clock = clock
        self._apps = apps
        self._functions = functions
        self._queue = queue
        self._journal = CallJournal(database)
        self._memory = CallMemory(database, clock, self._journal)
        self._outputs = CallOutputs(database, clock)
        self.open_inputs = OpenInputs(database, clock, self._journal, self._memory, queue)
        self._retries = InputRetries(clock, functions, self._journal, queue)
        self.when_output: list[Callable[[FinishedInput], None]] = []
        """Called with each input whose output is durable."""
        self._finishing: set[asyncio.Task] = set()
        """What ends the queued inputs of large calls that were cancelled."""
        self._opened_at = 0.0

    # ---- life of the service ----------------------------------------------------------------------------

    async def load(self) -> list[Input]:
        """Take up what is unfinished. Returns the inputs; whoever knows the containers queues them."""
        self._opened_at = self._clock.monotonic()
        found = []
        for row in await self._memory.load():
            call = self._memory.get(row.call_id)
            assert call is not None
            found.append(self.open_inputs.open(call, row.idx, None, row))
        for call in self._memory:
            self.open_inputs.begun(call)
            if call.is_cancelled:
                self._cancel(call, f"call {call.call_id} was cancelled", terminate=False)
        return found

    async def start_sweeping(self, delete_blob: Callable[[str], Awaitable[None]] | None = None) -> None:
        """Finished calls leave memory, then the database; `delete_blob(id)` is called with each blob that goes too."""
        self._memory.delete_blob = delete_blob
        self._memory.start_sweeping()

    async def close(self) -> None:
        """Commit what is on its way. Those who wait for outputs are woken."""
        self._retries.close()
        for task in list(self._finishing):
            task.cancel()
        await asyncio.gather(*self._finishing, return_exceptions=True)
        await self._memory.close()
        await self.open_inputs.close()
        await self._journal.close(CLOSE_S)
        for call in self._memory:
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
        blob_ids: Sequence[str] = (),
        stored_with: Callable[..., None] | None = None,
    ) -> Call:
        """A new call with its first inputs: (index, serialized FunctionInput). Durable when this returns.

        `blob_ids`: what the inputs refer to, and nobody else does. `stored_with(connection)`: what is changed in the
        same transaction; the inputs then begin only when it is committed.

        Raises NotFound and FailedPrecondition for Functions that take no calls, ResourceExhausted for a full queue.
        """
        row = self._functions.check_callable(function_id, caller)
        call_id = self._id_for(caller)
        if (repeated := await self._repeated(call_id, caller)) is not None:
            return repeated
        self._check_inputs(function_id, inputs)
        call = Call(
            call_id,
            function_id=function_id,
            app_id=row.app_id,
            workspace=caller.workspace,
            call_type=call_type,
            invocation=invocation,
            parent=self._parent(parent_input_id, caller),
            created_at=self._clock.now(),
        )
        self._memory.keep(call)
        self._journal.writes.calls.append(row_of(call))
        self._owns_blobs(call, blob_ids)
        if stored_with is not None:
            self._journal.writes.together_with.append(stored_with)
        await self._take(call, inputs, stored_first=stored_with is not None)
        return call

    def start_unstored(self, function_id: str, caller: Caller, payload: bytes, exchange: Exchange) -> str:
        """A call with one input whose caller holds a connection: it ends with the server, so nothing of it is stored.

        Returns the call's id. `exchange` hears of its end. Raises as `start`.
        """
        row = self._functions.check_callable(function_id, caller)
        self._check_inputs(function_id, [(0, payload)])
        call = Call(
            new_id("function_call"),
            function_id=function_id,
            app_id=row.app_id,
            workspace=caller.workspace,
            call_type=CallType.UNARY,
            invocation=Invocation.SYNC_LEGACY,
            parent=None,
            created_at=self._clock.now(),
        )
        call.exchange = exchange
        self._memory.keep(call)
        item = self.open_inputs.open(call, 0, payload)
        self.open_inputs.begun(call)
        self._queue.enqueue([item])
        return call.call_id

    def abandon_queued(self, call_id: str) -> None:
        """Nobody waits for an unstored call any more: it is not begun, if no container has it yet."""
        call = self._memory.get(call_id)
        if call is not None and call.exchange is not None and not any(item.task_id for item in call.inputs.values()):
            self._cancel(call, f"nobody waits for call {call_id} any more", terminate=False)

    async def put_inputs(
        self,
        function_id: str,
        call_id: str,
        caller: Caller,
        inputs: Sequence[tuple[int, bytes]],
        blob_ids: Sequence[str] = (),
    ) -> None:
        """More inputs of a map. Those that came before are passed over. Durable when this returns."""
        call = await self.open(call_id, caller)
        if function_id and function_id != call.function_id:
            raise InvalidArgument(f"call {call_id} is not one of Function {function_id}")
        if call.is_cancelled or call.is_dropped:
            raise FailedPrecondition(f"call {call_id} was cancelled: it takes no more inputs")
        self._functions.check_callable(call.function_id, caller)
        self._check_inputs(call.function_id, inputs)
        self._owns_blobs(call, blob_ids)
        await self._take(call, inputs)

    async def retry_inputs(
        self, call_id: str, caller: Caller, items: Sequence[tuple[int, bytes, int]]
    ) -> list[tuple[int, int]]:
        """Try finished inputs again: (index, serialized FunctionInput, retry count or 0 for the next one).

        Their outputs are hidden from now on. An input that runs already, or was retried as often, is passed over.
        Returns (index, retry count).
        """
        call = await self.open(call_id, caller)
        once = caller.once("FunctionRetryInputs")
        if once and self._may_repeat(caller) and (kept := await self._database.read(lambda c: kept_reply(c, once))):
            return [(idx, retry_count) for idx, retry_count in kept]
        if call.is_cancelled or call.is_dropped:
            raise FailedPrecondition(f"call {call_id} was cancelled: it takes no more inputs")
        self._functions.check_callable(call.function_id, caller)
        self._check_inputs(call.function_id, [item[:2] for item in items])
        counts = await self._retry_counts(call, [item[0] for item in items])
        opened: list[Input] = []
        answers: list[tuple[int, int]] = []
        for idx, payload, wanted in items:
            before = counts.get(idx, 0)
            answers.append((idx, before))
            if call.mark_of(idx) != FINISHED or (wanted and wanted <= before):
                continue
            retry_count = wanted or before + 1
            item = self.open_inputs.open(call, idx, payload)
            item.retry_count = retry_count
            call.hide_output(idx)
            self._journal.writes.reopen_input(input_row(item, payload))
            opened.append(item)
            answers[-1] = (idx, retry_count)
        if opened:
            self.open_inputs.begun(call)
            self._queue.enqueue(opened)
            if once:
                self._journal.writes.replies[once] = answers
            await self._journal.committed(None)  # the old outputs are gone for everybody now
        return answers

    async def _take(self, call: Call, inputs: Sequence[tuple[int, bytes]], *, stored_first: bool = False) -> None:
        writes = self._journal.writes
        opened = []
        for idx, payload in inputs:
            if call.mark_of(idx) != UNKNOWN:
                continue
            item = self.open_inputs.open(call, idx, payload)
            writes.put_input(input_row(item, payload), is_new=True)
            opened.append(item)
        if opened:
            self.open_inputs.begun(call)
        if opened and not stored_first:
            self._queue.enqueue(opened, front=self.open_inputs.is_recursive(call))

        def undo() -> None:
            for item in opened:
                if item.finished:
                    self._journal.writes.outputs.pop(item.key, None)
                    continue
                if item.task_id:
                    self._queue.cancel_running([item], terminate=False)
                self.open_inputs.forget(item)
                call.unmark(item.idx)
            if not call.num_inputs:
                self._memory.forget(call)
            if not call.inputs:
                self.open_inputs.done(call)

        await self._journal.committed(undo)
        if stored_first:
            self._queue.enqueue([item for item in opened if not item.finished])

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
        if message.result.status == api_pb2.GenericResult.GENERIC_STATUS_TERMINATED and not message.result.exception:
            message.result.exception = f"input {message.input_id} was cancelled from inside its container"
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
        if status in RETRIED and self._retries.later(item):
            return
        output = api_pb2.FunctionGetOutputsItem(
            idx=item.idx,
            input_id=item.input_id,
            task_id=task_id or item.task_id,
            retry_count=item.retry_count,
            output_created_at=(message.output_created_at if message else 0) or now,
            input_started_at=(message.input_started_at if message else 0) or item.started_at,
            data_format=message.data_format if message else 0,  # type: ignore[arg-type]
        )
        output.result.CopyFrom(result)
        if call.exchange is not None:
            self._finish_unstored(item, status, output, has_run=message is not None)
            return
        raw = output.SerializeToString()
        if status in _ABANDONING:
            self._cancel_children(call, result.exception, idx=item.idx)
        self._retries.forget(item)
        self.open_inputs.forget(item, output.output_created_at - output.input_started_at if message else None)
        call.mark(item.idx, FINISHED)
        call.last_seq += 1
        seq = call.last_seq
        if result.data_blob_id:
            self._owns_blobs(call, [result.data_blob_id])
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
        if self.when_output:
            self._journal.after_commit(lambda: self._tell(item, status, output))
        if not call.num_unfinished:
            self.open_inputs.done(call)

    def _tell(self, item: Input, status: Status, output: api_pb2.FunctionGetOutputsItem) -> None:
        done = FinishedInput(
            app_id=item.call.app_id,
            function_id=item.call.function_id,
            call_id=item.call.call_id,
            idx=item.idx,
            task_id=output.task_id,
            status=status.name.lower(),
            retry_count=item.retry_count,
            parent_input_id=item.call.parent.input_id if item.call.parent is not None else "",
            root_call_id=self._memory.root_of(item.call),
            created_at=item.created_at,
            started_at=output.input_started_at,
            finished_at=output.output_created_at,
            stored_at=self._clock.now(),
        )
        for callback in self.when_output:
            callback(done)

    def _finish_unstored(
        self, item: Input, status: Status, output: api_pb2.FunctionGetOutputsItem, *, has_run: bool
    ) -> None:
        call = item.call
        assert call.exchange is not None
        if status in _ABANDONING:
            self._cancel_children(call, output.result.exception, idx=item.idx)
        self.open_inputs.forget(item, output.output_created_at - output.input_started_at if has_run else None)
        call.mark(item.idx, FINISHED)
        self.open_inputs.done(call)
        if self.when_output:
            self._tell(item, status, output)
        self._memory.forget(call)
        call.exchange.end(status)

    def unfinished_input(self, input_id: str) -> Input | None:
        """Raises NotFound for what cannot be an input's id."""
        key = key_of(input_id)
        call = self._memory.get(key.call_id)
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
        if clear and call.call_type is CallType.MAP and between is None:
            self._drop(call, caller)
            return OutputsPage([], call.last_seq, 0)

        def waiting() -> contextlib.AbstractContextManager[None]:
            if caller.is_container:
                return self._queue.waiting(caller.function_id, caller.task_id)
            return contextlib.nullcontext()

        if between is not None:
            return await self._outputs.between(call, *between, timeout_s, max_outputs, waiting)
        return await self._outputs.after(call, after_seq, timeout_s, max_outputs, waiting)

    # ---- ends -------------------------------------------------------------------------------------------

    async def cancel(self, call_id: str, caller: Caller, *, terminate: bool, reason: str = "") -> None:
        """End a call: its unfinished inputs are TERMINATED, and what they called and wait for with them."""
        call = await self.open(call_id, caller)
        why = f": {reason}" if reason else ""
        self._cancel(call, f"call {call_id} was cancelled{why}", terminate=terminate)
        await self._journal.committed(None)

    async def cancel_app(self, app_id: str, reason: str) -> None:
        """End all calls of an app that comes to its end."""
        for number, call in enumerate(self._memory):
            if call.app_id == app_id and call.inputs:
                self._cancel(call, reason, terminate=False)
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)

    def _cancel(self, call: Call, reason: str, *, terminate: bool) -> None:
        if not call.is_cancelled:
            call.is_cancelled = True
            if call.exchange is None:
                self._journal.writes.cancelled.append(call.call_id)
        running = [item for item in call.inputs.values() if item.task_id]
        self._queue.cancel_running(running, terminate=terminate)
        self._cancel_children(call, reason, terminate=terminate)
        result = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_TERMINATED, exception=reason)
        for item in running:
            self.finish(item, result)
        queued = list(call.inputs.values())
        for item in queued[:SLICE]:
            self.finish(item, result)
        if len(queued) > SLICE:
            task = asyncio.create_task(self._finish_all(queued[SLICE:], result))
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)
        call.wake()

    async def _finish_all(self, items: Sequence[Input], result: api_pb2.GenericResult) -> None:
        """Some at a time: a call may have a million inputs, and the others go on."""
        for number, item in enumerate(items):
            self.finish(item, result)
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)

    def _cancel_children(self, call: Call, reason: str, *, idx: int | None = None, terminate: bool = False) -> None:
        """What this call, or one input of it, has called and will not wait for any more."""
        for child in self.open_inputs.awaited_by(call, idx):
            self._cancel(child, reason, terminate=terminate)

    def _drop(self, call: Call, caller: Caller) -> None:
        """The client is done with it: nobody will ask for its outputs again."""
        if call.is_dropped or call.invocation.is_async:
            return
        app = self._apps.known(call.app_id)
        if call.inputs and app is not None and app.outlives_its_client and not caller.is_container:
            return  # a client that is interrupted drops its maps, but `--detach` promised that they go on
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
            self._cancel_children(item.call, "its caller's container was lost", idx=item.idx)
            if exit is not None and _ended_by_itself(exit):
                item.crashes += 1
            else:
                item.losses += 1
            if item.crashes >= MAX_CRASHES or item.losses >= MAX_LOSSES:
                self.finish(item, _failure(explanation))
            elif item.call.exchange is not None and not item.call.exchange.begin_again():
                self.finish(item, _lost(explanation))
            else:
                again.append(item)
        if again:
            self._queue.enqueue(again, front=True)

    def queue_again(self, items: Iterable[Input]) -> None:
        """These inputs were given to a container that never got them."""
        again = [item for item in items if not item.finished]
        for item in again:
            item.task_id, item.started_at = "", 0.0
        if again:
            self._queue.enqueue(again, front=True)

    def fail(self, items: Iterable[Input], result: api_pb2.GenericResult, task_id: str = "") -> None:
        """These inputs cannot be run."""
        for item in list(items):
            self.finish(item, result, task_id=task_id)

    # ---- asking -----------------------------------------------------------------------------------------

    def enqueue_when_due(self, items: Iterable[Input]) -> None:
        """Queue these inputs, each not before its time."""
        self._retries.enqueue_when_due(items)

    def is_idle(self, app_id: str) -> bool:
        """Whether the app has no unfinished input."""
        return self.open_inputs.is_idle(app_id)

    async def open(self, call_id: str, caller: Caller) -> Call:
        """A call of the caller's workspace. Raises NotFound when there is none, or none any more."""
        call = await self._memory.find(call_id)
        if call is None or call.workspace != caller.workspace:
            raise NotFound(f"there is no function call {call_id!r}: it was never made, or its outputs have expired")
        call.used_at = self._clock.monotonic()
        return call

    def living(self, call_id: str) -> Call | None:
        """The call if it is in memory: unfinished, or used lately."""
        return self._memory.get(call_id)

    async def flush(self) -> None:
        await self._journal.flush()

    # ---- inside -----------------------------------------------------------------------------------------

    def _id_for(self, caller: Caller) -> str:
        """The same for each repetition of a request."""
        once = caller.once("FunctionMap")
        return content_id("function_call", once.encode()) if once else new_id("function_call")

    def _may_repeat(self, caller: Caller) -> bool:
        """Whether an earlier life of the server may have carried out this request."""
        return caller.may_repeat and self._clock.monotonic() - self._opened_at <= REPEAT_WINDOW_S

    async def _repeated(self, call_id: str, caller: Caller) -> Call | None:
        if (call := self._memory.get(call_id)) is not None:
            await self._journal.committed(lambda: None)
            return call
        if not self._may_repeat(caller):
            return None
        call = await self._memory.find(call_id)
        if call is not None and not call.inputs:
            rows = await self._database.read(lambda c: storage.input_marks(c, call_id))
            if any(call.mark_of(row.idx) == UNKNOWN for row in rows):  # stored by a commit whose answer was lost
                self._memory.forget(call)
                return None
        return call

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

    def _owns_blobs(self, call: Call, blob_ids: Iterable[str]) -> None:
        self._journal.writes.blobs += [{"call_id": call.call_id, "blob_id": blob_id} for blob_id in blob_ids]

    def _parent(self, input_id: str, caller: Caller) -> InputKey | None:
        """The input that makes this call: only containers run some."""
        if not input_id or not caller.is_container:
            return None
        with contextlib.suppress(NotFound):
            return key_of(input_id)
        return None

    async def _retry_counts(self, call: Call, idxs: Sequence[int]) -> dict[int, int]:
        if call.published_seq < call.last_seq:
            await self._journal.flush()
        counts = {output.idx: output.retry_count for output in call.recent}
        counts |= {idx: item.retry_count for idx, item in call.inputs.items()}
        if any(idx not in counts and call.mark_of(idx) == FINISHED for idx in idxs):
            await self._journal.flush()
            rows = await self._database.read(lambda c: storage.output_marks(c, call.call_id))
            counts = {row.idx: row.retry_count for row in rows} | counts
        return counts


_STATUSES = frozenset(int(status) for status in Status if status)


_ABANDONING = frozenset({Status.TERMINATED, Status.TIMEOUT})
"""Ends after which nothing that the input has called is waited for."""
_FAULTS = frozenset(
    {signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS}
)


def _ended_by_itself(exit: ExitStatus) -> bool:
    """Whether what it ran is the reason, and not somebody outside."""
    is_over_limit = exit.oom_killed or bool(exit.disk_full)
    return not exit.reason and (is_over_limit or exit.exit_code >= 0 or -exit.exit_code in _FAULTS)


def _lost(text: str) -> api_pb2.GenericResult:
    return api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE, exception=text)


def _failure(text: str) -> api_pb2.GenericResult:
    return api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_FAILURE, exception=text)
