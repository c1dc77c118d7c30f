"""Metrics: what is counted, and what is looked up."""

from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from aeolian.control.metrics import FunctionName, Metrics, PoolFigures, WorkerFigures
from aeolian.domain.containers import ExitStatus, HookTiming
from aeolian.domain.telemetry import FinishedInput

NAME = FunctionName("shop", "price")


def metrics() -> Metrics:
    return Metrics(lambda app_id, function_id: NAME)


def values(metrics: Metrics) -> dict[tuple, float]:
    """Every sample: (name, values of its labels in the order of their names…) -> value."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def finished(**changes) -> FinishedInput:
    done = FinishedInput("ap-1", "fu-1", "fc-1", 0, "ta-1", "success", 0, "", "fc-1", 100.0, 100.5, 102.5, 102.6)
    return done._replace(**changes)


def test_inputs_are_counted_by_how_they_end():
    counted = metrics()
    for done in (finished(), finished(), finished(status="timeout", retry_count=2)):
        counted.input_finished(done)
    found = values(counted)
    assert found["aeolian_inputs_total", *NAME, "success"] == 2
    assert found["aeolian_inputs_total", *NAME, "timeout"] == 1
    assert found["aeolian_input_retries_total", *NAME] == 2
    assert found["aeolian_input_wait_seconds_sum", *NAME] == 1.5
    assert found["aeolian_input_run_seconds_sum", *NAME] == 6.0


def test_an_input_that_no_container_has_begun_neither_waited_nor_ran():
    counted = metrics()
    counted.input_finished(finished(status="terminated", started_at=0.0))
    found = values(counted)
    assert found["aeolian_inputs_total", *NAME, "terminated"] == 1
    assert ("aeolian_input_wait_seconds_count", *NAME) not in found


def test_a_containers_start_is_told_apart_by_its_hooks():
    counted = metrics()
    hooks = (HookTiming("image", 0.002), HookTiming("user code", 0.3))
    counted.container_started(
        SimpleNamespace(app_id="ap-1", function_id="fu-1", enqueued_at=10.0, started_at=10.4, hooks=hooks)
    )
    found = values(counted)
    assert round(found["aeolian_container_start_seconds_sum", *NAME], 6) == 0.4
    assert found["aeolian_container_start_hook_seconds_sum", "image"] == 0.002
    assert found["aeolian_container_start_hook_seconds_count", "user code"] == 1


def test_containers_that_end_are_counted_by_why():
    counted = metrics()
    running = SimpleNamespace(app_id="ap-1", function_id="fu-1", stop=None)
    stopped = SimpleNamespace(app_id="ap-1", function_id="fu-1", stop=object())
    counted.container_ended(running, ExitStatus(exit_code=-9, oom_killed=True))
    counted.container_ended(running, ExitStatus(exit_code=3))
    counted.container_ended(stopped, ExitStatus(exit_code=-9))
    found = values(counted)
    for how in ("out_of_memory", "failed", "stopped"):
        assert found["aeolian_containers_ended_total", *NAME, how] == 1


def test_pools_of_one_name_are_added_up():
    counted = metrics()
    pools = [PoolFigures(NAME, 3, 1, {"running": 1}), PoolFigures(NAME, 2, 0, {"running": 1, "starting": 2})]
    counted.watch(lambda: pools, lambda: [WorkerFigures("wo-1", 2.0, 1 << 30, 0)])
    found = values(counted)
    assert found["aeolian_inputs_queued", *NAME] == 5
    assert found["aeolian_inputs_running", *NAME] == 1
    assert found["aeolian_containers", *NAME, "running"] == 2
    assert found["aeolian_containers", *NAME, "starting"] == 2
    assert found["aeolian_worker_cores", "wo-1"] == 2.0


def test_rpcs_and_requests_are_timed():
    counted = metrics()
    counted.rpc_answered("FunctionMap", "OK", 0.25)
    counted.request_answered("PUT", "/blobs/{blob_id}", 507, 0.5)
    found = values(counted)
    assert found["aeolian_rpc_seconds_sum", "OK", "FunctionMap"] == 0.25
    assert found["aeolian_http_request_seconds_count", "PUT", "/blobs/{blob_id}", "507"] == 1


def test_a_restart_of_the_clock_gives_no_negative_times():
    counted = metrics()
    counted.input_finished(finished(started_at=99.0, finished_at=98.0))
    assert values(counted)["aeolian_input_run_seconds_sum", *NAME] == 0
