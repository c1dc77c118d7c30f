"""Containers that die before they do anything: what their callers and their logs are told."""

import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from modal_proto import api_pb2
from whole_server import SomeWorker, WholeServer, whole_server

from aeolian.domain.containers import ContainerState, ExitStatus
from aeolian.domain.link import ContainerChanged, LogLine, StartContainer

FAILURE = api_pb2.GenericResult.GENERIC_STATUS_FAILURE


@pytest.fixture
def data_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    yield folder / "data"
    shutil.rmtree(folder)


@pytest.fixture
async def server(data_dir) -> AsyncIterator[WholeServer]:
    async with whole_server(data_dir) as server:
        yield server


async def call(server: WholeServer, function_id: str) -> str:
    request = api_pb2.FunctionMapRequest(
        function_id=function_id,
        function_call_type=api_pb2.FUNCTION_CALL_TYPE_UNARY,
        function_call_invocation_type=api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC,
        pipelined_inputs=[api_pb2.FunctionPutInputsItem(idx=0, input=api_pb2.FunctionInput(args=b"x"))],
    )
    return (await server.call("FunctionMap", request)).message.function_call_id


async def result(server: WholeServer, call_id: str) -> api_pb2.GenericResult:
    request = api_pb2.FunctionGetOutputsRequest(function_call_id=call_id, timeout=5, last_entry_id="0-0")
    [item] = (await server.call("FunctionGetOutputs", request, timeout_s=10)).message.outputs
    return item.result


async def dies(worker: SomeWorker, *lines: str, code: int = 7, runs: bool = False, task_result: bytes = b"") -> str:
    """The next container that is asked for starts, and ends with these lines."""
    task_id = await worker.started(runs=False)
    if runs:
        worker.send(ContainerChanged(task_id, ContainerState.RUNNING.value, time.time()))
    worker.send(
        ContainerChanged(
            task_id,
            ContainerState.EXITED.value,
            time.time(),
            exit=ExitStatus(code),
            last_lines=lines,
            task_result=task_result,
        )
    )
    return task_id


async def logged(server: WholeServer, app_id: str) -> str:
    """Everything, once it is stored."""
    await server.services.logs.append(app_id, "ta-last", "fu-last", [LogLine(1, time.time(), "the last line\n")])
    request = api_pb2.AppFetchLogsRequest(app_id=app_id, limit=100)
    request.since.FromSeconds(int(time.time()) - 60)
    request.until.FromSeconds(int(time.time()) + 60)
    reply = await server.call("AppFetchLogs", request)
    return "".join(item.data for batch in reply.message.batches for item in batch.items)


@pytest.mark.parametrize("runs", [False, True], ids=["at its start", "just after it"])
async def test_after_three_deaths_callers_are_told_with_the_last_lines(server, runs):
    worker = await server.worker()
    app_id, function_id = await server.deploy()
    call_id = await call(server, function_id)
    for _ in range(3):
        task_id = await dies(worker, "loading", "cannot go on", runs=runs)
    failed = await result(server, call_id)
    assert failed.status == FAILURE
    assert task_id in failed.exception
    assert failed.exception.endswith(
        "ended by itself with exit code 7\nThe last lines that it wrote:\n    loading\n    cannot go on"
    )
    assert f"{task_id} " in (text := await logged(server, app_id))
    assert "number 3 in a row, the next one is started in 4 s" in text


async def test_an_exception_at_the_start_is_told_at_once(server):
    worker = await server.worker()
    _, function_id = await server.deploy()
    call_id = await call(server, function_id)
    raised = api_pb2.GenericResult(status=FAILURE, exception="ValueError('no model')", data=b"pickled")
    await dies(worker, "loading", code=0, task_result=raised.SerializeToString())
    failed = await result(server, call_id)
    assert (failed.exception, failed.data) == ("ValueError('no model')", b"pickled")


async def test_a_start_that_takes_too_long_is_told_with_the_last_lines(server):
    worker = await server.worker()
    _, function_id = await server.deploy()
    call_id = await call(server, function_id)
    late = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT, exception="not ready after 60 s")
    await dies(worker, "downloading 3 %", code=-9, task_result=late.SerializeToString())
    assert (await result(server, call_id)).exception == (
        "not ready after 60 s\nThe last lines that it wrote:\n    downloading 3 %"
    )


async def test_meanwhile_others_wait_and_a_new_version_starts_at_once(server):
    worker = await server.worker()
    _, function_id = await server.deploy()
    call_id = await call(server, function_id)
    for _ in range(3):
        await dies(worker)
    await result(server, call_id)
    call_id = await call(server, function_id)
    pool = server.services.pools.get(function_id)
    assert pool.crash_loop.num_deaths == 3
    assert pool.crash_loop.not_before > time.monotonic()
    assert not [command for command in worker.commands if isinstance(command, StartContainer)]
    await server.deploy()
    task_id = await worker.started()
    assert len((await worker.given(task_id)).held) == 1
