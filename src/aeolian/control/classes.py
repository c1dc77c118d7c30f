"""Classes: an id beside the service Function `Cls.*` that does the work."""

from modal_proto import api_pb2

from aeolian.control.apps import Apps
from aeolian.control.functions import Functions
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import InvalidArgument, NotFound
from aeolian.domain.ids import new_id
from aeolian.domain.suggestions import instead_of
from aeolian.storage import functions as storage
from aeolian.storage.database import Database


class Classes:
    def __init__(self, database: Database, clock: Clock, apps: Apps, functions: Functions):
        self._database = database
        self._clock = clock
        self._apps = apps
        self._functions = functions

    async def create(self, app_id: str, existing_class_id: str, caller: Caller) -> str:
        """The id of a class of the app: the existing one as it is, else a new one."""
        await self._apps.find_living(app_id, caller)
        if existing_class_id:
            owner = await self._database.read(lambda c: storage.app_of_class(c, existing_class_id))
            if owner is None:
                raise NotFound(f"there is no class {existing_class_id!r}")
            if owner != app_id:
                raise InvalidArgument(f"{existing_class_id} is not a class of App {app_id}")
            return existing_class_id
        class_id, now = new_id("class"), self._clock.now()
        await self._database.write(lambda c: storage.insert_class(c, class_id, app_id, now))
        return class_id

    async def named(self, app_name: str, tag: str, environment_name: str, version: int, caller: Caller) -> str:
        """The id of a deployed class. Raises NotFound."""
        app = self._apps.deployed(app_name, environment_name, caller)
        layout = await self._functions.layout_at(app.app_id, version) if version else self._functions.layout(app.app_id)
        class_id = layout.classes.get(tag)
        if class_id is None:
            if tag in layout.functions:
                raise NotFound(f"'{tag}' is a Function of App '{app_name}': look it up with modal.Function.from_name")
            at = f" at version {version}" if version else ""
            raise NotFound(f"App '{app_name}' has no class '{tag}'{at}{instead_of(tag, layout.classes)}")
        return class_id

    async def describe(self, class_ids: set[str], caller: Caller) -> dict[str, api_pb2.Object]:
        """Those of these ids that exist (see `dependencies`)."""
        owners = await self._database.read(lambda c: storage.apps_of_classes(c, class_ids))
        return {
            class_id: api_pb2.Object(object_id=class_id, class_handle_metadata=api_pb2.ClassHandleMetadata())
            for class_id, app_id in owners.items()
            if (app := self._apps.known(app_id)) is not None and app.workspace == caller.workspace
        }
