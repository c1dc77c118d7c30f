"""Where a connection came from: the front says so in a first line, which never reaches the HTTP parser.

`PROXY TCP4 <client> <address> <client's port> <public port>`, version 1 of the PROXY protocol. Connections that do
not come through the front (containers' blobs, tests) have none, and are told by that.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

MARK = b"PROXY "
MAX_LINE_BYTES = 107
"""As the specification of the protocol says."""


class Arrival:
    """The transport of a connection, as if the client had connected here: its addresses are those at the front."""

    def __init__(self, transport: asyncio.Transport, client: tuple[str, int], public: tuple[str, int]):
        self._transport = transport
        self._addresses = {"peername": client, "sockname": public}
        self.write = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._addresses.get(name) or self._transport.get_extra_info(name, default)


class _Preface(asyncio.Protocol):
    """Reads the first line, then leaves the connection to an HTTP protocol."""

    def __init__(self, http: Callable[[], asyncio.Protocol]):
        self._http = http
        self._data = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._data.startswith(MARK[: len(self._data)]):
            self._go_on(self._transport, self._data)
        elif b"\r\n" in self._data:
            line, _, rest = self._data.partition(b"\r\n")
            try:
                _, _, client, public, client_port, public_port = line.decode("ascii").split(" ")
                arrival = Arrival(self._transport, (client, int(client_port)), (public, int(public_port)))
            except ValueError:
                self._transport.abort()
                return
            self._go_on(arrival, rest)
        elif len(self._data) > MAX_LINE_BYTES:
            self._transport.abort()

    def _go_on(self, transport: Any, data: bytes) -> None:
        protocol = self._http()
        self._transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if data:
            protocol.data_received(data)


class ArrivalSite(web.UnixSite):
    """Listens on a Unix socket for connections with or without a preface."""

    def __init__(self, runner: web.BaseRunner, path: Path, *, backlog: int):
        super().__init__(runner, str(path), backlog=backlog)
        self._socket_path = str(path)
        self._own_runner = runner

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = self._own_runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Preface(server), self._socket_path, backlog=self._backlog)


def public_port(request: web.Request) -> int:
    """The port that the client connected to; 0 when the connection did not come through the front."""
    transport = request.transport
    here = transport.get_extra_info("sockname") if transport is not None else None
    return here[1] if isinstance(here, tuple) and isinstance(transport, Arrival) else 0
