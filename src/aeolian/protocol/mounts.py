"""The Mount RPCs: uploads by content, and mounts by files or by name."""

from google.protobuf.timestamp_pb2 import Timestamp
from modal_proto import api_pb2

from aeolian.control.mounts import Mount, Mounts, UploadedFile
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import InvalidArgument

ANONYMOUS = frozenset([api_pb2.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP, api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL])


class MountRpcs:
    def __init__(self, mounts: Mounts, clock: Clock):
        self._mounts = mounts
        self._clock = clock

    async def MountBatchedCheckExistence(
        self, request: api_pb2.MountBatchedCheckExistenceRequest, caller: Caller
    ) -> api_pb2.MountBatchedCheckExistenceResponse:
        missing = await self._mounts.missing(request.sha256_hex_hashes)
        return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing, checked_at=self._now())

    async def MountPutFile(self, request: api_pb2.MountPutFileRequest, caller: Caller) -> api_pb2.MountPutFileResponse:
        """Store content, or (1.4 clients, without data) say whether it is there."""
        match request.WhichOneof("data_oneof"):
            case "data":
                await self._mounts.put(request.sha256_hex, request.data)
            case "data_blob_id":
                await self._mounts.put_blob(request.sha256_hex, request.data_blob_id)
            case _:
                missing = await self._mounts.missing([request.sha256_hex])
                return api_pb2.MountPutFileResponse(exists=not missing, checked_at=self._now())
        return api_pb2.MountPutFileResponse(exists=True, checked_at=self._now())

    async def MountGetOrCreate(
        self, request: api_pb2.MountGetOrCreateRequest, caller: Caller
    ) -> api_pb2.MountGetOrCreateResponse:
        return _response(await self._get_or_create(request, caller))

    async def _get_or_create(self, request: api_pb2.MountGetOrCreateRequest, caller: Caller) -> Mount:
        files = [
            UploadedFile(file.filename, file.sha256_hex, file.mode if file.HasField("mode") else None)
            for file in request.files
        ]
        kind, name = request.object_creation_type, request.deployment_name
        if kind in ANONYMOUS:
            if name:
                raise InvalidArgument(f"an anonymous mount has no name, but {name!r} was given")
            return await self._mounts.create(files)
        if not name:
            raise InvalidArgument("a mount needs a name, unless it is anonymous or ephemeral")
        is_global = request.namespace == api_pb2.DEPLOYMENT_NAMESPACE_GLOBAL
        if kind == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            if is_global:
                return await self._mounts.lookup_global(name)
            return await self._mounts.lookup(name, request.environment_name, caller)
        if is_global:
            self._mounts.refuse_global(name)
        # Python clients say CREATE_IF_MISSING when they mean to overwrite (`allow_overwrite=True`).
        replace = kind != api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS
        return await self._mounts.deploy(name, request.environment_name, files, caller, replace=replace)

    def _now(self) -> Timestamp:
        stamp = Timestamp()
        stamp.FromNanoseconds(int(self._clock.now() * 1e9))
        return stamp


def _response(mount: Mount) -> api_pb2.MountGetOrCreateResponse:
    metadata = api_pb2.MountHandleMetadata(content_checksum_sha256_hex=mount.checksum)
    return api_pb2.MountGetOrCreateResponse(mount_id=mount.mount_id, handle_metadata=metadata)
