"""Answers what workers ask about Volumes (`domain.volume_link`), on the server's side of their connection."""

import msgspec

from aeolian.control.volume_commits import VolumeCommits
from aeolian.domain import volume_link as link
from aeolian.domain.errors import AeolianError, InvalidArgument


class WorkerVolumeCalls:
    def __init__(self, commits: VolumeCommits):
        self._commits = commits

    async def answer(self, method: str, request: bytes) -> bytes:
        """The answer to one call, errors that users can cause included."""
        try:
            return link.encode_answer(await self._call(method, request))
        except msgspec.DecodeError as error:
            return link.encode_error(InvalidArgument(f"{method}: the worker's request is malformed: {error}"))
        except AeolianError as error:
            return link.encode_error(error)

    async def _call(self, method: str, request: bytes):
        match method:
            case link.MANIFEST:
                page = msgspec.msgpack.decode(request, type=link.ManifestRequest)
                return await self._commits.manifest(page.volume_id, page.since, page.after)
            case link.COMMIT:
                commit = msgspec.msgpack.decode(request, type=link.CommitRequest)
                return await self._commits.commit(commit.volume_id, commit.changes)
            case link.MAKE_FOLDER:
                folder = msgspec.msgpack.decode(request, type=link.MakeFolderRequest)
                return await self._commits.make_folder(folder.volume_id, folder.path)
        raise InvalidArgument(f"{method} is not a call about volumes")
