"""Metrics for Prometheus: what happened is counted as it happens, what there is now is looked up when it is asked for.

Names follow Prometheus's conventions: seconds, `_total` for what only grows. A Function is told apart by the names
of its App and of itself; of ephemeral Apps by the words "ephemeral", since each run of one is an App of its own.
"""

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aeolian.control.container_state import Container
from aeolian.domain.containers import ExitStatus
from aeolian.domain.telemetry import FinishedInput

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


disable_created_metrics()  # they would double the number of series


class FunctionName(NamedTuple):
    app: str
    function: str


class PoolFigures(NamedTuple):
    """A Function as it is now."""

    name: FunctionName
    num_queued: int
    num_running: int
    containers: dict[str, int]
    """How many are in each state."""


class WorkerFigures(NamedTuple):
    worker_id: str
    num_cores: float
    memory_bytes: int
    num_gpus: int


class Metrics:
    """`name_of(app id, function id)` may be asked for Functions that are gone."""

    def __init__(self, name_of: Callable[[str, str], FunctionName]):
        self._name_of = name_of
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._inputs = self._counter("inputs", "Inputs that have their output.", "app", "function", "status")
        self._retries = self._counter(
            "input_retries", "Attempts after the first of finished inputs.", "app", "function"
        )
        self._wait = self._histogram(
            "input_wait_seconds", "From an input's arrival to its start.", LONG_S, "app", "function"
        )
        self._run = self._histogram(
            "input_run_seconds", "From an input's start to its output.", LONG_S, "app", "function"
        )
        self._starts = self._histogram(
            "container_start_seconds",
            "From the decision to start a container to its first request.",
            LONG_S,
            "app",
            "function",
        )
        self._hooks = self._histogram("container_start_hook_seconds", "Steps of a container's start.", SHORT_S, "hook")
        self._ends = self._counter("containers_ended", "Containers that are gone.", "app", "function", "how")
        self._rpcs = self._histogram(
            "rpc_seconds",
            "RPCs of clients and containers, those that wait for something included.",
            SHORT_S,
            "rpc",
            "code",
        )
        self._requests = self._histogram("http_request_seconds", "HTTP requests.", SHORT_S, "method", "route", "status")

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"aeolian_{name}", what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(f"aeolian_{name}", what, labels, buckets=tuple(buckets), registry=self._registry)

    # ---- what happens -----------------------------------------------------------------------------------

    def input_finished(self, done: FinishedInput) -> None:
        name = self._name_of(done.app_id, done.function_id)
        self._inputs.labels(*name, done.status).inc()
        if done.retry_count:
            self._retries.labels(*name).inc(done.retry_count)
        if done.started_at:
            self._wait.labels(*name).observe(max(0.0, done.started_at - done.created_at))
            self._run.labels(*name).observe(max(0.0, done.finished_at - done.started_at))

    def container_started(self, container: Container) -> None:
        """It has asked for inputs for the first time."""
        name = self._name_of(container.app_id, container.function_id)
        self._starts.labels(*name).observe(max(0.0, container.started_at - container.enqueued_at))
        for hook in container.hooks:
            self._hooks.labels(hook.name).observe(hook.seconds)

    def container_ended(self, container: Container, exit: ExitStatus) -> None:
        how = "out_of_memory" if exit.oom_killed else "stopped" if container.stop or not exit.exit_code else "failed"
        self._ends.labels(*self._name_of(container.app_id, container.function_id), how).inc()

    def rpc_answered(self, rpc: str, code: str, seconds: float) -> None:
        self._rpcs.labels(rpc, code).observe(seconds)

    def request_answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """`route`: its pattern, so that there are as many as routes."""
        self._requests.labels(method, route, str(status)).observe(seconds)

    # ---- what there is ----------------------------------------------------------------------------------

    def watch(self, pools: Callable[[], Iterable[PoolFigures]], workers: Callable[[], Iterable[WorkerFigures]]) -> None:
        self._registry.register(_Now(pools, workers))

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)


class _Now(Collector):
    def __init__(self, pools: Callable[[], Iterable[PoolFigures]], workers: Callable[[], Iterable[WorkerFigures]]):
        self._pools = pools
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        queued: Counts = Counts()
        running: Counts = Counts()
        containers: Counts = Counts()
        for pool in self._pools():  # several of one name: runs of an ephemeral App, variants of a Function
            queued[pool.name] += pool.num_queued
            running[pool.name] += pool.num_running
            for state, count in pool.containers.items():
                containers[(*pool.name, state)] += count
        labels = ["app", "function"]
        yield _gauge("inputs_queued", "Inputs that wait for a container.", labels, queued)
        yield _gauge("inputs_running", "Inputs that containers work on.", labels, running)
        yield _gauge("containers", "Containers by state.", [*labels, "state"], containers)
        workers = list(self._workers())
        cores: dict[tuple[str, ...], float] = {(worker.worker_id,): worker.num_cores for worker in workers}
        memory: dict[tuple[str, ...], float] = {(worker.worker_id,): worker.memory_bytes for worker in workers}
        gpus: dict[tuple[str, ...], float] = {(worker.worker_id,): worker.num_gpus for worker in workers}
        yield _gauge("worker_cores", "Cores of connected workers.", ["worker"], cores)
        yield _gauge("worker_memory_bytes", "Memory of connected workers.", ["worker"], memory)
        yield _gauge("worker_gpus", "GPUs of connected workers.", ["worker"], gpus)


def _gauge(name: str, what: str, labels: list[str], values: Mapping[tuple[str, ...], float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"aeolian_{name}", what, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family
