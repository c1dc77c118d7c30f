"""The worker as its server sees it: what it says, what it repeats, and how it ends."""

import asyncio
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from modal_proto import api_pb2
from some_server import PlayedContainer, SomeRuntime, SomeServer, an_agent, assignment, start_of

from aeolian.domain.containers import ContainerState
from aeolian.domain.link import (
    AckExit,
    AckLogs,
    AckOutputs,
    ContainerChanged,
    HeldInput,
    Hello,
    Leaving,
    Logs,
    Outputs,
    ReturnInputs,
    StopContainer,
    WantInputs,
)
from aeolian.worker.agent import Agent


class Node:
    """A worker, its server, and its containers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.server = SomeServer(folder / "worker.sock")
        self.runtime = SomeRuntime()
        self.agent: Agent = an_agent(folder, self.runtime)

    async def container(self, task_id: str = "ta-1", **spec) -> PlayedContainer:
        self.server.send(start_of(task_id, **spec))
        return await asyncio.wait_for(self.runtime.started.get(), 10)

    async def working(self, *input_ids: str) -> PlayedContainer:
        """A container that was given these inputs."""
        container = await self.container()
        asked = asyncio.ensure_future(container.get_inputs())
        want = await self.server.heard(WantInputs)
        self.server.send(assignment(container.task_id, want.seq, *input_ids))
        assert [item.input_id for item in await asked] == [input_ids[0]]
        return container

    async def restart_server(self) -> None:
        await self.server.stop()
        num_hellos = len(self.server.of(Hello))
        self.server.events.clear()
        await self.server.start()
        await self.server.heard(Hello)
        assert num_hellos

    async def exit_heard(self) -> ContainerChanged:
        number = 0
        while True:
            number += 1
            event = await self.server.heard(ContainerChanged, number)
            if event.state == ContainerState.EXITED:
                return event


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    node = Node(folder)
    await node.server.start()
    await node.agent.open()
    await node.server.heard(Hello)
    yield node
    node.server.acknowledge_all()
    await node.agent.close(0)
    shutil.rmtree(folder)


# ---- a server that goes away --------------------------------------------------------------------------------


async def test_outputs_are_repeated_until_they_are_stored(node):
    container = await node.working("in-1:0")
    await container.put_output("in-1:0", b"one")
    first = await node.server.heard(Outputs)
    await node.restart_server()
    hello = await node.server.heard(Hello)
    assert hello.containers[0].held == (HeldInput("in-1:0", 0),)
    assert await node.server.heard(Outputs) == first
    node.server.send(AckOutputs("ta-1", first.seq))
    await node.container("ta-2")  # the acknowledgement came before it
    await node.restart_server()
    await node.container("ta-3")
    assert node.server.of(Outputs) == []


async def test_an_end_that_the_server_did_not_hear_is_told_after_the_last_outputs(node):
    container = await node.working("in-1:0")
    await node.server.stop()
    await container.put_output("in-1:0")
    container.stdout.feed_data(b"last words\n")
    container.end(3)
    await asyncio.sleep(0)
    node.server.events.clear()
    await node.server.start()
    end = await node.exit_heard()
    assert (end.exit.exit_code, end.task_id) == (3, "ta-1")
    kinds = [type(event) for event in node.server.events]
    assert kinds.index(Hello) < kinds.index(Logs) < kinds.index(ContainerChanged)
    assert kinds.index(Outputs) < kinds.index(ContainerChanged)


async def test_an_end_is_repeated_until_it_is_heard(node):
    container = await node.container()
    container.end(3)
    await node.exit_heard()
    await node.restart_server()
    end = await node.exit_heard()
    assert end.exit.exit_code == 3
    [report] = (await node.server.heard(Hello)).containers
    assert report.state == ContainerState.EXITED
    node.server.send(AckExit("ta-1"), AckOutputs("ta-1", 0))
    await node.container("ta-2")  # the acknowledgement came before it
    await node.restart_server()
    assert [report.task_id for report in (await node.server.heard(Hello)).containers] == ["ta-2"]


async def test_a_container_that_has_ended_cannot_be_stopped(node):
    container = await node.container()
    container.end(3)
    await node.exit_heard()
    node.server.send(StopContainer("ta-1", graceful=False))
    await node.container("ta-2")
    states = [event.state for event in node.server.of(ContainerChanged) if event.task_id == "ta-1"]
    assert states[-1] == ContainerState.EXITED
    assert container.signals == []


async def test_log_lines_are_kept_until_each_batch_is_stored(node):
    container = await node.container()
    for number in range(3):
        container.stdout.feed_data(b"line %d\n" % number)
        await node.server.heard(Logs, number + 1)
    first, second, third = node.server.of(Logs)
    node.server.send(AckLogs(third.seq), AckLogs(first.seq))
    await node.container("ta-2")  # both came before it
    await node.restart_server()
    assert await node.server.heard(Logs) == second
    assert len(node.server.of(Logs)) == 1


async def test_a_container_is_started_once_although_it_is_told_twice(node):
    await node.container()
    node.server.send(start_of("ta-1"))
    await node.container("ta-2")
    assert node.runtime.started.empty()


async def test_inputs_for_a_request_that_is_over_go_back(node):
    container = await node.container()
    asked = asyncio.ensure_future(container.get_inputs())
    want = await node.server.heard(WantInputs)
    node.server.send(assignment("ta-1", want.seq + 1, "in-1:7"))
    assert (await node.server.heard(ReturnInputs)).held == (HeldInput("in-1:7", 0),)
    asked.cancel()


# ---- Ctrl-C -------------------------------------------------------------------------------------------------


async def test_what_runs_may_finish_and_its_output_is_stored(node):
    container = await node.working("in-1:0", "in-1:1")
    closing = asyncio.ensure_future(node.agent.close(60))
    await node.server.heard(Leaving)
    assert (await node.server.heard(ReturnInputs)).held == (HeldInput("in-1:1", 0),)
    await container.put_output("in-1:0", b"made in time")
    outputs = await node.server.heard(Outputs)
    assert api_pb2.FunctionPutOutputsItem.FromString(outputs.items[0]).result.data == b"made in time"
    [item] = await container.get_inputs()
    assert item.kill_switch
    container.end()
    node.server.send(AckOutputs("ta-1", outputs.seq))
    end = await node.exit_heard()
    assert end.exit.reason == "the worker is shutting down"
    assert not closing.done()
    node.server.send(AckExit("ta-1"))
    await asyncio.wait_for(closing, 10)
    assert container.signals == []


async def test_what_takes_longer_than_the_drain_is_killed(node):
    container = await node.working("in-1:0")
    closing = asyncio.ensure_future(node.agent.close(0.05))
    await node.exit_heard()
    assert container.signals[-1] == signal.SIGKILL
    node.server.send(AckExit("ta-1"))
    await asyncio.wait_for(closing, 10)


async def test_a_worker_that_leaves_starts_nothing_and_says_so(node):
    await node.working("in-1:0")
    closing = asyncio.ensure_future(node.agent.close(60))
    await node.server.heard(Leaving)
    node.server.send(start_of("ta-2"))
    end = await node.exit_heard()
    assert (end.task_id, end.exit.reason) == ("ta-2", "the worker is shutting down")
    assert node.runtime.started.empty()
    await node.restart_server()
    assert (await node.server.heard(Hello)).is_leaving
    closing.cancel()


async def test_a_runtime_that_a_worker_lacks_is_refused_with_those_it_has(node):
    node.server.send(start_of("ta-1", runtime="gvisor"))
    end = await node.exit_heard()
    assert "runtime 'gvisor' is not one of this worker: it has played" in end.exit.reason
    assert node.runtime.started.empty()
    await node.container("ta-2", runtime="played")


# ---- what containers say ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FunctionGetInputs", "FunctionPutOutputs", "TaskResult"])
async def test_bytes_that_are_no_message_are_refused(node, name):
    container = await node.container()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await container.call(name, b"\x0a\xff\xff\xff\xff\x0f")
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "is not a valid" in error.value.details()


async def test_an_output_for_an_input_of_another_container_is_dropped(node):
    container = await node.working("in-1:0")
    await container.put_output("in-2:0", b"not mine")
    await container.put_output("in-1:0", b"mine")
    outputs = await node.server.heard(Outputs)
    assert [api_pb2.FunctionPutOutputsItem.FromString(item).input_id for item in outputs.items] == ["in-1:0"]
    assert len(node.server.of(Outputs)) == 1


async def test_a_request_for_inputs_that_is_repeated_gets_the_same_ones(node):
    container = await node.container()
    key = (("x-idempotency-key", "once"),)
    first = asyncio.ensure_future(container.call("FunctionGetInputs", metadata=key))
    want = await node.server.heard(WantInputs)
    again = asyncio.ensure_future(container.call("FunctionGetInputs", metadata=key))
    node.server.send(assignment("ta-1", want.seq, "in-1:0"))
    assert await first == await again == await container.call("FunctionGetInputs", metadata=key)
    assert len(node.server.of(WantInputs)) == 1
