"""Commands in gVisor's sandboxes: `runsc exec`, which differs from `crun exec` in terminals and in how one kills.

It takes a terminal of the host for the sandbox to use, and the processes inside are none of the host's: they are
found and killed by asking the sandbox.
"""

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
from pathlib import Path

from aeolian.domain.execs import TerminalSize
from aeolian.worker.runtimes.entering import EnteredCommand, Entry

KILL_TIMEOUT_S = 10.0


class GvisorCommand(EnteredCommand):
    def __init__(self, folder: Path, entry: Entry):
        super().__init__(folder, entry)
        self._runsc = entry.program[:-1]
        self._container = entry.name
        self._killing: asyncio.Task | None = None

    def kill(self) -> None:
        if self._process.returncode is None and (self._killing is None or self._killing.done()):
            self._is_killed = True
            self._killing = asyncio.create_task(self._kill_inside())

    def _options(self) -> list[str]:
        return [*super()._options(), f"--internal-pid-file={self._inner_pid_file}"]

    @property
    def _inner_pid_file(self) -> Path:
        return self._folder / "inner_pid"

    async def _kill_inside(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            async with asyncio.timeout(KILL_TIMEOUT_S):
                pid = int(self._inner_pid_file.read_text())
                for number in with_descendants(pid, (await self._ask("ps", self._container)).decode()):
                    await self._ask("kill", f"--pid={number}", self._container, "KILL")
                await self._process.wait()
        self._kill_entering()

    async def _ask(self, *argv: str) -> bytes:
        asked = await asyncio.create_subprocess_exec(
            *self._runsc, *argv,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            said, _ = await asked.communicate()
        finally:
            if asked.returncode is None:
                asked.kill()
        return said

    async def _start_with_terminal(self, argv: list[str], name: str, described: int, size: TerminalSize) -> None:
        master, slave = os.openpty()
        self.stdin = self.stdout = master
        os.set_blocking(master, False)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))
        try:
            # Its session must own the terminal, so that Ctrl-C reaches it: runsc passes signals on.
            self._process = await asyncio.create_subprocess_exec(
                "setsid", "--ctty", *argv, name, stdin=slave, stdout=slave, stderr=slave, pass_fds=(described,)
            )
        finally:
            os.close(slave)


def with_descendants(pid: int, listed: str) -> list[int]:
    """A process and all below it, in the table that `runsc ps` prints: user, process, parent, …"""
    children: dict[int, list[int]] = {}
    for line in listed.splitlines()[1:]:
        _, number, parent, *_ = line.split()
        children.setdefault(int(parent), []).append(int(number))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found
