import asyncio
import contextlib
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from modal_proto import api_pb2
from some_cluster import FAILURE, Cluster
from virtual_time import settle, virtually

from aeolian.control.definitions import schedule_of
from aeolian.control.schedules import Schedules
from aeolian.domain.apps import AppState
from aeolian.domain.calls import Invocation
from aeolian.domain.errors import InvalidArgument, OutOfSpace, Unavailable
from aeolian.domain.functions import RetryPolicy
from aeolian.domain.schedules import Cron, Period, deployed
from aeolian.storage import calls as calls_storage
from aeolian.storage import schedules as storage


class Scheduled:
    """A cluster with one deployed App, whose Functions run by themselves."""

    def __init__(self, engine: sa.Engine | None = None):
        self.cluster = Cluster(engine)
        self.app = SimpleNamespace(app_id="ap-1", workspace="local", state=AppState.DEPLOYED, deployed_at=1.0)
        self.lock = asyncio.Lock()
        apps = SimpleNamespace(when_ended=[], known=lambda app_id: self.app, changing=lambda app_id: self.changing())
        current = SimpleNamespace(function=api_pb2.Function(supported_input_formats=[api_pb2.DATA_FORMAT_CBOR]))
        functions = SimpleNamespace(current=lambda function_id: current)
        cluster = self.cluster
        self.schedules = Schedules(cluster.database, cluster.clock, apps, functions, cluster.calls)
        [self.end_app] = apps.when_ended

    @contextlib.asynccontextmanager
    async def changing(self):
        async with self.lock:
            yield

    async def __aenter__(self):
        await self.cluster.__aenter__()
        await self.schedules.open()
        return self

    async def __aexit__(self, *error):
        await self.schedules.close()
        await self.cluster.__aexit__(*error)

    async def deploy(self, **schedules):
        """As `deployments` does it."""
        now, before = self.cluster.clock.now(), self.schedules._scheduled.get("ap-1", {})
        async with self.changing():
            found = [deployed(f"fu-{name}", "ap-1", s, now, before.get(f"fu-{name}")) for name, s in schedules.items()]
            for function in found:
                self.cluster.functions.add(function.function_id)
            await self.cluster.database.write(lambda c: storage.replace(c, "ap-1", found))
            self.schedules.published("ap-1", found)
        await settle()

    @property
    def calls(self) -> list[sa.Row]:
        with self.cluster.database.engine.connect() as connection:
            query = sa.select(calls_storage.calls).order_by(calls_storage.calls.c.created_at)
            return list(connection.execute(query))

    @property
    def stored(self):
        with self.cluster.database.engine.connect() as connection:
            return storage.list_all(connection)


def test_a_function_runs_at_each_multiple_of_its_period():
    async def scenario():
        async with Scheduled() as some:
            began = some.cluster.clock.now()
            await some.deploy(a=Period(seconds=100))
            await asyncio.sleep(99)
            assert some.calls == []
            await asyncio.sleep(252)
            assert [call.created_at - began for call in some.calls] == [100, 200, 300]
            assert {call.invocation for call in some.calls} == {Invocation.ASYNC}
            container = some.cluster.container("fu-a", wants=5)
            assert len(container.given()) == 3
            [item, *_] = container.state.held.values()
            assert api_pb2.FunctionInput.FromString(item.payload) == api_pb2.FunctionInput(
                args=b"\x82\x80\xa0", data_format=api_pb2.DATA_FORMAT_CBOR
            )

    virtually(scenario())


def test_the_server_retries_a_run_that_fails():
    async def scenario():
        async with Scheduled() as some:
            await some.deploy(a=Period(seconds=100))
            some.cluster.functions.add("fu-a", retry_policy=RetryPolicy(max_retries=1))
            container = some.cluster.container("fu-a")
            await asyncio.sleep(101)
            await container.put(status=FAILURE)
            await asyncio.sleep(2)
            container.ask()
            assert len(container.holds) == 1

    virtually(scenario())


def test_what_was_missed_runs_once_after_a_restart():
    async def scenario():
        async with Scheduled() as some:
            await some.deploy(a=Period(seconds=100), b=Cron("@hourly"))
            await asyncio.sleep(101)
            engine = some.cluster.database.engine
        await asyncio.sleep(10_000)
        async with Scheduled(engine) as some:
            for name in "ab":
                some.cluster.functions.add(f"fu-{name}")
            await asyncio.sleep(0.1)
            assert sorted(call.function_id for call in some.calls) == ["fu-a", "fu-a", "fu-b"]
            await asyncio.sleep(100)
            assert len(some.calls) == 4

    virtually(scenario())


def test_a_run_and_the_moment_of_the_next_are_stored_together_or_not_at_all():
    async def scenario():
        async with Scheduled() as some:
            began = some.cluster.clock.now()
            await some.deploy(a=Period(seconds=100))
            container = some.cluster.container("fu-a")
            some.cluster.database.failures = [Unavailable("away"), OutOfSpace("full"), RuntimeError("who knows")]
            await asyncio.sleep(100.5)
            assert some.calls == [] and container.given() == []
            assert some.stored[0].next_at == began + 100
            await asyncio.sleep(5)
            assert len(some.calls) == 1 and len(container.given()) == 1
            assert some.stored[0].next_at == began + 200

    virtually(scenario())


def test_a_run_whose_commit_was_done_but_not_answered_runs_once():
    async def scenario():
        async with Scheduled() as some:
            await some.deploy(a=Period(seconds=100))
            container = some.cluster.container("fu-a", wants=5)
            some.cluster.database.lost_answers = [Unavailable("the connection broke")]
            await asyncio.sleep(150)
            assert len(some.calls) == 1 and len(container.given()) == 1

    virtually(scenario())


def test_deploying_again_changes_the_moments_and_doubles_none():
    async def scenario():
        async with Scheduled() as some:
            began = some.cluster.clock.now()
            await some.deploy(a=Period(seconds=100))
            await asyncio.sleep(50)
            await some.deploy(a=Period(seconds=100))
            await asyncio.sleep(60)
            assert some.calls == []
            await some.deploy(a=Period(seconds=30))
            await asyncio.sleep(31)
            assert [call.created_at - began for call in some.calls] == [140]
            await some.deploy()
            await asyncio.sleep(1000)
            assert len(some.calls) == 1 and some.stored == []

    virtually(scenario())


def test_a_deployment_that_comes_at_the_very_moment_waits_for_the_run_or_prevents_it():
    async def scenario():
        async with Scheduled() as some:
            await some.deploy(a=Cron("* * * * *"))
            for _ in range(5):
                await asyncio.sleep(some.stored[0].next_at - some.cluster.clock.now())
                await some.deploy(a=Cron("* * * * *"))
            assert len(some.calls) == 5

    virtually(scenario())


def test_nothing_runs_once_its_app_is_stopping():
    async def scenario():
        async with Scheduled() as some:
            await some.deploy(a=Period(seconds=100))
            some.app.state = AppState.STOPPING
            await asyncio.sleep(500)
            await some.end_app("ap-1")
            assert some.calls == [] and some.stored == []

    virtually(scenario())


def test_a_clock_that_is_set_forward_is_noticed_and_one_set_back_repeats_nothing():
    async def scenario():
        async with Scheduled() as some:
            await some.deploy(a=Period(seconds=3600))
            clock = some.cluster.clock
            real, shift = clock.now, [4000.0]
            clock.now = lambda: real() + shift[0]
            await asyncio.sleep(31)
            assert len(some.calls) == 1
            shift[0] = 0.0
            await asyncio.sleep(3000)
            assert len(some.calls) == 1

    virtually(scenario())


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (api_pb2.Schedule(cron={"cron_string": "61 * * * *"}), r"Function 'f': the cron expression '61 \* \* \* \*'"),
        (api_pb2.Schedule(cron={"cron_string": "@daily", "timezone": "Nowhere"}), "no time zone 'Nowhere'"),
        (api_pb2.Schedule(period={}), "too short"),
        (api_pb2.Schedule(period={"days": 1, "hours": -1}), "cannot have hours=-1"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused_with_the_function_s_name(schedule, said):
    with pytest.raises(InvalidArgument, match=said):
        schedule_of(api_pb2.Function(function_name="f", schedule=schedule))


def test_a_web_endpoint_cannot_have_a_schedule():
    function = api_pb2.Function(function_name="f", schedule={"period": {"days": 1}}, webhook_config={"type": 2})
    with pytest.raises(InvalidArgument, match="'f' answers HTTP"):
        schedule_of(function)


def test_all_parts_of_a_period_count():
    period = api_pb2.Schedule.Period(years=1, months=2, weeks=1, days=2, hours=3, minutes=4, seconds=5.5)
    function = api_pb2.Function(schedule=api_pb2.Schedule(period=period))
    assert schedule_of(function) == Period(14, 9 * 86400 + 3 * 3600 + 4 * 60 + 5.5)
