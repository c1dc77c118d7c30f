"""The start hook of Mounts: their files become layers that lie over the image's own.

Each Mount is made once into a tree of hard links to the content store and shared by all containers that have it.
As a lower layer of the container's overlay it is never written to; what containers change goes into their own upper
folder. The hook comes before the image's, which mounts them all.
"""

import asyncio
import contextlib
import os
import shutil
from pathlib import Path

from aeolian.domain.containers import MountFile, MountSpec
from aeolian.domain.errors import NotFound, OutOfSpace
from aeolian.storage.files import ContentStore
from aeolian.worker.hooks.base import Start

LINKED_MODE = 0o644
"""Content with this mode is linked; a file with another one is a copy."""


class MountTrees:
    """`D/mounts/<mo-…>`: the files of a Mount as they lie in a container."""

    def __init__(self, data_dir: Path, content: ContentStore):
        self._folder = data_dir / "mounts"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._content = content
        self._making: dict[str, asyncio.Task[Path]] = {}

    async def of(self, mount: MountSpec) -> Path:
        """Raises NotFound for content that is gone, OutOfSpace."""
        tree = self._folder / mount.mount_id
        if tree.is_dir():
            return tree
        task = self._making.get(mount.mount_id)
        if task is None:
            task = self._making[mount.mount_id] = asyncio.create_task(asyncio.to_thread(self._make, mount, tree))
            task.add_done_callback(lambda _: self._making.pop(mount.mount_id, None))
        return await asyncio.shield(task)

    def _make(self, mount: MountSpec, tree: Path) -> Path:
        fresh = tree.with_name(f".{mount.mount_id}.{os.getpid()}")
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir(mode=0o755)
            made: set[Path] = set()
            for file in mount.files:
                place = fresh / file.path.lstrip("/")
                if place.parent not in made:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    made.add(place.parent)
                self._put(file, place)
            os.rename(fresh, tree)
        except OSError as error:
            if tree.is_dir():  # another worker of this machine was quicker
                return tree
            if error.errno == 28:
                raise OutOfSpace("the worker's disk is full: free space in its data directory") from error
            raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return tree

    def _put(self, file: MountFile, place: Path) -> None:
        source = self._content.path(file.sha256_hex)
        try:
            if file.mode == LINKED_MODE:
                with contextlib.suppress(OSError):  # another disk, or too many links
                    os.link(source, place)
                    return
            shutil.copyfile(source, place)
            place.chmod(file.mode)
        except FileNotFoundError:
            raise NotFound(
                f"the content of {file.path} (SHA-256 {file.sha256_hex}) is gone: run or deploy the App again"
            ) from None


class MountsHook:
    name = "mounts"

    def __init__(self, trees: MountTrees):
        self._trees = trees

    async def apply(self, start: Start) -> None:
        mounts = [mount for mount in start.spec.mounts if mount.files]
        trees = await asyncio.gather(*(self._trees.of(mount) for mount in mounts))
        start.layers = list(reversed(trees))  # a later Mount wins

    async def undo(self, start: Start) -> None:
        return None
