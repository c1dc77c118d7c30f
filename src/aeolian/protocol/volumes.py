"""The Volume RPCs, v1 and v2. Commit and reload of containers are answered by their worker, which holds the files."""

from collections.abc import AsyncIterator

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from aeolian.control.volume_contents import BlockFile, StoredFile, VolumeContents
from aeolian.control.volumes import Volumes, metadata_of
from aeolian.domain.caller import Caller
from aeolian.domain.errors import FailedPrecondition, InvalidArgument
from aeolian.domain.volumes import EntryKind, VolumeEntry
from aeolian.storage.volumes import Volume

IF_EXISTS = {
    api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING: "return",
    api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS: "fail",
    api_pb2.OBJECT_CREATION_TYPE_CREATE_OVERWRITE_IF_EXISTS: "replace",
}
FILE_TYPES = {
    EntryKind.FILE: api_pb2.FileEntry.FILE,
    EntryKind.DIRECTORY: api_pb2.FileEntry.DIRECTORY,
    EntryKind.SYMLINK: api_pb2.FileEntry.SYMLINK,
}
MAX_LISTED = 1000
DEFAULT_LISTED = 100
DEFAULT_MODE = 0o644


class VolumeRpcs:
    def __init__(self, volumes: Volumes, contents: VolumeContents):
        self._volumes = volumes
        self._contents = contents

    async def VolumeGetOrCreate(
        self, request: api_pb2.VolumeGetOrCreateRequest, caller: Caller
    ) -> api_pb2.VolumeGetOrCreateResponse:
        volume = await self._get_or_create(request, caller)
        return api_pb2.VolumeGetOrCreateResponse(
            volume_id=volume.volume_id, version=volume.fs_version, metadata=metadata_of(volume)
        )

    async def _get_or_create(self, request: api_pb2.VolumeGetOrCreateRequest, caller: Caller) -> Volume:
        kind, environment = request.object_creation_type, request.environment_name
        options = dict(request.create_options.experimental_options)
        if kind == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            return await self._volumes.lookup(request.deployment_name, environment, caller)
        if kind in IF_EXISTS:
            return await self._volumes.create(
                request.deployment_name,
                environment,
                caller,
                fs_version=request.version,
                options=options,
                if_exists=IF_EXISTS[kind],
            )
        if kind == api_pb2.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP and not request.app_id:
            raise InvalidArgument("an anonymous Volume owned by an app needs the app's id")
        if kind not in (
            api_pb2.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP,
            api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL,
        ):
            raise InvalidArgument(f"object creation type {kind} does not exist")
        app_id = request.app_id if kind == api_pb2.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP else ""
        return await self._volumes.create_anonymous(
            environment, caller, app_id=app_id, fs_version=request.version, options=options
        )

    async def VolumeGetById(
        self, request: api_pb2.VolumeGetByIdRequest, caller: Caller
    ) -> api_pb2.VolumeGetByIdResponse:
        volume = await self._volumes.get(request.volume_id, caller)
        return api_pb2.VolumeGetByIdResponse(volume_id=volume.volume_id, metadata=metadata_of(volume))

    async def VolumeHeartbeat(self, request: api_pb2.VolumeHeartbeatRequest, caller: Caller) -> Empty:
        await self._volumes.heartbeat(request.volume_id, caller)
        return Empty()

    async def VolumeList(self, request: api_pb2.VolumeListRequest, caller: Caller) -> api_pb2.VolumeListResponse:
        page = request.pagination
        limit = min(page.max_objects or DEFAULT_LISTED, MAX_LISTED)
        environment_name, volumes = await self._volumes.list_named(
            request.environment_name, caller, page.created_before, limit
        )
        return api_pb2.VolumeListResponse(
            environment_name=environment_name,
            items=[
                api_pb2.VolumeListItem(
                    label=volume.name,
                    volume_id=volume.volume_id,
                    created_at=volume.created_at,
                    metadata=metadata_of(volume),
                )
                for volume in volumes
            ],
        )

    async def VolumeRename(self, request: api_pb2.VolumeRenameRequest, caller: Caller) -> Empty:
        await self._volumes.rename(request.volume_id, request.name, caller)
        return Empty()

    async def VolumeDelete(self, request: api_pb2.VolumeDeleteRequest, caller: Caller) -> Empty:
        await self._volumes.delete(request.volume_id, caller)
        return Empty()

    # ---- files ------------------------------------------------------------------------------------------

    async def VolumeListFiles(
        self, request: api_pb2.VolumeListFilesRequest, caller: Caller
    ) -> AsyncIterator[api_pb2.VolumeListFilesResponse]:
        async for entries in self._list(request, caller):
            yield api_pb2.VolumeListFilesResponse(entries=entries)

    async def VolumeListFiles2(
        self, request: api_pb2.VolumeListFiles2Request, caller: Caller
    ) -> AsyncIterator[api_pb2.VolumeListFiles2Response]:
        async for entries in self._list(request, caller):
            yield api_pb2.VolumeListFiles2Response(entries=entries)

    async def _list(self, request, caller: Caller) -> AsyncIterator[list[api_pb2.FileEntry]]:
        await self._volumes.get(request.volume_id, caller)
        max_entries = request.max_entries if request.HasField("max_entries") else None
        async for entries in self._contents.list_files(
            request.volume_id, request.path, recursive=request.recursive, max_entries=max_entries
        ):
            yield [_file_entry(entry) for entry in entries]

    async def VolumePutFiles(self, request: api_pb2.VolumePutFilesRequest, caller: Caller) -> Empty:
        files = [StoredFile(file.filename, _mode(file), file.sha256_hex) for file in request.files]
        overwrite = not request.disallow_overwrite_existing_files
        await self._volumes.get(request.volume_id, caller)
        await self._contents.put_stored_files(
            request.volume_id, files, overwrite=overwrite, once=caller.once("VolumePutFiles")
        )
        return Empty()

    async def VolumePutFiles2(
        self, request: api_pb2.VolumePutFiles2Request, caller: Caller
    ) -> api_pb2.VolumePutFiles2Response:
        files = [
            BlockFile(file.path, _mode(file), file.size, [block.contents_sha256 for block in file.blocks])
            for file in request.files
        ]
        overwrite = not request.disallow_overwrite_existing_files
        await self._volumes.get(request.volume_id, caller)
        missing = await self._contents.put_block_files(
            request.volume_id, files, overwrite=overwrite, once=caller.once("VolumePutFiles2")
        )
        return api_pb2.VolumePutFiles2Response(
            missing_blocks=[
                api_pb2.VolumePutFiles2Response.MissingBlock(
                    file_index=block.file_index, block_index=block.block_index, put_url=block.put_url
                )
                for block in missing
            ]
        )

    async def VolumeGetFile2(
        self, request: api_pb2.VolumeGetFile2Request, caller: Caller
    ) -> api_pb2.VolumeGetFile2Response:
        await self._volumes.get(request.volume_id, caller)
        # Every part is sent in full, so clients with and without `client_pads_blocks` are served alike.
        slices = await self._contents.slices(request.volume_id, request.path, request.start, request.len)
        return api_pb2.VolumeGetFile2Response(
            get_urls=slices.urls, size=slices.size_bytes, start=slices.start, len=slices.length
        )

    async def VolumeRemoveFile(self, request: api_pb2.VolumeRemoveFileRequest, caller: Caller) -> Empty:
        return await self._remove(request, caller, "VolumeRemoveFile")

    async def VolumeRemoveFile2(self, request: api_pb2.VolumeRemoveFile2Request, caller: Caller) -> Empty:
        return await self._remove(request, caller, "VolumeRemoveFile2")

    async def _remove(self, request, caller: Caller, method: str) -> Empty:
        await self._volumes.get(request.volume_id, caller)
        await self._contents.remove(
            request.volume_id, request.path, recursive=request.recursive, once=caller.once(method)
        )
        return Empty()

    async def VolumeCopyFiles(self, request: api_pb2.VolumeCopyFilesRequest, caller: Caller) -> Empty:
        return await self._copy(request, caller, "VolumeCopyFiles")

    async def VolumeCopyFiles2(self, request: api_pb2.VolumeCopyFiles2Request, caller: Caller) -> Empty:
        return await self._copy(request, caller, "VolumeCopyFiles2")

    async def _copy(self, request, caller: Caller, method: str) -> Empty:
        await self._volumes.get(request.volume_id, caller)
        await self._contents.copy(
            request.volume_id,
            list(request.src_paths),
            request.dst_path,
            recursive=request.recursive,
            once=caller.once(method),
        )
        return Empty()

    # ---- what only a container can do -------------------------------------------------------------------

    async def VolumeCommit(self, request: api_pb2.VolumeCommitRequest, caller: Caller) -> api_pb2.VolumeCommitResponse:
        raise await self._refuse(request.volume_id, caller, "commit")

    async def VolumeReload(self, request: api_pb2.VolumeReloadRequest, caller: Caller) -> Empty:
        raise await self._refuse(request.volume_id, caller, "reload")

    async def _refuse(self, volume_id: str, caller: Caller, verb: str) -> FailedPrecondition:
        await self._volumes.get(volume_id, caller)
        return FailedPrecondition(
            f"Volume {volume_id} is not mounted here: {verb} it inside a container that mounts it"
        )


def _file_entry(entry: VolumeEntry) -> api_pb2.FileEntry:
    return api_pb2.FileEntry(
        path=entry.path,
        type=FILE_TYPES[EntryKind(entry.kind)],
        mtime=max(0, entry.mtime_ns // 1_000_000_000),
        size=entry.size_bytes,
    )


def _mode(file) -> int:
    return file.mode & 0o7777 if file.HasField("mode") else DEFAULT_MODE
