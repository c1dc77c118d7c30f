"""The `native` runtime: containers isolated by Linux itself (namespaces, cgroups, seccomp), started by crun.

::

    D/runtime/native/    lock, log, crun's states, the place where a pid namespace is shown to crun
    D/containers/<id>/   what the hooks prepare (`Start.folder`), and here the OCI bundle
    /aeolian-<key>/<id>  the container's cgroup; the key is of the data directory, so workers don't mix

A keeper process (`keeper.py`) is the parent of all containers, and ends them when the worker has died.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from aeolian.domain.errors import Unavailable
from aeolian.worker.cgroups import Cgroups
from aeolian.worker.hooks.base import Hook, Start
from aeolian.worker.hooks.image import ImageHook
from aeolian.worker.hooks.limits import LimitsHook
from aeolian.worker.hooks.names import NamesHook
from aeolian.worker.hooks.sdk import SdkHook
from aeolian.worker.images.overlay_files import drop_mount_points
from aeolian.worker.images.store import ImageStore
from aeolian.worker.runtimes.base import runtime_folder
from aeolian.worker.runtimes.kept_container import Keeper, KeptContainer
from aeolian.worker.runtimes.oci_spec import CAPABILITIES, oci_spec
from aeolian.worker.runtimes.seccomp import seccomp_profile
from aeolian.worker.runtimes.wiring import wired
from aeolian.worker.sdk import SdkStore

CONTAINERS = "containers"
"""Below the data directory: where the worker keeps its containers' folders."""
CRUN = "crun"


class NativeRuntime:
    """`layers`: hooks before the image's (Mounts); `hooks`: those after the SDK's (Volumes and the like)."""

    name = "native"

    def __init__(
        self,
        data_dir: Path,
        images: ImageStore,
        sdk: SdkStore,
        *,
        layers: Sequence[Hook] = (),
        hooks: Sequence[Hook] = (),
    ):
        data_dir = data_dir.resolve()
        self._containers = data_dir / CONTAINERS
        self._folder = runtime_folder(data_dir, self.name)
        self._state = self._folder / "crun"
        self._pid_namespace = self._folder / "pid_namespace"
        self._cgroups = Cgroups()
        self._parent_cgroup = f"/aeolian-{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]}"
        self._limits_swap = self._cgroups.can_limit_swap()
        self._crun_path = shutil.which(CRUN) or CRUN
        self._seccomp = seccomp_profile(CAPABILITIES)
        self._compiled_seccomp = ""
        limits = LimitsHook(self._cgroups, self.cgroup_of)
        self._hooks = [*layers, ImageHook(images), SdkHook(sdk), *hooks, NamesHook(), limits]
        self._keeper: asyncio.Task[Keeper] | None = None
        self._is_cleared = False
        """What a predecessor left is gone."""

    async def open(self) -> None:
        """End what a killed predecessor left: its containers, their cgroups and mounts."""
        self._pid_namespace.touch()
        await self._get_keeper()

    async def close(self) -> None:
        if self._keeper is not None:
            keeper, self._keeper = self._keeper, None
            with contextlib.suppress(Unavailable):
                await (await keeper).close()

    def cgroup_of(self, container_id: str) -> str:
        return f"{self._parent_cgroup}/{container_id}"

    def hooks(self) -> list[Hook]:
        return list(self._hooks)

    async def prepare(self, image_id: str, sdk_version: str, builder_version: str) -> None:
        """Nothing: containers start from their image."""

    async def start(self, start: Start) -> KeptContainer:
        spec = start.spec
        rootfs, upper = start.rootfs, start.upper
        assert rootfs is not None and upper is not None and start.cgroup, "the hooks come first"
        env, binds = wired(start)
        argv = [start.python if spec.argv[0] == "python" and start.python else spec.argv[0], *spec.argv[1:]]
        config = oci_spec(
            rootfs=rootfs,
            argv=argv,
            env=env,
            cwd=os.path.join("/", start.cwd),
            binds=binds,
            hostname=spec.task_id,
            cgroup=start.cgroup,
            resources=spec.resources,
            seccomp=self._seccomp,
            compiled_seccomp=self._compiled_seccomp,
            pid_namespace=self._pid_namespace,
            network_namespace=start.network_namespace,
            block_network=spec.block_network,
            limits_swap=self._limits_swap,
        )
        bundle = start.folder / "bundle"
        await asyncio.to_thread(_write_bundle, bundle, config, rootfs, start.cwd)
        state = self._state / spec.task_id
        message = {
            "argv": self._crun(bundle, spec.task_id),
            "log": str(bundle / "log"),
            "pid_file": str(bundle / "pid_file"),
            "go": str(state / "exec.fifo"),
        }

        def clean() -> None:
            shutil.rmtree(state, ignore_errors=True)
            if spec.save_image_as:
                drop_mount_points(upper, [mount["destination"] for mount in config["mounts"]])

        def num_oom_kills() -> int:
            return self._cgroups.num_oom_kills(start.cgroup)

        container = await KeptContainer.start(spec.task_id, await self._get_keeper(), message, num_oom_kills, clean)
        if not self._compiled_seccomp:
            self._compiled_seccomp = await asyncio.to_thread(_compiled_seccomp, state)
        return container

    def _crun(self, bundle: Path, container_id: str) -> list[str]:
        """The state is removed by us: `crun delete` would do no more, and takes its time."""
        return [
            self._crun_path, "--root", str(self._state), "--cgroup-manager", "cgroupfs", "--log", str(bundle / "log"),
            "create", "--bundle", str(bundle), "--pid-file", str(bundle / "pid_file"), container_id,
        ]  # fmt: skip

    async def _get_keeper(self) -> Keeper:
        """The keeper, a new one if it has died; whoever asks meanwhile waits."""
        task = self._keeper
        if task is None or (task.done() and (task.cancelled() or task.exception() or not task.result().is_alive)):
            task = self._keeper = asyncio.create_task(self._start_keeper())
        return await asyncio.shield(task)

    async def _start_keeper(self) -> Keeper:
        config = {
            "lock": str(self._folder / "lock"),
            "state": str(self._state),
            "containers": str(self._containers),
            "cgroup": self._parent_cgroup,
            "pid_namespace": str(self._pid_namespace),
            "is_first": not self._is_cleared,
        }
        keeper = await Keeper.start(config, self._folder / "log")
        self._is_cleared = True
        return keeper


def _write_bundle(bundle: Path, config: dict, rootfs: Path, cwd: str) -> None:
    bundle.mkdir(mode=0o700)  # secrets are in it
    (bundle / "config.json").write_text(json.dumps(config))
    make_folder_inside(rootfs, cwd)


def _compiled_seccomp(state: Path) -> str:
    """The filter that crun has made of the profile for its first container: the next ones need not wait 15 ms for it.

    "" where crun leaves none (newer ones keep it themselves).
    """
    with contextlib.suppress(OSError):
        return base64.b64encode((state / "seccomp.bpf").read_bytes()).decode()
    return ""


def make_folder_inside(rootfs: Path, path: str) -> None:
    """Make a folder of a root file system without following its links: they may lead to the host's own files."""
    descriptor = os.open(rootfs, os.O_PATH | os.O_DIRECTORY)
    try:
        for part in PurePosixPath("/", path).parts[1:]:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=descriptor)
            try:
                below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            except NotADirectoryError:  # a link: where it leads is there, or crun says that it is not
                return
            os.close(descriptor)
            descriptor = below
    finally:
        os.close(descriptor)
