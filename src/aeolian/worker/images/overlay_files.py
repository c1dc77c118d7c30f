"""Trees as overlayfs keeps them: removed files are character devices 0:0, work folders may be listed by nobody."""

import contextlib
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path


def remove_tree(folder: Path) -> None:
    """Delete a tree that may hold an overlay's work folder. Never raises."""
    for work in (folder / "work", *folder.glob("work/*"), *folder.glob("*/work")):
        with contextlib.suppress(OSError):
            work.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def drop_mount_points(upper: Path, targets: Sequence[str]) -> None:
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


def drop_view_folders(tree: Path, layers: Sequence[Path]) -> None:
    """A view over the host's folders makes links (/bin) and folders to mount on at its top; none belongs to a layer."""
    for entry in list(os.scandir(tree)):
        below = [Path("/", entry.name), *(layer / entry.name for layer in layers)]
        if entry.is_symlink():
            if any(place.is_symlink() and os.readlink(place) == os.readlink(entry.path) for place in below):
                os.unlink(entry.path)
        elif entry.is_dir() and any(place.is_dir() for place in below):
            with contextlib.suppress(OSError):
                os.rmdir(entry.path)
