"""The images of this node: a description each, over shared layers.

::

    D/layers/<digest>/      a folder tree: what one instruction changed, as overlayfs keeps it
    D/layers/.made/<key>    the name of the layer that a step of that digest made ("" where it changed nothing)
    D/images/<im-…>.json    layers from the lowest to the topmost, environment, command, Python

A layer is made beside its place and renamed, so one that is there is whole, whoever was killed. (It is not synced: after
a power failure, images are best built again.) Steps are known by the digest of what
goes into them, so equal steps of different images share a layer.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Collection
from pathlib import Path

import msgspec

from aeolian.domain.errors import NotFound
from aeolian.worker.images.overlay_files import drop_mount_points, drop_view_folders, remove_tree

EMPTY_LAYER = "empty"
"""overlayfs cannot do without a lowest layer."""
OURS = "__modal"
MOUNTED_ON = ("/pkg", "/etc/resolv.conf", "/etc/hosts", "/proc", "/sys", "/dev", "/run", "/tmp")
"""What a container's upper folder may hold only because something was mounted there."""


class StoredImage(msgspec.Struct, frozen=True):
    """An image that containers can be started from."""

    image_id: str
    layers: tuple[str, ...] = ()
    """Names below the layers folder, the lowest first."""
    env: dict[str, str] = {}
    workdir: str = "/"
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    user: str = ""
    shell: tuple[str, ...] = ("/bin/sh", "-c")
    labels: dict[str, str] = {}
    ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""
    python: str = ""
    """Absolute path of the interpreter inside; "" = none."""
    python_version: str = ""
    over_host: bool = False
    """The layers lie over the host's own folders: there is no root to mount a base image."""
    host_python: str = ""
    """Over the host: the interpreter of the host's that `python` stands for."""
    host_path: tuple[str, ...] = ()
    """Over the host: where the layers hold Python packages, relative to each layer."""
    info: dict[str, str] = {}
    """What the server stores as the image's metadata."""


class ImageStore:
    def __init__(self, data_dir: Path):
        self.layers_folder = data_dir / "layers"
        self.images_folder = data_dir / "images"
        for folder in (self.layers_folder, self.images_folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._made_folder = self.layers_folder / ".made"
        self._made_folder.mkdir(exist_ok=True)
        (self.layers_folder / EMPTY_LAYER).mkdir(exist_ok=True)
        self._known: dict[str, StoredImage] = {}

    def get(self, image_id: str) -> StoredImage:
        """Raises NotFound."""
        if (known := self._known.get(image_id)) is not None:
            return known
        try:
            image = msgspec.json.decode(
                (self.images_folder / f"{_checked(image_id)}.json").read_bytes(), type=StoredImage
            )
        except (FileNotFoundError, msgspec.MsgspecError):
            raise NotFound(f"image {image_id} is not on this worker: build it again (`force_build=True`)") from None
        if not all((self.layers_folder / layer).is_dir() for layer in image.layers):
            raise NotFound(
                f"layers of image {image_id} are missing on this worker: build it again (`force_build=True`)"
            )
        self._known[image_id] = image
        return image

    def has(self, image_id: str) -> bool:
        try:
            self.get(image_id)
        except NotFound:
            return False
        return True

    def ids(self, *, over_host: bool = True) -> list[str]:
        """Images that are whole; with `over_host` false, only those with a root file system of their own."""
        found = []
        for path in sorted(self.images_folder.glob("im-*.json")):
            with contextlib.suppress(NotFound):
                if over_host or not self.get(path.stem).over_host:
                    found.append(self.get(path.stem).image_id)
        return found

    def put(self, image: StoredImage) -> None:
        """Whole, or not at all."""
        path = self.images_folder / f"{_checked(image.image_id)}.json"
        fresh = path.with_suffix(f".{os.getpid()}.new")
        fresh.write_bytes(msgspec.json.encode(image))
        fresh.replace(path)
        self._known[image.image_id] = image

    def delete(self, image_id: str) -> None:
        """Its description; layers stay for others."""
        self._known.pop(image_id, None)
        (self.images_folder / f"{_checked(image_id)}.json").unlink(missing_ok=True)

    def layer_paths(self, image: StoredImage) -> list[Path]:
        """The topmost first, as overlayfs wants them."""
        return [self.layers_folder / layer for layer in reversed(image.layers)]

    def has_layer(self, name: str) -> bool:
        return (self.layers_folder / name).is_dir()

    def made_by(self, key: str, *, max_age_s: float = 0) -> str | None:
        """The layer that the step of that digest made ("" = it changed nothing); None = it has to run (again)."""
        path = self._made_folder / key
        try:
            name, made_at = path.read_text(), path.stat().st_mtime
        except FileNotFoundError:
            return None
        if (max_age_s and time.time() - made_at > max_age_s) or not self.has_layer(name or EMPTY_LAYER):
            return None
        return name

    def remember(self, key: str, name: str) -> None:
        """The step of that digest made the layer of that name."""
        fresh = self._made_folder / f".{key}.{secrets.token_hex(4)}"
        fresh.write_text(name)
        fresh.replace(self._made_folder / key)

    def new_folder(self) -> Path:
        """A private folder on the layers' own disk, for what will be a layer."""
        folder = self.layers_folder / f".new-{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        return folder

    def discard(self, folder: Path) -> None:
        """A folder of `new_folder` is of no use any more."""
        remove_tree(folder)

    def commit_layer(self, name: str, tree: Path) -> None:
        """`tree` becomes the layer of that name, unless it is there already."""
        try:
            os.rename(tree, self.layers_folder / name)
        except OSError:
            if not self.has_layer(name):
                raise
            remove_tree(tree)

    async def commit_upper(self, image_id: str, base_image_id: str, upper: Path) -> None:
        """What a container wrote becomes an image over the one that it was started from (`Image.run_function`)."""
        base = self.get(base_image_id)
        name = await asyncio.to_thread(self._commit_upper, base, upper)
        self.put(msgspec.structs.replace(base, image_id=image_id, layers=(*base.layers, name)))

    def _commit_upper(self, base: StoredImage, upper: Path) -> str:
        remove_tree(upper / OURS)
        drop_mount_points(upper, MOUNTED_ON)
        if base.over_host:
            drop_view_folders(upper, self.layer_paths(base))
        name, folder = secrets.token_hex(8), self.new_folder()
        try:
            shutil.move(upper, folder / "tree")
            self.commit_layer(name, folder / "tree")
        finally:
            remove_tree(folder)
        return name

    def unused_layers(self, before: float, without: Collection[str] = ()) -> list[str]:
        """Layers of no image, `without` leaving those images out, that no step has made since then."""
        needed = {EMPTY_LAYER}
        for path in self.images_folder.glob("im-*.json"):
            if path.stem not in without:
                with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
                    needed.update(msgspec.json.decode(path.read_bytes(), type=StoredImage).layers)
        for path in self._made_folder.iterdir():
            if path.stat().st_mtime >= before:
                needed.add(path.read_text())
        layers = (path for path in self.layers_folder.iterdir() if not path.name.startswith("."))
        return sorted(path.name for path in layers if path.name not in needed)

    def delete_layers(self, names: Collection[str]) -> None:
        """With what is known of the steps that made them. Nobody may use them: no worker runs."""
        for path in list(self._made_folder.iterdir()):
            if path.read_text() in names:
                path.unlink()
        for name in names:
            remove_tree(self.layers_folder / name)

    def clear_leftovers(self) -> None:
        """What a killed builder left behind."""
        for folder in self.layers_folder.glob(".new-*"):
            remove_tree(folder)
        for path in (*self._made_folder.glob(".*"), *self.images_folder.glob("*.new")):
            path.unlink(missing_ok=True)


def _checked(image_id: str) -> str:
    if not image_id.startswith("im-") or not image_id[3:].isalnum():
        raise NotFound(f"there is no image {image_id!r}")
    return image_id
