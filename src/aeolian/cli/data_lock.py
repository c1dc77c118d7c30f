"""One `aeolian up` per data directory: a lock that dies with its holder."""

import fcntl
import os
from pathlib import Path

from aeolian.domain.errors import FailedPrecondition


class DataLock:
    """`D/run/lock`, held by flock: the kernel lets go of it when the process ends, however it ends."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / "lock"
        self._data_dir = run_dir.parent
        self._fd: int | None = None

    def acquire(self) -> None:
        """Raises FailedPrecondition that names the holder."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise FailedPrecondition(
                f"Aeolian is already running on {self._data_dir} (process {holder}). "
                "Stop it first, or name another directory with --data-dir"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def holder(self) -> int | None:
        """The process id of a running holder, or None."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except OSError:
            return int(os.read(fd, 32) or 0) or None
        finally:
            os.close(fd)
