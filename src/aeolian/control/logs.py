"""The logs of Apps: what containers wrote, kept in order, followed live, searched later.

Lines come in by `append`, which returns when they are in the database. One writer task numbers them, so that
the order of an app's lines is total, and stores everything that came in while it was busy in one transaction
(a burst costs a few large rows, not many small ones). Followers are handed committed lines from a short
memory; one that falls behind reads from the database. What was written earlier is searched by `log_history`.

    append --> pending (bounded) --> writer: number, store --> recent (bounded) --> followers
                                                  \\--> database --> followers behind
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

import msgspec

from aeolian.domain.clock import Clock
from aeolian.domain.errors import Unavailable
from aeolian.domain.link import LogLine
from aeolian.domain.logs import LogBatch, LogFilter, TaskChange, num_bytes
from aeolian.storage import logs as storage
from aeolian.storage.database import Database

log = logging.getLogger(__name__)

MAX_PENDING_BYTES = 32 << 20
"""`append` waits for the writer beyond this."""
MAX_BATCH_BYTES = 512 << 10
MAX_RECENT_BYTES = 4 << 20
MAX_RECENT_BATCHES = 500
"""Per followed app, both."""
MAX_REMEMBERED_APPS = 10_000
PAGE = 16
RETRY_S = 1.0


class LogPlace(NamedTuple):
    """Where the lines of a container or of a build are kept."""

    app_id: str
    task_id: str
    function_id: str = ""
    image_id: str = ""


class _Pending(NamedTuple):
    app_id: str
    task_id: str
    function_id: str
    image_id: str
    lines: tuple[LogLine, ...]
    is_end: bool
    source: str
    source_seq: int
    num_bytes: int
    done: asyncio.Future


class _Channel:
    """What the followers of one app share: the latest batches, and their wake-ups."""

    def __init__(self) -> None:
        self.recent: deque[LogBatch] = deque()
        self.num_bytes = 0
        self.followers: set[_Follower] = set()

    def put(self, batch: LogBatch) -> None:
        self.recent.append(batch)
        self.num_bytes += batch.num_bytes
        while len(self.recent) > 1 and (self.num_bytes > MAX_RECENT_BYTES or len(self.recent) > MAX_RECENT_BATCHES):
            self.num_bytes -= self.recent.popleft().num_bytes


class _Follower:
    def __init__(self) -> None:
        self.woken = asyncio.Event()
        self.changes: deque[TaskChange] = deque(maxlen=1000)


class AppLogs:
    """All log lines, by App."""

    def __init__(self, database: Database, clock: Clock, *, root_function_of: Callable[[str], str] = lambda id: id):
        """`root_function_of`: the Function that a variant was bound from (or its argument)."""
        self._database = database
        self._clock = clock
        self.root_function_of = root_function_of
        self._pending: deque[_Pending] = deque()
        self._pending_bytes = 0
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._next_seq: OrderedDict[str, int] = OrderedDict()
        self._marks: OrderedDict[str, int] = OrderedDict()
        self._channels: dict[str, _Channel] = {}
        self._writer: asyncio.Task | None = None
        self._closing = False

    async def open(self) -> None:
        self._writer = asyncio.create_task(self._write_loop(), name="app-logs")

    async def close(self) -> None:
        """Store what is pending, then stop."""
        self._closing = True
        self._work.set()
        self._room.set()
        if self._writer is not None:
            await self._writer
        for channel in self._channels.values():
            for follower in channel.followers:
                follower.woken.set()

    # ---- writing ----------------------------------------------------------------------------------------

    async def append(
        self,
        app_id: str,
        task_id: str,
        function_id: str,
        lines: Sequence[LogLine],
        image_id: str = "",
        *,
        source: str = "",
        source_seq: int = 0,
    ) -> None:
        """Keep these lines; returns when they are durable. Lines of one app keep the order of the calls.

        `source` and `source_seq` name the delivery: one that was stored already (its number is not higher
        than the highest of that source) is passed over. A source must count upwards over its whole life, so
        a worker that starts anew needs a new name.

        Raises Unavailable when the server shuts down before the lines are stored: deliver them again.
        """
        while self._pending_bytes > MAX_PENDING_BYTES and not self._closing:
            self._room.clear()
            await self._room.wait()
        await self.deliver(app_id, task_id, function_id, lines, image_id, source=source, source_seq=source_seq)

    def deliver(
        self,
        app_id: str,
        task_id: str,
        function_id: str,
        lines: Sequence[LogLine],
        image_id: str = "",
        *,
        source: str = "",
        source_seq: int = 0,
    ) -> asyncio.Future[None]:
        """As `append`, in its place before this returns; for sources that bound what they have under way."""
        return self._put(app_id, task_id, function_id, tuple(lines), image_id, False, source, source_seq)

    async def task_ended(self, app_id: str, task_id: str, function_id: str = "") -> None:
        """That container writes no more: those who follow only it come to their end."""
        await self._put(app_id, task_id, function_id, (), "", True, "", 0)

    def task_changed(self, app_id: str, task_id: str, function_id: str, state: int) -> None:
        """Tell followers that a container is in another TaskState."""
        channel = self._channels.get(app_id)
        for follower in channel.followers if channel else ():
            follower.changes.append(TaskChange(task_id, function_id, state))
            follower.woken.set()

    def wake(self, app_id: str) -> None:
        """Let followers look again whether the app has ended."""
        channel = self._channels.get(app_id)
        for follower in channel.followers if channel else ():
            follower.woken.set()

    def _put(self, app_id, task_id, function_id, lines, image_id, is_end, source, source_seq) -> asyncio.Future[None]:
        if self._closing or self._writer is None:
            raise Unavailable("the server is shutting down; deliver the log lines again")
        done = asyncio.get_running_loop().create_future()
        if not lines and not is_end:
            done.set_result(None)
            return done
        size = num_bytes(lines)
        self._pending.append(
            _Pending(app_id, task_id, function_id, image_id, lines, is_end, source, source_seq, size, done)
        )
        self._pending_bytes += size
        self._work.set()
        return done

    async def _write_loop(self) -> None:
        while True:
            if not self._pending:
                if self._closing:
                    return
                self._work.clear()
                await self._work.wait()
                continue
            taken = self._take()
            try:
                await self._store(taken)
            except Exception:
                if self._closing:
                    _fail(taken)
                    continue
                # Nothing may overtake these lines, so everybody waits until the database is well again.
                log.exception("log lines could not be stored; trying again in %.0f s", RETRY_S)
                self._pending.extendleft(reversed(taken))
                self._next_seq.clear()
                self._marks.clear()
                await asyncio.sleep(RETRY_S)
                continue
            self._pending_bytes -= sum(item.num_bytes for item in taken)
            self._room.set()
            for item in taken:
                if not item.done.done():
                    item.done.set_result(None)

    def _take(self) -> list[_Pending]:
        taken: list[_Pending] = []
        size = 0
        while self._pending and size < MAX_RECENT_BYTES:
            taken.append(self._pending.popleft())
            size += taken[-1].num_bytes
        return taken

    async def _store(self, taken: list[_Pending]) -> None:
        await self._learn(taken)
        marks: dict[str, int] = {}
        fresh: list[_Pending] = []
        for item in taken:
            if item.source:
                if item.source_seq <= max(marks.get(item.source, 0), self._marks.get(item.source, 0)):
                    continue
                marks[item.source] = item.source_seq
            fresh.append(item)
        fresh.sort(key=lambda item: item.app_id)  # stable: only the order within an app matters
        batches = self._number(fresh)
        await self._database.write(lambda connection: storage.insert_batches(connection, batches, marks))
        for source, seq in marks.items():
            self._marks[source] = seq
        self._forget_old()
        woken: set[_Channel] = set()
        for batch in batches:
            if (channel := self._channels.get(batch.app_id)) is not None:
                channel.put(batch)
                woken.add(channel)
        for channel in woken:
            for follower in channel.followers:
                follower.woken.set()

    def _number(self, items: list[_Pending]) -> list[LogBatch]:
        """Give the lines their numbers; neighbours of the same container share a batch."""
        batches: list[LogBatch] = []
        group: list[_Pending] = []
        group_bytes = 0
        for item in items:
            fits = group and _same_writer(group[-1], item) and group_bytes + item.num_bytes <= MAX_BATCH_BYTES
            if group and not fits:
                batches.append(self._batch(group))
                group, group_bytes = [], 0
            group.append(item)
            group_bytes += item.num_bytes
        if group:
            batches.append(self._batch(group))
        return batches

    def _batch(self, group: list[_Pending]) -> LogBatch:
        item = group[0]
        lines = item.lines if len(group) == 1 else tuple(line for member in group for line in member.lines)
        first = self._next_seq[item.app_id]
        last = first + max(1, len(lines)) - 1
        self._next_seq[item.app_id] = last + 1
        return LogBatch(
            app_id=item.app_id,
            first_seq=first,
            last_seq=last,
            task_id=item.task_id,
            function_id=item.function_id,
            root_function_id=self.root_function_of(item.function_id) if item.function_id else "",
            image_id=item.image_id,
            lines=lines,
            is_end=item.is_end,
            at=self._clock.now(),
        )

    async def _learn(self, taken: list[_Pending]) -> None:
        """Read where unknown apps and sources stand."""
        app_ids = sorted({item.app_id for item in taken} - self._next_seq.keys())
        sources = sorted({item.source for item in taken if item.source} - self._marks.keys())
        if not app_ids and not sources:
            return
        seqs, marks = await self._database.read(
            lambda connection: (storage.last_seqs(connection, app_ids), storage.get_marks(connection, sources))
        )
        for app_id in app_ids:
            self._next_seq[app_id] = seqs.get(app_id, 0) + 1
        for source in sources:
            self._marks[source] = marks.get(source, 0)

    def _forget_old(self) -> None:
        for known in (self._next_seq, self._marks):
            while len(known) > MAX_REMEMBERED_APPS:
                known.popitem(last=False)

    # ---- reading ----------------------------------------------------------------------------------------

    async def last_seq(self, app_id: str) -> int:
        """Number of the last stored line; 0 = none."""
        return (await self._database.read(lambda connection: storage.last_seqs(connection, [app_id]))).get(app_id, 0)

    async def has_task_ended(self, app_id: str, task_id: str) -> bool:
        return await self._database.read(lambda connection: storage.has_end(connection, app_id, task_id))

    async def follow(
        self,
        app_id: str,
        after: int,
        wanted: LogFilter,
        timeout_s: float,
        has_ended: Callable[[], bool],
    ) -> AsyncIterator[LogBatch | TaskChange | None]:
        """Batches with matching lines after line `after`, as they come; None, last, when there will be no more.

        Ends after `timeout_s` seconds, or (with None) when everything is delivered and `has_ended()`; `wake`
        makes it look. Image builds' lines are included.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        with self._following(app_id) as follower:
            while True:
                follower.woken.clear()
                ended = has_ended() or self._closing
                async for batch in self._after(app_id, after):
                    after = batch.last_seq
                    if lines := wanted.lines(batch):
                        yield msgspec.structs.replace(batch, lines=lines)
                    elif batch.is_end and batch.task_id == wanted.task_id:
                        ended = True
                while follower.changes:
                    change = follower.changes.popleft()
                    if not wanted.task_id or wanted.task_id == change.task_id:
                        yield change
                if ended:
                    if not self._closing:
                        yield None
                    return
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(follower.woken.wait(), left)

    async def _after(self, app_id: str, seq: int) -> AsyncIterator[LogBatch]:
        """Batches with lines after `seq`, cut to those lines: from memory where it reaches back, else stored ones."""
        channel = self._channels[app_id]
        while True:
            recent = channel.recent
            if recent and recent[0].first_seq <= seq + 1:
                batches = [batch for batch in recent if batch.last_seq > seq]
                at_end = True
            else:
                batches = await self._stored_after(app_id, seq)
                at_end = not batches
            for batch in batches:
                if batch.last_seq <= seq:
                    continue
                yield batch.after(seq)
                seq = batch.last_seq
            if at_end:
                return

    async def _stored_after(self, app_id: str, seq: int) -> list[LogBatch]:
        return await self._database.read(lambda connection: storage.batches_after(connection, app_id, seq, PAGE))

    @contextlib.contextmanager
    def _following(self, app_id: str):
        follower = _Follower()
        channel = self._channels.setdefault(app_id, _Channel())
        channel.followers.add(follower)
        try:
            yield follower
        finally:
            channel.followers.discard(follower)
            if not channel.followers:
                self._channels.pop(app_id, None)


def _same_writer(one: _Pending, other: _Pending) -> bool:
    return one[:4] == other[:4] and not (one.is_end or other.is_end)


def _fail(taken: list[_Pending]) -> None:
    for item in taken:
        if not item.done.done():
            item.done.set_exception(Unavailable("the server is shutting down; deliver the log lines again"))
