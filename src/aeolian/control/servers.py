"""Servers (`@app.server`): which container gets a request, requests that wait for one, and how many there should be.

::

    lease --> a ready container with the fewest requests --> released
      \\--> none is ready: waits --> the autoscaler starts one --> it accepts connections --> the waiting ones get it

A request is nothing but a connection: nothing of it is stored, and it ends with its container.
"""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncIterator, Collection

from aeolian.control.autoscaler import PoolView
from aeolian.control.container_state import Container
from aeolian.control.containers import Containers
from aeolian.control.pools import Pool, Pools
from aeolian.domain.clock import Clock
from aeolian.domain.containers import ContainerState
from aeolian.domain.errors import ResourceExhausted, Unavailable
from aeolian.domain.functions import AutoscalerSettings, PoolSettings

MAX_WAITING = 10_000
WAIT_LONGER_S = 30.0
"""Beyond the time that a start may take."""
UNKNOWN_REQUEST_S = 0.05
DEFAULT_TARGET = 10
"""Requests per container that are aimed at where nothing else was asked for."""


class Servers:
    def __init__(self, clock: Clock, pools: Pools, containers: Containers):
        self._clock = clock
        self._pools = pools
        self._containers = containers
        self._waiting: dict[str, deque[asyncio.Future[Container]]] = {}
        containers.when_started.append(self._started)
        containers.when_hopeless.append(self.fail_waiting)

    @contextlib.asynccontextmanager
    async def lease(self, function_id: str, app_id: str, avoid: Collection[str] = ()) -> AsyncIterator[Container]:
        """A ready container for one request; `avoid`: those (by task id) that could not be reached.

        Raises Unavailable when none gets ready, ResourceExhausted when all have as many requests as they may.
        """
        pool = self._pools.ensure(function_id, app_id)
        pool.used_at = self._clock.monotonic()
        settings = self._pools.settings(pool)
        if settings is None:
            raise Unavailable("this server is not deployed (any more)")
        container = self._pick(pool, settings, avoid)
        if container is None:
            container = await self._wait(pool, settings)
        else:
            self._take(pool, container)
        began = self._clock.monotonic()
        try:
            yield container
        finally:
            self._release(container, self._clock.monotonic() - began)

    def has_died(self, container: Container) -> None:
        """What served in it is gone, the container is not: another one takes its place."""
        if container.state is ContainerState.RUNNING:
            reason = "nothing accepts connections on its port any more"
            self._containers.stop_container(container, drain=True, reason=reason)

    def fail_waiting(self, function_id: str, reason: str) -> None:
        """No container will come."""
        for future in self._waiting.pop(function_id, ()):
            if not future.done():
                future.set_exception(Unavailable(reason))
        if (pool := self._pools.get(function_id)) is not None:
            pool.num_waiting = 0

    # ---- inside -----------------------------------------------------------------------------------------

    def _pick(self, pool: Pool, settings: PoolSettings, avoid: Collection[str] = ()) -> Container | None:
        """The fewest requests; of equals the oldest, so that others become idle and can end."""
        ready = [
            container
            for container in pool.containers.values()
            if container.state is ContainerState.RUNNING
            and container.revision == settings.revision
            and container.task_id not in avoid
        ]
        limit = settings.max_concurrency
        open_ones = [container for container in ready if not limit or container.num_requests < limit]
        if ready and not open_ones:
            raise ResourceExhausted(f"every container of '{settings.function_name}' works on {limit} requests already")
        return min(open_ones, key=lambda container: (container.num_requests, container.started_at), default=None)

    async def _wait(self, pool: Pool, settings: PoolSettings) -> Container:
        waiting = self._waiting.setdefault(pool.function_id, deque())
        if len(waiting) >= MAX_WAITING:
            raise Unavailable(f"{MAX_WAITING} requests wait for a container of '{settings.function_name}' already")
        future: asyncio.Future[Container] = asyncio.get_running_loop().create_future()
        waiting.append(future)
        pool.num_waiting += 1
        self._pools.unsettle(pool.function_id)
        wait_s = settings.startup_timeout_s + WAIT_LONGER_S
        try:
            async with asyncio.timeout(wait_s):
                return await future
        except TimeoutError:
            raise Unavailable(f"no container of '{settings.function_name}' was ready within {wait_s:g} s") from None
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._release(future.result(), None)
            raise
        finally:
            if future in waiting:
                waiting.remove(future)
                pool.num_waiting = max(0, pool.num_waiting - 1)
                self._pools.unsettle(pool.function_id)

    def _started(self, container: Container) -> None:
        """It takes requests from now on."""
        pool = self._pools.get(container.function_id)
        waiting = self._waiting.get(container.function_id)
        settings = self._pools.settings(pool) if pool is not None else None
        if pool is None or not waiting or settings is None:
            return
        while waiting:
            try:
                picked = self._pick(pool, settings)
            except ResourceExhausted:
                break
            if picked is None:
                break
            future = waiting.popleft()
            pool.num_waiting -= 1
            if not future.done():
                self._take(pool, picked)
                future.set_result(picked)
        self._pools.unsettle(pool.function_id)

    def _take(self, pool: Pool, container: Container) -> None:
        container.num_requests += 1
        container.num_given += 1
        container.idle_since = 0.0
        if container.num_requests > 1:
            self._pools.unsettle(pool.function_id)

    def _release(self, container: Container, duration_s: float | None) -> None:
        container.num_requests -= 1
        pool = self._pools.get(container.function_id)
        if pool is None:
            return
        if duration_s is not None:
            pool.took(duration_s)
            pool.crash_loop.reset()
        if self._waiting.get(pool.function_id):
            self._started(container)
        if not container.num_requests and container.state is ContainerState.RUNNING:
            container.idle_since = self._clock.monotonic()
            if not pool.is_watched:
                self._pools.unsettle(pool.function_id)


def view_of(pool: Pool, settings: PoolSettings, limits: AutoscalerSettings, now: float) -> PoolView:
    """What the autoscaler looks at: requests are the inputs of a server."""
    mine = [it for it in pool.containers.values() if it.revision == settings.revision or it.is_starting]
    ready = [it for it in mine if it.state is ContainerState.RUNNING]
    ending = [it for it in mine if it not in ready and not it.is_starting]
    for container in ready:
        if not container.num_requests and not container.idle_since:  # after a start of the server
            container.idle_since = now
    num_requests = sum(container.num_requests for container in ready)
    slots = max(1, math.ceil(limits.target_concurrency or settings.max_concurrency or DEFAULT_TARGET))
    idle = sorted((container.idle_since, container.task_id) for container in ready if not container.num_requests)
    existing = bool(ready) or any(container.is_starting for container in mine)
    return PoolView(
        num_queued=pool.num_waiting if limits.is_scaled else int(pool.num_waiting > 0 and not existing),
        num_running_inputs=num_requests,
        slots=slots,
        num_above_target=max(0, num_requests - slots * len(ready)) if limits.is_scaled else 0,
        num_starting=sum(container.is_starting for container in mine),
        num_ready=len(ready),
        num_blocked=0,
        num_ending=len(ending),
        num_finishing=sum(bool(container.num_requests) for container in ending),
        idle=tuple((task_id, since) for since, task_id in idle),
        busy=tuple(container.task_id for container in reversed(ready) if container.num_requests),
        input_s=pool.input_s if pool.input_s is not None else UNKNOWN_REQUEST_S,
        start_s=pool.start_s,
        min_containers=limits.min_containers,
        max_containers=limits.max_containers,
        buffer_containers=limits.buffer_containers,
        scaledown_window_s=limits.scaledown_window_s,
        may_start=now >= pool.crash_loop.not_before and not (pool.is_retired and not pool.num_queued),
        is_on_trial=pool.crash_loop.num_deaths > 0,
    )
