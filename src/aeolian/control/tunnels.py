"""Tunnels (`modal.forward`): a public port for a port of a container, until it is told to stop or ends.

They survive a restart of the server, as their containers do: the ports stay the same.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from aeolian.control.container_state import Container
from aeolian.domain.errors import AlreadyExists, InvalidArgument, ResourceExhausted, Unavailable
from aeolian.storage import tunnels as storage
from aeolian.storage.database import Database
from aeolian.storage.tunnels import Tunnel

log = logging.getLogger(__name__)

MAX_PER_CONTAINER = 32
MAX_TUNNELS = 2000
MAX_PORT = 65_535


class Ports(Protocol):
    """Who listens on public ports."""

    def open(self, port: int, *, has_tls: bool) -> int | None:
        """Listen there (0 = any free one). Returns the port, or None when somebody else has it."""
        ...

    def close(self, port: int) -> None: ...


class Tunnels:
    def __init__(self, database: Database, ports: Ports, *, has_certificate: bool):
        """Without a certificate one public port serves for both, encrypted or not: nothing ends TLS."""
        self._database = database
        self._ports = ports
        self._has_certificate = has_certificate
        self._tunnels: dict[tuple[str, int], Tunnel] = {}
        self._at: dict[int, Tunnel] = {}
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task] = set()

    async def load(self) -> None:
        """Listen again where an earlier server did."""
        gone = []
        for tunnel in await self._database.read(storage.all_tunnels):
            if self._listen_again(tunnel):
                self._keep(tunnel)
            else:
                log.warning("a public port of %s, port %d, was taken by another program", tunnel.task_id, tunnel.port)
                gone.append(tunnel)
        await self._forget(gone)

    async def drop_unknown(self, is_known: Callable[[str], object]) -> None:
        """`is_known(task_id)`: whether there may be such a container."""
        await self._forget([tunnel for tunnel in self._tunnels.values() if not is_known(tunnel.task_id)])

    async def close(self) -> None:
        """Its ports stay open: the front holds them for the next server."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def at(self, public_port: int) -> Tunnel | None:
        return self._at.get(public_port)

    async def start(self, task_id: str, port: int, *, unencrypted: bool) -> Tunnel:
        """Durable when this returns. Raises AlreadyExists, InvalidArgument, ResourceExhausted."""
        if not 1 <= port <= MAX_PORT:
            raise InvalidArgument(f"{port} is no port: use one from 1 to {MAX_PORT}")
        async with self._changing:
            if (task_id, port) in self._tunnels:
                raise AlreadyExists(f"port {port} is already forwarded")
            own = sum(tunnel.task_id == task_id for tunnel in self._tunnels.values())
            if own >= MAX_PER_CONTAINER or len(self._tunnels) >= MAX_TUNNELS:
                raise ResourceExhausted(
                    f"no more than {MAX_PER_CONTAINER} ports of one container, and {MAX_TUNNELS} in all, are forwarded "
                    "at a time"
                )
            tls_port = self._open(has_tls=True)
            plain_port = tls_port if unencrypted else 0
            if unencrypted and self._has_certificate:
                plain_port = self._open(has_tls=False)
            tunnel = Tunnel(task_id, port, tls_port, plain_port)
            self._keep(tunnel)
            try:
                await self._database.write(lambda connection: storage.put(connection, tunnel))
            except BaseException:
                self._end(tunnel)
                raise
        return tunnel

    async def stop(self, task_id: str, port: int) -> bool:
        """Whether there was such a tunnel. Established connections go on."""
        async with self._changing:
            tunnel = self._tunnels.get((task_id, port))
            if tunnel is None:
                return False
            await self._forget([tunnel])
        return True

    def container_ended(self, container: Container) -> None:
        gone = [tunnel for tunnel in self._tunnels.values() if tunnel.task_id == container.task_id]
        if gone:
            for tunnel in gone:
                self._end(tunnel)
            task = asyncio.create_task(self._forget(gone))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # ---- inside -----------------------------------------------------------------------------------------

    def _open(self, *, has_tls: bool) -> int:
        port = self._ports.open(0, has_tls=has_tls)
        if port is None:
            raise ResourceExhausted("this machine has no free port for a tunnel")
        return port

    def _listen_again(self, tunnel: Tunnel) -> bool:
        if self._ports.open(tunnel.tls_port, has_tls=True) is None:
            return False
        if tunnel.plain_port in (0, tunnel.tls_port) or self._ports.open(tunnel.plain_port, has_tls=False) is not None:
            return True
        self._ports.close(tunnel.tls_port)
        return False

    def _keep(self, tunnel: Tunnel) -> None:
        self._tunnels[tunnel.task_id, tunnel.port] = tunnel
        for public_port in {tunnel.tls_port, tunnel.plain_port} - {0}:
            self._at[public_port] = tunnel

    def _end(self, tunnel: Tunnel) -> None:
        if self._tunnels.pop((tunnel.task_id, tunnel.port), None) is None:
            return
        for public_port in {tunnel.tls_port, tunnel.plain_port} - {0}:
            del self._at[public_port]
            self._ports.close(public_port)

    async def _forget(self, gone: list[Tunnel]) -> None:
        for tunnel in gone:
            self._end(tunnel)
        if not gone:
            return
        try:
            await self._database.write(lambda connection: storage.delete(connection, gone))
        except Unavailable:
            log.warning("ends of tunnels could not be stored: the next start finds their containers gone")
