"""Counts and percentiles of inputs and containers in a span of time [since, until)."""

from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from aeolian.storage.calls import calls, outputs
from aeolian.storage.containers import containers

SHARES = (0.5, 0.9, 0.99)


class Span(NamedTuple):
    """Whose stats are asked for, and of when."""

    function_ids: Sequence[str]
    since: float
    until: float
    task_id: str = ""
    """"" = of all containers."""


def finished_inputs(connection: Connection, span: Span) -> list[tuple[str, int, int]]:
    """(function id, status, number) of the inputs that were finished in the span."""
    query = (
        sa.select(calls.c.function_id, outputs.c.status, sa.func.count())
        .select_from(outputs.join(calls, calls.c.call_id == outputs.c.call_id))
        .where(*_finished(span))
        .group_by(calls.c.function_id, outputs.c.status)
    )
    return [(row[0], row[1], row[2]) for row in connection.execute(query)]


def execution_times(connection: Connection, span: Span) -> list[float]:
    """In seconds, at `SHARES` of the inputs that were finished in the span; empty when there are none."""
    ran = outputs.c.started_at > 0
    return _percentiles(connection, outputs.c.finished_at - outputs.c.started_at, *_finished(span), ran)


def latencies(connection: Connection, span: Span) -> list[float]:
    """As `execution_times`, from the moment that the input was made."""
    return _percentiles(connection, outputs.c.finished_at - outputs.c.created_at, *_finished(span))


def queue_times(connection: Connection, span: Span) -> list[float]:
    ran = outputs.c.started_at > 0
    return _percentiles(connection, outputs.c.started_at - outputs.c.created_at, *_finished(span), ran)


def num_running_then(connection: Connection, span: Span) -> int:
    """Inputs that ran at the end of the span, and were finished later."""
    query = (
        sa.select(sa.func.count())
        .select_from(outputs.join(calls, calls.c.call_id == outputs.c.call_id))
        .where(
            calls.c.function_id.in_(span.function_ids),
            outputs.c.started_at > 0,
            outputs.c.started_at < span.until,
            outputs.c.finished_at >= span.until,
            *([outputs.c.task_id == span.task_id] if span.task_id else []),
        )
    )
    return connection.execute(query).scalar_one()


class ContainerCounts(NamedTuple):
    """Of one Function."""

    function_id: str
    num_active: int
    """That were there at some time of the span."""
    num_started: int
    num_failed: int
    num_starting: int
    """At its end."""


def container_counts(connection: Connection, span: Span) -> list[ContainerCounts]:
    c = containers.c
    has_begun, has_ended = c.started_at > 0, c.finished_at > 0
    began_then = sa.and_(c.started_at >= span.since, c.started_at < span.until)
    ended_then = sa.and_(c.finished_at >= span.since, c.finished_at < span.until)
    is_failure = sa.and_(c.exit_code != 0, c.reason == "")
    not_yet_begun = sa.or_(sa.not_(has_begun), c.started_at >= span.until)
    not_yet_ended = sa.or_(sa.not_(has_ended), c.finished_at >= span.until)
    query = (
        sa.select(
            c.function_id,
            sa.func.count(),
            _number(began_then),
            _number(sa.and_(ended_then, is_failure)),
            _number(sa.and_(not_yet_begun, not_yet_ended)),
        )
        .where(*_containers(span), sa.or_(sa.not_(has_ended), c.finished_at >= span.since))
        .group_by(c.function_id)
    )
    return [ContainerCounts(*row) for row in connection.execute(query)]


def startup_times(connection: Connection, span: Span) -> list[float]:
    """In seconds, at `SHARES` of the containers that became ready in the span."""
    began_then = (containers.c.started_at >= span.since, containers.c.started_at < span.until)
    return _percentiles(connection, containers.c.started_at - containers.c.enqueued_at, *_containers(span), *began_then)


def _finished(span: Span) -> list[sa.ColumnElement[bool]]:
    return [
        calls.c.call_id == outputs.c.call_id,
        calls.c.function_id.in_(span.function_ids),
        outputs.c.finished_at >= span.since,
        outputs.c.finished_at < span.until,
        *([outputs.c.task_id == span.task_id] if span.task_id else []),
    ]


def _containers(span: Span) -> list[sa.ColumnElement[bool]]:
    return [
        containers.c.function_id.in_(span.function_ids),
        containers.c.enqueued_at < span.until,
        *([containers.c.task_id == span.task_id] if span.task_id else []),
    ]


def _number(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.sum(sa.case((condition, 1), else_=0))


def _percentiles(
    connection: Connection, value: sa.ColumnElement[float], *conditions: sa.ColumnElement[bool]
) -> list[float]:
    """The value that each of `SHARES` does not exceed: the database sorts, and few values come back."""
    num_rows = connection.execute(sa.select(sa.func.count(value)).where(*conditions)).scalar_one()
    if not num_rows:
        return []
    ordered = sa.select(value).where(*conditions).order_by(value)
    return [
        max(0.0, connection.execute(ordered.offset(min(num_rows - 1, int(share * num_rows))).limit(1)).scalar_one())
        for share in SHARES
    ]
