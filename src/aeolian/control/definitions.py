"""Definitions of Functions: what the SDK sent, checked and made canonical, and what is derived from it.

Pure functions over protobuf messages. A definition is kept as the ranked list of `Function` messages (a list of
GPUs makes several; the first is the one that runs); everything else that clients are told follows from it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
from modal_proto import api_pb2

from aeolian.domain.errors import InvalidArgument, Unimplemented
from aeolian.domain.ids import content_id
from aeolian.domain.schedules import Cron, Period, Schedule

MAX_SERIALIZED_BYTES = 16 << 20
MAX_DEFINITION_BYTES = 40 << 20
MAX_TIMEOUT_S = 24 * 3600
MAX_CONCURRENT_INPUTS = 1000
MAX_BATCH_SIZE = 1000
MAX_RANKED = 16
MAX_NAME_LENGTH = 512


class WebFunction(msgspec.Struct, frozen=True):
    """A Function (or a method of a class) that answers HTTP, and what its URL may be made of."""

    function_id: str
    method_name: str
    app_id: str
    function_name: str
    requested_suffix: str = ""
    ephemeral_suffix: str = ""


class WebAddress(NamedTuple):
    """Where a web function is reached, and what its user should know of that."""

    url: str
    is_truncated: bool = False
    """Its names are too long for the URL: a part of them was cut off."""
    is_stolen: bool = False
    """Another app's Function was reached there before."""


AddressOf = Callable[[WebFunction], WebAddress]


def ranked_functions(request: api_pb2.FunctionCreateRequest) -> list[api_pb2.Function]:
    """The definition's `Function` messages, the preferred one first. Raises InvalidArgument."""
    has_function, has_data = request.HasField("function"), request.HasField("function_data")
    if has_function == has_data:
        raise InvalidArgument("FunctionCreate needs exactly one of `function` and `function_data`")
    if has_function:
        return [request.function]
    ranked = sorted(request.function_data.ranked_functions, key=lambda item: item.rank)
    if not 1 <= len(ranked) <= MAX_RANKED:
        raise InvalidArgument(f"function_data needs 1 to {MAX_RANKED} ranked functions, not {len(ranked)}")
    return [item.function for item in ranked]


def check(function: api_pb2.Function) -> None:
    """Raises InvalidArgument for what cannot run, Unimplemented for what Aeolian cannot do (yet)."""
    name = check_name(function.function_name)
    for what, size in (
        ("function", len(function.function_serialized)),
        ("class", len(function.class_serialized)),
    ):
        if size > MAX_SERIALIZED_BYTES:
            raise InvalidArgument(
                f"Function '{name}': the serialized {what} has {size} bytes, the limit is {MAX_SERIALIZED_BYTES}: "
                "pass large data as parameters or by a Volume, not as global variables"
            )
    for what, value, limit in (
        ("timeout", function.timeout_secs, MAX_TIMEOUT_S),
        ("startup_timeout", function.startup_timeout_secs, MAX_TIMEOUT_S),
        ("max_inputs of @concurrent", function.max_concurrent_inputs, MAX_CONCURRENT_INPUTS),
        ("max_batch_size", function.batch_max_size, MAX_BATCH_SIZE),
    ):
        if value > limit:
            raise InvalidArgument(f"Function '{name}': {what} is {value}, the limit is {limit}")
    settings = function.autoscaler_settings
    if settings.max_containers and settings.min_containers > settings.max_containers:
        raise InvalidArgument(
            f"Function '{name}': min_containers ({settings.min_containers}) is above "
            f"max_containers ({settings.max_containers})"
        )
    for mount in function.volume_mounts:
        if not mount.mount_path.startswith("/") or ".." in mount.mount_path.split("/"):
            raise InvalidArgument(
                f"Function '{name}': a Volume cannot be mounted at {mount.mount_path!r}: use an absolute path"
            )
    schedule_of(function)
    for what, used in (
        ("network file systems", bool(function.shared_volume_mounts)),
        ("cloud bucket mounts", bool(function.cloud_bucket_mounts)),
        ("proxies", bool(function.proxy_id)),
        ("clustered containers", function._experimental_group_size > 1),
    ):
        if used:
            raise Unimplemented(f"Function '{name}' uses {what}, which Aeolian does not support (yet)")


def schedule_of(function: api_pb2.Function) -> Schedule | None:
    """What it asks for; None: it runs when it is called. Raises InvalidArgument for what cannot be followed."""
    kind = function.schedule.WhichOneof("schedule_oneof")
    if kind is None:
        return None
    if function.webhook_config.type or function.is_server:
        raise InvalidArgument(
            f"Function '{function.function_name}' answers HTTP: it cannot have a schedule, which would call it without a request"
        )
    schedule: Schedule
    if kind == "cron":
        schedule = Cron(function.schedule.cron.cron_string, function.schedule.cron.timezone or "UTC")
    else:
        period = function.schedule.period
        parts = {field.name: getattr(period, field.name) for field in period.DESCRIPTOR.fields}
        if negative := [f"{name}={value:g}" for name, value in parts.items() if value < 0]:
            raise InvalidArgument(f"Function '{function.function_name}': a Period cannot have {', '.join(negative)}")
        hours = 24 * (7 * period.weeks + period.days) + period.hours
        schedule = Period(12 * period.years + period.months, (60.0 * hours + period.minutes) * 60 + period.seconds)
    try:
        schedule.check()
    except InvalidArgument as error:
        raise InvalidArgument(f"Function '{function.function_name}': {error.message}") from error
    return schedule


def check_name(name: str) -> str:
    if not 1 <= len(name) <= MAX_NAME_LENGTH or "\0" in name:
        raise InvalidArgument(f"{name[:80]!r} cannot be the name of a Function: use 1 to {MAX_NAME_LENGTH} characters")
    return name


def canonical(functions: Iterable[api_pb2.Function]) -> bytes:
    """The stored form: equal definitions give equal bytes.

    The SDK sends mount ids in no particular order. Web URLs are ours, not the client's. Memory snapshots come
    later: without them a container must not be told that it is being checkpointed.
    """
    data = api_pb2.FunctionData()
    for rank, function in enumerate(functions):
        kept = data.ranked_functions.add(rank=rank).function
        kept.CopyFrom(function)
        kept.is_checkpointing_function = False
        kept.web_url = ""
        mount_ids = sorted(set(function.mount_ids))
        del kept.mount_ids[:]
        kept.mount_ids.extend(mount_ids)
    content = data.SerializeToString(deterministic=True)
    if len(content) > MAX_DEFINITION_BYTES:
        raise InvalidArgument(
            f"the definition of Function '{data.ranked_functions[0].function.function_name}' has {len(content)} "
            f"bytes, the limit is {MAX_DEFINITION_BYTES}"
        )
    return content


def definition_id(function_id: str, content: bytes, sdk_version: str) -> str:
    return content_id("definition", f"{function_id}\0{sdk_version}\0".encode() + content)


def referenced_ids(function: api_pb2.Function) -> set[str]:
    """Ids of all objects that a container of this Function needs."""
    ids = {*function.secret_ids, *function.mount_ids, function.image_id}
    ids |= {mount.volume_id for mount in function.volume_mounts}
    ids |= {dependency.object_id for dependency in function.object_dependencies}
    ids.discard("")
    return ids


def web_functions(
    described: api_pb2.Function | api_pb2.FunctionPrecreateRequest, function_id: str, app_id: str
) -> list[WebFunction]:
    """What of a definition, or of what is announced of it, answers HTTP: itself, or methods of it."""

    def web(webhook: api_pb2.WebhookConfig, name: str, method_name: str) -> WebFunction:
        return WebFunction(
            function_id=function_id,
            method_name=method_name,
            app_id=app_id,
            function_name=name,
            requested_suffix=webhook.requested_suffix,
            ephemeral_suffix=webhook.ephemeral_suffix,
        )

    found = []
    is_server = isinstance(described, api_pb2.Function) and described.is_server
    if described.webhook_config.type or is_server:
        found.append(web(described.webhook_config, described.function_name, ""))
    for name, method in described.method_definitions.items():
        if method.webhook_config.type:
            found.append(web(method.webhook_config, method.function_name, name))
    return found


def handle_of(
    described: api_pb2.Function | api_pb2.FunctionPrecreateRequest,
    *,
    function_id: str,
    app_id: str,
    definition_id: str,
    address_of: AddressOf,
) -> api_pb2.FunctionHandleMetadata:
    """What a client must know of a Function to call it: of its definition, or of what is announced of it."""
    handle = api_pb2.FunctionHandleMetadata(
        function_name=described.function_name,
        function_type=described.function_type,
        definition_id=definition_id,
        app_id=app_id,
        supported_input_formats=described.supported_input_formats,
        supported_output_formats=described.supported_output_formats,
    )
    if described.HasField("function_schema"):
        handle.function_schema.CopyFrom(described.function_schema)
    if isinstance(described, api_pb2.Function) and described.HasField("class_parameter_info"):
        handle.class_parameter_info.CopyFrom(described.class_parameter_info)

    webs = {web.method_name: web for web in web_functions(described, function_id, app_id)}
    if described.webhook_config.type:
        handle.web_url = address_of(webs[""]).url
    elif "" in webs and (url := address_of(webs[""]).url):  # a server
        handle._experimental_flash_urls.append(url)
    for name, method in described.method_definitions.items():
        of_method = handle.method_handle_metadata[name]
        of_method.function_name = method.function_name
        of_method.function_type = method.function_type
        of_method.is_method = True
        of_method.use_method_name = name
        of_method.definition_id = definition_id
        of_method.app_id = app_id
        if name in webs:
            of_method.web_url = address_of(webs[name]).url
        of_method.supported_input_formats.extend(method.supported_input_formats)
        of_method.supported_output_formats.extend(method.supported_output_formats)
        if method.HasField("function_schema"):
            of_method.function_schema.CopyFrom(method.function_schema)
    return handle


def _is_map(field) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


_SHARED_FIELDS = {
    field.name
    for field in api_pb2.FunctionData.DESCRIPTOR.fields
    if (twin := api_pb2.Function.DESCRIPTOR.fields_by_name.get(field.name)) is not None
    and twin.type == field.type
    and (twin.message_type is None or _is_map(field) or twin.message_type == field.message_type)
}


def function_data(
    functions: Sequence[api_pb2.Function],
    handle: api_pb2.FunctionHandleMetadata,
    *,
    function_id: str,
    address_of: AddressOf,
) -> api_pb2.FunctionData:
    """The definition as FunctionGet and FunctionCreate give it back, without the code."""
    data = api_pb2.FunctionData()
    addresses = {web.method_name: address_of(web) for web in web_functions(functions[0], function_id, handle.app_id)}
    for rank, function in enumerate(functions):
        copy = data.ranked_functions.add(rank=rank).function
        copy.CopyFrom(function)
        copy.ClearField("function_serialized")
        copy.ClearField("class_serialized")
        for method_name, address in addresses.items():
            if copy.is_server:
                copy.flash_service_urls[:] = [address.url] if address.url else []
                continue
            web = copy.method_definitions[method_name] if method_name else copy
            web.web_url = address.url
            web.web_url_info.truncated = address.is_truncated
            web.web_url_info.label_stolen = address.is_stolen
    field: Any
    for field, value in data.ranked_functions[0].function.ListFields():
        if field.name not in _SHARED_FIELDS:
            continue
        target = getattr(data, field.name)
        if _is_map(field) and field.message_type.fields_by_name["value"].message_type is not None:
            for key, item in value.items():
                target[key].CopyFrom(item)
        elif _is_map(field):
            target.update(value)
        elif hasattr(target, "extend"):
            target.extend(value)
        elif field.message_type is not None:
            target.CopyFrom(value)
        else:
            setattr(data, field.name, value)
    return data
