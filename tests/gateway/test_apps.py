"""The page that the client's links lead to."""

import aiohttp
import pytest

from aeolian.control.apps import Apps
from aeolian.control.definitions import WebAddress
from aeolian.control.environments import Environments
from aeolian.control.functions import Functions
from aeolian.control.logs import AppLogs
from aeolian.domain.apps import AppState
from aeolian.domain.caller import Caller
from aeolian.domain.clock import ManualClock
from aeolian.gateway.app import Gateway
from aeolian.gateway.apps import AppPages
from aeolian.storage.database import Database, metadata

ME = Caller(workspace="local")


@pytest.fixture
async def apps(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/a.db")
    metadata.create_all(database.engine)
    database.open()
    environments = Environments(database, ManualClock())
    await environments.load()
    logs = AppLogs(database, ManualClock())
    await logs.open()
    apps = Apps(database, ManualClock(), environments, logs)
    gateway = Gateway(AppPages(apps, Functions(database, apps, lambda _: WebAddress(""))).routes())
    await gateway.start(tmp_path / "http.sock")
    yield apps
    await gateway.stop()
    await apps.close()
    await logs.close()
    await database.close()


@pytest.fixture
async def get(apps, tmp_path):
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(tmp_path / "http.sock"))) as session:

        async def get(path: str) -> tuple[int, str]:
            async with session.get("http://gateway" + path) as reply:
                return reply.status, await reply.text()

        yield get


async def test_the_page_of_an_app_shows_how_it_fares_and_how_to_see_more(apps, get):
    app = await apps.create(ME, AppState.EPHEMERAL, "<b>crawler</b>", "", {})
    for path in (f"/apps/{app.app_id}", f"/apps/{app.app_id}/logs"):
        status, page = await get(path)
        assert status == 200
        assert "<h1>&lt;b&gt;crawler&lt;/b&gt;</h1>" in page and "ephemeral" in page
        assert f"modal app logs -f {app.app_id}" in page
    await apps.stop(app.app_id, ME)
    _, page = await get(f"/apps/{app.app_id}")
    assert "stopped" in page and "logs -f" not in page


async def test_an_app_that_never_was_has_no_page(get):
    status, page = await get("/apps/ap-0000000000000000000000")
    assert status == 404 and "there is no App" in page
