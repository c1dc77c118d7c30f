"""One partition of a Queue as memory knows it: how much is in it, and who waits for items or for room.

The database holds the items. Counts here include those on their way in, so that the limits hold for puts that are
committed together.
"""

import asyncio
from collections import deque

MAX_ITEMS = 5000
MAX_BYTES = 64 << 20


class QueuePartition:
    def __init__(self, num_items: int = 0, num_bytes: int = 0, expires_at: float = 0.0):
        self.num_items = num_items
        self.num_bytes = num_bytes
        self.expires_at = expires_at
        """When it is cleared, seconds since the epoch. 0 while nothing was put."""
        self.num_users = 0
        """Requests that are about it now."""
        self.is_gone = False
        """Its Queue was deleted."""
        self.num_arrivals = 0
        self._num_promised = 0
        """Items that takes under way will find."""
        self._takers: deque[asyncio.Future] = deque()
        self._lookers: set[asyncio.Future] = set()
        self._putters: deque[tuple[asyncio.Future, int, int]] = deque()

    @property
    def is_unused(self) -> bool:
        """Nothing is in it and nobody asks for it: there is nothing to remember."""
        return not (self.num_items or self.num_users or self._num_promised)

    def is_expired(self, now: float) -> bool:
        return 0.0 < self.expires_at < now

    # ---- items ------------------------------------------------------------------------------------------

    def has_room(self, num_items: int, num_bytes: int) -> bool:
        return self.num_items + num_items <= MAX_ITEMS and self.num_bytes + num_bytes <= MAX_BYTES

    def add(self, num_items: int, num_bytes: int) -> None:
        """Items are on their way in. `arrived` says that they are there, `remove` that they are not coming."""
        self.num_items += num_items
        self.num_bytes += num_bytes

    def arrived(self, num_items: int) -> None:
        """As many takers as there are items are woken, in the order of their coming; and all who only look."""
        self.num_arrivals += num_items
        for _ in range(min(num_items, len(self._takers))):
            self._takers.popleft().set_result(None)
        for waiter in self._lookers:
            if not waiter.done():
                waiter.set_result(None)

    def remove(self, num_items: int, num_bytes: int) -> None:
        """Items are gone: who waits for room gets it, in the order of their coming."""
        self.num_items -= num_items
        self.num_bytes -= num_bytes
        self._wake_putters()

    @property
    def has_items(self) -> bool:
        """Whether there are items that nobody was promised."""
        return self.num_items > self._num_promised

    def promise(self, count: int) -> int:
        """How many of `count` items a take will find that nobody else was promised; `keep_promise` ends it."""
        promised = max(0, min(count, self.num_items - self._num_promised))
        self._num_promised += promised
        return promised

    def keep_promise(self, promised: int) -> None:
        self._num_promised -= promised

    # ---- waiting ----------------------------------------------------------------------------------------

    async def wait_for_items(self, wait_s: float) -> None:
        """Until an item is there for this taker, perhaps; or for `wait_s`."""
        waiter = _new_waiter()
        self._takers.append(waiter)
        try:
            await asyncio.wait([waiter], timeout=wait_s)
        except asyncio.CancelledError:
            if waiter.done():
                self.arrived(1)  # the item that it was woken for is somebody else's
            raise
        finally:
            if not waiter.done():
                self._takers.remove(waiter)

    async def wait_for_arrival(self, wait_s: float) -> None:
        """Until anything arrives, or for `wait_s`."""
        waiter = _new_waiter()
        self._lookers.add(waiter)
        try:
            await asyncio.wait([waiter], timeout=wait_s)
        finally:
            self._lookers.discard(waiter)

    async def wait_for_room(self, num_items: int, num_bytes: int, wait_s: float) -> None:
        """Until there is room for so much, perhaps; or for `wait_s`."""
        waiter = _new_waiter()
        entry = (waiter, num_items, num_bytes)
        self._putters.append(entry)
        try:
            await asyncio.wait([waiter], timeout=wait_s)
        except asyncio.CancelledError:
            self._wake_putters()
            raise
        finally:
            if not waiter.done():
                self._putters.remove(entry)

    def end(self) -> None:
        """The Queue is gone: nobody waits any longer."""
        self.is_gone = True
        for waiter in (*self._takers, *self._lookers, *(entry[0] for entry in self._putters)):
            if not waiter.done():
                waiter.set_result(None)
        self._takers.clear()
        self._putters.clear()

    def _wake_putters(self) -> None:
        num_items, num_bytes = self.num_items, self.num_bytes
        while self._putters:
            waiter, more_items, more_bytes = self._putters[0]
            num_items, num_bytes = num_items + more_items, num_bytes + more_bytes
            if num_items > MAX_ITEMS or num_bytes > MAX_BYTES:
                return
            self._putters.popleft()
            waiter.set_result(None)


def _new_waiter() -> asyncio.Future:
    return asyncio.get_running_loop().create_future()
