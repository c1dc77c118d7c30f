"""Retries by the server: inputs of calls that nobody waits for are tried again, by their Function's policy."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Protocol

from aeolian.control.call_journal import CallJournal
from aeolian.control.call_state import Input
from aeolian.control.functions import Functions
from aeolian.domain.clock import Clock
from aeolian.domain.errors import NotFound


class Queue(Protocol):
    def enqueue(self, inputs: Sequence[Input], *, front: bool = False) -> None: ...

    def remove(self, item: Input) -> None: ...

    def release(self, item: Input, duration_s: float | None) -> None: ...


class InputRetries:
    def __init__(self, clock: Clock, functions: Functions, journal: CallJournal, queue: Queue):
        self._clock = clock
        self._functions = functions
        self._journal = journal
        self._queue = queue
        self._timers: dict[Input, asyncio.TimerHandle] = {}

    def close(self) -> None:
        """What is due later is in the database, with its time."""
        for timer in self._timers.values():
            timer.cancel()

    def later(self, item: Input) -> bool:
        """An attempt has failed. Whether there will be another one."""
        call = item.call
        if not call.invocation.is_async or call.is_cancelled:
            return False
        try:
            settings = self._functions.pool_settings(call.function_id)
        except NotFound:
            return False
        policy = settings.retry_policy
        if policy is None or settings.is_generator or item.retry_count >= policy.max_retries:
            return False
        if item.task_id:
            self._queue.release(item, None)
        else:
            self._queue.remove(item)
        item.task_id, item.started_at, item.losses, item.crashes = "", 0.0, 0, 0
        item.retry_count += 1
        item.due_at = self._clock.now() + policy.delay_s(item.retry_count)
        self._journal.writes.update_input(item.key, item.retry_count, item.due_at)
        self.enqueue_when_due([item])
        return True

    def enqueue_when_due(self, items: Iterable[Input]) -> None:
        """Queue these inputs, each not before its time."""
        now, due = self._clock.now(), []
        for item in items:
            if item.due_at <= now:
                due.append(item)
            else:
                self._timers[item] = asyncio.get_running_loop().call_later(item.due_at - now, self._is_due, item)
        if due:
            self._queue.enqueue(due)

    def forget(self, item: Input) -> None:
        """It has its output."""
        if (timer := self._timers.pop(item, None)) is not None:
            timer.cancel()

    def _is_due(self, item: Input) -> None:
        self._timers.pop(item, None)
        if not item.finished:
            self._queue.enqueue([item])
