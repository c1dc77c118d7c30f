"""The worker's side of a fork server (`zygote.py`): starting it, asking it for containers, noticing its death."""

import array
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec

from aeolian.domain.containers import ExitStatus
from aeolian.domain.errors import FailedPrecondition, Unavailable
from aeolian.domain.execs import Command
from aeolian.worker.runtimes.entering import EnteredCommand, Entry

SCRIPT = Path(__file__).with_name("zygote.py")
ENTERING = Path(__file__).with_name("enter.py")
READY_TIMEOUT_S = 60.0
STARTED_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 8.0
STREAM_LIMIT_BYTES = 1 << 20
LOG_TAIL_BYTES = 2000


class ZygoteConfig(msgspec.Struct, frozen=True):
    """What one fork server is: an interpreter in a view, with the SDK imported or not."""

    python: str
    env: dict[str, str]
    view: dict | None
    """As `view.enter` takes it; None where the host offers no namespaces."""
    preload: bool
    own_pids: bool


class Zygote:
    """One fork server. Its containers outlive it; the worker's end ends both."""

    def __init__(self, process: asyncio.subprocess.Process, sock: socket.socket, log: Path):
        self._process = process
        self._sock = sock
        self._log = log
        self._lock = asyncio.Lock()
        self.own_pids = False
        self.is_preloaded = False
        self.why_not_preloaded = ""

    @classmethod
    async def start(cls, config: ZygoteConfig, log: Path) -> "Zygote":
        """Start it and wait until it can fork. Raises FailedPrecondition with the end of its log."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        arguments = {**msgspec.structs.asdict(config), "descriptor": theirs.fileno(), "worker_pid": os.getpid()}
        with log.open("ab") as stream:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", str(SCRIPT), json.dumps(arguments),
                pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL, stdout=stream, stderr=stream,
                env={"PATH": os.environ.get("PATH", os.defpath)}, cwd="/", start_new_session=True,
            )  # fmt: skip
        theirs.close()
        zygote = cls(process, ours, log)
        zygote.own_pids = config.own_pids
        try:
            ready = json.loads(await asyncio.wait_for(zygote._line(), READY_TIMEOUT_S))
        except BaseException as error:
            await zygote.close()
            if not isinstance(error, ValueError | EOFError | TimeoutError | OSError):
                raise
            raise FailedPrecondition(
                f"the fork server for {config.python} did not start: {zygote._last_words()}"
            ) from None
        zygote.is_preloaded, zygote.why_not_preloaded = ready["preloaded"], ready["reason"]
        return zygote

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        return await self._process.wait()

    async def fork(self, stdout: int, stderr: int, control: socket.socket) -> int:
        """Fork one container's `init`, which waits for its request on `control`; return its pid.

        Raises Unavailable when the fork server has died.
        """
        loop = asyncio.get_running_loop()
        descriptors = array.array("i", [stdout, stderr, control.fileno()])
        async with self._lock:
            try:
                self._sock.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
                reply = b""
                while len(reply) < 4:
                    chunk = await loop.sock_recv(self._sock, 4 - len(reply))
                    if not chunk:
                        raise ConnectionError("hung up")
                    reply += chunk
            except OSError as error:
                raise Unavailable(f"the fork server has died ({error}): {self._last_words()}") from None
        return int.from_bytes(reply, "little")

    async def close(self) -> None:
        self._sock.close()
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()

    async def _line(self) -> bytes:
        loop = asyncio.get_running_loop()
        line = b""
        while not line.endswith(b"\n"):
            chunk = await loop.sock_recv(self._sock, 4096)
            if not chunk:
                raise EOFError
            line += chunk
        return line

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            return self._log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace").strip() or "it said nothing"
        return "it said nothing"


class ForkedContainer:
    """A container whose `init` was forked by a zygote. A RunningContainer (runtimes/base.py)."""

    def __init__(self, pid: int, work: Path | None):
        self.pid = pid
        """The container's first process (`init`), as the host numbers it."""
        self.stdout: asyncio.StreamReader
        self.stderr: asyncio.StreamReader
        self._work = work
        self._exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._writer: asyncio.StreamWriter
        self._reading: asyncio.Task | None = None
        self._pidfd: int | None = None
        self._gone: asyncio.Future[None] | None = None
        self._transports: list[asyncio.BaseTransport] = []
        self._entry: Entry

    @classmethod
    async def start(cls, zygote: Zygote, request: dict, work: Path | None = None) -> "ForkedContainer":
        """Fork and hand over the request; returns when the main process runs.

        Raises Unavailable (the zygote died) or FailedPrecondition (its view could not be built).
        """
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        readers, writers = zip(os.pipe(), os.pipe(), strict=True)
        self = None
        try:
            pid = await zygote.fork(*writers, theirs)
            self = cls(pid, work)
            self._watch(loop)
        finally:
            for descriptor in writers:
                os.close(descriptor)
            theirs.close()
            if self is None:
                ours.close()
                for descriptor in readers:
                    os.close(descriptor)
        self.stdout, self.stderr = [await self._read_pipe(loop, descriptor) for descriptor in readers]
        control, self._writer = await asyncio.open_connection(sock=ours, limit=STREAM_LIMIT_BYTES)
        try:
            self._writer.write(json.dumps(request).encode() + b"\n")
            line = await asyncio.wait_for(control.readline(), STARTED_TIMEOUT_S)
            answer = json.loads(line) if line else {"failed": "its first process died at once"}
            if "failed" in answer:
                raise FailedPrecondition(f"the container could not be started: {answer['failed']}")
        except BaseException:
            self._exited.set_result(-signal.SIGKILL)
            self._kill_init()
            await self.release()
            raise
        self._reading = asyncio.create_task(self._read_control(control))
        self._entry = _entry(pid, request, own_pids=zygote.own_pids)
        return self

    async def wait(self) -> ExitStatus:
        exit_code = await asyncio.shield(self._exited)
        if self._gone is not None:
            await asyncio.shield(self._gone)
        return ExitStatus(exit_code)

    def signal(self, number: signal.Signals) -> None:
        self._say({"signal": int(number)})

    def kill(self) -> None:
        self._say({"kill": True})
        asyncio.get_running_loop().call_later(KILL_TIMEOUT_S, self._kill_init)

    async def exec(self, command: Command) -> EnteredCommand:
        return await EnteredCommand.start(self._entry, command)

    async def release(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
            self._reading = None
        with contextlib.suppress(OSError):
            self._writer.close()
        for transport in self._transports:
            transport.close()
        self._transports.clear()
        self._unwatch()
        if self._work is not None:  # overlayfs leaves folders that nobody may list
            for folder in self._work.glob("*/work"):
                with contextlib.suppress(OSError):
                    folder.chmod(0o700)

    async def _read_pipe(self, loop: asyncio.AbstractEventLoop, descriptor: int) -> asyncio.StreamReader:
        reader = asyncio.StreamReader(limit=STREAM_LIMIT_BYTES)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
        )
        self._transports.append(transport)
        return reader

    async def _read_control(self, control: asyncio.StreamReader) -> None:
        exit_code = -int(signal.SIGKILL)  # `init` itself was killed
        try:
            while line := await control.readline():
                message = json.loads(line)
                exit_code = message.get("exited", exit_code)
                if "exited" in message:
                    break
        except (OSError, ValueError):
            pass
        if not self._exited.done():
            self._exited.set_result(exit_code)

    def _say(self, message: dict) -> None:
        if not self._exited.done() and not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Learn the end of `init` from the kernel: it is no child of ours."""
        if not hasattr(os, "pidfd_open"):
            return
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:
            return
        self._gone = loop.create_future()
        loop.add_reader(self._pidfd, self._unwatch)

    def _unwatch(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def _kill_init(self) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


def _entry(pid: int, request: dict, *, own_pids: bool) -> Entry:
    """The way into the container of this `init`: through its namespaces, as far as it has any."""
    view = request["view"]
    namespaces = []
    if view is not None:
        namespaces = ["user"] * view["user_namespace"] + ["mnt"] + ["pid"] * own_pids
    env = [f"{name}={value}" for name, value in request["env"].items()]
    process = {"env": env, "cwd": request["cwd"], "namespaces": namespaces}
    return Entry((sys.executable, "-I", str(ENTERING), "exec"), str(pid), process)
