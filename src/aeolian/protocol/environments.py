"""RPCs of environments."""

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from aeolian.control.environments import Environments
from aeolian.domain.caller import Caller
from aeolian.domain.errors import InvalidArgument, NotFound, PermissionDenied
from aeolian.domain.roles import Role
from aeolian.storage.environments import Environment


class EnvironmentRpcs:
    def __init__(self, environments: Environments):
        self._environments = environments

    async def EnvironmentGetOrCreate(
        self, request: api_pb2.EnvironmentGetOrCreateRequest, caller: Caller
    ) -> api_pb2.EnvironmentGetOrCreateResponse:
        try:
            environment = self._environments.resolve(request.deployment_name, caller)
        except NotFound:
            if request.object_creation_type != api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
                raise
            if caller.is_container:
                raise PermissionDenied("a container cannot make environments") from None
            environment = await self._environments.create(
                request.deployment_name, once=caller.once("EnvironmentGetOrCreate")
            )
        return api_pb2.EnvironmentGetOrCreateResponse(
            environment_id=environment.id,
            metadata=api_pb2.EnvironmentMetadata(name=environment.name, settings=self._settings(environment, caller)),
        )

    async def EnvironmentCreate(self, request: api_pb2.EnvironmentCreateRequest, caller: Caller) -> Empty:
        if request.default_member_role_str not in ("", Role.NO_ACCESS.label):
            raise InvalidArgument(
                f"nobody gets the role '{request.default_member_role_str}' in an environment unasked: give it to each "
                f"token with `aeolian token role`, or to service users with `modal environment roles update`"
            )
        await self._environments.create(
            request.name, is_restricted=request.is_managed, once=caller.once("EnvironmentCreate")
        )
        return Empty()

    async def EnvironmentList(self, request: Empty, caller: Caller) -> api_pb2.EnvironmentListResponse:
        response = api_pb2.EnvironmentListResponse()
        for environment in self._environments.all():
            if caller.roles is None or caller.roles.get(environment.id, Role.NO_ACCESS) >= Role.VIEWER:
                self._fill(response.items.add(), environment)
        return response

    async def EnvironmentUpdate(
        self, request: api_pb2.EnvironmentUpdateRequest, caller: Caller
    ) -> api_pb2.EnvironmentListItem:
        has_limits = request.HasField("max_concurrent_tasks") or request.HasField("max_concurrent_gpus")
        if has_limits and caller.roles is not None:
            raise PermissionDenied("only those who manage the whole workspace set the limits of an environment")
        environment = await self._environments.update(
            request.current_name,
            caller,
            new_name=request.name.value if request.HasField("name") else None,
            web_suffix=request.web_suffix.value if request.HasField("web_suffix") else None,
            max_containers=request.max_concurrent_tasks if request.HasField("max_concurrent_tasks") else None,
            max_gpus=request.max_concurrent_gpus if request.HasField("max_concurrent_gpus") else None,
            image_builder_version=request.image_builder_version or None,
        )
        item = api_pb2.EnvironmentListItem()
        self._fill(item, environment)
        return item

    async def EnvironmentDelete(self, request: api_pb2.EnvironmentDeleteRequest, caller: Caller) -> Empty:
        await self._environments.delete(request.name, caller)
        return Empty()

    def _settings(self, environment: Environment, caller: Caller) -> api_pb2.EnvironmentSettings:
        return api_pb2.EnvironmentSettings(
            image_builder_version=self._environments.builder_version_for(environment, caller),
            webhook_suffix=environment.web_suffix,
        )

    def _fill(self, item: api_pb2.EnvironmentListItem, environment: Environment) -> None:
        item.environment_id = environment.id
        item.name = environment.name
        item.webhook_suffix = environment.web_suffix
        item.created_at = environment.created_at
        item.default = environment.is_default
        item.image_builder_version = environment.image_builder_version
        item.is_managed = environment.is_restricted
        if environment.max_containers:
            item.max_concurrent_tasks = environment.max_containers
        if environment.max_gpus:
            item.max_concurrent_gpus = environment.max_gpus
