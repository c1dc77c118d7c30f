"""The floor that call benchmarks compare with: an in-memory server on which the client's calls just run.

Nothing is stored, checked, isolated or built. Containers are plain subprocesses of this interpreter. It answers the
RPCs that `app.run()`, `.remote()` and `.map()` need, in as little time as grpc.aio allows.

    python null_server.py PORT [NUM_CONTAINERS]
"""

import asyncio
import base64
import contextvars
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import grpc
from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2, api_pb2_grpc

IDLE_S = 5.0
OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
]
SUCCESS = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS)
_numbers = itertools.count(1)
_task_id: contextvars.ContextVar[str] = contextvars.ContextVar("task_id")


def new_id(prefix: str) -> str:
    return f"{prefix}-{next(_numbers):022d}"


def ticket(idx: int, input_id: str) -> str:
    payload = base64.urlsafe_b64encode(json.dumps({"idx": idx, "input_id": input_id}).encode()).rstrip(b"=")
    return f"e30.{payload.decode()}.x"


class Bell:
    """Wakes everybody who waits."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait_until(self, condition, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while not condition():
            left = until - time.monotonic()
            if left <= 0:
                return False
            try:
                await asyncio.wait_for(self._event.wait(), left)
            except TimeoutError:
                return condition()
        return True


class Call:
    def __init__(self) -> None:
        self.call_id = new_id("fc")
        self.num_inputs = 0
        self.outputs: list[api_pb2.FunctionGetOutputsItem] = []
        self.bell = Bell()


class Function:
    def __init__(self, function_id: str, app_id: str) -> None:
        self.function_id, self.app_id = function_id, app_id
        self.definition = api_pb2.Function()
        self.handle = api_pb2.FunctionHandleMetadata()
        self.queue: deque[tuple[str, Call, api_pb2.FunctionInput]] = deque()
        self.num_containers = 0
        self.bell = Bell()


class NullServer(api_pb2_grpc.ModalClientServicer):
    def __init__(self, max_containers: int):
        self._max_containers = max_containers
        self._functions: dict[str, Function] = {}
        self._tasks: dict[str, Function] = {}
        self._calls: dict[str, Call] = {}
        self._inputs: dict[str, tuple[Call, int]] = {}
        self._layouts: dict[str, dict[str, str]] = {}
        self._objects: dict[str, None] = {}
        self._ended: set[str] = set()
        self._app_bell = Bell()
        self._folder = Path(tempfile.mkdtemp(prefix="null-"))
        self._processes: list[asyncio.subprocess.Process] = []
        self._running: set[asyncio.Task] = set()

    # ---- Apps and definitions -----------------------------------------------------------------------------

    async def EnvironmentGetOrCreate(self, request, context):
        settings = api_pb2.EnvironmentSettings(image_builder_version="2025.06")
        metadata = api_pb2.EnvironmentMetadata(name="main", settings=settings)
        return api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-0000000000000000000001", metadata=metadata)

    async def AppCreate(self, request, context):
        return api_pb2.AppCreateResponse(app_id=new_id("ap"), app_page_url="http://null", app_logs_url="http://null")

    async def AppHeartbeat(self, request, context):
        return Empty()

    async def AppPublish(self, request, context):
        self._layouts[request.app_id] = dict(request.function_ids)
        return api_pb2.AppPublishResponse(url="http://null", deployed_at=time.time())

    async def AppClientDisconnect(self, request, context):
        self._ended.add(request.app_id)
        self._app_bell.ring()
        for function in self._functions.values():
            function.bell.ring()
        return Empty()

    async def AppGetLogs(self, request, context):
        if await self._app_bell.wait_until(lambda: request.app_id in self._ended, request.timeout):
            yield api_pb2.TaskLogsBatch(app_done=True)

    async def ImageGetOrCreate(self, request, context):
        self._objects["im-0000000000000000000001"] = None
        metadata = api_pb2.ImageMetadata(image_builder_version=request.builder_version)
        return api_pb2.ImageGetOrCreateResponse(image_id="im-0000000000000000000001", result=SUCCESS, metadata=metadata)

    async def MountBatchedCheckExistence(self, request, context):
        return api_pb2.MountBatchedCheckExistenceResponse()

    async def MountGetOrCreate(self, request, context):
        mount_id = new_id("mo")
        self._objects[mount_id] = None
        handle = api_pb2.MountHandleMetadata(content_checksum_sha256_hex=mount_id)
        return api_pb2.MountGetOrCreateResponse(mount_id=mount_id, handle_metadata=handle)

    async def FunctionPrecreate(self, request, context):
        function_id = request.existing_function_id or new_id("fu")
        function = self._functions.setdefault(function_id, Function(function_id, request.app_id))
        function.handle = _handle(request, request.app_id)
        return api_pb2.FunctionPrecreateResponse(function_id=function_id, handle_metadata=function.handle)

    async def FunctionCreate(self, request, context):
        definition = request.function
        function = self._functions[request.existing_function_id]
        function.definition, function.handle = definition, _handle(definition, request.app_id)
        self._objects.update((dependency.object_id, None) for dependency in definition.object_dependencies)
        data = api_pb2.FunctionData(ranked_functions=[api_pb2.FunctionData.RankedFunction(function=definition)])
        return api_pb2.FunctionCreateResponse(
            function_id=function.function_id, function=definition, function_data=data, handle_metadata=function.handle
        )

    # ---- calls, as the client makes them -------------------------------------------------------------------

    async def FunctionMap(self, request, context):
        call = Call()
        self._calls[call.call_id] = call
        return api_pb2.FunctionMapResponse(
            function_call_id=call.call_id,
            pipelined_inputs=self._take(call, request.function_id, request.pipelined_inputs),
            function_call_jwt="e30.e30.x",
            sync_client_retries_enabled=True,
        )

    async def FunctionPutInputs(self, request, context):
        call = self._calls[request.function_call_id]
        return api_pb2.FunctionPutInputsResponse(inputs=self._take(call, request.function_id, request.inputs))

    def _take(self, call: Call, function_id: str, items) -> list[api_pb2.FunctionPutInputsResponseItem]:
        function = self._functions[function_id]
        taken = []
        for item in items:
            input_id = new_id("in")
            self._inputs[input_id] = (call, item.idx)
            function.queue.append((input_id, call, item.input))
            taken.append(
                api_pb2.FunctionPutInputsResponseItem(
                    idx=item.idx, input_id=input_id, input_jwt=ticket(item.idx, input_id)
                )
            )
        call.num_inputs += len(taken)
        function.bell.ring()
        self._start_containers(function)
        return taken

    def _start_containers(self, function: Function) -> None:
        while function.num_containers < min(self._max_containers, len(function.queue)):
            function.num_containers += 1
            task = asyncio.create_task(self._run_container(function))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def FunctionGetOutputs(self, request, context):
        call = self._calls[request.function_call_id]
        start = int(request.last_entry_id.partition("-")[0] or 0) if not request.HasField("start_idx") else 0
        await call.bell.wait_until(lambda: len(call.outputs) > start, request.timeout)
        outputs = call.outputs[start : start + 100]
        return api_pb2.FunctionGetOutputsResponse(
            outputs=outputs,
            last_entry_id=f"{start + len(outputs)}-0",
            num_unfinished_inputs=call.num_inputs - len(call.outputs),
        )

    # ---- containers ---------------------------------------------------------------------------------------

    async def ContainerHello(self, request, context):
        return Empty()

    async def ContainerHeartbeat(self, request, context):
        await asyncio.sleep(10)
        return api_pb2.ContainerHeartbeatResponse()

    async def FunctionGetInputs(self, request, context):
        function = self._tasks[_task_id.get()]
        await function.bell.wait_until(lambda: function.queue or function.app_id in self._ended, IDLE_S)
        if not function.queue:
            return api_pb2.FunctionGetInputsResponse(inputs=[api_pb2.FunctionGetInputsItem(kill_switch=True)])
        input_id, call, message = function.queue.popleft()
        if function.definition.single_use_containers:
            message.final_input = True
        item = api_pb2.FunctionGetInputsItem(
            input_id=input_id,
            input=message,
            function_call_id=call.call_id,
            function_call_invocation_type=api_pb2.FUNCTION_CALL_INVOCATION_TYPE_SYNC,
        )
        return api_pb2.FunctionGetInputsResponse(inputs=[item])

    async def FunctionPutOutputs(self, request, context):
        for output in request.outputs:
            call, idx = self._inputs.pop(output.input_id)
            call.outputs.append(
                api_pb2.FunctionGetOutputsItem(
                    result=output.result, idx=idx, input_id=output.input_id, data_format=output.data_format
                )
            )
            call.bell.ring()
        return Empty()

    async def _run_container(self, function: Function) -> None:
        task_id = new_id("ta")
        self._tasks[task_id] = function
        layout = api_pb2.AppLayout(function_ids=self._layouts.get(function.app_id, {}))
        for function_id in layout.function_ids.values():
            handle = self._functions[function_id].handle
            layout.objects.add(object_id=function_id, function_handle_metadata=handle)
        for object_id in self._objects:
            layout.objects.add(object_id=object_id)
        arguments = self._folder / f"{task_id}.pb"
        arguments.write_bytes(
            api_pb2.ContainerArguments(
                task_id=task_id,
                function_id=function.function_id,
                app_id=function.app_id,
                function_def=function.definition,
                environment_name="main",
                app_layout=layout,
            ).SerializeToString()
        )
        socket = self._folder / f"{task_id}.sock"
        server = grpc.aio.server(interceptors=[_Identity(task_id)], options=OPTIONS)
        api_pb2_grpc.add_ModalClientServicer_to_server(self, server)
        server.add_insecure_port(f"unix:{socket}")
        await server.start()
        env = {name: value for name, value in os.environ.items() if not name.startswith("MODAL_TOKEN")}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "modal._container_entrypoint",
            stdin=asyncio.subprocess.DEVNULL,
            env={
                **env,
                "MODAL_SERVER_URL": f"unix://{socket}",
                "MODAL_IS_REMOTE": "1",
                "MODAL_TASK_ID": task_id,
                "MODAL_CONTAINER_ARGUMENTS_PATH": str(arguments),
                "PYTHONPATH": os.environ.get("NULL_CODE", ""),
            },
        )  # fmt: skip
        self._processes.append(process)
        await process.wait()
        await server.stop(None)
        function.num_containers -= 1
        self._start_containers(function)

    def end(self) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.kill()


class _Identity(grpc.aio.ServerInterceptor):
    """Which container calls: each has a socket of its own."""

    def __init__(self, task_id: str):
        self._task_id = task_id

    async def intercept_service(self, continuation, details):
        _task_id.set(self._task_id)
        return await continuation(details)


def _handle(described, app_id: str) -> api_pb2.FunctionHandleMetadata:
    return api_pb2.FunctionHandleMetadata(
        function_name=described.function_name,
        function_type=described.function_type,
        app_id=app_id,
        supported_input_formats=described.supported_input_formats,
        supported_output_formats=described.supported_output_formats,
    )


async def main(port: int, max_containers: int) -> None:
    null = NullServer(max_containers)
    server = grpc.aio.server(options=OPTIONS)
    api_pb2_grpc.add_ModalClientServicer_to_server(null, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    null.end()
    await server.stop(0.2)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
