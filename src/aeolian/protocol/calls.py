"""RPCs of function calls, from the side of those who make them; and the streams of both sides."""

from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Protocol

from google.protobuf.empty_pb2 import Empty
from google.protobuf.internal.encoder import _VarintBytes
from google.protobuf.timestamp_pb2 import Timestamp
from modal_proto import api_pb2

from aeolian.control.call_history import CallHistory, InputRecord
from aeolian.control.call_outputs import OutputsPage
from aeolian.control.calls import Calls
from aeolian.control.data_channels import DataChannels, Direction
from aeolian.control.functions import Functions
from aeolian.domain.caller import Caller
from aeolian.domain.calls import CallType, Invocation, Status, Tickets
from aeolian.domain.errors import InvalidArgument, NotFound

MAX_INPUTS_AT_ONCE = 1000
MAX_SPAN_S = 31 * 24 * 3600.0


class Blobs(Protocol):
    async def open_path(self, blob_id: str) -> Path: ...


class CallRpcs:
    def __init__(
        self,
        calls: Calls,
        channels: DataChannels,
        history: CallHistory,
        functions: Functions,
        blobs: Blobs,
        tickets: Tickets,
    ):
        self._calls = calls
        self._channels = channels
        self._history = history
        self._functions = functions
        self._blobs = blobs
        self._tickets = tickets

    async def FunctionMap(self, request: api_pb2.FunctionMapRequest, caller: Caller) -> api_pb2.FunctionMapResponse:
        inputs = await self._inputs(request.pipelined_inputs)
        call = await self._calls.start(
            request.function_id,
            caller,
            call_type=_call_type(request.function_call_type),
            invocation=_invocation(request.function_call_invocation_type),
            parent_input_id=request.parent_input_id,
            inputs=inputs,
            blob_ids=_blob_ids(request.pipelined_inputs),
        )
        response = api_pb2.FunctionMapResponse(
            function_call_id=call.call_id,
            function_call_jwt=self._tickets.of_call(call.call_id),
            sync_client_retries_enabled=True,
            pipelined_inputs=self._accepted(call.call_id, (idx for idx, _ in inputs)),
        )
        policy = self._functions.current(request.function_id).function
        if policy.HasField("retry_policy"):
            response.retry_policy.CopyFrom(policy.retry_policy)
        return response

    async def FunctionPutInputs(
        self, request: api_pb2.FunctionPutInputsRequest, caller: Caller
    ) -> api_pb2.FunctionPutInputsResponse:
        inputs = await self._inputs(request.inputs)
        await self._calls.put_inputs(
            request.function_id, request.function_call_id, caller, inputs, _blob_ids(request.inputs)
        )
        return api_pb2.FunctionPutInputsResponse(
            inputs=self._accepted(request.function_call_id, (idx for idx, _ in inputs))
        )

    async def FunctionRetryInputs(
        self, request: api_pb2.FunctionRetryInputsRequest, caller: Caller
    ) -> api_pb2.FunctionRetryInputsResponse:
        call_id = self._tickets.read_call(request.function_call_jwt)
        items = []
        for item in request.inputs:
            idx = self._tickets.read_input(call_id, item.input_jwt)
            await self._check_blob(item.input)
            items.append((idx, item.input.SerializeToString(), item.retry_count))
        await self._calls.retry_inputs(call_id, caller, items)
        return api_pb2.FunctionRetryInputsResponse(
            input_jwts=[self._tickets.of_input(call_id, idx) for idx, _, _ in items]
        )

    async def FunctionFinishInputs(self, request: api_pb2.FunctionFinishInputsRequest, caller: Caller) -> Empty:
        call = await self._calls.open(request.function_call_id, caller)
        if request.num_inputs and call.num_inputs != request.num_inputs:
            raise InvalidArgument(
                f"call {call.call_id} has {call.num_inputs} inputs, not {request.num_inputs}: send the missing ones again"
            )
        return Empty()

    async def FunctionGetOutputs(self, request: api_pb2.FunctionGetOutputsRequest, caller: Caller) -> bytes:
        between = None
        if request.HasField("start_idx") or request.HasField("end_idx"):
            between = (request.start_idx, request.end_idx if request.HasField("end_idx") else request.start_idx)
            if not 0 <= between[0] <= between[1]:
                raise InvalidArgument(f"there are no outputs from {between[0]} to {between[1]}: indices count from 0")
        page = await self._calls.get_outputs(
            request.function_call_id,
            caller,
            timeout_s=request.timeout,
            after_seq=0 if between else _seq_of(request.last_entry_id),
            between=between,
            max_outputs=max(0, request.max_values),
            clear=request.clear_on_success and between is None and request.timeout == 0,
        )
        if any(output.status is not Status.SUCCESS for output in page.outputs):
            await self._channels.delivered(request.function_call_id)
        return _outputs_response(page, request.last_entry_id)

    async def FunctionCallCancel(self, request: api_pb2.FunctionCallCancelRequest, caller: Caller) -> Empty:
        await self._calls.cancel(request.function_call_id, caller, terminate=request.terminate_containers)
        return Empty()

    async def FunctionCallFromId(
        self, request: api_pb2.FunctionCallFromIdRequest, caller: Caller
    ) -> api_pb2.FunctionCallFromIdResponse:
        call = await self._calls.open(request.function_call_id, caller)
        return api_pb2.FunctionCallFromIdResponse(
            function_call_id=call.call_id,
            num_inputs=call.num_inputs,
            metadata=api_pb2.FunctionCallHandleMetadata(app_id=call.app_id, function_id=call.function_id),
        )

    async def FunctionCallGetInfo(
        self, request: api_pb2.FunctionCallGetInfoRequest, caller: Caller
    ) -> api_pb2.FunctionCallGetInfoResponse:
        call = await self._calls.open(request.function_call_id, caller)
        info = api_pb2.FunctionCallInfo(
            function_call_id=call.call_id, created_at=call.created_at, total_inputs=call.num_inputs
        )
        for record in await self._history.inputs_of(request.function_call_id, caller):
            category = getattr(info, _CATEGORIES.get(record.status, "failed_inputs"))
            category.total += 1
            if len(category.latest) < 10:
                category.latest.add(
                    input_id=f"in-{record.call_id[3:]}:{record.idx}",
                    idx=record.idx,
                    task_id=record.task_id,
                    started_at=record.started_at,
                    finished_at=record.finished_at,
                )
        return api_pb2.FunctionCallGetInfoResponse(info=info)

    async def FunctionGetCallGraph(
        self, request: api_pb2.FunctionGetCallGraphRequest, caller: Caller
    ) -> api_pb2.FunctionGetCallGraphResponse:
        graph = await self._history.graph(request.function_call_id, caller)
        response = api_pb2.FunctionGetCallGraphResponse(truncated=graph.is_truncated)
        for node in graph.calls:
            name, module = await self._names(node.function_id, caller)
            response.function_calls.add(
                function_call_id=node.call_id,
                parent_input_id=node.parent_input_id,
                function_name=name,
                module_name=module,
            )
        for item in graph.inputs:
            response.inputs.add(
                input_id=item.key.input_id,
                status=int(item.status),  # type: ignore[arg-type]
                function_call_id=item.key.call_id,
                task_id=item.task_id,
            )
        return response

    async def FunctionCallFetch(
        self, request: api_pb2.FunctionCallFetchRequest, caller: Caller
    ) -> api_pb2.FunctionCallFetchResponse:
        is_tail = request.WhichOneof("query_oneof") == "tail"
        span = request.range
        records = await self._history.recent(
            request.function_id,
            caller,
            since=0.0 if is_tail else _seconds(span.since),
            until=_FOREVER if is_tail or not span.HasField("until") else _seconds(span.until),
            limit=request.tail.count if is_tail else span.limit,
            newest=is_tail,
            variants=request.all_variants,
        )
        return api_pb2.FunctionCallFetchResponse(function_call_inputs=[_record(record) for record in records])

    async def FunctionCallCount(
        self, request: api_pb2.FunctionCallCountRequest, caller: Caller
    ) -> api_pb2.FunctionCallCountResponse:
        since, until = _seconds(request.since), _seconds(request.until)
        if not 0 < until - since <= MAX_SPAN_S:
            raise InvalidArgument("count calls over a span of up to 31 days: `until` must be later than `since`")
        buckets = await self._history.count(
            request.function_id,
            caller,
            since=since,
            until=until,
            bucket_s=float(request.bucket_secs or until - since),
            variants=request.all_variants,
        )
        response = api_pb2.FunctionCallCountResponse()
        for at, count in buckets:
            response.buckets.add(bucket_start_at=_timestamp(at), count=count)
        return response

    # ---- streams ----------------------------------------------------------------------------------------

    async def FunctionCallPutDataOut(self, request: api_pb2.FunctionCallPutDataRequest, caller: Caller) -> Empty:
        if (exchange := self._channels.exchange_of(request.function_call_id, caller)) is not None:
            await exchange.put(request.data_chunks)
            return Empty()
        chunks = [(chunk.index, chunk.SerializeToString()) for chunk in request.data_chunks]
        blob_ids = [chunk.data_blob_id for chunk in request.data_chunks if chunk.data_blob_id]
        await self._channels.put(request.function_call_id, Direction.OUT, caller, chunks, blob_ids)
        return Empty()

    async def FunctionCallGetDataOut(
        self, request: api_pb2.FunctionCallGetDataRequest, caller: Caller
    ) -> AsyncIterator[bytes]:
        async for _, chunk in self._channels.follow(
            request.function_call_id, Direction.OUT, caller, request.last_index
        ):
            yield chunk

    async def FunctionCallGetDataIn(
        self, request: api_pb2.FunctionCallGetDataRequest, caller: Caller
    ) -> AsyncIterator[bytes]:
        exchange = self._channels.exchange_of(request.function_call_id, caller)
        chunks = (
            exchange.follow(request.last_index)
            if exchange is not None
            else self._channels.follow(request.function_call_id, Direction.IN, caller, request.last_index)
        )
        async for _, chunk in chunks:
            yield chunk

    # ---- inside -----------------------------------------------------------------------------------------

    async def _inputs(self, items: Iterable[api_pb2.FunctionPutInputsItem]) -> list[tuple[int, bytes]]:
        inputs = []
        for item in items:
            if item.input.WhichOneof("args_oneof") is None:
                raise InvalidArgument(f"input {item.idx} has neither arguments nor a blob of them")
            await self._check_blob(item.input)
            inputs.append((item.idx, item.input.SerializeToString()))
        if len(inputs) > MAX_INPUTS_AT_ONCE:
            raise InvalidArgument(f"up to {MAX_INPUTS_AT_ONCE} inputs at a time, not {len(inputs)}")
        return inputs

    async def _check_blob(self, message: api_pb2.FunctionInput) -> None:
        if message.args_blob_id:
            await self._blobs.open_path(message.args_blob_id)

    def _accepted(self, call_id: str, idxs: Iterable[int]) -> list[api_pb2.FunctionPutInputsResponseItem]:
        return [
            api_pb2.FunctionPutInputsResponseItem(
                idx=idx, input_id=f"in-{call_id[3:]}:{idx}", input_jwt=self._tickets.of_input(call_id, idx)
            )
            for idx in idxs
        ]

    async def _names(self, function_id: str, caller: Caller) -> tuple[str, str]:
        try:
            _, data = await self._functions.look_back(function_id, caller)
        except NotFound:
            return "", ""
        return data.function_name, data.module_name


def _blob_ids(items: Iterable[api_pb2.FunctionPutInputsItem]) -> list[str]:
    return [item.input.args_blob_id for item in items if item.input.args_blob_id]


def _call_type(number: int) -> CallType:
    try:
        return CallType(number)
    except ValueError:
        raise InvalidArgument(f"{number} is no type of call: UNARY is 1, MAP is 2") from None


def _invocation(number: int) -> Invocation:
    try:
        return Invocation(number or Invocation.SYNC_LEGACY)
    except ValueError:
        raise InvalidArgument(f"{number} is no invocation type that this server knows") from None


def _seq_of(entry_id: str) -> int:
    """The cursor of a map is the number of the last output that the client has, as `N-0`."""
    number, _, _ = entry_id.partition("-")
    if not number:
        return 0
    if not number.isdecimal():
        raise InvalidArgument(f"{entry_id!r} is no cursor of this server")
    return int(number)


def _outputs_response(page: OutputsPage, last_entry_id: str) -> bytes:
    """A FunctionGetOutputsResponse around items that are serialized already."""
    head = api_pb2.FunctionGetOutputsResponse(
        idxs=[output.idx for output in page.outputs],
        last_entry_id=f"{page.last_seq}-0" if page.outputs else last_entry_id or "0-0",
        num_unfinished_inputs=page.num_unfinished,
    )
    parts = [head.SerializeToString()]
    for output in page.outputs:
        parts += (_OUTPUTS_TAG, _VarintBytes(len(output.item)), output.item)
    return b"".join(parts)


_OUTPUTS_TAG = bytes([api_pb2.FunctionGetOutputsResponse.OUTPUTS_FIELD_NUMBER << 3 | 2])
_FOREVER = 1e18
_CATEGORIES = {
    Status.PENDING: "pending_inputs",
    Status.SUCCESS: "succeeded_inputs",
    Status.TIMEOUT: "timeout_inputs",
    Status.TERMINATED: "cancelled_inputs",
}
_RECORD_STATUSES = {
    Status.SUCCESS: 3,
    Status.FAILURE: 4,
    Status.TIMEOUT: 5,
    Status.TERMINATED: 6,
    Status.INIT_FAILURE: 7,
    Status.INTERNAL_FAILURE: 8,
    Status.OOM_KILL: 12,
}


def _record(record: InputRecord) -> api_pb2.FunctionCallInputInfo:
    status = _RECORD_STATUSES.get(record.status, 2 if record.is_running else 1)
    info = api_pb2.FunctionCallInputInfo(
        enqueued_at=_timestamp(record.created_at),
        status=status,  # type: ignore[arg-type]
        function_call_id=record.call_id,
    )
    if record.started_at:
        info.started_at.CopyFrom(_timestamp(record.started_at))
        info.startup_time_seconds = max(0.0, record.started_at - record.created_at)
    if record.task_id:
        info.container_id = record.task_id
    if record.finished_at and record.started_at:
        info.execution_time_seconds = max(0.0, record.finished_at - record.started_at)
    return info


def _seconds(stamp: Timestamp) -> float:
    return stamp.seconds + stamp.nanos / 1e9


def _timestamp(at: float) -> Timestamp:
    return Timestamp(seconds=int(at), nanos=int((at % 1) * 1e9))
