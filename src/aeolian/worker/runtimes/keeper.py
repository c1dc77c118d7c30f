"""The parent of all native containers: starts them by crun, sees them end, and ends with its worker.

A process of its own beside the worker (`python -m …keeper CONFIG`), small and single-threaded, so forking is cheap::

    worker ==(one socket)==> keeper --+--> init: first process of the container's pid namespace, reaps its orphans
                                      +--> `crun create`, ends when all is prepared …
                                      `--> … the main process, which falls to the keeper and waits for its go

The main process is not the first of its namespace, so signals do to it what they do to any process. When it has ended
`init` is killed, and the kernel ends everything else in the namespace. When the worker dies the socket closes, and the
keeper ends all containers; when the keeper dies the kernel kills every `init`. No container outlives its worker.

Messages are JSON, one a packet::

    worker: {"start": id, "argv": [crun, …], "log": file, "pid_file": file, "go": fifo} + stdout, stderr (and stdin)
            {"assign": id, "rootfs": folder, "binds": [[source, target, read-only], …], "hostname": …, "oom_score_adj": n}
            {"signal": id, "number": n}   {"kill": id}
    keeper: {"ready": true}   {"started": id, "pid": n}   {"failed": id, "error": text}   {"exited": id, "code": n}
            {"assigned": id}   {"unassigned": id, "error": text}: a container that was started ahead (`standby.py`)
"""

import array
import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import sys
from pathlib import Path

from aeolian.worker import mounting
from aeolian.worker.cgroups import UNIFIED, CgroupKind, Cgroups
from aeolian.worker.runtimes import new_root, view

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 15, 4, 36
MAX_MESSAGE_BYTES = 1 << 16
MAX_ERROR_BYTES = 1000
CLEAR_TIMEOUT_S = 10.0


def main(kind: "type[Keeper] | None" = None) -> None:
    """The process of a keeper of this kind."""
    config = json.loads(sys.argv[1])
    os.set_inheritable(config["descriptor"], False)
    os.setsid()
    with open(config["lock"], "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a predecessor still ends its containers
        clear(config, with_mounts=config["is_first"])
        (kind or Keeper)(config, socket.socket(fileno=config["descriptor"])).run()
        clear(config, with_mounts=True)


def clear(config: dict, *, with_mounts: bool) -> None:
    """End and remove what a predecessor of this data directory left: processes, groups, crun's states, mounts.

    The mounts are the worker's: while it lives, only it takes them away.
    """
    cgroups = Cgroups()
    cgroups.kill(config["cgroup"], CLEAR_TIMEOUT_S)
    cgroups.remove(config["cgroup"])
    shutil.rmtree(config["state"], ignore_errors=True)
    if with_mounts:
        mounting.unmount_below(Path(config["containers"]))


class Kept:
    """One container: its processes, as this process numbers them."""

    def __init__(self, container_id: str, log: str, pid_file: str, go: str):
        self.id, self.log, self.pid_file, self.go = container_id, log, pid_file, go
        self.init: int | None = None
        self.crun: int | None = None
        self.main: int | None = None
        self.helper: int | None = None
        self.code: int | None = None
        self.is_killed = False


class Keeper:
    def __init__(self, config: dict, worker: socket.socket):
        self._worker = worker
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._mount_point = config["pid_namespace"]
        self._hides_unified = Cgroups().kind is CgroupKind.HYBRID
        self._kept: dict[str, Kept] = {}
        self._by_pid: dict[int, Kept] = {}

    def run(self) -> None:
        """Until the worker hangs up and all containers have ended."""
        view.prctl(PR_SET_CHILD_SUBREAPER, 1)
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        poll = select.poll()
        poll.register(wake_read, select.POLLIN)
        poll.register(self._worker, select.POLLIN)
        self._say({"ready": True})
        has_worker = True
        while has_worker or self._kept:
            for descriptor, _ in poll.poll():
                if descriptor == wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                    self._reap()
                elif not self._obey():
                    has_worker = False
                    poll.unregister(self._worker)
                    for kept in self._kept.values():
                        self._end(kept)

    # ---- what the worker says ---------------------------------------------------------------------------

    def _obey(self) -> bool:
        """One message; False when the worker has hung up."""
        numbers = array.array("i")
        try:
            data, ancillary, _, _ = self._worker.recvmsg(MAX_MESSAGE_BYTES, socket.CMSG_SPACE(3 * numbers.itemsize))
        except OSError:
            return False
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
        if not data:
            return False
        message = json.loads(data)
        if "start" in message:
            self._start(message, *numbers)
            for descriptor in numbers:
                os.close(descriptor)
        elif "assign" in message:
            self._assign(message)
        elif "signal" in message:
            kept = self._kept.get(message["signal"])
            if kept is not None and kept.main is not None and kept.code is None:
                self._signal(kept, message["number"])
        elif (kept := self._kept.get(message["kill"])) is not None:
            self._end(kept)
        return True

    def _signal(self, kept: Kept, number: int) -> None:
        if kept.main is not None:
            os.kill(kept.main, number)

    def _start(self, message: dict, stdout: int, stderr: int, stdin: int | None = None) -> None:
        kept = Kept(message["start"], message["log"], message["pid_file"], message["go"])
        self._kept[kept.id] = kept
        try:
            kept.init = self._fork_init()
            self._by_pid[kept.init] = kept
            kept.crun = self._fork_crun(message["argv"], kept.init, stdout, stderr, stdin)
            self._by_pid[kept.crun] = kept
        except OSError as error:
            self._failed(kept, str(error))

    def _fork_init(self) -> int:
        view.unshare(view.CLONE_NEWPID)
        try:
            pid = os.fork()
        finally:
            if os.getpid() != 1:
                view.setns(self._pid_namespace, view.CLONE_NEWPID)
        if pid == 0:
            become_init()
        return pid

    def _fork_crun(self, argv: list[str], init: int, stdout: int, stderr: int, stdin: int | None) -> int:
        pid = os.fork()
        if pid != 0:
            return pid
        try:
            view.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            # A namespace of its own, copied now: it holds the mounts of this container, and no longer than crun runs.
            view.unshare(view.CLONE_NEWNS)
            view.mount("none", "/", flags=view.MS_REC | view.MS_SLAVE)
            if self._hides_unified:
                view.mount("none", UNIFIED, "tmpfs")
            view.mount(f"/proc/{init}/ns/pid", self._mount_point, flags=view.MS_BIND)
            if stdin is None:
                stdin = os.open(os.devnull, os.O_RDONLY)
            for number, descriptor in enumerate((stdin, stdout, stderr)):
                os.dup2(descriptor, number)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            os.execvp(argv[0], argv)
        except OSError as error:
            os.write(2, f"{error}\n".encode())
        os._exit(127)

    def _assign(self, message: dict) -> None:
        kept = self._kept.get(message["assign"])
        if kept is None or kept.main is None or kept.code is not None or kept.is_killed:
            self._say({"unassigned": message["assign"], "error": "it has ended"})
            return
        try:
            kept.helper = self._fork_helper(message, kept)
        except OSError as error:
            self._say({"unassigned": kept.id, "error": str(error)})
            return
        self._by_pid[kept.helper] = kept

    def _fork_helper(self, message: dict, kept: Kept) -> int:
        """A process that enters the container's namespaces, and ends in them."""
        pid = os.fork()
        if pid != 0:
            return pid
        try:
            view.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            Path(f"/proc/{kept.main}/oom_score_adj").write_text(str(message["oom_score_adj"]))
            log = os.open(kept.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                new_root.give_root(kept.main, message["rootfs"], message["binds"], message["hostname"])
                os._exit(0)
            except OSError as error:
                os.write(log, f"{error}\n".encode())
        finally:
            os._exit(1)

    # ---- what ends ----------------------------------------------------------------------------------------

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            kept = self._by_pid.pop(pid, None)
            if kept is None:
                continue
            self._ended(kept, pid, code)

    def _ended(self, kept: Kept, pid: int, code: int) -> None:
        """One of a container's processes."""
        if pid == kept.crun:
            kept.crun = None
            self._created(kept, code)
        elif pid == kept.helper:
            kept.helper = None
            error = last_words(kept.log) or f"its helper ended with {code}"
            self._say({"unassigned": kept.id, "error": error} if code else {"assigned": kept.id})
            self._finish(kept)
        elif pid == kept.main:
            kept.code = code
            self._end(kept)
        else:
            kept.init = None
            self._init_ended(kept)

    def _created(self, kept: Kept, code: int) -> None:
        """crun has ended: the main process waits for its go."""
        try:
            pid = int(Path(kept.pid_file).read_text()) if code == 0 else 0
        except (OSError, ValueError):
            pid = 0
        if pid == 0:
            self._failed(kept, last_words(kept.log) or f"crun ended with {code}")
            return
        kept.main = pid
        self._by_pid[pid] = kept
        if kept.is_killed or kept.init is None:
            self._end(kept)
        try:
            # What `crun start` does, without the time that another process takes.
            descriptor = os.open(kept.go, os.O_WRONLY | os.O_NONBLOCK)
            os.write(descriptor, b" ")
            os.close(descriptor)
        except OSError as error:
            self._failed(kept, f"crun left no process that waits at {kept.go}: {error.strerror}")
            return
        self._say({"started": kept.id, "pid": pid})

    def _failed(self, kept: Kept, error: str) -> None:
        self._say({"failed": kept.id, "error": error})
        if kept.main is None:
            kept.code = 127
        self._end(kept)
        self._finish(kept)

    def _end(self, kept: Kept) -> None:
        """Kill `init`, and with it everything in the namespace: the main process, or what crun is just making."""
        kept.is_killed = True
        for pid in (kept.init, kept.crun, kept.helper, kept.main if kept.code is None else None):
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _init_ended(self, kept: Kept) -> None:
        """Its namespace is empty, but for a main process that this one reaps itself."""
        if kept.code is None:
            self._end(kept)
        self._finish(kept)

    def _finish(self, kept: Kept) -> None:
        if kept.code is not None and kept.init is None and kept.crun is None and kept.helper is None:
            del self._kept[kept.id]
            self._say({"exited": kept.id, "code": kept.code})

    def _say(self, message: dict) -> None:
        with contextlib.suppress(OSError):
            self._worker.send(json.dumps(message).encode())


def become_init() -> None:
    """The first process of a container's pid namespace. Never returns.

    The container can see its name, and nothing else: it has capabilities that the container lacks.
    """
    try:
        view.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans are reaped by the kernel
        os.closerange(0, max(map(int, os.listdir("/proc/thread-self/fd"))) + 1)
        rename(b"init")
        view.prctl(PR_SET_DUMPABLE, 0)
        while True:
            signal.pause()
    finally:
        os._exit(1)


def rename(name: bytes) -> None:
    """What `ps` shows: the arguments in memory are overwritten, see proc(5)."""
    fields = Path("/proc/thread-self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    if 0 < start < end:
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, name, min(len(name), end - start - 1))
    buffer = ctypes.create_string_buffer(name)
    ctypes.CDLL(None).prctl(PR_SET_NAME, buffer, 0, 0, 0)


def last_words(log: str) -> str:
    """crun's own complaint."""
    with contextlib.suppress(OSError):
        lines = Path(log).read_bytes()[-MAX_ERROR_BYTES:].decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""
    return ""


if __name__ == "__main__":
    main()
