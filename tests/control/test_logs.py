import asyncio
import contextlib

import pytest

from aeolian.control.log_history import LogHistory
from aeolian.control.logs import AppLogs
from aeolian.domain.clock import ManualClock
from aeolian.domain.errors import Unavailable
from aeolian.domain.link import LogLine
from aeolian.domain.logs import LogFilter, TaskChange
from aeolian.storage.database import Database, metadata

ALL = LogFilter()


@contextlib.asynccontextmanager
async def opened(path):
    database = Database(f"sqlite:///{path}")
    metadata.create_all(database.engine)
    database.open()
    logs = AppLogs(database, ManualClock())
    await logs.open()
    try:
        yield logs
    finally:
        await logs.close()
        await database.close()


@pytest.fixture
async def logs(tmp_path):
    async with opened(tmp_path / "a.db") as logs:
        yield logs


def lines(*texts: str, at: float = 100.0, fd: int = 1, call: str = "") -> list[LogLine]:
    return [LogLine(fd, at, text, "", call) for text in texts]


async def text_of(logs, app_id, after=0, wanted=ALL, timeout=0.0, ended=lambda: False):
    out = []
    async for item in logs.follow(app_id, after, wanted, timeout, ended):
        if item is None:
            out.append(None)
        elif not isinstance(item, TaskChange):
            out += [line.data for line in item.lines]
    return out


async def test_lines_of_an_app_are_numbered_in_the_order_of_the_appends(logs):
    await asyncio.gather(*[logs.append("ap-1", f"ta-{i % 3}", "fu-1", lines(f"{i}\n")) for i in range(100)])
    assert await text_of(logs, "ap-1") == [f"{i}\n" for i in range(100)]
    assert await logs.last_seq("ap-1") == 100


async def test_a_follower_resumes_after_the_line_it_saw_last(logs):
    await logs.append("ap-1", "ta-1", "fu-1", lines("a", "b", "c"))
    assert await text_of(logs, "ap-1", after=2) == ["c"]


async def test_a_follower_is_woken_by_new_lines_and_ends_after_the_last_ones(logs):
    ended = False
    follower = asyncio.create_task(text_of(logs, "ap-1", timeout=30, ended=lambda: ended))
    await asyncio.sleep(0.01)
    await logs.append("ap-1", "ta-1", "fu-1", lines("a"))
    await logs.append("ap-1", "ta-1", "fu-1", lines("b"))
    ended = True
    logs.wake("ap-1")
    assert await asyncio.wait_for(follower, 5) == ["a", "b", None]


async def test_a_repeated_delivery_is_stored_once_also_after_a_restart(tmp_path):
    async with opened(tmp_path / "a.db") as logs:
        await asyncio.gather(
            *[logs.append("ap-1", "ta-1", "fu-1", lines(f"{n}"), source="wo-1", source_seq=n) for n in (1, 2, 2, 1, 3)]
        )
    async with opened(tmp_path / "a.db") as logs:
        await logs.append("ap-1", "ta-1", "fu-1", lines("3"), source="wo-1", source_seq=3)
        await logs.append("ap-1", "ta-1", "fu-1", lines("4"), source="wo-1", source_seq=4)
        assert await text_of(logs, "ap-1") == ["1", "2", "3", "4"]


async def test_filters_pick_by_container_function_call_and_stream(logs):
    logs.root_function_of = lambda id: {"fu-v": "fu-1"}.get(id, id)
    await logs.append("ap-1", "ta-1", "fu-1", lines("a", call="fc-1") + lines("b", fd=2, call="fc-2"))
    await logs.append("ap-1", "ta-2", "fu-v", lines("c", call="fc-1"))
    assert await text_of(logs, "ap-1", wanted=LogFilter(task_id="ta-2")) == ["c"]
    assert await text_of(logs, "ap-1", wanted=LogFilter(function_id="fu-1")) == ["a", "b", "c"]
    assert await text_of(logs, "ap-1", wanted=LogFilter(variant_function_id="fu-1")) == ["a", "b"]
    assert await text_of(logs, "ap-1", wanted=LogFilter(function_call_id="fc-1")) == ["a", "c"]
    assert await text_of(logs, "ap-1", wanted=LogFilter(fd=2)) == ["b"]


async def test_a_follower_of_one_container_ends_with_it(logs):
    await logs.append("ap-1", "ta-1", "fu-1", lines("a"))
    follower = asyncio.create_task(text_of(logs, "ap-1", wanted=LogFilter(task_id="ta-1"), timeout=30))
    await asyncio.sleep(0.01)
    await logs.task_ended("ap-1", "ta-2")
    await logs.append("ap-1", "ta-1", "fu-1", lines("b"))
    await logs.task_ended("ap-1", "ta-1")
    assert await asyncio.wait_for(follower, 5) == ["a", "b", None]
    assert await logs.has_task_ended("ap-1", "ta-1")


async def test_tail_gives_the_last_lines_of_a_time_range_in_order(logs):
    for second in range(10):
        await logs.append("ap-1", f"ta-{second % 2}", "fu-1", lines(f"{second}a", f"{second}b", at=100.0 + second))
    history = LogHistory(logs._database)
    got = await history.tail("ap-1", 102.0, 108.0, 3, LogFilter())
    assert [line.data for batch in got for line in batch.lines] == ["6b", "7a", "7b"]
    got = await history.tail("ap-1", 0.0, 200.0, 100, LogFilter(search_text="b"))
    assert [line.data for batch in got for line in batch.lines] == [f"{n}b" for n in range(10)]


async def test_lines_of_image_builds_are_left_out_where_they_are_not_asked_for(logs):
    await logs.append("ap-1", "ta-build", "", lines("Step 1"), "im-1")
    await logs.append("ap-1", "ta-1", "fu-1", lines("a"))
    assert await text_of(logs, "ap-1") == ["Step 1", "a"]
    history = LogHistory(logs._database)
    for wanted, found in (
        (LogFilter(without_builds=True), ["a"]),
        (LogFilter(task_id="ta-build"), ["Step 1"]),
    ):
        got = await history.tail("ap-1", 0.0, 200.0, 9, wanted)
        assert [line.data for batch in got for line in batch.lines] == found


async def test_counts_fall_into_aligned_buckets_by_stream(logs):
    await logs.append("ap-1", "ta-1", "fu-1", lines("a", at=101.0) + lines("b", at=103.9) + lines("c", at=104.0, fd=2))
    assert await LogHistory(logs._database).count("ap-1", 101.5, 110.0, 4, LogFilter()) == {100: {1: 1}, 104: {2: 1}}


async def test_a_burst_loses_no_line_and_costs_few_transactions(logs):
    commits = logs._database.num_commits
    frames = [lines(*[f"{frame * 500 + n}\n" for n in range(500)]) for frame in range(100)]
    follower = asyncio.create_task(text_of(logs, "ap-1", timeout=30, ended=lambda: done))
    done = False
    await asyncio.gather(*[logs.append("ap-1", "ta-1", "fu-1", frame) for frame in frames])
    done = True
    logs.wake("ap-1")
    assert await asyncio.wait_for(follower, 20) == [*(f"{n}\n" for n in range(50_000)), None]
    assert logs._database.num_commits - commits < 20


async def test_lines_wait_while_the_database_is_away_and_keep_their_order(logs, monkeypatch):
    monkeypatch.setattr("aeolian.control.logs.RETRY_S", 0.01)
    write, failures = logs._database.write, [Unavailable("away")] * 2

    async def flaky(fn, **kwargs):
        if failures:
            raise failures.pop()
        return await write(fn, **kwargs)

    monkeypatch.setattr(logs._database, "write", flaky)
    await asyncio.gather(
        *[logs.append("ap-1", "ta-1", "fu-1", lines(f"{n}"), source="wo-1", source_seq=n + 1) for n in range(5)]
    )
    assert await text_of(logs, "ap-1") == ["0", "1", "2", "3", "4"]


async def test_a_change_of_a_container_reaches_only_those_who_follow(logs):
    seen = []

    async def watch():
        async for item in logs.follow("ap-1", 0, LogFilter(), 30, lambda: bool(seen)):
            seen.append(item)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0.01)
    logs.task_changed("ap-1", "ta-1", "fu-1", 8)
    await asyncio.sleep(0.01)
    logs.wake("ap-1")
    await asyncio.wait_for(watcher, 5)
    assert seen[0] == TaskChange("ta-1", "fu-1", 8)
