"""Requests to web functions: told from the gateway's own by where they arrive, and given to whoever serves their kind.

A connection to a port of web functions, or a Host below the domain, belongs to a web function with every path there
is; what comes to the HTTP port under another name is the gateway's own.
"""

from collections.abc import Awaitable, Callable

from aiohttp import web

from aeolian.control.web_urls import WebTarget, WebUrls
from aeolian.gateway.arrival import public_port

Serve = Callable[[web.Request, WebTarget], Awaitable[web.StreamResponse]]


class Ingress:
    """The gateway's middleware for web functions.

    `serve_call` answers for functions that take their requests as inputs, `serve_server` for those that listen on a
    port of their container.
    """

    def __init__(self, urls: WebUrls, serve_call: Serve, serve_server: Serve):
        self._urls = urls
        self._serve_call = serve_call
        self._serve_server = serve_server

    @web.middleware
    async def middleware(self, request: web.Request, handler) -> web.StreamResponse:
        port = public_port(request)
        if port and self._urls.is_ours(port):
            target = self._urls.at_port(port)
        elif self._urls.label_in(request.host):
            target = self._urls.at_host(request.host)
        else:
            return await handler(request)
        if target is None:
            return plain(404, "there is no web function at this address, or its App has been stopped")
        if target.definition.is_server:
            return await self._serve_server(request, target)
        return await self._serve_call(request, target)


def plain(status: int, message: str, **headers: str) -> web.Response:
    """An answer of the ingress itself, as people see it in their browsers."""
    return web.Response(status=status, text=f"{message}\n", headers=headers)
