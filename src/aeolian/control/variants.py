"""Variants of Functions: one for each set of class parameters and options. Pure functions.

`Cls(p=1)` and `with_options/with_concurrency/with_batching` bind a Function to parameters and overrides. The
result is a Function of its own (own queue, own containers) that shares the code of its base.
"""

from typing import Any

from modal_proto import api_pb2

from aeolian.domain.ids import content_id


def variant_id(base_function_id: str, serialized_params: bytes, options: bytes, pinned_version: int) -> str:
    """The id that this binding always gets."""
    parts = [base_function_id.encode(), str(pinned_version).encode(), str(len(serialized_params)).encode()]
    return content_id("function", b"\0".join(parts) + b"\0" + serialized_params + options)


def canonical_options(options: api_pb2.FunctionOptions) -> bytes:
    """The stored form; b"" when nothing is overridden (the SDK sends empty messages for that)."""
    kept = api_pb2.FunctionOptions()
    kept.CopyFrom(options)
    if kept.HasField("resources") and not kept.resources.ListFields():
        kept.ClearField("resources")
    return kept.SerializeToString(deterministic=True)


def stacked(first: bytes, second: bytes) -> bytes:
    """The options of a variant of a variant: the later ones win, field by field."""
    if not first or not second:
        return first or second
    under: Any = api_pb2.FunctionOptions.FromString(first)
    over: Any = api_pb2.FunctionOptions.FromString(second)
    for flag, field in REPLACED.items():
        if getattr(over, flag):
            under.ClearField(field)
    for field in ("retry_policy", "scheduler_placement"):
        if over.HasField(field):
            under.ClearField(field)
    resources = merged_resources(under.resources, over.resources)
    under.MergeFrom(over)
    under.resources.CopyFrom(resources)
    return canonical_options(under)


REPLACED = {
    "replace_secret_ids": "secret_ids",
    "replace_volume_mounts": "volume_mounts",
    "replace_cloud_bucket_mounts": "cloud_bucket_mounts",
}
"""With this flag set, the list takes the place of the one before; without it, it comes on top."""


def with_options(function: api_pb2.Function, overrides: api_pb2.FunctionOptions) -> api_pb2.Function:
    """The definition under these overrides. `object_dependencies` stay: they mirror the code, not the options."""
    options: Any = overrides  # fields are named by data below, which the generated types do not allow
    bound: Any = api_pb2.Function()
    bound.CopyFrom(function)
    for flag, field in REPLACED.items():
        if getattr(options, flag):
            bound.ClearField(field)
        target = getattr(bound, field)
        target.extend(item for item in getattr(options, field) if item not in target)
    bound.mount_ids.extend(mount_id for mount_id in options.mount_ids if mount_id not in bound.mount_ids)
    if options.HasField("resources"):
        bound.resources.CopyFrom(merged_resources(bound.resources, options.resources))
    for field in ("retry_policy", "scheduler_placement"):
        if options.HasField(field):
            getattr(bound, field).CopyFrom(getattr(options, field))
    for field in ("timeout_secs", "cloud_provider_str", "routing_region", "batch_max_size", "batch_linger_ms"):
        if options.HasField(field):
            setattr(bound, field, getattr(options, field))
    if options.HasField("max_concurrent_inputs"):
        bound.max_concurrent_inputs = options.max_concurrent_inputs
        bound.target_concurrent_inputs = options.target_concurrent_inputs  # 0 = as many as the maximum
    elif options.HasField("target_concurrent_inputs"):
        bound.target_concurrent_inputs = options.target_concurrent_inputs
    settings = bound.autoscaler_settings
    for option, setting, legacy in (
        ("warm_pool_size", "min_containers", "warm_pool_size"),
        ("concurrency_limit", "max_containers", "concurrency_limit"),
        ("buffer_containers", "buffer_containers", "_experimental_buffer_containers"),
        ("task_idle_timeout_secs", "scaledown_window", "task_idle_timeout_secs"),
    ):
        if options.HasField(option):
            setattr(settings, setting, getattr(options, option))
            setattr(bound, legacy, getattr(options, option))
    return bound


def merged_resources(under: api_pb2.Resources, over: api_pb2.Resources) -> api_pb2.Resources:
    """`over` on top of `under`. A new request without a limit of its own drops the old limit."""
    merged: Any = api_pb2.Resources()
    merged.CopyFrom(under)
    for request, limit in (("milli_cpu", "milli_cpu_max"), ("memory_mb", "memory_mb_max")):
        if getattr(over, request) and not getattr(over, limit):
            merged.ClearField(limit)
    if over.HasField("gpu_config"):
        merged.ClearField("gpu_config")
    merged.MergeFrom(over)
    return merged
