"""The OCI description of a native container: what crun is told, as data.

Root inside, with Docker's default capabilities less those that reach devices and raw sockets; processes, mounts, IPC
and host name of its own; the host's network unless it is blocked.
"""

import os
import resource
import stat
from collections.abc import Sequence
from pathlib import Path

from aeolian.domain.containers import Resources
from aeolian.worker.hooks.base import Bind

CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
"""Docker's, but for mknod, raw sockets and audit records."""
MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READ_ONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
CPU_PERIOD_US = 100_000
MAX_PIDS = 16_384
MAX_OPEN_FILES = 65_536
MIN_SHARES = 2
SHARES_PER_CPU = 1024
OOM_SCORE_ADJ = 500
"""A host that runs out of memory ends containers before Aeolian itself."""
MIB = 1 << 20
HOSTNAME_MAX = 63
COMPILED_SECCOMP = "run.oci.seccomp_bpf_data"


def oci_spec(
    *,
    rootfs: Path,
    argv: Sequence[str],
    env: dict[str, str],
    cwd: str,
    binds: Sequence[Bind],
    hostname: str,
    cgroup: str,
    resources: Resources,
    seccomp: dict,
    compiled_seccomp: str,
    pid_namespace: Path,
    network_namespace: Path | None,
    block_network: bool,
    limits_swap: bool,
    oom_score_adj: int = OOM_SCORE_ADJ,
) -> dict:
    """`config.json` of the container's bundle.

    `network_namespace`: a prepared one; None: the host's, or an empty one. `compiled_seccomp`: the profile as a filter
    program in base64, or "": crun then makes one of it, which takes 15 ms.
    """
    namespaces: list[dict] = [{"type": kind} for kind in ("mount", "ipc", "uts", "cgroup")]
    namespaces.append({"type": "pid", "path": str(pid_namespace)})
    if network_namespace is not None:
        namespaces.append({"type": "network", "path": str(network_namespace)})
    elif block_network:
        namespaces.append({"type": "network"})
    devices = gpu_devices() if resources.gpu_count else []
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(rootfs)},
        "hostname": hostname[:HOSTNAME_MAX],
        "annotations": {COMPILED_SECCOMP: compiled_seccomp} if compiled_seccomp else {},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": list(argv),
            "env": [f"{name}={value}" for name, value in env.items()],
            "cwd": cwd,
            "noNewPrivileges": True,
            "oomScoreAdj": oom_score_adj,
            "capabilities": {name: list(CAPABILITIES) for name in ("bounding", "effective", "permitted")},
            "rlimits": rlimits(),
        },
        "mounts": [*_system_mounts(), *map(bind_mount, binds)],
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": cgroup,
            "resources": {**limits(resources, limits_swap=limits_swap), "devices": _device_rules(devices)},
            "devices": devices,
            "seccomp": seccomp,
            "maskedPaths": list(MASKED_PATHS),
            "readonlyPaths": list(READ_ONLY_PATHS),
            "rootfsPropagation": "rslave",
        },
    }


def limits(resources: Resources, *, limits_swap: bool) -> dict:
    """Memory and CPU time at most, as asked for; the CPU asked for as a share where CPUs are scarce."""
    cpu: dict[str, int] = {"shares": max(MIN_SHARES, resources.milli_cpu * SHARES_PER_CPU // 1000)}
    if resources.milli_cpu_max:
        cpu |= {"quota": resources.milli_cpu_max * CPU_PERIOD_US // 1000, "period": CPU_PERIOD_US}
    found: dict = {"cpu": cpu, "pids": {"limit": MAX_PIDS}}
    if resources.memory_mb_max:
        max_bytes = resources.memory_mb_max * MIB
        found["memory"] = {"limit": max_bytes, **({"swap": max_bytes} if limits_swap else {})}
    return found


def rlimits() -> list[dict]:
    """No more than this process may give: a host's hard limits bind root, too, where it lacks CAP_SYS_RESOURCE."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    return [
        {"type": "RLIMIT_NOFILE", "soft": soft, "hard": soft},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
    ]


def gpu_devices() -> list[dict]:
    """The nodes of the host's NVIDIA GPUs and of their driver."""
    found = []
    for folder in (Path("/dev"), Path("/dev/nvidia-caps")):
        for path in sorted(folder.glob("nvidia*")):
            status = os.stat(path)
            if stat.S_ISCHR(status.st_mode):
                number = status.st_rdev
                found.append(
                    {
                        "path": str(path),
                        "type": "c",
                        "major": os.major(number),
                        "minor": os.minor(number),
                        "fileMode": 0o666,
                        "uid": 0,
                        "gid": 0,
                    }
                )
    return found


def _device_rules(devices: Sequence[dict]) -> list[dict]:
    """Nothing but these; crun adds those that every container has (null, zero, random, tty, …)."""
    rules: list[dict] = [{"allow": False, "access": "rwm"}]
    rules += [
        {"allow": True, "type": "c", "major": it["major"], "minor": it["minor"], "access": "rw"} for it in devices
    ]
    return rules


def _system_mounts() -> list[dict]:
    return [
        {
            "destination": "/proc",
            "type": "proc",
            "source": "proc",
            "options": ["nosuid", "noexec", "nodev"],
        },
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "noexec", "strictatime", "mode=755", "size=64k"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
        },
        # Its pages count against the container's memory limit, so it needs no limit of its own.
        {
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": ["nosuid", "nodev", "mode=1777"],
        },
        {
            "destination": "/dev/mqueue",
            "type": "mqueue",
            "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"],
        },
        {
            "destination": "/sys",
            "type": "sysfs",
            "source": "sysfs",
            "options": ["nosuid", "noexec", "nodev", "ro"],
        },
    ]


def bind_mount(bind: Bind) -> dict:
    """`rslave`: what the worker mounts below it later appears in the container."""
    access = "ro" if bind.read_only else "rw"
    options = ["rbind", "rslave", access, "nosuid", "nodev"]
    return {"destination": bind.target, "type": "bind", "source": str(bind.source), "options": options}
