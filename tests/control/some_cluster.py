"""Calls and pools over a database in memory, with containers that do what a test says."""

import asyncio
from types import SimpleNamespace

import sqlalchemy as sa
from modal_proto import api_pb2
from virtual_time import LoopClock, settle

from aeolian.control.call_state import Input
from aeolian.control.calls import Calls
from aeolian.control.container_state import Container, Want
from aeolian.control.pools import Pools
from aeolian.control.workers import Worker, Workers
from aeolian.domain.caller import Caller
from aeolian.domain.calls import CallType, InputKey, Invocation
from aeolian.domain.containers import ContainerState, Resources
from aeolian.domain.errors import NotFound
from aeolian.domain.functions import PoolSettings
from aeolian.domain.link import AssignInputs, CancelInputs, Hello
from aeolian.storage import database
from aeolian.storage.tables import metadata

ME = Caller(workspace="local", token_id="ak-1", sdk_version="1.6.4")
STRANGER = Caller(workspace="elsewhere", token_id="ak-2")
WORKER = "wo-1"

SUCCESS = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
FAILURE = api_pb2.GenericResult.GENERIC_STATUS_FAILURE
TERMINATED = api_pb2.GenericResult.GENERIC_STATUS_TERMINATED
TIMEOUT = api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT


class InlineDatabase(database.Database):
    """The real queries, carried out at once: for tests in which time is virtual."""

    def __init__(self, engine: sa.Engine | None = None):
        self.engine = engine or sa.create_engine("sqlite://", poolclass=sa.StaticPool)
        metadata.create_all(self.engine)
        self.failures: list[Exception] = []
        """What the next writes meet with."""
        self.lost_answers: list[Exception] = []
        """What the next writes meet with after they were committed."""
        self.num_commits = 0

    def _submit(self, fn, rows):
        future = asyncio.get_running_loop().create_future()
        job = database._Job(fn, future, rows)
        if self.failures:
            outcomes = [database._Failure(self.failures.pop(0))]
        else:
            with self.engine.connect() as connection:
                outcomes = database._run_group(connection, [job])
            if self.lost_answers:
                outcomes = [database._Failure(self.lost_answers.pop(0))]
        self.num_commits += 1
        asyncio.get_running_loop().call_soon(database._set_results, [(future, outcomes[0])])
        return future

    async def read(self, fn):
        with self.engine.connect() as connection:
            return fn(connection)


class SomeFunctions:
    """Functions as calls and pools see them."""

    def __init__(self):
        self.all: dict[str, PoolSettings] = {}

    def add(self, function_id: str, **settings) -> str:
        defaults = {"definition_id": "de-1", "app_id": "ap-1", "environment_name": "main", "function_name": function_id}
        self.all[function_id] = PoolSettings(function_id=function_id, **{**defaults, **settings})
        return function_id

    def pool_settings(self, function_id: str) -> PoolSettings:
        if function_id not in self.all:
            raise NotFound(f"there is no Function {function_id!r}")
        return self.all[function_id]

    def check_callable(self, function_id: str, caller: Caller):
        return self.pool_settings(function_id)


class Cluster:
    """One worker; `containers` are started and fed by hand."""

    def __init__(self, engine: sa.Engine | None = None):
        self.database = InlineDatabase(engine)
        self.functions = SomeFunctions()
        self.function_id = self.functions.add("fu-1")
        self.workers = Workers()
        self.commands: list = []
        self.workers.connected(Worker(Hello(WORKER, "life", ("process",), 2000, 4000), self.commands.append))
        self.clock = clock = LoopClock()
        self.pools = Pools(clock, self.functions, self.workers)
        self.app = SimpleNamespace(outlives_its_client=False)
        apps = SimpleNamespace(known=lambda app_id: self.app)
        self.calls = Calls(self.database, clock, apps, self.functions, self.pools)
        self.pools.payloads_of = self.calls.open_inputs.payloads_of
        self._num_containers = 0

    async def __aenter__(self) -> "Cluster":
        self.recovered = await self.calls.load()
        return self

    async def __aexit__(self, *error) -> None:
        await self.pools.close()
        await self.calls.close()

    # ---- clients ----------------------------------------------------------------------------------------

    async def remote(self, count: int = 1, function_id: str = "fu-1", caller: Caller = ME, parent: str = ""):
        """A call with so many inputs that somebody waits for."""
        return await self._start(Invocation.SYNC, count, function_id, caller, parent)

    async def spawn(self, count: int = 1, function_id: str = "fu-1", caller: Caller = ME, parent: str = ""):
        return await self._start(Invocation.ASYNC, count, function_id, caller, parent)

    async def _start(self, invocation, count, function_id, caller, parent):
        return await self.calls.start(
            function_id,
            caller,
            call_type=CallType.MAP if count > 1 else CallType.UNARY,
            invocation=invocation,
            parent_input_id=parent,
            inputs=[(idx, payload(idx)) for idx in range(count)],
        )

    async def outputs(self, call, timeout_s: float = 0.0, **kwargs) -> list[api_pb2.FunctionGetOutputsItem]:
        page = await self.calls.get_outputs(call.call_id, ME, timeout_s=timeout_s, **kwargs)
        return [api_pb2.FunctionGetOutputsItem.FromString(output.item) for output in page.outputs]

    async def statuses(self, call, **kwargs) -> list[int]:
        return [item.result.status for item in await self.outputs(call, **kwargs)]

    # ---- containers -------------------------------------------------------------------------------------

    def container(self, function_id: str = "fu-1", *, wants: int | None = 1, **kwargs) -> "SomeContainer":
        self._num_containers += 1
        return SomeContainer(self, f"ta-{self._num_containers}", function_id, wants, **kwargs)

    def of(self, kind: type) -> list:
        return [command for command in self.commands if isinstance(command, kind)]


class SomeContainer:
    def __init__(self, cluster: Cluster, task_id: str, function_id: str, wants: int | None, max_inputs: int = 0):
        self._cluster = cluster
        settings = cluster.functions.pool_settings(function_id)
        self.state = Container(
            task_id,
            app_id=settings.app_id,
            function_id=function_id,
            revision=settings.revision,
            environment_name="main",
            worker_id=WORKER,
            image_id="im-1",
            sdk_version="1.6.4",
            resources=Resources(),
            enqueued_at=0.0,
            max_inputs=max_inputs,
        )
        self.state.move_to(ContainerState.STARTING)
        self.state.move_to(ContainerState.RUNNING)
        self.task_id = task_id
        self.caller = Caller(workspace="local", task_id=task_id, app_id="ap-1", function_id=function_id)
        self._seq = 0
        cluster.pools.add(self.state)
        if wants:
            self.ask(wants)

    def ask(self, max_items: int = 1, linger_ms: int = 0) -> None:
        self._seq += 1
        self._cluster.pools.wants(self.state, Want(self._seq, max_items, linger_ms))

    def given(self) -> list[str]:
        """Ids of all inputs that it was given."""
        commands = self._cluster.of(AssignInputs)
        return [held.input_id for command in commands if command.task_id == self.task_id for held in command.held]

    def told_to_cancel(self) -> list[str]:
        commands = self._cluster.of(CancelInputs)
        return [input_id for command in commands if command.task_id == self.task_id for input_id in command.input_ids]

    @property
    def holds(self) -> list[str]:
        return [item.input_id for item in self.state.held.values()]

    async def put(
        self,
        input_id: str = "",
        status: int = SUCCESS,
        retry_count: int = 0,
        data: bytes = b"",
        duration_s: float = 1.0,
    ) -> None:
        """Its output for an input: the one that it holds."""
        now = self._cluster.clock.now()
        message = api_pb2.FunctionPutOutputsItem(
            input_id=input_id or self.holds[0],
            retry_count=retry_count,
            input_started_at=now - duration_s,
            output_created_at=now,
            result={"status": status, "data": data or message_of(status)},
        )
        self._cluster.calls.output_received(self.task_id, message, lambda: None)
        await settle()

    def lose(self) -> list[Input]:
        """It is gone. Returns what it held."""
        self.state.state = ContainerState.EXITED
        return self._cluster.pools.drop(self.state)


def payload(idx: int) -> bytes:
    return api_pb2.FunctionInput(args=b"input %d" % idx).SerializeToString()


def message_of(status: int) -> bytes:
    return b"" if status in (TERMINATED, TIMEOUT) else b"result"


def input_id(call, idx: int = 0) -> str:
    return InputKey(call.call_id, idx).input_id
