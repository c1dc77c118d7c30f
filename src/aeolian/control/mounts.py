"""Mounts: immutable sets of files that the client uploads and containers see read-only.

Content goes into the ContentStore by its SHA-256, so a file is uploaded once; a mount's id is made of its
files, so equal mounts are one. Mounts that the client expects to find ready (its own packages, a standalone
Python) are made here on demand.
"""

import asyncio
import contextlib
import hashlib
import logging
import posixpath
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from modal_proto import api_pb2

from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.containers import MountFile, MountSpec
from aeolian.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from aeolian.domain.ids import content_id
from aeolian.storage import mounts as storage
from aeolian.storage.database import Database
from aeolian.storage.files import ContentStore

log = logging.getLogger(__name__)

CLIENT_MOUNT = re.compile(r"modal-client-mount-(\d[A-Za-z0-9.]{0,63})")
PYTHON_MOUNT = re.compile(r"python-build-standalone\.\d{8}\.((\d+\.\d+)\.\d+t?)-gnu")
NAME = re.compile(r"[a-zA-Z0-9-_.]{1,64}")
MAX_PATH_BYTES = 4095
MAX_NAME_BYTES = 255
MAX_CACHED_SPECS = 256
DEFAULT_MODE = 0o644
COLLECT_S = 3600.0


class Blobs(Protocol):
    async def open_path(self, blob_id: str) -> Path:
        """The uploaded blob as a local file. Raises NotFound."""
        ...

    async def delete(self, blob_id: str) -> None: ...


class Environment(Protocol):
    @property
    def id(self) -> str: ...


class Environments(Protocol):
    def resolve(self, name: str, caller: Caller) -> Environment: ...


class StandalonePythons(Protocol):
    async def folder(self, series: str, full_version: str) -> Path:
        """A relocatable interpreter (`bin/python3`, `lib/…`). Raises NotFound with a message for the user."""
        ...


class Mount(NamedTuple):
    mount_id: str
    checksum: str
    """SHA-256 of the sorted (path, content, mode) list, hexadecimal: equal for equal files."""


class UploadedFile(NamedTuple):
    """What a client says of one file of a mount."""

    path: str
    sha256_hex: str
    mode: int | None = None


class Mounts:
    def __init__(
        self,
        database: Database,
        clock: Clock,
        content: ContentStore,
        blobs: Blobs,
        environments: Environments,
        pythons: StandalonePythons,
    ):
        self._database = database
        self._clock = clock
        self._content = content
        self._blobs = blobs
        self._environments = environments
        self._pythons = pythons
        self._specs: OrderedDict[str, MountSpec] = OrderedDict()
        self._python_lock = asyncio.Lock()
        self._collector: asyncio.Task | None = None

    # ---- life of the service ----------------------------------------------------------------------------

    async def open(self) -> None:
        """Start deleting, once an hour, what no mount holds: uploads that came to nothing, and those of v1 Volumes."""
        self._collector = asyncio.create_task(self._collect_forever(), name="mounts-collect")

    async def close(self) -> None:
        if self._collector is not None:
            self._collector.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._collector

    async def _collect_forever(self) -> None:
        while True:
            await asyncio.sleep(COLLECT_S)
            try:
                await self.collect()
            except Exception:
                log.exception("collecting unused uploads failed; the next turn tries again")

    async def collect(self) -> int:
        """Delete content that no mount holds and nobody has asked for in a day; return how many files."""
        referenced = await self._database.read(storage.referenced_contents)
        return await asyncio.to_thread(self._content.collect, referenced)

    # ---- content --------------------------------------------------------------------------------------

    async def missing(self, sha256_hexes: Sequence[str]) -> list[str]:
        """Which of these contents must be uploaded. Raises InvalidArgument on a malformed digest."""
        return await asyncio.to_thread(lambda: [digest for digest in sha256_hexes if not self._content.keep(digest)])

    async def put(self, sha256_hex: str, data: bytes) -> None:
        """Store a file's content. Raises InvalidArgument when it is not what its digest says."""
        self._content.path(sha256_hex)
        await asyncio.to_thread(self._content.put, data, sha256_hex)

    async def put_blob(self, sha256_hex: str, blob_id: str) -> None:
        """As `put`, from an uploaded blob, which is not needed any more then. Raises NotFound for an unknown one."""
        if not self._content.keep(sha256_hex):
            source = await self._blobs.open_path(blob_id)
            await asyncio.to_thread(self._content.put_file, source, sha256_hex)
        await self._blobs.delete(blob_id)

    # ---- mounts ---------------------------------------------------------------------------------------

    async def create(self, files: Iterable[UploadedFile]) -> Mount:
        """The mount of these files (made if there is none yet).

        Raises InvalidArgument for a path that is relative, climbs or is both file and folder, and
        FailedPrecondition for content that was not uploaded.
        """
        row = await asyncio.to_thread(self._row_of, list(files))
        await self._database.write(lambda connection: storage.insert_mount(connection, row, self._clock.now()))
        return Mount(row.mount_id, row.checksum)

    async def deploy(
        self, name: str, environment_name: str, files: Iterable[UploadedFile], caller: Caller, *, replace: bool
    ) -> Mount:
        """The mount of these files, under a name. Raises AlreadyExists when that is taken and `replace` is false."""
        if not NAME.fullmatch(name):
            raise InvalidArgument(f"mount name {name!r}: use 1 to 64 letters, digits, '-', '_' and '.'")
        environment = self._environments.resolve(environment_name, caller)
        row = await asyncio.to_thread(self._row_of, list(files))

        def write(connection):
            if not replace and storage.get_named(connection, environment.id, name) is not None:
                raise AlreadyExists(f"a mount named {name!r} exists in this environment: choose another name")
            now = self._clock.now()
            storage.insert_mount(connection, row, now)
            storage.put_name(connection, environment.id, name, row.mount_id, now)

        await self._database.write(write)
        return Mount(row.mount_id, row.checksum)

    async def lookup(self, name: str, environment_name: str, caller: Caller) -> Mount:
        """A deployed mount by name. Raises NotFound."""
        environment = self._environments.resolve(environment_name, caller)

        def read(connection):
            mount_id = storage.get_named(connection, environment.id, name)
            return mount_id and storage.get_mount(connection, mount_id)

        row = await self._database.read(read)
        if not row:
            raise NotFound(f"no mount named {name!r} in this environment: deploy it first")
        return Mount(row.mount_id, row.checksum)

    async def lookup_global(self, name: str) -> Mount:
        """A mount that the platform provides: the client's packages, or a standalone Python. Raises NotFound."""
        if match := CLIENT_MOUNT.fullmatch(name):
            return await self._client_mount(match[1])
        if match := PYTHON_MOUNT.fullmatch(name):
            async with self._python_lock:
                return await self._python_mount(name, series=match[2], full_version=match[1])
        raise NotFound(
            f"no global mount named {name!r}: Aeolian provides modal-client-mount-<version> "
            "and python-build-standalone.<release>.<version>-gnu"
        )

    def refuse_global(self, name: str) -> None:
        raise PermissionDenied(f"global mounts belong to the platform: deploy {name!r} in an environment instead")

    async def spec(self, mount_id: str) -> MountSpec:
        """What a worker needs to show this mount. Raises NotFound."""
        if mount_id in self._specs:
            self._specs.move_to_end(mount_id)
            return self._specs[mount_id]
        row = await self._database.read(lambda connection: storage.get_mount(connection, mount_id))
        if row is None:
            raise NotFound(f"no mount {mount_id!r}: it was never created on this server")
        spec = MountSpec(mount_id, row.files)
        self._specs[mount_id] = spec
        if len(self._specs) > MAX_CACHED_SPECS:
            self._specs.popitem(last=False)
        return spec

    async def describe(self, mount_ids: set[str], caller: Caller) -> dict[str, api_pb2.Object]:
        """Those of these ids that exist (see `dependencies`). A mount belongs to whoever knows its content."""
        found = await self._database.read(lambda c: [storage.get_mount(c, mount_id) for mount_id in mount_ids])
        return {
            row.mount_id: api_pb2.Object(
                object_id=row.mount_id,
                mount_handle_metadata=api_pb2.MountHandleMetadata(content_checksum_sha256_hex=row.checksum),
            )
            for row in found
            if row is not None
        }

    def _row_of(self, uploaded: list[UploadedFile]) -> storage.MountRow:
        files: dict[str, MountFile] = {}
        for file in uploaded:
            path = _checked_path(file.path)
            try:
                size = self._content.size_bytes(file.sha256_hex)
            except NotFound:
                raise FailedPrecondition(
                    f"{path}: its content (SHA-256 {file.sha256_hex}) was not uploaded; upload it by MountPutFile first"
                ) from None
            mode = DEFAULT_MODE if not file.mode else file.mode & 0o777
            files[path] = MountFile(path, file.sha256_hex, size, mode)
        _refuse_files_as_folders(files)
        ordered = tuple(files[path] for path in sorted(files))
        canonical = "".join(f"{file.path}\0{file.sha256_hex}\0{file.mode:o}\n" for file in ordered).encode()
        return storage.MountRow(content_id("mount", canonical), hashlib.sha256(canonical).hexdigest(), ordered)

    async def _client_mount(self, version: str) -> Mount:
        """The SDK's own packages. It holds no files: the worker shows /pkg of the caller's SDK version."""
        canonical = f"modal-client-mount {version}".encode()
        row = storage.MountRow(content_id("mount", canonical), hashlib.sha256(canonical).hexdigest(), ())
        known = await self._database.read(lambda connection: storage.get_mount(connection, row.mount_id))
        if known is None:
            await self._database.write(lambda connection: storage.insert_mount(connection, row, self._clock.now()))
        return Mount(row.mount_id, row.checksum)

    async def _python_mount(self, name: str, series: str, full_version: str) -> Mount:
        def read(connection):
            mount_id = storage.get_named(connection, "", name)
            return mount_id and storage.get_mount(connection, mount_id)

        row = await self._database.read(read)
        if not row:
            folder = await self._pythons.folder(series, full_version)
            row = await asyncio.to_thread(lambda: self._row_of(self._store_folder(folder, "/python")))

            def write(connection):
                now = self._clock.now()
                storage.insert_mount(connection, row, now)
                storage.put_name(connection, "", name, row.mount_id, now)

            await self._database.write(write)
        return Mount(row.mount_id, row.checksum)

    def _store_folder(self, folder: Path, prefix: str) -> list[UploadedFile]:
        """Copy a folder's files into the content store; links become what they point to."""
        files = []
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                digest, _ = self._content.put_file(path)
                mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
                files.append(UploadedFile(f"{prefix}/{path.relative_to(folder).as_posix()}", digest, mode))
        return files


def _checked_path(path: str) -> str:
    """A mount's file name as it is, if it is an absolute path in normal form. Raises InvalidArgument naming it."""
    if not path.startswith("/"):
        raise InvalidArgument(f"mount path {path!r} is relative: it must be absolute")
    if "\0" in path or len(path.encode()) > MAX_PATH_BYTES:
        raise InvalidArgument(f"mount path {path[:200]!r} is longer than {MAX_PATH_BYTES} bytes or holds a NUL")
    parts = path.split("/")[1:]
    if ".." in parts:
        raise InvalidArgument(f"mount path {path!r} climbs: '..' is not allowed")
    if path.startswith("//") or posixpath.normpath(path) != path or path == "/":
        raise InvalidArgument(f"mount path {path!r} is not in normal form: it must name a file, without '.' or '//'")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise InvalidArgument(f"mount path {path[:200]!r}: a name in it is longer than {MAX_NAME_BYTES} bytes")
    return path


def _refuse_files_as_folders(files: dict[str, MountFile]) -> None:
    for path in files:
        parent = posixpath.dirname(path)
        while parent != "/":
            if parent in files:
                raise InvalidArgument(f"mount path {parent!r} is a file, and also the folder of {path!r}")
            parent = posixpath.dirname(parent)
