"""Starts containers on a runtime as the worker does: its hooks in order, undone in reverse."""

import asyncio
import contextlib
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from small_image import IMAGE_ID, put_small_image

from aeolian.domain.containers import ContainerSpec, ExitStatus
from aeolian.worker.cgroups import Cgroups
from aeolian.worker.hooks.base import Start
from aeolian.worker.images.store import ImageStore
from aeolian.worker.interpreters import Interpreters
from aeolian.worker.runtimes.base import RunningContainer
from aeolian.worker.runtimes.gvisor import GvisorRuntime
from aeolian.worker.runtimes.native import NativeRuntime
from aeolian.worker.runtimes.process import ProcessRuntime, find_capabilities
from aeolian.worker.runtimes.selection import find_offer
from aeolian.worker.runtimes.standby_fit import ENTRYPOINT_ARGV, kind_of
from aeolian.worker.sdk import SdkStore, own_version

KINDS = {"gvisor": GvisorRuntime, "native": NativeRuntime, "process": ProcessRuntime}


class Ended(NamedTuple):
    status: ExitStatus
    stdout: str
    stderr: str


class Started:
    def __init__(self, place: "Place", start: Start):
        self.place = place
        self.start = start
        self.running: RunningContainer

    async def line(self) -> str:
        """The next line of its output."""
        return (await self.running.stdout.readline()).decode().rstrip("\n")

    async def ended(self) -> Ended:
        """Until it has ended, and nothing of it is left but what it wrote."""
        stdout, stderr = await asyncio.gather(self.running.stdout.read(), self.running.stderr.read())
        status = await self.running.wait()
        await self.running.release()
        await self.place.undo(self.start)
        self.place.started.remove(self)
        return Ended(status, stdout.decode(), stderr.decode())


class Place:
    """A data directory with the small image (`rootfs`; None: it is there already), and a runtime that is open."""

    def __init__(self, data_dir: Path, rootfs: Path | None):
        self.data_dir = data_dir
        self.images = ImageStore(data_dir)
        if rootfs is not None:
            put_small_image(self.images, rootfs)
        self.sdk = SdkStore(data_dir, Interpreters(data_dir))
        self.started: list[Started] = []
        self.one_at_a_time = asyncio.Lock()
        self._numbers = itertools.count(1)

    async def open(self, kind, **options) -> None:
        self.runtime = kind(self.data_dir, self.images, self.sdk, **options)
        await self.runtime.open()

    async def close(self) -> None:
        for started in list(self.started):
            started.running.kill()
            await started.ended()
        await self.runtime.close()

    def prepared(self, *argv: str, **spec) -> Start:
        """What a container starts from, before any hook."""
        task_id = f"ta-{next(self._numbers)}"
        fields = {"app_id": "ap-1", "function_id": "fu-1", "environment_name": "main", "image_id": IMAGE_ID, **spec}
        full = ContainerSpec(task_id, argv=argv, **fields)
        folder = self.data_dir / "containers" / task_id
        folder.mkdir(parents=True)
        start = Start(full, folder, folder / "worker.sock", env=dict(full.env), cwd=full.cwd)
        start.socket_path.touch()
        return start

    async def apply(self, start: Start) -> None:
        for hook in self.runtime.hooks():
            await hook.apply(start)

    async def undo(self, start: Start) -> None:
        for hook in reversed(self.runtime.hooks()):
            await hook.undo(start)

    async def start(self, *argv: str, prepared: Start | None = None, **spec) -> Started:
        start = prepared or self.prepared(*argv, **spec)
        started = Started(self, start)
        try:
            await self.apply(start)
            started.running = await self.runtime.start(start)
        except BaseException:
            await self.undo(start)
            raise
        self.started.append(started)
        return started

    async def run(self, *argv: str, **spec) -> Ended:
        return await (await self.start(*argv, **spec)).ended()


class StandbyPlace(Place):
    """Where every container, whatever it runs, is made of a standby. `sdk_dir`: where the SDK lies, for many places."""

    def __init__(self, data_dir: Path, rootfs: Path | None, sdk_dir: Path):
        super().__init__(data_dir, rootfs)
        self.sdk = SdkStore(sdk_dir, Interpreters(sdk_dir))

    async def open(self, kind, **options) -> None:
        await super().open(kind, **options)
        as_entrypoint = functools.partial(msgspec.structs.replace, argv=ENTRYPOINT_ARGV)
        self.runtime.standbys._kind_of = lambda spec, image: kind_of(as_entrypoint(spec), image)

    def prepared(self, *argv: str, **spec) -> Start:
        env = {"MODAL_IS_REMOTE": "1", **spec.pop("env", {})}
        return super().prepared(*argv, **{"sdk_version": own_version(), "env": env, **spec})

    async def start(self, *argv: str, prepared: Start | None = None, **spec) -> Started:
        start = prepared or self.prepared(*argv, **spec)
        async with self.one_at_a_time:  # there is one standby of a kind
            await self.runtime.standbys.prepare(start.spec)
            started = await super().start(prepared=start)
        assert "standby" in started.start.cgroup, "it started cold"
        return started


@contextlib.asynccontextmanager
async def open_place(name: str, data_dir: Path, rootfs: Path, sdk_dir: Path | None = None, **options):
    """With `sdk_dir`, all containers of `native` are made of standbys.

    A runtime that this host can do, or the test is skipped; afterwards nothing of it may be left."""
    offer = await find_offer(name, data_dir)
    if not offer.is_available:
        pytest.skip(str(offer))
    if name == "process" and not (await find_capabilities(data_dir)).has_views:
        pytest.skip("the small image needs a root file system of its own: this host has no mount namespaces")
    place = Place(data_dir, rootfs) if sdk_dir is None else StandbyPlace(data_dir, rootfs, sdk_dir)
    try:
        await place.open(KINDS[name], **options)
        yield place
    finally:
        await place.close()
    assert str(data_dir) not in Path("/proc/self/mountinfo").read_text()
    if isinstance(place.runtime, NativeRuntime | GvisorRuntime):
        group = place.runtime.cgroup_of("").strip("/")
        assert not [folder for folder in Cgroups().hierarchies() if (folder / group).exists()]
