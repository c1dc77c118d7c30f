"""Containers where the host offers no namespaces: processes that see the host as it is.

What would be mounted is linked below the container's own folder instead, which stands in for /root; paths in its
environment point there. Only what belongs below /root can be shown to it, so everything else is refused.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from aeolian.domain.errors import FailedPrecondition
from aeolian.worker.hooks.base import Bind, Start
from aeolian.worker.hooks.volumes import VOLUMES_TARGET
from aeolian.worker.sdk import DEPENDENCIES_TARGET, PACKAGES_TARGET

HOME = "/root"
OWN = "/__modal/"
SITE_FOLDERS = ("site-packages", "dist-packages")


def site_packages_of(layers: Sequence[Path]) -> list[Path]:
    """Where image layers (the topmost first) hold Python packages."""
    found = []
    for layer in layers:
        for pattern in ("usr/local/lib/python3*/", "usr/lib/python3*/", "opt/*/lib/python3*/", ""):
            for name in SITE_FOLDERS:
                found += sorted(layer.glob(pattern + name))
    return found


def make_portable(start: Start, image_layers: Sequence[Path], request: dict, binds: Sequence[Bind]) -> None:
    """Fill the container's folder, and rewrite the request for the fork server.

    Raises FailedPrecondition for what such a host cannot show.
    """
    home = start.folder / "root"
    home.mkdir(exist_ok=True)
    start.upper = home
    for layer in reversed(start.layers):
        _add_layer(layer, home)
    replaced = {HOME: str(home)}
    for bind in binds:
        target = bind.target
        if target == HOME or target.startswith(HOME + "/"):
            place = home / target.removeprefix(HOME).lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(place):
                place.symlink_to(bind.source)
        elif target.startswith((OWN, PACKAGES_TARGET)):
            if not target.startswith(VOLUMES_TARGET):
                replaced[target] = str(bind.source)
        else:
            raise FailedPrecondition(
                f"{target} cannot be mounted: this host gives containers no view of their own. Use a path below "
                f"{HOME}, or run Aeolian where it has mount namespaces (Linux, as root or with user namespaces)"
            )
    env = {name: _rewritten(value, replaced) for name, value in request["env"].items()}
    paths = [path for path in env.get("PYTHONPATH", "").split(":") if path]
    paths += [str(path) for path in site_packages_of(image_layers)]
    if DEPENDENCIES_TARGET in replaced:
        paths.append(replaced[DEPENDENCIES_TARGET])
    env["PYTHONPATH"] = ":".join(paths)
    env["HOME"] = str(home)
    request["env"] = env
    request["cwd"] = _rewritten(request["cwd"], replaced)


def _add_layer(layer: Path, home: Path) -> None:
    """The part of a Mount that lies below /root. Raises FailedPrecondition when there is another."""
    for entry in sorted(layer.iterdir()):
        if entry.name != "root":
            raise FailedPrecondition(
                f"/{entry.name} cannot be mounted: this host gives containers no view of their own. Add local files "
                f"and folders below {HOME}, or run Aeolian where it has mount namespaces"
            )
    if (layer / "root").is_dir():
        shutil.copytree(layer / "root", home, dirs_exist_ok=True, symlinks=True)


def _rewritten(value: str, replaced: dict[str, str]) -> str:
    """The value with each of its colon-separated paths replaced, where something else stands for it."""
    if value.startswith("unix://"):
        return "unix://" + _rewritten(value.removeprefix("unix://"), replaced)
    return ":".join(_path(part, replaced) for part in value.split(":")) if "/" in value else value


def _path(part: str, replaced: dict[str, str]) -> str:
    for target, source in replaced.items():
        if part == target or part.startswith(target + "/"):
            return source + part.removeprefix(target)
    return part
