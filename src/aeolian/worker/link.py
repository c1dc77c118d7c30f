"""The worker's connection to its server: dialled again and again while the server is away."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import grpc
import msgspec

from aeolian.domain.errors import Unavailable
from aeolian.domain.link import Command, Event, Heartbeat, Hello, decode_commands
from aeolian.worker.framing import FrameLink

log = logging.getLogger(__name__)

REDIAL_S = (0.02, 0.05, 0.1, 0.2, 0.5)
HEARTBEAT_S = 5.0
VOLUMES_METHOD = "/aeolian.Worker/Volumes"
TOKEN_KEY = "x-aeolian-worker-token"
TASK_KEY = "x-aeolian-task-id"
MAX_MESSAGE = 256 << 20
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_reconnect_backoff_ms", 300),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.enable_retries", 0),
]
CALL_TIMEOUT_S = 60.0


class ServerLink:
    """Events go up, commands come down. What must not get lost is repeated by whoever owns it after each `Hello`."""

    def __init__(
        self,
        link_socket: Path,
        rpc_socket: Path,
        token: str,
        hello: Callable[[], Hello],
        on_command: Callable[[Command], None],
        on_connected: Callable[[], None],
    ):
        self._path = link_socket
        self._token = token
        self._hello = hello
        self._on_command = on_command
        self._on_connected = on_connected
        self._link: FrameLink | None = None
        self._lost = asyncio.Event()
        self._task: asyncio.Task | None = None
        self.channel = grpc.aio.insecure_channel(f"unix:{rpc_socket}", options=CHANNEL_OPTIONS)
        """For the RPCs that pass through."""
        self._volumes = self.channel.unary_unary(VOLUMES_METHOD)

    def open(self) -> None:
        self._task = asyncio.create_task(self._keep_connected(), name="server-link")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._link is not None:
            self._link.close()
        await self.channel.close()

    @property
    def is_connected(self) -> bool:
        return self._link is not None and self._link.is_open

    def send(self, event: Event) -> None:
        """Dropped while the server is away."""
        if self._link is not None:
            self._link.send(event)

    async def call_volumes(self, method: str, request: bytes) -> bytes:
        """What `LinkedVolumeAuthority` needs."""
        message = msgspec.msgpack.encode((method, request))
        metadata = ((TOKEN_KEY, self._token),)
        try:
            return await self._volumes(message, metadata=metadata, timeout=CALL_TIMEOUT_S, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"the server does not answer ({error.code().name})") from error

    async def _keep_connected(self) -> None:
        attempt = 0
        loop = asyncio.get_running_loop()
        while True:
            self._lost.clear()
            try:
                _, link = await loop.create_unix_connection(
                    lambda: FrameLink(self._frame_received, self._lost.set), str(self._path)
                )
            except OSError:
                await asyncio.sleep(REDIAL_S[min(attempt, len(REDIAL_S) - 1)])
                attempt += 1
                if attempt == 20:
                    log.warning("the server has been away for a while; still dialling %s", self._path)
                continue
            if attempt >= 20:
                log.info("the server is back")
            attempt = 0
            link.send_frame(self._token.encode())
            link.send(self._hello())
            self._link = link
            self._on_connected()
            try:
                while not self._lost.is_set():
                    try:
                        async with asyncio.timeout(HEARTBEAT_S):
                            await self._lost.wait()
                    except TimeoutError:
                        link.send(Heartbeat(loop.time()))
            finally:
                self._link = None
                link.abort()
            await asyncio.sleep(REDIAL_S[0])

    def _frame_received(self, frame: bytes) -> None:
        for command in decode_commands(frame):
            try:
                self._on_command(command)
            except Exception:
                log.exception("a command of the server could not be carried out: %s", type(command).__name__)
