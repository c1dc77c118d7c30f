"""Aeolian's autoscaler as it is, and two peers to compare it with."""

import math
from collections import deque

from simulation import BUSY_TICK_S, SimContainer, SimPool

from aeolian.control import autoscaler

SCALEDOWN_WINDOW_S = 60.0


class Aeolian:
    """`aeolian.control.autoscaler.plan`, shown what the server shows it."""

    name = "aeolian"

    def __init__(self, *, min_containers: int = 0, max_containers: int = 0, buffer_containers: int = 0):
        self._limits = (min_containers, max_containers, buffer_containers)

    def decide(self, pool: SimPool, now: float) -> tuple[int, list[SimContainer]]:
        plan = autoscaler.plan(self._view(pool, now), now, pool.num_cores)
        return plan.start, [pool.containers[task_id] for task_id in plan.stop]

    def next_look(self, pool: SimPool, now: float) -> float | None:
        if pool.queue:
            return now + BUSY_TICK_S
        idle = [c.idle_since + SCALEDOWN_WINDOW_S for c in pool.ready if not c.held]
        return min((at for at in idle if at > now), default=None)

    def _view(self, pool: SimPool, now: float) -> autoscaler.PoolView:
        ready, ending = pool.ready, pool.ending
        min_containers, max_containers, buffer_containers = self._limits
        idle = sorted((container.idle_since, container.task_id) for container in ready if not container.held)
        return autoscaler.PoolView(
            num_queued=len(pool.queue),
            num_running_inputs=pool.num_running,
            slots=pool.slots,
            num_above_target=0,
            num_starting=len(pool.starting),
            num_ready=len(ready),
            num_blocked=0,
            num_ending=len(ending),
            num_finishing=sum(bool(container.held) for container in ending),
            idle=tuple((task_id, since) for since, task_id in idle),
            busy=tuple(container.task_id for container in reversed(ready) if container.held),
            input_s=pool.expected_input_s(now),
            start_s=pool.start_s,
            min_containers=min_containers,
            max_containers=max_containers,
            buffer_containers=buffer_containers,
            scaledown_window_s=SCALEDOWN_WINDOW_S,
        )


class Knative:
    """The Knative Pod Autoscaler with its defaults (knative.dev, "Additional autoscaling configuration for KPA").

    Every 2 s the average concurrency over a stable window of 60 s is divided by 70 % of what a container takes. The
    panic window of 6 s takes over when it asks for twice what is ready, and then nothing is ended for a stable window.
    The last container goes when the whole stable window was without traffic and a grace period has passed; the first
    input after that starts one at once.
    """

    name = "knative"
    TICK_S = 2.0
    STABLE_S = 60.0
    PANIC_S = 6.0
    PANIC_THRESHOLD = 2.0
    UTILIZATION = 0.7
    MAX_SCALE_UP = 1000.0
    MAX_SCALE_DOWN = 2.0
    GRACE_S = 30.0
    SAMPLE_S = 1.0

    def __init__(self) -> None:
        self._history: deque[tuple[float, float]] = deque()
        """(time, concurrency), a sample a second."""
        self._sampled_at = -1.0
        self._ticked_at = -self.TICK_S
        self._panics_until = -1.0
        self._panic_wanted = 0
        self._unused_since: float | None = None

    def decide(self, pool: SimPool, now: float) -> tuple[int, list[SimContainer]]:
        concurrency = len(pool.queue) + pool.num_running
        if now - self._sampled_at >= self.SAMPLE_S:
            self._sampled_at = now
            self._history.append((now, concurrency))
            while self._history[0][0] < now - self.STABLE_S:
                self._history.popleft()
        existing = len(pool.starting) + len(pool.ready)
        if not existing and pool.queue:
            return 1, []
        if now - self._ticked_at < self.TICK_S:
            return 0, []
        self._ticked_at = now
        return self._towards(self._wanted(pool, now), pool)

    def next_look(self, pool: SimPool, now: float) -> float | None:
        return self._sampled_at + self.SAMPLE_S

    def _wanted(self, pool: SimPool, now: float) -> int:
        num_ready = max(1, len(pool.ready))
        target = self.UTILIZATION * pool.slots
        limit = math.ceil(self.MAX_SCALE_UP * num_ready)
        floor = math.floor(num_ready / self.MAX_SCALE_DOWN)
        stable = self._average(now, self.STABLE_S) / target
        panic = min(math.ceil(self._average(now, self.PANIC_S) / target), limit)
        if panic >= self.PANIC_THRESHOLD * num_ready:
            self._panics_until = now + self.STABLE_S
        if now < self._panics_until:
            self._panic_wanted = max(self._panic_wanted, panic, len(pool.ready))
            return self._panic_wanted
        self._panic_wanted = 0
        if stable > 0:
            self._unused_since = None
            return max(1, floor, min(math.ceil(stable), limit))
        self._unused_since = now if self._unused_since is None else self._unused_since
        return 0 if now - self._unused_since >= self.GRACE_S else 1

    def _average(self, now: float, window_s: float) -> float:
        values = [value for at, value in self._history if at > now - window_s]
        return sum(values) / len(values) if values else 0.0

    def _towards(self, wanted: int, pool: SimPool) -> tuple[int, list[SimContainer]]:
        existing = len(pool.starting) + len(pool.ready)
        idle = [container for container in pool.ready if not container.held]
        return max(0, wanted - existing), idle[: max(0, existing - wanted)]


class QueueLength:
    """A container for each input there is, as many queue-driven scalers do it; idle ones end after a minute."""

    name = "queue length"
    TICK_S = 1.0

    def __init__(self) -> None:
        self._ticked_at = -self.TICK_S

    def decide(self, pool: SimPool, now: float) -> tuple[int, list[SimContainer]]:
        if now - self._ticked_at < self.TICK_S:
            return 0, []
        self._ticked_at = now
        wanted = math.ceil((len(pool.queue) + pool.num_running) / pool.slots)
        missing = wanted - len(pool.starting) - len(pool.ready)
        expired = [c for c in pool.ready if not c.held and now - c.idle_since >= SCALEDOWN_WINDOW_S]
        return max(0, missing), expired if missing <= 0 else []

    def next_look(self, pool: SimPool, now: float) -> float | None:
        return self._ticked_at + self.TICK_S


POLICIES = (Aeolian, Knative, QueueLength)
