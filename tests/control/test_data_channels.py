import asyncio
import contextlib

import pytest
from some_cluster import ME, TERMINATED, Cluster
from virtual_time import settle, virtually

from aeolian.control import data_channels
from aeolian.control.data_channels import DataChannels, Direction
from aeolian.domain.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unavailable


@contextlib.asynccontextmanager
async def generating(engine=None):
    """(cluster, channels, the call, the container that runs it)"""
    async with Cluster(engine) as cluster:
        channels = DataChannels(cluster.database, cluster.clock, cluster.calls)
        call, container = await cluster.remote(), cluster.container()
        yield cluster, channels, call, container


async def put(channels, call, container, *indices, size=10) -> None:
    chunks = [(index, b"%d" % index + bytes(size)) for index in indices]
    await channels.put(call.call_id, Direction.OUT, container.caller, chunks)


async def take(channels, call, count, after=0) -> list[int]:
    """The next chunks, as far as they come before the stream ends."""
    found = []
    async with contextlib.aclosing(channels.follow(call.call_id, Direction.OUT, ME, after)) as chunks:
        async for index, _ in chunks:
            found.append(index)
            if len(found) == count:
                break
    return found


def test_chunks_come_as_they_are_sent():
    async def scenario():
        async with generating() as (_, channels, call, container):
            reading = asyncio.ensure_future(take(channels, call, 3))
            await settle()
            await put(channels, call, container, 1)
            await put(channels, call, container, 2, 3)
            assert await reading == [1, 2, 3]

    virtually(scenario())


def test_a_stream_can_be_read_again_from_anywhere_also_after_a_restart():
    async def scenario():
        async with generating() as (cluster, channels, call, container):
            await put(channels, call, container, *range(1, 200))
            assert await take(channels, call, 5, after=150) == [151, 152, 153, 154, 155]
            engine = cluster.database.engine
        async with Cluster(engine) as cluster:
            channels = DataChannels(cluster.database, cluster.clock, cluster.calls)
            assert await take(channels, call, 199) == list(range(1, 200))

    virtually(scenario())


def test_an_idle_stream_ends_for_the_client_to_open_it_again():
    async def scenario():
        async with generating() as (_, channels, call, container):
            await put(channels, call, container, 1)
            assert await take(channels, call, 2) == [1]

    virtually(scenario())


def test_of_chunks_that_are_sent_again_the_first_ones_stay():
    async def scenario():
        async with generating() as (cluster, channels, call, container):
            await put(channels, call, container, 1, 2)
            cluster.calls.container_lost(container.lose(), None, "")
            other = cluster.container()
            await put(channels, call, other, 1, size=99)
            await put(channels, call, other, 2, 3, size=99)
            sizes = []
            async for _, chunk in channels.follow(call.call_id, Direction.OUT, ME, 0):
                sizes.append(len(chunk) - 1)
            assert sizes == [10, 10, 99]

    virtually(scenario())


def test_a_generator_that_is_too_far_ahead_waits_for_its_reader(monkeypatch):
    monkeypatch.setattr(data_channels, "MAX_AHEAD_BYTES", 100)

    async def scenario():
        async with generating() as (_, channels, call, container):
            await put(channels, call, container, 1, 2)
            putting = asyncio.ensure_future(put(channels, call, container, 3))
            await settle()
            assert not putting.done()
            assert await take(channels, call, 2) == [1, 2]
            await putting
            assert await take(channels, call, 1, after=2) == [3]

    virtually(scenario())


def test_a_waiting_generator_ends_with_its_call(monkeypatch):
    monkeypatch.setattr(data_channels, "MAX_AHEAD_BYTES", 100)

    async def scenario():
        async with generating() as (cluster, channels, call, container):
            await put(channels, call, container, 1, 2, size=100)
            putting = asyncio.ensure_future(put(channels, call, container, 3))
            await settle()
            await cluster.calls.cancel(call.call_id, ME, terminate=False)
            with pytest.raises(FailedPrecondition, match="does not run call"):
                await putting

    virtually(scenario())


def test_a_generator_whose_reader_is_gone_for_long_is_cancelled(monkeypatch):
    monkeypatch.setattr(data_channels, "MAX_AHEAD_BYTES", 100)

    async def scenario():
        async with generating() as (cluster, channels, call, container):
            reading = asyncio.ensure_future(take(channels, call, 1))
            await settle()
            await put(channels, call, container, 1)
            await reading
            await put(channels, call, container, 2)
            with pytest.raises(FailedPrecondition):
                await put(channels, call, container, 3)
            assert await cluster.statuses(call) == [TERMINATED]
            assert container.told_to_cancel() == container.given()

    virtually(scenario())


def test_a_slow_generator_whose_reader_is_gone_for_long_is_cancelled_too():
    async def scenario():
        async with generating() as (_, channels, call, container):
            with pytest.raises(FailedPrecondition):
                for index in range(1, 100):
                    await put(channels, call, container, index)
                    await asyncio.sleep(10)
            assert 30 <= index <= 33

    virtually(scenario())


def test_a_failure_is_told_after_what_came_before_it():
    async def scenario():
        async with generating() as (_, channels, call, container):
            loop = asyncio.get_running_loop()
            await put(channels, call, container, 1)
            at = loop.time()
            await channels.delivered(call.call_id)  # nobody reads
            assert loop.time() - at == pytest.approx(data_channels.COMING_S)
            gate, found = asyncio.Event(), []

            async def read():
                async for index, _ in channels.follow(call.call_id, Direction.OUT, ME, 0):
                    await gate.wait()
                    found.append(index)

            reading = asyncio.ensure_future(read())
            await settle()
            await put(channels, call, container, 2, 3)
            telling = asyncio.ensure_future(channels.delivered(call.call_id))
            await settle()
            assert not telling.done()
            gate.set()
            await telling
            assert found == [1, 2, 3]
            reading.cancel()

    virtually(scenario())


def test_nothing_is_kept_of_streams_that_are_over():
    async def scenario():
        async with generating() as (_, channels, call, container):
            await put(channels, call, container, 1)
            await container.put()
            await asyncio.sleep(data_channels.KEEP_S + 1)
            assert not channels._channels
            assert await take(channels, call, 1) == [1]
            await asyncio.sleep(data_channels.KEEP_S + 1)
            assert not channels._channels

    virtually(scenario())


def test_only_the_container_that_runs_a_call_sends_its_stream():
    async def scenario():
        async with generating() as (cluster, channels, call, container):
            with pytest.raises(PermissionDenied):
                await channels.put(call.call_id, Direction.OUT, ME, [(1, b"")])
            with pytest.raises(FailedPrecondition):
                await put(channels, call, cluster.container(), 1)
            with pytest.raises(InvalidArgument, match="numbered from 1"):
                await put(channels, call, container, 0)

    virtually(scenario())


def test_after_a_restart_a_generator_is_told_to_wait_until_its_worker_has_come_back():
    async def scenario():
        async with generating() as (cluster, _, call, _):
            engine = cluster.database.engine
        async with Cluster(engine) as cluster:
            channels = DataChannels(cluster.database, cluster.clock, cluster.calls)
            again = cluster.container(wants=None)
            with pytest.raises(Unavailable):
                await put(channels, call, again, 1)
            cluster.pools.hold(again.state, cluster.recovered[0])
            await put(channels, call, again, 1)

    virtually(scenario())
