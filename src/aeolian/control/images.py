"""Images: asked for by definition, built once, found by id or by name.

An image's id is made of its definition, so Apps that define the same image share it. One that is built anew without
the cache gets an id of its own: what runs on the old one stays on it, and what is defined on top of it is built anew.

    recipe (digest of a definition) --current--> im-1
                                    --force_build--> im-2, current once it is built
                                    --ignore_cache--> im-3, never current
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple

import msgspec
from modal_proto import api_pb2
from sqlalchemy.engine import Connection

from aeolian.control import image_definitions
from aeolian.control.apps import Apps
from aeolian.control.calls import Calls
from aeolian.control.container_state import Container
from aeolian.control.environments import Environments
from aeolian.control.functions import Functions
from aeolian.control.image_builds import ImageBuilds, again
from aeolian.control.image_names import ImageNames
from aeolian.control.image_state import Build
from aeolian.control.logs import AppLogs, LogPlace
from aeolian.control.mounts import Mounts
from aeolian.control.secrets import Secrets
from aeolian.control.workers import Worker, Workers
from aeolian.domain.caller import Caller
from aeolian.domain.calls import Status
from aeolian.domain.clock import Clock
from aeolian.domain.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from aeolian.domain.ids import content_id, new_id
from aeolian.domain.logs import LogBatch, LogFilter
from aeolian.storage import images as storage
from aeolian.storage.database import Database, kept_reply
from aeolian.storage.images import Image

MAX_KNOWN = 4096
MAX_CHAIN = 500


class Request(NamedTuple):
    """What a client asks for."""

    app_id: str
    definition: api_pb2.Image
    builder_version: str
    function_id: str = ""
    """The Function that builds it, where one does."""
    force_build: bool = False
    ignore_cache: bool = False


class SavedFrom(NamedTuple):
    """What the file system of a container is kept as."""

    image_id: str = ""
    build_id: str = ""


class Images:
    """Also what `protocol.worker_link` tells of builds, and what `container_specs` asks."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        apps: Apps,
        environments: Environments,
        workers: Workers,
        mounts: Mounts,
        secrets: Secrets,
        functions: Functions,
        calls: Calls,
        logs: AppLogs,
    ):
        self._database = database
        self._clock = clock
        self._apps = apps
        self._workers = workers
        self._mounts = mounts
        self._secrets = secrets
        self._functions = functions
        self._logs = logs
        self.names = ImageNames(database, clock, environments)
        self._builds = ImageBuilds(database, clock, workers, mounts, secrets, calls, logs, self._keep)
        self._known: dict[str, Image] = {}
        """Images that were asked for lately, as they are stored, except while they are being built."""
        self._creating = asyncio.Lock()
        apps.when_stopped.append(self._builds.app_stopped)

    # ---- life of the service ----------------------------------------------------------------------------

    async def load(self) -> None:
        """Read the unfinished builds. `containers.load` may follow."""
        await self._builds.load()

    async def open(self) -> None:
        """Go on with unfinished builds: those of functions need what `containers.load` has read."""
        self._builds.open()

    async def close(self) -> None:
        await self._builds.close()

    # ---- asking for an image ----------------------------------------------------------------------------

    async def get_or_create(self, request: Request, caller: Caller) -> Image:
        """The image of a definition: built, or with its build under way. A failed one is tried again.

        Raises InvalidArgument, NotFound naming objects that do not exist, FailedPrecondition for a failed base.
        """
        app = await self._apps.find_living(request.app_id, caller)
        if caller.is_container and app.environment_name != caller.environment_name:
            raise PermissionDenied(
                f"a container of environment '{caller.environment_name}' cannot build images in "
                f"environment '{app.environment_name}'"
            )
        definition = request.definition
        image_definitions.check(definition, request.builder_version, request.function_id)
        await self._check_references(request, caller)
        secrets = await self._secrets.fingerprint(definition.secret_ids)
        recipe = image_definitions.recipe(definition, request.builder_version, caller.workspace, secrets)
        async with self._creating:  # one at a time: equal requests must find each other
            if request.force_build or request.ignore_cache:
                return await self._fresh(request, recipe, caller)
            return await self._cached(request, recipe, caller)

    async def _cached(self, request: Request, recipe: str, caller: Caller) -> Image:
        current = await self._database.read(lambda c: storage.current(c, recipe))
        if current is None:
            image = self._new(request, recipe, caller, content_id("image", recipe.encode()))
            if (running := self._builds.get(image.image_id)) is not None:
                return self._joined(running, request)
            # A deleted image may be asked for again, and one that a newer one replaced.
            old = await self._database.read(lambda c: storage.get(c, image.image_id))
            return (await self._builds.begin(image, request.definition, is_new=old is None)).image
        if (running := self._builds.get(current.image_id)) is not None:
            return self._joined(running, request)
        if current.status is Status.SUCCESS and self._is_at_hand(current.image_id):
            self._keep(current)
            return current
        image = msgspec.structs.replace(
            again(current), app_id=request.app_id, function_id=request.function_id, base_image_ids=_bases(request)
        )
        return (await self._builds.begin(image, request.definition, is_new=False)).image

    async def _fresh(self, request: Request, recipe: str, caller: Caller) -> Image:
        """Built anew: in place of the current one once it is built, or (`ignore_cache`) beside it."""
        becomes_current = not request.ignore_cache
        if (running := self._builds.fresh(recipe, becomes_current=becomes_current)) is not None:
            return self._joined(running, request)
        image = self._new(request, recipe, caller, "")
        image = msgspec.structs.replace(
            image,
            image_id=content_id("image", f"{recipe}/{image.build_id}".encode()),
            is_current=False,
            becomes_current=becomes_current,
            is_fresh=True,
        )
        return (await self._builds.begin(image, request.definition, is_new=True)).image

    def _new(self, request: Request, recipe: str, caller: Caller, image_id: str) -> Image:
        return Image(
            image_id=image_id,
            recipe=recipe,
            is_current=True,
            becomes_current=True,
            workspace=caller.workspace,
            builder_version=request.builder_version,
            base_image_ids=_bases(request),
            function_id=request.function_id,
            app_id=request.app_id,
            build_id=new_id("container"),
            created_at=self._clock.now(),
        )

    def _joined(self, build: Build, request: Request) -> Image:
        build.asking.setdefault(request.app_id, request.function_id)
        return build.image

    async def _check_references(self, request: Request, caller: Caller) -> None:
        definition = request.definition
        for base in definition.base_images:
            image = await self.get(base.image_id, caller)
            if image.status not in (Status.SUCCESS, Status.PENDING):
                raise FailedPrecondition(f"base image {base.image_id} could not be built: {image.error}")
        if definition.context_mount_id:
            await self._mounts.spec(definition.context_mount_id)
        secret_ids = [*definition.secret_ids, definition.image_registry_config.secret_id]
        for secret_id in filter(None, secret_ids):
            await self._secrets.objects.get(secret_id, caller)
        if definition.HasField("build_function"):
            row = self._functions.row(request.function_id, caller)
            function = self._functions.current(request.function_id).function
            if row.app_id != request.app_id or not function.is_builder_function:
                raise InvalidArgument(f"{request.function_id} is not a build function of App {request.app_id}")
            if function.image_id != definition.base_images[0].image_id:
                raise InvalidArgument(
                    f"build function {request.function_id} runs on image {function.image_id}, but the image that it "
                    f"makes lies over {definition.base_images[0].image_id}"
                )

    # ---- finding ----------------------------------------------------------------------------------------

    async def get(self, image_id: str, caller: Caller | None = None) -> Image:
        """By id, in whichever state. Raises NotFound."""
        if (build := self._builds.get(image_id)) is not None:
            image: Image | None = build.image
        elif (image := self._known.get(image_id)) is None:
            image = await self._database.read(lambda c: storage.get(c, image_id))
            if image is not None and self._builds.get(image_id) is None:
                self._keep(image)
        if image is None or (caller is not None and image.workspace != caller.workspace):
            raise NotFound(f"there is no image {image_id!r}: it was never built on this server, or it was deleted")
        return image

    async def built(self, image_id: str, caller: Caller) -> Image:
        """As `get`, once its build is over. Raises FailedPrecondition with the build's error."""
        await self.get(image_id, caller)
        await self.wait_built(image_id)
        return await self.get(image_id, caller)

    async def wait_built(self, image_id: str) -> None:
        """Until containers can be started from it. Raises NotFound, FailedPrecondition with the build's error."""
        image = await self.get(image_id)
        build = self._builds.get(image_id)
        if build is None and image.status is Status.SUCCESS and not self._is_at_hand(image_id):
            async with self._creating:
                build = self._builds.get(image_id) or await self._builds.begin(again(image), None, is_new=False)
        if build is not None:
            await build.done.wait()
            image = await self.get(image_id)
        if image.status is not Status.SUCCESS:
            raise FailedPrecondition(f"image {image_id} could not be built: {image.error}")

    def builder_version_of(self, image_id: str) -> str:
        """Empty for an image that does not exist."""
        image = self._known.get(image_id)
        if image is None:
            image = self._database.read_now(lambda c: storage.get(c, image_id))
        return image.builder_version if image is not None else ""

    async def describe(self, image_ids: set[str], caller: Caller) -> dict[str, api_pb2.Object]:
        """Those of these ids that exist (see `dependencies`)."""
        found = await self._many(image_ids)
        return {
            image.image_id: api_pb2.Object(object_id=image.image_id)
            for image in found
            if image.workspace == caller.workspace
        }

    async def chain(self, image_id: str, caller: Caller) -> list[Image]:
        """The image and what lies under it, the lowest first."""
        chain: dict[str, Image] = {}
        wanted = [image_id]
        await self.get(image_id, caller)
        while wanted and len(chain) < MAX_CHAIN:
            for image in await self._many(wanted):
                chain.pop(image.image_id, None)
                chain[image.image_id] = image
            wanted = [base_id for one in wanted if one in chain for base_id in chain[one].base_image_ids]
        return list(reversed(chain.values()))

    async def delete(self, image_id: str, caller: Caller) -> None:
        """With its names. What was built on top of it stays. Raises NotFound, FailedPrecondition while it is built."""
        once = caller.once("ImageDelete")
        if once is not None and await self._database.read(lambda c: kept_reply(c, once)):
            return
        image = await self.get(image_id, caller)
        app = self._apps.known(image.app_id)
        if caller.is_container and (app is None or app.environment_name != caller.environment_name):
            raise PermissionDenied(
                f"a container of environment '{caller.environment_name}' cannot delete images of other environments"
            )

        async with self._creating:
            if self._builds.get(image_id) is not None:
                raise FailedPrecondition(f"image {image_id} is being built: stop its App, or wait for the end")

            def delete(connection: Connection) -> bool:
                storage.delete(connection, image_id)
                return True

            await self._database.write(delete, once=once)
            self._known.pop(image_id, None)

    # ---- output of builds -------------------------------------------------------------------------------

    async def follow(
        self, image_id: str, caller: Caller, entry_id: str, timeout_s: float
    ) -> AsyncIterator[tuple[str, LogBatch] | Image]:
        """Output of the newest build after an entry, each batch with its own entry id; last, the finished image.

        Ends without it after `timeout_s` seconds.
        """
        image = await self.get(image_id, caller)
        build_id, _, number = entry_id.partition("/")
        is_known = build_id == image.build_id and number.isascii() and number.isdigit() and len(number) < 19
        after = int(number) if is_known else image.logs_after
        build = self._builds.get(image_id)

        def is_over() -> bool:
            return build is None or self._builds.get(image_id) is not build

        wanted = LogFilter(task_id=image.build_id)
        async for item in self._logs.follow(image.app_id, after, wanted, timeout_s, is_over):
            if isinstance(item, LogBatch):
                yield f"{image.build_id}/{item.last_seq}", item
        now = await self.get(image_id, caller)
        if now.build_id == image.build_id and now.status is not Status.PENDING:
            yield now

    # ---- what workers and containers say ----------------------------------------------------------------

    def log_place(self, image_id: str) -> LogPlace | None:
        """Where the output of its build is kept: with the App that asked for it. None: `find_log_place` knows."""
        build = self._builds.get(image_id)
        image = build.image if build is not None else self._known.get(image_id)
        return LogPlace(image.app_id, image.build_id, image_id=image_id) if image is not None else None

    async def find_log_place(self, image_id: str) -> LogPlace | None:
        """Also of builds that ended long ago; None: there is no such image."""
        image = await self._database.read(lambda c: storage.get(c, image_id))
        return LogPlace(image.app_id, image.build_id, image_id=image_id) if image is not None else None

    async def on_built(self, image_id: str, build_id: str, error: str, info: dict[str, str]) -> None:
        self._builds.built(image_id, build_id, error, info)

    def worker_connected(self, worker: Worker) -> None:
        self._builds.worker_connected(worker)

    def container_ended(self, container: Container) -> None:
        self._builds.container_ended(container.task_id, container.function_id)

    def saved_from(self, function_id: str) -> SavedFrom:
        """What a container of this build function is kept as."""
        build = self._builds.made_by(function_id)
        return SavedFrom(build.image.image_id, build.image.build_id) if build is not None else SavedFrom()

    # ---- inside -----------------------------------------------------------------------------------------

    async def _many(self, image_ids: Iterable[str]) -> list[Image]:
        return await self._database.read(lambda c: storage.get_many(c, image_ids))

    def _is_at_hand(self, image_id: str) -> bool:
        """Whether a worker has it; while none is connected, it is taken to be where it was."""
        available = self._workers.available()
        return not available or any(image_id in worker.image_ids for worker in available)

    def _keep(self, image: Image) -> None:
        self._known.pop(image.image_id, None)
        self._known[image.image_id] = image
        if len(self._known) > MAX_KNOWN:
            self._known.pop(next(iter(self._known)))


def metadata(image: Image) -> api_pb2.ImageMetadata:
    """What clients are told of it."""
    message = api_pb2.ImageMetadata.FromString(image.details)
    message.image_builder_version = message.image_builder_version or image.builder_version
    return message


def _bases(request: Request) -> tuple[str, ...]:
    return tuple(sorted({base.image_id for base in request.definition.base_images}))
