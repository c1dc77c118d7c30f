from types import SimpleNamespace

import pytest

from aeolian.control import log_retention
from aeolian.control.log_retention import LogRetention
from aeolian.control.logs import AppLogs
from aeolian.domain.clock import ManualClock
from aeolian.domain.link import LogLine
from aeolian.storage import logs as storage

DAY_S = 86400.0


@pytest.fixture
async def logs(database):
    """Ten old lines and two new ones of each of two apps, each line a batch."""
    logs = AppLogs(database, ManualClock())
    await logs.open()
    for app_id in ("ap-living", "ap-ended"):
        for at in [*range(10), 40 * DAY_S, 41 * DAY_S]:
            await logs.append(app_id, "ta-1", "fu-1", [LogLine(1, at, f"at {at}\n")])
    yield logs
    await logs.close()


async def lines(database, app_id: str) -> int:
    return len(await database.read(lambda c: storage.batches_after(c, app_id, 0, 100)))


async def test_lines_are_deleted_when_they_are_older_than_is_asked_for(database, logs, monkeypatch):
    monkeypatch.setattr(log_retention, "PORTION", 3)
    apps = SimpleNamespace(is_over=lambda app_id: app_id == "ap-ended")
    retention = LogRetention(database, ManualClock(41 * DAY_S), apps, 30 * DAY_S)
    assert await retention.delete_old() == 20
    assert [await lines(database, app_id) for app_id in ("ap-living", "ap-ended")] == [2, 2]
    assert await retention.delete_old() == 0


async def test_the_numbers_of_a_living_app_s_lines_go_on_when_all_are_old(database, logs):
    apps = SimpleNamespace(is_over=lambda app_id: app_id == "ap-ended")
    retention = LogRetention(database, ManualClock(400 * DAY_S), apps, 30 * DAY_S)
    await retention.delete_old()
    assert [await lines(database, app_id) for app_id in ("ap-living", "ap-ended")] == [1, 0]
    assert await database.read(lambda c: storage.last_seqs(c, ["ap-living"])) == {"ap-living": 12}
