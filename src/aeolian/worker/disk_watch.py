"""The limit of what a container writes to its own files: the worker looks at the disk, and ends who fills it.

Nothing wakes anybody when a disk fills, so what each container has written is counted again and again: every second,
or less often where counting takes long.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

LOOK_PAUSE_S = 1.0
COUNTING_SHARE = 20
"""Counting takes at most one part in so many of the time."""
DEFAULT_MAX_BYTES = 512 << 30
"""Of a container that asks for no `ephemeral_disk`; as on Modal."""
MAX_RESERVE_BYTES = 1 << 30
RESERVE_SHARE = 20
"""One part in so many of a disk stays free for Aeolian itself, up to MAX_RESERVE_BYTES."""
BLOCK_BYTES = 512


class Writer(NamedTuple):
    """A running container: where its own files lie, and how large they may become."""

    task_id: str
    folder: Path
    max_bytes: int
    end: Callable[[str], None]
    """Ends it; is told why."""


class Disk(NamedTuple):
    free_bytes: int
    reserve_bytes: int


class DiskWatch:
    def __init__(self, folder: Path, writers: Callable[[], Sequence[Writer]]):
        """`folder`: on the disk that is looked at."""
        self._folder = folder
        self._writers = writers
        self._task: asyncio.Task | None = None

    def open(self) -> None:
        self._task = asyncio.create_task(self._run(), name="disk-watch")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = LOOK_PAUSE_S
        while True:
            await asyncio.sleep(pause_s)
            began = loop.time()
            with contextlib.suppress(OSError):
                await self.look(disk_of(self._folder))
            pause_s = max(LOOK_PAUSE_S, COUNTING_SHARE * (loop.time() - began))

    async def look(self, disk: Disk) -> None:
        """Once: count, and end who wrote too much."""
        writers = list(self._writers())
        if not writers:
            return
        sizes = await asyncio.to_thread(lambda: {it.task_id: size_of(it.folder) for it in writers})
        for writer, why in too_large(writers, sizes, disk):
            log.warning("%s is ended: it %s", writer.task_id, why)
            writer.end(why)


def too_large(writers: Sequence[Writer], sizes: dict[str, int], disk: Disk) -> list[tuple[Writer, str]]:
    """Who is to be ended, and why: those above their limits; and of a disk that is nearly full, the largest."""
    found = [
        (it, f"wrote {gib(sizes[it.task_id])} to its own files, and may write {gib(it.max_bytes)}")
        for it in writers
        if sizes[it.task_id] > it.max_bytes
    ]
    if found or disk.free_bytes > disk.reserve_bytes or not writers:
        return found
    largest = max(writers, key=lambda it: sizes[it.task_id])
    if sizes[largest.task_id] < disk.reserve_bytes:
        return []  # somebody else fills the disk
    return [(largest, f"wrote {gib(sizes[largest.task_id])} to its own files, and this machine's disk is full")]


def disk_of(folder: Path) -> Disk:
    status = os.statvfs(folder)
    total = status.f_blocks * status.f_frsize
    return Disk(status.f_bavail * status.f_frsize, min(MAX_RESERVE_BYTES, total // RESERVE_SHARE))


def size_of(folder: Path) -> int:
    """The blocks of the files below it. What disappears meanwhile does not count."""
    total, waiting = 0, [os.fspath(folder)]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * BLOCK_BYTES
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
    return total


def gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes >> 20} MiB"
