"""The server's end of a worker's link, and containers that do what a test says."""

import asyncio
import signal
from pathlib import Path

import grpc
from modal_proto import api_pb2

from aeolian.domain.containers import ContainerSpec, ContainerState, ExitStatus
from aeolian.domain.link import (
    AckExit,
    AckLogs,
    AckOutputs,
    AssignInputs,
    Command,
    ContainerChanged,
    Event,
    HeldInput,
    Hello,
    Logs,
    Outputs,
    StartContainer,
    Welcome,
    decode_events,
)
from aeolian.worker.agent import Agent
from aeolian.worker.framing import FrameLink
from aeolian.worker.hooks.base import Hook, Start

SERVICE = "/modal.client.ModalClient/"


class SomeServer:
    """Takes one connection at a time; `events` are what came, over all connections."""

    def __init__(self, path: Path):
        self.path = path
        self.events: list[Event] = []
        self._server: asyncio.Server | None = None
        self._link: FrameLink | None = None
        self._came = asyncio.Event()
        self._acknowledges = False

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._connection, str(self.path))

    async def stop(self) -> None:
        """As when it is killed: the connection is gone, and nobody listens."""
        assert self._server is not None
        self._server.close()
        self.path.unlink()
        if self._link is not None:
            self._link.abort()
        self._link = None

    def _connection(self) -> FrameLink:
        self._link = link = FrameLink(lambda token: setattr(link, "_on_frame", self._frame), lambda: None)
        return link

    def _frame(self, frame: bytes) -> None:
        for event in decode_events(frame):
            self.events.append(event)
            if isinstance(event, Hello):
                self.send(Welcome())
            if self._acknowledges:
                self._acknowledge(event)
        self._came.set()

    def send(self, *commands: Command) -> None:
        assert self._link is not None
        for command in commands:
            self._link.send(command)

    def acknowledge_all(self) -> None:
        """What has come, and what will."""
        self._acknowledges = True
        for event in self.events:
            self._acknowledge(event)

    def _acknowledge(self, event: Event) -> None:
        match event:
            case Outputs():
                self.send(AckOutputs(event.task_id, event.seq))
            case Logs():
                self.send(AckLogs(event.seq))
            case ContainerChanged(state=ContainerState.EXITED):
                self.send(AckExit(event.task_id))

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    async def heard(self, kind: type, count: int = 1, timeout_s: float = 10.0):
        """The `count`-th event of that kind, when it has come."""
        async with asyncio.timeout(timeout_s):
            while len(found := self.of(kind)) < count:
                self._came.clear()
                await self._came.wait()
        return found[count - 1]


class SomeRuntime:
    """Starts containers that are played by the test."""

    name = "played"

    def __init__(self) -> None:
        self.started: asyncio.Queue[PlayedContainer] = asyncio.Queue()

    def hooks(self) -> list[Hook]:
        return []

    async def start(self, start: Start) -> "PlayedContainer":
        container = PlayedContainer(start)
        self.started.put_nowait(container)
        return container

    async def prepare(self, image_id: str, sdk_version: str, builder_version: str) -> None: ...


class PlayedContainer:
    """Runs until the test, or a signal, ends it."""

    pid = 0

    def __init__(self, start: Start):
        self.task_id = start.spec.task_id
        self.stdout, self.stderr = asyncio.StreamReader(), asyncio.StreamReader()
        self.signals: list[int] = []
        self._exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._channel = grpc.aio.insecure_channel(f"unix:{start.socket_path}")

    # ---- for the worker ---------------------------------------------------------------------------------

    async def wait(self) -> ExitStatus:
        return ExitStatus(await asyncio.shield(self._exited))

    def signal(self, number: signal.Signals) -> None:
        self.signals.append(int(number))

    def kill(self) -> None:
        self.signals.append(int(signal.SIGKILL))
        self.end(-int(signal.SIGKILL))

    async def release(self) -> None:
        await self._channel.close()

    # ---- for the test -----------------------------------------------------------------------------------

    def end(self, code: int = 0) -> None:
        for stream in (self.stdout, self.stderr):
            if not stream.at_eof():
                stream.feed_eof()
        if not self._exited.done():
            self._exited.set_result(code)

    async def call(self, name: str, request: bytes = b"", **kwargs) -> bytes:
        return await self._channel.unary_unary(SERVICE + name)(request, wait_for_ready=True, **kwargs)

    async def get_inputs(self) -> list[api_pb2.FunctionGetInputsItem]:
        return list(api_pb2.FunctionGetInputsResponse.FromString(await self.call("FunctionGetInputs")).inputs)

    async def put_output(self, input_id: str, data: bytes = b"done") -> None:
        item = api_pb2.FunctionPutOutputsItem(
            input_id=input_id, result={"status": api_pb2.GenericResult.GENERIC_STATUS_SUCCESS, "data": data}
        )
        request = api_pb2.FunctionPutOutputsRequest(outputs=[item])
        await self.call("FunctionPutOutputs", request.SerializeToString())


class SomeImages:
    def ids(self, *, over_host: bool = False) -> list[str]:
        return []


def an_agent(folder: Path, runtime: SomeRuntime) -> Agent:
    return Agent(
        worker_id="wo-1",
        containers_dir=folder / "containers",
        link_socket=folder / "worker.sock",
        rpc_socket=folder / "grpc.sock",
        token="secret",
        runtime=runtime,
        images=SomeImages(),
        builder=None,
    )


def start_of(task_id: str = "ta-1", **spec) -> StartContainer:
    return StartContainer(
        ContainerSpec(task_id, app_id="ap-1", function_id="fu-1", environment_name="main", image_id="im-1", **spec)
    )


def assignment(task_id: str, seq: int, *input_ids: str) -> AssignInputs:
    items = [api_pb2.FunctionGetInputsItem(input_id=input_id, function_call_id="fc-1") for input_id in input_ids]
    return AssignInputs(
        task_id,
        seq,
        tuple(HeldInput(input_id, 0) for input_id in input_ids),
        tuple(i.SerializeToString() for i in items),
    )
