"""What FROM names: images of a registry, or, where none can be reached, what this host can offer in their place."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from uv import find_uv_bin

from aeolian.domain.errors import FailedPrecondition
from aeolian.domain.images import RegistryAccess
from aeolian.worker.images.layers import LayerMaker, digest_of
from aeolian.worker.images.machine_cache import copy_tree
from aeolian.worker.images.references import Reference, StandIn, is_uv, parse_reference, stand_in_for
from aeolian.worker.images.registry import Registry, RegistryUnreachable
from aeolian.worker.images.steps import INFO, OnLog
from aeolian.worker.images.store import StoredImage


class Bases(Protocol):
    async def find(self, name: str, access: RegistryAccess, commands: Sequence[str], on_log: OnLog) -> StoredImage:
        """The image (without an id) that FROM calls by that name. `commands`: the RUN lines that follow.

        Raises AeolianError.
        """
        ...


class StandIns(Protocol):
    async def make(self, reference: Reference, wanted: StandIn, commands: Sequence[str], on_log: OnLog) -> StoredImage:
        """A base of this host's making."""
        ...


class RootBases:
    """Bases that are whole root file systems."""

    def __init__(self, registry: Registry, stand_ins: StandIns, layers: LayerMaker):
        self._registry = registry
        self._stand_ins = stand_ins
        self._layers = layers

    async def find(self, name: str, access: RegistryAccess, commands: Sequence[str], on_log: OnLog) -> StoredImage:
        reference = parse_reference(name)
        try:
            return await self._registry.pull(reference, access, on_log)
        except RegistryUnreachable as error:
            unreachable = error
        if is_uv(reference):
            on_log(INFO, f"{reference.registry} cannot be reached: taking the uv that Aeolian has\n")
            return await uv_image(self._layers, on_log)
        wanted = stand_in_for(reference)
        if wanted is None:
            raise FailedPrecondition(f"{reference} cannot be had: {unreachable.message}. {advice_for(reference)}")
        on_log(INFO, f"{unreachable.message}: a base made from packages stands in for {name}\n")
        return await self._stand_ins.make(reference, wanted, commands, on_log)


async def uv_image(layers: LayerMaker, on_log: OnLog) -> StoredImage:
    """What `ghcr.io/astral-sh/uv` holds: /uv and /uvx."""
    binary = Path(find_uv_bin())
    status = binary.stat()

    async def work(folder: Path, _: OnLog) -> Path:
        tree = folder / "tree"
        await asyncio.to_thread(_copy_uv, binary, tree)
        return tree

    layer = await layers.make(digest_of("uv", str(binary), status.st_size, status.st_mtime_ns), work, on_log)
    return StoredImage("", layers=(layer.name,), entrypoint=("/uv",))


def _copy_uv(binary: Path, tree: Path) -> None:
    tree.mkdir()
    for name in ("uv", "uvx"):
        source = binary.with_name(name)
        if source.exists():
            copy_tree(source, tree / name)


def advice_for(reference: Reference) -> str:
    """What to do about an image that only its registry has."""
    if "cuda" in reference.path or reference.path.startswith("nvidia/"):
        return (
            "CUDA's libraries also come as Python packages: use modal.Image.debian_slim() and install, say, torch or "
            "nvidia-cuda-runtime-cu12 by pip; or give this host access to the registry, or a mirror of the image"
        )
    if "micromamba" in reference.path:
        return (
            "Image.micromamba() needs this image: use modal.Image.debian_slim() with uv_pip_install instead, or give "
            "this host access to the registry"
        )
    return (
        "Where no registry can be reached, debian:…, python:3.x-… and modal.Image.debian_slim() can be built from "
        "packages: use one of these, or give this host access to the registry (or name a mirror of it in FROM)"
    )
