"""The gateway as a whole: sockets, errors, files."""

import errno
import os
import stat

import aiohttp
import pytest
from aiohttp import web

from aeolian.domain.errors import NotFound, OutOfSpace
from aeolian.gateway.app import Gateway
from aeolian.gateway.send_file import send_file


@pytest.fixture
async def gateway(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 1000)

    async def fail(request: web.Request) -> web.StreamResponse:
        match request.match_info["how"]:
            case "missing":
                raise NotFound("there is no such thing")
            case "full":
                raise OutOfSpace("the server's disk is full")
            case "full-disk":
                raise OSError(errno.ENOSPC, "No space left on device")
        raise ZeroDivisionError("secret detail")

    async def file(request: web.Request) -> web.StreamResponse:
        return await send_file(request, tmp_path / "file", offset=100, length=200_000)

    gateway = Gateway([web.get("/fail/{how}", fail), web.get("/file", file)])
    await gateway.start(tmp_path / "http.sock")
    yield gateway
    await gateway.stop()


@pytest.fixture
async def session(gateway, tmp_path):
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(tmp_path / "http.sock"))) as session:
        yield session


async def test_the_socket_is_the_owners_alone(gateway, tmp_path):
    assert stat.S_IMODE(os.stat(tmp_path / "http.sock").st_mode) == 0o600


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/fail/missing", 404, "there is no such thing"),
        ("/fail/full", 507, "the server's disk is full"),
        ("/fail/full-disk", 507, "disk is full"),
        ("/fail/bug", 500, "bug in Aeolian"),
        ("/nowhere", 404, "Not Found"),
    ],
)
async def test_every_error_is_one_line_of_json(session, path, status, message):
    async with session.get("http://gateway" + path) as reply:
        body = await reply.json()
        assert reply.status == status and message in body["error"] and "secret" not in body["error"]


async def test_a_method_that_a_path_does_not_have_is_refused(session):
    async with session.delete("http://gateway/file") as reply:
        assert reply.status == 405 and "error" in await reply.json()


@pytest.mark.parametrize(
    ("asked", "status", "expected"),
    [
        (None, 206, slice(100, 200_100)),
        ("bytes=0-0", 206, slice(100, 101)),
        ("bytes=199999-", 206, slice(200_099, 200_100)),
        ("bytes=-70000", 206, slice(130_100, 200_100)),
        ("bytes=200000-", 416, slice(0, 0)),
        ("bytes=x", 416, slice(0, 0)),
    ],
)
async def test_ranges_apply_within_the_slice_that_is_sent(session, asked, status, expected):
    async with session.get("http://gateway/file", headers={"Range": asked} if asked else {}) as reply:
        assert reply.status == (status if asked else 200)
        assert await reply.read() == (bytes(range(256)) * 1000)[expected]


async def test_a_dead_socket_file_is_replaced_at_start(tmp_path):
    (tmp_path / "http.sock").touch()
    gateway = Gateway([])
    await gateway.start(tmp_path / "http.sock")
    await gateway.stop()
