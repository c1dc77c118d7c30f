"""Random requests to every RPC: right ids in wrong places, numbers out of range, half messages, plain noise."""

import asyncio
import logging
import shutil
import tempfile
from pathlib import Path

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modal_proto import api_pb2
from whole_server import METHODS, WholeServer, whole_server

from aeolian.protocol.errors import BUG

NEVER = {BUG, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}
WAITS_S = 0.3
"""Long polls are given up after this."""
WAITING = {
    "AppGetLogs",
    "FunctionCallGetDataIn",
    "FunctionCallGetDataOut",
    "FunctionGetOutputs",
    "ImageFromId",
    "ImageJoinStreaming",
    "ImagePublish",
    "QueueGet",
    "QueueNextItems",
}
"""What waits for something to happen."""
HANGS_S = 20.0
MAX_DEPTH = 3
MAX_FIELDS = 6
CREATE = api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING

integers = st.one_of(st.integers(0, 3), st.integers())
numbers = st.one_of(st.floats(width=32), st.sampled_from([0.0, -1.0, 1e300, float("inf"), float("nan")]))
RANGES = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
}


async def names_of(server: WholeServer) -> list[str]:
    """One of each noun is there; what it is called by."""
    app_id, function_id = await server.deploy()
    call = await server.call(
        "FunctionMap",
        api_pb2.FunctionMapRequest(
            function_id=function_id,
            function_call_type=api_pb2.FUNCTION_CALL_TYPE_UNARY,
            function_call_invocation_type=api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC,
            pipelined_inputs=[api_pb2.FunctionPutInputsItem(input=api_pb2.FunctionInput(args=b"x"))],
        ),
    )
    message = call.message
    found = [app_id, function_id, message.function_call_id, message.function_call_jwt]
    found += [message.pipelined_inputs[0].input_id, message.pipelined_inputs[0].input_jwt]
    for noun in ("Dict", "Queue", "Secret", "Volume"):
        request = GetMessageClass(METHODS[f"{noun}GetOrCreate"].input_type)(
            deployment_name="one", object_creation_type=CREATE
        )
        found.append(getattr((await server.call(f"{noun}GetOrCreate", request)).message, f"{noun.lower()}_id"))
    blob = await server.call("BlobCreate", api_pb2.BlobCreateRequest(content_length=3))
    environment = await server.call("EnvironmentGetOrCreate", b"")
    return [
        *found,
        blob.message.blob_id,
        environment.message.environment_id,
        server.token[0][1],
        "app",
        "f",
        "one",
        "main",
    ]


def messages(data: st.DataObject, descriptor: Descriptor, texts: st.SearchStrategy[str], depth: int = 0) -> Message:
    """A message with a few fields of any value."""
    message = GetMessageClass(descriptor)()
    fields = [field for field in descriptor.fields if field.message_type is None or not _is_map(field)]
    if not fields:
        return message
    for field in data.draw(st.lists(st.sampled_from(fields), max_size=MAX_FIELDS, unique_by=lambda f: f.number)):
        values = [
            value(data, field, texts, depth) for _ in range(data.draw(st.integers(1, 2)) if field.is_repeated else 1)
        ]
        if field.is_repeated:
            getattr(message, field.name).extend(values)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(values[0])
        else:
            setattr(message, field.name, values[0])
    return message


def value(data: st.DataObject, field: FieldDescriptor, texts: st.SearchStrategy[str], depth: int):
    match field.type:
        case FieldDescriptor.TYPE_MESSAGE if depth < MAX_DEPTH:
            return messages(data, field.message_type, texts, depth + 1)
        case FieldDescriptor.TYPE_MESSAGE:
            return GetMessageClass(field.message_type)()
        case FieldDescriptor.TYPE_STRING:
            return data.draw(texts)
        case FieldDescriptor.TYPE_BYTES:
            return data.draw(st.one_of(st.binary(max_size=40), texts.map(str.encode)))
        case FieldDescriptor.TYPE_BOOL:
            return data.draw(st.booleans())
        case FieldDescriptor.TYPE_ENUM:
            numbers_of = [one.number for one in field.enum_type.values]
            return data.draw(st.one_of(st.sampled_from(numbers_of), st.integers(0, 99)))
        case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
            return data.draw(numbers)
        case kind:
            low, high = RANGES[kind]
            return data.draw(integers.map(lambda number: min(max(number, low), high)) | st.sampled_from([low, high]))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type.GetOptions().map_entry


def test_no_request_finds_a_bug_or_hangs(caplog):
    caplog.set_level(logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    with asyncio.Runner() as runner:
        context = whole_server(folder / "data")
        server = runner.run(context.__aenter__())
        known = runner.run(names_of(server))
        texts = st.one_of(
            st.sampled_from(known),
            st.sampled_from(["", ".", "..", "/", "../x", "a/../../b", "%2e%2e/", "-1", "0-0", "\x00", "x" * 300]),
            st.text(max_size=20),
        )
        built = sorted(server.built)

        @settings(max_examples=1500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def fuzz(data):
            name = data.draw(st.sampled_from(built))
            request: Message | bytes = messages(data, METHODS[name].input_type, texts)
            if data.draw(st.integers(0, 9)) == 0:
                raw = request.SerializeToString()
                cut = data.draw(st.integers(0, len(raw)))
                request = raw[:cut] + data.draw(st.binary(max_size=20)) + raw[cut:]
            reply = runner.run(server.call(name, request, timeout_s=WAITS_S if name in WAITING else HANGS_S))
            assert reply.code not in NEVER, f"{name}: {reply.code.name} {reply.text}"
            assert reply.code is not grpc.StatusCode.DEADLINE_EXCEEDED or name in WAITING, f"{name} hangs"
            assert "metadata" not in reply.text or reply.code is not grpc.StatusCode.RESOURCE_EXHAUSTED

        try:
            fuzz()
            answer = runner.run(server.call("ClientHello", b"", timeout_s=5))
            assert answer.code is grpc.StatusCode.OK
        finally:
            runner.run(context.__aexit__(None, None, None))
            shutil.rmtree(folder)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
