"""The SDK that containers run: of the caller's own version, kept as ready-made folders with compiled bytecode.

::

    D/sdk/<version>/pkg                               modal, modal_proto, modal_version, synchronicity, sitecustomize.py
    D/sdk/deps/<builder>-<cpXY>-<libc>-<arch>         what the SDK needs, seen at /__modal/deps

Both are made once, beside their final place, then renamed; whoever asks meanwhile waits for the same build.
The SDK's packages come first on sys.path, its dependencies last, so that a user's own versions win.
"""

import asyncio
import contextlib
import filecmp
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path

from uv import find_uv_bin

from aeolian.domain.errors import InvalidArgument, NotFound, Unavailable
from aeolian.worker import container_site
from aeolian.worker.interpreters import Interpreters
from aeolian.worker.package_index import installer_env

log = logging.getLogger(__name__)

PACKAGES_TARGET = "/pkg"
DEPENDENCIES_TARGET = container_site.DEPENDENCIES
LAST_WITH_DEPENDENCIES = "2024.10"
"""Images of later builder versions do not hold what the SDK depends on: it is mounted."""
PACKAGES = ("modal", "modal_proto", "modal_version", "synchronicity")
SDK_VERSION = re.compile(r"\d{1,4}\.\d{1,4}\.\d{1,5}((a|b|rc|\.dev|\.post)\d{1,14})*")
BUILDER_VERSION = re.compile(r"\d{4}\.\d{2}|PREVIEW")
SERIES = re.compile(r"3\.(\d{1,2})t?")
REQUIREMENT_NAME = re.compile(r"[A-Za-z0-9._-]+")
MISSING_PIN = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]*[A-Za-z0-9])")
PLATFORMS = {"manylinux": "{arch}-manylinux_2_28", "musllinux": "{arch}-unknown-linux-musl"}
INSTALL_TIMEOUT_S = 300
COMPILE_TIMEOUT_S = 300
MAX_LOOSENED = 20


class SdkStore:
    """Folders of the SDK below `data_dir / "sdk"`."""

    def __init__(self, data_dir: Path, interpreters: Interpreters):
        self.root = data_dir / "sdk"
        self._interpreters = interpreters
        self._building: dict[str, asyncio.Task[Path]] = {}

    async def packages(self, version: str, series: str) -> Path:
        """The folder to be seen at /pkg, compiled for that Python series (`3.11`) where the host can.

        Raises InvalidArgument for what is no version, NotFound for a version that was never released,
        Unavailable when the package index cannot be reached.
        """
        check_version(version)
        _check_series(series)
        folder = await self._once(self.root / version / "pkg", lambda target: self._make_packages(version, target))
        await asyncio.to_thread(_renew_site, folder)
        await self._compiled(folder, series)
        return folder

    async def dependencies(
        self, sdk_version: str, builder_version: str, series: str, libc: str = "manylinux", arch: str = ""
    ) -> Path:
        """The folder to be seen at /__modal/deps in images of that builder version, Python series and libc
        (`manylinux` or `musllinux`). Raises as `packages`."""
        check_version(sdk_version)
        _check_series(series)
        if not BUILDER_VERSION.fullmatch(builder_version):
            raise InvalidArgument(f"{builder_version!r} is not an image builder version (such as 2025.06)")
        if libc not in PLATFORMS:
            raise InvalidArgument(f"{libc!r} is not a libc that the SDK's dependencies exist for: manylinux, musllinux")
        arch = arch or platform.machine()
        name = f"{builder_version}-cp{series.replace('.', '')}-{libc}-{arch}"

        async def make(target: Path) -> None:
            await self._make_dependencies(sdk_version, builder_version, series, libc, arch, target)

        try:
            folder = await self._once(self.root / "deps" / name, make)
        except Unavailable:
            own_series = f"{sys.version_info.major}.{sys.version_info.minor}"
            if (sdk_version, series, libc, arch) != (own_version(), own_series, host_libc(), platform.machine()):
                raise
            log.warning("no package index within reach: containers use the dependencies of Aeolian's own installation")
            folder = await self._once(self.root / "deps" / f"own-{name}", lambda target: _copy_own_dependencies(target))
        await self._compiled(folder, series)
        return folder

    async def _once(self, folder: Path, make: Callable[[Path], Awaitable[None]]) -> Path:
        """`folder`, made if it is not there; whoever asks at the same time waits for the same build."""
        if folder.exists():
            return folder
        key = str(folder)
        if key not in self._building:
            self._building[key] = asyncio.create_task(self._make(folder, make))
            self._building[key].add_done_callback(lambda _: self._building.pop(key, None))
        return await asyncio.shield(self._building[key])

    async def _make(self, folder: Path, make: Callable[[Path], Awaitable[None]]) -> Path:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            await make(building)
            building.chmod(0o755)
            if not folder.exists():
                os.rename(building, folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, building, True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()  # of a version that does not exist
        return folder

    async def _make_packages(self, version: str, target: Path) -> None:
        if version == own_version():
            await asyncio.to_thread(_copy_own_packages, target)
        else:
            log.info("fetching the SDK %s", version)
            await _install(["--no-deps", f"modal=={version}"], target, f"the modal SDK {version}")
            metadata = target / f"modal-{version}.dist-info" / "METADATA"
            wanted = [line for line in _requires(metadata) if line.startswith("synchronicity")]
            await _install(["--no-deps", *(wanted or ["synchronicity"])], target, f"synchronicity for modal {version}")
            kept = {*PACKAGES, metadata.parent.name}
            for path in target.iterdir():
                if path.name not in kept:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copyfile(container_site.__file__, target / "sitecustomize.py")

    async def _make_dependencies(
        self, sdk_version: str, builder_version: str, series: str, libc: str, arch: str, target: Path
    ) -> None:
        packages = await self._once(
            self.root / sdk_version / "pkg", lambda folder: self._make_packages(sdk_version, folder)
        )
        what = f"the SDK's dependencies for Python {series} ({builder_version}, {libc})"
        where = ["--python-version", series.rstrip("t"), "--only-binary", ":all:"]
        if sys.platform == "linux":
            where += ["--python-platform", PLATFORMS[libc].format(arch=arch)]
        pins = _pinned_list(packages, builder_version)
        lines = pins.read_text().splitlines()
        for _ in range(MAX_LOOSENED):
            try:
                await _install([*where, "--no-deps", *_requirements(lines)], target, what)
                break
            except NotFound as error:
                loosened = _loosen(lines, error.message)
                if loosened is None:
                    raise
                log.info("%s: %s is not in the package index; taking another version", what, loosened)
                await asyncio.to_thread(_empty, target)
        shutil.rmtree(target / "bin", ignore_errors=True)

    async def _compiled(self, folder: Path, series: str) -> None:
        """Add bytecode of that series. It is used as it is (unchecked hash), so the folder may be read-only."""
        marker = folder / f".compiled-{series}"
        if marker.exists():
            return

        async def compile_all(_: Path) -> None:
            try:
                interpreter = await self._interpreters.get(series, download=False)
            except NotFound:
                log.warning("no Python %s here to compile %s with: containers start about 1 s slower", series, folder)
                return
            command = [
                str(interpreter.executable),
                "-I",
                "-m",
                "compileall",
                "-q",
                "--invalidation-mode",
                "unchecked-hash",
            ]
            process = await asyncio.create_subprocess_exec(
                *command,
                str(folder),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                # Status 1 only says that some file is for another Python; all others are compiled.
                await asyncio.wait_for(process.wait(), COMPILE_TIMEOUT_S)
            except BaseException:
                process.kill()
                raise
            marker.touch()

        key = f"{folder}|{series}"
        if key not in self._building:
            self._building[key] = asyncio.create_task(compile_all(folder))
            self._building[key].add_done_callback(lambda _: self._building.pop(key, None))
        await asyncio.shield(self._building[key])


def own_version() -> str:
    """The version of the SDK installed beside Aeolian."""
    return importlib.metadata.version("modal")


def host_libc() -> str:
    return "musllinux" if platform.libc_ver()[0] != "glibc" and sys.platform == "linux" else "manylinux"


def check_version(version: str) -> str:
    """The version, if it is one: it becomes part of paths and of installer commands."""
    if not SDK_VERSION.fullmatch(version):
        raise InvalidArgument(f"{version!r} is not a version of the modal package (such as 1.6.4)")
    return version


def _check_series(series: str) -> None:
    if not SERIES.fullmatch(series):
        raise InvalidArgument(f"{series!r} is not a Python series (such as 3.11)")


def _renew_site(folder: Path) -> None:
    """An older Aeolian may have left its own `sitecustomize.py`, compiled: both are made anew."""
    site = folder / "sitecustomize.py"
    if filecmp.cmp(container_site.__file__, site, shallow=False):
        return
    fresh = folder / f".sitecustomize-{os.getpid()}"
    shutil.copyfile(container_site.__file__, fresh)
    os.replace(fresh, site)
    for stale in (*folder.glob("__pycache__/sitecustomize.*"), *folder.glob(".compiled-*")):
        stale.unlink(missing_ok=True)


def _copy_own_packages(target: Path) -> None:
    for name in PACKAGES:
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None, f"{name} is a dependency of ours"
        shutil.copytree(
            Path(spec.origin).parent, target / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    distribution = importlib.metadata.distribution("modal")
    info = target / f"modal-{distribution.version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(distribution.read_text("METADATA") or "")


async def _copy_own_dependencies(target: Path) -> None:
    def copy() -> None:
        waiting, seen = ["modal"], {"modal"}
        while waiting:
            distribution = importlib.metadata.distribution(waiting.pop())
            if distribution.metadata["Name"] != "modal":
                for file in distribution.files or ():
                    if ".." not in file.parts and file.suffix != ".pyc" and "__pycache__" not in file.parts:
                        (target / file).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy2(distribution.locate_file(file), target / file)
            for line in distribution.requires or ():
                match = REQUIREMENT_NAME.match(line)
                if match and "extra ==" not in line and match[0].lower() not in seen:
                    seen.add(match[0].lower())
                    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                        importlib.metadata.distribution(match[0])
                        waiting.append(match[0])

    await asyncio.to_thread(copy)


def _pinned_list(packages: Path, builder_version: str) -> Path:
    """modal/builder/<version>.txt: of our own SDK, else of the given one."""
    spec = find_spec("modal")
    own = Path(spec.origin).parent if spec and spec.origin else packages / "modal"
    for modal in (own, packages / "modal"):
        path = modal / "builder" / f"{builder_version}.txt"
        if path.exists():
            return path
    raise NotFound(f"no list of SDK dependencies is known for the image builder version {builder_version}")


def _requirements(lines: list[str]) -> list[str]:
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _loosen(lines: list[str], message: str) -> str | None:
    """Unpin the requirement that uv could not find (`there is no version of X==Y`); return it, or None."""
    for name, version in MISSING_PIN.findall(message):
        for index, line in enumerate(lines):
            if line.startswith(f"{name}=={version}"):
                lines[index] = line.replace(f"=={version}", "", 1)
                return f"{name}=={version}"
    return None


def _requires(metadata: Path) -> list[str]:
    lines = metadata.read_text().splitlines() if metadata.exists() else []
    return [
        line.removeprefix("Requires-Dist: ")
        for line in lines
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


async def _install(arguments: list[str], target: Path, what: str) -> None:
    command = [find_uv_bin(), "pip", "install", "--no-config", "--target", str(target), *arguments]
    env = {**os.environ, **installer_env()}
    env.pop("VIRTUAL_ENV", None)
    process = await asyncio.create_subprocess_exec(
        *command,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, stderr = await asyncio.wait_for(process.communicate(), INSTALL_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise Unavailable(f"{what}: the package index did not answer within {INSTALL_TIMEOUT_S} s") from None
    except BaseException:
        if process.returncode is None:
            process.kill()
        raise
    if process.returncode == 0:
        return
    said = stderr.decode("utf-8", "replace").strip()[-800:]
    if "no version of" in said or "No solution found" in said:
        raise NotFound(f"{what} cannot be had from the package index: {said}")
    raise Unavailable(f"{what} could not be fetched; is the package index within reach of this host? uv says: {said}")
