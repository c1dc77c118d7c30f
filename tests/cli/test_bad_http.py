"""Malformed, forged and slow requests to the gateway: a clear refusal of each, and service for everybody else."""

import asyncio
import base64
import hashlib
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modal_proto import api_pb2
from whole_server import WholeServer, whole_server

CONTENT = b"what was uploaded"


@pytest.fixture
def data_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    yield folder / "data"
    shutil.rmtree(folder)


@pytest.fixture
async def server(data_dir) -> AsyncIterator[WholeServer]:
    async with whole_server(data_dir) as server:
        yield server


async def raw(server: WholeServer, request: bytes, *, breaks_off: bool = False) -> tuple[int, bytes]:
    """Send these bytes; the status and the whole answer (0: none came before the connection was closed)."""
    reader, writer = await asyncio.open_unix_connection(str(server.settings.http_socket))
    reply = b""
    try:
        writer.write(request)
        if breaks_off:
            writer.write_eof()
        async with asyncio.timeout(10):
            while data := await reader.read(1 << 16):
                reply += data
    except ConnectionError:
        pass
    finally:
        writer.close()
    return (int(reply.split(b" ", 2)[1]) if reply.startswith(b"HTTP/") else 0), reply


async def ask(server: WholeServer, method: str, target: str, body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return await raw(server, head.encode() + body)


async def a_blob(server: WholeServer) -> tuple[str, str]:
    """Paths of its upload and its download, with their signatures."""
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).digest()
    created = await server.call(
        "BlobCreate",
        api_pb2.BlobCreateRequest(content_length=len(CONTENT), content_md5=base64.b64encode(md5).decode()),
    )
    upload = urlsplit(created.message.upload_url)
    status, _ = await ask(server, "PUT", f"{upload.path}?{upload.query}", CONTENT)
    assert status == 200
    found = await server.call("BlobGet", api_pb2.BlobGetRequest(blob_id=created.message.blob_id))
    download = urlsplit(found.message.download_url)
    return f"{upload.path}?{upload.query}", f"{download.path}?{download.query}"


async def test_only_what_was_signed_is_allowed(server):
    put, get = await a_blob(server)
    status, reply = await ask(server, "GET", get)
    assert status == 200 and reply.endswith(CONTENT)
    path, _, query = get.partition("?")
    expires, _, signature = query.partition("&signature=")
    forged = [
        ("GET", path),
        ("GET", f"{path}?{expires}"),
        ("GET", f"{path}?{expires}&signature="),
        ("GET", f"{path}?{expires}&signature=%ff%fe"),
        ("GET", f"{path}?{expires}&signature={signature[:-1]}0"),
        ("GET", f"{path}?expires=99999999999&signature={signature}"),
        ("GET", f"{get}&length=1"),
        ("GET", put),
        ("PUT", get),
        ("GET", get.replace("/blobs/bl-", "/blobs/bl-x")),
        ("GET", f"/blobs/bl-0?{query}"),
    ]
    for method, target in forged:
        status, reply = await ask(server, method, target)
        assert status == 403, f"{method} {target}: {reply}"
        assert b"signature" in reply and b"Traceback" not in reply


async def test_a_url_whose_time_is_over_says_so(server):
    _, get = await a_blob(server)
    server.services.blobs._urls._lifetime_s = -1.0
    _, get = await a_blob_again(server, get)
    status, reply = await ask(server, "GET", get)
    assert status == 403 and b"has expired: ask for a new one" in reply


async def a_blob_again(server: WholeServer, get: str) -> tuple[str, str]:
    blob_id = get.partition("?")[0].rpartition("/")[2]
    found = await server.call("BlobGet", api_pb2.BlobGetRequest(blob_id=blob_id))
    download = urlsplit(found.message.download_url)
    return blob_id, f"{download.path}?{download.query}"


@pytest.mark.parametrize(
    "target",
    [
        "/blobs/../keys/client.json",
        "/blobs/..%2fkeys%2fclient.json",
        "/blobs/%2e%2e/%2e%2e/etc/passwd",
        "/blobs/..%5c..%5cetc",
        "/blobs//etc/passwd",
        "/volumes/files/..%2f..%2fkeys%2furls.key",
        "/volumes/files/%2fetc%2fpasswd",
        "/blobs/bl-%00",
        "/" + "a/" * 500,
        "*",
        "http://elsewhere/blobs/x",
    ],
)
async def test_no_path_leads_out(server, target):
    for method in ("GET", "PUT", "POST", "DELETE"):
        status, reply = await ask(server, method, target)
        assert 400 <= status < 500, reply
        assert b"root:" not in reply and b"token_secret" not in reply


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"c" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_refused(server, request_bytes):
    status, reply = await raw(server, request_bytes, breaks_off=True)
    assert status == 0 or 400 <= status < 500, reply


async def test_a_body_that_breaks_off_is_not_stored(server):
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).digest()
    created = await server.call(
        "BlobCreate",
        api_pb2.BlobCreateRequest(content_length=len(CONTENT), content_md5=base64.b64encode(md5).decode()),
    )
    upload = urlsplit(created.message.upload_url)
    head = f"PUT {upload.path}?{upload.query} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(CONTENT)}\r\n\r\n".encode()
    status, _ = await raw(server, head + CONTENT[:5], breaks_off=True)
    assert status == 0 or 400 <= status < 500
    found = await server.call("BlobGet", api_pb2.BlobGetRequest(blob_id=created.message.blob_id))
    assert found.code.name == "NOT_FOUND"
    status, _ = await ask(server, "PUT", f"{upload.path}?{upload.query}", CONTENT + b"more than was announced")
    assert status == 413
    status, _ = await ask(server, "PUT", f"{upload.path}?{upload.query}", CONTENT)
    assert status == 200


async def test_clients_that_take_their_time_keep_nobody_waiting(server):
    _, get = await a_blob(server)
    slow = [await asyncio.open_unix_connection(str(server.settings.http_socket)) for _ in range(200)]
    for number, (_, writer) in enumerate(slow):
        writer.write(b"GET / HTTP/1.1\r\nHost:"[: number % 20])
    status, reply = await ask(server, "GET", get)
    assert status == 200 and reply.endswith(CONTENT)
    for _, writer in slow:
        writer.close()


def test_random_requests_find_no_bug(caplog):
    caplog.set_level(logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="aeolian-"))
    with asyncio.Runner() as runner:
        context = whole_server(folder / "data")
        server = runner.run(context.__aenter__())
        put, get = runner.run(a_blob(server))
        words = st.sampled_from(
            ["/blobs/", "/volumes/files/", "/volumes/blocks/", "/apps/", "/parts/", "/complete", "..", "%00", "%ff", "?",
             "&", "signature=", "expires=", "length=", "bl-1", "0", "-1", "9" * 30, put, get]
        )  # fmt: skip
        headers = st.sampled_from(
            ["", "Range: bytes=5-1\r\n", "Range: bytes=-99999999999\r\n", "Range: x\r\n", "Expect: 100-continue\r\n",
             "Content-Encoding: gzip\r\n", "Content-Type: multipart/form-data\r\n", "If-None-Match: *\r\n"]
        )  # fmt: skip

        @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(
            st.sampled_from(["GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "NONSENSE"]),
            st.lists(words | st.text("abc%./?&=-0123456789", max_size=8), min_size=1, max_size=5),
            headers,
            st.binary(max_size=30),
        )
        def fuzz(method, parts, header, body):
            target = "/" + "".join(parts).lstrip("/")
            status, reply = runner.run(ask(server, method, target, body, header))
            assert status < 500, f"{method} {target}: {reply}"

        try:
            fuzz()
        finally:
            runner.run(context.__aexit__(None, None, None))
            shutil.rmtree(folder)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
