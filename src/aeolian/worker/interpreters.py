"""Python interpreters of this host, by series (`3.11`), and relocatable copies of them.

Images on the process runtime run on a host interpreter; `add_python` puts a copy of one into an image that
has none. Where the host lacks a series, uv's managed builds are tried (they need the internet).
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
from uv import find_uv_bin

from aeolian.domain.errors import NotFound

log = logging.getLogger(__name__)

EXECUTABLE = re.compile(r"python3\.\d+t?")
SERIES = re.compile(r"3\.\d{1,2}t?")
PROBE = (
    "import sys, json, sysconfig, importlib.util as u\n"
    "print(json.dumps([sys.version.split()[0], sys.base_prefix, sysconfig.get_path('stdlib'),"
    " u.find_spec('_ctypes') is not None, bool(sysconfig.get_config_var('Py_GIL_DISABLED'))]))"
)
PROBE_TIMEOUT_S = 10
DOWNLOAD_TIMEOUT_S = 180
GLIBC = re.compile(r"(linux-vdso|ld-linux.*|libc|libm|libdl|libpthread|librt|libutil|libresolv|libnsl|libgcc_s)\.so.*")
SEEDED = re.compile(r"(pip|setuptools|wheel|pkg_resources|_distutils_hack)(-[0-9.]+\.dist-info)?")
"""Packages that come with an interpreter's copy."""
PIP_SCRIPT = """\
#!/bin/sh
'''exec' "$(dirname -- "$(realpath -- "$0")")/{python}" "$0" "$@"
' '''
import sys
from pip._internal.cli.main import main
sys.exit(main())
"""
LEFT_OUT = shutil.ignore_patterns(
    "__pycache__", "test", "tests", "site-packages", "dist-packages", "*.a", "idlelib", "turtledemo"
)


class Interpreter(msgspec.Struct, frozen=True):
    """One Python on this host."""

    executable: Path
    """The real file (no link)."""
    version: str
    series: str
    prefix: Path
    stdlib: Path
    has_ctypes: bool

    @property
    def is_relocatable(self) -> bool:
        """Whether its prefix holds nothing but Python, so that a copy of it can stand elsewhere."""
        return str(self.prefix) not in ("/usr", "/usr/local") and self.stdlib.is_relative_to(self.prefix)


class Interpreters:
    """Found once, on first use."""

    def __init__(self, data_dir: Path):
        self._managed = data_dir / "sdk" / "python"
        self._found: dict[str, Interpreter] | None = None
        self._lock = asyncio.Lock()
        self._missing: set[str] = set()

    async def all(self) -> dict[str, Interpreter]:
        """By series; the newest release of each."""
        async with self._lock:
            if self._found is None:
                self._found = await asyncio.to_thread(find_interpreters, self._managed)
            return self._found

    async def get(self, series: str, *, download: bool = True) -> Interpreter:
        """The interpreter of that series (`3.11`). Raises NotFound that lists what the host has."""
        found = await self.all()
        if series in found:
            return found[series]
        if download and SERIES.fullmatch(series) and series not in self._missing:
            async with self._lock:
                if await asyncio.to_thread(_download, series, self._managed):
                    self._found = await asyncio.to_thread(find_interpreters, self._managed)
                else:
                    self._missing.add(series)
            found = self._found or {}
            if series in found:
                return found[series]
        has = ", ".join(sorted(found, key=lambda name: int(name.split(".")[1].rstrip("t")))) or "none"
        raise NotFound(
            f"this host has no Python {series} (it has {has}) and none could be downloaded: "
            f"install python{series}, or ask for a version that is there"
        )


class StandalonePythons:
    """Relocatable interpreters below `data_dir`, for `add_python`."""

    def __init__(self, data_dir: Path, interpreters: Interpreters):
        self._root = data_dir / "sdk" / "standalone"
        self._interpreters = interpreters

    async def folder(self, series: str, full_version: str) -> Path:
        """A tree with `bin/python3` and `lib/` that runs wherever it is put. Raises NotFound."""
        series += "t" if full_version.endswith("t") else ""
        interpreter = await self._interpreters.get(series)
        if not interpreter.is_relocatable:
            raise NotFound(
                f"Python {series} is here only as {interpreter.executable}, which cannot be moved into an image: "
                f"install a build with a prefix of its own (pyenv, uv python install {series}), "
                f"or use an image that has Python"
            )
        if interpreter.version != full_version.rstrip("t"):
            log.info("add_python asked for %s; this host offers %s", full_version, interpreter.version)
        target = self._root / interpreter.version
        if not target.exists():
            await asyncio.to_thread(transplant, interpreter, target)
        return target


def find_interpreters(managed: Path) -> dict[str, Interpreter]:
    """Every Python 3 in the usual places, the newest release of each series; private prefixes before the system's."""
    folders = [
        Path(sys.base_prefix) / "bin",
        *map(Path, os.environ.get("PATH", "").split(os.pathsep)),
        *sorted(managed.glob("*/bin")),
        *sorted((Path.home() / ".pyenv/versions").glob("*/bin")),
        *sorted((Path.home() / ".local/share/uv/python").glob("*/bin")),
        *map(Path, ("/usr/local/bin", "/usr/bin", "/opt/homebrew/bin")),
        *sorted(Path("/opt/python").glob("*/bin")),
    ]
    candidates: dict[Path, None] = {}
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if EXECUTABLE.fullmatch(path.name) and os.access(path, os.X_OK):
                    candidates[path.resolve()] = None
    found: dict[str, Interpreter] = {}
    for path in candidates:
        interpreter = _probe(path)
        if interpreter is None:
            continue
        known = found.get(interpreter.series)
        if known is None or _rank(interpreter) > _rank(known):
            found[interpreter.series] = interpreter
    return found


def _rank(interpreter: Interpreter) -> tuple:
    release = tuple(int(number) for number in re.findall(r"\d+", interpreter.version)[:3])
    return (interpreter.has_ctypes, interpreter.is_relocatable, release)


def _probe(path: Path) -> Interpreter | None:
    try:
        output = subprocess.run(
            [path, "-I", "-c", PROBE],
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
            check=True,
            stdin=subprocess.DEVNULL,
        ).stdout
        version, prefix, stdlib, has_ctypes, free_threaded = json.loads(output)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    if Path(prefix) != path.parent.parent and not str(prefix).startswith("/usr"):
        return None  # a shim or a virtual environment: its real interpreter is found by itself
    series = ".".join(version.split(".")[:2]) + ("t" if free_threaded else "")
    return Interpreter(path, version, series, Path(prefix), Path(stdlib), has_ctypes)


def _download(series: str, target: Path) -> bool:
    """Have uv fetch a managed build. False when it cannot."""
    command = [find_uv_bin(), "python", "install", "--no-bin", "--install-dir", str(target), series]
    try:
        done = subprocess.run(command, capture_output=True, timeout=DOWNLOAD_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return False
    if done.returncode:
        log.info("Python %s could not be downloaded: %s", series, done.stderr.decode("utf-8", "replace").strip()[-300:])
    return done.returncode == 0


def transplant(interpreter: Interpreter, target: Path) -> None:
    """Copy an interpreter so that it runs from any folder, with the shared libraries that images may lack.

    Builds made by pyenv find their libraries by an absolute RUNPATH; it is overwritten in place with one
    relative to the file ($ORIGIN, see ld.so(8)). Atomic: `target` is whole or not there.
    """
    building = target.with_name(target.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    (building / "bin").mkdir(parents=True)
    (building / "lib").mkdir()
    name = f"python{interpreter.series}"
    shutil.copy2(interpreter.executable, building / "bin" / name)
    for alias in ("python3", "python"):
        (building / "bin" / alias).symlink_to(name)
    stdlib = building / "lib" / interpreter.stdlib.name
    shutil.copytree(interpreter.stdlib, stdlib, ignore=LEFT_OUT, symlinks=True)
    packages = stdlib / "site-packages"
    packages.mkdir()
    for package in (interpreter.stdlib / "site-packages").iterdir():
        if SEEDED.fullmatch(package.name):
            shutil.copytree(package, packages / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    if (packages / "pip").is_dir():
        for alias in ("pip", "pip3", f"pip{interpreter.series}"):
            (building / "bin" / alias).write_text(PIP_SCRIPT.format(python=name))
            (building / "bin" / alias).chmod(0o755)
    if (interpreter.prefix / "include").is_dir():
        shutil.copytree(interpreter.prefix / "include", building / "include")
    binaries = [building / "bin" / name, *stdlib.rglob("*.so")]
    for library in _needed_libraries(binaries, interpreter):
        if not (building / "lib" / library.name).exists():
            shutil.copy2(library, building / "lib" / library.name)
    binaries += (building / "lib").glob("*.so*")
    for binary in binaries:
        _relocate(binary, str(interpreter.prefix / "lib"), building / "lib")
    with contextlib.suppress(OSError):
        (stdlib / "EXTERNALLY-MANAGED").unlink()
    # Bytecode that is used as it is: copies have other times. Without it each start would compile what it imports.
    compile_all = ["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", stdlib]
    subprocess.run([building / "bin" / name, "-I", *compile_all], capture_output=True, stdin=subprocess.DEVNULL)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(building, target)


def _needed_libraries(binaries: list[Path], interpreter: Interpreter) -> list[Path]:
    """Shared libraries outside glibc that these files need, as `ldd` resolves them."""
    originals = [interpreter.executable, *(interpreter.stdlib / "lib-dynload").glob("*.so")]
    output = subprocess.run(["ldd", *originals], capture_output=True, text=True).stdout
    libraries: dict[str, Path] = {}
    for name, path in re.findall(r"^\s+(\S+) => (/\S+)", output, re.MULTILINE):
        if not GLIBC.fullmatch(name):
            libraries[name] = Path(path)
    return [_named(path, name) for name, path in libraries.items()]


def _named(path: Path, name: str) -> Path:
    """The path under the very name that the loader asks for (a link to a versioned file, usually)."""
    return path if path.name == name else path.with_name(name)


def _relocate(binary: Path, old: str, lib: Path) -> None:
    relative = os.path.relpath(lib, binary.parent)
    new = "$ORIGIN" if relative == "." else f"$ORIGIN/{relative}"
    content = binary.read_bytes()
    for present in (f"{old}:{old}", old):  # pyenv names it twice in some releases
        needle = present.encode() + b"\0"
        if needle in content and len(new) <= len(present):
            binary.write_bytes(content.replace(needle, new.encode().ljust(len(needle), b"\0")))
            return
