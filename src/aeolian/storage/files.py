"""Content-addressed files: SHA-256 -> bytes on disk. Mount files and volume blocks live here.

A file is written beside its final place, synced, then renamed: a name that exists is whole. The worker on
the same machine reads the same folder (read-only) and links or binds files from it.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import AsyncIterable, Collection
from pathlib import Path

from aeolian.domain.errors import InvalidArgument, NotFound
from aeolian.storage.receive import disk_error

SHA256_HEX = re.compile(r"[0-9a-f]{64}")
CHUNK_BYTES = 1 << 20
KEPT_S = 24 * 3600.0
"""Content that nothing refers to is kept this long: who has just uploaded it, or was told that it is there, may be
about to."""


class ContentStore:
    """Files by the SHA-256 of their content, in `root/ab/cdef…`."""

    def __init__(self, root: Path):
        self.root = root
        self.incoming = root / "incoming"
        self.incoming.mkdir(parents=True, exist_ok=True)

    def path(self, sha256_hex: str) -> Path:
        """Where that content lives (whether or not it does). Raises InvalidArgument on anything but 64 hex digits."""
        if not SHA256_HEX.fullmatch(sha256_hex):
            raise InvalidArgument(f"{sha256_hex!r} is not a SHA-256 in 64 lower-case hexadecimal digits")
        return self.root / sha256_hex[:2] / sha256_hex[2:]

    def has(self, sha256_hex: str) -> bool:
        return self.path(sha256_hex).exists()

    def keep(self, sha256_hex: str) -> bool:
        """Whether it is there; if so, it counts as new for `collect`."""
        path = self.path(sha256_hex)
        try:
            status = path.stat()
            if status.st_ctime < time.time() - KEPT_S / 2:
                os.chmod(path, status.st_mode & 0o7777)  # touches the inode's change time only
        except FileNotFoundError:
            return False
        return True

    def size_bytes(self, sha256_hex: str) -> int:
        try:
            return self.path(sha256_hex).stat().st_size
        except FileNotFoundError:
            raise NotFound(f"no content with SHA-256 {sha256_hex}") from None

    def read(self, sha256_hex: str) -> bytes:
        try:
            return self.path(sha256_hex).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"no content with SHA-256 {sha256_hex}") from None

    def put(self, data: bytes, expected_sha256_hex: str | None = None) -> str:
        """Store bytes; return their SHA-256. Raises InvalidArgument when they are not what was announced."""
        digest = hashlib.sha256(data).hexdigest()
        _check(digest, expected_sha256_hex)
        if not self.keep(digest):
            with self._writing() as temporary:
                temporary.write(data)
                temporary.move_to(self.path(digest))
        return digest

    async def put_stream(self, chunks: AsyncIterable[bytes], expected_sha256_hex: str | None = None) -> tuple[str, int]:
        """Store a stream without holding it in memory; return (SHA-256, size in bytes)."""
        sha256, size = hashlib.sha256(), 0
        with self._writing() as temporary:
            async for chunk in chunks:
                sha256.update(chunk)
                size += len(chunk)
                await asyncio.to_thread(temporary.write, chunk)
            digest = sha256.hexdigest()
            _check(digest, expected_sha256_hex)
            if not self.keep(digest):
                await asyncio.to_thread(temporary.move_to, self.path(digest))
        return digest, size

    def put_file(self, source: Path, expected_sha256_hex: str | None = None) -> tuple[str, int]:
        """Copy a file in; return (SHA-256, size in bytes). Raises as `put`."""
        sha256, size = hashlib.sha256(), 0
        with self._writing() as temporary, source.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                sha256.update(chunk)
                size += len(chunk)
                temporary.write(chunk)
            digest = sha256.hexdigest()
            _check(digest, expected_sha256_hex)
            if not self.keep(digest):
                temporary.move_to(self.path(digest))
        return digest, size

    def collect(self, referenced: Collection[str], now: float | None = None) -> int:
        """Delete content that is not referenced and has been new for nobody in a day; return how many files.

        Who links to it keeps it.
        """
        horizon = (time.time() if now is None else now) - KEPT_S
        num_deleted = 0
        for folder in list(self.root.iterdir()):
            for path in list(folder.iterdir()):
                if folder != self.incoming and folder.name + path.name in referenced:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_ctime < horizon:
                        path.unlink()
                        num_deleted += 1
        return num_deleted

    def _writing(self) -> "_Temporary":
        return _Temporary(self.incoming)


class _Temporary:
    """A file being written; gone unless moved to its place."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> "_Temporary":
        try:
            descriptor, name = tempfile.mkstemp(dir=self._folder)
        except OSError as error:
            raise disk_error(error) from error
        self.file = os.fdopen(descriptor, "wb")
        self._name = Path(name)
        return self

    def write(self, data: bytes) -> None:
        try:
            self.file.write(data)
        except OSError as error:
            raise disk_error(error) from error

    def move_to(self, target: Path) -> None:
        try:
            self.file.flush()
            os.fchmod(self.file.fileno(), 0o644)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._name, target)
        except OSError as error:
            raise disk_error(error) from error

    def __exit__(self, *_exc) -> None:
        with contextlib.suppress(OSError):  # what a full disk has refused is tried again by the close
            self.file.close()
        self._name.unlink(missing_ok=True)


def _check(digest: str, expected: str | None) -> None:
    if expected is not None and digest != expected.lower():
        raise InvalidArgument(f"the content's SHA-256 is {digest}, not {expected} as announced: send it again")
