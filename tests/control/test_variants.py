from modal_proto import api_pb2

from aeolian.control.pool_settings import overridden, pool_settings
from aeolian.control.variants import canonical_options, stacked, variant_id, with_options
from aeolian.domain.containers import VolumeMountSpec
from aeolian.domain.functions import AutoscalerSettings

BASE = api_pb2.Function(
    function_name="f",
    timeout_secs=60,
    secret_ids=["st-1"],
    volume_mounts=[api_pb2.VolumeMount(volume_id="vo-1", mount_path="/a")],
    resources=api_pb2.Resources(milli_cpu=1000, milli_cpu_max=2000, memory_mb=512),
    autoscaler_settings=api_pb2.AutoscalerSettings(min_containers=2, max_containers=10),
    retry_policy=api_pb2.FunctionRetryPolicy(retries=3, backoff_coefficient=2.0, initial_delay_ms=500),
    object_dependencies=[api_pb2.ObjectDependency(object_id="st-1")],
)
Options = api_pb2.FunctionOptions


def pool(function: api_pb2.Function, **fields):
    defaults = dict(function_id="fu-1", definition_id="de-1", revision="r", app_id="ap-1")
    return pool_settings(function, **defaults, environment_name="main", sdk_version="1.6.4", **fields)


def test_lists_come_on_top_unless_they_are_to_be_replaced():
    assert with_options(BASE, Options(secret_ids=["st-2"])).secret_ids == ["st-1", "st-2"]
    assert with_options(BASE, Options(secret_ids=["st-2"], replace_secret_ids=True)).secret_ids == ["st-2"]
    assert with_options(BASE, Options(replace_volume_mounts=True)).volume_mounts == []


def test_what_an_option_does_not_name_stays():
    bound = with_options(BASE, Options(timeout_secs=5))
    assert (bound.timeout_secs, bound.retry_policy.retries, bound.autoscaler_settings.max_containers) == (5, 3, 10)
    assert bound.object_dependencies == BASE.object_dependencies
    assert BASE.timeout_secs == 60


def test_a_new_request_drops_the_old_limit():
    bound = with_options(BASE, Options(resources=api_pb2.Resources(milli_cpu=4000)))
    assert (bound.resources.milli_cpu, bound.resources.milli_cpu_max, bound.resources.memory_mb) == (4000, 0, 512)


def test_with_concurrency_and_with_batching_reach_the_pool():
    assert pool(with_options(BASE, Options(max_concurrent_inputs=8))).target_concurrent_inputs == 8
    both = pool(with_options(BASE, Options(max_concurrent_inputs=8, target_concurrent_inputs=5)))
    assert (both.max_concurrent_inputs, both.target_concurrent_inputs) == (8, 5)
    batched = pool(with_options(BASE, Options(batch_max_size=4, batch_linger_ms=100)))
    assert (batched.batch_max_size, batched.batch_linger_ms) == (4, 100)


def test_an_empty_option_message_is_no_option():
    assert canonical_options(Options(resources=api_pb2.Resources())) == b""
    assert variant_id("fu-1", b"p", b"", 0) == variant_id("fu-1", b"p", b"", 0) != variant_id("fu-1", b"q", b"", 0)
    assert variant_id("fu-1", b"ab", b"c", 0) != variant_id("fu-1", b"a", b"bc", 0)


def test_later_options_win_over_earlier_ones():
    first = canonical_options(Options(timeout_secs=5, secret_ids=["st-2"], replace_secret_ids=True))
    second = canonical_options(Options(timeout_secs=7, max_concurrent_inputs=3))
    merged = Options.FromString(stacked(first, second))
    assert (merged.timeout_secs, merged.max_concurrent_inputs, list(merged.secret_ids)) == (7, 3, ["st-2"])
    third = canonical_options(Options(secret_ids=["st-3"], replace_secret_ids=True))
    assert list(Options.FromString(stacked(first, third)).secret_ids) == ["st-3"]


def test_the_pool_sees_the_definition():
    settings = pool(BASE)
    assert (settings.timeout_s, settings.startup_timeout_s, settings.min_containers) == (60.0, 60.0, 2)
    assert settings.volumes == (VolumeMountSpec("vo-1", "/a", False, "", False),)
    assert settings.retry_policy.max_retries == 3 and settings.retry_policy.delay_s(3) == 2.0
    assert pool(api_pb2.Function(function_name="f", single_use_containers=True)).max_inputs == 1


def test_fields_of_older_sdks_are_understood():
    old = api_pb2.Function(function_name="f", warm_pool_size=1, concurrency_limit=4, task_idle_timeout_secs=9)
    settings = pool(old)
    assert (settings.min_containers, settings.max_containers, settings.scaledown_window_s) == (1, 4, 9.0)


def test_a_parameter_value_keeps_no_containers_that_nobody_asked_for():
    assert pool(BASE, base_function_id="fu-0", serialized_params=b"p").min_containers == 0
    asked = pool(BASE, base_function_id="fu-0", serialized_params=b"p", own_min_containers=True)
    assert asked.min_containers == 2


def test_only_fields_that_are_set_override_the_autoscaler():
    defined = AutoscalerSettings(min_containers=2, max_containers=5)
    after = overridden(defined, api_pb2.AutoscalerSettings(max_containers=0, scaledown_window=30))
    assert after == AutoscalerSettings(min_containers=2, max_containers=0, scaledown_window_s=30.0)
