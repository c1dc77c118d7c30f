"""A server and a worker that lose each other, or themselves, and find again what they were doing."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from modal_proto import api_pb2
from whole_server import SomeWorker, WholeServer, whole_server

from aeolian.control import recovery
from aeolian.control.crash_loop import NUM_FREE_TRIES
from aeolian.domain.containers import ContainerState, ExitStatus
from aeolian.domain.link import (
    AckExit,
    AckLogs,
    AckOutputs,
    AssignInputs,
    CancelInputs,
    ContainerChanged,
    ContainerReport,
    HeldInput,
    Leaving,
    LogLine,
    Logs,
    Outputs,
    StartContainer,
    StopContainer,
    WantInputs,
    Welcome,
)

UNARY = api_pb2.FUNCTION_CALL_TYPE_UNARY
ASYNC = api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC
SUCCESS = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS


@pytest.fixture
def data_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    yield folder / "data"
    shutil.rmtree(folder)


@pytest.fixture
async def server(data_dir) -> AsyncIterator[WholeServer]:
    async with whole_server(data_dir) as server:
        yield server


async def spawn(server: WholeServer, function_id: str, count: int = 1) -> str:
    request = api_pb2.FunctionMapRequest(
        function_id=function_id,
        function_call_type=UNARY,
        function_call_invocation_type=ASYNC,
        pipelined_inputs=[
            api_pb2.FunctionPutInputsItem(idx=idx, input=api_pb2.FunctionInput(args=b"x")) for idx in range(count)
        ],
    )
    return (await server.call("FunctionMap", request)).message.function_call_id


async def outputs(server: WholeServer, call_id: str, timeout_s: float = 5) -> list[api_pb2.FunctionGetOutputsItem]:
    request = api_pb2.FunctionGetOutputsRequest(
        function_call_id=call_id, timeout=timeout_s, last_entry_id="0-0", start_idx=0, end_idx=9
    )
    return list((await server.call("FunctionGetOutputs", request, timeout_s=timeout_s + 5)).message.outputs)


def output(task_id: str, seq: int, input_id: str, data: bytes = b"done", retry_count: int = 0) -> Outputs:
    item = api_pb2.FunctionPutOutputsItem(
        input_id=input_id, retry_count=retry_count, result={"status": SUCCESS, "data": data}
    )
    return Outputs(task_id, seq, (item.SerializeToString(),))


def report(task_id: str, function_id: str, *held: str, state: str = "running", want: int = 0) -> ContainerReport:
    wants = WantInputs(task_id, want) if want else None
    return ContainerReport(task_id, function_id, state, tuple(HeldInput(input_id, 0) for input_id in held), wants)


def exited(task_id: str, code: int = 0, reason: str = "") -> ContainerChanged:
    return ContainerChanged(task_id, ContainerState.EXITED.value, 3.0, exit=ExitStatus(code, reason=reason))


async def running(server: WholeServer, worker: SomeWorker) -> tuple[str, str, str, str]:
    """A spawned call in the hands of a container: function id, call id, task id, input id."""
    _, function_id = await server.deploy()
    call_id = await spawn(server, function_id)
    task_id = await worker.started()
    [held] = (await worker.given(task_id)).held
    return function_id, call_id, task_id, held.input_id


# ---- the server was killed ----------------------------------------------------------------------------------


async def test_what_a_container_holds_stays_with_it_when_the_server_starts_again(data_dir):
    async with whole_server(data_dir) as server:
        worker = await server.worker()
        function_id, call_id, task_id, input_id = await running(server, worker)
    async with whole_server(data_dir) as server:
        worker = SomeWorker(server, "wo-test")
        await worker.connect([report(task_id, function_id, input_id)])
        worker.send(output(task_id, 1, input_id, b"from before"))
        assert (await worker.told(AckOutputs)).seq == 1
        [item] = await outputs(server, call_id)
        assert item.result.data == b"from before"
        assert not [command for command in worker.commands if isinstance(command, StartContainer)]


async def test_an_input_that_was_on_its_way_to_a_container_is_given_again(data_dir):
    async with whole_server(data_dir) as server:
        worker = await server.worker()
        function_id, _, task_id, input_id = await running(server, worker)
    async with whole_server(data_dir) as server:
        worker = SomeWorker(server, "wo-test")
        await worker.connect([report(task_id, function_id, want=1)])
        assert (await worker.told(AssignInputs)).held == (HeldInput(input_id, 0),)


async def test_an_output_whose_acknowledgement_was_lost_is_acknowledged_again_and_counts_once(data_dir):
    async with whole_server(data_dir) as server:
        worker = await server.worker()
        function_id, call_id, task_id, input_id = await running(server, worker)
        worker.send(output(task_id, 1, input_id, b"first"))
        await worker.told(AckOutputs)
    async with whole_server(data_dir) as server:
        worker = SomeWorker(server, "wo-test")
        await worker.connect([report(task_id, function_id, input_id)])
        worker.send(output(task_id, 1, input_id, b"again"))
        await worker.told(AckOutputs)
        assert [item.result.data for item in await outputs(server, call_id)] == [b"first"]


async def test_rpcs_of_a_container_wait_until_its_worker_has_said_what_it_holds(data_dir):
    async with whole_server(data_dir) as server:
        worker = await server.worker()
        function_id, call_id, task_id, input_id = await running(server, worker)
    async with whole_server(data_dir) as server:
        worker = SomeWorker(server, "wo-test")
        request = api_pb2.FunctionCallPutDataRequest(
            function_call_id=call_id, data_chunks=[api_pb2.DataChunk(index=1, data=b"chunk")]
        )
        put = asyncio.ensure_future(
            server.call("FunctionCallPutDataOut", request, metadata=worker.as_container(task_id))
        )
        await server.call("ClientHello")
        assert not put.done()
        await worker.connect([report(task_id, function_id, input_id)])
        assert (await put).code is grpc.StatusCode.OK


async def test_the_end_of_a_container_is_heard_by_the_next_server_with_its_reason(data_dir):
    async with whole_server(data_dir) as server:
        worker = await server.worker()
        function_id, call_id, task_id, input_id = await running(server, worker)
    async with whole_server(data_dir) as server:
        worker = SomeWorker(server, "wo-test")
        await worker.connect([report(task_id, function_id, input_id, state="exited")])
        worker.send(output(task_id, 1, input_id), exited(task_id, 7))
        assert (await worker.told(AckExit)).task_id == task_id
        assert len(await outputs(server, call_id)) == 1
        await asyncio.sleep(0.1)
        assert (await server.services.containers.history(task_id)).exit_code == 7


async def test_a_container_that_is_starting_when_the_server_is_killed_goes_on_and_gets_the_input(data_dir):
    async with whole_server(data_dir) as server:
        worker = await server.worker()
        _, function_id = await server.deploy()
        call_id = await spawn(server, function_id)
        task_id = await worker.started(runs=False)
    async with whole_server(data_dir) as server:
        worker = SomeWorker(server, "wo-test")
        await worker.connect([report(task_id, function_id, state="starting")])
        worker.send(ContainerChanged(task_id, ContainerState.RUNNING.value, 2.0))
        [held] = (await worker.given(task_id)).held
        worker.send(output(task_id, 1, held.input_id))
        assert len(await outputs(server, call_id)) == 1
        assert not [command for command in worker.commands if isinstance(command, StartContainer)]


async def test_a_stopped_app_is_stopped_by_the_next_server_too(data_dir):
    async with whole_server(data_dir) as server:
        worker = await server.worker()
        app_id, function_id = await server.deploy()
        call_id = await spawn(server, function_id)
        task_id = await worker.started()
        stop = asyncio.ensure_future(server.call("AppStop", api_pb2.AppStopRequest(app_id=app_id), timeout_s=30))
        await worker.told(StopContainer)
    stop.cancel()
    async with whole_server(data_dir) as server:
        worker = SomeWorker(server, "wo-test")
        await worker.connect([report(task_id, function_id)])
        assert (await worker.told(StopContainer)).task_id == task_id
        worker.send(exited(task_id))
        again = await server.call("AppStop", api_pb2.AppStopRequest(app_id=app_id), timeout_s=30)
        assert again.code is grpc.StatusCode.OK
        [item] = await outputs(server, call_id)
        assert item.result.status == api_pb2.GenericResult.GENERIC_STATUS_TERMINATED


async def test_a_container_that_the_database_does_not_know_is_ended(server):
    worker = SomeWorker(server, "wo-test")
    link = worker.connect([report("ta-unheard", "fu-unheard")])
    seen: list[Welcome] = []
    worker.commands = seen  # the first answer is taken by `connect`
    await link
    worker.send(exited("ta-unheard"))
    assert (await worker.told(AckExit)).task_id == "ta-unheard"


# ---- the worker was killed, or cut off ----------------------------------------------------------------------


async def test_inputs_of_a_worker_that_starts_anew_run_again(server):
    worker = await server.worker()
    _, call_id, _, input_id = await running(server, worker)
    await worker.hang_up()
    await worker.connect(life="life-2")
    task_id = await worker.started()
    [held] = (await worker.given(task_id)).held
    assert held == HeldInput(input_id, 0)
    worker.send(output(task_id, 1, input_id))
    assert len(await outputs(server, call_id)) == 1


async def test_a_worker_that_dies_while_containers_start_is_no_failure_of_theirs(server):
    worker = await server.worker()
    _, function_id = await server.deploy()
    call_id = await spawn(server, function_id)
    for _ in range(NUM_FREE_TRIES + 1):
        await worker.started(runs=False)
        await worker.hang_up()
        await worker.connect()
    task_id = await worker.started()
    [held] = (await worker.given(task_id)).held
    worker.send(output(task_id, 1, held.input_id))
    [item] = await outputs(server, call_id)
    assert item.result.status == SUCCESS


async def test_a_start_that_was_lost_with_the_connection_is_tried_again_at_once(server):
    worker = await server.worker()
    _, function_id = await server.deploy()
    await spawn(server, function_id)
    lost = await worker.told(StartContainer)
    await worker.hang_up()
    await worker.connect()
    assert (await worker.told(StartContainer)).spec.task_id != lost.spec.task_id


async def test_a_stop_that_was_lost_with_the_connection_is_told_again(server):
    worker = await server.worker()
    function_id, _, task_id, input_id = await running(server, worker)
    await worker.hang_up()
    stop = await server.call("ContainerStop", api_pb2.ContainerStopRequest(task_id=task_id))
    assert stop.code is grpc.StatusCode.OK
    await worker.connect([report(task_id, function_id, input_id)])
    assert (await worker.told(StopContainer)).task_id == task_id


async def test_a_cancellation_that_was_lost_with_the_connection_is_told_again(server):
    worker = await server.worker()
    function_id, call_id, task_id, input_id = await running(server, worker)
    await worker.hang_up()
    await server.call("FunctionCallCancel", api_pb2.FunctionCallCancelRequest(function_call_id=call_id))
    await worker.connect([report(task_id, function_id, input_id)])
    assert (await worker.told(CancelInputs)).input_ids == (input_id,)


async def test_a_short_cut_changes_nothing_for_containers(server):
    worker = await server.worker()
    function_id, call_id, task_id, input_id = await running(server, worker)
    await worker.hang_up()
    await worker.connect([report(task_id, function_id, input_id)])
    worker.send(output(task_id, 1, input_id))
    assert len(await outputs(server, call_id)) == 1
    call_id = await spawn(server, function_id)
    [held] = (await worker.given(task_id, 2)).held
    worker.send(output(task_id, 2, held.input_id))
    assert len(await outputs(server, call_id)) == 1


async def test_a_worker_that_leaves_gets_nothing_new(server):
    leaving = await server.worker("wo-1")
    _, function_id = await server.deploy()
    await spawn(server, function_id)
    task_id = await leaving.started()
    await leaving.given(task_id)
    leaving.send(Leaving())
    staying = await server.worker("wo-2")
    await spawn(server, function_id)
    assert (await staying.told(StartContainer)).spec.function_id == function_id
    assert not [command for command in leaving.commands if isinstance(command, StartContainer)]


# ---- log lines ----------------------------------------------------------------------------------------------


def lines(*texts: str) -> tuple[LogLine, ...]:
    return tuple(LogLine(1, time.time(), text) for text in texts)


async def logs_of(server: WholeServer, app_id: str) -> list[str]:
    request = api_pb2.AppFetchLogsRequest(app_id=app_id, limit=100)
    request.since.FromSeconds(int(time.time()) - 3600)
    reply = (await server.call("AppFetchLogs", request)).message
    return [item.data for batch in reply.batches for item in batch.items]


async def acknowledged(worker: SomeWorker, *seqs: int) -> None:
    for seq in seqs:
        await worker.told(lambda command, seq=seq: isinstance(command, AckLogs) and command.seq == seq)


async def test_lines_of_containers_that_are_gone_are_not_overtaken_by_those_of_others(server):
    worker = await server.worker()
    app_id, function_id = await server.deploy()
    await spawn(server, function_id)
    gone = await worker.started()
    await worker.given(gone)
    worker.send(exited(gone, 1))
    there = await worker.started()
    batches = [Logs(number, gone if number % 2 else there, "", lines(f"{number}\n")) for number in range(1, 9)]
    worker.send(*batches)
    await acknowledged(worker, *range(1, 9))
    assert await logs_of(server, app_id) == [f"{number}\n" for number in range(1, 9)]


async def test_the_last_lines_of_a_container_come_before_its_end(server):
    worker = await server.worker()
    app_id, function_id = await server.deploy()
    await spawn(server, function_id)
    task_id = await worker.started()
    request = api_pb2.AppGetLogsRequest(app_id=app_id, task_id=task_id, timeout=20)
    following = asyncio.ensure_future(server.call("AppGetLogs", request, timeout_s=20))
    await asyncio.sleep(0.05)
    worker.send(
        *[Logs(number, task_id, "", lines(f"{number}\n")) for number in range(1, 30)],
        exited(task_id, 1),
    )
    reply = await following
    assert [item.data for batch in reply.messages for item in batch.items if item.data] == [
        f"{number}\n" for number in range(1, 30)
    ]
    assert reply.messages[-1].app_done


async def test_lines_that_were_not_acknowledged_are_stored_once_by_the_next_server(data_dir):
    async with whole_server(data_dir) as server:
        worker = await server.worker()
        app_id, function_id = await server.deploy()
        await spawn(server, function_id)
        task_id = await worker.started()
        worker.send(Logs(1, task_id, "", lines("1\n")), Logs(2, task_id, "", lines("2\n")))
        await acknowledged(worker, 1, 2)
    async with whole_server(data_dir) as server:
        worker = SomeWorker(server, "wo-test")
        await worker.connect([report(task_id, function_id)])
        worker.send(*[Logs(number, task_id, "", lines(f"{number}\n")) for number in (1, 2, 3)])
        await acknowledged(worker, 1, 2, 3)
        assert await logs_of(server, app_id) == ["1\n", "2\n", "3\n"]


# ---- a worker that does not come back -----------------------------------------------------------------------


async def test_inputs_of_a_worker_that_stays_away_run_elsewhere(server, monkeypatch):
    monkeypatch.setattr(recovery, "WORKER_AWAY_S", 0.1)
    worker = await server.worker("wo-1")
    _, call_id, _, input_id = await running(server, worker)
    other = await server.worker("wo-2")
    await worker.hang_up()
    task_id = await other.started()
    [held] = (await other.given(task_id)).held
    assert held == HeldInput(input_id, 0)
    other.send(output(task_id, 1, input_id, b"elsewhere"))
    [item] = await outputs(server, call_id)
    assert item.result.data == b"elsewhere"


async def test_the_output_of_a_worker_that_was_given_up_counts_if_it_is_the_first(server, monkeypatch):
    monkeypatch.setattr(recovery, "WORKER_AWAY_S", 0.1)
    late = await server.worker("wo-1")
    function_id, call_id, late_task, input_id = await running(server, late)
    other = await server.worker("wo-2")
    await late.hang_up()
    task_id = await other.started()
    await other.given(task_id)
    await late.connect([report(late_task, function_id, input_id)])
    late.send(output(late_task, 1, input_id, b"late, but first"))
    assert (await late.told(AckOutputs)).seq == 1
    assert (await other.told(CancelInputs)).input_ids == (input_id,)
    other.send(output(task_id, 1, input_id, b"second"))
    await other.told(AckOutputs)
    assert [item.result.data for item in await outputs(server, call_id)] == [b"late, but first"]


async def test_after_a_restart_inputs_wait_only_so_long_for_the_worker_that_had_them(data_dir, monkeypatch):
    async with whole_server(data_dir) as server:
        _, _, _, input_id = await running(server, await server.worker("wo-1"))
    monkeypatch.setattr(recovery, "RECOVERY_S", 0.2)
    async with whole_server(data_dir) as server:
        other = await server.worker("wo-2")
        task_id = await other.started()
        assert (await other.given(task_id)).held == (HeldInput(input_id, 0),)
