"""Builds images on this node: the client's Dockerfile lines become layers, and a description of the image."""

import asyncio
import errno
import platform
import time
from pathlib import Path

import msgspec

from aeolian.domain.errors import InvalidArgument, OutOfSpace
from aeolian.domain.images import ImageSpec
from aeolian.storage.files import ContentStore
from aeolian.worker.images.bases import Bases, RootBases
from aeolian.worker.images.build import Build, Tools
from aeolian.worker.images.debian import DebianBases
from aeolian.worker.images.layers import LayerMaker
from aeolian.worker.images.machine_cache import MachineCache, default_cache_folder
from aeolian.worker.images.mode import Mode, find_mode
from aeolian.worker.images.over_host import CheckedWorkshop, HostBases
from aeolian.worker.images.portable import PortableWorkshop
from aeolian.worker.images.registry import Registry
from aeolian.worker.images.stand_ins import PackagedBases
from aeolian.worker.images.step_limits import StepLimits
from aeolian.worker.images.steps import INFO, OnLog, StepRunner
from aeolian.worker.images.store import ImageStore, StoredImage
from aeolian.worker.images.workshop import ViewWorkshop, Workshop
from aeolian.worker.interpreters import Interpreters, StandalonePythons


class PythonFacts(msgspec.Struct):
    """What an image's Python says of itself."""

    version: str = ""
    libc: str = ""
    packages: dict[str, str] = {}


class ImageBuilder:
    """Below `data_dir`, it owns what is unfinished in `layers`, and `builds` (caches of RUN steps, pulled descriptions).

    `mode`: what the host lets builds do; None = found out at the first build. `cache_folder`: bases that are the
    same for every data directory of this machine.
    """

    def __init__(
        self,
        store: ImageStore,
        content: ContentStore,
        interpreters: Interpreters,
        pythons: StandalonePythons,
        data_dir: Path,
        *,
        mode: Mode | None = None,
        cache_folder: Path | None = None,
    ):
        self._store = store
        self._content = content
        self._interpreters = interpreters
        self._pythons = pythons
        self._data_dir = data_dir
        self._mode = mode
        self._cache_folder = cache_folder or default_cache_folder()
        self._layers = LayerMaker(store)
        self._tools: Tools | None = None
        self._opening = asyncio.Lock()
        store.clear_leftovers()

    async def build(
        self, image_id: str, spec: ImageSpec, env: dict[str, str], on_log: OnLog, *, force: bool = False
    ) -> dict[str, str]:
        """Build the image and keep it under that id; returns what the server stores of it.

        `env`: secrets, seen by RUN steps only. `force`: run every step again. Raises AeolianError whose message names
        the step that failed, with the end of its output. Cancelled or killed, it leaves nothing half-made.
        """
        began = time.monotonic()
        if spec.arch and spec.arch != platform.machine():
            raise InvalidArgument(f"the image is for {spec.arch}; this worker runs {platform.machine()} only")
        tools = await self._opened()
        try:
            image = await Build(tools, spec, env, on_log, fresh=force or spec.ignore_cache).run()
            image, facts = await self._inspected(tools, image)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OutOfSpace(
                    "the worker's disk is full: free space in its data directory, then try again"
                ) from None
            raise
        info = {
            "python_version": facts.version,
            "libc_version": facts.libc,
            "python_packages": msgspec.json.encode(facts.packages).decode(),
            "image_builder_version": spec.builder_version,
            "workdir": "" if image.workdir == "/" else image.workdir,
        }
        await asyncio.to_thread(self._store.put, msgspec.structs.replace(image, image_id=image_id, info=info))
        on_log(INFO, f"built {image_id} in {time.monotonic() - began:.1f} s\n")
        return info

    async def _opened(self) -> Tools:
        async with self._opening:
            if self._tools is None:
                self._tools = self._tools_for(self._mode or await find_mode(self._data_dir / "builds" / "probe"))
            return self._tools

    def _tools_for(self, mode: Mode) -> Tools:
        steps = StepRunner(mode, StepLimits(self._data_dir) if mode.is_whole else None)
        builds = self._data_dir / "builds"
        if mode.name == "portable":
            workshop: Workshop = PortableWorkshop(self._store, self._content, steps, mode.problem)
            bases: Bases = HostBases(self._interpreters, self._layers, workshop, has_views=False)
            return Tools(self._store, self._layers, workshop, bases)
        workshop = ViewWorkshop(self._store, self._content, steps, self._data_dir, builds / "caches")
        if not mode.is_whole:
            bases = HostBases(self._interpreters, self._layers, workshop, has_views=True)
            return Tools(self._store, self._layers, CheckedWorkshop(workshop), bases)
        cache = MachineCache(self._cache_folder)
        debian = DebianBases(steps, cache)
        stand_ins = PackagedBases(debian, cache, self._layers, workshop, self._interpreters, self._pythons)
        registry = Registry(self._store, self._layers, steps, builds / "pulled")
        return Tools(self._store, self._layers, workshop, RootBases(registry, stand_ins, self._layers))

    async def _inspected(self, tools: Tools, image: StoredImage) -> tuple[StoredImage, PythonFacts]:
        """The image with its Python, as found on its PATH."""
        folder = await asyncio.to_thread(self._store.new_folder)
        try:
            said = await tools.workshop.inspect(folder, image)
        finally:
            await asyncio.to_thread(self._store.discard, folder)
        python, _, facts = said.partition("\n")
        if not python:
            return msgspec.structs.replace(image, python="", python_version=""), PythonFacts()
        told = msgspec.json.decode(facts, type=PythonFacts)
        return msgspec.structs.replace(image, python=python, python_version=told.version), told
