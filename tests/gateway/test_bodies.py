"""Bodies of requests: streamed, bounded, and given up when their client stalls."""

import asyncio

import aiohttp
import pytest
from aiohttp import web

from aeolian.gateway.app import Gateway
from aeolian.gateway.bodies import chunks_of, text_of


@pytest.fixture
async def session(tmp_path):
    async def count(request: web.Request) -> web.Response:
        return web.Response(text=str(sum([len(chunk) async for chunk in chunks_of(request, stall_s=0.2)])))

    async def echo(request: web.Request) -> web.Response:
        return web.Response(text=await text_of(request, max_bytes=1000))

    gateway = Gateway([web.put("/count", count), web.post("/echo", echo)])
    await gateway.start(tmp_path / "http.sock")
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(tmp_path / "http.sock"))) as session:
        yield session
    await gateway.stop()


async def test_a_body_comes_whole(session):
    async with session.put("http://gateway/count", data=bytes(5_000_000)) as reply:
        assert (reply.status, await reply.text()) == (200, "5000000")


async def test_a_client_that_stops_in_the_middle_is_told_to_send_it_again(session):
    async def half():
        yield b"half of it"
        await asyncio.sleep(30)

    async with session.put("http://gateway/count", data=half(), headers={"Content-Length": "20"}) as reply:
        assert reply.status == 408
        assert "send it again" in (await reply.json())["error"]


@pytest.mark.parametrize(("body", "status"), [(b"x" * 1000, 200), (b"x" * 1001, 413), (b"\xff", 400)])
async def test_a_small_body_is_small_and_text(session, body, status):
    async with session.post("http://gateway/echo", data=body) as reply:
        assert reply.status == status
