"""An event loop whose time passes as soon as nothing is left to do: hours of timers in milliseconds.

Only for code that waits for timers and other tasks. What threads or sockets bring would come too late.
"""

import asyncio
import heapq
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._at = 1_000.0
        super().__init__()

    def time(self) -> float:
        return self._at

    def _run_once(self) -> None:
        while self._scheduled and self._scheduled[0]._cancelled:
            self._timer_cancelled_count -= 1
            heapq.heappop(self._scheduled)._scheduled = False
        if not self._ready and self._scheduled:
            self._at = max(self._at, self._scheduled[0]._when)
        if not self._ready and not self._scheduled and not self._stopping:
            raise RuntimeError("everybody waits, and nothing is left that could wake them")
        super()._run_once()


class LoopClock:
    """A `Clock` that shows the time of the running loop."""

    def now(self) -> float:
        return 1_000_000.0 + asyncio.get_running_loop().time()

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


def virtually(scenario: Coroutine[Any, Any, T]) -> T:
    """Run a scenario to its end."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(scenario)


async def settle() -> None:
    """Let everything that is ready run, without any time passing."""
    for _ in range(8):
        await asyncio.sleep(0)
