"""The ingress before ASGI apps that run in the test's own process, with the SDK's own messages between them."""

import asyncio
import contextlib
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from modal._serialization import _deserialize_asgi, _serialize_asgi
from modal_proto import api_pb2

from aeolian.control.web_exchange import Exchange
from aeolian.control.web_urls import WebTarget
from aeolian.domain.calls import Status
from aeolian.domain.errors import NotFound
from aeolian.gateway import asgi
from aeolian.gateway.app import Gateway
from aeolian.gateway.asgi import AsgiIngress

OPEN = api_pb2.Function(webhook_config=api_pb2.WebhookConfig(type=api_pb2.WEBHOOK_TYPE_ASGI_APP))
GUARDED = api_pb2.Function(
    webhook_config=api_pb2.WebhookConfig(type=api_pb2.WEBHOOK_TYPE_ASGI_APP, requires_proxy_auth=True)
)


class SomeCall:
    """A request whose app runs in this process. `left`: what the app was told in the end."""

    def __init__(self, app, scope):
        self.exchange = Exchange()
        self.scope = scope
        self.left: api_pb2.Asgi | None = None
        self._task = asyncio.create_task(self._run(app))

    async def _run(self, app) -> None:
        messages = self.exchange.follow(0)
        index = 0

        async def receive():
            _, data = await anext(messages)
            return _deserialize_asgi(api_pb2.Asgi.FromString(api_pb2.DataChunk.FromString(data).data))

        async def send(message):
            nonlocal index
            index += 1
            chunk = api_pb2.DataChunk(index=index)
            if "blob" in message:
                chunk.data_blob_id = message["blob"]
            else:
                chunk.data = _serialize_asgi(message).SerializeToString(deterministic=True)
            await self.exchange.put([chunk])

        try:
            await app(self.scope, receive, send)
            self.exchange.end(Status.SUCCESS)
        except Failed as failed:
            self.exchange.end(failed.args[0])
        except Exception:
            self.exchange.end(Status.FAILURE)

    def leave(self, message: api_pb2.Asgi) -> None:
        self.left = message
        self.exchange.leave(message)


class Failed(Exception):
    """An app that ends in a certain way."""


class SomeCalls:
    def __init__(self):
        self.app = None
        self.calls: list[SomeCall] = []

    async def begin(self, target, scope) -> SomeCall:
        self.calls.append(SomeCall(self.app, scope))
        return self.calls[-1]


class SomeBlobs:
    def __init__(self, folder: Path):
        self.folder = folder

    async def open_path(self, blob_id: str) -> Path:
        if not (self.folder / blob_id).exists():
            raise NotFound(blob_id)
        return self.folder / blob_id

    async def delete(self, blob_id: str) -> None:
        (self.folder / blob_id).unlink()


class SomeAuth:
    async def may_enter(self, request, target) -> bool:
        return request.headers.get("Modal-Key") == "wk-right"


class Served:
    """An ingress, its URL, and what is behind it."""

    def __init__(self, folder: Path):
        self.calls, self.blobs, self.function = SomeCalls(), SomeBlobs(folder), OPEN
        self.ingress = AsgiIngress(self.calls, self.blobs, SomeAuth(), "http")
        self.gateway = Gateway([], [self.middleware])

    @web.middleware
    async def middleware(self, request, handler):
        target = WebTarget("local--a-b", "fu-1", "", "ap-1", "local", "en-1", self.function)
        return await self.ingress.serve(request, target)

    async def start(self) -> None:
        self.port = await self.gateway.start_tcp("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"

    async def raw(self, request: bytes) -> bytes:
        """What comes back for these bytes, up to the end of the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        async with asyncio.timeout(10):
            reply = await reader.read()
        writer.close()
        return reply


@pytest.fixture
async def served(tmp_path):
    served = Served(tmp_path)
    await served.start()
    yield served
    await served.gateway.stop()


@pytest.fixture
async def http():
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        yield session


def answering(*bodies: bytes, status=200, headers=(), trailers=False):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": list(headers), "trailers": trailers})
        for number, body in enumerate(bodies or (b"",), 1):
            await send({"type": "http.response.body", "body": body, "more_body": number < len(bodies)})
        if trailers:
            await send({"type": "http.response.trailers", "headers": [(b"x-sum", b"1")]})

    return app


async def echo(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        message = await receive()
        await send({"type": "http.response.body", "body": message["body"], "more_body": message["more_body"]})
        if not message["more_body"]:
            return


async def test_the_app_is_told_of_the_request_as_it_was_made(served, http):
    served.calls.app = answering(b"hello ", b"world")
    headers = [
        ("X-Twice", "a"),
        ("X-Twice", "b"),
        ("Connection", "keep-alive, X-Private"),
        ("X-Private", "1"),
        ("TE", "trailers"),
    ]
    async with http.request("DELETE", f"{served.url}/caf%C3%A9/a%2Fb?q=%20&x=1", headers=headers) as reply:
        assert (reply.status, await reply.text()) == (200, "hello world")
    scope = served.calls.calls[0].scope
    assert (scope["type"], scope["method"], scope["scheme"]) == ("http", "DELETE", "http")
    assert (scope["path"], scope["query_string"]) == ("/café/a/b", b"q=%20&x=1")
    assert [value for name, value in scope["headers"] if name == b"x-twice"] == [b"a", b"b"]
    assert not {b"connection", b"x-private", b"te"} & {name for name, _ in scope["headers"]}
    assert scope["client"][0] == "127.0.0.1" and "state" not in scope


async def test_the_client_gets_the_app_s_headers_and_no_others(served, http):
    own = [
        (b"x-a", b"\xe9"),
        (b"set-cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
        (b"transfer-encoding", b"chunked"),
        (b"keep-alive", b"5"),
    ]
    served.calls.app = answering(b"x", headers=own, trailers=True)
    async with http.get(served.url) as reply:
        assert await reply.read() == b"x"
        assert reply.headers.getall("set-cookie") == ["a=1", "b=2"] and reply.headers["x-a"] == "é"
        assert not {"server", "content-type", "keep-alive"} & {name.lower() for name in reply.headers}


async def test_bodies_stream_both_ways_at_once(served, http):
    served.calls.app = echo
    pieces: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def body():
        while (piece := await pieces.get()) is not None:
            yield piece

    pieces.put_nowait(b"one")
    async with http.post(served.url, data=body()) as reply:
        assert await reply.content.readany() == b"one"
        pieces.put_nowait(b"two")
        assert await reply.content.readany() == b"two"
        pieces.put_nowait(None)
        assert await reply.content.read() == b""


async def test_a_client_that_sends_its_body_late_does_not_keep_the_app_waiting(served, monkeypatch):
    monkeypatch.setattr(asgi, "FIRST_BODY_S", 0.01)
    first: asyncio.Future[dict] = asyncio.get_running_loop().create_future()

    async def app(scope, receive, send):
        first.set_result(await receive())
        await answering()(scope, receive, send)

    served.calls.app = app
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    assert first.result() == {"type": "http.request", "body": b"", "more_body": True}
    writer.close()


async def test_a_client_that_expects_100_is_told_to_go_on(served):
    served.calls.app = echo
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\nConnection: close\r\n\r\nhi"
    reply = await served.raw(request)
    assert reply.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK") and b"hi" in reply


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
async def test_answers_that_have_no_body_get_none(served, method, status):
    served.calls.app = answering(b"12345", status=status, headers=[(b"content-length", b"5")] if status == 200 else ())
    reply = await served.raw(f"{method} / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status) and body == b""
    assert (b"content-length: 5" in head) == (status == 200)


@pytest.mark.parametrize(
    ("status", "code"),
    [(Status.FAILURE, 500), (Status.TIMEOUT, 504), (Status.TERMINATED, 503), (Status.INTERNAL_FAILURE, 502)],
)
async def test_an_app_that_ends_without_an_answer_is_an_error(served, http, status, code):
    async def app(scope, receive, send):
        raise Failed(status)

    served.calls.app = app
    async with http.get(served.url) as reply:
        assert reply.status == code
    with pytest.raises(aiohttp.WSServerHandshakeError, match=str(code)):
        await http.ws_connect(served.url)


@pytest.mark.parametrize("headers", [(), ((b"content-length", b"100"),)])
async def test_an_answer_that_breaks_off_is_never_taken_for_a_whole_one(served, http, headers):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"begin", "more_body": True})
        raise Failed(Status.FAILURE)

    served.calls.app = app
    with pytest.raises(aiohttp.ClientPayloadError):
        async with http.get(served.url) as reply:
            await reply.read()


async def test_an_answer_shorter_than_announced_breaks_off(served, http):
    served.calls.app = answering(b"short", headers=[(b"content-length", b"100")])
    with pytest.raises(aiohttp.ClientPayloadError):
        async with http.get(served.url) as reply:
            await reply.read()


@pytest.mark.parametrize(
    "start",
    [{"status": 700}, {"status": 101}, {"status": 200, "headers": [(b"x", b"a\r\nset-cookie: stolen=1")]}],
)
async def test_what_is_no_http_answer_is_not_passed_on(served, http, start):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "headers": [], **start})
        await send({"type": "http.response.body", "body": b"x", "more_body": False})

    served.calls.app = app
    async with http.get(served.url) as reply:
        assert reply.status == 500 and "no HTTP answer" in await reply.text()
        assert "set-cookie" not in reply.headers


async def test_the_app_hears_that_the_client_has_gone(served, http):
    gone = asyncio.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    served.calls.app = app
    async with http.get(served.url) as reply:
        assert await reply.content.readany() == b"x"
        reply.close()
    async with asyncio.timeout(5):
        await gone.wait()


async def test_a_body_that_came_as_a_blob_is_sent_and_deleted(served, http, tmp_path):
    content = bytes(range(256)) * 8000
    message = {"type": "http.response.body", "body": content, "more_body": True}
    (tmp_path / "bl-1").write_bytes(_serialize_asgi(message).SerializeToString(deterministic=True))

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"blob": "bl-1"})
        await send({"type": "http.response.body", "body": b"end", "more_body": False})

    served.calls.app = app
    async with http.get(served.url) as reply:
        assert await reply.read() == content + b"end"
    assert not (tmp_path / "bl-1").exists()


async def test_a_blob_that_is_gone_breaks_the_answer_off(served, http):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"blob": "bl-missing"})
        await send({"type": "http.response.body", "body": b"end", "more_body": False})

    served.calls.app = app
    with pytest.raises(aiohttp.ClientPayloadError):
        async with http.get(served.url) as reply:
            await reply.read()


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET http://elsewhere/path HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nHost: x\r\nX: \xff\xfe\r\nConnection: close\r\n\r\n",
        b"G=T / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.0\r\n\r\n",
    ],
)
async def test_no_request_however_odd_makes_a_5xx(served, request_):
    served.calls.app = answering(b"fine")
    reply = await served.raw(request_ + (b"\r\n\r\n" if request_.startswith(b"\x16") else b""))
    assert reply == b"" or int(reply.split(b" ", 2)[1]) < 500


async def test_large_headers_are_passed_on(served, http):
    served.calls.app = answering()
    async with http.get(served.url, headers={"X-Large": "a" * 30_000}) as reply:
        assert reply.status == 200
    assert (b"x-large", b"a" * 30_000) in served.calls.calls[0].scope["headers"]


# ---- WebSockets -------------------------------------------------------------------------------------------


def chatting(**accept):
    async def app(scope, receive, send):
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept", **accept})
        while True:
            message = await receive()
            app.received.append(message)
            if message["type"] == "websocket.disconnect":
                app.done.set()
                return
            if message.get("text") == "bye":
                await send({"type": "websocket.close", "code": 4001, "reason": "bye"})
                return
            content = {key: message[key] for key in ("text", "bytes") if message[key] is not None}
            await send({"type": "websocket.send", **content})

    app.received, app.done = [], asyncio.Event()
    return app


async def test_messages_of_both_kinds_go_both_ways(served, http):
    served.calls.app = chatting(subprotocol="b", headers=[(b"x-from", b"app")])
    async with http.ws_connect(served.url + "/chat?x=1", protocols=["a", "b"]) as socket:
        assert socket.protocol == "b" and socket._response.headers["x-from"] == "app"
        await socket.send_str("text")
        assert await socket.receive_str() == "text"
        await socket.send_bytes(b"\0" * 300_000)
        assert await socket.receive_bytes() == b"\0" * 300_000
    scope = served.calls.calls[0].scope
    assert (scope["type"], scope["scheme"], scope["subprotocols"]) == ("websocket", "ws", ["a", "b"])
    assert not any(name.startswith(b"sec-websocket-ext") for name, _ in scope["headers"])


async def test_the_app_closes_with_its_own_code(served, http):
    served.calls.app = chatting()
    async with http.ws_connect(served.url) as socket:
        await socket.send_str("bye")
        message = await socket.receive()
        assert (message.type, message.data, message.extra) == (aiohttp.WSMsgType.CLOSE, 4001, "bye")


@pytest.mark.parametrize("how", ["closes", "breaks"])
async def test_the_app_hears_how_the_client_closed(served, http, how):
    served.calls.app = app = chatting()
    socket = await http.ws_connect(served.url)
    await socket.send_str("x")
    await socket.receive_str()
    if how == "closes":
        await socket.close(code=4007)
    else:
        socket._response.connection.transport.abort()
    async with asyncio.timeout(5):
        await app.done.wait()
    assert app.received[-1]["code"] == (4007 if how == "closes" else 1006)


async def test_a_socket_that_the_app_does_not_accept_is_refused(served, http):
    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.close"})

    served.calls.app = app
    with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
        await http.ws_connect(served.url)


async def test_an_app_that_fails_closes_its_socket(served, http):
    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        raise Failed(Status.FAILURE)

    served.calls.app = app
    async with http.ws_connect(served.url) as socket:
        assert (await socket.receive()).data == 1011


async def test_a_handshake_that_is_none_is_refused(served):
    request = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n"
    assert (await served.raw(request)).startswith(b"HTTP/1.1 400")
    assert served.calls.calls == []


# ---- who may enter ----------------------------------------------------------------------------------------


async def test_what_is_guarded_is_not_begun_for_strangers_and_never_sees_the_key(served, http):
    served.function, served.calls.app = GUARDED, chatting()
    async with http.get(served.url) as reply:
        assert reply.status == 401 and "proxy-tokens" in await reply.text()
    with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
        await http.ws_connect(served.url, headers={"Modal-Key": "wk-wrong"})
    assert served.calls.calls == []
    async with http.ws_connect(served.url, headers={"Modal-Key": "wk-right", "Authorization": "Bearer mine"}):
        pass
    names = {name for name, _ in served.calls.calls[0].scope["headers"]}
    assert b"modal-key" not in names and b"authorization" in names


async def test_everybody_is_left_in_the_end(served, http):
    served.calls.app = answering(b"x")
    async with http.get(served.url) as reply:
        await reply.read()
    with contextlib.suppress(aiohttp.ClientError):
        await http.ws_connect(served.url)
    assert [call.left.WhichOneof("type") for call in served.calls.calls] == ["http_disconnect", "websocket_disconnect"]
