"""A full disk: what cannot be stored is refused and changes nothing; with space again, everything goes on."""

import base64
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import grpc
import pytest
from modal_proto import api_pb2
from whole_server import WholeServer, whole_server

from aeolian.domain.link import AckOutputs, Outputs

DISK_MB = 8
ASYNC = api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC


def can_mount() -> bool:
    folder = tempfile.mkdtemp(prefix="aeolian-")
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0
    except OSError:
        return False
    finally:
        os.rmdir(folder)


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not can_mount(), reason="a small disk needs root, to mount it"
)


class Disk:
    def __init__(self, folder: Path):
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as stream:
            while stream.write(bytes(4096)):
                pass

    def free(self) -> None:
        self._filler.unlink()


@pytest.fixture
def disk() -> Iterator[Disk]:
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)], check=True)
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    shutil.rmtree(folder)


@pytest.fixture
async def server(disk) -> AsyncIterator[WholeServer]:
    async with whole_server(disk.folder / "data") as server:
        yield server


async def a_dict(server: WholeServer) -> str:
    request = api_pb2.DictGetOrCreateRequest(object_creation_type=api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL)
    return (await server.call("DictGetOrCreate", request)).message.dict_id


async def put(server: WholeServer, dict_id: str, key: bytes, num_bytes: int):
    entry = api_pb2.DictEntry(key=key, value=os.urandom(num_bytes))
    return await server.call("DictUpdate", api_pb2.DictUpdateRequest(dict_id=dict_id, updates=[entry]))


async def test_a_write_that_does_not_fit_is_refused_in_words_and_is_not_repeated(server, disk):
    dict_id = await a_dict(server)
    disk.fill()
    reply = await put(server, dict_id, b"large", 1 << 20)
    assert reply.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "disk is full: free space in its data directory" in reply.text
    found = await server.call("DictContains", api_pb2.DictContainsRequest(dict_id=dict_id, key=b"large"))
    assert not found.message.found
    disk.free()
    assert (await put(server, dict_id, b"large", 1 << 20)).code is grpc.StatusCode.OK


async def test_an_output_is_kept_until_there_is_space_for_it(server, disk):
    worker = await server.worker()
    _, function_id = await server.deploy()
    request = api_pb2.FunctionMapRequest(
        function_id=function_id,
        function_call_type=api_pb2.FUNCTION_CALL_TYPE_UNARY,
        function_call_invocation_type=ASYNC,
        pipelined_inputs=[api_pb2.FunctionPutInputsItem(input=api_pb2.FunctionInput(args=b"x"))],
    )
    call = (await server.call("FunctionMap", request)).message
    task_id = await worker.started()
    [held] = (await worker.given(task_id)).held
    disk.fill()
    data = os.urandom(1 << 20)
    item = api_pb2.FunctionPutOutputsItem(
        input_id=held.input_id, result={"status": api_pb2.GenericResult.GENERIC_STATUS_SUCCESS, "data": data}
    )
    worker.send(Outputs(task_id, 1, (item.SerializeToString(),)))
    refused = await server.call("FunctionMap", request, key="another")
    assert refused.code is grpc.StatusCode.FAILED_PRECONDITION and "disk is full" in refused.text
    assert not [command for command in worker.commands if isinstance(command, AckOutputs)]
    disk.free()
    assert (await worker.told(AckOutputs, timeout_s=20)).seq == 1
    outputs = await server.call(
        "FunctionGetOutputs",
        api_pb2.FunctionGetOutputsRequest(
            function_call_id=call.function_call_id, timeout=5, last_entry_id="0-0", start_idx=0, end_idx=0
        ),
    )
    assert [output.result.data for output in outputs.message.outputs] == [data]


async def test_an_upload_that_does_not_fit_leaves_nothing(server, disk):
    data = os.urandom(3 << 20)
    md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    created = await server.call("BlobCreate", api_pb2.BlobCreateRequest(content_length=len(data), content_md5=md5))
    url = urlsplit(created.message.upload_url)
    connector = aiohttp.UnixConnector(str(server.settings.http_socket))
    async with aiohttp.ClientSession(connector=connector) as session:
        disk.fill()
        with contextlib.suppress(aiohttp.ClientError):  # it may hang up before all is sent
            async with session.put(f"http://gateway{url.path}?{url.query}", data=data) as reply:
                assert reply.status == 507 and "disk is full" in await reply.text()
        missing = await server.call("BlobGet", api_pb2.BlobGetRequest(blob_id=created.message.blob_id))
        assert missing.code is grpc.StatusCode.NOT_FOUND
        disk.free()
        async with session.put(f"http://gateway{url.path}?{url.query}", data=data) as reply:
            assert reply.status == 200
    assert (await server.call("BlobGet", api_pb2.BlobGetRequest(blob_id=created.message.blob_id))).message
