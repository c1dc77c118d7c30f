"""Base layers that are the same for every data directory of this machine, kept so that each is made once.

::

    /var/cache/aeolian/layers/<key>     a finished tree
    /var/cache/aeolian/.new-<token>     one being made; its maker holds a lock on the folder

A tree gets its place by one rename; whoever comes second throws its own away. Trees are never changed afterwards,
so data directories on the same disk take hard links of the files.
"""

import asyncio
import contextlib
import fcntl
import os
import secrets
import subprocess
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path

from aeolian.domain.errors import FailedPrecondition
from aeolian.worker.images.overlay_files import remove_tree

SYSTEM_FOLDER = Path("/var/cache/aeolian")


def default_cache_folder(environ=os.environ) -> Path:
    """For root the system's; else the user's own. `XDG_CACHE_HOME` decides where it is set."""
    if "XDG_CACHE_HOME" in environ:
        return Path(environ["XDG_CACHE_HOME"]) / "aeolian"
    return SYSTEM_FOLDER if os.getuid() == 0 else Path.home() / ".cache" / "aeolian"


class MachineCache:
    def __init__(self, folder: Path):
        self._folder = folder
        self._making: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def tree(self, key: str, make: Callable[[Path], Awaitable[None]]) -> Path:
        """The tree of that key; `make` fills an empty folder when there is none."""
        place = self._folder / "layers" / key
        async with self._making[key]:
            if place.is_dir():
                return place
            fresh, lock = await asyncio.to_thread(self._begin)
            try:
                await make(fresh / "tree")
                await asyncio.to_thread(self._keep, fresh / "tree", place)
            finally:
                await asyncio.to_thread(remove_tree, fresh)
                os.close(lock)
        return place

    def _begin(self) -> tuple[Path, int]:
        try:
            (self._folder / "layers").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FailedPrecondition(
                f"the cache folder {self._folder} cannot be made ({error.strerror}): set XDG_CACHE_HOME to another one"
            ) from None
        self._clear_leftovers()
        fresh = self._folder / f".new-{secrets.token_hex(8)}"
        fresh.mkdir(mode=0o700)
        lock = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        (fresh / "tree").mkdir(mode=0o755)
        return fresh, lock

    def _clear_leftovers(self) -> None:
        """What a killed maker left: nobody holds its lock any more."""
        for folder in self._folder.glob(".new-*"):
            with contextlib.suppress(OSError):
                lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_tree(folder)
                finally:
                    os.close(lock)

    def _keep(self, tree: Path, place: Path) -> None:
        try:
            os.rename(tree, place)
        except OSError:
            if not place.is_dir():
                raise


def copy_tree(source: Path, target: Path) -> None:
    """All of `source` into the new folder `target`: hard links on the same disk, else copies."""
    for how in ("--link", "--reflink=auto"):
        done = subprocess.run(
            ["cp", "-a", how, "-T", source, target], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode == 0:
            return
        remove_tree(target)
    raise FailedPrecondition(f"{source} could not be copied to {target}: {done.stderr.strip()[-300:]}")
