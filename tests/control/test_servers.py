"""Which container gets a request, and how many there should be."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
from some_cluster import SomeFunctions
from virtual_time import LoopClock, settle, virtually

from aeolian.control import autoscaler, servers
from aeolian.control.container_state import Container
from aeolian.control.pools import Pools
from aeolian.control.servers import Servers
from aeolian.control.url_tokens import LIFETIME_S, UrlTokens
from aeolian.control.workers import Workers
from aeolian.domain.containers import ContainerState, Resources
from aeolian.domain.errors import ResourceExhausted, Unavailable
from aeolian.domain.functions import AutoscalerSettings


class Place:
    """One server, `fu-1`, and containers that run when a test says so."""

    def __init__(self, **settings):
        self.functions = SomeFunctions()
        self.functions.add("fu-1", is_server=True, startup_timeout_s=60.0, **settings)
        self.clock = LoopClock()
        self.pools = Pools(self.clock, self.functions, Workers())
        self.hooks = SimpleNamespace(when_started=[], when_hopeless=[])
        self.servers = Servers(self.clock, self.pools, self.hooks)
        self._stack = contextlib.AsyncExitStack()

    def add(self, task_id: str, state: ContainerState = ContainerState.RUNNING) -> Container:
        container = Container(
            task_id,
            app_id="ap-1",
            function_id="fu-1",
            revision="",
            environment_name="main",
            worker_id="wo-1",
            image_id="",
            sdk_version="1.6.4",
            resources=Resources(),
            enqueued_at=self.clock.now(),
        )
        self.pools.add(container)
        container.state = state
        if state is ContainerState.RUNNING:
            container.started_at = self.clock.now()
            for callback in self.hooks.when_started:
                callback(container)
        return container

    async def enter(self, avoid=()) -> Container:
        """Take a container for a request that goes on until `leave_all`."""
        return await self._stack.enter_async_context(self.servers.lease("fu-1", "ap-1", avoid))

    async def leave_all(self) -> None:
        await self._stack.aclose()

    def plan(self, **limits) -> autoscaler.PoolPlan:
        pool = self.pools.ensure("fu-1", "ap-1")
        settings = self.functions.pool_settings("fu-1")
        now = self.clock.monotonic()
        view = servers.view_of(pool, settings, AutoscalerSettings(**limits), now)
        return autoscaler.plan(view, now, num_cores=4)


def test_requests_spread_to_the_container_with_the_fewest():
    async def scenario():
        place = Place()
        place.add("ta-1")
        place.add("ta-2")
        taken = [(await place.enter()).task_id for _ in range(4)]
        assert sorted(taken) == ["ta-1", "ta-1", "ta-2", "ta-2"]
        await place.leave_all()
        assert [(await place.enter(avoid={"ta-1"})).task_id for _ in range(2)] == ["ta-2", "ta-2"]
        await place.leave_all()

    virtually(scenario())


def test_a_request_at_zero_waits_and_is_what_the_autoscaler_sees():
    async def scenario():
        place = Place()
        waiting = [asyncio.create_task(place.enter()) for _ in range(3)]
        await settle()
        assert place.plan(target_concurrency=10).start == 1
        starting = place.add("ta-1", ContainerState.STARTING)
        assert place.plan(target_concurrency=10).start == 0
        starting.state = ContainerState.RUNNING
        starting.started_at = place.clock.now()
        place.servers._started(starting)
        assert {(await task).task_id for task in waiting} == {"ta-1"}
        assert starting.num_requests == 3 and place.pools.get("fu-1").num_queued == 0
        await place.leave_all()
        assert starting.num_requests == 0 and starting.idle_since

    virtually(scenario())


def test_more_requests_than_the_target_start_more_containers_and_idle_ones_end():
    async def scenario():
        place = Place()
        place.add("ta-1")
        for _ in range(6):
            await place.enter()
        assert place.plan(target_concurrency=2).start == 2
        assert place.plan(target_concurrency=2, max_containers=2).start == 1
        assert place.plan(target_concurrency=2, is_scaled=False).start == 0
        second = place.add("ta-2")
        await place.leave_all()
        assert place.plan(scaledown_window_s=10).stop == ()
        await asyncio.sleep(11)
        assert place.plan(scaledown_window_s=10, min_containers=1).stop == ("ta-1",)
        assert second.idle_since

    virtually(scenario())


def test_a_container_that_works_is_never_stopped_for_being_idle():
    async def scenario():
        place = Place()
        place.add("ta-1")
        await place.enter()
        await asyncio.sleep(1000)
        assert place.plan(scaledown_window_s=10).stop == ()
        await place.leave_all()

    virtually(scenario())


def test_beyond_the_most_that_a_container_may_have_requests_are_refused():
    async def scenario():
        place = Place(max_concurrency=1)
        place.add("ta-1")
        await place.enter()
        with pytest.raises(ResourceExhausted, match="1 requests"):
            await place.enter()
        await place.leave_all()
        await place.enter()
        await place.leave_all()

    virtually(scenario())


def test_who_waits_learns_that_no_container_will_come():
    async def scenario():
        place = Place()
        waiting = asyncio.create_task(place.enter())
        await settle()
        for on_hopeless in place.hooks.when_hopeless:
            on_hopeless("fu-1", "its enter hook fails")
        with pytest.raises(Unavailable, match="enter hook"):
            await waiting
        assert place.pools.get("fu-1").num_queued == 0
        with pytest.raises(Unavailable, match="within 90 s"):
            await place.enter()
        assert place.pools.get("fu-1").num_queued == 0

    virtually(scenario())


def test_a_request_that_goes_away_while_it_waits_leaves_nothing_behind():
    async def scenario():
        place = Place()
        waiting = asyncio.create_task(place.enter())
        await settle()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert place.pools.get("fu-1").num_queued == 0
        late = asyncio.create_task(place.enter())
        await settle()
        container = place.add("ta-1")
        late.cancel()  # it has been given the container in this very moment
        await asyncio.gather(late, return_exceptions=True)
        assert container.num_requests == 0

    virtually(scenario())


def test_containers_of_an_older_version_get_no_requests():
    async def scenario():
        place = Place(revision="2")
        place.add("ta-1")
        waiting = asyncio.create_task(place.enter())
        await settle()
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    virtually(scenario())


def test_a_token_is_for_one_function_and_a_short_while():
    async def scenario():
        tokens = UrlTokens(b"key", LoopClock())
        token = tokens.make("fu-1")
        assert tokens.allows(token, "fu-1")
        assert not tokens.allows(token, "fu-2")
        assert not UrlTokens(b"other", LoopClock()).allows(token, "fu-1")
        for broken in ("", "e30", "e30..", token[:-1], token.replace("e30", "e31")):
            assert not tokens.allows(broken, "fu-1")
        await asyncio.sleep(LIFETIME_S + 1)
        assert not tokens.allows(token, "fu-1")

    virtually(scenario())
