"""Watches the pools and carries out what the autoscaler plans for them."""

import asyncio
import contextlib
import logging

from aeolian.control import autoscaler, servers
from aeolian.control.containers import Containers
from aeolian.control.functions import Functions
from aeolian.control.pools import Pool, Pools
from aeolian.control.quotas import Quotas
from aeolian.domain.clock import Clock
from aeolian.domain.errors import AeolianError
from aeolian.domain.functions import AutoscalerSettings, PoolSettings

log = logging.getLogger(__name__)

BUSY_TICK_S = 0.1
IDLE_TICK_S = 1.0
FORGET_POOL_S = 600.0


class Autoscaling:
    def __init__(self, clock: Clock, functions: Functions, pools: Pools, containers: Containers):
        self._clock = clock
        self._functions = functions
        self._pools = pools
        self._containers = containers
        self.quotas: Quotas | None = None
        """What environments may have; None: anything."""
        self._due: dict[str, float] = {}
        """When to look at a pool again although nothing has happened to it."""
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._loop(), name="autoscaling")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _loop(self) -> None:
        """Looks at a pool when something happened to it, and when its time has come."""
        while True:
            first = min(self._due.values(), default=None)
            timeout_s = None if first is None else max(0.0, first - self._clock.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._pools.woken.wait()
            self._pools.woken.clear()
            if self.quotas is not None:
                await self.quotas.refresh()
            touched, self._pools.unsettled = self._pools.unsettled, set()
            now = self._clock.monotonic()
            touched |= {function_id for function_id, at in self._due.items() if at <= now}
            for function_id in touched:
                self._due.pop(function_id, None)
                if (pool := self._pools.get(function_id)) is None:
                    continue
                try:
                    due = self._settle(pool)
                except Exception:
                    log.exception("the pool of %s could not be scaled", function_id)
                    due = now + IDLE_TICK_S
                pool.is_watched = due is not None
                if due is not None:
                    self._due[function_id] = due

    def _settle(self, pool: Pool) -> float | None:
        """Start and stop containers of a pool. Returns when to look at it again, if nothing happens to it before."""
        settings = self._pools.settings(pool)
        if settings is None:
            if not pool.containers and not pool.num_queued:
                self._pools.remove_pool(pool.function_id)
            return None
        pool.head()  # drops finished entries
        limits, now = self._limits(pool, settings), self._clock.monotonic()
        room = self.quotas.room(settings) if self.quotas is not None else None
        view = self._view(pool, settings, limits)._replace(quota_room=room.num_containers if room is not None else None)
        plan = autoscaler.plan(view, now, self._containers.num_cores)
        for task_id in plan.stop:
            if (container := pool.containers.get(task_id)) is not None:
                reason = "it was idle" if container.idle_since else "there are more than `max_containers` of them"
                self._containers.stop_container(container, drain=True, reason=reason)
        started = self._containers.start(pool, settings, plan.start)
        is_crowded = started < plan.start
        if is_crowded and (pool.num_queued or len(pool.containers) < limits.min_containers):
            self._containers.make_room(pool, settings)  # a mere reserve does not take the place of others
        if self.quotas is not None:
            self.quotas.held_back(pool, settings, room if plan.num_held_back else None)
        pool.is_denied = is_crowded or plan.num_held_back > 0
        is_unused = not (pool.containers or pool.num_queued or limits.min_containers)
        if is_unused and (pool.is_retired or now - pool.used_at >= FORGET_POOL_S):
            self._pools.remove_pool(pool.function_id)
            return None
        if pool.num_queued:
            return now + BUSY_TICK_S
        if pool.is_denied:
            return now + IDLE_TICK_S
        later = [pool.crash_loop.not_before, pool.used_at + FORGET_POOL_S if is_unused else 0.0]
        later += [since + limits.scaledown_window_s for task_id, since in view.idle if task_id not in plan.stop]
        return min((at for at in later if at > now), default=None)

    def _limits(self, pool: Pool, settings: PoolSettings) -> AutoscalerSettings:
        try:
            limits = self._functions.autoscaler_settings(pool.function_id)
        except AeolianError:
            limits = AutoscalerSettings(
                settings.min_containers,
                settings.max_containers,
                settings.buffer_containers,
                scaledown_window_s=settings.scaledown_window_s,
            )
        if pool.is_retired:
            return AutoscalerSettings(max_containers=limits.max_containers, scaledown_window_s=0.0)
        return limits

    def _view(self, pool: Pool, settings: PoolSettings, limits: AutoscalerSettings) -> autoscaler.PoolView:
        now = self._clock.monotonic()
        if settings.is_server:
            return servers.view_of(pool, settings, limits, now)
        mine = [c for c in pool.containers.values() if c.revision == settings.revision or c.is_starting]
        open = [container for container in mine if container.takes_inputs]
        ready = [container for container in open if not container.is_blocked]
        ending = [c for c in mine if not c.takes_inputs and not c.is_starting]
        oldest = min(
            (item.started_at for container in ready for item in container.held.values()), default=self._clock.now()
        )
        running_s = self._clock.now() - oldest
        slots = settings.target_concurrent_inputs
        if settings.batch_max_size > 1:
            slots = max(slots, settings.batch_max_size)
        elif settings.max_inputs:
            slots = min(slots, settings.max_inputs)
        slots = max(1, slots)
        idle = sorted((c.idle_since, c.task_id) for c in ready if c.idle_since)
        return autoscaler.PoolView(
            num_queued=pool.num_queued,
            num_running_inputs=sum(len(container.held) for container in pool.containers.values()),
            slots=slots,
            num_above_target=max(0, sum(len(container.held) for container in ready) - slots * len(ready)),
            num_starting=sum(c.is_starting for c in mine),
            num_ready=len(ready),
            num_blocked=len(open) - len(ready),
            num_ending=len(ending),
            num_finishing=sum(bool(container.held) and not container.is_blocked for container in ending),
            idle=tuple((task_id, since) for since, task_id in idle),
            busy=tuple(container.task_id for container in reversed(open) if not container.idle_since),
            input_s=autoscaler.expected_input_s(pool.input_s, running_s),
            start_s=pool.start_s,
            min_containers=limits.min_containers,
            max_containers=limits.max_containers,
            buffer_containers=limits.buffer_containers,
            scaledown_window_s=limits.scaledown_window_s,
            may_start=now >= pool.crash_loop.not_before and not (pool.is_retired and not pool.num_queued),
            is_on_trial=pool.crash_loop.num_deaths > 0,
        )
