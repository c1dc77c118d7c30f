"""The folder of a Volume that one container sees: an overlay over shared layers, or a copy of the whole tree.

::

    place/upper, work     overlay: what the container has written (`upper/files/…`)
    merged                overlay: its mount; the container is shown `merged/files[/sub_path]`
    place/files           plain: the tree itself
    …/incoming            where files are made before they are renamed into the tree (`volume_tree`)

The overlay is mounted in the host's namespace, so that it can be read and written from outside.
"""

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from aeolian.domain.errors import FailedPrecondition
from aeolian.storage.volume_files import VolumeFiles
from aeolian.worker import mounting
from aeolian.worker.volume_layers import FILES, Snapshot
from aeolian.worker.volume_scan import NO_FOLLOW
from aeolian.worker.volume_tree import VolumeTree

INCOMING = "incoming"
UNMOUNT_TRIES = 10
UNMOUNT_PAUSE_S = 0.05


class VolumeFolder(Protocol):
    source: Path
    """What the container is shown."""
    scanned: Path
    """Where to look for what it has written."""
    is_overlay: bool

    def make(self) -> VolumeTree:
        """Make the folder; returns the writer into it."""
        ...

    def open_file(self) -> str:
        """A file of it that a process has open, as that process sees it; "" when there is none."""
        ...

    def leave(self) -> None:
        """The container has ended: unmount. What it wrote stays in `scanned`."""
        ...

    def delete(self) -> None: ...


class OverlayFolder:
    is_overlay = True

    def __init__(self, place: Path, merged: Path, snapshot: Snapshot, sub_path: str, files: VolumeFiles):
        self._place = place
        self._layers = snapshot.layers
        self._files = files
        self._merged = merged
        self.source = self._merged / FILES / sub_path
        self.scanned = place / "upper" / FILES / sub_path

    def make(self) -> VolumeTree:
        upper, work = self._place / "upper", self._place / "work"
        for folder in (upper, work, self._merged):
            folder.mkdir(parents=True)
        mounting.mount_overlay(self._layers, upper, work, self._merged)
        try:
            (self._merged / INCOMING).mkdir()
            if self.source.resolve() != self.source or not self.source.is_dir():
                raise FailedPrecondition(
                    f"the volume's sub-path {self.source.relative_to(self._merged)} is no directory"
                )
            os.chmod(self.source, self.source.stat().st_mode & 0o7777)  # brings it into the upper folder
            return VolumeTree(self.source, self._merged / INCOMING, self._files)
        except BaseException:
            self.leave()
            raise

    def open_file(self) -> str:
        device = self.source.stat().st_dev
        return _first_open(lambda status: status.st_dev == device and not stat.S_ISDIR(status.st_mode))

    def leave(self) -> None:
        for _ in range(UNMOUNT_TRIES):
            if mounting.unmount(self._merged):
                return
            time.sleep(UNMOUNT_PAUSE_S)  # a process of the container is still dying
        mounting.unmount(self._merged, detach=True)

    def delete(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._merged.rmdir()


class PlainFolder:
    """For hosts, users and disks without overlays: slower to make, and every file is a copy of its own."""

    is_overlay = False

    def __init__(self, place: Path, files: VolumeFiles):
        self._place = place
        self._files = files
        self.source = self.scanned = place / FILES

    def make(self) -> VolumeTree:
        self.source.mkdir(parents=True)
        (self._place / INCOMING).mkdir()
        # Root can write to what it has no permission to write to.
        return VolumeTree(self.source, self._place / INCOMING, self._files, links_large=os.geteuid() != 0)

    def open_file(self) -> str:
        ours = {(status.st_dev, status.st_ino) for status in _files_below(self.source)}
        return _first_open(lambda status: (status.st_dev, status.st_ino) in ours)

    def leave(self) -> None:
        pass

    def delete(self) -> None:
        _make_deletable(self._place)
        shutil.rmtree(self._place, ignore_errors=True)


def _first_open(is_ours: Callable[[os.stat_result], bool]) -> str:
    """Among what the processes that we may look into have open."""
    own = str(os.getpid())
    for pid in os.listdir("/proc"):
        if not pid.isdigit() or pid == own:
            continue
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                if is_ours(os.stat(f"/proc/{pid}/fd/{descriptor}")) and not _is_name_only(pid, descriptor):
                    return os.readlink(f"/proc/{pid}/fd/{descriptor}")
    return ""


def _is_name_only(pid: str, descriptor: str) -> bool:
    """O_PATH: nothing is read or written by it. A gVisor sandbox holds what it shows by such ones."""
    with open(f"/proc/{pid}/fdinfo/{descriptor}") as stream:
        flags = next(line.split()[1] for line in stream if line.startswith("flags:"))
    return bool(int(flags, 8) & os.O_PATH)


def _files_below(folder: Path) -> Iterator[os.stat_result]:
    for _path, _folders, names, descriptor in os.fwalk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                yield os.stat(name, dir_fd=descriptor, follow_symlinks=False)


def _make_deletable(folder: Path) -> None:
    """A container may have taken our own permissions away from its folders."""
    for path, folders, _names in os.walk(folder):
        for name in folders:
            below = os.path.join(path, name)
            with contextlib.suppress(OSError):
                if not os.path.islink(below) and not os.access(below, os.R_OK | os.W_OK | os.X_OK):
                    descriptor = os.open(below, os.O_PATH | NO_FOLLOW | os.O_DIRECTORY)
                    try:
                        os.chmod(f"/proc/self/fd/{descriptor}", 0o700)
                    finally:
                        os.close(descriptor)
