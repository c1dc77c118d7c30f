"""Where Blobs are kept. `BlobStore` is the interface; `FileBlobStore` keeps them as files.

A blob is written beside its final place and renamed when it is whole: a blob that exists is complete. An
upload in parts goes into one file at the parts' offsets, with their MD5s (16 bytes each) in a file beside it.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import AsyncIterable, Callable
from pathlib import Path
from typing import Protocol

from aeolian.domain.errors import FailedPrecondition, InvalidArgument, NotFound
from aeolian.storage.receive import check_length, check_room, disk_error, receive

BLOB_ID = re.compile(r"bl-[0-9A-Za-z]{22}")
UPLOAD_LIFETIME_S = 24 * 3600.0
PART_MD5_BYTES = 16


class BlobStore(Protocol):
    """Blobs by id: written once, whole or not at all."""

    def check_room(self, length: int) -> None:
        """Raises OutOfSpace when a blob of that length cannot be stored."""
        ...

    async def put(self, blob_id: str, data: bytes) -> None: ...

    async def receive(
        self, blob_id: str, chunks: AsyncIterable[bytes], *, length: int, md5: bytes | None, sha256: bytes | None
    ) -> str:
        """Store a stream of exactly `length` bytes; return its MD5 in hex. Raises InvalidArgument on a mismatch."""
        ...

    async def receive_part(
        self, blob_id: str, chunks: AsyncIterable[bytes], *, index: int, length: int, part_length: int
    ) -> str:
        """Store part `index` (from 0) of an upload; return the part's MD5 in hex. May be repeated."""
        ...

    async def complete(self, blob_id: str, *, num_parts: int, length: int, sha256: bytes | None) -> str:
        """Make a blob of its parts; return the MD5 of their MD5s, a dash and their number. May be repeated."""
        ...

    async def local_path(self, blob_id: str) -> Path:
        """The blob as a file on this machine, not to be written. Raises NotFound."""
        ...

    async def delete(self, blob_id: str) -> None: ...

    async def collect(self, older_than: float, is_owned: Callable[[str], bool]) -> int:
        """Delete blobs and unfinished uploads made before then that nobody owns; return how many blobs."""
        ...


class FileBlobStore:
    def __init__(self, root: Path):
        self._root = root
        self._incoming = root / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def check_room(self, length: int) -> None:
        check_room(self._incoming, length)

    async def put(self, blob_id: str, data: bytes) -> None:
        await asyncio.to_thread(self._put, blob_id, data)

    def _put(self, blob_id: str, data: bytes) -> None:
        with self._temporary() as (descriptor, temporary):
            try:
                with os.fdopen(os.dup(descriptor), "wb") as file:
                    file.write(data)
            except OSError as error:
                raise disk_error(error) from error
            self._publish(temporary, blob_id)

    async def receive(
        self, blob_id: str, chunks: AsyncIterable[bytes], *, length: int, md5: bytes | None, sha256: bytes | None
    ) -> str:
        with self._temporary() as (descriptor, temporary):
            digests = await receive(descriptor, chunks, offset=0, max_bytes=length, wants_sha256=sha256 is not None)
            check_length(digests.num_bytes, length)
            _check("MD5", digests.md5, md5)
            _check("SHA-256", digests.sha256, sha256)
            self._publish(temporary, blob_id)
        return digests.md5.hex()

    async def receive_part(
        self, blob_id: str, chunks: AsyncIterable[bytes], *, index: int, length: int, part_length: int
    ) -> str:
        parts, md5s = self._upload_paths(blob_id)
        with _opened(parts) as descriptor:
            digests = await receive(
                descriptor, chunks, offset=index * part_length, max_bytes=length, wants_sha256=False
            )
        check_length(digests.num_bytes, length)
        with _opened(md5s) as descriptor:
            os.pwrite(descriptor, digests.md5, index * PART_MD5_BYTES)
        return digests.md5.hex()

    async def complete(self, blob_id: str, *, num_parts: int, length: int, sha256: bytes | None) -> str:
        return await asyncio.to_thread(self._complete, blob_id, num_parts, length, sha256)

    def _complete(self, blob_id: str, num_parts: int, length: int, sha256: bytes | None) -> str:
        parts, md5_file = self._upload_paths(blob_id)
        try:
            md5s = md5_file.read_bytes()
        except FileNotFoundError:
            md5s = b""
        missing = [
            index + 1
            for index in range(num_parts)
            if not any(md5s[index * PART_MD5_BYTES : (index + 1) * PART_MD5_BYTES])
        ]
        if missing:
            raise FailedPrecondition(f"upload of {blob_id}: part {missing[0]} of {num_parts} has not arrived")
        if parts.exists():
            check_length(parts.stat().st_size, length)
            if sha256 is not None:
                with parts.open("rb") as file:
                    _check("SHA-256", hashlib.file_digest(file, "sha256").digest(), sha256)
            self._publish(parts, blob_id)
        elif not self._path(blob_id).exists():
            raise NotFound(f"there is no upload of blob {blob_id}, or it has expired: upload it again")
        return f"{hashlib.md5(md5s, usedforsecurity=False).hexdigest()}-{num_parts}"

    async def local_path(self, blob_id: str) -> Path:
        path = self._path(blob_id)
        if not path.exists():
            raise NotFound(f"there is no blob {blob_id!r}: it was never uploaded, or its lifetime is over")
        return path

    async def delete(self, blob_id: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path(blob_id).unlink()

    async def collect(self, older_than: float, is_owned: Callable[[str], bool]) -> int:
        return await asyncio.to_thread(self._collect, older_than, is_owned)

    def _collect(self, older_than: float, is_owned: Callable[[str], bool]) -> int:
        num_deleted = 0
        for folder in self._root.iterdir():
            is_incoming = folder == self._incoming
            horizon = time.time() - UPLOAD_LIFETIME_S if is_incoming else older_than
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < horizon and (is_incoming or not is_owned(path.name)):
                        path.unlink()
                        num_deleted += not is_incoming
        return num_deleted

    def _path(self, blob_id: str) -> Path:
        if not BLOB_ID.fullmatch(blob_id):
            raise NotFound(f"{blob_id!r} is not the id of a blob (bl-…)")
        return self._root / blob_id[-2:] / blob_id

    def _upload_paths(self, blob_id: str) -> tuple[Path, Path]:
        name = self._path(blob_id).name
        return self._incoming / f"{name}.parts", self._incoming / f"{name}.md5s"

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

    def _publish(self, source: Path, blob_id: str) -> None:
        target = self._path(blob_id)
        try:
            target.parent.mkdir(exist_ok=True)
            os.replace(source, target)
        except OSError as error:
            raise disk_error(error) from error


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


def _check(name: str, actual: bytes, expected: bytes | None) -> None:
    if expected is not None and actual != expected:
        raise InvalidArgument(
            f"the content's {name} is {actual.hex()}, not {expected.hex()} as announced: send it again"
        )
