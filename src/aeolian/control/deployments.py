"""What an App contains, version by version: publish, roll back, roll over, promote.

A publication stores a new version and makes its layout live in one transaction; then the Functions and the
fleet learn of it. Containers that run go on with the code they started with and are replaced as they finish.
"""

import re
from collections.abc import Set
from typing import NamedTuple

import msgspec

from aeolian.control.apps import Apps, check_name, check_tags
from aeolian.control.functions import Functions
from aeolian.control.schedules import Schedules
from aeolian.domain.apps import App, AppState, AppVersion, DeploymentType, Layout
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from aeolian.storage import apps as storage
from aeolian.storage import functions as functions_storage
from aeolian.storage import schedules as schedules_storage
from aeolian.storage.database import Database

PREVIOUS = -1
"""As a version to roll back to: the one before the live one."""


DEPLOYMENT_TAG = re.compile(r"[a-zA-Z0-9-_.]{1,50}")


class Publication(msgspec.Struct, frozen=True):
    """What a client asks to publish. An app_state of None keeps the app's state (`modal serve` updates)."""

    app_id: str
    state: AppState | None
    name: str = ""
    function_ids: dict[str, str] = {}
    class_ids: dict[str, str] = {}
    definition_ids: dict[str, str] = {}
    tags: dict[str, str] = {}
    deployment_tag: str = ""
    commit_info: bytes = b""
    client_version: str = ""
    staged: bool = False


class _Outcome(NamedTuple):
    deployed_at: float
    is_live: bool = False
    removed: Set[str] = frozenset()


class Deployments:
    def __init__(self, database: Database, clock: Clock, apps: Apps, functions: Functions, schedules: Schedules):
        self._database = database
        self._clock = clock
        self._apps = apps
        self._functions = functions
        self._schedules = schedules

    async def publish(self, asked: Publication, caller: Caller) -> float:
        """Make this the app's content. Returns when it was deployed (epoch seconds), 0 when nothing changed."""
        check_tags(asked.tags)
        if asked.deployment_tag and not DEPLOYMENT_TAG.fullmatch(asked.deployment_tag):
            raise InvalidArgument(
                f"{asked.deployment_tag[:80]!r} cannot tag a deployment: use up to 50 letters, digits, dashes, "
                "underscores and periods"
            )
        return await self._tell(asked.app_id, await self._publish(asked, caller))

    async def _publish(self, asked: Publication, caller: Caller) -> "_Outcome":
        async with self._apps.changing(asked.app_id):
            app = await self._apps.find_living(asked.app_id, caller)
            layout = await self._functions.layout_for(
                asked.app_id, asked.function_ids, asked.class_ids, asked.definition_ids
            )
            changed = self._published_app(app, asked, caller)
            if app.state is AppState.DEPLOYED and await self._is_same(app, changed, layout, asked):
                return _Outcome(await self._unchanged(caller.once("AppPublish")))
            version = AppVersion(
                app_id=app.app_id,
                version=0,
                layout=layout,
                deployment_type=DeploymentType.STAGED if asked.staged else DeploymentType.STANDARD,
                deployed_at=self._clock.now(),
                deployed_by=caller.who,
                client_version=caller.sdk_version or asked.client_version,
                deployment_tag=asked.deployment_tag,
                commit_info=asked.commit_info,
            )
            return await self._commit(changed, version, caller.once("AppPublish"))

    async def roll_back(self, app_id: str, version: int, caller: Caller) -> float:
        """Publish an earlier version again (`PREVIOUS`: the one before the live one). Returns when."""
        return await self._tell(app_id, await self._roll_back(app_id, version, caller))

    async def _roll_back(self, app_id: str, version: int, caller: Caller) -> "_Outcome":
        async with self._apps.changing(app_id):
            app = await self._deployed(app_id, caller)
            history = await self.history(app_id, caller)
            if version == PREVIOUS:
                earlier = [
                    entry
                    for entry in history
                    if entry.version < app.version and entry.deployment_type is not DeploymentType.STAGED
                ]
                if not earlier:
                    raise FailedPrecondition(f"App {app_id} has no version before v{app.version} to roll back to")
                source = earlier[0]
            else:
                source = _entry(history, app_id, version)
            if source.deployment_type is DeploymentType.STAGED:
                raise FailedPrecondition(f"v{version} of App {app_id} is staged: `modal app promote` deploys it")
            if source.version == app.version:
                raise InvalidArgument(f"v{version} is what App {app_id} runs now: there is nothing to roll back")
            return await self._repeat(app, source, DeploymentType.ROLLBACK, caller, "AppRollback")

    async def roll_over(self, app_id: str, caller: Caller) -> float:
        """Publish the live version again, in fresh containers. Returns when."""
        return await self._tell(app_id, await self._roll_over(app_id, caller))

    async def _roll_over(self, app_id: str, caller: Caller) -> "_Outcome":
        async with self._apps.changing(app_id):
            app = await self._deployed(app_id, caller)
            source = _entry(await self.history(app_id, caller), app_id, app.version)
            return await self._repeat(app, source, DeploymentType.ROLLOVER, caller, "AppRollover")

    async def promote(self, app_id: str, version: int, caller: Caller) -> float:
        """Publish a staged version. Returns when."""
        return await self._tell(app_id, await self._promote(app_id, version, caller))

    async def _promote(self, app_id: str, version: int, caller: Caller) -> "_Outcome":
        async with self._apps.changing(app_id):
            app = await self._deployed(app_id, caller)
            source = _entry(await self.history(app_id, caller), app_id, version)
            if source.deployment_type is not DeploymentType.STAGED:
                raise FailedPrecondition(
                    f"v{version} of App {app_id} is not staged: `modal app rollback` goes back to it"
                )
            return await self._repeat(app, source, DeploymentType.PROMOTION, caller, "AppPromote")

    async def history(self, app_id: str, caller: Caller) -> list[AppVersion]:
        """All versions of an app, the newest first."""
        await self._apps.find(app_id, caller)
        return await self._database.read(lambda c: storage.list_versions(c, app_id))

    # ---- inside -----------------------------------------------------------------------------------------

    def _published_app(self, app: App, asked: Publication, caller: Caller) -> App:
        """The app as it will be (but for the version). Raises when it cannot be published so."""
        tags = dict(asked.tags) or app.tags
        if asked.state is None or asked.state is app.state is not AppState.DEPLOYED:
            return msgspec.structs.replace(app, tags=tags)
        if asked.state is not AppState.DEPLOYED:
            raise FailedPrecondition(f"App {app.app_id} is {app.state}: it cannot be published as {asked.state}")
        name = check_name(asked.name or app.name)
        if app.name and name != app.name:
            raise FailedPrecondition(f"App {app.app_id} is deployed as '{app.name}': it cannot become '{name}'")
        holder = self._apps.with_name(app.environment_id, name)
        if holder is not None and holder.app_id != app.app_id:
            raise AlreadyExists(
                f"App '{name}' was deployed to environment '{app.environment_name}' by somebody else meanwhile "
                f"({holder.app_id}): deploy again to update it"
            )
        return app.moved_to(AppState.DEPLOYED, name=name, description=name, tags=tags)

    async def _is_same(self, app: App, changed: App, layout: Layout, asked: Publication) -> bool:
        if asked.staged or layout != self._functions.layout(app.app_id) or changed != app or not app.version:
            return False
        if not self._schedules.are_followed(app, layout) or self._functions.overridden_in(app.app_id):
            return False
        if not asked.deployment_tag:
            return True
        live = await self._database.read(lambda c: storage.get_version(c, app.app_id, app.version))
        return live is not None and live.deployment_tag == asked.deployment_tag

    async def _repeat(self, app: App, source: AppVersion, kind: DeploymentType, caller: Caller, rpc: str) -> "_Outcome":
        version = msgspec.structs.replace(
            source,
            deployment_type=kind,
            deployed_at=self._clock.now(),
            deployed_by=caller.who,
            client_version=caller.sdk_version or source.client_version,
            source_version=source.version,
        )
        return await self._commit(app, version, caller.once(rpc))

    async def _commit(self, app: App, version: AppVersion, once: str | None) -> "_Outcome":
        """Store the version and what follows from it."""
        is_live = version.deployment_type is not DeploymentType.STAGED
        overridden = self._functions.overridden_in(app.app_id) if is_live else []
        scheduled = self._schedules.of_layout(app, version.layout, version.deployed_at) if is_live else []

        def numbered(number: int) -> tuple[App, AppVersion]:
            layout = version.layout
            if version.deployment_type is DeploymentType.ROLLOVER:
                layout = msgspec.structs.replace(layout, generation=number)
            entry = msgspec.structs.replace(version, version=number, layout=layout)
            after = app
            if is_live:
                after = msgspec.structs.replace(app, version=number)
                if app.state is AppState.DEPLOYED:
                    after = msgspec.structs.replace(after, deployed_at=entry.deployed_at, deployed_by=entry.deployed_by)
            return after, entry

        def store(connection) -> tuple[int, float]:
            after, entry = numbered(storage.newest_version_number(connection, app.app_id) + 1)
            storage.insert_version(connection, entry)
            storage.update_app(connection, after)
            functions_storage.set_autoscaler_override(connection, overridden, b"")
            if is_live:
                schedules_storage.replace(connection, app.app_id, scheduled)
            return entry.version, entry.deployed_at

        number, deployed_at = await self._database.write(store, once=once)
        if deployed_at != version.deployed_at or number <= app.version:
            return _Outcome(deployed_at)  # the same request was carried out in an earlier life of the server
        after, entry = numbered(number)
        self._apps.changed(after)
        if not is_live:
            return _Outcome(deployed_at)
        self._schedules.published(app.app_id, scheduled)
        return _Outcome(deployed_at, is_live, self._functions.published(app.app_id, entry.layout))

    async def _tell(self, app_id: str, outcome: "_Outcome") -> float:
        """Let the fleet know, outside the app's lock: it may want to change the app in turn."""
        if outcome.removed:
            await self._apps.fleet.retire_functions(outcome.removed)
        if outcome.is_live:
            await self._apps.fleet.definitions_changed(app_id)
        return outcome.deployed_at

    async def _unchanged(self, once: str | None) -> float:
        """0, unless this very request is what deployed it, in an earlier life of the server."""
        if once is None:
            return 0.0
        _, deployed_at = await self._database.write(lambda _: (0, 0.0), once=once)
        return deployed_at

    async def _deployed(self, app_id: str, caller: Caller) -> App:
        app = await self._apps.find_living(app_id, caller)
        if app.state is not AppState.DEPLOYED:
            raise FailedPrecondition(f"App {app_id} is {app.state}: only a deployed App has versions to choose from")
        return app


def _entry(history: list[AppVersion], app_id: str, version: int) -> AppVersion:
    for entry in history:
        if entry.version == version:
            return entry
    raise NotFound(f"App {app_id} has no version v{version}: `modal app history {app_id}` lists them")
