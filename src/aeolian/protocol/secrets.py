"""RPCs of Secrets. Their values only ever go in."""

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from aeolian.control.environments import Environments
from aeolian.control.secrets import SecretInfo, Secrets
from aeolian.domain.caller import Caller
from aeolian.protocol.named_objects import IF_EXISTS, check_anonymous, creation_info, page_of


class SecretRpcs:
    def __init__(self, secrets: Secrets, environments: Environments):
        self._secrets = secrets
        self._environments = environments

    async def SecretGetOrCreate(
        self, request: api_pb2.SecretGetOrCreateRequest, caller: Caller
    ) -> api_pb2.SecretGetOrCreateResponse:
        kind, environment, env = request.object_creation_type, request.environment_name, dict(request.env_dict)
        if kind == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            item = await self._secrets.lookup(request.deployment_name, environment, caller, list(request.required_keys))
        elif kind in IF_EXISTS:
            item = await self._secrets.create(
                request.deployment_name, environment, caller, env, if_exists=IF_EXISTS[kind]
            )
        else:
            app_id = check_anonymous(kind, request.app_id, "Secret")
            item = await self._secrets.create_anonymous(environment, caller, env, app_id=app_id)
        info = await self._secrets.info(item.object_id, caller)
        return api_pb2.SecretGetOrCreateResponse(secret_id=item.object_id, metadata=self._metadata(info))

    async def SecretGetInfo(
        self, request: api_pb2.SecretGetInfoRequest, caller: Caller
    ) -> api_pb2.SecretGetInfoResponse:
        info = await self._secrets.info(request.secret_id, caller)
        return api_pb2.SecretGetInfoResponse(metadata=self._metadata(info))

    async def SecretUpdate(self, request: api_pb2.SecretUpdateRequest, caller: Caller) -> Empty:
        updates = {item.key: item.value if item.HasField("value") else None for item in request.updates}
        await self._secrets.update(request.secret_id, caller, updates)
        return Empty()

    async def SecretList(self, request: api_pb2.SecretListRequest, caller: Caller) -> api_pb2.SecretListResponse:
        before, limit = page_of(request.pagination)
        name, items = await self._secrets.objects.list_named(request.environment_name, caller, before, limit)
        response = api_pb2.SecretListResponse(environment_name=name)
        for info in await self._secrets.infos(items):
            response.items.add(
                label=info.item.name,
                created_at=info.item.created_at,
                last_used_at=info.last_used_at,
                environment_name=name,
                secret_id=info.item.object_id,
                metadata=self._metadata(info),
            )
        return response

    async def SecretDelete(self, request: api_pb2.SecretDeleteRequest, caller: Caller) -> Empty:
        await self._secrets.objects.delete(request.secret_id, caller)
        return Empty()

    def _metadata(self, info: SecretInfo) -> api_pb2.SecretMetadata:
        environment = self._environments.by_id(info.item.environment_id)
        return api_pb2.SecretMetadata(
            name=info.item.name,
            creation_info=creation_info(info.item),
            keys=info.keys,
            environment_name=environment.name if environment else "",
            last_used_at=info.last_used_at,
        )
