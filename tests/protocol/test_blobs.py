"""Blobs as the official client sends and fetches them."""

import io
import os

import aiohttp
import pytest
from modal._utils import blob_utils, http_utils
from modal._utils.grpc_utils import create_channel
from modal_proto import api_grpc
from storage_server import storage_server

from aeolian.control import blobs as control
from aeolian.domain.errors import NotFound


@pytest.fixture
async def server(tmp_path, monkeypatch):
    async with storage_server(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
async def stub(server, monkeypatch):
    """The raw client of the SDK, with its HTTP session, on this event loop."""
    channel = create_channel(server.grpc_url)
    async with aiohttp.ClientSession() as session:
        monkeypatch.setattr(http_utils.ClientSessionRegistry, "get_session", staticmethod(lambda: session))
        yield api_grpc.ModalClientStub(channel)
    channel.close()


async def upload(stub, data: bytes) -> str:
    return await blob_utils.blob_upload(data, stub)


async def test_a_blob_of_ten_mebibytes_goes_up_and_comes_back(server, stub):
    data = os.urandom(10 << 20)
    blob_id = await upload(stub, data)
    assert await blob_utils.blob_download(blob_id, stub) == data
    assert await server.blobs.read(blob_id) == data
    assert (await server.blobs.open_path(blob_id)).stat().st_size == len(data)


async def test_a_large_blob_goes_up_in_parts(server, stub, monkeypatch):
    monkeypatch.setattr(control, "SINGLE_UPLOAD_BYTES", 1 << 20)
    monkeypatch.setattr(control, "PART_BYTES", 3 << 20)
    data = os.urandom(10 << 20)
    blob_id = await upload(stub, data)
    assert await server.blobs.read(blob_id) == data


async def test_a_public_host_name_gets_parts_for_every_blob(tmp_path, monkeypatch, stub, server):
    server.blobs._urls.base_url = f"http://some.host.name:{server.http_port}"
    upload = server.blobs.create(5, b"", b"")
    assert upload.url == "" and len(upload.part_urls) == 1
    server.blobs._urls.base_url = f"http://192.168.3.4:{server.http_port}"
    assert server.blobs.create(5, b"", b"").url


async def test_an_empty_blob_can_be_uploaded_whole_and_in_parts(server, stub, monkeypatch):
    assert await server.blobs.read(await upload(stub, b"")) == b""
    server.blobs._urls.base_url = server.blobs._urls.base_url.replace("127.0.0.1", "localhost.")
    created = server.blobs.create(0, b"", b"")
    assert len(created.part_urls) == 1


async def test_what_was_put_by_the_server_can_be_fetched(server, stub):
    blob_id = await server.blobs.put(b"an output")
    assert await blob_utils.blob_download(blob_id, stub) == b"an output"
    await server.blobs.delete(blob_id)
    with pytest.raises(NotFound):
        await server.blobs.read(blob_id)


async def test_content_that_is_not_what_was_announced_is_refused(server):
    import hashlib

    good = b"x" * 1000
    digests = hashlib.md5(good).digest(), hashlib.sha256(good).digest()
    created = server.blobs.create(len(good), *digests)
    async with aiohttp.ClientSession() as session:
        for body, status in ((b"y" * 1000, 400), (b"x" * 999, 400), (b"x" * 1001, 413)):
            async with session.put(created.url, data=body) as reply:
                assert reply.status == status
                assert list(await reply.json()) == ["error"]
        with pytest.raises(NotFound):
            await server.blobs.read(created.blob_id)
        async with session.put(created.url, data=io.BytesIO(good)) as reply:
            assert (reply.status, reply.headers["ETag"]) == (200, f'"{digests[0].hex()}"')
    assert await server.blobs.read(created.blob_id) == good


async def test_a_url_allows_only_what_it_was_made_for(server):
    blob_id = await server.blobs.put(b"secret")
    url = await server.blobs.download_url(blob_id)
    other = await server.blobs.put(b"other")
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as reply:
            assert (reply.status, await reply.read()) == (200, b"secret")
        async with session.head(url) as reply:
            assert (reply.status, reply.headers["Content-Length"]) == (200, "6")
        async with session.put(url, data=b"mine now") as reply:
            assert reply.status == 403
        async with session.get(url.replace(blob_id, other)) as reply:
            assert reply.status == 403
        async with session.get(url.split("?")[0]) as reply:
            assert reply.status == 403
        async with session.get(url.replace("expires=", "expires=9")) as reply:
            assert reply.status == 403
        async with session.get(url.split("/blobs")[0] + "/nothing/here") as reply:
            assert (reply.status, list(await reply.json())) == (404, ["error"])


async def test_ranges_are_served(server):
    url = await server.blobs.download_url(await server.blobs.put(bytes(range(100)) * 2000))
    async with aiohttp.ClientSession() as session:
        async with session.get(url, headers={"Range": "bytes=10-19"}) as reply:
            assert (reply.status, await reply.read()) == (206, bytes(range(10, 20)))
            assert reply.headers["Content-Range"] == "bytes 10-19/200000"
        async with session.get(url, headers={"Range": "bytes=-3"}) as reply:
            assert await reply.read() == bytes([97, 98, 99])
        async with session.get(url, headers={"Range": "bytes=500000-"}) as reply:
            assert reply.status == 416
        async with session.get(url, headers={"Range": "bytes=100-"}) as reply:
            assert len(await reply.read()) == 199900


async def test_old_blobs_that_nobody_owns_are_collected(server):
    import time

    kept, dropped = await server.blobs.put(b"1"), await server.blobs.put(b"2")
    assert await server.blobs.collect(time.time() - 60) == 0
    assert await server.blobs.collect(time.time() + 60, is_owned=lambda blob_id: blob_id == kept) == 1
    assert await server.blobs.read(kept) == b"1"
    with pytest.raises(NotFound):
        await server.blobs.read(dropped)
