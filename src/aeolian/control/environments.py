"""Environments: found by name, made, changed and deleted. The default one is always there."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable

import msgspec
from sqlalchemy.engine import Connection

from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from aeolian.domain.ids import new_id
from aeolian.domain.suggestions import instead_of
from aeolian.storage import environments as storage
from aeolian.storage.database import Database, kept_reply
from aeolian.storage.environments import Environment

log = logging.getLogger(__name__)

DEFAULT_NAME = "main"
RECHECK_S = 2.0
"""How long what is known of their limits is believed: `aeolian quota` and `aeolian token` may have changed it."""
REFRESH_S = 1.0
"""How long others wait for what is known to be read again."""
BUILDER_VERSION = "2025.06"
BUILDER_VERSIONS = ("2023.12", "2024.04", "2024.10", "2025.06", "2026.10", "PREVIEW")
OLD_SDKS_KNOW = ("2023.12", "2024.04", "2024.10", "2025.06", "PREVIEW")
NAME = re.compile(r"(?!en-)[a-zA-Z0-9][a-zA-Z0-9-_.]{0,63}", re.IGNORECASE)
"""What begins like an environment's id could be mistaken for one."""
LIMITS = ("max_containers", "max_milli_cpu", "max_memory_mb", "max_gpus", "is_restricted")
WEB_SUFFIX = re.compile(r"[a-z0-9-]{0,32}")


class Environments:
    def __init__(self, database: Database, clock: Clock):
        self.when_deleted: list[Callable[[str, str], Awaitable[None]]] = []
        """Called with (environment id, who) before an environment goes: what is in it goes first."""
        self.when_renamed: list[Callable[[str, str], Awaitable[None]]] = []
        """Called with (environment id, new name)."""
        self._database = database
        self._clock = clock
        self._by_name: dict[str, Environment] = {}
        self._checked_at = clock.monotonic()

    async def load(self) -> None:
        """Read them all; make the default one at the first start."""
        for environment in await self._database.read(storage.all_environments):
            self._by_name[environment.name] = environment
        if not any(environment.is_default for environment in self._by_name.values()):
            first = self._new(DEFAULT_NAME, is_default=True)
            await self._database.write(lambda c: storage.insert(c, first))
            self._by_name[first.name] = first

    def resolve(self, name: str, caller: Caller) -> Environment:
        """By name; "" is the container's own environment, or a client's default one. Raises NotFound."""
        if caller.is_container and name in ("", caller.environment_was):
            name = caller.environment_name
        if not name:
            return self.default
        found = self._by_name.get(name)
        if found is None:
            raise NotFound(
                f"there is no environment '{name}', which `modal environment create {name}` would make"
                f"{instead_of(name, self._by_name)}"
            )
        return found

    @property
    def default(self) -> Environment:
        return next(environment for environment in self._by_name.values() if environment.is_default)

    def by_id(self, environment_id: str) -> Environment | None:
        return next((one for one in self._by_name.values() if one.id == environment_id), None)

    def id_of(self, name: str) -> str:
        """ "" when there is none of that name."""
        environment = self._by_name.get(name)
        return environment.id if environment is not None else ""

    def is_restricted(self, environment_id: str) -> bool:
        """Whether its containers stay inside. Those of one that is being deleted do."""
        environment = self.by_id(environment_id)
        return environment is None or environment.is_restricted

    async def refresh(self) -> None:
        """Learn which limits other processes have set meanwhile."""
        self._checked_at = self._clock.monotonic()
        for stored in await self._database.read(storage.all_environments):
            if (known := self.by_id(stored.id)) is not None:
                limits = {name: getattr(stored, name) for name in LIMITS}
                self._by_name[known.name] = msgspec.structs.replace(known, **limits)

    async def keep_fresh(self) -> None:
        """`refresh` when it is time. Never raises, nor waits for long: while the database is away, the last limits hold."""
        if self._clock.monotonic() - self._checked_at <= RECHECK_S:
            return
        try:
            async with asyncio.timeout(REFRESH_S):
                await self.refresh()
        except Exception as error:
            log.warning("the limits of environments could not be read, those from before hold: %r", error)

    async def set_limits(self, name: str, caller: Caller, **limits: int) -> Environment:
        """Set some of LIMITS. Raises NotFound."""
        environment = self.resolve(name, caller)
        await self._database.write(lambda c: storage.update(c, environment.id, {**limits}))
        await self.refresh()
        return self.resolve(name, caller)

    def all(self) -> list[Environment]:
        return sorted(self._by_name.values(), key=lambda environment: environment.created_at)

    async def create(self, name: str, *, is_restricted: bool = False, once: str | None = None) -> Environment:
        """`once` names the request (`Database.write`). Raises InvalidArgument, AlreadyExists."""
        _check_name(name)
        new = msgspec.structs.replace(self._new(name), is_restricted=is_restricted)

        def insert(connection) -> Environment:
            if any(one.name == name for one in storage.all_environments(connection)):
                raise AlreadyExists(f"an environment named '{name}' already exists")
            storage.insert(connection, new)
            return new

        environment = await self._database.write(insert, once=once, kind=Environment)
        return self._by_name.setdefault(name, environment)

    async def update(
        self,
        name: str,
        caller: Caller,
        *,
        new_name: str | None = None,
        web_suffix: str | None = None,
        max_containers: int | None = None,
        max_gpus: int | None = None,
        image_builder_version: str | None = None,
    ) -> Environment:
        """Change what is given. Raises NotFound, InvalidArgument, AlreadyExists."""
        once = caller.once("EnvironmentUpdate")
        if (done := await self._done_before(once)) is not None and (changed := self.by_id(done)) is not None:
            return changed
        before = self.resolve(name, caller)
        changes: dict[str, str | int] = {}
        if new_name is not None and new_name != before.name:
            _check_name(new_name)
            if new_name in self._by_name:
                raise AlreadyExists(f"an environment named '{new_name}' already exists")
            changes["name"] = new_name
        if web_suffix is not None:
            if not WEB_SUFFIX.fullmatch(web_suffix):
                raise InvalidArgument(f"{web_suffix!r} cannot be a web suffix: use up to 32 of a-z, 0-9 and dashes")
            changes["web_suffix"] = web_suffix
        if max_containers is not None:
            changes["max_containers"] = max(0, max_containers)
        if max_gpus is not None:
            changes["max_gpus"] = max(0, max_gpus)
        if image_builder_version:
            if image_builder_version not in BUILDER_VERSIONS:
                raise InvalidArgument(
                    f"{image_builder_version!r} is no image builder version: use one of {', '.join(BUILDER_VERSIONS)}"
                )
            changes["image_builder_version"] = image_builder_version

        def change(connection: Connection) -> str:
            storage.update(connection, before.id, changes)
            return before.id

        await self._database.write(change, once=once)
        after = msgspec.structs.replace(self.by_id(before.id) or before, **changes)
        del self._by_name[before.name]
        self._by_name[after.name] = after
        if after.name != before.name:
            for callback in self.when_renamed:
                await callback(after.id, after.name)
        return after

    async def delete(self, name: str, caller: Caller) -> None:
        """With all that is in it. Raises NotFound, FailedPrecondition for the default one."""
        once = caller.once("EnvironmentDelete")
        if await self._done_before(once) is not None:
            return
        environment = self.resolve(name, caller)
        if environment.is_default:
            raise FailedPrecondition(f"'{environment.name}' is the default environment: it cannot be deleted")
        # From now on nothing can be made in it.
        del self._by_name[environment.name]
        try:
            for callback in self.when_deleted:
                await callback(environment.id, caller.workspace)

            def delete(connection: Connection) -> str:
                storage.delete(connection, environment.id)
                return environment.id

            await self._database.write(delete, once=once)
        except BaseException:
            self._by_name.setdefault(environment.name, environment)
            raise

    async def _done_before(self, once: str | None) -> str | None:
        """The id of the environment that a repetition of this request changed, in this life of the server or before."""
        return await self._database.read(lambda c: kept_reply(c, once)) if once is not None else None

    def builder_version_for(self, environment: Environment, caller: Caller) -> str:
        """The environment's image builder version, as far as the caller's SDK knows it."""
        version = environment.image_builder_version
        if version not in OLD_SDKS_KNOW and _series(caller.sdk_version) < (1, 6):
            return BUILDER_VERSION
        return version

    def _new(self, name: str, *, is_default: bool = False) -> Environment:
        return Environment(
            id=new_id("environment"),
            name=name,
            web_suffix="" if is_default else _suffix(name),
            image_builder_version=BUILDER_VERSION,
            is_default=is_default,
            created_at=self._clock.now(),
        )


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise InvalidArgument(
            f"{name!r} cannot be the name of an environment: use up to 64 letters, digits, dashes, underscores and periods, "
            "a letter or digit first, and not 'en-'"
        )


def _suffix(name: str) -> str:
    return re.sub(r"[^a-z0-9-]", "-", name.lower())[:32]


def _series(sdk_version: str) -> tuple[int, int]:
    parts = sdk_version.split(".")
    return (
        (int(parts[0]), int(parts[1])) if len(parts) > 1 and parts[0].isdecimal() and parts[1].isdecimal() else (1, 6)
    )
