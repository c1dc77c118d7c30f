"""Volumes as read-only folders, one a version, for overlays to stand on.

::

    root/<volume_id>.<n>/files/…     a base (every entry), or a delta (what changed since the layer before it,
                                     removed paths as overlay whiteouts)

Files are hard links into the volumes' content, so a layer costs names, not bytes, and all containers that map a
file share its pages. Layers that no overlay stands on are deleted, but for those of a volume's newest version.
"""

import asyncio
import bisect
import errno
import itertools
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from weakref import WeakValueDictionary

from aeolian.domain.volumes import EntryKind, VolumeEntry, merge_pages, parent_of
from aeolian.storage.receive import disk_error
from aeolian.storage.volume_files import VolumeFiles, copy_content
from aeolian.worker.volume_authority import VolumeAuthority, changes_since

MAX_LAYERS = 6
MAX_IDLE_VOLUMES = 64
FILES = "files"
FOLDER_MODE = 0o755


@dataclass
class Snapshot:
    """A volume at a version. Never changed once made."""

    volume_id: str
    version: int
    entries: Mapping[str, VolumeEntry]
    layers: tuple[Path, ...]
    """The topmost first; each holds the volume's root as `files`. Empty where overlays cannot be mounted."""
    num_users: int = field(default=0, compare=False)

    @cached_property
    def paths(self) -> list[str]:
        return sorted(self.entries)

    def restore(self, entry: VolumeEntry, files: VolumeFiles) -> bool:
        """Put the content of one of these entries back into the store, which has let it go; False when it is lost."""
        for layer in self.layers:
            place = layer / FILES / entry.path
            if place.is_symlink() or place.exists():
                return place.is_file() and files.put_back(place, entry.content)
        return False

    def below(self, folder: str) -> Iterable[VolumeEntry]:
        """Everything below `folder` ("" = root), by path."""
        paths = self.paths
        start = bisect.bisect_left(paths, folder + "/" if folder else "")
        for index in range(start, len(paths)):
            if folder and not paths[index].startswith(folder + "/"):
                return
            yield self.entries[paths[index]]


class VolumeLayers:
    def __init__(self, root: Path, files: VolumeFiles, *, with_layers: bool):
        """`with_layers` False: snapshots have entries only."""
        self._root = root
        self._files = files
        self._with_layers = with_layers
        self._newest: dict[str, Snapshot] = {}
        self._in_use: list[Snapshot] = []
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._numbers = itertools.count(1)
        self._made: set[Path] = set()

    async def acquire(self, volume_id: str, authority: VolumeAuthority) -> Snapshot:
        """The volume's newest version, until `release`. Raises NotFound, OutOfSpace."""
        async with self._lock(volume_id):
            known = self._newest.pop(volume_id, None)
            if known is not None:
                self._newest[volume_id] = known  # the last used is the last to go
            version, changed = await changes_since(authority, volume_id, known.version if known else 0)
            if known is None or version != known.version:
                known = await asyncio.to_thread(self._build, volume_id, version, changed, known)
                self._newest[volume_id] = known
                self._made.update(known.layers)
            known.num_users += 1
            self._in_use.append(known)
        await self._prune()
        return known

    async def release(self, snapshot: Snapshot) -> None:
        snapshot.num_users -= 1
        self._in_use.remove(snapshot)
        await self._prune()

    async def forget(self, volume_ids: Iterable[str]) -> None:
        """Keep no version of these volumes but those in use."""
        for volume_id in volume_ids:
            async with self._lock(volume_id):
                self._newest.pop(volume_id, None)
        await self._prune()

    def _lock(self, volume_id: str) -> asyncio.Lock:
        return self._locks.setdefault(volume_id, asyncio.Lock())

    async def _prune(self) -> None:
        for volume_id in list(self._newest)[: max(0, len(self._newest) - MAX_IDLE_VOLUMES)]:
            if not self._newest[volume_id].num_users and not self._lock(volume_id).locked():
                del self._newest[volume_id]
        kept = {layer for snapshot in (*self._newest.values(), *self._in_use) for layer in snapshot.layers}
        for layer in self._made - kept:
            self._made.discard(layer)
            await asyncio.to_thread(shutil.rmtree, layer, True)

    def _build(
        self, volume_id: str, version: int, changed: Mapping[str, VolumeEntry], old: Snapshot | None
    ) -> Snapshot:
        entries = dict(old.entries) if old else {}
        merge_pages(entries, changed.values())
        if not self._with_layers:
            return Snapshot(volume_id, version, entries, ())
        is_delta = old is not None and len(old.layers) < MAX_LAYERS and len(changed) < len(entries) // 2 + 16
        layer = self._root / f"{volume_id}.{next(self._numbers)}"
        new = layer.with_name(f"{layer.name}.new")
        try:
            build_layer(new, changed if is_delta else entries, entries, self._files)
            new.rename(layer)
        except BaseException as error:
            shutil.rmtree(new, ignore_errors=True)
            raise (disk_error(error) if isinstance(error, OSError) else error) from None
        return Snapshot(volume_id, version, entries, (layer, *old.layers) if is_delta else (layer,))


def build_layer(
    layer: Path, wanted: Mapping[str, VolumeEntry], entries: Mapping[str, VolumeEntry], files: VolumeFiles
) -> None:
    """Make `layer/files` of `wanted`; tombstones become whiteouts. `entries`: the whole volume, for folders above."""
    root = layer / FILES
    root.mkdir(parents=True)
    folders = {""}

    def make_folder(path: str) -> bool:
        if path in folders:
            return True
        entry = entries.get(path)
        if entry is None or entry.kind != EntryKind.DIRECTORY or not make_folder(parent_of(path)):
            return False
        (root / path).mkdir()
        (root / path).chmod(entry.mode or FOLDER_MODE)
        folders.add(path)
        return True

    for path in sorted(wanted):
        entry = wanted[path]
        if entry.kind == EntryKind.DIRECTORY:
            make_folder(path)
        elif not make_folder(parent_of(path)):
            continue  # what is below a removed folder goes with it
        elif entry.kind == EntryKind.FILE:
            link_content(files.inode(entry.content, entry.mode, entry.mtime_ns), root / path)
        elif entry.kind == EntryKind.SYMLINK:
            os.symlink(entry.content, root / path)
        else:
            os.mknod(root / path, stat.S_IFCHR | 0o600, 0)


def link_content(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EMLINK, errno.EXDEV, errno.EPERM):
            raise
        status = source.stat()
        with source.open("rb") as reader, target.open("wb") as writer:
            copy_content(reader.fileno(), writer.fileno(), None)
        os.chmod(target, status.st_mode & 0o7777)
        os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
