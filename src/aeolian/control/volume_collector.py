"""Frees the disk of what no Volume names any more: within moments of its removal, and by a look at everything each hour.

Content that somebody is about to name must stay. Who stores it in one go is inside `VolumeFiles.in_use`; who uploads
it block by block has a promise here, until the upload is committed.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from aeolian.domain.clock import Clock
from aeolian.storage import volumes as storage
from aeolian.storage.database import Database
from aeolian.storage.volume_files import VolumeFiles
from aeolian.storage.volumes import Dropped

log = logging.getLogger(__name__)

GATHER_S = 1.0
"""Removals that come one after another are looked at together."""
BUSY_S = 2.0
COLLECT_ALL_S = 3600.0
PROMISED_S = 24 * 3600.0
LENT_S = 60.0
LENT_BYTES_PER_S = 4 << 20
"""A download of a file that is removed meanwhile has a minute, and the time for its bytes at this rate."""
BATCH = 1000
LARGE_BYTES = 16 << 20
"""Workers are told of a Volume that still is when it has lost so much."""


class VolumeCollector:
    def __init__(self, database: Database, clock: Clock, files: VolumeFiles):
        self.when_freed: list[Callable[[Sequence[str]], None]] = []
        """Called with the ids of Volumes that have lost much: whoever keeps an older version of them may let it go."""
        self._database = database
        self._clock = clock
        self._files = files
        self._promised: dict[str, float] = {}
        self._lent: dict[str, float] = {}
        self._dropped = asyncio.Event()
        self._tasks: list[asyncio.Task] = []

    async def open(self) -> None:
        self._dropped.set()  # an earlier life may have left something
        for work, name in ((self._free_forever(), "volumes-free"), (self._collect_forever(), "volumes-collect")):
            self._tasks.append(asyncio.create_task(work, name=name))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def wake(self) -> None:
        """A Volume has changed or is gone."""
        self._dropped.set()

    def promise(self, uploads: Iterable[Iterable[str]]) -> None:
        """Contents under these ids are wanted for an upload that is not committed yet."""
        until = self._clock.now() + PROMISED_S
        self._promised.update((content, until) for contents in uploads for content in contents)

    def keep_promise(self, uploads: Iterable[Iterable[str]]) -> None:
        """The upload is committed."""
        for contents in uploads:
            for content in contents:
                self._promised.pop(content, None)

    def lend(self, content: str, size_bytes: int) -> None:
        """Somebody begins to download it, and may go on when its file is removed or replaced meanwhile."""
        self._lent[content] = self._clock.now() + LENT_S + size_bytes / LENT_BYTES_PER_S

    # ---- what was removed -------------------------------------------------------------------------------

    async def _free_forever(self) -> None:
        pause: float | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._dropped.wait()
            await asyncio.sleep(GATHER_S)
            self._dropped.clear()
            try:
                pause = await self.free()
            except Exception:
                pause = None
                log.exception("the content of removed files could not be deleted; the next removal tries again")

    async def free(self) -> float | None:
        """Delete what no Volume names any more, of what was removed.

        Returns after how many seconds there may be more to delete, or None.
        """
        pauses: list[float] = []
        after = ""
        while page := await self._database.read(partial(storage.list_dropped, after=after, limit=BATCH)):
            after = page[-1].content
            volume_ids = {item.volume_id for item in page}
            existing = await self._database.read(partial(storage.existing_ids, volume_ids=volume_ids))
            now = self._clock.now()
            lent = {item for item in page if item.volume_id in existing and self._lent.get(item.content, 0.0) > now}
            pauses += [self._lent[item.content] - now for item in lent]
            ready = [item for item in page if item not in lent]
            freed = await asyncio.to_thread(self._delete, ready)
            if freed is None:
                return BUSY_S
            await self._database.write(partial(storage.forget_dropped, contents=[item.content for item in ready]))
            self._tell(
                [volume_id for volume_id, size in freed.items() if size >= LARGE_BYTES or volume_id not in existing]
            )
        self._lent = {content: until for content, until in self._lent.items() if until > self._clock.now()}
        return min(pauses, default=None)

    def _delete(self, dropped: Sequence[Dropped]) -> dict[str, int] | None:
        """Bytes deleted by Volume; None, and nothing deleted, while somebody is storing."""
        with self._files.nobody_stores() as is_quiet:
            if not is_quiet:
                return None
            # Asked in here: who stores from now on waits, who stored before has named it.
            contents = [item.content for item in dropped]
            named = self._database.read_now(partial(storage.named_contents, contents=contents))
            gone: dict[str, set[str]] = {}
            for item in dropped:
                if item.content not in named and item.content not in self._promised:
                    gone.setdefault(item.volume_id, set()).add(item.content)
            return {volume_id: self._files.delete(contents) for volume_id, contents in gone.items()}

    def _tell(self, volume_ids: Sequence[str]) -> None:
        if volume_ids:
            for callback in self.when_freed:
                callback(volume_ids)

    # ---- what was never named ---------------------------------------------------------------------------

    async def _collect_forever(self) -> None:
        while True:
            await asyncio.sleep(COLLECT_ALL_S)
            try:
                await self.collect()
            except Exception:
                log.exception("collecting the volumes' unused content failed; the next turn tries again")

    async def collect(self) -> int:
        """Delete content that no volume names and that nobody has touched for a day; return how many files."""
        now = self._clock.now()
        self._promised = {content: until for content, until in self._promised.items() if until > now}
        referenced = await self._database.read(storage.referenced_contents)
        return await asyncio.to_thread(self._files.collect, referenced | self._promised.keys())
