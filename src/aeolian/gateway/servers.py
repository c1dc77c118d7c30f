"""Requests to servers (`@app.server`): passed on to the port of one of their containers, and the answers back.

::

    client --HTTP--> ServerProxy --lease--> a ready container --HTTP over the worker's socket--> its port
                          \\-- it cannot be reached, nothing was sent --> another one

Bodies stream both ways; after `101 Switching Protocols` (WebSockets) bytes pass as they are.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict
from yarl import URL

from aeolian.control.servers import Servers
from aeolian.control.web_urls import WebTarget
from aeolian.domain.errors import ResourceExhausted, Unavailable
from aeolian.gateway.container_client import ContainerClients, NotReached
from aeolian.gateway.ingress import plain
from aeolian.gateway.proxy_auth import credentials_in, refusal

log = logging.getLogger(__name__)

MAX_TRIES = 3
HIGH_WATER_BYTES = 256 << 10
HOP_BY_HOP = frozenset(
    {
        "connection",
        "expect",
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

MayEnter = Callable[[web.Request, WebTarget], Awaitable[bool]]


class ServerProxy:
    """`may_enter`: whether a request may reach a server that is not open to everybody; `scheme`: as clients see it."""

    def __init__(self, servers: Servers, clients: ContainerClients, may_enter: MayEnter, scheme: str):
        self._servers = servers
        self._clients = clients
        self._may_enter = may_enter
        self._scheme = scheme

    async def serve(self, request: web.Request, target: WebTarget) -> web.StreamResponse:
        config = target.definition.http_config
        if not config.unauthenticated and not await self._may_enter(request, target):
            return refusal("server")
        tried: set[str] = set()
        while True:
            try:
                async with self._servers.lease(target.function_id, target.app_id, tried) as container:
                    # The client would repeat such a request by itself, and a body can be read only once.
                    is_repeatable = request.body_exists and request.method not in (hdrs.METH_POST, hdrs.METH_PATCH)
                    session = self._clients.of(container.task_id, config.port, is_fresh=is_repeatable)
                    try:
                        return await self._pass_on(request, session, config.port)
                    except NotReached as error:
                        tried.add(container.task_id)
                        if error.is_refused:
                            self._servers.has_died(container)
                        if len(tried) >= MAX_TRIES:
                            return plain(502, f"the server's containers cannot be reached: {error}")
            except ResourceExhausted as error:
                return plain(429, error.message, **{"Retry-After": "1"})
            except Unavailable as error:
                return plain(503, error.message, **{"Retry-After": "1"})

    async def _pass_on(self, request: web.Request, session: aiohttp.ClientSession, port: int) -> web.StreamResponse:
        """Raises NotReached when nothing was sent."""
        is_upgrade = hdrs.UPGRADE in request.headers and "upgrade" in request.headers.get(hdrs.CONNECTION, "").lower()
        headers = self._headers(request, is_upgrade=is_upgrade)
        url = URL(f"http://container:{port}{request.rel_url.raw_path_qs}", encoded=True)
        body = request.content if request.body_exists else None
        try:
            answer = await session.request(
                request.method, url, headers=headers, data=body, allow_redirects=False, read_until_eof=not is_upgrade
            )
        except NotReached:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return plain(502, f"the server gave no answer: {error or type(error).__name__}")
        try:
            if answer.status == 101:
                return await _switch(request, answer)
            return await _answer(request, answer)
        finally:
            answer.close()  # a connection whose answer was read to its end is kept all the same

    def _headers(self, request: web.Request, *, is_upgrade: bool) -> CIMultiDict[str]:
        named = {name.strip().lower() for name in request.headers.get(hdrs.CONNECTION, "").split(",")}
        dropped = HOP_BY_HOP | credentials_in(request) | named
        headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in dropped)
        if is_upgrade:
            headers[hdrs.CONNECTION] = "Upgrade"
            headers[hdrs.UPGRADE] = request.headers[hdrs.UPGRADE]
        before = headers.get(hdrs.X_FORWARDED_FOR)
        client = request.remote or ""
        headers[hdrs.X_FORWARDED_FOR] = f"{before}, {client}" if before else client
        headers[hdrs.X_FORWARDED_PROTO] = self._scheme
        headers.setdefault("X-Forwarded-Host", request.host)
        return headers


async def _answer(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, reason=answer.reason)
    named = {name.strip().lower() for name in answer.headers.get(hdrs.CONNECTION, "").split(",")}
    for name, value in answer.headers.items():
        if name.lower() not in HOP_BY_HOP | named:
            response.headers.add(name, value)
    try:
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
        await response.write_eof()
    except (aiohttp.ClientError, OSError) as error:
        # What was promised does not come: the client must see that, so the connection breaks off.
        log.info("an answer of a server broke off: %s", error or type(error).__name__)
        if request.transport is not None:
            request.transport.abort()
    return response


# ---- after 101 Switching Protocols ------------------------------------------------------------------------------


class _Switched(web.StreamResponse):
    """An answer that has been written already."""

    async def prepare(self, request):
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None

    @property
    def prepared(self) -> bool:
        return True

    @property
    def keep_alive(self) -> bool:
        return False


class _Passer:
    """What aiohttp's protocols feed with the bytes of a switched connection: writes them to the other one.

    A slow reader pauses the other end's reading.
    """

    def __init__(self, source: asyncio.Transport, target: asyncio.Transport, drain: Callable[[], Awaitable[None]]):
        self._source, self._target, self._drain = source, target, drain
        self._draining: asyncio.Task | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._target.write(data)
        if self._draining is None and self._target.get_write_buffer_size() > HIGH_WATER_BYTES:
            self._source.pause_reading()
            self._draining = asyncio.ensure_future(self._resume())
        return False, b""

    def feed_eof(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    async def _resume(self) -> None:
        with contextlib.suppress(OSError, aiohttp.ClientError):
            await self._drain()
            if not self._source.is_closing():
                self._source.resume_reading()
        self._draining = None

    def close(self) -> None:
        self.feed_eof()
        if self._draining is not None:
            self._draining.cancel()


async def _switch(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    connection = answer.connection
    assert connection is not None and connection.protocol is not None, "it was switched, not released"
    inner, outer = connection.protocol, request.protocol
    inside, outside = inner.transport, request.transport
    if inside is None or outside is None:
        return _Switched(status=101)
    lines = [f"HTTP/1.1 101 {answer.reason}", *(f"{name}: {value}" for name, value in answer.headers.items()), "\r\n"]
    outside.write("\r\n".join(lines).encode("utf-8", "surrogateescape"))
    down = _Passer(inside, outside, outer._drain_helper)
    up = _Passer(outside, inside, inner._drain_helper)
    inner.set_parser(down, None)
    outer.set_parser(up)  # type: ignore[arg-type]  # a reader of bytes, not of WebSocket messages
    try:
        await asyncio.wait({up.ended, down.ended}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        up.close()
        down.close()
        inside.close()
        outside.close()
    return _Switched(status=101)
