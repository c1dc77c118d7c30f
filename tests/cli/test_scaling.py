"""Autoscaler settings over RPC: overridden by users, kept over restarts, gone at the next deployment."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from modal_proto import api_pb2
from whole_server import WholeServer, whole_server

from aeolian.domain.link import StartContainer, StopContainer


@pytest.fixture
def data_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    yield folder / "data"
    shutil.rmtree(folder)


@pytest.fixture
async def server(data_dir) -> AsyncIterator[WholeServer]:
    async with whole_server(data_dir) as server:
        yield server


async def update(server: WholeServer, function_id: str, **settings) -> api_pb2.AutoscalerSettings:
    request = api_pb2.FunctionUpdateSchedulingParamsRequest(
        function_id=function_id, settings=api_pb2.AutoscalerSettings(**settings)
    )
    return (await server.call("FunctionUpdateSchedulingParams", request)).message.current_settings


async def configuration(server: WholeServer, function_id: str) -> api_pb2.AutoscalerConfiguration:
    request = api_pb2.FunctionGetSchedulingParamsRequest(function_id=function_id)
    return (await server.call("FunctionGetSchedulingParams", request)).message.autoscaler_configuration


async def spawn(server: WholeServer, function_id: str, count: int) -> None:
    request = api_pb2.FunctionMapRequest(
        function_id=function_id,
        function_call_type=api_pb2.FUNCTION_CALL_TYPE_MAP,
        function_call_invocation_type=api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC,
        pipelined_inputs=[
            api_pb2.FunctionPutInputsItem(idx=idx, input=api_pb2.FunctionInput(args=b"x")) for idx in range(count)
        ],
    )
    assert (await server.call("FunctionMap", request)).code is grpc.StatusCode.OK


async def publish_again(server: WholeServer, app_id: str, function_id: str) -> None:
    """As `modal deploy` of an App in which nothing has changed."""
    known = (await server.call("FunctionGetById", api_pb2.FunctionGetByIdRequest(function_id=function_id))).message
    request = api_pb2.AppPublishRequest(
        app_id=app_id,
        name="app",
        app_state=api_pb2.APP_STATE_DEPLOYED,
        function_ids={"f": function_id},
        definition_ids={function_id: known.handle_metadata.definition_id},
    )
    assert (await server.call("AppPublish", request)).code is grpc.StatusCode.OK


async def test_overrides_add_up_and_say_whose_they_are(server):
    _, function_id = await server.deploy()
    await update(server, function_id, max_containers=7)
    settings = await update(server, function_id, scaledown_window=9)
    assert (settings.min_containers, settings.max_containers, settings.scaledown_window) == (0, 7, 9)
    found = await configuration(server, function_id)
    assert found.settings == settings
    assert set(found.override_events) == {"max_containers", "scaledown_window"}
    event = found.override_events["max_containers"]
    assert event.requested_by
    assert event.user_id == dict(server.token)["x-modal-token-id"]
    assert event.timestamp > 0


async def test_overrides_survive_a_restart_and_end_with_the_next_deployment(data_dir):
    async with whole_server(data_dir) as server:
        app_id, function_id = await server.deploy()
        await update(server, function_id, min_containers=1, scaledown_window=9)
    async with whole_server(data_dir) as server:
        worker = await server.worker()
        found = await configuration(server, function_id)
        assert (found.settings.min_containers, found.settings.scaledown_window) == (1, 9)
        assert "min_containers" in found.override_events
        await worker.started()  # although nobody calls it
        await publish_again(server, app_id, function_id)
        found = await configuration(server, function_id)
        assert (found.settings.min_containers, found.settings.scaledown_window) == (0, 60)
        assert not found.override_events


async def test_a_lowered_maximum_lets_containers_finish_what_they_do(server):
    worker = await server.worker()
    _, function_id = await server.deploy()
    await spawn(server, function_id, 2)
    for _ in range(2):
        await worker.given(await worker.started())
    await update(server, function_id, max_containers=1)
    assert (await worker.told(StopContainer)).drain


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"min_containers": 3, "max_containers": 2}, "cannot be above"), ({"min_containers": 1}, "has parameters")],
)
async def test_settings_that_cannot_work_are_refused(server, settings, text):
    app = await server.call(
        "AppGetOrCreate",
        api_pb2.AppGetOrCreateRequest(app_name="app", object_creation_type="OBJECT_CREATION_TYPE_CREATE_IF_MISSING"),
    )
    function = api_pb2.Function(
        function_name="Model.*", is_class=True, function_type="FUNCTION_TYPE_FUNCTION", module_name="user"
    )
    function.class_parameter_info.schema.add(name="size")
    created = await server.call(
        "FunctionCreate", api_pb2.FunctionCreateRequest(app_id=app.message.app_id, function=function)
    )
    request = api_pb2.FunctionUpdateSchedulingParamsRequest(
        function_id=created.message.function_id, settings=api_pb2.AutoscalerSettings(**settings)
    )
    reply = await server.call("FunctionUpdateSchedulingParams", request)
    assert reply.code is grpc.StatusCode.INVALID_ARGUMENT
    assert text in reply.text


async def test_concurrency_and_stats_follow_what_there_is_to_do(server):
    worker = await server.worker()
    _, function_id = await server.deploy()
    await update(server, function_id, max_containers=1)
    await spawn(server, function_id, 3)
    task_id = await worker.started()
    await worker.given(task_id)

    async def concurrency() -> int:
        request = api_pb2.FunctionGetDynamicConcurrencyRequest(
            function_id=function_id, target_concurrency=2, max_concurrency=5
        )
        reply = await server.call("FunctionGetDynamicConcurrency", request, metadata=worker.as_container(task_id))
        return reply.message.concurrency

    stats = api_pb2.FunctionGetCurrentStatsRequest(function_id=function_id)
    now = (await server.call("FunctionGetCurrentStats", stats)).message
    assert (now.backlog, now.num_total_tasks, now.num_running_inputs, now.input_headroom) == (2, 1, 1, 0)
    assert await concurrency() == 5
    await update(server, function_id, max_containers=2)
    await worker.given(await worker.started())
    assert await concurrency() == 2
    assert not [command for command in worker.commands if isinstance(command, StartContainer)]
