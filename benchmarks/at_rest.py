"""What deployed Functions cost while nobody calls them, and how fast a burst finds containers. Prints one table.

    python benchmarks/at_rest.py [--functions 1000] [--burst 200] [--runtime process] [--data-dir DIR]

Processor time and memory are those of front, server and worker together, over `--watch` seconds. Each input
of the burst sleeps for half a second, so that waiting for a container is better than waiting for another input.
"""

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import psutil
from instance import running
from rich.console import Console
from rich.table import Table

COMMAND_TIMEOUT_S = 900
FUNCTIONS_PER_APP = 100
APP = """
import modal

app = modal.App("at-rest-{number}")

def make(n):
    def f(x):
        return x + n
    f.__name__ = f.__qualname__ = f"f{{n}}"
    return f

for n in range({count}):
    app.function(serialized=True, name=f"f{{n}}")(make(n))
"""
BURST = """
import json
import time

import modal

app = modal.App("burst")

@app.function(scaledown_window=2)
def begin(x):
    at = time.time()
    time.sleep(0.5)
    return at

@app.local_entrypoint()
def main(count: int):
    begun = time.time()
    waits = sorted(at - begun for at in begin.map(range(count), order_outputs=False))
    print(json.dumps({"p50": waits[len(waits) // 2], "first": waits[0], "last": waits[-1], "all": time.time() - begun}))
"""


def own_processes(data_dir: Path) -> list[psutil.Process]:
    """Front, server and worker."""
    records = json.loads((data_dir / "run/processes.json").read_bytes())
    return [psutil.Process(record["pid"]) for record in records if record["name"] in ("front", "server", "worker")]


def modal(environment: dict[str, str], folder: Path, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "modal", *args],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
    )
    if done.returncode:
        raise SystemExit(f"modal {shlex.join(args)} failed:\n{done.stdout[-3000:]}")
    return done.stdout


def used(processes: list[psutil.Process]) -> tuple[float, float]:
    """(processor seconds so far, memory in MB)"""
    seconds = sum(sum(process.cpu_times()[:2]) for process in processes)
    return seconds, sum(process.memory_info().rss for process in processes) / 1e6


def watch(data_dir: Path, seconds: float) -> tuple[float, float]:
    """(cores in use in percent of one, memory in MB)"""
    processes = own_processes(data_dir)
    before, _ = used(processes)
    time.sleep(seconds)
    after, memory = used(processes)
    return 100 * (after - before) / seconds, memory


@click.command()
@click.option("--functions", "num_functions", default=1000, show_default=True)
@click.option("--burst", default=200, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Of the burst.")
@click.option("--watch", "watch_s", default=20.0, show_default=True)
@click.option("--runtime", default="process", show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Keeps built images from one turn to the next.")
def main(num_functions: int, burst: int, rounds: int, watch_s: float, runtime: str, data_dir: Path | None) -> None:
    console = Console()
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="aeolian-at-rest-") as name:
        folder = Path(name)
        with running((data_dir or folder / "data").absolute(), runtime) as environment:
            home = (data_dir or folder / "data").absolute()
            (folder / "burst.py").write_text(BURST)
            console.print("an empty server")
            modal(environment, folder, "run", "burst.py", "--count", "1")
            time.sleep(5)
            cpu, memory = watch(home, watch_s)
            rows += [("empty: processor, % of a core", f"{cpu:.2f}"), ("empty: memory, MB", f"{memory:.0f}")]
            for number in range(-(-num_functions // FUNCTIONS_PER_APP)):
                count = min(FUNCTIONS_PER_APP, num_functions - number * FUNCTIONS_PER_APP)
                console.print(f"deploying App {number + 1}, of {count} Functions")
                (folder / "app.py").write_text(APP.format(number=number, count=count))
                modal(environment, folder, "deploy", "app.py")
            time.sleep(5)
            cpu, memory = watch(home, watch_s)
            rows += [
                (f"{num_functions:,} Functions at rest: processor, % of a core", f"{cpu:.2f}"),
                (f"{num_functions:,} Functions at rest: memory, MB", f"{memory:.0f}"),
            ]
            results = []
            for number in range(rounds):
                console.print(f"burst {number + 1} of {rounds}: {burst} inputs of 0.5 s")
                output = modal(environment, folder, "run", "burst.py", "--count", str(burst))
                results.append(json.loads(next(line for line in output.splitlines() if line.startswith("{"))))
                time.sleep(4)
            for key, what in (("first", "first input begun, s"), ("p50", "half begun, s"), ("last", "all begun, s")):
                value = statistics.median(result[key] for result in results)
                rows.append((f"burst of {burst}: {what}", f"{value:.2f}"))
    table = Table("", runtime, title="At rest, and in a burst")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
