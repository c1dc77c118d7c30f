"""Stored log lines by time: the last ones, and how many there were. Filtering runs beside the event loop."""

from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import msgspec

from aeolian.domain.link import LogLine
from aeolian.domain.logs import LogBatch, LogFilter
from aeolian.storage import logs as storage
from aeolian.storage.database import Database

PAGE = 16
T = TypeVar("T")

Counts = dict[int, dict[int, int]]
"""Start of a bucket (epoch seconds) -> file descriptor -> number of lines."""


class LogHistory:
    """What the database holds of an app's lines."""

    def __init__(self, database: Database):
        self._database = database

    async def tail(self, app_id: str, since: float, until: float, limit: int, wanted: LogFilter) -> list[LogBatch]:
        """The last `limit` matching lines written in [since, until), in order."""
        found: list[LogBatch] = []

        def matching(batch: LogBatch) -> LogBatch | None:
            lines = _in_time(wanted.lines(batch), since, until)
            return msgspec.structs.replace(batch, lines=lines) if lines else None

        async for page in self._latest_first(app_id, since, until, matching):
            for batch in page:
                if batch is not None and limit > 0:
                    lines = batch.lines[-limit:]
                    limit -= len(lines)
                    found.append(msgspec.structs.replace(batch, lines=lines))
            if limit <= 0:
                break
        found.reverse()
        return found

    async def count(self, app_id: str, since: float, until: float, bucket_s: int, wanted: LogFilter) -> Counts:
        """Matching lines in [since, until), by buckets that begin at multiples of `bucket_s`."""

        def counted(batch: LogBatch) -> Counts:
            counts: Counts = {}
            for line in _in_time(wanted.lines(batch), since, until):
                bucket = counts.setdefault(int(line.at // bucket_s) * bucket_s, {})
                bucket[line.fd] = bucket.get(line.fd, 0) + 1
            return counts

        total: Counts = {}
        async for page in self._latest_first(app_id, since, until, counted):
            for counts in page:
                for start, by_fd in counts.items():
                    bucket = total.setdefault(start, {})
                    for fd, number in by_fd.items():
                        bucket[fd] = bucket.get(fd, 0) + number
        return total

    async def _latest_first(
        self, app_id: str, since: float, until: float, take: Callable[[LogBatch], T]
    ) -> AsyncIterator[list[T]]:
        """Pages of `take(batch)` for the stored batches that touch [since, until)."""
        before: int | None = None

        def read_page(connection) -> tuple[int, int | None, list[T]]:
            page = storage.batches_between(connection, app_id, since, until, before, PAGE)
            return len(page), page[-1].first_seq if page else None, [take(batch) for batch in page]

        while True:
            num_batches, before, taken = await self._database.read(read_page)
            yield taken
            if num_batches < PAGE:
                return


def _in_time(lines: tuple[LogLine, ...], since: float, until: float) -> tuple[LogLine, ...]:
    return tuple(line for line in lines if since <= line.at < until)
