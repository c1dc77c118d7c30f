"""The `gvisor` runtime: each container in a sandbox that answers its system calls itself (runsc, systrap).

::

    D/runtime/gvisor/    lock, log, runsc's states
    D/containers/<id>/   what the hooks prepare (`Start.folder`), and here the OCI bundle with runsc's logs
    /aeolian-<key>g/<id> the container's cgroup, made here; the key is of the data directory, so workers don't mix

A keeper process (`gvisor_keeper.py`) is the parent of all containers, and ends them when the worker has died.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

from aeolian.domain.containers import ExitStatus, Resources
from aeolian.domain.errors import FailedPrecondition
from aeolian.domain.execs import Command
from aeolian.worker.cgroups import Cgroups
from aeolian.worker.hooks.base import Bind, Hook, Start
from aeolian.worker.hooks.image import ImageHook
from aeolian.worker.hooks.limits import LimitsHook
from aeolian.worker.hooks.names import NamesHook
from aeolian.worker.hooks.sdk import SdkHook
from aeolian.worker.images.overlay_files import drop_mount_points
from aeolian.worker.images.store import ImageStore
from aeolian.worker.runtimes import gvisor_init
from aeolian.worker.runtimes.base import runtime_folder
from aeolian.worker.runtimes.entering import EnteredCommand, Entry
from aeolian.worker.runtimes.gvisor_exec import GvisorCommand
from aeolian.worker.runtimes.gvisor_spec import gvisor_spec
from aeolian.worker.runtimes.kept_container import KILLED, KeptContainer, LivingKeeper
from aeolian.worker.runtimes.native import CONTAINERS, make_folder_inside
from aeolian.worker.runtimes.oci_spec import limits
from aeolian.worker.runtimes.runsc import ERROR_LOG, RUN_LOG, RUNSC, find_runsc, run_command, runsc_command
from aeolian.worker.runtimes.wiring import wired
from aeolian.worker.sdk import SdkStore

KEEPER = "aeolian.worker.runtimes.gvisor_keeper"
INIT_TARGET = "/__modal/init.py"
OWN_MEMORY_MB = 64
"""What gVisor needs for itself comes on top of what a container may use."""
ENDED = re.compile(r"Exiting with status: (\d+)$", re.MULTILINE)
COULD_NOT_START = 127
MAX_ERROR_CHARS = 500


class GvisorRuntime:
    """`layers`: hooks before the image's (Mounts); `hooks`: those after the SDK's (Volumes and the like)."""

    name = "gvisor"

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
        self._state = self._folder / "runsc"
        self._cgroups = Cgroups()
        self._parent_cgroup = f"/aeolian-{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]}g"
        self._limits_swap = self._cgroups.can_limit_swap()
        self._runsc_path = find_runsc() or RUNSC
        names = LimitsHook(self._cgroups, self.cgroup_of)
        self._hooks = [*layers, ImageHook(images), SdkHook(sdk), *hooks, NamesHook(), names]
        self.keeper = LivingKeeper(self._keeper_config(), self._folder / "log", KEEPER)

    async def open(self) -> None:
        """End what a killed predecessor left: its containers, their cgroups and mounts."""
        await self.keeper.get()

    async def close(self) -> None:
        await self.keeper.close()

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
        if spec.resources.gpu_count:
            raise FailedPrecondition(
                "the gvisor runtime gives containers no GPU: use the native one for this Function "
                '(experimental_options={"runtime": "native"})'
            )
        env, binds = wired(start)
        argv = [start.python if spec.argv[0] == "python" and start.python else spec.argv[0], *spec.argv[1:]]
        if start.python:
            binds.append(Bind(Path(gvisor_init.__file__), INIT_TARGET))
            argv = [start.python, "-IS", INIT_TARGET, *argv]
        binds, read_only = with_places(binds, start.folder / "read_only")
        allowed = limits(with_own_memory(spec.resources), limits_swap=self._limits_swap)
        config = gvisor_spec(
            rootfs=rootfs,
            argv=argv,
            env=env,
            cwd=os.path.join("/", start.cwd),
            binds=binds,
            hostname=spec.task_id,
            cgroup=start.cgroup,
            network_namespace=start.network_namespace,
            block_network=spec.block_network,
            limits=allowed,
        )
        bundle = start.folder / "bundle"
        await asyncio.to_thread(_set_up, bundle, config, read_only)
        await asyncio.to_thread(make_folder_inside, rootfs, start.cwd)
        await asyncio.to_thread(self._cgroups.create, start.cgroup, allowed)
        message = {
            "argv": run_command(self._runsc_path, self._state, bundle, spec.task_id),
            "cgroup": start.cgroup,
            "read_only": [(str(source), str(place)) for source, place in read_only],
        }

        def clean() -> None:
            for left in self._state.glob(f"*{spec.task_id}*"):
                left.unlink(missing_ok=True)
            if spec.save_image_as:
                drop_mount_points(upper, [mount["destination"] for mount in config["mounts"]])

        def num_oom_kills() -> int:
            return self._cgroups.num_oom_kills(start.cgroup)

        container = await GvisorContainer.start(spec.task_id, await self.keeper.get(), message, num_oom_kills, clean)
        container.bundle = bundle
        container.entry = Entry(
            (*runsc_command(self._runsc_path, self._state), "exec"), spec.task_id, config["process"]
        )
        return container

    def _keeper_config(self) -> dict:
        return {
            "lock": str(self._folder / "lock"),
            "state": str(self._state),
            "containers": str(self._containers),
            "cgroup": self._parent_cgroup,
            "pid_namespace": "",
            "runsc": runsc_command(self._runsc_path, self._state),
        }


class GvisorContainer(KeptContainer):
    """What `runsc run` leaves unsaid is in its logs."""

    bundle: Path

    async def exec(self, command: Command) -> EnteredCommand:
        assert self.entry is not None
        return await GvisorCommand.start(self.entry, command)

    async def wait(self) -> ExitStatus:
        code = await asyncio.shield(self._exited)
        if self._status is None:  # read once: its cgroup and logs go away
            self._status = await asyncio.to_thread(self._read_status, code)
        return self._status

    def _read_status(self, code: int) -> ExitStatus:
        ended = ENDED.findall(_text(self.bundle / RUN_LOG))
        exact = os.waitstatus_to_exitcode(int(ended[-1])) if ended else None
        # The kernel kills the sandbox, or what stands in it for a process, which then ends with some code or other.
        if exact != 0 and self._num_oom_kills() > 0:
            return ExitStatus(KILLED, oom_killed=True)
        if exact is not None:
            return ExitStatus(exact)
        if code == -signal.SIGKILL:
            return ExitStatus(KILLED)
        return ExitStatus(COULD_NOT_START, reason=f"gVisor could not run it: {_complaint(self.bundle, code)}")


def with_places(binds: Sequence[Bind], folder: Path) -> tuple[list[Bind], list[tuple[Path, Path]]]:
    """The binds with read-only ones taken from places below `folder`, and what the keeper is to show there."""
    placed, read_only = [], []
    for number, bind in enumerate(binds):
        if bind.read_only:
            place = folder / str(number)
            read_only.append((bind.source, place))
            bind = Bind(place, bind.target)
        placed.append(bind)
    return placed, read_only


def _set_up(bundle: Path, config: dict, read_only: Sequence[tuple[Path, Path]]) -> None:
    bundle.mkdir(mode=0o700)  # secrets are in it
    (bundle / "config.json").write_text(json.dumps(config))
    for source, place in read_only:
        place.parent.mkdir(exist_ok=True)
        if source.is_dir():
            place.mkdir()
        else:
            place.touch()


def with_own_memory(resources: Resources) -> Resources:
    if not resources.memory_mb_max:
        return resources
    return msgspec.structs.replace(resources, memory_mb_max=resources.memory_mb_max + OWN_MEMORY_MB)


def _complaint(bundle: Path, code: int) -> str:
    """runsc's own last words."""
    lines = _text(bundle / ERROR_LOG).strip().splitlines()
    return lines[-1][-MAX_ERROR_CHARS:] if lines else f"runsc ended with {code}"


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""
