"""The supervisor: starts processes, passes their output on, restarts what dies, stops them in order.

It knows nothing of what they do. Children die with it, however it ends: the kernel sends each its `death_signal`.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil

from aeolian.domain.errors import AeolianError

PR_SET_PDEATHSIG = 1
STABLE_S = 10.0
"""A process that lived this long has started well: the next death is the first again."""
MAX_FAILED_STARTS = 4
BACKOFF_S = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
EXIT_CANNOT_WORK = os.EX_CONFIG
"""A process that exits with this status (78) will not do better next time: everything stops."""
NUM_LAST_LINES = 15
MAX_LINE_BYTES = 16 << 10
LEFTOVER_GRACE_S = 5.0
SPARE_AFTER_S = 2.0

_libc = ctypes.CDLL(None)


class ChildSpec(msgspec.Struct, frozen=True):
    """One process to keep running."""

    name: str
    argv: tuple[str, ...]
    pass_fds: tuple[int, ...] = ()
    death_signal: int = signal.SIGKILL
    """What it gets when the supervisor dies without stopping it."""
    stop_s: float = 10.0
    """How long it may take to end after SIGTERM before it is killed."""
    has_spare: bool = False
    """Another one waits in case it dies, with its modules loaded: started with `--wait`, it goes on when it reads a
    line from its standard input."""


class ChildRecord(msgspec.Struct, frozen=True):
    """A started process, as the next supervisor finds it on disk. `created_at` tells it from a reused pid."""

    name: str
    pid: int
    created_at: float


class GaveUp(AeolianError):
    """A process does not start: trying again would not help."""


class Supervisor:
    """Keeps `specs` running, in the given order; stops them in reverse.

    `on_line(name, text)` gets each line of output, `say(text)` the supervisor's own lines. `record_path` is where
    the started processes are written down for `end_leftovers`.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        record_path: Path,
        *,
        on_line: Callable[[str, str], None],
        say: Callable[[str], None],
    ):
        self._children = [_Child(spec, on_line, say, self._record) for spec in specs]
        self._record_path = record_path
        self._say = say
        self.kill_now = asyncio.Event()
        """Set it to end a drain at once."""

    @property
    def pids(self) -> dict[str, int]:
        """Running processes by name."""
        return {child.spec.name: child.process.pid for child in self._children if child.process is not None}

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set, then stop every process. Raises GaveUp (everything stopped) as soon as one does."""
        tasks = {asyncio.ensure_future(child.keep_running()) for child in self._children}
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait(tasks | {stopping}, return_when=asyncio.FIRST_COMPLETED)
            failed = [task.exception() for task in tasks if task.done() and not task.cancelled()]
        finally:
            stopping.cancel()
            for child in self._children:
                child.is_wanted = False
            for child in reversed(self._children):
                await child.stop(self.kill_now)
            for task in tasks:
                task.cancel()
            await asyncio.gather(stopping, *tasks, return_exceptions=True)
            self._record_path.unlink(missing_ok=True)
        for error in failed:
            if error is not None:
                raise error

    def _record(self) -> None:
        records = [record for child in self._children for record in child.records]
        fresh = self._record_path.with_suffix(".new")
        try:
            fresh.write_bytes(msgspec.json.encode(records))
            fresh.replace(self._record_path)
        except OSError as error:  # they run, all the same
            self._say(f"the running processes cannot be written down: {error}")


class _Child:
    """One process through all its lives."""

    def __init__(
        self,
        spec: ChildSpec,
        on_line: Callable[[str, str], None],
        say: Callable[[str], None],
        changed: Callable[[], None],
    ):
        self.spec = spec
        self.process: asyncio.subprocess.Process | None = None
        self.is_wanted = True
        self._spare: asyncio.subprocess.Process | None = None
        self._spare_task: asyncio.Task | None = None
        self._on_line = on_line
        self._say = say
        self._changed = changed
        self._ended = asyncio.Event()
        self._ended.set()

    @property
    def records(self) -> list[ChildRecord]:
        """Its process, and the one that waits."""
        found = []
        for name, process in ((self.spec.name, self.process), (f"{self.spec.name} (spare)", self._spare)):
            if process is not None:
                with contextlib.suppress(psutil.Error):  # it has ended already
                    found.append(ChildRecord(name, process.pid, psutil.Process(process.pid).create_time()))
        return found

    async def keep_running(self) -> None:
        """Start again whenever it dies. Raises GaveUp."""
        num_deaths = num_failed_starts = 0
        was_stable = False
        while self.is_wanted:
            started_at = time.monotonic()
            status, last_lines = await self._run_once()
            if not self.is_wanted:
                return
            lived_s = time.monotonic() - started_at
            was_stable = was_stable or lived_s >= STABLE_S
            num_deaths = 1 if lived_s >= STABLE_S else num_deaths + 1
            # What a signal ended did not fail by itself.
            num_failed_starts = 0 if was_stable or status <= 0 else num_failed_starts + 1
            if status == EXIT_CANNOT_WORK or num_failed_starts > MAX_FAILED_STARTS:
                raise GaveUp(_cannot_start(self.spec.name, status, last_lines))
            pause_s = BACKOFF_S[min(num_deaths, len(BACKOFF_S)) - 1]
            again = f"in {pause_s:g} s" if pause_s else "now"
            self._say(f"{self.spec.name} {describe_status(status)}; starting it again {again}")
            await asyncio.sleep(pause_s)

    async def stop(self, kill_now: asyncio.Event) -> None:
        """SIGTERM, then SIGKILL to all of its process group after `stop_s`, or at once when `kill_now` is set."""
        await self._end_spare()
        if self.process is None:
            return
        _signal(self.process.pid, signal.SIGTERM)
        ended, killed = asyncio.ensure_future(self._ended.wait()), asyncio.ensure_future(kill_now.wait())
        await asyncio.wait({ended, killed}, timeout=self.spec.stop_s, return_when=asyncio.FIRST_COMPLETED)
        killed.cancel()
        if not ended.done():
            if not kill_now.is_set():
                self._say(f"{self.spec.name} did not end within {self.spec.stop_s:g} s of SIGTERM: killing it")
            if self.process is not None:
                kill_group(self.process.pid)
        await ended

    async def _run_once(self) -> tuple[int, list[str]]:
        """Start it and wait for its end: its exit status and its last lines of output."""
        last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._ended.clear()
        try:
            self.process = process = self._take_spare() or await self._spawn(self.spec.argv)
            self._changed()
            if not self.is_wanted:  # stopped while it was being started
                kill_group(process.pid)
            elif self.spec.has_spare and self._spare_task is None:
                self._spare_task = asyncio.create_task(self._have_spare())
            assert process.stdout is not None
            reading = asyncio.ensure_future(self._read(process.stdout, last_lines))
            try:
                status = await process.wait()
                # What it started may hold the pipe open: its own last words are there within a moment.
                await asyncio.wait({reading}, timeout=0.2)
            finally:
                reading.cancel()
            return status, list(last_lines)
        finally:
            self.process = None
            self._ended.set()

    async def _spawn(self, argv: Sequence[str], stdin: int = asyncio.subprocess.DEVNULL) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=self.spec.pass_fds,
            start_new_session=True,  # Ctrl-C in the terminal reaches the supervisor alone
            preexec_fn=_die_with_parent(self.spec.death_signal),
        )

    # ---- the one that waits -----------------------------------------------------------------------------

    async def _have_spare(self) -> None:
        await asyncio.sleep(SPARE_AFTER_S)  # the one that starts needs the processor more
        try:
            self._spare = await self._spawn((*self.spec.argv, "--wait"), asyncio.subprocess.PIPE)
        except OSError as error:
            self._say(f"a spare {self.spec.name} cannot be started: {error}")
        self._changed()

    def _take_spare(self) -> asyncio.subprocess.Process | None:
        """The one that waits goes on; None: there is none."""
        if self._spare_task is None or not self._spare_task.done():
            return None
        self._spare_task = None
        spare, self._spare = self._spare, None
        if spare is None or spare.returncode is not None:
            return None
        assert spare.stdin is not None
        spare.stdin.write(b"go\n")
        spare.stdin.close()
        return spare

    async def _end_spare(self) -> None:
        if self._spare_task is not None:
            self._spare_task.cancel()
            await asyncio.gather(self._spare_task, return_exceptions=True)
        if self._spare is not None:
            kill_group(self._spare.pid)
            await self._spare.wait()
            self._spare = None

    async def _read(self, stream: asyncio.StreamReader, last_lines: deque[str]) -> None:
        rest = b""
        while data := await stream.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._pass_on(line, last_lines)
        if rest:
            self._pass_on(rest, last_lines)

    def _pass_on(self, line: bytes, last_lines: deque[str]) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        last_lines.append(text)
        self._on_line(self.spec.name, text)


def end_leftovers(record_path: Path, say: Callable[[str], None]) -> None:
    """End the processes of an earlier supervisor that died without stopping them. The caller holds the lock."""
    try:
        records = msgspec.json.decode(record_path.read_bytes(), type=list[ChildRecord])
    except (OSError, msgspec.MsgspecError):
        return
    living = []
    for record in records:
        try:
            process = psutil.Process(record.pid)
            if abs(process.create_time() - record.created_at) < 0.5:
                living.append(process)
        except psutil.Error:
            continue
    _gone, stubborn = psutil.wait_procs(living, timeout=LEFTOVER_GRACE_S)
    for process in stubborn:
        say(f"ending process {process.pid}, left over from an earlier run")
        kill_group(process.pid)
    psutil.wait_procs(stubborn, timeout=LEFTOVER_GRACE_S)
    record_path.unlink(missing_ok=True)


def kill_group(pid: int) -> None:
    """SIGKILL to a child and to what it started in its own process group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        _signal(pid, signal.SIGKILL)


def describe_status(status: int) -> str:
    """`died of SIGKILL`, or `exited with status 1`."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"died of {signal.Signals(-status).name}"
    except ValueError:
        return f"died of signal {-status}"


def _cannot_start(name: str, status: int, last_lines: list[str]) -> str:
    said = "\n".join(f"    {line}" for line in last_lines) or "    (nothing)"
    return f"{name} does not start: it {describe_status(status)}. The last that it said:\n{said}"


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _die_with_parent(number: int) -> Callable[[], None]:
    parent = os.getpid()

    def between_fork_and_exec() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return between_fork_and_exec
