"""Pools: for each Function (or bound variant) the queue of its inputs and the containers that take them.

::

    enqueue --> queue --dispatch--> a container that asked for inputs (`wants`) --> held --release--> finished
                  ^------------------------- container lost, inputs returned ----------'
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence

from modal_proto import api_pb2

from aeolian.control.call_state import Input
from aeolian.control.container_state import Container, Want
from aeolian.control.crash_loop import CrashLoop
from aeolian.control.functions import Functions
from aeolian.control.workers import Workers
from aeolian.domain.clock import Clock
from aeolian.domain.containers import ContainerState
from aeolian.domain.errors import AeolianError
from aeolian.domain.functions import PoolSettings
from aeolian.domain.link import AssignInputs, CancelInputs, HeldInput

log = logging.getLogger(__name__)

AHEAD_MAX = 8
AHEAD_BELOW_S = 0.01
"""Inputs that take less than this on average are assigned a few at a time."""
AVERAGE_SHARE = 0.2
READ_AGAIN_S = 1.0


class Pool:
    def __init__(self, function_id: str, app_id: str):
        self.function_id = function_id
        self.app_id = app_id
        self.queue: deque[Input] = deque()
        self.num_removed = 0
        """Entries of `queue` that are finished already and will be passed over."""
        self.num_waiting = 0
        """Requests to a server that wait for a container."""
        self.containers: dict[str, Container] = {}
        self.input_s: float | None = None
        """Moving average of how long an input takes."""
        self.start_s = 0.3
        """Moving average of how long a container takes to ask for inputs."""
        self.crash_loop = CrashLoop()
        self.is_denied = False
        """It wants more containers than have found a place."""
        self.is_watched = False
        """The autoscaler will look at it by itself, in time for what is idle now."""
        self.is_retired = False
        self.used_at = 0.0
        self.lingering: asyncio.TimerHandle | None = None

    @property
    def num_queued(self) -> int:
        return len(self.queue) - self.num_removed + self.num_waiting

    def took(self, duration_s: float) -> None:
        before = self.input_s
        self.input_s = duration_s if before is None else before + AVERAGE_SHARE * (duration_s - before)

    def head(self) -> Input | None:
        """The next input to run; finished ones before it are dropped."""
        while self.queue:
            first = self.queue[0]
            if first.is_queued and not first.call.is_cancelled:
                return first
            self.queue.popleft()
            if first.is_queued:
                first.is_queued = False  # its call is being cancelled
            else:
                self.num_removed -= 1
        return None

    def pop(self, count: int) -> list[Input]:
        taken: list[Input] = []
        while len(taken) < count and (item := self.head()) is not None:
            self.queue.popleft()
            item.is_queued = False
            taken.append(item)
        return taken


class Pools:
    def __init__(self, clock: Clock, functions: Functions, workers: Workers):
        self._clock = clock
        self._functions = functions
        self._workers = workers
        self._pools: dict[str, Pool] = {}
        self.payloads_of: Callable[[Sequence[Input]], Awaitable[list[bytes]]]
        self.unsettled: set[str] = set()
        """Functions whose pool may need more or fewer containers."""
        self.woken = asyncio.Event()
        self._tasks: set[asyncio.Task] = set()

    async def close(self) -> None:
        for pool in self._pools.values():
            if pool.lingering is not None:
                pool.lingering.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- the pools --------------------------------------------------------------------------------------

    def get(self, function_id: str) -> Pool | None:
        return self._pools.get(function_id)

    def ensure(self, function_id: str, app_id: str) -> Pool:
        pool = self._pools.get(function_id)
        if pool is None:
            pool = self._pools[function_id] = Pool(function_id, app_id)
        return pool

    def all(self) -> list[Pool]:
        return list(self._pools.values())

    def of_app(self, app_id: str) -> list[Pool]:
        return [pool for pool in self._pools.values() if pool.app_id == app_id]

    def remove_pool(self, function_id: str) -> None:
        self._pools.pop(function_id, None)

    def settings(self, pool: Pool) -> PoolSettings | None:
        """None: the Function is gone, or not defined yet."""
        try:
            return self._functions.pool_settings(pool.function_id)
        except AeolianError:
            return None

    def unsettle(self, function_id: str) -> None:
        """Let the autoscaler look at this pool soon."""
        self.unsettled.add(function_id)
        self.woken.set()

    # ---- the queue, as calls see it ---------------------------------------------------------------------

    def enqueue(self, inputs: Sequence[Input], *, front: bool = False) -> None:
        touched: dict[str, Pool] = {}
        for item in reversed(inputs) if front else inputs:
            pool = self.ensure(item.call.function_id, item.call.app_id)
            if item.is_queued:
                continue
            item.is_queued = True
            if front:
                pool.queue.appendleft(item)
            else:
                pool.queue.append(item)
            touched[pool.function_id] = pool
        for pool in touched.values():
            pool.used_at = self._clock.monotonic()
            self.dispatch(pool)

    def remove(self, item: Input) -> None:
        if item.is_queued and (pool := self._pools.get(item.call.function_id)) is not None:
            item.is_queued = False
            pool.num_removed += 1
            if not pool.num_queued:
                pool.queue.clear()
                pool.num_removed = 0
            self.unsettle(pool.function_id)

    def release(self, item: Input, duration_s: float | None) -> None:
        pool = self._pools.get(item.call.function_id)
        if pool is None:
            return
        container = pool.containers.get(item.task_id)
        if container is not None:
            container.held.pop(item.key, None)
            self._mark_idle(container)
        if duration_s is not None and duration_s >= 0:
            pool.took(duration_s)
            pool.crash_loop.reset()

    def cancel_running(self, items: Sequence[Input], *, terminate: bool) -> None:
        by_task: dict[tuple[str, str], list[str]] = {}
        for item in items:
            pool = self._pools.get(item.call.function_id)
            container = pool.containers.get(item.task_id) if pool else None
            if container is not None:
                by_task.setdefault((container.worker_id, container.task_id), []).append(item.input_id)
        for (worker_id, task_id), input_ids in by_task.items():
            self._workers.send(worker_id, CancelInputs(task_id, tuple(input_ids), terminate=terminate))

    @contextlib.contextmanager
    def waiting(self, function_id: str, task_id: str) -> Iterator[None]:
        """Meanwhile this container waits for the output of another input, and lends its cores to whoever makes it."""
        pool = self._pools.get(function_id)
        container = pool.containers.get(task_id) if pool is not None else None
        if container is None:
            yield
            return
        container.num_waits += 1
        if container.is_blocked:
            for other in self._pools.values():
                if other.num_queued:
                    self.unsettle(other.function_id)
        try:
            yield
        finally:
            container.num_waits -= 1

    def num_unfinished(self, function_id: str) -> int:
        pool = self._pools.get(function_id)
        if pool is None:
            return 0
        return pool.num_queued + sum(len(container.held) for container in pool.containers.values())

    def num_containers(self, function_id: str) -> int:
        pool = self._pools.get(function_id)
        return len(pool.containers) if pool is not None else 0

    # ---- containers, as their lives see it --------------------------------------------------------------

    def add(self, container: Container) -> Pool:
        pool = self.ensure(container.function_id, container.app_id)
        pool.containers[container.task_id] = container
        return pool

    def drop(self, container: Container) -> list[Input]:
        """The container is gone. Returns what it held."""
        pool = self._pools.get(container.function_id)
        if pool is not None:
            pool.containers.pop(container.task_id, None)
            self.unsettle(pool.function_id)
        held, container.held = list(container.held.values()), {}
        return held

    def hold(self, container: Container, item: Input) -> None:
        """A container works on an input, as its worker says after a reconnection."""
        if item.is_queued:
            self.remove(item)
        item.task_id = container.task_id
        item.started_at = item.started_at or self._clock.now()
        container.held[item.key] = item
        container.idle_since = 0.0

    def wants(self, container: Container, want: Want) -> None:
        container.want = want
        self._mark_idle(container)
        if (pool := self._pools.get(container.function_id)) is not None:
            self.dispatch(pool)

    def take_back(self, container: Container, held: Sequence[HeldInput], find) -> None:
        """Inputs that were assigned ahead and not begun."""
        items = []
        for report in held:
            item = find(report.input_id)
            if item is not None and item.task_id == container.task_id and item.retry_count == report.retry_count:
                container.held.pop(item.key, None)
                item.task_id, item.started_at = "", 0.0
                items.append(item)
        if (pool := self._pools.get(container.function_id)) is not None and items:
            pool.took(10 * AHEAD_BELOW_S)
            self.enqueue(items, front=True)

    # ---- dispatch ---------------------------------------------------------------------------------------

    def dispatch(self, pool: Pool) -> None:
        """Give queued inputs to containers that ask for some."""
        while (head := pool.head()) is not None:
            settings = self.settings(pool)
            container = self._pick(pool, settings) if settings is not None else None
            if container is None or settings is None:
                self.unsettle(pool.function_id)
                return
            want = container.want
            assert want is not None
            count = want.max_items
            if count > 1 and pool.num_queued < count and not self._lingered(pool, head, want):
                return
            count += self._num_ahead(pool, settings)
            if container.max_inputs:
                count = min(count, container.max_inputs - container.num_given)
            self._assign(container, pool.pop(max(1, count)))

    def _pick(self, pool: Pool, settings: PoolSettings) -> Container | None:
        """Who asked last, so that others may end; with many inputs at a time, who has the fewest."""
        asking = [
            container
            for container in pool.containers.values()
            if container.want is not None and container.takes_inputs and container.revision == settings.revision
        ]
        if not asking:
            return None
        if settings.max_concurrent_inputs > 1:
            return min(asking, key=lambda container: len(container.held))
        return max(asking, key=lambda container: container.idle_since)

    def _lingered(self, pool: Pool, head: Input, want: Want) -> bool:
        """Whether the oldest input has waited long enough for its batch to fill; else look again then."""
        left = head.created_at + want.linger_ms / 1000 - self._clock.now()
        if left <= 0.001:
            return True
        if pool.lingering is not None:
            pool.lingering.cancel()
        pool.lingering = asyncio.get_running_loop().call_later(left, self.dispatch, pool)
        return False

    def _num_ahead(self, pool: Pool, settings: PoolSettings) -> int:
        """How many inputs to assign beyond what was asked for: short ones would spend their time on the way."""
        if pool.input_s is None or pool.input_s > AHEAD_BELOW_S:
            return 0
        if settings.max_concurrent_inputs > 1 or settings.batch_max_size > 1 or settings.max_inputs:
            return 0
        return min(AHEAD_MAX, pool.num_queued // (2 * max(1, len(pool.containers))))

    def _assign(self, container: Container, items: list[Input]) -> None:
        want, container.want = container.want, None
        assert want is not None
        now = self._clock.now()
        container.idle_since = 0.0
        container.num_given += len(items)
        container.is_last = bool(container.max_inputs) and container.num_given >= container.max_inputs
        for item in items:
            item.task_id, item.started_at = container.task_id, now
            container.held[item.key] = item
        if all(item.payload is not None for item in items):
            self._send(container, want, items, [item.payload or b"" for item in items])
        else:
            task = asyncio.create_task(self._read_and_send(container, want, items))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _read_and_send(self, container: Container, want: Want, items: list[Input]) -> None:
        """Meanwhile inputs may be cancelled, and the container may be lost."""
        attempts = [item.retry_count for item in items]
        payloads: list[bytes] = []
        try:
            payloads = await self.payloads_of(items)
        except Exception:
            log.exception("payloads of queued inputs could not be read; they are queued again")
            await asyncio.sleep(READ_AGAIN_S)
        left = [
            item
            for item, attempt in zip(items, attempts, strict=True)
            if not item.finished and item.task_id == container.task_id and item.retry_count == attempt
        ]
        if payloads and left:
            kept = {item.key: payload for item, payload in zip(items, payloads, strict=True)}
            self._send(container, want, left, [kept[item.key] for item in left])
            return
        for item in left:
            container.held.pop(item.key, None)
            item.task_id, item.started_at = "", 0.0
        container.num_given -= len(items)
        container.is_last = False
        if container.want is None and container.state is ContainerState.RUNNING:
            container.want = want
            self._mark_idle(container)
        if (pool := self._pools.get(container.function_id)) is not None:
            self.enqueue(left, front=True)
            self.dispatch(pool)

    def _send(self, container: Container, want: Want, items: list[Input], payloads: list[bytes]) -> None:
        messages = []
        for item, payload in zip(items, payloads, strict=True):
            message = api_pb2.FunctionGetInputsItem(
                input_id=item.input_id,
                function_call_id=item.call.call_id,
                function_call_invocation_type=int(item.call.invocation),  # type: ignore[arg-type]
                retry_count=item.retry_count,
                function_map_idx=item.idx,
            )
            message.input.MergeFromString(payload)
            messages.append(message)
        if container.is_last:
            messages[-1].input.final_input = True
        held = tuple(HeldInput(item.input_id, item.retry_count) for item in items)
        raw = tuple(message.SerializeToString() for message in messages)
        self._workers.send(container.worker_id, AssignInputs(container.task_id, want.seq, held, raw))

    def _mark_idle(self, container: Container) -> None:
        if container.want is not None and not container.held and container.state is ContainerState.RUNNING:
            if not container.idle_since:
                container.idle_since = self._clock.monotonic()
                pool = self._pools.get(container.function_id)
                if pool is not None and not pool.is_watched:
                    self.unsettle(pool.function_id)
        else:
            container.idle_since = 0.0
