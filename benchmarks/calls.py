"""Calls: latency, throughput, cold starts, and what many inputs cost the server. Prints one table.

The in-memory `null_server.py` runs the same App in the same turn: it is the floor that the client allows.

    python benchmarks/calls.py [--runtime process --runtime native] [--queued 10000] [--data-dir DIR]

`--data-dir` keeps built images from one turn to the next. Rounds are interleaved; figures are medians over rounds.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import click
import msgspec
import psutil
from instance import running
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RUN_TIMEOUT_S = 900


class Subject:
    """Something that the client can be pointed at."""

    def __init__(self, name: str, environment: dict[str, str], process: subprocess.Popen | None, data_dir: Path | None):
        self.name, self.environment, self.process, self.data_dir = name, environment, process, data_dir

    def run(self, entrypoint: str, *options: str) -> dict:
        """`modal run` of one entrypoint of `call_app.py`: what it printed last."""
        output = subprocess.run(
            [sys.executable, "-m", "modal", "run", f"call_app.py::{entrypoint}", *options],
            cwd=HERE,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
        )
        lines = [line for line in output.stdout.splitlines() if line.startswith("{")]
        if output.returncode or not lines:
            raise SystemExit(f"{self.name}: {entrypoint} failed:\n{output.stdout[-2000:]}{output.stderr[-2000:]}")
        return json.loads(lines[-1])

    def process_of(self, name: str) -> psutil.Process:
        """`server` or `worker`; the null server is one process."""
        if self.data_dir is None:
            assert self.process is not None
            return psutil.Process(self.process.pid)
        records = json.loads((self.data_dir / "run/processes.json").read_bytes())
        return psutil.Process(next(record["pid"] for record in records if record["name"] == name))


@contextlib.contextmanager
def null_server(num_containers: int):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "MODAL_SERVER_URL": f"http://127.0.0.1:{port}",
        "MODAL_TOKEN_ID": "ak-none",
        "MODAL_TOKEN_SECRET": "as-none",
    }
    process = subprocess.Popen(
        [sys.executable, HERE / "null_server.py", str(port), str(num_containers)],
        env={**os.environ, "NULL_CODE": str(HERE)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield Subject("null server", environment, process, None)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextlib.contextmanager
def aeolian(runtime: str, data_dir: Path):
    with running(data_dir, runtime) as environment:
        yield Subject(f"aeolian, {runtime}", environment, None, data_dir)


def measure(subject: Subject, figures: dict[tuple[str, str], list[float]], map_inputs: int) -> None:
    def note(row: str, value: float) -> None:
        figures[row, subject.name].append(value)

    warm = subject.run("warm")
    note("warm .remote() p50, ms", warm["p50_ms"])
    note("warm .remote() p99, ms", warm["p99_ms"])
    cold = subject.run("cold")
    note("cold start to first user line, s", cold["first_line_s"])
    note("cold .remote(), s", cold["whole_call_s"])
    if subject.data_dir is not None:
        for hook, seconds in hook_times(subject.data_dir).items():
            note(f"  of it: {hook}, ms", 1000 * seconds)
        for containers in (1, 2, 4):
            result = subject.run("mapped", "--containers", str(containers), "--count", str(map_inputs))
            note(f".map, {containers} container(s), inputs/s", result["inputs_per_s"])


def measure_null(figures: dict[tuple[str, str], list[float]], map_inputs: int) -> None:
    """Its number of containers is fixed when it starts."""
    for containers in (1, 2, 4):
        with null_server(containers) as null:
            if containers == 1:
                measure(null, figures, map_inputs)
            result = null.run("mapped", "--containers", str(containers), "--count", str(map_inputs))
            figures[f".map, {containers} container(s), inputs/s", null.name].append(result["inputs_per_s"])


def hook_times(data_dir: Path) -> dict[str, float]:
    """Median seconds of each step of the latest starts, by name, in their order."""
    with contextlib.closing(sqlite3.connect(f"file:{data_dir / 'aeolian.db'}?mode=ro", uri=True)) as connection:
        query = "SELECT hooks FROM containers WHERE started_at > 0 ORDER BY started_at DESC LIMIT 10"
        rows = [msgspec.msgpack.decode(row[0]) for row in connection.execute(query) if row[0]]
    times: dict[str, list[float]] = {}
    for row in rows:
        for hook in row:
            times.setdefault(hook["name"], []).append(hook["seconds"])
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure_queue(subject: Subject, figures: dict[tuple[str, str], list[float]], count: int) -> None:
    """A map of many inputs: time, the server's memory, and its processor time."""
    server = subject.process_of("server")
    before = server.cpu_times()
    result = subject.run("mapped", "--containers", "2", "--count", str(count))
    after = server.cpu_times()
    used_s = after.user + after.system - before.user - before.system
    label = f"{count:,} queued inputs"
    figures[f"{label}: inputs/s", subject.name].append(result["inputs_per_s"])
    figures[f"{label}: server CPU-s per 1,000", subject.name].append(1000 * used_s / count)
    figures[f"{label}: server memory after, MB", subject.name].append(server.memory_info().rss / 1e6)


@click.command(help=__doc__)
@click.option("--runtime", "runtimes", multiple=True, default=["process", "native"], show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--map-inputs", default=2000, show_default=True)
@click.option("--queued", multiple=True, type=int, default=[10_000, 100_000], show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Kept; default: a temporary one.")
def main(runtimes, rounds: int, map_inputs: int, queued, data_dir: Path | None) -> None:
    folder = data_dir or Path(tempfile.mkdtemp(prefix="aeolian-benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    console = Console(stderr=True)
    try:
        for number in range(rounds):
            console.print(f"round {number + 1} of {rounds}: null server")
            measure_null(figures, map_inputs)
            for runtime in runtimes:
                console.print(f"round {number + 1} of {rounds}: {runtime}")
                with aeolian(runtime, folder / "data") as subject:
                    measure(subject, figures, map_inputs)
        for count in queued:
            console.print(f"{count:,} inputs: null server, then {runtimes[0]}")
            with null_server(2) as null:
                measure_queue(null, figures, count)
            with aeolian(runtimes[0], folder / "data") as subject:
                measure_queue(subject, figures, count)
    finally:
        if data_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
    show(figures, ["null server", *(f"aeolian, {runtime}" for runtime in runtimes)])


def show(figures: dict[tuple[str, str], list[float]], subjects: list[str]) -> None:
    table = Table(title="Calls (medians)")
    table.add_column("")
    for subject in subjects:
        table.add_column(subject, justify="right")
    for row in dict.fromkeys(row for row, _ in figures):
        values = [
            statistics.median(figures[row, subject]) if figures.get((row, subject)) else None for subject in subjects
        ]
        table.add_row(
            row, *("" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in values)
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
