"""The OCI description of a gVisor container: what runsc is told, as data.

runsc brings devices, `/proc` and `/sys` of its own, and a seccomp filter around itself; none of the host's are shown.
"""

from collections.abc import Sequence
from pathlib import Path

from aeolian.worker.hooks.base import Bind
from aeolian.worker.runtimes.oci_spec import CAPABILITIES, HOSTNAME_MAX, OOM_SCORE_ADJ, bind_mount, rlimits


def gvisor_spec(
    *,
    rootfs: Path,
    argv: Sequence[str],
    env: dict[str, str],
    cwd: str,
    binds: Sequence[Bind],
    hostname: str,
    cgroup: str,
    network_namespace: Path | None,
    block_network: bool,
    limits: dict,
) -> dict:
    """`config.json` of the container's bundle. `cgroup` is there, with `limits` set: runsc only reads them.

    `network_namespace`: a prepared one; None: the host's, or an empty one.
    """
    namespaces: list[dict] = [{"type": kind} for kind in ("mount", "ipc", "uts", "pid")]
    if network_namespace is not None:
        namespaces.append({"type": "network", "path": str(network_namespace)})
    elif block_network:
        namespaces.append({"type": "network"})
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(rootfs)},
        "hostname": hostname[:HOSTNAME_MAX],
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": list(argv),
            "env": [f"{name}={value}" for name, value in env.items()],
            "cwd": cwd,
            "noNewPrivileges": True,
            "oomScoreAdj": OOM_SCORE_ADJ,
            "capabilities": {name: list(CAPABILITIES) for name in ("bounding", "effective", "permitted")},
            "rlimits": rlimits(),
        },
        "mounts": [*_system_mounts(), *map(bind_mount, binds)],
        "linux": {"namespaces": namespaces, "cgroupsPath": cgroup, "resources": limits},
    }


def _system_mounts() -> list[dict]:
    return [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
    ]
