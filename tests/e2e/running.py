"""A running Aeolian and its users: the official client's CLI and programs, each a process of its own."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

AEOLIAN = shlex.split(os.environ.get("AEOLIAN_COMMAND", f"{sys.executable} -m aeolian.cli.main"))
"""The command under test: another installation can be named by AEOLIAN_COMMAND."""
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 90.0


class RunningAeolian:
    """One `aeolian up` on a data directory, started and stopped as its operator would."""

    def __init__(self, data_dir: Path, runtime: str = "process", *options: str):
        self.data_dir = data_dir
        self.runtime = runtime
        self._options = options
        self._process: subprocess.Popen | None = None
        self.log = data_dir.with_name(f"{data_dir.name}-{runtime}.log")

    def start(self) -> "RunningAeolian":
        """Returns when it answers."""
        ports = ("--grpc-port", "0", "--http-port", "0") if not self._options else self._options
        with self.log.open("ab") as log:
            started_at = log.tell()
            self._process = subprocess.Popen(
                [*AEOLIAN, "up", "--data-dir", str(self.data_dir), "--runtime", self.runtime, *ports],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + READY_TIMEOUT_S
        while b"is ready" not in self.log.read_bytes()[started_at:]:
            if self._process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"aeolian up does not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)
        return self

    def stop(self) -> None:
        """Ctrl-C."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._process = None

    def interrupt(self) -> None:
        """Ctrl-C, and no waiting."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Until it has ended; its exit status."""
        assert self._process is not None
        status = self._process.wait(timeout_s)
        self._process = None
        return status

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        assert self._process is not None
        return self._process.pid

    def pid_of(self, name: str) -> int:
        """`front`, `server` or `worker`."""
        records = msgspec.json.decode((self.data_dir / "run/processes.json").read_bytes())
        return next(record["pid"] for record in records if record["name"] == name)

    def memory_mib(self) -> int:
        """What its own processes hold."""
        return sum(psutil.Process(self.pid_of(name)).memory_info().rss for name in ("front", "server", "worker")) >> 20

    def kill(self, name: str) -> None:
        """As an out-of-memory killer would."""
        os.kill(self.pid_of(name), signal.SIGKILL)

    @property
    def environment(self) -> dict[str, str]:
        """What `aeolian connect --print-env` prints, over this process's own environment."""
        lines = subprocess.run(
            [*AEOLIAN, "connect", "--data-dir", str(self.data_dir), "--print-env"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        pairs = (shlex.split(line.removeprefix("export "))[0].split("=", 1) for line in lines)
        own = {name: value for name, value in os.environ.items() if not name.startswith("MODAL_")}
        return {**own, "MODAL_CONFIG_PATH": "/dev/null", "COLUMNS": "200", "NO_COLOR": "1", **dict(pairs)}

    def run(
        self, *argv: str, cwd: Path | None = None, ok: bool = True, timeout_s: float = 240, env: dict | None = None
    ) -> str:
        """Run a command as a user of this server; returns everything that it printed."""
        done = subprocess.run(
            argv,
            cwd=cwd,
            env={**self.environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert (done.returncode == 0) == ok, f"{shlex.join(argv)} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def start_command(self, *argv: str, cwd: Path | None = None) -> subprocess.Popen:
        """As `run`, not waiting for its end. The caller ends it."""
        return subprocess.Popen(
            argv,
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def modal(self, *args: str, **kwargs) -> str:
        """The official CLI."""
        return self.run(sys.executable, "-m", "modal", *args, **kwargs)

    def modal_session(
        self, *steps: tuple[str, str], cwd: Path | None = None, timeout_s: float = 240, env: dict | None = None
    ) -> list[str]:
        """Commands of the official CLI, one after another in one process; returns what each printed.

        A step is a command line (after "! ": one that must fail) and a text that must be in what it prints.
        """
        lines = [line.removeprefix("! ") for line, _ in steps]
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("modal_commands.py"))],
            cwd=cwd,
            env={**self.environment, **(env or {})},
            input=json.dumps([shlex.split(line) for line in lines]),
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout_s,
            check=True,
        )
        printed = []
        for (line, expected), (status, output) in zip(steps, json.loads(done.stdout), strict=True):
            must_fail = line.startswith("! ")
            assert (status != 0) == must_fail, f"modal {line} ended with {status}:\n{output}"
            assert expected in output, f"modal {line} printed no {expected!r}:\n{output}"
            printed.append(output)
        return printed

    def modal_json(self, *args: str, **kwargs):
        return json.loads(self.modal(*args, "--json", **kwargs))

    def python(self, source: str, folder: Path, name: str = "program.py", args: Sequence[str] = (), **kwargs) -> str:
        """A user's own program."""
        (folder / name).write_text(textwrap.dedent(source))
        return self.run(sys.executable, name, *args, cwd=folder, **kwargs)

    def run_app(self, source: str, folder: Path, *args: str, name: str = "user_app.py", **kwargs) -> str:
        """`modal run` of an App with a local entrypoint."""
        (folder / name).write_text(textwrap.dedent(source))
        return self.modal("run", name, *args, cwd=folder, **kwargs)

    def deploy(self, source: str, folder: Path, name: str = "user_app.py", **kwargs) -> str:
        (folder / name).write_text(textwrap.dedent(source))
        return self.modal("deploy", name, cwd=folder, **kwargs)


def runtimes() -> list[str]:
    """The runtimes that this host offers, or those of AEOLIAN_TEST_RUNTIMES=process,native,gvisor.

    `gvisor` only runs when it is named there: it takes longer.
    """
    offered = ["process"]
    if sys.platform == "linux" and os.getuid() == 0 and shutil.which("crun"):
        offered.insert(0, "native")
        offered.insert(1, "gvisor")
    wanted = os.environ.get("AEOLIAN_TEST_RUNTIMES", "process,native").split(",")
    return [name for name in offered if name in wanted]
