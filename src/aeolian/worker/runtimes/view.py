"""A container's view of the host: a private mount namespace made of image layers over the host's own folders.

Runs inside other Pythons (3.9 and newer), so it imports nothing but the standard library::

    /usr /etc /var …   overlay: the image's layers over the host's folder; writes go to the container's upper folder
    /root /tmp         overlay of the layers alone, nothing of the host
    /dev /sys /proc    the host's (a fresh /proc where the container has its own pid namespace)
    other folders      the host's, read-only
    binds              SDK, mounts, volumes, sockets: at any absolute path

The root folder itself is the upper folder, so what a container writes anywhere is one tree: a layer. This
separates containers from one another and from the host's files by accident, not by force: it is no sandbox.
"""

import ctypes
import json
import os
import shutil
import stat
import sys

HOST = "/__modal/host"
"""Where a fork server sees the host's root, so that it can build views of its children."""
API_FOLDERS = ("proc", "sys", "dev")
MERGED = frozenset(["bin", "etc", "lib", "lib32", "lib64", "libx32", "opt", "sbin", "srv", "usr", "var"])
PRIVATE = frozenset(["root", "tmp"])
SKIPPED = frozenset(["__modal", "pkg", "lost+found", "boot"])
MAX_LINKS = 40

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 32, 4096, 16384, 1 << 18, 1 << 19
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1

_libc = ctypes.CDLL(None, use_errno=True)


def _call(what, result):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source, target, kind="", flags=0, options=""):
    _call(
        f"mount {source} at {target}",
        _libc.mount(
            os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), os.fsencode(options)
        ),
    )


def unshare(flags):
    _call("unshare", _libc.unshare(flags))


def setns(descriptor, kind):
    _call("setns", _libc.setns(descriptor, kind))


def prctl(option, value):
    _libc.prctl(option, value, 0, 0, 0)


def enter_namespaces(user_namespace):
    """Leave the host's mount namespace; as an ordinary user, by way of a user namespace in which we are root."""
    uid, gid = os.getuid(), os.getgid()
    unshare(CLONE_NEWNS | (CLONE_NEWUSER if user_namespace else 0))
    if user_namespace:
        for path, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{path}", "w") as stream:
                stream.write(text)
    # What the host mounts and shares later (volumes) appears here, too; nothing goes the other way.
    mount("none", "/", flags=MS_REC | MS_SLAVE)


def enter(view, host="", keep_host=False, own_pids=False):
    """Build the view and make it this process's root. The mount namespace must be private.

    `view`: {"root", "work": folders on the host; "upper": where a whole root file system keeps its changes, "" when
    the layers lie over the host's own folders; "layers": trees, the topmost first; "layers_folder": where
    relative layers lie; "data": a folder of ours that no overlay may cover; "user_namespace": bool;
    "binds": [[source, target, read_only], …]; "volatile": bool, nothing is synced to disk}. `host`: where the host's
    root is seen now ("" or HOST).
    """
    root, work = host + view["root"], host + view["work"]
    os.makedirs(root, exist_ok=True)
    os.makedirs(work, exist_ok=True)
    if view.get("upper"):
        _mount_whole(view, root, host + view["upper"], work, host, own_pids)
        _finish(view, root, host, keep_host)
        return
    # Upper and work folders must lie on one mount: reach both around the bind mount that root becomes.
    folders = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in (root, work)]
    upper, work = (f"/proc/self/fd/{descriptor}" for descriptor in folders)
    mount(root, root, flags=MS_BIND)
    mount("none", root, flags=MS_PRIVATE)
    os.chdir(host + view["layers_folder"])
    layers = [layer for layer in view["layers"] if os.path.isdir(layer)]
    _assemble(view, layers, root, upper, work, host or "/", own_pids)
    for descriptor in folders:
        os.close(descriptor)
    _finish(view, root, host, keep_host)


def _mount_whole(view, root, upper, work, host, own_pids):
    """The layers are a whole root file system: nothing of the host's folders is seen."""
    for folder in (upper, work):
        os.makedirs(folder, exist_ok=True)
    os.chdir(host + view["layers_folder"])
    lower = ":".join(_escaped(layer) for layer in view["layers"])
    options = (
        f"lowerdir={lower},upperdir={_escaped(upper)},workdir={_escaped(work)},redirect_dir=on,metacopy=off,index=off"
    )
    if view["user_namespace"]:
        options = f"lowerdir={lower},upperdir={_escaped(upper)},workdir={_escaped(work)},userxattr"
    _mount_overlay(root, options, view.get("volatile"))
    mount("none", root, flags=MS_PRIVATE)
    for name in (*API_FOLDERS, "tmp", "run"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    if own_pids:
        mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    else:
        mount(f"{host}/proc", f"{root}/proc", flags=MS_BIND | MS_REC)
    mount(f"{host}/sys", f"{root}/sys", flags=MS_BIND | MS_REC)
    make_read_only(f"{root}/sys")
    mount_devices(f"{root}/dev", host)


def _mount_overlay(target, options, volatile=False):
    """`volatile`: nothing is synced to disk (kernels from 5.10 on)."""
    try:
        mount("overlay", target, "overlay", 0, options + (",volatile" if volatile else ""))
    except OSError:
        if not volatile:
            raise
        mount("overlay", target, "overlay", 0, options)


def mount_devices(dev, host=""):
    """A /dev with what every program expects and no disks; GPUs' nodes are bound where the host has them."""
    mount("tmpfs", dev, "tmpfs", MS_NOSUID, "mode=755,size=64k")
    gpus = [name for name in os.listdir(f"{host}/dev") if name.startswith("nvidia")]
    for name in ("null", "zero", "full", "random", "urandom", "tty", "fuse", *gpus):
        source, target = f"{host}/dev/{name}", f"{dev}/{name}"
        if not os.path.exists(source) or os.path.isdir(source):
            continue
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT, 0o666))
        mount(source, target, flags=MS_BIND)
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
                         ("stderr", "/proc/self/fd/2"), ("ptmx", "pts/ptmx")):  # fmt: skip
        os.symlink(target, f"{dev}/{name}")
    for name in ("pts", "shm"):
        os.mkdir(f"{dev}/{name}")
    mount("tmpfs", f"{dev}/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    try:
        mount("devpts", f"{dev}/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    except OSError:
        mount(f"{host}/dev/pts", f"{dev}/pts", flags=MS_BIND)


def _finish(view, root, host, keep_host):
    for source, target, read_only in view["binds"]:
        bind(host + source, root, target, read_only)
    os.makedirs(f"{root}/__modal", exist_ok=True)
    old = root + HOST
    os.makedirs(old, exist_ok=True)
    os.chdir(root)
    _call("pivot_root", _libc.pivot_root(b".", os.fsencode(old)))
    os.chdir("/")
    if not keep_host:
        _call("umount", _libc.umount2(os.fsencode(HOST), MNT_DETACH))
        os.rmdir(HOST)


def _assemble(view, layers, root, upper, work, host, own_pids):
    names = {entry.name: entry for entry in os.scandir(host) if entry.name not in SKIPPED}
    of_layers = {}
    for layer in layers:
        for entry in os.scandir(layer):
            of_layers.setdefault(entry.name, []).append(entry)
    for name in sorted({*names, *of_layers}):
        target, entry, in_layers = f"{root}/{name}", names.get(name), of_layers.get(name, [])
        if name in API_FOLDERS:
            os.makedirs(target, exist_ok=True)
            if name == "proc" and own_pids:
                mount("proc", target, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
            else:
                mount(f"{host}/{name}", target, flags=MS_BIND | MS_REC)
        elif in_layers and not in_layers[0].is_dir():
            if name not in SKIPPED:
                _copy_entry(in_layers[0], target)
        elif entry is not None and entry.is_symlink() and not in_layers:
            if not os.path.lexists(target):
                os.symlink(os.readlink(entry.path), target)
        else:
            lowers = [f.path for f in in_layers if f.is_dir(follow_symlinks=False)]
            seen = entry is not None and name not in PRIVATE and entry.is_dir()
            holds_data = view["data"].startswith(f"/{name}/")
            if seen and name in MERGED and not holds_data:
                lowers.append(entry.path)
            elif seen and not lowers:
                os.makedirs(target, exist_ok=True)
                mount(entry.path, target, flags=MS_BIND | MS_REC)
                make_read_only(target)
                continue
            if lowers:
                try:
                    _overlay(view, lowers, target, f"{upper}/{name}", f"{work}/{name}")
                except OSError:
                    if in_layers or not seen:
                        raise
                    # In a user namespace, a folder with mounts of the host's in it (/var) can be no layer.
                    mount(entry.path, target, flags=MS_BIND | MS_REC)
                    make_read_only(target)
    for name, mode in (("tmp", 0o1777), ("root", 0o700)):
        if not os.path.isdir(f"{root}/{name}"):
            os.mkdir(f"{root}/{name}")
            os.chmod(f"{root}/{name}", mode)


def _overlay(view, lowers, target, upper, work):
    """Mount an overlay whose upper folder is the very folder below the mount."""
    fresh = not os.path.isdir(target)
    os.makedirs(target, exist_ok=True)
    os.makedirs(work, exist_ok=True)
    if fresh:  # the merged folder takes its mode from the upper one
        os.chmod(target, stat.S_IMODE(os.stat(lowers[0]).st_mode))
    options = f"lowerdir={':'.join(_escaped(path) for path in lowers)},upperdir={upper},workdir={work}"
    _mount_overlay(target, options + (",userxattr" if view["user_namespace"] else ""), view.get("volatile"))


def _escaped(path):
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def _copy_entry(entry, target):
    if os.path.lexists(target):
        return
    if entry.is_symlink():
        os.symlink(os.readlink(entry.path), target)
    elif entry.is_file():
        shutil.copy2(entry.path, target)


def bind(source, root, target, read_only):
    """Show a file or folder of the host at `target`, which is made where it is missing."""
    place = resolved(root, target)
    if os.path.isdir(source):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if not os.path.lexists(place):
            os.close(os.open(place, os.O_WRONLY | os.O_CREAT, 0o644))
    mount(source, place, flags=MS_BIND | MS_REC)
    if read_only:
        make_read_only(place)


def resolved(root, target):
    """Where `target` lies below `root`: links on the way are followed as a process inside would follow them."""
    path, parts, num_links = "", [part for part in target.split("/") if part not in ("", ".")], 0
    while parts:
        part = parts.pop(0)
        if part == "..":
            path = os.path.dirname(path)
            continue
        step = f"{path}/{part}"
        if os.path.islink(root + step) and num_links < MAX_LINKS:
            num_links += 1
            link = os.readlink(root + step)
            path = "" if link.startswith("/") else path
            parts = [name for name in link.split("/") if name not in ("", ".")] + parts
            continue
        path = step
    return root + path


def make_read_only(target):
    """Also below `target` where the kernel can (5.12); else the mount itself."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    failed = _libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), AT_RECURSIVE, ctypes.byref(attributes), ctypes.c_size_t(32)
    )
    if failed:
        mount("none", target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY)


def probe(folder, user_namespace, own_pids):
    """Try everything that a view needs, below `folder`. Returns what failed, or ""."""
    for name in ("layer/usr", "root", "work"):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
    open(f"{folder}/layer/usr/probe", "w").close()
    view = {
        "root": f"{folder}/root",
        "work": f"{folder}/work",
        "layers": ["layer"],
        "layers_folder": folder,
        "data": folder,
        "user_namespace": user_namespace,
        "binds": [[folder, "/probe", True]],
    }
    try:
        enter_namespaces(user_namespace)
        with PidNamespaces(own_pids):
            pid = os.fork()
        if pid == 0:
            try:
                unshare(CLONE_NEWNS)
                enter(view, own_pids=own_pids)
                seen = os.path.exists("/usr/probe") and os.path.isdir("/usr/bin") and os.path.exists("/probe/root")
                os._exit(0 if seen else 3)
            except OSError as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(2)
        _, status = os.waitpid(pid, 0)
        return "" if status == 0 else "the host's folders cannot be overlaid"
    except OSError as error:
        return str(error)


class PidNamespaces:
    """Children forked inside the `with` block each become the first process of a pid namespace of their own."""

    def __init__(self, enabled):
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC) if enabled else None
        self._pid = os.getpid()

    def __enter__(self):
        if self._own is not None:
            unshare(CLONE_NEWPID)

    def __exit__(self, *_exc):
        if self._own is not None and os.getpid() == self._pid:
            setns(self._own, CLONE_NEWPID)


if __name__ == "__main__":
    mode = sys.argv[2]
    print(json.dumps(probe(sys.argv[1], "user" in mode, "pids" in mode)))
