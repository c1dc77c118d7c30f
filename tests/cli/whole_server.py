"""The server as `aeolian up` runs it, all its services behind its real sockets, in the test's own process."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import grpc
import msgspec
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from modal_proto import api_pb2

from aeolian.cli import client_token
from aeolian.cli.server import GRPC_OPTIONS
from aeolian.cli.services import Services
from aeolian.cli.settings import Settings, create_folders
from aeolian.domain.containers import ContainerState
from aeolian.domain.link import (
    AssignInputs,
    Command,
    ContainerChanged,
    ContainerReport,
    Event,
    Hello,
    StartContainer,
    WantInputs,
    decode_commands,
)
from aeolian.protocol.service import SERVICE, SERVICE_PATH, ModalService, collect
from aeolian.protocol.token_flows import OPEN_METHODS
from aeolian.storage import migrate
from aeolian.worker.framing import FrameLink
from aeolian.worker.link import TASK_KEY, TOKEN_KEY

METHODS = {method.name: method for method in SERVICE.methods}
CLIENT = (("x-modal-client-type", "1"), ("x-modal-client-version", "1.6.4"), ("x-modal-python-version", "3.11.7"))


class Reply(msgspec.Struct, frozen=True):
    """How an RPC ended: its code, and its message or (of a stream) messages."""

    code: grpc.StatusCode
    text: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def message(self) -> Message:
        assert self.code is grpc.StatusCode.OK, f"{self.code.name}: {self.text}"
        return self.messages[0]


class WholeServer:
    def __init__(self, settings: Settings, services: Services, channel: grpc.aio.Channel, extra: list[object]):
        self.settings = settings
        self.services = services
        self.built = frozenset(collect([*services.resources(), *extra]))
        """Names of the RPCs that are implemented."""
        self._channel = channel
        token = client_token.load(settings)
        self.token = (("x-modal-token-id", token.token_id), ("x-modal-token-secret", token.token_secret))

    async def call(
        self,
        name: str,
        request: Message | bytes = b"",
        *,
        key: str = "",
        metadata: tuple[tuple[str, str], ...] | None = None,
        timeout_s: float = 5.0,
    ) -> Reply:
        """Send bytes or a message, as the client with the first token. Streams are read until they end, or wait."""
        raw = request if isinstance(request, bytes) else request.SerializeToString()
        fields = (*CLIENT, *(self.token if metadata is None else metadata))
        if key:
            fields = (*fields, ("x-idempotency-key", key))
        method = METHODS[name]
        kind = GetMessageClass(method.output_type)
        messages: list[Message] = []
        try:
            if method.server_streaming:
                stream = self._channel.unary_stream(SERVICE_PATH + name)
                async for reply in stream(raw, metadata=fields, timeout=timeout_s):
                    messages.append(kind.FromString(reply))
            else:
                call = self._channel.unary_unary(SERVICE_PATH + name)
                messages.append(kind.FromString(await call(raw, metadata=fields, timeout=timeout_s)))
        except grpc.aio.AioRpcError as error:
            return Reply(error.code(), error.details() or "", tuple(messages))
        return Reply(grpc.StatusCode.OK, "", tuple(messages))

    async def deploy(self, name: str = "app", function: str = "f", environment: str = "") -> tuple[str, str]:
        """An App with one Function, as `modal deploy` makes it: (app id, function id)."""
        app = await self.call(
            "AppGetOrCreate",
            api_pb2.AppGetOrCreateRequest(
                app_name=name,
                environment_name=environment,
                object_creation_type=api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING,
            ),
        )
        app_id = app.message.app_id
        created = await self.call(
            "FunctionCreate",
            api_pb2.FunctionCreateRequest(
                app_id=app_id,
                function=api_pb2.Function(
                    function_name=function,
                    module_name="user",
                    function_type=api_pb2.Function.FUNCTION_TYPE_FUNCTION,
                    definition_type=api_pb2.Function.DEFINITION_TYPE_FILE,
                    timeout_secs=300,
                ),
            ),
        )
        function_id = created.message.function_id
        published = await self.call(
            "AppPublish",
            api_pb2.AppPublishRequest(
                app_id=app_id,
                name=name,
                app_state=api_pb2.APP_STATE_DEPLOYED,
                function_ids={function: function_id},
                definition_ids={function_id: created.message.handle_metadata.definition_id},
            ),
        )
        assert published.code is grpc.StatusCode.OK, published.text
        return app_id, function_id

    async def worker(self, worker_id: str = "wo-test") -> "SomeWorker":
        """One that is connected and starts what it is told to start."""
        worker = SomeWorker(self, worker_id)
        await worker.connect()
        return worker


class SomeWorker:
    """A worker's end of the link, played by the test."""

    def __init__(self, server: WholeServer, worker_id: str):
        self.worker_id = worker_id
        self.token = (server.settings.keys_dir / "worker-token").read_text()
        self.commands: list[Command] = []
        self._path = str(server.settings.worker_socket)
        self._came = asyncio.Event()
        self._link: FrameLink | None = None
        self.lost = asyncio.Event()

    async def connect(self, containers: Iterable[ContainerReport] = (), life: str = "life-1") -> None:
        loop = asyncio.get_running_loop()
        self.lost.clear()
        _, self._link = await loop.create_unix_connection(lambda: FrameLink(self._frame, self.lost.set), self._path)
        self._link.send_frame(self.token.encode())
        self.send(Hello(self.worker_id, life, ("process",), 4000, 8000, containers=tuple(containers)))
        await self.told(lambda command: type(command).__name__ == "Welcome")

    def send(self, *events: Event) -> None:
        assert self._link is not None
        for event in events:
            self._link.send(event)

    async def hang_up(self) -> None:
        assert self._link is not None
        self._link.close()
        await self.lost.wait()

    def _frame(self, frame: bytes) -> None:
        self.commands += decode_commands(frame)
        self._came.set()

    async def told(self, wanted: Callable[[Command], bool] | type, timeout_s: float = 5.0):
        """The next command of that kind; it is taken out of `commands`."""
        fits = (lambda command: isinstance(command, wanted)) if isinstance(wanted, type) else wanted
        async with asyncio.timeout(timeout_s):
            while (found := next((command for command in self.commands if fits(command)), None)) is None:
                self._came.clear()
                await self._came.wait()
        self.commands.remove(found)
        return found

    async def started(self, *, runs: bool = True) -> str:
        """The id of the next container that it is told to start."""
        task_id = (await self.told(StartContainer)).spec.task_id
        self.send(ContainerChanged(task_id, ContainerState.STARTING.value, 1.0))
        if runs:
            self.send(ContainerChanged(task_id, ContainerState.RUNNING.value, 2.0))
        return task_id

    async def given(self, task_id: str, seq: int = 1) -> AssignInputs:
        """What the container gets when it asks for its next inputs."""
        self.send(WantInputs(task_id, seq))
        return await self.told(lambda command: isinstance(command, AssignInputs) and command.task_id == task_id)

    def as_container(self, task_id: str) -> tuple[tuple[str, str], ...]:
        """The metadata of an RPC that passes through from a container."""
        return (TASK_KEY, task_id), (TOKEN_KEY, self.token)


@contextlib.asynccontextmanager
async def whole_server(
    data_dir: Path, *, resources: Callable[[Services], list[object]] = lambda services: []
) -> AsyncIterator[WholeServer]:
    """On a data directory, which may be one that another has left. `resources`: what answers further RPCs."""
    create_folders(data_dir)
    settings = Settings(
        data_dir=data_dir, grpc_port=1, http_port=1, grpc_url="http://127.0.0.1:1", http_url="http://127.0.0.1:1"
    )
    migrate.upgrade(settings.database)
    async with Services(settings) as services:
        server = grpc.aio.server(options=GRPC_OPTIONS)
        extra = resources(services)
        service = ModalService(
            [*services.resources(), *extra],
            services.authenticate,
            open_methods=OPEN_METHODS,
            guard=services.guard,
        )
        server.add_generic_rpc_handlers((service, services.worker_calls))
        server.add_insecure_port(f"unix:{settings.grpc_socket}")
        await services.gateway.start(settings.http_socket)
        await services.links.start(settings.worker_socket)
        await server.start()
        channel = grpc.aio.insecure_channel(f"unix:{settings.grpc_socket}", options=GRPC_OPTIONS)
        try:
            yield WholeServer(settings, services, channel, extra)
        finally:
            await channel.close()
            await server.stop(0)
            await services.links.stop()
            await services.gateway.stop()


def new_key() -> str:
    return str(uuid.uuid4())
