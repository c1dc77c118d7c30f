"""The start hook of limits: names the container's cgroup, and removes it when the container has ended.

The OCI runtime makes the group and sets its limits (`runtimes/oci_spec.py`).
"""

from collections.abc import Callable

from aeolian.worker.cgroups import Cgroups
from aeolian.worker.hooks.base import Start


class LimitsHook:
    """`path_of`: which group a container (by its id) gets."""

    name = "limits"

    def __init__(self, cgroups: Cgroups, path_of: Callable[[str], str]):
        self._cgroups = cgroups
        self._path_of = path_of

    async def apply(self, start: Start) -> None:
        start.cgroup = self._path_of(start.spec.task_id)

    async def undo(self, start: Start) -> None:
        if start.cgroup:
            self._cgroups.remove(start.cgroup)
