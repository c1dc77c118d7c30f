"""Control groups of this host: which kind it has, and what becomes of the groups of containers.

::

    v1       /sys/fs/cgroup/<controller>/<path>             one hierarchy for each controller
    hybrid   v1, and an empty v2 hierarchy at /sys/fs/cgroup/unified (crun refuses it: hide it in a namespace)
    v2       /sys/fs/cgroup/<path>

A group's path is the same below each hierarchy. crun makes the groups of native containers and sets their limits;
others are made here. All are read, emptied and removed here.
"""

import contextlib
import os
import signal
import time
from enum import StrEnum
from pathlib import Path

MOUNT_POINT = Path("/sys/fs/cgroup")
UNIFIED = MOUNT_POINT / "unified"
CONTROLLERS = ("cpu", "memory", "pids")
KILL_PAUSE_S = 0.005


class CgroupKind(StrEnum):
    V1 = "v1"
    HYBRID = "hybrid"
    V2 = "v2"
    NONE = "none"


class Cgroups:
    def __init__(self, mount_point: Path = MOUNT_POINT):
        self._mount_point = mount_point
        self.kind = find_kind(mount_point)

    def hierarchies(self) -> list[Path]:
        """The roots below which a group's path lies."""
        if self.kind is CgroupKind.V2:
            return [self._mount_point]
        if self.kind is CgroupKind.NONE:
            return []
        # cpu and cpuacct are links to one folder on many hosts.
        return [entry for entry in self._mount_point.iterdir() if entry.is_dir() and not entry.is_symlink()]

    def missing_controllers(self) -> list[str]:
        """Those that limits need and this host does not offer."""
        if self.kind is CgroupKind.V2:
            with contextlib.suppress(OSError):
                offered = (self._mount_point / "cgroup.controllers").read_text().split()
                return [name for name in CONTROLLERS if name not in offered]
            return list(CONTROLLERS)
        return [name for name in CONTROLLERS if not (self._mount_point / name / "cgroup.procs").exists()]

    def can_limit_swap(self) -> bool:
        if self.kind is CgroupKind.V2:
            return has_swap()  # without swap space the file may be missing, and nothing is to be limited
        return (self._mount_point / "memory/memory.memsw.limit_in_bytes").exists()

    def create(self, path: str, limits: dict) -> None:
        """Make a group with the limits of an OCI description (`linux.resources`: cpu, memory, pids). Raises OSError."""
        relative = path.strip("/")
        if self.kind is CgroupKind.V2:
            _create_unified(self._mount_point, relative, _unified_files(limits))
            return
        for controller, files in _files_by_controller(limits).items():
            folder = self._mount_point / controller / relative
            folder.mkdir(parents=True, exist_ok=True)
            for name, value in files.items():
                (folder / name).write_text(value)

    def join(self, path: str, pid: int) -> None:
        """Put a process into a group that `create` made. Raises OSError."""
        roots = [self._mount_point]
        if self.kind is not CgroupKind.V2:
            roots = [self._mount_point / name for name in CONTROLLERS]
        for root in roots:
            (root / path.strip("/") / "cgroup.procs").write_text(str(pid))

    def num_oom_kills(self, path: str) -> int:
        """How many processes of the group the kernel has killed for want of memory; 0 when the group is gone."""
        relative = path.lstrip("/")
        if self.kind is CgroupKind.V2:
            file = self._mount_point / relative / "memory.events"
        else:
            file = self._mount_point / "memory" / relative / "memory.oom_control"
        with contextlib.suppress(OSError, ValueError):
            for line in file.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
        return 0

    def process_ids(self, path: str) -> set[int]:
        """Of the group and those below it."""
        found: set[int] = set()
        for folder in self._folders(path):
            for parent, _, files in os.walk(folder):
                if "cgroup.procs" in files:
                    with contextlib.suppress(OSError):
                        found.update(map(int, Path(parent, "cgroup.procs").read_text().split()))
        return found

    def kill(self, path: str, timeout_s: float) -> bool:
        """SIGKILL until the group is empty; whether it is in time. Blocks: for clearing up, not for running containers."""
        ends_at = time.monotonic() + timeout_s
        while living := self.process_ids(path):
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > ends_at:
                return False
            time.sleep(KILL_PAUSE_S)
        return True

    def remove(self, path: str) -> None:
        """Remove the empty group and the groups below it. Never raises: what is not empty stays."""
        for folder in self._folders(path):
            for parent, _, _ in os.walk(folder, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(parent)

    def _folders(self, path: str) -> list[Path]:
        relative = path.strip("/")
        assert relative, "not the whole hierarchy"
        return [folder for root in self.hierarchies() if (folder := root / relative).is_dir()]


def find_kind(mount_point: Path = MOUNT_POINT) -> CgroupKind:
    if (mount_point / "cgroup.controllers").exists():
        return CgroupKind.V2
    if not (mount_point / "memory").is_dir() and not (mount_point / "cpu").is_dir():
        return CgroupKind.NONE
    return CgroupKind.HYBRID if (mount_point / UNIFIED.name / "cgroup.procs").exists() else CgroupKind.V1


def _files_by_controller(limits: dict) -> dict[str, dict[str, str]]:
    """The files of cgroups v1, in the order in which they must be written."""
    cpu, memory = limits["cpu"], limits.get("memory", {})
    files: dict[str, dict[str, str]] = {name: {} for name in CONTROLLERS}
    files["cpu"]["cpu.shares"] = str(cpu["shares"])
    if "quota" in cpu:
        files["cpu"] |= {"cpu.cfs_period_us": str(cpu["period"]), "cpu.cfs_quota_us": str(cpu["quota"])}
    if "limit" in memory:
        files["memory"]["memory.limit_in_bytes"] = str(memory["limit"])
    if "swap" in memory:
        files["memory"]["memory.memsw.limit_in_bytes"] = str(memory["swap"])
    files["pids"]["pids.max"] = str(limits["pids"]["limit"])
    return files


def _unified_files(limits: dict) -> dict[str, str]:
    """The files of cgroups v2: a share of CPU becomes a weight, and swap is counted without memory."""
    cpu, memory = limits["cpu"], limits.get("memory", {})
    files = {"cpu.weight": str(1 + (cpu["shares"] - 2) * 9999 // 262_142)}
    if "quota" in cpu:
        files["cpu.max"] = f"{cpu['quota']} {cpu['period']}"
    if "limit" in memory:
        files["memory.max"] = str(memory["limit"])
    if "swap" in memory:
        files["memory.swap.max"] = str(memory["swap"] - memory["limit"])
    files["pids.max"] = str(limits["pids"]["limit"])
    return files


def _create_unified(mount_point: Path, relative: str, files: dict[str, str]) -> None:
    """Each group on the way hands its controllers down."""
    folder = mount_point
    for part in Path(relative).parts:
        for controller in CONTROLLERS:
            (folder / "cgroup.subtree_control").write_text(f"+{controller}")
        folder /= part
        folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(value)


def has_swap() -> bool:
    with contextlib.suppress(OSError):
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    return False
