"""Requests that go straight to the port of a container."""

import asyncio
import contextlib
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from modal_proto import api_pb2

from aeolian.domain.errors import ResourceExhausted, Unavailable
from aeolian.gateway.app import Gateway
from aeolian.gateway.container_client import ContainerClients
from aeolian.gateway.servers import ServerProxy
from aeolian.worker.ports import ContainerPorts


class SomeServers:
    """Leases the containers of `tasks` in turn; an exception among them is raised."""

    def __init__(self):
        self.tasks: list = ["ta-1", "ta-2", "ta-3"]
        self.num_open = 0
        self.dead: list[str] = []

    def has_died(self, container) -> None:
        self.dead.append(container.task_id)

    @contextlib.asynccontextmanager
    async def lease(self, function_id, app_id, avoid=()):
        task = next(task for task in self.tasks if not isinstance(task, str) or task not in avoid)
        if isinstance(task, Exception):
            raise task
        self.num_open += 1
        try:
            yield SimpleNamespace(task_id=task)
        finally:
            self.num_open -= 1


async def echo(request: web.Request) -> web.StreamResponse:
    if request.path == "/ws":
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_bytes(message.data)
        return socket
    if request.path == "/broken":
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.abort()
        return response
    if request.path == "/forever":
        await asyncio.sleep(1000)
    size = 0
    async for piece in request.content.iter_any():
        size += len(piece)
    headers = {"X-Path": request.raw_path, "X-Size": str(size), "X-Host": request.host, "X-Method": request.method}
    seen = {f"Seen-{name}": value for name, value in request.headers.items() if name.startswith(("Modal", "X-"))}
    response = web.StreamResponse(status=203, headers={**headers, **seen})
    response.headers.add("Set-Cookie", "a=1")
    response.headers.add("Set-Cookie", "b=2")
    await response.prepare(request)
    for _ in range(3):
        await response.write(b"x" * 1000)
    return response


@pytest.fixture
async def place(tmp_path):
    """A gateway whose every path belongs to one server; its container's port is that of `echo`."""
    server = web.AppRunner(app := web.Application(client_max_size=1 << 30), handler_cancellation=True)
    app.router.add_route("*", "/{path:.*}", echo)
    await server.setup()
    site = web.TCPSite(server, "127.0.0.1", 0)
    await site.start()
    ports = ContainerPorts(tmp_path / "ports.sock", None, lambda task_id: task_id != "ta-gone")
    await ports.open()
    servers, clients = SomeServers(), ContainerClients(tmp_path / "ports.sock")
    config = api_pb2.HTTPConfig(port=server.addresses[0][1], unauthenticated=True)
    target = SimpleNamespace(function_id="fu-1", app_id="ap-1", definition=api_pb2.Function(http_config=config))

    async def may_enter(request, target):
        return request.headers.get("Modal-Key") == "wk-1"

    proxy = ServerProxy(servers, clients, may_enter, "https")

    @web.middleware
    async def ingress(request, handler):
        return await proxy.serve(request, target)

    gateway = Gateway([], [ingress])
    port = await gateway.start_tcp("127.0.0.1")
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield SimpleNamespace(session=session, servers=servers, config=target.definition.http_config)
    await gateway.stop()
    await clients.close()
    await ports.close()
    await server.cleanup()
    assert servers.num_open == 0


async def test_requests_and_answers_pass_as_they_are(place):
    headers = {"Host": "app.example", "X-Own": "1", "Modal-Secret": "no business of the server"}
    async with place.session.get("/a%2Fb?q=%20+&q=2", headers=headers) as reply:
        assert reply.status == 203 and await reply.read() == b"x" * 3000
        assert reply.headers["X-Path"] == "/a%2Fb?q=%20+&q=2" and reply.headers["X-Host"] == "app.example"
        assert reply.headers["Seen-X-Own"] == "1" and reply.headers["Seen-X-Forwarded-For"] == "127.0.0.1"
        assert reply.headers["Seen-X-Forwarded-Proto"] == "https"
        assert "Seen-Modal-Secret" not in reply.headers
        assert reply.headers.getall("Set-Cookie") == ["a=1", "b=2"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_large_bodies_stream_into_the_container(place, method, is_chunked):
    async def pieces():
        for _ in range(20):
            yield bytes(1 << 20)

    body = pieces() if is_chunked else bytes(20 << 20)
    async with place.session.request(method, "/", data=body) as reply:
        assert (reply.headers["X-Size"], reply.headers["X-Method"]) == (str(20 << 20), method)


async def test_websockets_pass_both_ways(place):
    async with place.session.ws_connect("/ws") as socket:
        for size in (0, 10, 1 << 20):
            await socket.send_bytes(bytes(size))
            assert len((await socket.receive(5)).data) == size
        assert place.servers.num_open == 1


async def test_who_is_not_let_in_learns_what_is_missing(place):
    place.config.unauthenticated = False
    async with place.session.get("/") as reply:
        assert reply.status == 401 and "Modal-Key" in await reply.text()
    async with place.session.get("/", headers={"Modal-Key": "wk-1"}) as reply:
        assert reply.status == 203


async def test_a_container_that_cannot_be_reached_is_passed_over(place):
    place.servers.tasks = ["ta-gone", "ta-1"]
    async with place.session.post("/", data=b"once") as reply:
        assert reply.status == 203 and reply.headers["X-Size"] == "4"
    assert place.servers.dead == []


async def test_a_container_whose_server_has_died_is_replaced(place):
    place.config.port = 1
    async with place.session.get("/") as reply:
        assert reply.status == 502 and "refused" in await reply.text()
    assert place.servers.dead == ["ta-1", "ta-2", "ta-3"]


@pytest.mark.parametrize(
    ("error", "status"), [(ResourceExhausted("all are busy"), 429), (Unavailable("none gets ready"), 503)]
)
async def test_without_a_container_it_says_why(place, error, status):
    place.servers.tasks = [error]
    async with place.session.get("/") as reply:
        assert reply.status == status and error.message in await reply.text() and reply.headers["Retry-After"]


async def test_an_answer_that_breaks_off_inside_breaks_off_outside(place):
    with pytest.raises(aiohttp.ClientPayloadError):
        async with place.session.get("/broken") as reply:
            await reply.read()


async def test_a_client_that_goes_away_frees_its_place(place):
    with pytest.raises(TimeoutError):
        await place.session.get("/forever", timeout=aiohttp.ClientTimeout(total=0.3))
    async with asyncio.timeout(5):
        while place.servers.num_open:  # noqa: ASYNC110 - that it ends is what is waited for
            await asyncio.sleep(0.01)
