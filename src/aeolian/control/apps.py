"""Apps: how they come to be, who keeps them alive, and how they end. What they contain is `deployments`' matter.

Living apps are held in memory; every change is in the database before it is acknowledged. Ended apps are
read from there when somebody asks for one by its id.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import msgspec

from aeolian.control.fleet import Fleet, NoFleet
from aeolian.control.logs import AppLogs
from aeolian.domain.apps import App, AppState, silent_apps
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from aeolian.domain.ids import new_id
from aeolian.domain.suggestions import instead_of
from aeolian.storage import apps as storage
from aeolian.storage.database import Database, kept_reply

log = logging.getLogger(__name__)

SWEEP_S = 10.0
STOP_WAIT_S = 2.0
"""A request that stops an app waits this long for its containers, then answers; the rest happens behind."""
LISTED_AFTER_STOP_S = 24 * 3600.0
MAX_LISTED_STOPPED = 200
MAX_TAGS = 64
MAX_DESCRIPTION_LENGTH = 500
NAME = re.compile(r"[a-zA-Z0-9-_.]{1,64}")
APP_ID = re.compile(r"ap-[a-zA-Z0-9]{22}")


class Environment(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...


class Environments(Protocol):
    def resolve(self, name: str, caller: Caller) -> Environment: ...


class NameLookup(NamedTuple):
    """Who has a deployment name: the deployed app, else the one that had it last."""

    environment_name: str
    deployed: App | None
    previous: App | None


class Apps:
    def __init__(self, database: Database, clock: Clock, environments: Environments, logs: AppLogs):
        self.fleet: Fleet = NoFleet()
        self.when_stopped: list[Callable[[str], None]] = []
        """Called with the id of an app that has come to its end."""
        self.when_ended: list[Callable[[str], Awaitable[None]]] = []
        """Awaited with the id of an app that comes to its end: what belongs to it goes, too."""
        self._database = database
        self._clock = clock
        self._environments = environments
        self._logs = logs
        self._living: dict[str, App] = {}
        self._by_name: dict[tuple[str, str], str] = {}
        self._heard_at: dict[str, float] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._stopping: dict[str, asyncio.Task] = {}
        self._sweeper: asyncio.Task | None = None

    # ---- life of the service ----------------------------------------------------------------------------

    async def load(self) -> None:
        """Read the living apps. Their clients get a full heartbeat timeout to come back."""
        for app in await self._database.read(storage.list_living):
            self._keep(app)
            self._heard_at[app.app_id] = self._clock.now()

    async def start(self) -> None:
        """Go on with stops that were begun, and watch for clients that fell silent. Needs `fleet`."""
        for app in list(self._living.values()):
            if app.state is AppState.STOPPING:
                self._finish_behind(app.app_id)
        self._sweeper = asyncio.create_task(self._sweep_loop(), name="apps-sweep")

    async def close(self) -> None:
        tasks = [*self._stopping.values(), *([self._sweeper] if self._sweeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- looking up -------------------------------------------------------------------------------------

    def living(self, app_id: str, caller: Caller | None = None) -> App:
        """An app that has not come to its end. Raises NotFound, or FailedPrecondition when it is stopping."""
        app = self._living.get(app_id)
        if app is None or (caller is not None and not _is_seen(app, caller)):
            raise NotFound(f"there is no running or deployed App {app_id!r}")
        if app.has_ended:
            raise FailedPrecondition(f"App {app_id} is stopping")
        return app

    async def find(self, app_id: str, caller: Caller) -> App:
        """Any app of the caller's workspace, ended ones too. Raises NotFound."""
        app = await self.look_up(app_id)
        if app is None or not _is_seen(app, caller):
            raise NotFound(f"there is no App {app_id!r}: `modal app list` shows those of an environment")
        return app

    async def look_up(self, app_id: str) -> App | None:
        """Any app of any workspace, ended ones too."""
        return self._living.get(app_id) or await self._database.read(lambda c: storage.get_app(c, app_id))

    async def find_living(self, app_id: str, caller: Caller) -> App:
        """As `living`, but an app that has ended is told apart (FailedPrecondition) from one that never was."""
        app = await self.find(app_id, caller)
        if app.has_ended:
            raise FailedPrecondition(f"App {app_id} has been stopped")
        return app

    def known(self, app_id: str) -> App | None:
        """The app, if it is living or still stopping."""
        return self._living.get(app_id)

    def is_over(self, app_id: str) -> bool:
        """Whether the app has stopped, with everything that ran in it."""
        return app_id not in self._living

    def environment(self, name: str, caller: Caller) -> Environment:
        return self._environments.resolve(name, caller)

    def deployed(self, name: str, environment_name: str, caller: Caller) -> App:
        """The app deployed under that name. Raises NotFound."""
        environment = self.environment(environment_name, caller)
        app = self.with_name(environment.id, name)
        if app is None:
            names = [known for where, known in self._by_name if where == environment.id]
            hint = instead_of(name, names) or ": deploy it with `modal deploy` first"
            raise NotFound(f"App '{name}' not found in environment '{environment.name}'{hint}")
        return app

    async def look_up_name(self, name: str, environment_name: str, caller: Caller) -> NameLookup:
        environment = self.environment(environment_name, caller)
        app = self.with_name(environment.id, name)
        if app is not None:
            return NameLookup(environment.name, app, None)
        previous = await self._database.read(lambda c: storage.last_stopped_with_name(c, environment.id, name))
        return NameLookup(environment.name, None, previous)

    async def list_in(self, environment_name: str, caller: Caller) -> list[App]:
        """Apps of an environment: living, and stopped in the last day. The newest first."""
        environment = self.environment(environment_name, caller)
        since = self._clock.now() - LISTED_AFTER_STOP_S
        stopped = await self._database.read(
            lambda c: storage.list_stopped(c, environment.id, since, MAX_LISTED_STOPPED)
        )
        living = [app for app in self._living.values() if app.environment_id == environment.id]
        known = {app.app_id for app in living}
        both = living + [app for app in stopped if app.app_id not in known]
        return sorted(both, key=lambda app: app.created_at, reverse=True)

    def living_apps(self) -> list[App]:
        return list(self._living.values())

    # ---- changing ---------------------------------------------------------------------------------------

    async def create(
        self, caller: Caller, state: AppState, description: str, environment_name: str, tags: dict[str, str]
    ) -> App:
        """A new app without content: for a run (EPHEMERAL, DETACHED) or a first deployment (INITIALIZING)."""
        environment = self.environment(environment_name, caller)
        description = description.replace("\0", "")[:MAX_DESCRIPTION_LENGTH]
        app = self._new(caller, environment, state, description, check_tags(tags))
        return await self._insert(app, caller.once("AppCreate"))

    async def get_or_create(
        self, caller: Caller, name: str, environment_name: str, *, create: bool, must_be_new: bool
    ) -> App:
        """The app deployed under a name, or given by its id; with `create`, made empty where it is missing."""
        if APP_ID.fullmatch(name):
            if create:
                raise InvalidArgument(f"{name} is an App ID: an App cannot be created under it")
            return await self.find(name, caller)
        if not create:
            return self.deployed(name, environment_name, caller)
        check_name(name)
        environment = self.environment(environment_name, caller)
        async with self._changing(f"{environment.id}/{name}"):
            app = self.with_name(environment.id, name)
            once = caller.once("AppGetOrCreate") if must_be_new else None
            if app is not None and once and await self._database.read(lambda c: kept_reply(c, once)) == app.app_id:
                return app
            if app is not None and must_be_new:
                raise AlreadyExists(f"App '{name}' already exists in environment '{environment.name}'")
            if app is None:
                app = self._new(caller, environment, AppState.DEPLOYED, name, {})
                app = msgspec.structs.replace(app, name=name, deployed_at=app.created_at, deployed_by=app.created_by)
                app = await self._insert(app, once)
            return app

    async def set_tags(self, app_id: str, tags: dict[str, str], caller: Caller) -> None:
        """Replace the app's tags."""
        check_tags(tags)
        async with self.changing(app_id):
            app = msgspec.structs.replace(await self.find_living(app_id, caller), tags=dict(tags))
            await self._update(app)

    async def heartbeat(self, app_id: str, caller: Caller) -> None:
        """The client is still there. Raises FailedPrecondition when the app has ended: the client must, too."""
        await self.find_living(app_id, caller)
        self._heard_at[app_id] = self._clock.now()

    async def client_disconnected(self, app_id: str, caller: Caller, *, deployment_failed: bool) -> None:
        """The client that ran or deployed the app is done with it."""
        app = await self.find(app_id, caller)
        if app.has_ended or app.state is AppState.DEPLOYED:
            return  # a deployed app belongs to nobody; what a failed deployment left behind was never live
        if deployment_failed and app.state is not AppState.INITIALIZING:
            return
        if app.state in (AppState.DETACHED, AppState.DETACHED_DISCONNECTED):
            await self._client_gone(app_id)
        else:
            await self.stop(app_id, caller)

    async def stop(self, app_id: str, caller: Caller | None, *, by: str = "") -> None:
        """End the app for good. Returns when its containers are gone, or when that takes too long to wait for.

        Repeating it is fine. `by`: the user who asked for it, "" when the app ends by itself.
        """
        if caller is not None and (await self.find(app_id, caller)).state is AppState.STOPPED:
            return
        async with self.changing(app_id):
            app = self._living.get(app_id)
            if app is not None and not app.has_ended:
                app = app.moved_to(AppState.STOPPING, stopped_at=self._clock.now(), stopped_by=by)
                await self._update(app)
                self._finish_behind(app_id)
        if (task := self._stopping.get(app_id)) is not None:
            await asyncio.wait({task}, timeout=STOP_WAIT_S)

    async def stop_all_in(self, environment_id: str, by: str) -> None:
        """The environment goes away, and its apps with it."""
        inside = [app.app_id for app in self._living.values() if app.environment_id == environment_id]
        await asyncio.gather(*(self.stop(app_id, None, by=by) for app_id in inside))

    async def environment_renamed(self, environment_id: str, name: str) -> None:
        """Containers started from now on see the new name."""
        for app_id in [app.app_id for app in self._living.values() if app.environment_id == environment_id]:
            async with self.changing(app_id):
                if (app := self._living.get(app_id)) is not None:
                    await self._update(msgspec.structs.replace(app, environment_name=name))

    async def work_finished(self, app_id: str) -> None:
        """The last unfinished call of the app is done: one that nobody holds any more comes to its end."""
        app = self._living.get(app_id)
        if app is not None and app.state is AppState.DETACHED_DISCONNECTED and self.fleet.is_idle(app_id):
            await self.stop(app_id, None)

    @contextlib.asynccontextmanager
    async def changing(self, app_id: str) -> AsyncIterator[None]:
        """Changes of one app happen one after another."""
        async with self._changing(app_id):
            yield

    def changed(self, app: App) -> None:
        """Take over an app that `deployments` has stored."""
        self._keep(app)

    # ---- inside -----------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _changing(self, key: str) -> AsyncIterator[None]:
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        async with lock:
            yield

    def _new(
        self, caller: Caller, environment: Environment, state: AppState, description: str, tags: dict[str, str]
    ) -> App:
        return App(
            app_id=new_id("app"),
            workspace=caller.workspace,
            environment_id=environment.id,
            environment_name=environment.name,
            state=state,
            description=description,
            tags=dict(tags),
            created_at=self._clock.now(),
            created_by=caller.who,
        )

    async def _update(self, app: App) -> None:
        await self._database.write(lambda c: storage.update_app(c, app))
        self._keep(app)

    async def _insert(self, app: App, once: str | None) -> App:
        def insert(connection) -> str:
            storage.insert_app(connection, app)
            return app.app_id

        app_id = await self._database.write(insert, once=once)
        if app_id != app.app_id:  # the same request was carried out in an earlier life of the server
            stored = await self._database.read(lambda c: storage.get_app(c, app_id))
            assert stored is not None
            return stored
        self._keep(app)
        self._heard_at[app_id] = self._clock.now()
        return app

    def with_name(self, environment_id: str, name: str) -> App | None:
        app_id = self._by_name.get((environment_id, name))
        return None if app_id is None else self._living[app_id]

    def _keep(self, app: App) -> None:
        before = self._living.get(app.app_id)
        if before is not None and self._by_name.get((before.environment_id, before.name)) == app.app_id:
            del self._by_name[before.environment_id, before.name]
        if app.state is AppState.STOPPED:
            self._living.pop(app.app_id, None)
            self._heard_at.pop(app.app_id, None)
            return
        self._living[app.app_id] = app
        if app.state is AppState.DEPLOYED:
            self._by_name[app.environment_id, app.name] = app.app_id

    async def _client_gone(self, app_id: str) -> None:
        """A detached app's client left: it lives on until its calls are finished."""
        async with self.changing(app_id):
            app = self._living.get(app_id)
            if app is None or app.state is not AppState.DETACHED:
                return
            app = app.moved_to(AppState.DETACHED_DISCONNECTED)
            await self._update(app)
        await self.work_finished(app_id)

    def _finish_behind(self, app_id: str) -> None:
        if app_id not in self._stopping:
            self._stopping[app_id] = asyncio.create_task(self._finish(app_id), name=f"stop-{app_id}")

    async def _finish(self, app_id: str) -> None:
        """STOPPING to STOPPED: containers first, then the last word in the logs."""
        try:
            try:
                await self.fleet.stop_app(app_id, graceful=True)
            except Exception:
                log.exception("the containers of App %s could not be ended", app_id)
            for delete in self.when_ended:
                await delete(app_id)
            app = self._living[app_id].moved_to(AppState.STOPPED)
            await self._update(app)
            for callback in self.when_stopped:
                callback(app_id)
            self._logs.wake(app_id)
        except Exception:
            log.exception("App %s could not be marked as stopped; it will be at the next start", app_id)
        finally:
            self._stopping.pop(app_id, None)

    async def _sweep_loop(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self.sweep()
            except Exception:
                log.exception("apps without clients could not be swept")

    async def sweep(self) -> None:
        """End apps whose client fell silent, and detached ones that have finished."""
        for app in silent_apps(list(self._living.values()), self._heard_at, self._clock.now()):
            log.info("App %s: no heartbeat of its client any more", app.app_id)
            if app.state is AppState.DETACHED:
                await self._client_gone(app.app_id)
            else:
                await self.stop(app.app_id, None)
        for app in list(self._living.values()):
            await self.work_finished(app.app_id)


def check_name(name: str) -> str:
    """Raises InvalidArgument when `name` cannot be a deployment name."""
    if not NAME.fullmatch(name) or APP_ID.fullmatch(name):
        raise InvalidArgument(
            f"{name!r} cannot be the name of an App: use 1 to 64 letters, digits, dashes, underscores and periods"
        )
    return name


def check_tags(tags: dict[str, str]) -> dict[str, str]:
    if len(tags) > MAX_TAGS:
        raise InvalidArgument(f"an App can have {MAX_TAGS} tags, not {len(tags)}")
    for key, value in tags.items():
        if not 1 <= len(key) <= 64 or len(value) > 256:
            raise InvalidArgument(f"the tag {key!r} is too long: keys have up to 64 characters, values up to 256")
    return tags


def _is_seen(app: App, caller: Caller) -> bool:
    return app.workspace == caller.workspace and caller.sees(app.environment_id)
