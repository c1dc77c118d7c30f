"""The HTTP face as one aiohttp application: routes from the other modules, errors in one place."""

import os
from collections.abc import Iterable
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Middleware

from aeolian.gateway.arrival import ArrivalSite
from aeolian.gateway.errors import answer_errors

SHUTDOWN_S = 5.0
BACKLOG = 4096
MAX_HEADER_BYTES = 64 << 10
"""Of one header, and of the line with the URL."""


class Gateway:
    """Serves `routes` on a Unix socket (the front passes connections on) or, for tests and tools, over TCP.

    Paths belong to the gateway's own address. What has a port or a host name of its own (web functions) is told apart
    by `middlewares`, between `answer_errors` and the routes, so that no path of theirs meets one of ours.
    """

    def __init__(self, routes: Iterable[web.RouteDef], middlewares: Iterable[Middleware] = ()):
        # Bodies are streamed by the handlers, which know how much may come; what is read whole is small.
        self.app = web.Application(middlewares=[answer_errors, *middlewares], client_max_size=4 << 20)
        self.app.add_routes(routes)
        self._runner = web.AppRunner(
            self.app,
            access_log=None,
            shutdown_timeout=SHUTDOWN_S,
            auto_decompress=False,
            handler_cancellation=True,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )

    async def start(self, socket_path: Path) -> None:
        await self._runner.setup()
        socket_path.unlink(missing_ok=True)
        await ArrivalSite(self._runner, socket_path, backlog=BACKLOG).start()
        os.chmod(socket_path, 0o600)

    async def start_tcp(self, host: str, port: int = 0) -> int:
        """Listen on TCP; returns the port."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        return self._runner.addresses[-1][1]

    async def stop(self) -> None:
        """Take no more requests, let those under way end (within seconds)."""
        await self._runner.cleanup()
