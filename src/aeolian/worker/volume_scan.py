"""What a container's own folder of a Volume holds now, read without following any link the container made.

The folder is the upper directory of an overlay, or the whole tree where overlays cannot be mounted. In an upper
directory a removed path is a whiteout (a character device 0/0), a folder that hides what was below it is
opaque, and a renamed folder names, in an attribute, the place in the lower layers where its content still is
(https://docs.kernel.org/filesystems/overlayfs.html).
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from aeolian.domain.volumes import EntryKind, VolumeEntry
from aeolian.worker.volume_layers import FILES, Snapshot

OPAQUE, REDIRECT = "trusted.overlay.opaque", "trusted.overlay.redirect"
MODE_BITS = 0o1777
"""Set-user-id and set-group-id are not kept: content lies on the host too."""
NO_FOLLOW = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Seen(NamedTuple):
    """One path, as it lies on disk. Equal means unchanged, unless the clock was too coarse (see `volume_changes`)."""

    kind: EntryKind
    mode: int
    size_bytes: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    inode: int = 0
    target: str = ""


class Scan(NamedTuple):
    written: dict[str, Seen]
    moved: dict[str, VolumeEntry]
    """Entries of the lower layers that are seen at another path now, because a folder above them was renamed."""
    hidden: set[str]
    """Paths of the lower layers that are removed or covered."""
    unusable: list[str]
    """What a volume cannot hold: sockets, devices, pipes."""
    misnamed: list[str]
    """Paths and links to paths that are not UTF-8."""


def scan(root: int, base: Snapshot | None, prefix: str = "") -> Scan:
    """Walk an open folder. `base`: what the overlay stands on (None: nothing); `prefix`: where in it this folder is
    ("" or "folder/…/"). Paths in the result are relative to the folder."""
    walk = _Walk(base, prefix)
    walk.folder(root, "", prefix.removesuffix("/") if base is not None else None)
    return Scan(walk.written, walk.moved, walk.hidden, walk.unusable, walk.misnamed)


def open_folder(path: Path) -> int:
    return os.open(path, NO_FOLLOW | os.O_DIRECTORY)


def seen_of(status: os.stat_result, target: str = "") -> Seen | None:
    """None for what a volume cannot hold."""
    mode = status.st_mode & MODE_BITS
    if stat.S_ISREG(status.st_mode):
        return Seen(EntryKind.FILE, mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    if stat.S_ISDIR(status.st_mode):
        return Seen(EntryKind.DIRECTORY, mode)
    if stat.S_ISLNK(status.st_mode):
        return Seen(EntryKind.SYMLINK, 0o777, target=target)
    return None


class _Walk:
    def __init__(self, base: Snapshot | None, prefix: str):
        self.base = base
        self.prefix = prefix
        self.written: dict[str, Seen] = {}
        self.moved: dict[str, VolumeEntry] = {}
        self.hidden: set[str] = set()
        self.unusable: list[str] = []
        self.misnamed: list[str] = []

    def folder(self, descriptor: int, path: str, lower: str | None) -> None:
        """`lower`: the folder of the base that this one merges with, None where it hides all."""
        for name, status in _entries(descriptor):
            below = f"{path}/{name}" if path else name
            lower_below = None if lower is None else f"{lower}/{name}".lstrip("/")
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                self.hide(below)
                continue
            try:
                name.encode()
                target = os.readlink(name, dir_fd=descriptor) if stat.S_ISLNK(status.st_mode) else ""
                target.encode()
            except UnicodeEncodeError:
                self.misnamed.append(os.fsencode(below).decode("utf-8", "backslashreplace"))
                continue
            except OSError:  # gone, or something else by now
                continue
            seen = seen_of(status, target)
            if seen is None:
                self.unusable.append(below)
            elif seen.kind != EntryKind.DIRECTORY:
                self.hide(below)
                self.written[below] = seen
            else:
                self.subfolder(descriptor, name, below, lower_below, seen)

    def subfolder(self, parent: int, name: str, path: str, lower: str | None, seen: Seen) -> None:
        try:
            descriptor = os.open(name, NO_FOLLOW | os.O_DIRECTORY, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return
            raise
        try:
            if self.base is not None:
                if _attribute(descriptor, OPAQUE) == b"y":
                    lower = None
                elif redirect := _attribute(descriptor, REDIRECT):
                    lower = self.redirected(os.fsdecode(redirect), lower)
                self.written.pop(path, None)
                if lower is None or lower != self.prefix + path or not self.is_base_folder(lower):
                    self.hide(path)
                    if lower is not None and lower != self.prefix + path:
                        self.move(lower, path)
            self.written[path] = seen
            self.moved.pop(path, None)
            self.folder(descriptor, path, lower)
        finally:
            os.close(descriptor)

    def redirected(self, redirect: str, lower: str | None) -> str | None:
        """The lower folder that a renamed one shows: an absolute path below the layers' roots, or a sibling's name."""
        if redirect.startswith(f"/{FILES}/"):
            return redirect.removeprefix(f"/{FILES}/")
        if redirect.startswith("/") or lower is None:
            return None
        return f"{lower.rpartition('/')[0]}/{redirect}".lstrip("/")

    def is_base_folder(self, path: str) -> bool:
        entry = self.base.entries.get(path) if self.base is not None else None
        return entry is not None and entry.kind == EntryKind.DIRECTORY

    def hide(self, path: str) -> None:
        """Nothing of the lower layers is seen at this path and below."""
        if self.base is None:
            return
        if path not in self.hidden and (entry := self.base.entries.get(self.prefix + path)) is not None:
            self.hidden.add(path)
            if entry.kind == EntryKind.DIRECTORY:
                self.hidden.update(below.path[len(self.prefix) :] for below in self.base.below(entry.path))
        if self.moved:
            for moved in [moved for moved in self.moved if moved == path or moved.startswith(path + "/")]:
                del self.moved[moved]

    def move(self, lower: str, path: str) -> None:
        assert self.base is not None
        for entry in self.base.below(lower):
            self.moved[path + entry.path[len(lower) :]] = entry


def _entries(descriptor: int) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(descriptor) as found:
        names = [entry.name for entry in found]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            yield name, os.stat(name, dir_fd=descriptor, follow_symlinks=False)


def _attribute(descriptor: int, name: str) -> bytes:
    try:
        return os.getxattr(descriptor, name)
    except OSError:
        return b""
