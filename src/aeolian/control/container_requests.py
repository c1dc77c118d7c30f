"""Questions to the workers that hold containers, and their answers: nothing of them is kept here.

A question whose worker goes away meanwhile is lost; all of them may be asked again.
"""

import asyncio
import secrets

from aeolian.control.containers import Containers
from aeolian.control.workers import Worker, Workers
from aeolian.domain.errors import NotFound, Unavailable
from aeolian.domain.execs import Answer, Refused, Request
from aeolian.domain.link import ContainerAnswer, ContainerRequest

ARRIVAL_S = 10.0
ANSWER_S = 30.0
"""Beyond what the worker itself may wait."""


class ContainerRequests:
    def __init__(self, containers: Containers, workers: Workers):
        self._containers = containers
        self._workers = workers
        self._asked: dict[str, tuple[Worker, asyncio.Future[Answer]]] = {}
        workers.when_left.append(self._worker_left)

    async def ask(self, task_id: str, request: Request, wait_s: float = 0.0) -> Answer:
        """`wait_s`: how long the request lets the worker wait.

        Raises what the worker refused it with, NotFound when the container is gone, Unavailable while its worker is away.
        """
        worker = await self._worker_of(task_id)
        request_id = secrets.token_hex(8)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked[request_id] = (worker, answer)
        try:
            worker.send(ContainerRequest(task_id, request_id, request))
            async with asyncio.timeout(wait_s + ANSWER_S):
                found = await answer
        except TimeoutError:
            raise Unavailable(f"the worker of {task_id} does not answer") from None
        finally:
            del self._asked[request_id]
        if isinstance(found, Refused):
            error = found.error()
            if isinstance(error, NotFound) and self._containers.get(task_id) is None:
                raise NotFound(_gone(task_id))
            raise error
        return found

    def answered(self, event: ContainerAnswer) -> None:
        _, answer = self._asked.get(event.request_id, (None, None))
        if answer is not None and not answer.done():
            answer.set_result(event.answer)

    async def _worker_of(self, task_id: str) -> Worker:
        container = self._containers.get_lately(task_id)
        if container is None:
            raise NotFound(_gone(task_id))
        if not self._workers.is_connected(container.worker_id):
            # After a start of the server it may still be on its way.
            try:
                async with asyncio.timeout(ARRIVAL_S):
                    await self._workers.arrival(container.worker_id)
            except TimeoutError:
                raise Unavailable(f"the worker of {task_id} is away") from None
        worker = self._workers.get(container.worker_id)
        if worker is None or self._containers.get_lately(task_id) is None:
            raise NotFound(_gone(task_id))
        return worker

    def _worker_left(self) -> None:
        for worker, answer in self._asked.values():
            if not worker.is_connected and not answer.done():
                answer.set_exception(Unavailable("the worker went away before it answered"))
                answer.exception()  # seen, also where nobody waits any more


def _gone(task_id: str) -> str:
    return f"container {task_id} has ended, and with it all commands in it"
