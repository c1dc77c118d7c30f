"""The parent of all gVisor containers: as `keeper.py` for native ones, with `runsc` in the place of crun.

A process of its own beside the worker (`python -m …gvisor_keeper CONFIG`)::

    worker ==(one socket)==> keeper --+--> `runsc run`: lives as long as its container, and ends as it does
                                      |      `--> sandbox and gofer: the kernel kills them when `runsc run` dies
                                      +--> `runsc kill`: for each signal
                                      `--> sweeper: when `runsc run` has ended, until the container's cgroup is empty

When the worker dies the keeper kills each `runsc run`; when the keeper dies the kernel does.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time

from aeolian.worker.cgroups import Cgroups
from aeolian.worker.runtimes import view
from aeolian.worker.runtimes.keeper import PR_SET_PDEATHSIG, Keeper, Kept, main

SWEEP_TIMEOUT_S = 10.0
NUM_SIGNAL_TRIES = 50
SIGNAL_PAUSE_S = 0.1
"""A container that is still starting cannot be signalled yet."""


class Sandbox(Kept):
    """One container. `main` is its `runsc run`, `sweeper` what comes after."""

    def __init__(self, container_id: str, cgroup: str):
        super().__init__(container_id, "", "", "")
        self.cgroup = cgroup
        self.sweeper: int | None = None


class SandboxKeeper(Keeper):
    """A `start` message holds `argv` (runsc's), `cgroup` and `read_only`, and brings both outputs.

    `read_only`: files and folders, and for each the place where runsc finds it. The kernel keeps them from being
    written to: gVisor itself does not keep a container from emptying a file by O_TRUNC.
    """

    def __init__(self, config: dict, worker: socket.socket):
        super().__init__(config, worker)
        self._runsc = config["runsc"]

    def _signal(self, kept: Kept, number: int) -> None:
        pid = os.fork()
        if pid == 0:
            self._send_signal(kept.id, number)

    def _start(self, message: dict, stdout: int, stderr: int, stdin: int | None = None) -> None:
        kept = Sandbox(message["start"], message["cgroup"])
        self._kept[kept.id] = kept
        try:
            kept.main = self._fork_runsc(message, stdout, stderr)
        except OSError as error:
            self._failed(kept, str(error))
            return
        self._by_pid[kept.main] = kept
        self._say({"started": kept.id, "pid": kept.main})

    def _fork_runsc(self, message: dict, stdout: int, stderr: int) -> int:
        argv = message["argv"]
        pid = os.fork()
        if pid != 0:
            return pid
        try:
            view.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            # A namespace of its own, copied now: it holds the mounts of this container, and no longer than it runs.
            view.unshare(view.CLONE_NEWNS)
            view.mount("none", "/", flags=view.MS_REC | view.MS_SLAVE)
            for source, place in message["read_only"]:
                view.mount(source, place, flags=view.MS_BIND | view.MS_REC)
                view.make_read_only(place)
            null = os.open(os.devnull, os.O_RDONLY)
            for number, descriptor in enumerate((null, stdout, stderr)):
                os.dup2(descriptor, number)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            os.execvp(argv[0], argv)
        except OSError as error:
            os.write(2, f"{error}\n".encode())
        os._exit(127)

    def _send_signal(self, container_id: str, number: int) -> None:
        """In a process of its own, which ends with it."""
        argv = [*self._runsc, "kill", container_id, str(number)]
        with contextlib.suppress(OSError):
            own_process()
            for _ in range(NUM_SIGNAL_TRIES):
                if subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 0:
                    break
                time.sleep(SIGNAL_PAUSE_S)
        os._exit(0)

    def _ended(self, kept: Kept, pid: int, code: int) -> None:
        assert isinstance(kept, Sandbox)
        if pid == kept.main:
            kept.code = code
            kept.sweeper = self._fork_sweeper(kept.cgroup)
            self._by_pid[kept.sweeper] = kept
        else:
            kept.sweeper = None
            self._finish(kept)

    def _fork_sweeper(self, cgroup: str) -> int:
        """Ends when nothing of the container is left."""
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(OSError):
                own_process()
                Cgroups().kill(cgroup, SWEEP_TIMEOUT_S)
            os._exit(0)
        return pid


def own_process() -> None:
    """Of a fork: it ends with its parent, whose signals are not its own."""
    view.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


if __name__ == "__main__":
    main(SandboxKeeper)
