"""Commands in running containers: what is asked of the worker that holds the container, and what it answers.

Each request is safe to repeat: a command has an id of its client's making, and output and input are counted in bytes
from their beginning. Waits are short: who wants to wait longer asks again.
"""

import msgspec

from aeolian.domain import errors


class TerminalSize(msgspec.Struct, frozen=True):
    rows: int = 24
    columns: int = 80


class Command(msgspec.Struct, frozen=True):
    """What runs inside, beside the container's own processes."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    """On top of the container's own variables."""
    cwd: str = ""
    """"" = the container's own."""
    terminal: TerminalSize | None = None
    """None: three pipes; else it has a terminal, whose output is all on stdout."""


# ---- requests --------------------------------------------------------------------------------------------


class StartExec(msgspec.Struct, frozen=True, tag="start"):
    """Start a command; the second time: nothing."""

    exec_id: str
    command: Command
    keeps_stdout: bool = True
    keeps_stderr: bool = True
    joins_stderr: bool = False
    """stderr goes where stdout goes."""
    timeout_s: float = 0.0
    """After so long it is killed; 0: never."""
    unattended_s: float = 0.0
    """Whose terminal nobody looks at for so long, it is ended; 0: never."""


class ReadExec(msgspec.Struct, frozen=True, tag="read"):
    """Output (fd 1 or 2) from this byte on: as soon as there is any, or it is over, or `wait_s` have passed."""

    exec_id: str
    fd: int
    offset: int
    wait_s: float


class WriteExec(msgspec.Struct, frozen=True, tag="write"):
    """Input. What was written before is skipped; the answer says how far it came within `wait_s`."""

    exec_id: str
    offset: int
    data: bytes
    is_last: bool
    wait_s: float


class AskStdin(msgspec.Struct, frozen=True, tag="stdin"):
    exec_id: str


class AwaitExec(msgspec.Struct, frozen=True, tag="await"):
    """How it ended, if it does within `wait_s`."""

    exec_id: str
    wait_s: float


class ReloadVolumes(msgspec.Struct, frozen=True, tag="reload"):
    """Show the container what others have committed to its Volumes."""


Request = StartExec | ReadExec | WriteExec | AskStdin | AwaitExec | ReloadVolumes

# ---- answers ---------------------------------------------------------------------------------------------


class Done(msgspec.Struct, frozen=True, tag="done"):
    """To StartExec and ReloadVolumes."""


class Output(msgspec.Struct, frozen=True, tag="output"):
    """To ReadExec. Empty, and not over: nothing came meanwhile."""

    data: bytes
    is_over: bool


class Stdin(msgspec.Struct, frozen=True, tag="stdin"):
    """To WriteExec and AskStdin."""

    num_bytes: int
    is_closed: bool


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """To AwaitExec: the exit status, negative for a signal; None: it still runs."""

    exit_code: int | None


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """An error of `domain.errors`, by the name of its type."""

    kind: str
    message: str

    def error(self) -> errors.AeolianError:
        kind = getattr(errors, self.kind, errors.AeolianError)
        return kind(self.message)


def refused(error: errors.AeolianError) -> Refused:
    return Refused(type(error).__name__, error.message)


Answer = Done | Output | Stdin | Ended | Refused
