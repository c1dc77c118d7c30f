"""Trees as overlayfs keeps them: removed files are character devices 0:0, work folders may be listed by nobody."""

import contextlib
import os
import shutil
import stat
from pathlib import Path


def remove_tree(folder: Path) -> None:
    """Delete a tree that may hold an overlay's work folder. Never raises."""
    for work in (folder / "work", *folder.glob("work/*"), *folder.glob("*/work")):
        with contextlib.suppress(OSError):
            work.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def drop_mount_points(upper: Path, targets: list[str]) -> None:
    """Folders and files that were made only as places to mount on: gone, where nothing was written into them."""
    for target in sorted(targets, key=len, reverse=True):
        place = upper / target.lstrip("/")
        with contextlib.suppress(OSError):
            if place.is_dir() and not place.is_symlink():
                place.rmdir()
            elif place.is_file() and place.stat().st_size == 0:
                place.unlink()
        parent = place.parent
        while parent != upper and upper in parent.parents:
            try:
                parent.rmdir()
            except OSError:
                break
            parent = parent.parent


def import_oci_whiteouts(tree: Path) -> None:
    """A layer of a registry marks what it removes by `.wh.` files; overlayfs wants devices and an attribute."""
    for folder, _, names in os.walk(tree):
        for name in names:
            if not name.startswith(".wh."):
                continue
            marker = Path(folder, name)
            marker.unlink()
            if name == ".wh..wh..opq":
                os.setxattr(folder, "trusted.overlay.opaque", b"y")
                continue
            place = Path(folder, name.removeprefix(".wh."))
            if not os.path.lexists(place):
                os.mknod(place, stat.S_IFCHR | 0o000, 0)
