"""Queues: each item goes to exactly one consumer, in the order of arrival within its partition.

The database decides who gets an item: all takes run in the one writer, and the taken items are kept with the
request's key in the same transaction, so that a repeated request gets the same ones. Memory only knows how many items
there are, and who waits.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Sequence

from sqlalchemy.engine import Connection

from aeolian.control.named_objects import Environments, NamedObjects
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import InvalidArgument, PayloadTooLarge, ResourceExhausted
from aeolian.storage import queues as storage
from aeolian.storage.database import Database, kept_reply
from aeolian.storage.named_objects import NamedObject

log = logging.getLogger(__name__)

MAX_ITEMS = 5000
"""Per partition."""
MAX_ITEM_BYTES = 1 << 20
MAX_PARTITIONS = 100_000
MAX_PARTITION_KEY_BYTES = 64
MAX_TTL_S = 7 * 24 * 3600
DEFAULT_TTL_S = 24 * 3600
MAX_WAIT_S = 55.0
MAX_TAKEN = 1000
SWEEP_S = 30.0
KNOWN_QUEUES = 10_000

Partition = tuple[str, bytes]


class Queues:
    def __init__(self, database: Database, clock: Clock, environments: Environments):
        self._database = database
        self._clock = clock
        self.objects = NamedObjects("queue", database, clock, environments, self._delete_contents)
        self._sizes: dict[Partition, int] = {}
        """Committed items, and those on their way in."""
        self._expires_at: dict[Partition, float] = {}
        self._waiting: dict[Partition, deque[tuple[asyncio.Future, int]]] = {}
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._seq = 0
        self._sweeper: asyncio.Task | None = None

    async def open(self) -> None:
        self._seq = await self._database.read(storage.last_seq)
        self._sizes = await self._database.read(storage.sizes)
        self._expires_at = await self._database.read(storage.expiries)
        await self.objects.open()
        self._sweeper = asyncio.create_task(self._sweep_forever(), name="queue-partitions")

    async def close(self) -> None:
        await self.objects.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper

    async def put(
        self, queue_id: str, partition: bytes, values: Sequence[bytes], caller: Caller, *, ttl_s: int = 0
    ) -> None:
        """Append items; durable when this returns. Raises ResourceExhausted when the partition is full."""
        self._check(partition, values, ttl_s)
        await self._exists(queue_id, caller)
        key = (queue_id, partition)
        size = self._sizes.get(key, 0)
        if size + len(values) > MAX_ITEMS:
            raise ResourceExhausted(
                f"the queue is full: the partition has {size:,} items, and {MAX_ITEMS:,} is the limit"
            )
        if key not in self._sizes and sum(1 for other in self._sizes if other[0] == queue_id) >= MAX_PARTITIONS:
            raise ResourceExhausted(f"the queue has {MAX_PARTITIONS:,} partitions already, which is the limit")
        if not values:
            return
        expires_at = self._clock.now() + (ttl_s or DEFAULT_TTL_S)
        items = []
        for value in values:
            self._seq += 1
            items.append((self._seq, value))
        self._sizes[key] = size + len(values)

        def put(connection: Connection) -> int:
            storage.put(connection, queue_id, partition, items, expires_at)
            return items[0][0]

        try:
            first = await self._database.write(put, once=caller.once("QueuePut"))
        except BaseException:
            self._add(key, -len(values))
            raise
        if first != items[0][0]:  # an earlier life of the server has put them
            self._add(key, -len(values))
        self._expires_at[key] = expires_at
        self._wake(key, len(values))

    async def take(
        self, queue_id: str, partition: bytes, count: int, caller: Caller, *, wait_s: float = 0.0
    ) -> list[bytes]:
        """Up to `count` of the oldest items, waiting for the first one. The same request gets the same items."""
        self._check(partition, (), 0)
        await self._exists(queue_id, caller)
        key, count = (queue_id, partition), max(1, min(count, MAX_TAKEN))
        deadline = self._clock.monotonic() + min(max(0.0, wait_s), MAX_WAIT_S)
        may_repeat = caller.idempotency_key != ""
        while True:
            if self._sizes.get(key, 0) or may_repeat:
                values = await self._take(key, count, caller)
                may_repeat = False
                if values:
                    return values
            left = deadline - self._clock.monotonic()
            if left <= 0:
                return []
            await self._changed(key, left)

    async def _take(self, key: Partition, count: int, caller: Caller) -> list[bytes]:
        """From the database; nothing is kept of a request that found nothing."""
        if not self._sizes.get(key, 0):
            # Only a repetition can find something: what an earlier life of the server gave to the same request.
            once = caller.once("QueueGet")
            kept = await self._database.read(lambda c: kept_reply(c, once)) if once else None
            return kept or []
        taken_here = 0

        def take(connection: Connection) -> list[bytes]:
            nonlocal taken_here
            values = storage.take(connection, *key, count)
            taken_here = len(values)
            if not values:
                raise _Empty
            return values

        try:
            values = await self._database.write(take, once=caller.once("QueueGet"))
        except _Empty:
            return []
        self._add(key, -taken_here)
        return values

    async def after(
        self, queue_id: str, partition: bytes, last_seq: int, caller: Caller, *, wait_s: float
    ) -> list[tuple[int, bytes]]:
        """Look at the items after number `last_seq` without taking them."""
        self._check(partition, (), 0)
        await self._exists(queue_id, caller)
        deadline = self._clock.monotonic() + min(max(0.0, wait_s), MAX_WAIT_S)
        while True:
            items = await self._database.read(lambda c: storage.after(c, queue_id, partition, last_seq, 100))
            left = deadline - self._clock.monotonic()
            if items or left <= 0:
                return items
            await self._changed((queue_id, partition), left, takes=False)

    async def count(self, queue_id: str, partition: bytes, caller: Caller, *, total: bool) -> int:
        self._check(partition, (), 0)
        await self._exists(queue_id, caller)
        if total:
            return sum(size for key, size in self._sizes.items() if key[0] == queue_id)
        return self._sizes.get((queue_id, partition), 0)

    async def clear(self, queue_id: str, partition: bytes, caller: Caller, *, all_partitions: bool) -> None:
        if all_partitions and partition:
            raise InvalidArgument("clear either one partition or all of them: name none with `all`")
        self._check(partition, (), 0)

        def clear(connection: Connection) -> None:
            self.objects.existing(connection, queue_id, caller)
            storage.clear(connection, queue_id, None if all_partitions else partition)

        await self._database.write(clear)
        for key in [key for key in self._sizes if key[0] == queue_id and (all_partitions or key[1] == partition)]:
            del self._sizes[key]

    def summary(self, item: NamedObject) -> tuple[int, int]:
        """(number of partitions with items, number of items)"""
        sizes = [size for key, size in self._sizes.items() if key[0] == item.object_id and size]
        return len(sizes), sum(sizes)

    async def delete(self, queue_id: str, caller: Caller) -> None:
        await self.objects.delete(queue_id, caller)
        self._forget(queue_id)

    # ---- inside -----------------------------------------------------------------------------------------

    async def _exists(self, queue_id: str, caller: Caller) -> None:
        known = (queue_id, caller.workspace)
        if known in self._known:
            return
        await self.objects.get(queue_id, caller)
        self._known[known] = None
        while len(self._known) > KNOWN_QUEUES:
            self._known.popitem(last=False)

    def _check(self, partition: bytes, values: Sequence[bytes], ttl_s: int) -> None:
        if len(partition) > MAX_PARTITION_KEY_BYTES:
            raise InvalidArgument(f"a partition's name has up to {MAX_PARTITION_KEY_BYTES} bytes, not {len(partition)}")
        if not 0 <= ttl_s <= MAX_TTL_S:
            raise InvalidArgument(f"a partition can be kept for up to {MAX_TTL_S:,} s (7 days), not {ttl_s:,} s")
        if len(values) > MAX_ITEMS:
            raise ResourceExhausted(f"{len(values):,} items do not fit: a partition has up to {MAX_ITEMS:,}")
        for value in values:
            if len(value) > MAX_ITEM_BYTES:
                raise PayloadTooLarge(
                    f"an item of {len(value):,} serialized bytes is too large: {MAX_ITEM_BYTES:,} is the limit; "
                    "put large data into a Volume or a Dict (status = '413')"
                )

    def _add(self, key: Partition, count: int) -> None:
        size = self._sizes.get(key, 0) + count
        if size > 0:
            self._sizes[key] = size
        else:
            self._sizes.pop(key, None)

    def _wake(self, key: Partition, count: int) -> None:
        """As many takers as there are items, in the order of their coming; and all who only look."""
        waiting = self._waiting.get(key)
        while waiting and count > 0:
            waiter, takes = waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= takes
        if waiting is not None and not waiting:
            self._waiting.pop(key, None)

    async def _changed(self, key: Partition, wait_s: float, *, takes: bool = True) -> None:
        waiter: asyncio.Future = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(key, deque())
        entry = (waiter, int(takes))
        if takes:
            waiting.append(entry)
        else:
            waiting.appendleft(entry)
        try:
            async with asyncio.timeout(wait_s):
                await waiter
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if waiter.done() and takes:
                self._wake(key, 1)  # the item that it was woken for is somebody else's
            raise
        finally:
            with contextlib.suppress(ValueError):
                waiting.remove(entry)

    def _delete_contents(self, connection: Connection, queue_id: str) -> None:
        storage.clear(connection, queue_id)

    def _forget(self, queue_id: str) -> None:
        for key in [key for key in self._sizes if key[0] == queue_id]:
            del self._sizes[key]
        for known in [known for known in self._known if known[0] == queue_id]:
            del self._known[known]
        for key in [key for key in self._waiting if key[0] == queue_id]:
            self._wake(key, len(self._waiting[key]))

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
        for key in [key for key, at in self._expires_at.items() if at < now]:
            await self._database.write(lambda c, old=key: storage.clear(c, *old))
            self._expires_at.pop(key, None)
            self._sizes.pop(key, None)
        living = {key[0] for key in self._sizes}
        for known in [known for known in self._known if known[0] not in living]:
            del self._known[known]


class _Empty(Exception):
    """Somebody else was faster: roll back, keep no answer."""
