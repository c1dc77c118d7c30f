"""The program `runsc`: where it is, and how it is told what all of our containers need."""

import shutil
import sys
from pathlib import Path

RUNSC = "runsc"
RUN_LOG = "run.log"
"""In the bundle: how the container's main process ended, exactly (`runsc`'s own exit code does not tell all)."""
ERROR_LOG = "errors.log"


def find_runsc() -> str | None:
    """The one that `make setup` put beside this Python, else the machine's own."""
    beside = Path(sys.prefix) / "bin" / RUNSC
    return str(beside) if beside.is_file() else shutil.which(RUNSC)


def runsc_command(program: str, state: Path) -> list[str]:
    """Every call names the folder of states; options of the subcommand follow."""
    return [program, f"--root={state}"]


def run_command(program: str, state: Path, bundle: Path, container_id: str) -> list[str]:
    """Start a container, and stay as long as it lives."""
    return [
        *runsc_command(program, state),
        # The Linux network stack of the container's network namespace: what listens on its loopback, as the relay to
        # the gateway does, is reached from inside, and the worker reaches what listens inside.
        "--network=host",
        "--platform=systrap",
        "--overlay2=none",  # what is written goes to the container's own upper folder
        "--host-uds=open",  # the worker's socket
        "--dcache=0",  # a file that is closed inside is closed outside, so that its Volume can be reloaded
        "--cpu-num-from-quota",
        f"--log={bundle / ERROR_LOG}",
        f"--debug-log={bundle}/%COMMAND%.log",  # without --debug: a few lines
        "run",
        f"--bundle={bundle}",
        container_id,
    ]
