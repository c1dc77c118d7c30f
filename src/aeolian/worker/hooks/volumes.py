"""The start hook of Volumes: attaches them, shows them to the container, and detaches them when it has ended."""

from aeolian.worker.hooks.base import Bind, Start
from aeolian.worker.volumes import WorkerVolumes

VOLUMES_TARGET = "/__modal/volumes"
"""Where clients look for the files of a volume that keep it from being reloaded."""


class VolumesHook:
    name = "volumes"

    def __init__(self, volumes: WorkerVolumes):
        self._volumes = volumes

    async def apply(self, start: Start) -> None:
        # A mount inside another one comes after it.
        mounts = sorted(start.spec.volumes, key=lambda mount: mount.path)
        for number, mount in enumerate(mounts):
            source = await self._volumes.attach(start.spec.task_id, mount)
            around = [outer for outer in mounts[:number] if mount.path.startswith(outer.path + "/")]
            if around:
                inside = mount.path.removeprefix(around[-1].path + "/")
                await self._volumes.make_mount_point(start.spec.task_id, around[-1].volume_id, inside)
            for target in (f"{VOLUMES_TARGET}/{mount.volume_id}", mount.path):
                start.binds.append(Bind(source, target, mount.read_only))

    async def undo(self, start: Start) -> None:
        await self._volumes.detach(start.spec.task_id)
