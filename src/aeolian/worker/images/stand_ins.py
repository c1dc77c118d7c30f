"""Stands in for `debian:…`, `ubuntu:…` and `python:3.x…`: a base of packages, with the Python that was asked for."""

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from aeolian.domain.errors import NotFound
from aeolian.worker.images.apt_sources import find_archive
from aeolian.worker.images.debian import DebianBases
from aeolian.worker.images.layers import LayerMaker, digest_of
from aeolian.worker.images.machine_cache import MachineCache, copy_tree
from aeolian.worker.images.references import DEFAULT_SUITE, Reference, StandIn, newest_series, series_of
from aeolian.worker.images.steps import INFO, OnLog
from aeolian.worker.images.store import StoredImage
from aeolian.worker.images.workshop import PATH, RunJob, Workshop
from aeolian.worker.interpreters import Interpreters, StandalonePythons

RECIPE = 1
"""Counts changes of what is done here: older trees in the machine's cache are not taken any more."""
GLIBC = {
    "bullseye": (2, 31),
    "focal": (2, 31),
    "jammy": (2, 35),
    "bookworm": (2, 36),
    "noble": (2, 39),
    "trixie": (2, 41),
}
PACKAGED = {
    "bullseye": ("debian", "3.9"),
    "bookworm": ("debian", "3.11"),
    "trixie": ("debian", "3.13"),
    "jammy": ("ubuntu", "3.10"),
    "noble": ("ubuntu", "3.12"),
}
"""Suites -> (distribution, the Python that they have as packages)."""
COMPILERS = ("gcc", "gfortran", "build-essential")
"""What debian_slim always installs."""
GLIBC_SYMBOL = re.compile(rb"GLIBC_(\d+)\.(\d+)")
PYTHON_PACKAGES = "python3 python3-dev python3-venv"


class Movable(NamedTuple):
    """An interpreter that can be copied into an image."""

    tree: Path
    """In the machine's cache, to become /usr/local."""
    version: str
    glibc: tuple[int, int]
    """The oldest C library that it runs with."""


class PythonChoice(NamedTuple):
    """Which Python stands in, and on what."""

    distribution: str
    suite: str
    series: str
    copied: Movable | None
    """None = the suite's packages."""


class PackagedBases:
    def __init__(
        self,
        bases: DebianBases,
        cache: MachineCache,
        layers: LayerMaker,
        workshop: Workshop,
        interpreters: Interpreters,
        pythons: StandalonePythons,
    ):
        self._bases = bases
        self._cache = cache
        self._layers = layers
        self._workshop = workshop
        self._interpreters = interpreters
        self._pythons = pythons

    async def make(self, reference: Reference, wanted: StandIn, commands: Sequence[str], on_log: OnLog) -> StoredImage:
        choice = None
        if wanted.python:
            choice = await self._choose(reference, wanted)
            if choice.suite != wanted.suite:
                on_log(INFO, f"Python {choice.series} is not to be had for {wanted.suite}: taking {choice.suite}\n")
            wanted = wanted._replace(distribution=choice.distribution, suite=choice.suite)
        image = StoredImage("", cmd=("bash",))
        image = await self._with_base(image, wanted, on_log)
        if wanted.python and all(any(name in command for command in commands) for name in COMPILERS):
            install = f"apt-get install -y {' '.join(COMPILERS)}"
            image = await self._with_packages(image, wanted, install, "compilers", on_log)
        if choice is not None:
            image = await self._with_python(image, wanted, choice, on_log)
        return image

    async def _with_base(self, image: StoredImage, wanted: StandIn, on_log: OnLog) -> StoredImage:
        key = self._bases.key(wanted.distribution, wanted.suite)

        async def work(folder: Path, on_log: OnLog) -> Path:
            kept = await self._bases.tree(wanted.distribution, wanted.suite, on_log)
            await asyncio.to_thread(copy_tree, kept, folder / "tree")
            return folder / "tree"

        return _over(image, (await self._layers.make(key, work, on_log)).name)

    async def _with_packages(
        self, image: StoredImage, wanted: StandIn, install: str, what: str, on_log: OnLog
    ) -> StoredImage:
        """What one command adds to the base, without the package lists that it needed."""
        key = digest_of("packages", RECIPE, self._bases.key(wanted.distribution, wanted.suite), install)[:24]
        command = f"apt-get update -qq && {install} && rm -rf /var/lib/apt/lists/* /var/log/*.log /var/log/apt"
        job = RunJob(("/bin/sh", "-c", command), {"DEBIAN_FRONTEND": "noninteractive"})

        async def work(folder: Path, on_log: OnLog) -> Path:
            async def make(tree: Path) -> None:
                on_log(INFO, f"installing {what} into the base of {wanted.suite}: once on this machine\n")
                made = await self._workshop.run(folder, image, job, {}, on_log)
                assert made is not None
                tree.rmdir()
                await asyncio.to_thread(copy_tree, made, tree)

            kept = await self._cache.tree(key, make)
            await asyncio.to_thread(copy_tree, kept, folder / "tree")
            return folder / "tree"

        return _over(image, (await self._layers.make(key, work, on_log)).name)

    async def _with_python(
        self, image: StoredImage, wanted: StandIn, choice: PythonChoice, on_log: OnLog
    ) -> StoredImage:
        image = msgspec.structs.replace(image, env={"PATH": PATH, "LANG": "C.UTF-8"}, cmd=("python3",))
        if choice.copied is None:
            on_log(INFO, f"Python {choice.series} comes from the packages of {choice.suite}\n")
            return await self._with_packages(image, wanted, packaged_python(choice.series), "Python", on_log)
        source, version, _ = choice.copied
        if wanted.python.count(".") > 1 and wanted.python != version:
            on_log(INFO, f"Python {wanted.python} was asked for; this host offers {version}\n")
        key = digest_of("python", source.name)

        async def work(folder: Path, on_log: OnLog) -> Path:
            target = folder / "tree" / "usr" / "local"
            target.parent.mkdir(parents=True)
            await asyncio.to_thread(copy_tree, source, target)
            return folder / "tree"

        image = msgspec.structs.replace(image, env={**image.env, "PYTHON_VERSION": version})
        return _over(image, (await self._layers.make(key, work, on_log)).name)

    async def _choose(self, reference: Reference, wanted: StandIn) -> PythonChoice:
        """Raises NotFound that lists what there is."""
        found = await self._interpreters.all()
        movable = [series for series, one in found.items() if one.is_relocatable]
        newest = newest_series(movable) or PACKAGED[DEFAULT_SUITE][1]
        series = newest if wanted.python == "3" else series_of(wanted.python)
        distributions = [name for name in ("debian", "ubuntu") if find_archive(name).keyring.exists()]
        choice = choose_python(wanted, series, await self._movable(series), distributions)
        if choice is None:
            has = {name for name, one in found.items() if one.is_relocatable}
            has |= {packaged for distribution, packaged in PACKAGED.values() if distribution in distributions}
            listed = ", ".join(sorted(has, key=lambda name: [int(part) for part in re.findall(r"\d+", name)]))
            raise NotFound(
                f"{reference}: Python {series} is neither among this host's own nor in the packages of a distribution "
                f"that can be had here; there is Python {listed or '(none)'}. Ask for one of these, install Python "
                f"{series} with a prefix of its own (pyenv, `uv python install {series}`), or give this host access to "
                f"{reference.registry}"
            )
        return choice

    async def _movable(self, series: str) -> Movable | None:
        """The host's interpreter of that series as a tree that can stand in an image."""
        try:
            interpreter = await self._interpreters.get(series)
            if not interpreter.is_relocatable:
                return None
            place = interpreter.executable
            key = digest_of("python", RECIPE, str(place), interpreter.version, place.stat().st_mtime_ns)[:24]

            async def make(tree: Path) -> None:
                source = await self._pythons.folder(series, interpreter.version)
                tree.rmdir()
                await asyncio.to_thread(copy_tree, source, tree)

            tree = await self._cache.tree(key, make)
        except (NotFound, OSError):
            return None
        return Movable(tree, interpreter.version, await asyncio.to_thread(glibc_need, tree))


def choose_python(
    wanted: StandIn, series: str, movable: Movable | None, distributions: Sequence[str]
) -> PythonChoice | None:
    """A copy of the host's own interpreter where the suite's C library is new enough for it (or the next newer suite),
    else the suite's packages, else another suite's. `distributions`: those that can be had here."""
    if movable is not None:
        suites = [suite for suite, (distribution, _) in PACKAGED.items() if distribution == wanted.distribution]
        for suite in suites[suites.index(wanted.suite) :]:
            if GLIBC[suite] >= movable.glibc:
                return PythonChoice(wanted.distribution, suite, series, movable)
    for suite in (wanted.suite, *PACKAGED):
        distribution, packaged = PACKAGED[suite]
        if packaged == series and distribution in distributions:
            return PythonChoice(distribution, suite, series, None)
    return None


def packaged_python(series: str) -> str:
    """The command that gives a distribution's Python the place that it has in the python:… images.

    /usr/local is a virtual environment of it: pip is free to change what lies there, which it is not for the packages
    that the distribution has installed.
    """
    links = f"ln -s /usr/bin/python{series}-config /usr/local/bin/python3-config"
    clean = "rm /usr/local/bin/*ctivate*"
    return (
        f"apt-get install -y --no-install-recommends {PYTHON_PACKAGES}"
        f" && python{series} -m venv --copies /usr/local && {links} && {clean}"
    )


def glibc_need(folder: Path) -> tuple[int, int]:
    """The newest version of glibc's symbols that a tree's libraries ask for."""
    needed = (0, 0)
    for path in (*folder.glob("bin/python3*"), *folder.rglob("*.so*")):
        if path.is_file() and not path.is_symlink():
            for major, minor in GLIBC_SYMBOL.findall(path.read_bytes()):
                needed = max(needed, (int(major), int(minor)))
    return needed


def _over(image: StoredImage, layer: str) -> StoredImage:
    return msgspec.structs.replace(image, layers=(*image.layers, layer)) if layer else image
