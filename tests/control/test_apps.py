import asyncio
import contextlib
from typing import NamedTuple

import pytest
from modal_proto import api_pb2

from aeolian.control.apps import Apps
from aeolian.control.definitions import WebAddress
from aeolian.control.deployments import Deployments, Publication
from aeolian.control.fleet import NoFleet
from aeolian.control.function_changes import FunctionChanges
from aeolian.control.functions import Functions
from aeolian.control.logs import AppLogs
from aeolian.control.schedules import Schedules
from aeolian.domain.apps import AppState
from aeolian.domain.caller import Caller
from aeolian.domain.clock import ManualClock
from aeolian.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from aeolian.storage.database import Database, metadata

ME = Caller(workspace="local", token_id="ak-1", sdk_version="1.6.4")
STRANGER = Caller(workspace="elsewhere", token_id="ak-2")


class Named(NamedTuple):
    id: str
    name: str


class AnyEnvironments:
    def resolve(self, name: str, caller: Caller) -> Named:
        return Named(f"en-{name or 'main'}", name or "main")


class Everything:
    async def describe(self, object_ids, caller):
        return {object_id: api_pb2.Object(object_id=object_id) for object_id in object_ids}


class NoAddresses:
    async def claim(self, webs): ...

    def address_of(self, web):
        return WebAddress("")


class SlowFleet(NoFleet):
    """Containers that end when the test says so."""

    def __init__(self):
        self.gone = asyncio.Event()
        self.idle = False

    async def stop_app(self, app_id, *, graceful):
        await self.gone.wait()

    def is_idle(self, app_id):
        return self.idle


class Services:
    def __init__(self, path):
        self.database = Database(f"sqlite:///{path}")
        metadata.create_all(self.database.engine)
        self.clock = ManualClock()

    async def __aenter__(self):
        self.database.open()
        self.logs = AppLogs(self.database, self.clock)
        await self.logs.open()
        self.apps = Apps(self.database, self.clock, AnyEnvironments(), self.logs)
        addresses = NoAddresses()
        self.functions = Functions(self.database, self.apps, addresses.address_of)
        self.changes = FunctionChanges(self.database, self.clock, self.apps, self.functions, Everything(), addresses)
        schedules = Schedules(self.database, self.clock, self.apps, self.functions, calls=None)
        self.deployments = Deployments(self.database, self.clock, self.apps, self.functions, schedules)
        await self.apps.load()
        await self.functions.load()
        return self

    async def __aexit__(self, *exc):
        await self.apps.close()
        await self.logs.close()
        await self.database.close()

    async def app(self, state=AppState.EPHEMERAL, caller=ME):
        return await self.apps.create(caller, state, "an app", "", {})

    async def function(self, app_id, existing="", **fields):
        function = api_pb2.Function(function_name="f", **fields)
        request = api_pb2.FunctionCreateRequest(app_id=app_id, function=function, existing_function_id=existing)
        return (await self.changes.create(request, ME))[0]

    async def publish(self, app_id, caller=ME, state=AppState.DEPLOYED, name="thing", **fields):
        return await self.deployments.publish(Publication(app_id, state, name, **fields), caller)


@pytest.fixture
async def services(tmp_path):
    async with Services(tmp_path / "a.db") as services:
        yield services


async def test_containers_started_after_their_environment_was_renamed_see_its_new_name(services):
    app = await services.app()
    function_id = await services.function(app.app_id)
    assert services.functions.pool_settings(function_id).environment_name == app.environment_name
    await services.apps.environment_renamed(app.environment_id, "renamed")
    await services.functions.environment_renamed(app.environment_id, "renamed")
    assert services.functions.pool_settings(function_id).environment_name == "renamed"


async def test_an_app_whose_client_fell_silent_is_stopped(services):
    quiet, heard, deployed = [(await services.app()).app_id for _ in range(2)] + [
        (await services.app(AppState.INITIALIZING)).app_id
    ]
    await services.publish(deployed)
    services.clock.advance(100)
    await services.apps.heartbeat(heard, ME)
    services.clock.advance(30)
    await services.apps.sweep()
    assert services.apps.is_over(quiet) and not services.apps.is_over(heard) and not services.apps.is_over(deployed)
    with pytest.raises(FailedPrecondition, match="stopped"):
        await services.apps.heartbeat(quiet, ME)


async def test_a_stop_begun_before_a_restart_is_finished_after_it(tmp_path):
    async with Services(tmp_path / "a.db") as services:
        services.apps.fleet = SlowFleet()
        app = await services.app()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(services.apps.stop(app.app_id, ME, by="me"), 0.1)
        assert services.apps.known(app.app_id).state is AppState.STOPPING
    async with Services(tmp_path / "a.db") as services:
        with pytest.raises(FailedPrecondition):
            services.apps.living(app.app_id)
        await services.apps.start()
        await services.apps.stop(app.app_id, ME)
        ended = await services.apps.find(app.app_id, ME)
        assert (ended.state, ended.stopped_by) == (AppState.STOPPED, "me")


async def test_a_detached_app_outlives_its_client_until_its_calls_are_done(services):
    services.apps.fleet = fleet = SlowFleet()
    fleet.gone.set()
    app = await services.app(AppState.DETACHED)
    await services.apps.client_disconnected(app.app_id, ME, deployment_failed=False)
    assert services.apps.living(app.app_id).state is AppState.DETACHED_DISCONNECTED
    await services.apps.work_finished(app.app_id)
    assert not services.apps.is_over(app.app_id)
    fleet.idle = True
    await services.apps.work_finished(app.app_id)
    assert services.apps.is_over(app.app_id)


async def test_a_repeated_create_or_publish_is_carried_out_once_across_a_restart(tmp_path):
    once = Caller(workspace="local", token_id="ak-1", idempotency_key="k")
    async with Services(tmp_path / "a.db") as services:
        app = await services.app(AppState.INITIALIZING, once)
        assert await services.app(AppState.INITIALIZING, once) == app
        function_id = await services.function(app.app_id)
        deployed_at = await services.publish(app.app_id, once, function_ids={"f": function_id})
    async with Services(tmp_path / "a.db") as services:
        services.clock.advance(50)
        assert (await services.app(AppState.INITIALIZING, once)).app_id == app.app_id
        assert await services.publish(app.app_id, once, function_ids={"f": function_id}) == deployed_at
        assert await services.publish(app.app_id, function_ids={"f": function_id}) == 0
        assert services.apps.living(app.app_id).version == 1


async def test_ids_of_another_workspace_are_not_found(services):
    app = await services.app()
    function_id = await services.function(app.app_id)
    for refused in (
        services.apps.find(app.app_id, STRANGER),
        services.apps.stop(app.app_id, STRANGER),
        services.changes.bind(function_id, b"", api_pb2.FunctionOptions(), STRANGER),
        services.publish(app.app_id, STRANGER),
    ):
        with pytest.raises(NotFound):
            await refused


async def test_a_publication_cannot_take_what_belongs_to_another_app(services):
    mine, other = await services.app(AppState.INITIALIZING), await services.app()
    function_id = await services.function(other.app_id)
    with pytest.raises(InvalidArgument, match=function_id):
        await services.publish(mine.app_id, function_ids={"f": function_id})
    with pytest.raises(InvalidArgument, match=function_id):
        await services.function(mine.app_id, existing=function_id)
    with pytest.raises(InvalidArgument, match="cs-nothing"):
        await services.publish(mine.app_id, class_ids={"C": "cs-nothing"})
    announced, _ = await services.changes.precreate(
        api_pb2.FunctionPrecreateRequest(app_id=mine.app_id, function_name="g"), ME
    )
    with pytest.raises(FailedPrecondition, match="never created"):
        await services.publish(mine.app_id, function_ids={"g": announced})


async def test_two_first_deployments_of_one_name_cannot_both_win(services):
    one, two = await services.app(AppState.INITIALIZING), await services.app(AppState.INITIALIZING)
    await services.publish(one.app_id)
    with pytest.raises(AlreadyExists, match="deploy again"):
        await services.publish(two.app_id)
    await services.apps.stop(one.app_id, ME)
    assert await services.publish(two.app_id) > 0
    assert (await services.apps.look_up_name("thing", "", ME)).deployed.app_id == two.app_id


async def test_a_stopped_app_is_named_as_the_previous_holder_of_its_name(services):
    app = await services.app(AppState.INITIALIZING)
    await services.publish(app.app_id)
    await services.apps.stop(app.app_id, ME)
    found = await services.apps.look_up_name("thing", "", ME)
    assert found.deployed is None and found.previous.app_id == app.app_id


async def test_a_draft_is_not_live_until_it_is_published(services):
    app = await services.app(AppState.INITIALIZING)
    function_id = await services.function(app.app_id, timeout_secs=10)
    assert services.functions.pool_settings(function_id).timeout_s == 10  # builds images before any publication
    arguments = services.functions.container_arguments(function_id, "ta-1")
    layout = api_pb2.ContainerArguments.FromString(arguments).app_layout
    assert dict(layout.function_ids) == {"f": function_id} and layout.objects[0].object_id == function_id
    await services.publish(app.app_id, function_ids={"f": function_id})
    await services.function(app.app_id, existing=function_id, timeout_secs=20)
    assert services.functions.pool_settings(function_id).timeout_s == 10
    draft = services.functions.row(function_id).draft_definition_id
    await services.publish(app.app_id, function_ids={"f": function_id}, definition_ids={function_id: draft})
    assert services.functions.pool_settings(function_id).timeout_s == 20


async def test_a_function_that_a_redeploy_dropped_takes_no_new_calls_but_keeps_its_code(services):
    app = await services.app(AppState.INITIALIZING)
    function_id = await services.function(app.app_id)
    variant_id = await services.changes.bind(function_id, b"", api_pb2.FunctionOptions(timeout_secs=9), ME)
    await services.publish(app.app_id, function_ids={"f": function_id})
    await services.publish(app.app_id)
    for dropped in (function_id, variant_id):
        with pytest.raises(NotFound, match="not part of its App any more"):
            services.functions.check_callable(dropped, ME)
        assert services.functions.current(dropped).app_id == app.app_id
    await services.deployments.roll_back(app.app_id, -1, ME)
    assert services.functions.check_callable(variant_id, ME)


async def test_a_staged_version_is_live_only_when_promoted(services):
    app = await services.app(AppState.INITIALIZING)
    function_id = await services.function(app.app_id, timeout_secs=10)
    await services.publish(app.app_id, function_ids={"f": function_id})
    await services.function(app.app_id, existing=function_id, timeout_secs=20)
    await services.publish(app.app_id, function_ids={"f": function_id}, staged=True)
    assert services.functions.pool_settings(function_id).timeout_s == 10
    with pytest.raises(FailedPrecondition, match="promote"):
        await services.deployments.roll_back(app.app_id, 2, ME)
    await services.deployments.promote(app.app_id, 2, ME)
    assert services.functions.pool_settings(function_id).timeout_s == 20
    assert services.apps.living(app.app_id).version == 3
    with pytest.raises(NotFound, match="v9"):
        await services.deployments.roll_back(app.app_id, 9, ME)


async def test_functions_of_an_ended_app_can_only_be_looked_back_at(services):
    app = await services.app()
    function_id = await services.function(app.app_id)
    await services.apps.stop(app.app_id, ME)
    with pytest.raises(NotFound):
        services.functions.current(function_id)
    handle, data = await services.functions.look_back(function_id, ME)
    assert handle.function_name == "f" and len(data.ranked_functions) == 1
    with pytest.raises(NotFound):
        await services.functions.look_back(function_id, STRANGER)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"function_serialized": b"x" * (16 << 20) + b"x"}, "the limit is 16777216"),
        ({"max_concurrent_inputs": 5000}, "max_inputs of @concurrent is 5000"),
        ({"volume_mounts": [api_pb2.VolumeMount(volume_id="vo-1", mount_path="/a/../../etc")]}, "cannot be mounted"),
        (
            {"autoscaler_settings": api_pb2.AutoscalerSettings(min_containers=3, max_containers=2)},
            r"min_containers \(3\) is above",
        ),
    ],
)
async def test_a_definition_that_cannot_run_is_refused(services, fields, message):
    app = await services.app()
    with pytest.raises(InvalidArgument, match=message):
        await services.function(app.app_id, **fields)


async def test_a_request_for_a_function_must_have_exactly_one_definition(services):
    app = await services.app()
    with pytest.raises(InvalidArgument, match="exactly one"):
        await services.changes.create(api_pb2.FunctionCreateRequest(app_id=app.app_id), ME)


async def test_a_list_of_gpus_runs_on_the_first_one(services):
    app = await services.app()
    request = api_pb2.FunctionCreateRequest(app_id=app.app_id)
    for rank, gpu in enumerate(["H100", "A100"]):
        ranked = request.function_data.ranked_functions.add(rank=rank)
        ranked.function.function_name = "f"
        ranked.function.resources.gpu_config.gpu_type = gpu
        ranked.function.resources.gpu_config.count = 2
    function_id, definition = await services.changes.create(request, ME)
    _, data = services.changes.created(function_id, definition)
    assert [item.function.resources.gpu_config.gpu_type for item in data.ranked_functions] == ["H100", "A100"]
    pool = services.functions.pool_settings(function_id)
    assert (pool.gpu_type, pool.resources.gpu_count) == ("H100", 2)


async def test_an_empty_app_is_made_once_under_a_name(services):
    made = await asyncio.gather(
        *[services.apps.get_or_create(ME, "n", "", create=True, must_be_new=False) for _ in range(5)]
    )
    assert len({app.app_id for app in made}) == 1
    with pytest.raises(AlreadyExists):
        await services.apps.get_or_create(ME, "n", "", create=True, must_be_new=True)
    with pytest.raises(InvalidArgument, match="cannot be the name"):
        await services.apps.get_or_create(ME, "no/name", "", create=True, must_be_new=False)
    assert (await services.apps.get_or_create(ME, made[0].app_id, "", create=False, must_be_new=False)) == made[0]
