"""Where the supervisor prints: never in the way of those whose lines it prints.

A terminal that stands still (Ctrl-S, a full pipe) must not stop the processes that write through it, so a thread
does the writing, lines beyond its queue are dropped and counted, and each process's output is in a file as well.
"""

import contextlib
import logging
import queue
import sys
import threading
from logging.handlers import RotatingFileHandler
from pathlib import Path

from aeolian.cli.log_output import LogFormat, json_line

MAX_WAITING_LINES = 10_000
MAX_FILE_BYTES = 16 << 20
FLUSH_S = 2.0


class Terminal:
    """Lines with the name of who said them, to the terminal and to `folder/<name>.log`.

    With `log_format` "json" every line is an object: those that are none yet are made one.
    """

    def __init__(self, folder: Path, log_format: LogFormat = "text"):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._is_json = log_format == "json"
        self._files: dict[str, RotatingFileHandler] = {}
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING_LINES)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._write, name="terminal", daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        """A line of the supervisor's own."""
        self.line("aeolian", text)

    def line(self, name: str, text: str) -> None:
        if self._is_json:
            text = text if text.startswith('{"time": ') else json_line(name, text)
            self._file(name).emit(logging.makeLogRecord({"msg": text}))
            self._print(text)
            return
        self._file(name).emit(logging.makeLogRecord({"msg": text}))
        self._print("\n".join(f"{name:<7} | {line}" for line in text.split("\n")))

    def show(self, text: str) -> None:
        """To the terminal alone, as it is: for people."""
        self._print(json_line("aeolian", text.strip()) if self._is_json else text)

    def _print(self, text: str) -> None:
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            self._num_dropped += 1

    def close(self) -> None:
        """Write what waits, for at most `FLUSH_S` seconds."""
        try:
            self._lines.put(None, timeout=FLUSH_S)
            self._thread.join(FLUSH_S)
        except queue.Full:
            pass
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk
                file.close()

    def _file(self, name: str) -> RotatingFileHandler:
        if name not in self._files:
            handler = RotatingFileHandler(self._folder / f"{name}.log", maxBytes=MAX_FILE_BYTES, backupCount=1)
            handler.setFormatter(logging.Formatter("%(message)s" if self._is_json else "%(asctime)s %(message)s"))
            handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk is said elsewhere
            self._files[name] = handler
        return self._files[name]

    def _write(self) -> None:
        while (text := self._lines.get()) is not None:
            dropped, self._num_dropped = self._num_dropped, 0
            if dropped:
                missed = f"({dropped} lines were not shown; they are in {self._folder})"
                text += "\n" + (json_line("aeolian", missed) if self._is_json else f"aeolian | {missed}")
            try:
                print(text, flush=True)
            except (OSError, ValueError):  # nobody reads any more: the files still have it
                sys.stdout = None  # type: ignore[assignment]  # print() then does nothing
