"""The life of an `@app.server` container, as far as it differs from that of a Function's.

::

    import, enter hooks --ContainerServerLifecycleReady--> probing its port --it accepts--> ready
    ready --told to stop--> draining: until no connection leads into it, or its time is up --> SIGTERM, exit hooks

It asks for no inputs, so nothing but its port says that it is ready.
"""

import asyncio
import contextlib
from collections.abc import Callable

from aeolian.domain.containers import ContainerSpec
from aeolian.worker.ports import ContainerPorts


class ServerLife:
    """`on_ready()`: its port accepts connections; `on_drained()`: it may be ended. Each is called once at most."""

    def __init__(
        self,
        spec: ContainerSpec,
        ports: ContainerPorts,
        on_ready: Callable[[], None],
        on_drained: Callable[[], None],
    ):
        self._spec = spec
        self._ports = ports
        self._on_ready = on_ready
        self._on_drained = on_drained
        self._probing: asyncio.Task | None = None
        self._draining: asyncio.Task | None = None

    async def ContainerServerLifecycleReady(self, raw: bytes, key: str) -> bytes:
        """Its enter hooks have run. What they have started may take longer."""
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe(), name=f"probe-{self._spec.task_id}")
        return b""

    async def _probe(self) -> None:
        await self._ports.until_accepting(self._spec.task_id, self._spec.server_port)
        self._on_ready()

    def drain(self, grace_s: float) -> None:
        """Let the requests that it works on end, for so long."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain(grace_s), name=f"drain-{self._spec.task_id}")

    async def _drain(self, grace_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._ports.until_drained(self._spec.task_id)
        self._on_drained()

    def close(self) -> None:
        """The container has ended."""
        for task in (self._probing, self._draining):
            if task is not None:
                task.cancel()
