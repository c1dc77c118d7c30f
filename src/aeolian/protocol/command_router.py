"""The TaskCommandRouter service: commands in running containers, passed on to the worker that holds the container.

It keeps nothing: output and input are counted in bytes, so a client goes on where it was after a restart of the
server. It is served on the port of the other RPCs; callers show a JWT for one container instead of a token.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from modal_proto import task_command_router_pb2 as router_pb2

from aeolian.control.command_access import Access, CommandAccess
from aeolian.control.command_starts import CommandStarts
from aeolian.control.container_requests import ContainerRequests
from aeolian.domain.errors import AeolianError, InvalidArgument, PermissionDenied, Unimplemented
from aeolian.domain.execs import AskStdin, AwaitExec, Ended, Output, ReadExec, ReloadVolumes, Stdin, WriteExec
from aeolian.protocol.errors import BUG, code_of, message_of

log = logging.getLogger(__name__)

SERVICE = router_pb2.DESCRIPTOR.services_by_name["TaskCommandRouter"]
PATH = f"/{SERVICE.full_name}/"
WAIT_S = 20.0
"""How long a worker waits for something to happen before this asks it again."""
FOREVER_S = 1e6
STDOUT, STDERR = 1, 2


class CommandRouter(grpc.GenericRpcHandler):
    def __init__(self, access: CommandAccess, starts: CommandStarts, requests: ContainerRequests):
        self._access = access
        self._starts = starts
        self._requests = requests
        self._handlers = {PATH + method.name: self._handler(method) for method in SERVICE.methods}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)

    # ---- the RPCs ---------------------------------------------------------------------------------------

    async def TaskExecStart(
        self, request: router_pb2.TaskExecStartRequest, access: Access, left_s: float
    ) -> router_pb2.TaskExecStartResponse:
        await self._requests.ask(access.task_id, await self._starts.make(request, access), WAIT_S)
        return router_pb2.TaskExecStartResponse()

    async def TaskExecStdioRead(
        self, request: router_pb2.TaskExecStdioReadRequest, access: Access
    ) -> AsyncIterator[router_pb2.TaskExecStdioReadResponse]:
        """Until the output is over. The next piece is asked for when this one is on its way: none pile up."""
        is_stderr = request.file_descriptor == router_pb2.TASK_EXEC_STDIO_FILE_DESCRIPTOR_STDERR
        fd, offset, is_over = STDERR if is_stderr else STDOUT, request.offset, False
        while not is_over:
            answer = await self._ask(access, ReadExec(request.exec_id, fd, offset, WAIT_S), Output)
            is_over = answer.is_over
            if answer.data:
                offset += len(answer.data)
                yield router_pb2.TaskExecStdioReadResponse(data=answer.data)

    async def TaskExecStdinWrite(
        self, request: router_pb2.TaskExecStdinWriteRequest, access: Access, left_s: float
    ) -> router_pb2.TaskExecStdinWriteResponse:
        await self._write(access, request.exec_id, request.offset, request.data, is_last=request.eof)
        return router_pb2.TaskExecStdinWriteResponse()

    async def TaskExecStdinWriteStream(
        self, requests: AsyncIterator[bytes], access: Access
    ) -> router_pb2.TaskExecStdinWriteStreamResponse:
        start: router_pb2.TaskExecStdinWriteStreamStart | None = None
        offset = 0
        async for raw in requests:
            request = _message(router_pb2.TaskExecStdinWriteStreamRequest, raw)
            kind = request.WhichOneof("payload")
            if kind == "start" and start is None:
                start = request.start
                _check_task(start, access)
                offset = start.offset
            elif start is None or kind == "start":
                raise InvalidArgument("a stream of input begins with one start message, then data")
            elif kind == "data":
                offset = await self._write(access, start.exec_id, offset, request.data, is_last=False)
            elif kind == "end":
                await self._write(access, start.exec_id, offset, b"", is_last=True)
        return router_pb2.TaskExecStdinWriteStreamResponse()

    async def TaskExecStdinStatus(
        self, request: router_pb2.TaskExecStdinStatusRequest, access: Access, left_s: float
    ) -> router_pb2.TaskExecStdinStatusResponse:
        answer = await self._ask(access, AskStdin(request.exec_id), Stdin)
        return router_pb2.TaskExecStdinStatusResponse(num_bytes_written=answer.num_bytes, closed=answer.is_closed)

    async def TaskExecPoll(
        self, request: router_pb2.TaskExecPollRequest, access: Access, left_s: float
    ) -> router_pb2.TaskExecPollResponse:
        answer = await self._ask(access, AwaitExec(request.exec_id, 0.0), Ended)
        return router_pb2.TaskExecPollResponse(**_exit_status(answer.exit_code))

    async def TaskExecWait(
        self, request: router_pb2.TaskExecWaitRequest, access: Access, left_s: float
    ) -> router_pb2.TaskExecWaitResponse:
        """As long as the caller waits: it asks again."""
        until = asyncio.get_running_loop().time() + left_s
        while True:
            wait_s = max(0.0, min(WAIT_S, until - asyncio.get_running_loop().time()))
            answer = await self._ask(access, AwaitExec(request.exec_id, wait_s), Ended)
            if answer.exit_code is not None:
                return router_pb2.TaskExecWaitResponse(**_exit_status(answer.exit_code))

    async def TaskReloadVolumes(
        self, request: router_pb2.TaskReloadVolumesRequest, access: Access, left_s: float
    ) -> router_pb2.TaskReloadVolumesResponse:
        await self._requests.ask(access.task_id, ReloadVolumes(), WAIT_S)
        return router_pb2.TaskReloadVolumesResponse()

    # ---- inside -----------------------------------------------------------------------------------------

    async def _ask(self, access: Access, request, kind: type):
        answer = await self._requests.ask(access.task_id, request, getattr(request, "wait_s", 0.0))
        assert isinstance(answer, kind), f"{type(request).__name__} was answered by {answer!r}"
        return answer

    async def _write(self, access: Access, exec_id: str, offset: int, data: bytes, *, is_last: bool) -> int:
        """All of it, however slowly the command reads; the offset behind it."""
        end = offset + len(data)
        while True:
            answer = await self._ask(access, WriteExec(exec_id, offset, data, is_last, WAIT_S), Stdin)
            if answer.num_bytes >= end:
                return end
            data = data[max(0, answer.num_bytes - offset) :]
            offset = end - len(data)

    def _handler(self, method) -> grpc.RpcMethodHandler:
        request_class = GetMessageClass(method.input_type)
        implementation = getattr(self, method.name, None)
        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(self._take_stream(method.name, implementation))
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(method.name, request_class, implementation))
        return grpc.unary_unary_rpc_method_handler(self._unary(method.name, request_class, implementation))

    def _unary(self, name: str, request_class: type[Message], implementation):
        async def handle(raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
            async with _errors_answered(name, context):
                access = self._caller(name, implementation, context)
                request = _parsed(request_class, raw, access)
                left_s = context.time_remaining()
                left_s = left_s if left_s is not None and left_s < FOREVER_S else FOREVER_S
                return (await implementation(request, access, left_s)).SerializeToString()
            raise AssertionError("an error ends the RPC")

        return handle

    def _stream(self, name: str, request_class: type[Message], implementation):
        async def handle(raw: bytes, context: grpc.aio.ServicerContext) -> None:
            async with _errors_answered(name, context):
                access = self._caller(name, implementation, context)
                request = _parsed(request_class, raw, access)
                async with contextlib.aclosing(implementation(request, access)) as replies:
                    async for reply in replies:
                        await context.write(reply.SerializeToString())

        return handle

    def _take_stream(self, name: str, implementation):
        async def handle(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
            async with _errors_answered(name, context):
                access = self._caller(name, implementation, context)
                return (await implementation(requests, access)).SerializeToString()
            raise AssertionError("an error ends the RPC")

        return handle

    def _caller(self, name: str, implementation, context: grpc.aio.ServicerContext) -> Access:
        metadata = dict(context.invocation_metadata() or ())
        access = self._access.check(str(metadata.get("authorization", "")).removeprefix("Bearer "))
        if implementation is None:
            raise Unimplemented(
                f"Aeolian does not implement the RPC {name} (yet); docs/compatibility.md lists what it does"
            )
        return access


@contextlib.asynccontextmanager
async def _errors_answered(name: str, context: grpc.aio.ServicerContext):
    try:
        yield
    except AeolianError as error:
        await context.abort(code_of(error), message_of(error))
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception:
        log.exception("bug in %s", name)
        await context.abort(BUG, f"{name} failed inside Aeolian: this is a bug, its log says more")


def _parsed(request_class: type[Message], raw: bytes, access: Access) -> Message:
    request = _message(request_class, raw)
    _check_task(request, access)
    return request


def _message(request_class: type[Message], raw: bytes) -> Any:
    try:
        return request_class.FromString(raw)
    except DecodeError as error:
        raise InvalidArgument(f"the request is not a valid {request_class.DESCRIPTOR.name} message") from error


def _check_task(request: Any, access: Access) -> None:
    if request.task_id != access.task_id:
        raise PermissionDenied(f"this permission is for {access.task_id}, not for {request.task_id!r}")


def _exit_status(exit_code: int | None) -> dict[str, int]:
    if exit_code is None:
        return {}
    return {"code": exit_code} if exit_code >= 0 else {"signal": -exit_code}
