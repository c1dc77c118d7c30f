"""The history of containers: each has a row from its start on, so that the next server knows what may still run."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import msgspec
from sqlalchemy.engine import Connection

from aeolian.control.container_state import Container
from aeolian.domain.clock import Clock
from aeolian.domain.containers import ExitStatus, Resources
from aeolian.domain.errors import AeolianError
from aeolian.storage import containers as storage
from aeolian.storage.database import Database

log = logging.getLogger(__name__)

KEPT_S = 7 * 24 * 3600.0
SWEEP_S = 300.0


class FinishedContainer(NamedTuple):
    """One that has ended."""

    task_id: str
    app_id: str
    function_id: str
    enqueued_at: float
    started_at: float
    finished_at: float
    exit_code: int
    reason: str


class ContainerHistory:
    """Written behind: nobody waits for it, and what a killed server did not write is told by the workers."""

    def __init__(self, database: Database, clock: Clock):
        self._database = database
        self._clock = clock
        self._tasks: set[asyncio.Task] = set()
        self._is_closed = False

    def open(self) -> None:
        self._behind(self._sweep_loop())

    async def close(self) -> None:
        self._is_closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- writing ----------------------------------------------------------------------------------------

    def begin(self, container: Container) -> None:
        """Before its worker is told. It may start before this is durable: one that no row tells of is ended."""
        row = {
            "task_id": container.task_id,
            "app_id": container.app_id,
            "function_id": container.function_id,
            "revision": container.revision,
            "environment_name": container.environment_name,
            "worker_id": container.worker_id,
            "image_id": container.image_id,
            "sdk_version": container.sdk_version,
            "resources": msgspec.msgpack.encode(container.resources),
            "enqueued_at": container.enqueued_at,
            "started_at": 0.0,
            "finished_at": 0.0,
            "exit_code": 0,
            "reason": "",
            "hooks": b"",
        }
        self._database.append_nowait(storage.insert, [row]).add_done_callback(_ignore)

    def running(self, container: Container) -> None:
        task_id, at, hooks = container.task_id, container.started_at, msgspec.msgpack.encode(container.hooks)
        self._write(lambda c: storage.update(c, task_id, started_at=at, hooks=hooks))

    def end(self, container: Container, exit: ExitStatus, reason: str) -> None:
        task_id, now, code = container.task_id, self._clock.now(), exit.exit_code
        self._write(lambda c: storage.update(c, task_id, finished_at=now, exit_code=code, reason=reason))

    # ---- reading ----------------------------------------------------------------------------------------

    async def unfinished(self) -> list[Container]:
        """Those that may still run, as they were when they were last written."""
        return [_container(row) for row in await self._database.read(storage.unfinished)]

    async def find(self, task_id: str) -> FinishedContainer | None:
        row = await self._database.read(lambda c: storage.get(c, task_id))
        if row is None:
            return None
        return FinishedContainer(*(getattr(row, name) for name in FinishedContainer._fields))

    # ---- inside -----------------------------------------------------------------------------------------

    def _write(self, fn: Callable[[Connection], None]) -> None:
        async def write() -> None:
            try:
                await self._database.write(fn)
            except AeolianError as error:
                log.warning("the history of a container could not be stored: %s", error)

        self._behind(write())

    def _behind(self, work) -> None:
        if self._is_closed:
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _sweep_loop(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._write(partial(storage.delete_finished_before, at=self._clock.now() - KEPT_S))


def _container(row) -> Container:
    container = Container(
        row.task_id,
        app_id=row.app_id,
        function_id=row.function_id,
        revision=row.revision,
        environment_name=row.environment_name,
        worker_id=row.worker_id,
        image_id=row.image_id,
        sdk_version=row.sdk_version,
        resources=msgspec.msgpack.decode(row.resources, type=Resources),
        enqueued_at=row.enqueued_at,
    )
    container.started_at, container.is_sent = row.started_at, True
    return container


def _ignore(future: asyncio.Future) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.warning("a container's start could not be recorded: %s", error)
