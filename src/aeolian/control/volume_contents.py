"""The files of Volumes, as clients list, upload, download, copy and remove them."""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sqlalchemy.engine import Connection

from aeolian.control import volume_edits as edits
from aeolian.control.signed_urls import SignedUrls
from aeolian.control.volume_collector import VolumeCollector
from aeolian.control.volume_edits import edit_volume, existing_volume
from aeolian.domain.clock import Clock
from aeolian.domain.errors import InvalidArgument, NotFound
from aeolian.domain.volumes import (
    BLOCK_BYTES,
    EntryKind,
    VolumeEntry,
    ancestors,
    block_slices,
    clean_path,
    content_of_blocks,
    content_of_bytes,
    num_blocks,
    resolve_link,
)
from aeolian.storage import volumes as storage
from aeolian.storage.database import Database
from aeolian.storage.files import ContentStore
from aeolian.storage.receive import check_room
from aeolian.storage.volume_files import VolumeFiles

PAGE_ENTRIES = 20_000
"""A listing up to this long is of one version; longer ones continue with what is newest then."""
STREAM_ENTRIES = 1000
FRESH_S = 900.0
MAX_LINKS = 40


class BlockFile(NamedTuple):
    """A file of an upload, as a client announces it: its blocks' SHA-256s, trailing zeros of a block left out."""

    path: str
    mode: int
    size_bytes: int
    block_sha256s: list[bytes]


class MissingBlock(NamedTuple):
    file_index: int
    block_index: int
    put_url: str


class StoredFile(NamedTuple):
    """A file of an upload whose content was put before (`MountPutFile`)."""

    path: str
    mode: int
    sha256_hex: str


class Slices(NamedTuple):
    """A byte range of a file and the URL of each of its parts, cut at the file's 8 MiB boundaries."""

    size_bytes: int
    start: int
    length: int
    urls: list[str]


class VolumeContents:
    def __init__(
        self,
        database: Database,
        clock: Clock,
        files: VolumeFiles,
        mount_files: ContentStore,
        urls: SignedUrls,
        collector: VolumeCollector,
    ):
        """`files` is the content of volumes; `mount_files` is where `MountPutFile` puts uploads of v1 clients."""
        self._database = database
        self._clock = clock
        self._files = files
        self._mount_files = mount_files
        self._urls = urls
        self._collector = collector

    # ---- files, for clients -----------------------------------------------------------------------------

    async def list_files(
        self, volume_id: str, path: str, *, recursive: bool, max_entries: int | None = None
    ) -> AsyncIterator[list[VolumeEntry]]:
        """The entries of a directory, or the one entry of a file, in portions. Raises NotFound."""
        folder = clean_path(path)
        after, num_left = "", max_entries if max_entries is not None else 1 << 62
        while num_left > 0:
            limit = min(PAGE_ENTRIES, num_left)

            def page(connection: Connection, after: str = after, limit: int = limit) -> list[VolumeEntry] | VolumeEntry:
                existing_volume(connection, volume_id)
                if folder:
                    entry = storage.get_entry(connection, volume_id, folder)
                    if entry is None:
                        raise NotFound(f"no file or directory {path!r} in the volume")
                    if entry.kind != EntryKind.DIRECTORY:
                        return entry
                query = storage.list_below if recursive else storage.list_children
                return query(connection, volume_id, folder, after, limit)

            found = await self._database.read(page)
            if isinstance(found, VolumeEntry):
                yield [found]
                return
            for start in range(0, len(found), STREAM_ENTRIES):
                yield found[start : start + STREAM_ENTRIES]
            if len(found) < limit:
                return
            after, num_left = found[-1].path, num_left - len(found)

    async def put_block_files(
        self, volume_id: str, uploads: Sequence[BlockFile], *, overwrite: bool, once: str | None = None
    ) -> list[MissingBlock]:
        """Commit files if all their blocks are here; else say which blocks to PUT, and where."""
        cleaned = [upload._replace(path=_file_path(upload.path)) for upload in uploads]
        for upload in cleaned:
            _check_blocks(upload)
        await self._database.read(lambda c: _check_upload(c, volume_id, cleaned, overwrite))
        async with self._files.in_use():
            found = await asyncio.to_thread(
                lambda: [self._files.find_blocks(upload.size_bytes, upload.block_sha256s) for upload in cleaned]
            )
            missing = [
                MissingBlock(file_index, block_index, self._block_url(upload, block_index))
                for file_index, upload in enumerate(cleaned)
                for block_index in found[file_index].missing
            ]
            if missing:
                await asyncio.to_thread(check_room, self._files.root, _size_of(missing, cleaned))
                self._collector.promise(_contents_of(upload) for upload in cleaned)
                return missing
            pairs = [(upload, blocks.content) for upload, blocks in zip(cleaned, found, strict=True)]
            files = await asyncio.to_thread(
                lambda: [self._entry(upload.path, upload.mode, content) for upload, content in pairs]
            )
            await self._put(volume_id, files, overwrite, once)
            self._collector.keep_promise(_contents_of(upload) for upload in cleaned)
            return []

    async def put_stored_files(
        self, volume_id: str, uploads: Sequence[StoredFile], *, overwrite: bool, once: str | None = None
    ) -> None:
        """Commit files whose content is in the mount files. Raises NotFound when it is not."""
        cleaned = [upload._replace(path=_file_path(upload.path)) for upload in uploads]
        await self._database.read(lambda c: _check_upload(c, volume_id, cleaned, overwrite))

        def link() -> list[VolumeEntry]:
            return [
                self._entry(path, mode, self._files.link_file(self._mount_files.path(sha256_hex), sha256_hex))
                for path, mode, sha256_hex in cleaned
            ]

        async with self._files.in_use():
            await self._put(volume_id, await asyncio.to_thread(link), overwrite, once)

    async def _put(self, volume_id: str, files: Sequence[VolumeEntry], overwrite: bool, once: str | None) -> None:
        await edit_volume(
            self._database,
            volume_id,
            lambda c, volume: edits.put_files(c, volume, files, self._now_ns(), overwrite=overwrite),
            once=once,
        )
        self._collector.wake()

    async def remove(self, volume_id: str, path: str, *, recursive: bool, once: str | None = None) -> None:
        cleaned = clean_path(path)
        await edit_volume(
            self._database,
            volume_id,
            lambda c, volume: edits.remove(c, volume, cleaned, recursive=recursive),
            once=once,
        )
        self._collector.wake()

    async def copy(
        self, volume_id: str, sources: Sequence[str], target: str, *, recursive: bool, once: str | None = None
    ) -> None:
        await edit_volume(
            self._database,
            volume_id,
            lambda c, volume: edits.copy(c, volume, sources, target, self._now_ns(), recursive=recursive),
            once=once,
        )
        self._collector.wake()

    async def slices(self, volume_id: str, path: str, start: int = 0, length: int = 0) -> Slices:
        """URLs for a byte range of a file (`length` 0: to its end). Raises NotFound, InvalidArgument."""
        cleaned = clean_path(path)
        entry = await self._database.read(lambda connection: _resolve_file(connection, volume_id, cleaned, path))
        start = min(start, entry.size_bytes)
        length = min(length or entry.size_bytes, entry.size_bytes - start)
        self._collector.lend(entry.content, length)
        url_path = f"/volumes/files/{entry.content}"
        urls = [
            self._urls.make("GET", url_path, offset=offset, length=part) for offset, part in block_slices(start, length)
        ]
        return Slices(entry.size_bytes, start, length, urls)

    # ---- what the signed URLs do ------------------------------------------------------------------------

    async def receive_block(
        self, url_path: str, query: Mapping[str, str], content: str, index: int, chunks: AsyncIterable[bytes]
    ) -> None:
        allowed = self._urls.check("PUT", url_path, query)
        sha256 = bytes.fromhex(allowed["sha256"])
        await self._files.receive_block(content, int(allowed["size"]), index, sha256, chunks)

    def download(self, method: str, url_path: str, query: Mapping[str, str], content: str) -> tuple[Path, int, int]:
        """The file, offset and length to send."""
        allowed = self._urls.check(method, url_path, query)
        return self._files.path(content), int(allowed["offset"]), int(allowed["length"])

    # ---- helpers ----------------------------------------------------------------------------------------

    def _entry(self, path: str, mode: int, content: str) -> VolumeEntry:
        """A file's entry. Content that has just come keeps its time, so that trees can link to its very inode."""
        status = self._files.path(content).stat()
        is_fresh = abs(time.time() - status.st_mtime) < FRESH_S
        mtime_ns = status.st_mtime_ns if is_fresh else self._now_ns()
        return VolumeEntry(path, EntryKind.FILE, mode & 0o7777, mtime_ns, status.st_size, content)

    def _block_url(self, upload: BlockFile, index: int) -> str:
        content = content_of_blocks(upload.size_bytes, upload.block_sha256s)
        sha256 = upload.block_sha256s[index].hex()
        return self._urls.make("PUT", f"/volumes/blocks/{content}/{index}", size=upload.size_bytes, sha256=sha256)

    def _now_ns(self) -> int:
        return int(self._clock.now() * 1e9)


def _file_path(path: str) -> str:
    cleaned = clean_path(path)
    if not cleaned or path.endswith("/"):
        raise InvalidArgument(f"path {path!r} does not name a file: end it with the file's name")
    return cleaned


def _check_blocks(upload: BlockFile) -> None:
    expected = num_blocks(upload.size_bytes)
    if len(upload.block_sha256s) != expected:
        raise InvalidArgument(
            f"file {upload.path!r} of {upload.size_bytes} bytes has {expected} blocks of {BLOCK_BYTES} bytes, "
            f"but {len(upload.block_sha256s)} hashes came"
        )
    if any(len(sha256) != 32 for sha256 in upload.block_sha256s):
        raise InvalidArgument(f"file {upload.path!r}: a block's SHA-256 is not 32 bytes long")


def _size_of(missing: Sequence[MissingBlock], uploads: Sequence[BlockFile]) -> int:
    lefts = (uploads[block.file_index].size_bytes - block.block_index * BLOCK_BYTES for block in missing)
    return sum(min(BLOCK_BYTES, left) for left in lefts)


def _contents_of(upload: BlockFile) -> list[str]:
    """The ids that an upload's content may come to have."""
    ids = [content_of_blocks(upload.size_bytes, upload.block_sha256s)]
    if len(upload.block_sha256s) == 1:
        ids.append(content_of_bytes(upload.block_sha256s[0].hex()))
    return ids


def _check_upload(
    connection: Connection, volume_id: str, uploads: Sequence[BlockFile | StoredFile], overwrite: bool
) -> None:
    edits.check_puts(connection, existing_volume(connection, volume_id), (u.path for u in uploads), overwrite=overwrite)


def _resolve_file(connection: Connection, volume_id: str, path: str, shown: str) -> VolumeEntry:
    """The file at a path, through symlinks (to it, or to a folder above it) that stay inside the volume."""
    existing_volume(connection, volume_id)
    for _ in range(MAX_LINKS):
        found = storage.get_entries(connection, volume_id, (path, *ancestors(path))) if path else {}
        link = next((one for one in sorted(found) if found[one].kind == EntryKind.SYMLINK), None)
        if link is not None:
            path = f"{resolve_link(link, found[link].content)}{path[len(link) :]}".lstrip("/")
            continue
        entry = found.get(path)
        if entry is not None and entry.kind == EntryKind.FILE:
            return entry
        if entry is not None or not path:
            raise InvalidArgument(f"path {shown!r} is a directory: only files can be read")
        raise NotFound(f"no file {shown!r} in the volume")
    raise InvalidArgument(f"path {shown!r} goes through too many symbolic links")
