"""RPCs about containers: lists for people, stopping, and what the pools are doing."""

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from aeolian.control import autoscaler
from aeolian.control.apps import Apps
from aeolian.control.containers import Containers
from aeolian.control.functions import Functions
from aeolian.control.pools import Pools
from aeolian.domain.caller import Caller
from aeolian.domain.errors import NotFound, PermissionDenied


class ContainerRpcs:
    def __init__(self, containers: Containers, pools: Pools, apps: Apps, functions: Functions):
        self._containers = containers
        self._pools = pools
        self._apps = apps
        self._functions = functions

    async def TaskList(self, request: api_pb2.TaskListRequest, caller: Caller) -> api_pb2.TaskListResponse:
        environment = None
        if request.app_id:
            await self._apps.find(request.app_id, caller)
        else:
            environment = self._apps.environment(request.environment_name, caller)
        response = api_pb2.TaskListResponse()
        for container in self._containers.running():
            app = self._apps.known(container.app_id)
            if app is None or app.workspace != caller.workspace:
                continue
            if request.app_id and container.app_id != request.app_id:
                continue
            if environment is not None and app.environment_id != environment.id:
                continue
            response.tasks.add(
                task_id=container.task_id,
                app_id=container.app_id,
                app_description=app.name or app.description,
                started_at=container.started_at,
                enqueued_at=container.enqueued_at,
            )
        return response

    async def TaskGetInfo(self, request: api_pb2.TaskGetInfoRequest, caller: Caller) -> api_pb2.TaskGetInfoResponse:
        if (container := self._containers.get(request.task_id)) is not None:
            await self._apps.find(container.app_id, caller)
            return api_pb2.TaskGetInfoResponse(
                app_id=container.app_id,
                info=api_pb2.TaskInfo(
                    id=container.task_id, started_at=container.started_at, enqueued_at=container.enqueued_at
                ),
            )
        found = await self._containers.history(request.task_id)
        if found is None:
            raise NotFound(f"there is no container {request.task_id!r}: `modal container list` shows those that run")
        await self._apps.find(found.app_id, caller)
        status = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
        if found.exit_code:
            status = api_pb2.GenericResult.GENERIC_STATUS_FAILURE
        return api_pb2.TaskGetInfoResponse(
            app_id=found.app_id,
            info=api_pb2.TaskInfo(
                id=found.task_id,
                enqueued_at=found.enqueued_at,
                started_at=found.started_at,
                finished_at=found.finished_at,
                result=api_pb2.GenericResult(status=status, exitcode=found.exit_code, exception=found.reason),
            ),
        )

    async def ContainerStop(
        self, request: api_pb2.ContainerStopRequest, caller: Caller
    ) -> api_pb2.ContainerStopResponse:
        self._containers.request_stop(request.task_id, caller, graceful=request.graceful)
        return api_pb2.ContainerStopResponse()

    async def FunctionGetCurrentStats(
        self, request: api_pb2.FunctionGetCurrentStatsRequest, caller: Caller
    ) -> api_pb2.FunctionStats:
        self._functions.row(request.function_id, caller)
        pool = self._pools.get(request.function_id)
        if pool is None:
            return api_pb2.FunctionStats()
        settings = self._functions.pool_settings(request.function_id)
        running = sum(len(container.held) for container in pool.containers.values())
        ready = sum(container.takes_inputs for container in pool.containers.values())
        return api_pb2.FunctionStats(
            backlog=pool.num_queued,
            num_total_tasks=len(pool.containers),
            num_running_inputs=running,
            input_headroom=max(0, ready * settings.max_concurrent_inputs - running),
        )

    async def FunctionGetDynamicConcurrency(
        self, request: api_pb2.FunctionGetDynamicConcurrencyRequest, caller: Caller
    ) -> api_pb2.FunctionGetDynamicConcurrencyResponse:
        """Asked every few seconds by containers that may take more inputs at a time than they should."""
        if not caller.is_container:
            raise PermissionDenied("only a container may ask how many inputs it should take")
        pool = self._pools.get(caller.function_id)
        num_inputs = self._pools.num_unfinished(caller.function_id)
        num_ready = sum(container.takes_inputs for container in pool.containers.values()) if pool is not None else 0
        return api_pb2.FunctionGetDynamicConcurrencyResponse(
            concurrency=autoscaler.concurrency(
                num_inputs, num_ready, request.target_concurrency, request.max_concurrency
            )
        )

    async def TaskCurrentInputs(self, request: Empty, caller: Caller) -> api_pb2.TaskCurrentInputsResponse:
        container = self._containers.get(caller.task_id)
        held = [item.input_id for item in container.held.values()] if container else []
        return api_pb2.TaskCurrentInputsResponse(input_ids=held)
