"""Names of base images: how they are read, and which of them a Debian base can stand in for."""

import platform
import re
from collections.abc import Iterable
from typing import NamedTuple

from aeolian.domain.errors import InvalidArgument

REFERENCE = re.compile(
    r"(?:(?P<registry>[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::\d+)?|\[[0-9a-fA-F:]+\](?::\d+)?)/)?"
    r"(?P<path>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
HUB = "docker.io"
LOOPBACK = ("localhost", "127.", "[::1]")
SUITES = ("bullseye", "bookworm", "trixie")
"""The oldest first."""
SUITE_NUMBERS = {"11": "bullseye", "12": "bookworm", "13": "trixie"}
DEFAULT_SUITE = "trixie"
UBUNTU_SUITES = {"20.04": "focal", "22.04": "jammy", "24.04": "noble", "26.04": "resolute", "latest": "noble"}
PYTHON_TAG = re.compile(r"(?P<version>3(?:\.\d{1,2}(?:\.\d{1,2})?)?(?:(?:a|b|rc)\d+)?t?)?(?P<variant>(?:-[a-z0-9.]+)*)")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
UV_IMAGES = ("ghcr.io/astral-sh/uv", "docker.io/astral/uv")


class Reference(NamedTuple):
    """`registry/path:tag@digest`, written out."""

    registry: str
    path: str
    tag: str
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}" if not self.digest else f"{self.name}@{self.digest}"

    @property
    def name(self) -> str:
        return f"{self.registry}/{self.path}"

    @property
    def is_loopback(self) -> bool:
        return self.registry.startswith(LOOPBACK)


class StandIn(NamedTuple):
    """What a well-known image holds, as Debian has it."""

    distribution: str
    """`debian` or `ubuntu`."""
    suite: str
    python: str = ""
    """"" = no Python, else the version asked for: `3`, `3.12` or `3.12.4`."""


def parse_reference(text: str) -> Reference:
    """As `docker pull` reads it. Raises InvalidArgument."""
    match = REFERENCE.fullmatch(text.removeprefix("docker://"))
    if match is None:
        raise InvalidArgument(f"{text!r} is not the name of an image (such as python:3.12-slim or registry/team/app:1)")
    registry, path = match["registry"] or "", match["path"]
    if registry and "." not in registry and ":" not in registry and registry != "localhost":
        registry, path = "", f"{registry}/{path}"
    if registry in ("", "index.docker.io", "registry-1.docker.io"):
        registry = HUB
    if registry == HUB and "/" not in path:
        path = f"library/{path}"
    return Reference(registry, path, match["tag"] or "latest", match["digest"] or "")


def stand_in_for(reference: Reference) -> StandIn | None:
    """What Debian (or Ubuntu) can offer in place of that image; None when nothing of the kind."""
    if reference.registry != HUB or reference.digest:
        return None
    tag = reference.tag
    if reference.path == "library/debian":
        suite = _suite(tag.removesuffix("-slim").split("-")[0])
        return StandIn("debian", suite) if suite else None
    if reference.path == "library/ubuntu":
        suite = UBUNTU_SUITES.get(tag, tag if tag in UBUNTU_SUITES.values() else "")
        return StandIn("ubuntu", suite) if suite else None
    if reference.path == "library/python":
        match = PYTHON_TAG.fullmatch("" if tag in ("latest", "slim") else tag)
        if match is None:
            return None
        parts = [part for part in match["variant"].split("-") if part and part != "slim"]
        suites = [_suite(part) for part in parts] or [DEFAULT_SUITE]
        return StandIn("debian", suites[0], match["version"] or "3") if len(suites) == 1 and suites[0] else None
    return None


def own_architecture() -> str:
    """This machine's, in the words of registries."""
    return ARCHITECTURES.get(platform.machine(), platform.machine())


def is_uv(reference: Reference) -> bool:
    """The image that holds nothing but uv."""
    return reference.name in UV_IMAGES


def _suite(name: str) -> str:
    if name in ("latest", "stable", "slim"):
        return DEFAULT_SUITE
    number = name.split(".")[0]
    return name if name in SUITES else SUITE_NUMBERS.get(number, "")


def series_of(version: str) -> str:
    """`3.12.4` and `3.12` -> `3.12`; `3.14.0rc2t` -> `3.14t`."""
    numbers = re.findall(r"\d+", version)
    return f"{numbers[0]}.{numbers[1]}" + ("t" if version.endswith("t") else "")


def newest_series(offered: Iterable[str]) -> str | None:
    """What `python:3` stands for."""
    return max(
        (name for name in offered if not name.endswith("t")), key=lambda name: int(name.split(".")[1]), default=None
    )
