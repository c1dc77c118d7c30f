"""Quotas of environments: what the autoscaler may still start in one, and what is told to those who wait."""

import asyncio
from typing import Protocol

from aeolian.control.container_state import Container
from aeolian.control.environments import Environments
from aeolian.control.pools import Pool, Pools
from aeolian.domain import quotas
from aeolian.domain.apps import App
from aeolian.domain.clock import Clock
from aeolian.domain.containers import ContainerState
from aeolian.domain.functions import PoolSettings
from aeolian.domain.logs import LogLine
from aeolian.domain.quotas import Quota, Room
from aeolian.storage.environments import Environment

TOLD_EVERY_S = 60.0
SYSTEM_FD = 3


class Apps(Protocol):
    def known(self, app_id: str) -> App | None: ...


class Containers(Protocol):
    def running(self) -> list[Container]: ...
    def spare(self, pool: Pool) -> list[Container]: ...
    def stop_container(self, container: Container, *, drain: bool, reason: str) -> None: ...


class Logs(Protocol):
    def deliver(self, app_id: str, task_id: str, function_id: str, lines: list[LogLine]) -> asyncio.Future[None]: ...


class Quotas:
    def __init__(
        self, clock: Clock, environments: Environments, apps: Apps, pools: Pools, containers: Containers, logs: Logs
    ):
        self._clock = clock
        self._environments = environments
        self._apps = apps
        self._pools = pools
        self._containers = containers
        self._logs = logs
        self._told_at: dict[str, float] = {}
        """When those who wait for a Function were last told why."""

    async def refresh(self) -> None:
        """Learn what `aeolian quota` has set meanwhile."""
        await self._environments.keep_fresh()

    def room(self, settings: PoolSettings) -> Room | None:
        """How many more containers of a pool may start; None: there is no quota."""
        environment = self._environment_of(settings.app_id)
        if environment is None or not (quota := _quota(environment)):
            return None
        there = [container.resources for container in self._containers.running() if self._is_in(environment, container)]
        return quotas.room(quota, there, settings.resources)

    def held_back(self, pool: Pool, settings: PoolSettings, room: Room | None) -> None:
        """The pool has to wait for the quota of its environment: idle containers go, and the log says why.

        `room` None: it does not have to.
        """
        if room is None or (environment := self._environment_of(settings.app_id)) is None:
            self._told_at.pop(pool.function_id, None)
            return
        self._make_room(pool, environment)
        now = self._clock.monotonic()
        if now - self._told_at.get(pool.function_id, float("-inf")) < TOLD_EVERY_S:
            return
        self._told_at[pool.function_id] = now
        text = (
            f"Function '{settings.function_name}' waits for a container: environment '{environment.name}' uses "
            f"{room.limit} already (`aeolian quota list`)\n"
        )
        stored = self._logs.deliver(
            settings.app_id, "", pool.function_id, [LogLine(SYSTEM_FD, self._clock.now(), text)]
        )
        stored.add_done_callback(lambda done: done.cancelled() or done.exception())  # lost when the server ends

    def _make_room(self, for_pool: Pool, environment: Environment) -> None:
        """End the container of another pool there that has been idle longest, unless one is ending already."""
        inside = [container for container in self._containers.running() if self._is_in(environment, container)]
        if any(container.state is ContainerState.STOPPING and not container.held for container in inside):
            return
        idle = [
            container
            for pool in self._pools.all()
            if pool is not for_pool
            for container in self._containers.spare(pool)
            if self._is_in(environment, container)
        ]
        if idle:
            oldest = min(idle, key=lambda container: container.idle_since)
            self._containers.stop_container(oldest, drain=True, reason="others need its share of the quota")

    def _environment_of(self, app_id: str) -> Environment | None:
        app = self._apps.known(app_id)
        return self._environments.by_id(app.environment_id) if app is not None else None

    def _is_in(self, environment: Environment, container: Container) -> bool:
        app = self._apps.known(container.app_id)
        return app is not None and app.environment_id == environment.id


def _quota(environment: Environment) -> Quota:
    return Quota(environment.max_containers, environment.max_milli_cpu, environment.max_memory_mb, environment.max_gpus)
