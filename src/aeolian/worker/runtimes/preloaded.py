"""The SDK's entrypoint, imported before it is known for which container. Standard library only, Python 3.9 and newer.

Used inside other Pythons: by the fork server (`zygote.py`) and by standby containers (`standby_main.py`).
"""

import ast
import contextlib
import os
import random
import signal
import sys
import threading
import time
import traceback
import types

ENTRYPOINT = "modal._container_entrypoint"
PRELOADED_TOO = (
    "asyncio.unix_events", "cbor2", "concurrent.futures.thread", "encodings.idna", "grpclib.client",
    "importlib.metadata", "modal.app", "modal.functions", "modal._runtime.asgi", "multiprocessing", "pickle", "inspect",
)  # fmt: skip


def preload():
    """Import the SDK's entrypoint and cut out its `__main__` block. Returns (Entry | None, why not)."""
    try:
        entry = Entry()
    except BaseException:
        return None, traceback.format_exc()
    for name in PRELOADED_TOO:
        with contextlib.suppress(Exception):
            __import__(name)
    num_threads = threading.active_count()
    if num_threads != 1 or (os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) != 1):
        return None, f"importing the SDK started {num_threads - 1} threads: a fork of it could hang"
    return entry, ""


class Entry:
    """The SDK's entrypoint as `python -m` would run it: module contents, and the code of its `__main__` block."""

    def __init__(self):
        __import__(ENTRYPOINT)
        self.module = sys.modules[ENTRYPOINT]
        with open(self.module.__file__) as stream:
            tree = ast.parse(stream.read())
        blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.dump(node.test).count("__main__") == 1]
        body = ast.Module(body=blocks[-1].body, type_ignores=[])
        self.code = compile(body, self.module.__file__, "exec")

    def run(self, argv, path, kept_as):
        """Be `python -m modal._container_entrypoint`: `os.environ` and the working directory are set already.

        `argv`: what a fresh interpreter would have been started with; `path`: its sys.path; `kept_as`: the name under
        which the caller's own `__main__` stays alive.
        """
        with contextlib.suppress(AttributeError):
            time.tzset()
        random.seed()
        sys.path[:] = path
        sys.argv[:] = [self.module.__file__]
        if hasattr(sys, "orig_argv"):
            sys.orig_argv[:] = argv
        mainly = types.ModuleType("__main__")
        mainly.__dict__.update({**self.module.__dict__, "__name__": "__main__"})
        sys.modules[kept_as] = sys.modules["__main__"]
        sys.modules["__main__"] = mainly
        with contextlib.suppress(Exception):
            sdk_config = sys.modules["modal.config"]
            sdk_config.logger.setLevel(sdk_config.config["loglevel"])
        exec(self.code, mainly.__dict__)


def execute(argv):
    """Become another program, with the signals as a shell leaves them. Never returns."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"cannot run {argv[0]}: {error}", file=sys.stderr)
        os._exit(127)
