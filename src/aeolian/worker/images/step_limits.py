"""What the steps of image builds may use up together: processes, so that none forks without end, and memory.

They share one cgroup below each controller (`/aeolian-<key>-builds/<step>`). Where there are none, nothing is limited.
"""

import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from aeolian.worker.cgroups import CgroupKind, Cgroups

log = logging.getLogger(__name__)

MAX_PIDS = 16_384
SHARES = 512
"""Half of what a container has that asks for a core: builds wait rather than calls."""
MEMORY_PARTS = 10
"""A step may have all memory of the machine but one part in so many."""
CLEAR_TIMEOUT_S = 5.0


class StepLimits:
    """`data_dir`: whose builds these are, so that workers don't mix. What a predecessor left is removed."""

    def __init__(self, data_dir: Path, cgroups: Cgroups | None = None):
        self._cgroups = cgroups or Cgroups()
        self._parent = f"/aeolian-{hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:12]}-builds"
        self._numbers = itertools.count(1)
        self._num_running = 0
        self.are_there = self._cgroups.kind is not CgroupKind.NONE and not self._cgroups.missing_controllers()
        if self.are_there:
            self._cgroups.kill(self._parent, CLEAR_TIMEOUT_S)
            self._cgroups.remove(self._parent)

    @contextlib.contextmanager
    def around(self, pid: int) -> Iterator[None]:
        """For a process that has no children yet. It must have ended when this ends."""
        if not self.are_there:
            yield
            return
        group = f"{self._parent}/{next(self._numbers)}"
        max_bytes = memory_bytes() * (MEMORY_PARTS - 1) // MEMORY_PARTS
        self._num_running += 1
        try:
            self._cgroups.create(
                group, {"cpu": {"shares": SHARES}, "memory": {"limit": max_bytes}, "pids": {"limit": MAX_PIDS}}
            )
            self._cgroups.join(group, pid)
        except OSError as error:
            log.warning("this step of a build is not limited: %s", error)
        try:
            yield
        finally:
            self._num_running -= 1
            self._cgroups.remove(group if self._num_running else self._parent)


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
