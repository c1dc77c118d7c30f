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


def drop_host_links(tree: Path) -> None:
    """A view over the host's folders has the host's top-level links (/bin) and folders; none belongs to a layer."""
    for entry in list(os.scandir(tree)):
        host = f"/{entry.name}"
        if entry.is_symlink():
            if os.path.islink(host) and os.readlink(host) == os.readlink(entry.path):
                os.unlink(entry.path)
        elif entry.is_dir() and os.path.isdir(host):
            with contextlib.suppress(OSError):
                os.rmdir(entry.path)
