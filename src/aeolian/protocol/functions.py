"""RPCs of Functions as definitions: create, look up, bind, scale. Calls are `protocol/calls`' matter."""

from modal_proto import api_pb2

from aeolian.control import pool_settings
from aeolian.control.function_changes import FunctionChanges
from aeolian.control.functions import Functions
from aeolian.domain.caller import Caller
from aeolian.domain.functions import AutoscalerSettings

MAX_VARIANTS_PAGE = 500


class FunctionRpcs:
    def __init__(self, functions: Functions, changes: FunctionChanges):
        self._functions = functions
        self._changes = changes

    async def FunctionPrecreate(
        self, request: api_pb2.FunctionPrecreateRequest, caller: Caller
    ) -> api_pb2.FunctionPrecreateResponse:
        function_id, handle = await self._changes.precreate(request, caller)
        return api_pb2.FunctionPrecreateResponse(function_id=function_id, handle_metadata=handle)

    async def FunctionCreate(
        self, request: api_pb2.FunctionCreateRequest, caller: Caller
    ) -> api_pb2.FunctionCreateResponse:
        function_id, definition = await self._changes.create(request, caller)
        handle, data = self._changes.created(function_id, definition)
        return api_pb2.FunctionCreateResponse(
            function_id=function_id,
            function=data.ranked_functions[0].function,
            function_data=data,
            handle_metadata=handle,
        )

    async def FunctionGet(self, request: api_pb2.FunctionGetRequest, caller: Caller) -> api_pb2.FunctionGetResponse:
        function_id = await self._changes.named(
            request.app_name, request.object_tag, request.environment_name, request.app_version, caller
        )
        return api_pb2.FunctionGetResponse(
            function_id=function_id,
            handle_metadata=self._functions.handle(function_id),
            function=self._functions.function_data(function_id),
        )

    async def FunctionGetById(
        self, request: api_pb2.FunctionGetByIdRequest, caller: Caller
    ) -> api_pb2.FunctionGetByIdResponse:
        handle, data = await self._functions.look_back(request.function_id, caller)
        return api_pb2.FunctionGetByIdResponse(function=data, handle_metadata=handle)

    async def FunctionBindParams(
        self, request: api_pb2.FunctionBindParamsRequest, caller: Caller
    ) -> api_pb2.FunctionBindParamsResponse:
        bound_id = await self._changes.bind(
            request.function_id,
            request.serialized_params,
            request.function_options,
            caller,
            pinned_version=request.function_options.pinned_app_version,
        )
        return api_pb2.FunctionBindParamsResponse(
            bound_function_id=bound_id, handle_metadata=self._functions.handle(bound_id)
        )

    async def FunctionListVariants(
        self, request: api_pb2.FunctionListVariantsRequest, caller: Caller
    ) -> api_pb2.FunctionListVariantsResponse:
        limit = min(request.limit or MAX_VARIANTS_PAGE, MAX_VARIANTS_PAGE)
        has_cursor = request.HasField("cursor")
        response = api_pb2.FunctionListVariantsResponse()
        rows = None
        if 0 < request.limit <= MAX_VARIANTS_PAGE and not has_cursor:
            rows = await self._changes.busiest_variants(request.function_id, limit, caller)
            response.ordered_by_task_count = rows is not None
        if rows is None:
            before = (request.cursor.created_before, request.cursor.function_id) if has_cursor else None
            rows = await self._changes.list_variants(request.function_id, before, limit, caller)
        for row in rows:
            info = response.infos.add(function_id=row.function_id, serialized_params=row.serialized_params)
            if row.options:
                info.function_options.ParseFromString(row.options)
        if len(rows) == limit and not response.ordered_by_task_count:
            response.next_cursor.created_before = rows[-1].created_at
            response.next_cursor.function_id = rows[-1].function_id
        return response

    async def FunctionGetSchedulingParams(
        self, request: api_pb2.FunctionGetSchedulingParamsRequest, caller: Caller
    ) -> api_pb2.FunctionGetSchedulingParamsResponse:
        row = self._functions.row(request.function_id, caller)
        defined = pool_settings.defined_autoscaler(self._functions.current(row.function_id).function)
        configuration = api_pb2.AutoscalerConfiguration(
            settings=_settings(self._functions.autoscaler_settings(row.function_id)),
            default_settings=_settings(AutoscalerSettings()),
            static_settings=_settings(defined),
        )
        configuration.MergeFromString(row.autoscaler_events or b"")
        configuration.override_settings.ParseFromString(row.autoscaler_override)
        return api_pb2.FunctionGetSchedulingParamsResponse(autoscaler_configuration=configuration)

    async def FunctionUpdateSchedulingParams(
        self, request: api_pb2.FunctionUpdateSchedulingParamsRequest, caller: Caller
    ) -> api_pb2.FunctionUpdateSchedulingParamsResponse:
        override = api_pb2.AutoscalerSettings()
        if request.warm_pool_size_override:
            override.min_containers = request.warm_pool_size_override
        override.MergeFrom(request.settings)
        settings = await self._changes.override_autoscaler(request.function_id, override, caller)
        return api_pb2.FunctionUpdateSchedulingParamsResponse(current_settings=_settings(settings))


def _settings(settings: AutoscalerSettings) -> api_pb2.AutoscalerSettings:
    message = api_pb2.AutoscalerSettings(
        min_containers=settings.min_containers,
        max_containers=settings.max_containers,
        buffer_containers=settings.buffer_containers,
        scaleup_window=int(settings.scaleup_window_s),
        scaledown_window=int(settings.scaledown_window_s),
    )
    if settings.target_concurrency:
        message.target_concurrency_float = settings.target_concurrency
        message.target_concurrency = max(1, int(settings.target_concurrency))
    return message
