"""The gRPC server of one container: its socket is its identity.

What concerns the container's inputs is answered here, by the worker; everything else passes through to the server as
it is, with the container's id, and waits while the server starts again.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from modal_proto import api_pb2

from aeolian.domain.errors import AeolianError, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from aeolian.worker.link import TASK_KEY, TOKEN_KEY

log = logging.getLogger(__name__)

SERVICE = api_pb2.DESCRIPTOR.services_by_name["ModalClient"]
PREFIX = f"/{SERVICE.full_name}/"
STREAMS = frozenset(PREFIX + method.name for method in SERVICE.methods if method.server_streaming)
KNOWN = frozenset(PREFIX + method.name for method in SERVICE.methods)
RIDE_OUT_S = 30.0
"""How long a repeatable RPC, or a stream that has not begun, waits for a server that is away."""
REPEAT_S = 0.1
MAX_MESSAGE = 256 << 20
SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
]
ATTEMPT_KEY = "x-retry-attempt"
KEPT = ("x-idempotency-key", ATTEMPT_KEY, "x-modal-client-version", "x-modal-client-type", "x-modal-timestamp")

M = TypeVar("M", bound=Message)
Answer = Callable[[bytes, str], Coroutine[Any, Any, bytes]]
"""(request, idempotency key) -> reply"""


class ContainerService(grpc.GenericRpcHandler):
    def __init__(self, task_id: str, token: str, channel: grpc.aio.Channel, own: dict[str, Answer]):
        """`own`: RPCs that the worker answers, by name."""
        self._identity = ((TASK_KEY, task_id), (TOKEN_KEY, token))
        self._channel = channel
        self._handlers = {
            PREFIX + name: grpc.unary_unary_rpc_method_handler(_own(answer)) for name, answer in own.items()
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        handler = self._handlers.get(method)
        if handler is None and method in KNOWN:
            handler = self._handlers[method] = (
                grpc.unary_stream_rpc_method_handler(self._pass_stream(method))
                if method in STREAMS
                else grpc.unary_unary_rpc_method_handler(self._pass_unary(method))
            )
        return handler

    def _pass_unary(self, method: str):
        call = self._channel.unary_unary(method)

        async def handle(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            metadata, is_repeatable = self._metadata(context)
            loop = asyncio.get_running_loop()
            until = loop.time() + RIDE_OUT_S
            while True:
                try:
                    return await call(request, metadata=metadata, timeout=_time_left(context), wait_for_ready=True)
                except grpc.aio.AioRpcError as error:
                    away = error.code() is grpc.StatusCode.UNAVAILABLE
                    if not (away and is_repeatable and loop.time() < until):
                        await _abort_as(context, error)
                metadata = tuple(pair for pair in metadata if pair[0] != ATTEMPT_KEY)  # not the first any more
                await asyncio.sleep(REPEAT_S)

        return handle

    def _pass_stream(self, method: str):
        call = self._channel.unary_stream(method)

        async def handle(request: bytes, context: grpc.aio.ServicerContext) -> None:
            metadata, _ = self._metadata(context)
            loop = asyncio.get_running_loop()
            until = loop.time() + RIDE_OUT_S
            has_begun = False
            while True:
                try:
                    replies = call(request, metadata=metadata, timeout=_time_left(context), wait_for_ready=True)
                    async for reply in replies:
                        has_begun = True
                        await context.write(reply)
                    return
                except grpc.aio.AioRpcError as error:
                    away = error.code() is grpc.StatusCode.UNAVAILABLE
                    if has_begun or not away or loop.time() > until:
                        await _abort_as(context, error)
                await asyncio.sleep(REPEAT_S)

        return handle

    def _metadata(self, context: grpc.aio.ServicerContext) -> tuple[tuple[tuple[str, str], ...], bool]:
        """The container's own metadata, as far as it may speak for itself, and who it is."""
        kept = [(key, value) for key, value in context.invocation_metadata() or () if key in KEPT]
        return (*kept, *self._identity), any(key == "x-idempotency-key" for key, _ in kept)


def parsed(kind: type[M], raw: bytes) -> M:
    """A container's request. Raises InvalidArgument when it is none."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidArgument(f"the request is not a valid {kind.DESCRIPTOR.name} message") from error


def _own(answer: Answer):
    async def handle(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        key = next((value for name, value in context.invocation_metadata() or () if name == "x-idempotency-key"), "")
        try:
            return await answer(request, key)
        except AeolianError as error:
            await context.abort(_CODES.get(type(error), grpc.StatusCode.FAILED_PRECONDITION), error.message)
        except asyncio.CancelledError:
            raise
        except grpc.aio.AbortError:
            raise
        except Exception:
            log.exception("an RPC of a container failed inside the worker")
            await context.abort(grpc.StatusCode.DATA_LOSS, "the worker has a bug; see its log")
        raise AssertionError("unreachable")

    return handle


_CODES = {
    NotFound: grpc.StatusCode.NOT_FOUND,
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}


def _time_left(context: grpc.aio.ServicerContext) -> float | None:
    left = context.time_remaining()
    return left if left is not None and left < 1e6 else None


async def _abort_as(context: grpc.aio.ServicerContext, error: grpc.aio.AioRpcError) -> None:
    trailing = tuple((key, value) for key, value in error.trailing_metadata() or ())
    await context.abort(error.code(), error.details() or "", trailing)


class ContainerServer:
    """The socket of one container."""

    def __init__(self, path: str, service: ContainerService):
        self._path = path
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((service,))

    async def start(self) -> None:
        self._server.add_insecure_port(f"unix:{self._path}")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)
