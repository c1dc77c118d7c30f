import asyncio
from types import SimpleNamespace

import msgspec
from some_cluster import Cluster
from virtual_time import settle, virtually

from aeolian.control.autoscaling import Autoscaling
from aeolian.control.quotas import Quotas
from aeolian.domain.containers import ContainerState, Resources
from aeolian.domain.functions import AutoscalerSettings
from aeolian.storage.environments import Environment

DEV = Environment("en-dev", "dev", "", "2025.06", is_default=False, created_at=0.0)


class SomeEnvironments:
    def __init__(self, **limits: int):
        self.dev = msgspec.structs.replace(DEV, **limits)
        self.stored = self.dev

    def by_id(self, environment_id: str) -> Environment:
        return self.dev

    async def keep_fresh(self) -> None:
        self.dev = self.stored


class Inside:
    """An environment with a quota, and two Functions in it whose containers start at once."""

    num_cores = 8

    def __init__(self, *, min_containers: int = 0, **limits: int):
        self.environments = SomeEnvironments(**limits)
        self.min_containers = min_containers
        self.lines: list[str] = []
        self.all: list = []

    async def __aenter__(self) -> "Inside":
        self.cluster = cluster = await Cluster().__aenter__()
        self.other_id = cluster.functions.add("fu-2")
        cluster.functions.autoscaler_settings = lambda function_id: AutoscalerSettings(
            min_containers=self.min_containers if function_id == "fu-1" else 0, scaledown_window_s=600.0
        )
        self.scaling = Autoscaling(cluster.clock, cluster.functions, cluster.pools, self)
        apps = SimpleNamespace(known=lambda app_id: SimpleNamespace(environment_id="en-dev"))
        self.scaling.quotas = Quotas(cluster.clock, self.environments, apps, cluster.pools, self, self)
        self.scaling.start()
        return self

    async def __aexit__(self, *error) -> None:
        await self.scaling.close()
        await self.cluster.__aexit__()

    # As `containers`

    def start(self, pool, settings, count):
        for _ in range(count):
            container = self.cluster.container(pool.function_id)
            container.state.resources = settings.resources
            self.all.append(container)
        return count

    def running(self):
        return [container.state for container in self.all if container.state.state is not ContainerState.EXITED]

    def spare(self, pool):
        return [container for container in pool.containers.values() if container.idle_since]

    def stop_container(self, container, *, drain, reason):
        container.state = ContainerState.EXITED
        self.cluster.pools.drop(container)

    def make_room(self, pool, settings):
        raise AssertionError("there is room on the workers")

    # As `logs`

    def deliver(self, app_id, task_id, function_id, lines):
        self.lines += [line.data for line in lines]
        stored = asyncio.get_running_loop().create_future()
        stored.set_result(None)
        return stored


def test_inputs_beyond_the_quota_wait_and_the_log_says_why():
    async def scenario():
        async with Inside(max_containers=2) as inside:
            await inside.cluster.spawn(5)
            await asyncio.sleep(5)
            assert len(inside.running()) == 2
            assert inside.cluster.pools.get("fu-1").num_queued == 3
            [line] = inside.lines
            assert line == (
                "Function 'fu-1' waits for a container: environment 'dev' uses its quota of 2 containers already "
                "(`aeolian quota list`)\n"
            )

    virtually(scenario())


def test_a_raised_quota_lets_those_who_wait_go_on():
    async def scenario():
        async with Inside(max_containers=1) as inside:
            await inside.cluster.spawn(3)
            await asyncio.sleep(1)
            assert len(inside.running()) == 1
            inside.environments.stored = msgspec.structs.replace(DEV, max_containers=3)
            await asyncio.sleep(1)
            assert len(inside.running()) == 3

    virtually(scenario())


def test_containers_that_are_to_be_kept_ready_stay_within_the_quota_too():
    async def scenario():
        async with Inside(max_milli_cpu=2000, min_containers=4) as inside:
            inside.cluster.functions.add("fu-1", resources=Resources(milli_cpu=1000))
            inside.cluster.pools.ensure("fu-1", "ap-1")
            inside.cluster.pools.unsettle("fu-1")
            await asyncio.sleep(5)
            assert len(inside.running()) == 2
            assert "2 CPU cores" in inside.lines[0]

    virtually(scenario())


def test_idle_containers_of_others_give_their_share_of_the_quota_to_those_who_wait():
    async def scenario():
        async with Inside(max_containers=1) as inside:
            await inside.cluster.spawn(1, function_id=inside.other_id)
            await settle()
            [idle] = inside.all
            await idle.put()
            idle.ask()
            await inside.cluster.spawn(1)
            await asyncio.sleep(3)
            assert idle.state.state is ContainerState.EXITED
            assert [container.function_id for container in inside.running()] == ["fu-1"]

    virtually(scenario())


def test_an_environment_without_a_quota_gets_what_it_asks_for():
    async def scenario():
        async with Inside() as inside:
            await inside.cluster.spawn(5)
            await asyncio.sleep(5)
            assert len(inside.running()) == 5
            assert inside.lines == []

    virtually(scenario())
