"""The main process of a standby container, until somebody's container is made of it. Standard library only, 3.9 and newer.

Run by the image's own interpreter, inside the finished container: it imports the SDK as `python -m` would, says what
a container must not change to get the same modules, and waits::

    this: {"ready": true, "read": [variables that mattered], "path": [where modules come from], "modules": [names]}
          {"ready": false, "reason": why this image's containers cannot be prepared}
    worker: {"argv": [...], "env": {...}, "cwd": "...", "is_entrypoint": true}     once the container is complete
"""

import gc
import importlib
import json
import os
import site
import socket
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if entry != FOLDER]
sys.path.insert(0, FOLDER)
import preloaded  # noqa: E402

del sys.path[0], sys.modules["preloaded"]  # user code may have a module of that name

OWN_SITE = "/pkg/"
HARMLESS_AT_START = ("distutils-precedence.pth",)
HARMLESS_ENDINGS = ("-nspkg.pth",)
EDITABLE = "__editable__"
MAX_REQUEST_BYTES = 64 << 20


class Reads:
    """The names of the variables that are read from `os.environ` while this is on."""

    def __init__(self):
        self.names = set()
        self._get, self._iterate = os._Environ.__getitem__, os._Environ.__iter__

    def __enter__(self):
        def get(environ, name):
            self.names.add(os.fsdecode(name))
            return self._get(environ, name)

        def iterate(environ):
            self.names.add("*")
            return self._iterate(environ)

        os._Environ.__getitem__, os._Environ.__iter__ = get, iterate
        return self

    def __exit__(self, *_exc):
        os._Environ.__getitem__, os._Environ.__iter__ = self._get, self._iterate


def code_at_start():
    """Code of the image's own that ran when this interpreter started, and saw another environment: its place, or ""."""
    if "usercustomize" in sys.modules:
        return "usercustomize"
    if not getattr(sys.modules.get("sitecustomize"), "__file__", "").startswith(OWN_SITE):
        return "sitecustomize"
    folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
    for folder in filter(os.path.isdir, folders):
        for name in os.listdir(folder):
            if not name.endswith(".pth") or name.startswith(EDITABLE):
                continue
            if name in HARMLESS_AT_START or name.endswith(HARMLESS_ENDINGS):
                continue
            with open(os.path.join(folder, name), errors="replace") as stream:
                if any(line.startswith(("import ", "import\t")) for line in stream):
                    return os.path.join(folder, name)
    return ""


def prepare():
    """Import the SDK. Returns (Entry | None, the variables that this has changed: None for gone, what to say)."""
    sys.path.insert(0, os.getcwd())
    own = code_at_start()
    if own:
        return None, {}, {"ready": False, "reason": f"{own} of the image runs at the start of every interpreter"}
    before = dict(os.environ)
    with Reads() as reads:
        entry, reason = preloaded.preload()
    if entry is None:
        return None, {}, {"ready": False, "reason": reason}
    after = dict(os.environ)
    changed = {name: after.get(name) for name in {*before, *after} if before.get(name) != after.get(name)}
    gc.collect()
    path = [entry for entry in sys.path if os.path.isabs(entry)]
    return (
        entry,
        changed,
        {
            "ready": True,
            "read": sorted(reads.names),
            "path": sorted({*path, *map(os.path.realpath, path)}),
            "modules": sorted({name.partition(".")[0] for name in sys.modules}),
        },
    )


def main():
    worker = socket.socket(fileno=os.dup(0))
    entry, changed, said = prepare()
    worker.sendall(json.dumps(said).encode() + b"\n")
    line = b""
    while not line.endswith(b"\n"):
        chunk = worker.recv(1 << 16)
        if not chunk or len(line) > MAX_REQUEST_BYTES:
            os._exit(0)
        line += chunk
    request = json.loads(line)
    worker.close()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.environ.clear()
    env = {**request["env"], **changed}
    os.environ.update({name: value for name, value in env.items() if value is not None})
    os.chdir(request["cwd"])  # it is a folder of the new root from here on
    if not request["is_entrypoint"]:
        preloaded.execute(request["argv"])
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    entry.run(request["argv"], [os.getcwd(), *sys.path[1:]], kept_as="__standby__")


if __name__ == "__main__":
    main()
