"""What this host lets image builds do."""

import asyncio
import os
from pathlib import Path
from typing import NamedTuple

from aeolian.worker import mounting
from aeolian.worker.runtimes.process import find_capabilities


class Mode(NamedTuple):
    name: str
    """`whole`: an image is a root file system of its own (root, overlayfs). `over_host`: its layers lie over the
    host's own folders, in a user namespace. `portable`: there are no namespaces; only packages can be installed."""
    own_pids: bool = True
    """Whether /proc can show a step's own processes alone."""
    problem: str = ""
    """Why nothing better is possible."""

    @property
    def is_whole(self) -> bool:
        return self.name == "whole"


WHOLE = Mode("whole")


async def find_mode(folder: Path) -> Mode:
    """The best that works, tried below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.getuid() == 0 and await asyncio.to_thread(mounting.can_mount_overlays, folder):
        return WHOLE
    capabilities = await find_capabilities(folder)
    if capabilities.has_views and capabilities.user_namespace:
        return Mode("over_host", capabilities.own_pids, "Aeolian does not run as root")
    return Mode("portable", own_pids=False, problem=capabilities.problem)
