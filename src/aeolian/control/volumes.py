"""Volumes: named file trees that containers mount, and clients list, upload to and download from."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from sqlalchemy.engine import Connection

from aeolian.control import volume_edits as edits
from aeolian.control.signed_urls import SignedUrls
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from aeolian.domain.ids import ID_LENGTH, new_id
from aeolian.domain.volumes import (
    BLOCK_BYTES,
    EntryKind,
    VolumeChanges,
    VolumeEntry,
    VolumeManifest,
    block_slices,
    check_path,
    clean_path,
    content_of_blocks,
    num_blocks,
    resolve_link,
)
from aeolian.storage import volumes as storage
from aeolian.storage.database import Database
from aeolian.storage.files import ContentStore
from aeolian.storage.volume_files import VolumeFiles
from aeolian.storage.volumes import Volume

log = logging.getLogger(__name__)
T = TypeVar("T")

HEARTBEAT_TIMEOUT_S = 900.0
"""Clients beat every 300 s for an ephemeral volume; after this silence it is deleted."""
SWEEP_S = 60.0
COLLECT_S = 3600.0
PAGE_ENTRIES = 20_000
"""A listing up to this long is of one version; longer ones continue with what is newest then."""
STREAM_ENTRIES = 1000
FRESH_S = 900.0
MAX_LINKS = 40
DEFAULT_FS_VERSION = 2
NAME = re.compile(r"[a-zA-Z0-9-_.]{1,64}")
ID_LIKE = re.compile(rf"[a-zA-Z]+-[a-zA-Z0-9]{{{ID_LENGTH}}}")


class Environment(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...


class Environments(Protocol):
    def resolve(self, name: str, caller: Caller) -> Environment: ...


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


class Volumes:
    def __init__(
        self,
        database: Database,
        clock: Clock,
        environments: Environments,
        files: VolumeFiles,
        mount_files: ContentStore,
        urls: SignedUrls,
    ):
        """`files` is the content of volumes; `mount_files` is where `MountPutFile` puts uploads of v1 clients."""
        self._database = database
        self._clock = clock
        self._environments = environments
        self._files = files
        self._mount_files = mount_files
        self._urls = urls
        self._heard_at: dict[str, float] = {}
        self._last_created_at = 0.0
        self._sweeper: asyncio.Task | None = None

    # ---- life of the service ----------------------------------------------------------------------------

    async def open(self) -> None:
        """Take up the ephemeral volumes (their clients get a full timeout to come back) and start sweeping."""
        self._last_created_at = await self._database.read(storage.newest_created_at)
        now = self._clock.now()
        for volume_id in await self._database.read(lambda connection: storage.ids_of_kind(connection, "ephemeral")):
            self._heard_at[volume_id] = now
        self._sweeper = asyncio.create_task(self._sweep_forever(), name="volumes-sweep")

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper

    async def _sweep_forever(self) -> None:
        collected_at = self._clock.monotonic()
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self.sweep()
                if self._clock.monotonic() - collected_at > COLLECT_S:
                    collected_at = self._clock.monotonic()
                    await self.collect()
            except Exception:
                log.exception("a sweep of the volumes failed; the next one tries again")

    async def sweep(self) -> None:
        """Delete ephemeral volumes whose clients have fallen silent."""
        horizon = self._clock.now() - HEARTBEAT_TIMEOUT_S
        for volume_id in [volume_id for volume_id, at in self._heard_at.items() if at < horizon]:
            await self._database.write(lambda connection, gone=volume_id: storage.delete_volume(connection, gone))
            self._heard_at.pop(volume_id, None)

    async def collect(self) -> int:
        """Delete content that no volume names any more; return how many files."""
        referenced = await self._database.read(storage.referenced_contents)
        return await asyncio.to_thread(self._files.collect, referenced)

    async def delete_owned_by(self, app_id: str) -> None:
        """The app has come to its end: its anonymous volumes go."""

        def delete(connection: Connection) -> None:
            for volume_id in storage.ids_owned_by(connection, app_id):
                storage.delete_volume(connection, volume_id)

        await self._database.write(delete)

    # ---- volumes ----------------------------------------------------------------------------------------

    async def lookup(self, name: str, environment_name: str, caller: Caller) -> Volume:
        """Raises NotFound."""
        environment = self._environments.resolve(environment_name, caller)
        volume = await self._database.read(lambda c: storage.find_volume(c, environment.id, name))
        return _found(volume, name, environment.name)

    async def create(
        self,
        name: str,
        environment_name: str,
        caller: Caller,
        *,
        fs_version: int = 0,
        options: dict[str, str] | None = None,
        if_exists: str = "return",
    ) -> Volume:
        """The volume of that name, made if need be. `if_exists`: `return` it, `fail`, or `replace` it."""
        _check_name(name)
        environment = self._environments.resolve(environment_name, caller)
        volume = self._new(environment.id, name, "named", caller, fs_version, options)

        def create(connection: Connection) -> Volume:
            old = storage.find_volume(connection, environment.id, name)
            if old is not None and if_exists == "return":
                _check_options(old, options)
                return old
            if old is not None and if_exists == "fail":
                raise AlreadyExists(f"a Volume named {name!r} already exists in environment {environment.name!r}")
            if old is not None:
                storage.delete_volume(connection, old.volume_id)
            storage.insert_volume(connection, volume)
            return volume

        return await self._database.write(create)

    async def create_anonymous(
        self,
        environment_name: str,
        caller: Caller,
        *,
        app_id: str = "",
        fs_version: int = 0,
        options: dict[str, str] | None = None,
    ) -> Volume:
        """A volume without a name: of an app, or (no `app_id`) ephemeral, alive while its client beats."""
        environment = self._environments.resolve(environment_name, caller)
        kind = "owned" if app_id else "ephemeral"
        volume = self._new(environment.id, "", kind, caller, fs_version, options, app_id)
        await self._database.write(lambda connection: storage.insert_volume(connection, volume))
        if kind == "ephemeral":
            self._heard_at[volume.volume_id] = self._clock.now()
        return volume

    async def heartbeat(self, volume_id: str) -> None:
        """Raises NotFound for an ephemeral volume that is gone."""
        if volume_id not in self._heard_at:
            await self.get(volume_id)
            return
        self._heard_at[volume_id] = self._clock.now()

    async def get(self, volume_id: str) -> Volume:
        """Raises NotFound."""
        return await self._database.read(lambda connection: _get(connection, volume_id))

    async def list_named(
        self, environment_name: str, caller: Caller, created_before: float = 0.0, limit: int = 100
    ) -> tuple[str, list[Volume]]:
        """The environment's name and its named volumes, newest first. `created_before` 0: from the newest."""
        environment = self._environments.resolve(environment_name, caller)
        before = created_before or float("inf")
        found = await self._database.read(
            lambda connection: storage.list_volumes(connection, environment.id, min(before, 1e18), limit)
        )
        return environment.name, found

    async def rename(self, volume_id: str, name: str) -> None:
        """Raises NotFound, AlreadyExists."""
        _check_name(name)

        def rename(connection: Connection) -> None:
            volume = _get(connection, volume_id)
            if not volume.name:
                raise FailedPrecondition(f"Volume {volume_id} is anonymous: it has no name to change")
            other = storage.find_volume(connection, volume.environment_id, name)
            if other is not None and other.volume_id != volume_id:
                raise AlreadyExists(f"a Volume named {name!r} already exists in this environment")
            storage.rename_volume(connection, volume_id, name)

        await self._database.write(rename)

    async def delete(self, volume_id: str) -> None:
        """Delete the volume and all that is in it. Raises NotFound."""
        if not await self._database.write(lambda connection: storage.delete_volume(connection, volume_id)):
            raise _not_found(volume_id)
        self._heard_at.pop(volume_id, None)

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
                _get(connection, volume_id)
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
        found = await asyncio.to_thread(
            lambda: [self._files.find_blocks(upload.size_bytes, upload.block_sha256s) for upload in cleaned]
        )
        missing = [
            MissingBlock(file_index, block_index, self._block_url(upload, block_index))
            for file_index, upload in enumerate(cleaned)
            for block_index in found[file_index].missing
        ]
        if not missing:
            pairs = [(upload, blocks.content) for upload, blocks in zip(cleaned, found, strict=True)]
            files = await asyncio.to_thread(
                lambda: [self._entry(upload.path, upload.mode, content) for upload, content in pairs]
            )
            await self._put(volume_id, files, overwrite, once)
        return missing

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

        await self._put(volume_id, await asyncio.to_thread(link), overwrite, once)

    async def _put(self, volume_id: str, files: Sequence[VolumeEntry], overwrite: bool, once: str | None) -> None:
        await self._edit(
            volume_id,
            lambda c, volume: edits.put_files(c, volume, files, self._now_ns(), overwrite=overwrite),
            once=once,
        )

    async def remove(self, volume_id: str, path: str, *, recursive: bool, once: str | None = None) -> None:
        cleaned = clean_path(path)
        await self._edit(volume_id, lambda c, volume: edits.remove(c, volume, cleaned, recursive=recursive), once=once)

    async def copy(
        self, volume_id: str, sources: Sequence[str], target: str, *, recursive: bool, once: str | None = None
    ) -> None:
        await self._edit(
            volume_id,
            lambda c, volume: edits.copy(c, volume, sources, target, self._now_ns(), recursive=recursive),
            once=once,
        )

    async def slices(self, volume_id: str, path: str, start: int = 0, length: int = 0) -> Slices:
        """URLs for a byte range of a file (`length` 0: to its end). Raises NotFound, InvalidArgument."""
        cleaned = clean_path(path)
        entry = await self._database.read(lambda connection: _resolve_file(connection, volume_id, cleaned, path))
        start = min(start, entry.size_bytes)
        length = min(length or entry.size_bytes, entry.size_bytes - start)
        url_path = f"/volumes/files/{entry.content}"
        urls = [
            self._urls.make("GET", url_path, offset=offset, length=part) for offset, part in block_slices(start, length)
        ]
        return Slices(entry.size_bytes, start, length, urls)

    # ---- containers, by their workers -------------------------------------------------------------------

    async def manifest(self, volume_id: str, since: int = 0, after: str = "") -> VolumeManifest:
        """A page of the volume's entries, or of what versions after `since` changed. Raises NotFound."""

        def read(connection: Connection) -> VolumeManifest:
            volume = _get(connection, volume_id)
            if volume.version <= since:
                return VolumeManifest(volume_id, volume.version, since, ())
            entries = storage.list_changed(connection, volume_id, since, after, PAGE_ENTRIES)
            more = entries[-1].path if len(entries) == PAGE_ENTRIES else ""
            return VolumeManifest(volume_id, volume.version, since, tuple(entries), more)

        return await self._database.read(read)

    async def commit(self, volume_id: str, changes: VolumeChanges) -> int:
        """All of a container's changes, or none; returns the volume's version then. Safe to repeat."""
        for removal in changes.removals:
            check_path(removal.path)
        for entry in changes.puts:
            if not check_path(entry.path) or entry.kind not in (1, 2, 3):
                raise InvalidArgument(f"a commit cannot put {entry.path!r} with kind {entry.kind}")
        contents = {entry.content for entry in changes.puts if entry.kind == EntryKind.FILE}
        lost = await asyncio.to_thread(lambda: [content for content in contents if not self._files.keep(content)])
        if lost:
            raise FailedPrecondition(f"the content {lost[0]} of a commit is not stored: store it, then commit again")
        return await self._edit(
            volume_id,
            lambda c, volume: edits.apply_commit(c, volume, changes, self._now_ns()),
            once=f"volume-commit/{changes.commit_id}",
        )

    async def make_folder(self, volume_id: str, path: str) -> int:
        """Make sure that a directory exists (a mount's sub-path); returns the volume's version."""
        cleaned = clean_path(path)
        if not cleaned:
            return (await self.get(volume_id)).version
        return await self._edit(volume_id, lambda c, volume: edits.make_folder(c, volume, cleaned, self._now_ns()))

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

    async def _edit(self, volume_id: str, edit: Callable[[Connection, Volume], int], once: str | None = None) -> int:
        return await self._database.write(lambda connection: edit(connection, _get(connection, volume_id)), once=once)

    def _new(
        self,
        environment_id: str,
        name: str,
        kind: str,
        caller: Caller,
        fs_version: int,
        options: dict[str, str] | None,
        app_id: str = "",
    ) -> Volume:
        if fs_version not in (0, 1, 2):
            raise InvalidArgument(f"volume version {fs_version} does not exist: use 1 or 2")
        # Clients page by created_at, so no two may be equal.
        self._last_created_at = max(self._clock.now(), self._last_created_at + 1e-5)
        return Volume(
            volume_id=new_id("volume"),
            environment_id=environment_id,
            name=name,
            fs_version=fs_version or DEFAULT_FS_VERSION,
            kind=kind,
            app_id=app_id,
            options=options or {},
            created_at=self._last_created_at,
            created_by=caller.workspace,
        )

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


def _get(connection: Connection, volume_id: str) -> Volume:
    volume = storage.get_volume(connection, volume_id)
    if volume is None:
        raise _not_found(volume_id)
    return volume


def _found(volume: Volume | None, name: str, environment_name: str) -> Volume:
    if volume is None:
        raise NotFound(f"Volume {name!r} not found in environment {environment_name!r}")
    return volume


def _not_found(volume_id: str) -> NotFound:
    return NotFound(f"there is no Volume {volume_id!r}: it was deleted, or never was")


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or ID_LIKE.fullmatch(name):
        raise InvalidArgument(
            f"{name!r} is not a name for a Volume: use 1 to 64 letters, digits, dashes, dots and underscores, not an id"
        )


def _check_options(volume: Volume, options: dict[str, str] | None) -> None:
    if options and options != volume.options:
        raise FailedPrecondition(
            f"Volume {volume.name!r} exists with other options ({volume.options}) than those asked for ({options})"
        )


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


def _check_upload(
    connection: Connection, volume_id: str, uploads: Sequence[BlockFile | StoredFile], overwrite: bool
) -> None:
    edits.check_puts(connection, _get(connection, volume_id), (u.path for u in uploads), overwrite=overwrite)


def _resolve_file(connection: Connection, volume_id: str, path: str, shown: str) -> VolumeEntry:
    """The file at a path, through symlinks that stay inside the volume."""
    _get(connection, volume_id)
    for _ in range(MAX_LINKS):
        entry = storage.get_entry(connection, volume_id, path) if path else None
        if entry is None or entry.kind == EntryKind.DIRECTORY:
            break
        if entry.kind == EntryKind.FILE:
            return entry
        path = resolve_link(path, entry.content)
    else:
        raise InvalidArgument(f"path {shown!r} goes through too many symbolic links")
    if not path or entry is not None:
        raise InvalidArgument(f"path {shown!r} is a directory: only files can be read")
    raise NotFound(f"no file {shown!r} in the volume")
