import asyncio

from some_cluster import ME, STRANGER, SUCCESS, Cluster, input_id
from virtual_time import virtually

from aeolian.control.call_history import CallHistory
from aeolian.domain.caller import Caller
from aeolian.domain.calls import Status


def history_of(cluster: Cluster) -> CallHistory:
    cluster.functions.row = lambda function_id, caller: cluster.functions.pool_settings(function_id)
    return CallHistory(cluster.database, cluster.calls, cluster.functions)


def test_the_graph_shows_who_called_whom_from_wherever_one_asks():
    async def scenario():
        async with Cluster() as cluster:
            cluster.functions.add("fu-2")
            top, container = await cluster.spawn(), cluster.container()
            kwargs = {"function_id": "fu-2", "caller": container.caller, "parent": input_id(top)}
            children = [await cluster.remote(2, **kwargs), await cluster.spawn(**kwargs)]
            below = cluster.container("fu-2")
            await below.put()
            for call in (top, *children):
                graph = await history_of(cluster).graph(call.call_id, ME)
                assert [node.call_id for node in graph.calls] == [call.call_id for call in (top, *children)]
                assert [node.parent_input_id for node in graph.calls] == ["", input_id(top), input_id(top)]
                statuses = {node.key.input_id: node.status for node in graph.inputs}
                assert statuses[input_id(children[0], 0)] is Status.SUCCESS
                assert statuses[input_id(children[0], 1)] is Status.PENDING
                assert len(statuses) == 4

    virtually(scenario())


def test_the_graph_ends_where_another_workspace_begins():
    async def scenario():
        async with Cluster() as cluster:
            foreign = await cluster.spawn(caller=STRANGER)
            inside = Caller(workspace="local", task_id="ta-x", app_id="ap-1", function_id="fu-1")
            mine = await cluster.spawn(caller=inside, parent=input_id(foreign))
            graph = await history_of(cluster).graph(mine.call_id, ME)
            assert [(node.call_id, node.parent_input_id) for node in graph.calls] == [(mine.call_id, "")]
            graph = await history_of(cluster).graph(foreign.call_id, STRANGER)
            assert [node.call_id for node in graph.calls] == [foreign.call_id]

    virtually(scenario())


def test_recent_calls_are_listed_with_what_became_of_them():
    async def scenario():
        async with Cluster() as cluster:
            finished, container = await cluster.spawn(), cluster.container()
            await container.put()
            container.ask()
            await asyncio.sleep(1)
            running = await cluster.spawn()
            await asyncio.sleep(1)
            queued = await cluster.spawn(5)
            history = history_of(cluster)
            kwargs = {"since": 0.0, "until": 1e12, "newest": False, "variants": False}
            records = await history.recent("fu-1", ME, limit=100, **kwargs)
            assert [record.call_id for record in records] == [finished.call_id, running.call_id, *[queued.call_id] * 5]
            assert [record.is_running for record in records] == [False, True, *[False] * 5]
            assert records[0].status == SUCCESS
            assert len(await history.recent("fu-1", ME, limit=3, **kwargs)) == 3
            assert await history.count("fu-1", ME, since=0.0, until=1e12, bucket_s=1e12, variants=False) == [(0.0, 7)]
            newest = await history.recent("fu-1", ME, limit=6, **{**kwargs, "newest": True})
            assert [record.call_id for record in newest] == [*[queued.call_id] * 5, running.call_id]

    virtually(scenario())
