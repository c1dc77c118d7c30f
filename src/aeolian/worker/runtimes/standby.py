"""A standby container: started ahead, with the SDK imported, and made into the next container of its kind.

It is a whole container of an image, confined like any other, that belongs to nobody: it holds no secret, no
Volume, no user code. When a container of its kind is to start, everything that is its own is added from outside::

    standby                                        container
    root: the image                                root: Mounts over the image, binds (new_root.py)
    cgroup: least share of the CPU                 its limits
    environment: the image's                       its variables, by a socket that is then closed
    waiting, the SDK imported      -------->       the SDK's entrypoint reads its arguments

Each serves one container, so nothing is shared by two: not even a hash seed. Which are kept says standbys.py.
"""

import asyncio
import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from aeolian.domain.errors import FailedPrecondition, Unavailable
from aeolian.worker.hooks.base import Hook, Start
from aeolian.worker.images.overlay_files import remove_tree
from aeolian.worker.runtimes.kept_container import KeptContainer
from aeolian.worker.runtimes.standby_fit import Kind, Report, changed_variable, misfit
from aeolian.worker.runtimes.wiring import EVERYWHERE

TELL_TIMEOUT_S = 10.0
MAX_REPORT_BYTES = 1 << 20


class Unprepared(Exception):
    """Containers of this kind have to start cold; the message says why."""


class Known(NamedTuple):
    """What a standby has reported, and its environment when the pool's hook came."""

    report: Report
    env: dict[str, str]

    def misfit(self, start: Start) -> str:
        """Why this container must start cold, or ""."""
        targets = [mount.path for mount in start.spec.volumes]
        return misfit(self.report, self.env, {**EVERYWHERE, **start.env}, start.layers, targets)


class Standby:
    """One container without an owner, and all that belongs to it."""

    def __init__(self, kind: Kind, start: Start):
        self.kind = kind
        self.start = start
        self.env_at_hook: dict[str, str] = {}
        """Its environment when the pool's hook came."""
        self.env: dict[str, str] = {}
        """Its whole environment."""
        self.report: Report | None = None
        self.container: KeptContainer | None = None
        self.is_launched = asyncio.Event()
        """Its container runs; soon it is ready."""
        self.applied: list[Hook] = []
        self.is_waited_for = False
        """By one container, which takes it when it is ready."""
        self.taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_settled = asyncio.Event()
        """It is ready, or cannot be made."""
        self.socket, self.stdin = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.task: asyncio.Task

    async def read_report(self) -> Report:
        """Raises Unprepared when the image's Python cannot be, Unavailable when it has died."""
        loop, line = asyncio.get_running_loop(), b""
        while not line.endswith(b"\n"):
            chunk = await loop.sock_recv(self.socket, 1 << 16)
            if not chunk or len(line) > MAX_REPORT_BYTES:
                raise Unavailable("its interpreter ended")
            line += chunk
        try:
            report = msgspec.json.decode(line, type=Report)
        except msgspec.MsgspecError as error:
            raise Unprepared(f"its interpreter says what is no report: {error}") from error
        if not report.ready:
            raise Unprepared(report.reason.strip() or "no reason was given")
        return report

    def check_fits(self, env: Mapping[str, str], network_namespace: Path | None) -> None:
        """`env`: the container's whole environment. Raises FailedPrecondition."""
        assert self.report is not None, "it is ready"
        why_not = changed_variable(self.report, self.env, env)
        if not why_not and network_namespace != self.start.network_namespace:
            why_not = "the container has another network"
        if why_not:
            raise FailedPrecondition(why_not)

    async def tell(self, argv: Sequence[str], env: Mapping[str, str], cwd: str, *, is_entrypoint: bool) -> None:
        """Let it go on as the container that it has become."""
        request = {"argv": list(argv), "env": dict(env), "cwd": cwd, "is_entrypoint": is_entrypoint}
        data = json.dumps(request).encode() + b"\n"
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(self.socket, data), TELL_TIMEOUT_S)
        self.socket.close()

    async def end(self) -> None:
        """Kill it. Never raises; may be called again."""
        self.socket.close()
        self.stdin.close()
        if (container := self.container) is not None:
            container.kill()
            await container.wait()
            await container.release()

    async def dispose(self) -> None:
        """End it, and undo what was prepared for it. Never raises; may be called again."""
        await self.end()
        for hook in reversed(self.applied):
            await hook.undo(self.start)
        self.applied.clear()
        await asyncio.to_thread(remove_tree, self.start.folder)
