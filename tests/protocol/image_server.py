"""All services of the server and a worker's real agent, in the test's own process; builds and containers are scripted.

What is real: the database, the link between server and worker, the RPCs, the client. What is not: nothing is built,
and a "container" is a task that speaks on its container's socket.
"""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
from modal_proto import api_pb2, api_pb2_grpc

from aeolian.cli import client_token
from aeolian.cli.services import Services
from aeolian.cli.settings import Settings
from aeolian.domain.containers import ExitStatus
from aeolian.domain.errors import FailedPrecondition
from aeolian.domain.images import ImageSpec
from aeolian.protocol.service import ModalService
from aeolian.storage import migrate
from aeolian.worker.agent import Agent
from aeolian.worker.hooks.base import FunctionHook, Start
from aeolian.worker.images.store import ImageStore, StoredImage
from aeolian.worker.splice import Splice

INFO = {"python_version": "3.11.7", "workdir": "/work", "libc_version": "glibc 2.36", "python_packages": '{"pip": "1"}'}


class ScriptedBuilder:
    """Builds what it is told to by putting a description into the store. Dockerfile lines are its script:

    `SAY text` is output, `WAIT` waits for the test, `FAIL text` fails.
    """

    def __init__(self, store: ImageStore):
        self._store = store
        self.built: list[tuple[str, ImageSpec, dict[str, str], bool]] = []
        self.go_on = asyncio.Event()
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def build(self, image_id, spec, env, on_log, *, force=False):
        self.built.append((image_id, spec, env, force))
        for line in spec.dockerfile_commands:
            if line.startswith("RUN SAY "):
                on_log(1, line.removeprefix("RUN SAY ") + "\n")
            elif line == "RUN WAIT":
                self.waiting.set()
                try:
                    await self.go_on.wait()
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
            elif line.startswith("RUN FAIL "):
                on_log(2, "about to fail\n")
                raise FailedPrecondition(f"`{line}` failed with exit code 1")
        self._store.put(StoredImage(image_id, info=INFO))
        return INFO


class TaskRuntime:
    """Containers that are tasks: `main(stub, start, stdout)` is what runs inside; it returns the exit code."""

    name = "process"

    def __init__(self, main: Callable[[api_pb2_grpc.ModalClientStub, Start, asyncio.StreamReader], Awaitable[int]]):
        self._main = main

    def hooks(self):
        async def make_upper(start: Start) -> None:
            start.upper = start.folder / "upper"
            start.upper.mkdir()

        return [FunctionHook("upper", make_upper)]

    async def start(self, start: Start) -> "TaskContainer":
        return TaskContainer(self._main, start)

    async def prepare(self, image_id: str, sdk_version: str, builder_version: str) -> None:
        pass


class TaskContainer:
    pid = 0

    def __init__(self, main, start: Start):
        self.stdout, self.stderr = asyncio.StreamReader(), asyncio.StreamReader()
        self._main = main
        self._task = asyncio.create_task(self._run(start))

    async def _run(self, start: Start) -> int:
        try:
            async with grpc.aio.insecure_channel(f"unix:{start.socket_path}") as channel:
                return await self._main(api_pb2_grpc.ModalClientStub(channel), start, self.stdout)
        finally:
            self.stdout.feed_eof()
            self.stderr.feed_eof()

    async def wait(self) -> ExitStatus:
        with contextlib.suppress(asyncio.CancelledError):
            return ExitStatus(await asyncio.shield(self._task))
        return ExitStatus(-9)

    def signal(self, number) -> None:
        self._task.cancel()

    def kill(self) -> None:
        self._task.cancel()

    async def release(self) -> None:
        pass


async def no_containers(stub, start: Start, stdout: asyncio.StreamReader) -> int:
    return 1


class ImageServer:
    def __init__(self, data_dir: Path, main=no_containers):
        self.settings = Settings(
            data_dir=data_dir, grpc_port=0, http_port=0, grpc_url="", http_url="http://127.0.0.1:9"
        )
        for folder in (self.settings.keys_dir, self.settings.run_dir):
            folder.mkdir(parents=True)
        migrate.upgrade(self.settings.database)
        self.store = ImageStore(data_dir)
        self.builder = ScriptedBuilder(self.store)
        self._runtime = TaskRuntime(main)

    async def __aenter__(self) -> "ImageServer":
        self._front = Splice(self.settings.grpc_socket)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        await self._front.listen(sock)
        await self.start_server()
        await self.start_worker()
        return self

    async def __aexit__(self, *error) -> None:
        await self.stop_worker()
        await self.stop_server()
        await self._front.close()

    async def start_server(self) -> None:
        self.services = await Services(self.settings).__aenter__()
        self._server = grpc.aio.server()
        service = ModalService(self.services.resources(), self.services.authenticate, open_methods=frozenset())
        self._server.add_generic_rpc_handlers((service, self.services.worker_calls))
        self.settings.grpc_socket.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{self.settings.grpc_socket}")
        await self.services.links.start(self.settings.worker_socket)
        await self._server.start()

    async def stop_server(self) -> None:
        await self._server.stop(0)
        await self.services.links.stop()
        await self.services.__aexit__(None, None, None)

    async def start_worker(self) -> None:
        self._agent = Agent(
            worker_id="wo-1",
            containers_dir=self.settings.data_dir / "containers",
            link_socket=self.settings.worker_socket,
            rpc_socket=self.settings.grpc_socket,
            token=(self.settings.keys_dir / "worker-token").read_text(),
            runtime=self._runtime,
            images=self.store,
            builder=self.builder,
        )
        await self._agent.open()

    async def stop_worker(self) -> None:
        await self._agent.close(5)

    # ---- clients ----------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def stub(self):
        """RPCs as a client sends them."""
        token = client_token.load(self.settings)
        metadata = (
            ("x-modal-token-id", token.token_id),
            ("x-modal-token-secret", token.token_secret),
            ("x-modal-client-version", "1.6.4"),
            ("x-modal-client-type", "1"),
        )
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            stub = api_pb2_grpc.ModalClientStub(channel)

            class WithToken:
                def __getattr__(self, name):
                    return lambda request, **options: getattr(stub, name)(request, metadata=metadata, **options)

            yield WithToken()

    async def an_app(self, stub) -> str:
        request = api_pb2.AppCreateRequest(description="images", app_state=api_pb2.APP_STATE_EPHEMERAL)
        return (await stub.AppCreate(request)).app_id

    async def start(self, *argv: str, cwd: Path | None = None) -> asyncio.subprocess.Process:
        """The official client, as a process of its own."""
        token = client_token.load(self.settings)
        own = {name: value for name, value in os.environ.items() if not name.startswith("MODAL_")}
        environment = {
            **own,
            "MODAL_SERVER_URL": f"http://127.0.0.1:{self.port}",
            "MODAL_TOKEN_ID": token.token_id,
            "MODAL_TOKEN_SECRET": token.token_secret,
            "MODAL_CONFIG_PATH": "/dev/null",
            "COLUMNS": "200",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
        }
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *argv,
            cwd=cwd,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )

    async def run(self, *argv: str, cwd: Path | None = None, ok: bool = True) -> str:
        return await output_of(await self.start(*argv, cwd=cwd), ok=ok)

    async def modal(self, *args: str, **options) -> str:
        return await self.run("-m", "modal", *args, **options)


async def output_of(process: asyncio.subprocess.Process, *, ok: bool = True) -> str:
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 60)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise
    text = output.decode()
    assert (process.returncode == 0) == ok, text
    return text
