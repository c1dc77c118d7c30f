import asyncio

from some_cluster import Cluster
from virtual_time import settle, virtually

from aeolian.control.autoscaling import Autoscaling
from aeolian.domain.functions import AutoscalerSettings


class Starter:
    """Stands for `containers`: starts them at once, as long as there is room."""

    num_cores = 2

    def __init__(self, cluster: Cluster):
        self._cluster = cluster
        self.room = 100
        self.started: list = []
        self.stopped: list[str] = []
        self.room_made_for: list[str] = []

    def start(self, pool, settings, count):
        count = min(count, self.room - len(self.started))
        self.started += [self._cluster.container(pool.function_id) for _ in range(count)]
        return count

    def stop_container(self, container, *, drain, reason):
        assert drain
        self.stopped.append(container.task_id)
        self._cluster.pools.drop(container)

    def make_room(self, pool, settings):
        self.room_made_for.append(pool.function_id)


class Scaled:
    def __init__(self, **limits):
        self._limits = limits

    async def __aenter__(self):
        self.cluster = await Cluster().__aenter__()
        self.cluster.functions.autoscaler_settings = lambda function_id: AutoscalerSettings(**self._limits)
        self.starter = Starter(self.cluster)
        self.scaling = Autoscaling(self.cluster.clock, self.cluster.functions, self.cluster.pools, self.starter)
        self.scaling.start()
        return self

    async def __aexit__(self, *error):
        await self.scaling.close()
        await self.cluster.__aexit__()


def test_a_queue_starts_containers_and_idle_ones_end_after_their_window():
    async def scenario():
        async with Scaled(scaledown_window_s=30.0) as scaled:
            await scaled.cluster.spawn()
            await settle()
            [container] = scaled.starter.started
            assert len(container.given()) == 1
            await container.put()
            container.ask()
            await asyncio.sleep(29)
            assert scaled.starter.stopped == []
            await asyncio.sleep(2)
            assert scaled.starter.stopped == [container.task_id]

    virtually(scenario())


def test_idle_containers_end_also_while_another_function_is_never_at_rest():
    async def scenario():
        async with Scaled(scaledown_window_s=30.0) as scaled:
            cluster = scaled.cluster
            cluster.functions.add("fu-busy")
            await cluster.spawn()
            await settle()
            await scaled.starter.started[0].put()
            scaled.starter.started[0].ask()
            for _ in range(400):
                cluster.pools.unsettle("fu-busy")
                await asyncio.sleep(0.1)
            assert scaled.starter.stopped == [scaled.starter.started[0].task_id]

    virtually(scenario())


def test_a_kept_minimum_is_not_looked_at_again_and_again():
    async def scenario():
        async with Scaled(min_containers=1, scaledown_window_s=30.0) as scaled:
            scaled.cluster.pools.ensure("fu-1", "ap-1")
            scaled.cluster.pools.unsettle("fu-1")
            await asyncio.sleep(100)
            assert len(scaled.starter.started) == 1
            assert scaled.starter.stopped == []
            assert scaled.scaling._due == {}

    virtually(scenario())


def test_where_no_room_is_left_others_are_asked_for_it_until_there_is():
    async def scenario():
        async with Scaled() as scaled:
            scaled.starter.room = 0
            await scaled.cluster.spawn()
            await asyncio.sleep(0.5)
            assert set(scaled.starter.room_made_for) == {"fu-1"}
            scaled.starter.room = 1
            await asyncio.sleep(0.2)
            assert len(scaled.starter.started) == 1

    virtually(scenario())


def test_a_pool_that_nobody_uses_is_forgotten():
    async def scenario():
        async with Scaled(scaledown_window_s=10.0) as scaled:
            await scaled.cluster.spawn()
            await settle()
            await scaled.starter.started[0].put()
            scaled.starter.started[0].ask()
            await asyncio.sleep(1000)
            assert scaled.cluster.pools.all() == []

    virtually(scenario())


def test_a_lowered_maximum_ends_containers_although_inputs_wait():
    async def scenario():
        async with Scaled() as scaled:
            for _ in range(3):
                scaled.cluster.container()
            await scaled.cluster.spawn(10)
            scaled._limits = {"max_containers": 1}
            scaled.cluster.pools.unsettle("fu-1")
            await settle()
            assert len(scaled.starter.stopped) == 2

    virtually(scenario())


def test_a_reserve_takes_no_room_from_others():
    async def scenario():
        async with Scaled(buffer_containers=1) as scaled:
            scaled.starter.room = 1
            await scaled.cluster.spawn()
            await asyncio.sleep(3)
            assert len(scaled.starter.started) == 1
            assert scaled.starter.room_made_for == []
            await scaled.cluster.spawn()
            await asyncio.sleep(3)
            assert set(scaled.starter.room_made_for) == {"fu-1"}

    virtually(scenario())
