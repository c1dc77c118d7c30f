"""Which worker gets a container: a pure function of what the workers have and what runs on them.

Requests are reservations: a worker is full when the sum of them reaches its size. What asks for more than any
worker has gets a whole one. Containers that wait for others lend their cores. A container without which nothing of
its pool goes on is placed even where all are full, because what runs there may be waiting for it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from aeolian.domain.containers import Resources

OVERCOMMIT = 2.0
"""Needed containers may take a worker to this multiple of its size."""


class WorkerView(NamedTuple):
    worker_id: str
    milli_cpu: int
    memory_mb: int
    num_gpus: int
    used_milli_cpu: int
    used_memory_mb: int
    used_gpus: int


def place(request: Resources, workers: Sequence[WorkerView], *, is_needed: bool) -> str | None:
    """The worker with the most room left, or None when all are full.

    `is_needed`: no container of its pool can take an input, or is about to.
    """
    best: tuple[float, str] | None = None
    for worker in workers:
        if request.gpu_count > worker.num_gpus - worker.used_gpus:
            continue
        cpu = min(request.milli_cpu, worker.milli_cpu) + worker.used_milli_cpu
        memory = min(request.memory_mb, worker.memory_mb) + worker.used_memory_mb
        load = max(cpu / max(1, worker.milli_cpu), memory / max(1, worker.memory_mb))
        if load <= (OVERCOMMIT if is_needed else 1.0) and (best is None or load < best[0]):
            best = (load, worker.worker_id)
    if best is None and is_needed and not request.gpu_count and workers:
        # Better crowded than deadlocked.
        return min(workers, key=lambda worker: worker.used_milli_cpu / max(1, worker.milli_cpu)).worker_id
    return best[1] if best else None


def impossible(request: Resources, workers: Sequence[WorkerView]) -> str:
    """Why no worker could ever run this, or ""."""
    if workers and request.gpu_count > max(worker.num_gpus for worker in workers):
        most = max(worker.num_gpus for worker in workers)
        there_is = "no worker has a GPU" if not most else f"no worker has more than {most}"
        return f"it asks for {request.gpu_count} GPU(s), and {there_is}: remove `gpu=`, or add a worker that has them"
    return ""
