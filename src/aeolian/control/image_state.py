"""A build of an image as the server sees it while it is under way."""

import asyncio

from modal_proto import api_pb2

from aeolian.control.workers import Worker
from aeolian.domain.calls import Status
from aeolian.storage.images import Image


class BuildFailed(Exception):
    """The build has come to an end without an image."""

    def __init__(self, text: str, status: Status = Status.FAILURE):
        super().__init__(text)
        self.text = text
        self.status = status


class Build:
    """Owned by `ImageBuilds` from its start to its end."""

    def __init__(self, image: Image):
        self.image = image
        self.definition = api_pb2.Image()
        self.asking: dict[str, str] = {image.app_id: image.function_id}
        """Living Apps that want this image, each with its own copy of the Function that builds it (or "")."""
        self.worker: Worker | None = None
        """The connection over which the worker was told to build."""
        self.prefers = ""
        """The worker that needs the image."""
        self.brought: set[str] = set()
        """Base images that were built again for this build."""
        self.info: dict[str, str] | None = None
        """What the worker says of the finished image."""
        self.failure: BuildFailed | None = None
        self.ended_tasks: set[str] = set()
        """Containers of the build function that have ended."""
        self.woken = asyncio.Event()
        self.done = asyncio.Event()
        """Its end is stored."""

    @property
    def is_over(self) -> bool:
        return self.info is not None or self.failure is not None

    def succeed(self, info: dict[str, str]) -> None:
        if not self.is_over:
            self.info = info
            self.woken.set()

    def fail(self, failure: BuildFailed) -> None:
        if not self.is_over:
            self.failure = failure
            self.woken.set()

    def result(self) -> dict[str, str]:
        """Raises BuildFailed."""
        if self.failure is not None:
            raise self.failure
        assert self.info is not None
        return self.info

    async def changed(self, until: float | None = None) -> bool:
        """Wait to be woken; False when `until` (the event loop's time) comes first. Clear `woken` before looking."""
        try:
            async with asyncio.timeout_at(until):
                await self.woken.wait()
        except TimeoutError:
            return False
        return True
