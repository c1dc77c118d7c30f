"""Carries out one step of an image build, away from the host. A script of its own: `-IS step.py`, job on stdin.

The step has mounts and processes of its own, and the host's network; when this script or the worker that started it
is killed, the kernel ends its processes and takes its mounts away. Actions:

    run     a command with the image's layers as its whole root (`view.py`), root inside, without the capabilities
            that reach the host (mounting, devices, modules, raw I/O, tracing), nor the system calls that do
    copy    files into the image (`copying.py`), from inside, so that no link leads outside
    inspect what Python the image has (`inspecting.py`)
    unpack  a tar archive becomes a layer (`unpacking.py`)
    tool    a trusted command of the host's own
"""

import ctypes
import errno
import json
import os
import signal
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "runtimes")]
import copying  # noqa: E402
import inspecting  # noqa: E402
import syscall_filter  # noqa: E402
import unpacking  # noqa: E402
import view  # noqa: E402

PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_CAPBSET_READ = 1, 24, 23
CLONE_NEWUTS, CLONE_NEWIPC = 0x04000000, 0x08000000
KEPT_CAPABILITIES = frozenset([0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 29, 31])
"""chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw, sys_chroot,
audit_write, setfcap: what Docker gives, but mknod."""

PROTECTED = ("bus", "fs", "irq", "sys", "sysrq-trigger")
HIDDEN = ("acpi", "kcore", "keys", "latency_stats", "sched_debug", "scsi", "timer_list")


def main():
    job = json.load(sys.stdin)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    view.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["worker_pid"]:
        sys.exit("the worker is gone")
    if not job["namespaces"]:
        os._exit(ACTIONS[job["action"]](job))
    view.enter_namespaces(job["user_namespace"])
    view.unshare(view.CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS)
    pid = os.fork()
    if pid == 0:
        os._exit(first_process(job))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.kill(pid, signal.SIGKILL))
    os._exit(exit_code_of(pid))


def first_process(job):
    """The namespace's init: when it ends, everything in it does."""
    view.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.umask(0o022)
    try:
        for layers, target in job.get("overlays", []):
            mount_read_only(job["view"]["layers_folder"], layers, target)
        for tree, path, target, read_only in job.get("nested_binds", []):
            job["view"]["binds"].append([view.resolved(tree, path), target, read_only])
        if job.get("view"):
            view.enter(job["view"], own_pids=job["own_pids"])
            if not job["user_namespace"]:
                protect_proc()
        for path, content in job.get("files", {}).items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as stream:
                stream.write(content)
        for path in job.get("scratch", []):
            os.makedirs(path)
            os.chmod(path, 0o1777)
    except OSError as error:
        return failed(f"the step's file system could not be set up: {error}")
    pid = os.fork()
    if pid == 0:
        os._exit(ACTIONS[job["action"]](job))
    return exit_code_of(pid)


def exit_code_of(pid):
    """Of that child; others that were left to us are reaped meanwhile."""
    while True:
        try:
            ended, status = os.wait()
        except InterruptedError:
            continue
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def run(job):
    try:
        os.setsid()
        os.makedirs(job["cwd"], exist_ok=True)
        os.chdir(job["cwd"])
        env = dict(job["env"])
        if job["namespaces"]:
            syscall_filter.install()
        drop_capabilities()
        env.setdefault("HOME", become(job["user"]))
        os.environ["PATH"] = env.get("PATH", os.defpath)  # where execvpe looks
        os.execvpe(job["argv"][0], job["argv"], env)
    except FileNotFoundError:
        return failed(f"{job['argv'][0]}: there is no such program in the image", 127)
    except LookupError as error:
        return failed(f"there is no user or group {error} in the image")
    except OSError as error:
        return failed(f"the step could not be run: {error}")


def tool(job):
    try:
        os.chdir(job["cwd"])
        os.execvpe(job["argv"][0], job["argv"], job["env"])
    except OSError as error:
        return failed(f"{job['argv'][0]}: {error}", 127)


def copy(job):
    try:
        copying.copy(job["copy"])
    except copying.Refused as error:
        return failed(str(error), 1)
    except OSError as error:
        if error.errno == errno.EINVAL and job["user_namespace"]:
            return failed("files of another owner can only be made where Aeolian runs as root", 1)
        return failed(f"{error.strerror}: {error.filename or ''}", 1)
    return 0


def unpack(job):
    try:
        unpacking.unpack(**job["unpack"])
    except (OSError, ValueError, EOFError) as error:
        return failed(f"the archive could not be unpacked: {error}", 1)
    return 0


def inspect(job):
    """Prints two lines: where the image's Python is, and what it says of itself. Nothing when there is none."""
    python = inspecting.find_python(job["env"].get("PATH", ""))
    if python is None:
        return 0
    print(python, flush=True)
    return run({**job, "argv": [python, "-I", "-c", inspecting.PROBE], "cwd": "/", "user": ""})


ACTIONS = {"run": run, "tool": tool, "copy": copy, "unpack": unpack, "inspect": inspect}


def failed(message, code=126):
    print(message, file=sys.stderr, flush=True)
    return code


def mount_read_only(layers_folder, layers, target):
    """Layers of another image, as one tree."""
    os.makedirs(target, exist_ok=True)
    os.chdir(layers_folder)
    view.mount("overlay", target, "overlay", view.MS_RDONLY, f"lowerdir={':'.join(layers)}")


def protect_proc():
    """Root could change the host's kernel by these files: no capability is asked for."""
    for name in PROTECTED:
        path = f"/proc/{name}"
        if os.path.exists(path):
            view.mount(path, path, flags=view.MS_BIND | view.MS_REC)
            view.make_read_only(path)
    for name in HIDDEN:
        path = f"/proc/{name}"
        if os.path.isdir(path):
            view.mount("none", path, "tmpfs", view.MS_RDONLY)
        elif os.path.exists(path):
            view.mount("/dev/null", path, flags=view.MS_BIND)


def drop_capabilities():
    libc = ctypes.CDLL(None, use_errno=True)
    for number in range(64):
        if libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0) == 1 and number not in KEPT_CAPABILITIES:
            libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)


def become(user):
    """`name`, `uid`, `name:group`, as USER has it; the image's own passwd counts. Returns the home folder."""
    name, _, group = (user or "0").partition(":")
    uid, gid, home = copying.user_ids(name)
    if group:
        gid = copying.group_id(group)
    if uid or gid:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    return home


if __name__ == "__main__":
    main()
