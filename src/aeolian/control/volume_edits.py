"""How a Volume changes: each function is one edit inside a write transaction and returns the volume's new version.

An edit that changes nothing leaves the version as it is.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec
from sqlalchemy.engine import Connection

from aeolian.domain.errors import AlreadyExists, InvalidArgument, NotFound
from aeolian.domain.volumes import EntryKind, Removal, VolumeChanges, VolumeEntry, ancestors, clean_path, parent_of
from aeolian.storage import volumes as storage
from aeolian.storage.database import Database
from aeolian.storage.volumes import Volume

T = TypeVar("T")
FOLDER_MODE = 0o755


async def edit_volume(
    database: Database, volume_id: str, edit: Callable[[Connection, Volume], T], once: str | None = None
) -> T:
    """Run one of the functions below in a write transaction. Raises NotFound when there is no such volume."""
    return await database.write(lambda connection: edit(connection, existing_volume(connection, volume_id)), once=once)


def existing_volume(connection: Connection, volume_id: str) -> Volume:
    volume = storage.get_volume(connection, volume_id)
    if volume is None:
        raise no_such_volume(volume_id)
    return volume


def no_such_volume(volume_id: str) -> NotFound:
    return NotFound(f"there is no Volume {volume_id!r}: it was deleted, or never was")


def apply_commit(connection: Connection, volume: Volume, changes: VolumeChanges, now_ns: int) -> tuple[int, bool]:
    """A container's commit: what it removed goes, as far as it had seen it; what it wrote wins.

    Returns the volume's version, and whether it is this commit that made it.
    """
    edit = _Edit(connection, volume, now_ns)
    seen = (changes.base_version, changes.own_versions)
    removed = storage.get_entries(connection, volume.volume_id, [removal.path for removal in changes.removals])
    whole = {removal.path for removal in changes.removals if not removal.children_only}
    edit.tombstones([path for path, entry in removed.items() if entry.kind != EntryKind.DIRECTORY and path in whole])
    for removal in changes.removals:
        entry = removed.get(removal.path)
        if entry is not None and entry.kind == EntryKind.DIRECTORY:
            edit.remove_seen_folder(removal, seen)
    wanted = {entry.path: entry for entry in changes.puts}
    existing = edit.existing(wanted)
    puts = []
    for path, entry in wanted.items():
        old = existing.get(path)
        if old == entry or (old is not None and _same_folder(old, entry)):
            continue
        if old is not None and old.kind == EntryKind.DIRECTORY and entry.kind != EntryKind.DIRECTORY:
            edit.changed += storage.remove_below(connection, volume.volume_id, path, edit.version)
        puts.append(entry)
    edit.put(puts, edit.missing_folders(wanted, existing, replace=True))
    return edit.finish(), edit.changed > 0


def put_files(
    connection: Connection, volume: Volume, files: Sequence[VolumeEntry], now_ns: int, *, overwrite: bool
) -> int:
    """A client's upload. Raises AlreadyExists for a path that is taken, InvalidArgument for one below a file."""
    edit = _Edit(connection, volume, now_ns)
    wanted = {file.path: file for file in files}
    existing = check_puts(connection, volume, wanted, overwrite=overwrite)
    edit.put(list(wanted.values()), edit.missing_folders(wanted, existing, replace=False))
    return edit.finish()


def check_puts(
    connection: Connection, volume: Volume, paths: Iterable[str], *, overwrite: bool
) -> dict[str, VolumeEntry]:
    """Whether a client may put files at these paths; returns what lives there and above."""
    paths = set(paths)
    above = {folder for path in paths for folder in ancestors(path)}
    if twice := paths & above:
        raise InvalidArgument(f"path {min(twice)!r} would be both a file and a directory")
    if "" in paths:
        raise InvalidArgument("path '/' is the volume itself: name a file in it")
    existing = storage.get_entries(connection, volume.volume_id, paths | above)
    for path, entry in existing.items():
        if path in paths and entry.kind == EntryKind.DIRECTORY:
            raise AlreadyExists(f"path {path!r} is a directory in the volume: a file cannot replace it")
        if path in paths and not overwrite:
            raise AlreadyExists(f"path {path!r} already exists in the volume: use force (--force) to overwrite it")
        if path in above and entry.kind != EntryKind.DIRECTORY:
            raise InvalidArgument(f"path {path!r} is not a directory in the volume: nothing can be put below it")
    return existing


def remove(connection: Connection, volume: Volume, path: str, *, recursive: bool) -> int:
    """`rm` and `rm -r`. Raises NotFound, or InvalidArgument for a directory without `recursive`."""
    edit = _Edit(connection, volume, 0)
    entry = storage.get_entry(connection, volume.volume_id, path) if path else None
    if path and entry is None:
        raise NotFound(f"no file or directory {path!r} in the volume")
    if entry is None or entry.kind == EntryKind.DIRECTORY:
        if not recursive:
            raise InvalidArgument(f"path {path or '/'!r} is a directory: use recursive (-r) to remove it")
        edit.changed += storage.remove_below(connection, volume.volume_id, path, edit.version)
    if entry is not None:
        edit.tombstones([path])
    return edit.finish()


def copy(
    connection: Connection, volume: Volume, sources: Sequence[str], target: str, now_ns: int, *, recursive: bool
) -> int:
    """`cp` and `cp -r`: one file to a path, or any number of files (and directories) into a directory."""
    edit = _Edit(connection, volume, now_ns)
    folder = clean_path(target)
    entry = storage.get_entry(connection, volume.volume_id, folder) if folder else None
    into = not folder or (entry is not None and entry.kind == EntryKind.DIRECTORY)
    if not sources:
        raise InvalidArgument("no source path was given to copy from")
    if not into and (len(sources) > 1 or target.endswith("/")):
        raise InvalidArgument(f"path {target!r} is not a directory in the volume: create it by uploading into it")
    if not into and (above := parent_of(folder)):
        parent = storage.get_entry(connection, volume.volume_id, above)
        if parent is None or parent.kind != EntryKind.DIRECTORY:
            raise NotFound(f"no directory {above!r} in the volume to copy into")
    for source in sources:
        path = clean_path(source)
        name = path.rpartition("/")[2]
        edit.copy_one(path, f"{folder}/{name}".lstrip("/") if into else folder, recursive=recursive)
    return edit.finish()


def make_folder(connection: Connection, volume: Volume, path: str, now_ns: int) -> int:
    """`mkdir -p`. Raises InvalidArgument where a file is in the way."""
    edit = _Edit(connection, volume, now_ns)
    wanted = {path: VolumeEntry(path, EntryKind.DIRECTORY, FOLDER_MODE, now_ns)}
    existing = edit.existing(wanted)
    if path in existing and existing[path].kind != EntryKind.DIRECTORY:
        raise InvalidArgument(f"path {path!r} is not a directory in the volume")
    folders = edit.missing_folders(wanted, existing, replace=False)
    edit.put([] if path in existing else list(wanted.values()), folders)
    return edit.finish()


class _Edit:
    """The next version of a volume in the making."""

    def __init__(self, connection: Connection, volume: Volume, now_ns: int):
        self.connection = connection
        self.volume_id = volume.volume_id
        self.version = volume.version + 1
        self.now_ns = now_ns
        self.changed = 0

    def finish(self) -> int:
        if not self.changed:
            return self.version - 1
        storage.set_version(self.connection, self.volume_id, self.version)
        return self.version

    def existing(self, paths: Iterable[str]) -> dict[str, VolumeEntry]:
        """What lives at these paths and above them."""
        return storage.get_entries(
            self.connection, self.volume_id, {above for path in paths for above in (path, *ancestors(path))}
        )

    def put(self, entries: Sequence[VolumeEntry], folders: Sequence[VolumeEntry] = ()) -> None:
        storage.put_entries(self.connection, self.volume_id, [*folders, *entries], self.version)
        self.changed += len(entries) + len(folders)

    def tombstones(self, paths: Sequence[str]) -> None:
        self.put([VolumeEntry(path, EntryKind.GONE, 0, self.now_ns) for path in paths])

    def missing_folders(
        self, wanted: dict[str, VolumeEntry], existing: dict[str, VolumeEntry], *, replace: bool
    ) -> list[VolumeEntry]:
        """Entries for the folders above `wanted` that are not there. A file in the way is replaced, or refused."""
        folders = {}
        for path in wanted:
            for above in ancestors(path):
                if above in folders or above in wanted:
                    continue
                old = existing.get(above)
                if old is not None and old.kind == EntryKind.DIRECTORY:
                    continue
                if old is not None and not replace:
                    raise InvalidArgument(f"path {above!r} is not a directory in the volume")
                folders[above] = VolumeEntry(above, EntryKind.DIRECTORY, FOLDER_MODE, self.now_ns)
        return list(folders.values())

    def remove_seen_folder(self, removal: Removal, seen: tuple[int, Sequence[int]]) -> None:
        """Remove a folder's seen entries; it stays, with what others have put into it meanwhile."""
        path = removal.path
        self.changed += storage.remove_below(self.connection, self.volume_id, path, self.version, seen)
        unseen = storage.list_below(self.connection, self.volume_id, path)
        if not unseen:
            if not removal.children_only:
                self.tombstones([path])
            return
        wanted = {entry.path: entry for entry in unseen}
        self.put([], self.missing_folders(wanted, self.existing(wanted), replace=True))

    def copy_one(self, source: str, target: str, *, recursive: bool) -> None:
        entry = storage.get_entry(self.connection, self.volume_id, source) if source else None
        if source and entry is None:
            raise NotFound(f"no file or directory {source!r} in the volume")
        is_folder = entry is None or entry.kind == EntryKind.DIRECTORY
        if is_folder and not recursive:
            raise InvalidArgument(f"path {source or '/'!r} is a directory: use recursive (-r) to copy it")
        if target == source:
            raise InvalidArgument(f"{source!r} and {target!r} are the same file")
        if is_folder and f"{target}/".startswith(f"{source}/" if source else ""):
            raise InvalidArgument(f"cannot copy the directory {source or '/'!r} into itself, {target!r}")
        items = [] if entry is None else [entry]
        if is_folder:
            items += storage.list_below(self.connection, self.volume_id, source)
        copies = {}
        for item in items:
            path = target + item.path[len(source) :]
            copies[path] = msgspec.structs.replace(item, path=path, mtime_ns=self.now_ns)
        existing = self.existing(copies)
        for path, item in copies.items():
            old = existing.get(path)
            if old is not None and (old.kind == EntryKind.DIRECTORY) != (item.kind == EntryKind.DIRECTORY):
                raise InvalidArgument(f"path {path!r} exists in the volume, and one is a directory, the other a file")
        self.put([item for path, item in copies.items() if not _same_folder(existing.get(path), item)])


def _same_folder(old: VolumeEntry | None, new: VolumeEntry) -> bool:
    return old is not None and old.kind == new.kind == EntryKind.DIRECTORY and old.mode == new.mode
