"""HTTP clients of containers' ports: over connections that the worker leads into them, kept alive for a moment."""

import asyncio
from pathlib import Path

import aiohttp
from aiohttp.client_proto import ResponseHandler

from aeolian.domain.errors import Unavailable
from aeolian.worker.ports import PortRefused, open_port

KEEPALIVE_S = 1.0
"""Servers close idle connections, some after 2 s: a request must not meet that."""
READ_BYTES = 256 << 10


class NotReached(aiohttp.ClientConnectionError):
    """Nothing was sent: another container may be tried. `is_refused`: nothing listens on the port of this one."""

    def __init__(self, message: str, *, is_refused: bool):
        super().__init__(message)
        self.is_refused = is_refused


class PortConnector(aiohttp.BaseConnector):
    """Connections to one port of one container; `path`: the worker's socket."""

    def __init__(self, path: Path, task_id: str, port: int, *, is_fresh: bool):
        """`is_fresh`: each connection is used once."""
        if is_fresh:
            super().__init__(force_close=True, limit=0)
        else:
            super().__init__(keepalive_timeout=KEEPALIVE_S, limit=0)
        self._path = path
        self._task_id = task_id
        self._port = port

    async def _create_connection(self, req, traces, timeout) -> ResponseHandler:
        try:
            sock = await open_port(self._path, self._task_id, self._port)
        except Unavailable as error:
            raise NotReached(error.message, is_refused=isinstance(error, PortRefused)) from error
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_unix_connection(self._factory, sock=sock)
        return protocol


class ContainerClients:
    """The sessions of each container, as long as it lives."""

    def __init__(self, path: Path):
        self._path = path
        self._sessions: dict[tuple[str, bool], aiohttp.ClientSession] = {}
        self._closing: set[asyncio.Task] = set()

    def of(self, task_id: str, port: int, *, is_fresh: bool = False) -> aiohttp.ClientSession:
        """`is_fresh`: no connection is used twice."""
        session = self._sessions.get((task_id, is_fresh))
        if session is None:
            session = self._sessions[task_id, is_fresh] = aiohttp.ClientSession(
                connector=PortConnector(self._path, task_id, port, is_fresh=is_fresh),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
                read_bufsize=READ_BYTES,
            )
        return session

    def forget(self, task_id: str) -> None:
        """The container is gone."""
        for is_fresh in (False, True):
            if (session := self._sessions.pop((task_id, is_fresh), None)) is not None:
                task = asyncio.create_task(session.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        for task_id in {task_id for task_id, _ in self._sessions}:
            self.forget(task_id)
        await asyncio.gather(*self._closing)
