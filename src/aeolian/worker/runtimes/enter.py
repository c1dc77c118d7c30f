"""Enters a container of the `process` runtime and runs a command there, with the options of `crun exec`::

    enter.py exec --process=FILE --pid-file=FILE [--console-socket=PATH] PID

PID is the container's first process, as the host numbers it. FILE describes the command as OCI does, and the
namespaces to enter. `--pid-file` is written once the command runs. Ends with the command's exit status (128 + n for a
signal). Where the container has no pid namespace, what the command leaves behind is ended with it.
"""

import fcntl
import json
import os
import signal
import socket
import struct
import sys
import termios
import warnings  # noqa: F401  # `os.execvpe` imports it when this host's files are out of sight

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import view

NAMESPACES = {"user": view.CLONE_NEWUSER, "mnt": view.CLONE_NEWNS, "pid": view.CLONE_NEWPID}
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
COULD_NOT_START = 127


def main(arguments):
    options = dict(argument[2:].split("=", 1) for argument in arguments if argument.startswith("--"))
    container = arguments[-1]
    with open(options["process"]) as stream:
        process = json.load(stream)
    folder = os.open(os.path.dirname(options["pid-file"]), os.O_RDONLY | os.O_DIRECTORY)
    console = None
    if process["terminal"]:
        console = socket.socket(socket.AF_UNIX)
        console.connect(options["console-socket"])
    has_own_pids = "pid" in process["namespaces"]
    if not has_own_pids:
        import zygote  # now, while this file's folder is in sight
    parent = os.getppid()
    namespaces = [(kind, os.open(f"/proc/{container}/ns/{kind}", os.O_RDONLY)) for kind in process["namespaces"]]
    for kind, descriptor in namespaces:
        view.setns(descriptor, NAMESPACES[kind])
    view.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until there is something to end
    view.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    master, slave = os.openpty() if console is not None else (None, None)
    status_read, status_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        become(process, slave, status_write)

    def end(code):
        if not has_own_pids:
            zygote.kill_descendants(pid)
        os._exit(code)

    signal.signal(signal.SIGTERM, lambda *_: end(128 + signal.SIGTERM))
    if os.getppid() != parent:
        end(128 + signal.SIGTERM)  # the worker died before this could hear of it
    for descriptor in (0, 1, status_write, *([slave] if slave is not None else [])):
        os.close(descriptor)
    complaint = read_all(status_read)
    if complaint:
        os.write(2, complaint)
        os._exit(COULD_NOT_START)
    os.close(2)
    os.close(os.open(os.path.basename(options["pid-file"]), os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=folder))
    if console is not None:
        socket.send_fds(console, [b"tty"], [master])
        console.close()
        os.close(master)
    while True:
        ended, status = os.wait()
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            end(code if code >= 0 else 128 - code)


def become(process, slave, status):
    """The command itself. Says on `status` why it cannot be; a successful start closes that."""
    try:
        view.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        if slave is not None:
            size = process["consoleSize"]
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size["height"], size["width"], 0, 0))
            for number in (0, 1, 2):
                os.dup2(slave, number)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        try:
            os.chdir(process["cwd"])
        except OSError as error:
            raise OSError(f"cannot enter the working directory {process['cwd']}: {error.strerror}") from error
        env = dict(pair.split("=", 1) for pair in process["env"])
        try:
            os.execvpe(process["args"][0], process["args"], env)
        except OSError as error:
            raise OSError(f"cannot run {process['args'][0]}: {error.strerror}") from error
    except BaseException as error:
        os.write(status, f"{error}\n".encode())
    os._exit(COULD_NOT_START)


def read_all(descriptor):
    said = b""
    while chunk := os.read(descriptor, 4096):
        said += chunk
    os.close(descriptor)
    return said


if __name__ == "__main__":
    main(sys.argv[2:])
