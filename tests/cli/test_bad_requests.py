"""What no client of ours sends: each RPC refuses it clearly, changes nothing, and goes on."""

import asyncio
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from whole_server import METHODS, WholeServer, whole_server

from aeolian.protocol.errors import BUG

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
        for metadata in (nothing, wrong, half):
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
