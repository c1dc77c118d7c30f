"""What is told to those who watch: metrics and traces are made of these."""

from typing import NamedTuple


class FinishedInput(NamedTuple):
    """An input that has its output. Times are seconds since the epoch."""

    app_id: str
    function_id: str
    call_id: str
    idx: int
    task_id: str
    """The container that worked on it last; "" when none has."""
    status: str
    """`success`, `failure`, `timeout`, … (`domain.calls.Status`)."""
    retry_count: int
    parent_input_id: str
    """The input that has made the call; "" for calls of clients."""
    root_call_id: str
    """The call of a client at the beginning of it all; of those that are in memory, the first."""
    created_at: float
    """When the input came."""
    started_at: float
    """When its container began with it; 0 when none has."""
    finished_at: float
    """When the container gave its output."""
    stored_at: float
    """When the output was durable."""
