"""Taking up again what runs, when the server or a worker has been away: each says what it knows, and both agree.

::

    server starts --> containers and inputs of the database wait --> Hello of their worker --> reconciled
                                    \\--- RECOVERY_S without it --> lost, their inputs run elsewhere
    worker away ----> its containers go on ---------------> Hello again ---------------------> reconciled
                                    \\--- WORKER_AWAY_S ---> lost, their inputs run elsewhere
"""

import asyncio
import logging

from aeolian.control.call_state import Input
from aeolian.control.calls import Calls
from aeolian.control.container_state import Container
from aeolian.control.containers import Containers
from aeolian.control.pools import Pools
from aeolian.control.workers import Worker, Workers
from aeolian.domain.containers import ContainerState
from aeolian.domain.link import CancelInputs, ContainerReport, Hello, StopContainer, Welcome

log = logging.getLogger(__name__)

WORKER_AWAY_S = 10.0
"""A worker that is away for longer has lost its containers."""
RECOVERY_S = 8.0
"""After a start of the server: how long recovered inputs wait for the workers that may hold them."""


class Recovery:
    def __init__(self, containers: Containers, calls: Calls, pools: Pools, workers: Workers):
        self._containers = containers
        self._calls = calls
        self._pools = pools
        self._workers = workers
        self._recovered: list[Input] = []
        """Unfinished inputs that wait for the workers that may hold them."""
        self._lost_timers: dict[str, asyncio.TimerHandle] = {}
        """Workers that are awaited."""
        self._is_closed = False

    async def load(self) -> None:
        """Take up what ran before: containers and unfinished inputs wait a moment for their workers."""
        await self._containers.load()
        self._recovered = await self._calls.load()
        loop = asyncio.get_running_loop()
        for worker_id in {container.worker_id for container in self._containers.running()}:
            self._lost_timers[worker_id] = loop.call_later(RECOVERY_S, self._worker_lost, worker_id)
        loop.call_later(RECOVERY_S if self._lost_timers else 0.0, self._queue_recovered)

    def close(self) -> None:
        self._is_closed = True
        for timer in self._lost_timers.values():
            timer.cancel()

    # ---- workers come and go ----------------------------------------------------------------------------

    def worker_connected(self, worker: Worker, hello: Hello) -> None:
        """A worker dialled in: compare what it holds with what we know."""
        self._workers.connected(worker)
        if (timer := self._lost_timers.pop(worker.worker_id, None)) is not None:
            timer.cancel()
        known = {container.task_id: container for container in self._containers.of_worker(worker.worker_id)}
        reported = {report.task_id: report for report in hello.containers}
        worker.send(Welcome(tuple(task_id for task_id in reported if task_id not in known)))
        for task_id, container in known.items():
            report = reported.get(task_id)
            if report is not None:
                self._reconcile(worker, container, report)
            elif container.state is not ContainerState.PENDING or container.started_at:
                self._containers.lost(container, "its worker started anew")
            elif container.is_sent:
                self._containers.lost(container, "its worker never heard of it")
        if worker.is_leaving:
            self.worker_leaving(worker)
        if self._recovered and not self._lost_timers:
            self._queue_recovered()
        for pool in self._pools.all():
            self._pools.unsettle(pool.function_id)
        self._containers.prepare(worker)

    def worker_leaving(self, worker: Worker) -> None:
        """It shuts down, and tells its containers so itself."""
        worker.is_leaving = True
        for container in self._containers.of_worker(worker.worker_id):
            container.stop = container.stop or StopContainer(container.task_id, drain=True)
            container.want, container.idle_since = None, 0.0
            if container.is_sent:
                container.move_to(ContainerState.STOPPING)
            self._pools.unsettle(container.function_id)

    def worker_disconnected(self, worker: Worker) -> None:
        if not self._workers.disconnected(worker) or self._is_closed:
            return
        if worker.is_leaving:
            self._worker_lost(worker.worker_id)
            return
        log.warning("worker %s went away; its containers are given up in %.0f s", worker.worker_id, WORKER_AWAY_S)
        loop = asyncio.get_running_loop()
        self._lost_timers[worker.worker_id] = loop.call_later(WORKER_AWAY_S, self._worker_lost, worker.worker_id)

    # ---- inside -----------------------------------------------------------------------------------------

    def _reconcile(self, worker: Worker, container: Container, report: ContainerReport) -> None:
        state = ContainerState(report.state)
        if state is ContainerState.RUNNING and not container.started_at:
            self._containers.began_to_run(container)
        elif state is not ContainerState.EXITED:  # its outputs come first, then the end itself
            if state is ContainerState.RUNNING:
                container.move_to(ContainerState.STARTING)
            container.move_to(state)
        container.num_given = report.num_given
        container.is_last = bool(container.max_inputs) and container.num_given >= container.max_inputs
        before = {key: item for key, item in container.held.items() if not item.finished}
        container.held = {}
        abandoned = []
        for held in report.held:
            item = self._calls.unfinished_input(held.input_id)
            if item is None or item.retry_count != held.retry_count or item.task_id not in ("", container.task_id):
                abandoned.append(held.input_id)
                continue
            before.pop(item.key, None)
            self._pools.hold(container, item)
        if abandoned:
            worker.send(CancelInputs(container.task_id, tuple(abandoned)))
        self._calls.queue_again(before.values())  # assigned by us, but never received there
        container.want = None
        if container.stop is not None:
            worker.send(container.stop)
        elif state in (ContainerState.STOPPING, ContainerState.EXITED):
            return
        elif not self._containers.is_current(container):
            self._containers.stop_container(container, drain=True, reason="a newer version is deployed")
        elif report.wants is not None:
            self._containers.wants_inputs(report.wants)

    def _worker_lost(self, worker_id: str) -> None:
        self._lost_timers.pop(worker_id, None)
        if self._workers.is_connected(worker_id):
            return
        self._workers.remove(worker_id)
        for container in self._containers.of_worker(worker_id):
            self._containers.lost(container, "its worker went away")

    def _queue_recovered(self) -> None:
        """Inputs that no container holds after a restart are queued."""
        recovered, self._recovered = self._recovered, []
        self._calls.enqueue_when_due([item for item in recovered if not item.finished and not item.task_id])
