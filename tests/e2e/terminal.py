"""A person at a terminal: types into an interactive command, and looks at what it shows."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ESCAPES = re.compile(rb"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07|[=>])")


class Terminal:
    def __init__(self, argv: Sequence[str], env: Mapping[str, str], *, rows: int = 30, columns: int = 100, cwd: Path):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        env = {**env, "TERM": "xterm-256color"}
        env = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self._process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, env=env, cwd=cwd, start_new_session=True
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, text: str, timeout_s: float = 30.0) -> str:
        """Returns all that was shown since the last call, once this is part of it."""
        ends_at = time.monotonic() + timeout_s
        while text not in self.shown:
            if not self._read(ends_at - time.monotonic()):
                raise AssertionError(f"the terminal does not show {text!r}:\n{self.shown}")
        shown, self.shown = self.shown, ""
        return shown

    def ended(self, timeout_s: float = 30.0) -> int:
        ends_at = time.monotonic() + timeout_s
        while self._read(ends_at - time.monotonic()):
            pass
        return self._process.wait(max(0.1, ends_at - time.monotonic()))

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._master)

    def _read(self, timeout_s: float) -> bool:
        readable, _, _ = select.select([self._master], [], [], max(0.0, timeout_s))
        try:
            data = os.read(self._master, 1 << 16) if readable else b""
        except OSError:  # everybody has left
            data = b""
        self.shown += ESCAPES.sub(b"", data).decode(errors="replace")
        return bool(data)
