"""A small image made of this host's own files: glibc, a shell and a Python. It needs no network and no package manager."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from aeolian.worker.images.store import ImageStore, StoredImage
from aeolian.worker.interpreters import find_interpreters, transplant

IMAGE_ID = "im-small"
SERIES = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHON = f"/usr/local/bin/python{SERIES}"
PROGRAMS = ("sh", "cat", "mkdir", "sleep")
NEEDED_BY_THE_SDK = ("libstdc++.so.6", "libgcc_s.so.1")
FOLDERS = ("dev", "etc", "proc", "root", "sys", "tmp", "usr/bin")


def make_small_rootfs(target: Path) -> None:
    transplant(find_interpreters(target / "none")[SERIES], target / "usr/local")
    for folder in FOLDERS:
        (target / folder).mkdir(parents=True, exist_ok=True)
    (target / "bin").symlink_to("usr/bin")
    for name in ("lib", "lib64"):
        if Path("/", name).is_symlink():
            (target / "usr" / name).mkdir()
            (target / name).symlink_to(f"usr/{name}")
    for name in PROGRAMS:
        shutil.copy2(shutil.which(name) or name, target / "usr/bin" / name)
    (target / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (target / "etc/group").write_text("root:x:0:\n")
    _copy_libraries(target)


def _copy_libraries(target: Path) -> None:
    """Those of this host that programs and extension modules need, at their own paths."""
    cache = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    found = {path for path in re.findall(r"=> (/\S+)", cache) if Path(path).name in NEEDED_BY_THE_SDK}
    binaries = [*(target / "usr/bin").iterdir(), target / PYTHON[1:], *(target / "usr/local").rglob("*.so*"), *found]
    said = subprocess.run(["ldd", *binaries], capture_output=True, text=True).stdout
    for library in {*re.findall(r"(?:=> )?(/\S+) \(0x", said), *found}:
        if not library.startswith(str(target)):
            (target / library[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, target / library[1:])


def put_small_image(images: ImageStore, rootfs: Path) -> None:
    """As two layers: the root file system, and a file above it."""
    shutil.copytree(rootfs, images.layers_folder / "base", symlinks=True, copy_function=os.link)
    top = images.layers_folder / "top"
    (top / "etc").mkdir(parents=True)
    (top / "etc/small").write_text("of the top layer\n")
    env = {"LANG": "C.UTF-8", "FROM_IMAGE": "yes"}
    images.put(StoredImage(IMAGE_ID, layers=("base", "top"), env=env, python=PYTHON, python_version=f"{SERIES}.0"))
