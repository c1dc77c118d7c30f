"""Traces: what became of each input, as spans for an OpenTelemetry collector. Made afterwards, from what is known.

::

    call shop.price                        [client's request ------------------------------------> output stored]
      queued                                [-- waiting for a container --]
      container start                         [ image | sdk | process | user code ]     (only where it waited for one)
      run                                                                  [-- user code --]
      store output                                                                          [--]
        call shop.tax                                 calls that it has made hang below it, in the same trace

Ids follow from the ids of inputs, so that no table of open spans is needed: a child may be told of before its parent.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

from aeolian.control.container_state import Container
from aeolian.control.metrics import FunctionName
from aeolian.domain.calls import InputKey
from aeolian.domain.containers import HookTiming
from aeolian.domain.telemetry import FinishedInput

MAX_STARTS = 10_000


class Span(NamedTuple):
    """Times are seconds since the epoch; ids as OpenTelemetry's, 16 and 8 bytes; `parent_id` 0 for none."""

    name: str
    trace_id: int
    span_id: int
    parent_id: int
    began_at: float
    ended_at: float
    error: str
    """What went wrong; "" when nothing has."""
    attributes: dict[str, str | int]


class Exporter(Protocol):
    def export(self, spans: list[Span]) -> None:
        """Takes spans to be sent later. Never waits and never fails."""
        ...


class ContainerStart(NamedTuple):
    began_at: float
    ended_at: float
    hooks: tuple[HookTiming, ...]


class Traces:
    """`sample`: the share of calls that are traced, 0 to 1; a call and all that it makes are traced, or none of it."""

    def __init__(self, exporter: Exporter, name_of: Callable[[str, str], FunctionName], sample: float = 1.0):
        self._exporter = exporter
        self._name_of = name_of
        self._sample = sample
        self._starts: dict[str, ContainerStart] = {}
        """Of containers that no input was traced with yet."""

    def container_started(self, container: Container) -> None:
        if len(self._starts) >= MAX_STARTS:
            self._starts.pop(next(iter(self._starts)))
        self._starts[container.task_id] = ContainerStart(
            container.enqueued_at, container.started_at, tuple(container.hooks)
        )

    def input_finished(self, done: FinishedInput) -> None:
        start = self._starts.pop(done.task_id, None)
        trace_id = trace_id_of(done.root_call_id)
        if trace_id / (1 << 128) >= self._sample:
            return
        self._exporter.export(spans_of(done, start, self._name_of(done.app_id, done.function_id)))


def spans_of(done: FinishedInput, start: ContainerStart | None, name: FunctionName) -> list[Span]:
    """The spans of one input. `start`: that of its container, if this is the first input that it was given."""
    input_id = InputKey(done.call_id, done.idx).input_id
    trace_id, span_id = trace_id_of(done.root_call_id), span_id_of(input_id)
    parent_id = span_id_of(done.parent_input_id) if done.parent_input_id else 0
    error = "" if done.status == "success" else done.status
    attributes: dict[str, str | int] = {
        "aeolian.app": name.app,
        "aeolian.function": name.function,
        "aeolian.function_call_id": done.call_id,
        "aeolian.input_id": input_id,
        "aeolian.task_id": done.task_id,
        "aeolian.retry_count": done.retry_count,
        "aeolian.status": done.status,
    }
    stored_at = max(done.stored_at, done.finished_at)
    spans = [
        Span(
            f"call {name.app}.{name.function}",
            trace_id,
            span_id,
            parent_id,
            done.created_at,
            stored_at,
            error,
            attributes,
        )
    ]

    def part(name: str, began_at: float, ended_at: float, below: int = span_id, error: str = "") -> int:
        own_id = span_id_of(f"{input_id} {below:x} {name}")
        spans.append(Span(name, trace_id, own_id, below, began_at, max(began_at, ended_at), error, {}))
        return own_id

    if done.started_at:
        part("queued", done.created_at, done.started_at)
        if start is not None and start.ended_at > done.created_at:
            below = part("container start", start.began_at, start.ended_at)
            at = start.ended_at - sum(hook.seconds for hook in start.hooks)
            for hook in start.hooks:
                part(hook.name, at, at + hook.seconds, below)
                at += hook.seconds
        part("run", done.started_at, done.finished_at, error=error)
        part("store output", done.finished_at, stored_at)
    return spans


def trace_id_of(call_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"trace {call_id}".encode()).digest()[:16]) or 1


def span_id_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"span {text}".encode()).digest()[:8]) or 1
