"""Gives a container that runs already another root file system, from outside: what makes a standby somebody's container.

The container's processes are confined, and stay so: all that is privileged is done here, by a child of the keeper::

    worker's namespace     container's namespace
    rootfs, binds  --(copies, as descriptors)-->  / (on top of the old root), and the binds inside it
                                /proc /dev /sys   move over, with what lies on them
                                old root          goes away; the kernel moves every process from it to the new one

Paths of the container are resolved inside its new root by the kernel, so no link in it leads out.
"""

import ctypes
import os
import posixpath
from collections.abc import Sequence

from aeolian.worker.runtimes import view

SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_OPENAT2 = 428, 429, 437
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
AT_EMPTY_PATH = 0x1000
FROM_DESCRIPTOR, TO_DESCRIPTOR = 0x4, 0x40
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 0x02, 0x10
CLONE_NEWUTS = 0x04000000
SYSTEM_FOLDERS = ("/proc", "/dev", "/sys")

_libc = ctypes.CDLL(None, use_errno=True)


def give_root(pid: int, rootfs: str, binds: Sequence[tuple[str, str, bool]], hostname: str) -> None:
    """`binds`: (on the host, in the container, read-only), outer ones first.

    The calling process is of no use afterwards: it is in the container's namespaces. Raises OSError; the container is
    then half-way between its roots, and to be killed.
    """
    mounts, names = (os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("mnt", "uts"))
    root = copied(rootfs)
    set_attributes(root, 0)
    shown = []
    for source, target, read_only in binds:
        tree = copied(source)
        set_attributes(tree, ATTR_NOSUID | ATTR_NODEV | (ATTR_RDONLY if read_only else 0))
        shown.append((tree, target, os.path.isdir(source)))
    view.setns(names, CLONE_NEWUTS)
    _checked("sethostname", _libc.sethostname(os.fsencode(hostname), len(os.fsencode(hostname))))
    view.setns(mounts, view.CLONE_NEWNS)
    attach(root, view.AT_FDCWD, "/")
    for folder in SYSTEM_FOLDERS:
        mounted = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        attach(mounted, place(root, folder, is_folder=True))
    for tree, target, is_folder in shown:
        attach(tree, place(root, target, is_folder=is_folder))
    os.fchdir(root)
    _checked("pivot_root", _libc.pivot_root(b".", b"."))
    _checked("umount the old root", _libc.umount2(b".", view.MNT_DETACH))


def copied(path: str) -> int:
    """A copy of the mounts at and below `path`, mounted nowhere."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | view.AT_RECURSIVE
    return _checked(f"copy the mount at {path}", _syscall(SYS_OPEN_TREE, view.AT_FDCWD, os.fsencode(path), flags))


def set_attributes(tree: int, attributes: int) -> None:
    """And what is mounted below the original later appears in the copy, but not the other way."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, view.MS_SLAVE, 0)
    result = _syscall(
        view.SYS_MOUNT_SETATTR,
        tree,
        b"",
        AT_EMPTY_PATH | view.AT_RECURSIVE,
        ctypes.byref(wanted),
        ctypes.sizeof(wanted),
    )
    _checked("set the attributes of a mount", result)


def attach(tree: int, folder: int, path: str = "") -> None:
    flags = FROM_DESCRIPTOR | (0 if path else TO_DESCRIPTOR)
    _checked("move a mount", _syscall(SYS_MOVE_MOUNT, tree, b"", folder, os.fsencode(path), flags))


def place(root: int, target: str, *, is_folder: bool) -> int:
    """`target` inside `root`, made where it is missing."""
    try:
        return _open_inside(root, target)
    except FileNotFoundError:
        parent, name = posixpath.split(target.rstrip("/"))
        folder = place(root, parent, is_folder=True)
        if is_folder:
            os.mkdir(name, 0o755, dir_fd=folder)
        else:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder))
        os.close(folder)
        return _open_inside(root, target)


def _open_inside(root: int, path: str) -> int:
    how = (ctypes.c_uint64 * 3)(os.O_PATH | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    result = _syscall(SYS_OPENAT2, root, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
    return _checked(path, result)


def _syscall(number: int, *arguments: object) -> int:
    whole = [ctypes.c_long(it) if isinstance(it, int) else it for it in arguments]
    return _libc.syscall(ctypes.c_long(number), *whole)


def _checked(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
