"""Whether a container may be made of a standby: it must get the very modules that it would import itself.

A standby has imported the SDK from the image alone. A container fits where nothing that it brings (variables, Mounts,
Volumes) would have changed that; else it starts cold. Pure but for looking into Mounts.
"""

import fnmatch
import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from aeolian.domain.containers import ContainerSpec
from aeolian.worker.hooks.sdk import brings_own_sdk
from aeolian.worker.images.store import StoredImage

ENTRYPOINT_ARGV = ("python", "-m", "modal._container_entrypoint")
READ_AT_START = (
    "PYTHON*", "LD_*", "LC_*", "LANG", "LANGUAGE", "HOME", "MALLOC_*", "GLIBC_TUNABLES", "OPENSSL_*", "SSL_CERT_*",
    "SSLKEYLOGFILE", "SETUPTOOLS_USE_DISTUTILS",
)  # fmt: skip
"""Variables that an interpreter and its libraries read without asking `os.environ`."""
ALWAYS = "*"
"""Among the variables read: all of them were looked at."""
SITE_MODULES = frozenset(["sitecustomize", "usercustomize"])
SYSTEM_FOLDERS = (
    "/bin",
    "/lib",
    "/lib64",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/etc/ssl",
    "/__modal",
)
"""What the interpreter itself is made of."""
LOADER_FILES = ("/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/ld.so.conf", "/etc/ld.so.conf.d")


class Kind(msgspec.Struct, frozen=True):
    """What a container and its standby have in common."""

    image_id: str
    image: bytes
    """All that is known of it: an image that is built again is another one."""
    sdk_version: str
    builder_version: str
    mount_client_dependencies: bool
    cwd: str
    block_network: bool
    has_gpus: bool


class Report(msgspec.Struct, frozen=True):
    """What a standby says when it has imported the SDK (`standby_main.py`)."""

    ready: bool
    reason: str = ""
    read: frozenset[str] = frozenset()
    path: tuple[str, ...] = ()
    modules: frozenset[str] = frozenset()


def kind_of(spec: ContainerSpec, image: StoredImage) -> Kind | None:
    """None: containers of this specification always start cold."""
    is_plain = tuple(spec.argv) == ENTRYPOINT_ARGV and spec.sdk_version and not spec.save_image_as
    if not is_plain or not image.python or image.over_host or brings_own_sdk(spec.mounts):
        return None
    return Kind(
        image_id=image.image_id,
        image=msgspec.json.encode(image),
        sdk_version=spec.sdk_version,
        builder_version=spec.builder_version,
        mount_client_dependencies=spec.mount_client_dependencies,
        cwd=image.workdir if image.workdir not in ("", "/") else spec.cwd,
        block_network=spec.block_network,
        has_gpus=spec.resources.gpu_count > 0,
    )


def misfit(
    report: Report,
    prepared: Mapping[str, str],
    wanted: Mapping[str, str],
    layers: Sequence[Path],
    targets: Iterable[str],
) -> str:
    """Why the container must start cold, or "".

    `prepared`, `wanted`: the environments of standby and container; `layers`: trees over the image; `targets`: where
    Volumes are mounted.
    """
    home = prepared.get("HOME", "/root")
    return changed_variable(report, prepared, wanted) or hidden_module(report, layers, targets, home)


def changed_variable(report: Report, prepared: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    if ALWAYS in report.read:
        return "an import looks at the whole environment"
    names = {name for name in (*prepared, *wanted) if any(fnmatch.fnmatchcase(name, it) for it in READ_AT_START)}
    for name in sorted(names | report.read):
        if prepared.get(name) != wanted.get(name):
            return f"the variable {name} matters to an import"
    return ""


def hidden_module(report: Report, layers: Sequence[Path], targets: Iterable[str], home: str) -> str:
    """What lies where modules come from, and would have been imported instead."""
    modules = report.modules | SITE_MODULES
    places = sorted(
        {posixpath.normpath("/" + path.lstrip("/")) for path in report.path}
    )  # whatever the image's Python says
    folders = [*SYSTEM_FOLDERS, *LOADER_FILES, f"{home.rstrip('/')}/.local/lib"]
    for layer in layers:
        for path in folders:
            if os.path.lexists(layer / path[1:]):
                return f"a Mount has files in {path}"
        for path in places:
            for name in _names_in(layer / path[1:]):
                if name.partition(".")[0] in modules:
                    return f"a Mount has {path}/{name}, and the SDK imports a module of that name"
    for target in targets:
        for path in (*folders, *places):
            if PurePosixPath(path).is_relative_to(target):
                return f"{path} comes from a Volume"
            if PurePosixPath(target).is_relative_to(path) and path not in places:
                return f"a Volume is mounted in {path}"
        for path in places:
            if PurePosixPath(target).is_relative_to(path):
                name = PurePosixPath(target).relative_to(path).parts[0]
                if name.partition(".")[0] in modules:
                    return f"a Volume is mounted at {path}/{name}, and the SDK imports a module of that name"
    return ""


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
