"""What a runtime costs: the same work in containers of `gvisor` and of `native`. Prints one table.

Run as root where both can be had. Times are taken inside the containers, medians over rounds.

    python benchmarks/runtimes.py [--rounds 3] [--data-dir DIR]
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from instance import running
from rich.console import Console
from rich.table import Table

APP = """
import hashlib
import json
import os
import time

import modal

app = modal.App("runtimes-benchmark")


def timed(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def system_calls():
    for _ in range(20_000):
        os.stat("/etc/passwd")


def small_files():
    for number in range(500):
        with open(f"/root/{number}", "w") as file:
            file.write("x" * 1000)
    for number in range(500):
        os.remove(f"/root/{number}")


def processes():
    for _ in range(50):
        if (pid := os.fork()) == 0:
            os._exit(0)
        os.waitpid(pid, 0)


def computing():
    digest = b"x"
    for _ in range(500_000):
        digest = hashlib.sha256(digest).digest()


def measured():
    return {work.__name__: timed(work) for work in (system_calls, small_files, processes, computing)}


@app.function(experimental_options={"runtime": "gvisor"})
def in_gvisor():
    return measured()


@app.function(experimental_options={"runtime": "native"})
def in_native():
    return measured()


@app.local_entrypoint()
def main(rounds: int):
    found = {"gvisor": [], "native": []}
    for _ in range(rounds):
        for name, function in (("gvisor", in_gvisor), ("native", in_native)):
            found[name].append(function.remote())
    print(json.dumps(found))
"""
WORDS = {
    "system_calls": "20,000 stat calls",
    "small_files": "500 files written and removed",
    "processes": "50 forks",
    "computing": "500,000 SHA-256",
}


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Keeps built images from one run to the next.")
def main(rounds: int, data_dir: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "app.py").write_text(APP)
        place = data_dir or Path(folder) / "data"
        with running(place, "native") as environment:
            said = subprocess.run(
                [sys.executable, "-m", "modal", "run", "app.py", "--rounds", str(rounds)],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
            )
    lines = [line for line in said.stdout.splitlines() if line.startswith("{")]
    if said.returncode or not lines:
        raise SystemExit(said.stdout[-2000:] + said.stderr[-2000:])
    _print(json.loads(lines[-1]))


def _print(found: dict[str, list[dict[str, float]]]) -> None:
    table = Table("work", "native, ms", "gvisor, ms", "times", title="Runtimes")
    for name, words in WORDS.items():
        native, gvisor = (statistics.median(it[name] for it in found[runtime]) for runtime in ("native", "gvisor"))
        table.add_row(words, f"{1000 * native:.1f}", f"{1000 * gvisor:.1f}", f"{gvisor / native:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
