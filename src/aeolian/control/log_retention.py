"""Log lines of Apps are kept for a while, then deleted: a little at a time, so that nobody waits."""

import asyncio
import logging
from functools import partial

from aeolian.control.apps import Apps
from aeolian.domain.clock import Clock
from aeolian.storage import logs as storage
from aeolian.storage.database import Database

log = logging.getLogger(__name__)

EVERY_S = 3600.0
PORTION = 500
PAUSE_S = 0.05


class LogRetention:
    def __init__(self, database: Database, clock: Clock, apps: Apps, max_age_s: float):
        """`max_age_s`: 0 keeps everything."""
        self._database = database
        self._clock = clock
        self._apps = apps
        self._max_age_s = max_age_s
        self._task: asyncio.Task | None = None

    def open(self) -> None:
        """Look at once, and then each hour."""
        if self._max_age_s:
            self._task = asyncio.create_task(self._run(), name="log-retention")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                if num_deleted := await self.delete_old():
                    log.info("deleted %d pieces of logs that are too old to keep", num_deleted)
            except Exception:
                log.exception("old logs could not be deleted; the next turn tries again")
            await asyncio.sleep(EVERY_S)

    async def delete_old(self) -> int:
        """Returns how many batches of lines are gone. The last one of a living App stays: its number goes on."""
        before, num_deleted = self._clock.now() - self._max_age_s, 0
        for app_id in await self._database.read(storage.app_ids):
            delete = partial(
                storage.delete_older,
                app_id=app_id,
                before=before,
                keep_last=not self._apps.is_over(app_id),
                limit=PORTION,
            )
            while num := await self._database.write(delete):
                num_deleted += num
                await asyncio.sleep(PAUSE_S)
        return num_deleted
