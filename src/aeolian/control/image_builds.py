"""Builds of images that are under way: each is made by one worker, or by a container that runs a build function.

::

    start --> bases are there --> a worker is chosen --> BuildImage --> ImageBuilt --> stored, its waiters woken
                                        ^                     |
                                        +-- worker went away -+   (with the same build id: it goes on where it was)

A build outlives the server: what is unfinished is taken up again, and the worker repeats what it has to say.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import msgspec
from modal_proto import api_pb2
from sqlalchemy.engine import Connection

from aeolian.control import image_definitions
from aeolian.control.calls import Calls
from aeolian.control.image_functions import BuildFunctions
from aeolian.control.image_state import Build, BuildFailed
from aeolian.control.logs import AppLogs
from aeolian.control.workers import Worker, Workers
from aeolian.domain.calls import Status
from aeolian.domain.clock import Clock
from aeolian.domain.containers import MountSpec
from aeolian.domain.errors import AeolianError, Unavailable
from aeolian.domain.ids import new_id
from aeolian.domain.link import BuildImage, CancelBuild
from aeolian.storage import images as storage
from aeolian.storage.database import Database
from aeolian.storage.images import Image

log = logging.getLogger(__name__)

NO_WORKER_S = 90.0
"""How long a build waits for a worker before it fails."""
AWAY_S = 10.0
"""How long a build waits for the worker that has it, when others could do it."""
MAX_BUILD_S = 6 * 3600.0
RETRY_S = 1.0

T = TypeVar("T")


class Mounts(Protocol):
    async def spec(self, mount_id: str) -> MountSpec: ...


class Secrets(Protocol):
    async def env_of(self, secret_ids: Sequence[str]) -> dict[str, str]: ...


class ImageBuilds:
    def __init__(
        self,
        database: Database,
        clock: Clock,
        workers: Workers,
        mounts: Mounts,
        secrets: Secrets,
        calls: Calls,
        logs: AppLogs,
        on_finished: Callable[[Image], None],
    ):
        """`on_finished(image)`: called with each image whose build came to its end, before anybody is woken."""
        self._database = database
        self._clock = clock
        self._workers = workers
        self._mounts = mounts
        self._secrets = secrets
        self._logs = logs
        self._on_finished = on_finished
        self._functions = BuildFunctions(calls, self._note_loss)
        self._builds: dict[str, Build] = {}
        self._tasks: dict[Build, asyncio.Task] = {}
        workers.when_left.append(self._wake_all)

    # ---- life of the service ----------------------------------------------------------------------------

    async def load(self) -> None:
        for image in await self._database.read(storage.unfinished):
            self._builds[image.image_id] = Build(image)

    def open(self) -> None:
        """Go on with what is unfinished."""
        for build in self._builds.values():
            self._go(build)

    async def close(self) -> None:
        """Unfinished builds stay unfinished: the next server takes them up."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # ---- starting ---------------------------------------------------------------------------------------

    async def begin(self, image: Image, definition: api_pb2.Image | None, *, is_new: bool, prefers: str = "") -> Build:
        """Start a build: of a new image, or again. `definition` None: as it was defined before."""
        started = msgspec.structs.replace(
            image,
            status=Status.PENDING,
            error="",
            num_losses=0,
            logs_after=await self._logs.last_seq(image.app_id),
            started_at=self._clock.now(),
            finished_at=0.0,
        )
        raw = definition.SerializeToString() if definition is not None else None
        build = Build(started)
        build.prefers = prefers
        self._builds[image.image_id] = build
        try:
            if is_new:
                assert raw is not None
                await self._database.write(lambda c: storage.insert(c, started, raw))
            else:
                await self._database.write(lambda c: storage.begin(c, started, raw))
        except BaseException:
            del self._builds[image.image_id]
            build.done.set()
            raise
        self._go(build)
        return build

    def _go(self, build: Build) -> None:
        task = asyncio.create_task(self._run(build), name=f"image-{build.image.image_id}")
        self._tasks[build] = task
        task.add_done_callback(lambda _: self._tasks.pop(build, None))

    # ---- asking -----------------------------------------------------------------------------------------

    def get(self, image_id: str) -> Build | None:
        """The build, while it is under way."""
        return self._builds.get(image_id)

    def fresh(self, recipe: str, *, becomes_current: bool) -> Build | None:
        """A build under way that takes nothing from the cache."""
        for build in self._builds.values():
            image = build.image
            if image.recipe == recipe and image.is_fresh and image.becomes_current == becomes_current:
                return build
        return None

    def made_by(self, function_id: str) -> Build | None:
        """The build that runs this Function."""
        if not function_id:
            return None
        return next((build for build in self._builds.values() if function_id in build.asking.values()), None)

    # ---- what happens -----------------------------------------------------------------------------------

    def built(self, image_id: str, build_id: str, error: str, info: dict[str, str]) -> None:
        """A worker says that a build came to its end. Of a build that is over, it says so in vain."""
        build = self._builds.get(image_id)
        if build is None or (build_id and build_id != build.image.build_id):
            return
        if error:
            build.fail(BuildFailed(error))
        else:
            build.succeed(info)

    def worker_connected(self, worker: Worker) -> None:
        self._wake_all()

    def container_ended(self, task_id: str, function_id: str) -> None:
        if (build := self.made_by(function_id)) is not None:
            build.ended_tasks.add(task_id)
            build.woken.set()

    def app_stopped(self, app_id: str) -> None:
        """Builds that no other App waits for are ended."""
        for build in [build for build in self._builds.values() if app_id in build.asking]:
            if len(build.asking) > 1:
                build.asking.pop(app_id)
                continue
            self.cancel(build, f"App {app_id}, which the image was built for, was stopped")

    def cancel(self, build: Build, reason: str) -> None:
        build.fail(BuildFailed(reason, Status.TERMINATED))
        if build.worker is not None:
            build.worker.send(CancelBuild(build.image.image_id, build.image.build_id))

    def _wake_all(self) -> None:
        for build in self._builds.values():
            build.woken.set()

    # ---- its course -------------------------------------------------------------------------------------

    async def _run(self, build: Build) -> None:
        image = build.image
        try:
            async with asyncio.timeout(MAX_BUILD_S):
                info = await self._make(build)
            details = _details(build.image, info).SerializeToString()
            image = msgspec.structs.replace(build.image, status=Status.SUCCESS, details=details)
        except BuildFailed as failure:
            image = msgspec.structs.replace(build.image, status=failure.status, error=failure.text)
        except AeolianError as error:
            image = msgspec.structs.replace(build.image, status=Status.FAILURE, error=error.message)
        except TimeoutError:
            self.cancel(build, "")
            text = f"the build was not finished after {MAX_BUILD_S / 3600:g} hours"
            image = msgspec.structs.replace(build.image, status=Status.TIMEOUT, error=text)
        except Exception as error:
            log.exception("the build of image %s failed inside Aeolian", image.image_id)
            text = f"the build failed inside Aeolian: this is a bug ({error!r})"
            image = msgspec.structs.replace(build.image, status=Status.FAILURE, error=text)
        await self._finish(build, image)

    async def _make(self, build: Build) -> dict[str, str]:
        image_id = build.image.image_id
        raw = await self._database.read(lambda c: storage.get_definition(c, image_id))
        build.definition.ParseFromString(raw or b"")
        for base_id in build.image.base_image_ids:
            await self._base(base_id)
        if build.image.function_id:
            return await self._functions.run(build)
        return await self._by_worker(build)

    async def _base(self, image_id: str) -> Image:
        """A base image, when it is built. Raises BuildFailed."""
        if (running := self._builds.get(image_id)) is not None:
            await running.done.wait()
        image = await self._database.read(lambda c: storage.get(c, image_id))
        if image is None:
            raise BuildFailed(f"base image {image_id} was deleted: define the image again from its beginning")
        if image.status is not Status.SUCCESS:
            raise BuildFailed(f"base image {image_id} could not be built: {image.error}")
        return image

    async def _by_worker(self, build: Build) -> dict[str, str]:
        command = await self._command(build)
        while not build.is_over:
            worker = await self._worker_for(build)
            if worker is None:
                continue
            if await self._bring_bases(build, worker):
                continue
            if worker is not build.worker:
                build.worker = worker
                worker.send(command)
            build.woken.clear()
            if not build.is_over and worker.is_connected:
                await build.changed()
        return build.result()

    async def _command(self, build: Build) -> BuildImage:
        image, definition = build.image, build.definition
        config = definition.image_registry_config
        context = await self._mounts.spec(definition.context_mount_id) if definition.context_mount_id else None
        env = await self._secrets.env_of(definition.secret_ids) if definition.secret_ids else {}
        opening = await self._secrets.env_of([config.secret_id]) if config.secret_id else {}
        spec = image_definitions.spec(
            definition,
            context=context,
            registry=image_definitions.registry_access(config, opening),
            builder_version=image.builder_version,
            ignore_cache=image.is_fresh,
        )
        encoded = msgspec.msgpack.encode(spec)
        return BuildImage(image.image_id, encoded, env, force=image.is_fresh, build_id=image.build_id)

    async def _worker_for(self, build: Build) -> Worker | None:
        """The worker that has the build, or the best one for it; None: the build is over. Raises BuildFailed."""
        now = asyncio.get_running_loop().time
        had_it = build.worker.worker_id if build.worker is not None else ""
        away_until, none_until = now() + AWAY_S, now() + NO_WORKER_S
        while True:
            build.woken.clear()
            if build.is_over:
                return None
            available = self._workers.available()
            for worker in available:
                if worker.worker_id == had_it:
                    return worker
            if available and (not had_it or now() >= away_until):
                return max(available, key=lambda worker: _suits(worker, build))
            if not await build.changed(away_until if available else none_until) and not available:
                raise BuildFailed(
                    f"no worker has been connected for {NO_WORKER_S:.0f} s, so nothing can build the image: "
                    "see that `aeolian up` (or `aeolian worker`) runs, then try again"
                )

    async def _bring_bases(self, build: Build, worker: Worker) -> bool:
        """Whether a base image had to be built again, since this worker does not have it."""
        missing = set(build.image.base_image_ids) - worker.image_ids - build.brought
        for base_id in missing:
            build.brought.add(base_id)
            base = await self._base(base_id)
            if base_id not in worker.image_ids:
                await self.begin(again(base), None, is_new=False, prefers=worker.worker_id)
                await self._base(base_id)
        return bool(missing)

    async def _finish(self, build: Build, image: Image) -> None:
        finished = msgspec.structs.replace(image, finished_at=self._clock.now())
        stored = await self._keep(lambda c: storage.finish(c, finished))
        build.image = stored or finished
        if stored is not None:
            self._on_finished(stored)
        if image.status is not Status.SUCCESS:
            log.info("image %s could not be built: %s", image.image_id, image.error.strip().splitlines()[-1:])
        try:
            await self._logs.task_ended(image.app_id, image.build_id)
        except Unavailable:
            pass  # shutting down
        if self._builds.get(image.image_id) is build:
            del self._builds[image.image_id]
        build.done.set()

    async def _note_loss(self, build: Build, num_losses: int) -> None:
        build.image = msgspec.structs.replace(build.image, num_losses=num_losses)
        await self._keep(lambda c: storage.lost(c, build.image.image_id, num_losses))

    async def _keep(self, write: Callable[[Connection], T]) -> T:
        """Write until the database takes it."""
        while True:
            try:
                return await self._database.write(write)
            except Unavailable:
                await asyncio.sleep(RETRY_S)


def again(image: Image) -> Image:
    """The same image, to be built once more."""
    return msgspec.structs.replace(image, build_id=new_id("container"), is_fresh=False)


def _suits(worker: Worker, build: Build) -> tuple[bool, int]:
    has = sum(base_id in worker.image_ids for base_id in build.image.base_image_ids)
    return worker.worker_id == build.prefers, has


def _details(image: Image, info: dict[str, str]) -> api_pb2.ImageMetadata:
    """What clients are told of a finished image."""
    version = info.get("python_version", "")
    packages = msgspec.json.decode(info.get("python_packages") or "{}", type=dict[str, str])
    return api_pb2.ImageMetadata(
        python_version_info=f"Python {version}" if version[:1].isdigit() else version,
        python_packages=packages,
        workdir=info.get("workdir", ""),
        libc_version_info=info.get("libc_version", ""),
        image_builder_version=info.get("image_builder_version") or image.builder_version,
    )
