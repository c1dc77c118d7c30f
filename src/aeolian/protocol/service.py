"""Turns resource modules into one gRPC service: who calls, which method, which error, which reply again.

A resource module defines a class whose async methods carry the names of ModalClient RPCs::

    class SecretRpcs:
        def __init__(self, secrets: Secrets): ...
        async def SecretDelete(self, request: api_pb2.SecretDeleteRequest, caller: Caller) -> Empty: ...
        async def DictContents(self, request, caller) -> AsyncIterator[api_pb2.DictEntry]: yield ...

An RPC that no module defines answers UNIMPLEMENTED and names itself.
"""

import asyncio
import contextlib
import inspect
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

import grpc
import msgspec
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from modal_proto import api_pb2

from aeolian.domain.caller import Caller
from aeolian.domain.errors import AeolianError, InvalidArgument, PermissionDenied
from aeolian.domain.roles import RULES, Right, is_audited
from aeolian.protocol.errors import BUG, code_of, details_of, message_of
from aeolian.protocol.guard import Guard, check_kind, right_for

log = logging.getLogger(__name__)

SERVICE = api_pb2.DESCRIPTOR.services_by_name["ModalClient"]
SERVICE_PATH = f"/{SERVICE.full_name}/"
REPLY_LIFETIME_S = 180.0
MAX_KEPT_REPLIES = 50_000
MAX_KEPT_REPLY_BYTES = 256 << 10
CLOSE_S = 2.0
STATUS_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
FOREVER_S = 1e6
ATTEMPTS = (("x-retry-attempt", ""), ("x-throttle-retry-attempt", "0"))
"""How often clients have sent a request before, and what it means when they do not say."""

Authenticate = Callable[[dict[str, Any]], Awaitable[Caller]]
Observe = Callable[[str, str, float], None]
"""Called with the name of each RPC that was answered, the name of its status, and how many seconds it took."""


class ReplyCache:
    """Carries out what changes something: to its end, whoever leaves meanwhile, and once for each idempotency key.

    Covers repeats within one life of the server. What must hold across a restart stores its result in the
    transaction that did the work (`Database.write(once=…)`).
    """

    def __init__(self) -> None:
        self._replies: dict[str, tuple[float, asyncio.Task[bytes]]] = {}
        self._running: set[asyncio.Task[bytes]] = set()

    async def once(self, key: str | None, run: Callable[[], Coroutine[Any, Any, bytes]]) -> bytes:
        """The reply of the first request with this key; None: of this one."""
        kept = self._replies.get(key) if key is not None else None
        task = kept[1] if kept is not None else self._start(key, run())
        try:
            reply = await asyncio.shield(task)
            if key is not None and len(reply) > MAX_KEPT_REPLY_BYTES:
                self._replies.pop(key, None)  # what is read destructively is kept in the database
            return reply
        except BaseException:
            # A refusal or a failure changed nothing: let the next attempt try again.
            if key is not None and task.done() and (task.cancelled() or task.exception() is not None):
                self._replies.pop(key, None)
            raise

    async def close(self) -> None:
        """What has begun is finished, unless it takes too long."""
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _start(self, key: str | None, work: Coroutine[Any, Any, bytes]) -> "asyncio.Task[bytes]":
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._done)
        if key is not None:
            self._replies[key] = (time.monotonic(), task)
            self._trim()
        return task

    def _done(self, task: "asyncio.Task[bytes]") -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also where the caller has left

    def _trim(self) -> None:
        horizon = time.monotonic() - REPLY_LIFETIME_S
        while self._replies:
            key, (at, task) = next(iter(self._replies.items()))
            if at > horizon and len(self._replies) <= MAX_KEPT_REPLIES:
                return
            if not task.done() and len(self._replies) <= 2 * MAX_KEPT_REPLIES:
                return
            del self._replies[key]


class ModalService(grpc.GenericRpcHandler):
    """The ModalClient service over a set of resource modules."""

    def __init__(
        self,
        resources: Iterable[object],
        authenticate: Authenticate,
        *,
        open_methods: frozenset[str],
        guard: Guard | None = None,
        observe: Observe | None = None,
    ):
        """`open_methods`: RPCs that may be called without a token (the token flow itself).

        `guard` looks at the requests of callers with roles, which are refused without one.
        """
        self._authenticate = authenticate
        self._open_methods = open_methods
        self._guard = guard
        self._observe = observe
        self._replies = ReplyCache()
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}
        implementations = collect(resources)
        for method in SERVICE.methods:
            implementation = implementations.get(method.name)
            self._handlers[SERVICE_PATH + method.name] = self._handler(method, implementation)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)

    async def close(self) -> None:
        """After the last request."""
        await self._replies.close()

    def _handler(self, method, implementation) -> grpc.RpcMethodHandler:
        # Requests are parsed by us, so that a malformed one gets INVALID_ARGUMENT and not INTERNAL.
        request_class = GetMessageClass(method.input_type)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(method.name, request_class, implementation))
        handle = self._unary(method.name, request_class, implementation)
        if self._observe is not None:
            handle = _observed(method.name, handle, self._observe)
        return grpc.unary_unary_rpc_method_handler(handle)

    def _unary(self, name: str, request_class: type[Message], implementation):
        repeatable = name in REPEATABLE
        rule = RULES.get(name)

        is_recorded = self._guard is not None and rule is not None and is_audited(name)

        async def answer(request: Message, caller: Caller) -> bytes:
            if is_recorded:
                reply = await self._recorded(name, implementation, request, caller)
            else:
                reply = await implementation(request, caller)
            return reply if isinstance(reply, bytes) else reply.SerializeToString()

        async def handle(raw: bytes, context: grpc.aio.ServicerContext):
            request = caller = None
            try:
                caller = await self._caller(name, context)
                if implementation is None:
                    await _refuse_unimplemented(name, caller, context)
                request = _parse(request_class, raw, name)
                check_kind(name, rule, caller)
                if caller.roles is not None:
                    await self._check(name, request, caller)
                if repeatable:
                    return await self._replies.once(caller.once(name), lambda: answer(request, caller))
                return await answer(request, caller)
            except AeolianError as error:
                if isinstance(error, PermissionDenied) and self._guard is not None and request is not None:
                    await self._guard.refused(name, request, caller)
                await context.abort(code_of(error), message_of(error), details_of(error))
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except Exception:
                await _report_bug(name, context)

        return handle

    def _stream(self, name: str, request_class: type[Message], implementation):
        rule = RULES.get(name)

        async def handle(raw: bytes, context: grpc.aio.ServicerContext):
            request = caller = None
            try:
                caller = await self._caller(name, context)
                if implementation is None:
                    await _refuse_unimplemented(name, caller, context)
                request = _parse(request_class, raw, name)
                check_kind(name, rule, caller)
                if caller.roles is not None:
                    await self._check(name, request, caller)
                async with contextlib.aclosing(implementation(request, caller)) as replies:
                    async for reply in replies:
                        await context.write(reply if isinstance(reply, bytes) else reply.SerializeToString())
            except AeolianError as error:
                if isinstance(error, PermissionDenied) and self._guard is not None and request is not None:
                    await self._guard.refused(name, request, caller)
                await context.abort(code_of(error), message_of(error), details_of(error))
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except Exception:
                await _report_bug(name, context)

        return handle

    async def _check(self, name: str, request: Message, caller: Caller) -> None:
        if self._guard is None:
            raise PermissionDenied(f"nobody can tell whether {caller.name or caller.task_id} may call {name}")
        await self._guard.check(name, request, caller)

    async def _recorded(self, name: str, implementation, request: Message, caller: Caller) -> Message | bytes:
        """Carry it out, and have it in the audit trail before it is acknowledged."""
        assert self._guard is not None
        if right_for(RULES[name], request) is Right.READ or (caller.is_container and name.endswith("GetOrCreate")):
            return await implementation(request, caller)
        where = await self._guard.where(name, request, caller)  # before: afterwards it may be gone
        reply = await implementation(request, caller)
        await self._guard.done(name, request, reply, caller, where)
        return reply

    async def _caller(self, name: str, context: grpc.aio.ServicerContext) -> Caller:
        metadata = {key: value for key, value in context.invocation_metadata() or ()}
        if name in self._open_methods and "x-modal-token-id" not in metadata:
            return Caller(workspace="", idempotency_key=str(metadata.get("x-idempotency-key", "")))
        caller = await self._authenticate(metadata)
        left = context.time_remaining()
        return msgspec.structs.replace(
            caller,
            may_repeat=any(metadata.get(name, unsaid) != "0" for name, unsaid in ATTEMPTS),
            time_left_s=left if left is not None and left < FOREVER_S else None,
        )


def _observed(name: str, handle, observe: Observe):
    async def observed(raw: bytes, context: grpc.aio.ServicerContext) -> bytes | None:
        began_at, code = time.perf_counter(), "OK"
        try:
            return await handle(raw, context)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            status = context.code()
            code = status.name if isinstance(status, grpc.StatusCode) else STATUS_NAMES.get(status, "UNKNOWN")
            raise
        finally:
            observe(name, code, time.perf_counter() - began_at)

    return observed


def collect(resources: Iterable[object]) -> dict[str, Callable]:
    """RPC name -> bound method, over all resource modules; a name defined twice is our own mistake."""
    names = {method.name for method in SERVICE.methods}
    found: dict[str, Callable] = {}
    for resource in resources:
        for name, member in inspect.getmembers(resource, callable):
            if name in names:
                assert name not in found, f"{name} is defined twice"
                found[name] = member
    return found


def _parse(request_class: type[Message], raw: bytes, name: str) -> Message:
    request = request_class()
    try:
        request.ParseFromString(raw)
    except DecodeError as error:
        raise InvalidArgument(f"{name}: the request is not a valid {request_class.DESCRIPTOR.name} message") from error
    return request


async def _refuse_unimplemented(name: str, caller: Caller, context: grpc.aio.ServicerContext) -> None:
    log.warning("%s is not built yet (called by %s)", name, caller.token_id or caller.task_id)
    await context.abort(
        grpc.StatusCode.UNIMPLEMENTED,
        f"Aeolian does not implement the RPC {name} (yet); docs/compatibility.md lists what it does",
    )


async def _report_bug(name: str, context: grpc.aio.ServicerContext) -> None:
    reference = secrets.token_hex(4)
    log.exception("bug in %s (reference %s)", name, reference)
    await context.abort(
        BUG, f"{name} failed inside Aeolian: this is a bug, nothing was retried (reference {reference} in the log)"
    )


REPEATABLE = frozenset(
    [
        "AppClientDisconnect",
        "AppCreate",
        "AppGetOrCreate",
        "AppPublish",
        "AppRollback",
        "AppRollover",
        "AppPromote",
        "ClassCreate",
        "FunctionCreate",
        "FunctionPrecreate",
        "FunctionMap",
        "FunctionPutInputs",
        "FunctionRetryInputs",
        "FunctionFinishInputs",
        "FunctionBindParams",
        "FunctionUpdateSchedulingParams",
        "FunctionCallCancel",
        "FunctionCallPutDataOut",
        "QueueGetOrCreate",
        "QueueClear",
        "QueueDelete",
        "DictPop",
        "DictUpdate",
        "DictGetOrCreate",
        "DictClear",
        "DictDelete",
        "SecretGetOrCreate",
        "SecretUpdate",
        "SecretDelete",
        "VolumeGetOrCreate",
        "VolumePutFiles",
        "VolumePutFiles2",
        "VolumeRemoveFile",
        "VolumeRemoveFile2",
        "VolumeCopyFiles",
        "VolumeCopyFiles2",
        "VolumeRename",
        "VolumeDelete",
        "VolumeCommit",
        "EnvironmentCreate",
        "EnvironmentDelete",
        "EnvironmentGetOrCreate",
        "EnvironmentUpdate",
        "BlobCreate",
        "ImageGetOrCreate",
        "ImagePublish",
        "ImageDelete",
        "ImageNameDelete",
        "MountGetOrCreate",
        "MountPutFile",
        "TokenDelete",
        "TokenDisable",
        "TokenEnable",
        "TokenFlowCreate",
        "EnvironmentRoleSet",
        "ServiceUserCreate",
        "ServiceUserDelete",
        "ContainerStop",
        "AppStop",
        "AppSetTags",
        "TaskResult",
    ]
)
"""Unary RPCs that change something: carried out to their end, once for each idempotency key.

QueueGet and QueuePut are not among them: they may wait for long, and must not go on for a client that is gone. Their
results are kept with what they do, in the database.
"""
