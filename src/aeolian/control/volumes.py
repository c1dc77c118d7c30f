"""Volumes: named file trees that containers mount. Here: the objects, not their files (`volume_contents`)."""

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Protocol

from modal_proto import api_pb2
from sqlalchemy.engine import Connection

from aeolian.control.volume_edits import existing_volume, no_such_volume
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from aeolian.domain.ids import ID_LENGTH, new_id
from aeolian.storage import volumes as storage
from aeolian.storage.database import Database
from aeolian.storage.volumes import Volume

log = logging.getLogger(__name__)

HEARTBEAT_TIMEOUT_S = 900.0
"""Clients beat every 300 s for an ephemeral volume; after this silence it is deleted."""
SWEEP_S = 60.0
DEFAULT_FS_VERSION = 2
NAME = re.compile(r"[a-zA-Z0-9-_.]{1,64}")
ID_LIKE = re.compile(rf"[a-zA-Z]+-[a-zA-Z0-9]{{{ID_LENGTH}}}")


class Environment(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...


class Environments(Protocol):
    def resolve(self, name: str, caller: Caller) -> Environment: ...


class Volumes:
    def __init__(self, database: Database, clock: Clock, environments: Environments):
        self.check_owner: Callable[[str, Caller], object] = lambda app_id, caller: None
        """Raises NotFound or FailedPrecondition for an app that cannot own anything (any more)."""
        self.when_dropped: list[Callable[[], None]] = []
        """Called when a Volume is gone: nobody may name its content any more."""
        self._database = database
        self._clock = clock
        self._environments = environments
        self._heard_at: dict[str, float] = {}
        self._last_created_at = 0.0
        self._sweeper: asyncio.Task | None = None

    # ---- life of the service ----------------------------------------------------------------------------

    async def open(self) -> None:
        """Take up the ephemeral volumes (their clients get a full timeout to come back) and start sweeping."""
        self._last_created_at = await self._database.read(storage.newest_created_at)
        now = self._clock.now()
        for volume_id in await self._database.read(lambda connection: storage.ids_of_kind(connection, "ephemeral")):
            self._heard_at[volume_id] = now
        self._sweeper = asyncio.create_task(self._sweep_forever(), name="volumes-sweep")

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self.sweep()
            except Exception:
                log.exception("a sweep of the volumes failed; the next one tries again")

    async def sweep(self) -> None:
        """Delete ephemeral volumes whose clients have fallen silent."""
        horizon = self._clock.now() - HEARTBEAT_TIMEOUT_S
        for volume_id in [volume_id for volume_id, at in self._heard_at.items() if at < horizon]:
            await self._database.write(partial(_delete, volume_id))
            self._deleted(volume_id)

    async def delete_owned_by(self, app_id: str) -> None:
        """The app has come to its end: its anonymous volumes go."""
        await self._delete_all(partial(storage.ids_owned_by, app_id=app_id))

    async def delete_in(self, environment_id: str) -> None:
        """The environment goes, and its volumes with it."""
        await self._delete_all(partial(storage.ids_in, environment_id=environment_id))

    async def _delete_all(self, which: Callable[[Connection], list[str]]) -> None:
        def delete(connection: Connection) -> list[str]:
            volume_ids = which(connection)
            for volume_id in volume_ids:
                storage.delete_volume(connection, volume_id)
            return volume_ids

        for volume_id in await self._database.write(delete):
            self._deleted(volume_id)

    def _deleted(self, volume_id: str) -> None:
        self._heard_at.pop(volume_id, None)
        for callback in self.when_dropped:
            callback()

    # ---- volumes ----------------------------------------------------------------------------------------

    async def describe(self, volume_ids: set[str], caller: Caller) -> dict[str, api_pb2.Object]:
        """Those of these ids that exist (see `dependencies`)."""
        found = await self._database.read(lambda c: [storage.get_volume(c, volume_id) for volume_id in volume_ids])
        return {
            volume.volume_id: api_pb2.Object(object_id=volume.volume_id, volume_metadata=metadata_of(volume))
            for volume in found
            if volume is not None and volume.created_by == caller.workspace and caller.sees(volume.environment_id)
        }

    async def lookup(self, name: str, environment_name: str, caller: Caller) -> Volume:
        """Raises NotFound."""
        environment = self._environments.resolve(environment_name, caller)
        volume = await self._database.read(lambda c: storage.find_volume(c, environment.id, name))
        return _found(volume, name, environment.name)

    async def create(
        self,
        name: str,
        environment_name: str,
        caller: Caller,
        *,
        fs_version: int = 0,
        options: dict[str, str] | None = None,
        if_exists: str = "return",
    ) -> Volume:
        """The volume of that name, made if need be. `if_exists`: `return` it, `fail`, or `replace` it."""
        _check_name(name)
        environment = self._environments.resolve(environment_name, caller)
        volume = self._new(environment.id, name, "named", caller, fs_version, options)

        def create(connection: Connection) -> Volume:
            old = storage.find_volume(connection, environment.id, name)
            if old is not None and if_exists == "return":
                _check_options(old, options)
                return old
            if old is not None and if_exists == "fail":
                raise AlreadyExists(f"a Volume named {name!r} already exists in environment {environment.name!r}")
            if old is not None:
                storage.delete_volume(connection, old.volume_id)
            storage.insert_volume(connection, volume)
            return volume

        once = caller.once("VolumeGetOrCreate") if if_exists != "return" else None
        return await self._database.write(create, once=once, kind=Volume)

    async def create_anonymous(
        self,
        environment_name: str,
        caller: Caller,
        *,
        app_id: str = "",
        fs_version: int = 0,
        options: dict[str, str] | None = None,
    ) -> Volume:
        """A volume without a name: of an app, or (no `app_id`) ephemeral, alive while its client beats."""
        if app_id:
            self.check_owner(app_id, caller)
        environment = self._environments.resolve(environment_name, caller)
        kind = "owned" if app_id else "ephemeral"
        new = self._new(environment.id, "", kind, caller, fs_version, options, app_id)

        def create(connection: Connection) -> Volume:
            storage.insert_volume(connection, new)
            return new

        volume = await self._database.write(create, once=caller.once("VolumeGetOrCreate"), kind=Volume)
        if kind == "ephemeral":
            self._heard_at[volume.volume_id] = self._clock.now()
        return volume

    async def heartbeat(self, volume_id: str, caller: Caller) -> None:
        """Raises NotFound for an ephemeral volume that is gone."""
        await self.get(volume_id, caller)
        if volume_id in self._heard_at:
            self._heard_at[volume_id] = self._clock.now()

    async def get(self, volume_id: str, caller: Caller) -> Volume:
        """One of the caller's workspace. Raises NotFound."""
        return await self._database.read(lambda connection: _own(connection, volume_id, caller))

    async def list_named(
        self, environment_name: str, caller: Caller, created_before: float = 0.0, limit: int = 100
    ) -> tuple[str, list[Volume]]:
        """The environment's name and its named volumes, newest first. `created_before` 0: from the newest."""
        environment = self._environments.resolve(environment_name, caller)
        before = created_before or float("inf")
        found = await self._database.read(
            lambda connection: storage.list_volumes(connection, environment.id, min(before, 1e18), limit)
        )
        return environment.name, found

    async def rename(self, volume_id: str, name: str, caller: Caller) -> None:
        """Raises NotFound, AlreadyExists."""
        _check_name(name)

        def rename(connection: Connection) -> None:
            volume = _own(connection, volume_id, caller)
            if not volume.name:
                raise FailedPrecondition(f"Volume {volume_id} is anonymous: it has no name to change")
            other = storage.find_volume(connection, volume.environment_id, name)
            if other is not None and other.volume_id != volume_id:
                raise AlreadyExists(f"a Volume named {name!r} already exists in this environment")
            storage.rename_volume(connection, volume_id, name)

        await self._database.write(rename)

    async def delete(self, volume_id: str, caller: Caller) -> None:
        """Delete the volume and all that is in it. Raises NotFound."""

        def delete(connection: Connection) -> None:
            _own(connection, volume_id, caller)
            _delete(volume_id, connection)

        await self._database.write(delete, once=caller.once("VolumeDelete"))
        self._deleted(volume_id)

    # ---- helpers ----------------------------------------------------------------------------------------

    def _new(
        self,
        environment_id: str,
        name: str,
        kind: str,
        caller: Caller,
        fs_version: int,
        options: dict[str, str] | None,
        app_id: str = "",
    ) -> Volume:
        if fs_version not in (0, 1, 2):
            raise InvalidArgument(f"volume version {fs_version} does not exist: use 1 or 2")
        # Clients page by created_at, so no two may be equal.
        self._last_created_at = max(self._clock.now(), self._last_created_at + 1e-5)
        return Volume(
            volume_id=new_id("volume"),
            environment_id=environment_id,
            name=name,
            fs_version=fs_version or DEFAULT_FS_VERSION,
            kind=kind,
            app_id=app_id,
            options=options or {},
            created_at=self._last_created_at,
            created_by=caller.workspace,
        )


def _own(connection: Connection, volume_id: str, caller: Caller) -> Volume:
    volume = existing_volume(connection, volume_id)
    if volume.created_by != caller.workspace or not caller.sees(volume.environment_id):
        raise no_such_volume(volume_id)
    return volume


def _delete(volume_id: str, connection: Connection) -> bool:
    return storage.delete_volume(connection, volume_id)


def _found(volume: Volume | None, name: str, environment_name: str) -> Volume:
    if volume is None:
        raise NotFound(f"Volume {name!r} not found in environment {environment_name!r}")
    return volume


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or ID_LIKE.fullmatch(name):
        raise InvalidArgument(
            f"{name!r} is not a name for a Volume: use 1 to 64 letters, digits, dashes, dots and underscores, not an id"
        )


def _check_options(volume: Volume, options: dict[str, str] | None) -> None:
    if options and options != volume.options:
        raise FailedPrecondition(
            f"Volume {volume.name!r} exists with other options ({volume.options}) than those asked for ({options})"
        )


def metadata_of(volume: Volume) -> api_pb2.VolumeMetadata:
    """What clients and containers are told of a volume."""
    return api_pb2.VolumeMetadata(
        version=volume.fs_version,  # type: ignore[arg-type]
        name=volume.name,
        creation_info=api_pb2.CreationInfo(created_at=volume.created_at, created_by=volume.created_by),
    )
