"""Kills parts of a running Aeolian, as an out-of-memory killer or a power cut would, and watches what stays."""

import contextlib
import hashlib
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from running import RunningAeolian

PARTS = ("front", "server", "worker", "container")


class Client:
    """A program of a user that runs meanwhile: its output is read as it comes."""

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        with self._changed:
            return "".join(self._lines)

    def wait_for(self, pattern: str, timeout_s: float = 120) -> re.Match[str]:
        """The first match in what it has printed so far, as soon as there is one."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while (found := re.search(pattern, "".join(self._lines), re.MULTILINE)) is None:
                left = until - time.monotonic()
                if left <= 0 or (not self._reader.is_alive() and self._process.poll() is not None):
                    raise AssertionError(f"{pattern!r} was not printed, but:\n{''.join(self._lines)[-4000:]}")
                self._changed.wait(min(left, 1))
            return found

    def end(self, timeout_s: float = 120) -> str:
        """Wait for its good end; returns everything that it printed."""
        try:
            self._process.wait(timeout_s)
        finally:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)
        assert self._process.returncode == 0, f"the client ended with {self._process.returncode}:\n{self.output}"
        return self.output

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


def kill_part(aeolian: RunningAeolian, part: str, rng: random.Random) -> None:
    """`front`, `server`, `worker`, or a random process of its containers."""
    if part != "container":
        kill(aeolian, part)
        return
    processes = container_processes(aeolian)
    if processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(processes).pid, signal.SIGKILL)


def kill(aeolian: RunningAeolian, part: str, timeout_s: float = 30) -> None:
    """As soon as it runs: it may be starting again."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            return aeolian.kill(part)
        except (ProcessLookupError, StopIteration):
            assert time.monotonic() < until, f"there is no {part}"
            time.sleep(0.02)


def container_processes(aeolian: RunningAeolian) -> list[psutil.Process]:
    """Everything below the worker: containers, and the processes that start and keep them."""
    try:
        return psutil.Process(aeolian.pid_of("worker")).children(recursive=True)
    except (psutil.NoSuchProcess, StopIteration):
        return []


def kill_everything(aeolian: RunningAeolian) -> list[psutil.Process]:
    """The supervisor and all that is below it, at one blow. Returns what was killed."""
    supervisor = psutil.Process(aeolian.pid)
    processes = [supervisor, *supervisor.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()  # so that none sees another die
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    aeolian.wait()
    return processes


def everything_of(data_dir: Path) -> list[psutil.Process]:
    """Processes that belong to an Aeolian on this data directory: named in their arguments, or below one that is."""
    own = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(data_dir) in argument for argument in process.cmdline()):
                own.add(process)
                own.update(process.children(recursive=True))
    return sorted(own, key=lambda process: process.pid)


def mounts_of(data_dir: Path) -> list[str]:
    """Lines of /proc/mounts below it."""
    return [line for line in Path("/proc/mounts").read_text().splitlines() if f" {data_dir}/" in line]


def cgroups_of(data_dir: Path) -> list[Path]:
    """Control groups of its containers, in whichever hierarchies this host has."""
    key = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:12]
    return sorted(path for path in Path("/sys/fs/cgroup").glob(f"**/aeolian-{key}/*") if path.is_dir())


def left_of(data_dir: Path) -> list:
    """Processes, mounts and control groups that belong to a data directory."""
    return [*everything_of(data_dir), *mounts_of(data_dir), *cgroups_of(data_dir)]


def eventually(check: Callable[[], object], what: str, timeout_s: float = 30) -> None:
    """Wait until `check()` is falsy: nothing is left."""
    until = time.monotonic() + timeout_s
    while left := check():
        assert time.monotonic() < until, f"{what}: {left}"
        time.sleep(0.1)


@contextlib.contextmanager
def client(aeolian: RunningAeolian, *argv: str, cwd: Path) -> Iterator[Client]:
    """Run a user's program meanwhile."""
    process = aeolian.start_command(*argv, cwd=cwd)
    try:
        yield Client(process)
    finally:
        process.kill()
        process.wait()
