"""Functions that run by themselves: their runs begin at the moments that `domain.schedules` computes.

A run is a call without arguments. The call and the moment of the next run are stored in one transaction, so that no
moment has two; moments that passed while nobody was there have one together.
"""

import asyncio
import contextlib
import logging
import pickle
from collections.abc import Callable, Sequence
from typing import Protocol

from modal_proto import api_pb2

from aeolian.control.apps import Apps
from aeolian.control.definitions import schedule_of
from aeolian.control.functions import Functions
from aeolian.domain.apps import App, AppState, Layout
from aeolian.domain.caller import Caller
from aeolian.domain.calls import CallType, Invocation
from aeolian.domain.clock import Clock
from aeolian.domain.errors import AeolianError, Unavailable
from aeolian.domain.schedules import ScheduledFunction, deployed
from aeolian.storage import schedules as storage
from aeolian.storage.database import Database

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""After a run that could not be stored."""
MAX_SLEEP_S = 30.0
"""The clock may be set meanwhile: a moment is missed by no more than this."""
NO_ARGUMENTS = {
    api_pb2.DATA_FORMAT_PICKLE: pickle.dumps(((), {}), protocol=4),
    api_pb2.DATA_FORMAT_CBOR: b"\x82\x80\xa0",
}
"""(args, kwargs) in the formats that Functions read."""


class Calls(Protocol):
    async def start(
        self,
        function_id: str,
        caller: Caller,
        *,
        call_type: CallType,
        invocation: Invocation,
        inputs: Sequence[tuple[int, bytes]],
        stored_with: Callable,
    ) -> object: ...


class Schedules:
    def __init__(self, database: Database, clock: Clock, apps: Apps, functions: Functions, calls: Calls):
        self._database = database
        self._clock = clock
        self._apps = apps
        self._functions = functions
        self._calls = calls
        self._scheduled: dict[str, dict[str, ScheduledFunction]] = {}
        """By App, then by Function."""
        self._changed = asyncio.Event()
        self._runner: asyncio.Task | None = None
        apps.when_ended.append(self._app_ended)

    # ---- life of the service ----------------------------------------------------------------------------

    async def open(self) -> None:
        """Begin runs from now on, at once those that were missed. Needs loaded `apps`, `functions` and `calls`."""
        for function in await self._database.read(storage.list_all):
            self._scheduled.setdefault(function.app_id, {})[function.function_id] = function
        self._runner = asyncio.create_task(self._run(), name="schedules")

    async def close(self) -> None:
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)

    # ---- for deployments --------------------------------------------------------------------------------

    def of_layout(self, app: App, layout: Layout, now: float) -> list[ScheduledFunction]:
        """What runs by itself when this layout is deployed now. The App's lock is held until `published`."""
        if app.state is not AppState.DEPLOYED:
            return []
        before = self._scheduled.get(app.app_id, {})
        found = []
        for place in layout.functions.values():
            schedule = schedule_of(self._functions.definition_at(place.definition_id).functions[0])
            if schedule is not None:
                old = before.get(place.function_id)
                found.append(deployed(place.function_id, app.app_id, schedule, now, old))
        return found

    def are_followed(self, app: App, layout: Layout) -> bool:
        """Whether what this layout asks for is what runs: an earlier version of Aeolian took no notice of it."""
        wanted = self.of_layout(app, layout, self._clock.now())
        return {function.function_id for function in wanted} == self._scheduled.get(app.app_id, {}).keys()

    def published(self, app_id: str, functions: Sequence[ScheduledFunction]) -> None:
        """These are stored, and the App's only ones."""
        self._scheduled.pop(app_id, None)
        if functions:
            self._scheduled[app_id] = {function.function_id: function for function in functions}
        self._changed.set()

    # ---- inside -----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            due, sleep_s = self._due()
            if due:
                begun = await asyncio.gather(*map(self._begin, due), return_exceptions=True)
                for failure in (outcome for outcome in begun if isinstance(outcome, BaseException)):
                    log.error("a scheduled run could not begin", exc_info=failure)
                sleep_s = 0.0 if all(outcome is True for outcome in begun) else RETRY_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), sleep_s)

    def _due(self) -> tuple[list[ScheduledFunction], float]:
        """Those whose moment has come, and how long until the next one."""
        now = self._clock.now()
        everything = [function for functions in self._scheduled.values() for function in functions.values()]
        next_at = min((function.next_at for function in everything), default=float("inf"))
        return [function for function in everything if function.next_at <= now], min(next_at - now, MAX_SLEEP_S)

    async def _begin(self, function: ScheduledFunction) -> bool:
        """One run. False: try again in a moment."""
        app_id, function_id = function.app_id, function.function_id
        async with self._apps.changing(app_id):  # no deployment and no other change of the App meanwhile
            app = self._apps.known(app_id)
            if app is None or app.state is not AppState.DEPLOYED:
                self._scheduled.pop(app_id, None)  # it is stopping
                return True
            if self._scheduled.get(app_id, {}).get(function_id) is not function:
                return True
            after = function.after_run(self._clock.now())
            try:
                definition = self._functions.current(function_id).function
                await self._calls.start(
                    function_id,
                    Caller(workspace=app.workspace, idempotency_key=f"{function_id}@{function.next_at!r}"),
                    call_type=CallType.UNARY,
                    invocation=Invocation.ASYNC,
                    inputs=[(0, _no_arguments(definition))],
                    stored_with=lambda connection: storage.move_on(connection, after),
                )
            except Unavailable:
                return False
            except AeolianError as error:
                log.error("the scheduled run of Function %s could not begin: %s", function_id, error)
                return False
            self._scheduled[app_id][function_id] = after
            return True

    async def _app_ended(self, app_id: str) -> None:
        self._scheduled.pop(app_id, None)
        app = self._apps.known(app_id)
        if app is not None and app.deployed_at:
            await self._database.write(lambda c: storage.replace(c, app_id, []))


def _no_arguments(function: api_pb2.Function) -> bytes:
    formats = [known for known in function.supported_input_formats if known in NO_ARGUMENTS]
    data_format = formats[0] if formats else api_pb2.DATA_FORMAT_PICKLE
    return api_pb2.FunctionInput(args=NO_ARGUMENTS[data_format], data_format=data_format).SerializeToString()
