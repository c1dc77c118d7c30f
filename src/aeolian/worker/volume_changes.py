"""From what a container's folder of a Volume holds to a commit: what is new against what the server has of it."""

import contextlib
import errno
import fcntl
import logging
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from aeolian.domain.volumes import EntryKind, Removal, VolumeEntry, ancestors
from aeolian.storage.receive import disk_error
from aeolian.storage.volume_files import VolumeFiles
from aeolian.worker.volume_scan import NO_FOLLOW, Scan, Seen, seen_of

log = logging.getLogger(__name__)

COARSE_CLOCK_NS = 20_000_000
"""File times may tick as slowly as this: a file changed more recently may change again without its time moving."""
REHASHED_MAX_BYTES = 64 << 20
"""Up to this size a file whose inode was touched is read again even where its size and time say it is the same."""
HELD_MAX_BYTES = 64 << 20
"""Up to this size writers of a file are kept waiting while it is read."""
MAX_READS = 3
F_SETSIG = 10


@dataclass
class Known:
    """A path as the server has it by this container's doing."""

    entry: VolumeEntry
    seen: Seen | None
    """How it looked then; None where that proves nothing."""


@dataclass
class Ledger:
    """What of a container's folder the server has. The rest is uncommitted.

    `known`: every path of the folder that is not simply the base's; `removed`: paths of the base.
    """

    known: dict[str, Known] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)

    def has(self, entry: VolumeEntry) -> bool:
        """Whether the folder shows this entry by the container's own doing, so that there is nothing to put."""
        if entry.kind == EntryKind.GONE:
            return entry.path in self.removed and entry.path not in self.known
        known = self.known.get(entry.path)
        return known is not None and _is_same(known.entry, entry)

    def record(self, path: str, entry: VolumeEntry, seen: Seen | None) -> None:
        """The server's entry at this path has been put into the folder (`seen` None: or taken out of it)."""
        if seen is None:
            self.known.pop(path, None)
            self.removed.add(path)
            return
        self.removed.discard(path)
        is_theirs = seen.kind != entry.kind or (seen.kind == EntryKind.FILE and seen.mtime_ns != entry.mtime_ns)
        self.known[path] = Known(entry, None if is_theirs else _proof(seen))


@dataclass
class Draft:
    """A commit in the making; `accept` it into the ledger once the server has it."""

    commit_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    puts: list[VolumeEntry] = field(default_factory=list)
    removals: list[Removal] = field(default_factory=list)
    known: dict[str, Known] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)
    hidden: set[str] = field(default_factory=set)
    postponed: list[str] = field(default_factory=list)
    """Files that were open for writing."""
    misnamed: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.puts or self.removals)

    def accept(self, ledger: Ledger) -> None:
        for path in self.forgotten:
            ledger.known.pop(path, None)
        ledger.known.update(self.known)
        ledger.removed |= self.hidden
        ledger.removed -= self.known.keys()


def draft(
    root: int,
    found: Scan,
    ledger: Ledger,
    base: Callable[[str], VolumeEntry | None],
    restore: Callable[[VolumeEntry], bool],
    files: VolumeFiles,
    *,
    waits_for_writers: bool,
    takes: Path | None = None,
) -> Draft:
    """Compare a scan of the open folder `root` with the ledger and store the content of what is new.

    `base(path)`: the entry of the overlay's lower layers. `restore(entry)` stores the content of one of those again.
    `waits_for_writers`: leave files that are open for writing to a later commit. `takes` (the folder's path): the
    container has ended, files may be moved out of it. Raises OutOfSpace.
    """
    result = Draft(misnamed=found.misnamed)
    by_inode = {known.seen.inode: known for known in ledger.known.values() if known.seen and known.seen.size_bytes}
    reader = _Reader(root, files, by_inode, waits_for_writers, takes)
    try:
        for path, seen in found.written.items():
            old = ledger.known.get(path)
            if old is not None and old.seen == seen:
                continue
            known = reader.read(path, seen)
            if known is None:
                if reader.is_postponed:
                    result.postponed.append(path)
                continue
            result.known[path] = known
            before = old.entry if old is not None else None if path in ledger.removed else base(path)
            # What was opened for writing and left as it was must not undo somebody else's commit.
            if before is None or not _is_same(before, known.entry):
                result.puts.append(known.entry)
    except OSError as error:
        raise disk_error(error) from error
    for path, entry in found.moved.items():
        old = ledger.known.get(path)
        if old is None or not _is_same(old.entry, entry):
            # Who removed it from the volume has not removed it from here.
            if entry.kind == EntryKind.FILE and not files.keep(entry.content) and not restore(entry):
                log.error("the content of %r is lost: its file was removed from the volume meanwhile", path)
                continue
            moved = VolumeEntry(path, entry.kind, entry.mode, entry.mtime_ns, entry.size_bytes, entry.content)
            result.known[path] = Known(moved, None)
            result.puts.append(moved)
    visible = found.written.keys() | found.moved.keys()
    result.hidden = found.hidden - visible
    result.forgotten = [path for path in ledger.known if path not in visible]
    gone = {path for path in result.forgotten} | (result.hidden - ledger.removed)
    result.removals = [Removal(path) for path in sorted(_topmost(gone))]
    return result


def _topmost(gone: set[str]) -> Iterable[str]:
    """Without what lies below another removed path: a removed folder takes it along."""
    return (path for path in gone if not any(above in gone for above in ancestors(path)))


def _is_same(old: VolumeEntry, new: VolumeEntry) -> bool:
    """The times of folders and links, and those of files whose content is the same, are not worth a commit."""
    return (old.kind, old.mode, old.content) == (new.kind, new.mode, new.content)


def _proof(seen: Seen) -> Seen | None:
    if seen.kind == EntryKind.FILE and time.time_ns() - seen.mtime_ns < COARSE_CLOCK_NS:
        return None
    return seen


class _Reader:
    """Reads what is new into the store of contents."""

    def __init__(
        self, root: int, files: VolumeFiles, by_inode: dict[int, Known], waits_for_writers: bool, takes: Path | None
    ):
        self._root = root
        self._files = files
        self._by_inode = by_inode
        self._waits_for_writers = waits_for_writers
        self._takes = takes
        self.is_postponed = False
        """Whether the last `read` gave up because the file was being written."""

    def read(self, path: str, seen: Seen) -> Known | None:
        """The entry of a path, its content stored; None when it is gone or is left for later."""
        self.is_postponed = False
        if seen.kind == EntryKind.DIRECTORY:
            return Known(VolumeEntry(path, seen.kind, seen.mode), seen)
        if seen.kind == EntryKind.SYMLINK:
            return Known(VolumeEntry(path, seen.kind, seen.mode, 0, 0, seen.target), seen)
        same = self._by_inode.get(seen.inode)
        if same is not None and same.seen is not None and seen.size_bytes > REHASHED_MAX_BYTES:
            unchanged = (same.seen.size_bytes, same.seen.mtime_ns) == (seen.size_bytes, seen.mtime_ns)
            if unchanged and self._files.keep(same.entry.content):
                entry = VolumeEntry(path, seen.kind, seen.mode, seen.mtime_ns, seen.size_bytes, same.entry.content)
                return Known(entry, _proof(seen))
        try:
            return self._read_file(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                return None  # gone since, or something else by now: the next commit sees it
            raise

    def _read_file(self, path: str) -> Known | None:
        with _open_below(self._root, path) as descriptor, _lease(descriptor) as is_quiet:
            if not is_quiet and self._waits_for_writers:
                self.is_postponed = True
                return None
            for _attempt in range(MAX_READS):
                seen = seen_of(os.fstat(descriptor))
                if seen is None or seen.kind != EntryKind.FILE:
                    return None
                content, size = self._store(path, descriptor, seen)
                after = os.fstat(descriptor)
                if self._takes or (after.st_mtime_ns, after.st_size) == (seen.mtime_ns, size):
                    break
            else:  # written to all the time
                if self._waits_for_writers:
                    self.is_postponed = True
                    return None
                is_quiet = False
            entry = VolumeEntry(path, EntryKind.FILE, seen.mode, seen.mtime_ns, size, content)
            return Known(entry, _proof(seen) if is_quiet else None)

    def _store(self, path: str, descriptor: int, seen: Seen) -> tuple[str, int]:
        if self._takes is None or os.fstat(descriptor).st_nlink > 1:
            return self._files.put_open_file(descriptor, seen.mode, seen.mtime_ns)
        for name in os.listxattr(descriptor):
            with contextlib.suppress(OSError):
                os.removexattr(descriptor, name)
        os.fchown(descriptor, os.geteuid(), os.getegid())
        try:
            return self._files.take_file(self._takes / path, seen.mode, seen.mtime_ns)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return self._files.put_open_file(descriptor, seen.mode, seen.mtime_ns)


@contextlib.contextmanager
def _open_below(root: int, path: str):
    *folders, name = path.split("/")
    descriptor = os.dup(root)
    try:
        for folder in folders:
            below = os.open(folder, NO_FOLLOW | os.O_DIRECTORY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        below = os.open(name, NO_FOLLOW, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lease(descriptor: int):
    """Keep writers out while the file is read. Yields False when somebody has it open for writing already.

    Who wants to write meanwhile waits until we are done (the kernel tells us by a signal that does nothing); for a
    large file nobody should wait that long, and its times tell whether it was written to.
    """
    try:
        fcntl.fcntl(descriptor, F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        yield error.errno != errno.EAGAIN  # this file system has no leases: trust the file's times
        return
    if os.fstat(descriptor).st_size > HELD_MAX_BYTES:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        yield True
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):  # the kernel takes it away when somebody has waited for long
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
