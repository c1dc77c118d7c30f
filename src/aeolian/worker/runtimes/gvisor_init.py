"""The first process of a gVisor container whose image has a Python: starts the main process, and lives as long as it.

A script of its own, run by the image's interpreter, so it imports only the standard library. It reaps the orphans of
its container, passes signals on to the main process, and ends as that one ends: by its exit code, or by its signal.
Usage: `gvisor_init.py PROGRAM ARGUMENT…`
"""

import os
import signal
import sys

PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
BACK_TO_DEFAULT = (signal.SIGPIPE, signal.SIGXFSZ, *PASSED_ON)
"""Python ignores some signals, and what it ignores an `exec` ignores, too."""


def main(argv):
    # Blocked until there is somebody to pass them on to.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    pid = os.fork()
    if pid == 0:
        become(argv)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    status = None
    while status is None:
        ended, found = os.wait()
        if ended == pid:
            status = found
    if os.WIFSIGNALED(status):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        end_by(os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def become(argv):
    """Never returns."""
    os.setsid()
    for number in BACK_TO_DEFAULT:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"cannot run {argv[0]}: {error.strerror}\n".encode())
    os._exit(127)


def end_by(number):
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    main(sys.argv[1:])
