"""Where metrics come from: lets every noun tell what happens, and looks up what there is."""

from collections import Counter
from collections.abc import Iterator

from aeolian.control.apps import Apps
from aeolian.control.calls import Calls
from aeolian.control.containers import Containers
from aeolian.control.functions import Functions
from aeolian.control.metrics import FunctionName, Metrics, PoolFigures, WorkerFigures
from aeolian.control.pools import Pools
from aeolian.control.traces import Exporter, Traces
from aeolian.control.workers import Workers
from aeolian.domain.errors import AeolianError

MAX_NAMES = 20_000
EPHEMERAL = "(ephemeral)"
GONE = "(gone)"


class Watched:
    def __init__(
        self, apps: Apps, functions: Functions, calls: Calls, pools: Pools, containers: Containers, workers: Workers
    ):
        self._apps = apps
        self._functions = functions
        self._pools = pools
        self._workers = workers
        self._calls = calls
        self._containers = containers
        self._names: dict[str, FunctionName] = {}
        self.metrics = metrics = Metrics(self.name_of)
        metrics.watch(self._pool_figures, self._worker_figures)
        calls.when_output.append(metrics.input_finished)
        containers.when_started.append(metrics.container_started)
        containers.when_exited.append(metrics.container_ended)

    def trace(self, exporter: Exporter, sample: float) -> None:
        """Let `exporter` have a trace of this share of the calls."""
        traces = Traces(exporter, self.name_of, sample)
        self._calls.when_output.append(traces.input_finished)
        self._containers.when_started.append(traces.container_started)

    def name_of(self, app_id: str, function_id: str) -> FunctionName:
        """Names of an App and a Function, which may be gone. A variant has the name of its Function."""
        name = self._names.get(function_id)
        if name is None:
            app = self._apps.known(app_id)
            try:
                function_name = self._functions.row(function_id).name
            except AeolianError:
                return FunctionName(GONE, GONE)
            if len(self._names) >= MAX_NAMES:
                self._names.clear()
            name = FunctionName(app.name if app is not None and app.name else EPHEMERAL, function_name)
            self._names[function_id] = name
        return name

    def _pool_figures(self) -> Iterator[PoolFigures]:
        for pool in self._pools.all():
            containers = list(pool.containers.values())
            yield PoolFigures(
                self.name_of(pool.app_id, pool.function_id),
                pool.num_queued,
                sum(len(container.held) for container in containers),
                Counter(container.state.value for container in containers),
            )

    def _worker_figures(self) -> Iterator[WorkerFigures]:
        for worker in self._workers.available():
            yield WorkerFigures(worker.worker_id, worker.milli_cpu / 1000, worker.memory_mb << 20, worker.num_gpus)
