"""The log lines of one worker: taken in their order, told where they belong, acknowledged when they are stored."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from aeolian.control.containers import Containers
from aeolian.control.logs import AppLogs, LogPlace
from aeolian.domain.errors import AeolianError, Unavailable
from aeolian.domain.link import Logs

log = logging.getLogger(__name__)

RETRY_S = 0.5


class Images(Protocol):
    def log_place(self, image_id: str) -> LogPlace | None: ...

    async def find_log_place(self, image_id: str) -> LogPlace | None: ...

    def saved_from(self, function_id: str) -> tuple[str, str]: ...


class WorkerLogs:
    """Of one connection. Nothing overtakes: a batch that is stored says that those before it are, too.

    The worker bounds what is under way: it reads no more output while too much of it is unacknowledged.
    """

    def __init__(self, containers: Containers, images: Images, logs: AppLogs, acknowledge: Callable[[int], None]):
        self._containers = containers
        self._images = images
        self._logs = logs
        self._acknowledge = acknowledge
        self._waiting: deque[tuple[Logs, str]] = deque()
        """Batches from containers and builds that ended long ago: the database knows where they belong."""
        self._finding: asyncio.Task | None = None

    def take(self, event: Logs, life: str) -> None:
        """`life`: of the worker, within which it counts its batches."""
        if not self._waiting and (place := self._known(event)) is not None:
            self._store(event, life, place)
            return
        self._waiting.append((event, life))
        if self._finding is None:
            self._finding = asyncio.create_task(self._find_waiting(), name="worker-logs")

    async def close(self) -> None:
        """The worker repeats what it has no acknowledgement of."""
        if self._finding is not None:
            self._finding.cancel()
            await asyncio.gather(self._finding, return_exceptions=True)

    def _known(self, event: Logs) -> LogPlace | None:
        if event.image_id:
            return self._images.log_place(event.image_id)
        container = self._containers.get_lately(event.task_id)
        if container is None:
            return None
        image_id, build_id = self._images.saved_from(container.function_id)
        if image_id:
            return LogPlace(container.app_id, build_id, image_id=image_id)
        return LogPlace(container.app_id, event.task_id, container.function_id)

    async def _find_waiting(self) -> None:
        try:
            while self._waiting:
                event, life = self._waiting[0]
                try:
                    place = self._known(event) or await self._find(event)
                except AeolianError as error:
                    log.warning("log lines wait: %s", error)
                    await asyncio.sleep(RETRY_S)
                    continue
                self._waiting.popleft()
                if place is not None:
                    self._store(event, life, place)
                else:
                    self._acknowledge(event.seq)  # of a container that is forgotten
        finally:
            self._finding = None

    async def _find(self, event: Logs) -> LogPlace | None:
        if event.image_id:
            return await self._images.find_log_place(event.image_id)
        ended = await self._containers.history(event.task_id)
        return LogPlace(ended.app_id, event.task_id, ended.function_id) if ended is not None else None

    def _store(self, event: Logs, life: str, place: LogPlace) -> None:
        def stored(future: asyncio.Future[None]) -> None:
            if not future.cancelled() and future.exception() is None:
                self._acknowledge(event.seq)

        try:
            future = self._logs.deliver(
                place.app_id,
                place.task_id,
                place.function_id,
                event.lines,
                place.image_id,
                source=life,
                source_seq=event.seq,
            )
        except Unavailable:
            return  # shutting down
        future.add_done_callback(stored)
