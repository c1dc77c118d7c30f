"""RPCs that say what happened to Functions and Apps in a span of time: `modal function stats`, `modal app stats`."""

import struct
from collections.abc import Sequence

from google.protobuf.internal.encoder import _VarintBytes
from google.protobuf.timestamp_pb2 import Timestamp
from modal_proto import api_pb2

from aeolian.control.stats import FunctionCounts, FunctionStats, Stats
from aeolian.domain.caller import Caller
from aeolian.protocol.apps import lifecycle

BASIS_POINTS = (5000, 9000, 9900)


class StatsRpcs:
    def __init__(self, stats: Stats):
        self._stats = stats

    async def FunctionGetTimeRangeStats(
        self, request: api_pb2.FunctionGetTimeRangeStatsRequest, caller: Caller
    ) -> api_pb2.FunctionGetTimeRangeStatsResponse | bytes:
        found = await self._stats.of_function(
            request.function_id,
            caller,
            since=_seconds(request.since),
            until=_seconds(request.until),
            task_id=request.container_id,
            variants=request.rollup,
        )
        if caller.sdk_version.startswith("1.5."):
            return _for_1_5(request, found)
        response = api_pb2.FunctionGetTimeRangeStatsResponse(
            since=request.since,
            until=request.until,
            input_success_count=found.num_succeeded,
            input_failure_count=found.num_failed,
            input_timeout_count=found.num_timed_out,
            input_running_at_end_count=found.num_running,
            container_started_count=found.containers.num_started,
            container_error_count=found.containers.num_failed,
            container_creating_at_end_count=found.containers.num_starting,
            container_total_count=found.containers.num_active,
            variant_count=found.num_variants,
        )
        _fill(response.input_percentile_stats, "Execution time (s)", found.execution_s)
        _fill(response.input_percentile_stats, "End-to-end latency (s)", found.latency_s)
        _fill(response.container_percentile_stats, "Startup time (s)", found.startup_s)
        return response

    async def AppGetTimeRangeStats(
        self, request: api_pb2.AppGetTimeRangeStatsRequest, caller: Caller
    ) -> api_pb2.AppGetTimeRangeStatsResponse:
        found = await self._stats.of_app(
            request.app_id, caller, since=_seconds(request.since), until=_seconds(request.until)
        )
        response = api_pb2.AppGetTimeRangeStatsResponse(
            since=request.since,
            until=request.until,
            lifecycle=lifecycle(found.app),
            deployment_count=found.num_deployments,
        )
        for group in (response.functions.total, response.servers.total):
            group.SetInParent()
        for name, counts in found.functions.items():
            if counts.is_server:
                server = response.servers.by_name[name]
                server.object_id = counts.function_id
                _count_containers(server.counts.containers, response.servers.total.containers, counts)
                continue
            function = response.functions.by_name[name]
            function.object_id = counts.function_id
            for calls in (function.counts.calls, response.functions.total.calls):
                calls.succeeded += counts.num_succeeded
                calls.failed += counts.num_failed
                calls.total += counts.num_succeeded + counts.num_failed
            _count_containers(function.counts.containers, response.functions.total.containers, counts)
        return response


def _count_containers(
    mine: api_pb2.AppContainerCounts, total: api_pb2.AppContainerCounts, counts: FunctionCounts
) -> None:
    for containers in (mine, total):
        containers.container_active_count += counts.num_containers
        containers.container_errors += counts.num_failed_containers


def _fill(distributions, name: str, values: Sequence[float]) -> None:
    if values:
        distributions[name].unit = "seconds"
        for points, value in zip(BASIS_POINTS, values, strict=True):
            distributions[name].percentiles.add(percentile_basis_points=points, value=value)


def _for_1_5(request: api_pb2.FunctionGetTimeRangeStatsRequest, found: FunctionStats) -> bytes:
    """The reply as SDKs 1.5 have it, which gave the same field numbers to other things."""
    head = api_pb2.FunctionGetTimeRangeStatsResponse(since=request.since, until=request.until)
    parts = [head.SerializeToString()]
    times = {3: found.execution_s, 4: found.queue_s, 5: found.latency_s, 6: found.startup_s}
    for number, values in times.items():
        if values:
            median, ninth = values[0], values[1]
            message = b"\x09" + struct.pack("<d", median) + b"\x11" + struct.pack("<d", ninth)
            parts += (_VarintBytes(number << 3 | 2), _VarintBytes(len(message)), message)
    counts = {7: found.num_succeeded, 8: found.num_failed, 9: found.num_timed_out, 13: found.num_variants}
    for number, count in counts.items():
        parts += (_VarintBytes(number << 3), _VarintBytes(count))
    return b"".join(parts)


def _seconds(stamp: Timestamp) -> float:
    return stamp.seconds + stamp.nanos / 1e9
