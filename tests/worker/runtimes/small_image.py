"""A small image made of this host's own files: glibc, a shell and a Python. No network, no package manager needed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from aeolian.worker.images.store import ImageStore, StoredImage
from aeolian.worker.interpreters import find_interpreters, transplant

IMAGE_ID = "im-small"
PROGRAMS = ("sh", "cat", "sleep")
FOLDERS = ("dev", "etc", "proc", "root", "sys", "tmp", "var/tmp")


def make_small_rootfs(target: Path) -> str:
    """Make it; returns the path of its interpreter, of the series that the tests run on."""
    series = f"{sys.version_info.major}.{sys.version_info.minor}"
    transplant(find_interpreters(target / "none")[series], target / "usr/local")
    for folder in FOLDERS:
        (target / folder).mkdir(parents=True, exist_ok=True)
    (target / "usr/bin").mkdir()
    (target / "bin").symlink_to("usr/bin")
    for name in ("lib", "lib64"):
        if Path("/", name).is_symlink():
            (target / "usr" / name).mkdir()
            (target / name).symlink_to(f"usr/{name}")
    for name in PROGRAMS:
        shutil.copy2(shutil.which(name) or name, target / "usr/bin" / name)
    (target / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (target / "etc/group").write_text("root:x:0:\n")
    binaries = [
        *(target / "usr/bin").iterdir(),
        target / f"usr/local/bin/python{series}",
        *(target / "usr/local").rglob("*.so*"),
    ]
    said = subprocess.run(["ldd", *binaries], capture_output=True, text=True).stdout
    for library in set(re.findall(r"(?:=> )?(/\S+) \(0x", said)):
        if not library.startswith(str(target)):
            (target / library[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, target / library[1:])
    return f"/usr/local/bin/python{series}"


def put_small_image(images: ImageStore, rootfs: Path, python: str) -> None:
    """As two layers: the root file system, and a file above it."""
    (images.layers_folder / "base").symlink_to(rootfs)
    top = images.layers_folder / "top"
    (top / "etc").mkdir(parents=True)
    (top / "etc/small").write_text("of the top layer\n")
    env = {"LANG": "C.UTF-8", "FROM_IMAGE": "yes"}
    images.put(StoredImage(IMAGE_ID, layers=("base", "top"), env=env, python=python, python_version=python[-4:]))
