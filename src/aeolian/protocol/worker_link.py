"""The server's end of the workers' connections: the link of commands and events, and who containers' RPCs come from."""

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import grpc
import msgspec
from modal_proto import api_pb2

from aeolian.control.apps import Apps
from aeolian.control.calls import Calls
from aeolian.control.containers import Containers
from aeolian.control.environments import Environments
from aeolian.control.logs import AppLogs
from aeolian.control.pools import Pools
from aeolian.control.recovery import Recovery
from aeolian.control.workers import Worker, Workers
from aeolian.domain.caller import Caller
from aeolian.domain.containers import ContainerState
from aeolian.domain.errors import PermissionDenied, Unavailable
from aeolian.domain.link import (
    AckExit,
    AckLogs,
    AckOutputs,
    ContainerAnswer,
    ContainerChanged,
    Event,
    Heartbeat,
    Hello,
    ImageBuilt,
    Leaving,
    Logs,
    Outputs,
    ReturnInputs,
    WantInputs,
    decode_events,
)
from aeolian.domain.roles import Role
from aeolian.protocol.worker_logs import Images as LogImages
from aeolian.protocol.worker_logs import WorkerLogs
from aeolian.protocol.worker_volumes import WorkerVolumeCalls
from aeolian.worker.framing import FrameLink
from aeolian.worker.link import TASK_KEY, TOKEN_KEY, VOLUMES_METHOD

log = logging.getLogger(__name__)

ARRIVAL_S = 10.0
SILENT_S = 30.0
"""A worker that says nothing for so long (it sends heartbeats) is away."""


class ImageEvents(LogImages, Protocol):
    async def on_built(self, image_id: str, build_id: str, error: str, info: dict[str, str]) -> None: ...


def worker_token(keys_dir: Path) -> str:
    """The secret that workers show; made once. Workers on this machine read the file."""
    path = keys_dir / "worker-token"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text()
    with contextlib.suppress(FileExistsError):
        fresh = path.with_name(f"worker-token.{os.getpid()}")
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            stream.write(secrets.token_urlsafe(32))
        try:
            os.link(fresh, path)
        finally:
            fresh.unlink()
    return path.read_text()


class WorkerLinks:
    """Listens for workers. Each message is handled in order; what takes time is done behind."""

    def __init__(
        self,
        token: str,
        recovery: Recovery,
        containers: Containers,
        pools: Pools,
        calls: Calls,
        workers: Workers,
        logs: AppLogs,
        images: ImageEvents,
        on_worker: Callable[[Worker], None],
        on_answer: Callable[[ContainerAnswer], None],
    ):
        self._token = token
        self._recovery = recovery
        self._containers = containers
        self._pools = pools
        self._calls = calls
        self._workers = workers
        self._logs = logs
        self._images = images
        self._on_worker = on_worker
        self._on_answer = on_answer
        self._server: asyncio.Server | None = None
        self._links: set[_WorkerLink] = set()
        self._tasks: set[asyncio.Task] = set()

    async def start(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _WorkerLink(self).link, str(path))
        os.chmod(path, 0o600)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for link in list(self._links):
            link.link.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def behind(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # type: ignore[arg-type]
        task.add_done_callback(self._tasks.discard)  # type: ignore[arg-type]

    def is_token(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._token.encode())


class _WorkerLink:
    """One connection."""

    def __init__(self, owner: WorkerLinks):
        self._owner = owner
        self.link = FrameLink(self._first_frame, self._lost)
        self._worker: Worker | None = None
        self._logs = WorkerLogs(owner._containers, owner._images, owner._logs, lambda seq: self.link.send(AckLogs(seq)))
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_later(SILENT_S, self._check)
        owner._links.add(self)

    def _check(self) -> None:
        if self._loop.time() - self._heard_at > SILENT_S:
            log.warning("a worker has said nothing for %.0f s: its connection is closed", SILENT_S)
            self.link.abort()
            return
        self._timer = self._loop.call_later(SILENT_S / 3, self._check)

    def _first_frame(self, frame: bytes) -> None:
        """The worker's token; only then its messages are read."""
        if not self._owner.is_token(frame.decode(errors="replace")):
            log.warning("a worker with a wrong token was refused")
            self.link.abort()
            return
        self.link._on_frame = self._frame

    def _lost(self) -> None:
        self._timer.cancel()
        self._owner._links.discard(self)
        self._owner.behind(self._logs.close())
        if self._worker is not None:
            self._owner._recovery.worker_disconnected(self._worker)

    def _frame(self, frame: bytes) -> None:
        self._heard_at = self._loop.time()
        for event in decode_events(frame):
            try:
                self._handle(event)
            except Exception:
                log.exception("an event of a worker could not be handled: %s", type(event).__name__)

    def _handle(self, event: Event) -> None:
        owner = self._owner
        match event:
            case WantInputs():
                owner._containers.wants_inputs(event)
            case Outputs():
                self._outputs(event)
            case Logs():
                self._logs.take(event, self._worker.life if self._worker is not None else "")
            case ContainerChanged():
                owner._containers.container_changed(event)
                if event.state == ContainerState.EXITED:
                    self.link.send(AckExit(event.task_id))
            case ReturnInputs():
                if (container := owner._containers.get(event.task_id)) is not None:
                    owner._pools.take_back(container, event.held, owner._calls.unfinished_input)
            case ContainerAnswer():
                owner._on_answer(event)
            case ImageBuilt():
                owner.behind(owner._images.on_built(event.image_id, event.build_id, event.error, event.info))
                if self._worker is not None and not event.error:
                    self._worker.image_ids.add(event.image_id)
            case Hello():
                self._worker = Worker(event, self.link.send)
                owner._recovery.worker_connected(self._worker, event)
                owner._on_worker(self._worker)
            case Leaving():
                if self._worker is not None:
                    owner._recovery.worker_leaving(self._worker)
            case Heartbeat():
                pass

    def _outputs(self, event: Outputs) -> None:
        """Acknowledged when all of them are durable."""
        left = len(event.items)

        def stored() -> None:
            nonlocal left
            left -= 1
            if not left:
                self.link.send(AckOutputs(event.task_id, event.seq))

        for raw in event.items:
            self._owner._calls.output_received(event.task_id, api_pb2.FunctionPutOutputsItem.FromString(raw), stored)


class ContainerCallers:
    """Who a container is: its worker says so, and only workers have the token."""

    def __init__(
        self,
        token: str,
        containers: Containers,
        workers: Workers,
        apps: Apps,
        environments: Environments,
        *,
        workspace: str,
    ):
        self._environments = environments
        self._token = token
        self._containers = containers
        self._workers = workers
        self._apps = apps
        self._workspace = workspace

    async def authenticate(self, metadata: dict[str, Any]) -> Caller:
        """Raises Unavailable while the server does not know (yet) what the container is working on."""
        check_worker(metadata, self._token)
        task_id = str(metadata.get(TASK_KEY, ""))
        container = self._containers.get(task_id)
        if container is not None and not self._workers.is_connected(container.worker_id):
            # After a start of the server RPCs come through before the worker has said what its containers hold.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ARRIVAL_S):
                    await self._workers.arrival(container.worker_id)
            container = self._containers.get(task_id)
        if container is None or not self._workers.is_connected(container.worker_id):
            raise Unavailable(f"container {task_id} is not known to this server (yet)")
        await self._environments.keep_fresh()
        app = self._apps.known(container.app_id)
        return Caller(
            workspace=app.workspace if app is not None else self._workspace,
            task_id=task_id,
            app_id=container.app_id,
            function_id=container.function_id,
            environment_name=app.environment_name if app is not None else container.environment_name,
            environment_was=container.environment_name,
            sdk_version=str(metadata.get("x-modal-client-version", "")) or container.sdk_version,
            client_type=3,
            idempotency_key=str(metadata.get("x-idempotency-key", "")),
            worker_id=container.worker_id,
            roles=self._roles(
                app.environment_id if app is not None else self._environments.id_of(container.environment_name)
            ),
            is_restricted=container.is_shut_off,
        )

    def _roles(self, environment_id: str) -> dict[str, Role] | None:
        return {environment_id: Role.CONTRIBUTOR} if self._environments.is_restricted(environment_id) else None


def check_worker(metadata: dict[str, Any], token: str) -> None:
    if not hmac.compare_digest(str(metadata.get(TOKEN_KEY, "")).encode(), token.encode()):
        raise PermissionDenied("only a worker of this server may speak for containers")


class WorkerCalls(grpc.GenericRpcHandler):
    """What workers ask on their own behalf: Volumes, for the containers whose folders they keep."""

    def __init__(self, token: str, volumes: WorkerVolumeCalls):
        self._token = token
        self._volumes = volumes
        self._handler = grpc.unary_unary_rpc_method_handler(self._answer)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handler if handler_call_details.method == VOLUMES_METHOD else None

    async def _answer(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            check_worker(dict(context.invocation_metadata() or ()), self._token)
            method, body = msgspec.msgpack.decode(request, type=tuple[str, bytes])
        except PermissionDenied as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, error.message)
        except msgspec.MsgspecError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a call about volumes: {error}")
        return await self._volumes.answer(method, body)
