"""RPCs of app logs: follow, fetch, count."""

from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp
from modal_proto import api_pb2

from aeolian.control.apps import Apps
from aeolian.control.log_history import LogHistory
from aeolian.control.logs import AppLogs
from aeolian.domain.apps import AppState
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import InvalidArgument, NotFound
from aeolian.domain.logs import LogBatch, LogFilter, TaskChange

MAX_FOLLOW_S = 60.0
MAX_FETCHED_LINES = 20_000
MAX_RANGE_S = 36 * 24 * 3600.0
"""The SDK's own limit is 35 days."""
MAX_LISTED_BUCKETS = 10_000
MAX_MESSAGE_BYTES = 2 << 20
SHOWN_FIRST = 100
"""Lines of the past that a new follower of a deployed app gets."""
SHOWN_FIRST_S = 3600.0

AppOfTask = Callable[[str], Awaitable[str | None]]
"""The app that a container belongs (or belonged) to."""


class LogRpcs:
    def __init__(self, apps: Apps, logs: AppLogs, history: LogHistory, clock: Clock, app_of_task: AppOfTask):
        self._apps = apps
        self._logs = logs
        self._history = history
        self._clock = clock
        self._app_of_task = app_of_task

    async def AppGetLogs(
        self, request: api_pb2.AppGetLogsRequest, caller: Caller
    ) -> AsyncIterator[api_pb2.TaskLogsBatch]:
        app_id = request.app_id or await self._app_of_task(request.task_id)
        if not app_id:
            raise NotFound(f"there is no container {request.task_id!r}")
        app = await self._apps.find(app_id, caller)
        wanted = LogFilter(
            fd=request.file_descriptor,
            function_id=request.function_id,
            variant_function_id=request.parametrized_function_id,
            function_call_id=request.function_call_id,
            input_id=request.input_id,
            task_id=request.task_id,
            search_text=request.search_text,
        )
        after = _line_number(request.last_entry_id)
        narrow = wanted.task_id or wanted.function_call_id or wanted.input_id
        if after == 0 and app.state is AppState.DEPLOYED and not narrow:
            after = await self._start_of_view(app_id, wanted)
        task_ended = bool(wanted.task_id) and await self._logs.has_task_ended(app_id, wanted.task_id)
        timeout_s = min(max(0.0, request.timeout), MAX_FOLLOW_S)
        async for item in self._logs.follow(
            app_id, after, wanted, timeout_s, lambda: task_ended or self._apps.is_over(app_id)
        ):
            if item is None:
                yield api_pb2.TaskLogsBatch(app_done=True)
            elif isinstance(item, TaskChange):
                yield _change(item, self._clock.now())
            else:
                for message in _messages(item):
                    yield message

    async def AppFetchLogs(self, request: api_pb2.AppFetchLogsRequest, caller: Caller) -> api_pb2.AppFetchLogsResponse:
        await self._apps.find(request.app_id, caller)
        since, until = self._range(request)
        limit = min(request.limit or MAX_FETCHED_LINES, MAX_FETCHED_LINES)
        batches = await self._history.tail(request.app_id, since, until, limit, _filter(request))
        return api_pb2.AppFetchLogsResponse(batches=[message for batch in batches for message in _messages(batch)])

    async def AppCountLogs(self, request: api_pb2.AppCountLogsRequest, caller: Caller) -> api_pb2.AppCountLogsResponse:
        await self._apps.find(request.app_id, caller)
        since, until = self._range(request)
        width = request.bucket_secs
        if width == 0:
            raise InvalidArgument("bucket_secs must be at least 1")
        counts = await self._history.count(request.app_id, since, until, width, _filter(request))
        starts = range(int(since // width) * width, int(-(-until // 1)), width)
        response = api_pb2.AppCountLogsResponse(app_id=request.app_id)
        for start in starts if len(starts) <= MAX_LISTED_BUCKETS else sorted(counts):
            by_fd = counts.get(start, {})
            stdout = by_fd.get(api_pb2.FILE_DESCRIPTOR_STDOUT, 0)
            stderr = by_fd.get(api_pb2.FILE_DESCRIPTOR_STDERR, 0)
            response.buckets.add(
                bucket_start_at=Timestamp(seconds=start),
                stdout_logs=stdout,
                stderr_logs=stderr,
                system_logs=sum(by_fd.values()) - stdout - stderr,
            )
        return response

    def _range(self, request: api_pb2.AppFetchLogsRequest | api_pb2.AppCountLogsRequest) -> tuple[float, float]:
        """[since, until) in epoch seconds."""
        since = request.since.seconds + request.since.nanos / 1e9
        until = request.until.seconds + request.until.nanos / 1e9 if request.HasField("until") else self._clock.now()
        if until - since > MAX_RANGE_S:
            raise InvalidArgument("logs can be read over at most 35 days at once: narrow the time range")
        return since, until

    async def _start_of_view(self, app_id: str, wanted: LogFilter) -> int:
        """The line after which a new follower of a deployed app begins: the last few are shown at once."""
        end = await self._logs.last_seq(app_id)
        now = self._clock.now()
        wanted = msgspec.structs.replace(wanted, without_builds=True)
        recent = await self._history.tail(app_id, now - SHOWN_FIRST_S, now + SHOWN_FIRST_S, SHOWN_FIRST, wanted)
        if not recent:
            return end
        first = recent[0]
        picks = wanted != LogFilter(without_builds=True)
        return first.first_seq - 1 if picks else first.last_seq - len(first.lines)


def _line_number(entry_id: str) -> int:
    """The number of the last line that a follower has seen; 0 = none."""
    if not entry_id:
        return 0
    number = entry_id.partition("-")[0]  # "0-0" is what some clients begin with
    if not (number.isascii() and number.isdigit() and len(number) < 19):
        raise InvalidArgument(f"last_entry_id {entry_id!r} is not one that this server gave out")
    return int(number)


def _filter(request: api_pb2.AppFetchLogsRequest | api_pb2.AppCountLogsRequest) -> LogFilter:
    return LogFilter(
        fd=request.source,
        function_id=request.function_id,
        variant_function_id=request.parametrized_function_id,
        function_call_id=request.function_call_id,
        task_id=request.task_id,
        search_text=request.search_text,
        without_builds=not request.task_id,  # a build is asked for by its id
    )


def _messages(batch: LogBatch) -> list[api_pb2.TaskLogsBatch]:
    """The batch in messages of bearable size; only the last one carries the entry id to go on from."""
    messages: list[api_pb2.TaskLogsBatch] = []
    size = MAX_MESSAGE_BYTES
    for line in batch.lines:
        if size >= MAX_MESSAGE_BYTES:
            size = 0
            messages.append(
                api_pb2.TaskLogsBatch(
                    task_id=batch.task_id,
                    function_id=batch.function_id,
                    root_function_id=batch.root_function_id,
                    image_id=batch.image_id,
                )
            )
        messages[-1].items.add(
            data=line.data,
            file_descriptor=line.fd,
            timestamp=line.at,
            timestamp_ns=int(line.at * 1e9),
            function_call_id=line.function_call_id,
            input_id=line.input_id,
        )
        size += len(line.data) + 64
    if messages:
        messages[-1].entry_id = str(batch.last_seq)
    return messages


def _change(change: TaskChange, now: float) -> api_pb2.TaskLogsBatch:
    message = api_pb2.TaskLogsBatch(task_id=change.task_id, function_id=change.function_id)
    message.items.add(task_state=change.state, timestamp=now)
    return message
