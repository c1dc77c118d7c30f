"""A container start as an ordered list of hooks.

Each hook prepares one thing (image, mounts, SDK, volumes, secrets, network, limits) by filling in the
`Start`; the runtime then starts the process from it. Hooks are idempotent, each is timed by its name, and
`undo` runs in reverse order when the container has ended, whether or not its start succeeded.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from aeolian.domain.containers import ContainerSpec


@dataclass
class Bind:
    """A file or folder of the host, seen at `target` (absolute) in the container."""

    source: Path
    target: str
    read_only: bool = True


@dataclass
class Start:
    """What the hooks have prepared so far. Owned by the worker's agent; lives as long as the container."""

    spec: ContainerSpec
    folder: Path
    """Private folder of this container on the host, made before the first hook and deleted after the last `undo`."""
    socket_path: Path
    """The Unix socket on which the worker answers this container's RPCs; it listens before the runtime starts."""
    env: dict[str, str] = field(default_factory=dict)
    binds: list[Bind] = field(default_factory=list)
    layers: list[Path] = field(default_factory=list)
    """Trees that lie over the image's layers, the topmost first (Mounts)."""
    rootfs: Path | None = None
    """A mounted, writable root file system (native, gvisor); None: the host's own files (process)."""
    upper: Path | None = None
    """The folder that collects what the container writes to its root (the overlay's upper directory)."""
    python: str = ""
    """Absolute path of the image's interpreter, inside the container."""
    cwd: str = "/root"
    network_namespace: Path | None = None
    """A prepared network namespace (a file that can be entered), or None for the host's."""
    resolver: Path | None = None
    """Its /etc/resolv.conf where the host's own would not do."""
    host_names: str = ""
    """Lines of its /etc/hosts beside the usual ones."""
    cgroup: str = ""
    """Path of the container's cgroup below each controller's root, or "" for none."""


class Hook(Protocol):
    name: str

    async def apply(self, start: Start) -> None:
        """Prepare. Raises AeolianError with a message for the caller when this container cannot start."""
        ...

    async def undo(self, start: Start) -> None:
        """Release what `apply` took, also if it stopped half-way. Never raises."""
        ...


@dataclass
class FunctionHook:
    """A hook of two functions: for steps without state of their own."""

    name: str
    on_apply: Callable[[Start], Awaitable[None]]
    on_undo: Callable[[Start], Awaitable[None]] | None = None

    async def apply(self, start: Start) -> None:
        await self.on_apply(start)

    async def undo(self, start: Start) -> None:
        if self.on_undo is not None:
            await self.on_undo(start)
