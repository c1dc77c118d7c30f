"""Web functions and servers: what Aeolian adds to the same application served by uvicorn alone. Prints one table.

    python benchmarks/web.py [--runtime native] [--rate 100] [--seconds 10] [--data-dir DIR]

Latency is measured at a fixed rate of requests, whose times are planned: a slow answer delays no later request.
Throughput is what 32 clients get who ask again at once. Rounds are interleaved.
"""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import click
from instance import running
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
READY_TIMEOUT_S = 120
NUM_CLIENTS = 32


@contextlib.contextmanager
def uvicorn() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "web_app:hello", "--port", str(port), "--no-access-log"]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def aeolian(data_dir: Path, runtime: str) -> Iterator[dict[str, str]]:
    """The URLs of the web functions of `web_app.py`, by their names."""
    with running(data_dir, runtime) as environment:
        deploy = [sys.executable, "-m", "modal", "deploy", "web_app.py"]
        printed = subprocess.run(deploy, cwd=HERE, check=True, capture_output=True, text=True, env=environment).stdout
        yield dict(re.findall(r"Created (?:Function|Server) (\w+)\W*?(https?://[\d.:]+)", printed))


def wait_for(port: int) -> None:
    until = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit("uvicorn does not start")


async def ask(session: aiohttp.ClientSession, url: str) -> None:
    async with session.get(url) as reply:
        body = await reply.read()
        assert (reply.status, body) == (200, b"hello"), f"{url}: {reply.status} {body!r}"


async def latencies(url: str, rate: float, seconds: float) -> list[float]:
    """Milliseconds from the planned time of each request to the end of its answer, in order."""
    found: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session, asyncio.TaskGroup() as group:
        for _ in range(20):
            await ask(session, url)
        loop = asyncio.get_running_loop()
        begin = loop.time()

        async def one(planned: float) -> None:
            await ask(session, url)
            found.append(1000 * (loop.time() - planned))

        for number in range(int(rate * seconds)):
            planned = begin + number / rate
            await asyncio.sleep(max(0.0, planned - loop.time()))
            group.create_task(one(planned))
    return sorted(found)


async def throughput(url: str, seconds: float) -> float:
    """Requests per second."""
    count = 0
    async with aiohttp.ClientSession() as session:
        until = time.monotonic() + seconds

        async def client() -> None:
            nonlocal count
            while time.monotonic() < until:
                await ask(session, url)
                count += 1

        await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    return count / seconds


@click.command()
@click.option("--runtime", default="process", show_default=True)
@click.option("--rate", default=100.0, show_default=True, help="Requests per second for the latencies.")
@click.option("--seconds", default=10.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=1, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Keeps the image from one turn to the next.")
def main(runtime: str, rate: float, seconds: float, rounds: int, data_dir: Path | None) -> None:
    folder = Path(tempfile.mkdtemp(prefix="aeolian-web-"))
    try:
        with uvicorn() as alone, aeolian(data_dir or folder / "data", runtime) as functions:
            urls = {"uvicorn alone": alone} | {f"{name} ({runtime})": url for name, url in functions.items()}
            results: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in urls}
            for _ in range(rounds):
                for name, url in urls.items():
                    results[name][0].extend(asyncio.run(latencies(url, rate, seconds)))
                    results[name][1].append(asyncio.run(throughput(url, seconds)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = Table(
        title=f"{rate:g} requests/s for {seconds:g} s; throughput with {NUM_CLIENTS} clients; {os.cpu_count()} cores"
    )
    for column in ("", "p50 ms", "p99 ms", "added p50 ms", "added p99 ms", "requests/s"):
        table.add_column(column, justify="right" if column else "left")
    floor = None
    for name, (found, rates) in results.items():
        found.sort()
        p50, p99 = found[len(found) // 2], found[int(len(found) * 0.99)]
        floor = floor or (p50, p99)
        added = (
            (f"{p50 - floor[0]:.2f}", f"{p99 - floor[1]:.2f}") if found is not results["uvicorn alone"][0] else ("", "")
        )
        table.add_row(name, f"{p50:.2f}", f"{p99:.2f}", *added, f"{max(rates):,.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
