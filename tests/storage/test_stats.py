from collections.abc import AsyncIterator

import pytest

from aeolian.storage import calls, input_lists, migrate, stats
from aeolian.storage import containers as containers_storage
from aeolian.storage.database import Database
from aeolian.storage.stats import ContainerCounts, Span
from aeolian.storage.tables import metadata


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(migrate.normalized(database_url))
    metadata.create_all(database.engine)
    database.open()
    yield database
    await database.close()


def fill(connection) -> None:
    connection.execute(
        calls.calls.insert(),
        [
            {
                **dict.fromkeys(("app_id", "workspace", "parent_call_id"), ""),
                **dict.fromkeys(("call_type", "invocation", "parent_idx"), 0),
                **{"call_id": call_id, "function_id": function_id, "created_at": 0.0, "is_cancelled": False},
            }
            for call_id, function_id in (("fc-1", "fu-1"), ("fc-2", "fu-2"))
        ],
    )
    connection.execute(
        calls.outputs.insert(),
        [
            {
                **{"call_id": "fc-1", "idx": idx, "seq": idx, "item": b"", "status": 1, "retry_count": 0},
                **{
                    "task_id": "ta-1",
                    "created_at": 10.0 + idx,
                    "started_at": 11.0 + idx,
                    "finished_at": 13.0 + 2 * idx,
                },
            }
            for idx in range(10)
        ],
    )
    unfinished = {"call_id": "fc-2", "idx": 0, "payload": b"", "retry_count": 0, "created_at": 12.9, "due_at": 0.0}
    connection.execute(calls.inputs.insert(), [unfinished])
    container = {
        **dict.fromkeys(("environment_name", "worker_id", "image_id", "sdk_version", "revision", "reason"), ""),
        **{"resources": b"", "hooks": b"", "app_id": "ap-1", "function_id": "fu-1", "exit_code": 1},
        **{"task_id": "ta-1", "enqueued_at": 10.0, "started_at": 10.5, "finished_at": 12.0},
    }
    connection.execute(containers_storage.insert, [container])


async def test_every_database_counts_and_sorts_alike(database):
    await database.write(fill)
    span = Span(["fu-1", "fu-2"], 10.0, 30.0)
    ask = database.read
    assert await ask(lambda c: stats.finished_inputs(c, span)) == [("fu-1", 1, 9)]
    assert await ask(lambda c: stats.num_running_then(c, span)) == 1
    assert await ask(lambda c: stats.execution_times(c, span)) == [6.0, 10.0, 10.0]
    assert await ask(lambda c: stats.queue_times(c, span)) == [1.0, 1.0, 1.0]
    assert await ask(lambda c: stats.latencies(c, span)) == [7.0, 11.0, 11.0]
    assert await ask(lambda c: stats.startup_times(c, span)) == [0.5, 0.5, 0.5]
    assert await ask(lambda c: stats.container_counts(c, span)) == [ContainerCounts("fu-1", 1, 1, 1, 0)]
    nobody = Span(["fu-3"], 10.0, 30.0)
    assert await ask(lambda c: stats.execution_times(c, nobody)) == []
    assert await ask(lambda c: stats.container_counts(c, nobody)) == []


async def test_inputs_are_listed_and_counted_by_when_they_were_made(database):
    await database.write(fill)
    both = ["fu-1", "fu-2"]
    buckets = await database.read(lambda c: input_lists.count_inputs(c, both, 10.5, 14.5, 1.0))
    assert buckets == [(10.5, 1), (11.5, 1), (12.5, 2), (13.5, 1)]
    newest = await database.read(lambda c: input_lists.finished_between(c, both, 0.0, 99.0, 3, newest=True))
    assert [row.idx for row in newest] == [9, 8, 7]
    oldest = await database.read(lambda c: input_lists.finished_between(c, both, 0.0, 99.0, 3, newest=False))
    assert [row.idx for row in oldest] == [0, 1, 2]
    [left] = await database.read(lambda c: input_lists.unfinished_between(c, both, 0.0, 99.0, 3, newest=True))
    assert left.call_id == "fc-2"
