"""Queues: each item goes to exactly one consumer, in the order of arrival within its partition.

The database decides who gets an item: all takes run in the one writer, and the taken items are kept with the
request's key in the same transaction, so that a repeated request gets the same ones. Memory (`queue_partitions`) only
knows how much there is, and who waits.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

from aeolian.control.named_objects import Environments, NamedObjects
from aeolian.control.queue_partitions import MAX_BYTES, MAX_ITEMS, QueuePartition
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import InvalidArgument, PayloadTooLarge, ResourceExhausted
from aeolian.storage import queues as storage
from aeolian.storage.database import Database, kept_reply
from aeolian.storage.named_objects import NamedObject

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_ITEM_BYTES = (1 << 20) + 1024
"""1 MiB of a user's, and what serializing adds."""
MAX_PARTITIONS = 100_000
MAX_PARTITION_KEY_BYTES = 64
MAX_TTL_S = 7 * 24 * 3600
DEFAULT_TTL_S = 24 * 3600
MAX_WAIT_S = 55.0
REPLY_MARGIN_S = 0.5
"""A put that waits for room is answered this long before its client gives it up, so that it hears why."""
MAX_TAKEN = 1000
MAX_SEEN = 100
MAX_REFUSED = 10_000
SWEEP_S = 30.0


class Queues:
    def __init__(self, database: Database, clock: Clock, environments: Environments):
        self._database = database
        self._clock = clock
        self.objects = NamedObjects("queue", database, clock, environments, self._delete_contents)
        self.objects.when_deleted.append(self._forget)
        self._partitions: dict[str, dict[bytes, QueuePartition]] = {}
        self._refused: OrderedDict[str, None] = OrderedDict()
        """Puts that found their partition full, the oldest first."""
        self._under_way: set[asyncio.Task] = set()
        self._seq = 0
        self._sweeper: asyncio.Task | None = None

    async def open(self) -> None:
        # Whoever looks through a queue asks for what is after a number, also across a restart.
        self._seq = max(await self._database.read(storage.last_seq), int(self._clock.now() * 1e6))
        for size in await self._database.read(storage.sizes):
            expires_at = size.expires_at or self._clock.now() + DEFAULT_TTL_S
            partition = QueuePartition(size.num_items, size.num_bytes, expires_at)
            self._partitions.setdefault(size.queue_id, {})[size.partition] = partition
        await self.objects.open()
        self._sweeper = asyncio.create_task(self._sweep_forever(), name="queue-partitions")

    async def close(self) -> None:
        await self.objects.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        await asyncio.gather(*self._under_way, return_exceptions=True)

    # ---- items ------------------------------------------------------------------------------------------

    async def put(self, queue_id: str, key: bytes, values: Sequence[bytes], caller: Caller, *, ttl_s: int = 0) -> None:
        """Append items to the partition named `key`; durable when this returns.

        Raises ResourceExhausted when the partition is full: at once the first time, so that a put that does not want
        to wait hears it. Who repeats the request wants to wait, and does so here.
        """
        _check_put(key, values, ttl_s)
        num_bytes = sum(map(len, values))
        deadline = self._clock.monotonic() + self._patience_s(caller)
        async with self._using(queue_id, key) as partition:
            while not partition.has_room(len(values), num_bytes):
                left = deadline - self._clock.monotonic()
                if left <= 0 or partition.is_gone:
                    if await self._answered_before(queue_id, caller, "QueuePut"):
                        return
                    self._remember_refusal(caller)
                    raise ResourceExhausted(
                        f"the queue is full: this partition has {partition.num_items:,} items of "
                        f"{partition.num_bytes:,} bytes; {MAX_ITEMS:,} items and {MAX_BYTES:,} bytes are the limits"
                    )
                await partition.wait_for_room(len(values), num_bytes, left)
            if not values:
                await self.objects.get(queue_id, caller)
                return
            partition.add(len(values), num_bytes)
            await self._finish(self._put(queue_id, key, partition, values, caller, ttl_s))

    async def _put(
        self, queue_id: str, key: bytes, partition: QueuePartition, values: Sequence[bytes], caller: Caller, ttl_s: int
    ) -> None:
        partition.expires_at = expires_at = self._clock.now() + (ttl_s or DEFAULT_TTL_S)
        items = [(self._seq + number, value) for number, value in enumerate(values, 1)]
        self._seq += len(items)

        def put(connection: Connection) -> int:
            self.objects.existing(connection, queue_id, caller)
            storage.put(connection, queue_id, key, items, expires_at)
            return items[0][0]

        is_there = False
        try:
            first = await self._database.write(put, once=caller.once("QueuePut"))
            is_there = first == items[0][0]  # else an earlier attempt of the same request has put them
        finally:
            if is_there:
                partition.arrived(len(items))
            else:
                partition.remove(len(items), sum(map(len, values)))

    async def take(self, queue_id: str, key: bytes, count: int, caller: Caller, *, wait_s: float = 0.0) -> list[bytes]:
        """Up to `count` of the oldest items, waiting for the first one. The same request gets the same items."""
        _check_key(key)
        count = max(1, min(count, MAX_TAKEN))
        deadline = self._clock.monotonic() + min(max(0.0, wait_s), MAX_WAIT_S)
        async with self._using(queue_id, key) as partition:
            values = [] if partition.has_items else await self._answered_before(queue_id, caller, "QueueGet") or []
            while not values:
                if promised := partition.promise(count):
                    values = await self._finish(self._take(queue_id, key, partition, promised, caller))
                    continue
                left = deadline - self._clock.monotonic()
                if left <= 0:
                    break
                if partition.is_gone:
                    await self.objects.get(queue_id, caller)
                await partition.wait_for_items(left)
            return values

    async def _take(
        self, queue_id: str, key: bytes, partition: QueuePartition, promised: int, caller: Caller
    ) -> list[bytes]:
        """From the database. Nothing is kept of a request that found nothing: its next attempt may find something."""
        taken: list[bytes] = []

        def take(connection: Connection) -> list[bytes]:
            self.objects.existing(connection, queue_id, caller)
            taken[:] = storage.take(connection, queue_id, key, promised)
            if not taken:
                raise _Empty
            return taken

        try:
            return await self._database.write(take, once=caller.once("QueueGet"))
        except _Empty:
            return []
        except BaseException:
            taken.clear()
            raise
        finally:
            partition.keep_promise(promised)
            partition.remove(len(taken), sum(map(len, taken)))

    async def _answered_before(self, queue_id: str, caller: Caller, method: str) -> Any:
        """What an earlier attempt of the same request was answered, or None. Raises NotFound when the Queue is gone."""
        once = caller.once(method)

        def read(connection: Connection) -> Any:
            self.objects.existing(connection, queue_id, caller)
            return kept_reply(connection, once) if once else None

        return await self._database.read(read)

    async def after(
        self, queue_id: str, key: bytes, last_seq: int, caller: Caller, *, wait_s: float
    ) -> list[tuple[int, bytes]]:
        """Look at the items after number `last_seq` without taking them."""
        _check_key(key)
        deadline = self._clock.monotonic() + min(max(0.0, wait_s), MAX_WAIT_S)

        def read(connection: Connection) -> list[tuple[int, bytes]]:
            self.objects.existing(connection, queue_id, caller)
            return storage.after(connection, queue_id, key, last_seq, MAX_SEEN)

        async with self._using(queue_id, key) as partition:
            while True:
                num_arrivals = partition.num_arrivals
                items = await self._database.read(read)
                left = deadline - self._clock.monotonic()
                if items or left <= 0:
                    return items
                if partition.num_arrivals == num_arrivals:
                    await partition.wait_for_arrival(left)

    async def count(self, queue_id: str, key: bytes, caller: Caller, *, total: bool) -> int:
        _check_key(key)
        item = await self.objects.get(queue_id, caller)
        if total:
            return self.summary(item)[1]
        async with self._using(queue_id, key) as partition:
            return partition.num_items

    async def clear(self, queue_id: str, key: bytes, caller: Caller, *, all_partitions: bool) -> None:
        if all_partitions and key:
            raise InvalidArgument("clear either one partition or all of them: name none with `all`")
        _check_key(key)
        await self.objects.get(queue_id, caller)
        await self._finish(self._clear(queue_id, None if all_partitions else key))

    def summary(self, item: NamedObject) -> tuple[int, int]:
        """(number of partitions with items, number of items)"""
        now = self._clock.now()
        partitions = self._partitions.get(item.object_id, {}).values()
        sizes = [partition.num_items for partition in partitions if not partition.is_expired(now)]
        return sum(1 for size in sizes if size), sum(sizes)

    # ---- inside -----------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _using(self, queue_id: str, key: bytes) -> AsyncIterator[QueuePartition]:
        """What memory knows of a partition; it is not forgotten meanwhile."""
        partitions = self._partitions.setdefault(queue_id, {})
        if key not in partitions and len(partitions) >= MAX_PARTITIONS:
            raise ResourceExhausted(f"the queue has {MAX_PARTITIONS:,} partitions already, which is the limit")
        partition = partitions.setdefault(key, QueuePartition())
        partition.num_users += 1
        try:
            await self._expire(queue_id, key, partition)
            yield partition
        finally:
            partition.num_users -= 1
            self._drop_unused(queue_id, key)

    def _drop_unused(self, queue_id: str, key: bytes) -> None:
        partitions = self._partitions.get(queue_id, {})
        if key in partitions and partitions[key].is_unused:
            del partitions[key]
        if not partitions:
            self._partitions.pop(queue_id, None)

    async def _expire(self, queue_id: str, key: bytes, partition: QueuePartition) -> None:
        """Clear a partition whose time is over. Whoever comes next need not: the writer keeps the order."""
        expires_at = partition.expires_at
        if not partition.is_expired(self._clock.now()):
            return
        partition.expires_at = 0.0
        try:
            await self._finish(self._clear(queue_id, key))
        except BaseException:
            partition.expires_at = partition.expires_at or expires_at
            raise

    async def _clear(self, queue_id: str, key: bytes | None) -> None:
        for size in await self._database.write(lambda c: storage.clear(c, queue_id, key)):
            if (partition := self._partitions.get(queue_id, {}).get(size.partition)) is not None:
                partition.remove(size.num_items, size.num_bytes)

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """What is begun goes to its end, also when the caller goes away: memory must follow the database."""
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # who waited has it; who went away does not want it

    def _patience_s(self, caller: Caller) -> float:
        """How long a put waits for room: not at all, but for one that was refused before and is repeated."""
        once = caller.once("QueuePut")
        if once is None or once not in self._refused:
            return 0.0
        del self._refused[once]
        left = MAX_WAIT_S if caller.time_left_s is None else caller.time_left_s - REPLY_MARGIN_S
        return min(left, MAX_WAIT_S)

    def _remember_refusal(self, caller: Caller) -> None:
        if once := caller.once("QueuePut"):
            self._refused[once] = None
            while len(self._refused) > MAX_REFUSED:
                self._refused.popitem(last=False)

    def _delete_contents(self, connection: Connection, queue_id: str) -> None:
        storage.clear(connection, queue_id)

    def _forget(self, queue_id: str) -> None:
        for partition in self._partitions.pop(queue_id, {}).values():
            partition.end()

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self.sweep()
            except Exception:
                log.exception("old partitions of queues could not be cleared; the next sweep tries again")

    async def sweep(self) -> None:
        """Clear partitions that nothing was put into for longer than they are kept."""
        now = self._clock.now()
        for queue_id, partitions in list(self._partitions.items()):
            for key, partition in list(partitions.items()):
                await self._expire(queue_id, key, partition)
                self._drop_unused(queue_id, key)
        await self._database.write(lambda c: storage.forget_partitions(c, now))


class _Empty(Exception):
    """Somebody has cleared the partition: roll back, keep no answer."""


def _check_key(key: bytes) -> None:
    if len(key) > MAX_PARTITION_KEY_BYTES:
        raise InvalidArgument(f"a partition's name has up to {MAX_PARTITION_KEY_BYTES} bytes, not {len(key)}")


def _check_put(key: bytes, values: Sequence[bytes], ttl_s: int) -> None:
    _check_key(key)
    if not 0 <= ttl_s <= MAX_TTL_S:
        raise InvalidArgument(f"a partition can be kept for up to {MAX_TTL_S:,} s (7 days), not {ttl_s:,} s")
    for value in values:
        if len(value) > MAX_ITEM_BYTES:
            raise PayloadTooLarge(
                f"an item of {len(value):,} serialized bytes is too large: {MAX_ITEM_BYTES:,} is the limit; "
                "put large data into a Volume or a Dict (status = '413')"
            )
    if len(values) > MAX_ITEMS or sum(map(len, values)) > MAX_BYTES:
        raise ResourceExhausted(
            f"{len(values):,} items of {sum(map(len, values)):,} bytes do not fit: a partition has up to "
            f"{MAX_ITEMS:,} items and {MAX_BYTES:,} bytes; put fewer at a time"
        )
