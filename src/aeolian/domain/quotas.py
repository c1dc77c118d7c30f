"""How much an environment's containers may have together, and how many more of a kind that leaves room for."""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from aeolian.domain.containers import Resources


class Quota(msgspec.Struct, frozen=True):
    """0 = no limit. Reservations count, not what is used of them."""

    max_containers: int = 0
    max_milli_cpu: int = 0
    max_memory_mb: int = 0
    max_gpus: int = 0

    def __bool__(self) -> bool:
        return bool(self.max_containers or self.max_milli_cpu or self.max_memory_mb or self.max_gpus)


class Room(NamedTuple):
    num_containers: int
    limit: str
    """What ends it: `its quota of 2 containers`."""


def room(quota: Quota, running: Iterable[Resources], request: Resources) -> Room:
    """How many more containers that ask for `request` may start beside those that are there."""
    there = list(running)
    limits = (
        (quota.max_containers, len(there), 1, f"{quota.max_containers} containers"),
        (quota.max_milli_cpu, sum(one.milli_cpu for one in there), request.milli_cpu, _cores(quota.max_milli_cpu)),
        (quota.max_memory_mb, sum(one.memory_mb for one in there), request.memory_mb, _memory(quota.max_memory_mb)),
        (quota.max_gpus, sum(one.gpu_count for one in there), request.gpu_count, f"{quota.max_gpus} GPUs"),
    )
    rooms = [
        Room(max(0, most - used) // each, f"its quota of {what}") for most, used, each, what in limits if most and each
    ]
    return min(rooms, default=Room(1_000_000, ""), key=lambda found: found.num_containers)


def _cores(milli_cpu: int) -> str:
    return f"{milli_cpu / 1000:g} CPU cores"


def _memory(memory_mb: int) -> str:
    return f"{memory_mb / 1024:g} GiB of memory"
