"""What a runtime is: it turns a prepared `Start` into a running process tree and reports how that ended."""

import asyncio
import signal
from pathlib import Path
from typing import Protocol

from aeolian.domain.containers import ExitStatus
from aeolian.domain.execs import Command
from aeolian.worker.hooks.base import Hook, Start
from aeolian.worker.runtimes.entering import EnteredCommand


class RunningContainer(Protocol):
    """A started container. Its owner (the worker's agent) reads both streams to their ends and awaits `wait`."""

    pid: int
    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader

    async def wait(self) -> ExitStatus:
        """Until the main process has ended (all others of the container are then killed); may be called twice."""
        ...

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the main process; nothing happens when it has ended."""
        ...

    def kill(self) -> None:
        """SIGKILL to everything in the container."""
        ...

    async def exec(self, command: Command) -> EnteredCommand:
        """Run a command inside, with the rights, limits and variables of the main process. It ends with the container.

        Raises FailedPrecondition where this cannot be done.
        """
        ...

    async def release(self) -> None:
        """After `wait`: free what the runtime itself holds (cgroup, crun state). Never raises."""
        ...


class Runtime(Protocol):
    name: str
    """`process`, `native` or `gvisor`."""

    async def open(self) -> None:
        """Prepare the node (once): end what a killed predecessor left, start fork servers."""
        ...

    def hooks(self) -> list[Hook]:
        """The hooks of a start on this runtime, in order."""
        ...

    async def start(self, start: Start) -> RunningContainer:
        """Start the process. argv[0] == "python" means `start.python`. stdin is /dev/null, both outputs are pipes."""
        ...

    async def prepare(self, image_id: str, sdk_version: str, builder_version: str) -> None:
        """Hint that containers of this image will start soon: warm a fork server. Optional; never raises."""
        ...

    async def close(self) -> None:
        """End what `open` started."""
        ...


class RuntimeUnavailable(Exception):
    """This host cannot run this runtime; the message says what is missing and how to get it."""


def exit_status_of(returncode: int) -> int:
    """`asyncio`'s return code (negative for signals) as ExitStatus.exit_code: the same convention."""
    return returncode


def runtime_folder(data_dir: Path, name: str) -> Path:
    """Where a runtime keeps its own state below the data directory."""
    folder = data_dir / "runtime" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
