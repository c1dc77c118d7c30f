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
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from aeolian.domain.containers import ContainerSpec, Resources
from aeolian.domain.errors import AeolianError
from aeolian.worker.cgroups import Cgroups
from aeolian.worker.hooks.base import Bind, Hook, Start
from aeolian.worker.hooks.image import ImageHook
from aeolian.worker.hooks.limits import LimitsHook
from aeolian.worker.hooks.names import NamesHook
from aeolian.worker.hooks.sdk import SdkHook
from aeolian.worker.images.overlay_files import drop_mount_points
from aeolian.worker.images.store import ImageStore
from aeolian.worker.runtimes.base import runtime_folder
from aeolian.worker.runtimes.entering import Entry
from aeolian.worker.runtimes.kept_container import KeptContainer, LivingKeeper
from aeolian.worker.runtimes.oci_spec import CAPABILITIES, HOSTNAME_MAX, OOM_SCORE_ADJ, limits, oci_spec
from aeolian.worker.runtimes.seccomp import seccomp_profile
from aeolian.worker.runtimes.standby import Standby
from aeolian.worker.runtimes.standby_fit import ENTRYPOINT_ARGV
from aeolian.worker.runtimes.standbys import MAX_STANDBYS, Standbys
from aeolian.worker.runtimes.standbys import OOM_SCORE_ADJ as OOM_SCORE_ADJ_OF_STANDBYS
from aeolian.worker.runtimes.wiring import wired
from aeolian.worker.sdk import LAST_WITH_DEPENDENCIES, SdkStore

log = logging.getLogger(__name__)

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
        max_standbys: int = MAX_STANDBYS,
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
        groups = LimitsHook(self._cgroups, self.cgroup_of)
        self.standbys = Standbys(
            images, self._containers, self.hooks, self._launch_standby, self._limit, max_standbys=max_standbys
        )
        self._hooks = [*layers, ImageHook(images), SdkHook(sdk), self.standbys, *hooks, NamesHook(), groups]
        self.keeper = LivingKeeper(self._keeper_config(), self._folder / "log")

    async def open(self) -> None:
        """End what a killed predecessor left: its containers, their cgroups and mounts."""
        self._pid_namespace.touch()
        await self.keeper.get()

    async def close(self) -> None:
        await self.standbys.close()
        await self.keeper.close()

    def cgroup_of(self, container_id: str) -> str:
        return f"{self._parent_cgroup}/{container_id}"

    def hooks(self) -> list[Hook]:
        return list(self._hooks)

    async def prepare(self, image_id: str, sdk_version: str, builder_version: str) -> None:
        """Have a standby ready for containers of this image."""
        spec = ContainerSpec(
            "",
            "",
            "",
            "",
            image_id,
            sdk_version=sdk_version,
            builder_version=builder_version,
            mount_client_dependencies=builder_version > LAST_WITH_DEPENDENCIES,
        )
        with contextlib.suppress(AeolianError):
            await self.standbys.prepare(spec)

    async def start(self, start: Start) -> KeptContainer:
        """From the standby that the hook has found for it, else cold."""
        env, binds = wired(start)
        argv = _resolved(start.spec.argv, start.python)
        standby = self.standbys.taken_by(start.spec.task_id)
        if standby is not None:
            try:
                return await self._assign(standby, start, argv, env, binds)
            except (AeolianError, OSError) as error:
                log.warning("%s starts cold: its standby could not be used: %s", start.spec.task_id, error)
                await standby.end()
                start.cgroup = self.cgroup_of(start.spec.task_id)
        return await self._launch(start, argv, env, binds)

    async def _assign(
        self, standby: Standby, start: Start, argv: list[str], env: dict[str, str], binds: Sequence[Bind]
    ) -> KeptContainer:
        """Make a standby into this container. Raises FailedPrecondition where it does not fit, Unavailable, OSError."""
        assert start.rootfs is not None and standby.container is not None, "the hooks come first"
        standby.check_fits(env, start.network_namespace)
        start.cgroup = standby.start.cgroup
        name = start.spec.task_id[:HOSTNAME_MAX]
        await asyncio.to_thread(make_folder_inside, start.rootfs, start.cwd)
        await asyncio.gather(
            self._limit(start, start.spec.resources),
            standby.container.assign(start.rootfs, binds, name, OOM_SCORE_ADJ),
        )
        cwd = os.path.join("/", start.cwd)
        await standby.tell(argv, env, cwd, is_entrypoint=tuple(start.spec.argv) == ENTRYPOINT_ARGV)
        if (entry := standby.container.entry) is not None:
            own = {**entry.process, "args": argv, "env": [f"{name}={value}" for name, value in env.items()], "cwd": cwd}
            standby.container.entry = entry._replace(process=own)
        return standby.container

    async def _limit(self, start: Start, resources: Resources) -> None:
        wanted = limits(resources, limits_swap=self._limits_swap)
        await asyncio.to_thread(self._cgroups.create, start.cgroup, wanted)

    async def _launch_standby(self, start: Start, argv: list[str], stdin: int) -> KeptContainer:
        return await self._launch(start, argv, start.env, start.binds, stdin)

    async def _launch(
        self, start: Start, argv: list[str], env: dict[str, str], binds: Sequence[Bind], stdin: int | None = None
    ) -> KeptContainer:
        """`stdin`: that of a standby, which waits there."""
        spec = start.spec
        rootfs, upper = start.rootfs, start.upper
        assert rootfs is not None and upper is not None and start.cgroup, "the hooks come first"
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
            oom_score_adj=OOM_SCORE_ADJ if stdin is None else OOM_SCORE_ADJ_OF_STANDBYS,
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

        container = await KeptContainer.start(
            spec.task_id, await self.keeper.get(), message, num_oom_kills, clean, stdin
        )
        container.entry = Entry((*self._crun_at(), "exec"), spec.task_id, config["process"])
        if not self._compiled_seccomp:
            self._compiled_seccomp = await asyncio.to_thread(_compiled_seccomp, state)
        return container

    def _crun(self, bundle: Path, container_id: str) -> list[str]:
        """The state is removed by us: `crun delete` would do no more, and takes its time."""
        return [
            *self._crun_at(), "--log", str(bundle / "log"),
            "create", "--bundle", str(bundle), "--pid-file", str(bundle / "pid_file"), container_id,
        ]  # fmt: skip

    def _crun_at(self) -> list[str]:
        return [self._crun_path, "--root", str(self._state), "--cgroup-manager", "cgroupfs"]

    def _keeper_config(self) -> dict:
        return {
            "lock": str(self._folder / "lock"),
            "state": str(self._state),
            "containers": str(self._containers),
            "cgroup": self._parent_cgroup,
            "pid_namespace": str(self._pid_namespace),
        }


def _resolved(argv: Sequence[str], python: str) -> list[str]:
    return [python if argv[0] == "python" and python else argv[0], *argv[1:]]


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
