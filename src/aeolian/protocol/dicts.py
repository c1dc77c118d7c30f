"""RPCs of Dicts."""

from collections.abc import AsyncIterator

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from aeolian.control.dicts import Dicts, check_entries
from aeolian.domain.caller import Caller
from aeolian.protocol.named_objects import IF_EXISTS, check_anonymous, creation_info, page_of
from aeolian.storage import dicts as storage
from aeolian.storage.named_objects import NamedObject


class DictRpcs:
    def __init__(self, dicts: Dicts):
        self._dicts = dicts

    async def DictGetOrCreate(
        self, request: api_pb2.DictGetOrCreateRequest, caller: Caller
    ) -> api_pb2.DictGetOrCreateResponse:
        kind, environment = request.object_creation_type, request.environment_name
        entries = [(entry.key, entry.value) for entry in request.data]
        check_entries(entries)

        def fill(connection, dict_id: str) -> None:
            storage.put(connection, dict_id, entries)

        if kind == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            item = await self._dicts.objects.lookup(request.deployment_name, environment, caller)
        elif kind in IF_EXISTS:
            item = await self._dicts.objects.create(
                request.deployment_name, environment, caller, if_exists=IF_EXISTS[kind], fill=fill
            )
        else:
            check_anonymous(kind, "", "Dict")
            item = await self._dicts.objects.create_anonymous(environment, caller, fill=fill)
        return api_pb2.DictGetOrCreateResponse(dict_id=item.object_id, metadata=_metadata(item))

    async def DictGetById(self, request: api_pb2.DictGetByIdRequest, caller: Caller) -> api_pb2.DictGetByIdResponse:
        item = await self._dicts.objects.get(request.dict_id, caller)
        return api_pb2.DictGetByIdResponse(dict_id=item.object_id, metadata=_metadata(item))

    async def DictHeartbeat(self, request: api_pb2.DictHeartbeatRequest, caller: Caller) -> Empty:
        await self._dicts.objects.heartbeat(request.dict_id, caller)
        return Empty()

    async def DictList(self, request: api_pb2.DictListRequest, caller: Caller) -> api_pb2.DictListResponse:
        before, limit = page_of(request.pagination)
        name, items = await self._dicts.objects.list_named(request.environment_name, caller, before, limit)
        return api_pb2.DictListResponse(
            environment_name=name,
            dicts=[
                api_pb2.DictListResponse.DictInfo(
                    name=item.name, created_at=item.created_at, dict_id=item.object_id, metadata=_metadata(item)
                )
                for item in items
            ],
        )

    async def DictDelete(self, request: api_pb2.DictDeleteRequest, caller: Caller) -> Empty:
        await self._dicts.objects.delete(request.dict_id, caller)
        return Empty()

    async def DictClear(self, request: api_pb2.DictClearRequest, caller: Caller) -> Empty:
        await self._dicts.clear(request.dict_id, caller)
        return Empty()

    async def DictGet(self, request: api_pb2.DictGetRequest, caller: Caller) -> api_pb2.DictGetResponse:
        value = await self._dicts.get(request.dict_id, request.key, caller)
        return api_pb2.DictGetResponse(found=value is not None, value=value)

    async def DictContains(self, request: api_pb2.DictContainsRequest, caller: Caller) -> api_pb2.DictContainsResponse:
        return api_pb2.DictContainsResponse(found=await self._dicts.has(request.dict_id, request.key, caller))

    async def DictLen(self, request: api_pb2.DictLenRequest, caller: Caller) -> api_pb2.DictLenResponse:
        return api_pb2.DictLenResponse(len=await self._dicts.count(request.dict_id, caller))

    async def DictPop(self, request: api_pb2.DictPopRequest, caller: Caller) -> api_pb2.DictPopResponse:
        value = await self._dicts.pop(request.dict_id, request.key, caller)
        return api_pb2.DictPopResponse(found=value is not None, value=value)

    async def DictUpdate(self, request: api_pb2.DictUpdateRequest, caller: Caller) -> api_pb2.DictUpdateResponse:
        entries = [(entry.key, entry.value) for entry in request.updates]
        created = await self._dicts.update(request.dict_id, entries, caller, if_not_exists=request.if_not_exists)
        return api_pb2.DictUpdateResponse(created=created)

    async def DictContents(
        self, request: api_pb2.DictContentsRequest, caller: Caller
    ) -> AsyncIterator[api_pb2.DictEntry]:
        async for key, value in self._dicts.contents(request.dict_id, caller, with_values=request.values):
            # Values come with their keys: the SDK names the key when a value cannot be read.
            yield api_pb2.DictEntry(key=key, value=value if request.values else b"")


def _metadata(item: NamedObject) -> api_pb2.DictMetadata:
    return api_pb2.DictMetadata(name=item.name, creation_info=creation_info(item))
