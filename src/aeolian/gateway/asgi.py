"""Web functions that take each request as an input: HTTP and WebSockets as ASGI messages, and back.

::

    client <--HTTP--> AsgiIngress <--Asgi messages--> Exchange <--> the app in its container
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from aiohttp import WSMsgType, hdrs, web
from google.protobuf.message import DecodeError
from modal_proto import api_pb2

from aeolian.control.web_calls import WebCall, WebCalls
from aeolian.control.web_urls import WebTarget
from aeolian.domain.calls import Status
from aeolian.gateway.asgi_bodies import body_pieces, delete_after
from aeolian.gateway.ingress import plain
from aeolian.gateway.proxy_auth import ProxyAuth, credentials_in, refusal

log = logging.getLogger(__name__)

FIRST_BODY_S = 2.0
"""The SDK answers 408 when it hears nothing of a request for 5 s: a client that sends its body later is told of."""
MAX_WEBSOCKET_MESSAGE_BYTES = 16 << 20
WEBSOCKET_PING_S = 30.0
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that concern one connection, not the request (RFC 9110, 7.6.1)."""
OURS = frozenset({"sec-websocket-key", "sec-websocket-version", "sec-websocket-extensions", "sec-websocket-accept"})
"""Of a WebSocket's handshake, which ends here."""
BROKEN_HEADER = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
FAILURES = {
    Status.TIMEOUT: (504, "the web function did not answer within its timeout"),
    Status.TERMINATED: (503, "the web function was stopped before it answered"),
    Status.INTERNAL_FAILURE: (502, "the container of the web function was lost before it answered"),
}
FAILED = (500, "the web function failed before it answered: `modal app logs {app_id}` tells more")
NORMAL_CLOSE = 1000
BROKEN_CLOSE = 1006
FAILED_CLOSE = 1011
DISCONNECT = api_pb2.Asgi(http_disconnect=api_pb2.Asgi.HttpDisconnect())


class Blobs(Protocol):
    async def open_path(self, blob_id: str) -> Path: ...

    async def delete(self, blob_id: str) -> None: ...


class AsgiIngress:
    def __init__(self, calls: WebCalls, blobs: Blobs, auth: ProxyAuth, scheme: str):
        """`scheme`: how clients reach web functions, `http` or `https`."""
        self._calls = calls
        self._auth = auth
        self._blobs = blobs
        self._scheme = scheme

    async def serve(self, request: web.Request, target: WebTarget) -> web.StreamResponse:
        if target.webhook.requires_proxy_auth and not await self._auth.may_enter(request, target):
            return refusal("web function")
        if request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
            return await self._websocket(request, target)
        return await self._http(request, target)

    # ---- HTTP -------------------------------------------------------------------------------------------

    async def _http(self, request: web.Request, target: WebTarget) -> web.StreamResponse:
        scope = _scope(request, "http", self._scheme, hidden=_hidden(request, target))
        scope |= {"method": request.method, "extensions": {"http.response.trailers": {}}}
        call = await self._calls.begin(target, scope)
        sending = asyncio.create_task(_send_body(request, call))
        try:
            return await self._answer(request, call, target)
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending
            call.leave(DISCONNECT)

    async def _answer(self, request: web.Request, call: WebCall, target: WebTarget) -> web.StreamResponse:
        answer: _Answer | None = None
        try:
            async with contextlib.aclosing(self._messages(call)) as messages:
                async for message, blob in messages:
                    match message.WhichOneof("type"):
                        case "http_response_start" if answer is None:
                            try:
                                answer = _Answer(request, message.http_response_start)
                            except ValueError as error:
                                return plain(500, f"the web function sent what is no HTTP answer: {error}")
                            await answer.prepare(request)
                        case "http_response_body" if answer is not None:
                            async for piece in body_pieces(message.http_response_body, blob):
                                await answer.send(piece)
                            if not message.http_response_body.more_body:
                                return await answer.finish()
                        case _:  # trailers, which HTTP/1.1 allows to be dropped on the way, and what makes no sense
                            continue
        except Exception as error:
            if answer is None or isinstance(error, ConnectionError):
                raise
            log.warning("an answer of web function %s breaks off: %s", target.label, error)
            answer.break_off()
        if answer is not None:
            answer.break_off()
        status, text = FAILURES.get(call.exchange.status, FAILED)
        return plain(status, text.format(app_id=target.app_id))

    async def _messages(self, call: WebCall) -> AsyncIterator[tuple[api_pb2.Asgi, Path | None]]:
        """The app's messages. A very large one comes as a blob: then without its body, which is in that file."""
        async with contextlib.aclosing(call.exchange.answers()) as chunks:
            async for chunk in chunks:
                if chunk.data_blob_id:
                    async with delete_after(self._blobs, chunk.data_blob_id) as (message, path):
                        yield message, path
                    continue
                try:
                    yield api_pb2.Asgi.FromString(chunk.data), None
                except DecodeError:
                    log.warning("a web function sent something that is no ASGI message")

    # ---- WebSockets -------------------------------------------------------------------------------------

    async def _websocket(self, request: web.Request, target: WebTarget) -> web.StreamResponse:
        asked = request.headers.get(hdrs.SEC_WEBSOCKET_PROTOCOL, "")
        protocols = [name.strip() for name in asked.split(",") if name.strip()]
        if not web.WebSocketResponse(protocols=protocols).can_prepare(request):
            return plain(400, "this is not a valid WebSocket handshake")
        scheme = "wss" if self._scheme == "https" else "ws"
        scope = _scope(request, "websocket", scheme, hidden=OURS | _hidden(request, target))
        call = await self._calls.begin(target, scope | {"subprotocols": protocols})
        socket: web.WebSocketResponse | None = None
        try:
            await call.exchange.tell(api_pb2.Asgi(websocket_connect=api_pb2.Asgi.WebsocketConnect()))
            async with contextlib.aclosing(self._messages(call)) as messages:
                first = await anext(messages, None)
                if first is None or first[0].WhichOneof("type") != "websocket_accept":
                    return _refusal(first[0] if first is not None else None, call, target)
                accept = first[0].websocket_accept
                socket = web.WebSocketResponse(
                    protocols=[accept.subprotocol] if accept.HasField("subprotocol") else (),
                    heartbeat=WEBSOCKET_PING_S,
                    max_msg_size=MAX_WEBSOCKET_MESSAGE_BYTES,
                )
                try:
                    socket.headers.extend(_headers_of(accept.headers, leave_out=HOP_BY_HOP | OURS))
                except ValueError as error:
                    return plain(500, f"the web function sent what is no HTTP answer: {error}")
                await socket.prepare(request)
                await _talk(socket, call, messages)
                return socket
        finally:
            code = (socket.close_code if socket is not None else None) or BROKEN_CLOSE
            call.leave(api_pb2.Asgi(websocket_disconnect=api_pb2.Asgi.WebsocketDisconnect(code=code)))


async def _talk(
    socket: web.WebSocketResponse, call: WebCall, messages: AsyncIterator[tuple[api_pb2.Asgi, Path | None]]
) -> None:
    """Pass messages both ways until one side closes."""
    listening = asyncio.create_task(_listen(socket, call))
    speaking = asyncio.create_task(_speak(socket, messages))
    try:
        await asyncio.wait({listening, speaking}, return_when=asyncio.FIRST_COMPLETED)
        if speaking.done():
            close = speaking.result()
            code = close.code if close.HasField("code") else NORMAL_CLOSE
            await socket.close(code=code, message=close.reason.encode()[:123])
        else:
            listening.result()
    finally:
        for task in (listening, speaking):
            task.cancel()
        await asyncio.gather(listening, speaking, return_exceptions=True)


async def _listen(socket: web.WebSocketResponse, call: WebCall) -> None:
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            received = api_pb2.Asgi.WebsocketReceive(text=message.data)
        elif message.type is WSMsgType.BINARY:
            received = api_pb2.Asgi.WebsocketReceive(bytes=message.data)
        else:
            continue
        await call.exchange.tell(api_pb2.Asgi(websocket_receive=received))


async def _speak(
    socket: web.WebSocketResponse, messages: AsyncIterator[tuple[api_pb2.Asgi, Path | None]]
) -> api_pb2.Asgi.WebsocketClose:
    async for message, _ in messages:
        match message.WhichOneof("type"):
            case "websocket_send":
                send = message.websocket_send
                try:
                    if send.WhichOneof("content") == "bytes":
                        await socket.send_bytes(send.bytes)
                    else:
                        await socket.send_str(send.text)
                except ConnectionError:
                    await asyncio.Event().wait()  # the listening side says how it was closed
            case "websocket_close":
                return message.websocket_close
            case _:
                continue
    return api_pb2.Asgi.WebsocketClose(code=FAILED_CLOSE, reason="the web function ended")


def _refusal(message: api_pb2.Asgi | None, call: WebCall, target: WebTarget) -> web.Response:
    if message is not None and message.WhichOneof("type") == "websocket_close":
        return plain(403, "the web function does not accept this WebSocket")
    status, text = FAILURES.get(call.exchange.status, FAILED)
    return plain(status, text.format(app_id=target.app_id))


# ---- requests ---------------------------------------------------------------------------------------------


def _hidden(request: web.Request, target: WebTarget) -> frozenset[str]:
    """Headers that are for the ingress."""
    return credentials_in(request) if target.webhook.requires_proxy_auth else frozenset()


def _scope(request: web.Request, kind: str, scheme: str, *, hidden: frozenset[str]) -> dict[str, Any]:
    """What ASGI says of a request, but for `hidden` headers; plain values only, because it is pickled."""
    raw_path, _, query = request.path_qs.partition("?") if not request.raw_path else request.raw_path.partition("?")
    if not raw_path.startswith("/"):  # an absolute URL, as proxies get it, or `*`
        raw_path = "/" + raw_path.partition("://")[2].partition("/")[2]
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    named = {name.strip().lower() for name in request.headers.get(hdrs.CONNECTION, "").split(",")}
    left_out = HOP_BY_HOP | named | hidden
    return {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": f"{request.version.major}.{request.version.minor}",
        "scheme": scheme,
        "path": unquote(raw_path),
        "raw_path": raw_path.encode(errors="surrogateescape"),
        "root_path": "",
        "query_string": query.encode(errors="surrogateescape"),
        "headers": [
            (lower, bytes(value))
            for name, value in request.raw_headers
            if (lower := bytes(name).lower()).decode("latin-1") not in left_out
        ],
        "client": tuple(peer[:2]) if isinstance(peer, tuple) else None,
    }


async def _send_body(request: web.Request, call: WebCall) -> None:
    """The request's body, as it comes. The first message goes soon, whether or not the client has sent anything."""
    content = request.content
    has_told = False
    while True:
        try:
            async with asyncio.timeout(None if has_told else FIRST_BODY_S):
                piece = await content.readany()
        except TimeoutError:
            piece = b""
        except (ConnectionError, web.RequestPayloadError):
            return  # the client went away in the middle: whoever waits for the answer is cancelled too
        is_last = content.at_eof()
        if piece or is_last or not has_told:
            has_told = True
            body = api_pb2.Asgi.HttpRequest(body=piece, more_body=not is_last)
            await call.exchange.tell(api_pb2.Asgi(http_request=body))
        if is_last:
            return


# ---- answers ----------------------------------------------------------------------------------------------


class _Answer(web.StreamResponse):
    """What an app answers: its own headers and no others, but for the Date."""

    def __init__(self, request: web.Request, start: api_pb2.Asgi.HttpResponseStart):
        if not 200 <= start.status <= 599:
            raise ValueError(f"{start.status} is no status of an answer")
        super().__init__(status=start.status)
        self.headers.extend(_headers_of(start.headers, leave_out=HOP_BY_HOP))
        self._own_headers = set(self.headers)
        self._has_body = request.method != hdrs.METH_HEAD and start.status not in (204, 304)
        self._left = self.content_length if self._has_body else None
        """How many bytes of the announced length are missing."""

    async def _prepare_headers(self) -> None:
        await super()._prepare_headers()
        for name in (hdrs.SERVER, hdrs.CONTENT_TYPE):  # aiohttp's guesses
            if not any(own.lower() == name.lower() for own in self._own_headers):
                self.headers.pop(name, None)

    async def send(self, data: bytes | memoryview) -> None:
        if not self._has_body or not data:
            return
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
        if data:
            await self.write(data)

    async def finish(self) -> "web.StreamResponse":
        if self._left:
            self.break_off()
        await self.write_eof()
        return self

    def break_off(self) -> None:
        """The client must see a broken connection, not a complete answer. Raises ConnectionResetError."""
        transport = self._req.transport if self._req is not None else None
        if transport is not None:
            transport.abort()
        raise ConnectionResetError("the web function ended in the middle of its answer")


def _headers_of(flat: Iterable[bytes], *, leave_out: frozenset[str]) -> list[tuple[str, str]]:
    """Pairs of a flat list `name, value, name, value …`. Raises ValueError for what would break the answer."""
    texts = [_text(item) for item in flat]
    for text in texts:
        if BROKEN_HEADER.search(text):
            raise ValueError(f"a header has a line break or a control character: {text[:80]!r}")
    return [pair for pair in zip(texts[::2], texts[1::2], strict=False) if pair[0].lower() not in leave_out]


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
