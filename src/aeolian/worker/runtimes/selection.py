"""Which runtime this host can do: the best one that works, and why not the better ones.

From the best isolation to none: `gvisor`, `native`, `process`. What cannot be told from files is tried: `gvisor` and
`native` are there when a container of theirs has run.
"""

import asyncio
import os
import shutil
import sys
from pathlib import Path

import msgspec

from aeolian.domain.containers import ContainerSpec
from aeolian.domain.errors import AeolianError
from aeolian.worker import mounting
from aeolian.worker.cgroups import CgroupKind, Cgroups
from aeolian.worker.hooks.base import Start
from aeolian.worker.images.overlay_files import remove_tree
from aeolian.worker.images.store import ImageStore
from aeolian.worker.interpreters import Interpreters
from aeolian.worker.runtimes.base import RuntimeUnavailable, runtime_folder
from aeolian.worker.runtimes.gvisor import GvisorRuntime
from aeolian.worker.runtimes.native import CRUN, NativeRuntime
from aeolian.worker.runtimes.runsc import find_runsc
from aeolian.worker.sdk import SdkStore

RUNTIMES = ("gvisor", "native", "process")
"""The best isolation first."""
AUTOMATIC = ("native", "process")
"""What `auto` takes, the best first: gVisor's start takes longer, and it gives no GPUs, so it is taken when asked for."""
TRIAL_TIMEOUT_S = 30.0


class Offer(msgspec.Struct, frozen=True):
    """Whether this host can do a runtime. `problem`: "" or why not, `remedy`: what to do about it."""

    name: str
    problem: str = ""
    remedy: str = ""

    @property
    def is_available(self) -> bool:
        return not self.problem

    def __str__(self) -> str:
        if self.is_available:
            return f"{self.name} works here"
        return f"{self.name} is not to be had here: {self.problem}{f'; {self.remedy}' if self.remedy else ''}"


class Selection(msgspec.Struct, frozen=True):
    """The runtime to take, and the better ones that this host cannot do.

    `others`: those that an app may ask for. Where one was chosen by its name, they isolate better than it does.
    """

    name: str
    missing: tuple[Offer, ...] = ()
    others: tuple[str, ...] = ()


async def choose(choice: str, data_dir: Path) -> Selection:
    """The runtime for `auto` or for one asked for by name. Raises RuntimeUnavailable for one that this host lacks."""
    if choice not in ("auto", *RUNTIMES):
        raise RuntimeUnavailable(f"there is no runtime {choice!r}: take one of auto, {', '.join(RUNTIMES)}")
    looked_at = {"auto": RUNTIMES, "native": ("gvisor", "native")}.get(choice, (choice,))
    offers = dict(zip(looked_at, await asyncio.gather(*(find_offer(it, data_dir) for it in looked_at)), strict=True))
    missing: list[Offer] = []
    for name in AUTOMATIC if choice == "auto" else (choice,):
        if offers[name].is_available:
            others = (it for it in looked_at if offers[it].is_available and it not in (name, "process"))
            return Selection(name, tuple(missing), tuple(others))
        missing.append(offers[name])
    if choice != "auto":
        raise RuntimeUnavailable(f"{missing[0]}. With `--runtime auto` Aeolian takes the best one that works")
    raise RuntimeUnavailable(". ".join(map(str, missing)))


async def find_offer(name: str, data_dir: Path) -> Offer:
    if name == "gvisor":
        return _gvisor_needs() or await _tried(GvisorRuntime, data_dir)
    if name == "native":
        return _native_needs() or await _tried(NativeRuntime, data_dir)
    if os.name != "posix":
        return Offer(name, f"{sys.platform} cannot fork", "run Aeolian on Linux or macOS")
    return Offer(name)


async def _tried(kind: type[NativeRuntime] | type[GvisorRuntime], data_dir: Path) -> Offer:
    folder = runtime_folder(data_dir.resolve(), "trial") / f"{kind.name}-{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        if not await asyncio.to_thread(mounting.can_mount_overlays, folder):
            return Offer(
                kind.name,
                f"overlays cannot be mounted in {data_dir}",
                "put the data directory on a disk of ext4, xfs or btrfs, and where Aeolian itself runs in a container, "
                "give it a volume and the right to mount (--privileged)",
            )
        problem = await _try_container(kind, folder)
    finally:
        await asyncio.to_thread(remove_tree, folder)
    if problem:
        return Offer(
            kind.name, f"a container did not run: {problem}", "where Aeolian runs in a container, --privileged helps"
        )
    return Offer(kind.name)


def _gvisor_needs() -> Offer | None:
    """What is missing, as far as it can be told without trying."""
    if (offer := _root_needs("gvisor")) is not None:
        return offer
    if find_runsc() is None:
        return Offer("gvisor", "runsc is not installed", "make setup (as root) puts it beside Aeolian's Python")
    return _cgroup_needs("gvisor")


def _native_needs() -> Offer | None:
    """What is missing, as far as it can be told without trying."""
    if (offer := _root_needs("native")) is not None:
        return offer
    if shutil.which(CRUN) is None:
        return Offer("native", "crun is not installed", "apt install crun")
    return _cgroup_needs("native")


def _root_needs(name: str) -> Offer | None:
    if sys.platform != "linux":
        return Offer(name, f"it needs Linux, this is {sys.platform}")
    if os.geteuid() != 0:
        return Offer(name, f"it needs root, this is user {os.geteuid()}", "start Aeolian with sudo")
    return None


def _cgroup_needs(name: str) -> Offer | None:
    cgroups = Cgroups()
    if cgroups.kind is CgroupKind.NONE:
        return Offer(
            name, "no cgroups are mounted at /sys/fs/cgroup", "mount them: mount -t cgroup2 none /sys/fs/cgroup"
        )
    if missing := cgroups.missing_controllers():
        return Offer(name, f"the cgroup controllers {', '.join(missing)} are missing", "enable them in the kernel")
    return None


async def _try_container(kind: type[NativeRuntime] | type[GvisorRuntime], folder: Path) -> str:
    """Run `true` on this host's own files. Returns what went wrong, or ""."""
    program = shutil.which("true")
    if program is None:
        return "this host has no program `true` to try"
    runtime = kind(folder, ImageStore(folder), SdkStore(folder, Interpreters(folder)))
    spec = ContainerSpec("ta-trial", "", "", "", "", argv=(os.path.realpath(program),), cwd="/")
    start = Start(spec, folder / "containers" / spec.task_id, folder / "socket", cwd="/")
    start.rootfs, start.upper, work = (start.folder / name for name in ("rootfs", "upper", "work"))
    for place in (start.rootfs, start.upper, work):
        place.mkdir(parents=True)
    start.socket_path.touch()
    start.cgroup = runtime.cgroup_of(spec.task_id)
    try:
        async with asyncio.timeout(TRIAL_TIMEOUT_S):
            await runtime.open()
            await asyncio.to_thread(mounting.mount_overlay, [Path("/")], start.upper, work, start.rootfs)
            container = await runtime.start(start)
            exit, said = await asyncio.gather(container.wait(), container.stderr.read())
            await container.release()
        if exit.reason:
            return exit.reason
        return "" if exit.exit_code == 0 else said.decode("utf-8", "replace").strip() or f"exit status {exit.exit_code}"
    except TimeoutError:
        return f"it did not end within {TRIAL_TIMEOUT_S:g} s"
    except (AeolianError, OSError) as error:
        return str(error)
    finally:
        await runtime.close()
        await asyncio.to_thread(mounting.unmount, start.rootfs, detach=True)
