"""Workers: which ones there are, what they have, and how commands reach them."""

import asyncio
from collections.abc import Callable

from aeolian.domain.link import Command, Hello


class Worker:
    """A node that is connected, or was until a moment ago."""

    def __init__(self, hello: Hello, send: Callable[[Command], None]):
        self.worker_id = hello.worker_id
        self.life = hello.life
        self.runtimes = hello.runtimes
        self.milli_cpu = hello.milli_cpu
        self.memory_mb = hello.memory_mb
        self.num_gpus = hello.num_gpus
        self.image_ids = set(hello.image_ids)
        self.is_connected = True
        self.is_leaving = hello.is_leaving
        """It is shutting down: nothing new is given to it."""
        self._send = send

    def send(self, command: Command) -> None:
        """Commands to a worker that is away are lost: it says what it holds when it comes back."""
        if self.is_connected:
            self._send(command)


class Workers:
    def __init__(self) -> None:
        self.when_left: list[Callable[[], None]] = []
        """Called when a worker's connection is over."""
        self._workers: dict[str, Worker] = {}
        self._arrivals: dict[str, asyncio.Event] = {}

    def connected(self, worker: Worker) -> None:
        """A worker dialled in; an older connection of the same one is over."""
        if (before := self._workers.get(worker.worker_id)) is not None:
            before.is_connected = False
        self._workers[worker.worker_id] = worker
        if (arrival := self._arrivals.pop(worker.worker_id, None)) is not None:
            arrival.set()

    async def arrival(self, worker_id: str) -> None:
        """Until this worker is connected."""
        while not self.is_connected(worker_id):
            await self._arrivals.setdefault(worker_id, asyncio.Event()).wait()

    def disconnected(self, worker: Worker) -> bool:
        """Whether this was the worker's current connection."""
        worker.is_connected = False
        for callback in self.when_left:
            callback()
        return self._workers.get(worker.worker_id) is worker

    def is_connected(self, worker_id: str) -> bool:
        worker = self._workers.get(worker_id)
        return worker is not None and worker.is_connected

    def remove(self, worker_id: str) -> None:
        self._workers.pop(worker_id, None)

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def available(self) -> list[Worker]:
        """Those that new work can be given to."""
        return [worker for worker in self._workers.values() if worker.is_connected and not worker.is_leaving]

    def runtimes(self) -> list[str]:
        """Those that containers can run in, on one worker or another."""
        return sorted({name for worker in self.available() for name in worker.runtimes})

    def send_to_all(self, command: Command) -> None:
        for worker in self._workers.values():
            worker.send(command)

    def send(self, worker_id: str, command: Command) -> None:
        if (worker := self._workers.get(worker_id)) is not None:
            worker.send(command)
