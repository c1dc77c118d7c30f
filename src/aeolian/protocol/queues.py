"""RPCs of Queues."""

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from aeolian.control.queues import Queues
from aeolian.domain.caller import Caller
from aeolian.domain.errors import InvalidArgument
from aeolian.protocol.named_objects import IF_EXISTS, check_anonymous, creation_info, page_of
from aeolian.storage.named_objects import NamedObject


class QueueRpcs:
    def __init__(self, queues: Queues):
        self._queues = queues

    async def QueueGetOrCreate(
        self, request: api_pb2.QueueGetOrCreateRequest, caller: Caller
    ) -> api_pb2.QueueGetOrCreateResponse:
        kind, environment = request.object_creation_type, request.environment_name
        if kind == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            item = await self._queues.objects.lookup(request.deployment_name, environment, caller)
        elif kind in IF_EXISTS:
            item = await self._queues.objects.create(
                request.deployment_name, environment, caller, if_exists=IF_EXISTS[kind]
            )
        else:
            check_anonymous(kind, "", "Queue")
            item = await self._queues.objects.create_anonymous(environment, caller)
        return api_pb2.QueueGetOrCreateResponse(queue_id=item.object_id, metadata=_metadata(item))

    async def QueueGetById(self, request: api_pb2.QueueGetByIdRequest, caller: Caller) -> api_pb2.QueueGetByIdResponse:
        item = await self._queues.objects.get(request.queue_id, caller)
        return api_pb2.QueueGetByIdResponse(queue_id=item.object_id, metadata=_metadata(item))

    async def QueueHeartbeat(self, request: api_pb2.QueueHeartbeatRequest, caller: Caller) -> Empty:
        await self._queues.objects.heartbeat(request.queue_id, caller)
        return Empty()

    async def QueueList(self, request: api_pb2.QueueListRequest, caller: Caller) -> api_pb2.QueueListResponse:
        before, limit = page_of(request.pagination)
        name, items = await self._queues.objects.list_named(request.environment_name, caller, before, limit)
        response = api_pb2.QueueListResponse(environment_name=name)
        for item in items:
            num_partitions, num_items = self._queues.summary(item)
            response.queues.add(
                name=item.name,
                created_at=item.created_at,
                num_partitions=num_partitions,
                total_size=num_items,
                queue_id=item.object_id,
                metadata=_metadata(item),
            )
        return response

    async def QueueDelete(self, request: api_pb2.QueueDeleteRequest, caller: Caller) -> Empty:
        await self._queues.objects.delete(request.queue_id, caller)
        return Empty()

    async def QueueClear(self, request: api_pb2.QueueClearRequest, caller: Caller) -> Empty:
        await self._queues.clear(request.queue_id, request.partition_key, caller, all_partitions=request.all_partitions)
        return Empty()

    async def QueueLen(self, request: api_pb2.QueueLenRequest, caller: Caller) -> api_pb2.QueueLenResponse:
        if request.total and request.partition_key:
            raise InvalidArgument(
                "ask either for one partition's length or for the total: name no partition with `total`"
            )
        count = await self._queues.count(request.queue_id, request.partition_key, caller, total=request.total)
        return api_pb2.QueueLenResponse(len=count)

    async def QueuePut(self, request: api_pb2.QueuePutRequest, caller: Caller) -> Empty:
        await self._queues.put(
            request.queue_id,
            request.partition_key,
            list(request.values),
            caller,
            ttl_s=request.partition_ttl_seconds,
        )
        return Empty()

    async def QueueGet(self, request: api_pb2.QueueGetRequest, caller: Caller) -> api_pb2.QueueGetResponse:
        values = await self._queues.take(
            request.queue_id, request.partition_key, request.n_values, caller, wait_s=request.timeout
        )
        return api_pb2.QueueGetResponse(values=values)

    async def QueueNextItems(
        self, request: api_pb2.QueueNextItemsRequest, caller: Caller
    ) -> api_pb2.QueueNextItemsResponse:
        last = request.last_entry_id or "0"
        if not last.isdecimal():
            raise InvalidArgument(f"{last!r} is no entry of this queue")
        items = await self._queues.after(
            request.queue_id, request.partition_key, int(last), caller, wait_s=request.item_poll_timeout
        )
        return api_pb2.QueueNextItemsResponse(
            items=[api_pb2.QueueItem(value=value, entry_id=str(seq)) for seq, value in items]
        )


def _metadata(item: NamedObject) -> api_pb2.QueueMetadata:
    return api_pb2.QueueMetadata(name=item.name, creation_info=creation_info(item))
