"""The start hook of images: mounts the root file system, and takes over what the image says about its containers."""

import asyncio

from aeolian.domain.errors import FailedPrecondition
from aeolian.worker import mounting
from aeolian.worker.hooks.base import Start
from aeolian.worker.images.overlay_files import remove_tree
from aeolian.worker.images.store import ImageStore, StoredImage

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def take_over(start: Start, image: StoredImage) -> None:
    """Environment, working directory and interpreter: the image's own, under what the container brings."""
    start.env = {"PATH": DEFAULT_PATH, "HOME": "/root", **image.env, **start.env}
    start.python = image.python
    if image.workdir not in ("", "/"):
        start.cwd = image.workdir


class ImageHook:
    """`mounts`: False where the runtime mounts the layers itself (the fork server's children do)."""

    name = "image"

    def __init__(self, store: ImageStore, *, mounts: bool = True):
        self._store = store
        self._mounts = mounts

    async def apply(self, start: Start) -> None:
        image = self._store.get(start.spec.image_id)
        take_over(start, image)
        start.upper = start.folder / "upper"
        start.upper.mkdir()
        if not self._mounts:
            return
        if image.over_host:
            raise FailedPrecondition(f"image {image.image_id} was made for the process runtime: build it again")
        start.rootfs = start.folder / "rootfs"
        work = start.folder / "work"
        for folder in (start.rootfs, work):
            folder.mkdir()
        layers = [*start.layers, *self._store.layer_paths(image)]
        await asyncio.to_thread(mounting.mount_overlay, layers, start.upper, work, start.rootfs)

    async def undo(self, start: Start) -> None:
        if start.rootfs is not None:
            await asyncio.to_thread(mounting.unmount, start.rootfs, detach=True)
        await asyncio.to_thread(remove_tree, start.folder / "work")
