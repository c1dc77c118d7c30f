"""Where the steps of a build are done: in views made of the image's layers (`step.py`)."""

import asyncio
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from aeolian.storage.files import ContentStore
from aeolian.worker.images.context import ContextEntry
from aeolian.worker.images.host_settings import CACHE, FOLDER, BuildSettings, build_settings
from aeolian.worker.images.layers import digest_of
from aeolian.worker.images.overlay_files import drop_mount_points, drop_view_folders, remove_tree
from aeolian.worker.images.run_mounts import RunMount
from aeolian.worker.images.steps import OnLog, StepRunner
from aeolian.worker.images.store import OURS, ImageStore, StoredImage
from aeolian.worker.runtimes.view import API_FOLDERS, PRIVATE

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CONTENT, OWN, TREE = f"{FOLDER}/content", f"{FOLDER}/own", f"{FOLDER}/tree"
OVER_HOST = {"UV_LINK_MODE": "copy"}
"""Each top-level folder is a mount of its own, between which there are no hard links."""
STUB_RESOLVER = "/run/systemd/resolve/stub-resolv.conf"
"""Where some images' /etc/resolv.conf leads."""
MADE_BY_VIEWS = (STUB_RESOLVER, *(f"/{name}" for name in (*API_FOLDERS, "run", "tmp", "root")))


Overlay = tuple[list[str], str]
"""(layers, the topmost first; where they are mounted as one tree)"""


class RunJob(NamedTuple):
    argv: tuple[str, ...]
    env: dict[str, str]
    mounts: tuple[RunMount, ...] = ()


class CopyJob(NamedTuple):
    """COPY or ADD, from the context (`files`) or from another image (`layers`)."""

    sources: tuple[str, ...]
    target: str
    into_folder: bool = False
    chown: str = ""
    chmod: str = ""
    exclude: tuple[str, ...] = ()
    unpacks: bool = False
    files: tuple[ContextEntry, ...] = ()
    layers: tuple[str, ...] = ()


class Workshop(Protocol):
    """`folder`: private to the step. Both return the tree that becomes the layer, or None when nothing changed.

    `own`: contents by SHA-256 that the content store does not have. Raise StepFailed and InvalidArgument.
    """

    async def run(
        self, folder: Path, image: StoredImage, job: RunJob, own: Mapping[str, bytes | Path], on_log: OnLog
    ) -> Path | None: ...

    async def copy(
        self, folder: Path, image: StoredImage, job: CopyJob, own: Mapping[str, bytes | Path], on_log: OnLog
    ) -> Path | None: ...

    async def inspect(self, folder: Path, image: StoredImage) -> str:
        """What the image's Python says of itself (`inspecting.py`); "" = it has none."""
        ...


class ViewWorkshop:
    """`caches`: folder of what `RUN --mount=type=cache` keeps."""

    def __init__(self, store: ImageStore, content: ContentStore, steps: StepRunner, data_dir: Path, caches: Path):
        self._store = store
        self._content = content
        self._steps = steps
        self._data_dir = data_dir
        self._caches = caches

    async def run(
        self, folder: Path, image: StoredImage, job: RunJob, own: Mapping[str, bytes | Path], on_log: OnLog
    ) -> Path | None:
        settings = await asyncio.to_thread(build_settings)
        view = self._view(folder, image)
        mounts = await asyncio.to_thread(self._mounted, folder, job.mounts, own)
        view["binds"] += [*self._shown(settings, image), *mounts.binds]
        await self._steps.run(
            {
                "action": "run",
                "view": view,
                "overlays": mounts.overlays,
                "nested_binds": mounts.nested,
                "argv": job.argv,
                "env": {"PATH": PATH, **settings.env, **(OVER_HOST if image.over_host else {}), **job.env},
                "cwd": image.workdir or "/",
                "user": image.user,
                "files": settings.files,
                "scratch": [CACHE],
            },
            "the command",
            on_log,
        )
        return await asyncio.to_thread(self._finished, view, [mount.target for mount in job.mounts])

    async def copy(
        self, folder: Path, image: StoredImage, job: CopyJob, own: Mapping[str, bytes | Path], on_log: OnLog
    ) -> Path | None:
        view = self._view(folder, image)
        overlays: list[Overlay] = []
        copied: dict[str, Any] = {
            "sources": job.sources, "target": job.target, "into_folder": job.into_folder,
            "chown": job.chown, "chmod": job.chmod, "exclude": job.exclude, "unpacks": job.unpacks,
        }  # fmt: skip
        if job.layers:
            view["binds"] = [[self._tree_of(job.layers, folder / "source", overlays), TREE, True]]
            copied["tree"] = TREE
        else:
            await asyncio.to_thread(write_own, folder / "own", job.files, own)
            view["binds"] = [[str(self._content.root), CONTENT, True], [str(folder / "own"), OWN, True]]
            copied["files"] = [
                (path, f"{OWN}/{digest}" if digest in own else self._content_place(digest), mode)
                for path, digest, mode in job.files
            ]
        await self._steps.run({"action": "copy", "view": view, "overlays": overlays, "copy": copied}, "it", on_log)
        return await asyncio.to_thread(self._finished, view)

    async def inspect(self, folder: Path, image: StoredImage) -> str:
        view = self._view(folder, image)
        env = {"PATH": PATH, **image.env}
        job = {"action": "inspect", "view": view, "env": env}
        return (await self._steps.run(job, "looking for Python", lambda *_: None, captures=True)).decode()

    def _view(self, folder: Path, image: StoredImage) -> dict[str, Any]:
        return {
            "root": str(folder / "root"),
            "work": str(folder / "work"),
            "upper": "" if image.over_host else str(folder / "upper"),
            "layers": list(reversed(image.layers)),
            "layers_folder": str(self._store.layers_folder),
            "data": str(self._data_dir),
            "user_namespace": not self._steps.mode.is_whole,
            "binds": _interpreter_binds(image),
            "volatile": True,
        }

    def _content_place(self, digest: str) -> str:
        return f"{CONTENT}/{self._content.path(digest).relative_to(self._content.root)}"

    def _shown(self, settings: BuildSettings, image: StoredImage) -> list[tuple[str, str, bool]]:
        """Over the host's folders, most of its settings are seen anyway."""
        return [bind for bind in settings.binds if not image.over_host or bind[1].startswith(FOLDER)]

    def _tree_of(self, layers: tuple[str, ...], place: Path, overlays: list[Overlay]) -> str:
        """Where another image's files are seen on the host while the step runs."""
        if len(layers) == 1:  # overlayfs takes no fewer than two
            return str(self._store.layers_folder / layers[0])
        overlays.append((list(reversed(layers)), str(place)))
        return str(place)

    def _mounted(self, folder: Path, mounts: tuple[RunMount, ...], own: Mapping[str, bytes | Path]) -> "_Mounted":
        binds: list[tuple[str, str, bool]] = []
        nested: list[tuple[str, str, str, bool]] = []
        overlays: list[Overlay] = []
        for number, mount in enumerate(mounts):
            place = folder / f"mount-{number}"
            if mount.kind == "cache":
                source = self._caches / digest_of(mount.cache_id or mount.target)[:24]
                os.makedirs(source, exist_ok=True)
                binds.append((str(source), mount.target, False))
            elif mount.kind == "secret":
                place.touch(mode=0o600)
                place.write_text(mount.secret)
                binds.append((str(place), mount.target, True))
            elif mount.kind == "tmpfs":
                place.mkdir()
                binds.append((str(place), mount.target, False))
            else:
                tree = self._tree_of(mount.layers, place, overlays) if mount.layers else str(place)
                if not mount.layers:
                    place.mkdir()
                    self._lay_out(place, mount.files, own)
                nested.append((tree, mount.source, mount.target, not mount.is_writable or bool(mount.layers)))
        return _Mounted(binds, nested, overlays)

    def _lay_out(self, place: Path, files: tuple[ContextEntry, ...], own: Mapping[str, bytes | Path]) -> None:
        """A part of the context as a folder."""
        for path, digest, mode in files:
            target = place / path
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, own.get(digest, self._content.path(digest)))
            target.chmod(mode)

    def _finished(self, view: dict[str, Any], targets: list[str] | None = None) -> Path:
        """What the step changed, without what we put there. `targets`: places that were made only to mount on."""
        tree = Path(view["upper"] or view["root"])
        remove_tree(tree / OURS)
        drop_mount_points(tree, [*(target for _, target, _ in view["binds"]), *(targets or ()), *MADE_BY_VIEWS])
        if not view["upper"]:
            drop_view_folders(tree, [self._store.layers_folder / layer for layer in view["layers"]])
        return tree


def _interpreter_binds(image: StoredImage) -> list[tuple[str, str, bool]]:
    """The host's interpreter, where it lives in a folder of which views show nothing (below /root)."""
    prefix = Path(image.host_python).parent.parent
    return [(str(prefix), str(prefix), True)] if prefix.parts[1:2] and prefix.parts[1] in PRIVATE else []


class _Mounted(NamedTuple):
    binds: list[tuple[str, str, bool]]
    nested: list[tuple[str, str, str, bool]]
    """(tree, path in it, target, read-only): the path is looked up once the tree is there, links followed inside."""
    overlays: list[Overlay]


def write_own(folder: Path, files: tuple[ContextEntry, ...], own: Mapping[str, bytes | Path]) -> None:
    folder.mkdir(exist_ok=True)
    for entry in files:
        if (content := own.get(entry.sha256_hex)) is not None:
            _write(folder / entry.sha256_hex, content)


def _write(target: Path, content: bytes | Path) -> None:
    if isinstance(content, bytes):
        target.write_bytes(content)
    else:
        shutil.copyfile(content, target)
