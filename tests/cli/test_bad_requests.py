"""What no client of ours sends: each RPC refuses it clearly, changes nothing, and goes on."""

import asyncio
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import modal
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from modal_proto import api_pb2
from whole_server import METHODS, SomeWorker, WholeServer, whole_server

from aeolian.control import calls, queues
from aeolian.protocol.errors import BUG
from aeolian.protocol.token_flows import OPEN_METHODS

CODES = grpc.StatusCode
RETRIED = {CODES.INTERNAL, CODES.UNKNOWN, CODES.CANCELLED}
"""What clients repeat up to four times, and what no bad request deserves."""
MAX_DEPTH = 4
WAITS = {"AppGetLogs", "FunctionCallGetDataIn", "FunctionCallGetDataOut"}
"""Streams that end at the caller's own time."""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """With a short name: Unix sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    yield folder / "data"
    shutil.rmtree(folder)


@pytest.fixture
async def server(data_dir) -> AsyncIterator[WholeServer]:
    async with whole_server(data_dir) as server:
        yield server


@pytest.fixture
def bugs(caplog) -> Iterator[list[str]]:
    """What the server's log says of its own mistakes: nothing, at the end of each test."""
    caplog.set_level(logging.ERROR)
    found: list[str] = []
    yield found
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == found


def requests(name: str) -> type[Message]:
    return GetMessageClass(METHODS[name].input_type)


def filled(descriptor: Descriptor, value: str, depth: int = 0) -> Message:
    """A message with this text in every field that can hold it, in lists and inner messages, too."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        repeated = field.is_repeated
        if field.type == FieldDescriptor.TYPE_STRING:
            new = value
        elif field.type == FieldDescriptor.TYPE_BYTES:
            new = value.encode()
        elif field.type == FieldDescriptor.TYPE_MESSAGE and depth < MAX_DEPTH:
            new = filled(field.message_type, value, depth + 1)
        else:
            continue
        if repeated:
            getattr(message, field.name).append(new)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(new)
        else:
            setattr(message, field.name, new)
    return message


async def refused(server: WholeServer, name: str, request: Message | bytes, **kwargs) -> str:
    """One line when the answer is none that a client can make something of."""
    reply = await server.call(name, request, timeout_s=1.0 if name in WAITS else 10.0, **kwargs)
    if reply.code is CODES.RESOURCE_EXHAUSTED and "metadata" in reply.text:
        return f"{name}: a message that is too long for a header"
    if reply.code in RETRIED or reply.code is BUG or (reply.code is CODES.DEADLINE_EXCEEDED and name not in WAITS):
        return f"{name}: {reply.code.name} {reply.text}"
    if reply.code is not CODES.OK and not reply.text and name not in WAITS:
        return f"{name}: {reply.code.name} without a word"
    return ""


async def of_each(names, check) -> list[str]:
    """What `check(name)` complains of, over all of them, some at a time."""
    limit = asyncio.Semaphore(16)

    async def one(name: str) -> str:
        async with limit:
            return await check(name)

    return sorted(filter(None, await asyncio.gather(*map(one, names))))


@pytest.mark.parametrize(
    "value", ["", "nonsense", "fu-000000000000000000000000", "../../etc/passwd", "\x00\ud7ff", "x" * 70_000]
)
async def test_every_rpc_answers_ids_and_names_that_are_none(server, bugs, value):
    assert (
        await of_each(server.built, lambda name: refused(server, name, filled(METHODS[name].input_type, value))) == []
    )


async def test_every_rpc_answers_an_empty_request(server, bugs):
    assert await of_each(server.built, lambda name: refused(server, name, b"")) == []


async def test_bytes_that_are_no_message_are_an_invalid_argument(server, bugs):
    async def check(name: str) -> str:
        reply = await server.call(name, b"\x0a\xff\xff\xff\xff\x0f")
        is_clear = reply.code is CODES.INVALID_ARGUMENT and reply.text.startswith(f"{name}: ")
        return "" if is_clear else f"{name}: {reply.code.name} {reply.text}"

    takes_nothing = {name for name in server.built if not METHODS[name].input_type.fields}
    assert await of_each(server.built - takes_nothing, check) == []


async def test_every_rpc_wants_a_token(server, bugs):
    nothing, wrong = (), (("x-modal-token-id", "ak-1"), ("x-modal-token-secret", "as-1"))
    half = server.token[:1]

    async def check(name: str) -> str:
        for metadata in (wrong, half) if name in OPEN_METHODS else (nothing, wrong, half):
            reply = await server.call(name, b"", metadata=metadata)
            if reply.code is not CODES.UNAUTHENTICATED or "aeolian connect" not in reply.text:
                return f"{name}: {reply.code.name} {reply.text}"
        return ""

    assert await of_each(METHODS, check) == []


async def test_an_rpc_that_is_not_built_says_so_with_its_name(server, bugs):
    async def check(name: str) -> str:
        reply = await server.call(name, b"")
        is_clear = reply.code is CODES.UNIMPLEMENTED and name in reply.text and "docs/compatibility.md" in reply.text
        return "" if is_clear else f"{name}: {reply.code.name} {reply.text}"

    assert await of_each(METHODS.keys() - server.built, check) == []


# ---- who may do what ----------------------------------------------------------------------------------------


async def a_container(server: WholeServer) -> tuple[SomeWorker, str, str, str]:
    """A worker, its container at work, the call and the input that it has in hand."""
    worker = await server.worker()
    _, function_id = await server.deploy()
    call = await server.call("FunctionMap", a_call(function_id))
    task_id = await worker.started()
    [held] = (await worker.given(task_id)).held
    return worker, task_id, call.message.function_call_id, held.input_id


def a_call(function_id: str) -> api_pb2.FunctionMapRequest:
    return api_pb2.FunctionMapRequest(
        function_id=function_id,
        function_call_type=api_pb2.FUNCTION_CALL_TYPE_UNARY,
        function_call_invocation_type=api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC,
        pipelined_inputs=[api_pb2.FunctionPutInputsItem(input=api_pb2.FunctionInput(args=b"x"))],
    )


async def test_every_rpc_answers_nonsense_from_a_container_too(server, bugs):
    worker, task_id, _, _ = await a_container(server)
    metadata = worker.as_container(task_id)

    async def check(name: str) -> str:
        return await refused(server, name, filled(METHODS[name].input_type, "nonsense"), metadata=metadata)

    assert await of_each(server.built, check) == []


async def test_only_a_worker_speaks_for_containers(server, bugs):
    worker, task_id, _, _ = await a_container(server)
    (name, _), (token_name, _) = worker.as_container(task_id)

    async def check(rpc: str) -> str:
        for token in ("", "guessed"):
            metadata = ((name, task_id), (token_name, token), *server.token)
            reply = await server.call(rpc, b"", metadata=metadata)
            if reply.code is not CODES.PERMISSION_DENIED:
                return f"{rpc}: {reply.code.name} {reply.text}"
        return ""

    assert await of_each(server.built, check) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TokensList", b""),
        ("TokenDelete", api_pb2.TokenDeleteRequest(token_id="ak-1")),
        ("TokenDisable", api_pb2.TokenDisableRequest(token_ids=["ak-1"])),
        ("EnvironmentCreate", api_pb2.EnvironmentCreateRequest(name="mine")),
        ("EnvironmentDelete", api_pb2.EnvironmentDeleteRequest(name="main")),
    ],
)
async def test_a_container_cannot_do_what_is_for_its_users(server, bugs, name, message):
    worker, task_id, _, _ = await a_container(server)
    reply = await server.call(name, message, metadata=worker.as_container(task_id))
    assert reply.code is CODES.PERMISSION_DENIED and "container" in reply.text


async def test_a_container_cannot_act_for_another(server, bugs):
    worker, task_id, call_id, _ = await a_container(server)
    _, function_id = await server.deploy("other")
    other_call = (await server.call("FunctionMap", a_call(function_id))).message.function_call_id
    other_task = await worker.started()
    await worker.given(other_task)
    metadata = worker.as_container(task_id)

    stop = await server.call("ContainerStop", api_pb2.ContainerStopRequest(task_id=other_task), metadata=metadata)
    assert stop.code is CODES.PERMISSION_DENIED and other_task in stop.text
    chunk = api_pb2.FunctionCallPutDataRequest(
        function_call_id=other_call, data_chunks=[api_pb2.DataChunk(index=1, data=b"x")]
    )
    put = await server.call("FunctionCallPutDataOut", chunk, metadata=metadata)
    assert put.code is CODES.FAILED_PRECONDITION and other_call in put.text
    read = api_pb2.FunctionCallGetDataRequest(function_call_id=other_call)
    body = await server.call("FunctionCallGetDataIn", read, metadata=metadata)
    assert body.code is CODES.FAILED_PRECONDITION and other_call in body.text
    chunk.function_call_id = call_id
    assert (await server.call("FunctionCallPutDataOut", chunk, metadata=metadata)).code is CODES.OK


async def test_a_client_cannot_answer_for_a_container(server, bugs):
    _, _, call_id, input_id = await a_container(server)
    outputs = api_pb2.FunctionPutOutputsRequest(outputs=[api_pb2.FunctionPutOutputsItem(input_id=input_id)])
    for name, request in (
        ("FunctionPutOutputs", outputs),
        ("FunctionGetInputs", api_pb2.FunctionGetInputsRequest()),
        ("ContainerHeartbeat", api_pb2.ContainerHeartbeatRequest()),
        ("FunctionCallPutDataOut", api_pb2.FunctionCallPutDataRequest(function_call_id=call_id)),
    ):
        reply = await server.call(name, request)
        assert reply.code in (CODES.PERMISSION_DENIED, CODES.UNIMPLEMENTED), f"{name}: {reply.code} {reply.text}"


async def test_ids_of_another_workspace_are_none(server, bugs):
    _, task_id, call_id, input_id = await a_container(server)
    known = {"task_id": task_id, "function_call_id": call_id, "input_id": input_id}
    [app] = server.services.apps.living_apps()
    known |= {"app_id": app.app_id, "function_id": server.services.containers.get(task_id).function_id}
    for noun in ("Dict", "Queue", "Secret", "Volume"):
        request = GetMessageClass(METHODS[f"{noun}GetOrCreate"].input_type)(
            deployment_name="one", object_creation_type=api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING
        )
        message = (await server.call(f"{noun}GetOrCreate", request)).message
        known[f"{noun.lower()}_id"] = getattr(message, f"{noun.lower()}_id")
    token_id, secret = await server.services.tokens.create("stranger", "elsewhere")
    stranger = (("x-modal-token-id", token_id), ("x-modal-token-secret", secret))

    async def check(name: str) -> str:
        request = requests(name)()
        fields = [field for field in METHODS[name].input_type.fields if field.name in known and not field.is_repeated]
        if not fields:
            return ""
        for field in fields:
            setattr(request, field.name, known[field.name])
        reply = await server.call(name, request, metadata=stranger, timeout_s=2)
        return f"{name}: {reply.messages}" if reply.code in (CODES.OK, CODES.DEADLINE_EXCEEDED) else ""

    assert await of_each(server.built, check) == []


async def test_names_are_those_of_an_environment(server, bugs):
    await server.call("EnvironmentCreate", api_pb2.EnvironmentCreateRequest(name="dev"))
    await server.deploy("app", environment="dev")
    request = api_pb2.FunctionGetRequest(app_name="app", object_tag="f")
    reply = await server.call("FunctionGet", request)
    assert reply.code is CODES.NOT_FOUND and "environment 'main'" in reply.text
    request.environment_name = "dev"
    assert (await server.call("FunctionGet", request)).code is CODES.OK
    request.environment_name = "nowhere"
    reply = await server.call("FunctionGet", request)
    assert reply.code is CODES.NOT_FOUND and "there is no environment 'nowhere'" in reply.text


# ---- too much -----------------------------------------------------------------------------------------------


async def test_payloads_that_are_too_large_are_refused_with_their_limit(server, bugs):
    _, function_id = await server.deploy()
    large = a_call(function_id)
    large.pipelined_inputs[0].input.args = bytes(9 << 20)
    reply = await server.call("FunctionMap", large)
    assert reply.code is CODES.INVALID_ARGUMENT and f"{calls.MAX_PAYLOAD_BYTES:,}" in reply.text
    many = a_call(function_id)
    many.pipelined_inputs.extend([many.pipelined_inputs[0]] * 1001)
    reply = await server.call("FunctionMap", many)
    assert reply.code is CODES.INVALID_ARGUMENT and "1000" in reply.text
    queue = await server.call(
        "QueueGetOrCreate",
        api_pb2.QueueGetOrCreateRequest(object_creation_type=api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL),
    )
    put = api_pb2.QueuePutRequest(queue_id=queue.message.queue_id, values=[bytes(2 << 20)])
    reply = await server.call("QueuePut", put)
    assert reply.code is CODES.INVALID_ARGUMENT and f"{queues.MAX_ITEM_BYTES:,}" in reply.text
    assert (await server.call("ClientHello", b"")).code is CODES.OK


# ---- our own mistakes ---------------------------------------------------------------------------------------


class Broken:
    """RPCs that nothing else answers, by a handler with a mistake in it."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def SharedVolumeDelete(self, request, caller):
        self.num_calls += 1
        raise KeyError("a mistake of ours")

    async def SharedVolumeGetOrCreate(self, request, caller):
        self.num_calls += 1
        raise KeyError("a mistake of ours")

    async def SharedVolumeHeartbeat(self, request, caller):
        self.num_calls += 1
        return None

    async def SharedVolumeListFilesStream(self, request, caller):
        self.num_calls += 1
        yield api_pb2.SharedVolumeListFilesResponse()
        raise KeyError("a mistake of ours")


@pytest.mark.parametrize("name", ["SharedVolumeDelete", "SharedVolumeHeartbeat", "SharedVolumeListFilesStream"])
async def test_a_mistake_of_ours_is_reported_with_a_reference_and_not_repeated(data_dir, caplog, name):
    broken = Broken()
    async with whole_server(data_dir, resources=lambda services: [broken]) as server:
        reply = await server.call(name, b"", key="once")
        assert reply.code is BUG and reply.code not in RETRIED
        assert f"{name} failed inside Aeolian: this is a bug" in reply.text
        reference = reply.text.partition("reference ")[2].partition(" ")[0]
        assert any(reference in record.getMessage() and record.exc_info for record in caplog.records)


@pytest.mark.filterwarnings("ignore:.*NetworkFileSystem.*")
async def test_the_official_client_runs_a_write_with_a_mistake_once(data_dir, monkeypatch):
    broken = Broken()
    async with whole_server(data_dir, resources=lambda services: [broken]) as server:
        monkeypatch.setenv("MODAL_SERVER_URL", f"unix://{server.settings.grpc_socket}")
        client = await modal.Client.from_credentials.aio(*(value for _, value in server.token))
        try:
            with pytest.raises(modal.exception.Error, match="this is a bug"):
                await modal.NetworkFileSystem.from_name("x", create_if_missing=True).hydrate.aio(client)
        finally:
            await client.close.aio()
    assert broken.num_calls == 1
