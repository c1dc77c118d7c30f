"""The Volume RPCs that a worker answers itself, because it holds the files: commit and reload by a container.

All others pass through to the server.
"""

from collections.abc import Sequence

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from aeolian.worker.volumes import WorkerVolumes


class WorkerVolumeRpcs:
    def __init__(self, volumes: WorkerVolumes):
        self._volumes = volumes

    async def VolumeCommit(self, request: api_pb2.VolumeCommitRequest, task_id: str) -> api_pb2.VolumeCommitResponse:
        """Sent by user code, and at the container's end for each of its volumes."""
        await self._volumes.commit(task_id, request.volume_id)
        # The commit has shown the container what others committed, as far as it can be shown now.
        return api_pb2.VolumeCommitResponse(skip_reload=True)

    async def VolumeReload(self, request: api_pb2.VolumeReloadRequest, task_id: str) -> Empty:
        await self._volumes.reload(task_id, request.volume_id)
        return Empty()

    def forget(self, volume_ids: Sequence[str]) -> None:
        """The server's hint that older versions of these Volumes only hold the disk."""
        self._volumes.forget(volume_ids)
