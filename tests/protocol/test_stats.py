"""How stats are answered: as the SDK of 1.6 reads them, and as those of 1.5 do."""

from types import SimpleNamespace

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from modal_proto import api_pb2

from aeolian.control.stats import AppStats, FunctionCounts, FunctionStats
from aeolian.domain.apps import App, AppState
from aeolian.domain.caller import Caller
from aeolian.protocol.stats import StatsRpcs
from aeolian.storage.stats import ContainerCounts

FOUND = FunctionStats(
    num_succeeded=300,
    num_failed=2,
    num_timed_out=1,
    num_running=4,
    num_variants=5,
    execution_s=[0.1, 0.2, 0.3],
    latency_s=[0.4, 0.5, 0.6],
    queue_s=[],
    startup_s=[7.0, 8.0, 9.0],
    containers=ContainerCounts("", 9, 8, 7, 6),
)
REQUEST = api_pb2.FunctionGetTimeRangeStatsRequest(function_id="fu-1", since={"seconds": 5}, until={"seconds": 9})


def rpcs(found) -> StatsRpcs:
    async def answer(*args, **kwargs):
        return found

    return StatsRpcs(SimpleNamespace(of_function=answer, of_app=answer))


async def test_the_newest_sdk_finds_counts_and_percentiles_by_the_names_that_it_shows():
    reply = await rpcs(FOUND).FunctionGetTimeRangeStats(REQUEST, Caller("local", sdk_version="1.6.4"))
    assert (reply.input_success_count, reply.input_failure_count, reply.input_timeout_count) == (300, 2, 1)
    assert (reply.input_running_at_end_count, reply.variant_count, reply.container_total_count) == (4, 5, 9)
    assert set(reply.input_percentile_stats) == {"Execution time (s)", "End-to-end latency (s)"}
    percentiles = reply.container_percentile_stats["Startup time (s)"].percentiles
    assert [(item.percentile_basis_points, item.value) for item in percentiles] == [(5000, 7), (9000, 8), (9900, 9)]


async def test_sdks_of_the_minor_version_before_find_the_same_where_they_look():
    raw = await rpcs(FOUND).FunctionGetTimeRangeStats(REQUEST, Caller("local", sdk_version="1.5.5"))
    reply = old_reply().FromString(raw)
    assert (reply.since.p50, reply.success, reply.failure, reply.timeout, reply.variants) == (0, 300, 2, 1, 5)
    assert (reply.execution.p50, reply.execution.p90) == (0.1, 0.2)
    assert (reply.latency.p50, reply.latency.p90) == (0.4, 0.5)
    assert (reply.startup.p50, reply.startup.p90) == (7.0, 8.0)
    assert not reply.HasField("queue")


def old_reply() -> type:
    """The reply as 1.5 declares it."""
    file = descriptor_pb2.FileDescriptorProto(name="old.proto", package="old", syntax="proto3")
    percentiles = file.message_type.add(name="Percentiles")
    for number, name in ((1, "p50"), (2, "p90")):
        percentiles.field.add(name=name, number=number, type="TYPE_DOUBLE", label="LABEL_OPTIONAL")
    reply = file.message_type.add(name="Reply")
    for number, name in ((1, "since"), (3, "execution"), (4, "queue"), (5, "latency"), (6, "startup")):
        reply.field.add(
            name=name, number=number, type="TYPE_MESSAGE", type_name=".old.Percentiles", label="LABEL_OPTIONAL"
        )
    for number, name in ((7, "success"), (8, "failure"), (9, "timeout"), (13, "variants")):
        reply.field.add(name=name, number=number, type="TYPE_UINT32", label="LABEL_OPTIONAL")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("old.Reply"))


async def test_an_app_is_told_by_function_and_in_all_with_servers_apart():
    app = App("ap-1", "local", "en-1", "main", AppState.DEPLOYED, deployed_at=5.0, version=2)
    functions = {
        "f": FunctionCounts("fu-1", False, num_succeeded=3, num_failed=1, num_containers=2, num_failed_containers=1),
        "g": FunctionCounts("fu-2", False, num_succeeded=1, num_containers=1),
        "serve": FunctionCounts("fu-3", True, num_containers=4),
    }
    request = api_pb2.AppGetTimeRangeStatsRequest(app_id="ap-1", since={"seconds": 5}, until={"seconds": 9})
    reply = await rpcs(AppStats(app, functions, 2)).AppGetTimeRangeStats(request, Caller("local"))
    calls, containers = reply.functions.total.calls, reply.functions.total.containers
    assert (calls.total, calls.succeeded, calls.failed) == (5, 4, 1)
    assert (containers.container_active_count, containers.container_errors) == (3, 1)
    assert reply.functions.by_name["f"].counts.calls.failed == 1
    assert reply.servers.by_name["serve"].counts.containers.container_active_count == 4
    assert (reply.deployment_count, reply.lifecycle.version) == (2, 2)
    never = await rpcs(AppStats(app, {}, None)).AppGetTimeRangeStats(request, Caller("local"))
    assert not never.HasField("deployment_count")
