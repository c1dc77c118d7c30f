"""The fork server: a Python that has the SDK imported and forks itself into containers.

A script of its own, run by the image's interpreter (3.9 and newer), so it imports only the standard library,
what lies beside it, and the SDK::

    worker --(one byte + 3 descriptors)--> zygote --fork--> init --fork--> main process (the SDK's entrypoint)
       ^------------ "started", "exited" ---- control socket ---'

`init` lives as long as the container: it builds the container's view, forks the main process, passes signals
on and reports how the main process ended. It is the first process of a pid namespace where the host allows
that, so its end takes every process of the container along; elsewhere it kills its descendants itself. When
the worker dies its control sockets close, and every `init` ends its container.

The zygote must stay single-threaded and never open a connection: what it imports is forked as it is.
"""

import array
import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import preloaded
import view

del sys.path[0], sys.modules["view"], sys.modules["preloaded"]  # user code may have modules of these names

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
MAX_REQUEST_BYTES = 64 << 20
KILL_WAIT_S = 5.0


def main():
    """`zygote.py CONFIG`: enter the view, then become the image's interpreter. `zygote.py CONFIG serve`: serve."""
    config = json.loads(sys.argv[1])
    if sys.platform == "linux":
        view.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != config["worker_pid"]:
            sys.exit("the worker is gone")
    if sys.argv[2:] == ["serve"]:
        return serve(config)
    script = os.path.abspath(__file__)
    if config["view"] is not None:
        view.enter_namespaces(config["view"]["user_namespace"])
        view.enter(config["view"], keep_host=True)
        script = view.HOST + script
    os.execve(config["python"], [config["python"], "-u", script, sys.argv[1], "serve"], config["env"])


# ---- the zygote ---------------------------------------------------------------------------------------------


def serve(config):
    """Import, say so, then fork one container per request until the worker hangs up. Returns a main process's job."""
    server = socket.socket(fileno=config["descriptor"])
    zygote_pythonpath = os.environ.get("PYTHONPATH", "").split(":")
    base_path = [entry for entry in sys.path if entry not in zygote_pythonpath and entry != os.path.dirname(__file__)]
    sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(__file__)]
    entry, reason = preloaded.preload() if config["preload"] else (None, "no SDK was asked for")
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel; `init` itself reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server.sendall(json.dumps({"ready": True, "preloaded": entry is not None, "reason": reason}).encode() + b"\n")
    namespaces = view.PidNamespaces(config["own_pids"])
    while True:
        descriptors = receive_descriptors(server)
        if descriptors is None:
            return None
        with namespaces:
            pid = os.fork()
        if pid == 0:
            server.close()
            return init(*descriptors, entry, base_path, config["own_pids"])
        for descriptor in descriptors:
            os.close(descriptor)
        server.sendall(pid.to_bytes(4, "little"))


def receive_descriptors(server):
    """The stdout, stderr and control socket of one container to fork; None when the worker has hung up."""
    numbers = array.array("i")
    data, ancillary, _, _ = server.recvmsg(1, socket.CMSG_SPACE(3 * numbers.itemsize))
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
    return tuple(numbers) if data and len(numbers) == 3 else None


# ---- init: the first process of a container -------------------------------------------------------------------


def init(stdout, stderr, control, entry, base_path, own_pids):
    """Build the view and fork the main process. Returns only in the main process, with its job."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    control = socket.socket(fileno=control)
    lines = Lines(control)
    try:
        request = lines.wait()
        if request is None:
            os._exit(0)
        if sys.platform == "linux":
            view.prctl(PR_SET_PDEATHSIG, 0)
            view.prctl(PR_SET_CHILD_SUBREAPER, 1)
        if request["network"]:
            enter_network(request["network"], host=view.HOST if request["view"] is not None else "")
        if request["view"] is not None:
            view.unshare(view.CLONE_NEWNS)
            view.enter(request["view"], host=view.HOST, own_pids=own_pids)
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        pid = os.fork()
    except BaseException as error:
        with contextlib.suppress(OSError):
            control.sendall(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        os._exit(1)
    if pid == 0:
        signal.set_wakeup_fd(-1)
        become_main(stdout, stderr)
        return Job(request, entry, base_path)
    os.close(stdout)
    os.close(stderr)
    Supervisor(control, lines, wake_read, pid, own_pids).run()


def enter_network(path, host):
    """Leave the host's network for the namespace at `path`; `host`: where the host's root is seen now."""
    descriptor = os.open(host + path, os.O_RDONLY | os.O_CLOEXEC)
    view.setns(descriptor, view.CLONE_NEWNET)
    os.close(descriptor)


class Lines:
    """JSON messages, one a line, off the control socket."""

    def __init__(self, control):
        self._control = control
        self._buffer = b""

    def wait(self):
        """The next message; None when the worker has hung up."""
        while b"\n" not in self._buffer:
            chunk = self._control.recv(1 << 16)
            if not chunk or len(self._buffer) > MAX_REQUEST_BYTES:
                return None
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    @property
    def has_more(self):
        return b"\n" in self._buffer


class Supervisor:
    def __init__(self, control, lines, wake, pid, own_pids):
        self._control, self._lines, self._wake = control, lines, wake
        self._pid, self._own_pids = pid, own_pids

    def run(self):
        """Until the main process has ended or the worker asks for the end; never returns."""
        self._tell({"started": True})
        poll = select.poll()
        poll.register(self._control.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._wake:
                    os.read(self._wake, 4096)
                    self._reap()
                else:
                    self._obey()

    def _obey(self):
        while True:
            message = self._lines.wait()
            if message is None or "kill" in message:
                self._end(-signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, message["signal"])
            if not self._lines.has_more:
                return

    def _reap(self):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self._end(os.waitstatus_to_exitcode(status))

    def _end(self, exit_code):
        """Nothing of the container outlives its main process."""
        self._tell({"exited": exit_code})
        if not self._own_pids:
            kill_descendants(self._pid)
        os._exit(0)

    def _tell(self, message):
        with contextlib.suppress(OSError):
            self._control.sendall(json.dumps(message).encode() + b"\n")


def kill_descendants(group):
    """SIGKILL to all processes below this one. As their reaper we see also those that left their parents."""
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
    ends_at = time.monotonic() + KILL_WAIT_S
    while time.monotonic() < ends_at:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        living = descendants(os.getpid())
        if not living:
            return
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def descendants(root):
    children = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat") as stream:
                parent = int(stream.read().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


# ---- the main process -------------------------------------------------------------------------------------------


def become_main(stdout, stderr):
    """Standard streams, session and signals as a process has them that was just started."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((null, stdout, stderr)):
        os.dup2(descriptor, number)
    os.closerange(3, 256)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Job:
    """What the main process does: the SDK's entrypoint in this very interpreter, or any other command."""

    def __init__(self, request, entry, base_path):
        self.request, self.entry, self.base_path = request, entry, base_path

    def run(self):
        request = self.request
        os.environ.clear()
        os.environ.update(request["env"])
        try:
            os.makedirs(request["cwd"], exist_ok=True)
            os.chdir(request["cwd"])
        except OSError as error:
            print(f"cannot enter the working directory {request['cwd']}: {error}", file=sys.stderr)
            os._exit(126)
        if self.entry is None or not request["fork"]:
            preloaded.execute(request["argv"])
        pythonpath = [part for part in os.environ.get("PYTHONPATH", "").split(":") if part]
        path = list(dict.fromkeys([os.getcwd(), *pythonpath, *self.base_path]))
        for folder in list(sys.path_importer_cache):
            if folder not in self.base_path or folder.endswith("-packages"):
                del sys.path_importer_cache[folder]
        self.entry.run(request["argv"], path, kept_as="__zygote__")


if __name__ == "__main__":
    job = main()
    if job is not None:
        job.run()
