"""Writes a Volume's entries into the folder that a container sees, beside what the container itself does there.

Every path is walked from an open root without following links: a container may have put one anywhere. A file
is made in `incoming`, a folder of the same mount that the container does not see, and renamed into its place.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from aeolian.domain.errors import FailedPrecondition
from aeolian.domain.volumes import EntryKind, VolumeEntry, parent_of
from aeolian.storage.receive import disk_error
from aeolian.storage.volume_files import FICLONE, VolumeFiles, copy_content
from aeolian.worker.volume_scan import NO_FOLLOW, Seen, seen_of

FOLDER_MODE = 0o755
LINKED_FROM_BYTES = 64 << 20


class VolumeTree:
    def __init__(self, root: Path, incoming: Path, files: VolumeFiles, *, links_large: bool = False):
        """`root` is what the container sees. `links_large`: large files may be hard links without write permission,
        where copying them shares nothing and nobody can write to them all the same."""
        self._incoming = incoming
        self._files = files
        self._links_large = links_large
        self._num_made = 0
        self.root = os.open(root, NO_FOLLOW | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self.root)

    def apply(self, entries: Iterable[VolumeEntry]) -> dict[str, Seen | None]:
        """Bring the tree to these entries; returns how each path looks now (None: it is gone).

        Raises NotFound when content is missing, OutOfSpace; what was done until then stays.
        """
        ordered = sorted(entries, key=lambda entry: entry.path)
        applied: dict[str, Seen | None] = {}
        try:
            for entry in reversed(ordered):
                if entry.kind == EntryKind.GONE:
                    self._remove(entry.path)
                    applied[entry.path] = None
            for entry in ordered:
                if entry.kind != EntryKind.GONE:
                    applied[entry.path] = self._put(entry)
        except OSError as error:
            raise disk_error(error) from error
        return applied

    def make_mount_point(self, path: str) -> list[str]:
        """Make sure that there is a folder for something to be mounted on; returns the paths that were made for it.

        Raises FailedPrecondition where something else is in the way.
        """
        made: list[str] = []
        so_far = ""
        descriptor = os.dup(self.root)
        try:
            for name in path.split("/"):
                so_far = f"{so_far}/{name}".lstrip("/")
                try:
                    os.mkdir(name, FOLDER_MODE, dir_fd=descriptor)
                    made.append(so_far)
                except FileExistsError:
                    pass
                below = os.open(name, NO_FOLLOW | os.O_DIRECTORY, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise FailedPrecondition(f"path {so_far!r} in the volume is no directory to mount on") from None
            raise disk_error(error) from error
        finally:
            os.close(descriptor)
        return made

    def _put(self, entry: VolumeEntry) -> Seen | None:
        name = entry.path.rpartition("/")[2]
        with self._folder(parent_of(entry.path), make=True) as parent:
            status = _status(name, parent)
            is_folder = status is not None and stat.S_ISDIR(status.st_mode)
            if entry.kind == EntryKind.DIRECTORY:
                if not is_folder:
                    if status is not None:
                        os.unlink(name, dir_fd=parent)
                    os.mkdir(name, FOLDER_MODE, dir_fd=parent)
                with _opened(name, NO_FOLLOW | os.O_DIRECTORY, parent) as descriptor:
                    os.fchmod(descriptor, entry.mode)
                return Seen(EntryKind.DIRECTORY, entry.mode)
            made = self._make(entry)
            try:
                if is_folder:
                    shutil.rmtree(name, dir_fd=parent)
                os.rename(made, name, dst_dir_fd=parent)
            except BaseException:
                made.unlink(missing_ok=True)
                raise
            status = _status(name, parent)
            # Who wrote to it in this very moment has changed its time: then it counts as theirs.
            return None if status is None else seen_of(status, entry.content)

    def _make(self, entry: VolumeEntry) -> Path:
        self._num_made += 1
        made = self._incoming / str(self._num_made)
        if entry.kind == EntryKind.SYMLINK:
            os.symlink(entry.content, made)
            return made
        source = self._files.path(entry.content)
        try:
            with source.open("rb") as reader, made.open("xb") as writer:
                if self._links_large and entry.size_bytes >= LINKED_FROM_BYTES and not _can_clone(reader, writer):
                    made.unlink()
                    os.link(self._files.inode(entry.content, entry.mode & ~0o222, entry.mtime_ns), made)
                    return made
                copy_content(reader.fileno(), writer.fileno(), None)
                os.fchmod(writer.fileno(), entry.mode)
                os.utime(writer.fileno(), ns=(entry.mtime_ns, entry.mtime_ns))
        except FileNotFoundError:
            self._files.inode(entry.content, entry.mode, entry.mtime_ns)  # raises NotFound with its name
            raise
        except BaseException:
            made.unlink(missing_ok=True)
            raise
        return made

    def _remove(self, path: str) -> None:
        name = path.rpartition("/")[2]
        try:
            with self._folder(parent_of(path), make=False) as parent:
                status = _status(name, parent)
                if status is not None and stat.S_ISDIR(status.st_mode):
                    os.rmdir(name, dir_fd=parent)
                elif status is not None:
                    os.unlink(name, dir_fd=parent)
        except OSError as error:
            # A folder stays while the container has something of its own in it.
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENOTEMPTY, errno.EEXIST):
                raise

    @contextlib.contextmanager
    def _folder(self, path: str, *, make: bool):
        descriptor = os.dup(self.root)
        try:
            for name in path.split("/") if path else ():
                try:
                    below = os.open(name, NO_FOLLOW | os.O_DIRECTORY, dir_fd=descriptor)
                except OSError as error:
                    if not make or error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                        raise
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=descriptor)
                    os.mkdir(name, FOLDER_MODE, dir_fd=descriptor)
                    below = os.open(name, NO_FOLLOW | os.O_DIRECTORY, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _opened(name: str, flags: int, folder: int):
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _status(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _can_clone(reader, writer) -> bool:
    try:
        fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        return True
    except OSError:
        return False
