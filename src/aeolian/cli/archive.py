"""The file that `aeolian backup` writes: a tar archive, whose first member says what it is of.

Everything that a file system keeps of a layer is kept: owners, modes, times, links, devices and extended attributes.
"""

import contextlib
import io
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import msgspec

from aeolian import __version__
from aeolian.domain.errors import FailedPrecondition, InvalidArgument
from aeolian.storage import migrate

ABOUT = "aeolian-backup.json"
DATABASE = "aeolian.db"
XATTR = "SCHILY.xattr."
"""As GNU tar and bsdtar name them."""


class About(msgspec.Struct, frozen=True):
    """What a backup is of."""

    version: str
    schema: str
    """The revision of its database."""
    made_at: float
    has_images: bool


class ArchiveWriter:
    """`with ArchiveWriter(path, …):` a file of mode 0600 that is there when it is whole, and not before."""

    def __init__(self, path: Path, *, has_images: bool, on_bytes: Callable[[int], None]):
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._about = About(__version__, migrate.head_revision(), time.time(), has_images)
        self._on_bytes = on_bytes

    def __enter__(self) -> "ArchiveWriter":
        descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._file = open(descriptor, "wb")
        os.fchmod(descriptor, 0o600)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)
        about = msgspec.json.format(msgspec.json.encode(self._about))
        member = tarfile.TarInfo(ABOUT)
        member.size, member.mode, member.mtime = len(about), 0o600, int(self._about.made_at)
        self._tar.addfile(member, io.BytesIO(about))
        return self

    def __exit__(self, kind, *_error) -> None:
        try:
            if kind is None:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                os.rename(self._partial, self._path)
        finally:
            with contextlib.suppress(OSError):  # what a full disk has refused is tried again by the close
                self._file.close()
            self._partial.unlink(missing_ok=True)

    def add(self, path: Path, name: str) -> bool:
        """One file, folder, link or device. False: it is not there (any more)."""
        try:
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    member = self._tar.gettarinfo(arcname=name, fileobj=file)
                    self._remember(member, path)
                    self._tar.addfile(member, file if member.isreg() else None)
                    self._on_bytes(member.size)
                return True
            member = self._tar.gettarinfo(str(path), name)
            if member is not None:  # None: a socket
                self._remember(member, path)
                self._tar.addfile(member)
        except FileNotFoundError:
            return False
        return True

    def add_tree(self, path: Path, name: str) -> bool:
        """A folder with all that is in it."""
        if not self.add(path, name):
            return False
        with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir(follow_symlinks=False):
                    self.add_tree(path / entry.name, f"{name}/{entry.name}")
                else:
                    self.add(path / entry.name, f"{name}/{entry.name}")
        return True

    def _remember(self, member: tarfile.TarInfo, path: Path) -> None:
        about = path.lstat()
        member.pax_headers["mtime"] = f"{about.st_mtime_ns // 10**9}.{about.st_mtime_ns % 10**9:09d}"
        for name in _xattrs(path):
            value = os.getxattr(path, name, follow_symlinks=False)
            member.pax_headers[XATTR + name] = value.decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[About, tarfile.TarFile]]:
    """A backup to be read. Raises InvalidArgument when it is none, FailedPrecondition when it is of a newer version."""
    try:
        with tarfile.open(path, mode="r|*") as tar:
            first = tar.next()
            if first is None or first.name != ABOUT or (content := tar.extractfile(first)) is None:
                raise InvalidArgument(f"{path} is not a backup that `aeolian backup` has made")
            about = msgspec.json.decode(content.read(), type=About)
            if about.schema > migrate.head_revision():
                raise FailedPrecondition(
                    f"{path} was made by Aeolian {about.version} (schema {about.schema}), and this version knows up to "
                    f"{migrate.head_revision()}: restore it with that version or a newer one"
                )
            yield about, tar
    except (tarfile.TarError, EOFError, msgspec.MsgspecError) as error:
        raise InvalidArgument(f"{path} is not a whole backup: {error}") from error
    except FileNotFoundError as error:
        if error.filename != str(path):
            raise
        raise InvalidArgument(f"there is no backup at {path}") from error


def extract(tar: tarfile.TarFile, target: Path, on_bytes: Callable[[int], None]) -> None:
    """Everything that follows in the archive. Folders get their modes and times last."""
    tar.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
    folders: list[tarfile.TarInfo] = []
    while (member := tar.next()) is not None:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise InvalidArgument(f"the backup holds {member.name!r}, which no backup does")
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if member.isdir():
            path.mkdir(mode=0o700, exist_ok=True)
            folders.append(member)
            continue
        if member.islnk():
            os.link(target / member.linkname, path, follow_symlinks=False)
            continue
        tar.extract(member, target, numeric_owner=True)
        _complete(member, path)
        on_bytes(member.size)
    for member in reversed(folders):
        path = target / member.name
        if os.geteuid() == 0:
            os.chown(path, member.uid, member.gid)
        os.chmod(path, member.mode)
        _complete(member, path)


def _complete(member: tarfile.TarInfo, path: Path) -> None:
    """What `tarfile` leaves out: extended attributes, and nanoseconds."""
    for name, value in member.pax_headers.items():
        if name.startswith(XATTR):
            os.setxattr(path, name.removeprefix(XATTR), value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
    seconds, _, fraction = member.pax_headers.get("mtime", f"{int(member.mtime)}").partition(".")
    mtime_ns = int(seconds) * 10**9 + int(fraction.ljust(9, "0")[:9])
    os.utime(path, ns=(mtime_ns, mtime_ns), follow_symlinks=False)


def _xattrs(path: Path) -> list[str]:
    try:
        return os.listxattr(path, follow_symlinks=False)
    except (OSError, AttributeError):  # a file system, or an operating system, that has none
        return []
