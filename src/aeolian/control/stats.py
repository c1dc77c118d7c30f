"""What happened to the inputs and containers of Functions in a span of time, as the database tells it.

It knows as much as calls are kept for: those that somebody waited for an hour after their end, others a week.
"""

from collections.abc import Sequence

import msgspec

from aeolian.control.apps import Apps
from aeolian.control.calls import Calls
from aeolian.control.functions import Functions
from aeolian.control.pools import Pools
from aeolian.domain.apps import App, AppState
from aeolian.domain.caller import Caller
from aeolian.domain.calls import Status
from aeolian.domain.errors import InvalidArgument
from aeolian.storage import apps as apps_storage
from aeolian.storage import stats as storage
from aeolian.storage.database import Database
from aeolian.storage.stats import ContainerCounts, Span

MAX_SPAN_S = 7 * 24 * 3600.0


class FunctionStats(msgspec.Struct, frozen=True):
    """Percentiles are in seconds, at `storage.stats.SHARES`; empty where there is nothing to sort."""

    num_succeeded: int
    num_failed: int
    num_timed_out: int
    num_running: int
    """At the end of the span."""
    num_variants: int
    execution_s: list[float]
    latency_s: list[float]
    queue_s: list[float]
    startup_s: list[float]
    containers: ContainerCounts


class FunctionCounts(msgspec.Struct, frozen=True):
    """One Function of an App, its variants included."""

    function_id: str
    is_server: bool
    num_succeeded: int = 0
    num_failed: int = 0
    num_containers: int = 0
    num_failed_containers: int = 0


class AppStats(msgspec.Struct, frozen=True):
    app: App
    functions: dict[str, FunctionCounts]
    """By name."""
    num_deployments: int | None
    """None for an App that was never deployed."""


class Stats:
    def __init__(self, database: Database, apps: Apps, functions: Functions, calls: Calls, pools: Pools):
        self._database = database
        self._apps = apps
        self._functions = functions
        self._calls = calls
        self._pools = pools

    async def of_function(
        self, function_id: str, caller: Caller, *, since: float, until: float, task_id: str = "", variants: bool
    ) -> FunctionStats:
        """Of one Function or variant, or (`variants`) of a Function with all its variants."""
        _check(since, until)
        self._functions.row(function_id, caller)
        ids = self._functions.with_variants(function_id) if variants and not task_id else [function_id]
        span = Span(ids, since, until, task_id)
        await self._calls.flush()

        def read(connection):
            return (
                storage.finished_inputs(connection, span),
                storage.num_running_then(connection, span),
                storage.execution_times(connection, span),
                storage.latencies(connection, span),
                storage.queue_times(connection, span),
                storage.startup_times(connection, span),
                storage.container_counts(connection, span),
            )

        finished, num_running, execution_s, latency_s, queue_s, startup_s, containers = await self._database.read(read)
        return FunctionStats(
            num_succeeded=sum(number for _, status, number in finished if status == Status.SUCCESS),
            num_timed_out=sum(number for _, status, number in finished if status == Status.TIMEOUT),
            num_failed=sum(number for _, status, number in finished if status not in (Status.SUCCESS, Status.TIMEOUT)),
            num_running=num_running + self._num_running(span),
            num_variants=len(ids) - 1,
            execution_s=execution_s,
            latency_s=latency_s,
            queue_s=queue_s,
            startup_s=startup_s,
            containers=ContainerCounts(
                "", *(sum(counts) for counts in zip(*(row[1:] for row in containers), strict=True))
            )
            if containers
            else ContainerCounts("", 0, 0, 0, 0),
        )

    async def of_app(self, app_id: str, caller: Caller, *, since: float, until: float) -> AppStats:
        """Of all Functions that are part of the App now."""
        _check(since, until)
        app = await self._apps.find(app_id, caller)
        layout = self._functions.layout(app_id)
        base_of: dict[str, str] = {}
        for function in layout.functions.values():
            base_of |= dict.fromkeys(self._functions.with_variants(function.function_id), function.function_id)
        span = Span(list(base_of), since, until)
        await self._calls.flush()
        finished, containers, versions = await self._database.read(
            lambda c: (
                storage.finished_inputs(c, span),
                storage.container_counts(c, span),
                apps_storage.list_versions(c, app_id),
            )
        )
        functions = {}
        for name, function in layout.functions.items():
            mine = [row for row in finished if base_of[row[0]] == function.function_id]
            there = [row for row in containers if base_of[row.function_id] == function.function_id]
            functions[name] = FunctionCounts(
                function.function_id,
                self._functions.pool_settings(function.function_id).is_server,
                num_succeeded=sum(number for _, status, number in mine if status == Status.SUCCESS),
                num_failed=sum(number for _, status, number in mine if status != Status.SUCCESS),
                num_containers=sum(row.num_active for row in there),
                num_failed_containers=sum(row.num_failed for row in there),
            )
        num_deployments = sum(since <= version.deployed_at < until for version in versions)
        was_deployed = bool(app.deployed_at) or app.state is AppState.DEPLOYED
        return AppStats(app, functions, num_deployments if was_deployed else None)

    def _num_running(self, span: Span) -> int:
        return sum(
            0.0 < item.started_at < span.until
            for container in self._containers(span.function_ids)
            if span.task_id in ("", container.task_id)
            for item in container.held.values()
        )

    def _containers(self, function_ids: Sequence[str]):
        for function_id in function_ids:
            if (pool := self._pools.get(function_id)) is not None:
                yield from pool.containers.values()


def _check(since: float, until: float) -> None:
    if not 0 < until - since <= MAX_SPAN_S:
        raise InvalidArgument("stats are of a span of up to seven days: `until` must be later than `since`")
