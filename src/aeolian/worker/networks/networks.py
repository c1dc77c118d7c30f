"""The networks of this worker's containers: made ahead of time, handed out, reached into, and ended.

::

    _ready (a few, with eth0) --take--> _held: by container --give_back--> gone; its address is free again

In each of them the gateway is reached at the very address that its URLs name, through a splice of the worker: with
`block_network`, too.
"""

import asyncio
import contextlib
import errno
import logging
import secrets
import socket
import ssl
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aeolian.domain.errors import InvalidArgument, Unavailable
from aeolian.worker.networks import bridge as bridges
from aeolian.worker.networks import resolvers
from aeolian.worker.networks.bridge import Bridge
from aeolian.worker.networks.namespace import Namespace
from aeolian.worker.networks.resolvers import Resolvers
from aeolian.worker.splice import Splice

log = logging.getLogger(__name__)

NUM_READY = 4
TAKE_TIMEOUT_S = 20.0
MAKE_AGAIN_S = 1.0
MAX_PORTS = 0xFFFF
LOOPBACK = "127.0.0.1"


class Offered(NamedTuple):
    """What containers reach of Aeolian itself: `host` and `port` as URLs name them, passed on to `destination`."""

    host: str
    port: int
    destination: Path
    tls: ssl.SSLContext | None = None
    other_ports: str = ""
    """Of web functions (`9910-11909`), at the same address; those of a loopback are the container's own."""


class Network(NamedTuple):
    """One container's."""

    namespace: Namespace
    gateway: Splice | None
    hosts: str
    """Lines of its /etc/hosts."""


class Networks:
    def __init__(self, data_dir: Path, offered: Offered):
        self.name = bridges.bridge_name(data_dir)
        self._offered = offered
        self._address = ""
        """Of the gateway, as a number."""
        self._bridge: Bridge | None = None
        self._resolvers: Resolvers | None = None
        self._free: deque[str] = deque()
        self._num_ports = secrets.randbelow(MAX_PORTS)
        """Names of ports are not used again soon: a predecessor's may be there a moment longer."""
        self._ready: asyncio.Queue[Namespace] = asyncio.Queue(NUM_READY)
        self._held: dict[str, Network] = {}
        self._making: asyncio.Task | None = None
        self._problem = ""
        self.is_open = False

    async def open(self) -> None:
        """Raises Unavailable when this host gives no networks; nothing is left of the attempt."""
        problem = bridges.problem_here()
        if not problem:
            try:
                await self._set_up()
            except OSError as error:
                await asyncio.to_thread(bridges.remove, self.name)
                problem = str(error)
        if problem:
            raise Unavailable(f"this host gives containers no networks of their own: {problem}")
        self._making = asyncio.create_task(self._make(), name="networks")
        self.is_open = True

    async def _set_up(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            found = await loop.getaddrinfo(self._offered.host, None, family=socket.AF_INET)
            self._address = found[0][4][0]
        known = await asyncio.to_thread(resolvers.find)
        offered = [str(self._offered.port), self._offered.other_ports]
        host_ports = [(self._address, ports) for ports in offered if ports and self._address]
        avoid = [*known.servers, *(host for host, _ in host_ports)]
        self._bridge = await asyncio.to_thread(bridges.set_up, self.name, avoid, host_ports)
        self._free.extend(self._bridge.addresses())
        first = await asyncio.to_thread(self._make_one)  # shows whether it can be done at all
        self._ready.put_nowait(first)
        self._resolvers = await Resolvers.open(known, self._bridge.gateway)

    async def close(self) -> None:
        if not self.is_open:
            return
        self.is_open = False
        if self._making is not None:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)
        for task_id in list(self._held):
            await self.give_back(task_id)
        while not self._ready.empty():
            self._ready.get_nowait().close()
        if self._resolvers is not None:
            await self._resolvers.close()
        await asyncio.to_thread(bridges.remove, self.name)

    @property
    def resolver_file(self) -> str:
        """The /etc/resolv.conf of containers."""
        assert self._resolvers is not None
        return self._resolvers.text

    # ---- for containers ---------------------------------------------------------------------------------

    async def take(self, task_id: str, *, is_blocked: bool, cidrs: Sequence[str] | None) -> Network:
        """A network for a container: closed in, open, or open to `cidrs` alone.

        Raises Unavailable when none can be made, InvalidArgument for what is no network.
        """
        namespace: Namespace | None = None
        try:
            if is_blocked:
                namespace = await asyncio.to_thread(Namespace.make)
            else:
                namespace = await asyncio.wait_for(self._ready.get(), TAKE_TIMEOUT_S)
                if cidrs is not None:
                    await asyncio.to_thread(namespace.allow_only, cidrs)
            network = Network(
                namespace, *await self._show_gateway(namespace, is_closed=is_blocked or cidrs is not None)
            )
        except TimeoutError:
            why = self._problem or "too many containers start at once"
            raise Unavailable(f"no network for {task_id} within {TAKE_TIMEOUT_S:g} s: {why}") from None
        except BaseException as error:
            self._end(namespace)
            if isinstance(error, ValueError):
                raise InvalidArgument(f"no network for {task_id}: {error}") from error
            if isinstance(error, OSError):
                raise Unavailable(f"no network for {task_id}: {error}") from error
            raise
        self._held[task_id] = network
        return network

    async def take_over(self, path: Path, task_id: str, cidrs: Sequence[str] | None) -> Network:
        """The network at `path`, taken for another owner, belongs to this container from now on. Raises as `take`."""
        owner, network = next((it for it in self._held.items() if it[1].namespace.path == path), ("", None))
        if network is None:
            raise Unavailable(f"no network for {task_id}: the one that was prepared for it is gone")
        if cidrs is not None:
            try:
                await asyncio.to_thread(network.namespace.allow_only, cidrs)
                if network.gateway is None:
                    network = Network(network.namespace, *await self._show_gateway(network.namespace, is_closed=True))
            except ValueError as error:
                raise InvalidArgument(f"no network for {task_id}: {error}") from error
            except OSError as error:
                raise Unavailable(f"no network for {task_id}: {error}") from error
        del self._held[owner]
        self._held[task_id] = network
        return network

    async def _show_gateway(self, namespace: Namespace, *, is_closed: bool) -> tuple[Splice | None, str]:
        offered, address = self._offered, self._address
        if not address or not (is_closed or address.startswith("127.")):
            return None, ""
        sock = await asyncio.to_thread(namespace.listen, address, offered.port)
        splice = Splice(offered.destination)
        await splice.listen(sock, offered.tls)
        return splice, "" if address == offered.host else f"{address}\t{offered.host}\n"

    async def give_back(self, task_id: str) -> None:
        network = self._held.pop(task_id, None)
        if network is None:
            return
        if network.gateway is not None:
            await network.gateway.close()
        self._end(network.namespace)

    def _end(self, namespace: Namespace | None) -> None:
        if namespace is not None:
            if namespace.address:
                self._free.append(namespace.address)
            namespace.close()

    async def connect(self, task_id: str, port: int) -> socket.socket | None:
        """To what listens in a container, on its loopback or its eth0; None: it has no network of its own.

        Raises OSError.
        """
        network = self._held.get(task_id)
        if network is None:
            return None
        loop = asyncio.get_running_loop()
        sock = network.namespace.socket()
        try:
            await loop.sock_connect(sock, (LOOPBACK, port))
        except BaseException as error:
            sock.close()
            address = network.namespace.address
            if not isinstance(error, OSError) or error.errno != errno.ECONNREFUSED or not address:
                raise
        else:
            return sock
        sock = network.namespace.socket()
        try:
            await loop.sock_connect(sock, (address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    # ---- ahead of time ----------------------------------------------------------------------------------

    async def _make(self) -> None:
        while True:
            making = asyncio.ensure_future(asyncio.to_thread(self._make_one))
            try:
                namespace = await asyncio.shield(making)
            except asyncio.CancelledError:
                with contextlib.suppress(OSError):
                    (await making).close()
                raise
            except OSError as error:
                self._problem = str(error)
                log.error("a network for the next container could not be made: %s", error)
                await asyncio.sleep(MAKE_AGAIN_S)
                continue
            self._problem = ""
            try:
                await self._ready.put(namespace)
            except asyncio.CancelledError:
                namespace.close()
                raise

    def _make_one(self) -> Namespace:
        assert self._bridge is not None
        if not self._free:
            raise OSError(f"all addresses of {self._bridge.subnet} are in use")
        address = self._free.popleft()
        self._num_ports += 1
        namespace = None
        try:
            namespace = Namespace.make()
            namespace.join(self._bridge, f"{self.name}{self._num_ports % MAX_PORTS:x}", address)
        except OSError:
            self._free.append(address)
            if namespace is not None:
                namespace.close()
            raise
        return namespace
