"""RPCs of images: builds and their output, ids, names."""

from collections.abc import AsyncIterator

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from aeolian.control.environments import BUILDER_VERSION
from aeolian.control.images import Images, Request, metadata
from aeolian.domain.caller import Caller
from aeolian.domain.calls import Status
from aeolian.domain.clock import Clock
from aeolian.domain.errors import InvalidArgument
from aeolian.domain.logs import LogBatch
from aeolian.storage.images import Image

DEFAULT_FOLLOW_S = 55.0
MAX_FOLLOW_S = 60.0
MAX_MESSAGE_BYTES = 2 << 20
CLOCK_SKEW_S = 60.0
"""Lines carry the worker's time, builds the server's."""


class ImageRpcs:
    def __init__(self, images: Images, clock: Clock):
        self._images = images
        self._clock = clock

    # ---- builds -----------------------------------------------------------------------------------------

    async def ImageGetOrCreate(
        self, request: api_pb2.ImageGetOrCreateRequest, caller: Caller
    ) -> api_pb2.ImageGetOrCreateResponse:
        image = await self._images.get_or_create(
            Request(
                app_id=request.app_id,
                definition=request.image,
                builder_version=request.builder_version or BUILDER_VERSION,
                function_id=request.build_function_id,
                force_build=request.force_build,
                ignore_cache=request.ignore_cache,
            ),
            caller,
        )
        response = api_pb2.ImageGetOrCreateResponse(image_id=image.image_id)
        if image.status is Status.SUCCESS:
            response.result.CopyFrom(_result(image))
            response.metadata.CopyFrom(metadata(image))
        return response

    async def ImageJoinStreaming(
        self, request: api_pb2.ImageJoinStreamingRequest, caller: Caller
    ) -> AsyncIterator[api_pb2.ImageJoinStreamingResponse]:
        """Output as it comes, then the result. The client comes again with the last entry it has seen."""
        timeout_s = min(request.timeout or DEFAULT_FOLLOW_S, MAX_FOLLOW_S)
        async for item in self._images.follow(request.image_id, caller, request.last_entry_id, max(0.0, timeout_s)):
            if isinstance(item, Image):
                yield api_pb2.ImageJoinStreamingResponse(
                    result=_result(item),
                    metadata=metadata(item) if item.status is Status.SUCCESS else None,
                    eof=True,
                )
            else:
                for message in _messages(*item):
                    yield message

    async def ImageBuildChainGet(
        self, request: api_pb2.ImageBuildChainGetRequest, caller: Caller
    ) -> api_pb2.ImageBuildChainGetResponse:
        """Where to find the output of an image's build, and of those under it."""
        response = api_pb2.ImageBuildChainGetResponse()
        for image in await self._images.chain(request.image_id, caller):
            step = response.build_steps.add(
                image_id=image.image_id, builder_app_id=image.app_id, builder_task_id=image.build_id
            )
            until = image.finished_at or self._clock.now()
            step.started_at.FromNanoseconds(int((image.started_at - CLOCK_SKEW_S) * 1e9))
            step.finished_at.FromNanoseconds(int((until + CLOCK_SKEW_S) * 1e9))
        return response

    # ---- images by id -----------------------------------------------------------------------------------

    async def ImageFromId(self, request: api_pb2.ImageFromIdRequest, caller: Caller) -> api_pb2.ImageFromIdResponse:
        image = await self._images.built(request.image_id, caller)
        return api_pb2.ImageFromIdResponse(image_id=image.image_id, metadata=metadata(image))

    async def ImageDelete(self, request: api_pb2.ImageDeleteRequest, caller: Caller) -> Empty:
        await self._images.delete(request.image_id, caller)
        return Empty()

    # ---- names ------------------------------------------------------------------------------------------

    async def ImagePublish(self, request: api_pb2.ImagePublishRequest, caller: Caller) -> api_pb2.ImagePublishResponse:
        if request.allow_public:
            raise InvalidArgument("Aeolian has no public images: publish it without `is_public`")
        names = self._images.names
        name = names.parse(request.tag, request.environment_name, caller)
        image = await self._images.built(request.image_id, caller)
        revision_id = await names.publish(image, name, caller)
        return api_pb2.ImagePublishResponse(image_id=image.image_id, revision_id=revision_id)

    async def ImageGetByTag(
        self, request: api_pb2.ImageGetByTagRequest, caller: Caller
    ) -> api_pb2.ImageGetByTagResponse:
        name = self._images.names.parse(request.tag, request.environment_name, caller)
        found = await self._images.names.find(name)
        return api_pb2.ImageGetByTagResponse(image_id=found.image_id)

    async def ImageListTags(
        self, request: api_pb2.ImageListTagsRequest, caller: Caller
    ) -> api_pb2.ImageListTagsResponse:
        environment_name, tags, next_token = await self._images.names.list_in(
            request.environment_name,
            caller,
            prefix=request.tag_prefix,
            image_id=request.image_id,
            limit=request.max_objects,
            page_token=request.page_token,
        )
        items = [
            api_pb2.ImageListTagsItem(
                tag=tag.tag,
                image_id=tag.image_id,
                revision_id=tag.revision_id,
                created_at=tag.created_at,
                updated_at=tag.updated_at,
                last_published_by=tag.published_by,
            )
            for tag in tags
        ]
        return api_pb2.ImageListTagsResponse(items=items, next_page_token=next_token, environment_name=environment_name)

    async def ImageTagRevisions(
        self, request: api_pb2.ImageTagRevisionsRequest, caller: Caller
    ) -> api_pb2.ImageTagRevisionsResponse:
        name = self._images.names.parse(request.tag, request.environment_name, caller)
        revisions, next_token = await self._images.names.revisions(
            name, limit=request.max_objects, page_token=request.page_token
        )
        items = [
            api_pb2.ImageTagRevisionsItem(
                image_id=revision.image_id,
                revision_id=revision.revision_id,
                created_at=revision.created_at,
                published_by=revision.published_by,
            )
            for revision in revisions
        ]
        return api_pb2.ImageTagRevisionsResponse(
            items=items, next_page_token=next_token, tag=name.tag, environment_name=name.environment.name
        )

    async def ImageNameDelete(self, request: api_pb2.ImageNameDeleteRequest, caller: Caller) -> Empty:
        name = self._images.names.parse(request.tag, "", caller)
        await self._images.names.delete(name, caller)
        return Empty()


def _result(image: Image) -> api_pb2.GenericResult:
    """How the build ended."""
    return api_pb2.GenericResult(status=int(image.status), exception=image.error)  # type: ignore[arg-type]


def _messages(entry_id: str, batch: LogBatch) -> list[api_pb2.ImageJoinStreamingResponse]:
    """The batch in messages of bearable size; only the last one carries the entry id to go on from."""
    messages: list[api_pb2.ImageJoinStreamingResponse] = []
    size = MAX_MESSAGE_BYTES
    for line in batch.lines:
        if size >= MAX_MESSAGE_BYTES:
            size = 0
            messages.append(api_pb2.ImageJoinStreamingResponse())
        messages[-1].task_logs.add(
            data=line.data, file_descriptor=line.fd, timestamp=line.at, timestamp_ns=int(line.at * 1e9)
        )
        size += len(line.data) + 64
    if messages:
        messages[-1].entry_id = entry_id
    return messages
