"""Volumes in containers: attached before the start, committed and reloaded on request, committed at the end.

::

    attach --> [ commit | reload | background commit ]* --> detach (the container has ended: last commit)

Each container has a folder of its own, so that others' commits appear when it reloads and not before. Commits of
several containers merge by path: the last commit of a file wins, whole.
"""

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from aeolian.domain.containers import VolumeMountSpec
from aeolian.domain.errors import AeolianError, FailedPrecondition, InvalidArgument, Unavailable
from aeolian.domain.volumes import EntryKind, Removal, VolumeChanges, VolumeEntry, clean_path
from aeolian.storage.receive import disk_error
from aeolian.storage.volume_files import VolumeFiles
from aeolian.worker import mounting
from aeolian.worker.volume_authority import VolumeAuthority, changes_since
from aeolian.worker.volume_changes import Draft, Ledger, draft
from aeolian.worker.volume_folders import OverlayFolder, PlainFolder, VolumeFolder
from aeolian.worker.volume_layers import Snapshot, VolumeLayers
from aeolian.worker.volume_scan import Scan, Seen, open_folder, scan
from aeolian.worker.volume_tree import FOLDER_MODE, VolumeTree

log = logging.getLogger(__name__)

BACKGROUND_COMMIT_S = 5.0
BACKGROUND_SHARE = 20
"""Background commits of a volume take at most one part in this of the time."""
MAX_SCANS = 3
LAST_COMMIT_TRIES = 12
LAST_COMMIT_PAUSE_S = 0.5
"""Doubled with each try: the last commit of a container outlives 15 minutes without a server."""


@dataclass
class Attachment:
    """One volume in one container."""

    mount: VolumeMountSpec
    snapshot: Snapshot
    folder: VolumeFolder
    tree: VolumeTree
    root: int
    """The folder's `scanned`, open."""
    prefix: str
    """"" or the sub-path with a slash: where in the volume the container's folder is."""
    version: int
    """What the folder shows, together with `own_versions`, which its own commits made."""
    is_writable: bool
    own_versions: list[int] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    next_background_at: float = 0.0
    warned: set[str] = field(default_factory=set)

    @property
    def base(self) -> Snapshot | None:
        return self.snapshot if self.folder.is_overlay else None

    def base_entry(self, path: str) -> VolumeEntry | None:
        return None if self.base is None else self.base.entries.get(self.prefix + path)

    def saw(self, version: int) -> None:
        """A commit of ours made this version; when nobody else came between, the folder shows it whole."""
        self.own_versions.append(version)
        while self.version + 1 in self.own_versions:
            self.version += 1
            self.own_versions.remove(self.version)

    def close(self) -> None:
        os.close(self.root)


class WorkerVolumes:
    def __init__(self, data_dir: Path, authority: VolumeAuthority, *, overlays: bool | None = None):
        """`overlays`: None tries whether this host, user and disk can mount them."""
        self._root = data_dir.resolve() / "volumes"
        self._mounts = self._root / "mounts"
        self._folders = self._root / "folders"
        self._authority = authority
        self._files = VolumeFiles(self._root / "content")
        self._overlays = overlays
        self._layers: VolumeLayers | None = None
        self._attached: dict[str, dict[str, Attachment]] = {}
        self._forgotten: set[str] = set()
        self._background: asyncio.Task | None = None

    async def open(self) -> None:
        """Clear away what a killed predecessor left, and start committing in the background."""
        await asyncio.to_thread(self._prepare)
        self._layers = VolumeLayers(self._root / "layers", self._files, with_layers=bool(self._overlays))
        self._background = asyncio.create_task(self._commit_in_background(), name="volumes-background-commits")

    def _prepare(self) -> None:
        for folder in (self._mounts, self._folders, self._root / "layers"):
            mounting.unmount_below(folder)
            if folder.is_dir():
                for left in folder.iterdir():
                    shutil.rmtree(left, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        self._root.chmod(0o700)
        if self._overlays is None:
            self._overlays = mounting.can_mount_overlays(self._folders)
        if self._overlays:
            mounting.share_mounts_of(self._mounts)
        else:
            log.warning("volumes are copied for each container: overlays cannot be mounted in %s", self._root)

    async def close(self) -> None:
        """Detach what is attached; the containers have ended."""
        if self._background is not None:
            self._background.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._background
        for task_id in list(self._attached):
            await self.detach(task_id)
        if self._overlays:
            await asyncio.to_thread(mounting.unmount, self._mounts, detach=True)

    # ---- a container's volumes --------------------------------------------------------------------------

    async def attach(self, task_id: str, mount: VolumeMountSpec) -> Path:
        """The folder to show to the container at the mount's path, with the volume's newest version.

        Raises NotFound for a volume or content that is gone, FailedPrecondition, OutOfSpace.
        """
        assert self._layers is not None, "open() comes first"
        sub_path = clean_path(mount.sub_path)
        volumes = self._attached.setdefault(task_id, {})
        if (present := volumes.get(mount.volume_id)) is not None:
            if present.mount.sub_path != mount.sub_path:
                raise InvalidArgument(
                    f"Volume {mount.volume_id} is mounted twice, with sub-paths {present.mount.sub_path!r} and "
                    f"{mount.sub_path!r}: mount it once in a container"
                )
            present.is_writable |= not mount.read_only
            return present.folder.source
        if sub_path:
            await self._authority.make_folder(mount.volume_id, sub_path)
        async with self._files.in_use():
            snapshot = await self._layers.acquire(mount.volume_id, self._authority)
            try:
                entry = snapshot.entries.get(sub_path)
                if sub_path and (entry is None or entry.kind != EntryKind.DIRECTORY):
                    raise FailedPrecondition(f"Volume {mount.volume_id} has no directory {sub_path!r} to mount")
                attachment = await asyncio.to_thread(self._attach, task_id, mount, snapshot, sub_path)
            except BaseException:
                await self._layers.release(snapshot)
                raise
        volumes[mount.volume_id] = attachment
        return attachment.folder.source

    def _attach(self, task_id: str, mount: VolumeMountSpec, snapshot: Snapshot, sub_path: str) -> Attachment:
        place = self._folders / task_id / mount.volume_id
        prefix = f"{sub_path}/" if sub_path else ""
        folder: VolumeFolder
        if self._overlays:
            folder = OverlayFolder(place, self._mounts / task_id / mount.volume_id, snapshot, sub_path, self._files)
        else:
            folder = PlainFolder(place, self._files)
        tree: VolumeTree | None = None
        try:
            tree = folder.make()
            ledger = Ledger()
            if not folder.is_overlay:
                entries = {entry.path[len(prefix) :]: entry for entry in snapshot.below(sub_path)}
                _apply(tree, ledger, entries)
            root = open_folder(folder.scanned)
        except BaseException as error:
            if tree is not None:
                tree.close()
            folder.leave()
            folder.delete()
            raise (disk_error(error) if isinstance(error, OSError) else error) from None
        return Attachment(
            mount, snapshot, folder, tree, root, prefix, snapshot.version, not mount.read_only, ledger=ledger
        )

    async def make_mount_point(self, task_id: str, volume_id: str, path: str) -> None:
        """Make sure that the container's folder of a volume has a folder at `path`, for another mount inside it.

        It is not committed. Raises FailedPrecondition when something else is there.
        """
        attachment = self._attached[task_id][volume_id]
        for made in await asyncio.to_thread(attachment.tree.make_mount_point, path):
            entry = VolumeEntry(made, EntryKind.DIRECTORY, FOLDER_MODE)
            attachment.ledger.record(made, entry, Seen(EntryKind.DIRECTORY, FOLDER_MODE))

    async def detach(self, task_id: str) -> None:
        """The container has ended: commit what it left uncommitted and take its folders away. Never raises."""
        for attachment in self._attached.pop(task_id, {}).values():
            try:
                async with attachment.lock:
                    await self._detach(task_id, attachment)
            except Exception:
                log.exception("detaching volume %s from %s failed", attachment.mount.volume_id, task_id)
        for folder in (self._folders, self._mounts):
            with contextlib.suppress(OSError):
                (folder / task_id).rmdir()

    async def _detach(self, task_id: str, attachment: Attachment) -> None:
        assert self._layers is not None
        attachment.tree.close()
        await asyncio.to_thread(attachment.folder.leave)
        try:
            if attachment.is_writable and attachment.mount.allow_background_commits:
                await self._last_commit(task_id, attachment)
        finally:
            attachment.close()
            await asyncio.to_thread(attachment.folder.delete)
            await self._layers.release(attachment.snapshot)

    async def _last_commit(self, task_id: str, attachment: Attachment) -> None:
        volume_id = attachment.mount.volume_id
        try:
            await self._take_and_send(attachment)
        except AeolianError as error:
            log.error("the last commit of %s to volume %s is lost: %s", task_id, volume_id, error.message)

    async def _take_and_send(self, attachment: Attachment) -> None:
        async with self._files.in_use():
            last = await asyncio.to_thread(self._draft, attachment, False, attachment.folder.scanned)
            for number in range(LAST_COMMIT_TRIES):
                try:
                    await self._send(attachment, last)
                    return
                except Unavailable:
                    if number + 1 == LAST_COMMIT_TRIES:
                        raise
                    await asyncio.sleep(LAST_COMMIT_PAUSE_S * 2**number)

    def forget(self, volume_ids: Iterable[str]) -> None:
        """Older versions of these volumes are not kept for the next container, within seconds."""
        self._forgotten.update(volume_ids)

    # ---- commit and reload ------------------------------------------------------------------------------

    async def commit(self, task_id: str, volume_id: str) -> None:
        """Commit what the container wrote; unless it has files open, it then sees what others committed, too.

        Raises NotFound, FailedPrecondition, OutOfSpace, Unavailable; then nothing was committed.
        """
        attachment = self._get(task_id, volume_id, "commit")
        async with attachment.lock, self._files.in_use():
            await self._commit(attachment)
            version, changed = await changes_since(self._authority, volume_id, attachment.version)
            if any(not self._is_known(attachment, entry) for entry in changed.values()):
                if await asyncio.to_thread(attachment.folder.open_file):
                    return
                await self._show(attachment, version, changed)

    async def reload(self, task_id: str, volume_id: str) -> None:
        """Commit, then let the container see what others committed.

        Raises FailedPrecondition while files of the volume are open (in words that the client knows), NotFound,
        OutOfSpace, Unavailable.
        """
        attachment = self._get(task_id, volume_id, "reload")
        async with attachment.lock, self._files.in_use():
            if open_file := await asyncio.to_thread(attachment.folder.open_file):
                # A gVisor sandbox has its container's root below a root of its own.
                inside = open_file.partition(f"{attachment.mount.path}/")[2] or open_file
                raise FailedPrecondition(
                    f"cannot reload Volume {volume_id}: there are open files preventing the operation: "
                    f"path {inside} is open"
                )
            await self._commit(attachment)
            version, changed = await changes_since(self._authority, volume_id, attachment.version)
            await self._show(attachment, version, changed)

    async def reload_all(self, task_id: str) -> None:
        """`reload` every volume of a container."""
        for volume_id in list(self._attached.get(task_id, {})):
            await self.reload(task_id, volume_id)

    def _get(self, task_id: str, volume_id: str, verb: str) -> Attachment:
        attachment = self._attached.get(task_id, {}).get(volume_id)
        if attachment is None:
            raise FailedPrecondition(
                f"Volume {volume_id} is not mounted here: {verb} it inside a container that mounts it"
            )
        return attachment

    async def _commit_in_background(self) -> None:
        assert self._layers is not None
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(BACKGROUND_COMMIT_S / 2)
            forgotten, self._forgotten = self._forgotten, set()
            await self._layers.forget(forgotten)
            for task_id, volumes in list(self._attached.items()):
                for attachment in list(volumes.values()):
                    started_at = loop.time()
                    if not attachment.mount.allow_background_commits or started_at < attachment.next_background_at:
                        continue
                    try:
                        async with attachment.lock, self._files.in_use():
                            if self._attached.get(task_id) is volumes:
                                await self._commit(attachment, in_background=True)
                    except (AeolianError, OSError) as error:
                        volume_id = attachment.mount.volume_id
                        log.warning("a background commit of %s to volume %s failed: %s", task_id, volume_id, error)
                    except Exception:
                        log.exception("a background commit of %s failed", task_id)
                    ended_at = loop.time()
                    pause = max(BACKGROUND_COMMIT_S, BACKGROUND_SHARE * (ended_at - started_at))
                    attachment.next_background_at = ended_at + pause

    async def _commit(self, attachment: Attachment, *, in_background: bool = False) -> None:
        if attachment.is_writable:
            new = await asyncio.to_thread(self._draft, attachment, in_background)
            await self._send(attachment, new)
            if new.misnamed and not in_background:
                raise FailedPrecondition(f"all but {new.misnamed[0]!r} is committed: its name or target is not UTF-8")

    def _draft(self, attachment: Attachment, waits_for_writers: bool, takes: Path | None = None) -> Draft:
        found = scan(attachment.root, attachment.base, attachment.prefix)
        for _ in range(MAX_SCANS - 1):
            if _loses_nothing(found, attachment.ledger):
                break
            # A path may be missing because it was renamed from where we had not looked to where we had.
            before, found = found, scan(attachment.root, attachment.base, attachment.prefix)
            if before.written.keys() == found.written.keys() and before.hidden == found.hidden:
                break
        for path in {*found.unusable, *found.misnamed} - attachment.warned:
            attachment.warned.add(path)
            log.warning("volume %s cannot hold %r: it is not committed", attachment.mount.volume_id, path)
        return draft(
            attachment.root,
            found,
            attachment.ledger,
            attachment.base_entry,
            lambda entry: attachment.snapshot.restore(entry, self._files),
            self._files,
            waits_for_writers=waits_for_writers,
            takes=takes,
        )

    async def _send(self, attachment: Attachment, new: Draft) -> None:
        if not new.is_empty:
            prefix = attachment.prefix
            changes = VolumeChanges(
                commit_id=new.commit_id,
                base_version=attachment.version,
                own_versions=tuple(attachment.own_versions),
                removals=tuple(Removal(prefix + removal.path) for removal in new.removals),
                puts=tuple(msgspec.structs.replace(entry, path=prefix + entry.path) for entry in new.puts),
            )
            committed = await self._authority.commit(attachment.mount.volume_id, changes)
            if committed.is_new:
                attachment.saw(committed.version)
        new.accept(attachment.ledger)

    def _is_known(self, attachment: Attachment, entry: VolumeEntry) -> bool:
        """Whether the folder shows this entry already, or does not show its path at all."""
        if not entry.path.startswith(attachment.prefix):
            return True
        return attachment.ledger.has(msgspec.structs.replace(entry, path=entry.path[len(attachment.prefix) :]))

    async def _show(self, attachment: Attachment, version: int, changed: dict[str, VolumeEntry]) -> None:
        """Bring the container's folder to `version`."""
        prefix = attachment.prefix
        entries = {
            path[len(prefix) :]: entry for path, entry in changed.items() if not self._is_known(attachment, entry)
        }
        await asyncio.to_thread(_apply, attachment.tree, attachment.ledger, entries)
        attachment.version = version
        attachment.own_versions.clear()


def _apply(tree: VolumeTree, ledger: Ledger, entries: dict[str, VolumeEntry]) -> None:
    """Put entries (by their path in the tree) into a container's folder, as known to the server."""
    here = {path: msgspec.structs.replace(entry, path=path) for path, entry in entries.items()}
    for path, seen in tree.apply(here.values()).items():
        ledger.record(path, here[path], seen)


def _loses_nothing(found: Scan, ledger: Ledger) -> bool:
    return ledger.known.keys() <= found.written.keys() | found.moved.keys() and found.hidden <= ledger.removed
