"""What workers ask of a Volume for their containers: its entries at a version, and commits of what they wrote."""

import asyncio
from collections.abc import Callable

from sqlalchemy.engine import Connection

from aeolian.control import volume_edits as edits
from aeolian.control.volume_edits import edit_volume, existing_volume
from aeolian.domain.clock import Clock
from aeolian.domain.errors import FailedPrecondition, InvalidArgument
from aeolian.domain.volumes import Committed, EntryKind, VolumeChanges, VolumeManifest, check_path, clean_path
from aeolian.storage import volumes as storage
from aeolian.storage.database import Database
from aeolian.storage.volume_files import VolumeFiles

PAGE_ENTRIES = 20_000
PUT_KINDS = (EntryKind.FILE, EntryKind.DIRECTORY, EntryKind.SYMLINK)


class VolumeCommits:
    def __init__(self, database: Database, clock: Clock, files: VolumeFiles):
        self.when_dropped: list[Callable[[], None]] = []
        """Called after a commit: nobody may name any more what it replaced."""
        self._database = database
        self._clock = clock
        self._files = files

    async def manifest(self, volume_id: str, since: int = 0, after: str = "") -> VolumeManifest:
        """A page of the volume's entries, or of what versions after `since` changed. Raises NotFound."""

        def read(connection: Connection) -> VolumeManifest:
            volume = existing_volume(connection, volume_id)
            if volume.version <= since:
                return VolumeManifest(volume_id, volume.version, since, ())
            entries = storage.list_changed(connection, volume_id, since, after, PAGE_ENTRIES)
            more = entries[-1].path if len(entries) == PAGE_ENTRIES else ""
            return VolumeManifest(volume_id, volume.version, since, tuple(entries), more)

        return await self._database.read(read)

    async def commit(self, volume_id: str, changes: VolumeChanges) -> Committed:
        """All of a container's changes, or none. Safe to repeat."""
        for removal in changes.removals:
            check_path(removal.path)
        for entry in changes.puts:
            if not entry.path or check_path(entry.path) != entry.path or entry.kind not in PUT_KINDS:
                raise InvalidArgument(f"a commit cannot put {entry.path!r} with kind {entry.kind}")
        contents = {entry.content for entry in changes.puts if entry.kind == EntryKind.FILE}
        lost = await asyncio.to_thread(lambda: [content for content in contents if not self._files.keep(content)])
        if lost:
            raise FailedPrecondition(f"the content {lost[0]} of a commit is not stored: store it, then commit again")
        version, is_new = await edit_volume(
            self._database,
            volume_id,
            lambda c, volume: edits.apply_commit(c, volume, changes, self._now_ns()),
            once=f"volume-commit/{changes.commit_id}",
        )
        for callback in self.when_dropped:
            callback()
        return Committed(version, is_new)

    async def make_folder(self, volume_id: str, path: str) -> int:
        """Make sure that a directory exists (a mount's sub-path); returns the volume's version."""
        cleaned = clean_path(path)
        if not cleaned:
            return (await self._database.read(lambda c: existing_volume(c, volume_id))).version
        return await edit_volume(
            self._database, volume_id, lambda c, volume: edits.make_folder(c, volume, cleaned, self._now_ns())
        )

    def _now_ns(self) -> int:
        return int(self._clock.now() * 1e9)
