"""Commands that enter a running container: by a program that takes `crun exec`'s options, whichever the runtime is.

::

    worker --pipes, or the terminal's master--> crun exec | runsc exec | enter.py --> the command, in the container

The entering program lives as long as the command and ends with its exit status. What it must know (arguments, variables)
is handed over in memory, so that no secret lies on a disk.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import tempfile
import termios
from pathlib import Path
from typing import NamedTuple

import psutil

from aeolian.domain.errors import FailedPrecondition
from aeolian.domain.execs import Command, TerminalSize

CONSOLE_TIMEOUT_S = 20.0
KILL_GRACE_S = 2.0
NOT_STARTED = 127
"""As a shell answers for a command that is not there."""
KILLED = 128 + signal.SIGKILL


class Entry(NamedTuple):
    """The way into one container."""

    program: tuple[str, ...]
    """Up to its subcommand; options and the container's name follow."""
    name: str
    process: dict
    """The container's own main process, as OCI describes it: commands have the same rights and variables."""


class EnteredCommand:
    """A command inside a container. Whoever started it owns the descriptors, and awaits `wait`."""

    def __init__(self, folder: Path, entry: Entry):
        self._folder = folder
        self._entry = entry
        self._process: asyncio.subprocess.Process
        self._is_killed = False
        self.stdin = self.stdout = self.stderr = -1
        """Our ends, not blocking. With a terminal stdin and stdout are its master, and there is no stderr (-1)."""

    @classmethod
    async def start(cls, entry: Entry, command: Command) -> "EnteredCommand":
        """Raises FailedPrecondition with the entering program's complaint when a terminal cannot be had."""
        if not hasattr(os, "memfd_create"):
            raise FailedPrecondition("commands in containers can be run on Linux only")
        self = cls(Path(tempfile.mkdtemp(prefix="aeolian-exec-")), entry)
        try:
            await self._start(command)
        except BaseException:
            self.close()
            raise
        return self

    async def wait(self) -> int:
        """The exit status, negative for a signal; NOT_STARTED when there was nothing to run (stderr says why)."""
        code = await self._process.wait()
        if self._is_killed and code != 0:
            return KILLED  # also where it was too early for the entering program to see it
        return code if code <= 0 or self._pid_file.exists() else NOT_STARTED

    @property
    def complaint(self) -> str:
        """With a terminal: what the entering program said itself."""
        with contextlib.suppress(OSError):
            return self._log.read_text(errors="replace").strip()
        return ""

    def kill(self) -> None:
        """SIGKILL to the command and its descendants; the entering program then ends by itself."""
        if self._process.returncode is None:
            self._is_killed = True
            self._kill_descendants()
            asyncio.get_running_loop().call_later(KILL_GRACE_S, self._kill_entering)

    def close(self) -> None:
        """Close what is still open; the command itself is not touched."""
        for descriptor in {self.stdin, self.stdout, self.stderr} - {-1}:
            os.close(descriptor)
        self.stdin = self.stdout = self.stderr = -1
        shutil.rmtree(self._folder, ignore_errors=True)

    def close_stdin(self) -> None:
        if self.stdin != self.stdout:
            os.close(self.stdin)
            self.stdin = -1

    @property
    def _pid_file(self) -> Path:
        return self._folder / "pid"

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _kill_entering(self) -> None:
        """Where that does not end it; it may only have been about to start the command."""
        if self._process.returncode is None:
            self._kill_descendants()
            self._process.kill()

    def _kill_descendants(self) -> None:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def _options(self) -> list[str]:
        return [f"--pid-file={self._pid_file}"]

    async def _start(self, command: Command) -> None:
        entry = self._entry
        described = os.memfd_create("process")
        try:
            os.write(described, json.dumps(process_of(entry.process, command)).encode())
            argv = [*entry.program, f"--process=/proc/self/fd/{described}", *self._options()]
            if command.terminal is None:
                await self._start_with_pipes([*argv, entry.name], described)
            else:
                await self._start_with_terminal(argv, entry.name, described, command.terminal)
        finally:
            os.close(described)

    async def _start_with_pipes(self, argv: list[str], described: int) -> None:
        stdin, self.stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        self.stderr, stderr = os.pipe()
        for descriptor in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(descriptor, False)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *argv, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=(described,), start_new_session=True
            )
        finally:
            for descriptor in (stdin, stdout, stderr):
                os.close(descriptor)

    async def _start_with_terminal(self, argv: list[str], name: str, described: int, size: TerminalSize) -> None:
        console = self._folder / "console"
        with socket.socket(socket.AF_UNIX) as listener, self._log.open("wb") as log:
            listener.bind(str(console))
            listener.listen(1)
            listener.setblocking(False)
            self._process = await asyncio.create_subprocess_exec(
                *argv, f"--console-socket={console}", name, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(described,), start_new_session=True,
            )  # fmt: skip
            arriving = asyncio.create_task(_receive_master(listener))
            ending = asyncio.create_task(self._process.wait())
            try:
                done, _ = await asyncio.wait(
                    {arriving, ending}, timeout=CONSOLE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
                )
                if arriving not in done or arriving.exception() is not None:
                    self._kill_entering()
                    raise FailedPrecondition(
                        f"the command could not be started: {self.complaint or 'it was given no terminal'}"
                    )
            finally:
                arriving.cancel()
                ending.cancel()
        self.stdin = self.stdout = arriving.result()
        os.set_blocking(self.stdout, False)
        fcntl.ioctl(self.stdout, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))


def process_of(own: dict, command: Command) -> dict:
    """A command as OCI describes a process: the container's own one, with other arguments."""
    env = dict(pair.split("=", 1) for pair in own["env"])
    process = {
        **own,
        "args": list(command.argv),
        "env": [f"{name}={value}" for name, value in {**env, **command.env}.items()],
        "cwd": os.path.join("/", command.cwd or own["cwd"]),
        "terminal": command.terminal is not None,
    }
    if command.terminal is not None:
        process["consoleSize"] = {"height": command.terminal.rows, "width": command.terminal.columns}
    return process


async def _receive_master(listener: socket.socket) -> int:
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    with connection:
        connection.settimeout(CONSOLE_TIMEOUT_S)
        _, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, connection, 4096, 1)
    if not descriptors:
        raise OSError("no terminal came")
    return descriptors[0]
