"""Runs the steps of image builds: each a process of `step.py`, whose output is passed on line by line."""

import asyncio
import codecs
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aeolian.domain.errors import FailedPrecondition
from aeolian.worker.images.mode import Mode
from aeolian.worker.images.step_limits import StepLimits

STDOUT, STDERR, INFO = 1, 2, 3
SCRIPT = Path(__file__).with_name("step.py")
READ_BYTES = 1 << 16
MAX_LINE_CHARS = 8 << 10
MAX_TAIL_LINES = 30
END_WAIT_S = 10.0
MAX_STEP_S = 4 * 3600.0

OnLog = Callable[[int, str], None]
"""Takes a piece of output: the stream it came on (STDOUT, STDERR, INFO), and text, usually whole lines."""


class StepFailed(FailedPrecondition):
    """A step ended with another status than 0."""


class StepRunner:
    def __init__(self, mode: Mode, limits: StepLimits | None = None, max_step_s: float = MAX_STEP_S):
        self.mode = mode
        self._limits = limits
        self._max_step_s = max_step_s

    async def run(self, job: dict[str, Any], what: str, on_log: OnLog, *, captures: bool = False) -> bytes:
        """Carry out one job (see `step.py`). With `captures`, its standard output is returned, not passed on.

        Raises StepFailed that says what failed, and how. Cancelled, it ends the step's processes first.
        """
        full = {
            "worker_pid": os.getpid(),
            "namespaces": self.mode.name != "portable",
            "user_namespace": not self.mode.is_whole,
            "own_pids": self.mode.own_pids,
            **job,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-IS", str(SCRIPT),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}, start_new_session=True,
        )  # fmt: skip
        output, captured = Output(on_log), b""
        limited = contextlib.ExitStack()
        try:
            if self._limits is not None:  # it waits for its job
                limited.enter_context(self._limits.around(process.pid))
            await _given(process, json.dumps(full).encode())
            assert process.stdout is not None and process.stderr is not None
            async with asyncio.timeout(self._max_step_s), asyncio.TaskGroup() as readers:
                errors = readers.create_task(output.read(STDERR, process.stderr))
                if captures:
                    captured = await process.stdout.read()
                else:
                    await output.read(STDOUT, process.stdout)
                await errors
            code = await process.wait()
        except TimeoutError:
            await asyncio.shield(_end(process))
            raise StepFailed(f"{what} took longer than {self._max_step_s:g} s and was ended{output.quoted()}") from None
        except BaseException:
            await asyncio.shield(_end(process))
            raise
        finally:
            limited.close()
        if code:
            raise StepFailed(f"{what} failed with exit code {code}{_meaning(code)}{output.quoted()}")
        return captured


async def _given(process: asyncio.subprocess.Process, job: bytes) -> None:
    """The job, by a pipe: it holds secrets, and arguments can be seen by everybody."""
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):  # it has ended already: its status says why
        process.stdin.write(job)
        await process.stdin.drain()
    process.stdin.close()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Its processes are gone, and with them its mounts, when this returns."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), END_WAIT_S)
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


class Output:
    """What a step says: passed on as it comes, its end kept for the error message."""

    def __init__(self, on_log: OnLog):
        self._on_log = on_log
        self._tail: deque[str] = deque(maxlen=MAX_TAIL_LINES)

    async def read(self, fd: int, stream: asyncio.StreamReader) -> None:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        waiting = ""
        while chunk := await stream.read(READ_BYTES):
            waiting += decode(chunk)
            end = max(waiting.rfind("\n"), waiting.rfind("\r")) + 1
            if end == 0 and len(waiting) > MAX_LINE_CHARS:
                end = len(waiting)
            if end:
                self._pass_on(fd, waiting[:end])
                waiting = waiting[end:]
        waiting += decode(b"", True)
        if waiting:
            self._pass_on(fd, waiting + "\n")

    def _pass_on(self, fd: int, text: str) -> None:
        lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
        self._tail.extend(lines)
        self._on_log(fd, text)

    def quoted(self) -> str:
        return ". Its last output:\n" + "\n".join(self._tail) if self._tail else ", without any output"


def _meaning(code: int) -> str:
    return {137: " (killed, perhaps for lack of memory)", 127: " (command not found)"}.get(code, "")
