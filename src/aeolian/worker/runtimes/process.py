"""The `process` runtime: containers are processes forked from one that has the SDK imported. No isolation.

Where the host allows mount namespaces (root, or user namespaces), each container has a view of its own: the
image's own root file system or its layers over the host's folders, binds at any path (`view.py`). Elsewhere the
container sees the host as it is, and only what lies below /root can be shown to it (`portable.py`).
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aeolian.domain.errors import AeolianError, FailedPrecondition
from aeolian.worker.hooks.base import Bind, FunctionHook, Hook, Start
from aeolian.worker.hooks.image import DEFAULT_PATH, ImageHook
from aeolian.worker.hooks.names import NamesHook
from aeolian.worker.hooks.sdk import SITE_TARGET, SdkHook, brings_own_sdk
from aeolian.worker.images.overlay_files import remove_tree
from aeolian.worker.images.store import ImageStore, StoredImage
from aeolian.worker.runtimes.base import runtime_folder
from aeolian.worker.runtimes.fork_server import ForkedContainer, Zygote, ZygoteConfig
from aeolian.worker.runtimes.portable import make_portable, site_packages_of
from aeolian.worker.runtimes.view import PRIVATE
from aeolian.worker.runtimes.wiring import wired
from aeolian.worker.sdk import DEPENDENCIES_TARGET, LAST_WITH_DEPENDENCIES, PACKAGES_TARGET, SdkStore, host_libc

log = logging.getLogger(__name__)

ENTRYPOINT_ARGV = ("python", "-m", "modal._container_entrypoint")
MAX_ZYGOTES = 8
OF_ZYGOTE = frozenset([PACKAGES_TARGET, DEPENDENCIES_TARGET, SITE_TARGET])
READ_AT_START = frozenset(
    [
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "MALLOC_ARENA_MAX",
        "PYTHONASYNCIODEBUG",
        "PYTHONDEVMODE",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONHASHSEED",
        "PYTHONHOME",
        "PYTHONIOENCODING",
        "PYTHONMALLOC",
        "PYTHONNOUSERSITE",
        "PYTHONOPTIMIZE",
        "PYTHONSTARTUP",
        "PYTHONTRACEMALLOC",
        "PYTHONUTF8",
        "PYTHONVERBOSE",
        "PYTHONWARNINGS",
        "GLIBC_TUNABLES",
    ]
)
"""Variables that an interpreter reads once, when it starts: with one of them set, a container is not forked."""


class Capabilities(NamedTuple):
    """What this host offers for views."""

    has_views: bool
    user_namespace: bool = False
    own_pids: bool = False
    problem: str = ""


class ProcessRuntime:
    """`layers`: hooks before the image's (Mounts); `hooks`: those after the SDK's (Volumes and the like)."""

    name = "process"

    def __init__(
        self,
        data_dir: Path,
        images: ImageStore,
        sdk: SdkStore,
        *,
        layers: Sequence[Hook] = (),
        hooks: Sequence[Hook] = (),
    ):
        self._data_dir = data_dir
        self._folder = runtime_folder(data_dir, "process")
        self._images = images
        self._sdk = sdk
        self._names = NamesHook()
        self._hooks = [
            *layers,
            ImageHook(images, mounts=False),
            SdkHook(sdk, self._python_of),
            *hooks,
            FunctionHook(NamesHook.name, self._show_names),
        ]
        self.capabilities = Capabilities(False)
        self._zygotes: OrderedDict[tuple, asyncio.Task[Zygote]] = OrderedDict()
        self._watchers: set[asyncio.Task] = set()
        self._num_zygotes = 0
        self._closing = False

    async def open(self) -> None:
        await asyncio.to_thread(remove_tree, self._folder / "zygotes")
        (self._folder / "zygotes").mkdir()
        self.capabilities = await find_capabilities(self._folder)
        log.warning(
            "THE PROCESS RUNTIME DOES NOT ISOLATE: containers run as this user (uid %d), use this host's devices, "
            "network and memory, and have no limits. Run only code that you would run yourself. (%s)",
            os.getuid(),
            "private mount namespaces" if self.capabilities.has_views else f"no views: {self.capabilities.problem}",
        )

    async def close(self) -> None:
        self._closing = True
        tasks = list(self._zygotes.values())
        self._zygotes.clear()
        for task in tasks:
            with contextlib.suppress(AeolianError, asyncio.CancelledError):
                await (await task).close()
        for watcher in list(self._watchers):
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.to_thread(remove_tree, self._folder / "zygotes")

    def hooks(self) -> list[Hook]:
        return list(self._hooks)

    async def prepare(self, image_id: str, sdk_version: str, builder_version: str) -> None:
        """Have a fork server ready for containers of this image."""
        if not sdk_version:
            return
        try:
            image = self._images.get(image_id)
            series, libc = self._series_of(image)
            binds = [Bind(await self._sdk.packages(sdk_version, series), PACKAGES_TARGET)]
            if builder_version > LAST_WITH_DEPENDENCIES:
                folder = await self._sdk.dependencies(sdk_version, builder_version, series, libc)
                binds.append(Bind(folder, DEPENDENCIES_TARGET))
            await self._zygote(image, binds, preload=True)
        except AeolianError as error:
            log.warning("no fork server for %s with SDK %s yet: %s", image_id, sdk_version, error)

    async def start(self, start: Start) -> ForkedContainer:
        image = self._images.get(start.spec.image_id)
        forks = (
            tuple(start.spec.argv) == ENTRYPOINT_ARGV
            and bool(start.spec.sdk_version)
            and not brings_own_sdk(start.spec.mounts)
            and READ_AT_START.isdisjoint(start.env)
        )
        zygote = await self._zygote(image, start.binds if forks else [], preload=forks)
        env, binds = wired(start)
        argv = [start.python if start.spec.argv[0] == "python" else start.spec.argv[0], *start.spec.argv[1:]]
        request = {"argv": argv, "env": env, "cwd": start.cwd, "fork": forks and zygote.is_preloaded, "view": None}
        request["network"] = str(start.network_namespace or "")
        if not self.capabilities.has_views:
            await asyncio.to_thread(make_portable, start, self._images.layer_paths(image), request, binds)
            return await ForkedContainer.start(zygote, request)
        if image.over_host:
            start.upper = start.folder / "root"  # what is written anywhere is one tree
        layers = [*start.layers, *self._images.layer_paths(image)]
        binds = [*self._interpreter_binds(image), *binds]
        request["view"] = self._view(start.folder, image, layers, binds)
        return await ForkedContainer.start(zygote, request, start.folder / "work")

    async def _show_names(self, start: Start) -> None:
        """What lies over the host's folders has the host's names and certificates anyhow."""
        if not self._images.get(start.spec.image_id).over_host:
            await self._names.apply(start)

    def _python_of(self, start: Start) -> tuple[str, str]:
        return self._series_of(self._images.get(start.spec.image_id))

    def _series_of(self, image: StoredImage) -> tuple[str, str]:
        """(series, libc) of the image's Python. Raises FailedPrecondition when it has none."""
        if not image.python:
            raise FailedPrecondition(
                f"image {image.image_id} has no Python: add one by `add_python`, or use an image that has it"
            )
        series = ".".join(image.python_version.split(".")[:2])
        has_musl = any(next(layer.glob("lib/ld-musl-*"), None) for layer in self._images.layer_paths(image))
        return series, "musllinux" if has_musl else host_libc()

    def _view(self, folder: Path, image: StoredImage | None, layers: Sequence[Path], binds: Sequence[Bind]) -> dict:
        """What `view.enter` takes. An image of its own hides the host's folders; else its layers lie over them."""
        is_whole = image is not None and not image.over_host
        return {
            "root": str(folder / ("rootfs" if is_whole else "root")),
            "upper": str(folder / "upper") if is_whole else "",
            "work": str(folder / "work"),
            # Relative names keep the list of many layers within what one mount call takes.
            "layers": [os.path.relpath(layer, self._images.layers_folder) for layer in layers],
            "layers_folder": str(self._images.layers_folder),
            "data": str(self._data_dir),
            "user_namespace": self.capabilities.user_namespace,
            "binds": [[str(bind.source), bind.target, bind.read_only] for bind in binds],
        }

    def _interpreter_binds(self, image: StoredImage | None) -> list[Bind]:
        """Interpreters of the host that live in folders of which containers see nothing (below /root)."""
        if image is not None and not image.host_python:
            return []
        prefixes = [Path(image.host_python).parent.parent] if image else [Path(sys.base_prefix), Path(sys.prefix)]
        return [Bind(prefix, str(prefix)) for prefix in dict.fromkeys(prefixes) if prefix.parts[1] in PRIVATE]

    async def _zygote(self, image: StoredImage, binds: Sequence[Bind], *, preload: bool) -> Zygote:
        """The fork server for this image and SDK, started if there is none (whoever asks meanwhile waits)."""
        seen = tuple(sorted((bind.target, str(bind.source)) for bind in binds if bind.target in OF_ZYGOTE))
        key = ("sdk", image.layers, image.python, image.over_host, seen) if preload else ("bare",)
        task = self._zygotes.get(key)
        if task is not None and task.done() and (task.cancelled() or task.exception() or not task.result().is_alive):
            del self._zygotes[key]
            task = None
        if task is None:
            task = asyncio.create_task(self._start_zygote(key, image if preload else None, binds))
            self._zygotes[key] = task
            await self._evict()
        self._zygotes.move_to_end(key)
        return await asyncio.shield(task)

    async def _start_zygote(self, key: tuple, image: StoredImage | None, binds: Sequence[Bind]) -> Zygote:
        self._num_zygotes += 1
        folder = self._folder / "zygotes" / str(self._num_zygotes)
        folder.mkdir()
        binds = [*self._interpreter_binds(image), *(bind for bind in binds if bind.target in OF_ZYGOTE)]
        has_views = self.capabilities.has_views
        layers = self._images.layer_paths(image) if image else []
        config = ZygoteConfig(
            python=image.python if image else sys.executable,
            env=_zygote_env(image, layers, binds, has_views),
            view=self._view(folder, image, layers, binds) if has_views else None,
            preload=image is not None,
            own_pids=self.capabilities.own_pids,
        )
        zygote = await Zygote.start(config, folder / "log")
        if image is not None and not zygote.is_preloaded:
            log.warning("containers of %s start without a fork server: %s", image.image_id, zygote.why_not_preloaded)
        watcher = asyncio.create_task(self._watch(key, zygote))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return zygote

    async def _watch(self, key: tuple, zygote: Zygote) -> None:
        """Forget a fork server that has ended: the next container starts a new one."""
        exit_code = await zygote.wait()
        task = self._zygotes.get(key)
        if task is not None and task.done() and not task.cancelled() and task.result() is zygote:
            del self._zygotes[key]
            if not self._closing:
                log.warning("a fork server ended with %d; the next container starts a new one", exit_code)

    async def _evict(self) -> None:
        """Keep the most recently used fork servers; containers of the others live on."""
        for key in list(self._zygotes):
            if len(self._zygotes) <= MAX_ZYGOTES:
                return
            task = self._zygotes[key]
            if task.done():
                del self._zygotes[key]
                if not task.cancelled() and task.exception() is None:
                    await task.result().close()


async def find_capabilities(folder: Path) -> Capabilities:
    """Try views on this host, in processes of their own."""
    if sys.platform != "linux":
        return Capabilities(False, problem=f"{sys.platform} has no mount namespaces")
    script = Path(__file__).with_name("view.py")
    problem = ""
    for mode in ("root+pids", "root", "user") if os.getuid() == 0 else ("user",):
        place = folder / f"probe-{mode}"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(script), str(place), mode,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        stdout, stderr = await process.communicate()
        await asyncio.to_thread(remove_tree, place)
        problem = json.loads(stdout) if stdout else stderr.decode("utf-8", "replace")[-300:]
        if not problem:
            return Capabilities(True, user_namespace=mode == "user", own_pids="pids" in mode)
    return Capabilities(False, problem=problem)


def _zygote_env(
    image: StoredImage | None, layers: Sequence[Path], binds: Sequence[Bind], has_views: bool
) -> dict[str, str]:
    if image is None:
        return {"PATH": os.environ.get("PATH", os.defpath)}
    env = {"PATH": DEFAULT_PATH, **image.env, "MODAL_IS_REMOTE": "1", "PYTHONUNBUFFERED": "1"}
    sources = {
        bind.target: bind.target if has_views else str(bind.source) for bind in binds if bind.target in OF_ZYGOTE
    }
    paths = [sources.get(PACKAGES_TARGET), "/root" if has_views else None, sources.get(SITE_TARGET)]
    if not has_views:
        paths += [*map(str, site_packages_of(layers)), sources.get(DEPENDENCIES_TARGET)]
    env["PYTHONPATH"] = ":".join(path for path in paths if path)
    return env
