"""RPCs of Classes."""

from modal_proto import api_pb2

from aeolian.control.classes import Classes
from aeolian.domain.caller import Caller


class ClassRpcs:
    def __init__(self, classes: Classes):
        self._classes = classes

    async def ClassCreate(self, request: api_pb2.ClassCreateRequest, caller: Caller) -> api_pb2.ClassCreateResponse:
        class_id = await self._classes.create(request.app_id, request.existing_class_id, caller)
        return api_pb2.ClassCreateResponse(class_id=class_id, handle_metadata=api_pb2.ClassHandleMetadata())

    async def ClassGet(self, request: api_pb2.ClassGetRequest, caller: Caller) -> api_pb2.ClassGetResponse:
        class_id = await self._classes.named(
            request.app_name, request.object_tag, request.environment_name, request.app_version, caller
        )
        return api_pb2.ClassGetResponse(class_id=class_id, handle_metadata=api_pb2.ClassHandleMetadata())
