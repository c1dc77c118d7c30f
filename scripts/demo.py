"""Starts Aeolian on a data directory of its own, runs a real app on it by the official client, and takes it all away.

make demo
.venv/bin/python scripts/demo.py --runtime process
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape

from aeolian.worker.images.machine_cache import default_cache_folder
from aeolian.worker.images.overlay_files import remove_tree

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
EXAMPLE = "examples/code_search.py"
PLACE = Path("/var/tmp")
"""Where the data directory is made: for much data, and on a disk where /tmp is memory."""
START_S = 60.0
STOP_S = 90.0

console = Console(highlight=False)


class Failed(Exception):
    """A step of the demo went wrong; the message says which and how."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime", default="auto", help="what containers run in: auto, native or process")
    runtime = parser.parse_args().runtime
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="aeolian-demo-", dir=PLACE if PLACE.is_dir() else None))
    try:
        status = demonstrate(folder, runtime)
    except Failed as failure:
        console.print(f"\n[bold red]The demo failed:[/] {escape(str(failure))}", soft_wrap=True)
        status = 1
    except KeyboardInterrupt:
        console.print("\nInterrupted.")
        status = 130
    finally:
        remove_tree(folder)
    if left := leftovers(folder):
        console.print("\n[bold red]Something is left behind:[/]")
        for line in left:
            console.print(f"  {escape(line)}", soft_wrap=True)
        return 1
    console.print("No process, mount or file is left.")
    if status == 0:
        console.print(f"\n[bold green]Done[/] in {time.monotonic() - began:.0f} s. Next: docs/getting-started.md")
    return status


def demonstrate(folder: Path, runtime: str) -> int:
    with running(folder, runtime) as environment:
        step("A real app, by the official client: an index of Python's standard library, and searches")
        run(environment, "modal", "run", EXAMPLE)
        step("What ran, and what the start of each container cost")
        run(environment, "aeolian", "status", "--data-dir", str(folder), "--starts", "30")
        step("Stopping")
    return 0


@contextlib.contextmanager
def running(folder: Path, runtime: str) -> Iterator[dict[str, str]]:
    """A started Aeolian; yields the environment in which the official client uses it."""
    step("Starting Aeolian")
    options = ("--grpc-port", "0", "--http-port", "0", "--runtime", runtime)
    command = ["aeolian", "up", "--data-dir", str(folder), *options]
    show(command)
    environment = dict(os.environ)
    if not default_cache_folder().exists():  # an installation's own is used, but none is left behind
        environment["XDG_CACHE_HOME"] = str(folder / "cache")
    process = subprocess.Popen(
        [BIN / command[0], *command[1:]],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for the demo alone, which then stops it
    )
    output = Output(process)
    try:
        output.wait_until_ready()
        yield client_environment(folder)
    finally:
        stop(process)
        output.close()
    if process.returncode != 0:
        raise Failed(f"Aeolian ended with status {process.returncode}\n{output.text()}")


def stop(process: subprocess.Popen[str]) -> None:
    """As Ctrl-C does it; another Ctrl-C is passed on, and ends it at once."""
    until = time.monotonic() + STOP_S
    process.send_signal(signal.SIGINT)
    while True:
        try:
            process.wait(until - time.monotonic())
            return
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed(f"Aeolian did not stop within {STOP_S:g} s") from None


class Output:
    """What a process has said so far, and whether it has said that it is ready."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process
        self._lines: list[str] = []
        self._settled = threading.Event()
        self._is_ready = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Show what it says until it is ready. Raises Failed."""
        began = time.monotonic()
        with console.status("starting"):
            self._settled.wait(START_S)
        if not self._is_ready:
            raise Failed(f"`aeolian up` was not ready after {time.monotonic() - began:.0f} s:\n{self.text()}")
        console.print(f"[dim]{escape(self.text())}[/]", soft_wrap=True)
        console.print(f"Ready in {time.monotonic() - began:.1f} s.")

    def text(self) -> str:
        return "\n".join(line for line in self._lines if line)

    def close(self) -> None:
        self._thread.join(5)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.rstrip())
            if "is ready" in line:
                self._is_ready = True
                self._settled.set()
        self._settled.set()


def client_environment(folder: Path) -> dict[str, str]:
    """This process's environment, with what `aeolian connect` says instead of any profile of the user's."""
    command = ["aeolian", "connect", "--data-dir", str(folder), "--print-env"]
    console.print()
    show(["eval", f"$({shlex.join(command)})"], quote=False)
    printed = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True, check=True).stdout
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODAL_")}
    environment["MODAL_CONFIG_PATH"] = str(folder / "no-profiles.toml")
    for line in printed.splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        environment[name] = shlex.split(value)[0]
    return environment


def run(environment: dict[str, str], *command: str) -> None:
    """Run a command that writes to this terminal. Raises Failed."""
    show(command)
    status = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, env=environment).returncode
    if status != 0:
        raise Failed(f"`{shlex.join(command)}` ended with status {status}")


def leftovers(folder: Path) -> list[str]:
    """Processes that name the folder, mounts below it, and the folder itself."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if str(folder) in " ".join(process.info["cmdline"] or ()):
            found.append(f"process {process.info['pid']}: {shlex.join(process.info['cmdline'])}")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if str(folder) in line:
            found.append(f"mount {line}")
    if folder.exists():
        found.append(f"folder {folder}")
    return found


def step(title: str) -> None:
    console.print(f"\n[bold cyan]── {title}[/]")


def show(command: list[str] | tuple[str, ...], *, quote: bool = True) -> None:
    text = shlex.join(command) if quote else f'{command[0]} "{command[1]}"'
    console.print(f"[bold]$[/] {escape(text)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
