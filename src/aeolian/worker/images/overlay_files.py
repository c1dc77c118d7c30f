"""Trees as overlayfs keeps them: removed files are character devices 0:0, work folders may be listed by nobody."""

import contextlib
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path


def remove_tree(folder: Path) -> None:
    """Delete a tree with folders that even their owner may not list, as overlays' work folders are. Never raises."""
    if os.geteuid() != 0:  # root may list everything
        _open(folder)
        for path, names, _ in os.walk(folder):  # from the top: what is opened here can be entered next
            for name in names:
                _open(Path(path, name))
    shutil.rmtree(folder, ignore_errors=True)


def _open(folder: Path) -> None:
    with contextlib.suppress(OSError):
        mode = folder.lstat().st_mode
        if stat.S_ISDIR(mode) and mode & 0o700 != 0o700:
            folder.chmod(0o700)


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
