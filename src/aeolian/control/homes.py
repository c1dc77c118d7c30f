"""Which environment an object is in, told by its id, for each kind of object that is in one (see `access`)."""

from aeolian.control.access import Home
from aeolian.control.apps import Apps
from aeolian.control.calls import Calls
from aeolian.control.containers import Containers
from aeolian.control.functions import Functions
from aeolian.domain.caller import Caller
from aeolian.domain.calls import key_of
from aeolian.storage import functions as functions_storage
from aeolian.storage import named_objects, volumes
from aeolian.storage.database import Database


def homes(
    database: Database, apps: Apps, functions: Functions, calls: Calls, containers: Containers
) -> dict[str, Home]:
    """By the prefix of their ids."""

    async def app(app_id: str | None, caller: Caller) -> str | None:
        found = await apps.look_up(app_id) if app_id else None
        return found.environment_id if found is not None else None

    async def function(function_id: str, caller: Caller) -> str | None:
        if functions.has(function_id):
            return await app(functions.row(function_id).app_id, caller)
        row = await database.read(lambda c: functions_storage.get_function(c, function_id))
        return await app(row.app_id if row is not None else None, caller)

    async def of_class(class_id: str, caller: Caller) -> str | None:
        return await app(await database.read(lambda c: functions_storage.app_of_class(c, class_id)), caller)

    async def call(call_id: str, caller: Caller) -> str | None:
        return await app((await calls.open(call_id, caller)).app_id, caller)

    async def of_input(input_id: str, caller: Caller) -> str | None:
        return await call(key_of(input_id).call_id, caller)

    async def container(task_id: str, caller: Caller) -> str | None:
        return await app(await containers.app_of_task(task_id), caller)

    async def named(object_id: str, caller: Caller) -> str | None:
        found = await database.read(lambda c: named_objects.get(c, object_id))
        return found.environment_id if found is not None else None

    async def volume(volume_id: str, caller: Caller) -> str | None:
        found = await database.read(lambda c: volumes.get_volume(c, volume_id))
        return found.environment_id if found is not None else None

    return {
        "ap": app,
        "fu": function,
        "cs": of_class,
        "fc": call,
        "in": of_input,
        "ta": container,
        "di": named,
        "qu": named,
        "st": named,
        "vo": volume,
    }
