"""Builders on a data directory of their own, the machine's shared bases, and registries on loopback."""

import asyncio
import contextlib
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from aeolian.domain.containers import MountFile
from aeolian.domain.images import ImageSpec
from aeolian.storage.files import ContentStore
from aeolian.worker import mounting
from aeolian.worker.images.builder import ImageBuilder
from aeolian.worker.images.mode import WHOLE
from aeolian.worker.images.registry import Registry, RegistryUnreachable
from aeolian.worker.images.store import ImageStore, StoredImage
from aeolian.worker.interpreters import Interpreters, StandalonePythons

INTERPRETERS = Interpreters(Path("/nowhere"))
"""This host's, found once for all tests."""
DEBIAN = "FROM debian:bookworm-slim"


class Workbench:
    """A builder, what it stores, and what it said."""

    def __init__(self, data_dir: Path, **options):
        self.data_dir = data_dir
        self.store = ImageStore(data_dir)
        self.content = ContentStore(data_dir / "content")
        pythons = StandalonePythons(data_dir, INTERPRETERS)
        self.builder = ImageBuilder(self.store, self.content, INTERPRETERS, pythons, data_dir, **options)
        self.log = ""
        self._said = asyncio.Event()

    def on_log(self, fd: int, text: str) -> None:
        self.log += text
        self._said.set()

    async def until_said(self, text: str) -> None:
        while text not in self.log:
            self._said.clear()
            await self._said.wait()

    async def build(self, *lines: str, env=None, force=False, image_id="", **spec) -> StoredImage:
        """The image of these lines; `spec`: other fields of its ImageSpec."""
        image_id = image_id or "im-" + hashlib.sha256(repr((lines, spec)).encode()).hexdigest()[:22]
        spec = ImageSpec(lines, builder_version="2025.06", **spec)
        await self.builder.build(image_id, spec, env or {}, self.on_log, force=force)
        return self.store.get(image_id)

    def file(self, path: str, text: str, mode: int = 0o644) -> MountFile:
        """A file of a build's context."""
        data = text.encode()
        return MountFile(path, self.content.put(data), len(data), mode)

    @contextlib.contextmanager
    def mounted(self, image: StoredImage, folder: Path):
        """The image's files, as its containers see them."""
        for name in ("upper", "work", "root"):
            (folder / name).mkdir(parents=True)
        root = folder / "root"
        mounting.mount_overlay(self.store.layer_paths(image), folder / "upper", folder / "work", root)
        try:
            yield root
        finally:
            mounting.unmount(root, detach=True)


def why_no_roots(folder: Path) -> str:
    """Why this host cannot build images that are whole root file systems; "" = it can."""
    if os.getuid() != 0:
        return "needs root"
    if shutil.which("mmdebstrap") is None:
        return "needs mmdebstrap"
    return "" if mounting.can_mount_overlays(folder) else "needs overlayfs"


@pytest.fixture
def offline(monkeypatch):
    """No registry can be reached, whatever this machine's network offers."""

    async def pull(self, reference, access, on_log):
        raise RegistryUnreachable(f"the registry {reference.registry} cannot be reached (in this test)")

    monkeypatch.setattr(Registry, "pull", pull)


@pytest.fixture(scope="module")
def shared_data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def bench(shared_data_dir, offline):
    """Of one data directory for the tests of a module, so that its base is put there once."""
    if reason := why_no_roots(shared_data_dir):
        pytest.skip(reason)
    return Workbench(shared_data_dir, mode=WHOLE)
