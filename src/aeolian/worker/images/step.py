"""Runs one command of a Dockerfile inside the image that is being built. A script of its own (`-I step.py JSON`).

The command sees the layers so far as its whole root, processes of its own, a /dev without disks, the host's network,
and what the build needs of the host's settings below /__modal/build. It is root inside, without the capabilities
that reach the host (mounting, devices, modules, raw I/O, tracing).
"""

import ctypes
import json
import os
import signal
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "runtimes"))
import view

PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_CAPBSET_READ = 1, 24, 23
CLONE_NEWUTS, CLONE_NEWIPC = 0x04000000, 0x08000000
KEPT_CAPABILITIES = frozenset([0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 29, 31])
"""chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw, sys_chroot,
audit_write, setfcap: what Docker gives, but mknod."""


def main():
    job = json.loads(sys.argv[1])
    view.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["worker_pid"]:
        sys.exit("the worker is gone")
    view.unshare(view.CLONE_NEWNS | view.CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS)
    view.mount("none", "/", flags=view.MS_REC | view.MS_SLAVE)
    pid = os.fork()
    if pid == 0:
        run(job)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.kill(pid, signal.SIGKILL))
    while True:
        try:
            _, status = os.waitpid(pid, 0)
            break
        except InterruptedError:
            continue
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def run(job):
    try:
        view.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        view.enter(job["view"], own_pids=True)
        for path, content in job["files"].items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as stream:
                stream.write(content)
        os.setsid()
        os.makedirs(job["cwd"], exist_ok=True)
        os.chdir(job["cwd"])
        drop_capabilities()
        become(job["user"])
        os.execvpe(job["argv"][0], job["argv"], job["env"])
    except OSError as error:
        print(f"the step could not be run: {error}", file=sys.stderr, flush=True)
    except LookupError as error:
        print(f"there is no such user in the image: {error}", file=sys.stderr, flush=True)
    os._exit(126)


def drop_capabilities():
    libc = ctypes.CDLL(None, use_errno=True)
    for number in range(64):
        if libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0) == 1 and number not in KEPT_CAPABILITIES:
            libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)


def become(user):
    """`name`, `uid`, `name:group`, as USER has it. The image's own passwd counts."""
    if user in ("", "root", "0"):
        return
    name, _, group = user.partition(":")
    uid, gid = look_up("/etc/passwd", name)
    if group:
        _, gid = look_up("/etc/group", group)[::-1] if not group.isdigit() else (0, int(group))
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def look_up(path, name):
    with open(path) as stream:
        for line in stream:
            fields = line.rstrip("\n").split(":")
            if name in (fields[0], fields[2] if len(fields) > 2 else ""):
                return int(fields[2]), int(fields[3]) if len(fields) > 4 else int(fields[2])
    if name.isdigit():
        return int(name), int(name)
    raise LookupError(name)


if __name__ == "__main__":
    main()
