"""The worker's side of the keeper (`keeper.py`): starting it, asking it for containers, hearing of their ends."""

import array
import asyncio
import collections
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from aeolian.domain.containers import ExitStatus
from aeolian.domain.errors import FailedPrecondition, Unavailable
from aeolian.domain.execs import Command
from aeolian.worker.hooks.base import Bind
from aeolian.worker.runtimes.entering import EnteredCommand, Entry

log = logging.getLogger(__name__)

MODULE = "aeolian.worker.runtimes.keeper"
READY_TIMEOUT_S = 30.0
STARTED_TIMEOUT_S = 60.0
END_TIMEOUT_S = 10.0
STREAM_LIMIT_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 1 << 16
LOG_TAIL_BYTES = 2000
KILLED = -int(signal.SIGKILL)
KILLED_IN_SHELL = 128 + int(signal.SIGKILL)


class Keeper:
    """The keeper process of one worker."""

    def __init__(self, process: asyncio.subprocess.Process, sock: socket.socket):
        self._process = process
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._unsent: collections.deque[tuple[bytes, list[int]]] = collections.deque()
        self._started: dict[str, asyncio.Future[int]] = {}
        self._assigned: dict[str, asyncio.Future[None]] = {}
        self._exited: dict[str, asyncio.Future[int]] = {}
        self._is_alive = True
        self._loop.add_reader(sock, self._receive)

    @classmethod
    async def start(cls, config: dict, log_file: Path, module: str = MODULE) -> "Keeper":
        """Start it, and wait until what a predecessor left is gone. Raises Unavailable with the end of its log."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        arguments = json.dumps({**config, "descriptor": theirs.fileno()})
        with log_file.open("wb") as stream:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", module, arguments, pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL, stdout=stream, stderr=stream, cwd="/",
            )  # fmt: skip
        theirs.close()
        self = cls(process, ours)
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), READY_TIMEOUT_S)
        except BaseException as error:
            await self.close()
            if not isinstance(error, TimeoutError | Unavailable):
                raise
            said = log_file.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace").strip()
            raise Unavailable(f"the keeper of containers did not start: {said or 'it said nothing'}") from None
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._is_alive

    async def run(self, container_id: str, message: dict, *streams: int) -> tuple[int, asyncio.Future[int]]:
        """Start a container; returns the pid of its main process and the future of its exit code.

        `streams`: its stdout and stderr, and its stdin if that is not /dev/null.

        Raises FailedPrecondition with crun's complaint, Unavailable when the keeper has died.
        """
        if not self._is_alive:
            raise Unavailable("the keeper of containers has died: the next container starts a new one")
        started = self._started[container_id] = self._loop.create_future()
        exited = self._exited[container_id] = self._loop.create_future()
        try:
            self._say({"start": container_id, **message}, list(streams))
            pid = await asyncio.wait_for(started, STARTED_TIMEOUT_S)
        except BaseException as error:
            self.kill(container_id)
            await asyncio.wait({exited}, timeout=END_TIMEOUT_S)
            if isinstance(error, TimeoutError):
                raise Unavailable(f"the container did not start within {STARTED_TIMEOUT_S:g} s") from None
            raise
        finally:
            self._started.pop(container_id, None)
        return pid, exited

    async def assign(self, container_id: str, message: dict) -> None:
        """Give a container that was started ahead its root file system and its name (`new_root.py`).

        Raises FailedPrecondition when that did not work, Unavailable when the keeper has died: it is of no use then.
        """
        if not self._is_alive:
            raise Unavailable("the keeper of native containers has died")
        assigned = self._assigned[container_id] = self._loop.create_future()
        try:
            self._say({"assign": container_id, **message})
            await asyncio.wait_for(assigned, STARTED_TIMEOUT_S)
        except TimeoutError:
            raise Unavailable(f"the container was not ready within {STARTED_TIMEOUT_S:g} s") from None
        finally:
            self._assigned.pop(container_id, None)

    def signal(self, container_id: str, number: int) -> None:
        self._say({"signal": container_id, "number": number})

    def kill(self, container_id: str) -> None:
        self._say({"kill": container_id})

    async def close(self) -> None:
        """Hang up: it ends what still runs, then itself."""
        self._hung_up()
        try:
            await asyncio.wait_for(self._process.wait(), END_TIMEOUT_S)
        except TimeoutError:
            log.warning("the keeper of containers does not end: it is killed")
            self._process.kill()
            await self._process.wait()

    def _say(self, message: dict, descriptors: list[int] | None = None) -> None:
        if not self._is_alive:
            return
        # A copy: the caller closes its own before a message that waits is sent.
        self._unsent.append((json.dumps(message).encode(), [os.dup(number) for number in descriptors or ()]))
        if len(self._unsent) == 1 and not self._send_one():
            self._loop.add_writer(self._sock, self._send_rest)

    def _send_rest(self) -> None:
        while self._unsent:
            if not self._send_one():
                return
        self._loop.remove_writer(self._sock)

    def _send_one(self) -> bool:
        data, descriptors = self._unsent[0]
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self._sock.sendmsg([data], ancillary)
        except BlockingIOError:
            return False
        except OSError:  # it has died; `_receive` hears of that, too
            pass
        self._unsent.popleft()
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    def _receive(self) -> None:
        try:
            data = self._sock.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if self._is_alive:
                log.error("the keeper of containers has died; its containers have died with it")
            self._hung_up()
            return
        message = json.loads(data)
        if "started" in message:
            if (started := self._started.get(message["started"])) is not None and not started.done():
                started.set_result(message["pid"])
        elif "failed" in message:
            if (started := self._started.get(message["failed"])) is not None and not started.done():
                started.set_exception(FailedPrecondition(f"the container could not be started: {message['error']}"))
        elif "assigned" in message:
            if (assigned := self._assigned.get(message["assigned"])) is not None and not assigned.done():
                assigned.set_result(None)
        elif "unassigned" in message:
            if (assigned := self._assigned.get(message["unassigned"])) is not None and not assigned.done():
                assigned.set_exception(FailedPrecondition(message["error"]))
        elif "exited" in message:
            if (exited := self._exited.pop(message["exited"], None)) is not None:
                exited.set_result(message["code"])
        elif not self._ready.done():
            self._ready.set_result(None)

    def _hung_up(self) -> None:
        if not self._is_alive:
            return
        self._is_alive = False
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for _, descriptors in self._unsent:
            for descriptor in descriptors:
                os.close(descriptor)
        self._unsent.clear()
        for future in (self._ready, *self._started.values(), *self._assigned.values()):
            if not future.done():
                future.set_exception(Unavailable("the keeper of containers has died"))
        with contextlib.suppress(asyncio.InvalidStateError):
            self._ready.exception()  # seen, also where nobody waits any more
        for exited in self._exited.values():
            if not exited.done():
                exited.set_result(KILLED)
        self._exited.clear()


class LivingKeeper:
    """The keeper of one runtime: started when it is first needed, and anew when it has died."""

    def __init__(self, config: dict, log_file: Path, module: str = MODULE):
        """`config`: what the keeper process is told, see its module."""
        self._config = config
        self._log_file = log_file
        self._module = module
        self._starting: asyncio.Task[Keeper] | None = None
        self._is_first = True
        """What a predecessor left has not been removed yet."""

    async def get(self) -> Keeper:
        """A keeper that lives; whoever asks while it starts waits. Raises Unavailable when it cannot start."""
        task = self._starting
        if task is None or (task.done() and (task.cancelled() or task.exception() or not task.result().is_alive)):
            task = self._starting = asyncio.create_task(self._start())
        return await asyncio.shield(task)

    async def close(self) -> None:
        if self._starting is not None:
            task, self._starting = self._starting, None
            with contextlib.suppress(Unavailable):
                await (await task).close()

    async def _start(self) -> Keeper:
        keeper = await Keeper.start({**self._config, "is_first": self._is_first}, self._log_file, self._module)
        self._is_first = False
        return keeper


class KeptContainer:
    """A container whose parent is the keeper. A RunningContainer (runtimes/base.py)."""

    def __init__(self, container_id: str, keeper: Keeper, num_oom_kills: Callable[[], int], clean: Callable[[], None]):
        self.id = container_id
        self.pid = 0
        self.stdout: asyncio.StreamReader
        self.stderr: asyncio.StreamReader
        self.entry: Entry | None = None
        """How commands get in."""
        self._keeper = keeper
        self._num_oom_kills = num_oom_kills
        self._clean = clean
        self._exited: asyncio.Future[int]
        self._status: ExitStatus | None = None
        self._transports: list[asyncio.BaseTransport] = []

    @classmethod
    async def start(
        cls,
        container_id: str,
        keeper: Keeper,
        message: dict,
        num_oom_kills: Callable[[], int],
        clean: Callable[[], None],
        stdin: int | None = None,
    ) -> "KeptContainer":
        """`message`: what the keeper needs to know (keeper.py). `clean` runs once, in a thread, when all is over.

        Raises as Keeper.run.
        """
        self = cls(container_id, keeper, num_oom_kills, clean)
        readers, writers = zip(os.pipe(), os.pipe(), strict=True)
        try:
            self.stdout, self.stderr = [await self._read(descriptor) for descriptor in readers]
            self.pid, self._exited = await keeper.run(
                container_id, message, *writers, *([] if stdin is None else [stdin])
            )
        except BaseException:
            await self.release()
            raise
        finally:
            for descriptor in writers:
                os.close(descriptor)
        return self

    async def wait(self) -> ExitStatus:
        exit_code = await asyncio.shield(self._exited)
        if self._status is None:  # read once: its cgroup goes away
            is_killed = exit_code in (KILLED, KILLED_IN_SHELL)
            self._status = ExitStatus(exit_code, oom_killed=is_killed and self._num_oom_kills() > 0)
        return self._status

    async def assign(self, rootfs: Path, binds: Sequence[Bind], hostname: str, oom_score_adj: int) -> None:
        """Raises as Keeper.assign."""
        shown = [(str(bind.source), bind.target, bind.read_only) for bind in binds]
        message = {"rootfs": str(rootfs), "binds": shown, "hostname": hostname, "oom_score_adj": oom_score_adj}
        await self._keeper.assign(self.id, message)

    @property
    def exited(self) -> asyncio.Future[int]:
        """The exit code of its main process, once it has ended."""
        return self._exited

    def signal(self, number: signal.Signals) -> None:
        self._keeper.signal(self.id, int(number))

    def kill(self) -> None:
        self._keeper.kill(self.id)

    async def exec(self, command: Command) -> EnteredCommand:
        if self.entry is None:
            raise FailedPrecondition(f"no command can be run in container {self.id}: its runtime has no way in")
        return await EnteredCommand.start(self.entry, command)

    async def release(self) -> None:
        for transport in self._transports:
            transport.close()
        self._transports.clear()
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._clean)

    async def _read(self, descriptor: int) -> asyncio.StreamReader:
        reader = asyncio.StreamReader(limit=STREAM_LIMIT_BYTES)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
        )
        self._transports.append(transport)
        return reader
