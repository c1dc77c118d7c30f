"""Who decides what a Volume holds: the server. This is what a worker asks it on behalf of its containers."""

from collections.abc import Awaitable, Callable
from typing import Protocol

from aeolian.domain import volume_link as link
from aeolian.domain.volumes import Committed, VolumeChanges, VolumeEntry, VolumeManifest


class VolumeAuthority(Protocol):
    """All calls are safe to repeat; all raise NotFound when there is no such volume, Unavailable while nobody answers.

    `control.volume_commits.VolumeCommits` has this very shape.
    """

    async def manifest(self, volume_id: str, since: int = 0, after: str = "") -> VolumeManifest:
        """A page of the volume's entries, or of what versions after `since` changed."""
        ...

    async def commit(self, volume_id: str, changes: VolumeChanges) -> Committed:
        """All of the changes, or none. Their content must be stored before."""
        ...

    async def make_folder(self, volume_id: str, path: str) -> int:
        """Make sure that a directory exists; returns the volume's version."""
        ...


class LinkedVolumeAuthority:
    """The authority at the other end of the worker's connection.

    `call(method, request) -> answer` carries bytes to the server's `WorkerVolumeCalls.answer`; it raises
    Unavailable when the server stays away.
    """

    def __init__(self, call: Callable[[str, bytes], Awaitable[bytes]]):
        self._call = call

    async def manifest(self, volume_id: str, since: int = 0, after: str = "") -> VolumeManifest:
        request = link.encode(link.ManifestRequest(volume_id, since, after))
        return link.decode_answer(await self._call(link.MANIFEST, request), VolumeManifest)

    async def commit(self, volume_id: str, changes: VolumeChanges) -> Committed:
        request = link.encode(link.CommitRequest(volume_id, changes))
        return link.decode_answer(await self._call(link.COMMIT, request), Committed)

    async def make_folder(self, volume_id: str, path: str) -> int:
        request = link.encode(link.MakeFolderRequest(volume_id, path))
        return link.decode_answer(await self._call(link.MAKE_FOLDER, request), int)


async def changes_since(
    authority: VolumeAuthority, volume_id: str, since: int = 0
) -> tuple[int, dict[str, VolumeEntry]]:
    """The volume's version, and by path what changed after version `since` (tombstones included unless 0).

    A listing of many pages may see commits between two of them: what these changed is fetched after it, so the
    result is of one version.
    """
    entries: dict[str, VolumeEntry] = {}
    start = since
    while True:
        page = await authority.manifest(volume_id, start)
        first_version = page.version
        entries.update((entry.path, entry) for entry in page.entries)
        while page.next_path:
            page = await authority.manifest(volume_id, start, page.next_path)
            entries.update((entry.path, entry) for entry in page.entries)
        if page.version == first_version:
            return first_version, entries
        start = first_version
