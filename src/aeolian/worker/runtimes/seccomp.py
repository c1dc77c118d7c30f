"""The system calls that containers may make, as an OCI runtime takes them.

The distribution's own profile (containers-common) where it is installed, else a list of what is refused. Both are
tightened: a container makes no namespaces and mounts nothing, whatever the profile would allow.
"""

import json
import logging
import platform
from collections.abc import Collection
from pathlib import Path

log = logging.getLogger(__name__)

PROFILE = Path("/usr/share/containers/seccomp.json")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
SCMP_ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}
EPERM, ENOSYS = 1, 38
NAMESPACE_FLAGS = 0x7E020000
"""CLONE_NEW* of clone(2)."""
REFUSED = (
    "add_key", "fsconfig", "fsmount", "fsopen", "fspick", "keyctl", "mount", "mount_setattr", "move_mount", "open_tree",
    "pivot_root", "request_key", "setns", "umount", "umount2", "unshare",
)  # fmt: skip
"""Refused whatever the profile says."""
REFUSED_WITHOUT_PROFILE = (
    "_sysctl", "acct", "afs_syscall", "bdflush", "bpf", "clock_adjtime", "clock_settime", "clock_settime64",
    "create_module", "delete_module", "fanotify_init", "finit_module", "get_kernel_syms", "init_module",
    "io_uring_enter", "io_uring_register", "io_uring_setup", "ioperm", "iopl", "kcmp", "kexec_file_load",
    "kexec_load", "lookup_dcookie", "name_to_handle_at", "nfsservctl", "open_by_handle_at", "perf_event_open",
    "query_module", "quotactl", "quotactl_fd", "reboot", "settimeofday", "stime", "swapoff", "swapon", "syslog",
    "userfaultfd", "uselib", "vhangup", "vm86", "vm86old",
)  # fmt: skip


def seccomp_profile(capabilities: Collection[str], path: Path = PROFILE) -> dict:
    """The `linux.seccomp` of a container with these capabilities."""
    machine = platform.machine()
    try:
        source = json.loads(path.read_bytes())
        profile = _converted(source, ARCHITECTURES.get(machine, machine), frozenset(capabilities))
    except FileNotFoundError:
        profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [_refusal(REFUSED_WITHOUT_PROFILE)]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        log.warning("%s is not a seccomp profile that Aeolian understands (%r): using its own", path, error)
        profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [_refusal(REFUSED_WITHOUT_PROFILE)]}
    profile["architectures"] = SCMP_ARCHITECTURES.get(machine, [])
    return _tightened(profile)


def _converted(source: dict, architecture: str, capabilities: frozenset[str]) -> dict:
    """Without the conditions that containers-common adds to the OCI format."""
    profile = {"defaultAction": source["defaultAction"], "syscalls": []}
    if "defaultErrnoRet" in source:
        profile["defaultErrnoRet"] = source["defaultErrnoRet"]
    for entry in source["syscalls"]:
        includes, excludes = entry.get("includes") or {}, entry.get("excludes") or {}
        if not capabilities.issuperset(includes.get("caps") or ()) or capabilities.intersection(
            excludes.get("caps") or ()
        ):
            continue
        if architecture not in (includes.get("arches") or [architecture]):
            continue
        if architecture in (excludes.get("arches") or ()):
            continue
        kept = {name: entry[name] for name in ("names", "action", "args", "errnoRet") if entry.get(name) is not None}
        profile["syscalls"].append(kept)
    return profile


def _tightened(profile: dict) -> dict:
    """Refuse what makes namespaces and mounts. clone3 hides its flags in memory: libraries fall back to clone."""
    special = {*REFUSED, "clone", "clone3"}
    syscalls = []
    for entry in profile["syscalls"]:
        names = [name for name in entry["names"] if name not in special]
        if names:
            syscalls.append({**entry, "names": names})
    if profile["defaultAction"] == "SCMP_ACT_ALLOW":
        condition = {"index": 0, "value": 0, "op": "SCMP_CMP_MASKED_EQ"}
        syscalls += [
            {**_refusal(["clone"]), "args": [{**condition, "value": flag, "valueTwo": flag}]}
            for flag in (1 << bit for bit in range(32) if NAMESPACE_FLAGS & (1 << bit))
        ]
    else:
        condition = {"index": 0, "value": NAMESPACE_FLAGS, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
        syscalls.append({"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [condition]})
    syscalls += [_refusal(REFUSED), {**_refusal(["clone3"]), "errnoRet": ENOSYS}]
    return {**profile, "syscalls": syscalls}


def _refusal(names: Collection[str]) -> dict:
    return {"names": list(names), "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM}
