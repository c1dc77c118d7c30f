"""The router over a real socket, with a worker that answers as a test says."""

import asyncio
from types import SimpleNamespace

import grpc
import pytest
from modal_proto import api_pb2
from modal_proto import task_command_router_pb2 as router_pb2
from modal_proto.task_command_router_pb2_grpc import TaskCommandRouterStub

from aeolian.control.command_access import LIFETIME_S, CommandAccess
from aeolian.control.command_starts import CommandStarts
from aeolian.control.container_requests import ContainerRequests
from aeolian.control.workers import Worker, Workers
from aeolian.domain.caller import Caller
from aeolian.domain.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from aeolian.domain.execs import (
    AwaitExec,
    Done,
    Ended,
    Output,
    ReadExec,
    ReloadVolumes,
    StartExec,
    Stdin,
    TerminalSize,
    WriteExec,
    refused,
)
from aeolian.domain.link import ContainerAnswer, ContainerRequest, Hello
from aeolian.protocol.command_access import CommandAccessRpcs
from aeolian.protocol.command_router import CommandRouter

TASK = "ta-1"
PIPE = {
    "stdout_config": router_pb2.TASK_EXEC_STDOUT_CONFIG_PIPE,
    "stderr_config": router_pb2.TASK_EXEC_STDERR_CONFIG_PIPE,
}


class SomeClock:
    at = 1_000_000.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


class SomeContainers:
    def __init__(self) -> None:
        self.up = {TASK: SimpleNamespace(task_id=TASK, app_id="ap-1", worker_id="wo-1")}

    def get(self, task_id: str):
        return self.up.get(task_id)

    get_lately = get

    def find(self, task_id: str, caller: Caller):
        if task_id not in self.up or caller.workspace != "local":
            raise NotFound(f"there is no running container {task_id!r}")
        return self.up[task_id]


class SomeSecrets:
    def __init__(self) -> None:
        self.objects = self
        self.homes = {"st-here": "en-1", "st-there": "en-2"}

    async def get(self, secret_id: str, caller: Caller):
        return SimpleNamespace(environment_id=self.homes[secret_id])

    async def env_of(self, secret_ids) -> dict[str, str]:
        return {"FROM_SECRET": secret_ids[-1], "BOTH": "secret"}


class Routed:
    """`answer(request)` is what the worker says; None: nothing."""

    def __init__(self) -> None:
        self.clock, self.workers, self.containers = SomeClock(), Workers(), SomeContainers()
        self.asked: list = []
        self.answer = lambda request: Done()
        self.worker = Worker(Hello("wo-1", "wo-1.1", ("process",), 1000, 1000), self._send)
        self.workers.connected(self.worker)
        self.requests = ContainerRequests(self.containers, self.workers)
        self.access = CommandAccess(b"key", self.clock)
        apps = SimpleNamespace(known=lambda app_id: SimpleNamespace(environment_id="en-1"))
        starts = CommandStarts(self.containers, apps, SomeSecrets())
        self.service = CommandRouter(self.access, starts, self.requests)
        self.jwt = self.access.give(TASK, "local", "ak-1")
        self.stub: TaskCommandRouterStub
        self.channel: grpc.aio.Channel

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.jwt}"),)

    def _send(self, command: ContainerRequest) -> None:
        self.asked.append(command.request)
        answer = self.answer(command.request)
        if answer is not None:
            asyncio.get_running_loop().call_soon(self.requests.answered, ContainerAnswer(command.request_id, answer))

    async def call(self, name: str, **fields):
        kind = getattr(router_pb2, f"{name}Request")
        fields = {"task_id": TASK, "exec_id": "x", **fields}
        return await getattr(self.stub, name)(kind(**fields), metadata=self.metadata, timeout=10)

    async def refusal(self, name: str, **fields) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await self.call(name, **fields)
        return error.value.code(), error.value.details()


@pytest.fixture
async def routed(tmp_path):
    found = Routed()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((found.service,))
    server.add_insecure_port(f"unix:{tmp_path}/router.sock")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/router.sock") as channel:
        found.channel, found.stub = channel, TaskCommandRouterStub(channel)
        yield found
    await server.stop(0)


async def test_only_who_was_given_access_to_this_container_may_run_commands_in_it(routed):
    good = routed.jwt
    for jwt in (
        "",
        "x",
        "a.b.c",
        good[:-1],
        good.replace(".", "", 1),
        CommandAccess(b"other", routed.clock).give(TASK, "", ""),
    ):
        routed.jwt = jwt
        code, text = await routed.refusal("TaskExecPoll")
        assert (code, "no permission" in text) == (grpc.StatusCode.UNAUTHENTICATED, True)
    routed.jwt = routed.access.give("ta-2", "local", "ak-1")
    assert (await routed.refusal("TaskExecPoll"))[0] is grpc.StatusCode.PERMISSION_DENIED
    routed.jwt = good
    routed.clock.at += LIFETIME_S
    code, text = await routed.refusal("TaskExecPoll")
    assert (code, "expired" in text) == (grpc.StatusCode.UNAUTHENTICATED, True)
    assert not routed.asked


async def test_access_is_given_to_clients_of_the_workspace_and_to_no_container(routed):
    async def ask(caller: Caller, url: str = "http://127.0.0.1:9900"):
        rpcs = CommandAccessRpcs(routed.containers, routed.access, url)
        return await rpcs.TaskGetCommandRouterAccess(api_pb2.TaskGetCommandRouterAccessRequest(task_id=TASK), caller)

    given = await ask(Caller(workspace="local", token_id="ak-1"))
    assert given.url == "http://127.0.0.1:9900"
    assert routed.access.check(given.jwt).task_id == TASK
    assert (await ask(Caller(workspace="local", token_id="ak-1", client_type=8))).url == "https://127.0.0.1:9900"
    old = Caller(workspace="local", token_id="ak-1", sdk_version="1.4.3")
    assert (await ask(old, "https://aeolian.example")).url == "https://aeolian.example"
    with pytest.raises(FailedPrecondition, match="only over TLS"):
        await ask(old)
    with pytest.raises(NotFound):
        await ask(Caller(workspace="elsewhere", token_id="ak-2"))
    with pytest.raises(PermissionDenied):
        await ask(Caller(workspace="local", task_id="ta-2"))


async def test_a_command_gets_its_variables_its_terminal_and_its_limits(routed):
    await routed.call(
        "TaskExecStart",
        command_args=["bash", "-l"],
        secret_ids=["st-here"],
        env={"BOTH": "env"},
        workdir="/tmp",
        timeout_secs=5,
        pty_info=api_pb2.PTYInfo(winsz_rows=10, env_term="xterm", pty_type=api_pb2.PTYInfo.PTY_TYPE_SHELL),
        **PIPE,
    )
    (start,) = routed.asked
    assert isinstance(start, StartExec)
    assert start.command.argv == ("bash", "-l")
    assert start.command.env == {"TERM": "xterm", "FROM_SECRET": "st-here", "BOTH": "env"}
    assert (start.command.cwd, start.command.terminal) == ("/tmp", TerminalSize(10, 80))
    assert (start.timeout_s, start.unattended_s > 0, start.keeps_stdout, start.keeps_stderr) == (5, True, True, True)


async def test_sources_of_variables_are_applied_in_their_order(routed):
    sources = [
        api_pb2.SecretSource(env=api_pb2.StringMap(contents={"BOTH": "first", "A": "1"})),
        api_pb2.SecretSource(secret_id="st-here"),
        api_pb2.SecretSource(env=api_pb2.StringMap(contents={"A": "2"})),
    ]
    await routed.call("TaskExecStart", command_args=["true"], secret_sources=sources)
    (start,) = routed.asked
    assert start.command.env == {"BOTH": "secret", "A": "2", "FROM_SECRET": "st-here"}
    assert (start.keeps_stdout, start.keeps_stderr, start.command.terminal) == (False, False, None)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"command_args": ["a\0b"]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"command_args": ["true"], "env": {"A=B": ""}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"command_args": ["true", "x" * (128 << 10)]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"command_args": ["x" * 100_000] * 12}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"command_args": ["true"], "secret_ids": ["st-there"]}, grpc.StatusCode.NOT_FOUND),
        ({"command_args": ["true"], "container_id": "ctr-1"}, grpc.StatusCode.UNIMPLEMENTED),
    ],
)
async def test_commands_that_cannot_be_are_refused(routed, fields, code):
    assert (await routed.refusal("TaskExecStart", **fields))[0] is code
    assert not routed.asked


async def test_output_is_a_stream_from_the_byte_that_was_asked_for(routed):
    pieces = {3: Output(b"de", False), 5: Output(b"", False), 6: Output(b"", True)}

    def answer(request: ReadExec):
        if request.offset == 5 and len(routed.asked) > 2:
            return Output(b"f", False)
        return pieces[request.offset]

    routed.answer = answer
    request = router_pb2.TaskExecStdioReadRequest(
        task_id=TASK, exec_id="x", offset=3, file_descriptor=router_pb2.TASK_EXEC_STDIO_FILE_DESCRIPTOR_STDERR
    )
    stream = routed.stub.TaskExecStdioRead(request, metadata=routed.metadata, timeout=10)
    assert [piece.data async for piece in stream] == [b"de", b"f"]
    assert [(asked.fd, asked.offset) for asked in routed.asked] == [(2, 3), (2, 5), (2, 5), (2, 6)]


async def test_input_is_sent_until_all_of_it_is_taken(routed):
    taken = 0

    def answer(request: WriteExec):
        nonlocal taken
        taken = max(taken, min(request.offset + len(request.data), taken + 4))
        return Stdin(taken, request.is_last and taken == 10)

    routed.answer = answer
    await routed.call("TaskExecStdinWrite", data=b"0123456789", eof=True)
    assert [(asked.offset, asked.data) for asked in routed.asked] == [
        (0, b"0123456789"),
        (4, b"456789"),
        (8, b"89"),
    ]


async def test_a_stream_of_input_is_written_in_order_and_ended(routed):
    routed.answer = lambda request: Stdin(request.offset + len(request.data), request.is_last)
    kind = router_pb2.TaskExecStdinWriteStreamRequest
    start = kind(start=router_pb2.TaskExecStdinWriteStreamStart(task_id=TASK, exec_id="x", offset=2))
    end = kind(end=router_pb2.TaskExecStdinWriteStreamEnd())

    async def send(*messages):
        return await routed.stub.TaskExecStdinWriteStream(iter(messages), metadata=routed.metadata, timeout=10)

    await send(start, kind(data=b"abc"), kind(data=b"de"), end)
    assert [(asked.offset, asked.data, asked.is_last) for asked in routed.asked] == [
        (2, b"abc", False),
        (5, b"de", False),
        (7, b"", True),
    ]
    with pytest.raises(grpc.aio.AioRpcError, match="begins with one start"):
        await send(kind(data=b"abc"))


async def test_waiting_lasts_until_the_end_and_tells_codes_from_signals(routed):
    ends = iter([Ended(None), Ended(None), Ended(3)])
    routed.answer = lambda request: next(ends)
    reply = await routed.call("TaskExecWait")
    assert (reply.WhichOneof("exit_status"), reply.code) == ("code", 3)
    assert all(asked.wait_s > 0 for asked in routed.asked)
    routed.answer = lambda request: Ended(-9)
    assert (await routed.call("TaskExecWait")).signal == 9
    routed.answer = lambda request: Ended(None)
    assert (await routed.call("TaskExecPoll")).WhichOneof("exit_status") is None
    assert routed.asked[-1] == AwaitExec("x", 0.0)


async def test_what_the_worker_refuses_is_told_as_it_says(routed):
    routed.answer = lambda request: refused(InvalidArgument("a gap"))
    assert await routed.refusal("TaskExecStdinWrite", data=b"x") == (grpc.StatusCode.INVALID_ARGUMENT, "a gap")
    routed.answer = lambda request: refused(NotFound("no such command"))
    assert await routed.refusal("TaskExecWait") == (grpc.StatusCode.NOT_FOUND, "no such command")


async def test_clients_repeat_what_a_worker_did_not_answer(routed):
    asked = asyncio.Event()
    routed.answer = lambda request: asked.set()
    waiting = asyncio.create_task(routed.refusal("TaskExecWait"))
    await asked.wait()
    routed.workers.disconnected(routed.worker)
    assert (await waiting)[0] is grpc.StatusCode.UNAVAILABLE


async def test_commands_of_a_container_that_is_gone_are_lost_with_it(routed):
    routed.containers.up.clear()
    code, text = await routed.refusal("TaskExecWait")
    assert code is grpc.StatusCode.NOT_FOUND
    assert text == f"container {TASK} has ended, and with it all commands in it"


async def test_volumes_are_reloaded(routed):
    request = router_pb2.TaskReloadVolumesRequest(task_id=TASK)
    await routed.stub.TaskReloadVolumes(request, metadata=routed.metadata, timeout=10)
    assert routed.asked == [ReloadVolumes()]


async def test_what_is_not_built_names_itself_and_noise_is_no_bug(routed):
    request = router_pb2.TaskSnapshotFilesystemRequest(task_id=TASK)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await routed.stub.TaskSnapshotFilesystem(request, metadata=routed.metadata, timeout=10)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "TaskSnapshotFilesystem" in error.value.details()
    poll = routed.channel.unary_unary("/modal.task_command_router.TaskCommandRouter/TaskExecPoll")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await poll(b"\xff\xff\xff", metadata=routed.metadata, timeout=10)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
