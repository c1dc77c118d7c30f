"""`/metrics`: for those who have a token; and how requests are timed."""

import base64

import aiohttp
import pytest
from aiohttp import web

from aeolian.control.metrics import FunctionName, Metrics
from aeolian.domain.caller import Caller
from aeolian.domain.errors import NotFound, Unauthenticated
from aeolian.gateway.app import Gateway
from aeolian.gateway.metrics import MetricRoutes, measure


async def authenticate(metadata):
    if (metadata.get("x-modal-token-id"), metadata.get("x-modal-token-secret")) != ("ak-1", "as-1"):
        raise Unauthenticated("not a token of this server")
    return Caller(workspace="local", token_id="ak-1")


def basic(name: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"


@pytest.fixture
async def session(tmp_path):
    async def thing(request: web.Request) -> web.Response:
        if request.match_info["name"] == "none":
            raise NotFound("no such thing")
        return web.Response(text="here")

    metrics = Metrics(lambda app_id, function_id: FunctionName("", ""))
    routes = [*MetricRoutes(metrics, authenticate).routes(), web.get("/things/{name}", thing)]
    gateway = Gateway(routes, [measure(metrics)])
    await gateway.start(tmp_path / "http.sock")
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(tmp_path / "http.sock"))) as session:
        yield session
    await gateway.stop()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer ak-1:as-1"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic YWJj"},
        {"Authorization": basic("ak-1", "wrong")},
    ],
)
async def test_without_a_token_there_are_no_metrics(session, headers):
    async with session.get("http://gateway/metrics", headers=headers) as reply:
        assert reply.status == 401
        assert reply.headers["WWW-Authenticate"].startswith("Basic ")
        assert "aeolian_" not in await reply.text()


async def test_requests_are_timed_by_their_route(session):
    for path, status in (("/things/a", 200), ("/things/b", 200), ("/things/none", 404), ("/elsewhere", 404)):
        async with session.get("http://gateway" + path) as reply:
            assert reply.status == status
    async with session.get("http://gateway/metrics", headers={"Authorization": basic("ak-1", "as-1")}) as reply:
        assert reply.status == 200
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = await reply.text()
    count = 'aeolian_http_request_seconds_count{method="GET",route="%s",status="%s"} %s'
    assert count % ("/things/{name}", "200", "2.0") in text
    assert count % ("/things/{name}", "404", "1.0") in text
    assert count % ("(unknown)", "404", "1.0") in text
