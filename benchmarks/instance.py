"""An `aeolian up` to measure: started on free ports, and stopped again."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

AEOLIAN = (sys.executable, "-m", "aeolian.cli.main")
READY_TIMEOUT_S = 120
STOP_TIMEOUT_S = 120


@contextlib.contextmanager
def running(data_dir: Path, runtime: str) -> Iterator[dict[str, str]]:
    """Yields the environment of its clients. Its log is beside the data directory."""
    log_path = data_dir.with_name(f"{data_dir.name}-{runtime}.log")
    ports = ("--grpc-port", "0", "--http-port", "0", "--web-port", "0")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*AEOLIAN, "up", "--data-dir", str(data_dir), "--runtime", runtime, *ports],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + READY_TIMEOUT_S
        while b"is ready" not in log_path.read_bytes():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"aeolian up does not start:\n{log_path.read_text()[-2000:]}")
            time.sleep(0.1)
        connect = [*AEOLIAN, "connect", "--data-dir", str(data_dir), "--print-env"]
        lines = subprocess.run(connect, check=True, capture_output=True, text=True).stdout.splitlines()
        pairs = (shlex.split(line.removeprefix("export "))[0].split("=", 1) for line in lines)
        yield {**os.environ, "MODAL_CONFIG_PATH": os.devnull, "COLUMNS": "200", **dict(pairs)}
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
