"""Web requests as inputs that nothing stores."""

import pickle
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from modal_proto import api_pb2
from some_cluster import FAILURE, ME, TIMEOUT, Cluster
from virtual_time import settle, virtually

from aeolian.control.data_channels import DataChannels
from aeolian.control.web_calls import WebCall, WebCalls
from aeolian.domain.calls import MAX_LOSSES, Status
from aeolian.domain.errors import FailedPrecondition
from aeolian.domain.link import AssignInputs
from aeolian.storage import calls as storage

TARGET = SimpleNamespace(function_id="fu-1", method_name="page", workspace="local")
GONE = api_pb2.Asgi(http_disconnect=api_pb2.Asgi.HttpDisconnect())


async def begin(cluster: Cluster) -> WebCall:
    return await WebCalls(cluster.calls).begin(TARGET, {"type": "http", "path": "/a"})


def test_a_container_gets_the_scope_as_an_argument_and_the_caller_hears_of_its_end():
    async def scenario():
        async with Cluster() as cluster:
            call = await begin(cluster)
            container = cluster.container()
            (command,) = cluster.of(AssignInputs)
            item = api_pb2.FunctionGetInputsItem.FromString(command.items[0])
            assert pickle.loads(item.input.args) == (({"type": "http", "path": "/a"},), {})
            assert (item.input.method_name, item.input.data_format) == ("page", api_pb2.DATA_FORMAT_PICKLE)
            assert not call.exchange.is_over
            await container.put()
            assert call.exchange.status is Status.SUCCESS and container.holds == []

    virtually(scenario())


def test_nothing_of_it_is_stored():
    async def scenario():
        async with Cluster() as cluster:
            commits = cluster.database.num_commits
            call = await begin(cluster)
            await cluster.container().put(status=FAILURE)
            assert call.exchange.status is Status.FAILURE
            await settle()
            with cluster.database.engine.connect() as connection:
                for table in (storage.calls, storage.inputs, storage.outputs):
                    assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() == 0
            assert cluster.database.num_commits == commits
            assert list(cluster.calls._memory) == []

    virtually(scenario())


def test_a_lost_container_is_replaced_while_nothing_was_answered():
    async def scenario():
        async with Cluster() as cluster:
            call = await begin(cluster)
            first = cluster.container()
            held = list(first.state.held.values())
            cluster.pools.drop(first.state)
            cluster.calls.container_lost(held, None, "its worker went away")
            second = cluster.container()
            assert second.holds == first.given()
            await second.put()
            assert call.exchange.status is Status.SUCCESS

    virtually(scenario())


def test_a_container_that_is_lost_in_the_middle_of_an_answer_ends_the_request():
    async def scenario():
        async with Cluster() as cluster:
            call = await begin(cluster)
            container = cluster.container()
            await call.exchange.put([api_pb2.DataChunk(index=1, data=b"x")])
            await anext(call.exchange.answers())
            held = list(container.state.held.values())
            cluster.pools.drop(container.state)
            cluster.calls.container_lost(held, None, "its worker went away")
            assert call.exchange.status is Status.INTERNAL_FAILURE

    virtually(scenario())


def test_a_request_is_not_tried_for_ever():
    async def scenario():
        async with Cluster() as cluster:
            call = await begin(cluster)
            for _ in range(MAX_LOSSES):
                container = cluster.container()
                held = list(container.state.held.values())
                cluster.pools.drop(container.state)
                cluster.calls.container_lost(held, None, "its worker went away")
            assert call.exchange.status is Status.FAILURE

    virtually(scenario())


def test_what_nobody_waits_for_any_more_is_not_begun():
    async def scenario():
        async with Cluster() as cluster:
            call = await begin(cluster)
            call.leave(GONE)
            assert call.exchange.status is Status.TERMINATED
            assert cluster.container().given() == []
            running = await begin(cluster)
            await settle()
            running.leave(GONE)
            assert not running.exchange.is_over  # the app hears of it, and ends by itself

    virtually(scenario())


def test_a_timeout_ends_the_request():
    async def scenario():
        async with Cluster() as cluster:
            call = await begin(cluster)
            await cluster.container().put(status=TIMEOUT)
            assert call.exchange.status is Status.TIMEOUT

    virtually(scenario())


def test_only_the_container_that_runs_it_has_its_stream():
    async def scenario():
        async with Cluster() as cluster:
            channels = DataChannels(cluster.database, cluster.clock, cluster.calls)
            call = await begin(cluster)
            container = cluster.container()
            call_id = call._call_id
            assert channels.exchange_of(call_id, container.caller) is call.exchange
            other = cluster.container()
            with pytest.raises(FailedPrecondition, match="does not run call"):
                channels.exchange_of(call_id, other.caller)
            assert channels.exchange_of((await cluster.spawn()).call_id, ME) is None

    virtually(scenario())
