"""One container on this node: its hooks, its process, its RPCs, its logs, its end."""

import asyncio
import contextlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
from modal_proto import api_pb2

from aeolian.domain.containers import ContainerSpec, ContainerState, ExitStatus, HookTiming
from aeolian.domain.errors import AeolianError
from aeolian.domain.link import AssignInputs, CancelInputs, ContainerChanged, ContainerReport, Event, StopContainer
from aeolian.worker.container_inputs import ContainerInputs
from aeolian.worker.hooks.base import Hook, Start
from aeolian.worker.images.overlay_files import remove_tree
from aeolian.worker.logs import LogPump, LogSender
from aeolian.worker.ports import ContainerPorts
from aeolian.worker.rpc import Answer, ContainerServer, ContainerService, parsed
from aeolian.worker.runtimes.base import RunningContainer, Runtime
from aeolian.worker.server_life import ServerLife

log = logging.getLogger(__name__)

STOP_GRACE_S = 30.0
"""Between SIGINT and SIGKILL, as on Modal."""
MIN_DRAIN_S = 10.0
"""A server that is replaced, or not needed any more, may end what it works on for at least so long."""
IDLE_GRACE_S = 3.0
"""How long a container that waits for inputs may take to see that there are none any more."""
PUMP_GRACE_S = 2.0
UNDO_GRACE_S = 10.0
MAX_SOCKET_PATH = 100


class WorkerContainer:
    def __init__(
        self,
        spec: ContainerSpec,
        runtime: Runtime,
        folder: Path,
        *,
        channel: grpc.aio.Channel,
        token: str,
        send: Callable[[Event], None],
        logs: LogSender,
        volume_rpcs: dict[str, Answer],
        on_ended: Callable[["WorkerContainer", Path | None], Awaitable[None]] | None = None,
        on_gone: Callable[["WorkerContainer"], None],
        on_over: Callable[[str], None] = lambda task_id: None,
        ports: ContainerPorts | None = None,
    ):
        """`on_over(task_id)`: its process is gone, and what runs beside it must end.

        `on_ended(container, upper)`: awaited when its process is gone, and what it wrote is still there.
        """
        self.spec = spec
        self.state = ContainerState.PENDING
        self._runtime = runtime
        self._folder = folder
        self._send = send
        self._on_ended = on_ended
        self._on_gone = on_gone
        self._on_over = on_over
        self._inputs = ContainerInputs(
            spec, send, self._asked_first, self._stuck, self._has_done_all, lambda: self._pump.catch_up()
        )
        self._pump = LogPump(logs, spec.task_id, self._inputs.current)
        self._running: RunningContainer | None = None
        self._stop_reason = ""
        self._is_killed = False
        self._has_filled_disk = ""
        """What it wrote too much, in words."""
        self._start: Start | None = None
        self._has_said_hello = False
        self._task_result = b""
        self._timers: list[asyncio.TimerHandle] = []
        self._start_timer: asyncio.TimerHandle | None = None
        self._started_at = 0.0
        self._timings: list[HookTiming] = []
        self._socket_folder: Path | None = None
        self._exited: ContainerChanged | None = None
        self._is_over = False
        """The process is gone: there is nothing left to signal."""
        self._is_undone = self._is_heard = False
        """Nothing of it is left on this node; the server knows of its end."""
        self._loop = asyncio.get_running_loop()
        own: dict[str, Answer] = {
            "FunctionGetInputs": self._inputs.FunctionGetInputs,
            "FunctionPutOutputs": self._inputs.FunctionPutOutputs,
            "ContainerHeartbeat": self._inputs.ContainerHeartbeat,
            "ContainerHello": self.ContainerHello,
            "TaskResult": self.TaskResult,
            **volume_rpcs,
        }
        self._server: ServerLife | None = None
        if spec.is_server:
            assert ports is not None, "servers are reached by their ports"
            self._server = ServerLife(spec, ports, self._asked_first, lambda: self._interrupt(STOP_GRACE_S))
            own["ContainerServerLifecycleReady"] = self._server.ContainerServerLifecycleReady
        self._service = ContainerService(spec.task_id, token, channel, own)
        self._task = asyncio.create_task(self._live(), name=spec.task_id)

    @property
    def task_id(self) -> str:
        return self.spec.task_id

    @property
    def running(self) -> RunningContainer | None:
        """Its process; None before it runs, and when it has ended."""
        return None if self._is_over else self._running

    @property
    def has_succeeded(self) -> bool:
        """Whether it has put out the result of an input."""
        return self._inputs.has_succeeded

    async def ended(self) -> None:
        await asyncio.wait({self._task})

    # ---- what the server says ---------------------------------------------------------------------------

    def assign(self, command: AssignInputs) -> None:
        self._inputs.assigned(command)

    def acknowledge(self, seq: int) -> None:
        self._inputs.acknowledged(seq)
        self._forget_if_done()

    def acknowledge_exit(self) -> None:
        self._is_heard = True
        self._forget_if_done()

    def cancel(self, command: CancelInputs) -> None:
        self._inputs.cancel(command.input_ids)
        if command.terminate:
            self.stop(StopContainer(self.task_id, graceful=False, reason="the call it worked for was cancelled"))

    def stop(self, command: StopContainer) -> None:
        """Draining, by SIGINT, or at once. Each stronger one may follow a weaker one."""
        if self._is_over:
            return
        self._stop_reason = self._stop_reason or command.reason or "it was stopped"
        if command.drain:
            self._inputs.drain()
            if self._server is not None:
                self._drain_server(self._server, max(self.spec.exit_grace_s, MIN_DRAIN_S))
            elif self.state is not ContainerState.RUNNING:
                self._end_idle()
            elif not self._inputs.is_busy:
                self._has_done_all()  # if it asks no more, it cannot be told
            return
        self._inputs.drain()
        if not command.graceful:
            self._kill()
        elif self._server is not None:
            self._drain_server(self._server, self.spec.exit_grace_s)
        elif self._inputs.is_busy:
            self._interrupt(STOP_GRACE_S)
        else:
            self._end_idle()

    def _drain_server(self, server: ServerLife, grace_s: float) -> None:
        """The requests that it works on may end; one that is not ready has none."""
        was_ready = self.state is ContainerState.RUNNING
        self._move_to(ContainerState.STOPPING)
        server.drain(grace_s if was_ready else 0.0)

    def _end_idle(self) -> None:
        """Nothing is lost: without a traceback in the logs, by the kill switch where it will ask for inputs."""
        if self._has_said_hello:
            self._later(IDLE_GRACE_S, self._interrupt, STOP_GRACE_S)
        else:
            self._kill()  # no line of user code has run yet

    def report(self) -> ContainerReport:
        inputs = self._inputs
        return ContainerReport(
            self.task_id, self.spec.function_id, self.state.value, inputs.held(), inputs.want, inputs.num_given
        )

    def repeat(self) -> None:
        """After a reconnection: what the server may not have heard."""
        self._inputs.repeat()
        if self._exited is not None:
            self._send(self._exited)

    # ---- its life ---------------------------------------------------------------------------------------

    async def _live(self) -> None:
        exit = ExitStatus(exit_code=1, reason="it could not be started")
        hooks: list[Hook] = []
        start: Start | None = None
        server: ContainerServer | None = None
        try:
            self._move_to(ContainerState.STARTING)
            start = Start(self.spec, self._folder, self._socket_path(), env=dict(self.spec.env), cwd=self.spec.cwd)
            self._start = start
            server = ContainerServer(str(start.socket_path), self._service)
            timings, hooks = await self._prepare(start, server)
            self._move_to(ContainerState.STARTING, hooks=tuple(timings))
            if self._is_killed:
                exit = ExitStatus(exit_code=-9, reason=self._stop_reason)
            else:
                exit = await self._run(start, timings)
        except AeolianError as error:
            self._pump.say(f"this container could not be started: {error.message}")
            exit = ExitStatus(exit_code=1, reason=error.message)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("%s could not be started", self.task_id)
            exit = ExitStatus(exit_code=1, reason=f"the worker failed to start it: {error!r}")
        finally:
            self._is_over = True
            self._on_over(self.task_id)
            for timer in self._timers:
                timer.cancel()
            if self._server is not None:
                self._server.close()
            self._inputs.close()
        self._pump.flush()
        undoing = asyncio.create_task(self._undo(start, hooks, server))
        await asyncio.wait({undoing}, timeout=UNDO_GRACE_S if self._on_ended is None else None)
        is_well = exit.exit_code == 0 and not exit.oom_killed and not self._task_result
        last_lines = () if is_well else self._pump.last_lines
        self._move_to(ContainerState.EXITED, exit=exit, task_result=self._task_result, last_lines=last_lines)
        await undoing
        self._is_undone = True
        self._forget_if_done()

    async def _prepare(self, start: Start, server: ContainerServer) -> tuple[list[HookTiming], list[Hook]]:
        """Run the hooks in order, each timed by its name."""
        await asyncio.to_thread(start.folder.mkdir, parents=True, exist_ok=True)
        applied: list[Hook] = []
        timings = []
        at = time.perf_counter()
        await server.start()
        timings.append(HookTiming("socket", time.perf_counter() - at))
        try:
            for hook in self._runtime.hooks():
                at = time.perf_counter()
                applied.append(hook)
                await hook.apply(start)
                timings.append(HookTiming(hook.name, time.perf_counter() - at))
        except BaseException:
            for hook in reversed(applied):
                await hook.undo(start)
            raise
        return timings, applied

    async def _run(self, start: Start, timings: list[HookTiming]) -> ExitStatus:
        at = time.perf_counter()
        running = await self._runtime.start(start)
        timings.append(HookTiming("process", time.perf_counter() - at))
        self._started_at = time.perf_counter()
        self._timings = timings
        self._running = running
        self._start_timer = self._loop.call_later(self.spec.startup_timeout_s, self._start_timed_out)
        self._timers.append(self._start_timer)
        if self._is_killed:
            running.kill()
        pumping = asyncio.create_task(self._pump.run(running.stdout, running.stderr))
        try:
            exit = await running.wait()
            if self._inputs.is_letting_go:
                self._stop_reason = self._stop_reason or "it ended to let go of an input that was cancelled"
            await self._pump.finish(pumping, PUMP_GRACE_S)
        finally:
            pumping.cancel()
            await running.release()
        if self._has_filled_disk:
            exit = ExitStatus(exit.exit_code, disk_full=self._has_filled_disk)
        elif self._stop_reason and not exit.reason:
            exit = ExitStatus(exit.exit_code, exit.oom_killed, self._stop_reason)
        return exit

    async def _undo(self, start: Start | None, hooks: list[Hook], server: ContainerServer | None) -> None:
        if server is not None:
            with contextlib.suppress(Exception):
                await server.stop()
        if start is not None:
            for hook in reversed(hooks):
                try:
                    await hook.undo(start)
                except Exception:
                    log.exception("%s: %s could not be undone", self.task_id, hook.name)
        if self._on_ended is not None:
            await self._on_ended(self, start.upper if start is not None else None)
        for folder in (self._folder, self._socket_folder):
            if folder is not None:
                await asyncio.to_thread(remove_tree, folder)

    def _socket_path(self) -> Path:
        """Unix sockets have short names: a deep data directory needs another place for them."""
        path = self._folder / "worker.sock"
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
            return path
        self._socket_folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
        return self._socket_folder / "worker.sock"

    # ---- what the container says ------------------------------------------------------------------------

    async def ContainerHello(self, raw: bytes, key: str) -> bytes:
        """Sent before user code is imported."""
        self._has_said_hello = True
        return b""

    async def TaskResult(self, raw: bytes, key: str) -> bytes:
        """User code could not be imported, or a lifecycle hook failed; the process ends by itself after this."""
        self._task_result = parsed(api_pb2.TaskResultRequest, raw).result.SerializeToString()
        return b""

    def _asked_first(self) -> None:
        if self._start_timer is not None:
            self._start_timer.cancel()
        self._timings.append(HookTiming("user code", time.perf_counter() - self._started_at))
        if self.state is ContainerState.STARTING:
            self._move_to(ContainerState.RUNNING, hooks=tuple(self._timings))

    # ---- ending it --------------------------------------------------------------------------------------

    def _has_done_all(self) -> None:
        """The kill switch ends it, after its exit hooks; a thread that lingers, or a hook that hangs, is cut off."""
        self._later(STOP_GRACE_S, self._interrupt, STOP_GRACE_S)

    def _stuck(self, reason: str) -> None:
        self._stop_reason = self._stop_reason or reason
        self._pump.say(f"this container is ended: {reason}")
        self._inputs.drain()
        self._interrupt(5.0)

    def fill_disk(self, what: str) -> None:
        """It has written too much: it ends at once."""
        self._has_filled_disk = self._has_filled_disk or what
        self._pump.say(f"this container is ended: it {what}")
        self._inputs.drain()
        self._kill()

    @property
    def written(self) -> Path | None:
        """Where the files lie that it writes, while it runs."""
        return (
            self._start.upper if self._start is not None and self._running is not None and not self._is_over else None
        )

    def _start_timed_out(self) -> None:
        self._stop_reason = f"it was not ready after {self.spec.startup_timeout_s:g} s (`startup_timeout`)"
        if self._server is not None:
            self._stop_reason += f": nothing accepts connections on port {self.spec.server_port}"
        self._pump.say(f"this container is ended: {self._stop_reason}")
        self._task_result = api_pb2.GenericResult(
            status=api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT,
            exception=f"container {self.task_id} was ended: {self._stop_reason}",
        ).SerializeToString()
        self._kill()

    def _interrupt(self, grace_s: float) -> None:
        if self._is_over:
            return
        if self._running is None:
            self._kill()
            return
        self._move_to(ContainerState.STOPPING)
        self._running.signal(signal.SIGTERM if self.spec.is_server else signal.SIGINT)
        self._later(grace_s, self._kill)

    def _kill(self) -> None:
        self._is_killed = True
        if self._running is not None and not self._is_over:
            self._move_to(ContainerState.STOPPING)
            self._running.kill()

    def _later(self, delay_s: float, fn: Callable, *args) -> None:
        self._timers.append(self._loop.call_later(delay_s, fn, *args))

    def _move_to(
        self,
        state: ContainerState,
        *,
        hooks: tuple[HookTiming, ...] = (),
        exit: ExitStatus | None = None,
        task_result: bytes = b"",
        last_lines: tuple[str, ...] = (),
    ) -> None:
        self.state = state
        event = ContainerChanged(self.task_id, state.value, time.time(), hooks, exit, task_result, last_lines)
        if state is ContainerState.EXITED:
            self._exited = event
        self._send(event)

    def _forget_if_done(self) -> None:
        """It is kept until the server has its outputs and knows of its end."""
        if self._is_undone and self._is_heard and not self._inputs.has_unstored:
            self._on_gone(self)
