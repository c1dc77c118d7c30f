"""What Secrets, Dicts and Queues have in common: found by name, made, kept alive by heartbeats, deleted."""

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from modal_proto import api_pb2
from sqlalchemy.engine import Connection

from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import AlreadyExists, InvalidArgument, NotFound
from aeolian.domain.ids import new_id
from aeolian.storage import named_objects as storage
from aeolian.storage.database import Database
from aeolian.storage.named_objects import NamedObject

log = logging.getLogger(__name__)

NAME = re.compile(r"[a-zA-Z0-9-_.]{1,64}")
APP_ID = re.compile(r"ap-[a-zA-Z0-9]{22}")
"""Clients refuse names that look like one: they could mean either."""
HEARTBEAT_TIMEOUT_S = 900.0
"""The SDK's ephemeral objects beat every 300 s."""
SWEEP_S = 30.0
FOREVER = 1e18


class Environment(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...


class Environments(Protocol):
    def resolve(self, name: str, caller: Caller) -> Environment: ...


class NamedObjects:
    """Objects of one noun. `delete_contents(connection, object_id)` removes what belongs to one."""

    def __init__(
        self,
        noun: str,
        database: Database,
        clock: Clock,
        environments: Environments,
        delete_contents: Callable[[Connection, str], None],
        *,
        silent_after_s: float = HEARTBEAT_TIMEOUT_S,
    ):
        self.check_owner: Callable[[str, Caller], object] = lambda app_id, caller: None
        """Raises NotFound or FailedPrecondition for an app that cannot own anything (any more)."""
        self.when_deleted: list[Callable[[str], None]] = []
        """Called with the id of an object that is gone."""
        self.noun = noun
        self.title = noun.capitalize()
        self._database = database
        self._clock = clock
        self._environments = environments
        self._delete_contents = delete_contents
        self._silent_after_s = silent_after_s
        self._heard_at: dict[str, float] = {}
        self._last_created_at = 0.0
        self._sweeper: asyncio.Task | None = None

    async def open(self) -> None:
        """Ephemeral objects get a full timeout to be heard of again."""
        now = self._clock.now()
        self._last_created_at = await self._database.read(lambda c: storage.newest_created_at(c, self.noun))
        for object_id in await self._database.read(lambda c: storage.ids_where(c, self.noun, kind="ephemeral")):
            self._heard_at[object_id] = now
        self._sweeper = asyncio.create_task(self._sweep_forever(), name=f"{self.noun}-sweep")

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper

    # ---- finding ----------------------------------------------------------------------------------------

    async def lookup(self, name: str, environment_name: str, caller: Caller) -> NamedObject:
        """Raises NotFound."""
        environment = self._environments.resolve(environment_name, caller)
        found = await self._database.read(lambda c: storage.find(c, self.noun, environment.id, name))
        if found is None:
            raise NotFound(
                f"{self.title} '{name}' not found in environment '{environment.name}': "
                f"`modal {self.noun} list` shows those there are, `modal {self.noun} create {name}` makes it"
            )
        return found

    async def get(self, object_id: str, caller: Caller) -> NamedObject:
        """By id. Raises NotFound."""
        return await self._database.read(lambda c: self.existing(c, object_id, caller))

    def existing(self, connection: Connection, object_id: str, caller: Caller) -> NamedObject:
        found = storage.get(connection, object_id)
        if found is None or found.noun != self.noun or not _is_seen(found, caller):
            raise NotFound(f"there is no {self.title} with the id {object_id!r}: it was never made, or is deleted")
        return found

    async def describe(self, object_ids: set[str], caller: Caller) -> dict[str, api_pb2.Object]:
        """Those of these ids that exist (see `dependencies`)."""
        found = await self._database.read(lambda c: storage.get_many(c, list(object_ids)))
        return {
            item.object_id: api_pb2.Object(object_id=item.object_id)
            for item in found
            if item.noun == self.noun and _is_seen(item, caller)
        }

    async def list_named(
        self, environment_name: str, caller: Caller, created_before: float, limit: int
    ) -> tuple[str, list[NamedObject]]:
        """The environment's name, and its named objects, newest first."""
        environment = self._environments.resolve(environment_name, caller)
        found = await self._database.read(
            lambda c: storage.list_named(c, self.noun, environment.id, created_before or FOREVER, limit)
        )
        return environment.name, found

    # ---- making -----------------------------------------------------------------------------------------

    async def create(
        self,
        name: str,
        environment_name: str,
        caller: Caller,
        *,
        if_exists: str,
        fill: Callable[[Connection, str], None] = lambda connection, object_id: None,
    ) -> NamedObject:
        """The object of that name, made and filled if need be. `if_exists`: `return` it, `fail`, or `replace` it.

        A replaced one keeps its id.
        """
        if not NAME.fullmatch(name) or APP_ID.fullmatch(name):
            raise InvalidArgument(
                f"{name!r} cannot be the name of a {self.title}: use 1 to 64 letters, digits, dashes, underscores and "
                "periods, and no App ID"
            )
        environment = self._environments.resolve(environment_name, caller)
        item = self._new(environment.id, name, "named", caller)

        def create(connection: Connection) -> NamedObject:
            old = storage.find(connection, self.noun, environment.id, name)
            if old is not None and if_exists == "fail":
                raise AlreadyExists(f"a {self.title} named '{name}' already exists in environment '{environment.name}'")
            if old is not None and if_exists == "return":
                return old
            if old is not None:
                self._delete_contents(connection, old.object_id)
                fill(connection, old.object_id)
                return old
            storage.insert(connection, item)
            fill(connection, item.object_id)
            return item

        once = caller.once(f"{self.title}GetOrCreate") if if_exists == "fail" else None
        return await self._database.write(create, once=once, kind=NamedObject)

    async def create_anonymous(
        self,
        environment_name: str,
        caller: Caller,
        *,
        app_id: str = "",
        fill: Callable[[Connection, str], None] = lambda connection, object_id: None,
    ) -> NamedObject:
        """One without a name: of an app, or (no `app_id`) ephemeral, alive while its client beats."""
        if app_id:
            self.check_owner(app_id, caller)
        environment = self._environments.resolve(environment_name, caller)
        item = self._new(environment.id, "", "owned" if app_id else "ephemeral", caller, app_id)

        def create(connection: Connection) -> NamedObject:
            storage.insert(connection, item)
            fill(connection, item.object_id)
            return item

        once = caller.once(f"{self.title}GetOrCreate")
        item = await self._database.write(create, once=once, kind=NamedObject)
        if not app_id:
            self._heard_at[item.object_id] = self._clock.now()
        return item

    async def heartbeat(self, object_id: str, caller: Caller) -> None:
        """Raises NotFound for one that is gone."""
        if object_id not in self._heard_at:
            await self.get(object_id, caller)
            return
        self._heard_at[object_id] = self._clock.now()

    def used(self, object_ids: Sequence[str]) -> None:
        """Ephemeral ones among these stay alive as if they had been heard of."""
        now = self._clock.now()
        for object_id in self._heard_at.keys() & set(object_ids):
            self._heard_at[object_id] = now

    # ---- ending -----------------------------------------------------------------------------------------

    async def delete(self, object_id: str, caller: Caller) -> None:
        """With all that is in it. Raises NotFound."""

        def delete(connection: Connection) -> None:
            self.existing(connection, object_id, caller)
            self._delete(object_id, connection)

        await self._database.write(delete, once=caller.once(f"{self.title}Delete"))
        self._deleted(object_id)

    async def delete_owned_by(self, app_id: str) -> None:
        """The app has come to its end."""
        await self._delete_where(app_id=app_id)

    async def delete_in(self, environment_id: str) -> None:
        """The environment goes."""
        await self._delete_where(environment_id=environment_id)

    async def _delete_where(self, **values: str) -> None:
        def delete(connection: Connection) -> list[str]:
            object_ids = storage.ids_where(connection, self.noun, **values)
            for object_id in object_ids:
                self._delete(object_id, connection)
            return object_ids

        for object_id in await self._database.write(delete):
            self._deleted(object_id)

    def _delete(self, object_id: str, connection: Connection) -> None:
        self._delete_contents(connection, object_id)
        storage.delete(connection, object_id)

    def _deleted(self, object_id: str) -> None:
        self._heard_at.pop(object_id, None)
        for callback in self.when_deleted:
            callback(object_id)

    async def sweep(self) -> None:
        """Delete ephemeral objects that nobody was heard for."""
        horizon = self._clock.now() - self._silent_after_s
        for object_id in [object_id for object_id, at in self._heard_at.items() if at < horizon]:
            await self._database.write(partial(self._delete, object_id))
            self._deleted(object_id)

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self.sweep()
            except Exception:
                log.exception("a sweep of the %ss failed; the next one tries again", self.noun)

    def _new(self, environment_id: str, name: str, kind: str, caller: Caller, app_id: str = "") -> NamedObject:
        # Clients page by created_at, so no two may be equal.
        self._last_created_at = max(self._clock.now(), self._last_created_at + 1e-5)
        return NamedObject(
            object_id=new_id(self.noun),
            noun=self.noun,
            environment_id=environment_id,
            name=name,
            kind=kind,
            app_id=app_id,
            workspace=caller.workspace,
            created_at=self._last_created_at,
        )


def _is_seen(item: NamedObject, caller: Caller) -> bool:
    return item.workspace == caller.workspace and caller.sees(item.environment_id)
