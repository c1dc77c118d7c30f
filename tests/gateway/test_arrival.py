import asyncio

import pytest
from aiohttp import web

from aeolian.gateway.app import Gateway
from aeolian.gateway.arrival import public_port


@pytest.fixture
async def socket_path(tmp_path):
    async def show(request: web.Request) -> web.StreamResponse:
        return web.Response(text=f"{request.remote} {public_port(request)}")

    gateway = Gateway([web.get("/", show)])
    await gateway.start(tmp_path / "http.sock")
    yield tmp_path / "http.sock"
    await gateway.stop()


async def exchange(path, *pieces: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        reply = await reader.read()
    writer.close()
    return reply


GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
LINE = b"PROXY TCP4 198.51.100.7 10.0.0.1 5555 9911\r\n"


@pytest.mark.parametrize(
    "pieces", [(LINE + GET,), (LINE, GET), (LINE[:3], LINE[3:20], LINE[20:-1], b"\n" + GET[:5], GET[5:])]
)
async def test_the_first_line_says_who_came_and_where(socket_path, pieces):
    assert (await exchange(socket_path, *pieces)).endswith(b"198.51.100.7 9911")


@pytest.mark.parametrize("pieces", [(GET,), (GET[:2], GET[2:])])
async def test_connections_without_it_came_to_no_public_port(socket_path, pieces):
    assert (await exchange(socket_path, *pieces)).endswith(b" 0")


@pytest.mark.parametrize("line", [b"PROXY nonsense\r\n", b"PROXY TCP4 a b c d\r\n", b"PROXY " + b"x" * 500])
async def test_a_first_line_that_is_none_ends_the_connection(socket_path, line):
    try:
        assert await exchange(socket_path, line) == b""
    except ConnectionError:
        pass


async def test_a_second_first_line_is_no_request(socket_path):
    assert b" 400 " in (await exchange(socket_path, LINE + LINE + GET)).splitlines()[0]
