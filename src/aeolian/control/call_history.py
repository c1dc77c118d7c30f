"""What became of calls: the graph of who called whom, and lists for people to read."""

from typing import NamedTuple

from aeolian.control.calls import Calls
from aeolian.control.functions import Functions
from aeolian.domain.caller import Caller
from aeolian.domain.calls import InputKey, Status
from aeolian.storage import calls as storage
from aeolian.storage import input_lists
from aeolian.storage.database import Database

MAX_GRAPH = 5000
MAX_DEPTH = 50
MAX_LISTED = 20_000


class CallNode(NamedTuple):
    call_id: str
    function_id: str
    parent_input_id: str


class InputNode(NamedTuple):
    key: InputKey
    status: Status
    task_id: str


class CallGraph(NamedTuple):
    calls: list[CallNode]
    inputs: list[InputNode]
    is_truncated: bool


class InputRecord(NamedTuple):
    """One input of a call, for a list. Times are epoch seconds, 0 where not yet."""

    call_id: str
    idx: int
    status: Status
    is_running: bool
    task_id: str
    created_at: float
    started_at: float
    finished_at: float


class CallHistory:
    def __init__(self, database: Database, calls: Calls, functions: Functions):
        self._database = database
        self._calls = calls
        self._functions = functions

    async def graph(self, call_id: str, caller: Caller) -> CallGraph:
        """The whole graph that this call is part of: from the call that nobody's input made, downwards."""
        await self._calls.open(call_id, caller)
        await self._calls.flush()

        def read(connection):
            root, depth = storage.get_call(connection, call_id), 0
            while root is not None and root.parent_call_id and depth < MAX_DEPTH:
                above = storage.get_call(connection, root.parent_call_id)
                if above is None or above.workspace != caller.workspace:
                    break
                root, depth = above, depth + 1
            rows, level = ([root], [root.call_id]) if root is not None else ([], [])
            while level and len(rows) < MAX_GRAPH:
                below = [row for row in storage.children_of(connection, level) if row.workspace == caller.workspace]
                rows += below
                level = [row.call_id for row in below]
            return rows, storage.graph_inputs(connection, [row.call_id for row in rows], MAX_GRAPH)

        rows, inputs = await self._database.read(read)
        known = {row.call_id for row in rows}
        calls = [
            CallNode(row.call_id, row.function_id, _parent(row) if row.parent_call_id in known else "") for row in rows
        ]
        nodes = [InputNode(InputKey(id, idx), Status(status), task_id) for id, idx, status, task_id in inputs]
        return CallGraph(calls, nodes, len(rows) >= MAX_GRAPH or len(inputs) >= MAX_GRAPH)

    async def inputs_of(self, call_id: str, caller: Caller) -> list[InputRecord]:
        """What became of each input of a call."""
        call = await self._calls.open(call_id, caller)
        await self._calls.flush()
        rows = await self._database.read(lambda c: storage.inputs_of_calls(c, [call_id]))
        return [_finished(row) for row in rows] + [_unfinished(item) for item in call.inputs.values()]

    async def recent(
        self, function_id: str, caller: Caller, *, since: float, until: float, limit: int, newest: bool, variants: bool
    ) -> list[InputRecord]:
        """Inputs made in a span of time, the oldest (or the newest) first."""
        ids = self._ids(function_id, caller, variants)
        limit = min(limit or MAX_LISTED, MAX_LISTED)
        await self._calls.flush()

        def read(connection):
            args = (connection, ids, since, until, limit)
            return input_lists.finished_between(*args, newest=newest), input_lists.unfinished_between(
                *args, newest=newest
            )

        finished, unfinished = await self._database.read(read)
        records = [_finished(row) for row in finished]
        for row in unfinished:
            call = self._calls.living(row.call_id)
            if call is not None and (item := call.inputs.get(row.idx)) is not None:
                records.append(_unfinished(item))
        records.sort(key=lambda record: (record.created_at, record.call_id, record.idx), reverse=newest)
        return records[:limit]

    async def count(
        self, function_id: str, caller: Caller, *, since: float, until: float, bucket_s: float, variants: bool
    ) -> list[tuple[float, int]]:
        """(start of a bucket of time, inputs made in it)."""
        ids = self._ids(function_id, caller, variants)
        await self._calls.flush()
        return await self._database.read(lambda c: input_lists.count_inputs(c, ids, since, until, bucket_s))

    def _ids(self, function_id: str, caller: Caller, variants: bool) -> list[str]:
        self._functions.row(function_id, caller)
        return self._functions.with_variants(function_id) if variants else [function_id]


def _parent(row) -> str:
    return InputKey(row.parent_call_id, row.parent_idx).input_id if row.parent_call_id else ""


def _finished(row) -> InputRecord:
    return InputRecord(
        row.call_id, row.idx, Status(row.status), False, row.task_id, row.created_at, row.started_at, row.finished_at
    )


def _unfinished(item) -> InputRecord:
    return InputRecord(
        item.call.call_id,
        item.idx,
        Status.PENDING,
        bool(item.task_id),
        item.task_id,
        item.created_at,
        item.started_at,
        0.0,
    )
