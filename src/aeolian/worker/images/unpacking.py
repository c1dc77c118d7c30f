"""A layer of a registry, from tar to the form that overlayfs keeps. Imported by `step.py`: standard library only.

Runs with the layer as its root folder, so no path or link in the archive leads out of it. What the layer removes
(`.wh.` names) becomes what overlayfs wants: a device 0:0, or an attribute of the folder. See
https://github.com/opencontainers/image-spec/blob/main/layer.md.
"""

import os
import stat
import subprocess
import tarfile

XATTR = "SCHILY.xattr."
OPAQUE = ".wh..wh..opq"
PREFIX = ".wh."


def unpack(archive, media_type, tree):
    """`archive`: the blob's path. Raises OSError or ValueError."""
    with open(archive, "rb") as blob:
        stream, helper = _decompressed(blob, media_type)
        os.chroot(tree)
        os.chdir("/")
        folders: dict[str, tarfile.TarInfo] = {}
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=tarfile.TarInfo) as layer:
            for member in layer:
                _place(layer, member, folders)
        for path, member in folders.items():  # last, as placing files changes their times
            os.utime(path, (member.mtime, member.mtime))
        if helper is not None and helper.wait():
            raise ValueError(f"the layer could not be decompressed (status {helper.returncode})")


def _decompressed(blob, media_type):
    """Started before the root folder changes."""
    tool = next((name for name in ("gzip", "zstd") if media_type.endswith(name)), "")
    if not tool:
        return blob, None
    helper = subprocess.Popen([tool, "-dc"], stdin=blob, stdout=subprocess.PIPE)
    return helper.stdout, helper


def _place(layer, member, folders):
    path = os.path.normpath("/" + member.name)
    folder, name = os.path.split(path)
    if path == "/":
        return
    os.makedirs(folder, exist_ok=True)
    if name == OPAQUE:
        os.setxattr(folder, "trusted.overlay.opaque", b"y")
        return
    if name.startswith(PREFIX):
        removed = os.path.join(folder, name.removeprefix(PREFIX))
        if not os.path.lexists(removed):
            os.mknod(removed, stat.S_IFCHR, os.makedev(0, 0))
        return
    _clear(path, member)
    if member.isdir():
        os.makedirs(path, exist_ok=True)
        folders[path] = member
    elif member.isreg():
        layer.makefile(member, path)
    elif member.issym():
        os.symlink(member.linkname, path)
    elif member.islnk():
        os.link(os.path.normpath("/" + member.linkname), path, follow_symlinks=False)
        return
    elif member.isfifo():
        os.mkfifo(path)
    elif member.ischr() or member.isblk():
        kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
        os.mknod(path, kind | member.mode, os.makedev(member.devmajor, member.devminor))
    else:
        raise ValueError(f"{member.name} is of an unknown kind ({member.type!r})")
    os.lchown(path, member.uid, member.gid)
    if member.issym():
        return
    os.chmod(path, stat.S_IMODE(member.mode))
    for key, value in member.pax_headers.items():
        if key.startswith(XATTR) and not key.startswith(XATTR + "trusted.overlay."):
            os.setxattr(path, key.removeprefix(XATTR), value.encode("utf-8", "surrogateescape"))
    if not member.isdir():
        os.utime(path, (member.mtime, member.mtime))


def _clear(path, member):
    """A later entry of the same name replaces the one before."""
    if os.path.lexists(path) and not (member.isdir() and os.path.isdir(path) and not os.path.islink(path)):
        os.unlink(path)
