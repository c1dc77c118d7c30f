"""`@app.server`: from the client's deployment to answers of its containers, and what happens when something dies."""

import asyncio
import contextlib
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

PROGRAMS = Path(__file__).parent / "programs"
LOOK_UP = """
import modal
for name in ("Open", "Closed", "Failing"):
    print(modal.Server.from_name("servers-e2e", name).get_url())
"""
CALL = """
import modal
reached, output = modal.Function.from_name("servers-e2e", "look_without_network").remote(3 << 20)
print(reached, len(output))
"""
TUNNEL = """
import socket
import modal
function = modal.Function.from_name("servers-e2e", "tunnel_to_a_server")
queue = modal.Queue.from_name("tunnels", create_if_missing=True)
for is_unencrypted in (True, False):
    call = function.spawn(is_unencrypted)
    host, port = queue.get(timeout=60)
    with socket.create_connection((host, port), 20) as sock:
        sock.sendall(b"world")
        print(sock.recv(100).decode(), call.get(timeout=60))
    with socket.socket() as sock:
        print("closed" if sock.connect_ex((host, port)) else "still open")
"""


@pytest.fixture(scope="module")
def urls(aeolian, tmp_path_factory):
    """Of the servers, by name."""
    folder = tmp_path_factory.mktemp("servers")
    aeolian.modal("deploy", str(PROGRAMS / "servers_app.py"))
    lines = aeolian.python(LOOK_UP, folder).split()
    yield dict(zip(("Open", "Closed", "Failing"), lines, strict=True))
    aeolian.modal("app", "stop", "--yes", "servers-e2e")


async def get(url: str, count: int = 1) -> list[tuple[int, str]]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one() -> tuple[int, str]:
            async with session.get(url) as reply:
                return reply.status, await reply.text()

        return await asyncio.gather(*(one() for _ in range(count)))


def task_of(url: str) -> str:
    ((status, text),) = asyncio.run(get(url))
    assert status == 200, text
    return text.split()[0]


def test_a_burst_at_zero_is_answered_by_a_container_that_starts_for_it(urls):
    answers = asyncio.run(get(f"{urls['Open']}/path?q=1", 100))
    assert {(status, text.split(" ", 1)[1]) for status, text in answers} == {(200, "/path?q=1 0")}


def test_what_is_not_http_any_more_passes_both_ways(urls):
    parts = urlsplit(urls["Open"])
    with socket.create_connection((parts.hostname, parts.port), 20) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 101")
        sock.sendall(b"hello")
        assert sock.recv(100) == b"hello"


def test_a_server_that_is_not_open_to_everybody_asks_for_a_token(urls):
    ((status, text),) = asyncio.run(get(urls["Closed"]))
    assert status == 401 and "Modal-Key" in text


def test_who_waits_for_a_server_that_cannot_start_learns_why(urls):
    ((status, text),) = asyncio.run(get(urls["Failing"]))
    assert status == 503 and "the model is missing" in text


def test_a_container_outlives_the_server_and_is_replaced_when_it_dies(aeolian, urls):
    before = task_of(urls["Open"])
    aeolian.kill("server")
    assert task_of(urls["Open"]) == before
    with contextlib.suppress(aiohttp.ClientError):
        asyncio.run(get(f"{urls['Open']}/die"))
    assert task_of(urls["Open"]) != before


def test_requests_end_before_the_container_does_and_exit_hooks_run(aeolian, urls):
    task_id = task_of(urls["Open"])
    until = time.monotonic() + 60
    while task_id in aeolian.modal("container", "list"):
        assert time.monotonic() < until, "an idle container goes on"
        time.sleep(1)
    assert "the exit hook ran" in aeolian.modal("container", "logs", task_id)


def test_without_a_network_large_outputs_still_reach_the_caller(aeolian, urls, tmp_path):
    reached, size = aeolian.python(CALL, tmp_path).strip().rsplit(" ", 1)
    assert size == str(3 << 20)
    if aeolian.runtime != "process":
        assert "unreachable" in reached


def test_a_port_that_a_function_forwards_is_reached_until_it_ends(aeolian, urls, tmp_path):
    """Without a certificate nothing ends TLS: what is meant to be encrypted arrives as it is sent."""
    assert aeolian.python(TUNNEL, tmp_path).splitlines() == ["hello, world done", "closed"] * 2
