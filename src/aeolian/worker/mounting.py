"""Overlay mounts in the host's own namespace, shown to the containers' namespaces as they come and go."""

import contextlib
import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from aeolian.worker.images.overlay_files import remove_tree
from aeolian.worker.runtimes import view

MS_SHARED = 1 << 20
MAX_OPTIONS_BYTES = 4095
OVERLAY_OPTIONS = "redirect_dir=on,metacopy=off,index=off"
"""Renaming a folder of a lower layer works, and an upper folder holds whole files."""

_libc = ctypes.CDLL(None, use_errno=True)


def share_mounts_of(folder: Path) -> None:
    """Make mounts below `folder` appear in the namespaces that were copied from this one before (as slaves)."""
    if os.fsencode(folder) not in _targets():  # os.path.ismount does not see a folder bound to itself
        view.mount(folder, folder, flags=view.MS_BIND)
    view.mount("none", folder, flags=MS_SHARED)


def mount_overlay(layers: Sequence[Path], upper: Path, work: Path, target: Path) -> None:
    """`layers`: the topmost first. Raises OSError."""
    options = _overlay_options(layers, upper, work)
    if len(os.fsencode(options)) > MAX_OPTIONS_BYTES:
        with contextlib.ExitStack() as opened:
            short = [_short_name(layer, opened) for layer in layers]
            options = _overlay_options(short, upper, work)
            if len(os.fsencode(options)) > MAX_OPTIONS_BYTES:
                raise OSError(errno.ENAMETOOLONG, f"{len(layers)} layers are too many for a mount")
            _mount_overlay(options, target)
        return
    _mount_overlay(options, target)


def _overlay_options(layers: Sequence[Path], upper: Path, work: Path) -> str:
    lower = ":".join(_escaped(layer) for layer in layers)
    return f"lowerdir={lower},upperdir={_escaped(upper)},workdir={_escaped(work)},{OVERLAY_OPTIONS}"


def _short_name(folder: Path, opened: contextlib.ExitStack) -> Path:
    """One mount takes 4095 bytes of options: an open folder has a name of a few bytes."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    opened.callback(os.close, descriptor)
    return Path(f"/proc/self/fd/{descriptor}")


def _mount_overlay(options: str, target: Path) -> None:
    try:
        # What is written counts from the commit on, which copies it: no need to sync it to disk before.
        view.mount("overlay", target, "overlay", 0, f"{options},volatile")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        view.mount("overlay", target, "overlay", 0, options)


def unmount(target: Path, *, detach: bool = False) -> bool:
    """Whether nothing is mounted there any more; False while it is in use (`detach` takes it away all the same)."""
    flags = view.MNT_DETACH if detach else 0
    if _libc.umount2(os.fsencode(target), flags) == 0:
        return True
    return ctypes.get_errno() != errno.EBUSY


def unmount_below(folder: Path) -> None:
    """Detach what is mounted below `folder` (not on it): a predecessor was killed."""
    prefix = os.fsencode(folder) + b"/"
    for target in reversed(_targets()):
        if target.startswith(prefix):
            _libc.umount2(target, view.MNT_DETACH)


def unmount_leftovers(data_dir: Path) -> None:
    """Detach what workers that were killed have left. What somebody has mounted there himself stays."""
    volumes = data_dir / "volumes"
    for folder in (data_dir / "containers", data_dir / "runtime", volumes / "folders", volumes / "mounts"):
        unmount_below(folder)
    unmount(volumes / "mounts", detach=True)


def can_mount_overlays(folder: Path) -> bool:
    """Try it below `folder`."""
    probe = folder / "probe"
    try:
        for name in ("lower", "upper", "work", "merged"):
            (probe / name).mkdir(parents=True, exist_ok=True)
        mount_overlay([probe / "lower"], probe / "upper", probe / "work", probe / "merged")
    except OSError:
        return False
    finally:
        unmount(probe / "merged", detach=True)
        remove_tree(probe)
    return True


def _targets() -> list[bytes]:
    """Where something is mounted, in the order of mounting."""
    with open("/proc/self/mountinfo", "rb") as stream:
        return [_unescaped(line.split(b" ")[4]) for line in stream]


def _escaped(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def _unescaped(field: bytes) -> bytes:
    """mountinfo writes blanks, tabs, newlines and backslashes in octal."""
    for code, byte in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        field = field.replace(code, byte)
    return field
