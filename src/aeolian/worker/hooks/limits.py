"""The start hook of limits: names the container's cgroup, and removes it when the container has ended.

The OCI runtime makes the group and sets its limits (`runtimes/oci_spec.py`).
"""

from aeolian.worker.cgroups import Cgroups
from aeolian.worker.hooks.base import Start


class LimitsHook:
    """`parent`: the group (`/aeolian-…`) below which all groups of this worker lie."""

    name = "limits"

    def __init__(self, cgroups: Cgroups, parent: str):
        self._cgroups = cgroups
        self._parent = parent

    async def apply(self, start: Start) -> None:
        start.cgroup = f"{self._parent}/{start.spec.task_id}"

    async def undo(self, start: Start) -> None:
        if start.cgroup:
            self._cgroups.remove(start.cgroup)
