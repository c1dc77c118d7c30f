"""Content of Volumes as whole files by content id, so that a container's tree is made of hard links.

::

    root/ab/s<sha256>          a file known by its SHA-256: written by a container, or uploaded as one block
    root/cd/b<sha256>          a file known by the SHA-256s of its 8 MiB blocks: uploaded by a v2 client
    root/variants/<id>.<mode>.<mtime>   the same content under another mode or time (both belong to the inode)
    root/incoming/             files being written; `<id>.part` and `<id>.have` are uploads, block by block
    root/lock                  held, shared, by who stores content that no entry names yet

Files are immutable once they have their name. Server and workers of one machine share the folder.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from aeolian.domain.errors import InvalidArgument, NotFound
from aeolian.domain.volumes import BLOCK_BYTES, CONTENT_ID, content_of_blocks, content_of_bytes
from aeolian.storage.receive import disk_error, receive

EXACT_TIMES_BYTES = 64 << 20
"""Up to this size the same content under another mtime gets an inode of its own; larger files share one."""
UNUSED_LIFETIME_S = 24 * 3600.0
"""Content that no volume names is kept this long: an upload may still be on its way to its commit."""
PIECE_BYTES = 1 << 20
EMPTY_SHA256 = hashlib.sha256(b"").digest()
FICLONE = 0x40049409
ZEROS = bytes(PIECE_BYTES)


class Found(NamedTuple):
    """A file known by its blocks: its content id when it is complete, else the blocks that are missing."""

    content: str
    missing: list[int]


class VolumeFiles:
    def __init__(self, root: Path):
        self.root = root
        self._incoming = root / "incoming"
        self._variants = root / "variants"
        for folder in (self._incoming, self._variants):
            folder.mkdir(parents=True, exist_ok=True)
        self._block_locks: weakref.WeakValueDictionary[tuple[str, int], asyncio.Lock] = weakref.WeakValueDictionary()

    def path(self, content: str) -> Path:
        """Where that content lives (whether or not it does). Raises InvalidArgument for a malformed id."""
        if not CONTENT_ID.fullmatch(content):
            raise InvalidArgument(f"{content!r} is not the id of a volume's content")
        return self.root / content[1:3] / content

    def has(self, content: str) -> bool:
        return self.path(content).exists()

    def keep(self, content: str) -> bool:
        """Whether it is there; if so, it counts as new for `collect`."""
        path = self.path(content)
        try:
            os.chmod(path, path.stat().st_mode & 0o7777)  # touches the inode's change time only
        except FileNotFoundError:
            return False
        return True

    def mtime_ns(self, content: str) -> int:
        return self.path(content).stat().st_mtime_ns

    def inode(self, content: str, mode: int, mtime_ns: int) -> Path:
        """A file with that content, mode and time, to be hard-linked. Raises NotFound."""
        path = self.path(content)
        try:
            status = path.stat()
        except FileNotFoundError:
            raise NotFound(f"the content {content} of a volume is missing from the server's disk") from None
        is_exact = status.st_size <= EXACT_TIMES_BYTES
        if status.st_mode & 0o7777 == mode and (not is_exact or status.st_mtime_ns == mtime_ns):
            return path
        variant = self._variants / f"{content}.{mode:o}{f'.{mtime_ns}' if is_exact else ''}"
        if not variant.exists():
            with self._temporary() as (descriptor, temporary), path.open("rb") as source:
                copy_content(source.fileno(), descriptor, None)
                self._publish(temporary, variant, mode, mtime_ns)
        return variant

    # ---- whole files ------------------------------------------------------------------------------------

    def put_bytes(self, data: bytes) -> str:
        content = content_of_bytes(hashlib.sha256(data).hexdigest())
        if not self.keep(content):
            with self._temporary() as (descriptor, temporary):
                _write(descriptor, data, 0)
                self._publish(temporary, self.path(content))
        return content

    def put_open_file(self, source: int, mode: int, mtime_ns: int) -> tuple[str, int]:
        """Copy an open file in (shared by reflink where the disk can); return (content id, size in bytes)."""
        if os.fstat(source).st_size <= PIECE_BYTES:
            data = os.pread(source, 2 * PIECE_BYTES, 0)
            content = content_of_bytes(hashlib.sha256(data).hexdigest())
            if not self.keep(content):
                with self._temporary() as (descriptor, temporary):
                    _write(descriptor, data, 0)
                    self._publish(temporary, self.path(content), mode, mtime_ns)
            return content, len(data)
        with self._temporary() as (descriptor, temporary):
            sha256 = hashlib.sha256()
            size = copy_content(source, descriptor, sha256)
            content = content_of_bytes(sha256.hexdigest())
            if not self.keep(content):
                self._publish(temporary, self.path(content), mode, mtime_ns)
        return content, size

    def take_file(self, source: Path, mode: int, mtime_ns: int) -> tuple[str, int]:
        """Move a file in that nobody can write to any more; return (content id, size in bytes)."""
        with source.open("rb") as file:
            content = content_of_bytes(hashlib.file_digest(file, "sha256").hexdigest())
            size = os.fstat(file.fileno()).st_size
        if not self.keep(content):
            self._publish(source, self.path(content), mode, mtime_ns)
        return content, size

    def link_file(self, source: Path, sha256_hex: str) -> str:
        """Take over an immutable file of another store by hard link; return its content id. Raises NotFound."""
        content = content_of_bytes(sha256_hex)
        if not self.keep(content):
            target = self.path(content)
            target.parent.mkdir(exist_ok=True)
            try:
                os.link(source, target)
            except FileExistsError:
                pass
            except FileNotFoundError:
                raise NotFound(f"no content with SHA-256 {sha256_hex} was uploaded: upload it first") from None
            except OSError:  # another file system, or too many links
                with self._temporary() as (descriptor, temporary), source.open("rb") as file:
                    copy_content(file.fileno(), descriptor, None)
                    self._publish(temporary, target)
        return content

    def put_back(self, source: Path, content: str) -> bool:
        """Link content in again that was deleted here, from a tree that was linked to it."""
        with contextlib.suppress(FileExistsError):
            os.link(source, self.path(content), follow_symlinks=False)
        return self.keep(content)

    # ---- uploads by block -------------------------------------------------------------------------------

    def find_blocks(self, size_bytes: int, sha256s: Sequence[bytes]) -> Found:
        """The file that these blocks make, or which blocks are missing. The last found block completes the file."""
        if not sha256s:
            return Found(self.put_bytes(b""), [])
        content = content_of_blocks(size_bytes, sha256s)
        if len(sha256s) == 1:
            whole = content_of_bytes(sha256s[0].hex())
            if self.keep(whole) and self.path(whole).stat().st_size == size_bytes:
                return Found(whole, [])
        if self.keep(content):
            return Found(content, [])
        part, have_file = self._upload_paths(content)
        try:
            have = have_file.read_bytes()
        except FileNotFoundError:
            have = b""
        missing = [i for i, sha256 in enumerate(sha256s) if sha256 != EMPTY_SHA256 and have[i : i + 1] != b"\1"]
        if missing:
            return Found("", missing)
        if not part.exists():  # nothing but zeros
            with _opened(part) as descriptor:
                os.ftruncate(descriptor, size_bytes)
        with contextlib.suppress(FileNotFoundError):  # somebody else completes it at the same time
            self._publish(part, self.path(content))
        have_file.unlink(missing_ok=True)
        return Found(content, [])

    async def receive_block(
        self, content: str, size_bytes: int, index: int, sha256: bytes, chunks: AsyncIterable[bytes]
    ) -> None:
        """Store block `index` of a file under upload. Raises InvalidArgument when it is not what was announced.

        Trailing zeros need not be sent.
        """
        lock = self._block_locks.setdefault((content, index), asyncio.Lock())
        async with lock:
            offset = index * BLOCK_BYTES
            length = min(BLOCK_BYTES, size_bytes - offset)
            if self.has(content) or self._have(content, index):
                async for _chunk in chunks:  # a repeated upload: read to the end, so that the connection lives on
                    pass
            elif size_bytes <= BLOCK_BYTES:
                await self._receive_only_block(content, size_bytes, sha256, chunks)
            else:
                part, have_file = self._upload_paths(content)
                with _opened(part) as descriptor:
                    os.ftruncate(descriptor, size_bytes)
                    digests = await receive(descriptor, chunks, offset=offset, max_bytes=length, wants_md5=False)
                    _check_block(digests.sha256, sha256)
                    for start in range(digests.num_bytes, length, PIECE_BYTES):  # of an attempt that failed
                        _write(descriptor, ZEROS[: min(PIECE_BYTES, length - start)], offset + start)
                with _opened(have_file) as descriptor:
                    _write(descriptor, b"\1", index)

    async def _receive_only_block(self, content: str, size: int, sha256: bytes, chunks: AsyncIterable[bytes]) -> None:
        with self._temporary() as (descriptor, temporary):
            digests = await receive(descriptor, chunks, offset=0, max_bytes=size, wants_md5=False)
            _check_block(digests.sha256, sha256)
            if digests.num_bytes == size:
                content = content_of_bytes(sha256.hex())
            else:
                os.ftruncate(descriptor, size)
            if not self.keep(content):
                self._publish(temporary, self.path(content))

    def _have(self, content: str, index: int) -> bool:
        try:
            with self._upload_paths(content)[1].open("rb") as file:
                file.seek(index)
                return file.read(1) == b"\1"
        except FileNotFoundError:
            return False

    # ---- collection -------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        """What is stored inside this block is not deleted before its end, when an entry should name it."""
        descriptor = await asyncio.to_thread(self._locked, fcntl.LOCK_SH)
        try:
            yield
        finally:
            os.close(descriptor)

    def _locked(self, operation: int) -> int:
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, operation)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    @contextlib.contextmanager
    def nothing_deleted(self) -> Iterator[None]:
        """As `in_use`, for a backup: what is named now stays where it is until the end of this."""
        descriptor = self._locked(fcntl.LOCK_SH)
        try:
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def nobody_stores(self) -> Iterator[bool]:
        """False while anybody, in this process or another, is inside `in_use`; else they wait for the end of this."""
        try:
            descriptor = self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            os.close(descriptor)

    def delete(self, contents: Collection[str]) -> int:
        """Delete contents and their variants; return how many bytes nobody has any more, but for who links to them."""
        num_bytes = 0
        for content in contents:
            num_bytes += _unlink(self.path(content))
        for variant in os.listdir(self._variants):
            if variant.split(".")[0] in contents:
                num_bytes += _unlink(self._variants / variant)
        return num_bytes

    def collect(self, referenced: set[str], now: float | None = None) -> int:
        """Delete content that no volume names and that has been new for nobody in a day; return how many files.

        Open files and trees that link to it keep what they have.
        """
        horizon = (time.time() if now is None else now) - UNUSED_LIFETIME_S
        num_deleted = 0
        for folder in [folder for folder in self.root.iterdir() if folder.is_dir()]:
            for path in list(folder.iterdir()):
                if folder != self._incoming and path.name.split(".")[0] in referenced:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_ctime < horizon:
                        path.unlink()
                        num_deleted += 1
        return num_deleted

    # ---- helpers ----------------------------------------------------------------------------------------

    def _upload_paths(self, content: str) -> tuple[Path, Path]:
        name = self.path(content).name
        return self._incoming / f"{name}.part", self._incoming / f"{name}.have"

    @contextlib.contextmanager
    def _temporary(self):
        try:
            descriptor, name = tempfile.mkstemp(dir=self._incoming)
        except OSError as error:
            raise disk_error(error) from error
        try:
            yield descriptor, Path(name)
        finally:
            os.close(descriptor)
            Path(name).unlink(missing_ok=True)

    def _publish(self, source: Path, target: Path, mode: int = 0o644, mtime_ns: int | None = None) -> None:
        try:
            os.chmod(source, mode | 0o400)  # we must be able to read it ourselves
            if mtime_ns is not None:
                os.utime(source, ns=(mtime_ns, mtime_ns))
            target.parent.mkdir(exist_ok=True)
            os.replace(source, target)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise disk_error(error) from error


def _unlink(path: Path) -> int:
    """The size of the file that is gone, 0 for none."""
    try:
        size = path.stat().st_size
        path.unlink()
        return size
    except FileNotFoundError:
        return 0


def copy_content(source: int, target: int, digest: "hashlib._Hash | None") -> int:
    """Copy an open file into an empty one, holes staying holes; feed `digest`; return the size in bytes."""
    try:
        fcntl.ioctl(target, FICLONE, source)
        if digest is None:
            return os.fstat(target).st_size
        source, is_cloned = target, True
    except OSError:
        is_cloned = False
    offset = 0
    while piece := os.pread(source, PIECE_BYTES, offset):
        if digest is not None:
            digest.update(piece)
        if not is_cloned and piece != ZEROS:
            _write(target, piece, offset)
        offset += len(piece)
    if not is_cloned:
        os.ftruncate(target, offset)
    return offset


@contextlib.contextmanager
def _opened(path: Path):
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise disk_error(error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(descriptor, view, offset)
            offset, view = offset + written, view[written:]
    except OSError as error:
        raise disk_error(error) from error


def _check_block(actual: bytes, expected: bytes) -> None:
    if actual != expected:
        raise InvalidArgument(
            f"the block's SHA-256 is {actual.hex()}, not {expected.hex()} as announced: send it again"
        )
