"""How many containers a pool should have: a pure function of what is known of it.

A container costs time to start and, on one machine, takes its share of the cores from the others. So the first
ones, up to the number of cores, start as soon as there is an input without a container; more follow only as far as
they will find at least as much work as their start takes, judged by how long inputs take (or have been taking), and
each time at most as many again as there are: short inputs never start a crowd, long waiting ones soon do.
`benchmarks/autoscaler` compares this with other policies.
"""

import math
from typing import NamedTuple


class PoolView(NamedTuple):
    num_queued: int
    num_running_inputs: int
    slots: int
    """Inputs that one container should work on at a time."""
    num_above_target: int
    """Inputs that the containers work on beyond that number: there were no others to take them."""
    num_starting: int
    num_ready: int
    """Containers that take inputs, but for blocked ones."""
    num_blocked: int
    """Containers that wait for outputs of other inputs: whoever makes those needs another one."""
    num_ending: int
    """Containers that take no more inputs, and have not ended yet."""
    num_finishing: int
    """Of those, the ones that still work on their last inputs."""
    idle: tuple[tuple[str, float], ...]
    """Containers with nothing to do: (task id, since when), the longest idle first."""
    busy: tuple[str, ...]
    """The other containers that take inputs, the newest first."""
    input_s: float
    """How long an input takes (`expected_input_s`)."""
    start_s: float
    """How long a container takes to start."""
    min_containers: int
    max_containers: int
    """0 = no limit."""
    buffer_containers: int
    scaledown_window_s: float
    may_start: bool = True
    """False while starts are held back after failures."""
    is_on_trial: bool = False
    """The last ones died at their start: one at a time, until one works."""
    quota_room: int | None = None
    """How many more containers the quota of its environment allows; None: any number."""


class PoolPlan(NamedTuple):
    start: int = 0
    stop: tuple[str, ...] = ()
    num_held_back: int = 0
    """Containers that would be started, had the environment a larger quota."""


def plan(pool: PoolView, now: float, num_cores: int) -> PoolPlan:
    wanted = _num_to_start(pool, num_cores)
    start = wanted if pool.quota_room is None else min(wanted, pool.quota_room)
    return PoolPlan(start, _to_stop(pool, now), wanted - start)


def concurrency(num_inputs: int, num_ready: int, target: int, maximum: int) -> int:
    """How many inputs each container of a pool should take at a time: more than its target only as long as the
    containers that are there cannot otherwise hold all inputs, queued and running.
    """
    return max(1, maximum if num_inputs > target * num_ready else target)


def _num_to_start(pool: PoolView, num_cores: int) -> int:
    if not pool.may_start:
        return 0
    working = pool.num_starting + pool.num_ready + pool.num_finishing
    waiting = max(0, pool.num_queued + pool.num_above_target - pool.num_starting * pool.slots)
    wanted = 0
    if waiting:
        needed = math.ceil(waiting / pool.slots)
        wanted = min(needed, max(0, num_cores - working))
        as_many_again = max(pool.num_ready + pool.num_finishing, num_cores) - pool.num_starting
        wanted = max(wanted, min(needed, as_many_again, _num_worth_it(pool, waiting, working)))
    floor = pool.min_containers
    if pool.buffer_containers and (pool.num_queued or pool.num_running_inputs):
        busy = math.ceil((pool.num_queued + pool.num_running_inputs) / pool.slots)
        floor = max(floor, busy + pool.buffer_containers)
    existing = _num_existing(pool)
    wanted = max(wanted, floor - existing)
    if pool.max_containers:
        wanted = min(wanted, pool.max_containers - existing - pool.num_ending)
    if pool.is_on_trial and not (pool.num_ready or pool.num_blocked):
        wanted = min(wanted, 1 - pool.num_starting)
    return max(0, wanted)


def _num_worth_it(pool: PoolView, waiting: int, working: int) -> int:
    """How many more containers would find as much work, when they are ready, as their start has taken."""
    if not working:
        return waiting
    done_by_then = working * pool.slots * pool.start_s / max(pool.input_s, 1e-6)
    num_left = math.ceil((waiting - done_by_then) / pool.slots)
    left_s = (waiting - done_by_then) * pool.input_s / pool.slots
    return max(0, min(num_left, int(left_s / max(pool.start_s, 1e-6)) - working))


def expected_input_s(average_s: float | None, oldest_s: float) -> float:
    """How long an input may take; `oldest_s`: the age of the oldest running one.

    While none has finished: twice that, because what has run for a while tends to run for as long again.
    """
    return 2 * oldest_s if average_s is None else max(average_s, oldest_s)


def _to_stop(pool: PoolView, now: float) -> tuple[str, ...]:
    existing = _num_existing(pool)
    surplus = max(0, existing - pool.max_containers) if pool.max_containers else 0
    too_many = [*(task_id for task_id, _ in pool.idle), *pool.busy][:surplus]
    if pool.num_queued:
        return tuple(too_many)
    floor = pool.min_containers
    if pool.buffer_containers and pool.num_running_inputs:
        floor += pool.buffer_containers + math.ceil(pool.num_running_inputs / pool.slots)
    expired = [task_id for task_id, since in pool.idle if now >= since + pool.scaledown_window_s]
    return tuple(dict.fromkeys([*too_many, *expired[: max(0, existing - floor)]]))


def _num_existing(pool: PoolView) -> int:
    return pool.num_starting + pool.num_ready + pool.num_blocked
