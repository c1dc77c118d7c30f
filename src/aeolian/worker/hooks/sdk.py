"""The hook that shows a container the SDK of its caller: /pkg, /__modal/deps and PYTHONPATH."""

import asyncio
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from aeolian.domain.containers import MountSpec
from aeolian.domain.errors import FailedPrecondition
from aeolian.worker.hooks.base import Bind, Start
from aeolian.worker.sdk import DEPENDENCIES_TARGET, PACKAGES_TARGET, SdkStore

SITE_TARGET = "/__modal/site"
VERSIONED = re.compile(r"python(3\.\d{1,2}t?)")
MAX_LINKS = 40


class SdkHook:
    """`python_of` says which (Python series, libc) a container has whose root file system is not mounted yet."""

    name = "sdk"

    def __init__(self, store: SdkStore, python_of: Callable[[Start], tuple[str, str]] | None = None):
        self._store = store
        self._python_of = python_of

    async def apply(self, start: Start) -> None:
        spec = start.spec
        if not spec.sdk_version:
            return
        if start.rootfs is None:
            assert self._python_of is not None, "without a mounted root file system python_of is needed"
            series, libc = self._python_of(start)
        else:
            series, libc = await asyncio.to_thread(_python_of, start.rootfs, start.python)
        packages = await self._store.packages(spec.sdk_version, series)
        pythonpath = [PACKAGES_TARGET, "/root"]
        if brings_own_sdk(spec.mounts):
            # MODAL_SYNC_ENTRYPOINT: the client mounts its own packages at /pkg; only sitecustomize is ours.
            site = start.folder / "site"
            site.mkdir(exist_ok=True)
            (site / "sitecustomize.py").write_bytes((packages / "sitecustomize.py").read_bytes())
            start.binds.append(Bind(site, SITE_TARGET))
            pythonpath.append(SITE_TARGET)
        else:
            start.binds.append(Bind(packages, PACKAGES_TARGET))
        if spec.mount_client_dependencies:
            folder = await self._store.dependencies(spec.sdk_version, spec.builder_version, series, libc)
            start.binds.append(Bind(folder, DEPENDENCIES_TARGET))
        of_image = [part for part in start.env.get("PYTHONPATH", "").split(":") if part and part not in pythonpath]
        start.env["PYTHONPATH"] = ":".join(pythonpath + of_image)

    async def undo(self, start: Start) -> None:
        return None


def brings_own_sdk(mounts: tuple[MountSpec, ...]) -> bool:
    """Whether a mount of the function holds the SDK's packages itself."""
    return any(file.path.startswith("/pkg/modal/") for mount in mounts for file in mount.files)


def _python_of(rootfs: Path, python: str) -> tuple[str, str]:
    """(series, libc) of a root file system's interpreter, found without running it. Raises FailedPrecondition."""
    if not python:
        raise FailedPrecondition("this image has no Python: add one by `add_python`, or use an image that has it")
    libc = "musllinux" if any((rootfs / "lib").glob("ld-musl-*")) else "manylinux"
    for path in _links_of(rootfs, python):
        if match := VERSIONED.fullmatch(posixpath.basename(path)):
            return match[1], libc
    prefix = posixpath.dirname(posixpath.dirname(path))
    library = rootfs / f"{prefix}/lib".lstrip("/")
    found = [match[1] for entry in library.glob("python3.*") if (match := VERSIONED.fullmatch(entry.name))]
    if len(found) != 1:
        raise FailedPrecondition(f"the image's Python {python} does not say its version: name it python3.x")
    return found[0], libc


def _links_of(rootfs: Path, path: str) -> Iterator[str]:
    """`path` and each path that a link on its way leads to, all seen from inside the root file system."""
    for _ in range(MAX_LINKS):
        yield path
        parts = PurePosixPath(path).parts[1:]
        for count in range(1, len(parts) + 1):
            step = rootfs.joinpath(*parts[:count])
            if step.is_symlink():
                target = posixpath.join("/", *parts[: count - 1], os.readlink(step), *parts[count:])
                path = posixpath.normpath(target)
                break
        else:
            return
