import asyncio
from types import SimpleNamespace

import pytest
from some_cluster import FAILURE, ME, TIMEOUT, Cluster
from virtual_time import virtually

from aeolian.control.stats import Stats
from aeolian.domain.apps import App, AppState, Layout, LayoutFunction
from aeolian.domain.errors import InvalidArgument
from aeolian.storage import containers as containers_storage


def stats_of(cluster: Cluster) -> Stats:
    functions = cluster.functions
    functions.row = lambda function_id, caller: functions.pool_settings(function_id)
    functions.with_variants = lambda function_id: ["fu-1", "fu-variant"] if function_id == "fu-1" else [function_id]
    functions.layout = lambda app_id: Layout({"f": LayoutFunction("fu-1", "de-1")})

    async def find(app_id, caller):
        return App(app_id, "local", "en-1", "main", AppState.DEPLOYED, deployed_at=5.0)

    return Stats(cluster.database, SimpleNamespace(find=find), functions, cluster.calls, cluster.pools)


async def kept(cluster: Cluster, task_id: str, **values) -> None:
    """A container of the history."""
    row = {
        **dict.fromkeys(("environment_name", "worker_id", "image_id", "sdk_version", "revision", "reason"), ""),
        **dict.fromkeys(("resources", "hooks"), b""),
        **{"app_id": "ap-1", "function_id": "fu-1", "started_at": 0.0, "finished_at": 0.0, "exit_code": 0},
        **{"task_id": task_id, **values},
    }
    await cluster.database.write(lambda c: c.execute(containers_storage.insert, row))


def test_inputs_are_counted_by_how_they_ended_and_timed():
    async def scenario():
        async with Cluster() as cluster:
            since = cluster.clock.now()
            container = cluster.container()
            for status in (1, 1, 1, FAILURE, TIMEOUT):
                await cluster.spawn()
                await asyncio.sleep(2)
                await container.put(status=status, duration_s=2.0)
                container.ask()
            await cluster.spawn()  # runs
            await cluster.spawn()  # waits
            await asyncio.sleep(1)
            stats = stats_of(cluster)
            now = cluster.clock.now()
            found = await stats.of_function("fu-1", ME, since=since, until=now, variants=False)
            assert (found.num_succeeded, found.num_failed, found.num_timed_out, found.num_running) == (3, 1, 1, 1)
            assert found.execution_s == pytest.approx([2.0, 2.0, 2.0])
            assert found.latency_s == pytest.approx([2.0, 2.0, 2.0])
            assert found.num_variants == 0
            of_it = await stats.of_function(
                "fu-1", ME, since=since, until=now, task_id=container.task_id, variants=False
            )
            assert of_it.num_succeeded == 3
            of_none = await stats.of_function("fu-1", ME, since=since, until=now, task_id="ta-x", variants=False)
            assert (of_none.num_succeeded, of_none.num_running) == (0, 0)
            earlier = await stats.of_function("fu-1", ME, since=since - 9, until=since, variants=False)
            assert (earlier.num_succeeded, earlier.execution_s) == (0, [])

    virtually(scenario())


def test_containers_are_counted_by_what_happened_to_them_in_the_span():
    async def scenario():
        async with Cluster() as cluster:
            await kept(cluster, "ta-before", enqueued_at=1.0, started_at=2.0, finished_at=9.0)
            await kept(cluster, "ta-good", enqueued_at=11.0, started_at=12.0, finished_at=15.0)
            await kept(cluster, "ta-bad", enqueued_at=11.0, finished_at=13.0, exit_code=1)
            await kept(
                cluster, "ta-stopped", enqueued_at=5.0, started_at=6.0, finished_at=13.0, exit_code=-9, reason="x"
            )
            await kept(cluster, "ta-starting", enqueued_at=19.0)
            await kept(cluster, "ta-later", enqueued_at=19.0, started_at=21.0)
            await kept(cluster, "ta-variant", function_id="fu-variant", enqueued_at=11.0, started_at=14.0)
            stats = stats_of(cluster)
            kwargs = {"since": 10.0, "until": 20.0}
            found = await stats.of_function("fu-1", ME, variants=False, **kwargs)
            assert found.containers[1:] == (5, 1, 1, 2)
            assert found.startup_s == [1.0, 1.0, 1.0]
            together = await stats.of_function("fu-1", ME, variants=True, **kwargs)
            assert together.containers[1:] == (6, 2, 1, 2)
            assert together.num_variants == 1
            of_app = await stats.of_app("ap-1", ME, **kwargs)
            assert of_app.functions["f"].num_containers == 6
            assert of_app.functions["f"].num_failed_containers == 1
            assert of_app.num_deployments == 0

    virtually(scenario())


@pytest.mark.parametrize(("since", "until"), [(5.0, 5.0), (5.0, 4.0), (0.0, 8 * 24 * 3600.0)])
def test_a_span_must_be_one_and_no_longer_than_a_week(since, until):
    async def scenario():
        async with Cluster() as cluster:
            with pytest.raises(InvalidArgument, match="seven days"):
                await stats_of(cluster).of_function("fu-1", ME, since=since, until=until, variants=False)

    virtually(scenario())
