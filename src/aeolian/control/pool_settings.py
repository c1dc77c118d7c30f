"""From a definition to what a pool of containers needs to know of it. Pure functions."""

from typing import Any

from modal_proto import api_pb2

from aeolian.domain.containers import Resources, VolumeMountSpec
from aeolian.domain.functions import (
    DEFAULT_SCALEDOWN_WINDOW_S,
    DEFAULT_TIMEOUT_S,
    AutoscalerSettings,
    PoolSettings,
    RetryPolicy,
)

DEFAULT_RESOURCES = Resources()
MIN_STARTUP_S = 60.0
"""A Function that says nothing of its start has as long as for an input, but no less than this."""


def pool_settings(
    function: api_pb2.Function,
    *,
    function_id: str,
    definition_id: str,
    revision: str,
    app_id: str,
    environment_name: str,
    sdk_version: str,
    base_function_id: str = "",
    serialized_params: bytes = b"",
    own_min_containers: bool = False,
) -> PoolSettings:
    """`own_min_containers`: a variant's minimum was asked for by its own options."""
    autoscaler = defined_autoscaler(function)
    if serialized_params and not own_min_containers:
        # A minimum of the class would keep a container for every parameter value that was ever used.
        min_containers = 0
    elif not base_function_id and function.class_parameter_info.schema:
        min_containers = 0  # nobody calls a parametrised class without its parameters
    else:
        min_containers = autoscaler.min_containers
    access = function.network_access
    max_concurrent_inputs = max(1, function.max_concurrent_inputs)
    target = function.target_concurrent_inputs or max_concurrent_inputs
    return PoolSettings(
        function_id=function_id,
        definition_id=definition_id,
        revision=revision,
        app_id=app_id,
        environment_name=environment_name,
        function_name=function.function_name,
        base_function_id=base_function_id,
        serialized_params=serialized_params,
        is_generator=function.function_type == api_pb2.Function.FUNCTION_TYPE_GENERATOR,
        max_concurrent_inputs=max_concurrent_inputs,
        target_concurrent_inputs=min(target, max_concurrent_inputs),
        batch_max_size=function.batch_max_size,
        batch_linger_ms=function.batch_linger_ms,
        max_inputs=1 if function.single_use_containers or function.is_builder_function else function.max_inputs,
        timeout_s=float(function.timeout_secs or DEFAULT_TIMEOUT_S),
        startup_timeout_s=_startup_timeout_s(function),
        retry_policy=_retry_policy(function),
        min_containers=min_containers,
        max_containers=autoscaler.max_containers,
        buffer_containers=autoscaler.buffer_containers,
        scaledown_window_s=autoscaler.scaledown_window_s,
        resources=_resources(function.resources),
        runtime=asked_runtime(function),
        gpu_type=function.resources.gpu_config.gpu_type if function.resources.gpu_config.count else "",
        image_id=function.image_id,
        mount_ids=tuple(function.mount_ids),
        volumes=tuple(
            VolumeMountSpec(
                volume_id=mount.volume_id,
                path=mount.mount_path,
                read_only=mount.read_only,
                sub_path=mount.sub_path,
                allow_background_commits=mount.allow_background_commits,
            )
            for mount in function.volume_mounts
        ),
        secret_ids=tuple(function.secret_ids),
        block_network=function.block_network or access.network_access_type == api_pb2.NetworkAccess.BLOCKED,
        allowed_cidrs=tuple(access.allowed_cidrs)
        if access.network_access_type == api_pb2.NetworkAccess.ALLOWLIST
        else None,
        restrict_modal_access=function.untrusted,
        cluster_size=function._experimental_group_size,
        mount_client_dependencies=function.mount_client_dependencies,
        sdk_version=sdk_version,
        webhook_type=function.webhook_config.type,
        web_methods=tuple(
            sorted(name for name, method in function.method_definitions.items() if method.webhook_config.type)
        ),
        is_server=function.is_server,
        server_port=function.http_config.port,
        exit_grace_s=float(function.http_config.exit_grace_period),
        max_concurrency=function.max_concurrent_inputs if function.is_server else 0,
        is_class=function.is_class,
        is_builder_function=function.is_builder_function,
        checkpointing_enabled=function.checkpointing_enabled,
    )


def asked_runtime(function: api_pb2.Function) -> str:
    """`experimental_options={"runtime": "gvisor"}`; "" where the worker is to choose."""
    return function.experimental_options.get("runtime", "")


def defined_autoscaler(function: api_pb2.Function) -> AutoscalerSettings:
    """The settings of the definition; older SDKs only fill the fields beside `autoscaler_settings`."""
    settings: Any = function.autoscaler_settings

    def pick(name: str, legacy: int) -> int:
        return getattr(settings, name) if settings.HasField(name) else legacy

    return AutoscalerSettings(
        min_containers=pick("min_containers", function.warm_pool_size),
        max_containers=pick("max_containers", function.concurrency_limit),
        buffer_containers=pick("buffer_containers", function._experimental_buffer_containers),
        scaleup_window_s=float(settings.scaleup_window),
        scaledown_window_s=float(
            pick("scaledown_window", function.task_idle_timeout_secs) or DEFAULT_SCALEDOWN_WINDOW_S
        ),
        target_concurrency=settings.target_concurrency_float or float(settings.target_concurrency),
        is_scaled=not settings.HasField("target_concurrency_float") or settings.target_concurrency_float > 0,
    )


def overridden(defined: AutoscalerSettings, override: api_pb2.AutoscalerSettings) -> AutoscalerSettings:
    """`defined`, with the fields that `override` has set."""

    message: Any = override

    def pick(name: str, value):
        return type(value)(getattr(message, name)) if message.HasField(name) else value

    target = pick("target_concurrency_float", pick("target_concurrency", defined.target_concurrency))
    return AutoscalerSettings(
        min_containers=pick("min_containers", defined.min_containers),
        max_containers=pick("max_containers", defined.max_containers),
        buffer_containers=pick("buffer_containers", defined.buffer_containers),
        scaleup_window_s=pick("scaleup_window", defined.scaleup_window_s),
        scaledown_window_s=pick("scaledown_window", defined.scaledown_window_s),
        target_concurrency=target,
        is_scaled=target > 0 if message.HasField("target_concurrency_float") else defined.is_scaled,
    )


def _startup_timeout_s(function: api_pb2.Function) -> float:
    if function.is_server and function.http_config.startup_timeout:
        return float(function.http_config.startup_timeout)
    timeout_s = float(function.timeout_secs or DEFAULT_TIMEOUT_S)
    asked_s = float(function.startup_timeout_secs)
    # The SDK fills in the inputs' timeout where none was asked for.
    return asked_s if asked_s and asked_s != timeout_s else max(MIN_STARTUP_S, timeout_s)


def _retry_policy(function: api_pb2.Function) -> RetryPolicy | None:
    if not function.HasField("retry_policy") or function.is_builder_function:
        return None
    policy = function.retry_policy
    return RetryPolicy(
        max_retries=policy.retries,
        initial_delay_ms=policy.initial_delay_ms,
        backoff_coefficient=policy.backoff_coefficient or 1.0,
        max_delay_ms=policy.max_delay_ms or 60_000,
    )


def _resources(asked: api_pb2.Resources) -> Resources:
    return Resources(
        milli_cpu=asked.milli_cpu or DEFAULT_RESOURCES.milli_cpu,
        milli_cpu_max=asked.milli_cpu_max,
        memory_mb=asked.memory_mb or DEFAULT_RESOURCES.memory_mb,
        memory_mb_max=asked.memory_mb_max,
        ephemeral_disk_mb=asked.ephemeral_disk_mb,
        gpu_count=asked.gpu_config.count,
    )
