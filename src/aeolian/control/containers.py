"""Containers: started where the scheduler says, watched, and ended; what they held when they end is queued again.

The worker owns the processes. The server knows of them by what the worker reports: a container outlives the server,
but not its worker (`recovery`).
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence, Set

from modal_proto import api_pb2

from aeolian.control import scheduler
from aeolian.control.apps import Apps
from aeolian.control.calls import Calls
from aeolian.control.container_ends import explain, quoted
from aeolian.control.container_history import ContainerHistory, FinishedContainer
from aeolian.control.container_specs import ContainerSpecs
from aeolian.control.container_state import Container, Want
from aeolian.control.crash_loop import STABLE_S
from aeolian.control.functions import Functions
from aeolian.control.logs import AppLogs
from aeolian.control.pools import Pool, Pools
from aeolian.control.workers import Worker, Workers
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.containers import ContainerSpec, ContainerState, ExitStatus
from aeolian.domain.errors import AeolianError, NotFound, PermissionDenied, Unavailable
from aeolian.domain.functions import PoolSettings
from aeolian.domain.ids import new_id
from aeolian.domain.link import (
    ContainerChanged,
    LogLine,
    PrepareImage,
    StartContainer,
    StopContainer,
    WantInputs,
)

log = logging.getLogger(__name__)

STOP_WAIT_S = 45.0
MAX_PREPARED = 4
"""Kinds of containers that a worker is told to be ready for at once."""
MAX_ENDED_LATELY = 1000


class Containers:
    """Implements `control.fleet.Fleet`."""

    def __init__(
        self,
        history: ContainerHistory,
        clock: Clock,
        apps: Apps,
        functions: Functions,
        calls: Calls,
        pools: Pools,
        workers: Workers,
        specs: ContainerSpecs,
        logs: AppLogs,
    ):
        self.when_ended: list[Callable[[Container], None]] = []
        """Called with each container that is gone."""
        self.when_hopeless: list[Callable[[str, str], None]] = []
        """Called with a Function (its id) whose containers do not work, and why."""
        self.when_started: list[Callable[[Container], None]] = []
        """Called with each container that asks for inputs for the first time."""
        self.when_exited: list[Callable[[Container, ExitStatus], None]] = []
        """As `when_ended`, with how it ended."""
        self._history = history
        self._clock = clock
        self._apps = apps
        self._functions = functions
        self._calls = calls
        self._pools = pools
        self._workers = workers
        self._specs = specs
        self._logs = logs
        self._containers: dict[str, Container] = {}
        self._ended_lately: OrderedDict[str, Container] = OrderedDict()
        self._gone: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task] = set()
        self._is_closed = False
        apps.when_stopped.append(self._forget_app)

    # ---- life of the service ----------------------------------------------------------------------------

    async def load(self) -> None:
        """Know again what may still run. Their workers tell of them (`recovery`)."""
        for container in await self._history.unfinished():
            if (settings := self._settings(container.function_id)) is not None:
                container.max_inputs = settings.max_inputs
                container.is_shut_off = settings.restrict_modal_access
            self._containers[container.task_id] = container
            self._pools.add(container)

    async def close(self) -> None:
        self._is_closed = True
        await self._pools.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- starting ---------------------------------------------------------------------------------------

    def start(self, pool: Pool, settings: PoolSettings, count: int) -> int:
        """Place and start up to `count` containers; returns how many found a place."""
        started = 0
        for _ in range(count):
            views = self._views()
            is_needed = not any(
                container.is_starting or ((container.takes_inputs or container.held) and not container.is_blocked)
                for container in pool.containers.values()
            )
            worker_id = scheduler.place(settings.resources, views, is_needed=is_needed)
            if worker_id is None:
                if reason := scheduler.impossible(settings.resources, views):
                    self._fail_queue(pool, f"Function '{settings.function_name}' cannot run here: {reason}")
                break
            container = Container(
                new_id("container"),
                app_id=settings.app_id,
                function_id=settings.function_id,
                revision=settings.revision,
                environment_name=settings.environment_name,
                worker_id=worker_id,
                image_id=settings.image_id,
                sdk_version=settings.sdk_version,
                resources=settings.resources,
                enqueued_at=self._clock.now(),
                max_inputs=settings.max_inputs,
                attempt=pool.crash_loop.num_deaths,
            )
            self._containers[container.task_id] = container
            self._pools.add(container)
            self._behind(self._start(container))
            started += 1
        return started

    async def _start(self, container: Container) -> None:
        try:
            spec, settings = await self._specs.make(container.function_id, container.task_id)
        except (AeolianError, KeyError) as error:
            self._ended(container, ExitStatus(exit_code=1, reason=getattr(error, "message", str(error))), b"")
            return
        if container.state is not ContainerState.PENDING:
            return
        container.revision = settings.revision
        container.is_shut_off = settings.restrict_modal_access
        self._send_start(container, spec)

    def _send_start(self, container: Container, spec: ContainerSpec) -> None:
        self._history.begin(container)
        worker = self._workers.get(container.worker_id)
        if worker is None or not worker.is_connected or worker.is_leaving:
            self.lost(container, "its worker went away before the start")
            return
        container.is_sent = True
        worker.send(StartContainer(spec))

    def _views(self, without: Sequence[Container] = ()) -> list[scheduler.WorkerView]:
        used: dict[str, list[int]] = {}
        workers = self._workers.available()
        sizes = {worker.worker_id: worker for worker in workers}
        for container in self._containers.values():
            if (worker := sizes.get(container.worker_id)) is None or container in without:
                continue
            sums = used.setdefault(container.worker_id, [0, 0, 0])
            sums[0] += 0 if container.is_blocked else min(container.resources.milli_cpu, worker.milli_cpu)
            sums[1] += min(container.resources.memory_mb, worker.memory_mb)
            sums[2] += container.resources.gpu_count
        return [
            scheduler.WorkerView(
                worker.worker_id,
                worker.milli_cpu,
                worker.memory_mb,
                worker.num_gpus,
                *used.get(worker.worker_id, [0, 0, 0]),
            )
            for worker in workers
        ]

    def make_room(self, for_pool: Pool, settings: PoolSettings) -> None:
        """End containers of other pools that have been idle longest, if that makes room for one of this pool."""
        if any(c.state is ContainerState.STOPPING and not c.held for c in self._containers.values()):
            return  # some room is on its way
        idle = [
            container
            for pool in self._pools.all()
            if pool is not for_pool
            for container in self.spare(pool)
            if container.resources.gpu_count or not settings.resources.gpu_count
        ]
        ending: list[Container] = []
        for container in sorted(idle, key=lambda container: container.idle_since):
            ending.append(container)
            if scheduler.place(settings.resources, self._views(without=ending), is_needed=False) is not None:
                for victim in ending:
                    self.stop_container(victim, drain=True, reason="others need its place")
                return

    def spare(self, pool: Pool) -> list[Container]:
        """Idle containers of a pool beyond its minimum, those that have been idle longest."""
        num_open = sum(container.takes_inputs for container in pool.containers.values())
        idle = [c for c in pool.containers.values() if c.idle_since and c.state is ContainerState.RUNNING]
        idle.sort(key=lambda container: container.idle_since)
        return idle[: max(0, num_open - self._min_containers(pool.function_id))]

    @property
    def num_cores(self) -> int:
        return max(1, sum(worker.milli_cpu for worker in self._workers.available()) // 1000)

    # ---- what workers report ----------------------------------------------------------------------------

    def container_changed(self, event: ContainerChanged) -> None:
        container = self._containers.get(event.task_id)
        if container is None:
            return
        state = ContainerState(event.state)
        if event.hooks:
            container.hooks = event.hooks
        if state is ContainerState.EXITED:
            self._ended(container, event.exit or ExitStatus(exit_code=0), event.task_result, event.last_lines)
            return
        if state is ContainerState.RUNNING and not container.started_at:
            self.began_to_run(container, event.at)
        elif container.move_to(state):
            self._tell(container)

    def began_to_run(self, container: Container, at: float | None = None) -> None:
        """It has asked for inputs: at this time, or not later than now."""
        at = self._clock.now() if at is None else at
        container.move_to(ContainerState.STARTING)
        container.move_to(ContainerState.RUNNING)
        container.started_at = at
        pool = self._pools.get(container.function_id)
        if pool is not None:
            took = max(0.0, at - container.enqueued_at)
            pool.start_s += 0.5 * (took - pool.start_s)
        self._history.running(container)
        self._tell(container)
        for callback in self.when_started:
            callback(container)

    def wants_inputs(self, event: WantInputs) -> None:
        container = self._containers.get(event.task_id)
        if container is None:
            return
        if not container.started_at:
            self.began_to_run(container)
        self._pools.wants(container, Want(event.seq, event.max_items, event.linger_ms))

    def lost(self, container: Container, reason: str) -> None:
        """The container is gone with its worker: that says nothing of the container itself."""
        self._ended(container, ExitStatus(exit_code=0, reason=reason), b"", is_lost=True)

    def _ended(
        self,
        container: Container,
        exit: ExitStatus,
        task_result: bytes,
        last_lines: Sequence[str] = (),
        *,
        is_lost: bool = False,
    ) -> None:
        """The container is gone: its inputs go back, and if it never got going its pool learns why."""
        if self._containers.pop(container.task_id, None) is None:
            return
        self._ended_lately[container.task_id] = container
        if len(self._ended_lately) > MAX_ENDED_LATELY:
            self._ended_lately.popitem(last=False)
        was_stopping = container.stop is not None
        container.state = ContainerState.EXITED
        held = self._pools.drop(container)
        failed_by_itself = bool(task_result) and not exit.exit_code  # the SDK says so, and ends as if all were well
        self._history.end(
            container,
            ExitStatus(exit_code=1) if failed_by_itself else exit,
            exit.reason or (container.stop.reason if container.stop else ""),
        )
        pool, last_words = self._pools.get(container.function_id), ""
        if pool is not None and not was_stopping and not is_lost and self.is_current(container):
            if container.started_at and self._clock.now() - container.started_at >= STABLE_S:
                pool.crash_loop.reset()
            elif not container.num_given:
                last_words = self._died_at_start(pool, container, exit, task_result, last_lines)
        for other in self._pools.all():
            if other.is_denied:
                self._pools.unsettle(other.function_id)
        lost_to_us = was_stopping or exit.reason
        self._calls.container_lost(held, None if lost_to_us else exit, explain(container.task_id, exit, last_lines))
        for callback in self.when_ended:
            callback(container)
        for on_exit in self.when_exited:
            on_exit(container, exit)
        self._tell(container)
        self._behind(self._close_logs(container, last_words))

    async def _close_logs(self, container: Container, last_words: str) -> None:
        app_id, task_id, function_id = container.app_id, container.task_id, container.function_id
        try:
            if last_words:
                await self._logs.append(
                    app_id, task_id, function_id, [LogLine(3, self._clock.now(), f"{last_words}\n")]
                )
            await self._logs.task_ended(app_id, task_id, function_id)
        except Unavailable:
            pass
        finally:
            if (event := self._gone.pop(container.task_id, None)) is not None:
                event.set()

    def _died_at_start(
        self, pool: Pool, container: Container, exit: ExitStatus, task_result: bytes, last_lines: Sequence[str]
    ) -> str:
        """It never took an input. Those who wait learn why, if it is hopeless; returns what its log is to say."""
        loop = pool.crash_loop
        pause_s = loop.died(container.attempt, self._clock.monotonic(), is_awaited=pool.num_queued > 0)
        did = "died before it took an input: it" if container.started_at else "could not start: it"
        times = f"this was number {loop.num_deaths} in a row" if loop.num_deaths > 1 else "this was the first"
        is_served = any(other.takes_inputs for other in pool.containers.values())
        if task_result:
            result = api_pb2.GenericResult.FromString(task_result)
            if not result.data:
                result.exception += quoted(last_lines)
            if not is_served:
                self._calls.fail(list(pool.queue), result, container.task_id)
                for on_hopeless in self.when_hopeless:
                    on_hopeless(pool.function_id, f"container {container.task_id} failed: {result.exception}")
        elif loop.gives_up and not is_served:
            self._fail_queue(pool, explain(container.task_id, exit, last_lines, did))
        if not pause_s:
            return ""
        settings = self._settings(container.function_id)
        if settings is None or settings.is_builder_function:
            return ""
        what = explain(container.task_id, exit, did=did)
        if task_result:
            what = f"container {container.task_id} could not start: {result.exception.strip() or 'its code failed'}"
        return f"{what}; {times}, the next one is started in {pause_s:.0f} s"

    def _fail_queue(self, pool: Pool, text: str) -> None:
        for on_hopeless in self.when_hopeless:
            on_hopeless(pool.function_id, text)
        result = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_FAILURE, exception=text)
        self._calls.fail(list(pool.queue), result)

    # ---- ending -----------------------------------------------------------------------------------------

    def stop_container(
        self, container: Container, *, drain: bool = False, graceful: bool = True, reason: str = ""
    ) -> None:
        """Ask the worker to end it. Draining: it finishes what it holds first."""
        if container.stop is not None:
            if drain:
                return
            reason = container.stop.reason or reason
        container.stop = StopContainer(container.task_id, graceful=graceful, drain=drain, reason=reason)
        container.move_to(ContainerState.STOPPING)
        container.want, container.idle_since = None, 0.0
        self._pools.unsettle(container.function_id)
        if container.is_sent:
            self._workers.send(container.worker_id, container.stop)
        else:
            self._ended(container, ExitStatus(exit_code=0, reason=reason), b"")

    def request_stop(self, task_id: str, caller: Caller, *, graceful: bool) -> None:
        """ContainerStop: by a client for any container of its workspace, by a container for itself."""
        if caller.is_container and caller.task_id != task_id:
            raise PermissionDenied(f"container {caller.task_id} cannot stop another container ({task_id})")
        container = self.find(task_id, caller)
        self.stop_container(container, graceful=graceful, drain=caller.is_container, reason="it was stopped on request")

    async def stop_app(self, app_id: str, *, graceful: bool) -> None:
        await self._calls.cancel_app(app_id, f"App {app_id} was stopped")
        ending = [container for container in self._containers.values() if container.app_id == app_id]
        events = []
        for container in ending:
            events.append(self._gone.setdefault(container.task_id, asyncio.Event()))
            self.stop_container(container, graceful=graceful, reason="its App was stopped")
        await self._calls.flush()
        if events:
            waits = [asyncio.ensure_future(event.wait()) for event in events]
            _, late = await asyncio.wait(waits, timeout=STOP_WAIT_S)
            for wait in late:
                wait.cancel()

    async def retire_functions(self, function_ids: Set[str]) -> None:
        for function_id in function_ids:
            if (pool := self._pools.get(function_id)) is not None:
                pool.is_retired = True
                self._pools.unsettle(function_id)

    async def definitions_changed(self, app_id: str) -> None:
        for function_id in self._functions.functions_of(app_id):
            if self._settings(function_id) is None:
                continue
            if self._min_containers(function_id) or self._pools.get(function_id) is not None:
                pool = self._pools.ensure(function_id, app_id)
                pool.crash_loop.reset()
                pool.is_retired = False
                self._pools.unsettle(function_id)
        for container in [c for c in self._containers.values() if c.app_id == app_id]:
            if not self.is_current(container):
                self.stop_container(container, drain=True, reason="a newer version is deployed")
        for worker in self._workers.available():
            self._prepare(worker, [app_id])

    def prepare(self, worker: Worker) -> None:
        """Let a worker that has come be ready for containers of the Apps deployed last."""
        latest = sorted(self._apps.living_apps(), key=lambda app: app.deployed_at, reverse=True)
        self._prepare(worker, [app.app_id for app in latest])

    def _prepare(self, worker: Worker, app_ids: Iterable[str]) -> None:
        """Let the worker be ready for containers of these apps."""
        wanted: dict[PrepareImage, None] = {}
        for app_id in app_ids:
            for function in self._functions.layout(app_id).functions.values():
                settings = self._settings(function.function_id)
                if settings is not None and settings.image_id and settings.sdk_version:
                    version = self._specs.builder_version(settings)
                    wanted[PrepareImage(settings.image_id, settings.sdk_version, version)] = None
        for command in list(wanted)[:MAX_PREPARED]:
            worker.send(command)

    def keep_warm(self) -> None:
        """After a start: the pools of deployed Functions with a minimum exist although nobody calls them."""
        for app in self._apps.living_apps():
            for function_id in self._functions.functions_of(app.app_id):
                self._warm(function_id, app.app_id)

    def rescaled(self, function_id: str) -> None:
        """Its autoscaler settings were overridden."""
        self._warm(function_id, self._functions.row(function_id).app_id)
        self._pools.unsettle(function_id)

    def _warm(self, function_id: str, app_id: str) -> None:
        if self._min_containers(function_id):
            self._pools.ensure(function_id, app_id)
            self._pools.unsettle(function_id)

    def _min_containers(self, function_id: str) -> int:
        try:
            return self._functions.autoscaler_settings(function_id).min_containers
        except AeolianError:
            return 0

    def num_containers(self, app_id: str) -> int:
        return sum(container.app_id == app_id for container in self._containers.values())

    def is_idle(self, app_id: str) -> bool:
        return self._calls.is_idle(app_id)

    # ---- asking -----------------------------------------------------------------------------------------

    def get(self, task_id: str) -> Container | None:
        return self._containers.get(task_id)

    def get_lately(self, task_id: str) -> Container | None:
        """Also one that has ended a moment ago."""
        return self._containers.get(task_id) or self._ended_lately.get(task_id)

    def find(self, task_id: str, caller: Caller) -> Container:
        container = self._containers.get(task_id)
        app = self._apps.known(container.app_id) if container else None
        if container is None or (app is not None and app.workspace != caller.workspace):
            raise NotFound(f"there is no running container {task_id!r}: `modal container list` shows those there are")
        return container

    def running(self) -> list[Container]:
        return list(self._containers.values())

    def of_worker(self, worker_id: str) -> list[Container]:
        return [container for container in self._containers.values() if container.worker_id == worker_id]

    async def history(self, task_id: str) -> FinishedContainer | None:
        return await self._history.find(task_id)

    async def app_of_task(self, task_id: str) -> str | None:
        if (container := self.get_lately(task_id)) is not None:
            return container.app_id
        found = await self.history(task_id)
        return found.app_id if found else None

    # ---- inside -----------------------------------------------------------------------------------------

    def _settings(self, function_id: str) -> PoolSettings | None:
        try:
            return self._functions.pool_settings(function_id)
        except AeolianError:
            return None

    def is_current(self, container: Container) -> bool:
        """Whether it runs what is deployed now."""
        settings = self._settings(container.function_id)
        return settings is not None and settings.revision == container.revision

    def _forget_app(self, app_id: str) -> None:
        for pool in self._pools.of_app(app_id):
            for on_hopeless in self.when_hopeless:
                on_hopeless(pool.function_id, "its App has been stopped")
            if not pool.containers:
                self._pools.remove_pool(pool.function_id)

    def _tell(self, container: Container) -> None:
        state = _TASK_STATES[container.state]
        self._logs.task_changed(container.app_id, container.task_id, container.function_id, state)

    def _behind(self, work) -> None:
        if self._is_closed:
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


_TASK_STATES = {
    ContainerState.PENDING: api_pb2.TASK_STATE_WORKER_ASSIGNED,
    ContainerState.STARTING: api_pb2.TASK_STATE_CREATING_CONTAINER,
    ContainerState.RUNNING: api_pb2.TASK_STATE_ACTIVE,
    ContainerState.STOPPING: api_pb2.TASK_STATE_ACTIVE,
    ContainerState.EXITED: api_pb2.TASK_STATE_COMPLETED,
}
